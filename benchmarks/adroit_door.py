r"""AWAC's experiment on the Adroit door: human demonstrations, then a little experience.

Nair, Gupta, Dalal, Levine, 2020, arXiv:2006.09359, section 6.1.

    python benchmarks/adroit_door.py prepare
    python benchmarks/adroit_door.py run
    python benchmarks/adroit_door.py report

It needs the extra: `pip install -e ".[adroit]"`.

The task, `door-binary` (appendix B.1.1): a hand with 28 actuators turns the latch of a door and opens it. The reward is
1{door angle > 1.4 rad} - 1, an episode has 200 steps and no termination. The simulator is gymnasium-robotics'
AdroitHandDoor, whose own success is an angle of at least 1.35.

`prepare` makes the data: 25 human demonstrations (Rajeswaran et al., 2018) and 500 trajectories of a policy that
`bc.py` clones from them. Rewards of both are computed by the rule above from the observations, actions are clipped to
[-1, 1] as the simulator does, and every episode ends by a truncation, so that it bootstraps. Demonstrations keep their
length of up to 300 steps. What was found in them, and how often the clone succeeds, is written beside the data.

`run` trains each algorithm by its own script on these data: offline, then online with one update for each step.
`--algorithms`, `--label` and `--extra` add runs with other settings; what has finished is skipped, what was interrupted
goes on. `report` writes a page with the success rate against environment steps, where an episode is a success if the
door is open in one of its steps.

The data name their environment, which is `benchmarks.adroit_door:door-binary-v0` for --env, so that any script takes
them by itself:

    python algorithms/awac.py --dataset runs/adroit-door/door-binary.npz --preset demonstrations --num-updates 25000 \
        --online-steps 100000
"""

import contextlib
import io
import json
import shlex
import shutil
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks import bc, report, suite
from common import checkpoints, datasets, experiment, reporting, transforms
from common.buffers import Replay, Transitions
from common.collection import Collector
from common.errors import UsageError, exit_status
from common.evaluation import make_environment
from common.logging import Table, write_json
from common.provenance import provenance
from common.transforms import Transform

OBS_DIM, ACTION_DIM = 39, 28
DOOR_ANGLE = 28
"""Where in an observation the angle of the door is."""
OPEN_ANGLE = 1.4
EPISODE_STEPS = 200
NUM_ENVIRONMENTS = 25
"""That collect side by side."""
SUITE = "adroit-door"
DATA = Path("runs", SUITE, "door-binary.npz")

# What an algorithm's run has besides the flags that all have. IQL, CQL, TD3+BC and AWR take their settings for Adroit
# from the name of the file.
FLAGS = {"awac": "--preset demonstrations"}
OFFLINE_ONLY = ("bc",)


# The environment


def is_open(observations: np.ndarray) -> np.ndarray:
    """Whether the door is open in each of the `observations [..., 39]`."""
    return np.asarray(observations)[..., DOOR_ANGLE] > OPEN_ANGLE


def rewards_of(next_observations: np.ndarray) -> np.ndarray:
    """Rewards `[...]` of the steps that led to the observations: 0 where the door is open, else -1."""
    return is_open(next_observations).astype(np.float32) - 1.0


class BinaryDoor(gym.Wrapper):
    """The door with the binary reward: no termination, and `info["success"]` is whether the door is open now."""

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """One step; its reward is that of the state it leads to."""
        observation, _, _, truncated, _ = self.env.step(action)
        reward = float(rewards_of(observation))
        return observation, reward, False, truncated, {"success": reward == 0.0}


def make_door() -> gym.Env:
    """The environment without its time limit; UsageError without gymnasium-robotics."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # it prints a notice about versions
            from gymnasium_robotics.envs.adroit_hand.adroit_door import AdroitHandDoorEnv
    except ImportError:
        raise UsageError('the door needs gymnasium-robotics: install with `pip install -e ".[adroit]"`') from None
    return BinaryDoor(AdroitHandDoorEnv())


ENV = "benchmarks.adroit_door:door-binary-v0"
if "door-binary-v0" not in gym.registry:  # as a script this file is loaded twice: by Python, and by the id above
    gym.register("door-binary-v0", entry_point="benchmarks.adroit_door:make_door", max_episode_steps=EPISODE_STEPS)


# The demonstrations


def read_demonstrations(source: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Observations `[steps + 1, 39]` and actions `[steps, 28]`, as recorded, of each demonstration.

    UsageError, in one line, for a `source` (see `Prepare.demonstrations`) that is neither a Minari id nor such a file.
    """
    try:
        if source.endswith(".npz"):
            with np.load(source, allow_pickle=False) as file:
                lengths = file["lengths"].astype(int)
                ends = np.cumsum(lengths)
                observations = np.split(file["replay_observations"], (ends + np.arange(1, len(ends) + 1))[:-1])
                episodes = list(zip(observations, np.split(file["actions"], ends[:-1]), strict=True))
        else:
            directory = datasets.ensure(source)
            import minari

            found = minari.MinariDataset(directory / "data").iterate_episodes()
            episodes = [(episode.observations, episode.actions) for episode in found]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UsageError(f"{source}: cannot be read as demonstrations ({' '.join(str(error).split())})") from None
    for number, (observations, actions) in enumerate(episodes):
        shapes = np.shape(observations), np.shape(actions)
        if shapes != ((len(actions) + 1, OBS_DIM), (len(actions), ACTION_DIM)) or not len(actions):
            raise UsageError(f"{source}: demonstration {number} has shapes {shapes}, not those of the Adroit door")
    if not episodes:
        raise UsageError(f"{source}: has no demonstrations")
    return episodes


def to_transitions(episodes: Sequence[tuple[np.ndarray, np.ndarray]]) -> Transitions:
    """The episodes one after the other, float32: actions clipped, rewards by the rule, the last step truncated."""
    next_observations = np.concatenate([observations[1:] for observations, _ in episodes])
    truncations = np.zeros(len(next_observations), np.float32)
    truncations[np.cumsum([len(actions) for _, actions in episodes]) - 1] = 1.0
    return Transitions(
        observations=np.concatenate([observations[:-1] for observations, _ in episodes]).astype(np.float32),
        actions=np.clip(np.concatenate([actions for _, actions in episodes]), -1.0, 1.0).astype(np.float32),
        rewards=rewards_of(next_observations),
        next_observations=next_observations.astype(np.float32),
        terminations=np.zeros_like(truncations),
        truncations=truncations,
    )


def about(transitions: Transitions) -> dict[str, Any]:
    """How long the episodes are, and how many have the door open at some step, at some of the first 200, at the end."""
    slices = datasets.episode_slices(transitions)
    opened = [transitions.rewards[start:stop] == 0.0 for start, stop in slices]
    lengths = [len(steps) for steps in opened]
    return {
        "episodes": len(slices),
        "steps": len(transitions.rewards),
        "shortest": min(lengths),
        "longest": max(lengths),
        "steps_open": int(sum(steps.sum() for steps in opened)),
        "episodes_open": int(sum(steps.any() for steps in opened)),
        f"episodes_open_within_{EPISODE_STEPS}": int(sum(steps[:EPISODE_STEPS].any() for steps in opened)),
        "episodes_open_at_end": int(sum(steps[-1] for steps in opened)),
    }


# The clone


def clone(data: Transitions, num_updates: int, seed: int) -> Callable[[np.ndarray], jax.Array]:
    """The policy that `benchmarks/bc.py` clones from the data, with its defaults: `[batch, 39] -> [batch, 28]`."""
    args = bc.Args(num_updates=num_updates, seed=seed)
    transform = transforms.fit(data, args.normalize_observations, False, 1.0, 0.0)
    replay = Replay(jax.tree.map(jnp.asarray, transform.transitions(data)))
    init = jax.jit(partial(bc.init, args=args, obs_dim=OBS_DIM, action_dim=ACTION_DIM))
    state = init(jax.random.key(seed), args.hp)
    state, _ = jax.jit(partial(bc.train, args=args))(state, args.hp, replay, num_updates)
    act = jax.jit(partial(bc.act, args=args, action_dim=ACTION_DIM, sample=False))
    return lambda observations: act(state, args.hp, transform.observations(observations), jax.random.key(0))


def collect(policy: Callable[[np.ndarray], jax.Array], trajectories: int, seed: int) -> Transitions:
    """`trajectories` whole episodes of the policy, `[200 * trajectories, ...]`, each contiguous."""
    plain = Transform(np.zeros(OBS_DIM, np.float32), np.ones(OBS_DIM, np.float32), reward_scale=1.0, reward_shift=0.0)
    collector = Collector(ENV, plain, [seed + i for i in range(NUM_ENVIRONMENTS)])
    steps = EPISODE_STEPS * -(-trajectories // NUM_ENVIRONMENTS)
    taken = [collector.step(np.asarray(policy(collector.observations))) for _ in range(steps)]
    collector.close()
    by_environment = jax.tree.map(lambda *rows: np.stack(rows, axis=1), *taken)
    return jax.tree.map(
        lambda x: x.reshape(-1, *x.shape[2:])[: EPISODE_STEPS * trajectories].astype(np.float32), by_environment
    )


# The commands


@dataclass(frozen=True)
class Prepare:
    """Make the data: demonstrations, and trajectories of a policy cloned from them."""

    demonstrations: str = "D4RL/door/human-v2"
    """Minari id, or path of an .npz with actions [all steps, 28], lengths [episodes] and replay_observations [all steps
    + episodes, 39]: the first of each episode, and those that the simulator gave for the clipped actions."""
    out: Path = DATA
    """The .npz to write; what was found goes into the .json of the same name."""
    clone_updates: int = 25_000
    """Updates of behaviour cloning, at bc.py's defaults (ours)."""
    trajectories: int = 500
    """Episodes of the clone (paper, section 6.1)."""
    seed: int = 0
    """Of the clone and of its episodes."""


@dataclass(frozen=True)
class Run:
    """Train each algorithm on the data by its own script, offline and then online."""

    data: Path = DATA
    """What prepare wrote."""
    name: str = SUITE
    """Folder under --runs-dir and --results-dir: another one for runs that belong on another page."""
    algorithms: tuple[str, ...] = ("awac", "iql", "cql", "td3_bc", "awr", "sac_prior", "bc")
    """Scripts in algorithms/ or benchmarks/, without their .py."""
    seed: int = 0
    """First seed."""
    num_seeds: int = 3
    """Seeds of each algorithm, trained in one process."""
    num_updates: int = 25_000
    """Offline updates (paper, section 5)."""
    online_steps: int = 100_000
    """Environment steps after that."""
    eval_every: int = 5_000
    """Updates, then environment steps, between evaluations."""
    eval_episodes: int = 20
    """Episodes for each seed in an evaluation."""
    extra: str = ""
    """More flags for every script: --extra="--preset adroit"."""
    label: str = ""
    """Follows the names of this call's runs, so that algorithms can be there again with other flags."""
    runs_dir: Path = Path("runs")
    """Where run directories with checkpoints go."""
    results_dir: Path = Path("results")
    """Where the small files go."""


@dataclass(frozen=True)
class Report:
    """Write the page with the success rates of what `run` kept."""

    results: Path = Path("results", SUITE)
    """Folder of the results."""


def prepare(args: Prepare) -> int:
    """Read, clip, clone, collect, write; the exit status."""
    if args.trajectories < 1 or args.clone_updates < 1:
        raise UsageError("--trajectories and --clone-updates must be at least 1")
    make_environment(ENV).close()  # rather now than after the cloning
    episodes = read_demonstrations(args.demonstrations)
    experiment.use_compilation_cache()
    human = to_transitions(episodes)
    size = np.abs(np.concatenate([actions for _, actions in episodes]))
    found: dict[str, Any] = {"demonstrations": {"source": Path(args.demonstrations).name} | about(human)}
    found["demonstrations"] |= {
        "actions_beyond_bounds": float((size > 1.0).mean()),
        "largest_action": float(size.max()),
    }
    print(f"demonstrations: {json.dumps(found['demonstrations'])}", flush=True)
    policy = clone(human, args.clone_updates, args.seed)
    own = collect(policy, args.trajectories, args.seed)
    found["clone"] = {"updates": args.clone_updates, "seed": args.seed} | about(own)
    print(f"clone: {json.dumps(found['clone'])}", flush=True)
    both = jax.tree.map(lambda *parts: np.concatenate(parts), human, own)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out.with_suffix(".json"), found | provenance())
    checkpoints.write_atomically(args.out, lambda file: np.savez_compressed(file, env=ENV, **both._asdict()))
    print(f"wrote {args.out}: {len(both.rewards)} transitions")
    return 0


def run(args: Run) -> int:
    """One call of `benchmarks/suite.py` for each algorithm; the exit status is the first that is not 0."""
    make_environment(ENV).close()
    if not args.data.exists():
        raise UsageError(f"there is no {args.data}: run `python benchmarks/adroit_door.py prepare` first")
    status = 0
    for algorithm in args.algorithms:
        flags = ["--eval-every", args.eval_every, "--eval-episodes", args.eval_episodes]
        flags += [] if algorithm in OFFLINE_ONLY else ["--online-steps", args.online_steps]
        extra = [shlex.join(map(str, flags)), FLAGS.get(algorithm, ""), args.extra]
        now = suite.main(
            suite.Args(
                name=args.name,
                algorithms=(algorithm,),
                datasets=(str(args.data),),
                seed=args.seed,
                num_seeds=args.num_seeds,
                num_updates=args.num_updates,
                extra=" ".join(filter(None, extra)),
                label=args.label,
                runs_dir=args.runs_dir,
                results_dir=args.results_dir,
            )
        )
        if now > 128:
            return now
        status = status or now
    shutil.copyfile(args.data.with_suffix(".json"), args.results_dir / args.name / "data.json")
    return status


def success_rates(cell: report.Cell, phase: str) -> dict[int, list[float]]:
    """By step of the phase, the success rate in per cent of each seed that has one there."""
    rates: dict[int, list[float]] = {}
    for row in cell.evaluations:
        if row["phase"] == phase:
            rates.setdefault(int(row["step"]), []).append(100.0 * float(row["success_mean"]))
    return dict(sorted(rates.items()))


def plot(path: Path, cells: Sequence[report.Cell]) -> None:
    """Success rate against environment steps: interquartile mean over the seeds, and its interval as a band.

    What has no online phase is a dashed line at its last policy's rate.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.0 + 0.2 * len(cells)), layout="constrained")
    axes = figure.add_subplot()
    for number, cell in enumerate(cells):
        rates = success_rates(cell, "online")
        if not rates:
            last = report.summary([list(success_rates(cell, "offline").values())[-1]])
            axes.axhline(last["iqm"], color=f"C{number}", linestyle="--", linewidth=1.0, label=cell.algorithm)
            continue
        found = [report.summary([values]) for values in rates.values()]
        axes.plot(list(rates), [value["iqm"] for value in found], color=f"C{number}", label=cell.algorithm)
        low, high = ([value[name] for value in found] for name in ("low", "high"))
        axes.fill_between(list(rates), low, high, color=f"C{number}", alpha=0.2, linewidth=0)
    axes.set_xlabel("environment steps")
    axes.set_ylabel("success rate, %")
    axes.set_ylim(-3.0, 103.0)
    axes.set_title("door-binary: interquartile mean over seeds and its 95 % interval", fontsize=10)
    reporting.legend_below(axes)
    axes.grid(alpha=0.2)
    figure.savefig(path, dpi=120)


def describe(found: dict[str, Any]) -> str:
    """What is in the data, as Markdown."""
    columns = ["", "episodes", "steps", "open at some step", f"within {EPISODE_STEPS} steps", "at the end"]
    names = ["episodes", "steps", "episodes_open", f"episodes_open_within_{EPISODE_STEPS}", "episodes_open_at_end"]
    rows = [[name, *(f"{found[name][column]:,}" for column in names)] for name in ("demonstrations", "clone")]
    human = found["demonstrations"]
    return (
        f"{report.markdown(columns, rows)}\nOf the demonstrations' numbers in actions, "
        f"{100 * human['actions_beyond_bounds']:.1f} % were beyond [-1, 1] (up to {human['largest_action']:.2f}) and "
        f"are clipped, as the simulator does. The clone is made by {found['clone']['updates']:,} updates of "
        "`benchmarks/bc.py` on the demonstrations.\n"
    )


def write_page(args: Report) -> int:
    """Write README.md, success.csv (a row for each seed and evaluation) and success.png; the exit status."""
    cells = report.read(args.results)
    if missing := [cell.run for cell in cells if any(not row.get("success_mean") for row in cell.evaluations)]:
        raise UsageError(f"{args.results}: {missing[0]} has no success rates; it is no run of this experiment")
    table, rows = [], []
    for cell in cells:
        before = next(iter(success_rates(cell, "online").values()), [])
        rates = success_rates(cell, "online") or success_rates(cell, "offline")
        lost = sum(member["diverged"] is not None for member in cell.members)
        after = list(rates.values())[-1] if lost < len(cell.members) else []
        ends = [report.show(report.summary([values])) for values in (before, after)]
        table.append([cell.algorithm, f"{cell.final['updates']:,}", f"{cell.final['online_steps']:,}", *ends])
        table[-1].append(f"{len(cell.members)}" + (f", {lost} diverged" if lost else ""))
        names = ("phase", "step", "seed", "success_mean", "return_mean", "episodes")
        rows += [{"algorithm": cell.algorithm} | {name: row[name] for name in names} for row in cell.evaluations]
    path = args.results / "success.csv"
    path.unlink(missing_ok=True)
    Table(path).append(rows)
    plot(args.results / "success.png", cells)
    columns = ["algorithm", "offline updates", "environment steps", "before these", "last policy", "seeds"]
    data, notes = args.results / "data.json", args.results / "notes.md"
    parts = [
        "# AWAC's experiment on the Adroit door\n",
        "Made from the files beside it by `python benchmarks/adroit_door.py report`. The task and the data are "
        "described at the head of that file.\n",
        "Success rate in per cent: the share of episodes in which the door is open at some step. Interquartile mean "
        "over the seeds [95 % bootstrap interval] of the last policy, not of the best one; with fewer than four seeds "
        "it is the mean, with fewer than about ten the interval is narrower than its name says. Each evaluation by "
        "itself: [success.csv](success.csv).\n",
        report.markdown(columns, table),
        *([notes.read_text()] if notes.exists() else []),
        "![Success rate against environment steps](success.png)\n",
        *(["## The data\n", describe(json.loads(data.read_text()))] if data.exists() else []),
        "## Speed\n",
        report.speed(cells),
        report.origin(cells),
    ]
    (args.results / "README.md").write_text("\n".join(parts))
    print(f"wrote {args.results / 'README.md'}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; the exit status."""
    args = tyro.cli(Prepare | Run | Report, args=argv, description=__doc__, config=(tyro.conf.OmitArgPrefixes,))
    if isinstance(args, Prepare):
        return prepare(args)
    return run(args) if isinstance(args, Run) else write_page(args)


if __name__ == "__main__":
    with exit_status():
        sys.exit(main())
