"""A film of a trained policy: its episodes in the environment that the run was evaluated in, as a GIF or an MP4.

    python -m benchmarks.watch runs/mine                                     # runs/mine/member-0.gif
    python -m benchmarks.watch runs/mine --member best --episodes 3 --out best.mp4

Episode i has the seed of the last evaluation's episode i, so what is seen is what `returns.csv` counts (on the same
machine, and of a policy that draws nothing). In a population `best` and `worst` go by the last return; if it was
trained in parts, run `python -m benchmarks.report RUN_DIR` first. A film plays in real time, 30 frames a second at
most; a GIF has at most 600 frames, of long episodes every n-th, and an MP4, which needs `pip install imageio-ffmpeg`,
as many as there are.
Where there is no display, MuJoCo draws by EGL or OSMesa; set MUJOCO_GL to choose yourself.
"""

import contextlib
import importlib.util
import io
import math
import os
import subprocess
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import gymnasium as gym
import numpy as np
import tyro

from benchmarks.families import domain_of, normalized_score
from common.cli import Count, UsageError, check_ranges, exit_status, one_line, read_flags
from common.data import load
from common.environments import evaluation_seed, make_environment, scalar
from common.report import Policy, load_policy, read_json

SMOOTH = 30
"""Frames a second, at most."""
MOST = 600
"""Frames of a GIF, at most: its player holds all of them in memory."""
HEADLESS = ("egl", "osmesa")
DRAW = "import mujoco; mujoco.Renderer(mujoco.MjModel.from_xml_string('<mujoco/>'), 8, 8).render()"


@dataclass(frozen=True)
class Args:
    """Play episodes of a trained policy into a GIF or an MP4."""

    # Directory of a run, e.g. runs/mine.
    run_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]
    member: str = "0"  # Number of the member, or best or worst by the last return.
    episodes: Count = 1  # Episodes, one after the other.
    best: bool = False  # The best evaluated policy, which --keep-best True kept, instead of the last one.
    env: str | None = None  # Environment to play in. Default: the run's own; for its options the dataset is read.
    out: Path | None = None  # File to write, .gif or .mp4. Default: member-N.gif in the run's directory.
    track: bool = False  # Upload the film to Weights & Biases, into the run's project.


def choose_backend() -> None:
    """Set MUJOCO_GL to what draws without a display, where that is needed; to be called before MuJoCo is imported.

    An environment that does not draw by MuJoCo must not fail for want of a backend: `disable` stands for none.
    UsageError where the user's own choice does not work.
    """

    def draws(backend: str) -> bool:  # in a process of its own: a failed backend cannot be exchanged for another
        env = os.environ | {"MUJOCO_GL": backend}
        return not subprocess.run([sys.executable, "-c", DRAW], env=env, capture_output=True).returncode

    if own := os.environ.get("MUJOCO_GL"):
        if own != "disable" and not draws(own):
            raise UsageError(f"MUJOCO_GL={own} does not draw here; unset it to have another one tried")
    elif sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        os.environ["MUJOCO_GL"] = next(filter(draws, HEADLESS), "disable")


def member_of(run_dir: Path, config: dict[str, Any], member: str) -> tuple[int, int]:
    """Number and seed of the member; UsageError if there is none."""
    if member in ("best", "worst"):
        ended = [m for m in read_json(run_dir / "final.json")["members"] if m["return_mean"] is not None]
        if not ended:
            raise UsageError(f"{run_dir}: every member diverged, so none is the {member}")
        found = (max if member == "best" else min)(ended, key=lambda m: m["return_mean"])
        return found["member"], found["seed"]
    if member.isdecimal() and (run_dir / "final.json").exists():
        for ended in read_json(run_dir / "final.json")["members"]:
            if ended["member"] == int(member) and ended["diverged"]:
                step = ended["diverged"]["step"]
                print(f"member {member} diverged at step {step}; what is played is from before that", file=sys.stderr)
    seeds = {str(m["member"]): m["seed"] for m in config["members"]}
    if member not in seeds:
        raise UsageError(f"--member {member}: choose best, worst or one of {', '.join(seeds)}")
    return int(member), seeds[member]


def environment_of(config: dict[str, Any], env: str | None) -> tuple[Any, str | None]:
    """What to play in, a gymnasium id or EnvSpec, and the family of its reference returns."""
    flags = config["flags"]
    env = env or flags["env"]
    if not env and flags["dataset"].startswith("offax/") and "+" not in flags["dataset"]:
        env = config["environment"]  # these sets' environments are plain ids: no need of the data
    try:
        dataset = load(flags["dataset"], env, only_env=True)
    except UsageError as error:
        hint = "" if env else f"; --env {config['environment']} plays without the data"
        raise UsageError(f"{error}{hint}") from None
    return dataset.env_spec, None if flags.get("max_episode_steps") else domain_of(dataset.env_spec)


def playable(spec: Any, config: dict[str, Any]) -> gym.Env:
    """The environment as the evaluation has it, but with its own range of actions.

    UsageError if it draws nothing, or has other sizes than the policy.
    """
    name = getattr(spec, "id", spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # gymnasium's, of OGBench, which names no modes and draws all the same
        try:
            scaled = make_environment(spec, config["flags"]["max_episode_steps"], render_mode="rgb_array")
        except UsageError as error:  # it could be made before, without the mode
            raise UsageError(f"{name} cannot be drawn: {error}") from None
    sizes = [*scaled.observation_space.shape, *scaled.action_space.shape]
    if sizes != [len(config["transform"]["observation_mean"]), len(config["action_low"])]:
        raise UsageError(f"{name} has other sizes of observations and actions than the policy: {sizes}")
    follow(scaled)
    return scaled.env  # without the rescaling of actions, which the policy does


def follow(env: gym.Env) -> None:
    """Draw by the model's camera that tracks it, if it has one: gymnasium 1.4's own stands still and loses a walker."""
    walker = getattr(env.unwrapped, "ant_env", env.unwrapped)  # of gymnasium-robotics' AntMaze
    if renderer := getattr(walker, "mujoco_renderer", None):
        import mujoco

        camera = mujoco.mj_name2id(renderer.model, mujoco.mjtObj.mjOBJ_CAMERA, "track")
        renderer.camera_id = camera if camera >= 0 else renderer.camera_id


def picture(env: gym.Env) -> np.ndarray:
    """What the environment draws of its state, `[height, width, 3]` uint8; UsageError where that fails."""
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            frame = np.asarray(env.render())
        except Exception as error:  # whatever drivers, libraries and environments raise
            traceback.clear_frames(error.__traceback__)  # a half-made viewer complains on its way out: here, unheard
            reason = f"{env.spec.id} cannot be drawn here: {one_line(error)}"
            if os.environ.get("MUJOCO_GL") == "disable":
                tried = " nor ".join(f"MUJOCO_GL={name}" for name in HEADLESS)
                reason = f"there is no display, and neither {tried} draws here; install libegl1 or libosmesa6"
            raise UsageError(reason) from None
    if frame.ndim != 3 or frame.dtype != np.uint8:
        raise UsageError(f"{env.spec.id} draws {frame.dtype} {list(frame.shape)}, which is no picture")
    return frame


def play(env: gym.Env, policy: Policy, seeds: Iterable[int], domain: str | None) -> Iterator[None]:
    """Run an episode for each seed, with a pause to draw at every state, and print what it came to."""
    for episode, seed in enumerate(seeds):
        observation, _ = env.reset(seed=seed)
        total, success, steps, over = 0.0, math.nan, 0, False
        yield
        while not over:
            observation, reward, terminated, truncated, info = env.step(policy(observation))
            total, steps, over = total + reward, steps + 1, terminated or truncated
            success = float(np.fmax(success, scalar(info.get("success"))))
            yield
        score = normalized_score(domain, np.array(total), np.array(success))
        text = "" if score is None else f", score {score:.1f}"
        text += "" if math.isnan(success) else f", success {success:.0f}"
        print(f"episode {episode}: return {total:.7g}{text}, {steps} steps", flush=True)


def thin(frames: Iterable[np.ndarray], most: int = MOST) -> tuple[list[np.ndarray], int]:
    """Every n-th frame, and n: the lowest power of two that leaves no more than `most`."""
    kept, n = [], 1
    for i, frame in enumerate(frames):
        if i % n == 0:
            kept.append(frame)
        if len(kept) > most:
            kept, n = kept[::2], 2 * n
    return kept, n


def film(path: Path, env: gym.Env, moments: Iterator[None]) -> None:
    """Write what the environment draws at the moments, and say how much of it."""
    import imageio.v2 as imageio

    rate = float(env.metadata.get("render_fps") or SMOOTH)
    every = math.ceil(rate / SMOOTH)
    frames = (picture(env) for i, _ in enumerate(moments) if i % every == 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    count, unfinished = 0, path.with_stem(f".{path.stem}.tmp")
    unfinished.touch()  # where that fails nothing is played in vain
    try:
        if path.suffix == ".gif":
            kept, n = thin(frames)
            imageio.mimwrite(unfinished, kept, fps=rate / every / n, loop=0)
            every, count = every * n, len(kept)
        else:
            with warnings.catch_warnings(), imageio.get_writer(unfinished, fps=rate / every) as writer:
                warnings.filterwarnings("ignore", r"os\.fork")  # JAX's; the fork becomes ffmpeg at once
                for frame in frames:
                    writer.append_data(frame)
                    count += 1
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    skipped = f", one of {every} steps" if every > 1 else ""
    print(f"{path}: {count} frames at {rate / every:.3g} a second{skipped}, {path.stat().st_size / 1e6:.1f} MB")


def upload(path: Path, config: dict[str, Any], member: int) -> None:
    """Log the film as a run of its own; what goes wrong is one line on stderr, as the film is there."""
    flags = config["flags"]
    try:
        import wandb

        place = {"project": flags["wandb_project"], "entity": flags["wandb_entity"], "group": flags["wandb_group"]}
        about = {"name": f"{config['algorithm']} {flags['dataset']} member {member}", "job_type": "watch"}
        about |= {"tags": [config["algorithm"], "watch"], "config": config | {"member": member}}
        settings = wandb.Settings(silent=True, init_timeout=30)
        with wandb.init(**place, **about, dir=path.parent, settings=settings) as run:
            run.log({"film": wandb.Video(str(path), format=path.suffix[1:])})
    except Exception as error:
        print(f"wandb: {one_line(error)}; the film was not uploaded", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; SystemExit(2), with one line on stderr, for what cannot be played or drawn."""
    with exit_status():
        args = read_flags(Args, argv, prog="python -m benchmarks.watch")
        check_ranges(args)
        config = read_json(args.run_dir / "config.json")
        member, seed = member_of(args.run_dir, config, args.member)
        path = args.out or args.run_dir / f"member-{member}{'-best' if args.best else ''}.gif"
        if path.suffix not in (".gif", ".mp4"):
            raise UsageError(f"--out {path}: must end in .gif or .mp4")
        if path.suffix == ".mp4" and not importlib.util.find_spec("imageio_ffmpeg"):
            raise UsageError(f"--out {path}: an .mp4 needs pip install imageio-ffmpeg; .gif works without")
        choose_backend()
        policy = load_policy(args.run_dir, member, best=args.best)
        spec, domain = environment_of(config, args.env)
        env = playable(spec, config)
        seeds = [evaluation_seed(seed, episode) for episode in range(args.episodes)]
        film(path, env, play(env, policy, seeds, domain))
        env.close()
        if args.track:
            upload(path, config, member)


if __name__ == "__main__":
    main()
