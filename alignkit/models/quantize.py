"""Keep the linear layers of a base in 4 or 8 bits, packed by bitsandbytes.

Embeddings, norms, routers and the output head stay as they are. Everything else that
``all-linear`` adapts is packed as it is loaded, from fp32 values on the CPU, so that one base has
one fingerprint wherever it runs.

Shape letters: T rows, I input width, O output width.
"""

from __future__ import annotations

import importlib.util
import logging
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import PreTrainedModel

from alignkit.errors import AlignkitError
from alignkit.lora.adapter import AdapterLayer, adapter_layers, plain_modules, replace_module
from alignkit.lora.kinds import QuantizedLinear
from alignkit.lora.targets import all_linear
from alignkit.utils.autocast import compute_dtype

log = logging.getLogger(__name__)

Quantization: TypeAlias = Literal["nf4", "int8"]

_BLOCK, _OUTER_BLOCK = 64, 256
_LEVELS = 127


class PackedLinear(QuantizedLinear):
    """Hold a linear layer's weight packed, with statistics that stay in fp32.

    Args:
        linear: The layer to pack; its bias goes along as it is.
    """

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype = linear.weight.dtype
        self.bias = linear.bias
        self.training = linear.training
        packed, statistics = self.pack(linear.weight.detach().float())
        self.weight = nn.Parameter(packed, requires_grad=False)
        for name, value in statistics.items():
            self.register_buffer(name, value)

    @staticmethod
    @abstractmethod
    def pack(weight_OI: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return a weight's packed values, and what their scales are kept as."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        """Move as the model moves; what scales the packed values keeps its dtype."""
        kept = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in kept.items():
            moved = self._buffers[name]
            if value is not None and moved is not None and moved.dtype != value.dtype:
                self._buffers[name] = value.to(moved.device)
        return self


class NF4Linear(PackedLinear):
    """Hold a weight in 4-bit NormalFloat with double quantization.

    Each block of 64 weights has an 8-bit scale and each 256 of those an fp32 one: 4.13 bits a
    weight (Dettmers et al. 2023, arXiv:2305.14314, section 3). Products and their gradient are
    bitsandbytes' own.
    """

    quantization = "nf4"
    absmax: Tensor
    outer_absmax: Tensor
    offset: Tensor
    code: Tensor
    outer_code: Tensor

    @staticmethod
    def pack(weight_OI: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return two weights a byte, and both levels of scales."""
        from bitsandbytes.functional import quantize_4bit

        packed, state = quantize_4bit(
            weight_OI, blocksize=_BLOCK, compress_statistics=True, quant_type="nf4"
        )
        return packed, {
            "absmax": state.absmax,
            "outer_absmax": state.state2.absmax,
            "offset": state.offset,
            "code": state.code,
            "outer_code": state.state2.code,
        }

    def state(self, dtype: torch.dtype) -> Any:
        """Return what bitsandbytes reads the packed values with, to values of a dtype."""
        from bitsandbytes.functional import QuantState

        outer = QuantState(
            absmax=self.outer_absmax, code=self.outer_code, blocksize=_OUTER_BLOCK,
            dtype=torch.float32,
        )  # fmt: skip
        return QuantState(
            absmax=self.absmax, shape=torch.Size((self.out_features, self.in_features)),
            dtype=dtype, blocksize=_BLOCK, code=self.code, quant_type="nf4", offset=self.offset,
            state2=outer,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to [..., I]; returns [..., O]."""
        from bitsandbytes import matmul_4bit

        x = x.to(compute_dtype(x.device.type, x.dtype))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        product: Tensor = matmul_4bit(x, self.weight, bias=bias, quant_state=self.state(x.dtype))
        return product

    def dequantized(self) -> Tensor:
        """Return the weight [O, I] in the dtype that it was packed from."""
        from bitsandbytes.functional import dequantize_4bit

        weight_OI: Tensor = dequantize_4bit(self.weight, self.state(self.dtype))
        return weight_OI


class Int8Linear(PackedLinear):
    """Hold a weight in 8 bits with a scale for each output.

    Products are taken with the weight unpacked for the moment, forward and backward: LLM.int8
    rounds activations too, by the largest of a batch, so that a neighbour would change a score.
    """

    quantization = "int8"
    scale: Tensor

    @staticmethod
    def pack(weight_OI: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return whole numbers of at most 127, and each output's scale."""
        from bitsandbytes.functional import int8_vectorwise_quant

        packed, absmax_O, _ = int8_vectorwise_quant(weight_OI.to(torch.float16))
        return packed, {"scale": absmax_O.float() / _LEVELS}

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to [..., I]; returns [..., O]."""
        x = x.to(compute_dtype(x.device.type, x.dtype))
        product: Tensor = _Unpacked.apply(x, self.weight, self.scale)  # type: ignore[no-untyped-call]
        return product if self.bias is None else product + self.bias.to(x.dtype)

    def dequantized(self) -> Tensor:
        """Return the weight [O, I] in the dtype that it was packed from."""
        return _unpacked(self.weight, self.scale, self.dtype)


class _Unpacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, packed_OI: Tensor, scale_O: Tensor) -> Tensor:
        ctx.save_for_backward(packed_OI, scale_O)
        return functional.linear(x, _unpacked(packed_OI, scale_O, x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        packed_OI, scale_O = ctx.saved_tensors
        return grad @ _unpacked(packed_OI, scale_O, grad.dtype), None, None


def _unpacked(packed_OI: Tensor, scale_O: Tensor, dtype: torch.dtype) -> Tensor:
    return (packed_OI * scale_O[:, None]).to(dtype)


_KINDS: dict[str, type[PackedLinear]] = {"nf4": NF4Linear, "int8": Int8Linear}


def packable_layers(model: PreTrainedModel) -> list[str]:
    """Return the paths of the linear layers of a plain model that `quantize` packs.

    Raises:
        AlignkitError: It has none.
    """
    modules = plain_modules(model)
    chosen = [path for path in all_linear(model).adapted if type(modules[path]) is nn.Linear]
    if not chosen:
        raise AlignkitError(
            f"model.quantize: {type(model).__name__} has no torch.nn.Linear to quantize; leave "
            "model.quantize out"
        )
    return chosen


def quantize(model: PreTrainedModel, to: Quantization) -> None:
    """Replace the linear layers of a plain model by packed ones, in place, one at a time.

    Args:
        model: On the CPU, without adapters.
        to: ``nf4`` or ``int8``.

    Raises:
        AlignkitError: bitsandbytes is not installed, or the model has no layer that can be packed.
    """
    need_bitsandbytes()
    modules, chosen = plain_modules(model), packable_layers(model)
    if told := str(all_linear(model)):
        log.warning("model.quantize: not packed: %s", told)
    for path in chosen:
        linear = modules[path]
        assert isinstance(linear, nn.Linear)  # for the type checker
        replace_module(model, path, _KINDS[to](linear))


def quantization(model: nn.Module) -> str | None:
    """Return what a model's linear layers are packed as, ``None`` where they are not."""
    packed = _first_packed(model)
    return None if packed is None else packed.quantization


def packed_from(model: nn.Module) -> str | None:
    """Return the name of the dtype that layers were packed from, ``None`` for a plain model."""
    packed = _first_packed(model)
    return None if packed is None else str(packed.dtype).removeprefix("torch.")


def _first_packed(model: nn.Module) -> QuantizedLinear | None:
    layers = plain_modules(model).values()
    return next((m for m in layers if isinstance(m, QuantizedLinear)), None)


def unquantize(model: nn.Module, original: nn.Module | None = None) -> None:
    """Give packed layers plain weights again, in place, below adapters too.

    Args:
        model: With or without adapters.
        original: Whose weights they get; by default what the packed values stand for.
    """
    wrapped: dict[str, AdapterLayer] = adapter_layers(model)
    theirs = {} if original is None else plain_modules(original)
    for path, module in plain_modules(model).items():
        if not isinstance(module, QuantizedLinear):
            continue
        plain = theirs.get(path)
        if plain is None:
            plain = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            weight_OI = module.dequantized().to(getattr(model, "dtype", module.dtype))
            plain.weight = nn.Parameter(weight_OI, requires_grad=False)
            plain.bias = module.bias
        plain.requires_grad_(False)
        if path in wrapped:
            wrapped[path].base = plain
        else:
            replace_module(model, path, plain)


def need_bitsandbytes() -> None:
    """Refuse to go on without bitsandbytes.

    Raises:
        AlignkitError: It is not installed; the line says what to install.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise AlignkitError(
            "model.quantize: needs bitsandbytes, which is not installed; run pip install "
            "bitsandbytes"
        )
