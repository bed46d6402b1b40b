"""Untrained transformers of a given shape: zeros and wiring."""

import jax
import numpy as np
import pytest

from constructions.core.compile import untrained
from constructions.core.config import Config, HeadsConfig, LayerConfig, SegmentConfig
from constructions.core.program import CAUSAL

HEADS = (HeadsConfig("softmax", 2, 9, 3), HeadsConfig("linear", 1, 9, 3))
CONFIG = Config(5, (SegmentConfig((LayerConfig(HEADS),), 2),), ("word", "space"))


def test_scores_of_softmax_heads_alone_are_divided_by_the_root_of_key_dim():
    arrays = untrained(CONFIG, CAUSAL, ["space"]).arrays()
    softmax, linear = (arrays["segments"][0]["layers"][0]["heads"][n] for n in range(2))
    np.testing.assert_allclose(softmax["scale"], np.full((2, 2), 1 / 3), rtol=1e-6)
    np.testing.assert_array_equal(linear["scale"], np.ones((2, 1)))
    for heads in (softmax, linear):
        np.testing.assert_array_equal(heads["key_groups"].any((0, 1)), [False, True])
        assert heads["query_groups"].all() and not heads["sink_groups"].any()
        assert (np.asarray(heads["window"])[..., 1] == 0).all()
        assert not any(jax.tree.leaves([heads[n].any() for n in ("query", "key", "output")]))


@pytest.mark.parametrize("keys", [["letter"], ["word", "letter"], []])
def test_bad_keys_are_named(keys):
    message = "keys holds 'letter', must be some of" if keys else r"keys is \[\], must be None or"
    with pytest.raises(ValueError, match=message):
        untrained(CONFIG, keys=keys)
