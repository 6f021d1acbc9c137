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
# # 2. SFT: imitate good answers
#
# Supervised fine-tuning trains on the answer given its prompt. The prompt carries no loss. This
# notebook looks at one batch, trains, and compares answers before and after.

# %%
import os
from functools import partial
from pathlib import Path

from IPython.display import Image, Markdown
from lightning.pytorch import seed_everything
from torch.optim import AdamW

from alignkit import HHSFTDataModule, SFTModule
from alignkit.lora import LoRAConfig
from alignkit.models import load_tokenizer
from alignkit.tools.compare import compare
from alignkit.tools.curves import plot_curves
from alignkit.tools.demo.model import prepare_model
from alignkit.tools.demo.preferences import write_preferences
from alignkit.tools.demo.short_run import short_run

# Another model, or fewer steps, for those who want them.
RUNS = Path(os.environ.get("ALIGNKIT_RUNS", "runs"))
STEPS = int(os.environ.get("ALIGNKIT_STEPS", "10"))
base = os.environ.get("ALIGNKIT_BASE") or str(prepare_model(RUNS / "model"))

# %% [markdown]
# ## One batch
#
# The rows are dialogues in HH-RLHF's form. A batch lays several of them end to end in one row,
# without padding. Only the tokens of answers, the end of text among them, are scored.

# %%
seed_everything(0)
write_preferences(RUNS / "preferences")
data = HHSFTDataModule(base, str(RUNS / "preferences"), tokens_per_batch=512)
batch = next(iter(data.train_dataloader()))
tokenizer = load_tokenizer(base)
span = batch.spans[0]
print(f"{batch.num_examples} examples, {batch.num_tokens} tokens, {batch.num_scored} scored\n")
print("prompt:", repr(tokenizer.decode(batch.input_ids[: span.prompt])))
print("answer:", repr(tokenizer.decode(batch.target_ids[batch.response_index == 0])))

# %% [markdown]
# ## Train

# %%
# The rate is five times the default, since the steps are few.
optimizer = partial(AdamW, lr=1e-3)
lora = LoRAConfig(r=8, alpha=16, targets=("q_proj", "k_proj", "v_proj", "o_proj"))
# A few steps on the CPU, with two validations, checkpoints and TensorBoard's events.
train = partial(short_run, RUNS, STEPS)
run = train(SFTModule(base, lora=lora, optimizer=optimizer, warmup_steps=0.1), data, "sft")
plot_curves({"sft": run}, ["train/loss", "val/loss", "val/token_accuracy"], RUNS / "sft.png")
Image(RUNS / "sft.png")

# %% [markdown]
# ## Before and after
#
# These subjects are in no training example. Both are asked in the form of training.

# %%
questions = ["I'm new to frying rice. Why does it turn to mush?", "How do I keep bread fresh?"]
asked = {"temperature": 0.0, "max_new_tokens": 40, "prompt_format": "boundary"}
Markdown(compare({"base": base, "SFT": run}, prompts=questions, **asked).to_markdown())
