"""Shares of slots in what heads read and write: the program's own, and the same in any basis."""

from typing import Any

import jax
import numpy as np
import pytest

from constructions.core.symmetry import change_key_basis, change_value_basis
from constructions.runs import Run, construct
from probes import find
from probes.paths import ROLES, agreement, lanes_of, paths, shares
from probes.probe import NotApplicable


def run_of(name: str, settings: dict[str, Any], *models: Any) -> Run:
    construction = construct(name, settings)
    given = models or (construction.reference,)
    return Run(name, settings, construction, given, tuple(range(len(given))), [], None)


def test_shares_of_a_construction_are_those_of_its_program() -> None:
    settings = {"dim_x": 2, "dim_y": 1, "num_examples": 3, "queries": 2}
    found = find("paths")(run_of("separate-tokens", settings), 0)
    program = construct("separate-tokens", settings).program
    heads = [(n + 1, head) for n, layer in enumerate(program.layers) for head in layer.single_heads]
    assert len(found.data.construction) == len(heads)
    for path, (layer, head) in zip(found.data.construction, heads, strict=True):
        assert path.layer == layer
        read = {role: {s.name for part, s, _ in head.reads() if part == role} for role in ROLES}
        read["write"] = {slot.name for slot in head.writes()}
        for role in ROLES:
            own = {lane for lane, share in path.shares[role].items() if share > 1e-9}
            assert own and own == read[role] & own
            assert sum(path.shares[role].values()) == pytest.approx(1)
    assert agreement(found.data, found.data.trained) == [pytest.approx(1)]
    assert agreement(found.data, [found.data.random])[0] < 0.8
    assert np.nansum(found.values, axis=1) == pytest.approx(1)


def test_shares_are_the_same_in_every_basis() -> None:
    construction = construct("separate-tokens", {"dim_x": 2, "num_examples": 3, "queries": 2})
    base = construction.in_trained_shape()
    model = construction.random_weights(0.5, base)(jax.random.key(1))
    first = paths(construction, model, construction.sample(jax.random.key(5), 8))[0].shares
    # every weight of the layer is drawn, and the buffer is empty before it
    for role, empty in (("query", True), ("key", True), ("value", True), ("write", False)):
        assert (first[role]["buffer"] < 1e-12) == empty
    other = change_value_basis(change_key_basis(model, jax.random.key(2)), jax.random.key(4))
    inputs = construction.sample(jax.random.key(3), 8)
    for one, two in zip(
        paths(construction, model, inputs), paths(construction, other, inputs), strict=True
    ):
        for role in ROLES:
            for lane, share in one.shares[role].items():
                assert two.shares[role][lane] == pytest.approx(share, abs=1e-5)


def test_a_layer_that_is_applied_again_has_its_own_heads() -> None:
    found = find("paths")(run_of("gd-plus-plus", {}), 0).data
    assert [(p.layer, p.head) for p in found.construction] == [(1, 0), (2, 0)]
    for path in found.construction:
        assert path.shares["key"]["x"] == path.shares["query"]["x"] == pytest.approx(1)
        assert 0 < path.shares["write"]["x"] < 1  # both curvature and gradient


def test_heads_that_look_by_biases_alone() -> None:
    found = find("paths")(run_of("skill-composition", {}), 0).data
    sizes = [path.size for path in found.construction if path.layer == 1]
    assert sum(sizes) == pytest.approx(1)
    assert not any(path.shares["query"].get("value") for path in found.construction)
    assert agreement(found, found.trained) == [pytest.approx(1)]
    assert 0 < agreement(found, [found.random])[0] < 0.8


def test_shares_by_hand() -> None:
    lanes = {"a": np.array([0]), "b": np.array([1, 2])}
    vectors = np.array([[0.6, 0.8], [0.8, -0.6], [0.0, 0.0]])
    found = shares(vectors, np.array([3.0, 1.0]), lanes)
    assert found == {"a": pytest.approx((3 * 0.36 + 0.64) / 4), "b": pytest.approx(0.57)}
    assert shares(vectors, np.array([3.0, 1.0]), {"a": lanes["a"]})[""] == pytest.approx(0.57)


def test_what_cannot_be_shown_is_said() -> None:
    assert len(lanes_of(construct("inside-outside"))) > 24
    with pytest.raises(NotApplicable, match="slots, paths shows at most 24"):
        find("paths")(run_of("inside-outside", {}), 0)
