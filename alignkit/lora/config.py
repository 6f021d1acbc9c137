"""Define the settings of a LoRA adapter: what it adapts, and how, as plain values."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from alignkit.errors import AlignkitError
from alignkit.lora.regex import Pattern, compiled

Init = Literal["gaussian", "kaiming", "pissa", "olora", "orthogonal"]
BiasMode = Literal["none", "all", "lora_only"]


@dataclass(frozen=True)
class LoRAConfig:
    """Hold the settings of a LoRA adapter, ``y = base(x) + s · x A B``.

    This is eq. 3 of Hu et al. 2021 (arXiv:2106.09685).

    Example:
        >>> config = LoRAConfig(r=8, alpha=16, targets=("q_proj",), rank_pattern={"q_proj": 4})
        >>> config.scale
        2.0
        >>> config.for_module("model.layers.0.self_attn.q_proj").scale
        4.0

    Attributes:
        r: Rank; A is [in, r], B is [r, out].
        alpha: Numerator of the scale: α/r, or α/√r with ``use_rslora``.
        dropout: Probability with which an entry of the adapter's input is zeroed in training.
        targets: Which modules to adapt. An entry is a module's dotted path or the end of it
            (``attn.c_attn``), a regular expression over whole paths (recognised by its special
            characters, ``.*mlp.*``), or ``all-linear``: every linear module but the output head.
        exclude: The same kinds of entry, taken away from the targets.
        layers: Blocks to keep, as indices or as ranges in a string, ``"0-5,8"``; ``None`` for all.
        rank_pattern: Rank by path ending or regular expression; the first that matches wins.
        alpha_pattern: Alpha in the same way.
        use_rslora: Scale by α/√r (Kalajdzievski 2023, arXiv:2312.03732).
        use_dora: Learn each output's magnitude beside its direction (Liu et al. 2024,
            arXiv:2402.09353, eq. 5).
        init: ``gaussian`` (A ~ N(0, ``init_std``²), B = 0), ``kaiming`` (A uniform in ±1/√in, as in
            the paper's code and PEFT's default), ``pissa`` (Meng et al. 2024, arXiv:2404.02948),
            ``olora`` (Büyükakyüz 2024, arXiv:2406.01775), ``orthogonal`` (see ``init.py``).
        init_std: Standard deviation of ``gaussian``. The design's "N(0, 0.01)" is read as the
            standard deviation, as ``nn.init.normal_`` takes it: it lies within a factor of two of
            what ``kaiming`` gives at width 768 (0.021), a variance of 0.01 would be five times it.
        bias: Which biases train: ``none``, those of adapted modules (``lora_only``) or ``all``.
        modules_to_save: Modules trained in full beside the adapter, by path or path ending.
        untie: Allow one side of tied embeddings to change; the other side keeps the base weight.
    """

    r: int = 8
    alpha: float = 16
    dropout: float = 0.0
    targets: tuple[str, ...] | str = "all-linear"
    exclude: tuple[str, ...] | str = ()
    layers: tuple[int, ...] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    init: Init = "gaussian"
    init_std: float = 0.01
    bias: BiasMode = "none"
    modules_to_save: tuple[str, ...] | str = ()
    untie: bool = False

    def __post_init__(self) -> None:
        """Turn lists into tuples, and refuse values that cannot work."""
        for name in ("targets", "exclude", "modules_to_save"):
            object.__setattr__(self, name, strings(getattr(self, name)))
            if not all(isinstance(entry, str) and entry for entry in getattr(self, name)):
                raise AlignkitError(f"LoRAConfig.{name} is {getattr(self, name)!r}; give names")
        object.__setattr__(self, "layers", _layers(self.layers))
        for name in ("rank_pattern", "alpha_pattern"):
            object.__setattr__(self, name, dict(getattr(self, name)))
        self._check_values()

    @property
    def scale(self) -> float:
        """Return the factor s of the product A B: α/r, or α/√r with ``use_rslora``."""
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def for_module(self, path: str) -> LoRAConfig:
        """Return the config with ``r`` and ``alpha`` as the patterns set them for one module."""
        rank = first_match(self.rank_pattern, path)
        alpha = first_match(self.alpha_pattern, path)
        return dataclasses.replace(
            self,
            r=self.r if rank is None else self.rank_pattern[rank],
            alpha=self.alpha if alpha is None else self.alpha_pattern[alpha],
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists, dicts and scalars, fit for JSON and YAML."""
        plain = dataclasses.asdict(self)
        return {key: list(v) if isinstance(v, tuple) else v for key, v in plain.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoRAConfig:
        """Rebuild a config from `to_dict`.

        Raises:
            AlignkitError: A key that is no field, or a value that cannot work.
        """
        unknown = sorted(set(values) - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            raise AlignkitError(f"LoRAConfig: unknown keys {', '.join(unknown)}; remove them")
        return cls(**values)

    def _check_values(self) -> None:
        for where, r in self._own_and("rank"):
            if not isinstance(r, int) or isinstance(r, bool) or r < 1:
                raise AlignkitError(
                    f"LoRAConfig.{where} is {r!r}; give a whole number of at least 1"
                )
            if self.init == "orthogonal" and r % 2:
                raise AlignkitError(
                    f"LoRAConfig.{where} is {r}; init='orthogonal' splits the rank in two halves, "
                    "give an even rank"
                )
        for where, value in [*self._own_and("alpha"), ("init_std", self.init_std)]:
            if not (_is_number(value) and 0 < value < math.inf):
                raise AlignkitError(f"LoRAConfig.{where} is {value!r}; give a positive number")
        if not (_is_number(self.dropout) and 0 <= self.dropout < 1):
            raise AlignkitError(f"LoRAConfig.dropout is {self.dropout!r}; give 0 <= dropout < 1")
        for name, value, allowed in (("init", self.init, Init), ("bias", self.bias, BiasMode)):
            if value not in get_args(allowed):
                choices = ", ".join(get_args(allowed))
                raise AlignkitError(f"LoRAConfig.{name} is {value!r}; choose one of {choices}")
        for name in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, name):
                compiled(pattern, f"LoRAConfig.{name}")
                _ending(pattern, f"LoRAConfig.{name}")
        if not self.targets and not self.modules_to_save:
            raise AlignkitError("LoRAConfig.targets is empty; name the modules to adapt")

    def _own_and(self, kind: Literal["rank", "alpha"]) -> list[tuple[str, Any]]:
        """Return the config's own rank or alpha and its pattern's, each with where it stands."""
        own = ("r", self.r) if kind == "rank" else ("alpha", self.alpha)
        name = f"{kind}_pattern"
        return [own, *((f"{name}[{key!r}]", value) for key, value in getattr(self, name).items())]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def strings(value: Any) -> tuple[str, ...]:
    """Return one string or several as a tuple."""
    return (value,) if isinstance(value, str) else tuple(value)


def first_match(patterns: Mapping[str, Any], path: str) -> str | None:
    """Return the first pattern that matches the end of ``path`` at a dot, PEFT's rule."""
    return next((p for p in patterns if _ending(p, "LoRAConfig").fullmatch(path)), None)


def _ending(pattern: str, where: str) -> Pattern:
    return compiled(rf"(.*\.)?({pattern})$", where)


def _layers(value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    if not isinstance(value, str):
        return tuple(sorted({int(index) for index in value}))
    indices: set[int] = set()
    for part in value.split(","):
        bounds = re.fullmatch(r"\s*(\d{1,5})\s*(?:-\s*(\d{1,5})\s*)?", part)
        if bounds is None or (bounds[2] is not None and int(bounds[2]) < int(bounds[1])):
            raise AlignkitError(f"LoRAConfig.layers is {value!r}; write ranges such as '0-5,8'")
        indices.update(range(int(bounds[1]), int(bounds[2] or bounds[1]) + 1))
    return tuple(sorted(indices))
