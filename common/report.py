"""What a run leaves behind: files written whole or not at all, tables that grow by rows, and the policy."""

import csv
import dataclasses
import errno
import fcntl
import hashlib
import io
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.tree_util import keystr

from common.cli import UsageError, one_line, optional, say
from common.environments import width_of
from common.members import evaluation_keys, is_key
from common.replay import Transform

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # of a file system that has none, as some clusters'
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
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON; numbers that are not finite become null."""
    finite = json.loads(json.dumps(content, default=str), parse_constant=lambda name: None)
    write_atomically(path, lambda file: file.write((json.dumps(finite, indent=2) + "\n").encode()))


def claim(path: Path, resume: bool) -> Any:
    """Make the run directory and lock it; UsageError if another process has it, or for a run without `resume`."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = open(path / ".lock", "w")  # noqa: SIM115
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(f"another process is writing to {path}; use another --run-dir") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise UsageError(f"run directory {path}: {error.strerror}; it must be a directory to write to") from None
    begun, tables, saved = (any(path.glob(x)) for x in ("config.json", "*.csv", "checkpoint/state.npz"))
    if not resume and (begun or tables or saved):
        raise UsageError(f"{path} holds a run; --resume True continues it, or restarts it if it has no checkpoint")
    if tables and not saved and (not begun or (path / "final.json").exists()):
        raise UsageError(f"{path} has results and no checkpoint to go on from; use another --run-dir")
    return lock


def read_json(path: Path) -> dict[str, Any]:
    """A record that a run wrote; UsageError if it is none."""
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        raise UsageError(f"there is no {path}: no run has got that far") from None
    except (ValueError, TypeError):
        raise UsageError(f"{path} is damaged") from None


def append_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Add whole rows to the CSV at `path`; its first row fixes the columns, None is an empty cell."""
    with open(path, "a+", newline="") as file:
        file.seek(0)
        columns, text = next(csv.reader(file), None), io.StringIO()
        writer = csv.DictWriter(text, columns or list(rows[0]), lineterminator="\n", extrasaction="ignore")
        if lost := sorted(rows[0].keys() - set(writer.fieldnames)):
            say(f"{path.name} is without {lost[0]}: its first row had none, and fixes the columns", sys.stderr)
        if columns is None:
            writer.writeheader()
        writer.writerows({k: f"{v:.7g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
        file.write(text.getvalue())


def read_npz(path: str | Path, needed: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """The arrays of an .npz by name; UsageError in one line where that fails or one that is `needed` is not there."""
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}  # reading a member verifies its CRC
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise UsageError(f"there is no file {path}") from None
    except Exception as error:  # a flipped byte may surface as nearly anything, down in zipfile or numpy
        what = "holds pickled objects, which are never loaded," if "pickle" in str(error).lower() else "is damaged"
        raise UsageError(f"{path} {what} or is no .npz of plain arrays ({one_line(error)})") from None
    if missing := [name for name in needed if name not in found]:
        raise UsageError(f"{path} has no array {missing[0]}; it has {', '.join(found)}")
    return found


def save_tree(path: Path, tree: Any, metadata: dict[str, Any]) -> None:
    """Write every leaf of `tree` by its name, random keys as data, and `metadata` (JSON) to the `.npz` at `path`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    arrays = {keystr(name): np.asarray(jax.random.key_data(x) if is_key(x) else x) for name, x in leaves}
    about = np.frombuffer(json.dumps(metadata).encode(), np.uint8)
    write_atomically(path, lambda file: np.savez(file, **arrays, metadata=about))


def read_tree(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Leaves by name, and metadata, of what `save_tree` wrote; UsageError if it is missing or damaged."""
    arrays = read_npz(path)
    try:
        return arrays, dict(json.loads(arrays.pop("metadata").tobytes()))
    except (KeyError, TypeError, ValueError):
        raise UsageError(f"{path} is damaged or is not a checkpoint (its metadata)") from None


def fill_tree(path: Path, arrays: dict[str, np.ndarray], like: Any, prefix: str = "") -> Any:
    """A tree like `like` (arrays or shapes) of the `arrays` named `prefix...`; UsageError if names or shapes differ."""
    leaves, structure = jax.tree.flatten_with_path(like)
    wanted = {prefix + keystr(name): jax.eval_shape(jax.random.key_data, x) if is_key(x) else x for name, x in leaves}
    found = {k: x for k, x in arrays.items() if re.match(re.escape(prefix) + r"(?!\w)", k)}
    for name in sorted(wanted | found):
        want, have = (f"{x[name].dtype}{x[name].shape}" if name in x else "missing" for x in (wanted, found))
        if want != have:
            raise UsageError(f"checkpoint {path} is of another run or script: in it {name} is {have}, here {want}")
    pairs = zip((found[name] for name in wanted), leaves, strict=True)
    return jax.tree.unflatten(structure, [jax.random.wrap_key_data(x) if is_key(old) else x for x, (_, old) in pairs])


def script_of(module: Any) -> dict[str, str]:
    """How config.json names the file that trained a run, with a hash of it and common/; {} for a notebook's cells."""
    if not (file := Path(getattr(module, "__file__", None) or "")).is_file():
        return {}
    content = b"".join(x.read_bytes() for x in (file, *sorted(Path(__file__).parent.glob("*.py"))))
    return {"script": file.stem, "script_sha256": hashlib.sha256(content).hexdigest()[:16]}


def load_policy(run_dir: str | Path, member: int = 0, sample: bool = False, best: bool = False) -> Policy:
    """The trained policy: raw, flat observations `[obs_dim]` or `[batch, obs_dim]` to the environment's own actions.

    It acts as in the final evaluation (exactly so if acting needs no random numbers), or with `sample` as in data
    collection; `best` loads the policy that --keep-best kept. The algorithm's file is imported; a line on stderr says
    if it or common/ is not what trained the run. UsageError without a checkpoint or such a member.
    """
    from gymnasium.spaces import Box
    from gymnasium.wrappers.utils import rescale_box

    path = Path(run_dir).expanduser()
    for file in path.glob("part-*[0-9]/config.json"):  # of a run with --shard: the part that trained the member
        if member in [entry["member"] for entry in read_json(file)["members"]]:
            path = file.parent
    config = read_json(path / "config.json")
    arrays, about = read_tree(path / "checkpoint" / ("best.npz" if best else "state.npz"))
    entries, name = {entry["member"]: entry for entry in config["members"]}, config.get("script", config["algorithm"])
    if member not in entries:
        raise UsageError(f"{path} has no member {member}; it has {list(entries)}")
    names = ([] if "script" in config else ["__main__"]) + [name, f"algorithms.{name}", f"benchmarks.{name}"]
    if not (script := next((x for x in map(optional, names) if hasattr(x, "Hyperparameters")), None)):  # no folder
        raise UsageError(f"there is no {name}.py to import, which {path} was trained by")
    if any(config.get(key) != value for key, value in script_of(script).items()):
        say(f"{script.__file__} or common/ is not what trained {path}, or was edited since", sys.stderr)
    row, transform = list(entries).index(member), Transform(*map(np.float32, config["transform"].values()))
    low, high = (np.array(config[f"action_{end}"], np.float32) for end in ("low", "high"))
    if (hp := entries[member]["hyperparameters"]).keys() - script.Hyperparameters._fields:
        raise UsageError(f"{path} is of another {name}.py than {script.__file__}; put that one's folder on PYTHONPATH")
    hp = script.Hyperparameters(**hp)
    flags = {f.name: config["flags"][f.name] for f in dataclasses.fields(script.Args) if f.name in config["flags"]}
    args, obs_dim = script.Args(hp=hp, **flags), len(transform.observation_mean)
    like = jax.eval_shape(jax.vmap(lambda key: script.init(key, hp, args, obs_dim, len(low))), jax.random.key(0)[None])
    state = fill_tree(path, {name: x[row : row + 1] for name, x in arrays.items()}, like, "['state']")
    seed, steps = entries[member]["seed"], about["done"]["offline"] + about["done"]["online"]
    width, count = width_of(args.final_eval_episodes, config["population"]), itertools.count()
    act = jax.jit(jax.vmap(lambda s, x, key: script.act(s, hp, x, key, args, len(low), sample).clip(-1.0, 1.0)))
    to_environment = rescale_box(Box(low, high), np.float32(-1.0), np.float32(1.0))[2]

    def policy(observations: np.ndarray) -> np.ndarray:
        batch = np.atleast_2d(transform.observations(np.asarray(observations, np.float32)))
        # The rows that the evaluation had: products of another number of rows differ in the last bits.
        rows = np.concatenate([batch, np.zeros((max(0, width - len(batch)), obs_dim), np.float32)])
        actions = np.asarray(act(state, rows[None], evaluation_keys(np.array([seed]), steps, next(count))))[0]
        return to_environment(actions[: len(batch)] if np.ndim(observations) > 1 else actions[0]).clip(low, high)

    return policy
