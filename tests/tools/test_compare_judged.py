"""`compare --judge`: each answer's score, and how a model stands beside the first."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from alignkit.cli import main
from alignkit.data.encode.tokens import TextEncoder
from alignkit.engine import Example, collate, response_sums, score
from alignkit.errors import AlignkitError
from alignkit.models import load_model, load_tokenizer
from alignkit.tools.compare import compare
from alignkit.tools.compare_page import comparison_page
from alignkit.tools.generate.answer import Answer
from alignkit.tools.generate.gauges import Gauges
from alignkit.tools.judge import scoring
from alignkit.tools.judge.command import judge
from alignkit.tools.judge.rating import Judge, rate
from alignkit.tools.judge.verdict import Verdict, at_equal_length

PROMPTS = ["Who are you?", "Why is the sky blue?", "Say no.", "How?"]
ANSWERS = {
    "base": ["I am.", "", "No.", "Like this.\n\nHuman: And then?"],
    "dpo": ["I am a model.", "It scatters.", "No.", "So."],
}


def test_every_answer_is_scored_as_the_command_scores_a_file(
    moved_models: dict[str, str], tmp_path: Path
) -> None:
    found = Judge(moved_models["dpo"], beta=0.5).scores(PROMPTS, ANSWERS, torch.device("cpu"))
    assert {name: len(scores) for name, scores in found.items()} == {"base": 4, "dpo": 4}
    whole = [
        index for index, answer in enumerate(ANSWERS["base"]) if answer and "Hum" not in answer
    ]
    rows = [
        {"prompt": PROMPTS[i], "chosen": ANSWERS["dpo"][i], "rejected": ANSWERS["base"][i]}
        for i in whole
        if ANSWERS["dpo"][i] != ANSWERS["base"][i]
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    judge(
        str(tmp_path / "pairs.jsonl"), model=moved_models["dpo"], beta=0.5,
        output=str(tmp_path / "ranked.jsonl"),
    )  # fmt: skip
    ranked = [json.loads(line) for line in (tmp_path / "ranked.jsonl").read_text().splitlines()]
    told = {
        (
            row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"],
            answer,
        ): (score)
        for row in ranked
        for answer, score in zip(row["responses"], row["scores"], strict=True)
    }
    assert len(told) == 2 * len(rows) > 0
    for (prompt, answer), scored in told.items():
        index = next(i for i, each in enumerate(PROMPTS) if each in prompt)
        name = next(n for n in ANSWERS if ANSWERS[n][index].strip() == answer.strip())
        assert found[name][index] == pytest.approx(scored, abs=1e-5)
    assert found["base"][2] == pytest.approx(found["dpo"][2], abs=1e-6)  # the same answer


def test_a_dialogue_is_scored_as_the_command_scores_it(
    moved_models: dict[str, str], tmp_path: Path
) -> None:
    """With the empty line in front of its first ``Human:``."""
    prompts = [f"\n\nHuman: {prompt}\n\nAssistant:" for prompt in PROMPTS]
    answers = {"one": [f"Yes {n}." for n in range(4)], "two": [f"No, not {n}." for n in range(4)]}
    found = Judge(moved_models["dpo"]).scores(prompts, answers, torch.device("cpu"))
    rows = [
        {"prompt": prompt, "chosen": one, "rejected": two}
        for prompt, one, two in zip(prompts, answers["one"], answers["two"], strict=True)
    ]
    pairs, ranked = tmp_path / "pairs.jsonl", tmp_path / "ranked.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    judge(str(pairs), model=moved_models["dpo"], output=str(ranked))
    told = [json.loads(line) for line in ranked.read_text().splitlines()]
    for index, row in enumerate(told):
        scored = dict(zip(map(str.strip, row["responses"]), row["scores"], strict=True))
        for name in ("one", "two"):
            wanted = pytest.approx(scored[answers[name][index]], abs=1e-5)
            assert found[name][index] == wanted


def test_ratings_beside_the_first_model() -> None:
    scores = {"base": [0.0, 1.0, 2.0, 0.5], "dpo": [1.0, 1.0, 3.0, 0.0]}
    answers = {"base": ["a"] * 4, "dpo": ["a"] * 4}
    rating = rate(scores, answers)["dpo"]
    assert rating.score == 1.25 and rating.wins == 0.625  # two won, one tied, one lost
    assert rating.wins_error == pytest.approx((0.229167 / 4) ** 0.5, abs=1e-5)
    assert rating.equal_length == pytest.approx(0.625, abs=2e-3)  # the prior pulls a little
    assert rate(scores, answers)["base"].wins != rate(scores, answers)["base"].wins  # NaN
    assert Verdict.of([1.0]).error != Verdict.of([1.0]).error  # NaN


def loss(theta: float, phi: float, wins: torch.Tensor, slope: torch.Tensor) -> float:
    chance = torch.sigmoid(theta + phi * slope)
    likely = wins * chance.log() + (1 - wins) * (1 - chance).log()
    return float(-likely.sum() + 0.005 * (theta**2 + phi**2))


def test_the_share_at_equal_length_is_the_regressions() -> None:
    """Against a search over both coefficients, and against resampling for its error."""
    generator = torch.Generator().manual_seed(0)
    longer = torch.randn(200, generator=generator, dtype=torch.float64) * 30 + 20
    slope = torch.tanh(longer / longer.square().mean().sqrt())
    noise = torch.rand(200, generator=generator, dtype=torch.float64)
    wins = (noise < torch.sigmoid(0.3 + 1.5 * slope)).double()
    share, error = at_equal_length((2 * wins - 1).tolist(), longer.tolist())
    grid = torch.linspace(-2, 4, 241).tolist()
    theta, _ = min(((t, p) for t in grid for p in grid), key=lambda at: loss(*at, wins, slope))
    assert share == pytest.approx(torch.sigmoid(torch.tensor(theta)).item(), abs=0.005)
    again = []
    for _ in range(60):
        chosen = torch.randint(200, (200,), generator=generator)
        part = (2 * wins[chosen] - 1).tolist(), longer[chosen].tolist()
        again.append(at_equal_length(*part)[0])
    assert error == pytest.approx(torch.tensor(again).std().item(), rel=0.4)
    # A judge that likes length alone: longer answers win, and at equal length nobody does.
    halves = [1.0, 1.0, -1.0, -1.0] * 20, [9.0, 5.0, -9.0, -5.0] * 20
    assert at_equal_length(*halves)[0] == pytest.approx(0.5, abs=1e-3)
    assert at_equal_length([1.0] * 30, [0.0] * 30)[0] > 0.95


def test_compare_shows_the_judge(
    moved_models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {name: str(tmp_path / f"out.{name}") for name in ("json", "html", "markdown")}
    found = compare(
        moved_models, prompts=PROMPTS, max_new_tokens=6, temperature=0, device="cpu",
        judge=moved_models["dpo"], **files,
    )  # fmt: skip
    written = json.loads(Path(files["json"]).read_text())
    assert written["scores"] == found.scores and set(written["gauges"]) == {"base", "dpo"}
    assert written["ratings"]["dpo"]["wins"] == found.ratings["dpo"].wins
    line = next(each for each in found.summary() if each.startswith("dpo"))
    assert "above base in" in line and "at equal length" in line and "ended by itself" in line
    assert " ".join(line.split()) in " ".join(capsys.readouterr().out.split())
    assert "above base in" in Path(files["markdown"]).read_text()
    page = Path(files["html"]).read_text()
    assert "above base" in page and "★" in page
    plain = compare(
        moved_models,
        prompts=PROMPTS,
        max_new_tokens=6,
        temperature=0,
        device="cpu",
        json=files["json"],
    )
    assert plain.answers == found.answers
    assert "scores" not in json.loads(Path(files["json"]).read_text())


def test_a_judge_is_refused_before_anything_is_answered(
    moved_models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["compare", "--models", moved_models["base"], "--prompts", "Hi"]
    runs = str(tmp_path / "runs")
    for flags, part in (
        (["--judge", f"{runs}/nope.ckpt"], "nope.ckpt"),
        (["--judge", f"{runs}/nope"], f"judge '{runs}/nope'"),
        (
            ["--judge", moved_models["dpo"], "--judge_reference", f"{runs}/no"],
            f"judge_reference '{runs}/no'",
        ),
        (["--judge", moved_models["base"]], "is a whole model, whose implicit reward needs"),
        (["--judge_beta", "0.2"], "--judge_beta: belongs to --judge"),
        (
            ["--judge", moved_models["dpo"], "--judge_beta", "-1"],
            "--judge_beta -1.0: must be above 0",
        ),
    ):
        assert main([*given, *flags]) == 2
        err = capsys.readouterr().err
        assert part in err and "prompt 1" not in err


def test_a_judge_that_fails_takes_nothing_away(
    moved_models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the answers nor what was said of a model that failed."""

    def fail(*_: object) -> None:
        raise AlignkitError("--judge: out of positions")

    monkeypatch.setattr(Judge, "scores", fail)
    out = tmp_path / "out.json"
    models = {**moved_models, "gone": str(tmp_path / "gone.ckpt")}
    with pytest.raises(AlignkitError, match=r"1 of 3 failed: gone: .*; --judge: out of positions"):
        compare(
            models,
            prompts="Hi",
            max_new_tokens=3,
            device="cpu",
            judge=moved_models["dpo"],
            json=str(out),
        )
    assert set(json.loads(out.read_text())["answers"]) == {"base", "dpo"}


def test_one_prompt_has_no_error_to_show(
    moved_models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, page = tmp_path / "out.json", tmp_path / "out.html"
    compare(
        moved_models, prompts="Hi", max_new_tokens=3, device="cpu", judge=moved_models["dpo"],
        json=str(out), html=str(page),
    )  # fmt: skip
    told = capsys.readouterr().out
    assert "above base in" in told and "nan%" not in told
    assert "nan%" not in page.read_text() and "NaN" not in out.read_text()


def test_scores_that_are_not_finite_are_refused(
    moved_models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "response_sums", lambda *_: torch.tensor([float("nan")]))
    with pytest.raises(AlignkitError, match=r"--judge .*: gives a score that is not finite"):
        Judge(moved_models["dpo"]).scores(["Hi"], {"a": ["Yes."]}, torch.device("cpu"))


def test_an_answer_beyond_the_judge_is_one_line(moved_models: dict[str, str]) -> None:
    with pytest.raises(AlignkitError, match=r"--judge .*cannot score an answer: .* tokens exceed"):
        Judge(moved_models["dpo"]).scores(["Hi"], {"a": ["q" * 3000]}, torch.device("cpu"))


def test_an_answer_without_a_text_is_counted() -> None:
    """It counts as ended by itself, and would pass for a short one."""
    answers = [Answer("", (), ended=True, end=(0,)), Answer("Yes.", (5, 6), ended=True, end=(0,))]
    gauges = Gauges.of(answers)
    assert gauges.empty == 0.5 and gauges.ended == 1.0 and "50% empty" in str(gauges)
    page = comparison_page(["Why?", "How?"], {"sft": answers}, {"sft": [[], []]}, {})
    assert re.search(r"<th[^>]*>empty</th>", page) and "<td class=n>50%</td>" in page


def test_an_answer_stopped_at_the_human_s_turn_ran_on() -> None:
    """It was cut there by us, and did not end by its own token."""
    answers = [
        Answer("Yes.", (5, 6), ended=True),
        Answer("Yes.\n\nHuman: And?", (5, 6, 7), ended=False),
        Answer("Yes.", (5, 6), ended=True, end=(0,)),
        Answer("Yes and", (5, 6), ended=False),
    ]
    gauges = Gauges.of(answers)
    assert gauges.run_on == 0.5 and gauges.ended == 0.25
    assert Gauges.errors(answers).run_on == pytest.approx((1 / 3 / 4) ** 0.5)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_any_answer_can_be_scored(
    model_dir: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    """Also one whose first letters would join the prompt's last token, or that holds markers."""
    base = str(model_dir(family))
    other = load_model(base)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    other.save_pretrained(tmp_path / "other")
    load_tokenizer(base).save_pretrained(tmp_path / "other")
    answers = ["", "\n\n", ":ing", " <|endoftext|> more", "\u0000", "é" * 40, "Assistant: again"]
    judging = Judge(str(tmp_path / "other"), base, beta=1.0)
    found = judging.scores(["Hi?"] * len(answers), {"odd": answers}, torch.device("cpu"))["odd"]
    assert len(set(found)) == len(found)
    tokenizer = load_tokenizer(base)
    asked = TextEncoder(tokenizer)
    (prompt,), (said,) = asked(["\n\nHuman: Hi?\n\nAssistant:"]), asked([" " + "é" * 40])
    batch = collate([Example(prompt, [[*said, tokenizer.eos_token_id]])])
    with torch.no_grad():
        sums = [
            response_sums(score(m.eval(), batch), batch).item() for m in (other, load_model(base))
        ]
    assert found[answers.index("é" * 40)] == pytest.approx(sums[0] - sums[1], abs=1e-4)
