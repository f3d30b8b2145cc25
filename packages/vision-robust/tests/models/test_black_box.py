"""Black boxes: what they count and refuse, and what answers their queries."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robust_core.attacks import ArrayModel, AutoAttack
from robust_core.attacks.autoattack import plan
from robust_core.certificates import Smoothing
from robust_core.data import Dataset
from robust_core.errors import NotDifferentiableError, ResourceError
from robust_core.evaluation import Adversarial, Clean, evaluate
from robust_core.models import fingerprint
from robust_core.testing.conformance import refuses
from robust_core.testing.tiny import digits
from robust_core.threats import Linf
from vision_robust.models.black_box import BlackBox, QueryBudgetExceeded
from vision_robust.models.queries import HttpQuery, OnnxQuery, QueryError, black_box

CLASSES = 10


def _linear() -> nn.Sequential:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES))
    with torch.no_grad():
        weight = torch.randn(CLASSES, 64, generator=torch.Generator().manual_seed(0))
        network.get_parameter("1.weight").copy_(weight)
        network.get_parameter("1.bias").zero_()
    return network


def answer(array: np.ndarray) -> np.ndarray:
    """Return the scores of the linear network for an array: named by words in a test."""
    with torch.no_grad():
        return _linear()(torch.from_numpy(array)).numpy()


# -- the box ---------------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_queries_are_counted_and_end_at_the_budget() -> None:
    x, _ = digits()
    calls: list[int] = []

    def query(part: Tensor) -> Tensor:
        calls.append(len(part))
        return _linear()(part)

    box = BlackBox(query, max_queries=20, batch_size=8)
    mark = fingerprint(box)
    assert torch.equal(box(x[:18]), torch.cat([_linear()(part) for part in x[:18].split(8)]).detach())
    assert (box.queries, box.remaining, calls) == (18, 2, [8, 8, 2])
    with pytest.raises(QueryBudgetExceeded, match="3 queries are needed, 2 of 20 are left") as failure:
        box(x[:3])
    assert (failure.value.spent, failure.value.wanted, box.queries) == (18, 3, 18)
    assert copy.deepcopy(box).queries == 18  # copies ask the same service
    assert copy.deepcopy(box)(x[:1]).shape == (1, CLASSES)
    assert box.queries == 19
    assert fingerprint(box) == mark  # what was spent is not what is computed
    box.max_queries = None
    assert box.remaining is None


def test_no_gradient_enters() -> None:
    x = digits()[0][:2].clone().requires_grad_(True)
    box = BlackBox(_linear())
    with pytest.raises(NotDifferentiableError, match="detach"):
        box(x)
    assert not box(x.detach()).requires_grad
    assert box.queries == 2
    assert not any(p.requires_grad for p in box.parameters())
    assert not box.train().training


def test_scores_are_understood() -> None:
    x, _ = digits()
    logits = _linear()(x[:9]).detach()
    shares = BlackBox(lambda part: _linear()(part).softmax(1))
    assert torch.allclose(shares(x[:9]).softmax(1), logits.softmax(1), atol=1e-6)
    assert (shares.resolved_scores, BlackBox(_linear()).resolved_scores) == ("probabilities", "auto")
    labels = BlackBox(lambda part: _linear()(part).argmax(1), scores="labels", n_classes=CLASSES)
    assert torch.equal(labels(x[:9]).argmax(1), logits.argmax(1))
    images = BlackBox(lambda part: part, scores="values")
    assert torch.equal(images(x[:9]), x[:9].flatten(1))
    assert BlackBox(_linear())(x[:4].double().float()).dtype == torch.float32
    zero = torch.eye(CLASSES)[:4]
    assert bool(torch.isfinite(BlackBox(lambda part: zero, scores="probabilities")(x[:4])).all())


def test_answers_of_another_form_are_refused() -> None:
    x, _ = digits()
    cases: dict[str, BlackBox] = {
        "too few rows": BlackBox(lambda part: _linear()(part)[:1]),
        "labels that were not announced": BlackBox(lambda part: _linear()(part).argmax(1)),
        "another number of classes": BlackBox(_linear(), n_classes=7),
        "logits instead of probabilities": BlackBox(_linear(), scores="probabilities"),
        "scores instead of labels": BlackBox(_linear(), scores="labels", n_classes=CLASSES),
        "labels beyond the classes": BlackBox(lambda part: torch.full((len(part),), 12), scores="labels", n_classes=3),
        "no tensor": BlackBox(lambda part: [1, 2]),  # pyright: ignore
    }
    for what, box in cases.items():
        refuses(lambda box=box: box(x[:4]), what)
    refuses(lambda: BlackBox(_linear(), scores="labels"), "labels without a number of classes")
    refuses(lambda: BlackBox(3), "no function")  # pyright: ignore[reportArgumentType]
    refuses(lambda: BlackBox(_linear(), max_queries=0), "an empty budget")


def test_attackers_and_certifiers_take_it_for_what_it_is() -> None:
    x, _ = digits()
    box = BlackBox(ArrayModel(answer))
    assert plan(box).name == "black-box"
    y = box(x[:8]).argmax(1)
    before = box.queries
    result = AutoAttack(Linf(0.3)).run(box, x[:8], y)
    assert result.success.any()
    assert {log.name for log in result.log if not log.skipped} <= {"clean", "square"}
    assert box.queries - before >= result.forwards
    certificate = Smoothing(box, 0.1, n_samples=200).certify(x[:8], y)
    assert certificate.certified.any()


def test_evaluations_note_that_it_has_no_gradient_and_raise_no_alarm() -> None:
    box = BlackBox(ArrayModel(answer))
    data = Dataset(*(part[:24] for part in digits()))
    report = evaluate(box, data, [Clean(), Adversarial(Linf(0.3))])
    assert not [flag for flag in report.flags if "gradient" in flag]
    assert report.figures["adversarial/attack_success"].value > 0


# -- ONNX ------------------------------------------------------------------------------------------------------


def _save(path: Path, batch: Any, *, nhwc: bool = False, kind: str = "FLOAT", inputs: int = 1) -> Path:
    """Write the linear network; onnx is imported here, for it is a tool of development only."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weight = _linear().get_parameter("1.weight").detach().numpy().T.copy()
    shape = [batch, 8, 8, 1] if nhwc else [batch, 1, 8, 8]
    given = [
        helper.make_tensor_value_info(f"images{i or ''}", TensorProto.DataType.Value(kind), shape)
        for i in range(inputs)
    ]
    nodes = [helper.make_node("Flatten", ["as_float"], ["flat"]), helper.make_node("MatMul", ["flat", "w"], ["scores"])]
    nodes = [helper.make_node("Cast", ["images"], ["as_float"], to=TensorProto.FLOAT), *nodes]
    out = helper.make_tensor_value_info("scores", TensorProto.FLOAT, [batch, CLASSES])
    graph = helper.make_graph(nodes, "linear", given, [out], [numpy_helper.from_array(weight, "w")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


@pytest.mark.parametrize(("batch", "nhwc"), [("n", False), (1, False), (4, False), ("n", True), (3, True)])
def test_onnx_files_answer(tmp_path: Path, batch: Any, nhwc: bool) -> None:
    x, _ = digits()
    path = _save(tmp_path / "net.onnx", batch, nhwc=nhwc)
    box = black_box(f"onnx:{path}")
    assert torch.allclose(box(x[:10]), _linear()(x[:10]).detach(), atol=1e-5)
    assert box.queries == 10
    assert box(x[:2].double()).dtype == torch.float64
    assert torch.equal(copy.deepcopy(box)(x[:2]), box(x[:2]))
    assert box.identity.startswith("onnx:")
    assert fingerprint(box) == fingerprint(black_box(f"onnx:{path}"))
    other = _save(tmp_path / "other.onnx", batch, nhwc=not nhwc)
    assert fingerprint(box) != fingerprint(black_box(f"onnx:{other}"))


def test_onnx_files_that_do_not_fit_say_so(tmp_path: Path) -> None:
    x, _ = digits()
    with pytest.raises(QueryError, match="no such file"):
        OnnxQuery(tmp_path / "none.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"not a network")
    with pytest.raises(QueryError, match="no ONNX file"):
        OnnxQuery(tmp_path / "bad.onnx")
    with pytest.raises(ValueError, match="one input"):
        OnnxQuery(_save(tmp_path / "two.onnx", "n", inputs=2))
    with pytest.raises(ValueError, match="floating point"):
        OnnxQuery(_save(tmp_path / "bytes.onnx", "n", kind="UINT8"))
    with pytest.raises(ValueError, match="output='probs'"):
        OnnxQuery(_save(tmp_path / "net.onnx", "n"), output="probs")
    with pytest.raises(ValueError, match="layout"):
        OnnxQuery(tmp_path / "net.onnx", layout="nhwc")(x[:2])
    with pytest.raises(ValueError, match="wants"):
        OnnxQuery(tmp_path / "net.onnx")(x[:2, :, :4])


# -- HTTP ------------------------------------------------------------------------------------------------------


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """Return ``serve(handle)``: a local service whose ``handle(array, call)`` gives (status, body)."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    servers: list[ThreadingHTTPServer] = []

    def serve(handle: Callable[[np.ndarray, int], tuple[int, bytes]]) -> str:
        calls: list[int] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                calls.append(1)
                status, found = handle(np.load(io.BytesIO(body), allow_pickle=False), len(calls))
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", "http://127.0.0.1:9/elsewhere")
                self.send_header("Content-Length", str(len(found)))
                self.end_headers()
                with contextlib.suppress(ConnectionError):  # a caller that gave up
                    self.wfile.write(found)

            def log_message(self, format: str, *args: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}/predict"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def _npy(array: np.ndarray) -> bytes:
    body = io.BytesIO()
    np.save(body, array, allow_pickle=array.dtype == object)
    return body.getvalue()


FORMS: dict[str, Callable[[np.ndarray], bytes]] = {
    "npy": _npy,
    "rows": lambda scores: json.dumps(scores.tolist()).encode(),
    "object": lambda scores: json.dumps({"scores": scores.tolist(), "version": 3}).encode(),
}


@pytest.mark.parametrize("form", FORMS)
def test_services_answer(service: Callable[..., str], form: str) -> None:
    x, _ = digits()
    url = service(lambda array, call: (200, FORMS[form](answer(array))))
    box = black_box(f"{url}#batch_size=4,max_queries=50")
    assert torch.allclose(box(x[:10]), _linear()(x[:10]).detach(), atol=1e-5)
    assert (box.queries, box.remaining, box.identity) == (10, 40, url)
    labels = service(lambda array, call: (200, json.dumps(answer(array).argmax(1).tolist()).encode()))
    told = black_box(f"{labels}#scores=labels,n_classes=10")
    assert torch.equal(told(x[:10]).argmax(1), _linear()(x[:10]).argmax(1))


def test_services_that_stumble_are_asked_again(service: Callable[..., str]) -> None:
    x, _ = digits()
    url = service(lambda array, call: (503, b"later") if call < 3 else (200, _npy(answer(array))))
    assert HttpQuery(url, wait=0.0)(x[:2]).shape == (2, CLASSES)
    with pytest.raises(QueryError, match=r"2 attempts.*503: later"):
        HttpQuery(service(lambda array, call: (503, b"later")), retries=1, wait=0.0)(x[:2])
    with pytest.raises(QueryError, match=r"1 attempts.*403"):
        HttpQuery(service(lambda array, call: (403, b"no")), wait=0.0)(x[:2])
    with pytest.raises(QueryError, match="302"):
        HttpQuery(service(lambda array, call: (302, b"")), wait=0.0)(x[:2])
    with pytest.raises(QueryError, match="did not answer"):
        HttpQuery("http://127.0.0.1:9/", retries=1, wait=0.0)(x[:2])


def test_answers_that_cannot_be_read_are_refused(service: Callable[..., str]) -> None:
    x, _ = digits()
    bodies = {
        "pickled": _npy(np.array([{"a": 1}], dtype=object)),
        "no json": b"<html>hello</html>",
        "no scores": b'{"predictions": [[1, 2]]}',
        "ragged": b"[[1, 2], [3]]",
        "words": b'[["a", "b"]]',
        "cut": _npy(np.zeros((2, 10)))[:100],
    }
    for what, body in bodies.items():
        query = HttpQuery(service(lambda array, call, body=body: (200, body)))
        with pytest.raises(QueryError, match="answered"):
            query(x[:2])
        assert what


def test_slow_services_are_given_up(service: Callable[..., str]) -> None:
    release = threading.Event()

    def handle(array: np.ndarray, call: int) -> tuple[int, bytes]:
        release.wait(5)
        return 200, b"[]"

    query = HttpQuery(service(handle), timeout=0.2, retries=0)
    try:
        with pytest.raises(QueryError, match="timed out"):
            query(digits()[0][:1])
    finally:
        release.set()


# -- words -----------------------------------------------------------------------------------------------------


def test_functions_are_named_by_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sealed_box.py").write_text("def ask(x):\n    return x.reshape(len(x), -1)[:, :10] * 5\n")
    box = black_box("callable:sealed_box:ask#scores=logits")
    x, _ = digits()
    assert torch.allclose(box(x[:3]), 5 * x[:3].flatten(1)[:, :10])
    assert box.identity == "callable:sealed_box:ask"
    with pytest.raises(ResourceError, match="no module"):
        black_box("callable:no_such_module_here:ask")
    with pytest.raises(ValueError, match="has no"):
        black_box("callable:sealed_box:tell")


def test_words_of_no_known_form_are_refused() -> None:
    for words in ("ftp://host/x", "net.onnx", "onnx:a.onnx#fast=1", "callable:json:dumps#layout=nhwc", "http:#x"):
        with pytest.raises((ValueError, ResourceError)):
            black_box(words)
    refuses(lambda: HttpQuery("file:///etc/passwd"), "an address of a file")
