"""Read a file of prompts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

from alignkit.data.read.opened import Place, bare_suffix, damage_told, open_bytes
from alignkit.errors import AlignkitError

_SUFFIXES = (".jsonl", ".json", ".txt", "")


def read_prompts(name: str) -> Iterator[str]:
    """Yield each prompt of a file.

    Args:
        name: As in `alignkit.tools.generate.prompts.gather_prompts`.

    Raises:
        AlignkitError: The file cannot be read, or a row has no prompt, by its place.
    """
    path = Path(name).expanduser()
    suffix = bare_suffix(path)
    if suffix not in _SUFFIXES:
        raise AlignkitError(
            f"prompts_file '{name}': pass a .jsonl, .json or .txt file, not {suffix}"
        )
    text = _text_of(path, name)
    if suffix == ".json":
        rows = _parsed(text, name)
        for number, row in enumerate(rows if isinstance(rows, list) else [rows], start=1):
            yield _prompt_of_row(
                {"prompt": row} if isinstance(row, str) else row, f"{name}:{number}"
            )
        return
    # Not by splitlines, which also parts at characters that JSON and prose may hold: U+2028, say.
    numbered = enumerate(text.split("\n"), start=1)
    lines = [(number, line) for number, line in numbered if line.strip()]
    if suffix != ".jsonl" and (_holds_json(text) or (lines and _holds_json(lines[0][1]))):
        raise AlignkitError(f"prompts_file '{name}': holds JSON; name it .jsonl or .json")
    for number, line in lines:
        where = f"{name}:{number}"
        yield _prompt_of_row(_parsed(line, where), where) if suffix == ".jsonl" else line


def _text_of(path: Path, name: str) -> str:
    """Return the text of a file, which may be compressed.

    Raises:
        AlignkitError: It cannot be read.
    """
    try:
        stream = open_bytes(path)
    except OSError as error:
        raise AlignkitError(
            f"prompts_file '{name}': {error.strerror or error}; pass a .jsonl or text file"
        ) from error
    with stream, damage_told(path, Place()):
        content = stream.read()
    try:
        return StringIO(content.decode("utf-8"), newline=None).getvalue()
    except UnicodeDecodeError as error:
        raise AlignkitError(
            f"prompts_file '{name}': byte {error.start} is not UTF-8; save the file as UTF-8"
        ) from error


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise AlignkitError(f'{where}: not JSON; write {{"prompt": "..."}}') from error


def _holds_json(text: str) -> bool:
    """Tell whether a text is a JSON object, or an array of objects or texts."""
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return False
    items = value if isinstance(value, list) else []
    return isinstance(value, dict) or any(isinstance(item, dict | str) for item in items)


def _prompt_of_row(row: Any, where: str) -> str:
    prompt = row.get("prompt") if isinstance(row, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise AlignkitError(f'{where}: no prompt; write {{"prompt": "..."}}')
    return prompt
