"""Each variant against its paper's formula."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from alignkit.lora import (
    LoRAConfig,
    LoRAEmbedding,
    LoRALinear,
    adapters_disabled,
    inject_lora,
    lora_parameter_groups,
    trainable_parameter_count,
)
from alignkit.lora.adapter import Adapter, TrainedModule

Make = Callable[..., PreTrainedModel]


def linear(seed: int = 0, **options: object) -> tuple[LoRALinear, Adapter, Tensor]:
    """A layer of 12 to 10 features, its adapter, and its base weight as [I, O]."""
    torch.manual_seed(seed)
    base = nn.Linear(12, 10)
    layer = LoRALinear(base, LoRAConfig(**{"r": 4, "alpha": 8, **options}))  # type: ignore[arg-type]
    return layer, layer.adapter("default"), base.weight.detach().t()


def x(rows: int = 5, width: int = 12) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(9))


def test_gaussian_start() -> None:
    """A ~ N(0, 0.01²): of 1000 x 64 draws the standard error of the deviation is 0.00003."""
    adapter = LoRALinear(nn.Linear(1000, 8), LoRAConfig(r=64)).adapter("default")
    assert adapter.lora_A.shape == (1000, 64)
    assert adapter.lora_A.std().item() == pytest.approx(0.01, abs=1e-4)
    assert adapter.lora_A.mean().item() == pytest.approx(0, abs=2e-4)
    assert not adapter.lora_B.any()


def test_kaiming_start() -> None:
    """Uniform in ±1/√in, what kaiming_uniform_ with a = √5 gives (the LoRA paper's code)."""
    adapter = LoRALinear(nn.Linear(400, 8), LoRAConfig(r=16, init="kaiming")).adapter("default")
    assert adapter.lora_A.abs().max().item() == pytest.approx(1 / 20, rel=1e-2)
    assert adapter.lora_A.std().item() == pytest.approx(1 / 20 / 3**0.5, rel=2e-2)
    assert not adapter.lora_B.any()


def test_formula_with_rslora() -> None:
    """y = x W + b + α/√r · x A B (arXiv:2312.03732): α/√r = 8/2 = 4, not 8/4 = 2."""
    layer, adapter, weight = linear(use_rslora=True)
    nn.init.normal_(adapter.lora_B)
    want = x() @ weight + layer.base.bias + 4 * x() @ adapter.lora_A @ adapter.lora_B
    torch.testing.assert_close(layer(x()), want)


def test_dropout_zeroes_the_adapters_input_only() -> None:
    layer, adapter, weight = linear(dropout=0.5)
    nn.init.normal_(adapter.lora_B)
    base = x() @ weight + layer.base.bias
    layer.train()
    torch.manual_seed(3)
    y = layer(x())
    torch.manual_seed(3)
    dropped = nn.functional.dropout(x(), 0.5)
    torch.testing.assert_close(y, base + 2 * dropped @ adapter.lora_A @ adapter.lora_B)
    layer.eval()
    torch.testing.assert_close(layer(x()), base + 2 * x() @ adapter.lora_A @ adapter.lora_B)


def test_dora_formula_and_constant_norm() -> None:
    """W' = m (W + sAB) / ‖W + sAB‖ by column (arXiv:2402.09353, eq. 5), a constant norm."""
    layer, adapter, weight = linear(use_dora=True)
    torch.testing.assert_close(adapter.magnitude, weight.norm(dim=0))
    torch.testing.assert_close(layer(x()), layer.base(x()))
    nn.init.normal_(adapter.lora_B)
    nn.init.normal_(adapter.magnitude)
    direction = weight + 2 * adapter.lora_A @ adapter.lora_B
    norm = direction.norm(dim=0).detach()
    want = x() @ (adapter.magnitude * direction / norm) + layer.base.bias
    torch.testing.assert_close(layer(x()), want)
    ours = torch.autograd.grad(layer(x()).pow(2).sum(), list(adapter.parameters()))
    theirs = torch.autograd.grad(want.pow(2).sum(), list(adapter.parameters()))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_pissa_starts_from_the_principal_directions() -> None:
    """s A B = U_r S_r V_rᵀ, the rest stays frozen, the sum is W (arXiv:2404.02948, eq. 2 to 4)."""
    layer, adapter, weight = linear(init="pissa")
    u, s, vh = torch.linalg.svd(weight)
    principal = u[:, :4] @ torch.diag(s[:4]) @ vh[:4]
    torch.testing.assert_close(2 * adapter.lora_A @ adapter.lora_B, principal)
    torch.testing.assert_close(adapter.lora_A.norm(dim=0), (s[:4] / 2).sqrt())
    torch.testing.assert_close(layer(x()), layer.base(x()))
    nn.init.normal_(adapter.lora_B)
    want = x() @ (weight - principal) + 2 * x() @ adapter.lora_A @ adapter.lora_B + layer.base.bias
    torch.testing.assert_close(layer(x()), want)
    torch.testing.assert_close(layer.base.weight.detach().t(), weight, rtol=0, atol=0)


def test_pissa_trains_as_with_the_residual_weight() -> None:
    """Gradients equal those of A and B over the residual weight, in both paths."""
    for dropout in (0.0, 0.3):
        layer, adapter, weight = linear(init="pissa", dropout=dropout)
        residual = weight - 2 * (adapter.lora_A @ adapter.lora_B).detach()
        torch.manual_seed(4)
        ours = torch.autograd.grad(layer(x()).pow(2).sum(), (adapter.lora_A, adapter.lora_B))
        torch.manual_seed(4)
        dropped = nn.functional.dropout(x(), dropout)
        y = x() @ residual + layer.base.bias + 2 * dropped @ adapter.lora_A @ adapter.lora_B
        theirs = torch.autograd.grad(y.pow(2).sum(), (adapter.lora_A, adapter.lora_B))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_olora_starts_from_the_qr_decomposition() -> None:
    """Wᵀ = Q R: Bᵀ = Q[:, :r] orthonormal, Aᵀ = R[:r] (arXiv:2406.01775, sec. 3)."""
    layer, adapter, weight = linear(init="olora")
    q, upper = torch.linalg.qr(weight.t())
    torch.testing.assert_close(adapter.lora_B @ adapter.lora_B.t(), torch.eye(4))
    torch.testing.assert_close(adapter.lora_A @ adapter.lora_B, (q[:, :4] @ upper[:4]).t())
    torch.testing.assert_close(layer(x()), layer.base(x()))


def test_orthogonal_starts_with_a_and_b_alive_and_their_product_zero() -> None:
    layer, adapter, _ = linear(init="orthogonal")
    assert adapter.lora_A.abs().min() > 0
    assert adapter.lora_B.abs().min() > 0
    torch.testing.assert_close(
        adapter.lora_A @ adapter.lora_B, torch.zeros(12, 10), rtol=0, atol=1e-6
    )
    torch.testing.assert_close(layer(x()), layer.base(x()))


def test_conv1d_equals_linear() -> None:
    layer, adapter, weight = linear(use_dora=True)
    conv = Conv1D(10, 12)
    with torch.no_grad():
        conv.weight.copy_(weight)
        conv.bias.copy_(layer.base.bias)
    other = LoRALinear(conv, LoRAConfig(r=4, alpha=8, use_dora=True))
    for mine, theirs in zip(
        adapter.parameters(), other.adapter("default").parameters(), strict=True
    ):
        nn.init.normal_(mine)
        theirs.data.copy_(mine.data)
    torch.testing.assert_close(layer(x()), other(x()))


@pytest.mark.parametrize("dora", [False, True])
def test_embedding_formula(dora: bool) -> None:
    torch.manual_seed(0)
    base = nn.Embedding(11, 6, padding_idx=2)
    layer = LoRAEmbedding(base, LoRAConfig(r=4, alpha=8, use_dora=dora))
    adapter = layer.adapter("default")
    assert not adapter.lora_A.any()
    assert adapter.lora_B.std() > 0.5
    ids = torch.tensor([[0, 2, 10], [3, 3, 1]])
    assert torch.equal(layer(ids), base(ids))
    nn.init.normal_(adapter.lora_A)
    table = base.weight + 2 * adapter.lora_A @ adapter.lora_B
    if dora:
        nn.init.normal_(adapter.magnitude)
        table = adapter.magnitude * table / table.norm(dim=0)
    # The padding row's A takes no gradient but its value counts, as the base's own row.
    torch.testing.assert_close(layer(ids), table[ids])
    layer(ids).sum().backward()
    assert not adapter.lora_A.grad[2].any()
    assert adapter.lora_A.grad[3].any()


@pytest.mark.parametrize(
    ("mode", "trained"),
    [
        ("none", set()),
        ("lora_only", {"attn.c_attn"}),
        ("all", {"ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"}),
    ],
)
def test_bias_modes(
    tiny_model: Make, ids: Tensor, shake: Callable[..., nn.Module], mode: str, trained: set[str]
) -> None:
    model = tiny_model("gpt2")
    before = model(ids).logits
    inject_lora(model, LoRAConfig(targets="c_attn", layers=(0,), bias=mode))  # type: ignore[arg-type]
    names = {
        name.removeprefix("transformer.")
        .removeprefix("h.0.")
        .removesuffix(".adapters.default.bias")
        for name, p in model.named_parameters()
        if p.requires_grad and name.endswith("bias") and ".h.1." not in name
    }
    assert names - {"ln_f"} == trained
    assert torch.equal(model(ids).logits, before)
    shake(model)
    assert not torch.allclose(model(ids).logits, before)
    with adapters_disabled(model):
        assert torch.equal(model(ids).logits, before)


def test_modules_to_save_train_in_fp32_over_a_bf16_base(tiny_model: Make, ids: Tensor) -> None:
    model = tiny_model("llama").bfloat16()
    before = model(ids).logits
    inject_lora(model, LoRAConfig(targets="q_proj", modules_to_save=("lm_head", "mlp", "norm")))
    assert torch.equal(model(ids).logits, before)
    # Per block an MLP of 3 · 32 · 64, rank 8 on 32 to 32; one head of 384 · 32; one norm of 32.
    assert trainable_parameter_count(model) == 2 * (3 * 32 * 64 + 2 * 8 * 32) + 384 * 32 + 32
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert isinstance(model.lm_head, TrainedModule)
    assert model.lm_head.in_features == 32
    model(ids).logits.float().pow(2).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_adapters_stay_fp32_when_the_model_is_cast() -> None:
    layer, adapter, _ = linear()
    value = adapter.lora_A.detach().clone()
    layer.to(torch.bfloat16)
    assert layer.base.weight.dtype == torch.bfloat16
    assert torch.equal(adapter.lora_A, value)
    layer.half()
    assert adapter.lora_A.dtype == torch.float32


def test_lora_plus_groups(tiny_model: Make) -> None:
    """η_B = λ η_A (arXiv:2402.12354): 2e-4 and, with λ = 16, 3.2e-3; no embedding's B."""
    model = inject_lora(
        tiny_model("llama"),
        LoRAConfig(targets=("q_proj", "embed_tokens"), use_dora=True, modules_to_save="lm_head"),
    )
    slow, fast = lora_parameter_groups(model, lr=2e-4, ratio=16, weight_decay=0.1)
    assert slow["lr"] == 2e-4
    assert fast["lr"] == pytest.approx(3.2e-3)
    assert fast["weight_decay"] == 0.1
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in fast["params"]} == {
        f"model.layers.{i}.self_attn.q_proj.adapters.default.lora_B" for i in (0, 1)
    }
    together = [id(p) for p in (*slow["params"], *fast["params"])]
    assert sorted(together) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    torch.optim.AdamW([slow, fast])
