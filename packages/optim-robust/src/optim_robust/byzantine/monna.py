"""MoNNA: learning with peers that may lie, by local momentum and one nearest-neighbour average (arXiv 2209.10931).

Farhadkhani, Guerraoui, Gupta, Hoang, Pinot and Stephan, ICML 2023. It buys training without a trusted server: each peer
keeps a model, takes a momentum step on its own data, sends the result, and averages the vectors nearest to its own. No
peer, faulty or not, can move another farther than honest vectors do, and a round costs O(n d) beside the gradient.

    m = beta m + (1 - beta) g;  half = theta - gamma_t m         -> optim_robust.collab.node.NodeProgram.half_step
    theta = mean of the r - f of r received vectors nearest to half -> optim_robust.byzantine.mixing.NearestNeighbors
    (alpha, lambda)-reduction and when it contracts              -> optim_robust.byzantine.theory.nna_bound

:class:`MoNNA` names a setting and what is proved of it; :class:`MoNNAOptimizer` is one peer inside anybody's training
loop, over any transport. ``optim_robust.collab.simulate`` runs all peers in one process.

Defaults: beta = 0.99 from the official experiments. Those run with n = 26, f = 5 and n - f messages, outside what is
proved here or there; :meth:`MoNNA.guarantee` says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optim_robust.byzantine.mixing import NearestNeighbors
from optim_robust.byzantine.theory import contracts, nna_bound
from optim_robust.byzantine.vectors import AggregationError, TooFewMessagesError, check_faulty
from robust_core.checks import check_choice, check_count, check_number

__all__ = ["MoNNA", "MoNNAOptimizer", "Transport"]

Transport = Callable[[int, Tensor], Tensor]
"""(round, own (d,) vector) -> (r, d) vectors of the *other* peers that arrived in time."""


@dataclass(frozen=True)
class MoNNA:
    """A setting: how many peers, how many may be faulty, who waits for whom.

    Attributes:
        n: peers.
        f: of those, how many may be faulty.
        wait: ``"all"`` or ``"n-f"`` messages.
        beta: momentum.
    """

    n: int
    f: int
    wait: str = "all"
    beta: float = 0.99

    def __post_init__(self) -> None:
        check_count("n", self.n)
        check_choice("wait", self.wait, ("all", "n-f"))
        check_number("beta", self.beta, low=0.0, high=1.0, open_high=True)
        most = (self.n - 1) // (2 if self.wait == "all" else 3)
        check_faulty(self.n, self.f, most=most, rule=f"MoNNA that waits for {self.wait}")

    @property
    def keep(self) -> int:
        """Vectors in an average where nobody is silent."""
        return self.n - (1 if self.wait == "all" else 2) * self.f

    @property
    def mixing(self) -> NearestNeighbors:
        """The mixing rule."""
        return NearestNeighbors(self.f)

    @property
    def bound(self) -> float:
        """Proved bound on alpha + lambda."""
        return nna_bound(self.n, self.f, synchronous=self.wait == "all")

    @property
    def contracts(self) -> bool:
        """Whether honest peers are proved to come together whatever the faulty ones send."""
        return contracts(self.n, self.f, synchronous=self.wait == "all")

    def guarantee(self) -> str:
        """Return in one sentence what is proved."""
        setting = f"n={self.n}, f={self.f}, waiting for {self.wait}"
        if self.contracts:
            return f"{setting}: mixing shrinks disagreement to at most {self.bound:.3g} of it, whatever is sent"
        need = "n > 9 f" if self.wait == "all" else "(1 + sqrt 8)^2 f (n - f) < (n - 2 f)^2"
        return f"{setting}: no contraction is proved (bound {self.bound:.3g}, not below 1; {need} is needed)"


class MoNNAOptimizer(torch.optim.Optimizer):
    """One peer: ``step()`` takes the momentum step, exchanges half-step models and averages the nearest.

    With f = 0, beta = 0 and a transport that returns no rows, this is SGD.

    Args:
        params: parameters, of one dtype and device.
        lr: step size.
        transport: see :data:`Transport`.
        f: peers that may be faulty.
        n: peers in all, this one included; ``step`` refuses fewer than n - f messages. None asks for none.
        beta: momentum in [0, 1).

    Raises:
        ValueError: a number out of its range, or no parameters.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        transport: Transport,
        *,
        f: int = 0,
        n: int | None = None,
        beta: float = 0.99,
    ) -> None:
        check_number("lr", lr, low=0.0, open_low=True)
        check_number("beta", beta, low=0.0, high=1.0, open_high=True)
        check_count("f", f, low=0)
        if n is not None:
            check_faulty(check_count("n", n), f, rule="MoNNA")
        super().__init__(params, {"lr": lr, "beta": beta})
        self.transport, self.f, self.n, self.round = transport, f, n, 0

    def state_dict(self) -> dict[str, Any]:
        """Return momentum, groups and the round."""
        return {**super().state_dict(), "round": self.round}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a saved state."""
        state = dict(state_dict)
        self.round = int(state.pop("round"))
        super().load_state_dict(state)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Do a round; parameters without a gradient only mix.

        Raises:
            TooFewMessagesError: fewer than n - f vectors, this peer's included.
            AggregationError: what arrived has another length or dtype, or too much of it is NaN or infinite. The
                parameters are then as before the call, and so is the momentum.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moments, halves = [], []
        for group in self.param_groups:
            for parameter in group["params"]:
                old = self.state.get(parameter, {}).get("momentum")
                moment = torch.zeros_like(parameter) if old is None else old
                if parameter.grad is not None:
                    moment = group["beta"] * moment + (1 - group["beta"]) * parameter.grad
                moments.append((parameter, moment))
                halves.append((parameter - group["lr"] * moment).flatten())
        mixed = self._mix(torch.cat(halves))
        for (parameter, moment), piece in zip(moments, mixed.split([len(half) for half in halves]), strict=True):
            self.state[parameter]["momentum"] = moment
            parameter.copy_(piece.view_as(parameter))
        self.round += 1
        return loss

    def _mix(self, half: Tensor) -> Tensor:
        others = self.transport(self.round, half)
        if others.ndim != 2 or others.shape[1] != len(half) or others.dtype != half.dtype:
            raise AggregationError(
                f"the transport returned {tuple(others.shape)} {others.dtype}; (r, {len(half)}) {half.dtype} is needed"
            )
        received = 1 + len(others)
        if received <= 2 * self.f or (self.n is not None and received < self.n - self.f):
            least = 2 * self.f + 1 if self.n is None else max(self.n - self.f, 2 * self.f + 1)
            raise TooFewMessagesError(f"round {self.round}: {received} messages, own included; {least} are needed")
        pool = torch.cat([half[None], others])
        heard = torch.ones(1, received, dtype=torch.bool, device=half.device)
        return NearestNeighbors(self.f)(pool, torch.zeros(1, dtype=torch.int64, device=half.device), heard)[0]
