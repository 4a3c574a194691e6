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
"""Actions in [-1, 1], `[members, width, action_dim]`, of observations `[members, width, obs_dim]`, and a number that is
another at every time step of every wave."""


MAX_ENVIRONMENTS = 64


class Returns(NamedTuple):
    """Undiscounted returns and lengths of the evaluation's episodes, `[members, episodes]`.

    `successes` is 1 where the environment reported success (`info["success"]`) at some step of the episode, 0 where it
    did at none, and NaN where it reports nothing of the kind.
    """

    returns: np.ndarray
    lengths: np.ndarray
    successes: np.ndarray


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
    """Runs the members' episodes side by side: one call of the policy for each time step.

    Each environment runs one episode and then waits, so long episodes are not under-counted, and none is stepped past
    its end. At most about `MAX_ENVIRONMENTS` are made, once, and reused for waves of episodes. `num_members` is that of
    the population, so that how many episodes of a member run at once does not depend on how many members do.
    """

    def __init__(self, spec: Any, num_members: int, transform: Transform) -> None:
        self.spec = spec
        self.num_members = num_members
        self.transform = transform
        self.environments: list[gym.Env] = []
        self.reports_success: bool | None = None
        """Whether the environment's first step of all did."""

    def run(
        self, policy: Policy, episodes: int, seeds: list[int], check_interrupt: Callable[[], None] = lambda: None
    ) -> Returns:
        """`episodes` episodes of each member that has an entry in `seeds`; episode i is seeded by that plus i.

        `check_interrupt` is called before each time step and may raise.
        """
        waves = -(-episodes // max(1, MAX_ENVIRONMENTS // self.num_members))
        width = -(-episodes // waves)
        members = len(seeds)
        returns = np.zeros((members, waves * width))
        lengths = np.zeros((members, waves * width), int)
        successes = np.full((members, waves * width), np.nan)
        for wave in range(waves):
            columns = np.arange(wave * width, (wave + 1) * width)
            running = [(m, j) for m in range(members) for j in range(width) if columns[j] < episodes]
            observations = self._reset(running, width, [[seed + int(i) for i in columns] for seed in seeds])
            step = 0
            while running:
                check_interrupt()
                actions = np.asarray(policy(self.transform.observations(observations), wave * 1_000_000 + step))
                still_running = []
                for m, j in running:
                    env = self.environments[m * width + j]
                    observations[m, j], reward, terminated, truncated, info = env.step(actions[m, j])
                    returns[m, columns[j]] += float(reward)
                    lengths[m, columns[j]] += 1
                    if self.reports_success is None:
                        self.reports_success = "success" in info
                    if self.reports_success:
                        success = float(info.get("success", 0.0))
                        successes[m, columns[j]] = np.fmax(successes[m, columns[j]], success)
                    if not (terminated or truncated):
                        still_running.append((m, j))
                running, step = still_running, step + 1
        return Returns(returns[:, :episodes], lengths[:, :episodes], successes[:, :episodes])

    def _reset(self, places: list[tuple[int, int]], width: int, seeds: list[list[int]]) -> np.ndarray:
        """First observations `[members, width, obs_dim]`; zeros where no episode is to be run."""
        while len(self.environments) < len(seeds) * width:
            self.environments.append(make_environment(self.spec))
        obs_dim = self.environments[0].observation_space.shape[0]
        observations = np.zeros((len(seeds), width, obs_dim), np.float32)
        for m, j in places:
            observations[m, j] = self.environments[m * width + j].reset(seed=seeds[m][j])[0]
        return observations

    def close(self) -> None:
        """Close all environments."""
        for env in self.environments:
            env.close()
        self.environments.clear()
