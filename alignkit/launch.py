"""Whether the processes that a launcher started are those that the trainer expects."""

from __future__ import annotations

import os

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from alignkit.errors import AlignkitError

# Launcher to the variable that holds its number of processes.
_LAUNCHERS = {
    "torchrun": ("TORCHELASTIC_RUN_ID", "WORLD_SIZE"),
    "srun": ("SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS"),
    "mpirun": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
}


def check_launch(trainer: Trainer) -> None:
    """Refuse a run whose processes would not work together, or that we cannot shard.

    Raises:
        AlignkitError: A launcher started another number of processes than the trainer uses, so
            that each would train the whole by itself; or a strategy that shards the model.
    """
    if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy):
        name = type(trainer.strategy).__name__
        raise AlignkitError(
            f"trainer.strategy: {name} shards the weights, which scoring packed rows does not "
            "support yet; use ddp"
        )
    for launcher, (present, size) in _LAUNCHERS.items():
        started = os.environ.get(size, "")
        if present in os.environ and started.isdigit() and int(started) != trainer.world_size:
            raise AlignkitError(
                f"trainer.devices: {launcher} started {started} processes, but "
                f"trainer.devices × trainer.num_nodes is {trainer.world_size}; make them equal, "
                "or each process would train by itself"
            )
