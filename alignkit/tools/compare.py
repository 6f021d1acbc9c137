"""Run ``alignkit compare``, which shows several models' answers to the same prompts."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jsonargparse import ArgumentParser
from rich.console import Console

from alignkit.errors import AlignkitError
from alignkit.models.find import find_checkpoint
from alignkit.tools.compare_page import comparison_page
from alignkit.tools.comparison import Comparison
from alignkit.tools.generate.answer import Answer
from alignkit.tools.generate.command import REQUEST_FLAGS, add_request
from alignkit.tools.generate.gauges import Gauges
from alignkit.tools.generate.options import gather_options
from alignkit.tools.generate.prompts import shown
from alignkit.tools.generate.request import Request, as_json, describe_format
from alignkit.tools.judge.rating import Judge, rate
from alignkit.tools.moved import Piece, moved_tokens
from alignkit.tools.naming import name_models
from alignkit.utils.atomic import check_outputs, write_atomically
from alignkit.utils.progress import counting

Pages = dict[str, list[tuple[Answer, list[Piece]]]]
"""From a model's name to its answers, and to each one's tokens with how far they moved."""


def compare(
    models: Sequence[str] | Mapping[str, str],
    *,
    markdown: str | None = None,
    json: str | None = None,
    html: str | None = None,
    judge: str | None = None,
    judge_reference: str | None = None,
    judge_beta: float | None = None,
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
        judge: A reward model, or a policy with its implicit reward, that scores the answers; each
            model is then compared with the first. It reads the prompts without a system message.
        judge_reference: The reference of the judge's implicit reward; by default what its run was
            trained against, or the judge without its adapters.
        judge_beta: The scale of the implicit reward; by default that of its run, or 0.1.
        **options: As in `alignkit.tools.generate.request.Request`; the same noise for every model.

    Returns:
        The answers of every model.

    Raises:
        AlignkitError: Bad prompts, options or paths, before anything is computed; or, when all
            models were tried, that some of them failed, or that the judge did.
    """
    markdown_file, json_file, page_file = check_outputs(
        {"--markdown": markdown, "--json": json, "--html": html}
    )
    named = name_models(models)
    judging = _judge(judge, judge_reference, judge_beta)
    options = gather_options(options)
    request = Request(**options)
    request.refuse_overwriting(
        {"--markdown": markdown_file, "--json": json_file, "--html": page_file}
    )
    comparison = Comparison([shown(question) for question in request.questions])
    pages: Pages = {}
    console = Console()
    failed: list[str] = []

    def write() -> None:
        if markdown_file is not None:
            write_atomically(markdown_file, comparison.to_markdown())
        if json_file is not None:
            found = {"models": named, "settings": request.to_dict(), **comparison.to_dict()}
            write_atomically(json_file, as_json(found))
        if page_file is not None:
            write_atomically(page_file, _page(comparison, pages))

    try:
        for name, path in named.items():
            try:
                _add_answers(request, name, path, comparison, pages if page_file else None)
            finally:  # also what was answered before a signal
                write()
        if judging is not None and comparison.answers:
            try:
                comparison.scores = judging.scores(
                    request.questions, comparison.answers, request.target
                )
            except AlignkitError as error:  # told at the end, with the models that failed
                failed.append(str(error))
            else:
                comparison.ratings = rate(comparison.scores, comparison.answers)
                write()
    finally:
        if comparison.answers:
            console.print(comparison.to_table())
            console.print(*comparison.summary(), sep="\n", markup=False, soft_wrap=True)
    if comparison.failures:
        whose = "; ".join(f"{name}: {why}" for name, why in comparison.failures.items())
        failed.insert(0, f"models: {len(comparison.failures)} of {len(named)} failed: {whose}")
    if failed:
        raise AlignkitError("; ".join(failed))
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
        comparison.gauges[name] = Gauges.of(heard)
        comparison.gauge_errors[name] = Gauges.errors(heard)
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


def _judge(model: str | None, reference: str | None, beta: float | None) -> Judge | None:
    """Return the judge, if there is one.

    Raises:
        AlignkitError: It is missing, or what belongs to it is given without one.
    """
    if model is not None:
        return Judge(model, reference, beta)
    for flag, value in (("--judge_reference", reference), ("--judge_beta", beta)):
        if value is not None:
            raise AlignkitError(f"{flag}: belongs to --judge, which is not given")
    return None


def _page(comparison: Comparison, pages: Pages) -> str:
    answers = {name: [answer for answer, _ in page] for name, page in pages.items()}
    moved = {name: [tokens for _, tokens in page] for name, page in pages.items()}
    return comparison_page(
        comparison.prompts,
        answers,
        moved,
        comparison.failures,
        scores=comparison.scores,
        ratings=comparison.ratings,
    )
