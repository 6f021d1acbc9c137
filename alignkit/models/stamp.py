"""Record in checkpoints what their weights belong to, and refuse to load them for others.

The stamp names the module's class, the base by its weights and its config, what the adapter's
tensors mean and, for DPO, the reference. Names and shapes of tensors do not say any of this.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from alignkit.errors import AlignkitError
from alignkit.lora.identity import Identity, active_identity, difference
from alignkit.lora.peft_files import read_adapter
from alignkit.models.fingerprint import QUANTIZE, BaseIdentity
from alignkit.models.place import HEADER_KEY, absolute_base
from alignkit.models.settings import settings_difference
from alignkit.utils.finite import first_nonfinite, nested_tensors

STAMP = "alignkit"
VERSION = 2
"""Version 1 named the base without its config, and did not name the adapter."""
_STAMP_KEYS = {"module", "base", "base_fingerprint", "base_settings", "adapter"}
# Values of callbacks may be infinite, such as the best loss before there was one.
_MAY_BE_INFINITE = ("callbacks", "loops", "lr_schedulers")


def make_stamp(
    module: type, base: str, identity: BaseIdentity, model: PreTrainedModel
) -> dict[str, Any]:
    """Return what a checkpoint must share with the module that resumes from it.

    Args:
        module: The module's class.
        base: Where the base lies.
        identity: The identity of the base, as loaded.
        model: The policy. The stamp says what its adapter's tensors mean.
    """
    return {
        "version": VERSION,
        "module": f"{module.__module__}.{module.__qualname__}",
        "base": base,
        HEADER_KEY: absolute_base(base),
        "base_fingerprint": identity.fingerprint,
        "base_settings": dict(identity.settings),
        "adapter": active_identity(model),
    }


def check_content(checkpoint: Mapping[str, Any], where: str) -> None:
    """Refuse a checkpoint of others, of another version, or with a tensor that is not finite.

    Args:
        checkpoint: Its content.
        where: Names it in messages.

    Raises:
        AlignkitError: It is one of these. The message names the tensor that is not finite.
    """
    if STAMP not in checkpoint:
        raise AlignkitError(f"{where}: was not written by alignkit; give one of its checkpoints")
    version = checkpoint[STAMP].get("version")
    if version != VERSION or not checkpoint[STAMP].keys() >= _STAMP_KEYS:
        age = "a later" if isinstance(version, int) and version > VERSION else "an earlier"
        raise AlignkitError(
            f"{where}: was written by {age} alignkit, whose checkpoints say otherwise what their "
            "weights belong to; export it with that version and pass the export as model.init_from "
            "(--to peft) or model.base (--to merged)"
        )
    held = {key: value for key, value in checkpoint.items() if key not in _MAY_BE_INFINITE}
    # Tensors that lie in shards are checked where these are read.
    name = first_nonfinite((n, t) for n, t in nested_tensors(held) if not t.is_meta)
    if name is not None:
        raise AlignkitError(f"{where}: {name} holds NaN or infinity; use an earlier checkpoint")


def check_stamp(own: Mapping[str, Any], base: BaseIdentity, given: Mapping[str, Any]) -> None:
    """Refuse to resume from a checkpoint of another class, base, adapter or reference.

    Args:
        own: The module's stamp.
        base: The module's base.
        given: The checkpoint's stamp.

    Raises:
        AlignkitError: They differ. The message says what to pass instead.
    """
    if given["module"] != own["module"]:
        theirs, ours = (stamp["module"].rpartition(".")[2] for stamp in (given, own))
        raise AlignkitError(
            f"ckpt_path: a checkpoint of {theirs} cannot resume {ours}; to start {ours} from its "
            "weights pass it as model.init_from"
        )
    check_base(base, given, "ckpt_path")
    check_adapter(own["adapter"], given, "ckpt_path")
    if given.get("reference_fingerprint") != own.get("reference_fingerprint"):
        raise AlignkitError(
            "ckpt_path: was trained against another reference; resume with the model.init_from and "
            "model.reference that the run started with"
        )


def check_base(
    own: BaseIdentity, stamp: Mapping[str, Any], where: str, *, weights: bool = True
) -> None:
    """Refuse a base whose weights or config are not those that a stamp names.

    Args:
        own: The base at hand.
        stamp: The checkpoint's stamp.
        where: Names the checkpoint in messages.
        weights: Whether to compare weights; ``False`` where the checkpoint holds them itself.

    Raises:
        AlignkitError: They differ.
    """
    differs = settings_difference(stamp["base_settings"], own.settings, own.defaults)
    if differs is None and weights and stamp["base_fingerprint"] != own.fingerprint:
        differs = "weights differ, which random_init draws by seed_everything"
    packed = stamp["base_settings"].get(QUANTIZE)
    if packed != own.settings.get(QUANTIZE):
        raise AlignkitError(
            f"{where}: was trained with model.quantize {packed or 'null'}, this base has "
            f"{own.settings.get(QUANTIZE, 'null')}; pass --model.quantize {packed or 'null'}"
        )
    if differs is not None:
        raise AlignkitError(
            f"{where}: belongs to another base model (trained on {stamp['base']!r}; {differs}); "
            "pass that one as model.base"
        )


def check_adapter_base(own: BaseIdentity, path: Path, where: str) -> None:
    """Refuse another base than an adapter's file names; PEFT's own files name none.

    Raises:
        AlignkitError: They differ.
    """
    files = read_adapter(path)
    if not own.is_named_in(files.header):
        name = files.config.get("base_model_name_or_path")
        raise AlignkitError(
            f"{where}: belongs to another base model (trained on {name!r}; its config or weights "
            "differ); pass that one as model.base"
        )


def check_adapter(own: Identity | None, stamp: Mapping[str, Any], where: str) -> None:
    """Refuse another adapter than a stamp describes, also where only its scale or start differs.

    Raises:
        AlignkitError: They differ. The message names both values.
    """
    differs = difference(stamp["adapter"], own)
    if differs is not None:
        raise AlignkitError(f"{where}: {differs}")
