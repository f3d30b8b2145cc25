import io
import json
import pickle
import re
import shutil
import zipfile
from html.parser import HTMLParser

import numpy as np
import pytest

from robust_core.attacks import PGD
from robust_core.certificates import Smoothing
from robust_core.data import Dataset
from robust_core.errors import UntrustedFileError
from robust_core.evaluation import (
    Adversarial,
    Calibration,
    Certified,
    Clean,
    Corruptions,
    IncomparableError,
    OpenSet,
    Report,
    SecurityCurve,
    Shift,
    TranslationConsistency,
    evaluate,
    layout,
)
from robust_core.evaluation.arrays import load_arrays, save_arrays
from robust_core.evaluation.metrics import fit_baseline
from robust_core.evaluation.parts.certified import round_radii
from robust_core.evaluation.schema import check_document
from robust_core.evaluation.sections.base import Passage, Section
from robust_core.testing.tiny import digits, digits_cnn
from robust_core.threats import Linf

THREAT = Linf(0.1)


@pytest.fixture(scope="module")
def report():
    x, y = digits()
    data = Dataset(x[:48], y[:48], name="digits <script>alert(1)</script>", classes=[f"class {i}" for i in range(10)])
    attack, model = PGD(THREAT, n_iter=5), digits_cnn()
    baseline = fit_baseline([0.9, 0.92, 0.94, 0.96, 0.98], [0.7, 0.75, 0.78, 0.83, 0.88])
    parts = [
        Clean(),
        Calibration(held_out=(x[48:96], y[48:96])),
        Adversarial(THREAT, attack=attack, sanity=0),
        SecurityCurve(THREAT, attack=attack, subset=24),
        Corruptions(subset=16, severities=(5,), names=("fog", "contrast")),
        Shift(data.replace(x=data.x * 0.5), "dim", baseline=baseline),
        OpenSet((x[:8].flip(2), y[:8]), "flipped"),
        TranslationConsistency(1, subset=8),
        Certified(Smoothing(model, 0.25, n_samples=200), subset=8),
    ]
    return evaluate(model, data, parts, name='a "model" & more', command="robust evaluate | tee log")


@pytest.fixture(scope="module")
def saved(report, tmp_path_factory):
    return report.save(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def text(saved):
    return (saved / "report.html").read_text(encoding="utf-8")


class Page(HTMLParser):
    VOID = ("meta", "img", "path", "use", "br", "link", "hr", "input")

    def __init__(self, text):
        super().__init__()
        self.stack, self.ids, self.tags, self.attributes = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for key, value in attrs if key == "id"]
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for key, value in attrs if key == "id"]

    def handle_endtag(self, tag):
        assert tag in self.VOID or self.stack.pop() == tag


# -- files ---------------------------------------------------------------------------------------------------------


def test_a_report_survives_the_disk(report, saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    back = Report.load(tmp_path)
    assert back.document == report.document
    assert back.per_sample.keys() == report.per_sample.keys()
    assert all(
        np.array_equal(back.per_sample[k], v, equal_nan=v.dtype.kind == "f") for k, v in report.per_sample.items()
    )
    assert back.html() == (tmp_path / "report.html").read_text(encoding="utf-8")
    first = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    back.save(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == first


def test_the_document_keeps_the_contract(report):
    document = json.loads(json.dumps(report.document, allow_nan=False))
    contract = "schema threat model model_sha256 data data_sha256 n seed device figures flags seconds versions command"
    assert set(document) == {*contract.split(), "details"}
    assert all(set(figure) == {"value", "interval", "n"} for figure in document["figures"].values())
    shares = [f for name, f in document["figures"].items() if "accuracy" in name and f["value"] is not None]
    assert all(f["interval"] is not None for f in shares)
    assert report["clean/accuracy"].n == document["n"] == 48
    assert "FLAG" not in str(report)
    with pytest.raises(KeyError, match="no figure"):
        report["clean/nothing"]


# -- hostile files -------------------------------------------------------------------------------------------------


def change(path, edit):
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))


EDITS = {
    "unknown key": lambda d: d.update(extra=1),
    "missing key": lambda d: d.pop("seed"),
    "unknown key below": lambda d: d["details"].update(extra=1),
    "unknown key in a figure": lambda d: d["figures"]["clean/accuracy"].update(note=""),
    "unknown key in a part": lambda d: d["details"]["parts"][0].update(extra=1),
    "other schema": lambda d: d.update(schema="robust.evaluation/999"),
    "text for a number": lambda d: d["figures"]["clean/accuracy"].update(value="1.0"),
    "interval upside down": lambda d: d["figures"]["clean/accuracy"].update(interval=[1, 0]),
    "short hash": lambda d: d.update(data_sha256="ab"),
    "no samples": lambda d: d.update(n=0),
    "negative eps": lambda d: d["threat"].update(eps=-1),
    "endless text": lambda d: d.update(command="x" * 100_000),
    "deep settings": lambda d: d["details"]["parts"][0].update(settings=json.loads("[" * 50 + "]" * 50)),
    "a list": lambda d: d.update(details=[]),
    "parts of one name": lambda d: d["details"]["parts"].append(d["details"]["parts"][0]),
    "a part whose arrays are not there": lambda d: d["details"]["parts"][8].update(name="other"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_changed_document_is_refused(saved, tmp_path, edit):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    change(tmp_path / "result.json", EDITS[edit])
    with pytest.raises(UntrustedFileError):
        Report.load(tmp_path)


def test_json_that_is_none_is_refused(saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    for text in ('{"n": NaN}', "[" * 100_000, "\x00", '{"a": 1, "a": 2}', "[]"):
        (tmp_path / "result.json").write_text(text)
        with pytest.raises(UntrustedFileError):
            Report.load(tmp_path)


RAN = []


class Gadget:
    def __reduce__(self):
        return RAN.append, (1,)


def npz(**members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return buffer.getvalue()


def npy(shape, body, descr="<f8"):
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + body


def object_array():
    buffer = io.BytesIO()
    np.save(buffer, np.array([Gadget()], dtype=object), allow_pickle=True)
    return buffer.getvalue()


HOSTILE = {
    "pickle": pickle.dumps([1]),
    "object array": npz(a=object_array()),
    "claims more than it holds": npz(a=npy("(1000000000000,)", b"\0" * 8)),
    "negative shape": npz(a=npy("(-1,)", b"\0" * 8)),
    "bomb": npz(a=npy("(80000000,)", b"\0" * 80_000_000, "|u1")),
    "leads out": npz(**{"../../a": npy("(1,)", b"\0" * 8)}),
    "code in the header": npz(a=npy("__import__('os').getpid()", b"")),
    "empty": b"",
    "cut": npz(a=npy("(1,)", b"\0" * 8))[:-10],
}


@pytest.mark.quick
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_arrays_are_refused(tmp_path, kind):
    path = tmp_path / "per_sample.npz"
    path.write_bytes(HOSTILE[kind])
    with pytest.raises(UntrustedFileError):
        load_arrays(path)
    assert not RAN


def test_flipped_bytes_are_refused_or_harmless(tmp_path):
    path = tmp_path / "a.npz"
    arrays = {"part/x": np.arange(50.0), "part/y": np.arange(20) > 3}
    save_arrays(path, arrays)
    good, refused = path.read_bytes(), 0
    rng = np.random.default_rng(0)
    for _ in range(300):
        bad = bytearray(good)
        bad[rng.integers(len(bad))] ^= 1 << rng.integers(8)
        path.write_bytes(bytes(bad))
        try:
            found = load_arrays(path)
        except UntrustedFileError:
            refused += 1
        else:
            assert all(len(v) < 1000 for v in found.values())
    assert refused > 150


@pytest.mark.quick
def test_arrays_come_back_and_only_numbers_go_out(tmp_path):
    arrays = {
        "a/b": np.float32([[1, 2]]),
        "c": np.array([True]),
        "d": np.zeros((0, 3), dtype=np.int64),
        "e": np.array(1.0),
    }
    save_arrays(tmp_path / "x.npz", arrays)
    back = load_arrays(tmp_path / "x.npz")
    assert all(back[k].dtype == v.dtype and np.array_equal(back[k], v) for k, v in arrays.items())
    assert {k: v.shape for k, v in np.load(tmp_path / "x.npz").items()} == {k: v.shape for k, v in arrays.items()}
    with pytest.raises(TypeError, match="numbers only"):
        save_arrays(tmp_path / "x.npz", {"a": np.array(["text"])})


# -- the page ------------------------------------------------------------------------------------------------------


def test_the_page_needs_no_network_and_escapes_what_it_shows(text):
    assert not re.search(r"(https?:)?//[a-z]", text, re.IGNORECASE)
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert "default-src &#39;none&#39;" in text or "default-src 'none'" in text
    page = Page(text)
    assert not page.stack
    assert len(set(page.ids)) == len(page.ids)
    used = set(re.findall(r"url\(#([^)]+)\)", text)) | {m for m in re.findall(r'href="#([^"]+)"', text)}
    assert used <= set(page.ids)
    sources = [attrs.get("src", "") for _, attrs in page.tags if "src" in attrs]
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)


def test_the_page_can_be_read_without_pictures_and_in_the_dark(text):
    page = Page(text)
    pictures = [attrs for tag, attrs in page.tags if tag == "img"]
    plots = [attrs for tag, attrs in page.tags if tag == "svg"]
    assert pictures
    assert len(plots) >= 7
    assert all(attrs.get("alt") for attrs in pictures)
    assert all(attrs.get("role") == "img" and attrs.get("aria-label") for attrs in plots)
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    drawn = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", text))
    for colour in ("#000000", "#1b2230", "#ffffff"):  # these would vanish in one of the two modes
        assert colour not in drawn
    assert text.count("var(--ink)") > 10


def test_the_page_states_threat_units_and_intervals(report, text):
    assert "may change every input value by up to 0.1" in text
    assert "in units of the input" in text
    e = report["adversarial/accuracy"]
    assert f"[{100 * e.interval[0]:.1f}, {100 * e.interval[1]:.1f}] %" in text
    for title in ("Clean data", "Under attack", "Security curve", "Common corruptions", "Confidence", "Certified"):
        assert f">{title}</h2>" in text


def test_flags_stand_in_the_header(report):
    flagged = Report({**report.document, "flags": ["possible gradient masking: <b>"]}, report.per_sample)
    text = flagged.html()
    assert text.index("1 reason to distrust") < text.index("Clean data</h2>")
    assert "possible gradient masking: &lt;b&gt;" in text
    assert "No red flag" not in text


def test_plots_leave_the_global_state_alone(report):
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    before, figures = dict(mpl.rcParams), plt.get_fignums()
    report.html()
    assert dict(mpl.rcParams) == before
    assert plt.get_fignums() == figures


def test_small_documents_render_too():
    x, y = digits()
    report = evaluate(lambda x: x.flatten(1)[:, :10] * 3, (x[:3], y[:3]), [Clean(), Calibration()])
    assert "not measured" in report.html()
    assert check_document(report.document)["details"]["cost"]["parameters"] == 0


@pytest.mark.quick
def test_round_radii_span_what_was_found():
    assert round_radii(np.array([0.0, 0.3, 0.97])) == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.97])
    assert round_radii(np.array([0.0, 0.1, 0.1])) == [0.1]
    assert round_radii(np.zeros(3)) == []


def test_a_page_shows_the_model_beside_others(report):
    x, y = digits()
    data = Dataset(x[:48], y[:48], name="digits <script>alert(1)</script>", classes=[f"class {i}" for i in range(10)])
    attack = PGD(THREAT, n_iter=5)
    parts = [Clean(), Adversarial(THREAT, attack=attack, sanity=0), SecurityCurve(THREAT, attack=attack, subset=24)]
    other = evaluate(digits_cnn(seed=1), data, parts, name="other <b>")
    text = report.html(beside=[other])
    assert text.index("Beside other models</h2>") < text.index("Clean data</h2>")
    assert "other &lt;b&gt;" in text
    assert "McNemar p" in text
    page = Page(text)
    assert not page.stack
    assert len(set(page.ids)) == len(page.ids)
    fewer = evaluate(digits_cnn(seed=1), data.subset(range(40)), [Clean()], name="fewer")
    with pytest.raises(IncomparableError, match="fewer"):
        report.html(beside=[fewer])


def test_several_certificates_share_one_section() -> None:
    from robust_core.certificates import IntervalBounds
    from robust_core.evaluation import NotCertified
    from robust_core.threats import L1

    model, (x, y) = digits_cnn(), digits()
    parts = [
        Certified(Smoothing(model, 0.25, n_samples=200), name="smoothing"),
        Certified(IntervalBounds(model, Linf(0.002)), name="interval-linf"),
        Certified(IntervalBounds(model, L1(0.002)), name="interval-l1"),
        NotCertified("prototypes", "the model has no <prototypes>", "robust vision harden --method prototypes"),
    ]
    report = evaluate(model, (x[:8], y[:8]), parts)
    page = report.html()
    assert page.count(">Guarantees<") >= 1
    assert page.count("<svg") == 3, "one panel for each norm"
    assert "no &lt;prototypes&gt;" in page
    assert "robust vision harden --method prototypes" in page
    assert "smoothing: each certificate is false with probability at most 0.001" in page
    alone = evaluate(model, (x[:8], y[:8]), parts[:1]).html()
    assert ">Guarantees<" not in alone


def test_edited_texts_are_shown_as_such_and_escaped():
    pieces = [("same", "a <b> "), ("old", "small & old"), ("same", " "), ("new", "big"), ("same", " word")]
    section = Section("Texts", [], passages=[Passage("document 7", pieces)])
    text = layout.Page(title="t", lead="l", cards=[], sections=[section], provenance=[]).html()
    assert "<p>a &lt;b&gt; <del>small &amp; old</del> <ins>big</ins> word</p>" in text
    Page(text)
