"""Datasets as flat arrays: Minari's, `offax/...`, a `.npz` of one's own, or D4RL's `.hdf5`; and their scores.

What comes out is the same for each (`Dataset`). What goes in:

* Minari id: the observations of an episode of T steps have T + 1 entries, so every step has its true successor, the
  last one of a truncated episode too; it is kept and marked. An episode that ends without a flag is marked truncated.
  Dictionaries are flattened in the order of the environment's own space, as gymnasium's `FlattenObservation` does.
* `.npz`: the arrays of `Transitions` by their names; `truncations` may be absent and is then zero everywhere, which
  leaves episodes that ended by a time limit joined to the next one. A text `env` may name the environment.
* `.hdf5` (D4RL's names): as D4RL's `qlearning_dataset` where there are no `next_observations`: the successor is the
  next row, so rows with a timeout and an unfinished last row are dropped, and the row before is marked truncated.
  A terminal row stays; its successor is masked, and is its own observation here rather than the next episode's first.
  With `next_observations` every row stays. Without `timeouts` (version 0 files) an episode lasts at most 1,000 steps.
"""

import copy
import hashlib
import importlib
import json
import os
import re
import sys
import threading
import urllib.request
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from common.cli import FILES, UsageError, env_name, one_line
from common.environments import action_bounds, make_raw
from common.replay import Transitions, episode_returns

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
    "maze2d-umaze": (23.85, 161.86),
    "maze2d-medium": (13.13, 277.39),
    "maze2d-large": (6.7, 273.99),
}
# D4RL's own environments are version 2; version 4 has their observations and rewards.
D4RL_ENVS = {"halfcheetah": "HalfCheetah-v4", "hopper": "Hopper-v4", "walker2d": "Walker2d-v4", "ant": "Ant-v4"}
MATRICES = ("observations", "actions", "next_observations")
BOUND_TOLERANCE = 1e-5  # of the range: float32 copies of float64 actions
NETWORK_SECONDS = 3.0


@dataclass(frozen=True)
class Dataset:
    """Flat transitions and what they were recorded in.

    `transitions` holds numpy float32 arrays, time-ordered, episodes contiguous; actions were rescaled to [-1, 1] from
    `low, high [action_dim]`. `env_spec` is what to evaluate in: a gymnasium id, or an EnvSpec, or None where it is not
    known. `domain` names the family of D4RL's reference returns.
    """

    id: str
    transitions: Transitions
    env_spec: Any
    domain: str | None
    low: np.ndarray
    high: np.ndarray

    def describe(self) -> dict[str, Any]:
        """What config.json says of it; `sha256` tells two datasets of one name apart."""
        t, returns = self.transitions, episode_returns(self.transitions)
        hashed = b"".join(map(np.ndarray.tobytes, (t.observations[:1000], *t[1:3], *t[4:])))
        summary = {"episodes": len(returns)}
        if len(returns):
            scores = normalized_score(self.domain, returns)
            summary |= {"mean": float(returns.mean()), "min": float(returns.min()), "max": float(returns.max())}
            summary["score_mean"] = None if scores is None else float(scores.mean())
        return {
            "environment": getattr(self.env_spec, "id", self.env_spec),
            "dataset_sha256": hashlib.sha256(hashed).hexdigest()[:16],
            "transitions": len(t.rewards),
            "dataset_returns": summary,
        }


def load(id_or_path: str, env: str | None = None, only_env: bool = False) -> Dataset:
    """Read a dataset; `offax/...` is collected and any other Minari id downloaded when missing.

    `env` is the id of the environment to evaluate in, instead of the dataset's own; observations and actions must have
    the dataset's sizes. With `only_env` and an `env` nothing is read, and the dataset has no rows: what training online
    from scratch needs. UsageError, in one line, for a dataset that does not exist or cannot be used.
    """
    path = os.path.expanduser(id_or_path)
    suffix = Path(path).suffix.lower()
    if only_env and env is not None:
        obs_dim, low, high = _spaces(env)
        shapes = [(0, obs_dim), (0, len(low)), (0,), (0, obs_dim), (0,), (0,)]
        empty = Transitions(*(np.zeros(shape, np.float32) for shape in shapes))
        return Dataset("none", empty, env, domain_of(env), low, high)
    if suffix in FILES:
        found = _load_npz(path, env) if suffix == ".npz" else _load_d4rl(path, env)
    else:
        found = _load_minari(id_or_path)
    spec = env or found.env_spec
    if spec is None:
        raise UsageError(f"{id_or_path} does not name its environment; pass --env ID")
    obs_dim, low, high = _spaces(spec)
    theirs = found.transitions.observations.shape[1]
    if obs_dim != theirs or low.shape != found.low.shape or not np.allclose((low, high), (found.low, found.high)):
        raise UsageError(
            f"{id_or_path} has {theirs} observations and actions from {found.low.tolist()} to {found.high.tolist()}, "
            f"environment {getattr(spec, 'id', spec)} has {obs_dim} and from {low.tolist()} to {high.tolist()}; choose "
            "another --env"
        )
    return replace(found, env_spec=spec, domain=domain_of(env) if env else found.domain)


def _spaces(spec: Any) -> tuple[int, np.ndarray, np.ndarray]:
    """`action_bounds` of an environment."""
    made = make_raw(spec)
    try:
        return action_bounds(f"environment {getattr(spec, 'id', spec)}", made.observation_space, made.action_space)
    finally:
        made.close()


def domain_of(env_id: str | None) -> str | None:
    """Family of D4RL's reference returns; none for sparse Adroit or dense AntMaze, whose rewards differ from D4RL's."""
    families = r"(halfcheetah|hopper|walker2d|ant)|(antmaze)_(?!.*dense).*|franka(kitchen)"
    match = re.fullmatch(rf"{families}|adroithand(pen|door|hammer|relocate)", env_name(env_id) if env_id else "")
    return match[match.lastindex] if match else None


def normalized_score(domain: str | None, returns: np.ndarray) -> np.ndarray | None:
    """100 (R - random) / (expert - random), float64 of the shape of `returns`; None where D4RL published none.

    On AntMaze, where D4RL's episodes end at the goal, whoever reaches it has 100, however long the reward goes on.
    """
    if domain not in REFERENCE_RETURNS:
        return None
    low, high = REFERENCE_RETURNS[domain]
    returns = np.asarray(returns, np.float64)
    return 100.0 * ((np.minimum(returns, 1.0) if domain == "antmaze" else returns) - low) / (high - low)


def _checked(name: str, arrays: Mapping[str, np.ndarray], low: np.ndarray, high: np.ndarray) -> Transitions:
    """The arrays as float32 transitions with actions rescaled to [-1, 1]; UsageError in one line if they are unfit."""
    out: dict[str, np.ndarray] = {}
    size = arrays["rewards"].size
    for field in Transitions._fields:
        array, wanted = arrays[field], 2 if field in MATRICES else 1
        if array.dtype.kind not in "fiub":
            raise UsageError(f"{name}: {field} holds {array.dtype}, not numbers")
        if array.ndim != wanted or len(array) != size or 0 in array.shape:
            rows = f"[{size or 'transitions'}{', size' if wanted == 2 else ''}]"
            raise UsageError(f"{name}: {field} has shape {list(array.shape)}, it must be {rows} and not empty")
        with np.errstate(over="ignore"):
            out[field] = np.ascontiguousarray(array, np.float32)
        if not np.isfinite(np.sum(out[field], dtype=np.float64)):  # a sum of float32 cannot overflow: exact and fast
            row = np.flatnonzero(~np.isfinite(out[field]).reshape(size, -1).all(axis=1))[0]
            raise UsageError(f"{name}: {field} has NaN or infinity, first in row {row}; remove those episodes")
        if field in ("terminations", "truncations") and (bad := np.flatnonzero((array != 0) & (array != 1))).size:
            raise UsageError(f"{name}: {field} must be 0 or 1, row {bad[0]} is {array[bad[0]]}")
    if out["observations"].shape != out["next_observations"].shape:
        raise UsageError(f"{name}: observations and next_observations must have the same shape")
    actions, margin = out["actions"], BOUND_TOLERANCE * (high - low)
    if actions.shape[1:] != low.shape:
        raise UsageError(f"{name}: actions have {actions.shape[1]} numbers and the environment takes {len(low)}")
    if len(outside := np.argwhere((actions < low - margin) | (actions > high + margin))):
        row, i = outside[0]
        raise UsageError(
            f"{name}: actions are out of the environment's bounds, first in row {row}: {actions[row, i]:.6g} is not in "
            f"[{low[i]:.6g}, {high[i]:.6g}]; clip them in the file if that is what was executed"
        )
    if np.any(low != -1.0) or np.any(high != 1.0):
        actions = 2.0 * (actions - low) / (high - low) - 1.0
    return Transitions(**out | {"actions": np.clip(actions, -1.0, 1.0).astype(np.float32, copy=False)})


def _bounds(env: str | None, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The environment's bounds of the actions, [-1, 1] where no environment is named."""
    ones = np.ones(actions.shape[1:2], np.float32)
    return _spaces(env)[1:] if env else (-ones, ones)


def read_npz(path: str, required: Sequence[str], optional: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """Arrays of an .npz by name, those of `optional` where they exist; UsageError in one line where that fails."""
    try:
        with np.load(path, allow_pickle=False) as file:
            names = file.files
            arrays = {name: file[name] for name in (*required, *optional) if name in names}
    except FileNotFoundError:
        raise UsageError(f"there is no file {path}") from None
    except (
        ValueError,
        AttributeError,
        OSError,
        EOFError,
        KeyError,
        zipfile.BadZipFile,
        zlib.error,
        TypeError,
    ) as error:
        what = "holds pickled objects, which are never loaded," if "pickle" in str(error).lower() else "is damaged"
        raise UsageError(f"{path} {what} or is no .npz ({one_line(error)}); numpy.savez of arrays makes one") from None
    if missing := [name for name in required if name not in arrays]:
        raise UsageError(f"{path} has no array {missing[0]}; it has {', '.join(names) or 'none'}")
    return arrays


def _load_npz(path: str, env: str | None) -> Dataset:
    required = [name for name in Transitions._fields if name != "truncations"]
    arrays = read_npz(path, required, ("truncations", "env"))
    env = env or (str(arrays["env"]) if "env" in arrays else None)
    arrays.setdefault("truncations", np.zeros(arrays["rewards"].shape, np.float32))
    bounds = _bounds(env, arrays["actions"])
    return Dataset(path, _checked(path, arrays, *bounds), env, domain_of(env), *bounds)


def _load_d4rl(path: str, env: str | None) -> Dataset:
    arrays, stem, spec = _read_d4rl(path), Path(path).stem.lower(), env
    known = r"(maze2d-(?:umaze|medium|large))(?!.*dense)|ant_?maze()|.*kitchen()"
    match = re.match(rf"{known}|(halfcheetah|hopper|walker2d|ant|pen|door|hammer|relocate)(?![a-z0-9])", stem)
    domain = match and (match[1] or match[4] or ("antmaze" if match[2] == "" else "kitchen"))
    if env is None and domain in D4RL_ENVS:
        spec = copy.deepcopy(gym.spec(D4RL_ENVS[domain]))
        if domain == "ant" and arrays["observations"].shape[1:] == (111,):
            spec.kwargs["use_contact_forces"] = True  # as D4RL's Ant had them
    bounds = _bounds(env, arrays["actions"])  # D4RL's environments are all bounded by [-1, 1]
    return Dataset(path, _checked(path, arrays, *bounds), spec, domain, *bounds)


def _read_d4rl(path: str) -> dict[str, np.ndarray]:
    """D4RL's rows as transitions, by the rules at the top of this file."""
    import h5py

    names = ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations")
    try:
        with h5py.File(path, "r") as file:
            keys = list(file)
            raw = {name: file[name][()] for name in names if isinstance(file.get(name), h5py.Dataset)}
    except FileNotFoundError:
        raise UsageError(f"there is no file {path}") from None
    except (OSError, RuntimeError, ValueError) as error:
        raise UsageError(f"{path} is damaged or is not an HDF5 file ({one_line(error)})") from None
    if missing := [name for name in names[:4] if name not in raw]:
        raise UsageError(f"{path} has no array {missing[0]}, as D4RL's files have; it has {', '.join(keys) or 'none'}")
    size = raw["rewards"].size
    for name, array in raw.items():
        if array.shape[:1] != (size,) or (name in ("terminals", "timeouts") and array.size != size):
            raise UsageError(f"{path}: {name} has shape {list(array.shape)}, it must have one row for each reward")
    terminal = raw["terminals"].astype(bool).reshape(-1)
    timeout = raw["timeouts"].astype(bool).reshape(-1) if "timeouts" in raw else np.zeros(size, bool)
    if "timeouts" not in raw:  # the rows that are the 1,000th of their episode
        starts = np.append(0, np.flatnonzero(terminal) + 1)
        for start, end in zip(starts, np.append(starts[1:], size), strict=True):
            timeout[start + 999 : end : 1000] = True
    following, truncation, keep = raw.get("next_observations"), timeout & ~terminal, np.ones(size, bool)
    if following is None:
        following = np.roll(raw["observations"], -1, axis=0)
        following[terminal] = raw["observations"][terminal]
        keep = ~timeout
        keep[-1:] &= terminal[-1:]
        # The row before a dropped one is the last of its episode, unless it is the last of the one before.
        before = np.flatnonzero(~keep) - 1
        before = before[before >= 0]
        truncation = np.zeros(size, bool)
        truncation[before] = ~(terminal | timeout)[before]
    columns = (raw["observations"], raw["actions"], raw["rewards"], following, terminal, truncation)
    return {name: column[keep] for name, column in zip(Transitions._fields, columns, strict=True)}


def datasets_root() -> Path:
    """Minari's directory of datasets; it need not exist. UsageError where there is no home directory."""
    root = os.path.expanduser(os.environ.get("MINARI_DATASETS_PATH") or "~/.minari/datasets")
    if root.startswith("~"):
        raise UsageError("there is no home directory for datasets; set MINARI_DATASETS_PATH to a directory")
    return Path(root)


def ensure(dataset_id: str) -> Path:
    """Directory of the Minari dataset, with its files in `data`; collected or downloaded when missing.

    UsageError, in one line, for what is no id, and for a set that is missing and cannot be had.
    """
    import minari
    from minari.dataset.minari_dataset import parse_dataset_id

    directory, elsewhere = (
        datasets_root() / dataset_id,
        "offax/... sets need no network (python -m benchmarks.datasets)",
    )
    try:
        parse_dataset_id(dataset_id)
        if dataset_id.startswith("offax/"):  # the builder is no part of what a copied algorithm needs
            return importlib.import_module("benchmarks.offax_sets").ensure(dataset_id)
    except ValueError:
        raise UsageError(
            f"{dataset_id!r} is neither a Minari id like offax/hopper/medium-v0 nor .npz or .hdf5"
        ) from None
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("benchmarks"):
            raise
        elsewhere = f"run `python -m benchmarks.datasets build {dataset_id}` in a clone of Offax"
    if not (directory / "data" / "metadata.json").exists():
        if dataset_id.startswith("offax/") or not _server_answers():
            raise UsageError(f"{dataset_id} is not in {datasets_root()} and cannot be had from here; {elsewhere}")
        try:
            minari.download_dataset(dataset_id)
        except Exception as error:  # Minari's, its storage backends' and the system's
            raise UsageError(f"cannot download {dataset_id}: {one_line(error)}; {elsewhere}") from None
    return directory


def _server_answers() -> bool:
    """Whether Minari's server answers within seconds; asked in a thread, as nothing bounds a name look-up."""
    google = os.environ.get("MINARI_REMOTE", "hf://").startswith("gcp")
    url = "https://storage.googleapis.com" if google else os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    answered = threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=NETWORK_SECONDS).close()
        except Exception as error:  # an HTTP status is an answer all the same
            if not isinstance(error, urllib.request.HTTPError):
                return
        answered.set()

    threading.Thread(target=ask, daemon=True).start()
    return answered.wait(NETWORK_SECONDS)


def _load_minari(dataset_id: str) -> Dataset:
    import h5py
    import minari
    from minari.serialization import deserialize_space, serialize_space

    data = ensure(dataset_id) / "data"
    columns: dict[str, list[np.ndarray]] = {name: [] for name in Transitions._fields}
    try:
        metadata = json.loads((data / "metadata.json").read_text())
        names = ("observation_space", "action_space")
        if not all(name in metadata for name in names):  # they are the environment's
            whole = minari.MinariDataset(data)
            metadata |= {name: serialize_space(getattr(whole, name)) for name in names}
        bounds = action_bounds(dataset_id, *(deserialize_space(metadata[name]) for name in names))[1:]
        if metadata["data_format"] == "hdf5":  # read directly, several times faster than by Minari's iterator
            with h5py.File(data / "main_data.hdf5", "r") as file:
                for i in range(metadata["total_episodes"]):
                    _append(columns, file[f"episode_{i}"], json.loads(metadata[names[0]]), f"{dataset_id} episode {i}")
        else:
            for i, episode in enumerate(minari.MinariDataset(data).iterate_episodes()):
                _append(columns, vars(episode), json.loads(metadata[names[0]]), f"{dataset_id} episode {i}")
        arrays = {name: np.concatenate(parts or [np.zeros(0)]) for name, parts in columns.items()}
    except ImportError as error:  # Minari's other formats have their own dependencies
        raise UsageError(f"{dataset_id}: {error}") from None
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, NotImplementedError) as error:
        again = "delete its directory to have it made or downloaded again"
        raise UsageError(f"{dataset_id} is damaged: {data} cannot be read ({one_line(error)}); {again}") from None
    text, spec = metadata.get("eval_env_spec") or metadata.get("env_spec"), None
    known = {field.name for field in fields(gym.envs.registration.EnvSpec) if field.init}  # others are of old versions
    try:
        if text is not None:
            stored = {key: value for key, value in json.loads(text).items() if key in known}
            spec = gym.envs.registration.EnvSpec.from_json(json.dumps(stored))
    except Exception as error:  # what from_json raises is not documented; the data are usable without
        print(f"the dataset's environment cannot be restored ({one_line(error)})", file=sys.stderr)
    return Dataset(dataset_id, _checked(dataset_id, arrays, *bounds), spec, domain_of(spec and spec.id), *bounds)


def _flatten(space: dict[str, Any], value: Any) -> np.ndarray:
    """`[steps, size]` from arrays, or from (nested) mappings or tuples of arrays, h5py's included, as the JSON says."""
    if space["type"] == "Box":
        return value[()]
    children = space["subspaces"].items() if space["type"] == "Dict" else enumerate(space["subspaces"])
    indexed = space["type"] == "Tuple" and isinstance(value, Mapping)
    return np.concatenate([_flatten(c, value[f"_index_{k}" if indexed else k]) for k, c in children], axis=1)


def _append(columns: dict[str, list[np.ndarray]], episode: Any, space: dict[str, Any], name: str) -> None:
    """Add the rows of one of Minari's episodes to each column."""
    observations = _flatten(space, episode["observations"]).astype(np.float32)
    values = {field: np.array(episode[field][()]) for field in ("actions", "rewards", "terminations", "truncations")}
    steps = len(values["rewards"])
    found = {field: len(value) for field, value in values.items()} | {"observations": len(observations) - 1}
    if odd := [field for field, rows in found.items() if rows != steps]:
        raise UsageError(f"{name} is malformed: {odd[0]} has rows for {found[odd[0]]} steps and rewards for {steps}")
    if steps:
        values["truncations"][-1] |= not (values["terminations"][-1] or values["truncations"][-1])
        values |= {"observations": observations[:-1], "next_observations": observations[1:]}
        for field, value in values.items():
            columns[field].append(value)
