"""Exported programs: faithful when plain, refused when anything in them could run code."""

import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from robust_core.errors import UntrustedFileError
from robust_core.io.exported import load_exported


@pytest.fixture(scope="module")
def network() -> nn.Module:
    layers = (nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 4))
    return nn.Sequential(*layers).eval()


@pytest.fixture(scope="module")
def exported(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "dynamic.pt2"
    shapes = ({0: torch.export.Dim("batch")},)
    torch.export.save(torch.export.export(network, (torch.rand(4, 1, 8, 8),), dynamic_shapes=shapes), path)
    return path


@pytest.mark.quick
def test_dynamic_batch_gives_the_same_logits_and_gradients(network: nn.Module, exported: Path) -> None:
    model = load_exported(exported)
    x = torch.rand(33, 1, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    torch.testing.assert_close(model(x), network(x))
    ours, theirs = (torch.autograd.grad(m(x)[:, 0].sum(), x)[0] for m in (model, network))
    torch.testing.assert_close(ours, theirs)


def test_fixed_batch_is_run_piece_by_piece(network: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "fixed.pt2"
    torch.export.save(torch.export.export(network, (torch.rand(4, 1, 8, 8),)), path)
    x = torch.rand(7, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(load_exported(path)(x), network(x))


def rewrite(source: Path, target: Path, change: Callable[[str, bytes], bytes | None]) -> Path:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for member in old.infolist():
            data = change(member.filename, old.read(member))
            if data is not None:
                new.writestr(member.filename, data)
    return target


SWAPS = {
    "a shell command as operator": (b"torch.ops.aten.relu.default", b"torch.os.system"),
    "a loader as operator": (b"torch.ops.aten.relu.default", b"torch.hub.load"),
    "a higher-order operator": (b"torch.ops.aten.relu.default", b"torch.ops.higher_order.cond"),
    "an unknown library's operator": (b"torch.ops.aten.relu.default", b"torch.ops.evil.relu.default"),
    "an extension operator": (b"torch.ops.aten.relu.default", b"#evil:relu"),
    "a builtin through the operator module": (b"torch.ops.aten.relu.default", b"_operator.__builtins__.exec"),
    "pickled weights": (b'"use_pickle": false', b'"use_pickle": true'),
    "code in a size": (b"Symbol('s", b"__import__('os').system('s"),
    "a foreign tree type": (b"builtins.tuple", b"collections.evil"),
}


@pytest.mark.parametrize("swap", SWAPS.values(), ids=SWAPS.keys())
def test_what_could_run_code_is_refused(exported: Path, tmp_path: Path, swap: tuple[bytes, bytes]) -> None:
    touched = []

    def change(name: str, data: bytes) -> bytes:
        changed = data.replace(*swap)
        if changed != data:
            touched.append(name)
        return changed

    evil = rewrite(exported, tmp_path / "evil.pt2", change)
    assert touched, "the mutation did not apply"
    with pytest.raises(UntrustedFileError):
        load_exported(evil)


def test_pickled_sample_inputs_are_refused(exported: Path, tmp_path: Path) -> None:
    gadget = b"cos\nsystem\n(S'touch pwned'\ntR."
    evil = rewrite(exported, tmp_path / "evil.pt2", lambda name, data: gadget if name.endswith("model.pt") else data)
    with pytest.raises(UntrustedFileError, match="sample inputs"):
        load_exported(evil)
    assert not (tmp_path / "pwned").exists()


def test_extra_members_and_damage_are_refused(exported: Path, tmp_path: Path) -> None:
    extra = rewrite(exported, tmp_path / "extra.pt2", lambda name, data: data)
    with zipfile.ZipFile(extra, "a") as archive:
        archive.writestr("m/data/aotinductor/model/wrapper.so", b"\x7fELF")
    with pytest.raises(UntrustedFileError, match="no part of a plain export"):
        load_exported(extra)
    cut = tmp_path / "cut.pt2"
    cut.write_bytes(exported.read_bytes()[:-100])
    with pytest.raises(UntrustedFileError):
        load_exported(cut)


def test_it_is_in_eval_mode_as_evaluations_ask(exported: Path) -> None:
    assert not any(module.training for module in load_exported(exported).modules())
