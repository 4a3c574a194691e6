"""Tables and figures: of a run's parts and of its sweep, and of the results that `benchmarks/suite.py` kept.

    python -m benchmarks.report runs/mine            # the directory of a run, or several
    python -m benchmarks.report results/locomotion   # the folder of a suite

Of a run it draws `curves.png` (`benchmarks/curves.py`). Of one that several processes trained with --shard I/N it first
merges the parts that are there (`benchmarks/merge.py`), and says which are missing. Of one with --grid it ranks the
settings, says what tuning gains, and draws `grid.png` (`benchmarks/grid.py`).

Of a suite it reads `config.json`, `final.json`, `evaluations.csv` and `command.json` in each folder below, and writes
into its own `README.md`, `scores.csv` (a row for each seed), `scores.png`, `profiles.png` (the share of runs above each
score), `best_of_k.png` (what tuning gains) and, for each dataset, `curves_*.png`. A run that was cut off, without
`final.json`, counts as one that ended with its last evaluation.
`--page README.md` puts the table of scores there too. `--against num_proposals` adds a table and a figure of the score
against that setting, in which the runs differ. `--at 40000` adds a table of the evaluations after so many updates,
for runs of different lengths.
Text of your own in the folder's `notes.md` goes under the table of scores.

Scores are those of the last policy; the best one stands in one table, as a bound. A number over seeds is their
interquartile mean with a 95 % stratified bootstrap interval (Agarwal et al., 2021): the strata are the datasets, seeds
are drawn within each.
"""

import math
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmarks import curves, figures, grid, merge
from benchmarks.cells import (
    MEASURED,
    Cell,
    about_data,
    after,
    aggregate,
    as_evaluated,
    before_online,
    common_datasets,
    last_evaluations,
    length_in_words,
    of_full_length,
    online_regret,
    read,
    short_length,
    summary,
    trained_on,
    unique,
    with_diverged,
    worst_score,
)
from benchmarks.curves import score_name
from benchmarks.families import domain_of
from benchmarks.intervals import expected_best, probability_of_improvement
from benchmarks.tables import Table, file_name, fill, markdown, write_text
from common.cli import UsageError, exit_status, read_flags
from common.report import read_json

FIGURES = ("scores.png", "profiles.png", "best_of_k.png", "against_*.png", "curves_*.png")
LAST = 10
"""Evaluations whose mean stands beside the last one."""


@dataclass(frozen=True)
class Args:
    """Tables and figures of runs, and of the results that benchmarks/suite.py kept."""

    # Directories of runs, e.g. runs/mine, or folders of suites, e.g. results/locomotion.
    folders: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER...")]
    # Of a suite: a setting in which the runs differ; adds a table and a figure of the score against it.
    against: str = ""
    # Of a suite: adds a table of the evaluations after so many offline updates, for runs of different lengths; 0: none.
    at: int = 0
    # Of a suite: a page that is to have its table of scores too, between <!-- scores --> and <!-- /scores -->.
    page: Path | None = None


# Tables


def show(value: dict[str, float] | None, lost: int = 0, length: str = "") -> str:
    """`mean [low, high]`, how many seeds it lacks, and the run's length where it is to be named."""
    text = "-" if value is None else f"{value['iqm']:.1f}"
    text += f" [{value['low']:.1f}, {value['high']:.1f}]" if value and not math.isnan(value["low"]) else ""
    return text + (f", {lost} diverged" if lost else "") + (f", after {length}" if length else "")


def show_cell(cell: Cell, column: str, cells: Sequence[Cell]) -> str:
    """The seeds' values, how many diverged, and the run's length if it is shorter than the longest of the `cells`."""
    return show(summary([cell.values(column)]), len(cell.lost), short_length(cell, cells))


def table(
    cells: Sequence[Cell],
    column: str,
    of_data: Callable[[dict[str, Any]], list[str]],
    heads: list[str],
    elsewhere: Sequence[Cell] = (),
) -> str:
    """Datasets by algorithms, after what `of_data` says of the dataset; `column` is `score_mean` or `return_mean`.

    A run that is shorter than the longest has its length beside it, and no part in the row over all datasets.
    `elsewhere`: those that were run, if not evaluated at the length of the table.
    """
    algorithms = sorted({cell.algorithm for cell in cells})
    rows = []
    for dataset in unique([cell.dataset for cell in cells]):
        row = {cell.algorithm: cell for cell in cells if cell.dataset == dataset}
        texts = []
        for algorithm in algorithms:
            if cell := row.get(algorithm):
                texts.append(show_cell(cell, column, cells))
            else:
                run = any((other.dataset, other.algorithm) == (dataset, algorithm) for other in elsewhere)
                texts.append("not evaluated" if run else "not run")
        about = about_data(next(iter(row.values())))
        rows.append([dataset, *(of_data(about) if about else ["-"] * len(heads)), *texts])
    if column == "score_mean" and len(rows) > 1:
        datasets, totals = aggregate(cells)
        full, lost = of_full_length(cells), dict.fromkeys(algorithms, 0)
        for cell in full:
            lost[cell.algorithm] += len(cell.lost) if cell.dataset in datasets else 0

        def over_all(name: str, totals: dict[str, dict[str, float] | None]) -> list[str]:
            return [name, *[""] * len(heads), *(show(totals.get(one), lost[one]) for one in algorithms)]

        if datasets:
            name = f"all {len(datasets)}" if len(datasets) == len(rows) else f"the {len(datasets)} with every algorithm"
            lengths = unique([cell.length for cell in cells])
            name += f", after {length_in_words(max(lengths, key=sum))}" if len(lengths) > 1 else ""
            rows.append(over_all(name, totals))
            steps = {tuple(s for s, _ in x) for cell in full for x in last_evaluations(cell, LAST).values()}
            if [len(at) for at in steps] == [LAST]:  # all runs were evaluated at the same ten
                name = f"the same {len(datasets)}, mean of the last {LAST} evaluations"
                rows.append(over_all(name, aggregate(cells, last_means)[1]))
    return markdown(["dataset", *heads, *algorithms], rows)


def fine_tuning(cells: Sequence[Cell]) -> str:
    """Scores before and after the online phase, and its regret, of the seeds that are left in the cells with one."""
    rows = []
    for cell in cells:
        scores = (before_online(cell), cell.values("score_mean"), online_regret(cell))
        lost = f", {len(cell.lost)} diverged" if cell.lost else ""
        rows.append([f"{cell.algorithm}, {cell.dataset}{lost}", *map(str, cell.length)])
        rows[-1] += [show(summary([values])) for values in scores]
    return markdown(["run", "offline updates", "environment steps", "before", "after", "regret"], rows)


def last_means(cell: Cell) -> list[float]:
    """Of each seed that is left, the mean score of its last ten evaluations."""
    return [sum(x for _, x in found) / len(found) for found in last_evaluations(cell, LAST).values()]


def last_and_best(cells: Sequence[Cell]) -> str:
    """The last evaluation, the mean of the last ten, and the best one."""
    rows = []
    for cell in cells:
        last, every = last_evaluations(cell, LAST), last_evaluations(cell, sys.maxsize)
        count = max(map(len, last.values()), default=0)
        means = show(summary([last_means(cell)]))
        best = show(summary([[max(x for _, x in found) for found in every.values()]]))
        texts = [
            show(summary([cell.values("score_mean")])),
            means + (f", of {count}" if 0 < count < LAST else ""),
            best,
        ]
        rows.append([f"{cell.algorithm}, {cell.dataset}", *texts])
    return markdown(["run", "last", f"mean of the last {LAST}", "best (by hindsight)"], rows)


def diverged(cells: Sequence[Cell]) -> str:
    """How many seeds each cell lost, and its score with and without them; empty where none did."""
    rows = []
    for cell in cells:
        if cell.lost:
            name, worst = f"{cell.algorithm}, {cell.dataset}", f"{worst_score(cells, cell.dataset):.1f}"
            scores = [show(summary([values])) for values in (cell.values("score_mean"), with_diverged(cell, cells))]
            rows.append([name, str(len(cell.members)), str(len(cell.lost)), *scores, worst])
    heads = ["run", "seeds", "diverged", "score of the others", "score of all, the diverged at the worst", "the worst"]
    return markdown(heads, rows) if rows else ""


def strata_of(cells: Sequence[Cell]) -> dict[str, list[list[float]]]:
    """By algorithm, the scores on each dataset that all have, of full length; seeds that diverged at the worst."""
    full = of_full_length(cells)
    found = {(cell.algorithm, cell.dataset): with_diverged(cell, cells) for cell in full}
    datasets, algorithms = common_datasets(full), sorted({cell.algorithm for cell in full})
    return {one: [found[one, name] for name in datasets] for one in algorithms} if datasets else {}


def improvements(strata: dict[str, list[list[float]]]) -> str:
    """The probability that a run of the row's algorithm is above one of the column's."""
    rows = []
    for ours, x in strata.items():
        found = {theirs: probability_of_improvement(x, y) for theirs, y in strata.items() if theirs != ours}
        texts = (f"{found[o][0]:.2f} [{found[o][1]:.2f}, {found[o][2]:.2f}]" if o in found else "" for o in strata)
        rows.append([ours, *texts])
    return markdown(["P(row > column)", *strata], rows)


def tuned_settings(cells: Sequence[Cell]) -> dict[str, dict[str, list[list[float]]]]:
    """By dataset and algorithm, the scores of each setting, where several of one length are there."""
    found: dict[str, dict[str, list[list[float]]]] = {}
    for cell in of_full_length(cells):
        of_dataset = found.setdefault(cell.dataset, {})
        if scores := with_diverged(cell, cells):  # none where there is no score, as of episodes that were cut
            of_dataset.setdefault(cell.config["algorithm"], []).append(scores)
    several = {name: {a: x for a, x in algorithms.items() if len(x) > 1} for name, algorithms in found.items()}
    return {name: algorithms for name, algorithms in several.items() if algorithms}


def expected_bests(tuned: dict[str, dict[str, list[list[float]]]]) -> str:
    """Expected Online Performance at each number of settings tried."""
    budgets = range(1, 1 + max(len(settings) for algorithms in tuned.values() for settings in algorithms.values()))
    rows = []
    for dataset, algorithms in tuned.items():
        for algorithm, settings in algorithms.items():
            texts = [f"{mean:.1f} ± {deviation:.1f}" for mean, deviation in zip(*expected_best(settings), strict=True)]
            rows.append([f"{algorithm}, {dataset}", *texts, *["-"] * (len(budgets) - len(texts))])
    return markdown(["settings tried", *map(str, budgets)], rows)


def meaning(cells: Sequence[Cell]) -> str:
    """What scores of 0 and 100 stand for."""
    d4rl = "0 is D4RL's random policy, 100 its expert."
    ogbench = (
        "On OGBench's tasks it is the share of episodes with success, 0 to 100. For the data it is the share of "
        "recorded trajectories that pass through the goal at some step; few of them were aiming for it."
    )
    tasks = {domain_of(cell.config["environment"]) == "success" for cell in cells}
    return " ".join([d4rl] * (False in tasks) + [ogbench] * (True in tasks))


def updates_of(cells: Sequence[Cell]) -> str:
    """How many offline updates each algorithm made, in words."""
    by_count: dict[int, list[str]] = {}
    for cell in cells:
        names = by_count.setdefault(cell.final["updates"], [])
        names += [] if cell.algorithm in names else [cell.algorithm]
    return "; ".join(f"{count:,} ({', '.join(names)})" for count, names in sorted(by_count.items()))


def origin(cells: Sequence[Cell]) -> str:
    """What made a table: seeds, commits, hardware, versions, and the commands folded away."""
    seeds = unique([member["seed"] for cell in cells for member in cell.members])
    episodes = unique([int(member["episodes"]) for cell in cells for member in cell.members if member["episodes"]])
    configs = [cell.config for cell in cells]
    commits = unique(
        [
            f"`{c.get('git_commit') or 'unknown'}`" + (" with uncommitted changes" if c.get("git_dirty") else "")
            for c in configs
        ]
    )
    hardware = unique(
        [f"{c['cpu']['model']}, {c['cpu']['cores']} cores" if c.get("cpu") else "unknown processor" for c in configs]
    )
    devices = unique([f"{c['device']['count']} x {c['device']['kind']}" for c in configs])
    versions = unique(
        [", ".join(f"{name} {version}" for name, version in c.get("versions", {}).items()) for c in configs]
    )
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
    """Updates, rate and time of each run that measured a rate; nothing where none did, as by benchmarks/at_once.py."""
    runs = {(cell.run, cell.dataset, cell.command): cell for cell in cells}.values()
    rows = []
    for cell in runs:
        seconds, members = cell.final["wall_clock_seconds"], len(cell.final["members"])
        name = f"{cell.run}, {cell.dataset}"
        rates = [cell.final["updates_per_second"], cell.final.get("online_steps_per_second")]
        if rates == [None, None]:  # trained by another process than that which wrote its files
            continue
        row = [name, f"{cell.final['updates']}", f"{members}", *("-" if x is None else f"{x:.0f}" for x in rates)]
        rows.append([*row, f"{seconds:.0f} s"])
    rates = ["updates/s offline, of all that did not diverge", "online steps/s, likewise"]
    columns = ["run", "updates", "members", *rates, "time, before a resumption too"]
    return f"## Speed\n\n{markdown(columns, rows)}" if rows else ""


def write_scores(path: Path, cells: Sequence[Cell]) -> None:
    """A row for each seed."""
    path.unlink(missing_ok=True)
    rows = []
    for cell in cells:
        for member in cell.members:
            row = {"algorithm": cell.algorithm, "dataset": cell.dataset, "seed": member["seed"]}
            row |= {name: member[name] for name in MEASURED}
            diverged = (member["diverged"] or {}).get("step")
            rows.append(row | {"diverged_at": diverged, "updates": cell.final["updates"]})
            rows[-1] |= {"git_commit": cell.config.get("git_commit")}
    Table(path).append(rows)


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


def table_against(lines: dict[str, dict[float, Cell]], name: str) -> str:
    """The figure's numbers."""
    values = sorted({value for line in lines.values() for value in line})
    cells = [cell for line in lines.values() for cell in line.values()]
    rows = []
    for label, line in lines.items():
        texts = []
        for value in values:
            texts.append(show_cell(line[value], "score_mean", cells) if value in line else "not run")
        rows.append([label, *texts])
    return markdown([name, *(f"{value:g}" for value in values)], rows)


# The page


def evaluation_practice(folder: Path, cells: Sequence[Cell], colors: dict[str, str]) -> list[str]:
    """The parts of the page that say how far the scores above can be trusted, and their figures."""
    parts = [
        "### Last and best\n",
        f"The mean of the last {LAST} evaluations moves less than the last one; where there are fewer, how many. The "
        "best evaluation is chosen with the environment's help: a bound, and no result.\n",
        last_and_best(cells),
    ]
    if lost := diverged(cells):
        parts += [
            "### Diverged seeds\n",
            "A seed that diverged has no score and is left out above. Here it also counts as the lowest score of any "
            "seed on its dataset, as it does in what follows.\n",
            lost,
        ]
    strata = strata_of(cells)
    if len(strata) > 1 and all(len(x) > 1 for tasks in strata.values() for x in tasks):  # one seed compares nothing
        count = len(next(iter(strata.values())))
        figures.plot_profiles(folder / "profiles.png", strata, colors, score_name([cell.config for cell in cells]))
        parts += [
            "### Comparison\n",
            f"Runs of {length_in_words(max((cell.length for cell in cells), key=sum))}, over {count} dataset(s) that "
            "all have: the probability of improvement, ties by half, and performance profiles, with 95 % stratified "
            "bootstrap intervals (Agarwal et al., 2021).\n",
            improvements(strata),
            "![Performance profiles](profiles.png)\n",
        ]
    if tuned := tuned_settings(cells):
        figures.plot_expected_best(folder / "best_of_k.png", tuned, cells)
        parts += [
            "### The best of k settings\n",
            "The expected score of the best of k settings, each chosen at random and evaluated online, ± the standard "
            "deviation over the choice (Kurenkov and Kolesnikov, 2022). A setting's score is the mean of its seeds: "
            "the fewer they are, the more the right end owes to luck.\n",
            expected_bests(tuned),
            "![Expected score of the best of k settings](best_of_k.png)\n",
        ]
    return parts


def write(folder: Path, against: str = "", at: int = 0, page: Path | None = None) -> None:
    """Write README.md, scores.csv and the figures of the suite in `folder`, and the scores into another `page`."""
    cells = read(folder)
    colors = figures.colors_of(cells)
    lines = lines_against(cells, against) if against else {}
    then = after(cells, at) if at else []
    command = f"python benchmarks/report.py results/{folder.resolve().name}"
    command += f" --against {against}" if against else ""
    command += f" --at {at}" if at else ""
    command += f" --page {page}" if page else ""
    parts = [
        f"# Results: {folder.resolve().name}\n",
        f"Made from the files beside it by `{command}`.\n",
        "The figures are those of the last policy, not of the best one: interquartile mean over the seeds [95 % "
        "stratified bootstrap interval]. A quarter of the seeds, rounded down, is cut at each end, so with fewer than "
        "four it is the mean; with fewer than about ten, the interval is narrower than its name says, and a single "
        "seed has none. Each seed by itself: [scores.csv](scores.csv).\n",
    ]
    with_score = {cell.dataset for cell in cells if cell.values("score_mean")}
    scored = [cell for cell in cells if cell.dataset in with_score]  # with those that diverged there
    if against:
        figures.plot_against(folder / f"against_{against}.png", lines, against)
        parts += [f"## Score against {against}\n", table_against(lines, against)]
        parts += [f"![Score against {against}](against_{against}.png)\n"]
    if scored:
        figures.plot_scores(folder / "scores.png", scored, colors)

        def score(about: dict[str, Any]) -> list[str]:
            return ["-" if about["score_mean"] is None else f"{about['score_mean']:.1f}"]

        scores = table(scored, "score_mean", score, ["data"])
        if page is not None:
            fill(page, "scores", scores.rstrip())
        heading = score_name([cell.config for cell in scored]).capitalize()
        parts += [f"## {heading}\n", f"{meaning(scored)}\n", scores]
        if then := [cell for cell in then if cell.dataset in with_score]:
            episodes = {int(member["episodes"]) for cell in then for member in cell.members if member["episodes"]}
            counts = " to ".join(str(n) for n in sorted({min(episodes, default=0), max(episodes, default=0)}))
            parts += [
                f"### After {at:,} updates\n",
                f"By the evaluation at that point, {counts} episodes for each seed.\n",
                table(then, "score_mean", score, ["data"], elsewhere=scored),
            ]
        parts += [
            *([notes.read_text()] if (notes := folder / "notes.md").exists() else []),
            "![Final scores](scores.png)\n",
            *evaluation_practice(folder, scored, colors),
        ]

    def returns(about: dict[str, Any]) -> list[str]:
        return [f"{about['mean']:.0f}", f"{about['min']:.0f} to {about['max']:.0f}", str(about["episodes"])]

    heads = ["data, average", "worst to best episode", "episodes"]
    parts += ["## Return\n", table(cells, "return_mean", returns, heads)]
    if tuned := [cell for cell in scored if all(cell.length)]:
        parts += [
            "## Fine-tuning\n",
            "Score where the online phase begins, and the final score after it. The regret is the distance from an "
            "expert's 100, averaged over the online phase by its evaluations: of two runs that end alike, the one "
            "of lower regret was good earlier.\n",
            fine_tuning(tuned),
        ]
    parts += ["## Learning curves\n"]
    for dataset in unique([cell.dataset for cell in cells]):
        shown = [cell for cell in cells if cell.dataset == dataset]
        if not any(cell.evaluations for cell in shown):  # every member diverged before the first
            continue
        name = f"curves_{file_name(dataset)}.png"
        figures.plot_curves(folder / name, shown, colors)
        parts.append(f"![{dataset}]({name})\n")
    parts += [speed(cells), origin(cells)]
    write_scores(folder / "scores.csv", cells)
    text = "\n".join(parts)
    write_text(folder / "README.md", text)
    for path in [path for figure in FIGURES for path in folder.glob(figure)]:
        if f"({path.name})" not in text:  # of an earlier page
            path.unlink()


# Of one run


def is_run(folder: Path) -> bool:
    """Whether it is a run's directory, and no suite's folder."""
    return (folder / "config.json").exists() or bool(merge.parts_of(folder))


def of_run(run_dir: Path) -> None:
    """Merge the parts, draw the figures, print the last evaluation. UsageError where nothing was evaluated."""
    with merge.merging(run_dir) if (shared := bool(merge.parts_of(run_dir))) else nullcontext():
        _of_run(run_dir, shared)


def _of_run(run_dir: Path, shared: bool) -> None:
    for line in merge.merge(run_dir) if shared else []:
        print(f"{run_dir}: {line}", file=sys.stderr)
    curves.draw(run_dir)
    config = read_json(run_dir / "config.json")
    if (run_dir / "final.json").exists():
        final = read_json(run_dir / "final.json")
    elif shared:  # the parts may be at different steps
        raise UsageError(f"no part of {run_dir} has finished; {run_dir}/curves.png shows how far they are")
    else:
        final = as_evaluated(run_dir, config, Table(run_dir / "evaluations.csv").read())
        print(f"not finished; after {length_in_words((final['updates'], final['online_steps']))}:", file=sys.stderr)
    title = f"{config['algorithm']}, {trained_on(config)}"
    level = curves.data_level(config, scored=grid.unit_of(final["members"]) == "score")
    print(f"{title}\n{grid.table(final, level)}")
    if final["members"][0]["swept"]:
        grid.plot(run_dir / "grid.png", final["members"], title, level)
        print(grid.tuning(final["members"]))
    print(f"results in {run_dir}")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; SystemExit(2), with one line on stderr, where there is nothing to report."""
    with exit_status():
        args = read_flags(Args, argv, prog="python -m benchmarks.report")
        if not args.folders:
            raise UsageError("name the directory of a run, or the folder of a suite")
        for folder in args.folders:
            if is_run(folder):
                of_run(folder)
            else:
                write(folder, args.against.replace("-", "_"), args.at, args.page)
                print(f"wrote {folder / 'README.md'}")


if __name__ == "__main__":
    main()
