"""What is known of families of environments by their names: scores, how D4RL's tasks end, what making them needs.

Runs have scores, and their environments these settings, where this module is there; a copied algorithm has returns.
"""

import contextlib
import importlib
import io
import re
import sys
from typing import Any

import numpy as np

from common.cli import UsageError, env_name, one_line
from common.replay import Recorded, episode_returns

# Returns of a random and of an expert policy, from D4RL's `infos.py`; the same for its versions 0 to 2.
REFERENCE_RETURNS = {
    "halfcheetah": (-280.178953, 12135.0),
    "hopper": (-20.272305, 3234.3),
    "walker2d": (1.629008, 4592.3),
    "ant": (-325.6, 3879.7),
    "antmaze": (0.0, 1.0),
    "kitchen": (0.0, 4.0),
    "pen": (96.262799, 3076.8331017826877),
    "door": (-56.512833, 2880.5693087298737),
    "hammer": (-274.856578, 12794.134825156867),
    "relocate": (-6.425911, 4233.877797728884),
}
# Options with which episodes end as those of D4RL's reference returns do. AntMaze ends at the goal, Kitchen after its
# last task: by default, or as Minari's sets have them, they go on and reward the goal or a finished task at every step.
# `max_episode_steps` is D4RL's limit, where the id or Minari's set has another one.
D4RL_TASKS: dict[str, dict[str, Any]] = {
    "antmaze": {"continuing_task": False},
    "frankakitchen": {
        "remove_task_when_completed": True,
        "terminate_on_tasks_completed": True,
        "max_episode_steps": 280,
    },
    "adroithandpen": {"max_episode_steps": 100},
    "adroithanddoor": {"max_episode_steps": 200},
    "adroithandhammer": {"max_episode_steps": 200},
    "adroithandrelocate": {"max_episode_steps": 200},
}


def wrappers_of(spec: Any) -> tuple[Any, ...]:
    """The wrappers that an EnvSpec adds to what its id makes; none for an id."""
    return tuple(getattr(spec, "additional_wrappers", None) or ())


def known_name(spec: Any) -> str:
    """`env_name` of an id or EnvSpec; empty for one of another module or namespace, whatever it is called."""
    found = str(getattr(spec, "id", spec) or "")
    return "" if re.match(r"(?!gymnasium|ogbench:)[^:]*:|.*/", found) else env_name(found)


def domain_of(spec: Any) -> str | None:
    """Family of scores of an id or EnvSpec: that of D4RL's reference returns, or `success` for OGBench's single tasks.

    None for sparse Adroit, dense AntMaze, a Kitchen without D4RL's four tasks and an environment in a wrapper for
    rewards, by its name: their rewards differ from D4RL's. None too for one of a module or namespace of its own.
    """
    families, name = r"(halfcheetah|hopper|walker2d|ant)|(antmaze)_(?!.*dense).*|franka(kitchen)", known_name(spec)
    if "-singletask" in name:
        return "success"
    match = re.fullmatch(rf"{families}|adroithand(pen|door|hammer|relocate)", name)
    if match is None or (match[3] and len(getattr(spec, "kwargs", {}).get("tasks_to_complete", ())) != 4):
        return None
    if any("reward" in wrapper.name.lower() for wrapper in wrappers_of(spec)):
        return None
    return match[match.lastindex]


def normalized_score(domain: str | None, returns: np.ndarray, successes: np.ndarray | None = None) -> np.ndarray | None:
    """100 (R - random) / (expert - random), float64 of the shape of `returns`; None where D4RL published none.

    On AntMaze, where D4RL's episodes end at the goal, whoever reaches it has 100, however long the reward goes on.
    Where success is the score, as on OGBench, 100 for an episode with success, and None without `successes`.
    """
    if domain == "success" and successes is not None:
        return 100.0 * np.asarray(successes, np.float64)
    if domain not in REFERENCE_RETURNS:
        return None
    low, high = REFERENCE_RETURNS[domain]
    return 100.0 * (np.minimum(returns, 1.0 if domain == "antmaze" else np.inf, dtype=np.float64) - low) / (high - low)


def trajectories(transitions: Recorded) -> tuple[np.ndarray, np.ndarray]:
    """Return of each recorded trajectory, and 1 for one with a terminal step, else 0, both float64 `[trajectories]`.

    A trajectory ends where the next row's state is not the one that this row led to; a terminal step does not end it.
    """
    ends = transitions.successors >= len(transitions.rewards)
    starts = np.flatnonzero(np.append(True, ends)[:-1])
    rewards, terminations = (np.asarray(x, np.float64) for x in (transitions.rewards, transitions.terminations))
    return np.add.reduceat(rewards, starts), np.maximum.reduceat(terminations, starts)


def returns_of_data(spec: Any, transitions: Recorded) -> dict[str, Any]:
    """What config.json says of the returns of a dataset's own episodes, and of their score in the environment."""
    domain, successes = domain_of(spec), None
    if domain == "success":  # data of such tasks go on after the goal
        returns, successes = trajectories(transitions)
    else:
        returns = episode_returns(transitions)
    summary: dict[str, Any] = {"episodes": len(returns)}
    if len(returns):
        scores = normalized_score(domain, returns, successes)
        summary |= {name: float(getattr(returns, name)()) for name in ("mean", "min", "max")}
        kitchen = domain == "kitchen"  # its data reward a finished task again at every step: no D4RL score
        summary["score_mean"] = None if scores is None or kitchen else float(scores.mean())
    return summary


def quiet_mujoco() -> None:
    """Keep MuJoCo from warning of deprecated model files, on stderr and in MUJOCO_LOG.TXT: nothing a user can mend."""
    with contextlib.suppress(ImportError):
        import mujoco

        mujoco.set_mju_user_warning(lambda text: None if "deprecated" in text else print(text, file=sys.stderr))


def ready(spec: Any) -> tuple[Any, dict[str, Any]]:
    """What `gymnasium.make` is to be given for an id or EnvSpec, and options; readies MuJoCo and the id's package."""
    import gymnasium as gym

    quiet_mujoco()
    if isinstance(spec, str) and domain_of(spec) == "success":
        from benchmarks import ogbench_sets

        return ogbench_sets.environment(spec), {}
    if isinstance(spec, str) and ":" not in spec and spec not in gym.registry:  # module:Name registers its own
        with contextlib.suppress(ImportError), contextlib.redirect_stderr(io.StringIO()):
            gym.register_envs(importlib.import_module("gymnasium_robotics"))
    return spec, D4RL_TASKS.get(known_name(spec).partition("_")[0], {})


def advice(spec: Any, error: Exception) -> str:
    """What to do where making the environment failed so, as the end of a sentence, or nothing."""
    import gymnasium as gym

    name = getattr(spec, "id", spec)
    if isinstance(error, ModuleNotFoundError):
        return "; install what is missing, or put its folder on PYTHONPATH"
    if isinstance(error, gym.error.NameNotFound | gym.error.NamespaceNotFound):
        return f' Is its package installed (of gymnasium-robotics: ".[adroit]")? Of a module of yours: module:{name}'
    if isinstance(error, AssertionError) and env_name(name).startswith(("frankakitchen", "fetch", "hand")):
        return '; gymnasium-robotics 1.4 loads it with an older MuJoCo only: pip install "mujoco<3.10"'
    return ""


def try_out(env: Any) -> None:
    """One reset and one step of a made environment; UsageError if they fail or break gymnasium's API."""
    name, shapes = getattr(env.spec, "id", env), []
    try:
        observation, info = env.reset(seed=0)
        info.get("success")
        shapes.append(np.shape(observation))
        following, reward, terminated, truncated, info = env.step(np.zeros(env.action_space.shape, np.float32))
        shapes.append(np.shape(following))
        float(reward), bool(terminated), bool(truncated), info.get("success")
    except Exception as error:  # whatever an environment raises
        what = f"{'step' if shapes else 'reset'} fails ({type(error).__name__}: {one_line(error)})"
        raise UsageError(f"environment {name}: its {what}; see the API of gymnasium.Env") from None
    if unlike := [shape for shape in shapes if shape != env.observation_space.shape]:
        raise UsageError(f"environment {name}: observations are {unlike[0]}, not {env.observation_space.shape}")
