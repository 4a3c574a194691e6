"""Evaluation and collection in toy environments whose returns, lengths and observations are known."""

from collections.abc import Iterator
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from common import evaluation
from common.buffers import Transitions
from common.collection import Collector, Episodes
from common.errors import UsageError
from common.evaluation import Evaluator, make_environment
from common.transforms import Transform

PLAIN = Transform(np.zeros(2, np.float32), np.ones(2, np.float32), 1.0, 0.0)
SCALED = Transform(np.float32([1, -2]), np.float32([2, 0.5]), 10.0, -1.0)


class Toy(gym.Env):
    """Episode s (its seed) observes [s, t] and lasts 1 + s % 4 steps; the reward of step t is 10^t times the action.

    Episodes of odd s end by termination, of even s by truncation; s % 4 == 3 sets both flags. Without a seed, s goes
    on counting. Actions are bounded by 1 and 5. Stepping past the end is an error.
    """

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = spaces.Box(np.float32([1.0]), np.float32([5.0]))
    actions: ClassVar[list[float]] = []
    resets: ClassVar[int] = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.episode = self.episode + 1 if seed is None else seed
        self.time = 0
        Toy.resets += 1
        return np.array([self.episode, 0.0]), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        assert self.time < 1 + self.episode % 4, "stepped past the end"
        assert action.shape == (1,)
        Toy.actions.append(float(action[0]))
        reward = 10.0**self.time * float(action[0])
        self.time += 1
        over = self.time == 1 + self.episode % 4
        terminated = over and self.episode % 2 == 1
        truncated = over and (self.episode % 2 == 0 or self.episode % 4 == 3)
        return np.array([self.episode, self.time], float), reward, terminated, truncated, {}


class Goal(Toy):
    """The same with a dictionary of observations, in an order that is not the alphabet's."""

    observation_space = spaces.Dict(
        {
            "observation": spaces.Box(-9, 9, (1,)),
            "achieved": spaces.Box(-9, 9, (2,)),
            "desired": spaces.Box(-9, 9, (1,)),
        }
    )

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        parts = {"observation": [7], "achieved": [1, 2], "desired": [5]}
        return {name: np.array(value, np.float32) for name, value in parts.items()}, {}


class Discrete(Toy):
    action_space = spaces.Discrete(3)


class Image(Toy):
    observation_space = spaces.Box(0, 255, (8, 8, 3), np.uint8)


class Unbounded(Toy):
    action_space = spaces.Box(-np.inf, np.inf, (1,))


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    before = dict(gym.registry)
    for kind in (Toy, Goal, Discrete, Image, Unbounded):
        gym.register(f"OffaxTest/{kind.__name__}-v0", entry_point=kind)
    Toy.actions.clear()
    Toy.resets = 0
    yield
    for name in gym.registry.keys() - before.keys():
        del gym.registry[name]


def full_return(seed: int, action: float = 3.0) -> float:
    """3 + 30 + 300 + ... over the 1 + seed % 4 steps of the episode."""
    return sum(action * 10.0**t for t in range(1 + seed % 4))


# Evaluation


def test_every_episode_is_counted_once_and_in_full() -> None:
    evaluator = Evaluator("OffaxTest/Toy-v0", 2, PLAIN)
    result = evaluator.run(lambda observations, step: np.zeros((2, 5, 1)), 5, [100, 203])
    seeds = np.array([[100, 101, 102, 103, 104], [203, 204, 205, 206, 207]])
    np.testing.assert_array_equal(result.lengths, 1 + seeds % 4)
    np.testing.assert_allclose(result.returns, [[full_return(s) for s in row] for row in seeds])
    assert Toy.resets == 10, "one episode for each sub-environment"
    assert len(Toy.actions) == (1 + seeds % 4).sum()


def test_success_is_that_of_any_step_and_nan_where_none_is_reported() -> None:
    class Successful(Toy):
        """Seed s: success at the first step of an even s, at none of an odd one."""

        def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
            self.even, self.first = seed % 2 == 0, True
            return super().reset(seed=seed, options=options)

        def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
            success, self.first = self.even and self.first, False
            return *super().step(action)[:4], {"success": np.bool_(success)}

    gym.register("OffaxTest/Successful-v0", entry_point=Successful)
    result = Evaluator("OffaxTest/Successful-v0", 2, PLAIN).run(lambda *_: np.zeros((2, 4, 1)), 4, [100, 203])
    assert result.lengths.max() > 1, "later steps without success follow"
    np.testing.assert_array_equal(result.successes, [[1, 0, 1, 0], [0, 1, 0, 1]])
    silent = Evaluator("OffaxTest/Toy-v0", 1, PLAIN).run(lambda *_: np.zeros((1, 2, 1)), 2, [100])
    assert np.isnan(silent.successes).all() and silent.successes.shape == (1, 2)


@pytest.mark.parametrize("limit", [1, 2, 5, 64])
def test_episodes_in_waves_are_the_same_episodes(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "MAX_ENVIRONMENTS", limit)
    evaluator, counts = Evaluator("OffaxTest/Toy-v0", 2, PLAIN), []

    def policy(observations: np.ndarray, count: int) -> np.ndarray:
        counts.append(count)
        return np.zeros((*observations.shape[:2], 1))

    result = evaluator.run(policy, 5, [100, 203])
    np.testing.assert_allclose(result.returns, [[full_return(s + i) for i in range(5)] for s in (100, 203)])
    assert len(evaluator.environments) <= max(limit, 2)
    assert len(set(counts)) == len(counts), "every call has a number of its own, for its random key"


def test_fewer_episodes_later_and_the_same_again() -> None:
    """Environments are kept between evaluations; what ran before must not show."""
    evaluator = Evaluator("OffaxTest/Toy-v0", 2, PLAIN)
    for episodes in (3, 1, 4, 3):
        result = evaluator.run(lambda x, _: np.zeros((*x.shape[:2], 1)), episodes, [11, 30])
        expected = [[full_return(s + i) for i in range(episodes)] for s in (11, 30)]
        np.testing.assert_allclose(result.returns, expected)
    evaluator.close()
    assert evaluator.environments == []


def test_each_member_acts_on_its_own_transformed_observations() -> None:
    seen = []

    def policy(observations: np.ndarray, step: int) -> np.ndarray:
        assert observations.shape == (2, 3, 2) and observations.dtype == np.float32
        seen.append(observations)
        return np.broadcast_to(np.float32([-1, 1]).reshape(2, 1, 1), (2, 3, 1))

    result = Evaluator("OffaxTest/Toy-v0", 2, SCALED).run(policy, 3, [100, 202])
    # (observation - [1, -2]) / [2, 0.5] of [seed, 0], then of [seed, 1].
    np.testing.assert_allclose(seen[0][0], [[(s - 1) / 2, 4] for s in (100, 101, 102)])
    np.testing.assert_allclose(seen[0][1], [[(s - 1) / 2, 4] for s in (202, 203, 204)])
    np.testing.assert_allclose(seen[1][0], [[(s - 1) / 2, 6] for s in (100, 101, 102)])
    # Returns stay raw, and -1 and 1 are the bounds, 1 and 5.
    np.testing.assert_allclose(result.returns[0], [full_return(s, 1.0) for s in (100, 101, 102)])
    np.testing.assert_allclose(result.returns[1], [full_return(s, 5.0) for s in (202, 203, 204)])
    assert set(Toy.actions) == {1.0, 5.0}


@pytest.mark.parametrize(("action", "expected"), [(-1.0, 1.0), (-0.5, 2.0), (0.0, 3.0), (1.0, 5.0)])
def test_actions_are_rescaled_to_the_bounds(action: float, expected: float) -> None:
    env = make_environment("OffaxTest/Toy-v0")
    np.testing.assert_array_equal([env.action_space.low, env.action_space.high], [[-1], [1]])
    env.reset(seed=0)
    assert env.step(np.float32([action]))[1] == pytest.approx(expected)


def test_dictionaries_are_flattened_in_the_order_of_their_names() -> None:
    env = make_environment("OffaxTest/Goal-v0")
    np.testing.assert_array_equal(env.reset(seed=0)[0], [1, 2, 5, 7])  # achieved, desired, observation


def test_an_interrupt_ends_the_evaluation() -> None:
    class Stop(Exception):
        pass

    def stop() -> None:
        raise Stop

    with pytest.raises(Stop):
        Evaluator("OffaxTest/Toy-v0", 1, PLAIN).run(lambda x, _: np.zeros((1, 1, 1)), 1, [0], stop)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("OffaxTest/Discrete-v0", "continuous vectors only"),
        ("OffaxTest/Image-v0", "continuous vectors only"),
        ("OffaxTest/Unbounded-v0", "unbounded actions"),
        ("CartPole-v1", "continuous vectors only"),
        ("OffaxTest/Nothing-v0", "Nothing"),
        ("Hopper-v77", "Hopper"),
        ("not a valid id!", "not a valid id!"),
    ],
)
def test_environments_that_do_not_fit(name: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        make_environment(name)
    assert words in str(caught.value) and name in str(caught.value) and "\n" not in str(caught.value)


# Collection


def test_transitions_have_their_true_successor_flags_and_transformed_rewards() -> None:
    collector = Collector("OffaxTest/Toy-v0", SCALED, [1, 2])  # 2 steps, then terminated; 3 steps, then truncated
    actions = np.zeros((2, 1), np.float32)
    steps = [collector.step(actions) for _ in range(4)]
    raw = np.stack([step.observations for step in steps]) * SCALED.observation_std + SCALED.observation_mean
    after = np.stack([step.next_observations for step in steps]) * SCALED.observation_std + SCALED.observation_mean
    # Member 0: episode 1 for two steps, then episode 2. Member 1: episode 2 for three, then episode 3.
    np.testing.assert_allclose(raw[:, 0], [[1, 0], [1, 1], [2, 0], [2, 1]])
    np.testing.assert_allclose(after[:, 0], [[1, 1], [1, 2], [2, 1], [2, 2]])
    np.testing.assert_allclose(raw[:, 1], [[2, 0], [2, 1], [2, 2], [3, 0]])
    np.testing.assert_allclose(after[:, 1], [[2, 1], [2, 2], [2, 3], [3, 1]])
    np.testing.assert_array_equal([step.terminations for step in steps], [[0, 0], [1, 0], [0, 0], [0, 0]])
    np.testing.assert_array_equal([step.truncations for step in steps], [[0, 0], [0, 0], [0, 1], [0, 0]])
    # Action 0 is 3 in the environment: rewards 3, 30, 300, as the dataset's: 10 r - 1.
    rewards = [[29, 29], [299, 299], [29, 2999], [299, 29]]
    np.testing.assert_allclose([step.rewards for step in steps], rewards)
    assert collector.episodes == [(0, 33.0, 2), (1, 333.0, 3)]
    assert {x.dtype for step in steps for x in step} == {np.dtype(np.float32)}
    # What comes next is where acting goes on: the start of the new episode.
    state = collector.observations * SCALED.observation_std + SCALED.observation_mean
    np.testing.assert_allclose(state, [[2, 2], [3, 1]])
    collector.close()


def test_a_termination_at_the_time_limit_is_a_termination() -> None:
    collector = Collector("OffaxTest/Toy-v0", PLAIN, [3])  # four steps, then both flags
    steps = [collector.step(np.zeros((1, 1))) for _ in range(4)]
    assert [float(step.terminations[0]) for step in steps] == [0, 0, 0, 1]
    assert [float(step.truncations[0]) for step in steps] == [0, 0, 0, 0]


def test_the_actions_kept_are_the_policys() -> None:
    collector = Collector("OffaxTest/Toy-v0", PLAIN, [2, 6])
    step = collector.step(np.float32([[-1], [0.5]]))
    np.testing.assert_array_equal(step.actions, [[-1], [0.5]])
    assert Toy.actions == [1.0, 4.0]


def test_actions_beyond_their_bounds_are_clipped_for_the_environment_alone() -> None:
    collector = Collector("OffaxTest/Toy-v0", PLAIN, [2, 6])
    step = collector.step(np.float32([[-7.0], [1.25]]))
    np.testing.assert_array_equal(step.actions, np.float32([[-7.0], [1.25]]))
    assert Toy.actions == [1.0, 5.0]
    np.testing.assert_array_equal(step.rewards, [1.0, 5.0])


# Whole episodes


def side_by_side(steps: list[list[tuple[int, str]]]) -> list[Transitions]:
    """Steps of environments side by side, each a number and whether it is a termination, a truncation or neither."""
    result = []
    for environments in steps:
        numbers = np.float32([number for number, _ in environments])
        flags = [np.float32([kind == ending for _, kind in environments]) for ending in ("done", "cut")]
        wide = numbers[:, None]
        result.append(Transitions(np.hstack([wide, -wide]), wide, numbers, np.hstack([wide + 1, wide]), *flags))
    return result


def numbers_of(ended: list[Transitions | None]) -> list[list[float] | None]:
    """The numbers of the steps that were given out; every column of a row must belong to the same step."""
    for part in ended:
        if part is not None:
            columns = (part.observations[:, 0], -part.observations[:, 1], part.actions[:, 0])
            for column in (*columns, part.next_observations[:, 0] - 1, part.next_observations[:, 1]):
                np.testing.assert_array_equal(column, part.rewards)
    return [None if part is None else part.rewards.tolist() for part in ended]


def test_episodes_are_given_out_whole_and_once() -> None:
    """Three environments: one ends often, one once and late, one never."""
    episodes, going = Episodes(3), ""
    assert episodes.take() == [None] * 3 and not episodes.ended.any()
    for step in side_by_side([[(1, going), (101, going), (201, going)], [(2, "done"), (102, going), (202, going)]]):
        episodes.add(step)
    assert episodes.ended.tolist() == [True, False, False]
    assert numbers_of(episodes.take()) == [[1, 2], None, None]
    assert episodes.take() == [None] * 3, "nothing since"
    endings = {3: "cut", 6: "done", 9: "cut"}
    for t in (3, 4, 5, 6, 7):
        episodes.add(side_by_side([[(t, endings.get(t, going)), (100 + t, going), (200 + t, going)]])[0])
    assert episodes.ended.tolist() == [True, False, False], "before they are taken"
    found = episodes.take()
    assert numbers_of(found) == [[3, 4, 5, 6], None, None]
    np.testing.assert_array_equal(found[0].truncations, [1, 0, 0, 0])
    np.testing.assert_array_equal(found[0].terminations, [0, 0, 0, 1])
    episodes.add(side_by_side([[(8, going), (108, going), (208, going)]])[0])
    assert episodes.take() == [None] * 3
    for t in (9, 10):
        episodes.add(
            side_by_side([[(t, endings.get(t, going)), (100 + t, endings.get(t, going)), (200 + t, going)]])[0]
        )
    assert episodes.ended.tolist() == [True, True, False], "for good"
    found = episodes.take()
    assert numbers_of(found) == [[7, 8, 9], list(range(101, 110)), None]
    assert {x.dtype for x in found[1]} == {np.dtype(np.float32)}
    episodes.add(side_by_side([[(11, "done"), (111, "done"), (211, "cut")]])[0])
    assert numbers_of(episodes.take()) == [[10, 11], [110, 111], list(range(201, 212))]


def test_random_episodes_come_out_as_they_went_in() -> None:
    """Whatever the ends and however often they are taken, each environment's steps up to its last end, in order."""
    rng, episodes = np.random.default_rng(0), Episodes(4)
    went_in, came_out, last_end = [[] for _ in range(4)], [[] for _ in range(4)], [0] * 4
    for t in range(200):
        kinds = rng.choice(["", "done", "cut"], 4, p=[0.8, 0.1, 0.1])
        (step,) = side_by_side([[(1000 * i + t, kind) for i, kind in enumerate(kinds)]])
        episodes.add(step)
        for i, kind in enumerate(kinds):
            went_in[i].append(1000 * i + t)
            last_end[i] = t + 1 if kind else last_end[i]
        if rng.random() < 0.3:
            for out, part in zip(came_out, numbers_of(episodes.take()), strict=True):
                out += part or []
            assert came_out == [numbers[:end] for numbers, end in zip(went_in, last_end, strict=True)]
