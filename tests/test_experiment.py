"""The contract of the command line: flags, files, columns, exit statuses, bad input, kills and resuming."""

import ast
import errno
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, arrays_of, assert_same_arrays, hopper_like

from algorithms.iql import PRESETS, Args
from common import checkpoints, experiment
from common.errors import UsageError
from common.flags import choose_preset, parse, preset_name

IQL = ROOT / "algorithms" / "iql.py"
CONTRACT = [
    *("dataset", "env", "seed", "num-seeds", "grid", "num-updates", "online-steps", "eval-every", "eval-episodes"),
    *("final-eval-episodes", "checkpoint-every", "run-dir", "resume", "track", "wandb-project", "wandb-group"),
    *("wandb-entity", "quiet"),
]
EVALUATIONS = "phase,step,member,seed,return_mean,return_std,score_mean,score_std,episodes"
HOPPER_LOW, HOPPER_HIGH = -20.272305, 3234.3  # D4RL's reference returns


def rows_of(path: Path) -> list[dict[str, str]]:
    header, *lines = path.read_text().split("\n")
    assert lines.pop() == ""
    return [dict(zip(header.split(","), line.split(","), strict=True)) for line in lines]


def assert_same_tables(one: Path, other: Path) -> None:
    for name in ("metrics.csv", "evaluations.csv"):
        assert (one / name).read_text() == (other / name).read_text(), name


# Flags


def test_every_flag_of_the_contract_in_both_spellings() -> None:
    values = dict.fromkeys(("dataset", "env", "run-dir", "wandb-project", "wandb-group", "wandb-entity"), "word")
    values |= dict.fromkeys(("resume", "track", "quiet"), "True") | {"grid": "beta=1,2"}
    for flag in CONTRACT:
        value = values.get(flag, "17")
        expected = {"True": True, "17": 17}.get(value, value)
        for spelled in (flag, flag.replace("-", "_")):
            for argv in ([f"--{spelled}", value], [f"--{spelled}={value}"]):
                assert getattr(parse(Args, PRESETS, argv), flag.replace("-", "_")) == expected, argv
    assert parse(Args, PRESETS, ["--quiet=False", "--resume", "False"]).quiet is False


def test_hyperparameters_are_flat_flags() -> None:
    args = parse(Args, PRESETS, ["--beta=0.5", "--actor_learning_rate", "1e-4", "--preset", "none"])
    assert args.hp == args.hp._replace(beta=0.5, actor_learning_rate=1e-4)


def test_defaults_of_the_contract() -> None:
    args = parse(Args, PRESETS, [])
    assert args.dataset == "offax/hopper/medium-expert-v0"
    assert (args.track, args.resume, args.quiet, args.online_steps, args.grid) == (False, False, False, 0, "")


@pytest.mark.parametrize(
    "argv",
    [
        ["--no-such-flag", "1"],
        ["--num-seeds", "three"],
        ["--num-seeds", "1.5"],
        ["--quiet"],
        ["--quiet", "maybe"],
        ["--beta", "large"],
        ["--dataset"],
        ["stray"],
    ],
)
def test_bad_flags_are_one_line(argv: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        parse(Args, PRESETS, argv)
    message = str(caught.value)
    assert "\n" not in message and argv[0].lstrip("-") in message


def test_presets_follow_the_names_and_flags_win() -> None:
    def chosen(*argv: str) -> Args:
        return parse(Args, PRESETS, list(argv))

    assert chosen("--dataset", "offax/walker2d/medium-v0").normalize_returns is True
    assert chosen("--dataset", "D4RL/antmaze/umaze-v1").reward_shift == -1
    assert chosen("--dataset", "D4RL/antmaze/umaze-v1").hp.expectile == 0.9
    assert chosen("--dataset", "D4RL/antmaze/umaze-v1", "--expectile", "0.8").hp.expectile == 0.8
    assert chosen("--dataset", "D4RL/door/human-v2").dropout == 0.1
    assert chosen("--dataset", "mine.npz", "--env", "Hopper-v5").normalize_returns is True
    assert chosen("--dataset", "mine.npz", "--env", "Hopper-v5", "--preset", "none").normalize_returns is False
    assert choose_preset(Args(dataset="mine.npz"), PRESETS) == {}


@pytest.mark.parametrize(
    ("dataset", "env", "expected"),
    [
        ("/data/Ant_maze_u-maze_noisy.hdf5", None, "antmaze"),
        ("/home/anthony/x.npz", None, "none"),
        ("/home/penny/ant/x.npz", None, "none"),
        ("files/hopper_medium-v2.hdf5", None, "locomotion"),
        ("mujoco/ant/medium-v0", None, "locomotion"),
        ("x.npz", "AdroitHandPen-v1", "adroit"),
        ("x.npz", "FrankaKitchen-v1", "kitchen"),
        ("x.npz", "Pendulum-v1", "none"),
        ("x.npz", "AntMaze_UMaze-v4", "antmaze"),
    ],
)
def test_presets_match_whole_names(dataset: str, env: str | None, expected: str) -> None:
    assert preset_name(Args(dataset=dataset, env=env)) == expected


def test_unknown_presets_are_refused() -> None:
    def chosen(*argv: str) -> Args:
        return parse(Args, PRESETS, list(argv))

    with pytest.raises(UsageError, match="choose from auto, none"):
        chosen("--preset", "nonsense")


def test_help_is_quick_and_documents_every_flag(spawn: Callable[..., subprocess.Popen]) -> None:
    process = spawn(IQL, "--help", env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"})
    out, err = process.stdout.read(), process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert (process.returncode, err) == (0, "")
    assert usage.ru_utime + usage.ru_stime < 3.0  # the processor's time: the clock's depends on what else runs
    entries = re.split(r"\n\s+(?=--\w|-h)", out)
    documented = {}
    for entry in entries[1:]:
        text = re.sub(r"[\s│|]+", " ", entry)
        match = re.match(r"(?:-h, )?--([\w-]+)(?: (?:\{[^}]*\}(?:\|\w+)?|[A-Z]\w*))? (.*)", text)
        assert match, text
        documented[match[1]] = re.sub(r"\(default.*", "", match[2])
    flags = {field.name for field in Args.__dataclass_fields__.values()} - {"hp"} | set(Args().hp._fields)
    for name in flags | {flag.replace("-", "_") for flag in CONTRACT}:
        assert len(documented[name.replace("_", "-")]) > 8, name


# A finished run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny: Path, spawn: Callable[..., subprocess.Popen]) -> Path:
    """Five members with evaluations and checkpoints along the way, in a process of its own."""
    directory = tmp_path_factory.mktemp("finished") / "new" / "run"
    flags = ["--dataset", tiny, "--env", "Hopper-v5", "--hidden-dim", 8, "--batch-size", 16, "--grid", "beta=1,2"]
    flags += ["--num-seeds", 3, "--seed", 4, "--num-updates", 50, "--eval-every", 20, "--checkpoint-every", 30]
    process = spawn(IQL, *flags, "--eval-episodes", 2, "--final-eval-episodes", 3, "--run-dir", directory)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, ""), err
    assert str(directory) in out
    return directory


def test_files_of_a_run(finished: Path) -> None:
    names = {"config.json", "metrics.csv", "evaluations.csv", "final.json", "curves.png", "grid.png", "checkpoint"}
    assert {path.name for path in finished.iterdir()} == names
    assert [path.name for path in (finished / "checkpoint").iterdir()] == ["state.npz"]
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_metrics_have_a_row_for_each_chunk_and_member(finished: Path) -> None:
    header = (finished / "metrics.csv").read_text().split("\n")[0].split(",")
    assert header[:3] == ["step", "member", "seed"] and len(header) > 3
    rows = rows_of(finished / "metrics.csv")
    found = [(int(row["step"]), int(row["member"]), int(row["seed"])) for row in rows]
    assert found == [(step, i, 4 + i % 3) for step in (20, 30, 40, 50) for i in range(6)]
    assert all(np.isfinite(float(value)) for row in rows for value in row.values())


def test_evaluations_are_at_their_steps(finished: Path) -> None:
    assert (finished / "evaluations.csv").read_text().split("\n")[0] == EVALUATIONS
    rows = rows_of(finished / "evaluations.csv")
    found = [(row["phase"], int(row["step"]), int(row["member"]), int(row["seed"]), row["episodes"]) for row in rows]
    steps = [(0, "2"), (20, "2"), (40, "2"), (50, "3")]
    assert found == [("offline", step, i, 4 + i % 3, episodes) for step, episodes in steps for i in range(6)]
    for row in rows:
        score = 100 * (float(row["return_mean"]) - HOPPER_LOW) / (HOPPER_HIGH - HOPPER_LOW)
        assert float(row["score_mean"]) == pytest.approx(score, rel=1e-5)
        spread = 100 * float(row["return_std"]) / (HOPPER_HIGH - HOPPER_LOW)
        assert float(row["score_std"]) == pytest.approx(spread, rel=1e-5)


def test_config_tells_how_it_was_made(finished: Path, tiny: Path) -> None:
    config = json.loads((finished / "config.json").read_text())
    assert config["algorithm"] == "iql" and config["environment"] == "Hopper-v5" and config["transitions"] == 400
    flags = config["flags"]
    assert {flag.replace("-", "_") for flag in CONTRACT} | set(Args().hp._fields) <= flags.keys()
    assert (flags["dataset"], flags["num_updates"], flags["grid"]) == (str(tiny), 50, "beta=1,2")
    members = config["members"]
    assert [(m["member"], m["seed"]) for m in members] == [(i, 4 + i % 3) for i in range(6)]
    assert [m["hyperparameters"]["beta"] for m in members] == [1, 1, 1, 2, 2, 2]
    assert all(m["hyperparameters"].keys() == set(Args().hp._fields) for m in members)
    assert [m["swept"] for m in members] == [{"beta": 1.0}] * 3 + [{"beta": 2.0}] * 3
    for package in ("jax", "flax", "gymnasium", "mujoco"):
        assert config["versions"][package] == importlib.metadata.version(package)
    head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True)
    assert (config["git_commit"] or "") == head.stdout.strip() or len(config["git_commit"]) == 40
    assert config["device"]["platform"] == os.environ["JAX_PLATFORMS"]
    returns = hopper_like()["rewards"].reshape(20, 20).sum(axis=1, dtype=float)  # the preset of locomotion
    assert config["transform"]["reward_scale"] == pytest.approx(1000 / (returns.max() - returns.min()), rel=1e-5)


def test_final_json_follows_from_its_members(finished: Path) -> None:
    final = json.loads((finished / "final.json").read_text())
    last = [row for row in rows_of(finished / "evaluations.csv") if row["step"] == "50"]
    for member, row in zip(final["members"], last, strict=True):
        for name in ("return_mean", "return_std", "score_mean", "score_std", "episodes"):
            assert member[name] == pytest.approx(float(row[name]), rel=1e-5)
        assert member["diverged"] is None
    for what in ("score", "return"):
        values = sorted(member[f"{what}_mean"] for member in final["members"])
        aggregate = final["aggregate"][what]
        assert aggregate["iqm"] == pytest.approx(sum(values[1:5]) / 4)  # a quarter of six, rounded down, is one
        assert values[0] <= aggregate["ci_low"] <= aggregate["iqm"] <= aggregate["ci_high"] <= values[-1]
        assert aggregate["count"] == 6
        for i, combination in enumerate(final["combinations"]):
            assert combination["swept"] == {"beta": i + 1.0}
            three = [member[f"{what}_mean"] for member in final["members"][3 * i : 3 * i + 3]]
            assert combination[what]["iqm"] == pytest.approx(sum(three) / 3)
    assert len(final["combinations"]) == 2
    assert final["updates"] == 50 and final["online_steps"] == 0
    assert final["wall_clock_seconds"] > 0 and final["updates_per_second"] > 0


# Interruption and resuming

LONG = ["--num-updates", "120", "--eval-every", "50", "--checkpoint-every", "20", "--num-seeds", "2"]


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory, small_run: list[str], spawn: Callable[..., subprocess.Popen]
) -> Path:
    directory = tmp_path_factory.mktemp("uninterrupted") / "run"
    process = spawn(IQL, *small_run, *LONG, "--run-dir", directory)
    _, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, "")
    return directory


KILLED_AT = '''
"""Run IQL, and SIGKILL this process in the middle of the n-th write of a kind."""
import io, os, signal, sys
sys.path.insert(0, {root!r})
kind, count = sys.argv[1], int(sys.argv[2])
del sys.argv[1:3]
from common import checkpoints, logging

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def counted(what, part):
    global count
    if what == kind:
        count -= 1
        if count == 0:
            part()
            die()

original_replace, original_append = os.replace, logging.Table.append
original_save = checkpoints.save

def save(path, tree, metadata):
    def half():
        content = io.BytesIO()
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoints.write_atomically, whole = lambda path, write: write(content), checkpoints.write_atomically
        original_save(path, tree, metadata)
        data = content.getvalue()
        whole(path, lambda file: (file.write(data[: len(data) // 2]), file.flush(), die()))
    counted("checkpoint", half)
    original_save(path, tree, metadata)
    counted("saved", lambda: None)

def append(table, rows):
    def half():
        before = table.path.stat().st_size if table.path.exists() else 0
        original_append(table, rows)
        after = table.path.stat().st_size
        os.truncate(table.path, before + (after - before) * 2 // 3)
    counted(table.path.name, half)
    original_append(table, rows)

checkpoints.save, logging.Table.append = save, append
from algorithms import iql
from common.flags import launch
launch(iql.main, iql.Args, iql.PRESETS)
'''


def test_killed_at_any_moment_it_resumes_bit_for_bit(
    tmp_path: Path, small_run: list[str], spawn: Callable[..., subprocess.Popen], uninterrupted: Path
) -> None:
    """One run, killed in the middle of each kind of write and at random moments, until it is through."""
    script, run = tmp_path / "killed.py", tmp_path / "run"
    script.write_text(KILLED_AT.format(root=str(ROOT)))
    flags = [*small_run, *LONG, "--run-dir", run, "--resume", "True"]
    at_step = []
    for kind, count in (("metrics.csv", 1), ("checkpoint", 1), ("saved", 2), ("evaluations.csv", 1), ("checkpoint", 2)):
        process = spawn(script, kind, count, *flags)
        assert process.wait(timeout=300) == -signal.SIGKILL, process.stderr.read()
        path = run / "checkpoint" / "state.npz"
        at_step.append(checkpoints.metadata(path)["updates_done"] if path.exists() else 0)
    assert at_step == [0, 0, 40, 40, 60]
    delay = np.random.default_rng().uniform(1.0, 6.0)
    process = spawn(IQL, *flags)
    time.sleep(delay)
    process.kill()
    process.wait()
    process = spawn(IQL, *flags)
    _, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, ""), delay
    assert_same_arrays(run, uninterrupted)
    assert_same_tables(run, uninterrupted)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_a_checkpoint_and_the_run_goes_on(
    tmp_path: Path, small_run: list[str], iql: Any, monkeypatch: Any, uninterrupted: Path, number: int, status: int
) -> None:
    handler = signal.getsignal(signal.SIGINT)  # Python's own, but for a job in the background, which ignores it
    original = experiment.Run.train
    calls = []

    def train(self: Any, state: Any, num_updates: int) -> Any:
        calls.append(num_updates)
        if len(calls) == 3:
            signal.raise_signal(number)
        return original(self, state, num_updates)

    monkeypatch.setattr(experiment.Run, "train", train)
    run = tmp_path / "run"
    outcome = iql(*small_run, *LONG, "--run-dir", run)
    assert outcome.status == status
    assert outcome.err.count("\n") == 1 and "--resume True" in outcome.err
    assert calls == [20, 20, 10]
    assert checkpoints.metadata(run / "checkpoint/state.npz")["updates_done"] == 50, "between two regular checkpoints"
    assert not (run / "final.json").exists()
    outcome = iql(*small_run, *LONG, "--run-dir", run, "--resume", "True")
    assert (outcome.status, outcome.err) == (0, "")
    assert_same_arrays(run, uninterrupted)
    assert_same_tables(run, uninterrupted)
    assert signal.getsignal(signal.SIGINT) is handler, "handlers are given back"


def test_a_signal_from_outside_ends_the_process(
    tmp_path: Path, small_run: list[str], spawn: Callable[..., subprocess.Popen]
) -> None:
    run = tmp_path / "run"
    process = spawn(IQL, *small_run, "--num-updates", 10**8, "--eval-every", 0, "--run-dir", run)
    until = time.monotonic() + 200
    while not (run / "metrics.csv").exists() and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 143
    assert err.count("\n") == 1 and "Traceback" not in err
    done = checkpoints.metadata(run / "checkpoint/state.npz")["updates_done"]
    assert done > 0 and done == int(rows_of(run / "metrics.csv")[-1]["step"])


def test_where_chunks_end_does_not_matter(tmp_path: Path, small_run: list[str], iql: Any, uninterrupted: Path) -> None:
    run = tmp_path / "run"
    others = ["--num-updates", "120", "--eval-every", "0", "--checkpoint-every", "7", "--num-seeds", "2"]
    assert iql(*small_run, *others, "--run-dir", run).status == 0
    assert_same_arrays(run, uninterrupted)
    final = [json.loads((path / "final.json").read_text())["members"] for path in (run, uninterrupted)]
    assert final[0] == final[1]
    assert [row["step"] for row in rows_of(run / "evaluations.csv")] == ["120", "120"]


def test_resuming_a_finished_run_changes_nothing(
    tmp_path: Path, small_run: list[str], iql: Any, uninterrupted: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    assert iql(*small_run, *LONG, "--run-dir", run, "--resume", "True").status == 0
    assert_same_arrays(run, uninterrupted)
    assert_same_tables(run, uninterrupted)


def test_half_of_an_evaluation_is_made_whole(
    tmp_path: Path, small_run: list[str], iql: Any, uninterrupted: Path
) -> None:
    """Killed between checkpoint and evaluation at one step, with the first member's row on disk alone."""
    run = tmp_path / "run"
    flags = [*small_run, *LONG[2:], "--run-dir", run]
    assert iql(*flags, "--num-updates", "100", "--actor-decay-updates", "120").status == 0
    table = run / "evaluations.csv"
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:-1]))
    assert iql(*flags, "--num-updates", "120", "--resume", "True").status == 0
    found = [(row["step"], row["member"]) for row in rows_of(table)]
    assert found == [(step, member) for step in ("0", "50", "100", "120") for member in ("0", "1")]
    assert_same_tables(run, uninterrupted)


def test_without_a_checkpoint_the_tables_start_anew(tmp_path: Path, small_run: list[str], iql: Any) -> None:
    """What a run killed before its first checkpoint left behind may be of other seeds."""
    run, fresh = tmp_path / "run", tmp_path / "fresh"
    short = [*small_run, "--num-updates", "10"]
    assert iql(*short, "--seed", "7", "--run-dir", run).status == 0
    shutil.rmtree(run / "checkpoint")
    before = snapshot(run)
    assert_refused(iql(*short, "--run-dir", run), "--resume True", str(run))
    assert snapshot(run) == before, "results without a checkpoint are not overwritten unasked"
    for directory in (run, fresh):
        assert iql(*short, "--run-dir", directory, "--resume", "True").status == 0
    assert_same_tables(run, fresh)


def test_a_full_disk_leaves_the_last_checkpoint(
    tmp_path: Path, small_run: list[str], iql: Any, monkeypatch: pytest.MonkeyPatch, uninterrupted: Path
) -> None:
    run, original, calls = tmp_path / "run", checkpoints.save, []

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def save(*arguments: Any) -> None:
        calls.append(1)
        with monkeypatch.context() as third:
            if len(calls) == 3:
                third.setattr(checkpoints.os, "fsync", full)
            original(*arguments)

    monkeypatch.setattr(checkpoints, "save", save)
    outcome = iql(*small_run, *LONG, "--run-dir", run)
    assert outcome.status == 2
    assert outcome.err.count("\n") == 1 and "No space left" in outcome.err
    assert checkpoints.metadata(run / "checkpoint/state.npz")["updates_done"] == 40
    assert [path.name for path in (run / "checkpoint").iterdir()] == ["state.npz"]
    assert iql(*small_run, *LONG, "--run-dir", run, "--resume", "True").status == 0
    assert_same_arrays(run, uninterrupted)
    assert_same_tables(run, uninterrupted)


# Divergence


def test_a_diverging_member_is_frozen_and_named_and_the_others_go_on(
    tmp_path: Path, small_run: list[str], iql: Any
) -> None:
    """After one step of size 1e7 the squared Q-values are beyond float32, and nothing else is yet."""
    short = [*small_run, "--num-updates", "40", "--eval-every", "20", "--checkpoint-every", "10"]
    mixed, tame = tmp_path / "mixed", tmp_path / "tame"
    outcome = iql(*short, "--grid", "critic_learning_rate=3e-4,1e7,1e-4", "--run-dir", mixed)
    assert outcome.status == 0
    assert outcome.err.count("\n") == 1
    for words in ("member 1 (seed 0, critic_learning_rate=1e+07)", "critic/loss", "update 2;"):
        assert words in outcome.err
    final = json.loads((mixed / "final.json").read_text())
    assert [member["diverged"] for member in final["members"]] == [None, {"step": 2, "metric": "critic/loss"}, None]
    assert final["members"][1]["score_mean"] is None and final["members"][0]["score_mean"] is not None
    assert final["aggregate"]["score"]["count"] == 2
    evaluated = [(row["step"], row["member"]) for row in rows_of(mixed / "evaluations.csv")]
    assert evaluated == [("0", "0"), ("0", "1"), ("0", "2")] + [(s, m) for s in ("20", "40") for m in ("0", "2")]
    assert all(np.isfinite(array).all() for array in arrays_of(mixed).values() if array.dtype == np.float32)
    # The others are what they are where nothing diverges.
    assert iql(*short, "--grid", "critic_learning_rate=3e-4,1e-3,1e-4", "--run-dir", tame).status == 0
    ours, theirs = arrays_of(mixed), arrays_of(tame)
    for name in ours:
        if "'state'" in name:
            for member in (0, 2):
                assert ours[name][member].tobytes() == theirs[name][member].tobytes(), name
    assert int(next(array for name, array in ours.items() if name.endswith(".step"))[1]) == 0, "frozen before it broke"
    metrics = [[row for row in rows_of(d / "metrics.csv") if row["member"] != "1"] for d in (mixed, tame)]
    assert metrics[0] == metrics[1]


def test_divergence_is_remembered_after_a_resume(tmp_path: Path, small_run: list[str], iql: Any) -> None:
    flags = [
        *small_run,
        "--grid",
        "critic_learning_rate=3e-4,1e7",
        "--actor-decay-updates",
        "40",
        "--run-dir",
        tmp_path / "run",
    ]
    assert iql(*flags, "--num-updates", "20").status == 0
    outcome = iql(*flags, "--num-updates", "40", "--resume", "True")
    assert (outcome.status, outcome.err) == (0, "")
    final = json.loads((tmp_path / "run/final.json").read_text())
    assert final["members"][1]["diverged"] == {"step": 2, "metric": "critic/loss"}
    assert [row["member"] for row in rows_of(tmp_path / "run/metrics.csv")] == ["0", "1", "0"]


def test_status_3_when_every_member_diverged(tmp_path: Path, small_run: list[str], iql: Any) -> None:
    run = tmp_path / "run"
    outcome = iql(
        *small_run, "--num-updates", "40", "--num-seeds", "2", "--critic-learning-rate", "1e7", "--run-dir", run
    )
    assert outcome.status == 3
    assert "Traceback" not in outcome.err and "every member diverged" in outcome.err
    final = json.loads((run / "final.json").read_text())
    assert [member["diverged"]["step"] for member in final["members"]] == [2, 2]
    assert final["aggregate"]["score"] == {"iqm": None, "ci_low": None, "ci_high": None, "count": 0}


# The online phase


def test_online_after_offline(tmp_path: Path, small_run: list[str], iql: Any) -> None:
    run = tmp_path / "run"
    flags = [*small_run, "--num-updates", "20", "--online-steps", "30", "--num-seeds", "3", "--reward-shift", "-1"]
    outcome = iql(*flags, "--eval-every", "10", "--checkpoint-every", "25", "--run-dir", run)
    assert (outcome.status, outcome.err) == (0, "")
    found = [(row["phase"], row["step"]) for row in rows_of(run / "evaluations.csv")][::3]
    offline, online = [("offline", str(s)) for s in (0, 10)], [("online", str(s)) for s in (0, 10, 20, 30)]
    assert found == offline + online
    assert [row["step"] for row in rows_of(run / "metrics.csv")][::3] == ["10", "20", "30", "40", "45", "50"]
    final = json.loads((run / "final.json").read_text())
    assert (final["updates"], final["online_steps"]) == (20, 30)
    arrays = arrays_of(run)
    assert next(array for name, array in arrays.items() if name.endswith(".step")).tolist() == [50, 50, 50]
    ring = {name.rpartition(".")[2]: array for name, array in arrays.items() if "'ring'" in name}
    assert ring["written"].tolist() == [30, 30, 30]
    # Rows follow each other but where an episode ended, and no two members share an environment.
    for i in range(3):
        ended = (ring["terminations"][i] + ring["truncations"][i]) > 0
        follows = (ring["observations"][i, 1:] == ring["next_observations"][i, :-1]).all(axis=1)
        assert (follows | ended[:-1]).all() and (~follows | ~ended[:-1]).all()
        assert (np.abs(ring["actions"][i]) <= 1).all() and ring["actions"][i].std() > 0.05
        assert (ring["rewards"][i] < 3).all(), "the shift: Hopper's reward is about 1 a step"
    assert not np.array_equal(ring["observations"][0], ring["observations"][1])


def test_online_from_scratch_and_resumed(tmp_path: Path, small_run: list[str], iql: Any) -> None:
    run = tmp_path / "run"
    flags = [*small_run, "--num-updates", "0", "--eval-every", "0", "--run-dir", run]
    flags = [*flags, "--online-steps", "20", "--resume", "True"]
    original = experiment.Run.collect_and_train

    def interrupted(self: Any, state: Any, num_steps: int) -> Any:
        result = original(self, state, num_steps)
        signal.raise_signal(signal.SIGINT)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment.Run, "collect_and_train", interrupted)
        assert iql(*flags, "--checkpoint-every", "10").status == 130
    assert checkpoints.metadata(run / "checkpoint/state.npz")["online_done"] == 10
    outcome = iql(*flags, "--checkpoint-every", "10")
    assert (outcome.status, outcome.err) == (0, "")
    arrays = arrays_of(run)
    ring = {name.rpartition(".")[2]: array for name, array in arrays.items() if "'ring'" in name}
    assert ring["written"].tolist() == [20] and ring["observations"][0].any(axis=1).all()
    assert [row["step"] for row in rows_of(run / "metrics.csv")] == ["10", "20"]
    assert [row["step"] for row in rows_of(run / "evaluations.csv")] == ["20"]


@pytest.mark.parametrize("phase", ["train", "collect_and_train"])
def test_a_signal_within_a_chunk_ends_it_early(tmp_path: Path, small_run: list[str], iql: Any, phase: str) -> None:
    lengths = ["--num-updates", "250"] if phase == "train" else ["--num-updates", "0", "--online-steps", "30"]
    flags = [*small_run, *lengths, "--actor-decay-updates", "0", "--eval-every", "0", "--resume", "True"]
    run, original = tmp_path / "run", getattr(experiment.Run, phase)

    def interrupted(self: Any, state: Any, count: int) -> Any:
        signal.raise_signal(signal.SIGINT)
        return original(self, state, count)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment.Run, phase, interrupted)
        assert iql(*flags, "--run-dir", run).status == 130
    metadata = checkpoints.metadata(run / "checkpoint/state.npz")
    assert (metadata["updates_done"], metadata["online_done"]) == ((100, 0) if phase == "train" else (0, 1))
    assert iql(*flags, "--run-dir", run).status == 0
    steps = [row["step"] for row in rows_of(run / "metrics.csv")]
    assert steps == (["100", "250"] if phase == "train" else ["1", "30"])
    if phase == "train":
        assert iql(*flags, "--run-dir", tmp_path / "whole").status == 0
        assert_same_arrays(tmp_path / "whole", run)


def test_online_from_an_offline_checkpoint_equals_training_through(
    tmp_path: Path, small_run: list[str], iql: Any
) -> None:
    flags = [*small_run, "--num-updates", "20", "--actor-decay-updates", "0", "--num-seeds", "2"]
    assert iql(*flags, "--online-steps", "15", "--run-dir", tmp_path / "through").status == 0
    assert iql(*flags, "--run-dir", tmp_path / "later").status == 0
    assert iql(*flags, "--online-steps", "15", "--run-dir", tmp_path / "later", "--resume", "True").status == 0
    assert_same_arrays(tmp_path / "through", tmp_path / "later")
    # Once online transitions are in the ring, the phases' lengths are fixed.
    outcome = iql(*flags, "--online-steps", "25", "--run-dir", tmp_path / "later", "--resume", "True")
    assert_refused(outcome, "--online-steps", "15")


# Bad input


def assert_refused(outcome: Any, *words: str) -> None:
    assert outcome.status == 2
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1, outcome.err
    for word in words:
        assert word in outcome.err


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--num-seeds", "0"], "--num-seeds 0"),
        (["--num-seeds", "-1"], "--num-seeds -1"),
        (["--num-updates", "-5"], "--num-updates -5"),
        (["--num-updates", "0"], "nothing to do"),
        (["--online-steps", "-1"], "--online-steps -1"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--eval-every", "-1"], "--eval-every -1"),
        (["--eval-episodes", "0"], "--eval-episodes 0"),
        (["--final-eval-episodes", "0"], "--final-eval-episodes 0"),
        (["--checkpoint-every", "-1"], "--checkpoint-every -1"),
        (["--num-critics", "0"], "--num-critics 0"),
        (["--expectile", "1.5"], "--expectile 1.5: must be at most 1"),
        (["--grid", "expectile=0.7,-0.1"], "--expectile -0.1: must be at least 0"),
        (["--weight-clip", "0"], "--weight-clip 0.0: must be above 0"),
        (["--actor-learning-rate", "-1e-3"], "--actor-learning-rate -0.001: must be at least 0"),
        (["--hidden-dim", "0"], "--hidden-dim 0"),
        (["--seed", "-1"], "--seed -1"),
        (["--seed", "99999999999999999999"], "--seed"),
        (["--reward-scale", "nan"], "--reward-scale nan"),
        (["--beta", "nan"], "--beta nan"),
        (["--discount", "inf"], "--discount inf"),
        (["--num-seeds", "many"], "--num-seeds"),
        (["--nonsense", "1"], "--nonsense"),
        (["--quiet"], "--quiet"),
        (["--preset", "nonsense"], "nonsense"),
        (["--grid", "alpha=1,2"], "alpha"),
        (["--grid", "beta=1,two"], "two"),
        (["--grid", "beta=1 beta=2"], "twice"),
        (["--grid", "beta=1,1"], "differ"),
        (["--grid", "hidden_dim=8,16"], "hidden_dim"),
        (["--dataset", "no/such/file.npz"], "no/such/file.npz"),
        (["--dataset", "offax/hopper/excellent-v0"], "offax/hopper/excellent-v0"),
        (["--dataset", "offax/../x"], "offax/../x"),
        (["--dataset", "what is this?"], "what is this?"),
        (["--dataset", ""], "dataset"),
        (["--env", "Walker2d-v5"], "actions have 3 numbers and the environment takes 6"),
        (["--env", "CartPole-v1"], "continuous"),
        (["--env", "NoSuchThing-v3"], "NoSuchThing"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    tmp_path: Path, tiny: Path, iql: Any, monkeypatch: pytest.MonkeyPatch, flags: list[str], word: str
) -> None:
    monkeypatch.chdir(tmp_path)
    given = {"--dataset": str(tiny), "--env": "Hopper-v5", "--num-updates": "10"}
    given = [part for name, value in given.items() if name not in flags for part in (name, value)]
    assert_refused(iql(*given, *flags, "--run-dir", "run"), word)
    assert list(tmp_path.iterdir()) == []
    assert_refused(iql(*given, *flags), word)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_data_with_nan_says_where(tmp_path: Path, iql: Any, bad: float) -> None:
    arrays = hopper_like()
    arrays["rewards"][123] = bad
    np.savez(tmp_path / "bad.npz", **arrays)
    run = tmp_path / "run"
    assert_refused(iql("--dataset", tmp_path / "bad.npz", "--env", "Hopper-v5", "--run-dir", run), "rewards", "123")
    assert not run.exists()


def test_data_without_an_environment(tmp_path: Path, tiny: Path, iql: Any) -> None:
    assert_refused(iql("--dataset", tiny, "--run-dir", tmp_path / "run"), "--env")
    assert not (tmp_path / "run").exists()


def test_stderr_has_that_line_alone(tmp_path: Path, spawn: Callable[..., subprocess.Popen]) -> None:
    """In a process of its own, where first imports may speak too."""
    arrays = hopper_like()
    arrays["observations"][5, 2] = np.nan
    np.savez(tmp_path / "bad.npz", **arrays)
    process = spawn(IQL, "--dataset", "bad.npz", "--env", "Hopper-v5", cwd=tmp_path)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["bad.npz"]


def test_an_unwritable_run_directory(tmp_path: Path, small_run: list[str], iql: Any) -> None:
    (tmp_path / "file").write_text("a file")
    for run in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "file" / "further" / "below"):
        assert_refused(iql(*small_run, "--num-updates", "10", "--run-dir", run), str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "a file"
    if os.geteuid() != 0:  # to root everything is writable
        (tmp_path / "locked").mkdir(mode=0o500)
        run = tmp_path / "locked" / "run"
        assert_refused(iql(*small_run, "--num-updates", "10", "--run-dir", run), "locked")


@pytest.fixture
def taken(tmp_path: Path, uninterrupted: Path) -> Path:
    """A run directory with a finished run in it."""
    shutil.copytree(uninterrupted, tmp_path / "taken")
    return tmp_path / "taken"


def snapshot(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_run_directory_is_not_overwritten(small_run: list[str], iql: Any, taken: Path) -> None:
    before = snapshot(taken)
    assert_refused(iql(*small_run, *LONG, "--run-dir", taken), "--resume True", str(taken))
    assert snapshot(taken) == before


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--seed", "3"], "--seed"),
        (["--beta", "5"], "--beta"),
        (["--hidden-dim", "16"], "--hidden-dim"),
        (["--grid", "beta=1,2"], "--grid"),
        (["--normalize-observations", "True"], "--normalize-observations"),
    ],
)
def test_another_configurations_checkpoint(
    small_run: list[str], iql: Any, taken: Path, flags: list[str], word: str
) -> None:
    before = snapshot(taken)
    given = [part for i, part in enumerate(small_run) if small_run[i - i % 2] not in flags]
    assert_refused(iql(*given, *LONG, *flags, "--run-dir", taken, "--resume", "True"), word, str(taken))
    assert snapshot(taken) == before


def test_resuming_needs_the_directory(small_run: list[str], iql: Any) -> None:
    assert_refused(iql(*small_run, "--num-updates", "5", "--resume", "True"), "--run-dir")


def test_two_runs_of_one_second_get_two_directories(
    tmp_path: Path, small_run: list[str], iql: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(experiment.time, "strftime", lambda _: "now")
    for _ in range(2):
        assert iql(*small_run, "--num-updates", "5", "--eval-every", "0").status == 0
    assert [path.parent.name for path in sorted(Path("runs").rglob("final.json"))] == ["now", "now-1"]


def test_a_parameter_that_breaks_in_the_last_update_counts_as_divergence(
    tmp_path: Path, small_run: list[str], iql: Any
) -> None:
    """Losses are those before the update: an infinite step of the critic, which moves last, shows in no metric."""
    outcome = iql(*small_run, "--num-updates", "1", "--critic-learning-rate", "1e39", "--run-dir", tmp_path / "run")
    assert outcome.status == 3 and "diverged" in outcome.err


def test_another_dataset_of_the_same_name(tmp_path: Path, tiny: Path, small_run: list[str], iql: Any) -> None:
    data, run = tmp_path / "data.npz", tmp_path / "run"
    shutil.copy(tiny, data)
    flags = ["--num-updates", "10", "--dataset", data, "--run-dir", run, "--resume", "True"]
    assert iql(*small_run, *flags).status == 0
    with np.load(tiny) as file:
        np.savez(data, **dict(file) | {"rewards": file["rewards"] + np.float32(1)})
    assert_refused(iql(*small_run, *flags), "--dataset", "sha256")


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "other shapes", "other names", "no steps"])
def test_a_damaged_checkpoint(small_run: list[str], iql: Any, taken: Path, damage: str) -> None:
    path = taken / "checkpoint" / "state.npz"
    content = path.read_bytes()
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    largest = max((name for name in arrays if "'state'" in name), key=lambda name: arrays[name].size)
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        middle = content.index(arrays[largest].tobytes()) + arrays[largest].nbytes // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "no steps":
        metadata = json.loads(arrays["metadata"].tobytes())
        del metadata["updates_done"]
        np.savez(path, **arrays | {"metadata": np.frombuffer(json.dumps(metadata).encode(), np.uint8)})
    else:
        changed = {largest: arrays[largest][..., :1]} if damage == "other shapes" else {"odd": arrays[largest]}
        np.savez(path, **arrays | changed)
    before = snapshot(taken)
    assert_refused(iql(*small_run, *LONG, "--run-dir", taken, "--resume", "True"), "checkpoint", str(path))
    assert snapshot(taken) == before


# The shape of the code


def modules_of(folder: str) -> list[Path]:
    return sorted(path for path in (ROOT / folder).glob("*.py") if path.name != "__init__.py")


def imported(path: Path) -> set[str]:
    """Top-level packages that a file imports, anywhere in it; a relative import counts as its own folder."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(path.parent.name if node.level else node.module.split(".")[0])
    return found


@pytest.mark.parametrize("path", modules_of("algorithms"), ids=lambda path: path.name)
def test_an_algorithm_imports_common_and_third_parties_only(path: Path) -> None:
    names = imported(path)
    assert not names & {"algorithms", "benchmarks", "tests", *(other.stem for other in modules_of("algorithms"))}
    assert "common" in names


@pytest.mark.parametrize("path", modules_of("common"), ids=lambda path: path.name)
def test_common_imports_neither_algorithms_nor_benchmarks(path: Path) -> None:
    assert not imported(path) & {"algorithms", "benchmarks", "tests"}


def test_nothing_runs_at_import(tmp_path: Path, spawn: Callable[..., subprocess.Popen]) -> None:
    names = [f"{folder}.{path.stem}" for folder in ("common", "algorithms") for path in modules_of(folder)]
    assert "common.experiment" in names and "algorithms.iql" in names
    code = f"""
import importlib, signal, sys
sys.argv = ["script", "--no-such-flag", "--help"]
handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
from jax._src import xla_bridge
for name in {names}:
    importlib.import_module(name)
    assert not xla_bridge.backends_are_initialized(), name
assert handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
assert "wandb" not in sys.modules
"""
    process = spawn("-c", code, cwd=tmp_path)
    assert process.communicate(timeout=120) == ("", "")
    assert process.returncode == 0 and list(tmp_path.iterdir()) == []


def test_a_copied_file_runs_beside_common(
    tmp_path: Path, small_run: list[str], spawn: Callable[..., subprocess.Popen]
) -> None:
    shutil.copy(IQL, tmp_path / "iql.py")
    shutil.copytree(ROOT / "common", tmp_path / "common", ignore=shutil.ignore_patterns("__pycache__"))
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    code = "import sys; sys.modules.update(algorithms=None, benchmarks=None); import runpy; sys.argv = sys.argv[1:];"
    code += "sys.path[0] = ''; runpy.run_path('iql.py', run_name='__main__'); import common; print(common.__path__)"
    process = spawn("-c", code, "iql.py", *small_run, "--num-updates", "10", cwd=tmp_path, env=env)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, "")
    assert str(tmp_path) in out.splitlines()[-1], "its own common, whatever is installed"
    (config,) = tmp_path.glob("runs/iql/**/config.json")
    assert json.loads(config.read_text())["algorithm"] == "iql"
    assert {path.name for path in tmp_path.iterdir()} >= {"iql.py", "common", "runs"}
