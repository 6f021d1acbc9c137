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
# # 4. A new objective
#
# A preference loss is a frozen dataclass: its fields are its parameters, and a call maps the
# scores of B pairs to B losses. This notebook writes one, checks it by hand, trains it beside
# DPO, and says how the command line finds it.

# %%
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from IPython.display import Image
from lightning.pytorch import seed_everything
from torch.nn.functional import relu

from alignkit import DPOModule, HHPreferenceDataModule
from alignkit.lora import LoRAConfig
from alignkit.objectives.preference import DPO, PairScores, PreferenceLoss
from alignkit.tools.curves import plot_curves
from alignkit.tools.demo.model import prepare_model
from alignkit.tools.demo.preferences import write_preferences
from alignkit.tools.demo.short_run import short_run

# Another model, or fewer steps, for those who want them.
RUNS = Path(os.environ.get("ALIGNKIT_RUNS", "runs"))
STEPS = int(os.environ.get("ALIGNKIT_STEPS", "8"))
base = os.environ.get("ALIGNKIT_BASE") or str(prepare_model(RUNS / "model"))

# %% [markdown]
# ## The loss
#
# This is a hinge on DPO's reward margin: a pair that is ranked right by `width` costs nothing
# (SLiC, arXiv:2305.10425, with DPO's rewards).


# %%
@dataclass(frozen=True)
class Hinge(PreferenceLoss):
    """max(0, width − β (margin of the policy − margin of the reference))."""

    beta: float = 0.1
    width: float = 1.0

    def __call__(self, policy, reference):
        """Return one loss a pair, [B]."""
        policy_margin = policy.chosen - policy.rejected
        reference_margin = reference.chosen - reference.rejected
        return relu(self.width - self.beta * (policy_margin - reference_margin))


# %% [markdown]
# ## By hand
#
# Two pairs. The policy's margin is 5 and 0, the reference's 3 and 0, so with β = 0.5 the rewards
# differ by 1 and 0, and the losses are 0 and 1.

# %%
lengths = torch.tensor([4, 4])
policy = PairScores(torch.tensor([-4.0, -6.0]), torch.tensor([-9.0, -6.0]), lengths, lengths)
reference = PairScores(torch.tensor([-5.0, -6.0]), torch.tensor([-8.0, -6.0]), lengths, lengths)
loss = Hinge(beta=0.5)(policy, reference)
assert loss.tolist() == [0.0, 1.0]
print(loss)

# %% [markdown]
# ## Beside DPO
#
# The hinge stops at its width, where DPO goes on.
#
# The module takes any loss. A loss that reads no reference says `uses_reference = False`, and
# none is kept.

# %%
write_preferences(RUNS / "preferences")
lora = LoRAConfig(r=8, alpha=16, targets=("q_proj", "k_proj", "v_proj", "o_proj"))
pairs = HHPreferenceDataModule(base, str(RUNS / "preferences"), tokens_per_batch=512)
# A few steps on the CPU, with two validations, checkpoints and TensorBoard's events.
train = partial(short_run, RUNS, STEPS)
runs = {}
for objective in (DPO(beta=0.1), Hinge(beta=0.1, width=0.05)):
    seed_everything(0)
    name = type(objective).__name__.lower()
    runs[name] = train(DPOModule(base, lora=lora, loss=objective, warmup_steps=0.1), pairs, name)
plot_curves(runs, ["train/rewards/margins", "val/rewards/margins"], RUNS / "objectives.png")
Image(RUNS / "objectives.png")

# %% [markdown]
# ## On the command line
#
# Save the class as `mine.py` in the working folder. The field becomes an option:
#
# ```sh
# alignkit fit --config dpo.yaml --model.loss mine.Hinge --model.loss.width 0.5
# ```
#
# `docs/extend.md` shows other metrics, objectives beyond pairs, and new shapes of rows.
