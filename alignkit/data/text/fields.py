"""Tell which fields of a row are read, and which others would change what is trained.

A message may hold what is listed here and nothing else: an unknown field of it is found, as it
may be what a template renders or what masks a turn. Of a row's columns, those known to change
what is trained are found where they are set and not read; any other is told once, by name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from alignkit.data.text.speakers import usual_role
from alignkit.data.text.thoughts import THOUGHTS

_TEXT = {"role", "content"}
_CALLING = {"tool_calls", "function_call"}
_CALLED = {"name", "tool_call_id"}
"""What is read of the messages that call tools, and of those that answer a call."""
HARMLESS = {
    *("id", "message_id", "uuid", "index", "turn", "turn_id", "turn_identifier", "timestamp"),
    *("created", "created_at", "date", "model", "source", "url", "lang", "language", "score"),
    *("redacted", "toxic", "country", "state", "hashed_ip", "header"),
}
"""Fields of a message that say where it came from."""

_WEIGHTS: dict[str, tuple[Any, ...]] = {
    "weight": (1,),
    **dict.fromkeys(("train", "trainable", "train_on_turn"), (True,)),
    **dict.fromkeys(("mask", "masked", "ignore", "skip", "exclude", "excluded"), (False,)),
    **dict.fromkeys(("loss", "loss_mask", "label_mask", "assistant_masks", "completion_mask"), ()),
}
"""Columns that say how much of a row is trained on, with the values that say "as usual".

In the names of `_known_as`, as are those of `_CONTEXT`.
"""

_CONTEXT: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("system", "system_prompt", "instruction", "input", "context", "history"), ()),
    **dict.fromkeys(("tools", "functions", "tool_calls", "function_call", "documents"), ()),
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), ()),
    **dict.fromkeys((*THOUGHTS, "chat_template_kwargs"), ()),
    **dict.fromkeys(("label", "labels", "kto_tag", "desirable", "accepted", "preferred"), (True,)),
    "undesirable": (False,),
    "margin": (0,),
}
"""Columns that say more about a dialogue than its prompt and answers."""

_VERDICTS = {
    **dict.fromkeys(("chosen", "good", "liked", "thumbs_up", "upvoted", "positive"), True),
    **dict.fromkeys(("approved", "correct", "selected", "winner", "helpful", "best"), True),
    **dict.fromkeys(("rejected", "bad", "disliked", "thumbs_down", "downvoted"), False),
    **dict.fromkeys(("negative", "flagged", "incorrect", "wrong", "spam"), False),
}
"""Columns that judge an answer where they hold a yes or a no, with what says that it is good."""


_YES = ("true", "1", "1.0", "yes", "y", "good", "desirable")
_NO = ("false", "0", "0.0", "no", "n", "bad", "undesirable")


def is_set(value: Any) -> bool:
    """Tell whether a field is not empty; data sets with many columns leave some empty."""
    return value is not None and value not in ("", "[]", "{}", [], {})


def truth_of(value: Any) -> bool | None:
    """Tell whether a value says yes or no, as itself, as 1 or 0, or in words; ``None`` for neither.

    Example:
        >>> truth_of("True"), truth_of(0), truth_of("maybe")
        (True, False, None)
    """
    told = str(value).strip().lower()
    return True if told in _YES else False if told in _NO else None


def read_weight(message: Mapping[str, Any]) -> tuple[bool, list[str]]:
    """Tell whether a message may be trained on, and list its fields that are not understood.

    ``weight`` is read where it is 0 or 1, ``train`` where it is true or false.

    Returns:
        The answer, and ``name`` or ``name value`` for each of the others.
    """
    trained = True
    unread = []
    for name, value in message.items():
        if name in _TEXT or name in HARMLESS or name in _CALLING or not is_set(value):
            continue
        if name in _CALLED and usual_role(message.get("role")) == "tool":
            continue
        speaks = usual_role(message.get("role")) == "assistant"
        if name in THOUGHTS and isinstance(value, str) and speaks:
            continue
        truth = value if name == "train" and isinstance(value, bool) else None
        if name == "weight" and not isinstance(value, bool) and value in (0, 1):
            truth = bool(value)
        if truth is None or (truth and not speaks):
            unread.append(_shown(name, value))
        else:
            trained = trained and truth
    return trained, unread


def unread_columns(
    row: Mapping[str, Any], read: Collection[str], said: Sequence[str] | None
) -> list[str]:
    """List a row's columns that would change what is trained, and are not read.

    Args:
        row: The row.
        read: The columns that are.
        said: Texts of the prompt: a column whose text they hold is not lost. ``None`` where
            there is no dialogue, so that only a column of weights could matter.

    Returns:
        ``name`` or ``name value`` for each.
    """
    known = _WEIGHTS if said is None else {**_WEIGHTS, **_CONTEXT}
    unread = []
    for name, value in row.items():
        good = _VERDICTS.get(_known_as(name)) if said is not None else None
        if good is not None and name not in read and truth_of(value) is (not good):
            unread.append(_shown(name, value))
            continue
        usually = known.get(_known_as(name))
        if usually is not None and name not in read and is_set(value):
            if any(_same(value, usual) for usual in usually):
                continue
            held = isinstance(value, str) and any(value.strip() in text for text in said or ())
            if not held:
                unread.append(_shown(name, value))
    return unread


def _known_as(name: str) -> str:
    """Return a column's usual name: ``desirable`` for isDesirable, ``weight`` for loss_weights."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])|[\s.-]+", "_", name).lower().removeprefix("is_")
    return "weight" if words.rpartition("_")[2] in ("weight", "weights") else words


def _same(value: Any, usual: Any) -> bool:
    return isinstance(value, bool) == isinstance(usual, bool) and bool(value == usual)


def _shown(name: str, value: Any) -> str:
    """Show a field by its name, and its value where that is a number or a truth."""
    shown = f" {value}" if isinstance(value, bool | int | float) else ""
    return f"`{name[:40]}`{shown}"
