"""The page from one run to a cluster, and the launch files, as far as they need neither a server nor a cluster."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb
from click.testing import CliRunner
from conftest import ROOT, parsed
from wandb import env as wandb_env
from wandb.apis.public import sweeps as server
from wandb.cli import cli

LAUNCH = ROOT / "benchmarks" / "launch"
PAGE = (ROOT / "benchmarks" / "README.md").read_text()
COMMANDS = [block.strip() for block in re.findall(r"^ *```bash\n(.*?)^ *```$", PAGE, re.DOTALL | re.MULTILINE)]


def launched(script: str, arguments: list[str], folder: Path) -> list[dict[str, Any]]:
    """What `srun` is given by a launch file: the words, and the environment."""
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "activate").write_text("")
    fake = folder / "bin" / "srun"
    fake.parent.mkdir()
    fake.write_text(
        "#!/usr/bin/env python3\n"
        "import json, os, sys\n"
        "print(json.dumps({'words': sys.argv[1:], 'env': dict(os.environ)}))\n"
    )
    fake.chmod(0o755)
    env = os.environ | {"PATH": f"{fake.parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    env |= {"SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "8"}
    done = subprocess.run(
        ["bash", str(LAUNCH / script), *arguments], cwd=folder, env=env, capture_output=True, text=True, check=True
    )
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def agent_options(words: list[str]) -> dict[str, Any]:
    """The options of `wandb agent ...` as wandb reads them."""
    assert words[:2] == ["wandb", "agent"]
    return cli.agent.make_context("agent", words[2:]).params


# The page


def test_the_page_has_five_commands_and_is_linked() -> None:
    assert [command.split()[0].partition("=")[0] for command in COMMANDS] == [
        "python",
        "python",
        "sweep",
        "wandb",
        "sbatch",
    ]
    assert "benchmarks/README.md" in (ROOT / "README.md").read_text()


def test_the_runs_of_the_page_parse() -> None:
    runs = [line for command in COMMANDS for line in command.splitlines() if line.startswith("python algorithms/")]
    one, population = [parsed(shlex.split(line)) for line in runs]
    assert (one.num_seeds, one.grid) == (1, "")
    assert (population.num_seeds, population.grid) == (2, "beta=1,3,10 expectile=0.7,0.9")
    assert COMMANDS[1].endswith(f" python -m benchmarks.report {population.run_dir}")


def test_the_page_keeps_the_name_of_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The output of the real `wandb sweep`, given a server's answer, goes through the page's own line."""
    sent = []

    def upsert(_: Any, config: dict[str, Any], **__: Any) -> tuple[dict[str, str], list[str]]:
        sent.append(config)
        return {"name": "abc12345"}, []

    settings = {"entity": "team", "project": "offax", "base_url": "https://api.wandb.ai"}
    monkeypatch.setattr(wandb, "Api", lambda: SimpleNamespace(settings=settings, default_entity="team"))
    monkeypatch.setattr(server, "_upsert_sweep", upsert)
    monkeypatch.chdir(ROOT)
    (line,) = [command for command in COMMANDS if command.startswith("sweep=")]
    (words,) = re.findall(r"wandb sweep (\S+)", line)
    result = CliRunner().invoke(cli.sweep, [words])
    assert result.exit_code == 0, result.output
    assert sent[0]["program"] == "algorithms/iql.py"
    output, fake = tmp_path / "output", tmp_path / "wandb"
    output.write_text(result.output)
    fake.write_text(f"#!/bin/sh\ncat {shlex.quote(str(output))} >&2\n")
    fake.chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", f'{line}\necho "$sweep"'], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "team/offax/abc12345\n"
    assert "View sweep at" in done.stderr, "what wandb says is still seen"


def test_the_agent_of_the_page_parses() -> None:
    (line,) = [command for command in COMMANDS if command.startswith("wandb")]
    options = agent_options(shlex.split(line))
    assert (options["sweep_id"], options["count"]) == ("$sweep", 2)


def test_the_cluster_command_names_a_launch_file() -> None:
    (line,) = [command for command in COMMANDS if command.startswith("sbatch")]
    assert (ROOT / shlex.split(line)[1]).is_file()


def test_the_variables_of_the_page_are_wandbs() -> None:
    names = set(re.findall(r"WANDB_AGENT_\w+", PAGE + (LAUNCH / "agents.sbatch").read_text()))
    known = {value for value in vars(wandb_env).values() if isinstance(value, str)}
    assert len(names) == 3 and names <= known


# The launch files


@pytest.mark.parametrize("path", sorted(LAUNCH.iterdir()), ids=lambda path: path.name)
def test_launch_files_are_bash(path: Path) -> None:
    checked = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")
    lines = path.read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert lines[0] == "#!/bin/bash" and any(line.startswith("#SBATCH") for line in lines[:first])
    assert not any(line.startswith("#SBATCH") for line in lines[first:]), "SLURM stops reading at the first command"


@pytest.mark.parametrize("path", sorted(LAUNCH.iterdir()), ids=lambda path: path.name)
def test_launch_files_without_arguments_say_what_to_give(path: Path) -> None:
    done = subprocess.run(["bash", str(path)], capture_output=True, text=True)
    assert done.returncode != 0 and f"usage: sbatch benchmarks/launch/{path.name}" in done.stderr


def test_agents_start_an_agent_that_forwards_signals_and_bears_failures(tmp_path: Path) -> None:
    (call,) = launched("agents.sbatch", ["team/offax/abc12345"], tmp_path)
    options = agent_options(call["words"])
    assert options["sweep_id"] == "team/offax/abc12345" and options["forward_signals"] and options["count"] is None
    assert call["env"][wandb_env.AGENT_DISABLE_FLAPPING] == "true"
    assert int(call["env"][wandb_env.AGENT_MAX_INITIAL_FAILURES]) > 5


def test_a_population_gets_its_flags_and_a_directory_to_resume_from(tmp_path: Path) -> None:
    example = re.search(
        r"# +sbatch benchmarks/launch/population.sbatch (.*)", (LAUNCH / "population.sbatch").read_text()
    )
    (call,) = launched("population.sbatch", shlex.split(example[1]), tmp_path)
    words = call["words"]
    args = parsed(words)
    assert (args.run_dir, args.resume, args.shard) == ("runs/population-17", True, "2/8")
    assert (args.grid, args.num_seeds) == ("beta=1,3,10 expectile=0.7,0.9", 4)


def test_a_task_of_a_population_ends_with_the_runs_status_and_a_report(tmp_path: Path) -> None:
    for name, code in (("srun", "exit 3"), ("python", 'echo "$@" >> called')):
        fake = tmp_path / "bin" / name
        fake.parent.mkdir(exist_ok=True)
        fake.write_text(f"#!/bin/sh\n{code}\n")
        fake.chmod(0o755)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").write_text("")
    env = os.environ | {"PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}", "SLURM_ARRAY_JOB_ID": "17"}
    env |= {"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_COUNT": "1"}
    done = subprocess.run(["bash", str(LAUNCH / "population.sbatch"), "algorithms/iql.py"], cwd=tmp_path, env=env)
    assert done.returncode == 3
    assert (tmp_path / "called").read_text() == "-m benchmarks.report runs/population-17\n"


def test_a_population_is_an_array_that_counts_from_zero() -> None:
    """A shard of --shard I/N has I below N."""
    arrays = re.findall(r"^#SBATCH --array=(\S+)$", (LAUNCH / "population.sbatch").read_text(), re.MULTILINE)
    assert len(arrays) == 1 and re.fullmatch(r"0-\d+", arrays[0])
