"""The parts of a run that several processes trained with --shard I/N, put together as if one process had.

Tables have the rows of all parts, in the order in which one process would have written them; final.json has the members
of the parts that have finished. Merging again, when more parts have come, replaces what was merged before.
"""

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from benchmarks import intervals
from benchmarks.offax_sets import lock
from benchmarks.provenance import commits_of
from benchmarks.tables import Table
from common import runs
from common.cli import UsageError
from common.report import read_json, write_json

PHASES = ("pretraining", "offline", "online")
LENGTHS = ("pretraining_updates", "updates", "online_steps", "wall_clock_seconds")
# For each table, the key by which its rows are sorted.
ORDER: dict[str, Callable[[dict[str, str]], tuple[int, ...]]] = {
    "metrics.csv": lambda row: (int(row["step"]), int(row["member"])),
    "pretraining.csv": lambda row: (int(row["step"]), int(row["member"])),
    "evaluations.csv": lambda row: (PHASES.index(row["phase"]), int(row["step"]), int(row["member"])),
    "returns.csv": lambda row: (int(row["member"]), int(row["episode"])),
}


def parts_of(run_dir: Path) -> dict[int, Path]:
    """The parts that have begun, by number."""
    found = {path.parent.name.removeprefix("part-"): path.parent for path in run_dir.glob("part-*/config.json")}
    return {int(number): path for number, path in found.items() if number.isdecimal()}


def merging(run_dir: Path) -> AbstractContextManager[None]:
    """A lock for `merge` and the report on its results: parts that end together take turns, and the last has all."""
    return lock(run_dir / ".merge.lock", f"another process is merging {run_dir}")


def merge(run_dir: Path) -> list[str]:
    """Write the tables, config.json and final.json of `run_dir` from its parts; what is missing, in words.

    UsageError for parts that are not of one run.
    """
    parts = dict(sorted(parts_of(run_dir).items()))
    configs = {part: read_json(path / "config.json") for part, path in parts.items()}
    if alone := [part for part, config in configs.items() if not config["flags"]["shard"]]:
        raise UsageError(f"{parts[alone[0]]} is a run by itself, without --shard; it and others cannot be merged")
    first = next(iter(configs))
    total = int(configs[first]["flags"]["shard"].partition("/")[2])
    for part, config in configs.items():
        if odd := _difference(config, configs[first]):
            raise UsageError(f"{parts[part]} and {parts[first]} are not of one run: {odd}")
    finished = {part: read_json(path / "final.json") for part, path in parts.items() if (path / "final.json").exists()}
    for name in ORDER:
        _merge_table(run_dir / name, [path / name for path in parts.values()])
    config = configs[first] | {"run_dir": str(run_dir), "members": _members(configs.values())}
    config["flags"] = config["flags"] | {"shard": ""}
    config["git_commit"] = commits_of(configs.values())
    config["git_dirty"] = any(one.get("git_dirty") for one in configs.values())
    write_json(run_dir / "config.json", config)
    if finished:
        write_json(run_dir / "final.json", _final(list(finished.values())))
    else:
        (run_dir / "final.json").unlink(missing_ok=True)
    missing = {part: "has not begun" if part not in parts else "has not finished" for part in range(total)}
    return [f"part {part} of {total} {what}" for part, what in missing.items() if part not in finished]


def check_part(path: Path, config: dict[str, Any]) -> None:
    """UsageError if a part of this config.json is of another run than those beside it; before it trains.

    Lengths may differ then: parts are resumed one by one.
    """
    for other in parts_of(path.parent).values():
        if other != path and (odd := _difference(config, read_json(other / "config.json"), but=runs.LENGTHS)):
            raise UsageError(f"{path} and {other} would not be of one run: {odd}; use another --run-dir")


def _difference(one: dict[str, Any], other: dict[str, Any], but: Collection[str] = ()) -> str:
    """The first thing that all parts of a run must share and these two do not, in words; empty if there is none."""
    ours, theirs = (
        {"algorithm": config["algorithm"], "dataset_sha256": config["dataset_sha256"]}
        | {name: value for name, value in config["flags"].items() if name not in {*runs.FREE, *but}}
        | {"shard": config["flags"]["shard"].partition("/")[2]}
        for config in (one, other)
    )
    unlike = [name for name in ours if ours[name] != theirs.get(name, ours[name])]  # a flag may be newer than a part
    return f"{unlike[0]} {ours[unlike[0]]} and {theirs[unlike[0]]}" if unlike else ""


def _members(records: Any) -> list[dict[str, Any]]:
    return sorted((member for record in records for member in record["members"]), key=lambda member: member["member"])


def _final(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """final.json of all: lengths and time are those of the longest part, rates are summed, as they are over members.

    A part is shorter than the others where all of its members diverged.
    """
    members = _members(parts)
    rates = {name: [part[name] for part in parts] for name in ("updates_per_second", "online_steps_per_second")}
    return (
        parts[0]
        | {"members": members}
        | intervals.summarise(members)
        | {name: max(part[name] for part in parts) for name in LENGTHS if name in parts[0]}
        | {name: None if None in values else sum(values) for name, values in rates.items()}
    )


def _merge_table(path: Path, parts: Sequence[Path]) -> None:
    """Write the rows of all parts to `path` in order; nothing where no part has the table."""
    Table(path).replace(sorted((row for part in parts for row in Table(part).read()), key=ORDER[path.name]))
