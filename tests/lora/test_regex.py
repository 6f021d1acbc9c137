"""Regular expressions of others: Python's answers, in a time that no pattern can stretch."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from alignkit.errors import AlignkitError
from alignkit.lora import LoRAConfig
from alignkit.lora.config import first_match
from alignkit.lora.regex import Pattern

Make = Callable[..., PreTrainedModel]

PATH = "model.layers.11.self_attn." + "q_proj" * 8

# Each takes Python's own matcher minutes to centuries on PATH.
ENDLESS = [
    r"(a+)+$", r"(.+)+!", r"(.*)*!", r"(.*.*)*!", r"(\w|\w\w|\.)+!", r"([\w.]+\.?)+!",
    ".*" * 14 + "!",
    r"(.?){50}!", r"((.{1,50}){1,50}){1,50}!", r"(?=(.+)+!).*", r"(?!(.+)+!)!", "(x?|.*)*!",
]  # fmt: skip

ATOMS = ["a", "b", ".", r"\.", "[ab]", "[^a]", r"\w", r"\d", "^", "$", r"\b", r"\B", "[a-c.]"]
PATTERNS = st.recursive(
    st.sampled_from(ATOMS),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map("({0[0]}|{0[1]})".format),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "*?", "{2}", "{1,3}", "{0,2}?"])).map(
            "(?:{0[0]}){0[1]}".format
        ),
        inner.map("(?={})".format),
        inner.map("(?!{})".format),
        st.sampled_from(["(?<=a)", "(?<!b)", "(?<=[ab]c)"]),
    ),
    max_leaves=8,
)


@settings(deadline=None, max_examples=400)
@given(PATTERNS, st.lists(st.text("abc1.", max_size=7), min_size=3, max_size=3))
def test_says_what_python_says(pattern: str, paths: list[str]) -> None:
    ours, pythons = Pattern(pattern, "here"), re.compile(pattern)
    for path in paths:
        assert ours.fullmatch(path) == (pythons.fullmatch(path) is not None), (pattern, path)


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        (r".*\.(q|k|v)_proj", True),
        (r"^(?!.*lm_head).*proj$", True),
        (r"model\.layers\.(\d|1[0-5])\..*", True),
        (r"(?i).*Q_PROJ", True),
        (r"(?:.*?(?:vision).*?)?\.?.*(?:self_attn|mlp).*", True),
        (r"^(language_model)(?!.*(lm_head|emb)).*", False),
    ],
)
def test_patterns_people_write(pattern: str, matches: bool) -> None:
    path = "model.layers.11.self_attn.q_proj"
    assert Pattern(pattern, "here").fullmatch(path) == matches
    assert (re.fullmatch(pattern, path) is not None) == matches


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        (r"(a)\1", "a reference to a group"),
        (r"(a)?(?(1)b|c)", "a condition on a group"),
        ("(?>a+)b", "an atomic group"),
        ("(", "is no regular expression"),
        ("(" * 3000 + ")" * 3000, "is no regular expression"),
        ("(" * 60 + "a" + ")" * 60, "nests deeper"),
        ("x{99999999999999999999}", "is no regular expression"),
        ("a" * 10_001, "has 10,001 characters"),
        ("(?i:a)", "sets flags within a group"),
    ],
)
def test_what_cannot_be_bounded_is_one_line(pattern: str, why: str) -> None:
    with pytest.raises(AlignkitError) as caught:
        Pattern(pattern, "adapter_config.json: target_modules")
    message = str(caught.value)
    assert why in message
    assert message.startswith("adapter_config.json: target_modules: ")
    assert len(message) < 400
    assert "\n" not in message


def test_a_rank_pattern_that_does_not_compile_within_pefts_rule_is_one_line() -> None:
    """PEFT matches the end of the path, so the pattern must compile within another as well."""
    with pytest.raises(AlignkitError, match=r"rank_pattern.*[^\n]"):
        LoRAConfig(
            rank_pattern={"a)|(b": 2, "(?i)q_proj": 3} if sys.version_info >= (3, 11) else {"(": 1}
        )


@pytest.mark.parametrize("pattern", ENDLESS)
def test_no_pattern_takes_long(pattern: str) -> None:
    start = time.monotonic()
    with contextlib.suppress(AlignkitError):  # or it is refused, as taking too long
        assert not Pattern(pattern, "here").fullmatch(PATH) or "(?!" in pattern
        first_match({pattern: 1}, PATH)
    assert time.monotonic() - start < 10


FIELDS = {
    "target_modules": lambda pattern: pattern,
    "target_modules, a list": lambda pattern: [pattern, "attn.c_attn"],
    "exclude_modules": lambda pattern: pattern,
    "rank_pattern": lambda pattern: {pattern: 4},
    "alpha_pattern": lambda pattern: {pattern: 4},
    "layers_pattern": lambda pattern: [pattern],
    "modules_to_save": lambda pattern: [pattern],
}


def test_an_adapter_of_others_cannot_hang_the_load(
    tiny_model: Make, saved: Path, tmp_path: Path
) -> None:
    """In a process of its own, killed after two minutes: nothing else stops Python's matcher."""
    tiny_model("gpt2").save_pretrained(tmp_path / "base")
    config = json.loads((saved / "adapter_config.json").read_text())
    for number, (field, value) in enumerate(FIELDS.items()):
        shutil.copytree(saved, tmp_path / f"a{number}")
        name = field.partition(",")[0]
        changed = {name: value(r"(.*.*)*(\w+\.?)+!"), "layers_to_transform": [0]}
        (tmp_path / f"a{number}" / "adapter_config.json").write_text(json.dumps(config | changed))
    program = (
        "import sys\n"
        "from alignkit.errors import AlignkitError\n"
        "from alignkit.lora import load_adapter\n"
        "from alignkit.models import load_model\n"
        f"for number in range({len(FIELDS)}):\n"
        "    try:\n"
        f"        load_adapter(load_model('base'), f'a{{number}}')\n"
        "        print('loaded')\n"
        "    except AlignkitError as error:\n"
        "        print('refused:', error)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True, text=True, timeout=120, check=True, cwd=tmp_path,
    )  # fmt: skip
    assert len(run.stdout.splitlines()) == len(FIELDS)
