"""Robust counterfactuals: advice that still holds after the model was retrained.

A rejected applicant is told which changed features the model would accept. T-Rex scores such a counterfactual by its
*stability*, how confidently and evenly the model accepts its neighbourhood, and moves it, or picks another, until the
stability is high enough. For tables and images, any classifier, any target class, all queries in one batch.

    recourse = Recourse(Score(model, target=1), MutableSpec.of_columns(data.columns, immutable=("age",)))
    found = TRexIterative(recourse, tau=0.75).generate(rejected)
    models = retrain_models(Retraining(build), data, n=50)
    print(evaluate_counterfactuals({"T-Rex:I": found}, recourse, models, reference=data.x))

F. Hamman, E. Noorani, S. Mishra, D. Magazzeni, S. Dutta 2023, "Robust Counterfactual Explanations for Neural Networks
With Probabilistic Guarantees", ICML, arXiv 2305.11997.

==========================================================  =======================================================
stability ``mean_i m(x_i) - gamma |x - x_i|`` (def. 3)      :func:`stability` with ``lipschitz``
relaxed ``mean_i m(x_i) - |m(x) - m(x_i)|``                 :func:`stability` without: it carries *no* theorem
theorem 1, and the draws that it needs                      :func:`stability_guarantee`, :func:`required_samples`
Lipschitz constant of a softmax score                       :func:`lipschitz_constant`
T-Rex:I, T-Rex:NN                                           :class:`TRexIterative`, :class:`TRexNearestNeighbor`
T-Rex in a latent space                                     :class:`TRexLatent`, :class:`SmallVAE`, :class:`ELBO`
natural model changes                                       :class:`Retraining`, :func:`retrain_models`
validity of held-out retrainings, without assumptions       :func:`validity_bounds`
cost, validity, validity under change, LOF                  :func:`evaluate_counterfactuals`
closest, nearest neighbour, Wachter, SNS, ROAR              :class:`ClosestCounterfactual` and so on
==========================================================  =======================================================

What to believe: theorem 1 assumes that changed models agree with the present one on average *at the point in question*.
A point that was searched for a high score regresses to the mean, so the assumption fails where it is used; and with
realistic Lipschitz constants the bound is mostly vacuous. :func:`validity_bounds` assumes only independent retrainings.
Neither covers drift of the data.

Defaults are the paper's: k = 1000, sigma = 0.05 for features in [0, 1], tau = 0.75 (the paper tunes it per data set),
20 steps of 0.01 in a ball of radius 1. Differences from the published code: the stability is checked before a step, the
draws stay the same over the steps (common random numbers) and the reported stability has fresh ones, ranges are per
feature, and what did not arrive says so. The theorem's constant and proof, and the latent search, are reconstructed and
tested. Left out: C-CHVAE and REVISE as methods of their own (:class:`TRexLatent` with a small ``tau`` searches alike).
"""

from vision_robust.explain.robust_counterfactuals.baselines import Roar, StableNeighbor, WachterCounterfactual
from vision_robust.explain.robust_counterfactuals.changed import Retraining, retrain_models
from vision_robust.explain.robust_counterfactuals.evaluate import (
    Row,
    Table,
    ValidityBounds,
    evaluate_counterfactuals,
    outlier_score,
    validity_bounds,
)
from vision_robust.explain.robust_counterfactuals.features import MutableSpec
from vision_robust.explain.robust_counterfactuals.found import Counterfactuals
from vision_robust.explain.robust_counterfactuals.latent import ELBO, SmallVAE, TRexLatent
from vision_robust.explain.robust_counterfactuals.neighbours import NearestCounterfactual, TRexNearestNeighbor
from vision_robust.explain.robust_counterfactuals.search import ClosestCounterfactual, Generator, TRexIterative
from vision_robust.explain.robust_counterfactuals.stability import (
    Recourse,
    Score,
    lipschitz_constant,
    required_samples,
    stability,
    stability_guarantee,
)

__all__ = [
    "ELBO",
    "ClosestCounterfactual",
    "Counterfactuals",
    "Generator",
    "MutableSpec",
    "NearestCounterfactual",
    "Recourse",
    "Retraining",
    "Roar",
    "Row",
    "Score",
    "SmallVAE",
    "StableNeighbor",
    "TRexIterative",
    "TRexLatent",
    "TRexNearestNeighbor",
    "Table",
    "ValidityBounds",
    "WachterCounterfactual",
    "evaluate_counterfactuals",
    "lipschitz_constant",
    "outlier_score",
    "required_samples",
    "retrain_models",
    "stability",
    "stability_guarantee",
    "validity_bounds",
]
