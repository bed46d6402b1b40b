"""Random numbers for data made inside a training step: the bits of `jax.random`, sooner on CPU.

The bits are Threefry-2x32 with 20 rounds (Salmon, Moraes, Dror and Shaw, "Parallel random numbers:
as easy as 1, 2, 3", 2011), element by element those of `jax.random.bits`. JAX's own lowering for
CPU writes the cipher as a loop over whole arrays, so that every few rounds pass through memory;
here the rounds are unrolled and the loop is over blocks of rows, which stay in registers. Other
devices, and keys of other generators, go to `jax.random.bits` itself.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, UInt32

_ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)
_PARITY = np.uint32(0x1BD11BDA)
# Rows are handled in blocks of about this many words: enough for two cores to share.
_BLOCK = 1 << 15


def threefry_2x32(
    key: tuple[Array, Array], counter: tuple[Array, Array], rounds: int = 20
) -> tuple[Array, Array]:
    """The block cipher `Threefry-2x32` of Salmon et al. (2011), section 4.1 and appendix.

    Args:
        key: two uint32 words, of shapes that broadcast with the counter.
        counter: two uint32 words.
        rounds: number of rounds; 20 is the authors' recommendation.

    Returns:
        Two uint32 words of the broadcast shape.
    """
    words = (key[0], key[1], key[0] ^ key[1] ^ _PARITY)
    a, b = counter[0] + words[0], counter[1] + words[1]
    for i in range(rounds):
        rotation = _ROTATIONS[i % 8]
        a = a + b
        b = (b << np.uint32(rotation)) | (b >> np.uint32(32 - rotation))
        b = b ^ a
        if i % 4 == 3:
            injection = i // 4 + 1
            a = a + words[injection % 3]
            b = b + words[(injection + 1) % 3] + np.uint32(injection)
    return a, b


@partial(jax.jit, static_argnums=(1, 2))
def random_bits(key: Array, rows: int, columns: int) -> UInt32[Array, "rows columns"]:
    """Independent uniform words, equal to `jax.random.bits(key, (rows, columns))`.

    The last axis is the fast one: put the batch there. `jit`, `vmap` over keys and sharding of
    the columns apply.
    """
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    partitionable = getattr(jax.config, "jax_threefry_partitionable", True)
    same_stream = partitionable and rows * columns < 2**32
    if str(jax.random.key_impl(key)) != "threefry2x32" or not same_stream:
        return jax.random.bits(key, (rows, columns), jnp.uint32)
    return lax.platform_dependent(
        key,
        cpu=lambda key: _blocked_bits(key, rows, columns),
        default=lambda key: jax.random.bits(key, (rows, columns), jnp.uint32),
    )


def _blocked_bits(key: Array, rows: int, columns: int) -> Array:
    """Counter of word `(r, c)` is `(0, r columns + c)`; its value the xor of the two outputs."""
    # At least two blocks: XLA removes a loop of one turn, then fuses the cipher into every reader
    # of the bits and computes it once for each.
    blocks = max(2, -(-rows * columns // _BLOCK))
    height = -(-rows // blocks)
    blocks = max(2, -(-rows // height))
    words = jax.random.key_data(key)
    index = lax.broadcasted_iota(jnp.uint32, (height, columns), 0) * np.uint32(columns)
    index += lax.broadcasted_iota(jnp.uint32, (height, columns), 1)

    def block(_: None, number: Array) -> tuple[None, Array]:
        low = index + number * np.uint32(height * columns)
        a, b = threefry_2x32((words[0], words[1]), (jnp.zeros_like(low), low))
        return None, a ^ b

    bits = lax.scan(block, None, jnp.arange(blocks, dtype=jnp.uint32))[1]
    return bits.reshape(blocks * height, columns)[:rows]


def unit_uniform(key: Array, rows: int, columns: int) -> Float[Array, "rows columns"]:
    """Uniform numbers in `[0, 1)` of JAX's default float, equal to those of `jax.random.uniform`.

    Multiples of 2^-23 in float32 and of 2^-52 in float64 (where `jax.random` is called: speed
    matters in float32).
    """
    dtype = jnp.result_type(float)
    if dtype != jnp.float32:
        return jax.random.uniform(key, (rows, columns), dtype)
    mantissa = random_bits(key, rows, columns) >> np.uint32(9)
    one = np.float32(1).view(np.uint32)
    return lax.bitcast_convert_type(mantissa | one, jnp.float32) - np.float32(1)


def normal_from_unit(unit: Array) -> Array:
    """Standard normal numbers from uniform ones, `sqrt(2) erf_inv(2 u - 1 + eps)`.

    The half step `eps` centres the grid of `unit_uniform` on 0, so that the result is symmetric
    and finite (largest magnitude 5.3 in float32, 8.2 in float64).
    """
    eps = float(jnp.finfo(unit.dtype).eps)
    return float(np.sqrt(2)) * lax.erf_inv(2 * unit + (eps - 1))
