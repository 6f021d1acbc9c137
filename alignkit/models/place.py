"""Find the base of a checkpoint or adapter from any folder, and name what gave a path to it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from alignkit.errors import AlignkitError

HEADER_KEY = "base_path"
"""Where a stamp or a header keeps the absolute path of a base."""
_NAMED_KEY = "base_named"


def absolute_base(base: str) -> str:
    """Return the absolute path of a local base; a Hub id stays as it is.

    Example:
        >>> absolute_base("EleutherAI/pythia-70m")
        'EleutherAI/pythia-70m'
    """
    path = os.path.expanduser(base)
    return os.path.abspath(path) if os.path.exists(path) else base


def base_header(place: str, named: str) -> dict[str, str]:
    """Return what an adapter file's header says about the place of its base.

    Args:
        place: Where it lies.
        named: What the run called it.
    """
    return {HEADER_KEY: absolute_base(place), _NAMED_KEY: named}


def find_base(named: str, kept: Mapping[str, str], where: str) -> str:
    """Return where a base lies now.

    Args:
        named: The base as the run named it, perhaps relative to another folder.
        kept: A stamp or a header, which may hold its absolute path.
        where: Names the checkpoint or adapter in messages.

    Raises:
        AlignkitError: It was a local path, and is neither there nor at the path as it was named.
    """
    absolute = kept.get(HEADER_KEY, named)
    for place in (absolute, named, kept.get(_NAMED_KEY, named)):
        if os.path.exists(os.path.expanduser(place)):
            return place
    if os.path.isabs(absolute):
        called = kept.get(_NAMED_KEY, named)
        raise AlignkitError(
            f"{where}: its base model {called} is not at {absolute} any more; pass --base"
        )
    return named


@contextmanager
def as_argument(argument: str, path: str) -> Iterator[None]:
    """Raise errors about a path that is taken for a base under the argument that gave it.

    Raises:
        AlignkitError: With the argument in the place of ``base``; of a path where nothing lies it
            says what may lie there.
    """
    try:
        yield
    except AlignkitError as error:
        told = str(error)
        start = f"base '{path}': "
        if not told.startswith(start):
            raise
        told = told.removeprefix(start)
        if not Path(path).expanduser().exists():
            told = (
                f"{told.partition('; ')[0]}; give a checkpoint (.ckpt), a run's folder, an adapter "
                "or a model"
            )
        raise AlignkitError(f"{argument} '{path}': {told}") from error
