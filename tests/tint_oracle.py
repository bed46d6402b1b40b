"""What TinT is compared with: jax.grad of the auxiliary model itself, and SGD of optax."""

from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from constructions.core.transformer import Transformer
from constructions.interchange.decoder import DecoderShape, check_auxiliary, decoder, logits

WORDS, POSITIONS = 7, 9
FROZEN = ("embedding", "position")
VALUE_ONLY = (*FROZEN, "query", "query_bias", "key", "key_bias")
PAPER_FROZEN = (*FROZEN, "query", "query_bias", "key", "key_bias", "gain")

# Sequences of 7 tokens, of at most 9, and whether each position is trained on.
TOKENS = np.random.default_rng(0).integers(0, WORDS, (5, 7))
MASKS = np.array(
    [
        [1, 1, 1, 1, 1, 1, 1],
        [1, 0, 1, 1, 0, 1, 0],
        [0, 0, 0, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0, 0],
        [0, 1, 0, 0, 0, 0, 1],
    ],
    bool,
)

RATE, TIME = 0.5, 6
#: Four texts for the small decoders, of all their positions; position 2 is the last trained on.
TEXTS = np.random.default_rng(1).integers(0, 5, (4, TIME))
TRAINED = np.array([[1, 1, 1, 0, 0, 0], [0, 1, 1, 0, 0, 0], [1, 0, 1, 0, 0, 0], [0, 0, 1, 0, 0, 0]])
TRAINED = TRAINED == 1


class Reference(NamedTuple):
    before: np.ndarray
    after: np.ndarray
    updated: dict[str, np.ndarray]


def names(tree):
    """{parameter: array}, as the model names its parameters."""
    found = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(str(key.key) for key in path): np.asarray(leaf) for path, leaf in found}


def named(path):
    """The names along a path of keys."""
    return {getattr(key, "key", None) for key in path}


def parameters(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def moved(model, std=0.3, seed=0):
    """The model with noise on every parameter, biases, gains and offsets too; float32 holds it."""
    rng, state = np.random.default_rng(seed), nnx.state(model, nnx.Param)
    model = Transformer(model.config, model.arrays())

    def move(leaf):
        return jnp.asarray(np.float32(leaf + std * rng.normal(size=leaf.shape)), leaf.dtype)

    nnx.update(model, jax.tree.map(move, state))
    return model


def cast(model, dtype):
    """The same numbers in another dtype."""
    floats = jax.tree.map(
        lambda a: a.astype(dtype) if a.dtype.kind == "f" else a, jax.device_get(model.arrays())
    )
    return Transformer(model.config, jax.tree.map(jnp.asarray, floats))


def plain_scores(shape: DecoderShape, params, tokens, value_only):
    """The decoder once more, whose attention weights may count as constants."""
    layers = params["segments"][0]["layers"][0]

    def norm(w, x):
        return w["gain"] * jax.nn.standardize(x, epsilon=shape.eps) + w["offset"]

    x = params["tokens"]["embedding"][tokens] + params["tokens"]["position"][: len(tokens)]
    for n in range(shape.layers):
        w = jax.tree.map(lambda a, n=n: a[n], layers)
        heads, read = w["heads"][0], norm(w["norm"], x)
        q, k, v = (
            jnp.einsum("hrc,tc->htr", heads[s], read) + heads[f"{s}_bias"][:, None]
            for s in ("query", "key", "value")
        )
        scores = jnp.einsum("hid,hjd->hij", q, k) / np.sqrt(shape.width // shape.heads)
        seen = np.tri(len(tokens), dtype=bool)
        weights = jax.nn.softmax(scores, where=seen, axis=-1)
        weights = jax.lax.stop_gradient(weights) if value_only else weights
        x = x + jnp.einsum("hij,hjd,hcd->ic", weights, v, heads["output"]) + heads["output_bias"]
        u = norm(w["mlp_norm"], x) @ w["mlp"]["hidden"].T + w["mlp"]["hidden_bias"]
        u = jax.nn.relu(u) if shape.activation == "relu" else jax.nn.gelu(u, approximate=True)
        x = x + u @ w["mlp"]["output"].T + w["mlp"]["output_bias"]
    return norm(params["final_norm"], x) @ params["tokens"]["embedding"].T


@lru_cache
def compiled(graph, shape, rate, frozen, value_only):
    """Scores, and a step of SGD on one sequence; one compilation for all models of a shape."""

    def scores(params, rest, tokens):
        if value_only:
            return plain_scores(shape, nnx.to_pure_dict(params), tokens, value_only=True)
        return logits(nnx.merge(graph, params, rest), tokens[None])[0]

    def loss(params, rest, tokens, mask):
        total = 0.0
        says = scores(params, rest, tokens)
        for t in range(len(tokens) - 1):
            total += mask[t] * (jax.nn.logsumexp(says[t]) - says[t, tokens[t + 1]])
        return total

    def step(params, rest, tokens, mask):
        kind = jax.tree_util.tree_map_with_path(
            lambda path, _: "still" if named(path) & set(frozen) else "trained", params
        )
        rule = optax.multi_transform(
            {"trained": optax.sgd(rate), "still": optax.set_to_zero()}, kind
        )
        gradient = jax.grad(loss)(params, rest, tokens, mask)
        change, _ = rule.update(gradient, rule.init(params), params)
        return optax.apply_updates(params, change)

    return jax.jit(scores), jax.jit(step)


def reference(model, tokens, masks, *, steps=1, rate, frozen=FROZEN, value_only=False):
    """SGD on every sequence by itself, in float64.

    `frozen` has names of parameters that are not trained.
    """
    with jax.enable_x64(True):
        model, shape = cast(model, "float64"), check_auxiliary(model)
        graph, params, rest = nnx.split(model, nnx.Param, ...)
        says, step = compiled(graph, shape, rate, tuple(frozen), value_only)
        found = []
        for sequence, mask in zip(jnp.asarray(tokens), jnp.asarray(masks, float), strict=True):
            now = params
            for _ in range(steps):
                now = step(now, rest, sequence, mask)
            found.append(
                (
                    says(params, rest, sequence),
                    says(now, rest, sequence),
                    names(nnx.to_pure_dict(now)),
                )
            )
        before, after, updated = zip(*found, strict=True)
        return Reference(
            np.stack(before),
            np.stack(after),
            {name: np.stack([one[name] for one in updated]) for name in updated[0]},
        )


def small(width=4, hidden=8, layers=1):
    size = {"positions": TIME, "layers": layers, "heads": 2, "width": width, "hidden": hidden}
    return moved(decoder(5, **size), std=0.5)


def simulate(tint, tokens=TEXTS, masks=TRAINED, model=None):
    return jax.device_get(tint.run(model, jnp.asarray(tokens), jnp.asarray(masks)))


def flat(updated, start):
    """All changes of a sequence in one vector, `[batch, number]`."""
    changes = {name: after - names(parameters(start))[name] for name, after in updated.items()}
    return np.concatenate([c.reshape(len(c), -1) for c in changes.values()], 1)


def updated(outcome):
    return names(nnx.to_pure_dict(outcome.updated))
