"""Films of trained policies: which episodes, of which member, in which environment, and what cannot be filmed."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from conftest import rows_of
from PIL import Image

from benchmarks import watch
from common.cli import UsageError

STEPS = 12


class Drawn(gym.Env):
    """Pays its action, in [0, 2], times a number that the seed decides, and shows the time as a shade of grey."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 50}  # noqa: RUF012
    observation_space = gym.spaces.Dict({"x": gym.spaces.Box(-1, 1, (1,)), "time": gym.spaces.Box(0, STEPS, (1,))})
    action_space = gym.spaces.Box(0.0, 2.0, (1,))

    def __init__(self, render_mode: str | None = None, shape: tuple[int, ...] = (8, 8, 3), error: str = "") -> None:
        self.render_mode, self.shape, self.error = render_mode, shape, error

    def observe(self) -> dict[str, np.ndarray]:
        return {"x": self.x, "time": np.array([self.time], np.float32)}

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.x, self.time = self.np_random.uniform(-1, 1, 1).astype(np.float32), 0
        return self.observe(), {}

    def step(self, action: np.ndarray) -> Any:
        assert self.action_space.contains(action)
        self.time += 1
        return self.observe(), float(self.x[0] * action[0]), False, False, {}

    def render(self) -> np.ndarray:
        if self.error:
            raise RuntimeError(f"{self.error}\nand more")
        return np.full(self.shape, 20 * self.time, np.uint8)


class Undrawn(Drawn):
    """As one that was written without a thought of drawing."""

    def __init__(self) -> None:
        super().__init__()


IDS = {
    "Offax/Drawn-v0": (Drawn, {}),
    "Offax/Undrawn-v0": (Undrawn, {}),
    "Offax/Flat-v0": (Drawn, {"shape": (8, 8)}),
    "Offax/Broken-v0": (Drawn, {"error": "no driver"}),
}


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    for name, (kind, kwargs) in IDS.items():
        gym.register(name, entry_point=kind, kwargs=kwargs, max_episode_steps=STEPS)
    yield
    for name in IDS:
        del gym.registry[name]


@pytest.fixture(autouse=True)
def no_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever needs no MuJoCo is drawn all the same, and no test decides on the backend of another."""
    monkeypatch.setenv("MUJOCO_GL", "disable")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, registered: None) -> Path:
    """Three members, evaluated at 0, 10 and 20 updates on one episode and at the end on two."""
    from algorithms import iql
    from common.cli import parse

    folder, rng = tmp_path_factory.mktemp("watch"), np.random.default_rng(0)
    size, widths = 400, {"observations": (2,), "actions": (1,), "rewards": (), "next_observations": (2,)}
    columns = {name: rng.uniform(0, 1, (size, *width)).astype(np.float32) for name, width in widths.items()}
    np.savez(folder / "data.npz", **columns, terminations=np.arange(size) % 20 == 19)
    flags = ["--dataset", str(folder / "data.npz"), "--env", "Offax/Drawn-v0", "--hidden-dim", "8", "--quiet", "True"]
    flags += ["--num-updates", "20", "--eval-every", "10", "--eval-episodes", "1", "--final-eval-episodes", "2"]
    flags += ["--num-seeds", "3", "--keep-best", "True", "--run-dir", str(folder / "run")]
    iql.main(parse(iql.Args, iql.PRESETS, flags))
    return folder / "run"


@pytest.fixture
def filmed(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[list[float], str]]:
    """`filmed(*flags)`: the returns that the command prints, and its last line; the film is film.gif."""

    def call(*flags: object) -> tuple[list[float], str]:
        capfd.readouterr()
        watch.main([str(run), "--out", str(tmp_path / "film.gif"), *map(str, flags)])
        out, err = capfd.readouterr()
        *episodes, last = out.splitlines()
        assert err == "" and [line.split(":")[0] for line in episodes] == [f"episode {i}" for i in range(len(episodes))]
        return [float(line.split("return ")[1].split(",")[0]) for line in episodes], last

    return call


def shades(path: Path) -> list[tuple[int, int]]:
    """The grey of each frame, and the milliseconds that it stands."""
    with Image.open(path) as film:
        found = []
        for i in range(film.n_frames):
            film.seek(i)
            found.append((film.convert("RGB").getpixel((0, 0))[0], film.info["duration"]))
    return found


def refused(capfd: pytest.CaptureFixture[str], *flags: object) -> str:
    """The line on stderr of a command that ends with status 2."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        watch.main([*map(str, flags)])
    err = capfd.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize(
    "member", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(2, marks=pytest.mark.slow)]
)
def test_what_is_seen_is_the_last_evaluation(
    run: Path, tmp_path: Path, filmed: Callable[..., Any], member: int
) -> None:
    returns, last = filmed("--member", member, "--episodes", 2)
    rows = [row for row in rows_of(run / "returns.csv") if row["member"] == str(member)]
    assert [f"{x:.7g}" for x in returns] == [row["return"] for row in rows]
    # 13 states for each episode, at 50 a second: every second one, 25 a second, 40 milliseconds each.
    assert shades(tmp_path / "film.gif") == [(20 * step, 40) for step in [*range(0, 13, 2), *range(1, 13, 2)]]
    assert "13 frames at 25 a second, one of 2 steps" in last


def test_best_and_worst_go_by_the_last_return(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    members = json.loads((run / "final.json").read_text())["members"]
    by_return = sorted(members, key=lambda member: member["return_mean"])
    assert len({member["return_mean"] for member in members}) == 3
    for word, place in (("best", -1), ("worst", 0)):
        watch.main([str(run), "--member", word])
        assert f"{run / 'member-'}{by_return[place]['member']}.gif: " in capfd.readouterr().out


def test_a_member_that_diverged_is_named(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(run, tmp_path / "run")
    final = json.loads((run / "final.json").read_text())
    final["members"][1]["diverged"] = {"step": 7, "metric": "critic/loss"}
    (tmp_path / "run" / "final.json").write_text(json.dumps(final))
    for member, said in ((0, ""), (1, "member 1 diverged at step 7; what is played is from before that\n")):
        watch.main([str(tmp_path / "run"), "--member", str(member)])
        assert capfd.readouterr().err == said


def test_the_policy_that_was_best_of_its_evaluations(run: Path, filmed: Callable[..., Any]) -> None:
    """Somewhere among the members it is not the last one."""
    earlier = 0
    for member in range(3):
        rows = [row for row in rows_of(run / "evaluations.csv") if row["member"] == str(member)]
        best = max(rows, key=lambda row: float(row["return_mean"]))
        returns, _ = filmed("--member", member, "--best", "True", "--episodes", best["episodes"])
        assert np.mean(returns) == pytest.approx(float(best["return_mean"]), rel=1e-6)
        earlier += best is not rows[-1]
    assert earlier


@pytest.mark.parametrize(
    ("count", "most", "n"), [(0, 4, 1), (4, 4, 1), (5, 4, 2), (8, 4, 2), (9, 4, 4), (1001, 500, 4)]
)
def test_a_gif_keeps_every_nth_frame(count: int, most: int, n: int) -> None:
    kept, found = watch.thin((np.array(i) for i in range(count)), most)
    assert found == n and [int(frame) for frame in kept] == list(range(0, count, n)) and len(kept) <= most


def test_a_film_that_is_cut_off_leaves_the_one_before(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(path: Path, *_: Any, **__: Any) -> None:
        path.write_bytes(b"GIF")
        raise KeyboardInterrupt

    (tmp_path / "film.gif").write_bytes(b"old")
    monkeypatch.setattr("imageio.v2.mimwrite", half)
    with pytest.raises(SystemExit) as stop:
        watch.main([str(run), "--out", str(tmp_path / "film.gif")])
    assert stop.value.code == 130
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if "film" in path.name} == {"film.gif": b"old"}


def test_a_long_film_plays_in_real_time(
    tmp_path: Path, filmed: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch.thin, "__defaults__", (5,))
    assert "4 frames at 12.5 a second, one of 4 steps" in filmed()[1]
    assert shades(tmp_path / "film.gif") == [(20 * step, 80) for step in range(0, 13, 4)]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--member", "3"], "--member 3: choose best, worst or one of 0, 1, 2"),
        (["--out", "film.avi"], "must end in .gif or .mp4"),
        (["--out", "/proc/film.gif"], "/proc/.film.tmp.gif: "),
        (["--out", "/dev/null/film.gif"], "/dev/null"),
        (["--episodes", "0"], "--episodes 0"),
        (["--env", "Offax/Undrawn-v0"], "Offax/Undrawn-v0 cannot be drawn: "),
        (["--env", "Offax/Flat-v0"], "Offax/Flat-v0 draws uint8 [8, 8]"),
        (["--env", "Offax/None-v0"], "cannot make environment Offax/None-v0"),
        (["--env", "Hopper-v5"], "Hopper-v5 has other sizes of observations and actions than the policy: [11, 3]"),
    ],
)
def test_what_cannot_be_filmed_is_one_line(
    run: Path, capfd: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    assert words in refused(capfd, run, *flags)


def test_a_drawing_that_fails_is_one_line(
    run: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MUJOCO_GL")
    monkeypatch.setattr(watch, "choose_backend", lambda: None)
    line = refused(capfd, run, "--env", "Offax/Broken-v0")
    assert "Offax/Broken-v0 cannot be drawn here: no driver" in line


def test_directories_without_a_run_or_its_end(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert "config.json" in refused(capfd, tmp_path)
    (tmp_path / "config.json").write_bytes((run / "config.json").read_bytes())
    assert "final.json" in refused(capfd, tmp_path, "--member", "best")
    assert "there is no file" in refused(capfd, tmp_path)
    lost = {"members": [{"member": 0, "seed": 0, "return_mean": None}]}
    (tmp_path / "final.json").write_text(json.dumps(lost))
    assert "every member diverged" in refused(capfd, tmp_path, "--member", "best")


def test_an_mp4_needs_ffmpeg(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch.importlib.util, "find_spec", lambda name: None)
    assert "pip install imageio-ffmpeg; .gif works without" in refused(capfd, run, "--out", tmp_path / "film.mp4")


def test_an_mp4(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("imageio_ffmpeg")
    watch.main([str(run), "--out", str(tmp_path / "film.mp4")])
    assert b"ftyp" in (tmp_path / "film.mp4").read_bytes()[:16]
    assert [path.name for path in tmp_path.iterdir() if "film" in path.name] == ["film.mp4"]


def test_the_environment_has_the_options_of_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which an id alone does not name; what is given by a flag, and the built-in sets', are ids."""
    read, theirs = [], SimpleNamespace(env_spec=gym.spec("Ant-v5"))

    def load(*arguments: Any, only_env: bool) -> Any:
        assert only_env
        read.append(arguments)
        if arguments[0] == "gone":
            raise UsageError("it is not there")
        return theirs

    monkeypatch.setattr(watch, "load", load)
    cases = [
        ("D4RL/ant/x-v0", None, None, None),
        ("D4RL/ant/x-v0", "Ant-v5", None, "Ant-v5"),
        ("D4RL/ant/x-v0", "Ant-v5", "Ant-v4", "Ant-v4"),
        ("offax/hopper/medium-v1", None, None, "Hopper-v5"),
        ("offax/hopper/medium-v1", "Hopper-v4", None, "Hopper-v4"),
        ("offax/hopper/medium-v1+D4RL/x-v0", None, None, None),
    ]
    for dataset, trained, given, found in cases:
        config = {"flags": {"dataset": dataset, "env": trained}, "environment": trained or "Hopper-v5"}
        assert watch.environment_of(config, given) == (theirs.env_spec, "ant")
        assert read.pop() == (dataset, found)
    config["flags"]["max_episode_steps"] = 100
    assert watch.environment_of(config, "Ant-v5")[1] is None, "cut episodes have no score"
    with pytest.raises(UsageError, match=r"it is not there$"):
        watch.environment_of({"flags": {"dataset": "gone", "env": "Hopper-v5"}, "environment": "Hopper-v5"}, None)
    with pytest.raises(UsageError, match="it is not there; --env Hopper-v5 plays without the data"):
        watch.environment_of({"flags": {"dataset": "gone", "env": None}, "environment": "Hopper-v5"}, None)


# Drawing without a display


@pytest.mark.parametrize(
    ("working", "variables", "chosen"),
    [
        ({"egl", "osmesa"}, {}, "egl"),
        ({"osmesa"}, {}, "osmesa"),
        (set(), {}, "disable"),
        ({"egl"}, {"DISPLAY": ":0"}, None),
        ({"egl"}, {"WAYLAND_DISPLAY": "wayland-0"}, None),
        ({"osmesa"}, {"MUJOCO_GL": "osmesa"}, "osmesa"),
        ({"osmesa"}, {"MUJOCO_GL": "egl"}, "refused"),
        (set(), {"MUJOCO_GL": "disable"}, "disable"),
    ],
)
def test_the_first_backend_that_draws_is_taken(
    monkeypatch: pytest.MonkeyPatch, working: set[str], variables: dict[str, str], chosen: str | None
) -> None:
    def tried(command: list[str], env: dict[str, str], **options: Any) -> Any:
        return SimpleNamespace(returncode=int(env["MUJOCO_GL"] not in working))

    monkeypatch.setattr(watch.subprocess, "run", tried)
    monkeypatch.setattr(watch.sys, "platform", "linux")
    for name in ("MUJOCO_GL", "DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if chosen == "refused":
        with pytest.raises(UsageError, match="MUJOCO_GL=egl does not draw here"):
            watch.choose_backend()
        return
    watch.choose_backend()
    assert os.environ.get("MUJOCO_GL") == chosen
    monkeypatch.setenv("MUJOCO_GL", "")  # so that what was set is taken back


FILM_AND_LEAVE = """
import json, sys
from benchmarks import watch
watch.main([sys.argv[1]])
env = watch.playable("Hopper-v5", json.load(open(f"{sys.argv[1]}/config.json")))
for distance in (0, 20):
    env.reset(seed=0)
    position, velocity = env.unwrapped.data.qpos.copy(), env.unwrapped.data.qvel.copy()
    env.unwrapped.set_state(position + [distance, 0, 0, 0, 0, 0], velocity)
    red, green = env.render()[..., :2].astype(int).transpose(2, 0, 1)
    print((red > 1.5 * green + 20).sum(), end=" ")  # the leg alone is brown
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # gymnasium's half-made viewer
def test_a_film_of_mujoco(
    tmp_path: Path,
    small_run: list[str],
    script: Callable[..., Any],
    spawn: Callable[..., subprocess.Popen],
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Without a display, in a process of its own; and the line where no backend draws."""
    assert script("iql", *small_run, "--num-updates", "2", "--eval-every", "0", "--run-dir", tmp_path).status == 0
    line = refused(capfd, tmp_path)
    assert "there is no display, and neither MUJOCO_GL=egl nor MUJOCO_GL=osmesa draws here" in line
    assert not list(tmp_path.glob("*.gif"))

    plain = {name: x for name, x in os.environ.items() if name not in ("DISPLAY", "WAYLAND_DISPLAY", "MUJOCO_GL")}
    plain["PYTHONPATH"] = str(Path(watch.__file__).parents[1])
    draws = [
        not subprocess.run(
            [sys.executable, "-c", watch.DRAW], env=plain | {"MUJOCO_GL": name}, capture_output=True
        ).returncode
        for name in watch.HEADLESS
    ]
    if not any(draws):
        pytest.skip("neither EGL nor OSMesa draws on this machine")
    process = spawn("-c", FILM_AND_LEAVE, tmp_path, env=plain)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and err == "", err
    (row,) = rows_of(tmp_path / "returns.csv")
    steps = int(out.split(" steps")[0].split()[-1])
    assert f"return {row['return']}, score " in out
    with Image.open(tmp_path / "member-0.gif") as film:
        assert film.n_frames == len(range(0, steps + 1, 5)), "of Hopper's 125 states a second 25"
        frames = []
        for i in (0, film.n_frames - 1):
            film.seek(i)
            frames.append(np.asarray(film.convert("RGB"), int))
    near, far = map(int, out.splitlines()[-1].split())
    assert near > 300 and far == pytest.approx(near, rel=0.2), "it is seen wherever it goes"
    assert frames[0].std() > 20, "a floor, a sky and a leg"
    assert np.abs(frames[1] - frames[0]).max() > 50, "it moves"


# Weights & Biases


def test_the_film_is_uploaded(run: Path, filmed: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[Any] = []

    class Opened(SimpleNamespace):
        def __enter__(self) -> Any:
            return self

        def __exit__(self, *error: Any) -> None:
            logged.append("closed")

        def log(self, row: dict[str, Any]) -> None:
            logged.append(row)

    def init(**options: Any) -> Opened:
        logged.append(options)
        return Opened()

    def video(path: str, format: str) -> tuple[int, str]:
        return Path(path).stat().st_size, format

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Video=video, Settings=dict))
    filmed("--member", "1", "--track", "True")
    options, row, closed = logged
    assert (options["project"], options["job_type"], options["config"]["member"]) == ("offax", "watch", 1)
    assert row["film"][0] > 100 and row["film"][1] == "gif" and closed == "closed"


def test_an_upload_that_fails_is_one_line(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    capfd.readouterr()
    watch.main([str(run), "--track", "True", "--out", str(tmp_path / "film.gif")])
    err = capfd.readouterr().err
    assert err.startswith("wandb: ") and err.count("\n") == 1 and (tmp_path / "film.gif").exists()
