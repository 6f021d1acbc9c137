"""Run ``alignkit generate``, which prints a model's answers to prompts."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from rich.console import Console

from alignkit.errors import AlignkitError
from alignkit.models.find import find_checkpoint
from alignkit.tools.generate.options import add_options, gather_options
from alignkit.tools.generate.prompts import shown
from alignkit.tools.generate.request import Request, as_json, describe_format, printable
from alignkit.utils.atomic import check_outputs, write_atomically, write_beside
from alignkit.utils.progress import counting


def generate(
    model: str,
    *,
    json: str | None = None,
    jsonl: str | None = None,
    stream: bool = False,
    **options: Any,
) -> list[str]:
    """Print a model's answers to prompts.

    Args:
        model: The model: a checkpoint (.ckpt), a run's folder, a PEFT adapter directory, a
            transformers directory, a Hub id or a GGUF file.
        json: A file for the prompts, the answers and the settings that made them.
        jsonl: A file for a line of JSON a prompt, with the prompt and the answer.
        stream: Print an answer while it is being drawn, one prompt at a time.
        **options: As in `alignkit.tools.generate.request.Request`.

    Returns:
        The answers, in the order of the prompts.

    Raises:
        AlignkitError: Bad prompts, options or paths, before anything is computed.
    """
    output, lines = check_outputs({"--json": json, "--jsonl": jsonl})
    options = gather_options(options)
    request = Request(**options)
    request.refuse_overwriting({"--json": output, "--jsonl": lines})
    check_stream(stream, request)
    console = Console()
    place = find_checkpoint(model)
    policy, tokenizer = request.load(place)
    asked = request.format_for(place, tokenizer)
    answers: list[str] = []
    told = _print_piece if stream else None
    given = request.answers(policy, tokenizer, asked, model, told)
    save: Callable[[Path, str], None] = write_beside
    try:
        with nullcontext() if stream else counting("prompt", len(request.questions)) as count:
            for question in request.questions:
                if stream:
                    console.rule(printable(shown(question)), align="left", style="dim")
                answers.append(next(given))
                if count is None:
                    console.print()
                else:
                    console.rule(printable(shown(question)), align="left", style="dim")
                    console.print(printable(answers[-1]))
                    count.reach(len(answers))
        save = write_atomically
    finally:  # also what was answered before a signal
        rows = [
            {"prompt": question, "answer": answer}
            for question, answer in zip(request.questions, answers, strict=False)
        ]
        if lines is not None and rows:
            text = "".join(jsonlib.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            save(lines, text)
        if output is not None and rows:
            settings = {**request.to_dict(), **describe_format(asked)}
            found = {"model": model, "settings": settings, "answers": rows}
            save(output, as_json(found))
    return answers


def add_arguments(parser: ArgumentParser) -> None:
    """Add the flags of `generate`, which takes what ``parser`` returns as keyword arguments."""
    add_request(parser)
    parser.add_argument(
        "--stream", action="store_true", help="Print an answer while it is being drawn."
    )
    parser.add_function_arguments(generate, skip={"stream", *REQUEST_FLAGS})


def check_stream(stream: bool, request: Request) -> None:
    """Refuse to show an answer while it is drawn where it may still change.

    Raises:
        AlignkitError: Beams are searched.
    """
    if stream and request.generation.get("num_beams", 1) != 1:
        raise AlignkitError("stream: beams are known at their end alone; leave out num_beams")


def _print_piece(piece: str) -> None:
    print(printable(piece), end="", flush=True)


REQUEST_FLAGS: set[str | int] = {"prompts", "raw", "generation"}
"""The flags that `add_request` adds, which a command's own flags must skip."""


def add_request(parser: ArgumentParser) -> None:
    """Add ``--prompts TEXT [TEXT ...]``, the switch ``--raw`` and transformers' options.

    With flags made from type hints, the first would read a text such as ``[1]`` or ``null`` as
    YAML, and the second would need a value.
    """
    parser.add_argument("--prompts", nargs="+", type=str, help="Texts to answer, one an argument.")
    parser.add_argument(
        "--raw", action="store_true", help="Give the prompts to the model as they are."
    )
    add_options(parser)
