"""SRPO, IPO and DPO for finitely many answers: the exact optimum, exact training, exact revision.

The oracle of the tests and of the claim, and the quickest way to see what the methods do. ``p[i, j]`` is the
probability that answer i is preferred to answer j, with p + p^T = 1; it need be neither Bradley-Terry nor transitive.
All is float64.

- inner and outer optimum of SRPO (arXiv 2406.01660): pi'(i|j) proportional to ref'(i|j) exp(p[i, j] / beta), with sum
  Z(j), and pi(j) proportional to ref(j) / Z(j): :func:`srpo_closed_form`;
- the population minimiser of a loss over pairs from mu x mu with random hard labels: :func:`fit_tabular`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rl_robust.preference.pairwise import dpo_loss, ipo_loss
from rl_robust.preference.srpo import SRPOLogRatios, improvement_loss, writer_loss
from robust_core.checks import check_choice, check_count, check_number

__all__ = ["TabularFit", "bradley_terry", "fit_tabular", "revise_tabular", "srpo_closed_form", "win_probability"]


class TabularFit(NamedTuple):
    """What training found.

    Attributes:
        pi: (n,) the writer.
        pi_dagger: (n, n) the reviser; row j is its distribution when shown answer j. The reference for DPO and IPO.
        loss: the expected loss at the end.
    """

    pi: Tensor
    pi_dagger: Tensor
    loss: float


def _check_preferences(p: Tensor) -> Tensor:
    p = torch.as_tensor(p, dtype=torch.float64)
    if p.ndim != 2 or p.shape[0] != p.shape[1] or len(p) < 2:
        raise ValueError(f"p has shape {tuple(p.shape)}; (n, n) with n of at least 2 is needed")
    if not bool(((p >= 0) & (p <= 1)).all()) or float((p + p.T - 1).abs().max()) > 1e-9:
        raise ValueError("p must hold probabilities with p[i, j] + p[j, i] = 1")
    return p


def _check_rows(name: str, rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    rows = torch.as_tensor(rows, dtype=torch.float64)
    if rows.shape != shape or not bool((rows > 0).all()) or float((rows.sum(-1) - 1).abs().max()) > 1e-9:
        raise ValueError(f"{name} must be of shape {shape} with positive entries whose rows sum to 1")
    return rows


def srpo_closed_form(
    p: Tensor, ref: Tensor | None = None, ref_dagger: Tensor | None = None, *, beta: float
) -> tuple[Tensor, Tensor]:
    """Return the exact optimum (pi (n,), pi_dagger (n, n)); row j of pi_dagger is the reviser that is shown answer j.

    Args:
        p: (n, n) preferences.
        ref: (n,) reference of the writer; uniform when None.
        ref_dagger: (n, n) reference of the reviser, row j when shown answer j; ``ref`` in each row when None.
        beta: above 0.
    """
    check_number("beta", beta, low=0.0, open_low=True)
    p, ref, ref_dagger = _checked(p, ref, ref_dagger)
    scores = ref_dagger.log() + p.T / beta
    log_z = scores.logsumexp(1)
    return (ref.log() - log_z).softmax(0), (scores - log_z[:, None]).exp()


def _checked(p: Tensor, ref: Tensor | None, ref_dagger: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    p = _check_preferences(p)
    n = len(p)
    ref = torch.full((n,), 1 / n, dtype=torch.float64) if ref is None else _check_rows("ref", ref, (n,))
    given = ref.expand(n, n) if ref_dagger is None else ref_dagger
    return p, ref, _check_rows("ref_dagger", given, (n, n))


def bradley_terry(scores: Tensor) -> Tensor:
    """Return (n, n) preferences sigmoid(s_i - s_j)."""
    scores = torch.as_tensor(scores, dtype=torch.float64)
    return (scores[:, None] - scores).sigmoid()


def win_probability(policy: Tensor, p: Tensor, opponent: Tensor) -> float:
    """Return the probability that an answer of ``policy`` (n,) is preferred to one of ``opponent`` (n,)."""
    return float(policy @ p @ opponent)


def revise_tabular(start: Tensor, pi_dagger: Tensor, n_revisions: int) -> Tensor:
    """Return (n_revisions + 1, n): the distribution of the answer after 0, 1, ... revisions."""
    check_count("n_revisions", n_revisions, low=0)
    stages = [start]
    for _ in range(n_revisions):
        stages.append(stages[-1] @ pi_dagger)
    return torch.stack(stages)


def fit_tabular(
    p: Tensor,
    mu: Tensor,
    *,
    method: Literal["srpo", "ipo", "dpo"],
    beta: float,
    mix: float = 0.5,
    ref: Tensor | None = None,
    ref_dagger: Tensor | None = None,
    max_iter: int = 2000,
) -> TabularFit:
    """Minimise the expected loss over pairs from mu x mu with hard labels drawn from ``p``, exactly (L-BFGS).

    Args:
        p: (n, n) preferences.
        mu: (n,) the policy that wrote the answers of the data; positive, or an answer would never be seen.
        method: which loss.
        beta: above 0.
        mix: of SRPO.
        ref: (n,) reference of the writer; uniform when None.
        ref_dagger: (n, n) reference of the reviser; ``ref`` in each row when None.
        max_iter: iterations of L-BFGS.
    """
    check_choice("method", method, ("srpo", "ipo", "dpo"))
    check_number("beta", beta, low=0.0, open_low=True)
    check_number("mix", mix, low=0.0, high=1.0)
    p, ref, ref_dagger = _checked(p, ref, ref_dagger)
    n = len(p)
    drawn = _check_rows("mu", mu, (n,))
    weight = 2 * torch.outer(drawn, drawn) * p  # i against j and i won, in either order of drawing
    i, j = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
    write, revise = ref.log().clone().requires_grad_(), ref_dagger.log().clone().requires_grad_()

    def expected() -> Tensor:
        r, r_dagger = write.log_softmax(0) - ref.log(), revise.log_softmax(1) - ref_dagger.log()
        if method != "srpo":
            loss = dpo_loss if method == "dpo" else ipo_loss
            return (weight * loss(r[i], r[j], beta=beta)).sum()
        six = SRPOLogRatios(r_dagger[j, i], r_dagger[j, j], r_dagger[i, i], r_dagger[i, j], r[i], r[j])
        each = (1 - mix) * writer_loss(six, beta=beta) + mix * improvement_loss(six, beta=beta)
        return (weight * each).sum()

    optimiser = torch.optim.LBFGS(
        [write, revise], max_iter=max_iter, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = expected()
        value.backward()
        return value

    with torch.enable_grad():
        optimiser.step(closure)  # pyright: ignore
        loss = float(expected().detach())
    return TabularFit(write.detach().softmax(0), revise.detach().softmax(1), loss)
