"""How hard an offline problem is: what the best of N proposals of the behaviour policy leaves to be gained.

    python -m benchmarks.complexity RUN_DIR

The mathematics of EMaQ (Ghasemipour et al., 2021, arXiv:2007.11091), in numpy and exact for finite distributions. With
V_N(s) = E max_i Q(s, a_i) over a_1, ..., a_N ~ mu(. | s), independent,

    Eq. (5)        T Q(s, a) = r(s, a) + discount E_{s'} V_N(s'),  whose fixed point is Q_N
    Theorem 3.5    D(s, N) = max_{a in supp mu(. | s)} Q(s, a) - V_N(s)
    Eq. (8)        ||Q_N - Q*||_inf <= discount / (1 - discount) max_{s, a} E_{s'} D(s', N)
    Eq. (9)                         <= discount / (1 - discount) max_s D(s, N)

where Q* is optimal among the policies that stay within mu's support, and Q in D is Q* or Q_N. Section 3.3 proposes D as
a function of N as the measure of difficulty: the sooner it falls, the fewer proposals suffice.

The command takes a run of algorithms/emaq.py: its mu, the minimum of its Q-functions for Q, and states of its dataset.
It prints D over N for each member, and writes it to complexity.json with complexity.png. For each state it draws one
pool of M proposals; V_N is what these say of N fresh draws, exactly and without bias. What to keep in mind:

* The maximum over the support is taken to be the pool's. It is at most the true one, so D is too small, for all N by
  the same amount in each state: differences between two N are unbiased. At N = M it is 0 by construction. Read it for
  N well below M, and see how much a larger M changes it.
* The Q-functions are estimates, of Q_N for the N of the run. For this N the theorem holds with D of the true Q_N, for
  others it needs Q*.
* The bounds are maxima over the sampled states, below those over all. For Eq. (9) these are the states and the next
  states of the sampled transitions. For Eq. (8) the next state of each counts as the only one that could follow, and 0
  after a termination: right where the environment is deterministic.
* D has the unit of the rewards as the run has scaled them. Beside its mean stands the same in spreads, a spread being
  the root mean square over states of the standard deviation of Q over mu's proposals; and what is left of D at N = 1.
"""

import dataclasses
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from algorithms import emaq
from benchmarks.provenance import provenance
from benchmarks.tables import aligned
from common.cli import Count, Range, UsageError, check_ranges, exit_status, read_flags
from common.data import load
from common.members import use_compilation_cache
from common.replay import fit_transform
from common.report import fill_tree, read_tree, write_json


def expected_max_of_pool(pool: np.ndarray, n: int) -> np.ndarray:
    """Unbiased estimate of E max of `n` fresh draws from where `pool` [..., M] was drawn: [...] in float64.

    It is the mean of the maximum over all subsets of `n` values of the pool (a U-statistic): in ascending order the
    i-th value is the maximum of comb(i - 1, n - 1) of the comb(M, n) subsets.

    Raises ValueError for `n` below 1 or above M, of which a pool of M says nothing without bias.
    """
    ordered = np.sort(np.asarray(pool, np.float64), axis=-1)
    size = ordered.shape[-1]
    if not 1 <= n <= size:
        raise ValueError(f"a pool of {size} has no subset of {n}")
    # From the top: n / M, and each value's share from the one above it, times (i - n) / (i - 1).
    i = np.arange(size, 1, -1)
    weights = n / size * np.cumprod(np.append(1.0, np.maximum(i - n, 0) / (i - 1)))
    return ordered[..., ::-1] @ weights


def difficulty_of_pool(pool: np.ndarray, n: int) -> np.ndarray:
    """D(s, `n`) by `expected_max_of_pool`, [...], with the pool's maximum for that of the support; ValueError alike."""
    pool = np.asarray(pool, np.float64)
    return 0.0 - expected_max_of_pool(pool - pool.max(-1, keepdims=True), n)  # a minus sign would write zero as -0.0


def suboptimality_bound(
    difficulties: np.ndarray, discount: float, transitions: np.ndarray | None = None
) -> np.floating:
    """The bound of Theorem 3.5 on |Q_N - Q*| in any state and action.

    `difficulties` [states] are D(., N) of Q* or of Q_N: the theorem holds with either. With `transitions`
    [..., states], the probabilities of the next state for each pair of state and action, it is Eq. (8); without, it is
    Eq. (9), which is never tighter and needs no model. A row's sum falls short of 1 by the probability of termination.
    """
    expected = difficulties if transitions is None else np.asarray(transitions) @ difficulties
    return discount / (1 - discount) * np.max(expected)


# The command


@dataclass(frozen=True)
class Args:
    """D(s, N) over N, of a run of EMaQ, for states of its dataset."""

    run: Annotated[Path, tyro.conf.Positional]  # Run directory of algorithms/emaq.py.
    num_states: Count = 500  # Transitions of the dataset whose states to look at, at random; all, if it has fewer.
    pool: Annotated[int, Range("at least 2", 2)] = 400  # The pool's M: proposals drawn for each state.
    seed: int = 0  # Decides transitions and proposals.
    dataset: str | None = None  # Where the run's dataset is now. Default: where it was.
    output: Path | None = None  # Directory of complexity.json and complexity.png. Default: that of the run.


class Trained(NamedTuple):
    """What is needed of a run."""

    args: emaq.Args
    # Entries of config.json: `member`, `seed`, `swept`, `hyperparameters`; without those that diverged.
    members: list[dict[str, Any]]
    behavior: list[Any]  # Of each member.
    critic: list[Any]
    transitions: Any  # The dataset, transformed as for the run.


def read(directory: Path, dataset: str | None) -> Trained:
    """The run in `directory`, on the dataset at its own or another place; UsageError for whatever does not fit."""
    config_file, checkpoint = directory / "config.json", directory / "checkpoint" / "state.npz"
    try:
        config = json.loads(config_file.read_text())
        algorithm = config["algorithm"]
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"{directory} holds no run: it has no config.json") from None
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{config_file} is damaged or not of a run") from None
    if algorithm != "emaq":
        raise UsageError(f"{directory} holds a run of {algorithm}; this needs one of algorithms/emaq.py")
    arrays, about = read_tree(checkpoint)
    try:
        flags, members = config["flags"], config["members"]
        # A flag that is newer than the run stays at its default; that the sizes fit is checked with the checkpoint.
        hp = emaq.Hyperparameters(**{name: flags[name] for name in emaq.Hyperparameters._fields if name in flags})
        names = {field.name for field in dataclasses.fields(emaq.Args)} & flags.keys()
        args = emaq.Args(hp=hp, **{name: flags[name] for name in names | {"dataset"}})
        digest = about["identity"]["dataset_sha256"]
        alive = [i for i in range(len(members)) if str(i) not in about["diverged"]]
        discounts = [float(member["hyperparameters"]["discount"]) for member in members]
    except (KeyError, TypeError, AttributeError):
        raise UsageError(f"the run in {directory} is damaged or was made by another version of emaq.py") from None
    if not alive:
        raise UsageError(f"every member of the run in {directory} diverged")
    if max(discounts) >= 1:
        raise UsageError(f"the run in {directory} has discount 1, for which there is no bound")

    data = load(dataset or args.dataset, args.env)
    if data.describe()["dataset_sha256"] != digest:
        raise UsageError(f"{dataset or args.dataset} is not the dataset of the run in {directory}; pass --dataset")
    if not about["done"]["offline"] + about["done"]["online"]:
        raise UsageError(f"the Q-functions of the run in {directory} have not been trained yet; --resume True goes on")
    transitions = fit_transform(data.transitions, args).transitions(data.transitions)
    sizes = {"obs_dim": transitions.observations.shape[1], "action_dim": transitions.actions.shape[1]}
    shapes = jax.eval_shape(partial(emaq.init, args=args, **sizes), jax.random.key(0), hp)

    def part(name: str) -> list[Any]:
        like = jax.tree.map(lambda x: np.zeros((len(members), *x.shape), x.dtype), getattr(shapes, name))
        filled = fill_tree(checkpoint, arrays, like, f"['state'].{name}")
        return [jax.tree.map(lambda x: x[i], filled) for i in alive]  # noqa: B023

    return Trained(args, [members[i] for i in alive], part("behavior"), part("critic"), transitions)


@partial(jax.jit, static_argnames=("args", "action_dim"))
def pool_values(
    behavior: Any, critic: Any, observations: jax.Array, key: jax.Array, args: emaq.Args, action_dim: int
) -> jax.Array:
    """min_k Q_k `[states, N]` of N proposals for each of the `observations [states, obs_dim]`."""
    _, q_functions = emaq.modules(args, action_dim)

    def of_state(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
        observation, number = inputs
        observation, own_key = observation[None], jax.random.fold_in(key, number)
        actions = emaq.propose(behavior, observation, own_key, args, action_dim)
        return q_functions.apply(critic, observation, actions).min(axis=0)[:, 0]

    block = max(1, 8192 // args.num_proposals)  # states at a time: memory
    return jax.lax.map(of_state, (observations, jnp.arange(len(observations))), batch_size=block)


def counts(pool: int, own: int) -> list[int]:
    """1, 2, 5, 10, 20, ... up to `pool`, and the run's `own` N if it is not above."""
    series = [digit * 10**power for power in range(len(str(pool))) for digit in (1, 2, 5)]
    return sorted({n for n in (*series, own) if n <= pool})


def measure(
    values: np.ndarray, next_values: np.ndarray, terminations: np.ndarray, discount: float, numbers: list[int]
) -> dict[str, Any]:
    """The figures of one member, from pools `[states, M]` of states and next states and flags `[states]`."""
    spread = float(np.sqrt(np.mean(np.var(values, axis=-1))))
    whole = float(difficulty_of_pool(values, 1).mean())
    rows = []
    for n in numbers:
        here, after = difficulty_of_pool(values, n), difficulty_of_pool(next_values, n)
        mean = float(here.mean())
        quantiles = {f"quantile_{q}": float(np.percentile(here, q)) for q in (10, 50, 90)}
        row = {"n": n, "mean": mean, **quantiles, "max": float(here.max())}
        row |= {"mean_in_spreads": mean / spread if spread else None, "share_left": mean / whole if whole else None}
        row["bound_eq_9"] = float(suboptimality_bound(np.concatenate([here, after]), discount))
        row["bound_eq_8"] = float(suboptimality_bound((1 - terminations) * after, discount))
        rows.append(row)
    return {"spread": spread, "q_mean": float(values.mean()), "discount": discount, "rows": rows}


def main(args: Args) -> None:
    """Read the run, draw pools, measure, print and write."""
    check_ranges(args)
    use_compilation_cache()
    run = read(args.run, args.dataset)
    total, action_dim = run.transitions.actions.shape
    rng = np.random.default_rng(args.seed)
    rows = np.sort(rng.choice(total, min(args.num_states, total), replace=False))
    drawn = run.transitions.at(rows)
    states = np.concatenate([drawn.observations, drawn.next_observations])
    numbers = counts(args.pool, run.args.num_proposals)
    key, drawing = jax.random.key(args.seed), dataclasses.replace(run.args, num_proposals=args.pool)

    results = []
    for entry, behavior, critic in zip(run.members, run.behavior, run.critic, strict=True):
        values = np.asarray(pool_values(behavior, critic, states, key, drawing, action_dim), np.float64)
        if not np.isfinite(values).all():
            raise UsageError(f"{args.run}: the Q-functions of member {entry['member']} are not finite")
        here, after = np.split(values, 2)
        discount = entry["hyperparameters"]["discount"]
        result = measure(here, after, run.transitions.terminations[rows], discount, numbers)
        results.append({name: entry[name] for name in ("member", "seed", "swept")} | result)

    about = {"run": str(args.run), "dataset": run.args.dataset, "states": len(rows), "pool": args.pool}
    about |= {"seed": args.seed, "num_proposals_of_run": run.args.num_proposals}
    output = args.output or args.run
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "complexity.json", about | {"members": results} | provenance())
    plot(output / "complexity.png", about, results)
    for result in results:
        show(about, result)
    print(f"N of the run: {about['num_proposals_of_run']}; {len(rows)} states, pools of {args.pool}, whose best action")
    print(f"stands for that of the support: at N = {args.pool} D is 0 by construction; results in {output}", flush=True)


def name_of(result: dict[str, Any]) -> str:
    """The member as text."""
    swept = "".join(f", {name}={value:g}" for name, value in result["swept"].items())
    return f"member {result['member']} (seed {result['seed']}{swept})"


def show(about: dict[str, Any], result: dict[str, Any]) -> None:
    """The table of a member."""

    def cell(value: float | None) -> str | None:
        if value is None:
            return None
        digits = 3 if abs(value) >= 0.1 else 2
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"

    columns = {"mean": "mean", "median": "quantile_50", "90 %": "quantile_90", "max": "max"}
    columns |= {"spreads": "mean_in_spreads", "left": "share_left", "Eq. 9": "bound_eq_9", "Eq. 8": "bound_eq_8"}
    rows = [[str(row["n"]), *(cell(row[name]) for name in columns.values())] for row in result["rows"]]
    print(f"D(s, N) on {about['dataset']}, {name_of(result)}", aligned(["N", *columns], rows), sep="\n")
    print(f"Q: mean {cell(result['q_mean'])}, spread over mu's proposals {cell(result['spread'])}")


def plot(path: Path, about: dict[str, Any], results: list[dict[str, Any]]) -> None:
    """D over N, a panel for each member: mean, median and quantiles, maximum over the states."""
    from matplotlib.figure import Figure

    wide = min(len(results), 3)
    high = -(-len(results) // wide)
    figure = Figure(figsize=(4.5 * wide, 0.4 + 3.6 * high), layout="constrained")
    for i, result in enumerate(results):
        axes = figure.add_subplot(high, wide, i + 1)
        x = [row["n"] for row in result["rows"]]

        def line(name: str, result: dict[str, Any] = result) -> list[float]:
            return [row[name] for row in result["rows"]]

        axes.fill_between(x, line("quantile_10"), line("quantile_90"), alpha=0.2, linewidth=0, label="10 to 90 %")
        axes.plot(x, line("mean"), "-o", markersize=3, color="C0", label="mean over states")
        axes.plot(x, line("quantile_50"), color="C0", linewidth=1, linestyle=":", label="median")
        axes.plot(x, line("max"), color="C3", linewidth=1, linestyle="--", label="maximum")
        if about["num_proposals_of_run"] <= about["pool"]:
            axes.axvline(about["num_proposals_of_run"], color="tab:gray", linewidth=1, label="N of the run")
        if spread := result["spread"]:
            scale = (lambda y, s=spread: y / s, lambda y, s=spread: y * s)
            axes.secondary_yaxis("right", functions=scale).set_ylabel("in spreads of Q over proposals", fontsize=8)
        axes.set_xscale("log")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("N")
        axes.set_ylabel("D(s, N)")
        axes.set_title(name_of(result), fontsize=9)
        axes.grid(alpha=0.2)
        axes.legend(frameon=False, fontsize=8)
    figure.suptitle(f"D(s, N) on {about['dataset']}: {about['states']} states, pools of {about['pool']}", fontsize=10)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    with exit_status():
        main(read_flags(Args))
