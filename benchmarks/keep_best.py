"""`--keep-best True`: the best evaluated policy of each member, beside the last one."""

from typing import Any

import numpy as np

from common.report import read_npz, write_atomically
from common.runs import Run


def keep(run: Run, rows: list[dict[str, Any]]) -> None:
    """Copy the members whose returns are their largest so far from the checkpoint, which is of this very step.

    `rows` are those of this evaluation; `run.evaluations` has those of the earlier ones. NaN is no return.
    """
    returns = {row["member"]: row["return_mean"] for row in rows if np.isfinite(row["return_mean"])}
    beaten = {r["member"] for r in run.evaluations if r["return_mean"] >= returns.get(r["member"], -np.inf)}
    if better := [i for i, index in enumerate(run.members.indices) if index in returns.keys() - beaten]:
        path, arrays = run.checkpoint.with_name("best.npz"), read_npz(run.checkpoint)
        states = {name: array for name, array in arrays.items() if name.startswith("['state']")}
        best = read_npz(path) if path.exists() else dict(states)
        for name, array in states.items():
            best[name][better] = array[better]
        best["metadata"] = arrays["metadata"]
        write_atomically(path, lambda file: np.savez(file, **best))
