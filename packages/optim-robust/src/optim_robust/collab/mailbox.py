"""Messages between processes: one vector a round from each peer, left in a ``TCPStore`` and checked when read.

Nothing blocks on a peer. One wait on a mute peer closes every pair of a gloo group; a store has no pairs, and a peer
that dies or keeps silent is only a key that never appears. A gloo group for each pair of peers survives the mute and
the dead (measured on torch 2.13: only their pairs end), but not a liar: one message longer than the buffer that waits
for it ends the *receiving* process, with an exception in gloo's own thread that nothing can catch. So there is no such
transport here.

What is trusted: the process that hosts the store, for being there and for handing keys out as they were set (under
``torchrun`` that is its agent, with :func:`~optim_robust.collab.processes.launch` the caller; neither is a peer). Keys
are not signed, so a peer that writes under another's name is outside the model, as is one that fills the host's memory.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Collection, Iterable
from datetime import timedelta
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed import Store

from optim_robust.byzantine.vectors import AggregationError
from robust_core.checks import check_count, check_number
from robust_core.errors import RobustError

__all__ = ["FINAL", "Mailbox", "MailboxError", "MessageError", "StoreMailbox", "decode", "encode"]

_MAGIC = b"orv1"
_HEAD = struct.Struct("<4sBIIQ")
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_LOOK = 1.0
FINAL = 2**32 - 1
"""The round under which a finished peer hands in its model."""


class MessageError(AggregationError):
    """A message is not the vector that it should be: its sender is faulty."""


class MailboxError(RobustError):
    """The store cannot be reached: its host is gone, or the network is."""


def encode(vector: Tensor, *, step: int, sender: int) -> bytes:
    """Return a (d,) vector as bytes, with a head of 21 bytes that says what follows.

    Raises:
        ValueError: not (d,), or of a dtype that is not sent.
    """
    if vector.ndim != 1 or vector.dtype not in _DTYPES:
        raise ValueError(f"vector is {vector.dtype} {tuple(vector.shape)}; (d,) of {', '.join(map(str, _DTYPES))}")
    head = _HEAD.pack(_MAGIC, _DTYPES.index(vector.dtype), step, sender, len(vector))
    return head + vector.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


def decode(message: bytes, *, step: int, sender: int, like: Tensor) -> Tensor:
    """Return the vector of a message, on the device of ``like``; its values may be anything.

    Args:
        message: what arrived.
        step: the round that is asked for.
        sender: under whose name it came.
        like: (d,) vector with the length and dtype that are right.

    Raises:
        MessageError: another length, dtype, round or sender, or no message at all.
    """
    if len(message) < _HEAD.size:
        raise MessageError(f"peer {sender} sent {len(message)} bytes, less than a head")
    magic, kind, its_step, its_sender, length = _HEAD.unpack_from(message)
    expected = (_MAGIC, _DTYPES.index(like.dtype), step, sender, len(like))
    if (magic, kind, its_step, its_sender, length) != expected:
        raise MessageError(
            f"peer {sender} sent {magic!r}, kind {kind}, round {its_step}, name {its_sender}, length {length}; "
            f"expected was {expected}"
        )
    if len(message) != _HEAD.size + len(like) * like.element_size():
        raise MessageError(f"peer {sender} sent {len(message) - _HEAD.size} bytes for {len(like)} numbers")
    body = torch.frombuffer(bytearray(message), dtype=torch.uint8, offset=_HEAD.size)
    return body.clone().view(like.dtype).to(like.device)  # a copy is aligned, a buffer behind 21 bytes is not


class Mailbox(Protocol):
    """A transport: what a peer needs of it."""

    rank: int
    n: int

    def post(self, step: int, vector: Tensor, recipient: int | None = None) -> None:
        """Leave (d,) ``vector`` for all, or for one recipient."""
        ...

    def latest(self, sender: int) -> int:
        """Return the last round in which ``sender`` posted, -1 if it never did."""
        ...

    def collect(
        self, step: int, like: Tensor, senders: Iterable[int], *, need: int, wait_for: Collection[int], seconds: float
    ) -> dict[int, Tensor | None]:
        """Return the vectors of those senders that have posted; None stands for a message that is malformed.

        Returns when ``need`` have arrived and everyone in ``wait_for`` has posted, or after ``seconds``. Who is waited
        for without being one of the ``senders`` is looked for, not read.
        """
        ...


class StoreMailbox:
    """A mailbox in a ``TCPStore`` (or any other ``torch.distributed.Store``).

    Args:
        store: the store; no process group is needed.
        rank: of this peer, 0 .. n - 1; others (a server, a watcher) may use numbers from n on.
        n: peers.
        prefix: name of the run, where several share a store.
        keep_rounds: a peer deletes what it posted so many rounds ago. Slower peers can be behind by that much.

    Raises:
        ValueError: numbers out of their range.
    """

    def __init__(self, store: Store, rank: int, n: int, *, prefix: str = "run", keep_rounds: int = 64) -> None:
        self.store, self.prefix = store, prefix
        self.rank, self.n = check_count("rank", rank, low=0), check_count("n", n)
        self.keep_rounds = check_count("keep_rounds", keep_rounds, low=2)
        self._posted: dict[int, list[str]] = {}

    def _key(self, step: int, sender: int, recipient: int | None = None) -> str:
        end = "" if recipient is None else f"/{recipient}"
        return f"{self.prefix}/{step}/{sender}{end}"

    def post(self, step: int, vector: Tensor, recipient: int | None = None) -> None:
        """Leave (d,) ``vector`` for all, or for one recipient."""
        self.post_bytes(step, encode(vector, step=step, sender=self.rank), recipient)

    def post_bytes(self, step: int, message: bytes, recipient: int | None = None) -> None:
        """Leave any bytes: what a liar may do."""
        keys = [self._key(step, self.rank)]
        if recipient is not None:
            keys.append(self._key(step, self.rank, recipient))
        try:
            self.store.set(keys[-1], message)  # pyright: ignore[reportArgumentType] - bytes are taken as they are
            if recipient is not None:
                self.store.set(keys[0], "")  # the others look for their own
            self.store.set(f"{self.prefix}/at/{self.rank}", str(step))
            self.store.add(f"{self.prefix}/{step}", 1)
            self._posted.setdefault(step, []).extend(keys)
            for old in [s for s in self._posted if s <= step - self.keep_rounds]:
                for gone in self._posted.pop(old):
                    self.store.delete_key(gone)
        except RuntimeError as error:
            raise MailboxError(f"peer {self.rank} cannot post in round {step}: {error}") from error

    def hand_in(self, vector: Tensor) -> None:
        """Leave the final (d,) vector under :data:`FINAL`; messages of the last rounds stay for slower peers."""
        try:
            message = encode(vector, step=FINAL, sender=self.rank)
            self.store.set(self._key(FINAL, self.rank), message)  # pyright: ignore[reportArgumentType]
        except RuntimeError as error:
            raise MailboxError(f"peer {self.rank} cannot hand in its model: {error}") from error

    def latest(self, sender: int) -> int:
        """Return the last round in which ``sender`` says it posted, -1 if it never did.

        Raises:
            MailboxError: the store cannot be reached.
        """
        key = f"{self.prefix}/at/{sender}"
        try:
            said = self.store.get(key) if self.store.check([key]) else b""
        except RuntimeError as error:
            raise MailboxError(f"peer {self.rank} cannot read {key}: {error}") from error
        return int(said) if said.isdigit() and len(said) < 12 else -1

    def collect(
        self, step: int, like: Tensor, senders: Iterable[int], *, need: int, wait_for: Collection[int], seconds: float
    ) -> dict[int, Tensor | None]:
        """Return what arrived; see :class:`Mailbox`.

        Raises:
            MailboxError: the store cannot be reached.
        """
        check_number("seconds", seconds, low=0)
        end, missing = time.monotonic() + seconds, set(senders) - {self.rank}
        unread = set(wait_for) - missing - {self.rank}
        found: dict[int, Tensor | None] = {self.rank: like}
        looked, hint, pause = time.monotonic(), -1, 0.001
        try:
            while True:
                # the count of posts tells cheaply when a look is worth its calls: 18 peers that look at 18 keys every
                # millisecond would starve the host. A liar can only raise it, and a look is due now and then anyway.
                posts, now = self.store.add(f"{self.prefix}/{step}", 0), time.monotonic()
                rest = now - looked
                if (posts >= need - 1 and (posts != hint or rest > 0.05)) or rest > _LOOK or now >= end:
                    looked, hint = now, posts
                    for sender, message in self._look(step, missing).items():
                        missing.discard(sender)
                        found[sender] = self._checked(message, step, sender, like)
                    unread = {sender for sender in unread if not self.store.check([self._key(step, sender)])}
                done = (len(found) >= need and not missing & set(wait_for)) or not missing
                if (done and not unread) or now >= end:
                    return found
                time.sleep(pause)
                pause = min(1.5 * pause, 0.02)
        except RuntimeError as error:
            raise MailboxError(f"peer {self.rank} cannot read round {step}: {error}") from error

    def _look(self, step: int, missing: Collection[int]) -> dict[int, bytes]:
        """Return the messages that are there, one call for all; an empty one says that each recipient has its own."""
        there = [sender for sender in sorted(missing) if self.store.check([self._key(step, sender)])]
        found = dict(zip(there, self._get([self._key(step, sender) for sender in there]), strict=True))
        for sender in [sender for sender, message in found.items() if message == b""]:
            key = self._key(step, sender, self.rank)
            found[sender] = self._get([key])[0] if self.store.check([key]) else None
        return {sender: message for sender, message in found.items() if message is not None}

    def _get(self, keys: list[str]) -> list[bytes | None]:
        """Read keys that were there a moment ago; None where the sender has deleted one since."""
        if not keys:
            return []
        before: timedelta = self.store.timeout  # pyright: ignore[reportAttributeAccessIssue] - a property of all stores
        self.store.set_timeout(timedelta(seconds=5))
        try:
            return list(self.store.multi_get(keys))
        except torch.distributed.DistStoreError:
            return [None] if len(keys) == 1 else [self._get([key])[0] for key in keys]
        finally:
            self.store.set_timeout(before)

    @staticmethod
    def _checked(message: bytes, step: int, sender: int, like: Tensor) -> Tensor | None:
        try:
            return decode(message, step=step, sender=sender, like=like)
        except MessageError:
            return None
