"""Choose behaviour policies from the snapshots of a SAC run and put them into the package.

    python benchmarks/sac.py --env Hopper-v5 --report-every 5000 --run-dir runs/sac/Hopper-v5
    python benchmarks/behavior_policies.py runs/sac/Hopper-v5

A snapshot has two returns: of sampled actions, which make the data, and of the mean action, which a perfect clone of it
takes. Both are measured after rounding the weights to float16, which is how they are shipped: every snapshot over a few
episodes, and the best of those, from which is chosen, over `--episodes`.

* expert: of the last 40 % of the run, the one with the highest smaller return;
* medium: of those before, one with both returns at a third to a half of the expert's and a mean action that is as good
  as its samples (within the standard error), the nearest to D4RL's medium; without one, the least off, which is said;
* mixed_0 ... mixed_15: the course of training up to medium, which is mixed_15, evenly spaced in steps from the first
  snapshot. D4RL's medium-replay is the replay buffer itself, whose rows would take 15 to 20 MB per environment here.

It writes `<env>.npz` (weights, steps, returns and the number of their episodes), the run's training curve
`<env>_training.csv`, and `<env>_snapshots.csv`: every measurement. These grow in the run's directory, as snapshots.csv,
from which a run that is stopped goes on. Doing it again is harmless: datasets made by other weights are recognised by
their hash and collected anew.
"""

import math
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import tyro

from benchmarks import offax_sets
from benchmarks.families import REFERENCE_RETURNS, normalized_score, quiet_mujoco
from benchmarks.offax_sets import Episode, Layers, process_map, run_episodes
from benchmarks.tables import Table
from common.cli import Count, Range, UsageError, check_ranges, exit_status, read_flags
from common.members import usable_cores
from common.report import read_npz, write_atomically

Several = Annotated[int, Range("at least 2", 2)]  # of which one can say how far they are apart
NUM_MIXED = 16
MEDIUM_BAND = (1 / 3, 1 / 2)
LAST_PART = 0.6  # of the run; the expert is later than this, medium earlier
# Of D4RL's medium sets; of Ant, the middle between a third and a half of the aim.
MEDIUM_SCORES = {"hopper": 44.0, "halfcheetah": 41.0, "walker2d": 62.0, "ant": 42.0}
AIMS = {"hopper": 95.0, "halfcheetah": 85.0, "walker2d": 95.0, "ant": 100.0}  # for both returns of the expert
MAX_BYTES = 4_000_000


@dataclass(frozen=True)
class Args:
    """Which run, and how closely to measure its snapshots."""

    # Directory of the SAC run; its name is the environment's id unless --env says otherwise.
    run_dir: Annotated[Path, tyro.conf.Positional]
    env: str | None = None  # Gymnasium id, e.g. Hopper-v5.
    out_dir: Path = offax_sets.policy_file("").parent  # Where the files go (default: into the package).
    episodes: Several = 50  # Episodes of each kind for the snapshots of which one is chosen.
    screening: Several = 5  # Episodes of each kind for every snapshot.
    finalists: Count = 6  # Snapshots measured again, for expert and for medium.


class Measured(NamedTuple):
    """Mean returns of a snapshot over `episodes` episodes of sampled actions and as many of the mean action."""

    steps: int
    episodes: int
    sampled: float
    mean_action: float
    standard_error: float  # of the difference of the two

    @property
    def smaller(self) -> float:
        return min(self.sampled, self.mean_action)


Measure = Callable[[Sequence[int], int], list[Measured]]  # snapshots, by their steps, over at least so many episodes


def read_snapshot(path: Path) -> Layers:
    """Layers of a snapshot, rounded to float16."""
    arrays = read_npz(path)
    depth = sum(name.startswith("w") for name in arrays)
    return [(arrays[f"w{i}"].astype(np.float16), arrays[f"b{i}"].astype(np.float16)) for i in range(depth)]


def measure(env_id: str, path: Path, episodes: int, run: Callable[..., Iterable[list[Episode]]] = map) -> Measured:
    """Play the snapshot, its samples and its mean action at once if `run` can."""
    layers = [(w.astype(float), b.astype(float)) for w, b in read_snapshot(path)]
    play = partial(run_episodes, env_id, layers, [episodes], range(episodes))
    returns = [[episode.rewards.sum() for episode in found] for found in run(play, (False, True))]
    sampled, mean_action = np.mean(returns, axis=1)
    error = np.sqrt(np.var(returns, axis=1, ddof=1).sum() / episodes)
    return Measured(int(path.stem), episodes, float(sampled), float(mean_action), float(error))


def faults(found: Measured, band: tuple[float, float]) -> dict[str, float]:
    """What keeps a snapshot from being medium, and by how much of a return."""
    off = {
        "sampled return outside the band": abs(found.sampled - np.clip(found.sampled, *band)),
        "mean action's return outside the band": abs(found.mean_action - np.clip(found.mean_action, *band)),
        "mean action poorer than samples": found.sampled - found.standard_error - found.mean_action,
    }
    return {what: float(value) for what, value in off.items() if value > 0}


def choose(steps: Sequence[int], measure: Measure, target: float, args: Args) -> dict[str, Measured]:
    """The policies among the snapshots; `target` is the return that medium should have."""
    if LAST_PART * len(steps) < NUM_MIXED:
        raise UsageError(f"{len(steps)} snapshots are too few: {math.ceil(NUM_MIXED / LAST_PART)} are needed")
    last = [step for step in steps if step > LAST_PART * steps[-1]]
    finalists = sorted(measure(last, args.screening), key=lambda found: -found.smaller)[: args.finalists]
    expert = max(measure([found.steps for found in finalists], args.episodes), key=lambda found: found.smaller)
    band = (MEDIUM_BAND[0] * expert.smaller, MEDIUM_BAND[1] * expert.smaller)
    nearest = float(np.clip(target, *band))

    def unfitness(found: Measured) -> tuple[float, float]:
        return sum(faults(found, band).values()), abs(found.sampled - nearest)

    earlier = [step for step in steps[NUM_MIXED - 1 :] if step <= LAST_PART * steps[-1]]
    finalists = sorted(measure(earlier, args.screening), key=unfitness)[: args.finalists]
    medium = min(measure([found.steps for found in finalists], args.episodes), key=unfitness)
    print(f"medium: sampled return {medium.sampled:.0f}, wanted {nearest:.0f} of {band[0]:.0f} to {band[1]:.0f}")
    for what, value in faults(medium, band).items():
        print(f"medium: {what} by {value:.0f}")
    course = np.linspace(steps[0], medium.steps, NUM_MIXED)[:-1]
    mixed = measure([min(steps, key=lambda step, at=at: abs(step - at)) for at in course], args.screening)
    return {"expert": expert} | {f"mixed_{i}": found for i, found in enumerate([*mixed, medium])}


def main(args: Args) -> None:
    """Measure, choose and write; UsageError if the directory is not that of a long enough SAC run."""
    check_ranges(args)
    env_id = args.env or args.run_dir.resolve().name
    names = {env_id: name for name, env_id in offax_sets.ENVS.items()}
    if env_id not in names:
        raise UsageError(f"{env_id} has no offax datasets; name one of {', '.join(names)} with --env")
    name = names[env_id]
    curve = args.run_dir / "training.csv"
    paths = {int(path.stem): path for path in sorted((args.run_dir / "snapshots").glob("*.npz"))}
    if not curve.exists() or not paths:
        raise UsageError(f"{args.run_dir} is not the directory of a SAC run: it needs training.csv and snapshots/")
    print(f"{env_id}: {Table(curve).read()[-1]['steps']} steps of training, {len(paths)} snapshots")
    quiet_mujoco()
    low, high = REFERENCE_RETURNS[name]
    args.out_dir.mkdir(parents=True, exist_ok=True)
    table = Table(args.run_dir / "snapshots.csv")  # of this run: another one's snapshots have the same steps
    fields = Measured.__annotations__.items()
    rows = [Measured(*(kind(row[field]) for field, kind in fields)) for row in table.read()]
    known = {found.steps: found for found in sorted(rows, key=lambda found: found.episodes)}  # the longest of each

    with process_map(min(usable_cores(), 2)) as run:

        def measured(steps: Sequence[int], episodes: int) -> list[Measured]:
            for step in steps:
                if step not in known or known[step].episodes < episodes:
                    known[step] = found = measure(env_id, paths[step], episodes, run)
                    table.append([found._asdict()])
                    print(" ".join(f"{field} {value:.0f}" for field, value in found._asdict().items()), flush=True)
            return [known[step] for step in steps]

        chosen = choose(list(paths), measured, low + MEDIUM_SCORES[name] / 100 * (high - low), args)
    arrays: dict[str, Any] = {}
    for policy, found in chosen.items():
        sampled, mean_action = normalized_score(name, np.array([found.sampled, found.mean_action]))
        print(f"{policy}: step {found.steps} score of samples {sampled:.1f}, of the mean action {mean_action:.1f}")
        if policy == "expert" and (missing := AIMS[name] - min(sampled, mean_action)) > 0:
            print(f"expert: {missing:.1f} below the aim of {AIMS[name]:.0f}")
        arrays |= {f"{policy}/{field}": np.array(value) for field, value in found._asdict().items()}
        for i, (w, b) in enumerate(read_snapshot(paths[found.steps])):
            arrays |= {f"{policy}/w{i}": w, f"{policy}/b{i}": b}
    if sum(array.nbytes for array in arrays.values()) > MAX_BYTES:
        raise UsageError(f"the policies take more than {MAX_BYTES} bytes; train smaller networks")
    write_atomically(args.out_dir / f"{name}.npz", lambda file: np.savez_compressed(file, **arrays))
    shutil.copyfile(curve, args.out_dir / f"{name}_training.csv")
    shutil.copyfile(table.path, args.out_dir / f"{name}_snapshots.csv")
    print(f"wrote {args.out_dir / name}.npz and {args.out_dir / name}_training.csv")


if __name__ == "__main__":
    with exit_status():
        main(read_flags(Args))
