"""Expected-max Q-learning (EMaQ). Ghasemipour, Schuurmans, Gu, 2021, arXiv:2007.11091.

There is no policy. A behaviour model mu(a|s) is fitted to the dataset, and the Q-functions learn the value of choosing
the best of N actions that mu proposes; larger N is bolder:

    L_mu = -mean log mu(a|s)                                                                       (Eq. 62)
    y    = r + discount (1 - termination) max_n Ens(Q'_1(s', a'_n), ..., Q'_K(s', a'_n)),   a'_n ~ mu(s')   (Eq. 11)
    Ens(v) = lambda min(v) + (1 - lambda) max(v)                                                   (appendix C)
    L_Q  = sum_k mean (Q_k(s, a) - y)^2                                                            (Eq. 10)

with n = 1 .. N and target networks Q'; the ensemble comes first, then the maximum. The agent draws N actions of mu and
takes the best by Ens(Q_1, ..., Q_K) (algorithm 1, the policy at test time).

Variants: `--backup soft` weights the proposals by softmax(alpha Ens) in place of the maximum (Eq. 71, 74); `--behavior
vae` takes a variational autoencoder for mu (appendix H). Online (appendix F) the agent explores: it draws from mu with
logits divided by tau, takes the action of largest mean_k Q_k + beta std_k Q_k (Eq. 67), and mu is refitted.

Two things are done faster than in the paper:
* mu is frozen, so a pool of its proposals for the dataset's next states is drawn ahead, and drawn anew when a state
  has been used `--pool-uses` times on average. The pool holds bins; the value in a bin is drawn at each use. So a later
  dimension was drawn given values of the earlier ones that share the bins of those in the update, but differ from them.
* with lambda = 1 the target is max_n min_k. The minimum over some Q-functions is at least the minimum over all: if it
  is not above the best full minimum so far, the other Q-functions are skipped for this proposal. Targets stay the same.

Open in the paper: discount and initialisation (here those of BRAC's code, in which EMaQ was written), the length of
mu's training, normalisation (here none), and online whether targets use mu with tau (here without) and when mu is
refitted (here with each update of the Q-functions, on its minibatch). Slips of the paper: the soft backup lacks the
discount (Eq. 68, 70, 71), the test ensemble runs over N instead of K. The vae's loss is the summed squared error and
0.5 times the summed divergence (ours). BRAC's code, which the paper did not change, averages both, which halves the
weight of the divergence; appendix H.1 to the letter, a Gaussian likelihood, would double it.

Ours: terminations alone cut the bootstrap, and the truncated last step of an episode is kept and bootstraps; the
ensemble may have any size.

The settings of the domains, OGBench's apart, are the paper's but for N and mu's training, and meant for an accelerator.
Smaller ones for a CPU:

    python algorithms/emaq.py --preset cpu --num-updates 100000 --dataset offax/hopper/medium-expert-v1
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
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
from common.report import fill_tree, read_tree
from common.runs import Run


class Hyperparameters(NamedTuple):
    """What --grid can sweep: a value for each member, traced by JAX, so no Python `if` on it."""

    # The paper's lambda: weight of the minimum over the Q-functions, against the maximum (paper, tables 2 and 3).
    ensemble_weight: Share = 1.0
    # The paper's alpha, for --backup soft; 0: mean, large: maximum (ours; paper, appendix J: 1 to 1024).
    softmax_scale: NonNegative = 64.0
    discount: Share = 0.99  # Discount factor (BRAC, which the paper follows).
    polyak: Share = 0.005  # Share of the critic that moves into its target at every update (paper, table 2).
    critic_learning_rate: NonNegative = 1e-4  # Adam's rate for the Q-functions (paper, table 2).
    behavior_learning_rate: NonNegative = 5e-4  # Adam's rate for the behaviour model (paper, table 2).
    # The paper's tau: online, divides the logits of the proposals to choose from (paper, appendix F: 1 to 20).
    temperature: Positive = 1.0
    # The paper's beta: online, weight of the Q-functions' standard deviation (paper, appendix F: 0.1 and 1).
    exploration_bonus: NonNegative = 1.0


@dataclass(frozen=True)
class Args(RunArgs):
    """EMaQ: expected-max Q-learning."""

    hp: Hyperparameters = Hyperparameters()
    num_proposals: Count = 100  # The paper's N: actions to choose from (ours; paper, figure 1: 5 to 400).
    # The best proposal, or the softmax's mean over all (paper, Eq. 11 and appendix J).
    backup: Literal["max", "soft"] = "max"
    num_critics: Count = 8  # The paper's K: Q-functions (paper, table 2).
    hidden_dim: Count = 750  # Width of every hidden layer of the Q-functions (paper, table 2).
    num_layers: Count = 3  # Hidden layers of the Q-functions (paper, table 2).
    layer_norm: bool = False  # Layer normalisation in the Q-functions (ogbench: as IFQL in FQL's code).
    behavior: Literal["autoregressive", "vae"] = "autoregressive"  # The behaviour model (paper, appendices B and H).
    behavior_updates: int = 200_000  # Updates of the behaviour model before the Q-functions' (ours).
    # Run directory whose behaviour models to use in place of training them (ours).
    behavior_checkpoint: str | None = None
    # Width of the state's embedding and its hidden layers (paper, appendix G.1); or of the vae's layers (H.1: 1024).
    embedding_dim: Count = 750
    # Hidden layers of the state's embedding (paper, appendix G.1); or of the vae's networks (H.1: 3).
    embedding_layers: Count = 2
    head_dim: Count = 256  # Width of the hidden layers of each action dimension (paper, appendix G.1).
    head_layers: Count = 3  # Hidden layers of each action dimension (paper, appendix G.1).
    # Width of a linear map of the earlier action dimensions; 0: as they are (paper, appendices B and G.3).
    prefix_dim: int = 0
    num_bins: Count = 40  # Bins of each action dimension (paper, appendix G.1).
    # Sets of N proposals drawn ahead for each next state of the data; an update takes a random one (ours). A set takes
    # N bytes for each member, action dimension and state. 0: draw proposals at each update, as the vae always does.
    proposal_pool: int = 1
    # The pool is drawn anew when a state of the dataset has been used this often on average (ours).
    pool_uses: Count = 8
    # On a CPU, where lambda is 1: skip Q-functions for proposals that cannot be the best (ours).
    screening: bool = True
    # The paper's M: online, environment steps in a row, then as many updates; a signal cuts them (appendix F).
    steps_per_iteration: Count = 1

    def validate(self) -> None:
        """UsageError for a number out of range, or a sweep of what the other flags make unused."""
        super().validate()
        if self.draws_ahead and self.num_bins > 256:
            raise UsageError(f"--num-bins {self.num_bins}: at most 256, or pass --proposal-pool 0")
        borrowed = self.behavior_checkpoint is not None
        for unused, names, flag in (
            (self.backup == "max", {"softmax_scale"}, "--backup max"),
            (self.behavior == "vae", {"temperature"}, "--behavior vae"),
            (not self.online_steps, {"temperature", "exploration_bonus"}, "--online-steps 0"),
            (self.num_critics == 1, {"ensemble_weight", "exploration_bonus"}, "--num-critics 1"),
            (self.num_proposals == 1, {"softmax_scale", "exploration_bonus"}, "--num-proposals 1"),
            (borrowed and not self.online_steps, {"behavior_learning_rate"}, "--behavior-checkpoint"),
            (not self.behavior_updates + self.online_steps, {"behavior_learning_rate"}, "--behavior-updates 0"),
        ):
            if unused:
                refuse_sweep(self, names, f"with {flag}")
        if borrowed and not self.num_updates:
            raise UsageError("--behavior-checkpoint needs --num-updates above 0")

    @property
    def draws_ahead(self) -> bool:
        """Whether proposals for the dataset are drawn ahead; the vae's are no bins, and fast to draw."""
        return bool(self.proposal_pool and self.num_updates) and self.behavior == "autoregressive"


# The paper's tables 2 and 3. The paper tunes N for each dataset; these are among the values that it tried.
# On OGBench N is that of IFQL, the baseline in FQL's code (Park et al., 2025) that takes the best of N samples.
TABLE_3 = {"batch_size": 128, "num_critics": 16, "hidden_dim": 256, "num_layers": 4, "prefix_dim": 128, "num_bins": 80}
TABLE_3 |= {"embedding_dim": 256, "embedding_layers": 4, "head_dim": 128, "head_layers": 1}
# Ours, for any domain: small enough that 100,000 updates take minutes on two cores.
CPU = {"num_proposals": 10, "num_critics": 2, "hidden_dim": 256, "num_layers": 2, "critic_learning_rate": 3e-4}
CPU |= {"behavior_updates": 20_000, "embedding_dim": 256, "head_dim": 64, "head_layers": 2}
PRESETS: dict[str, dict[str, Any]] = {
    "locomotion": {"batch_size": 256, "num_critics": 8, "hidden_dim": 750, "num_layers": 3},
    "antmaze": TABLE_3 | {"num_proposals": 100},
    "adroit": TABLE_3 | {"num_proposals": 64},
    "kitchen": TABLE_3 | {"num_proposals": 32},
    "ogbench": TABLE_3 | {"num_proposals": 32, "layer_norm": True},
    "cpu": CPU,
}


class SplitDense(nn.Module):
    """Dense layer on states `[batch, s]` beside actions `[n, batch, a]`; the states' part of the sum is made once."""

    features: int

    @nn.compact
    def __call__(self, states: jax.Array, actions: jax.Array) -> jax.Array:
        split = states.shape[-1]
        kernel = self.param("kernel", networks.glorot, (split + actions.shape[-1], self.features), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        return (states @ kernel[:split] + bias) + actions @ kernel[split:]


class BinHead(nn.Module):
    """Logits `[n, batch, num_bins]` of an action dimension, by `embedding [batch, dim]` and the dimensions before."""

    num_bins: int
    hidden_dim: int
    num_layers: int
    prefix_dim: int

    @nn.compact
    def __call__(self, embedding: jax.Array, prefix: jax.Array) -> jax.Array:
        if self.prefix_dim and prefix.shape[-1]:
            prefix = nn.Dense(self.prefix_dim, kernel_init=networks.glorot)(prefix)
        x = nn.relu(SplitDense(self.hidden_dim)(embedding, prefix))
        for _ in range(self.num_layers - 1):
            x = nn.relu(nn.Dense(self.hidden_dim, kernel_init=networks.glorot)(x))
        return nn.Dense(self.num_bins, kernel_init=networks.glorot)(x)


class AutoregressivePolicy(nn.Module):
    """Density of actions in [-1, 1], one dimension after the other, each uniform within one of `num_bins` equal bins.

    p(a|s) = prod_i p(bin of a_i | s, a_0, ..., a_i-1) / width of a bin, each factor the softmax of an MLP of its own on
    the state's embedding and the continuous values before it (appendix B): several modes, dependent dimensions.
    """

    action_dim: int
    num_bins: int
    hidden_dim: int  # of the state's embedding and its `num_layers` hidden layers
    num_layers: int
    head_dim: int
    head_layers: int
    prefix_dim: int = 0

    def setup(self) -> None:
        self.embed = networks.MLP(self.hidden_dim, self.num_layers, self.hidden_dim, networks.glorot)
        sizes = (self.num_bins, self.head_dim, self.head_layers, self.prefix_dim)
        self.heads = [BinHead(*sizes) for _ in range(self.action_dim)]

    def __call__(self, observations: jax.Array, actions: jax.Array) -> jax.Array:
        """Log-density `[batch]` of `actions [batch, action_dim]`, those beyond [-1, 1] taken as on its edge."""
        embedding, prefixes, bins = self.embed(observations), actions[None], self.bins_of(actions)
        total = jnp.zeros(len(actions), jnp.float32)
        for i, head in enumerate(self.heads):
            log_probs = jax.nn.log_softmax(head(embedding, prefixes[..., :i])[0])
            total += jnp.take_along_axis(log_probs, bins[:, i : i + 1], axis=-1)[:, 0]
        return total + self.action_dim * jnp.log(self.num_bins / 2.0)

    def sample(
        self, observations: jax.Array, key: jax.Array, num_samples: int, temperature: jax.Array | float = 1.0
    ) -> tuple[jax.Array, jax.Array]:
        """Actions and their bins, `[num_samples, batch, action_dim]` each; logits are divided by the temperature."""
        embedding, shape = self.embed(observations), (num_samples, len(observations))
        actions, bins = jnp.zeros((*shape, 0), jnp.float32), []
        for i, head in enumerate(self.heads):
            bin_key, place_key = jax.random.split(jax.random.fold_in(key, i))
            prefixes = actions if i else actions[:1]  # the first dimension has none: once for all samples
            probs = jax.nn.softmax(head(embedding, prefixes) / temperature)
            # Inverse-CDF sampling: one random number per sample, where jax.random.categorical draws one per bin. An
            # associative scan, because XLA's cumsum is slow on a CPU.
            below = jax.lax.associative_scan(jnp.add, probs, axis=-1)
            place = jax.random.uniform(bin_key, (*shape, 1), jnp.float32) * below[..., -1:]
            bins.append(jnp.sum(below[..., :-1] <= place, axis=-1))
            actions = jnp.concatenate([actions, self.within(bins[-1], place_key)[..., None]], axis=-1)
        return actions, jnp.stack(bins, axis=-1)

    def bins_of(self, actions: jax.Array) -> jax.Array:
        """The bin, from 0 on, of each number."""
        return jnp.clip(jnp.floor((actions + 1.0) / 2.0 * self.num_bins), 0, self.num_bins - 1).astype(jnp.int32)

    def within(self, bins: jax.Array, key: jax.Array) -> jax.Array:
        """A number for each bin, uniform within it."""
        return (bins + jax.random.uniform(key, bins.shape, jnp.float32)) * (2.0 / self.num_bins) - 1.0


class VAEPolicy(nn.Module):
    """Variational autoencoder of actions given states (Wu et al., 2019), log std in [-5, 5] (their BRAC: [-4, 15]).

    A Gaussian latent of twice the actions' dimensions; the decoder's Gaussian has mean tanh(v) and unit variance.
    """

    action_dim: int
    hidden_dim: int
    num_layers: int

    def setup(self) -> None:
        self.encoder = networks.MLP(self.hidden_dim, self.num_layers, 4 * self.action_dim, networks.glorot)
        self.decoder = networks.MLP(self.hidden_dim, self.num_layers, self.action_dim, networks.glorot)

    def __call__(self, observations: jax.Array, actions: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Squared error of the reconstruction and KL divergence of the latent from the prior, `[batch]` each."""
        mean, log_std = jnp.split(self.encoder(jnp.concatenate([observations, actions], axis=-1)), 2, axis=-1)
        log_std = jnp.clip(log_std, -5.0, 5.0)
        latent = mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape, jnp.float32)
        decoded = jnp.tanh(self.decoder(jnp.concatenate([observations, latent], axis=-1)))
        error = jnp.sum((decoded - actions) ** 2, axis=-1)
        return error, 0.5 * jnp.sum(mean**2 + jnp.exp(2.0 * log_std) - 1.0 - 2.0 * log_std, axis=-1)

    def sample(self, observations: jax.Array, key: jax.Array, num_samples: int) -> jax.Array:
        """Actions `[num_samples, batch, action_dim]`: mean actions of latents clipped to [-0.5, 0.5]."""
        latent = jax.random.normal(key, (num_samples, len(observations), 2 * self.action_dim), jnp.float32)
        states = jnp.broadcast_to(observations, (num_samples, *observations.shape))
        return jnp.tanh(self.decoder(jnp.concatenate([states, jnp.clip(latent, -0.5, 0.5)], axis=-1)))


class State(NamedTuple):
    """Everything that training changes, of one member."""

    behavior: Any
    critic: Any
    target_critic: Any
    behavior_opt: optax.OptState
    critic_opt: optax.OptState
    step: jax.Array
    key: jax.Array


ADAM = optax.scale_by_adam()  # without rate and sign, which `descend` applies


def modules(args: Args, action_dim: int) -> tuple[AutoregressivePolicy | VAEPolicy, networks.QEnsemble]:
    """The behaviour model and the Q-functions."""
    sizes, heads = (args.embedding_dim, args.embedding_layers), (args.head_dim, args.head_layers, args.prefix_dim)
    autoregressive = AutoregressivePolicy(action_dim, args.num_bins, *sizes, *heads)
    behavior = VAEPolicy(action_dim, *sizes) if args.behavior == "vae" else autoregressive
    q = networks.QEnsemble(args.num_critics, args.hidden_dim, args.num_layers, networks.glorot, args.layer_norm)
    return behavior, q


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
def behavior_loss(params: Any, batch: Transitions, key: jax.Array, args: Args) -> tuple[jax.Array, dict[str, Any]]:
    """Negative log-likelihood of the actions; for the vae the squared error of reconstruction + 0.5 KL divergence."""
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
    """N actions `[N, batch, action_dim]` per state: of mu, or uniform in the given `bins [batch, N, action_dim]`."""
    behavior, _ = modules(args, action_dim)
    if bins is not None:
        return behavior.within(jnp.swapaxes(bins, 0, 1), key)
    if args.behavior == "vae":
        return behavior.apply(params, observations, key, args.num_proposals, method="sample")
    return behavior.apply(params, observations, key, args.num_proposals, temperature, method="sample")[0]


def draw_pool(state: State, hp: Hyperparameters, data: Replay, key: jax.Array, args: Args) -> jax.Array:
    """Bins of proposals `[rows, sets, N, action_dim]`, uint8, for the next states of all offline rows."""
    rows, action_dim = data.offline.actions.shape
    (behavior, _), count = modules(args, action_dim), args.proposal_pool * args.num_proposals
    size = min(rows, max(1, 10_000 // count))

    def fill(pool: jax.Array, start: jax.Array) -> tuple[jax.Array, None]:
        states = data.offline.at(start + jnp.arange(size)).next_observations
        bins = behavior.apply(state.behavior, states, jax.random.fold_in(key, start), count, method="sample")[1]
        block = jnp.swapaxes(bins, 0, 1).reshape(size, *pool.shape[1:]).astype(jnp.uint8)
        return jax.lax.dynamic_update_slice_in_dim(pool, block, start, axis=0), None

    empty = jnp.zeros((rows, args.proposal_pool, args.num_proposals, action_dim), jnp.uint8)
    starts = jnp.minimum(jnp.arange(0, rows, size), rows - size)  # the last block may overlap the one before
    return jax.lax.scan(fill, empty, starts)[0]


def ensemble(q: jax.Array, weight: jax.Array | float) -> jax.Array:
    """Ens(v) of `q [K, ...]` over its first axis."""
    return weight * q.min(axis=0) + (1.0 - weight) * q.max(axis=0)


def max_of_min(params: Any, critic: nn.Module, states: jax.Array, actions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """max_n min_k Q_k(s, a_n) `[batch]`, and the share of all evaluations Q_k(s, a_n) that were done for it.

    `states [batch, obs_dim]`, `actions [n, batch, action_dim]`. An action's bound is the minimum over the Q-functions
    evaluated so far. All actions get one Q-function, then in rounds 1, 2, 4, ... more, if their bound is above the best
    full minimum known for their state. Each round first evaluates every other Q-function for each state's action of
    highest bound, to raise that best. Q-functions of low mean (on one action of 32 states) come first: tightest bounds.
    """
    num_actions, batch, action_dim = actions.shape
    num_critics, num_pairs, some = critic.num_critics, num_actions * batch, min(batch, 32)
    order = jnp.argsort(critic.apply(params, states[:some], actions[0, :some]).mean(axis=1))
    params = jax.tree.map(lambda p: p[order], params)
    pairs = actions.reshape(num_pairs, action_dim)  # pair i is of state i % batch

    def minimum(first: int, last: int, states: jax.Array, actions: jax.Array) -> jax.Array:
        part = jax.tree.map(lambda p: p[first:last], params)
        return critic.clone(num_critics=last - first).apply(part, states, actions).min(axis=0)

    bounds, best = minimum(0, 1, states, actions), jnp.full(batch, -jnp.inf, jnp.float32)
    done, evaluations = 1, jnp.float32(num_pairs + num_critics * some)
    while done < num_critics:
        leader = bounds.argmax(axis=0)[None]
        exact = minimum(done, num_critics, states, jnp.take_along_axis(actions, leader[..., None], axis=0)[0])
        exact = jnp.minimum(exact, jnp.take_along_axis(bounds, leader, axis=0)[0])
        best = jnp.maximum(best, exact)
        bounds = jnp.put_along_axis(bounds, leader, exact[None], axis=0, inplace=False)

        group = min(done, num_critics - done)
        is_open = (bounds > best).ravel()
        size = num_pairs + batch  # so that the last block is a whole one
        chosen = jnp.nonzero(is_open, size=size, fill_value=num_pairs)[0]

        def block(i: jax.Array, flat: jax.Array, first: int = done, last: int = done + group) -> jax.Array:
            own = jax.lax.dynamic_slice_in_dim(chosen, i * batch, batch)  # noqa: B023
            q = minimum(first, last, states[own % batch], pairs.at[own].get(mode="clip"))
            return flat.at[own].min(q, mode="drop")

        blocks = -(-is_open.sum() // batch)
        bounds = jax.lax.fori_loop(0, blocks, block, bounds.ravel()).reshape(num_actions, batch)
        evaluations += batch * ((num_critics - done) + group * blocks)
        done += group
    return jnp.maximum(best, bounds.max(axis=0)), evaluations / (num_critics * num_pairs)


def widened(critic: nn.Module, params: Any, states: jax.Array, actions: jax.Array) -> tuple[nn.Module, Any]:
    """The same Q-functions with hidden layers of a whole number of 8 units; those added are always zero.

    NVIDIA's library multiplies at half the rate and less where the rows of a matrix are no whole 16 bytes, as with the
    paper's 750 units.
    """
    wide = critic.clone(hidden_dim=-(-critic.hidden_dim // 8) * 8)
    shapes = jax.eval_shape(wide.init, jax.random.key(0), states, actions)

    def pad(x: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.pad(x, [(0, end - size) for size, end in zip(x.shape, like.shape, strict=True)])

    return wide, jax.tree.map(pad, params, shapes)


# Eq. (11), and (71) with the discount
def backup(
    target_critic: Any, batch: Transitions, proposals: jax.Array, hp: Hyperparameters, args: Args
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Targets `[batch]` from the proposals `[N, batch, action_dim]` for the next states."""
    (_, critic), states = modules(args, batch.actions.shape[-1]), batch.next_observations

    def all_values() -> tuple[jax.Array, jax.Array]:
        q, params = critic, target_critic
        if jax.default_backend() == "gpu" and not args.layer_norm:  # its mean would include the added units
            q, params = widened(critic, target_critic, states, proposals)
        values = ensemble(q.apply(params, states, proposals), hp.ensemble_weight)
        if args.backup == "max":
            return values.max(axis=0), jnp.ones((), jnp.float32)
        return jnp.sum(jax.nn.softmax(hp.softmax_scale * values, axis=0) * values, axis=0), jnp.ones((), jnp.float32)

    can_screen = args.screening and args.backup == "max" and min(len(proposals), args.num_critics) > 1
    if can_screen and jax.default_backend() == "cpu":  # a GPU would compute both branches, and is slow at small steps
        screened = partial(max_of_min, target_critic, critic, states, proposals)
        value, share = jax.lax.cond(hp.ensemble_weight == 1.0, screened, all_values)
    else:
        value, share = all_values()
    return batch.rewards + hp.discount * (1.0 - batch.terminations) * value, {"critic/evaluated_share": share}


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
    proposals = propose(state.behavior, batch.next_observations, proposal_key, args, batch.actions.shape[-1], bins=bins)
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
    values = q.mean(axis=0) + hp.exploration_bonus * q.std(axis=0) if sample else ensemble(q, hp.ensemble_weight)
    return jnp.take_along_axis(actions, values.argmax(axis=0)[None, :, None], axis=0)[0]


def train_behavior(
    state: State, hp: Hyperparameters, data: Replay, num_updates: jax.Array | int, args: Args
) -> tuple[State, Metrics]:
    """`num_updates` updates of the behaviour model, each on a fresh uniform minibatch; metrics are sums over them."""

    def step(state: State) -> tuple[State, dict[str, jax.Array]]:
        key, sample_key = jax.random.split(state.key)
        return update_behavior(state._replace(key=key), replay.sample(sample_key, data, args.batch_size), hp, args)

    return repeat(step, state, num_updates)


def train(
    state: State, hp: Hyperparameters, data: Replay, num_updates: jax.Array | int, args: Args, update: Callable = update
) -> tuple[State, Metrics]:
    """`num_updates` updates, each on a fresh uniform minibatch of the data; online, of the behaviour model too."""

    def step(state: State) -> tuple[State, dict[str, jax.Array]]:
        key, sample_key, set_key = jax.random.split(state.key, 3)
        rows = replay.sample_rows(sample_key, data, args.batch_size)
        batch, bins, state = replay.take(data, rows), None, state._replace(key=key)
        if data.extra is not None:
            sets = jax.random.randint(set_key, rows.shape, 0, args.proposal_pool)
            bins = data.extra[data.member, rows, sets]
        online, behavior_info = data.ring is not None, {"behavior/loss": jnp.float32(0.0)}
        if online:
            state, behavior_info = update_behavior(state, batch, hp, args)
        state, info = update(state, batch, hp, args, bins)
        return state, info | {"behavior/loss": (behavior_info["behavior/loss"], jnp.array(online))}

    return repeat(step, state, num_updates)


def borrow(path: str, state: State, seeds: np.ndarray, data: tuple[str, bool]) -> dict[str, Any]:
    """Behaviour models and their optimisers for members with these `seeds`, from the run in the directory `path`.

    A member takes the model that was trained with its own seed (of a grid: in the first combination); without one, the
    model at place seed % (number of models). UsageError unless that run is in its offline phase, the model's member is
    alive, and the behaviour networks and `data` (hash, whether states are normalised) are the same here.
    """
    arrays, about = read_tree(file := Path(path).expanduser() / "checkpoint" / "state.npz")
    try:
        identity, theirs, done = about["identity"], about["seeds"], about["done"]
        places = [theirs.index(seed) if seed in theirs else seed % len(theirs) for seed in seeds.tolist()]
        phase = "online" if done["online"] else "" if done["offline"] else "pretraining"
        diverged = [theirs[place] for place in places if str(place) in about["diverged"]]
        same_data = (identity["dataset_sha256"], identity["normalize_observations"]) == data
    except (KeyError, TypeError, AttributeError):
        raise UsageError(f"checkpoint {file} is damaged or was edited (its metadata)") from None
    if not same_data:
        raise UsageError(f"{path} is of a run on another dataset or with another --normalize-observations")
    if phase or diverged:
        what = f"run is in the {phase} phase, not offline" if phase else f"member with seed {diverged[0]} diverged"
        raise UsageError(f"{path}: its {what}")
    parts = {name: getattr(state, name) for name in ("behavior", "behavior_opt")}
    like = jax.tree.map(lambda x: np.zeros((len(theirs), *x.shape[1:]), x.dtype), parts)
    filled = {name: fill_tree(file, arrays, like[name], f"['state'].{name}") for name in parts}
    return jax.tree.map(lambda x: x[places], filled)


def print_estimate(args: Args, count: int, done: dict[str, int], obs_dim: int, action_dim: int) -> None:
    """Print roughly how long the updates not yet `done` take, if that is over 1.5 hours and JAX runs on a CPU.

    A pass costs two operations per weight and row, for each of the `count` members; a gradient three passes; at the 100
    GFLOP/s of two common cores. Screening leaves a quarter of the proposals' (results/emaq-speed).
    """
    start = partial(init, args=args, obs_dim=obs_dim, action_dim=action_dim)
    shapes = jax.eval_shape(start, jax.random.key(0), args.hp)
    mu, q = (sum(x.size for x in jax.tree.leaves(tree)) for tree in (shapes.behavior, shapes.critic))
    screened = args.screening and args.backup == "max" and args.hp.ensemble_weight == 1.0
    online, own_behavior = args.online_steps - done["online"], args.num_updates > 0 and not args.behavior_checkpoint
    fits = online + (args.behavior_updates - done["pretraining"]) * own_behavior
    valued = (args.num_updates - done["offline"] + online) * (3 + args.num_proposals / (4 if screened else 1))
    hours = count * 2 * args.batch_size * (mu * 3 * fits + q * valued) / 1e11 / 3600
    if hours > 1.5 and jax.default_backend() == "cpu" and not args.quiet:
        advice = "" if args.preset == "cpu" else "; --preset cpu has smaller networks and fewer proposals"
        print(f"on two CPU cores this takes roughly {hours:.0f} hours from here on{advice}", file=sys.stderr)


# benchmarks/bcq.py calls it with init, update and act of its own.
def main(args: Args, name: str = "emaq", init: Callable = init, update: Callable = update, act: Callable = act) -> None:
    """The run: load, initialise, fit mu, train offline, fine-tune online; evaluate, log and checkpoint on the way."""
    members = make_members(args)  # seeds x hyperparameters: the leading axis of states, rings, actions and metrics
    dataset = load(args.dataset, args.env, only_env=not args.num_updates)
    transform = fit_transform(dataset.transitions, args)
    offline = members.replicate(transform.transitions(dataset.transitions)) if args.num_updates else None
    obs_dim, action_dim = dataset.transitions.observations.shape[1], len(dataset.low)
    most_members = -(-members.total // int(args.shard.partition("/")[2] or 1))  # per part of --shard: all decide alike
    pool_bytes = most_members * args.proposal_pool * args.num_proposals * dataset.transitions.actions.size
    if args.draws_ahead and 2 * pool_bytes > members.memory():
        why = f"the pool, {pool_bytes / 2**30:.3g} GiB, would take more than half of the memory"
        print(f"--proposal-pool 0, which is slower: {why}", file=sys.stderr)
        args = replace(args, proposal_pool=0)
    warm_up = 0 if args.num_updates else args.random_steps

    def explore(state: State, hp: Hyperparameters, observations: jax.Array, key: jax.Array, step: jax.Array) -> Any:
        key = jax.random.fold_in(key, step)
        actions = act(state, hp, observations, key, args, action_dim, sample=True)
        return jnp.where(step < warm_up, jax.random.uniform(key, actions.shape, actions.dtype, -1.0), actions)

    fit_all, draw_all = members.map(partial(train_behavior, args=args)), members.map(partial(draw_pool, args=args))
    train_all, explore_all = members.map(partial(train, args=args, update=update)), members.map(explore)
    act_all = members.map(partial(act, args=args, action_dim=action_dim, sample=False), batched=True)
    keep_finite_all = members.map(keep_finite, batched=True)
    insert_all = members.map(insert, batched=True, donate=(0,))
    tune_all = members.map(partial(train, args=args, update=update), donate=(0,))  # in place of the old state
    make_env = partial(make_environment, dataset.env_spec, args.max_episode_steps)
    evaluator = Evaluator(make_env, members, transform)
    state = members.start(partial(init, args=args, obs_dim=obs_dim, action_dim=action_dim))
    ring = members.broadcast(empty_ring(args.online_steps, obs_dim, action_dim)) if args.online_steps else None

    with Run(name, args, members) as run:
        if args.behavior_checkpoint and not run.checkpoint.exists():
            data = (dataset.describe()["dataset_sha256"], args.normalize_observations)
            state = state._replace(**members.shard(borrow(args.behavior_checkpoint, state, members.seeds, data)))
        state, ring = run.restore({"state": state, "ring": ring}, dataset, transform).values()
        print_estimate(args, members.count, run.done, obs_dim, action_dim)

        def evaluate(episodes: int) -> Returns | None:
            return evaluator.run(partial(act_all, state, members.hp), episodes, run.steps(), run.stopping, run.alive)

        own_behavior = args.num_updates > 0 and not args.behavior_checkpoint
        for start, stop in run.chunks("pretraining", args.behavior_updates if own_behavior else 0):
            new, metrics = fit_all(state, members.hp, Replay(offline), (stop - start) * run.alive)
            state, finite = keep_finite_all(new, state, metrics)
            run.record(stop, metrics, finite)
            if run.checkpoint_due():
                run.save({"state": state})

        pool, pool_id, pool_every = None, -1, -(-args.pool_uses * len(dataset.transitions.rewards) // args.batch_size)
        for start, stop in run.chunks("offline", args.num_updates, every=pool_every if args.draws_ahead else 0):
            if run.evaluation_due():
                run.save({"state": state})
                run.record_evaluation(evaluate(args.eval_episodes))
            if args.draws_ahead and pool_id != start // pool_every:  # states have been used --pool-uses times
                pool, pool_id = None, start // pool_every  # frees its memory before the next one is drawn
                keys = jax.vmap(jax.random.fold_in, (0, None))(members.keys(1), pool_id)
                pool = draw_all(state, members.hp, Replay(offline), keys)
            new, metrics = train_all(state, members.hp, Replay(offline, extra=pool), (stop - start) * run.alive)
            state, finite = keep_finite_all(new, state, metrics)
            run.record(stop, metrics, finite)
            if run.checkpoint_due():
                run.save({"state": state})

        if args.online_steps:  # steps of every member's environment, then as many updates on old and new transitions
            pool, every = None, args.steps_per_iteration if args.steps_per_iteration > 1 else 0
            envs = Collector(make_env, members, transform, done=run.done["online"])
            keys = members.keys(0)  # for exploring
            for start, stop in run.chunks("online", args.online_steps, every, whole=every > 0):
                if run.evaluation_due():
                    run.save({"state": state, "ring": ring})
                    run.record_evaluation(evaluate(args.eval_episodes))
                before, parts, owed = jax.tree.map(jnp.copy, state), [], 0
                for step in range(start, stop):
                    actions = explore_all(state, members.hp, envs.observations, keys, np.full(len(keys), step))
                    ring, owed = insert_all(ring, envs.step(actions)), owed + (step >= warm_up)
                    last = step + 1 == stop or run.stopping()
                    if last or not every:
                        state, metrics = tune_all(state, members.hp, Replay(offline, ring), owed * run.alive)
                        parts.append(metrics)
                        owed = 0
                    if last:
                        break
                metrics = join(parts)
                state, finite = keep_finite_all(state, before, metrics)
                run.record(step + 1, metrics, finite)
                if run.checkpoint_due():
                    run.save({"state": state, "ring": ring})

        run.finish(evaluate(args.final_eval_episodes))


if __name__ == "__main__":
    launch(main, Args, PRESETS)
