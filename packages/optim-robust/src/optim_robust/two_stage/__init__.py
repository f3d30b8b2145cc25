"""Two-stage robust problems with mixed-integer recourse, and exact and classical methods for them."""

from optim_robust.two_stage.problem import AffineMatrix, AffineVector, Stage, TwoStageProblem
from optim_robust.two_stage.solution import Recourse, Step, TwoStageSolution, WorstCase, relative_gap

__all__ = [
    "AffineMatrix",
    "AffineVector",
    "Recourse",
    "Stage",
    "Step",
    "TwoStageProblem",
    "TwoStageSolution",
    "WorstCase",
    "relative_gap",
]
