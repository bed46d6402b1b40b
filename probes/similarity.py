r"""How alike two models are as functions, and how alike two sets of activations are.

Functions are compared through their predictions f(z) and their sensitivities d f_t / d z_t (von
Oswald et al. 2022, arXiv 2212.07677, section 3), which no symmetry of the weights changes. What
each measure cannot see is part of its definition: a cosine is blind to a scale (a step size 10 %
too large), CKA to orthogonal maps and an isotropic scale, Procrustes to orthogonal maps only. These
two are for use as a library.

An `Apply` maps input arrays with leading axis `batch` to predictions `[batch, token, dim_out]`, as
`functools.partial(construction.apply, model)` does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from constructions.claims import Evidence, comparable_weights, is_function, predict
from constructions.core.canonical import canonical_distance
from constructions.core.transformer import Transformer
from constructions.family import Construction
from constructions.runs import Run
from probes.foreign import Subject
from probes.probe import Probe, Result, checkpoints_of, seed_names, table
from synthetic.compilation import compile_once
from synthetic.tasks.task import Batch, outcome

Apply = Callable[..., Array]
Sensitivity = Float[Array, "batch token dim_out dim_in"]

#: Cosine of predictions or sensitivities below which a model says the opposite.
OPPOSITE = -0.9


class PredictionDistance(NamedTuple):
    """Difference of predictions.

    Attributes:
        mean_norm: mean over batch and tokens of |f(z) - g(z)|_2, in units of the prediction.
        relative: rms(f - g) / rms(g), over all entries.
    """

    mean_norm: Float[Array, ""]
    relative: Float[Array, ""]


def prediction_distance(
    apply: Apply, reference: Apply, inputs: Sequence[Array]
) -> PredictionDistance:
    """How far two models' predictions are from each other on the same inputs.

    ValueError if the predictions differ in shape.
    """
    a, b = apply(*inputs), reference(*inputs)
    _check_equal(a, b, "predictions")
    return _distance(a, b)


@compile_once
def _distance(a: Array, b: Array) -> PredictionDistance:
    difference = a - b
    relative = jnp.sqrt(jnp.mean(jnp.square(difference)) / jnp.mean(jnp.square(b)))
    return PredictionDistance(jnp.linalg.norm(difference, axis=-1).mean(), relative)


def sensitivity(apply: Apply, inputs: Sequence[Array], argnum: int = -1) -> Sensitivity:
    """The Jacobian of every prediction with respect to its own token of one input.

    For in-context regression and the last input that is d yhat_t / d x_t, `[batch, query, dim_y,
    dim_x]`: the weight matrix W_K of gradient descent. Examples are differentiated one by one, in
    reverse mode.

    Args:
        apply: inputs -> `[batch, token, dim_out]`.
        inputs: arrays with leading axis `batch`.
        argnum: which input, `[batch, token, dim_in]` with the tokens of the prediction.

    Raises:
        TypeError: that input is not real-valued.
        ValueError: its tokens are not those of the prediction, or `apply` is a function that JAX
            cannot trace, so that it has no derivative here.
    """
    inputs = tuple(inputs)
    argnum = range(len(inputs))[argnum]
    if not _real(inputs[argnum]):
        raise TypeError(_not_real(argnum, inputs[argnum]))
    if found := obstacle(apply, inputs, argnum):
        raise ValueError(found)

    def one(*example: Array) -> Array:
        return apply(*(a[None] for a in example))[0]

    jacobian = jax.vmap(jax.jacrev(one, argnums=argnum))(*inputs)  # [batch, t, out, t', in]
    return jnp.einsum("btoti->btoi", jacobian)


def obstacle(apply: Apply, inputs: Sequence[Array], argnum: int = -1) -> str:
    """Why a model has no `sensitivity` on these inputs, in one phrase; "" where it has one.

    What `apply` raises on the inputs themselves is raised.
    """
    inputs = tuple(inputs)
    argnum = range(len(inputs))[argnum]
    chosen = inputs[argnum]
    if not _real(chosen):
        return _not_real(argnum, chosen)
    try:
        shape = jax.eval_shape(apply, *inputs).shape
    except Exception:
        # a function that is at fault fails on numbers as well; this one takes nothing else
        apply(*inputs)
        return (
            "apply cannot be traced by JAX, so it has no derivative: it must be made of jax.numpy "
            "operations"
        )
    if len(shape) != 3 or chosen.ndim != 3 or shape[:2] != chosen.shape[:2]:
        return (
            f"input {argnum} has shape {chosen.shape} and the prediction {shape}, must be "
            "[batch, token, dim_in] and [batch, token, dim_out]"
        )
    return ""


def _real(a: Array) -> bool:
    return jnp.issubdtype(a.dtype, jnp.floating)


def _not_real(argnum: int, a: Array) -> str:
    return f"input {argnum} has dtype {a.dtype}, must be a floating point type"


def sensitivity_cosine(
    apply: Apply, reference: Apply, inputs: Sequence[Array], argnum: int = -1
) -> Float[Array, ""]:
    """Mean over batch and tokens of cos(vec J_f, vec J_g), J the sensitivities.

    Blind to the size of either model's sensitivity: exactly 1 for a step size that is off by any
    positive factor (one step from zero). A sensitivity that is 0 has cosine 0.
    """
    a, b = (_flat(sensitivity(f, inputs, argnum)) for f in (apply, reference))
    _check_equal(a, b, "sensitivities")
    return (_unit(a) * _unit(b)).sum(-1).mean()


def linear_cka(
    a: Float[Array, "sample feature_a"],
    b: Float[Array, "sample_b feature_b"],
    debiased: bool = False,
) -> Float[Array, ""]:
    r"""Linear centred kernel alignment of two sets of activations of the same samples.

    With centred columns, CKA = |A^T B|_F^2 / (|A^T A|_F |B^T B|_F) (Kornblith et al. 2019, arXiv
    1905.00414, section 3). In [0, 1]; invariant to orthogonal maps, offsets and an isotropic scale
    of either side, not to other linear maps. For few samples and many features it is far above 0
    even between independent activations; `debiased` puts the unbiased estimator of HSIC (Song et
    al. 2012, equation 5) in all three places, which is 0 on average there and can be negative, and
    costs `[sample, sample]` memory.

    ValueError for different numbers of samples, or fewer than 2 (4 if debiased).
    """
    least = 4 if debiased else 2
    if len(a) != len(b) or len(a) < least:
        raise ValueError(
            f"{len(a)} and {len(b)} samples, must be equal numbers of at least {least}"
        )
    a, b = (c - c.mean(0) for c in (a, b))
    alignment = _hsic_unbiased if debiased else _hsic
    return alignment(a, b) / jnp.sqrt(alignment(a, a) * alignment(b, b))


def _hsic(a: Array, b: Array) -> Array:
    return jnp.square(jnp.einsum("si,sj->ij", a, b, precision="highest")).sum()


def _hsic_unbiased(a: Array, b: Array) -> Array:
    n = len(a)
    k, m = (jnp.einsum("si,ti->st", c, c, precision="highest") for c in (a, b))
    off = 1 - jnp.eye(n, dtype=a.dtype)
    k, m = k * off, m * off
    shared = (k.sum(0) * m.sum(0)).sum()
    total = (k * m).sum() + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 * shared / (n - 2)
    return total / (n * (n - 3))


class Procrustes(NamedTuple):
    """The best orthogonal map and what it leaves over.

    Attributes:
        residual: |A R - B|_F / |B|_F.
        rotation: R, orthogonal (reflections included).
    """

    residual: Float[Array, ""]
    rotation: Float[Array, "feature feature"]


def procrustes(
    a: Float[Array, "sample feature"], b: Float[Array, "sample_b feature_b"]
) -> Procrustes:
    """min over orthogonal R of |A R - B|_F / |B|_F, at R = U V^T with A^T B = U S V^T.

    Invariant to orthogonal maps of either side; sees scale and offset (centre first if an offset
    should not count). Meant for activations. ValueError for different shapes.
    """
    _check_equal(a, b, "activations")
    u, _, v = jnp.linalg.svd(jnp.einsum("si,sj->ij", a, b, precision="highest"))
    rotation = jnp.matmul(u, v, precision="highest")
    difference = jnp.matmul(a, rotation, precision="highest") - b
    return Procrustes(jnp.linalg.norm(difference) / jnp.linalg.norm(b), rotation)


def _flat(s: Sensitivity) -> Float[Array, "batch token entries"]:
    return s.reshape(*s.shape[:2], -1)


def _unit(v: Array) -> Array:
    norm = jnp.linalg.norm(v, axis=-1, keepdims=True)
    return v / jnp.where(norm > 0, norm, 1)


def _check_equal(a: Array, b: Array, what: str) -> None:
    if a.shape != b.shape:
        raise ValueError(f"{what} have shapes {a.shape} and {b.shape}, must be equal")


@compile_once(static_argnums=0, often=True)
def sensitivities(
    construction: Construction, model: Transformer, reference: Transformer, inputs: Any
) -> Array:
    """Mean cosine of the sensitivities of two models, jitted."""
    ours, theirs = (partial(construction.apply, m) for m in (model, reference))
    return sensitivity_cosine(ours, theirs, inputs)


#: Finite differences of two steps may differ by so much of themselves: a cosine then errs by less
#: than its square.
STEADY = 1e-2
#: As much as they differ where the first step is right for the model's precision.
ROUNDING = 1e-5
#: Most runs that finite differences take.
MOST_RUNS = 512


def finite_differences(
    function: Apply, inputs: Sequence[Any]
) -> tuple[Float[np.ndarray, "batch token dim_out dim_in"], float]:
    """`sensitivity` by central differences in the last input, and how much two steps differ.

    (f(z + h e) - f(z - h e)) / 2h, token by token and entry by entry, with h near the cube root of
    the rounding unit, a power of two so that z +- h is as exact as z. What is given is of the step
    h whose half gives nearly the same: that of float64 where predictions come in it, of float32
    else, or where the model computes in it none the less.

    Returns:
        The sensitivities and |J_h - J_(h/2)| / |J_(h/2)|.
    """
    *rest, last = (np.asarray(a, float) for a in inputs)
    scale = 2.0 ** np.round(np.log2(max(float(np.sqrt(np.mean(last**2))), 1e-30)))
    last = last.astype(np.float32).astype(float)

    def quotients(step: float) -> np.ndarray:
        found = np.zeros(0)
        for t, i in np.ndindex(last.shape[1:]):
            ends = []
            for sign in (1, -1):
                moved = last.copy()
                moved[:, t, i] += sign * step
                ends.append(np.asarray(function(*rest, moved), float)[:, t])
            if not found.size:
                found = np.zeros((*last.shape[:2], ends[0].shape[-1], last.shape[2]))
            found[:, t, :, i] = (ends[0] - ends[1]) / (2 * step)
        return found

    exact = np.asarray(function(*rest, last)).dtype == np.float64
    best, steady = np.zeros(0), np.inf
    for step in (scale * 2.0**-17, scale * 2.0**-8)[0 if exact else 1 :]:
        wide, narrow = quotients(step), quotients(step / 2)
        size = np.linalg.norm(narrow)
        apart = float(np.linalg.norm(wide - narrow) / size) if size else 0.0
        if apart < steady:
            best, steady = wide, apart
        if steady <= ROUNDING:
            break
    return best, steady


def insensitive(construction: Construction, model: Any, inputs: Sequence[Any]) -> str:
    """Why a model of any kind has no sensitivities on these inputs, in one phrase; "" if it has.

    A function is asked for its own derivative, then JAX, then finite differences.
    """
    if not is_function(model):
        return obstacle(partial(predict, construction, model), inputs)
    few, last = tuple(a[:64] for a in inputs), inputs[-1]
    if not _real(last):
        return _not_real(len(inputs) - 1, last)
    shape = np.shape(model(*few))
    if len(shape) != 3 or last.ndim != 3 or shape[1] != last.shape[1]:
        return (
            f"input {len(inputs) - 1} has shape {last.shape} and the prediction {shape}, must be "
            "[batch, token, dim_in] and [batch, token, dim_out]"
        )
    if _by_itself(model, few) is not None or _traced(model, few):
        return ""
    runs = 4 * int(np.prod(last.shape[1:]))
    if runs > MOST_RUNS:
        return f"finite differences would take {runs} runs of the model, more than {MOST_RUNS}"
    steady = finite_differences(model, few)[1]
    if steady > STEADY:
        return f"finite differences of two steps differ by {steady:.2g} of themselves"
    return ""


def _by_itself(model: Any, inputs: Sequence[Any]) -> np.ndarray | None:
    """A subject's own derivative."""
    return model.differentiate(*inputs) if isinstance(model, Subject) else None


def _traced(model: Any, inputs: Sequence[Any]) -> bool:
    """Whether JAX can trace and differentiate a function that runs on these inputs."""
    if obstacle(model, inputs):
        return False
    try:
        jax.eval_shape(lambda *i: sensitivity(model, i), *inputs)
    except Exception:  # of another library, whatever it raises
        return False
    return True


def cosine_of(
    construction: Construction, model: Any, reference: Transformer, inputs: tuple[Array, ...]
) -> float:
    """Mean cosine of the sensitivities of a model of any kind and a `Transformer`.

    Only where `insensitive` has nothing against it.
    """
    if not is_function(model):
        return float(sensitivities(construction, model, reference, inputs))
    theirs = _sensitivity(construction, reference, inputs)
    ours = _by_itself(model, inputs)
    if ours is None and _traced(model, inputs):
        ours = sensitivity(model, inputs)
    if ours is None:
        ours, _ = finite_differences(model, inputs)
    a, b = _flat(jnp.asarray(ours, theirs.dtype)), _flat(theirs)
    _check_equal(a, b, "sensitivities")
    return float((_unit(a) * _unit(b)).sum(-1).mean())


@partial(jax.jit, static_argnums=0)
def _sensitivity(construction: Construction, model: Transformer, inputs: Any) -> Array:
    return sensitivity(partial(construction.apply, model), inputs)


def compared(construction: Any, prediction: Array) -> Array:
    """A prediction without what means nothing: of logits, the mean over the outcomes."""
    if outcome(construction.task) != "logits":
        return prediction
    return prediction - prediction.mean(-1, keepdims=True)


def _constant(value: Array) -> Callable[..., Array]:
    return lambda *_: value


def measure(run: Run, seed: int) -> Result:
    """Distance of predictions and cosine of sensitivities to the construction's.

    Logits are compared up to a number common to all outcomes.
    """
    construction, reference = run.construction, run.construction.reference
    inputs = construction.sample(jax.random.key(seed), 256)
    values = []
    for model in run.models:
        ours, theirs = (partial(predict, construction, m) for m in (model, reference))
        one, other = (_constant(compared(construction, f(*inputs))) for f in (ours, theirs))
        distance = prediction_distance(one, other, inputs)
        cosine = np.nan  # where inputs are no real numbers, a token each
        if not insensitive(construction, model, inputs):
            cosine = cosine_of(construction, model, reference, inputs)
        values.append([float(distance.relative), float(distance.mean_norm), cosine])
    columns = ("relative prediction distance", "mean prediction distance", "sensitivity cosine")
    result = table("functions, against the construction", columns, seed_names(run), values)
    if any(row[-1] < OPPOSITE for row in values):
        hint = "A cosine near -1: is the sign of the read-out the construction's?"
        return replace(result, note=f"{result.note} {hint}".strip())
    return result


def measure_along_the_fit(run: Run, seed: int) -> Result:
    """The match along the run's checkpoints: prediction distance and canonical distance."""
    construction, reference = run.construction, run.construction.reference
    key = jax.random.key(seed)
    inputs = construction.sample(key, 1024)
    rows, values = [], []
    for step, models in checkpoints_of(run):
        for name, model in zip(seed_names(run), models, strict=True):
            ours, theirs = (partial(predict, construction, m) for m in (model, reference))
            distance = prediction_distance(ours, theirs, inputs)
            evidence = Evidence(construction, model, reference, Batch(inputs, None), key)
            weights = np.nan  # where there is more than linear attention, say
            if not comparable_weights(evidence):
                weights = float(canonical_distance(model, reference, construction.gauge()))
            rows.append(f"step {step}, {name}")
            values.append([float(distance.relative), weights])
    columns = ("relative prediction distance", "canonical weight distance")
    return table("match with the construction along the fit", columns, rows, values)


def has_checkpoints(run: Run) -> str:
    """Weights that were kept along the fit."""
    if run.path is None:
        return "the run was not kept, so it has no checkpoints"
    return "" if checkpoints_of(run) else f"{run.path}: holds no readable checkpoint"


SIMILARITY = Probe(
    "similarity",
    "are predictions and sensitivities the construction's?",
    "the inputs are few in kind: agreement on the task is no agreement off it",
    measure,
    functions=True,
)

TRAINING = Probe(
    "training",
    "when does the match come about?",
    "checkpoints are few, and the last ones only",
    measure_along_the_fit,
    has_checkpoints,
)
