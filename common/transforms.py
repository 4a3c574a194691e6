"""State and reward transforms: fitted on the dataset once, applied to it, to evaluation and to online transitions."""

from typing import NamedTuple

import numpy as np

from common.buffers import Transitions
from common.datasets import episode_returns
from common.errors import UsageError


class Transform(NamedTuple):
    """observations -> (observations - mean) / std, `[obs_dim]` each; rewards -> scale * rewards + shift."""

    observation_mean: np.ndarray
    observation_std: np.ndarray
    reward_scale: float
    reward_shift: float

    def observations(self, observations: np.ndarray) -> np.ndarray:
        """Transformed observations `[..., obs_dim]`, float32."""
        return ((observations - self.observation_mean) / self.observation_std).astype(np.float32)

    def rewards(self, rewards: np.ndarray) -> np.ndarray:
        """Transformed rewards `[...]`, float32."""
        return (self.reward_scale * np.asarray(rewards) + self.reward_shift).astype(np.float32)

    def transitions(self, transitions: Transitions) -> Transitions:
        """Transitions with states and rewards transformed; actions and flags as they are."""
        return transitions._replace(
            observations=self.observations(transitions.observations),
            rewards=self.rewards(transitions.rewards),
            next_observations=self.observations(transitions.next_observations),
        )


def fit(
    transitions: Transitions,
    normalize_observations: bool,
    normalize_returns: bool,
    reward_scale: float,
    reward_shift: float,
) -> Transform:
    """Constants from the dataset.

    `normalize_observations`: mean and standard deviation of the dataset's observations, 1e-3 added to the latter
    (TD3+BC, section 5). `normalize_returns`: the reward's scale is further multiplied by 1000 / (largest - smallest
    episode return) (IQL, section 5.2). UsageError where all episodes have the same return.
    """
    obs_dim = transitions.observations.shape[-1]
    mean, std = np.zeros(obs_dim, np.float32), np.ones(obs_dim, np.float32)
    if normalize_observations:
        mean = transitions.observations.mean(axis=0, dtype=np.float64).astype(np.float32)
        std = transitions.observations.std(axis=0, dtype=np.float64).astype(np.float32) + np.float32(1e-3)
    if normalize_returns:
        returns = episode_returns(transitions)
        spread = float(returns.max() - returns.min())
        if spread <= 0.0:
            raise UsageError("every episode of the dataset has the same return; pass --normalize-returns False")
        reward_scale = reward_scale * 1000.0 / spread
    return Transform(mean, std, reward_scale, reward_shift)
