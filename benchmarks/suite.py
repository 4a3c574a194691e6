"""Train several algorithms on several datasets, a population of seeds at a time, and keep the small files.

    python benchmarks/suite.py --name mine --algorithms iql bc --datasets offax/hopper/medium-v1
    python -m benchmarks.report results/mine

Each pair of algorithm and dataset is one process, the algorithm's own script, with all seeds as one population. All
algorithms run on the first dataset before any runs on the second, so that a part of the suite compares them already.
Checkpoints stay in `<runs-dir>/<name>/<algorithm>_<dataset>`; `config.json`, `final.json`, `evaluations.csv` and
`command.json` are copied to `<results-dir>/<name>/<algorithm>_<dataset>`.

Start it again after an interruption: what has finished with the same command is skipped, what is half done is resumed
from its checkpoint. A run that fails does not stop the others. Exit status: 0 when all runs are done, 1 when any
failed, 2 for bad usage, 128 + n after signal n, with a checkpoint written by the run that it stopped.
"""

import importlib
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.tables import file_name
from common.cli import UsageError, exit_status, parse, read_flags
from common.report import write_atomically, write_json

ROOT = Path(__file__).resolve().parent.parent
KEPT = ("config.json", "final.json", "evaluations.csv")
OURS = ("dataset", "seed", "num_seeds", "num_updates", "run_dir", "resume")
DIVERGED = 3
"""Exit status of a script all of whose members diverged: it is finished, and has a final.json."""


@dataclass(frozen=True)
class Args:
    """Train several algorithms on several datasets, a population of seeds at a time."""

    name: str  # Names the folders of this suite under --runs-dir and --results-dir.
    algorithms: tuple[str, ...] = ("iql", "bc")  # Scripts in algorithms/ or benchmarks/, without their .py.
    # Dataset ids or paths, in the order in which they are run.
    datasets: tuple[str, ...] = (
        "offax/hopper/medium-v1",
        "offax/hopper/mixed-v1",
        "offax/hopper/medium-expert-v1",
    )
    seed: int = 0  # First seed.
    num_seeds: int = 3  # Seeds of each algorithm on each dataset, trained in one process.
    num_updates: int = 100_000  # Offline gradient updates.
    extra: str = ""  # More flags for every script: --extra="--eval-every 5000 --final-eval-episodes 50".
    # Follows the names of this call's runs, so that the same algorithms can join the suite with other flags.
    label: str = ""
    runs_dir: Path = Path("runs/suite")  # Where run directories with checkpoints go.
    results_dir: Path = Path("results")  # Where the small files go.


@dataclass(frozen=True)
class Job:
    """One process: an algorithm on a dataset, with all seeds."""

    name: str
    script: Path
    flags: tuple[str, ...]
    run_dir: Path
    results_dir: Path

    @property
    def command(self) -> str:
        """The command line, from the repository's root."""
        return shlex.join(["python", str(self.script), *self.flags])

    def finished(self) -> dict[str, Any] | None:
        """The record of a run that ended with this very command; None if there is none."""
        try:
            record = json.loads((self.run_dir / "command.json").read_text())
        except (OSError, ValueError):
            return None
        same = isinstance(record, dict) and record.get("command") == self.command
        return record if same and (self.run_dir / "final.json").exists() else None

    def keep(self) -> None:
        """Copy the small files to the results, in place of those of an earlier run."""
        self.results_dir.mkdir(parents=True, exist_ok=True)
        for name in (*KEPT, "command.json"):
            source, kept = self.run_dir / name, self.results_dir / name
            if source.exists():
                write_atomically(kept, lambda file, source=source: file.write(source.read_bytes()))
            else:  # no evaluation where every member diverged before the first
                kept.unlink(missing_ok=True)


def find_script(algorithm: str) -> Path:
    """`algorithms/<name>.py` or `benchmarks/<name>.py`, relative to the repository's root."""
    for folder in ("algorithms", "benchmarks"):
        if re.fullmatch(r"\w+", algorithm) and (ROOT / folder / f"{algorithm}.py").is_file():
            return Path(folder, f"{algorithm}.py")
    raise UsageError(
        f"--algorithms {algorithm}: there is no algorithms/{algorithm}.py and no benchmarks/{algorithm}.py"
    )


def script_of(algorithm: str) -> ModuleType:
    """The module of an algorithm's script; UsageError if it is none that learns from a dataset."""
    script = importlib.import_module(".".join(find_script(algorithm).with_suffix("").parts))
    if not (hasattr(script, "Args") and hasattr(script, "PRESETS")):
        raise UsageError(f"--algorithms {algorithm}: {algorithm}.py does not learn from a dataset")
    return script


def plan(args: Args) -> list[Job]:
    """The suite's jobs in order: for each dataset, all algorithms. UsageError for flags that a script would refuse."""
    for flag, name in (("name", args.name), ("label", args.label or "none")):
        if not re.fullmatch(r"[\w.-]*\w[\w.-]*", name):
            raise UsageError(f'--{flag} "{name}": letters, digits, "_", "-" and "." only')
    try:
        extra = shlex.split(args.extra)
    except ValueError as error:  # a quotation without its end
        raise UsageError(f"--extra {args.extra}: {error}") from None
    for word in extra:
        flag = word.partition("=")[0].removeprefix("--").replace("-", "_")
        if word.startswith("--") and flag in OURS:
            raise UsageError(f"--extra: {word} is set by the suite itself")
    jobs = []
    for dataset in args.datasets:
        for algorithm in args.algorithms:
            name = f"{algorithm}_{file_name(dataset)}"
            name += f"_{args.label}" if args.label else ""
            run_dir = args.runs_dir / args.name / name
            flags = {
                "dataset": dataset,
                "seed": args.seed,
                "num-seeds": args.num_seeds,
                "num-updates": args.num_updates,
                "run-dir": run_dir,
                "resume": True,
                "quiet": True,
            }
            words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
            results_dir = args.results_dir / args.name / name
            jobs.append(Job(name, find_script(algorithm), (*words, *extra), run_dir, results_dir))
    if not jobs:
        raise UsageError("nothing to run: --algorithms and --datasets need one each at least")
    refuse_repeated(jobs)
    for algorithm, job in zip(args.algorithms, jobs, strict=False):  # those of the first dataset
        script = script_of(algorithm)
        parse(script.Args, script.PRESETS, list(job.flags))
    return jobs


def refuse_repeated(jobs: list[Job]) -> None:
    """UsageError if two jobs have the same name, and so the same folders."""
    names = [job.name for job in jobs]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise UsageError(f"more than one run would be called {sorted(repeated)[0]}; a label tells them apart")


def run(job: Job) -> int:
    """Start or resume the job and wait for it; its exit status, 128 + n after signal n. Output goes to log.txt."""
    job.run_dir.mkdir(parents=True, exist_ok=True)
    received: list[int] = []
    start = time.time()
    with open(job.run_dir / "log.txt", "a") as log:
        log.write(f"$ {job.command}\n")
        log.flush()
        # In a session of its own: a Ctrl-C reaches it once, from here, and it has the time to write its checkpoint.
        process = subprocess.Popen(
            [sys.executable, str(ROOT / job.script), *job.flags],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

        def forward(number: int, _: Any) -> None:
            received.append(number)
            process.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)

        signals = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # its terminal may be closed; under nohup it goes on
            signals.append(signal.SIGHUP)
        handlers = {number: signal.signal(number, forward) for number in signals}
        try:
            status = process.wait()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    if status in (0, DIVERGED):
        record = {"command": job.command, "exit_status": status, "seconds": time.time() - start}
        write_json(job.run_dir / "command.json", record)
    return 128 + received[0] if received else status


def last_line(path: Path) -> str:
    """The last line of a log that is not blank."""
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""


def main(args: Args) -> int:
    """Run what is not done yet; the exit status."""
    jobs, failures = plan(args), []
    for number, job in enumerate(jobs, 1):
        label = f"[{number}/{len(jobs)}] {job.name}"
        record = job.finished()
        if record is not None:
            status, what = int(record["exit_status"]), "skipped, it is done"
        else:
            print(f"{label}: {job.command}", flush=True)
            status = run(job)
            if status > 128:
                print(f"{label}: stopped; start the suite again to go on", file=sys.stderr)
                return status
            what = last_line(job.run_dir / "log.txt")
        if status in (0, DIVERGED):
            job.keep()
        if status:
            failures.append(job.name)
            what = f"every member diverged; {what}" if status == DIVERGED else f"failed with status {status}: {what}"
        print(f"{label}: {what}", flush=True)
    if failures:
        print(f"{len(failures)} of {len(jobs)} runs failed: {', '.join(failures)}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    with exit_status():
        sys.exit(main(read_flags(Args)))
