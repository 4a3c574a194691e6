"""Batch-constrained Q-learning (BCQ), EMaQ's comparator. Fujimoto, Meger, Precup, 2019, arXiv:1812.02900.

EMaQ (algorithms/emaq.py) with one network more: xi moves each of the N actions that the behaviour model mu proposes by
at most Phi in each dimension, towards larger Q. With b(s, a) = clip(a + xi(s, a), -1, 1), xi = Phi tanh(network),

    y    = r + discount (1 - termination) max_n Ens(Q'_1(s', a'_n), ..., Q'_K(s', a'_n))               (EMaQ's Eq. 3)
    a'_n = b'(s', u_n),   u_n ~ mu(s'), n = 1 .. N
    L_Q  = sum_k mean (Q_k(s, a) - y)^2                                                                (EMaQ's Eq. 4)
    L_xi = -mean Q_1(s, b(s, u)),   u ~ mu(s), one for each state                                   (BCQ, algorithm 1)

with target networks Q' and b'; xi climbs the first of the Q-functions alone, as in BCQ. The agent draws N actions of
mu, moves them by xi, and takes the best by Ens (EMaQ's Eq. 2). Phi = 0 is EMaQ, with the same random numbers.

As in EMaQ's comparison (section 5.2, appendix G) and other than BCQ as published: mu is autoregressive or a variational
autoencoder, trained before and frozen, where BCQ trains an autoencoder along with the rest; lambda is 1 in place of
0.75; K, sizes and rates are those of EMaQ's tables 2 and 3; and the agent chooses by Ens too, where BCQ has N = 10
(its code: 100 to act) and chooses by Q_1. Open in EMaQ's paper: N for BCQ, here the same as for EMaQ. There is no
online phase.

    python benchmarks/bcq.py --preset cpu --num-updates 100000 --grid "max_perturbation=0.005,0.05,0.5"
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import tyro

from algorithms import emaq
from common import networks
from common.cli import Count, NonNegative, Share, UsageError, launch
from common.networks import descend
from common.replay import Transitions


class Hyperparameters(NamedTuple):
    """What --grid can sweep: a value for each member, traced by JAX, so no Python `if` on it.

    The names that EMaQ's functions read are EMaQ's.
    """

    # The paper's Phi: largest change of a proposal, in each dimension of [-1, 1] (BCQ's code; EMaQ's appendix G.1:
    # 0.005 to 0.5).
    max_perturbation: NonNegative = 0.05
    # The paper's lambda: weight of the minimum over the Q-functions in targets, against the maximum (EMaQ, tables 2 and
    # 3; BCQ: 0.75).
    ensemble_weight: Share = 1.0
    discount: Share = 0.99  # Discount factor (BCQ).
    # Share of critic and perturbation that moves into their targets at every update (both papers).
    polyak: Share = 0.005
    critic_learning_rate: NonNegative = 1e-4  # Adam's rate for the Q-functions (EMaQ, table 2).
    actor_learning_rate: NonNegative = 5e-4  # Adam's rate for the perturbation (EMaQ, tables 2 and 3).
    behavior_learning_rate: NonNegative = 5e-4  # Adam's rate for the behaviour model (EMaQ, table 2).


@dataclass(frozen=True)
class Args(emaq.Args):
    """BCQ: batch-constrained Q-learning."""

    hp: Hyperparameters = Hyperparameters()
    num_updates: Count = 1_000_000  # Updates (as EMaQ).
    backup: tyro.conf.Suppress[Literal["max"]] = "max"  # The best proposal: the softmax is EMaQ's alone.
    steps_per_iteration: tyro.conf.Suppress[Literal[1]] = 1  # Of EMaQ's online phase.

    def validate(self) -> None:
        """UsageError for a number out of range, or an online phase."""
        super().validate()
        if self.online_steps:
            raise UsageError(f"--online-steps {self.online_steps}: this BCQ has no online phase")


PRESETS = emaq.PRESETS


class Perturbation(nn.Module):
    """Direction of the change, [-1, 1] in each dimension: MLP on states and actions, then tanh.

    `(observations [batch, obs_dim], actions [..., batch, action_dim]) -> [..., batch, action_dim]`.
    """

    hidden_dim: int
    num_layers: int

    @nn.compact
    def __call__(self, observations: jax.Array, actions: jax.Array) -> jax.Array:
        trunk = networks.MLP(self.hidden_dim, self.num_layers, actions.shape[-1], networks.glorot)
        observations = jnp.broadcast_to(observations, (*actions.shape[:-1], observations.shape[-1]))
        return jnp.tanh(trunk(jnp.concatenate([observations, actions], axis=-1)))


class State(NamedTuple):
    """Everything that training changes, of one member: what EMaQ's has, and the perturbation."""

    behavior: Any
    critic: Any
    target_critic: Any
    actor: Any
    target_actor: Any
    behavior_opt: optax.OptState
    critic_opt: optax.OptState
    actor_opt: optax.OptState
    step: jax.Array
    key: jax.Array


FOLD = 2**31 + 2
"""Makes the perturbation's keys: no split of a key gives this one, so that all others are EMaQ's."""


def modules(args: Args, action_dim: int) -> tuple[networks.QEnsemble, Perturbation]:
    """The Q-functions, and the perturbation of their size."""
    return emaq.modules(args, action_dim)[1], Perturbation(args.hidden_dim, args.num_layers)


def init(key: jax.Array, hp: Hyperparameters, args: Args, obs_dim: int, action_dim: int) -> State:
    """Fresh networks and optimisers; the targets start as copies."""
    _, actor = modules(args, action_dim)
    actor_params = actor.init(jax.random.fold_in(key, FOLD), jnp.zeros((1, obs_dim)), jnp.zeros((1, action_dim)))
    return State(
        **emaq.init(key, hp, args, obs_dim, action_dim)._asdict(),
        actor=actor_params,
        target_actor=jax.tree.map(jnp.copy, actor_params),
        actor_opt=emaq.ADAM.init(actor_params),
    )


def perturbed(
    params: Any, observations: jax.Array, actions: jax.Array, hp: Hyperparameters, args: Args
) -> tuple[jax.Array, jax.Array]:
    """b(s, a) and xi(s, a), both as `actions [..., batch, action_dim]`."""
    _, actor = modules(args, actions.shape[-1])
    change = hp.max_perturbation * actor.apply(params, observations, actions)
    return jnp.clip(actions + change, -1.0, 1.0), change


# BCQ, algorithm 1
def actor_loss(
    params: Any, critic_params: Any, observations: jax.Array, actions: jax.Array, hp: Hyperparameters, args: Args
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Minus the first Q-function of the moved proposals `actions [batch, action_dim]`."""
    critic, _ = modules(args, actions.shape[-1])
    moved, change = perturbed(params, observations, actions, hp, args)
    first = critic.clone(num_critics=1).apply(jax.tree.map(lambda p: p[:1], critic_params), observations, moved)
    loss = -jnp.mean(first)
    return loss, {"actor/loss": loss, "actor/perturbation": jnp.abs(change).mean()}


def update(
    state: State, batch: Transitions, hp: Hyperparameters, args: Args, bins: jax.Array | None = None
) -> tuple[State, dict[str, jax.Array]]:
    """One update of the Q-functions and their targets, then of the perturbation by the new ones and of its target."""
    action_dim = batch.actions.shape[-1]
    actor_key = jax.random.fold_in(state.key, FOLD)
    key, proposal_key = jax.random.split(state.key)
    proposals = emaq.propose(state.behavior, batch.next_observations, proposal_key, args, action_dim, bins=bins)
    moved, _ = perturbed(state.target_actor, batch.next_observations, proposals, hp, args)
    state, critic_info = emaq.update_critic(state._replace(key=key), batch, moved, hp, args)

    single = replace(args, num_proposals=1)
    actions = emaq.propose(state.behavior, batch.observations, actor_key, single, action_dim)[0]
    grads, actor_info = jax.grad(actor_loss, has_aux=True)(
        state.actor, state.critic, batch.observations, actions, hp, args
    )
    actor_params, actor_opt = descend(emaq.ADAM, state.actor, grads, state.actor_opt, hp.actor_learning_rate)
    new_state = state._replace(
        actor=actor_params,
        target_actor=optax.incremental_update(actor_params, state.target_actor, hp.polyak),
        actor_opt=actor_opt,
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
    """Actions `[batch, action_dim]` in [-1, 1]: the best moved proposal by Ens of the Q-functions."""
    critic, _ = modules(args, action_dim)
    proposals = emaq.propose(state.behavior, observations, key, args, action_dim)
    actions, _ = perturbed(state.actor, observations, proposals, hp, args)
    best = emaq.ensemble(critic.apply(state.critic, observations, actions), hp.ensemble_weight).argmax(axis=0)
    return jnp.take_along_axis(actions, best[None, :, None], axis=0)[0]


main = partial(emaq.main, name="bcq", init=init, update=update, act=act)


if __name__ == "__main__":
    launch(main, Args, PRESETS)
