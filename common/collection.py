"""Online data collection: one environment for each member, stepped in lockstep."""

from typing import Any

import gymnasium as gym
import numpy as np

from common.buffers import Transitions
from common.evaluation import make_environment
from common.transforms import Transform


class Collector:
    """Steps one environment per member and returns transformed transitions with their true next observation.

    A time limit sets the truncation flag alone, so it bootstraps. `episodes` gathers (member, raw return, length).
    """

    def __init__(self, spec: Any, num_members: int, transform: Transform, seeds: list[int]) -> None:
        self.transform = transform
        self.environments = gym.vector.SyncVectorEnv(
            [lambda: make_environment(spec)] * num_members, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP
        )
        observations, _ = self.environments.reset(seed=seeds)
        self.observations = transform.observations(observations)
        self.returns, self.lengths = np.zeros(num_members), np.zeros(num_members, int)
        self.episodes: list[tuple[int, float, int]] = []

    def step(self, actions: np.ndarray) -> Transitions:
        """Apply `actions [members, action_dim]`; the transitions `[members, ...]`."""
        raw, rewards, terminations, truncations, info = self.environments.step(np.asarray(actions))
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
