"""Store encoded examples on disk as flat arrays, and check them before they are mapped.

A store is a directory:

    tokens.bin    [T] int32, every example's prompt and responses, end to end
    segments.bin  [S+1] int64, where each segment (a prompt or a response) begins in ``tokens``
    examples.bin  [E+1] int64, each example's first segment: its prompt, then its k responses
    lines.bin     [E] int64, the line of the source each example came from
    scored.bin    [T] bool, present where only some response tokens carry loss
    labels.bin    [E] bool, present where examples have labels
    manifest.json sizes and checksums of the above, and the counts made while encoding

The manifest is written last, so a directory without one, or whose files differ from it, was left
half-written or damaged.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from torch.utils.data import Dataset

from alignkit.data.keep.measure import measure
from alignkit.data.read.hashes import digest_of
from alignkit.engine import Example

_DTYPES = {
    "tokens": np.int32,
    "segments": np.int64,
    "examples": np.int64,
    "lines": np.int64,
    "scored": np.bool_,
    "labels": np.bool_,
}
_OPTIONAL = {"scored", "labels"}
_MANIFEST = "manifest.json"
_PENDING = 2**16  # tokens


class StoreError(Exception):
    """Report a store that is half-written or damaged, and what shows it."""


class StoreWriter:
    """Write a store example by example, with only a small buffer in memory.

    Args:
        directory: An empty directory.
        scored: Whether the examples carry masks of scored tokens.
    """

    def __init__(self, directory: Path, *, scored: bool = False) -> None:
        self._directory = directory
        names = [name for name in _DTYPES if name not in _OPTIONAL or (scored and name == "scored")]
        self._files = {name: (directory / f"{name}.bin").open("wb") for name in names}
        # What is not yet in the files: appending to them for every example would take far longer.
        self._pending: dict[str, list[int]] = {name: [] for name in names}
        self._pending["segments"].append(0)
        self._pending["examples"].append(0)
        self._tokens = 0
        self._segments = 0
        self.examples = 0

    def add(self, example: Example, line: int) -> None:
        """Add one example, read from ``line`` of its source."""
        pending = self._pending
        parts = [example.prompt, *example.responses]
        for part in parts:
            pending["tokens"].extend(part)
            self._tokens += len(part)
            pending["segments"].append(self._tokens)
        if "scored" in pending:
            masks = example.scored or [[True] * len(part) for part in example.responses]
            for mask in ([False] * len(example.prompt), *masks):
                pending["scored"].extend(mask)
        if example.label is not None:
            if self.examples == 0:
                self._files["labels"] = (self._directory / "labels.bin").open("wb")
            pending.setdefault("labels", []).append(example.label)
        self._segments += len(parts)
        self.examples += 1
        pending["examples"].append(self._segments)
        pending["lines"].append(line)
        if len(pending["tokens"]) >= _PENDING:
            self._flush()

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_: object) -> None:
        """Close the files, finished or not."""
        self._flush()
        for file in self._files.values():
            file.close()

    def finish(self, meta: dict[str, Any]) -> None:
        """Close the files, then write the manifest, which makes the store valid.

        Args:
            meta: What to keep beside the arrays, JSON values.
        """
        self.__exit__()
        arrays = {
            name: measure(self._directory / f"{name}.bin", whole=True) for name in self._files
        }
        body = json.dumps({"arrays": arrays, "meta": meta})
        manifest = {"xxh3": xxhash.xxh3_64_hexdigest(body.encode()), "body": body}
        (self._directory / _MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")

    def _flush(self) -> None:
        for name, values in self._pending.items():
            if values:
                self._files[name].write(np.asarray(values, _DTYPES[name]).tobytes())
                values.clear()


class Store:
    """Read a store; it can be pickled, so that workers map the same files.

    Args:
        directory: What a `StoreWriter` finished.

    Attributes:
        meta: What was given to `StoreWriter.finish`.
        source: What a person calls the source that was encoded; whoever opens the store says.
        digest: Hash of the examples: tokens, where they part, which are scored, and labels.

    Raises:
        StoreError: The manifest is missing, or an array is not what it says.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.source = str(directory)
        try:
            manifest = json.loads((directory / _MANIFEST).read_text(encoding="utf-8"))
            intact = manifest["xxh3"] == xxhash.xxh3_64_hexdigest(manifest["body"].encode())
            body = json.loads(manifest["body"])
            arrays, self.meta = body["arrays"], body["meta"]
            self._names = list(arrays)
            self._count = arrays["lines"]["bytes"] // np.dtype(_DTYPES["lines"]).itemsize
            checksums = [arrays[name]["xxh3"] for name in self._names if name != "lines"]
            self.digest = digest_of("".join(checksums).encode())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(f"no readable manifest ({error})") from error
        if not intact:
            raise StoreError("the manifest's checksum differs")
        for name, expected in arrays.items():
            try:
                found = measure(directory / f"{name}.bin")
            except OSError as error:
                raise StoreError(f"{name}.bin is missing") from error
            for key in found:
                if found[key] != expected.get(key):
                    raise StoreError(f"{name}.bin: {key} {found[key]}, not {expected.get(key)}")

    def __len__(self) -> int:
        return int(self._count)

    def __getstate__(self) -> dict[str, Any]:
        names = ("directory", "source", "meta", "digest", "_names", "_count")
        return {name: getattr(self, name) for name in names}

    @cached_property
    def _arrays(self) -> _Arrays:
        return _Arrays(self.directory)

    @property
    def lines(self) -> NDArray[np.int64]:
        """Return the line each example came from, [E] int64."""
        lines: NDArray[np.int64] = self._arrays["lines"]
        return lines

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Return the tokens of each example, its prompt counted once, [E] int64."""
        starts = np.asarray(self._arrays["segments"])[np.asarray(self._arrays["examples"])]
        lengths: NDArray[np.int64] = np.diff(starts)
        return lengths

    @property
    def answers(self) -> NDArray[np.int64]:
        """Return how many responses each example has, [E] int64."""
        counts: NDArray[np.int64] = np.diff(self._arrays["examples"]) - 1
        return counts

    @property
    def prompt_lengths(self) -> NDArray[np.int64]:
        """Return the tokens of each example's prompt, [E] int64."""
        segments, first = self._arrays["segments"], np.asarray(self._arrays["examples"][:-1])
        lengths: NDArray[np.int64] = segments[first + 1] - segments[first]
        return lengths

    def prompt_digests(self, chosen: NDArray[np.int64]) -> NDArray[np.uint64]:
        """Return a hash of the tokens of each chosen example's prompt, [C] uint64."""
        segments, tokens = self._arrays["segments"], self._arrays["tokens"].data
        first = self._arrays["examples"][chosen]
        parts = (tokens[a:b] for a, b in zip(segments[first], segments[first + 1], strict=True))
        return np.fromiter(map(xxhash.xxh3_64_intdigest, parts), np.uint64, len(chosen))

    def __getitem__(self, index: int) -> Example:
        """Return one example; its ids are views of the mapped file, int32."""
        arrays = self._arrays
        first, last = arrays["examples"][index], arrays["examples"][index + 1]
        bounds = arrays["segments"][first : last + 1].tolist()
        pairs = list(pairwise(bounds))
        tokens = arrays["tokens"]
        parts: list[Any] = [tokens[start:end] for start, end in pairs]
        scored: list[Any] | None = None
        if "scored" in self._names:
            scored = [arrays["scored"][start:end] for start, end in pairs[1:]]
        label = bool(arrays["labels"][index]) if "labels" in self._names else None
        return Example(parts[0], parts[1:], scored, label)


class _Arrays(dict[str, NDArray[Any]]):
    """Hold a store's arrays, each mapped when it is first asked for."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._directory = directory

    def __missing__(self, name: str) -> NDArray[Any]:
        with (self._directory / f"{name}.bin").open("rb") as file:
            # Nothing can be mapped of an empty file.
            empty = os.fstat(file.fileno()).st_size == 0
            content = b"" if empty else mmap(file.fileno(), 0, access=ACCESS_READ)
        self[name] = np.frombuffer(content, _DTYPES[name])
        return self[name]


class ExampleSet(Dataset[Example]):
    """Hold chosen examples of one encoded set or several, end to end.

    Args:
        stores: Where the examples are.
        chosen: For each store, the indices [C] int64 that belong to the set.
    """

    def __init__(self, stores: Sequence[Store], chosen: Sequence[NDArray[np.int64]]) -> None:
        self._stores = list(stores)
        self._chosen = list(chosen)
        self._ends = list(accumulate(len(each) for each in chosen))

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def sizes(self) -> list[int]:
        """Count the examples that come from each store."""
        return [len(each) for each in self._chosen]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Return the tokens of each example, its prompt counted once, [E] int64."""
        parts = [s.lengths[c] for s, c in zip(self._stores, self._chosen, strict=True)]
        return np.concatenate(parts)

    @property
    def answers(self) -> NDArray[np.int64]:
        """Return how many responses each example has, [E] int64."""
        parts = [s.answers[c] for s, c in zip(self._stores, self._chosen, strict=True)]
        return np.concatenate(parts)

    def __getitem__(self, index: int) -> Example:
        store, row = self._find(index)
        return store[row]

    def place(self, index: int) -> tuple[str, int]:
        """Return the source an example came from, and its line there."""
        store, row = self._find(index)
        return store.source, int(store.lines[row])

    def _find(self, index: int) -> tuple[Store, int]:
        part = bisect_right(self._ends, index)
        first = self._ends[part - 1] if part else 0
        return self._stores[part], int(self._chosen[part][index - first])
