"""Loaders: search order, byte-exact fixtures, hostile files, no network."""

import gzip
import hashlib
import io
import socket
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from robust_core.data import available, load, standard
from robust_core.data.files import read_idx, read_npz
from robust_core.errors import DataMissingError, UntrustedFileError


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a loader touched the network")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.delenv("ROBUST_DATA", raising=False)


def _idx(array: np.ndarray) -> bytes:
    return struct.pack(f">I{array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.tobytes()


def _fashion(folder: Path, monkeypatch: pytest.MonkeyPatch, *, packed: bool = True) -> np.ndarray:
    folder.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (10, 28, 28), dtype=np.uint8)
    for part, rows in (("train", slice(0, 6)), ("t10k", slice(6, 10))):
        for kind, array in (("images-idx3", images[rows]), ("labels-idx1", np.arange(10, dtype=np.uint8)[rows])):
            data = gzip.compress(_idx(array), mtime=0) if packed else _idx(array)
            name = f"{part}-{kind}-ubyte{'.gz' if packed else ''}"
            (folder / name).write_bytes(data)
            monkeypatch.setitem(standard.FASHION_SHA256, name, hashlib.sha256(data).hexdigest())
    return images


@pytest.mark.quick
@pytest.mark.parametrize("packed", [True, False])
def test_fashion_mnist_from_idx_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool) -> None:
    images = _fashion(tmp_path / "FashionMNIST" / "raw", monkeypatch, packed=packed)
    data = load("fashion_mnist", "all", tmp_path)
    assert torch.equal(data.x[:, 0], torch.from_numpy(images).float() / 255)
    assert data.y.tolist() == list(range(10))
    assert load("fashion_mnist", "test", tmp_path).y.tolist() == [6, 7, 8, 9]
    assert load("fashion_mnist", "train", tmp_path).classes[9] == "Ankle-boot"


def test_environment_variable_is_searched_and_root_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fashion(tmp_path / "a" / "fashion-mnist", monkeypatch)
    monkeypatch.setenv("ROBUST_DATA", str(tmp_path / "a"))
    assert len(load("fashion_mnist")) == 6
    assert available()["fashion_mnist"].path.startswith(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataMissingError, match="apt-get install dataset-fashion-mnist"):
        load("fashion_mnist", root=tmp_path / "empty")
    with pytest.raises(DataMissingError, match="no folder"):
        load("fashion_mnist", root=tmp_path / "absent")


def test_a_file_that_is_not_the_published_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fashion(tmp_path / "f", monkeypatch)
    path = tmp_path / "f" / "train-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(_idx(np.zeros(6, np.uint8))))
    with pytest.raises(UntrustedFileError, match="SHA-256"):
        load("fashion_mnist", "train", tmp_path / "f")


@pytest.mark.quick
def test_idx_headers_must_tell_the_truth(tmp_path: Path) -> None:
    path = tmp_path / "x"
    for data in (
        b"",
        b"\0\0\x08",
        struct.pack(">IIII", 0x0803, 1 << 31, 1 << 31, 28),
        _idx(np.zeros((2, 2, 2), np.uint8))[:-1],
        _idx(np.zeros(3, np.uint8)),
    ):
        path.write_bytes(data)
        with pytest.raises(UntrustedFileError):
            read_idx(path, 3)
    packed = tmp_path / "x.gz"
    packed.write_bytes(gzip.compress(_idx(np.zeros((2, 2, 2), np.uint8)))[:-9])
    with pytest.raises(UntrustedFileError, match="gzip"):
        read_idx(packed, 3)


@pytest.mark.quick
def test_cifar_binary_rows(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    rows = rng.integers(0, 256, (12, 3073), dtype=np.uint8)
    rows[:, 0] = np.arange(12) % 10
    for i in range(5):
        rows[2 * i : 2 * i + 2].tofile(folder / f"data_batch_{i + 1}.bin")
    rows[10:].tofile(folder / "test_batch.bin")
    data = load("cifar10", "all", tmp_path)
    assert data.y.tolist() == (np.arange(12) % 10).tolist()
    assert data.x[7, 2, 31, 30] == torch.tensor(int(rows[7, 1 + 2 * 1024 + 31 * 32 + 30])).float() / 255
    assert data.classes[3] == "cat"
    assert len(load("cifar10", "test", tmp_path)) == 2
    (folder / "test_batch.bin").write_bytes(b"\0" * 3000)
    with pytest.raises(UntrustedFileError, match="3073"):
        load("cifar10", "test", tmp_path)
    rows[:, 0] = 77
    rows.tofile(folder / "test_batch.bin")
    with pytest.raises(UntrustedFileError, match="label 77"):
        load("cifar10", "test", tmp_path)


def test_cifar100_has_coarse_labels(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-100-binary"
    folder.mkdir()
    rows = np.zeros((4, 3074), np.uint8)
    rows[:, 0], rows[:, 1] = [1, 2, 3, 4], [99, 0, 50, 7]
    rows.tofile(folder / "train.bin")
    rows[:1].tofile(folder / "test.bin")
    (folder / "fine_label_names.txt").write_text("\n".join(f"name{i}" for i in range(100)))
    data = load("cifar100", root=tmp_path)
    assert data.y.tolist() == [99, 0, 50, 7]
    assert data.batch([0, 1])["y_coarse"].tolist() == [1, 2]
    assert data.classes[99] == "name99"


def test_pickled_cifar_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(DataMissingError, match=r"run code.*cifar-10-binary\.tar\.gz.*as_dataset"):
        load("cifar10", root=tmp_path)


def test_mnist5k_of_the_package() -> None:
    train, test = load("mnist5k", "train"), load("mnist5k", "test")
    assert len(train) + len(test) == 5000
    assert torch.cat([train.index, test.index]).unique().numel() == 5000
    assert train.x.shape[1:] == (1, 28, 28)
    assert torch.bincount(torch.cat([train.y, test.y])).tolist() == [500] * 10


@pytest.mark.quick
def test_npz_layouts(tmp_path: Path) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (5, 9, 9), dtype=np.uint8)
    np.savez_compressed(tmp_path / "a.npz", x=grey, y=np.arange(5)[:, None])
    data = load(tmp_path / "a.npz")
    assert torch.equal(data.x[:, 0], torch.from_numpy(grey).float() / 255)
    colour = np.random.default_rng(0).random((4, 9, 8, 3))
    np.savez(tmp_path / "b.npz", x_train=colour, y_train=np.arange(4), x_test=colour[:1], y_test=np.array([2]))
    assert load("b.npz", "train", tmp_path).x.shape == (4, 3, 9, 8)
    assert load("b.npz", "all", tmp_path).y.tolist() == [0, 1, 2, 3, 2]
    np.savez(tmp_path / "c.npz", x=np.asfortranarray(colour[..., 0]), y=np.arange(4, dtype=">i4"))
    assert torch.allclose(load(tmp_path / "c.npz").x[:, 0].double(), torch.from_numpy(colour[..., 0]))
    with pytest.raises(ValueError, match="without splits"):
        load(tmp_path / "a.npz", "test")


@pytest.mark.quick
def test_hostile_npz_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.npz"
    np.savez(path, x=np.array([{"a": 1}, None], dtype=object), y=np.arange(2))
    with pytest.raises(UntrustedFileError, match=r"Python objects.*np\.savez"):
        load(path)
    np.savez(path, x=np.zeros((3, 4), np.float32), y=np.arange(3))
    whole = path.read_bytes()
    for cut in (len(whole) - 30, len(whole) // 2, 10, 0):
        path.write_bytes(whole[:cut])
        with pytest.raises(UntrustedFileError):
            load(path)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40,)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", header.getvalue() + b"\0" * 64)
        archive.writestr("y.npy", whole[-10:])
    with pytest.raises(UntrustedFileError):
        load(path)


def test_zip_bombs_are_refused_before_they_are_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "bomb.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", b"\0" * (65 << 20))
    with pytest.raises(UntrustedFileError, match="unpacks to"):
        load(path)
    with pytest.raises(UntrustedFileError, match="unpacks to"):
        read_npz(path, limit=1 << 20)


def test_every_flipped_byte_gives_data_or_a_named_error(tmp_path: Path) -> None:
    path = tmp_path / "f.npz"
    np.savez(path, x=np.zeros((3, 4), np.float32), y=np.arange(3))
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for position in rng.integers(0, len(whole), 300):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(bytes(damaged))
        try:
            load(path)
        except (UntrustedFileError, ValueError, TypeError):
            continue


def test_values_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "v.npz"
    for x, y, match in (
        (np.full((2, 3), 7.0), np.arange(2), "domain"),
        (np.full((2, 3), np.nan), np.arange(2), "NaN"),
        (np.zeros((2, 3)), np.array([0.5, 1]), "integer"),
        (np.zeros((2, 3)), np.arange(3), "equal lengths"),
        (np.zeros((2, 3)), np.array([-1, 0]), "labels -1"),
        (np.zeros((2, 3), np.int32), np.arange(2), "uint8"),
    ):
        np.savez(path, x=x, y=y)
        with pytest.raises((ValueError, TypeError), match=match):
            load(path)
    np.savez(path, a=np.zeros(3))
    with pytest.raises(ValueError, match="x and y"):
        load(path)


@pytest.mark.quick
def test_image_folders(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for c, shape in (("ant", (20, 30, 3)), ("bee", (40, 16, 3))):
            folder = tmp_path / split / c
            folder.mkdir(parents=True)
            for i in range(2):
                Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"{i}.png")
    data = load(tmp_path, "test", size=8)
    assert data.x.shape == (4, 3, 8, 8)
    assert data.y.tolist() == [0, 0, 1, 1]
    assert data.classes == ("ant", "bee")
    assert "crop 8" in data.preprocessing
    assert len(load(tmp_path, "all", size=8)) == 8
    assert load(tmp_path, size=8, mode="L").x.shape[1] == 1
    with pytest.raises(ValueError, match="size="):
        _ = load(tmp_path).x
    before = data.sha256
    (tmp_path / "val" / "ant" / "0.png").write_bytes(b"no image")
    assert load(tmp_path, "test", size=8).sha256 != before
    with pytest.raises(UntrustedFileError, match=r"0\.png"):
        load(tmp_path, "test", size=8).batch([0])
    (tmp_path / "val" / "cow").mkdir()
    with pytest.raises(ValueError, match="'cow'"):
        load(tmp_path, "test", size=8)


def test_images_of_the_right_size_are_not_resized_again(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "c" / "0.png")
    expected = torch.from_numpy(image.transpose(2, 0, 1).copy()).float() / 255
    assert torch.equal(load(tmp_path, size=8).x[0], expected)
    assert torch.equal(load(tmp_path).x[0], expected)


@pytest.mark.quick
def test_unknown_names_list_what_is_known(tmp_path: Path) -> None:
    with pytest.raises(DataMissingError, match="digits, breast_cancer"):
        load("imagenet")
    with pytest.raises(DataMissingError, match="no class folders"):
        load(tmp_path)
    with pytest.raises(ValueError, match="'train', 'test', 'all'"):
        load("digits", "val")
    assert available()["digits"].found
