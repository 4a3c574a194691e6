"""Datasets as flat arrays: an `.npz` of one's own, or whatever `benchmarks/sources.py` reads, where there is one."""

import hashlib
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.cli import UsageError, optional
from common.environments import LONGEST_EPISODE, action_bounds, make_raw
from common.replay import Recorded, Transitions, empty_ring, record
from common.report import read_npz


@dataclass(frozen=True)
class Dataset:
    """Flat transitions, and what they were recorded in."""

    id: str
    transitions: Recorded  # of numpy arrays
    env_spec: Any  # gymnasium id or EnvSpec of what to evaluate in
    low: np.ndarray  # actions were rescaled to [-1, 1] from low to high, [action_dim] each
    high: np.ndarray

    def describe(self) -> dict[str, Any]:
        """What config.json says of it; `dataset_sha256` tells two datasets of one name apart."""
        t, families = self.transitions, optional("benchmarks.families")
        about = {"environment": getattr(self.env_spec, "id", self.env_spec), "transitions": len(t.rewards)}
        about |= {"action_low": self.low.tolist(), "action_high": self.high.tolist()}
        hashed = b"".join(map(np.ndarray.tobytes, (t.observations[:1000], t.actions, t.rewards, *t[-2:])))
        about |= {"dataset_sha256": hashlib.sha256(hashed).hexdigest()[:16]}
        return about | ({"dataset_returns": families.returns_of_data(self.env_spec, t)} if families else {})


def load(id_or_path: str, env: str | None = None, only_env: bool = False) -> Dataset:
    """Read a dataset (`benchmarks/sources.py` collects or downloads a missing one), to evaluate in `env` or in its own.

    With `only_env` and an `env`, for online training from scratch, nothing is read and the dataset has no rows.
    UsageError for a dataset that is not there or cannot be used.
    """
    if only_env and env is not None:
        obs_dim, low, high = spaces_of(env, announce=True)
        no_rows = map(np.asarray, empty_ring(0, obs_dim, len(low)).data)
        return Dataset("none", record(Transitions(*no_rows)), env, low, high)
    path = os.path.expanduser(id_or_path)
    if (sources := optional("benchmarks.sources")) is not None:
        found = sources.load(path, env)
    elif path.lower().endswith(".npz") and ("+" not in path or os.path.exists(path)):
        found = load_npz(path, env)
    else:
        how = "copy benchmarks/ too, or make one in a clone of Offax: python -m benchmarks.datasets export"
        raise UsageError(f"{path} is not one .npz, the only thing read without the rest of Offax; {how} {path}")
    if (spec := found.env_spec) is None:
        raise UsageError(f"{path} does not name its environment; pass --env ID")
    ours, theirs = (found.transitions.observations.shape[1], found.low, found.high), spaces_of(spec, announce=True)
    if not all(np.shape(x) == np.shape(y) and np.allclose(x, y) for x, y in zip(ours, theirs, strict=True)):
        what = "{} has {} observations and actions from {} to {}".format
        mine, other = ([x[0], x[1].tolist(), x[2].tolist()] for x in (ours, theirs))
        raise UsageError(f"{what(found.id, *mine)}, {what(getattr(spec, 'id', spec), *other)}; choose another --env")
    return found


def spaces_of(spec: Any, announce: bool = False) -> tuple[int, np.ndarray, np.ndarray]:
    """`(obs_dim, low, high)` of the environment `spec` (id or EnvSpec); `announce`: tell if it has no time limit."""
    with make_raw(spec) as made:
        if announce and (made.spec is None or made.spec.max_episode_steps is None):
            print(f"no time limit: episodes end at {LONGEST_EPISODE:,} steps, or --max-episode-steps", file=sys.stderr)
        return action_bounds(f"environment {getattr(spec, 'id', spec)}", made.observation_space, made.action_space)


def check(name: str, arrays: Mapping[str, np.ndarray], low: np.ndarray, high: np.ndarray) -> Recorded:
    """The arrays as float32 transitions with actions rescaled to [-1, 1]; UsageError in one line if they are unfit.

    Without `truncations`, episodes end where a row's next observation is not the following row's observation.
    """
    out, size = {}, arrays["rewards"].size
    for field in Transitions._fields:
        array, rank = arrays.get(field, np.zeros(size)), 2 if field.endswith(("observations", "actions")) else 1
        if array.dtype.kind not in "fiub" or array.ndim != rank or len(array) != size or not array.size:
            wanted = f"numbers [{size or 'rows'}{', width' if rank == 2 else ''}], a row for each reward"
            raise UsageError(f"{name}: {field} is {array.dtype} {list(array.shape)}, it must be {wanted}")
        with np.errstate(over="ignore"):
            out[field] = np.ascontiguousarray(array, np.float32)
        if not np.isfinite(np.sum(out[field], dtype=np.float64)):  # a float64 sum of float32 cannot overflow
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
        where = f"in row {row}: {actions[row, i]:.6g} is not in [{low[i]:.6g}, {high[i]:.6g}]"
        how = "pass the --env that takes them, or clip them if that is what was executed"
        raise UsageError(f"{name}: actions are out of bounds, first {where}; {how}")
    if np.any(low != -1.0) or np.any(high != 1.0):
        actions = 2.0 * (actions - low) / (high - low) - 1.0
    found = record(Transitions(**out | {"actions": np.clip(actions, -1.0, 1.0).astype(np.float32, copy=False)}))
    cut = (found.successors >= size) & ~np.logical_or(found.terminations, found.truncations)
    if "truncations" not in arrays:
        found = found._replace(truncations=cut.astype(np.float32))
        print(f"{name} has no truncations: {cut.sum()} found, where rows do not follow each other", file=sys.stderr)
    elif wrong := cut[:-1].sum():
        what = "rows are not followed by their next observation, and neither terminate nor are truncated"
        print(f"{name}: {wrong} {what}; episodes, and their returns, run on there", file=sys.stderr)
    return found


def bounds_of(env: str | None, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest action of the environment, or -1 and 1 of `actions [rows, action_dim]` without one."""
    ones = np.ones(actions.shape[1:2], np.float32)
    return spaces_of(env)[1:] if env else (-ones, ones)


def load_npz(path: str, env: str | None) -> Dataset:
    """Read an .npz: the arrays of `Transitions` by their names, perhaps without `truncations`, and a text `env`."""
    arrays = read_npz(path, needed=Transitions._fields[:-1])
    env = env or next(iter(np.ravel(arrays.get("env", [])).astype(str)), None)
    bounds = bounds_of(env, arrays["actions"])
    return Dataset(path, check(path, arrays, *bounds), env, *bounds)
