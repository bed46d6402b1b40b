"""What parametrisation and noise prefer: mirror flow, drift along minima, and global optima."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.spatial import ConvexHull

from constructions.core.compile import compile_program
from constructions.core.program import Head, Layer, Program
from constructions.core.slots import Slots
from constructions.gradient_descent import local_sgd, mirror_flow, relu_optimum
from constructions.gradient_descent.construction import GradientDescent

TASK = mirror_flow.low_rank_task()


@pytest.fixture(scope="module")
def loss():
    with jax.enable_x64(True):
        return mirror_flow.Quadratic.of(TASK)


def test_heads_have_the_loss_of_the_compiled_layer(loss, x64):
    """`head_loss` and its quadratic, against the exact loss of a transformer with such heads."""
    rng = np.random.default_rng(0)
    p, q = rng.normal(size=(2, 6)) / 10
    slots = Slots()
    x, y = slots.add("x", 6), slots.add("y", 1, accumulates=True)
    heads = [
        Head(q[i] * x[i : i + 1], x[i : i + 1], -y, {y: p[i]}, keys="context") for i in range(6)
    ]
    model = compile_program(Program(slots, [Layer(heads)], token_groups=("context", "query")))
    c = GradientDescent(6, 1, 10, step_size=1.0, inputs=TASK.inputs)
    exact = float(c.population_excess(model))
    m, zero = p * q, jnp.zeros(6)
    assert float(mirror_flow.head_loss(p, q, TASK)) == pytest.approx(exact, rel=1e-12)
    start = float(mirror_flow.head_loss(zero, zero, TASK))
    quadratic = 0.5 * m @ loss.matrix @ m - loss.vector @ m
    assert quadratic == pytest.approx(exact - start, rel=1e-10)
    assert loss.basis.shape == (6, 3)  # many m have the least loss


def potential_residual(p, q, time, steps):
    """Largest |asinh(2 m / c) / 2 at the end - at the start + integral of dL/dm| of the flow."""

    def field(w):
        p, q, _ = w
        slopes = jax.grad(lambda p, q: mirror_flow.head_loss(p, q, TASK), (0, 1))(p, q)
        along = jax.grad(mirror_flow.head_loss, 1)(jnp.ones_like(p), p * q, TASK)
        return jnp.stack([-slopes[0], -slopes[1], along])

    start = jnp.stack([p, q, 0 * p])
    end = jax.jit(lambda w: mirror_flow.flow(field, w, time, steps))(start)
    mirror = [jnp.arcsinh(2 * a * b / (p**2 - q**2)) / 2 for a, b in ((p, q), end[:2])]
    return float(jnp.abs(mirror[1] - mirror[0] + end[2]).max())


def test_potential_moves_by_the_slope(x64):
    """To 1e-10 along the flow; and fields of factors commute, those of a shared scale do not."""
    rng = np.random.default_rng(1)
    p, q = jnp.asarray(rng.uniform(0.3, 0.5, 6)), jnp.asarray(rng.uniform(-0.2, 0.2, 6))
    assert potential_residual(p, q, 0.03, 800) < 1e-10
    both, shared = jnp.stack([p, q]), jnp.concatenate([p[:1], q])
    assert mirror_flow.order_of_flows(lambda w: w[0] * w[1], both, 0.5) < 1e-14
    assert mirror_flow.order_of_flows(lambda w: w[0] * w[1:], shared, 0.5) > 0.05


@pytest.mark.parametrize("c", [100.0, 0.3, 1e-3])
def test_projection_has_the_least_divergence(loss, c):
    """Against scipy, on the affine space of least loss; and its ends are the least norms."""
    found = mirror_flow.projection(loss, np.full(6, c), np.zeros(6))
    np.testing.assert_allclose(loss.matrix @ found, loss.vector, atol=1e-8)
    rest = np.linalg.svd(loss.basis.T)[2][3:].T

    def divergence(m):  # the integral of asinh(2 m / c) / 2
        return (0.5 * m * np.arcsinh(2 * m / c) - 0.25 * np.sqrt(4 * m**2 + c**2)).sum()

    best = minimize(lambda t: divergence(found + rest @ t), np.full(3, 0.05), tol=1e-12)
    assert divergence(found) <= best.fun + 1e-9
    l1, l2 = mirror_flow.least_norms(loss)
    assert np.abs(found).sum() >= l1 * (1 - 1e-9) and np.linalg.norm(found) >= l2 * (1 - 1e-9)
    if c == 100.0:
        assert np.linalg.norm(found) < l2 * (1 + 1e-6)
        assert np.abs(found).sum() > 1.2 * l1


def test_trained_heads_end_there_and_shared_ones_elsewhere(x64):
    rows = {row.name: row for row in mirror_flow.measure(quick=True)}
    assert rows["mirror flow, distance from the projection"].measured < 5e-4
    assert rows["shared value scale, distance from every projection"].measured > 0.03
    assert rows["l1 norm over the least, small scale"].measured < 1.02
    assert rows["l1 norm over the least, large scale"].measured > 1.2


def test_sharpness_along_the_minima(x64):
    """The closed form, by differences of the exact loss of compiled layers, u and w apart."""
    c = GradientDescent(3, 1, 5)
    task, m, s, e = c.task, c.step_size, 1.7, 1e-3
    u, w = s * np.sqrt(m), np.sqrt(m) / s

    def excess(u: float, w: float) -> float:
        return float(c.population_excess(GradientDescent(3, 1, 5, step_size=u * w).reference))

    trace = sum(
        (excess(u + a, w + b) - 2 * excess(u, w) + excess(u - a, w - b)) / e**2
        for a, b in ((e, 0), (0, e))
    )
    assert trace == pytest.approx(float(local_sgd.sharpness(s, task)), rel=1e-6)
    grid = np.linspace(0.5, 2, 301)
    assert grid[np.argmin(local_sgd.sharpness(grid, task))] == pytest.approx(1)


def test_drift_ratios_and_limits():
    """Within 2 % of the closed form at four H; its limits in eta at three ways of choosing H."""
    for row in local_sgd.measure(quick=True):
        local = int(row.name.split("= ")[1])
        exact = float(local_sgd.drift_ratio(8, local, 0.005))
        assert abs(row.measured / exact - 1) < 0.02, row.name
        slow = local_sgd.slow_drift_ratio(8, 0.005 * local)
        assert exact == pytest.approx(float(slow), rel=0.03) and row.published == slow
    step = 1e-6
    for local, limit in ((10, 1.0), (0.5 / step, float(local_sgd.slow_drift_ratio(8, 0.5))),
                         (0.1 / step**2, 8.0)):  # fmt: skip
        assert float(local_sgd.drift_ratio(8, local, step)) == pytest.approx(limit, rel=1e-3)


def test_workers_of_one_step_are_one_batch_and_no_noise_keeps_the_scale(x64):
    key, constants = jax.random.split(jax.random.key(0), 1), jnp.asarray([1.0, 0.5, 0.3])
    start, keys = jnp.asarray([1.2, 0.3]), jax.random.split(key[0], 50)
    found = local_sgd.descend(key, start, constants, 0.01, 1, 50, 8)[0]
    u, w = 1.2, 0.3
    for n in range(50):
        noise = float(jax.random.normal(keys[n], (1, 8)).mean())
        slope = u * w - 0.5 + 0.3 * noise
        u, w = u - 0.01 * slope * w, w - 0.01 * slope * u
        np.testing.assert_allclose(found[n], [u, w], rtol=1e-12)
    still = constants.at[2].set(0.0)
    ends = [local_sgd.descend(key, start, still, 20 / n, n, 1, 8)[0, -1] for n in (4000, 8000)]
    moved = [abs(float(u**2 - w**2) / (1.2**2 - 0.3**2) - 1) for u, w in ends]
    assert moved[1] < 1e-3 and moved[0] / moved[1] == pytest.approx(2, rel=0.05)  # of order eta


def test_rotations_of_keys_and_queries_do_not_drift():
    """Label noise moves neither by a rotation of both: K ^ dK + Q ^ dQ = 0 in every step."""
    rng = np.random.default_rng(0)
    k, q = rng.normal(size=(2, 2))
    turned = sizes = 0.0
    for _ in range(2000):
        slope = k @ q - 1 + 0.5 * rng.normal()
        dk, dq = -0.02 * slope * q, -0.02 * slope * k
        turned += k[0] * dk[1] - k[1] * dk[0] + q[0] * dq[1] - q[1] * dq[0]
        sizes += abs(k[0] * dk[1] - k[1] * dk[0])
        k, q = k + dk, q + dq
    assert abs(turned) < 1e-12 * sizes


@pytest.mark.parametrize("count", [2, 3, 8])
def test_patterns_are_those_of_all_directions_and_vertices_of_the_zonotope(count):
    points, _ = relu_optimum.points_and_targets(3, count)
    edge = relu_optimum.rays(points)
    found = (edge + np.roll(edge, -1, axis=0)) @ points.T > 0  # of the units of each cone
    every = np.unique(np.random.default_rng(0).normal(size=(200_000, 2)) @ points.T > 0, axis=0)
    assert len(found) == 2 * count == len({tuple(p) for p in found.tolist()})
    assert {tuple(p) for p in found.tolist()} == {tuple(p) for p in every.tolist()}
    if count > 1:
        subsets = np.array([[n >> k & 1 for k in range(count)] for n in range(2**count)])
        hull = ConvexHull(subsets @ points)
        vertices = {tuple(np.round((subsets @ points)[v], 9)) for v in hull.vertices}
        assert vertices == {tuple(np.round(p @ points, 9)) for p in found}


def test_optimum_is_that_of_a_fine_search():
    """One unit: all directions on a grid, with the best size for each; two: more, never less."""
    for seed in range(3):
        points, target = relu_optimum.points_and_targets(seed, 6)
        best, _ = relu_optimum.optimum(points, target, 1)
        angle = np.linspace(0, 2 * np.pi, 40_000)
        unit = np.maximum(np.stack([np.cos(angle), np.sin(angle)], 1) @ points.T, 0)
        size = (unit @ target) / np.maximum((unit**2).sum(1), 1e-300)
        grid = ((size[:, None] * unit - target) ** 2).sum(1).min() / 12
        assert best <= grid + 1e-12 and best == pytest.approx(grid, rel=1e-4)
        assert relu_optimum.optimum(points, target, 2)[0] <= best


@pytest.mark.parametrize("tries", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_descent_beats_the_enumeration(tries, x64):
    points, target = relu_optimum.points_and_targets(0)
    keys = jax.random.split(jax.random.key(1), tries)
    for units in (2,) if tries < 1000 else (1, 2, 3):
        best, _ = relu_optimum.optimum(points, target, units)
        found = relu_optimum.descend(keys, jnp.asarray(points), jnp.asarray(target), units, 3000)
        assert float(found.min()) >= best * (1 - 1e-9)
        assert float(found.min()) < 1.05 * best


def test_random_vertices_are_worse_when_units_are_few():
    points, target = relu_optimum.points_and_targets(0)
    features, rng = relu_optimum.columns(points), np.random.default_rng(0)

    def median(units: int) -> float:
        drawn = rng.integers(0, 32, (60, units)).tolist()
        return float(np.median([relu_optimum.least_loss(c, features, target) for c in drawn]))

    assert median(2) > 1.5 * relu_optimum.optimum(points, target, 2)[0]
    assert median(48) < 1e-9


@pytest.mark.parametrize(
    "points", [np.ones((2, 3)), np.ones((3, 2)), np.array([[1.0, np.nan], [0, 1]])]
)
def test_points_are_checked(points):
    with pytest.raises(ValueError, match="points"):
        relu_optimum.rays(points)
