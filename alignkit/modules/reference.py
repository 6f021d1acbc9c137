"""Score batches under the frozen reference that a preference loss compares the policy with.

Shape letters: R responses (2B of B pairs).
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from alignkit.batch import PackedBatch
from alignkit.engine import compile_blocks, response_sums, score
from alignkit.errors import AlignkitError
from alignkit.lora.identity import trained_fingerprint
from alignkit.models.noise import adapters_quiet
from alignkit.models.residual import is_widened
from alignkit.modules.reference_cache import ReferenceCache, ReferencedBatch, refuse_wrong_rows

# Before the first step policy and reference score the same row through the same kernels, so only
# the kernels' nondeterminism separates them.
STEP_0_TOLERANCE = 1e-4
# In nats, for a response of some hundred tokens: the other examples of a row change the rounding.
CACHE_TOLERANCE = {
    torch.float64: 1e-2,  # log-probs are fp32 there too
    torch.float32: 1e-2,
    torch.float16: 0.25,
    torch.bfloat16: 2.0,
}


class ReferenceModel(NamedTuple):
    """Hold a frozen model and the fingerprints that say which one it is.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=16))
        >>> ReferenceModel.copied_from(model).base  # the policy's own
        ''

    Attributes:
        model: The model, in eval mode.
        trained: Names what was trained of it, see `trained_fingerprint`.
        base: Names the base below, where it need not be the policy's.
    """

    model: PreTrainedModel
    trained: str
    base: str = ""

    @classmethod
    def copied_from(cls, policy: PreTrainedModel) -> ReferenceModel:
        """Return a frozen copy of the policy as it is now."""
        model = frozen_copy(policy)
        return cls(model, trained_fingerprint(model))


class Reference(nn.Module):
    """Score responses under a frozen copy of the policy, which stays in eval mode.

    ``Reference(model).sums(batch)`` is the log-probability of each response of the batch. The copy
    shares the storage of the policy's frozen parameters, so under LoRA it adds only the memory of
    the adapters.

    Args:
        policy: The model to copy, with the weights that it has now.
        compiled: Whether to compile the copy's blocks; copying compiled blocks does not.
        chosen: Another model to score with in the copy's place.

    Attributes:
        model: The frozen model.
        fingerprint: A hash that identifies it: its trained weights, and its base where that is not
            the policy's.
        base: Fingerprint of the base model, for the cache's name.
        cache: The cache that `open_cache` opened; without one, every batch is scored live.
        cache_error: Scalar, the largest error, in nats, of cached rows scored again since the last
            `check_cache`.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        compiled: bool = False,
        chosen: ReferenceModel | None = None,
    ) -> None:
        super().__init__()
        self.model, trained, base = chosen or ReferenceModel.copied_from(policy)
        if compiled:
            compile_blocks(self.model)
        self.fingerprint = f"{base}-{trained}" if base else trained
        self.cache: ReferenceCache | None = None
        self.cache_error = torch.zeros(())
        self.base = ""
        # Whether `check_start` need not compare: it has, or the reference is no copy.
        self._agreed = chosen is not None
        self.train(False)

    def train(self, mode: bool = True) -> Reference:
        """Stay in eval mode, whatever ``mode`` is."""
        return super().train(False)

    def tensor_names(self) -> list[str]:
        """Return the names of all parameters and buffers; a shared one has several.

        DDP need not synchronise them, because they never change.
        """
        named = [
            *self.named_parameters(remove_duplicate=False),
            *self.named_buffers(remove_duplicate=False),
        ]
        return [name for name, _ in named]

    # Scores ---------------------------------------------------------------------------------

    def sums(self, batch: PackedBatch, weights_N: Tensor | None = None) -> Tensor:
        """Return the summed log-probability of each response, [R] fp32 without gradients.

        With weights of tokens, [N], the sums are weighted and always live. Otherwise, if the batch
        went through `look_up`, values come from the cache, except for those that it lacks and the
        few that are scored again to check it.
        """
        if self.cache is None or not isinstance(batch, ReferencedBatch) or weights_N is not None:
            return self._live_sums(batch, weights_N)
        live_R = self._live_sums(batch.probe)
        self.cache.add(batch, live_R)
        error = (batch.known_R[batch.probe_R] - live_R).abs().nan_to_num(0.0).max()
        self.cache_error = torch.maximum(self.cache_error.to(error.device), error)
        return batch.known_R.index_copy(0, batch.probe_R, live_R)

    def _live_sums(self, batch: PackedBatch, weights_N: Tensor | None = None) -> Tensor:
        with torch.inference_mode():
            logps_N = score(self.model, batch)
            weighted_N = logps_N if weights_N is None else logps_N * weights_N
            sums_R = response_sums(weighted_N, batch)
        return sums_R.clone()  # a clone is no inference tensor, so autograd may save it

    # Cache ----------------------------------------------------------------------------------

    def open_cache(self, directory: Path, base: str, checks: int = 1) -> None:
        """Open a cache that keeps summed log-probs between runs.

        Args:
            directory: The folder with the caches of all references.
            base: Fingerprint of the base model.
            checks: Number of cached examples of each batch that are scored again; at least 1.
        """
        self.base = base
        self.cache = ReferenceCache(directory, self._name(self.model.dtype), checks)

    def set_compute_dtype(self, dtype: torch.dtype) -> None:
        """Open the cache for matrix products in this dtype; each dtype has its own."""
        cache, name = self.cache, self._name(dtype)
        if cache is not None and cache.home.name != name:
            self.cache = ReferenceCache(cache.home.parent, name, cache.checks)

    def look_up(self, batch: PackedBatch) -> PackedBatch:
        """Return a batch on the CPU with its cached log-probs, or unchanged without a cache."""
        return batch if self.cache is None else self.cache.look_up(batch)

    def check_cache(self, dtype: torch.dtype) -> None:
        """Refuse cached values that differ from the reference's, and reset `cache_error`.

        Args:
            dtype: Dtype of the matrix products, which sets the tolerance for rounding.

        Raises:
            AlignkitError: A value that was scored again differs by more than the tolerance.
        """
        if self.cache is not None:
            refuse_wrong_rows(self.cache_error.item(), CACHE_TOLERANCE[dtype], self.cache.home)
        self.cache_error = torch.zeros(())

    def write_cache(self) -> None:
        """Write the new rows of the cache, if there is one."""
        if self.cache is not None:
            self.cache.write()

    def _name(self, computed: torch.dtype) -> str:
        stored = self.model.dtype
        # fp32 weights under bf16 autocast give other values than weights stored in bf16.
        dtypes = [stored] if computed == stored else [stored, computed]
        dtype = "-".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        wide = "-residual" if is_widened(self.model) else ""
        return f"{self.base}-{self.fingerprint}-{dtype}{wide}"

    # Start ----------------------------------------------------------------------------------

    @torch.no_grad()
    def check_start(self, policy: PreTrainedModel, batch: PackedBatch, dropout: bool) -> None:
        """Refuse a policy that scores a batch unlike its reference before the first step.

        The policy is scored in training mode, in which noise in the base would show, but without
        the dropout of adapters. After a first success the check does nothing.

        Args:
            policy: The model in training mode, before its first step.
            batch: Responses to score under both.
            dropout: Whether the base keeps its own dropout, which is then turned off here too.

        Raises:
            AlignkitError: The two differ by more than rounding.
        """
        if self._agreed:
            return
        policy.train(not dropout)
        with adapters_quiet(policy):
            ours_R = response_sums(score(policy, batch), batch)
        policy.train()
        # Scored live, because cached values were rounded in rows with other examples.
        worst = (ours_R - self._live_sums(batch)).abs().max().item()
        scale = ours_R.abs().max().item() + 1.0
        # A NaN passes here: the check of the step reports it, with the rows at fault.
        if worst > STEP_0_TOLERANCE * scale:
            raise AlignkitError(
                f"model: policy and reference differ by {worst:.3g} nats before the first step, so "
                "rewards would not start at 0; the policy was changed after the reference was "
                "copied, or its forward pass is not deterministic"
            )
        self._agreed = True


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Return a deep copy of a model that shares its frozen parameters and all its buffers.

    Args:
        model: The policy.

    Returns:
        The copy, in eval mode, with all parameters frozen.
    """
    shared = [p for p in model.parameters() if not p.requires_grad] + list(model.buffers())
    copied: PreTrainedModel = copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
    copied.requires_grad_(False)  # what is shared was frozen before
    copied.train(False)
    return copied
