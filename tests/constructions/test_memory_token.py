"""One memory token before a frozen layer: its closed form and what it leaves alone."""

import numpy as np
import pytest

from constructions.gradient_descent.construction import GradientDescent
from constructions.gradient_descent.memory_token import MemoryToken
from constructions.runs import Run
from probes import find
from probes.ledger import ledger

SETTINGS = (
    {"dim_x": 3, "num_examples": 6, "shift": (1.0, -2.0, 0.5), "noise": 0.3},
    {
        "dim_x": 2,
        "num_examples": 5,
        "inputs": {"gaussian": [[1.0, 0.4], [0.4, 0.5]]},
        "shift": 0.7,
    },
)


@pytest.mark.parametrize("settings", SETTINGS)
def test_token_and_losses_are_those_of_a_regression_on_samples(settings):
    """The best b by least squares on contexts drawn with numpy, and the losses of both."""
    c = MemoryToken(**settings)
    rng, tasks = np.random.default_rng(0), 400_000
    n, d, shift = c.num_examples, c.dim_x, np.asarray(c.shift)
    if "inputs" in settings:
        root = np.linalg.cholesky(settings["inputs"]["gaussian"])
        x = rng.normal(size=(tasks, n, d)) @ root.T
        covariance = root @ root.T
    else:
        x, covariance = rng.uniform(-0.5, 0.5, (tasks, n, d)), np.eye(d) / 12
    for mean, name in ((0 * shift, "old"), (shift, "without")):
        w = mean + rng.normal(size=(tasks, d))
        y = np.einsum("tni,ti->tn", x, w) + c.noise * rng.normal(size=(tasks, n))
        error = w - c.rate * np.einsum("tni,tn->ti", x, y)
        losses = 0.5 * np.einsum("ti,ij,tj->t", error, covariance, error)
        spread = 4 * losses.std() / np.sqrt(tasks)
        np.testing.assert_allclose(losses.mean(), c.losses[name], atol=spread)
    spread = 5 * error.std(0).max() / np.sqrt(tasks)
    np.testing.assert_allclose(error.mean(0), c.bias, atol=spread)
    error -= c.bias
    losses = 0.5 * np.einsum("ti,ij,tj->t", error, covariance, error)
    spread = 4 * losses.std() / np.sqrt(tasks)
    np.testing.assert_allclose(losses.mean(), c.losses["new"], atol=spread)


def test_shrinkage_is_that_of_the_note():
    """b = (1 - c N v) w0, and the loss .466 that falls to .338 of a larger w0."""
    c = MemoryToken(shift=np.sqrt(1.26))
    np.testing.assert_allclose(c.bias, (1 - c.rate * 10 / 12) * np.asarray(c.shift))
    np.testing.assert_allclose([c.losses["without"], c.losses["new"]], [0.466, 0.338], atol=2e-3)


def test_tuned_token_alone_and_its_controls():
    """Two seeds in a short fit; weights are frozen to the bit, and so are old outputs."""
    c = MemoryToken(dim_x=4, num_examples=8, shift=1.0)
    fit = c.fit(seeds=[0, 1], steps=300, batch=128, chunk=300)
    for model in fit.models:
        for ours, theirs in zip(model.parts(), c.reference.parts(), strict=True):
            moved = [k for k, a in ours.weights.items() if not np.array_equal(a, theirs.weights[k])]
            assert moved == (["output"] if ours.kind == "mlp" else [])
    rows = {row.claim.name: row for row in ledger(c, fit.models, batch=2**13)}
    assert {row.verdict for row in rows.values()} == {"holds"}
    assert rows["old outputs"].trained == (0.0, 0.0)
    assert rows["old outputs"].values["seen by old queries"] > 0.1
    assert rows["least loss of new tasks"].values["no token"] > 0.1
    unit = np.eye(c.dim_x, dtype=np.float32)[:, None]
    x, y = np.zeros((4, 8, 4), np.float32), np.zeros((4, 8, 1), np.float32)
    for model in fit.models:  # what it stands for, read off predictions without a context
        b = np.asarray(c.predict(model, x, y, unit, np.ones(4, bool)))[:, 0, 0]
        assert np.linalg.norm(b - c.bias) < 0.1 * np.linalg.norm(c.bias)


def test_no_scale_of_the_output_helps():
    """The frozen step is the best one for new tasks as well, and far from what the token does."""
    c, rng = MemoryToken(dim_x=3, num_examples=6), np.random.default_rng(1)
    x = rng.uniform(-0.5, 0.5, (200_000, 6, 3))
    w = np.asarray(c.shift) + rng.normal(size=(len(x), 3))
    step = c.rate * np.einsum("tni,tnj,tj->ti", x, x, w)
    best = (step * w).sum() / (step**2).sum()
    assert abs(best - 1) < 0.01
    assert ((best * step - w) ** 2).sum(-1).mean() / 24 > 1.1 * c.losses["new"]


@pytest.mark.parametrize(
    ("shift", "said"), [((1.0, 2.0), "shift is"), (np.nan, "shift is"), (0.0, "shift is 0")]
)
def test_refused(shift, said):
    with pytest.raises(ValueError, match=said):
        MemoryToken(dim_x=3, shift=shift)


def test_weights_are_drawn_of_the_first_layer_with_heads():
    """Layer 1 of the construction is an MLP alone, so that layer 2 is the one to look at."""
    c = MemoryToken(dim_x=2, num_examples=3)
    shown = find("weights")(Run("memory-token", {}, c, (c.reference,), (0,), [], None), 0).data
    assert all("layer 2" in panel.title for panel in shown)
    values = dict(zip((p.title.split(" of")[0] for p in shown), shown, strict=True))
    # both heads write -c y_j (x_i . x_j)
    expected = np.diag([0.0, 0.0, -2 * c.rate])
    np.testing.assert_allclose(values["P W_V"].construction, expected, atol=1e-6)


def test_what_is_multiplied_by_zero_is_not_read():
    """The value W_0 x - y of gradient descent from 0 reads y alone."""
    for start, read in ((None, {"y"}), (np.ones((1, 2)), {"x", "y"})):
        program = GradientDescent(dim_x=2, step_size=0.1, init_weight=start).program
        (head,) = program.layers[0].single_heads
        assert {slot.name for part, slot, _ in head.reads() if part == "value"} == read
