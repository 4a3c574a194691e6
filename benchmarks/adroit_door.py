r"""The Adroit door: human demonstrations, then a little experience, by two protocols.

Nair, Gupta, Dalal, Levine, 2020, arXiv:2006.09359, section 6.1; Nakamoto et al., 2023, arXiv:2303.05479 (Cal-QL).

    python benchmarks/adroit_door.py prepare
    python benchmarks/adroit_door.py run
    python benchmarks/adroit_door.py report

It needs the extra: `pip install -e ".[adroit]"`.

The task: a hand with 28 actuators turns the latch of a door and opens it, in 200 steps. A step's reward is 0 if the
door is then open at least 1.35 rad, as in the code of AWAC's authors, else -1; `--angle 1.4` is what their paper's text
says (appendix B.1.1). The simulator is gymnasium-robotics' AdroitHandDoor. An agent does not see the time: the last
step of an episode that is cut is a truncation, which bootstraps.

* `binary`, AWAC's protocol: nothing ends an episode but its 200 steps, also after the door is open. Q is of an endless
  task and lies in [-1/(1 - discount), 0].
* `success`, in the manner of Cal-QL and WSRL: success ends an episode, and of the same data those without success are
  left out and the others are cut at their first success. (Theirs are cut at the last one.)

`prepare` makes the data of both: 25 human demonstrations (Rajeswaran et al., 2018), of up to 300 steps, and 500
trajectories of six policies that `bc.py` clones from them, with other seeds and lengths, and that act by their mean.
Rewards are computed from the observations; actions are clipped to [-1, 1], as the simulator does. The clones are
trained on one thread and act in double precision, their actions rounded (see `offax_sets.py`), so that the arrays do
not depend on the number of threads; other processors and versions give other clones. What was found is written beside
the data.

`run` trains each algorithm by its own script on these data, offline and then online. AWAC has its authors' settings for
this task, the others those for Adroit where they have them; bc.py has no online phase; AWR collects 2,048 steps and
then updates, 1,000 times its policy; `sac_prior.py` starts from random networks, in AWAC's paper (B.4) from a clone.
`--protocols`, `--algorithms`, `--label` and `--extra` choose and add runs; what has finished is skipped, what was
interrupted goes on. Other seeds or lengths of the same settings need another `--name`.

`report` writes a page with the success rate against environment steps, where an episode is a success if the door is
open in one of its steps.

The data name their environment, e.g. `benchmarks.adroit_door:door-binary-1.35-v1`, so that any script takes them by
itself:

    python algorithms/awac.py --dataset runs/adroit-door/door-binary.npz --preset demonstrations --num-updates 25000 \
        --online-steps 100000
"""

import contextlib
import io
import json
import os
import shlex
import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import bc, offax_sets, report, suite
from benchmarks.curves import line_style
from benchmarks.offax_sets import Layers
from benchmarks.provenance import provenance
from benchmarks.sources import ensure
from benchmarks.tables import Table, markdown, write_text
from common.cli import UsageError, exit_status, one_line, read_flags
from common.data import Dataset
from common.environments import make_environment
from common.replay import Replay, Transform, Transitions, fit_transform, record
from common.report import read_json, read_npz, write_atomically, write_json

OBS_DIM, ACTION_DIM = 39, 28
DOOR_ANGLE = 28
"""Where in an observation the angle of the door is."""
ANGLES = (1.35, 1.4)
"""At least so far the door is open, in rad: in the code of AWAC's authors, and in their paper's text."""
SHOWN_ANGLES = (1.0, *ANGLES)
EPISODE_STEPS = 200
PROTOCOLS = ("binary", "success")
SUITE = "adroit-door"
DATA = Path("runs", SUITE)
Episode = tuple[np.ndarray, np.ndarray]
"""Observations `[steps + 1, 39]` and actions `[steps, 28]`."""

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


def is_open(observations: np.ndarray, angle: float) -> np.ndarray:
    """Whether the door is open in each of the `observations [..., 39]`."""
    return np.asarray(observations)[..., DOOR_ANGLE] >= angle


class BinaryDoor(gym.Wrapper):
    """The door with rewards of 0, where it is open after the step, and -1; `info["success"]` says likewise.

    With `terminates` an open door ends the episode, else only its time limit does.
    """

    def __init__(self, env: gym.Env, angle: float, terminates: bool) -> None:
        super().__init__(env)
        self.angle, self.terminates = angle, terminates

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """One step; its reward is that of the state it leads to."""
        observation, _, _, truncated, _ = self.env.step(action)
        success = bool(is_open(observation, self.angle))
        return observation, float(success) - 1.0, success and self.terminates, truncated, {"success": success}


def make_door(angle: float, terminates: bool) -> gym.Env:
    """The environment without its time limit; UsageError without gymnasium-robotics."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # it prints a notice about versions
            from gymnasium_robotics.envs.adroit_hand.adroit_door import AdroitHandDoorEnv
    except ImportError:
        raise UsageError('the door needs gymnasium-robotics: install with `pip install -e ".[adroit]"`') from None
    return BinaryDoor(AdroitHandDoorEnv(), angle, terminates)


def env_name(protocol: str, angle: float) -> str:
    """Its gymnasium id; for --env, with this module's name and a colon before it."""
    return f"door-{protocol}-{angle:g}-v1"


for name, options in {
    env_name(protocol, angle): {"angle": angle, "terminates": protocol == "success"}
    for protocol in PROTOCOLS
    for angle in ANGLES
}.items():
    if name not in gym.registry:  # as a script this file is loaded twice: by Python, and by the id that data have
        make = "benchmarks.adroit_door:make_door"
        gym.register(name, entry_point=make, max_episode_steps=EPISODE_STEPS, kwargs=options)


# The demonstrations


def read_demonstrations(source: str) -> list[Episode]:
    """Each demonstration, its actions as recorded.

    UsageError, in one line, for a `source` (see `Prepare.demonstrations`) that is neither a Minari id nor such a file.
    """
    if source.endswith(".npz"):
        needed = ("lengths", "replay_observations", "actions")
        arrays = read_npz(source, needed)
        lengths, observations, actions = (np.atleast_1d(arrays[name]) for name in needed)
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


def first_open(episode: Episode, angle: float) -> int | None:
    """The step of the episode, counted from 0, after which the door is open for the first time."""
    (steps,) = np.nonzero(is_open(episode[0][1:], angle))
    return int(steps[0]) if len(steps) else None


def to_transitions(episodes: Sequence[Episode], angle: float, protocol: str) -> Transitions:
    """The episodes one after the other, float32: actions clipped, rewards by the rule, the last step truncated.

    For `success` those without an open door are left out, the others cut at the first step that opens it, a
    termination.
    """
    if protocol == "success":
        found = [(episode, first_open(episode, angle)) for episode in episodes]
        episodes = [(o[: step + 2], a[: step + 1]) for (o, a), step in found if step is not None]
        if not episodes:
            raise UsageError(f"none of {len(found)} episodes opens the door by {angle} rad; clone for longer")
    observations, actions = ([episode[i] for episode in episodes] for i in (0, 1))
    ends = np.zeros(sum(map(len, actions)), np.float32)
    ends[np.cumsum([len(steps) for steps in actions]) - 1] = 1.0
    nothing = np.zeros_like(ends)
    next_observations = np.concatenate([steps[1:] for steps in observations])
    return Transitions(
        observations=np.concatenate([steps[:-1] for steps in observations]).astype(np.float32),
        actions=np.clip(np.concatenate(actions), -1.0, 1.0).astype(np.float32),
        rewards=is_open(next_observations, angle).astype(np.float32) - 1.0,
        next_observations=next_observations.astype(np.float32),
        terminations=ends if protocol == "success" else nothing,
        truncations=nothing if protocol == "success" else ends,
    )


def about(episodes: Sequence[Episode]) -> dict[str, Any]:
    """How long the episodes are, and in how many the door is ever past each angle, and within the first 200 steps."""
    lengths = [len(actions) for _, actions in episodes]
    first = {f"{angle:g}": [first_open(episode, angle) for episode in episodes] for angle in SHOWN_ANGLES}
    return {
        "episodes": len(episodes),
        "steps": sum(lengths),
        "shortest": min(lengths),
        "longest": max(lengths),
        "past": {angle: sum(step is not None for step in steps) for angle, steps in first.items()},
        f"past_within_{EPISODE_STEPS}": {
            angle: sum(step is not None and step < EPISODE_STEPS for step in steps) for angle, steps in first.items()
        },
    }


# The clones


def clone(data: Transitions, num_updates: int, seed: int) -> Layers:
    """The policy that `benchmarks/bc.py` clones from the data, with its defaults; it takes raw observations.

    For `offax_sets.run_episodes`, whose policies have a log standard deviation too. Trained on the CPU.
    """
    args = bc.Args(num_updates=num_updates, seed=seed)
    transform = fit_transform(data, args)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        replay = Replay(jax.tree.map(jnp.asarray, transform.transitions(record(data))))
        state = jax.jit(partial(bc.init, args=args, obs_dim=OBS_DIM, action_dim=ACTION_DIM))(
            jax.random.key(seed), args.hp
        )
        state, _ = jax.jit(partial(bc.train, args=args))(state, args.hp, replay, num_updates)
    return on_raw_observations(state.actor["params"]["MLP_0"], transform)


def on_raw_observations(network: dict[str, Any], transform: Transform) -> Layers:
    """Its layers in double precision, the transform in the first one and a log standard deviation of 0 in the last."""
    layers = [
        (np.asarray(network[f"Dense_{i}"]["kernel"], float), np.asarray(network[f"Dense_{i}"]["bias"], float))
        for i in range(len(network))
    ]
    (first, offset), (last, bias) = layers[0], layers[-1]
    first = first / transform.observation_std.astype(float)[:, None]
    layers[0] = first, offset - transform.observation_mean @ first
    layers[-1] = np.pad(last, ((0, 0), (0, last.shape[1]))), np.pad(bias, (0, len(bias)))
    return layers


def collect(layers: Layers, trajectories: int, seed: int) -> list[Episode]:
    """Whole episodes of the policy's mean actions."""
    run = partial(offax_sets.run_episodes, env_name("binary", ANGLES[0]), layers, [seed], mean_action=True)
    groups = [range(i, min(i + offax_sets.NUM_ENVS, trajectories)) for i in range(0, trajectories, offax_sets.NUM_ENVS)]
    return [(episode.observations, episode.actions) for group in groups for episode in run(group)]


# The commands


@dataclass(frozen=True)
class Prepare:
    """Make the data of both protocols: demonstrations, and trajectories of policies cloned from them."""

    # Minari id, or path of an .npz with actions [all steps, 28], lengths [episodes] and replay_observations [all steps
    # + episodes, 39]: the first of each episode, and those that the simulator gave for the clipped actions.
    demonstrations: str = "D4RL/door/human-v2"
    # Folder of door-binary.npz, door-success.npz and data.json, none of which may exist.
    out: Path = DATA
    # From which angle on, in rad, the door is open (authors' code; paper, B.1.1: 1.4).
    angle: Literal[1.35, 1.4] = 1.35
    # Updates of behaviour cloning of each clone, at bc.py's defaults; seeds are --seed, --seed + 1, ... (ours).
    clone_updates: tuple[int, ...] = (2_000, 5_000, 10_000, 20_000, 40_000, 80_000)
    trajectories: int = 500  # Episodes of all clones together (paper, section 6.1).
    seed: int = 0  # Of the first clone and its episodes.


@dataclass(frozen=True)
class Run:
    """Train each algorithm on the data by its own script, offline and then online."""

    data: Path = DATA  # Folder that prepare wrote.
    protocols: tuple[Literal["binary", "success"], ...] = PROTOCOLS  # On which of the data.
    name: str = SUITE  # Folder under --runs-dir and --results-dir: another one for runs that belong on another page.
    # Scripts in algorithms/ or benchmarks/, without their .py.
    algorithms: tuple[str, ...] = ("awac", "iql", "cql", "td3_bc", "awr", "sac_prior", "bc")
    seed: int = 0  # First seed.
    num_seeds: int = 5  # Seeds of each algorithm, trained in one process.
    num_updates: int = 25_000  # Offline updates (paper, table 1).
    online_steps: int = 100_000  # Environment steps after that.
    eval_every: int = 10_000  # Updates, then environment steps, between evaluations.
    eval_episodes: int = 20  # Episodes for each seed in an evaluation.
    extra: str = ""  # More flags for every script of this call: --extra="--batch-size 256".
    label: str = ""  # Follows the names of this call's runs, so that algorithms can be there again with other flags.
    runs_dir: Path = Path("runs")  # Where run directories with checkpoints go.
    results_dir: Path = Path("results")  # Where the small files go.


@dataclass(frozen=True)
class Report:
    """Write the page with the success rates of what `run` kept."""

    results: Path = Path("results", SUITE)  # Folder of the results.


def data_file(folder: Path, protocol: str) -> Path:
    """Where the data of a protocol are."""
    return folder / f"door-{protocol}.npz"


def prepare(args: Prepare) -> int:
    """Read, clone, collect, write; the exit status."""
    os.environ["NPROC"] = "1"  # before JAX starts: its sums over a minibatch are cut by the number of threads
    make_environment(env_name(PROTOCOLS[0], args.angle)).close()  # this and the rest rather now than after the cloning
    clones = len(args.clone_updates)
    if min(args.clone_updates, default=0) < 1 or args.trajectories < clones:
        raise UsageError("--clone-updates must be at least 1, and --trajectories at least one of each clone")
    if args.seed < 0:
        raise UsageError(f"--seed {args.seed}: must be at least 0")
    for path in (args.out / "data.json", *(data_file(args.out, protocol) for protocol in PROTOCOLS)):
        if path.exists():
            raise UsageError(f"{path} exists, and results may be of it: delete it or give another --out")
    human = read_demonstrations(args.demonstrations)
    size = np.abs(np.concatenate([actions for _, actions in human]))
    source = Path(args.demonstrations).name if args.demonstrations.endswith(".npz") else args.demonstrations
    found: dict[str, Any] = {"angle": args.angle, "demonstrations": {"source": source} | about(human)}
    found["demonstrations"] |= {
        "actions_beyond_bounds": float((size > 1.0).mean()),
        "largest_action": float(size.max()),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    print(f"demonstrations: {json.dumps(found['demonstrations'])}", flush=True)
    whole, own = to_transitions(human, args.angle, "binary"), []
    found["clones"] = []
    for number, updates in enumerate(args.clone_updates):
        share = args.trajectories * (number + 1) // clones - args.trajectories * number // clones
        episodes = collect(clone(whole, updates, args.seed + number), share, args.seed + number)
        found["clones"].append({"updates": updates, "seed": args.seed + number} | about(episodes))
        print(f"clone: {json.dumps(found['clones'][-1])}", flush=True)
        own += episodes
    found["trajectories"], found["protocols"] = about(own), {}
    made = {protocol: to_transitions([*human, *own], args.angle, protocol) for protocol in PROTOCOLS}
    for protocol, transitions in made.items():
        path = data_file(args.out, protocol)
        env = f"benchmarks.adroit_door:{env_name(protocol, args.angle)}"
        bounds = np.ones(ACTION_DIM, np.float32)
        described = Dataset(str(path), record(transitions), env, -bounds, bounds).describe()
        found["protocols"][protocol] = {
            "digest": described["dataset_sha256"],
            "episodes": described["dataset_returns"]["episodes"],
            "transitions": described["transitions"],
        }
        write_atomically(path, partial(np.savez_compressed, env=env, **transitions._asdict()))
        print(f"wrote {path}: {json.dumps(found['protocols'][protocol])}", flush=True)
    write_json(args.out / "data.json", found | provenance())
    return 0


def suites(args: Run) -> list[suite.Args]:
    """What `benchmarks/suite.py` is called with for each protocol and algorithm."""
    found = []
    for protocol in args.protocols:
        for algorithm in args.algorithms:
            flags = ["--eval-every", args.eval_every, "--eval-episodes", args.eval_episodes]
            flags += [] if algorithm in OFFLINE_ONLY else ["--online-steps", args.online_steps]
            own = FLAGS.get(algorithm, "").format(online_steps=args.online_steps)
            found.append(
                suite.Args(
                    name=args.name,
                    algorithms=(algorithm,),
                    datasets=(str(data_file(args.data, protocol)),),
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
    """One call of `benchmarks/suite.py` for each protocol and algorithm; the exit status is the first that is not 0."""
    make_environment(env_name(PROTOCOLS[0], ANGLES[0])).close()
    found, kept = args.data / "data.json", args.results_dir / args.name / "data.json"
    for path in (found, *(data_file(args.data, protocol) for protocol in args.protocols)):
        if not path.exists():
            raise UsageError(f"there is no {path}: run `python benchmarks/adroit_door.py prepare` first")
    if kept.exists() and read_record(kept)["protocols"] != read_record(found)["protocols"]:
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


def protocol_of(cell: report.Cell) -> str:
    """Of a run; UsageError for one in another environment."""
    for protocol in PROTOCOLS:
        if f"door-{protocol}-" in cell.config["environment"]:
            return protocol
    raise UsageError(f"{cell.run} is no run of this experiment: it was in {cell.config['environment']}")


def success_rates(cell: report.Cell, phase: str) -> dict[int, list[float]]:
    """By step of the phase, the success rate in per cent of each seed that has one there."""
    rates: dict[int, list[float]] = {}
    for row in cell.evaluations:
        if row["phase"] == phase:
            rates.setdefault(int(row["step"]), []).append(100.0 * float(row["success_mean"]))
    return dict(sorted(rates.items()))


def show(rates: Sequence[float]) -> str:
    """Mean over the seeds, and the lowest and the highest."""
    return f"{np.mean(rates):.0f} [{min(rates):.0f}, {max(rates):.0f}]" if len(rates) else "-"


def plot(path: Path, protocol: str, cells: Sequence[report.Cell]) -> None:
    """Success rate against environment steps: mean over the seeds, and the lowest and highest as a band.

    What has no online phase is a dotted line at its last policy's rate. Where a seed diverges the line ends in a cross.
    """
    from matplotlib.figure import Figure

    labels = [textwrap.fill(cell.algorithm, 90) for cell in cells]
    lines = sum(label.count("\n") + 1 for label in labels)
    figure = Figure(figsize=(7.0, 4.0 + 0.2 * lines), layout="constrained")
    axes = figure.add_subplot()
    for number, cell in enumerate(cells):
        style = line_style(number)
        color = style["color"]
        rates = success_rates(cell, "online")
        if not rates:
            if offline := list(success_rates(cell, "offline").values()):
                axes.axhline(np.mean(offline[-1]), color=color, linestyle=":", linewidth=1.5, label=labels[number])
            continue
        found = {step: values for step, values in rates.items() if len(values) == len(cell.members)}
        means = [float(np.mean(values)) for values in found.values()]
        axes.plot(list(found), means, label=labels[number], **style)
        low, high = ([pick(values) for values in found.values()] for pick in (min, max))
        axes.fill_between(list(found), low, high, color=color, alpha=0.12, linewidth=0)
        if found and len(found) < len(rates):
            axes.plot([list(found)[-1]], [means[-1]], "x", color=color)
    axes.set_xlabel("environment steps")
    axes.set_ylabel("success rate, %")
    axes.set_ylim(-3.0, 103.0)
    axes.set_title(f"{protocol}: mean over seeds; band from the lowest to the highest", fontsize=10)
    if axes.lines:
        axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18))
    axes.grid(alpha=0.2)
    figure.savefig(path, dpi=120)


def describe(found: dict[str, Any]) -> str:
    """What is in the data, as Markdown."""
    columns = ["", "episodes", "steps of each"]
    for angle in SHOWN_ANGLES:
        columns += [f"past {angle:g} rad", f"within {EPISODE_STEPS} steps"]
    human, clones = found["demonstrations"], found["clones"]
    sources = {"demonstrations": human}
    sources |= {f"clone of {one['updates']:,} updates, seed {one['seed']}": one for one in clones}
    sources |= {"all clones": found["trajectories"]}
    rows = []
    for source, data in sources.items():
        row = [source, str(data["episodes"]), "-".join(report.unique([str(data["shortest"]), str(data["longest"])]))]
        for angle in SHOWN_ANGLES:
            row += [str(data[name][f"{angle:g}"]) for name in ("past", f"past_within_{EPISODE_STEPS}")]
        rows.append(row)
    kept = found["protocols"]["success"]
    return (
        f"{markdown(columns, rows)}\nThe demonstrations are those of {human['source']}. Of the numbers in their "
        f"actions {100 * human['actions_beyond_bounds']:.1f} % were beyond [-1, 1], up to "
        f"{human['largest_action']:.2f}, and are clipped, as the simulator does. The door is open from "
        f"{found['angle']:g} rad on. The data of `success` are {kept['episodes']} episodes with "
        f"{kept['transitions']:,} steps in all.\n"
    )


def read_record(path: Path) -> dict[str, Any]:
    """The record in a data.json; UsageError for a file that is none."""
    if "protocols" not in (found := read_json(path)):
        raise UsageError(f"{path} is damaged, or not made by `prepare`")
    return found


def results_of(cells: Sequence[report.Cell]) -> str:
    """The table of a protocol, as Markdown."""
    rows = []
    for cell in cells:
        before = success_rates(cell, "online").get(0, []) if cell.final["online_steps"] else []
        rates = success_rates(cell, "online") or success_rates(cell, "offline")
        lost = sum(member["diverged"] is not None for member in cell.members)
        after = list(rates.values())[-1] if lost < len(cell.members) else []
        row = [cell.algorithm, cell.config["flags"]["preset"], str(cell.config["flags"]["batch_size"])]
        row += [f"{cell.final['updates']:,}", f"{cell.final['online_steps']:,}", show(before), show(after)]
        rows.append([*row, f"{len(cell.members)}" + (f", {lost} diverged" if lost else "")])
    columns = ["algorithm", "preset", "batch", "offline updates", "environment steps", "before these", "last policy"]
    return markdown([*columns, "seeds"], rows)


def write_page(args: Report) -> int:
    """Write README.md, success.csv (a row for each seed and evaluation) and a figure of each protocol; the status."""
    if not any(args.results.glob("*/config.json")):
        raise UsageError(f"{args.results} has no results: run `python benchmarks/adroit_door.py run` first")
    cells = report.read(args.results)
    if missing := [cell.run for cell in cells if any(not row.get("success_mean") for row in cell.evaluations)]:
        raise UsageError(f"{args.results}: {missing[0]} has no success rates; it is no run of this experiment")
    by_protocol = {protocol: [c for c in cells if protocol_of(c) == protocol] for protocol in PROTOCOLS}
    data, notes = args.results / "data.json", args.results / "notes.md"
    found = read_record(data) if data.exists() else None
    for protocol, own in by_protocol.items():
        digests = {cell.config["dataset_sha256"] for cell in own}
        if len(digests | ({found["protocols"][protocol]["digest"]} if found and own else set())) > 1:
            raise UsageError(f"{args.results} has results of {protocol} on different data; a page is of one")
    names = ("phase", "step", "seed", "success_mean", "return_mean", "episodes")
    path = args.results / "success.csv"
    path.unlink(missing_ok=True)
    Table(path).append(
        [
            {"protocol": protocol, "algorithm": cell.algorithm} | {name: row[name] for name in names}
            for protocol, own in by_protocol.items()
            for cell in own
            for row in cell.evaluations
        ]
    )
    often, last = (report.unique([cell.config["flags"][name] for cell in cells]) for name in EPISODES)
    parts = [
        "# The Adroit door\n",
        f"Made from the files beside it by `python benchmarks/adroit_door.py report --results {args.results}`. The "
        "task, the data and the two protocols are described at the head of that file.\n",
        "Success rate in per cent: the share of episodes in which the door is open at some step, "
        f"{' or '.join(map(str, last))} for each seed at the last policy and {' or '.join(map(str, often))} elsewhere. "
        "Mean over the seeds [the lowest, the highest] of the last policy, not of the best one. Each evaluation by "
        "itself: [success.csv](success.csv).\n",
        *([notes.read_text()] if notes.exists() else []),
    ]
    for protocol, own in by_protocol.items():
        if own:
            parts += [f"## Protocol `{protocol}`\n", results_of(own)]
            if any(success_rates(cell, "online") for cell in own):
                plot(args.results / f"{protocol}.png", protocol, own)
                parts += [f"![Success rate against environment steps]({protocol}.png)\n"]
    parts += ["## The data\n", describe(found)] if found else []
    parts += [report.speed(cells), report.origin(cells)]
    write_text(args.results / "README.md", "\n".join(parts))
    print(f"wrote {args.results / 'README.md'}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; the exit status."""
    args = read_flags(Prepare | Run | Report, argv, description=__doc__)
    if isinstance(args, Prepare):
        return prepare(args)
    return run(args) if isinstance(args, Run) else write_page(args)


if __name__ == "__main__":
    with exit_status():
        sys.exit(main())
