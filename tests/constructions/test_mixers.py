"""Mixers against loops over queries, masked queries and large scores."""

import jax
import jax.numpy as jnp
import numpy as np
import plain_numpy
import pytest

from constructions.core.layer import MIXERS, TRANSPOSED


@pytest.mark.parametrize("mixer", MIXERS)
def test_equals_loops(x64, mixer):
    rng = np.random.default_rng(0)
    scores, mask = rng.normal(size=(2, 3, 6, 5)) * 3, rng.random((2, 1, 6, 5)) < 0.5
    mask[0, 0, 0] = False
    found = np.asarray(MIXERS[mixer](jnp.asarray(scores), jnp.asarray(mask)))
    if mixer in TRANSPOSED:  # keys in the place of queries, of the mixer without that
        mixer = mixer.removeprefix("transposed_")
        scores, mask, found = (np.swapaxes(a, -1, -2) for a in (scores, mask, found))
    for index in np.ndindex(found.shape[:3]):
        seen = mask[index[0], 0, index[2]]
        np.testing.assert_allclose(
            found[index][seen], plain_numpy.mix(mixer, scores[index][seen]), atol=1e-14
        )
        assert not found[index][~seen].any()


def test_softmax_of_large_scores_and_its_gradient_without_keys(x64):
    softmax = MIXERS["softmax"]
    scores = jnp.array([[1e4, 1e4 - 1, -1e4], [1.0, 2.0, 3.0]])
    mask = jnp.array([[True, True, True], [False, False, False]])
    weights = softmax(scores, mask)
    np.testing.assert_allclose(weights[0, 0], 1 / (1 + np.exp(-1)), rtol=1e-12)
    jacobian = jax.jacobian(softmax)(scores, mask)
    assert np.isfinite(jacobian).all()
    p = np.asarray(weights[0])
    np.testing.assert_allclose(jacobian[0, :, 0], np.diag(p) - np.outer(p, p), atol=1e-12)
    assert not jacobian[1].any()


@pytest.mark.parametrize("mixer", MIXERS)
def test_derivatives_of_any_order_are_finite_where_a_query_sees_nothing(x64, mixer):
    rng = np.random.default_rng(1)
    scores, along = jnp.asarray(rng.normal(size=(2, 3, 4)))
    mask = jnp.asarray(rng.random((3, 4)) < 0.6).at[1].set(False).at[:, 2].set(False)

    def on_a_line(t):
        return MIXERS[mixer](scores + t * along, mask)

    slope = jax.jit(jax.jacfwd(on_a_line))  # forward mode, as a hessian has it outside
    h = 1e-5
    np.testing.assert_allclose(slope(0.0), (on_a_line(h) - on_a_line(-h)) / (2 * h), atol=1e-9)
    curved = jax.jit(jax.hessian(on_a_line))(0.0)
    np.testing.assert_allclose(curved, (slope(h) - slope(-h)) / (2 * h), atol=1e-9)
