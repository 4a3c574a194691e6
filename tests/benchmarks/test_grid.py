"""What a sweep found: the ranking of its settings, and the figure `grid.png`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from benchmarks import grid, report
from benchmarks.curves import data_level
from benchmarks.grid import Sweep
from benchmarks.intervals import summarise


def entry(swept: dict[str, float], seed: int, score: float | None, diverged: bool = False) -> dict[str, Any]:
    """A member as in final.json."""
    what = {"step": 2, "metric": "critic/loss"} if diverged else None
    figure = None if score is None else 30 * score
    return {"swept": swept, "seed": seed, "diverged": what, "score_mean": score, "return_mean": figure}


MEMBERS = [
    entry({"beta": 1.0, "rate": 1e-4}, 0, 10.0),
    entry({"beta": 1.0, "rate": 1e-4}, 1, 20.0),
    entry({"beta": 1.0, "rate": 1e-2}, 0, 30.0),
    entry({"beta": 1.0, "rate": 1e-2}, 1, None, diverged=True),
    entry({"beta": 0.5, "rate": 1e-4}, 0, 1.0),
    entry({"beta": 0.5, "rate": 1e-4}, 1, 2.0),
    entry({"beta": 0.5, "rate": 1e-2}, 0, 3.0),
    entry({"beta": 0.5, "rate": 1e-2}, 1, 100.0),
]


def test_members_are_grouped_by_each_swept_value() -> None:
    panels = grid.sweeps_of(MEMBERS, "score_mean")
    assert list(panels) == ["beta", "rate"]
    assert panels["beta"] == Sweep(
        points={
            0: [(1.0, 10.0), (1.0, 30.0), (0.5, 1.0), (0.5, 3.0)],
            1: [(1.0, 20.0), (0.5, 2.0), (0.5, 100.0)],
        },
        line=[(0.5, 2.5), (1.0, 20.0)],  # one of the four is cut at each end
        diverged=[1.0],
        log_scale=False,
    )
    assert panels["rate"].line == [(1e-4, 6.0), (1e-2, pytest.approx(133 / 3))]
    assert panels["rate"].diverged == [1e-2] and panels["rate"].log_scale
    returns = grid.sweeps_of(MEMBERS, "return_mean")["beta"]
    assert returns.line == [(0.5, 75.0), (1.0, 600.0)]


@pytest.mark.parametrize(
    ("values", "log_scale"), [((1.0, 10.0), False), ((1.0, 10.5), True), ((0.0, 100.0), False), ((3.0,), False)]
)
def test_the_scale_follows_the_values(values: tuple[float, ...], log_scale: bool) -> None:
    members = [entry({"beta": value}, 0, 1.0) for value in values]
    assert grid.sweeps_of(members, "score_mean")["beta"].log_scale is log_scale


def test_a_value_at_which_all_diverged_has_no_mean() -> None:
    panel = grid.sweeps_of([MEMBERS[0], MEMBERS[3]], "score_mean")["rate"]
    assert (panel.line, panel.diverged, panel.points) == ([(1e-4, 10.0)], [1e-2], {0: [(1e-4, 10.0)]})


def drawn(members: list[dict[str, Any]], path: Path, monkeypatch: pytest.MonkeyPatch) -> Figure:
    """The figure that is written."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **options: (figures.append(self), save(self, *args, **options))
    )
    grid.plot(path, members, "iql", 12.5)
    assert path.read_bytes().startswith(b"\x89PNG")
    return figures[0]


def test_the_figure_has_a_panel_for_each_hyperparameter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beta, rate, both, best = drawn(MEMBERS, tmp_path / "grid.png", monkeypatch).axes
    assert [(axes.get_xlabel(), axes.get_xscale()) for axes in (beta, rate)] == [("beta", "linear"), ("rate", "log")]
    assert {axes.get_ylabel() for axes in (beta, rate)} == {"score"}
    lines = {line.get_label(): line for line in beta.lines}
    assert lines["interquartile mean"].get_xydata().tolist() == [[0.5, 2.5], [1.0, 20.0]]
    cross = lines["diverged"]
    (x, y), low = cross.get_transform().transform(cross.get_xydata())[0], beta.transAxes.transform((0, 0))[1]
    high = beta.transAxes.transform((0, 1))[1]
    assert x == pytest.approx(beta.transData.transform((1.0, 0))[0]) and 0 < (y - low) / (high - low) < 0.1
    points = np.concatenate([line.get_xydata() for name, line in lines.items() if name.startswith("_")])
    assert sorted(points[:, 1]) == [1, 2, 3, 10, 20, 30, 100]
    for axes in (beta, rate, best):
        (level,) = [line for line in axes.lines if line.get_label() == "data's average"]
        assert set(level.get_ydata()) == {12.5}
    assert (both.get_xlabel(), both.get_ylabel()) == ("beta", "rate")
    assert {text.get_position(): text.get_text() for text in both.texts} == {
        (0, 0): "1.5",
        (1, 0): "15.0",
        (0, 1): "51.5",
        (1, 1): "30.0",
    }
    assert best.lines[0].get_xdata().tolist() == [1, 2, 3, 4]


def test_a_setting_without_seeds_is_a_cross_on_the_map() -> None:
    first, second, means = grid.interactions([MEMBERS[0], MEMBERS[3], MEMBERS[4]], "score_mean")
    assert (first, second) == ([0.5, 1.0], [1e-4, 1e-2])
    assert np.array_equal(means, [[1.0, 10.0], [np.nan, np.nan]], equal_nan=True)
    axes = Figure().add_subplot()
    grid.plot_map(axes, first, second, means)
    assert [text.get_text() for text in axes.texts] == ["1.0", "10.0", "x", "x"]


def test_one_hyperparameter_has_no_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = [entry({"beta": value}, 0, 1.0) for value in (1.0, 2.0)]
    assert [axes.get_xlabel() for axes in drawn(members, tmp_path / "grid.png", monkeypatch).axes] == [
        "beta",
        "settings tried",
    ]


def test_what_tuning_gains_counts_the_diverged_at_the_worst() -> None:
    assert grid.with_worst(MEMBERS) == [[10.0, 20.0], [30.0, 1.0], [1.0, 2.0], [3.0, 100.0]]
    header, *rows = [line.split() for line in grid.tuning(MEMBERS).splitlines()]
    assert " ".join(header) == "settings tried expected score of the best deviation"
    assert [row[0] for row in rows] == ["1", "2", "4"]
    # Means 1.5, 15, 15.5 and 51.5; of two draws they are the best in 1, 3, 5 and 7 of 16.
    lost = [entry({"beta": value}, 0, None, diverged=True) for value in (1.0, 2.0)]
    assert "every member diverged" in grid.tuning(lost)
    assert rows[0][1] == "20.9" and rows[1][1] == f"{(1.5 + 45 + 77.5 + 360.5) / 16:.1f}"


def test_returns_are_drawn_where_there_is_no_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = [member | {"score_mean": None} for member in MEMBERS]
    beta = drawn(members, tmp_path / "grid.png", monkeypatch).axes[0]
    assert beta.get_ylabel() == "return"
    (line,) = [line for line in beta.lines if line.get_label() == "interquartile mean"]
    assert line.get_xydata().tolist() == [[0.5, 75.0], [1.0, 600.0]]


def test_the_run_of_a_copy_without_benchmarks_has_its_table_too() -> None:
    """Its final.json has no means over the members, its config.json nothing of the dataset's returns."""
    members = [entry({}, seed, 10.0 * seed) for seed in (1, 2)]
    whole = {"members": members} | summarise(members)
    assert grid.table({"members": members}, data_level({}, scored=True)) == grid.table(whole, None)


def test_settings_with_seeds_that_diverged_come_after_those_without() -> None:
    header, *rows = [line.split() for line in grid.ranking(MEMBERS).splitlines()]
    assert header == ["setting", "score", "from", "to", "seeds", "diverged"]
    assert [row[:3] for row in rows] == [
        ["beta=0.5", "rate=0.01", "51.5"],
        ["beta=1", "rate=0.0001", "15.0"],
        ["beta=0.5", "rate=0.0001", "1.5"],
        ["beta=1", "rate=0.01", "30.0"],
    ]
    assert rows[0][3:] == ["3.0", "100.0", "2", "0"] and rows[3][3:] == ["1", "1"]
    lost = grid.ranking([MEMBERS[1], MEMBERS[3]]).splitlines()[-1].split()
    assert lost == ["beta=1", "rate=0.01", "0", "1"], "where all diverged comes last"


def test_the_report_of_a_run_with_a_grid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of members that all diverged, too; a run without a grid has no such figure."""
    config = {"algorithm": "iql", "flags": {"dataset": "easy"}, "dataset_returns": {"score_mean": 55.5, "mean": 1.0}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    plain = [member | {"swept": {}} for member in MEMBERS]
    for members, first in ((MEMBERS, "beta=0.5"), (MEMBERS[3:4], "beta=1"), (plain, "seed")):
        (tmp_path / "final.json").write_text(json.dumps({"members": members} | summarise(members)))
        report.main([str(tmp_path)])
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == "iql, easy" and lines[-1] == f"results in {tmp_path}"
        assert any(line.split()[0] == first for line in lines)
        assert (tmp_path / "grid.png").exists() == (members is not plain)
        (tmp_path / "grid.png").unlink(missing_ok=True)
    assert "the data's own episodes: 55.5" in lines
    scratch = config | {"environment": "Hopper-v5", "flags": {"dataset": "unused", "num_updates": 0}}
    (tmp_path / "config.json").write_text(json.dumps(scratch))
    report.main([str(tmp_path)])
    assert capsys.readouterr().out.startswith("iql, Hopper-v5\n"), "online from scratch there is no dataset"


def test_the_table_ranks_the_settings_of_a_sweep() -> None:
    scores = {1.0: [1.0, 2.0], 2.0: [None, None], 3.0: [50.0, 70.0]}
    members = [
        {"seed": seed, "swept": {"beta": beta}, "score_mean": score, "return_mean": score, "diverged": None}
        for beta, values in scores.items()
        for seed, score in enumerate(values)
    ]
    text = grid.table({"members": members} | summarise(members), 33.3)
    order = [text.index(word) for word in ("beta=3", "beta=1", "beta=2", "33.3")]
    assert order == sorted(order) and "60.0" in text and "diverged" in text
    for member in members:
        member["swept"] = {}
    seeds = grid.table({"members": members[:2]} | summarise(members[:2]), None)
    assert "seed 0" in seeds and "seed 1" in seeds and "1.5" in seeds and "interquartile" in seeds
