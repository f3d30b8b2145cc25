import json
import math
import subprocess
import sys
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ttest_1samp

from robust_core import claim as claims
from robust_core.claim import SCHEMA, Figures, Gate, Statement, judge, paired_interval, reproduce
from robust_core.errors import RobustError
from robust_core.methods import MethodCard

finite = st.floats(-1e6, 1e6, allow_nan=False)

STATEMENT = Statement(text="ours is better", metric="accuracy on digits", figure="accuracy", unit="%", margin=1.0)


@pytest.fixture
def install(monkeypatch):
    """Put a claim made of figures (one ``Figures`` per seed) under the slug ``planted``."""

    def put(runs, statements):
        module = ModuleType("planted_claim")
        module.STATEMENTS = statements
        module.run = lambda seed, scale: runs[seed]
        monkeypatch.setitem(sys.modules, "planted_claim", module)
        card = MethodCard(
            slug="planted",
            title="",
            paper="",
            kind="measure",
            task="",
            target="a:b",
            example="a:b",
            claim="planted_claim",
        )
        monkeypatch.setattr(claims, "find", lambda slug: ("robust-core", card))

    return put


def runs_of(differences, name="accuracy"):
    gate = Gate("exact", True, "checked")
    return [Figures({name: 90 + d}, {name: 90.0}, (gate,), {"digits": "ab"}) for d in differences]


@pytest.mark.quick
@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.lists(finite, min_size=2, max_size=12, unique=True))
def test_interval_is_students(differences):
    low, high = paired_interval(differences)
    expected = ttest_1samp(differences, 0.0).confidence_interval(0.95)
    scale = max(map(abs, differences)) + 1e-9
    assert low == pytest.approx(expected.low, rel=1e-6, abs=1e-9 * scale)
    assert high == pytest.approx(expected.high, rel=1e-6, abs=1e-9 * scale)


def test_intervals_that_prove_nothing():
    assert paired_interval([]) == (-math.inf, math.inf)
    assert paired_interval([3.0]) == (-math.inf, math.inf)
    assert paired_interval([3.0, math.nan]) == (-math.inf, math.inf)
    assert paired_interval([3.0, math.inf]) == (-math.inf, math.inf)
    assert paired_interval([3.0, 3.0]) == (3.0, 3.0)


@pytest.mark.quick
def test_verdicts():
    assert judge((1.0, 2.0), 1.0) == "holds"
    assert judge((0.9, 2.0), 1.0) == "inconclusive"
    assert judge((0.0, 1.0), 1.0) == "inconclusive"  # the interval touches the margin: not refuted
    assert judge((0.0, 0.999), 1.0) == "fails"
    assert judge((-math.inf, math.inf), -1e9) == "inconclusive"


@settings(deadline=None, derandomize=True, max_examples=50)
@given(finite, finite, finite, finite)
def test_a_harder_margin_never_turns_a_verdict_good(a, b, margin, more):
    interval, order = (min(a, b), max(a, b)), ["fails", "inconclusive", "holds"]
    harder = judge(interval, margin + abs(more))
    assert order.index(harder) <= order.index(judge(interval, margin))


def test_the_document_is_the_contract(install):
    install(runs_of([2.0, 2.1, 1.9]), [STATEMENT])
    seen = []
    document = reproduce("planted", seeds=3, on_seed=lambda done, seeds: seen.append((done, seeds)))
    assert set(document) == {
        "schema", "slug", "gates", "statements", "seeds", "scale", "device", "seconds", "versions", "data_sha256",
    }  # fmt: skip
    assert document["schema"] == SCHEMA
    assert document["gates"] == [{"name": "exact", "pass": True, "detail": "checked"}]
    (statement,) = document["statements"]
    assert set(statement) == {"text", "metric", "margin", "verdict", "figures"}
    (figure,) = statement["figures"]
    assert set(figure) == {"name", "unit", "paper", "reason", "measured", "baseline", "interval"}
    assert figure["measured"] == [92.0, 92.1, 91.9]
    assert figure["baseline"] == [90.0, 90.0, 90.0]
    assert statement["verdict"] == "holds"
    assert document["seeds"] == [0, 1, 2]
    assert document["scale"] == "quick"
    assert document["data_sha256"] == {"digits": "ab"}
    assert {"python", "torch", "robust-core"} <= set(document["versions"])
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert json.loads(json.dumps(document, allow_nan=False)) == document


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [([2.0, 2.1, 1.9], "holds"), ([0.1, 0.2, 0.0], "fails"), ([0.0, 2.0, 4.0], "inconclusive")],
)
def test_verdicts_of_runs(install, differences, verdict):
    install(runs_of(differences), [STATEMENT])
    assert reproduce("planted", seeds=3)["statements"][0]["verdict"] == verdict


def test_lower_is_better_and_negative_margins(install):
    lower = Statement(text="not slower", metric="s", figure="accuracy", unit="s", margin=-0.5, higher_is_better=False)
    install(runs_of([0.3, 0.31, 0.29]), [lower])
    (statement,) = reproduce("planted", seeds=3)["statements"]
    assert statement["verdict"] == "holds"
    assert statement["figures"][0]["interval"][1] < 0


@pytest.mark.quick
def test_one_seed_and_nan_prove_nothing(install):
    install(runs_of([50.0]), [STATEMENT])
    document = reproduce("planted", seeds=1)
    assert document["statements"][0]["verdict"] == "inconclusive"
    assert document["statements"][0]["figures"][0]["interval"] == [None, None]
    install(runs_of([5.0, math.nan, 5.0]), [STATEMENT])
    document = reproduce("planted", seeds=3)
    assert document["statements"][0]["verdict"] == "inconclusive"
    assert document["statements"][0]["figures"][0]["measured"] == [95.0, None, 95.0]
    json.dumps(document, allow_nan=False)


def test_statements_on_several_figures_need_all_of_them(install):
    def case(a, b):
        pairs = zip(runs_of(a, "a"), runs_of(b, "b"), strict=True)
        runs = [Figures(p.measured | q.measured, p.baseline | q.baseline, p.gates) for p, q in pairs]
        statement = Statement(text="", metric="", figure=("a", "b"), unit="%", margin=1.0)
        install(runs, [statement])
        return reproduce("planted", seeds=3)["statements"][0]

    good, bad, open_ = [2.0, 2.1, 1.9], [0.0, 0.1, 0.0], [0.0, 2.0, 4.0]
    assert case(good, good)["verdict"] == "holds"
    assert case(good, bad)["verdict"] == "fails"
    assert case(open_, bad)["verdict"] == "fails"
    assert case(good, open_)["verdict"] == "inconclusive"
    assert [f["name"] for f in case(good, good)["figures"]] == ["a", "b"]


def test_gates_fail_if_one_seed_fails(install):
    runs = runs_of([1.0, 1.0, 1.0])
    runs[1] = Figures(runs[1].measured, runs[1].baseline, (Gate("exact", False, "off by 3"),))
    install(runs, [STATEMENT])
    assert reproduce("planted", seeds=3)["gates"] == [{"name": "exact", "pass": False, "detail": "off by 3"}]


def test_scales_and_first_seed(install):
    statements = [STATEMENT, Statement(text="", metric="", figure="none", unit="", margin=0.0, scales=("full",))]
    install(runs_of([1.0, 2.0, 3.0]), statements)
    document = reproduce("planted", seeds=2, first_seed=1)
    assert document["seeds"] == [1, 2]
    assert len(document["statements"]) == 1


def test_claims_that_check_or_measure_nothing_are_refused(install):
    install([Figures({"accuracy": 1.0})], [STATEMENT])
    with pytest.raises(RobustError, match="gate"):
        reproduce("planted", seeds=1)
    install(runs_of([1.0], "other"), [STATEMENT])
    with pytest.raises(RobustError, match="'accuracy'"):
        reproduce("planted", seeds=1)


@pytest.mark.quick
def test_bad_arguments_are_named(install, monkeypatch):
    install(runs_of([1.0]), [STATEMENT])
    for arguments, word in (({"seeds": 0}, "seeds"), ({"first_seed": -1}, "first_seed"), ({"scale": "huge"}, "scale")):
        with pytest.raises(ValueError, match=word):
            reproduce("planted", **arguments)
    card = MethodCard(slug="bare", title="", paper="", kind="measure", task="", target="a:b", example="a:b")
    monkeypatch.setattr(claims, "find", lambda slug: ("robust-core", card))
    with pytest.raises(ValueError, match="no claim"):
        reproduce("bare")


def test_importing_the_machinery_needs_no_torch():
    code = "import sys, robust_core.claim, robust_core.methods; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
