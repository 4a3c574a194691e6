"""Environments to evaluate and collect in, and the evaluation of a whole population at once."""

import contextlib
import io
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np

from common.errors import UsageError
from common.offax_sets import without_deprecations
from common.transforms import Transform

Policy = Callable[[np.ndarray, int], np.ndarray]
"""Actions in [-1, 1], `[members, episodes, action_dim]`, of observations `[members, episodes, obs_dim]` at a step."""


class Returns(NamedTuple):
    """Undiscounted returns and lengths of the evaluation's episodes, `[members, episodes]`."""

    returns: np.ndarray
    lengths: np.ndarray


def make_environment(spec: Any) -> gym.Env:
    """The environment of a gymnasium id or EnvSpec, with flat observations and actions in [-1, 1].

    UsageError if it is unknown, its package is missing, or its spaces are not continuous vectors.
    """
    name = getattr(spec, "id", spec)
    try:
        with without_deprecations(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of deprecated versions: the dataset decides the version
            try:
                env = gym.make(spec, disable_env_checker=True)
            except (gym.error.NameNotFound, gym.error.NamespaceNotFound, gym.error.VersionNotFound):
                with contextlib.redirect_stderr(io.StringIO()):  # it prints a notice about versions
                    import gymnasium_robotics

                gym.register_envs(gymnasium_robotics)
                env = gym.make(spec, disable_env_checker=True)
    except ImportError as error:
        missing = error.name or str(error)
        raise UsageError(f'environment {name} needs {missing}: install with `pip install -e ".[adroit]"`') from None
    except gym.error.Error as error:
        raise UsageError(f"environment {name}: {' '.join(str(error).split())}") from None
    if isinstance(env.observation_space, gym.spaces.Dict):
        env = gym.wrappers.FlattenObservation(env)
    for what, space in (("observations", env.observation_space), ("actions", env.action_space)):
        if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
            raise UsageError(f"environment {name} has {what} in {space}; Offax handles continuous vectors only")
    if not np.isfinite([env.action_space.low, env.action_space.high]).all():
        raise UsageError(f"environment {name} has unbounded actions; Offax needs finite bounds")
    return gym.wrappers.RescaleAction(env, np.float32(-1.0), np.float32(1.0))


class Evaluator:
    """Runs every member's episodes side by side: one call of the policy for each time step.

    Each sub-environment runs one episode and then waits, so long episodes are not under-counted, and none is stepped
    past its end. Environments are made once and kept.
    """

    def __init__(self, spec: Any, num_members: int, transform: Transform) -> None:
        self.spec = spec
        self.num_members = num_members
        self.transform = transform
        self.environments: list[gym.Env] = []

    def run(
        self, policy: Policy, episodes: int, seeds: list[int], check_interrupt: Callable[[], None] = lambda: None
    ) -> Returns:
        """`episodes` episodes of each member; episode i of a member is seeded by its `seeds` entry plus i.

        `check_interrupt` is called before each time step and may raise.
        """
        count = self.num_members * episodes
        while len(self.environments) < count:
            self.environments.append(make_environment(self.spec))
        environments = self.environments[:count]
        starts = [env.reset(seed=seeds[i // episodes] + i % episodes)[0] for i, env in enumerate(environments)]
        observations = np.stack(starts).astype(np.float32)
        returns, lengths = np.zeros(count), np.zeros(count, int)
        running, step = list(range(count)), 0
        while running:
            check_interrupt()
            shaped = self.transform.observations(observations).reshape(self.num_members, episodes, -1)
            actions = np.asarray(policy(shaped, step)).reshape(count, -1)
            still_running = []
            for i in running:
                observations[i], reward, terminated, truncated, _ = environments[i].step(actions[i])
                returns[i] += float(reward)
                lengths[i] += 1
                if not (terminated or truncated):
                    still_running.append(i)
            running, step = still_running, step + 1
        return Returns(returns.reshape(-1, episodes), lengths.reshape(-1, episodes))

    def close(self) -> None:
        """Close all environments."""
        for env in self.environments:
            env.close()
        self.environments.clear()
