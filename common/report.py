"""What a run says of itself: interquartile means with intervals, a table, learning curves, and Weights & Biases."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.cli import RunArgs, one_line


def interquartile_mean(values: Sequence[float] | np.ndarray) -> float:
    """Mean of the middle half: a quarter of the values, rounded down, is cut at each end (Agarwal et al., 2021)."""
    ordered = np.sort(np.asarray(values, float).ravel())
    cut = int(0.25 * len(ordered))
    return float(ordered[cut : len(ordered) - cut].mean())


def bootstrap_interval(strata: Sequence[Sequence[float] | np.ndarray], resamples: int = 2000) -> tuple[float, float]:
    """95 % stratified percentile-bootstrap interval of the interquartile mean over all strata (e.g. tasks) of runs.

    Within each stratum the runs are drawn with replacement (Agarwal et al., 2021, section 4.1). The generator is
    seeded, so that the same values give the same interval.
    """
    rng = np.random.default_rng(0)
    arrays = [np.asarray(values, float) for values in strata]
    drawn = np.concatenate([x[rng.integers(0, len(x), (resamples, len(x)))] for x in arrays], axis=1)
    low, high = np.percentile([interquartile_mean(row) for row in drawn], [2.5, 97.5])
    return float(low), float(high)


def aggregate(values: Sequence[float | None]) -> dict[str, Any]:
    """Interquartile mean, its 95 % interval and the count; None where there are too few values: none, or one."""
    finite = [value for value in values if value is not None and np.isfinite(value)]
    low, high = bootstrap_interval([finite]) if len(finite) > 1 else (None, None)
    iqm = interquartile_mean(finite) if finite else None
    return {"iqm": iqm, "ci_low": low, "ci_high": high, "count": len(finite)}


def summarise(members: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`aggregate` of all members' final scores and returns, and `combinations`: the same for each swept setting."""

    def of(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {name: aggregate([entry[f"{name}_mean"] for entry in entries]) for name in ("score", "return")}

    settings = list({tuple(member["swept"].items()): member["swept"] for member in members}.values())
    groups = [[member for member in members if member["swept"] == swept] for swept in settings]
    combinations = [{"swept": swept} | of(group) for swept, group in zip(settings, groups, strict=True)]
    return {"combinations": combinations, "aggregate": of(members)}


def table(title: str, members: Sequence[dict[str, Any]], level: float | None) -> str:
    """The last evaluation in text: members, or with a grid its settings from best to worst, and the data's own level."""
    figure = "score" if any(member["score_mean"] is not None for member in members) else "return"
    lines = [f"{title}: final {figure}"]
    if members[0]["swept"]:
        combinations = sorted(
            summarise(members)["combinations"], key=lambda c: -np.inf if c[figure]["iqm"] is None else -c[figure]["iqm"]
        )
        named = [(" ".join(f"{k}={v:g}" for k, v in c["swept"].items()), c[figure]) for c in combinations]
    else:
        named = [(f"seed {m['seed']}", {"iqm": m[f"{figure}_mean"], "ci_low": None, "ci_high": None}) for m in members]
        named.append(("all", aggregate([member[f"{figure}_mean"] for member in members])))
    for name, x in named:
        value = "diverged" if x["iqm"] is None else f"{x['iqm']:10.1f}"
        lines.append(
            f"{name:>24} {value}" + ("" if x["ci_low"] is None else f"  [{x['ci_low']:.1f}, {x['ci_high']:.1f}]")
        )
    return "\n".join(lines + ([] if level is None else [f"{'dataset':>24} {level:10.1f}"]))


def plot_curves(path: Path, evaluations: Sequence[dict[str, Any]], title: str, level: float | None) -> None:
    """Score (raw return where there is none) against updates, then online steps: a line for each member, and the mean.

    `level`, the average of the dataset's own episodes in the same unit, is drawn as a dashed line.
    """
    from matplotlib.figure import Figure

    figure_name = "score" if all(row["score_mean"] is not None for row in evaluations) else "return"
    phases = [phase for phase in ("offline", "online") if any(row["phase"] == phase for row in evaluations)]
    figure = Figure(figsize=(6.0 * max(1, len(phases)), 4.0), layout="constrained")
    for i, phase in enumerate(phases):
        axes = figure.add_subplot(1, len(phases), i + 1)
        members: dict[int, dict[int, float]] = {}
        for row in evaluations:
            if row["phase"] == phase:
                members.setdefault(row["member"], {})[row["step"]] = row[f"{figure_name}_mean"]
        for curve in members.values():
            axes.plot(list(curve), list(curve.values()), "o-", color="tab:blue", alpha=0.4, linewidth=1, markersize=3)
        steps = sorted({step for curve in members.values() for step in curve})
        means = [np.mean([curve[step] for curve in members.values() if step in curve]) for step in steps]
        name = f"mean of {len(members)} members" if len(members) > 1 else "one member"
        axes.plot(
            steps, means, "o-", color="tab:blue", linewidth=2, markersize=4, label=f"{name}, last {means[-1]:.1f}"
        )
        if level is not None:
            axes.axhline(level, color="tab:gray", linestyle="--", linewidth=1, label="average of the dataset")
        axes.set_xlabel("gradient updates" if phase == "offline" else "environment steps")
        axes.set_ylabel("normalised score" if figure_name == "score" else "return")
        axes.set_title(f"{title} ({phase})", fontsize=10)
        axes.legend(frameon=False, fontsize=8)
        axes.grid(alpha=0.2)
    figure.savefig(path, dpi=120)


class Tracker:
    """Weights & Biases: one run for each member, in one group; under a sweep agent one run for the whole population.

    Whatever goes wrong in wandb is reported once and tracking is switched off: it never stops training.
    """

    def __init__(self, args: RunArgs, label: str) -> None:
        self.args, self.label, self.step = args, label, 0
        self.under_agent = "WANDB_SWEEP_ID" in os.environ
        self.enabled = args.track or self.under_agent
        self.runs: list[Any] = []

    def _try(self, action: Any) -> None:
        if self.enabled:
            try:
                action()
            except Exception as error:
                print(f"wandb: {one_line(error)}; tracking is off, training goes on", file=sys.stderr)
                self.enabled = False

    def start(self, configs: list[dict[str, Any]], names: list[str], directory: Path) -> None:
        """Open the runs: `configs[i]` and `names[i]` are those of member i."""
        if self.under_agent:
            configs, names = [configs[0] | {"members": len(configs)}], [self.label]

        def open_runs() -> None:
            import wandb

            for config, name in zip(configs, names, strict=True):
                self.runs.append(
                    wandb.init(
                        project=self.args.wandb_project,
                        entity=self.args.wandb_entity,
                        group=self.args.wandb_group or self.label,
                        name=name,
                        config=config,
                        dir=directory,
                        reinit="create_new",
                        settings=wandb.Settings(silent=True, init_timeout=30),
                    )
                )

        self._try(open_runs)

    def log(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Log one dictionary for each member; under an agent, their means."""
        self.step = step
        if self.under_agent:
            names = {name for row in rows for name in row}
            numbers = {name: [row[name] for row in rows if row.get(name) is not None] for name in names}
            rows = [{name: float(np.mean(x)) for name, x in numbers.items() if x}]

        def write() -> None:
            for run, row in zip(self.runs, rows, strict=True):
                run.log({name: value for name, value in row.items() if value is not None}, step=step)

        self._try(write)

    def finish(self, rows: list[dict[str, Any]], aggregated: dict[str, Any], exit_code: int) -> None:
        """Write the final figures into the runs' histories and summaries and close them.

        A sweep's metric that is None, as that of a population all of whose members diverged, is not written: with an
        exit code other than 0, the search then takes the worst value among the other runs.
        """

        def close() -> None:
            for run, row in zip(self.runs, [aggregated] if self.under_agent else rows, strict=True):
                if written := {name: value for name, value in row.items() if value is not None}:
                    run.log(written, step=self.step)  # joins the row of the last evaluation
                    run.summary.update(written)
                run.finish(exit_code=exit_code)

        self._try(close)
        self.enabled = False
