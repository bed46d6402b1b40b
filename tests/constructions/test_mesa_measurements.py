"""Published numbers and statistics of the mesa family: reproduced, and recomputed by hand."""

import jax
import numpy as np
import pytest

from constructions.claims import Evidence
from constructions.measurement import parted
from constructions.mesa import measurements, trained
from constructions.mesa.paper import compression_gap, position_gap, rotation_gap
from constructions.mesa.polynomial import MesaPolynomial
from constructions.mesa.ridge import MesaRidge
from constructions.mesa.trained import LOWEST, distances
from synthetic.tasks.dynamics import LinearDynamics


@pytest.mark.parametrize("measure", [measurements.measure, trained.measure], ids=["task", "depth"])
def test_quick_rows_are_finite_and_what_was_published_is_reproduced(measure):
    rows = list(measure(quick=True))
    names = [row.name for row in rows]
    assert len(rows) > 3 and len(set(names)) == len(names) and all(names)
    assert all(np.isfinite([row.measured, row.error]).all() and row.error >= 0 for row in rows)
    verdicts = {row.name: row.verdict for row in parted(rows)[0]}
    assert set(verdicts.values()) <= {"reproduced", "holds"}, verdicts
    assert not jax.config.jax_enable_x64


def sums(sequence):
    """G_t and H_t of one sequence, `[time, dim, dim]` each, pair by pair."""
    before = np.concatenate([np.zeros((1, sequence.shape[1])), sequence[:-1]])
    gram, moment = np.zeros((2, sequence.shape[1], sequence.shape[1]))
    found = []
    for s, z in zip(sequence, before, strict=True):
        gram, moment = gram + np.outer(z, z), moment + np.outer(s, z)
        found.append((moment, gram))
    return map(np.stack, zip(*found, strict=True))


def one_step(states):
    """G_t s_t, and H at the end."""
    found = [(moment @ s[..., None], gram[-1]) for s in states for moment, gram in [sums(s)]]
    return np.stack([f[0][..., 0] for f in found]), np.stack([f[1] for f in found])


def test_distances_of_one_layer_by_hand(x64):
    task, rho, key = LinearDynamics(3, 6, 0.05), 0.01, jax.random.key(2)
    found = {kind: far for kind, _, far in distances(task, (1,), rho, key, batch=9)}
    fitted, examined = (task.sample(k, 9) for k in jax.random.split(key))
    states, fit_states = (np.asarray(b.inputs[0]) for b in (examined, fitted))
    step, last = one_step(states)
    highest = max(np.linalg.eigvalsh(gram).max() for gram in last)
    fit_step, target = one_step(fit_states)[0], np.asarray(fitted.target)
    sizes = {
        "Neumann": 1 / highest,
        "Chebyshev": 2 / (LOWEST + highest),  # least max |1 - size h| in between
        "best": (fit_step * target).sum() / (fit_step**2).sum(),
    }
    assert found.keys() == sizes.keys()
    ridge = np.zeros_like(states)
    for b, sequence in enumerate(states):
        for t, (moment, gram, s) in enumerate(zip(*sums(sequence), sequence, strict=True)):
            ridge[b, t] = moment @ np.linalg.inv(gram + rho * np.eye(3)) @ s
    for kind, size in sizes.items():
        far = np.linalg.norm(size * step - ridge, axis=2)[:, 1:]
        expected = np.median(far / np.linalg.norm(ridge, axis=2)[:, 1:], axis=0)
        np.testing.assert_allclose(found[kind], np.append(0, expected), rtol=1e-9)


def evidence(model, batch=33):
    """About a step of .2 in 3 dimensions; its states, and the step's predictions by hand."""
    c = MesaPolynomial(3, 6, tokens="constructed", coefficients=(0.2,))
    examples = c.task.sample(jax.random.key(1), batch)
    one = Evidence(c, model(c), c.compile().model, examples, jax.random.key(5))
    states = np.asarray(examples.inputs[0])
    return one, states, 0.2 * one_step(states)[0]


def losses(prediction, one):
    return np.square(prediction - np.asarray(one.examples.target)).sum(2) / 2


def test_gap_by_position_by_hand(x64):
    one, _, step = evidence(lambda c: c.near_misses()["step size + 20 %"].model)
    each = [np.median(losses(size * step, one), axis=0) for size in (1.2, 1)]
    assert position_gap(one) == pytest.approx(np.abs(each[0] / each[1] - 1).max(), rel=1e-9)


def test_gap_of_rotations_by_hand(x64):
    assert rotation_gap(evidence(lambda c: c.compile().model)[0]) < 1e-12
    one, states, _ = evidence(lambda c: c.one_law().model)
    law, turn = (np.asarray(jax.random.orthogonal(k, 3)) for k in (jax.random.key(0), one.key))
    expected = np.linalg.norm(states @ turn @ law.T - states @ law.T @ turn)
    expected /= np.linalg.norm(states)
    assert rotation_gap(one) == pytest.approx(expected, rel=1e-9)


def test_gap_of_the_compressed_expression_by_hand(x64):
    assert compression_gap(evidence(lambda c: c.compile().model)[0]) < 1e-12
    one, _, step = evidence(lambda c: c.near_misses()["values turned"].model)
    turn = np.asarray(jax.random.orthogonal(jax.random.key(0), 3))
    own, few = (losses(p, one).mean() for p in (step @ turn.T, np.trace(turn) / 3 * step))
    assert compression_gap(one) == pytest.approx(abs(few / own - 1), rel=1e-9)
    with pytest.raises(TypeError):
        compression_gap(evidence(lambda c: MesaRidge(3, 6).compile().model)[0])
