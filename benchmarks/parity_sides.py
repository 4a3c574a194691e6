"""The sides that `benchmarks/parity.py` compares: same weights, minibatches and noise in our updates and a peer's."""

import contextlib
import importlib
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from benchmarks import peer_sides
from benchmarks.peer_sides import ACTION_DIM, BATCH_SIZE, HIDDEN_DIM, OBS_DIM, PeerError, Side
from common.replay import Transitions

PROBES = 1000
"""Rows at which outputs are compared; they are in no minibatch."""
Weights = Mapping[str, Mapping[str, Any]]
"""Our parameters by role (a key of `ROLES`) and path."""


class Inputs(NamedTuple):
    """What both sides get, in the precision of the run."""

    data: dict[str, np.ndarray]
    """By field of `Transitions`: a minibatch for each update, in order, then the probes."""
    noise: dict[str, np.ndarray]
    """`[updates, ...]` by what it is for, a name of `DRAWS`."""

    def batch(self, number: int) -> dict[str, np.ndarray]:
        """The minibatch of that number."""
        return {name: x[number * BATCH_SIZE :][:BATCH_SIZE] for name, x in self.data.items()}

    def draws(self, number: int) -> dict[str, np.ndarray]:
        """The noise of that number."""
        return {name: x[number] for name, x in self.noise.items()}

    def probes(self) -> tuple[np.ndarray, np.ndarray]:
        """Observations and actions."""
        return self.data["observations"][-PROBES:], self.data["actions"][-PROBES:]


def make_inputs(algorithm: str, num_actions: int, updates: int, precision: str) -> Inputs:
    """Transitions of a simple control problem, and noise; the same in either precision but for rounding."""
    rows, rng = updates * BATCH_SIZE + PROBES, np.random.default_rng(0)
    observations = rng.standard_normal((rows, OBS_DIM))
    best = np.tanh(observations[:, :ACTION_DIM] + observations[:, -ACTION_DIM:])
    actions = np.clip(0.5 * best + 0.3 * rng.uniform(-1.0, 1.0, best.shape), -1.0 + 1e-5, 1.0 - 1e-5)  # as JAX-CORL
    moved = 0.9 * observations + actions @ rng.standard_normal((ACTION_DIM, OBS_DIM)) / 4.0
    # unifloral's networks scale observations by (x - mean) / (std + 1e-3), which leaves these as they are.
    mean, std = (getattr(observations[:-PROBES], name)(axis=0) for name in ("mean", "std"))
    data = {
        "observations": 0.999 * (observations - mean) / std,
        "actions": actions,
        "rewards": 1.0 - np.mean((actions - best) ** 2, axis=1),
        "next_observations": 0.999 * (moved + 0.1 * rng.standard_normal(moved.shape) - mean) / std,
        "terminations": rng.random(rows) < 0.01,
        "truncations": np.zeros(rows),
    }
    one, many = (BATCH_SIZE, ACTION_DIM), (num_actions, BATCH_SIZE, ACTION_DIM)
    shapes = {
        "iql": {},
        "td3_bc": {"target": one},
        "awac": {"next": one, "value": one},
        "cql": {"actor": one, "next": one, "uniform": many, "current": many, "future": many},
    }[algorithm]
    noise = {
        name: rng.uniform(-1.0, 1.0, (updates, *shape)) if name == "uniform" else rng.standard_normal((updates, *shape))
        for name, shape in shapes.items()
    }
    return Inputs(*({name: x.astype(precision) for name, x in some.items()} for some in (data, noise)))


# Noise


@contextlib.contextmanager
def fed_jax(noise: Sequence[Any], rows: Sequence[Any] = ()) -> Iterator[None]:
    """While something is traced, `jax.random` hands out `noise` in turn and, for `randint`, `rows`.

    A raw key then tells nothing but the row of the batch for which it was split, so that a draw for one row in a mapped
    function gets that row of its array. Typed keys draw as ever: they are flax's, which asks initialisers for shapes.
    """
    sources = {"normal": cycle(noise), "randint": cycle(rows)}
    sources["uniform"] = sources["normal"]
    real = {name: getattr(jax.random, name) for name in (*sources, "split")}

    def fed(name: str, key: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            return real[name](key, *args, **kwargs)
        if name == "split":
            keys = jnp.stack([key] * (args or [kwargs.get("num", 2)])[0])
            return keys.at[:, 1].set(jnp.arange(len(keys), dtype=keys.dtype)) if len(keys) == BATCH_SIZE else keys
        x, shape = jnp.asarray(next(sources[name])), args[0] if args else kwargs.get("shape", ())
        return (x if math.prod(shape) == x.size else x[key[1]]).reshape(shape)

    with mock.patch.multiple(jax.random, **{name: partial(fed, name) for name in real}):
        yield


@contextlib.contextmanager
def fed_torch(torch: Any, noise: Sequence[np.ndarray]) -> Iterator[None]:
    """The functions of PyTorch by which CORL's updates draw hand out `noise` in turn."""
    source = cycle(noise)

    def draw(shape: Sequence[int], **others: Any) -> Any:
        return torch.as_tensor(np.ascontiguousarray(next(source))).reshape(shape)

    with (
        mock.patch.object(torch, "randn_like", lambda x: draw(x.shape)),
        mock.patch("torch.distributions.normal._standard_normal", draw),
        mock.patch.object(torch.Tensor, "uniform_", lambda x, low, high: x.copy_(draw(x.shape))),
    ):
        yield


DRAWS = ("target", "actor", "next", "value", "uniform", "current", "future")
"""What noise is for, in the order in which CORL draws it."""


def our_order(noise: Mapping[str, Any]) -> list[Any]:
    """As our updates draw: CQL's actions at both states together."""
    if "uniform" not in noise:
        return corl_order(noise)
    both = jnp.stack([noise["current"], noise["future"]], axis=1)
    return [noise["actor"], noise["next"], noise["uniform"], both]


def corl_order(noise: Mapping[str, Any]) -> list[Any]:
    """As CORL and JAX-CORL draw: several actions after the batch's axis."""
    return [x.swapaxes(0, 1) if x.ndim == 3 else x for x in (noise[name] for name in DRAWS if name in noise)]


def unifloral_order(noise: Mapping[str, Any]) -> list[Any]:
    """As unifloral draws: for CQL's temperature the policy's actions once more, and uniform ones last."""
    if "uniform" not in noise:
        return corl_order(noise)
    return [noise[name] for name in ("actor", "actor", "next", "current", "future", "uniform")]


# Weights

KINDS = ("layernorm.*scale", "layernorm.*bias", "std_(scale|multiplier)", "std_offset", "log_?std", "bias", "")
"""Kinds of parameters, as patterns of their paths in all frameworks, the first that fits; the last is of kernels."""
ROLES = {"actor": "actor|policy", "critic": "critic|q", "value": "value|vf"}
"""Networks, as patterns of the peers' names for them and their targets."""


def kind(path: str) -> str:
    """Of a parameter."""
    return next(pattern for pattern in KINDS if re.search(pattern, path.lower()))


def role(name: str) -> str | None:
    """Of a peer's network; None if it is none of ours."""
    return next((role for role, pattern in ROLES.items() if re.search(pattern, name)), None)


def transplant(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Our arrays under the paths of a peer's: the first of ours that is left with the same kind and shape.

    PeerError where one side has a parameter that the other has not.
    """
    left, found = {path: np.asarray(x) for path, x in ours.items()}, {}
    for path, value in theirs.items():
        wanted = (kind(path), np.shape(value))
        match = next((name for name, x in left.items() if (kind(name), x.shape) == wanted), None)
        if match is None:
            raise PeerError(f"there are no weights for {path} of shape {wanted[1]}")
        found[path] = left.pop(match)
    if left:
        raise PeerError(f"it has no place for {', '.join(left)}")
    return found


def planted(ours: Weights, theirs: Mapping[str, Any]) -> dict[str, Any]:
    """`theirs`, by `network/path`, with our weights in networks and targets. What is none of ours stays."""
    groups: dict[tuple[str | None, bool], dict[str, Any]] = {}
    for path, x in theirs.items():
        network = path.partition("/")[0]
        groups.setdefault((role(network), "target" in network), {})[path] = x
    found = groups.pop((None, False), {})
    for (name, _), group in groups.items():
        weights = ours[name]
        if name == "critic" and max(map(np.ndim, group.values())) < 3:  # one network for each member of the ensemble
            members = range(len(next(iter(weights.values()))))
            weights = {f"{k}/{path}": np.asarray(x)[k] for k in members for path, x in weights.items()}
        found |= transplant(weights, group)
    return found


def flat(params: Any) -> dict[str, Any]:
    """The leaves of flax's parameters by path, in the order of the layers."""
    return dict(sorted(flatten_dict(params, sep="/").items()))


# Sides: a peer's `start`, then `advance` by `unit` updates from update `number` on; `outputs` are, at the probes,
# `actions [rows, action_dim]` of the policy's mean, `q [critics, rows]` and, of IQL, `v [rows]`.


def changed(algorithm: str, changes: Sequence[tuple[str, str]]) -> ModuleType:
    """The algorithm's script with pieces of its text replaced. LookupError for a piece that is not there once."""
    path = Path(importlib.import_module(f"algorithms.{algorithm}").__file__)
    text = path.read_text()
    for old, new in changes:
        if text.count(old) != 1:
            raise LookupError(f"{path.name} has {text.count(old)} times: {old}")
        text = text.replace(old, new)
    sys.modules["changed"] = module = ModuleType("changed")  # dataclasses look it up
    exec(compile(text, str(path), "exec"), vars(module))
    return module


class Ours:
    """`update` of the algorithm's script, in which pieces of the text may be replaced."""

    def __init__(
        self, algorithm: str, settings: Mapping[str, Any], inputs: Inputs, changes: Sequence[tuple[str, str]] = ()
    ) -> None:
        self.module, self.inputs = changed(algorithm, changes), inputs
        own = {name: value for name, value in settings.items() if name in self.module.Hyperparameters._fields}
        others = {name: value for name, value in settings.items() if name not in own}
        self.hp = self.module.Hyperparameters(**own)
        self.args = self.module.Args(batch_size=BATCH_SIZE, hidden_dim=HIDDEN_DIM, **others)
        init = partial(self.module.init, args=self.args, obs_dim=OBS_DIM, action_dim=ACTION_DIM)
        state = jax.jit(init)(jax.random.key(0), self.hp)._replace(key=jax.random.PRNGKey(0))  # raw, for `fed_jax`
        dtype = inputs.data["rewards"].dtype
        self.state = jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, state)

    def weights(self) -> Weights:
        """Before the first update, what the peer starts with."""
        return {name: flat(getattr(self.state, name)) for name in ROLES if name in self.state._fields}

    @partial(jax.jit, static_argnums=0)
    def _step(self, state: Any, batch: Transitions, noise: dict[str, Any]) -> Any:
        with fed_jax(our_order(noise)):
            return self.module.update(state, batch, self.hp, self.args)[0]

    def advance(self, number: int) -> None:
        """One update on the minibatch of that number."""
        self.state = self._step(self.state, Transitions(**self.inputs.batch(number)), self.inputs.draws(number))

    def outputs(self) -> dict[str, Any]:
        """See above."""
        observations, actions = self.inputs.probes()
        networks, key = self.module.modules(self.args, ACTION_DIM), self.state.key
        mean = self.module.act(self.state, self.hp, observations, key, self.args, ACTION_DIM, sample=False)
        found = {"actions": mean, "q": networks[1].apply(self.state.critic, observations, actions)}
        if len(networks) > 2:
            found["v"] = networks[2].apply(self.state.value, observations).squeeze(-1)
        return found


class Corl:
    """Their trainer's update of a minibatch."""

    unit = repeat = 1

    def __init__(self, side: Side, inputs: Inputs) -> None:
        self.torch, self.inputs, self.algorithm = importlib.import_module("torch"), inputs, side.algorithm
        self.torch.set_num_threads(1)
        self.torch.set_default_dtype(getattr(self.torch, str(inputs.data["rewards"].dtype)))
        module, _ = peer_sides.load(peer_sides.script(side))
        self.update = peer_sides.CORL[side.algorithm](module, dict(side.settings), "cpu")[0]
        found = vars(self.update.__self__).items()
        networks = {name.strip("_"): x for name, x in found if isinstance(x, self.torch.nn.Module)}
        self.networks = {name: x.to(self.torch.get_default_dtype()) for name, x in networks.items()}

    def start(self, weights: Weights) -> None:
        """Take our weights."""
        networks = self.networks.items()
        theirs = {f"{name}/{path}": x for name, network in networks for path, x in network.named_parameters()}
        for path, x in planted(weights, {path: x.detach().numpy().T for path, x in theirs.items()}).items():
            theirs[path].data.copy_(self.torch.as_tensor(x.T.copy()))

    def advance(self, number: int) -> None:
        """One update."""
        batch = self.inputs.batch(number)
        names = ("observations", "actions", "rewards", "next_observations", "terminations")
        with fed_torch(self.torch, corl_order(self.inputs.draws(number))):
            self.update([self.torch.as_tensor(batch[name].reshape(BATCH_SIZE, -1)) for name in names])

    def outputs(self) -> dict[str, Any]:
        """See above."""
        observations, actions = map(self.torch.as_tensor, self.inputs.probes())
        mean = {
            "iql": lambda actor: actor(observations).mean,
            "td3_bc": lambda actor: actor(observations),
            "awac": lambda actor: actor._get_policy(observations).mean.clamp(-1.0, 1.0),
            "cql": lambda actor: actor(observations, deterministic=True)[0],
        }[self.algorithm]
        with self.torch.no_grad():
            if self.algorithm == "iql":
                q = self.networks["qf"].both(observations, actions)
            else:
                q = [self.networks[f"critic_{k}"](observations, actions) for k in (1, 2)]
            found = {"actions": mean(self.networks["actor"]), "q": self.torch.stack([x.reshape(-1) for x in q])}
            if self.algorithm == "iql":
                found["v"] = self.networks["vf"](observations)
        return {name: x.numpy() for name, x in found.items()}


class JaxPeer:
    """A peer whose state is a named tuple of flax's train states."""

    inputs: Inputs
    state: Any
    step: Callable[[Any], Any]
    """Their next `unit` updates of a state."""
    order = staticmethod(corl_order)
    unit = 1
    repeat = 1
    """Updates on each minibatch."""

    def start(self, weights: Weights) -> None:
        """Take our weights, and optimisers that know nothing."""
        fields = {name: getattr(x, "params", x) for name, x in self.state._asdict().items()}
        theirs = flat({name: x for name, x in fields.items() if isinstance(x, Mapping)})
        dtype = self.inputs.data["rewards"].dtype
        new = {path: jnp.asarray(x, dtype) for path, x in planted(weights, theirs).items()}
        for name, params in unflatten_dict(new, sep="/").items():
            old = getattr(self.state, name)
            if hasattr(old, "params"):
                params = old.replace(params=params, opt_state=old.tx.init(params))
            self.state = self.state._replace(**{name: params})

    @partial(jax.jit, static_argnums=0)
    def _step(self, state: Any, noise: list[dict[str, Any]], rows: Any) -> Any:
        with fed_jax([x for one in noise for x in self.order(one)], list(rows)):
            return self.step(state)

    def advance(self, number: int) -> None:
        """`unit` updates."""
        numbers = sorted({k // self.repeat for k in range(number, number + self.unit)})
        rows = np.array([np.arange(k * BATCH_SIZE, (k + 1) * BATCH_SIZE) for k in numbers])
        self.state = self._step(self.state, [self.inputs.draws(k) for k in numbers], rows)


class JaxCorl(JaxPeer):
    """Their `update_n_times`; `unit` is what their configuration unrolls, where it makes a difference."""

    def __init__(self, side: Side, inputs: Inputs) -> None:
        self.inputs, self.name, self.unit = inputs, side.algorithm, {"td3_bc": 2, "awac": 8}.get(side.algorithm, 1)
        made = peer_sides.make_jax_corl(side, inputs.data, self.unit)
        self.config, self.dataset, self.state, self.algorithm, _ = made

    def step(self, state: Any) -> Any:
        """See above."""
        return self.algorithm.update_n_times(state, self.dataset, jax.random.PRNGKey(0), self.config)[0]

    def outputs(self) -> dict[str, Any]:
        """See above; their policies that sample do it at temperature 0, CQL's gives its mean."""
        state, (observations, actions), key = self.state, self.inputs.probes(), jax.random.PRNGKey(0)
        if self.name == "cql":
            mean = state.policy.apply_fn(state.policy.params, observations, key, deterministic=True)[0]
            q = [x.apply_fn(x.params, observations, actions) for x in (state.qf1, state.qf2)]
        else:
            mean = self.algorithm.get_action(state, observations, *(() if self.name == "td3_bc" else (key, 0.0)))
            q = state.critic.apply_fn(state.critic.params, observations, actions)
        found = {"actions": mean, "q": np.stack([np.asarray(x).reshape(-1) for x in q])}
        if self.name == "iql":
            found["v"] = state.value.apply_fn(state.value.params, observations)
        return found


class Unifloral(JaxPeer):
    """Their train step; TD3+BC's has all updates of the critics on one minibatch, with the same noise."""

    order = staticmethod(unifloral_order)

    def __init__(self, side: Side, inputs: Inputs) -> None:
        self.inputs, self.name = inputs, side.algorithm
        data = {name: x[:-PROBES] for name, x in inputs.data.items()}
        self.train_step, self.state, args, _ = peer_sides.make_unifloral(side, data)
        self.unit = self.repeat = getattr(args, "num_critic_updates_per_step", 1)

    def start(self, weights: Weights) -> None:
        """CQL's last layer is one for the log standard deviation and one for the mean."""
        if self.name == "cql":
            actor = dict(weights["actor"])
            wide = [path for path, x in actor.items() if x.shape[-1] == 2 * ACTION_DIM]
            halves = {path: np.split(np.asarray(actor.pop(path)), 2, axis=-1) for path in wide}
            actor |= {f"{path}/{k}": halves[path][k] for k in (1, 0) for path in wide}
            weights = {**weights, "actor": actor}
        super().start(weights)

    def step(self, state: Any) -> Any:
        """See above."""
        return self.train_step((jax.random.PRNGKey(0), state), None)[0][1]

    def outputs(self) -> dict[str, Any]:
        """See above; where the policy has nothing but samples, with noise of 0."""
        observations, actions = self.inputs.probes()
        actor, critic = (next(x for f, x in self.state._asdict().items() if role(f) == r) for r in ("actor", "critic"))
        own = {"eval": True} if self.name == "iql" else {}
        with fed_jax([np.zeros_like(actions)]):
            mean = actor.apply_fn(actor.params, observations, **own).sample(seed=jax.random.PRNGKey(0))
        found = {"actions": mean, "q": critic.apply_fn(critic.params, observations, actions).T}
        if self.name == "iql":
            found["v"] = self.state.value.apply_fn(self.state.value.params, observations)
        return found


PEERS = {"CORL": Corl, "JAX-CORL": JaxCorl, "unifloral": Unifloral}
