"""What a sweep found: its settings from best to worst, what tuning gains, and the figure `grid.png`.

`python -m benchmarks.report RUN_DIR` prints the one and draws the other.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.figures import data_line, draw_expected_best, panels
from benchmarks.intervals import aggregate, by_setting, expected_best, interquartile_mean, ranked, summarise
from benchmarks.tables import aligned
from common.report import write_atomically


def unit_of(members: Sequence[dict[str, Any]]) -> str:
    """`score`, or `return` where no member has a score."""
    return "score" if any(member["score_mean"] is not None for member in members) else "return"


def ranking(members: Sequence[dict[str, Any]]) -> str:
    """A table of the settings of `members` (entries of final.json), best first by `rank`.

    Interquartile mean of the last score, or return, over the seeds that did not diverge, and its 95 % interval.
    """
    name = unit_of(members)
    rows = []
    for group in ranked(members, name):
        found = aggregate([member[f"{name}_mean"] for member in group])
        setting = " ".join(f"{key}={value:g}" for key, value in group[0]["swept"].items())
        diverged = sum(member["diverged"] is not None for member in group)
        rows.append([setting, found["iqm"], found["ci_low"], found["ci_high"], found["count"], diverged])
    return aligned(["setting", name, "from", "to", "seeds", "diverged"], rows)


def with_worst(members: Sequence[dict[str, Any]]) -> list[list[float]]:
    """The last figures of each setting's seeds; a seed without one, as it diverged, has the lowest; [] if none has."""
    column = f"{unit_of(members)}_mean"
    if not (found := [member[column] for member in members if member[column] is not None]):
        return []
    worst, groups = min(found), by_setting(members).values()
    return [[worst if member[column] is None else member[column] for member in group] for group in groups]


def tuning(members: Sequence[dict[str, Any]]) -> str:
    """A table of the expected best of k settings (Expected Online Performance), for k = 1, 2, 4, ... and all."""
    if not (groups := with_worst(members)):
        return "every member diverged: there is no best setting"
    mean, deviation = expected_best(groups)
    budgets = [k for k in range(1, len(mean) + 1) if k == len(mean) or k & (k - 1) == 0]
    rows = [[k, float(mean[k - 1]), float(deviation[k - 1])] for k in budgets]
    return aligned(["settings tried", f"expected {unit_of(members)} of the best", "deviation"], rows)


def table(final: dict[str, Any], level: float | None) -> str:
    """The last evaluation in text: members, or a grid's settings from best to worst, and the data's own `level`."""
    members, figure = final["members"], unit_of(final["members"])
    whole = (final if "aggregate" in final else summarise(members))["aggregate"][figure]
    rows = [[f"seed {m['seed']}", m[f"{figure}_mean"], None, None] for m in members]
    rows += [["interquartile mean", whole["iqm"], whole["ci_low"], whole["ci_high"]]] if len(members) > 1 else []
    heads = ["", f"final {figure}", "from", "to"]
    text = ranking(members) if members[0]["swept"] else aligned(heads, rows)
    return text if level is None else f"{text}\nthe data's own episodes: {level:.1f}"


class Sweep(NamedTuple):
    """What a panel of the figure shows of one swept hyperparameter."""

    points: dict[int, list[tuple[float, float]]]  # By seed, the value and the score of every member that has one.
    line: list[tuple[float, float]]  # Each value in order and the interquartile mean over all members that have it.
    diverged: list[float]  # The value of each member that diverged.
    log_scale: bool  # Whether the values are positive and span more than a factor of 10.


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


def interactions(members: Sequence[dict[str, Any]], column: str) -> tuple[list[float], list[float], np.ndarray]:
    """Of two swept hyperparameters the values, and `[second, first]` the interquartile means or NaN."""
    first, second = (sorted({member["swept"][name] for member in members}) for name in members[0]["swept"])
    means = np.full((len(second), len(first)), np.nan)
    for swept, group in by_setting(members).items():
        if found := [member[column] for member in group if member[column] is not None]:
            means[second.index(swept[1][1]), first.index(swept[0][1])] = interquartile_mean(found)
    return first, second, means


def plot(path: Path, members: Sequence[dict[str, Any]], title: str, level: float | None = None) -> None:
    """The last score (raw return where there is none) against each swept hyperparameter, over all others.

    A point for each member, coloured by its seed; a line through the interquartile means; crosses at the bottom for
    members that diverged; dashed the `level` of the data. Then the settings of two hyperparameters as a map, and the
    expected best of k settings.
    """
    name = unit_of(members)
    sweeps, settings = sweeps_of(members, f"{name}_mean"), with_worst(members)
    map_too = len(sweeps) == 2 and min(map(len, interactions(members, f"{name}_mean")[:2])) > 1
    figure, all_axes = panels(len(sweeps) + map_too + (len(settings) > 1), height=3.4)
    for (swept, panel), axes in zip(sweeps.items(), all_axes, strict=False):
        plot_sweep(axes, panel, sorted({member["seed"] for member in members}))
        data_line(axes.axhline, level)
        axes.set_xlabel(swept)
        axes.set_ylabel(name)
        axes.legend(frameon=False, fontsize=8)
    if map_too:
        plot_map(all_axes[2], *interactions(members, f"{name}_mean"))
        for label, swept in zip((all_axes[2].set_xlabel, all_axes[2].set_ylabel), sweeps, strict=True):
            label(swept)
        all_axes[2].set_title("interquartile means", fontsize=9)
    if len(settings) > 1:
        draw_expected_best(all_axes[-1], settings, "C0", "expected best, diverged at the worst")
        data_line(all_axes[-1].axhline, level)
        all_axes[-1].legend(frameon=False, fontsize=8)
    figure.suptitle(f"{title}: last policies, coloured by seed", fontsize=10)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))


def plot_sweep(axes: Any, panel: Sweep, seeds: Sequence[int]) -> None:
    """The members and the line of one hyperparameter."""
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
    axes.grid(alpha=0.2)


def plot_map(axes: Any, first: Sequence[float], second: Sequence[float], means: np.ndarray) -> None:
    """A square for each setting, with its number; a cross where every seed diverged or none was trained."""
    axes.imshow(means, origin="lower", aspect="auto", cmap="viridis")
    middle = np.nanmean([np.nanmin(means), np.nanmax(means)]) if np.isfinite(means).any() else 0.0
    for (y, x), value in np.ndenumerate(means):
        color = "white" if value < middle else "black"
        text = f"{value:.1f}" if abs(value) < 1000 else f"{value:.0f}"
        axes.text(x, y, text if np.isfinite(value) else "x", color=color, ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(first)), [f"{value:g}" for value in first])
    axes.set_yticks(range(len(second)), [f"{value:g}" for value in second])
