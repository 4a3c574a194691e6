"""Speed of the updates here beside those of CORL, JAX-CORL and unifloral, on the same arrays, taking turns in one run.

    python benchmarks/peers.py --corl ../CORL --jax-corl ../JAX-CORL --unifloral ../unifloral --out results/peers

The paths are your own clones of github.com/tinkoff-ai/CORL, nissymori/JAX-CORL and EmptyJackson/unifloral. Their files
are imported from there as they stand, and their own functions do the updates in the way their own scripts call them:

* CORL: `ReplayBuffer.sample`, then the trainer's update, one after the other, in PyTorch, with one thread or as many as
  there are cores, whichever was faster while warming up;
* JAX-CORL: the compiled `update_n_times` of eight updates, called again and again;
* unifloral: one compiled scan over `make_train_step`;
* Offax: the compiled `train`, mapped over the population as every run does it.

What decides the time is the same on both sides: arrays of Hopper's sizes, batch, networks, critics, sampled actions.
Where it cannot be, the remark of the row says so, and the table on the page has the number of parameters of both sides.
An update is one step of the critics with whatever the algorithm does beside it. Evaluation and logging are left out.

Each side has a process of its own, so that an import that fails, or a flag that a peer sets, is its own affair. A peer
that cannot run is named in the table, with the reason. All sides are compiled and warm before the first round; in each
round every one runs alone for --seconds, in turn, and every second round in reverse order. Rates are medians over the
rounds; a ratio is the median of the rounds' own ratios, with the smallest and the largest.

Packages that the peers import for data, flags and logging only (d4rl, gym, mujoco_py, omegaconf, pydantic, pyrallis,
tqdm, wandb) are replaced by empty ones: none takes part in an update. distrax does; where it cannot be imported, the
few distributions of `benchmarks/peer_sides.py` stand in for it, and the remark says so. So CORL needs torch, the others
nothing more than Offax.

Exit status: 0 when something was compared, 1 when no peer could run, 2 for bad usage.
"""

import contextlib
import importlib.metadata
import multiprocessing
import os
import shlex
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import peer_sides
from benchmarks.peer_sides import ONCE, OURS, Info, PeerError, Side
from benchmarks.provenance import commit_at, provenance
from benchmarks.tables import Table, aligned, commit_of, write_text
from common.cli import Count, Positive, UsageError, check_ranges, exit_status, read_flags

TITLES = {"iql": "IQL", "td3_bc": "TD3+BC", "awac": "AWAC", "cql": "CQL"}
SETTINGS = {
    "iql": {"num_layers": 2, "num_critics": 2},
    "td3_bc": {"num_layers": 2, "num_critics": 2},
    "awac": {"num_layers": 3, "num_critics": 2},
    "cql": {"num_layers": 3, "num_critics": 2, "num_actions": 10},
}
"""Hidden layers of every network, critics, and sampled actions of each kind; both sides of a comparison have them."""
OWN_SETTINGS = {
    ("unifloral", "cql"): {"num_layers": 3, "num_critics": 10, "num_actions": 1, "entropy_backup": True},
}
"""Where a peer's code fixes other ones, both sides have those."""
REMARKS = {
    ("JAX-CORL", "iql"): "its LayerNorm in V is switched off",
    ("JAX-CORL", "td3_bc"): "its critics have LayerNorm",
    ("JAX-CORL", "awac"): "its critics have LayerNorm; its target moves once in 8 updates, with actions drawn at s",
    ("unifloral", "td3_bc"): "its step, 2 updates of the critics on one batch and 1 of the policy, counts as 2 updates",
    ("unifloral", "cql"): "both sides have its 10 critics, 1 action of each kind, and entropy in the target",
}

WITH_ONE_VALUE = ("unifloral", "iql")  # Where ours is timed with V evaluated once too, as the peer does.


@dataclass(frozen=True)
class Clones:
    """What is compared, and where the results go."""

    corl: Path | None = None  # Your clone of CORL.
    jax_corl: Path | None = None  # Your clone of JAX-CORL.
    unifloral: Path | None = None  # Your clone of unifloral.
    algorithms: tuple[str, ...] = tuple(SETTINGS)  # Algorithms to compare.
    out: Path | None = None  # Results go to this name with .csv and .md. Default: the terminal only.

    def clones(self) -> dict[str, Path | None]:
        """The path of each peer's clone."""
        return {"CORL": self.corl, "JAX-CORL": self.jax_corl, "unifloral": self.unifloral}

    def validate(self) -> None:
        """UsageError for a number out of range, or flags that leave nothing to do."""
        check_ranges(self)
        if all(path is None for path in self.clones().values()):
            raise UsageError("give the path of a clone: --corl, --jax-corl or --unifloral")
        if missing := [path for path in self.clones().values() if path is not None and not path.is_dir()]:
            raise UsageError(f"there is no directory {missing[0]}")
        for algorithm in self.algorithms:
            if algorithm not in SETTINGS:
                raise UsageError(f"--algorithms {algorithm}: choose from {', '.join(SETTINGS)}")
        if not self.algorithms:
            raise UsageError(f"--algorithms: name at least one of {', '.join(SETTINGS)}")

    def sides(self, algorithm: str) -> list[Side]:
        """The peers' sides, with the settings that both sides of a comparison have."""
        found = []
        for name, path in self.clones().items():
            settings = OWN_SETTINGS.get((name, algorithm), SETTINGS[algorithm])
            found.append(Side(name, algorithm, tuple(settings.items()), path))
        return found


@dataclass(frozen=True)
class Args(Clones):
    """Speed of the updates here beside those of CORL, JAX-CORL and unifloral."""

    # Members of our population, which is timed too; its rate is that of all members together. 1: none.
    members: Count = 8
    rounds: Count = 7  # Turns of every side.
    seconds: Positive = 2.0  # Length of a turn, at least.


class Worker:
    """A side in a process of its own. PeerError, with the reason, when it cannot go on."""

    def __init__(self, side: Side, data: Path, seconds: float) -> None:
        context = multiprocessing.get_context("spawn")  # a process that has not started JAX or threads
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=peer_sides.serve, args=(theirs, side, data, seconds), daemon=True)
        self.process.start()
        theirs.close()
        try:
            self.info: Info = self.result()
        except BaseException:
            self.close()
            raise

    def go(self) -> None:
        """Begin a turn."""
        with contextlib.suppress(OSError):  # it has ended, which `result` finds
            self.connection.send("go")

    def turn(self) -> tuple[int, float]:
        """Updates of one member, and seconds, of a whole turn."""
        self.go()
        return self.result()

    def close(self) -> None:
        """End the process, which has nothing to save."""
        self.connection.close()
        self.process.kill()
        self.process.join()

    def result(self) -> Any:
        """What it answers: of a turn, updates of one member and seconds."""
        try:
            answer = self.connection.recv()
        except (EOFError, OSError):
            self.process.join(2)
            raise PeerError(f"its process ended with status {self.process.exitcode}") from None
        if isinstance(answer, PeerError):
            raise answer
        return answer


class Ratio(NamedTuple):
    """Of two rates in the same rounds: the median of the rounds' ratios, the smallest and the largest."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Ours divided by theirs; both are rates by round."""
    values = [x / y for x, y in zip(ours, theirs, strict=True)]
    return Ratio(statistics.median(values), min(values), max(values))


class Comparison(NamedTuple):
    """A peer's side, ours and our population; rates are updates/s of all members by round, empty where not timed."""

    side: Side
    theirs: list[float]
    ours: list[float]
    population: list[float]
    parameters: tuple[int, int] | None  # Trained ones, of the peer and of one member here.
    remark: str


def compare(
    algorithm: str, args: Args, data: Path, write: Callable[[dict[str, Any]], None]
) -> tuple[list[Comparison], set[str]]:
    """All peers of one algorithm, and the devices that were used; `write` gets a row for each turn and each failure."""
    workers: dict[Side, Worker] = {}
    rates: dict[Side, list[float]] = {}
    reasons: dict[Side, str] = {}

    def give_up(side: Side, error: PeerError) -> None:
        if side.name in (OURS, ONCE):
            raise RuntimeError(f"{side}: {error.args[-1]}")
        reasons[side] = f"not timed: {error.args[0]}"
        rates.pop(side, None)
        print(f"{side}: {reasons[side]}", flush=True)
        write(describe(side) | {"error": error.args[0]})

    def start(side: Side) -> None:
        try:
            if side.name not in (OURS, ONCE):
                peer_sides.script(side)
            print(f"{side}: starting", flush=True)
            workers[side] = Worker(side, data, args.seconds)
            rates[side] = []
        except PeerError as error:
            give_up(side, error)

    def ours(side: Side, members: int) -> Side:
        return Side(OURS, algorithm, side.settings, members=members)

    peers = args.sides(algorithm)
    try:
        for side in peers:
            start(side)
        for side in list(rates):  # ours, in every form that a peer needs
            for members in sorted({1, args.members}):
                if ours(side, members) not in rates:
                    start(ours(side, members))
            if (side.name, algorithm) == WITH_ONE_VALUE:
                start(side._replace(name=ONCE, path=None))
        for number in range(1, args.rounds + 1):
            for side in list(rates)[:: 1 if number % 2 else -1]:
                load = os.getloadavg()[0]
                try:
                    updates, seconds = workers[side].turn()
                except PeerError as error:
                    give_up(side, error)
                    continue
                rate = updates * side.members / seconds
                rates[side].append(rate)
                print(f"{side}, round {number}: {rate:.1f} updates/s", flush=True)
                measured = {"round": number, "updates": updates * side.members, "seconds": seconds}
                measured |= {"updates_per_second": rate, "load_average": load}
                write(describe(side, workers[side].info) | measured)
    finally:
        for worker in workers.values():
            worker.close()

    found = []
    for side in peers:
        if side not in rates:
            found.append(Comparison(side, [], [], [], None, reasons[side]))
            continue
        one, population = ours(side, 1), rates[ours(side, args.members)] if args.members > 1 else []
        remark = "; ".join(filter(None, (REMARKS.get((side.name, algorithm)), workers[side].info.remark)))
        if (side.name, algorithm) == WITH_ONE_VALUE:
            rate = rates[side._replace(name=ONCE, path=None)]
            once = f"with V evaluated once, as it does, ours: {rate_text(rate)}, ratio {ratio(rate, rates[side])}"
            remark = "; ".join(filter(None, (remark, once)))
        parameters = (workers[side].info.parameters, workers[one].info.parameters)
        found.append(Comparison(side, rates[side], rates[one], population, parameters, remark))
    return found, {workers[side].info.device for side in rates}


def describe(side: Side, info: Info | None = None) -> dict[str, Any]:
    """The columns of the CSV, with those that name the side filled in."""
    settings = dict(side.settings)
    return {
        "date": now(),
        "algorithm": side.algorithm,
        "side": side.name,
        "members": side.members,
        **{name: settings.get(name) for name in SETTINGS["cql"]},
        "parameters": None if info is None else info.parameters,
        "device": None if info is None else info.device,
        **dict.fromkeys(("round", "updates", "seconds", "updates_per_second", "load_average", "error")),
    }


def rate_text(rates: Sequence[float]) -> str:
    """The median; one decimal below 100."""
    if not rates:
        return ""
    median = statistics.median(rates)
    return f"{median:.0f}" if median >= 100 else f"{median:.1f}"


def label(side: Side) -> str:
    """Algorithm and peer."""
    return f"{TITLES[side.algorithm]}, {side.name}"


def cells(found: Comparison) -> list[str]:
    """What `headings` names."""
    theirs, ours, population = (rate_text(rates) for rates in (found.theirs, found.ours, found.population))
    against = [str(ratio(rates, found.theirs)) if rates else "" for rates in (found.ours, found.population)]
    return [label(found.side), theirs or "not timed", ours, against[0], population, against[1]]


def headings(members: int) -> list[str]:
    """Of the columns that both tables have."""
    population = f"ours x {members}" if members > 1 else "population"
    return ["", "theirs", "ours", "ratio", population, "ratio"]


def versions(about: dict[str, Any]) -> dict[str, str]:
    """Versions of what takes part in an update, on any side."""
    found = {name: about["versions"][name] for name in ("python", "jax", "jaxlib", "flax", "optax", "numpy")}
    for name in ("torch", "distrax"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def page(
    args: Args,
    about: dict[str, Any],
    results: Sequence[Comparison],
    devices: set[str],
    begun: str,
    loads: Sequence[float],
) -> str:
    """The Markdown page of a run; `loads` are the load averages at the start of each measurement."""
    columns = [*headings(args.members), "layers", "critics", "actions", "parameters, theirs and ours", "remark"]
    lines = [f"| {' | '.join(columns)} |", f"| :-- |{' --: |' * (len(columns) - 2)} :-- |"]
    for found in results:
        settings = dict(found.side.settings)
        sizes = [str(settings.get(name, "")) for name in SETTINGS["cql"]]
        parameters = " and ".join(map(str, found.parameters)) if found.parameters else ""
        row = [*cells(found), *sizes, parameters, found.remark.replace("|", "/")]
        lines.append(f"| {' | '.join(row)} |")
    load = f"; load average at each start {min(loads):.1f} to {max(loads):.1f}" if loads else ""
    rows, width, batch = peer_sides.ROWS, peer_sides.HIDDEN_DIM, peer_sides.BATCH_SIZE
    return "\n".join(
        [
            "# Updates per second beside CORL, JAX-CORL and unifloral\n",
            "Made by `benchmarks/peers.py`, whose head says what is timed and how. Rates are updates/s, those of our",
            "population of all its members together. A ratio is ours to theirs: its median over the rounds, and in",
            "brackets the smallest and the largest.\n",
            *lines,
            "",
            f"- data: {rows} random transitions, {peer_sides.OBS_DIM} observations, {peer_sides.ACTION_DIM} actions; "
            f"batch {batch}, layers of {width}",
            f"- {args.rounds} rounds of at least {args.seconds:g} s for each side, one side at a time",
            f"- processor: {about['cpu']['model']}, {about['cpu']['cores']} cores{load}",
            f"- updates on: {', '.join(sorted(devices)) or 'nothing'}",
            f"- date: {begun} to {now()}; commit: {commit_of(about)}",
            *sources(args, about),
        ]
    )


def sources(args: Clones, about: dict[str, Any]) -> list[str]:
    """Lines of a page: the clones' commits, versions and the command, which ends the page."""
    clones = [f"{name} {commit_of(commit_at(path)) if path else 'not given'}" for name, path in args.clones().items()]
    places = {str(path): f"path/to/{name}" for name, path in args.clones().items() if path is not None}
    command = shlex.join(["python", *(places.get(word, word) for word in sys.argv)])
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
    if len(cores) not in (0, os.cpu_count()):
        command = f"taskset -c {','.join(map(str, sorted(cores)))} {command}"
    return [
        f"- clones: {'; '.join(clones)}",
        f"- versions: {', '.join(f'{name} {version}' for name, version in versions(about).items())}",
        f"\n```sh\n{command}\n```\n",
    ]


def now() -> str:
    """The time, to the second."""
    return time.strftime("%Y-%m-%d %H:%M:%S")


def main(args: Args) -> int:
    """Compare, print the table, write the results; the exit status."""
    args.validate()
    about, begun = provenance(), now()
    shared = {"cpu": about["cpu"]["model"], "cores": about["cpu"]["cores"], "git_commit": commit_of(about)}
    shared |= versions(about)
    table = None
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        table = Table(args.out.with_name(args.out.name + ".csv"))
        table.path.unlink(missing_ok=True)

    loads: list[float] = []

    def write(row: dict[str, Any]) -> None:
        if row["load_average"] is not None:
            loads.append(row["load_average"])
        if table is not None:
            table.append([row | shared])

    results: list[Comparison] = []
    devices: set[str] = set()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "synthetic.npz")
        np.savez(data, **peer_sides.synthetic())
        for algorithm in args.algorithms:
            found, used = compare(algorithm, args, data, write)
            results += found
            devices |= used
            if args.out is not None:
                text = page(args, about, results, devices, begun, loads)
                write_text(args.out.with_name(args.out.name + ".md"), text)
    print(f"\nupdates/s\n{aligned(headings(args.members), [cells(found) for found in results])}\n")
    for found in results:
        if found.remark:
            print(f"{label(found.side)}: {found.remark}")
    return 0 if any(found.theirs for found in results) else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # ends the sides too
    with exit_status():
        sys.exit(main(read_flags(Args)))
