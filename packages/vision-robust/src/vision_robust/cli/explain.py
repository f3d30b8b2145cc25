"""``robust vision explain``: why the model decides as it does, in tables and plots."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from robust_core.claim import versions
from robust_core.data import Dataset
from robust_core.io import write_json
from robust_core.models import fingerprint
from robust_core.settings import parse_settings
from vision_robust import recipes
from vision_robust.cli.setting import Setting
from vision_robust.recipes.base import Explanation, OnStep

__all__ = ["explain"]

SCHEMA = "robust.explanation/1"


def explain(
    method: str,
    setting: Setting,
    train: Dataset,
    words: Sequence[str],
    *,
    target: int | None,
    out: Path,
    command: str,
    on_step: OnStep,
) -> dict[str, Any]:
    """Explain, write ``result.json`` beside the method's tables and plots, and return it.

    Raises:
        ValueError: a method that explains nothing.
    """
    started, recipe = time.perf_counter(), recipes.find(method)
    if recipe.explain is None:
        known = ", ".join(recipes.methods_of("explain"))
        raise ValueError(f"--method {method!r} explains nothing; choose one of {known}")
    own = parse_settings(recipe.explain_settings, words)
    out.mkdir(parents=True, exist_ok=True)
    asked = Explanation(
        model=setting.model,
        data=setting.data,
        train=train,
        target=target,
        out=out,
        seed=setting.seed,
        on_step=on_step,
    )
    found = recipe.explain(asked, own)
    result = {
        "schema": SCHEMA,
        "method": method,
        "model": setting.name,
        "model_sha256": fingerprint(setting.model),
        "data": setting.data.name,
        "data_sha256": setting.data.sha256,
        "n": len(setting.data),
        "seed": setting.seed,
        "device": str(setting.device),
        **found,
        "seconds": round(time.perf_counter() - started, 3),
        "versions": versions(),
        "command": command,
    }
    write_json(out / "result.json", result)
    return result
