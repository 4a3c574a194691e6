"""Updates per second of IQL beside other runs on the same cores, and where a container may use fewer than there are.

    python benchmarks/sharing.py
    python benchmarks/sharing.py --cgroup /sys/fs/cgroup/half

Runs of one member each, on random data of Hopper's sizes (benchmarks/accelerator.py), start together, with as many of
XLA's threads as the machine has cores or with one (NPROC). The figure is the sum of their rates; each ends by itself,
so the last ones have fewer beside them and the sum is a little high. The second command puts every run into a cgroup
with a quota, and names the row by it. The cgroup must exist; in version 2 `mkdir /sys/fs/cgroup/half;
echo "100000 100000" > /sys/fs/cgroup/half/cpu.max` makes one of a single core.

Rows go to `<out>.csv`, the table of the medians to `<out>.md`.
"""

import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.provenance import provenance
from benchmarks.tables import Table, commit_of, write_text
from common.cli import Count, Positive, UsageError, check_ranges, exit_status, read_flags
from common.members import usable_cores

SCRIPT = Path(__file__).resolve().with_name("accelerator.py")


@dataclass(frozen=True)
class Args:
    """Updates per second of IQL beside other runs on the same cores."""

    processes: tuple[int, ...] = (1, 2, 4)  # How many runs at once.
    threads: tuple[int, ...] = ()  # XLA's threads in each. Default: as many as there are cores, and 1.
    rounds: Count = 3  # Measurements of each, in turn.
    seconds: Positive = 10.0  # Least time of each.
    cgroup: Path | None = None  # A cgroup that the runs are put into.
    out: Path = Path("runs/sharing")  # Where results go, without suffix; a CSV that exists is gone on with.


def together(count: int, threads: int, args: Args) -> list[float]:
    """The rates of `count` runs that start together."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        tables = [Path(folder, f"{i}.csv") for i in range(count)]
        flags = ["--algorithms", "iql", "--members", "1", "--rows", "100000", "--seconds", str(args.seconds)]
        runs = []
        for path in tables:
            command = [sys.executable, str(SCRIPT), "--out", str(path), *flags]
            environment = os.environ | {"NPROC": str(threads), "JAX_PLATFORMS": "cpu"}
            runs.append(stack.enter_context(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)))
            stack.callback(runs[-1].kill)  # of no effect on one that has ended
            if args.cgroup:
                (args.cgroup / "cgroup.procs").write_text(str(runs[-1].pid))
        failed, rows = any([run.wait() for run in runs]), [row for path in tables for row in Table(path).read()]
        if failed or len(rows) < count:
            raise UsageError("a run failed; what it said is above")
        return [float(row["updates_per_second"]) for row in rows]


def report(out: Path) -> str:
    """The medians of the CSV, as Markdown."""
    rows = Table(out.with_name(f"{out.name}.csv")).read()
    found: dict[tuple[str, int, int], list[float]] = {}
    for row in rows:
        key = (row["quota"], int(row["processes"]), int(row["threads"]))
        found.setdefault(key, []).append(float(row["updates_per_second"]))
    lines = ["# IQL on shared cores\n\nMade by `python benchmarks/sharing.py`; rows with a quota by `--cgroup` too.\n"]
    lines += ["One member in each run, on random data. `quota`: none, or the name of the cgroup that limits the cores;"]
    lines += ["`threads each` is NPROC. Runs start together and each ends by itself: the last ones have fewer beside"]
    lines += ["them, so that the sum of several is a little high.\n"]
    lines += ["| quota | runs at once | threads each | updates/s, sum | min | max | rounds |", "|" + " --: |" * 7]
    for key, rates in sorted(found.items()):
        numbers = [f"{x:.0f}" for x in (statistics.median(rates), min(rates), max(rates))]
        lines.append(f"| {' | '.join(map(str, (*key, *numbers, len(rates))))} |")
    made = {(row["processor"], row["cores"], row["git_commit"]) for row in rows}
    lines += ["", *(f"- processor: {cpu}, {cores} cores; commit {commit}" for cpu, cores, commit in sorted(made))]
    loads = [float(row["load"]) for row in rows]
    return "\n".join([*lines, f"- load average at the start of each round: {min(loads):.1f} to {max(loads):.1f}", ""])


def main(args: Args) -> None:
    """Measure every combination in turn, a row after each; then write the table."""
    check_ranges(args)
    if not args.processes or min((*args.processes, *args.threads)) < 1:
        raise UsageError("--processes and --threads must be at least 1")
    about, table = provenance(), Table(args.out.with_name(f"{args.out.name}.csv"))
    made = {"processor": about["cpu"]["model"], "cores": about["cpu"]["cores"], "git_commit": commit_of(about)}
    if any(row[name] != str(value) for row in table.read() for name, value in made.items()):
        raise UsageError(f"{table.path} has rows of another machine or commit; give another --out")
    threads = args.threads or tuple(sorted({usable_cores(), 1}, reverse=True))
    for _ in range(args.rounds):
        for count in args.processes:
            for each in threads:
                load = os.getloadavg()[0]
                row = {"quota": args.cgroup.name if args.cgroup else "none", "processes": count, "threads": each}
                row |= {"updates_per_second": sum(together(count, each, args)), "load": load}
                table.append([row | made])
                print(", ".join(f"{name} {row[name]}" for name in ("processes", "threads", "updates_per_second")))
    text = report(args.out)
    write_text(args.out.with_name(f"{args.out.name}.md"), text)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # ends the runs too
    with exit_status():
        main(read_flags(Args, description=__doc__))
