"""Conservative Q-learning (CQL). Kumar, Zhou, Tucker, Levine, 2020, arXiv:2006.04779, on SAC, arXiv:1812.05905.

CQL(H): soft actor-critic whose Q-functions are pushed down where they are large and up at the dataset's actions:

    y     = r + discount (1 - termination) min_j Q'_j(s', a'),   a' ~ pi(.|s')
    gap_k = mean (log sum_i (exp(Q_k(s, a_i)) / p(a_i)) - Q_k(s, a))
    L_Q   = sum_k (mean (Q_k(s, a) - y)^2 + weight gap_k)                                                  (Eq. 4)
    L_pi  = mean (alpha log pi(a~|s) - min_k Q_k(s, a~)),   a~ ~ pi(.|s)                           (SAC, Eq. 7, 9)
    L_alpha = -log alpha mean (log pi(a~|s) + target entropy)                                        (SAC, Eq. 18)

The first term of the gap stands for the paper's log of the integral of exp(Q_k(s, a)) over a: the a_i are n uniform
actions, n of pi(.|s) and n of pi(.|s'), all valued at s, and p is the density each was drawn with. The sum is 3n
times the integral on average, so the gap is about log(3n) too large. This has no gradient, but `--target-gap` must be
chosen with it. The penalty is weight times gap; `--lagrange` multiplies it by a learned factor, which rises while the
gap is above `--target-gap` (Eq. 30). The factor starts at e, and the gap alone is compared, as in CORL and JaxCQL (the
authors' code starts it at 1, and compares weight times gap). The factor is at most a million, as in all three (where,
once above that, it has no gradient and stays there).

Defaults are CORL's, except that `--target-gap` is JaxCQL's and that only some presets normalise observations (CORL:
all but AntMaze's). As in the authors' code and in CORL: the squared error lacks the paper's 1/2; the
target has no entropy term; every loss is that of the parameters before the update (the authors' policy loss has the new
temperature); the temperature learns at the policy's rate. With `--max-backup` the target is max over n actions at s' of
min over the ensemble (CORL, JaxCQL; authors' code: the min of each Q-function's max). In the first `--bc-updates` the
policy maximises log pi(a|s) of dataset actions in place of Q. Initial weights are CORL's: in the Q-functions orthogonal
(last layer: gain 1e-2), in the policy PyTorch's default (last layer: Xavier with gain 1e-2). Its log standard deviation
is the network's output times a learned scale, initially 1, plus a learned offset, initially -1 (JaxCQL: the same; its
last layers have variance 1e-2 / inputs).

Ours: terminations alone cut the bootstrap, and the truncated last step of an episode is kept and bootstraps; the
ensemble may have any size; the biases of the policy start at zero. Online, the same update goes on, and actions are
sampled from the policy (CORL).

The settings are for an accelerator. `--preset cpu` has locomotion's with fewer actions and smaller networks; on other
domains keep theirs and add `--num-actions 4 --num-layers 2 --critic-layers 2`.

    python algorithms/cql.py --dataset offax/hopper/medium-expert-v1
"""

import math
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
from common.cli import Count, NonNegative, RunArgs, Share, launch, refuse_sweep
from common.data import load
from common.environments import Collector, Evaluator, Returns, make_environment
from common.members import Metrics, join, keep_finite, make_members, repeat
from common.networks import descend
from common.replay import Replay, Transitions, empty_ring, fit_transform, insert
from common.runs import Run


class Hyperparameters(NamedTuple):
    """What --grid can sweep: a value for each member, traced by JAX, so no Python `if` on it."""

    # Weight of the gap in the Q-functions' loss; 0 is SAC, with --entropy-backup True (CORL: 10 locomotion, 5 AntMaze,
    # 1 Adroit; authors' code: 5 or 10).
    conservative_weight: NonNegative = 10.0
    # With --lagrange, the gap above which the penalty's factor rises (JaxCQL: 1; CORL: 0.8 AntMaze).
    target_gap: float = 1.0
    # Entropy per dimension of the action, below which the temperature rises (SAC's paper, table 1).
    target_entropy: float = -1.0
    discount: Share = 0.99  # Discount factor (authors' code, CORL).
    polyak: Share = 0.005  # Share of the critic that moves into its target at every update (authors' code, CORL).
    # Adam's rate for policy and temperature (CORL: 3e-5 locomotion, 1e-4 AntMaze, Adroit; authors' code: 1e-4).
    actor_learning_rate: NonNegative = 3e-5
    # Adam's rate for the Q-functions and the penalty's factor (authors' code, CORL).
    critic_learning_rate: NonNegative = 3e-4


@dataclass(frozen=True)
class Args(RunArgs):
    """CQL: conservative Q-learning on soft actor-critic."""

    hp: Hyperparameters = Hyperparameters()
    num_critics: Count = 2  # Q-functions; their minimum is taken over all of them (authors' code, CORL: 2).
    hidden_dim: Count = 256  # Width of every hidden layer (authors' code, CORL).
    num_layers: Count = 3  # Hidden layers of the policy; for the Q-functions --critic-layers (authors' code, CORL).
    critic_layers: Count = 3  # Hidden layers of every Q-function (authors' code, CORL: 3; CORL on AntMaze: 5).
    layer_norm: bool = False  # Layer normalisation in the Q-functions (ours).
    num_actions: Count = 10  # The n of the gap and of --max-backup (authors' code, CORL: 10).
    lagrange: bool = False  # Learn a factor of the weight that holds the gap at --target-gap (CORL: on mazes).
    # Bound below which a state's gap is not lowered further; default: none (CORL: -200 on AntMaze).
    gap_floor: float | None = None
    max_backup: bool = False  # Bootstrap from the best of n actions instead of one (CORL: on AntMaze).
    entropy_backup: bool = False  # Subtract alpha log pi(a'|s') in the target, as SAC does (authors' code, CORL: not).
    # First updates, with behaviour cloning in place of Q in the policy's loss (CORL: 0; authors' code: 40,000).
    bc_updates: int = 0

    def validate(self) -> None:
        """UsageError for a number out of range, or a sweep of --target-gap without --lagrange, which ignores it."""
        super().validate()
        if not self.lagrange:
            refuse_sweep(self, {"target_gap"}, "without --lagrange True")


# CORL's configurations. On hopper-medium it also has --normalize-returns True; on AntMaze its code builds only the
# first Q-function with five layers. OGBench's are ours: CORL's weight for AntMaze, with the sizes of the baselines in
# FQL's code (Park et al., 2025), which has no CQL.
ANTMAZE = {"conservative_weight": 5.0, "lagrange": True, "target_gap": 0.8, "gap_floor": -200.0, "max_backup": True}
ANTMAZE |= {"actor_learning_rate": 1e-4, "critic_layers": 5, "reward_scale": 10.0, "reward_shift": -5.0}
OGBENCH = {"hidden_dim": 512, "num_layers": 4, "critic_layers": 4, "layer_norm": True}
PRESETS: dict[str, dict[str, Any]] = {
    "locomotion": {"conservative_weight": 10.0, "normalize_observations": True},
    "antmaze": ANTMAZE,
    "adroit": {"conservative_weight": 1.0, "actor_learning_rate": 1e-4, "normalize_observations": True},
    "ogbench": {"conservative_weight": 5.0, "actor_learning_rate": 1e-4} | OGBENCH,
    "cpu": {"num_actions": 4, "num_layers": 2, "critic_layers": 2, "normalize_observations": True},  # ours: cheaper
}


class Actor(nn.Module):
    """MLP to the mean and the clipped log standard deviation of a Gaussian, each `[batch, action_dim]`.

    The latter has a learned scale and offset, so that the policy starts with standard deviations near exp(-1).
    """

    action_dim: int
    hidden_dim: int
    num_layers: int

    @nn.compact
    def __call__(self, observations: jax.Array) -> tuple[jax.Array, jax.Array]:
        small = nn.initializers.variance_scaling(1e-4, "fan_avg", "uniform")  # PyTorch's xavier_uniform_(gain=1e-2)
        dims = (self.hidden_dim, self.num_layers, 2 * self.action_dim)
        trunk = networks.MLP(*dims, networks.uniform_fan_in, last_init=small)
        scale = self.param("log_std_scale", nn.initializers.constant(1.0), ())
        offset = self.param("log_std_offset", nn.initializers.constant(-1.0), ())
        mean, log_std = jnp.split(trunk(observations), 2, axis=-1)
        return mean, jnp.clip(scale * log_std + offset, -20.0, 2.0)


class State(NamedTuple):
    """Everything that training changes, of one member."""

    actor: Any
    critic: Any
    target_critic: Any
    log_alpha: jax.Array
    log_factor: jax.Array
    actor_opt: optax.OptState
    critic_opt: optax.OptState
    alpha_opt: optax.OptState
    factor_opt: optax.OptState
    step: jax.Array
    key: jax.Array


ADAM = optax.scale_by_adam()  # without rate and sign, which `descend` applies


def modules(args: Args, action_dim: int) -> tuple[Actor, networks.QEnsemble]:
    """The policy, a Gaussian squashed by tanh, and the Q-functions, whose last layers start near zero (CORL)."""
    sizes, small = (args.hidden_dim, args.critic_layers), partial(networks.orthogonal, gain=1e-2)
    critic = networks.QEnsemble(args.num_critics, *sizes, layer_norm=args.layer_norm, last_init=small)
    return Actor(action_dim, args.hidden_dim, args.num_layers), critic


def init(key: jax.Array, hp: Hyperparameters, args: Args, obs_dim: int, action_dim: int) -> State:
    """Fresh networks and optimisers; the target critic starts as a copy, alpha at 1, the penalty's factor at e."""
    actor, critic = modules(args, action_dim)
    actor_key, critic_key, key = jax.random.split(key, 3)
    observations, actions = jnp.zeros((1, obs_dim)), jnp.zeros((1, action_dim))
    actor_params = actor.init(actor_key, observations)
    critic_params = critic.init(critic_key, observations, actions)
    log_alpha, log_factor = jnp.zeros(()), jnp.ones(())
    return State(
        actor=actor_params,
        critic=critic_params,
        target_critic=jax.tree.map(jnp.copy, critic_params),
        log_alpha=log_alpha,
        log_factor=log_factor,
        actor_opt=ADAM.init(actor_params),
        critic_opt=ADAM.init(critic_params),
        alpha_opt=ADAM.init(log_alpha),
        factor_opt=ADAM.init(log_factor),
        step=jnp.zeros((), jnp.int32),
        key=key,
    )


def squashed_sample(key: jax.Array, mean: jax.Array, log_std: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Reparameterised sample of tanh(N(mean, std)) and its log-density, `[..., action_dim]` and `[...]`.

    The density is computed from the value before the squashing, so it stays finite where tanh saturates:
    log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2u)).
    """
    u = mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape, mean.dtype)
    log_det = jnp.sum(2.0 * (math.log(2.0) - u - jax.nn.softplus(-2.0 * u)), axis=-1)
    return jnp.tanh(u), networks.gaussian_log_prob(u, mean, log_std) - log_det


def penalised_actions(
    key: jax.Array, mean: jax.Array, log_std: jax.Array, num_actions: int
) -> tuple[jax.Array, jax.Array]:
    """Actions of the gap `[(1 + P) n, batch, action_dim]` and their log-densities `[(1 + P) n, batch]`.

    The first n = `num_actions` are uniform on [-1, 1]; n more come from each of P squashed Gaussians (the policy at s
    and at s'), whose `mean` and `log_std` are `[P, batch, action_dim]`.
    """
    uniform_key, policy_key = jax.random.split(key)
    batch_size, action_dim = mean.shape[1:]
    uniform = jax.random.uniform(uniform_key, (num_actions, batch_size, action_dim), minval=-1.0, maxval=1.0)
    mean = jnp.broadcast_to(mean, (num_actions, *mean.shape))
    sampled, log_prob = squashed_sample(policy_key, mean, log_std)
    log_uniform = jnp.full((num_actions, batch_size), -action_dim * math.log(2.0))
    actions = jnp.concatenate([uniform, sampled.reshape(-1, batch_size, action_dim)])
    return actions, jnp.concatenate([log_uniform, log_prob.reshape(-1, batch_size)])


def next_value(next_q: jax.Array, log_prob: jax.Array, alpha: jax.Array, entropy_backup: bool) -> jax.Array:
    """Value `[batch]` of s': the largest over n of the smallest over K of `next_q [K, n, batch]`.

    With `entropy_backup` it is reduced by `alpha` times the `log_prob [n, batch]` of the action it belongs to.
    """
    assert next_q.shape[1:] == log_prob.shape, (next_q.shape, log_prob.shape)
    smallest = next_q.min(axis=0)
    best = smallest.argmax(axis=0, keepdims=True)
    value = jnp.take_along_axis(smallest - alpha * log_prob if entropy_backup else smallest, best, axis=0)
    return value.squeeze(0)


# Eq. (4)
def critic_loss(
    q: jax.Array,
    targets: jax.Array,
    sampled_q: jax.Array,
    log_density: jax.Array,
    weight: jax.Array | float,
    gap_floor: float | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Squared error of every Q-function to the same `targets [batch]` and `weight` times its gap, summed over K.

    `q [K, batch]` are values of dataset actions, `sampled_q [K, m, batch]` of m drawn actions (3n in the
    head of this file) at the same states, whose log-density is `log_density [m, batch]`.
    """
    assert q.shape[1:] == targets.shape, (q.shape, targets.shape)
    assert sampled_q.shape == (q.shape[0], *log_density.shape), (sampled_q.shape, log_density.shape)
    assert log_density.shape[1:] == targets.shape, (log_density.shape, targets.shape)
    gap = jax.nn.logsumexp(sampled_q - log_density, axis=1) - q
    if gap_floor is not None:
        gap = jnp.maximum(gap, gap_floor)
    gap = gap.mean(axis=1)
    td_loss = jnp.sum(jnp.mean((q - targets) ** 2, axis=1))
    loss = td_loss + weight * gap.sum()
    return loss, {
        "critic/loss": loss,
        "critic/td_loss": td_loss,
        "critic/gap": gap.mean(),
        "critic/q_mean": q.mean(),
        "critic/q_sampled_mean": sampled_q.mean(),
        "critic/q_std": q.std(axis=0).mean(),
    }


# SAC, Eq. (7), (9)
def actor_loss(log_prob: jax.Array, value: jax.Array, alpha: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Entropy-regularised negative `value [batch]` of the policy, whose own actions have `log_prob [batch]`."""
    assert log_prob.shape == value.shape, (log_prob.shape, value.shape)
    loss = jnp.mean(alpha * log_prob - value)
    return loss, {"actor/loss": loss, "actor/entropy": -log_prob.mean()}


# SAC, Eq. (18), on log alpha
def alpha_loss(log_alpha: jax.Array, entropy: jax.Array, target_entropy: jax.Array | float) -> jax.Array:
    """Loss whose descent raises the temperature while the `entropy` is below its target, and lowers it above."""
    return log_alpha * (entropy - target_entropy)


# Eq. (30)
def factor_loss(log_factor: jax.Array, gap: jax.Array, hp: Hyperparameters) -> jax.Array:
    """Raises the penalty's factor while the mean `gap` of the Q-functions is above its target."""
    return -jnp.exp(log_factor) * hp.conservative_weight * (gap - hp.target_gap)


def data_log_prob(actions: jax.Array, mean: jax.Array, log_std: jax.Array) -> jax.Array:
    """Log-density `[batch]` of given `actions [batch, action_dim]` under the squashed Gaussian.

    The actions are clipped to [-0.999, 0.999] (JaxCQL), where the squashing has an inverse.
    """
    actions = jnp.clip(actions, -0.999, 0.999)
    log_det = jnp.sum(jnp.log1p(-(actions**2)), axis=-1)
    return networks.gaussian_log_prob(jnp.arctanh(actions), mean, log_std) - log_det


def update(state: State, batch: Transitions, hp: Hyperparameters, args: Args) -> tuple[State, dict[str, jax.Array]]:
    """One update of policy, critic, temperature, factor and target; every loss is of the parameters before it."""
    action_dim = batch.actions.shape[-1]
    actor, critic = modules(args, action_dim)
    actor_key, next_key, penalty_key, key = jax.random.split(state.key, 4)
    alpha = jnp.exp(state.log_alpha)

    def loss_of_actor(params: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        mean, log_std = actor.apply(params, batch.observations)
        actions, log_prob = squashed_sample(actor_key, mean, log_std)
        value = critic.apply(state.critic, batch.observations, actions).min(axis=0)
        if args.bc_updates > 0:
            likelihood = data_log_prob(batch.actions, mean, log_std)
            value = jnp.where(state.step < args.bc_updates, likelihood, value)
        return actor_loss(log_prob, value, alpha)

    grads, actor_info = jax.grad(loss_of_actor, has_aux=True)(state.actor)
    actor_params, actor_opt = descend(ADAM, state.actor, grads, state.actor_opt, hp.actor_learning_rate)

    # All actions are drawn outside of the critic's loss, so that it has no gradient for them or for the policy.
    both = jnp.stack([batch.observations, batch.next_observations])
    mean, log_std = actor.apply(state.actor, both)  # [2, batch, action_dim]
    next_mean = jnp.broadcast_to(mean[1], (args.num_actions if args.max_backup else 1, *mean[1].shape))
    next_actions, next_log_prob = squashed_sample(next_key, next_mean, log_std[1])
    next_q = critic.apply(state.target_critic, batch.next_observations, next_actions)
    next_v = next_value(next_q, next_log_prob, alpha, args.entropy_backup)
    targets = batch.rewards + hp.discount * (1.0 - batch.terminations) * next_v
    sampled, log_density = penalised_actions(penalty_key, mean, log_std, args.num_actions)
    weight = hp.conservative_weight * (jnp.exp(state.log_factor) if args.lagrange else 1.0)

    def loss_of_critic(params: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        q = critic.apply(params, batch.observations, batch.actions)
        sampled_q = critic.apply(params, batch.observations, sampled)
        return critic_loss(q, targets, sampled_q, log_density, weight, args.gap_floor)

    grads, critic_info = jax.grad(loss_of_critic, has_aux=True)(state.critic)
    critic_params, critic_opt = descend(ADAM, state.critic, grads, state.critic_opt, hp.critic_learning_rate)

    target_entropy = hp.target_entropy * action_dim
    grads = jax.grad(alpha_loss)(state.log_alpha, actor_info["actor/entropy"], target_entropy)
    log_alpha, alpha_opt = descend(ADAM, state.log_alpha, grads, state.alpha_opt, hp.actor_learning_rate)
    log_factor, factor_opt = state.log_factor, state.factor_opt
    if args.lagrange:
        grads = jax.grad(factor_loss)(state.log_factor, critic_info["critic/gap"], hp)
        log_factor, factor_opt = descend(ADAM, state.log_factor, grads, state.factor_opt, hp.critic_learning_rate)
        log_factor = jnp.minimum(log_factor, math.log(1e6))  # here: a clip in the loss would have no gradient beyond

    new_state = State(
        actor=actor_params,
        critic=critic_params,
        target_critic=optax.incremental_update(critic_params, state.target_critic, hp.polyak),
        log_alpha=log_alpha,
        log_factor=log_factor,
        actor_opt=actor_opt,
        critic_opt=critic_opt,
        alpha_opt=alpha_opt,
        factor_opt=factor_opt,
        step=state.step + 1,
        key=key,
    )
    return new_state, critic_info | actor_info | {"alpha/value": alpha, "critic/weight": jnp.asarray(weight)}


def act(
    state: State,
    hp: Hyperparameters,
    observations: jax.Array,
    key: jax.Array,
    args: Args,
    action_dim: int,
    sample: bool,
) -> jax.Array:
    """Actions `[batch, action_dim]` in [-1, 1]: the squashed mean for evaluation, or a sample for data collection."""
    mean, log_std = modules(args, action_dim)[0].apply(state.actor, observations)
    return squashed_sample(key, mean, log_std)[0] if sample else jnp.tanh(mean)


def train(
    state: State, hp: Hyperparameters, data: Replay, num_updates: jax.Array | int, args: Args
) -> tuple[State, Metrics]:
    """`num_updates` updates, each on a fresh uniform minibatch of the data; metrics are sums over them."""

    def step(state: State) -> tuple[State, dict[str, jax.Array]]:
        key, sample_key = jax.random.split(state.key)
        batch = replay.sample(sample_key, data, args.batch_size)
        return update(state._replace(key=key), batch, hp, args)

    return repeat(step, state, num_updates)


def print_estimate(args: Args, count: int, done: int, obs_dim: int, action_dim: int) -> None:
    """Print roughly how long the updates not yet `done` take, if that is over 1.5 hours and JAX runs on a CPU.

    Assumed: a pass is two operations per weight and row; a loss with its gradient is three passes, two if the gradient
    is for the action alone; two common cores do 100 GFLOP/s. All is for `count` members.
    """
    start = partial(init, args=args, obs_dim=obs_dim, action_dim=action_dim)
    shapes = jax.eval_shape(start, jax.random.key(0), args.hp)
    pi, q = (sum(x.size for x in jax.tree.leaves(tree)) for tree in (shapes.actor, shapes.critic))
    passes = 3 * (3 * args.num_actions + 1) + 2 + (args.num_actions if args.max_backup else 1)  # gap, policy's, target
    updates = args.num_updates + args.online_steps - done
    hours = count * updates * 2 * args.batch_size * (pi * 5 + q * passes) / 1e11 / 3600
    if hours > 1.5 and jax.default_backend() == "cpu" and not args.quiet:
        advice = "; --num-actions 4 --num-layers 2 --critic-layers 2 is cheaper" if args.num_actions > 4 else ""
        print(f"on two CPU cores this takes roughly {hours:.0f} hours from here on{advice}", file=sys.stderr)


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

    with Run("cql", args, members) as run:
        state, ring = run.restore({"state": state, "ring": ring}, dataset, transform).values()
        print_estimate(args, members.count, run.steps(), obs_dim, action_dim)

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
