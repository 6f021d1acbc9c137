"""Keep encoded sets between runs, each under a hash of everything that decides its content."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from alignkit.data.keep.store import Store, StoreError, StoreWriter
from alignkit.errors import AlignkitError

log = logging.getLogger(__name__)


def cache_root(cache_dir: str | None) -> Path:
    """Return the cache folder: the argument, ``$ALIGNKIT_CACHE``, or ``~/.cache/alignkit``."""
    return Path(cache_dir or os.environ.get("ALIGNKIT_CACHE") or "~/.cache/alignkit").expanduser()


def cached_store(
    root: Path,
    identity: Mapping[str, Any],
    build: Callable[[StoreWriter], dict[str, Any]],
    *,
    scored: bool = False,
) -> Store:
    """Open the encoded set of this identity, building it where there is none.

    One process builds while the others wait for its lock, and a finished set appears by one
    rename, so no process ever reads what another is still writing. A set left half-written or
    damaged is built anew.

    Args:
        root: The cache's directory.
        identity: Everything that decides the set's content, as JSON values.
        build: Writes the examples and returns what to keep beside them (`Store.meta`).
        scored: Whether examples carry masks (see `StoreWriter`).

    Raises:
        AlignkitError: The cache cannot be written, or ``build`` finds bad data.
    """
    key = hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=16)
    home = root / "encoded"
    directory = home / key.hexdigest()
    store = _open(directory)
    if store is not None:
        return store
    try:
        home.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{directory}.lock"):
            store = _open(directory, complain=True)  # another process may have built it meanwhile
            return store or _build(directory, build, scored)
    except OSError as error:
        raise AlignkitError(
            f"cache {home}: cannot be written ({error}); set data.cache_dir or ALIGNKIT_CACHE"
        ) from error


def _open(directory: Path, complain: bool = False) -> Store | None:
    if not directory.exists():
        return None
    try:
        return Store(directory)
    except StoreError as error:
        if complain:
            log.warning("the cache %s is damaged (%s); building it anew", directory, error)
        return None


def _build(directory: Path, build: Callable[[StoreWriter], dict[str, Any]], scored: bool) -> Store:
    partial = directory.with_suffix(".partial")
    damaged = directory.with_suffix(".damaged")
    for leftover in (partial, damaged):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir()
    try:
        with StoreWriter(partial, scored=scored) as writer:
            writer.finish(build(writer))
        if directory.exists():
            # No rename replaces a full directory; whoever has the old one mapped keeps it mapped.
            os.replace(directory, damaged)
            shutil.rmtree(damaged, ignore_errors=True)
        os.replace(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Store(directory)
