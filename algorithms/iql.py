"""Implicit Q-learning (IQL). Kostrikov, Nair, Levine, 2021, arXiv:2110.06169.

Values are learned from dataset actions alone; an expectile stands in for the maximum over actions:

    L_V  = mean |expectile - 1(q < V(s))| (q - V(s))^2,   q = min_k Q'_k(s, a)                       (Eq. 5)
    L_Q  = sum_k mean (Q_k(s, a) - r - discount (1 - termination) V(s'))^2                           (Eq. 6)
    L_pi = -mean min(exp(beta (q - V(s))), weight_clip) log pi(a|s)                                  (Eq. 7)

Defaults are the paper's (appendix B) unless a comment names another source. From the authors' code alone: the
policy's mean passes through tanh, its log standard deviation is clipped to [-5, 2], kernels start orthogonal. On D4RL's
locomotion sets the paper divides rewards by the span of the returns, and the code multiplies the result by 1000 (CORL
does so on Hopper's medium and replay sets alone). Returns of D4RL's locomotion sets span thousands, so that rewards
shrink; where returns span less than 1000, rewards grow, and a run warns: actor/clipped_fraction then tells how many
weights are clipped.

Ours: terminations alone cut the bootstrap, and the truncated last step of an episode is kept and bootstraps; the
ensemble may have any size; the policy's rate decays by a cosine over the offline phase and is constant at its full
value online, so that fine-tuning may start from any offline checkpoint (the authors' code does not decay it at all in a
run that will be fine-tuned: `--actor-decay-updates 0`).

    python algorithms/iql.py --dataset offax/hopper/medium-expert-v1
"""

import sys
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from common import networks, replay
from common.cli import Count, NonNegative, Positive, RunArgs, Share, launch
from common.data import load
from common.environments import Collector, Evaluator, Returns, make_environment
from common.members import Metrics, join, keep_finite, make_members, repeat
from common.networks import descend
from common.replay import Replay, Transitions, empty_ring, fit_transform, insert
from common.runs import Run


class Hyperparameters(NamedTuple):
    """What --grid can sweep: a value for each member, traced by JAX, so no Python `if` on it."""

    # Expectile of the value regression; 0.5 is policy evaluation, towards 1 the best action of the data (paper: 0.7 on
    # locomotion, 0.9 on AntMaze).
    expectile: Share = 0.7
    # Inverse temperature of the policy's weights; 0 is behaviour cloning (paper: 3 locomotion, 10 AntMaze).
    beta: NonNegative = 3.0
    discount: Share = 0.99  # Discount factor (paper, appendix B).
    polyak: Share = 0.005  # Share of the critic that moves into its target at every update (paper, appendix B).
    actor_learning_rate: NonNegative = 3e-4  # Adam's rate for the policy, before the cosine (paper, appendix B).
    critic_learning_rate: NonNegative = 3e-4  # Adam's rate for the Q-functions (paper, appendix B).
    value_learning_rate: NonNegative = 3e-4  # Adam's rate for the value function (paper, appendix B).
    weight_clip: Positive = 100.0  # Largest weight of a transition in the policy's loss (paper, appendix B).


@dataclass(frozen=True)
class Args(RunArgs):
    """IQL: implicit Q-learning."""

    hp: Hyperparameters = Hyperparameters()
    num_critics: Count = 2  # Q-functions; their minimum is taken over all of them (paper: 2).
    hidden_dim: Count = 256  # Width of every hidden layer (paper, appendix B).
    num_layers: Count = 2  # Hidden layers of every network (paper, appendix B).
    layer_norm: bool = False  # Layer normalisation in the Q- and value functions (ogbench: as IQL in FQL's code).
    dropout: Share = 0.0  # Dropout rate in the policy, while training (paper, appendix B: 0.1 on Adroit and Kitchen).
    # Updates until the cosine takes the policy's rate to 0 (paper, appendix B); 0: never. Default: --num-updates.
    actor_decay_updates: int | None = None

    @property
    def actor_horizon(self) -> int:
        """Updates over which the policy's rate decays."""
        return self.num_updates if self.actor_decay_updates is None else self.actor_decay_updates


# From the configurations in the authors' code; OGBench's from IQL in FQL's code (Park et al., 2025), whose networks
# have these sizes, but GELU before layer normalisation, other initial weights, no tanh on the policy's mean and a
# constant standard deviation; one step is made on all losses together; advantages are those of the Q-functions, not of
# their targets; the discount is 0.995 on humanoidmaze, antmaze-giant and antsoccer.
PRESETS: dict[str, dict[str, Any]] = {
    "locomotion": {"expectile": 0.7, "beta": 3.0, "normalize_returns": True},
    "antmaze": {"expectile": 0.9, "beta": 10.0, "reward_shift": -1.0},
    "kitchen": {"expectile": 0.7, "beta": 0.5, "dropout": 0.1},
    "adroit": {"expectile": 0.7, "beta": 0.5, "dropout": 0.1},
    "ogbench": {
        "expectile": 0.9,
        "beta": 10.0,
        "actor_decay_updates": 0,
        "hidden_dim": 512,
        "num_layers": 4,
        "layer_norm": True,
    },
}


class Actor(nn.Module):
    """Gaussian policy with tanh on the mean and a state-independent log standard deviation in [-5, 2]."""

    action_dim: int
    hidden_dim: int
    num_layers: int
    dropout: float

    @nn.compact
    def __call__(self, observations: jax.Array, training: bool = False) -> tuple[jax.Array, jax.Array]:
        trunk = networks.MLP(self.hidden_dim, self.num_layers, self.action_dim, dropout_rate=self.dropout)
        log_std = self.param("log_std", nn.initializers.zeros, (self.action_dim,))
        return jnp.tanh(trunk(observations, training=training)), jnp.clip(log_std, -5.0, 2.0)


class State(NamedTuple):
    """Everything that training changes, of one member."""

    actor: Any
    critic: Any
    target_critic: Any
    value: Any
    actor_opt: optax.OptState
    critic_opt: optax.OptState
    value_opt: optax.OptState
    step: jax.Array
    key: jax.Array


ADAM = optax.scale_by_adam()  # without rate and sign, which `descend` applies


def modules(args: Args, action_dim: int) -> tuple[Actor, networks.QEnsemble, networks.MLP]:
    """The policy, the Q-functions and the value function."""
    return (
        Actor(action_dim, args.hidden_dim, args.num_layers, args.dropout),
        networks.QEnsemble(args.num_critics, args.hidden_dim, args.num_layers, layer_norm=args.layer_norm),
        networks.MLP(args.hidden_dim, args.num_layers, 1, layer_norm=args.layer_norm),
    )


def init(key: jax.Array, hp: Hyperparameters, args: Args, obs_dim: int, action_dim: int) -> State:
    """Fresh networks and optimisers; the target critic starts as a copy of the critic."""
    actor, critic, value = modules(args, action_dim)
    actor_key, critic_key, value_key, key = jax.random.split(key, 4)
    observations, actions = jnp.zeros((1, obs_dim)), jnp.zeros((1, action_dim))
    actor_params = actor.init(actor_key, observations)
    critic_params = critic.init(critic_key, observations, actions)
    value_params = value.init(value_key, observations)
    return State(
        actor=actor_params,
        critic=critic_params,
        target_critic=jax.tree.map(jnp.copy, critic_params),
        value=value_params,
        actor_opt=ADAM.init(actor_params),
        critic_opt=ADAM.init(critic_params),
        value_opt=ADAM.init(value_params),
        step=jnp.zeros((), jnp.int32),
        key=key,
    )


# Eq. (5)
def value_loss(v: jax.Array, q: jax.Array, expectile: jax.Array | float) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Asymmetric squared error of `v [batch]` to `q [batch]`: weight expectile where q >= v, else 1 - expectile."""
    assert v.shape == q.shape, (v.shape, q.shape)
    weight = jnp.abs(expectile - (q < v))
    loss = jnp.mean(weight * (q - v) ** 2)
    return loss, {"value/loss": loss, "value/v_mean": v.mean()}


# Eq. (6)
def critic_loss(q: jax.Array, targets: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Squared error of every Q-function `q [K, batch]` to the same `targets [batch]`, summed over K."""
    assert q.shape[1:] == targets.shape, (q.shape, targets.shape)
    loss = jnp.sum(jnp.mean((q - targets) ** 2, axis=1))
    return loss, {"critic/loss": loss, "critic/q_mean": q.mean(), "critic/q_std": q.std(axis=0).mean()}


# Eq. (7)
def actor_loss(
    log_prob: jax.Array, advantages: jax.Array, hp: Hyperparameters
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean negative `log_prob [batch]`, weighted by the exponentiated `advantages [batch]`, which are constants."""
    assert log_prob.shape == advantages.shape, (log_prob.shape, advantages.shape)
    weights = jnp.minimum(jnp.exp(hp.beta * advantages), hp.weight_clip)
    loss = -jnp.mean(weights * log_prob)
    return loss, {
        "actor/loss": loss,
        "actor/log_prob": log_prob.mean(),
        "actor/weight_mean": weights.mean(),
        "actor/clipped_fraction": jnp.mean(weights >= hp.weight_clip),
        "actor/advantage_mean": advantages.mean(),
    }


def cosine_decay(step: jax.Array, horizon: int) -> jax.Array:
    """Factor from 1 at step 0 to 0 at `horizon`, and 0 after it; constantly 1 for a horizon of 0."""
    if horizon == 0:
        return jnp.ones((), jnp.float32)
    return 0.5 * (1.0 + jnp.cos(jnp.pi * jnp.minimum(step.astype(jnp.float32) / horizon, 1.0)))


def update(
    state: State, batch: Transitions, hp: Hyperparameters, args: Args, online: bool = False
) -> tuple[State, dict[str, jax.Array]]:
    """One update in the order of the authors' code: value, policy (with the new value), critic, target."""
    actor, critic, value = modules(args, batch.actions.shape[-1])
    key, dropout_key = jax.random.split(state.key)
    q = critic.apply(state.target_critic, batch.observations, batch.actions).min(axis=0)

    def loss_of_value(params: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        return value_loss(value.apply(params, batch.observations).squeeze(-1), q, hp.expectile)

    grads, value_info = jax.grad(loss_of_value, has_aux=True)(state.value)
    value_params, value_opt = descend(ADAM, state.value, grads, state.value_opt, hp.value_learning_rate)
    both = jnp.stack([batch.observations, batch.next_observations])  # V(s) and V(s') in one product
    v, next_v = value.apply(value_params, both).squeeze(-1)

    def loss_of_actor(params: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        mean, log_std = actor.apply(params, batch.observations, training=True, rngs={"dropout": dropout_key})
        return actor_loss(networks.gaussian_log_prob(batch.actions, mean, log_std), q - v, hp)

    grads, actor_info = jax.grad(loss_of_actor, has_aux=True)(state.actor)
    decay = 1.0 if online else cosine_decay(state.step, args.actor_horizon)
    actor_params, actor_opt = descend(ADAM, state.actor, grads, state.actor_opt, decay * hp.actor_learning_rate)

    targets = batch.rewards + hp.discount * (1.0 - batch.terminations) * next_v

    def loss_of_critic(params: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        return critic_loss(critic.apply(params, batch.observations, batch.actions), targets)

    grads, critic_info = jax.grad(loss_of_critic, has_aux=True)(state.critic)
    critic_params, critic_opt = descend(ADAM, state.critic, grads, state.critic_opt, hp.critic_learning_rate)

    new_state = State(
        actor=actor_params,
        critic=critic_params,
        target_critic=optax.incremental_update(critic_params, state.target_critic, hp.polyak),
        value=value_params,
        actor_opt=actor_opt,
        critic_opt=critic_opt,
        value_opt=value_opt,
        step=state.step + 1,
        key=key,
    )
    return new_state, value_info | critic_info | actor_info


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
    mean, log_std = modules(args, action_dim)[0].apply(state.actor, observations)
    noise = jnp.exp(log_std) * jax.random.normal(key, mean.shape) if sample else 0.0
    return jnp.clip(mean + noise, -1.0, 1.0)


def train(
    state: State, hp: Hyperparameters, data: Replay, num_updates: jax.Array | int, args: Args
) -> tuple[State, Metrics]:
    """`num_updates` updates, each on a fresh uniform minibatch of the data; metrics are sums over them."""

    def step(state: State) -> tuple[State, dict[str, jax.Array]]:
        key, sample_key = jax.random.split(state.key)
        batch = replay.sample(sample_key, data, args.batch_size)
        return update(state._replace(key=key), batch, hp, args, online=data.ring is not None)

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

    with Run("iql", args, members) as run:
        state, ring = run.restore({"state": state, "ring": ring}, dataset, transform).values()
        planned = run.before.get("num_updates", args.num_updates)  # of the run that is resumed
        if args.actor_decay_updates is None and planned != args.num_updates:
            print(f"the policy's rate decays over {args.num_updates} updates now, not {planned}", file=sys.stderr)

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
