"""Populations: members are independent of each other, of their number, of padding and of chunk boundaries."""

import os
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import arrays_of

from algorithms import iql
from common import populations
from common.buffers import Replay, Transitions
from common.errors import UsageError
from common.populations import Population


class HP(NamedTuple):
    beta: float = 3.0
    learning_rate: float = 0.1
    gamma: float = 0.5


# Members


def test_grid_is_every_combination_the_last_name_fastest() -> None:
    assert populations.parse_grid("", HP()) == [{}]
    assert populations.parse_grid("beta=1,3 learning-rate=0.5,1e-3", HP()) == [
        {"beta": 1.0, "learning_rate": 0.5},
        {"beta": 1.0, "learning_rate": 0.001},
        {"beta": 3.0, "learning_rate": 0.5},
        {"beta": 3.0, "learning_rate": 0.001},
    ]


def test_members_are_combinations_times_seeds() -> None:
    members = populations.make_members(HP(), "beta=1,2", 7, 3)
    assert [(m.index, m.seed, m.hp.beta, m.swept) for m in members] == [
        (0, 7, 1.0, {"beta": 1.0}),
        (1, 8, 1.0, {"beta": 1.0}),
        (2, 9, 1.0, {"beta": 1.0}),
        (3, 7, 2.0, {"beta": 2.0}),
        (4, 8, 2.0, {"beta": 2.0}),
        (5, 9, 2.0, {"beta": 2.0}),
    ]
    assert {m.hp[1:] for m in members} == {(0.1, 0.5)}
    assert str(members[4]) == "member 4 (seed 8, beta=2)"


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        ("alpha=1", "no hyperparameter alpha"),
        ("beta=1,x", "not a list of numbers"),
        ("beta=", "not a list of numbers"),
        ("beta=1,,2", "not a list of numbers"),
        ("beta", "name=value"),
        ("beta=1 beta=2", "twice"),
        ("beta=1,2,1.0", "differ"),
        ("beta=nan", "finite"),
        ("beta=1,inf", "finite"),
        ("beta=1, 2", "not a list of numbers"),
        ("_fields=1", "no hyperparameter"),
    ],
)
def test_bad_grids(grid: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        populations.parse_grid(grid, HP())
    assert "\n" not in str(caught.value) and "--grid" in str(caught.value)


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
    final, metrics = jax.jit(partial(populations.repeat, counting_step))(state, 8)
    history = []
    for _ in range(8):
        state, one = counting_step(state)
        history.append({name: float(value) for name, value in one.items()})
    assert int(final[0]) == 11
    np.testing.assert_array_equal(jax.random.key_data(final[1]), jax.random.key_data(state[1]))
    assert float(metrics.means["count"]) == 6.5  # mean of 3 ... 10
    assert float(metrics.means["square"]) == (9 + 16 + 25 + 36 + 49 + 64 + 81 + 100) / 8
    assert float(metrics.means["noise"]) == pytest.approx(np.mean([one["noise"] for one in history]), rel=1e-5)
    first = {name: int(value) for name, value in metrics.first_nonfinite.items()}
    assert first == {"count": -1, "square": -1, "noise": -1, "bad": 2, "worse": 0}


def test_repeat_in_chunks_is_repeat_at_once() -> None:
    run = jax.jit(partial(populations.repeat, counting_step))
    whole = run((jnp.int32(0), jax.random.key(1)), 9)
    state, parts = (jnp.int32(0), jax.random.key(1)), []
    for length in (1, 5, 3):
        state, metrics = run(state, length)
        parts.append((length, jax.tree.map(lambda x: x[None], metrics)))  # of a population of one
    np.testing.assert_array_equal(jax.random.key_data(state[1]), jax.random.key_data(whole[0][1]))
    joined = populations.join(parts)
    for name in ("count", "square", "noise"):
        assert joined.means[name][0] == pytest.approx(float(whole[1].means[name]), abs=1e-6)
    assert {name: int(value[0]) for name, value in joined.first_nonfinite.items()} == {
        name: int(value) for name, value in whole[1].first_nonfinite.items()
    }
    assert {int(value[0]) for value in joined.counts.values()} == {9}


def test_metric_that_exists_at_some_updates_is_averaged_over_those() -> None:
    def step(count: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        odd = count % 2 == 1
        value = jnp.where(odd, count, jnp.nan).astype(jnp.float32)  # what is not there must not count
        never = populations.Sometimes(jnp.float32(jnp.inf), jnp.array(False))
        broken = populations.Sometimes(jnp.where(count == 3, jnp.inf, 1.0), odd)
        return count + 1, {"odd": populations.Sometimes(value, odd), "never": never, "broken": broken}

    _, metrics = jax.jit(partial(populations.repeat, step))(jnp.int32(0), 6)
    assert float(metrics.means["odd"]) == 3.0  # mean of 1, 3, 5
    assert {name: int(count) for name, count in metrics.counts.items()} == {"odd": 3, "never": 0, "broken": 3}
    assert np.isnan(float(metrics.means["never"]))
    assert {name: int(x) for name, x in metrics.first_nonfinite.items()} == {"odd": -1, "never": -1, "broken": 3}


def test_join_finds_the_first_update_of_each_member() -> None:
    def part(*first: int) -> populations.Metrics:
        return populations.Metrics({"x": np.ones(2)}, {"x": np.ones(2, int)}, {"x": np.array(first)})

    joined = populations.join([(10, part(-1, -1)), (10, part(4, -1)), (5, part(0, -1)), (5, part(1, 3))])
    assert joined.first_nonfinite["x"].tolist() == [14, 28]


# Independence


def batch_of_data() -> Transitions:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 4)).astype(np.float32)
    flags = [(rng.random(64) < p).astype(np.float32) for p in (0.1, 0.1)]
    return Transitions(
        jnp.asarray(x),
        jnp.asarray(rng.uniform(-1, 1, (64, 2)).astype(np.float32)),
        jnp.asarray(rng.normal(size=64).astype(np.float32)),
        jnp.asarray(np.roll(x, -1, 0)),
        *map(jnp.asarray, flags),
    )


ARGS = iql.Args(hidden_dim=8, batch_size=16, actor_decay_updates=0, dropout=0.1)
MEMBERS = [(0, iql.Hyperparameters()), (5, iql.Hyperparameters(beta=0.5, expectile=0.9)), (2, iql.Hyperparameters())]


@jax.jit
def start(seed: int, hp: iql.Hyperparameters) -> iql.State:
    return iql.init(jax.random.key(seed), hp, ARGS, 4, 2)


train_alone = jax.jit(partial(iql.train, args=ARGS))


@cache
def population_of(size: int) -> tuple[Population, Callable[..., Any]]:
    """A population and its compiled training."""
    population = Population(size)

    def program(_: Any, members: Any, shared: Any, each: populations.Each) -> Any:
        return each(lambda member: iql.train(*member, Replay(shared[0]), shared[1], ARGS), members)

    return population, population.compile(program)


def leaves(tree: Any) -> list[np.ndarray]:
    """Numpy leaves, of keys their data."""
    flat = jax.tree.leaves(tree)
    keys = [jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) for x in flat]
    return [np.asarray(jax.random.key_data(x) if key else x) for x, key in zip(flat, keys, strict=True)]


def train_population(members: list[tuple[int, Any]], updates: int = 30, inactive: tuple[int, ...] = ()) -> list[Any]:
    """The members' final states and metrics, one by one, on the host."""
    population, train = population_of(len(members))
    population.active[: len(members)] = [i not in inactive for i in range(len(members))]
    states = [start(*member) for member in members]
    states = population.shard(jax.tree.map(lambda *x: jnp.stack(x), *states))
    hp = population.shard(jax.tree.map(lambda *x: jnp.array(x, jnp.float32), *(hp for _, hp in members)))
    data = population.replicate(batch_of_data())
    result = population.to_host(train((), (states, hp), (data, jnp.int32(updates))))
    return [jax.tree.map(lambda x, i=i: x[i], result) for i in range(len(members))]


@pytest.fixture(scope="module")
def trained() -> list[Any]:
    return train_population(MEMBERS)


def assert_equal(one: Any, other: Any) -> None:
    for a, b in zip(leaves(one), leaves(other), strict=True):
        assert a.tobytes() == b.tobytes()


def assert_close(one: Any, other: Any) -> None:
    for a, b in zip(leaves(one), leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_the_padding_is_inactive() -> None:
    population = Population(3)
    assert population.mesh.size == 2 and population.padded == 4
    assert population.active.tolist() == [True, True, True, False]
    whole = population.shard({"x": jnp.arange(3), "keys": jax.random.split(jax.random.key(0), 3)})
    assert whole["x"].shape == (4,)
    back = population.to_host(whole)
    np.testing.assert_array_equal(back["x"], [0, 1, 2])
    np.testing.assert_array_equal(leaves(back["keys"])[0], leaves(jax.random.split(jax.random.key(0), 3))[0])


@pytest.mark.parametrize("index", range(3))
def test_a_member_is_the_same_seed_and_hyperparameters_alone(trained: list[Any], index: int) -> None:
    """Not bit for bit: alone, a matrix product may be split over threads and so be summed in another order."""
    seed, hp = MEMBERS[index]
    alone = train_alone(start(seed, hp), hp, Replay(batch_of_data()), 30)
    assert_close(trained[index], alone)
    assert int(trained[index][0].step) == 30
    assert_close(trained[index], train_population([MEMBERS[index]])[0])


def test_members_differ(trained: list[Any]) -> None:
    """What the tests of equality here could not see if seeds or hyperparameters were ignored."""
    first, second = leaves(trained[0][0].actor), leaves(trained[1][0].actor)
    assert max(np.abs(a - b).max() for a, b in zip(first, second, strict=True)) > 0.01


def test_what_else_is_in_the_population_does_not_matter(trained: list[Any]) -> None:
    others = [(9, iql.Hyperparameters(discount=1e30)), MEMBERS[1], (3, iql.Hyperparameters(critic_learning_rate=1.0))]
    again = train_population(others)
    assert_equal(again[1], trained[1])
    assert any(not np.isfinite(x).all() for x in leaves(again[0]) if x.dtype == np.float32)
    moved = train_population([MEMBERS[1], MEMBERS[2], MEMBERS[0]])
    for i, j in ((0, 1), (1, 2), (2, 0)):
        assert_equal(moved[i], trained[j])


def test_an_inactive_member_changes_nothing_for_the_others(trained: list[Any]) -> None:
    result = train_population(MEMBERS, inactive=(1,))
    assert_equal(result[0], trained[0])
    assert_equal(result[2], trained[2])


def test_select_picks_by_member() -> None:
    population = Population(3)
    new, old = (population.shard({"x": jnp.full((3, 2), value), "y": jnp.full(3, value)}) for value in (1, 2))
    keep = np.array([True, False, True, True])
    picked = population.to_host(population.select(keep, new, old))
    np.testing.assert_array_equal(picked["x"], [[1, 1], [2, 2], [1, 1]])
    np.testing.assert_array_equal(picked["y"], [1, 2, 1])


def test_vmapped_members_as_on_a_gpu_are_those_that_take_turns(trained: list[Any]) -> None:
    population = Population(len(MEMBERS))
    population.in_turn = False

    def program(_: Any, members: Any, shared: Any, each: populations.Each) -> Any:
        return each(lambda member: iql.train(*member, Replay(shared[0]), shared[1], ARGS), members)

    states = jax.tree.map(lambda *x: jnp.stack(x), *[start(*member) for member in MEMBERS])
    hp = jax.tree.map(lambda *x: jnp.array(x, jnp.float32), *(hp for _, hp in MEMBERS))
    shared = population.replicate((batch_of_data(), jnp.int32(30)))
    result = population.compile(program)((), (population.shard(states), population.shard(hp)), shared)
    result = population.to_host(result)
    for i in range(len(MEMBERS)):
        assert_close(jax.tree.map(lambda x, i=i: x[i], result), trained[i])


# Slices


def limited(monkeypatch: pytest.MonkeyPatch, devices: int | None = None, host: int | None = None) -> None:
    """Give the devices or the host so many bytes."""
    if devices is not None:
        monkeypatch.setattr(populations, "device_memory", lambda: devices)
    if host is not None:
        monkeypatch.setattr(populations, "host_memory", lambda: host)


HP_SHAPE = jax.tree.map(lambda _: jax.ShapeDtypeStruct((), jnp.float32), iql.Hyperparameters())
STATE_SHAPE = jax.eval_shape(start, 0, iql.Hyperparameters())
NUMBERS = [*MEMBERS, (3, iql.Hyperparameters(beta=1.0)), (4, iql.Hyperparameters())]


def fitted(kept: Any = ()) -> tuple[Population, Callable[..., Any], Any]:
    """A population of five, its training, and what is shared; divided as the limits say."""
    population = Population(len(NUMBERS))

    def program(_: Any, members: Any, shared: Any, each: populations.Each) -> Any:
        return each(lambda member: iql.train(*member, Replay(shared[0]), shared[1], ARGS), members)

    train, shared = population.compile(program), (population.replicate(batch_of_data()), jnp.int32(30))
    population.fit(train, (STATE_SHAPE, HP_SHAPE), kept, shared)
    return population, train, shared


def trained_numbers(population: Population, train: Callable[..., Any], shared: Any) -> Any:
    states = populations.concatenate(
        [populations.on_host(jax.tree.map(lambda x: x[None], start(*member))) for member in NUMBERS]
    )
    hp = jax.tree.map(lambda *x: np.array(x, np.float32), *(hp for _, hp in NUMBERS))
    return population.to_host(train((), (population.shard(states), population.shard(hp)), shared))


def test_slices_change_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], trained: list[Any]
) -> None:
    population, train, shared = fitted()
    whole = train.memory((STATE_SHAPE, HP_SHAPE), shared)
    assert (population.slices, population.padded, capsys.readouterr().err) == (1, 6, "")
    expected = trained_numbers(population, train, shared)
    limited(monkeypatch, devices=whole)
    assert fitted()[0].slices == 1 and capsys.readouterr().err == "", "just enough"
    assert fitted(kept=STATE_SHAPE)[0].slices == 2, "what stays beside it counts"
    assert capsys.readouterr().err.count("\n") == 1
    limited(monkeypatch, devices=whole - 1)
    population, train, shared = fitted()
    assert (population.slices, population.slice_size, population.padded) == (2, 4, 8)
    assert population.active.tolist() == [True] * 5 + [False] * 3
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "5 members need" in err and "2 slices of 4" in err
    assert train.memory((STATE_SHAPE, HP_SHAPE), shared) < whole
    assert_equal(trained_numbers(population, train, shared), expected)
    for i in range(len(MEMBERS)):
        assert_equal(jax.tree.map(lambda x, i=i: x[i], expected), trained[i])


def test_smallest_slices(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One member for each device at a time, and what does not fit even so."""
    population, train, shared = fitted()
    population._slice(3)
    least = train.memory((STATE_SHAPE, HP_SHAPE), shared)
    limited(monkeypatch, devices=least)
    population = fitted()[0]
    assert (population.slices, population.slice_size) == (3, 2)
    assert population.blocks == [slice(i, i + 1) for i in range(5)], "evaluated on one device"
    assert "3 slices of 2" in capsys.readouterr().err
    limited(monkeypatch, devices=least - 1)
    with pytest.raises(UsageError, match="one member needs"):
        fitted()


def test_members_that_the_host_cannot_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    each, data = (populations._bytes(tree) for tree in ((STATE_SHAPE, HP_SHAPE), batch_of_data()))
    limited(monkeypatch, host=data + 4 + 5 * each)
    assert fitted()[0].slices == 1
    limited(monkeypatch, host=data + 4 + 5 * each - 1)
    with pytest.raises(UsageError, match=r"5 members need at least .* at most 4 fit"):
        fitted()
    limited(monkeypatch, host=data + 4 + 4 * each)
    with pytest.raises(UsageError, match="at most 4 fit"):
        fitted()
    limited(monkeypatch, devices=1 << 40)
    assert fitted()[0].slices == 1, "on a device the host's memory is not what counts"


def test_memory_of_this_machine() -> None:
    assert 1 << 28 < populations.host_memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert populations.device_memory() is None


# Whole runs


@pytest.mark.slow
def test_a_run_in_slices_writes_the_same(
    tmp_path: Path, small_run: list[str], iql: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline and online, with a member that diverges, and resumed unsliced from a checkpoint of slices."""
    rates = ["--grid", "critic_learning_rate=3e-4,1e-3,1e7", "--num-seeds", "2", "--actor-decay-updates", "0"]
    flags = [*small_run, *rates, "--eval-every", "15", "--num-updates", "30", "--run-dir"]
    original, needed = populations.Compiled.memory, []

    def memory(*arguments: Any) -> int:
        needed.append(original(*arguments))
        return needed[-1]

    monkeypatch.setattr(populations.Compiled, "memory", memory)
    limited(monkeypatch, devices=1 << 40)
    whole = iql(*flags, tmp_path / "whole", "--online-steps", "4")
    limited(monkeypatch, devices=needed[-1])
    sliced = iql(*flags, tmp_path / "sliced", "--online-steps", "4")
    assert whole.status == sliced.status == 0
    message, *rest = sliced.err.splitlines(keepends=True)
    assert "6 members need" in message and "take turns in" in message
    assert "".join(rest) == whole.err and whole.err.count("diverged") == 2
    assert iql(*flags, tmp_path / "offline").status == 0
    limited(monkeypatch, devices=1 << 40)
    assert iql(*flags, tmp_path / "offline", "--online-steps", "4", "--resume", "True").status == 0
    for name in ("sliced", "offline"):
        wanted, found = arrays_of(tmp_path / "whole"), arrays_of(tmp_path / name)
        assert wanted.keys() == found.keys() and any("'ring'" in key for key in wanted)
        for key, array in wanted.items():
            ours, theirs = array, found[key]
            if "'ring'" in key:  # what frozen members collect has no meaning
                ours, theirs = ours[:4], theirs[:4]
            assert ours.tobytes() == theirs.tobytes(), key
        for table in ("metrics.csv", "evaluations.csv"):
            wanted = (tmp_path / "whole" / table).read_text().splitlines()
            found = (tmp_path / name / table).read_text().splitlines()
            assert [row for row in found if row in wanted] == wanted


def test_a_member_of_a_run_is_that_run_alone(tmp_path: Path, small_run: list[str], iql: Callable[..., Any]) -> None:
    short = [*small_run, "--num-updates", "30"]
    assert iql(*short, "--grid", "beta=1,2", "--num-seeds", "2", "--run-dir", tmp_path / "all").status == 0
    assert iql(*short, "--beta", "2", "--seed", "1", "--run-dir", tmp_path / "one").status == 0
    with np.load(tmp_path / "all/checkpoint/state.npz") as a, np.load(tmp_path / "one/checkpoint/state.npz") as b:
        names = [name for name in a.files if "'state'" in name]
        assert len(names) > 30
        for name in names:
            np.testing.assert_allclose(a[name][3], b[name][0], rtol=1e-4, atol=1e-5, err_msg=name)
