"""Loading: what a string may name, and the one line that answers what it may not."""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import logging as hf_logging

from alignkit.errors import AlignkitError
from alignkit.lora import LoRAConfig, inject_lora
from alignkit.models import load as models
from alignkit.models import load_model, load_tokenizer
from alignkit.models.load import base_fingerprint

TinyModel = Callable[..., PreTrainedModel]
TARGETS = {"gpt2": "attn.c_attn", "gpt_neox": "query_key_value", "llama": "q_proj"}


@pytest.fixture
def saved_dir(tmp_path: Path, tiny_model: TinyModel, family: str) -> Path:
    """A saved tiny model of each family in turn."""
    tiny_model(family).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def gpt2_dir(tmp_path: Path, tiny_model: TinyModel) -> Path:
    tiny_model("gpt2").save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def error_of(function: Callable[..., object], *args: object, **kwargs: object) -> str:
    """Return the message of the AlignkitError that a call raises, checked to be one line."""
    with pytest.raises(AlignkitError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_directory_loads_as_saved(
    saved_dir: Path, tiny_model: TinyModel, family: str, dtype: torch.dtype
) -> None:
    loaded, saved = load_model(str(saved_dir), dtype=dtype), tiny_model(family)
    assert not loaded.training
    for (name, got), (_, want) in zip(
        loaded.named_parameters(), saved.named_parameters(), strict=True
    ):
        assert torch.equal(got, want.to(dtype)), name


def test_dtype_is_float32_whatever_the_checkpoint_holds(
    tmp_path: Path, tiny_model: TinyModel
) -> None:
    tiny_model("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    assert {p.dtype for p in load_model(str(tmp_path)).parameters()} == {torch.float32}


@pytest.mark.parametrize("as_file", [False, True])
def test_a_config_alone_takes_random_weights_on_request_only(
    saved_dir: Path, as_file: bool
) -> None:
    (saved_dir / "model.safetensors").unlink()
    base = str(saved_dir / "config.json") if as_file else str(saved_dir)
    message = error_of(load_model, base)
    assert base in message
    assert "random_init" in message

    def draw(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        model = load_model(base, random_init=True, dtype=torch.bfloat16)
        assert not model.training
        return next(model.parameters())

    assert draw(1).dtype == torch.bfloat16
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_random_init_reads_no_weights_where_there_are_some(gpt2_dir: Path) -> None:
    torch.manual_seed(0)
    drawn = load_model(str(gpt2_dir), random_init=True)
    assert base_fingerprint(drawn) != base_fingerprint(load_model(str(gpt2_dir)))


def test_a_local_load_draws_no_bars_and_leaves_them_as_they_were(
    gpt2_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for enabled in (True, False):
        getattr(hf_logging, f"{'en' if enabled else 'dis'}able_progress_bar")()
        capfd.readouterr()
        load_model(str(gpt2_dir))
        assert capfd.readouterr().err == ""
        assert hf_logging.is_progress_bar_enabled() == enabled
    hf_logging.enable_progress_bar()


def test_pickled_weights_are_not_opened(gpt2_dir: Path) -> None:
    (gpt2_dir / "model.safetensors").rename(gpt2_dir / "pytorch_model.bin")
    assert "pickled weights" in error_of(load_model, str(gpt2_dir))


def test_a_truncated_checkpoint_is_named(gpt2_dir: Path) -> None:
    file = gpt2_dir / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert str(gpt2_dir) in error_of(load_model, str(gpt2_dir))


def test_a_lost_parameter_is_refused_not_drawn_at_random(gpt2_dir: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = gpt2_dir / "model.safetensors"
    tensors = load_file(file)
    tensors.pop("transformer.h.1.attn.c_attn.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    message = error_of(load_model, str(gpt2_dir))
    assert "lack 1 parameters" in message
    assert "h.1.attn.c_attn.weight" in message


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("{", "JSON"),
        ("{}", "model_type"),
        ('{"model_type": "no_such_model"}', "no_such_model"),
        ('{"model_type": "vit"}', "Unrecognized configuration"),
    ],
)
def test_an_unusable_config_is_one_line(tmp_path: Path, config: str, said: str) -> None:
    (tmp_path / "config.json").write_text(config)
    assert said in error_of(load_model, str(tmp_path), random_init=True)


def test_remote_code_is_never_run(tmp_path: Path) -> None:
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto_map}))
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    error_of(load_model, str(tmp_path), random_init=True)


def test_an_adapter_is_no_base(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "init_from" in error_of(load_model, str(tmp_path))


@pytest.mark.parametrize("base", ["/no/such/dir", "./nothing", "a/b/c", "model.gguf", "c.json"])
def test_a_missing_path_is_named_without_asking_the_hub(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "hub_reachable", lambda: pytest.fail("asked the Hub"))
    assert f"base '{base}': no such file or directory" in error_of(load_model, base)


def test_a_file_of_another_kind_is_named(tmp_path: Path) -> None:
    (tmp_path / "weights.txt").write_text("0")
    assert "is not a model file" in error_of(load_model, str(tmp_path / "weights.txt"))


# The Hub --------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_missing_hub_is_told_at_once_with_the_way_out(
    load: Callable[[str], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*args: object, **kwargs: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    start = time.monotonic()
    message = error_of(load, "someone/no-such-model")
    assert "'someone/no-such-model'" in message
    assert "Hub cannot be reached" in message
    assert "local model directory or a .gguf file" in message
    assert time.monotonic() - start < 5


def test_offline_mode_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(models.urllib.request, "urlopen", lambda *a, **k: pytest.fail("asked"))
    assert "Hub cannot be reached" in error_of(load_model, "someone/no-such-model")


# GGUF -----------------------------------------------------------------------------------------


@pytest.fixture
def gguf_file(tmp_path: Path, tiny_model: TinyModel, tokenizer_dir: Path) -> Path:
    """The tiny llama in fp32 with its tokenizer, as llama.cpp's converter lays them out."""
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    model = tiny_model("llama")
    config, tokenizer = model.config, AutoTokenizer.from_pretrained(tokenizer_dir)
    file = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
    special = {tokenizer.eos_token_id}
    types = [
        gguf.TokenType.CONTROL if i in special else gguf.TokenType.NORMAL
        for i in range(len(tokenizer))
    ]
    writer.add_token_types(types)
    vocabulary = json.loads((tokenizer_dir / "tokenizer.json").read_text())["model"]
    writer.add_token_merges([" ".join(pair) for pair in vocabulary["merges"]])
    writer.add_bos_token_id(tokenizer.eos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, value in model.state_dict().items():
        count = heads.get(name.split(".")[-2])
        if count is not None:  # ggml pairs a rotation's two numbers next to each other
            value = value.view(count, 2, -1, config.hidden_size).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(names.get_name(name, (".weight",)), value.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_a_gguf_file_is_the_model_it_was_made_from(gguf_file: Path, tiny_model: TinyModel) -> None:
    loaded, made_from = load_model(str(gguf_file)), tiny_model("llama")
    assert not loaded.training
    ids = torch.arange(1, 60)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, made_from(ids).logits)
    halved = load_model(str(gguf_file), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in halved.parameters()} == {torch.bfloat16}
    drawn = load_model(str(gguf_file), random_init=True)
    assert drawn.num_parameters() == loaded.num_parameters()
    assert base_fingerprint(drawn) != base_fingerprint(loaded)


def test_a_gguf_file_holds_its_tokenizer(gguf_file: Path, tokenizer_dir: Path) -> None:
    loaded, made_from = load_tokenizer(str(gguf_file)), AutoTokenizer.from_pretrained(tokenizer_dir)
    text = "\n\nHuman: How do I bake bread?\n\nAssistant: Mix flour."
    assert loaded(text).input_ids == made_from(text).input_ids
    assert loaded.eos_token_id == loaded.pad_token_id == made_from.eos_token_id


def test_gguf_without_its_readers_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "gguf" else find_spec(name)
    )
    for load in (load_model, load_tokenizer):
        message = error_of(load, str(tmp_path / "model.gguf"))
        assert "needs gguf;" in message
        assert message.endswith("run pip install gguf accelerate")


def test_a_broken_gguf_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    file = tmp_path / "model.gguf"
    for content in (b"", b"not a gguf file at all", b"GGUF" + bytes(64)):
        file.write_bytes(content)
        assert str(file) in error_of(load_model, str(file))
        assert str(file) in error_of(load_tokenizer, str(file))


# Tokenizers -----------------------------------------------------------------------------------


def test_eos_pads_where_nothing_else_does(
    tokenizer_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO, logger="alignkit.models"):
        loaded = load_tokenizer(str(tmp_path))
    assert loaded.pad_token_id == loaded.eos_token_id
    assert len(loaded) == len(tokenizer)
    assert [r.message.count("no padding token") for r in caplog.records] == [1]


def test_a_padding_token_of_its_own_stays(tokenizer_dir: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer.pad_token = "a"
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).pad_token == "a"


def test_a_tokenizer_without_eos_is_refused(tokenizer_dir: Path, tmp_path: Path) -> None:
    shutil.copy(tokenizer_dir / "tokenizer.json", tmp_path)
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert "no EOS" in error_of(load_tokenizer, str(tmp_path))


def test_a_config_is_no_tokenizer(gpt2_dir: Path) -> None:
    """transformers makes a GPT-2 tokenizer of one token out of a GPT-2 config."""
    assert len(AutoTokenizer.from_pretrained(gpt2_dir)) == 1
    assert "holds no vocabulary" in error_of(load_tokenizer, str(gpt2_dir))


def test_an_empty_directory_is_no_tokenizer(tmp_path: Path) -> None:
    assert str(tmp_path) in error_of(load_tokenizer, str(tmp_path))


# Fingerprints ---------------------------------------------------------------------------------


def test_a_fingerprint_names_the_weights_not_the_loading(saved_dir: Path) -> None:
    prints = {
        base_fingerprint(load_model(str(saved_dir), dtype=dtype))
        for dtype in (torch.float32, torch.bfloat16)
    }
    assert len(prints) == 1
    assert len(prints.pop()) == 32


def test_a_fingerprint_ignores_adapters(tiny_model: TinyModel, family: str) -> None:
    model = tiny_model(family)
    before = base_fingerprint(model)
    inject_lora(model, LoRAConfig(r=4, targets=(TARGETS[family],)))
    assert base_fingerprint(model) == before


def test_a_fingerprint_sees_one_changed_weight_anywhere(tiny_model: TinyModel, family: str) -> None:
    """The exact checksum covers places between the samples."""
    model = tiny_model(family)
    seen = {base_fingerprint(model)}
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.view(-1)[parameter.numel() // 3 + 1] += 1.0
        seen.add(base_fingerprint(model))
    assert len(seen) == 1 + len(list(model.parameters()))


def test_a_fingerprint_sees_the_architecture_behind_equal_weights(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    before = base_fingerprint(model)
    model.config.num_attention_heads *= 2
    assert base_fingerprint(model) != before
