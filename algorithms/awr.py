"""Advantage-weighted regression (AWR). Peng, Kumar, Zhang, Levine, 2019, arXiv:1910.00177.

Each iteration fits a value function to the returns of the data, then the policy to its actions, each action weighted by
its advantage:

    V    = argmin_V  mean (G - V(s))^2                                                                    (Eq. 56)
    A    = G - V(s),   normalised over all rows: (A - mean A) / (std A + 1e-5)                            (Eq. 57)
    pi   = argmax_pi mean w(A) log pi(a|s),   w(A) = min(exp(A / temperature), weight_clip)               (Eq. 38, 55)

with the TD(lambda) return G of the whole trajectory, computed backwards and anew from the latest V in each iteration:

    G_t = r_t + discount ((1 - lambda) V(s_t+1) + lambda G_t+1),   at an episode's end r_t + discount V(s_t+1),

where V is 0 after a termination and bootstraps after a truncation; lambda = 1 is the Monte-Carlo return. States are
normalised by their running mean and standard deviation (Eq. 58). The network's output is V (1 - discount), which has
the same effect as scaling rewards by 1 - discount (Eq. 59).

Offline, an iteration makes `--value-updates` updates of the value function, then `--policy-updates` of the policy, on
minibatches of the whole dataset; only the policy's are counted. A run that is resumed with a larger `--num-updates`
begins a new iteration, so it equals a run in one piece if it stopped at a multiple of `--policy-updates`. Online
(`--online-steps`; with `--num-updates 0` the setting of the paper), an iteration first makes about
`--samples-per-iteration` environment steps. Episodes that have ended enter a ring of the newest `--buffer-size`
transitions; after an offline phase, minibatches are of the dataset and the ring. If the beginning of an episode is
overwritten the rest stays, as its returns do not need the beginning.

Where the paper and the authors' code differ, or say too little:
* Step size of the value function: 1e-4 in the paper, 1e-2 in the code. 1e-2 is the default: online on Hopper-v5 one of
  three seeds with 1e-4 had not left its first plateau after 300,000 steps, and the others were as with 1e-2
  (results/awr-hopper).
* Updates in an iteration: the paper's numbers, and fewer in a shorter iteration (the code: more with more samples).
* lambda = 0.95, the policy's fixed standard deviation, and the penalty on means outside the actions' bounds are from
  the code. Sampled actions enter the policy's loss as drawn, even out of bounds; the environment gets them clipped.

Without the clip of the weights (`--weight-clip 1e30`) some of the paper's runs, and all three of ours, ended in numbers
that are not finite (results/awr-hopper).

Ours: minibatches are drawn with replacement; the normaliser takes in new states before an iteration's updates, not
after them, so that a policy acts with the same normaliser that it was trained with; a member's environments go on
across iterations, so an episode may begin with one policy and end with the next. Evaluations and checkpoints that are
due within an iteration follow it. The first online iteration lasts until every member has an episode. There are no
random steps: the policy acts from the start.

    python algorithms/awr.py --dataset offax/hopper/medium-expert-v1
    python algorithms/awr.py --env Hopper-v5 --num-updates 0 --online-steps 1000000
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from common import networks, replay
from common.cli import Count, NonNegative, Positive, RunArgs, Share, UsageError, launch, parse_grid, refuse_sweep
from common.data import load
from common.environments import Collector, Evaluator, Returns, make_environment
from common.members import Metrics, keep_finite, make_members, repeat
from common.networks import descend
from common.replay import Recorded, Replay, Ring, Transitions, empty_ring, fit_transform
from common.runs import Run


class Hyperparameters(NamedTuple):
    """What --grid can sweep: a value for each member, traced by JAX, so no Python `if` on it."""

    # The paper's beta, in standard deviations of the advantage; large is behaviour cloning (authors' code).
    temperature: Positive = 1.0
    weight_clip: Positive = 20.0  # Largest weight of a transition (paper, appendix C); 1e30: no clip.
    discount: Share = 0.99  # Discount factor (authors' code).
    td_lambda: Share = 0.95  # lambda of the TD(lambda) returns; 1: Monte Carlo (authors' code).
    actor_learning_rate: NonNegative = 5e-5  # Step size of the policy (paper, appendix C).
    value_learning_rate: NonNegative = 1e-2  # Step size of the value function (authors' code; paper, appendix C: 1e-4).
    momentum: Share = 0.9  # Momentum for --optimizer sgd (paper, appendix C).
    std: Positive = 0.4  # Standard deviation of the policy (authors' code: 0.4, Ant 0.2).
    bound_weight: NonNegative = 10.0  # Weight of the penalty on mean actions outside [-1, 1] (authors' code).


@dataclass(frozen=True)
class Args(RunArgs):
    """AWR: advantage-weighted regression."""

    hp: Hyperparameters = Hyperparameters()
    optimizer: Literal["sgd", "adam"] = "sgd"  # sgd has momentum (paper, appendix C).
    # Width of the first hidden layer; each following one is half as wide (paper, appendix C: 128 and 64).
    hidden_dim: Count = 128
    num_layers: Count = 2  # Hidden layers of both networks (paper, appendix C).
    value_updates: Count = 200  # Updates of the value function in an iteration (paper, appendix C).
    policy_updates: Count = 1000  # Updates of the policy in an iteration (paper, appendix C).
    # Environment steps in an online iteration (authors' code; paper, appendix C: about 2000).
    samples_per_iteration: Count = 2048
    buffer_size: Count = 50_000  # Transitions that are kept of the online phase (paper, appendix C).
    num_environments: Count = 2  # Environments of each member in the online phase (ours; authors' code: 1).
    # States after which their mean and deviation are frozen (authors' code); 0: states are not normalised.
    normalizer_samples: int = 300_000
    scale_values: bool = True  # The network's output is V (1 - discount) (paper, Eq. 59).
    normalize_advantages: bool = True  # Centre and scale advantages over all rows (paper, Eq. 57).
    random_steps: Literal[0] = 0  # Always 0: the policy acts from the start (ours).

    def validate(self) -> None:
        """UsageError for a number out of range, or a sweep of what the other flags make unused."""
        super().validate()
        discounts = [values.get("discount", self.hp.discount) for values in parse_grid(self.grid, self.hp._fields)]
        if self.scale_values and np.float32(max(discounts)) >= 1.0:
            raise UsageError("--discount 1: must be below 1, or pass --scale-values False")
        if math.lcm(self.value_updates, self.policy_updates) >= 2**31:  # the largest product in `train`
            raise UsageError(f"--value-updates {self.value_updates}: too many beside --policy-updates for 32 bits")
        if self.optimizer != "sgd":
            refuse_sweep(self, {"momentum"}, f"with --optimizer {self.optimizer}")


# All have the defaults. The authors' settings differ by environment instead: the policy's step size (Hopper
# 1e-4, Walker2d 2.5e-5, Humanoid 1e-5; on Ant and HalfCheetah the paper's) and the deviation on Ant, see `std`.
PRESETS: dict[str, dict[str, Any]] = {"locomotion": {}, "antmaze": {}, "adroit": {}}


class Network(nn.Module):
    """Hidden ReLU layers, each half as wide as the one before, then a linear layer to `output_dim`."""

    args: Args
    output_dim: int
    output_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.args.num_layers):
            x = nn.relu(nn.Dense(max(1, self.args.hidden_dim // 2**i), kernel_init=networks.glorot)(x))
        return nn.Dense(self.output_dim, kernel_init=self.output_init)(x)


def small_uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """U(-0.01, 0.01), with which the authors' code starts the policy's last layer."""
    return jax.random.uniform(key, shape, dtype, -0.01, 0.01)


class Part(NamedTuple):
    """The offline data or a member's ring as a whole, `[rows, ...]`; `written` counts overwritten rows too.

    Time runs from row `start` to the end and on from row 0: rows not yet written come first, the newest one last.
    """

    data: Recorded | Transitions
    start: jax.Array | int
    written: jax.Array | int
    number: int  # 0 offline, 1 online


def parts(data: Replay) -> list[Part]:
    """Offline data and ring, whichever are there, in the order of the row numbers."""
    offline, ring, member, _ = data
    found = [] if offline is None else [Part(offline, 0, len(offline.rewards), 0)]
    if ring is not None:
        own = ring if member is None else jax.tree.map(lambda x: x[member], ring)
        found.append(Part(own.data, own.written % own.capacity, own.written, 1))
    return found


class Normalizer(NamedTuple):
    """Mean and sum of squared deviations, `[obs_dim]` each, of `count` states; how many rows of each part were seen."""

    count: jax.Array
    mean: jax.Array
    squares: jax.Array
    seen: jax.Array  # [2] by the part's number


# Eq. (58)
def observe(normalizer: Normalizer, data: Replay, limit: jax.Array | int) -> Normalizer:
    """The normaliser, updated by all states that are new since the last call, unless it has `limit` already."""

    def add(normalizer: Normalizer) -> Normalizer:
        for rows, start, written, number in parts(data):
            not_seen = written - normalizer.seen[number]
            age = (start - 1 - jnp.arange(len(rows.rewards))) % len(rows.rewards)
            new = (age < not_seen)[:, None].astype(jnp.float32)
            count = jnp.minimum(not_seen, len(rows.rewards)).astype(jnp.float32)
            total = normalizer.count + count
            mean = jnp.sum(new * rows.observations, axis=0) / jnp.maximum(count, 1.0)
            squares = jnp.sum(new * (rows.observations - mean) ** 2, axis=0)
            change, share = mean - normalizer.mean, count / jnp.maximum(total, 1.0)
            normalizer = normalizer._replace(
                count=total,
                mean=normalizer.mean + change * share,
                squares=normalizer.squares + squares + change**2 * normalizer.count * share,
                seen=normalizer.seen.at[number].set(written),
            )
        return normalizer

    return jax.lax.cond(normalizer.count < limit, add, lambda same: same, normalizer)


def normalize(normalizer: Normalizer, observations: jax.Array) -> jax.Array:
    """(observations - mean) / max(std, 0.01) (authors' code); unchanged while the normaliser has seen no state."""
    std = jnp.sqrt(normalizer.squares / jnp.maximum(normalizer.count, 1.0))
    return (observations - normalizer.mean) / jnp.where(normalizer.count > 0, jnp.maximum(std, 0.01), 1.0)


class State(NamedTuple):
    """Everything that training changes, of one member."""

    actor: Any
    value: Any
    normalizer: Normalizer
    actor_opt: optax.OptState
    value_opt: optax.OptState
    step: jax.Array
    key: jax.Array


def optimizer(hp: Hyperparameters, args: Args) -> optax.GradientTransformation:
    """The direction of a step, without its size."""
    return optax.trace(hp.momentum) if args.optimizer == "sgd" else optax.scale_by_adam()


def modules(args: Args, action_dim: int) -> tuple[Network, Network]:
    """The policy's mean and the value function."""
    return Network(args, action_dim, small_uniform), Network(args, 1, networks.glorot)


def init(key: jax.Array, hp: Hyperparameters, args: Args, obs_dim: int, action_dim: int) -> State:
    """Fresh networks and optimisers, and a normaliser that has seen nothing."""
    actor, value = modules(args, action_dim)
    actor_key, value_key, key = jax.random.split(key, 3)
    observations, none = jnp.zeros((1, obs_dim)), jnp.zeros(2, jnp.int32)
    actor_params, value_params = actor.init(actor_key, observations), value.init(value_key, observations)
    return State(
        actor=actor_params,
        value=value_params,
        normalizer=Normalizer(jnp.zeros(()), observations[0], observations[0], none),
        actor_opt=optimizer(hp, args).init(actor_params),
        value_opt=optimizer(hp, args).init(value_params),
        step=jnp.zeros((), jnp.int32),
        key=key,
    )


def policy_mean(params: Any, normalizer: Normalizer, observations: jax.Array, args: Args, action_dim: int) -> jax.Array:
    """Mean `[batch, action_dim]` of the Gaussian policy; its standard deviation is `hp.std` everywhere."""
    return modules(args, action_dim)[0].apply(params, normalize(normalizer, observations))


def value_scale(hp: Hyperparameters, args: Args) -> jax.Array | float:
    """V divided by the network's output (Eq. 59)."""
    return 1.0 / (1.0 - hp.discount) if args.scale_values else 1.0


def lambda_returns(
    rewards: jax.Array, next_values: jax.Array, terminations: jax.Array, truncations: jax.Array, hp: Hyperparameters
) -> jax.Array:
    """TD(lambda) returns `[rows]` of time-ordered rows, with `next_values` V(s') of each row's own next state.

    A step is affine in the next one's return, G_t = a_t + b_t G_t+1 with b_t = 0 at the end of an episode and of the
    rows, so the recursion runs backwards as a scan over compositions, in parallel.
    """
    ends = ((terminations + truncations) > 0).at[-1].set(True)
    bootstrap = hp.discount * (1.0 - terminations) * next_values
    a = rewards + jnp.where(ends, bootstrap, (1.0 - hp.td_lambda) * bootstrap)
    b = jnp.where(ends, 0.0, hp.discount * hp.td_lambda)

    def compose(later: tuple[jax.Array, ...], earlier: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return earlier[0] + earlier[1] * later[0], earlier[1] * later[1]

    return jax.lax.associative_scan(compose, (a, b), reverse=True)[0]


BLOCK = 8192  # rows whose values are computed at once: of a million, the hidden layers would fill gigabytes


def values_and_returns(state: State, data: Replay, hp: Hyperparameters, args: Args) -> tuple[jax.Array, ...]:
    """V(s) and the TD(lambda) return of every row of the data, and whether it is written, each `[rows]`."""
    network = modules(args, 1)[1]

    def output(observation: jax.Array) -> jax.Array:
        return network.apply(state.value, normalize(state.normalizer, observation)).squeeze(-1)

    def values(observations: jax.Array) -> jax.Array:
        return value_scale(hp, args) * jax.lax.map(output, observations, batch_size=BLOCK)

    found = []
    for rows, start, written, _ in parts(data):
        if isinstance(rows, Recorded):  # most states are also the next state of another row
            of_states = values(rows.states)
            now, later = of_states[: len(rows.rewards)], of_states[rows.successors]
        else:
            now, later = values(rows.observations), values(rows.next_observations)
        columns = (rows.rewards, later, rows.terminations, rows.truncations)
        returns = lambda_returns(*(jnp.roll(column, -start) for column in columns), hp)
        found.append((now, jnp.roll(returns, start), jnp.arange(len(returns)) < written))
    return tuple(map(jnp.concatenate, zip(*found, strict=True)))


def advantage_weights(advantages: jax.Array, written: jax.Array, hp: Hyperparameters, args: Args) -> jax.Array:
    """Weights `[rows]` of the transitions in the policy's loss, by the `advantages` of the rows that are `written`."""
    if args.normalize_advantages:  # Eq. (57)
        count = jnp.sum(written)
        mean = jnp.sum(jnp.where(written, advantages, 0.0)) / count
        std = jnp.sqrt(jnp.sum(jnp.where(written, (advantages - mean) ** 2, 0.0)) / count)
        advantages = (advantages - mean) / (std + 1e-5)
    return jnp.minimum(jnp.exp(advantages / hp.temperature), hp.weight_clip)


# Eq. (56)
def value_loss(values: jax.Array, returns: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Half the squared error of `values [batch]` to `returns [batch]`, both in the units of the network's output."""
    assert values.shape == returns.shape, (values.shape, returns.shape)
    loss = 0.5 * jnp.mean((values - returns) ** 2)
    return loss, {"value/loss": loss, "value/v_mean": values.mean(), "value/return_mean": returns.mean()}


# Eq. (38), (55)
def actor_loss(
    log_prob: jax.Array, weights: jax.Array, mean: jax.Array, hp: Hyperparameters
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean negative `log_prob [batch]`, weighted by `weights [batch]`; a penalty on `mean` actions out of bounds."""
    assert log_prob.shape == weights.shape, (log_prob.shape, weights.shape)
    excess = jnp.maximum(jnp.abs(mean) - 1.0, 0.0)
    bound_loss = 0.5 * jnp.mean(jnp.sum(excess**2, axis=-1))
    loss = -jnp.mean(weights * log_prob) + hp.bound_weight * bound_loss
    return loss, {
        "actor/loss": loss,
        "actor/log_prob": log_prob.mean(),
        "actor/bound_loss": bound_loss,
        "actor/weight_mean": weights.mean(),
        "actor/weight_max": weights.max(),
    }


def update_value(
    state: State, batch: Transitions, returns: jax.Array, hp: Hyperparameters, args: Args
) -> tuple[State, dict[str, jax.Array]]:
    """One step of the value function towards the `returns [batch]`, which stay as they are during the iteration."""
    network = modules(args, 1)[1]
    observations = normalize(state.normalizer, batch.observations)

    def loss_of_value(params: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        return value_loss(network.apply(params, observations).squeeze(-1), returns / value_scale(hp, args))

    grads, info = jax.grad(loss_of_value, has_aux=True)(state.value)
    value_params, value_opt = descend(optimizer(hp, args), state.value, grads, state.value_opt, hp.value_learning_rate)
    return state._replace(value=value_params, value_opt=value_opt), info


def update_actor(
    state: State, batch: Transitions, weights: jax.Array, hp: Hyperparameters, args: Args
) -> tuple[State, dict[str, jax.Array]]:
    """One step of the policy towards the actions of the batch, weighted by `weights [batch]`."""

    def loss_of_actor(params: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        mean = policy_mean(params, state.normalizer, batch.observations, args, batch.actions.shape[-1])
        return actor_loss(networks.gaussian_log_prob(batch.actions, mean, jnp.log(hp.std)), weights, mean, hp)

    grads, info = jax.grad(loss_of_actor, has_aux=True)(state.actor)
    actor_params, actor_opt = descend(optimizer(hp, args), state.actor, grads, state.actor_opt, hp.actor_learning_rate)
    return state._replace(actor=actor_params, actor_opt=actor_opt, step=state.step + 1), info


def act(
    state: State,
    hp: Hyperparameters,
    observations: jax.Array,
    key: jax.Array,
    args: Args,
    action_dim: int,
    sample: bool,
) -> jax.Array:
    """Actions `[batch, action_dim]`: the mean within [-1, 1] for evaluation, or a sample, as drawn, to collect data."""
    mean = policy_mean(state.actor, state.normalizer, observations, args, action_dim)
    return mean + hp.std * jax.random.normal(key, mean.shape) if sample else jnp.clip(mean, -1.0, 1.0)


def train(
    state: State, hp: Hyperparameters, data: Replay, num_updates: jax.Array | int, args: Args
) -> tuple[State, Metrics]:
    """One iteration: `num_updates` policy updates and proportionally many of the value function; sums of metrics.

    Returns and weights of all rows are computed once, before the updates that use them. With 0 updates, as for
    a member that has diverged, the state stays as it is.
    """

    def minibatch(state: State) -> tuple[State, jax.Array, Transitions]:
        key, sample_key = jax.random.split(state.key)
        rows = replay.sample_rows(sample_key, data, args.batch_size)
        return state._replace(key=key), rows, replay.take(data, rows)

    def value_step(state: State) -> tuple[State, dict[str, jax.Array]]:
        state, rows, batch = minibatch(state)
        return update_value(state, batch, targets[rows], hp, args)

    def actor_step(state: State) -> tuple[State, dict[str, jax.Array]]:
        state, rows, batch = minibatch(state)
        return update_actor(state, batch, weights[rows], hp, args)

    limit = jnp.where(num_updates > 0, args.normalizer_samples, 0)
    state = state._replace(normalizer=observe(state.normalizer, data, limit))
    targets = values_and_returns(state, data, hp, args)[1]
    divisor = math.gcd(args.value_updates, args.policy_updates)  # without it, the product may exceed 32 bits
    num_value_updates = -(-num_updates * (args.value_updates // divisor) // (args.policy_updates // divisor))
    state, of_value = repeat(value_step, state, num_value_updates)
    values, returns, written = values_and_returns(state, data, hp, args)
    weights = advantage_weights(returns - values, written, hp, args)
    state, of_actor = repeat(actor_step, state, num_updates)
    return state, Metrics(*(one | other for one, other in zip(of_value, of_actor, strict=True)))


EPISODE_BLOCK = 1024  # episodes are inserted in blocks of a multiple of so many rows, so that few sizes are compiled


class Episodes:
    """Joins the steps of environments that run side by side into episodes, and hands out those that have ended."""

    def __init__(self, members: int, environments: int) -> None:
        self.steps: list[Transitions] = []  # from the beginning of the oldest running episode on
        self.begins = np.zeros((members, environments), int)  # where in them each running episode begins
        self.ended = np.zeros(members, bool)  # whether any environment of the member has ever ended one

    def add(self, step: Transitions) -> None:
        """A step of every environment, `[members, environments, ...]`."""
        self.steps.append(step)
        self.ended |= ((step.terminations + step.truncations) > 0).any(axis=1)

    def take(self, capacity: int) -> tuple[Transitions, np.ndarray]:
        """Rows of episodes that ended since the last call, `[members, block, ...]`, and how many count, `[members]`.

        Episodes are ordered by environment, then by time; of more than `capacity` rows the last ones are returned.
        """
        steps = jax.tree.map(lambda *rows: np.stack(rows), *self.steps)  # [time, members, environments, ...]
        times = np.arange(1, len(self.steps) + 1)[:, None, None]
        ends = np.where((steps.terminations + steps.truncations) > 0, times, self.begins).max(axis=0)
        counts = np.minimum((ends - self.begins).sum(axis=1), capacity).astype(np.int32)
        block = min(-(-max(1, *counts) // EPISODE_BLOCK) * EPISODE_BLOCK, capacity)
        ended = jax.tree.map(lambda x: np.zeros((len(counts), block, *x.shape[3:]), np.float32), steps)
        for i, count in enumerate(counts):
            new = [np.s_[self.begins[i, j] : ends[i, j], i, j] for j in range(ends.shape[1])]
            for rows, column in zip(ended, steps, strict=True):
                rows[i, :count] = np.concatenate([column[part] for part in new])[-capacity:]
        self.steps, self.begins = self.steps[ends.min() :], ends - ends.min()
        return ended, counts


def insert(ring: Ring, block: Transitions, count: jax.Array) -> Ring:
    """Write the first `count` rows of `block` (at most `capacity`) after the newest ones, over the oldest."""
    i = jnp.arange(len(block.rewards))
    places = jnp.where(i < count, (ring.written + i) % ring.capacity, ring.capacity)  # beyond the end: dropped
    data = jax.tree.map(lambda old, new: jnp.asarray(old).at[places].set(new, mode="drop"), ring.data, block)
    return Ring(data, ring.written + count)


def main(args: Args) -> None:
    """The run: load, initialise, iterate on the dataset, then on collected episodes; evaluate, log and checkpoint."""
    members = make_members(args)  # seeds x hyperparameters: the leading axis of states, rings, actions and metrics
    dataset = load(args.dataset, args.env, only_env=not args.num_updates)
    transform = fit_transform(dataset.transitions, args)
    offline = members.replicate(transform.transitions(dataset.transitions)) if args.num_updates else None
    obs_dim, action_dim = dataset.transitions.observations.shape[1], len(dataset.low)

    def explore(state: State, hp: Hyperparameters, observations: jax.Array, key: jax.Array, step: jax.Array) -> Any:
        return act(state, hp, observations, jax.random.fold_in(key, step), args, action_dim, sample=True)

    train_all, explore_all = members.map(partial(train, args=args)), members.map(explore)
    act_all = members.map(partial(act, args=args, action_dim=action_dim, sample=False), batched=True)
    keep_finite_all = members.map(keep_finite, batched=True)
    insert_all = members.map(insert, batched=True, donate=(0,))
    make_env = partial(make_environment, dataset.env_spec, args.max_episode_steps)
    evaluator = Evaluator(make_env, members, transform)
    state = members.start(partial(init, args=args, obs_dim=obs_dim, action_dim=action_dim))
    ring = members.broadcast(empty_ring(args.buffer_size, obs_dim, action_dim)) if args.online_steps else None

    with Run("awr", args, members) as run:
        state, ring = run.restore({"state": state, "ring": ring}, dataset, transform).values()

        def evaluate(episodes: int) -> Returns | None:
            return evaluator.run(partial(act_all, state, members.hp), episodes, run.steps(), run.stopping, run.alive)

        for start, stop in run.chunks("offline", args.num_updates, every=args.policy_updates, whole=True):
            if run.evaluation_due():
                run.save({"state": state})
                run.record_evaluation(evaluate(args.eval_episodes))
            new, metrics = train_all(state, members.hp, Replay(offline), (stop - start) * run.alive)
            state, finite = keep_finite_all(new, state, metrics)
            run.record(stop, metrics, finite)
            if run.checkpoint_due():
                run.save({"state": state})

        if args.online_steps:  # steps in all environments, then an iteration on the ring (and the dataset)
            envs = Collector(make_env, members, transform, per_member=args.num_environments, done=run.done["online"])
            keys = members.keys(0)  # for exploring
            collected = Episodes(len(members.seeds), args.num_environments)
            for start, stop in run.chunks("online", args.online_steps, every=args.samples_per_iteration, whole=True):
                if run.evaluation_due():
                    run.save({"state": state, "ring": ring})
                    run.record_evaluation(evaluate(args.eval_episodes))
                step, empty = start, np.asarray(ring.written) == 0
                while step < stop or (empty & ~collected.ended).any():
                    actions = explore_all(state, members.hp, envs.observations, keys, np.full(len(keys), step))
                    collected.add(envs.step(actions))
                    step += args.num_environments
                    if run.stopping():
                        break
                ring = insert_all(ring, *collected.take(args.buffer_size))
                if not np.asarray(ring.written).all():  # a signal came before every member had an episode
                    continue
                num_updates = -(-args.policy_updates * (step - start) // args.samples_per_iteration)
                due = run.alive * min(num_updates, args.policy_updates)
                new, metrics = train_all(state, members.hp, Replay(offline, ring), due)
                state, finite = keep_finite_all(new, state, metrics)
                run.record(step, metrics, finite)
                if run.checkpoint_due():
                    run.save({"state": state, "ring": ring})

        run.finish(evaluate(args.final_eval_episodes))


if __name__ == "__main__":
    launch(main, Args, PRESETS)
