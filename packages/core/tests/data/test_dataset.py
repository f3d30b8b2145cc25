"""Data sets: identity of samples, batches, adapters."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Subset, TensorDataset

from robust_core.data import Dataset, as_dataset, load
from robust_core.errors import RobustError


def _small(n: int = 12) -> Dataset:
    x = torch.arange(n * 4, dtype=torch.float32).reshape(n, 1, 2, 2) / (4 * n)
    return Dataset(x, torch.arange(n) % 3, fields={"is_clean": torch.arange(n) % 2 == 0})


class _Pairs:
    """A torchvision-like data set of (PIL image, label)."""

    classes = ("cat", "dog")
    targets = (0, 1, 1, 0, 1, 0)

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return Image.fromarray(np.full((4, 4, 3), 40 * i, np.uint8)), self.targets[i]


class _Columns:
    """A Hugging Face-like data set: mappings by position, columns by name."""

    column_names = ("img", "fine_label")

    def __len__(self) -> int:
        return 5

    def __getitem__(self, key: int | str) -> object:
        if key == "fine_label":
            return [4, 3, 2, 1, 0]
        if isinstance(key, str):
            raise KeyError(key)
        return {"img": np.full((1, 3, 3), 0.1 * key, np.float32), "fine_label": 4 - key}


@pytest.mark.quick
def test_index_survives_subset_of_subset_shuffling_and_replacement() -> None:
    data = _small()
    inner = data.subset([9, 7, 5, 3, 1]).subset(np.array([4, 0, 0]))
    assert inner.index.tolist() == [1, 9, 9]
    assert torch.equal(inner.x, data.x[[1, 9, 9]])
    assert inner.fields["is_clean"].tolist() == [False, False, False]
    for batch in data.batches(5, shuffle=True, generator=3):
        assert torch.equal(batch["x"], data.x[batch["index"]])
        assert torch.equal(batch["y"], data.y[batch["index"]])


@pytest.mark.parametrize("workers", [0, 2])
def test_dataloader_with_workers_carries_the_index(workers: int) -> None:
    data = Subset(_small(), [8, 2, 4, 6])  # type: ignore[arg-type]
    batches = list(DataLoader(data, batch_size=3, num_workers=workers))  # type: ignore[arg-type]
    assert torch.cat([b["index"] for b in batches]).tolist() == [8, 2, 4, 6]
    assert torch.cat([b["is_clean"] for b in batches]).all()


def test_order_is_a_function_of_seed_and_epoch() -> None:
    data = _small()

    def order(**kw: int) -> list[int]:
        return torch.cat([b["index"] for b in data.batches(4, shuffle=True, **kw)]).tolist()

    assert order(generator=1) == order(generator=1) != order(generator=1, epoch=1)
    assert sorted(order(generator=1, epoch=1)) == list(range(12))
    assert [len(b["y"]) for b in data.batches(5, drop_last=True)] == [5, 5]


@pytest.mark.quick
def test_hash_sees_inputs_labels_and_positions() -> None:
    data = _small()
    hashes = {
        data.sha256,
        data.replace(y=data.y.flip(0)).sha256,
        data.replace(x=data.x.flip(0)).sha256,
        data.subset(range(11)).sha256,
        data.subset([*range(10), 11, 10]).sha256,
    }
    assert len(hashes) == 5
    assert data.subset(range(12)).sha256 == data.sha256 == _small().sha256


def test_pairs_of_pil_images_in_nested_subsets_keep_original_positions() -> None:
    data = as_dataset(Subset(Subset(_Pairs(), [5, 3, 1, 0]), [2, 0]), name="mine")  # type: ignore[arg-type]
    assert data.index.tolist() == [1, 5]
    assert data.y.tolist() == [1, 0]
    assert data.classes == ("cat", "dog")
    assert data.x.shape == (2, 3, 4, 4)
    assert data.x[0, 0, 0, 0] == pytest.approx(40 / 255)
    assert torch.equal(data.subset([1]).x, data.x[1:])
    assert data.replace(y=torch.tensor([0, 0])).batch([1])["index"].tolist() == [5]
    assert len(data.sha256) == 64


@pytest.mark.quick
def test_columns_tensors_and_arrays() -> None:
    named = as_dataset(_Columns())
    assert named.y.tolist() == [4, 3, 2, 1, 0]
    assert torch.allclose(named.x[2], torch.full((1, 3, 3), 0.2))
    x, y = torch.rand(6, 1, 4, 4), torch.arange(6)
    for pair in ((x, y), TensorDataset(x, y), (x.double().numpy(), y.numpy().astype(np.uint8))):
        data = as_dataset(pair)
        assert torch.equal(data.x, x)
        assert data.y.tolist() == y.tolist()
    assert as_dataset((np.full((2, 3, 4, 4), 255, np.uint8), np.array([0, 1]))).x.max() == 1
    assert as_dataset(data) is data


@pytest.mark.quick
def test_bad_data_are_named() -> None:
    x, y = torch.rand(4, 1, 2, 2), torch.arange(4)
    with pytest.raises(ValueError, match="outside the domain"):
        as_dataset((x * 3, y))
    with pytest.raises(ValueError, match="NaN"):
        as_dataset((x.masked_fill(x > 0, float("nan")), y))
    with pytest.raises(ValueError, match=r"\(4,\)"):
        as_dataset((x, y[:3]))
    with pytest.raises(TypeError, match="int64"):
        as_dataset(((x * 255).long(), y))
    with pytest.raises(ValueError, match=r"labels 0 .. 3"):
        as_dataset((x, y), classes=["a", "b"])
    with pytest.raises(ValueError, match="'img'"):
        as_dataset(_Columns(), x="pixels")
    with pytest.raises(TypeError, match="map-style"):
        as_dataset(iter([(x[0], 1)]))
    with pytest.raises(ValueError, match="12 samples"):
        _small().subset([12])
    with pytest.raises(IndexError):
        _small()[12]


def test_a_large_lazy_data_set_streams_but_is_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    data = as_dataset(_Pairs())
    monkeypatch.setattr("robust_core.data.dataset.IN_MEMORY_LIMIT", 100)
    with pytest.raises(RobustError, match="batches"):
        _ = data.x
    assert sum(len(b["x"]) for b in data.batches(4)) == 6


def test_digits_have_index_in_the_whole_set() -> None:
    test = load("digits", "test")
    assert test[0]["index"].item() == test.index[0].item() > 0
