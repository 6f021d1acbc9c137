"""The ``alignkit`` command: LightningCLI for training, plain functions for everything else."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings
from argparse import Action
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from jsonargparse import ArgumentParser, set_parsing_settings
from jsonargparse.typing import register_type
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar as BaseProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from alignkit.callbacks import ProgressBar
from alignkit.cli_errors import find_user_error, one_line, parser_line
from alignkit.cli_loss import fresh_losses
from alignkit.interrupts import Stopped, stop_on_signals
from alignkit.launch import check_launch
from alignkit.modules import AlignmentModule
from alignkit.modules.checkpoint import read_checkpoint
from alignkit.modules.find import find_checkpoint
from alignkit.modules.runs import NAMES, asked_checkpoint
from alignkit.precision import refuse_by_name

# Command to what it does and the module behind it, imported when it runs: a function of the
# command's name, and ``add_arguments(parser)`` for its flags.
TOOLS = {
    "generate": ("Answer prompts with a model.", "alignkit.report.generate"),
    "compare": ("Put several models' answers side by side.", "alignkit.report.compare"),
    "export": ("Write a checkpoint for use elsewhere.", "alignkit.report.export"),
    "audit": ("Report every defect of a data set.", "alignkit.data.audit"),
    "profile": ("Time LoRA against full fine-tuning.", "alignkit.report.profile"),
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


DEBUG = "ALIGNKIT_DEBUG"
"""The environment variable that `--debug` sets: an error shows its stack trace."""


class SaveConfig(SaveConfigCallback):
    """Lightning's, for runs that have a folder of their own.

    Without a logger it would write config.yaml into the working folder, over a user's own, or
    refuse a second run there.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save the configuration beside the run's events."""
        if trainer.logger is not None:
            super().setup(trainer, pl_module, stage)


class OneLineErrors:
    """Makes a parser raise its complaint as one `AlignkitError` line, without the usage."""

    prog: str
    _actions: list[Action]

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise what is left of jsonargparse's message without the types it tried."""
        cause = find_user_error(ex)
        if cause is not None:
            raise cause from None
        options = [option.lstrip("-") for a in self._actions for option in a.option_strings]
        raise parser_line(message, self.prog, options) from None


class Parser(OneLineErrors, ArgumentParser):
    """A tool's parser."""


class TrainingParser(OneLineErrors, LightningArgumentParser):
    """The parser of ``fit``, ``validate`` and ``test``."""


class AlignCLI(LightningCLI):
    """``fit``, ``validate`` and ``test`` for any AlignmentModule and data module, by class path."""

    def __init__(self) -> None:
        super().__init__(
            AlignmentModule,
            LightningDataModule,
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

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Return the trainer, with our progress bar where the configuration names none."""
        config = self._get(self.config_init, "trainer")
        refuse_by_name(config.get("precision"))
        bars = [c for c in config.get("callbacks") or [] if isinstance(c, BaseProgressBar)]
        if config.get("enable_progress_bar") is not False and not bars:
            config["callbacks"] = [*(config.get("callbacks") or []), ProgressBar()]
        trainer = super().instantiate_trainer(**kwargs)
        check_launch(trainer)
        return trainer

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


def run_tool(name: str, arguments: Sequence[str]) -> None:
    """Run a tool with its function's arguments as flags."""
    summary, place = TOOLS[name]
    module = importlib.import_module(place)
    parser = Parser(prog=f"alignkit {name}", description=summary)
    module.add_arguments(parser)
    config = parser.instantiate(parser.parse_args(list(arguments)))
    getattr(module, name)(**config.as_dict())


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        args: What follows ``alignkit``; the process's own arguments by default.

    Returns:
        The exit status: 0; 2 after one line on standard error about what the user can mend, 1
        about anything else, with ``--debug`` a stack trace instead; 128 and a signal's number
        where one has stopped it.
    """
    _quiet_logs()
    set_parsing_settings(add_print_completion_argument=True)
    register_type(torch.device)  # a default of Lightning's callbacks that config.yaml has to hold
    arguments = list(sys.argv[1:] if args is None else args)
    if "--debug" in arguments:  # by the environment it reaches the other ranks as well
        arguments.remove("--debug")
        os.environ[DEBUG] = "1"
    with stop_on_signals():
        return _run(arguments)


def _run(arguments: list[str]) -> int:
    try:
        if arguments and arguments[0] in TOOLS:
            run_tool(arguments[0], arguments[1:])
        else:
            # LightningCLI would warn if handed them. The program's own name stays: Lightning starts
            # the other ranks with it.
            sys.argv = [sys.argv[0], *fresh_losses(arguments)]
            AlignCLI()
    except Stopped as stop:
        return int(stop.code or 0)
    except Exception as error:
        if os.environ.get(DEBUG):
            raise
        line, status = one_line(error)
        print(f"alignkit: error{_rank()}: {line}", file=sys.stderr)
        return status
    return 0


def _rank() -> str:
    """Which process of several speaks, for all but the first."""
    rank = os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or "0"
    return "" if rank == "0" else f" (rank {rank})"


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
