"""The run directory: configuration, tables, checkpoint, results; progress, and the signals that end a run well.

Tables grow by whole rows and are cut back to the checkpoint's length when a run is resumed. No pickle anywhere.
"""

import dataclasses
import datetime
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from signal import SIG_DFL, SIG_IGN, SIGHUP, SIGINT, SIGTERM, getsignal, signal
from threading import current_thread, main_thread
from typing import Any, Self

import jax
import numpy as np

from common.cli import RunArgs, UsageError, one_line, optional, say
from common.data import Dataset
from common.environments import Returns
from common.members import Members, Metrics, is_key
from common.replay import Transform
from common.report import append_rows, claim, fill_tree, read_tree, save_tree, script_of, write_json

LOG_EVERY = 1000  # updates (online: environment steps) for each row of metrics.csv
STRETCH = 100  # updates (steps) between looks at signals and divergence
# A resumed run may change flags that do not affect training, the script (with a warning) and, while offline, LENGTHS.
FREE = {"eval_every", "eval_episodes", "final_eval_episodes", "checkpoint_every", "run_dir", "resume", "quiet"}
FREE |= {"preset", "track", "wandb_project", "wandb_group", "wandb_entity", "keep_best", "script", "script_sha256"}
LENGTHS = {"num_updates", "online_steps", "max_episode_steps"}
TABLES = ("metrics.csv", "pretraining.csv", "evaluations.csv", "returns.csv")


class Run:
    """A run's directory, held against other processes from the start; use it as a context manager around the loop.

    It keeps the books (rows, evaluations, who diverged) and never the training's state. `alive [padded]` is 0 for
    members that diverged, and for the padding; `done` are the steps of each phase.
    """

    def __init__(self, name: str, args: RunArgs, members: Members) -> None:
        self.name, self.args, self.members, self.started = name, args, members, time.time()
        self.source = args.env if args.env and not args.num_updates else args.dataset  # online from scratch: no data
        slug = re.sub(r"[^\w./-]", "_", self.source).strip("./").replace("..", "_")
        now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f")  # two runs may start in the same second
        self.label = f"{name} {slug} {now}"
        path = Path(os.path.expanduser(args.run_dir or f"runs/{self.label.replace(' ', '/')}"))
        self.path = path / f"part-{int(args.shard.partition('/')[0])}" if args.shard else path
        has_parts = any(path.glob("part-*"))
        has_whole_run = (path / "config.json").exists() and not has_parts  # merged parts have a config.json too
        if (args.shard and has_whole_run) or (not args.shard and has_parts):
            raise UsageError(f"{path} holds a run {'without' if args.shard else 'with'} --shard; use another --run-dir")
        self.keep_best = optional("benchmarks.keep_best", "--keep-best True") if args.keep_best else None
        track = args.track or "WANDB_SWEEP_ID" in os.environ
        self.tracking = optional("benchmarks.tracking", "--track True") if track else None
        self.lock = claim(self.path, args.resume)
        self.checkpoint = self.path / "checkpoint" / "state.npz"
        self.alive = (np.arange(len(members.seeds)) < members.count).astype(np.int32)
        self.done = {"pretraining": 0, "offline": 0, "online": 0}
        self.evaluations: list[dict[str, Any]] = []
        self.diverged: dict[int, dict[str, Any]] = {}
        self.clock: dict[str, list[tuple[int, float]]] = {}  # of each phase: steps and time at first and at last
        self.phase, self.total, self.signal, self.row, self.note, self.tracker = "offline", 0, 0, None, "", None
        self.flags = {f.name: getattr(args, f.name) for f in dataclasses.fields(args)}
        self.flags |= self.flags.pop("hp")._asdict()

    def __enter__(self) -> Self:
        numbers = (n for n in (SIGINT, SIGTERM, SIGHUP) if n != SIGHUP or getsignal(n) != SIG_IGN)  # nohup's stays
        main = current_thread() is main_thread()  # Python lets no other set handlers
        self.handlers = {n: signal(n, self._on_signal) for n in numbers if main}
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        for number, handler in self.handlers.items():
            signal(number, handler or SIG_DFL)  # None: of one that was not set by Python
        if kind is not None and self.tracker:
            self.tracker.finish(None, 128 + self.signal if self.signal else 1)
        self.lock.close()

    def _on_signal(self, number: int, frame: Any) -> None:
        if self.signal:  # the second: exit at once (sys.exit would wait for JAX); in a notebook, end the cell alone
            (sys.exit if hasattr(sys, "ps1") else os._exit)(128 + number)
        self.signal = number
        with suppress(OSError):  # `print` may be at work
            os.write(2, b"stopping once the state is saved; a second signal ends it at once, unsaved\n")

    def stopping(self) -> bool:  # a signal came: the run ends once its state is saved
        return bool(self.signal)

    def steps(self) -> int:
        """`step` in pretraining.csv or metrics.csv: pretraining updates, or offline updates plus online steps."""
        return self.done["pretraining"] if self.phase == "pretraining" else self.done["offline"] + self.done["online"]

    def restore(self, trees: dict[str, Any], dataset: Dataset, transform: Transform) -> dict[str, Any]:
        """The trees to go on with: `trees`, or those in a resumed run's checkpoint (a ring only after online steps).

        It writes config.json, cuts the tables to the checkpoint, and says in one line what the run is about to do.
        UsageError for a checkpoint of another run.
        """
        about, self.env_spec, device = dataset.describe(), dataset.env_spec, jax.local_devices()[0]
        script = script_of(sys.modules[type(self.args).__module__])
        known = {"algorithm": self.name} | self.flags | {"dataset_sha256": about["dataset_sha256"]} | script
        self.identity, self.before = json.loads(json.dumps(known, default=str)), {}  # the latter is the resumed run's
        arrays, old = read_tree(self.checkpoint) if self.checkpoint.exists() else ({}, {"tables": {}})
        if arrays:
            try:
                self.done = {phase: int(old["done"][phase]) for phase in self.done}
                self.diverged = {int(i): what for i, what in old["diverged"].items()}
                self.started -= float(old["seconds"])
                self.evaluations, self.before, _ = old["evaluations"], old["identity"], dict(old["tables"])
                free = FREE | (set() if self.done["online"] else LENGTHS)
                diff = [x for x, value in self.identity.items() if x not in free and self.before.get(x, value) != value]
            except (KeyError, TypeError, ValueError, AttributeError):
                raise UsageError(f"checkpoint {self.checkpoint} is damaged or was edited (its metadata)") from None
            if self.args.num_updates < self.done["offline"]:
                raise UsageError(f"{self.path} has {self.done['offline']} updates: --num-updates must not be fewer")
            if diff:
                names = {x: ("--" if x in self.flags else "") + x.replace("_", "-") for x in diff}
                had = "; ".join(f"{names[x]} {self.before[x]!r}, not {self.identity[x]!r}" for x in diff)
                raise UsageError(f"{self.path} holds a run with {had}; use another --run-dir")
            if self.before.get("script_sha256") != script.get("script_sha256"):
                say(f"{self.name}.py or common/ was edited since {self.path} was saved, or is another one", sys.stderr)
            trees = trees | self.members.shard(fill_tree(self.checkpoint, arrays, self._kept(trees)))
            self.alive[list(self.diverged)] = 0
        hp, swept = self.args.hp._asdict(), enumerate(self.members.swept)
        members = [self.members.who(i) | {"swept": x, "hyperparameters": hp | x} for i, x in swept]
        config = {"algorithm": self.name, "run_dir": str(self.path), "flags": self.flags, "preset": self.args.preset}
        config |= {"device": {"platform": device.platform, "kind": device.device_kind, "count": self.members.mesh.size}}
        config |= about | {"transform": {k: np.asarray(v).tolist() for k, v in transform._asdict().items()}}
        config |= made.of_run(self.path if arrays else None) if (made := optional("benchmarks.provenance")) else {}
        config |= {"population": self.members.total, "members": members} | script
        if self.args.shard and (merge := optional("benchmarks.merge")):
            merge.check_part(self.path, config)
        if self.tracking:
            names = [f"{self.name} {self.source} {self.members.label(i)}" for i in range(len(members))]
            self.tracker = self.tracking.Tracker(self.args, config, names, self.label)
        for file in filter(Path.exists, map(self.path.joinpath, TABLES)):  # rows after the checkpoint are written again
            os.truncate(file, min(file.stat().st_size, old["tables"].get(file.name, 0)))
        with suppress(FileNotFoundError):  # of a run that now goes on
            os.replace(self.path / "final.json", self.path / f"final-{self.steps()}.json")
        write_json(self.path / "config.json", config)
        self.saved = dict(self.done) if arrays else None
        where = f"{len(members)} member(s) on {self.members.mesh.size} {device.device_kind}, into {self.path}"
        where += f", resumed at {self.done}" if arrays else ""
        preset = "none (Args made without common.cli.parse)" if self.args.preset == "auto" else self.args.preset
        no_data = "" if self.source == self.args.dataset else ", no data"
        say(f"{self.name} on {self.source}{no_data}, preset {preset}: {where}", sys.stdout)
        return trees

    def _kept(self, trees: dict[str, Any]) -> dict[str, Any]:  # without padding; a ring only once it is used
        trees = {name: tree for name, tree in trees.items() if name != "ring" or self.done["online"]}
        return jax.tree.map(lambda x: (x if is_key(x) else np.asarray(x))[: self.members.count], trees)  # on no device

    def save(self, trees: dict[str, Any]) -> None:
        """Write the checkpoint; only the first call at a step does, so every call must hold all that is to be kept."""
        if self.saved != self.done:
            about = {"identity": self.identity, "done": self.done, "diverged": self.diverged}
            about |= {"seeds": self.members.seeds[: self.members.count].tolist(), "evaluations": self.evaluations}
            about |= {"tables": {x: (self.path / x).stat().st_size for x in TABLES if (self.path / x).exists()}}
            save_tree(self.checkpoint, self._kept(trees), about | {"seconds": time.time() - self.started})
            self.saved = dict(self.done)

    def chunks(self, phase: str, total: int, every: int = 0, whole: bool = False) -> Iterator[tuple[int, int]]:
        """`(start, stop)` of the phase's stretches, one after another, until `total` steps are recorded.

        A stretch ends after STRETCH steps, or before that where a row, an evaluation, a checkpoint or a multiple of
        `every` is due; with `whole` it has `every` steps. After a signal the process exits here, once it has saved.
        """
        dues = [LOG_EVERY, self.args.checkpoint_every, 0 if phase == "pretraining" else self.args.eval_every]
        self.phase, self.total, self.dues, self.shown = phase, total, [n for n in dues if n], 0.0
        while True:
            # After a signal that came too late for the last checkpoint there is one stretch more, which saves.
            if self.signal and (self.saved == self.done or not any(self.done.values())):
                self._stop()
            self.start = self.done[phase]
            if self.start >= total:
                break
            lengths = [every] if whole else [STRETCH, *(n - self.start % n for n in (every, *self.dues) if n)]
            yield self.start, min(total, self.start + min(lengths))
            self._progress(phase, total)

    def _stop(self) -> None:
        path = shlex.quote(str(self.args.run_dir or self.path))
        say(f"stopped; go on with the same flags and --run-dir {path} --resume True", sys.stderr)
        sys.exit(128 + self.signal)

    def rate(self, phase: str, members: int | None = None) -> float | None:
        """Updates (online: environment steps and updates) per second of all living members, evaluations included."""
        (start, began), (stop, ended) = self.clock.get(phase, [(0, 0.0), (0, 0.0)])
        return (members or int(self.alive.sum())) * (stop - start) / (ended - began) if stop > start else None

    def _progress(self, phase: str, total: int) -> None:
        """A line on stderr, as soon as there is a rate: rewritten on a terminal, else a new one every half minute."""
        terminal, done, rate = sys.stderr.isatty(), self.done[phase], self.rate(phase, members=1)
        if self.args.quiet or not rate or not (terminal or time.time() - self.shown >= 30 or done >= total):
            return
        self.shown, left = time.time(), datetime.timedelta(seconds=round(max(0, total - done) / rate))
        text = f"{self.name} {phase} {done}/{total}, {self.rate(phase):.0f}/s, {left} left{self.note}"
        say(f"\r{text:<100}" if terminal else text, sys.stderr, "" if terminal and done < total else "\n")

    def evaluation_due(self) -> bool:
        """Whether the phase has reached a multiple of --eval-every (0 is one) and was not evaluated there or later."""
        every, done = self.args.eval_every, self.done[self.phase]
        last = max((row["step"] for row in self.evaluations if row["phase"] == self.phase), default=-1)
        return every > 0 and last < done - done % every

    def checkpoint_due(self) -> bool:
        """Whether the last stretch ended the phase, reached a checkpoint, or met a signal."""
        every, done = self.args.checkpoint_every, self.done[self.phase]
        return done >= self.total or self.stopping() or (every > 0 and done // every > self.start // every)

    def record(self, stop: int, metrics: Metrics, finite: jax.Array) -> None:
        """Count the stretch up to `stop` as done; write a row where one is due, for each member alive before it.

        Members that are not `finite` are named, and out from here on. Exit 3 if none is left.
        """
        sums, counts = jax.tree.map(lambda x: np.asarray(x, np.float64), jax.device_get(metrics))
        frozen_at, living, pretraining = self.steps(), np.flatnonzero(self.alive), self.phase == "pretraining"
        self.done[self.phase] = stop
        now = (stop, time.time())  # neither the first stretch, which compiles, nor the last checkpoint is in the rate
        self.clock[self.phase] = [self.clock.get(self.phase, [now])[0], now]
        for i in living[~np.asarray(finite)[living]]:
            metric = next((name for name, x in sums.items() if not np.isfinite(x[i])), "a parameter")
            self.diverged[int(i)], self.alive[i] = {"step": 0 if pretraining else frozen_at, "metric": metric}, 0
            what = f"{metric} is not finite by update {self.steps()}; this member stays as it was at {frozen_at}"
            say(f"{self.members.label(i)} diverged: {what}", sys.stderr)
        self.row = Metrics(sums, counts) if self.row is None else jax.tree.map(np.add, self.row, Metrics(sums, counts))
        due = any(stop // n > self.start // n for n in self.dues)
        if due or stop >= self.total or self.signal or not self.alive.any():
            (sums, counts), self.row, rows = self.row, None, []
            for i in living:
                means = {name: sums[name][i] / counts[name][i] if counts[name][i] else None for name in sums}
                rows.append({"step": self.steps()} | self.members.who(i) | means)
            self._write("pretraining.csv" if self.phase == "pretraining" else "metrics.csv", rows)
        if not self.alive.any():
            self.finish(None)
            say("error: every member diverged", sys.stderr)
            sys.exit(3)

    def record_evaluation(self, result: Returns | None) -> None:
        """A row of evaluations.csv for each living member; a `result` of None, after a signal, ends the process."""
        if result is None:
            self._stop()
        families, rows = optional("benchmarks.families"), []
        domain = families.domain_of(self.env_spec) if families and not self.args.max_episode_steps else None
        for i in np.flatnonzero(self.alive):
            returns, success = result.returns[i], result.successes[i]
            if not np.isfinite(returns).all():
                say(f"{self.members.label(i)}: some returns are not finite, nor is their mean", sys.stderr)
            row = {"phase": self.phase, "step": self.done[self.phase]} | self.members.who(i)
            score = families.normalized_score(domain, returns, success) if domain else None
            for name, x in (("return", returns), ("score", score)):
                row |= {f"{name}_{of}": None if x is None else float(getattr(x, of)()) for of in ("mean", "std")}
            reported = {"success_mean": float(success.mean())} if np.isfinite(success).all() else {}
            rows.append(row | {"episodes": len(success)} | reported)
        if self.keep_best:
            self.keep_best.keep(self, rows)
        self.evaluations += rows
        self._write("evaluations.csv", rows)
        name = "return" if rows[0]["score_mean"] is None else "score"
        self.note = f", {name} {np.mean([row[f'{name}_mean'] for row in rows]):.1f}"
        if self.args.quiet or not sys.stderr.isatty():
            say(f"{self.phase} {self.done[self.phase]}{self.note}", sys.stdout)

    def _write(self, table: str, rows: list[dict[str, Any]]) -> None:
        append_rows(self.path / table, rows)
        if self.tracker:
            self.tracker.log(table, rows, sum(self.done.values()), self.rate(self.phase))

    def finish(self, result: Returns | None) -> None:
        """The last evaluation, returns.csv, final.json, curves.png, a table; `result`: None if all members diverged."""
        last, members, names = {}, [], ("return_mean", "return_std", "score_mean", "score_std", "episodes")
        if self.alive.any():
            self.record_evaluation(result)
            for i in np.flatnonzero(self.alive):
                who, returns = self.members.who(i), enumerate(result.returns[i].tolist())
                append_rows(self.path / "returns.csv", [who | {"episode": e, "return": x} for e, x in returns])
            last = {row["member"]: row for row in self.evaluations[-int(self.alive.sum()) :]}
        for i, index in enumerate(self.members.indices):
            entry = self.members.who(i) | {"swept": self.members.swept[i], "diverged": self.diverged.get(i)}
            members.append(entry | {name: last.get(index, {}).get(name) for name in names})
        final = {"members": members} | (found.summarise(members) if (found := optional("benchmarks.intervals")) else {})
        final |= {"pretraining_updates": self.done["pretraining"]}
        final |= {"updates": self.done["offline"], "updates_per_second": self.rate("offline")}
        final |= {"online_steps": self.done["online"], "online_steps_per_second": self.rate("online")}
        write_json(self.path / "final.json", final | {"wall_clock_seconds": time.time() - self.started})
        if self.tracker:
            self.tracker.finish(final, 0 if last else 3)
        try:  # everything is written: neither a picture nor a terminal can fail the run
            reports = optional("benchmarks.report")
            reports.of_run(self.path) if reports else print(f"results in {self.path}", flush=True)
        except Exception as error:
            say(f"no curves.png or table: {one_line(error)}", sys.stderr)
