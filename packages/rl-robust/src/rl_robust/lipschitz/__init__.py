"""Lipschitz feedback policies: cloned from an expert under a hard bound on how far they amplify measurement errors.

Al Makdah, Krishnan and Pasqualetti 2021, "Learning Lipschitz Feedback Policies from Expert Demonstrations: Closed-Loop
Guarantees, Generalization and Robustness" (arXiv 2103.16629). A controller is fitted to pairs (state, control) with
``min (1/N) sum loss(pi(x_i), u_i)  subject to  lip(pi) <= lipschitz`` (the paper's alpha). What the user gets: a
*certified* constant, the distance from the expert, closed-loop deviation and extra cost under measurement errors of
size zeta, and the curve over alpha from which to choose.

=======================  ==========================================================================================
:mod:`.policies`         network (orthogonal layers, MaxMin), linear (clipped singular values), graph (extension)
:mod:`.graph`            all pairs ``|v_i - v_j| <= alpha |x_i - x_j|`` with a duality gap; an explicit extension;
                         from the pairs of nearest neighbours where there are many points
:mod:`.cloning`          :func:`fit_lipschitz_policy`, :func:`collect_demonstrations`, :func:`tradeoff`
:mod:`.bounds`           learning error, fill distance and its tail, closed loop, regret, deterioration
:mod:`.files`            policies on disk, certified again when they are read
:mod:`.measurement`      attacks on measurements: adjoint sweeps, gradient steps through a model, bang-bang
=======================  ==========================================================================================

Reconstructed: the problem and the kinds of guarantee are the paper's; every formula here is derived from the
assumptions that its result lists, and constants may differ from the printed ones. Norms are Euclidean throughout, in
the units of what the policy sees: put scalings into the task's frozen normaliser, and angles in as (cos, sin).

A smaller constant is *not* always more robust: on a plant with little damping of its own a low gain is slow and
accumulates errors. Look at the curve (:func:`tradeoff`), never at one alpha.

Left out: gradient penalties (no certificate).
"""

from rl_robust.lipschitz.bounds import (
    PolicyBound,
    closed_loop_bound,
    deterioration_bound,
    fill_distance,
    fill_distance_tail,
    learning_error_bound,
    regret_bound,
    stability_constants,
    uniform_box,
)
from rl_robust.lipschitz.cloning import (
    Cloning,
    Demonstrations,
    TradeoffRow,
    collect_demonstrations,
    fit_lipschitz_policy,
    largest_slope,
    policy_folder,
    residual_max,
    tradeoff,
)
from rl_robust.lipschitz.files import load_policy, save_policy
from rl_robust.lipschitz.graph import GraphValues, extend, lipschitz_values
from rl_robust.lipschitz.measurement import BangBang, ModelAttack, WorstCase, linear_model, worst_measurements
from rl_robust.lipschitz.policies import GraphLipschitzPolicy, LinearLipschitzPolicy, LipschitzPolicy, MaxMin

__all__ = [
    "BangBang",
    "Cloning",
    "Demonstrations",
    "GraphLipschitzPolicy",
    "GraphValues",
    "LinearLipschitzPolicy",
    "LipschitzPolicy",
    "MaxMin",
    "ModelAttack",
    "PolicyBound",
    "TradeoffRow",
    "WorstCase",
    "closed_loop_bound",
    "collect_demonstrations",
    "deterioration_bound",
    "extend",
    "fill_distance",
    "fill_distance_tail",
    "fit_lipschitz_policy",
    "largest_slope",
    "learning_error_bound",
    "linear_model",
    "lipschitz_values",
    "load_policy",
    "policy_folder",
    "regret_bound",
    "residual_max",
    "save_policy",
    "stability_constants",
    "tradeoff",
    "uniform_box",
    "worst_measurements",
]
