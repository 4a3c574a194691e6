"""Datasets by name or path: `.npz`, Minari's, D4RL's `.hdf5`, OGBench's (see ogbench_sets.py); several joined by "+".

* Minari: downloaded when missing, `offax/...` collected (see offax_sets.py). Every step has its true successor, the
  last one of a truncated episode too; an episode without a flag at its end is marked truncated. Dictionaries are
  flattened.
* `.hdf5`: D4RL's names. Without `next_observations` the successor is the next row, so rows with a timeout and an
  unfinished last row are dropped, as by D4RL, and the row before is marked truncated; a terminal row stays.
"""

import contextlib
import copy
import json
import os
import re
import sys
import threading
import urllib.request
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from benchmarks import offax_sets, ogbench_sets
from benchmarks.families import wrappers_of
from benchmarks.offax_sets import datasets_root
from common.cli import UsageError, env_name, one_line
from common.data import Dataset, bounds_of, check, load_npz
from common.environments import action_bounds
from common.replay import Transitions, record


def load(id_or_path: str, env: str | None) -> Dataset:
    """Read a set, or several joined by "+", got first if missing, to be evaluated in `env` or the (first) set's own.

    UsageError if that cannot be.
    """
    names = [id_or_path] if os.path.exists(id_or_path) else id_or_path.split("+")
    first, *others = (_load(os.path.expanduser(name), env) for name in names)
    if not others:
        return first
    specs = [x.env_spec for x in (first, *others) if x.env_spec is not None]
    ids, wrappers = [getattr(spec, "id", spec) for spec in specs], [wrappers_of(spec) for spec in specs]
    if unlike := [other for other in ids if env_name(other) != env_name(ids[0])]:
        raise UsageError(f"{id_or_path} joins sets of {ids[0]} and {unlike[0]}; if they are of one, name it by --env")
    if unlike := [other for other in wrappers if other != wrappers[0]]:
        lists = [", ".join(x.name for x in some) or "none" for some in (wrappers[0], unlike[0])]
        raise UsageError(f"{id_or_path} joins sets of environments in other wrappers: {lists[0]}, and {lists[1]}")
    made = [(str(name), getattr(spec, "kwargs", {})) for name, spec in zip(ids, specs, strict=True)]
    if not env and (unlike := [other for other in made if other != made[0]]):
        both = " and ".join(f"{name} {kwargs or ''}".strip() for name, kwargs in (made[0], unlike[0]))
        print(f"{id_or_path} joins sets of {both}: evaluated in the first, or in --env", file=sys.stderr)
    for other in others:
        ours, theirs = ((x.transitions.observations.shape[1], x.low.tolist(), x.high.tolist()) for x in (first, other))
        if ours != theirs:
            what = "{0} observations, actions from {1} to {2}".format
            raise UsageError(f"{first.id} has {what(*ours)}, {other.id} has {what(*theirs)}: they cannot be joined")
    for one in (first, *others):  # no episode goes on in the next set
        one.transitions.truncations[-1] = 1.0 - one.transitions.terminations[-1]
    columns = ([getattr(x.transitions, name) for x in (first, *others)] for name in Transitions._fields)
    return replace(first, id=id_or_path, transitions=record(Transitions(*map(np.concatenate, columns))))


def _load(id_or_path: str, env: str | None) -> Dataset:
    if id_or_path.lower().endswith((".hdf5", ".h5")):
        found = load_d4rl(id_or_path, env)
    elif ogbench_sets.recognises(id_or_path):
        return ogbench_sets.load(id_or_path, env)
    elif id_or_path.lower().endswith(".npz"):
        return load_npz(id_or_path, env)
    else:
        ensure(id_or_path)
        found = load_minari(id_or_path)
    return replace(found, env_spec=env) if env else found


def ensure(dataset_id: str) -> Path:
    """Directory of the Minari dataset, with its files in `data`; collected or downloaded when missing.

    UsageError, in one line, for what is no id, and for a set that is missing and cannot be had.
    """
    import minari
    from minari.dataset.minari_dataset import parse_dataset_id

    try:
        parse_dataset_id(dataset_id)
    except (ValueError, TypeError):  # the latter for an id without a version
        raise UsageError(f"{dataset_id!r} is neither a Minari id like offax/hopper/medium-v1, .npz nor .hdf5") from None
    if dataset_id.startswith("offax/"):
        return offax_sets.ensure(dataset_id)
    directory, advice = (
        datasets_root() / dataset_id,
        "offax/... sets need no network: python -m benchmarks.datasets list",
    )
    if _is_whole(directory):
        return directory
    if dataset_id in gym.registry:
        how = f"or learn without any: --env {dataset_id} --num-updates 0 --online-steps 1000000"
        raise UsageError(f"{dataset_id} is an environment; name data, such as offax/hopper/medium-v1, {how}")
    if re.fullmatch(r"[a-z0-9]+(-[a-z]+)+-v[012]", dataset_id):
        what = "is called as D4RL's sets are, which are read from their files: give the path of its .hdf5"
        raise UsageError(f"{dataset_id} {what}; {advice}")
    if not _server_answers():
        raise UsageError(f"{dataset_id} is not in {datasets_root()} and cannot be had from here; {advice}")
    try:
        with offax_sets.building_place(dataset_id, "downloading"):
            if not _is_whole(directory):  # else another process downloaded it while this one waited
                # Unless forced, Minari takes what a download that was cut off left for the set.
                with offax_sets.minari_directory(datasets_root()):
                    minari.download_dataset(dataset_id, force_download=directory.exists())
    except Exception as error:  # Minari's, its storage backends' and the system's
        raise UsageError(f"cannot download {dataset_id}: {one_line(error)}; {advice}") from None
    return directory


def _is_whole(directory: Path) -> bool:
    """Whether all files of a Minari set are there, which are downloaded one by one."""
    metadata, rows = (directory / "data" / name for name in ("metadata.json", "main_data.hdf5"))
    return metadata.exists() and (rows.exists() or '"arrow"' in metadata.read_text())


def load_minari(dataset_id: str) -> Dataset:
    """Read a set that is in Minari's directory; UsageError if it is not, or damaged."""
    import h5py
    from minari.serialization import deserialize_space

    data, spec = datasets_root() / dataset_id / "data", None
    columns: dict[str, list[np.ndarray]] = {name: [] for name in Transitions._fields}
    try:
        metadata = json.loads((data / "metadata.json").read_text())
        if metadata.get("data_format") == "arrow":
            raise UsageError(f"{dataset_id} is stored in Arrow's format; only sets in HDF5 are read")
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
        again = "if it is damaged and not of your own making, delete its directory to have it made or downloaded again"
        raise UsageError(f"{dataset_id} cannot be read from {data} ({one_line(error)}); {again}") from None
    return Dataset(dataset_id, check(dataset_id, arrays, *bounds), spec, *bounds)


def _array(group: Any, name: str) -> np.ndarray:
    """What `group[name][()]` gives in twice the time, which counts where a set has thousands of episodes."""
    import h5py

    stored = h5py.h5d.open(group.id, name.encode())
    array = np.empty(stored.shape, stored.dtype)
    stored.read(h5py.h5s.ALL, h5py.h5s.ALL, array)
    return array


def _flatten(space: dict[str, Any], group: Any, name: str) -> np.ndarray:
    """`[steps, size]` from an array of the group, or from (nested) groups of arrays, as the JSON of the space says."""
    if space["type"] == "Box":
        return _array(group, name)
    children = space["subspaces"].items() if space["type"] == "Dict" else enumerate(space["subspaces"])
    index = "_index_{}" if space["type"] == "Tuple" else "{}"
    return np.concatenate([_flatten(child, group[name], index.format(key)) for key, child in children], axis=1)


def _append(columns: dict[str, list[np.ndarray]], episode: Any, space: dict[str, Any], name: str) -> None:
    """Add the rows of one of Minari's episodes to each column."""
    observations = _flatten(space, episode, "observations").astype(np.float32)
    values = {field: _array(episode, field) for field in ("actions", "rewards", "terminations", "truncations")}
    steps = len(values["rewards"])
    if odd := [field for field, x in (values | {"observations": observations[1:]}).items() if len(x) != steps]:
        raise UsageError(f"{name} is malformed: {odd[0]} has not one row for each of {steps} rewards, or one more")
    if steps:
        if not values["terminations"][-1]:
            values["truncations"][-1] = 1
        values |= {"observations": observations[:-1], "next_observations": observations[1:]}
        for field, value in values.items():
            columns[field].append(value)


def _server_answers() -> bool:
    """Whether Minari's server answers within seconds; asked in a thread, as nothing bounds a name look-up."""
    url, answered = os.environ.get("HF_ENDPOINT", "https://huggingface.co"), threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(url, timeout=offax_sets.NETWORK_SECONDS).close()
        except (OSError, ValueError) as error:  # the latter for an HF_ENDPOINT that is no address
            if not isinstance(error, urllib.request.HTTPError):  # which is an answer all the same
                return
        answered.set()

    threading.Thread(target=ask, daemon=True).start()
    return answered.wait(offax_sets.NETWORK_SECONDS)


def load_d4rl(path: str, env: str | None) -> Dataset:
    """Read a D4RL file; its environment is known by the file's name, if it is of gymnasium's own."""
    import h5py

    if not Path(path).is_file():
        raise UsageError(f"there is no file {path}")
    names = ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations")
    try:
        with h5py.File(path, "r") as file:
            raw = {name: file[name][()] for name in names if isinstance(file.get(name), h5py.Dataset)}
    except (OSError, RuntimeError, ValueError) as error:
        raise UsageError(f"{path} is damaged or is not an HDF5 file ({one_line(error)})") from None
    if missing := [name for name in names[:5] if name not in raw]:
        what = f"{path} has no array {missing[0]}, as D4RL's files have from version 1 on"
        raise UsageError(f"{what}; add it, or make an .npz of {', '.join(raw)}")
    size = raw["rewards"].size
    if odd := [name for name, x in raw.items() if x.shape[:1] != (size,) or (name in names[3:5] and x.size != size)]:
        raise UsageError(f"{path}: {odd[0]} has shape {list(raw[odd[0]].shape)}, it must have one row for each reward")
    terminal, timeout = (raw[name].astype(bool).reshape(-1) for name in names[3:5])
    following, truncation, keep = raw.get(names[5]), timeout & ~terminal, np.ones(size, bool)
    if following is None:
        following = np.roll(raw["observations"], -1, axis=0)
        following[terminal] = raw["observations"][terminal]
        keep = ~timeout | terminal
        keep[-1:] &= terminal[-1:]
        truncation = np.append(~keep[1:], False) & ~terminal  # the row before a dropped one ends its episode
    columns = (*(raw[name] for name in names[:3]), following, terminal, truncation)
    arrays = {name: column[keep] for name, column in zip(Transitions._fields, columns, strict=True)}

    spec, match = None, re.match("(halfcheetah|hopper|walker2d|ant(?![_-]?maze))(?![a-z])", Path(path).stem.lower())
    domain = match[1] if match else None
    if domain:
        # D4RL's own environments are version 2; version 4 has their observations and rewards.
        name = "HalfCheetah" if domain == "halfcheetah" else domain.capitalize()
        spec = copy.deepcopy(gym.spec(f"{name}-v4"))
        if domain == "ant" and arrays["observations"].shape[1:] == (111,):
            spec.kwargs["use_contact_forces"] = True  # as D4RL's Ant had them
    bounds = bounds_of(env, arrays["actions"])  # D4RL's environments are all bounded by [-1, 1]
    return Dataset(path, check(path, arrays, *bounds), spec, *bounds)
