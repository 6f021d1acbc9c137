r"""How a dialogue becomes text for the tokenizer: three formats, one interface.

``boundary`` (the default)
    The published text. The prompt ends right after ``Assistant:`` and the answer keeps its space,
    so both have the same tokens apart as together.
``seed``
    The seed report's template, ``prompt + "\nAssistant: " + response``, both stripped. The prompt
    ends with a space token that the whole text does not have, so it fails the boundary proof: of
    2,000 HH-RLHF pairs 2,000 with GPT-2's tokenizer and 1,999 with GPT-NeoX's (99.8 % of single
    answers). It is here to reproduce the report; asking for it by name allows the violations,
    which are counted and logged, unless ``policies.boundary`` is ``error``.
``chat``
    The tokenizer's chat template.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

from transformers import PreTrainedTokenizerBase

from alignkit.data.dialogue import ASSISTANT, HUMAN, Dialogue, Message
from alignkit.errors import AlignkitError

PromptFormat = Literal["boundary", "seed", "chat"]


@dataclass(frozen=True)
class Rendered:
    """Texts to encode.

    Attributes:
        prompt: What generation is fed.
        responses: What follows it, without EOS, each in pieces that carry loss and do not, by
            turns; the first and the last one do. Mostly there is one piece, the answer.
        blank: Whether a template renders nothing of an answer.
    """

    prompt: str
    responses: tuple[tuple[str, ...], ...]
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

    Attributes:
        specials: Whether the texts hold special tokens that are meant as such.

    Raises:
        AlignkitError: An unknown name, a tokenizer without the template ``chat`` needs, or
            ``all_turns`` with ``seed``, which knows one answer only.
    """

    def __init__(
        self, name: PromptFormat, tokenizer: PreTrainedTokenizerBase, *, all_turns: bool = False
    ) -> None:
        if name not in get_args(PromptFormat):
            known = ", ".join(get_args(PromptFormat))
            raise AlignkitError(f"prompt_format={name!r}: choose one of {known}")
        if name == "chat" and not tokenizer.chat_template:
            raise AlignkitError(
                f"prompt_format=chat: the tokenizer {tokenizer.name_or_path} has no chat template; "
                "use prompt_format=boundary"
            )
        if name == "seed" and all_turns:
            raise AlignkitError(
                "turns=all: prompt_format=seed knows the last answer only; "
                "use prompt_format=boundary"
            )
        self.name = name
        self.specials = name == "chat"
        self._tokenizer = tokenizer
        self._all_turns = all_turns

    @property
    def identity(self) -> list[Any]:
        """What the encoded set depends on beside the tokenizer's ids."""
        template = str(self._tokenizer.chat_template) if self.specials else None
        return [self.name, template, self._all_turns]

    def restarts(self, dialogue: Dialogue) -> list[int]:
        """Where a dialogue may start once old turns are dropped: at its later human turns."""
        starts = dialogue.turn_starts()
        human = [at for at in starts if dialogue.prompt[at:].lstrip().startswith(HUMAN)]
        return human[1:]

    def render(self, dialogue: Dialogue, start: int = 0) -> Rendered:
        """The dialogue's texts, its prompt from the character ``start`` on (a turn's start)."""
        if self.name == "chat":
            return self._chat(dialogue, start)
        if self.name == "seed":
            stem = dialogue.since(start).removesuffix(ASSISTANT).strip()
            answers = tuple((answer.strip(),) for answer in dialogue.answers)
            return Rendered(f"{stem}\n{ASSISTANT} ", answers)
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
        prompt = self._apply(messages[:first], add_generation_prompt=True)
        responses = []
        blank = False
        for content in dialogue.replies():
            pieces = self._chat_pieces([*messages, Message("assistant", content)], first, prompt)
            if content.strip() not in pieces[-1]:  # the template makes something else of it
                nothing = [*messages, Message("assistant", "")]
                blank |= pieces == self._chat_pieces(nothing, first, prompt)
            responses.append(pieces)
        return Rendered(prompt, tuple(responses), blank)

    def _chat_pieces(self, messages: list[Message], first: int, prompt: str) -> tuple[str, ...]:
        """What follows the prompt: the messages to be trained on and what lies between them."""
        pieces = []
        so_far = prompt
        for i in range(first, len(messages)):
            if messages[i].role != "assistant" or not messages[i].trained:
                continue
            for upto, asks in ((i, True), (i + 1, False)):
                whole = self._apply(messages[:upto], add_generation_prompt=asks)
                if not whole.startswith(so_far):
                    raise AlignkitError(
                        "prompt_format=chat: this chat template renders a prompt differently "
                        "once its answer follows, so no answer can be scored; "
                        "use prompt_format=boundary"
                    )
                pieces.append(whole[len(so_far) :])
                so_far = whole
        # The first piece is what lies between the prompt and itself: nothing.
        last = pieces[-1].rstrip().removesuffix(str(self._tokenizer.eos_token))  # comes as an id
        return (*pieces[1:-1], last)

    def _apply(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        said = [{"role": each.role, "content": each.content} for each in messages]
        try:
            text = self._tokenizer.apply_chat_template(
                said, tokenize=False, add_generation_prompt=add_generation_prompt
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
