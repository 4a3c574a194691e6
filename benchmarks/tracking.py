"""Weights & Biases: one run for each member, in one group; under a sweep agent one run for the whole population."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.cli import RunArgs, one_line


class Tracker:
    """Opens the runs, whose `configs` and `names` are those of the members; their files go to `path`.

    Whatever goes wrong in wandb is reported once and tracking is switched off: it never stops training.
    """

    def __init__(self, args: RunArgs, configs: list[dict[str, Any]], names: list[str], group: str, path: Path) -> None:
        self.step, self.runs, self.swept = 0, [], "WANDB_SWEEP_ID" in os.environ
        self.enabled = args.track or self.swept
        if self.swept:
            configs, names = [configs[0] | {"members": len(configs)}], [group]

        def open_run(i: int, config: dict[str, Any]) -> None:
            import wandb

            place = {"project": args.wandb_project, "entity": args.wandb_entity, "group": args.wandb_group or group}
            settings = wandb.Settings(silent=True, init_timeout=30)
            about = {"name": names[i], "job_type": config["algorithm"], "tags": [config["algorithm"], args.preset]}
            run = wandb.init(**place, **about, config=config, dir=path, reinit="create_new", settings=settings)
            self.runs.append(run)

        self._each(open_run, configs)

    def _each(self, action: Callable[[int, Any], None], items: Sequence[Any]) -> None:
        try:
            for i, item in enumerate(items if self.enabled else []):
                action(i, item)
        except Exception as error:
            print(f"wandb: {one_line(error)}; tracking is off, training goes on", file=sys.stderr)
            self.enabled = False

    def log(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Log one dictionary for each member; under an agent, their means."""
        self.step = step
        rows = [{name: value for name, value in row.items() if value is not None} for row in rows]
        if self.swept:
            names = {name for row in rows for name in row}
            rows = [{name: float(np.mean([row[name] for row in rows if name in row])) for name in names}]
        self._each(lambda i, row: self.runs[i].log(row, step=step), rows)

    def finish(self, rows: list[dict[str, Any]], swept: dict[str, Any], exit_code: int) -> None:
        """Write the final figures of each member, or those `swept`, into histories and summaries, and close the runs.

        One that is None, as that of a population all of whose members diverged, is not written: with an exit code other
        than 0, a search then takes the worst value among the other runs.
        """

        def close(i: int, run: Any) -> None:
            row = swept if self.swept else rows[i]
            if written := {name: value for name, value in row.items() if value is not None}:
                run.log(written, step=self.step)  # joins the row of the last evaluation
                run.summary.update(written)
            run.finish(exit_code=exit_code)

        self._each(close, self.runs)
        self.enabled = False
