"""The first five minutes: help, version, mistaken words, progress and the end of a fit."""

from __future__ import annotations

import logging
import os
import pty
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import alignkit
from alignkit.cli.commands import COMMANDS
from alignkit.utils import phases
from alignkit.utils.progress import counting
from tests.cli.test_fit import quick

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
HEAVY = "print([m for m in ('torch', 'lightning', 'jsonargparse') if m in sys.modules])"


def front(*arguments: str) -> tuple[int, str, str]:
    """Run a command in a process of its own; last line: the heavy libraries it imported."""
    code = f"import sys; from alignkit.__main__ import main as run; s = run(); {HEAVY}; sys.exit(s)"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stdout, done.stderr


def test_help_is_at_hand() -> None:
    status, out, _ = front("--help")
    assert status == 0
    assert out.splitlines()[-1] == "[]"  # nothing heavy was imported
    assert out.startswith("usage: alignkit ")
    assert "Lightning" not in out
    for name, command in COMMANDS.items():
        assert re.search(rf"^    {name} +{re.escape(command.summary)}$", out, re.M), name
    assert out.partition("Examples:")[2].count("\n  alignkit ") == 3
    assert max(map(len, out.splitlines())) <= 80


def test_version() -> None:
    status, out, _ = front("--version")
    assert (status, out.splitlines()) == (0, [f"alignkit {alignkit.__version__}", "[]"])


@pytest.mark.parametrize(
    ("name", "value"),
    [("RANK", "x"), ("LOCAL_RANK", ""), ("SLURM_PROCID", "-1"), ("MASTER_PORT", "2e4")],
)
def test_a_launcher_s_variable_is_a_number(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Libraries would fail at it as they are imported; help needs none of them."""
    monkeypatch.setenv(name, value)
    status, out, err = front("sft", "--base", "model", "--data", "rows")
    assert (status, out.splitlines()) == (2, ["[]"])
    assert f"alignkit: error: {name}={value!r} in the environment: must be a whole number" in err
    assert err.count("\n") == 1
    assert front("--help")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["gnerate"], "gnerate: no such command; did you mean generate?"),
        ([], "give a subcommand"),
        (["completion", "fish"], "completion: got fish; give one of bash, zsh"),
    ],
)
def test_mistaken_commands(arguments: list[str], line: str) -> None:
    status, out, err = front(*arguments)
    assert status == 2
    assert err.startswith("alignkit: error: ")
    assert line in err
    assert out.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--base", "x"], "did you mean model.base?"),
        (["--tokens_per_bacth", "3"], "did you mean data.tokens_per_batch?"),
        (["--model.loss", "IPOO"], "did you mean IPO?"),
        (["--model.loss.beat", "3"], "did you mean beta?"),
        (["--model.lora.targets+", "c_attn"], "model.lora.targets: nothing can be added to it"),
        (["--data.nosuch+", "1"], "data.nosuch+: no such option"),
        (
            ["--model.loss", "WeightedSum", "--model.loss.terms+=DPO"],
            "model.loss.terms: nothing can be added to it; give the whole list: '[…, …]'; see",
        ),
    ],
)
def test_a_mistaken_option_names_what_is_meant(
    alignkit: Callable, arguments: list[str], told: str
) -> None:
    stage = ("--model", "DPOModule", "--data", "HHPreferenceDataModule")
    status, _, err = alignkit("fit", *stage, *arguments)
    assert status == 2
    assert told in err


def test_an_option_before_its_class(alignkit: Callable) -> None:
    status, _, err = alignkit("fit", "--data.path", "x", "--data", "HHPreferenceDataModule")
    assert status == 2
    assert "data.path: no such option; give --data CLASS before it" in err


@pytest.mark.parametrize("named", [True, False])
def test_help_of_fit_begins_with_model_and_data(alignkit: Callable, named: bool) -> None:
    stage = ("--model", "DPOModule", "--data", "HHPreferenceDataModule") if named else ()
    status, out, _ = alignkit("fit", *stage, "--help")
    assert status == 0
    assert "Lightning Trainer command line tool" not in out
    places = [
        out.index(f"\n  --{option} ")
        for option in ("model.base", "data.path", "ckpt_path", "trainer.max_steps")
    ]
    assert places == sorted(places)
    assert ("--model.reference_cache" in out) is named
    assert ("--data.policies" in out) is named
    assert out.index("--model.base") < 1500 or named


def test_help_of_fit_reads_the_configuration(alignkit: Callable) -> None:
    config = Path(alignkit_home()) / "configs" / "demo" / "lora.yaml"
    _, out, _ = alignkit("fit", "--config", config, "--help")
    assert "--data.block_size" in out


def alignkit_home() -> Path:
    return Path(alignkit.__file__).parents[1]


def test_a_fit_that_is_piped(alignkit: Callable, model_dir: Callable, hh: Path, text: Path) -> None:
    """Lines tell the steps; the last ones what was written, and commands that can be typed."""
    arguments = quick("demo/sft.yaml", model_dir, hh, text)
    status, out, err = alignkit(*arguments, "--trainer.enable_progress_bar", "true")
    assert status == 0, err
    assert "\x1b" not in out
    steps = re.findall(r"^step (\d+)/(\d+)  loss \d+\.\d{3}.* tok/s$", out, re.M)
    assert steps[0][0] == "1"
    assert steps[-1][0] == steps[-1][1]
    wrote, following, curves = out.splitlines()[-3:]
    folder = wrote.removeprefix("wrote ").partition(":")[0]
    assert (Path(folder) / "last.ckpt").is_file()
    assert "last.ckpt" in wrote
    assert "config.yaml" in wrote
    assert following.startswith("next: alignkit ")
    assert folder in following
    assert curves.startswith("curves: tensorboard --logdir ")


def test_quiet(alignkit: Callable, model_dir: Callable, hh: Path, text: Path) -> None:
    arguments = quick("demo/sft.yaml", model_dir, hh, text)
    bar = ("--trainer.enable_progress_bar", "true")
    status, out, err = alignkit(*arguments, *bar, "--quiet")
    assert (status, out) == (0, "")
    assert "encoding" not in err
    assert "Seed set" not in err


@pytest.mark.parametrize("colour", [True, False])
def test_the_bar_fits_a_terminal_and_log_lines_stay_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, colour: bool
) -> None:
    code = (
        "import logging, sys\n"
        "from alignkit.cli.logs import configure_logs\n"
        "configure_logs()\n"
        "from alignkit.utils.progress import Display\n"
        "with Display(sys.stdout) as display:\n"
        "    count = display.count('step', 200000)\n"
        "    for step in (1, 99999, 200000):\n"
        "        count.reach(step, 'loss 0.693  val 0.651  12,345 tok/s', now=True)\n"
        "        logging.getLogger('alignkit').info('a line about step %d', step)\n"
    )
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    if not colour:
        monkeypatch.setenv("NO_COLOR", "1")
    raw = in_terminal([sys.executable, "-c", code])
    shown = [ESCAPE.sub("", part) for part in re.split(r"[\r\n]+", raw)]
    assert max(map(len, shown)) <= 80
    assert [f"a line about step {n}" for n in (1, 99999, 200000)] == [
        line for line in shown if line.startswith("a line")
    ]
    bars = [line for line in shown if line.startswith("step ")]
    assert "step 200000/200000" in bars[-1]
    assert "12,345 tok/s" in bars[-1]
    assert ("\x1b[91m" in raw or "\x1b[38" in raw) is colour


def in_terminal(command: list[str]) -> str:
    """Run a command in a terminal and return all that it wrote."""
    child, terminal = pty.fork()
    if child == 0:
        os.execv(command[0], command)
    parts = []
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # Linux's way to say that the other end is closed
            break
        if not part:
            break
        parts.append(part)
    assert os.waitpid(child, 0)[1] == 0
    return b"".join(parts).decode()


def test_a_count_is_lines_elsewhere(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "alignkit")  # as a command sets it
    with counting("row", 100) as count:
        for row in range(1, 101):
            count.reach(row)
    assert capsys.readouterr().err.split() == [
        part for n in (1, *range(10, 101, 10)) for part in ("row", f"{n}/100")
    ]


def test_a_long_phase_gives_a_sign_of_life(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(phases, "AFTER_SECONDS", 0.05)
    monkeypatch.setattr(phases, "EVERY_SECONDS", 0.05)
    with caplog.at_level(logging.INFO, "alignkit"):
        with phases.phase("short"):
            pass
        with phases.phase("long"):
            time.sleep(0.4)
    assert caplog.messages[0] == "long …"
    assert "long … 0 s so far" in caplog.messages
    assert not any("short" in line for line in caplog.messages)


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion(alignkit: Callable, shell: str, tmp_path: Path) -> None:
    status, out, err = alignkit("completion", shell)
    assert status == 0, err
    script = tmp_path / "script"
    script.write_text(out)
    if shell == "zsh":
        assert "bashcompinit" in out
        return
    ask = '. ./script; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _alignkit; echo ${COMPREPLY[@]}'

    def complete(*words: str) -> list[str]:
        done = subprocess.run(
            ["bash", "-c", ask, "bash", "alignkit", *words],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            check=True,
        )
        return done.stdout.split()

    assert complete("gen") == ["generate"]
    assert complete("generate", "--prompts_") == ["--prompts_file"]
    assert complete("fit", "--model", "D") == ["DPOModule"]
    assert complete("fit", "--data", "HHP") == ["HHPreferenceDataModule"]
    assert complete("fit", "--model.loss", "IP") == ["IPO"]
    assert complete("fit", "--model.reference_ca") == ["--model.reference_cache"]
    assert complete("completion", "") == ["bash", "zsh"]
    assert complete("fit", "--config", "scr") == ["script"]
