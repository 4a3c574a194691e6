"""The sweep files, by the schema, the sampler and the command lines of wandb itself; no server."""

import importlib
import itertools
import json
import math
import multiprocessing
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import sweeps
import yaml
from conftest import ROOT, arrays_of, parsed, smaller
from wandb import wandb_agent
from wandb.sdk.launch.sweeps.utils import load_sweep_config

from benchmarks import offax_sets
from common.cli import RunArgs, UsageError

ALGORITHMS = sorted(path.stem for path in (ROOT / "algorithms").glob("*.py") if path.stem != "__init__")
FOLDER = ROOT / "benchmarks" / "sweeps"
FILES = sorted(path.name for path in FOLDER.glob("*.yaml"))
SEARCHES = [f"{name}.yaml" for name in ALGORITHMS]
SUITES = [f"{name}_suite.yaml" for name in ALGORITHMS]
SWEEP_ID = "sweep1"


def load(name: str) -> dict[str, Any]:
    """A sweep file, read as `wandb sweep` reads it."""
    config = load_sweep_config(str(FOLDER / name))
    assert config is not None
    return config


def as_sent(value: Any) -> Any:
    """A drawn value as the server sends it: through JSON, where a whole number has no point."""
    value = json.loads(json.dumps(value, default=float))
    return int(value) if isinstance(value, float) and value.is_integer() else value


def draw(config: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """`count` choices of wandb's sampler; fewer at the end of a grid."""
    random.seed(0)
    np.random.seed(0)
    runs: list[Any] = []
    while len(runs) < count and (run := sweeps.next_run(config, runs, validate=True)) is not None:
        runs.append(run)
    return [{name: as_sent(item["value"]) for name, item in run.config.items()} for run in runs]


def command_line(config: dict[str, Any], values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The words with which wandb's agent starts a run with these values."""
    started: list[list[str]] = []

    class Process:
        def __init__(self, command: list[str], **_: Any) -> None:
            started.append(command)

    with monkeypatch.context() as patch:
        patch.setattr(wandb_agent, "AgentProcess", Process)
        agent = wandb_agent.Agent(None, multiprocessing.Queue(), sweep_id=SWEEP_ID)
        agent._sweep_command = list(config["command"])
        answer = agent._process_command(run_command(config, values, "run1"))
    assert "exception" not in answer, answer
    return started[0]


def run_command(config: dict[str, Any], values: dict[str, Any], run_id: str) -> dict[str, Any]:
    """What the server sends to have a run started."""
    args = {name: {"value": value} for name, value in values.items()}
    return {"id": f"command-{run_id}", "type": "run", "run_id": run_id, "program": config["program"], "args": args}


def value_of(args: RunArgs, name: str) -> Any:
    return getattr(args.hp if name in args.hp._fields else args, name)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What wandb writes goes below tmp_path; what its agent sets in the environment is undone."""
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    for name in ("WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("WANDB_SWEEP_ID", SWEEP_ID)
    monkeypatch.setenv("WANDB_MODE", "offline")


# The files


def test_every_algorithm_has_a_search_and_a_suite() -> None:
    assert sorted([*SEARCHES, *SUITES]) == FILES


@pytest.mark.parametrize("name", FILES)
def test_files_follow_wandbs_schema(name: str) -> None:
    config = load(name)
    assert sweeps.schema_violations_from_proposed_config(config) == []
    assert config["program"] == f"algorithms/{name.removesuffix('.yaml').removesuffix('_suite')}.py"
    assert config["metric"]["name"] == "final_score_iqm" and config["metric"]["goal"] == "maximize"


def test_the_schema_refuses_what_is_text_in_yaml() -> None:
    config = load("iql.yaml")
    text = yaml.safe_load("{distribution: log_uniform_values, min: 1e-4, max: 1e-3}")
    assert text["min"] == "1e-4"
    config["parameters"]["actor_learning_rate"] = text
    assert sweeps.schema_violations_from_proposed_config(config)


@pytest.mark.parametrize("name", FILES)
def test_drawn_values_arrive(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load(name)
    choices = draw(config, 6)
    assert len(choices) == 6
    for values in choices:
        assert values.keys() == config["parameters"].keys()
        args = parsed(command_line(config, values, monkeypatch))
        for parameter, value in values.items():
            arrived = value_of(args, parameter)
            assert arrived == value
            assert type(arrived) is (float if parameter in args.hp._fields else type(value))
        assert args.num_seeds == 5 and args.quiet and not args.grid
    varied = {parameter for parameter in choices[0] if len({str(values[parameter]) for values in choices}) > 1}
    assert varied == {parameter for parameter, space in config["parameters"].items() if "value" not in space}


@pytest.mark.parametrize("name", SUITES)
def test_a_suite_is_a_grid_of_whole_sets_and_separate_seeds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load(name)
    choices = draw(config, 100)
    combinations = {(values["dataset"], values["seed"]) for values in choices}
    assert len(choices) == len(combinations) == math.prod(len(x["values"]) for x in config["parameters"].values())
    assert {dataset for dataset, _ in combinations} <= set(offax_sets.ids())
    num_seeds = parsed(command_line(config, choices[0], monkeypatch)).num_seeds
    trained = [(dataset, first + i) for dataset, first in combinations for i in range(num_seeds)]
    assert len(trained) == len(set(trained)) == 10 * len({dataset for dataset, _ in combinations})


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_swept_value_changes_the_training(
    name: str, tmp_path: Path, small_run: list[str], script: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The corners of the space as one population: members that differ in one name only end with other parameters.

    Of what decides shapes, and cannot be in one population, the ends.
    """
    monkeypatch.delenv("WANDB_SWEEP_ID")
    config = load(f"{name}.yaml")
    hp = importlib.import_module(f"algorithms.{name}").Hyperparameters()
    swept = {parameter: space for parameter, space in config["parameters"].items() if "value" not in space}
    ends = {
        parameter: sorted(space["values"])[:: len(space["values"]) - 1]
        if "values" in space
        else [space["min"], space["max"]]
        for parameter, space in swept.items()
    }
    flags = [word for word in config["command"] if word.startswith("--") and not word.startswith("--num-")]

    def run(label: str, *more: str) -> Path:
        own = [*small_run, *smaller(name), *flags, "--num-updates", "4", "--eval-every", "0"]
        outcome = script(name, *own, *more, "--run-dir", tmp_path / label)
        assert outcome.status == 0, outcome.err
        return tmp_path / label

    for parameter in [parameter for parameter in ends if parameter not in hp._fields]:
        low, high = (run(str(end), f"--{parameter.replace('_', '-')}", str(end)) for end in ends.pop(parameter))
        assert any(x.tobytes() != arrays_of(high)[key].tobytes() for key, x in arrays_of(low).items()), parameter
    run_dir = run("grid", "--grid", " ".join(f"{parameter}={low},{high}" for parameter, (low, high) in ends.items()))
    corners = list(itertools.product((0, 1), repeat=len(ends)))
    arrays = [x for x in arrays_of(run_dir).values() if x.ndim and len(x) == len(corners)]
    assert len(arrays) > 10
    for i, parameter in enumerate(ends):
        for corner in corners:
            other = tuple(1 - end if j == i else end for j, end in enumerate(corner))
            a, b = corners.index(corner), corners.index(other)
            assert any(x[a].tobytes() != x[b].tobytes() for x in arrays), f"{parameter} changes nothing"


# What YAML makes of values


class Case(NamedTuple):
    algorithm: str
    line: str
    name: str
    arrives: Any


@pytest.mark.parametrize(
    "case",
    [
        Case("iql", "actor_learning_rate: {value: 1e-4}", "actor_learning_rate", 1e-4),  # text in YAML
        Case("iql", "actor_learning_rate: {value: 1.0e-4}", "actor_learning_rate", 1e-4),
        Case("iql", "beta: {value: 3}", "beta", 3.0),
        Case("iql", "hidden_dim: {value: 64}", "hidden_dim", 64),
        Case("cql", "lagrange: {value: true}", "lagrange", True),
        Case("cql", "lagrange: {value: off}", "lagrange", False),
        Case("cql", "gap_floor: {value: null}", "gap_floor", None),
        Case("cql", "gap_floor: {value: -200}", "gap_floor", -200.0),
        Case("awac", "weights: {value: softmax}", "weights", "softmax"),
        Case("iql", "grid: {value: 'beta=1,3 expectile=0.7,0.9'}", "grid", "beta=1,3 expectile=0.7,0.9"),
    ],
    ids=lambda case: case.line,
)
def test_values_of_yaml_reach_their_flag(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load(f"{case.algorithm}.yaml")
    config["parameters"] = yaml.safe_load(case.line)
    config["method"] = "random"
    assert sweeps.schema_violations_from_proposed_config(config) == []
    arrived = value_of(parsed(command_line(config, draw(config, 1)[0], monkeypatch)), case.name)
    assert arrived == case.arrives and type(arrived) is type(case.arrives)


def test_swept_values_win_over_the_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load("iql.yaml")
    values = draw(config, 1)[0] | {"beta": 0.75, "normalize_returns": False}
    args = parsed(command_line(config, values, monkeypatch))
    assert args.preset == "locomotion" and (args.hp.beta, args.normalize_returns) == (0.75, False)
    del values["normalize_returns"]
    assert parsed(command_line(config, values, monkeypatch)).normalize_returns, "the preset of locomotion"


@pytest.mark.parametrize(
    ("algorithm", "values", "message"),
    [
        ("iql", {"lagrange": True}, "lagrange"),  # another algorithm's
        ("iql", {"batch_size": 256.5}, "batch-size"),
        ("iql", {"expectile": 1.5}, "expectile"),
        ("awac", {"weights": "softmax", "grid": "temperature=1,2"}, "no effect"),
    ],
)
def test_values_that_make_no_sense_are_refused(
    algorithm: str, values: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load(f"{algorithm}.yaml")
    with pytest.raises(UsageError, match=message):
        parsed(command_line(config, values, monkeypatch))
