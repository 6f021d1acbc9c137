"""Check and end the processes of a command that trains on several devices."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import time
from subprocess import Popen
from typing import Any

from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import (
    ModelParallelStrategy,
    Strategy,
    StrategyRegistry,
)

from alignkit.errors import AlignkitError
from alignkit.modules.strategy import USABLE, refuse_strategy
from alignkit.utils.ranks import is_lost_connection

_WAIT_SECONDS = 10.0  # for a failed process to report why
_ALWAYS_ALLOWED = 8  # processes on a CPU of any number of cores, to try things out
# Variables in which launchers unknown to Lightning give the number of processes.
_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "JSM_NAMESPACE_SIZE")


class RankFailed(Exception):
    """Report that another process of the run has failed, after it has printed why.

    Args:
        status: Its exit status, which this process ends with too.
    """

    def __init__(self, status: int) -> None:
        super().__init__(f"a process of this run ended with status {status}")
        self.status = status


def keep_relaunchable() -> None:
    """Let Lightning find this command again when it starts the other ranks.

    Lightning runs ``python -m`` with the main module, or ``python`` with the script in
    ``sys.argv[0]``. If neither exists (``python -c``, an archive, the ``.exe`` that pip makes on
    Windows), it runs ``python -m alignkit``, which is the same command.
    """
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if (spec is None and not os.path.isfile(sys.argv[0])) or (spec and spec.name == "__main__"):
        main.__spec__ = importlib.util.find_spec("alignkit.__main__")


def check_strategy(strategy: Any) -> None:
    """Refuse a strategy that shards parameters, or that cannot start this command.

    Args:
        strategy: ``trainer.strategy`` as it was parsed: a name, or a class path and its arguments.

    Raises:
        AlignkitError: The strategy is not one of those that train correctly.
    """
    if strategy == "auto":
        return
    name = strategy if isinstance(strategy, str) else strategy["class_path"]
    kind, options = _strategy_class(name)
    if not isinstance(strategy, str):
        options = {**options, **(strategy.get("init_args") or {})}
        options.update(strategy.get("dict_kwargs") or {})
    if kind is None:
        raise AlignkitError(f"trainer.strategy={name}: no such strategy; use {USABLE}")
    refuse_strategy(kind, name)
    if options.get("start_method", "popen") not in ("popen", "fork"):
        raise AlignkitError(
            f"trainer.strategy={name}: a command cannot be handed to spawned processes; use "
            f"{USABLE}"
        )


def shards_blocks(strategy: Any) -> bool:
    """Tell whether a strategy, as it was parsed, divides a model's blocks among processes."""
    name = strategy if isinstance(strategy, str) else strategy["class_path"]
    kind, _ = _strategy_class(name)
    return kind is not None and issubclass(kind, ModelParallelStrategy)


def check_processes(trainer: Trainer) -> None:
    """Refuse a run whose launcher started more or fewer processes than the trainer expects.

    Each of two processes with ``devices=1`` would train the whole run by itself, and overwrite the
    other's files.

    Raises:
        AlignkitError: The numbers differ; several machines have no common address; or there are
            far more processes than the CPU has cores.
    """
    total = trainer.num_devices * trainer.num_nodes
    environment: ClusterEnvironment = trainer._accelerator_connector.cluster_environment
    expected, advice = total, "start one process for each device"
    if not isinstance(environment, LightningEnvironment):
        started, told_by = environment.world_size(), type(environment).__name__
        if isinstance(environment, SLURMEnvironment):
            advice += " with srun, or, without srun, set SLURM_JOB_NAME=interactive"
    elif environment.creates_processes_externally:
        rank = environment.local_rank()
        started, told_by = int(os.environ.get("WORLD_SIZE") or total), "WORLD_SIZE"
        if rank >= trainer.num_devices:
            started, told_by = max(started, rank + 1), f"LOCAL_RANK={rank}"
    else:
        # Lightning starts the other processes of a machine, so one on each machine is right.
        expected = trainer.num_nodes
        started, told_by = _external_processes(total) or (expected, "")
        _check_rendezvous(trainer.num_nodes, environment.node_rank())
    if started != expected:
        raise AlignkitError(
            f"trainer.devices={trainer.num_devices} on trainer.num_nodes={trainer.num_nodes} makes "
            f"{total} processes, but {started} were started ({told_by}); give trainer.devices the "
            f"number of processes on each machine, and {advice}"
        )
    cores = os.cpu_count() or 1
    if isinstance(trainer.accelerator, CPUAccelerator) and trainer.num_devices > max(
        cores, _ALWAYS_ALLOWED
    ):
        raise AlignkitError(
            f"trainer.devices={trainer.num_devices}: as many processes on a CPU of {cores} cores; "
            f"give at most {max(cores, _ALWAYS_ALLOWED)}"
        )


def end_ranks(trainer: Trainer, error: BaseException) -> None:
    """End the processes that Lightning started for other ranks, after this one failed.

    Args:
        trainer: The trainer, whose launcher holds the processes.
        error: The error of this process. If it only reports the end of another rank, the function
            waits for the message of that rank.

    Raises:
        RankFailed: Another rank failed first, and has printed why.
        AlignkitError: Another rank was killed, which leaves no message.
    """
    launched: list[Any] = getattr(trainer.strategy.launcher, "procs", [])
    children: list[Popen[bytes]] = [each for each in launched if isinstance(each, Popen)]
    if not children:
        return
    launched.clear()  # Lightning's thread that watches this list would kill this process too
    second = is_lost_connection(error)
    deadline = time.monotonic() + (_WAIT_SECONDS if second else 0)
    while time.monotonic() < deadline and not any(child.poll() for child in children):
        time.sleep(0.05)
    ended = [(rank, child.poll()) for rank, child in enumerate(children, start=1)]
    for child in children:
        child.kill()  # a process inside a collective does not react to SIGTERM
        child.wait()
    if not second:
        return
    for rank, status in ended:
        if status and status < 0:
            raise AlignkitError(
                f"the process of rank {rank} was killed by signal {-status}; if memory ran out, "
                "lower data.tokens_per_batch"
            )
        if status:
            raise RankFailed(status)


def _strategy_class(name: str) -> tuple[type[Strategy] | None, dict[str, Any]]:
    """Return a strategy's class, or ``None``, and the arguments that its name implies."""
    if name.lower() in StrategyRegistry:
        entry = StrategyRegistry[name.lower()]
        return entry["strategy"], dict(entry["init_params"])
    module, _, attribute = name.rpartition(".")
    try:
        kind = getattr(importlib.import_module(module or "lightning.pytorch.strategies"), attribute)
    except (ImportError, AttributeError):
        kind = None
    return (kind if isinstance(kind, type) and issubclass(kind, Strategy) else None), {}


def _external_processes(total: int) -> tuple[int, str] | None:
    """Return the number of processes that an unknown launcher started, and its source.

    The result is ``None`` if no variable tells. ``WORLD_SIZE`` without a rank counts only where it
    differs from the trainer's total, as a user may set it by hand.
    """
    for name in _SIZE_VARIABLES:
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name]), name
    size = os.environ.get("WORLD_SIZE", "")
    if size.isdigit() and (os.environ.get("RANK", "").isdigit() or int(size) != total):
        return int(size), "WORLD_SIZE"
    return None


def _check_rendezvous(nodes: int, node: int) -> None:
    """Refuse several machines without a common address, or one beyond the trainer's number."""
    if node >= nodes:
        name = "NODE_RANK" if os.environ.get("NODE_RANK") else "GROUP_RANK"
        raise AlignkitError(
            f"{name}={node} with trainer.num_nodes={nodes}: this machine would train the run by "
            f"itself; give trainer.num_nodes the number of machines, or unset {name}"
        )
    wanted = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK")
    missing = [name for name in wanted if not os.environ.get(name)]
    if nodes > 1 and missing:
        raise AlignkitError(
            f"trainer.num_nodes={nodes}: {', '.join(missing)} must be set on each machine; or "
            "start the command with torchrun or srun"
        )
