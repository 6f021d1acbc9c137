"""Run ``alignkit judge``, which scores the answers of a file and ranks them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import ArgumentParser

from alignkit.data.encode.draft import DraftExample
from alignkit.data.read.sources import split_sources
from alignkit.data.text.defects import DefectError
from alignkit.data.text.recognise import check_columns
from alignkit.data.text.shapes import preference_sides
from alignkit.errors import AlignkitError
from alignkit.models.text_format import PromptChoice
from alignkit.tools.generate.request import resolve_device
from alignkit.tools.judge.rows import LeftOut, drafts_to_judge, rows_to_judge
from alignkit.tools.judge.scoring import batches, find_judge, load_scorer, row_encoder
from alignkit.tools.judge.verdict import Verdict
from alignkit.utils.atomic import (
    check_output,
    refuse_overwriting,
    write_atomically,
    write_beside,
)


@torch.no_grad()
def judge(
    path: str,
    *,
    model: str,
    reference: str | None = None,
    beta: float | None = None,
    output: str | None = None,
    split: str | None = None,
    columns: dict[str, str] | None = None,
    unended: Literal["keep", "drop"] = "keep",
    max_length: int | None = None,
    prompt_format: PromptChoice = "auto",
    tokens_per_batch: int = 4096,
    device: str = "auto",
) -> Verdict:
    """Score the answers of a file by a reward model, or by a policy's reward, and rank them.

    Scores that the file has already count for nothing but the order of the answers. Of rows that
    ``alignkit sample`` wrote, answers that are empty or repeated, or begin with ``Assistant:``, are
    left out where two others remain.

    Args:
        path: Pairs, ranked answers or what ``alignkit sample`` wrote: a file, a directory or a Hub
            id, as the data modules take it.
        model: A reward model (a checkpoint, a run's folder, or what ``export --to reward`` wrote),
            or a policy: a run of DPO gives the rewards of the loss that it was trained by, if that
            is one of alignkit's, and any other the implicit reward β (log π(y|x) − log π_ref(y|x)).
        reference: π_ref, as ``model``; by default what a run of DPO or KTO was trained against (as
            it began, where the run refreshed it), and the policy without its adapters otherwise.
        beta: β of the implicit reward, which a run of DPO then gives as well; by default that of a
            run of KTO, or 0.1.
        output: A JSON-lines file for the rows: ``prompt``, ``responses`` from the best to the
            worst, and their ``scores``, which the data modules read. What a run that is stopped
            has scored lies there too, or beside a file that is there already.
        split: Judge this split alone; default: all.
        columns: The rows' columns by the names that are read, as ``data.columns`` has them.
        unended: What to do with answers of ``alignkit sample`` that were cut at max_new_tokens:
            training would end them where they were cut. ``drop`` leaves them out, and rows of
            which fewer than two answers remain.
        max_length: Most tokens of a prompt with one answer, beyond which the prompt loses its left
            end; by default as the judge was trained, or 512.
        prompt_format: How dialogues become text; ``auto`` does as the model was trained, or as the
            data modules choose.
        tokens_per_batch: Most tokens in one batch.
        device: Such as cpu or cuda:0; auto takes a GPU if there is one.

    Returns:
        The verdict on the order in which the file had the answers.

    Raises:
        AlignkitError: Nothing can be read there, or the models do not fit.
    """
    if tokens_per_batch < 1:
        raise AlignkitError(f"--tokens_per_batch {tokens_per_batch}: must be 1 or more")
    found = find_judge(model, reference, beta)
    target = resolve_device(device)
    written = check_output(output, "--output")
    sources = split_sources(path, split)
    refuse_overwriting({"--output": written}, [source.name for source in sources])
    left_out = LeftOut(keeps_unended=unended == "keep", keeps_templated=prompt_format == "raw")
    sources = rows_to_judge(sources, check_columns(columns), left_out)
    if unended == "drop" and not left_out.sampled:
        raise AlignkitError(f"--unended drop: {path} has no rows of alignkit sample, which say it")
    scorer, tokenizer = load_scorer(found, target)
    encoder = row_encoder(
        sources,
        tokenizer,
        found.place,
        preference_sides,
        prompt_format=prompt_format,
        max_length=max_length,
    )
    lines: list[str] = []
    margins: list[float] = []
    save: Callable[[Path, str], None] = write_beside
    try:
        drafts_of = drafts_to_judge(sources, encoder, left_out)
        for drafts in batches(drafts_of, encoder, tokens_per_batch):
            scored = scorer([encoder.example(draft) for draft in drafts])
            for draft, scores in zip(drafts, scored, strict=True):
                lines.append(json.dumps(ranked_row(draft, scores), ensure_ascii=False))
                margins.append(scores[0] - scores[-1])
        save = write_atomically
    except DefectError as defect:  # this command has no policies, and one flag of the data's
        told = defect.told.replace("data.prompt_format", "--prompt_format")
        raise AlignkitError(told) from None
    finally:  # also what was scored before a signal
        if written is not None and lines:
            save(written, "".join(f"{line}\n" for line in lines))
    if not margins:
        raise AlignkitError(f"{path}: has no row to judge{left_out}")
    verdict = Verdict.of(margins)
    error = f" (± {verdict.error:.1%})" if verdict.rows > 1 else ""
    rows = f"{verdict.rows:,} row{'s' if verdict.rows > 1 else ''}{left_out}"
    print(
        f"{path}: {rows}, first answer above the last in {verdict.accuracy:.1%}{error}, by "
        f"{verdict.margin:.4g} on average ({found.scores})"
    )
    return verdict


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of `judge`, whose path is positional."""
    parser.add_argument("path", type=str, help="Pairs, ranked or sampled answers.")
    parser.add_function_arguments(judge, skip={"path"})


def ranked_row(draft: DraftExample, scores: Sequence[float]) -> dict[str, Any]:
    """Return a row with its answers from the best to the worst, and their scores."""
    said = draft.dialogue
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    if said.messages is None:
        prompt: Any = said.prompt
        answers: list[str] = list(said.answers)
    else:
        prompt = [{"role": each.role, "content": each.content} for each in said.messages]
        answers = [each.content for each in said.said()]
    return {
        "prompt": prompt,
        "responses": [answers[index] for index in order],
        "scores": [scores[index] for index in order],
    }
