"""Find the modules of a model that a LoRA config targets."""

from __future__ import annotations

import dataclasses
import difflib
import re

from torch import nn

from alignkit.errors import AlignkitError
from alignkit.lora.adapter import plain_modules
from alignkit.lora.config import LoRAConfig, first_match
from alignkit.lora.kinds import QuantizedLinear, is_adaptable
from alignkit.lora.parts import Parts, parts
from alignkit.lora.regex import compiled

ALL_LINEAR = "all-linear"
_REGEX_CHARACTERS = re.compile(r"[\\^$*+?|()\[\]{}]")


def resolve(model: nn.Module, config: LoRAConfig) -> dict[str, LoRAConfig]:
    """Return the paths of the modules to adapt, each with its own ``r`` and ``alpha``.

    Raises:
        AlignkitError: A target, exclusion, pattern or layer that matches nothing, a choice that
            leaves nothing, or one side of tied embeddings without ``untie``.
    """
    modules = plain_modules(model)
    paths = adaptable_paths(model)
    chosen: set[str] = set()
    for target in config.targets:
        if target == ALL_LINEAR:
            found = set(all_linear(model).adapted)
        else:
            found = {path for path in paths if matches(target, path, "LoRAConfig.targets")}
        if not found:
            raise AlignkitError(
                f"LoRAConfig.targets: {target!r} matches no module{_or_what_else(target, model)}; "
                f"near: {near(target, paths)}"
            )
        chosen |= _in_layers(found, target, config.layers, paths)
    for pattern in config.exclude:
        chosen -= _require(pattern, paths, "LoRAConfig.exclude")
    saved = saved_modules(model, config)
    chosen -= set(saved)
    if config.targets and not chosen:
        raise AlignkitError("LoRAConfig.exclude leaves no module to adapt; exclude fewer")
    resolved = {path: config.for_module(path) for path in paths if path in chosen}
    for name, patterns in (
        ("rank_pattern", config.rank_pattern),
        ("alpha_pattern", config.alpha_pattern),
    ):
        used = {first_match(patterns, path) for path in resolved}
        for pattern in patterns:
            if pattern not in used:
                raise AlignkitError(
                    f"LoRAConfig.{name}: {pattern!r} matches no adapted module, or an earlier one "
                    f"takes them all; near: {near(pattern, list(resolved))}"
                )
    shared = None if config.untie else shared_weight(modules, [*resolved, *saved])
    if shared is not None:
        raise AlignkitError(
            f"LoRA: {shared[0]} shares its weight with {', '.join(shared[1])}; leave it out, or "
            "set untie=True to change it alone"
        )
    return resolved


def pruned(model: nn.Module, config: LoRAConfig) -> LoRAConfig:
    """Remove entries that match nothing, which PEFT allows as long as one target matches."""
    paths = adaptable_paths(model)

    def used(patterns: tuple[str, ...] | str) -> tuple[str, ...]:
        return tuple(t for t in patterns if t == ALL_LINEAR or any(matches(t, p) for p in paths))

    bare = dataclasses.replace(
        config,
        targets=used(config.targets) or config.targets,
        exclude=used(config.exclude),
        rank_pattern={},
        alpha_pattern={},
    )
    chosen = resolve(model, bare)
    ranks = {first_match(config.rank_pattern, path) for path in chosen}
    alphas = {first_match(config.alpha_pattern, path) for path in chosen}
    return dataclasses.replace(
        bare,
        rank_pattern={key: r for key, r in config.rank_pattern.items() if key in ranks},
        alpha_pattern={key: a for key, a in config.alpha_pattern.items() if key in alphas},
    )


def adaptable_paths(model: nn.Module) -> list[str]:
    """Return the paths of the modules that can be adapted by low rank."""
    return [path for path, module in plain_modules(model).items() if is_adaptable(module)]


def all_linear(model: nn.Module) -> Parts:
    """Return what the target ``all-linear`` adapts of a model and what it leaves out."""
    return parts(model, head_path(model))


def saved_modules(model: nn.Module, config: LoRAConfig) -> list[str]:
    """Return the paths of ``modules_to_save``, those within them included, that own parameters.

    Raises:
        AlignkitError: A name that matches no module with parameters.
    """
    modules = plain_modules(model)
    owners = [p for p, m in modules.items() if next(m.parameters(recurse=False), None) is not None]
    found: set[str] = set()
    for name in config.modules_to_save:
        roots = [path for path in modules if path and _ends(name, path)]
        inside = {p for p in owners for root in roots if p == root or p.startswith(f"{root}.")}
        if not inside:
            raise AlignkitError(
                f"LoRAConfig.modules_to_save: {name!r} matches no module with parameters; "
                f"near: {near(name, owners)}"
            )
        packed = next((p for p in inside if isinstance(modules[p], QuantizedLinear)), None)
        if packed is not None:
            raise AlignkitError(
                f"LoRAConfig.modules_to_save: {packed} is quantized and cannot train whole; leave "
                "it out"
            )
        found |= inside
    return [path for path in owners if path in found]


def matches(pattern: str, path: str, where: str = "LoRAConfig") -> bool:
    """Tell whether a pattern names a path: an expression the whole path, a name its end."""
    if _REGEX_CHARACTERS.search(pattern):
        return compiled(pattern, where).fullmatch(path)
    return _ends(pattern, path)


def is_regex(pattern: str) -> bool:
    """Tell whether a target is read as a regular expression."""
    return _REGEX_CHARACTERS.search(pattern) is not None


def layer_index(path: str) -> int | None:
    """Return the first whole-number part of a path: the block a module lies in."""
    return next((int(part) for part in path.split(".") if part.isdecimal()), None)


def head_path(model: nn.Module) -> str | None:
    """Return the output head's path, where the model has one."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if get is not None else None
    if head is None:
        return None
    head = getattr(head, "base", head)
    return next((path for path, module in plain_modules(model).items() if module is head), None)


def shared_weight(modules: dict[str, nn.Module], paths: list[str]) -> tuple[str, list[str]] | None:
    """Return the first of some modules whose weight is another module's too, and those others."""
    owners: dict[int, list[str]] = {}
    for path, module in modules.items():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(path)
    for path in paths:
        for parameter in modules[path].parameters(recurse=False):
            others = [other for other in owners[id(parameter)] if other != path]
            if others:
                return path, others
    return None


def near(pattern: str, paths: list[str]) -> str:
    """List the names closest to a pattern, then the other kinds of name there are."""
    names = dict.fromkeys(suffix for path in paths for suffix in _suffixes(path))
    close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.5)
    kinds = [_suffixes(path)[-1] for path in paths]
    listed = list(dict.fromkeys([*close, *kinds]))[:12]
    return ", ".join(listed) or "none, the model has nothing to adapt"


def _or_what_else(target: str, model: nn.Module) -> str:
    """Describe what a target names that cannot be adapted: a parameter, or another module."""
    if target == ALL_LINEAR:
        return ""
    modules = plain_modules(model)
    for path, module in modules.items():
        if (
            path
            and matches(target, path)
            and next(module.parameters(recurse=False), None) is not None
        ):
            return f" that LoRA can adapt ({path} is a {type(module).__name__})"
        for name, _ in module.named_parameters(recurse=False):
            if matches(target, f"{path}.{name}"):
                return f" ({path}.{name} is a parameter of {type(module).__name__}, no layer)"
    return ""


def _suffixes(path: str) -> list[str]:
    """Return the endings that name a module in every block: ``b.c`` and ``c`` of ``a.0.b.c``."""
    parts = path.split(".")
    last_index = max((i for i, part in enumerate(parts) if part.isdecimal()), default=-1)
    names = parts[last_index + 1 :] or parts
    return [".".join(names[i:]) for i in range(len(names))]


def _ends(name: str, path: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _require(pattern: str, paths: list[str], where: str) -> set[str]:
    found = {path for path in paths if matches(pattern, path, where)}
    if not found:
        raise AlignkitError(f"{where}: {pattern!r} matches no module; near: {near(pattern, paths)}")
    return found


def _in_layers(
    found: set[str], target: str, layers: tuple[int, ...] | str | None, paths: list[str]
) -> set[str]:
    if layers is None:
        return found
    known = {index for path in paths if (index := layer_index(path)) is not None}
    missing = [index for index in layers if index not in known]
    if missing:
        there = f"0 to {max(known)}" if known else "none"
        raise AlignkitError(
            f"LoRAConfig.layers: the model has no layer {missing[0]}; it has {there}"
        )
    kept = {path for path in found if layer_index(path) in layers}
    if not kept:
        raise AlignkitError(
            f"LoRAConfig.layers leaves nothing of target {target!r}; name it without layers"
        )
    return kept
