"""SAC with prior data, the comparator that takes no precautions: `benchmarks/sac.py` on a dataset and what it collects.

Offline and online are the same updates, one for each environment step in the latter, on the union of the dataset and
the policy's own samples (Vecerik et al., 2017, arXiv:1707.08817, with SAC in place of DDPG; Nair et al., 2020,
section 6). Equations and networks: `benchmarks/sac.py`. Evaluated by the squashed mean, collecting by samples. Where
Nair et al. start it from a cloned policy (appendix B.4), its networks start at random here.

    python benchmarks/sac_prior.py --dataset offax/hopper/medium-v0 --num-updates 25000 --online-steps 100000
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import sac
from common.experiment import Run
from common.flags import Count, RunArgs, launch


@dataclass(frozen=True)
class Args(RunArgs):
    """SAC with prior data: soft actor-critic on a dataset, then on the union with its own samples."""

    hp: sac.Hyperparameters = sac.Hyperparameters()
    hidden_dim: Count = 256
    """Width of every hidden layer (paper, table 1)."""
    num_layers: Count = 2
    """Hidden layers of the actor and of each critic (paper, table 1)."""
    num_critics: Count = 2
    """Q-functions; the minimum is taken over all of them."""
    critic_layer_norm: bool = False
    """Layer normalisation in the critics."""


PRESETS: dict[str, dict[str, Any]] = {}  # the same settings everywhere


def init(key: jax.Array, hp: sac.Hyperparameters, args: Args, obs_dim: int, action_dim: int) -> sac.State:
    """Fresh networks and optimisers, those of `benchmarks/sac.py`."""
    return sac.init(key, args, obs_dim, action_dim)


def act(
    state: sac.State,
    hp: sac.Hyperparameters,
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
    """Load, initialise, train in chunks, evaluate, checkpoint, fine-tune online, report."""
    functions = (partial(init, args=args), partial(sac.train, args=args), partial(act, args=args))
    with Run("sac_prior", args, *functions) as run:
        state = run.begin()
        for num_updates in run.offline():  # up to the next log line, evaluation or checkpoint
            state, metrics = run.train(state, num_updates)
            state = run.record(state, metrics)
        for num_steps in run.online():  # the same updates, one for each environment step, on old and new data
            state, metrics = run.collect_and_train(state, num_steps)
            state = run.record(state, metrics)
        run.finish(state)


if __name__ == "__main__":
    launch(main, Args, PRESETS)
