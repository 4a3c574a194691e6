"""Soft actor-critic (SAC), online. Haarnoja et al., 2018, arXiv:1812.05905.

It trains the behaviour policies behind the `offax/...` datasets and is a comparator for online fine-tuning.

    y    = r + discount (1 - termination) (min_k Q'_k(s', a') - alpha log pi(a'|s')),   a' ~ pi(.|s')      (Eq. 5-6)
    L_Q  = sum_k mean (Q_k(s, a) - y)^2
    L_pi = mean (alpha log pi(a~|s) - min_k Q_k(s, a~)),   a~ ~ pi(.|s)                                    (Eq. 7, 9)
    L_alpha = -log alpha mean (log pi(a~|s) + target_entropy)                                              (Eq. 18)

Ours: the temperature loss is on log alpha, as in the authors' code; the step size of the
critics is larger than the policy's (CleanRL's choice); environment steps come from a small vector of environments, so
that several steps are followed by several updates; the critics may have layer normalisation (`--critic-layer-norm`),
which makes learning steadier at this budget.

    python benchmarks/sac.py --env Hopper-v5 --updates-per-step 0.5 --critic-layer-norm True
"""

import json
import os
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from algorithms.cql import actor_loss, alpha_loss, squashed_sample
from benchmarks.offax_sets import lock
from benchmarks.tables import Table
from common import networks, replay
from common.cli import Count, NonNegative, Share, UsageError, check_ranges, exit_status, read_flags
from common.environments import Collector, make_environment
from common.members import Members, Metrics, repeat
from common.networks import descend
from common.replay import Replay, Ring, Transform, Transitions, empty_ring, insert
from common.report import fill_tree, read_tree, save_tree, write_atomically


class Hyperparameters(NamedTuple):
    """Numbers that `benchmarks/sac_prior.py` can sweep."""

    actor_learning_rate: NonNegative = 3e-4  # Adam's rate for the policy (paper, table 1).
    critic_learning_rate: NonNegative = 1e-3  # Adam's rate for the Q-functions (CleanRL; paper: 3e-4).
    alpha_learning_rate: NonNegative = 3e-4  # Adam's rate for the temperature (paper, table 1).
    discount: Share = 0.99  # Discount factor (paper, table 1).
    polyak: Share = 0.005  # Share of the critic that moves into its target at every update (paper, table 1).


@dataclass(frozen=True)
class Args:
    """SAC: soft actor-critic, online."""

    hp: Hyperparameters = Hyperparameters()
    env: str = "Hopper-v5"  # Gymnasium id of an environment with continuous vectors.
    seed: int = 0  # Seed of networks, environments and sampling.
    num_steps: Count = 1_000_000  # Environment steps in all.
    num_envs: Count = 8  # Environments stepped together.
    updates_per_step: NonNegative = 1.0  # Updates per environment step; times num_envs it must be a whole number.
    random_steps: int = 10_000  # Steps with uniform random actions before the first update.
    batch_size: Count = 256  # Transitions per update (paper, table 1).
    hidden_dim: Count = 256  # Width of every hidden layer (paper, table 1).
    num_layers: Count = 2  # Hidden layers of the policy and of each Q-function (paper, table 1).
    num_critics: Count = 2  # Q-functions; their minimum is taken over all of them.
    critic_layer_norm: bool = False  # Layer normalisation in the Q-functions.
    report_every: Count = 20_000  # Environment steps between rows of the CSV, each with a snapshot of the policy.
    checkpoint_every: Count = 100_000  # Environment steps between checkpoints.
    # Where snapshots/, training.csv and the checkpoint go; an existing checkpoint there is continued.
    run_dir: str = "runs/sac"

    def validate(self) -> None:
        """UsageError for a number out of range."""
        check_ranges(self)
        check_ranges(self.hp)
        if not (self.updates_per_step * self.num_envs).is_integer():
            raise UsageError(f"--updates-per-step {self.updates_per_step}: times --num-envs it must be a whole number")


FREE = ("report_every", "checkpoint_every", "run_dir")
"""Flags that may differ between the run that left a checkpoint and the one that goes on from it."""


class GaussianHead(nn.Module):
    """MLP to the mean and the clipped log standard deviation of a Gaussian, each `[batch, action_dim]`."""

    action_dim: int
    hidden_dim: int
    num_layers: int

    @nn.compact
    def __call__(self, observations: jax.Array) -> tuple[jax.Array, jax.Array]:
        trunk = networks.MLP(self.hidden_dim, self.num_layers, 2 * self.action_dim, networks.uniform_fan_in)
        mean, log_std = jnp.split(trunk(observations), 2, axis=-1)
        return mean, jnp.clip(log_std, -5.0, 2.0)


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


ADAM = optax.scale_by_adam()  # without rate and sign, which `descend` applies


def modules(args: Args, action_dim: int) -> tuple[GaussianHead, networks.QEnsemble]:
    """Actor (state-dependent log std in [-5, 2], CleanRL's range) and critics."""
    actor = GaussianHead(action_dim, args.hidden_dim, args.num_layers)
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


# Eq. (5), (6)
def critic_loss(q: jax.Array, targets: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Squared error of every Q-function `q [K, batch]` to the same `targets [batch]`, summed over K."""
    loss = jnp.sum(jnp.mean((q - targets) ** 2, axis=1))
    return loss, {"critic/loss": loss, "critic/q_mean": q.mean()}


def update(state: State, batch: Transitions, hp: Hyperparameters, args: Args) -> tuple[State, dict[str, jax.Array]]:
    """One update: critics, actor (on the new critics), temperature, target."""
    action_dim = batch.actions.shape[-1]
    actor, critic = modules(args, action_dim)
    alpha = jnp.exp(state.log_alpha)
    next_key, actor_key, key = jax.random.split(state.key, 3)

    next_actions, next_log_prob = squashed_sample(next_key, *actor.apply(state.actor, batch.next_observations))
    next_q = critic.apply(state.target_critic, batch.next_observations, next_actions).min(axis=0)
    targets = batch.rewards + hp.discount * (1.0 - batch.terminations) * (next_q - alpha * next_log_prob)

    def loss_of_critic(params: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        return critic_loss(critic.apply(params, batch.observations, batch.actions), targets)

    grads, critic_info = jax.grad(loss_of_critic, has_aux=True)(state.critic)
    critic_params, critic_opt = descend(ADAM, state.critic, grads, state.critic_opt, hp.critic_learning_rate)

    def loss_of_actor(params: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        actions, log_prob = squashed_sample(actor_key, *actor.apply(params, batch.observations))
        q = critic.apply(critic_params, batch.observations, actions).min(axis=0)
        return actor_loss(log_prob, q, alpha)

    grads, actor_info = jax.grad(loss_of_actor, has_aux=True)(state.actor)
    actor_params, actor_opt = descend(ADAM, state.actor, grads, state.actor_opt, hp.actor_learning_rate)

    grads = jax.grad(alpha_loss)(state.log_alpha, actor_info["actor/entropy"], -float(action_dim))
    log_alpha, alpha_opt = descend(ADAM, state.log_alpha, grads, state.alpha_opt, hp.alpha_learning_rate)
    target_critic = optax.incremental_update(critic_params, state.target_critic, hp.polyak)
    new_state = State(
        actor=actor_params,
        critic=critic_params,
        target_critic=target_critic,
        log_alpha=log_alpha,
        actor_opt=actor_opt,
        critic_opt=critic_opt,
        alpha_opt=alpha_opt,
        step=state.step + 1,
        key=key,
    )
    return new_state, critic_info | actor_info | {"alpha/value": alpha}


def act(state: State, observations: jax.Array, key: jax.Array, args: Args, action_dim: int) -> jax.Array:
    """Sampled actions `[batch, action_dim]` in [-1, 1]."""
    mean, log_std = modules(args, action_dim)[0].apply(state.actor, observations)
    return squashed_sample(key, mean, log_std)[0]


def train(
    state: State, hp: Hyperparameters, data: Replay, num_updates: jax.Array | int, args: Args
) -> tuple[State, Metrics]:
    """`num_updates` updates, each on a fresh uniform minibatch of the data; metrics are sums over them."""

    def step(state: State) -> tuple[State, dict[str, jax.Array]]:
        key, sample_key = jax.random.split(state.key)
        batch = replay.sample(sample_key, data, args.batch_size)
        return update(state._replace(key=key), batch, hp, args)

    return repeat(step, state, num_updates)


@partial(jax.jit, static_argnames="args", donate_argnums=(0, 1))
def advance(
    state: State, ring: Ring, new: Transitions, observations: jax.Array, args: Args, num_updates: int
) -> tuple[State, Ring, jax.Array, dict[str, jax.Array]]:
    """Store the new transitions, update `num_updates` times, and act: one dispatch per vector step."""
    ring = insert(ring, new)
    state, metrics = train(state, args.hp, Replay(None, ring), num_updates, args)
    key, act_key = jax.random.split(state.key)
    actions = act(state, observations, act_key, args, new.actions.shape[-1])
    means = {name: metrics.sums[name] / metrics.counts[name] for name in metrics.sums}
    return state._replace(key=key), ring, actions, means


def export_policy(actor: Any) -> dict[str, np.ndarray]:
    """Layers of the policy network in order, `w0, b0, w1, ...`, float32."""
    layers = actor["params"]["MLP_0"]
    names = [f"Dense_{i}" for i in range(len(layers))]
    weights = {f"w{i}": np.asarray(layers[name]["kernel"]) for i, name in enumerate(names)}
    return weights | {f"b{i}": np.asarray(layers[name]["bias"]) for i, name in enumerate(names)}


def main(args: Args) -> None:
    """Collect and update until `num_steps`, leaving a snapshot and a CSV row every `report_every` steps."""
    make_env = partial(make_environment, args.env)
    env = make_env()
    obs_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]
    env.close()
    raw = Transform(np.zeros(obs_dim, np.float32), np.ones(obs_dim, np.float32), reward_scale=1.0, reward_shift=0.0)
    run_dir = Path(args.run_dir)
    (run_dir / "snapshots").mkdir(parents=True, exist_ok=True)
    state = init(jax.random.key(args.seed), args, obs_dim, action_dim)
    ring = empty_ring(args.num_steps, obs_dim, action_dim)
    checkpoint, first, table = run_dir / "checkpoint.npz", 0, Table(run_dir / "training.csv")
    if checkpoint.exists():
        arrays, metadata = read_tree(checkpoint)
        ours, theirs = json.loads(json.dumps(asdict(args))), metadata["args"]
        if odd := [name for name in ours if name not in FREE and theirs.get(name) != ours[name]]:
            raise UsageError(f"{run_dir} holds a run with {odd[0]} {theirs.get(odd[0])}; use another --run-dir")
        (state, ring), first = fill_tree(checkpoint, arrays, (state, ring)), metadata["steps"]
    elif table.path.exists():
        raise UsageError(f"{run_dir} holds a run without a checkpoint; delete it, or use another --run-dir")
    # What comes after the checkpoint goes; also behavior_policies.py's measurements of it.
    for written in (table, Table(run_dir / "snapshots.csv")):
        written.replace([row for row in written.read() if int(row["steps"]) <= first])
    for snapshot in (run_dir / "snapshots").glob("*.npz"):
        if int(snapshot.stem) > first:
            snapshot.unlink()

    mesh = Mesh(np.array(jax.local_devices()[:1]), ("members",))
    one = Members([0], 1, np.array([args.seed]), args.hp, [{}], mesh)
    collector = Collector(make_env, one, raw, args.num_envs, done=first)
    rng = np.random.default_rng([args.seed, first])
    running = np.zeros((2, args.num_envs))  # returns and lengths of the episodes that go on
    episodes: list[tuple[float, float]] = []  # and of those that have ended since the last row
    actions: Any = None
    metrics: list[dict[str, jax.Array]] = []
    start = time.time()
    for steps in range(first + args.num_envs, args.num_steps + 1, args.num_envs):
        if steps <= args.random_steps or actions is None:
            actions = rng.uniform(-1.0, 1.0, (args.num_envs, action_dim)).astype(np.float32)
        new = jax.tree.map(lambda x: x[0], collector.step(actions[None]))
        running += (new.rewards, np.ones(args.num_envs))
        for i in np.flatnonzero(new.terminations + new.truncations):
            episodes.append((float(running[0, i]), float(running[1, i])))
            running[:, i] = 0.0
        num_updates = int(args.num_envs * args.updates_per_step) if steps > args.random_steps else 0
        state, ring, actions, means = advance(state, ring, new, collector.observations[0], args, num_updates)
        if num_updates:
            metrics.append(means)
        if steps // args.report_every > (steps - args.num_envs) // args.report_every:
            seconds = time.time() - start
            returns, lengths = np.array(episodes or [(np.nan, 0.0)]).T
            row = {"steps": steps, "updates": int(state.step), "seconds": seconds, "episodes": len(episodes)}
            row |= {"return_mean": float(returns.mean()), "return_std": float(returns.std())}
            row |= {"length_mean": float(lengths.mean())}
            row |= {name: float(np.mean([m[name] for m in metrics])) if metrics else None for name in means}
            table.append([row])
            snapshot = run_dir / "snapshots" / f"{steps:09d}.npz"
            write_atomically(snapshot, partial(np.savez, **export_policy(state.actor)))
            rate = (steps - first) / seconds
            print(f"{args.env} {steps}: return {row['return_mean']:.0f}, {rate:.0f} steps/s", flush=True)
            episodes.clear()
            metrics.clear()
        last = steps + args.num_envs > args.num_steps
        if last or steps // args.checkpoint_every > (steps - args.num_envs) // args.checkpoint_every:
            save_tree(checkpoint, (state, ring), {"steps": steps, "args": asdict(args)})


if __name__ == "__main__":
    # One thread: runs side by side on few cores lose nothing to each other.
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
    with exit_status():
        args = read_flags(Args)
        args.validate()
        Path(args.run_dir).mkdir(parents=True, exist_ok=True)
        with lock(Path(args.run_dir, ".lock"), f"another process is writing to {args.run_dir}"):
            main(args)
