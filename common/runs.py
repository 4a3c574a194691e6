"""The run directory: configuration, tables, checkpoint, report; progress, and the signals that end a run well.

Files are the source of truth. They are written whole or not at all, but for the tables, which grow by whole rows and
are cut back to the checkpoint's length when a run is resumed. No pickle anywhere.
"""

import contextlib
import dataclasses
import datetime
import fcntl
import itertools
import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np

from common import report
from common.cli import RunArgs, UsageError
from common.data import Dataset, normalized_score
from common.environments import Returns
from common.members import Members, Metrics
from common.replay import Transform, end_episode
from common.report import append_rows, read_tree, save_tree, write_json

LOG_EVERY = 1000  # updates (online: environment steps) for each row of metrics.csv
STRETCH = 100  # and between looks at signals and divergence
# Flags that may differ between the run that wrote a checkpoint and the one that resumes it: whatever does not touch the
# training's course, and the lengths of the phases until the online phase has begun.
FREE = {"eval_every", "eval_episodes", "final_eval_episodes", "max_episode_steps", "checkpoint_every", "run_dir"}
FREE |= {"resume", "quiet", "preset", "track", "wandb_project", "wandb_group", "wandb_entity"}
LENGTHS = {"num_updates", "online_steps"}


class Run:
    """A run's directory, held against other processes from the start; use it as a context manager around the loop.

    It keeps the books (rows, evaluations, who diverged) and never the training's state. `alive [padded]` is 0 for
    members that diverged, and for the padding; `done` are the steps of each phase.
    """

    def __init__(self, name: str, args: RunArgs, members: Members) -> None:
        self.name, self.args, self.members, self.started = name, args, members, time.time()
        slug = re.sub(r"[^\w./-]", "_", args.dataset).strip("./")
        self.label = f"{name} {slug} {time.strftime('%Y%m%d-%H%M%S')}"
        self.path = self._claim(Path(os.path.expanduser(args.run_dir or f"runs/{self.label.replace(' ', '/')}")))
        self.checkpoint = self.path / "checkpoint" / "state.npz"
        self.alive = (np.arange(len(members.seeds)) < members.count).astype(np.int32)
        self.done = {"pretraining": 0, "offline": 0, "online": 0}
        self.evaluations: list[dict[str, Any]] = []
        self.diverged: dict[int, dict[str, Any]] = {}
        self.timing: dict[str, list[Any]] = {}
        self.phase, self.signal, self.row, self.note, self.shown = "offline", 0, None, "", time.time()
        self.flags = {f.name: getattr(args, f.name) for f in dataclasses.fields(args)}
        self.flags |= self.flags.pop("hp")._asdict()
        self.tracker = report.Tracker(args, self.label)

    def _claim(self, path: Path) -> Path:
        """Make the directory and hold it until the process ends; UsageError if it is held, or holds another run."""
        if not self.args.run_dir:  # unused: two runs may start in the same second
            candidates = (path.with_name(f"{path.name}-{i}") if i else path for i in itertools.count())
            path = next(candidate for candidate in candidates if not candidate.exists())
        if self.args.shard:
            path /= f"part-{self.args.shard.partition('/')[0]}"
        try:
            path.mkdir(parents=True, exist_ok=True)
            self.lock = open(path / ".lock", "w")  # noqa: SIM115  the system lets go of it however the process ends
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another process is writing to {path}; use another --run-dir") from None
        except OSError as error:
            raise UsageError(f"run directory {path}: {error.strerror}; it must be a directory to write to") from None
        if not self.args.resume and any((path / name).exists() for name in ("config.json", "metrics.csv")):
            raise UsageError(f"{path} holds a run; --resume True goes on with it, or starts anew without a checkpoint")
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

    def stopping(self) -> bool:  # a signal came: the run ends as soon as its state is saved
        return bool(self.signal)

    def steps(self) -> int:
        """The step of the phase's table: the offline phase's updates and the online one's are counted on."""
        return self.done["pretraining"] if self.phase == "pretraining" else self.done["offline"] + self.done["online"]

    def restore(self, trees: dict[str, Any], dataset: Dataset, transform: Transform) -> dict[str, Any]:
        """`trees`, or what the checkpoint of a resumed run has in their place (a ring only from the online phase on).

        It writes config.json, cuts the tables to the checkpoint, and says in one line what the run is about to do.
        UsageError for a checkpoint of another run.
        """
        self.about, self.domain, device = dataset.describe(), dataset.domain, jax.local_devices()[0]
        self.level = self.about["dataset_returns"].get("score_mean" if dataset.domain else "mean")
        self.before: dict[str, Any] = {}  # the flags of the run that is resumed
        found, theirs = read_tree(self.checkpoint) if self.checkpoint.exists() else ({}, {})
        if found:
            try:
                self.done = {phase: int(theirs["done"][phase]) for phase in self.done}
                self.diverged = {int(i): what for i, what in theirs["diverged"].items()}
                self.started -= float(theirs["seconds"])
                self.evaluations, self.before = theirs["evaluations"], theirs["flags"]
                tables, identity = dict(theirs["tables"]), theirs["identity"]
                odd = [(name, identity.get(name), x) for name, x in self._identity().items() if identity.get(name) != x]
            except (KeyError, TypeError, ValueError, AttributeError):
                raise UsageError(f"checkpoint {self.checkpoint} is damaged or was edited (its metadata)") from None
            if odd:
                name, before, now = odd[0][0].replace("_", "-"), *odd[0][1:]
                what = f"holds a run with --{name} {before}, this one has {now}"
                raise UsageError(f"{self.path} {what}; use another --run-dir")
            trees = {name: tree for name, tree in trees.items() if name != "ring" or self.done["online"]}
            like = jax.tree.map(lambda x: x[: self.members.count], trees)  # without the padding
            trees = self.members.shard(report.fill_tree(self.checkpoint, found, like))
            if "ring" in trees:  # the environments start anew
                trees["ring"] = jax.vmap(end_episode)(trees["ring"])
            self.alive[list(self.diverged)] = 0
        for file in self.path.glob("*.csv"):  # rows written after the checkpoint are written again
            os.truncate(file, min(file.stat().st_size, tables.get(file.name, 0) if found else 0))
        hp = [dict(self.args.hp._asdict()) | swept for swept in self.members.swept]
        swept = enumerate(self.members.swept)
        who = [self.members.who(i) | {"swept": x, "hyperparameters": hp[i]} for i, x in swept]
        config = {"algorithm": self.name, "flags": self.flags, "preset": self.args.preset, "members": who} | self.about
        config |= {"device": {"platform": device.platform, "kind": device.device_kind, "count": self.members.mesh.size}}
        config |= {"transform": transform.describe()} | report.provenance()
        write_json(self.path / "config.json", config)
        labels = [f"{self.name} {self.args.dataset} {self.members.label(i)}" for i in range(len(who))]
        self.tracker.start([config | self.flags | h | w for h, w in zip(hp, who, strict=True)], labels, self.path)
        self.saved = dict(self.done) if found else None
        where = f"{len(who)} member(s) on {self.members.mesh.size} {device.device_kind}, into {self.path}"
        end = f", resumed at {self.done}" if found else ""
        print(f"{self.name} on {self.args.dataset}, preset {self.args.preset}: {where}{end}", flush=True)
        return trees

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with: the algorithm, the data, and flags that decide the training's course."""
        free = FREE | (set() if self.done["online"] else LENGTHS)
        fixed = {name: value for name, value in self.flags.items() if name not in free}
        return json.loads(json.dumps({"algorithm": self.name, "dataset_sha256": self.about["dataset_sha256"]} | fixed))

    def save(self, trees: dict[str, Any]) -> None:
        """Write the checkpoint, unless it has this state already."""
        if self.saved == self.done:
            return
        about = {"identity": self._identity(), "flags": self.flags, "done": self.done, "diverged": self.diverged}
        about |= {"seeds": self.members.seeds[: self.members.count].tolist(), "evaluations": self.evaluations}
        about |= {"tables": {file.name: file.stat().st_size for file in self.path.glob("*.csv")}}
        about |= {"seconds": time.time() - self.started}
        trees = {name: tree for name, tree in trees.items() if name != "ring" or self.done["online"]}  # as in `restore`
        save_tree(self.checkpoint, jax.tree.map(lambda x: x[: self.members.count], trees), about)
        self.saved = dict(self.done)

    def chunks(self, phase: str, total: int, every: int = 0, whole: bool = False) -> Iterator[tuple[int, int]]:
        """`(start, stop)` of one stretch of the phase after another, until `total` steps of it are recorded.

        A stretch ends after STRETCH steps, and where a row, an evaluation, a checkpoint or a multiple of `every` is
        due; with `whole` it is `every` steps. After a signal the process ends here, where the state was saved.
        """
        dues = [LOG_EVERY, self.args.checkpoint_every, 0 if phase == "pretraining" else self.args.eval_every]
        # A whole stretch has its row wherever it ends.
        self.phase, self.total, self.dues = phase, total, [1] if whole else [n for n in dues if n]
        while True:
            if self.signal:
                print(f"stopped; go on with --run-dir {self.args.run_dir or self.path} --resume True", file=sys.stderr)
                sys.exit(128 + self.signal)
            self.start, began = self.done[phase], time.time()
            if self.start >= total:
                break
            lengths = [every] if whole else [STRETCH, *(n - self.start % n for n in (every, *self.dues) if n)]
            yield self.start, min(total, self.start + min(lengths))
            steps, timed = self.done[phase] - self.start, self.timing.setdefault(phase, [])
            timed.append((steps, steps * int(self.alive.sum()), time.time() - began))
            del timed[1 : len(timed) - 1000]  # the first one, which compiles, does not count
            self._progress(phase, total)

    def rate(self, phase: str, column: int = 1) -> float | None:
        """Updates (online: environment steps, each with an update) per second, summed over the living members."""
        timed = np.array(self.timing.get(phase, [])[1:]).reshape(-1, 3).sum(axis=0)
        return float(timed[column] / timed[2]) if timed[2] else None

    def _progress(self, phase: str, total: int) -> None:
        """A line on stderr: rewritten on a terminal, else a new one every half minute."""
        terminal, done, rate = sys.stderr.isatty(), self.done[phase], self.rate(phase, 0)
        if self.args.quiet or not rate or not (terminal or time.time() - self.shown >= 30 or done >= total):
            return
        self.shown, left = time.time(), datetime.timedelta(seconds=round((total - done) / rate))
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

    def record(self, stop: int, metrics: Metrics, finite: jax.Array) -> None:
        """Count the stretch up to `stop` as done; write a row for each living member where one is due.

        Members that are not `finite` are named, and out from here on. Exit 3 if none is left.
        """
        sums, counts, first = jax.tree.map(np.asarray, metrics)
        before, was_alive, self.done[self.phase] = self.steps(), np.flatnonzero(self.alive), stop
        old = self.row or ({name: np.float64(0.0) for name in sums},) * 2
        sums, counts = (jax.tree.map(np.add, x, y) for x, y in zip(old, (sums, counts), strict=True))
        for i in np.flatnonzero(self.alive & ~np.asarray(finite)):
            at = [(int(x[i]), name) for name, x in first.items() if x[i] >= 0]
            at, metric = min(at, key=lambda one: one[0], default=(self.steps() - before - 1, "a parameter"))
            step = before + at + 1
            self.diverged[int(i)], self.alive[i] = {"step": step, "metric": metric}, 0
            what = f"{metric} is not finite at update {step}; it is frozen"
            print(f"{self.members.label(i)} diverged: {what}", file=sys.stderr)
        self.row = sums, counts
        if stop >= self.total or self.signal or not self.alive.any() or any(stop % n == 0 for n in self.dues):
            self.row, rows = None, {}
            for i in was_alive:
                rows[i] = {name: sums[name][i] / counts[name][i] if counts[name][i] else None for name in sums}
            name = "pretraining.csv" if self.phase == "pretraining" else "metrics.csv"
            whole = [{"step": self.steps()} | self.members.who(i) | row for i, row in rows.items()]
            append_rows(self.path / name, whole)
            rate = {"updates_per_second": self.rate(self.phase)}
            logged = [rows.get(i, {}) | rate for i in range(self.members.count)]
            self.tracker.log(sum(self.done.values()), logged)
        if not self.alive.any():
            self.finish(None)
            print("error: every member diverged", file=sys.stderr)
            sys.exit(3)

    def record_evaluation(self, result: Returns | None) -> None:
        """A row of evaluations.csv for each living member; a `result` of None, after a signal, ends the process."""
        if result is None:
            next(self.chunks(self.phase, self.total))
        rows = []
        for i in np.flatnonzero(self.alive):
            place = {"phase": self.phase, "step": self.done[self.phase]} | self.members.who(i)
            scores = normalized_score(self.domain, result.returns[i])
            rows.append(place | report.evaluation_columns(result.returns[i], scores, result.successes[i]))
        self.evaluations += rows
        append_rows(self.path / "evaluations.csv", rows)
        named = {r["member"]: {f"evaluation/{k}": v for k, v in r.items() if k.endswith(("mean", "std"))} for r in rows}
        self.tracker.log(sum(self.done.values()), [named.get(index, {}) for index in self.members.indices])
        means = {name: [row[f"{name}_mean"] for row in rows] for name in ("return", "score")}
        self.note = "".join(f", {name} {np.mean(x):.1f}" for name, x in means.items() if None not in x)
        if self.args.quiet or not sys.stderr.isatty():
            print(f"{self.phase} {self.done[self.phase]}: {self.note[2:]}", flush=True)

    def finish(self, result: Returns | None) -> None:
        """The last evaluation, returns.csv, final.json, curves.png and a table; None where every member diverged."""
        rows: list[dict[str, Any]] = []
        if self.signal or result is not None:
            self.record_evaluation(result)
            living = np.flatnonzero(self.alive)
            rows = self.evaluations[-len(living) :]
            (self.path / "returns.csv").unlink(missing_ok=True)
            for i in living:
                who, returns = self.members.who(i), enumerate(result.returns[i].tolist())
                append_rows(self.path / "returns.csv", [who | {"episode": e, "return": x} for e, x in returns])
        last, members = {row["member"]: row for row in rows}, []
        names = ("return_mean", "return_std", "score_mean", "score_std", "episodes")
        for i, index in enumerate(self.members.indices):
            entry = self.members.who(i) | {"swept": self.members.swept[i], "diverged": self.diverged.get(i)}
            members.append(entry | {name: last.get(index, {}).get(name) for name in names})
        final = {"members": members} | report.summarise(members) | {"pretraining_updates": self.done["pretraining"]}
        final |= {"updates": self.done["offline"], "updates_per_second": self.rate("offline")}
        final |= {"online_steps": self.done["online"], "online_steps_per_second": self.rate("online")}
        write_json(self.path / "final.json", final | {"wall_clock_seconds": time.time() - self.started})
        title = f"{self.name}, {self.args.dataset}"
        report.plot_curves(self.path / "curves.png", self.evaluations, title, self.level)
        swept = {f"final_{name}_iqm": final["aggregate"][name]["iqm"] for name in ("score", "return")}
        swept["diverged_members"] = len(self.diverged)  # they are not in the means
        own = [{"final_score": m["score_mean"], "final_return": m["return_mean"]} for m in members]
        self.tracker.finish(own, swept, 0 if rows else 3)
        with contextlib.suppress(OSError):  # nobody may be reading; everything is written
            print(report.table(title, final, self.level), f"\nresults in {self.path}", flush=True)
