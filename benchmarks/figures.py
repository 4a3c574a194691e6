"""The figures of a suite. A run that is shorter than others has its own panel, a red title, or a hollow mark."""

import itertools
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cells import Cell, length_in_words, summary, unique
from benchmarks.curves import PHASES, data_level, describe, lost_by, plot, score_name, uses_data
from benchmarks.intervals import expected_best, performance_profile

COLUMNS = 3
SHORTER = "tab:red"

Strata = Sequence[Sequence[float]]


def new_figure(width: float, height: float) -> Any:
    """A figure without a window, in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def panels(count: int, columns: int = COLUMNS, height: float = 2.8, **options: Any) -> tuple[Any, list[Any]]:
    """A figure of `count` axes in rows of `columns`; of four, in two rows of two."""
    columns = 2 if count == 4 else min(columns, count)
    rows = -(-count // columns)
    figure = new_figure(max(6.0, 4.0 * columns), 0.5 + height * rows)
    axes = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
    for empty in axes[count:]:
        empty.set_visible(False)
    return figure, axes[:count]


def short(name: str, width: int = 34) -> str:
    """The name in lines of that width, broken at blanks."""
    return textwrap.fill(name, width, break_on_hyphens=False)


def colors_of(cells: Sequence[Cell]) -> dict[str, str]:
    """A colour for each algorithm of a page, by which its figures agree; from the eleventh on they come again."""
    return {name: f"C{i % 10}" for i, name in enumerate(sorted({cell.algorithm for cell in cells}))}


def data_line(line: Any, average: float | None, label: str = "data's average") -> None:
    """The dataset's own average, by `axhline` or `axvline`."""
    if average is not None:
        line(average, color="tab:gray", linestyle="--", linewidth=1.0, label=label)


def plot_scores(path: Path, cells: Sequence[Cell], colors: dict[str, str]) -> None:
    """Final scores by length and dataset: interquartile mean, interval, a dot for each seed, the data's average."""
    lengths = sorted({cell.length for cell in cells}, key=sum, reverse=True)
    datasets = unique([cell.dataset for cell in cells])
    columns = min(COLUMNS, len(datasets))
    rows: list[list[list[Cell]]] = []  # of panels, each of cells of one length and dataset
    for length in lengths:
        found = [[cell for cell in cells if (cell.dataset, cell.length) == (name, length)] for name in datasets]
        if len(datasets) > columns:  # where all fit, each dataset has a column of its own
            found = [panel for panel in found if panel]
        rows += [found[i : i + columns] for i in range(0, len(found), columns)]
    names = [sorted({cell.algorithm for panel in row for cell in panel}) for row in rows]
    lines = [max(short(name, 30).count("\n") + 1 for name in row) for row in names]
    heights = [0.9 + len(row) * max(0.32, 0.16 * most) for row, most in zip(names, lines, strict=True)]
    figure = new_figure(2.5 + 3.2 * columns, sum(heights) + 0.3)
    options = {"gridspec_kw": {"height_ratios": heights}, "squeeze": False, "sharex": True}
    for row, algorithms, all_axes in zip(rows, names, figure.subplots(len(rows), columns, **options), strict=True):
        labels = [short(name, 30) for name in algorithms]
        for panel, axes in itertools.zip_longest(row, all_axes):
            axes.set_visible(bool(panel))
            if not panel:
                continue
            for cell in panel:
                plot_seeds(axes, cell, algorithms.index(cell.algorithm), colors[cell.algorithm])
            data_line(axes.axvline, data_level(panel[0].config, True))
            title = axes.set_title(f"{panel[0].dataset}\nafter {length_in_words(panel[0].length)}", fontsize=8)
            title.set_color(SHORTER if panel[0].length != lengths[0] else "black")
            axes.set_yticks(range(len(algorithms)), labels, fontsize=8)
            labels = [""] * len(algorithms)  # but for the first one of the row
            axes.set_ylim(len(algorithms) - 0.4, -0.6)
            axes.tick_params(labelbottom=True, labelsize=8)
            axes.grid(axis="x", alpha=0.2)
    notes = ["bar: 95 % interval"] * any(len(cell.values("score_mean")) > 1 for cell in cells)
    notes += ["dashed: the data's average"] * any(data_level(cell.config, True) is not None for cell in cells)
    notes += ["red: shorter than the others"] * (len(lengths) > 1)
    name = score_name([cell.config for cell in cells])
    figure.supxlabel("; ".join([name, *notes]), fontsize=9)
    figure.savefig(path, dpi=120)


def plot_seeds(axes: Any, cell: Cell, y: int, color: str) -> None:
    """A row of a panel: the seeds as dots, their interquartile mean and its interval, and how many diverged."""
    scores = cell.values("score_mean")
    if value := summary([scores]):
        axes.hlines(y, value["low"], value["high"], color=color, linewidth=2.0)
        axes.plot(value["iqm"], y, "|", color=color, markersize=14, markeredgewidth=2.5)
        axes.plot(scores, [y] * len(scores), "o", color=color, markersize=3, alpha=0.6)
    if cell.lost:
        where = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "bottom"}
        axes.text(0.98, y, f"{len(cell.lost)} diverged", fontsize=7, color=color, **where)


def plot_curves(path: Path, cells: Sequence[Cell], colors: dict[str, str]) -> None:
    """One dataset, a panel for each algorithm and phase: the seeds, thin, and their interquartile mean.

    Returns instead of scores where there is no dataset: in the unit of most learning curves from scratch.
    """
    rows = [row for cell in cells for row in cell.evaluations]
    scored = uses_data(cells[0].config) and all(row["score_mean"] for row in rows)
    column = "score_mean" if scored else "return_mean"
    phases = [phase for phase in PHASES if any(row["phase"] == phase for row in rows)]
    longest = {phase: max(cell.length[i] for cell in cells) for i, phase in enumerate(PHASES)}
    places = [(cell, phase) for cell in sorted(cells, key=lambda cell: -sum(cell.length)) for phase in phases]
    figure, all_axes = panels(len(places), COLUMNS if len(phases) == 1 else 2, sharey=True)
    shorter = False
    for axes, (cell, phase) in zip(all_axes, places, strict=True):
        curves, total = cell.curves(phase, column), cell.length[list(PHASES).index(phase)]
        axes.set_visible(bool(curves))
        if not curves:
            continue
        end = max(map(max, curves.values()))
        steps = f"{end:,} of {total:,}" if end < total else f"{end:,}"
        lost = lost_by(phase, cell.members, cell.length)
        last = f"{steps} {PHASES[phase]}: {describe(curves, lost)}"
        title = axes.set_title(f"{short(cell.algorithm)}\n{last}", fontsize=8)
        if total < longest[phase]:
            title.set_color(SHORTER)
            shorter = True
        plot(axes, curves, lost, color=colors[cell.algorithm], markersize=4.0)
        axes.set_xlim(-0.04 * longest[phase] - 0.5, 1.04 * longest[phase] + 0.5)
        data_line(axes.axhline, data_level(cell.config, scored))
        axes.tick_params(labelsize=8, labelleft=True)
        axes.grid(alpha=0.2)
    notes = ["dashed: the data's average"] * (data_level(cells[0].config, scored) is not None)
    notes += ["red: shorter than the others"] * shorter
    figure.suptitle("; ".join([cells[0].dataset, *notes]), fontsize=10)
    figure.supylabel(score_name([cell.config for cell in cells]) if scored else "return", fontsize=9)
    figure.savefig(path, dpi=120)


def plot_profiles(path: Path, strata: dict[str, Strata], colors: dict[str, str], name_of_score: str) -> None:
    """Share of runs above each score, a panel for each algorithm with the others in grey."""
    scores = [x for tasks in strata.values() for values in tasks for x in values]
    thresholds = np.linspace(min(0.0, *scores), max(scores), 201)
    profiles = {name: performance_profile(tasks, thresholds) for name, tasks in strata.items()}
    figure, all_axes = panels(len(strata), height=2.4, sharex=True, sharey=True)
    for axes, name in zip(all_axes, profiles, strict=True):
        for other in profiles.values():
            axes.step(thresholds, other[0], color="lightgray", linewidth=0.8)
        share, low, high = profiles[name]
        axes.fill_between(thresholds, low, high, color=colors[name], alpha=0.2, linewidth=0, step="pre")
        axes.step(thresholds, share, color=colors[name], linewidth=2.0)
        axes.set_title(short(name), fontsize=8)
        axes.set_ylim(-0.05, 1.05)
        axes.tick_params(labelbottom=True)
        axes.grid(alpha=0.2)
    tasks = len(next(iter(strata.values())))
    figure.supxlabel(f"{name_of_score}, {tasks} dataset{'s' * (tasks > 1)}; band: 95 % interval", fontsize=9)
    figure.supylabel("share of runs above it", fontsize=9)
    figure.savefig(path, dpi=120)


def draw_expected_best(axes: Any, settings: Strata, color: str, label: str) -> None:
    """The curve of `expected_best`, with a standard deviation on either side."""
    budgets = range(1, len(settings) + 1)
    mean, deviation = expected_best(settings)
    axes.plot(budgets, mean, "o-", color=color, markersize=4, label=label)
    axes.fill_between(budgets, mean - deviation, mean + deviation, color=color, alpha=0.2, linewidth=0)
    axes.set_xlabel("settings tried", fontsize=9)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.2)


def plot_expected_best(path: Path, tuned: dict[str, dict[str, Strata]], cells: Sequence[Cell]) -> None:
    """A panel for each dataset, a line for each algorithm that was tuned there; the data's average and BC across."""
    figure, all_axes = panels(len(tuned), height=3.2)
    for axes, (dataset, algorithms) in zip(all_axes, tuned.items(), strict=True):
        for number, (algorithm, settings) in enumerate(algorithms.items()):
            draw_expected_best(axes, settings, f"C{number}", algorithm)
        here = [cell for cell in cells if cell.dataset == dataset]
        data_line(axes.axhline, data_level(here[0].config, True))
        for cell in here:
            if cell.algorithm == "bc" and (value := summary([cell.values("score_mean")])):
                axes.axhline(value["iqm"], color="black", linestyle=":", linewidth=1.2, label="bc")
        axes.set_title(dataset, fontsize=9)
        axes.legend(frameon=False, fontsize=8)
    figure.supylabel("expected score of the best", fontsize=9)
    figure.savefig(path, dpi=120)


def plot_against(path: Path, lines: dict[str, dict[float, Cell]], name: str) -> None:
    """Final score at each value of `name`: interquartile mean, interval as a bar, the dataset's average dashed.

    Neighbours of one length are joined.
    """
    values = sorted({value for line in lines.values() for value in line})
    lengths = [cell.length for line in lines.values() for cell in line.values()]
    figure, all_axes = panels(len(lines), height=3.2, sharey=True)
    for number, (axes, (label, line)) in enumerate(zip(all_axes, lines.items(), strict=True)):
        found = {value: summary([cell.values("score_mean")]) for value, cell in line.items()}
        at = {values.index(value): one for value, one in found.items() if one is not None}
        color, cells = f"C{number % 10}", {values.index(value): cell for value, cell in line.items()}
        for one, other in itertools.pairwise(at):
            if cells[one].length == cells[other].length:  # others are no curve
                axes.plot([one, other], [at[one]["iqm"], at[other]["iqm"]], "-", color=color)
        for place, one in at.items():
            hollow = "none" if cells[place].length != max(lengths, key=sum) else color
            axes.vlines(place, one["low"], one["high"], color=color, alpha=0.4, linewidth=3.0)
            axes.plot(place, one["iqm"], "o", color=color, markerfacecolor=hollow)
        for place, cell in cells.items():
            if cell.lost:
                where = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "bottom"}
                axes.text(place, 0.01, f"{len(cell.lost)} diverged", fontsize=7, color=color, **where)
        data_line(axes.axhline, data_level(next(iter(line.values())).config, True))
        axes.set_xticks(range(len(values)), [f"{value:g}" for value in values])
        axes.set_xlim(-0.3, len(values) - 0.7)
        axes.set_title(short(label), fontsize=8)
        axes.set_xlabel(name, fontsize=9)
        axes.grid(alpha=0.2)
    hollow = "; hollow: a shorter run" if len(set(lengths)) > 1 else ""
    figure.suptitle(f"Final score, bar: 95 % interval over the seeds; dashed: the data's average{hollow}", fontsize=10)
    figure.supylabel("score", fontsize=9)
    figure.savefig(path, dpi=120)
