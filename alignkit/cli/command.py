"""The ``alignkit`` command: LightningCLI for training, plain functions for everything else."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import time
import traceback
import warnings
from argparse import SUPPRESS, Action
from collections.abc import Sequence
from typing import Any

import torch
from jsonargparse import ArgumentParser, set_parsing_settings
from jsonargparse.typing import register_type
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import ProgressBar as BaseProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

import alignkit.data  # noqa: F401 (so that data modules go by their short names)
from alignkit.callbacks import ProgressBar
from alignkit.cli.config import SaveConfig
from alignkit.cli.errors import explain
from alignkit.cli.launch import RankFailed, check_processes, end_ranks, keep_relaunchable
from alignkit.cli.loss import fresh_losses
from alignkit.cli.messages import OneLineErrors
from alignkit.cli.settings import check_config_files, check_trainer
from alignkit.cli.streams import outlive_readers
from alignkit.models.checkpoint import read_checkpoint
from alignkit.models.find import find_checkpoint
from alignkit.modules import AlignmentModule
from alignkit.modules.precision import refuse_by_name
from alignkit.modules.runs import NAMES, asked_checkpoint
from alignkit.utils.interrupts import Stopped, stop_on_signals
from alignkit.utils.ranks import is_first_rank, is_lost_connection

# Command to what it does and the module behind it, imported when it runs: a function of the
# command's name, and ``add_arguments(parser)`` for its flags.
TOOLS = {
    "generate": ("Answer prompts with a model.", "alignkit.tools.generate.command"),
    "compare": ("Put several models' answers side by side.", "alignkit.tools.compare"),
    "export": ("Write a checkpoint for use elsewhere.", "alignkit.tools.export"),
    "demo": ("Run the three stages on a small model, offline.", "alignkit.tools.demo.run"),
    "configs": ("List the configurations that come along; copy one.", "alignkit.tools.configs"),
    "audit": ("Report every defect of a data set.", "alignkit.tools.audit.command"),
    "profile": ("Time LoRA against full fine-tuning.", "alignkit.tools.profile.command"),
}


# Warnings that tell a user of alignkit nothing.
_NO_NEWS = (
    # Lightning's own use of names that torch and jsonargparse have deprecated since.
    r"(?s).*treespec, LeafSpec",
    r"(?s).*skip_none parameter was deprecated",
    # Always so: the configuration was just saved there, or an earlier run's checkpoint lies there.
    r"Checkpoint directory .* exists and is not empty",
    # Ours is: its sampler starts where the checkpoint stopped.
    r".*your dataloader is not resumable",
    # Our data modules have no such hook to lose.
    r"You have overridden `on_before_batch_transfer`",
)


_PATIENCE = 2.0  # seconds that an error of another rank has to come first


class _DebugFlag(Action):
    """``--debug`` for ``--help`` alone: `main` takes it out before a parser sees it."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any) -> None:
        told = "Show the trace of an error, before its one line."
        super().__init__(option_strings, SUPPRESS, nargs=0, default=SUPPRESS, help=told)

    def __call__(self, *args: Any) -> None:
        """Do nothing."""


class Parser(OneLineErrors, ArgumentParser):
    """A tool's parser."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})


class TrainingParser(OneLineErrors, LightningArgumentParser):
    """The parser of ``fit``, ``validate`` and ``test``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})


class AlignCLI(LightningCLI):
    """``fit``, ``validate`` and ``test`` for any AlignmentModule and data module, by class path.

    Args:
        arguments: The command line after ``alignkit``.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        super().__init__(
            AlignmentModule,
            LightningDataModule,
            args=list(arguments),
            parser_class=TrainingParser,
            parser_kwargs={"prog": "alignkit"},
            save_config_callback=SaveConfig,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            trainer_defaults={
                # Our batch samplers already deal batches to ranks, without repeating examples.
                "use_distributed_sampler": False,
                # The modules log one line of parameter counts, which says more.
                "enable_model_summary": False,
            },
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the trainer methods on offer; there is nothing to predict."""
        return {k: v for k, v in LightningCLI.subcommands().items() if k != "predict"}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Return a parser whose ``--help`` names ``--debug``."""
        parser = super().init_parser(**kwargs)
        parser.add_argument("--debug", action=_DebugFlag)
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Let the data tokenize as the model reads, unless told otherwise."""
        parser.link_arguments(
            ("model.init_args.base", "model.init_args.tokenizer"),
            "data.init_args.tokenizer",
            compute_fn=lambda base, tokenizer: tokenizer or base,
        )

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        super()._add_subcommands(parser, **kwargs)
        listed = parser._subcommands_action
        assert listed is not None
        for name, (summary, _) in TOOLS.items():  # for --help alone: `main` runs them
            listed.add_subcommand(name, Parser(), help=summary)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse what was handed over; Lightning would warn that there is ``sys.argv`` as well.

        That stays as it is: Lightning starts the other ranks with it.
        """
        self.config = parser.parse_args(args)

    def before_instantiate_classes(self) -> None:
        """Refuse what the trainer would find out after the model is loaded, or never."""
        check_trainer(str(self.subcommand), self.config[self.subcommand].trainer)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Return the trainer, with our progress bar where the configuration names none."""
        config = self._get(self.config_init, "trainer")
        refuse_by_name(config.get("precision"))
        bars = [c for c in config.get("callbacks") or [] if isinstance(c, BaseProgressBar)]
        if config.get("enable_progress_bar") is not False and not bars:
            config["callbacks"] = [*(config.get("callbacks") or []), ProgressBar()]
        trainer = super().instantiate_trainer(**kwargs)
        check_processes(trainer)
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except Exception as error:
            end_ranks(self.trainer, error)
            raise

    def _parse_ckpt_path(self) -> None:
        """Leave the configuration as it was given: ``--ckpt_path`` resumes and says nothing else.

        Lightning would merge the checkpoint's hyper-parameters over the command line, so that
        ``fit --model DPO --ckpt_path sft.ckpt`` silently trains SFT. Reading it here finds a bad
        file before a model is loaded. Runs' folders become their newest checkpoints, here and in
        ``init_from``, so that config.yaml names the very file.
        """
        options = self.config[self.config.subcommand]
        start = options.get("model.init_args.init_from")
        if start:
            options["model.init_args.init_from"] = find_checkpoint(start)
        path = options.get("ckpt_path")
        if path and path not in NAMES:
            options["ckpt_path"] = find_checkpoint(path)
            read_checkpoint(options["ckpt_path"])

    def _find_named_checkpoint(self) -> None:
        """Find what ``last``, ``best`` or ``hpc`` stands for in the folders that the trainer knows.

        Lightning starts anew where there is no last one, and checks none of them.
        """
        options = self.config_init[self.config.subcommand]
        options["ckpt_path"] = asked_checkpoint(self.trainer, options.get("ckpt_path"))

    before_fit = before_validate = before_test = _find_named_checkpoint


def run_tool(name: str, arguments: Sequence[str]) -> int:
    """Run a tool with its function's arguments as flags; returns the exit status.

    It is what the tool's ``status`` makes of the result, where it has one, and else 0.
    """
    summary, place = TOOLS[name]
    module = importlib.import_module(place)
    parser = Parser(prog=f"alignkit {name}", description=summary)
    parser.add_argument("--debug", action=_DebugFlag)
    module.add_arguments(parser)
    config = parser.instantiate(parser.parse_args(list(arguments)))
    result = getattr(module, name)(**config.as_dict())
    return int(module.status(result)) if hasattr(module, "status") else 0


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        args: What follows ``alignkit``; the process's own arguments by default.

    Returns:
        The exit status: 0 if what was asked for was done; 2 after one line on standard error
        about something to change, 1 about anything else; 128 and a signal's number where one has
        stopped it. With ``--debug`` the trace comes before the line.
    """
    if args is None:
        outlive_readers()
        keep_relaunchable()
        sys.path.append(os.getcwd())  # a user's own classes, beside what they run
    given = list(sys.argv[1:] if args is None else args)
    arguments = [argument for argument in given if argument != "--debug"]
    _quiet_logs()
    if args is None and len(arguments) == len(given):
        sys.unraisablehook = _note_unraisable
    set_parsing_settings(add_print_completion_argument=True)
    register_type(torch.device)  # a default of Lightning's callbacks that config.yaml has to hold
    with stop_on_signals():
        try:
            return _run(arguments)
        except Stopped as stop:
            return int(stop.code or 0)
        except RankFailed as failed:
            return failed.status
        except Exception as error:
            if len(arguments) < len(given):
                traceback.print_exception(error)
            return _tell(error)


def _run(arguments: Sequence[str]) -> int:
    if arguments and arguments[0] in TOOLS:
        return run_tool(arguments[0], arguments[1:])
    check_config_files(arguments)
    AlignCLI(fresh_losses(arguments))
    return 0


def _tell(error: Exception) -> int:
    """Print one line about an error, where several ranks met it once, and return the status."""
    line, status = explain(error)
    rank = os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or "0"
    if not is_first_rank() or is_lost_connection(error):
        # Whoever started this process ends it, once another rank has ended with the same error or
        # with the cause of this one.
        time.sleep(_PATIENCE)
    of_rank = "" if is_first_rank() else f" (rank {rank})"
    print(f"alignkit: error{of_rank}: {line}", file=sys.stderr)
    return status


def _note_unraisable(about: sys.UnraisableHookArgs) -> None:
    """Keep the trace of what failed while an object was thrown away out of a user's sight.

    Lightning's profilers, say, fail so once more where their ``__init__`` has been refused.
    """
    logging.getLogger("alignkit").debug("ignored: %r in %r", about.exc_value, about.object)


def _quiet_logs() -> None:
    """Show our own log lines, and leave out what of Lightning's a user cannot act on."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("alignkit").setLevel(logging.INFO)
    # Advertisements for other products.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "Tip:" not in record.getMessage()
    )
    for message in _NO_NEWS:
        warnings.filterwarnings("ignore", message=message)
