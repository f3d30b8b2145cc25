"""How much interval bounds lose on a network: propagation tightness, 1 where they are exact, near 0 where all is lost.

Yuhao Mao, Mark Niklas Müller, Marc Fischer, Martin Vechev, "Understanding Certified Training with Interval Bound
Propagation", ICLR 2024, arXiv 2306.10426.

What it buys: a number that says *why* a certified network is good or bad. Near 1 a stronger verifier cannot help, and
the network has paid for it with regularisation; near 0 interval training has not begun to work. Read it beside
accuracy and verified accuracy, which :func:`tightness_report` always gives with it: a collapsed network has a
tightness without meaning.

- tightness of deep linear networks, ``|W_L .. W_1| eps / (|W_L| .. |W_1| eps)`` -> :func:`linear_tightness`
- local tightness, each ReLU replaced by its 0/1 state at the input, margins merged into the last layer ->
  :func:`local_tightness`
- tightness by definition, with the exact range of the margins over the box -> :func:`true_tightness`
- when the bounds of two layers are exact -> :func:`is_propagation_invariant`; the signs that forbid it ->
  :func:`sign_violations`
- expectation at initialisation, ``prod rho(d_k)`` -> :func:`expected_init_tightness`
- growth of intervals in a linear embedding and reconstruction -> :func:`embedding_growth`
- all of it on a data set or through a training -> :func:`tightness_report`; as a part of an evaluation ->
  :class:`Tightness`
- the SABR training that the paper compares with -> :mod:`vision_robust.certified.sabr`

Local tightness is the limit of true tightness for ``eps -> 0`` wherever no pre-activation is exactly 0, and no bound of
it elsewhere. That limit extends the definition to all layers that ``robust_core`` can bound: leaky ReLUs, sigmoid
and tanh by their slopes at the input, max pooling by the winner of each window, residual sums. A pre-activation of
exactly 0 counts as active, as in the official code. Everything is computed in float64 and nothing is clamped: where
the interval bounds have width 0 (a dead network) the ratio is NaN and counted apart.

Left out: the theorem that interval training raises tightness (the claim measures it). Reconstructed: the expectation
at initialisation and the growth of embeddings, derived anew and tested against closed forms.
"""

from vision_robust.certified.ibp_tightness.exact import exact_bounds, true_tightness
from vision_robust.certified.ibp_tightness.linear import (
    embedding_growth,
    expected_init_tightness,
    is_propagation_invariant,
    linear_tightness,
    linear_widths,
    sign_violations,
)
from vision_robust.certified.ibp_tightness.local import local_tightness, local_widths
from vision_robust.certified.ibp_tightness.report import (
    Layer,
    Tightness,
    TightnessReport,
    tightness_report,
)

__all__ = [
    "Layer",
    "Tightness",
    "TightnessReport",
    "embedding_growth",
    "exact_bounds",
    "expected_init_tightness",
    "is_propagation_invariant",
    "linear_tightness",
    "linear_widths",
    "local_tightness",
    "local_widths",
    "sign_violations",
    "tightness_report",
    "true_tightness",
]
