"""Problems by their names on disk: published instances, JSON instances, and the user's own model in a Python file.

- ``model.py:build``: the file is run, ``build()`` returns a problem (``read_pyomo(…)`` of the user's model, for one);
- ``instance.json``: ``{"kind": "knapsack" | "capital-budgeting", …}`` with the constructor's arguments;
- any other file: a published instance; a first line of 3 numbers is a knapsack, of 5 a capital budget, where
  ``CB_n10_xi4_s1:loans`` lets its ``max_loan`` be borrowed.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import sys
from pathlib import Path
from typing import Any

from optim_robust.two_stage.capital_budgeting import CapitalBudgeting
from optim_robust.two_stage.knapsack import RobustKnapsack, read_numbers
from optim_robust.two_stage.problem import TwoStageProblem
from robust_core.errors import DataMissingError, MalformedFileError

__all__ = ["load_problem", "save_json"]

KINDS: dict[str, type[RobustKnapsack] | type[CapitalBudgeting]] = {
    "knapsack": RobustKnapsack,
    "capital-budgeting": CapitalBudgeting,
}


def load_problem(words: str) -> TwoStageProblem:
    """Return the problem that ``words`` name (see the module).

    Raises:
        DataMissingError: no such file.
        MalformedFileError: the file is no instance.
        ValueError: ``build`` is missing or does not return a problem.
    """
    name, colon, function = words.rpartition(":")
    if colon and name.endswith(".py"):
        return _from_python(_there(name), function)
    loans = function == "loans" and not Path(words).is_file()
    path = _there(name if loans else words)
    if path.suffix == ".py":
        raise ValueError(f"{words}: name the function that builds the problem, as in {words}:build")
    if path.suffix == ".json":
        return _from_json(path)
    lines = read_numbers(path)
    width = len(lines[0]) if lines else 0
    if width == 5:
        return CapitalBudgeting.from_file(path, loans=loans)
    if loans:
        raise MalformedFileError(f"{words}: only capital budgets (5 numbers in line 1) know loans; {width} are there")
    if width == 3:
        return RobustKnapsack.from_file(path)
    raise MalformedFileError(f"{path}, line 1: {width} numbers; 3 begin a knapsack, 5 a capital budget")


def _there(name: str) -> Path:
    path = Path(name)
    if not path.is_file():
        raise DataMissingError(f"{name}: no such file")
    return path


def _from_python(path: Path, function: str) -> TwoStageProblem:
    spec = importlib.util.spec_from_file_location(f"optim_robust_user_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} cannot be imported as Python")
    module = importlib.util.module_from_spec(spec)
    here = str(path.resolve().parent)
    sys.path.insert(0, here)
    try:
        spec.loader.exec_module(module)
    except (SyntaxError, ImportError, NameError, AttributeError, LookupError) as error:
        raise ValueError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(here)
    build = getattr(module, function, None)
    if not callable(build):
        raise ValueError(f"{path} holds no function {function!r}")
    problem = build()
    if not isinstance(problem, TwoStageProblem):
        raise ValueError(
            f"{path}:{function} returned a {type(problem).__name__}; a TwoStageProblem is needed (read_pyomo)"
        )
    return problem


def _from_json(path: Path) -> TwoStageProblem:
    try:
        document: Any = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise MalformedFileError(f"{path}: {error}") from error
    kind = document.get("kind") if isinstance(document, dict) else None
    if kind not in KINDS:
        raise MalformedFileError(f"{path}: 'kind' is {kind!r}; one of {', '.join(map(repr, KINDS))} is needed")
    fields = {key: value for key, value in document.items() if key != "kind"}
    allowed = inspect.signature(KINDS[kind]).parameters
    unknown = sorted(set(fields) - set(allowed))
    missing = sorted(k for k, p in allowed.items() if p.default is inspect.Parameter.empty and k not in fields)
    if unknown or missing:
        raise MalformedFileError(f"{path}: unknown keys {unknown}, missing keys {missing}")
    try:
        return KINDS[kind](**fields)
    except (TypeError, ValueError) as error:
        raise MalformedFileError(f"{path}: {error}") from error


def save_json(problem: RobustKnapsack | CapitalBudgeting, path: str | Path) -> None:
    """Write an instance as JSON, as :func:`load_problem` reads it."""
    kind = next(key for key, known in KINDS.items() if isinstance(problem, known))
    fields = [key for key in inspect.signature(KINDS[kind]).parameters if key != "self"]
    values = {key: getattr(problem, key) for key in fields}
    plain = {key: v if isinstance(v, str | float | int) else v.tolist() for key, v in values.items()}
    Path(path).write_text(json.dumps({"kind": kind, **plain}, indent=1) + "\n", encoding="utf-8")
