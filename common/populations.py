"""Populations: many members (seeds x hyperparameters) trained in one process on one copy of the data.

A member is one state pytree. A population is the same pytree with a leading member axis, sharded over all devices.
Within a device the members take turns on a CPU, where a batched matrix product is slower than one after another, and
are vmapped on a GPU, where one member alone is bound by kernel launches.

A population that is too large for a GPU's memory is run in slices: the compiled functions take one slice after the
other, and the states of those that wait are on the host. On a CPU this would gain nothing, as it is the same memory.
"""

import contextlib
import itertools
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from common.errors import UsageError

Step = Callable[[Any], tuple[Any, dict[str, Any]]]
Each = Callable[[Callable[[Any], Any], Any], Any]
AXIS = "members"


class Member(NamedTuple):
    """One run of the population: its place, its seed, its hyperparameters (a NamedTuple of floats), what was swept."""

    index: int
    seed: int
    hp: Any
    swept: dict[str, float]

    def __str__(self) -> str:
        values = "".join(f", {name}={value:g}" for name, value in self.swept.items())
        return f"member {self.index} (seed {self.seed}{values})"


def parse_grid(grid: str, hp: Any) -> list[dict[str, float]]:
    """Combinations of `"beta=1,3,10 expectile=0.7,0.9"`, the last name varying fastest; `[{}]` for an empty grid.

    UsageError for a name that is no field of `hp`, a value that is no number, or anything given twice.
    """
    values: dict[str, list[float]] = {}
    for part in grid.split():
        name, equals, numbers = part.partition("=")
        name = name.replace("-", "_")
        if not equals:
            raise UsageError(f'--grid: "{part}" is not of the form name=value,value')
        if name not in hp._fields:
            raise UsageError(f"--grid: no hyperparameter {name}; choose from {', '.join(hp._fields)}")
        if name in values:
            raise UsageError(f"--grid: {name} is given twice")
        try:
            values[name] = [float(number) for number in numbers.split(",")]
        except ValueError:
            raise UsageError(f'--grid: "{numbers}" is not a list of numbers like 0.7,0.9') from None
        if not np.isfinite(values[name]).all() or len(set(values[name])) < len(values[name]):
            raise UsageError(f'--grid: the values of {name}, "{numbers}", must be finite and differ')
    return [dict(zip(values, combination, strict=True)) for combination in itertools.product(*values.values())]


def make_members(hp: Any, grid: str, seed: int, num_seeds: int) -> list[Member]:
    """Every combination of the grid x every seed, the seed varying fastest."""
    pairs = itertools.product(parse_grid(grid, hp), range(seed, seed + num_seeds))
    return [Member(i, s, hp._replace(**swept), swept) for i, (swept, s) in enumerate(pairs)]


def use_cpu_cores(num_members: int) -> None:
    """Make each CPU core a device, as far as there are members; without effect once JAX has started or on a GPU."""
    try:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        jax.config.update("jax_num_cpu_devices", max(1, min(num_members, cores)))
    except RuntimeError:  # the backend is up: its devices are what they are
        return


class Population:
    """Maps functions of one member over all members, sharded over the devices of this process.

    The leading axis is padded to a multiple of the device count; padding and frozen members are inactive. On a CPU
    an inactive member costs nothing; on a GPU it is computed and thrown away.
    """

    def __init__(self, num_members: int) -> None:
        devices = jax.local_devices()
        devices = devices[: max(1, min(num_members, len(devices)))]
        self.num_members = num_members
        self.mesh = Mesh(np.array(devices), (AXIS,))
        self.in_turn = devices[0].platform == "cpu"
        self._slice(1)
        self._select = self.compile(_select)

    def _slice(self, slices: int) -> None:
        """Divide into equal slices, each a multiple of the device count; fewer where that leaves none for the last."""
        self.slice_size = -(-self.num_members // (slices * self.mesh.size)) * self.mesh.size
        self.slices = -(-self.num_members // self.slice_size)
        self.padded = self.slices * self.slice_size
        self.active = np.arange(self.padded) < self.num_members

    @property
    def blocks(self) -> list[slice]:
        """Parts of the members that fit on one device at a time, beside what is there: all of them on a CPU."""
        one_device = self.slice_size // self.mesh.size
        size = self.num_members if self.in_turn and self.slices == 1 else one_device
        return [slice(i, min(i + size, self.num_members)) for i in range(0, self.num_members, size)]

    def replicate(self, tree: Any) -> Any:
        """The whole tree on every device."""
        return jax.device_put(tree, NamedSharding(self.mesh, P()))

    def shard(self, tree: Any) -> Any:
        """A tree of `[num_members, ...]` arrays, padded by its last member and split over the devices.

        In slices it stays on the host.
        """
        rows = np.minimum(np.arange(self.padded), self.num_members - 1)
        if self.padded > self.num_members:
            tree = jax.tree.map(lambda x: x[rows], tree)
        return self._put(tree) if self.slices == 1 else on_host(tree)

    def _put(self, tree: Any) -> Any:
        return jax.device_put(tree, NamedSharding(self.mesh, P(AXIS)))

    def to_host(self, tree: Any) -> Any:
        """The `[num_members, ...]` part of a tree, as numpy arrays (random keys stay keys)."""
        return jax.tree.map(lambda x: x[: self.num_members], on_host(tree))

    def copy(self, tree: Any) -> Any:
        """A tree whose memory a compiled function may reuse for its results, while the original is kept."""
        return jax.tree.map(jnp.copy, tree) if self.slices == 1 else tree  # of slices, it gets copies anyway

    def compile(self, program: Callable[[Any, Any, Any, Each], Any]) -> "Compiled":
        """Compile `program(consumed, members, shared, each)` to run on every device with the device's own members.

        `consumed` and `members` are trees of `[padded, ...]` arrays; the former's memory is reused for the results
        (so that a ring is written in place) and is gone after the call. `shared` is replicated. The program calls
        `each(function, tree)` to apply a function to every single member of a tree; its results are trees of
        `[padded, ...]` arrays. The compiled function takes the first three arguments.

        Results of inactive members have no meaning; where members take turns they cost nothing. Whatever large array
        the function reads should come to it by closure, not in the tree, of which every member's part is copied.
        """

        def on_device(consumed: Any, members: Any, shared: Any, active: jax.Array) -> Any:
            return program(consumed, members, shared, partial(self._each, active))

        mapped = jax.shard_map(
            on_device,
            mesh=self.mesh,
            in_specs=(P(AXIS), P(AXIS), P(), P(AXIS)),
            out_specs=P(AXIS),
            check_vma=False,
        )
        # One thread for each device: the devices are the parallelism, and share the cores. Of several processes, one
        # with a single device too, so that a member's numbers do not depend on how the members are shared out.
        single = self.in_turn and (self.mesh.size > 1 or jax.process_count() > 1)
        options = {"xla_cpu_multi_thread_eigen": False} if single else {}
        return Compiled(self, jax.jit(mapped, compiler_options=options, donate_argnums=0))

    def _each(self, active: jax.Array, function: Callable[[Any], Any], members: Any) -> Any:
        if not self.in_turn:
            return jax.vmap(function)(members)
        if len(active) == 1:  # a single member: its arrays stay where they are
            return jax.tree.map(lambda x: x[None], function(jax.tree.map(lambda x: x[0], members)))

        def one(arguments: tuple[Any, jax.Array]) -> Any:
            member, is_active = arguments
            result = jax.eval_shape(function, member)

            def skip(_: Any) -> Any:
                return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), result)

            return jax.lax.cond(is_active, function, skip, member)

        return jax.lax.map(one, (members, active))

    def select(self, keep: np.ndarray, new: Any, old: Any) -> Any:
        """Per member, `new` where `keep [padded]` and `old` elsewhere."""
        return self._select((), (jnp.asarray(keep), new, old), ())

    def has_room(self, each: Any) -> bool:
        """Whether arrays of these shapes for every member would take at most half of the memory."""
        devices = device_memory()
        room = host_memory() if devices is None else devices * self.mesh.size
        return _bytes(each) * self.padded <= room // 2

    def fit(self, function: "Compiled", members: Any, kept: Any, shared: Any) -> None:
        """Divide the population into slices where it is too large for the devices; before anything is sharded.

        `function` is the one that needs most memory, called with `((), members, shared)`, and `kept` stays beside it;
        these two are the shapes of one member. UsageError if the members do not fit in the host's memory where they
        wait (on a CPU: are), or one of them not on a device.
        """
        limit = device_memory()
        if limit is not None:
            self._divide(function, members, kept, shared, limit)
        if limit is None or self.slices > 1:
            # Before and after a chunk of updates; what the training needs besides does not grow with the members.
            each, room = _bytes(kept) + _bytes(members), host_memory() - _bytes(shared)
            if each * self.num_members > room:
                raise UsageError(
                    f"{self.num_members} members need at least {_show(each * self.num_members)}, the machine has "
                    f"{_show(room)} beside the data: at most {max(0, room // each)} fit"
                )

    def _divide(self, function: "Compiled", members: Any, kept: Any, shared: Any, limit: int) -> None:
        """Take as few slices as fit `limit` bytes for each device; UsageError if even one member is too large."""

        def needed() -> int:
            return function.memory(members, shared) + _bytes(kept) * self.slice_size // self.mesh.size

        whole = needed()
        if whole <= limit:
            return
        all_of_device, shared_bytes = self.slice_size // self.mesh.size, _bytes(shared)
        fitting = max(1, (limit - shared_bytes) * all_of_device // (whole - shared_bytes))  # members for each device
        self._slice(-(-all_of_device // fitting))
        while needed() > limit:  # not all that a program needs grows with the members
            fitting = self.slice_size // self.mesh.size - 1
            if not fitting:
                raise UsageError(
                    f"one member needs {_show(needed())} of a device's {_show(limit)}; "
                    "use smaller networks, a smaller batch or a larger device"
                )
            self._slice(-(-all_of_device // fitting))
        print(
            f"{self.num_members} members need {_show(whole)} of a device's {_show(limit)}: they take turns in "
            f"{self.slices} slices of {self.slice_size}",
            file=sys.stderr,
        )


class Compiled:
    """A program over all members of a population; see `Population.compile`."""

    def __init__(self, population: Population, function: Any) -> None:
        self.population, self.function = population, function

    def __call__(self, consumed: Any, members: Any, shared: Any) -> Any:
        """The results of all members: on the devices, or where they run in slices on the host."""
        population = self.population
        if population.slices == 1:
            return self.function(consumed, members, shared, jnp.asarray(population.active))
        results = []
        for rows in np.split(np.arange(population.padded), population.slices):
            part = population._put(jax.tree.map(lambda x: x[rows], (consumed, members)))  # noqa: B023
            results.append(on_host(self.function(*part, shared, jnp.asarray(population.active[rows]))))
        return concatenate(results)

    def memory(self, members: Any, shared: Any) -> int:
        """Bytes that XLA reserves on each device for a slice of `members`, given as the shapes of one."""
        population = self.population

        def shapes(x: Any) -> jax.ShapeDtypeStruct:
            sharding = NamedSharding(population.mesh, P(AXIS))
            return jax.ShapeDtypeStruct((population.slice_size, *x.shape), x.dtype, sharding=sharding)

        active = jnp.asarray(population.active[: population.slice_size])
        lowered = self.function.lower((), jax.tree.map(shapes, members), shared, active)
        used = lowered.compile().memory_analysis()
        return used.argument_size_in_bytes + used.output_size_in_bytes + used.temp_size_in_bytes


def _select(_: Any, members: Any, __: Any, ___: Each) -> Any:
    keep, new, old = members
    return jax.tree.map(lambda a, b: jnp.where(keep.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, old)


def is_key(leaf: Any) -> bool:
    """Whether a leaf is an array of random keys, which numpy cannot hold."""
    return isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def on_host(tree: Any) -> Any:
    """The tree in numpy arrays; random keys stay keys."""

    def fetch(x: Any) -> Any:
        return jax.random.wrap_key_data(np.asarray(jax.random.key_data(x))) if is_key(x) else np.asarray(x)

    return jax.tree.map(fetch, tree)


def concatenate(trees: list[Any]) -> Any:
    """One tree on the host from several, leaf by leaf along the first axis."""
    return jax.tree.map(lambda *x: (jnp if is_key(x[0]) else np).concatenate(x), *trees)


def device_memory() -> int | None:
    """Bytes that may be planned for on each device; None on a CPU, whose devices have the host's."""
    stats = jax.local_devices()[0].memory_stats()
    return int(0.9 * stats["bytes_limit"]) if stats else None  # the rest for the gaps between arrays


def host_memory() -> int:
    """Bytes of memory of this machine, or of the container or job in it."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    root, own = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
    lines = own.read_text().splitlines() if own.exists() else []
    for _, controllers, group in (line.split(":", 2) for line in lines):
        name = "memory.limit_in_bytes" if "memory" in controllers else "memory.max"
        folder = (root / "memory" if "memory" in controllers else root) / group.lstrip("/")
        for file in [parent / name for parent in (folder, *folder.parents) if parent.is_relative_to(root)]:
            with contextlib.suppress(OSError, ValueError):  # no such limit, or "max"
                limits.append(int(file.read_text()))
    return min(limits)


def _bytes(tree: Any) -> int:
    """Of all arrays, or of arrays of these shapes."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def size(tree: Any) -> str:
    """How much memory arrays, or arrays of these shapes, take."""
    return _show(_bytes(tree))


def _show(count: int) -> str:
    return f"{count / 2**30:.3g} GiB"


def all_finite(tree: Any) -> jax.Array:
    """Whether every floating-point number of the tree is finite."""
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.array([jnp.isfinite(x).all() for x in floats]).all()


class Sometimes(NamedTuple):
    """A metric that exists at some updates only, e.g. where the policy is updated at every second one."""

    value: jax.Array
    present: jax.Array


class Metrics(NamedTuple):
    """Metrics over some updates: sums, how many updates had each, the first where it was not finite (-1: none)."""

    sums: dict[str, Any]
    counts: dict[str, Any]
    first_nonfinite: dict[str, Any]

    @property
    def means(self) -> dict[str, Any]:
        """Means over the updates that had the metric; NaN for one that none had."""
        return {name: self.sums[name] / self.counts[name] for name in self.sums}


def join(parts: list[tuple[int, Metrics]]) -> Metrics:
    """The metrics of all members over successive parts of a chunk, given with their numbers of updates, as one."""
    fetched = [jax.tree.map(np.asarray, metrics) for _, metrics in parts]
    starts = np.cumsum([0, *(length for length, _ in parts)])
    sums, counts, first = {}, {}, {}
    for name in fetched[0].sums:
        sums[name] = np.sum([part.sums[name] for part in fetched], axis=0, dtype=np.float64)
        counts[name] = np.sum([part.counts[name] for part in fetched], axis=0)
        at = np.stack([part.first_nonfinite[name] for part in fetched])
        part = (at >= 0).argmax(axis=0)
        at = np.take_along_axis(at, part[None], axis=0)[0]
        first[name] = np.where(at >= 0, starts[part] + at, -1)
    return Metrics(sums, counts, first)


def repeat(step: Step, state: Any, num_steps: jax.Array | int) -> tuple[Any, Metrics]:
    """Apply `step` to `state` `num_steps` times on the device, and add up its metrics.

    The count is traced, so chunks of different lengths share one compilation.
    """
    names = list(jax.eval_shape(step, state)[1])
    zeros = {name: jnp.zeros(()) for name in names}
    none = {name: jnp.zeros((), jnp.int32) for name in names}
    never = {name: jnp.full((), -1, jnp.int32) for name in names}

    def body(i: jax.Array, carry: tuple[Any, Metrics]) -> tuple[Any, Metrics]:
        state, (sums, counts, first) = carry
        state, metrics = step(state)
        for name, metric in metrics.items():
            value, present = metric if isinstance(metric, Sometimes) else (metric, True)
            bad = (first[name] < 0) & ~jnp.isfinite(value) & present
            first = first | {name: jnp.where(bad, i, first[name]).astype(jnp.int32)}
            sums = sums | {name: sums[name] + jnp.where(present, value, 0.0)}
            counts = counts | {name: counts[name] + present}
        return state, Metrics(sums, counts, first)

    return jax.lax.fori_loop(0, num_steps, body, (state, Metrics(zeros, none, never)))
