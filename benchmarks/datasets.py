"""List, collect and describe datasets.

python -m benchmarks.datasets                                  # the sets that need no network, and all on this disk
python -m benchmarks.datasets build offax/hopper/medium-v0     # collect ahead of the first use; without ids, all
python -m benchmarks.datasets stats offax/hopper/medium-v0     # returns and endings; without ids, of all on disk
python -m benchmarks.datasets export offax/hopper/medium-v0 medium.npz    # for an algorithm's file without the rest
"""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import offax_sets, sources
from benchmarks.offax_sets import datasets_root
from benchmarks.tables import aligned
from common.cli import UsageError, exit_status
from common.data import Dataset, load, normalized_score
from common.replay import Transitions, episode_returns
from common.report import read_json, write_atomically

STATISTICS = ("dataset", "env", "transitions", "episodes", "mean", "min", "max", "normalised", "terminated", "MB")


def statistics(dataset: Dataset) -> list[str]:
    """The columns of `STATISTICS` but its size: returns of episodes, mean normalised one, share that terminated."""
    transitions, returns = dataset.transitions, episode_returns(dataset.transitions)
    scores = normalized_score(dataset.domain, returns)
    numbers = [f"{x:.1f}" for x in (returns.mean(), returns.min(), returns.max())]
    return [
        dataset.id,
        str(getattr(dataset.env_spec, "id", dataset.env_spec or "-")),
        str(len(transitions.rewards)),
        str(len(returns)),
        *numbers,
        "-" if scores is None else f"{scores.mean():.1f}",
        f"{np.count_nonzero(transitions.terminations) / len(returns):.3f}",
    ]


def on_disk() -> dict[str, dict[str, Any]]:
    """What the metadata of each set in Minari's directory say of it, by its id; nothing, where they are damaged."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(datasets_root().glob("**/data/metadata.json")):
        name = path.parents[1].relative_to(datasets_root()).as_posix()
        if not name.startswith("."):  # else it is being made
            found[name] = {}
            with suppress(UsageError):
                found[name] = read_json(path)
    return found


def megabytes(name: str) -> float | None:
    """Size on disk of a file, or of a set with all that is in its directory."""
    path = next((path for path in (Path(name).expanduser(), datasets_root() / name) if path.exists()), None)
    files = [path, *path.rglob("*")] if path else []
    return sum(file.stat().st_size for file in files if file.is_file()) / 1e6 if files else None


def row_of(name: str, env: str | None) -> list[Any]:
    """The columns of `STATISTICS` for an id or a file, or several joined by "+"; no environment is made of an id.

    A set on disk that cannot be read, or is not of vectors, has what its metadata say, and a line on stderr says why.
    UsageError for another one that cannot be read.
    """
    try:
        return [*statistics(sources.load(os.path.expanduser(name), env)), megabytes(name)]
    except UsageError as error:
        if (about := on_disk().get(name)) is None:
            raise
        print(f"{name}: {error}", file=sys.stderr)
    spec = re.search(r'"id": "([^"]+)"', str(about.get("env_spec")))
    known = [spec and spec[1], about.get("total_steps"), about.get("total_episodes")]
    return [name, *known, *[None] * (len(STATISTICS) - 5), megabytes(name)]


def write_npz(dataset: Dataset, path: Path) -> Path:
    """Write the set as `load` reads it again: its actions in the environment's own range, the environment by its id."""
    columns = {name: getattr(dataset.transitions, name) for name in Transitions._fields}
    columns["actions"] = dataset.low + (columns["actions"] + 1.0) * (dataset.high - dataset.low) / 2.0
    env = str(getattr(dataset.env_spec, "id", dataset.env_spec))
    write_atomically(path, lambda file: np.savez(file, **columns, env=np.array(env)))
    return path


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; without a command it lists. SystemExit(2), with one line on stderr, for what does not work."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.datasets", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("list", help="the datasets that need no network, and all of Minari's on this disk (default)")
    build = commands.add_parser("build", help="collect offax datasets ahead of their first use")
    build.add_argument("ids", nargs="*", help="which (default: all)")
    stats = commands.add_parser("stats", help="table of returns and endings")
    stats.add_argument("ids", nargs="*", help="dataset ids, .npz or D4RL .hdf5 paths (default: all on this disk)")
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
            print(aligned(STATISTICS, [row_of(name, args.env) for name in args.ids or on_disk()]))
        else:
            there = on_disk()
            for name in [*offax_sets.ids(), *sorted(there.keys() - offax_sets.ids())]:
                state = "collected on first use"
                if name in there:
                    rows = there[name].get("total_steps", "?")
                    state = f"on disk, {rows} transitions, {megabytes(name):.1f} MB"
                print(f"{name:36}{state}")


if __name__ == "__main__":
    main()
