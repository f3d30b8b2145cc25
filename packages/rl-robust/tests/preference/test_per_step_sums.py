"""The transformer's world of the claim on per-step negatives: sums, habits, rows that keep their own streams."""

import pytest
import torch

from rl_robust.claims import _per_step_sums as world


def test_traces_hold_running_sums_but_for_a_copied_digit() -> None:
    digits = world._digits(500, 3)
    sums, traces = world._sums(digits), world._traces(digits, 4)
    assert torch.equal(sums[:, -1], digits.sum(1) % world.BASE)
    assert torch.equal(traces[:, -1], sums[:, -1])
    wrong = traces != sums
    assert int(wrong.sum(1).max()) == 1
    assert torch.equal(traces[wrong], digits[:, 1:][wrong])
    assert 0.15 < float(wrong.any(1).double().mean()) < world.HABIT  # a copy may be the sum by chance


def test_each_row_is_drawn_from_its_own_seed() -> None:
    model = world._Writer(0)
    prefixes = [tuple((row + model.zero).tolist()) for row in world._digits(4, 1)]
    prefixes[1] = (*prefixes[1], model.zero)
    together = model.sampler(prefixes, 3, seeds=[5, 6, 7, 8])
    assert [len(rows[0]) for rows in together] == [4, 3, 4, 4]
    assert together[2] == model.sampler(prefixes[2:3], 3, seeds=[7])[0]
    assert all(token >= model.zero for rows in together for row in rows for token in row)


def test_all_four_models_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("TRAINED", 20), ("TESTED", 20), ("STEPS", 1), ("TAUGHT", 4), ("ROLLOUTS", 5)):
        monkeypatch.setattr(world, name, value)
    found = world.transformer(1)
    assert set(found) == {"supervised", "rft", "first_pit", "standard"}
    assert all(0 <= value <= 1 for pair in found.values() for value in pair)
