"""The sides that `benchmarks/peers.py` times: how each is imported, built, warmed up and run, in a process of its own.

Of CORL, JAX-CORL and unifloral nothing is here but the names of their files, classes and functions, and the arguments
that these take. A change of those names shows as an error, which the comparison reports.
"""

import contextlib
import importlib
import importlib.machinery
import importlib.util
import io
import math
import os
import signal
import sys
import time
import traceback
import types
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from common.members import make_members, usable_cores
from common.replay import Replay, Transitions, record
from common.runs import STRETCH

OBS_DIM, ACTION_DIM, ROWS = 11, 3, 200_000
BATCH_SIZE, HIDDEN_DIM = 256, 256
UNIT = 8
"""Every number of updates is a multiple of it: JAX-CORL compiles eight together."""
OURS = "Offax"
ONCE = "Offax, V once"  # IQL, changed by `ONE_VALUE`
FILES = {
    "CORL": {name: f"algorithms/offline/{name}.py" for name in ("iql", "td3_bc", "awac", "cql")},
    "JAX-CORL": {"iql": "algos/iql.py", "td3_bc": "algos/td3bc.py", "awac": "algos/awac.py", "cql": "algos/cql.py"},
    "unifloral": {name: f"algorithms/{name}.py" for name in ("iql", "td3_bc", "cql")},
}
"""Where each peer's algorithms are in its clone."""
DATA_AND_LOGGING = ("d4rl", "gym", "mujoco_py", "omegaconf", "pydantic", "pyrallis", "tqdm", "wandb")
"""Packages that take no part in an update."""

# What is timed


class Side(NamedTuple):
    """One thing to time: a peer's updates or ours.

    `settings` are the items of a dictionary: num_layers (hidden, of every network), num_critics and, for CQL,
    num_actions (sampled, of each kind). `path` is the peer's clone.
    """

    name: str
    algorithm: str
    settings: tuple[tuple[str, int], ...]
    path: Path | None = None
    members: int = 1

    def __str__(self) -> str:
        members = f", {self.members} members" if self.members > 1 else ""
        return f"{self.algorithm}, {self.name}, {dict(self.settings)['num_critics']} critics{members}"


class Trainer(NamedTuple):
    """A side that is ready to run, in its own process."""

    advance: Callable[[int], None]  # Do that many updates, a multiple of UNIT, and return when they are finished.
    networks: Callable[[], list[list[np.ndarray]]]  # The parameters of each network that is trained (targets are not).
    most: int  # Updates in one call, at most: after so many, its own script does something else.
    device: str
    remark: str = ""


class PeerError(Exception):
    """Why a side cannot be timed, in one line."""


def script(side: Side) -> Path:
    """The peer's file. PeerError if there is none."""
    if side.path is None:
        raise PeerError(f"no --{side.name.lower()} given")
    if side.algorithm not in FILES[side.name]:
        raise PeerError("it does not have this algorithm")
    path = side.path / FILES[side.name][side.algorithm]
    if not path.is_file():
        raise PeerError(f"there is no {path}")
    return path


def synthetic(rows: int = ROWS, obs_dim: int = OBS_DIM, action_dim: int = ACTION_DIM) -> dict[str, np.ndarray]:
    """Random transitions by field of `Transitions`, all float32; the same every time."""
    rng = np.random.default_rng(0)
    observations = rng.standard_normal((rows + 1, obs_dim), np.float32)
    ends = np.arange(rows) % 500 == 499
    return {
        "observations": observations[:-1],
        "actions": rng.uniform(-1, 1, (rows, action_dim)).astype(np.float32),
        "rewards": rng.uniform(0, 1, rows).astype(np.float32),
        "next_observations": observations[1:],
        "terminations": ends.astype(np.float32),
        "truncations": np.zeros(rows, np.float32),
    }


def leaves(*trees: Any) -> list[list[np.ndarray]]:
    """The arrays of each tree."""
    return [[np.asarray(x) for x in jax.tree.leaves(tree)] for tree in trees]


def jax_device() -> str:
    """What JAX computes on."""
    devices = jax.devices()
    return devices[0].device_kind if len(devices) == 1 else f"{len(devices)} x {devices[0].device_kind}"


# Ours


def changed(algorithm: str, changes: Sequence[tuple[str, str]]) -> types.ModuleType:
    """The algorithm's script with pieces of its text replaced. LookupError for a piece that is not there once."""
    path = Path(str(importlib.import_module(f"algorithms.{algorithm}").__file__))
    text = path.read_text()
    for old, new in changes:
        if text.count(old) != 1:
            raise LookupError(f"{path.name} has {text.count(old)} times: {old}")
        text = text.replace(old, new)
    sys.modules["changed"] = module = types.ModuleType("changed")  # dataclasses look it up
    exec(compile(text, str(path), "exec"), vars(module))
    return module


# IQL with V evaluated once, before its update, as unifloral has it. The authors' code and ours evaluate it again after
# its update, for the policy and the critics.
ONE_VALUE = (
    (
        "return value_loss(value.apply(params, batch.observations).squeeze(-1), q, hp.expectile)",
        "v = value.apply(params, batch.observations).squeeze(-1)\n"
        "        loss, info = value_loss(v, q, hp.expectile)\n"
        "        return loss, (info, v)",
    ),
    ("grads, value_info = jax.grad(", "grads, (value_info, v) = jax.grad("),
    ("both = jnp.stack([batch.observations, batch.next_observations])", "both = batch.next_observations"),
    ("v, next_v = value.apply(value_params, both)", "next_v = value.apply(state.value, both)"),
)


def build_ours(side: Side, data: dict[str, np.ndarray]) -> Trainer:
    """`train` of the algorithm's script, compiled and mapped over the members as its `main` does it."""
    module: Any = changed(side.algorithm, ONE_VALUE if side.name == ONCE else ())
    settings = dict(side.settings) | {"batch_size": BATCH_SIZE, "hidden_dim": HIDDEN_DIM, "num_seeds": side.members}
    args = module.Args(**settings)
    members = make_members(args)
    offline = members.replicate(record(Transitions(**data)))
    state = members.start(partial(module.init, args=args, obs_dim=OBS_DIM, action_dim=ACTION_DIM))
    train_all = members.map(partial(module.train, args=args))

    def advance(count: int) -> None:
        nonlocal state
        counts = np.full(len(members.seeds), count, np.int32)
        state, _ = jax.block_until_ready(train_all(state, members.hp, Replay(offline), counts))

    def networks() -> list[list[np.ndarray]]:
        return leaves(*(getattr(state, name) for name in ("actor", "critic", "value") if name in state._fields))

    return Trainer(advance, networks, STRETCH, jax_device())


# Importing a peer


class Normal:
    """Of distrax, what the peers' updates use: independent Gaussians, one for each element of `loc`."""

    def __init__(self, loc: jax.Array, scale: jax.Array) -> None:
        self.loc, self.scale = loc, scale

    def log_prob(self, x: jax.Array) -> jax.Array:
        """Log-density of each element."""
        return -0.5 * ((x - self.loc) / self.scale) ** 2 - jnp.log(self.scale) - 0.5 * math.log(2.0 * math.pi)

    def sample(self, *, seed: jax.Array) -> jax.Array:
        """A reparameterised sample."""
        return self.loc + self.scale * jax.random.normal(seed, self.loc.shape)

    def sample_and_log_prob(self, *, seed: jax.Array) -> tuple[jax.Array, jax.Array]:
        """A sample and its log-density."""
        x = self.sample(seed=seed)
        return x, self.log_prob(x)


class MultivariateNormalDiag(Normal):
    """A Gaussian with a diagonal covariance over the last axis."""

    def __init__(self, loc: jax.Array, scale_diag: jax.Array) -> None:
        super().__init__(loc, scale_diag)

    def log_prob(self, x: jax.Array) -> jax.Array:
        """Log-density, summed over the last axis."""
        return super().log_prob(x).sum(axis=-1)


class Deterministic:
    """All mass on `loc`."""

    def __init__(self, loc: jax.Array) -> None:
        self.loc = loc

    def sample(self, *, seed: jax.Array | None) -> jax.Array:
        """`loc`."""
        return self.loc


class Tanh:
    """The map tanh."""

    def forward_and_log_det(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """tanh(x), and the log of its slope at each element."""
        return jnp.tanh(x), 2.0 * (math.log(2.0) - x - jax.nn.softplus(-2.0 * x))


class Block:
    """A map whose log-determinant is summed over the last `ndims` axes."""

    def __init__(self, bijector: Tanh, ndims: int) -> None:
        self.bijector, self.ndims = bijector, ndims

    def forward_and_log_det(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The map's value and the log of its determinant."""
        y, log_det = self.bijector.forward_and_log_det(x)
        return y, log_det.sum(axis=tuple(range(-self.ndims, 0)))


class Transformed:
    """The distribution of a map of a random variable."""

    def __init__(self, distribution: Any, bijector: Tanh | Block) -> None:
        self.distribution, self.bijector = distribution, bijector

    def sample(self, *, seed: jax.Array | None) -> jax.Array:
        """A sample."""
        return self.bijector.forward_and_log_det(self.distribution.sample(seed=seed))[0]

    def sample_and_log_prob(self, *, seed: jax.Array) -> tuple[jax.Array, jax.Array]:
        """A sample and its log-density."""
        x, log_prob = self.distribution.sample_and_log_prob(seed=seed)
        y, log_det = self.bijector.forward_and_log_det(x)
        return y, log_prob - log_det


DISTRIBUTIONS = (Normal, MultivariateNormalDiag, Deterministic, Tanh, Block, Transformed)


class BaseModel:
    """Of pydantic, what the peers use: named defaults, some of them replaced."""

    def __init__(self, **values: Any) -> None:
        vars(self).update(values)


def stand_in(name: str, **content: Any) -> None:
    """Put a module in the place of `name` that has `content`, and an object that takes any call for all other names."""
    module = importlib.util.module_from_spec(importlib.machinery.ModuleSpec(name, None))

    def anything(attribute: str) -> Any:
        if attribute.startswith("__"):  # the import system's questions
            raise AttributeError(attribute)
        return mock.MagicMock()

    vars(module).update({"__getattr__": anything} | content)
    sys.modules[name] = module


def load(path: Path) -> tuple[ModuleType, str]:
    """Import a peer's file. The module, and a remark where something of it is ours.

    It is to be called in the side's own process only, after the packages that it shares with us: the modules that
    stand in for others stay.
    """
    remark = ""
    for name in DATA_AND_LOGGING:
        stand_in(name)
    stand_in("omegaconf", OmegaConf=mock.Mock(from_cli=dict))
    stand_in("pydantic", BaseModel=BaseModel)
    if "distrax" in path.read_text():
        try:
            importlib.import_module("distrax")
        except Exception:  # absent, or broken: it, and what it needs, does not follow every version of JAX
            for name in [name for name in sys.modules if name.partition(".")[0] == "distrax"]:
                del sys.modules[name]
            sys.modules["distrax"] = module = ModuleType("distrax")
            vars(module).update({cls.__name__: cls for cls in DISTRIBUTIONS} | {"Distribution": object})
            remark = "distributions ours, for want of distrax"
    spec = importlib.util.spec_from_file_location(f"peer_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module, remark


# CORL


def build_corl(side: Side, data: dict[str, np.ndarray]) -> Trainer:
    """PyTorch: a batch of their buffer, then their trainer's update, one by one as in their loop."""
    torch = importlib.import_module("torch")
    module, remark = load(script(side))
    torch.manual_seed(0)
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    buffer = module.ReplayBuffer(OBS_DIM, ACTION_DIM, len(data["rewards"]), device)
    buffer.load_d4rl_dataset(data | {"terminals": data["terminations"]})
    update, networks = CORL[side.algorithm](module, dict(side.settings), device)

    def advance(count: int) -> None:
        for _ in range(count):
            update([x.to(device) for x in buffer.sample(BATCH_SIZE)])
        if device == "cuda":
            torch.cuda.synchronize()

    def arrays() -> list[list[np.ndarray]]:
        return [[p.detach().cpu().numpy().copy() for p in network.parameters()] for network in networks]

    trainer = Trainer(advance, arrays, 1000, torch.cuda.get_device_name() if device == "cuda" else "cpu")
    seconds = {}
    for threads in sorted({1, usable_cores()}):  # networks so small may be faster on one
        torch.set_num_threads(threads)
        advance(UNIT)
        done, elapsed = turn(trainer, UNIT, 0.5)
        seconds[threads] = elapsed / done
    threads = min(seconds, key=seconds.__getitem__)
    torch.set_num_threads(threads)
    return trainer._replace(remark="; ".join(filter(None, (remark, f"{threads} of {usable_cores()} threads"))))


def with_adam(device: str, **networks: tuple[Any, float]) -> dict[str, Any]:
    """Each network on the device under its name, and Adam at the rate beside it under `<name>_optimizer`."""
    torch = importlib.import_module("torch")
    found = {}
    for name, (network, rate) in networks.items():
        found[name] = network.to(device)
        found[f"{name}_optimizer"] = torch.optim.Adam(network.parameters(), lr=rate)
    return found


Built = tuple[Callable[[list[Any]], Any], list[Any]]
"""The update, which takes a batch, and the networks that it trains."""


def corl_iql(module: ModuleType, settings: dict[str, int], device: str) -> Built:
    """IQL: a policy, twin Q-functions in one module, and a value function."""
    layers, config = settings["num_layers"], module.TrainConfig()
    actor = module.GaussianPolicy(OBS_DIM, ACTION_DIM, 1.0, HIDDEN_DIM, layers)
    critic = module.TwinQ(OBS_DIM, ACTION_DIM, HIDDEN_DIM, layers)
    value = module.ValueFunction(OBS_DIM, HIDDEN_DIM, layers)
    found = with_adam(device, actor=(actor, config.actor_lr), q=(critic, config.qf_lr), v=(value, config.vf_lr))
    found |= {"q_network": found.pop("q"), "v_network": found.pop("v")}
    return module.ImplicitQLearning(max_action=1.0, device=device, **found).train, [actor, critic, value]


def corl_td3_bc(module: ModuleType, settings: dict[str, int], device: str) -> Built:
    """TD3+BC; two hidden layers of 256 are fixed."""
    actor = module.Actor(OBS_DIM, ACTION_DIM, 1.0)
    critics = [module.Critic(OBS_DIM, ACTION_DIM) for _ in range(2)]
    found = with_adam(device, actor=(actor, 3e-4), critic_1=(critics[0], 3e-4), critic_2=(critics[1], 3e-4))
    return module.TD3_BC(max_action=1.0, device=device, **found).train, [actor, *critics]


def corl_awac(module: ModuleType, settings: dict[str, int], device: str) -> Built:
    """AWAC; three hidden layers are fixed."""
    rate = module.TrainConfig().learning_rate
    actor = module.Actor(OBS_DIM, ACTION_DIM, HIDDEN_DIM)
    critics = [module.Critic(OBS_DIM, ACTION_DIM, HIDDEN_DIM) for _ in range(2)]
    found = with_adam(device, actor=(actor, rate), critic_1=(critics[0], rate), critic_2=(critics[1], rate))
    return module.AdvantageWeightedActorCritic(**found).update, [actor, *critics]


def corl_cql(module: ModuleType, settings: dict[str, int], device: str) -> Built:
    """CQL; three hidden layers of 256 are fixed in the policy. Its defaults have no warm start by cloning."""
    config = module.TrainConfig()
    actor = module.TanhGaussianPolicy(OBS_DIM, ACTION_DIM, 1.0, orthogonal_init=config.orthogonal_init)
    sizes = (OBS_DIM, ACTION_DIM, config.orthogonal_init, settings["num_layers"])
    critics = [module.FullyConnectedQFunction(*sizes) for _ in range(2)]
    rated = {"critic_1": (critics[0], config.qf_lr), "critic_2": (critics[1], config.qf_lr)}
    trainer = module.ContinuousCQL(
        target_entropy=-float(ACTION_DIM),
        cql_n_actions=settings["num_actions"],
        cql_alpha=config.cql_alpha,
        bc_steps=config.bc_steps,
        policy_lr=config.policy_lr,
        qf_lr=config.qf_lr,
        device=device,
        **with_adam(device, actor=(actor, config.policy_lr), **rated),
    )
    return trainer.train, [actor, *critics]


CORL = {"iql": corl_iql, "td3_bc": corl_td3_bc, "awac": corl_awac, "cql": corl_cql}


# JAX-CORL


def make_jax_corl(side: Side, data: dict[str, np.ndarray], unit: int = UNIT) -> tuple[Any, Any, Any, Any, str]:
    """Their configuration, dataset, initial state and algorithm, whose `update_n_times` unrolls `unit` updates, and the
    remark of `load`.
    """
    module, remark = load(script(side))
    settings, config = dict(side.settings), module.config
    hidden = (HIDDEN_DIM,) * settings["num_layers"]
    own = {
        "iql": {"hidden_dims": hidden, "layer_norm": False},
        "td3_bc": {"hidden_dims": hidden},
        "awac": {"actor_hidden_dims": hidden, "critic_hidden_dims": hidden},
        "cql": {
            "hidden_dims": hidden,
            "cql_n_actions": settings.get("num_actions"),
            "action_dim": ACTION_DIM,
            "target_entropy": -float(ACTION_DIM),
        },
    }[side.algorithm]
    for name, value in (own | {"batch_size": BATCH_SIZE, "n_jitted_updates": unit}).items():
        if not hasattr(config, name):
            raise PeerError(f"its configuration has no {name} any more")
        setattr(config, name, value)
    fields = data | {"dones": data["terminations"], "dones_float": data["terminations"]}
    dataset = module.Transition(**{name: jnp.asarray(fields[name]) for name in module.Transition._fields})
    name = side.algorithm.replace("_", "")
    create, algorithm = getattr(module, f"create_{name}_train_state"), getattr(module, name.upper())()
    state = create(jax.random.PRNGKey(0), dataset.observations[0], dataset.actions[0], config)
    return config, dataset, state, algorithm, remark


def build_jax_corl(side: Side, data: dict[str, np.ndarray]) -> Trainer:
    """JAX: `update_n_times`, compiled as in their scripts, with eight updates unrolled."""
    config, dataset, state, algorithm, remark = make_jax_corl(side, data)
    key = jax.random.PRNGKey(1)
    update = jax.jit(algorithm.update_n_times, static_argnums=(3,))

    def advance(count: int) -> None:
        nonlocal key, state
        for _ in range(count // UNIT):
            key, update_key = jax.random.split(key)
            state, _ = update(state, dataset, update_key, config)
        jax.block_until_ready(state)

    def networks() -> list[list[np.ndarray]]:
        names = ("actor", "policy", "critic", "qf1", "qf2", "value")
        return leaves(*(getattr(state, name).params for name in names if name in state._fields))

    return Trainer(advance, networks, 1000, jax_device(), remark)


# unifloral


def make_unifloral(side: Side, data: dict[str, np.ndarray]) -> tuple[Callable[..., Any], Any, Any, str]:
    """Their step, the initial state, their arguments and the remark of `load`."""
    module, remark = load(script(side))
    settings = dict(side.settings)
    own = {"num_critics": settings["num_critics"]} if side.algorithm == "cql" else {}
    args = module.Args(batch_size=BATCH_SIZE, **own)
    names = {"obs": "observations", "action": "actions", "reward": "rewards", "next_obs": "next_observations"}
    dataset = module.Transition(
        **{theirs: jnp.asarray(data[ours]) for theirs, ours in (names | {"done": "terminations"}).items()}
    )
    observations, actions = jnp.zeros(OBS_DIM), jnp.zeros(ACTION_DIM)
    mean_and_std = (dataset.obs.mean(axis=0), dataset.obs.std(axis=0))
    if side.algorithm == "cql":
        actor, critic = module.TanhGaussianActor(ACTION_DIM), module.VectorQ(args.num_critics)
        others = {"alpha": (module.EntropyCoef(), [])}
    elif side.algorithm == "iql":
        actor, critic = module.TanhGaussianActor(ACTION_DIM, *mean_and_std), module.DualQNetwork(*mean_and_std)
        others = {"value": (module.StateValueFunction(*mean_and_std), [observations])}
    else:
        actor, critic = module.DeterministicTanhActor(ACTION_DIM, *mean_and_std), module.DualQNetwork(*mean_and_std)
        others = {}
    made = {"actor": (actor, [observations]), "q": (critic, [observations, actions]), **others}
    # Its state names each network, some with a target: actor, actor_target, dual_q, vec_q_target, ...
    found = {}
    for field in module.AgentTrainState._fields:
        network, inputs = made[field.removesuffix("_target").split("_")[-1]]
        rate = [args.actor_lr] if field == "actor" and hasattr(args, "actor_lr") else []
        found[field] = module.create_train_state(args, jax.random.PRNGKey(0), network, inputs, *rate)
    step = module.make_train_step(args, *(network.apply for network, _ in made.values()), dataset)
    return step, module.AgentTrainState(**found), args, remark


def build_unifloral(side: Side, data: dict[str, np.ndarray]) -> Trainer:
    """JAX: one scan over their step; they scan 2,500 of them between evaluations."""
    step, state, args, remark = make_unifloral(side, data)
    updates = getattr(args, "num_critic_updates_per_step", 1)
    if UNIT % updates:
        raise PeerError(f"its step has {updates} updates of the critics, of which {UNIT} is not a multiple")
    scan = jax.jit(lambda carry, length: jax.lax.scan(step, carry, None, length), static_argnums=1)
    carry = (jax.random.PRNGKey(0), state)

    def advance(count: int) -> None:
        nonlocal carry
        carry, _ = jax.block_until_ready(scan(carry, count // updates))

    def networks() -> list[list[np.ndarray]]:
        trained = [name for name in state._fields if not name.endswith("_target") and name != "alpha"]
        return leaves(*(getattr(carry[1], name).params for name in trained))

    return Trainer(advance, networks, args.eval_interval, jax_device(), remark)


BUILDERS = {
    OURS: build_ours,
    ONCE: build_ours,
    "CORL": build_corl,
    "JAX-CORL": build_jax_corl,
    "unifloral": build_unifloral,
}


# Timing, in the side's process


class Info(NamedTuple):
    """What a side says of itself when it is ready."""

    parameters: int
    device: str
    remark: str


def warm_up(trainer: Trainer, seconds: float) -> int:
    """Compile and run the trainer; how many updates each call should do so that a turn is about two calls.

    PeerError if the updates do not change every network, or change one to numbers that are not finite.
    """
    before = trainer.networks()
    trainer.advance(UNIT)
    trainer.advance(UNIT)  # the first results may be of other types than what went in, and compile anew
    start = time.perf_counter()
    trainer.advance(UNIT)
    units = seconds / 2.0 / (time.perf_counter() - start)
    count = UNIT * max(1, min(int(units), trainer.most // UNIT))
    trainer.advance(count)
    for old, new in zip(before, trainer.networks(), strict=True):
        if not all(np.isfinite(x).all() for x in new):
            raise PeerError("its parameters are not finite after the first updates")
        if all((x == y).all() for x, y in zip(old, new, strict=True)):
            raise PeerError("its updates do not change the parameters")
    return count


def turn(trainer: Trainer, count: int, seconds: float) -> tuple[int, float]:
    """Updates of one member in a turn of at least that length, and the seconds that they took."""
    done, start = 0, time.perf_counter()
    while True:
        trainer.advance(count)
        done += count
        elapsed = time.perf_counter() - start
        if elapsed >= seconds:
            return done, elapsed


def one_line(error: BaseException) -> str:
    """The error in one line."""
    if isinstance(error, PeerError):
        return str(error)
    text = f"{type(error).__name__}: {error}".strip(": ").splitlines()[0]
    return text if len(text) <= 200 else f"{text[:200]}..."


def serve(connection: Connection, side: Side, data: Path, seconds: float) -> None:
    """The life of a side's process: sends its Info, then answers each message by a turn, until nobody is there."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several processes share a GPU
    os.environ["NPROC"] = str(usable_cores())  # XLA's threads, of the peers too, in a container with a quota
    sys.argv = sys.argv[:1]  # some read flags while they are imported
    warnings.simplefilter("ignore")
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            trainer = BUILDERS[side.name](side, dict(np.load(data)))
            count = warm_up(trainer, seconds)
            parameters = sum(x.size for network in trainer.networks() for x in network)
            connection.send(Info(parameters, trainer.device, trainer.remark))
            while True:
                try:
                    connection.recv()
                except EOFError:
                    return
                connection.send(turn(trainer, count, seconds))
    except (Exception, SystemExit) as error:  # whatever a peer's file does, it is reported
        with contextlib.suppress(OSError):  # unless nobody waits any more
            connection.send(PeerError(one_line(error), traceback.format_exc()))
