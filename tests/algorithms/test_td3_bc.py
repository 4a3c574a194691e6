"""TD3+BC's mathematics against closed forms, an independent numpy version, a bandit and tabular ground truth."""

import itertools
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import means
from scipy import stats
from test_iql import ACT, BATCH, OBS, NumpyAdam, numpy_gradients, numpy_mlp, random_batch, trees_equal

from algorithms import td3_bc
from common import replay
from common.cli import UsageError
from common.replay import Replay, Transitions

ARGS = td3_bc.Args(hidden_dim=8, num_layers=2, batch_size=BATCH, online_steps=10)
SIZES = {  # by the number of critics; every delay and depth once
    1: replace(ARGS, num_critics=1, policy_delay=1, num_layers=1),
    2: ARGS,
    5: replace(ARGS, num_critics=5, policy_delay=3, num_layers=1),
}
HP = td3_bc.Hyperparameters()
OTHER = td3_bc.Hyperparameters(
    alpha=0.7,
    discount=0.8,
    polyak=0.1,
    policy_noise=0.5,
    noise_clip=0.3,
    actor_learning_rate=3e-3,
    critic_learning_rate=1e-2,
    online_bc_weight=0.1,
    exploration_noise=0.4,
)
# The defaults, then in turn each of them changed alone.
VARIANTS = [HP, *(HP._replace(**{name: getattr(OTHER, name)}) for name in HP._fields)]
ROWS = [random_batch(seed) for seed in range(7)]
DATA = random_batch(size=64)
compiled_update = jax.jit(td3_bc.update, static_argnames="args")
train = jax.jit(td3_bc.train, static_argnames="args")
act = jax.jit(td3_bc.act, static_argnames=("args", "action_dim", "sample"))
# As on a GPU, where the members of a population are mapped: states and hyperparameters of their own.
update_members = jax.jit(jax.vmap(partial(td3_bc.update, args=ARGS), in_axes=(0, None, 0)))


def update(
    state: td3_bc.State, batch: Transitions, hp: td3_bc.Hyperparameters, args: td3_bc.Args, online: bool = False
) -> tuple[td3_bc.State, dict[str, Any]]:
    return compiled_update(state, batch, hp, args, online)  # traced, so that both phases share one program


def fresh(args: td3_bc.Args = ARGS, seed: int = 0, obs_dim: int = OBS, action_dim: int = ACT) -> td3_bc.State:
    return jax.jit(td3_bc.init, static_argnums=(2, 3, 4))(jax.random.key(seed), HP, args, obs_dim, action_dim)


def unsettled(args: td3_bc.Args = ARGS) -> td3_bc.State:
    """A state whose four networks all differ, as in the middle of training."""
    other = fresh(args, seed=1)
    return fresh(args)._replace(target_actor=other.actor, target_critic=other.critic)


def with_constant_critics(params: Any, values: list[float]) -> Any:
    """Q-functions of `params`' shapes that are `values`, whatever the state and the action."""
    params = jax.tree.map(np.zeros_like, params)
    layers = params["params"]["VmapMLP_0"]
    last = layers[max(layers)]
    last["bias"] = np.reshape(values, last["bias"].shape).astype(np.float32)
    return params


def values_of(info: dict[str, Any]) -> dict[str, float]:
    """The metrics of one update, without those that it lacks."""
    pairs = {name: m if isinstance(m, tuple) else (m, True) for name, m in info.items()}
    return {name: float(value) for name, (value, present) in pairs.items() if present}


def assert_trees_close(one: Any, other: Any, rtol: float = 1e-4, atol: float = 1e-6) -> None:
    jax.tree.map(partial(np.testing.assert_allclose, rtol=rtol, atol=atol), one, other)


def test_defaults_are_those_of_the_paper() -> None:
    """Its table of hyperparameters, and normalised states."""
    args = td3_bc.Args()
    paper = {"alpha": 2.5, "discount": 0.99, "polyak": 5e-3, "policy_noise": 0.2, "noise_clip": 0.5}
    paper |= {"actor_learning_rate": 3e-4, "critic_learning_rate": 3e-4}
    assert {name: getattr(args.hp, name) for name in paper} == paper
    assert (args.num_critics, args.hidden_dim, args.num_layers, args.policy_delay, args.batch_size) == (
        2,
        256,
        2,
        2,
        256,
    )
    assert args.normalize_observations


# ---- the policy's loss ----


def toy_q(actions: Any) -> Any:
    """A curved Q-function of the actions alone, of both signs, with `toy_slope` as its gradient."""
    return 2.0 * actions[:, 0] - actions[:, 1] ** 2 + 0.3


def toy_slope(actions: np.ndarray) -> np.ndarray:
    return np.stack([np.full(len(actions), 2.0), -2.0 * actions[:, 1]], axis=1)


def toy_actions(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.uniform(-1, 1, (6, 2)).astype(np.float32), rng.uniform(-1, 1, (6, 2)).astype(np.float32)


def toy_loss(actions: Any, data_actions: Any, bc_weight: float, factor: float = 1.0, **hp: float) -> Any:
    return td3_bc.actor_loss(actions, data_actions, factor * toy_q(actions), bc_weight, HP._replace(**hp))[0]


toy_gradient = jax.grad(toy_loss)


def test_alpha_zero_is_behaviour_cloning() -> None:
    actions = jnp.array([[0.5, -0.25], [0.0, 1.0], [-0.5, 0.75], [0.25, 0.0]])  # so that every sum below is exact
    data_actions = jnp.array([[0.0, 0.25], [0.5, 0.5], [-1.0, 0.5], [0.25, -1.0]])
    squares = [0.25, 0.25, 0.25, 0.25, 0.25, 0.0625, 0.0, 1.0]
    assert toy_loss(actions, data_actions, 1.0, alpha=0.0) == sum(squares) / 8, "the mean over rows and dimensions"
    gradient = toy_gradient(actions, data_actions, 1.0, alpha=0.0)
    np.testing.assert_array_equal(gradient, 2 * (np.asarray(actions) - np.asarray(data_actions)) / 8)


def test_without_the_imitation_the_direction_is_that_of_td3() -> None:
    actions, data_actions = toy_actions()
    plain = -toy_slope(actions) / 6  # the gradient of TD3's loss, -mean Q
    ours = toy_gradient(actions, data_actions, 0.0, alpha=1.7)
    np.testing.assert_allclose(ours, plain * 1.7 / np.abs(toy_q(actions)).mean(), rtol=1e-5)


@pytest.mark.parametrize("factor", [1e-3, 7.0, 1e4])
def test_the_size_of_the_q_values_does_not_matter(factor: float) -> None:
    actions, data_actions = toy_actions()
    one, other = (toy_loss(actions, data_actions, 1.0, factor=f) for f in (1.0, factor))
    assert other == pytest.approx(float(one), rel=1e-5)
    one, other = (toy_gradient(actions, data_actions, 1.0, factor=f) for f in (1.0, factor))
    np.testing.assert_allclose(one, other, rtol=1e-4)
    flipped = toy_gradient(actions, data_actions, 0.0, factor=-factor)
    np.testing.assert_allclose(flipped, -toy_gradient(actions, data_actions, 0.0), rtol=1e-4)


@pytest.mark.parametrize("alpha", [0.5, 2.5])
def test_the_share_of_the_q_values_is_at_most_alpha(alpha: float) -> None:
    rng = np.random.default_rng(1)

    def share(q: np.ndarray) -> float:
        zeros = jnp.zeros((len(q), 2))
        return float(td3_bc.actor_loss(zeros, zeros, jnp.asarray(q), 1.0, HP._replace(alpha=alpha))[0])

    for offset in (-2.0, -0.5, 0.0, 0.5, 2.0):
        q = rng.normal(offset, 1.0, 50)
        assert abs(share(q)) <= alpha + 1e-6
        assert share(q) == pytest.approx(-alpha * q.mean() / np.abs(q).mean(), rel=1e-4)
        assert share(np.abs(q)) == pytest.approx(-alpha) and share(-np.abs(q)) == pytest.approx(alpha)


def test_the_scale_is_a_constant_for_the_gradient() -> None:
    """Central differences of the loss in float64, once with the scale held and once with the scale following."""
    actions, data_actions = (x.astype(np.float64) for x in toy_actions(2))
    held = 2.5 / np.abs(toy_q(actions)).mean()

    def loss(a: np.ndarray, scale: float | None) -> float:
        q = toy_q(a)
        scale = 2.5 / np.abs(q).mean() if scale is None else scale
        return -scale * q.mean() + 0.7 * ((a - data_actions) ** 2).mean()

    def differences(scale: float | None) -> np.ndarray:
        result = np.zeros_like(actions)
        for index in np.ndindex(actions.shape):
            step = np.zeros_like(actions)
            step[index] = 1e-6
            result[index] = (loss(actions + step, scale) - loss(actions - step, scale)) / 2e-6
        return result

    ours = toy_gradient(actions.astype(np.float32), data_actions.astype(np.float32), 0.7)
    np.testing.assert_allclose(ours, differences(held), rtol=1e-3, atol=1e-5)
    assert np.abs(ours - differences(None)).max() > 0.05


def test_losses_do_not_broadcast() -> None:
    with pytest.raises(AssertionError):
        td3_bc.critic_loss(jnp.zeros((2, 4)), jnp.zeros((4, 1)))
    with pytest.raises(AssertionError):
        td3_bc.actor_loss(jnp.zeros((4, 1)), jnp.zeros(4), jnp.zeros(4), 1.0, HP)


def test_policy_follows_the_first_of_the_new_critics_at_its_own_actions() -> None:
    state, batch = unsettled()._replace(step=jnp.int32(1)), ROWS[0]
    hp = HP._replace(critic_learning_rate=0.1)
    after, info = update(state, batch, hp, ARGS)

    def mean_size(critics: Any, k: int, actions: Any) -> float:
        q = numpy_mlp(double(critics["params"]["VmapMLP_0"], k), np.hstack([batch.observations, actions]))[0]
        return float(np.abs(q).mean())

    own = np.tanh(numpy_mlp(double(state.actor["params"]["MLP_0"]), batch.observations)[0])
    assert values_of(info)["actor/q_scale"] == pytest.approx(HP.alpha / mean_size(after.critic, 0, own), rel=1e-4)
    # None of these would do: the old critic, the second one, the target, the dataset's actions.
    others = [(state.critic, 0, own), (after.critic, 1, own), (after.target_critic, 0, own)]
    for other in [*others, (after.critic, 0, batch.actions)]:
        assert mean_size(*other) != pytest.approx(mean_size(after.critic, 0, own), rel=1e-2)

    def with_other(k: int) -> td3_bc.State:
        factors = np.where(np.arange(ARGS.num_critics) == k, np.float32(-1.5), np.float32(1.0))
        critic = jax.tree.map(lambda x: (np.asarray(x).T * factors).T, state.critic)
        return update(state._replace(critic=critic), batch, hp, ARGS)[0]

    assert trees_equal(with_other(1).actor, after.actor) and not trees_equal(with_other(0).actor, after.actor)


# ---- the target policy's actions ----

MANY = 100_000


def smoothed(actions: Any, seed: int = 0, **hp: float) -> np.ndarray:
    key = jax.random.key(seed)
    return np.asarray(td3_bc.smoothed_actions(key, jnp.asarray(actions, jnp.float32), HP._replace(**hp)))


def test_noise_on_target_actions_is_a_clipped_gaussian() -> None:
    noise = smoothed(np.zeros((MANY, 2)), policy_noise=0.2, noise_clip=0.5)
    assert np.abs(noise).max() == 0.5
    at_the_clip = 2 * stats.norm.sf(0.5 / 0.2)
    np.testing.assert_allclose((np.abs(noise) == 0.5).mean(axis=0), at_the_clip, rtol=0.1)
    free = smoothed(np.zeros((MANY, 2)), policy_noise=0.2, noise_clip=1.0)  # five standard deviations
    np.testing.assert_allclose(free.std(axis=0), 0.2, rtol=0.01)
    np.testing.assert_allclose(free.mean(axis=0), 0.0, atol=0.003)
    assert stats.kstest(free[:, 0] / 0.2, "norm").pvalue > 1e-4
    assert abs(np.corrcoef(free.T)[0, 1]) < 0.02 and abs(np.corrcoef(free[1:, 0], free[:-1, 0])[0, 1]) < 0.02
    assert (free != smoothed(np.zeros((MANY, 2)), seed=1, noise_clip=1.0)).any(axis=1).all()


@pytest.mark.parametrize("noise_clip", [0.0, 0.3, 0.5])
def test_smoothed_actions_stay_in_bounds_and_close(noise_clip: float) -> None:
    actions = np.random.default_rng(0).uniform(-1, 1, (MANY, 2)).astype(np.float32)
    result = smoothed(actions, policy_noise=2.0, noise_clip=noise_clip)
    assert np.abs(result).max() <= 1.0
    assert np.abs(result - actions).max() == pytest.approx(noise_clip, abs=1e-6)
    inside = np.abs(actions) < 1.0 - noise_clip  # the bounds never act there: noise of both signs, unbiased
    if noise_clip:
        assert (np.abs(result) == 1.0).any() and abs((result - actions)[inside].mean()) < 0.01


def test_without_noise_the_target_policy_itself_acts() -> None:
    actions = np.random.default_rng(0).uniform(-1, 1, (50, 2)).astype(np.float32)
    np.testing.assert_array_equal(smoothed(actions, policy_noise=0.0), actions)


def test_noise_is_fresh_at_every_update() -> None:
    """With rates of 0 the networks stand still: only the noise can change the loss on one batch."""

    def losses(**hp: float) -> list[float]:
        state, result = fresh(), []
        for _ in range(4):
            still = HP._replace(critic_learning_rate=0.0, actor_learning_rate=0.0, **hp)
            state, info = update(state, ROWS[0], still, ARGS)
            result.append(float(info["critic/loss"]))
        return result

    assert len(set(losses(policy_noise=0.5))) == 4 and len(set(losses(policy_noise=0.0))) == 1


# ---- an independent numpy version of the whole update ----


def double(tree: Any, member: int | None = None) -> Any:
    """In float64, and of an ensemble's parameters those of one member."""
    return jax.tree.map(lambda x: np.asarray(x if member is None else x[member], np.float64), tree)


class NumpyTD3BC:
    """TD3+BC in float64, one network at a time, written from the equations."""

    def __init__(self, state: td3_bc.State, hp: td3_bc.Hyperparameters, args: td3_bc.Args) -> None:
        members = range(args.num_critics)
        self.hp, self.delay, self.count = hp, args.policy_delay, 0
        self.actor, self.target_actor = (double(x["params"]["MLP_0"]) for x in (state.actor, state.target_actor))
        self.critics = [double(state.critic["params"]["VmapMLP_0"], k) for k in members]
        self.targets = [double(state.target_critic["params"]["VmapMLP_0"], k) for k in members]
        self.actor_adam = NumpyAdam(hp.actor_learning_rate)
        self.critic_adams = [NumpyAdam(hp.critic_learning_rate) for _ in members]

    def update(self, batch: Transitions, standard_normal: np.ndarray, bc_weight: float) -> dict[str, float]:
        hp, n = self.hp, len(batch.rewards)
        s, a, r, s2, done, _ = (np.asarray(x, np.float64) for x in batch)
        noise = np.clip(hp.policy_noise * standard_normal, -hp.noise_clip, hp.noise_clip)
        a2 = np.clip(np.tanh(numpy_mlp(self.target_actor, s2)[0]) + noise, -1, 1)
        sa, sa2 = np.hstack([s, a]), np.hstack([s2, a2])
        y = r + hp.discount * (1 - done) * np.min([numpy_mlp(target, sa2)[0][:, 0] for target in self.targets], axis=0)
        qs = []
        for k, critic in enumerate(self.critics):
            q, inputs = numpy_mlp(critic, sa)
            self.critics[k] = self.critic_adams[k].step(
                critic, numpy_gradients(critic, inputs, 2 * (q - y[:, None]) / n)
            )
            qs.append(q[:, 0])
        info = {"critic/loss": sum(np.mean((q - y) ** 2) for q in qs), "critic/q_mean": np.mean(qs)}
        info["critic/q_std"] = np.std(qs, axis=0).mean()
        self.count += 1
        if self.count % self.delay != 0:
            return info

        def first_q(actions: np.ndarray) -> np.ndarray:
            return numpy_mlp(self.critics[0], np.hstack([s, actions]))[0][:, 0]

        u, inputs = numpy_mlp(self.actor, s)
        pi = np.tanh(u)
        q, steps = first_q(pi), 1e-6 * np.eye(ACT)
        slope = np.stack([(first_q(pi + step) - first_q(pi - step)) / 2e-6 for step in steps], axis=1)
        scale = hp.alpha / np.abs(q).mean()
        delta = -scale * slope / n + bc_weight * 2 * (pi - a) / (n * ACT)
        self.actor = self.actor_adam.step(self.actor, numpy_gradients(self.actor, inputs, delta * (1 - pi**2)))

        def moved(target: dict, new: dict) -> dict:
            return jax.tree.map(lambda t, p: (1 - hp.polyak) * t + hp.polyak * p, target, new)

        self.target_actor = moved(self.target_actor, self.actor)
        self.targets = [moved(*pair) for pair in zip(self.targets, self.critics, strict=True)]
        imitation = np.mean((pi - a) ** 2)
        loss = -scale * q.mean() + bc_weight * imitation
        return info | {
            "actor/loss": loss,
            "actor/bc_loss": imitation,
            "actor/bc_weight": bc_weight,
            "actor/q_scale": scale,
        }


@pytest.mark.parametrize(("num_critics", "online"), [(1, True), (2, False), (5, False)])
def test_update_equals_an_independent_numpy_version(num_critics: int, online: bool) -> None:
    """Parameters, targets and metrics after each of 7 updates, with noise that often meets its clip."""
    args = SIZES[num_critics]
    hp = HP._replace(alpha=1.7, discount=0.9, polyak=0.3, policy_noise=0.4, noise_clip=0.5, online_bc_weight=0.55)
    hp = hp._replace(actor_learning_rate=1e-2, critic_learning_rate=2e-2)
    state = unsettled(args)
    reference = NumpyTD3BC(state, hp, args)
    for i, batch in enumerate(ROWS):
        noise_key = jax.random.split(state.key)[1]
        bc_weight = max(1 - i / 10, 0.55) if online else 1.0
        expected = reference.update(batch, np.asarray(jax.random.normal(noise_key, (BATCH, ACT))), bc_weight)
        state, info = update(state, batch, hp, args, online=online)
        assert values_of(info) == pytest.approx(expected, rel=2e-3)
        networks = (state.actor, state.target_actor)
        ours = [x["params"]["MLP_0"] for x in networks]
        assert_trees_close(ours, [reference.actor, reference.target_actor], rtol=2e-3, atol=2e-4)
        for tree, theirs in ((state.critic, reference.critics), (state.target_critic, reference.targets)):
            ours = [double(tree["params"]["VmapMLP_0"], k) for k in range(num_critics)]
            assert_trees_close(ours, theirs, rtol=2e-3, atol=2e-4)
    assert int(state.step) == 7 and not trees_equal(state.actor, fresh(args).actor)


# ---- the critics' targets ----


@pytest.mark.parametrize("values", [[-1.0], [2.0, -1.0], [0.5, 3.0, -2.0, 1.0, 0.0]])
def test_target_is_the_least_of_all_target_critics_where_no_termination_is(values: list[float]) -> None:
    args, batch = SIZES[len(values)], ROWS[0]
    state = fresh(args)
    zero = [0.0] * len(values)
    state = state._replace(
        critic=with_constant_critics(state.critic, zero),
        target_critic=with_constant_critics(state.target_critic, values),
    )
    loss = update(state, batch, HP._replace(discount=0.5), args)[1]["critic/loss"]
    # Kinds of random_batch: rows 0, 3, ... go on, 1, 4, ... are terminations, 2, 5, ... truncations.
    bootstrapped = np.arange(BATCH) % 3 != 1
    targets = np.asarray(batch.rewards, np.float64) + np.where(bootstrapped, 0.5 * min(values), 0.0)
    assert float(loss) == pytest.approx(len(values) * np.mean(targets**2), rel=1e-5)


def test_targets_depend_on_the_next_state_and_the_target_networks_alone() -> None:
    """A critic that is 0 everywhere has the mean square of the targets as its loss."""
    state, batch = unsettled(), ROWS[0]
    state = state._replace(critic=with_constant_critics(state.critic, [0.0, 0.0]))
    other = fresh(seed=2)

    def loss(state: td3_bc.State = state, **changes: np.ndarray) -> float:
        return float(update(state, batch._replace(**changes), HP, ARGS)[1]["critic/loss"])

    assert loss(observations=-batch.observations) == loss(actions=-batch.actions) == loss()
    assert loss(state._replace(actor=other.actor)) == loss(truncations=1.0 - batch.truncations) == loss()
    assert loss(next_observations=-batch.next_observations) != loss()
    assert loss(state._replace(target_actor=other.actor)) != loss()
    assert loss(state._replace(target_critic=other.critic)) != loss()


def test_the_next_state_matters_but_after_a_termination() -> None:
    """Inverted masks would fail both ways: whole critics are compared, to the last bit."""
    batch = ROWS[0]

    def critic_with_other_successor(rows: np.ndarray) -> Any:
        changed = np.where(rows[:, None] > 0, -batch.next_observations, batch.next_observations)
        return update(unsettled(), batch._replace(next_observations=changed), HP, ARGS)[0].critic

    plain = update(unsettled(), batch, HP, ARGS)[0].critic
    assert trees_equal(plain, critic_with_other_successor(batch.terminations))
    assert not trees_equal(plain, critic_with_other_successor(batch.truncations))
    assert not trees_equal(plain, critic_with_other_successor(1.0 - batch.terminations - batch.truncations))


def test_networks_start_with_copies_as_targets_and_a_uniform_kernel() -> None:
    args = SIZES[5]
    state = fresh(args)
    assert trees_equal(state.actor, state.target_actor) and trees_equal(state.critic, state.target_critic)
    assert int(state.step) == int(state.online_step) == int(state.actor_opt.count) == int(state.critic_opt.count) == 0
    for tree, inputs in ((state.actor["params"]["MLP_0"], OBS), (state.critic["params"]["VmapMLP_0"], OBS + ACT)):
        for i, fan_in in enumerate([inputs, args.hidden_dim]):
            size = np.abs(tree[f"Dense_{i}"]["kernel"]).max()
            assert 0.7 / np.sqrt(fan_in) < size <= 1 / np.sqrt(fan_in)
            assert not np.any(tree[f"Dense_{i}"]["bias"])
    critics = [double(state.critic["params"]["VmapMLP_0"], k) for k in range(5)]
    for one, other in itertools.combinations(critics, 2):
        assert np.abs(one["Dense_0"]["kernel"] - other["Dense_0"]["kernel"]).max() > 0.1


# ---- the delay ----


@pytest.mark.parametrize("num_critics", [1, 2, 5])
def test_policy_and_targets_move_at_every_dth_update_only(num_critics: int) -> None:
    args = SIZES[num_critics]
    hp = HP._replace(polyak=0.1, actor_learning_rate=1e-2, critic_learning_rate=1e-2)
    state = fresh(args)
    for i, batch in enumerate(ROWS, start=1):
        old = state
        state, info = update(state, batch, hp, args)
        assert int(state.step) == int(state.critic_opt.count) == i, "one update of the critic for each count"
        assert not trees_equal(old.critic, state.critic)
        assert int(state.actor_opt.count) == i // args.policy_delay
        due = i % args.policy_delay == 0
        assert due == ("actor/loss" in values_of(info))
        for name in ("actor", "actor_opt", "target_actor", "target_critic"):
            assert trees_equal(getattr(old, name), getattr(state, name)) != due, name
        if due:
            for new, target, before in (
                (state.actor, state.target_actor, old.target_actor),
                (state.critic, state.target_critic, old.target_critic),
            ):
                expected = jax.tree.map(lambda t, p: 0.9 * np.asarray(t, np.float64) + 0.1 * p, before, new)
                assert_trees_close(target, expected, rtol=1e-5, atol=1e-7)


def test_the_delay_goes_on_across_chunks() -> None:
    data = Replay(DATA)
    whole, _ = train(fresh(), HP, data, 7, ARGS)
    state = fresh()
    for length in (1, 2, 4):
        state, _ = train(state, HP, data, length, ARGS)
    assert trees_equal(state._replace(key=0), whole._replace(key=0)) and int(whole.actor_opt.count) == 3


def test_members_are_delayed_by_their_own_counts() -> None:
    states = [unsettled()._replace(step=np.int32(step)) for step in range(len(VARIANTS))]
    keys = jnp.stack([state.key for state in states])
    states = jax.tree.map(lambda *x: np.stack(x), *(state._replace(key=0) for state in states))._replace(key=keys)
    after, info = update_members(states, ROWS[0], jax.tree.map(lambda x: np.full(len(VARIANTS), x, np.float32), HP))
    due = [step % 2 == 1 for step in range(len(VARIANTS))]
    assert info["actor/loss"][1].tolist() == due
    for name in ("actor", "actor_opt", "target_actor", "target_critic"):
        pairs = zip(jax.tree.leaves(getattr(states, name)), jax.tree.leaves(getattr(after, name)), strict=True)
        changed = np.any([[(x != y).any() for x, y in zip(*pair, strict=True)] for pair in pairs], axis=0)
        assert changed.tolist() == due, name


# ---- training ----


def test_train_equals_a_loop_of_updates_on_minibatches_of_their_own() -> None:
    data = Replay(jax.tree.map(jnp.asarray, DATA))
    trained, metrics = train(fresh(), HP, data, 7, ARGS)
    state, history = fresh(), []
    for _ in range(7):
        key, sample_key = jax.random.split(state.key)
        batch = replay.sample(sample_key, data, BATCH)
        state, info = update(state._replace(key=key), batch, HP, ARGS)
        history.append(values_of(info))
    assert_trees_close(trained._replace(key=0), state._replace(key=0))
    assert trees_equal(jax.random.key_data(trained.key), jax.random.key_data(state.key))
    counts = {"critic": 7, "actor": 3}  # updates 2, 4 and 6 have the policy's metrics, and means are over those
    assert {name.split("/")[0] for name in means(metrics)} == set(counts)
    for name, mean in means(metrics).items():
        present = [one[name] for one in history if name in one]
        assert len(present) == int(metrics.counts[name]) == counts[name.split("/")[0]]
        assert float(mean) == pytest.approx(np.mean(present), rel=1e-4), name


def test_a_chunk_without_an_update_of_the_policy_has_no_metrics_of_it() -> None:
    metrics = train(fresh(), HP, Replay(DATA), 1, ARGS)[1]
    assert int(metrics.counts["actor/loss"]) == 0 and np.isnan(float(means(metrics)["actor/loss"]))
    assert np.isfinite(float(means(metrics)["critic/loss"])) and np.isfinite(float(metrics.sums["actor/loss"]))


# ---- fine-tuning ----


def online_data() -> Replay:
    ring = replay.insert(replay.empty_ring(BATCH, OBS, ACT), ROWS[1])
    return Replay(jax.tree.map(jnp.asarray, DATA), ring)


def test_every_hyperparameter_of_the_updates_matters() -> None:
    """The members start alike, late in an online phase, and after two policy updates none is like the first."""
    states = jax.tree.map(lambda x: jnp.stack([x] * len(VARIANTS)), unsettled()._replace(online_step=jnp.int32(9)))
    hp = jax.tree.map(lambda *x: np.array(x, np.float32), *VARIANTS)
    for batch in ROWS[:4]:
        states, _ = update_members(states, batch, hp)
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(states._replace(key=states.step))]
    matters = {name: any((x[i] != x[0]).any() for x in leaves) for i, name in enumerate(HP._fields, start=1)}
    assert matters == {name: name != "exploration_noise" for name in HP._fields}


@pytest.mark.parametrize("least", [0.0, 0.3, 0.5, 1.0])
def test_the_imitation_weighs_linearly_less_online(least: float) -> None:
    args, hp = replace(ARGS, online_steps=100), HP._replace(online_bc_weight=least)
    weights = [float(td3_bc.decayed_bc_weight(jnp.asarray(step), hp, args)) for step in range(0, 131, 10)]
    np.testing.assert_allclose(weights[:11], [max(1 - tenth / 10, least) for tenth in range(11)], atol=1e-6)
    assert weights[0] == 1.0 and weights[11:] == pytest.approx([least] * 3)
    scratch = replace(args, num_updates=0, random_steps=60)  # of whose steps 40 make an update
    assert float(td3_bc.decayed_bc_weight(jnp.asarray(20), hp, scratch)) == pytest.approx(max(0.5, least))


def test_the_imitation_weighs_1_offline_at_any_step() -> None:
    hp = HP._replace(online_bc_weight=0.0)
    state, info = update(fresh()._replace(step=jnp.int32(999_999)), ROWS[0], hp, ARGS)
    assert values_of(info)["actor/bc_weight"] == 1.0 and int(state.online_step) == 0
    assert td3_bc.decayed_bc_weight(state.online_step, hp, replace(ARGS, online_steps=0)) == 1.0


def test_the_imitation_falls_with_the_online_updates_alone() -> None:
    hp = HP._replace(online_bc_weight=0.7)
    state, metrics = train(fresh(), hp, Replay(DATA), 5, ARGS)
    assert float(means(metrics)["actor/bc_weight"]) == 1.0 and (int(state.step), int(state.online_step)) == (5, 0)
    state, metrics = train(state, hp, online_data(), 5, ARGS)
    assert (int(state.step), int(state.online_step), int(state.actor_opt.count)) == (10, 5, 5)
    # The policy's updates are those of steps 6, 8 and 10, after 0, 2 and 4 online updates.
    assert int(metrics.counts["actor/bc_weight"]) == 3
    assert float(means(metrics)["actor/bc_weight"]) == pytest.approx((1.0 + 0.8 + 0.7) / 3, rel=1e-5)


# ---- acting ----


def actions_of(state: td3_bc.State, observations: Any, seed: int, sample: bool, **hp: float) -> np.ndarray:
    key = jax.random.key(seed)
    return np.asarray(act(state, HP._replace(**hp), observations, key, ARGS, ACT, sample))


def test_evaluation_is_the_policy_without_noise() -> None:
    state, observations = unsettled(), ROWS[0].observations
    expected = np.tanh(numpy_mlp(double(state.actor["params"]["MLP_0"]), np.asarray(observations))[0])
    still = actions_of(state, observations, 0, sample=False, exploration_noise=0.5)
    np.testing.assert_allclose(still, expected, atol=1e-5)
    np.testing.assert_array_equal(still, actions_of(state, observations, 1, sample=False, exploration_noise=0.5))
    np.testing.assert_array_equal(still, actions_of(state, observations, 2, sample=True, exploration_noise=0.0))


def test_exploration_noise_is_gaussian_and_the_actions_stay_in_bounds() -> None:
    state, one = unsettled(), ROWS[0].observations[:1]
    mean = actions_of(state, one, 0, sample=False)
    assert np.abs(mean).max() < 0.5  # five standard deviations inside the bounds
    noise = actions_of(state, np.repeat(one, 20_000, axis=0), 1, sample=True) - mean
    np.testing.assert_allclose(noise.std(axis=0), 0.1, rtol=0.03)
    np.testing.assert_allclose(noise.mean(axis=0), 0.0, atol=0.004)
    assert np.abs(noise).max() > 0.3, "not clipped as the target policy's noise might be"
    wild = actions_of(state, np.repeat(one, 1000, axis=0), 1, sample=True, exploration_noise=5.0)
    assert wild.min() == -1.0 and wild.max() == 1.0


# ---- learning, where the answer is known ----

LEARNER = replace(ARGS, hidden_dim=16)


@jax.jit
def learn(
    state: td3_bc.State, batch: Transitions, hp: td3_bc.Hyperparameters, num_updates: int, waiting: int
) -> td3_bc.State:
    """Updates on a whole dataset of 240 rows; the policy waits for the Q-functions, whose beginnings lead anywhere."""

    def step(i: jax.Array, state: td3_bc.State) -> td3_bc.State:
        now = hp._replace(actor_learning_rate=jnp.where(i < waiting, 0.0, hp.actor_learning_rate))
        return td3_bc.update(state, batch, now, LEARNER)[0]

    return jax.lax.fori_loop(0, num_updates, step, state)


def test_policy_of_a_bandit_is_the_balance_of_reward_and_imitation() -> None:
    """Rewards 0.6 + slope a, episodes of one step, and data around a linear behaviour policy b(s).

    With pi(s) = b(s) + scale slope the loss -scale mean Q + mean |pi - b|^2 / 2, in two dimensions, is least, and the
    mean of Q is 0.6 + slope mean b + scale |slope|^2. That scale times this mean is alpha gives the scale. Where alpha
    is so large that this leaves the bounds, the policy is at the corner of the highest reward.
    """
    rng = np.random.default_rng(0)
    states = np.repeat(rng.uniform(-1, 1, (30, 5)), 8, axis=0)
    behaviour = states[:, :2] @ np.array([[0.3, -0.1], [0.1, 0.25]])
    spread = rng.uniform(-0.6, 0.6, (30, 4, 2))
    actions = behaviour + np.concatenate([spread, -spread], axis=1).reshape(-1, 2)  # their mean is b(s), exactly
    slope = np.array([0.3, -0.4])
    batch = Transitions(
        observations=states,
        actions=actions,
        rewards=0.6 + actions @ slope,
        next_observations=rng.normal(size=states.shape),  # must not matter
        terminations=np.ones(len(states)),
        truncations=np.zeros(len(states)),
    )
    batch = jax.tree.map(np.float32, batch)
    level, square = 0.6 + behaviour.mean(axis=0) @ slope, slope @ slope
    start = fresh(LEARNER, obs_dim=5)
    for alpha in (0.0, 0.3, 1.0, 100.0):
        hp = HP._replace(alpha=alpha, actor_learning_rate=2e-3, critic_learning_rate=3e-3)
        actor = double(learn(start, batch, hp, 1500, 500).actor["params"]["MLP_0"])
        policy = np.tanh(numpy_mlp(actor, states)[0])
        scale = (np.sqrt(level**2 + 4 * square * alpha) - level) / (2 * square)
        if alpha < 100.0:
            assert np.sqrt(((policy - behaviour - scale * slope) ** 2).mean()) < 0.04
        else:
            assert (policy * np.sign(slope)).min() > 0.95


def test_critics_on_a_tabular_mdp_evaluate_the_target_policy() -> None:
    """Against linear equations for the Q of a policy that stands still and whose actions are in the data.

    Every critic must find it: the minimum over critics that agree takes nothing away.
    """
    discount = 0.8
    rng = np.random.default_rng(3)
    start = fresh(LEARNER, obs_dim=5)
    one_hot = np.eye(5, dtype=np.float32)
    policy = np.tanh(numpy_mlp(double(start.actor["params"]["MLP_0"]), one_hot)[0])
    # In each of 5 states the policy's action comes first, then 3 others.
    actions = np.concatenate([policy[:, None], rng.uniform(-1, 1, (5, 3, ACT))], axis=1)
    successors, rewards = rng.integers(0, 5, (5, 4)), rng.uniform(-1, 1, (5, 4))
    terminal, truncated = np.zeros((5, 4), bool), np.zeros((5, 4), bool)
    terminal[2, 0] = terminal[1, 2] = truncated[0, 0] = truncated[3, 1] = True

    goes_on = discount * ~terminal
    values = np.linalg.solve(np.eye(5) - goes_on[:, :1] * np.eye(5)[successors[:, 0]], rewards[:, 0])
    exact = (rewards + goes_on * values[successors]).ravel()
    assert np.ptp(exact) > 1.0 and np.abs(exact - rewards.ravel()).max() > 0.3

    batch = Transitions(
        observations=np.repeat(one_hot, 4, axis=0),
        actions=actions.reshape(-1, ACT),
        rewards=rewards.ravel(),
        next_observations=one_hot[successors.ravel()],
        terminations=terminal.ravel(),
        truncations=truncated.ravel(),
    )
    batch = jax.tree.map(lambda x: np.concatenate([np.float32(x)] * 12), batch)
    hp = HP._replace(discount=discount, polyak=0.1, policy_noise=0.0, critic_learning_rate=3e-3)
    state = learn(start, batch, hp, 2000, 2000)
    assert trees_equal(state.actor, start.actor) and not trees_equal(state.critic, start.critic)
    for k in range(LEARNER.num_critics):
        critic = double(state.critic["params"]["VmapMLP_0"], k)
        q = numpy_mlp(critic, np.hstack([batch.observations, batch.actions])[:20])[0]
        np.testing.assert_allclose(q[:, 0], exact, atol=0.03)


@pytest.mark.parametrize("name", ["online_bc_weight", "exploration_noise"])
def test_what_only_the_online_phase_uses_is_swept_with_one_alone(name: str) -> None:
    swept = replace(ARGS, grid=f"{name}=0,0.5")
    swept.validate()
    with pytest.raises(UsageError, match=f"{name} has no effect with --online-steps 0"):
        replace(swept, online_steps=0).validate()
