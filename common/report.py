"""What a run leaves behind: files written whole or not at all, means with intervals, curves, and Weights & Biases."""

import csv
import importlib.metadata
import io
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.tree_util import keystr

from common.cli import RunArgs, UsageError, one_line


def write_atomically(path: Path, write: Callable[[Any], Any]) -> None:
    """Call `write(file)` on a temporary file beside `path`, fsync it and rename it over `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        directory = os.open(path.parent, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON; numbers that are not finite become null."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(key): clean(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [clean(item) for item in value]
        return None if isinstance(value, float) and not np.isfinite(value) else value

    write_atomically(path, lambda file: file.write((json.dumps(clean(content), indent=2) + "\n").encode()))


def append_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Add whole rows to the CSV at `path`; its first row fixes the columns, None is an empty cell."""
    with open(path, "a+", newline="") as file:
        file.seek(0)
        columns, text = next(csv.reader(file), None), io.StringIO()
        writer = csv.DictWriter(text, columns or list(rows[0]), lineterminator="\n", extrasaction="ignore")
        if columns is None:
            writer.writeheader()
        writer.writerows({k: f"{v:.7g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
        file.write(text.getvalue())


def is_key(leaf: Any) -> bool:
    """Whether a leaf is an array of random keys, which numpy cannot hold."""
    return isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def save_tree(path: Path, tree: Any, metadata: dict[str, Any]) -> None:
    """Write every leaf of `tree` by its name, random keys as data, and `metadata` (JSON) to the `.npz` at `path`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    arrays = {keystr(name): np.asarray(jax.random.key_data(x) if is_key(x) else x) for name, x in leaves}
    arrays["metadata"] = np.frombuffer(json.dumps(metadata).encode(), np.uint8)
    write_atomically(path, lambda file: np.savez(file, **arrays))


def read_tree(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Leaves by name, and metadata, of what `save_tree` wrote; UsageError if it is missing or damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}  # reading a member verifies its CRC
        return arrays, dict(json.loads(arrays.pop("metadata").tobytes().decode()))
    except FileNotFoundError:
        raise UsageError(f"no checkpoint at {path}") from None
    except Exception as error:  # a flipped byte may surface as nearly anything, down in zipfile or numpy
        raise UsageError(f"checkpoint {path} is damaged or is not a checkpoint ({one_line(error)})") from None


def fill_tree(path: Path, arrays: dict[str, np.ndarray], like: Any, prefix: str = "") -> Any:
    """A tree like `like` from the leaves under `prefix`; UsageError if there are others or shape or dtype differ."""
    names = {prefix + keystr(name) for name, _ in jax.tree_util.tree_leaves_with_path(like)}
    odd = sorted(names ^ {name for name in arrays if re.match(re.escape(prefix) + r"(?!\w)", name)})

    def fill(name: Any, leaf: Any) -> Any:
        found, wanted = (
            arrays[prefix + keystr(name)],
            jax.eval_shape(jax.random.key_data, leaf) if is_key(leaf) else leaf,
        )
        if (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
            odd.append(
                f"{keystr(name)}, {found.dtype}{list(found.shape)} instead of {wanted.dtype}{list(wanted.shape)}"
            )
        return jax.random.wrap_key_data(found) if is_key(leaf) else found

    tree = like if odd else jax.tree_util.tree_map_with_path(fill, like)
    if odd:
        raise UsageError(f"checkpoint {path} is of another kind of run: they differ in {odd[0]}")
    return tree


def provenance() -> dict[str, Any]:
    """What made a result: package versions, git commit (and whether tracked code differs from it), processor."""

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None

    packages = ("jax", "jaxlib", "flax", "optax", "numpy", "gymnasium", "mujoco", "minari")
    changes = git("status", "--porcelain", "--untracked-files=no", "--", ":(top)*.py")
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    return {
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages},
        "git_commit": git("rev-parse", "HEAD"),
        "git_dirty": None if changes is None else bool(changes),
        "cpu": {"model": model[1] if model else platform.processor(), "cores": os.cpu_count()},
    }


def evaluation_columns(returns: np.ndarray, scores: np.ndarray | None, successes: np.ndarray) -> dict[str, Any]:
    """Means and deviations over a member's episodes; `success_mean` only where the environment reports success."""
    columns: dict[str, Any] = {}
    for name, x in (("return", returns), ("score", scores)):
        columns[f"{name}_mean"] = None if x is None else float(x.mean())
        columns[f"{name}_std"] = None if x is None else float(x.std())
    columns["episodes"] = len(returns)
    return columns | ({"success_mean": float(successes.mean())} if np.isfinite(successes).all() else {})


def aggregate(values: Sequence[float | None]) -> dict[str, Any]:
    """Interquartile mean with its 95 % bootstrap interval (Agarwal et al., 2021); None where values are too few."""
    from scipy import stats

    def mean(x: np.ndarray, axis: int = -1) -> np.ndarray:
        return stats.trim_mean(x, 0.25, axis=axis)

    x = np.array([value for value in values if value is not None and np.isfinite(value)])
    low = high = None
    if len(x) > 1:
        interval = stats.bootstrap((x,), mean, n_resamples=2000, method="percentile", rng=0).confidence_interval
        low, high = map(float, interval)
    iqm = float(mean(x)) if len(x) else None
    return {"iqm": iqm, "ci_low": low, "ci_high": high, "count": len(x)}


def summarise(members: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`aggregate` of all members' final scores and returns, and `combinations`: the same for each swept setting."""

    def of(group: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {name: aggregate([member[f"{name}_mean"] for member in group]) for name in ("score", "return")}

    settings = list({tuple(member["swept"].items()): member["swept"] for member in members}.values())
    groups = [{"swept": swept} | of([m for m in members if m["swept"] == swept]) for swept in settings]
    return {"combinations": groups, "aggregate": of(members)}


def table(title: str, final: dict[str, Any], level: float | None) -> str:
    """The last evaluation in text: members, or a grid's settings from best to worst, and the data's own `level`."""
    members, figure = final["members"], "return" if final["aggregate"]["score"]["iqm"] is None else "score"
    rows = [(f"seed {m['seed']}", {"iqm": m[f"{figure}_mean"], "ci_low": None}) for m in members]
    if members[0]["swept"]:
        rows = [(" ".join(f"{k}={v:g}" for k, v in c["swept"].items()), c[figure]) for c in final["combinations"]]
        rows.sort(key=lambda row: -np.inf if row[1]["iqm"] is None else row[1]["iqm"], reverse=True)
    rows += [("all", final["aggregate"][figure]), ("dataset", {"iqm": level, "ci_low": None})]
    lines = [f"{title}: final {figure} (of several: interquartile mean, 95 % interval)"]
    for name, x in rows:
        interval = "" if x["ci_low"] is None else f"   {x['ci_low']:.1f} to {x['ci_high']:.1f}"
        lines.append(f"{name:>32} {'-' if x['iqm'] is None else format(x['iqm'], '.1f'):>9}{interval}")
    return "\n".join(lines)


def plot_curves(path: Path, evaluations: Sequence[dict[str, Any]], title: str, level: float | None) -> None:
    """Score (raw return where there is none) against updates, then online steps: a line for each member, and the mean.

    `level`, the average of the dataset's own episodes in the same unit, is drawn as a dashed line.
    """
    from matplotlib.figure import Figure

    column = "score_mean" if all(row["score_mean"] is not None for row in evaluations) else "return_mean"
    phases = [phase for phase in ("offline", "online") if any(row["phase"] == phase for row in evaluations)]
    if not phases:
        return
    figure = Figure(figsize=(6.0 * len(phases), 4.0), layout="constrained")
    for axes, phase in zip(np.ravel(figure.subplots(1, len(phases))), phases, strict=True):
        rows = [row for row in evaluations if row["phase"] == phase]
        steps, members = (sorted({row[name] for row in rows}) for name in ("step", "member"))
        for member in members:
            curve = [(row["step"], row[column]) for row in rows if row["member"] == member]
            axes.plot(*zip(*curve, strict=True), "o-", color="tab:blue", alpha=0.4, linewidth=1, markersize=3)
        means = [np.mean([row[column] for row in rows if row["step"] == step]) for step in steps]
        label = f"{'mean of ' if len(members) > 1 else ''}{len(members)}, last {means[-1]:.1f}"
        axes.plot(steps, means, "o-", color="tab:blue", linewidth=2, markersize=4, label=label)
        if level is not None:
            axes.axhline(level, color="tab:gray", linestyle="--", linewidth=1, label="average of the dataset")
        axes.set_xlabel("gradient updates" if phase == "offline" else "environment steps")
        axes.set_ylabel("normalised score" if column == "score_mean" else "return")
        axes.set_title(f"{title} ({phase})", fontsize=10)
        axes.legend(frameon=False, fontsize=8)
        axes.grid(alpha=0.2)
    figure.savefig(path, dpi=120)


class Tracker:
    """Weights & Biases: one run for each member, in one group; under a sweep agent one run for the whole population.

    Whatever goes wrong in wandb is reported once and tracking is switched off: it never stops training.
    """

    def __init__(self, args: RunArgs, label: str) -> None:
        self.args, self.label, self.step, self.runs = args, label, 0, []
        self.under_agent = "WANDB_SWEEP_ID" in os.environ
        self.enabled = args.track or self.under_agent

    def _each(self, action: Callable[[int, Any], None], items: Sequence[Any]) -> None:
        if self.enabled:
            try:
                for i, item in enumerate(items):
                    action(i, item)
            except Exception as error:
                print(f"wandb: {one_line(error)}; tracking is off, training goes on", file=sys.stderr)
                self.enabled = False

    def start(self, configs: list[dict[str, Any]], names: list[str], directory: Path) -> None:
        """Open the runs: `configs[i]` and `names[i]` are those of member i."""
        if self.under_agent:
            configs, names = [configs[0] | {"members": len(configs)}], [self.label]
        args, group = self.args, self.args.wandb_group or self.label

        def open_run(i: int, config: dict[str, Any]) -> None:
            import wandb

            own = {"name": names[i], "config": config, "group": group, "dir": directory, "reinit": "create_new"}
            own["settings"] = wandb.Settings(silent=True, init_timeout=30)
            self.runs.append(wandb.init(project=args.wandb_project, entity=args.wandb_entity, **own))

        self._each(open_run, configs)

    def log(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Log one dictionary for each member; under an agent, their means."""
        self.step = step
        rows = [{name: value for name, value in row.items() if value is not None} for row in rows]
        if self.under_agent:
            names = {name for row in rows for name in row}
            rows = [{name: float(np.mean([row[name] for row in rows if name in row])) for name in names}]
        self._each(lambda i, row: self.runs[i].log(row, step=step), rows)

    def finish(self, rows: list[dict[str, Any]], aggregated: dict[str, Any], exit_code: int) -> None:
        """Write the final figures into the runs' histories and summaries and close them.

        A sweep's metric that is None, as that of a population all of whose members diverged, is not written: with an
        exit code other than 0, the search then takes the worst value among the other runs.
        """

        def close(i: int, run: Any) -> None:
            row = aggregated if self.under_agent else rows[i]
            if written := {name: value for name, value in row.items() if value is not None}:
                run.log(written, step=self.step)  # joins the row of the last evaluation
                run.summary.update(written)
            run.finish(exit_code=exit_code)

        self._each(close, self.runs)
        self.enabled = False
