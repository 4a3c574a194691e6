"""`curves.png` of a run: what is drawn of which tables, and that nothing about them ends a run."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from benchmarks import curves


def write(run_dir: Path, name: str, rows: list[dict[str, Any]]) -> None:
    with open(run_dir / name, "w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


def write_run(
    run_dir: Path,
    scores: dict[int, list[float]],
    swept: dict[int, dict[str, float]] | None = None,
    online: dict[int, list[float]] | None = None,
    diverged: tuple[int, ...] = (),
) -> Path:
    """A run of 20 updates with an evaluation each 10, then 10 online steps; losses of 2 and, online, 1."""
    run_dir.mkdir(parents=True, exist_ok=True)
    members = [{"member": i, "seed": 5 + i, "swept": (swept or {}).get(i, {})} for i in scores]
    config = {"algorithm": "iql", "flags": {"dataset": "easy", "num_updates": 20}, "members": members}
    config |= {"dataset_returns": {"score_mean": 33.0, "mean": 1.0}}
    (run_dir / "config.json").write_text(json.dumps(config))
    final = [member | {"diverged": {"step": 3} if member["member"] in diverged else None} for member in members]
    (run_dir / "final.json").write_text(json.dumps({"members": final, "updates": 20}))
    evaluations, metrics = [], []
    for phase, start, values, loss in (("offline", 0, scores, 2.0), ("online", 20, online or {}, 1.0)):
        for i, curve in values.items():
            for place, score in enumerate(curve):
                row = {"phase": phase, "step": 10 * place, "member": i, "return_mean": -score, "score_mean": score}
                evaluations.append(row)
                if place:
                    row = {"step": start + 10 * place, "member": i, "actor/loss": loss, "actor/weight": 9.0}
                    metrics.append(row | {"behavior/loss": None if phase == "offline" else 0.5})
    write(run_dir, "evaluations.csv", evaluations)
    write(run_dir, "metrics.csv", metrics)
    return run_dir


def axes_of(run_dir: Path) -> dict[tuple[int, int], Any]:
    """The visible panels by row and column."""
    figure = curves.figure_of(run_dir)
    places = {
        (axes.get_subplotspec().rowspan.start, axes.get_subplotspec().colspan.start): axes for axes in figure.axes
    }
    return {place: axes for place, axes in places.items() if axes.get_visible()}


def labels(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_phases_are_columns_and_losses_are_rows(tmp_path: Path) -> None:
    run = write_run(tmp_path, {0: [1.0, 2.0, 6.0]}, online={0: [6.0, 8.0]})
    axes = axes_of(run)
    assert set(axes) == {(0, 0), (0, 1), (1, 0), (1, 1), (2, 1)}, "the behaviour model has a loss online only"
    assert axes[0, 0].lines[0].get_xydata().tolist() == [[0, 1], [10, 2], [20, 6]]
    assert axes[0, 1].lines[0].get_xydata().tolist() == [[0, 6], [10, 8]]
    assert axes[1, 0].lines[0].get_xydata().tolist() == [[10, 2], [20, 2]]
    marked = [axes[place].lines[0].get_markersize() > 0 for place in ((1, 0), (1, 1))]
    assert marked == [False, True], "a lone row is no line"
    assert axes[1, 1].lines[0].get_xydata().tolist() == [[10, 1]], "the table counts on from the offline updates"
    assert (axes[1, 0].get_ylabel(), axes[2, 1].get_ylabel()) == ("actor/loss", "behavior/loss")
    assert axes[1, 0].get_xlabel() == "gradient updates" and axes[2, 1].get_xlabel() == "environment steps"
    assert labels(axes[0, 1]) == ["seed 5: last 8.0", "data's average: 33.0"], "no mean of one"
    (level,) = [line for line in axes[0, 0].lines if line.get_linestyle() == "--"]
    assert set(level.get_ydata()) == {33.0}
    curves.draw(run)
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_sac_with_prior_data_uses_them_without_an_offline_phase_too() -> None:
    config = {"flags": {"dataset": "mine.npz", "num_updates": 0}, "environment": "Hopper-v5"}
    assert curves.trained_on(config | {"algorithm": "sac_prior"}) == "mine.npz"
    assert curves.trained_on(config | {"algorithm": "iql"}) == "Hopper-v5"


def test_a_lone_evaluation_is_a_visible_point(tmp_path: Path) -> None:
    write_run(tmp_path, {0: [7.0]})
    ((place, axes),) = axes_of(tmp_path).items()
    assert place == (0, 0)
    line = axes.lines[0]
    assert line.get_xydata().tolist() == [[0, 7]] and line.get_marker() == "o" and line.get_markersize() > 0


def test_five_seeds_are_thin_and_their_interquartile_mean_is_bold(tmp_path: Path) -> None:
    write_run(tmp_path, {i: [0.0, score] for i, score in enumerate([1.0, 2.0, 3.0, 4.0, 100.0])})
    axes = axes_of(tmp_path)[0, 0]
    *thin, bold, level = axes.lines
    assert len(thin) == 5 and max(line.get_linewidth() for line in thin) < bold.get_linewidth()
    assert bold.get_xydata().tolist() == [[0, 0], [10, 3]] and level.get_linestyle() == "--"
    label = labels(axes)[0]
    assert label.startswith("interquartile mean of 5: last 3.0 [") and label.endswith("]")


def test_a_diverged_seed_ends_with_a_cross_and_is_in_no_mean(tmp_path: Path) -> None:
    write_run(tmp_path, {0: [0.0, 1.0, 2.0], 1: [0.0, 90.0], 2: [0.0, 3.0, 4.0]}, diverged=(1,))
    axes = axes_of(tmp_path)[0, 0]
    (cross,) = [line for line in axes.lines if line.get_marker() == "x"]
    assert cross.get_xydata().tolist() == [[10, 90]]
    bold = max(axes.lines, key=lambda line: line.get_linewidth())
    assert bold.get_xydata().tolist() == [[0, 0], [10, 2], [20, 3]]
    assert labels(axes)[0].startswith("mean of 2: last 3.0 [") and labels(axes)[0].endswith("], 1 diverged")
    write_run(tmp_path, {0: [0.0, 1.0], 1: [], 2: [0.0, 3.0]}, diverged=(1,))
    assert labels(axes_of(tmp_path)[0, 0])[0].endswith("], 1 diverged"), "before its first evaluation"


@pytest.mark.parametrize("step", [20, 25])
def test_both_phases_have_room_for_all_scores_and_their_own_lost_seeds(tmp_path: Path, step: int) -> None:
    """The first seed diverges online, in the first stretch or later; the second rises far above its offline scores."""
    write_run(tmp_path, {0: [0.0, 1.0], 1: [0.0, 3.0]}, online={0: [1.0], 1: [3.0, 99.0]}, diverged=(0,))
    final = json.loads((tmp_path / "final.json").read_text()) | {"online_steps": 10}
    final["members"][0]["diverged"]["step"] = step  # where it still was finite: after all 20 updates
    (tmp_path / "final.json").write_text(json.dumps(final))
    offline, online = (axes_of(tmp_path)[0, place] for place in (0, 1))
    assert offline.get_ylim() == online.get_ylim() and online.get_ylim()[1] > 99
    assert labels(offline)[0].startswith("mean of 2: last 2.0") and "diverged" not in labels(offline)[0]
    assert labels(online)[0] == "mean of 1: last 99.0, 1 diverged"


def test_where_all_diverged_there_is_no_mean(tmp_path: Path) -> None:
    write_run(tmp_path, {0: [0.0, 9.0, 5.0], 1: [0.0, 3.0]}, diverged=(0, 1))
    axes = axes_of(tmp_path)[0, 0]
    assert labels(axes) == ["all: 2 diverged", "data's average: 33.0"]
    assert sorted(line.get_ydata().tolist() for line in axes.lines if line.get_marker() == "x") == [[3.0], [5.0]]
    assert [len(line.get_xdata()) for line in axes.lines if line.get_linewidth() == 2.0] == [0]


def test_a_grid_has_a_line_for_each_setting_the_best_first(tmp_path: Path) -> None:
    """Two seeds each; a setting all of whose seeds diverged comes last, however high it was."""
    swept = {i: {"beta": float(i // 2)} for i in range(6)}
    last = {0: 1.0, 1: 3.0, 2: 50.0, 3: 70.0, 4: 99.0, 5: 99.0}
    write_run(tmp_path, {i: [0.0, score] for i, score in last.items()}, swept, diverged=(4, 5))
    axes = axes_of(tmp_path)[0, 0]
    named = [label.split(" [")[0] for label in labels(axes)]
    assert named == ["beta=1: last 60.0", "beta=0: last 2.0", "beta=2: 2 diverged", "data's average: 33.0"]
    lines = [line for line in axes.lines if line.get_label().startswith("beta")]
    assert len(lines) == 3 and len({line.get_color() for line in lines}) == 3
    lost = [line for line in lines if not len(line.get_xdata())]
    assert [line.get_label() for line in lost] == ["beta=2: 2 diverged"], "no mean of those that are out"
    others = [line for line in axes.lines if len(line.get_xdata()) == 2 and line not in lines]
    assert len(others) == 3, "the level, and each of the lost"


def test_a_setting_that_lost_a_seed_of_two_comes_after_one_that_lost_none(tmp_path: Path) -> None:
    swept = {i: {"beta": float(i // 2)} for i in range(4)}
    write_run(tmp_path, {i: [0.0, score] for i, score in enumerate((1.0, 3.0, 70.0, 50.0))}, swept, diverged=(3,))
    first, second, _ = labels(axes_of(tmp_path)[0, 0])
    assert first.startswith("beta=0: last 2.0") and second.startswith("beta=1: last 70.0")


def test_of_many_settings_the_best_have_a_name_and_the_others_are_grey(tmp_path: Path) -> None:
    write_run(tmp_path, {i: [0.0, float(i)] for i in range(20)}, {i: {"beta": float(i)} for i in range(20)})
    axes = axes_of(tmp_path)[0, 0]
    assert len(labels(axes)) == curves.SHOWN + 1 and labels(axes)[0] == "beta=19: last 19.0"
    assert axes.get_legend().get_title().get_text() == "8 more in grey"
    assert len([line for line in axes.lines if line.get_color() == "lightgray"]) == 8


def test_returns_where_there_is_no_score(tmp_path: Path) -> None:
    run = write_run(tmp_path, {0: [1.0, 2.0]})
    rows = [{"phase": "offline", "step": 0, "member": 0, "return_mean": 4.0, "score_mean": None}]
    write(run, "evaluations.csv", rows)
    axes = axes_of(run)[0, 0]
    assert axes.get_ylabel() == "return" and labels(axes) == ["seed 5: last 4.0", "data's average: 1.0"]


@pytest.mark.parametrize(
    ("damage", "drawn"),
    [
        ({"evaluations.csv": None}, True),
        ({"metrics.csv": None}, True),
        ({"config.json": None, "final.json": None}, True),
        ({"config.json": "{", "final.json": "[1]"}, True),
        ({"evaluations.csv": "", "metrics.csv": ""}, False),
        ({"evaluations.csv": "phase,step,member,score_mean\n", "metrics.csv": None}, False),
        ({"evaluations.csv": None, "metrics.csv": None}, False),
        ({"metrics.csv": "step,member,actor/loss\n10,0,nan\n20,0,2.0\n30,0,inf\n40,0,1"}, True),
        ({"metrics.csv": "step,member,actor/loss\n,,\nx,y,z\n"}, False),
    ],
)
def test_what_is_missing_or_damaged_ends_no_run(
    tmp_path: Path, damage: dict[str, str | None], drawn: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path, {0: [1.0, 2.0, 3.0]})
    for name, text in damage.items():
        (run / name).unlink() if text is None else (run / name).write_text(text)
    curves.draw(run)
    assert (run / "curves.png").exists() == drawn
    assert capsys.readouterr().err.count("\n") == ("x,y" in str(damage))


def test_a_figure_that_fails_is_a_line_on_stderr(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path, {0: [1.0, 2.0]})

    def fail(*args: Any, **options: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Figure, "savefig", fail)
    curves.draw(run)
    assert capsys.readouterr().err == "no curves.png: no space left\n"
    assert not (run / "curves.png").exists()
