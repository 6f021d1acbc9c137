"""Compare the data plan of a checkpoint with this run's, before a run resumes mid-epoch.

A *plan* is a small dict of plain values, name to value: everything that decides which example
comes when. It travels in the checkpoint beside the position, so that a refusal can name what
changed, with both values.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from alignkit.errors import AlignkitError

Plan = dict[str, Any]

SOURCES = "sources"
"""The training sources: a list of ``{"name", "rows", "examples", "chosen"}``. ``rows`` is the
digest of what is read, ``examples`` that of the tokens they became and ``chosen`` that of the
indices taken; a stream has ``rows`` alone."""

SETTINGS = "settings"
"""How rows become examples. It decides nothing by itself, since ``examples`` holds the outcome;
it says why that differs."""

# What follows from the other entries is told only where none of them differs.
_DERIVED = ("examples", "tokens", "lengths", "quotas", "batches")
_SHOWN = 40


def check_plan(saved: object, plan: Plan) -> None:
    """Refuse to go on in the middle of an epoch, or of a stream, that was planned otherwise.

    Args:
        saved: The checkpoint's plan.
        plan: This run's.

    Raises:
        AlignkitError: They are not the same; both values of each difference are named.
    """
    told = differences(saved, plan)
    if told:
        raise AlignkitError(
            f"resuming mid-epoch needs the same data and batches as before: {told}; restore "
            "them, or start anew from the checkpoint's weights with model.init_from"
        )


def differences(saved: object, plan: Plan, but: Collection[str] = ()) -> str:
    """Tell what differs between a checkpoint's plan and this run's; empty for nothing.

    Args:
        saved: The checkpoint's plan.
        plan: This run's.
        but: Names of entries that do not count.
    """
    if not isinstance(saved, Mapping) or not saved:
        return "the checkpoint does not say what data it saw (an older alignkit wrote it)"
    saved, plan = ({k: v for k, v in each.items() if k not in but} for each in (saved, plan))
    derived, told = _changes(saved, plan)
    before, after = saved.get(SOURCES, []), plan.get(SOURCES, [])
    if [_content(source) for source in before] != [_content(source) for source in after]:
        told += _changed_sources(before, after)
        told += _changes(saved.get(SETTINGS, {}), plan.get(SETTINGS, {}))[1]
    return "; ".join(told or derived)


def _changes(saved: Mapping[str, Any], plan: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """List what differs, as derived entries and as others, without sources and settings."""
    before, after = _flat(saved), _flat(plan)
    derived: list[str] = []
    others: list[str] = []
    for name in {**after, **before}:
        if before.get(name) != after.get(name):
            told = f"{name} {_short(before.get(name))} → {_short(after.get(name))}"
            (derived if name in _DERIVED else others).append(told)
    return derived, others


def _content(source: Mapping[str, Any]) -> tuple[Any, Any]:
    return source.get("examples", source["rows"]), source.get("chosen")


def _changed_sources(before: list[Mapping[str, Any]], after: list[Mapping[str, Any]]) -> list[str]:
    if len(before) != len(after):
        names = [", ".join(str(each["name"]) for each in some) for some in (before, after)]
        return [f"the training sources {names[0]} → {names[1]}"]
    told = []
    for old, new in zip(before, after, strict=True):
        if _content(old) == _content(new):
            continue
        if old["rows"] != new["rows"]:
            one = old["name"] == new["name"]
            what = f"{new['name']}'s content" if one else f"{old['name']} → {new['name']}: content"
            values = old["rows"], new["rows"]
        elif old.get("examples") != new.get("examples"):
            what, values = f"{new['name']}'s tokens", (old.get("examples"), new.get("examples"))
        else:
            what = f"the examples taken from {new['name']}"
            values = old.get("chosen"), new.get("chosen")
        told.append(f"{what} changed (digest {_short(values[0], 8)} → {_short(values[1], 8)})")
    return told


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            if name != SETTINGS:
                flat |= _flat(value, f"{prefix}{name}.")
        elif name != SOURCES:
            flat[f"{prefix}{name}"] = value
    return flat


def _short(value: object, size: int = _SHOWN) -> str:
    text = str(value).replace("\n", " ")
    return text if len(text) <= size else f"{text[:size]}…"
