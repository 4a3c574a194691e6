r"""AWAC's experiment on the Adroit door: human demonstrations, then a little experience.

Nair, Gupta, Dalal, Levine, 2020, arXiv:2006.09359, section 6.1.

    python benchmarks/adroit_door.py prepare
    python benchmarks/adroit_door.py run
    python benchmarks/adroit_door.py report

It needs the extra: `pip install -e ".[adroit]"`.

The task, `door-binary` (appendix B.1.1): a hand with 28 actuators turns the latch of a door and opens it. The reward is
1{door angle > 1.4 rad} - 1. The simulator is gymnasium-robotics' AdroitHandDoor, with its 200 steps and without its own
success, an angle of at least 1.35. There is no termination, and an agent does not see the time: the last step of every
episode is a truncation that bootstraps, so that Q is of an endless task and lies in [-100, 0].

`prepare` makes the data: 25 human demonstrations (Rajeswaran et al., 2018) and 500 trajectories of a policy that
`bc.py` clones from them and that acts by its mean. Rewards of both are computed by the rule above from the
observations, actions are clipped to [-1, 1] as the simulator does. Demonstrations keep their length of up to 300 steps.
Of the 25 that their authors published all pass 1.0 rad, in most after 170 to 280 steps, and only 6 ever pass 1.4: the
data have few successes. What was found is written beside the data. All seeds of `run` learn from the same clone, and
one made with another number of threads may succeed two or three times as often.

`run` trains each algorithm by its own script on these data: offline, then online with one update for each step.
Exceptions are bc.py, which has no online phase and learns from the clone's trajectories too, and AWR, which collects
2,048 steps and then updates, 1,000 times its policy. AWAC has its authors' settings for this task, the others those for
Adroit where they have them; `sac_prior.py` starts from random networks, in the paper (B.4) from a clone.
`--algorithms`, `--label` and `--extra` add runs with other settings; what has finished is skipped, what was interrupted
goes on. Other seeds or lengths of the same settings need another `--name`.

`report` writes a page with the success rate against environment steps, where an episode is a success if the door is
open in one of its steps. Its return is -200 plus the number of steps with the door open.

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
from benchmarks.provenance import provenance
from benchmarks.sources import ensure
from benchmarks.tables import Table
from common.cli import UsageError, exit_status, one_line
from common.data import Dataset
from common.environments import Collector, make_environment
from common.members import make_members
from common.replay import Replay, Transform, Transitions, fit_transform, record
from common.report import write_atomically, write_json

OBS_DIM, ACTION_DIM = 39, 28
DOOR_ANGLE = 28
"""Where in an observation the angle of the door is."""
OPEN_ANGLE = 1.4
EPISODE_STEPS = 200
NUM_ENVIRONMENTS = 25
"""That the clone acts in side by side."""
SUITE = "adroit-door"
DATA = Path("runs", SUITE, "door-binary.npz")

# What a run has besides the flags that all have, whatever the name of its data. AWR keeps all that it collects.
FLAGS = {
    "awac": "--preset demonstrations",
    "iql": "--preset adroit",
    "cql": "--preset adroit",
    "td3_bc": "--preset adroit",
    "awr": "--preset adroit --buffer-size {online_steps}",
}
OFFLINE_ONLY = ("bc",)
EPISODES = ("eval_episodes", "final_eval_episodes")


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


def read_npz(path: str, names: Sequence[str]) -> list[np.ndarray]:
    """Arrays of a file, none of them a scalar; UsageError, in one line, for a file that has not all of them."""
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: np.atleast_1d(file[name]) for name in file.files if name in names}
    except FileNotFoundError:
        raise UsageError(f"there is no file {path}") from None
    except Exception as error:  # a flipped byte may surface as nearly anything, down in zipfile or numpy
        raise UsageError(f"{path} is damaged or is no .npz ({one_line(error)})") from None
    if missing := [name for name in names if name not in found]:
        raise UsageError(f"{path} has no array {missing[0]}")
    return [found[name] for name in names]


def read_demonstrations(source: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Observations `[steps + 1, 39]` and actions `[steps, 28]`, as recorded, of each demonstration.

    UsageError, in one line, for a `source` (see `Prepare.demonstrations`) that is neither a Minari id nor such a file.
    """
    if source.endswith(".npz"):
        lengths, observations, actions = read_npz(source, ("lengths", "replay_observations", "actions"))
        if (len(observations), len(actions)) != (lengths.sum() + len(lengths), lengths.sum()):
            raise UsageError(f"{source}: its lengths are not those of its actions and observations")
        ends = np.cumsum(lengths.astype(int))
        parts = np.split(observations, (ends + np.arange(1, len(ends) + 1))[:-1])
        episodes = list(zip(parts, np.split(actions, ends[:-1]), strict=True))
    else:
        directory = ensure(source)
        import minari

        try:
            found = minari.MinariDataset(directory / "data").iterate_episodes()
            episodes = [(episode.observations, episode.actions) for episode in found]
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{source}: cannot be read ({one_line(error)})") from None
    for number, (observations, actions) in enumerate(episodes):
        shapes, steps = (np.shape(observations), np.shape(actions)), len(observations) - 1
        if shapes != ((steps + 1, OBS_DIM), (steps, ACTION_DIM)) or not steps:
            raise UsageError(f"{source}: demonstration {number} has shapes {shapes}, not those of the Adroit door")
        if not (np.isfinite(observations).all() and np.isfinite(actions).all()):
            raise UsageError(f"{source}: demonstration {number} has NaN or infinite numbers")
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
    """How long the episodes are, and in how many the door is past an angle at some step, and at some of the first 200.

    `ajar` is past 1 rad, `open` is past 1.4 rad.
    """
    ends = np.flatnonzero(transitions.truncations) + 1
    angles = np.split(transitions.next_observations[:, DOOR_ANGLE], ends[:-1])
    found: dict[str, Any] = {
        "episodes": len(angles),
        "steps": len(transitions.rewards),
        "shortest": min(map(len, angles)),
        "longest": max(map(len, angles)),
    }
    for name, least in (("ajar", 1.0), ("open", OPEN_ANGLE)):
        past = [steps > least for steps in angles]
        found |= {
            f"steps_{name}": int(sum(steps.sum() for steps in past)),
            f"episodes_{name}": int(sum(steps.any() for steps in past)),
            f"episodes_{name}_within_{EPISODE_STEPS}": int(sum(steps[:EPISODE_STEPS].any() for steps in past)),
            f"episodes_{name}_at_end": int(sum(steps[-1] for steps in past)),
        }
    return found


# The clone


def clone(data: Transitions, num_updates: int, seed: int) -> Callable[[np.ndarray], jax.Array]:
    """The policy that `benchmarks/bc.py` clones from the data, with its defaults: `[batch, 39] -> [batch, 28]`."""
    args = bc.Args(num_updates=num_updates, seed=seed)
    transform = fit_transform(data, args)
    replay = Replay(jax.tree.map(jnp.asarray, transform.transitions(record(data))))
    init = jax.jit(partial(bc.init, args=args, obs_dim=OBS_DIM, action_dim=ACTION_DIM))
    state = init(jax.random.key(seed), args.hp)
    state, _ = jax.jit(partial(bc.train, args=args))(state, args.hp, replay, num_updates)
    act = jax.jit(partial(bc.act, args=args, action_dim=ACTION_DIM, sample=False))
    return lambda observations: act(state, args.hp, transform.observations(observations), jax.random.key(0))


def collect(policy: Callable[[np.ndarray], jax.Array], trajectories: int, seed: int) -> Transitions:
    """`trajectories` whole episodes of the policy, `[200 * trajectories, ...]`, each contiguous."""
    plain = Transform(np.zeros(OBS_DIM, np.float32), np.ones(OBS_DIM, np.float32), reward_scale=1.0, reward_shift=0.0)
    members = make_members(bc.Args(seed=seed))  # one, with several environments
    collector = Collector(partial(make_environment, ENV), members, plain, NUM_ENVIRONMENTS)
    steps = EPISODE_STEPS * -(-trajectories // NUM_ENVIRONMENTS)
    taken = []
    for _ in range(steps):
        transitions = collector.step(policy(collector.observations[0])[None])
        taken.append(jax.tree.map(lambda x: x[0], transitions))
    by_environment = jax.tree.map(lambda *rows: np.stack(rows, axis=1), *taken)
    return jax.tree.map(
        lambda x: x.reshape(-1, *x.shape[2:])[: EPISODE_STEPS * trajectories].astype(np.float32), by_environment
    )


# The commands


@dataclass(frozen=True)
class Prepare:
    """Make the data: demonstrations, and trajectories of a policy cloned from them."""

    # Minari id, or path of an .npz with actions [all steps, 28], lengths [episodes] and replay_observations [all steps
    # + episodes, 39]: the first of each episode, and those that the simulator gave for the clipped actions.
    demonstrations: str = "D4RL/door/human-v2"
    out: Path = DATA  # The .npz to write, which must not exist; what was found goes into the .json of the same name.
    clone_updates: int = 25_000  # Updates of behaviour cloning, at bc.py's defaults (ours).
    trajectories: int = 500  # Episodes of the clone (paper, section 6.1).
    seed: int = 0  # Of the clone and of its episodes.


@dataclass(frozen=True)
class Run:
    """Train each algorithm on the data by its own script, offline and then online."""

    data: Path = DATA  # What prepare wrote.
    name: str = SUITE  # Folder under --runs-dir and --results-dir: another one for runs that belong on another page.
    # Scripts in algorithms/ or benchmarks/, without their .py.
    algorithms: tuple[str, ...] = ("awac", "iql", "cql", "td3_bc", "awr", "sac_prior", "bc")
    seed: int = 0  # First seed.
    num_seeds: int = 3  # Seeds of each algorithm, trained in one process.
    num_updates: int = 25_000  # Offline updates (paper, table 1).
    online_steps: int = 100_000  # Environment steps after that.
    eval_every: int = 5_000  # Updates, then environment steps, between evaluations.
    eval_episodes: int = 20  # Episodes for each seed in an evaluation.
    extra: str = ""  # More flags for every script of this call: --extra="--batch-size 256".
    label: str = ""  # Follows the names of this call's runs, so that algorithms can be there again with other flags.
    runs_dir: Path = Path("runs")  # Where run directories with checkpoints go.
    results_dir: Path = Path("results")  # Where the small files go.


@dataclass(frozen=True)
class Report:
    """Write the page with the success rates of what `run` kept."""

    results: Path = Path("results", SUITE)  # Folder of the results.


def prepare(args: Prepare) -> int:
    """Read, clip, clone, collect, write; the exit status."""
    make_environment(ENV).close()  # this and the rest rather now than after the cloning
    if args.trajectories < 1 or args.clone_updates < 1:
        raise UsageError("--trajectories and --clone-updates must be at least 1")
    if args.seed < 0:
        raise UsageError(f"--seed {args.seed}: must be at least 0")
    if args.out.suffix != ".npz":
        raise UsageError(f"--out {args.out}: must end in .npz")
    if args.out.exists():
        raise UsageError(f"{args.out} exists, and results may be of it: delete it or give another --out")
    episodes = read_demonstrations(args.demonstrations)
    human = to_transitions(episodes)
    size = np.abs(np.concatenate([actions for _, actions in episodes]))
    source = Path(args.demonstrations).name if args.demonstrations.endswith(".npz") else args.demonstrations
    found: dict[str, Any] = {"demonstrations": {"source": source} | about(human)}
    found["demonstrations"] |= {
        "actions_beyond_bounds": float((size > 1.0).mean()),
        "largest_action": float(size.max()),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    print(f"demonstrations: {json.dumps(found['demonstrations'])}", flush=True)
    policy = clone(human, args.clone_updates, args.seed)
    own = collect(policy, args.trajectories, args.seed)
    found["clone"] = {"updates": args.clone_updates, "seed": args.seed} | about(own)
    print(f"clone: {json.dumps(found['clone'])}", flush=True)
    both = jax.tree.map(lambda *parts: np.concatenate(parts), human, own)
    whole = Dataset(str(args.out), both, ENV, -np.ones(ACTION_DIM, np.float32), np.ones(ACTION_DIM, np.float32))
    found["digest"] = whole.describe()["dataset_sha256"]
    write_json(args.out.with_suffix(".json"), found | provenance())
    write_atomically(args.out, lambda file: np.savez_compressed(file, env=ENV, **both._asdict()))
    print(f"wrote {args.out}: {len(both.rewards)} transitions")
    return 0


def suites(args: Run) -> list[suite.Args]:
    """What `benchmarks/suite.py` is called with for each algorithm."""
    found = []
    for algorithm in args.algorithms:
        flags = ["--eval-every", args.eval_every, "--eval-episodes", args.eval_episodes]
        flags += [] if algorithm in OFFLINE_ONLY else ["--online-steps", args.online_steps]
        own = FLAGS.get(algorithm, "").format(online_steps=args.online_steps)
        found.append(
            suite.Args(
                name=args.name,
                algorithms=(algorithm,),
                datasets=(str(args.data),),
                seed=args.seed,
                num_seeds=args.num_seeds,
                num_updates=args.num_updates,
                extra=" ".join(filter(None, [shlex.join(map(str, flags)), own, args.extra])),
                label=args.label,
                runs_dir=args.runs_dir,
                results_dir=args.results_dir,
            )
        )
    return found


def run(args: Run) -> int:
    """One call of `benchmarks/suite.py` for each algorithm; the exit status is the first that is not 0."""
    make_environment(ENV).close()
    found, kept = args.data.with_suffix(".json"), args.results_dir / args.name / "data.json"
    for path in (args.data, found):
        if not path.exists():
            raise UsageError(f"there is no {path}: run `python benchmarks/adroit_door.py prepare` first")
    if kept.exists() and read_json(kept)["digest"] != read_json(found)["digest"]:
        raise UsageError(f"{kept.parent} has results on other data than {args.data}: give another --name")
    calls = suites(args)
    for call in calls:
        suite.plan(call)  # so that a wrong name ends it before hours of training
    kept.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(found, kept)
    status = 0
    for call in calls:
        now = suite.main(call)
        if now > 128:
            return now
        status = status or now
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

    What has no online phase is a dashed line at its last policy's rate. Where a seed diverges the line ends in a cross.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.0 + 0.2 * len(cells)), layout="constrained")
    axes = figure.add_subplot()
    for number, cell in enumerate(cells):
        color = f"C{number}"
        rates = success_rates(cell, "online")
        if not rates:
            last = report.summary([list(success_rates(cell, "offline").values())[-1]])
            axes.axhline(last["iqm"], color=color, linestyle="--", linewidth=1.0, label=cell.algorithm)
            continue
        found = {step: report.summary([values]) for step, values in rates.items() if len(values) == len(cell.members)}
        iqm, low, high = ([value[name] for value in found.values()] for name in ("iqm", "low", "high"))
        axes.plot(list(found), iqm, color=color, label=cell.algorithm)
        axes.fill_between(list(found), low, high, color=color, alpha=0.2, linewidth=0)
        if found and len(found) < len(rates):
            axes.plot([list(found)[-1]], [iqm[-1]], "x", color=color)
    axes.set_xlabel("environment steps")
    axes.set_ylabel("success rate, %")
    axes.set_ylim(-3.0, 103.0)
    axes.set_title("door-binary: interquartile mean over seeds and its 95 % interval", fontsize=10)
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=3)
    axes.grid(alpha=0.2)
    figure.savefig(path, dpi=120)


def describe(found: dict[str, Any]) -> str:
    """What is in the data, as Markdown."""
    columns = ["", "episodes", "steps of each"]
    names = []
    for name, angle in (("ajar", "1 rad"), ("open", f"{OPEN_ANGLE} rad")):
        columns += [f"past {angle}", f"within {EPISODE_STEPS} steps"]
        names += [f"episodes_{name}", f"episodes_{name}_within_{EPISODE_STEPS}"]
    rows = []
    for source in ("demonstrations", "clone"):
        data = found[source]
        lengths = "-".join(report.unique([str(data["shortest"]), str(data["longest"])]))
        rows.append([source, str(data["episodes"]), lengths, *(str(data[name]) for name in names)])
    human, own = found["demonstrations"], found["clone"]
    return (
        f"{report.markdown(columns, rows)}\nThe demonstrations are those of {human['source']}. Of the numbers in their "
        f"actions {100 * human['actions_beyond_bounds']:.1f} % were beyond [-1, 1], up to "
        f"{human['largest_action']:.2f}, and are clipped, as the simulator does. The clone is made by "
        f"{own['updates']:,} updates of `benchmarks/bc.py` on the demonstrations, seed {own['seed']}. All seeds of all "
        "algorithms have the same data, so that intervals leave out how much the clone itself varies.\n"
    )


def read_json(path: Path) -> dict[str, Any]:
    """The record in a data.json; UsageError for a file that is none."""
    try:
        record = json.loads(path.read_text())
    except ValueError:
        record = None
    if not isinstance(record, dict) or "digest" not in record:
        raise UsageError(f"{path} is damaged, or not made by `prepare`")
    return record


def write_page(args: Report) -> int:
    """Write README.md, success.csv (a row for each seed and evaluation) and success.png; the exit status."""
    if not any(args.results.glob("*/config.json")):
        raise UsageError(f"{args.results} has no results: run `python benchmarks/adroit_door.py run` first")
    cells = report.read(args.results)
    if missing := [cell.run for cell in cells if any(not row.get("success_mean") for row in cell.evaluations)]:
        raise UsageError(f"{args.results}: {missing[0]} has no success rates; it is no run of this experiment")
    if len(found := report.unique([cell.dataset for cell in cells])) > 1:
        raise UsageError(f"{args.results} has results on {' and '.join(found)}; a page is of one dataset")
    table, rows = [], []
    for cell in cells:
        before = success_rates(cell, "online").get(0, []) if cell.final["online_steps"] else []
        rates = success_rates(cell, "online") or success_rates(cell, "offline")
        lost = sum(member["diverged"] is not None for member in cell.members)
        after = list(rates.values())[-1] if lost < len(cell.members) else []
        ends = [report.show(report.summary([values])) for values in (before, after)]
        flags = cell.config["flags"]
        table.append([cell.algorithm, flags["preset"], str(flags["batch_size"])])
        table[-1] += [f"{cell.final['updates']:,}", f"{cell.final['online_steps']:,}", *ends]
        table[-1].append(f"{len(cell.members)}" + (f", {lost} diverged" if lost else ""))
        names = ("phase", "step", "seed", "success_mean", "return_mean", "episodes")
        rows += [{"algorithm": cell.algorithm} | {name: row[name] for name in names} for row in cell.evaluations]
    path = args.results / "success.csv"
    path.unlink(missing_ok=True)
    Table(path).append(rows)
    plot(args.results / "success.png", cells)
    columns = ["algorithm", "preset", "batch", "offline updates", "environment steps", "before these", "last policy"]
    data, notes = args.results / "data.json", args.results / "notes.md"
    often, last = (report.unique([cell.config["flags"][name] for cell in cells]) for name in EPISODES)
    parts = [
        "# AWAC's experiment on the Adroit door\n",
        "Made from the files beside it by `python benchmarks/adroit_door.py report`. The task and the data are "
        "described at the head of that file.\n",
        "Success rate in per cent: the share of episodes in which the door is open at some step, "
        f"{' or '.join(map(str, last))} for each seed at the last policy and {' or '.join(map(str, often))} elsewhere. "
        "Interquartile mean over the seeds [95 % bootstrap interval] of the last policy, not of the best one; with "
        "fewer than four seeds it is the mean, with fewer than about ten the interval is narrower than its name says. "
        "Each evaluation by itself: [success.csv](success.csv).\n",
        report.markdown([*columns, "seeds"], table),
        *([notes.read_text()] if notes.exists() else []),
        "![Success rate against environment steps](success.png)\n",
        *(["## The data\n", describe(read_json(data))] if data.exists() else []),
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
