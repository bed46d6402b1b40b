"""The fast generator against `jax.random`, published test vectors and the laws it claims."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from synthetic.threefry import normal_from_unit, random_bits, threefry_2x32, unit_uniform


@pytest.mark.parametrize(
    ("rounds", "counter", "key", "expected"),
    [
        (20, (0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        (20, (2**32 - 1,) * 2, (2**32 - 1,) * 2, (0x1CB996FC, 0xBB002BE7)),
        (
            20,
            (0x243F6A88, 0x85A308D3),
            (0x13198A2E, 0x03707344),
            (0xC4923A9C, 0x483DF7A0),
        ),
        (13, (0, 0), (0, 0), (0x9D1C5EC6, 0x8BD50731)),
    ],
)
def test_threefry_gives_the_known_answers_of_random123(rounds, counter, key, expected):
    def words(pair):
        return jnp.array([pair[0]], jnp.uint32), jnp.array([pair[1]], jnp.uint32)

    result = threefry_2x32(words(key), words(counter), rounds)
    assert tuple(int(word[0]) for word in result) == expected


# below, at and above a block, and rows that do not divide into equal blocks
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (120, 2048), (7, 30_000), (17, 4096)])
def test_bits_and_uniforms_are_those_of_jax_random(shape):
    key = jax.random.key(7)
    np.testing.assert_array_equal(random_bits(key, *shape), jax.random.bits(key, shape))
    np.testing.assert_array_equal(unit_uniform(key, *shape), jax.random.uniform(key, shape))


def test_old_style_keys_and_other_generators_are_taken():
    np.testing.assert_array_equal(
        random_bits(jax.random.PRNGKey(3), 4, 5), random_bits(jax.random.key(3), 4, 5)
    )
    other = jax.random.key(0, impl="rbg")
    np.testing.assert_array_equal(random_bits(other, 4, 5), jax.random.bits(other, (4, 5)))


def test_keys_map_over_seeds():
    keys = jax.random.split(jax.random.key(0), 3)
    stacked = jax.vmap(lambda key: random_bits(key, 6, 9))(keys)
    np.testing.assert_array_equal(stacked[1], random_bits(keys[1], 6, 9))


@pytest.mark.parametrize("x64", [False, True], ids=["float32", "float64"])
def test_normals_are_normal_and_symmetric(x64):
    with jax.enable_x64(x64):
        unit = unit_uniform(jax.random.key(1), 50, 1000)
        assert unit.dtype == (jnp.float64 if x64 else jnp.float32)
        samples = np.ravel(normal_from_unit(unit))
        assert scipy.stats.kstest(samples, "norm").pvalue > 1e-3
        ends = normal_from_unit(jnp.array([0, 1 - jnp.finfo(unit.dtype).eps], unit.dtype))
        assert np.isfinite(ends).all()
        assert ends[0] == -ends[1]
        quantiles = jnp.array([0.025, 0.5, 0.9], unit.dtype)
        np.testing.assert_allclose(
            normal_from_unit(quantiles), scipy.stats.norm.ppf(quantiles), atol=1e-6, rtol=1e-5
        )
