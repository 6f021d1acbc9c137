"""Checkpoints lost to ``kill -9``: runs that save all the time, each killed at a random moment.

    python benchmarks/kill9.py [--kills 60] [--other DIR] [--stock] [--json FILE]

A run trains a small model in full through the command line and writes two checkpoints a step. A
random time after its first one it is killed; then every file under the name of a checkpoint must be
whole, and ``last.ckpt`` be there. In every second run the temporary folder lies on another file
system than the checkpoints (``--other``). ``--stock`` has Lightning write them by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from sidebyside.shapes import SHAPES, write_random_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from alignkit.cli.front import main as alignkit_main
from alignkit.errors import AlignkitError
from alignkit.models.archive import read_archive
from alignkit.modules import base
from alignkit.utils.atomic import write_atomically

_WINDOW_S = 2.0  # a run is killed within this time of its first checkpoint
_PATIENCE_S = 120.0


def main() -> int:
    """Kill runs and count what they lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--other", default="/dev/shm", help="a folder on another file system")
    parser.add_argument("--stock", action="store_true", help="let Lightning write by itself")
    parser.add_argument("--width", type=int, default=512, help="of the model; decides the size")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="write the results to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = measure(options, Path(scratch))
    print(json.dumps({key: value for key, value in found.items() if key != "kills"}, indent=1))
    if options.json:
        write_atomically(Path(options.json), json.dumps(found, indent=1) + "\n")
    return 0


def measure(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Kill as many runs as asked for; return the counts, and what became of each."""
    draw = random.Random(options.seed)
    SHAPES["kill9"] = LlamaConfig(
        vocab_size=512,
        hidden_size=options.width,
        intermediate_size=2 * options.width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=0,
    )
    write_random_model("kill9", scratch / "model", seed=0)
    vocabulary = {word: id for id, word in enumerate(["<|endoftext|>", *map(str, range(200))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    ).save_pretrained(scratch / "model")
    lines = (json.dumps({"text": f"{number} " * 64}) + "\n" for number in range(200))
    write_atomically(scratch / "text.jsonl", "".join(lines))
    kills = []
    for number in range(options.kills):
        elsewhere = number % 2 == 1
        place = Path(tempfile.mkdtemp(dir=options.other if elsewhere else scratch))
        try:
            kills.append({"elsewhere": elsewhere, **kill(options.stock, scratch, place, draw)})
        finally:
            for left in place.iterdir():
                left.unlink()
            place.rmdir()
    return {
        "kills": kills,
        "count": len(kills),
        "elsewhere": sum(k["elsewhere"] for k in kills),
        "while_writing": sum(k["partial"] for k in kills),
        "checkpoint_megabytes": round(kills[0]["bytes"] / 1e6, 1) if kills else 0,
        "files_checked": sum(k["files"] for k in kills),
        "files_lost": sum(len(k["lost"]) for k in kills),
    }


def kill(stock: bool, scratch: Path, temporary: Path, draw: random.Random) -> dict[str, Any]:
    """Start a run, kill it, and read all that it leaves."""
    before = set(scratch.glob("runs/run/version_*"))
    # Not forked: PyTorch's threads of this process are none of a child's.
    process = get_context("spawn").Process(target=run, args=(stock, scratch, temporary))
    process.start()
    deadline = time.monotonic() + _PATIENCE_S
    while not (fresh := {p.parent for p in scratch.glob("runs/run/*/last.ckpt")} - before):
        if time.monotonic() > deadline or not process.is_alive():
            process.kill()
            raise AlignkitError(f"the run saved nothing: {(scratch / 'log').read_text()[-2000:]}")
        time.sleep(0.01)
    after = draw.uniform(0, _WINDOW_S)
    time.sleep(after)
    process.kill()  # SIGKILL
    process.join()
    (folder,) = fresh
    files = list(folder.glob("*.ckpt"))
    lost = [path.name for path in files if not is_whole(path)]
    if not (folder / "last.ckpt").exists():
        lost.append("last.ckpt")
    found = {
        "after_s": round(after, 3),
        "files": len(files),
        "bytes": max(path.stat().st_size for path in files),
        "partial": bool([*folder.glob("*.partial"), *temporary.iterdir()]),
        "lost": lost,
    }
    for path in folder.iterdir():
        path.unlink()
    return found


def is_whole(path: Path) -> bool:
    """Whether torch, and our checksum, read the file to its end."""
    try:
        torch.load(path, weights_only=True)
        read_archive(path)
    except Exception:
        return False
    return True


def run(stock: bool, scratch: Path, temporary: Path) -> None:
    """Train, in a process of its own that never returns."""
    log = os.open(scratch / "log", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(scratch)
    os.environ["ALIGNKIT_CACHE"] = str(scratch / "cache")
    tempfile.tempdir = str(temporary)
    if stock:
        base.seal_checkpoints = lambda trainer: None
    saver = "--trainer.callbacks.init_args"
    arguments = ["fit", "--model", "alignkit.LoRAModule", "--model.base", "model"]
    arguments += ["--model.lora", "null", "--data", "alignkit.OpenWebTextDataModule"]
    arguments += ["--data.path", "text.jsonl", "--data.block_size", "64"]
    arguments += ["--data.tokens_per_batch", "64", "--trainer.max_steps", "1000000"]
    arguments += ["--trainer.limit_val_batches", "0", "--trainer.enable_progress_bar", "false"]
    arguments += ["--trainer.logger", "TensorBoardLogger", "--trainer.logger.save_dir", "runs"]
    arguments += ["--trainer.logger.name", "run", "--trainer.accelerator", "cpu"]
    arguments += ["--trainer.callbacks+=alignkit.callbacks.Checkpoint"]
    arguments += [f"{saver}.every_n_train_steps", "1", f"{saver}.save_last", "true"]
    arguments += [f"{saver}.monitor", "step", f"{saver}.mode", "max", f"{saver}.save_top_k", "2"]
    arguments += [f"{saver}.filename", "{step}", f"{saver}.enable_version_counter", "false"]
    os._exit(alignkit_main(arguments))


if __name__ == "__main__":
    sys.exit(main())
