"""What a finished run says: interquartile means, bootstrap intervals, the table on the screen, and the figures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table


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
    means = [interquartile_mean(row) for row in drawn]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def aggregate(values: Sequence[float | None]) -> dict[str, Any]:
    """Interquartile mean, its 95 % interval and the count; None where there are too few values: none, or one."""
    finite = [value for value in values if value is not None and np.isfinite(value)]
    low, high = bootstrap_interval([finite]) if len(finite) > 1 else (None, None)
    iqm = interquartile_mean(finite) if finite else None
    return {"iqm": iqm, "ci_low": low, "ci_high": high, "count": len(finite)}


def summarise(members: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`aggregate` of all members' final scores and returns, and `combinations`: the same for each swept setting.

    A member is its entry in final.json: `swept`, `score_mean`, `return_mean`; the means are None where it diverged.
    """

    def of(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {name: aggregate([entry[f"{name}_mean"] for entry in entries]) for name in ("score", "return")}

    settings: list[dict[str, float]] = []
    for member in members:
        if member["swept"] not in settings:
            settings.append(member["swept"])
    groups = [[member for member in members if member["swept"] == swept] for swept in settings]
    combinations = [{"swept": swept} | of(group) for swept, group in zip(settings, groups, strict=True)]
    return {"combinations": combinations, "aggregate": of(members)}


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table on stdout; None is an empty cell."""
    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name, justify="left" if name == columns[0] else "right")
    for row in rows:
        cells = ["" if cell is None else f"{cell:.1f}" if isinstance(cell, float) else str(cell) for cell in row]
        table.add_row(*cells)
    Console().print(table)


def plot_curves(path: Path, evaluations: Sequence[dict[str, str]], title: str, dataset_level: float | None) -> None:
    """Score (raw return where there is none) against updates, then online steps: a line for each member, and the mean.

    `dataset_level`, the average of the dataset's own episodes in the same unit, is drawn as a dashed line.
    """
    from matplotlib.figure import Figure

    scored = all(row["score_mean"] for row in evaluations)
    column = "score_mean" if scored else "return_mean"
    phases = [phase for phase in ("offline", "online") if any(row["phase"] == phase for row in evaluations)]
    figure = Figure(figsize=(6.0 * max(1, len(phases)), 4.0), layout="constrained")
    for i, phase in enumerate(phases):
        axes = figure.add_subplot(1, len(phases), i + 1)
        by_step: dict[int, list[float]] = {}
        members: dict[str, list[tuple[int, float]]] = {}
        for row in evaluations:
            if row["phase"] == phase:
                point = (int(row["step"]), float(row[column]))
                by_step.setdefault(point[0], []).append(point[1])
                members.setdefault(row["member"], []).append(point)
        for points in members.values():
            axes.plot(*zip(*points, strict=True), color="tab:blue", alpha=0.35, linewidth=1.0)
        steps = sorted(by_step)
        axes.plot(steps, [np.mean(by_step[step]) for step in steps], color="tab:blue", linewidth=2.0, label="mean")
        finish_curves(axes, phase, scored, dataset_level, f"{title} ({phase})")
    figure.savefig(path, dpi=120)


def finish_curves(axes: Any, phase: str, scored: bool, dataset_level: float | None, title: str) -> None:
    """Labels, legend, and the dataset's level as a dashed line, on the axes of a phase's learning curves."""
    if dataset_level is not None:
        axes.axhline(dataset_level, color="tab:gray", linestyle="--", linewidth=1.0, label="average of the dataset")
    axes.set_xlabel("gradient updates" if phase == "offline" else "environment steps")
    axes.set_ylabel("normalised score" if scored else "return")
    axes.set_title(title, fontsize=10)
    legend_below(axes)
    axes.grid(alpha=0.2)


def legend_below(axes: Any) -> None:
    """A legend under the axes, where long names have room."""
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.15))


class Sweep(NamedTuple):
    """What a panel of `grid.png` shows of one swept hyperparameter."""

    points: dict[int, list[tuple[float, float]]]
    """By seed, the value and the figure of every member that has one."""
    line: list[tuple[float, float]]
    """Each value in order and the interquartile mean over all members that have it."""
    diverged: list[float]
    """The value of each member that diverged."""
    log_scale: bool
    """Whether the values are positive and span more than a factor of 10."""


def sweeps_of(members: Sequence[dict[str, Any]], column: str) -> dict[str, Sweep]:
    """The panels of `grid.png` by hyperparameter, from the `column` of the members' entries in final.json."""
    panels = {}
    for name in members[0]["swept"]:
        points: dict[int, list[tuple[float, float]]] = {}
        by_value: dict[float, list[float]] = {}
        diverged = []
        for member in members:
            value, figure = member["swept"][name], member[column]
            if member["diverged"] is not None:
                diverged.append(value)
            elif figure is not None:
                points.setdefault(member["seed"], []).append((value, figure))
                by_value.setdefault(value, []).append(figure)
        line = [(value, interquartile_mean(by_value[value])) for value in sorted(by_value)]
        values = [member["swept"][name] for member in members]
        panels[name] = Sweep(points, line, diverged, min(values) > 0 and max(values) > 10 * min(values))
    return panels


def plot_grid(path: Path, members: Sequence[dict[str, Any]], title: str) -> None:
    """The last score (raw return where there is none) against each swept hyperparameter, over all others.

    A point for each member, coloured by its seed; a line through the interquartile means; crosses at the bottom for
    members that diverged.
    """
    from matplotlib.figure import Figure

    scored = any(member["score_mean"] is not None for member in members)
    panels = sweeps_of(members, "score_mean" if scored else "return_mean")
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.0 * columns, 0.4 + 3.4 * rows), layout="constrained")
    seeds = sorted({member["seed"] for member in members})
    for i, (name, panel) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, i + 1)
        for seed, points in panel.points.items():
            axes.plot(*zip(*points, strict=True), "o", color=f"C{1 + seeds.index(seed) % 9}", markersize=4, alpha=0.6)
        if panel.line:
            axes.plot(*zip(*panel.line, strict=True), "-o", color="C0", label="interquartile mean")
        if panel.diverged:
            bottom = axes.get_xaxis_transform()  # x in data, y as a share of the axes' height
            at = [0.03] * len(panel.diverged)
            axes.plot(panel.diverged, at, "x", color="black", transform=bottom, label="diverged")
        if panel.log_scale:
            axes.set_xscale("log")
        axes.set_xlabel(name)
        axes.set_ylabel("normalised score" if scored else "return")
        axes.grid(alpha=0.2)
        axes.legend(frameon=False, fontsize=8)
    figure.suptitle(f"{title}: last policies, coloured by seed", fontsize=10)
    figure.savefig(path, dpi=120)
