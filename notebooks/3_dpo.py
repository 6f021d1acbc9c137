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
# # 3. DPO: prefer one answer to another
#
# Direct preference optimisation (arXiv:2305.18290) raises the likelihood of a chosen answer over a
# rejected one, measured against a frozen reference. The reference is the model that training starts
# from, so the first loss is ln 2 and the first rewards are zero.

# %%
import html
import os
from functools import partial
from pathlib import Path

import torch
from IPython.display import HTML, Image, Markdown
from lightning.pytorch import seed_everything
from torch.optim import AdamW

from alignkit import DPOModule, HHPreferenceDataModule, HHSFTDataModule, SFTModule
from alignkit.engine import score
from alignkit.lora import LoRAConfig
from alignkit.models.checkpoint import load_policy
from alignkit.objectives.preference import DPO
from alignkit.tools.compare import compare
from alignkit.tools.curves import plot_curves, read_scalars
from alignkit.tools.demo.model import prepare_model
from alignkit.tools.demo.preferences import write_preferences
from alignkit.tools.demo.short_run import short_run

# Another model, or fewer steps, for those who want them.
RUNS = Path(os.environ.get("ALIGNKIT_RUNS", "runs"))
STEPS = int(os.environ.get("ALIGNKIT_STEPS", "8"))
base = os.environ.get("ALIGNKIT_BASE") or str(prepare_model(RUNS / "model"))

# %%
seed_everything(0)
write_preferences(RUNS / "preferences")
# The rate is five times the default, since the steps are few.
optimizer = partial(AdamW, lr=1e-3)
lora = LoRAConfig(r=8, alpha=16, targets=("q_proj", "k_proj", "v_proj", "o_proj"))
# A few steps on the CPU, with two validations, checkpoints and TensorBoard's events.
train = partial(short_run, RUNS, STEPS)
# %% [markdown]
# ## SFT, then DPO from its adapter

# %%
answers = HHSFTDataModule(base, str(RUNS / "preferences"), tokens_per_batch=512)
sft = train(
    SFTModule(base, lora=lora, optimizer=optimizer, warmup_steps=0.1), answers, "sft_before_dpo"
)

# %%
pairs = HHPreferenceDataModule(base, str(RUNS / "preferences"), tokens_per_batch=512)
dpo = train(
    DPOModule(base, init_from=sft, loss=DPO(beta=0.1), optimizer=optimizer, warmup_steps=0.1),
    pairs,
    "dpo",
)
first = read_scalars(dpo)["train/loss"][0][1]
print(f"first loss: {first:.4f}; ln 2 is {torch.tensor(2.0).log():.4f}")

# %%
tags = ["train/loss", "val/loss", "val/rewards/margins", "val/rewards/accuracies"]
plot_curves({"dpo": dpo}, tags, RUNS / "dpo.png")
Image(RUNS / "dpo.png")

# %% [markdown]
# ## The answers of both

# %%
questions = ["I'm new to frying rice. Why does it turn to mush?", "How do I keep bread fresh?"]
asked = {"temperature": 0.0, "max_new_tokens": 40}
Markdown(compare({"SFT": sft, "DPO": dpo}, prompts=questions, **asked).to_markdown())

# %% [markdown]
# ## Where DPO moved the model
#
# `score` gives the log-probability of every token of an answer. Its change from SFT to DPO says
# which tokens DPO made likelier (green) and which it made less likely (red). The deepest colours
# are the largest changes of this batch.

# %%
batch = next(iter(pairs.val_dataloader()))
batch = batch.take(range(min(3, batch.num_examples)))
with torch.no_grad():
    before = score(load_policy(sft)[0], batch)
    policy, tokenizer = load_policy(dpo)
    moved = score(policy, batch) - before


def colored(ids, changes, scale):
    """Put each token on a background of its change."""
    spans = []
    for token, change in zip(ids.tolist(), changes.tolist(), strict=True):
        color = "46, 160, 67" if change > 0 else "218, 54, 51"
        text = html.escape(tokenizer.decode([token])).replace("\n", "⏎")
        style = f"background: rgba({color}, {min(abs(change) / scale, 1):.2f})"
        spans.append(f'<span style="{style}" title="{change:+.2f}">{text}</span>')
    return "".join(spans)


scale = moved.abs().max().item() or 1.0
rows = []
for number in range(batch.num_responses):
    here = batch.response_index == number
    kind = ("chosen", "rejected")[number % 2]
    text = colored(batch.target_ids[here], moved[here], scale)
    rows.append(f"<p><b>{kind}</b> {moved[here].sum():+.2f} nats: {text}</p>")
HTML("".join(rows))
