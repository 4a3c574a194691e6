"""Evaluation and collection in toy environments whose returns, lengths and observations are known."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import jax
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.wrappers.utils import rescale_box

from algorithms import iql
from benchmarks import families
from common import environments, members
from common.cli import UsageError
from common.environments import Collector, Evaluator, make_environment
from common.replay import Transform

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


def box(low: Any, high: Any, dtype: Any = np.float32) -> spaces.Box:
    return spaces.Box(np.array(low, dtype), np.array(high, dtype), dtype=dtype)


LARGEST = np.finfo(np.float32).max
UNFIT = {  # action and observation spaces, and what the message says
    "discrete": (spaces.Discrete(3), None, "actions in Discrete(3)"),
    "integers": (box([0], [10], np.int32), None, "actions in Box"),
    "matrix": (box([[0, 0]], [[1, 1]]), None, "actions in Box"),
    "infinite": (box([0, -np.inf], [1, np.inf]), None, "dimension 1 of the actions is bounded by -inf and inf"),
    "largest": (box([-LARGEST], [LARGEST]), None, "dimension 0 of the actions is bounded by -3.4"),
    "large": (box([-1e10], [1e10]), None, "dimension 0 of the actions is bounded by -1e+10 and 1e+10"),
    "equal": (box([-1, 0.5, -1], [1, 0.5, 1]), None, "dimension 1 of the actions is bounded by 0.5 and 0.5"),
    "image": (None, spaces.Box(0, 255, (8, 8, 3), np.uint8), "observations in Box"),
    "states": (None, spaces.Discrete(7), "observations in Discrete(7)"),
    "sequence": (None, spaces.Dict(a=box([0], [1]), b=spaces.Sequence(box([0], [1]))), "observations in Sequence"),
    "text": (None, spaces.Tuple([box([0], [1]), spaces.Text(5)]), "observations in Text"),
}


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    before = dict(gym.registry)
    for kind in (Toy, Goal):
        gym.register(f"OffaxTest/{kind.__name__}-v0", entry_point=kind)
    Toy.actions.clear()
    Toy.resets = 0
    yield
    for name in gym.registry.keys() - before.keys():
        del gym.registry[name]


class Count(Toy):
    """Without an end."""

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.time += 1
        return np.array([self.episode, self.time], float), 1.0, False, False, {}


def of_seeds(count: int, seed: int = 0) -> members.Members:
    return members.make_members(iql.Args(num_seeds=count, seed=seed))


def evaluator(name: str, count: int = 2, transform: Transform = PLAIN) -> Evaluator:
    """Of members with seeds 0, 1, ...: their episodes' seeds begin at FIRST of them."""
    made = Evaluator(partial(make_environment, f"OffaxTest/{name}-v0"), of_seeds(count), transform)
    Toy.actions.clear()  # that of trying the environment out
    Toy.resets = 0
    return made


def collector(name: str, count: int = 2, transform: Transform = PLAIN, **options: Any) -> Collector:
    return Collector(partial(make_environment, f"OffaxTest/{name}-v0"), of_seeds(count), transform, **options)


def middle(observations: np.ndarray, _: jax.Array) -> np.ndarray:
    return np.zeros((*observations.shape[:2], 1), np.float32)


FIRST = [1_000_000, 1_001_000, 1_002_000]


def full_return(seed: int, action: float = 3.0) -> float:
    """3 + 30 + 300 + ... over the 1 + seed % 4 steps of the episode."""
    return sum(action * 10.0**t for t in range(1 + seed % 4))


# Evaluation


def test_every_episode_is_counted_once_and_in_full() -> None:
    result = evaluator("Toy").run(middle, 5)
    seeds = np.array([[first + i for i in range(5)] for first in FIRST[:2]])
    np.testing.assert_allclose(result.returns, [[full_return(s) for s in row] for row in seeds])
    assert Toy.resets == 10, "one episode for each sub-environment"
    assert len(Toy.actions) == (1 + seeds % 4).sum()


def test_a_member_that_diverged_plays_no_episode() -> None:
    result = evaluator("Toy", 3).run(middle, 2, alive=np.array([1, 0, 1] + [0] * 8))
    expected = [[full_return(first + i) for i in range(2)] for first in FIRST]
    np.testing.assert_allclose(result.returns, [expected[0], [0, 0], expected[2]])
    assert Toy.resets == 4


@pytest.mark.parametrize("kind", ["any step", "last step", "success alone", "None", "array"])
def test_success_is_that_of_any_step(kind: str) -> None:
    """Of episodes of 1 to 4 steps, with odd seeds: success at the last or the first step, whatever else is reported."""

    class Successful(Toy):
        def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
            first, (*result, _) = self.time == 0, super().step(action)
            over, odd = result[2] or result[3], self.episode % 2 == 1
            info = {
                "any step": {"success": np.bool_(odd and first)},
                "last step": {"success": odd} if over else {},
                "success alone": {"success": True} if odd and over else {},
                "None": {"success": float(odd) if over else None},
                "array": {"success": np.array([odd and first])},
            }
            return *result, info[kind]

    gym.register("OffaxTest/Successful-v0", entry_point=Successful)
    result = evaluator("Successful").run(middle, 4)
    np.testing.assert_array_equal(result.successes, [[0, 1, 0, 1], [0, 1, 0, 1]])


def test_success_is_nan_where_none_is_reported() -> None:
    silent = evaluator("Toy", 1).run(middle, 2)
    assert np.isnan(silent.successes).all() and silent.successes.shape == (1, 2)


def test_rewards_may_be_arrays_of_one_number() -> None:
    class Array(Toy):
        def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict]:
            observation, reward, *rest = super().step(action)
            return observation, np.array([reward]), *rest

    gym.register("OffaxTest/Array-v0", entry_point=Array)
    np.testing.assert_array_equal(evaluator("Array").run(middle, 3).returns, evaluator("Toy").run(middle, 3).returns)
    step, plain = (collector(name).step(np.zeros((2, 1, 1), np.float32)) for name in ("Array", "Toy"))
    for one, other in zip(step, plain, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("limit", [1, 2, 5, 64])
def test_episodes_in_waves_are_the_same_episodes(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "MAX_ENVIRONMENTS", limit)
    seen = []

    def policy(observations: np.ndarray, keys: jax.Array) -> np.ndarray:
        seen.extend(tuple(key) for key in np.asarray(jax.random.key_data(keys)).tolist())
        return middle(observations, keys)

    both = evaluator("Toy")
    for done in (0, 10):
        result = both.run(policy, 5, done)
        np.testing.assert_allclose(result.returns, [[full_return(s + i) for i in range(5)] for s in FIRST[:2]])
    assert len(set(seen)) == len(seen), "every member has a key of its own at every step of every evaluation"


def test_a_part_of_a_population_evaluates_in_batches_of_the_wholes_width() -> None:
    """Products of another number of rows differ in the last bits, and actions that are drawn differ wholly."""
    two = members.make_members(iql.Args(num_seeds=environments.MAX_ENVIRONMENTS, shard="0/32", run_dir="x"))
    part = Evaluator(partial(make_environment, "OffaxTest/Toy-v0"), two, PLAIN)
    shapes = set()

    def policy(observations: np.ndarray, keys: jax.Array) -> np.ndarray:
        shapes.add(observations.shape)
        return middle(observations, keys)

    part.run(policy, 3)
    assert shapes == {(2, 1, 2)}, "two of 64 members: an episode of each at a time"


def test_fewer_episodes_later_and_the_same_again() -> None:
    """Environments are kept between evaluations; what ran before must not show."""
    both = evaluator("Toy")
    for episodes in (3, 1, 4, 3):
        expected = [[full_return(s + i) for i in range(episodes)] for s in FIRST[:2]]
        np.testing.assert_allclose(both.run(middle, episodes).returns, expected)


def test_each_member_acts_on_its_own_transformed_observations() -> None:
    """Three members on two devices: the padding acts in no environment."""
    seen = []

    def policy(observations: np.ndarray, keys: jax.Array) -> np.ndarray:
        assert observations.shape == (4, 3, 2) and observations.dtype == np.float32
        seen.append(observations)
        return np.broadcast_to(np.float32([-1, 1, 0, 7]).reshape(4, 1, 1), (4, 3, 1))

    result = evaluator("Toy", 3, SCALED).run(policy, 3)
    # (observation - [1, -2]) / [2, 0.5] of [seed, 0], then of [seed, 1].
    for m, first in enumerate(FIRST):
        np.testing.assert_allclose(seen[0][m], [[(first + i - 1) / 2, 4] for i in range(3)])
        np.testing.assert_allclose(seen[1][m], [[(first + i - 1) / 2, 6] for i in range(3)])
        # Returns stay raw, and -1, 1 and 0 are the bounds, 1 and 5, and their middle.
        np.testing.assert_allclose(result.returns[m], [full_return(first + i, [1, 5, 3][m]) for i in range(3)])
    assert set(Toy.actions) == {1.0, 5.0, 3.0}


@pytest.mark.parametrize(("action", "expected"), [(-1.0, 1.0), (-0.5, 2.0), (0.0, 3.0), (1.0, 5.0)])
def test_actions_are_rescaled_to_the_bounds(action: float, expected: float) -> None:
    env = make_environment("OffaxTest/Toy-v0")
    np.testing.assert_array_equal([env.action_space.low, env.action_space.high], [[-1], [1]])
    env.reset(seed=0)
    assert env.step(np.float32([action]))[1] == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.filterwarnings("error")
def test_actions_are_of_the_environments_space_to_the_last_digit(dtype: Any) -> None:
    """Rescaling by itself leaves bounds as 0.1 and 1.4 by a rounding; and JAX may give 64 bits."""
    low, high = np.sort(np.random.default_rng(0).uniform(-3, 3, (2, 300)).round(1), axis=0)
    space, own = box(low, high + 0.1, dtype), box([-1] * 300, [1] * 300, dtype)
    outside = [rescale_box(space, own.low, own.high)[2](one) for one in (own.low, own.high)]
    assert not all(map(space.contains, outside))

    class Strict(Toy):
        action_space = space

        def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
            assert action in space
            return super().step(action[:1])

    gym.register("OffaxTest/Strict-v0", entry_point=Strict)
    for end in (-1.0, 1.0):
        evaluator("Strict", 1).run(lambda x, _, end=end: np.full((*x.shape[:2], 300), end, np.float64), 3)
        collector("Strict", 1).step(np.full((1, 1, 300), end, np.float64))


def test_dictionaries_are_flattened_in_the_order_of_their_names() -> None:
    env = make_environment("OffaxTest/Goal-v0")
    np.testing.assert_array_equal(env.reset(seed=0)[0], [1, 2, 5, 7])  # achieved, desired, observation


def test_an_interrupt_ends_the_evaluation() -> None:
    asked = []
    assert evaluator("Toy").run(middle, 3, stopping=lambda: asked.append(1) or len(asked) == 2) is None
    assert len(Toy.actions) == 6, "one step of each"


@pytest.mark.parametrize(("given", "steps"), [(0, 10_000), (7, 7)])
def test_without_a_time_limit_an_episode_is_cut(given: int, steps: int) -> None:
    gym.register("OffaxTest/Count-v0", entry_point=Count)
    env = make_environment("OffaxTest/Count-v0", given)
    env.reset(seed=0)
    ended = [env.step(np.zeros(1, np.float32))[2:4] for _ in range(steps)]
    assert ended == [(False, False)] * (steps - 1) + [(False, True)]


def test_a_time_limit_of_ones_own() -> None:
    gym.register("OffaxTest/Count-v0", entry_point=Count, max_episode_steps=5)
    for given, steps in ((0, 5), (9, 9), (2, 2)):
        env = make_environment("OffaxTest/Count-v0", given)
        env.reset(seed=0)
        ended = [env.step(np.zeros(1, np.float32))[3] for _ in range(steps)]
        assert ended == [False] * (steps - 1) + [True]


@pytest.mark.parametrize("seed", [20241126, 2**31 - 1])
def test_an_environment_that_seeds_numpy(seed: int) -> None:
    """`np.random.seed` takes 32 bits."""

    class Seeding(Toy):
        def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
            if seed is not None:
                np.random.seed(seed)
            return super().reset(seed=seed, options=options)

    gym.register("OffaxTest/Seeding-v0", entry_point=Seeding)
    make, one = partial(make_environment, "OffaxTest/Seeding-v0"), of_seeds(1, seed)
    assert Evaluator(make, one, PLAIN).run(middle, 3).returns.shape == (1, 3)
    collected = Collector(make, one, PLAIN, per_member=2).step(np.zeros((1, 2, 1), np.float32))
    assert collected.observations.shape == (1, 2, 2)


def refusal(name: str) -> str:
    with pytest.raises(UsageError) as caught:
        make_environment(name)
    message = str(caught.value)
    assert name in message and "\n" not in message
    return message


@pytest.mark.parametrize("name", UNFIT)
def test_spaces_that_do_not_fit(name: str) -> None:
    actions, observations, words = UNFIT[name]

    class Unfit(Toy):
        action_space = actions or Toy.action_space
        observation_space = observations or Toy.observation_space

    gym.register("OffaxTest/Unfit-v0", entry_point=Unfit)
    assert words in refusal("OffaxTest/Unfit-v0")


@pytest.mark.parametrize(("low", "dtype"), [(-5, np.int64), (0, np.uint8)])
def test_vectors_of_integers_are_observations(low: int, dtype: Any) -> None:
    class Fit(Toy):
        observation_space = spaces.Box(low, 5, (2,), dtype)

    gym.register("OffaxTest/Fit-v0", entry_point=Fit)
    assert make_environment("OffaxTest/Fit-v0").reset(seed=3)[0].shape == (2,)


@pytest.mark.parametrize(
    "name", ["OffaxTest/Nothing-v0", "Hopper-v77", "Nothing-v3", "not a valid id!", "nowhere:X-v0"]
)
def test_unknown_environments(name: str) -> None:
    refusal(name)


def test_a_constructor_that_raises_is_one_line() -> None:
    def fail(**_: Any) -> None:
        raise RuntimeError("no licence\nsee the manual")

    gym.register("OffaxTest/Failing-v0", entry_point=fail)
    assert "no licence" in refusal("OffaxTest/Failing-v0")


def test_a_module_that_registers_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "toys_of_mine.py").write_text("import gymnasium as gym\nimport absent_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert "absent_package" in refusal("toys_of_mine:Toy-v0")
    assert make_environment("gymnasium.envs.mujoco:Hopper-v5").spec.id == "Hopper-v5"


@pytest.mark.parametrize(
    ("domain", "low", "high"),
    [("hopper", -20.272305, 3234.3), ("halfcheetah", -280.178953, 12135.0), ("walker2d", 1.629008, 4592.3),
     ("door", -56.512833, 2880.5693087298737), ("antmaze", 0.0, 1.0), ("kitchen", 0.0, 4.0)],
)  # fmt: skip
def test_reference_scores(domain: str, low: float, high: float) -> None:
    scores = families.normalized_score(domain, np.array([low, high, (low + high) / 2]))
    np.testing.assert_allclose(scores, [0, 100, 50], atol=1e-9)


def test_whoever_reaches_the_goal_of_antmaze_has_100() -> None:
    scores = families.normalized_score("antmaze", np.array([0.0, 1.0, 2.0, 700.0]))
    np.testing.assert_array_equal(scores, [0, 100, 100, 100])


def test_no_reference_no_score() -> None:
    assert families.normalized_score("hopper", np.ones(1, np.float32)).dtype == np.float64
    assert families.normalized_score(None, np.ones(1)) is None
    assert families.normalized_score("pusher", np.ones(1)) is None


@pytest.mark.parametrize(
    ("env_id", "domain"),
    [("Hopper-v5", "hopper"), ("Walker2d-v4", "walker2d"), ("Ant-v5", "ant"), ("AntMaze_UMaze-v4", "antmaze"),
     ("AntMaze_Medium_Diverse_GR-v4", "antmaze"), ("AntMaze_UMazeDense-v4", None), ("AdroitHandDoor-v1", "door"),
     ("AdroitHandDoorSparse-v1", None), ("FrankaKitchen-v1", None), ("PointMaze_UMaze-v3", None),
     ("Humanoid-v5", None), (None, None), ("gymnasium.envs.mujoco:Hopper-v5", "hopper"),
     ("gymnasium_robotics:AdroitHandDoor-v1", "door")],
)  # fmt: skip
def test_domain_of_environment(env_id: str | None, domain: str | None) -> None:
    assert families.domain_of(env_id) == domain


def test_wrapped_rewards_have_no_score() -> None:
    """D4RL's reference returns are of the environment's own rewards."""
    plain = gym.make("Hopper-v5")
    assert families.domain_of(gym.wrappers.RescaleAction(plain, np.float32(-1), np.float32(1)).spec) == "hopper"
    assert families.domain_of(gym.wrappers.NormalizeReward(plain).spec) is None


# Collection


def starting_at(*seeds: int, **options: Any) -> Collector:
    """A collector whose environments' first episodes have these seeds."""
    made = collector("Toy", len(seeds), **options)
    observations = [env.reset(seed=seed)[0] for env, seed in zip(made.environments, seeds, strict=True)]
    made.observations = made.transform.observations(np.array(observations))[:, None]
    return made


def test_transitions_have_their_true_successor_flags_and_transformed_rewards() -> None:
    made = starting_at(1, 2, transform=SCALED)  # 2 steps, then terminated; 3 steps, then truncated
    actions = np.zeros((2, 1, 1), np.float32)
    steps = [type(step)(*(np.asarray(x)[:, 0] for x in step)) for step in (made.step(actions) for _ in range(4))]
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
    assert {x.dtype for step in steps for x in step} == {np.dtype(np.float32)}
    # What comes next is where acting goes on: the start of the new episode.
    state = made.observations[:, 0] * SCALED.observation_std + SCALED.observation_mean
    np.testing.assert_allclose(state, [[2, 2], [3, 1]])


def test_collecting_needs_nothing_of_info_and_copies_what_an_environment_may_write_to() -> None:
    """Arrays in `info` have another shape in each environment; every observation is the same array, written anew."""

    class Ragged(Toy):
        def reset(self, **options: Any) -> tuple[np.ndarray, dict]:
            self.last, _ = super().reset(**options)
            return self.last, {"start": np.zeros(self.episode % 3)}

        def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
            self.last[:], *others, _ = super().step(action)
            return self.last, *others, {"path": np.zeros((self.time, 2)), "kind": 1 if self.time % 2 else None}

    gym.register("OffaxTest/Ragged-v0", entry_point=Ragged)
    plain, ragged = (collector(name, 2, per_member=2) for name in ("Toy", "Ragged"))
    actions = np.zeros((2, 2, 1), np.float32)
    for _ in range(9):
        for ours, theirs in zip(ragged.step(actions), plain.step(actions), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_a_termination_at_the_time_limit_is_a_termination() -> None:
    made = starting_at(3)  # four steps, then both flags
    steps = [made.step(np.zeros((1, 1, 1), np.float32)) for _ in range(4)]
    assert [float(step.terminations[0, 0]) for step in steps] == [0, 0, 0, 1]
    assert [float(step.truncations[0, 0]) for step in steps] == [0, 0, 0, 0]


def test_actions_are_kept_as_they_are_and_clipped_for_the_environment_alone() -> None:
    made = starting_at(2, 6)
    for given, acted in (([-1, 0.5], [1.0, 4.0]), ([-7, 1.25], [1.0, 5.0])):
        Toy.actions.clear()
        step = made.step(np.float32(given).reshape(2, 1, 1))
        np.testing.assert_array_equal(step.actions[:, 0, 0], np.float32(given))
        assert Toy.actions == acted


def test_a_diverged_member_acts_with_zeros() -> None:
    made = starting_at(2, 6)
    step = made.step(np.float32([np.nan, 1]).reshape(2, 1, 1))
    assert Toy.actions == [3.0, 5.0] and np.isfinite(step.actions).all()


def test_environments_start_with_seeds_of_their_own() -> None:
    """Of each member, of each of its environments, and of each process that goes on with a run."""
    first = [collector("Toy", 3, per_member=2, done=done).observations for done in (0, 0, 40)]
    np.testing.assert_array_equal(first[0], first[1])
    assert first[0].shape == (4, 2, 2), "with the padding"
    np.testing.assert_array_equal(first[0][3], first[0][2])
    assert len({float(seed) for one in (first[0], first[2]) for seed in one[:3, :, 0].ravel()}) == 12
