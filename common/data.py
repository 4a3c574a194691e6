"""Datasets as flat arrays: Minari's, `offax/...` among them, a `.npz` of one's own, or D4RL's `.hdf5`.

* Minari: every step has its true successor, the last one of a truncated episode too; an episode without a flag at its
  end is marked truncated. Dictionaries are flattened.
* `.npz`: the arrays of `Transitions` by their names, and perhaps a text `env`; without `truncations`, an episode that
  ended by a time limit is joined to the next one.
* `.hdf5`: D4RL's names. Without `next_observations` the successor is the next row, so rows with a timeout and an
  unfinished last row are dropped, as by D4RL, and the row before is marked truncated; a terminal row stays.
"""

import contextlib
import copy
import hashlib
import importlib
import json
import os
import re
import sys
import threading
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from common.cli import FILES, UsageError, one_line
from common.environments import REFERENCE_RETURNS, action_bounds, domain_of, make_raw, normalized_score
from common.replay import Transitions, episode_returns

NETWORK_SECONDS = 3.0


@dataclass(frozen=True)
class Dataset:
    """Flat transitions, and what they were recorded in.

    `transitions` holds numpy float32 arrays; actions were rescaled to [-1, 1] from `low, high [action_dim]`.
    `env_spec`, a gymnasium id or EnvSpec, is what to evaluate in; `domain` the family of D4RL's reference returns.
    """

    id: str
    transitions: Transitions
    env_spec: Any
    domain: str | None
    low: np.ndarray
    high: np.ndarray

    def describe(self) -> dict[str, Any]:
        """What config.json says of it; `dataset_sha256` tells two datasets of one name apart."""
        t, returns = self.transitions, episode_returns(self.transitions)
        hashed = b"".join(map(np.ndarray.tobytes, (t.observations[:1000], *t[1:3], *t[4:])))
        summary: dict[str, Any] = {"episodes": len(returns)}
        if len(returns):
            scores = normalized_score(self.domain, returns)
            summary |= {name: float(getattr(returns, name)()) for name in ("mean", "min", "max")}
            summary["score_mean"] = None if scores is None else float(scores.mean())
        about = {"environment": getattr(self.env_spec, "id", self.env_spec), "transitions": len(t.rewards)}
        return about | {"dataset_sha256": hashlib.sha256(hashed).hexdigest()[:16], "dataset_returns": summary}


def load(id_or_path: str, env: str | None = None, only_env: bool = False) -> Dataset:
    """Read a dataset; `offax/...` is collected and any other Minari id downloaded when missing.

    `env` is what to evaluate in, instead of the dataset's own. With `only_env` and an `env`, as to train online from
    scratch, nothing is read and there are no rows. UsageError for a dataset that is not there or cannot be used.
    """
    if only_env and env is not None:
        obs_dim, low, high = _spaces(env)
        shapes = [(0, obs_dim), (0, len(low)), (0,), (0, obs_dim), (0,), (0,)]
        return Dataset("none", Transitions(*(np.zeros(x, np.float32) for x in shapes)), env, domain_of(env), low, high)
    path = os.path.expanduser(id_or_path)
    if not path.lower().endswith(FILES):
        found = _load_minari(id_or_path)
    elif not Path(path).is_file():
        raise UsageError(f"there is no file {path}")
    else:
        found = _load_npz(path, env) if path.lower().endswith(".npz") else _load_d4rl(path, env)
    spec = env or found.env_spec
    if spec is None:
        raise UsageError(f"{id_or_path} does not name its environment; pass --env ID")
    obs_dim, low, high = _spaces(spec)
    ours = (found.transitions.observations.shape[1], found.low.tolist(), found.high.tolist())
    if obs_dim != ours[0] or low.shape != found.low.shape or not np.allclose((low, high), ours[1:]):
        theirs = f"environment {getattr(spec, 'id', spec)} has {obs_dim} and {low.tolist()} to {high.tolist()}"
        mine = f"{id_or_path} has {ours[0]} observations and actions from {ours[1]} to {ours[2]}"
        raise UsageError(f"{mine}, {theirs}; choose another --env")
    return replace(found, env_spec=spec, domain=domain_of(env) if env else found.domain)


def _spaces(spec: Any) -> tuple[int, np.ndarray, np.ndarray]:
    made = make_raw(spec)
    try:
        if made.spec is None or made.spec.max_episode_steps is None:
            print("no time limit: episodes end after 10,000 steps, or --max-episode-steps", file=sys.stderr)
        return action_bounds(f"environment {getattr(spec, 'id', spec)}", made.observation_space, made.action_space)
    finally:
        made.close()


def _checked(name: str, arrays: Mapping[str, np.ndarray], low: np.ndarray, high: np.ndarray) -> Transitions:
    """The arrays as float32 transitions with actions rescaled to [-1, 1]; UsageError in one line if they are unfit."""
    out, size = {}, arrays["rewards"].size
    for field in Transitions._fields:
        array, rank = arrays[field], 1 + field.endswith(("observations", "actions"))
        if array.dtype.kind not in "fiub" or array.ndim != rank or len(array) != size or not array.size:
            wanted = f"numbers [{size or 'rows'}{', width' * (rank - 1)}]"
            raise UsageError(f"{name}: {field} is {array.dtype} {list(array.shape)}, it must be {wanted}")
        with np.errstate(over="ignore"):
            out[field] = np.ascontiguousarray(array, np.float32)
        if not np.isfinite(np.sum(out[field], dtype=np.float64)):  # a sum of float32 cannot overflow: exact and fast
            row = np.isfinite(out[field]).reshape(size, -1).all(axis=1).argmin()
            raise UsageError(f"{name}: {field} has NaN or infinity, first in row {row}; remove those episodes")
        if field in ("terminations", "truncations") and not np.isin(array, (0, 1)).all():
            row = np.isin(array, (0, 1)).argmin()
            raise UsageError(f"{name}: {field} must be 0 or 1, row {row} is {array[row]}")
    if out["observations"].shape != out["next_observations"].shape or out["actions"].shape[1:] != low.shape:
        shapes = ", ".join(f"{field} {list(array.shape)}" for field, array in out.items())
        raise UsageError(f"{name}: the environment takes {len(low)} actions; shapes do not fit: {shapes}")
    actions, margin = out["actions"], 1e-5 * (high - low)  # float32 copies of float64 actions
    if len(outside := np.argwhere((actions < low - margin) | (actions > high + margin))):
        row, i = outside[0]
        found = f"in row {row}: {actions[row, i]:.6g} is not in [{low[i]:.6g}, {high[i]:.6g}]"
        raise UsageError(f"{name}: actions are out of bounds, first {found}; clip them if that is what was executed")
    if np.any(low != -1.0) or np.any(high != 1.0):
        actions = 2.0 * (actions - low) / (high - low) - 1.0
    return Transitions(**out | {"actions": np.clip(actions, -1.0, 1.0).astype(np.float32, copy=False)})


def _bounds(env: str | None, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    ones = np.ones(actions.shape[1:2], np.float32)
    return _spaces(env)[1:] if env else (-ones, ones)


def read_npz(path: str) -> dict[str, np.ndarray]:
    """The arrays of an .npz by name; UsageError in one line where that fails."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except Exception as error:  # a flipped byte may surface as nearly anything, down in zipfile or numpy
        what = "holds pickled objects, which are never loaded," if "pickle" in str(error).lower() else "is damaged"
        raise UsageError(f"{path} {what} or is no .npz ({one_line(error)}); numpy.savez of arrays makes one") from None


def _load_npz(path: str, env: str | None) -> Dataset:
    arrays = read_npz(path)
    arrays.setdefault("truncations", np.zeros(np.shape(arrays.get("rewards")), np.float32))
    if missing := [name for name in Transitions._fields if name not in arrays]:
        raise UsageError(f"{path} has no array {missing[0]}; it has {', '.join(arrays)}")
    env = env or (str(arrays["env"]) if "env" in arrays else None)
    bounds = _bounds(env, arrays["actions"])
    return Dataset(path, _checked(path, arrays, *bounds), env, domain_of(env), *bounds)


def _load_d4rl(path: str, env: str | None) -> Dataset:
    import h5py

    names = ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations")
    try:
        with h5py.File(path, "r") as file:
            raw = {name: file[name][()] for name in names if isinstance(file.get(name), h5py.Dataset)}
    except (OSError, RuntimeError, ValueError) as error:
        raise UsageError(f"{path} is damaged or is not an HDF5 file ({one_line(error)})") from None
    if missing := [name for name in names[:5] if name not in raw]:
        raise UsageError(
            f"{path} has no array {missing[0]}, as D4RL's files have from version 1 on; it has {list(raw)}"
        )
    size = raw["rewards"].size
    if odd := [name for name, x in raw.items() if x.shape[:1] != (size,) or (name in names[3:5] and x.size != size)]:
        raise UsageError(f"{path}: {odd[0]} has shape {list(raw[odd[0]].shape)}, it must have one row for each reward")
    terminal, timeout = (raw[name].astype(bool).reshape(-1) for name in names[3:5])
    following, truncation, keep = raw.get(names[5]), timeout & ~terminal, np.ones(size, bool)
    if following is None:
        following = np.roll(raw["observations"], -1, axis=0)
        following[terminal] = raw["observations"][terminal]
        keep = ~timeout
        keep[-1:] &= terminal[-1:]
        # The row before a dropped one is the last of its episode, unless it is the last of the one before.
        before = np.flatnonzero(~keep) - 1
        truncation = np.zeros(size, bool)
        truncation[before[before >= 0]] = ~(terminal | timeout)[before[before >= 0]]
    columns = (*(raw[name] for name in names[:3]), following, terminal, truncation)
    arrays = {name: column[keep] for name, column in zip(Transitions._fields, columns, strict=True)}

    spec, stem = env, re.sub("ant_?maze", "antmaze", Path(path).stem.lower())
    domain = next((name for name in REFERENCE_RETURNS if re.match(rf"{name}(?![a-z])(?!.*maze2d.*dense)", stem)), None)
    domain = "kitchen" if "kitchen" in stem else None if "maze2d" in stem and "dense" in stem else domain
    if env is None and domain in ("halfcheetah", "hopper", "walker2d", "ant"):
        # D4RL's own environments are version 2; version 4 has their observations and rewards.
        name = "HalfCheetah" if domain == "halfcheetah" else domain.capitalize()
        spec = copy.deepcopy(gym.spec(f"{name}-v4"))
        if domain == "ant" and arrays["observations"].shape[1:] == (111,):
            spec.kwargs["use_contact_forces"] = True  # as D4RL's Ant had them
    bounds = _bounds(env, arrays["actions"])  # D4RL's environments are all bounded by [-1, 1]
    return Dataset(path, _checked(path, arrays, *bounds), spec, domain, *bounds)


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

    directory, ours = datasets_root() / dataset_id, dataset_id.startswith("offax/")
    advice = "offax/... sets need no network: python -m benchmarks.datasets list"
    try:
        parse_dataset_id(dataset_id)
        if ours:  # the builder is no part of what a copied algorithm needs
            return importlib.import_module("benchmarks.offax_sets").ensure(dataset_id)
    except (ValueError, TypeError):  # the latter for an id without a version
        raise UsageError(f"{dataset_id!r} is neither a Minari id like offax/hopper/medium-v0, .npz nor .hdf5") from None
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("benchmarks"):
            raise
        advice = f"run `python -m benchmarks.datasets build {dataset_id}` in a clone of Offax"
    if not (directory / "data" / "metadata.json").exists():
        if ours or not _server_answers():
            raise UsageError(f"{dataset_id} is not in {datasets_root()} and cannot be had from here; {advice}")
        try:
            minari.download_dataset(dataset_id)
        except Exception as error:  # Minari's, its storage backends' and the system's
            raise UsageError(f"cannot download {dataset_id}: {one_line(error)}; {advice}") from None
    return directory


def _server_answers() -> bool:
    """Whether Minari's server answers within seconds; asked in a thread, as nothing bounds a name look-up."""
    url, answered = os.environ.get("HF_ENDPOINT", "https://huggingface.co"), threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(url, timeout=NETWORK_SECONDS).close()
        except OSError as error:
            if not isinstance(error, urllib.request.HTTPError):  # which is an answer all the same
                return
        answered.set()

    threading.Thread(target=ask, daemon=True).start()
    return answered.wait(NETWORK_SECONDS)


def _load_minari(dataset_id: str) -> Dataset:
    import h5py
    from minari.serialization import deserialize_space

    data, spec = ensure(dataset_id) / "data", None
    columns: dict[str, list[np.ndarray]] = {name: [] for name in Transitions._fields}
    try:
        metadata = json.loads((data / "metadata.json").read_text())
        names = ("observation_space", "action_space")
        bounds = action_bounds(dataset_id, *(deserialize_space(metadata[name]) for name in names))[1:]
        space = json.loads(metadata[names[0]])  # which keeps the order of the environment's own
        with h5py.File(data / "main_data.hdf5", "r") as file:  # several times faster than Minari's iterator
            for i in range(metadata["total_episodes"]):
                _append(columns, file[f"episode_{i}"], space, f"{dataset_id} episode {i}")
        arrays = {name: np.concatenate(parts or [np.zeros(0)]) for name, parts in columns.items()}
        if text := metadata.get("eval_env_spec") or metadata.get("env_spec"):
            known = {field.name for field in fields(gym.envs.registration.EnvSpec) if field.init}  # of this version
            stored = {key: value for key, value in json.loads(text).items() if key in known}
            with contextlib.suppress(Exception):  # whatever it raises: --env may name another one
                spec = gym.envs.registration.EnvSpec.from_json(json.dumps(stored))
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, NotImplementedError) as error:
        again = "delete its directory to have it made or downloaded again"
        raise UsageError(f"{dataset_id} cannot be read from {data} ({one_line(error)}); if damaged, {again}") from None
    return Dataset(dataset_id, _checked(dataset_id, arrays, *bounds), spec, domain_of(spec and spec.id), *bounds)


def _flatten(space: dict[str, Any], value: Any) -> np.ndarray:
    """`[steps, size]` from arrays, or from (nested) groups of arrays, as the JSON of the space says."""
    if space["type"] == "Box":
        return value[()]
    children = space["subspaces"].items() if space["type"] == "Dict" else enumerate(space["subspaces"])
    index = "_index_{}" if space["type"] == "Tuple" else "{}"
    return np.concatenate([_flatten(child, value[index.format(key)]) for key, child in children], axis=1)


def _append(columns: dict[str, list[np.ndarray]], episode: Any, space: dict[str, Any], name: str) -> None:
    """Add the rows of one of Minari's episodes to each column."""
    observations = _flatten(space, episode["observations"]).astype(np.float32)
    values = {field: episode[field][()] for field in ("actions", "rewards", "terminations", "truncations")}
    steps = len(values["rewards"])
    if odd := [field for field, x in (values | {"observations": observations[1:]}).items() if len(x) != steps]:
        raise UsageError(f"{name} is malformed: {odd[0]} has not one row for each of {steps} rewards, or one more")
    if steps:
        values["truncations"][-1] |= not values["terminations"][-1]
        values |= {"observations": observations[:-1], "next_observations": observations[1:]}
        for field, value in values.items():
            columns[field].append(value)
