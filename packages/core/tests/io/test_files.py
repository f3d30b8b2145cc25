"""Atomic writes and reads that believe nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from robust_core import io
from robust_core.errors import UntrustedFileError


@pytest.mark.quick
def test_written_text_bytes_and_json_come_back(tmp_path: Path) -> None:
    io.write_atomic(tmp_path / "a", "höhe")
    io.write_atomic(tmp_path / "b", b"\x00\xff")
    io.write_json(tmp_path / "c.json", {"z": [1, 2.5, None], "a": "ü"})
    assert (tmp_path / "a").read_text(encoding="utf-8") == "höhe"
    assert (tmp_path / "b").read_bytes() == b"\x00\xff"
    assert io.read_json(tmp_path / "c.json") == {"z": [1, 2.5, None], "a": "ü"}
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "c.json"]


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    target = tmp_path / "a"
    io.write_atomic(target, "old")
    with pytest.raises(FileNotFoundError), io.replacing(target) as temporary:
        (temporary.parent / "missing" / temporary.name).write_text("half")
    with pytest.raises(ValueError, match="Out of range"):
        io.write_json(target, float("nan"))
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_the_mode_of_the_target_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "a"
    io.write_atomic(target, "old")
    target.chmod(0o640)
    io.write_atomic(target, "new")
    assert target.stat().st_mode & 0o777 == 0o640


def test_sweep_removes_the_litter_of_dead_processes_only(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    dead = int(done.stdout)
    (tmp_path / f".a.part-{dead}-00ff").write_text("x")
    (tmp_path / f".d.part-{dead}-00ff").mkdir()
    (tmp_path / f".d.part-{dead}-00ff" / "inner").write_text("x")
    (tmp_path / f".b.part-{os.getppid()}-00ff").write_text("x")
    (tmp_path / ".hidden").write_text("x")
    with io.replacing(tmp_path / "c") as mine:
        mine.write_text("x")
        removed = {path.name for path in io.sweep(tmp_path)}
    assert removed == {f".a.part-{dead}-00ff", f".d.part-{dead}-00ff"}
    assert sorted(os.listdir(tmp_path)) == [f".b.part-{os.getppid()}-00ff", ".hidden", "c"]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b'{"a": NaN}', b'{"a": Infinity}', b'{"a": 1, "a": 2}', b"\xff\xfe", b"[" * 100_000, b"{} {}"],
)
def test_json_that_is_not_strict_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UntrustedFileError, match=r"a\.json"):
        io.read_json(tmp_path / "a.json")


@pytest.mark.parametrize(
    "name", ["../a", "/etc/passwd", "..", ".", "", "a/b", "a\\b", "C:a", "a\0b", 3, None, "x" * 300]
)
def test_names_that_lead_outside_are_refused(tmp_path: Path, name: object) -> None:
    with pytest.raises(UntrustedFileError, match="not one inside"):
        io.inside(tmp_path, name)


def test_links_pipes_folders_and_long_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("secret")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UntrustedFileError, match="not one inside"):
        io.inside(tmp_path, "link")
    for name in ("pipe", "."):
        with pytest.raises((UntrustedFileError, IsADirectoryError)):
            io.read_bytes(tmp_path / name, max_bytes=10)
    with pytest.raises(UntrustedFileError, match="more than the 3"):
        io.read_bytes(tmp_path / "real", max_bytes=3)
    assert io.inside(tmp_path, "real") == tmp_path / "real"


@pytest.mark.quick
def test_importing_io_does_not_import_torch() -> None:
    code = "import robust_core.io, sys; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
