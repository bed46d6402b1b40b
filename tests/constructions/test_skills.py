"""Composition of skills: matrix products by hand, memorisers by counting, texts by simulation."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from constructions.claims import predict
from constructions.skills.construction import SkillComposition, measure
from probes.ledger import ledger
from synthetic.tasks.skills import SkillTask, known

C = SkillComposition(dim=3, skills=6, slots=4)
PAIRS = SkillComposition()


def test_composition_is_exact_in_every_type():
    rng = np.random.default_rng(0)
    state = rng.choice([-1.0, 1.0], (64, 3)).astype(np.float32)
    text = rng.integers(0, 7, (64, 4)).astype(np.int32)
    found = np.asarray(C.predict(C.compile().model, state, text))
    maps = C.task.maps
    for x, words, y in zip(state, text, found, strict=True):
        for word in words:
            x = maps[word] @ x
        np.testing.assert_array_equal(y, x)


def test_maps_are_different_affine_maps_of_bits():
    maps = C.task.maps
    assert len({m.tobytes() for m in maps}) == 7
    assert (np.abs(maps).sum(1) == 1).all() and (np.abs(maps).sum(2) == 1).all()
    bits = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0]])
    for m in maps:
        after = ((1 - 2 * bits) @ m.T < 0).astype(int)
        assert ((after[0] + after[1] + after[2] + after[3]) % 2 == 0).all()  # f affine over GF(2)


def test_texts_name_so_many_skills_anywhere_and_only_the_tuples_asked_for():
    for which in ("shown", "held out"):
        task = replace(C.task, which=which)
        state, text = map(np.asarray, task.sample(jax.random.key(0), 4096).inputs)
        names = text < 6
        assert (names.sum(1) == 2).all()
        assert np.abs(names.mean(0) - 0.5).max() < 0.04 and np.abs(state.mean(0)).max() < 0.06
        pairs = np.array([row[own] for row, own in zip(text, names, strict=True)])
        drawn = np.unique(pairs @ [6, 1])
        np.testing.assert_array_equal(drawn, np.flatnonzero(task.is_shown == (which == "shown")))


def test_accuracy_by_heart_is_what_was_shown_and_chance():
    for shown in (0.0, 0.5, 1.0):
        task = replace(C.task, shown=shown)
        batch = task.sample(jax.random.key(1), 2**14)
        right = np.asarray(task.accuracy(task.by_heart(*batch.inputs), batch), float)
        guesses = (1 - shown) / 8 * 7 / 8 / (8 * 36 * 6)  # a table of so many cells is itself drawn
        error = np.sqrt(right.var() / 2**14 + guesses)
        assert abs(right.mean() - task.known_by_heart) <= 2 * error
    longer = replace(C.task, named=3).sample(jax.random.key(2), 2**14)
    right = np.asarray(C.task.accuracy(C.task.by_heart(*longer.inputs), longer), float)
    assert abs(right.mean() - 1 / 8) < 3 * np.sqrt(7 / 64) * (2**-7 + (8 * 216 * 4) ** -0.5)
    state, text = longer.inputs
    again = C.task.by_heart(state[:9], text[:9])
    np.testing.assert_array_equal(again, C.task.by_heart(state[:9], text[:9]))


@pytest.mark.parametrize(("named", "texts"), [(1, 10), (2, 6), (3, 4)])
def test_what_is_known_after_some_texts(named, texts):
    rng, runs = np.random.default_rng(3), 20_000
    draws = rng.permuted(np.broadcast_to(np.arange(8), (runs, texts, 8)), axis=-1)[..., :named]
    met = np.array([(draws == skill).any((1, 2)) for skill in range(8)]).T
    for wanted in (1, 2, 4):
        share = met[:, :wanted].all(1).mean()
        exact = known(8, named, texts, wanted)
        assert abs(share - exact) < 3 * np.sqrt(exact * (1 - exact) / runs)


def test_loops_carry_the_state_one_word_further():
    """Without the layer's copy, words would see nothing: token t is right from loop t on."""
    state, text = C.sample(jax.random.key(4), 8)
    stream = C.stream(C.compile().model, state, text)
    _, sites = C.compile().model.run(stream.values, stream.groups, sites=("residual",))
    value = C.program.slots["value"].columns
    wanted = C.task.states(state, text)
    for t in range(5):
        for loop in range(t, 5):
            np.testing.assert_array_equal(sites["residual"][loop][:, t, value], wanted[:, t])


def test_claims_catch_what_does_not_compose():
    rows = {row.claim.name: row for row in ledger(PAIRS, batch=2048)}
    assert all(row.verdict == "holds" for row in rows.values()) and len(rows) == 3
    for name in ("pairs never shown", "quadruples, two by two", "quadruples at once"):
        values = rows[name].values
        assert values["construction"] == 1 and values["random table"] < 0.1
    # two pairs by heart are right where both were shown, or by chance
    both = PAIRS.task.known_by_heart**2
    assert abs(rows["quadruples, two by two"].values["by heart"] - both) < 0.05
    (row,) = measure(quick=True)
    assert row.verdict == "reproduced"


def test_predict_of_another_shape_and_bad_settings_are_named():
    with pytest.raises(ValueError, match="text"):
        C.predict(C.compile().model, jnp.ones((1, 3)), jnp.zeros((1, 3), int))
    with pytest.raises(ValueError, match="7"):
        C.predict(C.compile().model, jnp.ones((1, 3)), jnp.full((1, 4), 7))
    for settings, message in (
        ({"named": 5}, "named is 5, must be at most slots=2"),
        ({"skills": 48, "dim": 3}, "skills is 48, must be at most 47"),
        ({"dim": 0}, "dim is 0"),
        ({"shown": 2.0}, "shown is 2.0"),
    ):
        with pytest.raises(ValueError, match=message):
            SkillComposition(**settings)
    with pytest.raises(ValueError, match="no tuple is shown"):
        SkillTask(shown=0.0, which="shown")
    assert predict(C, C.compile().model, *C.sample(jax.random.key(0), 2)).shape == (2, 3)
