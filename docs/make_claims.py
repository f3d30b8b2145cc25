"""Write ``docs/claims.md`` from the committed results of ``robust reproduce SLUG --json``.

Run it from the root of the repository: ``uv run python docs/make_claims.py``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "claims"

HEAD = """# Claims

`robust reproduce SLUG` measures what a paper says. Gates (exactness and soundness) must pass. A statement is judged by
the 95 % interval of its paired differences over seeds against a margin that was fixed before the first run: it *holds*
if the whole interval lies at the margin or above, *fails* if it lies below, and is *inconclusive* otherwise. Failures
are listed as they fall. Below are the committed results at the quick scale; this page is generated from them.
"""


def render(results: list[dict[str, Any]]) -> str:
    """Return the page."""
    parts = [HEAD]
    for result in results:
        passed = sum(gate["pass"] for gate in result["gates"])
        seeds = f"{len(result['seeds'])} seeds" if len(result["seeds"]) > 1 else "1 seed"
        parts.append(f"## {result['slug']}\n\n{passed} of {len(result['gates'])} gates pass; {seeds}.\n")
        rows = ["| verdict | statement | measured, mean | against, mean | interval of the difference | margin |"]
        rows.append("|---|---|---|---|---|---|")
        for statement in result["statements"]:
            rows.extend(_row(statement, figure) for figure in statement["figures"])
        parts.append("\n".join(rows) + "\n")
    return "\n".join(parts)


def _row(statement: dict[str, Any], figure: dict[str, Any]) -> str:
    interval = ", ".join("–" if end is None else f"{end:.2f}" for end in figure["interval"])
    measured, baseline = (_mean(figure[key]) for key in ("measured", "baseline"))
    verdict = f"**{statement['verdict']}**" if statement["verdict"] == "fails" else statement["verdict"]
    text = f"{statement['text']} ({statement['metric']}; {figure['unit']})".replace("|", "\\|")
    return f"| {verdict} | {text} | {measured} | {baseline} | [{interval}] | {statement['margin']:g} |"


def _mean(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known):.2f}" if known else "–"


def page() -> str:
    """Return the page made from the committed results."""
    return render([json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))])


if __name__ == "__main__":
    (ROOT / "docs" / "claims.md").write_text(page())
