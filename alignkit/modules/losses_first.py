"""Write metrics to TensorBoard under names by which its page opens on the losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping


class LossesFirst:
    """Take the place of a TensorBoard logger's ``log_metrics``.

    TensorBoard sorts its cards by name, so what comes first is a matter of names:

    - ``train/loss`` and ``val/loss`` are written as ``loss/<stage>/train`` and ``loss/<stage>/val``
      besides. Stages whose losses have other scales thus have charts of their own.
    - ``epoch`` is left out.
    - A mean over an epoch (``train/…_epoch``) is held back until a second one comes, as one point
      would make a card without a curve.

    Example:
        >>> LossesFirst(print, "DPO")({"train/loss": 0.7, "epoch": 0}, 3)
        {'loss/DPO/train': 0.7, 'train/loss': 0.7} 3

    Args:
        write: The logger's own method.
        stage: The name of the stage.

    Attributes:
        write: The logger's own method.
    """

    def __init__(self, write: Callable[..., None], stage: str) -> None:
        self.write = write
        self._stage = stage
        self._held: dict[str, tuple[float, int | None]] = {}
        self._curves: set[str] = set()

    def __call__(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write the metrics of a step."""
        losses = {
            f"loss/{self._stage}/{split}": metrics[f"{split}/loss"]
            for split in ("train", "val")
            if f"{split}/loss" in metrics
        }
        others = {
            name: value
            for name, value in metrics.items()
            if name != "epoch" and not self._is_lone(name, value, step)
        }
        if losses or others:
            self.write({**losses, **others}, step)

    def _is_lone(self, name: str, value: float, step: int | None) -> bool:
        """Hold the first mean over an epoch back, and write it before the second."""
        if not (name.startswith("train/") and name.endswith("_epoch")) or name in self._curves:
            return False
        if name not in self._held:
            self._held[name] = (value, step)
            return True
        first, at = self._held.pop(name)
        self.write({name: first}, at)
        self._curves.add(name)
        return False
