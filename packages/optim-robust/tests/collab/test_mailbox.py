"""Messages between processes: what is wrong is refused, and what is dead costs one deadline."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
from torch import Tensor
from torch.distributed import TCPStore

from optim_robust.byzantine import Aggregation, NearestNeighbors, TooFewMessagesError
from optim_robust.byzantine.coordinates import median
from optim_robust.collab.mailbox import MailboxError, MessageError, StoreMailbox, decode, encode
from optim_robust.collab.processes import join
from optim_robust.collab.team import Watch, mix_heard

LIKE = torch.arange(5.0)


@pytest.fixture
def mailbox() -> Callable[[int], StoreMailbox]:
    host = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=20), wait_for_workers=False)
    return lambda rank: StoreMailbox(host, rank, 4, keep_rounds=2)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_a_message_comes_back_bit_for_bit(dtype: torch.dtype) -> None:
    vector = torch.tensor([1.5, -0.0, torch.nan, torch.inf, 3e-5]).to(dtype)
    back = decode(encode(vector, step=7, sender=3), step=7, sender=3, like=vector)
    assert torch.equal(back.view(torch.uint8), vector.view(torch.uint8))


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\xff" * 64,
        encode(LIKE, step=1, sender=2)[:-1],
        encode(LIKE, step=1, sender=2) + b"x",
        encode(LIKE[:3], step=1, sender=2),
        encode(LIKE.double(), step=1, sender=2),
        encode(LIKE, step=2, sender=2),
        encode(LIKE, step=1, sender=3),
    ],
)
def test_what_is_no_such_vector_is_refused(message: bytes) -> None:
    with pytest.raises(MessageError, match="peer 2 sent"):
        decode(message, step=1, sender=2, like=LIKE)


def test_integers_and_matrices_are_not_sent() -> None:
    for bad in (torch.arange(3), torch.ones(2, 2)):
        with pytest.raises(ValueError, match="vector is"):
            encode(bad, step=0, sender=0)


def test_collecting_ends_when_those_waited_for_are_there(mailbox: Callable[[int], StoreMailbox]) -> None:
    first, second, third = mailbox(0), mailbox(1), mailbox(2)
    second.post(0, LIKE + 1)
    third.post_bytes(0, b"nonsense")
    started = time.monotonic()
    heard = first.collect(0, LIKE, [1, 2, 3], need=3, wait_for=[1, 2], seconds=20)
    assert time.monotonic() - started < 5
    assert heard[2] is None
    assert torch.equal(heard[1], LIKE + 1)  # pyright: ignore[reportArgumentType]
    assert set(first.collect(0, LIKE, [1, 2, 3], need=3, wait_for=[3], seconds=0.1)) == {0, 1, 2}
    assert (first.latest(1), first.latest(3)) == (0, -1)


def test_each_recipient_can_be_told_something_else(mailbox: Callable[[int], StoreMailbox]) -> None:
    mailbox(3).post(0, LIKE + 1, recipient=1)
    mailbox(3).post(0, LIKE + 2, recipient=2)
    heard = [mailbox(rank).collect(0, LIKE, [3], need=2, wait_for=[3], seconds=0.2).get(3) for rank in (0, 1, 2)]
    assert heard[0] is None
    assert torch.equal(heard[1] - LIKE, torch.ones(5))  # pyright: ignore[reportOptionalOperand]
    assert torch.equal(heard[2] - LIKE, torch.full((5,), 2.0))  # pyright: ignore[reportOptionalOperand]


def test_old_messages_are_deleted(mailbox: Callable[[int], StoreMailbox]) -> None:
    sender = mailbox(1)
    for step in range(4):
        sender.post(step, LIKE)
    assert [sender.store.check([f"run/{step}/1"]) for step in range(4)] == [False, False, True, True]


def test_handing_in_leaves_the_last_messages_to_slower_peers(mailbox: Callable[[int], StoreMailbox]) -> None:
    mailbox(1).post(9, LIKE)
    quick = mailbox(1)
    quick.post(10, LIKE)
    quick.hand_in(LIKE + 1)
    heard = mailbox(0).collect(10, LIKE, [1], need=2, wait_for=[1], seconds=5)
    assert torch.equal(heard[1], LIKE)  # pyright: ignore[reportArgumentType]


def test_a_store_that_is_gone_is_said_to_be() -> None:
    host = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=2), wait_for_workers=False)
    client = TCPStore("127.0.0.1", host.port, None, False, timedelta(seconds=2), wait_for_workers=False)
    lonely = StoreMailbox(client, 0, 2)
    del host
    with pytest.raises(MailboxError, match="peer 0 cannot"):
        lonely.collect(0, LIKE, [1], need=2, wait_for=[1], seconds=1)


def test_joining_needs_its_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="torchrun"):
        join()


# -- waiting -----------------------------------------------------------------------------------------------------


def test_the_dead_cost_one_deadline_and_the_slow_are_waited_for_again() -> None:
    watch, posted = Watch(), {1: 0, 2: 0}
    asked = watch.waited_for([1, 2], 0, posted.__getitem__)
    assert asked == {1, 2}
    watch.note(0, asked, [], posted.__getitem__)
    posted[2] = 1  # 2 is only behind
    waits = [watch.waited_for([1, 2], step, posted.__getitem__) for step in range(1, 6)]
    assert waits == [set(), {2}, {2}, {2}, {2}]
    watch.note(2, {2}, [2], posted.__getitem__)
    assert watch.waited_for([1, 2], 3, posted.__getitem__) == {2}


def test_who_is_silent_now_and_then_costs_ever_fewer_deadlines() -> None:
    watch, deadlines = Watch(), 0
    for step in range(400):
        awaited = watch.waited_for([1], step, lambda _, step=step: step)  # it always posts something, of another round
        absent = step % 2 == 0
        deadlines += absent and 1 in awaited
        watch.note(step, awaited, [] if absent else [1], lambda _, step=step: step)
    assert deadlines < 40


# -- mixing with what is missing -----------------------------------------------------------------------------------


def _heard(*values: float | None) -> dict[int, Tensor | None]:
    return {i: None if v is None else torch.tensor([v]) for i, v in enumerate(values)}


def test_silence_and_nonsense_count_off_f_where_all_are_waited_for() -> None:
    mixing = NearestNeighbors(2)
    everyone = _heard(0.0, 1.0, 2.0, 3.0, 100.0)
    assert mix_heard(everyone, 0, 5, mixing, f=2, wait="all", step=0).item() == 1.0  # keeps n - f = 3
    silent = {k: v for k, v in everyone.items() if k != 4}
    assert mix_heard(silent, 0, 5, mixing, f=2, wait="all", step=0).item() == 1.0  # still three of the four heard
    nonsense = {**silent, 4: None}
    assert mix_heard(nonsense, 0, 5, mixing, f=2, wait="all", step=0).item() == 1.0
    # with n - f messages the silent may be honest: r - f are kept
    assert mix_heard(silent, 0, 5, NearestNeighbors(1), f=1, wait="n-f", step=0).item() == 1.0
    with pytest.raises(TooFewMessagesError, match=r"round 9.*nothing of \[3, 4\]"):
        mix_heard(_heard(0.0, 1.0, 2.0), 0, 5, mixing, f=1, wait="all", step=9)


def test_rules_without_a_pivot_mix_too() -> None:
    heard = {0: torch.tensor([1.0]), 1: torch.tensor([5.0]), 2: torch.tensor([torch.nan])}
    assert mix_heard(heard, 0, 3, Aggregation(lambda x, f: median(x), 1), f=1, wait="all", step=0).item() == 3.0
