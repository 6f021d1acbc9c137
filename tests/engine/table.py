"""How every causal language model of transformers is scored: what ``docs/models.md`` says.

``python -m tests.engine.table`` writes it anew, over tiny random models of the installed version.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import peft
import torch
import transformers
from transformers.utils import logging as hf_logging

from alignkit.engine import check_engine, collate, score
from alignkit.engine.verify import _VERIFIED
from alignkit.errors import AlignkitError
from tests.engine.families import KINDS, UNBUILT, VARIANTS, tiny_family
from tests.lora.travel import RELOADED, UNADAPTED, Travel, travel

DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"
PACKED, MIXED, ALONE = "packed", "packed up to a length", "one sequence a forward"
REFUSED, UNTRIED = "refused", "not tried"
WAYS = (PACKED, MIXED, ALONE, REFUSED, UNTRIED)
TOLERANCE = 1e-4
"""Nats a token: a score beyond it is wrong."""

_HEAD = """# Which models are scored, and how

Written by `python -m tests.engine.table` over tiny random models of transformers {version}: do not
edit. Each is scored in fp32 on a batch of responses that are shorter and longer than its windows,
and every log-prob is held against the model's own forward, one sequence at a time. What packed rows
do not score rightly goes one sequence a forward, which is as right and slower (`model.packing:
require` refuses it); what neither way scores rightly is refused in one line.

Adapters are put on `all-linear`, moved at random, and their gradients held against those that the
gradient of the merged weights implies, in training mode and out of it. PEFT's directory is read by
PEFT {peft} and the merged one by transformers, and the logits of both held against the adapted
model's. A variant is adapted as its type is.

{counts}

| Type | Scored | Largest error, nats | Why not packed | LoRA targets | Left out | PEFT reload | \
Merged reload |
|---|---|---|---|---|---|---|---|
""".replace("\\\n", "")


@dataclass(frozen=True)
class Outcome:
    """What became of one type.

    Attributes:
        way: One of `WAYS`.
        error: Largest difference from the model's own log-probs; ``None`` without scores.
        reason: Why it is not packed; empty where it is.
        adapted: What became of its adapters.
    """

    way: str
    error: float | None = None
    reason: str = ""
    adapted: Travel = field(default_factory=Travel)

    def row(self, kind: str) -> str:
        """Format a line of the table."""
        if self.error is None:
            error = ""
        else:
            error = next(
                f"< {bound}" for bound in ("1e-5", "1e-4", "inf") if self.error < float(bound)
            )
        told = (self.adapted.targets, self.adapted.left_out, self.adapted.peft, self.adapted.merged)
        cells = (kind, self.way, error, *(cell.replace("|", "/") for cell in (self.reason, *told)))
        return f"| {' | '.join(cells)} |"


def outcome(kind: str) -> Outcome:
    """Score a tiny model of one type.

    Args:
        kind: A type of transformers, or one of `VARIANTS`.
    """
    from tests.engine.test_families import EXAMPLES, plain_scores

    model = tiny_family(kind)
    with torch.no_grad():
        truth = plain_scores(model)
        try:
            check_engine(model)
            scores = score(model, collate(EXAMPLES))
        except AlignkitError as error:
            line = str(error)
            assert "\n" not in line
            told = line.partition(" cannot be scored: ")[2].rpartition("; use another model")[0]
            return Outcome(REFUSED, reason=told or line)
    verified = getattr(model, _VERIFIED)
    way = PACKED if not verified.fault else MIXED if verified.packed else ALONE
    return Outcome(way, (scores - truth).abs().max().item(), verified.fault)


def listed() -> dict[str, str]:
    """Read which way the document names for each type."""
    rows = re.findall(r"^\| (\S+) \| ([^|]+) \|", DOCUMENT.read_text(), re.MULTILINE)
    return {kind: way for kind, way in rows if way in WAYS}


def main() -> None:
    """Write the document."""
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    outcomes = {kind: outcome(kind) for kind in KINDS}
    for kind, found in outcomes.items():
        if kind not in VARIANTS and found.way != REFUSED:
            with TemporaryDirectory() as place:
                outcomes[kind] = replace(found, adapted=travel(kind, Path(place)))
    why = "a tiny model of it takes more than small sizes, or another package"
    outcomes |= {kind: Outcome(UNTRIED, reason=why) for kind in UNBUILT}
    wrong = [kind for kind, each in outcomes.items() if (each.error or 0) > TOLERANCE]
    wrong += [f"{kind}: {o.adapted.wrong}" for kind, o in outcomes.items() if o.adapted.wrong]
    assert not wrong, wrong
    counts = Counter(each.way for each in outcomes.values())
    variants = sum(kind in VARIANTS for kind in outcomes)
    told = ", ".join(f"{counts[way]} {way}" for way in WAYS)
    types = [
        o.adapted
        for o in outcomes.values()
        if o.adapted.targets != UNTRIED and not o.adapted.targets.startswith(UNADAPTED)
    ]
    read = {
        way: sum(getattr(each, way) == RELOADED for each in types) for way in ("peft", "merged")
    }
    text = _HEAD.format(
        version=transformers.__version__,
        peft=peft.__version__,
        counts=f"{len(outcomes)} configurations, {variants} of them variants (`type+…`): {told}.\n"
        f"{len(types)} types adapted: {read['peft']} are read by PEFT and {read['merged']} merged; "
        "the others are refused in the line that stands in the table.",
    )
    rows = [outcomes[kind].row(kind) for kind in sorted(outcomes)]
    DOCUMENT.write_text(text + "\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
