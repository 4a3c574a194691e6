"""Populations: seeds x hyperparameters, trained in one process on one copy of the data.

A member is one pytree; a population is the same pytree with a leading axis, split over the devices: the cores of a CPU,
or the GPUs. On a GPU a device's members are vmapped, where one alone is bound by kernel launches; on a CPU they take
turns, where one matrix product after another is faster than a batched one.
"""

import itertools
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from common.cli import RunArgs, UsageError, parse_grid
from common.replay import Replay


def usable_cores() -> int:
    """CPU cores that this process may use: its affinity, and the quota of its container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no such limit, or "max"
        return cores


@dataclass(frozen=True)
class Members:
    """The members that this process trains.

    `seeds [padded]` and `hp`, a NamedTuple of float32 `[padded]`, repeat the last member until the devices share them
    equally. `indices` are the members' numbers among the `total` of all processes (see --shard), `swept` what --grid
    set in each.
    """

    indices: list[int]
    total: int
    seeds: np.ndarray
    hp: Any
    swept: list[dict[str, float]]
    mesh: Mesh

    @property
    def count(self) -> int:
        """How many there are, without the padding."""
        return len(self.indices)

    @property
    def places(self) -> np.ndarray:
        """Each member's index on its device, `[padded]`: where it finds its part of an argument taken `whole`."""
        return np.arange(len(self.seeds)) % (len(self.seeds) // self.mesh.size)

    def label(self, i: int) -> str:
        """Name of the i-th member for messages."""
        values = "".join(f", {name}={value:g}" for name, value in self.swept[i].items())
        return f"member {self.indices[i]} (seed {self.seeds[i]}{values})"

    def shard(self, tree: Any) -> Any:
        """A tree of `[count, ...]` or `[padded, ...]` arrays as `[padded, ...]`, split over the devices."""
        rows = np.arange(len(self.seeds))
        tree = jax.tree.map(lambda x: x if len(x) == len(rows) else x[np.minimum(rows, self.count - 1)], tree)
        return jax.device_put(tree, NamedSharding(self.mesh, P("members")))

    def replicate(self, tree: Any) -> Any:
        """The whole tree on every device."""
        return jax.device_put(tree, NamedSharding(self.mesh, P()))

    def start(self, init: Callable, per_member: Sequence[Any] = ()) -> Any:
        """`init(key, hp)` of each member as one tree of `[padded, ...]` arrays; UsageError if memory is too small.

        One by one, so that a member starts the same to the last bit whatever the population; `per_member` are trees of
        the shapes of other arrays that every member will need beside its state.
        """
        one = jax.eval_shape(
            init, jax.random.key(0), jax.tree.map(lambda x: jax.ShapeDtypeStruct((), x.dtype), self.hp)
        )
        # Three states: before and after the updates, and gradients with what else they need.
        self._require_memory(3 * tree_bytes(one) + tree_bytes(per_member))
        initialise, states = jax.jit(init), []
        for i, seed in enumerate(self.seeds):
            state = initialise(jax.random.key(seed), jax.tree.map(lambda x: x[i], self.hp))  # noqa: B023
            states.append(to_host(state))
        return self.shard(jax.tree.map(lambda *x: (jnp if is_key(x[0]) else np).stack(x), *states))

    def _require_memory(self, each: int) -> None:
        """UsageError, with the number that does fit, if members of `each` so many bytes do not fit in what is free."""
        stats = self.mesh.devices.flat[0].memory_stats()
        if stats:
            free = (stats["bytes_limit"] - stats["bytes_in_use"]) * self.mesh.size
        else:
            free = free_memory()
        if each * len(self.seeds) > free:
            raise UsageError(
                f"{self.count} members need about {each * len(self.seeds) / 2**30:.3g} GiB and {free / 2**30:.3g} GiB are "
                f"free: about {free // each} fit; train fewer at once, e.g. with --shard 0/{-(-each * self.count // free)}"
            )

    def keys(self, number: int) -> jax.Array:
        """A key for each member, by a fold that no `split` of the member's own key gives."""
        return self.shard(jnp.stack([jax.random.fold_in(jax.random.key(seed), 2**31 + number) for seed in self.seeds]))

    def broadcast(self, tree: Any) -> Any:
        """One member's tree, such as an empty ring, for each."""
        return self.shard(jax.tree.map(lambda x: np.broadcast_to(np.asarray(x), (len(self.seeds), *x.shape)), tree))

    def map(self, function: Callable, *, donate: tuple[int, ...] = (), batched: bool = False) -> Callable:
        """`function` of one member as a compiled one of all: its arguments and results have a leading axis of members.

        But for an argument that is a `Replay`: its offline rows are shared, and each member is given the whole ring of
        its device, uncut and uncopied, with its place in it. The memory of the arguments at `donate` is reused for the
        results. `batched`: vmapped on a CPU too.
        """
        in_turn = self.mesh.devices.flat[0].platform == "cpu" and not batched
        # On a CPU the devices are the parallelism, one thread each: also where this process has one member of several,
        # so that a member's numbers do not depend on how the members are shared out.
        options = {"xla_cpu_multi_thread_eigen": False} if in_turn and self.total > 1 else {}

        def on_device(*arguments: Any) -> Any:
            own = tuple(
                x._replace(offline=None, ring=None, extra=None) if isinstance(x, Replay) else x for x in arguments
            )

            def one(member: tuple) -> Any:
                both = zip(member, arguments, strict=True)
                return function(*(x._replace(member=m.member) if isinstance(x, Replay) else m for m, x in both))

            if not in_turn:
                return jax.vmap(one)(own)
            if len(self.seeds) == self.mesh.size:  # a single member: its arrays stay where they are
                return jax.tree.map(lambda x: x[None], one(jax.tree.map(lambda x: x[0], own)))
            return jax.lax.map(one, own)

        @cache
        def compiled(*are_replay: bool) -> Callable:
            split = P("members")
            specs = tuple(Replay(P(), split, split, split) if is_replay else split for is_replay in are_replay)
            mapped = jax.shard_map(on_device, mesh=self.mesh, in_specs=specs, out_specs=split, check_vma=False)
            shardings = jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), specs)
            return jax.jit(mapped, in_shardings=shardings, compiler_options=options, donate_argnums=donate)

        return lambda *arguments: compiled(*(isinstance(x, Replay) for x in arguments))(*arguments)


@jax.jit
def evaluation_keys(seeds: jax.Array, done: jax.Array | int, count: jax.Array | int) -> jax.Array:
    """A key for each member's evaluation after `done` steps, another one at each `count`."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), done), count)
    return jax.vmap(partial(jax.random.fold_in, key))(seeds)


def make_members(args: RunArgs) -> Members:
    """Every combination of --grid x every seed, the seed varying fastest; of those every N-th with --shard I/N.

    As many devices as there are members are taken, and JAX is started with each usable CPU core as a device.
    """
    grid = parse_grid(args.grid, args.hp._fields)
    everyone = list(itertools.product(grid, range(args.seed, args.seed + args.num_seeds)))
    part, parts = parse_shard(args.shard, len(everyone))
    indices = list(range(part, len(everyone), parts))
    try:
        jax.config.update("jax_num_cpu_devices", max(1, min(len(indices), usable_cores())))
    except RuntimeError:  # JAX has started: its devices are what they are
        pass
    devices = jax.local_devices()[: len(indices)]
    padded = indices + indices[-1:] * (-len(indices) % len(devices))
    hp = jax.tree.map(lambda *x: np.array(x, np.float32), *(args.hp._replace(**everyone[i][0]) for i in padded))
    seeds = np.array([everyone[i][1] for i in padded])
    swept = [everyone[i][0] for i in indices]
    return Members(indices, len(everyone), seeds, hp, swept, Mesh(np.array(devices), ("members",)))


def parse_shard(shard: str, members: int) -> tuple[int, int]:
    """`(I, N)` of --shard I/N; (0, 1) if it is empty. UsageError if it is none, or leaves a process without members."""
    if not shard:
        return 0, 1
    part, _, parts = shard.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and int(part) < int(parts) <= members):
        raise UsageError(f"--shard {shard}: write I/N with 0 <= I < N and N at most the number of members, {members}")
    return int(part), int(parts)


def is_key(leaf: Any) -> bool:
    """Whether a leaf is an array of random keys, which numpy cannot hold."""
    return isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def to_host(tree: Any) -> Any:
    """The tree in numpy arrays; random keys stay keys."""

    def fetch(x: Any) -> Any:
        return jax.random.wrap_key_data(np.asarray(jax.random.key_data(x))) if is_key(x) else np.asarray(x)

    return jax.tree.map(fetch, tree)


def tree_bytes(tree: Any) -> int:
    """Of all arrays, or of arrays of these shapes."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def free_memory() -> int:
    """Bytes that are free on this machine, or in the container or job in it."""
    free = [
        os.sysconf("SC_AVPHYS_PAGES" if not Path("/proc/meminfo").exists() else "SC_PHYS_PAGES")
        * os.sysconf("SC_PAGE_SIZE")
    ]
    try:
        free.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):
        pass
    return min(free)


class Sometimes(NamedTuple):
    """A metric that exists at some updates only, e.g. where the policy is updated at every second one."""

    value: jax.Array
    present: jax.Array


class Metrics(NamedTuple):
    """Metrics over some updates: sums, how many updates had each, the first where it was not finite (-1: none)."""

    sums: dict[str, Any]
    counts: dict[str, Any]
    first_nonfinite: dict[str, Any]


def join(parts: Sequence[Metrics]) -> Metrics:
    """The metrics of all members over successive updates, given for each update or in equal numbers of updates."""
    parts = jax.tree.map(np.asarray, list(parts))
    sums, counts, first = {}, {}, {}
    for name in parts[0].sums:
        sums[name] = np.sum([part.sums[name] for part in parts], axis=0, dtype=np.float64)
        counts[name] = np.sum([part.counts[name] for part in parts], axis=0)
        bad = np.stack([part.first_nonfinite[name] for part in parts]) >= 0
        first[name] = np.where(bad.any(axis=0), bad.argmax(axis=0), -1)
    return Metrics(sums, counts, first)


def repeat(step: Callable, state: Any, num_steps: jax.Array | int) -> tuple[Any, Metrics]:
    """Apply `step`, which gives the next state and metrics, `num_steps` times on the device; add the metrics up.

    The count is traced: chunks of different lengths share one compilation.
    """
    names = list(jax.eval_shape(step, state)[1])
    zeros = {name: jnp.zeros((), jnp.float32) for name in names}
    none = {name: jnp.zeros((), jnp.int32) for name in names}
    never = {name: jnp.full((), -1, jnp.int32) for name in names}

    def body(i: jax.Array, carry: tuple[Any, Metrics]) -> tuple[Any, Metrics]:
        state, (sums, counts, first) = carry
        state, metrics = step(state)
        for name, metric in metrics.items():
            value, present = metric if isinstance(metric, Sometimes) else (metric, True)
            bad = (first[name] < 0) & ~jnp.isfinite(value) & present
            first = first | {name: jnp.where(bad, i, first[name]).astype(jnp.int32)}
            sums = sums | {name: sums[name] + jnp.where(present, value, 0.0).astype(jnp.float32)}
            counts = counts | {name: counts[name] + present}
        return state, Metrics(sums, counts, first)

    return jax.lax.fori_loop(0, num_steps, body, (state, Metrics(zeros, none, never)))


def keep_finite(new: Any, old: Any, metrics: Metrics) -> tuple[Any, jax.Array]:
    """The state of one member after some updates, or, if a number in it or in their metrics is not finite, the one
    before them; and whether it is finite."""
    floats = [x for x in jax.tree.leaves(new) if jnp.issubdtype(x.dtype, jnp.floating)]
    finite = jnp.array([jnp.isfinite(x).all() for x in floats]).all()
    finite &= jnp.array([first < 0 for first in metrics.first_nonfinite.values()]).all()
    return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old), finite
