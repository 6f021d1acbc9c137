"""Measure how far bf16 log-probabilities of responses are from fp32's, and what less error costs.

    python benchmarks/precision.py --base DIR --data DIR --pairs 16 --json precision.json

Each arm scores the same pairs; the error is that of log π(y|x), summed over a response, in nats:

* `trl`: fp32 weights under bf16 autocast, as TRL loads a model (transformers' own forward, one
  sequence a forward);
* `today`: bf16 weights under autocast, alignkit's own;
* `residual`: the same with the residual stream in fp32;
* `logits`: `today` with logits that are not rounded to bf16;
* `both`: `model.residual: float32`.

On a CPU without bf16 units PyTorch's bf16 products take minutes. There each product is computed in
fp32 from the same rounded operands and rounded once, as the units do it, and no times are given.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from contextlib import ExitStack, nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ARMS = ("trl", "today", "residual", "logits", "both")
PRODUCTS = {
    torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm,
    torch.ops.aten.addmm_, torch.ops.aten.linear,
}  # fmt: skip


class EmulatedProducts(TorchDispatchMode):
    """Compute bf16 products in fp32 and round the result, as bf16 units do."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket not in PRODUCTS or not any(
            isinstance(a, torch.Tensor) and a.dtype == torch.bfloat16 for a in args
        ):
            return func(*args, **kwargs)
        wide = [a.float() if isinstance(a, torch.Tensor) else a for a in args]
        out = kwargs.pop("out", None)
        if func.overloadpacket is torch.ops.aten.addmm_:
            return args[0].copy_(torch.addmm(*wide, **kwargs))
        plain = getattr(func.overloadpacket, "default")  # noqa: B009
        product = plain(*wide, **kwargs)
        return product.to(torch.bfloat16) if out is None else out.copy_(product)


def has_bf16_units() -> bool:
    return torch.cuda.is_available() or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def read_pairs(base: str, place: str, count: int, length: int) -> list[Any]:
    """Return real pairs as examples: the first ones whose sequences are short enough."""
    import gzip

    from transformers import AutoTokenizer

    from alignkit.engine import Example

    tokenizer = AutoTokenizer.from_pretrained(base)
    file = next(
        p
        for p in sorted(Path(place).rglob("*"))
        if p.name.startswith("test") and p.name.endswith(".gz")
    )
    examples = []
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            prompt, mark, chosen = row["chosen"].rpartition("\n\nAssistant:")
            other, _, rejected = row["rejected"].rpartition("\n\nAssistant:")
            if prompt != other or not chosen or not rejected:
                continue
            ids = [tokenizer(text).input_ids for text in (prompt + mark, chosen, rejected)]
            if len(ids[0]) + max(map(len, ids[1:])) <= length and min(map(len, ids)) > 0:
                examples.append(Example(ids[0], ids[1:]))
            if len(examples) == count:
                break
    return examples


def sums_of(arm: str, base: str, examples: list[Any], dtype: torch.dtype) -> tuple[Any, float]:
    """Return log π(y|x) of every response under an arm, and the seconds it took."""
    from alignkit.engine import collate, response_sums, score
    from alignkit.engine.tail import use_exact_logits
    from alignkit.models.load import load_model

    stored = torch.float32 if arm in ("truth", "trl") else dtype
    model = load_model(base, dtype=stored) if arm != "trl" else plain_model(base)
    model.requires_grad_(False)  # a frozen head, as with LoRA
    with ExitStack() as stack:
        if arm in ("residual", "both"):
            from alignkit.models.residual import widen_residual

            widen_residual(model)
            if arm == "residual":
                model._alignkit_exact_logits = False
        if arm == "logits":
            use_exact_logits(model)
        if arm != "truth":
            stack.enter_context(torch.autocast(model.device.type, dtype))
        stack.enter_context(torch.no_grad())
        stack.enter_context(EmulatedProducts() if not has_bf16_units() else nullcontext())
        start = time.perf_counter()
        if arm == "trl":
            found = [plain_sum(model, e.prompt, r) for e in examples for r in e.responses]
            return torch.tensor(found), time.perf_counter() - start
        sums = []
        for first in range(0, len(examples), 8):
            batch = collate(examples[first : first + 8])
            sums.append(response_sums(score(model, batch), batch))
        return torch.cat(sums), time.perf_counter() - start


def plain_model(base: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def plain_sum(model: Any, prompt: list[int], response: list[int]) -> float:
    """Score one response as TRL does: logits of autocast, log-softmax in fp32."""
    ids = torch.tensor([[*prompt, *response]])
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
    logps = logits.float().log_softmax(-1)
    return float(logps.gather(1, torch.tensor(response)[:, None]).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", required=True, help="a model of the llama, gpt2 or neox family")
    parser.add_argument("--data", required=True, help="a directory with HH-RLHF's test split")
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--length", type=int, default=256, help="most tokens of a sequence")
    parser.add_argument("--rounds", type=int, default=1, help="of interleaved times")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    examples = read_pairs(options.base, options.data, options.pairs, options.length)
    truth, _ = sums_of("truth", options.base, examples, torch.bfloat16)
    errors: dict[str, float] = {}
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for _ in range(options.rounds):
        for arm in ARMS:
            sums, taken = sums_of(arm, options.base, examples, torch.bfloat16)
            errors[arm] = math.sqrt((sums - truth).double().square().mean().item())
            seconds[arm].append(taken)
            print(f"{arm:9} RMS {errors[arm]:.3f} nats a response", flush=True)
    result = {
        "responses": len(truth),
        "tokens": sum(len(r) for e in examples for r in e.responses),
        "rms": errors,
        "emulated": not has_bf16_units(),
        "seconds": {arm: median(taken) for arm, taken in seconds.items()}
        if has_bf16_units()
        else None,
    }
    print(json.dumps(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
