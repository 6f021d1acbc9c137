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
# # 5. Your own data
#
# alignkit knows a row's shape by its columns. This notebook writes a file as someone might have it,
# looks for defects before training, maps other column names, and trains.

# %%
import json
import os
from pathlib import Path

from lightning.pytorch import Trainer, seed_everything

from alignkit import DPOModule, PreferenceDataModule
from alignkit.errors import AlignkitError
from alignkit.lora import LoRAConfig
from alignkit.models import load_tokenizer
from alignkit.tools.demo.model import prepare_model

# Another model, or fewer steps, for those who want them.
RUNS = Path(os.environ.get("ALIGNKIT_RUNS", "runs"))
STEPS = int(os.environ.get("ALIGNKIT_STEPS", "4"))
base = os.environ.get("ALIGNKIT_BASE") or str(prepare_model(RUNS / "model"))

# %% [markdown]
# ## A file with two defects
#
# Each row has a question and two answers, the better one first. One row has the same answer
# twice, one has an empty answer.

# %%
subjects = ["bread", "tea", "rice", "wool", "iron", "glass", "paper", "salt", "sand", "rain"]
rows = [
    {
        "query": f"What is {subject} good for?",
        "better": f"{subject.title()} has many uses; tell me yours and I can be precise.",
        "worse": "No idea.",
    }
    for subject in subjects
]
rows[3]["worse"] = rows[3]["better"]
rows[7]["better"] = ""
RUNS.mkdir(parents=True, exist_ok=True)
mine = RUNS / "mine.jsonl"
_ = mine.write_text("".join(json.dumps(row) + "\n" for row in rows))

# %% [markdown]
# ## Unknown columns are refused, not guessed
#
# The error names the nearest shape and the columns that it lacks.

# %%
try:
    PreferenceDataModule(base, str(mine)).train_dataloader()
except AlignkitError as error:
    print(error)

# %% [markdown]
# `columns` says which of your columns stands for which name. Rows with a defect are dropped or
# kept by a policy for each kind, and counted; nothing goes silently.

# %%
columns = {"prompt": "query", "chosen": "better", "rejected": "worse"}
data = PreferenceDataModule(
    base, str(mine), columns=columns, tokens_per_batch=512, val_fraction=0.2
)
data.setup()
{name: value for name, value in data.stats.items() if value}

# %% [markdown]
# On the command line the same is `alignkit audit mine.jsonl --columns …`, which lists row numbers
# and can write a page with `--html`.
#
# ## What the model will see

# %%
batch = next(iter(data.train_dataloader()))
tokenizer = load_tokenizer(base)
for token in ("prompt", "answers"):
    span = batch.spans[0]
    part = slice(0, span.prompt) if token == "prompt" else slice(span.prompt, span.end)
    print(f"{token}: {tokenizer.decode(batch.input_ids[part])!r}")

# %% [markdown]
# ## Train

# %%
seed_everything(0)
module = DPOModule(base, lora=LoRAConfig(r=4), warmup_steps=0)
trainer = Trainer(
    accelerator="cpu",
    max_steps=STEPS,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(module, data)
{name: round(value.item(), 3) for name, value in trainer.callback_metrics.items() if "loss" in name}
