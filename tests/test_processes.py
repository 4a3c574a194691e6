"""Several processes of one run, over loopback on this machine: the files of a single process, and one end for all."""

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Outcome, assert_same_arrays

from common import checkpoints

IQL = ROOT / "algorithms" / "iql.py"
GRID = ["--grid", "beta=1,3", "--num-seeds", "2"]
WHOLE = [*GRID, "--num-updates", "40", "--eval-every", "20", "--checkpoint-every", "0", "--online-steps", "4"]


@pytest.fixture
def together(spawn: Callable[..., subprocess.Popen]) -> Callable[..., list[subprocess.Popen]]:
    """`together(count, *arguments)`: Python in processes that find each other."""

    def start(count: int, *arguments: object) -> list[subprocess.Popen]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        place = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
        env = os.environ | {"PYTHONPATH": str(ROOT)} | place
        return [spawn(*arguments, env=env | {"JAX_PROCESS_ID": str(i)}) for i in range(count)]

    return start


def outcomes(running: list[subprocess.Popen]) -> list[Outcome]:
    ended = [process.communicate(timeout=300) for process in running]
    return [Outcome(process.returncode, *texts) for process, texts in zip(running, ended, strict=True)]


def tables(run: Path) -> list[str]:
    return [(run / name).read_text() for name in ("metrics.csv", "evaluations.csv")]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, small_run: list[str], spawn: Any) -> Path:
    """The run of a single process."""
    run = tmp_path_factory.mktemp("alone") / "run"
    assert [outcome.status for outcome in outcomes([spawn(IQL, *small_run, *WHOLE, "--run-dir", run)])] == [0]
    return run


def test_two_processes_write_what_one_writes(
    tmp_path: Path, small_run: list[str], together: Any, iql: Any, alone: Path
) -> None:
    run = tmp_path / "run"
    ended = outcomes(together(2, IQL, *small_run, *WHOLE, "--run-dir", run, "--distributed", "True"))
    assert [(outcome.status, outcome.err) for outcome in ended] == [(0, ""), (0, "")]
    assert "member 3 (seed 1, beta=3)" in ended[0].out and ended[1].out == ""
    assert tables(run) == tables(alone)
    assert_same_arrays(run, alone)
    assert sorted(path.name for path in run.iterdir()) == sorted(path.name for path in alone.iterdir())
    config, final = (json.loads((run / name).read_text()) for name in ("config.json", "final.json"))
    assert config["device"]["count"] == 2 * min(2, os.cpu_count())
    assert final["members"] == json.loads((alone / "final.json").read_text())["members"]
    # A single process reads the checkpoint, of all members.
    assert iql(*small_run, *WHOLE, "--run-dir", run, "--resume", "True").status == 0
    assert tables(run) == tables(alone)


def test_a_signal_to_one_process_ends_both_with_a_checkpoint(
    tmp_path: Path, small_run: list[str], together: Any, iql: Any
) -> None:
    run = tmp_path / "run"
    endless = [*small_run, *GRID, "--actor-decay-updates", "0", "--eval-every", "0", "--run-dir", run]
    running = together(2, IQL, *endless, "--num-updates", 10**8, "--distributed", "True")
    until = time.monotonic() + 200
    while not (run / "metrics.csv").exists() and time.monotonic() < until:
        time.sleep(0.1)
    running[1].send_signal(signal.SIGTERM)
    ended = outcomes(running)
    assert [outcome.status for outcome in ended] == [143, 143]
    assert "--resume True" in ended[0].err and ended[0].err.count("\n") == 1 and ended[1].err == ""
    done = checkpoints.metadata(run / "checkpoint/state.npz")["updates_done"]
    assert done > 0 and str(done) == tables_last_step(run)
    # A single process goes on with all members.
    assert iql(*endless, "--num-updates", done + 5, "--resume", "True").status == 0
    assert tables_last_step(run) == str(done + 5)


def tables_last_step(run: Path) -> str:
    rows = (run / "metrics.csv").read_text().splitlines()[-4:]
    assert [row.split(",")[1] for row in rows] == ["0", "1", "2", "3"]
    return rows[-1].split(",")[0]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "JAX_COORDINATOR_ADDRESS"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}, "JAX_COORDINATOR_ADDRESS"),
        ({"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1"}, "JAX_NUM_PROCESSES"),
        ({"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1", "JAX_NUM_PROCESSES": "two"}, "whole numbers"),
        ({"JAX_COORDINATOR_ADDRESS": "here", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}, "makes no sense"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, "makes no sense"),
        ({"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}, "not reachable"),
    ],
)
def test_processes_that_cannot_meet(
    tmp_path: Path, small_run: list[str], iql: Any, monkeypatch: Any, settings: dict[str, str], words: str
) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("common.processes.START_TIMEOUT", 0)
    outcome = iql(*small_run, "--num-updates", "1", "--run-dir", tmp_path / "run", "--distributed", "True")
    assert outcome.status == 2 and outcome.err.count("\n") == 1 and words in outcome.err
    assert not (tmp_path / "run").exists()


EXCHANGE = """
import signal, sys
import jax, numpy as np
from common import processes
from common.errors import exit_status

processes.PIECE = 100
with exit_status():
    us = processes.join()
    print(list(us.share(range(5))))
    own = {"x": np.full((us.index + 1, 40), us.index), "key": jax.random.key(us.index)[None]}
    for everywhere in (True, False, True):
        all = us.gather(own, everywhere)
        print(all["x"][:, 0].tolist(), jax.random.key_data(all["key"])[:, 1].tolist())
    with us.first_alone():
        open(sys.argv[1], "a").write(str(us.index))
    if us.index == 1:
        sys.exit(7)
    us.gather(())
"""


def test_what_processes_tell_each_other(tmp_path: Path, together: Any) -> None:
    """Values of different lengths and in pieces, random keys, an order, and that one of them has ended."""
    ended = outcomes(together(3, "-c", EXCHANGE, tmp_path / "order"))
    whole = "[0, 1, 1, 2, 2, 2] [0, 1, 2]"
    own = [whole, "[1, 1] [1]", "[2, 2, 2] [2]"]
    assert [outcome.out.splitlines() for outcome in ended] == [
        [share, whole, own[i], whole] for i, share in enumerate(("[0]", "[1, 2]", "[3, 4]"))
    ]
    assert [outcome.status for outcome in ended] == [2, 7, 2]
    for i in (0, 2):
        assert ended[i].err == f"error: process 1 has ended, so process {i} ends too\n"
    order = (tmp_path / "order").read_text()
    assert order[0] == "0" and sorted(order) == ["0", "1", "2"]


def test_more_processes_than_members_are_refused(tmp_path: Path, small_run: list[str], together: Any) -> None:
    flags = [*small_run, "--num-updates", "1", "--run-dir", tmp_path / "run", "--distributed", "True"]
    for outcome in outcomes(together(2, IQL, *flags)):
        assert outcome.status == 2 and outcome.err.count("\n") == 1 and "2 processes for 1 members" in outcome.err
    assert not (tmp_path / "run").exists()
