"""Choose behaviour policies from the snapshots of a SAC run and put them into the package.

    python benchmarks/sac.py --env Hopper-v5 --run-dir runs/sac/Hopper-v5
    python benchmarks/behavior_policies.py runs/sac/Hopper-v5

Snapshots are measured by the return of sampled actions, which is how the datasets are collected, after rounding the
weights to float16, which is how they are shipped.

* expert: the best of the last snapshots of the run;
* medium: the first snapshot at a third to a half of the expert's return, after at least seven that are not better
  than that; without one, the closest;
* mixed_0 ... mixed_7: snapshots evenly spaced among those not better, from the first to medium, which is mixed_7.

It writes `<env>.npz` and the run's training curve `<env>_training.csv`. Doing it again is harmless: datasets made by
other weights are recognised by their hash and collected anew.
"""

import csv
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from benchmarks import offax_sets
from benchmarks.offax_sets import Layers
from common.cli import UsageError, exit_status
from common.data import normalized_score
from common.environments import quiet_mujoco
from common.report import write_atomically

NUM_MIXED = 8
MEDIUM_BAND = (1 / 3, 1 / 2)
MAX_BYTES = 4_000_000


@dataclass(frozen=True)
class Args:
    """Which run, and how closely to measure its snapshots."""

    # Directory of the SAC run; its name is the environment's id unless --env says otherwise.
    run_dir: Annotated[Path, tyro.conf.Positional]
    env: str | None = None  # Gymnasium id, e.g. Hopper-v5.
    out_dir: Path = offax_sets.POLICIES  # Where the two files go (default: into the package).
    steps: int = 10_000  # Environment steps per measurement; a choice is confirmed with four times as many.
    num_last: int = 5  # How many of the last snapshots may become the expert.


def read_snapshot(path: Path) -> Layers:
    """Layers of a snapshot, rounded to float16."""
    with np.load(path, allow_pickle=False) as file:
        depth = sum(name.startswith("w") for name in file.files)
        return [(file[f"w{i}"].astype(np.float16), file[f"b{i}"].astype(np.float16)) for i in range(depth)]


def measure(env_id: str, layers: Layers, steps: int, seed: int) -> float:
    """Mean return of the whole episodes among `steps` environment steps of sampled actions."""
    exact = [(w.astype(float), b.astype(float)) for w, b in layers]
    quiet_mujoco()
    episodes = offax_sets.collect(env_id, exact, steps, [seed], num_envs=10)
    return float(np.mean([episode.rewards.sum() for episode in episodes[:-1] or episodes]))


def choose(env_id: str, paths: list[Path], args: Args) -> dict[str, tuple[Path, float]]:
    """Policy name -> snapshot and measured return."""

    def measured(path: Path, steps: int, seed: int) -> float:
        value = measure(env_id, read_snapshot(path), steps, seed)
        print(f"{path.stem} return {value:.1f} over {steps} steps", flush=True)
        return value

    if len(paths) < NUM_MIXED + 1:
        raise UsageError(f"{args.run_dir} has {len(paths)} snapshots, at least {NUM_MIXED + 1} are needed")
    best = max(paths[-args.num_last :], key=lambda path: measured(path, args.steps, 0))
    expert = measured(best, 4 * args.steps, 1)
    low, high = (fraction * expert for fraction in MEDIUM_BAND)
    returns: list[float] = []
    poorer: list[int] = []  # snapshots that a mixture up to medium may have
    candidates: dict[int, tuple[float, list[int]]] = {}  # distance to the band, and the mixture
    for index, path in enumerate(paths):
        returns.append(measured(path, args.steps, 0))
        if len(poorer) >= NUM_MIXED - 1 and low <= returns[index] <= high:  # a hit must hold when measured again
            returns[index] = measured(path, 4 * args.steps, 1)
        if len(poorer) >= NUM_MIXED - 1:
            spread = np.linspace(0, len(poorer) - 1, NUM_MIXED - 1).round().astype(int)
            distance = abs(float(np.clip(returns[index], low, high)) - returns[index])
            candidates[index] = distance, [*(poorer[i] for i in spread), index]
            if distance == 0.0:
                break
        if returns[index] <= high:
            poorer.append(index)
    if not candidates:
        raise UsageError(
            f"{args.run_dir} has fewer than {NUM_MIXED - 1} snapshots poorer than medium: take more of them"
        )
    _, mixture = min(candidates.values())
    return {"expert": (best, expert)} | {
        f"mixed_{number}": (paths[index], returns[index]) for number, index in enumerate(mixture)
    }


def main(args: Args) -> None:
    """Measure, choose and write; UsageError if the directory is not that of a long enough SAC run."""
    env_id = args.env or args.run_dir.resolve().name
    names = {env_id: name for name, env_id in offax_sets.ENVS.items()}
    if env_id not in names:
        raise UsageError(f"{env_id} has no offax datasets; name one of {', '.join(names)} with --env")
    name = names[env_id]
    curve = args.run_dir / "training.csv"
    paths = sorted((args.run_dir / "snapshots").glob("*.npz"))
    if not curve.exists() or not paths:
        raise UsageError(f"{args.run_dir} is not the directory of a SAC run: it needs training.csv and snapshots/")
    with open(curve) as file:
        print(f"{env_id}: {list(csv.DictReader(file))[-1]['steps']} steps of training, {len(paths)} snapshots")
    arrays: dict[str, np.ndarray] = {}
    for policy, (path, value) in choose(env_id, paths, args).items():
        score = normalized_score(name, np.array(value))
        print(f"{policy}: step {int(path.stem)} return {value:.1f} normalised {score:.1f}")
        arrays |= {f"{policy}/steps": np.array(int(path.stem)), f"{policy}/return_mean": np.array(value)}
        for i, (w, b) in enumerate(read_snapshot(path)):
            arrays |= {f"{policy}/w{i}": w, f"{policy}/b{i}": b}
    if sum(array.nbytes for array in arrays.values()) > MAX_BYTES:
        raise UsageError(f"the policies take more than {MAX_BYTES} bytes; train smaller networks")
    args.out_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(args.out_dir / f"{name}.npz", lambda file: np.savez_compressed(file, **arrays))
    shutil.copyfile(curve, args.out_dir / f"{name}_training.csv")
    print(f"wrote {args.out_dir / name}.npz and {args.out_dir / name}_training.csv")


if __name__ == "__main__":
    with exit_status():
        main(tyro.cli(Args))
