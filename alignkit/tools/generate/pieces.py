"""Give an answer in pieces while it is being generated."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from transformers.generation.streamers import BaseStreamer

UNFINISHED = "\ufffd"
"""What the first bytes of a character decode to."""


class Pieces(BaseStreamer):
    """Show what is sure of an answer, which together is exactly the answer.

    What may still change is held back: the bytes of an unfinished character, and what may be the
    beginning of the text that ends the answer.

    Args:
        text: Returns the answer that token ids stand for.
        told: Gets the pieces in turn.
        stop: The text that ends the answer.
    """

    def __init__(
        self, text: Callable[[list[int]], str], told: Callable[[str], None], stop: str | None
    ) -> None:
        self._text, self._told, self._stop = text, told, (stop or "").strip()
        self._ids: list[int] | None = None
        self._shown = ""

    def put(self, value: Tensor) -> None:
        """Take the prompt's tokens at first, and then each new one."""
        if self._ids is None:
            self._ids = []
            return
        self._ids += value.flatten().tolist()
        text = self._text(self._ids)
        held = max(
            (n for n in range(1, len(self._stop)) if text.endswith(self._stop[:n])), default=0
        )
        sure = text[: len(text) - held].rstrip() if held else text
        if not sure.endswith(UNFINISHED):
            self._show(sure)

    def end(self) -> None:
        """Show what was held back."""
        self._show(self._text(self._ids or []))

    def _show(self, text: str) -> None:
        if text.startswith(self._shown) and text != self._shown:
            self._told(text[len(self._shown) :])
            self._shown = text
