"""Write how many tokens the prompts and answers of real pairs hold, and nothing of their text.

    python benchmarks/lengths.py --data HH_DIR --tokenizer GPT2_DIR --out benchmarks/hh_lengths.json

With ``--lengths`` the benchmarks draw random token ids of these lengths, which cost what the real
ones cost. ``hh_lengths.json`` holds HH-RLHF harmless-base's training pairs of up to 512 tokens.
"""

from __future__ import annotations

import argparse
import json
import sys

from sidebyside.examples import MAX_LENGTH

from alignkit.data import HHPreferenceDataModule
from alignkit.errors import AlignkitError
from alignkit.utils.atomic import check_output, write_atomically


def main() -> int:
    """Encode the pairs as they are trained on, and write their lengths."""
    flags = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    flags.add_argument("--data", required=True, help="directory or file of pairs")
    flags.add_argument("--tokenizer", required=True, help="directory or Hub id")
    flags.add_argument("--out", required=True, metavar="FILE")
    chosen = flags.parse_args()
    try:
        path = check_output(chosen.out, "--out")
        data = HHPreferenceDataModule(chosen.tokenizer, chosen.data, max_length=MAX_LENGTH)
        pairs = data.train_dataloader().dataset
    except AlignkitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = (pairs[index] for index in range(len(pairs)))  # type: ignore[arg-type]
    lengths = [[len(row.prompt), *map(len, row.responses)] for row in rows]
    if path is not None:
        write_atomically(path, json.dumps(lengths, separators=(",", ":")) + "\n")
    print(f"{len(lengths)} pairs, {sum(map(sum, lengths))} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
