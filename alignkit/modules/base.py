"""Build the model, the optimizer and the checkpoints that all three stages share."""

from __future__ import annotations

import logging
from collections.abc import Mapping, MutableMapping
from inspect import signature
from typing import Any, Literal, Self

from lightning.pytorch import Callback
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import _restricted_classmethod
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.optim import AdamW
from transformers import PreTrainedModel

from alignkit.engine import PackedBatch, Packing, check_engine, compile_blocks
from alignkit.lora import LoRAConfig
from alignkit.lora.adapter import adapter_layers
from alignkit.lora.inject import base_parameter_count
from alignkit.lora.resize import rows_before
from alignkit.models.embedding import refuse_unknown_ids
from alignkit.models.find import find_checkpoint, verified
from alignkit.models.fingerprint import BaseIdentity
from alignkit.models.load import embedding_size, load_tokenizer
from alignkit.models.noise import refuse_noise
from alignkit.models.policy import build_policy, checkpoint_activations
from alignkit.models.quantize import Quantization
from alignkit.models.residual import Residual
from alignkit.models.stamp import STAMP, check_content, check_stamp, make_stamp
from alignkit.models.start import find_start
from alignkit.models.text_format import KEY as TEXT
from alignkit.models.text_format import TextFormat
from alignkit.models.tokenizer import vocabulary_size
from alignkit.modules.checkpoint_io import seal_checkpoints
from alignkit.modules.dashboard import Dashboard
from alignkit.modules.nonfinite import OnNonFinite, refuse_nonfinite
from alignkit.modules.optimize import check_rates, make_optimizer, make_schedule, total_steps
from alignkit.modules.resume import KEY as SETTINGS
from alignkit.modules.resume import apply_settings, run_settings, tell_other_loss
from alignkit.modules.runs import claim_run_folder
from alignkit.modules.sharding import refuse_probe
from alignkit.modules.signals import Signals
from alignkit.modules.text import format_of_checkpoint, format_of_run
from alignkit.modules.trainer_support import TrainerSupport
from alignkit.modules.usage import Usage
from alignkit.utils.phases import phase
from alignkit.utils.plain import plain

log = logging.getLogger(__name__)


class AlignmentModule(TrainerSupport):
    """Train a causal language model with the loss that a subclass defines.

    A subclass overrides `compute_loss`, which returns sums. The optimised loss is exactly
    ``Σ loss_sum / Σ weight`` over every micro-batch of the accumulation window and every rank,
    whatever their token counts.

    Args:
        base: Pretrained model: a Hub id, a local directory or a ``.gguf`` file.
        tokenizer: Where its tokenizer lies, if not with the base; data modules use it too.
        lora: Low-rank adapters to train over the frozen base; ``null`` trains the whole model,
            ``auto`` what ``init_from`` holds, or `LoRAConfig`'s defaults without one.
        init_from: Start from these weights: a checkpoint of any stage, the folder of a run (for
            its newest one), or an adapter in PEFT's format, its directory or its Hub id. A
            ``lora`` that is given must agree with it. To resume a run of this stage use
            ``ckpt_path`` instead.
        dtype: Dtype of the base's weights. With LoRA ``bfloat16`` halves their memory. Adapters
            are always fp32; without LoRA the whole model trains, which needs ``float32``.
        quantize: Keep the frozen linear layers of the base in 4 bits (``nf4``, with double
            quantization) or 8 (``int8``), for adapters over them; needs the package bitsandbytes.
        residual: Dtype in which blocks add up: that of the ``weights``, or ``float32`` over weights
            in half precision, which leaves logits unrounded too; see `alignkit.models.residual`.
        random_init: Draw the base's weights at random from its config, reading none.
        resize_embeddings: Give embeddings and output head a row for each of the tokenizer's ids, or
            for a number of them, where they have fewer. New rows start as the mean of the others;
            with LoRA, ``modules_to_save`` has to name both for them to train.
        optimizer: A function from the trainable parameters to an optimizer.
        schedule: Shape of the learning rate after warm-up, a name of transformers'
            ``get_scheduler``; it advances every optimizer step.
        lora_plus_ratio: Learning rate of every B over that of A (LoRA+, arXiv:2402.12354).
        warmup_steps: Optimizer steps of linear warm-up; below 1, a fraction of all steps.
        dropout: Keep the base model's own dropout (GPT-2's 0.1). Off by default, because a
            preference loss compares two models and dropout adds noise to one of them.
        activation_checkpointing: Recompute each block's activations in the backward pass, which
            takes less memory and about a third more time.
        compile: `torch.compile` every block, which makes the first steps slow. Rows are padded to
            multiples of 64 tokens.
        packing: Many sequences share a forward pass, as one packed row. A model that cannot be
            scored so (recurrent layers, some alibi) runs one sequence at a time with ``auto``,
            after a line in the log, and is refused with ``require``.
        on_nonfinite: What to do before a step whose loss or gradient is NaN or infinite: ``stop``
            the run, or ``skip`` the step and count it. The schedule advances over a skipped step.

    Raises:
        AlignkitError: The base cannot be loaded or scored, or ``init_from`` does not fit it.
    """

    base: str
    base_identity: BaseIdentity
    lora: LoRAConfig | None
    optimizer: OptimizerCallable
    schedule: str
    warmup_steps: float
    lora_plus_ratio: float
    model: PreTrainedModel
    text_format: TextFormat | None = None
    """How text became tokens in training, if the data module or a checkpoint says so."""
    rewards = False
    """Whether the stage trains a reward model."""
    _settings: dict[str, Any] | None = None
    _resumed: dict[str, Any] | None = None
    _steps_before = 0

    def __init__(
        self,
        base: str,
        tokenizer: str | None = None,
        lora: LoRAConfig | Literal["auto"] | None = "auto",
        init_from: str | None = None,
        dtype: Literal["float32", "bfloat16"] = "float32",
        quantize: Quantization | None = None,
        residual: Residual = "weights",
        random_init: bool = False,
        resize_embeddings: bool | int = False,
        optimizer: OptimizerCallable = lambda params: AdamW(
            params, lr=2e-4, weight_decay=0.0, fused=True
        ),
        schedule: Literal["constant_with_warmup", "linear", "cosine"] = "linear",
        warmup_steps: float = 0.0,
        lora_plus_ratio: float = 1.0,
        dropout: bool = False,
        activation_checkpointing: bool = False,
        compile: bool = False,
        packing: Packing = "auto",
        on_nonfinite: OnNonFinite = "stop",
    ) -> None:
        super().__init__(on_nonfinite)
        check_rates(warmup_steps, lora_plus_ratio, lora)
        self._save_plain_hyperparameters()
        self.base = base
        self.optimizer = optimizer
        self.schedule = schedule
        self.warmup_steps = warmup_steps
        self.lora_plus_ratio = lora_plus_ratio
        rows = int(resize_embeddings)
        if resize_embeddings is True:
            rows = vocabulary_size(load_tokenizer(tokenizer or base))
        start = None
        if init_from is not None:
            init_from = self.hparams["init_from"] = find_checkpoint(init_from)
            start = find_start(init_from, self.rewards)
            self.text_format = start.text_format()
        # A checkpoint's hyper-parameters hold the config as plain values.
        choice = LoRAConfig.from_dict(lora) if isinstance(lora, Mapping) else lora
        with phase(f"loading {base}"):
            self.model, self.base_identity, self.lora = build_policy(
                base, choice, start, dtype=dtype, random_init=random_init, dropout=dropout,
                quantize=quantize, residual=residual, embeddings=rows,
            )  # fmt: skip
        self._keep_hyperparameter("lora", self.lora)  # what "auto" came to
        rows = embedding_size(self.model) if rows_before(self.model) is not None else False
        self._keep_hyperparameter("resize_embeddings", rows)
        if activation_checkpointing:
            checkpoint_activations(self.model)
        with phase(f"checking how {base} is scored"):
            check_engine(self.model, packing)
        self.dropout = dropout
        if not dropout:
            refuse_noise(self.model)
        self.compiles = compile
        if compile:
            compile_blocks(self.model)

    # Start ----------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Set up a run: how its checkpoints are written and read, and its text format."""
        super().setup(stage)
        seal_checkpoints(self.trainer)
        self.text_format = format_of_run(self.trainer, self.model, self.base, self.text_format)
        self._settings, self._steps_before = None, 0

    def on_before_batch_transfer(self, batch: PackedBatch, dataloader_idx: int) -> PackedBatch:
        """Refuse token ids beyond the model's embedding, while they are still on the CPU."""
        refuse_unknown_ids(self.model, batch.input_ids)
        refuse_probe(self, batch)
        return batch

    def on_fit_start(self) -> None:
        """Put the policy into training mode, since transformers loads models in eval mode.

        Lightning restores optimizer and schedule next.
        """
        super().on_fit_start()
        self.model.train()
        if self._resumed is not None and self._settings is not None:
            apply_settings(self._resumed, self.trainer, self._settings, self.hparams)
        self._resumed = None
        trainable = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        layers = adapter_layers(self.model).values()
        adapters = sum(p.numel() for layer in layers for p in layer.adapters.parameters())
        total = base_parameter_count(self.model) + adapters
        if self.trainer.is_global_zero:
            log.info(
                "%s: training %s of %s parameters (%.2f%%); %s",
                type(self).__name__, f"{trainable:,}", f"{total:,}", 100 * trainable / total,
                getattr(self.model, "lightened", "no norms or MLPs lightened"),
            )  # fmt: skip

    # Optimizer ------------------------------------------------------------------------------

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimizer over trainable parameters and its per-step schedule."""
        optimizer = make_optimizer(self.model, self.optimizer, self.lora_plus_ratio)
        total = total_steps(self.trainer, self._steps_before)
        schedule = make_schedule(optimizer, self.schedule, self.warmup_steps, total)
        self._settings = run_settings(self, optimizer, total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # Checkpoints ----------------------------------------------------------------------------

    def configure_callbacks(self) -> list[Callback]:
        """Return the callbacks that every run has, and reserve the run's folder."""
        super().configure_callbacks()
        claim_run_folder(self.trainer)
        added: list[Callback] = [Signals(), Dashboard(), Usage()]
        there = {type(c) for c in self.trainer.callbacks}  # type: ignore[attr-defined]
        return [each for each in added if type(each) not in there]

    @_restricted_classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Rebuild a module from a checkpoint, or from the newest intact one in a run's folder."""
        return super().load_from_checkpoint(verified(checkpoint_path), *args, **kwargs)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the stamp, the text format and the settings, and the last step's position.

        Raises:
            AlignkitError: A parameter or an optimizer state is not finite.
        """
        refuse_nonfinite(checkpoint, self.global_step)
        checkpoint[STAMP] = self.checkpoint_stamp()
        checkpoint[TEXT] = self.text_format and self.text_format.to_dict()
        checkpoint[SETTINGS] = self._settings
        super().on_save_checkpoint(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another class, base or adapter before anything is changed."""
        check_content(checkpoint, "ckpt_path")
        check_stamp(self.checkpoint_stamp(), self.base_identity, checkpoint[STAMP])
        self.text_format = format_of_checkpoint(self._trainer, checkpoint, self.text_format)
        if self._trainer is None or self.trainer.state.fn != TrainerFn.FITTING:
            tell_other_loss(checkpoint, self._trainer, self.hparams)
            return
        super().on_load_checkpoint(checkpoint)
        self._steps_before = checkpoint["global_step"]
        # Tuners restore their initial state when the optimizer exists; a resumed run has none yet.
        self._resumed = checkpoint if self._settings is None else None

    def checkpoint_stamp(self) -> dict[str, Any]:
        """Return the identity that a checkpoint and the module that resumes it must share."""
        return make_stamp(type(self), self.base, self.base_identity, self.model)

    # Inside ---------------------------------------------------------------------------------

    def _save_plain_hyperparameters(self) -> None:
        """Save the hyper-parameters as plain values, which load without unpickling."""
        self.save_hyperparameters(ignore=["optimizer"])
        for name, value in dict(self.hparams).items():
            self._keep_hyperparameter(name, value)

    def _keep_hyperparameter(self, name: str, value: Any) -> None:
        kept: MutableMapping[str, Any]
        for kept in (self.hparams, self._hparams_initial):  # type: ignore[assignment]
            # Adapter configurations and losses are kept as plain values.
            kept[name] = plain(value.to_dict() if hasattr(value, "to_dict") else value)


# Spawned ranks get the module by pickle, which finds a function by its name in its module.
default_optimizer = signature(AlignmentModule).parameters["optimizer"].default
default_optimizer.__qualname__ = "default_optimizer"
