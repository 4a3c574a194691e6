"""AWR's mathematics against closed forms, an independent numpy version, and problems with a known solution."""

import itertools
import json
import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import arrays_of, assert_same_arrays, crossed, done_in, means, rows_of
from scipy import stats
from test_iql import ACT, BATCH, OBS, NumpyAdam, numpy_gradients, numpy_mlp, random_batch, trees_equal

from algorithms import awr
from algorithms.awr import Episodes, Normalizer, normalize
from common import cli, replay, runs
from common.environments import Collector
from common.members import Metrics
from common.replay import Replay, Transitions, record
from common.runs import Run

ARGS = awr.Args(hidden_dim=8, num_layers=2, batch_size=BATCH, value_updates=3, policy_updates=4)
PLAIN = replace(ARGS, normalizer_samples=0, scale_values=False, normalize_advantages=False)
HP, NO_CLIP = awr.Hyperparameters(), 3e38  # float32 ends at 3.4e38
train = jax.jit(awr.train, static_argnames="args")
evaluate = jax.jit(awr.values_and_returns, static_argnames="args")
observe = jax.jit(awr.observe, static_argnames="limit")
returns = jax.jit(awr.lambda_returns)
update_value = jax.jit(awr.update_value, static_argnames="args")
update_actor = jax.jit(awr.update_actor, static_argnames="args")
insert = jax.jit(awr.insert)
double = partial(jax.tree.map, lambda x: np.asarray(x, np.float64))


def fresh(args: awr.Args = ARGS, seed: int = 0, obs_dim: int = OBS, action_dim: int = ACT) -> awr.State:
    """A new state, its policy's last layer made large enough for means on both sides of the bounds."""
    state = jax.jit(awr.init, static_argnums=(2, 3, 4))(jax.random.key(seed), HP, args, obs_dim, action_dim)
    layers = dict(state.actor["params"])
    layers[max(layers)] = jax.tree.map(lambda x: 300 * x, layers[max(layers)])
    return state._replace(actor={"params": layers})


def assert_close(a: object, b: object, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    jax.tree.map(partial(np.testing.assert_allclose, rtol=rtol, atol=atol), a, b)


def joined(parts: list[Transitions]) -> Transitions:
    return jax.tree.map(lambda *rows: np.concatenate(rows), *parts)


def trajectories(lengths: Any, seed: int = 0, open_end: bool = False) -> list[Transitions]:
    """Whole episodes that end at random by termination or by truncation; with `open_end` the last one has no flag."""
    rng, episodes = np.random.default_rng(seed), []
    for length in lengths:
        states = rng.normal([1.0, 0.0, -2.0, 5.0], [1.0, 0.1, 3.0, 1.0], (length + 1, OBS)).astype(np.float32)
        last = (np.arange(length) == length - 1).astype(np.float32)
        terminated = float(rng.random() < 0.5)
        episode = random_batch(int(rng.integers(1000)), length)._replace(
            observations=states[:-1],
            next_observations=states[1:],
            terminations=last * np.float32(terminated),
            truncations=last * np.float32(1 - terminated),
        )
        episodes.append(episode)
    if open_end:
        nothing = np.zeros_like(episodes[-1].rewards)
        episodes[-1] = episodes[-1]._replace(terminations=nothing, truncations=nothing)
    return episodes


def numpy_returns(episode: Transitions, next_values: np.ndarray, hp: awr.Hyperparameters) -> np.ndarray:
    """TD(lambda) returns of one episode, step by step from its end."""
    found = np.zeros(len(episode.rewards))
    for t in reversed(range(len(found))):
        value = 0.0 if episode.terminations[t] else float(next_values[t])
        later = value if t == len(found) - 1 else (1 - hp.td_lambda) * value + hp.td_lambda * found[t + 1]
        found[t] = episode.rewards[t] + hp.discount * later
    return found


def each_apart(episodes: list[Transitions], values: Callable, hp: awr.Hyperparameters) -> np.ndarray:
    """The returns of all episodes, one after the other, computed one by one."""
    parts = [numpy_returns(episode, values(episode.next_observations), hp) for episode in episodes]
    return np.concatenate(parts) if parts else np.zeros(0)


class Log:
    """A ring, and in lists all that was ever written into it."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.ring = capacity, replay.empty_ring(capacity, OBS, ACT)
        self.episodes: list[Transitions] = []

    def add(self, episodes: list[Transitions]) -> None:
        """As a run does: several whole episodes at once, in a block whose further rows do not count."""
        self.episodes += episodes
        rows = joined(episodes)
        count = len(rows.rewards)
        block = jax.tree.map(lambda x: np.pad(x, [(0, self.capacity - count)] + [(0, 0)] * (x.ndim - 1)) + 0, rows)
        for column in block:
            column[count:] = np.nan
        self.ring = insert(self.ring, block, count)

    def stored(self) -> np.ndarray:
        """Which row of all lies in each place of the ring, as far as it is written."""
        total = sum(len(episode.rewards) for episode in self.episodes)
        places = {i % self.capacity: i for i in range(total)}
        return np.array([places[place] for place in sorted(places)], int)


@pytest.mark.parametrize("capacity", [5, 8])
def test_a_part_of_a_block_is_written_as_if_it_were_all(capacity: int) -> None:
    """Members of a population write 0 to 5 rows each of blocks of 5, through several wraps; as lists would."""
    rng, value = np.random.default_rng(capacity), 1.0
    rings = jax.tree.map(lambda x: jnp.stack([x, x]), replay.empty_ring(capacity, 2, 1))
    slots, written = [[0.0] * capacity, [0.0] * capacity], [0, 0]
    insert_members = jax.jit(jax.vmap(awr.insert))
    for counts in [(0, 0), (0, 3), *rng.integers(0, 6, (12, 2)), (5, 5)]:
        numbers = np.float32([[sign * (value + i) for i in range(5)] for sign in (1, -1)])
        wide, flags = np.stack([numbers, numbers], axis=-1), numbers % 2
        blocks = Transitions(wide, wide[..., :1], numbers, wide + 1, flags, 1 - flags)
        rings = insert_members(rings, blocks, jnp.array(counts))
        for m, sign in enumerate((1, -1)):
            for i in range(counts[m]):
                slots[m][(written[m] + i) % capacity] = sign * (value + i)
            written[m] += int(counts[m])
            size = min(written[m], capacity)
            assert int(rings.written[m]) == written[m]
            data = jax.tree.map(lambda x: np.asarray(x[m]), rings.data)  # noqa: B023
            np.testing.assert_array_equal(data.rewards, slots[m])
            np.testing.assert_array_equal(data.observations[:size], np.stack([data.rewards[:size]] * 2, axis=-1))
            np.testing.assert_array_equal(data.terminations, data.rewards % 2)
        value += 5
    assert min(written) > 2 * capacity


def filled(capacity: int, lengths: Any, seed: int = 1) -> Log:
    log = Log(capacity)
    for episode in trajectories(lengths, seed):
        log.add([episode])
    return log


def seen(states: np.ndarray) -> Normalizer:
    """The normaliser of these states."""
    states, none = double(states), jnp.zeros(2, jnp.int32)
    mean, squares = (np.float32(x) for x in (states.mean(axis=0), len(states) * states.var(axis=0)))
    return Normalizer(jnp.float32(len(states)), mean, squares, none)


def normalised(x: np.ndarray, states: np.ndarray) -> np.ndarray:
    states = double(states)
    return (double(x) - states.mean(axis=0)) / np.maximum(states.std(axis=0), 0.01)


def scale_of(hp: awr.Hyperparameters, args: awr.Args) -> float:
    return 1 / (1 - hp.discount) if args.scale_values else 1.0


# ---- returns ----


def lambda_returns(data: Transitions, next_values: Any, hp: awr.Hyperparameters) -> np.ndarray:
    next_values = jnp.asarray(next_values, jnp.float32)
    return np.asarray(returns(data.rewards, next_values, data.terminations, data.truncations, hp))


@pytest.mark.parametrize("td_lambda", [0.0, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_returns_equal_a_loop_over_each_trajectory(seed: int, td_lambda: float) -> None:
    rng = np.random.default_rng(seed)
    lengths = [1, *rng.integers(1, 30, 11), 1]
    lengths.append(200 - sum(lengths))  # so that all seeds share a program
    episodes = trajectories(lengths, seed, open_end=seed == 2)
    data, values = joined(episodes), 10 * rng.standard_normal(200)
    assert 2 < data.terminations.sum() < 12 and 2 < data.truncations.sum() < 12
    hp = HP._replace(td_lambda=td_lambda, discount=0.97)
    cuts = np.cumsum([0, *lengths])
    expected = [numpy_returns(one, values[i:], hp) for one, i in zip(episodes, cuts, strict=False)]
    assert_close(lambda_returns(data, values, hp), np.concatenate(expected), rtol=1e-4, atol=1e-4)


LAST, NONE = np.float32([0, 0, 0, 1]), np.zeros(4, np.float32)


def four_steps(rewards: Any, values: Any, terminations: Any, truncations: Any, **hp: float) -> np.ndarray:
    columns = (jnp.asarray(x, jnp.float32) for x in (rewards, values, terminations, truncations))
    return np.asarray(returns(*columns, HP._replace(**hp)))


@pytest.mark.parametrize(
    ("terminations", "truncations", "bootstrap"), [(LAST, NONE, 0), (NONE, LAST, 1), (NONE, NONE, 1)]
)
def test_lambda_one_is_the_return_to_go_and_lambda_zero_is_one_step(
    terminations: np.ndarray, truncations: np.ndarray, bootstrap: int
) -> None:
    """At a termination nothing follows; at a truncation, and where the data end without a flag, the value does."""
    r, values = np.array([1.0, -2.0, 0.5, 3.0]), np.array([5.0, -6.0, 7.0, 8.0])
    monte_carlo = [np.sum(r[t:] * 0.9 ** np.arange(4 - t)) + bootstrap * 0.9 ** (4 - t) * 8.0 for t in range(4)]
    ends = (terminations, truncations)
    assert_close(four_steps(r, values, *ends, td_lambda=1.0, discount=0.9), monte_carlo)
    one_step = r + 0.9 * values * [1, 1, 1, bootstrap]
    assert_close(four_steps(r, values, *ends, td_lambda=0.0, discount=0.9), one_step)


@pytest.mark.parametrize("td_lambda", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("terminated", [False, True])
def test_with_exact_values_lambda_does_not_matter(td_lambda: float, terminated: bool) -> None:
    """A deterministic chain; beyond a truncation it goes on to be worth 4."""
    r, value, exact = [2.0, -1.0, 0.0, 5.0], 0.0 if terminated else 4.0, []
    for reward in reversed(r):
        value = reward + 0.8 * value
        exact.insert(0, value)
    ends = (LAST, NONE) if terminated else (NONE, LAST)
    found = four_steps(r, [*exact[1:], 4.0], *ends, td_lambda=td_lambda, discount=0.8)
    assert_close(found, exact)


@pytest.mark.parametrize("td_lambda", [0.0, 0.7, 1.0])
def test_endings_differ_by_the_value_of_the_tail(td_lambda: float) -> None:
    r, values = [1.0, -2.0, 0.5, 3.0], [5.0, -6.0, 7.0, 8.0]
    kinds = (NONE, LAST), (LAST, NONE)
    cut, ended = (four_steps(r, values, *ends, td_lambda=td_lambda, discount=0.9) for ends in kinds)
    assert_close(cut - ended, 0.9 * 8.0 * (0.9 * td_lambda) ** np.arange(3, -1, -1.0), atol=1e-5)


# ---- returns of all the data ----


def numpy_values(params: Any, states: np.ndarray, hp: awr.Hyperparameters, args: awr.Args) -> Callable:
    """The value function with the normaliser of `states`."""
    layers = double(params["params"])
    return lambda x: scale_of(hp, args) * numpy_mlp(layers, normalised(x, states))[0][:, 0]


def assert_evaluated(state: awr.State, data: Replay, offline: list, log: Log | None, states: Any, hp: Any) -> None:
    """Every written row has the value and the return that it has in the trajectory that it comes from."""
    values, found, written = map(np.asarray, evaluate(state, data, hp, ARGS))
    of = numpy_values(state.value, states, hp, ARGS)
    expected, observations = each_apart(offline, of, hp), [one.observations for one in offline]
    capacity, stored = 0, np.zeros(0, int)
    if log is not None:
        capacity, stored = log.capacity, log.stored()
        expected = np.concatenate([expected, each_apart(log.episodes, of, hp)[stored]])
        observations.append(joined(log.episodes).observations[stored])
    size = len(expected)
    np.testing.assert_array_equal(written, np.arange(size - len(stored) + capacity) < size)
    assert_close(found[:size], expected, rtol=1e-3, atol=1e-2)
    assert_close(values[:size], of(np.concatenate(observations)), rtol=1e-3, atol=1e-2)
    assert np.abs(expected).max() > 20, "of the size of V, a hundred times the network's output"


STATES = joined(trajectories([50], seed=9)).observations


@pytest.mark.parametrize("stored", [record, lambda rows: rows], ids=["each state once", "as transitions"])
def test_evaluation_of_the_dataset(stored: Any) -> None:
    episodes = trajectories([7, 1, 20, 12], open_end=True)
    state = fresh()._replace(normalizer=seen(STATES))
    assert_evaluated(state, Replay(stored(joined(episodes))), episodes, None, STATES, HP)


def test_evaluation_goes_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    state, data = fresh()._replace(normalizer=seen(STATES)), Replay(joined(trajectories([7, 1, 20, 12])))
    whole = evaluate(state, data, HP, ARGS)
    monkeypatch.setattr(awr, "BLOCK", 7)  # five blocks and a rest
    assert_close(jax.jit(lambda: awr.values_and_returns(state, data, HP, ARGS))(), whole, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("with_dataset", [False, True])
def test_returns_in_a_ring_are_those_of_whole_trajectories(with_dataset: bool) -> None:
    """Through several wraps, each overwriting a part of the oldest episode; the rest of it keeps its returns."""
    state, hp = fresh()._replace(normalizer=seen(STATES)), HP._replace(td_lambda=0.8)
    offline = trajectories([7, 1, 20, 12], seed=4) if with_dataset else []
    log, starts = Log(30), set()
    for i, lengths in enumerate([(4,), (3, 5), (11,), (9, 2), (13,), (1,), (12, 17), (6,), (30,), (8, 3, 10)]):
        log.add(trajectories(lengths, seed=i))
        data = Replay(joined(offline) if with_dataset else None, log.ring)
        assert_evaluated(state, data, offline, log, STATES, hp)
        first = np.cumsum([0, *(len(one.rewards) for one in log.episodes)])
        starts.add(max(0, first[-1] - 30) in first)
    assert starts == {False, True} and int(log.ring.written) > 4 * 30


def test_a_member_of_a_population_has_its_own_ring() -> None:
    state, offline = fresh()._replace(normalizer=seen(STATES)), trajectories([7, 1, 20, 12], seed=4)
    logs = [filled(30, [5, 8], seed=5), filled(30, [20, 18, 11], seed=6)]
    rings = jax.tree.map(lambda *x: jnp.stack(x), *(log.ring for log in logs))
    for i, log in enumerate(logs):
        assert_evaluated(state, Replay(joined(offline), rings, jnp.int32(i)), offline, log, STATES, HP)


def test_what_unwritten_rows_hold_does_not_matter() -> None:
    changes, lengths, online, _ = ITERATIONS["both"]
    args, log, offline = replace(ARGS, **changes), filled(30, online), joined(trajectories(lengths))
    count = sum(online)

    def after(filling: float) -> tuple[Any, np.ndarray]:
        data = jax.tree.map(lambda x: x.at[count:].set(filling), log.ring.data)
        both = Replay(offline, log.ring._replace(data=data))
        _, found, written = evaluate(fresh(args), both, HP, args)
        assert int(written.sum()) == sum(lengths) + count
        return train(fresh(args), HP, both, 4, args)[0]._replace(key=0), found[np.asarray(written)]

    one, other = after(0.0), after(1000.0)
    assert trees_equal(one, other) and not trees_equal(one[0], fresh(args)._replace(key=0))


# ---- weights ----


def weights_of(advantages: Any, written: Any = None, args: awr.Args = ARGS, **hp: float) -> np.ndarray:
    advantages = jnp.asarray(advantages, jnp.float32)
    written = jnp.ones(len(advantages), bool) if written is None else jnp.asarray(written)
    return np.asarray(awr.advantage_weights(advantages, written, HP._replace(**hp), args))


ADVANTAGES = np.random.default_rng(0).normal(0.3, 2.0, 40)
STANDARDISED = (ADVANTAGES - ADVANTAGES.mean()) / ADVANTAGES.std()
RAW = replace(ARGS, normalize_advantages=False)


def test_weights_are_exponentials_of_normalised_advantages() -> None:
    assert_close(weights_of(ADVANTAGES, temperature=0.7, weight_clip=1e9), np.exp(STANDARDISED / 0.7), rtol=1e-4)
    raw = weights_of(ADVANTAGES, args=RAW, temperature=0.7, weight_clip=NO_CLIP)
    assert_close(raw, np.exp(ADVANTAGES / 0.7), rtol=1e-4)
    assert raw.max() > 20 * 2, "nothing is clipped"


@pytest.mark.parametrize(("factor", "offset"), [(1.0, 50.0), (1.0, -3.0), (1e3, 0.0), (0.05, 0.0), (7.0, 20.0)])
def test_offset_and_scale_of_the_advantages_do_not_matter(factor: float, offset: float) -> None:
    changed = factor * ADVANTAGES + offset
    assert_close(weights_of(changed, temperature=0.5), weights_of(ADVANTAGES, temperature=0.5), rtol=1e-3)
    for clip in (HP.weight_clip, NO_CLIP):
        raw = [weights_of(advantages, args=RAW, weight_clip=clip) for advantages in (changed, ADVANTAGES)]
        assert np.abs(raw[0] - raw[1]).max() > 0.1


def test_weights_are_clipped_from_ln_20_on() -> None:
    at = math.log(20) * 0.5 * np.array([0.0, 0.9, 0.999, 1.001, 2.0, 1000.0, -1.0, -3.0])
    assert_close(weights_of(at, args=RAW, temperature=0.5), [1, 20**0.9, 20**0.999, 20, 20, 20, 1 / 20, 20**-3], 1e-4)
    weights = weights_of(ADVANTAGES, temperature=0.4)
    bound = math.log(20) < STANDARDISED / 0.4
    assert 2 < bound.sum() < 20
    np.testing.assert_array_equal(weights == 20, bound)
    assert weights.min() > 0 and weights.max() == 20
    assert weights_of(ADVANTAGES, weight_clip=1.5).max() == 1.5


def test_a_high_temperature_is_behaviour_cloning() -> None:
    mean, actions, std = np.random.default_rng(1).uniform(-1, 1, (3, 40, ACT))
    std = np.float64([0.3, 0.8])
    density = stats.norm(mean, std).logpdf(actions).sum(axis=1)
    log_prob = awr.networks.gaussian_log_prob(*(jnp.asarray(x) for x in (actions, mean, np.log(std))))
    for weights in (
        weights_of(ADVANTAGES, temperature=1e7),
        weights_of(1e3 * ADVANTAGES, args=RAW, temperature=1e10, weight_clip=NO_CLIP),
        weights_of(np.full(40, 2.5), temperature=0.1),  # equal advantages
    ):
        assert_close(weights, np.ones(40), rtol=1e-5)
        loss = awr.actor_loss(log_prob, jnp.asarray(weights), jnp.asarray(mean), HP)[0]
        assert float(loss) == pytest.approx(-density.mean(), rel=1e-4)


@pytest.mark.parametrize("args", [ARGS, RAW])
def test_a_low_temperature_leaves_the_best_alone(args: awr.Args) -> None:
    weights = weights_of(np.roll(np.linspace(-3, 3, 12), 4), args=args, temperature=0.04, weight_clip=NO_CLIP)
    assert weights[3] == weights.max() < NO_CLIP
    assert np.sort(weights)[-2] < 1e-3 * weights[3]


def test_statistics_are_those_of_written_rows() -> None:
    written = np.arange(60) < 40
    for filling in (0.0, 1e6):
        weights = weights_of(np.concatenate([ADVANTAGES, np.full(20, filling)]), written)
        assert_close(weights[:40], np.minimum(np.exp(STANDARDISED), 20), rtol=1e-4)


def test_without_the_clip_weights_overflow() -> None:
    """In float32 from exp(88.7) on; with the clip they are 20, and with one of 1e30 as large from exp(69.1) on."""
    advantages = [68.0, 88.0, 89.0, -1e6]
    weights = weights_of(advantages, args=RAW, weight_clip=np.inf)
    assert_close(weights, [np.exp(68.0), np.exp(88.0), np.inf, 0], rtol=1e-4)
    assert_close(weights_of(advantages, args=RAW, weight_clip=1e30), [np.exp(68.0), 1e30, 1e30, 0], rtol=1e-4)
    np.testing.assert_array_equal(weights_of(advantages, args=RAW), [20, 20, 20, 0])


# ---- the normaliser ----


def assert_has_seen(normalizer: Normalizer, states: np.ndarray) -> None:
    """It subtracts the mean of these states and divides by their deviations."""
    assert float(normalizer.count) == len(states)
    probe = np.float32([[1, 2, 3, 4], [300, 0, -2, 5]])
    assert_close(normalize(normalizer, probe), normalised(probe, states), rtol=2e-3, atol=2e-3)


MANY = 10**6


def test_the_normaliser_has_seen_each_state_once() -> None:
    """The dataset at first, then the ring's new rows; the first dimension is nearly constant and far from 0."""
    offset = np.float32([300, 0, 0, 0])

    def moved(rows: Transitions) -> Transitions:
        return rows._replace(observations=rows.observations + offset)

    dataset, log, normalizer = moved(joined(trajectories([9, 20], seed=3))), Log(30), fresh().normalizer
    normalizer = observe(normalizer, Replay(dataset), MANY)
    assert_has_seen(normalizer, dataset.observations)
    states = [dataset.observations]
    for i, lengths in enumerate([(4,), (3, 5), (29,), (9, 2), (13,), (30,), (12, 17), (6,)]):
        log.add([moved(one) for one in trajectories(lengths, seed=i)])
        states += [one.observations for one in log.episodes[-len(lengths) :]]
        normalizer = observe(normalizer, Replay(dataset, log.ring), MANY)
        assert_has_seen(normalizer, np.concatenate(states))
        again = observe(normalizer, Replay(dataset, log.ring), MANY)
        assert trees_equal(again, normalizer), "nothing new"
    alone = observe(fresh().normalizer, Replay(None, log.ring), MANY)
    assert_has_seen(alone, joined(log.episodes).observations[-30:])
    rings = jax.tree.map(lambda *x: jnp.stack(x), replay.empty_ring(30, OBS, ACT), log.ring)
    assert trees_equal(observe(fresh().normalizer, Replay(None, rings, jnp.int32(1)), MANY), alone)


def test_before_anything_was_seen_states_stay_as_they_are() -> None:
    states = trajectories([9])[0].observations
    empty = observe(fresh().normalizer, Replay(None, replay.empty_ring(30, OBS, ACT)), MANY)
    none = observe(fresh().normalizer, Replay(trajectories([9])[0]), 0)
    for normalizer in (fresh().normalizer, empty, none):
        assert float(normalizer.count) == 0
        np.testing.assert_array_equal(normalize(normalizer, states), states)


def test_the_normaliser_freezes_when_it_has_enough() -> None:
    few, log, normalizer, states = 12, Log(30), fresh().normalizer, []
    for i, length in enumerate([7, 4, 6, 5]):  # 7, 11, 17: enough
        log.add(trajectories([length], seed=i))
        states.append(log.episodes[-1].observations)
        normalizer = observe(normalizer, Replay(None, log.ring), few)
        assert_has_seen(normalizer, np.concatenate(states[:3]))


def test_deviations_are_at_least_a_hundredth() -> None:
    rows = trajectories([9])[0]
    rows.observations[:, 1:3] = [2.0, 3.0]
    rows.observations[:, 2] += np.float32(0.004) * np.arange(9)  # a deviation of 0.0103
    normalizer = observe(fresh().normalizer, Replay(rows), MANY)
    found = normalize(normalizer, jnp.float32([0.0, 2.5, 3.516, 0.0]))
    assert_close(found[1:3], [0.5 / 0.01, 0.5 / 0.004 / np.std(np.arange(9))], rtol=1e-3)


# ---- losses and steps ----


def central_differences(loss: Callable, params: Any) -> Any:
    """The gradient of a function of float64 parameters."""
    leaves, tree = jax.tree.flatten(params)
    gradients = [np.zeros_like(leaf) for leaf in leaves]
    for leaf, gradient in zip(leaves, gradients, strict=True):
        for index in np.ndindex(leaf.shape):
            kept, sides = leaf[index], []
            for step in (1e-6, -1e-6):
                leaf[index] = kept + step
                sides.append(loss(jax.tree.unflatten(tree, leaves)))
            leaf[index] = kept
            gradient[index] = (sides[0] - sides[1]) / 2e-6
    return jax.tree.unflatten(tree, gradients)


class NumpyMomentum:
    def __init__(self, learning_rate: float, momentum: float) -> None:
        self.learning_rate, self.momentum, self.velocity = learning_rate, momentum, None

    def step(self, params: Any, grads: Any) -> Any:
        self.velocity = self.velocity or jax.tree.map(np.zeros_like, grads)
        self.velocity = jax.tree.map(lambda g, v: g + self.momentum * v, grads, self.velocity)
        return jax.tree.map(lambda p, v: p - self.learning_rate * v, params, self.velocity)


def numpy_optimizer(args: awr.Args, learning_rate: float, momentum: float) -> Any:
    return NumpyMomentum(learning_rate, momentum) if args.optimizer == "sgd" else NumpyAdam(learning_rate)


STEP = HP._replace(actor_learning_rate=3e-2, value_learning_rate=1e-2, momentum=0.7, discount=0.5, std=0.5)
ADAM = replace(ARGS, optimizer="adam", num_layers=1, scale_values=False)


def test_value_loss_is_half_the_squared_error() -> None:
    values, targets = jnp.array([0.5, -1.0, 2.0]), jnp.array([1.5, -1.0, -1.0])
    loss, info = awr.value_loss(values, targets)
    assert float(loss) == pytest.approx(0.5 * (1 + 0 + 9) / 3) and info["value/loss"] == loss
    assert (float(info["value/v_mean"]), float(info["value/return_mean"])) == pytest.approx((0.5, -1 / 6))
    assert_close(jax.grad(lambda v: awr.value_loss(v, targets)[0])(values), [-1 / 3, 0, 1])


def test_actor_loss_by_hand() -> None:
    log_prob, weights = jnp.array([-1.0, -2.0]), jnp.array([0.5, 3.0])
    mean = jnp.array([[1.5, -3.0], [0.9, -1.0]])
    loss, info = awr.actor_loss(log_prob, weights, mean, HP._replace(bound_weight=0.3))
    bound = 0.5 * (0.5**2 + 2**2) / 2
    assert float(loss) == pytest.approx((0.5 + 6) / 2 + 0.3 * bound)
    found = [float(info[f"actor/{name}"]) for name in ("log_prob", "bound_loss", "weight_mean", "weight_max")]
    assert found == pytest.approx([-1.5, bound, 1.75, 3.0])
    inside = awr.actor_loss(log_prob, weights, mean / 3, HP)[0]
    assert float(inside) == pytest.approx(3.25)


def test_losses_do_not_broadcast() -> None:
    with pytest.raises(AssertionError):
        awr.value_loss(jnp.zeros((4, 1)), jnp.zeros(4))
    with pytest.raises(AssertionError):
        awr.actor_loss(jnp.zeros((4, 1)), jnp.zeros(4), jnp.zeros((4, 2)), HP)


@pytest.mark.parametrize("args", [ARGS, ADAM], ids=["sgd", "adam"])
def test_steps_of_the_value_function(args: awr.Args) -> None:
    """Gradients by central differences of the loss; then by hand v = g + m v, p -= rate v, or Adam."""
    state = start = fresh(args)._replace(normalizer=seen(STATES))
    value, optimizer = double(state.value["params"]), numpy_optimizer(args, 1e-2, 0.7)
    for i in range(2):
        batch, targets = trajectories([BATCH], seed=i)[0], np.random.default_rng(i).normal(0, 3, BATCH)
        x, y = normalised(batch.observations, STATES), targets / scale_of(STEP, args)

        def loss(params: Any, x: np.ndarray = x, y: np.ndarray = y) -> float:
            return 0.5 * np.mean((numpy_mlp(params, x)[0][:, 0] - y) ** 2)

        state, info = update_value(state, batch, jnp.float32(targets), STEP, args)
        assert float(info["value/loss"]) == pytest.approx(loss(value), rel=1e-3)
        value = optimizer.step(value, central_differences(loss, value))
    assert_close(state.value["params"], value, rtol=1e-3, atol=1e-5)
    moves = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - b).max(), start.value, state.value)
    assert min(jax.tree.leaves(moves)) > 1e-3
    others = {"value": 0, "value_opt": 0, "key": 0}
    assert trees_equal(state._replace(**others), start._replace(**others))
    assert trees_equal(*(jax.random.key_data(x.key) for x in (state, start)))


@pytest.mark.parametrize("args", [ARGS, ADAM], ids=["sgd", "adam"])
def test_steps_of_the_policy(args: awr.Args) -> None:
    state = start = fresh(args)._replace(normalizer=seen(STATES))
    actor, optimizer = double(state.actor["params"]), numpy_optimizer(args, 3e-2, 0.7)
    for i in range(2):
        batch, weights = trajectories([BATCH], seed=i)[0], np.random.default_rng(i).uniform(0, 3, BATCH)
        batch = batch._replace(actions=1.5 * batch.actions)  # also beyond the bounds: regressed on as drawn
        x = normalised(batch.observations, STATES)

        def loss(params: Any, x: np.ndarray = x, batch: Transitions = batch, weights: np.ndarray = weights) -> float:
            mean = numpy_mlp(params, x)[0]
            log_prob = stats.norm(mean, 0.5).logpdf(batch.actions).sum(axis=1)
            excess = np.maximum(np.abs(mean) - 1, 0)
            return -np.mean(weights * log_prob) + HP.bound_weight * 0.5 * np.mean((excess**2).sum(axis=1))

        state, info = update_actor(state, batch, jnp.float32(weights), STEP, args)
        assert float(info["actor/loss"]) == pytest.approx(loss(actor), rel=1e-3)
        assert i > 0 or float(info["actor/bound_loss"]) > 1e-3
        actor = optimizer.step(actor, central_differences(loss, actor))
        assert int(state.step) == i + 1
    assert_close(state.actor["params"], actor, rtol=1e-3, atol=1e-4)
    moves = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - b).max(), start.actor, state.actor)
    assert min(jax.tree.leaves(moves)) > 1e-3
    others = {"actor": 0, "actor_opt": 0, "step": 0, "key": 0}
    assert trees_equal(state._replace(**others), start._replace(**others))
    assert trees_equal(*(jax.random.key_data(x.key) for x in (state, start)))


# ---- an iteration ----


def numpy_iteration(
    state: awr.State, data: Replay, offline: list, log: Log | None, num_updates: int, hp: Any, args: awr.Args
) -> dict[str, Any]:
    """An iteration in float64, on the same minibatches: targets, the value's steps, weights, the policy's steps."""
    stored = np.zeros(0, int) if log is None else log.stored()
    table = joined([*offline, *([] if log is None else [jax.tree.map(lambda x: x[stored], joined(log.episodes))])])
    states, scale, key = table.observations, scale_of(hp, args), state.key
    x = normalised(states, states) if args.normalizer_samples else double(states)
    value, actor = double(state.value["params"]), double(state.actor["params"])
    value_opt = numpy_optimizer(args, hp.value_learning_rate, hp.momentum)
    actor_opt = numpy_optimizer(args, hp.actor_learning_rate, hp.momentum)

    def values(x: np.ndarray) -> np.ndarray:
        x = normalised(x, states) if args.normalizer_samples else double(x)
        return scale * numpy_mlp(value, x)[0][:, 0]

    def found() -> np.ndarray:
        parts = [each_apart(offline, values, hp)]
        return np.concatenate(parts + ([] if log is None else [each_apart(log.episodes, values, hp)[stored]]))

    def rows() -> np.ndarray:
        nonlocal key
        key, sample_key = jax.random.split(key)
        return np.asarray(replay.sample_rows(sample_key, data, BATCH))

    def weights_now() -> np.ndarray:
        advantages = found() - values(states)
        if args.normalize_advantages:
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-5)
        return np.minimum(np.exp(advantages / hp.temperature), hp.weight_clip)

    targets, old_weights, drawn = found(), weights_now(), []
    for _ in range(math.ceil(args.value_updates * num_updates / args.policy_updates)):
        drawn.append(rows())
        v, inputs = numpy_mlp(value, x[drawn[-1]])
        delta = (v - targets[drawn[-1], None] / scale) / BATCH
        value = value_opt.step(value, numpy_gradients(value, inputs, delta))
    assert np.abs(found() - targets).max() > 0.1 * targets.std(), "whether targets are held matters"
    weights, losses = weights_now(), []
    assert np.abs(weights - old_weights).max() > 0.2 * weights.std(), "whose value function it is matters"
    for _ in range(num_updates):
        drawn.append(rows())
        i = drawn[-1]
        mean, inputs = numpy_mlp(actor, x[i])
        z, excess = (table.actions[i] - mean) / hp.std, np.maximum(np.abs(mean) - 1, 0) * np.sign(mean)
        log_prob = (-0.5 * z**2 - np.log(hp.std) - 0.5 * np.log(2 * np.pi)).sum(axis=1)
        losses.append(-np.mean(weights[i] * log_prob) + hp.bound_weight * 0.5 * np.mean((excess**2).sum(axis=1)))
        delta = (-weights[i, None] * z / hp.std + hp.bound_weight * excess) / BATCH
        actor = actor_opt.step(actor, numpy_gradients(actor, inputs, delta))
    num_offline = sum(len(one.rewards) for one in offline)
    if log is not None:
        assert (np.concatenate(drawn) >= num_offline).any()
    assert not offline or (np.concatenate(drawn) < num_offline).any()
    return {"value": value, "actor": actor, "key": key, "loss": np.mean(losses)}


# What differs from the defaults, the dataset's episodes, the ring's, the updates of the policy.
ITERATIONS = {
    "offline": ({}, [7, 1, 20, 12], None, 4),
    "adam": (vars(ADAM) | {"normalizer_samples": 0, "normalize_advantages": False}, [15, 9], None, 3),
    "both": ({"scale_values": False}, [7, 20], [4, 9, 2], 2),
    "online": ({"num_layers": 1, "optimizer": "adam"}, [], [9, 8, 20, 14], 5),
}


@pytest.mark.parametrize("case", ["offline", pytest.param("adam", marks=pytest.mark.slow), "both", "online"])
def test_an_iteration_equals_an_independent_numpy_version(case: str) -> None:
    changes, offline, online, num_updates = ITERATIONS[case]
    args = replace(ARGS, **changes)
    hp = STEP._replace(temperature=0.6, weight_clip=3.0, value_learning_rate=0.1, td_lambda=0.8)
    hp = hp._replace(temperature=3.0) if not args.normalize_advantages else hp
    hp = hp._replace(weight_clip=NO_CLIP) if case == "both" else hp
    episodes = trajectories(offline, seed=3)
    log = filled(30, online, seed=8) if online else None
    if log is not None and case == "online":  # as in a population: another member's ring beside it
        rings = jax.tree.map(lambda *x: jnp.stack(x), filled(30, [6], seed=2).ring, log.ring)
        data = Replay(None, rings, jnp.int32(1))
    else:
        data = Replay(joined(episodes), None if log is None else log.ring)
    state = fresh(args)
    after, metrics = train(state, hp, data, num_updates, args)
    expected = numpy_iteration(state, data, episodes, log, num_updates, hp, args)
    assert_close(after.value["params"], expected["value"], rtol=5e-3, atol=5e-4)
    assert_close(after.actor["params"], expected["actor"], rtol=5e-3, atol=5e-4)
    assert float(means(metrics)["actor/loss"]) == pytest.approx(expected["loss"], rel=1e-3)
    assert trees_equal(*(jax.random.key_data(key) for key in (after.key, expected["key"])))
    assert int(after.step) == num_updates
    for old, new in ((state.value, after.value), (state.actor, after.actor)):
        moves = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - b).max(), old, new)
        assert min(jax.tree.leaves(moves)) > 5e-3


def test_value_updates_are_in_proportion_rounded_up() -> None:
    """Three for four of the policy."""
    data = Replay(joined(trajectories(ITERATIONS["offline"][1])))
    for num_updates, expected in enumerate([1, 2, 3, 3], start=1):
        state, metrics = train(fresh(), HP, data, num_updates, ARGS)
        assert int(metrics.counts["value/loss"]) == expected
        assert int(metrics.counts["actor/loss"]) == int(state.step) == num_updates


@pytest.mark.parametrize(("value", "policy"), [(1_000_000, 1_000_000), (300_000, 200_000), (1, 2**31 - 1)])
def test_iterations_may_be_long(value: int, policy: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of a million updates, as a single pass over the data: their product is no number of 32 bits."""
    counts: list[int] = []
    monkeypatch.setattr(awr, "repeat", lambda step, state, n: counts.append(int(n)) or (state, Metrics({}, {})))
    args = replace(ARGS, value_updates=value, policy_updates=policy)
    args.validate()
    awr.train(fresh(), HP, Replay(joined(trajectories([3, 4]))), jnp.int32(policy), args)
    assert counts == [value, policy]


def test_without_updates_nothing_changes() -> None:
    """So it is with a member that has diverged, whose data may go on growing."""
    changes, lengths, online, _ = ITERATIONS["both"]
    args, data = replace(ARGS, **changes), Replay(joined(trajectories(lengths)), filled(30, online).ring)
    state, _ = train(fresh(args), HP, data, 0, args)
    assert trees_equal(state._replace(key=0), fresh(args)._replace(key=0))
    assert trees_equal(*(jax.random.key_data(x.key) for x in (state, fresh(args))))
    assert int(train(fresh(args), HP, data, 1, args)[0].normalizer.count) == sum(lengths) + sum(online)


@pytest.mark.parametrize("factor", [0.01, 30.0])
def test_weights_do_not_depend_on_the_unit_of_rewards(factor: float) -> None:
    """Where rewards, and with them the values, are in another unit."""
    rows = joined(trajectories([7, 1, 20, 12]))
    state = fresh()
    layers = dict(state.value["params"])
    layers[max(layers)] = jax.tree.map(lambda x: factor * x, layers[max(layers)])
    scaled = state._replace(value={"params": layers})
    v, g, written = evaluate(state, Replay(rows), HP, ARGS)
    v2, g2, _ = evaluate(scaled, Replay(rows._replace(rewards=np.float32(factor) * rows.rewards)), HP, ARGS)
    assert_close((v2, g2), (factor * v, factor * g), rtol=1e-4, atol=1e-3 * factor)
    assert_close(weights_of(g2 - v2, written), weights_of(g - v, written), rtol=5e-3)


# ---- whole episodes ----


def side_by_side(numbers: Any, kinds: Any) -> Transitions:
    """A step of environments `[members, environments]`: their numbers, and "done", "cut" or "" for how it ended."""
    numbers, kinds = np.asarray(numbers, np.float32), np.asarray(kinds)
    wide, ends = numbers[..., None], [np.float32(kinds == ending) for ending in ("done", "cut")]
    pair = np.concatenate([wide, -wide], axis=-1)
    return Transitions(pair, wide, numbers, np.concatenate([wide + 1, wide], axis=-1), *ends)


def given_out(episodes: Episodes, capacity: int = 1000) -> list[list[float]]:
    """The numbers of each member's steps that come out; every column of a row must belong to the same step."""
    block, counts = episodes.take(capacity)
    assert block.rewards.shape == (len(counts), min(capacity, awr.EPISODE_BLOCK))
    assert {column.dtype for column in block} == {np.dtype(np.float32)}
    found = []
    for m, count in enumerate(counts):
        rows, rest = (jax.tree.map(lambda x: x[m, part], block) for part in (slice(count), slice(count, None)))  # noqa: B023
        columns = (rows.observations[:, 0], -rows.observations[:, 1], rows.actions[:, 0])
        for column in (*columns, rows.next_observations[:, 0] - 1, rows.next_observations[:, 1]):
            np.testing.assert_array_equal(column, rows.rewards)
        assert not any(column.any() for column in rest)
        found.append(rows.rewards.tolist())
    return found


def test_episodes_are_given_out_whole_and_once() -> None:
    """Two members of two environments: one ends often, one once and late, the other member's never."""
    episodes, going = Episodes(2, 2), ""
    endings = {2: "done", 3: "cut", 6: "done", 9: "cut", 11: "done"}

    def steps(times: Any) -> None:
        for t in times:
            own = [[t, 100 + t], [200 + t, 300 + t]]
            late = "cut" if t == 9 else going
            episodes.add(side_by_side(own, [[endings.get(t, going), late], [going, "done" if t == 12 else going]]))

    steps([1, 2])
    assert episodes.ended.tolist() == [True, False]
    assert given_out(episodes) == [[1, 2], []]
    steps([3, 4, 5, 6, 7])
    assert given_out(episodes) == [[3, 4, 5, 6], []]
    steps([8])
    assert given_out(episodes) == [[], []], "nothing ended since"
    steps([9, 10])
    assert given_out(episodes) == [[7, 8, 9, *range(101, 110)], []], "one environment's after the other's"
    steps([11, 12])
    assert episodes.ended.all()
    assert given_out(episodes, capacity=10) == [[10, 11], list(range(303, 313))], "no more than fit the ring: the last"


def test_random_episodes_come_out_as_they_went_in() -> None:
    """Whatever the ends and however often they are taken, each environment's steps up to its last end, in order."""
    rng, episodes = np.random.default_rng(0), Episodes(2, 2)
    went_in, came_out, last_end = [[] for _ in range(4)], [[] for _ in range(4)], [0] * 4
    for t in range(200):
        kinds = rng.choice(["", "done", "cut"], 4, p=[0.8, 0.1, 0.1])
        episodes.add(side_by_side(np.reshape([1000 * i + t for i in range(4)], (2, 2)), np.reshape(kinds, (2, 2))))
        for i, kind in enumerate(kinds):
            went_in[i].append(1000 * i + t)
            last_end[i] = t + 1 if kind else last_end[i]
        if rng.random() < 0.3:
            for number in itertools.chain(*given_out(episodes)):
                came_out[int(number) // 1000].append(number)
            assert came_out == [numbers[:end] for numbers, end in zip(went_in, last_end, strict=True)]
            assert len(episodes.steps) == t + 1 - min(last_end), "no more is kept than what is running"


# ---- acting ----


def test_act_gives_the_mean_within_bounds_or_a_sample_as_drawn() -> None:
    """The policy's mean is [1.5, -0.2] in every state."""
    state, hp = fresh(), HP._replace(std=0.3)
    layers = jax.tree.map(jnp.zeros_like, dict(state.actor["params"]))
    layers[max(layers)]["bias"] = jnp.array([1.5, -0.2])
    state = state._replace(actor={"params": layers})
    act = jax.jit(awr.act, static_argnames=("args", "action_dim", "sample"))
    states = np.zeros((50_000, OBS), np.float32)
    mean = act(state, hp, states[:3], jax.random.key(0), ARGS, ACT, sample=False)
    assert_close(mean, np.tile([1.0, -0.2], (3, 1)))
    samples = np.asarray(act(state, hp, states, jax.random.key(1), ARGS, ACT, sample=True))
    z = (samples - [1.5, -0.2]) / 0.3
    for column in z.T:
        assert stats.kstest(column, "norm").pvalue > 1e-4
    assert abs(np.corrcoef(z.T)[0, 1]) < 0.02
    assert not np.array_equal(samples, act(state, hp, states, jax.random.key(2), ARGS, ACT, sample=True))


def test_acting_is_on_normalised_states() -> None:
    state, x = fresh()._replace(normalizer=seen(STATES)), joined(trajectories([5], seed=7)).observations
    found = awr.act(state, HP, x, jax.random.key(0), ARGS, ACT, sample=False)
    mean = numpy_mlp(double(state.actor["params"]), normalised(x, STATES))[0]
    assert_close(found, np.clip(mean, -1, 1), rtol=1e-3, atol=1e-4)
    assert 0 < (np.abs(mean) > 1).mean() < 1


# ---- problems with a known solution ----


@partial(jax.jit, static_argnames="args")
def fitted_actor(state: awr.State, batch: Transitions, weights: jax.Array, hp: Any, args: awr.Args) -> awr.State:
    """Many steps on the whole batch, at falling rates."""

    def phase(rate: jax.Array, state: awr.State) -> awr.State:
        slower = hp._replace(actor_learning_rate=hp.actor_learning_rate * rate)
        step = lambda _, state: awr.update_actor(state, batch, weights, slower, args)[0]  # noqa: E731
        return jax.lax.fori_loop(0, 1500, step, state)

    return jax.lax.fori_loop(0, 3, lambda i, state: phase(0.1**i, state), state)


def bandit(actions: Any) -> Transitions:
    """One state, in which each of the actions was taken once."""
    actions = np.float32(actions)[:, None]
    one, zero = np.ones_like(actions), np.zeros(len(actions), np.float32)
    return Transitions(one, actions, zero, one, zero + 1, zero)


def learned_mean(actions: np.ndarray, advantages: np.ndarray, hp: awr.Hyperparameters, args: awr.Args) -> float:
    """The mean of the policy that many updates with the weights of these advantages end at."""
    weights = jnp.asarray(weights_of(advantages, args=args, temperature=hp.temperature))
    state = fitted_actor(fresh(args, obs_dim=1, action_dim=1), bandit(actions), weights, hp, args)
    return float(awr.policy_mean(state.actor, state.normalizer, jnp.ones((1, 1)), args, 1)[0, 0])


FIT = {
    "sgd": (PLAIN, HP._replace(actor_learning_rate=5e-3)),
    "adam": (replace(PLAIN, optimizer="adam"), HP._replace(actor_learning_rate=1e-2)),
}


@pytest.mark.parametrize(("name", "temperature"), crossed(FIT, [0.3, 2.0]))
def test_policy_improvement_in_closed_form(name: str, temperature: float) -> None:
    """pi is proportional to mu(a) exp(A / temperature): a Gaussian of whatever fixed deviation takes over its mean."""
    args, hp = FIT[name]
    hp = hp._replace(temperature=temperature)
    actions = np.array([-0.8, -0.8, -0.8, 0.1, 0.5, 0.5, 0.5, 0.9])  # thus mu
    advantages = np.array([-0.2, -0.2, -0.2, 0.3, 0.1, 0.1, 0.1, -0.1])
    tilted = np.exp(advantages / temperature)
    mean = np.average(actions, weights=tilted)
    assert mean - actions.mean() > 0.02
    for std in (0.4, 0.7):
        assert learned_mean(actions, advantages, hp._replace(std=std), args) == pytest.approx(mean, abs=2e-3)


@pytest.mark.parametrize("name", FIT)
def test_the_odds_of_two_actions(name: str) -> None:
    """mu takes -0.5 six times of eight; the mean tells with which probability pi takes 0.5."""
    args, hp = FIT[name]
    mean = learned_mean(np.array([-0.5] * 6 + [0.5] * 2), np.array([-0.1] * 6 + [0.6] * 2), hp, args)
    odds = 1 / 3 * np.exp((0.6 + 0.1) / HP.temperature)
    assert mean + 0.5 == pytest.approx(odds / (1 + odds), abs=2e-3)


def test_the_bound_holds_means_back() -> None:
    """Every action is 1.5: the minimum of (1.5 - m)^2 / 2 std^2 + bound_weight (m - 1)^2 / 2."""
    args, hp = FIT["adam"]
    for bound_weight, std in ((0.0, 0.4), (10.0, 0.4), (10.0, 0.7)):
        mean = learned_mean(np.full(8, 1.5), np.zeros(8), hp._replace(bound_weight=bound_weight, std=std), args)
        precision = 1 / std**2
        assert mean == pytest.approx((1.5 * precision + bound_weight) / (precision + bound_weight), abs=1e-3)


@partial(jax.jit, static_argnames="args")
def fitted_value(state: awr.State, batch: Transitions, targets: jax.Array, hp: Any, args: awr.Args) -> awr.State:
    def phase(rate: jax.Array, state: awr.State) -> awr.State:
        slower = hp._replace(value_learning_rate=1e-2 * rate)
        step = lambda _, state: awr.update_value(state, batch, targets, slower, args)[0]  # noqa: E731
        return jax.lax.fori_loop(0, 1000, step, state)

    return jax.lax.fori_loop(0, 3, lambda i, state: phase(0.1**i, state), state)


@pytest.mark.parametrize(("scale_values", "unit"), crossed([False, True], [1.0, 20.0]))
def test_values_are_those_of_the_policies_weighted_by_their_visits(scale_values: bool, unit: float) -> None:
    """Two policies on a chain of five states, one taking single and one taking double steps, which is then left.

    The value of each by solving its Bellman equation; of the data, their mean by how often each was in a state.
    """
    rewards = unit * np.array([[1.0, -0.5], [0.3, 2.0], [-1.0, 0.7], [0.5, 0.1], [2.0, 0.4]])
    routes = {0: [0, 1, 2, 3, 4], 1: [0, 2, 4]}
    times, parts, exact, visits = {0: 3, 1: 2}, [], np.zeros((2, 5)), np.zeros((2, 5))
    for policy, route in routes.items():
        successors = np.eye(6)[np.minimum(np.arange(5) + 1 + policy, 5), :5]
        exact[policy] = np.linalg.solve(np.eye(5) - 0.9 * successors, rewards[:, policy])
        visits[policy, route] = times[policy]
        states, nothing = np.eye(5, dtype=np.float32)[route], np.zeros(len(route), np.float32)
        done = nothing.copy()
        done[-1] = 1
        after = np.concatenate([states[1:], np.zeros((1, 5), np.float32)])
        r = np.float32(rewards[route, policy])
        parts += times[policy] * [Transitions(states, nothing[:, None], r, after, done, nothing)]
    expected = (visits * exact).sum(axis=0) / visits.sum(axis=0)
    assert np.abs(expected - exact)[visits > 0].max() > 0.2 * unit
    args = replace(ARGS, optimizer="adam", hidden_dim=32, normalizer_samples=0, scale_values=scale_values)
    hp, batch = HP._replace(discount=0.9, td_lambda=1.0), joined(parts)
    state = fresh(args, obs_dim=5, action_dim=1)
    targets = evaluate(state, Replay(batch), hp, args)[1]
    state = fitted_value(state, batch, targets, hp, args)
    learned = evaluate(state, Replay(batch), hp, args)[0]
    assert_close(learned, expected[batch.observations.argmax(axis=1)], rtol=1e-3, atol=2e-3 * unit)


# ---- the command line ----


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--grid", "momentum=0.5,0.9", "--optimizer", "adam"], "momentum has no effect with --optimizer adam"),
        (["--discount", "1"], "--scale-values False"),
        (["--grid", "discount=0.9,1"], "--scale-values False"),
        (["--value-updates", "99999", "--policy-updates", "100000"], "--value-updates 99999"),
        (["--td-lambda", "1.1"], "--td-lambda 1.1: must be from 0 to 1"),
        (["--temperature", "0"], "--temperature 0.0: must be finite and above 0"),
        (["--num-environments", "0"], "--num-environments 0"),
        (["--buffer-size", "0"], "--buffer-size 0"),
        (["--normalizer-samples", "-1"], "--normalizer-samples -1"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, tiny: Path, script: Callable[..., Any], arguments: list[str], words: str
) -> None:
    run = tmp_path / "run"
    outcome = script("awr", "--dataset", tiny, "--env", "Hopper-v5", *arguments, "--run-dir", run)
    assert outcome.status == 2 and words in outcome.err
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1
    assert not run.exists()


def test_what_fits_is_not_refused() -> None:
    for arguments in (
        ["--grid", "weight_clip=1,20,1e30"],
        ["--grid", "momentum=0.5,0.9"],
        ["--grid", "temperature=0.5,1", "--weight-clip", "1e30", "--optimizer", "adam"],
        ["--discount", "1", "--scale-values", "False"],
    ):
        cli.parse(awr.Args, awr.PRESETS, arguments)


def test_defaults_are_those_of_the_paper_and_of_its_authors() -> None:
    args = awr.Args()
    paper = {"weight_clip": 20.0, "actor_learning_rate": 5e-5, "momentum": 0.9}
    code = {"value_learning_rate": 1e-2, "td_lambda": 0.95, "temperature": 1.0, "discount": 0.99, "std": 0.4}
    assert {name: getattr(args.hp, name) for name in (paper | code)} == paper | code
    assert (args.optimizer, args.hidden_dim, args.num_layers, args.batch_size) == ("sgd", 128, 2, 256)
    assert (args.value_updates, args.policy_updates, args.buffer_size) == (200, 1000, 50_000)
    assert (args.samples_per_iteration, args.normalizer_samples) == (2048, 300_000)
    assert args.scale_values and args.normalize_advantages


def test_networks_start_as_those_of_the_authors() -> None:
    """128 and 64 units; U(-b, b) with b^2 = 6 / (inputs + outputs), but the policy's last layer U(-0.01, 0.01)."""
    args = awr.Args()
    state = jax.jit(lambda key: awr.init(key, args.hp, args, 11, 3))(jax.random.key(0))
    bounds = [(6 / (11 + 128)) ** 0.5, (6 / (128 + 64)) ** 0.5]
    for params, outputs, last in ((state.actor, 3, 0.01), (state.value, 1, (6 / 65) ** 0.5)):
        layers = [params["params"][f"Dense_{i}"] for i in range(3)]
        assert [layer["kernel"].shape for layer in layers] == [(11, 128), (128, 64), (64, outputs)]
        for layer, bound in zip(layers, [*bounds, last], strict=True):
            assert not np.any(layer["bias"])
            assert stats.kstest(np.ravel(layer["kernel"]), stats.uniform(-bound, 2 * bound).cdf).pvalue > 1e-4
        assert list(params) == ["params"] and len(params["params"]) == 3, "the policy's deviation is fixed"


# ---- runs ----

SMALL = ["--num-layers", "1", "--value-updates", "2", "--policy-updates", "4", "--eval-every", "0"]
BOTH = [*SMALL, "--samples-per-iteration", "60", "--buffer-size", "70", "--std", "0.9"]
ONLINE = [*BOTH, "--num-updates", "0"]


def rings_of(run: Path) -> list[tuple[int, Transitions]]:
    """How many rows each member ever wrote, and those that it has, from the oldest to the newest."""
    arrays = arrays_of(run)
    ring = {name.rpartition(".")[2]: array for name, array in arrays.items() if "'ring'" in name}
    members = []
    for m, written in enumerate(ring.pop("written").tolist()):
        capacity = ring["rewards"].shape[1]
        order = np.arange(max(0, written - capacity), written) % capacity
        members.append((written, Transitions(*(ring[name][m, order] for name in Transitions._fields))))
    return members


def assert_whole_episodes(rows: Transitions) -> None:
    """Every row is followed by the next of its episode, or has ended it; so has the newest one."""
    ended = (rows.terminations + rows.truncations) > 0
    follows = (rows.observations[1:] == rows.next_observations[:-1]).all(axis=1)
    np.testing.assert_array_equal(follows, ~ended[:-1])
    assert ended[-1] and rows.observations.any(axis=1).all()


def column_of(run: Path, *words: str) -> list[int]:
    """The array of the checkpoint whose name ends with the last word and has the others in it."""
    return next(
        x for name, x in arrays_of(run).items() if name.endswith(words[-1]) and all(w in name for w in words)
    ).tolist()


@pytest.fixture(autouse=True)
def a_row_for_each_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    """However short: the tests' have a few updates, where a row is due after 1,000."""
    monkeypatch.setattr(runs, "LOG_EVERY", 1)


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`with interrupted(owner, method, at)`: a SIGTERM comes as the method is called for the `at`-th time."""

    @contextmanager
    def patched(owner: type, method: str, at: int = 1) -> Iterator[None]:
        original, calls = getattr(owner, method), itertools.count(1)

        def call(*arguments: Any) -> Any:
            if next(calls) == at:
                signal.raise_signal(signal.SIGTERM)
            return original(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(owner, method, call)
            yield

    return patched


@pytest.mark.slow
def test_online_alone(tmp_path: Path, small_run: list[str], script: Callable[..., Any]) -> None:
    """Three members: on two cores one is padded."""
    run = tmp_path / "run"
    arguments = [*small_run, *ONLINE, "--online-steps", "240"]
    outcome = script("awr", *arguments, "--num-seeds", "3", "--run-dir", run)
    assert (outcome.status, outcome.err) == (0, "")
    final = json.loads((run / "final.json").read_text())
    assert (final["updates"], final["online_steps"]) == (0, 240)
    metrics = rows_of(run / "metrics.csv")
    assert [(row["step"], row["member"]) for row in metrics] == [(str(60 * i), m) for i in (1, 2, 3, 4) for m in "012"]
    rings = rings_of(run)
    for written, rows in rings:
        assert 70 < written <= 240 and len(rows.rewards) == 70, "the ring has wrapped"
        assert_whole_episodes(rows)
        assert np.abs(rows.actions).max() > 1.0, "as drawn"
        assert rows.actions.std() == pytest.approx(0.9, rel=0.3)
    assert not np.isin(rings[0][1].observations, rings[1][1].observations).all(axis=1).any()
    assert column_of(run, ".step") == [16, 16, 16]
    assert column_of(run, "normalizer", ".count") == [written for written, _ in rings], "each state was seen"


@pytest.mark.slow
def test_a_member_online_is_that_member_alone(tmp_path: Path, small_run: list[str], script: Callable[..., Any]) -> None:
    both, alone = tmp_path / "both", tmp_path / "alone"
    arguments = [*small_run, *ONLINE, "--online-steps", "240"]
    assert script("awr", *arguments, "--num-seeds", "2", "--run-dir", both).status == 0
    assert script("awr", *arguments, "--seed", "1", "--run-dir", alone).status == 0
    mine = [row for row in rows_of(both / "metrics.csv") if row["member"] == "1"]
    for one, other in zip(mine, rows_of(alone / "metrics.csv"), strict=True):
        for name in one.keys() - {"member"}:
            assert float(one[name]) == pytest.approx(float(other[name]), rel=1e-3, abs=1e-4), name
    (written, rows), theirs = rings_of(alone)[0], rings_of(both)[1]
    assert written == theirs[0]
    assert_close(rows.rewards, theirs[1].rewards, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_there_is_an_episode_before_the_first_update(
    tmp_path: Path, small_run: list[str], script: Callable[..., Any]
) -> None:
    """However short the iterations. No dataset is needed."""
    run = tmp_path / "run"
    arguments = [*small_run, *ONLINE, "--samples-per-iteration", "3", "--num-environments", "2", "--num-seeds", "2"]
    arguments += ["--dataset", tmp_path / "none.npz", "--online-steps", "50"]
    outcome = script("awr", *arguments, "--run-dir", run)
    assert (outcome.status, outcome.err) == (0, "")
    steps = [int(row["step"]) for row in rows_of(run / "metrics.csv") if row["member"] == "0"]
    assert steps[0] > 3 and set(np.diff(steps[:-1])) == {4} and steps[-1] == 50, "two steps at a time"
    for written, rows in rings_of(run):
        assert written > 4
        assert_whole_episodes(rows)
    assert all(np.isfinite(float(value)) for row in rows_of(run / "metrics.csv") for value in row.values())
    last = min(4, -(-4 * (50 - steps[-2]) // 3))
    assert column_of(run, ".step") == 2 * [4 * len(steps) - 4 + last], "never more than an iteration has"


@pytest.mark.slow
def test_both_phases_resumed_equal_training_through(
    tmp_path: Path, small_run: list[str], script: Callable[..., Any], interrupted: Callable[..., Any]
) -> None:
    """A grid, an interruption in the middle of the offline phase, then the online phase; to the last bit."""
    arguments = [*small_run, *BOTH, "--num-updates", "11", "--grid", "temperature=0.5,1", "--reward-scale", "0.5"]
    through, later = tmp_path / "through", tmp_path / "later"
    online = ["--online-steps", "120"]
    outcome = script("awr", *arguments, *online, "--run-dir", through)
    assert (outcome.status, outcome.err) == (0, "")
    arguments += ["--run-dir", later]
    with interrupted(Run, "record"):
        assert script("awr", *arguments).status == 143
    assert done_in(later)["offline"] == 4, "an iteration is not cut"
    assert script("awr", *arguments, *online, "--resume", "True").status == 0
    assert_same_arrays(through, later)
    for _, rows in rings_of(through):
        assert_whole_episodes(rows)
        assert (np.abs(rows.rewards) < 2).all(), "half of Hopper's 1 a step and its speed"
    assert column_of(through, "normalizer", ".count") == [400 + written for written, _ in rings_of(through)]


@pytest.mark.slow
def test_evaluations_and_checkpoints_do_not_cut_iterations(
    tmp_path: Path, small_run: list[str], script: Callable[..., Any]
) -> None:
    """They come after the iteration that reaches them."""
    run = tmp_path / "run"
    arguments = [*small_run, *BOTH, "--num-updates", "11", "--grid", "temperature=0.5,1", "--run-dir", run]
    assert script("awr", *arguments, "--eval-every", "3", "--checkpoint-every", "5").status == 0
    assert [row["step"] for row in rows_of(run / "metrics.csv")[::2]] == ["4", "8", "11"]
    assert [row["step"] for row in rows_of(run / "evaluations.csv")[::2]] == ["0", "4", "8", "11"]
    assert column_of(run, ".step") == [11, 11]


def test_a_signal_before_the_first_episode_has_ended(
    tmp_path: Path, small_run: list[str], script: Callable[..., Any], interrupted: Callable[..., Any]
) -> None:
    run = tmp_path / "run"
    arguments = [*small_run, *ONLINE, "--online-steps", "60", "--run-dir", run]
    with interrupted(Collector, "step"):
        outcome = script("awr", *arguments)
    assert outcome.status == 143, outcome.err
    assert "diverged" not in outcome.err and not (run / "metrics.csv").exists()


@pytest.mark.slow
def test_resuming_in_the_online_phase(
    tmp_path: Path, small_run: list[str], script: Callable[..., Any], interrupted: Callable[..., Any]
) -> None:
    """Of an iteration that a signal cuts short, what was collected is trained on, in proportion."""
    run = tmp_path / "run"
    arguments = [*small_run, *ONLINE, "--online-steps", "180", "--run-dir", run]
    with interrupted(Collector, "step", at=45):
        assert script("awr", *arguments).status == 143
    assert (done_in(run)["online"], column_of(run, ".step")) == (90, [4 + 2])
    before = rings_of(run)[0][0]
    assert script("awr", *arguments, "--resume", "True").status == 0
    written, rows = rings_of(run)[0]
    assert written > before
    assert_whole_episodes(rows)
    assert [row["step"] for row in rows_of(run / "metrics.csv")] == ["60", "90", "150", "180"]


@pytest.mark.slow
def test_without_the_clip_a_run_diverges_and_says_so(
    tmp_path: Path, small_run: list[str], script: Callable[..., Any]
) -> None:
    """At a temperature of 1e-3 deviations the largest weights are 1e30, which is no clip; another member goes on."""
    run = tmp_path / "run"
    arguments = [*small_run, *SMALL, "--num-updates", "8", "--grid", "temperature=1e-3,1", "--run-dir", run]
    outcome = script("awr", *arguments, "--weight-clip", "1e30")
    assert outcome.status == 0 and outcome.err.count("\n") == 1
    assert "member 0 (seed 0, temperature=0.001) diverged: actor/" in outcome.err
    members = json.loads((run / "final.json").read_text())["members"]
    assert members[0]["diverged"]["step"] <= 4 and members[1]["diverged"] is None
    assert column_of(run, ".step") == [0, 8] and column_of(run, "normalizer", ".count") == [0, 400], "frozen"
