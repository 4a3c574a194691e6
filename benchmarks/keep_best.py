"""`--keep-best True`: the best evaluated policy of each member, beside the last one."""

import json
from typing import Any

import numpy as np

from common.report import read_tree, write_atomically
from common.runs import Run


def keep(run: Run, rows: list[dict[str, Any]]) -> None:
    """Copy the members whose returns are their largest so far from the checkpoint, which is of this very step.

    `rows` are those of this evaluation; `run.evaluations` has those of the earlier ones.
    """
    returns = {row["member"]: row["return_mean"] for row in rows}
    beaten = {r["member"] for r in run.evaluations if r["return_mean"] >= returns.get(r["member"], -np.inf)}
    if better := [i for i, index in enumerate(run.members.indices) if index in returns.keys() - beaten]:
        path = run.checkpoint.with_name("best.npz")
        arrays, about = read_tree(run.checkpoint)
        states = {name: array for name, array in arrays.items() if name.startswith("['state']")}
        best = read_tree(path)[0] if path.exists() else states
        for name, array in states.items():
            best[name][better] = array[better]
        metadata = np.frombuffer(json.dumps(about).encode(), np.uint8)
        write_atomically(path, lambda file: np.savez(file, **best, metadata=metadata))
