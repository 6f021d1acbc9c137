"""Data modules for dialogues: prompts with one answer (SFT) or with ranked ones (preferences)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from alignkit.data.base import AlignmentDataModule
from alignkit.data.encode.dialogues import DialogueEncoder
from alignkit.data.keep.splits import RowEncoder
from alignkit.data.read.sources import DataPath
from alignkit.data.text.policies import Policies
from alignkit.data.text.recognise import check_columns
from alignkit.data.text.shapes import Side, preference_sides, sft_sides
from alignkit.models.text_format import PromptFormat

HH_RLHF = "Anthropic/hh-rlhf"


class DialogueDataModule(AlignmentDataModule):
    """Dialogues with answers; a leaf says which of a row's answers it takes.

    Args:
        tokenizer: See `AlignmentDataModule`, as for every argument not named here.
        path: See `AlignmentDataModule`.
        max_length: Most tokens of a prompt with one answer, EOS included. Old turns go first,
            whole, then the left of the last one; an answer is never cut.
        prompt_format: ``boundary`` (HH-RLHF's text), ``stripped``, ``chat``, or ``raw`` for rows
            that were rendered before; see `alignkit.data.text.formats`.
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
        prompt_format: PromptFormat = "boundary",
        policies: Policies | None = None,
        columns: dict[str, str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(tokenizer, path, **options)
        self.max_length = max_length
        self.prompt_format = prompt_format
        self.policies = policies
        self.columns = check_columns(columns)

    def row_encoder(self, tokenizer: PreTrainedTokenizerBase) -> RowEncoder:
        """One example a row, its answers sharing the prompt."""
        return DialogueEncoder(
            tokenizer,
            self.sides,
            max_length=self.max_length,
            prompt_format=self.prompt_format,
            all_turns=self.all_turns,
            policies=self.policies,
            columns=self.columns,
        )


class PreferenceDataModule(DialogueDataModule):
    """Prompts with ranked answers, the best first: pairs, or any k ≥ 2.

    Args:
        tokenizer: See `DialogueDataModule`, as for every argument not named here.
        path: See `AlignmentDataModule`; rows as `alignkit.data.text.shapes` describes them.
        **options: Passed to `DialogueDataModule`.
    """

    sides = staticmethod(preference_sides)


class SFTDataModule(DialogueDataModule):
    """Prompts with the answer to imitate: of pairs, the chosen one.

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


class HHSFTDataModule(SFTDataModule):
    """HH-RLHF's chosen answers: `SFTDataModule` with its path.

    Args:
        tokenizer: See `AlignmentDataModule`.
        path: Where the dialogues lie, if not on the Hub.
        **options: Passed to `SFTDataModule`.
    """

    def __init__(self, tokenizer: str, path: DataPath = HH_RLHF, **options: Any) -> None:
        super().__init__(tokenizer, path, **options)


class HHPreferenceDataModule(PreferenceDataModule):
    """HH-RLHF's pairs: `PreferenceDataModule` with its path.

    Args:
        tokenizer: See `AlignmentDataModule`.
        path: Where the pairs lie, if not on the Hub.
        **options: Passed to `PreferenceDataModule`.
    """

    def __init__(self, tokenizer: str, path: DataPath = HH_RLHF, **options: Any) -> None:
        super().__init__(tokenizer, path, **options)
