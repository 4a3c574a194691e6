"""What each step away from the textbook version of EMaQ's update saves, on this machine.

    python benchmarks/emaq_speed.py
    python benchmarks/emaq_speed.py --preset cpu --dataset offax/hopper/medium-v1 --warm-up 5000 --updates 200

The steps, each with all those before it:

* textbook: every state is copied N times through every network, bins are drawn by `jax.random.categorical`, and every
  target Q-function is evaluated on every proposal.
* distribution function: bins are drawn with one random number each.
* embedding: the behaviour model embeds a state once, and its heads' first layers are split into the state's part, once
  for each state, and the part of the earlier action dimensions; the first dimension's head, which has none, is
  evaluated once for all N.
* split critics: the first layer of the target Q-functions is split likewise. (Not in the product, and in no later
  step.)
* pool: proposals are drawn ahead. Its drawing is timed by itself, and a share of it, one part in rows x uses / batch
  size, is counted with each update.
* screening: what the product does, with the pool, `algorithms.emaq.update`.

All versions run in one process, in turns, from the same state, which the product has trained for `--warm-up` updates:
how many proposals screening leaves to the other Q-functions depends on the training. It writes a row for each
measurement to `<output>.csv` and the table made from them to `<output>.md`.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from algorithms import emaq
from benchmarks.provenance import provenance
from benchmarks.tables import Table, commit_of, write_text
from common import replay
from common.cli import Count, check_ranges, exit_status, parse, read_flags
from common.data import load
from common.members import use_compilation_cache
from common.networks import descend
from common.replay import Recorded, Replay, Transitions, record


@dataclass(frozen=True)
class Args:
    """What each step away from the textbook version of EMaQ's update saves."""

    dataset: str = "offax/halfcheetah/medium-v1"  # States and actions to train on.
    preset: str = "locomotion"  # Sizes (see PRESETS in algorithms/emaq.py).
    rows: Count = 20_000  # Transitions of the dataset that are used, from the first on.
    warm_up: Count = 100  # Updates of the Q-functions before the first measurement.
    updates: Count = 2  # Updates in a measurement.
    repeats: Count = 5  # Measurements of each version.
    seed: int = 0  # Seed of the networks and minibatches.
    output: Path = Path("results/emaq-speed/locomotion")  # Without its endings .csv and .md.


class Categorical(emaq.AutoregressivePolicy):
    """The behaviour model with `jax.random.categorical`, a random number for each bin."""

    def sample(
        self, observations: jax.Array, key: jax.Array, num_samples: int, temperature: jax.Array | float = 1.0
    ) -> tuple[jax.Array, jax.Array]:
        """As the product's."""
        embedding = self.embed(observations)
        actions = jnp.zeros((num_samples, len(observations), 0))
        bins = []
        for i, head in enumerate(self.heads):
            bin_key, place_key = jax.random.split(jax.random.fold_in(key, i))
            logits = head(embedding, actions) / temperature
            logits = jnp.broadcast_to(logits, (num_samples, *logits.shape[1:]))
            bins.append(jax.random.categorical(bin_key, logits))
            actions = jnp.concatenate([actions, self.within(bins[-1], place_key)[..., None]], axis=-1)
        return actions, jnp.stack(bins, axis=-1)


def proposals(
    state: emaq.State, batch: Transitions, key: jax.Array, args: emaq.Args, copies: bool, by_bins: bool
) -> Any:
    """N proposals `[N, batch, action_dim]` for the next states, of N copies of each or with one embedding."""
    model, _ = emaq.modules(args, batch.actions.shape[-1])
    if by_bins:
        fields = ("action_dim", "num_bins", "hidden_dim", "num_layers", "head_dim", "head_layers", "prefix_dim")
        model = Categorical(**{name: getattr(model, name) for name in fields})
    states = batch.next_observations
    if not copies:
        return model.apply(state.behavior, states, key, args.num_proposals, method="sample")[0]
    states = jnp.tile(states, (args.num_proposals, 1))
    actions = model.apply(state.behavior, states, key, 1, method="sample")[0]
    return actions.reshape(args.num_proposals, len(batch.rewards), -1)


def split_critics(params: Any, observations: jax.Array, actions: jax.Array) -> jax.Array:
    """All Q-functions `[K, N, batch]` with the state's part of the first layer computed once for each state."""

    def one(layers: dict[str, dict[str, jax.Array]]) -> jax.Array:
        first, obs_dim = layers["Dense_0"], observations.shape[-1]
        x = (observations @ first["kernel"][:obs_dim] + first["bias"]) + actions @ first["kernel"][obs_dim:]
        for i in range(1, len(layers)):
            x = jax.nn.relu(x) @ layers[f"Dense_{i}"]["kernel"] + layers[f"Dense_{i}"]["bias"]
        return x[..., 0]

    (layers,) = params["params"].values()
    return jax.vmap(one)(layers)


def whole_update(
    state: emaq.State,
    batch: Transitions,
    hp: emaq.Hyperparameters,
    args: emaq.Args,
    copies: bool = False,
    by_bins: bool = False,
    split: bool = False,
) -> emaq.State:
    """An update of the Q-functions that evaluates all of them on all proposals, drawn for it."""
    _, critic = emaq.modules(args, batch.actions.shape[-1])
    key, proposal_key = jax.random.split(state.key)
    actions = proposals(state, batch, proposal_key, args, copies, by_bins)
    q_of = split_critics if split else critic.apply
    value = q_of(state.target_critic, batch.next_observations, actions).min(axis=0).max(axis=0)
    targets = batch.rewards + hp.discount * (1.0 - batch.terminations) * value

    def loss(params: Any) -> jax.Array:
        return jnp.sum(jnp.mean((critic.apply(params, batch.observations, batch.actions) - targets) ** 2, axis=1))

    grads = jax.grad(loss)(state.critic)
    params, opt = descend(emaq.ADAM, state.critic, grads, state.critic_opt, hp.critic_learning_rate)
    target = optax.incremental_update(params, state.target_critic, hp.polyak)
    return state._replace(critic=params, target_critic=target, critic_opt=opt, step=state.step + 1, key=key)


def repeated(update: Callable[[emaq.State, Transitions], emaq.State], data: Recorded, args: emaq.Args) -> Any:
    """Jit-compiled `(state, count) -> state`: `count` updates, each on a minibatch of its own."""

    def step(_: jax.Array, state: emaq.State) -> emaq.State:
        key, sample_key = jax.random.split(state.key)
        return update(state._replace(key=key), replay.sample(sample_key, Replay(data), args.batch_size))

    return jax.jit(lambda state, count: jax.lax.fori_loop(0, count, step, state))


def run(args: Args) -> None:
    """All measurements, a row of the CSV after each."""
    check_ranges(args)
    use_compilation_cache()
    script = parse(emaq.Args, emaq.PRESETS, ["--preset", args.preset])
    hp = script.hp
    everywhere = replace(script, screening=False)
    recorded = load(args.dataset).transitions
    rows = np.arange(min(args.rows, len(recorded.rewards)))
    data = jax.tree.map(jnp.asarray, record(recorded.at(rows)))
    state = emaq.init(jax.random.key(args.seed), hp, script, data.observations.shape[1], data.actions.shape[1])
    train_behavior = jax.jit(partial(emaq.train_behavior, args=script))
    state, _ = train_behavior(state, hp, Replay(data), 2 * args.warm_up)
    draw = jax.jit(partial(emaq.draw_pool, args=script))
    pool = jax.block_until_ready(draw(state, hp, Replay(data), jax.random.key(1)))

    def product(script: emaq.Args) -> Any:
        ahead = Replay(data, member=jnp.zeros((), jnp.int32), extra=pool[None])
        return jax.jit(lambda state, count: emaq.train(state, hp, ahead, count, script))

    train = product(script)
    state, _ = jax.block_until_ready(train(state, args.warm_up))
    state, metrics = train(state, args.updates)
    share = float(metrics.sums["critic/evaluated_share"]) / args.updates

    def whole(**flags: bool) -> Any:
        return repeated(lambda state, batch: whole_update(state, batch, hp, everywhere, **flags), data, script)

    versions = {
        "textbook": whole(copies=True, by_bins=True),
        "distribution function": whole(copies=True),
        "embedding": whole(),
        "split critics": whole(split=True),
        "pool": product(everywhere),
        "screening": train,
    }
    path = args.output.with_name(args.output.name + ".csv")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    about = provenance()
    shared = {
        "device": jax.devices()[0].device_kind,
        "cpu": about["cpu"]["model"],
        "cores": about["cpu"]["cores"],
        "git_commit": commit_of(about),
        "jax": about["versions"]["jax"],
        "command": f"python benchmarks/emaq_speed.py {' '.join(sys.argv[1:])}".strip(),
        "evaluated_share": share,
    }
    table = Table(path)
    for repeat in range(-1, args.repeats):  # the first one compiles and is not counted
        for name, version in [
            *versions.items(),
            ("drawing the pool", lambda state, _: draw(state, hp, Replay(data), state.key)),
        ]:
            busy, start = os.getloadavg()[0], time.perf_counter()
            jax.block_until_ready(version(state, args.updates if repeat >= 0 else 1))
            seconds = time.perf_counter() - start
            if name == "drawing the pool":  # for as many updates as there are until it is drawn again
                seconds *= script.batch_size / (len(data.rewards) * script.pool_uses)
            else:
                seconds /= args.updates
            if repeat >= 0:
                row = {"version": name, "repeat": repeat, "seconds_per_update": seconds, "load_average": busy}
                table.append([row | shared])
                print(f"{name}, repeat {repeat}: {seconds:.4g} s for each update", flush=True)
    write_text(args.output.with_name(args.output.name + ".md"), report(path, args, script))


def report(path: Path, args: Args, script: emaq.Args) -> str:
    """The Markdown page made from the CSV at `path`."""
    rows = Table(path).read()
    times: dict[str, list[float]] = {}
    for row in rows:
        times.setdefault(row["version"], []).append(float(row["seconds_per_update"]))
    drawing = statistics.median(times.pop("drawing the pool"))
    medians = {name: statistics.median(values) for name, values in times.items()}
    lines = [
        "| version | s/update | with drawing the pool | times textbook | range |",
        "| :-- | --: | --: | --: | :-- |",
    ]
    for name, median in medians.items():
        whole = median + (drawing if name in ("pool", "screening") else 0.0)
        values = times[name]
        # Repeat by repeat, which ran one after the other.
        ratios = [a / (b + whole - median) for a, b in zip(times["textbook"], values, strict=True)]
        ratio = f"{statistics.median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f}"
        lines.append(f"| {name} | {median:.4g} | {whole:.4g} | {ratio} |")
    first = rows[0]
    loads = [float(row["load_average"]) for row in rows]
    return "\n".join(
        [
            f"# EMaQ's update, preset {args.preset}\n",
            "Made by `python benchmarks/emaq_speed.py`, whose head says what the versions are.\n",
            *lines,
            "",
            f"- K = {script.num_critics}, {script.num_layers} x {script.hidden_dim}, N = {script.num_proposals}, batch "
            f"{script.batch_size}; {args.dataset}, first {args.rows} rows, after {args.warm_up} updates",
            f"- drawing the pool: {drawing:.4g} s for each update, at {script.pool_uses} uses of a state",
            f"- screening: {float(first['evaluated_share']):.1%} of the target Q-functions' evaluations were done",
            f"- {first['device']}, {first['cpu']}, {first['cores']} cores; load average {min(loads):.1f} to "
            f"{max(loads):.1f}; {args.repeats} repeats; JAX {first['jax']}; commit {first['git_commit']}",
            f"\n```sh\n{first['command']}\n```\n",
        ]
    )


if __name__ == "__main__":
    with exit_status():
        run(read_flags(Args))
