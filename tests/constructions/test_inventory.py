"""What programs are made of, against counts by hand and against built models."""

import jax
import numpy as np
import pytest
from flax import nnx

from constructions import CATALOGUE
from constructions.core.compile import compile_program
from constructions.core.inventory import NON_STANDARD, components, counts
from constructions.interchange.decoder import DecoderShape, decoder
from constructions.tint.algorithm import MODES
from constructions.tint.experiments import PUBLISHED, paper_parameters, sizes, table
from constructions.tint.layout import Layout
from constructions.tint.tableau import Tableau

SMALL = DecoderShape(5, 6, 2, 2, 4, 8, "gelu", 1e-5)


def program_of(shape, mode, stack=1):
    return Tableau(Layout(shape, stack), MODES[mode], 1, 1e-3).program()


def test_gradient_descent_is_linear_attention_alone():
    c = CATALOGUE["gradient-descent"](dim_x=3, dim_y=1, num_examples=4, steps=2, step_size=0.5)
    found = components(c.program)
    assert found.plain == 0
    assert sum(part.layers for part in found.parts) == len(c.program.layers)
    heads = sum(len(layer.single_heads) for layer in c.program.layers)
    assert (
        found.non_standard["linear attention"] == sum(part.heads for part in found.parts) == heads
    )
    assert "transposed softmax" not in found.non_standard and "gated MLP" not in found.non_standard


@pytest.mark.parametrize("mode", MODES)
def test_tint_by_hand(mode):
    shape, found = SMALL, components(program_of(SMALL, mode))
    assert set(found.non_standard) <= set(NON_STANDARD)
    # softmax heads that look back: attention of two passes, the loss, and differences of queries
    differences = 2 * shape.heads * shape.layers if mode == "finite-difference" else 0
    factors = shape.heads * shape.layers if mode == "exact" else 0
    plain = 2 * shape.heads * shape.layers + 1 + differences
    heads = sum(part.heads for part in found.parts)
    assert found.plain == pytest.approx(plain / heads)
    transposed = {"paper": 1, "finite-difference": 3, "exact": 2}[mode]
    assert found.non_standard["transposed softmax"] == transposed * shape.heads * shape.layers
    assert found.non_standard.get("factor", 0) == 2 * factors
    assert found.non_standard.get("derivative", 0) == (shape.layers if mode == "exact" else 0)
    assert found.markdown().count("\n") == len(found.parts) + 1


@pytest.mark.parametrize("stack", [1, 2])
def test_counts_are_those_of_the_built_model(stack):
    program = program_of(SMALL, "exact", stack)
    arrays = jax.tree.leaves(nnx.to_pure_dict(nnx.state(compile_program(program), nnx.Param)))
    found = sizes(SMALL, stack=stack)
    assert found.dense == sum(a.size for a in arrays) == counts(program).dense
    # slots of the program are written in the same columns once, so no two entries fall together
    assert found.program == sum(np.count_nonzero(a) for a in arrays)
    auxiliary = decoder(5, positions=6, layers=2, heads=2, width=4, hidden=8)
    parameters = jax.tree.leaves(nnx.to_pure_dict(nnx.state(auxiliary, nnx.Param)))
    assert found.auxiliary == sum(a.size for a in parameters)
    assert found.stored == found.program + found.auxiliary


def test_the_papers_formula():
    # Q' = 3072^2 / 12 + 12 * 3072, Q = 4 Q' + 3 (2048 + 192) 3072 / 12, all by hand
    split, linear = 823_296, 4 * 823_296 + 1_720_320
    by_hand = (21 * linear + split + 6 * 3072 * 12) * 12
    assert paper_parameters(*PUBLISHED["OPT-125M"])[0] == by_hand
    # the figures that the notes on the paper recompute from it
    for name, billions in {"OPT-350M": 3.17, "OPT-1.3B": 10.82, "OPT-2.7B": 21.77}.items():
        assert paper_parameters(*PUBLISHED[name])[0] / 1e9 == pytest.approx(billions, abs=5e-3)
    for name in ("GPT-2", "OPT-125M"):
        assert 1e9 < sum(paper_parameters(*PUBLISHED[name])) < 2e9


def test_published_sizes_without_allocating():
    found = sizes(PUBLISHED["GPT-2"][0])
    assert found.auxiliary == 124_439_808
    assert found.stored < 1.03 * found.auxiliary
    assert found.paper < 2e9 < found.dense
    assert found.nonzero < 1e-5
    assert len(table("paper", ["OPT-125M"]).splitlines()) == 3
