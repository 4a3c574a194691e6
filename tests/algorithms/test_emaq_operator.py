"""The exact EMaQ operator on random tabular MDPs: what the paper proves of it, against ground truth found otherwise.

Ground truth is the enumeration of all tuples of N actions, linear solves for the values of a policy, policy iteration
within the support, exact rational arithmetic, and cases solved by hand.
"""

import itertools
from fractions import Fraction
from functools import cache
from typing import NamedTuple

import numpy as np
import pytest
from finite_max import difficulty, expected_max

from benchmarks.complexity import suboptimality_bound

STATES, ACTIONS = 6, 5
SEEDS = range(6)
COUNTS = (1, 2, 3, 4, 8, 30, 200)
SMALL = (1, 2, 3, 4)
"""Numbers of draws whose tuples are few enough to enumerate."""


class MDP(NamedTuple):
    rewards: np.ndarray
    transitions: np.ndarray
    behavior: np.ndarray
    discount: float


@cache
def random_mdp(seed: int) -> MDP:
    """Six states, the last absorbing and without reward, hence with ties; five actions.

    Action 3 has the highest reward but is outside the support of behaviour, and so is action 2 in some of the states.
    Action 4 is action 0 under another name. In the states 1, 3 and 5 the next state depends on no action and rewards
    are whole numbers, so that several actions tie.
    """
    rng = np.random.default_rng(seed)
    rewards = rng.normal(size=(STATES, ACTIONS))
    transitions = rng.dirichlet(np.full(STATES, 0.3), (STATES, ACTIONS))
    rewards[1::2] = rng.integers(-1, 2, rewards[1::2].shape)
    transitions[1::2] = transitions[1::2, :1]
    rewards[:, 3] = rewards.max() + 1
    rewards[:, 4], transitions[:, 4] = rewards[:, 0], transitions[:, 0]
    rewards[-1], transitions[-1] = 0.0, np.eye(STATES)[-1]
    behavior = rng.uniform(0.1, 1.0, (STATES, ACTIONS))
    behavior[:, 3] = 0.0
    behavior[rng.random(STATES) < 0.4, 2] = 0.0
    behavior /= behavior.sum(1, keepdims=True)
    for array in (rewards, transitions, behavior):
        array.setflags(write=False)
    return MDP(rewards, transitions, behavior, (0.5, 0.8, 0.95)[seed % 3])


def backup(mdp: MDP, q: np.ndarray, n: int) -> np.ndarray:
    """Eq. (5)."""
    return mdp.rewards + mdp.discount * mdp.transitions @ expected_max(q, mdp.behavior, n)


def iterate(mdp: MDP, q: np.ndarray, n: int, limit: int = 2000) -> np.ndarray:
    for _ in range(limit):
        q, before = backup(mdp, q, n), q
        if np.abs(q - before).max() < 1e-13:
            return q
    raise AssertionError("the iteration did not converge")


@cache
def fixed_point(seed: int, n: int) -> np.ndarray:
    return iterate(random_mdp(seed), np.zeros((STATES, ACTIONS)), n)


def evaluate(mdp: MDP, policy: np.ndarray) -> np.ndarray:
    """Q of a policy, by linear equations in its state values."""
    rewards, transitions = (np.einsum("sa,sa...->s...", policy, x) for x in (mdp.rewards, mdp.transitions))
    values = np.linalg.solve(np.eye(STATES) - mdp.discount * transitions, rewards)
    return mdp.rewards + mdp.discount * mdp.transitions @ values


@cache
def optimum(seed: int, constrained: bool = True) -> np.ndarray:
    """Q* by policy iteration, among the actions of mu's support or among all."""
    mdp = random_mdp(seed)
    allowed = mdp.behavior > 0 if constrained else np.full(mdp.behavior.shape, True)
    policy = np.eye(ACTIONS)[np.argmax(allowed, 1)]
    for _ in range(100):
        q = evaluate(mdp, policy)
        best = np.max(np.where(allowed, q, -np.inf), 1)
        if np.allclose((policy * q).sum(1), best, rtol=0, atol=1e-13):
            return q
        policy = np.eye(ACTIONS)[np.argmax(np.where(allowed, q, -np.inf), 1)]
    raise AssertionError("policy iteration did not converge")


def tuples(q: np.ndarray, probabilities: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each tuple of n actions its probability and its action of highest value, each [states, actions ** n]."""
    choices = np.array(list(itertools.product(range(q.shape[1]), repeat=n)))
    best = np.argmax(q[:, choices], -1)
    return probabilities[:, choices].prod(-1), choices[np.arange(len(choices)), best]


def enumerated(q: np.ndarray, probabilities: np.ndarray, n: int) -> np.ndarray:
    """E max as a sum over all tuples."""
    weights, best = tuples(q, probabilities, n)
    return (weights * np.take_along_axis(q, best, 1)).sum(1)


def mass_below(values: np.ndarray, probabilities: np.ndarray, threshold: np.ndarray) -> np.ndarray:
    return np.sum(probabilities * (values <= threshold[:, None]), 1)


# The expected maximum


@pytest.mark.parametrize("n", SMALL)
@pytest.mark.parametrize("seed", SEEDS)
def test_expected_max_is_the_sum_over_all_tuples(seed: int, n: int) -> None:
    probabilities = random_mdp(seed).behavior
    rng = np.random.default_rng(seed)
    for q in (rng.normal(size=(STATES, ACTIONS)), rng.integers(0, 3, (STATES, ACTIONS)).astype(float)):
        np.testing.assert_allclose(expected_max(q, probabilities, n), enumerated(q, probabilities, n), atol=1e-13)


def test_expected_max_by_hand() -> None:
    # The larger of two dice: 1 to 6 with 1, 3, 5, 7, 9 and 11 chances in 36.
    assert expected_max(np.arange(1.0, 7.0), None, 2) == pytest.approx(161 / 36, rel=1e-14)
    # Two of 5, 7, 9 with chances 1/2, 1/3, 1/6: the squares of 1/2, 5/6 and 1 are 9, 25 and 36 in 36.
    assert expected_max(np.array([7.0, 9.0, 5.0]), np.array([1 / 3, 1 / 6, 1 / 2]), 2) == pytest.approx(
        (5 * 9 + 7 * 16 + 9 * 11) / 36, rel=1e-14
    )


@pytest.mark.parametrize("n", [1, 7, 200, 2000])
def test_many_draws_agree_with_rational_arithmetic(n: int) -> None:
    shares = [1, 5, 40, 450, 500, 4]  # in 1000
    values = [3, -2, 0, 8, 8, 1]
    exact, before = Fraction(0), Fraction(0)
    for value in sorted(set(values)):
        mass = Fraction(sum(share for share, v in zip(shares, values, strict=True) if v <= value), 1000) ** n
        exact, before = exact + value * (mass - before), mass
    probabilities = np.array(shares) / 1000
    assert expected_max(np.array(values), probabilities, n) == pytest.approx(float(exact), rel=1e-13)
    # What is left to gain has its own leading digits, down to the 1e-260 of 200 draws.
    assert difficulty(np.array(values), probabilities, n) == pytest.approx(float(8 - exact), rel=1e-11, abs=0)


def test_tails_too_thin_for_a_sum_from_the_bottom() -> None:
    # 1 - 1e-18 is 1 in float64; drawn 1e18 times, the rare value misses with probability 1 / e.
    rare = np.array([1 - 1e-18, 1e-18])
    assert expected_max(np.array([0.0, 1.0]), rare, 10**18) == pytest.approx(1 - np.exp(-1), rel=1e-13)
    assert difficulty(np.array([0.0, 1.0]), rare, 10**18) == pytest.approx(np.exp(-1), rel=1e-13)
    # Beside a value of a million, what 150 fair coins leave is still exact.
    assert difficulty(np.array([1e6, 1e6 + 1]), None, 150) == pytest.approx(2.0**-150, rel=1e-12)


@pytest.mark.parametrize("n", [1, 3, 50])
def test_expected_max_depends_on_the_distribution_alone(n: int) -> None:
    rng = np.random.default_rng(n)
    values, probabilities = rng.normal(size=(4, 3, 6)), rng.dirichlet(np.ones(6), (4, 3))
    expected = expected_max(values, probabilities, n)
    assert expected.shape == (4, 3)
    for index in np.ndindex(4, 3):
        assert expected[index] == pytest.approx(expected_max(values[index], probabilities[index], n), rel=1e-14)

    order = rng.permutation(6)
    np.testing.assert_allclose(expected_max(values[..., order], probabilities[..., order], n), expected, atol=1e-14)
    # One action under two names.
    twice = np.concatenate([values, values[..., :1]], -1)
    shares = np.concatenate([probabilities, 0.3 * probabilities[..., :1]], -1)
    shares[..., 0] *= 0.7
    np.testing.assert_allclose(expected_max(twice, shares, n), expected, atol=1e-14)
    # Actions outside the support, whatever their values.
    wider = np.concatenate([values, np.broadcast_to([np.inf, -np.inf, np.nan, 1e9, -1e9], (4, 3, 5))], -1)
    nothing = np.concatenate([probabilities, np.zeros((4, 3, 5))], -1)
    np.testing.assert_allclose(expected_max(wider, nothing, n), expected, atol=1e-14)
    np.testing.assert_allclose(difficulty(wider, nothing, n), values.max(-1) - expected, atol=1e-14)
    # One distribution for several rows of values, and several for one row.
    for function in (expected_max, difficulty):
        one = function(values, probabilities[0, 0], n), function(values[0, 0], probabilities, n)
        for index in np.ndindex(4, 3):
            assert one[0][index] == pytest.approx(function(values[index], probabilities[0, 0], n), rel=1e-14)
            assert one[1][index] == pytest.approx(function(values[0, 0], probabilities[index], n), rel=1e-14)


@pytest.mark.parametrize("n", SMALL)
def test_a_pool_is_the_distribution_of_its_tallies(n: int) -> None:
    pool = np.array([2.0, -1.0, 2.0, 0.0, 2.0])
    tallied = enumerated(np.array([[-1.0, 0.0, 2.0]]), np.array([[0.2, 0.2, 0.6]]), n)
    assert expected_max(pool, None, n) == pytest.approx(tallied[0], rel=1e-14)
    assert difficulty(pool, None, n) == pytest.approx(2 - tallied[0], rel=1e-14)


def test_probabilities_of_float32_are_made_to_sum_to_one() -> None:
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(40), 8).astype(np.float32)
    probabilities[:, 0] = 0.0
    probabilities /= probabilities.sum(1, keepdims=True)
    values = np.full((8, 40), 7.0)
    values[:, 0] = -1.0  # the first in order would take what is missing from 1
    assert probabilities.astype(float).sum(1).min() < 1 - 1e-9
    for n in (1, 2):
        np.testing.assert_allclose(expected_max(values, probabilities, n), 7.0, rtol=1e-14)


@pytest.mark.parametrize(
    ("probabilities", "n"), [([0.5, 0.5], 0), ([0.5, 0.4], 2), ([1.5, -0.5], 2), ([np.nan, 1.0], 2)]
)
def test_what_is_no_distribution_is_refused(probabilities: list[float], n: int) -> None:
    with pytest.raises(ValueError, match=r"at least one|sum to 1"):
        expected_max(np.array([0.0, 1.0]), np.array(probabilities), n)


# The operator: Theorems 3.1 to 3.4


@pytest.mark.parametrize("n", COUNTS)
@pytest.mark.parametrize("seed", SEEDS)
def test_contraction_with_the_discount_as_factor(seed: int, n: int) -> None:
    mdp, rng = random_mdp(seed), np.random.default_rng(seed)
    for scale in (1e-2, 1.0, 10.0):  # from few swaps in the order of actions to an order that is all new
        one = rng.normal(size=(STATES, ACTIONS))
        other = one + scale * rng.uniform(-1, 1, one.shape)
        distance = np.abs(one - other).max()
        assert np.abs(backup(mdp, one, n) - backup(mdp, other, n)).max() <= mdp.discount * distance + 1e-12
        # The factor is attained, by a shift of all values; and no value that rises makes another fall.
        np.testing.assert_allclose(backup(mdp, one + scale, n), backup(mdp, one, n) + mdp.discount * scale, atol=1e-12)
        assert np.all(backup(mdp, np.maximum(one, other), n) >= backup(mdp, one, n) - 1e-12)


@pytest.mark.parametrize("n", (1, 3, 30))
@pytest.mark.parametrize("seed", SEEDS)
def test_one_fixed_point_from_any_start(seed: int, n: int) -> None:
    mdp, rng = random_mdp(seed), np.random.default_rng(seed)
    reached = fixed_point(seed, n)
    if n in SMALL:
        by_tuples = mdp.rewards + mdp.discount * mdp.transitions @ enumerated(reached, mdp.behavior, n)
        np.testing.assert_allclose(by_tuples, reached, atol=1e-11)
    for start in (rng.normal(0, 100, reached.shape), optimum(seed, constrained=False)):
        np.testing.assert_allclose(iterate(mdp, start, n), reached, atol=1e-11)


@pytest.mark.parametrize("n", SMALL)
@pytest.mark.parametrize("seed", SEEDS)
def test_fixed_point_is_the_value_of_its_best_of_n_policy(seed: int, n: int) -> None:
    mdp, reached = random_mdp(seed), fixed_point(seed, n)
    weights, best = tuples(reached, mdp.behavior, n)
    policy = np.stack([np.bincount(b, w, ACTIONS) for b, w in zip(best, weights, strict=True)])
    np.testing.assert_allclose(policy.sum(1), 1.0, rtol=1e-12)
    np.testing.assert_allclose(evaluate(mdp, policy), reached, atol=1e-11)


@pytest.mark.parametrize("seed", SEEDS)
def test_one_draw_evaluates_the_behavior_policy(seed: int) -> None:
    mdp = random_mdp(seed)
    np.testing.assert_allclose(fixed_point(seed, 1), evaluate(mdp, mdp.behavior), atol=1e-11)


@pytest.mark.parametrize("seed", SEEDS)
def test_values_rise_with_n(seed: int) -> None:
    chain = [fixed_point(seed, n) for n in COUNTS] + [optimum(seed)]
    for fewer, more in itertools.pairwise(chain):
        assert np.all(more >= fewer - 1e-11)
    for fewer, more in itertools.pairwise(chain[:5]):
        assert np.max(more - fewer) > 1e-3


@pytest.mark.parametrize("seed", SEEDS)
def test_limit_is_the_optimum_within_the_support(seed: int) -> None:
    q = optimum(seed)
    np.testing.assert_allclose(fixed_point(seed, 100_000), q, atol=1e-11)
    # Not that of all actions: outside the support there is more to gain.
    assert np.max(optimum(seed, constrained=False) - q) > 0.5


# Bounds: Theorem 3.5 and its corollaries


@pytest.mark.parametrize("n", COUNTS)
@pytest.mark.parametrize("seed", SEEDS)
def test_suboptimality_is_within_both_bounds(seed: int, n: int) -> None:
    mdp, best, reached = random_mdp(seed), optimum(seed), fixed_point(seed, n)
    error = np.abs(reached - best).max()
    for q in (best, reached):
        left = difficulty(q, mdp.behavior, n)
        if n in SMALL:
            support = np.where(mdp.behavior > 0, q, -np.inf)
            np.testing.assert_allclose(left, support.max(1) - enumerated(q, mdp.behavior, n), atol=1e-12)
        by_pairs, by_states = (suboptimality_bound(left, mdp.discount, p) for p in (mdp.transitions, None))
        assert error - 1e-11 <= by_pairs <= by_states + 1e-12
    if n == 1:
        assert by_pairs < 0.99 * by_states  # Eq. (8) is another bound than Eq. (9)


@pytest.mark.parametrize("n", COUNTS)
def test_bounds_are_attained_with_one_state(n: int) -> None:
    # Q_N = r + discount V_N and V_N = E max r + discount V_N, so all is known from E max r = 1 - 2 * 0.75^n.
    discount, rewards, behavior = 0.9, np.array([[1.0, -1.0, -1.0, 5.0]]), np.array([[0.25, 0.5, 0.25, 0.0]])
    mdp = MDP(rewards, np.ones((1, 4, 1)), behavior, discount)
    reached = iterate(mdp, rewards, n)
    optimal = rewards + discount * 1 / (1 - discount)
    error = 0.9 / 0.1 * 2 * 0.75**n
    np.testing.assert_allclose(optimal - reached, error, atol=1e-11)
    for q in (optimal, reached):
        left = difficulty(q, behavior, n)
        assert suboptimality_bound(left, discount) == pytest.approx(error, abs=1e-11)
        assert suboptimality_bound(left, discount, mdp.transitions) == pytest.approx(error, abs=1e-11)


def test_bounds_by_hand() -> None:
    # Pairs lead to 1/4 of D = 2 and 3/4 of D = 4, to D = 2 only, and half the time to an end: 3.5, 2 and 2.
    transitions = np.array([[[0.25, 0.75], [1.0, 0.0]], [[0.0, 0.5], [1.0, 0.0]]])
    assert suboptimality_bound(np.array([2.0, 4.0]), 0.75) == 3 * 4
    assert suboptimality_bound(np.array([2.0, 4.0]), 0.75, transitions) == 3 * 3.5


@pytest.mark.parametrize("seed", SEEDS)
def test_corollary_a1_bounds_by_the_advantage_of_the_behavior_policy(seed: int) -> None:
    mdp = random_mdp(seed)
    q = evaluate(mdp, mdp.behavior)
    advantages = np.where(mdp.behavior > 0, q - (mdp.behavior * q).sum(1, keepdims=True), -np.inf)
    bound = mdp.discount / (1 - mdp.discount) * advantages.max()
    assert suboptimality_bound(difficulty(q, mdp.behavior, 1), mdp.discount) == pytest.approx(bound, rel=1e-12)
    assert np.abs(fixed_point(seed, 1) - optimum(seed)).max() <= bound


@pytest.mark.parametrize("n", COUNTS)
@pytest.mark.parametrize("seed", SEEDS)
def test_corollary_a2_geometric_decay(seed: int, n: int) -> None:
    mdp, q = random_mdp(seed), optimum(seed)
    supported = mdp.behavior > 0
    best = np.max(np.where(supported, q, -np.inf), 1, keepdims=True)
    optimal_mass = np.sum(mdp.behavior * (q > best - 1e-9), 1).min()
    rewards = mdp.rewards[supported]
    bound = (1 - optimal_mass) ** n * (rewards.max() - rewards.min()) / (1 - mdp.discount)
    left = difficulty(q, mdp.behavior, n)
    assert 0 < left.max() <= bound
    error = np.abs(fixed_point(seed, n) - q).max()
    assert error <= mdp.discount / (1 - mdp.discount) * bound + 1e-11


@pytest.mark.parametrize("seed", SEEDS)
def test_difficulty_is_not_negative_and_falls_ever_more_slowly(seed: int) -> None:
    q, probabilities = optimum(seed), random_mdp(seed).behavior
    curve = np.stack([difficulty(q, probabilities, n) for n in range(1, 42)])
    assert np.all(curve >= 0)
    drops = -np.diff(curve, axis=0)
    assert np.all(drops >= -1e-14) and np.all(np.diff(drops, axis=0) <= 1e-14)
    # One draw more gains the integral of F^n (1 - F), a sum over the steps of F, here without sorting probabilities.
    for n in (1, 5, 40):
        gain = np.zeros(STATES)
        for low, high in itertools.pairwise(np.sort(q, axis=1).T):
            mass = mass_below(q, probabilities, low)
            gain += np.where(mass < 1 - 1e-12, (high - low) * mass**n * (1 - mass), 0.0)
        np.testing.assert_allclose(drops[n - 1], gain, atol=1e-13)
    # The absorbing state's actions are all alike; elsewhere the curve does fall.
    assert np.all(curve[:, -1] == 0) and np.all(drops[0, [0, 2, 4]] > 0)
