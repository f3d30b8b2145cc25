"""``robust optim solve`` and ``compare``: a user's model is solved; every other end has its words and exit code."""

import json
from pathlib import Path

import pytest

from optim_robust.two_stage import RobustKnapsack, save_json
from robust_core.cli.main import main

MODEL = """
import pyomo.environ as pyo
from optim_robust.two_stage import read_pyomo
from optim_robust.uncertainty import Budget

def build(least=0.0, most=100.0, price=3.0):
    m = pyo.ConcreteModel("capacity")
    m.i = pyo.RangeSet(3)
    m.build = pyo.Var(m.i, bounds=(0, most))
    m.buy = pyo.Var(m.i, bounds=(0, 2 if least else None))
    m.demand = pyo.Param(m.i, mutable=True, initialize=10.0)
    m.meet = pyo.Constraint(m.i, rule=lambda m, i: m.build[i] + m.buy[i] >= m.demand[i] + least)
    m.cost = pyo.Objective(expr=sum(m.build[i] + price * m.buy[i] for i in m.i))
    return read_pyomo(m, first_stage=[m.build], second_stage=[m.buy], uncertain=[m.demand],
                      uncertainty=Budget([8.0] * 3, 1.5, origin=[10.0] * 3))

def infeasible():
    return build(least=1000.0)

def unbounded():
    return build(price=-1.0)

def broken():
    return 3
"""


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(["optim", *words])
    return int(end.value.code or 0)  # pyright: ignore[reportArgumentType]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    file = tmp_path / "model.py"
    file.write_text(MODEL)
    return file


def test_a_users_model_is_solved_with_a_report(model, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("solve", "--problem", f"{model}:build", "--out", str(out), "--json") == 0
    shown = capsys.readouterr()
    document = json.loads(shown.out)
    row = document["details"]["runs"][0]
    assert (row["status"], row["objective"], row["bound"]) == ("optimal", pytest.approx(54), pytest.approx(54))
    assert row["x"] == {f"build[{i}]": pytest.approx(18) for i in (1, 2, 3)}
    assert "bound 30" in shown.err  # progress
    assert json.loads((out / "result.json").read_text())["data_sha256"] == document["data_sha256"]
    page = (out / "report.html").read_text()
    assert "Gap against time" in page
    assert "<script" not in page
    assert run("solve", "--problem", f"{model}:build", "-m", "k-adaptability:2") == 0
    assert "guaranteed cost: 54" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("function", "words", "code"),
    [("infeasible", "infeasible: no decision", 1), ("unbounded", "unbounded: costs", 1), ("broken", "TwoStage", 2),
     ("none", "no function", 2)],
)  # fmt: skip
def test_other_ends_have_their_words_and_exit_codes(model, capsys, function, words, code):
    assert run("solve", "--problem", f"{model}:{function}") == code
    shown = capsys.readouterr()
    assert words in shown.err
    assert "Traceback" not in shown.err


def test_a_time_limit_is_an_answer(tmp_path, capsys):
    save_json(RobustKnapsack.random(25, correlation="SC", delta=0.1, generator=1), tmp_path / "kp.json")
    assert run("solve", "-p", str(tmp_path / "kp.json"), "-t", "1", "--json") == 0
    row = json.loads(capsys.readouterr().out)["details"]["runs"][0]
    assert row["status"] == "time_limit"
    assert row["bound"] >= row["objective"] > 0  # a profit: the bound lies above


def test_compare_puts_methods_side_by_side(model, tmp_path, capsys):
    save_json(RobustKnapsack.random(6, generator=3), tmp_path / "kp.json")
    words = ["-p", f"{model}:build", "-p", str(tmp_path / "kp.json"), "-m", "ccg,branch-and-price,static,nominal"]
    assert run("compare", *words, "-t", "20", "-o", str(tmp_path / "out")) == 0
    shown = capsys.readouterr()
    assert "branch-and-price is left out" in shown.err
    runs = json.loads((tmp_path / "out" / "result.json").read_text())["details"]["runs"]
    assert len(runs) == 7
    best = {run["problem"]: run["objective"] for run in runs if run["method"] == "ccg"}
    for row in runs:
        assert row["sense"] * row["objective"] >= row["sense"] * best[row["problem"]] - 1e-3 * abs(row["objective"])
    assert (tmp_path / "out" / "report.html").read_text().count("Gap against time") >= 2


def test_a_network_is_learned_once_and_used_again(model, tmp_path, capsys):
    words = ["-p", f"{model}:build", "--net", str(tmp_path / "net")]
    assert run("learn", *words, "--decisions", "6", "--scenarios", "4", "--epochs", "2", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["family"] == "fixed:capacity:3x3"
    assert json.loads((tmp_path / "net" / "training.json").read_text()) == said
    for _ in range(2):
        assert run("solve", *words, "-m", "neur2ro", "-t", "20", "--json") == 0
        shown = capsys.readouterr()
        assert "is trained" not in shown.err
        row = json.loads(shown.out)["details"]["runs"][0]
        assert row["bound"] <= 54 + 1e-6 <= row["objective"] + 1e-3
    assert run("learn", *words, "--decisions", "7", "--scenarios", "4", "--epochs", "2") == 2
    assert "another run" in capsys.readouterr().err.replace("\n", " ")
    (tmp_path / "net" / "model.json").unlink()
    assert run("solve", *words, "-m", "neur2ro") == 3
    assert "robust optim learn" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize(
    ("words", "message", "code"),
    [
        (["solve", "-p", "none.json"], "no such file", 3),
        (["solve", "-p", "none.py:build"], "no such file", 3),
        (["solve", "-p", "{model}:build", "-m", "cgc"], "choose one of", 2),
        (["solve", "-p", "{model}:build", "-m", "ccg:3"], "take a number", 2),
        (["solve", "-p", "{model}:build", "-t", "0"], "--time-limit", 2),
        (["solve", "-p", "{model}:build", "--tol", "nan"], "--tol", 2),
        (["solve", "-p", "{model}"], "{model}:build", 2),
        (["solve", "-p", "{model}:build", "-m", "branch-and-price"], "RobustKnapsack", 2),
        (["solve", "-p", "{model}:build", "-o", "{model}"], "--out", 3),
        (["compare", "-p", "{model}:build", "-m", ","], "--methods", 2),
        (["learn", "-p", "{model}:build", "--net", "{model}"], "{model}", 3),
        (["learn", "-p", "{model}:build", "--net", "net", "--sizes", "4,x"], "--sizes", 2),
    ],
)
def test_wrong_words_end_in_one_line(model, capsys, words, message, code):
    assert run(*(word.format(model=model) for word in words)) == code
    shown = capsys.readouterr().err
    assert message.format(model=model) in shown.replace("\n", "")
    assert "Traceback" not in shown


def test_a_malformed_instance_is_named_with_its_line(tmp_path, capsys):
    (tmp_path / "RKP").write_text("2 10 1\n 1 1 1 1 1\n 1 1 x 1 1\n")
    assert run("solve", "-p", str(tmp_path / "RKP")) == 2
    assert "line 3" in capsys.readouterr().err
