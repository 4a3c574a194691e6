"""Expected-max Q-learning (EMaQ). Ghasemipour, Schuurmans, Gu, 2021, arXiv:2007.11091.

There is no policy. A behaviour model mu(a|s) is fitted to the dataset, and the Q-functions learn the value of choosing
the best of N actions that mu proposes; larger N is bolder:

    L_mu = -mean log mu(a|s)                                                                       (Eq. 62)
    y    = r + discount (1 - termination) max_n Ens(Q'_1(s', a'_n), ..., Q'_K(s', a'_n)),   a'_n ~ mu(s')   (Eq. 11)
    Ens(v) = lambda min(v) + (1 - lambda) max(v)                                                   (appendix C)
    L_Q  = sum_k mean (Q_k(s, a) - y)^2                                                            (Eq. 10)

with n = 1 .. N and target networks Q'; the ensemble comes first, then the maximum. The agent draws N actions of mu and
takes the best by Ens(Q_1, ..., Q_K) (algorithm 1).

Variants: `--backup soft` weights the proposals by softmax(alpha Ens) in place of the maximum (Eq. 71, 74); `--behavior
vae` takes a variational autoencoder for mu (appendix H). Online (appendix F) the agent explores: it draws from mu with
logits divided by tau, takes the action of largest mean_k Q_k + beta std_k Q_k (Eq. 67), and mu is refitted.

Two things are done faster than in the paper:
* mu is frozen, so its proposals for the dataset's next states are drawn ahead, as bins, and drawn anew after
  `--pool-uses` uses of a state. The places within the bins are drawn at each use; so the bins of a proposal's later
  dimensions belong to other places in the earlier ones' bins, and until then a state keeps its bins.
  `--proposal-pool 0` draws everything at each update.
* with lambda = 1 the target is max_n min_k. A proposal's minimum over some of the Q-functions bounds its minimum over
  all: those whose bound is not above the best minimum found so far cannot win, and skip the other Q-functions. Targets
  are the same.

Open in the paper, ours: discount, length of mu's training, initialisation, no normalisation; online, targets use mu
without tau, and each update of the Q-functions comes with one of mu on the same minibatch. Slips of the paper: the soft
backup lacks the discount (Eq. 68, 70), the test ensemble runs over N instead of K. The vae's loss sums over dimensions;
BRAC's code, which the paper used, averages.

The settings of the domains are the paper's, for an accelerator. Smaller ones for a CPU:

    python algorithms/emaq.py --preset cpu --num-updates 100000 --dataset offax/hopper/medium-expert-v0
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from common import buffers, networks, populations
from common.buffers import Replay, Transitions
from common.errors import UsageError
from common.experiment import Run
from common.flags import Count, NonNegative, Positive, RunArgs, Share, launch, refuse_sweep
from common.optimization import descend
from common.populations import Sometimes
from common.screening import max_of_min


class Hyperparameters(NamedTuple):
    """Scalars that may differ between members of a population: traced, never static."""

    ensemble_weight: Share = 1.0
    """The paper's lambda: weight of the minimum over the Q-functions, against the maximum (paper, tables 2 and 3)."""
    softmax_scale: NonNegative = 64.0
    """The paper's alpha, for --backup soft; 0: mean, large: maximum (ours; paper, appendix J: 1 to 1024)."""
    discount: Share = 0.99
    """Discount factor (BRAC, which the paper follows)."""
    polyak: Share = 0.005
    """Share of the critic that moves into its target at every update (paper, table 2)."""
    critic_learning_rate: NonNegative = 1e-4
    """Adam's rate for the Q-functions (paper, table 2)."""
    behavior_learning_rate: NonNegative = 5e-4
    """Adam's rate for the behaviour model (paper, table 2)."""
    temperature: Positive = 1.0
    """The paper's tau: online, divides the logits of the proposals to choose from (paper, appendix F: 1 to 20)."""
    exploration_bonus: NonNegative = 1.0
    """The paper's beta: online, weight of the Q-functions' standard deviation (paper, appendix F: 0.1 and 1)."""


@dataclass(frozen=True)
class Args(RunArgs):
    """EMaQ: expected-max Q-learning."""

    hp: Hyperparameters = Hyperparameters()
    num_proposals: Count = 100
    """The paper's N: actions to choose from (ours; paper, figure 1: 5 to 400)."""
    backup: Literal["max", "soft"] = "max"
    """The best proposal, or the softmax's mean over all (paper, Eq. 11 and appendix J)."""
    num_critics: Count = 8
    """The paper's K: Q-functions (paper, table 2)."""
    hidden_dim: Count = 750
    """Width of every hidden layer of the Q-functions (paper, table 2)."""
    num_layers: Count = 3
    """Hidden layers of the Q-functions (paper, table 2)."""
    behavior: Literal["autoregressive", "vae"] = "autoregressive"
    """The behaviour model (paper, appendices B and H)."""
    behavior_updates: int = 200_000
    """Updates of the behaviour model before the Q-functions' (ours)."""
    behavior_checkpoint: str | None = None
    """Run directory whose behaviour models to use in place of training them (ours)."""
    embedding_dim: Count = 750
    """Width of the state's embedding and its hidden layers (paper, appendix G.1); of the vae's (appendix H: 1024)."""
    embedding_layers: Count = 2
    """Hidden layers of the state's embedding (paper, appendix G.1); of the vae's two networks (appendix H: 3)."""
    head_dim: Count = 256
    """Width of the hidden layers of each action dimension (paper, appendix G.1)."""
    head_layers: Count = 3
    """Hidden layers of each action dimension (paper, appendix G.1)."""
    prefix_dim: int = 0
    """Width of a linear map of the earlier action dimensions; 0: as they are (paper, appendices B and G.3)."""
    num_bins: Count = 40
    """Bins of each action dimension (paper, appendix G.1)."""
    proposal_pool: int = 1
    """Sets of N proposals drawn ahead for each next state of the dataset, of which an update takes one at random; N
    bytes for each member, set, action dimension and state. 0: drawn at each update, as for the vae always (ours)."""
    pool_uses: Count = 8
    """The pool is drawn anew when a state of the dataset has been used this often on average (ours)."""
    screening: bool = True
    """On a CPU, where lambda is 1: leave out Q-functions of proposals that cannot be the best (ours)."""
    steps_per_iteration: Count = 1
    """The paper's M: online, environment steps taken in a row, and as many updates after them; a signal ends these
    early (paper, appendix F)."""

    def validate(self) -> None:
        """UsageError for a number out of range, or a sweep of what the other flags make unused."""
        super().validate()
        if self.draws_ahead and self.num_bins > 256:
            raise UsageError(f"--num-bins {self.num_bins}: at most 256, or pass --proposal-pool 0")
        if self.backup == "max":
            refuse_sweep(self, {"softmax_scale"}, "with --backup max")
        if not self.online_steps:
            refuse_sweep(self, {"temperature", "exploration_bonus"}, "with --online-steps 0")
        if self.behavior == "vae":
            refuse_sweep(self, {"temperature"}, "with --behavior vae")
        if self.behavior_checkpoint is not None and not self.online_steps:
            refuse_sweep(self, {"behavior_learning_rate"}, "with --behavior-checkpoint")
        if self.behavior_checkpoint is not None and not self.num_updates:
            raise UsageError("--behavior-checkpoint has no effect with --num-updates 0")

    @property
    def draws_ahead(self) -> bool:
        """Whether proposals for the dataset are drawn ahead; the vae's are no bins, and fast to draw."""
        return bool(self.proposal_pool and self.num_updates) and self.behavior == "autoregressive"


# The paper's tables 2 and 3. N it tunes for each dataset; those here are among the ones that it tried.
TABLE_3 = {"batch_size": 128, "num_critics": 16, "hidden_dim": 256, "num_layers": 4, "prefix_dim": 128, "num_bins": 80}
TABLE_3 |= {"embedding_dim": 256, "embedding_layers": 4, "head_dim": 128, "head_layers": 1}
# Ours, for any domain: small enough that 100,000 updates take minutes on two cores.
CPU = {"num_proposals": 10, "num_critics": 2, "hidden_dim": 256, "num_layers": 2, "critic_learning_rate": 3e-4}
CPU |= {"behavior_updates": 20_000, "embedding_dim": 256, "head_dim": 64, "head_layers": 2}
PRESETS = {
    "locomotion": {"batch_size": 256, "num_critics": 8, "hidden_dim": 750, "num_layers": 3},
    "antmaze": TABLE_3 | {"num_proposals": 100},
    "adroit": TABLE_3 | {"num_proposals": 64},
    "kitchen": TABLE_3 | {"num_proposals": 32},
    "cpu": CPU,
}


class State(NamedTuple):
    """Everything that training changes, of one member."""

    behavior: Any
    critic: Any
    target_critic: Any
    behavior_opt: optax.OptState
    critic_opt: optax.OptState
    step: jax.Array
    key: jax.Array


ADAM = optax.scale_by_adam()


def modules(
    args: Args, action_dim: int
) -> tuple[networks.AutoregressivePolicy | networks.VAEPolicy, networks.QEnsemble]:
    """The behaviour model and the Q-functions."""
    sizes = (args.embedding_dim, args.embedding_layers)
    if args.behavior == "vae":
        behavior = networks.VAEPolicy(action_dim, *sizes)
    else:
        heads = (args.head_dim, args.head_layers, args.prefix_dim)
        behavior = networks.AutoregressivePolicy(action_dim, args.num_bins, *sizes, *heads)
    return behavior, networks.QEnsemble(args.num_critics, args.hidden_dim, args.num_layers, networks.glorot)


def init(key: jax.Array, hp: Hyperparameters, args: Args, obs_dim: int, action_dim: int) -> State:
    """Fresh networks and optimisers; the target critic starts as a copy of the critic."""
    behavior, critic = modules(args, action_dim)
    behavior_key, critic_key, key = jax.random.split(key, 3)
    observations, actions = jnp.zeros((1, obs_dim)), jnp.zeros((1, action_dim))
    inputs = (observations, actions, behavior_key) if args.behavior == "vae" else (observations, actions)
    behavior_params = behavior.init(behavior_key, *inputs)
    critic_params = critic.init(critic_key, observations, actions)
    return State(
        behavior=behavior_params,
        critic=critic_params,
        target_critic=jax.tree.map(jnp.copy, critic_params),
        behavior_opt=ADAM.init(behavior_params),
        critic_opt=ADAM.init(critic_params),
        step=jnp.zeros((), jnp.int32),
        key=key,
    )


# Maximum likelihood of Eq. (62); for the vae appendix H.1
def behavior_loss(
    params: Any, batch: Transitions, key: jax.Array, args: Args
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Negative log-likelihood of the actions; for the vae squared error of reconstruction and half the divergence."""
    behavior, _ = modules(args, batch.actions.shape[-1])
    if args.behavior == "vae":
        error, divergence = behavior.apply(params, batch.observations, batch.actions, key)
        loss = jnp.mean(error + 0.5 * divergence)
        return loss, {"behavior/loss": loss, "behavior/error": error.mean(), "behavior/divergence": divergence.mean()}
    loss = -jnp.mean(behavior.apply(params, batch.observations, batch.actions))
    return loss, {"behavior/loss": loss}


def propose(
    params: Any,
    observations: jax.Array,
    key: jax.Array,
    args: Args,
    action_dim: int,
    temperature: jax.Array | float = 1.0,
    bins: jax.Array | None = None,
) -> jax.Array:
    """N actions `[N, batch, action_dim]` of the behaviour model for each state; the vae has no temperature.

    With `bins [batch, N, action_dim]` drawn ahead, only their places within these.
    """
    behavior, _ = modules(args, action_dim)
    if bins is not None:
        return behavior.within(jnp.swapaxes(bins, 0, 1), key)
    if args.behavior == "vae":
        return behavior.apply(params, observations, key, args.num_proposals, method="sample")
    return behavior.apply(params, observations, key, args.num_proposals, temperature, method="sample")[0]


def draw_pool(state: State, hp: Hyperparameters, offline: Transitions, key: jax.Array, args: Args) -> jax.Array:
    """Bins of proposals `[rows, sets, N, action_dim]` for the next states of all rows."""
    behavior, _ = modules(args, offline.actions.shape[-1])
    count = args.proposal_pool * args.num_proposals

    def draw(observations: jax.Array, start: jax.Array) -> jax.Array:
        key_of_block = jax.random.fold_in(key, start)
        _, bins = behavior.apply(state.behavior, observations, key_of_block, count, method="sample")
        shape = (len(observations), args.proposal_pool, args.num_proposals, -1)
        return jnp.swapaxes(bins, 0, 1).reshape(shape).astype(jnp.uint8)

    return buffers.map_blocks(draw, offline.next_observations, max(1, 10_000 // count))


def ensemble(q: jax.Array, weight: jax.Array | float) -> jax.Array:
    """Ens(v) of `q [K, ...]` over its first axis."""
    return weight * q.min(axis=0) + (1.0 - weight) * q.max(axis=0)


# Eq. (11), and (71) with the discount
def backup(
    target_critic: Any, batch: Transitions, proposals: jax.Array, hp: Hyperparameters, args: Args
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Targets `[batch]` from the proposals `[N, batch, action_dim]` for the next states."""
    _, critic = modules(args, batch.actions.shape[-1])
    states = batch.next_observations

    def all_values() -> tuple[jax.Array, jax.Array]:
        values = ensemble(critic.apply(target_critic, states, proposals), hp.ensemble_weight)
        if args.backup == "max":
            return values.max(axis=0), jnp.ones(())
        return jnp.sum(jax.nn.softmax(hp.softmax_scale * values, axis=0) * values, axis=0), jnp.ones(())

    # Not on a GPU: there both branches are computed, and many small steps are slow.
    if (
        args.screening
        and args.backup == "max"
        and min(proposals.shape[0], args.num_critics) > 1
        and jax.default_backend() == "cpu"
    ):
        screened = partial(max_of_min, target_critic, critic, states, proposals)
        value, share = jax.lax.cond(hp.ensemble_weight == 1.0, screened, all_values)
    else:
        value, share = all_values()
    info = {"critic/evaluated_share": share}
    return batch.rewards + hp.discount * (1.0 - batch.terminations) * value, info


# Eq. (10)
def critic_loss(q: jax.Array, targets: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Squared error of every Q-function `q [K, batch]` to the same `targets [batch]`, summed over K."""
    assert q.shape[1:] == targets.shape, (q.shape, targets.shape)
    loss = jnp.sum(jnp.mean((q - targets) ** 2, axis=1))
    return loss, {"critic/loss": loss, "critic/q_mean": q.mean(), "critic/q_std": q.std(axis=0).mean()}


def update_behavior(
    state: State, batch: Transitions, hp: Hyperparameters, args: Args
) -> tuple[State, dict[str, jax.Array]]:
    """One update of the behaviour model."""
    key, noise_key = jax.random.split(state.key)
    grads, info = jax.grad(behavior_loss, has_aux=True)(state.behavior, batch, noise_key, args)
    params, opt = descend(ADAM, state.behavior, grads, state.behavior_opt, hp.behavior_learning_rate)
    return state._replace(behavior=params, behavior_opt=opt, key=key), info


def update(
    state: State, batch: Transitions, hp: Hyperparameters, args: Args, bins: jax.Array | None = None
) -> tuple[State, dict[str, jax.Array]]:
    """One update of the Q-functions, then of their targets; proposals are in `bins [batch, N, action_dim]` or new."""
    key, proposal_key = jax.random.split(state.key)
    action_dim = batch.actions.shape[-1]
    proposals = propose(state.behavior, batch.next_observations, proposal_key, args, action_dim, bins=bins)
    return update_critic(state._replace(key=key), batch, proposals, hp, args)


def update_critic(
    state: State, batch: Transitions, proposals: jax.Array, hp: Hyperparameters, args: Args
) -> tuple[State, dict[str, jax.Array]]:
    """One update of the Q-functions, then of their targets, with `proposals [N, batch, action_dim]`."""
    _, critic = modules(args, batch.actions.shape[-1])
    targets, backup_info = backup(state.target_critic, batch, proposals, hp, args)

    def loss_of_critic(params: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        return critic_loss(critic.apply(params, batch.observations, batch.actions), targets)

    grads, critic_info = jax.grad(loss_of_critic, has_aux=True)(state.critic)
    critic_params, critic_opt = descend(ADAM, state.critic, grads, state.critic_opt, hp.critic_learning_rate)
    target = optax.incremental_update(critic_params, state.target_critic, hp.polyak)
    state = state._replace(critic=critic_params, target_critic=target, critic_opt=critic_opt, step=state.step + 1)
    return state, critic_info | backup_info


def act(
    state: State,
    hp: Hyperparameters,
    observations: jax.Array,
    key: jax.Array,
    args: Args,
    action_dim: int,
    sample: bool,
) -> jax.Array:
    """Actions `[batch, action_dim]` in [-1, 1]: the best proposal by the ensemble, or the most promising to explore."""
    _, critic = modules(args, action_dim)
    actions = propose(state.behavior, observations, key, args, action_dim, hp.temperature if sample else 1.0)
    q = critic.apply(state.critic, observations, actions)
    # Eq. (67), or algorithm 1
    explore = q.mean(axis=0) + hp.exploration_bonus * q.std(axis=0)
    values = explore if sample else ensemble(q, hp.ensemble_weight)
    return jnp.take_along_axis(actions, values.argmax(axis=0)[None, :, None], axis=0)[0]


def train_behavior(
    state: State, hp: Hyperparameters, data: Replay, num_updates: jax.Array | int, args: Args
) -> tuple[State, populations.Metrics]:
    """`num_updates` updates of the behaviour model, each on a fresh uniform minibatch; metrics are means over them."""

    def step(state: State) -> tuple[State, dict[str, jax.Array]]:
        key, sample_key = jax.random.split(state.key)
        batch = buffers.sample(sample_key, data, args.batch_size)
        return update_behavior(state._replace(key=key), batch, hp, args)

    return populations.repeat(step, state, num_updates)


def train(
    state: State,
    hp: Hyperparameters,
    data: Replay,
    num_updates: jax.Array | int,
    args: Args,
    update: Callable = update,
) -> tuple[State, populations.Metrics]:
    """`num_updates` updates, each on a fresh uniform minibatch of the data; online, of the behaviour model too."""

    def step(state: State) -> tuple[State, dict[str, jax.Array]]:
        key, sample_key, set_key = jax.random.split(state.key, 3)
        rows = buffers.sample_rows(sample_key, data, args.batch_size)
        batch, bins, state = buffers.take(data, rows), None, state._replace(key=key)
        if data.precomputed is not None:
            sets = jax.random.randint(set_key, rows.shape, 0, args.proposal_pool)
            bins = data.precomputed[data.member, rows, sets]
        refitted = Sometimes(jnp.zeros(()), jnp.array(False))
        if data.ring is not None:
            state, behavior_info = update_behavior(state, batch, hp, args)
            refitted = Sometimes(behavior_info["behavior/loss"], jnp.array(True))
        state, info = update(state, batch, hp, args, bins)
        return state, info | {"behavior/loss": refitted}

    return populations.repeat(step, state, num_updates)


def main(args: Args) -> None:
    """Load, initialise, fit the behaviour model, train in chunks, evaluate, checkpoint, fine-tune online, report."""
    functions = (partial(init, args=args), partial(train, args=args), partial(act, args=args))
    more = {"pretrain": partial(train_behavior, args=args)}
    if args.draws_ahead:
        more |= {"precompute": partial(draw_pool, args=args), "precomputed_uses": args.pool_uses}
    with Run("emaq", args, *functions, **more) as run:
        path = args.behavior_checkpoint
        state = run.begin({} if path is None else run.borrow(path, "behavior", "behavior_opt"))
        if path is None and args.num_updates:
            for num_updates in run.pretraining(args.behavior_updates):
                state, metrics = run.train(state, num_updates)
                state = run.record(state, metrics)
        for num_updates in run.offline():  # up to the next log line, evaluation or checkpoint
            state, metrics = run.train(state, num_updates)
            state = run.record(state, metrics)
        for num_steps in run.online(None if args.steps_per_iteration == 1 else args.steps_per_iteration):
            if args.steps_per_iteration == 1:
                state, metrics = run.collect_and_train(state, num_steps)
            else:
                state, metrics = run.train(state, run.collect(state, num_steps, whole_episodes=False))
            state = run.record(state, metrics)
        run.finish(state)


if __name__ == "__main__":
    launch(main, Args, PRESETS)
