r"""Federated reconnaissance: devices that meet new classes share them in kilobytes, and none is forgotten.

Sean M. Hendryx, Dharma Raj KC, Bradley Walls, Clayton T. Morrison, "Federated Reconnaissance: Efficient, Distributed,
Class-Incremental Learning", NeurIPS 2021 workshop on federated learning, arXiv:2109.00150; the network is that of
Snell, Swersky and Zemel 2017 (arXiv:1703.05175).

One encoder f, trained on base classes and then frozen, is on every device. A class is the mean of its feature vectors
(its prototype c) with the number n of examples behind it. A device learns a class by averaging, sends what it *added*
since the last broadcast, and the server folds that in. No gradient, no step size, no data leave the device.

- episode loss, cross entropy over ``-||f(x) - c||^2`` -> :func:`prototypical_loss`, as an objective of
  ``robust_core.training.fit`` -> :class:`Prototypical`, with the order of samples :class:`EpisodeSampler`
- online average ``c+ = c + n'/(n + n') (c' - c)`` -> :func:`fold`; what a client added, from totals -> :func:`unfold`
- merging at the server, plain or by any robust rule ``Tensor[n, d] -> Tensor[d]`` -> :func:`merge_deltas`
- ``argmin_c ||f(x) - c||^2`` over all classes known -> :class:`PrototypeClassifier`; with every feature vector kept
  (the exact reference) -> :class:`EmbeddingStore`
- missions with evaluations E0, E1, E2 and bytes -> :func:`plan_missions`, :func:`run_missions`
- baselines: ``lower`` :class:`SequentialFineTuning`, ``upper`` :class:`JointRetraining`, :class:`ICaRL`,
  :class:`FedAvg`

Facts that the tests check: after any missions, in any order and grouping, the server's prototypes are those of the
pooled data, so that merging loses nothing against one place that sees all; a class nobody revisits keeps its bits. The
error of a prototype is at most ``sqrt(tr Cov / n)`` in root mean square, whichever devices brought the n examples.

The released code folds a client's *total* mean in with the weight of what it added, which counts old examples twice;
here the added part is sent. The claim measures what the published formula costs.

A prototype of one example *is* the feature vector of that example: sharing prototypes is not private.
:func:`perturb` adds Gaussian noise; no privacy budget is derived. A mean has breakdown point 0: with clients that may
lie, give a robust rule and a quorum (an extension, not in the paper); a class that only liars report stays theirs.

Defaults are those of the paper's benchmark (5 clients, 5 classes of 30 examples for each client and mission, 5-way
5-shot episodes, Adam at 1e-3). Left out: the schedules of the released code, which never steps its own. Reconstructed:
the baselines' settings where the paper is silent, which are arguments.
"""

from optim_robust.federated.reconnaissance.baselines import FedAvg, ICaRL, JointRetraining, SequentialFineTuning
from optim_robust.federated.reconnaissance.classifier import EmbeddingStore, PrototypeClassifier
from optim_robust.federated.reconnaissance.episodes import (
    EpisodeSampler,
    Prototypical,
    conv_encoder,
    prototypical_loss,
)
from optim_robust.federated.reconnaissance.missions import (
    Learner,
    Record,
    plan_missions,
    run_missions,
    traffic_bytes,
)
from optim_robust.federated.reconnaissance.prototypes import (
    PrototypeState,
    fold,
    merge_deltas,
    perturb,
    standard_error,
    summarise,
    unfold,
)

__all__ = [
    "EmbeddingStore",
    "EpisodeSampler",
    "FedAvg",
    "ICaRL",
    "JointRetraining",
    "Learner",
    "PrototypeClassifier",
    "PrototypeState",
    "Prototypical",
    "Record",
    "SequentialFineTuning",
    "conv_encoder",
    "fold",
    "merge_deltas",
    "perturb",
    "plan_missions",
    "prototypical_loss",
    "run_missions",
    "standard_error",
    "summarise",
    "traffic_bytes",
    "unfold",
]
