"""Turn ``alignkit lora``, ``sft`` and ``dpo`` with their short flags into ``fit``."""

from __future__ import annotations

import json
import re
from argparse import ArgumentParser, Namespace, _ArgumentGroup
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, NoReturn

from alignkit.cli.config_file import flags_and_values
from alignkit.cli.near import did_you_mean
from alignkit.cli.run_place import logger_at, out_flags, run_place
from alignkit.errors import AlignkitError


class Stage(NamedTuple):
    """Hold what a stage is made of and how it trains by default.

    Example:
        >>> STAGES["dpo"].model
        'DPOModule'

    Attributes:
        model: Its module.
        data: Its data module.
        lr: Learning rate of adapters; a whole model trains at a tenth of it.
        says: What it does.
    """

    model: str
    data: str
    lr: float
    says: str


STAGES = {
    "lora": Stage("LoRAModule", "TextDataModule", 2e-4, "Train an adapter on plain text."),
    "sft": Stage("SFTModule", "SFTDataModule", 2e-4, "Fine-tune a model on answers to prompts."),
    "dpo": Stage(
        "DPOModule", "PreferenceDataModule", 5e-5, "Train on chosen and rejected answers."
    ),
}
"""The stages by their commands."""

_WARMUP = 0.03
_CLIP = 1.0
_FULL_SHARE = 0.1
_NUMBER = re.compile(r"-[\d.]")
# The flags of ``fit`` that have no dot.
_FIT_FLAGS = (
    "--config",
    "-c",
    "--print_config",
    "--seed_everything",
    "--ckpt_path",
    "--weights_only",
)


class _Parser(ArgumentParser):
    """Raise mistakes as the command reports them."""

    def error(self, message: str) -> NoReturn:
        """Raise a mistake.

        Raises:
            AlignkitError: Always.
        """
        raise AlignkitError(f"{message}; see {self.prog} --help")


def stage_help(name: str) -> str:
    """Return what ``alignkit STAGE --help`` prints."""
    return stage_parser(name).format_help().rstrip()


def fit_arguments(
    name: str,
    arguments: Sequence[str],
    *,
    gpu: bool,
    base_of: Callable[[str], str],
    find: Callable[[str], str] = str,
) -> list[str]:
    """Return the arguments of ``fit`` that a stage's command stands for.

    Defaults come first, then the flags of ``fit`` as they were given, then the short ones, so that
    each may change what precedes it. The parameters of a loss follow its name.

    Args:
        name: A key of `STAGES`.
        arguments: What follows it on the command line.
        gpu: Whether the run is on a GPU, where bfloat16 is the faster choice.
        base_of: Finds the base of a checkpoint or adapter, for ``--init-from`` without ``--base``.
        find: Finds the checkpoint that ``--init-from`` stands for.

    Raises:
        AlignkitError: A flag is unknown or has no value, or base or data is missing.
    """
    given, others = stage_parser(name).parse_known_args(list(arguments))
    _check_others(name, others)
    elsewhere = any(other.partition("=")[0] in ("--config", "-c") for other in others)
    if given.base is None and given.init_from is not None:
        given.init_from = find(given.init_from)
        given.base = base_of(given.init_from)
    for flag, value, same in (
        ("--base MODEL", given.base, "--model.base"),
        ("--data FILE", given.data, "--data.path"),
    ):
        if value is None and not elsewhere and not any(o.startswith(same) for o in others):
            raise AlignkitError(f"{flag.partition(' ')[0]}: none was given; add {flag}")
    if given.full:
        _check_full(given, others)
    out = run_place(f"runs/{name}" if given.out is None else given.out)
    defaults = [*_class_flags(name), *_default_flags(name, given, out, gpu)]
    placed = [] if given.out is None else out_flags(out, others)
    if getattr(given, "loss", None) is not None:
        parameters, others = _loss_parameters(others)
        others += [f"--model.loss={given.loss}", *parameters]
    return ["fit", *defaults, *others, *_short_flags(given), *placed]


def stage_parser(name: str) -> ArgumentParser:
    """Return the parser of a stage's command."""
    stage = STAGES[name]
    parser = _Parser(
        prog=f"alignkit {name}",
        usage=f"alignkit {name} --base MODEL --data FILE [options]",
        description=stage.says,
        epilog="Every flag of `alignkit fit` may follow, such as --trainer.devices 2; those of "
        f"this stage are listed by: alignkit fit --model {stage.model} --data {stage.data} --help. "
        "--print_config prints the whole configuration instead of training.",
        allow_abbrev=False,
    )
    what = parser.add_argument_group("what")
    what.add_argument("--base", metavar="MODEL", help="Hub id, local directory or .gguf file")
    what.add_argument("--data", metavar="FILE", help="file, directory or Hub id of the rows")
    _add(what, "init-from", "RUN", "start from this run, checkpoint or adapter")
    how = parser.add_argument_group("how")
    if name == "dpo":
        how.add_argument("--loss", metavar="NAME", help="DPO, IPO, SimPO, … (default: DPO)")
        how.add_argument(
            "--beta", metavar="B", help="strength of the reference (default: the loss's own)"
        )
    rates = f"default: {stage.lr:g}, with --full {stage.lr * _FULL_SHARE:g}"
    how.add_argument("--lr", metavar="RATE", help=f"peak learning rate ({rates})")
    how.add_argument("--epochs", metavar="N", help="passes over the data (default: 1)")
    how.add_argument("--steps", metavar="N", help="end after so many optimizer steps")
    _add(how, "tokens-per-batch", "N", "tokens of a micro-batch (default: 4096)")
    _add(how, "max-length", "N", "most tokens of a prompt with its answer") if name != "lora" else (
        _add(how, "block-size", "N", "tokens of a row of text")
    )
    how.add_argument("--rank", metavar="R", help="rank of the adapter; its alpha is twice that")
    how.add_argument("--full", action="store_true", help="train every weight, without an adapter")
    how.add_argument("--seed", metavar="N", help="seed of the run (default: 0)")
    where = parser.add_argument_group("where")
    where.add_argument("--out", metavar="DIR", help=f"folder of the runs (default: runs/{name})")
    where.add_argument(
        "--resume", nargs="?", const="last", metavar="CKPT", help="go on from the last checkpoint"
    )
    for flag, says in (("--quiet", "results, warnings and errors alone"), ("--debug", "traces")):
        where.add_argument(flag, action="store_true", help=says)
    return parser


def _add(group: _ArgumentGroup, name: str, metavar: str, says: str) -> None:
    """Add a flag that may be written with hyphens or with underscores."""
    flags = (f"--{name}", f"--{name.replace('-', '_')}")
    group.add_argument(*flags, metavar=metavar, help=says)


def _class_flags(name: str) -> Iterator[str]:
    yield f"--model={STAGES[name].model}"
    yield f"--data={STAGES[name].data}"


def _default_flags(name: str, given: Namespace, out: str, gpu: bool) -> Iterator[str]:
    rate = STAGES[name].lr * (_FULL_SHARE if given.full else 1)
    checkpoint = {
        "class_path": "alignkit.callbacks.Checkpoint",
        "init_args": {
            "filename": "best",
            "monitor": "val/loss",
            "save_last": True,
            "enable_version_counter": False,
        },
    }
    final = {"class_path": "alignkit.callbacks.FinalValidation"}
    settings = {
        "trainer.max_epochs": 1,
        "trainer.gradient_clip_val": _CLIP,
        "trainer.log_every_n_steps": 1,
        "trainer.precision": "bf16-mixed" if gpu else "32-true",
        "trainer.default_root_dir": out,  # for a logger that has no folder
        "trainer.logger": logger_at(out),
        "trainer.callbacks": json.dumps([checkpoint, *([final] if given.steps else [])]),
        "model.dtype": "bfloat16" if gpu and not given.full else "float32",
        "model.optimizer": "AdamW",
        "model.optimizer.lr": rate,
        "model.optimizer.fused": "true",
        "model.optimizer.weight_decay": 0.0,
        "model.warmup_steps": _WARMUP,
    }
    if given.steps is not None:
        settings["trainer.max_epochs"] = -1
    for option, value in settings.items():
        yield f"--{option}={value}"


def _short_flags(given: Namespace) -> Iterator[str]:
    """Yield what the short flags stand for."""
    options = {
        "base": "model.base",
        "data": "data.path",
        "init_from": "model.init_from",
        "beta": "model.loss.beta",
        "lr": "model.optimizer.lr",
        "epochs": "trainer.max_epochs",
        "steps": "trainer.max_steps",
        "tokens_per_batch": "data.tokens_per_batch",
        "max_length": "data.max_length",
        "block_size": "data.block_size",
        "rank": "model.lora.r",
        "seed": "seed_everything",
        "resume": "ckpt_path",
    }
    for short, option in options.items():
        value = getattr(given, short, None)
        if value is not None:
            yield f"--{option}={value}"
    if given.full:
        yield "--model.lora=null"
    if given.rank is not None:
        yield f"--model.lora.alpha={2 * _whole(given.rank)}"


def _loss_parameters(others: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the flags of a loss's parameters with their values, and the other arguments."""
    parameters: list[str] = []
    rest: list[str] = []
    place = rest
    for argument in others:
        if argument.startswith("-") and not _NUMBER.match(argument):
            place = parameters if argument.startswith("--model.loss.") else rest
        place.append(argument)
    return parameters, rest


def _whole(rank: str) -> int:
    if not rank.isdecimal():
        raise AlignkitError(f"--rank {rank}: give a whole number, 1 or more")
    return int(rank)


def _check_full(given: Namespace, others: Sequence[str]) -> None:
    """Refuse an adapter's settings beside ``--full``, which trains without one."""
    asked = ["--rank"] if given.rank is not None else []
    asked += [flag for flag, _ in flags_and_values(others) if flag.startswith("--model.lora")]
    if asked:
        raise AlignkitError(f"--full: trains without an adapter; leave out it or {asked[0]}")


def _check_others(name: str, others: Sequence[str]) -> None:
    """Refuse what is no flag of ``fit`` either.

    Raises:
        AlignkitError: It is none; the nearest short flag is named.
    """
    parser = stage_parser(name)
    known = [option for action in parser._actions for option in action.option_strings]
    value = False  # whether the next argument may be one
    for argument in others:
        flag = argument.partition("=")[0]
        is_flag = flag.startswith("-") and not _NUMBER.match(flag)
        if is_flag and "." not in flag and flag not in _FIT_FLAGS:
            near = did_you_mean(flag, known)
            raise AlignkitError(f"{flag}: no such option{near}; see {parser.prog} --help")
        if not is_flag and not value:
            raise AlignkitError(f"{argument}: is no option; see {parser.prog} --help")
        value = is_flag and "=" not in argument
