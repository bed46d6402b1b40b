import jax
import jax.numpy as jnp
import numpy as np
import pytest

from constructions.core.transformer import SITES, Edit
from constructions.gradient_descent.construction import GradientDescent
from probes.subject import ablation, activations, place_mask, read_sites, site_axes, where


def gd():
    return GradientDescent(dim_x=3, dim_y=2, num_examples=5, steps=3, step_size=1.1)


def test_sites_obey_their_equations(x64):
    """residual + heads = middle = next residual, and attention times values gives the heads."""
    c = gd()
    model, inputs = c.compile().model, c.sample(jax.random.key(0), 4)
    found = read_sites(c, model, inputs, tuple(SITES))
    for site, array in found.items():
        sizes = site_axes(model.config, 6, site)
        assert array.shape == (sizes.pop("layer"), 4, *sizes.values())
    h = found["residual"]
    np.testing.assert_allclose(found["middle"], h[:-1] + found["head_output"].sum(3), atol=1e-14)
    np.testing.assert_allclose(h[1:], found["middle"], atol=1e-14)
    x, y = inputs[0], h[:-1, :, :5, 3:]  # value W_0 x - y with W_0 = 0, over the context
    scores = np.einsum("lbqi,bti->lbqt", h[:-1, ..., :3], x)
    np.testing.assert_allclose(found["attention"][:, :, 0, :, :5], scores, atol=1e-14)
    update = -1.1 / 5 * np.einsum("lbqt,lbto->lbqo", scores, y)
    np.testing.assert_allclose(found["head_output"][..., 0, 3:], update, atol=1e-14)


def test_where_marks_the_coordinates():
    config = gd().compile().model.config
    mask = where(config, 6, "residual", layer=2, token=[0, -1], width=slice(3, 5))
    assert mask.shape == (4, 1, 6, 5)
    expected = {(2, 0, t, w) for t in (0, 5) for w in (3, 4)}
    assert set(map(tuple, np.argwhere(mask).tolist())) == expected
    assert where(config, 6, "attention", key=3).shape == (1, 1, 1, 1, 6)
    assert where(config, 6, "head_output").all()
    with pytest.raises(ValueError, match=r"token is 6, must be within 0..5 at site 'residual'"):
        where(config, 6, "residual", token=6)
    with pytest.raises(ValueError, match="has axes"):
        where(config, 6, "residual", head=0)
    with pytest.raises(ValueError, match="unknown site 'stream'"):
        where(config, 6, "stream")


def test_an_edit_of_where_changes_what_is_read():
    c = gd()
    model, inputs = c.compile().model, c.sample(jax.random.key(0), 4)
    mask = where(model.config, 6, "residual", layer=1, token=2)
    stream, groups, _ = c.stream(model, *inputs)
    edits = {"residual": Edit(jnp.asarray(mask), jnp.full((1, 1, 1, 1), 7.0))}
    _, found = model.run(stream, groups, sites=("residual",), edits=edits)
    clean = read_sites(c, model, inputs)["residual"]
    changed = np.asarray(found["residual"] == 7).all(-1)
    assert np.argwhere(changed.all(1)).tolist() == [[1, 2]]
    np.testing.assert_array_equal(found["residual"][0], clean[0])
    assert np.abs(found["residual"][2] - clean[2]).max() > 0.1


def test_ablations():
    values = jax.random.normal(jax.random.key(0), (2, 9, 4))
    assert not ablation("zero", values).any()
    mean = ablation("mean", values)
    np.testing.assert_allclose(mean, np.broadcast_to(values.mean(1)[:, None], values.shape))
    for seed in range(20):
        other = ablation("resample", values, jax.random.key(seed))
        donor = [int(np.flatnonzero((values == row[:, None]).all((0, 2)))[0]) for row in
                 np.moveaxis(np.asarray(other), 1, 0)]  # fmt: skip
        assert sorted(donor) == list(range(9))
        assert all(d != i for i, d in enumerate(donor))
    with pytest.raises(ValueError, match="needs a key"):
        ablation("resample", values)
    with pytest.raises(ValueError, match="must be 'zero', 'mean' or 'resample'"):
        ablation("none", values)


def test_place_masks_cover_a_variable():
    c = gd()
    config = c.compile().model.config
    masks = place_mask(c, config, 6, c.sample(jax.random.key(0), 2), "residual")
    assert list(masks) == [0, 1, 2, 3]
    for layer, mask in masks.items():
        expected = {(layer, 0, t, w) for t in range(5) for w in (3, 4)}
        assert set(map(tuple, np.argwhere(mask).tolist())) == expected


def test_activations_of_ours_and_of_others():
    c = gd()
    model, inputs = c.compile().model, c.sample(jax.random.key(0), 2)
    ours = activations(c, model)(*inputs)
    np.testing.assert_array_equal(ours["residual"], read_sites(c, model, inputs)["residual"])
    assert activations(c, lambda *a: {"h": a[0]})(*inputs)["h"] is inputs[0]
