"""List the losses that there are, where one was named that is none of them."""

from __future__ import annotations

from difflib import get_close_matches

from alignkit.errors import AlignkitError
from alignkit.objectives.pairs import known_losses


def unknown_loss(name: str) -> AlignkitError:
    """Return the error about a name that no loss has, with a suggestion and the known names."""
    kinds = {kind.__name__: kind for kind in known_losses()}
    if name.casefold() == "kto":
        return AlignkitError("model.loss KTO: takes unpaired answers; train it with KTOModule")
    meant = [other for other, kind in kinds.items() if kind.trl_name == name]
    folded = {other.casefold(): other for other in kinds}
    close = get_close_matches(name.casefold(), folded, n=1, cutoff=0.5)
    meant = meant or [folded[match] for match in close]
    hint = f"did you mean {meant[0]}? " if meant else ""
    listed = ", ".join(sorted(kinds, key=str.casefold))
    return AlignkitError(
        f"model.loss: there is no preference loss {name!r}; {hint}"
        f"choose one of {listed}, or the class path of your own"
    )
