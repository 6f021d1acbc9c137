"""Collect every preference loss that ships with alignkit, and the interface they share.

A loss is a frozen dataclass with its own parameters: ``DPO(beta=0.1)(policy, reference)`` returns
one loss for each pair. A loss whose equation has no ε has no ``label_smoothing``. Defaults are
those of the papers, with β = 0.1 where a paper leaves it open.
"""

from alignkit.objectives.logistic import (
    AOT,
    DPO,
    EXO,
    DiscoPOP,
    NormalizedDPO,
    RobustDPO,
    UnpairedAOT,
)
from alignkit.objectives.pairs import PairScores, PreferenceLoss, known_losses, unknown_loss
from alignkit.objectives.pointwise import BCO, NCA, APODown, APOZero
from alignkit.objectives.reference_free import ORPO, SimPO
from alignkit.objectives.regression import IPO, SPPO, Hinge

__all__ = [
    "AOT",
    "BCO",
    "DPO",
    "EXO",
    "IPO",
    "NCA",
    "ORPO",
    "SPPO",
    "APODown",
    "APOZero",
    "DiscoPOP",
    "Hinge",
    "NormalizedDPO",
    "PairScores",
    "PreferenceLoss",
    "RobustDPO",
    "SimPO",
    "UnpairedAOT",
    "known_losses",
    "unknown_loss",
]
