"""The frozen reference that a preference objective compares its policy with.

Shape letters: B pairs, R responses (2B of pairs).
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from alignkit.batch import PackedBatch
from alignkit.engine import compile_blocks, response_lengths, response_sums, score
from alignkit.errors import AlignkitError
from alignkit.lora.identity import trained_fingerprint
from alignkit.models.noise import adapters_quiet
from alignkit.modules.reference_cache import ReferenceCache, ReferencedBatch, refuse_error
from alignkit.objectives.pairs import PairScores

# A policy that is its reference's copy scores the same row through the same kernels: what is
# left is the kernels' own nondeterminism.
STEP_0_TOLERANCE = 1e-4
# Nats, for a response of some hundred tokens: other rows beside it change a sum's rounding.
CACHE_TOLERANCE = {
    torch.float64: 1e-2,  # log-probs are fp32 there too
    torch.float32: 1e-2,
    torch.float16: 0.25,
    torch.bfloat16: 2.0,
}


class Reference(nn.Module):
    """A policy as it was when the reference was made, never trained and always in eval mode.

    ``Reference(model).sums(batch)`` is the log-probability of each response of the batch. The copy
    shares the storage of whatever is frozen in the policy, so under LoRA it costs the adapters
    alone.

    Args:
        policy: Copied as it is now.
        compiled: Whether to compile the copy's blocks, which a copy of compiled ones are not.

    Attributes:
        model: The frozen copy.
        fingerprint: Identifies the weights that were trained in it.
        cache: What `open_cache` has opened; without one, every batch is scored live.
        cache_error: Scalar, the largest error, in nats, of cached rows scored again since the last
            `check_cache`.
    """

    def __init__(self, policy: PreTrainedModel, compiled: bool = False) -> None:
        super().__init__()
        self.model = frozen_copy(policy)
        if compiled:
            compile_blocks(self.model)
        self.fingerprint = trained_fingerprint(self.model)
        self.cache: ReferenceCache | None = None
        self.cache_error = torch.zeros(())
        self._base = ""
        self._agreed = False  # once seen to start as the reference, the policy may leave it
        self.train(False)

    def train(self, mode: bool = True) -> Reference:
        """Stay in eval mode, whatever is asked for."""
        return super().train(False)

    def tensor_names(self) -> list[str]:
        """Return the names of all parameters and buffers, each under every name that it has.

        They never change, so there is nothing in them for ranks to synchronise.
        """
        named = [
            *self.named_parameters(remove_duplicate=False),
            *self.named_buffers(remove_duplicate=False),
        ]
        return [name for name, _ in named]

    # Scores ---------------------------------------------------------------------------------

    def sums(self, batch: PackedBatch) -> Tensor:
        """Return the summed log-probability of each response, [R] fp32 without gradients.

        Rows come from the cache where a batch went through `look_up`, apart from those that the
        cache lacks and the few that are scored again to check it.
        """
        if self.cache is None or not isinstance(batch, ReferencedBatch):
            return self._live_sums(batch)
        live_R = self._live_sums(batch.probe)
        self.cache.add(batch, live_R)
        error = (batch.known_R[batch.probe_R] - live_R).abs().nan_to_num(0.0).max()
        self.cache_error = torch.maximum(self.cache_error.to(error.device), error)
        return batch.known_R.index_copy(0, batch.probe_R, live_R)

    def scores(self, batch: PackedBatch) -> PairScores:
        """Return `sums` as the scores of B pairs, for a batch of two responses an example."""
        return PairScores.from_responses(self.sums(batch), response_lengths(batch))

    def _live_sums(self, batch: PackedBatch) -> Tensor:
        with torch.inference_mode():
            sums_R = response_sums(score(self.model, batch), batch)
        return sums_R.clone()  # out here an ordinary tensor, which a loss may keep for its gradient

    # Cache ----------------------------------------------------------------------------------

    def open_cache(self, directory: Path, base: str, checks: int = 1) -> None:
        """Keep summed log-probs between runs.

        Args:
            directory: Where the caches of all references lie.
            base: Fingerprint of the base model.
            checks: Known examples of each batch that are scored again; at least 1.
        """
        self._base = base
        self.cache = ReferenceCache(directory, self._name(self.model.dtype), checks)

    def compute_in(self, dtype: torch.dtype) -> None:
        """Go on with the cache of what products in this dtype give: each has its own."""
        cache, name = self.cache, self._name(dtype)
        if cache is not None and cache.home.name != name:
            self.cache = ReferenceCache(cache.home.parent, name, cache.checks)

    def look_up(self, batch: PackedBatch) -> PackedBatch:
        """Return a batch on the CPU with what the cache knows of it, if there is a cache."""
        return batch if self.cache is None else self.cache.look_up(batch)

    def check_cache(self, dtype: torch.dtype) -> None:
        """Stop at cached rows that are not what the reference gives, and measure anew.

        Args:
            dtype: That the products have; it sets how far rounding may go.

        Raises:
            AlignkitError: A row that was scored again is off by more.
        """
        if self.cache is not None:
            refuse_error(self.cache_error.item(), CACHE_TOLERANCE[dtype], self.cache.home)
        self.cache_error = torch.zeros(())

    def write_cache(self) -> None:
        """Write what the cache learned, if there is one."""
        if self.cache is not None:
            self.cache.write()

    def _name(self, computed: torch.dtype) -> str:
        stored = self.model.dtype
        # Weights that autocast rounds on the way are not those of a base stored so.
        dtypes = [stored] if computed == stored else [stored, computed]
        dtype = "-".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        return f"{self._base}-{self.fingerprint}-{dtype}"

    # Start ----------------------------------------------------------------------------------

    @torch.no_grad()
    def check_start(self, policy: PreTrainedModel, batch: PackedBatch, dropout: bool) -> None:
        """Stop a run whose policy does not start as its reference; look once.

        Measured in training mode, where noise in the base would show, but without the dropout of
        adapters, which is meant.

        Args:
            policy: The model in training mode, before its first step.
            batch: Pairs to score under both.
            dropout: Whether the base's own dropout is meant too.

        Raises:
            AlignkitError: The two differ by more than rounding.
        """
        if self._agreed:
            return
        policy.train(not dropout)
        with adapters_quiet(policy):
            ours = pair_scores(policy, batch)
        policy.train()
        # Cached rows were rounded in other rows.
        theirs = PairScores.from_responses(self._live_sums(batch), response_lengths(batch))
        gap = torch.stack([ours.chosen - theirs.chosen, ours.rejected - theirs.rejected])
        worst = gap.abs().max().item()
        scale = ours.rejected.abs().max().item() + 1.0
        # A policy that is not finite itself is stopped for that, with its rows.
        if worst > STEP_0_TOLERANCE * scale:
            raise AlignkitError(
                f"model: policy and reference differ by {worst:.3g} nats before the first step, so "
                "rewards would not start at 0; the policy was changed after the reference was "
                "copied, or its forward pass is not deterministic"
            )
        self._agreed = True


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Deep-copy a model, sharing the parameters that are frozen in it and all its buffers.

    Args:
        model: The policy.

    Returns:
        The copy in eval mode with nothing trainable.
    """
    shared = [p for p in model.parameters() if not p.requires_grad] + list(model.buffers())
    copied: PreTrainedModel = copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
    copied.requires_grad_(False)  # what is shared was frozen before
    copied.train(False)
    return copied


def pair_scores(model: PreTrainedModel, batch: PackedBatch) -> PairScores:
    """Score B pairs under one model: `PairScores` of [B] sums, fp32."""
    sums_R = response_sums(score(model, batch), batch)
    return PairScores.from_responses(sums_R, response_lengths(batch))
