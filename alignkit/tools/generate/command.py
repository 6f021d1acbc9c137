"""Run ``alignkit generate``, which prints a model's answers to prompts."""

from __future__ import annotations

from typing import Any

from jsonargparse import ArgumentParser
from rich.console import Console

from alignkit.tools.generate.request import Request, as_json, describe_format, printable
from alignkit.utils.atomic import check_output, write_atomically
from alignkit.utils.progress import counting


def generate(model: str, *, json: str | None = None, **options: Any) -> list[str]:
    """Print a model's answers to prompts.

    Args:
        model: The model: a checkpoint (.ckpt), a run's folder, a PEFT adapter directory, a
            transformers directory, a Hub id or a GGUF file.
        json: A file for the prompts, the answers and the settings that made them.
        **options: As in `alignkit.tools.generate.request.Request`.

    Returns:
        The answers, in the order of the prompts.

    Raises:
        AlignkitError: Bad prompts, options or paths, before anything is computed.
    """
    output = check_output(json, "json")
    request = Request(**options)
    console = Console()
    policy, tokenizer = request.load(model)
    asked = request.format_for(model, tokenizer)
    answers = []
    given = request.answers(policy, tokenizer, asked, model)
    with counting("prompt", len(request.questions)) as count:
        for question, answer in zip(request.questions, given, strict=True):
            answers.append(answer)
            console.rule(printable(question), align="left", style="dim")
            console.print(printable(answer))
            count.reach(len(answers))
    if output is not None:
        rows = [
            {"prompt": question, "answer": answer}
            for question, answer in zip(request.questions, answers, strict=True)
        ]
        settings = {**request.to_dict(), **describe_format(asked)}
        found = {"model": model, "settings": settings, "answers": rows}
        write_atomically(output, as_json(found))
    return answers


def add_arguments(parser: ArgumentParser) -> None:
    """Add the flags of `generate`, which takes what ``parser`` returns as keyword arguments."""
    add_request(parser)
    parser.add_function_arguments(generate, skip=REQUEST_FLAGS)


REQUEST_FLAGS: set[str | int] = {"prompts", "raw"}
"""The flags that `add_request` adds, which a command's own flags must skip."""


def add_request(parser: ArgumentParser) -> None:
    """Add ``--prompts TEXT [TEXT ...]`` and the switch ``--raw``.

    With flags made from type hints, the first would read a text such as ``[1]`` or ``null`` as
    YAML, and the second would need a value.
    """
    parser.add_argument("--prompts", nargs="+", type=str, help="Texts to answer, one an argument.")
    parser.add_argument(
        "--raw", action="store_true", help="Give the prompts to the model as they are."
    )
