"""Take transformers' generation options, as many as have a meaning here."""

from __future__ import annotations

from argparse import SUPPRESS
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from jsonargparse import ArgumentParser
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    GenerationConfig,
    LogitsProcessor,
    MinPLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TypicalLogitsWarper,
)

from alignkit.cli.near import did_you_mean
from alignkit.errors import AlignkitError

_Config: Any = GenerationConfig  # upstream's signature is untyped

# Those that shape the draw. transformers applies them only where it draws itself.
_WARPERS: dict[str, Callable[[Any], LogitsProcessor]] = {
    "top_k": TopKLogitsWarper,
    "min_p": MinPLogitsWarper,
    "typical_p": TypicalLogitsWarper,
    "epsilon_cutoff": EpsilonLogitsWarper,
    "eta_cutoff": EtaLogitsWarper,
    "top_h": TopHLogitsWarper,
}
_PASSED = frozenset(
    {
        "bad_words_ids",
        "begin_suppress_tokens",
        "cache_config",
        "cache_implementation",
        "compile_config",
        "disable_compile",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "encoder_repetition_penalty",
        "exponential_decay_length_penalty",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "guidance_scale",
        "length_penalty",
        "max_matching_ngram_size",
        "max_time",
        "min_length",
        "min_new_tokens",
        "no_repeat_ngram_size",
        "num_beams",
        "prefill_chunk_size",
        "prompt_lookup_num_tokens",
        "remove_invalid_values",
        "renormalize_logits",
        "sequence_bias",
        "stop_strings",
        "suppress_tokens",
        "token_healing",
        "use_cache",
        "watermarking_config",
    }
)
_INSTEAD = {
    "do_sample": "temperature 0 takes the likeliest token, any other draws",
    "max_length": "give max_new_tokens",
    "num_return_sequences": "repeat the prompt, or change the seed",
    "eos_token_id": "an answer ends where it ended in training; give stop_strings",
}
_REFUSALS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NotImplementedError,
    TypeError,
    ValueError,
)


class _Value(NamedTuple):
    what: str
    holds: Callable[[Any], bool]


def _is_count(value: Any, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and value != [] and all(map(_is_count, value))


_SWITCH = _Value("true or false", lambda value: isinstance(value, bool))
_COUNT = _Value("a whole number, 0 or more", _is_count)
_POSITIVE = _Value("a whole number, 1 or more", lambda value: _is_count(value, 1))
_NUMBER = _Value("a number", _is_number)
_ABOVE_0 = _Value("a number above 0", lambda value: _is_number(value) and value > 0)
_IDS = _Value("a list of token ids", _are_counts)
_ID = _Value("a token id, or a list of them", lambda value: _is_count(value) or _are_counts(value))
# transformers takes any value of these, and fails later or takes it for something else.
_VALUES = {
    **dict.fromkeys(
        ("disable_compile", "remove_invalid_values", "renormalize_logits", "token_healing"), _SWITCH
    ),
    "use_cache": _SWITCH,
    **dict.fromkeys(
        ("encoder_no_repeat_ngram_size", "min_length", "min_new_tokens", "no_repeat_ngram_size"),
        _COUNT,
    ),
    **dict.fromkeys(
        (
            "max_matching_ngram_size",
            "num_beams",
            "prefill_chunk_size",
            "prompt_lookup_num_tokens",
        ),
        _POSITIVE,
    ),
    **dict.fromkeys(("guidance_scale", "length_penalty"), _NUMBER),
    **dict.fromkeys(("encoder_repetition_penalty", "max_time"), _ABOVE_0),
    **dict.fromkeys(("begin_suppress_tokens", "suppress_tokens"), _IDS),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id"), _ID),
    "bad_words_ids": _Value(
        "a list of lists of token ids",
        lambda value: isinstance(value, list) and value != [] and all(map(_are_counts, value)),
    ),
    "early_stopping": _Value(
        "true, false or never", lambda value: isinstance(value, bool) or value == "never"
    ),
    "exponential_decay_length_penalty": _Value(
        "a list of a whole number and a factor",
        lambda value: (
            isinstance(value, list | tuple)
            and len(value) == 2
            and _is_count(value[0])
            and _is_number(value[1])
        ),
    ),
    "stop_strings": _Value(
        "a text, or a list of texts",
        lambda value: all(
            isinstance(each, str) and each
            for each in (value if isinstance(value, list) else [value])
        ),
    ),
}
_TOKENS = (
    "bad_words_ids",
    "begin_suppress_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "sequence_bias",
    "suppress_tokens",
)
OPTIONS = tuple(sorted(_PASSED | _WARPERS.keys()))
"""The options that are taken."""


def check_options(given: Mapping[str, Any], temperature: float, max_new_tokens: int) -> None:
    """Refuse options that are unknown, have no effect here or no valid value.

    Args:
        given: Options of transformers' ``GenerationConfig`` by name.
        temperature: At 0 nothing is drawn; beams are searched only then.
        max_new_tokens: The largest number of tokens of an answer.

    Raises:
        AlignkitError: One of them is one of these.
    """
    for name, value in given.items():
        if name not in OPTIONS:
            theirs = hasattr(_Config(), name)
            why = _INSTEAD.get(name, "it changes no answer here" if theirs else "no such option")
            near = "" if theirs else did_you_mean(name, OPTIONS)
            raise AlignkitError(f"{name}: {why}{near}; see alignkit generate --help")
        if name in _WARPERS:
            if temperature == 0:
                raise AlignkitError(f"{name}: has no effect at temperature 0; raise that")
            with readable(name, value):
                _WARPERS[name](value)
        elif name in _VALUES and not _VALUES[name].holds(value):
            raise AlignkitError(f"{name}={value}: give {_VALUES[name].what}")
    least = given.get("min_new_tokens") or 0
    if least > max_new_tokens:
        raise AlignkitError(f"min_new_tokens={least}: is above max_new_tokens={max_new_tokens}")
    beams = given.get("num_beams") or 1
    if beams != 1 and temperature != 0:
        raise AlignkitError(f"num_beams={beams}: searches beams at temperature 0 alone; set it so")
    with readable("generation", dict(given)):
        _Config(**passed(given))


def passed(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that transformers' own ``generate`` applies."""
    return {name: value for name, value in given.items() if name in _PASSED}


def warpers(given: Mapping[str, Any]) -> list[LogitsProcessor]:
    """Return what shapes the draw, in the order in which transformers applies them."""
    return [make(given[name]) for name, make in _WARPERS.items() if name in given]


def add_options(parser: ArgumentParser) -> None:
    """Add a flag for every option, which the help sums up in one line."""
    group = parser.add_argument_group(
        "options of transformers",
        f"Any of these of GenerationConfig, as --NAME VALUE: {', '.join(OPTIONS)}.",
    )
    for name in OPTIONS:
        group.add_argument(f"--{name}", type=Any, help=SUPPRESS)


def gather_options(given: dict[str, Any]) -> dict[str, Any]:
    """Return arguments with the flags of `add_options` under ``generation``."""
    kept = {name: value for name, value in given.items() if name not in OPTIONS}
    flags = {name: given[name] for name in OPTIONS if given.get(name) is not None}
    return {**kept, "generation": {**(kept.get("generation") or {}), **flags}}


def refuse_unknown_tokens(given: Mapping[str, Any], size: int) -> None:
    """Refuse options that name a token beyond a model's vocabulary.

    Raises:
        AlignkitError: An id is the size of the vocabulary or more.
    """
    for name, value in given.items():
        if name in _TOKENS and max(_numbers(value), default=0) >= size:
            raise AlignkitError(f"{name}={value}: the model has the ids 0 to {size - 1}")


def _numbers(value: Any) -> Iterator[int]:
    if isinstance(value, int):
        yield value
    for each in value if isinstance(value, list) else ():
        yield from _numbers(each)


@contextmanager
def readable(name: str, value: object) -> Iterator[None]:
    """Report what transformers says about a value as a mistake of the user."""
    try:
        yield
    except _REFUSALS as error:
        said = " ".join(str(error).split())
        raise AlignkitError(f"{name}={value}: {said[:300]}") from error
