"""Run ``alignkit compare``, which shows several models' answers to the same prompts."""

from __future__ import annotations

import gc
import html as htmllib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from rich.console import Console
from rich.table import Table

from alignkit.errors import AlignkitError
from alignkit.models.find import find_checkpoint
from alignkit.tools.compare_page import comparison_page
from alignkit.tools.generate.answer import Answer
from alignkit.tools.generate.command import REQUEST_FLAGS, add_request
from alignkit.tools.generate.options import gather_options
from alignkit.tools.generate.prompts import shown
from alignkit.tools.generate.request import Request, as_json, describe_format, printable
from alignkit.tools.moved import Piece, moved_tokens
from alignkit.utils.atomic import check_outputs, write_atomically
from alignkit.utils.progress import counting

Pages = dict[str, list[tuple[Answer, list[Piece]]]]
"""From a model's name to its answers, and to each one's tokens with how far they moved."""

_NAMED = re.compile(r"([\w.-]+)=(.+)")


@dataclass
class Comparison:
    """Hold the answers of several models to the same prompts.

    Example:
        >>> found = Comparison(["Hi"], answers={"sft": ["Hello."], "dpo": ["Hello there."]})
        >>> print(found.to_markdown().rstrip())
        | Prompt | sft | dpo |
        | --- | --- | --- |
        | Hi | Hello. | Hello there. |

    Attributes:
        prompts: As the user gave them.
        answers: From a model's name to one answer for each prompt, in the order of the models.
        asked: From a model's name to the prompt format and system message it was asked with.
        failures: From a model's name to the line that says why it gave no answers.
    """

    prompts: list[str]
    answers: dict[str, list[str]] = field(default_factory=dict)
    asked: dict[str, dict[str, str | None]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def to_markdown(self) -> str:
        """Return a Markdown table with a row a prompt and a column a model, and the failures."""
        header = ["Prompt", *self.answers]
        rows = [[_markdown_cell(text) for text in row] for row in (header, *self._rows())]
        rows.insert(1, ["---"] * len(header))
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        lines += [
            f"\n{_markdown_cell(name)} failed: {_markdown_cell(why)}"
            for name, why in self.failures.items()
        ]
        return "\n".join(lines) + "\n"

    def to_table(self) -> Table:
        """Return the same table for the terminal."""
        table = Table(show_lines=True, expand=True)
        for header in ("Prompt", *self.answers):
            table.add_column(printable(header), ratio=1, overflow="fold")
        for row in self._rows():
            table.add_row(*map(printable, row))
        return table

    def _rows(self) -> list[tuple[str, ...]]:
        return list(zip(self.prompts, *self.answers.values(), strict=True))


def compare(
    models: Sequence[str] | Mapping[str, str],
    *,
    markdown: str | None = None,
    json: str | None = None,
    html: str | None = None,
    **options: Any,
) -> Comparison:
    """Ask several models the same and print their answers side by side.

    Both files are written again after every model, so a later failure or interruption leaves
    all that was computed; a model that cannot be loaded is reported and the others still run.

    Args:
        models: NAME=PATH or PATH each, or a mapping of names to paths; a path is a checkpoint
            (.ckpt), a run's folder, a PEFT adapter directory, a transformers directory, a Hub id or
            a GGUF file.
        markdown: A file for the table as Markdown.
        json: A file for the prompts, the answers and the settings that made them.
        html: A file for a page with the answers side by side, cut ones marked, and coloured where
            an adapter moved its base.
        **options: As in `alignkit.tools.generate.request.Request`; the same noise for every model.

    Returns:
        The answers of every model.

    Raises:
        AlignkitError: Bad prompts, options or paths, before anything is computed; or, when all
            models were tried, that some of them failed.
    """
    markdown_file, json_file, page_file = check_outputs(
        {"--markdown": markdown, "--json": json, "--html": html}
    )
    named = name_models(models)
    options = gather_options(options)
    request = Request(**options)
    comparison = Comparison([shown(question) for question in request.questions])
    pages: Pages = {}
    console = Console()
    try:
        for name, path in named.items():
            try:
                _add_answers(request, name, path, comparison, pages if page_file else None)
            finally:  # also what was answered before a signal
                if markdown_file is not None:
                    write_atomically(markdown_file, comparison.to_markdown())
                if json_file is not None:
                    found = {"models": named, "settings": request.to_dict(), **asdict(comparison)}
                    write_atomically(json_file, as_json(found))
                if page_file is not None:
                    write_atomically(page_file, _page(comparison, pages))
    finally:
        if comparison.answers:
            console.print(comparison.to_table())
    if comparison.failures:
        whose = "; ".join(f"{name}: {why}" for name, why in comparison.failures.items())
        raise AlignkitError(f"models: {len(comparison.failures)} of {len(named)} failed: {whose}")
    return comparison


def add_arguments(parser: ArgumentParser) -> None:
    """Add the flags of `compare`, which takes what ``parser`` returns as keyword arguments."""
    parser.add_argument(
        "--models",
        nargs="+",
        type=str,
        required=True,
        metavar="[NAME=]PATH",
        help="Checkpoints, runs' folders, PEFT adapters, transformers directories, Hub ids, GGUF.",
    )
    add_request(parser)
    parser.add_function_arguments(compare, skip={"models", *REQUEST_FLAGS})


def _add_answers(
    request: Request, name: str, path: str, comparison: Comparison, pages: Pages | None
) -> None:
    """Load one model, add its answers or its failure to the comparison, and free its memory."""
    heard: list[Answer] = []
    answers: list[str] = []
    wanted = len(request.questions)
    try:
        path = find_checkpoint(path)
        model, tokenizer = request.load(path)
        asked = request.format_for(path, tokenizer)
        with counting(f"{name}: prompt", wanted) as count:
            for answer in request.answers(model, tokenizer, asked, name, heard=heard.append):
                answers.append(answer)
                count.reach(len(answers))
        if pages is not None:
            pages[name] = [
                (answer, moved_tokens(model, tokenizer, asked, question, answer.ids))
                for question, answer in zip(request.questions, heard, strict=True)
            ]
        comparison.answers[name] = answers
        comparison.asked[name] = describe_format(asked)
        del model
    except AlignkitError as error:
        comparison.failures[name] = str(error)
    except BaseException:  # a signal, say
        if answers:
            comparison.answers[name] = answers + [""] * (wanted - len(answers))
            comparison.failures[name] = f"stopped after {len(answers)} of {wanted} prompts"
        raise
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _page(comparison: Comparison, pages: Pages) -> str:
    answers = {name: [answer for answer, _ in page] for name, page in pages.items()}
    moved = {name: [tokens for _, tokens in page] for name, page in pages.items()}
    return comparison_page(comparison.prompts, answers, moved, comparison.failures)


def name_models(models: Sequence[str] | Mapping[str, str], what: str = "models") -> dict[str, str]:
    """Return the path of each model by its name, from ``NAME=PATH`` and plain paths.

    A plain path is named after its last part. A path may hold an equals sign itself, as in
    Lightning's ``epoch=0-step=10.ckpt``: a file that exists is taken as a path.

    Args:
        models: The models, or what else is named so.
        what: What they are called in messages.

    Raises:
        AlignkitError: There is no model, or two have the same name.

    Example:
        >>> name_models(["base=EleutherAI/pythia-70m", "runs/sft"])
        {'base': 'EleutherAI/pythia-70m', 'sft': 'runs/sft'}
    """
    pairs = (
        list(models.items()) if isinstance(models, Mapping) else [_name_and_path(m) for m in models]
    )
    if not pairs:
        raise AlignkitError("models: none was given; pass --models NAME=PATH …")
    named: dict[str, str] = {}
    for name, path in pairs:
        if name in named:
            raise AlignkitError(
                f"{what}: '{named[name]}' and '{path}' are both called '{name}'; "
                "name them as NAME=PATH"
            )
        named[name] = path
    return named


def _name_and_path(model: str) -> tuple[str, str]:
    match = _NAMED.fullmatch(model)
    if match and not Path(model).exists():
        return match[1], match[2]
    path = Path(model)
    # runs/dpo/version_1/last.ckpt is named dpo/version_1, after its run
    run = path.parent if path.suffix == ".ckpt" else path
    name = f"{run.parent.name}/{run.name}" if run.name.startswith("version_") else run.name
    return name or model, model


def _markdown_cell(text: str) -> str:
    """Return a Markdown table cell that shows exactly the text."""
    escaped = re.sub(r"([\\`*_\[\]|~$])", r"\\\1", htmllib.escape(text, quote=False))
    return escaped.replace("\r", "").replace("\n", "<br>")
