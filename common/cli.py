"""The command line: the flags that every script has, presets by domain, parsing, errors and exit status."""

import errno
import importlib
import io
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, NamedTuple, TextIO, TypeVar, get_type_hints

import numpy as np
import tyro
from tyro.conf import FlagConversionOff, OmitArgPrefixes

A = TypeVar("A", bound="RunArgs")


class UsageError(Exception):
    """Bad flag, data, checkpoint or directory. The message says in one line what is wrong and what to do."""


def one_line(error: Exception) -> str:
    """The first line of the error's message, or its name if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def say(text: str, stream: TextIO, end: str = "\n") -> None:
    """Write to a terminal, file or pipe; once that is closed or full, to nowhere: a run goes on."""
    try:
        print(text, end=end, file=stream, flush=True)
    except OSError:
        with suppress(OSError):  # a stream without a file
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def optional(module: str, needed_for: str = "") -> ModuleType | None:
    """Import a module that a copy may lack; if missing, None, or UsageError that names the flag `needed_for`."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name not in (module, module.partition(".")[0]):  # it is there, and lacks what it imports
            raise
    if needed_for:
        raise UsageError(f"{needed_for} needs {module.replace('.', '/')}.py; copy it too")
    return None


@contextmanager
def exit_status() -> Iterator[None]:
    """End the process as a script should: 2 and one line for what a user can mend, 130 after Ctrl-C."""
    try:
        yield
        return
    except KeyboardInterrupt:
        sys.exit(130)
    except UsageError as error:
        line = str(error)
    except BrokenPipeError:  # who read the output has left, as `head` does
        sys.exit(141)  # 128 + SIGPIPE
    except OSError as error:  # a full disk, a directory without permission, a file that is not there
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG):
            raise
        line = f"{error.filename or 'writing results'}: {error.strerror}"
    except RuntimeError as error:  # JAX's: an update needs more memory than was counted at the start
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        line = f"out of memory ({one_line(error)}); train fewer members at a time, or lower --batch-size"
    finally:
        say("", sys.stdout, end="")  # Python fails at the exit if it cannot write the rest
    say(" ".join(("error:", *line.split())), sys.stderr)
    sys.exit(2)


class Range(NamedTuple):
    """The finite values that a flag may take, as a mark on its type, and the words for them in an error."""

    words: str
    low: float
    high: float = sys.float_info.max


Count = Annotated[int, Range("at least 1, below 2^31", 1, 2**31 - 1)]
Share = Annotated[float, Range("from 0 to 1", 0, 1)]
NonNegative = Annotated[float, Range("finite and at least 0", 0)]
Positive = Annotated[float, Range("finite and above 0", float(np.finfo(np.float32).tiny))]  # in 32 bits


def check_ranges(flags: Any) -> None:
    """UsageError for a number outside its type's Range; without one an int must be at least 0, a float finite."""
    hints = get_type_hints(type(flags), include_extras=True)
    for name, value in (flags._asdict() if isinstance(flags, tuple) else vars(flags)).items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            whole = Range("at least 0, below 2^31", 0, 2**31 - 1)  # JAX counts with 32 bits
            free = whole if isinstance(value, int) else Range("finite", -sys.float_info.max)
            marks = getattr(hints[name], "__metadata__", ())
            words, low, high = next((mark for mark in marks if isinstance(mark, Range)), free)
            if not low <= value <= high:
                raise UsageError(f"--{name.replace('_', '-')} {value}: must be {words}")


@dataclass(frozen=True)
class RunArgs:
    """The flags that every script has; an algorithm's `Args` adds its own, and `hp`, a NamedTuple of floats."""

    dataset: str = "offax/hopper/medium-expert-v1"  # Minari id, OGBench name, or path of an .npz or .hdf5 file.
    env: str | None = None  # Gymnasium id to act in, `module:Name-v0` to import a module. Default: the dataset's.
    preset: str = "auto"  # Settings of a domain, listed below; auto: by the environment's or the dataset's name.
    seed: int = 0  # First seed; it decides networks, minibatches and evaluation.
    num_seeds: Count = 1  # Members with seeds seed, seed + 1, ..., trained in one process.
    grid: str = ""  # Values of the "hp options" to combine with each other and every seed: "discount=0.98,0.99".
    shard: str = ""  # I/N, I from 0: train every N-th member only, into part-I of --run-dir; see benchmarks/README.md.
    num_updates: int = 1_000_000  # Offline updates (the papers' million); 0: none, and with --env no data are read.
    online_steps: int = 0  # Environment steps after the offline phase, an update each (AWR: in iterations); 0: none.
    random_steps: int = 5_000  # With --num-updates 0, the first steps: uniform actions, no updates (CleanRL's SAC).
    batch_size: Count = 256  # Transitions in a minibatch (the papers of IQL, TD3+BC and SAC).
    eval_every: int = 10_000  # Updates (online: environment steps) between evaluations; 0: only at the end (ours).
    eval_episodes: Count = 10  # Episodes for each member in an evaluation (IQL's and TD3+BC's papers).
    final_eval_episodes: Count = 100  # Episodes for each member in the last evaluation (ours).
    max_episode_steps: int = 0  # Cut episodes after so many steps: no score then; 0: the environment's limit or 10,000.
    checkpoint_every: int = 50_000  # Updates (online: steps) per checkpoint; 0: at evaluations and the end only (ours).
    run_dir: str | None = None  # Where results go. Default: runs/<algorithm>/<dataset>/<time>.
    keep_best: bool = False  # Keep each member's best evaluated policy beside the last one, in checkpoint/best.npz.
    resume: bool = False  # Continue from the last checkpoint in --run-dir, or start there if there is none.
    normalize_observations: bool = False  # Centre and scale states by the dataset's mean and standard deviation.
    normalize_returns: bool = False  # Scale rewards by 1000 / (largest - smallest episode return of the dataset).
    reward_scale: float = 1.0  # Multiplies every reward, offline and online.
    reward_shift: float = 0.0  # Added to every reward after scaling, offline and online.
    track: bool = False  # Log to Weights & Biases too; always on under a sweep agent.
    wandb_project: str = "offax"  # Project of the Weights & Biases runs.
    wandb_group: str | None = None  # Group of the members' runs. Default: algorithm, dataset and time.
    wandb_entity: str | None = None  # Weights & Biases user or team. Default: yours.
    quiet: bool = False  # No progress on stderr.

    def validate(self) -> None:
        """UsageError for a number out of range, or flags that do not go together."""
        for flags in (self, *(self.hp._replace(**values) for values in parse_grid(self.grid, self.hp._fields))):
            check_ranges(flags)
        if self.seed + self.num_seeds > 2**31:
            raise UsageError(f"--seed {self.seed}: seeds must be less than 2^31")
        if not self.num_updates and self.online_steps <= self.random_steps:
            raise UsageError(f"--num-updates 0: --online-steps must be above --random-steps, {self.random_steps}")
        if (self.resume or self.shard) and not self.run_dir:
            raise UsageError(f"{'--resume True' if self.resume else '--shard'} needs --run-dir, the run's directory")


def parse_grid(grid: str, names: tuple[str, ...]) -> list[dict[str, float]]:
    """Combinations of `"beta=1,3,10 expectile=0.7,0.9"`, the last name varying fastest; `[{}]` for an empty grid.

    UsageError for a name that is not among `names`, a value that is no finite number, or anything given twice.
    """
    values: dict[str, list[float]] = {}
    for part in grid.split():
        name, _, numbers = part.partition("=")
        name = name.replace("-", "_")
        if name not in names or name in values:
            what = f"{name} is given twice" if name in values else f'"{name}" is nothing that members may differ in'
            raise UsageError(f"--grid: {what}; choose from {', '.join(names)}")
        values[name] = []
        with suppress(ValueError):
            values[name] = [float(number) for number in numbers.split(",")]
        if not np.isfinite(values[name]).all() or not values[name] or len(set(values[name])) < len(values[name]):
            raise UsageError(f'--grid: "{part}" is not of the form name=value,value, with finite numbers that differ')
    return [dict(zip(values, combination, strict=True)) for combination in itertools.product(*values.values())]


def refuse_sweep(args: RunArgs, unused: set[str], where: str) -> None:
    """UsageError if --grid sweeps a name in `unused`; `where` says when it has no effect: "with --flag value"."""
    for name in sorted(unused.intersection(parse_grid(args.grid, args.hp._fields)[0])):
        raise UsageError(f"--grid: {name} has no effect {where}")


# Families of environments that share settings; a pattern matches the start of the env's name or of a dataset part.
FAMILIES = {
    "ogbench": r"ogbench$|.*-singletask|(cube|scene|puzzle|antsoccer|\w+maze-\w+-(navigate|stitch|explore))-",
    "antmaze": r"ant[_-]?maze",
    "locomotion": r"(hopper|halfcheetah|walker2d|ant|humanoid|swimmer)(?![a-z])",
    "kitchen": r"(franka)?kitchen(?![a-z])",
    "adroit": r"(adroithand)?(pen|door|hammer|relocate)(?![a-z])",
}


def env_name(env_id: str) -> str:
    """`hopper` for `gymnasium.envs.mujoco:Hopper-v5`: without module, namespace and version."""
    return re.sub(r".*[:/]|-v\d+$", "", env_id).lower()


def preset_name(dataset: str, env: str | None) -> str:
    """The family of the name of `env`, else of the dataset: of an .npz the `env` in it, or else its name; or `none`."""
    names = [env_name(env)] if env else []
    for one in [dataset] if os.path.exists(os.path.expanduser(dataset)) else dataset.split("+"):  # a name may have "+"
        if (suffix := Path(one).suffix.lower()) == ".npz" and not env:
            with suppress(Exception), np.load(Path(one).expanduser(), allow_pickle=False) as file:  # `load` tells
                names.append(env_name(np.ravel(file["env"]).astype(str)[0]))
                continue  # where the environment is known, a file's name says nothing
        names += ([] if env else [Path(one).name]) if suffix in (".npz", ".hdf5", ".h5") else one.split("/")
    return next((family for x in names for family, start in FAMILIES.items() if re.match(start, x.lower())), "none")


def read_flags(args_type: Any, args: Sequence[str] | None = None, **options: Any) -> Any:
    """What `tyro.cli` makes of a command line; UsageError, in one line, for a usage error. Exit 0 after --help."""
    try:
        with redirect_stderr(io.StringIO()) as said:
            return tyro.cli(args_type, args=args, config=(FlagConversionOff, OmitArgPrefixes), **options)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        # tyro prints a box, or rules where there is no terminal: a title, what is wrong, hints, where to get help.
        parts = re.split(r"[╭╮╰╯─]{2,}|-{5,}", said.getvalue().replace("│", " "))
        parts = [" ".join(x.split()) for x in parts if x.strip() and "For full helptext" not in x]
        raise UsageError(f"{'; '.join(parts[1:] or parts)} (see --help)") from None


def parse(args_type: type[A], presets: dict[str, dict[str, Any]], argv: list[str] | None = None) -> A:
    """An `args_type` of the flags given, else the preset's values, else the defaults; it names the preset in use."""
    argv = sys.argv[1:] if argv is None else argv
    plain, fields, shared = args_type(), args_type.__dataclass_fields__, RunArgs.__dataclass_fields__
    args_type.__dataclass_fields__ = dict(sorted(fields.items(), key=lambda x: x[0] in shared))  # in --help, own first
    if stale := set(itertools.chain(*presets.values())) - {*fields, *plain.hp._fields}:
        raise UsageError(f"PRESETS has {', '.join(sorted(stale))}, which neither Hyperparameters nor Args has")
    switches, given = {name for name, field in fields.items() if field.type is bool}, []
    for word, following in zip(argv, [*argv[1:], "--"], strict=False):  # --track by itself is --track True
        alone = following.startswith(("--", "-h")) and word[:2] == "--" and word[2:].replace("-", "_") in switches
        given += [word, "True"] if alone else [word]
    chosen = read_flags(args_type, [word for word in given if word not in ("-h", "--help")], default=plain)
    if chosen.preset not in ("auto", "none", *presets):
        raise UsageError(f"--preset {chosen.preset}: choose from auto, none, {', '.join(presets)}")
    data = chosen.dataset if chosen.num_updates or not chosen.env else ""  # "": no dataset is read
    preset = preset_name(data, chosen.env) if chosen.preset == "auto" else chosen.preset
    preset = preset if preset in presets else "none"
    settings = presets.get(preset, {})
    hp = {name: value for name, value in settings.items() if name in plain.hp._fields}
    try:
        default = replace(plain, hp=plain.hp._replace(**hp), **{k: settings[k] for k in settings if k not in hp})
        args = replace(read_flags(args_type, given, default=default), preset=preset)
    except SystemExit:  # after --help
        listed = [f"  {name}: " + ", ".join(f"{k} {v}" for k, v in presets[name].items()) for name in presets]
        print(f"\npresets; the defaults above are those of: {preset}", *listed, sep="\n")
        print(f'\n--grid sweeps any of the "hp options": {", ".join(plain.hp._fields)}')
        raise
    args.validate()
    for name in parse_grid(args.grid, plain.hp._fields)[0]:
        if getattr(chosen.hp, name) != getattr(plain.hp, name):
            raise UsageError(f"--grid sweeps {name}: leave out --{name.replace('_', '-')}, which would have no effect")
    return args


def launch(main: Callable[[A], None], args_type: type[A], presets: dict[str, dict[str, Any]]) -> None:
    """Parse the command line, run `main`, and end with the exit status of a script.

    0 done; 2 bad usage or bad data, one line on stderr; 3 every member diverged; 128 + n after signal n.
    """
    sys.stdout, sys.stderr = (x or open(os.devnull, "w") for x in (sys.stdout, sys.stderr))  # noqa: SIM115
    with suppress(AttributeError):  # which a notebook's stdout raises
        sys.stdout.reconfigure(errors="backslashreplace")  # a letter that the terminal lacks must not end a run
    with exit_status():
        main(parse(args_type, presets))
