"""Move the reference to the policy every so many steps (TR-DPO, arXiv:2404.09656)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from alignkit.errors import AlignkitError
from alignkit.lora.state import refuse_differences
from alignkit.modules.reference_choice import COPY, resolve_choice
from alignkit.modules.referenced import ReferencedModule
from alignkit.modules.sharding import units

KEY = "refreshed_reference"
"""Key of the reference's parameters in a checkpoint."""


class RefreshedModule(ReferencedModule):
    """Move the reference every ``reference_every`` optimizer steps, where that is set.

    θ_ref ← α θ + (1 − α) θ_ref, Gorbatovski et al. 2024: with α = 1 the
    reference becomes a copy of the policy, and rewards start at 0 again. What is mixed are the
    parameters that train: of an adapter its factors A and B, whose product is then not exactly the
    mean of the two products. A checkpoint holds the refreshed reference, and a resumed run goes on
    with it, whether or not it refreshes it further.
    """

    _every: int | None = None
    _mix: float = 1.0
    _choice = COPY
    _moved = False  # whether the reference is no longer the policy's first weights

    def use_reference(
        self,
        loss: str,
        reads: bool,
        choice: str | None,
        *,
        every: int | None,
        mix: float,
        cache: str | None,
        checks: int,
    ) -> None:
        """Make the reference that a loss reads, if it reads one, and say when it is refreshed.

        Args:
            loss: The loss's name.
            reads: Whether it reads a reference.
            choice: As `resolve_choice` takes it.
            every: Optimizer steps from one refresh to the next; ``None`` for a fixed reference.
            mix: α, the policy's share.
            cache: The cache's directory; ``None`` scores every batch live.
            checks: Number of cached examples of each batch that are scored again.

        Raises:
            AlignkitError: A number out of its range, or what does not go together.
        """
        if checks < 1:
            raise AlignkitError(f"model.reference_checks={checks}: give at least 1")
        if checks != 1 and cache is None:
            raise AlignkitError(
                f"model.reference_checks={checks}: checks cached rows; give model.reference_cache "
                "as well"
            )
        chosen = resolve_choice(choice, loss, reads, self.lora is None)
        self._refresh_every(every, mix, chosen, cache)
        self.reference = None
        if reads:
            self.keep_reference(chosen, cache, checks)
        elif cache is not None:
            raise AlignkitError(f"model.reference_cache: {loss} uses no reference; leave it out")

    def _refresh_every(self, every: int | None, mix: float, choice: str, cache: str | None) -> None:
        if not 0 < mix <= 1:
            raise AlignkitError(f"model.reference_mix={mix}: give a share in (0, 1]")
        if every is None and mix != 1:
            raise AlignkitError(
                "model.reference_mix: mixes at a refresh; give model.reference_every as well"
            )
        if every is not None and (not isinstance(every, int) or every < 1):
            raise AlignkitError(
                f"model.reference_every={every}: give a whole number of steps, at least 1, or null"
            )
        if every is not None and choice != COPY:
            raise AlignkitError(
                "model.reference_every: refreshes a copy of the policy, and model.reference is "
                f"{choice}; leave one of them out"
            )
        if every is not None and cache is not None:
            raise AlignkitError(
                "model.reference_cache: keeps the log-probs of one reference, and "
                "model.reference_every changes it; leave one of them out"
            )
        self._every, self._mix, self._choice = every, mix, choice

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Take the step, and refresh the reference if it is due."""
        super().optimizer_step(*args, **kwargs)
        # Lightning counts the step when this hook has returned.
        if self._every is not None and (self.global_step + 1) % self._every == 0:
            self._refresh()

    @torch.no_grad()
    def _refresh(self) -> None:
        self._moved = True
        for name, theirs in self._reference_parameters():
            own = self.model.get_parameter(name)
            if self._mix == 1:
                theirs.copy_(own)
            else:
                theirs.mul_(1 - self._mix).add_(own, alpha=self._mix)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the reference's parameters, where it is or was refreshed."""
        if self._every is not None or self._moved:
            checkpoint[KEY] = {name: p.detach() for name, p in self._reference_parameters()}
        super().on_save_checkpoint(checkpoint)

    @torch.no_grad()
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the reference's parameters, once the checkpoint is found to fit.

        Raises:
            AlignkitError: The reference is no copy that could be moved, a cache is of another one,
                or the model is sharded.
        """
        super().on_load_checkpoint(checkpoint)
        state: dict[str, Tensor] | None = checkpoint.get(KEY)
        if state is None:
            return
        if self.reference is not None and self._choice != COPY:
            raise AlignkitError(
                "ckpt_path: holds a refreshed reference, which would be moved into a copy of the "
                f"policy; leave out model.reference {self._choice}"
            )
        kept = self.reference is not None and self.reference.cache is not None
        wrong = "model.reference_cache" if kept else "trainer.strategy=fsdp2"
        if kept or units(self):
            raise AlignkitError(
                f"{wrong}: does not work with a refreshed reference, which the checkpoint holds; "
                "leave it out"
            )
        self._moved = True
        own = dict(self._reference_parameters())
        shapes = {name: tuple(parameter.shape) for name, parameter in own.items()}
        refuse_differences(state, shapes, "ckpt_path: the refreshed reference")
        for name, parameter in own.items():
            parameter.copy_(state[name])

    def _reference_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the reference's own parameters, which are those that the policy trains."""
        if self.reference is not None:
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    yield name, self.reference.model.get_parameter(name)
