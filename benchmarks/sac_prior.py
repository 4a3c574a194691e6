"""SAC with prior data, the comparator that takes no precautions: `benchmarks/sac.py` on a dataset and what it collects.

Offline and online are the same updates, one for each environment step in the latter, on the union of the dataset and
the policy's own samples (Vecerik et al., 2017, arXiv:1707.08817, with SAC in place of DDPG; Nair et al., 2020,
section 6). Equations and networks: `benchmarks/sac.py`. Evaluated by the squashed mean, collecting by samples. Where
Nair et al. start it from a cloned policy (appendix B.4), its networks start at random here.

    python benchmarks/sac_prior.py --dataset offax/hopper/medium-v1 --num-updates 25000 --online-steps 100000
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import sac
from benchmarks.sac import Hyperparameters
from common.cli import Count, RunArgs, UsageError, launch
from common.data import load
from common.environments import Collector, Evaluator, Returns, make_environment
from common.members import join, keep_finite, make_members
from common.replay import Replay, empty_ring, fit_transform, insert
from common.runs import Run


@dataclass(frozen=True)
class Args(RunArgs):
    """SAC with prior data: soft actor-critic on a dataset, then on the union with its own samples."""

    hp: Hyperparameters = Hyperparameters()
    hidden_dim: Count = 256  # Width of every hidden layer (paper, table 1).
    num_layers: Count = 2  # Hidden layers of the policy and of each Q-function (paper, table 1).
    num_critics: Count = 2  # Q-functions; their minimum is taken over all of them.
    critic_layer_norm: bool = False  # Layer normalisation in the Q-functions.

    def validate(self) -> None:
        """UsageError, as that of all scripts, and where no data would be read."""
        super().validate()
        if self.env and not self.num_updates:
            raise UsageError("--num-updates 0 with --env reads no data: leave out --env, or pass --num-updates 1")


PRESETS: dict[str, dict[str, Any]] = {}  # the same settings everywhere


def init(key: jax.Array, hp: Hyperparameters, args: Args, obs_dim: int, action_dim: int) -> sac.State:
    """Fresh networks and optimisers, those of `benchmarks/sac.py`."""
    return sac.init(key, args, obs_dim, action_dim)


def act(
    state: sac.State,
    hp: Hyperparameters,
    observations: jax.Array,
    key: jax.Array,
    args: Args,
    action_dim: int,
    sample: bool,
) -> jax.Array:
    """Actions `[batch, action_dim]` in [-1, 1]: the squashed mean for evaluation, or a sample for data collection."""
    if sample:
        return sac.act(state, observations, key, args, action_dim)
    mean, _ = sac.modules(args, action_dim)[0].apply(state.actor, observations)
    return jnp.tanh(mean)


def main(args: Args) -> None:
    """The run: load, initialise, train offline, fine-tune online; evaluate, log and checkpoint on the way."""
    members = make_members(args)  # seeds x hyperparameters: the leading axis of states, rings, actions and metrics
    dataset = load(args.dataset, args.env)
    transform = fit_transform(dataset.transitions, args)
    offline = members.replicate(transform.transitions(dataset.transitions))
    obs_dim, action_dim = dataset.transitions.observations.shape[1], len(dataset.low)
    warm_up = 0 if args.num_updates else args.random_steps

    def explore(state: sac.State, hp: Hyperparameters, observations: jax.Array, key: jax.Array, step: jax.Array) -> Any:
        key = jax.random.fold_in(key, step)
        actions = act(state, hp, observations, key, args, action_dim, sample=True)
        return jnp.where(step < warm_up, jax.random.uniform(key, actions.shape, actions.dtype, -1.0), actions)

    train_all, explore_all = members.map(partial(sac.train, args=args)), members.map(explore)
    act_all = members.map(partial(act, args=args, action_dim=action_dim, sample=False), batched=True)
    keep_finite_all = members.map(keep_finite, batched=True)
    insert_all = members.map(insert, batched=True, donate=(0,))
    tune_all = members.map(partial(sac.train, args=args), donate=(0,))  # in place of the old state
    make_env = partial(make_environment, dataset.env_spec, args.max_episode_steps)
    evaluator = Evaluator(make_env, members, transform)
    state = members.start(partial(init, args=args, obs_dim=obs_dim, action_dim=action_dim))
    ring = members.broadcast(empty_ring(args.online_steps, obs_dim, action_dim)) if args.online_steps else None

    with Run("sac_prior", args, members) as run:
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
