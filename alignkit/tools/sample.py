"""Run ``alignkit sample``, which draws several answers to each prompt.

The answers to one prompt lie in one row of the file. `alignkit judge` ranks them, and what it
writes is a data set of ranked answers, whose answers share their prompt in training.
"""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from jsonargparse import ArgumentParser
from transformers import PreTrainedModel

from alignkit.batch import Example, collate
from alignkit.data.encode.tokens import TextEncoder
from alignkit.data.read.hashes import digest_of
from alignkit.data.text.ranked import SAMPLED
from alignkit.engine import response_sums, score
from alignkit.errors import AlignkitError
from alignkit.lora.identity import trained_fingerprint
from alignkit.models.find import find_checkpoint
from alignkit.models.fingerprint import base_fingerprint
from alignkit.tools.generate.answer import Answer
from alignkit.tools.generate.command import REQUEST_FLAGS, add_request
from alignkit.tools.generate.fitting import rendered_before
from alignkit.tools.generate.options import gather_options
from alignkit.tools.generate.prompts import Question, encode_prompts, shown, with_system
from alignkit.tools.generate.request import Request, answer_questions, describe_format
from alignkit.utils.atomic import PARTIAL, check_output, write_atomically
from alignkit.utils.progress import counting

log = logging.getLogger(__name__)
_SHOWN = 40  # characters of a prompt in a message


def sample(model: str, *, output: str, answers: int = 8, **options: Any) -> Path:
    """Draw several answers to each prompt, and write them with their log-probabilities.

    A row is ``prompt`` (with the system message that it was asked with, if there was one),
    ``candidates`` (the answers) and ``drawn`` (for each answer its ``logp``,
    in nats, its number of ``tokens`` and whether the model ``ended`` it). ``logp`` is the model's
    log-probability of the tokens that were drawn, the one that ended the answer included, without
    temperature and the other options. ``alignkit judge`` ranks the answers.

    What is computed is kept beside the output at once: a run that was stopped goes on where it was
    when the same command is given again, and ends with the same file.

    Args:
        model: The model: a checkpoint (.ckpt), a run's folder, a PEFT adapter directory, a
            transformers directory, a Hub id or a GGUF file.
        output: A file for a line of JSON a prompt.
        answers: How many answers to draw to each prompt, 2 or more.
        **options: As in `alignkit.tools.generate.request.Request`.

    Returns:
        The file.

    Raises:
        AlignkitError: Bad prompts, options or paths, before anything is computed.
    """
    target = check_output(output, "--output") or Path(output)
    place = find_checkpoint(model)
    options = gather_options(options)
    request = Request(**options)
    request.refuse_overwriting({"--output": target})
    if answers < 2:
        raise AlignkitError(f"answers: must be 2 or more, got {answers}; generate draws one")
    if request.temperature == 0:
        raise AlignkitError("temperature: at 0 all answers to a prompt are the same; raise it")
    policy, tokenizer = request.load(place)
    asked = request.format_for(place, tokenizer)
    encoder = TextEncoder(tokenizer)
    identity = {
        "model": [base_fingerprint(policy), trained_fingerprint(policy)],
        "tokenizer": encoder.fingerprint,
        "asked": [describe_format(asked), asked.chat_template],
        "options": {**request.to_dict(), "answers": answers},
        "prompts": digest_of(json.dumps(request.questions).encode()),
    }
    for number, sign in rendered_before(request.questions, asked, tokenizer):
        told = shown(request.questions[number - 1]).strip()[:_SHOWN]
        raise AlignkitError(
            f"prompts: prompt {number} ({told!r}): {sign}, as if rendered already, which judge and "
            "training refuse; mend it, or pass --raw"
        )
    prompts = [with_system(question, asked) for question in request.questions]
    ids = encode_prompts(request.questions, asked, tokenizer, encoder)
    with _writing_alone(target), _Part(target, identity, prompts) as part:
        begun = len(part.rows)
        heard: list[Answer] = []
        given = answer_questions(
            policy,
            tokenizer,
            request.questions,
            request.sampling_for(asked),
            asked,
            name=model,
            batch_size=request.batch_size,
            heard=heard.append,
            draws=answers,
            done=begun,
        )
        with counting("prompt", len(request.questions)) as count:
            for prompt, row_ids in zip(prompts[begun:], ids[begun:], strict=True):
                for _ in range(answers):
                    next(given)
                drawn, heard[:] = heard[:answers], heard[answers:]
                part.add(_row(prompt, drawn, log_probs(policy, row_ids, drawn)))
                count.reach(len(part.rows))
        part.finish()
    several = "s" if len(part.rows) > 1 else ""
    draws = [one for row in part.rows for one in json.loads(row)["drawn"]]
    cut = sum(not one["ended"] for one in draws)
    told = f"; {cut:,} of {len(draws):,} answers were cut at max_new_tokens" if cut else ""
    print(f"wrote {target}: {len(part.rows):,} prompt{several}, {answers} answers to each{told}")
    print(f"next: alignkit judge {shlex.quote(str(target))} --model MODEL --output ranked.jsonl")
    return target


def add_arguments(parser: ArgumentParser) -> None:
    """Add the flags of `sample`, which takes what ``parser`` returns as keyword arguments."""
    add_request(parser)
    parser.add_function_arguments(sample, skip={*REQUEST_FLAGS})


@torch.no_grad()
def log_probs(
    model: PreTrainedModel, prompt: Sequence[int], answers: Sequence[Answer]
) -> list[float]:
    """Return the log-probability of each answer's tokens in nats, all in one pass over the prompt.

    Args:
        model: The model that drew them.
        prompt: The prompt's ids.
        answers: Answers to it.
    """
    responses = [[*answer.ids, *answer.end] for answer in answers]
    batch = collate([Example(prompt=list(prompt), responses=responses)]).to(model.device)
    return [float(each) for each in response_sums(score(model, batch), batch).tolist()]


def _row(question: Question, drawn: Sequence[Answer], logps: Sequence[float]) -> dict[str, Any]:
    return {
        "prompt": question,
        SAMPLED: [answer.text for answer in drawn],
        "drawn": [
            {
                "logp": round(logp, 4),
                "tokens": len(answer.ids) + len(answer.end),
                "ended": answer.ended,
            }
            for answer, logp in zip(drawn, logps, strict=True)
        ],
    }


@contextmanager
def _writing_alone(target: Path) -> Iterator[None]:
    """Keep other runs from the rows of an output.

    Raises:
        AlignkitError: Another run is writing it.
    """
    place = target.with_name(f".{target.name}.lock")
    lock = FileLock(place, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise AlignkitError(
            f"--output {target}: another run is writing it; wait for it, or name another"
        ) from None
    try:
        yield
    finally:
        lock.release()
        with suppress(OSError):  # another run has it by now
            place.unlink()


class _Part:
    """Keep the rows of an output that is not whole yet in a file beside it.

    Args:
        target: The output.
        identity: What decides its rows.
        prompts: The prompts of all of them.

    Attributes:
        rows: The lines that there are, in the order of the prompts.

    Raises:
        AlignkitError: Another run has left its rows there.
    """

    def __init__(
        self, target: Path, identity: Mapping[str, Any], prompts: Sequence[Question]
    ) -> None:
        self._target = target
        self._path = target.with_name(f".{target.name}{PARTIAL}")
        head = json.dumps(identity)
        self.rows = [*self._read(head, prompts)]
        if self.rows:
            log.info("%s: going on after %d of %d prompts", target, len(self.rows), len(prompts))
        write_atomically(self._path, "".join(f"{line}\n" for line in (head, *self.rows)))
        self._file = self._path.open("a", encoding="utf-8")

    def __enter__(self) -> _Part:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, row: Mapping[str, Any]) -> None:
        """Add the row of the next prompt."""
        self.rows.append(json.dumps(row, ensure_ascii=False))
        self._file.write(f"{self.rows[-1]}\n")
        self._file.flush()

    def finish(self) -> None:
        """Put the rows into the output."""
        write_atomically(self._target, "".join(f"{row}\n" for row in self.rows))
        self._file.close()
        self._path.unlink()

    def _read(self, head: str, prompts: Sequence[Question]) -> Iterator[str]:
        """Yield the whole rows that a run with the same identity has left."""
        if not self._path.exists():
            return
        first, *lines = self._path.read_text(encoding="utf-8", errors="replace").split("\n")
        if first != head and any(lines):
            raise AlignkitError(
                f"{self._path}: was begun with another model, other prompts or other options; "
                "delete it, or name another output"
            )
        for line, prompt in zip(lines, prompts, strict=False):
            found = None
            with suppress(ValueError):
                found = json.loads(line)
            if not isinstance(found, dict) or found.get("prompt") != prompt:
                return
            yield line
