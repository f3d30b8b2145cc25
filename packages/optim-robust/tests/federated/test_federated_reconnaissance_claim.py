"""The claim's shape, its negative control on three lines, and two steps of its full scale on images of that size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from optim_robust.claims import federated_reconnaissance as claim
from optim_robust.federated.reconnaissance import EpisodeSampler, PrototypeClassifier, PrototypeState, Prototypical
from robust_core.training import fit


def _one(mean: float, count: int) -> PrototypeState:
    return PrototypeState(torch.tensor([0]), torch.tensor([[mean]]).double(), torch.tensor([count]))


def test_the_published_merge_counts_old_examples_twice() -> None:
    server, added = _one(0.0, 3), _one(4.0, 1)
    # the client's total is 1.0 of four examples; it enters with weight 1/4 beside the old 0.0: 0.25, not 1.0
    assert claim.published_merge(server, added, server).mean.item() == 0.25


def test_statements_are_fixed_beforehand() -> None:
    figures = [statement.figure for statement in claim.STATEMENTS]
    assert len(set(figures)) == len(figures) == 8
    assert {statement.margin for statement in claim.STATEMENTS} == {30.0, -8.0, -5.0, 0.0, -3.0}


def test_two_steps_at_full_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (4, 84, 84, 3), dtype=np.uint8)
    for label in range(100):
        folder = tmp_path / "mini_imagenet" / f"n{label:03d}"
        folder.mkdir(parents=True)
        for number, image in enumerate(noise):
            Image.fromarray(image ^ label).save(folder / f"{number}.png", compress_level=0)
    monkeypatch.setenv("ROBUST_DATA", str(tmp_path))
    monkeypatch.setattr(claim, "TRAIN_PER_CLASS", 3)
    setting = claim._setting(0, "full")
    assert setting.train[0].shape == (300, 3, 84, 84)
    assert (len(setting.base), len(setting.field), len(setting.test[1])) == (50, 50, 100)
    x, y = (part[:30] for part in setting.at_base)
    sampler = EpisodeSampler(y, 5, 2, queries=1)
    assert fit(setting.encoder, (x, y), Prototypical(2), epochs=1, order=sampler, batch_size=sampler.size).step == 2
    server = PrototypeClassifier(setting.encoder)
    server.learn(x, y)
    assert server.mean.shape == (10, 1600)
