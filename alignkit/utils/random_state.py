"""Read and restore torch's random states, on every rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Return torch's random states on the host and on the device."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def of_all_ranks(state: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Return every rank's `random_state`; all ranks must call it."""
    if not (dist.is_available() and dist.is_initialized()):
        return [state]
    states: list[dict[str, Tensor]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(states, state)
    return states


def restore_random_state(
    states: Sequence[Mapping[str, Tensor]] | Mapping[str, Tensor], device: torch.device, rank: int
) -> None:
    """Restore this rank's state of `of_all_ranks`.

    A rank that the saving run did not have gets a new stream of random numbers.
    """
    if isinstance(states, Mapping):  # an earlier alignkit saved the state of rank 0 alone
        states = [states]
    state = states[min(rank, len(states) - 1)]
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
    if rank >= len(states):
        torch.manual_seed(int(torch.randint(2**62, ())) + rank)
