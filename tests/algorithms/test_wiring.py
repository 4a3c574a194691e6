"""What `main` gives to the parts of an algorithm: data, rings, keys, limits. Stand-ins for the parts keep runs short.

Updates count the rows that they are given in place of learning, and policies draw from the key that they are given, so
that what reaches them shows in the tables and in the ring.
"""

import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import arrays_of, done_in, hopper_like, rows_of, smaller

from common import runs
from common.environments import Evaluator, evaluation_seed
from common.members import Metrics
from common.replay import Replay
from common.report import load_policy

EACH_MAIN = pytest.mark.parametrize("name", ["awr", "emaq", "iql"])  # the others' are IQL's, as test_all says
LIMIT = 4
LENGTHS = ["--num-updates", "10", "--online-steps", "24", "--eval-every", "8", "--max-episode-steps", str(LIMIT)]
TRANSFORMS = ["--reward-scale", "0.5", "--reward-shift", "-2", "--normalize-observations", "True"]


def count_rows(state: Any, hp: Any, data: Replay, num_updates: Any, args: Any, **_: Any) -> tuple[Any, Metrics]:
    """In place of `train`."""
    offline, ring, n = data.offline, data.ring, jnp.int32(num_updates)
    seen = {"ring": 0 if ring is None else ring.written[data.member], "rows": 0 if offline is None else 1}
    if offline is not None:
        seen["rewards"], seen["observations"] = offline.rewards.mean(), offline.states[:-1].mean()
    sums = {name: n * jnp.float32(x) for name, x in seen.items()}
    return state._replace(step=state.step + n), Metrics(sums, dict.fromkeys(sums, n))


def draw(state: Any, hp: Any, observations: Any, key: Any, args: Any, action_dim: int, sample: bool) -> jax.Array:
    """In place of `act`: to explore larger than to be evaluated."""
    size = 0.9 if sample else 0.3
    return jax.random.uniform(key, (len(observations), action_dim), jnp.float32, 0.5 * size, size)


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Put the two in the places of the algorithm's own."""
    module = importlib.import_module(f"algorithms.{name}")
    monkeypatch.setattr(module, "train", count_rows)
    monkeypatch.setattr(module, "act", draw)
    if name == "emaq":
        monkeypatch.setattr(module, "main", partial(module.main, act=draw))


def leaf(run: Path, ending: str) -> np.ndarray:
    """The array of a run's checkpoint whose name ends so."""
    (array,) = (array for name, array in arrays_of(run).items() if name.endswith(ending))
    return array


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("wiring")


@pytest.fixture
def run(
    finished: Path, name: str, small_run: list[str], script: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A run of two members through both phases, of the stand-ins; the policies that it leaves are stand-ins too."""
    stand_in(monkeypatch, name)
    run = finished / name
    if not run.exists():
        arrays = {key: 5 * x + 3 if "observations" in key else x for key, x in hopper_like().items()}
        np.savez(finished / "data.npz", **arrays)
        flags = [*small_run, *smaller(name), *LENGTHS, *TRANSFORMS, "--num-seeds", "2", "--run-dir", run]
        flags[flags.index("--dataset") + 1] = str(finished / "data.npz")
        outcome = script(name, *flags)
        assert (outcome.status, outcome.err) == (0, "")
    return run


@EACH_MAIN
def test_the_data_are_transformed_and_used_in_both_phases(run: Path, name: str) -> None:
    rows = rows_of(run / "metrics.csv")
    assert {int(row["step"]) > 10 for row in rows} == {False, True}
    for row in rows:
        assert float(row["rewards"]) == pytest.approx(0.5 * hopper_like()["rewards"].mean() - 2.0, rel=1e-3)
        assert abs(float(row["observations"])) < 0.05, "their own mean is 3"
        assert (float(row["ring"]) > 0.0) == (int(row["step"]) > 10)


@EACH_MAIN
def test_a_member_learns_after_every_online_step_and_explores_with_a_new_key_each_time(run: Path, name: str) -> None:
    arrays = arrays_of(run)
    ring = {key.rpartition(".")[2]: array for key, array in arrays.items() if "'ring'" in key}
    steps = leaf(run, ".step").tolist()
    assert ring["written"].tolist() == [24, 24]
    assert steps == [10 + (10 if name == "awr" else 24)] * 2, "of AWR two iterations of 5 updates after 12 steps"
    if name != "awr":
        means = [float(row["ring"]) for row in rows_of(run / "metrics.csv") if int(row["step"]) > 10]
        assert means[::2] == means[1::2] == [4.5, 12.5, 20.5], "a row, then an update"
    actions = np.concatenate([ring["actions"][i, :n] for i, n in enumerate(ring["written"])])
    assert len(actions) > 20 and actions.min() >= 0.45 and actions.max() <= 0.9, "explored"
    assert len(np.unique(actions, axis=0)) == len(actions)


@EACH_MAIN
def test_episodes_have_the_limit_that_is_given(run: Path, name: str) -> None:
    """Hopper falls later, so every fourth step is truncated, and none is terminated. Episodes so cut have no score."""
    for row in rows_of(run / "evaluations.csv"):
        assert row["score_mean"] == "" and np.isfinite(float(row["return_mean"]))
    ring = {key.rpartition(".")[2]: array for key, array in arrays_of(run).items() if "'ring'" in key}
    for i, n in enumerate(ring["written"]):
        assert not ring["terminations"][i].any()
        np.testing.assert_array_equal(ring["truncations"][i, :n], np.arange(n) % LIMIT == LIMIT - 1)


@EACH_MAIN
def test_a_policy_that_draws_repeats_its_last_evaluation(run: Path, name: str) -> None:
    """Each member with its own keys, which depend on the steps of both phases and on the time."""
    rows = rows_of(run / "returns.csv")
    assert len(rows) == 2 and rows[0]["return"] != rows[1]["return"]
    for row in rows:
        env, policy = gym.make("Hopper-v5", max_episode_steps=LIMIT), load_policy(run, int(row["member"]))
        observation, _ = env.reset(seed=evaluation_seed(int(row["seed"]), 0))
        total, over, taken = 0.0, False, []
        while not over:
            taken.append(policy(observation))
            observation, reward, terminated, truncated, _ = env.step(taken[-1])
            total, over = total + float(reward), terminated or truncated
        assert f"{total:.7g}" == row["return"] and len(taken) == LIMIT
        assert np.min(taken) >= 0.15 and np.max(taken) <= 0.3 and len(np.unique(taken, axis=0)) == LIMIT


@pytest.mark.parametrize("name", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("awr", "emaq")), "iql"])
def test_an_evaluation_that_fails_in_the_online_phase_leaves_a_checkpoint_to_go_on_from(
    tmp_path: Path, small_run: list[str], script: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The first one after the 10 offline updates and an online step; AWR's ring has the whole episodes of 12 steps."""
    original = Evaluator.run

    def failing(self: Evaluator, policy: Any, episodes: int, done: int, *rest: Any) -> Any:
        if done > 10:
            raise RuntimeError("unstable")
        return original(self, policy, episodes, done, *rest)

    monkeypatch.setattr(importlib.import_module(f"algorithms.{name}"), "train", count_rows)
    run = tmp_path / "run"
    flags = [*small_run, *smaller(name), *LENGTHS, "--run-dir", run, "--resume", "True"]
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="unstable"):
        patch.setattr(Evaluator, "run", failing)
        script(name, *flags)
    done = done_in(run)
    assert (done["offline"], done["online"]) == (10, 12 if name == "awr" else 8)
    written = leaf(run, "['ring'].written").tolist()
    assert written == [8]
    outcome = script(name, *flags)
    assert (outcome.status, outcome.err) == (0, "")
    assert done_in(run)["online"] == 24
    assert str(done["online"]) in [row["step"] for row in rows_of(run / "evaluations.csv") if row["phase"] == "online"]


@pytest.mark.parametrize(
    ("name", "online", "kept"),
    [
        ("iql", False, 0),
        ("iql", True, 10 + 8),
        pytest.param("emaq", False, 0, marks=pytest.mark.slow),
        pytest.param("emaq", True, 10 + 8, marks=pytest.mark.slow),
    ],
)
def test_a_member_stays_as_it_was_before_the_stretch_that_broke_it(
    tmp_path: Path,
    small_run: list[str],
    script: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    online: bool,
    kept: int,
) -> None:
    """In the first stretch offline, of 8 updates, or at the tenth of 24 online steps, in the second one; for good."""

    def break_once(state: Any, hp: Any, data: Replay, num_updates: Any, args: Any, **_: Any) -> tuple[Any, Metrics]:
        now = data.ring.written[data.member] == 10 if data.ring is not None else num_updates == 8
        broken = now & (hp.discount == 0.5) & (online == (data.ring is not None))
        new = jax.tree.map(lambda x: jnp.where(broken, jnp.nan, x) if x.dtype == np.float32 else x, state)
        ones = {"loss": jnp.float32(1.0)}, {"loss": jnp.int32(1)}
        return new._replace(step=state.step + num_updates), Metrics(*ones)

    module, run = importlib.import_module(f"algorithms.{name}"), tmp_path / "run"
    monkeypatch.setattr(module, "train", break_once)
    flags = [*small_run, *smaller(name), *LENGTHS, "--grid", "discount=0.5,0.75", "--run-dir", run]
    outcome = script(name, *flags)
    assert outcome.status == 0 and outcome.err.count("diverged") == 1 and f"as it was at {kept}" in outcome.err
    assert done_in(run) | {"pretraining": 0} == {"pretraining": 0, "offline": 10, "online": 24}
    arrays = arrays_of(run)
    steps = leaf(run, ".step").tolist()
    assert steps == [kept, 10 + 24]
    assert all(np.isfinite(array).all() for key, array in arrays.items() if key.startswith("['state']"))


@pytest.mark.parametrize(
    ("name", "more"),
    [("iql", []), pytest.param("emaq", [], marks=pytest.mark.slow), ("emaq", ["--steps-per-iteration", "5"])],
)
def test_from_scratch_the_first_steps_are_uniform_and_without_updates(
    tmp_path: Path,
    small_run: list[str],
    script: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    more: list[str],
) -> None:
    """Seven of twelve: the policies draw from 0.45 on. Each later step has its update, also where rounds cut them."""
    stand_in(monkeypatch, name)
    run = tmp_path / "run"
    flags = [*small_run, *smaller(name), *more, "--num-updates", "0", "--online-steps", "12", "--random-steps", "7"]
    outcome = script(name, *flags, "--eval-every", "0", "--max-episode-steps", str(LIMIT), "--run-dir", run)
    assert (outcome.status, outcome.err) == (0, "")
    steps = leaf(run, ".step").tolist()
    actions = leaf(run, "['ring'].data.actions")[0]
    assert steps == [12 - 7]
    assert -1 <= actions[:7].min() < -0.5 and 0.9 < actions[:7].max() <= 1 and (actions[:7] < 0.45).sum() > 10
    assert actions[7:].min() >= 0.45 and actions[7:].max() <= 0.9 and len(np.unique(actions)) == 36


def test_iterations_of_awr_have_their_share_of_updates_and_a_ring_of_the_given_size(
    tmp_path: Path, small_run: list[str], script: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 12, 12 and 6 steps in two environments, with 5, 5 and half as many updates, rounded up."""
    run = tmp_path / "run"
    monkeypatch.setattr(importlib.import_module("algorithms.awr"), "train", count_rows)
    monkeypatch.setattr(runs, "LOG_EVERY", 1)
    flags = [*small_run, *smaller("awr"), "--num-updates", "0", "--online-steps", "30", "--buffer-size", "20"]
    flags += ["--eval-every", "0", "--max-episode-steps", str(LIMIT), "--run-dir", run]
    outcome = script("awr", *flags)
    assert (outcome.status, outcome.err) == (0, "")
    assert [row["step"] for row in rows_of(run / "metrics.csv")] == ["12", "24", "30"]
    steps = leaf(run, ".step").tolist()
    written, rewards = leaf(run, "['ring'].written").tolist(), leaf(run, "['ring'].data.rewards")
    assert (steps, written) == ([5 + 5 + 3], [24]), "15 steps of each are three episodes of 4, and 3 steps"
    assert rewards.shape == (1, 20) and rewards.all()
