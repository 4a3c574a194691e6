"""Two CPU devices for every test, compiled programs shared within the session, and a tiny dataset for whole runs."""

import importlib
import itertools
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

_own_cache = "JAX_COMPILATION_CACHE_DIR" not in os.environ
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="offax-tests-"))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")  # which line an operation is of: an eighth of a run
# Compiling is most of the tests' time: small programs need no optimisation, and XLA's older emitters take a third of
# the time of its newer ones. Without fused multiply-adds they too give every layout of a population the same bits.
# Each program is compiled in one piece: to split it pays where a core is idle, and here both have work.
_flags = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
if platform.machine() == "x86_64":
    _flags += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_max_isa=SSE4_2"]
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_flags])
for _name in [name for name in os.environ if name.startswith("WANDB_")]:
    del os.environ[_name]

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from benchmarks import intervals  # noqa: E402
from common.cli import RunArgs, launch, parse  # noqa: E402
from common.members import Metrics  # noqa: E402
from common.runs import Run  # noqa: E402

ROOT = Path(__file__).parents[1]
OBS_DIM, ACTION_DIM = 11, 3  # of Hopper-v5
SMALLER = {  # what small runs of one algorithm need beside the flags of `small_run`
    "iql": {"actor_decay_updates": 0},  # a constant rate: runs of every length share their compiled programs
    "awr": {"value_updates": 2, "policy_updates": 5, "samples_per_iteration": 12, "buffer_size": 2000},
    "emaq": {
        "num_proposals": 4,
        "num_critics": 2,
        "behavior_updates": 4,
        "embedding_dim": 8,
        "embedding_layers": 1,
        "num_bins": 4,
        "head_dim": 8,
        "head_layers": 1,
    },
}


@pytest.fixture(scope="session", autouse=True)
def devices() -> Iterator[None]:
    """Start JAX now, before a run of one member would claim a single CPU device for the whole session."""
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.devices()
    intervals.BLOCKS = 1  # every run and page has intervals, and few tests look at them
    yield
    if _own_cache:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


def hopper_like(size: int = 400) -> dict[str, np.ndarray]:
    """Arrays with Hopper's sizes: episodes of 20 steps that end in turn by termination and by truncation."""
    rng = np.random.default_rng(0)
    observations = rng.normal(size=(size + 1, OBS_DIM)).astype(np.float32)
    last, odd = np.arange(size) % 20 == 19, np.arange(size) // 20 % 2 == 1
    return {
        "observations": observations[:-1],
        "actions": rng.uniform(-1, 1, (size, ACTION_DIM)).astype(np.float32),
        "rewards": rng.normal(size=size).astype(np.float32),
        "next_observations": observations[1:],
        "terminations": last & odd,
        "truncations": last & ~odd,
    }


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An .npz of 400 transitions for Hopper-v5."""
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    np.savez(path, **hopper_like())
    return path


@pytest.fixture(scope="session")
def small_run(tiny: Path) -> list[str]:
    """Flags of the smallest run: everything but its length and its directory."""
    return [
        *("--dataset", str(tiny), "--env", "Hopper-v5", "--preset", "none", "--hidden-dim", "8", "--batch-size", "16"),
        *("--eval-episodes", "1", "--final-eval-episodes", "1", "--quiet", "True"),
    ]


def smaller(name: str) -> list[str]:
    """What an algorithm's script needs beside the flags of `small_run`."""
    return [word for flag, size in SMALLER.get(name, {}).items() for word in (f"--{flag.replace('_', '-')}", str(size))]


def rows_of(path: Path) -> list[dict[str, str]]:
    """The rows of a table, every one of them whole."""
    header, *lines = path.read_text().split("\n")
    assert lines.pop() == ""
    return [dict(zip(header.split(","), line.split(","), strict=True)) for line in lines]


def assert_same_tables(one: Path, other: Path) -> None:
    """Two runs wrote the same rows of metrics and evaluations."""
    for name in ("metrics.csv", "evaluations.csv"):
        assert (one / name).read_text() == (other / name).read_text(), name


def parsed(words: list[str]) -> RunArgs:
    """The words of `python algorithms/<name>.py ...`, read as the script itself does."""
    interpreter, program, *flags = words
    assert interpreter == "python" and (ROOT / program).is_file()
    module = importlib.import_module(program.removesuffix(".py").replace("/", "."))
    return parse(module.Args, module.PRESETS, flags)


def means(metrics: Metrics) -> dict[str, np.ndarray]:
    """The means of a chunk's metrics by name; NaN for one that no update had."""
    with np.errstate(invalid="ignore"):
        return {name: np.asarray(total) / np.asarray(metrics.counts[name]) for name, total in metrics.sums.items()}


def arrays_of(directory: Path) -> dict[str, np.ndarray]:
    """The arrays of a run's checkpoint by name."""
    with np.load(directory / "checkpoint" / "state.npz", allow_pickle=False) as file:
        return {name: file[name] for name in file.files if name != "metadata"}


def edit_metadata(directory: Path, **changes: Any) -> None:
    """Change what a run's checkpoint says beside its arrays."""
    path = directory / "checkpoint" / "state.npz"
    with np.load(path, allow_pickle=False) as file:
        metadata = json.loads(file["metadata"].tobytes()) | changes
    np.savez(path, **arrays_of(directory), metadata=np.frombuffer(json.dumps(metadata).encode(), np.uint8))


def assert_same_arrays(one: Path, other: Path) -> None:
    """The checkpoints of two runs hold the same, to the last bit."""
    first, second = arrays_of(one), arrays_of(other)
    assert first.keys() == second.keys() and len(first) > 20
    for name in first:
        assert first[name].tobytes() == second[name].tobytes(), name


def done_in(directory: Path) -> dict[str, int]:
    """How many steps of each phase a run's checkpoint has behind it."""
    with np.load(directory / "checkpoint" / "state.npz", allow_pickle=False) as file:
        return json.loads(file["metadata"].tobytes())["done"]


class Outcome(NamedTuple):
    """What a command did."""

    status: int
    out: str
    err: str


def assert_refused(outcome: Outcome, *words: str) -> None:
    """Status 2 and one line on stderr that has the words."""
    assert outcome.status == 2, outcome.err
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1, outcome.err
    for word in words:
        assert word in outcome.err


@pytest.fixture
def terminal() -> Iterator[None]:
    """Signals as at a terminal: a background job of a shell ignores SIGINT, nohup SIGHUP, and children inherit that."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@contextmanager
def signalled_after(stretch: int, number: int = signal.SIGTERM) -> Iterator[None]:
    """Runs in this context are signalled after the updates of their n-th stretch, before it is recorded."""
    original, calls = Run.record, []

    def interrupted(self: Run, *arguments: Any) -> None:
        calls.append(self)
        if len(calls) == stretch:
            signal.raise_signal(number)
        original(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "record", interrupted)
        yield


def crossed(first: Iterable[Any], second: Iterable[Any]) -> list[Any]:
    """Every pair as parameters of a test; only those of the same place in both are in the default run."""
    return [
        pytest.param(a, b, marks=[pytest.mark.slow] * (i != j))
        for (i, a), (j, b) in itertools.product(enumerate(first), enumerate(second))
    ]


@pytest.fixture
def blank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are saved blank: drawing them is a fifth of a small run, and most of a page's time."""
    monkeypatch.setattr(Figure, "draw", lambda *_: None)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], blank: None) -> Callable[..., Outcome]:
    """`script(name, *flags)`: the command line of an algorithm, in this process; or of `package="benchmarks"`.

    Its figures are blank: to draw them is what test_curves and test_grid do.
    """

    def call(name: str, *flags: object, package: str = "algorithms") -> Outcome:
        module = importlib.import_module(f"{package}.{name}")
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, flags)])
        capfd.readouterr()
        status = 0
        try:
            launch(module.main, module.Args, module.PRESETS)
        except SystemExit as stop:
            status = stop.code
        return Outcome(status, *capfd.readouterr())

    return call


@pytest.fixture
def iql(script: Callable[..., Outcome]) -> Callable[..., Outcome]:
    """`iql(*flags)`: the command line of IQL, in this process."""
    return partial(script, "iql")


@pytest.fixture(scope="session")
def spawn() -> Callable[..., subprocess.Popen]:
    """`spawn(*arguments)`: Python in a process of its own, with the repository importable."""

    def start(*arguments: object, **options: object) -> subprocess.Popen:
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([sys.executable, *map(str, arguments)], **pipes | {"env": env} | options)

    return start
