"""Soft actor-critic (SAC), online. Haarnoja et al., 2018, arXiv:1812.05905.

It trains the behaviour policies behind the `offax/...` datasets and is a comparator for online fine-tuning.

    y    = r + discount (1 - termination) (min_k Q'_k(s', a') - alpha log pi(a'|s')),   a' ~ pi(.|s')      (Eq. 5-6)
    L_Q  = sum_k mean (Q_k(s, a) - y)^2
    L_pi = mean (alpha log pi(a~|s) - min_k Q_k(s, a~)),   a~ ~ pi(.|s)                                    (Eq. 7, 9)
    L_alpha = -log alpha (log pi(a~|s) + target_entropy)                                                   (Eq. 18)

Differences from the paper: the temperature loss is on log alpha, as in the authors' code; the step size of the
critics is larger than the policy's (CleanRL's choice); environment steps come from a small vector of environments, so
that several steps are followed by several updates; the critics may have layer normalisation (`--critic-layer-norm`),
which makes learning steadier at this budget.

    python benchmarks/sac.py --env Hopper-v5 --num-steps 1000000
"""

import csv
import os
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from common import buffers, checkpoints, networks
from common.buffers import Ring, Transitions


class Hyperparameters(NamedTuple):
    """Scalars that may differ between members of a population: traced, never static."""

    actor_learning_rate: float = 3e-4
    critic_learning_rate: float = 1e-3
    alpha_learning_rate: float = 3e-4
    discount: float = 0.99
    polyak: float = 0.005


@dataclass(frozen=True)
class Args:
    """Everything that decides a shape or a loop count."""

    env: str = "Hopper-v5"
    """Gymnasium id of an environment with continuous vectors."""
    seed: int = 0
    """Seed of networks, environments and sampling."""
    num_steps: int = 1_000_000
    """Environment steps in all."""
    num_envs: int = 8
    """Environments stepped together."""
    updates_per_step: float = 1.0
    """Gradient updates per environment step; times num_envs it must be a whole number."""
    random_steps: int = 10_000
    """Steps with uniform random actions before the first update."""
    batch_size: int = 256
    """Transitions per update (paper, table 1)."""
    hidden_dim: int = 256
    """Width of every hidden layer (paper, table 1)."""
    num_layers: int = 2
    """Hidden layers of the actor and of each critic (paper, table 1)."""
    num_critics: int = 2
    """Q-functions; the minimum is taken over all of them."""
    critic_layer_norm: bool = False
    """Layer normalisation in the critics."""
    report_every: int = 20_000
    """Environment steps between a row of the CSV with a snapshot of the policy."""
    checkpoint_every: int = 100_000
    """Environment steps between checkpoints."""
    run_dir: str = "runs/sac"
    """Where snapshots/, training.csv and the checkpoint go; an existing checkpoint there is continued."""


class State(NamedTuple):
    """Everything that training changes."""

    actor: Any
    critic: Any
    target_critic: Any
    log_alpha: jax.Array
    actor_opt: optax.OptState
    critic_opt: optax.OptState
    alpha_opt: optax.OptState
    step: jax.Array
    key: jax.Array


ADAM = optax.scale_by_adam()


def modules(args: Args, action_dim: int) -> tuple[networks.GaussianHead, networks.QEnsemble]:
    """Actor (state-dependent log std in [-5, 2], CleanRL's range) and critics."""
    actor = networks.GaussianHead(action_dim, args.hidden_dim, args.num_layers, -5.0, 2.0, networks.uniform_fan_in)
    critic = networks.QEnsemble(
        args.num_critics, args.hidden_dim, args.num_layers, networks.uniform_fan_in, args.critic_layer_norm
    )
    return actor, critic


def init(key: jax.Array, args: Args, obs_dim: int, action_dim: int) -> State:
    """Fresh networks; the target critic is a copy of the critic."""
    actor, critic = modules(args, action_dim)
    actor_key, critic_key, key = jax.random.split(key, 3)
    observations, actions = jnp.zeros((1, obs_dim)), jnp.zeros((1, action_dim))
    actor_params = actor.init(actor_key, observations)
    critic_params = critic.init(critic_key, observations, actions)
    log_alpha = jnp.zeros(())
    return State(
        actor=actor_params,
        critic=critic_params,
        target_critic=jax.tree.map(jnp.copy, critic_params),
        log_alpha=log_alpha,
        actor_opt=ADAM.init(actor_params),
        critic_opt=ADAM.init(critic_params),
        alpha_opt=ADAM.init(log_alpha),
        step=jnp.zeros((), jnp.int32),
        key=key,
    )


def adam_step(params: Any, grads: Any, opt: optax.OptState, learning_rate: jax.Array) -> tuple[Any, optax.OptState]:
    """One Adam step at a traced learning rate."""
    updates, opt = ADAM.update(grads, opt)
    return jax.tree.map(lambda p, u: p - learning_rate * u, params, updates), opt


def update(state: State, batch: Transitions, hp: Hyperparameters, args: Args) -> tuple[State, dict[str, jax.Array]]:
    """Critics, actor, temperature, targets, each from the networks before this update but for the new critics."""
    action_dim = batch.actions.shape[-1]
    actor, critic = modules(args, action_dim)
    alpha, target_entropy = jnp.exp(state.log_alpha), -float(action_dim)
    next_key, actor_key, key = jax.random.split(state.key, 3)

    next_actions, next_log_prob = networks.squashed_sample(next_key, *actor.apply(state.actor, batch.next_observations))
    next_q = critic.apply(state.target_critic, batch.next_observations, next_actions).min(axis=0)
    targets = batch.rewards + hp.discount * (1.0 - batch.terminations) * (next_q - alpha * next_log_prob)

    def critic_loss(params: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        q = critic.apply(params, batch.observations, batch.actions)
        return jnp.sum(jnp.mean((q - targets) ** 2, axis=1)), {"critic/q_mean": q.mean()}

    (critic_value, info), grads = jax.value_and_grad(critic_loss, has_aux=True)(state.critic)
    critic_params, critic_opt = adam_step(state.critic, grads, state.critic_opt, hp.critic_learning_rate)

    def actor_loss(params: Any) -> tuple[jax.Array, jax.Array]:
        actions, log_prob = networks.squashed_sample(actor_key, *actor.apply(params, batch.observations))
        q = critic.apply(critic_params, batch.observations, actions).min(axis=0)
        return jnp.mean(alpha * log_prob - q), log_prob.mean()

    (actor_value, log_prob), grads = jax.value_and_grad(actor_loss, has_aux=True)(state.actor)
    actor_params, actor_opt = adam_step(state.actor, grads, state.actor_opt, hp.actor_learning_rate)

    alpha_grad = -(log_prob + target_entropy)
    log_alpha, alpha_opt = adam_step(state.log_alpha, alpha_grad, state.alpha_opt, hp.alpha_learning_rate)
    target_critic = optax.incremental_update(critic_params, state.target_critic, hp.polyak)
    metrics = {
        "critic/loss": critic_value,
        "actor/loss": actor_value,
        "actor/entropy": -log_prob,
        "alpha/value": alpha,
    } | info
    state = State(
        actor_params,
        critic_params,
        target_critic,
        log_alpha,
        actor_opt,
        critic_opt,
        alpha_opt,
        state.step + 1,
        key,
    )
    return state, metrics


def act(state: State, observations: jax.Array, key: jax.Array, args: Args, action_dim: int) -> jax.Array:
    """Sampled actions `[batch, action_dim]` in [-1, 1]."""
    mean, log_std = modules(args, action_dim)[0].apply(state.actor, observations)
    return networks.squashed_sample(key, mean, log_std)[0]


@partial(jax.jit, static_argnames=("args", "num_updates"), donate_argnums=(0, 1))
def advance(
    state: State,
    ring: Ring,
    new: Transitions,
    observations: jax.Array,
    hp: Hyperparameters,
    args: Args,
    num_updates: int,
) -> tuple[State, Ring, jax.Array, dict[str, jax.Array]]:
    """Store the new transitions, update `num_updates` times, and act: one dispatch per vector step."""
    ring = buffers.insert(ring, new)

    def body(state: State, _: None) -> tuple[State, dict[str, jax.Array]]:
        key, sample_key = jax.random.split(state.key)
        rows = jax.random.randint(sample_key, (args.batch_size,), 0, ring.size)
        batch = jax.tree.map(lambda x: x[rows], ring.data)
        return update(state._replace(key=key), batch, hp, args)

    state, metrics = jax.lax.scan(body, state, length=num_updates)
    key, act_key = jax.random.split(state.key)
    state = state._replace(key=key)
    actions = act(state, observations, act_key, args, new.actions.shape[-1])
    return state, ring, actions, jax.tree.map(jnp.mean, metrics)


def export_policy(actor: Any) -> dict[str, np.ndarray]:
    """Layers of the policy network in order, `w0, b0, w1, ...`, float32."""
    layers = actor["params"]["MLP_0"]
    names = [f"Dense_{i}" for i in range(len(layers))]
    weights = {f"w{i}": np.asarray(layers[name]["kernel"]) for i, name in enumerate(names)}
    return weights | {f"b{i}": np.asarray(layers[name]["bias"]) for i, name in enumerate(names)}


def main(args: Args) -> None:
    """Collect and update until `num_steps`, leaving a snapshot and a CSV row every `report_every` steps."""
    run_dir = Path(args.run_dir)
    (run_dir / "snapshots").mkdir(parents=True, exist_ok=True)
    envs = gym.make_vec(
        args.env,
        num_envs=args.num_envs,
        vectorization_mode="sync",
        vector_kwargs={"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP},
    )
    obs_dim, action_dim = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
    high = envs.single_action_space.high
    num_updates = int(args.num_envs * args.updates_per_step)
    hp = Hyperparameters()

    state = init(jax.random.key(args.seed), args, obs_dim, action_dim)
    ring = buffers.empty_ring(args.num_steps, obs_dim, action_dim)
    checkpoint, done_steps = run_dir / "checkpoint.npz", 0
    if checkpoint.exists():
        state, ring = checkpoints.load(checkpoint, (state, ring))
        done_steps = checkpoints.metadata(checkpoint)["steps"]
    csv_path = run_dir / "training.csv"
    columns = ["steps", "updates", "seconds", "episodes", "return_mean", "return_std", "length_mean"]
    columns += ["critic/loss", "critic/q_mean", "actor/loss", "actor/entropy", "alpha/value"]
    rows: list[list[str]] = []
    if csv_path.exists():
        with open(csv_path) as file:
            rows = [row for row in list(csv.reader(file))[1:] if int(row[0]) <= done_steps]
    with open(csv_path, "w") as file:
        csv.writer(file).writerows([columns, *rows])

    rng = np.random.default_rng([args.seed, done_steps])
    observations, _ = envs.reset(seed=args.seed + done_steps)
    returns, lengths = np.zeros(args.num_envs), np.zeros(args.num_envs, int)
    finished: list[tuple[float, int]] = []
    actions: Any = rng.uniform(-1, 1, (args.num_envs, action_dim))
    metrics: list[Any] = []
    start, first = time.time(), done_steps
    for steps in range(done_steps + args.num_envs, args.num_steps + 1, args.num_envs):
        actions = np.asarray(actions, np.float32)
        after, rewards, terminations, truncations, info = envs.step(actions * high)
        returns, lengths = returns + rewards, lengths + 1
        true_next = after.copy()
        for i in np.flatnonzero(terminations | truncations):
            true_next[i] = info["final_obs"][i]
            finished.append((returns[i], lengths[i]))
            returns[i] = lengths[i] = 0
        new = Transitions(*(np.asarray(x, np.float32) for x in (observations, actions, rewards, true_next)),
                          *(np.asarray(x, np.float32) for x in (terminations, truncations)))  # fmt: skip
        observations = after
        learning = steps > args.random_steps
        state, ring, actions, step_metrics = advance(
            state, ring, new, np.asarray(after, np.float32), hp, args, num_updates if learning else 0
        )
        if learning:
            metrics.append(step_metrics)
        else:
            actions = rng.uniform(-1, 1, (args.num_envs, action_dim))
        if steps // args.report_every > (steps - args.num_envs) // args.report_every:
            ends = np.array(finished or [(np.nan, 0)])
            row = [steps, int(state.step), round(time.time() - start, 1), len(finished)]
            row += [f"{x:.2f}" for x in (ends[:, 0].mean(), ends[:, 0].std(), ends[:, 1].mean())]
            row += [f"{np.mean([m[name] for m in metrics]):.4f}" if metrics else "" for name in columns[7:]]
            with open(csv_path, "a") as file:
                csv.writer(file).writerow(row)
            np.savez(run_dir / "snapshots" / f"{steps:09d}.npz", **export_policy(state.actor))
            rate = (steps - first) / (time.time() - start)
            print(
                f"{args.env} step {steps} return {row[4]} +- {row[5]} length {row[6]}, {rate:.0f} steps/s", flush=True
            )
            finished, metrics = [], []
        if steps // args.checkpoint_every > (steps - args.num_envs) // args.checkpoint_every:
            checkpoints.save(checkpoint, (state, ring), {"steps": steps, "args": asdict(args)})


if __name__ == "__main__":
    # One thread: three runs side by side on few cores lose nothing to each other.
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
    main(tyro.cli(Args, config=(tyro.conf.FlagConversionOff,)))
