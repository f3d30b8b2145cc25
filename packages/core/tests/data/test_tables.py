"""Tables: exact scaling and groups, errors that name file, line and column."""

from pathlib import Path

import numpy as np
import pytest
import torch

from robust_core.data import load, load_table
from robust_core.data.tables import GERMAN_NAMES, TableError
from robust_core.errors import DataMissingError


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def people(path: Path, n: int = 40) -> Path:
    rows = [f"{20 + i},{1000.5 * i},{'abc'[i % 3]},{i % 2},{'yes' if i % 4 else 'no'}" for i in range(n)]
    return write(path, "age,income,region,member,approved", *rows)


@pytest.mark.quick
def test_values_groups_and_units_come_back(tmp_path: Path) -> None:
    path = people(tmp_path / "people.csv")
    data = load(path, "all")
    assert data.x.shape == (40, 6)
    assert data.classes == ("no", "yes")
    age, income, region, member = data.columns
    assert [c.kind for c in data.columns] == ["integer", "number", "category", "integer"]
    assert region.positions == (2, 3, 4)
    assert data.x[:, 2:5].sum(1).eq(1).all()
    assert region.read(data.x) == ["abc"[i % 3] for i in range(40)]
    assert member.read(data.x) == [float(i % 2) for i in range(40)]
    inside = [i for i in range(40) if age.low <= 20 + i <= age.high]
    assert [age.read(data.x)[i] for i in inside] == [20.0 + i for i in inside]
    assert income.read(data.x[5:6]) == [pytest.approx(5002.5, rel=1e-5)]
    train, test = load(path), load(path, "test")
    assert sorted([*train.index.tolist(), *test.index.tolist()]) == list(range(40))
    assert float(train.x.min()) == 0
    assert float(train.x.max()) == 1
    assert train.columns == data.columns
    coded = load_table(path, "all", target="member", categorical=("age",), drop=("income",))
    assert coded.x.shape == (40, 40 + 3 + 2)
    assert coded.classes == ("0", "1")


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        (["a,b,y", "1,2,0", "1,2"], {}, r"t\.csv, line 3: 2 fields"),
        (["a,b,y", "1,,0", "2,3,1"], {}, r"line 2, column 'b': the value is missing"),
        (["a,b,y", "1,2,0", "3,?,1"], {}, r"line 3, column 'b': the value is missing"),
        (["a,b,y", "1,2,0", "3,x,1"], {}, r"line 3, column 'b': 'x' is no number"),
        (["a,b,y", "1,inf,0", "3,2,1"], {}, r"line 2, column 'b': 'inf' is no number"),
        (["a,b,y", "1,2,0", "1,3,1"], {}, r"column 'a' is constant"),
        (["a,b,y", "u,2,0", "u,3,1"], {}, r"column 'a' is constant"),
        (["a,b,y", "1,2,0", "2,3,1"], {"target": "z"}, r"target='z' is no column.*it has a, b, y"),
        (["a,b,y", "1,2,0", "2,3,1"], {"drop": ("z",)}, r"drop='z'"),
        (["a,b,y", "1,2,0.5", "2,3,1"], {}, r"line 2, column 'y': '0.5' is no class"),
        (["a,b,y", "1,2,0", "2,3,0"], {}, r"column 'y': 1 different"),
        (["a,a,y", "1,2,0", "2,3,1"], {}, r"line 1: the header holds 'a' twice"),
        (["a,b,y"], {}, "no rows"),
        (["a,b,y", '1,"2,0'], {}, r"line 2: unexpected end"),
    ],
)
def test_what_cannot_be_meant_is_one_error_with_its_place(
    tmp_path: Path, lines: list[str], options: dict, message: str
) -> None:
    with pytest.raises(TableError, match=message):
        load_table(write(tmp_path / "t.csv", *lines), "all", **options)


def test_other_encodings_and_free_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(b"a,y\n1,caf\xe9\n2,b\n")
    with pytest.raises(TableError, match="UTF-8"):
        load_table(path)
    with pytest.raises(TableError, match="300 different words"):
        load_table(write(path, "a,y", *[f"w{i},{i % 2}" for i in range(300)]))


def german_lines(n: int) -> list[str]:
    rng = np.random.default_rng(0)
    numeric = {1, 4, 7, 10, 12, 15, 17}
    rows = []
    for i in range(n):
        fields = [str(rng.integers(1, 40)) if j in numeric else f"A{j}{rng.integers(1, 4)}" for j in range(20)]
        rows.append(" ".join([*fields, str(1 + i % 2)]) + " ")
    return rows


def test_german_credit_in_both_of_its_forms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ROBUST_DATA", raising=False)
    with pytest.raises(DataMissingError, match=r"archive\.ics\.uci\.edu"):
        load("german_credit")
    rows = german_lines(60)
    (tmp_path / "german_credit").mkdir()
    write(tmp_path / "german_credit" / "german.data", *rows)
    data = load("german_credit", "all", tmp_path)
    assert data.classes == ("bad", "good")
    assert data.y.tolist() == [1 - i % 2 for i in range(60)]  # the file's 1 is good
    assert [c.kind for c in data.columns].count("category") == 13
    table = tmp_path / "csv"
    table.mkdir()
    write(table / "german_credit.csv", ",".join(GERMAN_NAMES), *[r.strip().replace(" ", ",") for r in rows])
    twin = load("german_credit", "all", table)
    assert torch.equal(twin.y, data.y)
    assert torch.equal(twin.x, data.x)
    assert twin.classes == data.classes
    monkeypatch.setenv("ROBUST_DATA", str(tmp_path))
    assert len(load("german_credit")) + len(load("german_credit", "test")) == 60


def test_bundled_tables_know_their_columns() -> None:
    data = load("breast_cancer", "test")
    assert data.columns[0].name == "mean radius"
    assert min(map(float, data.columns[0].read(data.x))) > 5  # in the unit of the source, not in [0, 1]
    assert data.subset(range(3)).columns == data.columns
    assert load("digits").columns == ()
