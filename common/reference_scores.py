"""D4RL's reference returns, and the normalised score made from them."""

import numpy as np

# Returns of a random and of an expert policy, from D4RL's `infos.py`; the same for its versions 0 to 2.
REFERENCE_RETURNS = {
    "halfcheetah": (-280.178953, 12135.0),
    "hopper": (-20.272305, 3234.3),
    "walker2d": (1.629008, 4592.3),
    "ant": (-325.6, 3879.7),
    "antmaze": (0.0, 1.0),
    "kitchen": (0.0, 4.0),
    "pen": (96.262799, 3076.8331017826877),
    "door": (-56.512833, 2880.5693087298737),
    "hammer": (-274.856578, 12794.134825156867),
    "relocate": (-6.425911, 4233.877797728884),
    "maze2d-umaze": (23.85, 161.86),
    "maze2d-medium": (13.13, 277.39),
    "maze2d-large": (6.7, 273.99),
}


def normalized_score(domain: str | None, returns: np.ndarray) -> np.ndarray | None:
    """100 (R - random) / (expert - random), float64 of the shape of `returns`; None where D4RL published none."""
    if domain not in REFERENCE_RETURNS:
        return None
    low, high = REFERENCE_RETURNS[domain]
    return 100.0 * (np.asarray(returns, np.float64) - low) / (high - low)
