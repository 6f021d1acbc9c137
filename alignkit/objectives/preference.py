"""Collect every preference loss that ships with alignkit, and the interface they share.

A loss is a frozen dataclass with its own parameters: ``DPO(beta=0.1)(policy, reference)`` returns
one loss for each pair. A loss whose equation has no ε has no ``label_smoothing``. Defaults are
those of the papers, with β = 0.1 where a paper leaves it open.
"""

from alignkit.objectives.divergences import AlphaDPO, ForwardKLDPO, JensenShannonDPO
from alignkit.objectives.likelihood import CPO, DPOP, RPO, ChosenNLL
from alignkit.objectives.logistic import (
    AOT,
    DPO,
    EXO,
    DiscoPOP,
    NormalizedDPO,
    RobustDPO,
    UnpairedAOT,
)
from alignkit.objectives.pairs import PairScores, PreferenceLoss, known_losses
from alignkit.objectives.pointwise import BCO, NCA, APODown, APOZero
from alignkit.objectives.ranked import PlackettLuce, RankedScores
from alignkit.objectives.reference_free import ORPO, AlphaPO, SimPO
from alignkit.objectives.regression import IPO, SPPO, Hinge
from alignkit.objectives.reweighted import LDDPO, WPO
from alignkit.objectives.unknown import unknown_loss
from alignkit.objectives.weighted import WeightedSum

__all__ = [
    "AOT",
    "BCO",
    "CPO",
    "DPO",
    "DPOP",
    "EXO",
    "IPO",
    "LDDPO",
    "NCA",
    "ORPO",
    "RPO",
    "SPPO",
    "WPO",
    "APODown",
    "APOZero",
    "AlphaDPO",
    "AlphaPO",
    "ChosenNLL",
    "DiscoPOP",
    "ForwardKLDPO",
    "Hinge",
    "JensenShannonDPO",
    "NormalizedDPO",
    "PairScores",
    "PlackettLuce",
    "PreferenceLoss",
    "RankedScores",
    "RobustDPO",
    "SimPO",
    "UnpairedAOT",
    "WeightedSum",
    "known_losses",
    "unknown_loss",
]
