"""Populations: seeds x hyperparameters, trained in one process on one copy of the data.

A member is one pytree; a population is the same pytree with a leading axis, split over the devices: the cores of a CPU,
or the GPUs. On a GPU the members of a device are vmapped, because one alone is limited by kernel launches; on a CPU
they take turns, because separate matrix products are faster there than a batched one.
"""

import contextlib
import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from common.cli import RunArgs, UsageError, one_line, parse_grid
from common.replay import Replay

CGROUP = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """CPU cores that this process may use: NPROC if that is set, else by its affinity and its container's quota."""
    if os.environ.get("NPROC", "").isdecimal():
        return max(1, int(os.environ["NPROC"]))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for names in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):  # of cgroups version 2 and 1
        with contextlib.suppress(OSError, ValueError):  # no such limit, or "max"
            quota, period = map(int, " ".join((CGROUP / name).read_text() for name in names).split())
            cores = min(cores, -(-quota // period)) if quota > 0 else cores
    return max(1, cores)


def is_key(leaf: Any) -> bool:
    """Whether a leaf, or its shape, is of random keys, which numpy cannot hold."""
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def use_compilation_cache() -> None:
    """Keep compiled programs in the user's cache directory, so that the next start skips compiling."""
    home = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ and not home.startswith("~"):
        jax.config.update("jax_compilation_cache_dir", str(Path(home, "offax", "jax")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@dataclass(frozen=True)
class Members:
    """The members that this process trains; `[padded]` arrays repeat the last one until devices have equally many."""

    indices: list[int]  # the numbers of these members in the whole population, see --shard
    total: int  # members in the whole population, over all parts of --shard
    seeds: np.ndarray  # [padded]
    hp: Any  # NamedTuple of float32 [padded]
    swept: list[dict[str, float]]  # what --grid set in each
    mesh: Mesh

    @property
    def count(self) -> int:  # without the padding
        return len(self.indices)

    def who(self, i: int) -> dict[str, int]:  # the i-th, in tables
        return {"member": self.indices[i], "seed": int(self.seeds[i])}

    def label(self, i: int) -> str:  # in messages
        values = "".join(f", {name}={value:g}" for name, value in self.swept[i].items())
        return f"member {self.indices[i]} (seed {self.seeds[i]}{values})"

    def shard(self, tree: Any) -> Any:
        """A tree of `[count, ...]` or `[padded, ...]` arrays as `[padded, ...]`, split over the devices."""
        own = np.minimum(np.arange(len(self.seeds)), self.count - 1)
        tree = jax.tree.map(lambda x: x if len(x) == len(own) else x[own], tree)
        return jax.device_put(tree, NamedSharding(self.mesh, P("members")))

    def replicate(self, tree: Any) -> Any:
        """The whole tree of numpy arrays on every device; CPU devices share one copy."""
        if self.mesh.devices.flat[0].platform == "cpu":  # memory from JAX is aligned, so device_put shares it
            tree = jax.tree.map(lambda x: np.asarray(jnp.array(x)), tree)
        return jax.device_put(tree, NamedSharding(self.mesh, P()))

    def memory(self) -> int:
        """Bytes that all devices together have free; on a CPU, those that the machine or its container has."""
        if "bytes_limit" in (stats := self.mesh.devices.flat[0].memory_stats() or {}):  # not on a CPU
            return (stats["bytes_limit"] - stats["bytes_in_use"]) * self.mesh.size
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        for name in ("memory.max", "memory/memory.limit_in_bytes"):
            with contextlib.suppress(OSError, ValueError):
                size = min(size, int((CGROUP / name).read_text()))
        return size

    def _check_room(self, each: int, what: str) -> None:
        if (need := each * len(self.seeds)) > (room := self.memory()):
            found = f"{what} of {self.count} member(s) take {need / 2**30:.3g} GiB, and there are {room / 2**30:.3g}"
            raise UsageError(f"{found}; about {room // each} member(s) would fit")

    def start(self, init: Callable) -> Any:
        """`init(key, hp)` of each member as one tree; UsageError if memory is too small."""
        hp = [type(self.hp)(*(x[i] for x in self.hp)) for i in range(len(self.seeds))]
        initialise = jax.jit(init)
        leaves = jax.tree.leaves(initialise.eval_shape(jax.random.key(0), hp[0]))  # thrice: old, new, gradients
        self._check_room(3 * sum(x.size * x.dtype.itemsize for x in leaves), "the networks")
        # One by one, so that a member starts the same to the last bit whatever the population.
        states = [initialise(jax.random.key(seed), own) for seed, own in zip(self.seeds, hp, strict=True)]
        return self.shard(jax.tree.map(lambda *x: (jnp if is_key(x[0]) else np).stack(x), *states))

    def keys(self, number: int) -> jax.Array:  # one per member, other than its state's; each use has its own `number`
        return self.shard(jnp.stack([jax.random.fold_in(jax.random.key(seed), 2**31 + number) for seed in self.seeds]))

    def broadcast(self, tree: Any) -> Any:
        """One member's tree, its empty ring, for each; UsageError if memory is too small."""
        self._check_room(sum(x.nbytes for x in jax.tree.leaves(tree)), "the online transitions")
        return self.shard(jax.tree.map(lambda x: np.broadcast_to(np.asarray(x), (len(self.seeds), *x.shape)), tree))

    def map(self, function: Callable, *, donate: tuple[int, ...] = (), batched: bool = False) -> Callable:
        """Compile `function`, written for one member, for all: arguments and results get a leading axis of members.

        A `Replay` is not sliced: each member sees all offline rows and the ring of all members on its device, where
        `member` is its index. The results reuse the memory of the arguments at `donate`. `batched`: vmap on a CPU too.
        """
        in_turn = self.mesh.devices.flat[0].platform == "cpu" and not batched
        # On a CPU a population runs in parallel over devices, each with one thread. That holds for a part of --shard
        # with a single member too: numbers must not depend on how the members are divided into parts.
        options = {"xla_cpu_multi_thread_eigen": False} if in_turn and self.total > 1 else {}
        split = P("members")

        def on_device(places: jax.Array, *arguments: Any) -> Any:  # `places`: 0, 1, ... of the members on this device
            own = tuple(None if isinstance(x, Replay) else x for x in arguments)

            def one(turn: tuple) -> Any:
                place, pairs = turn[0], zip(turn[1], arguments, strict=True)
                return function(*(x._replace(member=place) if isinstance(x, Replay) else mine for mine, x in pairs))

            if not in_turn:
                return jax.vmap(one)((places, own))
            if len(places) == 1:  # a single member: its arrays stay where they are
                return jax.tree.map(lambda x: x[None], one(jax.tree.map(lambda x: x.squeeze(0), (places, own))))

            def in_branch(turn: tuple) -> Any:  # XLA compiles it by itself, to the same bits for any number of members
                nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, turn))
                return jax.lax.cond(turn[0] >= 0, one, lambda _: nothing, turn)  # always true, which XLA cannot know

            return jax.lax.map(in_branch, (places, own))

        @partial(jax.jit, donate_argnums=tuple(1 + i for i in donate), compiler_options=options)
        def compiled(places: jax.Array, *arguments: Any) -> Any:
            specs = (split, *(Replay(P(), split, split, split) if isinstance(x, Replay) else split for x in arguments))
            mapped = jax.shard_map(on_device, mesh=self.mesh, in_specs=specs, out_specs=split, check_vma=False)
            return mapped(places, *arguments)

        return partial(compiled, np.arange(len(self.seeds)) % (len(self.seeds) // self.mesh.size))


@jax.jit
def evaluation_keys(seeds: jax.Array, done: jax.Array | int, count: jax.Array | int) -> jax.Array:
    """A key for each member's evaluation after `done` steps, another one at each `count`."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), done), count)
    return jax.vmap(partial(jax.random.fold_in, key))(seeds)


def make_members(args: RunArgs) -> Members:
    """All combinations of --grid x all seeds, the seed varying fastest; with --shard I/N every N-th of these members.

    At most one device per member is used; on a CPU, JAX starts with one device per member, up to the usable cores.
    """
    args.validate()  # which `parse` has done, unless the Args were made without it
    use_compilation_cache()
    grid = parse_grid(args.grid, args.hp._fields)
    everyone = list(itertools.product(grid, range(args.seed, args.seed + args.num_seeds)))
    part, _, parts = (args.shard or "0/1").partition("/")
    if not (part.isdecimal() and parts.isdecimal() and int(part) < int(parts) <= len(everyone)):
        raise UsageError(f"--shard {args.shard}: write I/N with 0 <= I < N, N at most the {len(everyone)} members")
    indices = list(range(int(part), len(everyone), int(parts)))
    os.environ["NPROC"] = str(cores := usable_cores())  # XLA's threads: it knows of affinity, but of no quota
    with contextlib.suppress(RuntimeError):  # JAX has started: its devices are what they are
        jax.config.update("jax_num_cpu_devices", min(len(indices), cores))
    try:
        devices = jax.local_devices()[: len(indices)]
    except (AssertionError, RuntimeError) as error:  # JAX fails on `cuda` without CUDA by an assertion
        raise UsageError(f"JAX has no device of JAX_PLATFORMS ({one_line(error)}); unset it or install it") from None
    padded = [everyone[i] for i in indices + indices[-1:] * (-len(indices) % len(devices))]
    with np.errstate(over="ignore"):  # too large for float32: infinity, so that member diverges, and is named
        hp = jax.tree.map(lambda *x: np.array(x, np.float32), *(args.hp._replace(**values) for values, _ in padded))
    seeds, swept = np.array([seed for _, seed in padded]), [values for values, _ in padded[: len(indices)]]
    return Members(indices, len(everyone), seeds, hp, swept, Mesh(np.array(devices), ("members",)))


class Metrics(NamedTuple):
    """Metrics over some updates."""

    sums: dict[str, Any]
    counts: dict[str, Any]  # how many updates had each

    @jax.jit
    def packed(self) -> jax.Array:  # as one array: fetching one for each metric may take longer than the updates
        return jnp.stack([x.astype(jnp.float32) for x in jax.tree.leaves(self)])


def join(parts: Sequence[Metrics]) -> Metrics:
    """The metrics of all members over successive stretches of updates, as one."""
    total = np.sum([np.asarray(x) for x in [part.packed() for part in parts]], axis=0, dtype=np.float64)
    return jax.tree.unflatten(jax.tree.structure(parts[0]), total)


def repeat(step: Callable, state: Any, num_steps: jax.Array | int) -> tuple[Any, Metrics]:
    """Apply `step`, which gives the next state and metrics, `num_steps` times on the device; add the metrics up.

    A metric that only some updates have, such as the loss of a delayed policy, is a pair: its value, and whether this
    update has it. `num_steps` is traced, so that stretches of different lengths share one compilation.
    """
    step = jax.jit(step, inline=True)  # traced once
    names = step.eval_shape(state)[1]
    nothing = Metrics(*(dict.fromkeys(names, jnp.zeros((), dtype)) for dtype in (jnp.float32, jnp.int32)))

    def body(_: jax.Array, carry: tuple[Any, Metrics]) -> tuple[Any, Metrics]:
        state, (sums, counts) = carry
        state, metrics = step(state)
        for name, metric in metrics.items():
            value, present = metric if isinstance(metric, tuple) else (metric, True)
            assert jnp.ndim(value) == 0, f"metric {name} is {jnp.shape(value)}, it must be one number: take its mean"
            sums = sums | {name: sums[name] + jnp.where(present, value, 0.0).astype(jnp.float32)}
            counts = counts | {name: counts[name] + present}
        return state, Metrics(sums, counts)

    return jax.lax.fori_loop(0, num_steps, body, (state, nothing))


def keep_finite(new: Any, old: Any, metrics: Metrics) -> tuple[Any, jax.Array]:
    """`(new, True)`, or `(old, False)` if a float in `new`, or in the `metrics` on the way to it, is not finite."""
    floats = [x for x in jax.tree.leaves((new, metrics)) if jnp.issubdtype(x.dtype, jnp.floating)]
    finite = jnp.array([jnp.isfinite(x).all() for x in floats]).all()
    return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old), finite
