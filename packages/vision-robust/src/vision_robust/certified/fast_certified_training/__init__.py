r"""Fast certified training: l-infinity certificates from interval bounds in tens of epochs instead of hundreds.

Zhouxing Shi, Yihan Wang, Huan Zhang, Jinfeng Yi, Cho-Jui Hsieh, "Fast Certified Robust Training with Short Warmup",
NeurIPS 2021, arXiv:2103.17268.

Training on interval bounds collapses unless the radius grows very slowly: at the usual initialisations the bounds
explode with depth, and bounds that are pushed down kill the ReLUs. Three cheap changes cure it:

- weights from N(0, 2 pi / n^2) for fan-in n, which keeps radii constant through depth -> :func:`ibp_init_`
- batch normalisation after every layer but the last, with the statistics of the clean inputs at both ends of each
  interval -> ``robust_core``'s ``BoundCertifier.training_pass``; networks -> ``vision_robust.models.cnn7``,
  ``wide_resnet8``, ``mlp``
- two regularisers while the radius grows -> :func:`tightness_loss` (L_tight), :func:`relu_balance_loss` (L_relu)
- the growth of the radius ("smoothed" schedule) -> :class:`SmoothedEps`
- the loss L_rob + lambda (L_tight + L_relu), lambda = lambda_0 (1 - eps / eps_target); its CROWN-IBP variant with
  kappa = (eps_target - eps) / eps_target -> :class:`FastCertified`, an objective for ``robust_core.training.fit``
- what to watch in training -> :func:`bound_figures`, :class:`Monitor`, :func:`plot_training`

Train with Adam at 5e-4, times 0.2 at milestones (``piecewise(milestones, factor=0.2)``), ``clip_norm=10``, no weight
decay. Inputs are normalised by a ``Normalize`` layer of the model, balls are clipped to the domain of the threat.

Left out: "loss fusion" (a bound of the loss itself, which saves the K - 1 rows of CROWN-IBP). Defaults are those of the
official release. Reconstructed: the layers of the residual networks. Not from the paper: where the sign pattern that
L_relu looks at is one-sided, a term is 0, as in the release.
"""

from vision_robust.certified.fast_certified_training.initialise import ibp_init_, reference_init_
from vision_robust.certified.fast_certified_training.monitor import (
    BoundFigures,
    Monitor,
    bound_figures,
    bound_growth,
    plot_training,
)
from vision_robust.certified.fast_certified_training.objective import (
    FastCertified,
    SmoothedEps,
    relu_balance_loss,
    tightness_loss,
)

__all__ = [
    "BoundFigures",
    "FastCertified",
    "Monitor",
    "SmoothedEps",
    "bound_figures",
    "bound_growth",
    "ibp_init_",
    "plot_training",
    "reference_init_",
    "relu_balance_loss",
    "tightness_loss",
]
