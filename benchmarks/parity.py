"""One update after another here and in CORL, JAX-CORL and unifloral, from the same weights, on the same minibatches.

    python benchmarks/parity.py --corl ../CORL --jax-corl ../JAX-CORL --unifloral ../unifloral --out results/parity

The paths are your own clones, as for `benchmarks/peers.py`, which also says what is imported of them and how. Both
sides do their own updates: ours `update` of the algorithm's script, the peer the function that its script calls. Our
initial weights go into the peer's networks, by kind and shape; minibatches are of the same rows; and where an update
draws random numbers, both sides get the same ones, in the place of their generators'. Settings that both have are the
peer's defaults, sizes of networks those of `benchmarks/peers.py`.

A difference is the largest absolute one of two sets of outputs (actions of the policy's mean, Q-values, values, at rows
in no minibatch), divided by the root mean square of the peer's. Where a peer does something else, `CHANGES` has the
pieces of our script that do it, and what would stand there to do as the peer. So our side runs as it stands, with all
of these changes but for one, and with all; what is left then should be rounding, which float64 makes a billion times
smaller. The peer runs as it stands, in every run.

Exit status: 0 when something was compared, 1 when no peer could run, 2 for bad usage.
"""

import contextlib
import io
import math
import multiprocessing
import re
import signal
import sys
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np

from benchmarks import parity_sides, peer_sides, peers
from benchmarks.parity_sides import Ours
from benchmarks.peer_sides import UNIT, PeerError, Side
from benchmarks.provenance import provenance
from benchmarks.tables import Table, commit_of, write_text
from common.cli import Count, UsageError, exit_status, read_flags

CHANGES_TEXT = """
no tanh: the policy's mean does not pass through tanh
- jnp.tanh(trunk(observations, training=training))
+ trunk(observations, training=training)

LayerNorm: the critics have LayerNorm
- *sizes, kernel_init, args.layer_norm
+ *sizes, kernel_init, True

no scalars: the log standard deviation has no learned scale and offset
- self.param("log_std_scale", nn.initializers.constant(1.0), ())
+ 1.0
- self.param("log_std_offset", nn.initializers.constant(-1.0), ())
+ 0.0

cosine: the cosine of the policy's rate has the precision of the run, not 32 bits in any
- step.astype(jnp.float32)
+ step.astype(float)

32 bits: the expectile's weights and the discount have 32 bits in any run (`asymmetric_l2_loss`, `_update_q`)
- expectile - (q < v)
+ expectile - (q < v).astype(jnp.float32)
- hp.discount * (1.0 - batch.terminations)
+ jnp.float32(hp.discount) * (1.0 - batch.terminations)

old V: policy and critics learn from V before its update (CORL's `train`, unifloral's `_train_step`)
- value.apply(value_params, both)
+ value.apply(state.value, both)

mean over critics: the critics' loss is their mean, not their sum, which doubles Adam's epsilon for them
- jnp.sum(jnp.mean((q - targets) ** 2, axis=1))
+ jnp.mean((q - targets) ** 2)

epsilon: Adam's epsilon is 1e-5, not 1e-8 (`create_train_state`)
- optax.scale_by_adam()
+ optax.scale_by_adam(eps=1e-5)

cosine for all: the rates of V and the critics follow the policy's cosine (`create_train_state`)
- hp.value_learning_rate)
+ cosine_decay(state.step, args.actor_horizon) * hp.value_learning_rate)
- hp.critic_learning_rate)
+ cosine_decay(state.step, args.actor_horizon) * hp.critic_learning_rate)

odd updates: policy and targets move in updates 1, 3, 5, ..., not 2, 4, 6, ... (`update_n_times`)
- state.step % args.policy_delay == 0
+ state.step % args.policy_delay == 1

1e-7: the mean size of Q by which its weight is divided has 1e-7 added (`_actor_loss_function`)
- stop_gradient(jnp.abs(q).mean())
+ stop_gradient(jnp.abs(q).mean() + 1e-7)

broadcast losses: Q-values are [batch, 1], all else [batch]: `update_critic` and `update_actor` average all pairs
- targets = batch.rewards + hp.discount * (1.0 - batch.terminations) * next_q
+ targets = batch.rewards + hp.discount * (1.0 - batch.terminations) * next_q[:, None]
- assert q.shape[1:] == targets.shape, (q.shape, targets.shape)
- jnp.mean((q - targets) ** 2, axis=1)
+ jnp.mean((q[:, :, None] - targets) ** 2, axis=(1, 2))
- -jnp.mean(weights * log_prob)
+ -jnp.mean(weights[:, None] * log_prob)

actions at s: the target's actions are the policy's at the state, not the next one (`update_critic`)
- next_key, *actor.apply(state.actor, batch.next_observations)
+ next_key, *actor.apply(state.actor, batch.observations)

late target: the target moves once in 8 updates (`update_n_times`)
- critic_params, state.target_critic, hp.polyak
+ critic_params, state.target_critic, hp.polyak * (state.step % 8 == 7)

no limits: neither sampled actions are clipped to [-1, 1] nor weights at 100
- jnp.clip(mean + jnp.exp(log_std) * noise, -1.0, 1.0)
+ mean + jnp.exp(log_std) * noise
- jnp.minimum(jnp.exp(advantages / hp.temperature), hp.weight_clip)
+ jnp.exp(advantages / hp.temperature)

alpha's rate: the temperature learns at the critics' rate, not the policy's
- state.alpha_opt, hp.actor_learning_rate
+ state.alpha_opt, hp.critic_learning_rate

in turn: temperature, policy and critics move one after the other, each by what the one before has become
- def update(
+ def at_once(
- def act(
+ def update(state, batch, hp, args):
+     for names in (["log_alpha", "alpha_opt"], ["actor", "actor_opt"], ["critic", "critic_opt", "target_critic"]):
+         new, info = at_once(state, batch, hp, args)
+         state = state._replace(**{name: getattr(new, name) for name in names})
+     return state._replace(step=new.step), info
+ def act(

penalty at s': in the penalty, the policy's actions at the next state are valued there (`_q_loss_fn`)
- critic.apply(params, batch.observations, sampled)
+ critic.apply(params, jnp.stack([batch.observations, batch.observations, batch.next_observations]), sampled)

joint penalty: one logsumexp over all critics and the data's action, without densities, as a mean (`_q_loss_fn`)
- jax.nn.logsumexp(sampled_q - log_density, axis=1) - q
+ jax.nn.logsumexp(jnp.concatenate([sampled_q, q[:, None]], axis=1), axis=(0, 1)) - q
- weight * gap.sum()
+ weight * gap.mean()
"""
CHANGES = {part.partition(":")[0]: part for part in CHANGES_TEXT.strip().split("\n\n")}
"""What peers do in another way: name, description, and pieces of our scripts' text with what stands there instead."""


class Case(NamedTuple):
    """An algorithm of a peer: our settings, changes that all of our runs have, and those that are looked at."""

    settings: dict[str, Any]
    common: tuple[str, ...] = ()
    differences: tuple[str, ...] = ()


COSINE = {"actor_decay_updates": 1_000_000}
CASES = {
    ("CORL", "iql"): Case(COSINE, ("cosine", "32 bits"), ("old V", "mean over critics")),
    ("CORL", "td3_bc"): Case({}),
    ("CORL", "awac"): Case({"temperature": 1.0}),
    ("CORL", "cql"): Case({}),
    ("JAX-CORL", "iql"): Case(COSINE, ("cosine", "no tanh")),
    ("JAX-CORL", "td3_bc"): Case(
        {"actor_learning_rate": 1e-3, "critic_learning_rate": 1e-3}, ("LayerNorm",), ("odd updates",)
    ),
    ("JAX-CORL", "awac"): Case(
        {"temperature": 1.0}, ("LayerNorm",), ("broadcast losses", "actions at s", "late target", "no limits")
    ),
    ("JAX-CORL", "cql"): Case({"conservative_weight": 5.0, "actor_learning_rate": 3e-4}),
    ("unifloral", "iql"): Case(COSINE, ("cosine",), ("old V", "cosine for all", "epsilon", "mean over critics")),
    ("unifloral", "td3_bc"): Case({}, (), ("epsilon", "mean over critics", "1e-7")),
    ("unifloral", "cql"): Case(
        {}, ("no scalars",), ("in turn", "penalty at s'", "joint penalty", "alpha's rate", "epsilon")
    ),
}


# Comparison


def variants(differences: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Differences that are left in a run: all of them, each alone, none."""
    return list(dict.fromkeys([differences, *((name,) for name in differences), ()]))


def pieces(case: Case, left: Sequence[str]) -> list[tuple[str, str]]:
    """What is to be changed in our script so that only these differences are left."""
    names = [*case.common, *(name for name in case.differences if name not in left)]
    found = [piece for name in names for piece in re.findall(r"^- (.*)\n?((?:\+ .*\n?)*)", CHANGES[name], re.MULTILINE)]
    return [(old, "\n".join(line[2:] for line in new.splitlines())) for old, new in found]


Outputs = dict[str, Any]


def run(side: Any, numbers: Sequence[int]) -> tuple[Outputs, Outputs]:
    """Outputs before the updates of these numbers and after them."""
    before = side.outputs()
    for number in numbers:
        side.advance(number)
    return before, side.outputs()


def difference(x: Outputs, y: Outputs) -> dict[str, float]:
    """By name, the largest absolute difference, divided by the root mean square of `y`."""
    found = {}
    for name, theirs in y.items():
        ours, theirs = np.asarray(x[name]), np.asarray(theirs)
        assert ours.shape == theirs.shape, (name, ours.shape, theirs.shape)
        found[name] = float(np.abs(ours - theirs).max() / np.sqrt(np.mean(np.square(theirs, dtype=np.float64))))
    return found


def compare(ours: tuple[Outputs, Outputs], theirs: tuple[Outputs, Outputs]) -> dict[str, float]:
    """Differences after the updates, and how far our outputs have moved. PeerError unless both sides start as one."""
    start = max(difference(ours[0], theirs[0]).values())
    if not start < 1e-3:
        raise PeerError(f"its networks differ by {start:.0e} before the first update")
    moved = {f"{name}_moved": value for name, value in difference(*ours).items()}
    return difference(ours[1], theirs[1]) | moved


def trial(side: Side, updates: int, precision: str) -> list[dict[str, Any]]:
    """A row for each of the `variants`, in float32 for the first and the last."""
    jax.config.update("jax_enable_x64", precision == "float64")
    warnings.simplefilter("ignore")
    sys.argv = sys.argv[:1]  # some read flags while they are imported
    case, rows, after = CASES[side.name, side.algorithm], [], None
    settings = dict(side.settings) | case.settings
    inputs = parity_sides.make_inputs(side.algorithm, settings.get("num_actions", 1), updates, precision)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            theirs = parity_sides.PEERS[side.name](side, inputs)
            for left in variants(case.differences):
                if precision == "float64" or left in (case.differences, ()):
                    ours = Ours(side.algorithm, settings, inputs, pieces(case, left))
                    if after is None:
                        theirs.start(ours.weights())
                        after = run(theirs, range(0, updates, theirs.unit))
                    found = compare(run(ours, [k // theirs.repeat for k in range(updates)]), after)
                    rows.append({"differing": ", ".join(left) or "nothing"} | found)
    except (Exception, SystemExit) as error:  # whatever a peer's file does, it is reported
        rows.append({"differing": f"not compared: {peer_sides.one_line(error)}"})
    return rows


def apart(arguments: tuple[Side, int, str]) -> list[dict[str, Any]]:
    """`trial` in a process of its own, in which a peer's import and the precision end."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        try:
            return executor.submit(trial, *arguments).result()
        except BrokenProcessPool:
            return [{"differing": "not compared: its process ended"}]


# The run


@dataclass(frozen=True)
class Args(peers.Clones):
    """Updates here beside those of CORL, JAX-CORL and unifloral, from the same weights, on the same minibatches."""

    updates: int = 200  # Updates of both sides.
    jobs: Count = 1  # Processes at the same time, of 1 GB each.

    def validate(self) -> None:
        """UsageError for flags that leave nothing to do."""
        super().validate()
        if self.updates < UNIT or self.updates % UNIT:
            raise UsageError(f"--updates {self.updates}: must be a multiple of {UNIT}, at least {UNIT}")


OUTPUTS = ("actions", "q", "v")
HEAD = """# The same updates in CORL, JAX-CORL and unifloral

Largest relative differences of actions, Q-values and, of IQL, values after {updates} updates of both sides from the
same weights, on the same minibatches, with the same noise. Made by `benchmarks/parity.py`, whose head says how.

The peers' code is as it stands. `differing` is what they do in another way than ours: in the first row of a pair, our
update is as it stands, with the settings and networks listed below; in the others, our lines are changed to what the
peer does, but for the one thing that is named; in the last, `nothing` differs, and what is left is rounding: {most} at
most in float64. `moved` is the same measure for our outputs before and after.
"""


def lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The table of the page: rows of both precisions side by side."""
    pairs: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["precision"], reverse=True):  # those of float64 are all there are
        title = f"{peers.TITLES[row['algorithm']]}, {row['peer']}"
        pairs.setdefault((title, row["differing"].replace("|", "/")), {})[row["precision"]] = row
    found = [
        "|  | differing | float32: actions, Q, V | float64: actions, Q, V | moved |",
        "| :-- | :-- | :-- | :-- | :-- |",
    ]
    for key, pair in pairs.items():
        cells = []
        for precision, suffix, form in (("float32", "", ".0e"), ("float64", "", ".0e"), ("float64", "_moved", ".2g")):
            row = pair.get(precision, {})
            cells.append(", ".join(f"{row[name + suffix]:{form}}" for name in OUTPUTS if name in row))
        found.append(f"| {' | '.join([*key, *cells])} |")
    return found


def page(args: Args, about: dict[str, Any], rows: Sequence[dict[str, Any]], begun: str) -> str:
    """The Markdown page."""
    notes, used = [], {}
    for peer, algorithm in dict.fromkeys((row["peer"], row["algorithm"]) for row in rows):
        case = CASES[peer, algorithm]
        given = [*(f"{name} {value:g}" for name, value in case.settings.items()), *case.common]
        given += filter(None, [peers.REMARKS.get((peer, algorithm))])
        notes.append(f"* {peers.TITLES[algorithm]}, {peer}: {'; '.join(given) or 'ours as it stands'}")
        used |= dict.fromkeys((*case.common, *case.differences))
    rest = [row for row in rows if row["differing"] == "nothing" and row["precision"] == "float64"]
    most = max((row[name] for row in rest for name in OUTPUTS if name in row), default=math.nan)
    return "\n".join(
        [
            HEAD.format(updates=args.updates, most=f"{most:.0e}"),
            *lines(rows),
            "\nWhat ours has in all rows of a pair, beside the sizes of its networks, and how the peer stands out:\n",
            *notes,
            "\nThe changes:\n",
            *(f"```diff\n{CHANGES[name]}\n```\n" for name in used),
            f"- processor: {about['cpu']['model']}, {about['cpu']['cores']} cores; updates on its cores",
            f"- date: {begun} to {peers.now()}; commit: {commit_of(about)}",
            *peers.sources(args, about),
        ]
    )


def main(args: Args) -> int:
    """Compare, print the table, write the results; the exit status."""
    args.validate()
    about, begun, rows = provenance(), peers.now(), []
    sides = [x for name in args.algorithms for x in args.sides(name) if x.path and (x.name, name) in CASES]
    if not sides:
        raise UsageError(f"none of these clones has one of {', '.join(args.algorithms)} to compare with")
    trials = [(side, args.updates, precision) for side in sides for precision in ("float32", "float64")]
    with ThreadPoolExecutor(args.jobs) as threads:
        for (side, _, precision), found in zip(trials, threads.map(apart, trials), strict=True):
            given = {"peer": side.name, "algorithm": side.algorithm, "precision": precision}
            rows += [given | row for row in found]
            print(*rows[-len(found) :], sep="\n", flush=True)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        columns = [key for row in rows for key in row]
        table = Table(args.out.with_name(args.out.name + ".csv"))
        table.path.unlink(missing_ok=True)
        table.append([dict.fromkeys(columns) | row for row in rows])
        write_text(args.out.with_name(args.out.name + ".md"), page(args, about, rows, begun))
    return 0 if any("q" in row for row in rows) else 1


def stop(number: int, _: Any) -> NoReturn:
    """Ends the processes of `apart` too."""
    for child in multiprocessing.active_children():
        child.kill()
    sys.exit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    with exit_status():
        sys.exit(main(read_flags(Args)))
