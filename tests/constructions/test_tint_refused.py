"""Settings and inputs that TinT refuses."""

import numpy as np
import pytest
from tint_oracle import TEXTS, TRAINED, small

from constructions.tint.algorithm import Backward
from constructions.tint.construction import Tint

ERRORS = [
    ({"mode": "fast"}, r"mode is 'fast', must be one of \['paper', 'finite-difference', 'exact'\]"),
    ({"mode": None}, "mode is None, must be one of"),
    ({"mode": {"norm": "value-only"}}, "norm is 'value-only', must be one of"),
    ({"steps": 0}, "steps is 0, must be an integer of at least 1"),
    ({"steps": True}, "steps is True, must be an integer of at least 1"),
    ({"stack": 0}, "stack is 0, must be an integer of at least 1"),
    ({"stack": 3}, "stack is 3, must divide the auxiliary's width, 4"),
    ({"stack": 8}, "stack is 8, must divide the auxiliary's width, 4"),
    ({"shards": 0}, "shards is 0, must be an integer of at least 1"),
    ({"shards": False}, "shards is False, must be an integer of at least 1"),
    ({"shards": 5}, "shards is 5, must be at most the width, 4"),
    ({"learning_rate": np.nan}, "learning_rate is nan, must be finite and not 0"),
    ({"learning_rate": 0.0}, "learning_rate is 0.0, must be finite and not 0"),
    ({"length": 1}, "length is 1, must be 2 to 6"),
    ({"length": 7}, "length is 7, must be 2 to 6"),
    ({"share": 1.0}, "share is 1.0, must leave some of 6 positions"),
    ({"auxiliary": {"grammar": "toy", "depth": 2}}, "depth: no field of an auxiliary"),
    ({"auxiliary": 3}, "auxiliary is a int, must be a Transformer"),
]


@pytest.mark.parametrize(("given", "message"), ERRORS, ids=str)
def test_settings_that_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Tint(**({"auxiliary": small()} | given))


def test_hidden_units_must_fill_tokens():
    with pytest.raises(ValueError, match="stack is 1, .* its 6 hidden units fill as well: 2 or 4"):
        Tint(small(hidden=6))
    Tint(small(hidden=6), stack=2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"attention": "softmax"}, "attention is 'softmax', must be one of"),
        ({"norm": "value-only"}, "norm is 'value-only', must be one of"),
        ({"activation": "none"}, "activation is 'none', must be one of"),
        ({"step": 0.0}, "step is 0.0, must be above 0"),
        ({"step": np.inf}, "step is inf, must be a finite number above 0"),
    ],
    ids=str,
)
def test_ways_back_that_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Backward(**given)


@pytest.mark.parametrize(
    ("tokens", "masks", "message"),
    [
        (TEXTS[0], TRAINED[0], r"tokens has shape \(6,\) and dtype int64, must be \[batch, time\]"),
        (TEXTS.astype(float), TRAINED, "tokens are float64, must be integers"),
        (TEXTS[:, :0], TRAINED[:, :0], r"tokens has shape \(4, 0\)"),
        (np.zeros((1, 7), int), np.ones((1, 7)), "tokens has 7 positions, the auxiliary 6"),
        (TEXTS + 1, TRAINED, "tokens are 1 to 5, must be 0 to 4"),
        (TEXTS - 1, TRAINED, "tokens are -1 to 3, must be 0 to 4"),
        (TEXTS, TRAINED[:, :5], r"train_mask has shape \(4, 5\), must be that of tokens"),
        (TEXTS, TRAINED * 2, "train_mask must be 0 or 1"),
        (TEXTS, TRAINED * np.nan, "train_mask must be 0 or 1"),
    ],
)
def test_inputs_that_are_refused(tokens, masks, message):
    with pytest.raises(ValueError, match=message):
        Tint(small()).check(tokens, masks)
