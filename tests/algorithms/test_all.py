"""What every algorithm must do alike: the same anatomy, traced hyperparameters, both phases, resuming, divergence."""

import ast
import importlib
import itertools
import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    ACTION_DIM,
    OBS_DIM,
    ROOT,
    SMALLER,
    arrays_of,
    assert_same_arrays,
    done_in,
    hopper_like,
    means,
    rows_of,
    signalled_after,
    smaller,
)

from common import cli, replay
from common.environments import evaluation_seed
from common.members import Members
from common.replay import Replay, Transitions
from common.report import load_policy
from common.runs import Run

NAMES = sorted(path.stem for path in (ROOT / "algorithms").glob("[a-z]*.py"))
ALIKE = ["awac", "cql", "td3_bc"]
"""Their `main` is that of IQL, as a test says: their whole runs are slow; EMaQ has its own in test_emaq_runs."""
every_algorithm = pytest.mark.parametrize("name", NAMES)
every_run = pytest.mark.parametrize(
    "name", [name if name == "iql" else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
ACTOR_CRITICS = [name for name in NAMES if name != "awr"]
OWN_MASK_TESTS = {"awac", "cql", "emaq", "iql", "td3_bc"}
every_actor_critic = pytest.mark.parametrize("name", ACTOR_CRITICS)
"""Those that draw a transition and update at once; AWR regresses on returns of whole trajectories."""
SECTIONS = ["Hyperparameters", "Args", "PRESETS", "State", "ADAM", "modules", "init", "update", "act", "train", "main"]
OTHER_NAMES = {"optimizer": "ADAM", "update_value": "update", "update_actor": None}
"""AWR has two optimisers to choose from, and updates in two phases."""
LONGEST_MAIN = 90
SOURCES = "papers?|code|authors?|scripts?|ours|CORL|JaxCQL|CleanRL|BRAC|FQL|BCQ|SAC|appendix|section|tables?"


def load(name: str) -> Any:
    return importlib.import_module(f"algorithms.{name}")


def small_args(script: Any, **changes: Any) -> Any:
    own = SMALLER.get(script.__name__.removeprefix("algorithms."), {})
    return replace(script.Args(hidden_dim=8, num_layers=1, batch_size=16, **own), **changes)


@cache
def initial(name: str, num_critics: int | None) -> Callable[..., Any]:
    """One compiled start for the tests of an algorithm."""
    script = load(name)
    args = small_args(script, **({} if num_critics is None else {"num_critics": num_critics}))
    return jax.jit(lambda key, hp: script.init(key, hp, args, OBS_DIM, ACTION_DIM))


def start(name: str, num_critics: int | None = None, seed: int = 0, hp: Any = None) -> Any:
    hp = load(name).Hyperparameters() if hp is None else hp
    return initial(name, num_critics)(jax.random.key(seed), jax.tree.map(jnp.float32, hp))


def data() -> Transitions:
    arrays = hopper_like()
    return Transitions(*(jnp.asarray(arrays[name], jnp.float32) for name in Transitions._fields))


@every_algorithm
def test_sections_come_in_the_same_order(name: str) -> None:
    tree = ast.parse((ROOT / "algorithms" / f"{name}.py").read_text())
    found = []
    for node in tree.body:
        targets = [*getattr(node, "targets", []), getattr(node, "target", None)]  # of `x = ...` and of `x: type = ...`
        names = [getattr(node, "name", ""), *(target.id for target in targets if target)]
        names = [OTHER_NAMES.get(one, one) for one in names]
        found += [one for one in names if one in SECTIONS]
    assert found == SECTIONS
    imports = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imports |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    packages = {module.partition(".")[0] for module in imports}
    assert "common" in packages and not packages & {"algorithms", "benchmarks", *NAMES}


@every_algorithm
def test_main_is_short_and_shows_the_loop(name: str) -> None:
    tree = ast.parse((ROOT / "algorithms" / f"{name}.py").read_text())
    (main,) = (node for node in tree.body if getattr(node, "name", "") == "main")
    assert main.end_lineno - main.lineno + 1 <= LONGEST_MAIN
    loops = [ast.unparse(node.iter) for node in ast.walk(main) if isinstance(node, ast.For)]
    for phase in ("offline", "online"):
        assert sum(loop.startswith(f"run.chunks('{phase}', args.") for loop in loops) == 1


@pytest.mark.parametrize("name", ALIKE)
def test_the_loop_is_that_of_iql(name: str) -> None:
    """But for what IQL says of its cosine, and CQL of its hours: what whole runs of IQL show holds for these."""

    def loop(of: str) -> str:
        text = (ROOT / "algorithms" / f"{of}.py").read_text()
        lines = text[text.index("def main(") :].replace(f'"{of}"', '"name"').splitlines()
        return "\n".join(line for line in lines if line.strip() and "print_estimate(" not in line)

    cosine = re.compile(
        r"^        planned = run\.before.+\n        if args\.actor_decay_updates.+\n +print\(.+\n", re.MULTILINE
    )
    iql, found = cosine.subn("", loop("iql"))
    assert found == 1 and loop(name) == iql


@every_algorithm
def test_every_setting_says_where_it_comes_from(name: str) -> None:
    """In the comment behind it, or in the lines of comments above it."""
    source = (ROOT / "algorithms" / f"{name}.py").read_text()
    lines, count = source.splitlines(), 0
    for owner in (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)):
        for field in owner.body if owner.name in ("Hyperparameters", "Args") else []:
            if isinstance(field, ast.AnnAssign) and field.target.id != "hp":
                above = itertools.takewhile(lambda line: line.strip().startswith("#"), lines[field.lineno - 2 :: -1])
                behind = lines[field.end_lineno - 1][field.end_col_offset :]
                comment = behind + " ".join(above)
                sources = re.findall(rf"\((?:[^()]*\W)?(?:{SOURCES})\W", comment)
                assert sources, f"{field.target.id} has no source: {comment}"
                count += 1
    assert count > 7


@every_algorithm
def test_presets_are_valid_settings(name: str) -> None:
    script = load(name)
    fields = {*script.Hyperparameters._fields, *script.Args.__dataclass_fields__}
    assert {"locomotion", "antmaze", "adroit"} <= set(script.PRESETS)
    for preset, settings in script.PRESETS.items():
        assert set(settings) <= fields
        args = cli.parse(script.Args, script.PRESETS, ["--preset", preset])
        chosen = {key: getattr(args.hp if key in args.hp._fields else args, key) for key in settings}
        assert chosen == settings


@pytest.mark.parametrize(
    "name", [name if name == "awr" else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)  # of IQL test_members shows it too
def test_hyperparameters_are_traced_and_members_keep_their_own(name: str) -> None:
    """One compiled program serves every value, and a mapped member is that member alone."""
    script = load(name)
    args = small_args(script)
    plain = args.hp
    other = plain._replace(**{name: 0.9 * value if value else 0.05 for name, value in plain._asdict().items()})
    hps = [jax.tree.map(jnp.float32, hp) for hp in (plain, other)]
    states = [start(name, seed=seed, hp=hp) for seed, hp in enumerate(hps)]

    def three_updates(state: Any, hp: Any) -> Any:
        return script.train(state, hp, Replay(data()), 3, args)

    run = jax.jit(three_updates)
    alone = [run(state, hp) for state, hp in zip(states, hps, strict=True)]
    assert run._cache_size() == 1
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *zip(states, hps, strict=True))
    both = jax.jit(jax.vmap(three_updates))(*stacked)
    for i, one in enumerate(alone):
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(both), strict=True):
            if not jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
                np.testing.assert_allclose(a, b[i], rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize(  # in the default run of what has no such test of its own, as the five have
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in OWN_MASK_TESTS)) for name in ACTOR_CRITICS]
)
def test_terminations_cut_the_bootstrap_and_truncations_do_not(name: str) -> None:
    """At a termination s' is without effect on the critic; at a truncation it is not."""
    script = load(name)
    args = small_args(script)
    state = start(name)
    batch = jax.tree.map(lambda x: x[:32], data())
    ones, zeros = jnp.ones(32), jnp.zeros(32)
    update = jax.jit(partial(script.update, args=args))

    def critic_after(terminations: jax.Array, truncations: jax.Array, shift: float) -> np.ndarray:
        changed = batch._replace(
            terminations=terminations, truncations=truncations, next_observations=batch.next_observations + shift
        )
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(update(state, changed, args.hp)[0].critic)])

    same = critic_after(ones, zeros, 0.0), critic_after(ones, zeros, 1.0)
    moved = critic_after(zeros, ones, 0.0), critic_after(zeros, ones, 1.0)
    if name != "cql":  # its penalty draws actions of the policy at s' even where the episode has ended
        np.testing.assert_array_equal(*same)
    assert np.abs(moved[0] - moved[1]).max() > 1e-5
    # A truncated step is one like any other.
    np.testing.assert_array_equal(moved[0], critic_after(zeros, zeros, 0.0))


@every_algorithm
def test_actions_stay_in_their_bounds(name: str) -> None:
    script = load(name)
    args = small_args(script)
    state = start(name)
    observations = 100.0 * jax.random.normal(jax.random.key(1), (50, OBS_DIM))
    compiled = jax.jit(partial(script.act, args=args, action_dim=ACTION_DIM), static_argnames="sample")
    act = partial(compiled, state, args.hp, observations)
    still, noisy = act(jax.random.key(2), sample=False), act(jax.random.key(2), sample=True)
    if name != "emaq":  # its policy is the best of some proposals, drawn with the key
        np.testing.assert_array_equal(still, act(jax.random.key(3), sample=False))
    assert still.shape == noisy.shape == (50, ACTION_DIM)
    assert float(jnp.abs(still).max()) <= 1.0
    if name != "awr":  # it regresses on its Gaussian's samples as drawn; the environment clips them
        assert float(jnp.abs(noisy).max()) <= 1.0
    assert float(jnp.abs(noisy - act(jax.random.key(3), sample=True)).max()) > 0.01


@every_actor_critic
def test_layer_normalisation_is_in_the_critics_alone(name: str) -> None:
    script = load(name)
    args = small_args(script, layer_norm=True)
    state = jax.eval_shape(lambda key: script.init(key, args.hp, args, OBS_DIM, ACTION_DIM), jax.random.key(0))
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    having = {path.split("[")[0] for path in names if "LayerNorm" in path and "_opt" not in path}
    assert having == {".critic", ".target_critic"} | ({".value"} if name == "iql" else set())
    assert script.PRESETS["ogbench"]["layer_norm"] is True and script.Args().layer_norm is False


@pytest.mark.parametrize(
    "name",
    [name if name == "iql" else pytest.param(name, marks=pytest.mark.slow) for name in ACTOR_CRITICS],
)
@pytest.mark.parametrize("num_critics", [pytest.param(1, marks=pytest.mark.slow), 5])
def test_any_number_of_critics_learns_online_from_the_dataset_and_the_ring(name: str, num_critics: int) -> None:
    """Rewards of 100 in a ring as long as the dataset: half of a batch has them, and the loss says so."""
    script = load(name)
    args = small_args(script, batch_size=256, num_critics=num_critics)
    state = start(name, num_critics)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(state.critic)} == {num_critics}
    few = jax.tree.map(lambda x: x[:64], data())
    ring = replay.insert(replay.empty_ring(64, OBS_DIM, ACTION_DIM), few._replace(rewards=few.rewards + 100.0))
    after, metrics = jax.jit(partial(script.train, args=args))(state, args.hp, Replay(few, ring), 1)
    assert all(np.isfinite(total) for total in metrics.sums.values())
    assert all(
        jax.tree.leaves(jax.tree.map(lambda a, b: np.any(np.asarray(a) != np.asarray(b)), state.critic, after.critic))
    )
    loss = float(means(metrics)["critic/loss"]) / num_critics
    assert 3500 < loss < 6500, "about half of 100^2"


# Whole runs


def small_flags(name: str, small_run: list[str], **changes: object) -> list[str]:
    """Flags of the smallest run of this algorithm."""
    words = [*small_run, *smaller(name)]
    return words + [str(word) for flag, value in changes.items() for word in (f"--{flag.replace('_', '-')}", value)]


@pytest.fixture
def both_phases(small_run: list[str], name: str) -> list[str]:
    """A population, a grid, transforms: everything but the lengths."""
    one = load(name).Hyperparameters._fields[0]
    value = getattr(load(name).Hyperparameters(), one)
    flags = small_flags(name, small_run, grid=f"{one}={value},{0.5 * value}", reward_scale=0.5, checkpoint_every=5)
    flags += ["--normalize-observations", "True"]
    return flags + ([] if name == "emaq" else ["--final-eval-episodes", "3"])  # it draws for all its rows at once


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs in one piece are; the first test that needs one makes it."""
    return tmp_path_factory.mktemp("through")


@pytest.fixture
def through(finished: Path, both_phases: list[str], script: Callable[..., Any], name: str) -> Path:
    """A run in one piece."""
    run = finished / name
    if not run.exists():
        outcome = script(name, *both_phases, "--num-updates", "20", "--online-steps", "12", "--run-dir", run)
        assert outcome.status == 0, outcome.err
    return run


@every_run
def test_extended_interrupted_and_resumed_equals_training_through(
    tmp_path: Path, both_phases: list[str], through: Path, script: Callable[..., Any], name: str
) -> None:
    """To the last bit what a run in one piece is."""
    evaluated = [(row["phase"], row["step"], row["member"]) for row in rows_of(through / "evaluations.csv")]
    assert evaluated[:4] == [(phase, "0", m) for phase in ("offline", "online") for m in "01"]
    assert len(evaluated) == 6 and int(evaluated[-1][1]) == done_in(through)["online"] >= 12

    later = tmp_path / "later"
    resume = [*both_phases, "--run-dir", later, "--resume", "True"]
    assert script(name, *resume, "--num-updates", "10").status == 0
    with signalled_after(1):
        assert script(name, *resume, "--num-updates", "20").status == 143
    assert done_in(later)["offline"] == 15
    outcome = script(name, *resume, "--num-updates", "20", "--online-steps", "12")
    assert outcome.status == 0, outcome.err
    assert_same_arrays(through, later)
    ring = {key.rpartition(".")[2]: array for key, array in arrays_of(through).items() if "'ring'" in key}
    written = ring["written"].tolist()
    assert written == [12, 12] if name != "awr" else min(written) > 0
    assert all((np.abs(ring["rewards"][i, :rows]) < 2).all() for i, rows in enumerate(written)), "1 a step, halved"


@every_run
def test_online_from_scratch_with_random_first_steps_and_resumed(
    tmp_path: Path, small_run: list[str], script: Callable[..., Any], name: str
) -> None:
    """No dataset is read: the one named does not exist."""
    run = tmp_path / "run"
    flags = small_flags(name, small_run, num_updates=0, eval_every=0, checkpoint_every=8, run_dir=run)
    flags += [] if name == "awr" else ["--random-steps", "12"]
    flags[flags.index("--dataset") + 1] = "no/such/set-v0"
    steps = 120 if name == "awr" else 24  # the first iteration of AWR goes on until there is a whole episode
    flags += ["--online-steps", str(steps), "--resume", "True"]
    with signalled_after(1):
        assert script(name, *flags).status == 143
    first = done_in(run)["online"]
    assert 0 < first < steps
    outcome = script(name, *flags)
    assert outcome.status == 0, outcome.err
    done = done_in(run)["online"]
    arrays = arrays_of(run)
    ring = {key.rpartition(".")[2]: array for key, array in arrays.items() if "'ring'" in key}
    (step,) = (array for key, array in arrays.items() if key.endswith(".step"))
    assert [int(row["step"]) for row in rows_of(run / "evaluations.csv")] == [done]
    if name == "awr":  # it collects with its policy from the first step, and keeps whole episodes
        assert ring["written"][0] > 0
        return
    assert (ring["written"].tolist(), done, step.tolist()) == ([24], 24, [12])
    rows = ring["observations"][0]
    assert rows.any(axis=1).all() and len(np.unique(rows, axis=0)) == 24
    warm_up = ring["actions"][0, :12]
    assert len(np.unique(warm_up)) == 36 and np.abs(warm_up).max() < 1 and 0.4 < warm_up.std() < 0.75, "uniform"
    follows = (rows[1:] == ring["next_observations"][0, :-1]).all(axis=1)
    ended = (ring["terminations"][0] + ring["truncations"][0]) > 0
    assert np.flatnonzero(follows == ended[:-1]).tolist() == [7], "environments start anew after a resume"


def learning_rate(name: str) -> str:
    return "value_learning_rate" if name == "awr" else "critic_learning_rate"


@every_run
def test_the_loaded_policy_repeats_the_returns_of_the_last_evaluation(through: Path, name: str) -> None:
    """In a plain loop, to the last digit of the table; a member of a population, its transforms inside."""
    policies = [load_policy(through, member) for member in (0, 1)]
    for row in rows_of(through / "returns.csv"):
        env, policy = gym.make("Hopper-v5"), policies[int(row["member"])]
        observation, _ = env.reset(seed=evaluation_seed(int(row["seed"]), int(row["episode"])))
        total, over = 0.0, False
        while not over:
            observation, reward, terminated, truncated, _ = env.step(policy(observation))
            total, over = total + float(reward), terminated or truncated
        assert f"{total:.7g}" == row["return"]
    batch = np.zeros((5, 11))
    still, noisy = policy(batch), load_policy(through, 1, sample=True)
    assert still.shape == (5, 3) and np.abs(still).max() <= 1
    assert name == "td3_bc" or (noisy(batch) != noisy(batch)).any()
    assert max(np.abs(noisy(batch)).max() for _ in range(50)) <= 1, "within the environment's bounds"


@pytest.mark.slow
@every_run
def test_a_diverged_member_is_frozen_and_named_and_the_others_go_on(
    tmp_path: Path, small_run: list[str], script: Callable[..., Any], name: str
) -> None:
    """In both phases the others are, to the last bit, what they are where nothing diverges.

    But for AWR's online phase, whose first iteration goes on until every member has a whole episode.
    """
    rate, online = learning_rate(name), 0 if name == "awr" else 12
    run = small_flags(name, small_run, num_updates=20, online_steps=online, checkpoint_every=5)
    mixed, tame = tmp_path / "mixed", tmp_path / "tame"
    outcome = script(name, *run, "--grid", f"{rate}=3e-4,1e30,1e-4", "--run-dir", mixed)
    assert outcome.status == 0, outcome.err
    named = [line for line in outcome.err.splitlines() if "diverged" in line]
    assert len(named) == 1 and f"member 1 (seed 0, {rate}=1e+30)" in named[0]
    assert script(name, *run, "--grid", f"{rate}=3e-4,2e-4,1e-4", "--run-dir", tame).status == 0
    final = json.loads((mixed / "final.json").read_text())
    assert [member["diverged"] is None for member in final["members"]] == [True, False, True]
    assert final["members"][1]["return_mean"] is None and final["aggregate"]["return"]["count"] == 2
    assert final["members"][1]["diverged"]["step"] <= 10
    ours, theirs = arrays_of(mixed), arrays_of(tame)
    for key in ours:
        assert key.startswith("['ring']") or np.isfinite(ours[key].astype(np.float64)).all(), key
        for member in (0, 2):
            assert ours[key][member].tobytes() == theirs[key][member].tobytes(), key
    step = next(array for key, array in ours.items() if key.endswith(".step"))
    assert step[1] < step[0] == step[2]
    for table in ("metrics.csv", "evaluations.csv"):
        rows = [[row for row in rows_of(directory / table) if row["member"] != "1"] for directory in (mixed, tame)]
        assert rows[0] == rows[1] and len(rows[0]) >= 4


@every_run
def test_status_3_where_every_member_diverged(
    tmp_path: Path, small_run: list[str], script: Callable[..., Any], name: str
) -> None:
    """By the first update, whose losses are those before it: a parameter that it breaks shows in no metric of IQL's."""
    run = tmp_path / "run"
    rate = f"--{learning_rate(name).replace('_', '-')}"
    flags = small_flags(name, small_run, num_updates=1, num_seeds=2, run_dir=run)
    outcome = script(name, *flags, rate, "1e39")
    assert outcome.status == 3 and "every member diverged" in outcome.err and "Traceback" not in outcome.err
    final = json.loads((run / "final.json").read_text())
    assert all(member["diverged"] and member["score_mean"] is None for member in final["members"])
    assert final["aggregate"]["score"] == {"iqm": None, "ci_low": None, "ci_high": None, "count": 0}


@pytest.mark.slow
@every_run
def test_a_member_does_not_depend_on_the_rest_of_the_population(
    tmp_path: Path, small_run: list[str], script: Callable[..., Any], name: str
) -> None:
    """Trained by a process of its own it is the same to the last bit; alone, up to the order of sums."""
    run = small_flags(name, small_run, num_updates=20, eval_every=10)
    together, part, alone = tmp_path / "together", tmp_path / "parts" / "part-1", tmp_path / "alone"
    assert script(name, *run, "--num-seeds", "3", "--run-dir", together).status == 0
    shard = ["--num-seeds", "3", "--shard", "1/3", "--run-dir", part.parent]
    assert script(name, *run, *shard).status == 0
    assert script(name, *run, "--seed", "1", "--run-dir", alone).status == 0
    whole, own, single = arrays_of(together), arrays_of(part), arrays_of(alone)
    for key in whole:
        if name == "awr":  # its sums over the whole dataset are compiled to another order
            np.testing.assert_allclose(own[key], whole[key][1:2], rtol=1e-4, atol=1e-6, err_msg=key)
        else:
            assert own[key].tobytes() == whole[key][1:2].tobytes(), key
        np.testing.assert_allclose(single[key][0], whole[key][1], rtol=1e-3, atol=1e-5, err_msg=key)
        if key.endswith("['kernel']") and ".actor[" in key:
            assert np.abs(whole[key][0] - whole[key][1]).max() > 1e-3, "seeds differ"
    for table in ("metrics.csv", "evaluations.csv") if name != "awr" else ():
        assert rows_of(part / table) == [row for row in rows_of(together / table) if row["member"] == "1"]


@pytest.mark.slow
@every_algorithm
def test_a_run_in_double_precision(tmp_path: Path, small_run: list[str], spawn: Callable[..., Any], name: str) -> None:
    """Under JAX_ENABLE_X64, which users have for other parts of their work: both phases, in a process of its own."""
    run = tmp_path / "run"
    flags = small_flags(name, small_run, num_updates=10, online_steps=6, num_seeds=2, run_dir=run)
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_ENABLE_X64": "1"}
    process = spawn(ROOT / "algorithms" / f"{name}.py", *flags, env=env)
    _, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    assert done_in(run)["offline"] == 10 and done_in(run)["online"] >= 6
    assert json.loads((run / "final.json").read_text())["aggregate"]["return"]["count"] == 2


@pytest.mark.parametrize(
    ("name", "flags", "done", "hours"),
    [
        ("emaq", [], 0, (180, 400)),  # results/emaq-speed: 0.7162 s/update, 199 hours of a million
        ("emaq", ["--num-updates", "20"], 0, (1.5, 6)),  # of the behaviour model
        ("emaq", ["--num-updates", "20"], 20, None),
        ("emaq", ["--preset", "cpu", "--num-updates", "100000"], 0, None),
        ("cql", [], 0, (15, 80)),
        ("cql", ["--online-steps", "10"], 800_000, (3, 16)),
        ("cql", ["--num-updates", "10000"], 0, None),
        ("cql", ["--quiet", "True"], 0, None),
    ],
)
def test_hours_without_an_accelerator_are_said_before_an_update(
    name: str, flags: list[str], done: int, hours: Any, tiny: Path, script: Any, monkeypatch: Any
) -> None:
    def restore(run: Run, trees: Any, *_: Any) -> Any:
        run.done |= {"offline": done, "pretraining": 10**6 if done else 0}
        return trees

    def stop(*_: Any) -> None:
        raise cli.UsageError("compiling")

    monkeypatch.setattr(Members, "start", lambda *_: None)
    monkeypatch.setattr(Run, "restore", restore)
    monkeypatch.setattr(Run, "chunks", stop)
    preset = [] if "--preset" in flags else ["--preset", "locomotion"]
    outcome = script(name, "--dataset", tiny, "--env", "Hopper-v5", *preset, *flags)
    *said, last = outcome.err.splitlines()
    assert last == "error: compiling"
    assert len(said) == (hours is not None)
    if hours is not None:
        assert hours[0] < float(re.search(r"roughly (\d+) hours", said[0])[1]) < hours[1]
        cheaper = {"emaq": "--preset cpu", "cql": "--num-actions 4 --num-layers 2 --critic-layers 2"}[name]
        assert said[0].partition("; ")[2].startswith(cheaper)
