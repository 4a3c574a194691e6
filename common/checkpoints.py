"""Checkpoints: a whole pytree in one `.npz`, written atomically, checked leaf by leaf on load. No pickle."""

import json
import os
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np

from common.errors import UsageError
from common.populations import is_key


def _named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by their path in the tree; random keys as their uint32 data."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): jax.random.key_data(leaf) if is_key(leaf) else leaf for path, leaf in leaves}


def write_atomically(path: Path, write: Any) -> None:
    """Call `write(file)` on a temporary file beside `path`, fsync it and rename it over `path`.

    A reader sees the old file or the new one, never a part, whatever kills the writer.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
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


def save(path: Path, tree: Any, metadata: dict[str, Any]) -> None:
    """Write every leaf of `tree`, and `metadata` (JSON), to the `.npz` at `path`."""
    arrays = {name: np.asarray(leaf) for name, leaf in _named_leaves(tree).items()}
    arrays["metadata"] = np.frombuffer(json.dumps(metadata).encode(), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):  # of a process killed while it wrote
        leftover.unlink(missing_ok=True)
    write_atomically(path, lambda file: np.savez(file, **arrays))


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}  # reading a member verifies its CRC
    except FileNotFoundError:
        raise UsageError(f"no checkpoint at {path}") from None
    except Exception as error:  # a flipped byte may surface as nearly anything, down in zipfile or numpy
        reason = " ".join(str(error).split())
        raise UsageError(f"checkpoint {path} is damaged or is not a checkpoint ({reason})") from None


def metadata(path: Path) -> dict[str, Any]:
    """The metadata of the checkpoint at `path`; UsageError if it is missing or damaged."""
    arrays = _read(path)
    try:
        content = json.loads(arrays["metadata"].tobytes().decode())
    except (KeyError, ValueError):
        content = None
    if not isinstance(content, dict):
        raise UsageError(f"checkpoint {path} is damaged or is not a checkpoint (no metadata)")
    return content


def load(path: Path, like: Any, part: str = "") -> Any:
    """The tree saved at `path`, with the structure of `like`; or of it the part by that name, e.g. "['state'].actor".

    UsageError if the file is damaged or if any leaf's name, shape or dtype differs from `like`'s.
    """
    arrays = _read(path)
    arrays.pop("metadata", None)
    if part:  # whose name may be the beginning of another one's
        arrays = {n.removeprefix(part): x for n, x in arrays.items() if re.match(re.escape(part) + r"(?!\w)", n)}
    expected = _named_leaves(like)
    if arrays.keys() != expected.keys():
        odd = sorted(arrays.keys() ^ expected.keys())[0]
        raise UsageError(f"checkpoint {path} does not fit this run: {odd} is on one side only")
    for name, leaf in expected.items():
        found, wanted = arrays[name], np.asarray(leaf)
        if (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
            raise UsageError(
                f"checkpoint {path} does not fit this run: {name} is {found.dtype}{list(found.shape)}, "
                f"expected {wanted.dtype}{list(wanted.shape)}"
            )

    def restore(path: Any, leaf: Any) -> Any:
        value = arrays[jax.tree_util.keystr(path)]
        if is_key(leaf):
            return jax.random.wrap_key_data(value)
        return jax.numpy.asarray(value) if isinstance(leaf, jax.Array) else value

    return jax.tree_util.tree_map_with_path(restore, like)


def load_members(path: Path, name: str, one: Any, num_members: int) -> Any:
    """The part `name` of the states of a population's members, `[num_members, ...]`; `one` has the shapes of one's.

    UsageError as for `load`.
    """
    like = jax.tree.map(lambda x: np.zeros((num_members, *x.shape), x.dtype), one)
    return load(path, like, f"['state'].{name}")
