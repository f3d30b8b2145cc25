"""The claim's shape, and two steps of its full setting on data of the true shape."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from optim_robust.byzantine import NearestNeighbors
from optim_robust.claims import monna as claim


def test_statements_are_fixed_beforehand() -> None:
    figures = [
        name
        for statement in claim.STATEMENTS
        for name in ((statement.figure,) if isinstance(statement.figure, str) else statement.figure)
    ]
    assert len(set(figures)) == len(figures) == 13
    assert sorted({statement.margin for statement in claim.STATEMENTS}) == [-5, -3, -1, -0.25, 0, 3, 20, 30]


def test_the_full_setting_takes_two_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    arrays = {}
    for part, n in (("train", 260), ("test", 10)):
        arrays[f"x_{part}"] = generator.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        arrays[f"y_{part}"] = np.arange(n) % 10
    np.savez(tmp_path / "mnist.npz", **arrays)  # pyright: ignore[reportArgumentType]
    monkeypatch.setenv("ROBUST_DATA", str(tmp_path))
    here = claim.setting(0, "full")
    assert here.steps == 600
    run = claim._train(here, NearestNeighbors(5), claim.ATTACKS["sign flip"](), steps=2, batch=1)
    assert run.peers.theta.shape == (21, 431_080)
    assert 0 <= run.accuracy[-1][1] <= 1
