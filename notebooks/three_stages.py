# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A language model aligned in three stages
#
# SmolLM2-135M, a real model that the Python package index carries, learns to give helpful answers
# on a laptop CPU: LoRA on plain prose, SFT on good answers, DPO on good against evasive ones.
# Nothing is downloaded, and the whole takes a few minutes.

# %%
import warnings

# Progress bars look better with ipywidgets; nothing here needs it.
warnings.filterwarnings("ignore", message="(?s).*ipywidgets")

# %%
import os
from dataclasses import dataclass
from pathlib import Path

from IPython.display import Image, Markdown
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn

from alignkit import (
    DPOModule,
    HHPreferenceDataModule,
    HHSFTDataModule,
    LoRAModule,
    OpenWebTextDataModule,
    SFTModule,
)
from alignkit.lora import LoRAConfig
from alignkit.objectives.preference import DPO, PairScores, PreferenceLoss
from alignkit.tools.compare import compare
from alignkit.tools.curves import plot_curves
from alignkit.tools.demo.model import prepare_model
from alignkit.tools.demo.preferences import write_preferences
from alignkit.tools.demo.prose import write_prose
from alignkit.utils.products import faster_dtype

RUNS = Path(os.environ.get("ALIGNKIT_RUNS", "runs"))
STEPS = int(os.environ.get("ALIGNKIT_STEPS", "32"))

# %% [markdown]
# ## Model and data
#
# The model comes out of a wheel and is saved once as safetensors. The prose is what Python's own
# `help()` shows. The preference pairs are in HH-RLHF's format: a dialogue with a chosen and a
# rejected last answer.

# %%
base = str(prepare_model(RUNS / "model"))
write_prose(RUNS / "prose")
write_preferences(RUNS / "preferences")

pairs = HHPreferenceDataModule(base, str(RUNS / "preferences"), tokens_per_batch=1024)
print((RUNS / "preferences" / "train.jsonl").read_text().splitlines()[0])

# %% [markdown]
# A batch is one flat row without padding, and the two answers of a pair share their prompt.

# %%
batch = next(iter(pairs.train_dataloader()))
print(
    f"{batch.num_examples} pairs in a row of {batch.num_tokens} tokens, {batch.num_scored} scored"
)
batch.spans[0]

# %% [markdown]
# ## Three stages, one way to run them
#
# Each stage is a LightningModule with its LightningDataModule. `init_from` hands the adapter on to
# the next stage. On the command line the same is `alignkit fit --config configs/demo/lora.yaml`.

# %%
dtype = faster_dtype()
settings = {
    "lora": LoRAConfig(r=8, alpha=16, targets=("q_proj", "k_proj", "v_proj", "o_proj")),
    "dtype": dtype,
    "warmup_steps": 0.1,
}


def fit(module, data, name):
    """Train and return the checkpoint that the next stage starts from."""
    trainer = Trainer(
        accelerator="cpu",
        precision="bf16-mixed" if dtype == "bfloat16" else "32-true",
        max_steps=STEPS,
        val_check_interval=max(STEPS // 4, 1),
        check_val_every_n_epoch=None,
        log_every_n_steps=1,
        gradient_clip_val=1.0,
        logger=TensorBoardLogger(RUNS, name=name),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    trainer.save_checkpoint(RUNS / f"{name}.ckpt")
    return str(RUNS / f"{name}.ckpt")


seed_everything(0)

# %% [markdown]
# ### LoRA: language modelling on prose
#
# Rank 8 on the attention projections: 0.7 % of the parameters are trained.

# %%
prose = OpenWebTextDataModule(base, str(RUNS / "prose"), block_size=256, tokens_per_batch=1024)
lora = fit(LoRAModule(base, **settings), prose, "lora")

# %% [markdown]
# ### SFT: imitate the chosen answers
#
# The loss counts the answer's tokens alone, its EOS among them.

# %%
answers = HHSFTDataModule(base, str(RUNS / "preferences"), tokens_per_batch=1024)
sft = fit(SFTModule(base, init_from=lora, **settings), answers, "sft")

# %% [markdown]
# ### DPO: prefer them to the evasive ones
#
# The reference is a frozen copy of the policy, so training starts at ln 2 with rewards of zero.

# %%
dpo = fit(DPOModule(base, init_from=sft, loss=DPO(beta=0.1), **settings), pairs, "dpo")

# %% [markdown]
# ## The losses

# %%
runs = {name: RUNS / name for name in ("lora", "sft", "dpo")}
for name, run in runs.items():
    tags = ["train/loss", "val/loss"] + ["val/rewards/accuracies"] * (name == "dpo")
    plot_curves({name: run}, tags, RUNS / f"{name}.png")
Image(RUNS / "lora.png")

# %%
Image(RUNS / "sft.png")

# %%
Image(RUNS / "dpo.png")

# %% [markdown]
# ## The answers, before and after DPO
#
# These subjects are in no training pair.

# %%
questions = [
    "I'm new to frying rice. Why does it turn to mush?",
    "I have a quick question about visiting Iceland. How many days for the ring road?",
    "Could you help me with jump-starting a car? How far must I drive afterwards?",
]
asked = {"temperature": 0.0, "repetition_penalty": 1.1, "max_new_tokens": 64, "dtype": dtype}
comparison = compare({"SFT": sft, "DPO": dpo}, prompts=questions, **asked)
Markdown(comparison.to_markdown())

# %% [markdown]
# ## An objective of your own
#
# A new preference loss is a frozen dataclass: its fields are its parameters, and a call maps B
# pairs to one loss a pair. Here is a hinge on the reward margin (SLiC, arXiv:2305.10425, with
# DPO's rewards). On the command line it is picked by its class path:
# `--model.loss my_package.MyHinge --model.loss.width 0.5`.


# %%
@dataclass(frozen=True)
class MyHinge(PreferenceLoss):
    """DPO's rewards under a hinge: a pair ranked right by a margin of `width` costs nothing."""

    beta: float = 0.1
    width: float = 1.0

    def __call__(self, policy: PairScores, reference: PairScores) -> Tensor:
        """Return max(0, width - (chosen reward - rejected reward)), [B]."""
        return nn.functional.relu(self.width - self.margin(policy, reference))


hinge = fit(DPOModule(base, init_from=sft, loss=MyHinge(), **settings), pairs, "hinge")
