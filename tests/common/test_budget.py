"""The shape of the code: how small common/ stays, and who imports whom."""

import ast
import csv
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT

LINES, MODULES, LONGEST = 1_589, 8, 300
COMMON = sorted(path for path in (ROOT / "common").rglob("*.py") if path.name != "__init__.py")


def lines_of(path: Path) -> int:
    return len(path.read_text().splitlines())


def imported(path: Path) -> set[str]:
    """Modules that a file imports, anywhere in it, `common.cli` for `from common import cli` too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute"
            found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
    return found


def files_of(path: Path) -> set[Path]:
    """The files of this repository that a file imports, itself and those that they import included."""
    found, new = set(), {path}
    while new:
        found |= new
        candidates = {ROOT / f"{name.replace('.', '/')}.py" for one in new for name in imported(one)}
        new = {candidate for candidate in candidates if candidate.is_file()} - found
    return found


def test_common_is_small() -> None:
    """Whoever copies an algorithm's file takes it along, and reads it."""
    lengths = {path.name: lines_of(path) for path in COMMON}
    assert len(COMMON) <= MODULES, sorted(lengths)
    assert max(lengths.values()) <= LONGEST, lengths
    assert sum(lengths.values()) <= LINES, lengths


def test_an_algorithm_brings_along_common_alone() -> None:
    found = files_of(ROOT / "algorithms" / "iql.py") - {ROOT / "algorithms" / "iql.py"}
    assert found <= set(COMMON), "so that its budget is what is copied"


@pytest.mark.parametrize("path", COMMON, ids=lambda path: path.name)
def test_a_module_of_common_has_a_name_of_its_own(path: Path) -> None:
    """Beside a copied script, or on a path that leads into the folder, it must not hide another."""
    assert path.stem not in sys.stdlib_module_names


@pytest.mark.parametrize("path", COMMON, ids=lambda path: path.name)
def test_common_imports_neither_algorithms_nor_benchmarks(path: Path) -> None:
    """But for what `cli.optional` looks for at run time and an algorithm does without."""
    assert not {name.partition(".")[0] for name in imported(path)} & {"algorithms", "benchmarks", "tests"}
    looked_for = re.findall(r'optional\("benchmarks\.(\w+)"', path.read_text())
    assert set(looked_for) <= {
        "sources",
        "families",
        "provenance",
        "tracking",
        "keep_best",
        "intervals",
        "report",
        "merge",
    }
    assert path.read_text().count("import_module(") <= (path.name == "cli.py")


def test_nothing_runs_at_import_and_training_needs_five_packages_alone(
    tmp_path: Path, spawn: Callable[..., subprocess.Popen]
) -> None:
    """jax, flax, optax, numpy and tyro, as on a machine with little more than an accelerator."""
    absent = ["gymnasium", "minari", "mujoco", "scipy", "h5py", "matplotlib", "wandb", "imageio", "ogbench"]
    scripts = sorted((ROOT / "algorithms").glob("[a-z]*.py"))
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in [*COMMON, *scripts]]
    assert "common.runs" in names and "algorithms.iql" in names
    code = f"""
import importlib, os, runpy, signal, sys
sys.modules |= dict.fromkeys({absent})  # importing one of them raises
sys.argv = ["script", "--no-such-flag", "--help"]
handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
from jax._src import xla_bridge
for name in {names}:
    importlib.import_module(name)
    assert not xla_bridge.backends_are_initialized(), name
assert handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
assert os.listdir() == []
sys.argv = ["accelerator.py", "--out", "rates.csv", "--algorithms", "td3_bc", "--members", "1", "--rows", "3000",
            "--hidden-dim", "8", "--seconds", "0.01"]
runpy.run_path({str(ROOT / "benchmarks" / "accelerator.py")!r}, run_name="__main__")
"""
    process = spawn("-c", code, cwd=tmp_path)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "") and (tmp_path / "rates.md").read_text() in out
    with open(tmp_path / "rates.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["algorithm"], row["members"]) == ("td3_bc", "1") and float(row["updates_per_second"]) > 0
