"""Tables of measurements: a CSV that grows by whole rows, on the screen or in a page, and the commit that made it."""

import csv
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.cli import UsageError
from common.report import append_rows, write_atomically


class Table:
    """A CSV that grows by whole rows, each flushed. Rows are dictionaries; None is an empty cell.

    A file that exists is gone on with; the first row ever written fixes the columns.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[dict[str, str]]:
        """The rows that there are; a last line that a kill has cut is none."""
        text = self.path.read_text() if self.path.exists() else ""
        return list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1])))

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write the rows in one go, in place of a last line that a kill has cut."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and not (text := self.path.read_bytes()).endswith(b"\n"):
            os.truncate(self.path, text.rfind(b"\n") + 1)
        append_rows(self.path, rows)

    def replace(self, rows: Sequence[dict[str, str]]) -> None:
        """Have these rows alone, with the columns of all; without any, no file."""
        if not rows:
            self.path.unlink(missing_ok=True)
            return
        text = io.StringIO()
        writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.path, text.getvalue())


def file_name(dataset: str) -> str:
    """What a file or folder is called after a dataset."""
    return re.sub(r"[^A-Za-z0-9.-]+", "-", dataset).strip(".-")


def write_text(path: Path, text: str) -> None:
    """Write the file whole or not at all."""
    write_atomically(path, lambda file: file.write(text.encode()))


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, the first column to the left and the others to the right."""
    lines = [columns, [":--", *["--:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def aligned(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table for the screen, the first column to the left and the others to the right; None is an empty cell."""
    cells = [["" if x is None else f"{x:.1f}" if isinstance(x, float) else str(x) for x in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]

    def line(row: Sequence[str]) -> str:
        first, *others = zip(row, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]).rstrip()

    return "\n".join(map(line, [columns, *cells]))


def fill(page: Path, name: str, text: str) -> None:
    """Put the text between `<!-- name -->` and `<!-- /name -->`, which the page must have once."""
    start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    pattern = re.compile(f"(?<={re.escape(start)}).*?(?={re.escape(end)})", re.DOTALL)
    filled, count = pattern.subn(lambda _: f"\n{text}\n\n", page.read_text())
    if count != 1:
        raise UsageError(f"{page} has {count} places for {name}, {start.strip()} ... {end}; it must have one")
    write_text(page, filled)


def commit_of(provenance: dict[str, Any]) -> str:
    """The commit of a `benchmarks.provenance.provenance()` or `commit_at`, and whether the code differed from it."""
    return (provenance["git_commit"] or "unknown") + (" with uncommitted changes" if provenance["git_dirty"] else "")
