"""Prompts from the command line and from files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from alignkit.data.dialogue import ASSISTANT, HUMAN, Dialogue
from alignkit.data.formats import Format, PromptFormat
from alignkit.errors import AlignkitError

TURN = f"\n\n{HUMAN}"


def as_prompts(
    questions: Sequence[str], prompt_format: PromptFormat, tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """Ask questions as training asked them.

    Args:
        questions: What the human says.
        prompt_format: The one the model was trained with, see `alignkit.data.formats`.
        tokenizer: The model's.

    Raises:
        AlignkitError: The tokenizer lacks what the format needs.
    """
    asked = Format(prompt_format, tokenizer)
    dialogues = [f"{TURN} {question.strip()}\n\n{ASSISTANT}" for question in questions]
    return [asked.render(Dialogue(dialogue, ())).prompt for dialogue in dialogues]


def gather_prompts(prompts: str | Sequence[str] | None, prompts_file: str | None) -> list[str]:
    """Collect the prompts given as arguments, then those of a file.

    Args:
        prompts: One prompt or several.
        prompts_file: A ``.jsonl`` file of ``{"prompt": ...}`` rows, or a text file with one
            prompt a line. Blank lines are skipped.

    Raises:
        AlignkitError: No prompt at all, an empty one, a file that cannot be read, or a row
            without a prompt (with its line number).
    """
    given = [prompts] if isinstance(prompts, str) else list(prompts or [])
    for index, prompt in enumerate(given):
        if not prompt.strip():
            raise AlignkitError(f"prompts: prompt {index + 1} is empty; give it some text")
    found = given + (list(_read(prompts_file)) if prompts_file is not None else [])
    if not found:
        where = f"prompts_file '{prompts_file}' holds none" if prompts_file else "none was given"
        raise AlignkitError(f"prompts: {where}; pass --prompts TEXT or --prompts_file FILE")
    return found


def _read(name: str) -> Iterator[str]:
    path = Path(name).expanduser()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise AlignkitError(
            f"prompts_file '{name}': {error.strerror}; pass a .jsonl or text file"
        ) from error
    except UnicodeDecodeError as error:
        raise AlignkitError(
            f"prompts_file '{name}': byte {error.start} is not UTF-8; save the file as UTF-8"
        ) from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield _row(line, f"{name}:{number}") if path.suffix == ".jsonl" else line


def _row(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise AlignkitError(f'{where}: not JSON; write {{"prompt": "..."}}') from error
    prompt = row.get("prompt") if isinstance(row, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise AlignkitError(f'{where}: no prompt; write {{"prompt": "..."}}')
    return prompt
