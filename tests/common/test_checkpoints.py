"""Checkpoints: what is saved comes back, and whatever is wrong with a file is said in one line."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common import report
from common.cli import UsageError


class Pair(NamedTuple):
    left: Any
    right: Any


class Behavior(NamedTuple):
    behavior: Any
    behavior_opt: Any


METADATA = {"updates_done": 7, "name": "é", "nested": {"a": [1, None]}}


def tree() -> Any:
    return {
        "pair": Pair(jnp.arange(3, dtype=jnp.int32), np.linspace(0, 1, 4, dtype=np.float32).reshape(2, 2)),
        "keys": jax.random.split(jax.random.key(5), 2),
        "none": None,
        "scalar": jnp.float32(-0.0),
        "list": [np.array([np.nan, np.inf], np.float32), np.uint8(200)],
    }


def as_arrays(content: Any) -> dict[str, np.ndarray]:
    def data(leaf: Any) -> np.ndarray:
        return np.asarray(jax.random.key_data(leaf) if report.is_key(leaf) else leaf)

    return {jax.tree_util.keystr(name): data(leaf) for name, leaf in jax.tree_util.tree_leaves_with_path(content)}


def load(path: Path, like: Any, prefix: str = "") -> Any:
    return report.fill_tree(path, report.read_tree(path)[0], like, prefix)


def metadata(path: Path) -> Any:
    return report.read_tree(path)[1]


def assert_same(one: Any, other: Any) -> None:
    one, other = as_arrays(one), as_arrays(other)
    assert one.keys() == other.keys()
    for name in one:
        assert (one[name].dtype, one[name].shape) == (other[name].dtype, other[name].shape)
        assert one[name].tobytes() == other[name].tobytes(), name


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint" / "state.npz"
    report.save_tree(path, tree(), METADATA)
    return path


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(UsageError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_round_trip_is_exact_and_leaves_one_file(path: Path) -> None:
    zeros = tree() | {
        "pair": Pair(jnp.zeros(3, jnp.int32), np.zeros((2, 2), np.float32)),
        "keys": jax.random.split(jax.random.key(0), 2),
    }
    loaded = load(path, zeros)
    assert_same(loaded, tree())
    assert jax.tree.structure(loaded) == jax.tree.structure(tree())
    # The restored keys are keys: they draw what the saved ones draw.
    drawn = jax.vmap(lambda key: jax.random.normal(key, (3,)))
    np.testing.assert_array_equal(drawn(loaded["keys"]), drawn(tree()["keys"]))
    assert metadata(path) == METADATA
    assert [file.name for file in path.parent.iterdir()] == ["state.npz"]


def test_a_part_alone_is_read_whatever_else_begins_with_its_name(tmp_path: Path) -> None:
    path = tmp_path / "state.npz"
    parts = {"low": {"a": np.arange(3.0), "b": np.float32(2)}, "low_opt": {"a": np.ones(3)}, "lower": np.zeros(2)}
    report.save_tree(path, parts, METADATA)
    assert_same(load(path, jax.tree.map(np.zeros_like, parts["low"]), "['low']"), parts["low"])
    state = Behavior({"a": np.arange(2.0)}, Pair(np.zeros(1), np.ones(1)))
    report.save_tree(path, {"state": state}, METADATA)
    assert_same(load(path, {"a": np.zeros(2)}, "['state'].behavior"), state.behavior)
    refusal(lambda: load(path, {"a": np.zeros(2)}, "['state'].behav"))


def test_nothing_in_it_is_pickled(path: Path) -> None:
    with np.load(path, allow_pickle=False) as file:
        assert all(file[name].dtype != object for name in file.files)


@pytest.mark.parametrize(
    ("change", "leaf"),
    [
        (lambda t: t | {"scalar": jnp.zeros(2)}, "scalar"),
        (lambda t: t | {"scalar": jnp.int32(0)}, "scalar"),
        (lambda t: t | {"pair": Pair(t["pair"].left, np.zeros((2, 2), np.float64))}, "right"),
        (lambda t: t | {"pair": Pair(t["pair"].left, np.zeros((4,), np.float32))}, "right"),
        (lambda t: t | {"extra": jnp.zeros(1)}, "extra"),
        (lambda t: {name: value for name, value in t.items() if name != "scalar"}, "scalar"),
        (lambda t: {("renamed" if n == "scalar" else n): v for n, v in t.items()}, "renamed"),
        (lambda t: t | {"keys": t["keys"][:1]}, "keys"),
    ],
)
def test_other_shapes_dtypes_and_names_are_refused(path: Path, change: Callable[[Any], Any], leaf: str) -> None:
    message = refusal(lambda: load(path, change(tree())))
    assert leaf in message and str(path) in message


def test_no_checkpoint(tmp_path: Path) -> None:
    assert "there is no file" in refusal(lambda: load(tmp_path / "none.npz", tree()))
    assert "there is no file" in refusal(lambda: metadata(tmp_path / "none.npz"))


def test_every_truncation_is_noticed(path: Path) -> None:
    content = path.read_bytes()
    like = tree()
    for length in [*range(0, len(content), 29), *range(len(content) - 30, len(content))]:
        path.write_bytes(content[:length])
        assert "damaged" in refusal(lambda: load(path, like))
        assert "damaged" in refusal(lambda: metadata(path))


def test_every_flipped_byte_is_noticed_or_harmless(path: Path) -> None:
    """Bytes that no value depends on (times, attributes) may change; a changed value must never come back."""
    content, like, noticed = path.read_bytes(), tree(), 0
    for at in range(len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :])
        try:
            arrays, about = report.read_tree(path)
            assert_same(report.fill_tree(path, arrays, like), like)
            assert about == METADATA
        except UsageError as error:
            noticed += 1
            assert "\n" not in str(error)
    assert noticed > len(content) / 2


@pytest.mark.parametrize(
    "write",
    [
        lambda file: np.save(file, np.zeros(3)),
        lambda file: np.savez(file, metadata=np.frombuffer(b"not json", np.uint8)),
        lambda file: np.savez(file, metadata=np.frombuffer(b"[1, 2]", np.uint8)),
        lambda file: np.savez(file, metadata=np.frombuffer(b"\xff\xfe{}", np.uint8)),
        lambda file: np.savez(file, metadata=np.array([{"a": 1}], object)),
        lambda file: np.savez(file, weights=np.zeros(3)),
        lambda file: file.write(b"hello"),
    ],
    ids=["npy", "text", "list", "bytes", "pickle", "no metadata", "no npz"],
)
def test_another_programs_file(tmp_path: Path, write: Callable[[Any], Any]) -> None:
    path = tmp_path / "state.npz"
    with open(path, "wb") as file:
        write(file)
    assert str(path) in refusal(lambda: metadata(path))


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_full_disk_leaves_the_previous_checkpoint(path: Path, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(report.os, function, full)
    with pytest.raises(OSError, match="No space"):
        report.save_tree(path, tree() | {"scalar": jnp.float32(3)}, METADATA)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["state.npz"]


def test_a_write_that_fails_half_way_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write(file: Any) -> None:
        file.write(b"half of the new")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space"):
        report.write_atomically(path, write)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
