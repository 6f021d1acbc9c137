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
# # 1. LoRA: train 0.7 % of a model
#
# LoRA keeps the model's weights and adds to each adapted layer the product of two thin matrices,
# `y = x W + (α/r) x A B`. Only A and B are trained. This notebook measures what that saves, and
# draws the curve of a short training on prose.

# %%
import os
from functools import partial
from pathlib import Path

from IPython.display import Image, Markdown
from lightning.pytorch import seed_everything

from alignkit import LoRAModule, TextDataModule
from alignkit.lora import LoRAConfig
from alignkit.tools.curves import plot_curves, read_scalars
from alignkit.tools.demo.model import prepare_model
from alignkit.tools.demo.prose import write_prose
from alignkit.tools.demo.short_run import short_run
from alignkit.tools.profile.command import profile

# Another model, or fewer steps, for those who want them.
RUNS = Path(os.environ.get("ALIGNKIT_RUNS", "runs"))
STEPS = int(os.environ.get("ALIGNKIT_STEPS", "8"))
base = os.environ.get("ALIGNKIT_BASE") or str(prepare_model(RUNS / "model"))

# %% [markdown]
# ## The table
#
# `profile` trains the whole model and then the adapter, each in a process of its own, and takes the
# median of a few steps, here on two CPU cores. `alignkit profile` is the same on the command line.

# %%
lora = LoRAConfig(r=8, alpha=16, targets=("q_proj", "k_proj", "v_proj", "o_proj"))
measured = profile(
    base, lora=lora, precision="32-true", tokens=64, rows=1, steps=2, rounds=1, device="cpu"
)
Markdown(measured.to_markdown())

# %% [markdown]
# ## The curve
#
# The text is what Python's own `help()` shows. A batch is one row of 384 tokens, and every token is
# predicted from those before it.

# %%
seed_everything(0)
write_prose(RUNS / "prose")
prose = TextDataModule(base, str(RUNS / "prose"), block_size=128, tokens_per_batch=384)
module = LoRAModule(base, lora=lora, warmup_steps=0.1)
share = sum(p.numel() for p in module.parameters() if p.requires_grad)
print(f"{share:,} of {sum(p.numel() for p in module.parameters()):,} parameters are trained")
# A few steps on the CPU, with two validations, checkpoints and TensorBoard's events.
train = partial(short_run, RUNS, STEPS)
run = train(module, prose, "lora")

# %%
plot_curves({"lora": run}, ["train/loss", "val/loss", "val/perplexity"], RUNS / "lora.png")
Image(RUNS / "lora.png")

# %%
held_out = read_scalars(run)["val/loss"]
print("held-out loss by step:", {step: round(loss, 3) for step, loss in held_out})
