"""`--keep-best True`: the best evaluated policy of each member, beside the last one."""

from typing import Any

import numpy as np

from common.report import read_npz, write_atomically
from common.runs import Run


def keep(run: Run, rows: list[dict[str, Any]]) -> None:
    """Copy the members whose returns are their largest so far from the checkpoint, which is of this very step.

    `rows` are those of this evaluation. `best.npz` keeps the returns of what it holds, because a resumed run drops its
    last evaluation from the tables. A return of NaN is never the best.
    """
    path = run.checkpoint.with_name("best.npz")
    best = read_npz(path) if path.exists() else {}
    returns = best.get("returns", np.full(run.members.count, -np.inf))
    found = {row["member"]: row["return_mean"] for row in rows}
    now = np.array([found.get(index, np.nan) for index in run.members.indices])
    if (better := now > returns).any():
        with np.load(run.checkpoint) as file:  # without the ring, which can be large
            new = {name: file[name] for name in file.files if name.startswith(("['state']", "metadata"))}
        best = new | best | {"metadata": new.pop("metadata"), "returns": np.where(better, now, returns)}
        for name, array in new.items():
            best[name][better] = array[better]
        write_atomically(path, lambda file: np.savez(file, **best))
