r"""Prediction with expert advice: Hedge, and experts that sleep outside of an interval.

    Hedge (Freund and Schapire 1997)    p_t ~ exp(-rate sum_{s<t} l_s)
    sleeping experts (Daniely et al. 2015), one for every expert j and dyadic interval I that has t:
        p_t ~ eta_I w_I,    w_I <- w_I (1 + eta_I (p_t . l_t - l_t)),    eta_I = min(1/2, |I|^-1/2)

Of losses in [0, 1] Hedge's regret over all T is at most sqrt(T log n / 2) at the rate
sqrt(8 log n / T). The sum of all awake w grows by what wakes alone, n for each interval, so that on
a dyadic interval of length L that ends at t, with B(t) = t (log2 t + 1),

    regret  <=  log(n B(t)) / eta_L + eta_L L.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike


def hedge(losses: ArrayLike, rate: float) -> np.ndarray:
    """Hedge's weights before every loss, `[..., T, n]`, of losses `[..., T, n]`."""
    losses = np.asarray(losses, float)
    total = rate * (np.cumsum(losses, axis=-2) - losses)
    weight = np.exp(total.min(-1, keepdims=True) - total)
    return weight / weight.sum(-1, keepdims=True)


def dyadic(length: int) -> list[tuple[int, int]]:
    """The intervals [i 2^k, (i + 1) 2^k) in 0..length - 1, as (start, end)."""
    sizes = [2**k for k in range(length.bit_length()) if 2**k <= length]
    return [(a, a + size) for size in sizes for a in range(0, length - size + 1, size)]


def sleeping(losses: ArrayLike) -> np.ndarray:
    """Weights of the sleeping experts, summed over intervals, `[..., T, n]`; see the module."""
    losses = np.asarray(losses, float)
    intervals = dyadic(losses.shape[-2])
    weight = {interval: np.ones_like(losses[..., 0, :]) for interval in intervals}
    found = np.empty_like(losses)
    for t in range(losses.shape[-2]):
        awake = [(a, b) for a, b in intervals if a <= t < b]
        mixed = sum(_rate(b - a) * weight[a, b] for a, b in awake)
        found[..., t, :] = mixed / np.sum(mixed, axis=-1, keepdims=True)
        mean = (found[..., t, :] * losses[..., t, :]).sum(-1, keepdims=True)
        for a, b in awake:
            weight[a, b] = weight[a, b] * (1 + _rate(b - a) * (mean - losses[..., t, :]))
    return found


def _rate(size: int) -> float:
    return min(0.5, size**-0.5)


def regret(weights: ArrayLike, losses: ArrayLike, start: int = 0, end: int | None = None) -> Any:
    """Loss of the weights less that of the best expert, between two times, `[...]`."""
    weights, losses = (np.asarray(a, float)[..., start:end, :] for a in (weights, losses))
    return (weights * losses).sum((-1, -2)) - losses.sum(-2).min(-1)


def hedge_bound(length: int, experts: int) -> float:
    """sqrt(T log n / 2)."""
    return float(np.sqrt(length * np.log(experts) / 2))


def sleeping_bound(start: int, end: int, experts: int) -> float:
    """The bound of the module, of the sleeping experts on a dyadic interval."""
    rate, size = _rate(end - start), end - start
    return float(np.log(experts * end * (np.log2(end) + 1)) / rate + rate * size)
