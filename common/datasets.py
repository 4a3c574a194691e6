"""Datasets as flat arrays: Minari's, `offax/...`, a `.npz` of one's own, or D4RL's `.hdf5`.

    python -m common.datasets list
    python -m common.datasets build offax/hopper/medium-v0
    python -m common.datasets stats offax/hopper/medium-v0 D4RL/door/human-v2 my.npz

What comes out is the same for each (`Dataset`). What goes in:

* Minari id: the observations of an episode of T steps have T + 1 entries, so every step has its true successor, the
  last one of a truncated episode too; it is kept and marked. An episode that ends without a flag is marked truncated.
  Dictionaries of vectors are flattened in the order of the environment's own space, as gymnasium's
  `FlattenObservation` does. A flat copy is kept beside Minari's files (`flat-...`), where the directory can be written.
* `.npz`: the arrays of `Transitions` by their names; `truncations` may be absent and is then zero everywhere, which
  leaves episodes that ended by a time limit joined to the next one. A text `env` may name the environment.
* `.hdf5` (D4RL's names): as D4RL's `qlearning_dataset` where there are no `next_observations`: the successor is the
  next row, so rows with a timeout and an unfinished last row are dropped, and the row before is marked truncated.
  A terminal row stays; its successor is masked, and is its own observation here rather than the next episode's first.
  With `next_observations` every row stays. Without `timeouts` (version 0 files) an episode lasts at most 1,000 steps.
"""

import argparse
import contextlib
import io
import json
import os
import re
import shutil
import threading
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common import offax_sets
from common.buffers import Transitions
from common.errors import UsageError, exit_status
from common.reference_scores import normalized_score

if TYPE_CHECKING:
    from gymnasium.envs.registration import EnvSpec

# D4RL's own environments are version 2; version 4 has their observations and rewards.
D4RL_ENVS = {"halfcheetah": "HalfCheetah-v4", "hopper": "Hopper-v4", "walker2d": "Walker2d-v4", "ant": "Ant-v4"}
D4RL_EPISODE_STEPS = 1000
BOUND_TOLERANCE = 1e-5  # of the range: float32 copies of float64 actions
NETWORK_SECONDS = 3.0
CACHE_FORMAT = 1


@dataclass(frozen=True)
class Dataset:
    """Flat transitions and what they were recorded in.

    `transitions` holds numpy float32 arrays, time-ordered, episodes contiguous; actions were rescaled to [-1, 1] from
    the environment's bounds `action_low, action_high [action_dim]`. `env_spec` is what to evaluate in: a gymnasium id,
    or Minari's EnvSpec, or None where it is not known. `domain` names the family of D4RL's reference returns.
    """

    id: str
    transitions: Transitions
    env_spec: "str | EnvSpec | None"
    env_id: str | None
    domain: str | None
    action_low: np.ndarray
    action_high: np.ndarray


def load(id_or_path: str, env: str | None = None) -> Dataset:
    """Read a dataset; `offax/...` is collected and any other Minari id downloaded when missing.

    `env` is the id of the environment to evaluate in, instead of the dataset's own; its observations and actions must
    have the dataset's sizes. UsageError, in one line, for a dataset that does not exist or cannot be used.
    """
    suffix = Path(id_or_path).suffix.lower()
    if suffix == ".npz":
        dataset = _load_npz(id_or_path, env)
    elif suffix in (".hdf5", ".h5"):
        dataset = _load_d4rl(id_or_path, env)
    else:
        dataset = _load_minari(id_or_path)
    return dataset if env is None else _with_env(dataset, env)


def episode_slices(transitions: Transitions) -> np.ndarray:
    """`[episodes, 2]` integers, start and stop of each: it ends at either flag, or at the end of the data."""
    ends = np.flatnonzero((transitions.terminations > 0) | (transitions.truncations > 0)) + 1
    if len(ends) == 0 or ends[-1] != len(transitions.rewards):
        ends = np.append(ends, len(transitions.rewards))
    return np.stack([np.append(0, ends[:-1]), ends], axis=1)


def episode_returns(transitions: Transitions) -> np.ndarray:
    """Undiscounted return of each episode, float64 `[episodes]`."""
    starts = episode_slices(transitions)[:, 0]
    return np.add.reduceat(np.asarray(transitions.rewards, np.float64), starts)


def digest(transitions: Transitions) -> str:
    """16 hexadecimal digits, enough to tell two datasets of one name apart."""
    t = transitions
    arrays = (t.observations[:1000], t.actions, t.rewards, t.terminations, t.truncations)
    return sha256(b"".join(map(np.ndarray.tobytes, arrays))).hexdigest()[:16]


# Checks


def _reason(error: Exception) -> str:
    """The first line of the error's message, or its name if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _checked(name: str, arrays: Mapping[str, np.ndarray], low: np.ndarray, high: np.ndarray) -> Transitions:
    """The arrays as float32 transitions with actions rescaled to [-1, 1]; UsageError in one line if they are unfit."""
    out: dict[str, np.ndarray] = {}
    for field in Transitions._fields:
        array = arrays[field]
        wanted = 2 if field in ("observations", "actions", "next_observations") else 1
        if array.dtype.kind not in "fiub":
            raise UsageError(f"{name}: {field} holds {array.dtype}, not numbers")
        if array.ndim != wanted:
            shape = "[transitions, size]" if wanted == 2 else "[transitions]"
            raise UsageError(
                f"{name}: {field} has shape {list(array.shape)}, it must be {shape}; continuous vectors only"
            )
    size = len(arrays["rewards"])
    for field in Transitions._fields:
        array = arrays[field]
        if len(array) != size:
            raise UsageError(f"{name}: {field} has {len(array)} rows and rewards has {size}; they must be equal")
        with np.errstate(over="ignore"):
            out[field] = np.ascontiguousarray(array, np.float32)
        if not np.isfinite(np.sum(out[field], dtype=np.float64)):  # a sum of float32 cannot overflow: exact and fast
            row = np.flatnonzero(~np.isfinite(out[field]).reshape(size, -1).all(axis=1))[0]
            raise UsageError(f"{name}: {field} has NaN or infinity, first in row {row}; remove those episodes")
    if size == 0:
        raise UsageError(f"{name} is empty: it has no transitions")
    if out["observations"].shape[1] == 0 or out["actions"].shape[1] == 0:
        raise UsageError(f"{name}: observations and actions must have at least one number per row")
    if out["observations"].shape != out["next_observations"].shape:
        raise UsageError(
            f"{name}: next_observations has shape {list(out['next_observations'].shape)} and observations "
            f"{list(out['observations'].shape)}; they must be equal"
        )
    for field in ("terminations", "truncations"):
        bad = np.flatnonzero((out[field] != 0) & (out[field] != 1))
        if len(bad):
            raise UsageError(f"{name}: {field} must be 0 or 1, row {bad[0]} is {out[field][bad[0]]}")
    out["actions"] = _rescaled(name, out["actions"], low, high)
    return Transitions(**out)


def _rescaled(name: str, actions: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    if actions.shape[1:] != low.shape:
        raise UsageError(f"{name}: actions have {actions.shape[1]} numbers and the environment takes {len(low)}")
    if not (np.isfinite(low).all() and np.isfinite(high).all() and (low < high).all()):
        raise UsageError(f"{name}: the actions need finite bounds, they are {low.tolist()} to {high.tolist()}")
    margin = BOUND_TOLERANCE * (high - low)
    outside = (actions < low - margin) | (actions > high + margin)
    if outside.any():
        row, column = np.argwhere(outside)[0]
        raise UsageError(
            f"{name}: actions are out of the environment's bounds, first in row {row}: {actions[row, column]:.6g} is "
            f"not in [{low[column]:.6g}, {high[column]:.6g}]; clip them in the file if that is what was executed"
        )
    if np.any(low != -1.0) or np.any(high != 1.0):
        actions = 2.0 * (actions - low) / (high - low) - 1.0
    return np.clip(actions, -1.0, 1.0).astype(np.float32, copy=False)


# Environments


def _domain_of_env(env_id: str | None) -> str | None:
    """Family of D4RL's reference returns; none for sparse Adroit or dense AntMaze, whose rewards differ from D4RL's."""
    text = (env_id or "").lower().split("/")[-1]
    for pattern in (
        r"(halfcheetah|hopper|walker2d|ant)-v\d+",
        r"(antmaze)_(?!.*dense).*",
        r"adroithand(pen|door|hammer|relocate)-v\d+",
        r"franka(kitchen)-v\d+",
    ):
        if match := re.fullmatch(pattern, text):
            return match[1]
    return None


def _domain_of_d4rl_file(stem: str) -> str | None:
    """The family from names such as `hopper_medium-v2`, `Ant_maze_u-maze_...`, `maze2d-umaze-sparse-v1`."""
    text = stem.lower()
    if re.match(r"ant_?maze", text):
        return "antmaze"
    if match := re.match(r"maze2d-(umaze|medium|large)(?!.*dense)", text):
        return f"maze2d-{match[1]}"
    if "kitchen" in text:
        return "kitchen"
    match = re.match(r"(halfcheetah|hopper|walker2d|ant|pen|door|hammer|relocate)(?![a-z0-9])", text)
    return match[1] if match else None


def _spaces(env: str) -> tuple[int, np.ndarray, np.ndarray]:
    """Size of the flattened observations and the bounds of the actions of the environment `env`."""
    import gymnasium as gym

    try:
        with offax_sets.without_deprecations(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # newer versions of the environment
            with contextlib.suppress(ImportError):
                with contextlib.redirect_stderr(io.StringIO()):  # it prints a notice about versions
                    import gymnasium_robotics

                gym.register_envs(gymnasium_robotics)
            made = gym.make(env)
    except Exception as error:  # whatever an environment's constructor raises
        raise UsageError(f"cannot make the environment {env}: {_reason(error)}") from None
    try:
        if not isinstance(made.action_space, gym.spaces.Box) or len(made.action_space.shape) != 1:
            raise UsageError(f"environment {env} has actions {made.action_space}; continuous vectors only")
        size = gym.spaces.flatdim(made.observation_space)
        return size, made.action_space.low.astype(np.float32), made.action_space.high.astype(np.float32)
    finally:
        made.close()


def _with_env(dataset: Dataset, env: str) -> Dataset:
    """`dataset` to be evaluated in `env`; UsageError if its observations or actions are not the dataset's."""
    size, low, high = _spaces(env)
    found = dataset.transitions.observations.shape[1]
    if size != found:
        raise UsageError(
            f"{dataset.id}: observations have {found} numbers and {env} gives {size}; choose another --env"
        )
    if low.shape != dataset.action_low.shape or not (
        np.allclose(low, dataset.action_low) and np.allclose(high, dataset.action_high)
    ):
        raise UsageError(
            f"{dataset.id}: actions are bounded by {dataset.action_low.tolist()} to {dataset.action_high.tolist()} "
            f"and those of {env} by {low.tolist()} to {high.tolist()}; choose another --env"
        )
    return Dataset(dataset.id, dataset.transitions, env, env, _domain_of_env(env), low, high)


# Files of one's own


def read_npz(path: str, required: Sequence[str], optional: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """Arrays of an .npz by name, those of `optional` where they exist; UsageError in one line where that fails."""
    if not Path(path).is_file():
        raise UsageError(f"there is no file {path}")
    if not zipfile.is_zipfile(path):
        raise UsageError(f"{path} is damaged or is not an .npz file; numpy.savez makes one")
    try:
        with np.load(path, allow_pickle=False) as file:
            names = file.files
            arrays = {name: file[name] for name in (*required, *optional) if name in names}
    except ValueError as error:
        if "pickle" in str(error).lower():
            raise UsageError(
                f"{path} holds pickled objects, which are never loaded; save plain arrays with numpy.savez"
            ) from None
        raise UsageError(f"{path} is damaged ({_reason(error)})") from None
    except (OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        raise UsageError(f"{path} is damaged ({_reason(error)})") from None
    if missing := [name for name in required if name not in arrays]:
        raise UsageError(f"{path} has no array {missing[0]}; it has {', '.join(names) or 'none'}")
    return arrays


def _load_npz(path: str, env: str | None) -> Dataset:
    required = [name for name in Transitions._fields if name != "truncations"]
    arrays = read_npz(path, required, ("truncations", "env"))
    env = env or (str(arrays["env"]) if "env" in arrays else None)
    arrays.setdefault("truncations", np.zeros(arrays["rewards"].shape, np.float32))
    low, high = _bounds(env, arrays["actions"])
    return Dataset(path, _checked(path, arrays, low, high), env, env, _domain_of_env(env), low, high)


def _bounds(env: str | None, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The environment's bounds of the actions, [-1, 1] where no environment is named."""
    if env is not None:
        return _spaces(env)[1:]
    ones = np.ones(actions.shape[1:2], np.float32)
    return -ones, ones


def _load_d4rl(path: str, env: str | None) -> Dataset:
    arrays = _d4rl_transitions(_read_d4rl(path))
    domain = _domain_of_d4rl_file(Path(path).stem)
    env_id = env or D4RL_ENVS.get(domain or "")
    low, high = _bounds(env, arrays["actions"])  # D4RL's environments are all bounded by [-1, 1]
    return Dataset(path, _checked(path, arrays, low, high), env_id, env_id, domain, low, high)


def _read_d4rl(path: str) -> dict[str, np.ndarray]:
    import h5py

    names = ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations")
    if not Path(path).is_file():
        raise UsageError(f"there is no file {path}")
    try:
        with h5py.File(path, "r") as file:
            keys = list(file)
            arrays = {name: file[name][()] for name in names if isinstance(file.get(name), h5py.Dataset)}
    except (OSError, RuntimeError, ValueError) as error:
        raise UsageError(f"{path} is damaged or is not an HDF5 file ({_reason(error)})") from None
    missing = [name for name in names[:4] if name not in arrays]
    if missing:
        raise UsageError(f"{path} has no array {missing[0]}, as D4RL's files have; it has {', '.join(keys) or 'none'}")
    rows = arrays["rewards"].shape[:1]
    for name, array in arrays.items():
        if array.shape[:1] != rows or not rows:
            raise UsageError(
                f"{path}: {name} has shape {list(array.shape)} and rewards {list(arrays['rewards'].shape)}; "
                "they must have as many rows"
            )
        if name in ("terminals", "timeouts") and (array.size != rows[0] or array.dtype.kind not in "fiub"):
            raise UsageError(f"{path}: {name} must have one flag per row of rewards ({rows[0]})")
    return arrays


def _d4rl_transitions(raw: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """D4RL's rows as transitions, by the rules at the top of this file."""
    size = len(raw["rewards"])
    terminal = raw["terminals"].astype(bool).reshape(-1)
    timeout = raw["timeouts"].astype(bool).reshape(-1) if "timeouts" in raw else _timeouts_by_counting(terminal)
    truncation = timeout & ~terminal
    keep = np.ones(size, bool)
    if "next_observations" in raw:
        following = raw["next_observations"]
    else:
        following = np.roll(raw["observations"], -1, axis=0)
        following[terminal] = raw["observations"][terminal]
        keep = ~timeout
        keep[-1:] &= terminal[-1:]
        # The row before a dropped one is the last of its episode, unless it is the last of the one before.
        before = np.flatnonzero(~keep) - 1
        before = before[before >= 0]
        truncation = np.zeros(size, bool)
        truncation[before] = ~(terminal | timeout)[before]
    return {
        "observations": raw["observations"][keep],
        "actions": raw["actions"][keep],
        "rewards": raw["rewards"][keep],
        "next_observations": following[keep],
        "terminations": terminal[keep],
        "truncations": truncation[keep],
    }


def _timeouts_by_counting(terminal: np.ndarray) -> np.ndarray:
    """The rows that are the 1,000th of their episode."""
    timeout = np.zeros(len(terminal), bool)
    start = 0
    for end in [*np.flatnonzero(terminal).tolist(), len(terminal)]:
        timeout[start + D4RL_EPISODE_STEPS - 1 : end + 1 : D4RL_EPISODE_STEPS] = True
        start = end + 1
    return timeout


# Minari


def ensure(dataset_id: str) -> Path:
    """Directory of the Minari dataset, with its files in `data`; collected or downloaded when missing.

    UsageError, in one line, for what is no id and for a download that fails.
    """
    if not re.fullmatch(r"(?:[-\w]+/)*[-\w]+-v\d+", dataset_id):
        raise UsageError(
            f"{dataset_id!r} is neither a dataset id such as offax/hopper/medium-v0, nor a path to an .npz or .hdf5 "
            "file"
        )
    if dataset_id.startswith("offax/"):
        return offax_sets.ensure(dataset_id)
    directory = offax_sets.datasets_root() / dataset_id
    if not (directory / "data").exists():
        _download(dataset_id)
    return directory


def _load_minari(dataset_id: str) -> Dataset:
    directory = ensure(dataset_id)
    fingerprint = _fingerprint(directory / "data")
    cached = _read_cache(directory, fingerprint)
    if cached is None:
        cached = _read_minari(dataset_id, directory / "data")
        _write_cache(directory, fingerprint, *cached)
    transitions, about = cached
    spec = _env_spec(about["env_spec"])
    env_id = spec.id if spec is not None else None
    low, high = (np.array(about[name], np.float32) for name in ("action_low", "action_high"))
    return Dataset(dataset_id, transitions, spec, env_id, _domain_of_env(env_id), low, high)


def _env_spec(text: str | None) -> "EnvSpec | None":
    """The EnvSpec in Minari's metadata, without fields that this version of gymnasium no longer has."""
    from dataclasses import fields

    from gymnasium.envs.registration import EnvSpec

    if text is None:
        return None
    known = {field.name for field in fields(EnvSpec) if field.init}
    try:
        return EnvSpec.from_json(json.dumps({key: v for key, v in json.loads(text).items() if key in known}))
    except Exception as error:  # what from_json raises is not documented; the data are usable without
        warnings.warn(f"the dataset's environment cannot be restored ({error}); name one with --env", stacklevel=2)
        return None


def _read_minari(dataset_id: str, data: Path) -> tuple[Transitions, dict[str, Any]]:
    """Flat transitions of the Minari dataset in `data`, and its environment and action bounds (JSON)."""
    try:
        metadata = json.loads((data / "metadata.json").read_text())
        observation_space, action_space = (
            json.loads(metadata[name]) if name in metadata else _recovered_space(data, name)
            for name in ("observation_space", "action_space")
        )
        _require_vectors(dataset_id, "observations", observation_space)
        if action_space["type"] != "Box":
            raise UsageError(f"{dataset_id}: actions are a {action_space['type']} space; continuous vectors only")
        _require_vectors(dataset_id, "actions", action_space)
        columns: dict[str, list[np.ndarray]] = {name: [] for name in Transitions._fields}
        for index, episode in enumerate(_episodes(data, metadata)):
            _append_episode(f"{dataset_id} episode {index}", columns, episode, observation_space)
        arrays = {name: np.concatenate(parts or [np.empty(0)]) for name, parts in columns.items()}
    except ImportError as error:  # Minari's other formats have their own dependencies
        raise UsageError(f"{dataset_id}: {error}") from None
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{dataset_id} is damaged: {data} cannot be read ({_reason(error)}); "
            "delete its directory to have it made or downloaded again"
        ) from None
    if not columns["rewards"]:
        raise UsageError(f"{dataset_id} is empty: it has no episodes")
    low, high = (np.array(action_space[name], np.float32).reshape(-1) for name in ("low", "high"))
    transitions = _checked(dataset_id, arrays, low, high)
    about = {
        "env_spec": metadata.get("eval_env_spec") or metadata.get("env_spec"),
        "action_low": low.tolist(),
        "action_high": high.tolist(),
    }
    return transitions, about


def _recovered_space(data: Path, name: str) -> dict[str, Any]:
    """A space that the metadata leave to the environment, in Minari's JSON form."""
    import minari
    from minari.serialization import serialize_space

    return json.loads(serialize_space(getattr(minari.MinariDataset(data), name)))


def _require_vectors(dataset_id: str, what: str, space: dict[str, Any]) -> None:
    """UsageError unless `space` is a vector of floats or a (nested) dictionary or tuple of such."""
    if space["type"] in ("Dict", "Tuple"):
        for child in _children(space):
            _require_vectors(dataset_id, what, child[1])
    elif space["type"] != "Box" or len(space["shape"]) != 1 or not space["dtype"].startswith("float"):
        shape = f" of {space['dtype']} {space['shape']}" if space["type"] == "Box" else ""
        raise UsageError(f"{dataset_id}: {what} are a {space['type']} space{shape}; continuous vectors only")


def _children(space: dict[str, Any]) -> list[tuple[Any, dict[str, Any]]]:
    """Key and space of each child, in gymnasium's order, which is that of the JSON: Minari writes it from the space."""
    if space["type"] == "Dict":
        return list(space["subspaces"].items())
    return list(enumerate(space["subspaces"]))


def _flatten(space: dict[str, Any], value: Any) -> np.ndarray:
    """`[steps, size]` from arrays, or from (nested) mappings or tuples of arrays, h5py's included."""
    if space["type"] == "Box":
        return value[()]
    by_index = "_index_{}".format if isinstance(value, Mapping) and space["type"] == "Tuple" else None
    children = [_flatten(child, value[by_index(key) if by_index else key]) for key, child in _children(space)]
    return np.concatenate(children, axis=1)


def _episodes(data: Path, metadata: dict[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The episodes in order; HDF5 is read directly, several times faster than through Minari's iterator."""
    if metadata["data_format"] == "hdf5":
        import h5py

        with h5py.File(data / "main_data.hdf5", "r") as file:
            for index in range(metadata["total_episodes"]):
                yield file[f"episode_{index}"]
        return
    import minari

    for episode in minari.MinariDataset(data).iterate_episodes():
        yield vars(episode)


def _append_episode(
    name: str, columns: dict[str, list[np.ndarray]], episode: Mapping[str, Any], space: dict[str, Any]
) -> None:
    observations = _flatten(space, episode["observations"]).astype(np.float32)
    values = {field: np.asarray(episode[field][()]) for field in ("actions", "rewards", "terminations", "truncations")}
    steps = len(values["rewards"])
    if steps == 0:
        return
    for field, wanted in (("actions", steps), ("terminations", steps), ("truncations", steps)):
        if len(values[field]) != wanted:
            raise UsageError(f"{name}: {field} has {len(values[field])} rows and rewards has {steps}; it is malformed")
    if len(observations) != steps + 1:
        raise UsageError(f"{name}: observations has {len(observations)} rows, not the {steps} of rewards and one more")
    columns["observations"].append(observations[:-1])
    columns["next_observations"].append(observations[1:])
    if not (values["terminations"][-1] or values["truncations"][-1]):
        values["truncations"] = values["truncations"].copy()
        values["truncations"][-1] = True
    for field, value in values.items():
        columns[field].append(value)


# The flat cache


def _fingerprint(data: Path) -> str:
    """Hash of names, sizes and modification times of the source's files."""
    files = sorted(path for path in data.rglob("*") if path.is_file())
    stats = [(str(path.relative_to(data)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return sha256(json.dumps([CACHE_FORMAT, stats]).encode()).hexdigest()[:16]


def _read_cache(directory: Path, fingerprint: str) -> tuple[Transitions, dict[str, Any]] | None:
    """What `_write_cache` wrote for the same source; None if it did not, or if it is damaged."""
    cache = directory / f"flat-{fingerprint}"
    try:
        about = json.loads((cache / "about.json").read_text())
        arrays = [np.load(cache / f"{name}.npy", allow_pickle=False) for name in Transitions._fields]
    except (OSError, ValueError, EOFError):
        return None
    return Transitions(*arrays), about


def _write_cache(directory: Path, fingerprint: str, transitions: Transitions, about: dict[str, Any]) -> None:
    """Write the flat arrays beside Minari's `data`, whole or not at all; without the right to write, do nothing."""
    temporary = directory / f".flat-{os.getpid()}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        for name, array in transitions._asdict().items():
            np.save(temporary / f"{name}.npy", array)
        (temporary / "about.json").write_text(json.dumps(about))
        for old in directory.glob("flat-*"):  # of an older source, or damaged
            shutil.rmtree(old, ignore_errors=True)
        os.rename(temporary, directory / f"flat-{fingerprint}")
    except OSError:
        pass
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# Download


def _download(dataset_id: str) -> None:
    """Download a Minari dataset into Minari's directory, whole or not at all; UsageError if that fails."""
    root = offax_sets.datasets_root()
    instead = "offax/... datasets need no network: python -m common.datasets list"
    if not _server_answers():
        raise UsageError(f"{dataset_id} is not in {root} and Minari's server cannot be reached; {instead}")
    import minari

    temporary, target = root / ".offax-downloading" / dataset_id.replace("/", "-"), root / dataset_id
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        with offax_sets.lock(temporary.with_suffix(".lock"), f"another process is downloading {dataset_id}"):
            if target.exists():
                return
            shutil.rmtree(temporary, ignore_errors=True)  # left by a download that was killed
            temporary.mkdir()
            try:
                with offax_sets.minari_directory(temporary), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    minari.download_dataset(dataset_id)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.rename(temporary / dataset_id, target)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except Exception as error:  # Minari's, its storage backends' and the system's
        raise UsageError(f"cannot download {dataset_id}: {_reason(error)}; {instead}") from None


def _server_answers() -> bool:
    """Whether Minari's server answers at all within a few seconds, proxies included.

    In a thread of its own because nothing bounds the time of a name look-up.
    """
    import urllib.error
    import urllib.request

    remote = os.environ.get("MINARI_REMOTE", "hf://")
    url = "https://storage.googleapis.com" if remote.startswith("gcp") else "https://huggingface.co"
    url = url if remote.startswith("gcp") else os.environ.get("HF_ENDPOINT", url)
    answered = threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=NETWORK_SECONDS).close()
        except urllib.error.HTTPError:
            pass  # an answer all the same
        except Exception:  # no route, no name, no certificate, a broken proxy
            return
        answered.set()

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(NETWORK_SECONDS)
    return answered.is_set()


# Command line


STATISTICS = ("dataset", "env", "transitions", "episodes", "mean", "min", "max", "normalised", "terminated")


def _statistics(dataset: Dataset) -> list[str]:
    """The columns of `STATISTICS`: returns of episodes, mean normalised return, fraction of episodes terminated."""
    returns = episode_returns(dataset.transitions)
    slices = episode_slices(dataset.transitions)
    scores = normalized_score(dataset.domain, returns)
    terminated = dataset.transitions.terminations[slices[:, 1] - 1].mean()
    return [
        dataset.id,
        dataset.env_id or "-",
        f"{len(dataset.transitions.rewards)}",
        f"{len(returns)}",
        f"{returns.mean():.1f}",
        f"{returns.min():.1f}",
        f"{returns.max():.1f}",
        "-" if scores is None else f"{scores.mean():.1f}",
        f"{terminated:.3f}",
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; without a command it lists. SystemExit(2), with one line on stderr, for what does not work."""
    parser = argparse.ArgumentParser(prog="python -m common.datasets", description="List, collect, describe datasets.")
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("list", help="the datasets that need no network, and whether they are on this disk (default)")
    build = commands.add_parser("build", help="collect offax datasets ahead of their first use")
    build.add_argument("ids", nargs="*", help="which (default: all)")
    stats = commands.add_parser("stats", help="table of returns and endings")
    stats.add_argument("ids", nargs="+", help="dataset ids, .npz or D4RL .hdf5 paths")
    args = parser.parse_args(argv)
    with exit_status():
        if args.command == "build":
            for dataset_id in args.ids or offax_sets.ids():
                print(offax_sets.ensure(dataset_id))
        elif args.command == "stats":
            from rich.console import Console
            from rich.table import Table

            table = Table(*STATISTICS)
            for name in args.ids:
                table.add_row(*_statistics(load(name)))
            Console(width=1000).print(table)  # a pipe or a narrow terminal must not cut the numbers
        else:
            for dataset_id in offax_sets.ids():
                there = (offax_sets.datasets_root() / dataset_id / "data").exists()
                print(f"{dataset_id:36}{'on disk' if there else 'collected on first use'}")


if __name__ == "__main__":
    main()
