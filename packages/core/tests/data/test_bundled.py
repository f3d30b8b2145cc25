"""Bundled data: published splits, ranges, hashes."""

import hashlib

import numpy as np
import pytest
import torch

from robust_core.data import load
from robust_core.data.bundled import BUNDLED, TEST_INDEX_SHA256


@pytest.mark.quick
@pytest.mark.parametrize("name", BUNDLED)
def test_splits_are_disjoint_complete_and_published(name: str) -> None:
    train, test, whole = load(name, "train"), load(name, "test"), load(name, "all")
    both = torch.cat([train.index, test.index])
    assert both.unique().numel() == both.numel() == len(whole)
    assert hashlib.sha256(test.index.numpy().astype("<i8").tobytes()).hexdigest() == TEST_INDEX_SHA256[name]
    assert torch.equal(whole.x[test.index], test.x)
    assert torch.equal(whole.y[test.index], test.y)
    assert 0.15 < len(test) / len(whole) < 0.25
    assert set(test.y.tolist()) == set(range(whole.n_classes)) == set(train.y.tolist())


@pytest.mark.quick
def test_digits_are_images_in_the_unit_interval() -> None:
    digits = load("digits", "all")
    assert digits.x.shape == (1797, 1, 8, 8)
    assert digits.x.dtype == torch.float32
    assert float(digits.x.min()) == 0.0
    assert float(digits.x.max()) == 1.0
    assert np.bincount(digits.y).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert len({load("digits", s).sha256 for s in ("train", "test", "all")}) == 3


@pytest.mark.parametrize("name", ["breast_cancer", "wine"])
def test_tables_are_scaled_by_the_training_rows(name: str) -> None:
    train, test = load(name, "train"), load(name, "test")
    assert torch.equal(train.x.amin(0), torch.zeros(train.x.shape[1]))
    assert torch.equal(train.x.amax(0), torch.ones(train.x.shape[1]))
    assert float(test.x.min()) >= 0
    assert float(test.x.max()) <= 1
