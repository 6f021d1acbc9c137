"""Keep with the weights how text became tokens in training, so that generation does the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from alignkit.errors import AlignkitError
from alignkit.utils.atomic import write_atomically

PromptFormat = Literal["boundary", "stripped", "chat", "raw"]
"""How a dialogue is put into text; see `alignkit.data.text.formats`."""

PromptChoice = Literal["auto", "boundary", "stripped", "chat", "raw"]
"""A prompt format, or ``auto``: what the rows and the tokenizer call for."""

TextKind = Literal["boundary", "stripped", "chat", "raw", "text"]
"""A prompt format, or ``text``: documents, which have no prompt."""

SPECIALS = ("chat", "raw")
"""The formats whose texts hold special tokens, which are encoded as such."""

KEY = "text_format"
"""Key under which a checkpoint keeps the format, as plain values."""

FORMAT_FILE = "alignkit.json"
"""File in which exports keep the format, beside the weights."""

_VALUE_TYPES: Mapping[str, tuple[type, ...]] = {
    "prompt_format": (str,),
    "max_length": (int,),
    "chat_template": (str, type(None)),
    "system": (str, type(None)),
    "turns": (str,),
    "ends": (tuple, list),
}


@dataclass(frozen=True)
class TextFormat:
    """Hold what generation must know of the text that a model was trained on.

    Example:
        >>> trained = TextFormat(prompt_format="boundary", max_length=512, ends=(0,))
        >>> asked = TextFormat(prompt_format="boundary", max_length=256)
        >>> trained.differences(asked, "prompt_format", "max_length")
        ['max_length=512 instead of 256']
        >>> TextFormat.from_dict(trained.to_dict(), "last.ckpt") == trained
        True

    Attributes:
        prompt_format: How dialogues were put into text; ``text`` for language modelling.
        max_length: Most tokens of an example, or of a row for text.
        chat_template: The template that ``chat`` was rendered with.
        system: The system message that every training example had; ``None`` where they differ or
            have none.
        turns: Whether the ``last`` answer or ``all`` of them were trained on.
        ends: Ids that ended an answer or a document in training; empty where unknown.
    """

    prompt_format: TextKind
    max_length: int
    chat_template: str | None = None
    system: str | None = None
    turns: Literal["last", "all"] = "last"
    ends: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, which checkpoints and JSON can hold."""
        return {**asdict(self), "ends": list(self.ends)}

    @classmethod
    def from_dict(cls, values: object, where: str) -> TextFormat:
        """Read the values that `to_dict` returns.

        Args:
            values: The values as they were read.
            where: The file, for the message.

        Raises:
            AlignkitError: They are something else.
        """
        known = {field.name for field in fields(cls)}
        if (
            not isinstance(values, Mapping)
            or not {"prompt_format", "max_length"} <= set(values) <= known
            or not all(isinstance(values[name], _VALUE_TYPES[name]) for name in values)
            or values["prompt_format"] not in get_args(TextKind)
            or not all(isinstance(end, int) for end in values.get("ends", ()))
        ):
            raise AlignkitError(
                f"{where}: its text format is not one this alignkit knows; it was changed by hand "
                "or written by a newer version"
            )
        return cls(**{**values, "ends": tuple(values.get("ends", ()))})

    def differences(self, other: TextFormat, *names: str) -> list[str]:
        """Return which of the named attributes differ between two formats, with both values."""
        told = []
        for name in names:
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs and name == "chat_template" and mine and theirs:
                told.append("another chat_template")
            elif mine != theirs:
                told.append(f"{name}={_shortened(mine)} instead of {_shortened(theirs)}")
        return told


def format_in(checkpoint: Mapping[str, Any], where: str) -> TextFormat | None:
    """Return the text format that a checkpoint keeps; ``None`` where its data module named none.

    Raises:
        AlignkitError: This alignkit does not know it. The message starts with ``where``.
    """
    values = checkpoint.get(KEY)
    return None if values is None else TextFormat.from_dict(values, where)


def write_format(text_format: TextFormat, directory: Path) -> None:
    """Write the format beside exported weights."""
    text = json.dumps({"text_format": text_format.to_dict()}, indent=2, ensure_ascii=False)
    write_atomically(directory / FORMAT_FILE, text + "\n")


def read_format(directory: Path) -> TextFormat | None:
    """Read the file that `write_format` wrote into a directory; ``None`` where there is none.

    Raises:
        AlignkitError: The file cannot be read, or holds something else.
    """
    path = directory / FORMAT_FILE
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AlignkitError(f"{path}: cannot be read ({error}); export the model again") from error
    return TextFormat.from_dict(
        values.get("text_format") if isinstance(values, dict) else None, str(path)
    )


def _shortened(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:40]!r}…"
