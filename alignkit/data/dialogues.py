"""Provide data modules for dialogues: prompts with one answer (SFT) or with ranked answers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, get_args

from transformers import PreTrainedTokenizerBase

from alignkit.data.base import AlignmentDataModule
from alignkit.data.encode.choose import choose_format
from alignkit.data.encode.dialogues import DialogueEncoder
from alignkit.data.keep.mismatched import MismatchedSet
from alignkit.data.keep.splits import RowEncoder
from alignkit.data.read.rows import Source
from alignkit.data.read.sources import DataPath, weights_of
from alignkit.data.text.policies import DEFAULTS, Policies
from alignkit.data.text.recognise import check_columns
from alignkit.data.text.shapes import Side, preference_sides, sft_sides
from alignkit.data.text.unpaired import unpaired_sides
from alignkit.errors import AlignkitError
from alignkit.models.text_format import PromptChoice, PromptFormat

log = logging.getLogger(__name__)

HH_RLHF = "Anthropic/hh-rlhf"


class DialogueDataModule(AlignmentDataModule):
    """Provide dialogues with answers; a subclass says which of a row's answers it takes.

    Args:
        tokenizer: See `AlignmentDataModule`, as for every argument not named here.
        path: See `AlignmentDataModule`.
        max_length: Most tokens of a prompt with one answer, EOS included. Old turns go first,
            whole, then the left of the last one; an answer is never cut.
        prompt_format: ``auto`` takes the tokenizer's chat template where the rows are messages
            and it has one, HH-RLHF's text otherwise, and logs which and why. By name: ``chat``,
            ``boundary`` (HH-RLHF's text), ``stripped``, or ``raw`` for rows that were rendered
            before; docs/data.md shows each.
        policies: What to do with each defect; see `Policies`.
        columns: The rows' columns by the names that are read, where they have others:
            ``{"prompt": "query", "chosen": "better"}``.
        **options: Passed to `AlignmentDataModule`.
    """

    sides: Callable[[Mapping[str, Any]], list[Side]]
    all_turns = False

    def __init__(
        self,
        tokenizer: str,
        path: DataPath,
        *,
        max_length: int = 512,
        prompt_format: PromptChoice = "auto",
        policies: Policies | None = DEFAULTS,
        columns: dict[str, str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(tokenizer, path, **options)
        if prompt_format not in get_args(PromptChoice):
            raise AlignkitError(
                f"data.prompt_format={prompt_format!r}: "
                f"choose one of {', '.join(get_args(PromptChoice))}"
            )
        self.max_length = max_length
        self.prompt_format = prompt_format
        self.policies = policies
        self.columns = check_columns(columns)
        self._found: dict[str, dict[str, list[Source]]] = {}

    def find_splits(self, place: str) -> dict[str, list[Source]]:
        """Find the sources of each split, unless `row_encoder` has found them already."""
        return self._found.pop(place, None) or super().find_splits(place)

    def row_encoder(self, tokenizer: PreTrainedTokenizerBase) -> RowEncoder:
        """Return an encoder that makes one example a row, whose answers share the prompt."""
        return DialogueEncoder(
            tokenizer,
            self.sides,
            max_length=self.max_length,
            prompt_format=self._resolve_format(tokenizer),
            all_turns=self.all_turns,
            policies=self.policies,
            columns=self.columns,
        )

    def _resolve_format(self, tokenizer: PreTrainedTokenizerBase) -> PromptFormat:
        """Return the prompt format, chosen by the training rows where it is ``auto``."""
        if self.prompt_format != "auto":
            return self.prompt_format
        choice = choose_format(tokenizer, self._sources(), self.sides, self.columns)
        if self._rank == 0:
            log.info("data.prompt_format=auto: %s, as %s", *choice)
        return choice.prompt_format

    def _sources(self) -> Iterator[Source]:
        """Yield the sources of the training rows, or of others where a place has none."""
        for place in weights_of(self.path):
            found = self._found[place] = self.find_splits(place)
            yield from found.get("train") or next(iter(found.values()))


class PreferenceDataModule(DialogueDataModule):
    """Provide prompts with k ≥ 2 ranked answers, the best first; pairs have two.

    Args:
        tokenizer: See `DialogueDataModule`, as for every argument not named here.
        path: See `AlignmentDataModule`; rows as `alignkit.data.text.shapes` describes them.
        **options: Passed to `DialogueDataModule`.
    """

    sides = staticmethod(preference_sides)


class SFTDataModule(DialogueDataModule):
    """Provide prompts with the answer to imitate, which is the chosen one of a pair.

    Args:
        tokenizer: See `DialogueDataModule`, as for every argument not named here.
        path: See `AlignmentDataModule`; rows as `alignkit.data.text.shapes` describes them.
        turns: ``last`` trains on the last answer alone, ``all`` on every turn of the assistant.
        **options: Passed to `DialogueDataModule`.
    """

    sides = staticmethod(sft_sides)

    def __init__(
        self,
        tokenizer: str,
        path: DataPath,
        *,
        turns: Literal["last", "all"] = "last",
        **options: Any,
    ) -> None:
        super().__init__(tokenizer, path, **options)
        self.all_turns = turns == "all"


class UnpairedDataModule(DialogueDataModule):
    """Provide prompts with one answer and whether it is good, each with a mismatched answer.

    The second answer belongs to another row. What a policy makes of answers to other prompts tells
    how far it has gone from its reference (KTO).

    Args:
        tokenizer: See `DialogueDataModule`, as for every argument not named here.
        path: See `AlignmentDataModule`; rows as for `SFTDataModule`, with ``label`` true or false.
        **options: Passed to `DialogueDataModule`.
    """

    sides = staticmethod(unpaired_sides)

    def _load(self) -> None:
        super()._load()
        named = self._sets.items()
        self._sets = {name: MismatchedSet(each, self.max_length, name) for name, each in named}


class HHSFTDataModule(SFTDataModule):
    """Provide the chosen answers of HH-RLHF: `SFTDataModule` with its path.

    Args:
        tokenizer: See `AlignmentDataModule`.
        path: Where the dialogues lie, if not on the Hub.
        **options: Passed to `SFTDataModule`.
    """

    def __init__(self, tokenizer: str, path: DataPath = HH_RLHF, **options: Any) -> None:
        super().__init__(tokenizer, path, **options)


class HHPreferenceDataModule(PreferenceDataModule):
    """Provide the pairs of HH-RLHF: `PreferenceDataModule` with its path.

    Args:
        tokenizer: See `AlignmentDataModule`.
        path: Where the pairs lie, if not on the Hub.
        **options: Passed to `PreferenceDataModule`.
    """

    def __init__(self, tokenizer: str, path: DataPath = HH_RLHF, **options: Any) -> None:
        super().__init__(tokenizer, path, **options)
