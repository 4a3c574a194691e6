"""EMaQ against a textbook version, the exact operator on one-hot states and bins, and its own limits."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import means
from finite_max import expected_max
from test_iql import numpy_mlp, random_batch

from algorithms import emaq
from common.cli import UsageError
from common.replay import Replay, Transitions, empty_ring, insert

OBS, ACT, BATCH, NUM, BINS = 4, 2, 16, 6, 5
SIZES = {"embedding_dim": 8, "embedding_layers": 1, "head_dim": 6, "head_layers": 2, "num_bins": BINS}
ARGS = emaq.Args(num_proposals=NUM, num_critics=3, hidden_dim=8, num_layers=2, batch_size=BATCH, **SIZES)
PLAIN, SOFT = replace(ARGS, screening=False), replace(ARGS, backup="soft")
VAE = replace(PLAIN, behavior="vae")
HP = emaq.Hyperparameters()
update = jax.jit(emaq.update, static_argnames="args")
update_behavior = jax.jit(emaq.update_behavior, static_argnames="args")
train = jax.jit(emaq.train, static_argnames="args")
act = jax.jit(emaq.act, static_argnames=("args", "action_dim", "sample"))
propose = jax.jit(emaq.propose, static_argnames=("args", "action_dim"))
initialise = jax.jit(emaq.init, static_argnums=(2, 3, 4))


def fresh(args: emaq.Args = PLAIN, seed: int = 0) -> emaq.State:
    """A state whose target critic is not its critic, with a behaviour model far from uniform."""
    sizes = replace(ARGS, behavior=args.behavior)
    state, other = (initialise(jax.random.key(s), HP, sizes, OBS, ACT) for s in (seed, seed + 100))
    scale = 1.5 if args.behavior == "autoregressive" else 1.0
    return state._replace(target_critic=other.critic, behavior=jax.tree.map(lambda x: scale * x, state.behavior))


def assert_close(a: object, b: object, rtol: float = 2e-4, atol: float = 2e-5) -> None:
    jax.tree.map(partial(np.testing.assert_allclose, rtol=rtol, atol=atol), a, b)


def bits_equal(a: object, b: object) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


# ---- the textbook version: N copies of the state through every network, every critic on every proposal ----


def dense(layer: dict, x: jax.Array) -> jax.Array:
    return x @ layer["kernel"] + layer["bias"]


def mlp(layers: list[dict], x: jax.Array) -> jax.Array:
    for layer in layers[:-1]:
        x = jnp.maximum(dense(layer, x), 0.0)
    return dense(layers[-1], x)


def in_order(layers: dict) -> list[dict]:
    return [layers[name] for name in sorted(layers, key=lambda name: int(name.rpartition("_")[2]))]


def textbook_logits(behavior: Any, states: jax.Array, prefix: jax.Array) -> jax.Array:
    """Of the dimension after `prefix [rows, i]`, `[rows, bins]`."""
    parts = behavior["params"]
    i = prefix.shape[1]
    head = dict(parts[f"heads_{i}"])
    embedding = mlp(in_order(parts["embed"]), states)
    first = head.pop("SplitDense_0")
    return mlp([first, *in_order(head)], jnp.concatenate([embedding, prefix], axis=1))


def textbook_proposals(behavior: Any, states: jax.Array, key: jax.Array, num: int) -> jax.Array:
    """Every row of the states `num` times, `[num, batch, ACT]`."""
    shape = (num, len(states))
    copies = jnp.repeat(states[None], num, axis=0).reshape(-1, states.shape[-1])
    actions = jnp.zeros((len(copies), 0))
    for i in range(ACT):
        bin_key, place_key = jax.random.split(jax.random.fold_in(key, i))
        below = jnp.cumsum(jax.nn.softmax(textbook_logits(behavior, copies, actions)), axis=1)
        u = jax.random.uniform(bin_key, (*shape, 1)).reshape(-1, 1)
        bins = jnp.sum(below[:, :-1] <= u * below[:, -1:], axis=1)
        place = jax.random.uniform(place_key, shape).reshape(-1)
        actions = jnp.concatenate([actions, (-1.0 + 2.0 * (bins + place) / BINS)[:, None]], axis=1)
    return actions.reshape(*shape, ACT)


@jax.jit
def textbook_cross_entropy(behavior: Any, batch: Transitions) -> jax.Array:
    """-mean log mu(a|s), each dimension after the numbers before it as they are in the data."""
    total = 0.0
    for i in range(ACT):
        logits = textbook_logits(behavior, batch.observations, batch.actions[:, :i])
        labels = jnp.floor((batch.actions[:, i] + 1.0) * BINS / 2.0).astype(int)
        total += jnp.log(jax.nn.softmax(logits)[jnp.arange(BATCH), labels] / (2.0 / BINS))
    return -jnp.mean(total)


def textbook_values(critics: Any, states: jax.Array, actions: jax.Array) -> jax.Array:
    """Q of every critic in turn, `[K, rows]`."""
    stacked = critics["params"]["VmapMLP_0"]
    count = len(stacked["Dense_0"]["bias"])
    members = [in_order(jax.tree.map(lambda x, k=k: x[k], stacked)) for k in range(count)]
    return jnp.stack([mlp(member, jnp.concatenate([states, actions], axis=1))[:, 0] for member in members])


all_values = jax.jit(textbook_values)


def textbook_targets(
    target_critic: Any, batch: Transitions, proposals: jax.Array, hp: emaq.Hyperparameters, soft: bool
) -> jax.Array:
    num = len(proposals)
    copies = jnp.repeat(batch.next_observations[None], num, axis=0).reshape(-1, batch.observations.shape[1])
    q = textbook_values(target_critic, copies, proposals.reshape(len(copies), -1)).reshape(-1, num, len(batch.rewards))
    lowest, highest = jnp.min(q, axis=0), jnp.max(q, axis=0)
    values = hp.ensemble_weight * lowest + (1.0 - hp.ensemble_weight) * highest
    if soft:
        weights = jnp.exp(hp.softmax_scale * values)
        value = jnp.sum(weights * values, axis=0) / jnp.sum(weights, axis=0)
    else:
        value = jnp.max(values, axis=0)
    return jnp.where(batch.terminations > 0, batch.rewards, batch.rewards + hp.discount * value)


@partial(jax.jit, static_argnames=("soft", "num"))
def textbook_update(
    state: emaq.State,
    batch: Transitions,
    hp: emaq.Hyperparameters,
    soft: bool,
    bins: jax.Array | None = None,
    num: int = NUM,
) -> tuple[emaq.State, jax.Array]:
    """One update of EMaQ, Adam written out; and the loss."""
    key, proposal_key = jax.random.split(state.key)
    if bins is None:
        proposals = textbook_proposals(state.behavior, batch.next_observations, proposal_key, num)
    else:
        bins = jnp.transpose(bins, (1, 0, 2))
        proposals = -1.0 + 2.0 * (bins + jax.random.uniform(proposal_key, bins.shape)) / BINS
    y = textbook_targets(state.target_critic, batch, proposals, hp, soft)

    def loss(critics: Any) -> jax.Array:
        return sum(jnp.mean((q - y) ** 2) for q in textbook_values(critics, batch.observations, batch.actions))

    value, g = jax.value_and_grad(loss)(state.critic)
    count = state.critic_opt.count + 1
    first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, state.critic_opt.mu, g)
    second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, state.critic_opt.nu, g)
    critic = jax.tree.map(
        lambda p, m, v: (
            p - hp.critic_learning_rate * (m / (1 - 0.9**count)) / (jnp.sqrt(v / (1 - 0.999**count)) + 1e-8)
        ),
        *(state.critic, first, second),
    )
    target = jax.tree.map(lambda t, p: t + hp.polyak * (p - t), state.target_critic, critic)
    opt = optax.ScaleByAdamState(count, first, second)
    return state._replace(critic=critic, target_critic=target, critic_opt=opt, step=state.step + 1, key=key), value


BACKUPS = {  # settings, lambda, whether proposals are given as bins
    "screened": (ARGS, 1.0, False),
    "screened, pool": (ARGS, 1.0, True),
    "minimum": (PLAIN, 1.0, False),
    "mixture": (PLAIN, 0.75, False),
    "maximum": (PLAIN, 0.0, False),
    "soft, pool": (SOFT, 0.75, True),
}


SLOW = ("screened", "minimum", "maximum")  # what the others show too


@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.slow) if k in SLOW else k for k in BACKUPS])
def test_update_equals_the_textbook_version(kind: str) -> None:
    """Two updates in a row, so that Adam's moments and the target's are not those of the start."""
    args, weight, pool = BACKUPS[kind]
    hp = HP._replace(ensemble_weight=weight, softmax_scale=3.0, discount=0.9, polyak=0.25, critic_learning_rate=1e-3)
    bins = np.random.default_rng(3).integers(0, BINS, (BATCH, NUM, ACT)).astype(np.uint8) if pool else None
    ours = expected = fresh(args)
    for seed in range(2):
        batch = random_batch(seed)
        expected, loss = textbook_update(expected, batch, hp, args.backup == "soft", bins)
        ours, info = update(ours, batch, hp, args, bins)
        assert float(info["critic/loss"]) == pytest.approx(float(loss), rel=1e-4)
    for part in ("critic", "target_critic", "critic_opt"):
        assert_close(getattr(ours, part), getattr(expected, part))
    assert int(ours.step) == 2
    assert bits_equal((ours.behavior, ours.behavior_opt), (fresh(args).behavior, fresh(args).behavior_opt)), "frozen"
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), ours.target_critic, fresh(args).target_critic)
    assert max(jax.tree.leaves(moved)) > 1e-2, "not a comparison of standstills"


@pytest.mark.parametrize("kind", ["autoregressive", "vae"])
def test_behavior_loss_and_its_update(kind: str) -> None:
    """By hand; a step of Adam at the behaviour model's own rate, which leaves the Q-functions alone."""
    args, batch = (PLAIN if kind == "autoregressive" else VAE), random_batch(5)
    state, hp = fresh(args), HP._replace(behavior_learning_rate=2e-3)
    after, info = update_behavior(state, batch, hp, args)
    if kind == "vae":
        noise = np.asarray(jax.random.normal(jax.random.split(state.key)[1], (BATCH, 2 * ACT)))
        parts, s, a = state.behavior["params"], batch.observations, batch.actions
        mean, log_std = np.split(numpy_mlp(parts["encoder"], np.concatenate([s, a], axis=1))[0], 2, axis=1)
        latent = mean + np.exp(log_std) * noise
        decoded = np.tanh(numpy_mlp(parts["decoder"], np.concatenate([s, latent], axis=1))[0])
        error = ((decoded - a) ** 2).sum(axis=1)
        divergence = (-log_std + (np.exp(2 * log_std) + mean**2) / 2 - 0.5).sum(axis=1)
        expected = (error + 0.5 * divergence).mean()
        assert info["behavior/error"] == pytest.approx(float(error.mean()), rel=1e-4)
        assert info["behavior/divergence"] == pytest.approx(float(divergence.mean()), rel=1e-4)
    else:
        expected = textbook_cross_entropy(state.behavior, batch)
    assert info["behavior/loss"] == pytest.approx(float(expected), rel=1e-4)
    moved = jax.tree.map(lambda p, q: np.abs(p - q).max(), state.behavior, after.behavior)
    assert max(jax.tree.leaves(moved)) == pytest.approx(2e-3, rel=1e-2), "Adam's first step is its rate"
    assert bits_equal(
        after._replace(behavior=0, behavior_opt=0, key=0), state._replace(behavior=0, behavior_opt=0, key=0)
    )


def test_the_behavior_model_learns_online_and_not_offline() -> None:
    """With each update of the Q-functions, on the same minibatch: Adam's steps are at most its rate."""
    state, data = fresh(), jax.tree.map(jnp.asarray, random_batch(size=64))
    ring = jax.tree.map(lambda x: jnp.asarray(x)[None], insert(empty_ring(8, OBS, ACT), random_batch(1, 8)))
    hp = HP._replace(behavior_learning_rate=2e-3)
    for replay, steps in ((Replay(data), 0), (Replay(data, ring, jnp.int32(0)), 3)):
        after, metrics = train(state, hp, replay, 3, PLAIN)
        moved = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - b).max(), after.behavior, state.behavior)
        assert max(jax.tree.leaves(moved)) == pytest.approx(2e-3 * steps, rel=0.3)
        assert (int(after.behavior_opt.count), int(after.step)) == (steps, 3)
        assert int(metrics.counts["behavior/loss"]) == steps


def test_targets_use_the_behavior_model_without_the_temperature_and_bonus_of_exploration() -> None:
    """Nor does the behaviour model learn otherwise: both are of `act` alone."""
    state, batch, bold = fresh(), random_batch(), HP._replace(temperature=20.0, exploration_bonus=7.0)
    for function in (update, update_behavior):
        one, other = (function(state, batch, hp, PLAIN)[0] for hp in (HP, bold))
        assert bits_equal(one._replace(key=0), other._replace(key=0))


def test_members_are_screened_by_their_own_lambda(monkeypatch: pytest.MonkeyPatch) -> None:
    """lambda is traced: 1 is screened, others are not, in one program. Neither is any on another device than a CPU."""
    critic, batch = fresh().target_critic, random_batch()
    proposals = np.random.default_rng(1).uniform(-1, 1, (NUM, BATCH, ACT)).astype(np.float32)
    targets_and_share = jax.jit(emaq.backup, static_argnames="args")
    for weight in (1.0, 0.75, 0.0):
        hp = HP._replace(ensemble_weight=jnp.float32(weight))
        (screened, info), (plain, _) = (targets_and_share(critic, batch, proposals, hp, args) for args in (ARGS, PLAIN))
        assert_close(screened, plain)
        assert (float(info["critic/evaluated_share"]) == 1.0) == (weight != 1.0)

    def screens(args: emaq.Args) -> bool:
        shapes = jax.eval_shape(partial(emaq.init, args=args, obs_dim=OBS, action_dim=ACT), jax.random.key(0), HP)
        actions = proposals[: args.num_proposals]
        return "while" in str(jax.make_jaxpr(partial(emaq.backup, args=args))(shapes.critic, batch, actions, HP))

    assert screens(ARGS)
    assert not any(map(screens, (PLAIN, SOFT, replace(ARGS, num_critics=1), replace(ARGS, num_proposals=1))))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not screens(ARGS)


@pytest.mark.parametrize("kind", ["autoregressive", "vae"])
def test_numbers_stay_float32_where_jax_has_64_bits(kind: str) -> None:
    """With JAX_ENABLE_X64=1: parameters, actions and the pool have the types that they have without."""
    args, batch = replace(ARGS, behavior=kind), random_batch()

    def kinds(tree: Any) -> list[tuple]:
        return [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]

    with jax.enable_x64(True):
        start = partial(emaq.init, args=args, obs_dim=OBS, action_dim=ACT)
        state = jax.eval_shape(start, jax.random.key(0), HP)
        data, member = Replay(batch), jnp.zeros((), jnp.int32)
        if kind == "autoregressive":
            pool = jax.eval_shape(partial(emaq.draw_pool, args=args), state, HP, data, jax.random.key(1))
            assert pool.dtype == np.uint8
            data = Replay(batch, None, member, jnp.zeros((1, *pool.shape), pool.dtype))
        for function in (emaq.train_behavior, emaq.train):
            after, _ = jax.eval_shape(partial(function, args=args), state, HP, data, 3)
            assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
                lambda x: (x.shape, x.dtype), state
            )
        online = data._replace(ring=jax.tree.map(lambda x: x[None], empty_ring(5, OBS, ACT)), member=member, extra=None)
        jax.eval_shape(partial(emaq.train, args=args), state, HP, online, 3)
        for sample in (False, True):
            acted = partial(emaq.act, args=args, action_dim=ACT, sample=sample)
            assert jax.eval_shape(acted, state, HP, batch.observations, jax.random.key(0)).dtype == np.float32
    assert {x.dtype for x in jax.tree.leaves((state.behavior, state.critic))} == {np.dtype(np.float32)}


# ---- targets by hand ----


class Table:
    """In place of the Q-functions: `apply` gives the numbers it was made of."""

    def apply(self, q: jax.Array, observations: jax.Array, actions: jax.Array) -> jax.Array:
        return q


def targets_of(q: Any, hp: emaq.Hyperparameters, args: emaq.Args, **flags: Any) -> np.ndarray:
    """`backup` of values `q [K, N, batch]`."""
    q = jnp.asarray(q, jnp.float32)
    batch = jax.tree.map(lambda x: x[: q.shape[2]], random_batch())._replace(rewards=jnp.zeros(q.shape[2]))
    batch = batch._replace(**({"terminations": jnp.zeros(q.shape[2])} | flags))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emaq, "modules", lambda *_: (None, Table()))
        return np.asarray(emaq.backup(q, batch, jnp.zeros((*q.shape[1:], ACT)), hp, args)[0])


def test_ensemble_comes_before_the_maximum() -> None:
    """Two critics, three proposals, one state. Minima 1, -2, 0 and maxima 5, 6, 3: by hand."""
    q = np.float32([[1, 6, 0], [5, -2, 3]])[:, :, None]
    for weight, expected in ((1.0, 1.0), (0.75, 2.0), (0.5, 3.0), (0.0, 6.0)):
        hp = HP._replace(ensemble_weight=weight, discount=0.5)
        assert targets_of(q, hp, PLAIN) == pytest.approx([0.5 * expected])
        other_order = weight * q.max(axis=1).min() + (1 - weight) * q.max(axis=1).max()
        assert weight == 0.0 or other_order != pytest.approx(expected), "5, 5.25, 5.5"


def test_terminations_mask_and_truncations_bootstrap_by_hand() -> None:
    q, zero, one = np.full((2, 3, 2), 4.0), np.float32([0, 0]), np.float32([1, 0])
    hp = HP._replace(discount=0.5)
    rewards = np.float32([10, 20])
    assert targets_of(q, hp, PLAIN, rewards=rewards, terminations=one, truncations=zero).tolist() == [10, 22]
    assert targets_of(q, hp, PLAIN, rewards=rewards, terminations=zero, truncations=one).tolist() == [12, 22]


@pytest.mark.parametrize("width", [pytest.param(8, marks=pytest.mark.slow), 10])
def test_units_added_for_a_gpu_change_no_value(width: int) -> None:
    args = replace(PLAIN, hidden_dim=width)
    state, batch = initialise(jax.random.key(0), HP, args, OBS, ACT), random_batch()
    critic = emaq.modules(args, ACT)[1]
    actions = propose(state.behavior, batch.observations, jax.random.key(1), args, ACT)
    wide, params = emaq.widened(critic, state.critic, batch.observations, actions)
    assert wide.hidden_dim == (8 if width == 8 else 16)
    q = critic.apply(state.critic, batch.observations, actions)
    assert_close(wide.apply(params, batch.observations, actions), q, rtol=1e-5, atol=1e-6)


def test_soft_backup_lies_between_mean_and_maximum_and_grows() -> None:
    """In alpha, for the same proposals; the two limits."""
    q = np.random.default_rng(0).normal(size=(3, 9, 20))
    lowest = q.min(axis=0)
    scales = (0.0, 0.1, 1.0, 4.0, 64.0, 1e6)
    found = [targets_of(q, HP._replace(softmax_scale=a, discount=1.0), SOFT) for a in scales]
    np.testing.assert_allclose(found[0], lowest.mean(axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[-1], lowest.max(axis=0), rtol=1e-5)
    weights = np.exp(4.0 * lowest)
    np.testing.assert_allclose(found[3], (weights * lowest).sum(axis=0) / weights.sum(axis=0), rtol=1e-5)
    assert (np.diff(found, axis=0) > -1e-6).all() and (np.diff(found, axis=0)[:3] > 1e-3).all()
    assert (found[0] - 1e-6 <= found).all() and (found <= found[-1] + 1e-6).all()
    assert np.isfinite(targets_of(1e4 * q, HP._replace(softmax_scale=1e6), SOFT)).all()


def test_critic_loss_is_the_sum_over_critics() -> None:
    q, y = np.float32([[1, 2], [3, 5]]), np.float32([0, 1])
    assert emaq.critic_loss(jnp.asarray(q), jnp.asarray(y))[0] == pytest.approx((1 + 1) / 2 + (9 + 16) / 2)
    with pytest.raises(AssertionError):
        emaq.critic_loss(jnp.asarray(q), jnp.asarray(y)[:, None])


# ---- one-hot states, actions in bins, a behaviour model and Q-functions set by hand ----

STATES, MANY = 3, 8
SUPPORT = np.array([0, 3, 6])  # bins that behaviour uses: not adjacent, so that Q can be level within each
MU = np.array([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1]])
ONE_HOT = np.eye(STATES, dtype=np.float32)
BY_STATE = {"embedding_dim": STATES, "embedding_layers": 1, "head_dim": STATES, "head_layers": 1}
TABULAR = emaq.Args(num_bins=MANY, num_critics=2, hidden_dim=16, num_layers=1, screening=False, **BY_STATE)


def behavior_by_hand(probabilities: np.ndarray, num_bins: int = MANY, action_dim: int = 1) -> Any:
    """mu of one-hot states: `probabilities [STATES, num_bins]`, for every action dimension by itself."""
    identity = {"kernel": ONE_HOT, "bias": np.zeros(STATES, np.float32)}
    logits = np.log(np.maximum(probabilities, 1e-30)).astype(np.float32)
    last = {"kernel": logits, "bias": np.zeros(num_bins, np.float32)}
    parts = {"embed": {"Dense_0": identity, "Dense_1": identity}}
    for i in range(action_dim):
        first = {"kernel": np.concatenate([ONE_HOT, np.zeros((i, STATES), np.float32)]), "bias": identity["bias"]}
        parts[f"heads_{i}"] = {"SplitDense_0": first, "Dense_0": last}
    return {"params": parts}


def over_bins(probabilities: np.ndarray) -> np.ndarray:
    """Of all bins, from those of the support."""
    full = np.zeros((len(probabilities), MANY))
    full[:, SUPPORT] = probabilities
    return full


def edges(bins: np.ndarray) -> np.ndarray:
    """The lower ends of bins."""
    return bins * 2.0 / MANY - 1.0


def critics_by_hand(tables: np.ndarray) -> Any:
    """Q_k(s, a) = `tables[k, s, j]` for a in the j-th bin of the support, straight lines between; `[K, STATES, 3]`."""
    weights = np.zeros((STATES + 1, 16), np.float32)
    bias, outputs = np.zeros(16, np.float32), np.zeros((len(tables), 16, 1), np.float32)
    unit = 0
    for s in range(STATES):
        weights[s, unit], outputs[:, unit, 0] = 1.0, tables[:, s, 0]
        unit += 1
        for j in range(2):
            start, width = edges(SUPPORT[j] + 1), 2.0 * 2.0 / MANY
            for k in range(2):  # up from `start` on, level again after `width`; far below zero in the other states
                weights[STATES, unit], weights[s, unit] = 1.0 / width, 10.0
                bias[unit] = -10.0 - (start + k * width) / width
                outputs[:, unit, 0] = (1 - 2 * k) * (tables[:, s, j + 1] - tables[:, s, j])
                unit += 1
    layers = {
        "Dense_0": {"kernel": np.stack([weights] * len(tables)), "bias": np.stack([bias] * len(tables))},
        "Dense_1": {"kernel": outputs, "bias": np.zeros((len(tables), 1), np.float32)},
    }
    return {"params": {"VmapMLP_0": layers}}


def state_of(behavior: Any, critic: Any, target_critic: Any = None) -> emaq.State:
    def start(params: Any) -> optax.ScaleByAdamState:
        return optax.ScaleByAdamState(np.int32(0), *[jax.tree.map(np.zeros_like, params)] * 2)

    opts = {"behavior_opt": start(behavior), "critic_opt": start(critic)}
    target = critic if target_critic is None else target_critic
    return emaq.State(behavior, critic, target, **opts, step=jnp.int32(0), key=jax.random.key(0))


def tabular_batch(next_states: np.ndarray, actions: np.ndarray, **others: Any) -> Transitions:
    size = len(next_states)
    zeros = np.zeros(size, np.float32)
    values = {"rewards": zeros, "terminations": zeros, "truncations": zeros, "observations": ONE_HOT[next_states]}
    values |= {"next_observations": ONE_HOT[next_states], "actions": np.float32(actions).reshape(size, -1)} | others
    return Transitions(**{name: np.asarray(value, np.float32) for name, value in values.items()})


@pytest.mark.parametrize("num", [1, 4])
@pytest.mark.parametrize("weight", [1.0, 0.75])
def test_targets_have_the_mean_of_the_exact_operator(num: int, weight: float) -> None:
    """Over 4,000 draws for each of six rows, within five standard errors of the sum over order statistics."""
    tables = np.random.default_rng(5).normal(size=(2, STATES, 3))
    args = replace(TABULAR, num_proposals=num, hp=HP._replace(ensemble_weight=weight, discount=0.9))
    behavior, critic = behavior_by_hand(over_bins(MU)), critics_by_hand(tables)
    rewards, ends = np.arange(6.0), np.float32([0, 0, 0, 0, 1, 0])
    next_states = np.array([0, 1, 2, 0, 1, 2])
    batch = tabular_batch(next_states, np.zeros(6), rewards=rewards, terminations=ends)

    @jax.jit
    def draws(keys: jax.Array) -> jax.Array:
        def one(key: jax.Array) -> jax.Array:
            proposals = emaq.propose(behavior, batch.next_observations, key, args, 1)
            return emaq.backup(critic, batch, proposals, args.hp, args)[0]

        return jax.vmap(one)(keys)

    found = np.asarray(draws(jax.random.split(jax.random.key(0), 4000)), np.float64)
    ensemble = weight * tables.min(axis=0) + (1 - weight) * tables.max(axis=0)
    value = expected_max(ensemble[next_states], MU[next_states], num)
    expected = rewards + 0.9 * (1 - ends) * value
    error = found.std(axis=0) / np.sqrt(len(found))
    assert (error[:4] > 1e-4).all() and (np.abs(found.mean(axis=0) - expected) < 5 * error + 1e-5).all()


def fixed_point(rewards: np.ndarray, following: np.ndarray, ends: np.ndarray, discount: float, num: int) -> np.ndarray:
    """Q of the exact operator, by iteration; for one proposal it is checked against the linear equations of Q^mu."""
    q = np.zeros_like(rewards)
    for _ in range(200):
        q = rewards + discount * (1 - ends) * expected_max(q, MU, num)[following]
    if num == 1:
        size = q.size
        step = discount * (1 - ends)[..., None, None] * (np.eye(STATES)[following][..., None] * MU)
        np.testing.assert_allclose(np.linalg.solve(np.eye(size) - step.reshape(size, size), rewards.ravel()), q.ravel())
    return q


def test_training_converges_to_the_exact_fixed_point() -> None:
    """With 1 and 4 proposals, nearer to its own than to those of other numbers, within 0.1 of values that span 3."""
    rng, discount = np.random.default_rng(8), 0.7
    rewards, following = rng.normal(size=(STATES, 3)), rng.integers(0, STATES, (STATES, 3))
    ends = np.zeros((STATES, 3))
    ends[1, 2] = 1.0
    rows = np.arange(900)
    states, places = rows % STATES, rows // STATES % 3
    actions = edges(SUPPORT[places] + rng.random(len(rows)))
    data = tabular_batch(
        states,
        actions,
        next_observations=ONE_HOT[following[states, places]],
        rewards=rewards[states, places],
        terminations=ends[states, places],
    )
    middles = edges(SUPPORT + 0.5).astype(np.float32)
    grid = np.repeat(ONE_HOT, 3, axis=0), np.tile(middles, STATES)[:, None]
    exact = {num: fixed_point(rewards, following, ends, discount, num) for num in (1, 2, 4)}
    assert np.ptp(exact[1]) > 1
    for num in (1, 4):
        args = replace(TABULAR, num_proposals=num, num_critics=1, hidden_dim=32, num_layers=2, batch_size=64)
        state = initialise(jax.random.key(1), HP, args, STATES, 1)
        state = state._replace(behavior=behavior_by_hand(over_bins(MU)))
        for rate, updates in ((3e-3, 1200), (3e-4, 1000)):
            hp = HP._replace(discount=discount, polyak=0.05, critic_learning_rate=rate)
            state, _ = train(state, hp, Replay(data), updates, args)
        found = np.asarray(all_values(state.critic, *grid)).reshape(STATES, 3)
        errors = {other: np.abs(found - q).max() for other, q in exact.items()}
        assert errors[num] < 0.1 and min(errors, key=errors.get) == num


# ---- the pool ----

draw_pool = jax.jit(emaq.draw_pool, static_argnames="args")


@partial(jax.jit, static_argnames=("num", "args", "action_dim"))
def fresh_bins(
    behavior: Any, states: jax.Array, key: jax.Array, num: int, args: emaq.Args, action_dim: int
) -> jax.Array:
    """`[num, batch, action_dim]`."""
    policy, _ = emaq.modules(args, action_dim)
    return policy.apply(behavior, states, key, num, method="sample")[1]


def test_pool_has_the_distribution_of_fresh_proposals_of_each_rows_own_state() -> None:
    """1,300 rows are no multiple of a block. Pairs of bins in each of three states, within five standard errors of as
    many fresh proposals; and of the exact probabilities, with a behaviour model set by hand."""
    rows, sets, num = 1300, 3, 4
    args = replace(PLAIN, num_proposals=num, proposal_pool=sets)
    next_states = np.random.default_rng(2).integers(0, STATES, rows)
    data = tabular_batch(next_states, np.zeros((rows, ACT)))
    observations = np.pad(ONE_HOT, ((0, 0), (0, OBS - STATES)))
    before = (next_states + 1) % STATES  # other states, of which there must be no proposals
    data = data._replace(observations=observations[before], next_observations=observations[next_states])
    state = fresh()
    pool = np.asarray(draw_pool(state, HP, Replay(data), jax.random.key(1), args))
    assert pool.shape == (rows, sets, num, ACT) and pool.dtype == np.uint8 and pool.max() < BINS
    draws = 20_000
    bins = fresh_bins(state.behavior, observations, jax.random.key(2), draws, PLAIN, ACT)
    for s in range(STATES):
        drawn = pool[next_states == s].reshape(-1, ACT).astype(int)
        found = np.bincount(drawn @ [BINS, 1], minlength=BINS**2) / len(drawn)
        expected = np.bincount(np.asarray(bins)[:, s] @ [BINS, 1], minlength=BINS**2) / draws
        error = np.sqrt((expected + 1 / draws) * (1 / len(drawn) + 1 / draws))
        assert (np.abs(found - expected) < 5 * error).all()
        assert np.ptp(expected) > 0.1, "not uniform"
        # Draws are new for each row and set: pairs agree as often as independent ones.
        same = (pool[next_states == s][1:] == pool[next_states == s][:-1]).all(axis=-1).mean()
        assert same == pytest.approx((expected**2).sum(), abs=0.05)
        assert (pool[next_states == s][:, 0] == pool[next_states == s][:, 1]).all(axis=-1).mean() == pytest.approx(
            (expected**2).sum(), abs=0.05
        )

    tabular = replace(TABULAR, num_proposals=num, proposal_pool=sets)
    by_hand = state_of(behavior_by_hand(over_bins(MU)), critics_by_hand(np.zeros((2, STATES, 3))))
    rows_by_hand = Replay(tabular_batch(next_states, np.zeros(rows), observations=ONE_HOT[before]))
    pool = np.asarray(draw_pool(by_hand, HP, rows_by_hand, jax.random.key(1), tabular))
    for s in range(STATES):
        drawn = pool[next_states == s].ravel()
        found = np.bincount(drawn, minlength=MANY) / len(drawn)
        exact = over_bins(MU)[s]
        assert (np.abs(found - exact) <= 5 * np.sqrt(exact * (1 - exact) / len(drawn))).all()


def test_rows_of_different_blocks_of_the_pool_have_draws_of_their_own() -> None:
    """Two blocks of 500 rows, of one state: a row agrees with that at its place in the other block by chance alone."""
    args = replace(TABULAR, num_proposals=10, proposal_pool=2)
    state = state_of(behavior_by_hand(over_bins(MU)), critics_by_hand(np.zeros((2, STATES, 3))))
    pool = np.asarray(
        draw_pool(state, HP, Replay(tabular_batch(np.zeros(1000, int), np.zeros(1000))), jax.random.key(1), args)
    )
    agree, chance = (pool[:500] == pool[500:]).mean(), (MU[0] ** 2).sum()
    assert agree == pytest.approx(chance, abs=5 * np.sqrt(chance * (1 - chance) / 10_000))


def test_bins_of_fresh_proposals_give_the_same_update() -> None:
    """Where the Q-functions are level within each bin of the support, the place in it plays no part."""
    args = replace(TABULAR, num_proposals=4, batch_size=9)
    tables = np.random.default_rng(6).normal(size=(2, 2, STATES, 3))
    state = state_of(behavior_by_hand(over_bins(MU)), critics_by_hand(tables[0]), critics_by_hand(tables[1]))
    batch = tabular_batch(np.arange(9) % STATES, edges(SUPPORT[np.arange(9) // 3] + 0.5))
    bins = fresh_bins(state.behavior, batch.next_observations, jax.random.split(state.key)[1], 4, TABULAR, 1)
    bins = np.swapaxes(bins, 0, 1).astype(np.uint8)
    expected, info = update(state, batch, HP, args)
    found, pooled = update(state, batch, HP, args, bins)
    other, _ = update(state, batch, HP, args, bins[::-1].copy())
    assert float(pooled["critic/loss"]) == pytest.approx(float(info["critic/loss"]), rel=1e-5)
    assert_close(found.critic_opt.mu, expected.critic_opt.mu)
    differences = jax.tree.map(lambda a, b: np.abs(a - b).max(), other.critic_opt.mu, expected.critic_opt.mu)
    assert max(jax.tree.leaves(differences)) > 1e-2


def test_every_set_of_a_members_own_pool_is_used() -> None:
    """Q' is 0, 1 and 10 in the bins of the three sets: the mean of Q'^2 is 101 / 3, if all are used alike. With the
    other member's pool it would be 100."""
    args = replace(TABULAR, num_proposals=2, proposal_pool=3, batch_size=4000)
    tables = np.float32([[[0, 1, 10]] * STATES] * 2)
    nothing = np.zeros_like(tables)
    state = state_of(behavior_by_hand(over_bins(MU)), critics_by_hand(nothing), critics_by_hand(tables))
    rows = 40
    data = tabular_batch(np.arange(rows) % 2, np.zeros(rows))
    own = np.broadcast_to(SUPPORT[:, None, None], (rows, 3, 2, 1)).astype(np.uint8)
    wrong = np.full_like(own, SUPPORT[2])
    replay = Replay(data, None, jnp.int32(1), jnp.asarray(np.stack([wrong, own])))
    _, metrics = train(state, HP._replace(discount=1.0), replay, 1, args)
    loss = float(means(metrics)["critic/loss"]) / 2
    assert loss == pytest.approx(101 / 3, abs=5 * np.std([0, 1, 100]) / np.sqrt(4000))


# ---- acting ----

CHOOSE = replace(PLAIN, num_critics=3, num_proposals=20)


def q_of(critics: Any, states: np.ndarray, proposals: np.ndarray) -> np.ndarray:
    """Of every proposal, `[K, N, batch]`."""
    copies = np.repeat(states[None], len(proposals), axis=0).reshape(-1, states.shape[1])
    q = all_values(critics, copies, proposals.reshape(len(copies), -1))
    return np.asarray(q).reshape(-1, *proposals.shape[:2])


def test_the_action_is_the_best_proposal() -> None:
    """By the minimum of the online Q-functions; exploring, by their mean and standard deviation, at its temperature.
    The criteria and both sets of Q-functions choose differently in some of the 40 states."""
    state, key = fresh(), jax.random.key(6)
    state = state._replace(critic=jax.tree.map(lambda x: 3.0 * x, state.critic))
    hp = HP._replace(temperature=5.0, exploration_bonus=2.0)
    states = random_batch(7, 40).observations
    choices = []
    for sample, temperature in ((False, 1.0), (True, 5.0)):
        proposals = np.asarray(propose(state.behavior, states, key, CHOOSE, ACT, temperature))
        q, other = (q_of(params, states, proposals) for params in (state.critic, state.target_critic))
        bold = q.mean(axis=0) + 2.0 * q.std(axis=0)
        best = [np.argmax(value, axis=0) for value in (q.min(axis=0), bold, q.mean(axis=0), other.min(axis=0))]
        wanted = best[1] if sample else best[0]
        found = np.asarray(act(state, hp, states, key, CHOOSE, ACT, sample))
        np.testing.assert_array_equal(found, proposals[wanted, np.arange(40)])
        assert all((wanted != one).any() for one in best if one is not wanted)
        choices.append(proposals)
    assert (choices[0] != choices[1]).any(), "the temperature plays a part"


def test_the_action_is_the_best_by_the_weight_of_the_minimum_against_the_maximum() -> None:
    """Each of three weights chooses otherwise in some of the 40 states."""
    state, key, states = fresh(), jax.random.key(6), random_batch(7, 40).observations
    state = state._replace(critic=jax.tree.map(lambda x: 3.0 * x, state.critic))
    proposals = np.asarray(propose(state.behavior, states, key, CHOOSE, ACT))
    q, choices = q_of(state.critic, states, proposals), []
    for weight in (1.0, 0.5, 0.0):
        choices.append((weight * q.min(axis=0) + (1.0 - weight) * q.max(axis=0)).argmax(axis=0))
        found = np.asarray(act(state, HP._replace(ensemble_weight=weight), states, key, CHOOSE, ACT, False))
        np.testing.assert_array_equal(found, proposals[choices[-1], np.arange(40)])
    assert all((choices[i] != choices[i - 1]).any() for i in range(3))


def test_of_a_single_bin_the_policy_is_behavior_cloning() -> None:
    """Whatever the Q-functions say; with several bins it is what they say."""
    certain = behavior_by_hand(np.eye(MANY)[[1, 4, 6]])
    key, states = jax.random.key(3), ONE_HOT[np.arange(30) % STATES]
    for seed in range(2):
        tables = 100 * np.random.default_rng(seed).normal(size=(2, STATES, 3))
        state = state_of(certain, critics_by_hand(tables))
        for sample in (False, True):
            actions = np.asarray(act(state, HP, states, key, TABULAR, 1, sample))[:, 0]
            bins = np.array([1, 4, 6])[np.arange(30) % STATES]
            assert ((edges(bins) <= actions) & (actions <= edges(bins + 1))).all()
        free = state._replace(behavior=behavior_by_hand(over_bins(MU)))
        actions = np.asarray(act(free, HP, ONE_HOT, key, TABULAR, 1, False))[:, 0]
        best = SUPPORT[tables.min(axis=0).argmax(axis=1)]
        assert ((edges(best) <= actions) & (actions <= edges(best + 1))).all()


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ({}, "softmax_scale"),
        ({}, "temperature"),
        ({}, "exploration_bonus"),
        ({"behavior": "vae", "online_steps": 10}, "temperature"),
        ({"behavior_checkpoint": "run"}, "behavior_learning_rate"),
        ({"behavior_updates": 0}, "behavior_learning_rate"),
        ({"num_critics": 1}, "ensemble_weight"),
        ({"num_critics": 1, "online_steps": 10}, "exploration_bonus"),
        ({"num_proposals": 1, "online_steps": 10}, "exploration_bonus"),
        ({"num_proposals": 1, "backup": "soft"}, "softmax_scale"),
    ],
)
def test_a_sweep_without_effect_is_refused(flags: dict[str, Any], name: str) -> None:
    args = replace(ARGS, **flags)
    args.validate()
    with pytest.raises(UsageError, match=f"{name} has no effect"):
        replace(args, grid=f"{name}=0.5,1").validate()
