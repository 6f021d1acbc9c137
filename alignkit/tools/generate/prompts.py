"""Read prompts from the command line and from files, and format them as in training."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from alignkit.data.text.dialogue import HUMAN, Dialogue
from alignkit.data.text.formats import Format
from alignkit.data.text.shapes import Side, sft_sides
from alignkit.data.text.templated import Templated
from alignkit.errors import AlignkitError
from alignkit.models.text_format import TextFormat, TextKind

TURN = f"\n\n{HUMAN}"

_SUFFIXES = (".jsonl", ".json", ".txt", "")

log = logging.getLogger(__name__)


def as_prompts(
    questions: Sequence[str],
    kind: TextKind,
    tokenizer: PreTrainedTokenizerBase,
    *,
    chat_template: str | None = None,
    system: str | None = None,
) -> list[str]:
    """Return the text of each question's prompt, in the format of training.

    Args:
        questions: What the human says, or a whole dialogue that ends with ``Assistant:``.
        kind: The format the model was trained with, see `alignkit.data.text.formats`; ``raw`` and
            ``text`` take the questions as they are.
        tokenizer: The model's tokenizer.
        chat_template: The template for ``chat``, instead of the tokenizer's own.
        system: A system message to put before each question.

    Raises:
        AlignkitError: The tokenizer lacks what the format needs.
    """
    if kind == "raw" or kind == "text":
        return list(questions)
    form = Format(kind, tokenizer, chat_template=chat_template)
    templated = Templated(tokenizer, specials=form.specials)
    prompts = []
    for index, question in enumerate(questions, start=1):
        side = _question_side(question.strip(), system)
        if (sign := templated.find([side])) and sign.grave:
            log.warning(
                "prompt %d: %s, and is put as prompt_format=%s once more; pass --raw if it was "
                "rendered already", index, sign.told, kind,
            )  # fmt: skip
        dialogue = Dialogue(side.prompt, (), side.starts, side.messages, continued=side.continued)
        prompts.append(form.render(dialogue).prompt)
    return prompts


def chat_prompt(
    messages: Sequence[Mapping[str, str]], asked: TextFormat, tokenizer: PreTrainedTokenizerBase
) -> str:
    """Return the text of the prompt that a conversation is, in the format of training.

    Args:
        messages: What was said, with ``role`` and ``content``; the user's comes last.
        asked: The model's text format; ``raw`` and ``text`` have no turns, only texts in turn.
        tokenizer: The model's tokenizer.

    Raises:
        AlignkitError: The tokenizer lacks what the format needs.
    """
    kind = asked.prompt_format
    if kind == "raw" or kind == "text":
        return "\n".join(message["content"] for message in messages)
    form = Format(kind, tokenizer, chat_template=asked.chat_template)
    side = sft_sides({"prompt": list(messages), "completion": ""})[0]
    dialogue = Dialogue(side.prompt, (), side.starts, side.messages, continued=side.continued)
    return form.render(dialogue).prompt


def _question_side(question: str, system: str | None) -> Side:
    """Return a question as training reads the prompt of a row."""
    side = sft_sides({"prompt": question, "completion": ""})[0]
    if system is None:
        return side
    if side.starts is None:  # a dialogue already
        return Side(f"{system}\n\n{side.prompt.lstrip()}", "")
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    return sft_sides({"prompt": messages, "completion": ""})[0]


def gather_prompts(prompts: str | Sequence[str] | None, prompts_file: str | None) -> list[str]:
    """Return the prompts given as arguments, followed by those of a file.

    Args:
        prompts: One prompt or several.
        prompts_file: A ``.jsonl`` file of ``{"prompt": ...}`` rows, a ``.json`` file with an array
            of them or of texts, or a text file with one prompt a line. Blank lines are skipped.

    Raises:
        AlignkitError: There is no prompt, an empty one, a file that cannot be read, or a row
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
    if path.suffix not in _SUFFIXES:
        raise AlignkitError(
            f"prompts_file '{name}': pass a .jsonl, .json or .txt file, not {path.suffix}"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise AlignkitError(
            f"prompts_file '{name}': {error.strerror}; pass a .jsonl or text file"
        ) from error
    except UnicodeDecodeError as error:
        raise AlignkitError(
            f"prompts_file '{name}': byte {error.start} is not UTF-8; save the file as UTF-8"
        ) from error
    if path.suffix == ".json":
        rows = _parsed(text, name)
        for number, row in enumerate(rows if isinstance(rows, list) else [rows], start=1):
            yield _prompt_of_row(
                {"prompt": row} if isinstance(row, str) else row, f"{name}:{number}"
            )
        return
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if path.suffix != ".jsonl" and (_holds_json(text) or (lines and _holds_json(lines[0][1]))):
        raise AlignkitError(f"prompts_file '{name}': holds JSON; name it .jsonl or .json")
    for number, line in lines:
        where = f"{name}:{number}"
        yield _prompt_of_row(_parsed(line, where), where) if path.suffix == ".jsonl" else line


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
