"""How much of the target Q-functions' work screening leaves, by dataset and stage of training.

    python benchmarks/emaq_screening.py

With lambda = 1 EMaQ's target is max_n min_k Q_k(s', a_n). `algorithms.emaq.max_of_min` evaluates only the Q-functions
that may decide it. Here EMaQ itself is trained on each dataset, and at each stage the share of the K x N evaluations
that were done is measured, and the result compared with that of all. A row for each to `<output>.csv`, a table of them
to `<output>.md`.
"""

import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from algorithms import emaq
from benchmarks.provenance import provenance
from benchmarks.tables import Table, commit_of, write_text
from common import replay
from common.cli import Count, UsageError, check_ranges, exit_status, parse, read_flags
from common.data import load
from common.members import use_compilation_cache
from common.replay import Replay


@dataclass(frozen=True)
class Args:
    """How much of the target Q-functions' work screening leaves."""

    # Datasets to train on.
    datasets: tuple[str, ...] = ("offax/hopper/medium-v1", "offax/hopper/mixed-v1", "offax/hopper/medium-expert-v1")
    # Updates of the Q-functions after which screening is measured.
    stages: tuple[int, ...] = (0, 100, 1000, 3000, 10_000)
    num_critics: Count = 8  # K.
    num_proposals: Count = 100  # N.
    hidden_dim: Count = 128  # Width of the Q-functions' layers.
    num_layers: Count = 3  # Hidden layers of the Q-functions.
    batch_size: Count = 100  # States in a minibatch (that of the paper's figure 1).
    minibatches: Count = 20  # Minibatches at each stage.
    behavior_updates: int = 5000  # Updates of the behaviour model.
    seed: int = 0  # Seed of the networks and minibatches.
    output: Path = Path("results/emaq-speed/screening")  # Without its endings .csv and .md.


def run(args: Args) -> None:
    """All measurements, a row of the CSV for each."""
    check_ranges(args)
    if args.num_critics < 2:
        raise UsageError("--num-critics: at least 2, one alone has nothing to leave out")
    if list(args.stages) != sorted(set(args.stages)) or min(args.stages, default=-1) < 0:
        raise UsageError("--stages: must rise, from 0 or later")
    if not args.datasets:
        raise UsageError("--datasets: name at least one")
    use_compilation_cache()
    plain = parse(emaq.Args, emaq.PRESETS, ["--preset", "cpu"])
    script = replace(
        plain,
        num_critics=args.num_critics,
        num_proposals=args.num_proposals,
        hidden_dim=args.hidden_dim,
        num_layers=args.num_layers,
        batch_size=args.batch_size,
    )
    hp = script.hp
    about = provenance()
    shared = {
        "git_commit": commit_of(about),
        "cpu": about["cpu"]["model"],
        "jax": about["versions"]["jax"],
        "command": f"python benchmarks/emaq_screening.py {' '.join(sys.argv[1:])}".strip(),
    }
    loaded = {name: load(name).transitions for name in args.datasets}
    path = args.output.with_name(args.output.name + ".csv")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    table = Table(path)
    for dataset in args.datasets:
        data = jax.tree.map(jnp.asarray, loaded[dataset])
        state = emaq.init(jax.random.key(args.seed), hp, script, data.observations.shape[1], data.actions.shape[1])
        _, critic = emaq.modules(script, data.actions.shape[1])
        state, _ = jax.jit(partial(emaq.train_behavior, args=script))(state, hp, Replay(data), args.behavior_updates)
        draw = jax.jit(partial(emaq.draw_pool, args=script))
        pool = draw(state, hp, Replay(data), jax.random.key(args.seed + 1))

        @jax.jit
        def train(state: emaq.State, count: int) -> emaq.State:
            ahead = Replay(data, member=jnp.zeros((), jnp.int32), extra=pool[None])  # noqa: B023
            return emaq.train(state, hp, ahead, count, script)[0]

        @jax.jit
        def share(state: emaq.State, key: jax.Array) -> jax.Array:
            key, sample_key = jax.random.split(key)
            batch = replay.sample(sample_key, Replay(data), args.batch_size)  # noqa: B023
            states = batch.next_observations
            actions = emaq.propose(state.behavior, states, key, script, batch.actions.shape[1])
            everywhere = critic.apply(state.target_critic, states, actions).min(axis=0).max(axis=0)  # noqa: B023
            best, part = emaq.max_of_min(state.target_critic, critic, states, actions)  # noqa: B023
            return jnp.stack([part, jnp.abs(best - everywhere).max() / jnp.abs(everywhere).max()])

        for before, stage in zip((0, *args.stages), args.stages, strict=False):
            state = train(state, stage - before)
            keys = jax.random.split(jax.random.key(stage), args.minibatches)
            shares, differences = jnp.stack([share(state, key) for key in keys]).T
            row = {"dataset": dataset, "updates": stage, "evaluated_share": float(shares.mean())}
            row |= {"least": float(shares.min()), "most": float(shares.max())}
            table.append([row | {"largest_relative_difference": float(differences.max())} | shared])
            print(f"{dataset}, {stage} updates: {row['evaluated_share']:.1%}", flush=True)
    write_text(args.output.with_name(args.output.name + ".md"), report(path, args))


def report(path: Path, args: Args) -> str:
    """The Markdown page made from the CSV at `path`."""
    rows = Table(path).read()
    lines = ["| dataset | updates | done | least | most |", "| :-- | --: | --: | --: | --: |"]
    for row in rows:
        shares = " | ".join(f"{float(row[name]):.1%}" for name in ("evaluated_share", "least", "most"))
        lines.append(f"| {row['dataset']} | {int(row['updates']):,} | {shares} |")
    difference = max(float(row["largest_relative_difference"]) for row in rows)
    return "\n".join(
        [
            "# What screening leaves to evaluate\n",
            "Made by `python benchmarks/emaq_screening.py`. Share of the K x N evaluations of target Q-functions that "
            "were done: mean over minibatches, least and most of them.\n",
            *lines,
            "",
            f"- K = {args.num_critics}, N = {args.num_proposals}, {args.num_layers} x {args.hidden_dim}, batch "
            f"{args.batch_size}, {args.minibatches} minibatches, seed {args.seed}",
            f"- largest difference from evaluating all: {difference:.1g} of the largest value",
            f"- {rows[0]['cpu']}; JAX {rows[0]['jax']}; commit {rows[0]['git_commit']}",
            f"\n```sh\n{rows[0]['command']}\n```\n",
        ]
    )


if __name__ == "__main__":
    with exit_status():
        run(read_flags(Args))
