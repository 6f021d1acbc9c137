"""Judging a file's answers by a reward model, exported or not, and by DPO's implicit reward."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from alignkit.cli import main
from alignkit.data import PreferenceDataModule
from alignkit.engine import Example, collate, response_sums, score
from alignkit.errors import AlignkitError
from alignkit.lora import adapters_disabled
from alignkit.models.checkpoint import load_policy
from alignkit.modules import DPOModule
from alignkit.objectives.preference import (
    DPO,
    IPO,
    LDDPO,
    WPO,
    ForwardKLDPO,
    NormalizedDPO,
    PreferenceLoss,
    SimPO,
)
from alignkit.objectives.unpaired import KTO
from alignkit.tools.judge.command import judge
from alignkit.tools.judge.scoring import FoundJudge
from alignkit.tools.judge.trained import trained_with, weights_of
from tests.modules.helpers import trainer

ROWS = [
    {
        "prompt": f"Say {n}.",
        "chosen": f" {n}, of course: {'and ' * (n % 4)}so.",
        "rejected": f" No{n % 3}.",
    }
    for n in range(16)
]


@pytest.fixture
def pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALIGNKIT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def fit(kind: str, base: Path, pairs: Path, *more: object) -> Path:
    """Train for six steps by the command."""
    quiet = ["--trainer.logger", "false", "--trainer.enable_progress_bar", "false"]
    assert run(
        "fit", "--model", kind, "--model.base", base, "--data", "PreferenceDataModule",
        "--data.path", pairs, "--trainer.max_steps", 6, "--trainer.accelerator", "cpu",
        "--trainer.default_root_dir", kind, "--model.optimizer", "AdamW",
        "--model.optimizer.lr", 0.02, *more, *quiet,
    ) == 0  # fmt: skip
    return next(Path(kind).resolve().rglob("*.ckpt"))


@dataclass
class Unknown:
    """A loss of one's own, as a checkpoint has it that was written elsewhere."""

    inside: str = ""

    def to_dict(self) -> dict:
        own = {"class_path": "mine.Loss", "init_args": {"beta": 0.7}}
        if not self.inside:
            return own
        kind = {"of": "reweighted.WPO", "terms": "weighted.WeightedSum"}[self.inside]
        given = {self.inside: own if self.inside == "of" else [own]}
        return {"class_path": f"alignkit.objectives.{kind}", "init_args": given}


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_by_a_reward_model_and_its_export(
    model_dir: Callable,
    pairs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same scores by our checkpoint in packed rows and by transformers one by one."""
    pushed: list[tuple[Path, str]] = []
    monkeypatch.setattr("alignkit.tools.export.check_push", lambda repository: None)
    monkeypatch.setattr("alignkit.tools.export.push_folder", lambda *sent: pushed.append(sent))
    checkpoint = fit("RewardModule", model_dir("llama"), pairs, "--model.loss.center", 0.01)
    plain = tmp_path / "plain"
    export = ("export", "--model", checkpoint, "--to", "reward", "--output", plain)
    assert run(*export, "--push", "me/judge") == 0
    assert pushed == [(plain, "me/judge")]
    card = (plain / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card
    assert "A reward model over" in card
    assert "AutoModelForSequenceClassification.from_pretrained" in card
    found = {}
    for name, model in (("ours", checkpoint), ("theirs", plain)):
        output = tmp_path / f"{name}.jsonl"
        capsys.readouterr()
        assert run("judge", pairs, "--model", model, "--output", output) == 0
        assert "16 rows, first answer above the last in" in capsys.readouterr().out
        found[name] = rows_of(output)
    assert len(found["ours"]) == 16
    for ours, theirs in zip(found["ours"], found["theirs"], strict=True):
        assert ours["scores"] == pytest.approx(theirs["scores"], abs=1e-4)
        assert ours["scores"] == sorted(ours["scores"], reverse=True)
        assert len(set(ours["responses"])) == 2
    assert run("judge", pairs, "--model", checkpoint, "--beta", 0.1) == 2
    assert "--beta: " in capsys.readouterr().err
    again = judge(str(tmp_path / "ours.jsonl"), model=str(checkpoint))
    assert again.accuracy == 1.0
    assert judge(str(pairs), model=str(checkpoint)).accuracy > 0.5


def test_by_dpos_implicit_reward(model_dir: Callable, pairs: Path, tmp_path: Path) -> None:
    """β (log π − log π_base), and against another reference by its path."""
    checkpoint = fit("DPOModule", model_dir("gpt2"), pairs)
    output = tmp_path / "judged.jsonl"
    base = judge(str(pairs), model=str(checkpoint), beta=0.5, output=str(output))
    same = judge(str(pairs), model=str(checkpoint), beta=0.5, reference=str(model_dir("gpt2")))
    assert same.margin == pytest.approx(base.margin, rel=1e-4)
    rows = rows_of(output)
    policy, _ = load_policy(str(checkpoint))
    data = PreferenceDataModule(str(model_dir("gpt2")), str(output), prompt_format="boundary")
    data.setup()
    examples = data._set("train")
    batch = collate([examples[i] for i in range(len(examples))])
    with torch.no_grad():
        ours = response_sums(score(policy, batch), batch)
        with adapters_disabled(policy):
            ours = 0.5 * (ours - response_sums(score(policy, batch), batch))
    scores = [value for row in rows for value in row["scores"]]
    for value in ours.tolist():
        assert min(abs(value - each) for each in scores) < 1e-3
    assert judge(str(pairs), model=str(checkpoint), reference=str(checkpoint)).accuracy == 0.5


@pytest.mark.parametrize(
    "loss",
    [DPO(0.3), NormalizedDPO(), IPO(0.3), LDDPO(0.3), ForwardKLDPO(), WPO(IPO(0.7))],
    ids=lambda loss: type(loss).__name__,
)
def test_rewards_are_those_that_the_run_logs(
    loss: PreferenceLoss, model_dir: Callable, pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of rows of two answers, and each answer's own whatever stands beside it."""
    base = str(model_dir("gpt2"))
    torch.manual_seed(0)
    module = DPOModule(
        base, loss=loss, optimizer=lambda p: torch.optim.AdamW(p, lr=0.02), schedule="cosine"
    )
    held_out = PreferenceDataModule(
        base, str(pairs), splits={"train": "train", "validation": "train"}
    )
    quiet = trainer(pairs.parent, max_steps=6, num_sanity_val_steps=0)
    quiet.fit(module, held_out)
    quiet.save_checkpoint("run.ckpt")
    (logged,) = quiet.validate(module, held_out, verbose=False)
    found = judge(str(pairs), model="run.ckpt", output="ranked.jsonl")
    assert found.margin == pytest.approx(logged["val/rewards/margins"], rel=1e-3)
    assert found.accuracy == pytest.approx(logged["val/rewards/accuracies"])
    assert f"({type(loss).__name__}'s rewards, as in training)" in capsys.readouterr().out
    plain = judge(str(pairs), model="run.ckpt", beta=0.3)
    assert "(implicit rewards, 0.3 log π/π_ref)" in capsys.readouterr().out
    assert (plain == found) == (type(loss) is DPO)


def test_weights_of_tokens_are_those_of_the_shortest_other_answer() -> None:
    examples = [Example([1], [[2] * 3, [2] * 2, [2] * 4]), Example([1], [[2] * 2])]
    weights = weights_of(LDDPO(alpha=0.5), collate(examples), examples)
    assert weights.tolist() == [1, 1, 0.5, 1, 1, 1, 1, 0.5, 0.5, 1, 1]


def test_a_run_is_judged_as_it_was_trained(
    model_dir: Callable, pairs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Against the weights that it started from, and with its own β."""
    base = model_dir("gpt2")
    start = fit("DPOModule", base, pairs)
    loss = ["--model.loss", "IPO", "--model.loss.beta", 0.3]
    Path("DPOModule").rename("first")
    start = next(Path("first").resolve().rglob("*.ckpt"))
    policy = str(fit("DPOModule", base, pairs, "--model.init_from", start, *loss))
    found = judge(str(pairs), model=policy)
    assert f"--reference {start}: as the run was trained" in caplog.text
    assert found == judge(str(pairs), model=policy, reference=str(start))
    assert found.margin != judge(str(pairs), model=policy, reference=str(base)).margin
    start.rename(start.with_name("moved.ckpt"))
    with pytest.raises(AlignkitError, match=r"--reference: the run was trained against .*; name"):
        judge(str(pairs), model=policy)


def test_a_reference_that_moved_is_the_first_one(
    model_dir: Callable, pairs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By TR-DPO the last reference may be the policy itself, against which nothing is better."""
    base = model_dir("gpt2")
    policy = str(fit("DPOModule", base, pairs, "--model.reference_every", 1))
    named = judge(str(pairs), model=policy, reference=str(base))
    assert "refreshed its reference" not in caplog.text
    assert judge(str(pairs), model=policy) == named
    assert "the run refreshed its reference; the first is taken" in caplog.text


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"loss": DPO(0.3)}, (None, None, DPO(0.3))),
        ({"loss": DPO(0.3), "lora": None}, ("base", None, DPO(0.3))),
        ({"loss": IPO(0.3), "init_from": "sft"}, ("sft", None, IPO(0.3))),
        ({"loss": KTO(0.3), "init_from": "sft", "reference": "base"}, (None, 0.3, None)),
        ({"loss": DPO(), "init_from": "sft", "reference": "other"}, ("other", None, DPO())),
        ({"loss": SimPO(3.0), "init_from": "sft"}, (None, None, None)),
        ({"loss": WPO(SimPO(3.0)), "init_from": "sft"}, (None, None, None)),
        ({"loss": DPO(0.3), "init_from": "sft", "reference": "none"}, (None, None, None)),
        ({"loss": WPO(IPO(0.3)), "init_from": "sft"}, ("sft", None, WPO(IPO(0.3)))),
        ({"loss": Unknown(), "init_from": "sft"}, ("sft", 0.7, None)),
        ({"loss": Unknown("of"), "init_from": "sft"}, ("sft", 0.7, None)),
        ({"loss": Unknown("terms"), "init_from": "sft"}, ("sft", 0.7, None)),
        ({"init_from": "sft"}, (None, None, None)),
    ],
    ids=str,
)
def test_what_a_run_was_trained_with(settings: dict, found: tuple) -> None:
    """Reference and loss, or β; nothing of losses without one, nor of other stages."""
    given = {"base": "base", "lora": {"r": 8}, "init_from": None, **settings}
    if "loss" in settings:
        given = {"reference": None, **given, "loss": settings["loss"].to_dict()}
    assert trained_with(given) == found


def test_what_cannot_be_judged_is_one_line(
    model_dir: Callable, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = model_dir("gpt2")
    assert run("judge", pairs, "--model", base) == 2
    assert "is a whole model, whose implicit reward needs --reference" in capsys.readouterr().err
    with pytest.raises(AlignkitError, match="--split nowhere"):
        judge(str(pairs), model=str(base), reference=str(base), split="nowhere")
    (tmp_path / "sft.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    assert run("judge", tmp_path / "sft.jsonl", "--model", base, "--reference", base) == 2
    line = capsys.readouterr().err.strip()
    assert "sft.jsonl:1" in line and "\n" not in line
    assert line.endswith("mend the row")  # there are no policies to set


def test_a_reference_with_other_tokens_is_refused(
    model_dir: Callable, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, odd = model_dir("gpt2"), tmp_path / "odd"
    shutil.copytree(base, odd)
    tokens = AutoTokenizer.from_pretrained(base)
    tokens.add_tokens(["bread"])
    tokens.save_pretrained(odd)
    assert run("judge", pairs, "--model", base, "--reference", odd) == 2
    line = capsys.readouterr().err.strip()
    assert line.startswith("alignkit: error: --reference") and "\n" not in line
    assert "tokenizer has other tokens" in line or "embedding" in line


def test_dropped_rows_are_told(
    model_dir: Callable, pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*ROWS[:2], {"prompt": "a", "chosen": " same", "rejected": " same"}, ROWS[2]]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = model_dir("gpt2")
    assert run("judge", pairs, "--model", base, "--reference", base) == 0
    out = capsys.readouterr().out
    assert "3 rows, dropped 1 (line 3; alignkit audit says why), first answer" in out
    pairs.write_text(json.dumps(rows[2]) + "\n")
    assert run("judge", pairs, "--model", base, "--reference", base) == 2
    assert "has no row to judge, dropped 1 (line 1;" in capsys.readouterr().err
    pairs.write_text(json.dumps(ROWS[0]) + "\n")
    assert run("judge", pairs, "--model", base, "--reference", base) == 0
    out = capsys.readouterr().out
    assert "1 row, first" in out and "nan" not in out and "±" not in out


def test_an_empty_answer_does_not_cost_its_row(
    model_dir: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of sampled rows alone: in anyone else's, an empty answer is for a policy to judge."""
    rows = [
        {"prompt": "Say 1.", "candidates": ["One.", "", "1.", " "]},
        {"prompt": "Say 2.", "candidates": ["", "Two."]},
        {"prompt": "Say 3.", "candidates": ["Three.", "3."]},
    ]
    drawn, ranked = tmp_path / "drawn.jsonl", tmp_path / "ranked.jsonl"
    drawn.write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = model_dir("gpt2")
    command = ("judge", drawn, "--model", base, "--reference", model_dir("llama"))
    assert run(*command, "--output", ranked) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "2 rows, 2 empty answers left out, dropped 1 (line 2;" in told
    assert [sorted(row["responses"]) for row in rows_of(ranked)] == [
        ["1.", "One."],
        ["3.", "Three."],
    ]
    drawn.write_text(drawn.read_text().replace("candidates", "responses"))
    assert run(*command, "--output", ranked) == 0
    assert "1 row, dropped 2 (line 1, 2;" in capsys.readouterr().out


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_repeated_answer_does_not_cost_its_row(
    model_dir: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of each text is judged; a row of one text alone is dropped, and audit can read it."""
    rows = [
        {"prompt": "Say 1.", "candidates": ["Fig.", "Fig. ", "Oak.", " ", "Ash."]},
        {"prompt": "Say 2.", "candidates": ["Fig.", "Fig."]},
        {"prompt": "Say 3.", "candidates": ["Three.", "3."]},
    ]
    drawn, ranked = write(tmp_path / "drawn.jsonl", rows), tmp_path / "ranked.jsonl"
    command = ("judge", drawn, "--model", model_dir("gpt2"), "--reference", model_dir("llama"))
    assert run(*command, "--output", ranked) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "2 rows, 1 empty answer left out, 1 repeated answer left out, dropped 1 (line 2;" in told
    judged = [sorted(row["responses"]) for row in rows_of(ranked)]
    assert judged == [["Ash.", "Fig.", "Oak."], ["3.", "Three."]]
    assert run("audit", drawn, "--columns.responses", "candidates") == 0
    assert "alignkit audit --columns.responses candidates says why" in told


def test_an_answer_that_begins_as_a_dialogue_does_not_cost_the_file(
    model_dir: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training would refuse it, as its label would come twice, and judge refused all rows."""
    drawn, ranked = tmp_path / "drawn.jsonl", tmp_path / "ranked.jsonl"
    rows = [
        {"prompt": "Say.", "candidates": ["a", "Assistant: b", "c"]},
        {"prompt": "\n\nHuman: Say.\n\nAssistant:", "candidates": ["a", "Assistant: b", "c"]},
    ]
    write(drawn, rows)
    command = ("judge", drawn, "--model", model_dir("gpt2"), "--reference", model_dir("llama"))
    assert run(*command, "--output", ranked) == 0
    assert "2 rows, 1 templated answer left out, first" in capsys.readouterr().out
    assert [len(row["responses"]) for row in rows_of(ranked)] == [2, 3]
    write(drawn, [*rows, {"prompt": "Say.", "candidates": ["Assistant: a", "b", ""]}])
    assert run(*command, "--output", ranked) == 0
    told = capsys.readouterr().out
    assert "2 rows, 2 templated answers left out, 1 row without two others left out, first" in told
    assert run(*command, "--output", ranked, "--prompt_format", "raw") == 0
    assert [len(row["responses"]) for row in rows_of(ranked)] == [3, 3, 2]


def test_answers_that_were_cut_are_counted(
    model_dir: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where they are drawn and where they are ranked: training would end them there."""
    drawn, ranked = tmp_path / "drawn.jsonl", tmp_path / "ranked.jsonl"
    options = ["--prompts", "Say 1.", "--answers", 3, "--max_new_tokens", 4]
    assert run("sample", "--model", model_dir("gpt2"), *options, "--output", drawn) == 0
    (row,) = rows_of(drawn)
    cut = sum(not each["ended"] for each in row["drawn"])
    assert cut > 0
    told = " ".join(capsys.readouterr().out.split())
    assert f"3 answers to each; {cut} of 3 answers were cut at max_new_tokens" in told
    rows = [{"prompt": "Say.", "candidates": ["a", "b", " "], "drawn": [{"ended": False}] * 3}]
    write(drawn, rows)
    command = ("judge", drawn, "--model", model_dir("gpt2"), "--reference", model_dir("llama"))
    assert run(*command, "--output", ranked) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "2 answers were cut at max_new_tokens and would be trained as if they ended" in told


def test_answers_that_were_cut_are_left_out_on_demand(
    model_dir: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An answer that ended elsewhere stays; a row goes of which fewer than two answers remain."""
    drawn, ranked = tmp_path / "drawn.jsonl", tmp_path / "ranked.jsonl"
    ends = [True, False, False, True, True]
    rows = [
        {
            "prompt": "Say.",
            "candidates": ["ash", "fig", "oak", "oak", " "],
            "drawn": [{"ended": each} for each in ends],
        },
        {
            "prompt": "Sing.",
            "candidates": ["ash", "fig"],
            "drawn": [{"ended": True}, {"ended": False}],
        },
    ]
    write(drawn, rows)
    command = ("judge", drawn, "--model", model_dir("gpt2"), "--reference", model_dir("llama"))
    assert run(*command, "--output", ranked, "--unended", "drop") == 0
    told = " ".join(capsys.readouterr().out.split())
    assert (
        "1 row, 1 empty answer left out, 1 repeated answer left out, 1 answer was cut at "
        "max_new_tokens and left out, 1 row without two others left out, first" in told
    )
    assert [sorted(row["responses"]) for row in rows_of(ranked)] == [["ash", "oak"]]
    write(drawn, [{"prompt": "Say.", "chosen": "ash", "rejected": "fig"}])
    assert run(*command, "--unended", "drop") == 2
    assert "--unended drop: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "shape",
    [
        lambda answers, scores: {"responses": answers, "scores": scores},
        lambda answers, scores: {"completions": answers, "ranks": [-score for score in scores]},
        lambda answers, scores: {
            "answers": [
                {"text": each, "score": score} for each, score in zip(answers, scores, strict=True)
            ]
        },
    ],
)
def test_scores_of_the_file_drop_no_answer(
    shape: Callable, model_dir: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ties, too: a judge is there to break them."""
    scored = [(["a one", "b two", "c three"], [1, 2, 1]), (["a", "b"], [2, 2])]
    rows = [{"prompt": "Say it.", **shape(*each)} for each in scored]
    path, ranked = write(tmp_path / "tied.jsonl", rows), tmp_path / "ranked.jsonl"
    command = ("judge", path, "--model", model_dir("gpt2"), "--reference", model_dir("llama"))
    assert run(*command, "--output", ranked) == 0
    assert "2 rows, first answer" in " ".join(capsys.readouterr().out.split())
    judged = [dict(zip(row["responses"], row["scores"], strict=True)) for row in rows_of(ranked)]
    assert [sorted(each) for each in judged] == [["a one", "b two", "c three"], ["a", "b"]]
    # First above last is by the order of the file's scores: "b two" is the first, "c three" last.
    verdict = judge(str(path), model=str(command[3]), reference=str(command[5]))
    expected = [judged[0]["b two"] - judged[0]["c three"], judged[1]["a"] - judged[1]["b"]]
    assert verdict.margin == pytest.approx(sum(expected) / 2, abs=1e-5)


def test_scored_columns_by_other_names(model_dir: Callable, tmp_path: Path) -> None:
    rows = [{"prompt": "Say it.", "texts": ["a", "b", "c"], "marks": [1, 1, 3]}]
    path, ranked = write(tmp_path / "tied.jsonl", rows), tmp_path / "ranked.jsonl"
    names = ("--columns.responses", "texts", "--columns.scores", "marks")
    judges = ("--model", model_dir("gpt2"), "--reference", model_dir("llama"))
    assert run("judge", path, *judges, *names, "--output", ranked) == 0
    assert sorted(rows_of(ranked)[0]["responses"]) == ["a", "b", "c"]


def test_cut_prompts_are_told(
    model_dir: Callable, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As many tokens as the judge was trained with are the default."""
    checkpoint = fit("RewardModule", model_dir("gpt2"), pairs, "--data.max_length", 48)
    rows = [{**ROWS[0], "prompt": "Keep to the rule. " * 20 + "Say 1."}, ROWS[1]]
    path = write(tmp_path / "long.jsonl", rows)
    for flags, cut in (((), 48), (("--max_length", 64), 64), (("--max_length", 2000), 0)):
        capsys.readouterr()
        assert run("judge", path, "--model", checkpoint, *flags) == 0
        told = " ".join(capsys.readouterr().out.split())
        assert (f"2 rows, 1 prompt cut to max_length={cut}, first" in told) == bool(cut), told
        assert ("2 rows, first" in told) != bool(cut)


def test_no_file_is_lost(
    model_dir: Callable, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither that of the rows nor an output that is there, where a row cannot be read."""
    judges = ("--model", model_dir("gpt2"), "--reference", model_dir("llama"))
    before = pairs.read_text()
    (tmp_path / "link.jsonl").symlink_to(pairs)
    for output in (pairs, tmp_path / "link.jsonl"):
        assert run("judge", pairs, *judges, "--output", output) == 2
        assert "is a file that is read; name another" in capsys.readouterr().err
    assert pairs.read_text() == before
    bad = write(tmp_path / "bad.jsonl", [*ROWS * 40, {"prompt": "Say it.", "chosen": "a"}])
    whole = write(tmp_path / "whole.jsonl", [{"prompt": "a", "responses": ["b", "c"]}])
    for output, kept in ((whole, f"{whole}.partial"), (tmp_path / "new.jsonl", "")):
        assert run("judge", bad, *judges, "--output", output, "--tokens_per_batch", 500) == 2
        assert "bad.jsonl:641" in capsys.readouterr().err
        assert 0 < len(rows_of(Path(kept or output))) < 641
    assert len(rows_of(whole)) == 1


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--beta", -1), ("--beta", 0), ("--tokens_per_batch", 0)],
)
def test_numbers_out_of_range_are_refused(
    model_dir: Callable,
    pairs: Path,
    flag: str,
    value: object,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = model_dir("gpt2")
    assert run("judge", pairs, "--model", base, "--reference", base, flag, value) == 2
    assert f"{flag} {value}: must be" in capsys.readouterr().err.replace(f"{value}.0", f"{value}")


def test_a_stop_leaves_the_rows_so_far(
    model_dir: Callable, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopping(examples: list) -> list[list[float]]:
        if seen:
            raise KeyboardInterrupt
        seen.append(1)
        return [[1.0, 0.0] for _ in examples]

    seen: list[int] = []
    _, tokenizer = load_policy(str(model_dir("gpt2")))
    place = "alignkit.tools.judge.command"
    monkeypatch.setattr(f"{place}.find_judge", lambda *_: FoundJudge("some", is_reward=True))
    monkeypatch.setattr(f"{place}.load_scorer", lambda *_: (stopping, tokenizer))
    output = tmp_path / "judged.jsonl"
    with pytest.raises(KeyboardInterrupt):
        judge(str(pairs), model="some", output=str(output), tokens_per_batch=50)
    assert 0 < len(rows_of(output)) < len(ROWS)
