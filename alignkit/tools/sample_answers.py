"""Log a model's answers to a fixed set of prompts while it is trained."""

from __future__ import annotations

import logging
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy

from alignkit.errors import AlignkitError
from alignkit.models.load import load_tokenizer
from alignkit.modules import AlignmentModule
from alignkit.tools.generate.answer import Answer
from alignkit.tools.generate.asking import choose_format
from alignkit.tools.generate.gauges import Gauges
from alignkit.tools.generate.prompts import Question, gather_prompts, shown
from alignkit.tools.generate.request import answer_questions
from alignkit.tools.generate.sampling import Sampling
from alignkit.tools.markdown import markdown_table

log = logging.getLogger(__name__)


class SampleAnswers(Callback):
    """Ask the policy the same prompts at every validation, or every few steps, and log its answers.

    Answers go to TensorBoard's TEXT page as ``samples``, and to loggers that have ``log_text``,
    such as Weights & Biases. ``samples/repetition``, ``samples/run_on``, ``samples/ended``,
    ``samples/empty`` and ``samples/tokens`` go to every logger; see `Gauges`. Prompts are formatted
    as in training. Rank 0 answers while the others wait. Training takes the same steps with this
    callback as without it.

    Example:
        >>> SampleAnswers(prompts=["How do I boil an egg?"], every_n_steps=50).every_n_steps
        50

    Args:
        prompts: The prompts.
        prompts_file: More prompts: a .jsonl file of {"prompt": ...} rows, or one a line.
        data: A data set whose prompts are asked, those of its test split if it has one.
        limit: Ask only the first prompts, this many.
        every_n_steps: Ask after so many optimizer steps; by default at every validation.
        max_new_tokens: The largest number of tokens of an answer.
        temperature: Divides the logits; 0, the default, takes the likeliest token.
        seed: Of the draws; the same noise each time.
        batch_size: Prompts computed side by side.

    Raises:
        AlignkitError: There is no prompt, or a number out of its range.
    """

    def __init__(
        self,
        prompts: list[str] | None = None,
        prompts_file: str | None = None,
        data: str | None = None,
        limit: int = 16,
        every_n_steps: int | None = None,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        seed: int = 0,
        batch_size: int = 8,
    ) -> None:
        for name, value in (("limit", limit), ("every_n_steps", every_n_steps or 1)):
            if value < 1:
                raise AlignkitError(f"SampleAnswers: {name} must be 1 or more, got {value}")
        self.questions: list[Question] = gather_prompts(prompts, prompts_file, data)[:limit]
        self.every_n_steps = every_n_steps
        self.batch_size = batch_size
        self._sampling = Sampling(
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            repetition_penalty=1.0,
            seed=seed,
        )
        self._asked_at = -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse modules and strategies under which rank 0 cannot answer alone.

        Raises:
            AlignkitError: The model is sharded, or the module is not one of alignkit's.
        """
        if not isinstance(pl_module, AlignmentModule):
            raise AlignkitError("SampleAnswers: asks an AlignmentModule; take it out of callbacks")
        if isinstance(trainer.strategy, ModelParallelStrategy):
            raise AlignkitError(
                "SampleAnswers: rank 0 holds only a part of a sharded model; take it out of "
                "trainer.callbacks, or use trainer.strategy ddp"
            )

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Ask after an optimizer step, if its number is due."""
        every = self.every_n_steps
        due = every is not None and trainer.global_step % every == 0
        if due and not trainer.fit_loop._should_accumulate():
            self._ask(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask at a validation of a fit, unless steps are counted."""
        if self.every_n_steps is None and not trainer.sanity_checking:
            self._ask(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask the model that came out."""
        self._ask(trainer, pl_module)

    def _ask(self, trainer: Trainer, module: LightningModule) -> None:
        step = trainer.global_step
        if not trainer.is_global_zero or trainer.state.fn != "fit" or self._asked_at == step:
            return
        self._asked_at = step
        assert isinstance(module, AlignmentModule)
        tokenizer = load_tokenizer(module.hparams["tokenizer"] or module.base)
        asked = choose_format(module.text_format, tokenizer, name="SampleAnswers")
        heard: list[Answer] = []
        with trainer.precision_plugin.forward_context():
            for _ in answer_questions(
                module.model,
                tokenizer,
                self.questions,
                self._sampling,
                asked,
                name="SampleAnswers",
                batch_size=self.batch_size,
                heard=heard.append,
            ):
                pass
        gauges = {f"samples/{name}": value for name, value in Gauges.of(heard)._asdict().items()}
        rows = [[shown(q), a.text] for q, a in zip(self.questions, heard, strict=True)]
        table = markdown_table(["Prompt", "Answer"], [[q, a or "(empty)"] for q, a in rows])
        for logger in trainer.loggers:
            logger.log_metrics(gauges, step)
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("samples", table, step)
            elif (log_text := getattr(logger, "log_text", None)) is not None:
                log_text("samples", columns=["prompt", "answer"], data=rows, step=step)
        module.window.restart_clock()
