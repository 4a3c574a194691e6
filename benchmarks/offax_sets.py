"""The `offax/<env>/<quality>-v1` datasets: collected from MuJoCo on first use, by the policies beside this file.

The policies are those of `behavior_policies_v1/`: other ones will be another version.
`offax/<env>/<quality>-1m-v1` has a million transitions; of each policy's, the set without `-1m` has the first fifth.

A set is the same arrays every time on one machine: every episode has its own seed, and actions are computed in double
precision and rounded to a grid, so that neither the number of environments stepped together nor the number of processes
or BLAS threads changes a bit of them. It is written by Minari's own functions into Minari's own directory, with a
`manifest.json` beside the data: seed, package versions, hash of the policies, sha256 of each array, statistics.

A set is built in a hidden directory beside its own, under a lock, and renamed, so a reader finds a whole set or none.
"""

import errno
import hashlib
import importlib.metadata
import json
import math
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import cache, partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.families import REFERENCE_RETURNS, quiet_mujoco
from common.cli import UsageError
from common.members import usable_cores
from common.report import NO_LOCKS

ENVS = {"hopper": "Hopper-v5", "halfcheetah": "HalfCheetah-v5", "walker2d": "Walker2d-v5", "ant": "Ant-v5"}
QUALITIES = ("random", "medium", "mixed", "medium-expert", "expert")
SIZES = {"": 200_000, "-1m": 1_000_000}
SEED = 20_251
ID = re.compile(r"offax/(?P<env>\w+)/(?P<quality>[a-z-]+?)(?P<size>-1m)?-v1")
FOLDER = Path(__file__).parent
NETWORK_SECONDS = 3.0
FORMAT = 1  # raise it when collection changes: sets made by an older one are then rebuilt
NUM_ENVS = 16
ACTION_GRID = 2.0**16
BLOCK = 4
LOG_STD_RANGE = (-5.0, 2.0)

MIN_SHARE = 20_000  # transitions that are worth a process of their own

Layers = list[tuple[np.ndarray, np.ndarray]]


class Name(NamedTuple):
    """What an id says."""

    env: str
    quality: str
    size: str


class Part(NamedTuple):
    """A stretch of a dataset made by one policy; `policy` None is uniform random actions."""

    policy: str | None
    transitions: int


class Episode(NamedTuple):
    """`observations [T + 1, obs_dim]` and `rewards [T]` float64, `actions [T, action_dim]` float32."""

    seed: int
    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminated: bool
    truncated: bool


def datasets_root() -> Path:
    """Minari's directory of datasets; it need not exist. UsageError where there is no home directory."""
    root = os.path.expanduser(os.environ.get("MINARI_DATASETS_PATH") or "~/.minari/datasets")
    if root.startswith("~"):
        raise UsageError("there is no home directory for datasets; set MINARI_DATASETS_PATH to a directory")
    return Path(root)


def policy_file(env: str) -> Path:
    """Where the policies behind the sets of this environment are."""
    return FOLDER / "behavior_policies_v1" / f"{env}.npz"


def ids() -> list[str]:
    """The ids of all sets, those of the default size first."""
    return [f"offax/{env}/{quality}{size}-v1" for size in SIZES for env in ENVS for quality in QUALITIES]


def parse(dataset_id: str) -> Name:
    """What the id says; UsageError that names the sets if there is no such set."""
    if dataset_id not in ids():
        raise UsageError(
            f"there is no dataset {dataset_id}: offax sets are offax/<env>/<quality>-v1 with <env> one of "
            f"{', '.join(ENVS)} and <quality> one of {', '.join(QUALITIES)}, or <quality>-1m, a million transitions"
        )
    match = ID.fullmatch(dataset_id)
    assert match is not None
    return Name(match["env"], match["quality"], match["size"] or "")


# Policies


def policy_names(env: str) -> list[str]:
    """The names of the shipped policies of `env`."""
    with np.load(policy_file(env), allow_pickle=False) as file:
        return sorted({key.split("/")[0] for key in file.files})


def read_policies(env: str, names: Iterable[str] | None = None) -> dict[str, Layers]:
    """The shipped policies of `env`, all or some, name -> `[(weights, biases), ...]` as stored (float16)."""
    wanted = policy_names(env) if names is None else names
    with np.load(policy_file(env), allow_pickle=False) as file:  # reads what is taken from it
        depth = {name: sum(key.startswith(f"{name}/w") for key in file.files) for name in wanted}
        return {name: [(file[f"{name}/w{i}"], file[f"{name}/b{i}"]) for i in range(depth[name])] for name in wanted}


def mean_action_return(dataset_id: str) -> float | None:
    """Return of the mean actions of the policies behind a set, mean of the policies; None where that is not known."""
    if dataset_id not in ids():
        return None
    name = parse(dataset_id)
    with np.load(policy_file(name.env), allow_pickle=False) as file:
        keys = [f"{part.policy}/mean_action" for part in parts_of(name, SIZES[name.size])]
        return float(np.mean([file[key] for key in keys])) if set(keys) <= set(file.files) else None


def policy_outputs(layers: Layers, observations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation before the tanh, `[batch, action_dim]` float64, of the ReLU network `layers`.

    Rows go through in blocks of 4: below that many multiplications OpenBLAS does not start its threads, which on a
    busy machine cost a hundred times the product itself.
    """
    batch = len(observations)
    x = np.zeros((-(-batch // BLOCK) * BLOCK, observations.shape[1]))
    x[:batch] = observations
    x = x.reshape(-1, BLOCK, x.shape[1])
    for i, (w, b) in enumerate(layers):
        x = x @ w + b
        if i < len(layers) - 1:
            x = np.maximum(x, 0.0)
    mean, log_std = np.split(x.reshape(-1, x.shape[-1])[:batch], 2, axis=1)
    return mean, np.exp(np.clip(log_std, *LOG_STD_RANGE))


def sample_actions(layers: Layers | None, observations: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Actions in [-1, 1], float32 `[batch, action_dim]`; `noise` is normal, or uniform in [-1, 1] without a policy.

    They are rounded to multiples of 2^-16: products of another batch size or thread count differ in the last bits,
    and a chaotic simulation would make other episodes of them.
    """
    if layers is not None:
        mean, std = policy_outputs(layers, observations)
        noise = np.tanh(mean + std * noise)
    return (np.rint(noise * ACTION_GRID) / ACTION_GRID).astype(np.float32)


# Collection


@cache
def _environment(env_id: str, index: int) -> Any:
    """The `index`-th of the environments that this process steps together."""
    import gymnasium as gym

    env = gym.make(env_id, disable_env_checker=True).unwrapped
    high = env.action_space.high
    assert np.array_equal(env.action_space.low, -high) and np.all(high == 1.0), "actions are stored unscaled"
    return env


class _Running:
    """An episode being collected in one environment."""

    def __init__(self, env: Any, seed: Sequence[int], limit: int, uniform: bool, scale: float) -> None:
        rng = np.random.default_rng(seed)
        self.env, self.seed, self.length, self.terminated = env, int(rng.integers(2**31)), 0, False
        shape = (limit, env.action_space.shape[0])
        self.noise = scale * (rng.uniform(-1.0, 1.0, shape) if uniform else rng.standard_normal(shape))
        self.observations = np.empty((limit + 1, env.observation_space.shape[0]))
        self.actions, self.rewards = np.empty(shape, np.float32), np.empty(limit)
        self.observations[0] = env.reset(seed=self.seed)[0]

    @property
    def ended(self) -> bool:
        return self.terminated or self.length == len(self.rewards)

    def step(self, action: np.ndarray) -> None:
        t, self.length = self.length, self.length + 1
        self.actions[t] = action
        self.observations[t + 1], self.rewards[t], self.terminated, _, _ = self.env.step(action)

    def episode(self) -> Episode:
        t = self.length
        return Episode(
            self.seed,
            self.observations[: t + 1].copy(),
            self.actions[:t].copy(),
            self.rewards[:t].copy(),
            bool(self.terminated),
            t == len(self.rewards),
        )


def run_episodes(
    env_id: str, layers: Layers | None, seed: Sequence[int], indices: Sequence[int], mean_action: bool = False
) -> list[Episode]:
    """Whole episodes of sampled actions, or of the mean one, stepped together.

    Episode i depends on `seed` and i only. Without a policy, actions are uniform.
    """
    import gymnasium as gym

    limit = gym.spec(env_id).max_episode_steps
    assert limit is not None
    scale = 0.0 if mean_action else 1.0  # of the noise
    started = [
        _Running(_environment(env_id, k), [*seed, i], limit, layers is None, scale) for k, i in enumerate(indices)
    ]
    running = started
    while running := [one for one in running if not one.ended]:
        observations = np.stack([one.observations[one.length] for one in running])
        noise = np.stack([one.noise[one.length] for one in running])
        for one, action in zip(running, sample_actions(layers, observations, noise), strict=True):
            one.step(action)
    return [one.episode() for one in started]


def collect(
    env_id: str,
    layers: Layers | None,
    transitions: int,
    seed: Sequence[int],
    num_envs: int = NUM_ENVS,
    progress: Callable[[int], None] = lambda steps: None,
    run: Callable[..., Iterable[list[Episode]]] = map,
) -> list[Episode]:
    """Whole episodes of sampled actions, `transitions` steps in all, the last one cut with a truncation.

    `run` maps a function over groups of `num_envs` episodes. `progress` is called with the number of steps just made.
    """
    import gymnasium as gym

    episodes: list[Episode] = []
    made, mean_length = 0, float(gym.spec(env_id).max_episode_steps or 1)
    while made < transitions:  # as many episodes as the count will need at the mean length so far
        first, last = len(episodes), len(episodes) + math.ceil((transitions - made) / mean_length)
        groups = [range(i, min(i + num_envs, last)) for i in range(first, last, num_envs)]
        for group in run(partial(run_episodes, env_id, layers, seed), groups):
            episodes += group
            steps = sum(len(episode.rewards) for episode in group)
            progress(steps)
            made += steps
        mean_length = made / len(episodes)
    while made - len(episodes[-1].rewards) >= transitions:
        made -= len(episodes.pop().rewards)
    episodes[-1] = _cut(episodes[-1], len(episodes[-1].rewards) - (made - transitions))
    return episodes


def _cut(episode: Episode, length: int) -> Episode:
    if len(episode.rewards) <= length:
        return episode
    return Episode(
        episode.seed,
        episode.observations[: length + 1],
        episode.actions[:length],
        episode.rewards[:length],
        terminated=False,
        truncated=True,
    )


# Processes


@contextmanager
def process_map(processes: int) -> Iterator[Callable[..., Iterable[Any]]]:
    """A `map` whose calls are made by new processes; one process is this one.

    The pools of multiprocessing would run the caller's script once more in each, or fork a process that has threads.
    """
    if processes < 2:
        yield map
        return
    idle: queue.SimpleQueue[Connection] = queue.SimpleQueue()

    def call(function: Callable[[Any], Any], task: Any) -> Any:
        connection = idle.get()
        try:
            connection.send((function, task))
            return connection.recv()
        except (EOFError, ConnectionError):
            raise UsageError("a process that was collecting has died; it may have run out of memory") from None
        finally:
            idle.put(connection)

    with ExitStack() as stack:
        for _ in range(processes):
            ours, theirs = Pipe()
            idle.put(stack.enter_context(ours))
            with theirs:
                code = f"from benchmarks.offax_sets import serve; serve({theirs.fileno()})"
                worker = subprocess.Popen(
                    [sys.executable, "-c", code], cwd=Path(__file__).parents[1], pass_fds=[theirs.fileno()]
                )
            stack.enter_context(worker)
            stack.callback(worker.kill)
        pool = ThreadPoolExecutor(processes)
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)
        yield lambda function, tasks: pool.map(partial(call, function), tasks)


def serve(descriptor: int) -> None:
    """What a process of `process_map` does: calls come and results go by the connection, until that is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other end is interrupted too, and ends this process
    quiet_mujoco()
    with Connection(descriptor) as connection, suppress(EOFError, ConnectionError):
        while True:
            function, task = connection.recv()
            connection.send(function(task))


# Datasets


def parts_of(name: Name, transitions: int) -> list[Part]:
    """Which policy makes how many of the transitions, in order."""
    if name.quality == "random":
        return [Part(None, transitions)]
    policies = policy_names(name.env)
    mixed = sorted((policy for policy in policies if policy.startswith("mixed_")), key=lambda policy: int(policy[6:]))
    makers = {
        "medium": mixed[-1:],  # the last of the mixed snapshots
        "mixed": mixed,
        "medium-expert": [*mixed[-1:], "expert"],
        "expert": ["expert"],
    }[name.quality]
    bounds = np.linspace(0, transitions, len(makers) + 1).astype(int)
    return [Part(policy, int(n)) for policy, n in zip(makers, np.diff(bounds), strict=True)]


def _recipe(name: Name, transitions: int) -> dict[str, Any]:
    """Everything that decides the arrays, for the manifest; a set with another recipe is stale."""
    parts = parts_of(name, transitions)
    weights = hashlib.sha256()
    policies = read_policies(name.env, {part.policy for part in parts if part.policy})
    for part in parts:
        for array in (array for layer in policies.get(part.policy or "", []) for array in layer):
            weights.update(f"{part.policy} {array.dtype} {array.shape}".encode() + array.tobytes())
    return {
        "format": FORMAT,
        "seed": SEED,
        "environment": ENVS[name.env],
        "parts": [list(part) for part in parts],
        "policies_sha256": weights.hexdigest(),
    }


def is_current(directory: Path, recipe: dict[str, Any]) -> bool:
    """Whether the set at `directory` was made by `recipe`; UsageError if what is there is not ours."""
    if not directory.exists():
        return False
    try:
        return json.loads((directory / "manifest.json").read_text())["recipe"] == recipe
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(f"{directory} has no manifest of Offax: move it away to have the set made again") from None


def ensure(dataset_id: str) -> Path:
    """Directory of the set `dataset_id` in Minari's directory, collected first if it is missing or stale.

    Of several processes one collects and the others wait. UsageError if there is no such set or the directory cannot be
    written.
    """
    name = parse(dataset_id)
    return ensure_built(dataset_id, _recipe(name, SIZES[name.size]), _build)


def ensure_built(
    dataset_id: str, recipe: dict[str, Any], build: Callable[[str, dict[str, Any], Path, Path], None]
) -> Path:
    """The set's directory; `build(dataset_id, recipe, place, directory)` makes it, unless `recipe` made what is there.

    Another process that makes it is waited for. UsageError if it cannot be written, or what is there is not ours.
    """
    directory = datasets_root() / dataset_id
    if is_current(directory, recipe):
        return directory
    try:
        with building_place(dataset_id, "collecting") as place:
            if not is_current(directory, recipe):  # else another process made it while this one waited
                build(dataset_id, recipe, place, directory)
    except OSError as error:
        raise UsageError(
            f"cannot write {dataset_id} under {datasets_root()}: {error.strerror or error}; "
            "make room or set MINARI_DATASETS_PATH to another directory"
        ) from None
    return directory


@contextmanager
def building_place(dataset_id: str, doing: str) -> Iterator[Path]:
    """A directory for a set that is made, and no other process at it meanwhile.

    It is beside the set's own: to rename works within a file system only, and a folder may be a link to another one.
    """
    directory = datasets_root() / dataset_id
    place = directory.with_name(".offax-building") / directory.name
    place.parent.mkdir(parents=True, exist_ok=True)
    with lock(place.with_name(f"{place.name}.lock"), f"another process is {doing} {dataset_id}"):
        yield place


@contextmanager
def lock(path: Path, held: str) -> Iterator[None]:
    """Hold the lock file at `path`, after saying `held` if it has to be waited for.

    The system lets go of it however the process ends.
    """
    import fcntl

    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{held}: waiting for it", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            print(f"{path.parent} has no locks: take care that one process at a time works on it", file=sys.stderr)
        yield


def _build(dataset_id: str, recipe: dict[str, Any], building: Path, directory: Path) -> None:
    """Collect and write the set in `building`, then rename it to `directory`."""
    shutil.rmtree(building, ignore_errors=True)  # left by a build that was killed
    building.mkdir()
    try:
        _require_space(recipe, building)
        quiet_mujoco()
        episodes = _collect_parts(dataset_id, recipe)
        _require_space(recipe, building)  # again: collecting took a while
        built = _write(dataset_id, recipe, episodes, building)
        _create_namespaces(dataset_id)
        put(built, directory, building)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def put(built: Path, directory: Path, building: Path) -> None:
    """Rename the set `built` to `directory`; a stale one that is there, or a link to it, goes into `building`."""
    if os.path.lexists(directory):
        os.rename(directory, building / "stale")
    os.rename(built, directory)


def _require_space(recipe: dict[str, Any], building: Path) -> None:
    """OSError if the disk or a quota has no room for the set; tried by reserving it.

    HDF5 cannot be trusted to survive a write that fails (it may end the process), so it must not come to that.
    """
    needed = 1000 * sum(transitions for _, transitions in recipe["parts"])
    if not hasattr(os, "posix_fallocate"):
        if shutil.disk_usage(building).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return
    reserve = building / "reserve"
    try:
        with open(reserve, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, needed)
    finally:
        reserve.unlink(missing_ok=True)


def _collect_parts(dataset_id: str, recipe: dict[str, Any]) -> list[Episode]:
    name, total = parse(dataset_id), sum(transitions for _, transitions in recipe["parts"])
    policies = read_policies(name.env)
    episodes: list[Episode] = []
    progress = progress_bar(f"collecting {dataset_id}", total)
    progress(0)
    with process_map(min(usable_cores(), total // MIN_SHARE)) as run:
        for index, (policy, transitions) in enumerate(recipe["parts"]):
            seed = [recipe["seed"], list(ENVS).index(name.env), QUALITIES.index(name.quality), index]
            layers = [(w.astype(float), b.astype(float)) for w, b in policies[policy]] if policy else None
            episodes += collect(recipe["environment"], layers, transitions, seed, progress=progress, run=run)
    return episodes


def progress_bar(what: str, total: int) -> Callable[[int], None]:
    """Say on stderr how many of the steps are made: on a terminal in one line that is rewritten, else at each fifth."""
    done, shown = 0, -1
    terminal = sys.stderr.isatty()

    def advance(steps: int) -> None:
        nonlocal done, shown
        done += steps
        percent = min(100, 100 * done // total)
        if percent // (1 if terminal else 20) > shown:
            shown = percent // (1 if terminal else 20)
            start, end = ("\r", "\n" if percent == 100 else "") if terminal else ("", "\n")
            print(f"{start}{what}: {percent} %", end=end, file=sys.stderr, flush=True)

    return advance


def _write(dataset_id: str, recipe: dict[str, Any], episodes: list[Episode], building: Path) -> Path:
    """Write `episodes` as the Minari dataset `dataset_id` with `building` for Minari's directory; its own directory."""
    import minari
    from minari.data_collector import EpisodeBuffer

    name = parse(dataset_id)
    low, high = REFERENCE_RETURNS[name.env]

    def flags(episode: Episode, value: bool) -> np.ndarray:
        last = np.zeros(len(episode.rewards), bool)
        last[-1] = value
        return last

    buffers = [
        EpisodeBuffer(
            seed=episode.seed,
            observations=episode.observations,
            actions=episode.actions,
            rewards=episode.rewards,
            terminations=flags(episode, episode.terminated),
            truncations=flags(episode, episode.truncated),
        )
        for episode in episodes
    ]
    with minari_directory(building), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Minari's reminders of optional metadata
        try:
            minari.create_dataset_from_buffers(
                dataset_id,
                buffers,
                env=recipe["environment"],
                eval_env=recipe["environment"],
                algorithm_name="uniform random actions" if name.quality == "random" else "SAC (benchmarks/sac.py)",
                author="Offax",
                description=_description(recipe),
                ref_min_score=low,
                ref_max_score=high,
                data_format="hdf5",
            )
        except RuntimeError as error:  # h5py's for a write that fails while a file is closed
            raise OSError(None, str(error).split("\n")[0]) from error
    columns = ("observations", "actions", "rewards")
    hashes = {column: hashlib.sha256() for column in (*columns, "terminations", "truncations")}
    for episode, buffer in zip(episodes, buffers, strict=True):
        for column, value in hashes.items():
            value.update(np.ascontiguousarray(getattr(episode if column in columns else buffer, column)).tobytes())
    returns = np.array([episode.rewards.sum() for episode in episodes])
    manifest = {
        "id": dataset_id,
        "recipe": recipe,
        "versions": {
            package: importlib.metadata.version(package) for package in ("gymnasium", "minari", "mujoco", "numpy")
        },
        "sha256": {column: value.hexdigest() for column, value in hashes.items()},
        "statistics": {
            "transitions": sum(len(episode.rewards) for episode in episodes),
            "episodes": len(episodes),
            "terminated": sum(episode.terminated for episode in episodes),
            "return_mean": float(returns.mean()),
            "return_min": float(returns.min()),
            "return_max": float(returns.max()),
        },
    }
    built = building / dataset_id
    (built / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    return built


def _description(recipe: dict[str, Any]) -> str:
    parts = ", ".join(f"{transitions} by {policy or 'uniform actions'}" for policy, transitions in recipe["parts"])
    return (
        f"Collected in {recipe['environment']} by Offax: {parts}. Sampled actions; the last episode of each part is "
        "cut with a truncation."
    )


@contextmanager
def minari_directory(path: Path) -> Iterator[None]:
    """Point Minari at `path`; it knows no other way than the environment variable."""
    before = os.environ.get("MINARI_DATASETS_PATH")
    os.environ["MINARI_DATASETS_PATH"] = str(path)
    try:
        yield
    finally:
        if before is None:
            del os.environ["MINARI_DATASETS_PATH"]
        else:
            os.environ["MINARI_DATASETS_PATH"] = before


def _create_namespaces(dataset_id: str) -> None:
    """The files by which Minari knows the namespaces `offax` and `offax/<env>`."""
    import minari.namespace

    for namespace in ("offax", dataset_id.rsplit("/", 1)[0]):
        path = datasets_root() / namespace / minari.namespace.NAMESPACE_METADATA_FILENAME
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{}")
