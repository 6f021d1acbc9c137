"""Tokenizers of the kinds that models come with, small and made on the spot."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

TEXT = ["\n\nHuman: How do I bake bread?\n\nAssistant: Mix flour, water, salt and yeast."] * 8

PLAIN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim }}<|eot_id|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{{ m.content | trim }}{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + m.content | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def gpt2() -> PreTrainedTokenizerBase:
    """No BOS."""
    return _fast(_byte_level("<|endoftext|>"), PLAIN, eos_token="<|endoftext|>")


def llama_3() -> PreTrainedTokenizerBase:
    """BOS from a post-processor and from the template; a turn ends with another token than EOS."""
    core = _byte_level(
        "<|begin|>", "<|end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
    )
    core.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), _around(core, "<|begin|> $A")]
    )
    return _fast(core, LLAMA_3, bos_token="<|begin|>", eos_token="<|end|>")


def gemma() -> PreTrainedTokenizerBase:
    """BOS because the configuration says ``add_bos_token``; spaces are ▁, unknown bytes tokens."""
    core = _sentencepiece("<pad>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
    core.normalizer = normalizers.Replace(" ", "▁")
    return _fast(
        core, GEMMA, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", add_bos_token=True
    )


def llama_2() -> PreTrainedTokenizerBase:
    """A space before every text, from the normalizer."""
    core = _sentencepiece("<s>", "</s>")
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    core.post_processor = _around(core, "<s> $A")
    return _fast(core, LLAMA_2, bos_token="<s>", eos_token="</s>")


def llama_2_metaspace() -> PreTrainedTokenizerBase:
    """The same space from the pre-tokenizer, as newer files have it, before the first word."""
    tokenizer = llama_2()
    backend: Any = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Sequence([])
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    return tokenizer


def adds_both() -> PreTrainedTokenizerBase:
    """BOS and EOS around every text; its template writes neither BOS nor EOS."""
    core = _byte_level("<s>", "</s>")
    core.post_processor = _around(core, "<s> $A </s>")
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    return _fast(core, template, bos_token="<s>", eos_token="</s>")


KINDS = {
    each.__name__: each for each in (gpt2, llama_3, gemma, llama_2, llama_2_metaspace, adds_both)
}


def _fast(core: Tokenizer, template: str, **options: Any) -> PreTrainedTokenizerBase:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **options)
    tokenizer.chat_template = template
    return tokenizer


def _byte_level(*special: str) -> Tokenizer:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(vocab_size=340, special_tokens=[*special], initial_alphabet=alphabet),
    )
    return core


def _sentencepiece(*special: str) -> Tokenizer:
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    core.normalizer = normalizers.Replace(" ", "▁")
    core.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    of_bytes = [f"<0x{i:02X}>" for i in range(256)]
    core.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=340, special_tokens=["<unk>", *special, *of_bytes])
    )
    whole = json.loads(core.to_str())
    whole["added_tokens"] = [t for t in whole["added_tokens"] if t["content"] not in of_bytes]
    whole["pre_tokenizer"] = None  # as in the models: BPE sees the whole text
    core = Tokenizer.from_str(json.dumps(whole))
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return core


def _around(core: Tokenizer, single: str) -> processors.TemplateProcessing:
    tokens = [token for token in single.split() if token != "$A"]
    return processors.TemplateProcessing(
        single=single, special_tokens=[(token, core.token_to_id(token)) for token in tokens]
    )
