"""BCQ against EMaQ where they agree, and its perturbation against numpy and finite differences."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import Outcome, arrays_of, assert_refused, hopper_like, smaller

from algorithms import emaq
from benchmarks import bcq
from common.cli import UsageError
from common.replay import Transitions

OBS, ACT, BATCH = 4, 2, 16
SMALL = {"hidden_dim": 8, "num_layers": 2, "batch_size": BATCH, "num_critics": 3, "num_proposals": 5}
SMALL |= {
    "embedding_dim": 8,
    "embedding_layers": 1,
    "head_dim": 8,
    "head_layers": 1,
    "num_bins": 6,
    "screening": False,
}
ARGS = bcq.Args(**SMALL)
HP = bcq.Hyperparameters(max_perturbation=0.3)
update = jax.jit(bcq.update, static_argnames="args")
emaq_update = jax.jit(emaq.update, static_argnames="args")
act = jax.jit(bcq.act, static_argnames=("args", "action_dim", "sample"))
propose = jax.jit(emaq.propose, static_argnames=("args", "action_dim"))
perturbed = jax.jit(bcq.perturbed, static_argnames="args")
actor_gradient = jax.jit(jax.value_and_grad(bcq.actor_loss, has_aux=True), static_argnames="args")
SHARED = ("behavior", "critic", "target_critic", "behavior_opt", "critic_opt", "step")


def fresh(args: bcq.Args = ARGS, seed: int = 0) -> bcq.State:
    """A new state whose target networks are others than the online ones."""
    make = jax.jit(partial(bcq.init, args=args, obs_dim=OBS, action_dim=ACT))
    state, other = make(jax.random.key(seed), HP), make(jax.random.key(seed + 100), HP)
    return state._replace(target_critic=other.critic, target_actor=other.actor)


def random_batch(seed: int = 0) -> Transitions:
    rng = np.random.default_rng(seed)
    flags = np.arange(BATCH) % 3  # neither flag, termination, truncation
    states, after = rng.standard_normal((2, BATCH, OBS), np.float32)
    actions = rng.uniform(-1, 1, (BATCH, ACT)).astype(np.float32)
    rewards, ends = rng.standard_normal(BATCH, np.float32), [(flags == i).astype(np.float32) for i in (1, 2)]
    return Transitions(states, actions, rewards, after, *ends)


def trees_equal(a: object, b: object) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def numpy_perturbed(params: dict, observations: np.ndarray, actions: np.ndarray, bound: float) -> np.ndarray:
    """b(s, a) in float64, of actions [..., batch, action_dim]."""
    layers = params["params"]["MLP_0"]
    x = np.concatenate([np.broadcast_to(observations, (*actions.shape[:-1], OBS)), actions], -1).astype(float)
    for i in range(len(layers)):
        x = x @ np.asarray(layers[f"Dense_{i}"]["kernel"], float) + np.asarray(layers[f"Dense_{i}"]["bias"], float)
        x = np.maximum(x, 0) if i < len(layers) - 1 else x
    return np.clip(actions + bound * np.tanh(x), -1, 1)


# ---- the limit Phi = 0 ----


def test_without_perturbation_an_update_is_emaqs() -> None:
    """With the vae; the run below has the autoregressive model, and proposals drawn ahead."""
    args, hp = replace(ARGS, behavior="vae"), HP._replace(max_perturbation=0.0)
    emaq_args, emaq_hp = emaq.Args(**SMALL, behavior="vae"), emaq.Hyperparameters()
    state = fresh(args)
    plain = emaq.State(**{name: getattr(state, name) for name in emaq.State._fields})
    for seed in range(2):
        batch = random_batch(seed)
        state, info = update(state, batch, hp, args)
        plain, plain_info = emaq_update(plain, batch, emaq_hp, emaq_args)
        for name in SHARED:
            assert trees_equal(getattr(state, name), getattr(plain, name)), name
        assert all(info[name] == plain_info[name] for name in plain_info)
    assert jax.random.key_data(state.key).tolist() == jax.random.key_data(plain.key).tolist()
    assert info["actor/perturbation"] == 0.0
    changed, _ = update(state, batch, HP, args)
    unchanged, _ = update(state, batch, hp, args)
    assert not trees_equal(changed.critic, unchanged.critic), "the comparison would see a perturbation"


@pytest.fixture
def command(script: Callable[..., Outcome]) -> Callable[..., Outcome]:
    """`command(*flags)`: the command line of BCQ, in this process."""
    return partial(script, "bcq", package="benchmarks")


@pytest.mark.slow
def test_without_perturbation_a_run_is_emaqs(
    script: Callable[..., Outcome], command: Callable[..., Outcome], small_run: list[str], tmp_path: Path
) -> None:
    """States, actions and evaluations to the last bit; on data with a single action, which is fast to compile."""
    data = hopper_like()
    data |= {name: data[name][:, :4] for name in ("observations", "next_observations")} | {
        "actions": data["actions"][:, :1]
    }
    np.savez(tmp_path / "data.npz", **data)
    flags = [*small_run, *smaller("emaq"), "--dataset", tmp_path / "data.npz", "--env", "InvertedPendulum-v5"]
    flags += ["--num-critics", 2, "--screening", "False", "--num-layers", 1]
    flags += ["--num-updates", 30, "--eval-every", 0, "--run-dir"]
    assert script("emaq", *flags, tmp_path / "emaq").status == 0
    ours = command(*flags, tmp_path / "bcq", "--grid", "max_perturbation=0")
    assert (ours.status, ours.err) == (0, "")
    expected, found = arrays_of(tmp_path / "emaq"), arrays_of(tmp_path / "bcq")
    assert len(expected) > 20 and expected.keys() < found.keys()
    for name in expected:
        assert found[name].tobytes() == expected[name].tobytes(), name
    tables = [(tmp_path / name / "evaluations.csv").read_text() for name in ("emaq", "bcq")]
    assert tables[0] == tables[1] and len(tables[0].splitlines()) == 2


def test_online_phase_and_what_is_emaqs_alone_are_refused(command: Callable[..., Outcome]) -> None:
    assert_refused(command("--online-steps", 5), "--online-steps")
    assert_refused(command("--num-updates", 0), "--num-updates 0: must be at least 1")
    assert_refused(command("--backup", "soft"), "--backup")
    assert_refused(command("--grid", "max_perturbation=-0.1"), "--max-perturbation")
    assert_refused(command("--grid", "temperature=1,2"), "--grid")
    with pytest.raises(UsageError, match="no online phase"):
        bcq.Args(online_steps=5).validate()


# ---- the perturbation ----


@pytest.mark.parametrize("bound", [0.05, 0.5])
def test_perturbation_is_bounded_and_actions_stay_in_range(bound: float) -> None:
    state, batch = fresh(), random_batch()
    large = jax.tree.map(lambda p: 20 * p, state.actor)  # tanh saturates
    actions = np.random.default_rng(1).uniform(-1, 1, (7, BATCH, ACT)).astype(np.float32)
    for params in (state.actor, large):
        moved, change = perturbed(params, batch.observations, actions, HP._replace(max_perturbation=bound), ARGS)
        assert np.abs(change).max() <= bound and np.abs(moved).max() <= 1.0
        np.testing.assert_allclose(
            moved, numpy_perturbed(params, batch.observations, actions, bound), rtol=1e-4, atol=1e-5
        )
    assert np.abs(change).max() > 0.9 * bound
    if bound == 0.5:
        assert np.any(np.abs(actions + change) > 1), "some had to be clipped"


def test_gradient_of_the_perturbation_by_finite_differences() -> None:
    """Of -mean Q_1(s, b(s, a)), along random directions; float64 numpy knows nothing of how the loss is built."""
    state, batch = fresh(), random_batch()
    actions = np.random.default_rng(2).uniform(-0.6, 0.6, (BATCH, ACT))  # none is clipped: 0.6 + 0.3 < 1
    critic = jax.tree.map(lambda p: np.asarray(p[0], float), state.critic["params"])

    def loss(params: dict) -> float:
        x = np.concatenate([batch.observations, numpy_perturbed(params, batch.observations, actions, 0.3)], -1)
        (layers,) = critic.values()
        for i in range(len(layers)):
            x = x @ layers[f"Dense_{i}"]["kernel"] + layers[f"Dense_{i}"]["bias"]
            x = np.maximum(x, 0) if i < len(layers) - 1 else x
        return -float(np.mean(x))

    single = jnp.asarray(actions, jnp.float32)
    (value, _), grads = actor_gradient(state.actor, state.critic, batch.observations, single, HP, ARGS)
    assert float(value) == pytest.approx(loss(state.actor), rel=1e-4)
    rng = np.random.default_rng(3)
    params = jax.tree.map(lambda p: np.asarray(p, float), state.actor)
    for _ in range(5):
        direction = jax.tree.map(lambda p: rng.standard_normal(p.shape), params)
        ends = [loss(jax.tree.map(lambda p, d, e=e: p + e * d, params, direction)) for e in (1e-6, -1e-6)]
        along = sum(np.sum(np.asarray(g) * d) for g, d in zip(*map(jax.tree.leaves, (grads, direction)), strict=True))
        assert along == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-3, abs=1e-5)


def test_perturbation_climbs_the_first_of_the_updated_q_functions_and_its_target_follows() -> None:
    """The actor's step is Adam's first, -rate * sign of the gradient at the new critic; the target's is its share."""
    state, batch, hp = fresh(), random_batch(), HP._replace(actor_learning_rate=1e-2, polyak=0.2)
    after, _ = update(state, batch, hp, ARGS)
    key = jax.random.fold_in(state.key, bcq.FOLD)
    actions = propose(state.behavior, batch.observations, key, replace(ARGS, num_proposals=1), ACT)[0]
    actor, target, new_actor, new_target, new_critic = jax.tree.map(
        np.asarray, (state.actor, state.target_actor, after.actor, after.target_actor, after.critic)
    )

    def gradient(critic: dict) -> dict:
        return jax.tree.map(np.asarray, actor_gradient(actor, critic, batch.observations, actions, hp, ARGS)[1])

    grads = gradient(new_critic)
    for old, new, grad in zip(*map(jax.tree.leaves, (actor, new_actor, grads)), strict=True):
        clear = np.abs(grad) > 1e-5
        np.testing.assert_allclose((new - old)[clear], -1e-2 * np.sign(grad)[clear], rtol=1e-2)
    expected = jax.tree.map(lambda old, new: 0.8 * old + 0.2 * new, target, new_actor)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), new_target, expected)
    # A critic whose other Q-functions are replaced has the same gradient, one whose first is has not.
    others = jax.tree.map(lambda p: np.concatenate([p[:1], -3 * p[1:]]), new_critic)
    assert trees_equal(grads, gradient(others))
    first = jax.tree.map(lambda p: np.concatenate([-3 * p[:1], p[1:]]), new_critic)
    assert not trees_equal(grads, gradient(first))


# ---- targets and actions ----


@pytest.mark.parametrize("weight", [1.0, 0.75])
def test_loss_is_that_of_the_hand_computed_target(weight: float) -> None:
    """Proposals moved by the target perturbation, then ensemble, then maximum; terminations mask the bootstrap."""
    state, batch, hp = fresh(), random_batch(), HP._replace(ensemble_weight=weight, discount=0.9)
    _, info = update(state, batch, hp, ARGS)
    u = propose(state.behavior, batch.next_observations, jax.random.split(state.key)[1], ARGS, ACT)
    moved = numpy_perturbed(state.target_actor, batch.next_observations, np.asarray(u), 0.3)
    critic, _ = bcq.modules(ARGS, ACT)
    q = np.asarray(critic.apply(state.target_critic, batch.next_observations, jnp.asarray(moved, jnp.float32)))
    best = np.array([max(weight * min(c) + (1 - weight) * max(c) for c in q[:, :, b].T) for b in range(BATCH)])
    swapped = q.max(axis=1).min(axis=0)
    assert np.abs(best - swapped).max() > 1e-3, "the order of ensemble and maximum matters here"
    targets = [r if t else r + 0.9 * v for r, t, v in zip(batch.rewards, batch.terminations, best, strict=True)]
    fitted = np.asarray(critic.apply(state.critic, batch.observations, batch.actions))
    assert float(info["critic/loss"]) == pytest.approx(((fitted - targets) ** 2).mean(axis=1).sum(), rel=1e-4)


def test_action_is_the_moved_proposal_of_largest_minimum() -> None:
    state, observations, key = fresh(), random_batch(4).observations, jax.random.key(9)
    u = np.asarray(propose(state.behavior, observations, key, ARGS, ACT))
    moved = numpy_perturbed(state.actor, observations, u, 0.3)
    critic, _ = bcq.modules(ARGS, ACT)
    q = np.asarray(critic.apply(state.critic, observations, jnp.asarray(moved, jnp.float32)))
    best = q.min(axis=0).argmax(axis=0)
    assert len(set(best.tolist())) > 1
    expected = moved[best, np.arange(BATCH)]
    np.testing.assert_allclose(
        act(state, HP, observations, key, ARGS, ACT, sample=False), expected, rtol=1e-4, atol=1e-5
    )
