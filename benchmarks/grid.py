"""What a sweep found: its settings from best to worst, and the figure of the last score against each hyperparameter."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.intervals import interquartile_mean
from benchmarks.tables import aligned
from common.report import aggregate


def figure_of(members: Sequence[dict[str, Any]]) -> str:
    """`score`, or `return` where no member has a score."""
    return "score" if any(member["score_mean"] is not None for member in members) else "return"


def ranking(members: Sequence[dict[str, Any]]) -> str:
    """A table of the settings of `members` (entries of final.json), best first.

    Interquartile mean of the last score, or return, over the seeds that did not diverge, and its 95 % interval.
    """
    name = figure_of(members)
    groups: dict[tuple[tuple[str, float], ...], list[dict[str, Any]]] = {}
    for member in members:
        groups.setdefault(tuple(member["swept"].items()), []).append(member)
    rows = []
    for swept, group in groups.items():
        found = aggregate([member[f"{name}_mean"] for member in group])
        setting = " ".join(f"{key}={value:g}" for key, value in swept)
        diverged = sum(member["diverged"] is not None for member in group)
        rows.append([setting, found["iqm"], found["ci_low"], found["ci_high"], found["count"], diverged])
    rows.sort(key=lambda row: (row[1] is None, -(row[1] or 0.0)))
    return aligned(["setting", name, "from", "to", "seeds", "diverged"], rows)


class Sweep(NamedTuple):
    """What a panel of the figure shows of one swept hyperparameter."""

    points: dict[int, list[tuple[float, float]]]
    """By seed, the value and the score of every member that has one."""
    line: list[tuple[float, float]]
    """Each value in order and the interquartile mean over all members that have it."""
    diverged: list[float]
    """The value of each member that diverged."""
    log_scale: bool
    """Whether the values are positive and span more than a factor of 10."""


def sweeps_of(members: Sequence[dict[str, Any]], column: str) -> dict[str, Sweep]:
    """The figure's panels by hyperparameter, from the `column` of the members' entries in final.json."""
    panels = {}
    for name in members[0]["swept"]:
        points: dict[int, list[tuple[float, float]]] = {}
        by_value: dict[float, list[float]] = {}
        for member in members:
            value, figure = member["swept"][name], member[column]
            if figure is not None:
                points.setdefault(member["seed"], []).append((value, figure))
                by_value.setdefault(value, []).append(figure)
        line = [(value, interquartile_mean(by_value[value])) for value in sorted(by_value)]
        values = [member["swept"][name] for member in members]
        diverged = [member["swept"][name] for member in members if member["diverged"] is not None]
        panels[name] = Sweep(points, line, diverged, min(values) > 0 and max(values) > 10 * min(values))
    return panels


def plot(path: Path, members: Sequence[dict[str, Any]], title: str) -> None:
    """The last score (raw return where there is none) against each swept hyperparameter, over all others.

    A point for each member, coloured by its seed; a line through the interquartile means; crosses at the bottom for
    members that diverged.
    """
    from matplotlib.figure import Figure

    name = figure_of(members)
    panels = sweeps_of(members, f"{name}_mean")
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.0 * columns, 0.4 + 3.4 * rows), layout="constrained")
    seeds = sorted({member["seed"] for member in members})
    for i, (swept, panel) in enumerate(panels.items()):
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
        axes.set_xlabel(swept)
        axes.set_ylabel("normalised score" if name == "score" else "return")
        axes.grid(alpha=0.2)
        axes.legend(frameon=False, fontsize=8)
    figure.suptitle(f"{title}: last policies, coloured by seed", fontsize=10)
    figure.savefig(path, dpi=120)
