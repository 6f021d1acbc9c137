"""Give a language model a scalar head, and write it as a plain sequence-classification model."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from itertools import accumulate, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from alignkit.engine import Example, PackedBatch, collate, states_at
from alignkit.engine.interface import backbone
from alignkit.errors import AlignkitError
from alignkit.lora.inject import adapter_configs
from alignkit.lora.merge import merged_plain
from alignkit.models.dropout import own_dropout
from alignkit.models.load import embedding_size, load_tokenizer
from alignkit.utils.atomic import share_files
from alignkit.utils.autocast import no_autocast
from alignkit.utils.bars import without_bars
from alignkit.utils.finite import refuse_nonfinite_weights

HEAD = "reward_head"
"""Name of a model's scalar head, a vector [D] and no layer that adapters might take."""

_Classifier: Any = AutoModelForSequenceClassification
_TOLERANCE = 1e-3


def attach_head(model: PreTrainedModel) -> None:
    """Give a causal language model a trainable scalar head in fp32, which starts at zero.

    Nothing of the head over the vocabulary trains any more, as no reward depends on it, but what it
    shares with the embeddings does. A model that has a scalar head is unchanged.
    """
    if HEAD in model._parameters:
        return
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    used = {id(p) for p in backbone(model).parameters()}
    for parameter in head.parameters() if head is not None else ():
        parameter.requires_grad_(parameter.requires_grad and id(parameter) in used)
    width = model.config.get_text_config().hidden_size
    zeros = torch.zeros(width, device=model.device, dtype=torch.float32)
    model.register_parameter(HEAD, nn.Parameter(zeros))


def rewards(model: PreTrainedModel, batch: PackedBatch, padding: int) -> Tensor:
    """Return the reward of each response, [R] fp32.

    It is the head's product with the hidden state of the response's last token that is not padding.
    transformers takes the same token, and many tokenizers pad with EOS: the end itself is then not
    scored. A response of padding alone ends where its prompt does.

    Args:
        model: A model that went through `attach_head`.
        batch: On the model's device.
        padding: Id of the padding token.
    """
    states_RD = states_at(model, batch, _ends(batch, padding))
    # Autocast would round the product to bf16, in which rewards near each other are equal.
    with no_autocast(states_RD.device.type):
        return states_RD.float() @ model.get_parameter(HEAD).float()


def _ends(batch: PackedBatch, padding: int) -> Tensor:
    """Return the index of each sequence's last token that is not padding, [R] int64."""
    ids_T = batch.input_ids
    edges = []
    for span in batch.spans:
        first = span.start + span.prompt
        bounds = pairwise(accumulate(span.responses, initial=first))
        edges += [(span.start, first, *each) for each in bounds]
    start_R, prompt_R, first_R, end_R = torch.tensor(edges, device=ids_T.device).T
    place_T = torch.arange(len(ids_T), device=ids_T.device)
    kept_T = torch.where(ids_T == padding, -1, place_T).cummax(0).values
    kept_T = torch.cat((kept_T.new_full((1,), -1), kept_T))  # at an index, the last one before it
    own_R, asked_R = kept_T[end_R], kept_T[prompt_R]
    asked_R = torch.where(asked_R >= start_R, asked_R, first_R)  # a sequence of padding alone
    return torch.where(own_R >= first_R, own_R, asked_R)


def holds_reward(checkpoint: Mapping[str, Any]) -> bool:
    """Tell whether a checkpoint is a reward model's."""
    return any(name.rpartition(".")[2] == HEAD for name in checkpoint["state_dict"])


def is_classifier(path: str) -> bool:
    """Tell whether a directory holds a sequence-classification model with one label."""
    file = Path(path) / "config.json"
    if not file.is_file():
        return False
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return False
    kinds = config.get("architectures") or [] if isinstance(config, dict) else []
    return any(str(kind).endswith("ForSequenceClassification") for kind in kinds)


def load_classifier(
    path: str, device: torch.device
) -> tuple[Callable[[Sequence[Example]], list[list[float]]], PreTrainedTokenizerBase]:
    """Load a sequence-classification model as a function from examples to rewards.

    Args:
        path: Its directory.
        device: Where it computes.

    Raises:
        AlignkitError: It cannot be read, or has several labels.
    """
    try:
        with without_bars():
            model = _Classifier.from_pretrained(path, trust_remote_code=False).eval().to(device)
    except (OSError, ValueError) as error:
        raise AlignkitError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from error
    if model.config.num_labels != 1:
        raise AlignkitError(
            f"{path}: has {model.config.num_labels} labels, and a reward model has one"
        )

    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)

    def scores(examples: Sequence[Example]) -> list[list[float]]:
        length = max(len(e.prompt) + len(answer) for e in examples for answer in e.responses)
        if longest is not None and length > longest:
            raise AlignkitError(f"a sequence of {length} tokens exceeds its {longest} positions")
        return [
            [
                model(torch.tensor([[*each.prompt, *answer]], device=device)).logits[0, 0].item()
                for answer in each.responses
            ]
            for each in examples
        ]

    return scores, load_tokenizer(path)


def save_reward_model(
    model: PreTrainedModel,
    directory: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase,
) -> Path:
    """Write a reward model for transformers' `AutoModelForSequenceClassification`.

    Adapters are folded in. What was written is read back and must give a few sequences the same
    rewards.

    Args:
        model: A model that went through `attach_head`, in eval mode.
        directory: Made if missing.
        tokenizer: Saved beside it.

    Raises:
        AlignkitError: transformers has no sequence classifier of this family with a linear head, or
            gives other rewards.
    """
    directory = Path(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    padding = int(tokenizer.pad_token_id)
    probe = _probe(embedding_size(model))
    with torch.no_grad():
        expected = rewards(model, collate(probe).to(model.device), padding)
    with TemporaryDirectory(prefix=f".{directory.name}.", dir=directory.parent) as written:
        with own_dropout(model), merged_plain(model) if adapter_configs(model) else nullcontext():
            refuse_nonfinite_weights(model, "export, once merged", "use an earlier checkpoint")
            _write(model, written, padding)
        tokenizer.save_pretrained(written)
        _refuse_other_rewards(written, probe, expected.cpu())
        share_files(Path(written))
        directory.mkdir(exist_ok=True)
        for file in sorted(Path(written).iterdir()):
            shutil.move(file, directory / file.name)
    return directory


def _write(model: PreTrainedModel, directory: str, padding: int) -> None:
    config = type(model.config).from_dict(model.config.to_dict())
    config.num_labels = 1
    config.get_text_config().pad_token_id = padding
    try:
        classifier = _Classifier.from_config(config, dtype=backbone(model).dtype)
    except ValueError as error:
        raise AlignkitError(
            f"export: transformers has no sequence classifier for {type(model).__name__}"
        ) from error
    if type(getattr(classifier, "score", None)) is not nn.Linear:
        raise AlignkitError(
            f"export: {type(classifier).__name__} has no linear `score` to hold the reward's head"
        )
    classifier.base_model.load_state_dict(backbone(model).state_dict())
    with torch.no_grad():
        classifier.score.weight.copy_(model.get_parameter(HEAD)[None])
    with without_bars():
        classifier.save_pretrained(directory)


@torch.no_grad()
def _refuse_other_rewards(directory: str, probe: list[Example], expected: Tensor) -> None:
    with without_bars():
        other = _Classifier.from_pretrained(directory, trust_remote_code=False).eval()
    found = torch.stack(
        [
            other(torch.tensor([[*each.prompt, *answer]])).logits[0, 0]
            for each in probe
            for answer in each.responses
        ]
    )
    worst = (found.float() - expected).abs().max().item()
    if worst > _TOLERANCE * max(expected.abs().max().item(), 1.0):
        raise AlignkitError(
            f"export: read back by transformers, the reward model differs by {worst:.2g}; report "
            "this model"
        )


def _probe(vocabulary: int) -> list[Example]:
    ids = [(37 * i + 11) % vocabulary for i in range(40)]
    return [Example(ids[:9], [ids[9:15], ids[15:24]]), Example(ids[24:27], [ids[27:40]])]
