"""Finished queries, kept on disk as they finish, so that the same work goes on where it was interrupted.

The first line says what the work was; a file of other work is refused, and a last line that a crash cut off is done
again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from robust_core.errors import CheckpointError, UntrustedFileError
from robust_core.io import parse_json, write_atomic

__all__ = ["Finished"]

PathLike = str | os.PathLike[str]


class Finished:
    """Rows of finished queries.

    Args:
        path: a file of lines, or None to keep nothing.
        about: all that the rows depend on, as plain JSON.

    Raises:
        CheckpointError: the file belongs to other work, or is damaged.
    """

    def __init__(self, path: PathLike | None, about: Mapping[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.rows: dict[str, Any] = {}
        if self.path is None:
            return
        head = json.dumps(about, sort_keys=True)
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self.path, head + "\n")
            return
        first, *rest = self.path.read_text(encoding="utf-8", errors="replace").split("\n")
        if first != head:
            raise CheckpointError(
                f"{self.path}: was written with other settings, rankers, lists or texts; remove it, or name another"
            )
        whole = rest[:-1]  # what stands behind the last line's end was cut off by a crash
        for number, line in enumerate(whole, 2):
            try:
                qid, row = parse_json(line.encode(), source=f"{self.path}:{number}")
            except (UntrustedFileError, TypeError, ValueError) as error:
                raise CheckpointError(f"{self.path}:{number}: is damaged ({error}); remove the file") from None
            self.rows[qid] = row
        write_atomic(self.path, "".join(f"{line}\n" for line in (first, *whole)))

    def work(
        self, qids: Iterable[str], do: Callable[[str], Any], on_step: Callable[[int, int], None] | None = None
    ) -> dict[str, Any]:
        """Return query -> ``do(query)``, plain JSON, done only where it is not known.

        Args:
            qids: the queries.
            do: the work.
            on_step: called with (queries done, queries in all).
        """
        wanted = list(qids)
        for done, qid in enumerate(wanted, 1):
            if qid not in self.rows:
                self._add(qid, do(qid))
            if on_step is not None:
                on_step(done, len(wanted))
        return {qid: self.rows[qid] for qid in wanted}

    def _add(self, qid: str, row: Any) -> None:
        line = json.dumps([qid, row], allow_nan=False)
        self.rows[qid] = json.loads(line)[1]  # the same whether it was read back or not
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
                file.flush()
                os.fsync(file.fileno())
