"""The figure of a run's sweep, `grid.png`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from common import reporting
from common.reporting import Sweep


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
    panels = reporting.sweeps_of(MEMBERS, "score_mean")
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
    returns = reporting.sweeps_of(MEMBERS, "return_mean")["beta"]
    assert returns.line == [(0.5, 75.0), (1.0, 600.0)]


@pytest.mark.parametrize(
    ("values", "log_scale"), [((1.0, 10.0), False), ((1.0, 10.5), True), ((0.0, 100.0), False), ((3.0,), False)]
)
def test_the_scale_follows_the_values(values: tuple[float, ...], log_scale: bool) -> None:
    members = [entry({"beta": value}, 0, 1.0) for value in values]
    assert reporting.sweeps_of(members, "score_mean")["beta"].log_scale is log_scale


def test_a_value_at_which_all_diverged_has_no_mean() -> None:
    panel = reporting.sweeps_of([MEMBERS[0], MEMBERS[3]], "score_mean")["rate"]
    assert (panel.line, panel.diverged, panel.points) == ([(1e-4, 10.0)], [1e-2], {0: [(1e-4, 10.0)]})


def drawn(members: list[dict[str, Any]], path: Path, monkeypatch: pytest.MonkeyPatch) -> Figure:
    """The figure that is written."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **options: (figures.append(self), save(self, *args, **options))
    )
    reporting.plot_grid(path, members, "iql")
    assert path.read_bytes().startswith(b"\x89PNG")
    return figures[0]


def test_the_figure_has_a_panel_for_each_hyperparameter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beta, rate = drawn(MEMBERS, tmp_path / "grid.png", monkeypatch).axes
    assert [(axes.get_xlabel(), axes.get_xscale()) for axes in (beta, rate)] == [("beta", "linear"), ("rate", "log")]
    assert {axes.get_ylabel() for axes in (beta, rate)} == {"normalised score"}
    lines = {line.get_label(): line for line in beta.lines}
    assert lines["interquartile mean"].get_xydata().tolist() == [[0.5, 2.5], [1.0, 20.0]]
    cross = lines["diverged"]
    (x, y), low = cross.get_transform().transform(cross.get_xydata())[0], beta.transAxes.transform((0, 0))[1]
    high = beta.transAxes.transform((0, 1))[1]
    assert x == pytest.approx(beta.transData.transform((1.0, 0))[0]) and 0 < (y - low) / (high - low) < 0.1
    points = np.concatenate([line.get_xydata() for name, line in lines.items() if name.startswith("_")])
    assert sorted(points[:, 1]) == [1, 2, 3, 10, 20, 30, 100]


def test_returns_are_drawn_where_there_is_no_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = [member | {"score_mean": None} for member in MEMBERS]
    beta = drawn(members, tmp_path / "grid.png", monkeypatch).axes[0]
    assert beta.get_ylabel() == "return"
    (line,) = [line for line in beta.lines if line.get_label() == "interquartile mean"]
    assert line.get_xydata().tolist() == [[0.5, 75.0], [1.0, 600.0]]


def test_a_run_whose_members_all_diverged_has_its_figure(tmp_path: Path, small_run: list[str], iql: Any) -> None:
    run = tmp_path / "run"
    grid = ["--grid", "critic_learning_rate=1e7,1e6", "--eval-every", "0"]
    outcome = iql(*small_run, "--num-updates", "20", *grid, "--run-dir", run)
    assert outcome.status == 3 and outcome.err.count("\n") == 3, outcome.err
    assert (run / "grid.png").exists() and (run / "final.json").exists()


def test_a_run_without_a_sweep_has_no_figure(tmp_path: Path, small_run: list[str], iql: Any) -> None:
    assert iql(*small_run, "--num-updates", "20", "--num-seeds", "2", "--run-dir", tmp_path / "run").status == 0
    assert not (tmp_path / "run" / "grid.png").exists()
    assert json.loads((tmp_path / "run" / "final.json").read_text())["members"][0]["swept"] == {}
