"""Compile a model with `torch.compile`, block by block, over rows of few different lengths.

All blocks of a model run the same code. One compilation with gradients and one without therefore
serve every layer, and a symbolic row length serves every length. Attention over a packed row is
not compiled, because its plan changes with every row.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from alignkit.batch import PackedBatch, Span
from alignkit.engine.verify import is_never_packed
from alignkit.errors import AlignkitError

ROW_MULTIPLE = 64
"""Rows of a compiled model are padded to a multiple of this many tokens."""


def compile_blocks(model: PreTrainedModel) -> int:
    """Prepare each of a model's blocks, in place, to be compiled at its first forward.

    Args:
        model: Any model of transformers; its parameters and their names stay as they are.

    Returns:
        The number of blocks.

    Raises:
        AlignkitError: The model has no blocks of transformers' kind, it is scored one sequence a
            forward, or PyTorch has no working compiler on this machine.
    """
    if is_never_packed(model):
        # Single sequences vary too much in length, and the scans of recurrent layers take minutes
        # to compile.
        raise AlignkitError(
            f"model.compile: {type(model).__name__} is scored one sequence a forward, for which "
            "its blocks are not compiled; leave it off"
        )
    blocks = blocks_of(model)
    if not blocks:
        raise AlignkitError(
            f"model.compile: {type(model).__name__} has no blocks to compile; leave it off"
        )
    _check_compiler()
    for block in blocks:
        block.compile(dynamic=True)
    return len(blocks)


def padded_for(model: PreTrainedModel, batch: PackedBatch) -> PackedBatch:
    """Return the batch with its row padded to the next bucket if the model is compiled.

    The padding is one more example, of which nothing is scored. T grows and N stays.
    """
    missing = -batch.num_tokens % ROW_MULTIPLE
    blocks = blocks_of(model)
    if missing == 0 or not blocks or blocks[0]._compiled_call_impl is None:
        return batch
    padding = torch.arange(missing, device=batch.position_ids.device)
    return replace(
        batch,
        input_ids=F.pad(batch.input_ids, (0, missing)),
        position_ids=torch.cat((batch.position_ids, padding)),
        spans=(*batch.spans, Span(batch.num_tokens, missing - 1, (1,))),
    )


def blocks_of(model: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    """Return a model's decoder blocks, which are all alike."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def _check_compiler() -> None:
    """Refuse to compile where `torch.compile` fails on a small function.

    A model is compiled at its first forward, which may come an hour into a run.
    """
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8))
    except Exception as error:  # what a missing compiler raises differs with system and version
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise AlignkitError(
            f"model.compile: torch.compile does not work here ({reason}); install a C++ compiler "
            "or leave it off"
        ) from error
