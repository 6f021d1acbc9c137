"""Choose what TensorBoard shows of a run: losses first, and settings beside results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.utils.tensorboard.summary import hparams as hparams_summaries

from alignkit.engine import PackedBatch, response_lengths
from alignkit.modules.losses_first import LossesFirst

_STATS = ("examples", "truncated_frac")  # of the training split
_FIRST = ("loss", "perplexity", "rewards/accuracies")  # of the paired charts

Plain = bool | int | float | str


class Dashboard(Callback):
    """Write a run's settings to its loggers, and lay out TensorBoard's pages.

    - TIME SERIES and SCALARS open on the losses of each stage, see `LossesFirst`.
    - HPARAMS holds model, optimizer, data and trainer settings beside the last value of every
      metric, instead of a made-up ``hp_metric``.
    - CUSTOM SCALARS draws training and validation of one quantity as one chart.
    - HISTOGRAMS holds the margins of each validation's pairs and the lengths of its answers, of
      rank 0's part.

    Every `AlignmentModule` adds this callback to its trainer.
    """

    def __init__(self) -> None:
        self._told = False
        self._lengths: list[Tensor] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep Lightning from logging what would come before the losses."""
        self._told = False
        for logger in _tensorboards(trainer):
            logger._default_hp_metric = False
            before = logger.log_metrics
            write = before.write if isinstance(before, LossesFirst) else before
            logger.log_metrics = LossesFirst(write, stage_name(pl_module))  # type: ignore[method-assign]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the settings that Lightning leaves out: those of optimizer, data and trainer."""
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.hparams.update(_extra(trainer, pl_module))  # for hparams.yaml
            else:
                logger.log_hyperparams(_extra(trainer, pl_module))

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Keep the lengths of the answers, which are the same in every validation."""
        if not self._told and isinstance(batch, PackedBatch):
            self._lengths.append(response_lengths(batch))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw histograms; lay out the pages when the first validation has told its quantities."""
        lengths, self._lengths = self._lengths, []
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        histograms = {"val/answer_tokens": lengths}
        if (watch := getattr(pl_module, "watch", None)) is not None:
            histograms["val/margins"] = watch.margins
        for logger in _tensorboards(trainer) if trainer.is_global_zero else ():
            for name, parts in histograms.items():
                values = torch.cat([torch.empty(0), *(part.float().cpu() for part in parts)])
                if len(values := values[values.isfinite()]):
                    logger.experiment.add_histogram(name, values, trainer.global_step)
        self._lay_out(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lay out the pages of a run without validation."""
        self._lay_out(trainer, pl_module)

    def _lay_out(self, trainer: Trainer, module: LightningModule) -> None:
        if self._told or not trainer.is_global_zero or trainer.state.fn != "fit":
            return
        self._told = True
        own = _flat({k: v for k, v in module.hparams_initial.items() if not k.startswith("_")})
        settings = _readable({**own, **_extra(trainer, module)})
        stage = stage_name(module)
        charts = paired_charts(stage, trainer.callback_metrics)
        for logger in _tensorboards(trainer):
            # Without a list of this run's columns: TensorBoard would take the first run's for all
            # runs of a folder. Where there is none it makes one of everything that they have.
            _, start, end = hparams_summaries(settings, {})  # type: ignore[no-untyped-call]
            for summary in (start, end):
                logger.experiment._get_file_writer().add_summary(summary)
            if charts:
                logger.experiment.add_custom_scalars({f"{stage}: training and validation": charts})


def _extra(trainer: Trainer, module: LightningModule) -> dict[str, Plain]:
    settings: Mapping[str, Any] | None = getattr(module, "_settings", None)
    return run_parameters(settings or {}, getattr(trainer, "datamodule", None))


def run_parameters(settings: Mapping[str, Any], data: Any) -> dict[str, Plain]:
    """Return settings of a run by the names under which loggers show them.

    Args:
        settings: As `alignkit.modules.resume.run_settings` returns them; empty if a module makes
            its optimizer in another way.
        data: The data module, ``None`` without one.
    """
    found: dict[str, Any] = {}
    if settings:
        options = dict(settings["options"])
        found["optimizer"] = settings["optimizer"].rpartition(".")[2]
        found["lr"] = options.pop("lr", None)
        found |= {f"optimizer/{name}": value for name, value in options.items()}
        found |= {f"trainer/{name}": value for name, value in settings["trainer"].items()}
    if data is not None:
        found["data"] = type(data).__name__
        kept = {name: value for name, value in vars(data).items() if _is_setting(name, value)}
        found |= {f"data/{name}": value for name, value in kept.items()}
        stats = getattr(data, "stats", {})
        found |= {f"data/{name}": stats[name] for name in _STATS if name in stats}
    return _flat({name: value for name, value in found.items() if value is not None})


def _flat(values: Mapping[str, Any]) -> dict[str, Plain]:
    """Return nested values by joined names, and as text what is neither a number nor text."""
    flat: dict[str, Plain] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}/{inner}": each for inner, each in _flat(value).items()}
        else:
            flat[name] = value if isinstance(value, Plain) else str(value)
    return flat


def _is_setting(name: str, value: Any) -> bool:
    given = isinstance(value, Plain | list | dict) and name not in ("stats", "vocabulary")
    return given and not name.startswith(("_", "prepare_data", "allow_"))


def paired_charts(stage: str, names: Iterable[str]) -> dict[str, list[Any]]:
    """Return the charts of CUSTOM SCALARS, as `SummaryWriter.add_custom_scalars` takes them.

    Losses come first, then what both training and validation measure, then the rest.

    Example:
        >>> list(paired_charts("DPO", ["train/kl", "val/kl", "val/displacement", "val/loss"]))
        ['loss', 'kl', 'displacement']

    Args:
        stage: As `stage_name` returns it.
        names: Those of all metrics.
    """
    names = set(names)
    measured = {name.removeprefix("val/") for name in names if name.startswith("val/")}
    ordered = sorted(measured, key=lambda n: (n not in _FIRST, f"train/{n}" not in names, n))
    tags = {name: (f"^train/{name}$", f"^val/{name}$") for name in ordered}
    if "loss" in tags:
        tags["loss"] = (f"^loss/{stage}/train$", f"^loss/{stage}/val$")
    return {name: ["Multiline", list(pair)] for name, pair in tags.items()}


def stage_name(module: LightningModule) -> str:
    """Return the name of a module's stage, such as ``DPO``."""
    return type(module).__name__.removesuffix("Module")


def _readable(settings: Mapping[str, Plain]) -> dict[str, Plain]:
    """Return settings in which a switch is a word: HPARAMS shows one as 0.0000 otherwise."""
    return {name: str(v) if isinstance(v, bool) else v for name, v in settings.items()}


def _tensorboards(trainer: Trainer) -> list[TensorBoardLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
