"""AWAC's mathematics against closed forms, an independent numpy version, and problems with a known solution."""

import csv
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import crossed, means
from scipy import stats
from test_iql import NumpyAdam, numpy_gradients, numpy_mlp, random_batch, trees_equal

from algorithms import awac
from common import cli
from common.cli import UsageError
from common.replay import Replay, Transitions

OBS, ACT, BATCH = 4, 2, 16
ARGS = awac.Args(hidden_dim=8, num_layers=2, batch_size=BATCH)
HP = awac.Hyperparameters()
NARROW, WIDE = -20.0, 20.0  # log standard deviations: samples are the mean; all samples lie far outside [-1, 1]
update = jax.jit(awac.update, static_argnames="args")
train = jax.jit(partial(awac.train, args=ARGS))
initialise = jax.jit(awac.init, static_argnums=(2, 3, 4))
double = partial(jax.tree.map, lambda x: np.asarray(x, np.float64))


def transitions(observations: Any, actions: Any, rewards: Any = 0.0, **others: Any) -> Transitions:
    """A batch with one action dimension; next states are the states and flags are 0 unless given."""
    values = {"next_observations": observations, "terminations": 0.0, "truncations": 0.0, "rewards": rewards} | others
    values |= {"observations": observations, "actions": np.reshape(actions, (-1, 1))}
    width = {"observations": np.shape(observations), "next_observations": np.shape(observations)}
    size = np.size(actions)
    shapes = {name: width.get(name, (size, 1) if name == "actions" else (size,)) for name in Transitions._fields}
    return Transitions(**{name: np.broadcast_to(np.float32(values[name]), shape) for name, shape in shapes.items()})


def fresh(args: awac.Args = ARGS, seed: int = 0, obs_dim: int = OBS, action_dim: int = ACT) -> awac.State:
    sizes = {name: getattr(args, name) for name in ("hidden_dim", "num_layers", "num_critics", "initial_log_std")}
    return initialise(jax.random.key(seed), HP, replace(ARGS, **sizes), obs_dim, action_dim)


def state_of(actor: Any, critic: Any) -> awac.State:
    """The state of networks made by hand, at the start of training."""
    optimisers = {"actor_opt": awac.ADAM.init(actor), "critic_opt": awac.ADAM.init(critic)}
    return awac.State(actor, actor, critic, critic, **optimisers, step=jnp.int32(0), key=jax.random.key(0))


def assert_close(a: object, b: object, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    jax.tree.map(partial(np.testing.assert_allclose, rtol=rtol, atol=atol), a, b)


def members(ensemble: Any) -> list[dict]:
    """The parameters of the single Q-functions, in float64."""
    stacked = double(ensemble["params"]["VmapMLP_0"])
    return [jax.tree.map(lambda x, k=k: x[k], stacked) for k in range(len(stacked["Dense_0"]["bias"]))]


def numpy_min_q(critics: list[dict], observations: np.ndarray, actions: np.ndarray) -> np.ndarray:
    inputs = np.concatenate([observations, actions], axis=1)
    return np.min([numpy_mlp(critic, inputs)[0][:, 0] for critic in critics], axis=0)


def one_layer(kernel: Any, bias: Any, output: Any, offset: Any = 0.0) -> dict:
    """An MLP of one hidden layer from the units that matter; further ones are zero. `output` is `[units, outputs]`."""
    kernel, bias, output = np.float32(kernel), np.float32(bias), np.float32(output)
    output = output if output.ndim == 2 else output[:, None]
    unused = ARGS.hidden_dim - len(bias)
    return {
        "Dense_0": {"kernel": np.pad(kernel, ((0, 0), (0, unused))), "bias": np.pad(bias, (0, unused))},
        "Dense_1": {
            "kernel": np.pad(output, ((0, unused), (0, 0))),
            "bias": np.broadcast_to(np.float32(offset), output.shape[1:]),
        },
    }


def ensemble_of(*critics: dict) -> Any:
    return {"params": {"VmapMLP_0": jax.tree.map(lambda *x: np.stack(x), *critics)}}


def policy_of(mlp: dict, *log_std: float) -> Any:
    return {"params": {"MLP_0": mlp, "log_std": np.float32(log_std)}}


def with_log_std(state: awac.State, *log_std: float) -> awac.State:
    return state._replace(actor=policy_of(state.actor["params"]["MLP_0"], *log_std))


# ---- what an update did, seen from outside ----


@partial(jax.jit, static_argnames="args")
def each_row(state: awac.State, batch: Transitions, hp: awac.Hyperparameters, args: awac.Args) -> dict[str, Any]:
    """Metrics of an update on every single row of the batch, each from the same state."""
    return jax.vmap(lambda row: awac.update(state, jax.tree.map(lambda x: x[None], row), hp, args)[1])(batch)


@partial(jax.jit, static_argnames="args")
def each_key(state: awac.State, batch: Transitions, hp: awac.Hyperparameters, args: awac.Args) -> dict[str, Any]:
    """Metrics of an update with each of 4,000 keys."""
    keys = jax.random.split(state.key, 4000)
    return jax.vmap(lambda key: awac.update(state._replace(key=key), batch, hp, args)[1])(keys)


def advantages_of(state: awac.State, batch: Transitions, args: awac.Args, hp: awac.Hyperparameters = HP) -> np.ndarray:
    """The advantage of every row, under the state's own critic."""
    return np.asarray(each_row(state, batch, hp._replace(critic_learning_rate=0.0), args)["actor/advantage_mean"])


def constant_critics(state: awac.State) -> tuple[Any, Any]:
    """Q = 0 and Q = 1, in the state's shapes."""
    zero = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), state.critic)
    layers = zero["params"]["VmapMLP_0"]
    last = max(layers)
    return zero, {"params": {"VmapMLP_0": layers | {last: layers[last] | {"bias": layers[last]["bias"] + 1}}}}


def targets_of(state: awac.State, batch: Transitions, args: awac.Args, hp: awac.Hyperparameters = HP) -> np.ndarray:
    """The critic's target of every row, found from its squared distances to Q = 0 and to Q = 1."""
    zero, one = constant_critics(state)
    to_zero, to_one = (each_row(state._replace(critic=q), batch, hp, args)["critic/loss"] for q in (zero, one))
    return (double(to_zero) - double(to_one)) / args.num_critics / 2 + 0.5


def policy_gradient(state: awac.State, batch: Transitions, args: awac.Args, hp: awac.Hyperparameters = HP) -> Any:
    """The gradient that Adam was given: ten times its first moment after its first step."""
    moments = update(state, batch, hp, args)[0].actor_opt.mu["params"]
    return jax.tree.map(lambda moment: np.asarray(moment) * 10, moments)


def cloning_gradient(state: awac.State, batch: Transitions) -> Any:
    """Gradient of -mean log pi(a|s) for a policy without tanh, by hand."""
    actor, log_std = double(state.actor["params"]["MLP_0"]), double(state.actor["params"]["log_std"])
    mean, inputs = numpy_mlp(actor, double(batch.observations))
    z = (double(batch.actions) - mean) / np.exp(log_std)
    gradients = numpy_gradients(actor, inputs, -z / np.exp(log_std) / len(z))
    return {"MLP_0": gradients, "log_std": (1 - z**2).mean(axis=0)}


# Networks made by hand: observations of two numbers, one action, two Q-functions.
SAMPLES = replace(ARGS, num_layers=1, max_log_std=WIDE, value_samples=16)
MODE = replace(ARGS, num_layers=1, max_log_std=WIDE, value="mode")
ROWS = 10
NOTHING = np.zeros((ROWS, 2))
Q_IS_A, Q_IS_MINUS_A = (one_layer([[0], [0], [1]], [1], [sign], -sign) for sign in (1, -1))  # for a in [-1, 1]
Q_IS_SIZE_OF_A = one_layer([[0, 0], [0, 0], [1, -1]], [0, 0], [1, 1])  # |a|, for any a
MEAN_IS_HALF_OF_S = one_layer([[1, -1], [0, 0]], [0, 0], [0.5, -0.5])  # of the first number of the state


# ---- weights ----

SOFTMAX, EXP = replace(ARGS, weights="softmax"), replace(ARGS, weights="exp")
ADVANTAGES = np.random.default_rng(7).normal(scale=3.0, size=BATCH).astype(np.float32)


def weights_of(advantages: np.ndarray, hp: awac.Hyperparameters, args: awac.Args) -> np.ndarray:
    return np.asarray(awac.advantage_weights(jnp.asarray(advantages), hp, args))


@pytest.mark.parametrize("temperature", [0.3, 2.0])
def test_softmax_weights_add_up_to_the_batch_and_ignore_a_constant(temperature: float) -> None:
    hp = HP._replace(softmax_temperature=temperature)
    weights = weights_of(ADVANTAGES, hp, SOFTMAX)
    exact = np.exp(ADVANTAGES.astype(np.float64) / temperature)
    np.testing.assert_allclose(weights, BATCH * exact / exact.sum(), rtol=1e-5)
    assert weights.sum() == pytest.approx(BATCH, rel=1e-5)
    for constant in (-512.0, 3.0, 512.0):
        np.testing.assert_allclose(weights_of(ADVANTAGES + constant, hp, SOFTMAX), weights, rtol=1e-3)


@pytest.mark.parametrize("clip", [0.5, 2.0])
def test_softmax_weights_above_the_limit_are_those_at_it(clip: float) -> None:
    hp, advantages = HP._replace(softmax_temperature=0.7, advantage_clip=clip), ADVANTAGES.astype(np.float64)
    above = advantages > clip
    exact = np.exp(np.where(above, clip, advantages) / 0.7)
    assert 1 < above.sum() < BATCH
    np.testing.assert_allclose(weights_of(ADVANTAGES, hp, SOFTMAX), BATCH * exact / exact.sum(), rtol=1e-5)


@pytest.mark.parametrize("clip", [0.5, 5.0])
def test_exp_weights_grow_with_a_constant_and_end_exactly_at_the_clip(clip: float) -> None:
    hp = HP._replace(temperature=1.5, weight_clip=clip)
    weights = weights_of(ADVANTAGES, hp, EXP)
    np.testing.assert_allclose(weights, np.minimum(np.exp(ADVANTAGES.astype(np.float64) / 1.5), clip), rtol=1e-5)
    shifted = weights_of(ADVANTAGES - 2.0, hp, EXP)
    below = weights < clip
    assert 0 < below.sum() < BATCH
    np.testing.assert_allclose(shifted[below], weights[below] * np.exp(-2.0 / 1.5), rtol=1e-5)
    assert (weights_of(np.float32([1e3, 1e30]), hp, EXP) == np.float32(clip)).all()  # where exp overflows, too


@pytest.mark.parametrize("args", [SOFTMAX, EXP], ids=["softmax", "exp"])
def test_infinite_temperature_is_behaviour_cloning(args: awac.Args) -> None:
    state, batch = with_log_std(fresh(args), -0.3, 0.2), random_batch()
    hot = HP._replace(temperature=1e9, softmax_temperature=1e9)
    np.testing.assert_allclose(weights_of(ADVANTAGES, hot, args), 1.0, rtol=1e-6)
    cloning = cloning_gradient(state, batch)
    assert_close(policy_gradient(state, batch, args, hot), cloning, rtol=1e-4, atol=1e-5)
    cold = policy_gradient(state, batch, args, HP._replace(temperature=0.1, softmax_temperature=0.1))
    assert np.abs(cold["log_std"] - cloning["log_std"]).max() > 0.05  # what the comparison would see


@pytest.mark.parametrize("weights", ["softmax", "exp"])
def test_constant_advantages_are_behaviour_cloning(weights: str) -> None:
    """Q = |a|, every action of the data is 1 or -1, the policy's mean is 0: each advantage is 1."""
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(2, 8)), rng.normal(size=8)
    state = state_of(policy_of(one_layer(*hidden, np.zeros(8)), -0.4), ensemble_of(Q_IS_SIZE_OF_A, Q_IS_SIZE_OF_A))
    batch = transitions(rng.normal(size=(ROWS, 2)), rng.choice([-1.0, 1.0], ROWS))
    np.testing.assert_allclose(advantages_of(state, batch, MODE), 1.0, rtol=1e-6)
    hp = HP._replace(critic_learning_rate=0.0, temperature=0.8, softmax_temperature=0.8)
    factor = 1.0 if weights == "softmax" else np.exp(1 / 0.8)
    expected = jax.tree.map(lambda g: factor * g, cloning_gradient(state, batch))
    assert np.abs(expected["log_std"]) > 0.1 and np.abs(expected["MLP_0"]["Dense_1"]["kernel"]).max() > 0.1
    gradient = policy_gradient(state, batch, replace(MODE, weights=weights), hp)
    assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_each_form_uses_its_own_temperature_only() -> None:
    state, batch = fresh(), random_batch()
    for args, own, others in (
        (EXP, {"temperature": 1.0}, {"softmax_temperature": 0.1, "advantage_clip": 1e-3}),
        (EXP, {"weight_clip": 0.9}, {"softmax_temperature": 0.1, "advantage_clip": 1e-3}),
        (SOFTMAX, {"softmax_temperature": 0.5}, {"temperature": 3.0, "weight_clip": 0.5}),
        (SOFTMAX, {"advantage_clip": 1e-3}, {"temperature": 3.0, "weight_clip": 0.5}),
    ):
        base = update(state, batch, HP, args)
        assert trees_equal(base[1], update(state, batch, HP._replace(**others), args)[1])
        assert trees_equal(base[0].actor, update(state, batch, HP._replace(**others), args)[0].actor)
        assert not trees_equal(base[0].actor, update(state, batch, HP._replace(**own), args)[0].actor)


@pytest.mark.parametrize(
    ("arguments", "unused"),
    [
        (["--grid", "softmax_temperature=1,2"], "softmax_temperature"),
        (["--grid", "temperature=1,2 softmax-temperature=1,2"], "softmax_temperature"),
        (["--grid", "discount=0.9,0.99 temperature=1", "--weights", "softmax"], "temperature"),
        (["--grid", "temperature=1,2", "--preset", "demonstrations"], "temperature"),
        (["--grid", "weight_clip=10,100", "--weights", "softmax"], "weight_clip"),
        (["--grid", "advantage_clip=0.5,5"], "advantage_clip"),
        (["--grid", "temperature=1,2"], None),
        (["--grid", "softmax_temperature=1,2", "--weights", "softmax"], None),
        (["--grid", "softmax_temperature=1,2 polyak=0.1", "--preset", "demonstrations"], None),
        (["--grid", "temperature=1,2", "--preset", "demonstrations", "--weights", "exp"], None),
    ],
)
def test_a_sweep_of_what_the_weights_do_not_use_is_refused(arguments: list[str], unused: str | None) -> None:
    if unused is None:
        cli.parse(awac.Args, awac.PRESETS, arguments)
        return
    with pytest.raises(UsageError) as error:
        cli.parse(awac.Args, awac.PRESETS, arguments)
    weights = cli.parse(awac.Args, awac.PRESETS, arguments[2:]).weights  # without the grid
    assert str(error.value) == f"--grid: {unused} has no effect with --weights {weights}"


def test_weights_are_constants_for_the_gradient() -> None:
    log_prob, advantages = jnp.array([-1.0, 0.5, -2.0]), jnp.array([0.3, -0.2, 0.1])
    gradient = jax.grad(lambda x: awac.actor_loss(x, advantages, HP, EXP)[0])(log_prob)
    np.testing.assert_allclose(gradient, -np.exp(3.0 * np.asarray(advantages)) / 3, rtol=1e-5)
    loss, info = awac.actor_loss(log_prob, advantages, HP, EXP)
    assert loss == pytest.approx(-np.mean(np.exp(3.0 * np.asarray(advantages)) * np.asarray(log_prob)), rel=1e-5)
    assert info["actor/weight_max"] == pytest.approx(np.exp(0.9), rel=1e-5)


# ---- advantages ----


def test_minimum_over_critics_is_taken_for_each_sample_before_the_mean_over_samples() -> None:
    """Q_1 = a, Q_2 = -a, samples at -1 and 1: the minimum is -1 at each, but the minimum of means is near 0."""
    state = state_of(policy_of(MEAN_IS_HALF_OF_S, WIDE), ensemble_of(Q_IS_A, Q_IS_MINUS_A))
    actions = np.linspace(-1, 1, ROWS)
    for seed in range(3):
        advantages = advantages_of(state._replace(key=jax.random.key(seed)), transitions(NOTHING, actions), SAMPLES)
        np.testing.assert_allclose(advantages, 1 - np.abs(actions), atol=1e-6)


def test_value_by_mode_is_that_of_the_clipped_mean() -> None:
    """Q = |a| and a mean that leaves [-1, 1] in some states: V = |clip(mean)|."""
    state = state_of(policy_of(MEAN_IS_HALF_OF_S, WIDE), ensemble_of(Q_IS_SIZE_OF_A, Q_IS_SIZE_OF_A))
    states, actions = np.linspace(-4, 4, ROWS), np.tile([0.5, -1.0, 0.2, 0.7, -0.3], 2)
    batch = transitions(np.stack([states, 0 * states], axis=1), actions)
    expected = np.abs(actions) - np.minimum(np.abs(states / 2), 1)
    np.testing.assert_allclose(advantages_of(state, batch, MODE), expected, atol=1e-5)


def test_value_by_samples_is_their_mean() -> None:
    """Q = a: over many keys, advantages are spread around a - mean by the standard error of 16 samples."""
    state = state_of(policy_of(MEAN_IS_HALF_OF_S, np.log(0.1)), ensemble_of(Q_IS_A, Q_IS_A))
    batch = transitions([[0.6, 0.0]], [0.2], next_observations=[[-0.9, 0.0]])
    hp = HP._replace(critic_learning_rate=0.0)
    advantages = np.asarray(each_key(state, batch, hp, SAMPLES)["actor/advantage_mean"])
    assert advantages.mean() == pytest.approx(0.2 - 0.3, abs=0.002)
    assert advantages.std() == pytest.approx(0.1 / np.sqrt(16), rel=0.06)


def test_advantages_are_of_the_new_critic_and_not_of_a_target() -> None:
    args, batch = replace(ARGS, value="mode"), random_batch()
    state, other = fresh(args), fresh(args, seed=5)
    still, moved = (HP._replace(critic_learning_rate=rate) for rate in (0.0, 0.05))
    one, two = (
        update(state._replace(target_critic=target), batch, still, args)[1] for target in (state.critic, other.critic)
    )
    assert one["actor/advantage_mean"] == two["actor/advantage_mean"]
    assert one["critic/loss"] != two["critic/loss"]

    after, metrics = update(state, batch, moved, args)
    observations, actions = double(batch.observations), double(batch.actions)
    mode = np.clip(numpy_mlp(double(state.actor["params"]["MLP_0"]), observations)[0], -1, 1)
    new, old = (
        np.mean(numpy_min_q(members(q), observations, actions) - numpy_min_q(members(q), observations, mode))
        for q in (after.critic, state.critic)
    )
    assert metrics["actor/advantage_mean"] == pytest.approx(new, abs=1e-5)
    assert abs(new - old) > 1e-2


def test_advantage_is_that_of_the_policy_and_not_the_residual_of_the_critic() -> None:
    """Two states in turn, s0 -> s1 -> end, reward a + b(s), a policy that is its mean, and the policy's exact Q:

    Q(s1, a) = a + b1, Q(s0, a) = a + b0 + discount (pi(s1) + b1), A = a - pi(s). Every temporal-difference residual
    of such a Q is 0, so weights made from residuals would all be equal.
    """
    b, policy, discount = np.array([0.3, -0.7]), np.array([-0.5, 0.25]), 0.9
    constants = np.array([b[0] + discount * (policy[1] + b[1]), b[1]])
    q = one_layer([[0, 1, 0], [0, 0, 1], [1, 0, 0]], [1, 0, 0], [1, *constants], -1)
    state = state_of(policy_of(one_layer(np.eye(2), [0, 0], policy), NARROW), ensemble_of(q, q))
    where, actions = np.repeat([0, 1], ROWS // 2), np.tile(np.linspace(-1, 1, ROWS // 2), 2)
    nexts = np.eye(2)[[1] * ROWS]
    batch = transitions(np.eye(2)[where], actions, actions + b[where], next_observations=nexts, terminations=where)
    exact = actions - policy[where]

    hp = HP._replace(discount=discount, critic_learning_rate=0.0, temperature=0.5, softmax_temperature=0.5)
    metrics = each_row(state, batch, hp, MODE)
    np.testing.assert_allclose(metrics["critic/loss"], 0.0, atol=1e-10)
    np.testing.assert_allclose(metrics["actor/advantage_mean"], exact, atol=1e-6)
    np.testing.assert_allclose(metrics["actor/weight_mean"], np.exp(exact / 0.5), rtol=1e-5)
    largest = update(state, batch, hp, replace(MODE, weights="softmax"))[1]["actor/weight_max"]
    assert largest == pytest.approx(ROWS * np.exp(exact / 0.5).max() / np.exp(exact / 0.5).sum(), rel=1e-5)
    assert largest > 3.0


# ---- the critic's targets ----


@pytest.mark.parametrize(
    "num_critics", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(5, marks=pytest.mark.slow)]
)
def test_targets_are_the_least_of_all_target_critics_at_the_next_state(num_critics: int) -> None:
    """For a policy that is its mean, so that numpy knows the next actions."""
    args, batch = replace(ARGS, num_critics=num_critics), random_batch()
    state = with_log_std(fresh(args), NARROW, NARROW)._replace(target_critic=fresh(args, seed=7).critic)
    nexts = double(batch.next_observations)
    mode = np.clip(numpy_mlp(double(state.actor["params"]["MLP_0"]), nexts)[0], -1, 1)
    q = np.array([numpy_min_q([critic], nexts, mode) for critic in members(state.target_critic)])
    assert set(q.argmin(axis=0)) == set(range(num_critics))  # each is the least somewhere
    expected = double(batch.rewards) + 0.99 * (1 - double(batch.terminations)) * q.min(axis=0)
    np.testing.assert_allclose(targets_of(state, batch, args), expected, atol=2e-5)


def test_next_actions_are_samples_of_the_policy_in_the_next_state() -> None:
    """Q'(s, a) = a and mean(s) = s / 2: over many keys, targets are spread around discount s' / 2, whatever s is."""
    state = state_of(policy_of(MEAN_IS_HALF_OF_S, np.log(0.1)), ensemble_of(Q_IS_A, Q_IS_A))
    batch = transitions([[-0.8, 0.0]], [0.5], next_observations=[[0.6, 0.0]])
    square, distance = (
        double(each_key(state._replace(critic=q), batch, HP._replace(discount=0.9), SAMPLES)["critic/loss"])
        for q in constant_critics(state)
    )
    targets = (square - distance) / 4 + 0.5
    assert targets.mean() == pytest.approx(0.9 * 0.3, abs=0.007)
    assert targets.std() == pytest.approx(0.9 * 0.1, rel=0.06)


def test_targets_follow_the_next_states_and_not_the_states() -> None:
    state, batch = fresh(), random_batch()
    targets = targets_of(state, batch, ARGS)
    elsewhere = batch._replace(observations=batch.observations + 1.0, actions=-batch.actions)
    np.testing.assert_array_equal(targets_of(state, elsewhere, ARGS), targets)
    moved = targets_of(state, batch._replace(next_observations=batch.next_observations + 1.0), ARGS)
    bootstrapped = np.asarray(batch.terminations) == 0
    assert (np.abs(moved - targets)[bootstrapped] > 1e-4).all()


def test_the_policys_own_actions_are_clipped_for_targets_and_values() -> None:
    """Q = |a|, samples far outside [-1, 1]: the next value is 1, and so is the state's value."""
    q = ensemble_of(Q_IS_SIZE_OF_A, Q_IS_SIZE_OF_A)
    state, actions = state_of(policy_of(MEAN_IS_HALF_OF_S, WIDE), q), np.linspace(-1, 1, ROWS)
    batch = transitions(NOTHING, actions, rewards=2.0)
    np.testing.assert_allclose(targets_of(state, batch, SAMPLES), 2.99, rtol=1e-5)
    np.testing.assert_allclose(advantages_of(state, batch, SAMPLES), np.abs(actions) - 1, atol=1e-5)


def test_nonpositive_targets() -> None:
    state, batch = fresh(), random_batch()
    free, kept = (targets_of(state, batch, replace(ARGS, nonpositive_targets=flag)) for flag in (False, True))
    assert 3 < (free > 0.01).sum() < BATCH - 3
    np.testing.assert_array_equal(kept[free > 0], 0.0)
    np.testing.assert_allclose(kept[free <= 0], free[free <= 0], atol=1e-6)


def test_a_critic_above_nonpositive_targets_still_learns() -> None:
    """A Q-function that is itself cut at 0 has no gradient there."""
    args = replace(ARGS, nonpositive_targets=True)
    state = fresh(args)
    _, one = constant_critics(state)
    after = update(state._replace(critic=one, target_critic=one), random_batch(), HP, args)[0]
    assert (np.asarray(after.critic["params"]["VmapMLP_0"]["Dense_2"]["bias"]) < 1.0).all()


def test_target_starts_as_a_copy_and_moves_by_the_polyak_amount_at_every_update() -> None:
    state, hp = fresh(), HP._replace(polyak=0.1, critic_learning_rate=1e-2)
    assert trees_equal(state.critic, state.target_critic)
    for seed in range(10):
        old = state
        state, _ = update(state, random_batch(seed), hp, ARGS)
        expected = jax.tree.map(lambda t, q: 0.9 * np.asarray(t, np.float64) + 0.1 * q, old.target_critic, state.critic)
        assert_close(state.target_critic, expected, atol=1e-7)
        assert not trees_equal(old.target_critic, state.target_critic)


def test_the_average_that_acts_moves_by_its_share_and_is_the_policy_with_all() -> None:
    state, batch = fresh(), random_batch()
    assert trees_equal(state.average_actor, state.actor)
    for share in (0.25, 1.0):
        new, _ = update(state, batch, HP._replace(actor_average=share, actor_learning_rate=1e-2), ARGS)
        expected = jax.tree.map(lambda old, x: (1 - share) * old + share * x, state.average_actor, new.actor)  # noqa: B023
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), new.average_actor, expected)
        assert trees_equal(new.average_actor, new.actor) == (share == 1.0)


def test_noise_on_the_states_reaches_the_policys_likelihood_alone() -> None:
    """In standard deviations of the minibatch: a dimension that never changes stays as it is."""
    state, batch = fresh(), random_batch()
    plain, info = update(state, batch, HP, ARGS)
    noisy, blurred = update(state, batch, HP, replace(ARGS, observation_noise=0.5))
    assert trees_equal(noisy.critic, plain.critic) and not trees_equal(noisy.actor, plain.actor)
    assert info["actor/advantage_mean"] == blurred["actor/advantage_mean"]
    still = batch._replace(observations=np.full_like(batch.observations, 0.5))
    pair = [update(state, still, HP, replace(ARGS, observation_noise=x))[0].actor for x in (0.0, 0.5)]
    assert trees_equal(*pair)


def test_noise_on_the_states_is_drawn_anew_at_every_update() -> None:
    """The likelihood depends on the update's key with noise, and not without."""
    batch, args = random_batch(), replace(ARGS, observation_noise=0.5)
    for noisy, number in ((args, 4), (ARGS, 1)):
        keys = [fresh()._replace(key=jax.random.key(i)) for i in range(4)]
        assert len({float(update(state, batch, HP, noisy)[1]["actor/log_prob"]) for state in keys}) == number


def test_losses_do_not_broadcast() -> None:
    with pytest.raises(AssertionError):
        awac.critic_loss(jnp.zeros((2, 4)), jnp.zeros((4, 1)))
    with pytest.raises(AssertionError):
        awac.actor_loss(jnp.zeros((4, 1)), jnp.zeros(4), HP, ARGS)


# ---- the policy ----


def test_start_of_the_networks() -> None:
    args = replace(ARGS, num_layers=3, num_critics=3, initial_log_std=-1.5)
    state = fresh(args)
    actor, critics = state.actor["params"], members(state.critic)
    np.testing.assert_array_equal(actor["log_std"], np.float32([-1.5] * ACT))
    for layers, inputs, outputs in ((actor["MLP_0"], OBS, ACT), *((critic, OBS + ACT, 1) for critic in critics)):
        shapes = [layers[f"Dense_{i}"]["kernel"].shape for i in range(len(layers))]
        assert shapes == [(inputs, 8), (8, 8), (8, 8), (8, outputs)]
        for layer in layers.values():
            assert not np.any(layer["bias"])
            assert 0.3 < np.abs(layer["kernel"]).max() * np.sqrt(len(layer["kernel"])) <= 1.0
    assert len({float(critic["Dense_0"]["kernel"][0, 0]) for critic in critics}) == 3


@pytest.mark.parametrize("squash_mean", [False, True])
def test_policy_is_a_gaussian_whose_mean_alone_may_be_squashed(squash_mean: bool) -> None:
    args = replace(ARGS, squash_mean=squash_mean, min_log_std=-1.0, max_log_std=0.5)
    batch = random_batch()
    mlp = jax.tree.map(lambda x: 6 * np.asarray(x), fresh().actor["params"]["MLP_0"])
    u = numpy_mlp(double(mlp), double(batch.observations))[0]
    assert np.abs(u).max() > 1.5
    mean = np.tanh(u) if squash_mean else u
    apply = jax.jit(awac.modules(args, ACT)[0].apply)
    for log_std, clipped in (([-4.0, 0.3], [-1.0, 0.3]), ([2.0, -0.9], [0.5, -0.9])):
        ours = apply(policy_of(mlp, *log_std), batch.observations)
        np.testing.assert_allclose(ours[0], mean, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(ours[1], clipped)
        density = stats.norm(mean, np.exp(clipped)).logpdf(double(batch.actions)).sum(axis=1)
        np.testing.assert_allclose(awac.networks.gaussian_log_prob(batch.actions, *ours), density, rtol=1e-3)


def test_act_is_the_clipped_mean_or_a_sample() -> None:
    """A mean of 0.2, one of 3: the second is clipped, and so are the samples around it."""
    mlp = one_layer(np.zeros((OBS, 1)), [1], [[0.2, 3.0]])
    state = fresh()._replace(average_actor=policy_of(mlp, np.log(0.1), np.log(0.1)))
    act = jax.jit(partial(awac.act, args=MODE, action_dim=ACT), static_argnames="sample")
    observations, keys = np.zeros((20_000, OBS), np.float32), jax.random.split(jax.random.key(0), 2)
    for key in keys:
        mean = act(state, HP, observations, key, sample=False)
        np.testing.assert_allclose(mean[:2], [[0.2, 1.0]] * 2, rtol=1e-6)
    samples, others = (np.asarray(act(state, HP, observations, key, sample=True)) for key in keys)
    assert samples[:, 0].mean() == pytest.approx(0.2, abs=0.004)
    assert samples[:, 0].std() == pytest.approx(0.1, rel=0.03)
    np.testing.assert_array_equal(samples[:, 1], 1.0)
    assert (samples[:, 0] != others[:, 0]).mean() > 0.99


def test_weight_decay_is_in_the_gradient_of_every_parameter_of_the_policy_and_of_no_other() -> None:
    state, batch = fresh(), random_batch()
    shifted = jax.tree.map(
        lambda x: np.asarray(x) + 0.1, state.actor
    )  # biases start at 0, where a decay could not be seen
    state = state._replace(actor=shifted)
    without = policy_gradient(state, batch, ARGS)
    decayed = policy_gradient(state, batch, ARGS, HP._replace(actor_weight_decay=3.0))
    expected = jax.tree.map(lambda g, p: g + 3.0 * p, without, dict(state.actor["params"]))
    assert_close(decayed, expected, rtol=1e-4, atol=1e-5)
    one, two = (update(state, batch, HP._replace(actor_weight_decay=decay), ARGS)[0] for decay in (0.0, 3.0))
    assert trees_equal((one.critic, one.critic_opt), (two.critic, two.critic_opt))
    assert not trees_equal(one.actor, two.actor)


# ---- an independent numpy version of the whole update ----


def numpy_awac(
    state: awac.State, batches: list[Transitions], hp: awac.Hyperparameters, args: awac.Args
) -> tuple[list, list, dict, dict]:
    """Critics, targets, policy and the last metrics after one update on each batch, written from the equations.

    In float64; only the noise is JAX's, from the keys that the update draws it with.
    """
    critics, targets = members(state.critic), members(state.target_critic)
    actor, log_std = double(state.actor["params"]["MLP_0"]), double(state.actor["params"]["log_std"])
    critic_adams, actor_adam = [NumpyAdam(hp.critic_learning_rate) for _ in critics], NumpyAdam(hp.actor_learning_rate)
    key, limits = state.key, (args.min_log_std, args.max_log_std)
    for batch in batches:
        key, next_key, value_key = jax.random.split(key, 3)
        s, a, r, s2, done, _ = double(batch)

        def policy(x: np.ndarray, actor: dict = actor, log_std: np.ndarray = log_std) -> tuple:
            u, inputs = numpy_mlp(actor, x)
            return (np.tanh(u) if args.squash_mean else u), np.exp(np.clip(log_std, *limits)), inputs

        def samples(key: jax.Array, mean: np.ndarray, std: np.ndarray, count: int) -> np.ndarray:
            return np.clip(mean + std * double(jax.random.normal(key, (count, *mean.shape))), -1, 1)

        mean, std, _ = policy(s2)
        y = r + hp.discount * (1 - done) * numpy_min_q(targets, s2, samples(next_key, mean, std, 1)[0])
        y = np.minimum(y, 0) if args.nonpositive_targets else y
        before = []
        for k, critic in enumerate(critics):
            q, inputs = numpy_mlp(critic, np.concatenate([s, a], axis=1))
            before.append(q[:, 0])
            gradients = numpy_gradients(critic, inputs, 2 * (q - y[:, None]) / len(r))
            critics[k] = critic_adams[k].step(critic, gradients)

        mean, std, inputs = policy(s)
        own = [np.clip(mean, -1, 1)] if args.value == "mode" else samples(value_key, mean, std, args.value_samples)
        advantages = numpy_min_q(critics, s, a) - np.mean([numpy_min_q(critics, s, x) for x in own], axis=0)
        if args.weights == "exp":
            weights = np.minimum(np.exp(advantages / hp.temperature), hp.weight_clip)
        else:
            weights = np.exp(np.minimum(advantages, hp.advantage_clip) / hp.softmax_temperature)
            weights *= len(r) / weights.sum()
        z = (a - mean) / std
        share = weights[:, None] / len(r)
        gradients = {
            "MLP_0": numpy_gradients(actor, inputs, -share * z / std * (1 - mean**2 if args.squash_mean else 1)),
            "log_std": np.sum(share * (1 - z**2), axis=0) * ((log_std > limits[0]) & (log_std < limits[1])),
        }
        params = {"MLP_0": actor, "log_std": log_std}
        gradients = jax.tree.map(lambda g, p: g + hp.actor_weight_decay * p, gradients, params)
        moved = actor_adam.step(params, gradients)
        actor, log_std = moved["MLP_0"], moved["log_std"]
        targets = [
            jax.tree.map(lambda old, new: (1 - hp.polyak) * old + hp.polyak * new, *pair)
            for pair in zip(targets, critics, strict=True)
        ]
        log_prob = (-0.5 * z**2 - np.log(std) - 0.5 * np.log(2 * np.pi)).sum(axis=1)
        metrics = {
            "critic/loss": sum(np.mean((q - y) ** 2) for q in before),
            "critic/q_mean": np.mean(before),
            "critic/q_std": np.std(before, axis=0).mean(),
            "actor/loss": -np.mean(weights * log_prob),
            "actor/log_prob": log_prob.mean(),
            "actor/weight_mean": weights.mean(),
            "actor/weight_max": weights.max(),
            "actor/advantage_mean": advantages.mean(),
        }
    return critics, targets, {"MLP_0": actor, "log_std": log_std}, metrics


@pytest.mark.parametrize(
    ("changes", "hp"),
    [
        ({}, HP._replace(temperature=0.2)),
        (
            {"weights": "softmax", "value": "mode", "squash_mean": True, "num_critics": 1, "nonpositive_targets": True},
            HP._replace(softmax_temperature=0.1, advantage_clip=0.05, actor_weight_decay=0.1, discount=0.9),
        ),
        (
            {"value_samples": 3, "num_critics": 5, "min_log_std": -0.7, "max_log_std": 0.1},
            HP._replace(temperature=0.1, weight_clip=1.5, actor_weight_decay=0.3),
        ),
    ],
    ids=["exp", "softmax", "clips"],
)
def test_update_equals_an_independent_numpy_version(changes: dict[str, Any], hp: awac.Hyperparameters) -> None:
    # Rates near Adam's scale make 5 updates move every weight visibly. Some of the data's actions lie beyond the
    # bounds: they are neither clipped for the critic nor for the likelihood.
    args = replace(ARGS, **changes)
    hp = hp._replace(actor_learning_rate=1e-2, critic_learning_rate=2e-2, polyak=0.3)
    batches = [random_batch(seed) for seed in range(5)]
    batches = [batch._replace(actions=1.4 * batch.actions) for batch in batches]
    state = with_log_std(fresh(args), -1.2, -0.4)._replace(target_critic=fresh(args, seed=1).critic)
    start = state
    critics, targets, actor, expected = numpy_awac(state, batches, hp, args)
    for batch in batches:
        state, metrics = update(state, batch, hp, args)
    close = partial(assert_close, rtol=2e-3, atol=2e-4)
    close(members(state.critic), critics)
    close(members(state.target_critic), targets)
    close(dict(state.actor["params"]), actor)
    close(metrics, expected)
    assert int(state.step) == 5
    for old, new in ((start.critic, state.critic), (start.actor, state.actor)):
        moves = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - b).max(), old, new)
        assert min(jax.tree.leaves(moves)) > 0.01


def test_train_equals_a_loop_of_updates() -> None:
    data = Replay(random_batch(size=64))
    trained, metrics = train(fresh(), HP, data, 9)
    state, losses = fresh(), []
    for _ in range(9):
        key, sample_key = jax.random.split(state.key)
        batch = awac.replay.sample(sample_key, data, BATCH)
        state, info = update(state._replace(key=key), batch, HP, ARGS)
        losses.append(float(info["critic/loss"]))
    assert_close(trained._replace(key=0), state._replace(key=0), rtol=1e-4)
    assert float(means(metrics)["critic/loss"]) == pytest.approx(np.mean(losses), rel=1e-4)
    assert trees_equal(jax.random.key_data(trained.key), jax.random.key_data(state.key))


def test_other_flags_in_the_same_process_are_another_program() -> None:
    """Equal flags share a program; other flags of the same shapes do not, and are what they are when traced anew."""
    state, batch = with_log_std(fresh(), -0.3, 0.2), random_batch()
    traced = []

    @partial(jax.jit, static_argnames="args")
    def once_more(state: awac.State, batch: Transitions, args: awac.Args) -> dict[str, jax.Array]:
        traced.append(args)
        return awac.update(state, batch, HP, args)[1]

    for args in (ARGS, SOFTMAX, replace(ARGS), replace(SOFTMAX)):
        assert_close(once_more(state, batch, args), update(state, batch, HP, args)[1])
    assert traced == [ARGS, SOFTMAX]
    every = (ARGS, SOFTMAX, replace(ARGS, value="mode"), replace(ARGS, nonpositive_targets=True))
    assert len({tuple(map(float, update(state, batch, HP, args)[1].values())) for args in every}) == len(every)


# ---- problems with a known solution ----

SLOPES, OFFSETS = np.array([0.8, -0.5]), np.array([0.1, 0.4])


def bandit() -> tuple[awac.Args, awac.State, Transitions, np.ndarray, np.ndarray]:
    """Two one-hot states, the data's actions in each, and Q = slope(s) (a + 1) + offset(s), the lesser of two."""
    kernel = [[0, -2, 1, 0], [-2, 0, 0, 1], [1, 1, 0, 0]]  # units: a + 1 in state 0, a + 1 in state 1, s0, s1
    more, q = (one_layer(kernel, [1, 1, 0, 0], [*SLOPES, *OFFSETS], offset) for offset in (0.7, 0.0))
    rng = np.random.default_rng(0)
    state = state_of(
        policy_of(one_layer(rng.normal(size=(2, 8)), np.zeros(8), rng.normal(size=8)), 0.0), ensemble_of(more, q)
    )
    where = np.array([0, 0, 0, 0, 0, 1, 1, 1])
    actions = np.array([-0.8, -0.8, 0.1, 0.5, 0.9, -0.6, 0.3, 0.7])
    rewards = SLOPES[where] * (actions + 1) + OFFSETS[where]
    return MODE, state, transitions(np.eye(2)[where], actions, rewards, terminations=1.0), where, actions


@partial(jax.jit, static_argnames="args")
def many_updates(state: awac.State, batch: Transitions, hp: awac.Hyperparameters, args: awac.Args) -> awac.State:
    return jax.lax.fori_loop(0, 2000, lambda _, state: awac.update(state, batch, hp, args)[0], state)


def fitted(state: awac.State, batch: Transitions, hp: awac.Hyperparameters, args: awac.Args) -> tuple[Any, ...]:
    """The state after many updates on the whole batch at falling rates, and the policy's means and deviation."""
    for rate in (1e-2, 1e-3, 1e-4):
        state = many_updates(state, batch, hp._replace(actor_learning_rate=rate), args)
    mean, log_std = awac.modules(args, 1)[0].apply(state.actor, jnp.eye(2))
    return state, np.asarray(mean)[:, 0], float(np.exp(log_std[0]))


def tilted(where: np.ndarray, actions: np.ndarray, q: np.ndarray, temperature: float) -> tuple[np.ndarray, float]:
    """Means and the common deviation of the likeliest Gaussian under data(a|s) exp(A / temperature), V at the mean."""
    tilt = np.exp(q / temperature)
    means = np.array([np.average(actions[where == s], weights=tilt[where == s]) for s in (0, 1)])
    weights = np.exp((q - SLOPES[where] * (means[where] + 1) - OFFSETS[where]) / temperature)
    return means, np.sqrt(np.average((actions - means[where]) ** 2, weights=weights))


@pytest.mark.parametrize(("weights", "temperature"), crossed(["exp", "softmax"], [0.3, 2.0]))
def test_policy_improvement_in_closed_form(weights: str, temperature: float) -> None:
    """pi is proportional to data(a|s) exp(A / temperature): a Gaussian takes over its means, state by state."""
    args, state, batch, where, actions = bandit()
    args = replace(args, weights=weights)
    name = "temperature" if weights == "exp" else "softmax_temperature"
    hp = HP._replace(critic_learning_rate=0.0, **{name: temperature})
    means, deviation = tilted(where, actions, np.asarray(batch.rewards, np.float64), temperature)
    cloned, _ = tilted(where, actions, np.zeros(8), temperature)
    assert np.abs(means - cloned).min() > 0.05
    _, learned, std = fitted(state, batch, hp, args)
    np.testing.assert_allclose(learned, means, atol=2e-3)
    assert std == pytest.approx(deviation, rel=5e-3)


def test_critic_and_policy_together_solve_the_bandit() -> None:
    """From random networks: Q becomes the reward of the data's actions, and the policy the closed form of it."""
    args, _, batch, where, actions = bandit()
    args = replace(args, weights="softmax", hidden_dim=32, num_layers=2)
    hp = HP._replace(critic_learning_rate=2e-3, softmax_temperature=0.5)
    state, learned, _ = fitted(fresh(args, obs_dim=2, action_dim=1), batch, hp, args)
    q = numpy_min_q(members(state.critic), double(batch.observations), double(batch.actions))
    np.testing.assert_allclose(q, batch.rewards, atol=0.01)
    means, _ = tilted(where, actions, np.asarray(batch.rewards, np.float64), 0.5)
    np.testing.assert_allclose(learned, means, atol=0.01)


# ---- populations and presets ----


def test_presets_name_real_settings() -> None:
    corl = {"weights": "exp", "value": "sample", "value_samples": 1, "num_layers": 3, "hidden_dim": 256,
            "num_critics": 2, "batch_size": 256, "normalize_observations": True, "squash_mean": False,
            "initial_log_std": 0.0, "min_log_std": -20.0, "max_log_std": 2.0, "nonpositive_targets": False,
            "weight_clip": 100.0, "actor_weight_decay": 0.0, "polyak": 0.005, "discount": 0.99}  # fmt: skip
    authors = {"weights": "softmax", "softmax_temperature": 0.5, "advantage_clip": 0.5, "value": "mode",
               "num_layers": 2, "hidden_dim": 256,
               "num_critics": 2, "batch_size": 1024, "normalize_observations": False, "squash_mean": True,
               "initial_log_std": -3.0, "min_log_std": -6.0, "max_log_std": 0.0, "actor_weight_decay": 1e-4,
               "actor_learning_rate": 3e-4, "critic_learning_rate": 3e-4, "reward_shift": 0.0,
               "nonpositive_targets": True}  # fmt: skip
    for arguments, expected in (
        (["--dataset", "offax/hopper/medium-v1"], corl | {"temperature": 1 / 3, "reward_shift": 0.0}),
        (["--dataset", "D4RL/antmaze/umaze-v1"], corl | {"temperature": 0.1, "reward_shift": -1.0}),
        (["--dataset", "D4RL/door/human-v2"], corl | {"temperature": 0.1, "reward_shift": 0.0}),
        (["--preset", "demonstrations"], authors),
    ):
        args = cli.parse(awac.Args, awac.PRESETS, arguments)
        args.validate()
        settings = vars(args) | args.hp._asdict()
        assert {name: settings[name] for name in expected} == expected
    mine = cli.parse(
        awac.Args, awac.PRESETS, ["--preset", "demonstrations", "--value", "sample", "--softmax-temperature", "9"]
    )
    assert (mine.value, mine.hp.softmax_temperature, mine.squash_mean) == ("sample", 9.0, True)


@pytest.mark.slow
def test_a_population_runs_with_the_authors_settings(
    tmp_path: Path, small_run: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of two members: the networks, the policy and the weights are those of the preset."""
    run = tmp_path / "run"
    arguments = [word if word != "none" else "demonstrations" for word in small_run]
    arguments += ["--num-updates", "3", "--grid", "softmax_temperature=0.5,2", "--run-dir", run]
    monkeypatch.setattr(sys, "argv", ["awac.py", *map(str, arguments)])
    cli.launch(awac.main, awac.Args, awac.PRESETS)
    members = json.loads((run / "config.json").read_text())["members"]
    assert [member["hyperparameters"]["softmax_temperature"] for member in members] == [0.5, 2.0]
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    np.testing.assert_allclose([float(row["actor/weight_mean"]) for row in rows], 1.0, rtol=1e-5)
    assert {row["member"] for row in rows} == {"0", "1"}
    with np.load(run / "checkpoint" / "state.npz") as arrays:
        shapes = {name: arrays[name].shape for name in arrays.files if "kernel" in name and ".actor[" in name}
        (log_std,) = (arrays[name] for name in arrays.files if "log_std" in name and ".actor[" in name)
    assert sorted(shapes.values()) == [(2, 8, 3), (2, 8, 8), (2, 11, 8)]
    assert np.abs(log_std + 3.0).max() <= 3.1 * 3e-4 and np.abs(log_std + 3.0).min() > 0
