"""Apply the settings of a resumed run to its checkpoint, where the two differ.

PyTorch restores an optimizer with the learning rate, weight decay and betas it was saved with, and
a schedule one step late. Here only moments and counters are restored, and every setting comes from
the run that resumes, from its first step on. One line lists the settings that changed, and a state
that does not fit them is refused.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from alignkit.errors import AlignkitError
from alignkit.utils.plain import plain

KEY = "settings"
# Paths, and ways to compute: neither changes what is trained.
_WITHOUT_EFFECT = frozenset(
    {"base", "tokenizer", "init_from", "random_init", "reference", "reference_cache",
     "reference_checks", "activation_checkpointing", "compile", "packing"}
)  # fmt: skip
# Entries of an optimizer's groups that are no settings of the optimizer.
_NOT_SETTINGS = frozenset({"params", "param_names", "initial_lr", "swa_lr"})
log = logging.getLogger(__name__)


def run_settings(
    module: LightningModule, optimizer: Optimizer, total: int | None
) -> dict[str, Any]:
    """Return the settings of a run that its checkpoints keep, to compare a resumed run with.

    Args:
        module: The module, with its trainer.
        optimizer: Its optimizer.
        total: The run's number of steps, see `alignkit.modules.optimize.total_steps`.

    Returns:
        Plain values: the optimizer's class, its options, the names of its parameters group by
        group, and the trainer's settings that change what a step does.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    trainer = module.trainer
    return {
        "optimizer": f"{type(optimizer).__module__}.{type(optimizer).__qualname__}",
        "options": _group_options(optimizer.param_groups[0]),
        "parameters": [[names[id(p)] for p in g["params"]] for g in optimizer.param_groups],
        "run": {"total steps": total},
        "seed": os.environ.get("PL_GLOBAL_SEED"),  # where Lightning keeps seed_everything
        "trainer": plain(
            {
                "max_steps": trainer.max_steps,
                "max_epochs": trainer.max_epochs,
                "accumulate_grad_batches": trainer.accumulate_grad_batches,
                "gradient_clip_val": trainer.gradient_clip_val,
                "gradient_clip_algorithm": trainer.gradient_clip_algorithm,
                "precision": str(trainer.precision),
                "world_size": trainer.world_size,
            }
        ),
    }


def apply_settings(
    checkpoint: MutableMapping[str, Any], trainer: Trainer, now: Mapping[str, Any], hparams: Any
) -> None:
    """Put this run's settings into a loaded checkpoint, before Lightning restores from it.

    Args:
        checkpoint: The checkpoint, as loaded; changed in place.
        trainer: The trainer, with its optimizer and schedule made and not yet restored.
        now: `run_settings` of this run.
        hparams: This run's hyper-parameters.

    Raises:
        AlignkitError: The checkpoint holds weights alone, more steps than are asked for, another
            seed, another optimizer, or one whose state does not fit these settings.
    """
    if not checkpoint.get("optimizer_states") or "lr_schedulers" not in checkpoint:
        raise AlignkitError(
            "ckpt_path: holds weights alone (save_weights_only), so there is no run to resume; "
            "pass it as model.init_from"
        )
    taken = checkpoint["global_step"]
    if 0 <= trainer.max_steps < taken:  # Lightning would end at once, and call it done
        raise AlignkitError(
            f"ckpt_path: has taken {taken} steps, more than trainer.max_steps={trainer.max_steps}; "
            "raise that, or resume from an earlier checkpoint"
        )
    optimizer = trainer.optimizers[0]
    saved = checkpoint["optimizer_states"][0]
    before = checkpoint.get(KEY) or {}
    _refuse_other_seed(before.get("seed"), now["seed"])
    _refuse_other_optimizer(optimizer, saved, before, now)
    changes = [
        *_changes("model.optimizer.", _saved_options(saved, before), now["options"]),
        *_changes("model.", checkpoint.get("hyper_parameters", {}), hparams, _WITHOUT_EFFECT),
        *_changes("trainer.", before.get("trainer", {}), now["trainer"]),
        *_changes("", before.get("run", {}), now["run"]),
    ]
    checkpoint["optimizer_states"] = [_matching_state(optimizer, saved, before, now)]
    if trainer.lr_scheduler_configs:
        _replace_schedule(checkpoint, trainer)
    else:
        _keep_averager_rates(
            checkpoint["optimizer_states"][0]["param_groups"], saved["param_groups"]
        )
    if changes and trainer.is_global_zero:
        log.info("resuming with changed settings: %s", "; ".join(changes))


def tell_other_loss(
    checkpoint: Mapping[str, Any], trainer: Trainer | None, hparams: Mapping[str, Any]
) -> None:
    """Log how the loss that a checkpoint is measured by differs from the one it was trained by.

    Args:
        checkpoint: The checkpoint, as loaded.
        trainer: The trainer; ``None`` where nothing is measured.
        hparams: The hyper-parameters of the module that measures.
    """
    own = {name: value for name, value in hparams.items() if name == "loss"}
    changes = _changes("model.", checkpoint.get("hyper_parameters", {}), own)
    if changes and trainer is not None and trainer.is_global_zero:
        log.info("measuring with changed settings: %s", "; ".join(changes))


def _group_options(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return an optimizer group's settings as plain values, with the rate before the schedule."""
    options = {name: _plain(v) for name, v in group.items() if name not in _NOT_SETTINGS}
    return {**options, "lr": _plain(group.get("initial_lr", group["lr"]))}


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    value = plain(value)
    return value if isinstance(value, (int, float, str, bool, type(None))) else str(value)


def _saved_options(saved: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """Return the optimizer options of a checkpoint, also of one that an older alignkit wrote."""
    options: dict[str, Any] | None = before.get("options")
    return options or _group_options(saved["param_groups"][0])


def _changes(
    prefix: str, old: Mapping[str, Any], new: Mapping[str, Any], but: frozenset[str] = frozenset()
) -> list[str]:
    """Return a text for each setting that both mappings hold with different values."""
    told = []
    for name in (name for name in new if name in old and name not in but):
        was, value = old[name], new[name]
        if isinstance(was, Mapping) and isinstance(value, Mapping):
            # Named as on the command line, without `init_args`.
            told += _changes(prefix if name == "init_args" else f"{prefix}{name}.", was, value)
        elif _plain(was) != _plain(value):
            told.append(f"{prefix}{name} {_plain(was)} -> {_plain(value)}")
    return told


def _refuse_other_seed(before: str | None, now: str | None) -> None:
    """Refuse another seed, which would change nothing: the random state is the checkpoint's."""
    if None not in (before, now) and before != now:
        raise AlignkitError(
            f"ckpt_path: its run was seeded with {before} and goes on with its random state, so "
            f"seed_everything={now} would change nothing; resume with seed_everything={before}, "
            "or start from its weights with model.init_from"
        )


def _refuse_other_optimizer(
    optimizer: Optimizer,
    saved: Mapping[str, Any],
    before: Mapping[str, Any],
    now: Mapping[str, Any],
) -> None:
    """Refuse an optimizer of another class, or one whose state the checkpoint lacks."""
    own = now["optimizer"]
    theirs = before.get("optimizer")
    saved_names = set(_group_options(saved["param_groups"][0]))
    if theirs is None and not saved_names & set(now["options"]) - {
        "lr", "weight_decay", "maximize", "foreach", "differentiable", "fused",
    }:  # fmt: skip
        theirs = "another optimizer"
    if theirs not in (None, own):
        short = [name.rpartition(".")[2] for name in (theirs, own)]
        a, b = short if short[0] != short[1] else (theirs, own)
        raise AlignkitError(
            f"ckpt_path: holds the state of {a}, which {b} cannot go on with; resume with "
            f"model.optimizer={a}, or start from its weights with model.init_from"
        )
    kept = {name for state in saved["state"].values() for name in state}
    missing = _state_names(optimizer) - kept
    if kept and missing:
        changes = _changes("model.optimizer.", _saved_options(saved, before), now["options"])
        raise AlignkitError(
            f"ckpt_path: its {own.rpartition('.')[2]} has no {', '.join(sorted(missing))}, which "
            f"these settings need ({'; '.join(changes)}); resume with those it was trained with"
        )


def _state_names(optimizer: Optimizer) -> set[str]:
    """Return the names of an optimizer's state under its settings, by taking a tiny step."""
    options = {k: v for k, v in optimizer.param_groups[0].items() if k not in _NOT_SETTINGS}
    parameter = nn.Parameter(torch.ones(2, 2))
    parameter.grad = torch.ones(2, 2)
    try:
        twin = type(optimizer)([{**options, "params": [parameter]}])  # type: ignore[call-arg]
        twin.step()
    except Exception:  # an optimizer that needs more than parameters fails later by itself
        return set()
    return {name for name, value in twin.state[parameter].items() if value is not None}


def _matching_state(
    optimizer: Optimizer,
    saved: Mapping[str, Any],
    before: Mapping[str, Any],
    now: Mapping[str, Any],
) -> dict[str, Any]:
    """Return an optimizer state with the saved moments and this run's groups and settings."""
    fresh = optimizer.state_dict()
    old_names: Sequence[Sequence[str]] | None = before.get("parameters")
    old = [number for group in saved["param_groups"] for number in group["params"]]
    new = [number for group in fresh["param_groups"] for number in group["params"]]
    if old_names is None or old_names == now["parameters"]:
        if [len(g["params"]) for g in saved["param_groups"]] != [
            len(g["params"]) for g in fresh["param_groups"]
        ]:
            raise AlignkitError(
                "ckpt_path: its optimizer has other groups of parameters, and its checkpoint does "
                "not say which is which; resume with the model.lora_plus_ratio it was trained with"
            )
        number_of = dict(zip(new, old, strict=True))
    else:
        by_name = dict(zip((n for group in old_names for n in group), old, strict=True))
        names = [name for group in now["parameters"] for name in group]
        number_of = {
            n: by_name[name] for n, name in zip(new, names, strict=True) if name in by_name
        }
    state = saved["state"]
    return {
        "state": {n: state[m] for n, m in number_of.items() if m in state},
        "param_groups": fresh["param_groups"],
    }


def _keep_averager_rates(
    groups: Sequence[MutableMapping[str, Any]], saved: Sequence[Mapping[str, Any]]
) -> None:
    """Keep the saved learning rates, which an averager's own schedule has set.

    Lightning's SWA removes the run's schedule before the run is resumed.
    """
    for group, before in zip(groups, saved, strict=False):
        group.update({k: before[k] for k in ("lr", "initial_lr", "swa_lr") if k in before})


def _replace_schedule(checkpoint: MutableMapping[str, Any], trainer: Trainer) -> None:
    """Replace the saved schedule by this run's, at the saved step, and set its learning rates."""
    configs, states = trainer.lr_scheduler_configs, checkpoint["lr_schedulers"]
    if len(configs) != 1 or len(states) != 1:
        return
    schedule, state = configs[0].scheduler, states[0]
    if not isinstance(schedule, LambdaLR) or "lr_lambdas" not in state:
        return
    step = state["last_epoch"]
    values = [
        base * course(step)
        for base, course in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    for group, value in zip(checkpoint["optimizer_states"][0]["param_groups"], values, strict=True):
        group["lr"] = value
    own = schedule.state_dict()
    counters = {name: state[name] for name in ("last_epoch", "_step_count") if name in state}
    checkpoint["lr_schedulers"] = [{**own, **counters, "_last_lr": values}]
