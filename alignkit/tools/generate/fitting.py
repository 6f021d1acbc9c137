"""Find prompts that a model cannot answer, or that nobody could train on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignkit.data.text.shapes import sft_sides
from alignkit.data.text.templated import Templated
from alignkit.errors import AlignkitError
from alignkit.models.load import embedding_size
from alignkit.models.text_format import SPECIALS, TextFormat
from alignkit.tools.generate.prompts import Question, with_system


def check_ids(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> None:
    """Refuse prompts whose ids are beyond the model's embeddings.

    Raises:
        AlignkitError: One is.
    """
    size = embedding_size(model)
    largest = max((max(row, default=0) for row in rows), default=0)
    if largest >= size:
        raise AlignkitError(
            f"prompts: the tokenizer gives the id {largest:,} and the model has {size:,} "
            "embeddings; pass the tokenizer that belongs to the model"
        )


def check_lengths(model: PreTrainedModel, lengths: Sequence[int], new: int) -> None:
    """Refuse prompts that are empty, or too long together with an answer of ``new`` tokens.

    Raises:
        AlignkitError: One is.
    """
    context = getattr(model.config, "max_position_embeddings", None)
    for index, length in enumerate(lengths):
        if length == 0:
            raise AlignkitError(f"prompts: prompt {index + 1} is empty; give it some text")
        if context is not None and length + new > context:
            raise AlignkitError(
                f"prompts: prompt {index + 1} has {length} tokens, and with max_new_tokens {new} "
                f"passes the model's context of {context}; shorten it or max_new_tokens"
            )


def rendered_before(
    questions: Sequence[Question], asked: TextFormat, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[int, str]]:
    """Yield the number of each question that was rendered before, and what shows it.

    Training and judge refuse such a prompt, as its markers or labels would come twice.

    Args:
        questions: As in `alignkit.tools.generate.prompts.as_prompts`.
        asked: The text format to ask in; ``raw`` and ``text`` render nothing.
        tokenizer: The model's tokenizer.
    """
    if asked.prompt_format in ("raw", "text"):
        return
    templated = Templated(tokenizer, specials=asked.prompt_format in SPECIALS)
    for number, question in enumerate(questions, start=1):
        sign = templated.find(sft_sides({"prompt": with_system(question, asked), "completion": ""}))
        if sign is not None and sign.grave:
            yield number, sign.told
