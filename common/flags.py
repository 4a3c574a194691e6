"""The command line: the flags that every script has, presets by domain, parsing, exit status."""

import dataclasses
import io
import re
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar, get_type_hints

import numpy as np
import tyro

from common.errors import UsageError, exit_status
from common.populations import parse_grid

A = TypeVar("A", bound="RunArgs")


@dataclass(frozen=True)
class Range:
    """The values that a flag may take, written into its type."""

    low: float
    high: float = np.inf
    above: bool = False
    """Whether `low` itself is excluded."""

    def check(self, flag: str, value: float) -> None:
        """UsageError for a number out of range or not finite."""
        if isinstance(value, float) and not np.isfinite(value):
            raise UsageError(f"{flag} {value}: must be finite")
        if value < self.low or value > self.high or (self.above and value == self.low):
            limit = f"at most {self.high:g}" if value > self.high else f"at least {self.low:g}"
            raise UsageError(f"{flag} {value}: must be {f'above {self.low:g}' if self.above else limit}")


Count = Annotated[int, Range(1)]
Share = Annotated[float, Range(0, 1)]
NonNegative = Annotated[float, Range(0)]
Positive = Annotated[float, Range(0, above=True)]


@dataclass(frozen=True)
class RunArgs:
    """The flags that every script has."""

    dataset: str = "offax/hopper/medium-expert-v0"
    """Minari id, or path of an .npz or a D4RL .hdf5 file."""
    env: str | None = None
    """Gymnasium id to evaluate in. Default: the dataset's own environment."""
    preset: str = "auto"
    """Named settings of the domain (see PRESETS in the script), under the flags given; auto: by the name of the
    dataset; none: the defaults shown here."""
    seed: int = 0
    """First seed; it decides networks, minibatches and evaluation."""
    num_seeds: Count = 1
    """Members with seeds seed, seed + 1, ..., trained in one process."""
    grid: str = ""
    """Hyperparameter values to combine with each other and with every seed: "beta=1,3,10 expectile=0.7,0.9"."""
    num_updates: int = 1_000_000
    """Offline gradient updates (the papers' million). With 0 the dataset serves only --env and the transforms."""
    online_steps: int = 0
    """Environment steps of fine-tuning after the offline phase, with one update each; 0: none."""
    batch_size: Count = 256
    """Transitions in a minibatch (the papers of IQL, TD3+BC and SAC)."""
    eval_every: int = 10_000
    """Updates (online: environment steps) between evaluations; 0: only at the end (ours)."""
    eval_episodes: Count = 10
    """Episodes for each member in an evaluation (IQL's and TD3+BC's papers)."""
    final_eval_episodes: Count = 100
    """Episodes for each member in the last evaluation (ours)."""
    checkpoint_every: int = 50_000
    """Updates (online: environment steps) between checkpoints; 0: only at the end of a phase (ours)."""
    run_dir: str | None = None
    """Where results go. Default: runs/<algorithm>/<dataset>/<time>."""
    resume: bool = False
    """Continue from the last checkpoint in --run-dir, or start there if there is none."""
    normalize_observations: bool = False
    """Centre and scale states by the dataset's mean and standard deviation."""
    normalize_returns: bool = False
    """Scale rewards by 1000 / (largest - smallest episode return of the dataset)."""
    reward_scale: float = 1.0
    """Multiplies every reward, offline and online."""
    reward_shift: float = 0.0
    """Added to every reward after scaling, offline and online."""
    track: bool = False
    """Log to Weights & Biases too; always on under a sweep agent."""
    wandb_project: str = "offax"
    """Project of the Weights & Biases runs."""
    wandb_group: str | None = None
    """Group of the members' runs. Default: algorithm, dataset and time."""
    wandb_entity: str | None = None
    """Weights & Biases user or team. Default: yours."""
    distributed: bool = False
    """Share the members out between processes, on this machine or on many, each on its own devices; started by srun, or
    with JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID set. Process 0 writes the results."""
    quiet: bool = False
    """No progress bar."""

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def validate(self) -> None:
        """UsageError for a number out of range: the type's own, or else at least 0 for whole numbers and any float."""
        for name, value in dataclasses.asdict(self).items():
            if name != "hp":
                _check(type(self), name, value)
        for combination in parse_grid(self.grid, self.hp):
            for name, value in (self.hp._asdict() | combination).items():
                _check(type(self.hp), name, value)
        if self.seed + self.num_seeds > 2**31:
            raise UsageError(f"--seed {self.seed}: seeds must be less than 2^31")
        if self.num_updates + self.online_steps == 0:
            raise UsageError("--num-updates 0 and --online-steps 0: nothing to do")


def refuse_sweep(args: RunArgs, unused: set[str], where: str) -> None:
    """UsageError if --grid sweeps one of the hyperparameters that are `unused` `where` ("with --flag value")."""
    for name in sorted(unused.intersection(parse_grid(args.grid, args.hp)[0])):
        raise UsageError(f"--grid: {name} has no effect {where}")


def _check(owner: type, name: str, value: Any) -> None:
    """UsageError if the number `value` is out of the range in the type of the field `name` of `owner`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    metadata = getattr(get_type_hints(owner, include_extras=True)[name], "__metadata__", ())
    ranges = [item for item in metadata if isinstance(item, Range)]
    default = Range(0) if isinstance(value, int) else Range(-np.inf)
    (ranges[0] if ranges else default).check(f"--{name.replace('_', '-')}", value)


# Families of environments that share settings, by how the parts of a dataset's or environment's name begin.
PRESET_PATTERNS = {
    "antmaze": r"ant_?maze",
    "locomotion": r"(hopper|halfcheetah|walker2d|ant|humanoid|swimmer)(?![a-z])",
    "kitchen": r"(franka)?kitchen(?![a-z])",
    "adroit": r"(adroithand)?(pen|door|hammer|relocate)(?![a-z])",
}


def preset_name(args: RunArgs) -> str:
    """--preset, or for auto what the environment's or the dataset's name (of a file, its own) stands for; or none."""
    if args.preset != "auto":
        return args.preset
    is_file = Path(args.dataset).suffix.lower() in (".npz", ".hdf5", ".h5")
    names = [Path(args.dataset).name] if is_file else args.dataset.split("/")
    for name in [*(args.env or "").split("/"), *names]:
        for preset, pattern in PRESET_PATTERNS.items():
            if re.match(pattern, name.lower()):
                return preset
    return "none"


def choose_preset(args: RunArgs, presets: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The settings of the preset that applies; UsageError if --preset names one that the script does not have."""
    if args.preset not in ("auto", "none", *presets):
        raise UsageError(f"--preset {args.preset}: choose from auto, none, {', '.join(presets)}")
    return presets.get(preset_name(args), {})


def parse(args_type: type[A], presets: dict[str, dict[str, Any]], argv: list[str] | None = None) -> A:
    """Flags into `args_type`; those not given come from the preset, then from the class.

    UsageError, in one line, for a bad flag; SystemExit(0) after --help.
    """
    config = (tyro.conf.FlagConversionOff, tyro.conf.OmitArgPrefixes)

    def run_parser(default: A) -> A:
        out, err = io.StringIO(), io.StringIO()
        try:
            with redirect_stdout(out), redirect_stderr(err):
                return tyro.cli(args_type, args=argv, default=default, config=config)
        except SystemExit as stop:
            if stop.code in (0, None):
                print(out.getvalue(), end="")
                raise
            # tyro prints a box, or rules where there is no terminal: a title, what is wrong, hints, where to get help.
            text = (err.getvalue() + out.getvalue()).replace("│", " ")
            parts = [" ".join(part.split()) for part in re.split(r"[╭╮╰╯─]{2,}|-{5,}", text)]
            parts = [part for part in parts if part and not part.startswith("For full helptext")]
            raise UsageError(f"{'; '.join(parts[1:] or parts)} (see --help)") from None

    def with_preset(settings: dict[str, Any]) -> A:
        plain = args_type()
        hp = {name: value for name, value in settings.items() if name in plain.hp._fields}
        others = {name: value for name, value in settings.items() if name not in hp}
        return plain.replace(hp=plain.hp._replace(**hp), **others)

    return run_parser(with_preset(choose_preset(run_parser(args_type()), presets)))


def launch(main: Callable[[A], None], args_type: type[A], presets: dict[str, dict[str, Any]]) -> None:
    """Parse the command line, run `main`, and end with the exit status of the contract.

    0 done; 2 bad usage or bad data, one line on stderr; 3 every member diverged; 128 + n after signal n.
    """
    with exit_status():
        args = parse(args_type, presets)
        args.validate()
        main(args)
