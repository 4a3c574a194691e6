"""Train an algorithm on several datasets at once: one population on one accelerator, a run directory for each dataset.

    python benchmarks/at_once.py --name mine --algorithms iql --num-seeds 5 --num-updates 100000 \\
        --datasets offax/hopper/medium-v1 offax/hopper/mixed-v1 --variants "" "slow:--polyak 0.001"

A small population leaves most of a GPU idle, and its updates take nearly as long as those of a large one. So all seeds
on all datasets, which must have the same shapes and numbers of rows, are the members of one population here: the
algorithm's own `init` and `train`, vmapped. Several `--variants`, "label:flags", train side by side too, where their
flags are hyperparameters or the data's transforms, which are numbers to a compiled program.

At shares `--evaluate-at` of the updates the states are handed to one process for each dataset, on the CPU. It fills
the run directory as the algorithm's own script would, and evaluates meanwhile: a checkpoint, which that script can go
on with, config.json, evaluations.csv, returns.csv and final.json; without metrics.csv. Names, folders and flags are
those of benchmarks/suite.py. There is no resuming: what was cut off starts anew, and replaces a run of that name.
The results have the evaluations as they come, and benchmarks/report.py takes a run that was cut off as far as they go.

Where episodes are slow, `--parts N` evaluates each run by N processes, each some of its seeds, as `--shard` would: they
fill `part-I` of the run directory, which are merged as they finish.
"""

import fcntl
import multiprocessing.connection
import os
import shlex
import shutil
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from algorithms import awr, emaq
from benchmarks import merge, suite
from benchmarks.suite import Job
from common.cli import Count, RunArgs, UsageError, check_ranges, exit_status, parse, parse_grid, read_flags
from common.data import load
from common.environments import Evaluator, Returns, make_environment
from common.members import Members, is_key, keep_finite, make_members, usable_cores
from common.replay import Recorded, Replay, fit_transform
from common.report import fill_tree, read_json, read_tree, save_tree, write_json
from common.runs import Run

TRANSFORMS = ("normalize_observations", "normalize_returns", "reward_scale", "reward_shift")
"""Flags that change the arrays and not the program."""
ON_ONE_CORE = {"JAX_PLATFORMS": "cpu", "NPROC": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""The environment of the processes that evaluate."""


@dataclass(frozen=True)
class Args(suite.Args):
    """Train an algorithm on several datasets at once."""

    algorithms: tuple[str, ...] = ("iql",)  # One after the other.
    variants: tuple[str, ...] = ("",)  # Each is "label:flags"; all train side by side.
    # Shares of the updates after which the policies are evaluated, as after all of them.
    evaluate_at: tuple[float, ...] = (0.1, 0.25, 0.4, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)
    evaluators: int | None = None  # Processes that evaluate at the same time. Default: the usable cores but one.
    parts: Count = 1  # Processes that evaluate a run, each an equal share of its members.


def snapshot(args: RunArgs, step: int) -> Path:
    """Where the states after `step` updates are handed over: in the run directory, or the part's in it."""
    part = f"part-{args.shard.partition('/')[0]}" if args.shard else ""
    return Path(args.run_dir, part, "handed", f"{step}.npz")


# The evaluating process


def follow(job: Job, algorithm: str, steps: list[int], command: str, turns: Any) -> None:
    """Fill the run directory of one dataset, or a part: evaluate the states after each of `steps` as they come."""
    trainer = multiprocessing.parent_process()
    if trainer:  # training comes first
        os.nice(10)
    started = time.time()
    script = suite.script_of(algorithm)
    args = parse(script.Args, script.PRESETS, list(job.flags))
    members = make_members(args)
    dataset = load(args.dataset, args.env)
    transform = fit_transform(dataset.transitions, args)
    obs_dim, action_dim = len(transform.observation_mean), len(dataset.low)
    init = partial(script.init, args=args, obs_dim=obs_dim, action_dim=action_dim)
    one = jax.eval_shape(init, jax.random.key(0), args.hp)
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct((members.count, *x.shape), x.dtype), one)
    act_all = members.map(partial(script.act, args=args, action_dim=action_dim, sample=False), batched=True)
    evaluator = Evaluator(partial(make_environment, dataset.env_spec, args.max_episode_steps), members, transform)

    with Run(algorithm, args, members) as run:
        run.restore({}, dataset, transform)  # nothing to go on with

        def evaluate(state: Any, episodes: int) -> Returns | None:
            return evaluator.run(partial(act_all, state, members.hp), episodes, run.steps(), run.stopping, run.alive)

        if not args.shard:
            write_json(run.path / "command.json", {"command": command})
        for step in steps:
            file = snapshot(args, step)
            while not file.exists():
                if run.stopping() or (trainer and not trainer.is_alive()):
                    sys.exit(1)  # it failed or was killed, with what it had to hand over
                time.sleep(0.1)
            with turns:
                arrays, about = read_tree(file)
                state = members.shard(fill_tree(file, arrays, {"state": wanted})["state"])
                write_json(run.path / "config.json", read_json(run.path / "config.json") | {"device": about["device"]})
                run.done = {phase: about["done"].get(phase, 0) for phase in run.done}
                for i in np.flatnonzero(np.array(about["diverged"]) & (run.alive[: members.count] > 0)):
                    run.diverged[int(i)], run.alive[i] = {"step": about["before"], "metric": "a parameter"}, 0
                living = run.alive.any()
                if step == steps[-1]:
                    run.save({"state": state})
                    run.finish(evaluate(state, args.final_eval_episodes) if living else None)
                elif living:
                    run.record_evaluation(evaluate(state, args.eval_episodes))
                    if not args.shard:
                        job.keep()  # what there is, should the rest be cut off
                file.unlink()
    file.parent.rmdir()
    if args.shard:
        with merge.merging(job.run_dir):
            if merge.merge(job.run_dir):  # others are not done
                return
    diverged = all(member["diverged"] for member in read_json(job.run_dir / "final.json")["members"])
    record = {"command": command, "exit_status": suite.DIVERGED if diverged else 0, "seconds": time.time() - started}
    write_json(job.run_dir / "command.json", record)
    job.keep()


# The training process


def same_program(settings: list[RunArgs]) -> None:
    """UsageError unless all of the settings compile to the same program."""
    plain = {name: getattr(settings[0], name) for name in (*TRANSFORMS, "dataset", "run_dir", "shard", "hp", "preset")}
    for one in settings[1:]:
        theirs, ours = replace(one, **plain), settings[0]
        if odd := [name for name, value in vars(theirs).items() if value != getattr(ours, name)]:
            flag = odd[0].replace("_", "-")
            raise UsageError(f"--variants, or the datasets' presets: --{flag} makes another program; train it apart")


def stack(parts: list[Recorded]) -> Recorded:
    """Datasets of the same shapes as one, `[datasets, ...]`; UsageError for other shapes.

    They may have different numbers of states, of which the last is repeated: no row has the copies.
    """
    sizes = {(part.actions.shape, part.states.shape[1]) for part in parts}
    if len(sizes) > 1:
        raise UsageError(f"the datasets have different numbers of rows, actions or observations: {sorted(sizes)}")
    most = max(len(part.states) for part in parts)
    parts = [
        part._replace(states=np.pad(part.states, ((0, most - len(part.states)), (0, 0)), mode="edge")) for part in parts
    ]
    return jax.tree.map(lambda *x: np.stack(x), *parts)


def without_padding(members: Members, tree: Any) -> Any:
    """`[count, ...]` of a tree of `[padded, ...]` arrays: all are trained on one device."""
    return jax.tree.map(lambda x: x[: members.count], tree)


class Population:
    """The members of all jobs, `[jobs, seeds, ...]`, and their training up to a number of updates."""

    def __init__(self, algorithm: str, settings: list[RunArgs]) -> None:
        self.script, self.args, self.settings = suite.script_of(algorithm), settings[0], settings
        self.members, transitions = [make_members(one) for one in settings], []
        read = cache(load)  # variants share it
        for args in settings:
            dataset = read(args.dataset, args.env)
            transitions.append(fit_transform(dataset.transitions, args).transitions(dataset.transitions))
        data = stack(transitions)
        init = partial(self.script.init, obs_dim=data.states.shape[2], action_dim=data.actions.shape[2], args=self.args)
        states = [without_padding(members, members.start(init)) for members in self.members]
        self.device = jax.local_devices()[0]
        self.data = jax.device_put(data, self.device)
        hp = jax.tree.map(lambda *x: np.stack(x), *(without_padding(members, members.hp) for members in self.members))
        self.hp, self.state = jax.device_put((hp, jax.tree.map(lambda *x: jnp.stack(x), *states)), self.device)
        self.rows, self.pool, self.drawn = self.data.rewards.shape[1], None, -1
        self.diverged = np.zeros((len(settings), self.members[0].count), bool)
        self.done = {"pretraining": 0, "offline": 0}
        self.train = self.compiled(self.script.train)
        if self.script is emaq:
            self.fit, self.draw = self.compiled(emaq.train_behavior), self.compiled(emaq.draw_pool, each=0)
        self.keep_finite = jax.jit(jax.vmap(jax.vmap(keep_finite)))

    def compiled(self, function: Any, each: int | None = None) -> Any:
        """`function(state, hp, replay, x, args)` over all members; the replay is of the job's dataset.

        x is shared, such as a number of updates, or with an axis of 0 each member's own.
        """

        def one(state: Any, hp: Any, offline: Recorded, pool: Any, x: Any) -> Any:
            extra = None if pool is None else pool[None]
            return function(state, hp, Replay(offline, None, jnp.int32(0), extra), x, args=self.args)

        seeds = jax.vmap(one, in_axes=(0, 0, None, 0, each))
        return jax.jit(jax.vmap(seeds, in_axes=(0, 0, 0, 0, each)))

    def step(self, train: Any, phase: str, count: int) -> None:
        """`count` updates; members that are not finite after it stay as they were, and count as diverged."""
        new, metrics = train(self.state, self.hp, self.data, self.pool, jnp.int32(count))
        self.state, finite = self.keep_finite(new, self.state, metrics)
        self.diverged |= ~np.asarray(finite)
        self.done[phase] += count

    def advance(self, updates: int) -> None:
        """Train until there were `updates` updates in all."""
        most = 1000  # a signal is heard between two calls
        while self.script is emaq and (left := self.args.behavior_updates - self.done["pretraining"]) > 0:
            self.step(self.fit, "pretraining", min(left, most))
        while (done := self.done["offline"]) < updates:
            every = self.args.policy_updates if self.script is awr else most
            if self.script is emaq and self.args.draws_ahead:
                every = -(-self.args.pool_uses * self.rows // self.args.batch_size)
                if self.drawn != done // every:  # its memory first
                    self.pool, self.drawn = None, done // every
                    keys = jnp.stack([without_padding(members, members.keys(1)) for members in self.members])
                    keys = jax.device_put(keys, self.device)
                    keys = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (0, None))(keys, self.drawn)
                    self.pool = self.draw(self.state, self.hp, self.data, None, keys)
            stretch = min(updates - done, every - done % every)
            self.step(self.train, "offline", stretch if self.script is awr else min(stretch, most))

    def hand_over(self, before: int) -> None:
        """Write the members of each job for the process that evaluates them."""
        state = jax.device_get(jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, self.state))
        device = {"platform": self.device.platform, "kind": self.device.device_kind, "count": 1}
        for i, settings in enumerate(self.settings):
            about = {"device": device, "done": self.done, "before": before, "diverged": self.diverged[i].tolist()}
            tree = {"state": jax.tree.map(lambda x: x[i], state)}  # noqa: B023
            save_tree(snapshot(settings, self.done["offline"]), tree, about)


def plan(algorithm: str, args: Args) -> tuple[list[Job], list[RunArgs], list[int]]:
    """The jobs of one algorithm, all variants of each dataset, their settings, and when they are evaluated.

    A run in parts is as many jobs.
    """
    jobs: list[Job] = []
    for variant in args.variants:
        label, _, flags = variant.partition(":")
        one = replace(args, algorithms=(algorithm,), label=label or args.label, extra=f"{args.extra} {flags}")
        jobs += suite.plan(one)
    if not jobs:
        raise UsageError("--variants: at least one, '' for the plain one")
    suite.refuse_repeated(jobs)
    check_ranges(args)
    if not all(0 < share <= 1 for share in args.evaluate_at):
        raise UsageError("--evaluate-at: shares of the updates, above 0 and at most 1")
    if args.parts > 1:
        shards = [f"{i}/{args.parts}" for i in range(args.parts)]
        jobs = [replace(job, flags=(*job.flags, "--shard", shard)) for job in jobs for shard in shards]
    script = suite.script_of(algorithm)
    if not hasattr(script, "train"):
        raise UsageError(f"--algorithms {algorithm}: it trains no population, run its own script")
    settings = [parse(script.Args, script.PRESETS, list(job.flags)) for job in jobs]
    for one in settings:
        for flag in ("online_steps", "keep_best", "behavior_checkpoint"):
            if getattr(one, flag, None):
                raise UsageError(f"--{flag.replace('_', '-')} is for the algorithm's own script alone")
        if len(parse_grid(one.grid, one.hp._fields)) * one.num_seeds % args.parts:
            raise UsageError(f"--parts {args.parts}: must divide the members of a run equally")
    same_program(settings)
    unit = settings[0].policy_updates if script is awr else 1
    steps = sorted({max(1, round(share * args.num_updates / unit)) * unit for share in (*args.evaluate_at, 1.0)})
    if steps[-1] != args.num_updates:
        raise UsageError(f"--num-updates {args.num_updates}: must be a multiple of {unit} for {algorithm}")
    return jobs, settings, steps


def refuse_busy(run_dir: Path) -> None:
    """UsageError if a process is writing to the directory."""
    with suppress(FileNotFoundError), open(run_dir / ".lock") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another process is writing to {run_dir}; use another --name or --label") from None


def train(algorithm: str, args: Args) -> list[str]:
    """Train all jobs of one algorithm, and wait for their evaluations; the names of those that failed."""
    jobs, settings, steps = plan(algorithm, args)
    population = Population(algorithm, settings)  # first: it may refuse, and what there was stays
    for job in jobs:
        for path in (job.run_dir, *job.run_dir.glob("part-*")):
            refuse_busy(path)
    for job in jobs:
        shutil.rmtree(job.run_dir, ignore_errors=True)
    command = shlex.join(["python", "benchmarks/at_once.py", *sys.argv[1:]])
    context = multiprocessing.get_context("spawn")
    turns = context.Semaphore(args.evaluators or max(1, usable_cores() - 1))
    workers = [
        context.Process(target=follow, args=(job, algorithm, steps, command, turns), daemon=True) for job in jobs
    ]
    with mock.patch.dict(os.environ, ON_ONE_CORE):  # which they inherit
        for worker in workers:
            worker.start()
    began = time.time()
    for last, step in zip([0, *steps], steps, strict=False):
        population.advance(step)
        population.hand_over(last)
        print(f"{algorithm} {step}: {time.time() - began:.0f} s", flush=True)
    left = list(workers)
    while left:
        multiprocessing.connection.wait([worker.sentinel for worker in left])
        for worker in [worker for worker in left if worker.exitcode is not None]:
            left.remove(worker)
            if worker.exitcode < 0:  # killed, perhaps in its turn, which it has not given back
                turns.release()
    return sorted({job.name for job, worker in zip(jobs, workers, strict=True) if worker.exitcode})


def main(args: Args) -> int:
    """Each algorithm in turn; the exit status."""
    if failures := [name for algorithm in args.algorithms for name in train(algorithm, args)]:
        print(f"{len(failures)} runs failed: {', '.join(failures)}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    with exit_status():
        sys.exit(main(read_flags(Args)))
