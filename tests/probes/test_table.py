import json

import jax
import numpy as np
import pytest

from constructions.core.transformer import randomise
from constructions.gradient_descent.construction import GradientDescent
from probes.linear import CONTROLS, _blocks, probe_table
from probes.subject import read_sites

KEY = jax.random.key(0)


def gd(**settings):
    settings = {"dim_x": 4, "num_examples": 6, "steps": 2, "step_size": 4.0} | settings
    return GradientDescent(**settings)


def test_the_construction_holds_its_values_and_controls_do_not():
    c = gd()
    model = c.compile().model
    noise = randomise(model, jax.random.key(1), 0.02)
    table = probe_table(c, {"untrained": noise, "itself": model}, KEY)
    assert table.columns == ("untrained", "itself", *CONTROLS)
    row = {name: dict(zip(table.columns, values, strict=True))
           for name, values in zip(table.names, table.values, strict=True)}  # fmt: skip
    layer = {name: dict(zip(table.columns, values, strict=True))
             for name, values in zip(table.names, table.layers, strict=True)}  # fmt: skip
    assert set(row) == {
        "weight, step 1, pooled",
        "weight, step 2, pooled",
        *(f"residual, step {k}, context" for k in range(3)),
        "estimate, step 1, query",
        "estimate, step 2, query",
        "inputs, step 0, context+query",
        "prediction, step 2, query",
    }
    assert table.constant == ("weight, step 0, pooled", "estimate, step 0, query")
    for k in (1, 2):
        own = row[f"estimate, step {k}, query"]
        assert own["construction"] > 0.999 and own["itself"] == own["construction"]
        # random attention finds a little of y x^T, by luck
        assert own["input-only"] < 0.1 and own["random init"] < 0.5 and own["untrained"] < 0.5
        assert layer[f"estimate, step {k}, query"]["construction"] == k
        context = row[f"residual, step {k}, context"]
        assert context["construction"] > 0.999
        # y itself explains most of what is left of it: no merit of a model
        assert 0.2 < context["input-only"] < 0.98
        assert row[f"weight, step {k}, pooled"]["construction"] < 0.2
    assert all(values["control task"] < 0.1 for values in row.values())
    matrix = table.by_layer["construction"][table.names.index("estimate, step 1, query")]
    assert matrix[0] < 0.1 and matrix[1] > 0.999
    text = table.markdown()
    assert len(text.splitlines()) == 2 + len(row) and "input-only" in text
    assert json.loads(json.dumps(table.to_json()))["columns"] == list(table.columns)


def test_a_model_trained_elsewhere_is_a_function_to_named_activations():
    c = gd(steps=1)
    model = c.compile().model
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(9, 9)))[0][:, :5]

    def elsewhere(*inputs):
        """The construction in another basis of a wider stream, without its first layer."""
        return {"hidden": read_sites(c, model, inputs)["residual"][1:] @ turn.T}

    def residual(*inputs):
        return {"residual": elsewhere(*inputs)["hidden"]}

    table = probe_table(c, {"theirs": residual}, KEY, names=("estimate",), batch=200)
    assert table.names == ("estimate, step 1, query",)
    assert table.values[0, 0] > 0.999 and table.values[0, 1] > 0.999
    assert table.values[0, -1] < 0.2
    assert table.by_layer["theirs"].shape == (1, 1)
    with pytest.raises(ValueError, match=r"activations of 'theirs' hold \['hidden'\]"):
        probe_table(c, {"theirs": elsewhere}, KEY)


def test_values_owned_by_positions_are_grouped_by_column():
    """A span variable (i, j) kept at token j in column j - i: each column has its own owners."""
    spans = [(i, j) for i in range(3) for j in range(i, 3)]
    token, column = np.array([j for _, j in spans]), np.array([j - i for i, j in spans])
    found = dict(_blocks(np.arange(6), token, column))
    assert {tokens: [spans[e] for e in entries.ravel()] for tokens, entries in found.items()} == {
        (0, 1, 2): [(0, 0), (1, 1), (2, 2)],
        (1, 2): [(0, 1), (1, 2)],
        (2,): [(0, 2)],
    }


def test_bad_arguments():
    c = gd()
    model = c.compile().model
    with pytest.raises(ValueError, match="unknown value 'slope'"):
        probe_table(c, {"trained": model}, KEY, names=("slope",), batch=50)
    with pytest.raises(ValueError, match="and none of"):
        probe_table(c, {"construction": model}, KEY)
    with pytest.raises(ValueError, match="must be some"):
        probe_table(c, {}, KEY)
