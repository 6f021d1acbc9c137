"""Give models and runs names: as ``NAME=PATH`` says, or after the path's last part."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from alignkit.errors import AlignkitError

_NAMED = re.compile(r"([\w.-]+)=(.+)")


def name_models(models: Sequence[str] | Mapping[str, str], what: str = "models") -> dict[str, str]:
    """Return the path of each model by its name, from ``NAME=PATH`` and plain paths.

    A plain path is named after its last part. A path may hold an equals sign itself, as in
    Lightning's ``epoch=0-step=10.ckpt``: a file that exists is taken as a path.

    Args:
        models: The models, or what else is named so.
        what: What they are called in messages.

    Raises:
        AlignkitError: There is no model, or two have the same name.

    Example:
        >>> name_models(["base=EleutherAI/pythia-70m", "runs/sft"])
        {'base': 'EleutherAI/pythia-70m', 'sft': 'runs/sft'}
    """
    pairs = (
        list(models.items()) if isinstance(models, Mapping) else [_name_and_path(m) for m in models]
    )
    if not pairs:
        raise AlignkitError("models: none was given; pass --models NAME=PATH …")
    named: dict[str, str] = {}
    for name, path in pairs:
        if name in named:
            raise AlignkitError(
                f"{what}: '{named[name]}' and '{path}' are both called '{name}'; "
                "name them as NAME=PATH"
            )
        named[name] = path
    return named


def _name_and_path(model: str) -> tuple[str, str]:
    match = _NAMED.fullmatch(model)
    if match and not Path(model).exists():
        return match[1], match[2]
    path = Path(model)
    # runs/dpo/version_1/last.ckpt is named dpo/version_1, after its run
    run = path.parent if path.suffix == ".ckpt" else path
    name = f"{run.parent.name}/{run.name}" if run.name.startswith("version_") else run.name
    return name or model, model
