"""Tables and figures: of a run's parts and of its sweep, and of the results that `benchmarks/suite.py` kept.

    python -m benchmarks.report runs/mine            # the directory of a run, or several
    python -m benchmarks.report results/locomotion   # the folder of a suite

Of a run that several processes trained with --shard I/N it merges the parts that are there (`benchmarks/merge.py`),
and says which are missing. Of a run with --grid it ranks the settings and draws `grid.png` (`benchmarks/grid.py`).

Of a suite it reads `config.json`, `final.json`, `evaluations.csv` and `command.json` in each folder below, and writes
into its own `README.md`, `scores.csv` (a row for each seed), `scores.png` and, for each dataset, `curves_*.png`.
`--against num_proposals` adds a table and a figure of the score against that setting, in which the runs differ.
Text of your own in the folder's `notes.md` goes under the table of scores.

Scores are those of the last policy, never of the best one. A number over seeds is their interquartile mean with a 95 %
stratified bootstrap interval (Agarwal et al., 2021): the strata are the datasets, seeds are drawn within each.
"""

import csv
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmarks import grid, merge
from benchmarks.intervals import bootstrap_interval, interquartile_mean
from benchmarks.tables import Table
from common.cli import UsageError, exit_status
from common.report import table as table_of_run

FILES = ("config.json", "final.json", "evaluations.csv", "command.json")
NOT_SETTINGS = {"run_dir", "resume", "quiet", "seed", "num_seeds", "grid", "dataset", "preset", "track", "shard"}
NOT_SETTINGS |= {
    "behavior_checkpoint",
    "num_updates",
    "online_steps",
    "eval_every",
    "eval_episodes",
    "final_eval_episodes",
    "checkpoint_every",
}
"""Flags that make no other method of a run: what it is called, how long it is and how often one looks."""


@dataclass(frozen=True)
class Args:
    """Tables and figures of runs, and of the results that benchmarks/suite.py kept."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER...")]
    """Directories of runs, e.g. runs/mine, or folders of suites, e.g. results/locomotion."""
    against: str = ""
    """Of a suite: a setting in which the runs differ; adds a table and a figure of the score against it."""


@dataclass(frozen=True)
class Cell:
    """The members of one run that share algorithm, dataset and settings; they differ by their seeds.

    `algorithm` has the settings in which the run differs from the folder's plainest one of the algorithm on the
    dataset, and what was swept; `dataset` is the environment where the dataset was not trained on.
    """

    algorithm: str
    run: str
    """The same without what was swept."""
    dataset: str
    members: list[dict[str, Any]]
    evaluations: list[dict[str, str]]
    config: dict[str, Any]
    final: dict[str, Any]
    command: str

    def values(self, column: str) -> list[float]:
        """Final `score_mean` or `return_mean` of the members that have one: the diverged have none."""
        return [member[column] for member in self.members if member[column] is not None]


def trained_on(config: dict[str, Any]) -> str:
    """The dataset, or without offline updates the environment."""
    return config["flags"]["dataset"] if config["flags"]["num_updates"] else config["environment"]


def settings_of(config: dict[str, Any], reference: dict[str, Any]) -> str:
    """The flags in which a run differs from another one of the same algorithm on the same dataset."""
    ours, theirs = config["flags"], reference["flags"]
    names = [name for name in ours if name not in NOT_SETTINGS and ours[name] != theirs.get(name)]
    return "".join(
        f" {name}={ours[name]:g}" if isinstance(ours[name], float) else f" {name}={ours[name]}" for name in names
    )


def read(folder: Path) -> list[Cell]:
    """All cells below `folder`, by dataset and algorithm. UsageError where there is none or one is there twice."""
    runs = {}
    for run in sorted(path.parent for path in folder.glob("*/config.json")):
        if missing := [name for name in FILES if not (run / name).exists()]:
            raise UsageError(f"{run} has no {missing[0]}")
        runs[run] = [json.loads((run / f"{name}.json").read_text()) for name in ("config", "final", "command")]
    # Runs of an algorithm on a dataset are compared with the one of the shortest name, that without a --label.
    references: dict[tuple[str, str], dict[str, Any]] = {}
    for run in sorted(runs, key=lambda run: len(run.name)):
        references.setdefault((runs[run][0]["algorithm"], trained_on(runs[run][0])), runs[run][0])
    cells: dict[tuple[str, str], Cell] = {}
    for run, (config, final, command) in runs.items():
        with open(run / "evaluations.csv", newline="") as file:
            evaluations = list(csv.DictReader(file))
        name = config["algorithm"] + settings_of(config, references[config["algorithm"], trained_on(config)])
        groups: dict[str, list[dict[str, Any]]] = {}
        for member in final["members"]:
            swept = "".join(f" {name}={value:g}" for name, value in member["swept"].items())
            groups.setdefault(name + swept, []).append(member)
        for algorithm, members in groups.items():
            key = (trained_on(config), algorithm)
            if key in cells:
                raise UsageError(f"{folder} has {algorithm} on {key[0]} twice")
            indices = {str(member["member"]) for member in members}
            rows = [row for row in evaluations if row["member"] in indices]
            cells[key] = Cell(algorithm, name, key[0], members, rows, config, final, command["command"])
    if not cells:
        raise UsageError(f"{folder} has no results: run benchmarks/suite.py first")
    return [cells[key] for key in sorted(cells)]


def unique(values: Sequence[Any]) -> list[Any]:
    """The values without repetition, in order of first appearance."""
    return list(dict.fromkeys(values))


def summary(strata: Sequence[Sequence[float]]) -> dict[str, float] | None:
    """Interquartile mean over all strata and its interval; None if a stratum is empty."""
    if not strata or not all(len(values) for values in strata):
        return None
    low, high = bootstrap_interval(strata)
    return {"iqm": interquartile_mean([x for values in strata for x in values]), "low": low, "high": high}


def aggregate(cells: Sequence[Cell]) -> tuple[list[str], dict[str, dict[str, float] | None]]:
    """The scored datasets that every algorithm has, and over them the summary of each algorithm."""
    algorithms = unique([cell.algorithm for cell in cells])
    scores = {(cell.dataset, cell.algorithm): cell.values("score_mean") for cell in cells}
    datasets = unique([cell.dataset for cell in cells])
    common = [name for name in datasets if all(scores.get((name, algorithm)) for algorithm in algorithms)]
    return common, {algorithm: summary([scores[name, algorithm] for name in common]) for algorithm in algorithms}


def before_online(cell: Cell) -> list[float]:
    """Each member's score where the online phase begins; empty without an online phase or scores."""
    rows = [row for row in cell.evaluations if row["phase"] == "online"]
    first = min((int(row["step"]) for row in rows), default=0)
    return [float(row["score_mean"]) for row in rows if int(row["step"]) == first and row["score_mean"]]


def about_data(cell: Cell) -> dict[str, Any] | None:
    """Returns of the dataset's own episodes; None where it was not trained on."""
    return cell.config.get("dataset_returns") if cell.config["flags"]["num_updates"] else None


# Tables


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, the first column to the left and the others to the right."""
    lines = [columns, [":--", *["--:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def show(value: dict[str, float] | None, lost: int = 0, length: str = "") -> str:
    """`mean [low, high]`, how many seeds it lacks, and the run's length where it is to be named."""
    text = "-" if value is None else f"{value['iqm']:.1f} [{value['low']:.1f}, {value['high']:.1f}]"
    return text + (f", {lost} diverged" if lost else "") + (f", after {length}" if length else "")


def short_length(cell: Cell, cells: Sequence[Cell]) -> str:
    """Updates, or environment steps of a run that has only these, where the longest of the cells has more."""
    for name, unit in (("updates", ""), ("online_steps", " steps")):
        if 0 < cell.final[name] < max(other.final[name] for other in cells):
            return f"{cell.final[name]:,}{unit}"
    return ""


def table(cells: Sequence[Cell], column: str, of_data: Callable[[dict[str, Any]], list[str]], heads: list[str]) -> str:
    """Datasets by algorithms, after what `of_data` says of the dataset; `column` is `score_mean` or `return_mean`.

    A run that is shorter than the longest has its length beside it.
    """
    algorithms = sorted({cell.algorithm for cell in cells})
    rows = []
    for dataset in unique([cell.dataset for cell in cells]):
        row = {cell.algorithm: cell for cell in cells if cell.dataset == dataset}
        texts = []
        for algorithm in algorithms:
            if algorithm not in row:
                texts.append("not run")
                continue
            values = row[algorithm].values(column)
            lost = len(row[algorithm].members) - len(values)
            texts.append(show(summary([values]), lost, short_length(row[algorithm], cells)))
        about = about_data(next(iter(row.values())))
        rows.append([dataset, *(of_data(about) if about else ["-"] * len(heads)), *texts])
    if column == "score_mean" and len(rows) > 1:
        datasets, totals = aggregate(cells)
        if datasets:
            name = f"all {len(datasets)}" if len(datasets) == len(rows) else f"the {len(datasets)} with every algorithm"
            short = {cell.algorithm for cell in cells if short_length(cell, cells) and cell.dataset in datasets}
            texts = [show(totals[one]) + (", of unequal lengths" if one in short else "") for one in algorithms]
            rows.append([name, *[""] * len(heads), *texts])
    return markdown(["dataset", *heads, *algorithms], rows)


def fine_tuning(cells: Sequence[Cell]) -> str:
    """Scores before and after the online phase, for the cells that have one."""
    rows = []
    for cell in cells:
        steps = str(cell.final["online_steps"])
        scores = [show(summary([values])) for values in (before_online(cell), cell.values("score_mean"))]
        rows.append([f"{cell.algorithm}, {cell.dataset}", str(cell.final["updates"]), steps, *scores])
    return markdown(["run", "offline updates", "environment steps", "before", "after"], rows)


def updates_of(cells: Sequence[Cell]) -> str:
    """How many offline updates each algorithm made, a list item."""
    by_count: dict[int, list[str]] = {}
    for cell in cells:
        names = by_count.setdefault(cell.final["updates"], [])
        names += [] if cell.algorithm in names else [cell.algorithm]
    return "; ".join(f"{count:,} ({', '.join(names)})" for count, names in sorted(by_count.items()))


def origin(cells: Sequence[Cell]) -> str:
    """What made a table: seeds, commits, hardware, versions, and the commands folded away."""
    seeds = unique([member["seed"] for cell in cells for member in cell.members])
    episodes = unique([member["episodes"] for cell in cells for member in cell.members if member["episodes"]])
    configs = [cell.config for cell in cells]
    commits = unique(
        [
            f"`{c['git_commit'] or 'unknown'}`" + (" with uncommitted changes" if c.get("git_dirty") else "")
            for c in configs
        ]
    )
    hardware = unique(
        [f"{c['cpu']['model']}, {c['cpu']['cores']} cores" if c.get("cpu") else "unknown processor" for c in configs]
    )
    devices = unique([f"{c['device']['count']} x {c['device']['kind']}" for c in configs])
    versions = unique([", ".join(f"{name} {version}" for name, version in c["versions"].items()) for c in configs])
    steps = sorted({cell.final["online_steps"] for cell in cells} - {0})
    lines = [
        f"- offline updates: {updates_of(cells)}",
        *([f"- environment steps: {' or '.join(f'{count:,}' for count in steps)}"] if steps else []),
        f"- seeds: {', '.join(map(str, seeds))}; episodes for each seed: {' or '.join(map(str, episodes))}",
        f"- commit: {'; '.join(commits)}",
        f"- processor: {'; '.join(hardware)}; JAX devices: {'; '.join(devices)}",
        f"- versions: {'; '.join(versions)}",
    ]
    commands = "\n".join(unique([cell.command for cell in cells]))
    return "\n".join(lines) + f"\n\n<details><summary>Commands</summary>\n\n```sh\n{commands}\n```\n\n</details>\n"


def speed(cells: Sequence[Cell]) -> str:
    """Each run's updates, rate and time."""
    runs = {cell.command: cell for cell in cells}.values()
    rows = []
    for cell in runs:
        rate, seconds = cell.final["updates_per_second"], cell.final["wall_clock_seconds"]
        members = len(cell.final["members"])
        name = f"{cell.run}, {cell.dataset}"
        rates = [rate, cell.final.get("online_steps_per_second")]
        row = [name, f"{cell.final['updates']}", f"{members}", *("-" if x is None else f"{x:.0f}" for x in rates)]
        rows.append([*row, f"{seconds:.0f} s"])
    rates = ["updates/s offline, all members", "online steps/s, all members"]
    return markdown(["run", "updates", "members", *rates, "time since the last start or resumption"], rows)


def write_scores(path: Path, cells: Sequence[Cell]) -> None:
    """A row for each seed."""
    path.unlink(missing_ok=True)
    measured = ("return_mean", "return_std", "score_mean", "score_std", "episodes")
    rows = []
    for cell in cells:
        for member in cell.members:
            row = {"algorithm": cell.algorithm, "dataset": cell.dataset, "seed": member["seed"]}
            row |= {name: member[name] for name in measured}
            diverged = (member["diverged"] or {}).get("step")
            rows.append(row | {"diverged_at": diverged, "updates": cell.final["updates"]})
            rows[-1] |= {"git_commit": cell.config["git_commit"]}
    Table(path).append(rows)


# Figures


def finish_curves(axes: Any, phase: str, scored: bool, average: float | None, title: str) -> None:
    """Labels, legend, and the average of the dataset as a dashed line, on the axes of a phase's learning curves."""
    if average is not None:
        axes.axhline(average, color="tab:gray", linestyle="--", linewidth=1.0, label="average of the dataset")
    axes.set_xlabel("gradient updates" if phase == "offline" else "environment steps")
    axes.set_ylabel("normalised score" if scored else "return")
    axes.set_title(title, fontsize=10)
    legend_below(axes)
    axes.grid(alpha=0.2)


def legend_below(axes: Any) -> None:
    """A legend under the axes, where long names have room."""
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.15))


def level(cell: Cell, scored: bool) -> float | None:
    """The dataset's own average score or return; None where it was not trained on."""
    return (about_data(cell) or {}).get("score_mean" if scored else "mean")


def plot_curves(path: Path, cells: Sequence[Cell]) -> None:
    """All algorithms on one dataset: mean over seeds, and the band from the worst to the best of them.

    From where a seed is lost to divergence, a cross, each of the others is drawn by itself. Returns instead of scores
    where there is no dataset: in the unit of most learning curves from scratch.
    """
    from matplotlib.figure import Figure

    rows = [row for cell in cells for row in cell.evaluations]
    scored = cells[0].config["flags"]["num_updates"] > 0 and all(row["score_mean"] for row in rows)
    column = "score_mean" if scored else "return_mean"
    phases = [phase for phase in ("offline", "online") if any(row["phase"] == phase for row in rows)]
    figure = Figure(figsize=(6.0 * max(1, len(phases)), 4.0 + 0.2 * len(cells)), layout="constrained")
    for i, phase in enumerate(phases):
        axes = figure.add_subplot(1, len(phases), i + 1)
        for number, cell in enumerate(cells):
            by_member: dict[str, dict[int, float]] = {}
            for row in cell.evaluations:
                if row["phase"] == phase:
                    by_member.setdefault(row["member"], {})[int(row["step"])] = float(row[column])
            color, steps = f"C{number}", sorted({step for values in by_member.values() for step in values})
            whole = [step for step in steps if all(step in values for values in by_member.values())]
            found = [[values[step] for values in by_member.values()] for step in whole]
            axes.plot(whole, [sum(values) / len(values) for values in found], color=color, label=cell.algorithm)
            axes.fill_between(whole, list(map(min, found)), list(map(max, found)), color=color, alpha=0.2, linewidth=0)
            for values in by_member.values():
                rest = {step: value for step, value in values.items() if step >= whole[-1]}
                if len(rest) > 1:
                    axes.plot(list(rest), list(rest.values()), color=color, linewidth=1.0, linestyle=":")
                if steps[-1] not in values or len(cell.values("return_mean")) == 0:
                    axes.plot(max(values), values[max(values)], "x", color=color)
        title = f"{cells[0].dataset} ({phase}): mean and range over seeds"
        finish_curves(axes, phase, scored, level(cells[0], scored), title)
    figure.savefig(path, dpi=120)


def plot_scores(path: Path, cells: Sequence[Cell]) -> None:
    """Final scores: the interquartile mean with its interval, the seeds as dots, the dataset's average as a line."""
    from matplotlib.figure import Figure

    datasets = unique([cell.dataset for cell in cells])
    algorithms = sorted({cell.algorithm for cell in cells})
    figure = Figure(figsize=(max(6.0, 2.0 + 1.8 * len(datasets)), 4.0 + 0.2 * len(algorithms)), layout="constrained")
    axes = figure.add_subplot()
    labelled: set[str] = set()
    for cell in cells:
        values = cell.values("score_mean")
        value = summary([values])
        if value is None:
            continue
        place = algorithms.index(cell.algorithm)
        x = datasets.index(cell.dataset) + 0.7 * ((place + 0.5) / len(algorithms) - 0.5)
        label = None if cell.algorithm in labelled else cell.algorithm
        labelled.add(cell.algorithm)
        axes.vlines(x, value["low"], value["high"], color=f"C{place}", linewidth=2.0)
        axes.plot(x, value["iqm"], "_", color=f"C{place}", markersize=16, markeredgewidth=2.5, label=label)
        axes.plot([x] * len(values), values, "o", color=f"C{place}", markersize=3, alpha=0.6)
    for i, dataset in enumerate(datasets):
        average = level(next(cell for cell in cells if cell.dataset == dataset), True)
        if average is not None:
            axes.hlines(average, i - 0.4, i + 0.4, color="tab:gray", linestyle="--", linewidth=1.0)
    axes.set_xticks(range(len(datasets)), [name.replace("/", "/\n") for name in datasets], fontsize=8)
    axes.set_ylabel("normalised score")
    axes.set_title("Final score; dashed: average of the dataset", fontsize=10)
    if labelled:
        legend_below(axes)
    axes.grid(axis="y", alpha=0.2)
    figure.savefig(path, dpi=120)


def lines_against(cells: Sequence[Cell], name: str) -> dict[str, dict[float, Cell]]:
    """Cells by what they share, then by their value of `name`; UsageError for what is no number of every run."""
    lines: dict[str, dict[float, Cell]] = {}
    for cell in cells:
        value = cell.members[0]["swept"].get(name, cell.config["flags"].get(name))
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UsageError(f"--against {name}: {cell.run} on {cell.dataset} has no such number")
        shared = re.sub(rf" {name}=\S+", "", cell.algorithm)
        line = lines.setdefault(f"{shared}, {cell.dataset}", {})
        if float(value) in line:
            raise UsageError(f"--against {name}: {shared} on {cell.dataset} is there twice with {value:g}")
        line[float(value)] = cell
    return {label: dict(sorted(line.items())) for label, line in lines.items()}


def plot_against(path: Path, lines: dict[str, dict[float, Cell]], name: str) -> None:
    """Final score at each value of `name`: interquartile mean, interval as a band, the dataset's average dashed."""
    from matplotlib.figure import Figure

    values = sorted({value for line in lines.values() for value in line})
    figure = Figure(figsize=(7.0, 4.0 + 0.2 * len(lines)), layout="constrained")
    axes = figure.add_subplot()
    for number, (label, line) in enumerate(lines.items()):
        found = {values.index(value): summary([cell.values("score_mean")]) for value, cell in line.items()}
        found = {place: value for place, value in found.items() if value is not None}
        axes.plot(list(found), [value["iqm"] for value in found.values()], "o-", color=f"C{number}", label=label)
        low, high = ([value[end] for value in found.values()] for end in ("low", "high"))
        axes.fill_between(list(found), low, high, color=f"C{number}", alpha=0.15, linewidth=0)
        average = level(next(iter(line.values())), True)
        if average is not None:
            axes.axhline(average, color=f"C{number}", linestyle="--", linewidth=1.0)
    axes.set_xticks(range(len(values)), [f"{value:g}" for value in values])
    axes.set_xlabel(name)
    axes.set_ylabel("normalised score")
    axes.set_title("Final score, interval over seeds; dashed: average of the dataset", fontsize=10)
    legend_below(axes)
    axes.grid(alpha=0.2)
    figure.savefig(path, dpi=120)


def table_against(lines: dict[str, dict[float, Cell]], name: str) -> str:
    """The figure's numbers."""
    values = sorted({value for line in lines.values() for value in line})
    rows = []
    for label, line in lines.items():
        texts = []
        for value in values:
            scores = line[value].values("score_mean") if value in line else []
            lost = len(line[value].members) - len(scores) if value in line else 0
            texts.append(show(summary([scores]), lost) if value in line else "not run")
        rows.append([label, *texts])
    return markdown([name, *(f"{value:g}" for value in values)], rows)


# The page


def write(folder: Path, against: str = "") -> None:
    """Write README.md, scores.csv and the figures of the suite in `folder`."""
    cells = read(folder)
    lines = lines_against(cells, against) if against else {}
    command = f"python benchmarks/report.py results/{folder.resolve().name}"
    command += f" --against {against}" if against else ""
    write_scores(folder / "scores.csv", cells)
    parts = [
        f"# Results: {folder.resolve().name}\n",
        f"Made from the files beside it by `{command}`.\n",
        "The figures are those of the last policy, not of the best one: interquartile mean over the seeds [95 % "
        "stratified bootstrap interval]. A quarter of the seeds, rounded down, is cut at each end, so with fewer than "
        "four it is the mean; with fewer than about ten, the interval is narrower than its name says. Each seed by "
        "itself: [scores.csv](scores.csv).\n",
    ]
    with_score = {cell.dataset for cell in cells if cell.values("score_mean")}
    scored = [cell for cell in cells if cell.dataset in with_score]  # with those that diverged there
    if against:
        plot_against(folder / f"against_{against}.png", lines, against)
        parts += [f"## Score against {against}\n", table_against(lines, against)]
        parts += [f"![Score against {against}](against_{against}.png)\n"]
    if scored:
        plot_scores(folder / "scores.png", scored)

        def score(about: dict[str, Any]) -> list[str]:
            return ["-" if about["score_mean"] is None else f"{about['score_mean']:.1f}"]

        parts += [
            "## Normalised score\n",
            "0 is D4RL's random policy, 100 its expert.\n",
            table(scored, "score_mean", score, ["data"]),
            *([notes.read_text()] if (notes := folder / "notes.md").exists() else []),
            origin(scored),
            "![Final scores](scores.png)\n",
        ]

    def returns(about: dict[str, Any]) -> list[str]:
        return [f"{about['mean']:.0f}", f"{about['min']:.0f} to {about['max']:.0f}", str(about["episodes"])]

    heads = ["data, average", "worst to best episode", "episodes"]
    parts += ["## Return\n", table(cells, "return_mean", returns, heads), origin(cells)]
    if tuned := [cell for cell in scored if before_online(cell) and cell.final["updates"]]:
        parts += [
            "## Fine-tuning\n",
            "Score where the online phase begins, and the final score after it.\n",
            fine_tuning(tuned),
        ]
    parts += ["## Learning curves\n"]
    for dataset in unique([cell.dataset for cell in cells]):
        name = f"curves_{re.sub(r'[^A-Za-z0-9.-]+', '-', dataset).strip('.-')}.png"
        plot_curves(folder / name, [cell for cell in cells if cell.dataset == dataset])
        parts.append(f"![{dataset}]({name})\n")
    parts += ["## Speed\n", speed(cells), origin(cells)]
    (folder / "README.md").write_text("\n".join(parts))


# Of one run


def is_run(folder: Path) -> bool:
    """Whether it is a run's directory, and no suite's folder."""
    return (folder / "config.json").exists() or bool(merge.parts_of(folder))


def of_run(run_dir: Path) -> None:
    """Merge the parts, draw grid.png, print the last evaluation. UsageError where nothing has finished."""
    missing = merge.merge(run_dir) if merge.parts_of(run_dir) else []
    for line in missing:
        print(f"{run_dir}: {line}", file=sys.stderr)
    config, final = (merge.read_json(run_dir / name) for name in ("config.json", "final.json"))
    title = f"{config['algorithm']}, {config['flags']['dataset']}"
    if final["members"][0]["swept"]:
        grid.plot(run_dir / "grid.png", final["members"], title)
        print(f"{title}: interquartile mean over the seeds, and its 95 % interval\n{grid.ranking(final['members'])}")
    else:
        scored = final["aggregate"]["score"]["iqm"] is not None
        print(table_of_run(title, final, config["dataset_returns"].get("score_mean" if scored else "mean")))
    print(f"results in {run_dir}")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; SystemExit(2), with one line on stderr, where there is nothing to report."""
    with exit_status():
        args = tyro.cli(Args, args=argv, prog="python -m benchmarks.report")
        if not args.folders:
            raise UsageError("name the directory of a run, or the folder of a suite")
        for folder in args.folders:
            if is_run(folder):
                of_run(folder)
            else:
                write(folder, args.against.replace("-", "_"))
                print(f"wrote {folder / 'README.md'}")


if __name__ == "__main__":
    main()
