"""What the README tells a user to do, done."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, smaller

from common.report import load_policy

README = (ROOT / "README.md").read_text()


def test_a_copied_algorithm_takes_the_readmes_edits_and_runs_alone(tmp_path: Path, tiny: Path) -> None:
    """In a folder with the copies alone: the diffs apply, the new flag exists and acts on the policy alone."""
    copy = re.search(r"<!-- copy -->\n```bash\n(.*?)```", README, re.DOTALL)[1]
    for word in ("algorithms", "common"):
        shutil.copytree(ROOT / word, tmp_path / word, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(["bash", "-euc", copy], cwd=tmp_path, check=True)
    script = tmp_path / "mine" / "iql.py"
    source = script.read_text()
    edits = re.findall(r"```diff\n(.*?)```", README, re.DOTALL)
    assert len(edits) == 2
    for edit in edits:
        before, after = (
            "".join(line[1:] + "\n" for line in edit.splitlines() if line[0] in kept) for kept in (" -", " +")
        )
        assert source.count(before) == 1
        source = source.replace(before, after)
    script.write_text(source)
    for word in ("algorithms", "common"):
        shutil.rmtree(tmp_path / word)

    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    flags = ["--dataset", tiny, "--env", "Hopper-v5", "--hidden-dim", "8", "--num-updates", "2", "--preset", "none"]
    flags += ["--final-eval-episodes", "1", "--eval-every", "0", "--grid", "imitation=0,9", "--run-dir", "run"]
    ran = subprocess.run(
        [sys.executable, "mine/iql.py", *map(str, flags)], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    with np.load(tmp_path / "run" / "checkpoint" / "state.npz", allow_pickle=False) as file:
        actors, critics = ([x for name, x in file.items() if f".{part}" in name] for part in ("actor[", "critic["))
    differ = [any((x[0] != x[1]).any() for x in arrays) for arrays in (actors, critics)]
    assert differ == [True, False], "only the policy's loss has the new hyperparameter"


def test_a_policy_is_loaded_as_written(
    tmp_path: Path, small_run: list[str], script: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    code = re.search(r"<!-- policy -->\n```python\n(.*?)```", README, re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    flags = ["--num-updates", "2", "--eval-every", "0", "--max-episode-steps", "5", "--run-dir", "runs/mine"]
    assert script("iql", *small_run, *smaller("iql"), *flags).status == 0
    values: dict[str, Any] = {}
    exec(code, values)
    assert values["policy"](np.zeros((4, 11))).shape == (4, 3) and np.isfinite(values["reward"])


def test_commands_name_scripts_and_flags_that_exist() -> None:
    import importlib

    from common.cli import parse

    commands = [line.split("#")[0].split("python ")[1] for line in README.splitlines() if "python algorithms/" in line]
    assert len(commands) > 8
    for command in commands:
        words = [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', command)]
        script = importlib.import_module(words[0].removesuffix(".py").replace("/", "."))
        if "--help" not in words and "`" not in command:
            parse(script.Args, script.PRESETS, words[1:])


def test_data_of_a_robot_without_a_simulator_train(
    tmp_path: Path, small_run: list[str], script: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "benchmarks" / "README.md").read_text()
    (tmp_path / "my_robot.py").write_text(re.search(r"<!-- robot -->\n```python\n(.*?)```", page, re.DOTALL)[1])
    flags = re.search(r"--env my_robot:MyRobot-v0.*(?=`)", page)[0].split()
    monkeypatch.syspath_prepend(tmp_path)
    shapes = {"observations": (20, 7), "actions": (20, 3), "rewards": 20, "next_observations": (20, 7)}
    arrays = {name: np.random.default_rng(0).uniform(-1.5, 1.5, shape) for name, shape in shapes.items()}
    np.savez(tmp_path / "my.npz", **arrays, terminations=np.zeros(20))
    flags += ["--dataset", tmp_path / "my.npz", "--num-updates", 2, "--run-dir", tmp_path / "run"]
    assert script("iql", *small_run, *smaller("iql"), *flags).status == 0
    actions = load_policy(tmp_path / "run")(np.zeros((5, 7)))
    assert actions.shape == (5, 3) and (np.abs(actions) <= 2).all()
