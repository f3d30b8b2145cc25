"""Two-stage robust problems with mixed-integer recourse, and exact and classical methods for them."""

from optim_robust.two_stage.branch_and_price import BranchAndPrice
from optim_robust.two_stage.capital_budgeting import CapitalBudgeting
from optim_robust.two_stage.ccg import ExactCCG, ScenarioEnumeration
from optim_robust.two_stage.files import load_problem, save_json
from optim_robust.two_stage.k_adaptability import KAdaptability
from optim_robust.two_stage.knapsack import RobustKnapsack
from optim_robust.two_stage.problem import AffineMatrix, AffineVector, Stage, TwoStageProblem
from optim_robust.two_stage.pyomo_model import PyomoProblem, read_pyomo
from optim_robust.two_stage.pyros import PyROS, to_pyros
from optim_robust.two_stage.solution import Recourse, Step, TwoStageSolution, WorstCase, relative_gap
from optim_robust.two_stage.static import Nominal, StaticRobust

__all__ = [
    "AffineMatrix",
    "AffineVector",
    "BranchAndPrice",
    "CapitalBudgeting",
    "ExactCCG",
    "KAdaptability",
    "Nominal",
    "PyROS",
    "PyomoProblem",
    "Recourse",
    "RobustKnapsack",
    "ScenarioEnumeration",
    "Stage",
    "StaticRobust",
    "Step",
    "TwoStageProblem",
    "TwoStageSolution",
    "WorstCase",
    "load_problem",
    "read_pyomo",
    "relative_gap",
    "save_json",
    "to_pyros",
]
