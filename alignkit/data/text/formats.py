r"""Render dialogues as text for the tokenizer, in one of four prompt formats.

``auto``, the default of the data modules, is ``chat`` where the rows are messages and the tokenizer
has a chat template, and ``boundary`` otherwise.

``boundary``
    The published text. The prompt ends right after ``Assistant:`` and the answer keeps its space,
    so both have the same tokens apart as together.
``stripped``
    A template of its own, ``prompt + "\nAssistant: " + response``, both stripped. The prompt
    ends with a space token that the whole text does not have, so it fails the boundary proof: of
    2,000 HH-RLHF pairs 2,000 with GPT-2's tokenizer and 1,999 with GPT-NeoX's (99.8 % of single
    answers). It is here to compare with; asking for it by name allows the violations, which are
    counted and logged, unless ``policies.boundary`` is ``error``.
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

from alignkit.data.text.chat import ChatTemplate
from alignkit.data.text.chat_templates import own_template
from alignkit.data.text.dialogue import ASSISTANT, HUMAN, Dialogue, Message
from alignkit.data.text.thoughts import lacks_thought
from alignkit.errors import AlignkitError
from alignkit.models.text_format import SPECIALS, PromptFormat
from alignkit.models.tokenizer import end_tokens


@dataclass(frozen=True)
class Rendered:
    """Hold the rendered texts of a prompt and its responses, which are to be encoded.

    Example:
        >>> text = Rendered("<user>2 + 2?</s><assistant>", (("4</s>",),))
        >>> list(text.pieces())
        ['<user>2 + 2?</s><assistant>', '4</s>']

    Attributes:
        prompt: What generation is fed.
        responses: What follows it, each in pieces that carry loss and do not, by turns; the first
            and the last one do. Mostly there is one piece, the answer. EOS is left to the encoder,
            but where the text itself ends with a special token (`Format.specials`).
        blank: Whether a template renders nothing of an answer.
        thoughtless: Whether a template leaves out a thought of a turn that carries loss.
    """

    prompt: str
    responses: tuple[tuple[str, ...], ...]
    blank: bool = False
    thoughtless: bool = False

    def pieces(self) -> Iterator[str]:
        """Yield every text, the prompt first."""
        yield self.prompt
        for response in self.responses:
            yield from response


class Format:
    """Render dialogues, from any of their turns on.

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
        reads: What it has a place for beside text: ``tools``, and fields of thoughts.

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
        written = self.chat_template
        self._template = None if written is None else ChatTemplate(tokenizer, written)
        self.reads: frozenset[str] = frozenset()
        if self._template is not None:
            self.reads = self._template.thoughts
            self.reads |= {"tools"} if self._template.reads_tools else set()
        self._all_turns = all_turns
        self._ends = end_tokens(tokenizer) if self.specials else ()

    @property
    def identity(self) -> list[Any]:
        """Return what the encoded set depends on beside the tokenizer's ids."""
        return [self.name, self.chat_template, self._all_turns]

    def restarts(self, dialogue: Dialogue) -> list[int]:
        """Return where a dialogue may start once old turns are dropped: its later human turns."""
        if self.name == "raw":
            return []
        starts = dialogue.turn_starts()
        human = [at for at in starts if dialogue.prompt[at:].lstrip().startswith(HUMAN)]
        return human[1:]

    def system(self, dialogue: Dialogue) -> str:
        """Return the system's message as the format has it; empty for none."""
        return dialogue.opening()

    def render(self, dialogue: Dialogue, start: int = 0) -> Rendered:
        """Render the dialogue, its prompt from the character ``start`` on (a turn's start)."""
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
        template, tools = self._chat_of(), dialogue.tools
        messages = dialogue.history(start)
        spoken = [i for i, each in enumerate(messages) if each.role == "assistant"]
        before = [i for i in spoken if self._all_turns and messages[i].trained]
        wanted = [*before, len(messages)]
        replies = dialogue.said()
        if not replies:
            asked = template.apply(messages, add_generation_prompt=True, tools=tools)
            return Rendered(asked + dialogue.continued, ())
        prompts, responses, blank, thoughtless = set(), [], False, False
        for reply in replies:
            whole, turns = template.turns([*messages, reply], wanted, tools)
            if dialogue.continued:
                turns[-1] = _continued(whole, turns[-1], dialogue.continued)
            cuts = [place for turn in turns for place in (turn.start, turn.stop)]
            pieces = tuple(whole[at:upto] for at, upto in pairwise(cuts))
            prompts.add(whole[: cuts[0]])
            if reply.content.strip() not in pieces[-1]:  # the template makes something else of it
                nothing = [*messages, Message("assistant", "")]
                empty, places = template.turns(nothing, wanted, tools)
                blank |= pieces[-1] == empty[places[-1]]
            said = zip(pieces[::2], [*(messages[at] for at in before), reply], strict=True)
            thoughtless |= any(lacks_thought(piece, message) for piece, message in said)
            responses.append(pieces)
        if len(prompts) > 1:
            raise AlignkitError(
                "prompt_format=chat: this chat template renders a prompt differently by what is "
                "answered, so answers cannot be compared; use prompt_format=boundary"
            )
        return Rendered(prompts.pop(), tuple(responses), blank, thoughtless)

    def question(self, dialogue: Dialogue, start: int, text: Rendered) -> tuple[int, int]:
        """Find the prompt's last question in its text; the same place twice for nowhere."""
        if self._template is None:
            return 0, 0
        messages = dialogue.history(start)
        if self._all_turns:
            spoken = (i for i, m in enumerate(messages) if m.role == "assistant" and m.trained)
            messages = messages[: next(spoken, len(messages))]
        if not messages:
            return 0, 0
        return self._template.words_of(messages, text.prompt, dialogue.tools)

    def ended(self, response: tuple[str, ...]) -> bool:
        """Tell whether a response's text holds its end already, so that no EOS is to be added."""
        return bool(self._ends) and response[-1].endswith(self._ends)

    def _upto_end(self, text: str) -> str:
        """Return a text without the white space that follows a special token at its end."""
        stem = text.rstrip()
        return stem if stem.endswith(self._ends) else text

    def apply(
        self, messages: Sequence[Message], *, add_generation_prompt: bool, tools: str = ""
    ) -> str:
        """Render messages with the chat template.

        Raises:
            AlignkitError: The template refuses them.
        """
        template = self._chat_of()
        return template.apply(messages, add_generation_prompt=add_generation_prompt, tools=tools)

    def _chat_of(self) -> ChatTemplate:
        assert self._template is not None, "only chat renders messages with a template"
        return self._template


def _continued(whole: str, turn: slice, words: str) -> slice:
    """Return the assistant's turn without its first words, which are the prompt's.

    Raises:
        AlignkitError: The template makes something else of them.
    """
    for said in (words, words.strip()):
        at = whole.find(said, turn.start, turn.stop)
        if at >= 0 and not whole[turn.start : at].strip():
            return slice(at + len(said), turn.stop)
    raise AlignkitError(
        "prompt_format=chat: this chat template changes the assistant's words that the prompt "
        "ends with, so no answer can go on with them; use prompt_format=boundary"
    )


def _all_turns(dialogue: Dialogue, start: int) -> Rendered:
    """Split a dialogue's text after each label of the assistant and where its turn ends."""
    text = dialogue.prompt
    cuts = [at for turn in dialogue.answered(start) for at in turn]
    cuts.append(len(text))  # the turn that the answer continues
    between = [text[i:j] for i, j in pairwise(cuts)]
    prompt = dialogue.since(start)
    prompt = prompt[: len(prompt) - (len(text) - cuts[0])]
    return Rendered(prompt, tuple((*between, answer) for answer in dialogue.answers))
