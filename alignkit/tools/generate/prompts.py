"""Read prompts from the command line and from files, and format them as in training."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from alignkit.data.encode.tokens import TextEncoder
from alignkit.data.read.rows import BadRow, Row, Source
from alignkit.data.read.sources import find_splits
from alignkit.data.text.defects import readable
from alignkit.data.text.dialogue import HUMAN, Dialogue, RowError, messages_of
from alignkit.data.text.formats import Format
from alignkit.data.text.known_shapes import SFT
from alignkit.data.text.policies import MEANING
from alignkit.data.text.recognise import columns_of, readings
from alignkit.data.text.shapes import Side, sft_sides
from alignkit.errors import AlignkitError
from alignkit.models.text_format import TextFormat, TextKind
from alignkit.tools.generate.prompt_files import read_prompts

TURN = f"\n\n{HUMAN}"

Question = str | list[dict[str, str]]
"""What the human says or a whole dialogue, as text or as messages with ``role`` and ``content``."""

log = logging.getLogger(__name__)


def as_prompts(
    questions: Sequence[Question],
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
        return [shown(question) for question in questions]
    form = Format(kind, tokenizer, chat_template=chat_template)
    prompts = []
    for question in questions:
        side = _side_of(_led(question, system))
        dialogue = Dialogue(side.prompt, (), side.starts, side.messages, continued=side.continued)
        prompts.append(form.render(dialogue).prompt)
    return prompts


def encode_prompts(
    questions: Sequence[Question],
    asked: TextFormat,
    tokenizer: PreTrainedTokenizerBase,
    encoder: TextEncoder | None = None,
) -> list[list[int]]:
    """Return the ids of each question's prompt, as the model is asked.

    Args:
        questions: As in `as_prompts`.
        asked: The text format to ask in.
        tokenizer: The model's tokenizer.
        encoder: That of the tokenizer, where there is one.
    """
    kind = asked.prompt_format
    texts = as_prompts(
        questions, kind, tokenizer, chat_template=asked.chat_template, system=asked.system
    )
    return [list(ids) for ids in (encoder or TextEncoder(tokenizer)).prompts(texts, kind)]


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
    side = _side_of([dict(message) for message in messages])
    dialogue = Dialogue(side.prompt, (), side.starts, side.messages, continued=side.continued)
    return form.render(dialogue).prompt


def with_system(question: Question, asked: TextFormat) -> Question:
    """Return the prompt that a question is asked with, as the ``prompt`` of a row.

    Whoever judges and trains on the row reads the text that the model was asked.

    Args:
        question: As in `as_prompts`.
        asked: The text format that it is asked in; ``raw`` and ``text`` have no system message.
    """
    if asked.prompt_format in ("raw", "text"):
        return shown(question)
    return _led(question, asked.system)


def _led(question: Question, system: str | None) -> Question:
    """Return a question as a row has it, with a system message unless it has one of its own."""
    system_message = {"role": "system", "content": system or ""}
    if isinstance(question, list):
        led = system is None or question[0]["role"] == "system"
        return question if led else [system_message, *question]
    words = question.strip()
    side = _side_of(words)
    if side.starts is not None:  # no dialogue yet, but what the human says
        return words if system is None else [system_message, {"role": "user", "content": words}]
    # A dialogue's own white space is what training reads, but for what follows the last label.
    told = question if side.continued else question.rstrip()
    if system is None:
        return told
    if side.continued:  # as one text it would be read as what the human says
        turns = ({"role": m.role, "content": m.content.strip()} for m in messages_of(words))
        return [system_message, *turns]
    return f"{system}\n\n{told.lstrip()}"


def _side_of(prompt: Question) -> Side:
    """Return a row's prompt as training reads it."""
    return sft_sides({"prompt": prompt, "completion": ""})[0]


def shown(question: Question) -> str:
    """Return a question for a reader: its text, or what each message says."""
    if isinstance(question, str):
        return question
    if len(question) == 1:
        return question[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in question)


def gather_prompts(
    prompts: str | Sequence[str] | None, prompts_file: str | None, data: str | None = None
) -> list[Question]:
    """Return the prompts given as arguments, followed by those of a file and of a data set.

    Args:
        prompts: One prompt or several.
        prompts_file: A ``.jsonl`` file of ``{"prompt": ...}`` rows, a ``.json`` file with an array
            of them or of texts, or a text file with one prompt a line. Blank lines are skipped.
        data: A data set, as the data modules take it; see `data_prompts`.

    Raises:
        AlignkitError: There is no prompt, an empty one, a file that cannot be read, or a row
            without a prompt (with its line number).
    """
    found: list[Question] = [prompts] if isinstance(prompts, str) else list(prompts or [])
    if prompts_file is not None:
        found += read_prompts(prompts_file)
    if data is not None:
        found += data_prompts(data)
    if not found:
        where = f"prompts_file '{prompts_file}' holds none" if prompts_file else "none was given"
        raise AlignkitError(
            f"prompts: {where}; pass --prompts TEXT, --prompts_file FILE or --data DATA"
        )
    mended = [_mended(question) for question in found]
    if changed := [
        number
        for number, pair in enumerate(zip(found, mended, strict=True), 1)
        if pair[0] != pair[1]
    ]:
        log.warning(
            "prompts: %d of %d hold %s (the first is prompt %d): replaced, as in training",
            len(changed), len(found), MEANING["control_characters"], changed[0],
        )  # fmt: skip
    for number, question in enumerate(mended, start=1):
        if not shown(question).strip():
            raise AlignkitError(f"prompts: prompt {number} is empty; give it some text")
    return mended


def _mended(question: Question) -> Question:
    """Return a question with what no tokenizer encodes replaced, as training replaces it."""
    if isinstance(question, str):
        return readable(question)
    return [{**message, "content": readable(message["content"])} for message in question]


def data_prompts(path: str) -> Iterator[Question]:
    """Yield each prompt of a data set once: of its test or validation split, if it has one.

    Args:
        path: A file, a directory or a Hub id, followed by ``#SPLIT`` for another split, or rows of
            one as in `alignkit.data.read.slices`: ``#test[:100]``.

    Raises:
        AlignkitError: There is no such data or split, or a row without a prompt, by its place.
    """
    met: set[str] = set()
    for source in _sources_of(path):
        for line, row in source.rows():
            question = _question_of(row, f"{source.name}:{line}")
            if (key := json.dumps(question)) not in met:
                met.add(key)
                yield question


def files_asked(prompts_file: str | None, data: str | None) -> list[str]:
    """Return the files that prompts are read from, as in `gather_prompts`."""
    files = [] if prompts_file is None else [str(Path(prompts_file).expanduser())]
    if data is not None and Path(data.partition("#")[0]).expanduser().exists():
        files += [source.name for source in _sources_of(data)]
    return files


def _no_hash(path: Path) -> str:
    return ""  # no cache is to know when the file has changed


def _sources_of(path: str) -> list[Source]:
    place, _, wanted = path.partition("#")
    if not wanted:
        splits = find_splits(place, hashes=_no_hash)
        return next(splits[name] for name in ("test", "validation", "train") if name in splits)
    try:
        return find_splits(place, splits={"test": wanted}, hashes=_no_hash)["test"]
    except AlignkitError as error:
        raise AlignkitError(f"data '{path}': {str(error).removeprefix('data.splits: ')}") from error


def _question_of(row: Row, where: str) -> Question:
    """Return the prompt of a row as its data module reads it.

    Raises:
        AlignkitError: It has none, or an empty one.
    """
    try:
        if isinstance(row, BadRow):
            raise RowError(row.reason)
        side = sft_sides(_answered(row))[0]
    except RowError as error:
        raise AlignkitError(f"{where}: {error}") from error
    question = _given(side, row.get("prompt"))
    last = question if isinstance(question, str) else question[-1]["content"] if question else ""
    if not last.strip():
        raise AlignkitError(f"{where}: its prompt is empty; give it some text")
    return question


def _answered(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a row that has an answer, an empty one if it holds a prompt and none to it.

    Raises:
        RowError: It has neither a prompt nor an answer with what was asked.
    """
    try:
        readings(row, SFT)
    except RowError:
        if row.get("prompt") is None:
            there = ", ".join(f"`{name}`" for name in row)[:200] or "nothing"
            raise RowError(f"it has no prompt, only {there}; name a column `prompt`") from None
        read = columns_of("prompts with completions")
        return {**{name: row[name] for name in row if name in read}, "completion": ""}
    return row


def _given(side: Side, prompt: Any) -> Question:
    """Return the prompt of a side: the row's own text where that is all of it."""
    if side.messages is None:
        return side.prompt
    if isinstance(prompt, str) and [m.content.strip() for m in side.messages] == [prompt.strip()]:
        return prompt  # ``raw`` reads its white space too
    question = [{"role": each.role, "content": each.content} for each in side.messages]
    begun = [{"role": "assistant", "content": side.continued}] if side.continued else []
    return question + begun
