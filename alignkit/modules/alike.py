"""Let every rank start from the weights of rank 0.

Adapters and random bases are drawn by each process for itself, which differ without a seed. DDP
broadcasts what it trains and not the reference; sharding broadcasts nothing.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from alignkit.modules.sharding import models_of, units
from alignkit.utils.deferred import DeferredParameter


def start_alike(module: Any, device: Any) -> None:
    """Copy what may have been drawn at random from rank 0, the reference's part of it included.

    Args:
        module: The module, on the CPU or on its device; what is sharded stays as it is.
        device: Where the process group's backend takes tensors.
    """
    if not (dist.is_available() and dist.is_initialized()) or units(module):
        return
    trained = {name for name, p in module.model.named_parameters() if p.requires_grad}
    drawn = {
        id(p): p.detach()
        for model in models_of(module)
        for name, p in model.named_parameters()
        if name in trained or module.hparams.get("random_init")
        if not isinstance(p, DeferredParameter)  # every rank reads the same files
    }
    for value in drawn.values():
        sent = value.to(device)
        dist.broadcast(sent, src=0)
        value.copy_(sent)
    reference = getattr(module, "reference", None)
    names = [module.base_identity, *([reference.fingerprint, reference.base] if reference else [])]
    dist.broadcast_object_list(names, src=0)
    module.base_identity, *named = names
    if reference is not None:
        reference.fingerprint, reference.base = named
