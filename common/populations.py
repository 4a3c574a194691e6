"""Populations: many members (seeds x hyperparameters) trained in one process on one copy of the data.

A member is one state pytree. A population is the same pytree with a leading member axis, sharded over all devices.
Within a device the members take turns on a CPU, where a batched matrix product is slower than one after another, and
are vmapped on a GPU, where one member alone is bound by kernel launches.
"""

import itertools
import os
from collections.abc import Callable
from functools import partial
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
    """Maps functions of one member over all members, sharded over the devices.

    The leading axis is padded to a multiple of the device count; padding and frozen members are inactive. On a CPU
    an inactive member costs nothing; on a GPU it is computed and thrown away.
    """

    def __init__(self, num_members: int) -> None:
        devices = jax.devices()[: max(1, min(num_members, jax.device_count()))]
        self.num_members = num_members
        self.padded = -(-num_members // len(devices)) * len(devices)
        self.mesh = Mesh(np.array(devices), (AXIS,))
        self.in_turn = devices[0].platform == "cpu"
        self.active = np.arange(self.padded) < num_members

    def replicate(self, tree: Any) -> Any:
        """The whole tree on every device."""
        return jax.device_put(tree, NamedSharding(self.mesh, P()))

    def shard(self, tree: Any) -> Any:
        """A tree of `[num_members, ...]` arrays, padded by its last member and split over the devices."""
        rows = np.minimum(np.arange(self.padded), self.num_members - 1)
        if self.padded > self.num_members:
            tree = jax.tree.map(lambda x: x[rows], tree)
        return jax.device_put(tree, NamedSharding(self.mesh, P(AXIS)))

    def to_host(self, tree: Any) -> Any:
        """The `[num_members, ...]` part of a tree, as numpy arrays (random keys stay keys)."""

        def fetch(x: jax.Array) -> Any:
            if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
                return jax.random.wrap_key_data(np.asarray(jax.random.key_data(x))[: self.num_members])
            return np.asarray(x)[: self.num_members]

        return jax.tree.map(fetch, tree)

    def compile(self, program: Callable[[Any, Any, Any, Each], Any]) -> Callable[[Any, Any, Any], Any]:
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
        # One thread for each device: the devices are the parallelism, and share the cores.
        options = {"xla_cpu_multi_thread_eigen": False} if self.in_turn and self.mesh.size > 1 else {}
        compiled = jax.jit(mapped, compiler_options=options, donate_argnums=0)
        return lambda consumed, members, shared: compiled(consumed, members, shared, jnp.asarray(self.active))

    def _each(self, active: jax.Array, function: Callable[[Any], Any], members: Any) -> Any:
        if not self.in_turn:
            return jax.vmap(function)(members)
        if self.padded == self.mesh.size:  # a single member: its arrays stay where they are
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
        return _select(jax.device_put(keep, NamedSharding(self.mesh, P(AXIS))), new, old)


@jax.jit
def _select(keep: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(keep.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, old)


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
