"""What a run leaves behind: files written whole or not at all, where it came from, and the policy."""

import contextlib
import csv
import dataclasses
import fcntl
import importlib.metadata
import io
import itertools
import json
import os
import platform
import re
import subprocess
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.tree_util import keystr

from common.cli import UsageError, one_line
from common.environments import width_of
from common.members import evaluation_keys, is_key
from common.replay import Transform

Policy = Callable[[np.ndarray], np.ndarray]


def write_atomically(path: Path, write: Callable[[Any], Any]) -> None:
    """Call `write(file)` on a temporary file beside `path`, fsync it and rename it over `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        directory = os.open(path.parent, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON; numbers that are not finite become null."""
    finite = json.loads(json.dumps(content), parse_constant=lambda name: None)
    write_atomically(path, lambda file: file.write((json.dumps(finite, indent=2) + "\n").encode()))


def claim(path: Path, resume: bool) -> Any:
    """Make the run directory, and hold it until the returned lock is closed or the process ends.

    UsageError if another process holds it, or if it has another run that is not to be resumed.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = open(path / ".lock", "w")  # noqa: SIM115
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(f"another process is writing to {path}; use another --run-dir") from None
    except OSError as error:
        raise UsageError(f"run directory {path}: {error.strerror}; it must be a directory to write to") from None
    if not resume and any((path / name).exists() for name in ("config.json", "metrics.csv")):
        raise UsageError(f"{path} holds a run; --resume True goes on with it, or starts anew without a checkpoint")
    return lock


def read_json(path: Path) -> dict[str, Any]:
    """A record that a run wrote; UsageError if it is none."""
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        raise UsageError(f"there is no {path}: no run has come so far") from None
    except (ValueError, TypeError):
        raise UsageError(f"{path} is damaged") from None


def append_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Add whole rows to the CSV at `path`; its first row fixes the columns, None is an empty cell."""
    with open(path, "a+", newline="") as file:
        file.seek(0)
        columns, text = next(csv.reader(file), None), io.StringIO()
        writer = csv.DictWriter(text, columns or list(rows[0]), lineterminator="\n", extrasaction="ignore")
        if columns is None:
            writer.writeheader()
        writer.writerows({k: f"{v:.7g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
        file.write(text.getvalue())


def read_npz(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz by name; UsageError in one line where that fails."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}  # reading a member verifies its CRC
    except Exception as error:  # a flipped byte may surface as nearly anything, down in zipfile or numpy
        what = "holds pickled objects, which are never loaded," if "pickle" in str(error).lower() else "is damaged"
        raise UsageError(f"{path} {what} or is no .npz ({one_line(error)}); numpy.savez of arrays makes one") from None


def save_tree(path: Path, tree: Any, metadata: dict[str, Any]) -> None:
    """Write every leaf of `tree` by its name, random keys as data, and `metadata` (JSON) to the `.npz` at `path`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    arrays = {keystr(name): np.asarray(jax.random.key_data(x) if is_key(x) else x) for name, x in leaves}
    save_arrays(path, arrays, metadata)


def save_arrays(path: Path, arrays: dict[str, np.ndarray], metadata: dict[str, Any]) -> None:
    """Write arrays by their names as `save_tree` does the leaves of a tree."""
    about = np.frombuffer(json.dumps(metadata).encode(), np.uint8)
    write_atomically(path, lambda file: np.savez(file, **arrays, metadata=about))


def read_tree(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Leaves by name, and metadata, of what `save_tree` wrote; UsageError if it is missing or damaged."""
    if not path.exists():
        raise UsageError(f"no checkpoint at {path}")
    arrays = read_npz(path)
    try:
        return arrays, dict(json.loads(arrays.pop("metadata").tobytes()))
    except (KeyError, TypeError, ValueError):
        raise UsageError(f"{path} is damaged or is not a checkpoint (its metadata)") from None


def fill_tree(path: Path, arrays: dict[str, np.ndarray], like: Any, prefix: str = "") -> Any:
    """A tree like `like`, of arrays or shapes, from the leaves under `prefix`; UsageError if theirs are others."""
    wanted = jax.tree.map(lambda x: jax.eval_shape(jax.random.key_data, x) if is_key(x) else x, like)
    shapes = {prefix + keystr(name): (x.shape, x.dtype) for name, x in jax.tree_util.tree_leaves_with_path(wanted)}
    found = {k: (x.shape, x.dtype) for k, x in arrays.items() if re.match(re.escape(prefix) + r"(?!\w)", k)}
    if odd := [name for name in sorted(shapes | found) if shapes.get(name) != found.get(name)]:
        (shape, dtype), (want, kind) = found.get(odd[0], ("nothing", "")), shapes.get(odd[0], ("nothing", ""))
        what = f"{odd[0]} is {dtype}{shape} instead of {kind}{want}"
        raise UsageError(f"checkpoint {path} is of another kind of run: {what}")

    def fill(name: Any, leaf: Any) -> Any:
        array = arrays[prefix + keystr(name)]
        return jax.random.wrap_key_data(array) if is_key(leaf) else array

    return jax.tree_util.tree_map_with_path(fill, like)


def provenance() -> dict[str, Any]:
    """What made a result: package versions, git commit (and whether tracked code differs from it), processor."""

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None

    packages = [p for p in ("jax", "jaxlib", "flax", "optax", "numpy", "gymnasium", "mujoco", "minari") if find_spec(p)]
    changes = git("status", "--porcelain", "--untracked-files=no", "--", ":(top)*.py")
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    return {
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages},
        "git_commit": git("rev-parse", "HEAD"),
        "git_dirty": None if changes is None else bool(changes),
        "cpu": {"model": model[1] if model else platform.processor(), "cores": os.cpu_count()},
    }


def load_policy(run_dir: str | Path, member: int = 0, sample: bool = False, best: bool = False) -> Policy:
    """The trained policy: raw observations `[obs_dim]` or `[batch, obs_dim]` to actions in the environment's own range.

    It acts as in the final evaluation, whose returns it repeats to the last digit, or with `sample` as to collect data;
    `best` is what --keep-best kept. The algorithm's file is imported, as `<name>`, `algorithms.<name>` or
    `benchmarks.<name>`. UsageError for a directory without a checkpoint and a member that is not in it.
    """
    from gymnasium.spaces import Box
    from gymnasium.wrappers.utils import rescale_box

    path, script = Path(run_dir), None
    config = read_json(path / "config.json")
    arrays, about = read_tree(path / "checkpoint" / ("best.npz" if best else "state.npz"))
    numbers = [entry["member"] for entry in config["members"]]
    if member not in numbers:
        raise UsageError(f"{path} has no member {member}; it has {numbers}")
    for package in ("", "algorithms.", "benchmarks."):  # first of all the copy beside the script
        with contextlib.suppress(ModuleNotFoundError):
            script = script or importlib.import_module(package + config["algorithm"])
    if script is None:
        raise UsageError(f"there is no {config['algorithm']}.py to import, which {path} was trained by")
    row, transform = numbers.index(member), Transform(*map(np.asarray, config["transform"].values()))
    low, high = (np.array(config[f"action_{end}"], np.float32) for end in ("low", "high"))
    hp = script.Hyperparameters(**config["members"][row]["hyperparameters"])
    flags = {f.name: config["flags"][f.name] for f in dataclasses.fields(script.Args) if f.name != "hp"}
    args, obs_dim = script.Args(hp=hp, **flags), len(transform.observation_mean)
    init = jax.vmap(lambda key: script.init(key, hp, args, obs_dim, len(low)))
    like = jax.eval_shape(init, jax.random.split(jax.random.key(0), 1))
    own = {name: array[row : row + 1] for name, array in arrays.items() if name.startswith("['state']")}
    state = fill_tree(path, own, {"state": like})["state"]
    seed, steps = config["members"][row]["seed"], about["done"]["offline"] + about["done"]["online"]
    width, count = width_of(args.final_eval_episodes, config["population"]), itertools.count()
    act = jax.jit(jax.vmap(lambda s, x, key: script.act(s, hp, x, key, args, len(low), sample)))
    to_environment = rescale_box(Box(low, high), np.float32(-1.0), np.float32(1.0))[2]

    def policy(observations: np.ndarray) -> np.ndarray:
        batch = np.atleast_2d(transform.observations(np.asarray(observations, np.float32)))
        # The rows that the evaluation had: products of another number of rows differ in the last bits.
        rows = np.concatenate([batch, np.zeros((max(0, width - len(batch)), obs_dim), np.float32)])
        actions = np.asarray(act(state, rows[None], evaluation_keys(np.array([seed]), steps, next(count))))[0]
        return to_environment(actions[: len(batch)] if np.ndim(observations) > 1 else actions[0])

    return policy
