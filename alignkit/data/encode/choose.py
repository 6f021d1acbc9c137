"""Choose the format for `prompt_format: auto`: the chat template, or HH-RLHF's text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from alignkit.data.encode.columns import named_row
from alignkit.data.read.rows import BadRow, Source
from alignkit.data.text.chat_templates import own_template
from alignkit.data.text.dialogue import RowError
from alignkit.data.text.shapes import Side, Sides
from alignkit.models.text_format import PromptFormat

_ROWS = 100


class Choice(NamedTuple):
    """Hold a prompt format and why it was chosen, in a few words.

    Example:
        >>> choice = Choice("boundary", "the tokenizer gpt2 has no chat template")
        >>> choice.prompt_format
        'boundary'
    """

    prompt_format: PromptFormat
    why: str


def choose_format(
    tokenizer: PreTrainedTokenizerBase,
    sources: Iterable[Source],
    sides: Sides,
    columns: Mapping[str, str] | None = None,
) -> Choice:
    """Choose the prompt format that most of the first hundred readable rows fit.

    A row is one of messages where it says who speaks (`Side.messages`), in whatever shape; text
    with HH-RLHF's labels in it is not.

    Args:
        tokenizer: Without a chat template nothing is read, as there is no choice.
        sources: Where the rows are, the training rows first.
        sides: Reads a row.
        columns: As in `alignkit.data.encode.dialogues.DialogueEncoder`.
    """
    if own_template(tokenizer) is None:
        name = tokenizer.name_or_path or type(tokenizer).__name__
        return Choice("boundary", f"the tokenizer {name} has no chat template")
    read = list(islice(_read(sources, sides, columns), _ROWS))
    messages = sum(all(side.messages is not None for side in row) for row in read)
    seen = f"{messages} of the first {len(read)} rows"
    if read and 2 * messages >= len(read):
        return Choice("chat", f"{seen} are messages and the tokenizer has a chat template")
    return Choice("boundary", f"{seen} are messages; the others are HH-RLHF's text")


def _read(
    sources: Iterable[Source], sides: Sides, columns: Mapping[str, str] | None
) -> Iterator[Sequence[Side]]:
    """Yield the sides of every readable row; other rows are reported when they are encoded."""
    for source in sources:
        for _, row in source.rows():
            row = named_row(row, columns)
            if isinstance(row, BadRow):
                continue
            try:
                yield sides(row)
            except RowError:
                continue
