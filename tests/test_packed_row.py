"""The picture of a packed row is the one that its script draws from a real batch."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest
import torch

from alignkit.engine import score
from alignkit.models import load_model

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("packed_row", DOCS / "packed_row.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_picture_is_what_the_script_draws(script: ModuleType) -> None:
    drawn = script.draw(*script.make())
    ElementTree.fromstring(drawn)
    assert (DOCS / "packed_row.svg").read_text(encoding="utf-8") == drawn


def test_the_squares_are_what_a_model_reads(
    script: ModuleType, model_dir: Callable[[str], Path]
) -> None:
    """A token's square is filled where another token there changes what is scored from it."""
    batch, words = script.make()
    drawn = script.draw(batch, words)
    squares = {
        (int(y), int(x)): fill
        for fill, path in re.findall(r'<path fill="(#\w+)".*? d="([^"]+)"', drawn)
        for x, y in re.findall(r"M(\d+) (\d+)", path)
    }
    size, left, top = script._CELL, script._LEFT + 2, script._TOP + 2
    filled = {
        ((y - top) // size, (x - left) // size)
        for (y, x), fill in squares.items()
        if fill != script._HIDDEN
    }
    model = load_model(str(model_dir("llama")))
    with torch.no_grad():
        before = score(model, batch)
        for column in range(batch.num_tokens):
            ids = batch.input_ids.clone()
            ids[column] = (ids[column] + 7) % 300
            moved = (score(model, replace(batch, input_ids=ids)) - before).abs() > 1e-6
            rows = batch.score_from[moved].tolist()
            assert {row for row, seen in filled if seen == column} & {
                *batch.score_from.tolist()
            } == {*rows}


def test_every_scored_token_is_bold(script: ModuleType) -> None:
    batch, words = script.make()
    drawn = script.draw(batch, words)
    bold = re.findall(r'<text x="\d+" y="[\d.]+" text-anchor="end" fill="#\w+" font-weight', drawn)
    assert len(bold) == batch.num_scored + 1  # and a line of the legend
