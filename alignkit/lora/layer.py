"""Adapt linear layers and embeddings by low rank (LoRA and DoRA).

Shape letters: I input width, O output width, R rank, V vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from alignkit.errors import AlignkitError
from alignkit.lora.adapter import Adapter, AdapterLayer
from alignkit.lora.config import LoRAConfig
from alignkit.lora.init import Start, start
from alignkit.lora.kinds import QuantizedLinear, is_linear, stores_rows_of_outputs, weight_shape
from alignkit.lora.matmul import adapted_linear

_READS_BASES: ContextVar[bool] = ContextVar("reads_bases", default=False)


@contextmanager
def weights_read_from_bases() -> Iterator[None]:
    """Run the block so that every layer returns its base's ``weight``, as PEFT's layers do."""
    token = _READS_BASES.set(True)
    try:
        yield
    finally:
        _READS_BASES.reset(token)


class LowRankLayer(AdapterLayer):
    """Add ``s A B`` to the one weight matrix W [I, O] of a base module.

    Args:
        base: The module to adapt.
        config: This module's rank, alpha and variant, see `LoRAConfig.for_module`.
        name: Name of the first adapter.

    Raises:
        AlignkitError: A base of another kind, or an initialisation that does not suit it.
    """

    kind: ClassVar[str]

    def __init__(
        self, base: nn.Module, config: LoRAConfig | None = None, name: str = "default"
    ) -> None:
        if not self.takes(base):
            raise AlignkitError(
                f"{type(self).__name__}: base is a {type(base).__name__}; give a {self.kind}"
            )
        super().__init__(base)
        config = config or LoRAConfig()
        self.adapters[name] = self._adapter(config)
        self.active = name
        base.requires_grad_(False)

    @staticmethod
    @abstractmethod
    def takes(base: nn.Module) -> bool:
        """Tell whether this class can adapt a module."""

    @abstractmethod
    def start(self, config: LoRAConfig) -> Start:
        """Draw an adapter's first factors."""

    def _adapter(self, config: LoRAConfig) -> Adapter:
        first = self.start(config)
        values = {"lora_A": first.a_IR, "lora_B": first.b_RO}
        if first.subtract:
            values |= {"start_A": first.a_IR.clone(), "start_B": first.b_RO.clone()}
        bias = getattr(self.base, "bias", None)
        if config.bias != "none" and bias is not None:
            values["bias"] = bias.detach().to(torch.float32, copy=True)
        adapter = Adapter(config, values)
        if config.use_dora:
            adapter.register_parameter("magnitude", nn.Parameter(self.norms(adapter)))
        return adapter

    @property
    def weight(self) -> Tensor:
        """Return the weight in effect, in the base's layout and dtype, differentiable in A and B.

        For code that reads a layer's weight instead of calling the layer, as kernels of Mamba do:
        the adapter acts there too, without its dropout.
        """
        adapter = self.current()
        if adapter is None or _READS_BASES.get():
            return self._stored()
        if self.merged:
            return self.base.get_parameter("weight")
        weight_IO = self.weight_io().float() + self._delta(adapter)
        magnitude = adapter.get("magnitude")
        if magnitude is not None:
            weight_IO = weight_IO * (magnitude / self.norms(adapter))
        weight = weight_IO.t() if stores_rows_of_outputs(self.base) else weight_IO
        return weight.to(self._stored().dtype)

    @property
    def bias(self) -> Tensor | None:
        """Return the bias in effect; ``None`` where the base has none."""
        adapter = self.current()
        trained = adapter.get("bias") if adapter is not None and not self.merged else None
        if trained is not None:
            return trained.to(self.original("bias").dtype)
        if self.base._parameters.get("bias") is None:
            return None
        return self.original("bias") if adapter is None else self.base.get_parameter("bias")

    def weight_io(self) -> Tensor:
        """Return the original weight as [I, O]: a view where the base stores [O, I]."""
        weight = self._stored()
        return weight.t() if stores_rows_of_outputs(self.base) else weight

    def _stored(self) -> Tensor:
        """Return the original weight in the base's layout, unpacked where it is packed."""
        if isinstance(self.base, QuantizedLinear):
            return self.base.dequantized()
        return self.original("weight")

    def _delta(self, adapter: Adapter) -> Tensor:
        """Return ``s A B`` [I, O] in fp32, less the start that PiSSA and OLoRA subtract."""
        a_IR, b_RO = adapter.factors()
        return a_IR @ (b_RO * adapter.config.scale)

    @torch.no_grad()
    def direction(self, adapter: Adapter) -> Tensor:
        """Return ``W + s A B`` [I, O] in fp32, without a gradient (DoRA's V + ΔV)."""
        a_IR, b_RO = adapter.factors()
        return torch.addmm(self.weight_io().float(), a_IR, b_RO, alpha=adapter.config.scale)

    def norms(self, adapter: Adapter) -> Tensor:
        """Return the length [O] of each output's column of ``W + s A B``."""
        norms: Tensor = self.direction(adapter).norm(dim=0)
        return norms

    @torch.no_grad()
    def merged_parameters(self, adapter: Adapter) -> dict[str, Tensor]:
        """Return merged weight and bias, computed in fp32 and rounded once to the base's dtype."""
        weight_IO = self.direction(adapter)
        magnitude, bias = adapter.get("magnitude"), adapter.get("bias")
        if magnitude is not None:
            weight_IO *= magnitude / weight_IO.norm(dim=0)
        weight = weight_IO.t() if stores_rows_of_outputs(self.base) else weight_IO
        dtype = self.original("weight").dtype
        merged = {"weight": weight.to(dtype).contiguous()}
        if bias is not None:
            merged["bias"] = bias.to(dtype, copy=True)
        return merged


class LoRALinear(LowRankLayer):
    """Adapt a linear layer by low rank (Hu et al. 2021, arXiv:2106.09685, eq. 3).

    ``y = x W + b + s · dropout(x) A B`` with W frozen; A [I, R] ~ N(0, 0.01²) and B [R, O] = 0 at
    the start, both fp32; s = α/R. With DoRA (arXiv:2402.09353, eq. 5)
    ``y = k (x W + s · x A B) + b`` where ``k = m / ‖W + s A B‖``, the norm over each output's
    column and held constant in backward (sec. 4.3).

    The base is a `torch.nn.Linear` (weight [O, I]), transformers' ``Conv1D`` (weight [I, O]), or
    a subclass that computes the same, see `alignkit.lora.kinds.is_linear`.
    """

    kind = "Linear or Conv1D"

    @staticmethod
    def takes(base: nn.Module) -> bool:
        """Tell whether a module is a linear layer."""
        return is_linear(base)

    @property
    def in_features(self) -> int:
        """Return the input width I."""
        return self._sizes()[0]

    @property
    def out_features(self) -> int:
        """Return the output width O."""
        return self._sizes()[1]

    def _sizes(self) -> tuple[int, ...]:
        shape = weight_shape(self.base)
        return shape[::-1] if stores_rows_of_outputs(self.base) else shape

    def start(self, config: LoRAConfig) -> Start:
        """Draw A and B as the config's ``init`` says."""
        return start(config, self.weight_io())

    def adapted(self, adapter: Adapter, x: Tensor) -> Tensor:
        """Apply base and adapter to [..., I]; returns [..., O]."""
        bias = adapter.get("bias")
        if bias is None:
            bias = self.base.bias  # type: ignore[assignment]
        dropout = adapter.config.dropout if self.training else 0.0
        packed = isinstance(self.base, QuantizedLinear)
        if dropout == 0 and adapter.get("magnitude") is None and not packed:
            return adapted_linear(
                x, self.weight_io(), bias, *adapter.factors(), adapter.config.scale
            )
        return self._general(adapter, x, bias, dropout)

    def _general(self, adapter: Adapter, x: Tensor, bias: Tensor | None, dropout: float) -> Tensor:
        """Compute the layer with dropout, DoRA or quantized weights, by plain autograd."""
        scale = adapter.config.scale
        dropped = functional.dropout(x, dropout) if dropout else x
        y = self._frozen(adapter, x)
        delta = _product(
            dropped, adapter.get_parameter("lora_A"), adapter.get_parameter("lora_B"), scale
        )
        magnitude = adapter.get("magnitude")
        if magnitude is None:
            y = y + delta
        else:
            # (k - 1) on the dropped input, so that k = 1 leaves the base's output whole (as PEFT).
            k = (magnitude / self.norms(adapter)).to(y.dtype)
            y = y + (k - 1) * (self._frozen(adapter, dropped) if dropout else y) + k * delta
        return y if bias is None else y + bias.to(y.dtype)

    def _frozen(self, adapter: Adapter, x: Tensor) -> Tensor:
        """Return ``x W``, less the start that PiSSA and OLoRA subtract."""
        if isinstance(self.base, QuantizedLinear):
            y: Tensor = self.base(x)
            y = y if self.base.bias is None else y - self.base.bias.to(y.dtype)
        else:
            y = functional.linear(x, self.weight_io().t())
        start_a, start_b = adapter.get("start_A"), adapter.get("start_B")
        if start_a is None or start_b is None:
            return y
        return y - _product(x, start_a, start_b, adapter.config.scale)


class LoRAEmbedding(LowRankLayer):
    """Adapt an embedding by low rank: row ``i`` becomes ``W[i] + s · A[i] B``.

    A [V, R] starts at 0 and B [R, O] ~ N(0, 1), as in the LoRA paper's code and PEFT: from the
    first step on, the gradient of a token's row of A is its own. ``dropout`` has no meaning for
    token ids and is not applied, as in PEFT.
    """

    kind = "Embedding"

    @staticmethod
    def takes(base: nn.Module) -> bool:
        """Tell whether a module is a plain embedding."""
        return type(base) is nn.Embedding

    @property
    def num_embeddings(self) -> int:
        """Return the vocabulary size V."""
        return self.weight_io().shape[0]

    @property
    def embedding_dim(self) -> int:
        """Return the output width O."""
        return self.weight_io().shape[1]

    def start(self, config: LoRAConfig) -> Start:
        """Return A = 0 and B ~ N(0, 1)."""
        if config.init not in ("gaussian", "kaiming"):
            raise AlignkitError(
                f"LoRAConfig.init={config.init!r} is for linear layers; leave the embedding out of "
                "targets or use init='gaussian'"
            )
        weight_VO = self.weight_io()
        options: dict[str, Any] = {"device": weight_VO.device, "dtype": torch.float32}
        a_VR = torch.zeros(weight_VO.shape[0], config.r, **options)
        return Start(a_VR, torch.randn(config.r, weight_VO.shape[1], **options), subtract=False)

    def adapted(self, adapter: Adapter, ids: Tensor) -> Tensor:
        """Apply base and adapter to token ids [...]; returns [..., O] in the base's dtype."""
        a_VR, b_RO = adapter.factors()
        base = self.base(ids)
        rows = functional.embedding(ids, a_VR, self.base.padding_idx)  # type: ignore[arg-type]
        y = base + adapter.config.scale * (rows @ b_RO)
        magnitude = adapter.get("magnitude")
        if magnitude is not None:
            y = y * (magnitude / self.norms(adapter))
        embedded: Tensor = y.to(base.dtype)
        return embedded


def _product(x: Tensor, a_IR: Tensor, b_RO: Tensor, scale: float) -> Tensor:
    """Return ``s · x A B``, with A and s B rounded to x's dtype."""
    return (x @ a_IR.to(x.dtype)) @ (b_RO * scale).to(x.dtype)
