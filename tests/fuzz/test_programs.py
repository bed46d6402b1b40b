"""Compiled model and slot-wise evaluator against what a random program says, slot by slot."""

import jax
import numpy as np
import plain_numpy
from flax import nnx
from fuzz.fuzzing import fuzz
from fuzz.numpy_jaxpr import run
from fuzz.programs import Case, cases, share
from hypothesis import assume, event
from hypothesis import strategies as st

from constructions.core.checks import ProgramError, check
from constructions.core.compile import compile_program
from constructions.core.evaluate import evaluate
from constructions.core.inventory import counts
from constructions.core.program import Program
from constructions.core.slots import Slot

LARGEST = 1e4  # beyond it rounding decides what comes out of a softmax or a solve


def embedded(case: Case) -> np.ndarray:
    """The stream that holds the values."""
    stream = np.zeros((*case.groups.shape, case.program.slots.width))
    for name, value in case.values.items():
        stream[..., case.program.slots[name].columns] += value
    return stream


def held(program: Program) -> list[Slot]:
    """Slots whose columns mean them at the end: written last, or never written by anybody."""
    written = {s for s in program.slots if s.born == 0}
    ever = set(written)

    def write(slots, erased=()):
        nonlocal written
        written = written - {*erased} | {*slots}
        ever.update(slots)

    for _, layer in program.unrolled():
        write([layer.norm.write] if layer.norm is not None else [])
        erasing = [h for h in layer.heads if h.erases is not None]
        whole = [h.erases for h in erasing if {*(h.erases.token_groups or program.token_groups)}
                 <= {*(h.queries or program.token_groups)}]  # fmt: skip
        write([s for h in layer.heads if h.erases is None for s in h.writes()], whole)
        write(layer.mlp.write if layer.mlp is not None else [])
    return [
        s
        for s in program.slots
        if s.dies is None
        and (s in written or not any(share(s, other) for other in ever if other != s))
    ]


def agree(case: Case, found, wanted, what: str) -> None:
    """Every slot that lives to the end, at the tokens that own it."""
    program = case.program
    largest = max([1.0, *(np.abs(v).max(initial=0) for v in wanted.values())])
    for slot in held(program):
        owned = np.array(
            [slot.token_groups is None or g in slot.token_groups for g in program.token_groups]
        )
        wrong = np.abs(np.asarray(found[slot.name]) - wanted[slot.name])
        worst = wrong[owned[case.groups]].max(initial=0)
        assert worst <= 1e-8 * largest, f"{what}: slot {slot.name} is off by {worst:.2e}"


@fuzz(quick=12, share=1.0, case=cases(), way=st.sampled_from(("static", "traced", "stream")))
def test_programs(case: Case, way: str) -> None:
    program = case.program
    try:
        check(program)
    except ProgramError:
        assert not case.plain
        event("refused")
        return
    sizes: list[float] = []
    try:
        with np.errstate(all="ignore"):
            wanted = plain_numpy.interpret(program, case.values, case.groups, sizes)
    except np.linalg.LinAlgError:  # of a mesa head whose keys have grown without bound
        wanted = {}
    assume(wanted and max(sizes) < LARGEST)  # no NaN either
    stream = embedded(case)
    with jax.enable_x64(True):
        model = compile_program(program, "float64")
        out = run(lambda model, stream, groups: model(stream, groups), model, stream, case.groups)
        groups = case.groups[0] if case.shared else case.groups
        if way == "static":
            known = groups if case.shared else np.broadcast_to(groups, case.groups.shape)
            slots = run(lambda values: evaluate(program, values, known), case.values)
        else:
            given = stream if way == "stream" else case.values
            slots = run(lambda v, groups: evaluate(program, v, groups), given, case.groups)
    agree(case, {s.name: out[..., s.columns] for s in program.slots}, wanted, "compiled")
    agree(case, slots, wanted, f"evaluated ({way})")
    weights = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert counts(program).dense == sum(w.size for w in weights)
