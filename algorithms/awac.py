"""Advantage weighted actor-critic (AWAC). Nair, Gupta, Dalal, Levine, 2020, arXiv:2006.09359.

The critic evaluates the policy; the policy imitates the data, each action weighted by its advantage over the policy:

    L_Q  = sum_k mean (Q_k(s, a) - r - discount (1 - termination) min_j Q'_j(s', a'))^2,   a' ~ pi(s')     (algorithm 1)
    A    = min_k Q_k(s, a) - V(s),   V(s) = mean min_k Q_k(s, b),   b ~ pi(s)
    L_pi = -mean w(A) log pi(a|s),   w(A) = exp(A / temperature), a constant for the gradient          (Eq. 4, 14)

with target networks Q', their minimum as in TD3 (appendix B.3), and the paper's lambda as the temperature.

Published code computes the weights w(A) in two ways, and each needs a temperature of its own (`--weights`):
* exp: min(exp(A / temperature), weight_clip), as CORL, which has the strong published offline scores;
* softmax: batch size * softmax over the batch of min(A, advantage_clip) / softmax_temperature, as the authors' code.
  While no advantage is at the limit, a constant added to all of them changes nothing: V(s) matters only by its
  differences between states.

The partition function Z(s) of Eq. 14 is left out, as in the paper. V(s) is taken from samples of the policy or from its
mode (`--value`). The defaults are CORL's: they differ from the paper in networks, temperature, clip, weight decay,
batch size, length and normalised observations, and the policy is updated with the new critic (in the authors' code with
the old one). `--preset demonstrations` is the authors' script for human demonstrations with rewards of 0 and -1, which
differs from the paper's table 1 too. That script also has batches of 128 before the online phase, and online it
alternates 1,000 steps with 1,000 updates. It clamps Q itself at 0, above which Q has no gradient;
`--nonpositive-targets` clamps the targets instead, which is right only where no reward is positive. Two flags of ours
are for few demonstrations, where successive policies differ much in success: `--actor-average` acts by their moving
average, and `--observation-noise` blurs the states that the policy learns from (for Q-functions: Sinha et al., 2021,
arXiv:2103.06326).

Ours: terminations alone cut the bootstrap, always (the authors' script for demonstrations ignores them), and the
truncated last step of an episode is kept and bootstraps; the ensemble may have any size; biases start at zero (not in
CORL), last layers start like the others (authors' code: near zero), target networks as copies; the log standard
deviation is clipped, and beyond its limits has no gradient (authors' code: a sigmoid between them). Fine-tuning
goes on with the same update, on the union of the dataset and the policy's own samples.

    python algorithms/awac.py --dataset offax/hopper/medium-expert-v1
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from common import networks, replay
from common.cli import Count, NonNegative, Positive, RunArgs, Share, UsageError, launch, refuse_sweep
from common.data import load
from common.environments import Collector, Evaluator, Returns, make_environment
from common.members import Metrics, join, keep_finite, make_members, repeat
from common.networks import descend
from common.replay import Replay, Transitions, empty_ring, fit_transform, insert
from common.runs import Run


class Hyperparameters(NamedTuple):
    """What --grid can sweep: a value for each member, traced by JAX, so no Python `if` on it."""

    # Divides the advantage in --weights exp; large: behaviour cloning (CORL: 1/3 locomotion, 0.1 AntMaze and Adroit;
    # paper: 1 on locomotion, 0.3 on manipulation).
    temperature: Positive = 1 / 3
    softmax_temperature: Positive = 2.0  # For --weights softmax (authors' scripts: 2 locomotion, 0.5 demonstrations).
    weight_clip: Positive = 100.0  # Largest weight of a transition for --weights exp (CORL).
    # Largest advantage for --weights softmax (authors' scripts: no limit for locomotion, 0.5 for demonstrations).
    advantage_clip: Positive = 1e6
    discount: Share = 0.99  # Discount factor (paper, table 1).
    polyak: Share = 0.005  # Share of the critic that moves into its target at every update (paper, table 1).
    actor_learning_rate: NonNegative = 3e-4  # Adam's rate for the policy (paper, table 1).
    critic_learning_rate: NonNegative = 3e-4  # Adam's rate for the Q-functions (paper, table 1).
    # L2 penalty on the policy's parameters, in Adam's gradient (CORL: none; paper, table 1: 1e-4).
    actor_weight_decay: NonNegative = 0.0
    # Share of the policy that moves at every update into the average that acts; 1: the policy itself acts (ours).
    actor_average: Share = 1.0


@dataclass(frozen=True)
class Args(RunArgs):
    """AWAC: advantage weighted actor-critic."""

    hp: Hyperparameters = Hyperparameters()
    normalize_observations: bool = True  # Centre and scale states by the dataset's mean and standard deviation (CORL).
    # Form of the policy's weights: exp of the advantage (CORL) or softmax over the batch (authors' code).
    weights: Literal["exp", "softmax"] = "exp"
    # V(s) from samples of the policy (CORL, authors' locomotion) or its mode (authors' demonstrations).
    value: Literal["sample", "mode"] = "sample"
    value_samples: Count = 1  # Samples for --value sample (CORL and authors' code: 1).
    # Keep the critic's targets at or below 0, for rewards that are never positive (paper, appendix B.3: Q itself).
    nonpositive_targets: bool = False
    # Standard deviation of noise on the states in the policy's loss, as a multiple of the minibatch's own (ours).
    observation_noise: NonNegative = 0.0
    num_critics: Count = 2  # Q-functions; their minimum is taken over all of them (CORL, authors' code: 2).
    hidden_dim: Count = 256  # Width of every hidden layer (paper, table 1).
    # Hidden layers of every network (CORL; paper, table 1: 4; authors' code: 2 for the Q-functions).
    num_layers: Count = 3
    layer_norm: bool = False  # Layer normalisation in the Q-functions (ours).
    squash_mean: bool = False  # Pass the policy's mean through tanh (CORL: no; authors' code: yes).
    initial_log_std: float = 0.0  # Log standard deviation of the policy at the start (CORL: 0; authors' code: -3).
    min_log_std: float = -20.0  # Least log standard deviation of the policy (CORL: -20; authors' code: -6).
    max_log_std: float = 2.0  # Largest log standard deviation of the policy (CORL: 2; authors' code: 0).

    def validate(self) -> None:
        """UsageError for a number out of range, or a sweep of what the form of the weights does not use."""
        super().validate()
        if not self.min_log_std <= self.initial_log_std <= self.max_log_std:
            raise UsageError(f"--initial-log-std {self.initial_log_std}: must be from --min-log-std to --max-log-std")
        unused = {"exp": {"softmax_temperature", "advantage_clip"}, "softmax": {"temperature", "weight_clip"}}
        refuse_sweep(self, unused[self.weights], f"with --weights {self.weights}")


# CORL's, and the authors' script for human demonstrations with rewards of 0 and -1. OGBench's are ours: the networks'
# sizes and the weights exp(10 A) of IQL in FQL's code (Park et al., 2025), which has no AWAC, and normalised
# observations.
PRESETS: dict[str, dict[str, Any]] = {
    "locomotion": {"temperature": 1 / 3},
    "antmaze": {"temperature": 0.1, "reward_shift": -1.0},
    "adroit": {"temperature": 0.1},
    "ogbench": {"temperature": 0.1, "hidden_dim": 512, "num_layers": 4, "layer_norm": True},
    "demonstrations": {
        "weights": "softmax",
        "softmax_temperature": 0.5,
        "advantage_clip": 0.5,
        "value": "mode",
        "nonpositive_targets": True,
        "actor_weight_decay": 1e-4,
        "batch_size": 1024,
        "num_layers": 2,
        "squash_mean": True,
        "initial_log_std": -3.0,
        "min_log_std": -6.0,
        "max_log_std": 0.0,
        "normalize_observations": False,
    },
}


class Actor(nn.Module):
    """Gaussian policy, not squashed, with a state-independent log standard deviation."""

    args: Args
    action_dim: int

    @nn.compact
    def __call__(self, observations: jax.Array) -> tuple[jax.Array, jax.Array]:
        args = self.args
        mean = networks.MLP(args.hidden_dim, args.num_layers, self.action_dim, networks.uniform_fan_in)(observations)
        start = nn.initializers.constant(args.initial_log_std)
        log_std = self.param("log_std", start, (self.action_dim,))
        return jnp.tanh(mean) if args.squash_mean else mean, jnp.clip(log_std, args.min_log_std, args.max_log_std)


class State(NamedTuple):
    """Everything that training changes, of one member."""

    actor: Any
    average_actor: Any
    critic: Any
    target_critic: Any
    actor_opt: optax.OptState
    critic_opt: optax.OptState
    step: jax.Array
    key: jax.Array


ADAM = optax.scale_by_adam()  # without rate and sign, which `descend` applies


def modules(args: Args, action_dim: int) -> tuple[Actor, networks.QEnsemble]:
    """The policy and the Q-functions."""
    sizes, kernel_init = (args.hidden_dim, args.num_layers), networks.uniform_fan_in
    return Actor(args, action_dim), networks.QEnsemble(args.num_critics, *sizes, kernel_init, args.layer_norm)


def init(key: jax.Array, hp: Hyperparameters, args: Args, obs_dim: int, action_dim: int) -> State:
    """Fresh networks and optimisers; the target critic starts as a copy of the critic."""
    actor, critic = modules(args, action_dim)
    actor_key, critic_key, key = jax.random.split(key, 3)
    observations, actions = jnp.zeros((1, obs_dim)), jnp.zeros((1, action_dim))
    actor_params = actor.init(actor_key, observations)
    critic_params = critic.init(critic_key, observations, actions)
    return State(
        actor=actor_params,
        average_actor=jax.tree.map(jnp.copy, actor_params),
        critic=critic_params,
        target_critic=jax.tree.map(jnp.copy, critic_params),
        actor_opt=ADAM.init(actor_params),
        critic_opt=ADAM.init(critic_params),
        step=jnp.zeros((), jnp.int32),
        key=key,
    )


def sample_actions(key: jax.Array, mean: jax.Array, log_std: jax.Array, num_samples: int) -> jax.Array:
    """Actions `[num_samples, batch, action_dim]` of the Gaussian policy, clipped to [-1, 1]."""
    noise = jax.random.normal(key, (num_samples, *mean.shape))
    return jnp.clip(mean + jnp.exp(log_std) * noise, -1.0, 1.0)


# The Bellman error of algorithm 1
def critic_loss(q: jax.Array, targets: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Squared error of every Q-function `q [K, batch]` to the same `targets [batch]`, summed over K."""
    assert q.shape[1:] == targets.shape, (q.shape, targets.shape)
    loss = jnp.sum(jnp.mean((q - targets) ** 2, axis=1))
    return loss, {"critic/loss": loss, "critic/q_mean": q.mean(), "critic/q_std": q.std(axis=0).mean()}


def advantage_weights(advantages: jax.Array, hp: Hyperparameters, args: Args) -> jax.Array:
    """Weights `[batch]` of the transitions in the policy's loss; those of the softmax have mean 1."""
    if args.weights == "exp":
        return jnp.minimum(jnp.exp(advantages / hp.temperature), hp.weight_clip)
    return advantages.size * jax.nn.softmax(jnp.minimum(advantages, hp.advantage_clip) / hp.softmax_temperature)


# Eq. (4), and (14) without Z(s)
def actor_loss(
    log_prob: jax.Array, advantages: jax.Array, hp: Hyperparameters, args: Args
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean negative `log_prob [batch]`, with the weights of the `advantages [batch]`, which are constants."""
    assert log_prob.shape == advantages.shape, (log_prob.shape, advantages.shape)
    weights = advantage_weights(advantages, hp, args)
    loss = -jnp.mean(weights * log_prob)
    return loss, {
        "actor/loss": loss,
        "actor/log_prob": log_prob.mean(),
        "actor/weight_mean": weights.mean(),
        "actor/weight_max": weights.max(),
        "actor/advantage_mean": advantages.mean(),
    }


def update(state: State, batch: Transitions, hp: Hyperparameters, args: Args) -> tuple[State, dict[str, jax.Array]]:
    """One update in CORL's order: critic, policy (with the new critic), target."""
    actor, critic = modules(args, batch.actions.shape[-1])
    key, next_key, value_key = jax.random.split(state.key, 3)

    next_actions = sample_actions(next_key, *actor.apply(state.actor, batch.next_observations), 1).squeeze(0)
    next_q = critic.apply(state.target_critic, batch.next_observations, next_actions).min(axis=0)
    targets = batch.rewards + hp.discount * (1.0 - batch.terminations) * next_q
    if args.nonpositive_targets:
        targets = jnp.minimum(targets, 0.0)

    def loss_of_critic(params: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        return critic_loss(critic.apply(params, batch.observations, batch.actions), targets)

    grads, critic_info = jax.grad(loss_of_critic, has_aux=True)(state.critic)
    critic_params, critic_opt = descend(ADAM, state.critic, grads, state.critic_opt, hp.critic_learning_rate)

    mean, log_std = actor.apply(state.actor, batch.observations)
    if args.value == "mode":
        own_actions = jnp.clip(mean, -1.0, 1.0)[None]
    else:
        own_actions = sample_actions(value_key, mean, log_std, args.value_samples)
    # The policy's actions and the dataset's go through the critic together.
    q = critic.apply(critic_params, batch.observations, jnp.concatenate([own_actions, batch.actions[None]])).min(axis=0)
    advantages = q[-1] - q[:-1].mean(axis=0)

    observations = batch.observations
    if args.observation_noise > 0.0:  # without noise XLA computes the policy once, here and for V(s) above
        noise = jax.random.normal(jax.random.fold_in(value_key, 1), observations.shape)
        observations = observations + args.observation_noise * observations.std(axis=0) * noise

    def loss_of_actor(params: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        mean, log_std = actor.apply(params, observations)
        return actor_loss(networks.gaussian_log_prob(batch.actions, mean, log_std), advantages, hp, args)

    grads, actor_info = jax.grad(loss_of_actor, has_aux=True)(state.actor)
    grads = jax.tree.map(lambda g, p: g + hp.actor_weight_decay * p, grads, state.actor)
    actor_params, actor_opt = descend(ADAM, state.actor, grads, state.actor_opt, hp.actor_learning_rate)

    new_state = State(
        actor=actor_params,
        average_actor=optax.incremental_update(actor_params, state.average_actor, hp.actor_average),
        critic=critic_params,
        target_critic=optax.incremental_update(critic_params, state.target_critic, hp.polyak),
        actor_opt=actor_opt,
        critic_opt=critic_opt,
        step=state.step + 1,
        key=key,
    )
    return new_state, critic_info | actor_info


def act(
    state: State,
    hp: Hyperparameters,
    observations: jax.Array,
    key: jax.Array,
    args: Args,
    action_dim: int,
    sample: bool,
) -> jax.Array:
    """Actions `[batch, action_dim]` in [-1, 1]: the mean for evaluation, or a sample for data collection."""
    mean, log_std = modules(args, action_dim)[0].apply(state.average_actor, observations)
    return sample_actions(key, mean, log_std, 1).squeeze(0) if sample else jnp.clip(mean, -1.0, 1.0)


def train(
    state: State, hp: Hyperparameters, data: Replay, num_updates: jax.Array | int, args: Args
) -> tuple[State, Metrics]:
    """`num_updates` updates, each on a fresh uniform minibatch of the data; metrics are sums over them."""

    def step(state: State) -> tuple[State, dict[str, jax.Array]]:
        key, sample_key = jax.random.split(state.key)
        batch = replay.sample(sample_key, data, args.batch_size)
        return update(state._replace(key=key), batch, hp, args)

    return repeat(step, state, num_updates)


def main(args: Args) -> None:
    """The run: load, initialise, train offline, fine-tune online; evaluate, log and checkpoint on the way."""
    members = make_members(args)  # seeds x hyperparameters: the leading axis of states, rings, actions and metrics
    dataset = load(args.dataset, args.env, only_env=not args.num_updates)
    transform = fit_transform(dataset.transitions, args)
    offline = members.replicate(transform.transitions(dataset.transitions)) if args.num_updates else None
    obs_dim, action_dim = dataset.transitions.observations.shape[1], len(dataset.low)
    warm_up = 0 if args.num_updates else args.random_steps

    def explore(state: State, hp: Hyperparameters, observations: jax.Array, key: jax.Array, step: jax.Array) -> Any:
        key = jax.random.fold_in(key, step)
        actions = act(state, hp, observations, key, args, action_dim, sample=True)
        return jnp.where(step < warm_up, jax.random.uniform(key, actions.shape, actions.dtype, -1.0), actions)

    train_all, explore_all = members.map(partial(train, args=args)), members.map(explore)
    act_all = members.map(partial(act, args=args, action_dim=action_dim, sample=False), batched=True)
    keep_finite_all = members.map(keep_finite, batched=True)
    insert_all = members.map(insert, batched=True, donate=(0,))
    tune_all = members.map(partial(train, args=args), donate=(0,))  # in place of the old state
    make_env = partial(make_environment, dataset.env_spec, args.max_episode_steps)
    evaluator = Evaluator(make_env, members, transform)
    state = members.start(partial(init, args=args, obs_dim=obs_dim, action_dim=action_dim))
    ring = members.broadcast(empty_ring(args.online_steps, obs_dim, action_dim)) if args.online_steps else None

    with Run("awac", args, members) as run:
        state, ring = run.restore({"state": state, "ring": ring}, dataset, transform).values()

        def evaluate(episodes: int) -> Returns | None:
            return evaluator.run(partial(act_all, state, members.hp), episodes, run.steps(), run.stopping, run.alive)

        for start, stop in run.chunks("offline", args.num_updates):
            if run.evaluation_due():
                run.save({"state": state})
                run.record_evaluation(evaluate(args.eval_episodes))
            new, metrics = train_all(state, members.hp, Replay(offline), (stop - start) * run.alive)
            state, finite = keep_finite_all(new, state, metrics)
            run.record(stop, metrics, finite)
            if run.checkpoint_due():
                run.save({"state": state})

        if args.online_steps:  # a step of every member's environment, then an update on old and new transitions
            envs = Collector(make_env, members, transform, done=run.done["online"])
            keys = members.keys(0)  # for exploring
            for start, stop in run.chunks("online", args.online_steps):
                if run.evaluation_due():
                    run.save({"state": state, "ring": ring})
                    run.record_evaluation(evaluate(args.eval_episodes))
                before, parts = jax.tree.map(jnp.copy, state), []
                for step in range(start, stop):
                    actions = explore_all(state, members.hp, envs.observations, keys, np.full(len(keys), step))
                    ring = insert_all(ring, envs.step(actions))
                    due = run.alive * (step >= warm_up)
                    state, metrics = tune_all(state, members.hp, Replay(offline, ring), due)
                    parts.append(metrics)
                metrics = join(parts)
                state, finite = keep_finite_all(state, before, metrics)
                run.record(stop, metrics, finite)
                if run.checkpoint_due():
                    run.save({"state": state, "ring": ring})

        run.finish(evaluate(args.final_eval_episodes))


if __name__ == "__main__":
    launch(main, Args, PRESETS)
