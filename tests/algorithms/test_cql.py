"""CQL's mathematics against closed forms, exact integrals and a straightforward version written from the equations."""

import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, special, stats

from algorithms import cql
from common import cli
from common.cli import UsageError
from common.replay import Transitions

OBS, ACT, BATCH, NUM = 4, 2, 12, 3
ARGS = cql.Args(hidden_dim=8, num_layers=1, critic_layers=2, batch_size=BATCH, num_actions=NUM)
HP = cql.Hyperparameters()
OPTIONS = replace(ARGS, num_critics=3, lagrange=True, max_backup=True, entropy_backup=True, gap_floor=3.5)
WARM_START = replace(ARGS, num_critics=1, bc_updates=1)
update = jax.jit(cql.update, static_argnames="args")
init = jax.jit(cql.init, static_argnums=(2, 3, 4))
penalised_actions = jax.jit(cql.penalised_actions, static_argnums=3)
critic_loss = jax.jit(cql.critic_loss, static_argnums=5)
data_log_prob = jax.jit(cql.data_log_prob)


def random_batch(seed: int = 0, size: int = BATCH) -> Transitions:
    rng = np.random.default_rng(seed)
    kinds = np.arange(size) % 3  # neither flag, termination, truncation
    actions = rng.uniform(-1, 1, (size, ACT)).astype(np.float32)
    actions[0] = [1.0, -1.0]  # bounds, as a policy's saturated actions are stored
    batch = Transitions(
        observations=rng.standard_normal((size, OBS), np.float32),
        actions=actions,
        rewards=rng.standard_normal(size, np.float32),
        next_observations=rng.standard_normal((size, OBS), np.float32),
        terminations=(kinds == 1).astype(np.float32),
        truncations=(kinds == 2).astype(np.float32),
    )
    return jax.tree.map(jnp.asarray, batch)


def fresh(args: cql.Args = ARGS, seed: int = 0) -> cql.State:
    """A state as after some updates: no two networks alike, last layers not near 0, no scalar at its start."""
    state, other = (init(jax.random.key(s), HP, OPTIONS, OBS, ACT) for s in (seed, seed + 100))
    heads = (state.actor["params"]["MLP_0"], *(s.critic["params"]["VmapMLP_0"] for s in (state, other)))
    for layers in heads:
        last = layers[f"Dense_{len(layers) - 1}"]
        last["kernel"] = 100.0 * last["kernel"]
    state.actor["params"] |= {"log_std_scale": jnp.float32(0.8), "log_std_offset": jnp.float32(-0.3)}

    def of_critics(tree: object) -> object:
        return jax.tree.map(lambda x: np.asarray(x)[: args.num_critics] if x.ndim else x, tree)

    return state._replace(
        critic=of_critics(state.critic),
        target_critic=of_critics(other.critic),
        critic_opt=of_critics(state.critic_opt),
        log_alpha=jnp.float32(-0.5),
    )


def gradient(opt_state: object) -> object:
    """The gradient of the first update, from Adam's first moment."""
    return jax.tree.map(lambda x: 10.0 * np.asarray(x), opt_state.mu)


def bits_equal(a: object, b: object) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def assert_close(a: object, b: object, rtol: float = 2e-4, atol: float = 2e-5) -> None:
    jax.tree.map(partial(np.testing.assert_allclose, rtol=rtol, atol=atol), a, b)


# ---- a straightforward version: one pass for each kind of actions, states repeated, one critic after the other ----


def mlp(params: dict, x: jax.Array) -> jax.Array:
    for i in range(len(params)):
        x = x @ params[f"Dense_{i}"]["kernel"] + params[f"Dense_{i}"]["bias"]
        x = jnp.where(x > 0.0, x, 0.0) if i < len(params) - 1 else x
    return x


def policy_of(params: dict, observations: jax.Array) -> tuple[jax.Array, jax.Array]:
    params = params["params"]
    outputs = mlp(params["MLP_0"], observations)
    log_std = params["log_std_scale"] * outputs[..., ACT:] + params["log_std_offset"]
    return outputs[..., :ACT], jnp.exp(jnp.clip(log_std, -20.0, 2.0))


def density(u: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
    """log p(tanh u), by the change of variables."""
    normal = -0.5 * ((u - mean) / std) ** 2 - jnp.log(std) - 0.5 * math.log(2 * math.pi)
    return jnp.sum(normal - jnp.log(1.0 - jnp.tanh(u) ** 2), axis=-1)


def values(stacked: dict, num_critics: int, s: jax.Array, a: jax.Array) -> list[jax.Array]:
    members = [jax.tree.map(lambda x, k=k: x[k], stacked["params"]["VmapMLP_0"]) for k in range(num_critics)]
    return [mlp(member, jnp.concatenate([s, a], axis=-1))[..., 0] for member in members]


@partial(jax.jit, static_argnums=1)
def random_numbers(key: jax.Array, many: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Those that `update` draws: for the policy's loss, `many` next actions, the uniform actions, the policies'."""
    actor_key, next_key, penalty_key, _ = jax.random.split(key, 4)
    uniform_key, policy_key = jax.random.split(penalty_key)
    return (
        jax.random.normal(actor_key, (BATCH, ACT)),
        jax.random.normal(next_key, (many, BATCH, ACT)),
        jax.random.uniform(uniform_key, (NUM, BATCH, ACT), minval=-1.0, maxval=1.0),
        jax.random.normal(policy_key, (NUM, 2, BATCH, ACT)),
    )


@partial(jax.jit, static_argnames="args")
def straightforward(
    state: cql.State, batch: Transitions, hp: cql.Hyperparameters, args: cql.Args, drawn: tuple
) -> dict:
    """The gradients and the critic's loss of one update."""
    s, a, r, s2, done, _ = batch
    alpha, factor = jnp.exp(state.log_alpha), jnp.exp(state.log_factor)
    q_of = partial(values, num_critics=args.num_critics)
    noise, next_noise, uniform, penalty_noise = drawn
    many = len(next_noise)

    # Every row of a batch with its n actions beside it: states repeated, [batch * n, ...].
    def repeated(x: jax.Array, n: int) -> jax.Array:
        return jnp.repeat(x, n, axis=0)

    def rows(x: jax.Array) -> jax.Array:
        return jnp.swapaxes(x, 0, 1).reshape(-1, ACT)

    def sample(observations: jax.Array, noise: jax.Array) -> tuple[jax.Array, jax.Array]:
        mean, std = policy_of(state.actor, repeated(observations, len(noise)))
        u = mean + std * rows(noise)
        return jnp.tanh(u), density(u, mean, std)

    a2, log_a2 = sample(s2, next_noise)
    smallest = jnp.stack(q_of(state.target_critic, s=repeated(s2, many), a=a2)).min(axis=0).reshape(BATCH, many)
    v2 = smallest.max(axis=1)
    if args.entropy_backup:
        v2 = v2 - alpha * jnp.sum(jnp.where(smallest == v2[:, None], log_a2.reshape(BATCH, many), 0.0), axis=1)
    y = jnp.where(done > 0, r, r + hp.discount * v2)

    def critic_loss(params: dict) -> tuple[jax.Array, jax.Array]:
        kinds = [
            (rows(uniform), jnp.full(BATCH * NUM, ACT * math.log(0.5))),
            sample(s, penalty_noise[:, 0]),
            sample(s2, penalty_noise[:, 1]),
        ]
        q_kinds = [q_of(params, s=repeated(s, NUM), a=actions) for actions, _ in kinds]
        loss, gaps = 0.0, []
        for k, q in enumerate(q_of(params, s=s, a=a)):
            weights = [jnp.exp(q_kind[k] - log_p) for q_kind, (_, log_p) in zip(q_kinds, kinds, strict=True)]
            gap = jnp.log(jnp.concatenate([w.reshape(BATCH, NUM) for w in weights], axis=1).sum(axis=1)) - q
            if args.gap_floor is not None:
                gap = jnp.where(gap < args.gap_floor, args.gap_floor, gap)
            gaps.append(gap)
            weight = hp.conservative_weight * (factor if args.lagrange else 1.0)
            loss = loss + ((q - y) ** 2).mean() + weight * gap.mean()
        return loss, jnp.stack(gaps)  # [K, batch]

    def actor_loss(params: dict) -> tuple[jax.Array, jax.Array]:
        mean, std = policy_of(params, s)
        u = mean + std * noise
        log_prob = density(u, mean, std)
        value = jnp.stack(q_of(state.critic, s=s, a=jnp.tanh(u))).min(axis=0)
        if args.bc_updates > 0:  # called for the first update only
            value = density(jnp.arctanh(jnp.clip(a, -0.999, 0.999)), mean, std)
        return (alpha * log_prob - value).mean(), log_prob.mean()

    (loss, gaps), critic = jax.value_and_grad(critic_loss, has_aux=True)(state.critic)
    actor, log_prob = jax.grad(actor_loss, has_aux=True)(state.actor)
    return {
        "loss": loss,
        "gap": gaps.mean(),
        "floored": jnp.mean(gaps == (args.gap_floor or 0.0)),
        "critic": critic,
        "actor": actor,
        "log_alpha": -(log_prob + hp.target_entropy * ACT),
        "log_factor": -factor * hp.conservative_weight * (gaps.mean() - hp.target_gap),
    }


@pytest.mark.parametrize(
    "args",
    [pytest.param(ARGS, marks=pytest.mark.slow), WARM_START, OPTIONS],
    ids=["defaults", "one critic, warm start", "options"],
)
def test_update_equals_the_straightforward_version(args: cql.Args) -> None:
    """Two critics, one and three; losses and gradients."""
    batch, state = random_batch(1), fresh(args)
    hp = HP._replace(conservative_weight=2.0, target_entropy=-0.7, discount=0.9)
    after, info = update(state, batch, hp, args)
    expected = straightforward(state, batch, hp, args, random_numbers(state.key, NUM if args.max_backup else 1))
    assert float(info["critic/loss"]) == pytest.approx(float(expected["loss"]), rel=1e-4)
    assert float(info["critic/gap"]) == pytest.approx(float(expected["gap"]), rel=1e-4)
    assert_close(gradient(after.critic_opt), expected["critic"])
    assert_close(gradient(after.actor_opt), expected["actor"])
    assert float(gradient(after.alpha_opt)) == pytest.approx(float(expected["log_alpha"]), rel=1e-3)
    assert np.abs(jax.tree.leaves(expected["actor"])[1]).max() > 1e-3  # not a comparison of zeros
    if args.lagrange:
        assert float(gradient(after.factor_opt)) == pytest.approx(float(expected["log_factor"]), rel=1e-3)
        assert 0.1 < float(expected["floored"]) < 0.9, "the floor binds in some states and not in others"


def test_all_parameters_step_from_the_old_ones_at_their_own_rates() -> None:
    """Adam's first step moves every parameter by its rate, against the sign of a gradient of the old parameters."""
    hp = HP._replace(actor_learning_rate=1e-3, critic_learning_rate=2e-3, polyak=0.25)
    state = fresh(OPTIONS)
    after, _ = update(state, random_batch(1), hp, OPTIONS)
    for name, rate in (("actor", 1e-3), ("critic", 2e-3), ("alpha", 1e-3), ("factor", 2e-3)):
        field = name if name in ("actor", "critic") else f"log_{name}"
        before, moved = getattr(state, field), getattr(after, field)
        grads = gradient(getattr(after, f"{name}_opt"))
        step = jax.tree.map(lambda p, g, rate=rate: p - rate * g / (jnp.abs(g) + 1e-8), before, grads)
        assert_close(moved, step, atol=1e-6)
    target = jax.tree.map(lambda t, q: 0.75 * t + 0.25 * q, state.target_critic, after.critic)
    assert_close(after.target_critic, target, atol=1e-6)
    assert int(after.step) == 1


# ---- the parts in numpy ----


def test_critic_loss_in_numpy() -> None:
    rng = np.random.default_rng(0)
    q, y, sampled = rng.normal(size=(3, 5)), rng.normal(size=5), rng.normal(size=(3, 7, 5))
    log_p = rng.normal(size=(7, 5))
    gap = special.logsumexp(sampled - log_p, axis=1) - q
    for floor in (None, float(np.median(gap))):
        expected = np.mean(gap if floor is None else np.maximum(gap, floor), axis=1)
        loss, info = critic_loss(*map(jnp.asarray, (q, y, sampled, log_p)), 2.5, floor)
        assert loss == pytest.approx(((q - y) ** 2).mean(axis=1).sum() + 2.5 * expected.sum(), rel=1e-5)
        assert info["critic/gap"] == pytest.approx(expected.mean(), rel=1e-5)
        grads = jax.jit(jax.grad(lambda s, floor=floor: cql.critic_loss(q, y, s, log_p, 2.5, floor)[0]))(sampled)
        states = np.abs(grads).max(axis=1) > 0
        np.testing.assert_array_equal(states, np.ones_like(gap) if floor is None else gap > floor)


def test_penalty_moves_values_by_softmax_minus_one_hot() -> None:
    rng = np.random.default_rng(1)
    table, data, weight = rng.normal(size=6), 2, 4.0

    def penalty(table: jax.Array) -> jax.Array:
        """Of all six actions of one state, one of them in the data; without any squared error."""
        q = table[None, [data]]
        return cql.critic_loss(q, jax.lax.stop_gradient(q[0]), table[None, :, None], jnp.zeros((6, 1)), weight)[0]

    value, grads = jax.jit(jax.value_and_grad(penalty))(table)
    np.testing.assert_allclose(grads, weight * (special.softmax(table) - np.eye(6)[data]), rtol=1e-4, atol=1e-6)
    assert abs(float(grads.sum())) < 1e-5 and value > 0


def test_tabular_stationary_point() -> None:
    """2 beta (Q - B) + w (softmax(Q) - beta) = 0: an action is penalised where Q holds it likelier than the data do."""
    behaviour, backup, weight = np.array([1, 2, 5, 2]) / 10, jnp.array([1.0, -0.5, 0.3, 2.0]), 1.5
    data = np.repeat(np.arange(4), [1, 2, 5, 2])

    def loss(table: jax.Array) -> jax.Array:
        sampled = jnp.repeat(table[None, :, None], 10, axis=2)
        return cql.critic_loss(table[None, data], backup[data], sampled, jnp.zeros((4, 10)), weight)[0]

    descend = jax.jit(lambda q: jax.lax.fori_loop(0, 4000, lambda _, q: q - 0.2 * jax.grad(loss)(q), q))
    q = np.asarray(descend(backup), np.float64)
    np.testing.assert_allclose(q, backup - weight / 2 * (special.softmax(q) / behaviour - 1), atol=1e-4)
    assert np.abs(q - backup).max() > 0.3


@pytest.mark.parametrize("num_actions", [10, 2000])
def test_estimator_of_the_integral(num_actions: int) -> None:
    """One dimension: the sum of the weights is 3n times the integral of exp(Q), so the gap is log(3n) above its log."""

    def q(a: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
        return 1.5 * jnp.sin(4.0 * a) + a

    exact = integrate.quad(lambda a: math.exp(float(1.5 * np.sin(4.0 * a) + a)), -1, 1)[0]
    batch = 200_000 // num_actions
    mean = jnp.broadcast_to(jnp.array([-0.5, 1.0])[:, None, None], (2, batch, 1))
    actions, log_p = penalised_actions(jax.random.key(0), mean, jnp.full_like(mean, math.log(1.5)), num_actions)
    assert actions.shape == (3 * num_actions, batch, 1) and log_p.shape == (3 * num_actions, batch)
    weights = np.exp(np.asarray(q(actions)[..., 0] - log_p, np.float64))
    for kind in (weights[:num_actions], weights[num_actions::2], weights[num_actions + 1 :: 2]):
        assert kind.mean() == pytest.approx(exact, rel=0.02)  # each kind by itself: uniform, pi(.|s), pi(.|s')
    zeros = jnp.zeros((1, batch))
    gap = critic_loss(zeros, zeros[0], q(actions)[None, ..., 0], log_p, 1.0)[1]["critic/gap"]
    error = float(gap) - math.log(3 * num_actions) - math.log(exact)
    assert abs(error) < 0.005 if num_actions > 10 else -0.1 < error < 0.0  # Jensen: low for few actions


def test_gap_of_constant_values() -> None:
    """Q + log(3n) + d log 2 - Q(s, a): the volume of the box, three times n."""
    mean = jnp.zeros((2, 500, ACT))
    _, log_p = penalised_actions(jax.random.key(0), mean, mean, 500)
    q = jnp.full((1, 500), 7.0)
    gap = critic_loss(q, q[0], jnp.full((1, 1500, 500), 7.0), log_p, 1.0)[1]["critic/gap"]
    assert float(gap) == pytest.approx(math.log(1500) + ACT * math.log(2), abs=0.02)
    np.testing.assert_allclose(log_p[:500], -ACT * math.log(2), rtol=1e-6)


def test_penalised_actions_are_uniform_or_of_the_two_policies() -> None:
    rng = np.random.default_rng(2)
    mean, log_std = rng.normal(size=(2, 50, ACT)), rng.uniform(-1, 0, (2, 50, ACT))
    actions, log_p = map(np.asarray, penalised_actions(jax.random.key(3), jnp.asarray(mean), log_std, NUM))
    assert np.abs(actions).max() < 1 and len(actions) == 3 * NUM
    assert stats.kstest(actions[:NUM].ravel(), stats.uniform(-1, 2).cdf).pvalue > 0.01
    u = np.arctanh(actions[NUM:].astype(np.float64))
    of_policy = [
        stats.norm(mean[i], np.exp(log_std[i])).logpdf(u).sum(axis=-1) - np.log(1 - np.tanh(u) ** 2).sum(axis=-1)
        for i in (0, 1)
    ]
    np.testing.assert_allclose(log_p[NUM::2], of_policy[0][::2], atol=0.02)
    np.testing.assert_allclose(log_p[NUM + 1 :: 2], of_policy[1][1::2], atol=0.02)
    standard = (u - mean[np.arange(2 * NUM) % 2]) / np.exp(log_std[np.arange(2 * NUM) % 2])
    assert stats.kstest(standard.ravel(), "norm").pvalue > 0.01


def test_max_backup_is_the_best_action_of_the_most_pessimistic_critic() -> None:
    q = jnp.array([[[1.0], [5.0]], [[4.0], [2.0]]])  # [K, n, batch]: for each action the smallest, 1 and 2; then 2
    log_prob, alpha = jnp.array([[-9.0], [3.0]]), jnp.asarray(0.5)
    assert cql.next_value(q, log_prob, alpha, False) == 2.0  # the other order, the authors', would be 4
    assert cql.next_value(q, log_prob, alpha, True) == 2.0 - 0.5 * 3.0  # of the action chosen by value alone
    assert cql.next_value(q[:, :1], log_prob[:1], alpha, False) == 1.0
    assert cql.next_value(q[1:], log_prob, alpha, False) == 4.0


def test_temperature_and_actor_losses_in_numpy() -> None:
    log_prob, value = jnp.array([-1.0, 2.0]), jnp.array([0.5, -3.0])
    loss, info = cql.actor_loss(log_prob, value, jnp.asarray(0.2))
    assert loss == pytest.approx(np.mean([0.2 * -1.0 - 0.5, 0.2 * 2.0 + 3.0])) and info["actor/entropy"] == -0.5
    slope = jax.grad(cql.alpha_loss)
    assert slope(0.3, -4.0, -3.0) < 0 < slope(0.3, -2.0, -3.0)  # a descent raises alpha below the target entropy


def test_squashed_density_integrates_to_one() -> None:
    """The density at tanh(u), by change of variables from u, integrates to one over (-1, 1)."""
    mean, log_std = jnp.array([0.4]), jnp.array([-0.3])
    keys = jax.random.split(jax.random.key(0), 4000)
    actions, log_prob = jax.vmap(lambda key: cql.squashed_sample(key, mean, log_std))(keys)
    order = np.argsort(np.asarray(actions)[:, 0])
    a, density = np.asarray(actions)[order, 0], np.exp(np.asarray(log_prob))[order]
    assert np.abs(a).max() < 1.0
    assert abs(np.trapezoid(density, a) - 1.0) < 0.02
    expected = stats.norm(0.4, np.exp(-0.3)).pdf(np.arctanh(a)) / (1 - a**2)
    inner = np.abs(a) < 0.99  # arctanh in float32 is coarse beyond
    np.testing.assert_allclose(density[inner], expected[inner], rtol=1e-3)


def test_squashed_density_stays_finite_where_tanh_saturates() -> None:
    actions, log_prob = cql.squashed_sample(jax.random.key(0), jnp.full((3,), 40.0), jnp.zeros(3))
    assert np.isfinite(log_prob) and np.abs(actions).max() <= 1.0


def test_likelihood_of_given_actions() -> None:
    mean, std = np.array([0.3, -1.2]), np.array([0.5, 1.5])

    def log_prob(actions: np.ndarray) -> np.ndarray:
        return np.asarray(data_log_prob(jnp.asarray(actions), jnp.asarray(mean), jnp.asarray(np.log(std))))

    # The density is the slope of the distribution function of tanh(u), in each dimension.
    actions, h = np.array([[0.7, -0.2], [-0.9, 0.95], [0.0, 0.0]]), 1e-5
    cdf = stats.norm(mean, std).cdf
    slope = (cdf(np.arctanh(actions + h)) - cdf(np.arctanh(actions - h))) / (2 * h)
    np.testing.assert_allclose(log_prob(actions), np.log(slope).sum(axis=1), rtol=1e-3)
    grid = np.stack([np.linspace(-0.9985, 0.9985, 20_001), np.zeros(20_001)], axis=1)
    other = np.log((cdf(np.arctanh(h)) - cdf(np.arctanh(-h))) / (2 * h))[1]
    assert integrate.trapezoid(np.exp(log_prob(grid) - other), grid[:, 0]) == pytest.approx(1.0, abs=2e-3)
    bounds = np.array([[1.0, -1.0]])
    slopes = jax.jit(jax.grad(lambda m: cql.data_log_prob(bounds, m, jnp.zeros(2)).sum()))(jnp.zeros(2))
    np.testing.assert_allclose(slopes, [np.arctanh(0.999), -np.arctanh(0.999)], rtol=1e-3)
    assert log_prob(bounds) == log_prob(0.999 * bounds)


# ---- what the update must and must not depend on ----


def numpy_sac_gradient(state: cql.State, batch: Transitions) -> list[dict]:
    """Of every critic's squared error to r + discount (1 - done) min Q', by hand, in float64."""
    double = partial(jax.tree.map, lambda x: np.asarray(x, np.float64))
    s, a, r, s2, done, _ = double(batch)
    next_key = jax.random.split(state.key, 4)[1]

    def forward(params: dict, x: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        inputs = []
        for i in range(len(params)):
            inputs.append(x)
            x = x @ params[f"Dense_{i}"]["kernel"] + params[f"Dense_{i}"]["bias"]
            x = np.maximum(x, 0.0) if i < len(params) - 1 else x
        return x, inputs

    actor = double(state.actor["params"])
    outputs = forward(actor["MLP_0"], s2)[0]
    std = np.exp(actor["log_std_scale"] * outputs[:, ACT:] + actor["log_std_offset"])
    noise = np.asarray(jax.random.normal(next_key, (1, *a.shape)), np.float64)[0]
    a2 = np.tanh(outputs[:, :ACT] + std * noise)
    q2 = [forward(jax.tree.map(lambda x, k=k: x[k], members), np.hstack([s2, a2]))[0][:, 0]
          for members in [double(state.target_critic["params"]["VmapMLP_0"])] for k in range(2)]  # fmt: skip
    y = r + 0.99 * (1 - done) * np.minimum(*q2)
    result = []
    for k in range(2):
        params = jax.tree.map(lambda x, k=k: x[k], double(state.critic["params"]["VmapMLP_0"]))
        q, inputs = forward(params, np.hstack([s, a]))
        delta, grads = 2 * (q - y[:, None]) / len(r), {}
        for i in reversed(range(len(params))):
            grads[f"Dense_{i}"] = {"kernel": inputs[i].T @ delta, "bias": delta.sum(axis=0)}
            delta = (delta @ params[f"Dense_{i}"]["kernel"].T) * (inputs[i] > 0)
        result.append(grads)
    return result


def test_without_weight_the_critic_is_that_of_sac() -> None:
    state, batch = fresh(), random_batch(2)
    after, _ = update(state, batch, HP._replace(conservative_weight=0.0), ARGS)
    ours = gradient(after.critic_opt)["params"]["VmapMLP_0"]
    for k, expected in enumerate(numpy_sac_gradient(state, batch)):
        assert_close(jax.tree.map(lambda x, k=k: x[k], dict(ours)), expected)


def test_penalty_reaches_neither_policy_nor_temperature() -> None:
    state, batch = fresh(), random_batch()
    none, much = (update(state, batch, HP._replace(conservative_weight=w), ARGS)[0] for w in (0.0, 100.0))
    assert bits_equal((none.actor, none.actor_opt), (much.actor, much.actor_opt))
    assert none.log_alpha == much.log_alpha and not bits_equal(none.critic, much.critic)


def test_next_actions_are_of_the_next_states() -> None:
    """Where the critic is zero everywhere, the squared error is that of the targets alone."""
    state, batch = fresh(), random_batch()
    state = state._replace(critic=jax.tree.map(jnp.zeros_like, state.critic))
    hp = HP._replace(conservative_weight=0.0)

    def error(batch: Transitions) -> float:
        return float(update(state, batch, hp, ARGS)[1]["critic/td_loss"])

    assert error(batch._replace(observations=-batch.observations)) == error(batch)
    assert abs(error(batch._replace(next_observations=-batch.next_observations)) - error(batch)) > 1e-3


def test_terminations_mask_and_truncations_bootstrap() -> None:
    """Without the penalty, whose actions may come from the policy at any s'."""
    state, batch, hp = fresh(), random_batch(), HP._replace(conservative_weight=0.0)

    def critic_where_other_successors_follow(kind: jax.Array) -> object:
        other = jnp.where(kind[:, None] > 0, -batch.next_observations, batch.next_observations)
        return update(state, batch._replace(next_observations=other), hp, ARGS)[0].critic

    same = update(state, batch, hp, ARGS)[0].critic
    assert bits_equal(same, critic_where_other_successors_follow(batch.terminations))
    assert not bits_equal(same, critic_where_other_successors_follow(batch.truncations))


def test_warm_start_imitates_the_given_actions_and_ends() -> None:
    hp, batch, state = HP._replace(actor_learning_rate=1e-2), random_batch(), fresh(WARM_START)
    other = batch._replace(actions=-batch.actions)
    for step, imitates in ((0, True), (1, False), (2, False)):
        state = state._replace(step=jnp.asarray(step))
        one, two = (update(state, b, hp, WARM_START)[0].actor_opt for b in (batch, other))
        assert bits_equal(one, two) != imitates

    @jax.jit
    def likelihood(state: cql.State) -> jax.Array:
        output = cql.modules(WARM_START, ACT)[0].apply(state.actor, batch.observations)
        return cql.data_log_prob(batch.actions, *output).mean()

    before = likelihood(state)
    for _ in range(60):
        state, _ = update(state._replace(step=jnp.asarray(0)), batch, hp, WARM_START)
    assert likelihood(state) > before + 0.5


def test_factor_rises_while_the_gap_is_above_its_target() -> None:
    batch, state = random_batch(), fresh(OPTIONS)
    assert state.log_factor == 1.0

    def after(target_gap: float, state: cql.State = state, args: cql.Args = OPTIONS) -> tuple[float, dict]:
        new, info = update(state, batch, HP._replace(target_gap=target_gap), args)
        return float(new.log_factor), info

    assert after(-50.0)[0] > 1.0 > after(50.0)[0]
    assert after(-50.0)[1]["critic/weight"] == pytest.approx(math.e * HP.conservative_weight, rel=1e-6)
    limit = state._replace(log_factor=jnp.asarray(math.log(1e6)))
    most, least = after(-50.0, limit), after(1e9, limit)
    assert most[0] == pytest.approx(math.log(1e6)) and least[0] < most[0], "at a million it goes no further, but back"
    assert most[1]["critic/weight"] == pytest.approx(1e6 * HP.conservative_weight, rel=1e-5)
    without, info = after(-50.0, fresh(), ARGS)
    assert without == 1.0 and info["critic/weight"] == HP.conservative_weight


@pytest.mark.parametrize("num_critics", [1, 2, 5])
def test_every_critic_has_all_layers(num_critics: int) -> None:
    args = replace(ARGS, num_critics=num_critics, num_layers=2, critic_layers=5)
    state = jax.eval_shape(lambda key: cql.init(key, HP, args, OBS, ACT), jax.random.key(0))
    layers = state.critic["params"]["VmapMLP_0"]
    assert len(layers) == 6 and len(state.actor["params"]["MLP_0"]) == 3
    assert all(leaf.shape[0] == num_critics for leaf in jax.tree.leaves(layers))


def test_critics_start_apart_and_the_target_as_a_copy() -> None:
    state = init(jax.random.key(0), HP, OPTIONS, OBS, ACT)
    assert bits_equal(state.critic, state.target_critic) and state.log_alpha == 0.0
    for layer in state.critic["params"]["VmapMLP_0"].values():
        assert float(jnp.abs(layer["kernel"][0] - layer["kernel"][1]).max()) > 1e-3


def test_last_layers_start_near_zero_and_the_policy_with_a_standard_deviation_near_exp_minus_1() -> None:
    """As in CORL: orthogonal of gain 1e-2, and U(-b, b) with b = 1e-2 sqrt(6 / (inputs + outputs))."""
    args = replace(ARGS, hidden_dim=64, num_layers=2, critic_layers=3, num_critics=3)
    state = init(jax.random.key(0), HP, args, OBS, ACT)
    critics, policy = state.critic["params"]["VmapMLP_0"], state.actor["params"]
    assert policy["log_std_scale"] == 1.0 and policy["log_std_offset"] == -1.0
    last = len(critics) - 1
    for k in range(3):
        assert np.linalg.norm(critics[f"Dense_{last}"]["kernel"][k]) == pytest.approx(1e-2, rel=1e-4)
        np.testing.assert_allclose(np.linalg.norm(critics["Dense_1"]["kernel"][k], 2), math.sqrt(2.0), rtol=1e-4)
    largest = {name: float(jnp.abs(layer["kernel"]).max()) for name, layer in policy["MLP_0"].items()}
    assert largest[f"Dense_{len(largest) - 1}"] == pytest.approx(1e-2 * math.sqrt(6 / (64 + 2 * ACT)), rel=0.05)
    assert largest["Dense_1"] == pytest.approx(1 / math.sqrt(64), rel=0.05)
    assert not any(np.any(layer["bias"]) for layer in (*critics.values(), *policy["MLP_0"].values()))


def test_scale_and_offset_of_the_log_standard_deviation_are_learned() -> None:
    before, after = fresh(), update(fresh(), random_batch(), HP, ARGS)[0]
    for name in ("log_std_scale", "log_std_offset"):
        assert before.actor["params"][name] != after.actor["params"][name]


def test_act_returns_the_squashed_mean_or_samples_around_it() -> None:
    state, observations = fresh(), random_batch(size=1).observations
    mean, std = policy_of(state.actor, observations)
    act = jax.jit(cql.act, static_argnames=("args", "action_dim", "sample"))
    still = act(state, HP, observations, jax.random.key(0), ARGS, ACT, sample=False)
    np.testing.assert_allclose(still, np.tanh(mean), rtol=1e-5)
    many = jnp.repeat(observations, 20_000, axis=0)
    samples = np.asarray(act(state, HP, many, jax.random.key(1), ARGS, ACT, sample=True), np.float64)
    u = np.arctanh(np.clip(samples, -1 + 1e-7, 1 - 1e-7))
    np.testing.assert_allclose(u.mean(axis=0), mean[0], atol=0.05)
    np.testing.assert_allclose(u.std(axis=0), std[0], rtol=0.03)


@pytest.mark.slow
def test_members_of_a_population_keep_their_hyperparameters() -> None:
    """Every option on; a population of two, each like the same run alone, and unlike each other."""
    settings = (
        HP._replace(target_gap=2.0),
        HP._replace(
            conservative_weight=1.0, target_gap=8.0, actor_learning_rate=1e-2, target_entropy=-0.3, discount=0.5
        ),
    )
    batches, start = [random_batch(seed) for seed in range(3)], fresh(OPTIONS)

    def three_updates(hp: cql.Hyperparameters) -> cql.State:
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *batches)
        last, _ = jax.lax.scan(lambda state, batch: (cql.update(state, batch, hp, OPTIONS)[0], 0), start, stacked)
        return last._replace(key=0)

    together = jax.jit(jax.vmap(three_updates))(cql.Hyperparameters(*np.array(settings, np.float32).T))
    alone = []
    for i, hp in enumerate(settings):
        state = start
        for batch in batches:
            state, _ = update(state, batch, hp, OPTIONS)
        assert_close(jax.tree.map(lambda x, i=i: np.asarray(x)[i], together), state._replace(key=0), rtol=2e-3)
        alone.append(float(state.log_factor))
    assert alone[0] > 1.0 > alone[1]


def test_losses_do_not_broadcast() -> None:
    z = jnp.zeros
    for q, y, sampled, log_p in (
        (z((2, 4)), z((4, 1)), z((2, 6, 4)), z((6, 4))),
        (z((2, 4)), z(4), z((1, 6, 4)), z((6, 4))),
        (z((2, 4)), z(4), z((2, 6, 4)), z((6, 1))),
    ):
        with pytest.raises(AssertionError):
            critic_loss(q, y, sampled, log_p, 1.0)
    with pytest.raises(AssertionError):
        cql.actor_loss(z((4, 1)), z(4), z(()))
    with pytest.raises(AssertionError):
        cql.next_value(z((2, 3, 4)), z((4, 3)), z(()), True)


def test_presets_and_sweeps() -> None:
    args = cli.parse(cql.Args, cql.PRESETS, ["--dataset", "D4RL/antmaze/umaze-v1", "--target-gap", "7"])
    assert (args.lagrange, args.max_backup, args.gap_floor, args.reward_shift) == (True, True, -200.0, -5.0)
    assert args.hp.target_gap == 7.0 and args.hp.conservative_weight == 5.0
    replace(args, grid="target_gap=1,2").validate()
    args = cli.parse(cql.Args, cql.PRESETS, ["--preset", "cpu", "--num-actions", "2"])
    assert args.normalize_observations, "raw ones lose on Hopper what the preset has"
    assert (args.preset, args.num_actions, args.num_layers, args.critic_layers) == ("cpu", 2, 2, 2)
    args = cli.parse(cql.Args, cql.PRESETS, ["--preset", "cpu", "--dataset", "D4RL/antmaze/umaze-v1"])
    assert (args.num_actions, args.lagrange, args.hp) == (4, False, cql.Hyperparameters())
    args = cli.parse(cql.Args, cql.PRESETS, ["--dataset", "offax/hopper/medium-v1"])
    assert (args.hp.actor_learning_rate, args.lagrange, args.normalize_observations) == (3e-5, False, True)
    with pytest.raises(UsageError, match="target_gap"):
        replace(args, grid="target_gap=1,2").validate()
