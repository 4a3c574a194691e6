"""Weights & Biases: one run for each member, in one group; under a sweep agent one run for the whole population."""

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from common.cli import RunArgs, UsageError, one_line
from common.report import read_json, write_json

OWN = ("phase", "step", "member", "seed")  # columns of the tables that say whose a row is
LONGEST = 128  # letters of a name or group that W&B's server takes; the end tells runs apart


class Tracker:
    """Opens the runs of the members of `config`, the record of the run, by their `names` in a group `label`.

    A run that is resumed goes on with those that wandb.json in its directory names; the parts of --shard share a group.
    Whatever goes wrong in wandb is reported once and tracking is switched off: it never stops training.
    """

    def __init__(self, args: RunArgs, config: dict[str, Any], names: list[str], label: str) -> None:
        self.step, self.runs, self.enabled = 0, [], True
        members, algorithm = config["members"], config["algorithm"]
        self.swept, self.indices = "WANDB_SWEEP_ID" in os.environ, [member["member"] for member in members]
        config = config["flags"] | config | {"members": len(members)}
        configs = [config | member["hyperparameters"] | member for member in members]
        if self.swept:
            configs, names = configs[:1], [label]
        kept, ids = Path(config["run_dir"]) / "wandb.json", {}
        saved = Path(config["run_dir"]) / "checkpoint" / "state.npz"  # without it the run starts anew
        if args.resume and saved.exists() and kept.exists() and not self.swept:
            with suppress(UsageError, KeyError):  # damaged: as if there were none
                record = read_json(kept)
                ids, label = record["ids"], record["group"]
        elif args.shard:
            label = str(Path(config["run_dir"]).parent)

        def open_run(i: int, config: dict[str, Any]) -> None:
            import wandb

            group = (args.wandb_group or label)[-LONGEST:]
            place = {"project": args.wandb_project, "entity": args.wandb_entity, "group": group}
            settings = wandb.Settings(silent=True, init_timeout=30)
            about = {"name": names[i][-LONGEST:], "job_type": algorithm, "tags": [algorithm, args.preset]}
            how = {"dir": config["run_dir"], "reinit": "create_new", "settings": settings}
            again = {"id": ids[str(i)], "resume": "allow"} if str(i) in ids else {}
            self.runs.append(wandb.init(**place, **about, config=config, **how, **again))

        def remember(_: int, runs: list[Any]) -> None:
            write_json(kept, {"group": label, "ids": {str(i): run.id for i, run in enumerate(runs)}})

        self._each(open_run, configs)
        self._each(remember, [] if self.swept else [self.runs])

    def _each(self, action: Callable[[int, Any], None], items: Sequence[Any]) -> None:
        try:
            for i, item in enumerate(items if self.enabled else []):
                action(i, item)
        except Exception as error:
            print(f"wandb: {one_line(error)}; tracking is off, training goes on", file=sys.stderr)
            self.enabled = False

    def log(self, table: str, rows: list[dict[str, Any]], step: int, rate: float | None) -> None:
        """Log the `rows` of a table, each to its member's run; under an agent, their means.

        `step` counts those of all phases, `rate` is in updates per second, of all members.
        """
        self.step, prefix = step, "evaluation/" if table == "evaluations.csv" else ""
        of_member: dict[int, dict[str, Any]] = {}
        for row in rows:
            numbers = {prefix + name: x for name, x in row.items() if name not in OWN and x is not None}
            of_member[row["member"]] = numbers | ({"updates_per_second": rate} if rate and not prefix else {})
        each = [of_member.get(i, {}) for i in self.indices]
        if self.swept:
            names = {name for row in each for name in row}
            each = [{name: float(np.mean([row[name] for row in each if name in row])) for name in names}]
        self._each(lambda i, row: self.runs[i].log(row, step=step), each)

    def finish(self, final: dict[str, Any] | None, exit_code: int) -> None:
        """Write the figures of `final`, what final.json has, into histories and summaries, and close the runs.

        `final` is None where the run ended without it. Under a sweep, if more than a quarter of the members diverged,
        no score is written and the exit code is 3: for a run without a score whose code is not 0, a search takes the
        worst of the other runs.
        """
        figures: list[dict[str, Any]] = [{}] * len(self.runs)
        if final and self.swept:
            lost = sum(m["diverged"] is not None for m in final["members"])
            figures = [{"diverged_members": lost}]
            if lost <= len(final["members"]) // 4:
                figures[0] |= {f"final_{name}_iqm": x["iqm"] for name, x in final["aggregate"].items()}
            else:  # the interquartile mean would be of the members that are left
                exit_code = exit_code or 3
        elif final:
            figures = [{"final_score": m["score_mean"], "final_return": m["return_mean"]} for m in final["members"]]

        def close(i: int, run: Any) -> None:
            if written := {name: value for name, value in figures[i].items() if value is not None}:
                run.log(written, step=self.step)  # joins the row of the last evaluation
                run.summary.update(written)
            run.finish(exit_code=exit_code)

        self._each(close, self.runs)
        self.enabled = False
