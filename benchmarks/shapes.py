"""Token ids of rows in the shapes people publish: alignkit beside the installed TRL.

    python benchmarks/shapes.py --data DIR --tokenizer DIR [--rows 3] [--json FILE]

DIR holds files such as ``alpaca.json`` and ``ultrafeedback.jsonl``. alignkit reads a file as it is.
TRL knows messages and prompts alone, so it is given the same rows in those columns, and prepares
them as its trainers do. For each row the ids of both are printed, and how they differ.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

Row = dict[str, Any]
ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function_call": "assistant"}


def main() -> int:
    """Print the rows of every file and count how they differ."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="a directory of files of rows")
    parser.add_argument("--tokenizer", required=True, help="a directory with a chat tokenizer")
    parser.add_argument("--rows", type=int, default=3, help="rows of each file to print")
    parser.add_argument("--json", type=Path, help="write the counts to this file")
    options = parser.parse_args()
    logging.disable()
    from alignkit.models import load_tokenizer

    tokenizer = load_tokenizer(options.tokenizer)
    found = {}
    for path in sorted(options.data.iterdir()):
        if path.suffix in (".json", ".jsonl"):
            found[path.name] = compare(path, tokenizer, options.rows)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    return 0


def compare(path: Path, tokenizer: Any, shown: int) -> dict[str, int]:
    """Print a file's first rows as both prepare them, and count the differences of all."""
    rows = read(path)
    ours, told = prepared_by_us(path, tokenizer)
    theirs = prepared_by_trl([in_trl_columns(row) for row in rows], tokenizer)
    print(f"\n## {path.name}: {told}")
    counts: Counter[str] = Counter()
    for number in range(1, len(rows) + 1):
        row = ours.get(number)
        differs = (
            "alignkit leaves it out" if row is None else difference(row, theirs[number], tokenizer)
        )
        counts[differs] += 1
        if row is not None and number <= shown:
            print(f"\nrow {number}: {differs}")
            for name, (prompt, answers) in (("alignkit", row), ("trl", theirs[number])):
                print(f"  {name:9}prompt {prompt}")
                for answer in answers:
                    print(f"  {'':9}scored {answer}")
    for differs, count in counts.most_common():
        print(f"\n{count} of {len(rows)} rows: {differs}")
    return dict(counts)


Prepared = tuple[list[int], list[list[int]]]
"""The ids of a prompt, and those that carry loss of each answer."""


def difference(ours: Prepared, theirs: Prepared, tokenizer: Any) -> str:
    """Return in a few words how two preparations of a row differ."""
    if ours == theirs:
        return "the same ids"
    prompt, answers = ours
    whole = [[*prompt, *answer] for answer in answers]
    given = [[*theirs[0], *answer] for answer in theirs[1]]
    pairs = list(zip(whole, given, strict=True))
    if not all(b[: len(a)] == a for a, b in pairs):
        return "other ids"
    tails = {tokenizer.decode(b[len(a) :]) for a, b in pairs}
    told = [f"trl scores {tail!r} after the turn's end" for tail in sorted(tails) if tail]
    if len(theirs[0]) < len(prompt):
        told.append("trl scores the prompt")
    if len(theirs[0]) > len(prompt):
        told.append("trl's prompt holds the answers' first words")
    return "the same ids, but " + " and ".join(told)


def read(path: Path) -> list[Row]:
    """Return the rows of a JSON or JSON-lines file."""
    text = path.read_text(encoding="utf-8")
    return (
        json.loads(text) if path.suffix == ".json" else [json.loads(x) for x in text.splitlines()]
    )


def in_trl_columns(row: Row) -> Row:
    """Return a row in the columns that TRL reads."""
    if "instruction" in row:
        asked = "\n".join(filter(None, [row["instruction"], row.get("input")]))
        return {
            "prompt": [message("user", asked)],
            "completion": [message("assistant", row["output"])],
        }
    if "conversations" in row:
        talk = [message(ROLES.get(m["from"], m["from"]), m["value"]) for m in row["conversations"]]
        if "chosen" not in row:
            return {"messages": talk, "tools": row.get("tools")}
        sides = {k: [message("assistant", row[k]["value"])] for k in ("chosen", "rejected")}
        return {"prompt": talk, **sides}
    return {name: row[name] for name in ("chosen", "rejected") if name in row} or {
        "messages": row["messages"]
    }


def message(role: str, content: str) -> Row:
    """Return a message."""
    return {"role": role, "content": content}


def prepared_by_us(path: Path, tokenizer: Any) -> tuple[dict[int, Prepared], str]:
    """Return the rows that alignkit's data module makes of a file, by their line."""
    from alignkit.data.encode.choose import choose_format
    from alignkit.data.encode.dialogues import DialogueEncoder
    from alignkit.data.read.sources import find_splits
    from alignkit.data.text.policies import Tally
    from alignkit.data.text.recognise import kind_of
    from alignkit.data.text.shapes import preference_sides, sft_sides

    sources = [each for split in find_splits(str(path)).values() for each in split]
    sides = preference_sides if kind_of(read(path)[0]) == "preference" else sft_sides
    choice = choose_format(tokenizer, sources, sides)
    encoder = DialogueEncoder(
        tokenizer, sides, max_length=10**6, prompt_format=choice.prompt_format
    )
    tally = Tally()
    drafts = [draft for source in sources for draft in encoder.drafts(source, tally)]
    shapes = ", ".join(f"{count} rows read as {name}" for name, count in tally.shapes.items())
    rows = {draft.line: (draft.prompt, draft.responses) for draft in drafts}
    return rows, f"{shapes}; {choice.prompt_format}: {choice.why}"


def prepared_by_trl(rows: list[Row], tokenizer: Any) -> dict[int, Prepared]:
    """Return what TRL's trainers make of rows before they train, by their number."""
    import datasets
    from trl import DPOTrainer, SFTTrainer

    datasets.disable_progress_bars()
    numbered = [{**row, "number": number} for number, row in enumerate(rows, start=1)]
    data = datasets.Dataset.from_list(numbered)
    args = SimpleNamespace(
        dataset_num_proc=None,
        max_length=None,
        truncation_mode="keep_start",
        dataset_text_field="text",
        assistant_only_loss=False,
        eos_token=None,
        chat_template_path=None,
        dataset_kwargs=None,
        shuffle_dataset=False,
    )
    trainer: Any = SimpleNamespace(
        _tokenizer=tokenizer, chat_template=None, completion_only_loss=True
    )
    if "chosen" in rows[0]:
        prepared = DPOTrainer._prepare_dataset(trainer, data, tokenizer, args, "train")
        return {
            row["number"]: (row["prompt_ids"], [row["chosen_ids"], row["rejected_ids"]])
            for row in prepared
        }
    prepared = SFTTrainer._prepare_dataset(trainer, data, tokenizer, args, False, None, "train")
    found = {}
    for row in prepared:
        scored = [label != -100 for label in row.get("labels") or row["input_ids"]]
        cut = scored.index(True)
        found[row["number"]] = (row["input_ids"][:cut], [row["input_ids"][cut:]])
    return found


if __name__ == "__main__":
    sys.exit(main())
