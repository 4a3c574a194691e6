import csv
import signal
import statistics
import sys
from functools import partial
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algorithms import cql, iql
from benchmarks import accelerator, peer_sides, peers
from benchmarks.peer_sides import UNIT, PeerError, Side, Trainer
from common import networks
from common.cli import UsageError
from common.replay import Transitions

# Clones with the names of the real ones, and next to nothing behind them.
JAX_CORL = """
import d4rl, gym, tqdm, wandb
import distrax
import jax.numpy as jnp
from omegaconf import OmegaConf
from pydantic import BaseModel
from typing import NamedTuple

class IQLConfig(BaseModel):
    batch_size: int = 1
    n_jitted_updates: int = 1
    hidden_dims: tuple = (1,)
    layer_norm: bool = True

config = IQLConfig(**OmegaConf.from_cli())

class Transition(NamedTuple):
    observations: object
    actions: object
    dones_float: object

class Actor(NamedTuple):
    params: object

class State(NamedTuple):
    actor: Actor

def policy(x: gym.Env) -> distrax.Distribution:
    return distrax.MultivariateNormalDiag(x, jnp.ones(3))

def create_iql_train_state(key, observations, actions, config):
    return State(Actor(jnp.zeros(config.hidden_dims)))

class IQL:
    def update_n_times(self, state, dataset, key, config):
        n = config.n_jitted_updates + policy(jnp.zeros(3)).log_prob(jnp.zeros(3))
        return State(Actor(state.actor.params + n)), {}
"""
UNIFLORAL = """
import jax, pyrallis
from dataclasses import dataclass
from typing import NamedTuple

@dataclass
class Args:
    batch_size: int
    eval_interval: int = 1000
    num_critic_updates_per_step: int = 2

class AgentTrainState(NamedTuple):
    actor: object
    actor_target: object
    dual_q: object
    dual_q_target: object

class Transition(NamedTuple):
    obs: object
    action: object
    reward: object
    next_obs: object
    done: object

class TrainState(NamedTuple):
    params: object

class Network:
    def __init__(self, *sizes):
        pass
    apply = None

DeterministicTanhActor = DualQNetwork = Network

def create_train_state(args, key, network, inputs):
    return TrainState(sum(x.sum() for x in inputs))

def make_train_step(args, actor, critic, dataset):
    return lambda carry, _: ((carry[0], jax.tree.map(lambda x: x + 1.0, carry[1])), {})

@pyrallis.wrap()
def train(config):
    pass
"""


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return folder


def side(name, algorithm="iql", path=None):
    return Side(name, algorithm, tuple(peers.SETTINGS[algorithm].items()), path)


@pytest.fixture
def modules():
    """The modules that importing a peer replaces are put back."""
    names = (*peer_sides.DATA_AND_LOGGING, "distrax")
    before = {name: sys.modules.get(name) for name in names}
    yield
    for name, module in before.items():
        if module is None:
            sys.modules.pop(name, None)
        else:
            sys.modules[name] = module


class Counter:
    """A trainer that adds `step` to its parameter and takes `seconds` by its own clock, for each update."""

    def __init__(self, step=1.0, seconds=0.01, most=1000):
        self.calls, self.value, self.clock, self.step, self.seconds = [], 0.0, 0.0, step, seconds
        self.trainer = Trainer(self.advance, lambda: [[np.array([self.value])]], most, "cpu")

    def advance(self, count):
        self.calls.append(count)
        self.value += self.step * count
        self.clock += self.seconds * count


@pytest.fixture
def counter(monkeypatch):
    """`counter(...)`: a Counter, by whose clock turns are timed."""

    def make(**settings):
        made = Counter(**settings)
        monkeypatch.setattr(peer_sides, "time", SimpleNamespace(perf_counter=lambda: made.clock))
        return made

    return make


# Figures


@pytest.mark.slow
def test_with_one_value_iql_differs_by_what_the_step_of_v_changes():
    """The same values for the policy and the critics where V stands still; else V alone has the same step."""
    module = peer_sides.changed("iql", peer_sides.ONE_VALUE)
    args, rng = iql.Args(hidden_dim=16), np.random.default_rng(0)
    shapes = [(32, 3), (32, 2), (32,), (32, 3), (32,), (32,)]
    batch = Transitions(*(rng.standard_normal(shape).astype(np.float32) for shape in shapes))
    state = jax.jit(partial(iql.init, args=args, obs_dim=3, action_dim=2))(jax.random.key(0), args.hp)
    updates = [jax.jit(partial(update, args=args)) for update in (iql.update, module.update)]
    for rate in (0.0, 3e-2):
        hp = args.hp._replace(value_learning_rate=rate)
        (ours, _), (theirs, _) = (update(state, batch, hp) for update in updates)
        distances = {
            name: max(
                float(np.abs(x - y).max())
                for x, y in zip(
                    jax.tree.leaves(getattr(ours, name)), jax.tree.leaves(getattr(theirs, name)), strict=True
                )
            )
            for name in ("value", "critic_opt", "actor_opt")
        }
        assert distances["value"] == 0
        assert (max(distances.values()) < 1e-5) == (rate == 0.0), distances


def test_ratio_is_taken_within_each_round():
    found = peers.ratio([20.0, 40.0, 60.0], [10.0, 40.0, 20.0])
    assert found == (2.0, 1.0, 3.0)  # of the medians it would be 40 / 20, of the means 1.7
    assert peers.ratio([1.0, 8.0, 9.0], [1.0, 2.0, 9.0]) == (1.0, 1.0, 4.0)
    assert str(found) == "2.00 (1.00-3.00)"
    with pytest.raises(ValueError, match="longer"):
        peers.ratio([1.0], [1.0, 2.0])


def test_cells_are_medians_and_ratios_ours_to_theirs():
    found = peers.Comparison(side("CORL"), [10.0, 20.0, 40.0], [40.0, 40.0, 40.0], [], (1, 2), "")
    assert peers.cells(found) == ["IQL, CORL", "20.0", "40.0", "2.00 (1.00-4.00)", "", ""]
    missing = peers.Comparison(side("CORL"), [], [], [], None, "why")
    assert peers.cells(missing)[:3] == ["IQL, CORL", "not timed", ""]
    assert len(peers.cells(found)) == len(peers.headings(1)) == len(peers.headings(8))


def test_turn_is_as_long_as_asked_and_counts_all_updates(counter):
    made = counter()
    assert peer_sides.turn(made.trainer, 8, 0.5) == (56, pytest.approx(0.56))
    assert made.calls == [8] * 7


@pytest.mark.parametrize("seconds, most, expected", [(4.0, 1000, 200), (4.0, 100, 96), (0.01, 1000, UNIT)])
def test_warm_up_chooses_calls_of_half_a_turn_and_has_run_one(counter, seconds, most, expected):
    made = counter(most=most)
    assert peer_sides.warm_up(made.trainer, seconds) == expected
    assert made.calls == [UNIT, UNIT, UNIT, expected]


@pytest.mark.parametrize("step, reason", [(0.0, "do not change"), (np.nan, "not finite")])
def test_warm_up_refuses_what_does_not_train(counter, step, reason):
    with pytest.raises(PeerError, match=reason):
        peer_sides.warm_up(counter(step=step).trainer, 0.01)


def test_stand_in_distributions_are_those_of_the_closed_forms():
    key, mean, log_std = jax.random.key(0), jnp.array([[0.3, -0.2, 1.0]]), jnp.array([-0.5, 0.0, 0.3])
    x = jnp.array([[0.1, 0.9, -0.4]])
    gaussian = peer_sides.MultivariateNormalDiag(mean, jnp.exp(log_std))
    expected = networks.gaussian_log_prob(x, mean, log_std)
    np.testing.assert_allclose(gaussian.log_prob(x), expected, rtol=1e-5)
    np.testing.assert_allclose(peer_sides.Normal(mean, jnp.exp(log_std)).log_prob(x).sum(-1), expected, rtol=1e-5)
    squashed = peer_sides.Transformed(gaussian, peer_sides.Block(peer_sides.Tanh(), ndims=1))
    for found, wanted in zip(
        squashed.sample_and_log_prob(seed=key), cql.squashed_sample(key, mean, log_std), strict=True
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-5)
    fixed = peer_sides.Transformed(peer_sides.Deterministic(mean), peer_sides.Tanh())
    np.testing.assert_allclose(fixed.sample(seed=None), jnp.tanh(mean))


# Flags


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"corl": None}, "--corl, --jax-corl or --unifloral"),
        ({"corl": Path("mistyped")}, "there is no directory mistyped"),
        ({"algorithms": ("iql", "bc")}, "--algorithms bc: choose from iql"),
        ({"algorithms": ()}, "at least one"),
        ({"members": 0}, "--members 0"),
        ({"rounds": 0}, "--rounds 0"),
        ({"seconds": 0.0}, "--seconds 0"),
        ({"seconds": float("inf")}, "--seconds inf"),
    ],
)
def test_flags_are_refused(changes, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        peers.main(peers.Args(**{"corl": tmp_path} | changes))


def test_bad_flags_end_with_status_2_and_one_line(spawn):
    process = spawn(peers.__file__, "--corl", ".", "--rounds", "0")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (2, "", "error: --rounds 0: must be at least 1, below 2^31\n")


# Peers


def test_peers_that_are_not_there_are_reported_without_timing_ours(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(peers, "Worker", None)  # no process is started
    out = tmp_path / "results" / "peers"
    (tmp_path / "nowhere").mkdir()
    args = peers.Args(corl=tmp_path / "nowhere", unifloral=tmp_path, algorithms=("awac",), out=out)
    assert peers.main(args) == 1
    printed = capsys.readouterr().out
    assert "awac, CORL, 2 critics: not timed: there is no" in printed
    page, rows = out.with_suffix(".md").read_text(), list(csv.DictReader(out.with_suffix(".csv").open()))
    assert [row["error"] for row in rows] == [
        f"there is no {tmp_path}/nowhere/algorithms/offline/awac.py",
        "no --jax-corl given",
        "it does not have this algorithm",
    ]
    for row in rows:
        assert f"| not timed: {row['error']} |" in page
        assert row["updates_per_second"] == ""


class Scripted:
    """In the place of a side's process: 10 updates in a second, twice as many here, and CORL stops in round 2."""

    def __init__(self, side, data, seconds):
        if side.name == "unifloral":
            raise PeerError("no torch")
        self.side, self.info, self.turns = side, peer_sides.Info(side.members, side.name, ""), 0

    def turn(self):
        self.turns += 1
        if self.side.name == "CORL" and self.turns == 2:
            raise PeerError("out of memory")
        return (20 if self.side.name == "Offax" else 10), 1.0

    def close(self):
        pass


def test_rounds_alternate_and_a_peer_that_stops_is_dropped(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "Worker", Scripted)
    for peer, files in peer_sides.FILES.items():
        write(tmp_path / peer, files["cql"], "")
    clones = {"corl": tmp_path / "CORL", "jax_corl": tmp_path / "JAX-CORL", "unifloral": tmp_path / "unifloral"}
    rows = []
    found, devices = peers.compare("cql", peers.Args(**clones, members=4, rounds=3), tmp_path, rows.append)
    corl, jax_corl, unifloral = found
    assert (corl.remark, corl.theirs, corl.ours) == ("not timed: out of memory", [], [])
    assert (unifloral.remark, unifloral.theirs) == ("not timed: no torch", [])
    assert (jax_corl.theirs, jax_corl.ours, jax_corl.population) == ([10.0] * 3, [20.0] * 3, [80.0] * 3)
    assert peers.cells(jax_corl)[3:] == ["2.00 (2.00-2.00)", "80.0", "8.00 (8.00-8.00)"]
    turns = [(row["side"], row["members"], row["round"]) for row in rows if row["round"]]
    forth = [("CORL", 1), ("JAX-CORL", 1), ("Offax", 1), ("Offax", 4)]
    expected = [(*who, 1) for who in forth] + [(*who, 2) for who in forth[:0:-1]] + [(*who, 3) for who in forth[1:]]
    assert turns == expected
    assert {row["num_critics"] for row in rows if row["round"]} == {2}  # nobody is left to need ours with ten
    assert devices == {"JAX-CORL", "Offax"}


def test_single_runs_of_a_peer_share_the_accelerator(monkeypatch):
    began, closed = [], []

    class Fake:
        info = peer_sides.Info(100, "a device", "")

        def __init__(self, *_):
            pass

        def go(self):
            began.append(self)

        def result(self):
            assert len(began) == 3, "all run before the first is asked"
            return 10 * (1 + began.index(self)), 2.0

        def close(self):
            closed.append(self)

    monkeypatch.setattr(peers, "Worker", Fake)
    row = accelerator.measure_peers(side("JAX-CORL"), 3, 300, 2.0)
    assert (row["algorithm"], row["members"], row["device"]) == ("iql, JAX-CORL", 3, "a device")
    assert row["updates_per_second"] == (10 + 20 + 30) / 2 and len(closed) == 3


def test_the_rates_of_two_devices_do_not_share_a_table(tmp_path):
    (tmp_path / "rates.csv").write_text("algorithm,members,device\niql,1,another device\n")
    with pytest.raises(UsageError, match="has rows of another device; give another --out"):
        accelerator.main(accelerator.Args(out=tmp_path / "rates.csv"))


def test_an_unknown_algorithm_is_refused_before_anything_is_measured(tmp_path):
    with pytest.raises(UsageError, match="--algorithms td3bc: choose from iql, "):
        accelerator.main(accelerator.Args(out=tmp_path / "rates.csv", algorithms=("iql", "td3bc")))
    assert not any(tmp_path.iterdir())


def test_an_error_of_ours_is_not_reported_as_a_peers(tmp_path, monkeypatch):
    def failing(side, data, seconds):
        if side.name == "Offax":
            raise PeerError("short", "Traceback ...")
        return Scripted(side, data, seconds)

    monkeypatch.setattr(peers, "Worker", failing)
    clone = write(tmp_path, "algos/iql.py", "")
    with pytest.raises(RuntimeError, match="Traceback"):
        peers.compare("iql", peers.Args(jax_corl=clone), tmp_path, lambda row: None)


@pytest.mark.slow
def test_a_comparison_from_start_to_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(peer_sides, "ROWS", 300)
    good = write(tmp_path / "good", "algos/iql.py", JAX_CORL)
    killed = write(tmp_path / "killed", "algorithms/iql.py", "import os\nos._exit(7)\n")
    out = tmp_path / "peers"
    args = peers.Args(jax_corl=good, unifloral=killed, algorithms=("iql",), members=1, rounds=3, seconds=0.02, out=out)
    assert peers.main(args) == 0
    rows = list(csv.DictReader(out.with_suffix(".csv").open()))
    assert {row["side"]: row["error"] for row in rows if row["error"]} == {
        "CORL": "no --corl given",
        "unifloral": "its process ended with status 7",
    }
    rates = {
        name: [float(row["updates_per_second"]) for row in rows if row["side"] == name and row["round"]]
        for name in ("JAX-CORL", "Offax")
    }
    assert [len(found) for found in rates.values()] == [3, 3]
    assert all(int(row["updates"]) % UNIT == 0 and float(row["seconds"]) >= 0.02 for row in rows if row["round"])
    parameters = {row["side"]: row["parameters"] for row in rows if row["round"]}
    hidden = 256 * 256 + 256
    actor, critic, value = (n * 256 + 256 + hidden + 256 * m + m for n, m in ((11, 3), (14, 1), (11, 1)))
    assert parameters == {"JAX-CORL": str(256 * 256), "Offax": str(actor + 3 + 2 * critic + value)}
    median = statistics.median(x / y for x, y in zip(rates["Offax"], rates["JAX-CORL"], strict=True))
    page, printed = out.with_suffix(".md").read_text(), capsys.readouterr().out
    assert f"| IQL, JAX-CORL | {peers.rate_text(rates['JAX-CORL'])} | {peers.rate_text(rates['Offax'])} |" in page
    assert f"{median:.2f} (" in page
    assert "iql, unifloral, 2 critics: not timed: its process ended with status 7" in printed


def test_an_error_of_a_peer_becomes_one_line(monkeypatch, tmp_path):
    def broken(side, data):
        raise AttributeError("module 'peer_iql' has no attribute 'TwinQ'\nand more")

    data = tmp_path / "data.npz"
    np.savez(data, rewards=np.zeros(3))
    monkeypatch.setitem(peer_sides.BUILDERS, "CORL", broken)
    monkeypatch.setattr(sys, "argv", ["peers.py", "--corl", "x"])
    ours, theirs = Pipe()
    handler = signal.getsignal(signal.SIGINT)
    try:
        peer_sides.serve(theirs, side("CORL"), data, 0.01)
    finally:
        signal.signal(signal.SIGINT, handler)
    error = ours.recv()
    assert isinstance(error, PeerError)
    assert error.args[0] == "AttributeError: module 'peer_iql' has no attribute 'TwinQ'"


@pytest.mark.usefixtures("modules")
def test_a_file_is_imported_without_the_packages_for_data_and_logging(tmp_path):
    path = write(tmp_path, "algos/iql.py", JAX_CORL) / "algos" / "iql.py"
    module, _ = peer_sides.load(path)
    assert (module.config.batch_size, module.config.layer_norm) == (1, True)
    np.testing.assert_allclose(module.policy(jnp.zeros(3)).log_prob(jnp.zeros(3)), -1.5 * np.log(2 * np.pi), rtol=1e-5)


@pytest.mark.usefixtures("modules")
def test_a_setting_that_a_peer_no_longer_has_is_an_error(tmp_path):
    clone = write(tmp_path, "algos/iql.py", JAX_CORL.replace("    layer_norm: bool = True\n", ""))
    with pytest.raises(PeerError, match="no layer_norm any more"):
        peer_sides.build_jax_corl(side("JAX-CORL", path=clone), peer_sides.synthetic())


@pytest.mark.usefixtures("modules")
def test_a_step_of_several_critic_updates_counts_as_several(tmp_path):
    clone = write(tmp_path, "algorithms/td3_bc.py", UNIFLORAL)
    trainer = peer_sides.build_unifloral(side("unifloral", "td3_bc", clone), peer_sides.synthetic())
    trainer.advance(16)
    actor, critic = trainer.networks()  # each step adds one; targets are not counted
    assert (actor[0], critic[0]) == (8.0, 8.0)
