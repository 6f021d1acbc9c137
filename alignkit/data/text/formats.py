r"""How a dialogue becomes text for the tokenizer: four formats, one interface.

``boundary`` (the default)
    The published text. The prompt ends right after ``Assistant:`` and the answer keeps its space,
    so both have the same tokens apart as together.
``stripped``
    A template of its own, ``prompt + "\nAssistant: " + response``, both stripped. The prompt
    ends with a space token that the whole text does not have, so it fails the boundary proof: of
    2,000 HH-RLHF pairs 2,000 with GPT-2's tokenizer and 1,999 with GPT-NeoX's (99.8 % of single
    answers). It is here to reproduce the report; asking for it by name allows the violations,
    which are counted and logged, unless ``policies.boundary`` is ``error``.
``chat``
    The tokenizer's chat template. Special tokens are read as such, and BOS comes from the template
    alone, as in transformers' ``apply_chat_template(tokenize=True)``.
``raw``
    Text that was rendered before: prompt and answers as they are, special tokens read as such. An
    answer that ends with a special token gets no EOS besides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, get_args

from transformers import PreTrainedTokenizerBase

from alignkit.data.text.chat_templates import own_template
from alignkit.data.text.dialogue import ASSISTANT, HUMAN, Dialogue, Message
from alignkit.errors import AlignkitError
from alignkit.models.text_format import SPECIALS, PromptFormat
from alignkit.models.tokenizer import end_tokens


@dataclass(frozen=True)
class Rendered:
    """Texts to encode.

    Attributes:
        prompt: What generation is fed.
        responses: What follows it, each in pieces that carry loss and do not, by turns; the first
            and the last one do. Mostly there is one piece, the answer. EOS is left to the encoder,
            but where the text itself ends with a special token (`Format.specials`).
        content: Where the prompt's last question stands in it, for formats that write something
            around it which must stay; ``None`` where there is nothing, or no telling.
        blank: Whether a template renders nothing of an answer.
    """

    prompt: str
    responses: tuple[tuple[str, ...], ...]
    content: tuple[int, int] | None = None
    blank: bool = False

    def pieces(self) -> Iterator[str]:
        """Every text, the prompt first."""
        yield self.prompt
        for response in self.responses:
            yield from response


class Format:
    """Renders dialogues, from any of their turns on.

    Args:
        name: One of the formats above.
        tokenizer: Needed by ``chat`` for its template.
        all_turns: Let every turn of the assistant be a response, not the last alone.
        chat_template: For ``chat``, instead of the tokenizer's own.

    Attributes:
        specials: Whether the texts hold special tokens that are meant as such.
        keeps_start: Whether only the last question may be shortened, since something is written
            around it which must stay.
        chat_template: What ``chat`` renders with; ``None`` for the other formats.

    Raises:
        AlignkitError: An unknown name, a tokenizer without the template ``chat`` needs, or
            ``all_turns`` with a format that knows one answer only.
    """

    def __init__(
        self,
        name: PromptFormat,
        tokenizer: PreTrainedTokenizerBase,
        *,
        all_turns: bool = False,
        chat_template: str | None = None,
    ) -> None:
        if name not in get_args(PromptFormat):
            known = ", ".join(get_args(PromptFormat))
            raise AlignkitError(f"prompt_format={name!r}: choose one of {known}")
        if name in ("stripped", "raw") and all_turns:
            raise AlignkitError(
                f"turns=all: prompt_format={name} knows the last answer only; "
                "use prompt_format=boundary"
            )
        self.name = name
        self.specials = name in SPECIALS
        self.keeps_start = self.specials
        self.chat_template: str | None = None
        if name == "chat":
            self.chat_template = chat_template or own_template(tokenizer)
            if self.chat_template is None:
                raise AlignkitError(
                    f"prompt_format=chat: the tokenizer {tokenizer.name_or_path} has no chat "
                    "template; use prompt_format=boundary"
                )
        self._tokenizer = tokenizer
        self._all_turns = all_turns
        self._ends = end_tokens(tokenizer) if self.specials else ()

    @property
    def identity(self) -> list[Any]:
        """What the encoded set depends on beside the tokenizer's ids."""
        return [self.name, self.chat_template, self._all_turns]

    def restarts(self, dialogue: Dialogue) -> list[int]:
        """Where a dialogue may start once old turns are dropped: at its later human turns."""
        if self.name == "raw":
            return []
        starts = dialogue.turn_starts()
        human = [at for at in starts if dialogue.prompt[at:].lstrip().startswith(HUMAN)]
        return human[1:]

    def system(self, dialogue: Dialogue) -> str:
        """What stands before the first turn; empty where nothing does, or no one could tell."""
        starts = dialogue.turn_starts()
        return dialogue.prompt[: starts[0]].strip() if starts else ""

    def render(self, dialogue: Dialogue, start: int = 0) -> Rendered:
        """The dialogue's texts, its prompt from the character ``start`` on (a turn's start)."""
        if self.name == "chat":
            return self._chat(dialogue, start)
        if self.name == "stripped":
            stem = dialogue.since(start).removesuffix(ASSISTANT).strip()
            answers = tuple((answer.strip(),) for answer in dialogue.answers)
            return Rendered(f"{stem}\n{ASSISTANT} ", answers)
        if self.name == "raw":
            answers = tuple((self._upto_end(answer),) for answer in dialogue.answers)
            return Rendered(dialogue.prompt, answers)
        if self._all_turns:
            return _all_turns(dialogue, start)
        return Rendered(dialogue.since(start), tuple((answer,) for answer in dialogue.answers))

    def _chat(self, dialogue: Dialogue, start: int) -> Rendered:
        messages = dialogue.history(start)
        first = next(
            (
                i
                for i, message in enumerate(messages)
                if self._all_turns and message.role == "assistant" and message.trained
            ),
            len(messages),
        )
        prompt = self.apply(messages[:first], add_generation_prompt=True)
        responses = []
        blank = False
        for content in dialogue.replies():
            pieces = self._chat_pieces([*messages, Message("assistant", content)], first, prompt)
            if content.strip() not in pieces[-1]:  # the template makes something else of it
                nothing = [*messages, Message("assistant", "")]
                blank |= pieces == self._chat_pieces(nothing, first, prompt)
            responses.append(pieces)
        question = messages[first - 1].content.strip() if first else ""  # templates may trim
        at = prompt.rfind(question) if question else -1
        place = (at, at + len(question)) if at >= 0 else None
        return Rendered(prompt, tuple(responses), place, blank)

    def _chat_pieces(self, messages: list[Message], first: int, prompt: str) -> tuple[str, ...]:
        """What follows the prompt: the messages to be trained on and what lies between them."""
        pieces: list[str] = []
        so_far = prompt
        for i in range(first, len(messages)):
            if messages[i].role != "assistant" or not messages[i].trained:
                continue
            for upto, asks in ((i, True), (i + 1, False)):
                whole = self.apply(messages[:upto], add_generation_prompt=asks)
                if not whole.startswith(so_far):
                    raise AlignkitError(
                        "prompt_format=chat: this chat template renders a prompt differently "
                        "once its answer follows, so no answer can be scored; "
                        "use prompt_format=boundary"
                    )
                pieces.append(whole[len(so_far) :])
                so_far = whole
        # The first piece is what lies between the prompt and itself: nothing.
        return (*pieces[1:-1], self._upto_end(pieces[-1]))

    def ended(self, response: tuple[str, ...]) -> bool:
        """Whether a response's text holds its end already, so that no EOS is to be added."""
        return bool(self._ends) and response[-1].endswith(self._ends)

    def _upto_end(self, text: str) -> str:
        """A text without the white space that follows a special token at its end."""
        stem = text.rstrip()
        return stem if stem.endswith(self._ends) else text

    def apply(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """What the chat template makes of messages.

        Raises:
            AlignkitError: The template refuses them.
        """
        said = [{"role": each.role, "content": each.content} for each in messages]
        try:
            text = self._tokenizer.apply_chat_template(
                said,
                chat_template=self.chat_template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as error:  # a template is a program: it raises what it likes
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise AlignkitError(f"prompt_format=chat: the template failed ({reason})") from error
        return str(text)


def _all_turns(dialogue: Dialogue, start: int) -> Rendered:
    """The dialogue's text, cut after each label of the assistant and where its turn ends."""
    text = dialogue.prompt
    cuts = [at for turn in dialogue.answered(start) for at in turn]
    cuts.append(len(text))  # the turn that the answer continues
    between = [text[i:j] for i, j in pairwise(cuts)]
    prompt = dialogue.since(start)
    prompt = prompt[: len(prompt) - (len(text) - cuts[0])]
    return Rendered(prompt, tuple((*between, answer) for answer in dialogue.answers))
