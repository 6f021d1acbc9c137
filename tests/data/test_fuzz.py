"""Whatever a file holds: one line with its place, or a counted drop; never a stack trace."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from alignkit.data.encode.dialogues import DialogueEncoder
from alignkit.data.encode.documents import DocumentEncoder
from alignkit.data.read.files import file_source
from alignkit.data.read.rows import Source
from alignkit.data.text.policies import Policies, Tally
from alignkit.data.text.shapes import preference_sides, sft_sides
from alignkit.errors import AlignkitError
from tests.data.conftest import pair

DROP = Policies(bad_rows="drop")


@pytest.fixture(scope="module")
def encoders(tokenizer_dir: Path) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    options: dict[str, Any] = {"max_length": 64, "policies": DROP}
    return {
        "preference": DialogueEncoder(tokenizer, preference_sides, **options),
        "sft": DialogueEncoder(tokenizer, sft_sides, **options),
        "all turns": DialogueEncoder(tokenizer, sft_sides, all_turns=True, **options),
        "text": DocumentEncoder(tokenizer, block_size=64, packing="concatenate", policies=DROP),
    }


def survives(encoder: Any, source: Callable[[], Source]) -> tuple[int, Tally, str | None]:
    """Read everything; the examples are sound, the counts add up, a refusal is one line."""
    tally = Tally()
    kept = 0
    refusal = None
    try:
        if isinstance(encoder, DocumentEncoder):
            for _, example in encoder.examples(source(), tally):
                kept += 1
                assert 2 <= example.num_tokens <= 64
        else:
            for draft in encoder.drafts(source(), tally):
                kept += 1
                example = encoder.example(draft)
                assert all(0 < len(r) <= 64 for r in example.responses)
                assert all(r[-1] == 0 for r in example.responses)
                assert len(example.prompt) + max(map(len, example.responses)) <= 64
            counts = tally.counts
            lost = counts.get("dropped", 0)
            assert counts.get("rows", 0) == kept + lost, counts
    except AlignkitError as error:
        refusal = str(error)
    assert refusal is None or (refusal.strip() and "\n" not in refusal)
    return kept, tally, refusal


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One or a few random damages."""
    raw = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(raw) + 1)
        kind = rng.randrange(9)
        if kind == 0:
            raw[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            del raw[at : at + rng.randint(1, 200)]
        elif kind == 2:
            raw[at:at] = b"\x00" * rng.randint(1, 9)
        elif kind == 3:
            raw[at:at] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 9)))
        elif kind == 4:
            raw = raw[:at]
        elif kind == 5:
            raw[at:at] = rng.choice([b"[" * 5000, b'{"a":' * 3000, b"1" * 5000])
        elif kind == 6:
            raw[at:at] = rng.choice(
                [b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\\ud800", b"\\u0000", b"\r"]
            )
        elif kind == 7:
            raw[at:at] = rng.choice(
                [b"\n", b"null\n", b'{"chosen": 1, "rejected": []}\n', b"[]\n", b"{}\n"]
            )
        else:
            raw = bytearray(
                bytes(raw).replace(
                    rng.choice([b"Assistant:", b"Human:", b"chosen", b"\\n\\n"]),
                    rng.choice([b"", b"Human:", b"Assistant:", b'": 3, "', b"rejected"]),
                    rng.randint(1, 3),
                )
            )
    return bytes(raw)


def csv_of(rows: list[dict[str, str]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def arrow_of(rows: list[dict[str, str]]) -> bytes:
    import pyarrow as pa

    table, sink = pa.Table.from_pylist(rows), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def test_a_thousand_mutated_files(encoders: dict[str, Any], tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    rng = random.Random(7)
    rows: list[Any] = [pair(rng, rng.randint(1, 3)) for _ in range(6)]
    rows.append({"prompt": "hi", "chosen": "a", "rejected": "b", "text": "c"})
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    table = tmp_path / "ok.parquet"
    parquet.write_table(pa.Table.from_pylist(rows[:6]), table)
    originals = {
        "jsonl": lines,
        "jsonl.gz": gzip.compress(lines),
        "parquet": table.read_bytes(),
        "json": json.dumps(rows, indent=1).encode(),
        "csv": csv_of(rows[:6]),
        "arrow": arrow_of(rows[:6]),
        "txt": lines,
    }
    refused = kept = placed = 0
    for number in range(1000):
        suffix = rng.choice(["jsonl"] * 6 + ["jsonl.gz", "parquet", "json", "csv", "arrow", "txt"])
        path = tmp_path / f"{number}.{suffix}"
        path.write_bytes(mutate(originals[suffix], rng))
        encoder = encoders[rng.choice(list(encoders))]
        count, tally, refusal = survives(encoder, lambda path=path: file_source(path))
        if refusal is not None:  # about a row, or about the file as a whole (empty, no gzip)
            assert re.match(rf"{re.escape(str(path))}(:[1-9]\d*)?: .", refusal), refusal
            placed += bool(re.match(rf"{re.escape(str(path))}:\d", refusal))
        kept += count
        refused += not tally.counts
        path.unlink()
    assert placed > 50
    assert kept > 1000 and refused > 50, "the mutations are neither all fatal nor all harmless"


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec=None), max_size=20)
    | st.sampled_from(["\n\nHuman: a\n\nAssistant: b", "Assistant:", "Human: x Assistant: y"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "chosen"]), inner, max_size=3)
    ),
    max_leaves=6,
)
KEYS = ["chosen", "rejected", "prompt", "responses", "messages", "completion", "text"]
KEYS += ["system", "scores", "conversations", "question", "label", "tools", "answers"]
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool", ""]), "content": VALUES}
)
PIECES = ["\n\n", "\n", " ", "Human:", "Assistant:", "a", "é", "\ud800", "\0", "\u200b", "\x85"]
TEXT = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)
ROWS = st.dictionaries(
    st.sampled_from(KEYS), TEXT | VALUES | st.lists(MESSAGE, max_size=4), max_size=7
)


@settings(
    max_examples=400,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(rows=st.lists(ROWS, min_size=1, max_size=4))
def test_rows_of_any_shape(encoders: dict[str, Any], rows: list[Any]) -> None:
    def source() -> Source:
        return Source("rows", "0", lambda: enumerate(rows, start=1))

    for encoder in encoders.values():
        survives(encoder, source)
