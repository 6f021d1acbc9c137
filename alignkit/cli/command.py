"""Run the ``alignkit`` command: LightningCLI for training, a function for each other tool."""

from __future__ import annotations

import importlib
import os
import sys
import time
import traceback
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
from alignkit.cli.logs import configure_logs, log_unraisable
from alignkit.cli.loss import spell_out_losses
from alignkit.cli.messages import OneLineErrors
from alignkit.cli.optimizer import spell_out_optimizers
from alignkit.cli.settings import check_config_files, check_trainer
from alignkit.cli.streams import survive_closed_streams
from alignkit.models.checkpoint import read_checkpoint
from alignkit.models.find import find_checkpoint
from alignkit.modules import AlignmentModule
from alignkit.modules.precision import refuse_precision_name
from alignkit.modules.runs import CHECKPOINT_NAMES, asked_checkpoint
from alignkit.utils.interrupts import Stopped, stop_on_signals
from alignkit.utils.ranks import is_first_rank, is_lost_connection

# From a command to what it does and to its module, which is imported when the command runs. The
# module has a function of the command's name, and ``add_arguments(parser)`` for its flags; or else
# ``run(arguments)``, which parses them itself and returns the exit status.
TOOLS = {
    "generate": ("Answer prompts with a model.", "alignkit.tools.generate.command"),
    "compare": ("Put several models' answers side by side.", "alignkit.tools.compare"),
    "export": ("Write a checkpoint for use elsewhere.", "alignkit.tools.export"),
    "demo": ("Run the three stages on a small model, offline.", "alignkit.tools.demo.run"),
    "configs": ("List the configurations that come along; copy one.", "alignkit.tools.configs"),
    "audit": ("Report every defect of a data set.", "alignkit.tools.audit.command"),
    "plan": ("Size a fit before it runs.", "alignkit.tools.plan.command"),
    "profile": ("Time LoRA against full fine-tuning.", "alignkit.tools.profile.command"),
}


_OTHER_RANK_SECONDS = 2.0  # time for another rank to report the cause of an error first


class _DebugFlag(Action):
    """List ``--debug`` in ``--help``; `main` removes the flag before a parser sees it."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any) -> None:
        told = "Show the trace of an error, before its one line."
        super().__init__(option_strings, SUPPRESS, nargs=0, default=SUPPRESS, help=told)

    def __call__(self, *args: Any) -> None:
        """Do nothing."""


class Parser(OneLineErrors, ArgumentParser):
    """Parse the arguments of a tool."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})


class TrainingParser(OneLineErrors, LightningArgumentParser):
    """Parse the arguments of ``fit``, ``validate`` and ``test``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})


class AlignCLI(LightningCLI):
    """Run ``fit``, ``validate`` and ``test`` for any AlignmentModule and data module.

    Args:
        arguments: The command line after ``alignkit``.
        **options: Further ones of `LightningCLI`.
    """

    def __init__(self, arguments: Sequence[str], **options: Any) -> None:
        super().__init__(
            AlignmentModule,
            LightningDataModule,
            args=list(arguments),
            parser_class=TrainingParser,
            parser_kwargs=options.pop("parser_kwargs", {"prog": "alignkit"}),
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
            **options,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the trainer methods that are commands, which excludes ``predict``."""
        return {k: v for k, v in LightningCLI.subcommands().items() if k != "predict"}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Return a parser whose ``--help`` names ``--debug``."""
        parser = super().init_parser(**kwargs)
        parser.add_argument("--debug", action=_DebugFlag)
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Set the data module's tokenizer to the model's by default."""
        parser.link_arguments(
            ("model.init_args.base", "model.init_args.tokenizer"),
            "data.init_args.tokenizer",
            compute_fn=lambda base, tokenizer: tokenizer or base,
        )

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        super()._add_subcommands(parser, **kwargs)
        listed = parser._subcommands_action
        assert listed is not None
        for name, (summary, _) in TOOLS.items():  # only to list them in --help: `main` runs them
            listed.add_subcommand(name, Parser(), help=summary)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the arguments that were handed over.

        Lightning would warn that ``sys.argv`` differs. That must stay as it is, as Lightning starts
        the other ranks with it.
        """
        self.config = parser.parse_args(args)

    def before_instantiate_classes(self) -> None:
        """Refuse trainer settings that are wrong, before the model is loaded."""
        check_trainer(str(self.subcommand), self.config[self.subcommand].trainer)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Return the trainer, with our progress bar if the configuration names none."""
        config = self._get(self.config_init, "trainer")
        refuse_precision_name(config.get("precision"))
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
        """Check ``--ckpt_path``, and replace a run's folder by its newest checkpoint.

        Lightning would merge the checkpoint's hyper-parameters over the command line, so that
        ``fit --model DPO --ckpt_path sft.ckpt`` silently trains SFT. Reading the file here finds a
        damaged one before a model is loaded. A folder in ``init_from`` is replaced too, so that
        config.yaml names the file itself.
        """
        options = self.config[self.config.subcommand]
        start = options.get("model.init_args.init_from")
        if start:
            options["model.init_args.init_from"] = find_checkpoint(start)
        path = options.get("ckpt_path")
        if path and path not in CHECKPOINT_NAMES:
            options["ckpt_path"] = find_checkpoint(path)
            read_checkpoint(options["ckpt_path"])

    def _find_named_checkpoint(self) -> None:
        """Replace ``last``, ``best`` or ``hpc`` in ``ckpt_path`` by the file it stands for.

        Lightning silently starts a new run if there is no last checkpoint, and verifies no file.
        """
        options = self.config_init[self.config.subcommand]
        options["ckpt_path"] = asked_checkpoint(self.trainer, options.get("ckpt_path"))

    before_fit = before_validate = before_test = _find_named_checkpoint


def run_tool(name: str, arguments: Sequence[str]) -> int:
    """Run a tool with its function's arguments as flags, and return the exit status.

    Args:
        name: A key of `TOOLS`.
        arguments: The command line after the tool's name.

    Returns:
        What the module's function ``status`` returns for the result, 0 if it has none.
    """
    summary, place = TOOLS[name]
    module = importlib.import_module(place)
    if hasattr(module, "run"):
        return int(module.run(arguments))
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
        survive_closed_streams()
        keep_relaunchable()
        sys.path.append(os.getcwd())  # finds a user's own classes in the working folder
    given = list(sys.argv[1:] if args is None else args)
    arguments = [argument for argument in given if argument != "--debug"]
    configure_logs()
    if args is None and len(arguments) == len(given):
        sys.unraisablehook = log_unraisable
    set_parsing_settings(add_print_completion_argument=True)
    register_type(torch.device)  # some of Lightning's callbacks have one in their defaults
    with stop_on_signals():
        try:
            return _run_command(arguments)
        except Stopped as stop:
            return int(stop.code or 0)
        except RankFailed as failed:
            return failed.status
        except Exception as error:
            if len(arguments) < len(given):
                traceback.print_exception(error)
            return _report_error(error)


def _run_command(arguments: Sequence[str]) -> int:
    if arguments and arguments[0] in TOOLS:
        return run_tool(arguments[0], arguments[1:])
    check_config_files(arguments)
    AlignCLI(spell_out_optimizers(spell_out_losses(arguments)))
    return 0


def _report_error(error: Exception) -> int:
    """Print one line about an error, once if several ranks have it, and return the status."""
    line, status = explain(error)
    rank = os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or "0"
    if not is_first_rank() or is_lost_connection(error):
        # The launcher ends this process when another rank has ended with the same error, or with
        # the error that caused this one.
        time.sleep(_OTHER_RANK_SECONDS)
    of_rank = "" if is_first_rank() else f" (rank {rank})"
    print(f"alignkit: error{of_rank}: {line}", file=sys.stderr)
    return status
