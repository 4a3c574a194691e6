"""TD3+BC. Fujimoto, Gu, 2021, arXiv:2106.06860, on TD3: Fujimoto, van Hoof, Meger, 2018, arXiv:1802.09477.

TD3 whose policy also imitates the dataset; the two terms are balanced by the size of the Q-values:

    a'   = clip(pi'(s') + clip(N(0, policy_noise^2), -noise_clip, noise_clip), -1, 1)                (TD3, Eq. 14)
    L_Q  = sum_k mean (Q_k(s, a) - r - discount (1 - termination) min_j Q'_j(s', a'))^2              (TD3, Eq. 10)
    L_pi = -scale mean Q_1(s, pi(s)) + bc_weight mean (pi(s) - a)^2                                  (Eq. 3)
    scale = alpha / mean |Q_1(s, pi(s))|, a constant for the gradient; the paper's lambda            (Eq. 5)

The policy and all targets move once in `--policy-delay` updates. States are normalised by the dataset's mean and
standard deviation (Eq. 4), in the environment too. From the authors' code, not the paper: the scale comes from the
policy's actions, not the dataset's; the squares of L_pi are averaged over the batch and over the action's dimensions;
the outer clip of a' (the paper clips the noise alone).

Ours: terminations alone cut the bootstrap, and the truncated last step of an episode is kept and bootstraps; the
ensemble may have any size; biases start at zero. The paper has no fine-tuning: online, as in CORL's ReBRAC, the
weight of the imitation falls from 1 towards 0, linearly, but not below `--online-bc-weight`. Actions that are
collected have TD3's noise (ReBRAC's: none).

    python algorithms/td3_bc.py --dataset offax/hopper/medium-expert-v1
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from common import networks, replay
from common.cli import Count, NonNegative, RunArgs, Share, launch, refuse_sweep
from common.data import load
from common.environments import Collector, Evaluator, Returns, make_environment
from common.members import Metrics, join, keep_finite, make_members, repeat
from common.networks import descend
from common.replay import Replay, Transitions, empty_ring, fit_transform, insert
from common.runs import Run


class Hyperparameters(NamedTuple):
    """What --grid can sweep: a value for each member, traced by JAX, so no Python `if` on it."""

    # Weight of the Q-values, once their mean size is 1, against imitation; 0 is behaviour cloning (paper: 2.5).
    alpha: NonNegative = 2.5
    discount: Share = 0.99  # Discount factor (authors' code).
    # Share of policy and critic that moves into their targets when the policy is updated (authors' code).
    polyak: Share = 0.005
    policy_noise: NonNegative = 0.2  # Standard deviation of the noise on the target policy's actions (authors' code).
    noise_clip: NonNegative = 0.5  # Largest size of the noise on the target policy's actions (authors' code).
    actor_learning_rate: NonNegative = 3e-4  # Adam's rate for the policy (authors' code).
    critic_learning_rate: NonNegative = 3e-4  # Adam's rate for the Q-functions (authors' code).
    # Least weight of the imitation, which falls from 1 towards 0 over the online phase (CORL's ReBRAC: 0.5).
    online_bc_weight: Share = 0.5
    # Standard deviation of the noise on actions while collecting data (TD3's paper: 0.1).
    exploration_noise: NonNegative = 0.1


@dataclass(frozen=True)
class Args(RunArgs):
    """TD3+BC: twin delayed deep deterministic policy gradient with behaviour cloning."""

    hp: Hyperparameters = Hyperparameters()
    # Centre and scale states by the dataset's mean and standard deviation (paper, Eq. 4).
    normalize_observations: bool = True
    # Q-functions; their minimum is taken over all of them in the target, the policy follows the first (paper: 2).
    num_critics: Count = 2
    hidden_dim: Count = 256  # Width of every hidden layer (authors' code).
    num_layers: Count = 2  # Hidden layers of every network (authors' code).
    layer_norm: bool = False  # Layer normalisation in the Q-functions (ogbench: as ReBRAC in FQL's code).
    policy_delay: Count = 2  # Critic updates for each update of the policy and the targets (authors' code).

    def validate(self) -> None:
        """UsageError for a number out of range, or a sweep of what only an online phase uses."""
        super().validate()
        if not self.online_steps:
            refuse_sweep(self, {"online_bc_weight", "exploration_noise"}, "with --online-steps 0")


# CORL's: the paper's alpha everywhere. On AntMaze the paper does not normalise states, CORL does. On OGBench the
# networks have the sizes of ReBRAC's in FQL's code (Park et al., 2025), whose layers apply GELU, then layer
# normalisation; alpha and normalised observations are ours.
PRESETS: dict[str, dict[str, Any]] = {
    "locomotion": {"alpha": 2.5},
    "antmaze": {"alpha": 2.5, "reward_shift": -1.0},
    "adroit": {"alpha": 2.5},
    "ogbench": {"alpha": 2.5, "hidden_dim": 512, "num_layers": 4, "layer_norm": True},
}


class Actor(nn.Module):
    """Deterministic policy: MLP, then tanh."""

    action_dim: int
    hidden_dim: int
    num_layers: int

    @nn.compact
    def __call__(self, observations: jax.Array) -> jax.Array:
        trunk = networks.MLP(self.hidden_dim, self.num_layers, self.action_dim, networks.uniform_fan_in)
        return jnp.tanh(trunk(observations))


class State(NamedTuple):
    """Everything that training changes, of one member."""

    actor: Any
    target_actor: Any
    critic: Any
    target_critic: Any
    actor_opt: optax.OptState
    critic_opt: optax.OptState
    step: jax.Array
    online_step: jax.Array
    key: jax.Array


ADAM = optax.scale_by_adam()  # without rate and sign, which `descend` applies


def modules(args: Args, action_dim: int) -> tuple[Actor, networks.QEnsemble]:
    """The policy and the Q-functions."""
    sizes, kernel_init = (args.hidden_dim, args.num_layers), networks.uniform_fan_in
    return Actor(action_dim, *sizes), networks.QEnsemble(args.num_critics, *sizes, kernel_init, args.layer_norm)


def init(key: jax.Array, hp: Hyperparameters, args: Args, obs_dim: int, action_dim: int) -> State:
    """Fresh networks and optimisers; the targets start as copies."""
    actor, critic = modules(args, action_dim)
    actor_key, critic_key, key = jax.random.split(key, 3)
    observations, actions = jnp.zeros((1, obs_dim)), jnp.zeros((1, action_dim))
    actor_params = actor.init(actor_key, observations)
    critic_params = critic.init(critic_key, observations, actions)
    return State(
        actor=actor_params,
        target_actor=jax.tree.map(jnp.copy, actor_params),
        critic=critic_params,
        target_critic=jax.tree.map(jnp.copy, critic_params),
        actor_opt=ADAM.init(actor_params),
        critic_opt=ADAM.init(critic_params),
        step=jnp.zeros((), jnp.int32),
        online_step=jnp.zeros((), jnp.int32),
        key=key,
    )


# TD3, Eq. (14)
def smoothed_actions(key: jax.Array, actions: jax.Array, hp: Hyperparameters) -> jax.Array:
    """The target policy's `actions [batch, action_dim]` with clipped noise, within [-1, 1]."""
    noise = hp.policy_noise * jax.random.normal(key, actions.shape)
    return jnp.clip(actions + jnp.clip(noise, -hp.noise_clip, hp.noise_clip), -1.0, 1.0)


# TD3, Eq. (10)
def critic_loss(q: jax.Array, targets: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Squared error of every Q-function `q [K, batch]` to the same `targets [batch]`, summed over K."""
    assert q.shape[1:] == targets.shape, (q.shape, targets.shape)
    loss = jnp.sum(jnp.mean((q - targets) ** 2, axis=1))
    return loss, {"critic/loss": loss, "critic/q_mean": q.mean(), "critic/q_std": q.std(axis=0).mean()}


# Eq. (3), (5)
def actor_loss(
    actions: jax.Array, data_actions: jax.Array, q: jax.Array, bc_weight: jax.Array | float, hp: Hyperparameters
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """-alpha mean(q) / mean|q| + bc_weight mean((actions - data_actions)^2), `q [batch]`, actions `[batch, dim]`."""
    assert actions.shape == data_actions.shape, (actions.shape, data_actions.shape)
    assert q.shape == actions.shape[:1], (q.shape, actions.shape)
    scale = hp.alpha / jax.lax.stop_gradient(jnp.abs(q).mean())
    bc_loss = jnp.mean((actions - data_actions) ** 2)
    loss = -scale * q.mean() + bc_weight * bc_loss
    return loss, {
        "actor/loss": loss,
        "actor/bc_loss": bc_loss,
        "actor/bc_weight": jnp.asarray(bc_weight),
        "actor/q_scale": scale,
    }


def decayed_bc_weight(online_step: jax.Array, hp: Hyperparameters, args: Args) -> jax.Array:
    """Weight of the imitation: 1 less the share of the online updates already made, at least `online_bc_weight`."""
    updates = args.online_steps - (0 if args.num_updates else args.random_steps)
    return jnp.maximum(1.0 - online_step / max(updates, 1), hp.online_bc_weight)


def update(
    state: State, batch: Transitions, hp: Hyperparameters, args: Args, online: bool = False
) -> tuple[State, dict[str, Any]]:
    """One update of the critic and, when it is due, of the policy (with the new critic) and of the targets."""
    actor, critic = modules(args, batch.actions.shape[-1])
    key, noise_key = jax.random.split(state.key)

    next_actions = smoothed_actions(noise_key, actor.apply(state.target_actor, batch.next_observations), hp)
    next_q = critic.apply(state.target_critic, batch.next_observations, next_actions).min(axis=0)
    targets = batch.rewards + hp.discount * (1.0 - batch.terminations) * next_q

    def loss_of_critic(params: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        return critic_loss(critic.apply(params, batch.observations, batch.actions), targets)

    grads, critic_info = jax.grad(loss_of_critic, has_aux=True)(state.critic)
    critic_params, critic_opt = descend(ADAM, state.critic, grads, state.critic_opt, hp.critic_learning_rate)
    state = state._replace(critic=critic_params, critic_opt=critic_opt, step=state.step + 1, key=key)

    first_critic = critic.clone(num_critics=1)  # the policy follows Q_1 alone
    first_params = jax.tree.map(lambda x: x[:1], critic_params)
    bc_weight = decayed_bc_weight(state.online_step, hp, args)

    def loss_of_actor(params: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        actions = actor.apply(params, batch.observations)
        q = first_critic.apply(first_params, batch.observations, actions).squeeze(0)
        return actor_loss(actions, batch.actions, q, bc_weight, hp)

    def update_actor(state: State) -> tuple[State, dict[str, jax.Array]]:
        grads, info = jax.grad(loss_of_actor, has_aux=True)(state.actor)
        actor_params, actor_opt = descend(ADAM, state.actor, grads, state.actor_opt, hp.actor_learning_rate)
        new_state = state._replace(
            actor=actor_params,
            actor_opt=actor_opt,
            target_actor=optax.incremental_update(actor_params, state.target_actor, hp.polyak),
            target_critic=optax.incremental_update(critic_params, state.target_critic, hp.polyak),
        )
        return new_state, info

    def keep_actor(state: State) -> tuple[State, dict[str, jax.Array]]:
        # Zeros of the metrics' shapes: `due` below leaves them out of the averages.
        return state, jax.tree.map(jnp.zeros_like, jax.eval_shape(update_actor, state)[1])

    due = state.step % args.policy_delay == 0  # on a GPU, where members are vmapped, both branches are computed
    state, actor_info = jax.lax.cond(due, update_actor, keep_actor, state)
    actor_info = {name: (value, due) for name, value in actor_info.items()}
    return state._replace(online_step=state.online_step + online), critic_info | actor_info


def act(
    state: State,
    hp: Hyperparameters,
    observations: jax.Array,
    key: jax.Array,
    args: Args,
    action_dim: int,
    sample: bool,
) -> jax.Array:
    """Actions `[batch, action_dim]` in [-1, 1]: the policy's for evaluation, with noise for data collection."""
    actions = modules(args, action_dim)[0].apply(state.actor, observations)
    noise = hp.exploration_noise * jax.random.normal(key, actions.shape) if sample else 0.0
    return jnp.clip(actions + noise, -1.0, 1.0)


def train(
    state: State, hp: Hyperparameters, data: Replay, num_updates: jax.Array | int, args: Args
) -> tuple[State, Metrics]:
    """`num_updates` updates, each on a fresh uniform minibatch of the data; metrics are sums over them."""

    def step(state: State) -> tuple[State, dict[str, Any]]:
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

    with Run("td3_bc", args, members) as run:
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
