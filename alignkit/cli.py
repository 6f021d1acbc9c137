"""The ``alignkit`` command: LightningCLI for training, plain functions for everything else."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentParser, set_parsing_settings
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from alignkit.errors import AlignkitError
from alignkit.modules import AlignmentModule

# Command to the function behind it, imported when it runs.
TOOLS = {
    "generate": "alignkit.report.generate:generate",
    "compare": "alignkit.report.compare:compare",
    "export": "alignkit.report.export:export",
    "audit": "alignkit.data.audit:audit",
    "profile": "alignkit.report.profile:profile",
}


class AlignCLI(LightningCLI):
    """``fit``, ``validate`` and ``test`` for any AlignmentModule and data module, by class path."""

    def __init__(self, args: ArgsType = None) -> None:
        super().__init__(
            AlignmentModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            trainer_defaults={
                # Our batch samplers already deal batches to ranks, without repeating examples.
                "use_distributed_sampler": False,
            },
            args=args,
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
        for name in TOOLS:
            tool, _ = tool_parser(name)
            parser._subcommands_action.add_subcommand(name, tool, help=tool.description)

    def _parse_ckpt_path(self) -> None:
        """Leave the configuration as it was given: ``--ckpt_path`` resumes and says nothing else.

        Lightning would merge the checkpoint's hyper-parameters over the command line, so that
        ``fit --model DPO --ckpt_path sft.ckpt`` silently trains SFT.
        """


def tool_parser(name: str) -> tuple[ArgumentParser, Any]:
    """Return a parser for a tool's signature, and the function."""
    module, _, attribute = TOOLS[name].partition(":")
    function = getattr(importlib.import_module(module), attribute)
    summary = (function.__doc__ or "").strip().splitlines()[0]
    parser = ArgumentParser(prog=f"alignkit {name}", description=summary)
    parser.add_argument("--config", action="config", help="A YAML file with these arguments.")
    parser.add_function_arguments(function, as_positional=True)
    return parser, function


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 0, or 2 after one line on standard error about what the user can mend.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    set_parsing_settings(add_print_completion_argument=True)
    arguments = list(sys.argv[1:] if args is None else args)
    if args is not None:
        sys.argv = [sys.argv[0]]  # LightningCLI warns where it is given both
    try:
        if arguments and arguments[0] in TOOLS:
            parser, function = tool_parser(arguments[0])
            config = parser.instantiate_classes(parser.parse_args(arguments[1:]))
            config.pop("config", None)
            function(**config.as_dict())
        else:
            AlignCLI(arguments)
    except AlignkitError as error:
        print(f"alignkit: error: {error}", file=sys.stderr)
        return 2
    return 0
