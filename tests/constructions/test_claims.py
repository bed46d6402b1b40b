"""What counts as reproduced, and what claims and near-misses are made of."""

import pytest

from constructions.claims import Claim, NearMiss
from constructions.gradient_descent.construction import GradientDescent
from constructions.measurement import LOCAL, Measurement, Remark, parted


def verdict(measured, published=2.0, **others):
    return Measurement("n", "s", "fig. 1", published, measured, **others).verdict


def test_verdicts():
    assert verdict(2.0) == verdict(2.059) == verdict(1.941) == "reproduced"  # 3 %
    assert verdict(2.07) == verdict(1.93) == "differs"
    assert verdict(2.07, error=0.01) == "reproduced"  # two standard errors more
    assert verdict(2.09, error=0.01) == "differs"
    assert verdict(1.5, better="<=") == "better"
    assert verdict(2.5, better="<=") == "differs"
    assert verdict(2.01, tolerance=0.0) == "differs"
    assert verdict(-2.05, published=-2.0) == "reproduced"
    assert verdict(float("nan")) == verdict(float("nan"), better="<=") == "differs"


def test_bounds_decide_by_two_standard_errors():
    at_most = dict(published=None, at_most=1.0)
    assert verdict(0.9, **at_most) == verdict(1.0, **at_most) == "holds"
    assert verdict(1.1, **at_most) == "refuted"
    assert verdict(0.9, error=0.04, **at_most) == "holds"
    assert verdict(0.9, error=0.06, **at_most) == verdict(1.1, error=0.06, **at_most) == "undecided"
    assert verdict(1.1, error=0.04, **at_most) == "refuted"
    assert verdict(-1.1, published=None, at_least=-1.0) == "refuted"
    both = dict(published=None, at_least=1.0, at_most=2.0)
    assert [verdict(v, error=0.1, **both) for v in (0.7, 0.9, 1.5, 1.9, 2.3)] == [
        "refuted", "undecided", "holds", "undecided", "refuted",
    ]  # fmt: skip
    assert verdict(float("nan"), **both) == "refuted"


def test_a_published_local_optimum_is_told_from_a_loss_that_is_merely_higher():
    lower = dict(better="<=", published=0.341, tolerance=0.1)
    assert verdict(0.2677, local=0.3413, **lower) == LOCAL
    assert verdict(0.2677, local=0.3888, **lower) == verdict(0.2677, **lower) == "better"
    assert verdict(0.34, local=0.3413, **lower) == "reproduced"
    assert verdict(0.45, local=0.341, **lower) == "differs"


@pytest.mark.parametrize("changes", [{}, {"published": 1.0, "at_least": 0.0}])
def test_what_nothing_decides_is_no_measurement(changes):
    fields = {"published": None} | changes
    with pytest.raises(ValueError, match="measurement 'n': published is .*that nothing decides"):
        Measurement("n", "s", "fig. 1", measured=1.0, **fields)
    remark = Remark("n", "s", "fig. 1", 1.0, note="why")
    assert "verdict" not in remark.to_json() and remark.verdict == "remark"
    row = Measurement("m", "s", "fig. 1", 2.0, 2.0)
    assert parted([remark, row]) == ([row], [remark])


def test_as_plain_data():
    row = Measurement("n", "s", "fig. 1", 2.0, 2.5, note="why").to_json()
    assert row["verdict"] == "differs" and row["note"] == "why" and row["published"] == 2.0
    with pytest.raises(ValueError, match="better is '>='"):
        Measurement("n", "s", "fig. 1", 2.0, 2.5, better=">=")


def claim(**changes):
    """A claim with these fields changed."""
    fields = dict(name="one", statement="It is.", statistic="excess_loss", threshold=0.1)
    return Claim(**{**fields, "direction": "<=", "source": "fig. 1", **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"catches": "no momentum"}, r"claim 'one': catches is 'no momentum', must be a tuple of"),
        ({"statistic": 0.5}, r"claim 'one': statistic is 0\.5, must be a name or a function"),
        ({"threshold": float("nan")}, r"claim 'one': threshold is nan"),
        ({"direction": "<"}, r"claim 'one': direction is '<', must be '<=' or '>='"),
        ({"name": ""}, r"name of a claim is ''"),
    ],
)
def test_a_claim_is_checked_when_it_is_made(changes, message):
    with pytest.raises(ValueError, match=message) as raised:
        claim(**changes)
    assert "\n" not in str(raised.value)
    assert claim(catches=["a", "b"]).catches == ("a", "b")


def test_near_misses_are_checked():
    c = GradientDescent(dim_x=2, num_examples=3)
    compiled = c.compile()
    near = NearMiss(compiled.model, c)
    model, base = near
    assert model is compiled.model and base is c
    for wrong, message in (
        ((compiled, c), r"model is a Compiled, must be a transformer"),
        ((c, compiled.model), r"model is a GradientDescent, must be a transformer"),
        ((compiled.model, compiled.model), r"construction is a Transformer, must be a Constr"),
    ):
        with pytest.raises(ValueError, match=message):
            NearMiss(*wrong)
