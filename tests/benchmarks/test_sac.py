"""SAC's losses against numpy, its masks and order of updates, and a short run that is stopped and continued."""

import csv
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import arrays_of, assert_refused, hopper_like

from algorithms.cql import squashed_sample
from benchmarks import offax_sets, sac, sac_prior
from common.cli import UsageError
from common.replay import Replay, Transitions
from common.report import load_policy

OBS, ACT, BATCH = 3, 2, 12
ARGS = sac.Args(hidden_dim=8, batch_size=BATCH)
update = jax.jit(sac.update, static_argnames="args")
start = jax.jit(partial(sac.init, args=ARGS, obs_dim=OBS, action_dim=ACT))


def random_batch() -> Transitions:
    rng = np.random.default_rng(0)
    flags = np.arange(BATCH) % 3
    return Transitions(
        observations=jnp.asarray(rng.standard_normal((BATCH, OBS), np.float32)),
        actions=jnp.asarray(rng.uniform(-1, 1, (BATCH, ACT)).astype(np.float32)),
        rewards=jnp.asarray(rng.standard_normal(BATCH, np.float32)),
        next_observations=jnp.asarray(rng.standard_normal((BATCH, OBS), np.float32)),
        terminations=jnp.asarray((flags == 1).astype(np.float32)),
        truncations=jnp.asarray((flags == 2).astype(np.float32)),
    )


def test_critic_loss_is_that_of_the_entropy_regularised_target() -> None:
    """The first update's critic loss, recomputed by hand from the same next actions."""
    state, batch = start(jax.random.key(0)), random_batch()
    state = state._replace(log_alpha=jnp.log(0.3))
    actor, critic = sac.modules(ARGS, ACT)
    next_key = jax.random.split(state.key, 3)[0]
    mean, log_std = jax.jit(actor.apply)(state.actor, batch.next_observations)
    next_actions, next_log_prob = jax.jit(squashed_sample)(next_key, mean, log_std)
    value = jax.jit(critic.apply)
    next_q = np.asarray(value(state.target_critic, batch.next_observations, next_actions)).min(axis=0)
    bootstrap = np.where(np.arange(BATCH) % 3 == 1, 0.0, 0.99 * (next_q - 0.3 * np.asarray(next_log_prob)))
    targets = np.asarray(batch.rewards) + bootstrap
    q = np.asarray(value(state.critic, batch.observations, batch.actions))
    expected = ((q[0] - targets) ** 2).mean() + ((q[1] - targets) ** 2).mean()
    assert float(update(state, batch, ARGS.hp, ARGS)[1]["critic/loss"]) == pytest.approx(expected, rel=1e-5)


def test_temperature_rises_below_the_target_entropy_and_falls_above() -> None:
    gradient = jax.grad(sac.alpha_loss)
    assert gradient(0.0, -5.0, -2.0) == pytest.approx(-3.0)  # too little entropy: descent raises log alpha
    assert gradient(0.0, 1.0, -2.0) == pytest.approx(3.0)


def test_actor_climbs_the_value_when_the_temperature_is_zero() -> None:
    log_prob, q = jnp.array([1.0, -2.0]), jnp.array([3.0, 5.0])
    assert sac.actor_loss(log_prob, q, jnp.zeros(()))[0] == -4.0
    assert sac.actor_loss(log_prob, q, jnp.array(0.5))[0] == pytest.approx(-4.25)


def test_target_moves_by_the_polyak_amount() -> None:
    state, batch = start(jax.random.key(0)), random_batch()
    after, _ = update(state, batch, ARGS.hp._replace(polyak=0.2), ARGS)
    expected = jax.tree.map(lambda old, new: 0.8 * old + 0.2 * new, state.target_critic, after.critic)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), after.target_critic, expected)


def test_exported_policy_is_the_actor() -> None:
    state, observations = start(jax.random.key(3)), random_batch().observations
    arrays = sac.export_policy(state.actor)
    layers = [(arrays[f"w{i}"], arrays[f"b{i}"]) for i in range(3)]
    mean, std = offax_sets.policy_outputs(layers, np.asarray(observations))
    expected_mean, expected_log_std = sac.modules(ARGS, ACT)[0].apply(state.actor, observations)
    np.testing.assert_allclose(mean, expected_mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.log(std), expected_log_std, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_run_leaves_snapshots_and_a_curve_and_goes_on_from_its_checkpoint(tmp_path) -> None:
    args = sac.Args(num_steps=400, num_envs=4, random_steps=100, report_every=200, checkpoint_every=200, hidden_dim=8,
                    updates_per_step=0.5, run_dir=str(tmp_path / "run"))  # fmt: skip
    sac.main(args)
    with open(tmp_path / "run" / "training.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["steps"]) for row in rows] == [200, 400]
    assert [int(row["updates"]) for row in rows] == [50, 150]
    assert len(list((tmp_path / "run" / "snapshots").glob("*.npz"))) == 2
    before = (tmp_path / "run" / "training.csv").read_text()
    (tmp_path / "run" / "snapshots.csv").write_text("steps,sampled\n400,1.0\n800,2.0\n")
    (tmp_path / "run" / "snapshots" / "000000800.npz").write_bytes(b"")  # of a run that was killed after it
    sac.main(args)  # the checkpoint is at 400: nothing is left to do
    assert len(list((tmp_path / "run" / "snapshots").glob("*.npz"))) == 2
    assert (tmp_path / "run" / "snapshots.csv").read_text() == "steps,sampled\n400,1.0\n"
    for name, value in (("env", "Walker2d-v5"), ("seed", 1), ("hp", args.hp._replace(discount=0.9))):
        with pytest.raises(UsageError, match=f"{name} .*another --run-dir"):
            sac.main(replace(args, **{name: value}))
    (tmp_path / "run" / "checkpoint.npz").unlink()
    with pytest.raises(UsageError, match="without a checkpoint"):
        sac.main(args)
    assert (tmp_path / "run" / "training.csv").read_text() == before
    assert len(list((tmp_path / "run" / "snapshots").glob("*.npz"))) == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_envs": 0}, "--num-envs 0"),
        ({"num_envs": 4, "updates_per_step": 0.2}, "--updates-per-step 0.2: .* whole number"),
        ({"updates_per_step": -1.0}, "--updates-per-step -1.0"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"hp": ARGS.hp._replace(discount=2.0)}, "--discount 2.0"),
        ({"hp": ARGS.hp._replace(actor_learning_rate=float("nan"))}, "--actor-learning-rate nan"),
        ({"seed": -1}, "--seed"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        replace(ARGS, **changes).validate()
    replace(ARGS, num_envs=4, updates_per_step=0.25).validate()


def test_with_prior_data_it_is_evaluated_by_the_mode_and_collects_samples() -> None:
    """The median of tanh(N(mean, std)) is tanh(mean)."""
    args, observations = sac_prior.Args(hidden_dim=8), random_batch().observations
    state = sac_prior.init(jax.random.key(3), args.hp, args, OBS, ACT)
    act = jax.jit(partial(sac_prior.act, args=args, action_dim=ACT), static_argnames="sample")
    mode = act(state, args.hp, observations, jax.random.key(0), sample=False)
    samples = jax.vmap(lambda key: act(state, args.hp, observations, key, sample=True))(
        jax.random.split(jax.random.key(1), 4000)
    )
    np.testing.assert_allclose(np.median(samples, axis=0), mode, atol=0.1)
    assert samples.std(axis=0).min() > 0.1


def test_prior_data_are_sampled_from_the_first_step_on(
    tmp_path: Path, script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without offline updates too; with --env and none, where other scripts read no data, it does not start."""
    data, drawn = tmp_path / "named.npz", []
    np.savez(data, **hopper_like(), env="Hopper-v5")
    monkeypatch.setattr(sac_prior, "Replay", lambda *parts: drawn.append(parts[0]) or Replay(*parts))
    flags = ["--dataset", data, "--num-updates", 0, "--online-steps", 3, "--random-steps", 1, "--hidden-dim", 8]
    flags += ["--final-eval-episodes", 1, "--eval-every", 0, "--run-dir", tmp_path / "run"]
    assert_refused(script("sac_prior", *flags, "--env", "Hopper-v5", package="benchmarks"), "leave out --env")
    assert script("sac_prior", *flags, package="benchmarks").status == 0
    assert [len(offline.rewards) for offline in drawn] == [400] * 3


@pytest.mark.parametrize(("updates", "uniform"), [(0, 7), (1, 0)])
def test_with_prior_data_the_first_steps_are_uniform_and_without_updates_if_there_were_none(
    tmp_path: Path, script: Any, monkeypatch: pytest.MonkeyPatch, updates: int, uniform: int
) -> None:
    """The policy acts by 0.5. Each later step has its update, as each has after updates offline."""
    np.savez(data := tmp_path / "named.npz", **hopper_like(), env="Hopper-v5")
    monkeypatch.setattr(sac_prior, "act", lambda state, hp, x, *_, **__: jnp.full((len(x), 3), 0.5))
    flags = ["--dataset", data, "--num-updates", updates, "--online-steps", 12, "--random-steps", 7, "--eval-every", 0]
    flags += ["--max-episode-steps", 5, "--final-eval-episodes", 1, "--hidden-dim", 8, "--batch-size", 16]
    flags += ["--preset", "none", "--quiet", "True", "--run-dir", tmp_path / "run"]
    outcome = script("sac_prior", *flags, package="benchmarks")
    assert (outcome.status, outcome.err) == (0, "")
    arrays = arrays_of(tmp_path / "run")
    (step,), (actions,) = ([x for name, x in arrays.items() if name.endswith(end)] for end in (".step", ".actions"))
    assert step.tolist() == [updates + 12 - uniform]
    drawn = actions[0, :uniform]
    assert len(np.unique(drawn)) == 3 * uniform and (np.abs(drawn) <= 1).all() and (actions[0, uniform:] == 0.5).all()
    assert not uniform or (drawn.min() < -0.5 and drawn.max() > 0.5)


@pytest.mark.slow
def test_the_policy_of_a_run_with_prior_data_is_loaded(tmp_path: Path, small_run: list[str], script: Any) -> None:
    run = tmp_path / "run"
    assert script("sac_prior", *small_run, "--num-updates", 5, "--run-dir", run, package="benchmarks").status == 0
    assert load_policy(run)(np.zeros(11)).shape == (3,)
