"""Buffers and transforms against Python lists, frequencies and constants worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common import replay
from common.cli import RunArgs, UsageError
from common.replay import Replay, Ring, Transform, Transitions, episode_returns

insert = jax.jit(replay.insert)


def rows(values: list[float]) -> Transitions:
    """Transitions of which each number tells its row; terminations at even values, truncations at odd ones."""
    x = np.asarray(values, np.float32)
    wide = x[:, None]
    flags = {"terminations": (x % 2 == 0).astype(np.float32), "truncations": (x % 2 == 1).astype(np.float32)}
    return Transitions(np.hstack([wide, -wide]), wide * 10, x * 100, np.hstack([wide + 1, wide]), **flags)


def assert_rows(found: Transitions, values: list[float]) -> None:
    for name, one, other in zip(Transitions._fields, found, rows(values), strict=True):
        np.testing.assert_array_equal(one, other, err_msg=name)


def filled(capacity: int, values: list[float]) -> Ring:
    ring = replay.empty_ring(capacity, 2, 1)
    for value in values:
        ring = insert(ring, rows([value]))
    return ring


# The ring


@pytest.mark.parametrize("capacity", [1, pytest.param(5, marks=pytest.mark.slow), 8])
def test_ring_keeps_the_newest_as_a_list_would(capacity: int) -> None:
    rng = np.random.default_rng(capacity)
    ring, slots, position, newest = replay.empty_ring(capacity, 2, 1), [None] * capacity, 0, []
    value = 1.0
    for _ in range(12):
        new = [value + i for i in range(rng.integers(1, capacity + 1))]
        value += len(new)
        ring = insert(ring, rows(new))
        for item in new:
            slots[position] = item
            position = (position + 1) % capacity
        newest = (newest + new)[-capacity:]
        assert min(int(ring.written), capacity) == len(newest)
        written = [item for item in slots if item is not None]
        assert_rows(jax.tree.map(lambda x: x[: len(written)], ring.data), written)  # noqa: B023
        assert sorted(written) == newest
    assert not np.any(replay.empty_ring(capacity, 2, 1).data.rewards)


def test_more_rows_than_capacity_are_refused() -> None:
    with pytest.raises(AssertionError, match="do not fit"):
        replay.insert(replay.empty_ring(2, 2, 1), rows([1, 2, 3]))


# Sampling


def counts_of(data: Replay, values: list[float], batches: int = 60, size: int = 500) -> np.ndarray:
    """How often each row was drawn; every column of a drawn row must belong to the same row."""
    data, keys = jax.tree.map(jnp.asarray, data), jax.random.split(jax.random.key(3), batches)
    drawn = jax.jit(jax.vmap(lambda key: replay.sample(key, data, size)))(keys)
    flat = jax.tree.map(lambda x: np.asarray(x).reshape(batches * size, *x.shape[2:]), drawn)
    found = (flat.rewards / 100).tolist()
    assert set(found) <= set(values)
    assert_rows(flat, found)
    return np.array([found.count(value) for value in values])


def assert_uniform(counts: np.ndarray) -> None:
    """Chi-square against the uniform distribution, at six standard deviations of the statistic."""
    expected = counts.sum() / len(counts)
    freedom = len(counts) - 1
    assert ((counts - expected) ** 2 / expected).sum() < freedom + 6 * np.sqrt(2 * freedom)


def test_offline_rows_are_drawn_uniformly() -> None:
    values = list(range(1, 41))
    assert_uniform(counts_of(Replay(rows(values)), values))


@pytest.mark.parametrize("inserted", [3, 10, 14])
def test_the_union_is_drawn_uniformly_and_unwritten_rows_never(inserted: int) -> None:
    old, new = list(range(1, 31)), list(range(101, 101 + inserted))
    kept = new[-10:]
    assert_uniform(counts_of(Replay(rows(old), filled(10, new)), old + kept))


def test_before_the_first_insertion_the_union_is_the_offline_data() -> None:
    old = list(range(1, 31))
    assert_uniform(counts_of(Replay(rows(old), replay.empty_ring(10, 2, 1)), old))


@pytest.mark.parametrize("inserted", [1, 7, 25])
def test_a_ring_alone_is_drawn_uniformly(inserted: int) -> None:
    new = list(range(101, 101 + inserted))
    kept = new[-20:]
    counts = counts_of(Replay(None, filled(20, new)), kept)
    if len(kept) > 1:
        assert_uniform(counts)
    else:
        assert counts.tolist() == [30_000]


def test_row_numbers_count_the_dataset_and_then_the_ring_as_it_is_stored() -> None:
    """Two members' rings of 4: one that 9 and 10 have begun to wrap, one with two rows."""
    old, rings = [1, 2, 3], [filled(4, [5, 6, 7, 8, 9, 10]), filled(4, [21, 22])]
    both = jax.tree.map(lambda *x: jnp.stack(x), *rings)

    @jax.jit
    def draw(data: Replay, numbers: jax.Array) -> tuple[Transitions, jax.Array, Transitions]:
        key = jax.random.key(0)
        return replay.take(data, numbers), replay.sample_rows(key, data, 200), replay.sample(key, data, 200)

    for m, values in enumerate([[9, 10, 7, 8], [21, 22]]):
        for ring, member in ((rings[m], None), (both, jnp.int32(m))):
            for offline in ([], old):
                every = offline + values
                numbers = np.resize(range(len(every)), 9)  # all, then from the first on again
                found, drawn, batch = draw(Replay(rows(offline) if offline else None, ring, member), numbers)
                assert_rows(found, [every[number] for number in numbers])
                assert set(drawn.tolist()) == set(range(len(every)))
                assert_rows(batch, [every[number] for number in drawn])
    np.testing.assert_array_equal(replay.take(Replay(rows(old)), np.array([2, 0])).rewards, [300, 100])


def test_a_row_may_be_drawn_twice_and_keys_decide() -> None:
    data = Replay(rows([1, 2, 3]))
    batch = replay.sample(jax.random.key(0), data, 64)
    assert batch.rewards.shape == (64,) and batch.observations.shape == (64, 2)
    np.testing.assert_array_equal(batch.rewards, replay.sample(jax.random.key(0), data, 64).rewards)
    assert np.any(batch.rewards != replay.sample(jax.random.key(1), data, 64).rewards)


# Transforms


def fit(data: Transitions, observations: bool, returns: bool, scale: float, shift: float) -> Transform:
    flags = {"normalize_observations": observations, "normalize_returns": returns}
    return replay.fit_transform(data, RunArgs(**flags, reward_scale=scale, reward_shift=shift))


def two_episodes() -> Transitions:
    """Returns 6 (terminated) and -2 (truncated); the second observation has standard deviation 0."""
    zeros = np.zeros(4, np.float32)
    return Transitions(
        observations=np.float32([[1, 5], [3, 5], [5, 5], [7, 5]]),
        actions=np.zeros((4, 1), np.float32),
        rewards=np.float32([2, 4, 1, -3]),
        next_observations=np.float32([[3, 5], [100, 5], [7, 5], [9, 5]]),
        terminations=zeros + np.float32([0, 1, 0, 0]),
        truncations=zeros + np.float32([0, 0, 0, 1]),
    )


def test_without_rows_what_they_would_normalise_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    """As online from scratch, with a preset that normalises."""
    none = jax.tree.map(lambda x: x[:0], two_episodes())
    assert fit(none, True, True, 2.0, 1.0).reward_scale == 2.0
    assert capsys.readouterr().err.count("no data are read") == 1
    fit(none, False, False, 1.0, 0.0)
    fit(two_episodes(), True, False, 1.0, 0.0)
    assert capsys.readouterr().err == ""


def test_recorded_rows_are_those_that_were_given_with_states_stored_once() -> None:
    rng = np.random.default_rng(0)
    states = rng.normal(size=(21, 2)).astype(np.float32)
    flat = {name: rng.normal(size=20).astype(np.float32) for name in ("rewards", "terminations", "truncations")}
    whole = Transitions(states[:-1], np.zeros((20, 1), np.float32), next_observations=states[1:].copy(), **flat)
    whole.next_observations[[4, 11]] = rng.normal(size=(2, 2))  # episodes end there, and in the last row
    backwards = jax.tree.map(lambda x: x[::-1], whole)
    for given, extra in ((whole, 3), (backwards, 20), (jax.tree.map(lambda x: x[:0], whole), 0)):
        recorded = replay.record(given)
        assert len(recorded.states) == len(given.rewards) + extra
        for name in Transitions._fields:
            np.testing.assert_array_equal(getattr(recorded, name), getattr(given, name))
        rows = rng.integers(0, 20, 50) if extra else np.zeros(0, int)
        for ours, theirs in zip(recorded.at(rows), given.at(rows), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_observations_are_centred_and_scaled_by_the_dataset() -> None:
    data = two_episodes()
    fitted = fit(data, True, False, 1.0, 0.0)
    # Mean (1 + 3 + 5 + 7) / 4 = 4, variance (9 + 1 + 1 + 9) / 4 = 5; next observations take no part.
    np.testing.assert_allclose(fitted.observation_mean, [4, 5], rtol=1e-6)
    np.testing.assert_allclose(fitted.observation_std, [5**0.5 + 1e-3, 1e-3], rtol=1e-6)
    out = fitted.transitions(replay.record(data))
    np.testing.assert_allclose(out.observations[0], [-3 / (5**0.5 + 1e-3), 0], rtol=1e-6)
    np.testing.assert_allclose(out.next_observations[1], [96 / (5**0.5 + 1e-3), 0], rtol=1e-6)
    np.testing.assert_array_equal(out.rewards, data.rewards)
    for name in ("actions", "terminations", "truncations"):
        np.testing.assert_array_equal(getattr(out, name), getattr(data, name))
    assert {x.dtype for x in out._replace(successors=out.rewards)} == {np.dtype(np.float32)}


def test_rewards_are_scaled_by_the_range_of_returns() -> None:
    data = two_episodes()
    fitted = fit(data, False, True, 1.0, 0.0)
    assert fitted.reward_scale == pytest.approx(1000 / (6 - -2))
    np.testing.assert_allclose(fitted.transitions(replay.record(data)).rewards, [250, 500, 125, -375])
    np.testing.assert_array_equal(fitted.transitions(replay.record(data)).observations, data.observations)


def test_scale_and_shift_compose() -> None:
    data = two_episodes()
    plain = fit(data, False, False, 3.0, -1.0)
    np.testing.assert_allclose(plain.rewards(data.rewards), [5, 11, 2, -10])
    both = fit(data, False, True, 0.1, -1.0)
    np.testing.assert_allclose(both.rewards(data.rewards), [24, 49, 11.5, -38.5])  # 12.5 r - 1


def test_equal_returns_cannot_be_scaled() -> None:
    data = two_episodes()._replace(rewards=np.float32([1, 1, 1, 1]))
    with pytest.raises(UsageError, match="same return"):
        fit(data, False, True, 1.0, 0.0)


def test_sampled_rows_keep_both_flags() -> None:
    data = jax.tree.map(jnp.asarray, two_episodes())
    batch = replay.sample(jax.random.key(0), Replay(data), 200)
    for reward, ends in ((4, (1, 0)), (-3, (0, 1)), (2, (0, 0))):
        picked = np.asarray(batch.rewards) == reward
        assert picked.any()
        assert set(np.asarray(batch.terminations)[picked]) == {ends[0]}
        assert set(np.asarray(batch.truncations)[picked]) == {ends[1]}


def test_without_rows_nothing_is_normalised() -> None:
    """What training online from scratch needs."""
    none = jax.tree.map(lambda x: x[:0], two_episodes())
    fitted = fit(none, True, True, 2.0, 1.0)
    np.testing.assert_array_equal(fitted.observations(np.array([3.0, -7.0])), [3, -7])
    np.testing.assert_array_equal(fitted.rewards([1.0]), [3])


def test_episodes_end_at_flags_and_at_the_end_of_the_data() -> None:
    zeros = np.zeros((6, 1), np.float32)
    terminations, truncations = np.float32([0, 1, 0, 0, 0, 0]), np.float32([0, 0, 0, 1, 0, 0])
    data = Transitions(zeros, zeros, np.float32([1, 2, 3, 4, 5, 6]), zeros, terminations, truncations)
    assert episode_returns(data).tolist() == [3, 7, 11]
    assert episode_returns(jax.tree.map(lambda x: x[:4], data)).tolist() == [3, 7]
    assert episode_returns(jax.tree.map(lambda x: x[:0], data)).tolist() == []
