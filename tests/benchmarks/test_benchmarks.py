import csv
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

from benchmarks import bc, cells, provenance, report, sharing, suite, throughput
from benchmarks.peer_sides import synthetic
from benchmarks.tables import Table
from common.cli import UsageError
from common.replay import Replay, Transitions

ROOT = Path(suite.ROOT)
EXTRA = "--env Hopper-v5 --eval-every 0 --final-eval-episodes 1 --hidden-dim 8 --normalize-observations False"


def linear_policy(rows, obs_dim=11, action_dim=3):
    """Transitions whose actions are a linear function of the observations."""
    rng = np.random.default_rng(0)
    observations = rng.standard_normal((rows, obs_dim)).astype(np.float32)
    weights = (0.1 * rng.standard_normal((obs_dim, action_dim))).astype(np.float32)
    ends = (np.arange(rows) % 50 == 49).astype(np.float32)
    rewards = rng.uniform(0, 1, rows).astype(np.float32)
    zeros = np.zeros(rows, np.float32)
    actions = np.clip(observations @ weights, -1, 1)
    return Transitions(observations, actions, rewards, observations, zeros, ends), weights


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a tiny dataset."""
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "tiny.npz", **linear_policy(500)[0]._asdict())
    return tmp_path


# Behaviour cloning


def test_bc_loss_is_the_mean_square_over_batch_and_action():
    policy, actions = np.array([[0.5, -0.5], [1.0, 0.0]]), np.array([[0.0, -0.5], [0.0, -0.25]])
    loss, metrics = bc.actor_loss(jnp.array(policy), jnp.array(actions))
    assert float(loss) == pytest.approx(((policy - actions) ** 2).mean()) == pytest.approx(1.3125 / 4)
    assert float(metrics["actor/loss"]) == float(loss)


def test_bc_loss_does_not_broadcast():
    with pytest.raises(AssertionError):
        bc.actor_loss(jnp.zeros((4, 1)), jnp.zeros((4, 3)))


def test_bc_recovers_a_linear_policy():
    data, weights = linear_policy(2000)
    args = bc.Args(hidden_dim=64)
    hp = bc.Hyperparameters(actor_learning_rate=1e-3)
    state = jax.jit(lambda key: bc.init(key, hp, args, 11, 3))(jax.random.key(0))
    act = jax.jit(lambda state, observations: bc.act(state, hp, observations, None, args, 3, sample=False))
    replay = Replay(jax.tree.map(jnp.asarray, data))
    trained, metrics = jax.jit(lambda state: bc.train(state, hp, replay, 600, args))(state)
    unseen = np.random.default_rng(1).standard_normal((500, 11)).astype(np.float32)

    def error(state):
        return float(np.mean((np.asarray(act(state, unseen)) - unseen @ weights) ** 2))

    spread = float(np.var(unseen @ weights))
    assert error(trained) < 0.03 * spread < 0.5 * error(state)
    assert int(trained.step) == 600
    assert set(metrics.sums) == {"actor/loss"}


def test_bc_has_no_online_phase_and_normalises_by_default():
    bc.Args(num_updates=1).validate()
    assert bc.Args().normalize_observations
    with pytest.raises(UsageError, match="online"):
        bc.Args(online_steps=5).validate()
    with pytest.raises(UsageError, match="--num-updates 0: must be at least 1"):
        bc.Args(num_updates=0).validate()


# The suite


def suite_args(**changes):
    settings = {"name": "s", "algorithms": ("bc",), "datasets": ("tiny.npz",), "num_seeds": 2, "num_updates": 20}
    return suite.Args(**settings | {"extra": EXTRA} | changes)


def test_plan_runs_all_algorithms_on_the_first_dataset_first():
    jobs = suite.plan(suite_args(algorithms=("iql", "bc"), datasets=("offax/hopper/medium-v1", "x.npz")))
    assert [job.name for job in jobs] == [
        "iql_offax-hopper-medium-v1",
        "bc_offax-hopper-medium-v1",
        "iql_x.npz",
        "bc_x.npz",
    ]
    assert jobs[0].command.startswith(
        "python algorithms/iql.py --dataset offax/hopper/medium-v1 --seed 0 --num-seeds 2"
    )
    assert jobs[1].command.startswith("python benchmarks/bc.py ")
    assert jobs[1].command.endswith(EXTRA)


@pytest.mark.parametrize(
    "changes",
    [
        {"algorithms": ("nothing",)},
        {"extra": "--num_updates 3"},
        {"extra": '--grid "beta=1'},
        {"name": "a/b"},
        {"datasets": ("x", "x")},
        {"datasets": ()},
        {"algorithms": ()},
        {"extra": "--expectile 0.9"},  # BC has none
        {"num_seeds": 0},
        {"algorithms": ("report",)},  # no script of a run
    ],
)
def test_plan_refuses(changes):
    with pytest.raises(UsageError):
        suite.plan(suite_args(**changes))


def test_a_label_gives_the_same_algorithms_names_of_their_own():
    names = [job.name for job in suite.plan(suite_args(label="long"))]
    assert names == [f"{job.name}_long" for job in suite.plan(suite_args())]


@pytest.mark.slow
def test_suite_keeps_going_after_a_failure_and_skips_what_is_done(folder, monkeypatch, capsys):
    args = suite_args(datasets=("missing.npz", "tiny.npz"))
    assert suite.main(args) == 1
    captured = capsys.readouterr()
    assert "there is no file missing.npz" in captured.out
    assert "1 of 2 runs failed: bc_missing.npz" in captured.err
    kept = folder / "results" / "s" / "bc_tiny.npz"
    assert sorted(path.name for path in kept.iterdir()) == sorted([*suite.KEPT, "command.json"])
    assert not (folder / "results" / "s" / "bc_missing.npz").exists()
    final = json.loads((kept / "final.json").read_text())
    assert [member["seed"] for member in final["members"]] == [0, 1]
    assert json.loads((kept / "command.json").read_text())["command"] == suite.plan(args)[1].command

    started = []
    monkeypatch.setattr(suite, "run", lambda job: started.append(job.name) or 0)
    shutil.rmtree(kept)
    assert suite.main(suite_args()) == 0
    assert started == []
    assert (kept / "final.json").exists()  # the small files are kept even of what was skipped
    monkeypatch.setattr(suite.Job, "keep", lambda job: None)
    suite.main(suite_args(num_updates=30))  # another command is not done
    assert started == ["bc_tiny.npz"]


@pytest.mark.slow
@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])  # the latter: the terminal was closed
def test_suite_stops_at_a_signal_with_a_checkpoint_and_then_resumes(folder, number):
    args = suite_args(num_updates=30_000, extra=EXTRA + " --batch-size 2")
    run_dir = suite.plan(args)[0].run_dir
    words = [sys.executable, str(ROOT / "benchmarks" / "suite.py"), "--name", args.name, "--algorithms", "bc"]
    words += ["--datasets", "tiny.npz", "--num-seeds", "2", "--num-updates", "30000", f"--extra={args.extra}"]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    metrics = run_dir / "metrics.csv"
    deadline = time.time() + 120
    while process.poll() is None and time.time() < deadline and not (metrics.exists() and metrics.read_text()):
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    assert "start the suite again" in errors
    assert (run_dir / "checkpoint" / "state.npz").exists()
    assert not (run_dir / "final.json").exists()
    header, first, *others = metrics.read_text().splitlines()
    before, _, loss = first.rpartition(",")
    marked = f"{before},{'1' * len(loss)}"  # a run that started anew would write this row again
    metrics.write_text("\n".join([header, marked, *others]) + "\n")

    assert suite.main(args) == 0
    assert json.loads((run_dir / "final.json").read_text())["updates"] == 30_000
    with open(metrics, newline="") as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row["member"] == "0"]
    assert set(steps) >= set(range(1000, 30_001, 1000)) and steps == sorted(set(steps))
    assert len(steps) <= 31, "the signal's own row, where it came within a chunk"
    assert metrics.read_text().splitlines()[1] == marked
    assert (run_dir / "log.txt").read_text().count("$ python benchmarks/bc.py") == 2


@pytest.mark.parametrize("ignored", [True, False])
def test_suite_goes_on_under_nohup_when_its_terminal_closes(folder, monkeypatch, ignored):
    received = []

    class Training:
        def __init__(self, *_, **__):
            pass

        def send_signal(self, number):
            received.append(number)

        def wait(self):
            signal.raise_signal(signal.SIGHUP)
            return 0

    monkeypatch.setattr(subprocess, "Popen", Training)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        status = suite.run(suite.plan(suite_args())[0])
        assert (status, received) == ((0, []) if ignored else (128 + signal.SIGHUP, [signal.SIGTERM]))
    finally:
        signal.signal(signal.SIGHUP, before)


# The report


undrawn = pytest.mark.usefixtures("blank")


def write_run(folder, algorithm, dataset, scores, average=30.0, environment="Hard-v5", **others):
    """Files of a run as a suite keeps them; a score of None is a member that diverged. `others` are flags."""
    run = folder / "_".join([algorithm, dataset, *(f"{name}-{value}" for name, value in others.items())])
    run.mkdir(parents=True)
    flags = {"dataset": dataset, "num_updates": 100, "online_steps": 0, "run_dir": str(run)} | others
    about = {"mean": 1000.0, "min": 10.0, "max": 2000.0, "episodes": 7, "score_mean": average}
    config = {"algorithm": algorithm, "flags": flags, "dataset_returns": about, "git_commit": "abc123"}
    config |= {
        "environment": environment,
        "git_dirty": False,
        "cpu": {"model": "A processor", "cores": 3},
        "versions": {"jax": "9.9"},
    }
    config |= {"device": {"platform": "cpu", "kind": "cpu", "count": 3}}
    members, rows = [], []
    for i, score in enumerate(scores):
        result = {"return_mean": None, "return_std": None, "score_mean": score, "score_std": None, "episodes": 10}
        if score is not None:
            result |= {"return_mean": 10 * score, "return_std": 1.0, "score_std": 0.1}
            for step in (0, 100):
                row = {"phase": "offline", "step": step, "member": i, "seed": i, "return_mean": step, "return_std": 0}
                rows.append(row | {"score_mean": score * step / 100, "score_std": 0, "episodes": 10})
        diverged = {"step": 42, "metric": "actor/loss"} if score is None else None
        members.append({"member": i, "seed": i, "swept": {}, "diverged": diverged} | result)
    final = {
        "members": members,
        "updates": flags["num_updates"],
        "online_steps": flags.get("online_steps", 0),
        "wall_clock_seconds": 12.0,
        "updates_per_second": 321.4,
    }
    for name, content in (
        ("config", config),
        ("final", final),
        ("command", {"command": " ".join(["python", algorithm, dataset, *map(str, others.items())])}),
    ):
        (run / f"{name}.json").write_text(json.dumps(content))
    with open(run / "evaluations.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else ["phase"])
        writer.writeheader()
        writer.writerows(rows)


def cells_of(page, first):
    """The cells of the first table row that starts with `first`."""
    line = next(line for line in page.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_report_is_computed_by_hand(tmp_path):
    write_run(tmp_path, "bc", "easy", [10.0, 20.0, 30.0, 90.0])  # the middle half: 20 and 30
    write_run(tmp_path, "iql", "easy", [50.0, 50.0, 50.0, 50.0])
    write_run(tmp_path, "bc", "hard", [0.0, 0.0, 0.0, 0.0])
    write_run(tmp_path, "iql", "hard", [4.0, None, 8.0, 6.0])  # three scores: nothing is cut
    (tmp_path / "notes.md").write_text("What the table means.\n")
    other = tmp_path / "main.md"
    other.write_text("Before.\n<!-- scores -->\nan older table\n<!-- /scores -->\nAfter.\n")
    (tmp_path / "best_of_k.png").write_text("of an earlier page")
    report.main([str(tmp_path), "--page", str(other)])
    page = (tmp_path / "README.md").read_text()

    assert "| all 2 |" in page[: page.index("What the table means.")]
    assert cells_of(page, "dataset") == ["dataset", "data", "bc", "iql"]
    easy = cells_of(page, "easy")
    assert easy[:2] == ["easy", "30.0"]
    assert easy[2].startswith("25.0 [")
    assert easy[3] == "50.0 [50.0, 50.0]"
    hard = cells_of(page, "hard")
    assert hard[2] == "0.0 [0.0, 0.0]"
    assert hard[3] == "6.0 [4.0, 8.0], 1 diverged"
    there = other.read_text()
    assert cells_of(there, "hard") == hard and there.startswith("Before.\n") and there.endswith("\nAfter.\n")
    assert "older" not in there
    total = cells_of(page, "all 2")
    assert total[2].startswith("7.5 [")  # of 0 0 | 0 0 10 20 | 30 90
    assert total[3].startswith("32.8 [") and total[3].endswith("], 1 diverged")  # of 4 | 6 8 50 50 50 | 50
    for text in ("abc123", "A processor, 3 cores", "jax 9.9", "python iql hard", "seeds: 0, 1, 2, 3", "321"):
        assert text in page
    returns = cells_of(page[page.index("## Return") :], "easy")
    assert returns[1:4] == ["1000", "10 to 2000", "7"]
    assert returns[4].startswith("250.0 [")

    with open(tmp_path / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 16
    lost = next(row for row in rows if row["dataset"] == "hard" and row["algorithm"] == "iql" and row["seed"] == "1")
    assert (lost["score_mean"], lost["diverged_at"]) == ("", "42")
    for name in ("scores", "curves_easy", "curves_hard"):
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert not (tmp_path / "best_of_k.png").exists()


@undrawn
def test_report_says_what_the_scores_of_its_environments_mean(tmp_path):
    for folder in (tmp_path / "mixed", tmp_path / "tasks"):
        write_run(folder, "bc", "cube", [0.0, 50.0], average=None, environment="cube-single-singletask-task3-v0")
    write_run(tmp_path / "mixed", "bc", "easy", [10.0, 20.0])
    report.main([str(tmp_path / "mixed"), str(tmp_path / "tasks")])
    mixed, tasks = ((tmp_path / name / "README.md").read_text() for name in ("mixed", "tasks"))
    assert "D4RL" in mixed
    assert "share of episodes with success" in mixed
    assert "D4RL" not in tasks
    assert "## Success rate" in tasks and "## Normalised score" in mixed
    assert "share of episodes with success" in tasks


def test_report_of_fine_tuning_shows_the_scores_before_and_after(tmp_path):
    write_run(tmp_path, "iql", "easy", [40.0, 60.0])
    write_run(tmp_path, "bc", "easy", [5.0, 5.0])
    run = tmp_path / "iql_easy"
    final = json.loads((run / "final.json").read_text()) | {"online_steps": 70, "updates": 200}
    (run / "final.json").write_text(json.dumps(final))
    with open(run / "evaluations.csv", "a") as file:
        for step, scores in ((0, (10.0, 20.0)), (70, (40.0, 60.0))):
            for i, score in enumerate(scores):
                file.write(f"online,{step},{i},{i},{step},0,{score},0,10\n")
    report.main([str(tmp_path)])
    page = (tmp_path / "README.md").read_text()
    part = page[page.index("## Fine-tuning") : page.index("## Learning curves")]
    row = cells_of(part, "iql, easy")
    assert row[1:] == ["200", "70", "15.0 [10.0, 20.0]", "50.0 [40.0, 60.0]", "67.5 [60.0, 75.0]"]
    assert "bc, easy" not in part, "it has no online phase"
    assert "offline updates: 100 (bc); 200 (iql)" in page
    assert cells_of(page, "easy")[2:] == ["5.0 [5.0, 5.0], after 100", "50.0 [40.0, 60.0]"]
    (cell,) = cells.after(report.read(tmp_path), 200)
    assert cell.values("score_mean") == [10.0, 20.0], "the last offline policy is evaluated as the first online"
    assert report.last_evaluations(cell, 10) == {"0": [(100, 40.0), (200, 10.0)], "1": [(100, 60.0), (200, 20.0)]}
    lines = (run / "evaluations.csv").read_text().splitlines(keepends=True)
    (run / "evaluations.csv").write_text("".join(lines[:-2]))  # cut off at the switch
    cell = next(cell for cell in report.read(tmp_path) if cell.algorithm == "iql")
    assert report.last_evaluations(cell, 10) == {"0": [(100, 40.0)], "1": [(100, 60.0)]}


@undrawn
def test_report_of_fine_tuning_is_of_the_members_that_are_left(tmp_path):
    """A seed that diverged online is in neither column; where nothing was evaluated at the switch, none is known."""
    for name, first in (("iql", 0), ("awac", 35)):
        write_run(tmp_path, name, "easy", [40.0, None, 60.0])
        run = tmp_path / f"{name}_easy"
        final = json.loads((run / "final.json").read_text()) | {"online_steps": 70, "updates": 200}
        (run / "final.json").write_text(json.dumps(final))
        with open(run / "evaluations.csv", "a") as file:
            for step, scores in ((first, (10.0, -90.0, 20.0)), (70, (40.0, None, 60.0))):
                for i, score in enumerate(scores):
                    if score is not None:
                        file.write(f"online,{step},{i},{i},{step},0,{score},0,10\n")
    report.write(tmp_path)
    page = (tmp_path / "README.md").read_text()
    part = page[page.index("## Fine-tuning") : page.index("## Learning curves")]
    row = cells_of(part, "iql, easy, 1 diverged")
    assert row[3:] == ["15.0 [10.0, 20.0]", "50.0 [40.0, 60.0]", "67.5 [60.0, 75.0]"]
    assert cells_of(part, "awac, easy, 1 diverged")[3:] == ["-", "50.0 [40.0, 60.0]", "-"]


def test_runs_on_different_data_of_one_name_are_in_no_table(tmp_path):
    for algorithm, data in (("bc", "1a"), ("iql", "1a"), ("awac", "2b")):
        write_run(tmp_path, algorithm, "easy", [10.0])
        file = tmp_path / f"{algorithm}_easy" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"dataset_sha256": data}))
    with pytest.raises(UsageError, match="learned from other data than another run on easy"):
        report.read(tmp_path)
    shutil.rmtree(tmp_path / "awac_easy")
    assert len(report.read(tmp_path)) == 2


def test_a_resumed_run_keeps_the_commits_that_trained_it(tmp_path, monkeypatch):
    for commit, dirty in (("1a", True), ("1a", False), ("2b", False)):
        monkeypatch.setattr(provenance, "commit_at", lambda _, c=commit, d=dirty: {"git_commit": c, "git_dirty": d})
        about = provenance.of_run(tmp_path if (tmp_path / "config.json").exists() else None)
        (tmp_path / "config.json").write_text(json.dumps(about))
    assert (about["git_commit"], about["git_dirty"]) == ("1a; 2b", True)
    assert provenance.of_run(None)["git_commit"] == "2b"
    (tmp_path / "config.json").write_text("{")
    assert provenance.of_run(tmp_path)["git_commit"] == "2b", "its record is damaged"


def test_the_cores_of_a_page_are_those_that_a_run_may_use(monkeypatch):
    monkeypatch.setenv("NPROC", "7")
    assert provenance.provenance()["cpu"]["cores"] == 7


@undrawn
def test_report_of_a_run_without_provenance_and_of_a_damaged_one(tmp_path):
    """A copied algorithm without benchmarks/ does not know its commit and versions."""
    write_run(tmp_path, "bc", "easy", [10.0])
    file = tmp_path / "bc_easy" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({k: x for k, x in config.items() if k not in ("git_commit", "versions", "cpu")}))
    report.write(tmp_path)
    assert "commit: `unknown`" in (tmp_path / "README.md").read_text()
    file.write_text("{")
    with pytest.raises(UsageError, match=r"config\.json is damaged"):
        report.read(tmp_path)


@undrawn
def test_report_names_the_flags_in_which_runs_differ_and_the_environment_where_no_data_was_used(tmp_path):
    write_run(tmp_path, "awr", "easy", [10.0], num_updates=0, rate=0.1, hidden_dim=8, online_steps=900)
    write_run(tmp_path, "awr", "easy", [20.0], num_updates=0, rate=1e-4, hidden_dim=8, online_steps=1000)
    write_run(tmp_path, "awr", "hard", [30.0], rate=1e-4, hidden_dim=16)
    cells = {(cell.algorithm, cell.dataset): cell.values("score_mean") for cell in report.read(tmp_path)}
    expected = {("awr", "Hard-v5"): [10.0], ("awr rate=0.0001", "Hard-v5"): [20.0]}
    assert cells == expected | {("awr", "hard"): [30.0]}
    report.write(tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert cells_of(page, "Hard-v5")[1] == "-", "a dataset that was not trained on has no average to beat"
    assert cells_of(page, "Hard-v5")[2] == "10.0, after 900 steps", "one seed has no interval"
    assert "| awr rate=0.0001, Hard-v5 |" in page
    write_run(tmp_path, "awr", "hard", [30.0], rate=1e-4, hidden_dim=16, seed=7)
    with pytest.raises(UsageError, match="awr on hard twice"):
        report.read(tmp_path)


def test_a_label_means_the_same_where_the_run_without_it_is_missing(tmp_path):
    for dataset in ("easy", "hard"):
        write_run(tmp_path, "iql", dataset, [10.0], rate=2)
    write_run(tmp_path / "plain", "iql", "easy", [20.0], rate=1)
    shutil.move(tmp_path / "plain" / "iql_easy_rate-1", tmp_path / "iql_easy")
    (tmp_path / "plain").rmdir()
    names = {(cell.dataset, cell.algorithm) for cell in report.read(tmp_path)}
    assert names == {("easy", "iql"), ("easy", "iql rate=2"), ("hard", "iql rate=2")}


@undrawn
def test_aggregate_is_over_the_datasets_that_every_algorithm_has(tmp_path):
    write_run(tmp_path, "bc", "easy", [10.0, 10.0])
    write_run(tmp_path, "bc", "hard", [2.0])
    write_run(tmp_path, "iql", "easy", [30.0, 30.0])
    datasets, totals = report.aggregate(report.read(tmp_path))
    assert datasets == ["easy"]
    assert totals == {"bc": {"iqm": 10.0, "low": 10.0, "high": 10.0}, "iql": {"iqm": 30.0, "low": 30.0, "high": 30.0}}
    report.write(tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert cells_of(page, "hard")[3] == "not run"
    assert cells_of(page, "the 1 with every algorithm")[2] == "10.0 [10.0, 10.0]"


def test_runs_of_other_lengths_are_left_out_of_averages_and_comparisons(tmp_path, monkeypatch):
    for algorithm, dataset, score, updates in (
        ("bc", "easy", 10.0, 100),
        ("bc", "hard", 20.0, 100),
        ("iql", "easy", 30.0, 100),
        ("iql", "hard", 90.0, 7),
        ("cql", "easy", 99.0, 7),
    ):
        write_run(tmp_path, algorithm, dataset, [score, score], num_updates=updates)
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **options: drawn.append((path.stem, self)))
    report.write(tmp_path)
    page = (tmp_path / "README.md").read_text()
    total = cells_of(page, "the 1 with every algorithm, after 100 updates")
    assert total[2:] == ["10.0 [10.0, 10.0]", "-", "30.0 [30.0, 30.0]"]
    assert cells_of(page, "hard")[4] == "90.0 [90.0, 90.0], after 7"
    assert cells_of(page, "P(row > column)") == ["P(row > column)", "bc", "iql"]
    assert cells_of(page[page.index("P(row") :], "iql")[1:] == ["1.00 [1.00, 1.00]", ""]
    titles = {}
    for axes in dict(drawn)["scores"].axes:
        if axes.get_visible():
            titles[axes.get_title()] = sorted(x for line in axes.lines for x in set(line.get_xdata()))
    assert titles == {
        "easy\nafter 100 updates": [10, 10, 30, 30, 30],  # seed and mean of each, and the data's average
        "hard\nafter 100 updates": [20, 20, 30],
        "easy\nafter 7 updates": [30, 99, 99],
        "hard\nafter 7 updates": [30, 90, 90],
    }
    shorter = {axes.get_title().split("\n")[0]: axes.title.get_color() for axes in dict(drawn)["curves_easy"].axes}
    assert shorter == {"bc": "black", "cql": "tab:red", "iql": "black"}


@undrawn
def test_runs_of_other_lengths_are_compared_at_the_updates_that_all_have(tmp_path):
    for algorithm, updates, then in (("bc", 100, (1.0, 2.0)), ("iql", 40, (3.0,)), ("cql", 20, ())):
        write_run(tmp_path, algorithm, "easy", [60.0, None], num_updates=updates)
        with open(tmp_path / f"{algorithm}_easy_num_updates-{updates}" / "evaluations.csv", "a") as file:
            file.writelines(f"offline,40,{i},{i},0,0,{score},0,4\n" for i, score in enumerate(then))
            file.write("online,40,0,0,0,0,99,0,9\n")
    for algorithm in ("bc", "iql"):
        write_run(tmp_path, algorithm, "hard", [7.0])
    with open(tmp_path / "iql_hard" / "evaluations.csv", "a") as file:
        file.write("offline,40,0,0,0,0,5,0,4\n")
    report.main([str(tmp_path), "--at", "40"])
    page = (tmp_path / "README.md").read_text()
    assert "--at 40`" in page
    part = page[page.index("### After 40 updates") :]
    assert "4 episodes for each seed" in part
    assert cells_of(part, "dataset") == ["dataset", "data", "bc", "iql"], "the other had ended by then"
    assert cells_of(part, "hard")[2:] == ["not evaluated", "5.0"], "it was run"
    assert cells_of(part, "easy")[2:] == ["1.5 [1.0, 2.0]", "3.0, 1 diverged"]
    (tmp_path / "scores.csv").unlink()
    with pytest.raises(SystemExit):
        report.main([str(tmp_path), "--at", "41"])
    assert not (tmp_path / "scores.csv").exists(), "nothing is half-written"


@undrawn
def test_a_run_that_diverged_before_the_point_of_comparison_is_in_it(tmp_path):
    write_run(tmp_path, "bc", "easy", [60.0])
    write_run(tmp_path, "iql", "easy", [None, None])
    final = tmp_path / "iql_easy" / "final.json"
    final.write_text(json.dumps(json.loads(final.read_text()) | {"updates": 300}))  # of other settings of a grid
    report.main([str(tmp_path), "--at", "100"])
    page = (tmp_path / "README.md").read_text()
    assert cells_of(page[page.index("### After 100 updates") :], "easy")[2:] == ["60.0", "-, 2 diverged"]


@undrawn
def test_a_run_without_an_online_phase_has_its_length_beside_those_that_have_one(tmp_path):
    write_run(tmp_path, "bc", "easy", [60.0])
    write_run(tmp_path, "iql", "easy", [70.0], online_steps=50)
    report.write(tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert "60.0, after 100 updates" in cells_of(page, "easy")


def test_results_have_nothing_of_the_run_that_was_there_before(tmp_path):
    """As where the new one was cut off before its end."""
    job = suite.plan(suite_args(runs_dir=tmp_path / "runs", results_dir=tmp_path / "results"))[0]
    for folder, names in ((job.results_dir, (*suite.KEPT, "command.json")), (job.run_dir, ("config.json",))):
        folder.mkdir(parents=True)
        for name in names:
            (folder / name).write_text(folder.parts[-3])
    job.keep()
    assert {path.name: path.read_text() for path in job.results_dir.iterdir()} == {"config.json": "runs"}


@undrawn
def test_a_run_that_was_cut_off_counts_as_far_as_it_was_evaluated(tmp_path, capsys):
    write_run(tmp_path, "bc", "easy", [60.0])
    write_run(tmp_path, "iql", "easy", [60.0, 70.0, None])
    run = tmp_path / "iql_easy"
    config = json.loads((run / "config.json").read_text())
    members = [{"member": i, "seed": i + 5, "swept": {}, "hyperparameters": {}} for i in range(3)]
    (run / "config.json").write_text(json.dumps(config | {"members": members}))
    (run / "final.json").unlink()
    with open(run / "evaluations.csv") as file:
        rows = list(csv.reader(file))
    rows = [row for row in rows if row[1] != "100"]
    rows += [["offline", "40", i, i, 7, 0, score, 0, 4] for i, score in enumerate((20.0, 30.0))]
    with open(run / "evaluations.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    report.write(tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert cells_of(page, "easy")[3] == "25.0 [20.0, 30.0], 1 diverged, after 40"
    assert "40 (iql); 100 (bc)" in page and "episodes for each seed: 10 or 4" in page
    seeds = list(csv.DictReader((tmp_path / "scores.csv").open()))
    assert [row["seed"] for row in seeds if row["algorithm"] == "iql"] == ["5", "6", "7"]
    report.main([str(run)])
    out, err = capsys.readouterr()
    assert err == "not finished; after 40 updates:\n" and "interquartile mean 25.0 20.0" in " ".join(out.split())
    (run / "evaluations.csv").unlink()
    with pytest.raises(UsageError, match=r"iql_easy has no final\.json, and no evaluation so far"):
        report.read(tmp_path)


@undrawn
def test_the_last_ten_evaluations_stand_beside_the_last_and_the_best(tmp_path):
    """Of twelve evaluations after the untrained one, of which the second is the best."""
    write_run(tmp_path, "iql", "easy", [7.0, None])
    scores = [1000.0, 3.0, 80.0, *range(10, 19), 7.0]
    lines = [f"offline,{100 * i},0,0,0,0,{score},0,10\n" for i, score in enumerate(scores)]
    table = tmp_path / "iql_easy" / "evaluations.csv"
    table.write_text(table.read_text().splitlines()[0] + "\n" + "".join(lines) + "offline,100,1,1,0,0,500,0,10\n")
    report.write(tmp_path)
    row = cells_of((tmp_path / "README.md").read_text(), "iql, easy")
    assert row[1:] == ["7.0", "13.3", "80.0"]  # (10 + ... + 18 + 7) / 10


@undrawn
def test_the_mean_of_the_last_ten_is_averaged_over_datasets_where_every_run_has_ten(tmp_path):
    head = "phase,step,member,seed,return_mean,return_std,score_mean,score_std,episodes\n"
    for name, level in (("easy", 10.0), ("hard", 20.0)):
        write_run(tmp_path, "bc", name, [1.0, 1.0])
        rows = [f"offline,{10 * i},{m},{m},0,0,{level + m},0,10\n" for i in range(1, 11) for m in range(2)]
        (tmp_path / f"bc_{name}" / "evaluations.csv").write_text(head + "".join(rows))
    report.write(tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert cells_of(page, "all 2")[2] == "1.0 [1.0, 1.0]"
    # Of 10, 11, 20, 21 the middle two.
    assert cells_of(page, "the same 2, mean of the last 10 evaluations")[2].startswith("15.5 [")
    cut = report.after(report.read(tmp_path), 90)[0]
    assert len(report.last_evaluations(cut, 10)["0"]) == 9, "none after the point of comparison"
    table = tmp_path / "bc_easy" / "evaluations.csv"
    lines = table.read_text().splitlines(keepends=True)
    others = ("".join(lines[:-2]), "".join(lines).replace("offline,10,", "offline,15,"))
    for text in others:  # one run has nine, or other ones
        table.write_text(text)
        text = report.table(report.read(tmp_path), "score_mean", lambda about: [], [])
        assert "all 2" in text and "the same 2" not in text


@undrawn
def test_single_seeds_are_not_compared(tmp_path):
    write_run(tmp_path, "bc", "easy", [10.0])
    write_run(tmp_path, "iql", "easy", [30.0, 40.0])
    report.write(tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert cells_of(page, "easy")[2:] == ["10.0", "35.0 [30.0, 40.0]"] and "P(row > column)" not in page


@undrawn
def test_diverged_seeds_are_counted_and_may_stand_at_the_worst(tmp_path):
    write_run(tmp_path, "iql", "easy", [50.0, None, 40.0, None])
    write_run(tmp_path, "bc", "easy", [4.0, 10.0])
    report.write(tmp_path)
    page = (tmp_path / "README.md").read_text()
    row = cells_of(page[page.index("### Diverged seeds") :], "iql, easy")
    assert row[1:4] == ["4", "2", "45.0 [40.0, 50.0]"]
    assert row[4].startswith("22.0 [4.0, ") and row[5] == "4.0"  # of 4 | 4 40 | 50
    compared = cells_of(page[page.index("P(row") :], "iql")
    assert compared[1].startswith("0.62 [")  # two of four are above both; the lost ones equal 4 and lose to 10


@undrawn
def test_a_run_whose_seeds_all_diverged_loses_every_comparison(tmp_path):
    """It ended early, and the dataset on which it did still counts."""
    write_run(tmp_path, "iql", "easy", [91.0, 91.0])
    write_run(tmp_path, "iql", "hard", [None, None])
    final = tmp_path / "iql_hard" / "final.json"
    final.write_text(json.dumps(json.loads(final.read_text()) | {"updates": 42}))
    for name in ("easy", "hard"):
        write_run(tmp_path, "bc", name, [52.0, 52.0])
    report.write(tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert cells_of(page[page.index("P(row") :], "iql")[1].startswith("0.75 [")  # 1 on easy; on hard a tie at the worst
    assert cells_of(page, "all 2, after 100 updates")[2:] == ["52.0 [52.0, 52.0]", "-, 2 diverged"]


@undrawn
def test_a_cut_of_the_episodes_is_a_setting_and_keeping_the_best_is_none(tmp_path):
    for number, flags in enumerate(({}, {"max_episode_steps": 200}, {"keep_best": True})):
        plain = {"max_episode_steps": 0, "keep_best": False}
        write_run(tmp_path / str(number), "iql", "easy", [1.0], **plain | flags)
        shutil.move(next((tmp_path / str(number)).iterdir()), tmp_path / f"iql_easy{'_' * number}")
    shutil.rmtree(tmp_path / "iql_easy__")
    assert [cell.algorithm for cell in cells.read(tmp_path)] == ["iql", "iql max_episode_steps=200"]
    assert "keep_best" in cells.NOT_SETTINGS
    final = tmp_path / "iql_easy_" / "final.json"  # episodes that were cut have returns and no score
    record = json.loads(final.read_text())
    record["members"][0]["score_mean"] = None
    final.write_text(json.dumps(record))
    report.write(tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert cells_of(page, "easy")[2:] == ["1.0", "-"] and "The best of k" not in page and "diverged" not in page


def test_the_best_of_k_settings_is_over_the_runs_of_one_algorithm(tmp_path, monkeypatch):
    for rate, scores in ((1, [10.0, 30.0]), (2, [40.0, 40.0]), (3, [None, 10.0])):
        write_run(tmp_path, "awr", "easy", scores, rate=rate)
    write_run(tmp_path, "bc", "easy", [25.0])
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **options: drawn.append((path.stem, self)))
    report.write(tmp_path)
    page = (tmp_path / "README.md").read_text()
    row = cells_of(page[page.index("### The best of k") :], "awr, easy")
    # Means 20, 40 and, the lost one at 10, 10: of two draws the best is 40 in 5 of 9, 20 in 3 of 9.
    assert [text.split()[0] for text in row[1:]] == ["23.3", "30.0", f"{(10 + 20 * 7 + 40 * 19) / 27:.1f}"]
    (axes,) = dict(drawn)["best_of_k"].axes
    levels = {line.get_label(): set(line.get_ydata()) for line in axes.lines if line.get_label() != "awr"}
    assert levels == {"data's average": {30.0}, "bc": {25.0}}


def test_report_against_a_setting_has_a_line_for_what_the_runs_share(tmp_path, capsys):
    """Values in order, whether they are flags or were swept within a run; what has no such value is refused."""
    for count, score in ((100, 7.0), (5, 3.0)):
        write_run(tmp_path, "emaq", "easy", [score], num_proposals=count, model="a")
    write_run(tmp_path, "emaq", "easy", [9.0, None], num_proposals=20, model="b")
    run = tmp_path / "emaq_easy_num_proposals-20_model-b"
    final = json.loads((run / "final.json").read_text())
    for member in final["members"]:
        member["swept"] = {"num_proposals": 50.0}
    (run / "final.json").write_text(json.dumps(final))
    report.main([str(tmp_path), "--against", "num-proposals"])
    page = (tmp_path / "README.md").read_text()
    assert cells_of(page, "num_proposals") == ["num_proposals", "5", "50", "100"]
    rows = [cells_of(page, label)[1:] for label in ("emaq, easy", "emaq model=b, easy")]
    assert rows[0] == ["3.0", "not run", "7.0"]
    assert rows[1] == ["not run", "9.0, 1 diverged", "not run"]
    assert "report.py results/" in page and "--against num_proposals`" in page
    assert (tmp_path / "against_num_proposals.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(SystemExit, match="2"):
        report.main([str(tmp_path), "--against", "model"])
    assert "--against model: emaq" in capsys.readouterr().err


def test_report_of_a_dataset_on_which_everything_diverged_before_its_first_evaluation(tmp_path):
    write_run(tmp_path, "bc", "easy", [1.0])
    write_run(tmp_path, "bc", "hard", [1.0])
    run = tmp_path / "bc_hard"
    (run / "evaluations.csv").unlink()
    final = json.loads((run / "final.json").read_text())
    final["members"][0] |= dict.fromkeys(("return_mean", "score_mean")) | {"diverged": {"step": 5, "metric": "x"}}
    (run / "final.json").write_text(json.dumps(final))
    report.write(tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert "curves_easy.png" in page and "curves_hard.png" not in page and "1 diverged" in page


@undrawn
def test_speed_has_a_row_for_each_run_that_measured_it(tmp_path):
    for dataset, rate in (("easy", 5.0), ("hard", None), ("harder", 7.0)):
        write_run(tmp_path, "bc", dataset, [1.0])
        run = tmp_path / f"bc_{dataset}"
        (run / "command.json").write_text('{"command": "one call of all"}')
        final = json.loads((run / "final.json").read_text()) | {"updates_per_second": rate}
        (run / "final.json").write_text(json.dumps(final))
    report.write(tmp_path)
    page = (tmp_path / "README.md").read_text().partition("## Speed")[2]
    assert [cells_of(page, f"bc, {name}")[3] for name in ("easy", "harder")] == ["5", "7"]
    assert "| bc, hard |" not in page


def test_a_table_that_a_kill_has_cut_is_gone_on_with_after_its_last_whole_row(tmp_path):
    table = Table(tmp_path / "new" / "t.csv")
    table.append([{"a": 1, "b": 2}])
    with open(table.path, "a") as file:
        file.write("3,")
    table.append([{"a": 5, "b": 6}])
    assert table.read() == [{"a": "1", "b": "2"}, {"a": "5", "b": "6"}]


def test_runs_that_share_cores_are_sorted_by_number_and_end_with_the_one_that_fails(tmp_path, monkeypatch):
    made = {"processor": "x", "cores": 2, "git_commit": "y", "load": 0.5, "quota": "none", "threads": 1}
    rows = [made | {"processes": count, "updates_per_second": 10.0 * count} for count in (16, 2)]
    Table(tmp_path / "s.csv").append(rows)
    assert re.findall(r"none \| (\d+)", sharing.report(tmp_path / "s")) == ["2", "16"]
    with pytest.raises(UsageError, match="--processes and --threads must be at least 1"):
        sharing.main(sharing.Args(processes=(0,)))
    started, start = [], subprocess.Popen
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: started.append(start(sleep)) or started[-1])
    with pytest.raises(FileNotFoundError):
        sharing.together(2, 1, sharing.Args(cgroup=tmp_path / "none"))
    assert len(started) == 1 and started[0].poll() is not None


def test_report_without_results_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        report.main([str(tmp_path)])
    assert capsys.readouterr().err.count("\n") == 1


# Throughput


def test_throughput_page_has_median_and_range(tmp_path):
    names = ("cpu", "cores", "git_commit", "python", "jax", "jaxlib", "flax", "optax", "numpy", "transitions")
    shared = dict.fromkeys(names, "x") | {"date": "today", "load_average": 0.5, "command": "python algorithms/iql.py"}
    with open(tmp_path / "t.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["quantity", "members", "value", "unit", *shared])
        writer.writeheader()
        for value in (300, 100, 260):
            writer.writerow({"quantity": "updates/s", "members": 2, "value": value, "unit": "1/s"} | shared)
        writer.writerow({"quantity": "first update, cold", "members": 1, "value": 7.25, "unit": "s"} | shared)
    page = throughput.report(tmp_path / "t.csv")
    assert cells_of(page, "updates/s, all members") == ["updates/s, all members", "2", "260", "100", "300", "3", "1/s"]
    assert cells_of(page, "first update, no compilation cache")[2:5] == ["7.2", "7.2", "7.2"]


def groups_of(**quantities):
    return {
        (quantity, members): [{"value": str(value)} for value in values]
        for quantity, sizes in quantities.items()
        for members, values in sizes.items()
    }


def test_throughput_page_says_where_members_stop_paying_and_what_they_take():
    rates = {1: [100, 90, 300], 2: [194, 10, 200], 4: [199, 198, 202], 16: [200, 200, 100]}
    memory = {1: [500, 502], 2: [510, 512], 4: [530, 532]}
    groups = groups_of(**{"updates/s": rates, "peak memory": memory})
    pays, slope = throughput.scaling(groups)
    assert "members: 2 reach 194 updates/s together; more members no longer add" in pays
    assert slope == "- memory per member: 10.0 MiB"
    growing = groups_of(**{"updates/s": {1: [100], 2: [193], 4: [200]}})
    assert throughput.scaling(growing) == [
        "- members: 4 reach 200 updates/s together; more than that were not measured, and may add to it"
    ]
    assert throughput.scaling(groups_of(**{"updates/s": {1: [100]}, "peak memory": {1: [5]}})) == []


def test_throughput_page_has_the_scaling(tmp_path):
    shared = {"load_average": 0.5, "date": "d", "command": "c"}
    shared |= dict.fromkeys(("cpu", "cores", "git_commit", "python", "jax", "jaxlib", "flax", "optax", "numpy"), "x")
    with open(tmp_path / "t.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["quantity", "members", "value", "unit", *shared, "transitions"])
        writer.writeheader()
        for members, value in ((8, 180), (64, 740)):
            row = {"quantity": "peak memory", "members": members, "value": value, "unit": "MiB", "transitions": 9}
            writer.writerow(row | shared)
    assert "\n- memory per member: 10.0 MiB\n" in throughput.report(tmp_path / "t.csv")


def test_throughput_plan_times_what_follows_the_first_stretch():
    jobs = throughput.plan(throughput.Args(populations=(1, 8), timed_updates=4000), 0)
    assert [job.members for job in jobs[:2]] == [1, 8]
    assert "--num-updates 4100 " in jobs[0].flags
    assert "--num-updates 1100 " in jobs[1].flags
    cold, warm = jobs[2:4]
    assert cold.quantity == "first update, cold" and warm.quantity == "first update, warm"
    assert cold.cache == warm.cache != throughput.plan(throughput.Args(), 1)[-4].cache


def test_speed_table_has_the_hours_of_a_million_updates_and_of_the_model_before_them(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- speed -->\nold\n<!-- /speed -->\nafter\n")
    measured = [throughput.Measured(50.0, 1.0, 3 * 2**30, 20.0), throughput.Measured(400.0, 1.0, 2**29, None)]
    monkeypatch.setattr(throughput, "measure", lambda *_: measured.pop(0))
    scripts = [throughput.Script("emaq", "--preset cpu", rows=10), throughput.Script("iql", rows=20)]
    throughput.run_algorithms(throughput.Args(algorithms=True, output=tmp_path / "speed"), scripts, [page])
    text = page.read_text()
    hours = 1e6 / 50 / 3600, 20_000 / 20 / 3600  # the preset's 20,000 updates of the behaviour model
    expected = ["`emaq.py --preset cpu`", "50.0", f"{hours[0]:.1f}", f"{hours[1]:.2f}", "3072"]
    assert cells_of(text, "`emaq.py --preset cpu`") == expected
    assert cells_of(text, "`iql.py`") == ["`iql.py`", "400.0", "0.69", "-", "512"]
    assert text.startswith("before\n<!-- speed -->\n") and text.endswith("<!-- /speed -->\nafter\n")
    assert "on 10 transitions, with which memory grows, `iql.py` on 20;" in text
    assert "old" not in text and len(throughput.Table(tmp_path / "speed.csv").read()) == 2


def test_a_page_without_the_place_for_a_table_is_left_alone(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- speed -->\n")
    with pytest.raises(UsageError, match="0 places for speed"):
        throughput.fill(page, "speed", "text")
    assert page.read_text() == "<!-- speed -->\n"


@pytest.mark.slow
def test_speed_of_a_script_is_that_of_its_own_run(tmp_path):
    """EMaQ, small: rates of both phases and the memory of the process, whose Python alone takes more than 100 MiB."""
    np.savez(tmp_path / "data.npz", **synthetic(1000))
    flags = "--preset none --num-updates 120 --behavior-updates 120 --eval-every 0 --final-eval-episodes 1"
    flags += " --num-proposals 2 --num-critics 1 --hidden-dim 8 --embedding-dim 8 --head-dim 8 --batch-size 8"
    cache, script = tmp_path / "cache", Path("algorithms", "emaq.py")
    found = throughput.measure(tmp_path / "data.npz", tmp_path / "run", cache, flags.split(), script, "Hopper-v5")
    assert found.updates_per_second > 1 and found.behavior_updates_per_second > 1
    assert 100 < found.peak_bytes / 2**20 < 4000
