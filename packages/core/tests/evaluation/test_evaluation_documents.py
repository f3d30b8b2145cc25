"""Reports as documents: a round trip, what is refused, and that a failure leaves the files on the disk whole."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from robust_core.errors import UntrustedFileError
from robust_core.evaluation.documents import DocumentReport, save_document
from robust_core.evaluation.metrics.estimate import Estimate

FIGURES = {
    "clean/accuracy": Estimate(0.75, (0.5, 0.9), 12),
    "clean/loss": Estimate(math.nan, None, 0),
    "attack/accuracy": Estimate(0.25, (-math.inf, 0.4), 12),
}


@dataclass(frozen=True)
class Kept(DocumentReport):
    schemas = ("test.kept/1", "test.kept/2")
    npz: ClassVar = {"arrays": "per_sample.npz"}

    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    words: tuple[str, ...] = ()
    broken: bool = False

    def html(self):
        if self.broken:
            raise RuntimeError("no page")
        return f"<p>{len(self.document['figures'])}</p>"

    def _write_more(self, folder: Path) -> None:
        (folder / "words.txt").write_text("\n".join(self.words))

    @classmethod
    def _read_more(cls, folder: Path, document: dict[str, Any]) -> dict[str, Any]:
        return {"words": tuple((folder / "words.txt").read_text().split())}


def kept(value=0.75, **more):
    figures = {name: estimate.as_json() for name, estimate in FIGURES.items()}
    figures["clean/accuracy"]["value"] = value
    document = {"schema": "test.kept/2", "figures": figures, "flags": ["only twelve"]}
    return Kept(document, {"right": np.arange(3) > 1}, ("one", "two"), **more)


def test_a_report_survives_the_disk_with_all_that_belongs_to_it(tmp_path):
    report = kept()
    assert report.save(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    found = Kept.load(tmp_path / "a" / "b")
    assert (found.document, found.words, found.flags) == (report.document, report.words, ["only twelve"])
    assert found.arrays["right"].tolist() == [False, False, True]
    files = {path.name: path.read_bytes() for path in (tmp_path / "a" / "b").iterdir()}
    assert set(files) == {"result.json", "report.html", "per_sample.npz", "words.txt"}
    found.save(tmp_path / "c")
    assert {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()} == files


def test_figures_come_back_as_they_were_measured():
    report = kept()
    assert report["clean/accuracy"] == FIGURES["clean/accuracy"]
    assert report["attack/accuracy"] == FIGURES["attack/accuracy"]  # null is no bound, not a number
    undefined = report["clean/loss"]
    assert math.isnan(undefined.value)
    assert (undefined.interval, undefined.n) == (None, 0)
    assert list(report.figures) == list(FIGURES)


def test_a_misspelt_figure_is_told_what_is_near():
    with pytest.raises(KeyError, match=r"no figure 'clean/acuracy'; there are clean/accuracy, "):
        kept()["clean/acuracy"]
    with pytest.raises(KeyError, match="no figure 'zzz'; there are attack/accuracy, clean/accuracy, clean/loss"):
        kept()["zzz"]
    with pytest.raises(KeyError, match="there are none"):
        Kept({"figures": {}})["zzz"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"schema": "test.other/1"}, "no report of a schema among test.kept/1, test.kept/2"),
        ({"figures": [1]}, "'figures', by name"),
        ({"flags": "none"}, "list of 'flags'"),
        ({"figures": {"a": {"value": "1", "interval": None, "n": 1}}}, "figure 'a': value='1'"),
        ({"figures": {"a": {"value": 1.0, "interval": [1.0], "n": 1}}}, "figure 'a': interval="),
        ({"figures": {"a": {"value": 1.0, "interval": None}}}, "figure 'a': 'n'"),
        ({"figures": {"a": 1.0}}, "figure 'a'"),
    ],
)
def test_what_is_no_report_of_this_kind_is_refused(tmp_path, change, told):
    kept().save(tmp_path)
    path = tmp_path / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UntrustedFileError, match=told):
        Kept.load(tmp_path)


def test_lists_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        Kept.load(tmp_path)
    (tmp_path / "result.json").write_text("[]")
    with pytest.raises(UntrustedFileError, match="no report of a schema"):
        Kept.load(tmp_path)


@pytest.mark.parametrize(
    ("bad", "error"), [(kept(0.5, broken=True), RuntimeError), (kept(math.nan), ValueError)], ids=["page", "document"]
)
def test_what_cannot_be_written_whole_leaves_the_old_files(tmp_path, bad, error):
    kept().save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    bad.arrays["right"] = np.ones(5)
    with pytest.raises(error):
        bad.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with pytest.raises(error):
        bad.save(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_document_comes_last(tmp_path):
    def fail(folder):
        raise OSError(f"disk full at {folder}")

    with pytest.raises(OSError, match="disk full"):
        save_document(tmp_path, {}, "<p>", write_more=fail)
    assert not list(tmp_path.iterdir())
    save_document(tmp_path, {"a": "ü"}, "<p>", write_more=lambda folder: (folder / "x").write_text(""))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "result.json", "x"]
    assert (tmp_path / "result.json").read_text(encoding="utf-8") == '{\n  "a": "ü"\n}\n'
