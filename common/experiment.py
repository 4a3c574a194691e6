"""The life of a run: run directory, the loop's bookkeeping, resuming, signals, the report.

An algorithm file hands its `init`, `train` and `act` to `Run` and keeps the loop itself in its `main`.
"""

import dataclasses
import itertools
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from common import buffers, checkpoints, datasets, populations, processes, reporting, transforms
from common.buffers import Replay, Transitions
from common.errors import UsageError
from common.flags import RunArgs, preset_name
from common.logging import Table, Tracker, write_json
from common.provenance import provenance

LOG_EVERY = 1000
"""Updates (online: environment steps) for each row of metrics.csv, and between looks at divergence."""
SIGNAL_EVERY = 100
"""Updates between looks at signals: a second for a fast algorithm, and not minutes for a slow one. Several processes
look together, also of the online phase's steps at every so many only."""
EPISODE_BLOCK = 1024
"""Collected episodes are written in blocks of a multiple of this, so that few sizes are compiled."""


# Flags that may differ between the run that wrote a checkpoint and the one that resumes it: the lengths of the phases
# until the online phase has begun, and whatever does not touch the training's course.
PHASE_LENGTHS = {"num_updates", "online_steps"}
FREE_TO_CHANGE = PHASE_LENGTHS | {"eval_every", "eval_episodes", "final_eval_episodes"}
FREE_TO_CHANGE |= {"checkpoint_every", "run_dir", "resume", "quiet", "preset"}
FREE_TO_CHANGE |= {"distributed", "track", "wandb_project", "wandb_group", "wandb_entity"}


def use_compilation_cache() -> None:
    """Keep compiled programs in the user's cache directory, so that the next start skips compiling."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(home / "offax" / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def _unused(path: Path) -> Path:
    """`path`, or with -1, -2, ... after it: created, so that no other run started in this second takes it."""
    for suffix in itertools.count():
        candidate = path.with_name(f"{path.name}-{suffix}") if suffix else path
        try:
            candidate.mkdir(parents=True)
            return candidate
        except FileExistsError:
            continue
    raise AssertionError


def _places(members: Any) -> jax.Array:
    """Each member's index on its device."""
    return jnp.arange(len(jax.tree.leaves(members)[0]))


class Interrupted(Exception):
    """A signal arrived; raised where the state is whole."""


class Run:
    """One run: data, population, environments, run directory. Use it as a context manager around the loop.

    `init(key, hp, obs_dim=, action_dim=) -> state`, `train(state, hp, data, num_updates) -> (state, Metrics)` and
    `act(state, hp, observations, key, action_dim=, sample=) -> actions` are functions of one member.

    Of several processes each runs this same code for its `own` members, and all meet wherever results of all members
    are needed; what they decide there is the same, and process 0 alone writes and prints.

    `updates_per_call` is the most updates that `train` is asked for at once; signals wait for it to end. Online, each
    member has `num_environments` and a ring of `ring_capacity` transitions (default: the whole online phase).

    `pretrain`, a function like `train`, does the updates of a phase before the offline one, with metrics of its own.
    `precompute(state, hp, offline, key)` is an array of the dataset's rows that the offline phase reads as
    `Replay.precomputed`: it is computed at its start, and again whenever minibatches have used a row
    `precomputed_uses` times on average.
    """

    def __init__(
        self,
        name: str,
        args: RunArgs,
        init: Callable,
        train: Callable,
        act: Callable,
        updates_per_call: int = SIGNAL_EVERY,
        num_environments: int = 1,
        ring_capacity: int | None = None,
        pretrain: Callable | None = None,
        precompute: Callable | None = None,
        precomputed_uses: int = 1,
    ) -> None:
        self.name, self.args = name, args
        self.updates_per_call, self.num_environments = updates_per_call, num_environments
        self.ring_capacity = args.online_steps if ring_capacity is None else ring_capacity
        self.started = time.time()
        self.members = populations.make_members(args.hp, args.grid, args.seed, args.num_seeds)
        self.processes = processes.join() if args.distributed else processes.Processes()
        if self.processes.count > len(self.members):
            raise UsageError(
                f"--distributed: {self.processes.count} processes for {len(self.members)} members; "
                f"start at most {len(self.members)}, or add --num-seeds"
            )
        self.own = self.processes.share(self.members)
        slug = re.sub(r"[^\w./-]", "_", args.dataset).strip("./")
        stamp = time.strftime("%Y%m%d-%H%M%S")
        self.directory = Path(args.run_dir or Path("runs", name, slug, stamp))
        self.label = f"{name} {slug} {stamp}"
        self._check_directory()
        use_compilation_cache()
        populations.use_cpu_cores(len(self.own))

        from common.evaluation import Evaluator, make_environment  # slow to import, and --help must be quick

        self.population = populations.Population(len(self.own))  # JAX starts here, in all processes together
        with self.processes.first_alone():  # it may have to collect or download the dataset
            self.dataset = datasets.load(args.dataset, args.env)
        spec = args.env or self.dataset.env_spec
        if spec is None:
            raise UsageError(f"{args.dataset} does not name its environment; pass --env ID")
        self.spec = spec
        raw = self.dataset.transitions
        self.obs_dim, self.action_dim = raw.observations.shape[1], raw.actions.shape[1]
        env = make_environment(spec)
        shapes = (*env.observation_space.shape, *env.action_space.shape)
        env.close()
        if shapes != (self.obs_dim, self.action_dim):
            raise UsageError(
                f"environment {getattr(spec, 'id', spec)} has {shapes[0]} observations and {shapes[1]} actions, "
                f"the dataset has {self.obs_dim} and {self.action_dim}; pass the matching --env"
            )
        self.transform = transforms.fit(
            raw, args.normalize_observations, args.normalize_returns, args.reward_scale, args.reward_shift
        )
        self.dataset_returns = datasets.episode_returns(raw)
        self._fingerprint = datasets.digest(raw)
        self._score = partial(datasets.normalized_score, self.dataset.domain)

        offline = jax.tree.map(jnp.asarray, self.transform.transitions(raw))
        self.offline_data: Transitions = self.population.replicate(offline)
        self.evaluator = Evaluator(spec, len(self.members), self.transform)
        self._init = partial(init, obs_dim=self.obs_dim, action_dim=self.action_dim)
        self._compile(train, partial(act, action_dim=self.action_dim), pretrain, precompute)
        self._precompute_every = -(-precomputed_uses * len(raw.rewards) // args.batch_size)
        self._precomputed, self._precomputed_at = None, -1
        self._fit()
        self.hp = self.population.shard(
            jax.tree.map(lambda *values: jnp.array(values, jnp.float32), *(member.hp for member in self.own))
        )

        self.tracker = Tracker(args.track, args.wandb_project, args.wandb_group or self.label, args.wandb_entity)
        self.tracker.enabled &= self.processes.first
        self.pretraining_done = self.updates_done = self.online_done = 0
        self.diverged: dict[int, dict[str, Any]] = {}
        self.ring: buffers.Ring | None = None
        self._timing: dict[str, np.ndarray] = {}
        self._received = self._signal = 0
        self._state: Any = None
        self._phase = "offline"
        self._actions: Any = None
        self._collector: Any = None
        self._episodes: Any = None
        self._progress: Progress | None = None

    def _compile(self, train: Callable, act: Callable, pretrain: Callable | None, precompute: Callable | None) -> None:
        """The functions of one member, mapped over the population."""

        def train_all(train: Callable, _: Any, members: Any, shared: Any, each: populations.Each) -> Any:
            state, hp, ring, precomputed = members
            offline, num_updates = shared

            def one(member: Any) -> Any:
                state, hp, place = member
                return train(state, hp, Replay(offline, ring, place, precomputed), num_updates)

            return each(one, (state, hp, _places(hp)))

        def precompute_all(_: Any, members: Any, shared: Any, each: populations.Each) -> Any:
            offline, count = shared

            def one(member: Any) -> Any:
                state, hp, key = member
                return precompute(state, hp, offline, jax.random.fold_in(key, count))

            return each(one, members)

        def collect_and_train_all(consumed: Any, members: Any, shared: Any, each: populations.Each) -> Any:
            state, ring = consumed
            hp, transitions, observations, keys = members
            offline, step, one_update = shared
            ring = jax.vmap(buffers.insert)(ring, transitions)

            def one(member: Any) -> Any:
                state, hp, observations, key, place = member
                state, metrics = train(state, hp, Replay(offline, ring, place), one_update)
                key = jax.random.fold_in(key, step)
                return state, act(state, hp, observations, key, sample=True), metrics

            state, actions, metrics = each(one, (state, hp, observations, keys, _places(hp)))
            return (state, ring), actions, metrics

        def sampled_actions(_: Any, members: Any, step: jax.Array, each: populations.Each) -> Any:
            def one(member: Any) -> jax.Array:
                state, hp, observations, key = member
                return act(state, hp, observations, jax.random.fold_in(key, step), sample=True)

            return each(one, members)

        def insert_all(ring: Any, members: Any, _: Any, each: populations.Each) -> Any:
            return jax.vmap(buffers.insert)(ring, *members)

        def evaluation_actions(
            state: Any, hp: Any, observations: jax.Array, key: jax.Array, seeds: jax.Array
        ) -> jax.Array:
            keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, seeds)
            return jax.vmap(partial(act, sample=False))(state, hp, observations, keys)

        self._train = self.population.compile(partial(train_all, train))
        self._pretrain = self.population.compile(partial(train_all, pretrain)) if pretrain else None
        self._precompute_one = precompute
        self._precompute = self.population.compile(precompute_all) if precompute else None
        self._collect_and_train = self.population.compile(collect_and_train_all)
        self._sampled_actions = self.population.compile(sampled_actions)
        self._insert = self.population.compile(insert_all)
        self._finite = self.population.compile(lambda _, state, __, each: each(populations.all_finite, state))
        self._act = jax.jit(evaluation_actions)

    def _fit(self) -> None:
        """Divide a population that is too large for the devices; before any of its arrays is made."""
        hp = jax.tree.map(lambda _: jax.ShapeDtypeStruct((), jnp.float32), self.args.hp)
        state = jax.eval_shape(self._init, jax.random.key(0), hp)
        ring = jax.eval_shape(self._empty_ring) if self.args.online_steps else None
        ahead = None
        if self._precompute is not None:
            ahead = jax.eval_shape(self._precompute_one, state, hp, self.offline_data, jax.random.key(0))
            if not self.processes.gather(np.array([self.population.has_room(ahead)])).all():
                if self.processes.first:
                    print(
                        f"what is computed ahead of the updates, {populations.size(ahead)} for each of "
                        f"{len(self.members)} members, would take more than half of the memory: each update computes "
                        "its own part, which is slower",
                        file=sys.stderr,
                    )
                ahead = self._precompute = None
        self.population.fit(
            self._train, (state, hp, None, ahead), (state, ring), (self.offline_data, jnp.asarray(1, jnp.int32))
        )

    def _empty_ring(self) -> buffers.Ring:
        return buffers.empty_ring(self.ring_capacity, self.obs_dim, self.action_dim)

    # ---- the loop, as an algorithm's main sees it ----

    def __enter__(self) -> Self:
        """Take over SIGINT and SIGTERM: from here on they end the run at a whole state."""
        self._handlers = {n: signal.signal(n, self._on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        """Checkpoint after a signal, first of all; then close environments and trackers."""
        stopped = kind is Interrupted
        if stopped:
            self._save()
        if self._progress is not None:
            self._progress.stop()
        self.evaluator.close()
        if self._collector is not None:
            self._collector.close()
        if kind is not None:
            self.tracker.finish([{} for _ in self.members], {}, 128 + self._signal if stopped else 1)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if stopped:
            if self.processes.first:
                again = f"--run-dir {self.directory} --resume True"
                print(f"stopped; continue with the same flags, {again}", file=sys.stderr)
            sys.exit(128 + self._signal)

    def borrow(self, path: str, *names: str) -> dict[str, Any]:
        """Parts of the states in the checkpoint of another run on this dataset, for `begin`; by its directory.

        Members take those of their seed (of the first combination, if that run had a grid), and those with other seeds
        in turn. A resumed run has its own: nothing. UsageError for a run that is unfinished, diverged, online or on
        other data, or has networks of other sizes.
        """
        if self.checkpoint_path.exists():
            return {}
        if not Path(path).is_dir():
            raise UsageError(f"{path} is not the directory of a run")
        file = Path(path) / "checkpoint" / "state.npz"
        metadata = checkpoints.metadata(file)
        try:
            theirs, seeds = metadata["identity"], metadata["seeds"]
            data = (theirs["dataset"].rpartition(" ")[2], theirs["normalize_observations"])
            places = [seeds.index(m.seed) if m.seed in seeds else m.seed % len(seeds) for m in self.own]
            unfinished, online = not metadata["updates_done"], bool(metadata["online_done"])
            diverged = [seeds[place] for place in places if str(place) in metadata["diverged"]]
        except (KeyError, TypeError, AttributeError):
            raise UsageError(f"checkpoint {file} is damaged or was edited (its metadata)") from None
        if data != (self._fingerprint, self.args.normalize_observations):
            raise UsageError(f"{path} is of a run on another dataset or with another --normalize-observations")
        if unfinished or online:
            raise UsageError(f"{path}: its checkpoint is of the {'online' if online else 'pretraining'} phase")
        if diverged:
            raise UsageError(f"{path}: its member with seed {diverged[0]} diverged")
        state = jax.eval_shape(self._init, jax.random.key(0), self.args.hp)
        parts = {}
        for name in names:
            part = checkpoints.load_members(file, name, getattr(state, name), len(seeds))
            parts[name] = jax.tree.map(lambda x: x[np.array(places)], part)
        return parts

    def begin(self, borrowed: dict[str, Any] | None = None) -> Any:
        """The members' first states, with parts of other ones, or those of the checkpoint; opens the run directory."""
        if not self.args.run_dir and self.processes.first:
            self.directory = _unused(self.directory)
        self.metrics = Table(self.directory / "metrics.csv", write=self.processes.first)
        self.pretraining_metrics = Table(self.directory / "pretraining.csv", write=self.processes.first)
        self.evaluations = Table(self.directory / "evaluations.csv", write=self.processes.first)
        # One by one, so that a member's start is the same to the last bit whatever the population.
        initialise = jax.jit(self._init)
        states = [initialise(jax.random.key(member.seed), member.hp) for member in self.own]
        states = [populations.on_host(jax.tree.map(lambda x: x[None], state)) for state in states]
        self._state = self.population.shard(populations.concatenate(states)._replace(**borrowed or {}))
        if self.args.online_steps:
            ring = populations.on_host(self._empty_ring())
            self.ring = self.population.shard(
                jax.tree.map(lambda x: np.broadcast_to(x, (len(self.own), *x.shape)), ring)
            )
        resumes = self.checkpoint_path.exists()
        if resumes:
            self._restore()
        found = self.processes.gather(np.array([[self.pretraining_done, self.updates_done, self.online_done]]))
        if (found != found[0]).any():
            raise UsageError(f"the processes find different checkpoints in {self.directory}; they must share it")
        if not resumes:
            # What a run killed before its first checkpoint left.
            for table in (self.pretraining_metrics, self.metrics, self.evaluations):
                table.clear()
        devices = int(self.processes.gather(np.array([self.population.mesh.size])).sum())
        if self.processes.first:
            self.directory.mkdir(parents=True, exist_ok=True)
            write_json(self.directory / "config.json", self._config(devices))
        done = {"offline": self.updates_done, "online": self.online_done}
        self.pretraining_metrics.rewind(lambda row: int(row["step"]) <= self.pretraining_done)
        self.metrics.rewind(lambda row: int(row["step"]) <= self.updates_done + self.online_done)
        self.evaluations.rewind(lambda row: row["phase"] in done and int(row["step"]) <= done[row["phase"]])
        configs = [self._flags() | dict(member.hp._asdict()) | {"seed": member.seed} for member in self.members]
        names = [f"{self.name} {self.args.dataset} {member}" for member in self.members]
        self.tracker.start(configs, names, self.directory)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            disable=self.args.quiet or not sys.stderr.isatty() or not self.processes.first,
            console=reporting.Console(stderr=True),
        )
        self._progress.start()
        return self._state

    def pretraining(self, num_updates: int) -> Iterator[int]:
        """Update counts of the chunks of the phase before the offline one; there are no evaluations in it."""
        self._phase = "pretraining"
        yield from self._chunks("pretraining", lambda: self.pretraining_done, num_updates)

    def offline(self, length: int | None = None) -> Iterator[int]:
        """Update counts of the offline phase's chunks; before each, evaluates and checkpoints where due.

        With a `length` the chunks are that long, and evaluations and checkpoints come after the chunk that reaches
        them; without, chunks end where they are due.
        """
        self._phase = "offline"
        yield from self._chunks("offline", lambda: self.updates_done, self.args.num_updates, length)

    def online(self, length: int | None = None) -> Iterator[int]:
        """Environment-step counts of the online phase's chunks, likewise."""
        if not self.args.online_steps:
            return
        from common.collection import Collector, Episodes

        self._phase, self._precomputed, self._precomputed_at = "online", None, -1
        seeds = []
        for member in self.own:
            start = np.random.SeedSequence([member.seed, self.online_done])
            seeds += [int(word) for word in start.generate_state(self.num_environments)]
        self._collector, self._episodes = Collector(self.spec, self.transform, seeds), Episodes(len(seeds))
        self._collection_keys = self._keys(0)
        yield from self._chunks("online", lambda: self.online_done, self.args.online_steps, length)

    def train(self, state: Any, num_updates: int) -> tuple[Any, populations.Metrics]:
        """`num_updates` updates of every member on the data that the phase has; fewer where a signal comes."""
        done, parts = 0, []
        online, pretraining = self._phase == "online", self._phase == "pretraining"
        data = None if online and not self.args.num_updates else self.offline_data
        ring = self.ring if online else None
        program = self._pretrain if pretraining else self._train
        assert program is not None
        while done < num_updates and not (done and self._stopping()):
            piece = min(self.updates_per_call, num_updates - done)
            ahead = self._ahead(state) if self._phase == "offline" else None
            if ahead is not None:  # at the same updates wherever chunks end
                piece = min(piece, self._precompute_every - self.updates_done % self._precompute_every)
            count = jnp.asarray(piece, jnp.int32)
            state, metrics = jax.block_until_ready(program((), (state, self.hp, ring, ahead), (data, count)))
            parts.append((piece, metrics))
            done += piece
            if pretraining:
                self.pretraining_done += piece
            elif not online:
                self.updates_done += piece
        return state, populations.join(parts)

    def _ahead(self, state: Any) -> Any:
        """What is computed ahead for the dataset's rows, anew after every so many updates."""
        if self._precompute is None:
            return None
        count = self.updates_done // self._precompute_every
        if count != self._precomputed_at:
            self._precomputed = None  # its memory first
            members = (state, self.hp, self._keys(1))
            shared = (self.offline_data, jnp.asarray(count, jnp.int32))
            self._precomputed = jax.block_until_ready(self._precompute((), members, shared))
            self._precomputed_at = count
        return self._precomputed

    def _keys(self, number: int) -> jax.Array:
        """A key for each member, by a fold that no `split` of the member's own key gives."""
        keys = [jax.random.fold_in(jax.random.key(member.seed), 2**31 + number) for member in self.own]
        return self.population.shard(jnp.stack(keys))

    def collect(self, state: Any, num_steps: int, whole_episodes: bool = True) -> int:
        """At least `num_steps` environment steps of every member, its environments taking turns; how many they were.

        With `whole_episodes` they enter the member's ring when their episode has ended, and the first call goes on
        until every member has one. A signal ends it early.
        """
        start, empty = self.online_done, self.population.to_host(self.ring.written) == 0

        def some_has_none() -> bool:
            waiting = empty & ~self._by_member(self._episodes.ended).any(axis=1)
            return bool(self.processes.gather(waiting).any())

        for steps in itertools.count(1):
            if self.online_done - start >= num_steps and not (whole_episodes and some_has_none()):
                break
            members = (state, self.hp, self._observations(), self._collection_keys)
            actions = self._sampled_actions((), members, jnp.asarray(self.online_done))
            self._episodes.add(self._step(actions))
            if self._stopping(steps):
                break
        self._insert_episodes(self._episodes.take(whole_episodes))
        self._collector.episodes.clear()
        if self._signal and self.processes.gather(self.population.to_host(self.ring.written) == 0).any():
            raise Interrupted  # a member has nothing to train on
        return self.online_done - start

    def collect_and_train(self, state: Any, num_steps: int) -> tuple[Any, populations.Metrics]:
        """`num_steps` environment steps of every member, each followed by one update on old and new data.

        Fewer where a signal comes.
        """
        parts = []
        offline = self.offline_data if self.args.num_updates else None
        state = self.population.copy(state)  # the steps below reuse its memory; the original is kept for freezing
        if self._actions is None:
            members = (state, self.hp, self._observations(), self._collection_keys)
            self._actions = self._sampled_actions((), members, jnp.asarray(self.online_done))
        for step in range(num_steps):
            transitions = jax.tree.map(self._by_member, self._step(self._actions))
            (state, self.ring), self._actions, metrics = self._collect_and_train(
                (state, self.ring),
                (self.hp, self.population.shard(transitions), self._observations(), self._collection_keys),
                # A count that XLA does not know: it compiles the update by itself, to the same bits however many
                # members a device has.
                (offline, jnp.asarray(self.online_done), jnp.asarray(1, jnp.int32)),
            )
            parts.append((1, metrics))
            if self._stopping(step + 1):
                break
        self._collector.episodes.clear()
        return state, populations.join(parts)

    def record(self, state: Any, metrics: populations.Metrics) -> Any:
        """Write the chunk's metrics; freeze members that diverged in it. The state to go on with."""
        own = (self._finite((), state, ()), tuple(metrics))
        finite, metrics = self.processes.gather(self.population.to_host(own))
        metrics = populations.Metrics(*metrics)
        step = self._step_of_phase
        alive = [member for member in self.members if member.index not in self.diverged]
        rows = []
        for member in alive:
            counts = {name: int(count[member.index]) for name, count in metrics.counts.items()}
            sums = {name: float(metrics.sums[name][member.index]) for name in counts}
            rows.append({name: sums[name] / count if count else None for name, count in counts.items()})
        table = self.pretraining_metrics if self._phase == "pretraining" else self.metrics
        table.append(
            [{"step": step, "member": m.index, "seed": m.seed} | row for m, row in zip(alive, rows, strict=True)]
        )
        by_member = {member.index: row for member, row in zip(alive, rows, strict=True)}
        self.tracker.log(self._steps_in_all, [by_member.get(member.index, {}) for member in self.members])
        for member in alive:
            first = {name: int(values[member.index]) for name, values in metrics.first_nonfinite.items()}
            at = {name: update for name, update in first.items() if update >= 0}
            if at or not finite[member.index]:
                name = min(at, key=at.__getitem__) if at else "a parameter"
                self._freeze(member, self._chunk_start + at[name] + 1 if at else step, name)
        self._set_active()
        if self.diverged:  # members that are not active keep the state they had
            state = self.population.select(self.population.active, state, self._state)
        self._state = state
        if len(self.diverged) == len(self.members):
            self._report({})
            if self.processes.first:
                print("error: every member diverged", file=sys.stderr)
            sys.exit(3)
        return state

    def finish(self, state: Any) -> None:
        """The last evaluation, final.json, the figures and the table."""
        self._state = state
        self._check_signal()
        phase, step = ("online", self.online_done) if self.args.online_steps else ("offline", self.updates_done)
        self.evaluations.rewind(lambda row: (row["phase"], int(row["step"])) != (phase, step))
        self._report(self._evaluate(phase, step, self.args.final_eval_episodes))

    # ---- what it is made of ----

    @property
    def _step_of_phase(self) -> int:
        """The step in the metrics' table of the phase: the offline and the online one share theirs."""
        return self.pretraining_done if self._phase == "pretraining" else self.updates_done + self.online_done

    @property
    def _steps_in_all(self) -> int:
        return self.pretraining_done + self.updates_done + self.online_done

    @property
    def checkpoint_path(self) -> Path:
        """Where this run's checkpoint is."""
        return self.directory / "checkpoint" / "state.npz"

    def _chunks(self, phase: str, done: Callable[[], int], total: int, length: int | None = None) -> Iterator[int]:
        assert self._progress is not None
        task = self._progress.add_task(f"{self.name} {phase}", total=total, completed=done(), note="")
        self._task = task
        every = [self.args.eval_every, self.args.checkpoint_every, LOG_EVERY]
        first = before = done()
        while True:
            step = done()
            reached = (
                self.args.checkpoint_every and step // self.args.checkpoint_every > before // self.args.checkpoint_every
            )
            if step > first and (step >= total or reached):
                self._save()
            self._check_signal()
            if step >= total:
                break
            if self.args.eval_every and phase != "pretraining":
                evaluated = [int(row["step"]) for row in self.evaluations.rows if row["phase"] == phase]
                wanted = step - step % self.args.eval_every
                if step == wanted or max(evaluated, default=-1) < wanted:
                    self._evaluate(phase, step, self.args.eval_episodes)
            self._chunk_start = self._step_of_phase
            before, start = step, time.time()
            yield min([total - step, *([length] if length else [n - step % n for n in every if n])])
            self._time(phase, done() - step, time.time() - start)
            self._progress.update(task, completed=done())

    def _step(self, actions: jax.Array) -> Transitions:
        """Apply the actions of every member; what happened in all environments, a member's side by side."""
        own = self.population.to_host(actions).reshape(-1, self.action_dim)
        # A member that diverged in this chunk stands still until the chunk's end, where it is frozen and named.
        transitions = self._collector.step(np.where(np.isfinite(own), own, 0.0))
        self.online_done += self.num_environments
        return transitions

    def _by_member(self, environments: np.ndarray) -> np.ndarray:
        """`[members * environments, ...]` as `[members, environments, ...]`."""
        return environments.reshape(len(self.own), self.num_environments, *environments.shape[1:])

    def _observations(self) -> jax.Array:
        return self.population.shard(self._by_member(self._collector.observations))

    def _insert_episodes(self, ended: list[Transitions | None]) -> None:
        """Write each environment's episodes into the ring of its member."""
        counts, rows = [], []
        for m in range(len(self.own)):
            own = [part for part in ended[m * self.num_environments :][: self.num_environments] if part]
            rows.append([np.concatenate(parts)[-self.ring_capacity :] for parts in zip(*own, strict=True)])
            counts.append(len(rows[-1][0]) if own else 0)
        if not any(counts):
            return
        block = min(-(-max(counts) // EPISODE_BLOCK) * EPISODE_BLOCK, self.ring_capacity)
        shapes = Transitions((self.obs_dim,), (self.action_dim,), (), (self.obs_dim,), (), ())
        padded = Transitions(*(np.zeros((len(rows), block, *shape), np.float32) for shape in shapes))
        for m, parts in enumerate(rows):
            for to, part in zip(padded, parts, strict=False):
                to[m, : counts[m]] = part
        members = self.population.shard((padded, np.array(counts, np.int32)))
        self.ring = self._insert(self.ring, members, ())

    def _evaluate(self, phase: str, step: int, episodes: int) -> dict[int, dict[str, Any]]:
        """Evaluate every living member, unless the table has the step already; rows by member."""
        at_step = [row for row in self.evaluations.rows if (row["phase"], int(row["step"])) == (phase, step)]
        if at_step and len(at_step) >= len(self.members) - len(self.diverged):
            return {}
        if at_step:  # a kill came between the rows of two members
            self.evaluations.rewind(lambda row: row not in at_step)
        returns_of, successes_of = self.processes.gather(self._evaluate_own(episodes))
        self._check_signal()
        rows = {}
        for member in self.members:
            if member.index in self.diverged:
                continue
            returns = returns_of[member.index]
            scores = self._score(returns)
            rows[member.index] = {
                "phase": phase,
                "step": step,
                "member": member.index,
                "seed": member.seed,
                "return_mean": float(returns.mean()),
                "return_std": float(returns.std()),
                "score_mean": None if scores is None else float(scores.mean()),
                "score_std": None if scores is None else float(scores.std()),
                "episodes": episodes,
            }
            if np.isfinite(successes_of[member.index]).all():  # the environment reports success
                rows[member.index]["success_mean"] = float(successes_of[member.index].mean())
        self.evaluations.append(list(rows.values()))
        names = ("return_mean", "score_mean", "success_mean")
        logged = [
            {f"evaluation/{name}": row[name] for name in names if name in row}
            for row in (rows.get(member.index, {}) for member in self.members)
        ]
        self.tracker.log(self._steps_in_all, logged)
        self._announce(phase, step, rows)
        return rows

    def _evaluate_own(self, episodes: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns and successes, `[own members, episodes]`; after a signal, which the others may not have had, of no
        meaning."""
        returns, successes = np.zeros((2, len(self.own), episodes))
        state, hp = self.population.to_host((self._state, self.hp))
        key = jax.random.fold_in(jax.random.key(0), self.updates_done + self.online_done)

        def interrupt() -> None:
            if self._received:
                raise Interrupted

        for rows in self.population.blocks:
            block = jax.device_put(jax.tree.map(lambda x: x[rows], (state, hp)), jax.local_devices()[0])  # noqa: B023
            own_seeds = jnp.array([member.seed for member in self.own[rows]])

            def policy(observations: np.ndarray, count: int) -> np.ndarray:
                # A frozen member's state is finite, so its actions are; its episodes are not reported.
                return np.asarray(self._act(*block, observations, jax.random.fold_in(key, count), own_seeds))  # noqa: B023

            seeds = [1_000_000 + 1000 * member.seed for member in self.own[rows]]
            try:
                returns[rows], _, successes[rows] = self.evaluator.run(policy, episodes, seeds, interrupt)
            except Interrupted:
                break
        return returns, successes

    def _announce(self, phase: str, step: int, rows: dict[int, dict[str, Any]]) -> None:
        assert self._progress is not None
        mean_return = np.mean([row["return_mean"] for row in rows.values()])
        scores = [row["score_mean"] for row in rows.values()]
        note = f"return {mean_return:.0f}" + ("" if None in scores else f", score {np.mean(scores):.1f}")
        self._progress.update(self._task, note=note)
        if self._progress.disable and self.processes.first:
            print(f"{phase} {step}: {note}", flush=True)

    def _freeze(self, member: populations.Member, step: int, metric: str) -> None:
        self.diverged[member.index] = {"step": step, "metric": metric}
        if self.processes.first:
            print(f"{member} diverged: {metric} is not finite at update {step}; it is frozen", file=sys.stderr)

    def _set_active(self) -> None:
        self.population.active[: len(self.own)] = [member.index not in self.diverged for member in self.own]

    def _time(self, phase: str, steps: int, seconds: float) -> None:
        """Count towards the phase's rate, but for its first chunk in this process, which compiles."""
        if phase in self._timing:
            self._timing[phase] += np.array([seconds, steps * (len(self.members) - len(self.diverged))])
        else:
            self._timing[phase] = np.zeros(2)
        rate = self._rate(phase)
        if rate and self._progress is not None:
            unit = "steps/s" if phase == "online" else "updates/s"
            self._progress.update(self._task, description=f"{self.name} {rate:.0f} {unit}")

    def _rate(self, phase: str) -> float | None:
        """Updates (online: environment steps, each with an update) per second, summed over the living members."""
        seconds, steps = self._timing.get(phase, (0.0, 0.0))
        return float(steps / seconds) if seconds else None

    def _on_signal(self, number: int, frame: Any) -> None:
        if self._received:  # the second one does not wait
            sys.exit(128 + number)
        self._received = number

    def _stopping(self, steps: int = 0) -> bool:
        """Whether a signal came; several processes agree on it, after `steps` at every `SIGNAL_EVERY` of them."""
        if self.processes.count == 1 or steps % SIGNAL_EVERY == 0:
            self._signal = int(self.processes.gather(np.array([self._received])).max())
        return bool(self._signal)

    def _check_signal(self) -> None:
        if self._stopping():
            raise Interrupted

    def _check_directory(self) -> None:
        if self.args.resume and not self.args.run_dir:
            raise UsageError("--resume True needs --run-dir, the directory of the run to continue")
        if not self.processes.first:  # which alone writes there, perhaps already
            return
        left = any((self.directory / name).exists() for name in ("config.json", "metrics.csv", "evaluations.csv"))
        if self.args.run_dir and left and not self.args.resume:
            raise UsageError(f"{self.directory} holds a run; pass --resume True to continue it, or another --run-dir")
        parent = self.directory
        while not parent.exists():
            parent = parent.parent
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise UsageError(f"run directory {self.directory}: {parent} is not a writable directory")

    def _flags(self) -> dict[str, Any]:
        flags = {field.name: getattr(self.args, field.name) for field in dataclasses.fields(self.args)}
        del flags["hp"]
        return flags | dict(self.args.hp._asdict())

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with: the algorithm and every flag that decides the training's course."""
        free = FREE_TO_CHANGE - (PHASE_LENGTHS if self.online_done else set())
        fixed = {name: value for name, value in self._flags().items() if name not in free}
        fixed["dataset"] += f" with sha256 {self._fingerprint}"
        if self._precompute_one is not None:  # else random numbers are drawn elsewhere
            fixed["precompute"] = self._precompute is not None
        return json.loads(json.dumps({"algorithm": self.name} | fixed))

    def _config(self, devices: int) -> dict[str, Any]:
        device = jax.local_devices()[0]
        scores = self._score(self.dataset_returns)
        return {
            "algorithm": self.name,
            "flags": self._flags(),
            "preset": preset_name(self.args),
            "members": [
                {"member": m.index, "seed": m.seed, "hyperparameters": dict(m.hp._asdict()), "swept": m.swept}
                for m in self.members
            ],
            "environment": getattr(self.spec, "id", self.spec),
            "transitions": len(self.dataset.transitions.rewards),
            "dataset_returns": {
                "mean": float(self.dataset_returns.mean()),
                "min": float(self.dataset_returns.min()),
                "max": float(self.dataset_returns.max()),
                "episodes": len(self.dataset_returns),
                "score_mean": None if scores is None else float(scores.mean()),
            },
            "transform": {
                "observation_mean": self.transform.observation_mean.tolist(),
                "observation_std": self.transform.observation_std.tolist(),
                "reward_scale": self.transform.reward_scale,
                "reward_shift": self.transform.reward_shift,
            },
            "device": {"platform": device.platform, "kind": device.device_kind, "count": devices},
        } | provenance()

    def _own_part(self) -> dict[str, Any]:
        """Of a checkpoint: states, and rings once the online phase has begun."""
        return self.population.to_host({"state": self._state} | ({"ring": self.ring} if self.online_done else {}))

    def _tree(self, members: dict[str, Any]) -> dict[str, Any]:
        """What a checkpoint holds: all members' parts, and the normaliser."""
        return members | {"transform": jax.tree.map(np.asarray, self.transform)}

    def _save(self) -> None:
        members = self.processes.gather(self._own_part(), everywhere=False)
        if not self.processes.first:
            return
        metadata = {
            "identity": self._identity(),
            "seeds": [member.seed for member in self.members],
            "pretraining_done": self.pretraining_done,
            "updates_done": self.updates_done,
            "online_done": self.online_done,
            "diverged": self.diverged,
            "seconds": time.time() - self.started,
        }
        checkpoints.save(self.checkpoint_path, self._tree(members), metadata)

    def _restore(self) -> None:
        metadata = checkpoints.metadata(self.checkpoint_path)
        try:
            theirs = dict(metadata["identity"])
            self.pretraining_done = int(metadata["pretraining_done"])
            self.updates_done, self.online_done = int(metadata["updates_done"]), int(metadata["online_done"])
            self.diverged = {int(index): what for index, what in metadata["diverged"].items()}
            self.started -= float(metadata["seconds"])
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UsageError(f"checkpoint {self.checkpoint_path} is damaged or was edited (its metadata)") from None
        ours = self._identity()
        for name in sorted(theirs.keys() | ours.keys()):
            if theirs.get(name) != ours.get(name):
                flag = name.replace("_", "-")
                raise UsageError(
                    f"{self.directory} holds a run with --{flag} {theirs.get(name)}, this one has {ours.get(name)}; "
                    "use another --run-dir"
                )
        like = jax.tree.map(lambda x: x[np.zeros(len(self.members), int)], self._own_part())
        tree = checkpoints.load(self.checkpoint_path, self._tree(like))
        own = jax.tree.map(self.processes.share, {name: tree[name] for name in like})
        self._state = self.population.shard(own["state"])
        if "ring" in own:
            self.ring = self.population.shard(buffers.end_episodes(own["ring"]))
        self._set_active()

    def _report(self, final: dict[int, dict[str, Any]]) -> None:
        if not self.processes.first:
            return
        members = []
        for m in self.members:
            row = final.get(m.index, {})
            entry = {"member": m.index, "seed": m.seed, "swept": m.swept, "diverged": self.diverged.get(m.index)}
            names = ("return_mean", "return_std", "score_mean", "score_std", "episodes")
            members.append(entry | {name: row.get(name) for name in names})
        result = {"members": members} | reporting.summarise(members)
        if self._pretrain is not None:
            result |= {"pretraining_updates": self.pretraining_done}
        result |= {"updates": self.updates_done, "online_steps": self.online_done}
        result |= {"wall_clock_seconds": time.time() - self.started, "updates_per_second": self._rate("offline")}
        result |= {"online_steps_per_second": self._rate("online")}
        write_json(self.directory / "final.json", result)
        if self._progress is not None:
            self._progress.stop()
        scores = self._score(self.dataset_returns)
        level = float(np.mean(self.dataset_returns if scores is None else scores))
        title = f"{self.name}, {self.args.dataset}"
        if self.evaluations.rows:
            own_level = level if self.args.num_updates else None  # without offline updates the data played no part
            reporting.plot_curves(self.directory / "curves.png", self.evaluations.rows, title, own_level)
        if members[0]["swept"]:
            reporting.plot_grid(self.directory / "grid.png", members, title)
        rows = [
            [str(m), *(row[name] for name in ("return_mean", "return_std", "score_mean", "episodes"))]
            for m, row in zip(self.members, members, strict=True)
        ]
        own = (float(self.dataset_returns.mean()), float(self.dataset_returns.std()))
        rows.append(["dataset", *own, None if scores is None else level, len(self.dataset_returns)])
        columns = ["", "return", "std", "score", "episodes"]
        reporting.print_table(f"{self.name} on {self.args.dataset}", columns, rows)
        rate = self._rate("offline")
        speed = f", {rate:.0f} updates/s" if rate else ""
        print(f"{time.time() - self.started:.0f} s{speed}; results in {self.directory}", flush=True)
        aggregate = result["aggregate"]
        score = {"final_score_iqm": aggregate["score"]["iqm"], "final_return_iqm": aggregate["return"]["iqm"]}
        score["diverged_members"] = len(self.diverged)  # they are not in the means
        per_member = [{"final_score": m["score_mean"], "final_return": m["return_mean"]} for m in members]
        self.tracker.finish(per_member, score, 0 if final else 3)
