"""The run directory: configuration, tables, checkpoint, report; wandb beside them; progress, and signals that end a run.

Files are the source of truth. They are written whole or not at all, but for the tables, which grow by whole rows and
are cut back to the checkpoint's length when a run is resumed. No pickle anywhere.
"""

import contextlib
import csv
import dataclasses
import fcntl
import importlib.metadata
import io
import itertools
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np

from common import report
from common.cli import RunArgs, UsageError
from common.data import Dataset, normalized_score
from common.environments import Returns
from common.members import Members, Metrics, is_key
from common.replay import Transform, end_episode
from common.report import Tracker

LOG_EVERY = 1000
"""Updates (online: environment steps) for each row of metrics.csv."""
STRETCH = 100
"""Updates (online: environment steps) between looks at signals and divergence."""
# Flags that may differ between the run that wrote a checkpoint and the one that resumes it: whatever does not touch the
# training's course, and the lengths of the phases until the online phase has begun.
LENGTHS = {"num_updates", "online_steps"}
FREE = {
    "eval_every",
    "eval_episodes",
    "final_eval_episodes",
    "checkpoint_every",
    "run_dir",
    "resume",
    "quiet",
    "preset",
}
FREE |= {"track", "wandb_project", "wandb_group", "wandb_entity", "max_episode_steps"}


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


def save_tree(path: Path, tree: Any, metadata: dict[str, Any]) -> None:
    """Write every leaf of `tree` by its name, and `metadata` (JSON), to the `.npz` at `path`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    data = [jax.random.key_data(leaf) if is_key(leaf) else leaf for _, leaf in leaves]
    arrays = {jax.tree_util.keystr(name): np.asarray(leaf) for (name, _), leaf in zip(leaves, data, strict=True)}
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
        raise UsageError(f"checkpoint {path} is damaged or is not a checkpoint ({error})") from None


def fill_tree(path: Path, arrays: dict[str, np.ndarray], like: Any, prefix: str = "") -> Any:
    """A tree with the structure of `like` from the leaves under `prefix`; UsageError if one differs in shape or dtype."""

    def fill(place: Any, leaf: Any) -> Any:
        name = prefix + jax.tree_util.keystr(place)
        wanted = jax.eval_shape(jax.random.key_data, leaf) if is_key(leaf) else leaf
        found = arrays.get(name)
        if found is None or (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
            what = "missing" if found is None else f"{found.dtype}{list(found.shape)}"
            raise UsageError(
                f"checkpoint {path} does not fit this run: {name} is {what}, expected {wanted.dtype}{list(wanted.shape)}"
            )
        return jax.random.wrap_key_data(found) if is_key(leaf) else found

    tree = jax.tree_util.tree_map_with_path(fill, like)
    extra = sorted(
        set(arrays) - {prefix + jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(like)}
    )
    if not prefix and extra:
        raise UsageError(f"checkpoint {path} does not fit this run: it has {extra[0]}, which is none of its arrays")
    return tree


def use_compilation_cache() -> None:
    """Keep compiled programs in the user's cache directory, so that the next start skips compiling."""
    home = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ and not home.startswith("~"):
        jax.config.update("jax_compilation_cache_dir", str(Path(home, "offax", "jax")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


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
    try:
        processor = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        processor = platform.processor() or platform.machine()
    return {
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in packages},
        "git_commit": git("rev-parse", "HEAD"),
        "git_dirty": None if changes is None else bool(changes),
        "cpu": {"model": processor, "cores": os.cpu_count()},
    }


class Run:
    """A run's directory, held against other processes from the start; use it as a context manager around the loop.

    It keeps the books (rows, evaluations, which members diverged) and never the training's state. `alive [padded]`
    is 0 for members that diverged, and for the padding.
    """

    def __init__(self, name: str, args: RunArgs, members: Members) -> None:
        self.name, self.args, self.members = name, args, members
        self.started, stamp = time.time(), time.strftime("%Y%m%d-%H%M%S")
        use_compilation_cache()
        slug = re.sub(r"[^\w./-]", "_", args.dataset).strip("./")
        self.path = self._claim(Path(os.path.expanduser(args.run_dir or f"runs/{name}/{slug}/{stamp}")))
        self.checkpoint = self.path / "checkpoint" / "state.npz"
        self.evaluations: list[dict[str, Any]] = []
        self.diverged: dict[int, dict[str, Any]] = {}
        self.alive = (np.arange(len(members.seeds)) < members.count).astype(np.int32)
        self.done = {"pretraining": 0, "offline": 0, "online": 0}
        self.phase, self.saved, self.signal = "offline", (), 0
        self.sums: Metrics | None = None
        self.timing: dict[str, list[float]] = {}
        self.note, self.shown = "", 0.0
        self.flags = {f.name: getattr(args, f.name) for f in dataclasses.fields(args) if f.name != "hp"}
        self.flags |= dict(args.hp._asdict())
        self.tracker = Tracker(args, f"{name} {slug} {stamp}")

    def _claim(self, path: Path) -> Path:
        """Make the directory and hold it until the process ends; UsageError if it is held, or holds another run."""
        if not self.args.run_dir:  # unused: two runs may start in the same second
            candidates = (path.with_name(f"{path.name}-{i}") if i else path for i in itertools.count())
            path = next(candidate for candidate in candidates if not candidate.exists())
        if self.args.shard:
            path /= f"part-{self.args.shard.partition('/')[0]}"
        try:
            path.mkdir(parents=True, exist_ok=True)
            self.lock = open(path / ".lock", "w")  # the system lets go of it however the process ends
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another process is writing to {path}; use another --run-dir") from None
        except OSError as error:
            raise UsageError(f"run directory {path}: {error.strerror}; it must be a directory to write to") from None
        if not self.args.resume and any((path / name).exists() for name in ("config.json", "metrics.csv")):
            raise UsageError(
                f"{path} holds a run; --resume True continues it (or starts it anew if it has no checkpoint)"
            )
        return path

    def __enter__(self) -> Self:
        self.handlers = {n: signal.signal(n, self._on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if kind is not None:
            self.tracker.finish([{}] * self.members.count, {}, 128 + self.signal if self.signal else 1)
        self.lock.close()

    def _on_signal(self, number: int, frame: Any) -> None:
        if self.signal:  # the second one does not wait
            sys.exit(128 + number)
        self.signal = number

    def stopping(self) -> bool:
        """Whether a signal came: the run ends as soon as its state is saved."""
        return bool(self.signal)

    # Checkpoints

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with: the algorithm, the data, and flags that decide the training's course."""
        free = FREE | (LENGTHS if not self.done["online"] else set())
        fixed = {name: value for name, value in self.flags.items() if name not in free}
        return json.loads(json.dumps({"algorithm": self.name, "dataset_sha256": self.config["dataset_sha256"]} | fixed))

    def restore(self, trees: dict[str, Any], dataset: Dataset, transform: Transform) -> dict[str, Any]:
        """With --resume, what the checkpoint has in place of these (a ring only from the online phase on).

        It opens the tables, writes config.json and says in one line what the run is about to do. UsageError for a
        checkpoint of another run.
        """
        device = jax.local_devices()[0]
        self.config = (
            {
                "algorithm": self.name,
                "flags": self.flags,
                "preset": self.args.preset,
                "members": [
                    {"member": index, "seed": int(self.members.seeds[i]), "swept": self.members.swept[i]}
                    | {"hyperparameters": {k: float(v[i]) for k, v in self.members.hp._asdict().items()}}
                    for i, index in enumerate(self.members.indices)
                ],
                "device": {"platform": device.platform, "kind": device.device_kind, "count": self.members.mesh.size},
            }
            | dataset.describe()
            | {"transform": transform.describe()}
            | provenance()
        )
        self.domain = dataset.domain
        self.level = self.config["dataset_returns"].get("score_mean" if dataset.domain else "mean")
        arrays, theirs = read_tree(self.checkpoint) if self.checkpoint.exists() else ({}, {"tables": {}})
        if arrays:
            try:
                self.done, seconds = {name: int(theirs["done"][name]) for name in self.done}, float(theirs["seconds"])
                self.evaluations, self.diverged = (
                    theirs["evaluations"],
                    {int(i): d for i, d in theirs["diverged"].items()},
                )
                identity, self.restored_flags = dict(theirs["identity"]), dict(theirs["flags"])
            except (KeyError, TypeError, ValueError, AttributeError):
                raise UsageError(f"checkpoint {self.checkpoint} is damaged or was edited (its metadata)") from None
            self.started -= seconds
            for name, ours in self._identity().items():
                if identity.get(name) != ours:
                    raise UsageError(
                        f"{self.path} holds a run with --{name.replace('_', '-')} {identity.get(name)}, this one has "
                        f"{ours}; use another --run-dir"
                    )
            trees = {name: tree for name, tree in trees.items() if name != "ring" or self.done["online"]}
            like = jax.tree.map(lambda x: x[: self.members.count], trees)  # without the padding
            trees = self.members.shard(fill_tree(self.checkpoint, arrays, like))
            if "ring" in trees:  # the environments start anew
                trees["ring"] = jax.vmap(end_episode)(trees["ring"])
            self.alive[list(self.diverged)] = 0
        for table in self.path.glob("*.csv"):  # rows written after the checkpoint are written again
            os.truncate(table, theirs["tables"].get(table.name, 0))
        write_json(self.path / "config.json", self.config)
        configs = [self.config | member | member["hyperparameters"] | self.flags for member in self.config["members"]]
        labels = [f"{self.name} {self.args.dataset} {self.members.label(i)}" for i in range(self.members.count)]
        self.tracker.start(configs, labels, self.path)
        self.saved = tuple(self.done.values())
        at = ", ".join(f"{name} {done}" for name, done in self.done.items() if done)
        print(
            f"{self.name} on {self.args.dataset} (preset {self.args.preset}): {self.members.count} members on "
            f"{self.members.mesh.size} {self.config['device']['platform']} devices, into {self.path}"
            + (f", resumed at {at}" if arrays else ""),
            flush=True,
        )
        return trees

    def save(self, trees: dict[str, Any]) -> None:
        """Write the checkpoint, unless it has this state already."""
        if self.saved == (saved := tuple(self.done.values())):
            return
        metadata = {
            "identity": self._identity(),
            "flags": self.flags,
            "done": self.done,
            "seeds": [int(seed) for seed in self.members.seeds],
            "diverged": self.diverged,
            "evaluations": self.evaluations,
            "seconds": time.time() - self.started,
            "tables": {table.name: table.stat().st_size for table in self.path.glob("*.csv")},
        }
        save_tree(self.checkpoint, jax.tree.map(lambda x: x[: self.members.count], trees), metadata)
        self.saved = saved

    # The loop

    def chunks(self, phase: str, total: int, every: int = 0, whole: bool = False) -> Iterator[tuple[int, int]]:
        """`(start, stop)` of one stretch of the phase after another, until `total` steps of it are recorded.

        A stretch ends where a row, an evaluation, a checkpoint or a multiple of `every` is due, and after STRETCH steps;
        with `whole` it is `every` steps. After a signal the process ends here, where the state was saved.
        """
        dues = [] if whole else [LOG_EVERY, self.args.checkpoint_every, STRETCH]
        dues += [] if whole or phase == "pretraining" else [self.args.eval_every]
        self.phase, self.total, began, first = phase, total, time.time(), self.done[phase]
        self.dues = [n for n in (every, *dues) if n]
        while True:
            if self.signal:
                again = f"--run-dir {self.args.run_dir or self.path} --resume True"
                print(f"stopped; continue with the same flags, {again}", file=sys.stderr)
                sys.exit(128 + self.signal)
            self.start, begin = self.done[phase], time.time()
            if self.start >= total:
                break
            yield self.start, min([total, *(self.start + n - (0 if whole else self.start % n) for n in self.dues)])
            steps, spent = self.done[phase] - self.start, self.timing.setdefault(phase, [])
            spent.append((steps, steps * int(self.alive.sum()), time.time() - begin))
            del spent[1 : len(spent) - 1000]  # the first one compiles
            self._progress(phase, total)

    def rate(self, phase: str, column: int = 1) -> float | None:
        """Updates (online: environment steps, each with an update) per second, summed over the living members."""
        timed = np.array(self.timing.get(phase, [])[1:]).reshape(-1, 3).sum(axis=0)
        return float(timed[column] / timed[2]) if timed[2] else None

    def _progress(self, phase: str, total: int) -> None:
        """One line on stderr: rewritten on a terminal, else a new one every half minute."""
        terminal, done, rate = sys.stderr.isatty(), self.done[phase], self.rate(phase, 0)
        if self.args.quiet or not rate or not (terminal or time.time() - self.shown >= 30 or done >= total):
            return
        self.shown, left = time.time(), (total - done) / rate
        left = f"{left / 3600:.1f} h" if left > 5400 else f"{left / 60:.0f} min" if left > 90 else f"{left:.0f} s"
        text = f"{self.name} {phase} {done}/{total}, {self.rate(phase):.0f}/s, {left} left{self.note}"
        end = "" if terminal and done < total else "\n"
        print(f"\r{text:<100}" if terminal else text, end=end, file=sys.stderr, flush=True)

    def evaluation_due(self) -> bool:
        """Whether the phase has come to, or past, a step to be evaluated at that has not been."""
        every, done = self.args.eval_every, self.done[self.phase]
        last = max((row["step"] for row in self.evaluations if row["phase"] == self.phase), default=-1)
        return every > 0 and last < done - done % every

    def checkpoint_due(self) -> bool:
        """Whether the last stretch ended the phase, reached a checkpoint, or met a signal."""
        every, done = self.args.checkpoint_every, self.done[self.phase]
        return done >= self.total or self.stopping() or (every > 0 and done // every > self.start // every)

    def steps(self) -> int:
        """The step that rows of the phase's table have: the offline phase's updates and the online one's count on."""
        return self.done["pretraining"] if self.phase == "pretraining" else self.done["offline"] + self.done["online"]

    def record(self, stop: int, metrics: Metrics, finite: jax.Array) -> None:
        """Count the stretch up to `stop` as done; write a row for each living member where one is due.

        Members that are not `finite` are named, and out from here on. Exit 3 if none is left.
        """
        new, finite, before = jax.tree.map(np.asarray, metrics), np.asarray(finite), self.steps()
        self.done[self.phase] = stop
        old = self.sums or Metrics(*({name: 0 for name in new.sums},) * 3)
        sums = {name: old.sums[name] + new.sums[name].astype(np.float64) for name in new.sums}
        counts = {name: old.counts[name] + new.counts[name] for name in new.sums}
        self.sums = Metrics(sums, counts, {})
        was_alive = self.alive.copy()
        for i in np.flatnonzero(self.alive & ~finite):
            at = {int(first[i]): name for name, first in new.first_nonfinite.items() if first[i] >= 0}
            step, metric = (before + min(at) + 1, at[min(at)]) if at else (self.steps(), "a parameter")
            self.diverged[int(i)], self.alive[i] = {"step": step, "metric": metric}, 0
            label = self.members.label(i)
            print(f"{label} diverged: {metric} is not finite at update {step}; it is frozen", file=sys.stderr)
        if (
            stop >= self.total
            or self.signal
            or not self.alive.any()
            or any(stop % n == 0 for n in self.dues if n != STRETCH)
        ):
            table = "pretraining.csv" if self.phase == "pretraining" else "metrics.csv"
            self.sums, rows = None, {}
            for i in np.flatnonzero(was_alive):
                means = {name: sums[name][i] / counts[name][i] if counts[name][i] else None for name in sums}
                rows[i] = self._who(i) | means
            self._append(table, [{"step": self.steps()} | row for row in rows.values()])
            rates = {"updates_per_second": self.rate(self.phase)}
            logged = [{k: v for k, v in rows.get(i, {}).items() if "/" in k} | rates for i in range(self.members.count)]
            self.tracker.log(sum(self.done.values()), logged)
        if not self.alive.any():
            self.finish(None)
            print("error: every member diverged", file=sys.stderr)
            sys.exit(3)

    def _who(self, i: int) -> dict[str, int]:
        return {"member": self.members.indices[i], "seed": int(self.members.seeds[i])}

    def _append(self, name: str, rows: Sequence[dict[str, Any]]) -> None:
        """Add whole rows to a table; its first row fixes the columns."""
        with open(self.path / name, "a+", newline="") as file:
            file.seek(0)
            columns = next(csv.reader(file), None)
            if unknown := sorted(set(rows[0]) - set(columns or rows[0])):
                raise UsageError(f"{self.path / name} was begun without the column {unknown[0]}; use another --run-dir")
            text = io.StringIO()
            writer = csv.DictWriter(text, columns or list(rows[0]), lineterminator="\n")
            if columns is None:
                writer.writeheader()
            for row in rows:
                writer.writerow({k: f"{v:.7g}" if isinstance(v, float) else v for k, v in row.items()})
            file.write(text.getvalue())

    def record_evaluation(self, result: Returns | None) -> None:
        """Write a row of evaluations.csv for each living member from the evaluation of the phase's present state."""
        if result is None:  # cut short by a signal
            next(self.chunks(self.phase, self.total))
        rows = []
        for i in np.flatnonzero(self.alive):
            row = {"phase": self.phase, "step": self.done[self.phase]} | self._who(i)
            scores = normalized_score(self.domain, result.returns[i])
            for name, values in (("return", result.returns[i]), ("score", scores)):
                row[f"{name}_mean"] = None if values is None else float(values.mean())
                row[f"{name}_std"] = None if values is None else float(values.std())
            row["episodes"] = result.returns.shape[1]
            if np.isfinite(result.successes[i]).all():  # the environment reports success
                row["success_mean"] = float(result.successes[i].mean())
            rows.append(row)
        self.evaluations += rows
        self._append("evaluations.csv", rows)
        logged = {
            r["member"]: {f"evaluation/{k}": v for k, v in r.items() if k.endswith(("mean", "std"))} for r in rows
        }
        self.tracker.log(sum(self.done.values()), [logged.get(index, {}) for index in self.members.indices])
        score = "" if scores is None else f", score {np.mean([row['score_mean'] for row in rows]):.1f}"
        self.note = f", return {np.mean([row['return_mean'] for row in rows]):.0f}{score}"
        if self.args.quiet or not sys.stderr.isatty():
            print(f"{self.phase} {self.done[self.phase]}: {self.note[2:]}", flush=True)

    def finish(self, result: Returns | None) -> None:
        """The last evaluation, returns.csv, final.json, curves.png and the table; None where every member diverged."""
        last: dict[int, dict[str, Any]] = {}
        if result is not None:
            self.record_evaluation(result)
            last = {row["member"]: row for row in self.evaluations[-int(self.alive.sum()) :]}
            (self.path / "returns.csv").unlink(missing_ok=True)
            living = [(i, episode) for i in np.flatnonzero(self.alive) for episode in range(result.returns.shape[1])]
            rows = [self._who(i) | {"episode": e, "return": float(result.returns[i, e])} for i, e in living]
            self._append("returns.csv", rows)
        members = []
        for i, index in enumerate(self.members.indices):
            entry = self._who(i) | {"swept": self.members.swept[i], "diverged": self.diverged.get(i)}
            names = ("return_mean", "return_std", "score_mean", "score_std", "episodes")
            members.append(entry | {name: last.get(index, {}).get(name) for name in names})
        final = {"members": members} | report.summarise(members)
        final |= {"pretraining_updates": self.done["pretraining"]} if self.done["pretraining"] else {}
        final |= {"updates": self.done["offline"], "online_steps": self.done["online"]}
        final |= {"wall_clock_seconds": time.time() - self.started, "updates_per_second": self.rate("offline")}
        final |= {"online_steps_per_second": self.rate("online")}
        write_json(self.path / "final.json", final)
        title = f"{self.name}, {self.args.dataset}"
        if self.evaluations:
            report.plot_curves(self.path / "curves.png", self.evaluations, title, self.level)
        aggregate = final["aggregate"]
        swept = {"final_score_iqm": aggregate["score"]["iqm"], "final_return_iqm": aggregate["return"]["iqm"]}
        swept["diverged_members"] = len(self.diverged)  # they are not in the means
        own = [{"final_score": m["score_mean"], "final_return": m["return_mean"]} for m in members]
        self.tracker.finish(own, swept, 0 if last else 3)
        with contextlib.suppress(OSError):  # nobody may be reading; everything is written
            print(report.table(title, members, self.level), f"\nresults in {self.path}", flush=True)
