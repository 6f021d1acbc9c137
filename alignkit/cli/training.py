"""Run ``fit``, ``validate`` and ``test`` by Lightning's command line."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import ProgressBar as BaseProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

import alignkit.data  # noqa: F401 (so that data modules go by their short names)
from alignkit.callbacks import ProgressBar
from alignkit.cli.closing import closing_lines
from alignkit.cli.commands import COMMANDS
from alignkit.cli.completion import SHELLS
from alignkit.cli.config import SaveConfig
from alignkit.cli.launch import check_processes, end_ranks, shards_blocks
from alignkit.cli.parsers import PrintCompletion, TrainingParser, add_common_flags
from alignkit.cli.settings import check_trainer
from alignkit.models.checkpoint import read_checkpoint
from alignkit.models.find import find_checkpoint
from alignkit.models.weights import deferred_blocks
from alignkit.modules import AlignmentModule
from alignkit.modules.precision import refuse_precision_name
from alignkit.modules.requeue import CheckpointConnector, own_checkpoint, this_run
from alignkit.modules.runs import (
    CHECKPOINT_NAMES,
    asked_checkpoint,
    checkpoint_folders,
    discard_empty_folders,
    logged_folder,
)
from alignkit.utils.phases import is_quiet

log = logging.getLogger(__name__)


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
        """Return a parser whose ``--help`` names the flags that every command has."""
        parser = super().init_parser(**kwargs)
        add_common_flags(parser)
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Set the data module's tokenizer to the model's by default."""
        parser.link_arguments(
            ("model.init_args.base", "model.init_args.tokenizer"),
            "data.init_args.tokenizer",
            compute_fn=lambda base, tokenizer: tokenizer or base,
        )

    def setup_parser(self, add_subcommands: bool, *args: Any) -> None:
        """Make the parser, which can also write its completion."""
        super().setup_parser(add_subcommands, *args)
        if add_subcommands:
            self.parser.add_argument("--completion", action=PrintCompletion, choices=SHELLS)

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        super()._add_subcommands(parser, **kwargs)
        listed = parser._subcommands_action
        assert listed is not None
        for name, each in listed.choices.items():
            each.command, each.description = name, COMMANDS[name].summary

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the arguments that were handed over.

        Lightning would warn that ``sys.argv`` differs. That must stay as it is, as Lightning starts
        the other ranks with it.
        """
        self.config = parser.parse_args(args)

    def before_instantiate_classes(self) -> None:
        """Refuse trainer settings that are wrong, before the model is loaded."""
        check_trainer(str(self.subcommand), self.config[self.subcommand].trainer)

    def instantiate_classes(self) -> None:
        """Make model, data and trainer; a model that will be sharded stays in its files."""
        strategy = self.config[self.subcommand].trainer.strategy
        with deferred_blocks(shards_blocks(strategy)):
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Return the trainer, with our progress bar if the configuration names none."""
        config = self._get(self.config_init, "trainer")
        refuse_precision_name(config.get("precision"))
        bars = [c for c in config.get("callbacks") or [] if isinstance(c, BaseProgressBar)]
        if is_quiet() and not bars:
            config["enable_progress_bar"] = False
        elif config.get("enable_progress_bar") is not False and not bars:
            config["callbacks"] = [*(config.get("callbacks") or []), ProgressBar()]
        trainer = super().instantiate_trainer(**kwargs)
        trainer._checkpoint_connector = CheckpointConnector(trainer)
        check_processes(trainer)
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except BaseException as error:
            discard_empty_folders(self.trainer)
            if isinstance(error, Exception):
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
        if path and path not in CHECKPOINT_NAMES and not self._may_go_on():
            options["ckpt_path"] = find_checkpoint(path)
            read_checkpoint(options["ckpt_path"], whole=False)

    def _may_go_on(self) -> bool:
        """Tell whether SLURM may have started the run again, which then needs no other file."""
        return self.config.subcommand == "fit" and this_run() is not None

    def _find_named_checkpoint(self) -> None:
        """Replace ``last``, ``best`` or ``hpc`` in ``ckpt_path`` by the file it stands for.

        Lightning silently starts a new run if there is no last checkpoint, and verifies no file.
        """
        command = self.config.subcommand
        options = self.config_init[command]
        if command != "fit" and options.get("ckpt_path") is None and self.trainer.is_global_zero:
            start = self.model.hparams.get("init_from")
            measured = f"model.init_from {start}" if start else "the base, without any training"
            log.warning(
                "%s: measures %s; pass --ckpt_path RUN for what a run trained", command, measured
            )
        # A run that SLURM starts again goes on from there, whatever its command names.
        folders = checkpoint_folders(self.trainer)
        saved = own_checkpoint(self.trainer, folders) if self._may_go_on() else None
        options["ckpt_path"] = saved or asked_checkpoint(self.trainer, options.get("ckpt_path"))
        if options["ckpt_path"] and self._may_go_on():
            options["ckpt_path"] = find_checkpoint(options["ckpt_path"])
            read_checkpoint(options["ckpt_path"], whole=False)

    def after_fit(self) -> None:
        """Tell what was written and what to do next."""
        folder = logged_folder(self.trainer)
        if self.trainer.is_global_zero and not is_quiet():
            trained = self.trainer.global_step > self.model._steps_before
            for line in closing_lines(self.trainer, folder, self._began, trained):
                print(line)

    def before_fit(self) -> None:
        """Find a named checkpoint, and note when the fit began."""
        self._began = time.time()
        self._find_named_checkpoint()

    before_validate = before_test = _find_named_checkpoint
