"""CSV and JSON in the run directory, the source of truth, and Weights & Biases beside them when asked."""

import csv
import io
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.checkpoints import write_atomically
from common.errors import UsageError


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON, atomically; numbers that are not finite become null."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(key): clean(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [clean(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    write_atomically(path, lambda file: file.write((json.dumps(clean(content), indent=2) + "\n").encode()))


class Table:
    """A CSV that grows by whole rows, each flushed. Rows are dictionaries; a missing or None value is left empty.

    Without `write` the file stays as it is, and the rows here are those that its writer has.
    """

    def __init__(self, path: Path, write: bool = True) -> None:
        self.path, self.write = path, write
        self.columns: list[str] | None = None
        self.rows: list[dict[str, str]] = []
        if path.exists():
            text = path.read_text()
            reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))  # a kill may cut the last line
            self.rows = list(reader)
            self.columns = list(reader.fieldnames or []) or None

    def rewind(self, keep: Any) -> None:
        """Drop the rows for which `keep(row)` is false: those written after the checkpoint that is resumed."""
        if self.columns is None:
            return
        self.rows = [row for row in self.rows if keep(row)]
        if not self.write:
            return
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_atomically(self.path, lambda file: file.write(text.getvalue().encode()))

    def clear(self) -> None:
        """Start anew: no rows, no columns, no file."""
        self.columns, self.rows = None, []
        if self.write:
            self.path.unlink(missing_ok=True)

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write the rows in one go; the first row ever written fixes the columns."""
        text = io.StringIO()
        new = self.columns is None
        if self.columns is None:
            self.columns = list(rows[0])
        if unknown := sorted(set(rows[0]) - set(self.columns)):
            raise UsageError(f"{self.path} was begun without the column {unknown[0]}; use another --run-dir")
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        if new:
            writer.writeheader()
        for row in rows:
            cells = {name: "" if value is None else _format(value) for name, value in row.items()}
            writer.writerow(cells)
            self.rows.append(cells)
        if self.write:
            with open(self.path, "w" if new else "a", newline="") as file:
                file.write(text.getvalue())


def _format(value: Any) -> str:
    return f"{value:.7g}" if isinstance(value, float) else str(value)


class Tracker:
    """Weights & Biases: one run for each member, in one group; under a sweep agent one run for the whole population.

    Whatever goes wrong in wandb is reported once and tracking is switched off: it never stops training.
    """

    def __init__(self, track: bool, project: str, group: str, entity: str | None) -> None:
        self.under_agent = "WANDB_SWEEP_ID" in os.environ
        self.enabled = track or self.under_agent
        self.project, self.group, self.entity = project, group, entity
        self.runs: list[Any] = []
        self.step = 0

    def start(self, configs: list[dict[str, Any]], names: list[str], directory: Path) -> None:
        """Open the runs: `configs[i]` and `names[i]` are those of member i."""
        if not self.enabled:
            return
        if self.under_agent:
            configs, names = [configs[0] | {"members": len(configs)}], [self.group]
        try:
            import wandb

            for config, name in zip(configs, names, strict=True):
                run = wandb.init(
                    project=self.project,
                    entity=self.entity,
                    group=self.group,
                    name=name,
                    config=config,
                    dir=directory,
                    reinit="create_new",
                    settings=wandb.Settings(silent=True, init_timeout=30),
                )
                self.runs.append(run)
        except Exception as error:
            self._give_up(error)

    def log(self, step: int, per_member: list[dict[str, Any]]) -> None:
        """Log one dictionary for each member; under an agent, their means."""
        if not self.enabled:
            return
        self.step = step
        if self.under_agent:
            names = {name for row in per_member for name in row}
            numbers = {name: [row[name] for row in per_member if row.get(name) is not None] for name in names}
            per_member = [{name: sum(x) / len(x) for name, x in numbers.items() if x}]
        try:
            for run, row in zip(self.runs, per_member, strict=True):
                run.log({name: value for name, value in row.items() if value is not None}, step=step)
        except Exception as error:
            self._give_up(error)

    def finish(self, per_member: list[dict[str, Any]], aggregate: dict[str, Any], exit_code: int) -> None:
        """Write the final figures into the runs' histories and summaries and close them.

        A sweep's metric that is None, as that of a population all of whose members diverged, is not written: with an
        exit code other than 0, the search then takes the worst value among the other runs.
        """
        if not self.enabled:
            return
        try:
            for run, row in zip(self.runs, [aggregate] if self.under_agent else per_member, strict=True):
                if written := {name: value for name, value in row.items() if value is not None}:
                    run.log(written, step=self.step)  # joins the row of the last evaluation
                    run.summary.update(written)
                run.finish(exit_code=exit_code)
        except Exception as error:
            self._give_up(error)
        self.enabled = False

    def _give_up(self, error: Exception) -> None:
        print(f"wandb: {' '.join(str(error).split())}; tracking is off, training goes on", file=sys.stderr)
        self.enabled = False
