"""Neur2RO: two-stage robust problems by column-and-constraint generation with a learned inner problem.

What it buys: a planner must decide before prices, demands or costs are known, reacts afterwards with integer decisions,
and wants a good first stage in seconds where exact methods take hours. A network learns the value of the inner
problem once for a *family* of instances; the loop then runs with the network inside two mixed-integer programs. What is
returned is certified: the true worst case of x is computed, the planner's dual bound is valid whatever the network.

Paper: Dumouchelle, Julien, Kurtz and Khalil 2024, "Neur2RO: Neural Two-Stage Robust Optimization" (ICLR; arXiv
2310.04345).

    network of sets          network.SetValueNetwork          data and labels       data.generate
    scales, files            model.ValueModel                 training              train.train (core's ``fit``)
    shortcuts for chains     chains                           the planner           main_problem.MainProblem
    the adversary            adversary.Adversary              the loop              loop.Neur2RO

Departures, each an option: labels in units of each instance (``label_scaling="per_instance"``); samples where the two
players meet (``sampler="aligned"``) and a share of the loss on differences between scenarios (``contrast``): the plain
error is dominated by differences between decisions, about which the loop never asks; the planner is told what visited
decisions truly cost (``verify``), and prices the true worst cases met last (``anchors``); conditional gradients in
place of projected ones. ``verify=False``, ``incumbent="last"``, ``label_scaling="per_size"``, ``sampler="paper"``,
``contrast=0`` is the paper's method. The first planner's problem takes the nominal scenario (the paper lets the planner
choose, which is bilinear). Reconstructed: the programs without indicator constraints, all big-M, the certificate.
Defaults of data, training and tolerances are the paper's.
"""

from optim_robust.neur2ro.families import CAPITAL_BUDGETING, CAPITAL_BUDGETING_LOANS, KNAPSACK, Family, family_of, fixed
from optim_robust.neur2ro.loop import Neur2RO, quick_network, solve_neur2ro
from optim_robust.neur2ro.model import ValueModel
from optim_robust.neur2ro.network import SetValueNetwork
from optim_robust.neur2ro.train import fit_value_network

__all__ = [
    "CAPITAL_BUDGETING",
    "CAPITAL_BUDGETING_LOANS",
    "KNAPSACK",
    "Family",
    "Neur2RO",
    "SetValueNetwork",
    "ValueModel",
    "family_of",
    "fit_value_network",
    "fixed",
    "quick_network",
    "solve_neur2ro",
]
