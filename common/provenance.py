"""What made a result: versions, commit, processor."""

import contextlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any


def provenance() -> dict[str, Any]:
    """What made a result: package versions, git commit (and whether tracked code differs from it), processor."""
    packages = ("jax", "jaxlib", "flax", "optax", "numpy", "gymnasium", "mujoco", "minari")
    versions = {package: importlib.metadata.version(package) for package in packages}
    changes = _git("status", "--porcelain", "--untracked-files=no", "--", ":(top)*.py")
    return {
        "versions": {"python": sys.version.split()[0]} | versions,
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": None if changes is None else bool(changes),
        "cpu": {"model": _cpu_model(), "cores": os.cpu_count()},
    }


def commit_of(about: dict[str, Any]) -> str:
    """The commit of a `provenance()`, and whether the code differs from it."""
    return (about["git_commit"] or "unknown") + (" with uncommitted changes" if about["git_dirty"] else "")


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
