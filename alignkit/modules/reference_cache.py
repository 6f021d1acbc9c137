"""Keep the reference's log-probs between runs, so that a sweep scores its reference once.

A row is one example. Its key is a hash of its token ids and of the lengths of its prompt and its
responses; its value is the summed log-probs of its k responses. The directory is named after the
base, the reference's adapter and the dtype. Nothing else decides a value, so runs with different
learning rates, β or losses share it. Each rank writes shards of its own in one step, and every run
reads all of them.
"""

from __future__ import annotations

import hashlib
import logging
import random
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from alignkit.batch import PackedBatch
from alignkit.errors import AlignkitError
from alignkit.utils.atomic import make_writable_folder, write_atomically

log = logging.getLogger(__name__)

_KEY_BYTES = 16
_ROWS_PER_SHARD = 1024


@dataclass(frozen=True)
class ReferencedBatch(PackedBatch):
    """Hold a batch together with the cached log-probs of its responses.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from alignkit.batch import Example, collate
        >>> with TemporaryDirectory() as folder:
        ...     cache = ReferenceCache(Path(folder), "base-adapter-float32")
        ...     batch = cache.look_up(collate([Example([1], [[2, 0], [3, 0]])]))
        >>> batch.known_R  # nothing is known yet, so all of it is to be scored live
        tensor([nan, nan])
        >>> batch.probe.num_examples, batch.probe_R.tolist()
        (1, [0, 1])

    Attributes:
        known_R: [R] fp32 summed reference log-probs, NaN where the cache has none.
        probe: The examples to score live: those unknown, and a few known ones as a check.
        probe_R: [R'] int64, the index in the batch of each response of the probe.
        keys: The cache key of each example of the probe.
    """

    known_R: Tensor
    probe: PackedBatch
    probe_R: Tensor
    keys: tuple[bytes, ...]


class ReferenceCache:
    """Store the summed reference log-probs of examples on the disk.

    On a read-only or full disk, stored rows are still used and new ones are kept in memory. One
    line warns of it, because training works without a cache as well.

    Args:
        directory: The folder with the caches of all references.
        reference: Name of the reference: base fingerprint, adapter fingerprint and dtype.
        checks: Number of known examples of each batch to score again, drawn at random; at least 1.
    """

    def __init__(self, directory: Path, reference: str, checks: int = 1) -> None:
        self.home = directory / reference
        self.checks = checks
        self._rows: dict[bytes, Tensor] = {}
        self._fresh: list[tuple[bytes, Tensor]] = []
        self._draw = random.Random(0)
        self._writable = True
        with self._warn_if_unwritable():
            make_writable_folder(self.home)
        for shard in sorted(self.home.glob("*.safetensors")):
            self._read(shard)

    def look_up(self, batch: PackedBatch) -> ReferencedBatch:
        """Return a batch on the CPU with its known log-probs and the examples to score live."""
        keys = example_keys(batch)
        parts = [
            self._rows.get(key, torch.full((len(span.responses),), torch.nan))
            for key, span in zip(keys, batch.spans, strict=True)
        ]
        unknown = [i for i, part in enumerate(parts) if part.isnan().any()]
        known = sorted(set(range(len(keys))) - set(unknown))
        live = unknown + self._draw.sample(known, min(self.checks, len(known)))
        ends = np.cumsum([len(part) for part in parts])
        probe_R = [r for i in live for r in range(int(ends[i]) - len(parts[i]), int(ends[i]))]
        return ReferencedBatch(
            **{field.name: getattr(batch, field.name) for field in fields(PackedBatch)},
            known_R=torch.cat(parts),
            probe=batch.take(live),
            probe_R=torch.tensor(probe_R),
            keys=tuple(keys[i] for i in live),
        )

    def add(self, batch: ReferencedBatch, live_R: Tensor) -> None:
        """Keep the log-probs of a batch's probe, which `write` puts on the disk.

        Args:
            batch: A batch that `look_up` returned.
            live_R: [R'] fp32, the summed log-probs of the probe's responses.
        """
        counts = [len(span.responses) for span in batch.probe.spans]
        parts = torch.split(live_R.detach(), counts)
        self._fresh.extend(zip(batch.keys, parts, strict=True))
        if len(self._fresh) >= _ROWS_PER_SHARD:
            self.write()

    def write(self) -> None:
        """Write the rows added since the last call, as one new shard."""
        rows = {key: part.cpu() for key, part in self._fresh if key not in self._rows}
        self._fresh.clear()
        if not rows:
            return
        self._rows.update(rows)
        if not self._writable:
            return
        tensors = {
            "keys": torch.tensor([list(key) for key in rows], dtype=torch.uint8),
            "counts": torch.tensor([len(part) for part in rows.values()]),
            "sums": torch.cat(list(rows.values())),
            "checks": torch.tensor([_checksum(key, part) for key, part in rows.items()]),
        }
        with self._warn_if_unwritable():
            write_atomically(self.home / f"{uuid.uuid4().hex}.safetensors", save(tensors))

    @contextmanager
    def _warn_if_unwritable(self) -> Iterator[None]:
        """Warn if the block cannot write, and write no more."""
        try:
            yield
        except AlignkitError as error:
            self._writable = False
            log.warning("model.reference_cache: %s; training goes on without keeping more", error)

    def _read(self, shard: Path) -> None:
        try:
            tensors = load_file(shard)
            parts = torch.split(tensors["sums"], tensors["counts"].tolist())
            keys = [bytes(key) for key in tensors["keys"].tolist()]
            checks = tensors["checks"].tolist()
        except (SafetensorError, OSError, KeyError, RuntimeError, ValueError) as error:
            log.warning("%s: unreadable (%s); its rows will be scored again", shard, error)
            return
        for row, (key, part, check) in enumerate(zip(keys, parts, checks, strict=True)):
            if _checksum(key, part) == check:
                self._rows[key] = part
            else:
                log.warning("%s: row %d is corrupted; it will be scored again", shard, row)


def refuse_wrong_rows(error: float, tolerance: float, home: Path) -> None:
    """Refuse cached values that differ from the reference's.

    Args:
        error: The largest difference, in nats.
        tolerance: The largest difference that rounding explains, in nats.
        home: The cache's folder.

    Raises:
        AlignkitError: The error exceeds the tolerance.
    """
    if not error <= tolerance:
        raise AlignkitError(
            f"model.reference_cache: cached log-probs are off by {error:.3g} nats from the "
            f"reference; delete {home} and run again"
        )


def example_keys(batch: PackedBatch) -> list[bytes]:
    """Return a hash of the token ids, lengths and scored tokens of each example of a CPU batch."""
    ids = batch.input_ids.numpy()
    scored = np.zeros(batch.num_tokens, dtype=np.int8)
    np.add.at(scored, batch.score_from.numpy(), 1)
    keys = []
    for span in batch.spans:
        digest = hashlib.blake2b(digest_size=_KEY_BYTES)
        digest.update(np.array([span.prompt, *span.responses]).tobytes())
        digest.update(ids[span.start : span.end].tobytes())
        digest.update(scored[span.start : span.end].tobytes())
        keys.append(digest.digest())
    return keys


def _checksum(key: bytes, part: Tensor) -> int:
    return zlib.crc32(part.numpy().tobytes(), zlib.crc32(key))
