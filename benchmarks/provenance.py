"""Where a result comes from: what config.json and every page say of the code, the processor and the usable cores."""

import importlib.metadata
import platform
import re
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common.cli import UsageError
from common.members import usable_cores
from common.report import read_json


def commit_at(path: Path) -> dict[str, Any]:
    """The commit of the clone at `path`, and whether its tracked code differs from it; None where there is none."""

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(path), *arguments]
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None

    changes = git("status", "--porcelain", "--untracked-files=no", "--", ":(top)*.py")
    return {"git_commit": git("rev-parse", "HEAD"), "git_dirty": None if changes is None else bool(changes)}


def provenance() -> dict[str, Any]:
    """What made a result: package versions, git commit (and whether tracked code differs from it), processor."""
    packages = [p for p in ("jax", "jaxlib", "flax", "optax", "numpy", "gymnasium", "mujoco", "minari") if find_spec(p)]
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    return {
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages},
        **commit_at(Path(__file__).parent),
        "cpu": {"model": model[1] if model else platform.processor(), "cores": usable_cores()},
    }


def commits_of(configs: Iterable[dict[str, Any]]) -> str | None:
    """The commits of several config.json, of parts or sessions of one run, each once; None if none has any."""
    commits = [commit for config in configs for commit in (config.get("git_commit") or "").split("; ") if commit]
    return "; ".join(dict.fromkeys(commits)) or None


def of_run(resumed: Path | None) -> dict[str, Any]:
    """`provenance` for config.json; of a `resumed` run the commits of its earlier sessions are kept, and come first."""
    about, before = provenance(), {}
    with suppress(UsageError):  # a config.json that is lost or damaged is written anew
        before = read_json(resumed / "config.json") if resumed else {}
    dirty = before.get("git_dirty") or about["git_dirty"]
    return about | {"git_commit": commits_of([before, about]), "git_dirty": dirty}
