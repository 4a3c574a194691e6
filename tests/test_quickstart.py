"""The notebook, run: its cells in order, with a small dataset and a few updates in the place of its settings."""

import json
import re
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
from conftest import ROOT, rows_of

NOTEBOOK = json.loads((ROOT / "quickstart.ipynb").read_text())
CODE = {cell["id"]: "".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"}


def test_nothing_that_a_run_left_is_stored() -> None:
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in NOTEBOOK["cells"]}) == len(NOTEBOOK["cells"]) >= 10
    for cell in NOTEBOOK["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None


@pytest.mark.slow
def test_every_cell_runs(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    plt.switch_backend("Agg")
    settings = {"dataset": repr(str(tiny)), "updates": "8", "run_dir": f"Path({str(tmp_path / 'run')!r})"}
    values: dict[str, Any] = {}
    for place, source in CODE.items():
        for name, value in settings.items() if place == "settings" else ():
            source, count = re.subn(rf"(?m)^{name} = .*$", lambda match, new=f"{name} = {value}": new, source)
            assert count == 1, name
        exec(compile(source, f"quickstart.ipynb, {place}", "exec"), values)
    plt.close("all")
    out = capfd.readouterr().out
    assert f"into {tmp_path / 'run'}" in out and f"return {values['total']:.1f}" in out
    rows = rows_of(tmp_path / "run" / "evaluations.csv")
    assert {(row["seed"], int(row["step"])) for row in rows} == {(s, n) for s in "01" for n in (0, 2, 4, 6, 8)}
    drawn = {line.get_label(): line.get_xydata() for line in values["axes"].lines}
    for seed in "01":
        expected = [(float(row["step"]), float(row["score_mean"])) for row in rows if row["seed"] == seed]
        np.testing.assert_array_equal(drawn[f"seed {seed}"], expected)
    if values["film"].exists():
        assert [panel.images[0].get_array().shape[2] for panel in values["panels"]] == [3] * 4
    else:
        assert "draws here" in out, "the line of a machine without EGL and OSMesa"
