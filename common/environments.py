"""Environments with flat observations and actions in [-1, 1]: which fit, evaluating, collecting."""

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from common.cli import UsageError, one_line, optional
from common.members import Members, evaluation_keys
from common.replay import Transform, Transitions

if TYPE_CHECKING:  # imported where it is used: neither --help nor training by itself needs it
    import gymnasium as gym

MAX_ENVIRONMENTS = 64
LONGEST_EPISODE = 10_000  # where neither the environment nor --max-episode-steps limits it
LARGEST_BOUND = 1e6  # of an action; a larger one stands for "unbounded", and float32 cannot resolve it
Maker = Callable[[], Any]


def action_bounds(name: str, observations: "gym.Space", actions: "gym.Space") -> tuple[int, np.ndarray, np.ndarray]:
    """Numbers in the flattened observation, and lowest and highest action `[action_dim]` float32.

    UsageError unless observations are vectors of numbers, or dictionaries and tuples of such, and actions a vector of
    floats, each with a range.
    """
    from gymnasium.spaces import Box, Dict, Tuple, flatdim

    stack = [observations]
    while stack:
        space = stack.pop()
        if isinstance(space, Dict | Tuple):
            stack += space.values() if isinstance(space, Dict) else space
        elif not isinstance(space, Box) or len(space.shape) != 1 or space.dtype.kind not in "fiu":
            raise UsageError(f"{name} has observations in {space}; Offax handles vectors of numbers only")
    if not isinstance(actions, Box) or len(actions.shape) != 1 or actions.dtype.kind != "f":
        raise UsageError(f"{name} has actions in {actions}; Offax handles vectors of floats only")
    low, high = actions.low.astype(np.float64), actions.high.astype(np.float64)
    fit = (low >= -LARGEST_BOUND) & (low < high) & (high <= LARGEST_BOUND)
    if not fit.all():
        found = f"dimension {fit.argmin()} of the actions is bounded by {low[~fit][0]:g} and {high[~fit][0]:g}"
        raise UsageError(f"{name}: {found}, no range to scale by; give the action space the range that actions have")
    return flatdim(observations), low.astype(np.float32), high.astype(np.float32)


def make_raw(spec: Any, **options: Any) -> "gym.Env":
    """`gymnasium.make(spec)`, with what benchmarks/families.py knows of it. UsageError if it cannot be made."""
    import gymnasium as gym

    families = optional("benchmarks.families")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of deprecated versions: the dataset decides the version
            made, known = families.ready(spec) if families else (spec, {})
            return gym.make(made, disable_env_checker=True, **known | options)
    except Exception as error:  # whatever an environment's constructor raises
        reason = one_line(error) + (families.advice(spec, error) if families else "")
        raise UsageError(f"cannot make environment {getattr(spec, 'id', spec)}: {reason}") from None


def make_environment(spec: Any, max_episode_steps: int = 0, **options: Any) -> "gym.Env":
    """The environment of a gymnasium id or EnvSpec, with flat observations and actions in [-1, 1].

    `max_episode_steps` of 0: its own limit, or LONGEST_EPISODE. `options` are gymnasium's, e.g. render_mode. UsageError
    if it is unknown, fails, or has other spaces than `action_bounds` takes.
    """
    from gymnasium import spaces, wrappers

    env = make_raw(spec, **options | ({"max_episode_steps": max_episode_steps} if max_episode_steps else {}))
    action_bounds(f"environment {getattr(spec, 'id', spec)}", env.observation_space, env.action_space)
    if env.spec is None or env.spec.max_episode_steps is None:
        env = wrappers.TimeLimit(env, LONGEST_EPISODE)
    env = env if isinstance(env.observation_space, spaces.Box) else wrappers.FlattenObservation(env)
    env, box = wrappers.TransformReward(env, scalar), env.action_space  # some give arrays of one number
    env = wrappers.TransformAction(env, lambda action: action.clip(box.low, box.high), box)  # rescaling rounds
    return wrappers.RescaleAction(env, box.dtype.type(-1.0), box.dtype.type(1.0))


def scalar(value: Any) -> float:
    """A number from a number or an array of one, as rewards and `info["success"]` come; NaN for None."""
    return float("nan") if value is None else float(np.asarray(value, np.float64).reshape(-1)[0])


def evaluation_seed(seed: int, episode: int) -> int:
    """Seed of an evaluation's episode for the member with `seed`; numpy takes 32 bits."""
    return (1_000_000 + 1000 * int(seed) + episode) % 2**32


def width_of(episodes: int, total: int) -> int:
    """How many of a member's episodes run side by side; `total` counts the members of all parts of --shard."""
    waves = -(-episodes // max(1, MAX_ENVIRONMENTS // total))
    return -(-episodes // waves)


class Returns(NamedTuple):
    """Of an evaluation's episodes, `[members, episodes]` each."""

    returns: np.ndarray  # undiscounted
    successes: np.ndarray  # 1 where `info["success"]` was true at some step, else 0; NaN where no episode has it


class Evaluator:
    """Runs whole episodes, at most MAX_ENVIRONMENTS at a time, or one for each member if there are more members."""

    def __init__(self, make: Maker, members: Members, transform: Transform) -> None:
        self.make, self.members, self.transform = make, members, transform
        self.environments = [make()]
        if families := optional("benchmarks.families"):  # training must not end in what the first reset shows
            families.try_out(self.environments[0])

    def run(self, act: Any, episodes: int, done: int = 0, stopping: Any = None, alive: Any = None) -> Returns | None:
        """Play `episodes` episodes per member, the i-th seeded by `evaluation_seed`; None once `stopping()` is true.

        `act(observations [padded, width, obs_dim], keys [padded])` gives actions `[padded, width, action_dim]` in
        [-1, 1]; the keys change with the time step, and with `done`, the steps of training so far.
        Members that are not `alive [padded]` play none, and have returns of 0.
        """
        width, members = width_of(episodes, self.members.total), self.members.count
        returns, successes = np.zeros((members, episodes)), np.full((members, episodes), np.nan)
        self.environments += [self.make() for _ in range(members * width - len(self.environments))]
        observations = np.zeros((len(self.members.seeds), width, len(self.transform.observation_mean)), np.float32)
        for wave, first in enumerate(range(0, episodes, width)):
            places, step = np.ndindex(members, min(width, episodes - first)), 0
            running = [(m, j) for m, j in places if alive is None or alive[m]]
            for m, j in running:
                seed = evaluation_seed(self.members.seeds[m], first + j)
                observations[m, j], _ = self.environments[m * width + j].reset(seed=seed)
            while running:
                if stopping and stopping():
                    return None
                keys = evaluation_keys(self.members.seeds, done, (wave * 1_000_000 + step) % 2**31)
                actions = np.asarray(act(self.transform.observations(observations), keys), np.float32)
                going, step = [], step + 1
                for m, j in running:
                    env, i = self.environments[m * width + j], first + j
                    observations[m, j], reward, terminated, truncated, info = env.step(actions[m, j])
                    returns[m, i] += reward
                    successes[m, i] = np.fmax(successes[m, i], scalar(info.get("success")))
                    if not (terminated or truncated):
                        going.append((m, j))
                running = going
        return Returns(returns, np.fmax(successes, 0.0) if np.isfinite(successes).any() else successes)


class Collector:
    """Steps `per_member` environments of each member, at `observations [padded, per_member, obs_dim]`.

    At a time limit only the truncation flag is set, so that the target still bootstraps. When a run is resumed after
    `done` steps, the environments start anew, with other seeds.
    """

    def __init__(self, make: Maker, members: Members, transform: Transform, per_member: int = 1, done: int = 0) -> None:
        self.transform, self.per_member = transform, per_member
        self.padded = np.minimum(np.arange(len(members.seeds)), members.count - 1)
        seeds = members.seeds[: members.count].tolist()
        starts = [int(word) for s in seeds for word in np.random.SeedSequence([s, done]).generate_state(per_member)]
        self.environments = [make() for _ in starts]
        first = [env.reset(seed=start)[0] for env, start in zip(self.environments, starts, strict=True)]
        self.observations = self._by_member(transform.observations(np.array(first)))

    def _by_member(self, x: np.ndarray) -> np.ndarray:  # [members * per_member, ...] to [padded, per_member, ...]
        return x.reshape(-1, self.per_member, *x.shape[1:])[self.padded]

    def step(self, actions: jax.Array) -> Transitions:
        """Transformed transitions `[padded, per_member, ...]`, with the true next observation, of `actions` likewise.

        Actions beyond their bounds are clipped for the environment alone; those that are not finite are 0.
        """
        actions = np.where(np.isfinite(actions), actions, 0.0).astype(np.float32)  # `keep_finite` finds who diverged
        own = np.clip(actions[: self.padded[-1] + 1].reshape(-1, actions.shape[-1]), -1.0, 1.0)
        steps, after = [], []
        for env, action in zip(self.environments, own, strict=True):
            following, reward, terminated, truncated, _ = env.step(action)
            flags = (np.float32(terminated), np.float32(truncated and not terminated))
            steps.append((reward, np.array(following), *flags))  # a copy, as the environment may write to it again
            after.append(np.array(env.reset()[0] if terminated or truncated else following))
        rewards, following, *flags = map(np.array, zip(*steps, strict=True))
        columns = (self.transform.rewards(rewards), self.transform.observations(following), *flags)
        transitions = Transitions(self.observations, actions, *map(self._by_member, columns))
        self.observations = self._by_member(self.transform.observations(np.array(after)))
        return transitions
