import csv
import io

import numpy as np
import pytest
from scipy.stats import binomtest

from robust_core.attacks import PGD
from robust_core.data import Dataset
from robust_core.evaluation import (
    Adversarial,
    Calibration,
    Clean,
    IncomparableError,
    Leaderboard,
    compare,
    evaluate,
    spread,
)
from robust_core.evaluation.arrays import save_arrays
from robust_core.io import write_json
from robust_core.testing.tiny import digits, digits_cnn
from robust_core.threats import Linf


def store(report, folder):
    folder.mkdir()
    save_arrays(folder / "per_sample.npz", report.per_sample)
    write_json(folder / "result.json", report.document)


def measure(name, *, kind="plain", n=80, eps=0.1, preprocessing="", seed=0):
    x, y = digits()
    data = Dataset(x[:n], y[:n], name="digits", preprocessing=preprocessing)
    threat = Linf(eps)
    parts = [Clean(), Calibration(), Adversarial(threat, attack=PGD(threat, n_iter=10), sanity=0)]
    return evaluate(digits_cnn(kind, seed=seed), data, parts, name=name)


@pytest.fixture(scope="module")
def pair():
    return measure("plain"), measure("hardened | *x*", kind="adversarial")


def test_comparison_tests_the_pairs_and_marks_the_front(pair):
    plain, hard = pair
    table = compare(pair)
    assert table.columns == ("clean/accuracy", "adversarial/accuracy", "calibration/ece")
    test = table.paired["plain", "hardened | *x*", "adversarial"]
    a, b = plain.arrays("adversarial")["robust"], hard.arrays("adversarial")["robust"]
    assert test.p_value == pytest.approx(binomtest(int((a & ~b).sum()), int((a ^ b).sum())).pvalue)
    assert test.difference == pytest.approx(a.mean() - b.mean())
    assert test.difference < 0
    assert [row.pareto for row in table.rows][1]  # hardened: the best under attack
    assert "McNemar" in table.markdown()
    dominated = compare([hard, hard])
    assert all(row.pareto for row in dominated.rows)  # equal rows do not beat each other


@pytest.mark.parametrize(
    ("other", "named"),
    [({"n": 60}, "data_sha256"), ({"eps": 0.2}, "part eps"), ({"preprocessing": "centre crop"}, "preprocessing")],
)
def test_columns_refuse_to_mix(pair, other, named, tmp_path):
    odd = measure("odd one", **other)
    with pytest.raises(IncomparableError, match=named):
        compare([pair[0], odd])
    store(pair[0], tmp_path / "a")
    store(odd, tmp_path / "b")
    with pytest.raises(IncomparableError, match="odd one"):
        Leaderboard(tmp_path).render()


def test_columns_that_agree_can_still_be_compared(pair):
    other = measure("other", eps=0.2)
    assert compare([pair[0], other], ["clean/accuracy"]).columns == ("clean/accuracy",)


def test_leaderboards_sort_group_and_cannot_be_broken_by_names(pair, tmp_path):
    for name, report in zip("ab", pair, strict=True):
        store(report, tmp_path / name)
    (tmp_path / "not a report").mkdir()
    board = Leaderboard(tmp_path)
    text = board.render("markdown")
    assert text.index("hardened") < text.index("| plain")
    assert "hardened \\| *x*" in text
    assert board.render(sort_by="clean/accuracy").index("| plain") < text.index("★ no other")
    page = board.render("html", group_by="threat")
    assert "<td>Linf 0.1</td>" in page
    rows = list(csv.DictReader(io.StringIO(board.render("csv"))))
    assert float(rows[0]["adversarial/accuracy value"]) == pytest.approx(pair[1]["adversarial/accuracy"].value)
    low, high = pair[1]["adversarial/accuracy"].interval
    assert (float(rows[0]["adversarial/accuracy low"]), float(rows[0]["adversarial/accuracy high"])) == (low, high)
    with pytest.raises(ValueError, match="not a column"):
        board.render(sort_by="nonsense")
    with pytest.raises(ValueError, match="group_by='figures'"):
        board.render(group_by="figures")
    with pytest.raises(ValueError, match="kind='pdf'"):
        board.render("pdf")


def test_groups_are_compared_within_themselves(pair, tmp_path):
    store(pair[0], tmp_path / "a")
    store(measure("other", eps=0.2), tmp_path / "b")
    board = Leaderboard(tmp_path)
    _, rows = board.rows(group_by="threat")
    assert [row.group for row in rows] == ["Linf 0.1", "Linf 0.2"]
    assert all(row.pareto for row in rows)


def test_spreadsheets_get_no_formula(pair, tmp_path):
    store(measure("=cmd()", n=8), tmp_path / "a")
    assert "'=cmd()" in Leaderboard(tmp_path).render("csv")


def test_empty_folders_and_single_reports_say_so(pair, tmp_path):
    with pytest.raises(ValueError, match="holds no report"):
        Leaderboard(tmp_path)
    with pytest.raises(ValueError, match="at least two"):
        compare(pair[:1])
    with pytest.raises(ValueError, match="no report has"):
        compare(pair, ["clean/nothing"])
    assert np.isfinite(compare(pair).rows[0].figures["clean/accuracy"].value)


def test_spread_over_seeds_shows_every_value(pair):
    third = measure("third", kind="plain", seed=1)
    found = spread([*pair, third])["clean/accuracy"]
    values = [r["clean/accuracy"].value for r in (*pair, third)]
    assert found.values == tuple(values)
    assert (found.mean, found.sd) == (pytest.approx(np.mean(values)), pytest.approx(np.std(values, ddof=1)))
    with pytest.raises(ValueError, match="3 of 2 different models"):
        spread([*pair, pair[0]])
