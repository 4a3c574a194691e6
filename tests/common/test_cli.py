"""The contract of the command line: flags, presets, ranges, help, and every bad flag in one line."""

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT

from algorithms.iql import PRESETS, Args
from common import cli
from common.cli import UsageError, parse, preset_name

CONTRACT = [
    *("dataset", "env", "seed", "num-seeds", "grid", "shard", "num-updates", "online-steps", "eval-every"),
    *("eval-episodes", "final-eval-episodes", "checkpoint-every", "run-dir", "resume", "track", "wandb-project"),
    *("wandb-group", "wandb-entity", "quiet"),
]


def test_every_flag_of_the_contract_in_both_spellings() -> None:
    values = dict.fromkeys(
        ("dataset", "env", "run-dir", "wandb-project", "wandb-group", "wandb-entity", "shard"), "word"
    )
    values |= dict.fromkeys(("resume", "track", "quiet"), "True") | {"grid": "beta=1,2"}
    values = {flag: values.get(flag, "17") for flag in CONTRACT}
    for spelled in (str, lambda flag: flag.replace("-", "_")):
        apart = [word for flag, value in values.items() for word in (f"--{spelled(flag)}", value)]
        for argv in (apart, [f"--{spelled(flag)}={value}" for flag, value in values.items()]):
            args = parse(Args, PRESETS, argv)
            for flag, value in values.items():
                expected = {"True": True, "17": 17}.get(value, value)
                assert getattr(args, flag.replace("-", "_")) == expected, (flag, argv)
    assert parse(Args, PRESETS, ["--quiet=False", "--resume", "False"]).quiet is False


def test_hyperparameters_are_flat_flags() -> None:
    args = parse(Args, PRESETS, ["--beta=0.5", "--actor_learning_rate", "1e-4", "--preset", "none"])
    assert args.hp == args.hp._replace(beta=0.5, actor_learning_rate=1e-4)


def test_defaults_of_the_contract() -> None:
    args = parse(Args, PRESETS, [])
    assert args.dataset == "offax/hopper/medium-expert-v1"
    assert (args.track, args.resume, args.quiet, args.online_steps, args.grid) == (False, False, False, 0, "")


@pytest.mark.parametrize(
    "argv",
    [
        ["--no-such-flag", "1"],
        ["--num-seeds", "three"],
        ["--num-seeds", "1.5"],
        ["--quiet", "maybe"],
        ["--beta", "large"],
        ["--dataset"],
        ["stray"],
    ],
)
def test_bad_flags_are_one_line(argv: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        parse(Args, PRESETS, argv)
    message = str(caught.value)
    assert "\n" not in message and argv[0].lstrip("-") in message


def chosen(*argv: str) -> Args:
    return parse(Args, PRESETS, list(argv))


def test_what_tyro_answers_by_itself_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        chosen("--tyro-print-completion", "bash")
    assert not stop.value.code and "complete" in capsys.readouterr().out


def test_a_switch_by_itself_is_meant() -> None:
    args = chosen("--track", "--wandb-group", "resume", "--normalize_returns", "--quiet", "False", "--keep-best")
    assert (args.track, args.wandb_group, args.normalize_returns) == (True, "resume", True)
    assert (args.quiet, args.keep_best, args.resume) == (False, True, False)
    with pytest.raises(SystemExit, match="0"):
        chosen("--quiet", "-h")


def test_presets_follow_the_names_and_flags_win() -> None:
    assert chosen("--dataset", "offax/walker2d/medium-v1").normalize_returns is True
    assert chosen("--dataset", "D4RL/antmaze/umaze-v1").reward_shift == -1
    assert chosen("--dataset", "D4RL/antmaze/umaze-v1").hp.expectile == 0.9
    assert chosen("--dataset", "D4RL/antmaze/umaze-v1", "--expectile", "0.8").hp.expectile == 0.8
    assert chosen("--dataset", "D4RL/door/human-v2").dropout == 0.1
    assert chosen("--dataset", "mine.npz", "--env", "Hopper-v5").normalize_returns is True
    assert chosen("--dataset", "mine.npz", "--env", "Hopper-v5", "--preset", "none").normalize_returns is False
    assert chosen("--dataset", "mine.npz").hp == Args().hp


def test_the_preset_of_a_run_without_data_is_that_of_its_environment_alone() -> None:
    assert chosen("--env", "Pendulum-v1").preset == "locomotion", "that of the default dataset"
    assert chosen("--env", "Pendulum-v1", "--num-updates", "0", "--online-steps", "9999").preset == "none"
    assert chosen("--env", "Hopper-v5", "--num-updates", "0", "--online-steps", "9999").preset == "locomotion"


def test_the_preset_is_on_record() -> None:
    assert chosen("--dataset", "offax/walker2d/medium-v1").preset == "locomotion"
    assert chosen("--dataset", "mine.npz").preset == "none"
    assert chosen("--dataset", "mine.npz", "--preset", "adroit").preset == "adroit"


@pytest.mark.parametrize(
    ("dataset", "env", "expected"),
    [
        ("/data/Ant_maze_u-maze_noisy.hdf5", None, "antmaze"),
        ("/home/anthony/x.npz", None, "none"),
        ("/home/penny/ant/x.npz", None, "none"),
        ("files/hopper_medium-v2.hdf5", None, "locomotion"),
        ("mujoco/ant/medium-v0", None, "locomotion"),
        ("x.npz", "AdroitHandPen-v1", "adroit"),
        ("x.npz", "FrankaKitchen-v1", "kitchen"),
        ("x.npz", "Pendulum-v1", "none"),
        ("x.npz", "AntMaze_UMaze-v4", "antmaze"),
        ("x.npz", "gymnasium.envs.mujoco:Hopper-v5", "locomotion"),
        ("x.npz", "gymnasium_robotics:AdroitHandDoor-v1", "adroit"),
        ("D4RL/kitchen/mixed-v2", "gymnasium_robotics:FrankaKitchen-v1", "kitchen"),
        ("cube-single-play-singletask-v0", None, "ogbench"),
        ("antmaze-large-navigate-singletask-task2-v0", None, "ogbench"),
        ("ogbench/pointmaze-medium-navigate-local-v0", None, "ogbench"),
        ("~/.ogbench/data/humanoidmaze-medium-stitch-v0.npz", None, "ogbench"),
        ("x.npz", "scene-singletask-v0", "ogbench"),
        ("antmaze-large-play-v2.hdf5", None, "antmaze"),
        ("my/ant-maze-umaze-v0", None, "antmaze"),
        ("D4RL/pointmaze/large-dense-v2", None, "none"),
        ("extra.npz+offax/hopper/medium-v1", None, "locomotion"),
        ("offax/hopper/medium-v1+extra.npz", None, "locomotion"),
        ("antmaze-large-play-v2.hdf5+extra.npz", None, "antmaze"),
        ("x.npz+y.npz", "AdroitHandPen-v1", "adroit"),
    ],
)
def test_presets_match_whole_names(dataset: str, env: str | None, expected: str) -> None:
    assert preset_name(dataset, env) == expected


def test_the_preset_of_a_file_is_that_of_the_environment_named_in_it(tmp_path: Path) -> None:
    np.savez(tmp_path / "mine.npz", env=np.array("Walker2d-v5"), rewards=np.zeros(3))
    np.savez(tmp_path / "hopper.npz", env=np.array({}, object))  # pickled: not looked into
    assert preset_name(str(tmp_path / "mine.npz"), None) == "locomotion"
    assert preset_name(str(tmp_path / "mine.npz"), "AdroitHandPen-v1") == "adroit"
    assert preset_name(str(tmp_path / "hopper.npz"), None) == "locomotion"
    np.savez(tmp_path / "a+b.npz", env=np.array("AdroitHandPen-v1"))
    assert preset_name(str(tmp_path / "a+b.npz"), None) == "adroit", "one file"
    assert preset_name(f"more.npz+{tmp_path / 'mine.npz'}", None) == "locomotion"
    np.savez(tmp_path / "door.npz", env=np.array("lab:Robot-v0"))
    assert preset_name(str(tmp_path / "door.npz"), None) == "none", "how a file is called says less"
    assert preset_name(str(tmp_path / "mine.npz"), "lab:Robot-v0") == "none"
    assert preset_name(f"{tmp_path / 'door.npz'}+{tmp_path / 'door.npz'}", None) == "none"
    assert preset_name("door-human-v1.hdf5", "lab:Robot-v0") == "none"
    assert preset_name("D4RL/door/human-v2", "lab:Robot-v0") == "adroit", "an environment changed for its data"


def test_unknown_presets_are_refused() -> None:
    with pytest.raises(UsageError, match="choose from auto, none"):
        chosen("--preset", "nonsense")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--num-seeds", "0"], "--num-seeds 0"),
        (["--num-seeds", "-1"], "--num-seeds -1"),
        (["--num-updates", "-5"], "--num-updates -5"),
        (["--num-updates", "0"], "must be above --random-steps, 5000"),
        (["--online-steps", "-1"], "--online-steps -1"),
        (["--num-updates", "0", "--online-steps", "5000"], "--random-steps"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--eval-every", "-1"], "--eval-every -1"),
        (["--eval-episodes", "0"], "--eval-episodes 0"),
        (["--final-eval-episodes", "0"], "--final-eval-episodes 0"),
        (["--checkpoint-every", "-1"], "--checkpoint-every -1"),
        (["--max-episode-steps", "-1"], "--max-episode-steps -1"),
        (["--num-critics", "0"], "--num-critics 0"),
        (["--num-updates", "10000000000"], "--num-updates 10000000000: must be at least 0, below 2^31"),
        (["--actor-decay-updates", "10000000000"], "--actor-decay-updates 10000000000: must be"),
        (["--expectile", "1.5"], "--expectile 1.5: must be from 0 to 1"),
        (["--grid", "expectile=0.7,-0.1"], "--expectile -0.1: must be from 0 to 1"),
        (["--weight-clip", "0"], "--weight-clip 0.0: must be finite and above 0"),
        (["--actor-learning-rate", "-1e-3"], "--actor-learning-rate -0.001: must be finite and at least 0"),
        (["--hidden-dim", "0"], "--hidden-dim 0"),
        (["--seed", "-1"], "--seed -1"),
        (["--seed", "99999999999999999999"], "--seed"),
        (["--seed", str(2**31 - 1), "--num-seeds", "2"], "--seed"),
        (["--reward-scale", "nan"], "--reward-scale nan"),
        (["--beta", "nan"], "--beta nan"),
        (["--discount", "inf"], "--discount inf"),
        (["--resume", "True"], "--run-dir"),
        (["--shard", "0/2"], "--run-dir"),
        (["--grid", "alpha=1,2"], "alpha"),
        (["--grid", "=1,2"], '"" is nothing that members may differ in'),
        (["--grid", "beta=1,3", "--beta", "5"], "--grid sweeps beta: leave out --beta"),
        (["--grid", "hidden_dim=8,16"], "hidden_dim"),
    ],
)
def test_numbers_out_of_range_are_one_line(flags: list[str], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        chosen(*flags)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("seed", [0, 20241126, 2**31 - 1])
def test_seeds_are_31_bits(seed: int) -> None:
    assert chosen("--seed", str(seed)).seed == seed


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UsageError("two\nlines"), 2, "error: two lines\n"),
        (OSError(28, "No space left on device"), 2, "error: writing results: No space left on device\n"),
        (PermissionError(13, "Permission denied", "x.csv"), 2, "error: x.csv: Permission denied\n"),
        (IsADirectoryError(21, "Is a directory", "x/"), 2, "error: x/: Is a directory\n"),
        (OSError(27, "File too large"), 2, "error: writing results: File too large\n"),
        (
            RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.\nmore"),
            2,
            "error: out of memory (RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.); train fewer members at a"
            " time, or lower --batch-size\n",
        ),
        (BrokenPipeError(32, "Broken pipe"), 141, ""),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_exit_statuses(error: BaseException, status: int, line: str, monkeypatch: Any, capsys: Any) -> None:
    def main(_: Args) -> None:
        raise error

    monkeypatch.setattr("sys.argv", ["iql.py"])
    with pytest.raises(SystemExit) as caught:
        cli.launch(main, Args, PRESETS)
    assert (caught.value.code, capsys.readouterr().err) == (status, line)


def test_a_module_that_was_not_copied_is_done_without_unless_a_flag_needs_it() -> None:
    assert cli.optional("benchmarks.no_such_module") is None
    with pytest.raises(UsageError, match=r"^--track True needs benchmarks/no_such_module.py; copy it too$"):
        cli.optional("benchmarks.no_such_module", "--track True")


def test_a_preset_of_what_a_copy_has_renamed_is_named() -> None:
    with pytest.raises(UsageError, match="PRESETS has temperature, which neither"):
        parse(Args, PRESETS | {"mine": {"temperature": 3.0, "beta": 3.0}}, [])


def test_a_copy_without_benchmarks_has_the_same_presets(monkeypatch: pytest.MonkeyPatch) -> None:
    with_it = chosen("--env", "Hopper-v5")
    monkeypatch.setattr(cli, "optional", lambda *_: None)
    assert chosen("--env", "Hopper-v5") == with_it
    assert with_it.preset == "locomotion"


def test_what_no_user_can_mend_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (RuntimeError("a bug"), ConnectionResetError(104, "reset")):

        def main(_: Args, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr("sys.argv", ["iql.py"])
        with pytest.raises(type(error)):
            cli.launch(main, Args, PRESETS)


@pytest.mark.parametrize("program", ["algorithms/iql.py", "benchmarks/datasets.py"])
def test_who_reads_the_output_may_leave(program: str, spawn: Callable[..., subprocess.Popen]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    process = spawn(ROOT / program, *(["--help"] if "algorithms" in program else []), stdout=writing)
    os.close(writing)
    assert process.communicate(timeout=120)[1] == ""
    assert process.returncode in (0, 141), "0 where all of it fitted the buffer"


def test_help_is_quick_and_documents_every_flag(spawn: Callable[..., subprocess.Popen]) -> None:
    process = spawn(
        ROOT / "algorithms" / "iql.py", "--help", env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    )
    out, err = process.stdout.read(), process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert (process.returncode, err) == (0, "")
    assert usage.ru_utime + usage.ru_stime < 3.0  # the processor's time: the clock's depends on what else runs
    entries = re.split(r"\n\s+(?=--\w|-h)", re.sub("[╭╮╰╯─│]", " ", out))
    documented = {}
    for entry in entries[1:]:
        text = re.sub(r"[\s│|]+", " ", entry)
        match = re.match(r"(?:-h, )?--([\w-]+)(?: (?:\{[^}]*\}(?:\|\w+)?|[A-Z]\w*))? (.*)", text)
        assert match, text
        documented[match[1]] = re.sub(r"\(default.*", "", match[2])
    flags = {field.name for field in Args.__dataclass_fields__.values()} - {"hp"} | set(Args().hp._fields)
    for name in flags | {flag.replace("-", "_") for flag in CONTRACT}:
        assert len(documented[name.replace("_", "-")]) > 8, name
