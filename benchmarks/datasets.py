"""List, collect, describe and export datasets.

python -m benchmarks.datasets                                  # the sets that need no network, and all on this disk
python -m benchmarks.datasets build offax/hopper/medium-v1     # collect ahead of first use; default: all -v1, no -1m
python -m benchmarks.datasets stats offax/hopper/medium-v1     # returns, endings, spread; default: of all of Minari's
python -m benchmarks.datasets export offax/hopper/medium-v1 medium.npz    # for an algorithm's file without the rest
"""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from benchmarks import offax_sets, ogbench_sets, sources
from benchmarks.families import domain_of, normalized_score, returns_of_data, trajectories, wrappers_of
from benchmarks.offax_sets import datasets_root
from benchmarks.provenance import provenance
from benchmarks.tables import aligned, commit_of, write_text
from common.cli import UsageError, exit_status
from common.data import Dataset, load
from common.replay import Transitions
from common.report import read_json, write_atomically

STATISTICS = {
    "dataset": "",
    "env": "",
    "transitions": "",
    "episodes": "",
    "return": "mean of the episodes, undiscounted",
    "min": "",
    "max": "",
    "score": "mean of the episodes, by D4RL's reference returns; on OGBench those with success, in %",
    "mode": "mean return of the mean actions of the policies that made it, which a perfect clone of each would take; "
    "measured apart, over the number of episodes that the policies' file names",
    "mode_score": "that return by D4RL's reference returns",
    "terminated": "share of the episodes",
    "action_std": "standard deviation of the actions, in [-1, 1], mean of the dimensions",
    "coverage": "standard deviation of the observations along their principal axes, geometric mean: the side of the "
    "box that they fill, whatever the number of rows; without numbers that never change, such as 24 of Ant's forces",
    "MB": "on disk",
}


def statistics(dataset: Dataset) -> list[str]:
    """The columns of `STATISTICS` but its size."""
    transitions, domain = dataset.transitions, domain_of(dataset.env_spec)
    found, mode = returns_of_data(dataset.env_spec, transitions), offax_sets.mean_action_return(dataset.id)
    mode_score = None if mode is None else normalized_score(domain, np.array(mode))
    terminated = np.count_nonzero(transitions.terminations) / found["episodes"]
    if domain == "success":  # whose data go on after the goal, each step of it terminal
        terminated = trajectories(transitions)[1].mean()
    shown = [*(found[name] for name in ("mean", "min", "max", "score_mean")), mode, mode_score]

    return [
        dataset.id,
        str(getattr(dataset.env_spec, "id", dataset.env_spec or "-")),
        str(len(transitions.rewards)),
        str(found["episodes"]),
        *("-" if x is None else f"{x:.1f}" for x in shown),
        f"{terminated:.3f}",
        f"{transitions.actions.std(axis=0).mean():.3f}",
        f"{coverage(transitions.observations):.3f}",
    ]


def coverage(observations: np.ndarray) -> float:
    """Geometric mean of the standard deviations of `observations [rows, obs_dim]` along their principal axes.

    Without the columns that are constant; 0 where all are.
    """
    varying = observations[:, np.ptp(observations, axis=0) > 0]
    if not varying.size:
        return 0.0
    variances = np.linalg.eigvalsh(np.atleast_2d(np.cov(varying.T.astype(float), bias=True)))
    return float(np.prod(np.maximum(variances, 0.0) ** (0.5 / len(variances))))


def on_disk() -> dict[str, dict[str, Any]]:
    """What the metadata of each set in Minari's directory say of it, by its id; nothing, where they are damaged."""
    found: dict[str, dict[str, Any]] = {}
    root = datasets_root()
    for folder, _, files in sorted(os.walk(root, followlinks=True)):
        path = Path(folder, "metadata.json")
        of_set = path.parent.name == "data" and path.parent != root
        name = path.parents[1].relative_to(root).as_posix() if of_set else "."
        if "metadata.json" in files and "/." not in f"/{name}":  # in a hidden folder it is being made
            found[name] = {}
            with suppress(UsageError):
                found[name] = read_json(path)
    return found


def megabytes(name: str) -> float | None:
    """Size on disk of a file, or of a set with all that is in its directory."""
    path = next((path for path in (datasets_root() / name, Path(name).expanduser()) if path.exists()), None)
    if path is None:
        return None
    inside = [Path(folder, file) for folder, _, files in os.walk(path, followlinks=True) for file in files]
    return sum(file.stat().st_size for file in [path, *inside] if file.is_file()) / 1e6


def row_of(name: str, env: str | None) -> list[Any]:
    """The columns of `STATISTICS` for an id or a file, or several joined by "+".

    The environment of one of Minari's sets is not made, and need not be installed. A set on disk that cannot be read,
    or is not of vectors, has what its metadata say, and a line on stderr says why. UsageError for another one that
    cannot be read.
    """
    try:
        return [*statistics(sources.load(os.path.expanduser(name), env)), megabytes(name)]
    except UsageError as error:
        if (about := on_disk().get(name)) is None:
            raise
        text = " ".join(str(error).split())
        print(text if text.startswith(name) else f"{name}: {text}", file=sys.stderr)
    spec = re.search(r'"id": "([^"]+)"', str(about.get("env_spec")))
    known = [spec and spec[1], about.get("total_steps"), about.get("total_episodes")]
    return [name, *known, *[None] * (len(STATISTICS) - 5), megabytes(name)]


def plain_id(spec: Any) -> str | None:
    """The id by which `gymnasium.make` alone makes the environment; None where it has options or wrappers besides."""
    import gymnasium as gym

    if isinstance(spec, str):
        return spec
    known, options = gym.registry.get(spec.id), {k: v for k, v in spec.kwargs.items() if k != "original"}
    own = (options, spec.max_episode_steps, wrappers_of(spec))
    if known is None or own != (known.kwargs, known.max_episode_steps, ()):
        return None
    entry = known.entry_point
    package = re.split(r"[.:]", entry if isinstance(entry, str) else entry.__module__)[0]  # which registers the id
    return spec.id if package in ("gymnasium", "__main__") else f"{package}:{spec.id}"


def write_npz(dataset: Dataset, path: Path) -> Path:
    """Write the set as `load` reads it again: its actions in the environment's own range, the environment by its id."""
    if path.is_dir() or path.suffix.lower() != ".npz":
        raise UsageError(f"{path} is {'a directory' if path.is_dir() else 'no .npz'}; name an .npz file to write")
    columns = {name: getattr(dataset.transitions, name) for name in Transitions._fields}
    if np.any(dataset.low != -1.0) or np.any(dataset.high != 1.0):  # else to the last bit as they are
        columns["actions"] = dataset.low + (columns["actions"] + 1.0) * (dataset.high - dataset.low) / 2.0
    if (env := plain_id(dataset.env_spec)) is not None:
        columns["env"] = np.array(env)
    else:
        own = [wrapper.name for wrapper in wrappers_of(dataset.env_spec)] or ["options"]
        what = f"{dataset.env_spec.id} has {', '.join(own)} here, which its id has not: {path} names no environment"
        print(f"{what}; load it with --env module:Name, an id of yours that has them", file=sys.stderr)
    write_atomically(path, lambda file: np.savez(file, **columns))
    return path


def write_page(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    """The table with what its columns are, and what made it."""
    about = provenance()
    versions = ", ".join(f"{package} {about['versions'][package]}" for package in ("mujoco", "gymnasium", "numpy"))
    lines = [
        "# The built-in datasets",
        "",
        *(f"- `{column}`: {meaning}" for column, meaning in STATISTICS.items() if meaning),
        "",
        "```",
        f"$ python -m benchmarks.datasets stats {' '.join(str(row[0]) for row in rows)} --page {path}",
        aligned(list(STATISTICS), rows),
        "```",
        "",
        f"- commit: {commit_of(about)}",
        f"- processor: {about['cpu']['model']}, {about['cpu']['cores']} cores; {versions}",
        "",
    ]
    write_text(path, "\n".join(lines))


class Parser(argparse.ArgumentParser):
    """One whose usage errors are a line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see --help)")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; without a command it lists. SystemExit(2), with one line on stderr, for what does not work."""
    parser = Parser(prog="python -m benchmarks.datasets", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("list", help="the datasets that need no network, and all of Minari's on this disk (default)")
    build = commands.add_parser("build", help="collect offax/... and ogbench/... sets ahead of their first use")
    build.add_argument("ids", nargs="*", help="which (default: all of offax/... but those of a million transitions)")
    stats = commands.add_parser("stats", help="table of returns and endings")
    stats.add_argument(
        "ids", nargs="*", help="ids, or paths of .npz or .hdf5 files (default: all of Minari's on this disk)"
    )
    stats.add_argument("--env", help="the environment, instead of the set's own or where a file names none")
    stats.add_argument("--page", type=Path, help="write the table and what its columns are into this page too")
    export = commands.add_parser("export", help="write a set as the .npz that a copied algorithm reads by itself")
    export.add_argument("id", help="what --dataset takes")
    export.add_argument("path", nargs="?", type=Path, help="default: the id with dashes or the file's name, here")
    export.add_argument("--env", help="the environment, instead of the set's own or where a file names none")
    with exit_status():
        args = parser.parse_args(argv)
        if args.command == "build":
            known = {name: offax_sets.parse(name) for name in offax_sets.ids()}
            for name in args.ids or [name for name, of in known.items() if not of.size]:
                print((ogbench_sets if name.startswith("ogbench/") else offax_sets).ensure(name))
        elif args.command == "export":
            file = Path(args.id).expanduser()
            path = args.path or Path(file.name if file.exists() else args.id.replace("/", "-")).with_suffix(".npz")
            read = [part for part in (file, *(Path(x).expanduser() for x in args.id.split("+"))) if part.exists()]
            if path.exists() and any(map(path.samefile, read)):
                raise UsageError(f"{path} is the set itself or a part of it; name another file to write")
            print(write_npz(load(args.id, args.env), path))
        elif args.command == "stats":
            rows = [row_of(name, args.env) for name in args.ids or on_disk()]
            if args.page:
                write_page(args.page, rows)
            print(aligned(list(STATISTICS), rows))
        else:
            there = on_disk()
            for name in [*offax_sets.ids(), *sorted(there.keys() - offax_sets.ids())]:
                state = "collected on first use"
                if name in there:
                    rows = there[name].get("total_steps", "?")
                    state = f"on disk, {rows} transitions, {megabytes(name):.1f} MB"
                print(f"{name:50}{state}")
            sizes = [f"-local{size or ''}-" for size in ogbench_sets.SIZES]
            for name in [name.replace("-local-", size) for size in sizes for name in ogbench_sets.ids()]:
                made = (datasets_root() / name / "manifest.json").exists()
                print(f"{name:50}{'on disk' if made else 'collected on first use, with the extra ogbench'}")


if __name__ == "__main__":
    main()
