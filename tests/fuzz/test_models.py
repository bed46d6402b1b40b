"""The transformer against loops, for random shapes: gates, norms, tied layers, reads, sites."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import plain_numpy
from fuzz.fuzzing import built, fuzz
from fuzz.numpy_jaxpr import run
from fuzz.programs import MIXERS
from hypothesis import assume
from hypothesis import strategies as st

from constructions.core.config import (
    Config,
    HeadsConfig,
    LayerConfig,
    MlpConfig,
    NormConfig,
    SegmentConfig,
)
from constructions.core.transformer import Transformer

LARGEST = 1e4


@dataclass
class Case:
    """A model, its input, and the tokens that are read."""

    config: Config
    arrays: Any
    stream: np.ndarray
    groups: np.ndarray
    read: slice


@built
def cases(draw: Any) -> Case:
    """Every combination of parts that a config may have."""
    rng = np.random.default_rng(draw(st.integers(0, 2**20)))
    width, groups = draw(st.integers(2, 4)), ("a", "b")[: draw(st.integers(1, 2))]
    tokens = st.one_of(st.none(), st.sampled_from([groups[:1], groups]))

    def norm(own_columns: bool) -> NormConfig | None:
        kind, eps = draw(st.sampled_from(("layer", "rms"))), draw(st.sampled_from((1e-5, 0.1)))
        way = draw(st.sampled_from(("none", "none", "plain", "affine", "columns")))
        if way == "columns" and own_columns:
            size = draw(st.integers(1, width))
            read, write = (draw(st.integers(0, width - size)) for _ in range(2))
            return NormConfig(kind, eps, False, (read, read + size), (write, write + size),
                              draw(tokens))  # fmt: skip
        return None if way in ("none", "columns") else NormConfig(kind, eps, way == "affine")

    def heads() -> HeadsConfig:
        mixer, size = draw(st.sampled_from(MIXERS)), st.integers(1, 3)
        gates = mixer == "mesa" and draw(st.booleans())
        factor = 0 if mixer == "mesa" else draw(st.sampled_from((0, 0, 1, 2)))
        return HeadsConfig(mixer, draw(size), draw(size), draw(size), draw(st.booleans()), gates,
                           factor)  # fmt: skip

    def mlp() -> MlpConfig:
        activation = draw(st.sampled_from(("relu", "gelu", "tanh", "square", "identity")))
        return MlpConfig(draw(st.integers(1, 4)), activation, draw(st.booleans()),
                         draw(st.booleans()), draw(tokens))  # fmt: skip

    def layer() -> LayerConfig:
        rows = tuple(heads() for _ in range(draw(st.integers(0, 2))))
        return LayerConfig(rows, mlp() if draw(st.booleans()) else None, norm(True), norm(True))

    segments = []
    for _ in range(draw(st.integers(1, 2))):
        pattern = tuple(layer() for _ in range(draw(st.integers(1, 2))))
        segments.append(SegmentConfig(pattern, draw(st.integers(1, 2)), draw(st.booleans())))
    clip = draw(st.sampled_from((None, None, 1.0)))
    config = Config(width, tuple(segments), groups, norm(False), clip=clip)

    def filled(shapes: Any, name: str = "") -> Any:
        if isinstance(shapes, dict):
            return {key: filled(value, str(key)) for key, value in shapes.items()}
        if name == "window":
            low, high = (rng.integers(-3, 4, shapes[:-1]) for _ in range(2))
            return np.stack([np.minimum(low, high), np.maximum(low, high)], -1).astype(np.int32)
        if name.endswith("_groups"):
            return rng.random(shapes) < (0.3 if name.startswith("sink") else 0.8)
        return rng.normal(size=shapes) * (0.3 if name == "log_regularization" else 0.5)

    arrays = filled(config.shapes())
    for s, segment in enumerate(config.segments):
        for p, one in enumerate(segment.pattern):
            for n, row in enumerate(one.heads):
                if row.mixer == "mesa":  # whose window is causal, without sinks
                    own = arrays["segments"][s]["layers"][p]["heads"][n]
                    own["window"][:] = (-(2**30), 0)
                    own["sink_groups"][:] = False
    count = draw(st.integers(1, 5))
    shape = draw(st.sampled_from(((count,), (2, count))))
    start = draw(st.integers(0, count - 1))
    return Case(
        config, arrays, rng.normal(size=(2, count, width)),
        rng.integers(0, len(groups), shape), slice(start, draw(st.integers(start + 1, count))),
    )  # fmt: skip


@fuzz(quick=3, share=0.1, case=cases())
def test_models(case: Case) -> None:
    with np.errstate(all="ignore"):
        try:
            wanted, layers, before = plain_numpy.transformer(
                case.config, case.arrays, case.stream, case.groups
            )
        except np.linalg.LinAlgError:
            assume(False)
    largest = max(np.abs(v).max() for v in (before, wanted, *(x["middle"] for x in layers)))
    assume(largest < LARGEST)
    with jax.enable_x64(True):
        model = Transformer(case.config, jax.tree.map(jax.numpy.asarray, case.arrays))
        sites = ("residual", "attention", "middle")
        out, found = run(lambda m, s, g: m.run(s, g, sites=sites), model, case.stream, case.groups)
        part = run(lambda m, s, g: m(s, g, read=case.read), model, case.stream, case.groups)
    close = {"rtol": 1e-8, "atol": 1e-8 * max(1.0, largest)}
    np.testing.assert_allclose(out, wanted, **close)
    np.testing.assert_allclose(part, wanted[:, case.read], **close)
    np.testing.assert_allclose(found["residual"][-1], before, **close)
    for number, layer in enumerate(layers):
        np.testing.assert_allclose(found["residual"][number], layer["residual"], **close)
        np.testing.assert_allclose(found["middle"][number], layer["middle"], **close)
        for b, own in enumerate(layer["attention"]):
            for n, weights in enumerate(own):
                np.testing.assert_allclose(found["attention"][number, b, n], weights, **close)
