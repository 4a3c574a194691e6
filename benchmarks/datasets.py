"""List, collect and describe datasets.

python -m benchmarks.datasets                                  # the sets that need no network
python -m benchmarks.datasets build offax/hopper/medium-v0     # collect ahead of the first use; without ids, all
python -m benchmarks.datasets stats offax/hopper/medium-v0     # returns and endings of ids or files
python -m benchmarks.datasets export offax/hopper/medium-v0 medium.npz    # for an algorithm's file without the rest
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks import offax_sets
from benchmarks.offax_sets import datasets_root
from benchmarks.tables import aligned
from common.cli import exit_status
from common.data import Dataset, load, normalized_score
from common.replay import episode_returns
from common.report import write_atomically

STATISTICS = ("dataset", "env", "transitions", "episodes", "mean", "min", "max", "normalised", "terminated")


def statistics(dataset: Dataset) -> list[str]:
    """The columns of `STATISTICS`: returns of episodes, mean normalised return, share of episodes that terminated."""
    transitions, returns = dataset.transitions, episode_returns(dataset.transitions)
    scores = normalized_score(dataset.domain, returns)
    numbers = [f"{x:.1f}" for x in (returns.mean(), returns.min(), returns.max())]
    return [
        dataset.id,
        str(getattr(dataset.env_spec, "id", dataset.env_spec)),
        str(len(transitions.rewards)),
        str(len(returns)),
        *numbers,
        "-" if scores is None else f"{scores.mean():.1f}",
        f"{np.count_nonzero(transitions.terminations) / len(returns):.3f}",
    ]


def write_npz(dataset: Dataset, path: Path) -> Path:
    """Write the set as `load` reads it again: its actions in the environment's own range, the environment by its id."""
    columns = dataset.transitions._asdict()
    columns["actions"] = dataset.low + (columns["actions"] + 1.0) * (dataset.high - dataset.low) / 2.0
    env = str(getattr(dataset.env_spec, "id", dataset.env_spec))
    write_atomically(path, lambda file: np.savez(file, **columns, env=np.array(env)))
    return path


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; without a command it lists. SystemExit(2), with one line on stderr, for what does not work."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.datasets", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("list", help="the datasets that need no network, and whether they are on this disk (default)")
    build = commands.add_parser("build", help="collect offax datasets ahead of their first use")
    build.add_argument("ids", nargs="*", help="which (default: all)")
    stats = commands.add_parser("stats", help="table of returns and endings")
    stats.add_argument("ids", nargs="+", help="dataset ids, .npz or D4RL .hdf5 paths")
    stats.add_argument("--env", help="the environment, for files that do not name it")
    export = commands.add_parser("export", help="write a set as the .npz that a copied algorithm reads by itself")
    export.add_argument("id", help="dataset id or D4RL .hdf5 path")
    export.add_argument("path", nargs="?", type=Path, help="the file; default: the id with dashes, in this directory")
    export.add_argument("--env", help="the environment, for files that do not name it")
    args = parser.parse_args(argv)
    with exit_status():
        if args.command == "build":
            for dataset_id in args.ids or offax_sets.ids():
                print(offax_sets.ensure(dataset_id))
        elif args.command == "export":
            print(write_npz(load(args.id, args.env), args.path or Path(args.id.replace("/", "-")).with_suffix(".npz")))
        elif args.command == "stats":
            print(aligned(STATISTICS, [statistics(load(name, args.env)) for name in args.ids]))
        else:
            for dataset_id in offax_sets.ids():
                there = (datasets_root() / dataset_id / "data").exists()
                print(f"{dataset_id:36}{'on disk' if there else 'collected on first use'}")


if __name__ == "__main__":
    main()
