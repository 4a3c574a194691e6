"""Populations: who the members are; that they depend neither on each other nor on how they are shared out."""

import importlib.util
import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import means

from algorithms import iql
from common import cli, members
from common.cli import UsageError
from common.replay import Replay, Transitions, empty_ring, insert

NAMES = iql.Hyperparameters._fields


# Members


def test_grid_is_every_combination_the_last_name_fastest() -> None:
    assert cli.parse_grid("", NAMES) == [{}]
    assert cli.parse_grid("beta=1,3 actor-learning-rate=0.5,1e-3", NAMES) == [
        {"beta": 1.0, "actor_learning_rate": 0.5},
        {"beta": 1.0, "actor_learning_rate": 0.001},
        {"beta": 3.0, "actor_learning_rate": 0.5},
        {"beta": 3.0, "actor_learning_rate": 0.001},
    ]


def test_members_are_combinations_times_seeds() -> None:
    six = members.make_members(iql.Args(grid="beta=1,2", seed=7, num_seeds=3))
    assert (six.count, six.total, six.indices) == (6, 6, list(range(6)))
    assert six.seeds.tolist() == [7, 8, 9, 7, 8, 9] and six.hp.beta.tolist() == [1, 1, 1, 2, 2, 2]
    assert six.hp.expectile.tolist() == [np.float32(0.7)] * 6
    assert six.swept == [{"beta": 1.0}] * 3 + [{"beta": 2.0}] * 3
    assert six.label(4) == "member 4 (seed 8, beta=2)"


def test_members_start_from_their_own_seed_and_hyperparameters() -> None:
    four = members.make_members(iql.Args(grid="beta=3,0.5", num_seeds=2, seed=5))
    state = four.start(lambda key, hp: {"beta": jnp.float32(hp.beta), "drawn": jax.random.normal(key)})
    assert np.asarray(state["beta"]).tolist() == [3.0, 3.0, 0.5, 0.5]
    drawn = [float(jax.random.normal(jax.random.key(seed))) for seed in (5, 6, 5, 6)]
    np.testing.assert_allclose(state["drawn"], drawn, rtol=1e-6)
    assert drawn[0] != drawn[1]


def test_a_shard_is_every_nth_member() -> None:
    args = iql.Args(grid="beta=1,2", seed=7, num_seeds=3, run_dir="x")
    found = {}
    for i in range(4):
        part = members.make_members(replace(args, shard=f"{i}/4"))
        assert part.total == 6 and all(number % 4 == i for number in part.indices)
        found |= {number: (int(part.seeds[j]), float(part.hp.beta[j])) for j, number in enumerate(part.indices)}
    assert found == {0: (7, 1), 1: (8, 1), 2: (9, 1), 3: (7, 2), 4: (8, 2), 5: (9, 2)}
    for shard in ("4/4", "1/7", "-1/2", "1", "a/b", "1/0"):
        with pytest.raises(UsageError, match="--shard") as caught:
            members.make_members(replace(args, shard=shard))
        assert "\n" not in str(caught.value)


def test_the_padding_repeats_the_last_member() -> None:
    three = members.make_members(iql.Args(num_seeds=3))
    assert three.mesh.size == 2 and three.seeds.tolist() == [0, 1, 2, 2]
    whole = three.shard({"x": jnp.arange(3), "keys": jax.random.split(jax.random.key(0), 3)})
    assert np.asarray(whole["x"]).tolist() == [0, 1, 2, 2] and whole["keys"].shape == (4,)
    assert np.asarray(three.broadcast({"y": jnp.arange(2)})["y"]).tolist() == [[0, 1]] * 4


@pytest.mark.parametrize(
    "grid",
    ["alpha=1", "beta=1,x", "beta=", "beta=1,,2", "beta", "beta=1 beta=2", "beta=1,2,1.0", "beta=nan", "beta=1,inf",
     "beta=1, 2", "_fields=1"],
)  # fmt: skip
def test_bad_grids(grid: str) -> None:
    with pytest.raises(UsageError) as caught:
        cli.parse_grid(grid, NAMES)
    assert "\n" not in str(caught.value) and "--grid" in str(caught.value)


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "250000 100000\n"}, 3),
        ({"cpu.max": "1000 100000\n"}, 1),
        ({"cpu.max": "9900000 100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2),
    ],
)
def test_cores_are_those_of_the_affinity_and_of_the_containers_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], cores: int
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(members, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.delenv("NPROC", raising=False)
    assert members.usable_cores() == cores
    monkeypatch.setenv("NPROC", "5")
    assert members.usable_cores() == 5, "who sets it decides"


def test_xla_has_as_many_threads_as_there_are_usable_cores(spawn: Callable[..., subprocess.Popen]) -> None:
    """It would size its pool by the machine's cores, whatever a container may use of them."""
    code = """
import os, pathlib, jax
from algorithms import iql
from common import members
members.usable_cores = lambda: 5
members.make_members(iql.Args())
jax.block_until_ready(jax.numpy.ones((300, 300)) @ jax.numpy.ones((300, 300)))
print([task.joinpath("comm").read_text() for task in pathlib.Path("/proc/self/task").iterdir()].count("tf_XLAEigen\\n"))
"""
    process = spawn("-c", code)
    assert process.communicate(timeout=60) == ("5\n", "")


@pytest.mark.parametrize("platform", ["cuda", pytest.param("no_such_device", marks=pytest.mark.slow)])
def test_a_device_that_jax_cannot_use(
    spawn: Callable[..., subprocess.Popen], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, platform: str
) -> None:
    """One line, and nothing written. Of CUDA without its libraries JAX itself says nothing but AssertionError."""
    if platform == "cuda" and any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13)):
        pytest.skip("CUDA is installed")
    monkeypatch.setenv("JAX_PLATFORMS", platform)
    process = spawn("algorithms/iql.py", "--num-updates", 1, "--run-dir", tmp_path / "run")
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said.count("\n")) == (2, 1) and "error: JAX has no device of JAX_PLATFORMS" in said
    assert not any(tmp_path.iterdir())


def test_members_that_memory_cannot_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line says how many would fit."""
    nine = members.make_members(iql.Args(num_seeds=9))
    init = partial(iql.init, args=iql.Args(hidden_dim=4096), obs_dim=11, action_dim=3)
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PAGE_SIZE": 4096}.get(name, 4 * 2**30 // 4096))
    with pytest.raises(UsageError, match=r"the networks of 9 member.* GiB") as caught:
        nine.start(init)
    assert "\n" not in str(caught.value) and "about 1 " in str(caught.value)
    ring = empty_ring(10**7, 11, 3)  # 4 bytes for each of 2 x 11 + 3 + 3 numbers, and two devices have ten
    with pytest.raises(UsageError, match=r"the online transitions of 9 .* 10\.4 GiB.* 4; about 3 "):
        nine.broadcast(ring)


def test_the_cores_of_a_cpu_share_one_copy_of_the_data() -> None:
    population = members.make_members(iql.Args(num_seeds=2))
    data = np.arange(3000, dtype=np.float32).reshape(1000, 3)[1:]  # wherever it begins
    placed = population.replicate({"x": data, "flag": np.ones(7, bool)})
    for x in placed.values():
        assert len({shard.data.unsafe_buffer_pointer() for shard in x.addressable_shards}) == 1
        assert len(x.addressable_shards) == 2
    np.testing.assert_array_equal(placed["x"], data)


# repeat


def counting_step(state: Any) -> tuple[Any, dict[str, jax.Array]]:
    """Integer state, so that sums are exact; `bad` is not finite at states 5 and 7, `worse` always."""
    count, key = state
    key, draw = jax.random.split(key)
    metrics = {
        "count": count.astype(jnp.float32),
        "square": (count**2).astype(jnp.float32),
        "noise": jax.random.normal(draw),
        "bad": jnp.where((count == 5) | (count == 7), jnp.inf, 1.0),
        "worse": jnp.float32(jnp.nan),
    }
    return (count + 1, key), metrics


def test_repeat_is_a_python_loop() -> None:
    state = (jnp.int32(3), jax.random.key(0))
    final, metrics = jax.jit(partial(members.repeat, counting_step))(state, 8)
    history = []
    for _ in range(8):
        state, one = counting_step(state)
        history.append({name: float(value) for name, value in one.items()})
    assert int(final[0]) == 11
    np.testing.assert_array_equal(jax.random.key_data(final[1]), jax.random.key_data(state[1]))
    assert float(means(metrics)["count"]) == 6.5  # mean of 3 ... 10
    assert float(means(metrics)["square"]) == (9 + 16 + 25 + 36 + 49 + 64 + 81 + 100) / 8
    assert float(means(metrics)["noise"]) == pytest.approx(np.mean([one["noise"] for one in history]), rel=1e-5)
    finite = {name: bool(np.isfinite(total)) for name, total in metrics.sums.items()}
    assert finite == {"count": True, "square": True, "noise": True, "bad": False, "worse": False}


def test_repeat_in_chunks_is_repeat_at_once() -> None:
    run = jax.jit(partial(members.repeat, counting_step))
    whole = run((jnp.int32(0), jax.random.key(1)), 9)
    state, parts = (jnp.int32(0), jax.random.key(1)), []
    for _ in range(9):
        state, metrics = run(state, 1)
        parts.append(jax.tree.map(lambda x: x[None], metrics))  # of a population of one
    np.testing.assert_array_equal(jax.random.key_data(state[1]), jax.random.key_data(whole[0][1]))
    joined = members.join(parts)
    for name in ("count", "square", "noise"):
        assert means(joined)[name][0] == pytest.approx(float(means(whole[1])[name]), abs=1e-6)
    assert not np.isfinite(joined.sums["bad"]).any() and not np.isfinite(whole[1].sums["bad"])
    assert {int(value[0]) for value in joined.counts.values()} == {9}


def test_metrics_of_several_devices_are_fetched_as_one_array(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two devices, those of a hundred online steps, one array for each metric, took longer than the updates."""
    three = members.make_members(iql.Args(num_seeds=3))
    parts = [
        members.Metrics(*(three.shard({x: np.arange(3) * scale for x in "ba"}) for scale in (0.5 * i, 1)))
        for i in range(4)
    ]
    fetched, asarray = [], np.asarray
    monkeypatch.setattr(np, "asarray", lambda x, *rest, **more: fetched.append(x) or asarray(x, *rest, **more))
    joined = members.join(parts)
    assert len([x for x in fetched if isinstance(x, jax.Array)]) == len(parts)
    assert list(joined.sums) == ["a", "b"]
    assert joined.sums["b"].tolist() == [0, 3, 6, 6] and joined.counts["a"].tolist() == [0, 4, 8, 8]


def test_repeat_without_updates_changes_nothing() -> None:
    state, metrics = jax.jit(partial(members.repeat, counting_step))((jnp.int32(4), jax.random.key(1)), 0)
    assert int(state[0]) == 4 and {int(count) for count in metrics.counts.values()} == {0}


def test_metric_that_exists_at_some_updates_is_averaged_over_those() -> None:
    def step(count: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        odd = count % 2 == 1
        value = jnp.where(odd, count, jnp.nan).astype(jnp.float32)  # what is not there must not count
        never = (jnp.float32(jnp.inf), jnp.array(False))
        broken = (jnp.where(count == 3, jnp.inf, 1.0), odd)
        return count + 1, {"odd": (value, odd), "never": never, "broken": broken}

    _, metrics = jax.jit(partial(members.repeat, step))(jnp.int32(0), 6)
    assert float(means(metrics)["odd"]) == 3.0  # mean of 1, 3, 5
    assert {name: int(count) for name, count in metrics.counts.items()} == {"odd": 3, "never": 0, "broken": 3}
    assert np.isnan(float(means(metrics)["never"]))
    assert {name: bool(np.isfinite(x)) for name, x in metrics.sums.items()} == {
        "odd": True,
        "never": True,
        "broken": False,
    }


def test_a_metric_of_several_numbers_is_refused() -> None:
    def step(count: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        return count + 1, {"each": jnp.zeros(4)}

    with pytest.raises(AssertionError, match=r"metric each is \(4,\), it must be one number"):
        members.repeat(step, jnp.int32(0), 2)


def test_a_state_is_kept_where_a_number_of_it_or_of_its_metrics_is_not_finite() -> None:
    def metrics(total: float) -> members.Metrics:
        return members.Metrics({"x": jnp.float32(total)}, {"x": jnp.ones((), int)})

    old, new = ({"w": jnp.full(2, x), "count": jnp.int32(x)} for x in (1.0, 2.0))
    broken = new | {"w": jnp.array([2.0, jnp.nan])}
    for state, total, fine in ((new, 0.0, True), (new, np.inf, False), (broken, 0.0, False)):
        kept, finite = members.keep_finite(state, old, metrics(total))
        assert bool(finite) == fine
        jax.tree.map(np.testing.assert_array_equal, kept, new if fine else old)


# Independence


class Given(NamedTuple):
    """A population's states and metrics after training, on the host."""

    states: Any
    metrics: Any

    def __getitem__(self, i: int) -> Any:
        return jax.tree.map(lambda x: x[i], (self.states, self.metrics))


def batch_of_data() -> Transitions:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 4)).astype(np.float32)
    flags = [(rng.random(64) < p).astype(np.float32) for p in (0.1, 0.1)]
    actions, rewards = rng.uniform(-1, 1, (64, 2)).astype(np.float32), rng.normal(size=64).astype(np.float32)
    return Transitions(x, actions, rewards, np.roll(x, -1, 0), *flags)


ARGS = iql.Args(hidden_dim=8, batch_size=16, actor_decay_updates=0, dropout=0.1, grid="beta=3,0.5", num_seeds=2)


def trained(args: iql.Args = ARGS, due: Any = 1, batched: bool = False, updates: int = 20) -> Given:
    population = members.make_members(args)
    train = population.map(partial(iql.train, args=ARGS), batched=batched)
    state = population.start(partial(iql.init, args=ARGS, obs_dim=4, action_dim=2))
    counts = np.int32(updates) * np.ones(len(population.seeds), np.int32) * np.int32(due)
    data = Replay(population.replicate(batch_of_data()))
    state, metrics = train(state, population.hp, data, counts)
    return Given(*jax.tree.map(np.asarray, (state._replace(key=jax.random.key_data(state.key)), metrics)))


@pytest.fixture(scope="module")
def four() -> Given:
    return trained()


def leaves(tree: Any) -> list[np.ndarray]:
    """Numpy leaves, of keys their data."""
    flat = jax.tree.leaves(tree)
    keys = [jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) for x in flat]
    return [np.asarray(jax.random.key_data(x) if key else x) for x, key in zip(flat, keys, strict=True)]


def assert_equal(one: Any, other: Any) -> None:
    for a, b in zip(leaves(one), leaves(other), strict=True):
        assert a.tobytes() == b.tobytes()


def assert_close(one: Any, other: Any) -> None:
    for a, b in zip(leaves(one), leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_member_is_the_same_seed_and_hyperparameters_alone(four: Given) -> None:
    """Not bit for bit: alone, a matrix product may be split over threads and so be summed in another order."""
    hp = jax.tree.map(np.float32, iql.Hyperparameters(beta=0.5))
    state = jax.jit(partial(iql.init, args=ARGS, obs_dim=4, action_dim=2))(jax.random.key(1), hp)
    assert_close(four[3], jax.jit(partial(iql.train, args=ARGS))(state, hp, Replay(batch_of_data()), 20))
    assert int(four.states.step[3]) == 20
    first, second = leaves(four[0][0].actor), leaves(four[1][0].actor)
    assert max(np.abs(a - b).max() for a, b in zip(first, second, strict=True)) > 0.01, "members differ"


def test_what_else_is_in_the_population_does_not_matter(four: Given) -> None:
    """Nor how the members are shared out over processes; nor that one breaks."""
    others = trained(replace(ARGS, grid="beta=0.5 critic_learning_rate=1e30,3e-4"))
    assert any(not np.isfinite(x).all() for x in leaves(others[0]) if x.dtype == np.float32)
    assert_equal(others[2], four[2])
    assert_equal(others[3], four[3])
    part = trained(replace(ARGS, shard="1/4", run_dir="unused"))
    assert_equal(part[0], four[1])


def test_members_may_do_different_numbers_of_updates(four: Given) -> None:
    result = trained(due=np.array([1, 0, 1, 1]))
    for i in (0, 2, 3):
        assert_equal(result[i], four[i])
    assert int(result.states.step[1]) == 0


def test_vmapped_members_as_on_a_gpu_are_those_that_take_turns(four: Given) -> None:
    assert_close(trained(batched=True), four)


def test_each_member_draws_from_its_own_ring() -> None:
    """The rings of a device are not cut up; a member finds its own by its place."""
    three = members.make_members(iql.Args(num_seeds=3))
    ring = three.broadcast(empty_ring(4, 1, 1))
    values = np.float32([[10], [20], [30], [30]])
    row = Transitions(values[..., None], values[..., None], values, values[..., None], values * 0, values * 0)
    ring = three.map(insert, batched=True)(ring, row)

    def drawn(key: jax.Array, data: Replay) -> jax.Array:
        return iql.replay.sample(key, data, 5).rewards

    found = three.map(drawn)(three.keys(0), Replay(None, ring))
    assert np.asarray(found).tolist() == [[10] * 5, [20] * 5, [30] * 5, [30] * 5]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("batched", [False, True])
def test_an_argument_without_an_axis_of_members_is_refused(count: int, batched: bool) -> None:
    """One member would else take its first element in silence."""
    some = members.make_members(iql.Args(num_seeds=count))
    scaled = some.map(lambda key, scale: scale * jax.random.uniform(key), batched=batched)
    with pytest.raises((ValueError, TypeError)):
        scaled(some.keys(0), np.array([1.0, 2.0]))


def test_keys_are_of_the_member_the_number_and_the_step() -> None:
    three = members.make_members(iql.Args(num_seeds=3))
    keys = [
        three.keys(0),
        three.keys(1),
        *(members.evaluation_keys(three.seeds, *at) for at in ((0, 0), (0, 1), (1, 0))),
    ]
    data = np.concatenate([np.asarray(jax.random.key_data(key))[:3] for key in keys])
    assert len(np.unique(data, axis=0)) == 15
    again = members.evaluation_keys(three.seeds, 1, 0)
    np.testing.assert_array_equal(jax.random.key_data(again)[:3], data[-3:])
