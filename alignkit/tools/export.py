"""Run ``alignkit export``, which writes a checkpoint for readers without alignkit."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Literal

import torch
from jsonargparse import ArgumentParser
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignkit.data.text.chat_templates import template_of
from alignkit.errors import AlignkitError
from alignkit.lora.inject import adapter_configs
from alignkit.lora.merge import merged_plain
from alignkit.lora.resize import rows_before
from alignkit.models.archive import write_archive
from alignkit.models.checkpoint import (
    base_record,
    load_policy,
    policy_base,
    policy_format,
    read_checkpoint,
)
from alignkit.models.export import Format
from alignkit.models.export import export as write_model
from alignkit.models.find import find_checkpoint
from alignkit.models.fingerprint import base_identity
from alignkit.models.gguf_file import need_gguf
from alignkit.models.hub import check_push
from alignkit.models.hub import push as push_folder
from alignkit.models.load import embedding_size, load_model, stored_dtype
from alignkit.models.place import absolute_base, as_argument, base_header
from alignkit.models.quantize import quantization, unquantize
from alignkit.models.readback import refuse_other_answers
from alignkit.models.reward import save_reward_model
from alignkit.models.text_format import TextFormat, write_format
from alignkit.tools.card import write_card
from alignkit.utils.atomic import output_path

_PROBED = 32
"""Tokens whose logits are compared when packed weights give way to plain ones."""


def export(
    model: str,
    output: str,
    *,
    to: Format | Literal["reward", "checkpoint"] = "peft",
    base: str | None = None,
    dtype: Literal["base", "float32", "bfloat16", "float16"] = "base",
    plain: bool = False,
    onto: Literal["dequantized", "original"] = "dequantized",
    push: str | None = None,
) -> Path:
    """Write a checkpoint for use elsewhere.

    The text format of training is written to ``alignkit.json``, and a merged model's tokenizer gets
    it as its chat template, so that other readers ask the model as it was trained.

    Args:
        model: A checkpoint of any stage (.ckpt), a run's folder or a PEFT adapter directory.
        output: The directory to write; made if missing, never written into if it holds files.
        to: ``peft``, the adapter as PEFT writes it; ``merged``, a whole transformers model with the
            adapter folded in and its tokenizer, for AutoModelForCausalLM, vLLM, lm-eval or
            llama.cpp's converter; ``safetensors``, the adapter as one file; ``gguf``, the merged
            model and its tokenizer as one file for llama.cpp and Ollama, in the families Llama,
            Mistral, Qwen2 and Qwen3; ``reward``, a reward model's checkpoint as a whole model for
            AutoModelForSequenceClassification; ``checkpoint``, one ``last.ckpt`` without the shards
            that several processes wrote, to go on training from.
        base: The base model's path, if it is no longer where the checkpoint says.
        dtype: Dtype of the weights of a merged model or a GGUF file; ``base`` is the one that the
            base is stored in.
        plain: Write a PiSSA or OLoRA adapter as ordinary LoRA of twice the rank.
        onto: What a merged model gets that was trained over a quantized base: ``dequantized``, the
            weights that the packed ones stand for, which answers as it was trained; ``original``,
            those that they were packed from. The largest change of a logit is told.
        push: A repository of the Hugging Face Hub, such as ``me/my-model``, to put the export
            into; a new one is made private.

    Returns:
        The directory.

    Raises:
        AlignkitError: The checkpoint or its base cannot be read, the output holds files, the format
            cannot express the adapter, or its reader would not find all of it.
    """
    place = output_path(output, "--output")
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise AlignkitError(f"--output {output}: exists and is not empty; choose another directory")
    _check_use(to, dtype=dtype, plain=plain, onto=onto)
    model = find_checkpoint(model)
    if push is not None:
        check_push(push)
    if to == "checkpoint":
        write_archive(place / "last.ckpt", read_checkpoint(model))
        print(f"wrote {place / 'last.ckpt'}")
        return _pushed(place, push)
    if to == "reward":
        _export_reward(model, place, base)
        return _pushed(place, push)
    if to == "gguf":
        need_gguf()
    whole = to in ("merged", "gguf")
    place_of_base = base or policy_base(model)
    named = base or base_record(model)[0]
    with as_argument("model", model):
        written = stored_dtype(place_of_base) if dtype == "base" else getattr(torch, dtype)
    # Adapters stay fp32 beside a base of any dtype; only a merged model is cast.
    policy, tokenizer = load_policy(model, base=base, dtype=written if whole else torch.float32)
    trained = policy_format(model)
    if trained is not None and whole:
        _keep_text_format(policy, tokenizer, trained)
    told = ""
    packed = quantization(policy) is not None
    if onto == "original" and not packed:
        raise AlignkitError(f"--onto original: {model} was not trained over a quantized base")
    if not whole and not adapter_configs(policy):
        raise AlignkitError(
            f"{model}: has no adapter for --to {to}; export --to merged writes the whole model"
        )
    if whole and packed:
        told = _unpack(policy, place_of_base, onto)
    header = {}
    if not whole:
        header = {**base_identity(policy).header(), **base_header(place_of_base, named)}
    write_model(
        policy,
        place,
        to,
        base=absolute_base(place_of_base),
        plain=plain,
        tokenizer=tokenizer,
        header=header,
    )
    if to == "merged":
        with merged_plain(policy) if adapter_configs(policy) else nullcontext():
            refuse_other_answers(policy, place)
    if trained is not None:
        write_format(trained, place)
    if to == "peft" and rows_before(policy) is not None:
        tokenizer.save_pretrained(str(place))  # the base's has not all of the tokens
    precision = str(written if whole else torch.float32).removeprefix("torch.")
    write_card(model, place, to, base=named, dtype=precision)
    told = f", {precision}{told}" if whole else ""
    print(f"wrote {place} ({to}{told})")
    return _pushed(place, push)


def _pushed(place: Path, push: str | None) -> Path:
    """Return an export's folder, which is put into a repository if one is named."""
    if push is not None:
        print(f"pushed to {push_folder(place, push)}")
    return place


def _check_use(to: str, *, dtype: str, plain: bool, onto: str) -> None:
    """Refuse options that a format has no use for.

    Raises:
        AlignkitError: One was given.
    """
    whole, adapter = ("merged", "gguf"), ("peft", "safetensors")
    for flag, given, formats in (
        (f"--dtype {dtype}", dtype != "base", whole),
        (f"--onto {onto}", onto != "dequantized", whole),
        ("--plain", plain, adapter),
    ):
        if given and to not in formats:
            raise AlignkitError(f"{flag}: is for --to {' and '.join(formats)}, not {to}")


def _export_reward(model: str, place: Path, base: str | None) -> None:
    """Write a reward model with its tokenizer, its text format and its card."""
    policy, tokenizer = load_policy(model, base=base, reward=True)
    save_reward_model(policy, place, tokenizer)
    trained = policy_format(model)
    if trained is not None:
        write_format(trained, place)
    named = base or base_record(model)[0]
    precision = str(policy.dtype).removeprefix("torch.")
    write_card(model, place, "reward", base=named, dtype=precision)
    print(f"wrote {place} (reward, {precision})")


@torch.no_grad()
def _unpack(policy: PreTrainedModel, base: str, onto: Literal["dequantized", "original"]) -> str:
    """Give a model with packed layers plain weights; say which and how far its logits move."""
    ids = torch.arange(_PROBED)[None] * 37 % embedding_size(policy)
    before = policy(ids, use_cache=False).logits.float()
    original = load_model(base, dtype=policy.dtype) if onto == "original" else None
    unquantize(policy, original)
    with merged_plain(policy):
        after = policy(ids, use_cache=False).logits.float()
    change, scale = (after - before).abs().max().item(), before.abs().max().item()
    return f" onto the {onto} base; largest logit change {change:.2g} of {scale:.2g}"


def _keep_text_format(
    policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, trained: TextFormat
) -> None:
    """Store the chat template and the end tokens of training for transformers' generation."""
    tokenizer.chat_template = template_of(trained, tokenizer) or tokenizer.chat_template
    config = policy.generation_config
    if config is not None and trained.ends:
        known = config.eos_token_id
        theirs = known if isinstance(known, list) else [known]
        ends = sorted({end for end in (*theirs, *trained.ends) if end is not None})
        config.eos_token_id = ends[0] if len(ends) == 1 else ends


def add_arguments(parser: ArgumentParser) -> None:
    """Add the flags of `export`, which takes what ``parser`` returns as keyword arguments."""
    parser.add_function_arguments(export)
