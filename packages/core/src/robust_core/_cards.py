"""The methods of this package, as data."""

from robust_core.methods import MethodCard

CARDS: tuple[MethodCard, ...] = (
    MethodCard(
        slug="comp-sum-losses",
        title="Comp-sum losses and their smooth adversarial form",
        paper="Mao, Mohri and Zhong 2023, arXiv 2304.07288",
        kind="objective",
        task="classification",
        target="robust_core.losses:SmoothAdvCompSumLoss",
        example="robust_core._examples:comp_sum_losses",
        claim="robust_core.claims.comp_sum_losses",
    ),
    MethodCard(
        slug="randomized-smoothing",
        title="Randomized smoothing with early stopping",
        paper="Cohen, Rosenfeld and Kolter 2019, arXiv 1902.02918",
        kind="certifier",
        task="classification",
        target="robust_core.certificates:Smoothing",
        example="robust_core._examples:randomized_smoothing",
    ),
    MethodCard(
        slug="adversarial-training",
        title="Adversarial training",
        paper="Madry, Makelov, Schmidt, Tsipras and Vladu 2018, arXiv 1706.06083",
        kind="objective",
        task="classification",
        target="robust_core.training:Adversarial",
        example="robust_core._examples:adversarial_training",
        verified=("cpu", "ddp-gloo"),
    ),
    MethodCard(
        slug="trades",
        title="TRADES: accuracy plus the divergence that an attacker can cause",
        paper="Zhang, Yu, Jiao, Xing, El Ghaoui and Jordan 2019, arXiv 1901.08573",
        kind="objective",
        task="classification",
        target="robust_core.training:Trades",
        example="robust_core._examples:trades",
    ),
    MethodCard(
        slug="gaussian-training",
        title="Training under Gaussian noise, for randomised smoothing",
        paper="Cohen, Rosenfeld and Kolter 2019, arXiv 1902.02918",
        kind="objective",
        task="classification",
        target="robust_core.training:GaussianNoise",
        example="robust_core._examples:gaussian_training",
    ),
)
