"""What the three stages share: model, adapter, optimizer, exact steps, small checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any, Literal

from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys
from torch.optim import AdamW, Optimizer
from transformers import PreTrainedModel, get_scheduler

from alignkit.engine import PackedBatch, check_engine, compile_blocks
from alignkit.lora import LoRAConfig, lora_parameter_groups
from alignkit.modules import checkpoint as ckpt
from alignkit.modules.build import build_policy
from alignkit.modules.dropout import prove_quiet
from alignkit.modules.metrics import EpochMetrics
from alignkit.modules.window import LossOutput, Window, scale_gradients

log = logging.getLogger(__name__)


class AlignmentModule(LightningModule):
    """A causal language model under training; a subclass says what its loss is.

    Overriding `compute_loss` makes a new objective. It returns sums, and the optimised loss is
    exactly ``Σ loss_sum / Σ weight`` over every micro-batch of the accumulation window and every
    rank, whatever their token counts.

    Args:
        base: Pretrained model: a Hub id, a local directory or a ``.gguf`` file.
        tokenizer: Where its tokenizer lies, if not with the base; data modules follow it.
        lora: Low-rank adapters to train over the frozen base; ``null`` trains the whole model.
        init_from: Start from these weights: a checkpoint of any stage, or a PEFT adapter
            directory. To resume a run of this stage use ``ckpt_path`` instead.
        dtype: Of the base's weights. With LoRA ``bfloat16`` halves their memory; adapters and,
            without LoRA, the whole model want ``float32``.
        random_init: Draw the base's weights at random from its config, reading none.
        optimizer: From parameters to an optimizer; only trainable parameters are handed over.
        schedule: Shape of the learning rate after warm-up, a name of transformers'
            ``get_scheduler``; it moves every optimizer step.
        lora_plus_ratio: Learning rate of every B over that of A (LoRA+, arXiv:2402.12354).
        warmup_steps: Optimizer steps of linear warm-up; below 1, a fraction of all steps.
        dropout: Keep the base model's own dropout (GPT-2's 0.1). Off by default: a preference
            loss compares two models, and noise in one of them is no preference.
        activation_checkpointing: Recompute each block's activations in the backward pass: less
            memory, about a third more time.
        compile: `torch.compile` every block, which makes the first steps slow. Rows are padded to
            multiples of 64 tokens.

    Raises:
        AlignkitError: The base cannot be loaded or scored, or ``init_from`` does not fit it.
    """

    perplexity = False
    """Whether the loss is a cross-entropy whose exponential is worth logging."""

    base: str
    base_fingerprint: str
    lora: LoRAConfig | None
    optimizer: OptimizerCallable
    schedule: str
    warmup_steps: float
    lora_plus_ratio: float
    model: PreTrainedModel
    _random_states: Sequence[Mapping[str, Tensor]] | None = None

    def __init__(
        self,
        base: str,
        tokenizer: str | None = None,
        lora: LoRAConfig | None = LoRAConfig(),  # noqa: B008 (frozen)
        init_from: str | None = None,
        dtype: Literal["float32", "bfloat16"] = "float32",
        random_init: bool = False,
        optimizer: OptimizerCallable = lambda params: AdamW(
            params, lr=2e-4, weight_decay=0.0, fused=True
        ),
        schedule: Literal["constant_with_warmup", "linear", "cosine"] = "linear",
        warmup_steps: float = 0.0,
        lora_plus_ratio: float = 1.0,
        dropout: bool = False,
        activation_checkpointing: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self._save_plain_hyperparameters()
        self.base = base
        # A checkpoint's hyper-parameters hold the config as plain values.
        self.lora = LoRAConfig.from_dict(lora) if isinstance(lora, Mapping) else lora
        self.optimizer = optimizer
        self.schedule = schedule
        self.warmup_steps = warmup_steps
        self.lora_plus_ratio = lora_plus_ratio
        self.model, self.base_fingerprint = build_policy(
            base, self.lora, dtype=dtype, random_init=random_init, dropout=dropout
        )
        if init_from is not None:
            untie = self.lora is not None and self.lora.untie
            ckpt.load_weights(self.model, init_from, self.base_fingerprint, untie)
        if activation_checkpointing:
            self.model.gradient_checkpointing_enable(  # type: ignore[no-untyped-call]
                {"use_reentrant": False}
            )
        check_engine(self.model)
        self.dropout = dropout
        if not dropout:
            prove_quiet(self.model)
        self.compiles = compile
        if compile:
            compile_blocks(self.model)
        self.train_metrics = EpochMetrics(self.perplexity)
        self.val_metrics = EpochMetrics(self.perplexity)
        self.window = Window()

    # What a subclass says -------------------------------------------------------------------

    def compute_loss(self, batch: PackedBatch) -> LossOutput:
        """Return the batch's summed loss, its weight and its summed metrics.

        Args:
            batch: On the module's device; ``self.training`` tells training from validation.
        """
        raise TypeError(f"{type(self).__name__} must override compute_loss(batch) -> LossOutput")

    # Steps ----------------------------------------------------------------------------------

    def training_step(self, batch: PackedBatch, batch_idx: int) -> Tensor:
        """Return the *sum* loss; `on_before_optimizer_step` makes the mean exact."""
        output = self.compute_loss(batch)
        self.window.add(output, batch.num_tokens)
        self.train_metrics.update(output)
        return output.loss_sum

    def validation_step(self, batch: PackedBatch, batch_idx: int) -> None:
        """Add the batch to the epoch's means; no collective runs inside a step."""
        self.val_metrics.update(self.compute_loss(batch))

    def test_step(self, batch: PackedBatch, batch_idx: int) -> None:
        """Measure a test batch as a validation batch is."""
        self.validation_step(batch, batch_idx)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Turn the accumulated, averaged sums into the gradient of the window's exact mean."""
        strategy = self.trainer.strategy
        totals = self.window.close(lambda t: strategy.reduce(t, reduce_op="sum"))
        # Undo Lightning's division by the window and DDP's by the ranks.
        constant = self.trainer.accumulate_grad_batches * self.trainer.world_size
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        scale_gradients(parameters, constant / totals.weight)
        for name, mean in totals.means.items():
            self._log(f"train/{name}", mean, prog_bar=name == "loss")
        self._log("train/lr", optimizer.param_groups[0]["lr"])
        self._log("train/tokens_per_second", totals.tokens_per_second, prog_bar=True)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Log the gradient's norm and clip it.

        Under mixed precision Lightning refuses to clip for a fused optimizer, which unscales
        inside its step; only 16-mixed has a scaler, so everything else clips here.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        self._log("train/grad_norm", norm)
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if gradient_clip_val and gradient_clip_algorithm in (None, "norm") and scaler is None:
            nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, norm)
        else:
            super().configure_gradient_clipping(
                optimizer, gradient_clip_val, gradient_clip_algorithm
            )

    def on_train_epoch_end(self) -> None:
        """Log the epoch's training means as ``train/…_epoch``."""
        for name, metric in self.train_metrics.named().items():
            attribute = f"train_metrics.means.{name}"
            self.log(f"train/{name}_epoch", metric, metric_attribute=attribute)

    def on_validation_epoch_end(self) -> None:
        """Log the validation means as ``val/…``."""
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """Log the test means as ``test/…``."""
        self._log_evaluation("test")

    def on_fit_start(self) -> None:
        """Put the policy in training mode: transformers models load in eval, fit leaves them so."""
        self.model.train()
        trainable = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        total = sum(p.numel() for p in self.model.parameters())
        if self.trainer.is_global_zero:
            log.info(
                "%s: training %s of %s parameters (%.2f%%)",
                type(self).__name__, f"{trainable:,}", f"{total:,}", 100 * trainable / total,
            )  # fmt: skip

    def on_train_epoch_start(self) -> None:
        """Measure throughput from here: set-up is not training."""
        self.window.restart_clock()

    def on_validation_end(self) -> None:
        """Take the time that validation took out of the throughput."""
        self.window.restart_clock()

    # Optimizer ------------------------------------------------------------------------------

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimizer over trainable parameters and its per-step schedule."""
        optimizer = self.optimizer([p for p in self.model.parameters() if p.requires_grad])
        if self.lora_plus_ratio != 1:
            chosen = optimizer.defaults
            groups = lora_parameter_groups(
                self.model, chosen["lr"], self.lora_plus_ratio, chosen.get("weight_decay", 0.0)
            )
            optimizer = self.optimizer(groups)
        total = int(self.trainer.estimated_stepping_batches)
        warmup = self.warmup_steps
        scheduler = get_scheduler(
            self.schedule,
            optimizer,
            num_warmup_steps=round(warmup * total if warmup < 1 else warmup),
            num_training_steps=total,
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    # Checkpoints ----------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the policy's trainable parameters alone, under ``model.…``."""
        return {f"model.{name}": value for name, value in ckpt.trainable_state(self.model).items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load what `state_dict` returns: exactly the trainable parameters, or nothing.

        Lightning's own strictness would ask for the frozen base as well.
        """
        state = ckpt.model_state({"state_dict": state_dict})
        ckpt.load_trainable(self.model, state, "ckpt_path")
        return _IncompatibleKeys([], [])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Stamp the checkpoint with what it belongs to, and keep the random state."""
        checkpoint[ckpt.STAMP] = self.checkpoint_stamp()
        checkpoint["rng"] = ckpt.random_states(self.device)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another class, base or shape before anything is changed."""
        ckpt.check_stamp(self.checkpoint_stamp(), checkpoint.get(ckpt.STAMP))
        self._random_states = checkpoint.get("rng")

    def on_train_start(self) -> None:
        """Log what the data lost, and continue a resumed run's random stream.

        Restored here, after the sanity check has used some of it.
        """
        truncated = getattr(self.trainer.datamodule, "stats", {}).get("truncated_frac")  # type: ignore[attr-defined]
        if truncated is not None:  # a fact about the run: no mean over ranks or steps
            for logger in self.loggers:
                logger.log_metrics({"data/truncated_frac": truncated}, step=self.global_step)
        if self._random_states is not None:
            ckpt.restore_random_state(self._random_states, self.device, self.global_rank)
            self._random_states = None

    def checkpoint_stamp(self) -> dict[str, str]:
        """Return what a checkpoint must share with the module that resumes from it."""
        return {
            "module": f"{type(self).__module__}.{type(self).__qualname__}",
            "base": self.base,
            "base_fingerprint": self.base_fingerprint,
        }

    # Inside ---------------------------------------------------------------------------------

    def _save_plain_hyperparameters(self) -> None:
        """Keep hyper-parameters that load without unpickling: plain values, no callables."""
        self.save_hyperparameters(ignore=["optimizer"])
        kept: MutableMapping[str, Any]
        for kept in (self.hparams, self._hparams_initial):  # type: ignore[assignment]
            for name, value in kept.items():
                if is_dataclass(value) and not isinstance(value, type):
                    kept[name] = asdict(value)

    def _log(self, name: str, value: float | Tensor, prog_bar: bool = False) -> None:
        # Totals are already summed over ranks; batch_size keeps Lightning from guessing one.
        self.log(name, value, prog_bar=prog_bar, batch_size=1, rank_zero_only=True)

    def _log_evaluation(self, stage: str) -> None:
        for name, metric in self.val_metrics.named().items():
            attribute = f"val_metrics.means.{name}"
            self.log(f"{stage}/{name}", metric, prog_bar=name == "loss", metric_attribute=attribute)
