"""Contrastive features: the loss against its matrix form, eigenvalues against closed forms."""

from itertools import combinations

import numpy as np
import pytest

from constructions.kernel_descent.contrastive import Cube, measure, trained

DISJOINT, OVERLAPPING = Cube(), Cube(flips=(0.05, 0.25))


def whitened(features):
    """F, so that |A - F F^T|^2 is the loss up to |A|^2: every point is as probable as another."""
    return features / np.sqrt(len(features))


@pytest.mark.parametrize("cube", [DISJOINT, OVERLAPPING], ids=["disjoint", "overlapping"])
def test_the_loss_is_a_factorisation_of_the_matrix_of_positive_pairs(cube):
    features = np.random.default_rng(0).standard_normal((len(cube.points), 3))
    f, a = whitened(features), cube.adjacency
    wanted = ((a - f @ f.T) ** 2).sum() - (a**2).sum()
    assert abs(cube.loss(features) - wanted) < 1e-10 * abs(wanted)
    pairs = cube.chance.T @ cube.chance / len(cube.inputs)  # by its definition, over all pairs
    inner = features @ features.T
    assert abs(-2 * (pairs * inner).sum() + (inner**2).mean() - wanted) < 1e-10 * abs(wanted)


def test_every_rotation_of_disjoint_augmentations_is_optimal_and_accuracy_is_anything():
    accuracies = []
    for angle in np.linspace(0, np.pi / 2, 7):
        features = DISJOINT.rotated(angle)
        assert abs(DISJOINT.loss(features) + 3) < 1e-10  # the three largest eigenvalues are 1
        accuracies.append(DISJOINT.accuracy(features))
    assert accuracies[0] == 1.0 and accuracies[-1] == 0.5
    assert np.diff(accuracies).max() <= 0
    rng = np.random.default_rng(1)
    values = np.sort(np.linalg.eigvalsh(DISJOINT.adjacency))[::-1]
    np.testing.assert_allclose(values, [1.0] * 128 + [0.0] * 128, atol=1e-10)
    turned = DISJOINT.rotated(0.0) @ np.linalg.qr(rng.standard_normal((3, 3)))[0]
    assert abs(DISJOINT.loss(turned) + 3) < 1e-10 and DISJOINT.accuracy(turned) == 1.0
    assert DISJOINT.loss(1.1 * turned) > -2.99  # a scale is not free


def test_eigenvalues_of_overlapping_augmentations_are_those_of_characters():
    each = np.array([0.9] * 3 + [0.5] * 4) ** 2
    wanted = [each[list(s)].prod() for k in range(8) for s in combinations(range(7), k)]
    values, vectors = np.linalg.eigh(OVERLAPPING.adjacency)
    np.testing.assert_allclose(values[-128:], np.sort(wanted), atol=1e-10)
    np.testing.assert_allclose(values[:128], 0, atol=1e-10)
    top = vectors[:, -4:] * np.sqrt(values[-4:] * len(vectors))
    for seed in range(5):  # what is optimal tells the label, however it is turned
        turn = np.linalg.qr(np.random.default_rng(seed).standard_normal((4, 4)))[0]
        assert abs(OVERLAPPING.loss(top @ turn) + (values[-4:] ** 2).sum()) < 1e-10
        assert OVERLAPPING.accuracy(top @ turn) == 1.0
    assert OVERLAPPING.gaps()[0] == pytest.approx(1 - 0.9**4, abs=1e-10)


def test_the_bound_is_vacuous_but_for_linear_functions():
    every, linear = DISJOINT.gaps()
    assert abs(every) < 1e-10
    scale = np.array([1, 1 / 3])
    assert linear == pytest.approx(1 - scale.mean() ** 2 / (scale**2).mean(), abs=1e-10)


def test_rows_that_theory_gives():
    found = list(measure(quick=True))
    assert [row.verdict for row in found] == ["reproduced"] * 2


@pytest.mark.slow
def test_trained_encoders_of_equal_loss():
    found = {
        (cube.features, hidden): trained(cube, hidden, range(5))
        for cube, hidden in ((DISJOINT, None), (DISJOINT, 256), (OVERLAPPING, 256))
    }
    for (features, _), (losses, _) in found.items():
        least = -3 if features == 3 else -1 - 3 * 0.81**2
        assert (losses - least).max() < 2e-3
    assert (found[3, None][1] == 1).all() and (found[4, 256][1] == 1).all()
    assert found[3, 256][1].mean() < 0.95


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"content": 2}, "content is 2"),
        ({"style": 0}, "style 0"),
        ({"flips": (0.0, 1.0)}, "flips"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Cube(**settings)
