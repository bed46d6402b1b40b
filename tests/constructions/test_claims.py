"""What counts as reproduced."""

import pytest

from constructions.claims import Measurement


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
