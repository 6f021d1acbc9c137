"""Hold an example while it is turned from text into ids, and find defects in its ids."""

from __future__ import annotations

from dataclasses import dataclass, field

from alignkit.data.text.dialogue import Dialogue
from alignkit.data.text.formats import Rendered


@dataclass
class DraftExample:
    """Hold an example while it is turned from text into ids.

    Example:
        >>> draft = DraftExample(1, Dialogue("2 + 2?", (" 4",)), prompt=[8, 9], responses=[[4, 0]])
        >>> draft.answer_length, draft.length
        (2, 4)

    Attributes:
        line: Its line in the source.
        dialogue: Its text.
        start: Where its prompt starts, once old turns are dropped.
        refusal: Why its format would not render it; empty where it did.
        restarts: Where the prompt may start instead, once old turns are dropped.
        text: What was encoded.
        prompt: Ids of the prompt, BOS first where there is one.
        responses: Ids of each response, EOS last.
        scored: Which of them carry loss.
        label: Whether its answer is good, of an unpaired row.
        movable: The part of the prompt's ids that may be cut, from its left; what is before and
            after (BOS, a template's markers) stays.
        truncated: Whether the prompt was shortened.
        proved: Whether the boundary proof was had at little cost.
        blank: Whether nothing is left of an answer once it is rendered and encoded.
        violation: The response's text whose ids change when prompt and response are encoded
            together; ``None`` where all is well.
    """

    line: int
    dialogue: Dialogue
    start: int = 0
    refusal: str = ""
    restarts: list[int] = field(default_factory=list)
    text: Rendered = field(default_factory=lambda: Rendered("", ()))
    prompt: list[int] = field(default_factory=list)
    responses: list[list[int]] = field(default_factory=list)
    scored: list[list[bool]] = field(default_factory=list)
    label: bool | None = None
    movable: tuple[int, int] = (0, 0)
    truncated: bool = False
    proved: bool = False
    blank: bool = False
    violation: str | None = None

    @property
    def answer_length(self) -> int:
        """Count the tokens of the longest response."""
        return max(len(response) for response in self.responses)

    @property
    def length(self) -> int:
        """Count the tokens of the prompt with the longest response."""
        return len(self.prompt) + self.answer_length


def rendered_defects(draft: DraftExample) -> list[str]:
    """Return the defects that an encoded draft has and its text had not.

    A template or a tokenizer may strip or normalise what made two answers differ.
    """
    answers = draft.dialogue.answers
    found = {
        "unwritten_thoughts": draft.text.thoughtless,
        "empty_answers": draft.blank and all(answer.strip() for answer in answers),
        "identical_pairs": len({tuple(each) for each in draft.responses}) < len(set(answers)),
    }
    return [name for name, present in found.items() if present]
