"""What every algorithm's script must do alike: the same anatomy, traced hyperparameters, both phases, resuming."""

import ast
import importlib
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ACTION_DIM, OBS_DIM, ROOT, SMALLER, arrays_of, assert_same_arrays, hopper_like, smaller

from common import buffers, experiment, flags
from common.buffers import Replay, Transitions

NAMES = sorted(path.stem for path in (ROOT / "algorithms").glob("[a-z]*.py"))
every_algorithm = pytest.mark.parametrize("name", NAMES)
every_actor_critic = pytest.mark.parametrize("name", [name for name in NAMES if name != "awr"])
"""Those that draw a transition and update at once; AWR regresses on returns of whole trajectories."""
SECTIONS = ["Hyperparameters", "Args", "PRESETS", "State", "ADAM", "modules", "init", "update", "act", "train", "main"]
OTHER_NAMES = {"optimizer": "ADAM", "update_value": "update", "update_actor": None}
"""AWR has two optimisers to choose from, and updates in two phases."""


def load(name: str) -> Any:
    return importlib.import_module(f"algorithms.{name}")


def small_args(script: Any, **changes: Any) -> Any:
    own = SMALLER.get(script.__name__.removeprefix("algorithms."), {})
    return script.Args(hidden_dim=8, num_layers=1, batch_size=16, **own).replace(**changes)


def data() -> Transitions:
    arrays = hopper_like()
    return Transitions(*(jnp.asarray(arrays[name], jnp.float32) for name in Transitions._fields))


@every_algorithm
def test_sections_come_in_the_same_order(name: str) -> None:
    tree = ast.parse((ROOT / "algorithms" / f"{name}.py").read_text())
    found = []
    for node in tree.body:
        names = [target.id for target in node.targets] if isinstance(node, ast.Assign) else [getattr(node, "name", "")]
        names = [OTHER_NAMES.get(one, one) for one in names]
        found += [one for one in names if one in SECTIONS]
    assert found == SECTIONS
    imports = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert not any(module.startswith(("algorithms", "benchmarks")) for module in imports)


@every_algorithm
def test_every_setting_says_where_it_comes_from(name: str) -> None:
    tree = ast.parse((ROOT / "algorithms" / f"{name}.py").read_text())
    for owner in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        if owner.name not in ("Hyperparameters", "Args"):
            continue
        for field, text in zip(owner.body, owner.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and field.target.id != "hp":
                assert isinstance(text, ast.Expr) and "(" in text.value.value, f"{field.target.id} has no source"


@every_algorithm
def test_presets_are_valid_settings(name: str) -> None:
    script = load(name)
    fields = {*script.Hyperparameters._fields, *script.Args.__dataclass_fields__}
    assert {"locomotion", "antmaze", "adroit"} <= set(script.PRESETS)
    for preset, settings in script.PRESETS.items():
        assert set(settings) <= fields
        args = flags.parse(script.Args, script.PRESETS, ["--preset", preset])
        args.validate()
        chosen = {key: getattr(args.hp if key in args.hp._fields else args, key) for key in settings}
        assert chosen == settings


@every_algorithm
def test_hyperparameters_are_traced_and_members_keep_their_own(name: str) -> None:
    """One compiled program serves every value, and a mapped member is that member alone."""
    script = load(name)
    args = small_args(script)
    replay = Replay(data())

    def three_updates(key: jax.Array, hp: Any) -> Any:
        state = script.init(key, hp, args, OBS_DIM, ACTION_DIM)
        return script.train(state, hp, replay, 3, args)

    plain = args.hp
    other = plain._replace(**{name: 0.9 * value if value else 0.05 for name, value in plain._asdict().items()})
    run = jax.jit(three_updates)
    keys = jax.random.split(jax.random.key(0), 2)
    alone = [run(key, jax.tree.map(jnp.float32, hp)) for key, hp in zip(keys, (plain, other), strict=True)]
    assert run._cache_size() == 1
    stacked = jax.tree.map(lambda *x: jnp.array(x, jnp.float32), plain, other)
    both = jax.jit(jax.vmap(three_updates))(keys, stacked)
    for i, one in enumerate(alone):
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(both), strict=True):
            if not jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
                np.testing.assert_allclose(a, b[i], rtol=2e-3, atol=2e-5)


@every_actor_critic
@pytest.mark.parametrize("num_critics", [1, 5])
def test_any_number_of_critics(name: str, num_critics: int) -> None:
    script = load(name)
    args = small_args(script, num_critics=num_critics)
    state = script.init(jax.random.key(0), args.hp, args, OBS_DIM, ACTION_DIM)
    leading = {leaf.shape[0] for leaf in jax.tree.leaves(state.critic)}
    assert leading == {num_critics}
    after, metrics = jax.jit(partial(script.train, args=args))(state, args.hp, Replay(data()), 2)
    assert all(np.isfinite(total) for total in metrics.sums.values())
    moved = jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), state.critic, after.critic))
    assert all(moved)


@every_actor_critic
def test_terminations_cut_the_bootstrap_and_truncations_do_not(name: str) -> None:
    """At a termination s' is without effect on the critic; at a truncation it is not."""
    script = load(name)
    args = small_args(script)
    state = script.init(jax.random.key(0), args.hp, args, OBS_DIM, ACTION_DIM)
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
    state = script.init(jax.random.key(0), args.hp, args, OBS_DIM, ACTION_DIM)
    observations = 100.0 * jax.random.normal(jax.random.key(1), (50, OBS_DIM))
    act = partial(script.act, state, args.hp, observations, args=args, action_dim=ACTION_DIM)
    still, noisy = act(jax.random.key(2), sample=False), act(jax.random.key(2), sample=True)
    if name != "emaq":  # its policy is the best of some proposals, drawn with the key
        np.testing.assert_array_equal(still, act(jax.random.key(3), sample=False))
    assert still.shape == noisy.shape == (50, ACTION_DIM)
    assert float(jnp.abs(still).max()) <= 1.0
    if name != "awr":  # it regresses on its Gaussian's samples as drawn; the environment clips them
        assert float(jnp.abs(noisy).max()) <= 1.0
    assert float(jnp.abs(noisy - act(jax.random.key(3), sample=True)).max()) > 0.01


@every_actor_critic
def test_interrupted_offline_and_resumed_with_an_online_phase_equals_training_through(
    tmp_path: Path, small_run: list[str], script: Callable[..., Any], name: str
) -> None:
    """Both phases, a population, a grid, an interruption in the offline phase; to the last bit."""
    one = load(name).Hyperparameters._fields[0]
    value = getattr(load(name).Hyperparameters(), one)
    run = [*small_run, "--num-updates", "20", "--grid", f"{one}={value},{0.5 * value}", "--reward-scale", "0.5"]
    if name == "iql":
        run += ["--actor-decay-updates", "0"]
    run += smaller(name)
    through, later = tmp_path / "through", tmp_path / "later"
    outcome = script(name, *run, "--online-steps", "12", "--run-dir", through)
    assert outcome.status == 0, outcome.err
    evaluated = [line.split(",")[:3] for line in (through / "evaluations.csv").read_text().splitlines()[1:]]
    assert evaluated == [
        [phase, step, m] for phase, step in (("offline", "0"), ("online", "0"), ("online", "12")) for m in "01"
    ]

    original = experiment.Run.train

    def interrupted(self: Any, state: Any, count: int) -> Any:
        result = original(self, state, count)
        signal.raise_signal(signal.SIGTERM)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment.Run, "train", interrupted)
        assert script(name, *run, "--checkpoint-every", "10", "--run-dir", later).status == 143
    assert script(name, *run, "--online-steps", "12", "--run-dir", later, "--resume", "True").status == 0
    assert_same_arrays(through, later)
    rewards = next(array for key, array in arrays_of(through).items() if "'ring'" in key and key.endswith(".rewards"))
    assert rewards.shape == (2, 12) and (np.abs(rewards) < 2).all(), "half of Hopper's 1 a step and its speed"


@every_actor_critic
def test_online_updates_draw_from_the_dataset_and_the_ring(name: str) -> None:
    """Rewards of 100 in a ring as long as the dataset: half of a batch has them, and the loss says so."""
    script = load(name)
    args = small_args(script, batch_size=256)
    state = script.init(jax.random.key(0), args.hp, args, OBS_DIM, ACTION_DIM)
    few = jax.tree.map(lambda x: x[:64], data())
    ring = buffers.insert(buffers.empty_ring(64, OBS_DIM, ACTION_DIM), few._replace(rewards=few.rewards + 100.0))
    metrics = jax.jit(partial(script.train, args=args))(state, args.hp, Replay(few, ring), 1)[1]
    loss = float(metrics.means["critic/loss"]) / args.num_critics
    assert 3500 < loss < 6500, "about half of 100^2"
