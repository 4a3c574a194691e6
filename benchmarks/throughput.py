"""Speed on this machine: of IQL's populations, or of every algorithm at its default sizes.

    python benchmarks/throughput.py
    python benchmarks/throughput.py --algorithms True

Every figure is that of a script in `algorithms/` itself, run on synthetic data: nothing of the product is imitated.
Without the flag it is IQL, with 17 observations and 6 actions (those of HalfCheetah and Walker2d):

* updates/s: `updates_per_second` of final.json, summed over the members; evaluation, checkpoints and the first
  stretch of 100 updates, which compiles, are outside of it. Runs of all population sizes take turns, so that whatever
  else the machine does meets them alike; the load average at each start is recorded. More members stop paying at the
  smallest population whose median is within 3 % of the best.
* time to the first update: from just before the process is started until the first row of metrics.csv is written,
  with --num-updates 1, so that this row is one update; and again with what a run does first by default, an
  evaluation of the untrained policy. Cold: JAX's compilation cache is empty; warm: a run has filled
  it. Python and its packages are on the disk or in the system's page cache, as they happen to be.
* peak memory: the process's largest resident set (`ru_maxrss` of wait4), over the whole run. The first run of a size
  compiles, which takes up to 200 MiB more; the others find its programs in the cache. Memory per member: the slope of
  the straight line that fits these by least squares over the number of members.

It writes a row for each measurement to `<output>.csv` and the table made from them to `<output>.md`.

With the flag it is one member of each script in turn, once, for some five minutes in all, with 11 observations and 3
actions (Hopper's): updates/s and peak memory as above, and the hours that a million updates take at that rate. EMaQ
fits its behaviour model before these; the hours of that are a column of their own. EMaQ's data are few rows, so that
the redrawing of its proposals falls into the time that is measured. Rows go to `<output>.csv`, the table of them into
the pages that have a place for it.
"""

import importlib
import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.peer_sides import synthetic
from benchmarks.provenance import provenance
from benchmarks.tables import Table, commit_of, fill, write_text
from common.cli import Count, UsageError, check_ranges, exit_status, parse, read_flags
from common.runs import STRETCH

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = Path("algorithms", "iql.py")
ENV, OBS_DIM, ACTION_DIM = "Walker2d-v5", 17, 6
PAGES = (ROOT / "README.md", ROOT / "algorithms" / "README.md")
NEAR_BEST = 0.97
"""Share of the best rate that is as good."""
QUANTITIES = {
    "updates/s": "updates/s, all members",
    "first update, cold": "first update, no compilation cache",
    "first update, warm": "first update, warm cache",
    "first update, cold, evaluation first": "first update after the evaluation at 0, no compilation cache",
    "first update, warm, evaluation first": "first update after the evaluation at 0, warm cache",
    "peak memory": "peak memory",
}


@dataclass(frozen=True)
class Args:
    """Speed on this machine."""

    populations: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)  # Members of the populations whose updates are timed.
    repeats: Count = 5  # Measurements of each figure.
    timed_updates: Count = 4000  # Updates of all members together that are timed in a run; at least 1000 of each.
    transitions: Count = 200_000  # Rows of the synthetic dataset.
    # Measure every algorithm instead. Of the flags above it uses --timed-updates: its lengths are for 4000.
    algorithms: bool = False
    # Without its endings .csv and .md. Default: results/throughput, or results/speed for all algorithms.
    output: Path | None = None


class Script(NamedTuple):
    """What `--algorithms True` runs: `updates` that are timed after the `first` ones, on `rows` transitions."""

    name: str
    flags: str = ""
    updates: int = 2000
    first: int = STRETCH
    rows: int = 200_000
    behavior_updates: int = 0


SCRIPTS = (
    Script("iql"),
    Script("awac"),
    Script("awr", updates=10_000, first=1000),
    Script("td3_bc", updates=4000),
    Script("cql", updates=200),
    Script("cql", "--preset cpu", updates=400),
    Script("emaq", "--preset cpu", updates=1250, rows=20_000, behavior_updates=1100),
    Script("emaq", updates=63, first=63, rows=2000, behavior_updates=1100),
)


class Measured(NamedTuple):
    """What one run of a script gave; rates are None where fewer than two stretches ran."""

    updates_per_second: float | None
    first_row_seconds: float
    peak_bytes: int
    behavior_updates_per_second: float | None


def measure(
    dataset: Path, run_dir: Path, cache: Path, flags: Sequence[str], script: Path = SCRIPT, env: str = ENV
) -> Measured:
    """Run the script once. UsageError if it fails."""
    words = ["--dataset", str(dataset), "--env", env, "--run-dir", str(run_dir), *flags]
    run_dir.mkdir(parents=True)
    with open(run_dir / "log.txt", "w") as log:
        start = time.time()
        process = subprocess.Popen(
            [sys.executable, str(ROOT / script), *words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PLATFORMS": "cpu"},
        )
        try:
            _, status, usage = os.wait4(process.pid, 0)  # this child's memory alone
        except BaseException:
            process.kill()
            raise
        process.returncode = os.waitstatus_to_exitcode(status)
    log_text = (run_dir / "log.txt").read_text()
    if process.returncode:
        raise UsageError(f"{script} {shlex.join(map(str, words))}: {log_text.strip()[-500:]}")
    final = json.loads((run_dir / "final.json").read_text())
    unit = 1 if sys.platform == "darwin" else 1024
    first = (run_dir / "metrics.csv").stat().st_mtime - start
    behavior = re.search(r"pretraining (\d+)/\1, (\d+)/s", log_text)  # where the run is not quiet
    behavior_rate = float(behavior[2]) if behavior else None
    return Measured(final["updates_per_second"], first, usage.ru_maxrss * unit, behavior_rate)


class Job(NamedTuple):
    """One run of the script; runs with the same `cache` share JAX's compilation cache, which starts empty."""

    quantity: str
    members: int
    flags: str
    cache: str


def plan(args: Args, repeat: int) -> list[Job]:
    """One round: every population size, then cold and warm starts."""
    shared = "--checkpoint-every 0 --final-eval-episodes 1 --quiet True"
    jobs = []
    for members in args.populations:
        updates = STRETCH + max(1000, -(-args.timed_updates // members // 1000) * 1000)
        flags = f"--num-seeds {members} --num-updates {updates} --eval-every 0 {shared}"
        jobs.append(Job("updates/s", members, flags, "rates"))
    # Without and with what the script does first by default: evaluate ten episodes of the untrained policy.
    for ending, every in (("", 0), (", evaluation first", 10_000)):
        for kind in ("cold", "warm"):
            flags = f"--num-seeds 1 --num-updates 1 --eval-every {every} {shared}"
            jobs.append(Job(f"first update, {kind}{ending}", 1, flags, f"start-{repeat}{ending}"))
    return jobs


def start_table(args: Args) -> tuple[Table, dict[str, Any]]:
    """An empty table, and the columns that say what made its rows."""
    path = args.output or Path("results", "speed" if args.algorithms else "throughput")
    path = path.with_name(path.name + ".csv")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    about = provenance()
    shared = {
        "cpu": about["cpu"]["model"],
        "cores": about["cpu"]["cores"],
        "git_commit": commit_of(about),
    } | {name: about["versions"][name] for name in ("python", "jax", "jaxlib", "flax", "optax", "numpy")}
    return Table(path), shared


def run(args: Args) -> None:
    """All measurements of IQL, a row of the CSV after each."""
    check_ranges(args)
    if any(members < 1 for members in args.populations):
        raise UsageError("--populations must be at least 1")
    table, shared = start_table(args)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        dataset = folder / "synthetic.npz"
        np.savez(dataset, **synthetic(args.transitions, OBS_DIM, ACTION_DIM))
        for repeat in range(args.repeats):
            for number, job in enumerate(plan(args, repeat)):
                load = os.getloadavg()[0]
                run_dir = folder / f"run-{repeat}-{number}"
                measured = measure(dataset, run_dir, folder / job.cache, job.flags.split())
                if job.quantity == "updates/s":
                    memory = measured.peak_bytes / 2**20
                    values = {"updates/s": (measured.updates_per_second, "1/s"), "peak memory": (memory, "MiB")}
                else:
                    values = {job.quantity: (measured.first_row_seconds, "s")}
                for quantity, (value, unit) in values.items():
                    row = {"date": time.strftime("%Y-%m-%d %H:%M:%S"), "quantity": quantity, "members": job.members}
                    row |= {"repeat": repeat, "value": value, "unit": unit, "load_average": load}
                    command = f"python {SCRIPT} --dataset synthetic.npz --env {ENV} {job.flags}"
                    table.append([row | shared | {"transitions": args.transitions, "command": command}])
                    print(f"{quantity}, {job.members} members, repeat {repeat}: {value:.4g} {unit}", flush=True)
                write_text(table.path.with_suffix(".md"), report(table.path))


def run_algorithms(args: Args, scripts: Sequence[Script] = SCRIPTS, pages: Sequence[Path] = PAGES) -> None:
    """Every script once, a row of the CSV after each, and the table made from them into `pages`."""
    table, shared = start_table(args)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for number, one in enumerate(scripts):
            dataset, script = folder / f"synthetic-{one.rows}.npz", Path("algorithms", f"{one.name}.py")
            np.savez(dataset, **synthetic(one.rows))
            module = importlib.import_module(f"algorithms.{one.name}")
            usual = parse(module.Args, module.PRESETS, ["--env", "Hopper-v5", *one.flags.split()])
            updates = one.first + max(1, one.updates * args.timed_updates // Args.timed_updates)
            flags = f"{one.flags} --num-updates {updates} --eval-every 0 --checkpoint-every 0 --final-eval-episodes 1"
            if one.behavior_updates:
                flags += f" --behavior-updates {one.behavior_updates}"
            busy = os.getloadavg()[0]
            found = measure(dataset, folder / f"run-{number}", folder / "cache", flags.split(), script, "Hopper-v5")
            row = {"date": time.strftime("%Y-%m-%d %H:%M:%S"), "script": f"{one.name}.py {one.flags}".strip()}
            row |= {"updates_per_second": found.updates_per_second}
            row |= {"hours_per_million_updates": 1e6 / found.updates_per_second / 3600}
            row |= {"behavior_updates_per_second": found.behavior_updates_per_second, "behavior_hours": None}
            if found.behavior_updates_per_second:
                row["behavior_hours"] = usual.behavior_updates / found.behavior_updates_per_second / 3600
            row |= {"peak_mib": found.peak_bytes / 2**20, "rows": one.rows, "load_average": busy}
            command = f"python {script} --dataset synthetic.npz --env Hopper-v5 {flags.strip()}"
            table.append([row | shared | {"command": command}])
            print(f"{row['script']}: {found.updates_per_second:.4g} updates/s, {row['peak_mib']:.0f} MiB", flush=True)
    for page in pages:
        fill(page, "speed", speed_table(table.read()))


def speed_table(rows: Sequence[dict[str, str]]) -> str:
    """The table of the rows of `run_algorithms`, in Markdown, and what made it."""
    lines = [
        "| script | updates/s | hours for a million updates | hours for its behaviour model | peak memory, MiB |",
        "| :-- | --: | --: | --: | --: |",
    ]
    for row in rows:
        figures = (row["updates_per_second"], row["hours_per_million_updates"], row["behavior_hours"])
        cells = [f"{float(x):.{1 if float(x) >= 1 else 2}f}" if x else "-" for x in figures]
        lines.append(f"| `{row['script']}` | {' | '.join(cells)} | {float(row['peak_mib']):.0f} |")
    first, loads = rows[0], [float(row["load_average"]) for row in rows]
    fewer = [f"`{row['script']}` on {int(row['rows']):,}" for row in rows if row["rows"] != first["rows"]]
    about = (
        f"One member with Hopper's sizes on {first['cores']} cores ({first['cpu']}), a run each, {first['date'][:10]}; "
        f"on {int(first['rows']):,} transitions, with which memory grows{''.join(f', {x}' for x in fewer)}; "
        f"load average at the starts {min(loads):.1f} to {max(loads):.1f}; JAX {first['jax']}; "
        f"commit {first['git_commit'][:12]}. Made by `python benchmarks/throughput.py --algorithms True`."
    )
    return "\n".join([*lines, "", about])


def report(path: Path) -> str:
    """The Markdown page made from the CSV at `path`."""
    rows = Table(path).read()
    groups: dict[tuple[str, int], list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault((row["quantity"], int(row["members"])), []).append(row)
    order = list(QUANTITIES)
    lines = ["| quantity | members | median | min | max | runs | unit |", "| :-- | --: | --: | --: | --: | --: | :-- |"]
    for quantity, members in sorted(groups, key=lambda key: (order.index(key[0]), key[1])):
        group = groups[quantity, members]
        values = [float(row["value"]) for row in group]
        digits = 1 if group[0]["unit"] == "s" else 0
        numbers = [f"{x:.{digits}f}" for x in (statistics.median(values), min(values), max(values))]
        cells = [QUANTITIES[quantity], str(members), *numbers, str(len(values)), group[0]["unit"]]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *scaling(groups)]
    loads = [float(row["load_average"]) for row in rows]

    def distinct(*names: str) -> str:
        return "; ".join(dict.fromkeys(" ".join([row[name] for name in names]) for row in rows))

    packages = ("python", "jax", "jaxlib", "flax", "optax", "numpy")
    commands = "\n".join(dict.fromkeys(row["command"] for row in rows))
    return "\n".join(
        [
            "# Throughput of IQL\n",
            f"Made by `python benchmarks/throughput.py --repeats {max(map(len, groups.values()))}`, whose head says "
            "what each figure is.\n",
            *lines,
            "",
            f"- data: {distinct('transitions')} transitions, {OBS_DIM} observations, {ACTION_DIM} actions",
            f"- processor: {distinct('cpu')}, {distinct('cores')} cores; load average at the start of each run "
            f"{min(loads):.1f} to {max(loads):.1f}",
            f"- date: {rows[0]['date']} to {rows[-1]['date']}; commit: {distinct('git_commit')}",
            f"- versions: {', '.join(f'{name} {distinct(name)}' for name in packages)}",
            f"\n```sh\n{commands}\n```\n",
        ]
    )


def scaling(groups: dict[tuple[str, int], list[dict[str, str]]]) -> list[str]:
    """Lines on how speed and memory grow with the members; none for what one population size cannot tell."""

    def measured(quantity: str) -> dict[int, list[float]]:
        return {n: [float(row["value"]) for row in groups[name, n]] for name, n in sorted(groups) if name == quantity}

    lines = []
    rates = {members: statistics.median(values) for members, values in measured("updates/s").items()}
    if len(rates) > 1:
        pays = min(members for members, rate in rates.items() if rate >= NEAR_BEST * max(rates.values()))
        more = "more members no longer add" if pays < max(rates) else "more than that were not measured, and may add"
        lines.append(f"- members: {pays} reach {rates[pays]:.0f} updates/s together; {more} to it")
    memory = measured("peak memory")
    if len(memory) > 1:
        points = [(members, value) for members, values in memory.items() for value in values]
        slope = np.polyfit(*zip(*points, strict=True), 1)[0]
        lines.append(f"- memory per member: {slope:.1f} MiB")
    return lines


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # ends the run in progress, cleans up
    with exit_status():
        args = read_flags(Args)
        (run_algorithms if args.algorithms else run)(args)
