"""Updates per second of every algorithm on one accelerator, by the size of the population.

    python benchmarks/accelerator.py --out runs/accelerator.csv

Needs jax, flax, optax, numpy and tyro alone: data are random numbers of Hopper's sizes, nothing is evaluated.
Small populations come first, and every measurement is a row of the CSV as soon as there is one, so that a run that is
cut off keeps what it has; after `--minutes` no new one begins. The page beside the CSV, rates.md for rates.csv, ends
with text of your own from rates.notes.md. A row has

* `updates_per_second`, of all members together, over at least `--seconds`, after the first call; EMaQ's pool is drawn
  before, and not anew;
* `first_seconds`, from the start of a population to the end of its first update: initialising and compiling;
* `flops`, floating-point operations of one member's update by XLA's own count, and `share_of_peak`, what the rate makes
  of the devices' peak (PEAKS), where it is known: JAX's default on NVIDIA's GPUs are products in TF32;
* `peak_gib`, the most memory that the device had in use since the process began, compiling included, so that an
  algorithm is best measured in a process of its own; `replay_gib`, what the shared data take of it.

On a CPU members take turns; `--batched True` vmaps them there as on a GPU. Given clones of JAX-CORL and unifloral, as
many single runs of theirs as there are members, up to `--processes`, share the device, each in a process of its own,
with the settings of benchmarks/peers.py.
"""

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from algorithms import awac, awr, cql, emaq, iql, td3_bc
from benchmarks import peer_sides, peers
from benchmarks.peer_sides import Side
from benchmarks.provenance import provenance
from benchmarks.tables import Table, commit_of, markdown, write_text
from common.cli import Count, NonNegative, Positive, UsageError, check_ranges, exit_status, read_flags
from common.members import make_members, use_compilation_cache
from common.replay import Recorded, Replay, Transitions, record

# TFLOP/s of dense products, from NVIDIA's data sheets (SXM): in float32 and in TF32.
PEAKS = {"H100": (67.0, 494.5), "H200": (67.0, 494.5), "A100": (19.5, 156.0)}
ALGORITHMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "iql": (iql, {}),
    "awac": (awac, {}),
    "td3_bc": (td3_bc, {}),
    "awr": (awr, {}),
    "cql": (cql, {}),
    "emaq-cpu": (emaq, {name: x for name, x in emaq.PRESETS["cpu"].items() if name in emaq.Args.__dataclass_fields__}),
    "emaq": (emaq, {}),
}
LARGEST = {"emaq": 4}
"""Members at most, where one alone fills the device."""


@dataclass(frozen=True)
class Args:
    """Updates per second of every algorithm on one accelerator."""

    # The CSV, which is gone on with if it exists: what it has is not measured again.
    out: Path = Path("accelerator.csv")
    algorithms: tuple[str, ...] = tuple(ALGORITHMS)  # Which, in this order.
    # Sizes of the population, in this order; 2 is for EMaQ at the paper's sizes, which goes no further than 4.
    members: tuple[int, ...] = (1, 2, 4, 16, 64, 256)
    jax_corl: Path | None = None  # Your clone of JAX-CORL.
    unifloral: Path | None = None  # Your clone of unifloral.
    processes: Count = 16  # Single runs of a peer at once, at most.
    rows: Count = 1_000_000  # Transitions of the data.
    obs_dim: Count = 11  # Numbers in an observation.
    action_dim: Count = 3  # Numbers in an action.
    hidden_dim: int | None = None  # Width of the layers. Default: the algorithm's own.
    seconds: Positive = 3.0  # Least time of a measurement.
    minutes: NonNegative = 8.0  # Time after which no new measurement begins.
    batched: bool = False  # Vmap the members on a CPU too.


@cache
def flops_of(name: str, obs_dim: int, action_dim: int, hidden_dim: int | None) -> float | None:
    """Floating-point operations of one update of one member; None for AWR, whose iteration is more than minibatches.

    Counted before XLA optimises: of what it hands to NVIDIA's libraries it counts nothing afterwards.
    """
    script, settings = settings_of(name, 1, hidden_dim)
    if script is awr:
        return None
    batch, bins = Transitions(**peer_sides.synthetic(settings.batch_size, obs_dim, action_dim)), ()
    if script is emaq:  # the proposals are drawn ahead, and all are evaluated
        settings = replace(settings, screening=False)
        bins = (np.zeros((settings.batch_size, settings.num_proposals, action_dim), np.uint8),)
    init = partial(script.init, args=settings, obs_dim=obs_dim, action_dim=action_dim)

    def update(state: Any, batch: Transitions, hp: Any, *bins: Any) -> Any:
        return script.update(state, batch, hp, settings, *bins)

    with contextlib.suppress(RuntimeError), jax.default_device(jax.local_devices(backend="cpu")[0]):  # a GPU's cannot
        state = jax.eval_shape(init, jax.random.key(0), settings.hp)
        counts = jax.jit(update).lower(state, batch, settings.hp, *bins).cost_analysis()
        return counts["flops"] if counts else None
    return None


def settings_of(name: str, count: int, hidden_dim: int | None) -> tuple[Any, Any]:
    """The script and its settings for a population of `count` seeds."""
    script, settings = ALGORITHMS[name]
    sizes = {} if hidden_dim is None else {"hidden_dim": hidden_dim}
    return script, script.Args(num_seeds=count, preset="none", **settings | sizes)


def measure(name: str, count: int, args: Args, data: Recorded) -> dict[str, Any]:
    """One row: `count` members of the algorithm on one device."""
    script, settings = settings_of(name, count, args.hidden_dim)
    began = time.perf_counter()
    members = make_members(settings)
    shapes = {"args": settings, "obs_dim": args.obs_dim, "action_dim": args.action_dim}
    state, offline = members.start(partial(script.init, **shapes)), members.replicate(data)
    train, pool = members.map(partial(script.train, args=settings), batched=args.batched), None
    if script is emaq and settings.draws_ahead:
        draw = members.map(partial(emaq.draw_pool, args=settings), batched=args.batched)
        pool = draw(state, members.hp, Replay(offline), members.keys(1))
    replay = Replay(offline, extra=pool)

    longest = settings.policy_updates if script is awr else sys.maxsize  # of an iteration, a call of AWR's `train`

    def run(state: Any, updates: int) -> Any:
        for start in range(0, updates, longest):
            count = np.full(len(members.seeds), min(longest, updates - start), np.int32)
            state = train(state, members.hp, replay, count)[0]
        return jax.block_until_ready(state)

    state = run(state, 1)
    first, updates, seconds = time.perf_counter() - began, 10, 0.0
    while seconds < args.seconds:
        updates = max(updates * 2, int(1.1 * updates * args.seconds / seconds)) if seconds else updates
        start = time.perf_counter()
        state = run(state, updates)
        seconds = time.perf_counter() - start
    device = members.mesh.devices.flat[0]
    flops = flops_of(name, args.obs_dim, args.action_dim, args.hidden_dim)
    peak = next((peaks[1] for kind, peaks in PEAKS.items() if kind in device.device_kind), None)
    rate, stats = count * updates / seconds, device.memory_stats() or {}
    return {
        "algorithm": name,
        "members": count,
        "updates_per_second": rate,
        "first_seconds": first,
        "flops": flops,
        "share_of_peak": flops * rate / (peak * 1e12 * members.mesh.size) if flops and peak else None,
        "peak_gib": stats["peak_bytes_in_use"] / 2**30 if "peak_bytes_in_use" in stats else None,
        "replay_gib": sum(x.nbytes for x in jax.tree.leaves((offline, pool))) / 2**30,
        "device": device.device_kind,
        "devices": members.mesh.size,
    }


def measure_peers(side: Side, count: int, rows: int, seconds: float) -> dict[str, Any]:
    """One row: `count` single runs of a peer at once, each in a process of its own, on as many `rows` as ours."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as running:
        data = Path(folder, "synthetic.npz")
        np.savez(data, **peer_sides.synthetic(rows))
        began = time.perf_counter()

        def start(_: int) -> peers.Worker:
            running.callback((worker := peers.Worker(side, data, seconds)).close)
            return worker

        with ThreadPoolExecutor(count) as side_by_side:  # each imports and compiles
            workers = list(side_by_side.map(start, range(count)))
        first = time.perf_counter() - began
        for worker in workers:
            worker.go()
        rates = [updates / seconds for updates, seconds in (worker.result() for worker in workers)]
    row = {"algorithm": f"{side.algorithm}, {side.name}", "members": count, "updates_per_second": sum(rates)}
    return row | {"first_seconds": first, "device": workers[0].info.device}


def page(rows: list[dict[str, str]]) -> str:
    """The rows of the CSV as Markdown, by algorithm and members."""
    columns = ["algorithm", "members", "updates/s, all members", "of one member", "first update, s"]
    columns += ["TFLOP/s", "of the peak", "peak memory, GiB"]
    lines: list[list[str]] = []
    names = {row["algorithm"]: None for row in rows}
    for row in sorted(rows, key=lambda row: ([*names].index(row["algorithm"]), int(row["members"]))):
        rate, count = float(row["updates_per_second"]), int(row["members"])
        numbers = [f"{rate:,.0f}", f"{rate / count:,.0f}", f"{float(row['first_seconds']):.1f}"]
        for name, form, unit in (
            ("flops", "{:.1f}", rate / 1e12),
            ("share_of_peak", "{:.1%}", 1),
            ("peak_gib", "{:.2f}", 1),
        ):
            numbers.append(form.format(float(row[name]) * unit) if row[name] else "-")
        lines.append([row["algorithm"], row["members"], *numbers])
    made = {(f"{row['devices'] or 1} x {row['device']}", row["jax"], row["commit"]) for row in rows}
    head = "# Updates per second on an accelerator\n\nMade by `python benchmarks/accelerator.py`.\n"
    origin = [f"- {kind}; JAX {jax}; commit {commit}" for kind, jax, commit in sorted(made)]
    return "\n".join([head, markdown(columns, lines), *origin, ""])


def main(args: Args) -> None:
    """Measure what the CSV lacks, smallest populations first."""
    check_ranges(args)
    if unknown := [name for name in args.algorithms if name not in ALGORITHMS]:
        raise UsageError(f"--algorithms {unknown[0]}: choose from {', '.join(ALGORITHMS)}")
    use_compilation_cache()
    fields = peer_sides.synthetic(args.rows, args.obs_dim, args.action_dim)
    began, table, data = time.monotonic(), Table(args.out), record(Transitions(**fields))
    clones = peers.Clones(jax_corl=args.jax_corl, unifloral=args.unifloral)
    sides = [side for name in args.algorithms if name in peers.SETTINGS for side in clones.sides(name) if side.path]
    jobs: list[tuple[str, int, Callable[[], dict[str, Any]]]] = []
    for count in args.members:
        for name in args.algorithms:
            if count <= LARGEST.get(name, count) and (name in LARGEST or count != 2):
                jobs.append((name, count, partial(measure, name, count, args, data)))
        for side in sides if count <= args.processes and count != 2 else []:
            jobs.append(
                (f"{side.algorithm}, {side.name}", count, partial(measure_peers, side, count, args.rows, args.seconds))
            )
    if sides:  # they share the device's memory
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if other := {row["device"].rpartition(" x ")[2] for row in table.read()} - {jax.local_devices()[0].device_kind}:
        raise UsageError(f"{args.out} has rows of {other.pop()}; give another --out")
    done = {(row["algorithm"], row["members"]) for row in table.read()}
    made = {"jax": jax.__version__, "commit": commit_of(provenance())}
    for name, count, job in jobs:
        if (name, str(count)) in done:
            continue
        if time.monotonic() - began > 60.0 * args.minutes:
            print("out of time: what is missing is measured by the same command again", file=sys.stderr)
            break
        try:
            table.append([job() | made])
        except (jax.errors.JaxRuntimeError, UsageError, peers.PeerError) as error:  # out of memory, for one
            print(f"{name}, {count} members: {next(iter(str(error).splitlines()), error)}", file=sys.stderr)
        jax.clear_caches()
    if rows := table.read():
        notes = args.out.with_suffix(".notes.md")
        text = page(rows) + (f"\n{notes.read_text()}" if notes.exists() else "")
        write_text(args.out.with_suffix(".md"), text)
        print(text)


if __name__ == "__main__":
    with exit_status():
        main(read_flags(Args, description=__doc__))
