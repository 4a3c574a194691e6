"""OGBench's single tasks: its files, its environments, and data made on this machine by its own scripted experts.

    python algorithms/iql.py --dataset cube-single-play-singletask-v0           # the published file, the default task
    python algorithms/iql.py --dataset ogbench/cube-single-play-local-v0        # made here, in minutes, on first use
    python algorithms/iql.py --dataset path/to/cube-single-play-v0.npz --env cube-single-singletask-task3-v0
    python -m benchmarks.datasets                                               # list what can be made here, too
    python -m benchmarks.datasets build ogbench/scene-play-local-1m-v0          # make it ahead of its first use

`-task1` to `-task5` before `-v0` chooses another task than the default one, also in `ogbench/...` ids. A file is the
same for all tasks: it has no rewards. They are those of the task in the current state, as the environment gives them:
minus the number of subgoals that are not met (a maze has one). A state that meets them all is terminal; the ends of
recorded trajectories are truncations. The score is the share of episodes with success, 0 to 100.

`ogbench/...` sets follow the settings of the published files but are other draws, by the versions of MuJoCo and OGBench
here, and smaller: compare scores among themselves only. Every episode has a seed of its own, so a build that was
stopped goes on where it was, to the same arrays.
"""

import copy
import hashlib
import importlib
import importlib.metadata
import json
import os
import re
import shutil
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np

from benchmarks.families import quiet_mujoco
from benchmarks.offax_sets import NETWORK_SECONDS, ensure_built, progress_bar, put
from common.cli import UsageError, one_line
from common.data import Dataset, check
from common.environments import action_bounds, make_raw
from common.report import read_npz, write_atomically

KINDS = "navigate|stitch|explore|play|noisy"
NAME = re.compile(rf"(?P<world>[\w-]+)-(?P<kind>{KINDS})-singletask(?P<task>-task[1-5])?-v0")
LOCAL = re.compile(rf"ogbench/(?P<world>[\w-]+)-(?P<kind>{KINDS})-local(?P<size>-1m)?(?P<task>-task[1-5])?-v0")
ENVIRONMENT = re.compile(r"(?!visual-)[\w-]+-singletask(-task[1-5])?-v0")
FILE = re.compile(rf"(?P<world>[\w-]+)-({KINDS})-[\w-]*v0(-val)?\.npz")
ORACLES = {"cube-single": ("cube",), "scene": ("cube", "button", "drawer", "window"), "puzzle-3x3": ("button",)}
MAZES = ("pointmaze-medium", "pointmaze-large", "pointmaze-giant", "pointmaze-teleport")
LENGTHS = {"pointmaze-giant": 2000}
LENGTH = 1000
"""Transitions in a trajectory of the published files, where `LENGTHS` has no other number."""
RANDOM_ACTIONS = {"cube-single": 0.1, "scene": 0.1, "puzzle-3x3": 0.2}
"""Share of uniform actions in `noisy` data."""
SIZES = {None: 200_000, "-1m": 1_000_000}
FOLDER = "~/.ogbench/data"
SOLVERS: dict[type, Any] = {}
"""The arm's inverse kinematics, which keeps nothing between calls and large meshes: one serves all environments."""
SEED = 20_250
FORMAT = 1  # raise it when collection changes: sets made by an older one are then made again


# Names


def ids() -> list[str]:
    """The ids of the sets that can be made here, of the default tasks and the smaller size."""
    sets = [(world, kind) for world in ORACLES for kind in ("play", "noisy")] + [(world, "navigate") for world in MAZES]
    return [f"ogbench/{world}-{kind}-local-v0" for world, kind in sets]


def recognises(id_or_path: str) -> bool:
    """Whether it is a name of OGBench's single tasks, one of the sets made here, or a file in OGBench's layout."""
    if id_or_path.lower().endswith(".npz"):
        try:
            with np.load(os.path.expanduser(id_or_path), allow_pickle=False) as file:
                return {"qpos", "terminals"} <= set(file.files) and "rewards" not in file.files
        except Exception:  # a missing or damaged file: whoever reads it says what is wrong
            return False
    return id_or_path.startswith("ogbench/") or NAME.fullmatch(id_or_path) is not None


def _package() -> ModuleType:
    """`ogbench`, whose import registers its environments; UsageError where it is not installed."""
    try:
        quiet_mujoco()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a missing display
            return importlib.import_module("ogbench")
    except ModuleNotFoundError as error:
        what = f'{one_line(error)}: OGBench\'s data need its package, pip install -e ".[ogbench]"'
        raise UsageError(what) from None


# Environments


@contextmanager
def drawing_from(generator: np.random.RandomState) -> Iterator[None]:
    """Let numpy's global functions, by which OGBench draws, draw from `generator`, and leave their own state alone."""
    before = np.random.get_state()
    np.random.set_state(generator.get_state())
    try:
        yield
    finally:
        generator.set_state(np.random.get_state())
        np.random.set_state(before)


class Seeded(gym.Wrapper):
    """An environment in which the seed of `reset` decides everything: OGBench's mazes draw from numpy's globals."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.generator = np.random.RandomState()
        self.action_space, self.observation_space = env.action_space, env.observation_space  # made anew at each look

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        if seed is not None:
            self.generator.seed(seed)
        with drawing_from(self.generator), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the bounds' precision
            return self.env.reset(seed=seed, options=options)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        with drawing_from(self.generator):
            return self.env.step(action)


def make(original: str, continuing_task: bool = False, **options: Any) -> gym.Env:
    """The environment that the package's entry point `original` makes, seeded, and light if it is not to be drawn.

    `continuing_task` is for other packages' AntMaze: a task of OGBench ends at its goal.
    """
    env = gym.envs.registration.load_env_creator(original)(**options)
    if hasattr(env, "modify_mjcf_model") and not options.get("render_mode"):
        env.modify_mjcf_model = without_looks
        env.reset()  # builds the model
        del env.modify_mjcf_model
        env._ik = SOLVERS.setdefault(type(env._ik), env._ik)
    return Seeded(env)


def without_looks(model: Any) -> Any:
    """The robot without its visual meshes, two thirds of the memory of an environment; its bodies state their mass."""

    def name(element: Any) -> str:
        return str(getattr(element, "full_identifier", element))

    for geom in model.find_all("geom"):
        if name(geom.dclass).rpartition("/")[2] == "visual" and geom.parent.inertial is not None:
            geom.remove()
    used = {name(geom.mesh) for geom in model.find_all("geom")}
    for mesh in model.find_all("mesh"):
        if name(mesh) not in used:
            mesh.remove()
    return model


def environment(name: str) -> gym.envs.registration.EnvSpec:
    """What `gymnasium.make` makes the single-task environment `name` of, with the package's settings and time limit.

    UsageError if there is no such environment, or it is none of a single task, or shows images.
    """
    _package()
    name = name.rpartition(":")[2]
    if not ENVIRONMENT.fullmatch(name) or name not in gym.registry:
        what = "environments with a task and without images, as cube-single-singletask-task3-v0 is"
        raise UsageError(f"{name} is none of OGBench's {what}")
    spec = copy.deepcopy(gym.spec(name))
    spec.kwargs["original"], spec.entry_point = spec.entry_point, "benchmarks.ogbench_sets:make"
    return spec


# Reading


class Goal(NamedTuple):
    """The subgoals of a task.

    `places`: columns of qpos, where they should be, and within which distance; `buttons [n]`: their states, or None.
    """

    places: list[tuple[slice, Any, float]]
    buttons: np.ndarray | None = None


def goal_of(env: gym.Env) -> Goal:
    """The subgoals of the task in the environment, which is reset for it."""
    env.reset()
    world = env.unwrapped
    if hasattr(world, "cur_goal_xy"):  # the agent's place, or the ball's, which comes after the ant's 15 numbers
        start = 15 if hasattr(world, "get_agent_ball_xy") else 0
        return Goal([(slice(start, start + 2), world.cur_goal_xy, world._goal_tol)])
    cubes, buttons = getattr(world, "_num_cubes", 0), getattr(world, "_num_buttons", 0)
    starts = 14 + 7 * np.arange(cubes)  # after the arm's 14 numbers: a cube's position and quaternion
    places = [(slice(i, i + 3), world._data.mocap_pos[n].copy(), 0.04) for n, i in enumerate(starts)]
    if hasattr(world, "_target_drawer_pos"):
        slide = 14 + 7 * cubes + buttons
        places += [(slice(slide, slide + 1), world._target_drawer_pos, 0.04)]
        places += [(slice(slide + 1, slide + 2), world._target_window_pos, 0.04)]
    return Goal(places, world._target_button_states.copy() if buttons else None)


def relabel(goal: Goal, qpos: np.ndarray, buttons: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Rewards and terminations `[rows]` of states `qpos [rows, nq]` with `buttons [rows, n]`.

    The reward is minus the number of subgoals that the state misses; it is terminal if it misses none.
    """
    met = [np.linalg.norm(qpos[:, at] - where, axis=-1) <= tolerance for at, where, tolerance in goal.places]
    met += [] if goal.buttons is None else list((buttons == goal.buttons).T)
    rewards = np.sum(met, axis=0) - len(met)
    return rewards.astype(np.float32), rewards == 0


def transitions(name: str, arrays: Mapping[str, np.ndarray], goal: Goal) -> dict[str, np.ndarray]:
    """The arrays of `Transitions` from those of a file, whose trajectories store their last state, and no successor.

    A row with `terminals` is such a last state: it is dropped, and the row before ends the trajectory.
    """
    needed = ["observations", "actions", "terminals", "qpos", *(["button_states"] if goal.buttons is not None else [])]
    if missing := [key for key in needed if key not in arrays]:
        raise UsageError(f"{name} has no array {missing[0]}; it has {', '.join(arrays)}")
    last = arrays["terminals"].astype(bool).reshape(-1)
    if odd := [key for key in needed if arrays[key].shape[:1] != last.shape]:
        raise UsageError(f"{name}: {odd[0]} has the shape {list(arrays[odd[0]].shape)}, terminals {len(last)} rows")
    if not last[-1:].all() or last.all():
        raise UsageError(f"{name}: terminals must mark the last of several states of each trajectory, and the last row")
    width = max((at.stop for at, _, _ in goal.places), default=0)
    if arrays["qpos"].ndim != 2 or arrays["qpos"].shape[1] < width:
        raise UsageError(f"{name} has {arrays['qpos'].shape[-1]} columns of qpos; the task looks at {width}")
    if goal.buttons is not None and arrays["button_states"].shape[1:] != goal.buttons.shape:
        there = list(arrays["button_states"].shape[1:])
        raise UsageError(f"{name} has {there} buttons; the task looks at {list(goal.buttons.shape)}")
    rows = np.flatnonzero(~last)
    buttons = None if goal.buttons is None else arrays["button_states"][rows]
    rewards, terminations = relabel(goal, arrays["qpos"][rows], buttons)
    return {
        "observations": arrays["observations"][rows],
        "actions": arrays["actions"][rows],
        "rewards": rewards,
        "next_observations": arrays["observations"][rows + 1],
        "terminations": terminations,
        "truncations": last[rows + 1] & ~terminations,
    }


def load(id_or_path: str, env: str | None = None) -> Dataset:
    """The transitions of a file under the rewards of a task, to be evaluated in it.

    The task is that of the environment `env`, or else the one that the id names, or of a file the default one of the
    environment that its name begins with. A local set is made and a published file downloaded where it is missing.
    """
    path, spec = locate(id_or_path, env)
    made = make_raw(spec)
    try:
        obs_dim, low, high = action_bounds(f"environment {spec.id}", made.observation_space, made.action_space)
        arrays = transitions(id_or_path, read_npz(str(path)), goal_of(made))
    finally:
        made.close()
    found = check(id_or_path, arrays, low, high)
    if found.observations.shape[1] != obs_dim:
        raise UsageError(f"{id_or_path} has {found.observations.shape[1]} observations, {spec.id} has {obs_dim}")
    return Dataset(id_or_path, found, spec, low, high)


def locate(id_or_path: str, env: str | None) -> tuple[Path, gym.envs.registration.EnvSpec]:
    """The file of an id, made or downloaded if it is missing, or of a path, and the environment of its task."""
    path = Path(os.path.expanduser(id_or_path))
    if path.suffix.lower() == ".npz":
        match = FILE.fullmatch(path.name)
        if not match and not env:
            raise UsageError(f"{path} does not name its environment; pass --env, as cube-single-singletask-task3-v0")
        return path, environment(env or f"{match['world']}-singletask-v0")
    if match := NAME.fullmatch(id_or_path):
        spec = environment(env or f"{match['world']}-singletask{match['task'] or ''}-v0")
        return download(f"{match['world']}-{match['kind']}"), spec
    if match := LOCAL.fullmatch(id_or_path):
        return ensure(id_or_path), environment(env or f"{match['world']}-singletask{match['task'] or ''}-v0")
    raise UsageError(f"there is no dataset {id_or_path}; those that are made here are {', '.join(ids())}")


def download(name: str) -> Path:
    """The published file of e.g. `cube-single-play`, in the package's folder; UsageError if it cannot be had."""
    folder = Path(os.path.expanduser(FOLDER))
    path, partial = folder / f"{name}-v0.npz", folder / f"{name}-v0.npz.{os.getpid()}.tmp"
    if path.exists():
        return path
    url = f"{_package().utils.DATASET_URL}/{path.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        urllib.request.urlopen(url, timeout=NETWORK_SECONDS).close()  # a pause in the file itself may be longer
        with urllib.request.urlopen(url, timeout=60) as answer, open(partial, "wb") as file:
            if (size := int(answer.headers.get("Content-Length", 0))) == 0:
                raise OSError("the server does not say how many bytes it sends")
            progress = progress_bar(f"downloading {path.name}", size)
            while block := answer.read(2**20):
                progress(file.write(block))
            if file.tell() != size:
                raise OSError(f"the server sent {file.tell()} of {size} bytes")
        os.replace(partial, path)
    except OSError as error:
        ours = f"ogbench/{name}-local-v0"
        instead = f"--dataset {ours} is made on this machine instead" if ours in ids() else f"put it in {folder}"
        raise UsageError(f"{path} is not there and cannot be downloaded ({one_line(error)}); {instead}") from None
    finally:
        partial.unlink(missing_ok=True)
    return path


# Collecting

Rows = dict[str, np.ndarray]
"""The arrays of a trajectory as OGBench's files have them: one row more than it has transitions."""


def expert(world: str, kind: str, env: gym.Env) -> Callable[[int], Rows | None]:
    """A function of a seed that records one trajectory in `env`, or gives None where it is not fit to be kept."""
    if world in MAZES:
        return lambda seed: _navigate(env, seed)
    style = "plan" if kind == "play" else "markov"
    settings: dict[str, Any] = {"noise": 0.1, "noise_smoothing": 0.5} if kind == "play" else {"min_norm": 0.4}
    settings |= {"gripper_always_closed": True} if world.startswith("puzzle") else {}
    oracles = {}
    for part in ORACLES[world]:
        module = importlib.import_module(f"ogbench.manipspace.oracles.{style}.{part}_{style}")
        oracles[part] = getattr(module, f"{part}_{style}_oracle".title().replace("_", ""))(env=env, **settings)
    uniform = RANDOM_ACTIONS[world] if kind == "noisy" else 0.0
    return lambda seed: _manipulate(env, oracles, kind == "noisy", uniform, seed)


def _manipulate(env: gym.Env, oracles: dict[str, Any], noisy: bool, uniform: float, seed: int) -> Rows | None:
    """An oracle pursues one random target after the other; `noisy` ones react to the state and act with noise."""
    rng, rows, ended = np.random.default_rng(seed), [], False
    observation, info = env.reset(seed=seed)
    spread = rng.uniform(0.0, 0.1) * np.array([1.0, 1.0, 1.0, 3.0, 10.0]) if noisy else None
    oracle = oracles[info["privileged/target_task"]]
    oracle.reset(observation, info)
    while not ended:
        if rng.random() < uniform:
            action = rng.uniform(-1.0, 1.0, 5)
        else:
            action = np.array(oracle.select_action(observation, info))
            action = action if spread is None else rng.normal(action, spread)
        action = np.clip(action, -1.0, 1.0)
        following, _, _, ended, info = env.step(action)
        rows.append(_row(observation, action, ended, info))
        observation = following
        if oracle.done:
            start, info = env.unwrapped.set_new_target(p_stack=0.5)
            oracle = oracles[info["privileged/target_task"]]
            oracle.reset(start, info)
    found = _stacked(rows)
    return found if "drawer" not in oracles or visible(found["qpos"][:, 14:17]) else None


def visible(cube: np.ndarray) -> bool:
    """Whether the scene's cube, `[rows, 3]`, stays on the table or in the drawer, as in the published data."""
    _, y, z = cube.T
    return bool(np.all((y < 0.29) & ((y > -0.3) | ((z >= 0.06) & (z <= 0.08)))))


def _navigate(env: gym.Env, seed: int) -> Rows:
    """The point goes to one random goal after the other, along the shortest way and with noise."""
    rng, rows, ended, world = np.random.default_rng(seed), [], False, env.unwrapped
    free = np.argwhere(world.maze_map == 0)
    walls = [world.maze_map[tuple((free + step).T)] for step in ((-1, 0), (1, 0), (0, -1), (0, 1))]
    up, down, left, right = (wall.astype(bool) for wall in walls)
    corridor = (~up & ~down & left & right) | (up & down & ~left & ~right)  # never a goal
    goals = free[~corridor]
    task = {"init_ij": tuple(rng.choice(free)), "goal_ij": tuple(rng.choice(goals))}
    observation, _ = env.reset(seed=seed, options={"task_info": task})
    while not ended:
        towards = world.get_oracle_subgoal(world.get_xy(), world.cur_goal_xy)[0] - world.get_xy()
        direction = towards / (np.linalg.norm(towards) + 1e-6)
        action = np.clip(rng.normal(direction, 0.5), -1.0, 1.0)
        following, _, _, ended, info = env.step(action)
        rows.append(_row(observation, action, ended, info))
        observation = following
        if info["success"]:
            world.set_goal(tuple(rng.choice(goals)))
    return _stacked(rows)


def _row(observation: np.ndarray, action: np.ndarray, ended: bool, info: dict[str, Any]) -> dict[str, Any]:
    row = {"observations": observation, "actions": action, "terminals": ended}
    state = {name: info[f"prev_{name}"] for name in ("qpos", "qvel", "button_states") if f"prev_{name}" in info}
    return row | state


def _stacked(rows: Sequence[dict[str, Any]]) -> Rows:
    types = {"terminals": bool, "button_states": np.int64}
    return {name: np.array([row[name] for row in rows], types.get(name, np.float32)) for name in rows[0]}


# Building


def _recipe(dataset_id: str) -> dict[str, Any]:
    """Everything that decides the arrays, for the manifest; a set with another recipe is stale."""
    match = LOCAL.fullmatch(dataset_id)
    if not match or f"ogbench/{match['world']}-{match['kind']}-local-v0" not in ids():
        raise UsageError(f"{dataset_id} cannot be made here; those that can are {', '.join(ids())}")
    world, length = match["world"], LENGTHS.get(match["world"], LENGTH)
    recipe = {"format": FORMAT, "seed": SEED, "world": world, "kind": match["kind"], "transitions": length}
    return recipe | {"trajectories": SIZES[match["size"]] // length}


def ensure(dataset_id: str) -> Path:
    """The file of the set `dataset_id`, of whichever task, in a folder beside Minari's sets; made if it is missing.

    Of several processes one collects and the others wait. UsageError if it cannot be made or written.
    """
    folder = ensure_built(re.sub("-task[1-5]", "", dataset_id), _recipe(dataset_id), _build)
    return folder / f"{folder.name}.npz"


def _build(name: str, recipe: dict[str, Any], building: Path, folder: Path) -> None:
    """Collect what `building` does not have yet, one file a trajectory, and make `folder` of it."""
    _package()
    versions = {package: importlib.metadata.version(package) for package in ("ogbench", "mujoco", "numpy", "scipy")}
    made_by, note = json.dumps({"recipe": recipe, "versions": versions}), building / "made_by.json"
    if not note.exists() or note.read_text() != made_by:  # left by a build with other settings or versions
        if building.exists():
            shutil.rmtree(building)
        building.mkdir()
        note.write_text(made_by)
    parts = [building / f"{i:04}.npz" for i in range(recipe["trajectories"])]
    progress = progress_bar(f"collecting {name}", len(parts))
    progress(sum(part.exists() for part in parts))
    quiet_mujoco()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mode = {} if recipe["world"] in MAZES else {"mode": "data_collection"}
        limit = recipe["transitions"] + 1
        env = gym.make(f"{recipe['world']}-v0", terminate_at_goal=False, max_episode_steps=limit, **mode)
        record = expert(recipe["world"], recipe["kind"], env)
        for i, part in enumerate(parts):
            if not part.exists():
                save(part, _trajectory(record, name, i))
                progress(1)
        env.close()
    trajectories = [read_npz(str(part)) for part in parts]
    arrays = {key: np.concatenate([one[key] for one in trajectories]) for key in trajectories[0]}
    done = building / "done"
    shutil.rmtree(done, ignore_errors=True)
    done.mkdir()
    save(done / f"{folder.name}.npz", arrays)
    sums = {key: hashlib.sha256(array.tobytes()).hexdigest() for key, array in arrays.items()}
    manifest = {"id": name, "recipe": recipe, "versions": versions, "sha256": sums, "rows": len(arrays["terminals"])}
    (done / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    put(done, folder, building)
    shutil.rmtree(building)


def _trajectory(record: Callable[[int], Rows | None], name: str, index: int) -> Rows:
    """Trajectory `index` of the set: the first one fit to be kept; its seeds depend on nothing else."""
    words = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    for attempt in range(1000):
        seed = int(np.random.SeedSequence([SEED, words, index, attempt]).generate_state(1)[0])
        with drawing_from(np.random.RandomState(seed)):
            if (found := record(seed)) is not None:
                return found
    raise UsageError(f"{name}: no trajectory of 1,000 kept the cube in reach; is this another version of OGBench?")


def save(path: Path, arrays: Rows) -> None:
    """Write the arrays, compressed, whole or not at all."""
    write_atomically(path, lambda file: np.savez_compressed(file, **arrays))
