"""Several datasets as one population: the runs are those of the algorithms' own scripts."""

import json
from contextlib import nullcontext

import numpy as np
import pytest
from conftest import arrays_of, hopper_like, rows_of, smaller

from benchmarks import at_once
from common.cli import UsageError
from common.report import claim, load_policy, read_json

VARIANTS = {
    "iql": ("", "slow:--polyak 0.5 --normalize-observations True"),
    "awr": ("", "hot:--temperature 2"),
    "emaq": ("",),
}


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Two datasets with different numbers of states."""
    folder, paths = tmp_path_factory.mktemp("sets"), []
    for name, shift in (("one", 0.0), ("other", 1.0)):
        fields = hopper_like()
        fields["rewards"] += shift
        if shift:
            fields["truncations"][30] = True
            fields["next_observations"][30] += 1.0
        np.savez(folder / f"{name}.npz", **fields)
        paths.append(str(folder / f"{name}.npz"))
    return paths


def arguments(tmp_path, sets, algorithm, **changes):
    """Those of a small call."""
    words = [
        "--env",
        "Hopper-v5",
        "--preset",
        "none",
        "--hidden-dim",
        "8",
        "--batch-size",
        "16",
        "--eval-episodes",
        "1",
    ]
    words = [*words, "--final-eval-episodes", "2", *smaller(algorithm)]
    fields = {
        "algorithms": (algorithm,),
        "datasets": tuple(sets),
        "num_seeds": 3,
        "num_updates": 20,
        "evaluate_at": (0.5,),
    }
    fields |= {"extra": " ".join(words), "variants": VARIANTS[algorithm]}
    folders = {"runs_dir": tmp_path / "runs", "results_dir": tmp_path / "results"}
    return at_once.Args(name="both", **fields | folders | changes)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["iql", "awr", "emaq"])
def test_each_dataset_has_the_run_of_the_algorithms_own_script(tmp_path, sets, script, algorithm, monkeypatch):
    jobs, settings, steps = at_once.plan(algorithm, arguments(tmp_path, sets, algorithm))
    assert len(jobs) == 2 * len(VARIANTS[algorithm]) and steps == [10, 20]
    population = at_once.Population(algorithm, settings)
    for before, step in ((0, 10), (10, 20)):
        population.advance(step)
        population.hand_over(before)
    job = jobs[-1]  # the other dataset, and the other settings
    save, kept_before_the_end = at_once.Run.save, []

    def last_save(run, trees):
        kept_before_the_end.extend(row["step"] for row in rows_of(job.results_dir / "evaluations.csv"))
        save(run, trees)

    with monkeypatch.context() as patch:
        patch.setattr(at_once.Run, "save", last_save)
        at_once.follow(job, algorithm, steps, "python benchmarks/at_once.py", nullcontext())
    assert kept_before_the_end == ["10"] * 3, "what there is, should the rest be cut off"
    own = tmp_path / "own" / job.name
    flags = [str(own) if word == str(job.run_dir) else word for word in job.flags]
    assert script(algorithm, *flags, "--eval-every", 10).status == 0
    ours, theirs = arrays_of(job.run_dir), arrays_of(own)
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():  # vmapped and in turn: other products
        np.testing.assert_allclose(array, theirs[name], rtol=1e-3, atol=1e-4, err_msg=name)
    assert [row["step"] for row in rows_of(job.run_dir / "evaluations.csv")] == ["10"] * 3 + ["20"] * 3
    assert rows_of(job.run_dir / "returns.csv") and not (job.run_dir / "handed").exists()
    about, plain = read_json(job.run_dir / "config.json"), read_json(own / "config.json")
    for name in ("transform", "members", "dataset_sha256", "algorithm"):
        assert about[name] == plain[name]
    kept = json.loads((tmp_path / "results" / "both" / job.name / "final.json").read_text())
    assert kept["updates"] == 20 and [m["seed"] for m in kept["members"]] == [0, 1, 2]
    actions = [load_policy(path, member=1)(np.zeros(11)) for path in (job.run_dir, own)]
    if algorithm != "emaq":  # whose choice among proposals may turn on the last bits
        np.testing.assert_allclose(*actions, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_parts_are_evaluated_by_themselves_and_merged_to_the_same_run(tmp_path, sets):
    whole, split = (
        arguments(tmp_path / name, sets[:1], "iql", variants=("",), parts=n) for name, n in (("whole", 1), ("split", 3))
    )
    for args in (whole, split):
        jobs, settings, steps = at_once.plan("iql", args)
        assert len(jobs) == args.parts
        population = at_once.Population("iql", settings)
        for before, step in ((0, 10), (10, 20)):
            population.advance(step)
            population.hand_over(before)
        for i, job in enumerate(jobs):
            assert not (job.results_dir / "final.json").exists(), i
            at_once.follow(job, "iql", steps, "", nullcontext())
    ours, theirs = (args.results_dir / "both" / jobs[0].name for args in (split, whole))
    tables = [rows_of(folder / "evaluations.csv") for folder in (ours, theirs)]
    assert [[row[name] for name in ("step", "member", "seed")] for row in tables[0]] == [
        [row[name] for name in ("step", "member", "seed")] for row in tables[1]
    ]
    for mine, other in zip(*tables, strict=True):  # vmapped along other axes
        assert float(mine["return_mean"]) == pytest.approx(float(other["return_mean"]), rel=1e-2)
    assert [m["seed"] for m in read_json(ours / "final.json")["members"]] == [0, 1, 2]
    assert read_json(ours / "command.json")["exit_status"] == 0


@pytest.mark.slow
def test_a_member_that_diverges_is_named_and_does_not_touch_the_others(tmp_path, sets):
    args = arguments(tmp_path, sets, "iql", variants=("", "wild:--critic-learning-rate 1e38"))
    jobs, settings, steps = at_once.plan("iql", args)
    population = at_once.Population("iql", settings)
    for before, step in ((0, 10), (10, 20)):
        population.advance(step)
        population.hand_over(before)
    for job, lost in zip(jobs, (False, False, True, True), strict=True):
        at_once.follow(job, "iql", steps, "", nullcontext())
        members = read_json(job.run_dir / "final.json")["members"]
        assert [bool(m["diverged"]) for m in members] == [lost] * 3
        assert all(np.isfinite(x).all() for x in arrays_of(job.run_dir).values())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"variants": ("", "wide:--hidden-dim 16")}, "--hidden-dim makes another program"),
        ({"variants": ("", "")}, "more than one run would be called"),
        ({"variants": ()}, "--variants: at least one"),
        ({"extra": "--keep-best True"}, "--keep-best is for the algorithm's own script"),
        ({"extra": "--online-steps 5"}, "--online-steps is for the algorithm's own script"),
        ({"parts": 2}, "--parts 2: must divide the members"),
        ({"parts": 0}, "--parts 0: must be at least 1"),
        ({"evaluate_at": (0.5, 1.5)}, "--evaluate-at: shares of the updates"),
        ({"evaluate_at": (float("nan"),)}, "--evaluate-at: shares of the updates"),
    ],
)
def test_what_is_no_single_population_is_refused(tmp_path, sets, changes, words):
    with pytest.raises(UsageError, match=words):
        at_once.plan("iql", arguments(tmp_path, sets, "iql", **changes))


def test_what_cannot_be_trained_from_outside_is_refused(tmp_path, sets):
    for name, what in (("bcq", "it trains no population"), ("sac", "sac.py does not learn from a dataset")):
        with pytest.raises(UsageError, match=f"--algorithms {name}: {what}"):
            at_once.plan(name, arguments(tmp_path, sets, "iql", algorithms=(name,), extra=""))


def test_datasets_of_other_sizes_are_refused(tmp_path, sets):
    np.savez(tmp_path / "short.npz", **hopper_like(200))
    _, settings, _ = at_once.plan("iql", arguments(tmp_path, [sets[0], str(tmp_path / "short.npz")], "iql"))
    with pytest.raises(UsageError, match="different numbers of rows"):
        at_once.Population("iql", settings)


@pytest.mark.parametrize(("parts", "busy"), [(3, ""), (1, "part-1")])
def test_a_run_that_another_process_writes_is_left_alone(tmp_path, sets, parts, busy):
    """Whether that one is in parts or this one."""
    args = arguments(tmp_path, sets[:1], "iql", variants=("",), parts=parts)
    run_dir = at_once.plan("iql", args)[0][0].run_dir / busy
    lock = claim(run_dir, resume=False)
    (run_dir / "metrics.csv").write_text("kept")
    with pytest.raises(UsageError, match="another process is writing to"):
        at_once.train("iql", args)
    lock.close()
    assert (run_dir / "metrics.csv").read_text() == "kept"


def test_what_is_refused_leaves_the_runs_that_there_were(tmp_path, sets):
    np.savez(tmp_path / "short.npz", **hopper_like(200))
    args = arguments(tmp_path, [sets[0], str(tmp_path / "short.npz")], "iql")
    kept = at_once.plan("iql", args)[0][0].run_dir / "final.json"
    kept.parent.mkdir(parents=True)
    kept.write_text("{}")
    with pytest.raises(UsageError, match="different numbers of rows"):
        at_once.train("iql", args)
    assert kept.exists()
