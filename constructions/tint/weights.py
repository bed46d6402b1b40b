"""The weights of a decoder by the names that TinT has for them, out of a model's arrays and back.

query, key, value, output, hidden, back   [W b], `[layer, rows, columns + 1]`
gain, offset                              of the norms, `[2 layers + 1, width]`: in front of
                                          attention and MLP of every layer, then the final one
embedding, position                       `[words, width]`, `[positions, width]`
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

#: Matrices of one layer, in the order of a forward pass.
MATRICES = ("query", "key", "value", "output", "hidden", "back")
#: What of blocks and norms is trained.
CHANGED = (*MATRICES, "gain", "offset")
NORMS = ("norm", "mlp_norm")

Weights = Mapping[str, Array]


def from_arrays(arrays: Any) -> dict[str, Any]:
    """Weights from `Transformer.arrays()`, in JAX or numpy as they come."""
    layer, final = arrays["segments"][0]["layers"][0], arrays["final_norm"]
    heads, mlp = layer["heads"][0], layer["mlp"]
    xp = jnp if isinstance(heads["query"], jax.Array) else np
    count, width = heads["output_bias"].shape

    def matrix(w: Any, b: Any) -> Any:
        parts = w.reshape(count, -1, w.shape[-1]), b.reshape(count, -1, 1)
        return xp.concatenate(parts, -1)

    def norms(name: str) -> Any:
        each = xp.stack([layer[norm][name] for norm in NORMS], 1).reshape(-1, width)
        return xp.concatenate([each, final[name][None]])

    output = heads["output"].swapaxes(1, 2).reshape(count, width, -1)
    return {
        **{name: matrix(heads[name], heads[f"{name}_bias"]) for name in MATRICES[:3]},
        "output": matrix(output, heads["output_bias"]),
        "hidden": matrix(mlp["hidden"], mlp["hidden_bias"]),
        "back": matrix(mlp["output"], mlp["output_bias"]),
        "gain": norms("gain"),
        "offset": norms("offset"),
        **{name: arrays["tokens"][name] for name in ("embedding", "position")},
    }


def to_arrays(weights: Mapping[str, Any], heads: int) -> dict[str, Any]:
    """The inverse: parameters of a decoder with that many heads, nested as `Config.shapes`.

    Weights may have any axes in front, which every leaf then has.
    """
    (*lead, count, width, _), rows = weights["query"].shape, weights["query"].shape[-2] // heads
    w = {name: weights[name][..., :-1] for name in MATRICES}
    b = {f"{name}_bias": weights[name][..., -1] for name in MATRICES}
    attention = {name: w[name].reshape(*lead, count, heads, rows, width) for name in MATRICES[:3]}
    for name in attention.copy():
        attention[f"{name}_bias"] = b[f"{name}_bias"].reshape(*lead, count, heads, rows)
    output = w["output"].reshape(*lead, count, width, heads, rows).swapaxes(-2, -3)
    attention |= {"output": output, "output_bias": b["output_bias"]}
    mlp = {"hidden": w["hidden"], "hidden_bias": b["hidden_bias"]}
    mlp |= {"output": w["back"], "output_bias": b["back_bias"]}
    affine = {name: weights[name] for name in ("gain", "offset")}
    norms = {
        norm: {
            name: a[..., :-1, :].reshape(*lead, count, 2, width)[..., n, :]
            for name, a in affine.items()
        }
        for n, norm in enumerate(NORMS)
    }
    return {
        "segments": {0: {"layers": {0: {"heads": {0: attention}, "mlp": mlp, **norms}}}},
        "final_norm": {name: a[..., -1, :] for name, a in affine.items()},
        "tokens": {name: weights[name] for name in ("embedding", "position")},
    }
