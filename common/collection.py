"""Online data collection: environments stepped in lockstep, and whole episodes put together from their steps."""

from typing import Any

import gymnasium as gym
import jax
import numpy as np

from common.buffers import Transitions
from common.evaluation import make_environment
from common.transforms import Transform


class Collector:
    """Steps an environment for each seed and returns transformed transitions with their true next observation.

    A time limit sets the truncation flag alone, so it bootstraps. `episodes` gathers (environment, raw return, length).
    """

    def __init__(self, spec: Any, transform: Transform, seeds: list[int]) -> None:
        self.transform = transform
        self.environments = gym.vector.SyncVectorEnv(
            [lambda: make_environment(spec)] * len(seeds), autoreset_mode=gym.vector.AutoresetMode.SAME_STEP
        )
        observations, _ = self.environments.reset(seed=seeds)
        self.observations = transform.observations(observations)
        self.returns, self.lengths = np.zeros(len(seeds)), np.zeros(len(seeds), int)
        self.episodes: list[tuple[int, float, int]] = []

    def step(self, actions: np.ndarray) -> Transitions:
        """Apply `actions [environments, action_dim]`; the transitions `[environments, ...]`.

        Actions beyond their bounds act as the nearest within them, and stay as they are in the transitions.
        """
        raw, rewards, terminations, truncations, info = self.environments.step(np.clip(actions, -1.0, 1.0))
        observations = self.transform.observations(raw)
        next_observations = observations.copy()
        self.returns += rewards
        self.lengths += 1
        for i in np.flatnonzero(terminations | truncations):
            next_observations[i] = self.transform.observations(info["final_obs"][i])
            self.episodes.append((int(i), float(self.returns[i]), int(self.lengths[i])))
            self.returns[i] = self.lengths[i] = 0
        transitions = Transitions(
            observations=self.observations,
            actions=np.asarray(actions, np.float32),
            rewards=self.transform.rewards(rewards),
            next_observations=next_observations,
            terminations=terminations.astype(np.float32),
            truncations=(truncations & ~terminations).astype(np.float32),
        )
        self.observations = observations
        return transitions

    def close(self) -> None:
        """Close all environments."""
        self.environments.close()


class Episodes:
    """Puts the steps of environments side by side together into episodes, and gives out those that have ended."""

    def __init__(self, num_environments: int) -> None:
        self.steps: list[Transitions] = []
        self.running: list[list[Transitions]] = [[] for _ in range(num_environments)]
        self.ended = np.zeros(num_environments, bool)
        """Whether the environment has ever ended an episode."""

    def add(self, transitions: Transitions) -> None:
        """A step of every environment, `[environments, ...]`."""
        self.steps.append(transitions)
        self.ended |= (transitions.terminations + transitions.truncations) > 0

    def take(self, whole: bool = True) -> list[Transitions | None]:
        """For each environment the steps of the episodes that ended since the last call, one after the other.

        Unless `whole`: all steps since then.
        """
        if not self.steps:
            return [None] * len(self.running)
        steps = jax.tree.map(lambda *rows: np.stack(rows), *self.steps)
        self.steps.clear()
        ended: list[Transitions | None] = []
        for i, running in enumerate(self.running):
            ends = np.flatnonzero(steps.terminations[:, i] + steps.truncations[:, i])
            cut = int(ends[-1]) + 1 if len(ends) else 0
            if not whole:
                cut = len(steps.rewards)
            head, tail = (jax.tree.map(lambda x: x[rows, i], steps) for rows in (slice(cut), slice(cut, None)))  # noqa: B023
            ended.append(jax.tree.map(lambda *rows: np.concatenate(rows), *running, head) if cut else None)
            self.running[i] = [tail] if cut else [*running, tail]
        return ended
