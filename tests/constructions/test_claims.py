"""What counts as reproduced, and what claims and near-misses are made of."""

import pytest

from constructions.claims import Claim, Measurement, NearMiss
from constructions.gradient_descent import GradientDescent


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
    assert verdict(1.0, published=None) == "measured"
    assert verdict(float("nan")) == verdict(float("nan"), better="<=") == "differs"


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
