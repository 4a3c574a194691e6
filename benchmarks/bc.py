"""Behaviour cloning (BC), the comparator that uses no rewards. Pomerleau, 1989; settings of CORL, arXiv:2210.07105.

The policy imitates the dataset's actions, whatever they were worth:

    L_pi = mean (pi(s) - a)^2                                                                            (Eq. 1)

Differences from CORL's BC: all trajectories are used (CORL may keep only the best share of them); biases start at zero
rather than uniform; the other settings are CORL's, the normalisation of states among them. There is no online phase.

    python benchmarks/bc.py --dataset offax/hopper/medium-expert-v1
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from common import networks, replay
from common.cli import Count, NonNegative, RunArgs, UsageError, launch
from common.data import load
from common.environments import Evaluator, Returns, make_environment
from common.members import Metrics, keep_finite, make_members, repeat
from common.networks import descend
from common.replay import Replay, Transitions, fit_transform
from common.runs import Run


class Hyperparameters(NamedTuple):
    """What --grid can sweep: a value for each member, traced by JAX, so no Python `if` on it."""

    actor_learning_rate: NonNegative = 3e-4  # Adam's rate for the policy (CORL).


@dataclass(frozen=True)
class Args(RunArgs):
    """BC: behaviour cloning."""

    hp: Hyperparameters = Hyperparameters()
    num_updates: Count = 1_000_000  # Updates (CORL).
    normalize_observations: bool = True  # Centre and scale states by the dataset's mean and standard deviation (CORL).
    hidden_dim: Count = 256  # Width of every hidden layer (CORL).
    num_layers: Count = 2  # Hidden layers of the policy (CORL).

    def validate(self) -> None:
        """UsageError for a count that is out of range, or an online phase."""
        super().validate()
        if self.online_steps:
            raise UsageError(f"--online-steps {self.online_steps}: behaviour cloning has no online phase")


PRESETS: dict[str, dict[str, Any]] = {}  # the same settings everywhere


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
    actor_opt: optax.OptState
    step: jax.Array
    key: jax.Array


ADAM = optax.scale_by_adam()  # without rate and sign, which `descend` applies


def modules(args: Args, action_dim: int) -> Actor:
    """The policy."""
    return Actor(action_dim, args.hidden_dim, args.num_layers)


def init(key: jax.Array, hp: Hyperparameters, args: Args, obs_dim: int, action_dim: int) -> State:
    """A fresh network and its optimiser."""
    actor_key, key = jax.random.split(key)
    actor_params = modules(args, action_dim).init(actor_key, jnp.zeros((1, obs_dim)))
    return State(actor=actor_params, actor_opt=ADAM.init(actor_params), step=jnp.zeros((), jnp.int32), key=key)


# Eq. (1)
def actor_loss(policy_actions: jax.Array, actions: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Squared error of the policy's actions to the dataset's, both `[batch, action_dim]`, mean over both axes."""
    assert policy_actions.shape == actions.shape, (policy_actions.shape, actions.shape)
    loss = jnp.mean((policy_actions - actions) ** 2)
    return loss, {"actor/loss": loss}


def update(state: State, batch: Transitions, hp: Hyperparameters, args: Args) -> tuple[State, dict[str, jax.Array]]:
    """One step of Adam on the policy."""
    actor = modules(args, batch.actions.shape[-1])

    def loss_of_actor(params: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        return actor_loss(actor.apply(params, batch.observations), batch.actions)

    grads, actor_info = jax.grad(loss_of_actor, has_aux=True)(state.actor)
    actor_params, actor_opt = descend(ADAM, state.actor, grads, state.actor_opt, hp.actor_learning_rate)
    return state._replace(actor=actor_params, actor_opt=actor_opt, step=state.step + 1), actor_info


def act(
    state: State,
    hp: Hyperparameters,
    observations: jax.Array,
    key: jax.Array,
    args: Args,
    action_dim: int,
    sample: bool,
) -> jax.Array:
    """Actions `[batch, action_dim]` in [-1, 1]; the policy is deterministic, so `key` and `sample` change nothing."""
    return modules(args, action_dim).apply(state.actor, observations)


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
    """The run: load, initialise, train offline; evaluate, log and checkpoint on the way."""
    members = make_members(args)  # seeds x hyperparameters: the leading axis of states, rings, actions and metrics
    dataset = load(args.dataset, args.env)
    transform = fit_transform(dataset.transitions, args)
    offline = members.replicate(transform.transitions(dataset.transitions))
    obs_dim, action_dim = dataset.transitions.observations.shape[1], len(dataset.low)

    train_all = members.map(partial(train, args=args))
    act_all = members.map(partial(act, args=args, action_dim=action_dim, sample=False), batched=True)
    keep_finite_all = members.map(keep_finite, batched=True)
    make_env = partial(make_environment, dataset.env_spec, args.max_episode_steps)
    evaluator = Evaluator(make_env, members, transform)
    state = members.start(partial(init, args=args, obs_dim=obs_dim, action_dim=action_dim))

    with Run("bc", args, members) as run:
        state = run.restore({"state": state}, dataset, transform)["state"]

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

        run.finish(evaluate(args.final_eval_episodes))


if __name__ == "__main__":
    launch(main, Args, PRESETS)
