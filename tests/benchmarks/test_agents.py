"""Runs under wandb's own agent, each a process of its own; no server."""

import json
import multiprocessing
import os
import signal
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import sweeps
import wandb
import yaml
from conftest import ROOT, done_in
from sweeps import bayes_search
from test_sweeps import SWEEP_ID, draw, elsewhere, load, run_command  # noqa: F401 (elsewhere is a fixture)
from wandb import wandb_agent
from wandb.apis.public import sweeps as server
from wandb.proto import wandb_internal_pb2


class Server:
    """Stands in for the server: hands the agent one run after another, and a stop when `stop_when(run_id)`."""

    def __init__(self, config: dict[str, Any], stop_when: Callable[[str], bool] = lambda _: False) -> None:
        self.config, self.stop_when = config, stop_when
        self.waiting: list[dict[str, Any]] = []
        self.stopped: list[str] = []

    def heartbeat(self, _: Any, __: Any, ___: Any, running: dict[str, bool]) -> list[dict[str, Any]]:
        for run_id in running:
            if run_id not in self.stopped and self.stop_when(run_id):
                self.stopped.append(run_id)
                return [{"id": f"stop-{run_id}", "type": "stop", "run_id": run_id}]
        return [self.waiting.pop(0)] if self.waiting and not running else []


def run_agent(
    config: dict[str, Any],
    choices: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    stop_when: Callable[[str], bool] = lambda _: False,
    **options: Any,
) -> wandb_agent.Agent:
    """Run wandb's agent until it has run the choices, as run0, run1, ..., each a process of its own."""
    standin = Server(config, stop_when)
    standin.waiting = [run_command(config, values, f"run{i}") for i, values in enumerate(choices)]
    monkeypatch.setattr(server, "_sweep_with_runs", lambda *_, **__: {"config": yaml.safe_dump(config)})
    monkeypatch.setattr(server, "_register_agent", lambda *_, **__: {"id": "agent"})
    monkeypatch.setattr(server, "_agent_heartbeat", standin.heartbeat)
    monkeypatch.setattr(wandb, "Api", lambda: None)
    monkeypatch.setattr(wandb_agent.Agent, "POLL_INTERVAL", 0.2)
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    agent = wandb_agent.Agent(None, multiprocessing.Queue(), sweep_id=SWEEP_ID, count=len(choices), **options)
    agent.run()
    return agent


def small(tiny: Path, run_dir: Path) -> dict[str, Any]:
    """Values of the smallest run, in place of those of a sweep file."""
    return {
        "dataset": str(tiny),
        "env": "Hopper-v5",
        "preset": "none",
        "hidden_dim": 8,
        "batch_size": 16,
        "num_updates": 20,
        "eval_every": 0,
        "final_eval_episodes": 1,
        "run_dir": str(run_dir),
    }


class Recorded(NamedTuple):
    """What wandb wrote of a run for the server, which an offline run keeps in a file."""

    run: Any
    config: dict[str, Any]
    summary: dict[str, Any]
    history: list[dict[str, Any]]
    exit_code: int


def recorded(directory: Path) -> Recorded:
    """The only run below the directory."""
    (path,) = directory.glob("wandb/offline-run-*/*.wandb")
    data, place, parts, records = path.read_bytes(), 7, b"", []
    while place + 7 <= len(data):  # blocks of 32 KiB hold pieces of records, each after checksum, length and kind
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            records.append(wandb_internal_pb2.Record.FromString(parts))
            parts = b""

    def items(updates: Any) -> dict[str, Any]:
        return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in updates}

    config: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    runs = [record.run for record in records if record.HasField("run")]
    for record in records:
        if record.HasField("run"):
            config |= items(record.run.config.update)
        if record.HasField("config"):
            config |= items(record.config.update)
        if record.HasField("summary"):
            summary |= items(record.summary.update)
    history = [items(record.history.item) for record in records if record.HasField("history")]
    (code,) = [record.exit.exit_code for record in records if record.HasField("exit")]
    return Recorded(runs[-1], config, summary, history, code)


@pytest.mark.slow
def test_an_agent_runs_a_choice_and_goes_on_after_one_that_diverged(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load("iql.yaml")
    drawn = draw(config, 2)
    good = drawn[0] | small(tiny, tmp_path / "good")
    bad = drawn[1] | small(tiny, tmp_path / "bad") | {"critic_learning_rate": 1e7}
    agent = run_agent(config, [bad, good], monkeypatch)
    assert (agent._finished, agent._failed) == (2, 1)

    # The sweep's values are those of the run, of every seed, and are on record.
    flags = json.loads((tmp_path / "good/config.json").read_text())
    final = json.loads((tmp_path / "good/final.json").read_text())
    run = recorded(tmp_path / "good")
    assert [member["seed"] for member in flags["members"]] == [0, 1, 2, 3, 4]
    for name, value in good.items():
        assert flags["flags"][name] == run.config[name] == value
        own = [member["hyperparameters"][name] for member in flags["members"] if name in member["hyperparameters"]]
        assert all(found == pytest.approx(value, rel=1e-6) for found in own), "they are float32"
    assert (run.run.sweep_id, run.run.run_id, run.config["members"]) == (SWEEP_ID, "run1", 5)

    # The sweep's metric: once in the history, and in the summary, from the five seeds.
    scores = np.sort([member["score_mean"] for member in final["members"]])
    assert run.summary["final_score_iqm"] == final["aggregate"]["score"]["iqm"] == pytest.approx(scores[1:4].mean())
    rows = [row for row in run.history if "final_score_iqm" in row]
    assert [row["final_score_iqm"] for row in rows] == [run.summary["final_score_iqm"]]
    assert rows[0]["_step"] == 20 and "evaluation/score_mean" in rows[0]
    assert (run.exit_code, run.summary["diverged_members"]) == (0, 0)

    # A run that diverged has no metric, an exit code of its own, and says how many members did.
    failed = recorded(tmp_path / "bad")
    assert (failed.exit_code, failed.summary["diverged_members"]) == (3, 5)
    assert not any("final_score_iqm" in row for row in [failed.summary, *failed.history])

    # The search takes it for as bad as the worst of the others.
    results = [
        sweeps.SweepRun(
            state=state, config={name: {"value": values[name]} for name in config["parameters"]}, summaryMetrics=summary
        )
        for state, values, summary in [
            ("failed", bad, failed.summary),
            ("finished", good, run.summary),
            ("finished", drawn[1] | {"beta": 9.0}, {"final_score_iqm": 50.0}),
        ]
    ]
    search = bayes_search.bayes_baseline_validate_and_fill(config)
    _, _, _, losses, _ = bayes_search._construct_gp_data(results, search)
    assert losses.tolist() == pytest.approx([-run.summary["final_score_iqm"]] * 2 + [-50.0])
    assert sweeps.next_run(config, results, validate=True) is not None


def test_a_bad_value_fails_before_wandb_starts(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    statuses = []
    poll = wandb_agent.AgentProcess.poll
    monkeypatch.setattr(wandb_agent.AgentProcess, "poll", lambda self: statuses.append(poll(self)) or statuses[-1])
    values = small(tiny, tmp_path / "run") | {"beta": -1.0}
    agent = run_agent(load("iql.yaml"), [values], monkeypatch)
    assert (agent._finished, agent._failed, statuses[-1]) == (1, 1, 2)
    assert not list(tmp_path.rglob("*.wandb")) and not (tmp_path / "run").exists()


def endless(tiny: Path, run_dir: Path) -> dict[str, Any]:
    """Values of a run that only a signal ends."""
    return small(tiny, run_dir) | {"num_updates": 10**9, "num_seeds": 1}


def assert_stopped(run_dir: Path) -> None:
    """The run in `run_dir` wrote its checkpoint and closed its record, without a score."""
    assert done_in(run_dir)["offline"] >= 1000
    run = recorded(run_dir)
    assert run.exit_code == 143 and run.history and "final_score_iqm" not in run.summary


@pytest.mark.slow
def test_a_run_that_the_sweep_stops_writes_its_checkpoint(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = tmp_path / "run" / "metrics.csv"
    agent = run_agent(load("iql.yaml"), [endless(tiny, tmp_path / "run")], monkeypatch, lambda _: begun.exists())
    assert (agent._finished, agent._failed) == (1, 1), "to the agent it is a failure"
    assert_stopped(tmp_path / "run")


AGENT = """
import json, os, sys
import pytest
sys.path[:0] = sys.argv[1:3]
import test_agents
env, values, options = map(json.loads, sys.argv[3:])
os.environ.update(env)
with pytest.MonkeyPatch.context() as patch:
    test_agents.run_agent(test_agents.load("iql.yaml"), [values], patch, **options)
"""


@pytest.mark.slow
@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize(
    ("forward", "signals"), [(True, [signal.SIGTERM]), (False, [signal.SIGINT, signal.SIGINT])], ids=str
)
def test_an_agent_that_is_signalled_waits_for_the_checkpoint(
    tmp_path: Path, tiny: Path, spawn: Callable, forward: bool, signals: list[int]
) -> None:
    """One that forwards signals at the first, as where a cluster ends a job; any other at the second Ctrl-C."""
    env = {name: value for name, value in os.environ.items() if name.startswith("WANDB_")}
    values = endless(tiny, tmp_path / "run")
    given = [json.dumps(x) for x in (env, values, {"forward_signals": forward})]
    agent = spawn("-c", AGENT, ROOT / "tests", Path(__file__).parent, *given)
    deadline = time.monotonic() + 300
    while not (tmp_path / "run" / "metrics.csv").exists():
        assert agent.poll() is None and time.monotonic() < deadline, agent.communicate()
        time.sleep(0.1)
    for number in signals:
        time.sleep(1.0)
        assert agent.poll() is None and not (tmp_path / "run" / "checkpoint").exists()
        agent.send_signal(number)
    _, err = agent.communicate(timeout=300)
    assert agent.returncode == 0, err
    assert_stopped(tmp_path / "run")
