"""The learning curves of a run: scores above, losses beneath, the offline and the online phase side by side.

A run draws them at its end, into `curves.png`, and `python -m benchmarks.report RUN_DIR` again. Without a grid each
seed has a thin line, and where there are several their interquartile mean a bold one; of a grid each setting has one
line, the interquartile mean of its seeds.
"""

import json
import math
import sys
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.families import domain_of
from benchmarks.intervals import aggregate, interquartile_mean, rank
from benchmarks.tables import Table
from common.cli import one_line
from common.report import write_atomically

PHASES = {"offline": "gradient updates", "online": "environment steps"}
TABLES = ("evaluations.csv", "metrics.csv")
SHOWN = 12
"""Settings of a grid that have a colour and a place in the legend, the best ones; the others are grey."""
FEW = 40
"""Points up to which each is marked."""

Curves = dict[str, dict[int, float]]
"""By member, the value at each step."""


def line_style(number: int) -> dict[str, Any]:
    """Colour and dashes by which the line of this number differs from the nineteen before it."""
    return {"color": f"C{number % 10}", "linestyle": "-" if number % 20 < 10 else "--"}


def number(text: str | None) -> float:
    """The number of a cell; NaN where it has none."""
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan


def curves_of(rows: Iterable[dict[str, str]], column: str, start: int = 0) -> Curves:
    """What the rows have in `column`, finite values only, against their steps after `start`."""
    curves: Curves = {}
    for row in rows:
        value = number(row.get(column))
        if math.isfinite(value):
            curves.setdefault(row["member"], {})[int(row["step"]) - start] = value
    return curves


def to_the_end(curves: Curves, lost: Iterable[str]) -> list[dict[int, float]]:
    """The curves of the members that did not diverge, without those that end early."""
    left = [curve for member, curve in curves.items() if member not in lost]
    return [curve for curve in left if max(curve) == max(map(max, left))]


def last_values(curves: Curves, lost: Iterable[str]) -> list[float]:
    """The last value of each curve that `to_the_end` leaves."""
    return [curve[max(curve)] for curve in to_the_end(curves, lost)]


def lost_by(phase: str, members: Sequence[dict[str, Any]], length: tuple[int, int]) -> set[str]:
    """Of the members' entries in final.json, those that had diverged by the phase's end, by their names in tables.

    `length` is that of the run, in offline updates and environment steps.
    """
    steps = {str(m["member"]): m["diverged"].get("step") or 0 for m in members if m.get("diverged")}
    return {member for member, step in steps.items() if phase == "online" or not length[1] or step < length[0]}


def describe(curves: Curves, lost: Collection[str]) -> str:
    """The last value, its 95 % interval over the seeds, and how many diverged: all `lost`, with a curve or without."""
    found, diverged = aggregate(last_values(curves, lost)), len(lost)
    if found["iqm"] is None:
        return f"{diverged} diverged"
    interval = "" if found["ci_low"] is None else f" [{found['ci_low']:.1f}, {found['ci_high']:.1f}]"
    return f"{found['iqm']:.1f}{interval}" + (f", {diverged} diverged" if diverged else "")


def plot(axes: Any, curves: Curves, lost: Iterable[str], each: bool = True, **style: Any) -> None:
    """The interquartile mean as a line, each member's own thin beneath it, and a cross where one diverged.

    Where all diverged there is no mean, and each has its own line in any case.
    """
    from matplotlib.ticker import EngFormatter

    whole = to_the_end(curves, lost)
    steps = sorted(set.intersection(*map(set, whole))) if whole else []
    most = max(map(len, curves.values()))
    style = {"color": "C0", "linewidth": 2.0, "markersize": 5.0} | style | ({"markersize": 4.0} if most == 1 else {})
    marker = "o" if most <= FEW else ""
    if (each and len(curves) > 1) or not whole:
        for curve in curves.values():
            at = sorted(curve)
            thin = {"color": style["color"], "alpha": 0.4, "linewidth": 0.8, "markersize": 0.6 * style["markersize"]}
            axes.plot(at, [curve[step] for step in at], marker=marker, **thin)
    means = interquartile_mean([[curve[step] for step in steps] for curve in whole], axis=0) if steps else []
    axes.plot(steps, means, marker=marker, **style)
    for member in curves.keys() & set(lost):
        end = max(curves[member])
        axes.plot(end, curves[member][end], "x", color=style["color"], markersize=8)
    value = next(iter(next(iter(curves.values())).values()))
    axes.update_datalim([(0, value), (1, value)])  # so that a lone evaluation does not stand among fractions of a step
    axes.autoscale_view()
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def read_json(path: Path) -> dict[str, Any]:
    """The record at `path`; empty where there is none, or a damaged one."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def score_name(configs: Sequence[dict[str, Any]]) -> str:
    """What the score is of runs with these config.json: on OGBench's tasks it is no normalised return."""
    return "success rate" if all(domain_of(c.get("environment")) == "success" for c in configs) else "normalised score"


def uses_data(config: dict[str, Any]) -> bool:
    """Whether the run trained on its dataset: without offline updates only SAC with prior data does."""
    return bool(config.get("flags", {}).get("num_updates", 1)) or config.get("algorithm") == "sac_prior"


def trained_on(config: dict[str, Any]) -> str:
    """The dataset, or where no data were used the environment; empty where the record says neither."""
    return config.get("flags", {}).get("dataset", "") if uses_data(config) else config.get("environment", "")


def settings_of(config: dict[str, Any]) -> dict[str, str]:
    """By member, its setting of the grid in words."""
    members = config.get("members", [])
    return {str(m["member"]): " ".join(f"{k}={v:g}" for k, v in m.get("swept", {}).items()) for m in members}


def figure_of(run_dir: Path) -> Any:
    """The figure of what the tables have; None where they have nothing."""
    from matplotlib.figure import Figure

    config, final = read_json(run_dir / "config.json"), read_json(run_dir / "final.json")
    evaluations, metrics = (
        [row for row in Table(run_dir / name).read() if None not in row.values()] for name in TABLES
    )
    scored = all(row.get("score_mean") for row in evaluations)
    name, flags = "score" if scored else "return", config.get("flags", {})
    updates = int(final.get("updates", flags.get("num_updates", 0)))  # the tables of metrics count on from here
    length = updates, final.get("online_steps", 0)
    lost = {phase: lost_by(phase, final.get("members", []), length) for phase in PHASES}

    panels: dict[tuple[str, str], Curves] = {}  # by row and phase
    for phase in PHASES:
        rows = [row for row in evaluations if row["phase"] == phase]
        panels[name, phase] = curves_of(rows, f"{name}_mean")
        rows = [row for row in metrics if (int(row["step"]) > updates) == (phase == "online")]
        for column in metrics[0] if metrics else ():
            if column.endswith("/loss"):
                panels[column, phase] = curves_of(rows, column, updates if phase == "online" else 0)
    panels = {place: curves for place, curves in panels.items() if curves}
    names = sorted(dict.fromkeys(row for row, _ in panels), key=lambda row: row != name)  # the score above
    phases = [phase for phase in PHASES if any(place[1] == phase for place in panels)]
    if not panels:
        return None

    setting_of = settings_of(config)
    groups: dict[str, list[str]] = {}
    for member in dict.fromkeys([*(one for curves in panels.values() for one in curves), *sorted(lost["online"])]):
        groups.setdefault(setting_of.get(member, ""), []).append(member)
    grid = len(groups) > 1

    def within(curves: Curves, setting: str) -> Curves:
        return {member: curves[member] for member in groups[setting] if member in curves}

    if last := panels.get((name, phases[-1])):
        out = lost[phases[-1]]
        whole = [setting for setting, members in groups.items() if set(members) - out and within(last, setting)]
        ranks = {x: rank([*last_values(within(last, x), out), *[None] * len(out & {*groups[x]})]) for x in whole}
        groups = dict(sorted(groups.items(), key=lambda group: ranks.get(group[0], (math.inf, math.inf))))

    width, heights = (8.5 if grid else 6.0), [2.2 if row == name else 1.0 for row in names]
    figure = Figure(figsize=(width * len(phases), 0.8 + 1.7 * sum(heights)), layout="constrained")
    options = {"sharex": "col", "squeeze": False, "gridspec_kw": {"height_ratios": heights}}
    all_axes = figure.subplots(len(names), len(phases), **options)
    level = data_level(config, scored)
    for (row, phase), curves in panels.items():
        axes, out = all_axes[names.index(row), phases.index(phase)], lost[phase]
        for place, setting in reversed(list(enumerate(groups))):  # the best one on top
            if not (mine := within(curves, setting)):
                continue
            style = line_style(place)
            style |= {"linewidth": 1.5, "markersize": 3.5} if grid else {}
            style |= {} if row == name else {"linewidth": 0.8 if grid else 1.5, "markersize": 0.0}
            if place >= SHOWN:
                style = {"color": "lightgray", "linewidth": 0.8, "markersize": 2.0}
            elif row == name:
                what = setting if grid else f"seed {who(config, next(iter(mine)))}"
                if not grid and len(mine) > 1:
                    seeds = len(to_the_end(mine, out))
                    what = f"mean of {seeds}" if seeds < 4 else f"interquartile mean of {seeds}"
                said = describe(mine, out.intersection(groups[setting]))
                style["label"] = f"{setting or 'all'}: {said}" if set(mine) <= out else f"{what}: last {said}"
            plot(axes, mine, out, each=not grid, **style)
        finish(axes, row, curves)
        if row == name:
            axes.set_ylabel(score_name([config]) if scored else "return")
            axes.set_title(phase, fontsize=10)
            if level is not None:
                axes.axhline(level, color="tab:gray", linestyle="--", linewidth=1, label=f"data's average: {level:.1f}")
            legend(axes, len(groups) - SHOWN, grid)
    scores = [all_axes[names.index(name), phases.index(phase)] for row, phase in panels if row == name]
    for axes in scores:  # of both phases alike
        axes.set_ylim(min(other.get_ylim()[0] for other in scores), max(other.get_ylim()[1] for other in scores))
    for place, phase in enumerate(phases):
        for row in names:
            all_axes[names.index(row), place].set_visible((row, phase) in panels)
        drawn = [row for row in names if (row, phase) in panels]
        all_axes[names.index(drawn[-1]), place].set_xlabel(PHASES[phase])
        all_axes[names.index(drawn[-1]), place].tick_params(labelbottom=True)
    title = f"{config.get('algorithm', run_dir.name)}, {trained_on(config)}".rstrip(", ")
    several = "" if all(len(group) == 1 for group in groups.values()) else ", interquartile means over their seeds"
    figure.suptitle(title + (f"; {len(groups)} settings{several}" if grid else ""), fontsize=11)
    return figure


def data_level(config: dict[str, Any], scored: bool) -> float | None:
    """The average score or return of the dataset's own episodes; None where it was not trained on."""
    return config.get("dataset_returns", {}).get("score_mean" if scored else "mean") if uses_data(config) else None


def who(config: dict[str, Any], member: str) -> str:
    """The member's seed, or its number where the seed is not known."""
    return str(
        next((m["seed"] for m in config.get("members", []) if str(m["member"]) == member and "seed" in m), member)
    )


def finish(axes: Any, row: str, curves: Curves) -> None:
    """Scale, label and grid of a panel."""
    values = [value for curve in curves.values() for value in curve.values()]
    if row.endswith("/loss") and min(values) > 0 and max(values) > 100 * min(values):
        axes.set_yscale("log")
    axes.set_ylabel(row, fontsize=9)
    axes.grid(alpha=0.2)


def legend(axes: Any, hidden: int, grid: bool) -> None:
    """The best first, then the data; of a grid beside the panel, where twelve settings have room."""
    handles, labels = axes.get_legend_handles_labels()
    data = [place for place, label in enumerate(labels) if label.startswith("data's average")]
    order = [place for place in reversed(range(len(labels))) if place not in data] + data
    where = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0), "borderaxespad": 0.0} if grid else {}
    title = f"{hidden} more in grey" if grid and hidden > 0 else None
    options = {"frameon": False, "fontsize": 8, "title": title, "title_fontsize": 8}
    axes.legend([handles[i] for i in order], [labels[i] for i in order], **options, **where)


def draw(run_dir: Path) -> None:
    """Write `curves.png` of what the tables in `run_dir` have; a figure that fails is a line on stderr, no error."""
    try:
        if figure := figure_of(run_dir):
            write_atomically(run_dir / "curves.png", lambda file: figure.savefig(file, dpi=120))
    except Exception as error:  # a run that has trained for days must not end with the error of its figure
        print(f"no curves.png: {one_line(error)}", file=sys.stderr)
