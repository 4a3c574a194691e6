import jax
import numpy as np
import pytest

from benchmarks import parity, parity_sides, peer_sides
from benchmarks.parity_sides import BATCH_SIZE, Ours, fed_jax, planted, transplant
from benchmarks.peer_sides import PeerError, Side
from common.cli import UsageError

SIDE = Side("CORL", "td3_bc", (("num_layers", 1), ("num_critics", 2)))
LARGE = [("optax.scale_by_adam()", "optax.scale_by_adam(eps=1e-5)")]


class Twin(Ours):
    """A peer with Adam's larger epsilon and two updates on each minibatch."""

    unit = repeat = 2

    def __init__(self, side, inputs):
        super().__init__(side.algorithm, dict(side.settings), inputs, LARGE)

    def start(self, weights):
        assert weights.keys() == {"actor", "critic"}

    def advance(self, number):
        for _ in range(2):
            super().advance(number // 2)


@pytest.fixture
def twin(monkeypatch):
    monkeypatch.setattr(parity_sides, "HIDDEN_DIM", 16)
    monkeypatch.setitem(parity_sides.PEERS, "CORL", Twin)
    monkeypatch.setitem(parity.CASES, ("CORL", "td3_bc"), parity.Case({}, (), ("epsilon",)))


@pytest.mark.slow
def test_a_change_that_is_the_difference_leaves_none(twin):
    left, none = parity.trial(SIDE, 8, "float32")
    assert (left["differing"], none["differing"]) == ("epsilon", "nothing")
    assert left["q"] > 1e-4 > none["q"] == none["actions"] == 0.0
    assert min(none["actions_moved"], none["q_moved"]) > 0.01
    about = {"peer": "CORL", "algorithm": "td3_bc"}
    rows = [about | {"precision": precision} | row for row in (left, none) for precision in ("float32", "float64")]
    *_, first, last = parity.lines(rows)
    assert first.startswith(f"| TD3+BC, CORL | epsilon | {left['actions']:.0e}, {left['q']:.0e} |")
    assert last.startswith("| TD3+BC, CORL | nothing | 0e+00, 0e+00 | 0e+00, 0e+00 |")


def test_noise_reaches_the_update_and_other_weights_are_refused(twin):
    inputs = parity_sides.make_inputs("td3_bc", 1, 8, "float32")
    silent = inputs._replace(noise={name: 0.0 * x for name, x in inputs.noise.items()})
    runs = [parity.run(Ours("td3_bc", dict(SIDE.settings), data), range(2)) for data in (inputs, silent)]
    assert parity.compare(*runs)["q"] > 1e-6
    before, after = runs[0]
    with pytest.raises(PeerError, match=r"networks differ by .* before the first update"):
        parity.compare(runs[0], (before | {"q": before["q"] / 1.1}, after))


@pytest.mark.parametrize("peer, algorithm", parity.CASES)
def test_changes_fit_our_scripts(peer, algorithm):
    case = parity.CASES[peer, algorithm]
    for left in parity.variants(case.differences):
        assert callable(peer_sides.changed(algorithm, parity.pieces(case, left)).update)
    with pytest.raises(LookupError, match="0 times: no such line"):
        peer_sides.changed(algorithm, [("no such line", "")])


def test_every_difference_has_its_changes():
    names = {name for case in parity.CASES.values() for name in (*case.common, *case.differences)}
    assert names == parity.CHANGES.keys()
    case = parity.Case({}, ("cosine",), ("in turn", "broadcast losses"))
    assert len(parity.pieces(case, ["broadcast losses"])) == 1 + 2
    assert len(parity.pieces(case, [])) == 1 + 2 + 4
    old, new = parity.pieces(case, ["broadcast losses"])[-1]
    assert old == "def act(" and new.startswith("def update(") and new.endswith("\ndef act(")
    assert parity.variants(case.differences) == [case.differences, ("in turn",), ("broadcast losses",), ()]
    assert parity.variants(("cosine",)) == [("cosine",), ()]


def test_difference_is_the_largest_over_the_root_mean_square():
    assert parity.difference({"q": [1.0, 2.0]}, {"q": [3.0, -3.0]}) == {"q": pytest.approx(5.0 / 3.0)}
    with pytest.raises(AssertionError):
        parity.difference({"q": np.ones(3)}, {"q": np.ones((3, 1))})  # no broadcasting


def test_weights_go_where_kind_and_shape_agree():
    ours = {"Dense_0/kernel": np.ones((4, 2)), "Dense_0/bias": np.ones(2), "log_std": np.full(2, 5.0)}
    theirs = {"_log_std": np.zeros(2), "net.0.weight": np.zeros((4, 2)), "net.0.bias": np.zeros(2)}
    found = transplant(ours, theirs)
    assert [found[path].flat[0] for path in theirs] == [5.0, 1.0, 1.0]
    own = {"log_std_scale": np.array(2.0), "log_std_offset": np.array(-1.0)}
    scalars = {"log_std_offset.constant": np.zeros(()), "log_std_multiplier.constant": np.zeros(())}
    assert [transplant(own, scalars)[path] for path in scalars] == [-1.0, 2.0]
    with pytest.raises(PeerError, match="no place for log_std"):
        transplant(ours, {path: x for path, x in theirs.items() if path != "_log_std"})
    with pytest.raises(PeerError, match=r"no weights for net\.2\.weight"):
        transplant(ours, theirs | {"net.2.weight": np.zeros((3, 3))})


def test_layers_keep_their_order_and_ensembles_are_taken_apart():
    ours = {"Dense_0/kernel": np.array([[[1.0]], [[2.0]]]), "Dense_1/kernel": np.array([[[3.0]], [[4.0]]])}
    names = [f"{target}qf{k}/{layer}.weight" for target in ("", "target_") for k in (1, 2) for layer in (0, 2)]
    found = planted({"critic": ours}, {name: np.zeros((1, 1)) for name in names} | {"log_alpha": np.full(1, 7.0)})
    assert [found[name].item() for name in (*names, "log_alpha")] == [1.0, 3.0, 2.0, 4.0] * 2 + [7.0]


def test_draws_are_those_given_whole_or_by_row():
    noise = np.arange(BATCH_SIZE * 2.0, dtype=np.float32).reshape(-1, 2)

    def whole(key):
        return jax.random.normal(key, (1, *noise.shape))[0]

    def by_row(key):
        keys = jax.random.split(key, BATCH_SIZE)
        return jax.vmap(lambda key: jax.random.normal(jax.random.split(key)[1], (2,)))(keys)

    for draw in (whole, by_row):
        with fed_jax([noise, 2 * noise]):
            np.testing.assert_array_equal(draw(jax.random.PRNGKey(3)), noise)
            np.testing.assert_array_equal(draw(jax.random.PRNGKey(3)), 2 * noise)
    with fed_jax([noise], [np.array([3, 1])]):
        assert jax.random.randint(jax.random.PRNGKey(0), (2,), 0, 9).tolist() == [3, 1]
        assert (whole(jax.random.key(3)) != noise).any()  # flax's keys


@pytest.mark.parametrize("updates", [0, 12])
def test_numbers_of_updates_are_refused(updates, tmp_path):
    with pytest.raises(UsageError, match=f"--updates {updates}: must be a multiple of 8"):
        parity.main(parity.Args(corl=tmp_path, updates=updates))


def test_nothing_to_compare_leaves_the_results_that_there_were(tmp_path):
    (tmp_path / "x.csv").write_text("kept")
    with pytest.raises(UsageError, match="none of these clones has one of awac"):  # unifloral
        parity.main(parity.Args(unifloral=tmp_path, algorithms=("awac",), out=tmp_path / "x"))
    with pytest.raises(UsageError, match="there is no directory"):
        parity.main(parity.Args(unifloral=tmp_path / "mistyped", algorithms=("iql",), out=tmp_path / "x"))
    assert (tmp_path / "x.csv").read_text() == "kept"
