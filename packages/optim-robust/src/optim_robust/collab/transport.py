"""A mailbox as the transport of ``MoNNAOptimizer``: peers inside anybody's training loop, started by torchrun.

mailbox = join()
optimiser = MoNNAOptimizer(model.parameters(), 0.1, StoreTransport(mailbox, f=1), f=1, n=mailbox.n)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from optim_robust.collab.mailbox import Mailbox
from optim_robust.collab.team import Watch, hear
from robust_core.checks import check_choice, check_count, check_number

__all__ = ["StoreTransport"]


class StoreTransport:
    """Post the own vector, wait, and return those of the others.

    A malformed message is a row of NaN, which mixing takes for proof of a liar and counts off ``f``; so is silence,
    where all are waited for.

    Args:
        mailbox: of this peer.
        f: peers that may be faulty.
        wait: ``"all"`` or ``"n-f"``.
        deadline_s: longest wait in a round.
        start_s: the same in the first round.
        peers: those that are heard on a graph (:mod:`optim_robust.collab.graphs`), this one included; all when None.
            The optimiser's ``n`` is their number then.
    """

    def __init__(
        self, mailbox: Mailbox, *, f: int = 0, wait: str = "all", deadline_s: float = 10.0, start_s: float = 120.0,
        peers: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        self.mailbox, self.f = mailbox, check_count("f", f, low=0)
        self.wait = check_choice("wait", wait, ("all", "n-f"))
        self.deadline_s = check_number("deadline_s", deadline_s, low=0, open_low=True)
        self.start_s = check_number("start_s", start_s, low=0, open_low=True)
        self.watch, self.begun = Watch(), False
        self.peers = list(range(mailbox.n)) if peers is None else sorted(set(peers))
        if mailbox.rank not in self.peers or not set(self.peers) <= set(range(mailbox.n)):
            raise ValueError(f"peers={self.peers}: numbers 0 .. {mailbox.n - 1} with the own {mailbox.rank} are needed")

    def __call__(self, step: int, vector: Tensor) -> Tensor:
        """Return (r, d) rows of the others, those of proven liars being NaN; fewer rows where too few were heard."""
        seconds = self.deadline_s if self.begun else max(self.start_s, self.deadline_s)
        self.begun = True
        heard = hear(
            self.mailbox, vector, step=step, f=self.f, wait=self.wait, watch=self.watch, seconds=seconds,
            peers=self.peers,
        )  # fmt: skip
        proven = self.wait == "all" and len(heard) >= len(self.peers) - self.f
        senders = [s for s in self.peers if s != self.mailbox.rank and (proven or s in heard)]
        blank = torch.full_like(vector, torch.nan)
        rows = [heard.get(sender) for sender in senders]
        return (
            torch.stack([blank if row is None else row for row in rows]) if rows else vector.new_empty(0, len(vector))
        )
