"""The results of a suite, read from its folder: cells of members that differ by their seeds only."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.curves import Curves, curves_of, number, trained_on, uses_data
from benchmarks.intervals import bootstrap_interval, interquartile_mean, regret
from benchmarks.tables import Table, file_name
from common.cli import UsageError
from common.report import read_json
from common.runs import FREE, LENGTHS

NOT_SETTINGS = FREE | LENGTHS - {"max_episode_steps"}
NOT_SETTINGS |= {"seed", "num_seeds", "grid", "dataset", "shard", "behavior_checkpoint", "keep_best"}
"""Flags in which runs of one method may differ: data, seeds, lengths, folders, how often it is evaluated and saved."""
MEASURED = ("return_mean", "return_std", "score_mean", "score_std", "episodes")
"""What an evaluation says of a member."""


@dataclass(frozen=True)
class Cell:
    """The members of one run that share algorithm, dataset and settings; they differ by their seeds.

    `algorithm` has the settings in which the run differs from the folder's plainest one of the algorithm on the
    dataset, and what was swept; `dataset` is the environment where the dataset was not trained on.
    """

    algorithm: str
    run: str  # The same without what was swept.
    dataset: str
    members: list[dict[str, Any]]
    evaluations: list[dict[str, str]]
    config: dict[str, Any]
    final: dict[str, Any]
    command: str

    def values(self, column: str) -> list[float]:
        """Final `score_mean` or `return_mean` of the members that have one: the diverged have none."""
        return [member[column] for member in self.members if member[column] is not None]

    @property
    def length(self) -> tuple[int, int]:
        """Offline updates and environment steps."""
        return self.final["updates"], self.final["online_steps"]

    @property
    def lost(self) -> set[str]:
        """The members that diverged, as the tables name them."""
        return {str(member["member"]) for member in self.members if member["diverged"]}

    @property
    def all_lost(self) -> bool:
        """Whether every member diverged."""
        return len(self.lost) == len(self.members)

    def curves(self, phase: str, column: str) -> Curves:
        """By member, what the evaluations of the phase have in the column, against the steps."""
        return curves_of((row for row in self.evaluations if row["phase"] == phase), column)


def settings_of(config: dict[str, Any], reference: dict[str, Any]) -> str:
    """The flags in which a run differs from another one of the same algorithm on the same dataset.

    One that only this run has, since the flag is newer or was removed, is among them: it may be what tells them apart.
    """
    ours, theirs = config["flags"], reference["flags"]
    names = [name for name in ours if name not in NOT_SETTINGS and ours[name] != theirs.get(name)]
    return "".join(
        f" {name}={ours[name]:g}" if isinstance(ours[name], float) else f" {name}={ours[name]}" for name in names
    )


def measured(member: dict[str, Any], rows: dict[str, dict[str, str]], lost: Any) -> dict[str, Any]:
    """The member's entry in final.json by its row of one evaluation; a member without one is `lost`."""
    row = rows.get(str(member["member"]), {})
    numbers = {name: number(row.get(name)) for name in MEASURED}
    values = {name: x if math.isfinite(x) else None for name, x in numbers.items()}
    return member | values | {"diverged": None if row else lost}


def as_evaluated(run: Path, config: dict[str, Any], evaluations: list[dict[str, str]]) -> dict[str, Any]:
    """What final.json would say had the last evaluation ended the run, which goes on or was cut off.

    A member without a row there had diverged. UsageError where nothing was evaluated.
    """
    if not evaluations:
        raise UsageError(f"{run} has no final.json, and no evaluation so far")
    phase, step = evaluations[-1]["phase"], evaluations[-1]["step"]
    rows = {row["member"]: row for row in evaluations if (row["phase"], row["step"]) == (phase, step)}
    members = [measured(member, rows, lost={"step": None}) for member in config["members"]]
    updates, online_steps = (config["flags"]["num_updates"], int(step)) if phase == "online" else (int(step), 0)
    rates = dict.fromkeys(("updates_per_second", "online_steps_per_second", "wall_clock_seconds"))
    return {"members": members, "updates": updates, "online_steps": online_steps} | rates


def read(folder: Path) -> list[Cell]:
    """All cells below `folder`, by dataset and algorithm. A run that was cut off counts as far as it was evaluated.

    UsageError where there is none or one is there twice.
    """
    runs = {}
    for run in sorted(path.parent for path in folder.glob("*/config.json")):
        if not (run / "command.json").exists():
            raise UsageError(f"{run} has no command.json: one table holds runs of benchmarks/suite.py alone")
        config, command = read_json(run / "config.json"), read_json(run / "command.json")
        evaluations = Table(run / "evaluations.csv").read()  # none where every member diverged before the first
        ended = (run / "final.json").exists()
        final = read_json(run / "final.json") if ended else as_evaluated(run, config, evaluations)
        runs[run] = config, final, command, evaluations
    hashes: dict[str, Any] = {}
    for run, (config, *_) in runs.items():
        digest = config.get("dataset_sha256") if uses_data(config) else None
        if digest and hashes.setdefault(trained_on(config), digest) != digest:
            raise UsageError(f"{run} learned from other data than another run on {trained_on(config)}")
    references = references_of({run: config for run, (config, *_) in runs.items()})
    cells: dict[tuple[str, str], Cell] = {}
    for config, final, command, evaluations in runs.values():
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
        raise UsageError(f"there is no run and no suite of runs in {folder}")
    return [cells[key] for key in sorted(cells)]


def references_of(configs: dict[Path, dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    """By algorithm and dataset, the run that the others are compared with: that of the shortest name, without --label.

    If it has a label all the same, and one of that label is beside a plainer run on another dataset, it is the latter:
    so that a label means the same on every dataset.
    """

    def key(run: Path) -> tuple[str, str]:
        return configs[run]["algorithm"], trained_on(configs[run])

    def label(run: Path) -> tuple[str, str]:
        algorithm, dataset = configs[run]["algorithm"], configs[run]["flags"]["dataset"]
        return algorithm, run.name.removeprefix(f"{algorithm}_{file_name(dataset)}")

    plainest: dict[tuple[str, str], Path] = {}
    for run in sorted(configs, key=lambda run: len(run.name)):
        plainest.setdefault(key(run), run)
    beside = {label(run): plainest[key(run)] for run in configs if plainest[key(run)] != run}
    return {name: configs[beside.get(label(run), run)] for name, run in plainest.items()}


def unique(values: Sequence[Any]) -> list[Any]:
    """The values without repetition, in order of first appearance."""
    return list(dict.fromkeys(values))


def summary(strata: Sequence[Sequence[float]]) -> dict[str, float] | None:
    """Interquartile mean over all strata and its interval, NaN if one is of a single seed; None if one is empty."""
    if not strata or not all(len(values) for values in strata):
        return None
    several = all(len(values) > 1 for values in strata)
    low, high = bootstrap_interval(strata) if several else (math.nan, math.nan)
    return {"iqm": float(interquartile_mean([x for values in strata for x in values])), "low": low, "high": high}


def of_full_length(cells: Sequence[Cell]) -> list[Cell]:
    """The cells that are as long as the longest one: only these are averaged over datasets, and compared.

    Those that were to be, and whose members all diverged, among them.
    """
    longest = max((cell.length for cell in cells), key=sum)

    def counts(cell: Cell) -> bool:
        flags = cell.config["flags"]
        return cell.length == longest or (cell.all_lost and (flags["num_updates"], flags["online_steps"]) == longest)

    return [cell for cell in cells if counts(cell)]


def common_datasets(cells: Sequence[Cell]) -> list[str]:
    """The datasets on which every algorithm has a score, or diverged."""
    algorithms = {cell.algorithm for cell in cells}
    scored = {(cell.dataset, cell.algorithm) for cell in cells if cell.values("score_mean") or cell.lost}
    return [name for name in unique([c.dataset for c in cells]) if all((name, a) in scored for a in algorithms)]


def aggregate(
    cells: Sequence[Cell], scores_of: Callable[[Cell], list[float]] = lambda cell: cell.values("score_mean")
) -> tuple[list[str], dict[str, dict[str, float] | None]]:
    """Of the cells of full length: the datasets that every algorithm has, and the summary of each over them."""
    full = of_full_length(cells)
    common = common_datasets(full)
    scores = {(cell.dataset, cell.algorithm): scores_of(cell) for cell in full}
    return common, {one: summary([scores[name, one] for name in common]) for one in unique([c.algorithm for c in full])}


def worst_score(cells: Sequence[Cell], dataset: str) -> float:
    """The lowest final score of any seed on the dataset, which stands for a seed that diverged; 0 if there is none."""
    return min((x for cell in cells if cell.dataset == dataset for x in cell.values("score_mean")), default=0.0)


def with_diverged(cell: Cell, cells: Sequence[Cell]) -> list[float]:
    """Final scores of all its seeds, those that diverged at the dataset's worst."""
    return cell.values("score_mean") + [worst_score(cells, cell.dataset)] * len(cell.lost)


def after(cells: Sequence[Cell], updates: int) -> list[Cell]:
    """The cells as they were after so many offline updates; without those that were not evaluated there.

    The evaluation after the last of them may be that at the online phase's first step. A member that has no evaluation
    there, beside others that have one, had diverged. UsageError if no cell has any.
    """
    found, evaluated = [], False
    for cell in cells:
        places = {("offline", updates)} | ({("online", 0)} if cell.final["updates"] == updates else set())
        here = [row for row in cell.evaluations if (row["phase"], int(row["step"])) in places]
        rows = {row["member"]: row for row in here}
        steps = [(member["diverged"] or {}).get("step") for member in cell.members]
        lost_before = all((cell.final["updates"] if step is None else step) <= updates for step in steps)
        if rows or (cell.all_lost and lost_before):
            evaluated |= bool(rows)
            members = [measured(member, rows, lost=member["diverged"]) for member in cell.members]
            until = [row for row in cell.evaluations if row["phase"] == "offline" and int(row["step"]) < updates]
            until += [row | {"phase": "offline", "step": str(updates)} for row in here]
            final = cell.final | {"updates": updates, "online_steps": 0}
            found.append(replace(cell, members=members, evaluations=until, final=final))
    if not evaluated:
        raise UsageError(f"--at {updates}: no run was evaluated after so many offline updates")
    return found


def online_curves(cell: Cell) -> list[list[tuple[int, float]]]:
    """Steps and scores of the online phase, of each member that is left and was evaluated where the phase begins."""
    curves = cell.curves("online", "score_mean").items()
    return [sorted(curve.items()) for member, curve in curves if 0 in curve and member not in cell.lost]


def before_online(cell: Cell) -> list[float]:
    """The scores where the online phase begins."""
    return [curve[0][1] for curve in online_curves(cell)]


def online_regret(cell: Cell) -> list[float]:
    """The distances from an expert's score, averaged over the online phase."""
    return [regret(*zip(*curve, strict=True)) for curve in online_curves(cell) if len(curve) > 1]


def last_evaluations(cell: Cell, count: int) -> dict[str, list[tuple[int, float]]]:
    """By member that is left, steps and scores of the last phase's last evaluations, after some training in it."""
    for phase in ("online", "offline"):
        curves = cell.curves(phase, "score_mean")
        trained = {member: [(s, x) for s, x in sorted(curve.items()) if s > 0] for member, curve in curves.items()}
        if found := {member: x[-count:] for member, x in trained.items() if x and member not in cell.lost}:
            return found
    return {}


def about_data(cell: Cell) -> dict[str, Any] | None:
    """Returns of the dataset's own episodes; None where it was not trained on."""
    return cell.config.get("dataset_returns") if uses_data(cell.config) else None


def length_in_words(length: tuple[int, int]) -> str:
    """Such as `100,000 updates, then 50,000 steps online`."""
    parts = [f"{n:,} {what}" for n, what in zip(length, ("updates", "steps online"), strict=True) if n]
    return ", then ".join(parts) or "untrained"


def short_length(cell: Cell, cells: Sequence[Cell]) -> str:
    """Updates, or environment steps of a run that has only these, where the longest of the cells has more."""
    for name, unit in (("updates", ""), ("online_steps", " steps")):
        if 0 < cell.final[name] < max(other.final[name] for other in cells):
            return f"{cell.final[name]:,}{unit}"
    longest = max(sum(other.length) for other in cells)
    return length_in_words(cell.length) if sum(cell.length) < longest else ""
