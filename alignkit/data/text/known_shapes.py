"""List the shapes that rows come in: the columns that make each, and how they are read.

To add one, add an entry to `PREFERENCE` or `SFT` below. What it reads is the same row in the
columns of `SPOKEN`, which `alignkit.data.text.shapes` understands.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from alignkit.data.text.dialogue import RowError
from alignkit.data.text.questions import (
    ALPACA,
    PROMPTS,
    QUESTIONS,
    SYSTEM,
    TALKS,
    Question,
    asking,
    led,
    system_of,
    talk,
    talk_asks,
)
from alignkit.data.text.ranked import ANSWERS, RANKS, SCORES, best_first, has_scores
from alignkit.data.text.shape import Columns, Shape, Shapes
from alignkit.data.text.speakers import plain_messages


def _answered(name: str, question: Question, answer: str) -> Shape:
    """Return the shape of a question whose one answer stands in a column."""

    def read(row: Columns) -> dict[str, Any]:
        return {**question.read(row), "completion": plain_messages(row[answer])}

    return Shape(name, (*question.needs, answer), read, question.also)


def _pair(name: str, question: Question, better: str, worse: str) -> dict[str, Shape]:
    """Return the shape of pairs, for preference training and for SFT, which takes the better."""

    def answer(row: Columns, column: str) -> Any:
        said = plain_messages(row[column])
        repeats = isinstance(said, list) and len(said) > 1
        return led(system_of(row), said) if repeats and "system" in question.also else said

    def pair(row: Columns) -> dict[str, Any]:
        asked = question.read(row)
        return {**asked, "chosen": answer(row, better), "rejected": answer(row, worse)}

    def best(row: Columns) -> dict[str, Any]:
        return {**question.read(row), "chosen": answer(row, better)}

    return {
        "preference": Shape(name, (*question.needs, better, worse), pair, question.also),
        "sft": Shape(name, (*question.needs, better), best, (*question.also, worse)),
    }


Verdict = Callable[[str, Any], int | None]
"""Tells by a column's name and value which of two answers is better; ``None`` for neither."""


def _one_of(verdicts: Mapping[str, int | None]) -> Verdict:
    """Return the verdict of a column that says one of some words or numbers."""

    def which(says: str, value: Any) -> int | None:
        if isinstance(value, bool) or str(value) not in verdicts:
            raise RowError(f"`{says}` must be {' or '.join(verdicts)}")
        return verdicts[str(value)]

    return which


def _signed(says: str, value: Any) -> int | None:
    """Return the verdict of a number: below 0 the first answer is better, above it the second."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RowError(f"`{says}` must be a number, below 0 where the first answer is better")
    return int(value > 0) if value else None


def _judged(
    name: str, question: Question | None, answers: tuple[str, str], says: str, verdict: Verdict
) -> Shape:
    """Return the shape of two answers with a column that says which is the better one.

    Where neither is, the first is there twice, which is found as a pair of identical answers.
    """

    def read(row: Columns) -> dict[str, Any]:
        which = verdict(says, row[says])
        better, worse = (0, 0) if which is None else (which, 1 - which)
        asked = question.read(row) if question else {}
        return {**asked, "chosen": row[answers[better]], "rejected": row[answers[worse]]}

    needs, also = (question.needs, question.also) if question else ((), ())
    return Shape(name, (*needs, *answers, says), read, also)


def _calls(row: Columns) -> dict[str, Any]:
    """Read a question whose answer is calls of tools, by name and arguments."""
    said = {"role": "assistant", "content": None, "tool_calls": row["answers"]}
    asked = asking("query")(row)["prompt"]
    return {"messages": [*asked, said], "tools": row["tools"]}


def _repeated(talk: str) -> Shape:
    """Return the shape of pairs that hold the whole conversation of a third column, and more."""

    def read(row: Columns) -> dict[str, Any]:
        pair = {name: plain_messages(row[name]) for name in ("chosen", "rejected")}
        if not all(isinstance(each, list) and len(each) > 1 for each in pair.values()):
            raise RowError(
                f"the row has both `prompt` and `{talk}`, and its answers do not repeat them; "
                "name the columns that are meant in data.columns"
            )
        return {"prompt": row["prompt"], **pair}

    needs = ("prompt", talk, "chosen", "rejected")
    return Shape("prompts with chosen and rejected answers", needs, read)


def _openai_pair(row: Columns) -> dict[str, Any]:
    """Read OpenAI's preference format, whose input holds the messages and their tools."""
    asked = row["input"]
    if not isinstance(asked, Mapping) or "messages" not in asked:
        raise RowError("`input` must be an object that holds `messages`")
    if others := asked.keys() - {"messages", "tools", "parallel_tool_calls"}:
        raise RowError(f"`input` holds {', '.join(sorted(others))}, which is not known")
    tools = {"tools": asked["tools"]} if asked.get("tools") else {}
    pair = {"chosen": row["preferred_output"], "rejected": row["non_preferred_output"]}
    return {"prompt": asked["messages"], **pair, **tools}


def _openai_best(row: Columns) -> dict[str, Any]:
    """Read the better answer of OpenAI's preference format."""
    read = _openai_pair(row)
    del read["rejected"]
    return read


def _ranked(question: Question, answers: str, numbers: str | None = None) -> Shape:
    """Return the shape of answers in order, or with a score or a rank for each."""

    def read(row: Columns) -> dict[str, Any]:
        given = row[numbers] if numbers else None
        if not numbers and answers != "responses" and not has_scores(row[answers]):
            raise RowError(
                f"the answers in `{answers}` have no score to rank them by, such as `score` or "
                "`rank`; data.columns may name them as `responses`, which are in order, best first"
            )
        ordered = best_first(row[answers], given, lower_is_better=numbers in RANKS)
        return {**question.read(row), "responses": ordered}

    needs = (*question.needs, answers, *([numbers] if numbers else []))
    scored = "scored" if numbers else "ranked"
    asked = question.name if question.name == "prompts" else "questions"
    name = f"{asked} with {scored} responses"
    return Shape(name, needs, read, question.also)


_BETTER = (
    ("chosen", "rejected"),
    ("response_j", "response_k"),
    ("chosen_response", "rejected_response"),
    ("positive", "negative"),
    ("preferred", "dispreferred"),
)
"""Columns that hold the better and the worse answer."""

_BETTER_NAMES = {each: f"{each} with better and worse answers" for each in ("prompts", "questions")}


def _pairs_of(question: Question, *names: str) -> list[dict[str, Shape]]:
    """Return the shapes of pairs for one way to ask, the first of them by a name of its own."""
    return [
        _pair(
            names[index > 0],
            question,
            better,
            worse,
        )
        for index, (better, worse) in enumerate(_BETTER)
    ]


_OPENAI = Shape(
    "OpenAI preference pairs", ("input", "preferred_output", "non_preferred_output"), _openai_pair
)
_INPUTS = Question("inputs", ("input",), asking("input"))
_WHOLE = Shape("dialogues with chosen and rejected ends", ("chosen", "rejected"))
_PAIRS = (
    *_pairs_of(PROMPTS, "prompts with chosen and rejected answers", _BETTER_NAMES["prompts"]),
    *(
        _pair("ShareGPT preference pairs", Question("", (each,), talk_asks(each)), *_BETTER[0])
        for each in TALKS
    ),
    *_pairs_of(QUESTIONS[0], "Orca preference pairs", _BETTER_NAMES["questions"]),
    *(
        pair
        for question in QUESTIONS[1:]
        for pair in _pairs_of(question, *[_BETTER_NAMES["questions"]] * 2)
    ),
    *_pairs_of(ALPACA, *["Alpaca preference pairs"] * 2),
    {  # beside a prompt or an instruction it is no question of its own
        kind: shape._replace(last=True)
        for kind, shape in _pair(_BETTER_NAMES["questions"], _INPUTS, *_BETTER[0]).items()
    },
    *({"preference": _repeated(each), "sft": _repeated(each)} for each in TALKS),
    {"preference": _OPENAI, "sft": _OPENAI._replace(read=_openai_best)},
)
_RANKED = tuple(
    _ranked(question, answers, numbers)
    for question in (PROMPTS, *QUESTIONS, ALPACA)
    for answers in ANSWERS
    for numbers in (None, *SCORES, *RANKS)
    if numbers or answers != "generations"  # by themselves they are samples of one model
)
_TWO = "prompts with two responses and a verdict"
_WINNERS = _one_of({"model_a": 0, "model_b": 1, "tie": None, "tie (bothbad)": None})
_JUDGED = (
    _judged(_TWO, PROMPTS, ("response_0", "response_1"), "better_response_id",
            _one_of({"0": 0, "1": 1})),
    _judged(_TWO, PROMPTS, ("response_1", "response_2"), "preference_strength", _signed),
    _judged(_TWO, Question("", ("context",), asking("context")), ("response1", "response2"),
            "overall_preference", _signed),
    _judged("instructions with two outputs and a verdict", ALPACA, ("output_1", "output_2"),
            "preference", _one_of({"1": 0, "2": 1})),
    _judged("SHP preference pairs", Question("", ("history",), asking("history")),
            ("human_ref_A", "human_ref_B"), "labels", _one_of({"1": 0, "0": 1})),
    _judged("arena battles", None, ("conversation_a", "conversation_b"), "winner", _WINNERS),
)  # fmt: skip

PREFERENCE = Shapes((_WHOLE, *(pair["preference"] for pair in _PAIRS), *_RANKED, *_JUDGED))
"""Shapes with two answers or more to a prompt."""

SFT = Shapes(
    (
        Shape("messages", ("messages",), talk("messages"), SYSTEM),
        Shape("KTO messages", ("messages", "label"), talk("messages"), SYSTEM),
        _answered("prompts with completions", PROMPTS, "completion"),
        _answered("KTO prompts with completions", PROMPTS, "completion")._replace(
            needs=("prompt", "completion", "label")
        ),
        *(_answered(f"prompts with {each}s", PROMPTS, each) for each in ("response", "answer")),
        _WHOLE._replace(needs=("chosen",), also=("rejected",)),
        *(Shape("ShareGPT conversations", (each,), talk(each), SYSTEM) for each in TALKS),
        *(
            _answered("Alpaca instructions", ALPACA, each)
            for each in ("output", "response", "answer", "completion")
        ),
        # With an input it is no question of its own.
        _answered("Alpaca instructions", ALPACA, "output")._replace(
            needs=("instruction", "input", "output"), also=("context", *SYSTEM)
        ),
        *(
            _answered("questions with answers", question, each)
            for question in QUESTIONS
            for each in ("answer", "response", "completion", "output", "solution")
        ),
        *(_answered("inputs with outputs", _INPUTS, each) for each in ("output", "response")),
        *(pair["sft"] for pair in _PAIRS),
        *_RANKED,
        *_JUDGED,
        Shape("questions with calls of tools", ("query", "answers", "tools"), _calls, SYSTEM),
    )
)
"""Shapes with an answer to imitate."""
