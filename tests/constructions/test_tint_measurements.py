"""TinT's measurements: by hand, by differences of the loss, and by autograd of a decoder apart."""

from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tint_oracle import (
    MASKS,
    POSITIONS,
    TOKENS,
    WORDS,
    cast,
    moved,
    parameters,
    plain_scores,
    reference,
)

from constructions.core.transformer import Transformer, randomise
from constructions.interchange.decoder import decoder, logits
from constructions.tint.algorithm import Backward, decode
from constructions.tint.construction import Tint
from constructions.tint.experiments import fitted, hardness, label_accuracy
from constructions.tint.measurements import (
    ABLATION,
    UpdateError,
    ablation,
    adaptation,
    by_matrix,
    gradient_update,
    mean,
    public_update,
    simulated_update,
    update_error,
)
from synthetic.fitting.recipe import Recipe
from synthetic.tasks.adaptation import WordLabels
from synthetic.tasks.task import Batch

TRAIN = jnp.asarray(MASKS)
SHAPES = {"query": (2, 3, 4), "gain": (5, 3)}


@lru_cache
def model(layers=1, width=4):
    """A decoder of two heads, in float64."""
    with jax.enable_x64(True):
        untrained = decoder(
            WORDS, positions=POSITIONS, layers=layers, heads=2, width=width, hidden=8, eps=1e-3
        )
        return cast(moved(untrained, 0.8), "float64")


@partial(jax.jit, static_argnums=1)
def scores(arrays, config, tokens):
    return logits(Transformer(config, arrays), tokens)


def total(w, c, tokens, mask):
    """Summed loss, from the auxiliary model itself."""
    arrays = c.auxiliary.arrays()
    layer = arrays["segments"][0]["layers"][0]
    heads, mlp = dict(layer["heads"][0]), layer["mlp"]
    for name in ("query", "key"):
        heads[name] = w[name][..., :-1].reshape(heads[name].shape)
        heads[f"{name}_bias"] = w[name][..., -1].reshape(heads[f"{name}_bias"].shape)
    mlp = {**mlp, "hidden": w["hidden"][..., :-1], "hidden_bias": w["hidden"][..., -1]}
    norm = {**layer["norm"], "gain": w["gain"][:-1].reshape(-1, 2, w["gain"].shape[1])[:, 0]}
    layer = {**layer, "heads": {0: heads}, "mlp": mlp, "norm": norm}
    arrays = {**arrays, "segments": {0: {"layers": {0: layer}}}}
    says = np.asarray(scores(arrays, c.auxiliary.config, jnp.asarray(tokens)[None])[0])
    logs = says - np.log(np.exp(says).sum(-1, keepdims=True))
    return -sum(mask[t] * logs[t, tokens[t + 1]] for t in range(len(tokens) - 1))


def test_downhill_is_minus_the_slope_of_the_loss_by_differences(x64):
    c = Tint(model())
    found = gradient_update(c.weights, jnp.asarray(TOKENS), TRAIN, c.shape)
    for name, place in (
        ("query", (0, 1, 2)),
        ("key", (0, 2, 1)),
        ("hidden", (0, 3, 4)),
        ("gain", (0, 1)),
    ):
        sides = []
        for step in (1e-5, -1e-5):
            w = {**c.weights, name: c.weights[name].at[place].add(step)}
            sides.append(total(w, c, TOKENS[1], MASKS[1]))
        slope = (sides[0] - sides[1]) / 2e-5
        assert abs(slope) > 1e-4
        np.testing.assert_allclose(found[name][1][place], -slope, rtol=1e-6)


def test_fidelity_by_hand():
    rng = np.random.default_rng(0)
    found, wanted = ({n: rng.normal(size=(4, *s)) for n, s in SHAPES.items()} for _ in range(2))
    got = update_error(found, wanted, tuple(SHAPES))
    for n in range(4):
        w, g = (np.concatenate([a[n].ravel() for a in x.values()]) for x in (found, wanted))
        np.testing.assert_allclose(got.cosine[n], w @ g / np.sqrt(w @ w * (g @ g)))
        np.testing.assert_allclose(got.relative[n], np.sqrt(((w - g) ** 2).sum() / (g @ g)))
    alone = update_error(found, wanted, ("gain",))
    assert not np.allclose(alone.cosine, got.cosine)
    nothing = update_error({n: 0 * a for n, a in wanted.items()}, wanted, tuple(SHAPES))
    assert (nothing.cosine == 0).all() and np.allclose(nothing.relative, 1)


def test_mean_and_its_standard_error_by_hand():
    # 1, 2, 6: squared distances from 3 sum to 14, s^2 = 7
    assert mean([1.0, 2.0, 6.0]) == pytest.approx((3.0, np.sqrt(7 / 3)))


@lru_cache
def table():
    with jax.enable_x64(True):
        ways = ("none", "value-only attention", "gains not trained")
        chosen = {way: ABLATION[way] for way in ways}
        c, tokens = Tint(model(), "exact", learning_rate=1.0), jnp.asarray(TOKENS)
        weights = {"one": c.weights, "half": {n: 0.5 * a for n, a in c.weights.items()}}
        return ablation(model(), tokens, TRAIN, weights, chosen), weights, c


def test_frozen_gains_cost_their_share_of_the_gradient():
    found, weights, c = table()
    with jax.enable_x64(True):
        for name, w in weights.items():
            slope = gradient_update(w, jnp.asarray(TOKENS), TRAIN, c.shape)
            square = {n: np.square(np.asarray(a)).reshape(5, -1).sum(1) for n, a in slope.items()}
            trained = np.array([0, 1, 3, 4])  # the third sequence is not trained on
            lost = square["gain"][trained] / sum(square.values())[trained]
            got = found["gains not trained"][name]
            np.testing.assert_allclose(got.relative[trained], np.sqrt(lost), rtol=1e-8)
            np.testing.assert_allclose(got.cosine[trained], np.sqrt(1 - lost), rtol=1e-8)
            assert found["none"][name].relative.max() < 1e-10
            part = gradient_update(w, jnp.asarray(TOKENS), TRAIN, c.shape, True)
            wanted = update_error(part, slope)
            got = found["value-only attention"][name]
            np.testing.assert_allclose(got.relative, wanted.relative, rtol=1e-8)
            assert (got.relative[trained] > 1e-6).all()


def test_by_matrix_takes_layers_apart(x64):
    rng, c = np.random.default_rng(1), Tint(model())
    wanted = {
        n: np.asarray(a)
        for n, a in gradient_update(c.weights, jnp.asarray(TOKENS), TRAIN, c.shape).items()
    }
    found = {n: a + 0.1 * rng.normal(size=a.shape) for n, a in wanted.items()}
    parts = by_matrix(found, wanted)
    assert parts["gain"].cosine.shape == (3, 5) and parts["back"].relative.shape == (1, 5)
    w, g = found["offset"][3, 2], wanted["offset"][3, 2]
    assert isinstance(parts["offset"], UpdateError)
    np.testing.assert_allclose(parts["offset"].cosine[2, 3], w @ g / np.sqrt(w @ w * (g @ g)))
    np.testing.assert_allclose(
        parts["offset"].relative[2, 3], np.linalg.norm(w - g) / np.linalg.norm(g)
    )


def test_adaptation_scores_what_is_not_trained_on(x64):
    c = Tint(model(), Backward(attention="value-only"), 2, 0.1)
    rng = np.random.default_rng(3)
    tokens, target = (jnp.asarray(rng.integers(WORDS, size=(4, 6))) for _ in range(2))
    train = jnp.arange(6) < jnp.array([[1], [3], [4], [5]])
    found = adaptation(c, Batch((tokens, train), target))
    frozen = {
        n for name in ("embedding", "position", "query", "key") for n in (name, f"{name}_bias")
    }
    before, after, _ = reference(
        c.auxiliary, np.asarray(tokens), np.asarray(train), steps=2, rate=0.1, frozen=frozen
    )
    outcome = c.run(None, tokens, train)
    says = {"before": before, "descent": after, "simulated": outcome.logits_after}
    for name, wanted in says.items():
        logs = np.asarray(jax.nn.log_softmax(jnp.asarray(wanted)))
        chosen = np.take_along_axis(logs, np.asarray(target)[..., None], 2)[..., 0]
        losses = [-chosen[n, k:].mean() for n, k in enumerate((1, 3, 4, 5))]
        np.testing.assert_allclose(getattr(found, name), losses, rtol=1e-9)
    assert abs(found.simulated - found.descent).max() > 1e-6
    got = found.summary()["simulated less before"]
    assert got == mean(found.simulated - found.before)
    old, new = parameters(c.auxiliary)["final_norm"], outcome.updated["final_norm"]
    by = np.asarray(new["gain"][...] - old["gain"]) / 0.1
    np.testing.assert_allclose(simulated_update(c, tokens, train)["gain"][:, -1], by, atol=1e-9)


def watched(c, tokens, mask, on_queries, on_weights):
    """Summed loss with something added to queries and weights of attention; (queries, keys)."""
    kept, original = [], jnp.einsum

    def einsum(spec, *terms, **options):
        if spec == "hid,hjd->hij":
            terms = (terms[0] + on_queries[len(kept)], terms[1])
            kept.append(terms)
        elif spec == "hij,hjd,hcd->ic":
            terms = (terms[0] + on_weights[len(kept) - 1], *terms[1:])
        return original(spec, *terms, **options)

    jnp.einsum = einsum
    try:
        says = plain_scores(c.shape, parameters(c.auxiliary), tokens, False)
    finally:
        jnp.einsum = original
    logs = jax.nn.log_softmax(says)[jnp.arange(len(tokens) - 1), tokens[1:]]
    return -(logs * mask[:-1]).sum(), kept


def test_hardness_by_autograd_and_the_bound(x64):
    c = Tint(model(2, 4))
    tokens = jnp.asarray(TOKENS)
    found = hardness(c, tokens, TRAIN)
    assert found.softness.shape == (5, 2, 2, 7)
    zeros = jnp.zeros((2, 2, 7, 2)), jnp.zeros((2, 2, 7, 7))
    for n in range(5):

        def loss(on_queries, on_weights, n=n):
            return watched(c, tokens[n], TRAIN[n], on_queries, on_weights)

        (slope, says), kept = jax.grad(loss, (0, 1), has_aux=True)(*zeros)
        np.testing.assert_allclose(
            found.dropped[n], np.linalg.norm(slope, axis=-1), rtol=1e-8, atol=1e-14
        )
        for layer, (q, k) in enumerate(kept):
            scores = np.einsum("hid,hjd->hij", q, k) / np.sqrt(2)
            for i in range(7):
                a = np.exp(scores[:, i, : i + 1])
                eps = 1 - (a / a.sum(1, keepdims=True)).max(1)
                np.testing.assert_allclose(found.softness[n, layer, :, i], eps, atol=1e-12)
                spread = np.ptp(np.asarray(says[layer, :, i, : i + 1]), axis=1)
                longest = np.linalg.norm(k[:, : i + 1], axis=-1).max(1)
                wanted = 2 * eps * spread * longest / np.sqrt(2)
                np.testing.assert_allclose(found.bound[n, layer, :, i], wanted, atol=1e-12)
    assert (found.dropped <= found.bound * (1 + 1e-9) + 1e-14).all()
    # a bound that says something, and is 0 where there is one key or no gradient
    there = found.bound > 1e-9
    assert 0.2 < (found.dropped[there] / found.bound[there]).max() <= 1
    assert there.mean() > 0.3 and (found.bound[..., 0] == 0).all() and (found.bound[2] == 0).all()


def test_hardness_wants_an_exact_simulator():
    with pytest.raises(ValueError, match="attention is 'value-only', must be 'exact'"):
        hardness(Tint(model(), "paper"), jnp.asarray(TOKENS), TRAIN)


def test_answers_on_labelled_words():
    task = WordLabels(classes=2, words=2, demonstrations=3, usual=0.5)
    batch = task.sample(jax.random.key(1), 64)
    (tokens,), wanted = batch.inputs, np.asarray(batch.target[:, -1])
    c = Tint(moved(decoder(6, positions=7, layers=1, heads=2, width=4), 2.0, 3), "exact", 1, 0.5)
    found = label_accuracy(c, task, batch)

    def right(says):
        return np.asarray(says)[:, -1, task.labels].argmax(-1) + task.labels.start == wanted

    arrays, config = c.auxiliary.arrays(), c.auxiliary.config
    for name, seen in (("query alone", tokens[:, -1:]), ("in context", tokens)):
        np.testing.assert_array_equal(found[name], right(scores(arrays, config, seen)))
    mask = jnp.asarray(np.tile([1, 0, 1, 0, 1, 0, 0], (64, 1)) == 1)
    after = c.run(None, tokens, mask).logits_after
    np.testing.assert_array_equal(found["simulated"], right(after))
    np.testing.assert_array_equal(found["descent"], found["simulated"])
    np.testing.assert_array_equal(
        found["posterior"], np.asarray(task.posterior(tokens)).argmax(1) + 4 == wanted
    )
    assert len({tuple(a) for a in found.values()}) == 4  # descent and simulated are alike


@pytest.mark.slow
def test_fitted_learns_the_usual_labels():
    task = WordLabels(classes=2, words=2, demonstrations=3, usual=1.0)
    auxiliary = fitted(
        task, layers=1, heads=2, width=8, recipe=Recipe(steps=150, batch=64, learning_rate=2e-2)
    )
    batch = task.sample(jax.random.key(1), 64)
    says = np.asarray(logits(auxiliary, batch.inputs[0]))[:, ::2].argmax(-1)
    assert (says == batch.target[:, ::2]).mean() > 0.95


def test_defects_of_the_public_code_are_what_they_are_said_to_be(x64):
    """Without any the update is the simulator's; each defect against a sum or a loss of its own."""
    c = Tint(randomise(decoder(7, positions=6, layers=1, heads=2, width=4), jax.random.key(0), 0.5),
             Backward(attention="value-only"), learning_rate=1.0)  # fmt: skip
    tokens = jax.random.randint(jax.random.key(1), (2, 6), 0, 7)
    marked = jnp.array([[1, 0, 1, 1, 0, 1], [1, 1, 0, 0, 1, 0]], bool)

    def update(*defects, marked=marked):
        return public_update(c.weights, tokens, marked, c.shape, *defects)

    train = jnp.pad(marked[:, 1:], ((0, 0), (0, 1)))
    plain, simulated = update(), simulated_update(c, tokens, train)
    for name, change in plain.items():
        np.testing.assert_allclose(change, simulated[name], atol=1e-9, err_msg=name)
    bias = update("bias")["back"] / plain["back"]
    np.testing.assert_allclose(bias[..., -1], 4, rtol=1e-12)
    np.testing.assert_allclose(bias[..., :-1], 1, rtol=1e-12)

    @jax.jit
    def collected(of):  # by the tokens that collect, one at a time
        def loss(w, tokens, marked):
            logs = jax.nn.log_softmax(decode(w, tokens, c.shape, True, jnp.arange(6) == of)[:-1])
            chosen = jnp.take_along_axis(logs, tokens[1:, None], -1)[:, 0]
            return jnp.where(marked[1:], chosen, 0).sum()

        return jax.vmap(jax.grad(loss), (None, 0, 0))(c.weights, tokens, marked)

    each = [collected(t) for t in range(6)]
    for name, change in update("holes").items():
        axes = (slice(None), *[None] * (change.ndim - 1))
        wanted = sum(jnp.where(marked[:, t][axes], each[t][name], 0) for t in range(6))
        np.testing.assert_allclose(change, wanted, atol=1e-9, err_msg=name)
    scores = lambda w, tokens: jax.nn.logsumexp(decode(w, tokens, c.shape, True)[-1])  # noqa: E731
    last = jax.jit(jax.vmap(jax.grad(scores), (None, 0)))(c.weights, tokens)
    for name, change in update("last position").items():
        np.testing.assert_allclose(change, plain[name] - last[name], atol=1e-9, err_msg=name)
