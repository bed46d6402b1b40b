"""JAX functions run by numpy: traced, then evaluated primitive by primitive, nothing compiled.

Random programs differ in every shape, so that compiling one takes a hundred times as long as
running it. Primitives that are not in the table are bound by JAX itself, which compiles each for
each shape once.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal


def run(function: Callable, *arguments: Any) -> Any:
    """function(*arguments), its arrays as numpy arrays."""
    closed, shape = jax.make_jaxpr(function, return_shape=True)(*arguments)
    found = evaluate(closed, *map(np.asarray, jax.tree.leaves(arguments)))
    return jax.tree.unflatten(jax.tree.structure(shape), found)


def evaluate(closed: ClosedJaxpr, *arguments: Any) -> list[np.ndarray]:
    """The outputs of a closed jaxpr."""
    return _evaluate(closed.jaxpr, [np.asarray(c) for c in closed.consts], arguments)


def _evaluate(jaxpr: Jaxpr, consts: Any, arguments: Any) -> list[np.ndarray]:
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    values |= zip(jaxpr.invars, arguments, strict=True)

    def read(atom: Any) -> Any:
        return np.asarray(atom.val, atom.aval.dtype) if isinstance(atom, Literal) else values[atom]

    for equation in jaxpr.eqns:
        inputs, primitive = [read(atom) for atom in equation.invars], equation.primitive
        if primitive.name in CONTROL:
            outputs = CONTROL[primitive.name](*inputs, **equation.params)
        elif primitive.name in TABLE:
            result = TABLE[primitive.name](*inputs, **equation.params)
            outputs = result if primitive.multiple_results else [result]
        else:
            outputs = primitive.bind(*map(jnp.asarray, inputs), **equation.params)
            outputs = outputs if primitive.multiple_results else [outputs]
        for variable, output in zip(equation.outvars, outputs, strict=True):
            output, aval = np.asarray(output), variable.aval
            assert output.shape == aval.shape, (primitive.name, output.shape, aval)
            values[variable] = output if output.dtype == aval.dtype else output.astype(aval.dtype)
    return [read(atom) for atom in jaxpr.outvars]


def _called(name: str) -> Callable:
    def call(*inputs: Any, **params: Any) -> list[np.ndarray]:
        inner = params[name]
        return (
            evaluate(inner, *inputs) if hasattr(inner, "consts") else _evaluate(inner, [], inputs)
        )

    return call


def _scan(*inputs: Any, jaxpr: Any, length: int, num_consts: int, num_carry: int, **params: Any):
    consts, carry = inputs[:num_consts], list(inputs[num_consts : num_consts + num_carry])
    xs, stacks = inputs[num_consts + num_carry :], []
    steps = range(length)
    for n in reversed(steps) if params["reverse"] else steps:
        found = evaluate(jaxpr, *consts, *carry, *(x[n] for x in xs))
        carry, ys = found[:num_carry], found[num_carry:]
        stacks.append(ys)
    stacks = stacks[::-1] if params["reverse"] else stacks
    empty = [np.zeros((0, *a.shape), a.dtype) for a in jaxpr.out_avals[num_carry:]]
    return [*carry, *([np.stack(ys) for ys in zip(*stacks, strict=True)] if stacks else empty)]


def _while(*inputs: Any, cond_jaxpr: Any, cond_nconsts: int, body_jaxpr: Any, body_nconsts: int):
    first, carry = inputs[:cond_nconsts], list(inputs[cond_nconsts + body_nconsts :])
    second = inputs[cond_nconsts : cond_nconsts + body_nconsts]
    while evaluate(cond_jaxpr, *first, *carry)[0]:
        carry = evaluate(body_jaxpr, *second, *carry)
    return carry


def _cond(index: Any, *inputs: Any, branches: Any, **params: Any):
    return evaluate(branches[min(max(int(index), 0), len(branches) - 1)], *inputs)


CONTROL = {
    **dict.fromkeys(("jit", "pjit", "closed_call", "core_call"), _called("jaxpr")),
    "custom_jvp_call": _called("call_jaxpr"),
    "custom_vjp_call": _called("call_jaxpr"),
    "custom_vjp_call_jaxpr": _called("fun_jaxpr"),
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}


def _dot(a: Any, b: Any, dimension_numbers: Any, **params: Any) -> np.ndarray:
    ((ca, cb), (ba, bb)) = dimension_numbers
    left = [n for n in range(a.ndim) if n not in (*ca, *ba)]
    right = [n for n in range(b.ndim) if n not in (*cb, *bb)]
    batch = [a.shape[n] for n in ba]
    inner = math.prod(a.shape[n] for n in ca)
    x = a.transpose(*ba, *left, *ca).reshape(*batch, -1, inner)
    y = b.transpose(*bb, *cb, *right).reshape(*batch, inner, -1)
    return (x @ y).reshape(*batch, *(a.shape[n] for n in left), *(b.shape[n] for n in right))


def _broadcast(a: Any, *_: Any, shape: Any, broadcast_dimensions: Any, **params: Any):
    full = [1] * len(shape)
    for n, axis in enumerate(broadcast_dimensions):
        full[axis] = a.shape[n]
    return np.broadcast_to(a.reshape(full), shape)


def _pad(a: Any, fill: Any, padding_config: Any) -> np.ndarray:
    shape, places = [], []
    for n, (low, high, inside) in zip(a.shape, padding_config, strict=True):
        assert low >= 0 and high >= 0
        size = n + max(n - 1, 0) * inside
        shape.append(low + size + high)
        places.append(slice(low, low + size, inside + 1))
    out = np.full(shape, fill, a.dtype)
    out[tuple(places)] = a
    return out


def _dynamic_slice(a: Any, *starts: Any, slice_sizes: Any) -> np.ndarray:
    return a[_window(a, starts, slice_sizes)]


def _dynamic_update_slice(a: Any, update: Any, *starts: Any) -> np.ndarray:
    out = a.copy()
    out[_window(a, starts, update.shape)] = update
    return out


def _window(a: Any, starts: Any, sizes: Any) -> tuple[slice, ...]:
    firsts = [min(max(int(s), 0), n - m) for s, n, m in zip(starts, a.shape, sizes, strict=True)]
    return tuple(slice(s, s + m) for s, m in zip(firsts, sizes, strict=True))


def _slice(a: Any, start_indices: Any, limit_indices: Any, strides: Any) -> np.ndarray:
    strides = strides or [1] * a.ndim
    return a[tuple(map(slice, start_indices, limit_indices, strides))]


def _select(which: Any, *cases: Any) -> np.ndarray:
    return np.where(which, cases[1], cases[0]) if len(cases) == 2 else np.choose(which, cases)


def _split(a: Any, sizes: Any, axis: int) -> list[np.ndarray]:
    return np.split(a, np.cumsum(sizes)[:-1], axis)


def _iota(*, dtype: Any, shape: Any, dimension: int, **params: Any) -> np.ndarray:
    full = [1] * len(shape)
    full[dimension] = -1
    return np.broadcast_to(np.arange(shape[dimension], dtype=dtype).reshape(full), shape)


def _elementwise(function: Callable) -> Callable:
    def apply(*inputs: Any, **params: Any) -> np.ndarray:
        with np.errstate(all="ignore"):
            return function(*inputs)

    return apply


def _reduced(function: Callable) -> Callable:
    return lambda a, axes, **params: function(a, axis=tuple(axes))


def _power(a: Any, y: int, **params: Any) -> np.ndarray:
    with np.errstate(all="ignore"):
        return a**y if y >= 0 else 1 / a**-y


TABLE: dict[str, Callable] = {
    **{
        name: _elementwise(function)
        for name, function in {
            "add": np.add, "add_any": np.add, "sub": np.subtract, "mul": np.multiply,
            "div": lambda a, b: a / b if a.dtype.kind == "f" else np.trunc(a / b),
            "max": np.maximum, "min": np.minimum, "neg": np.negative, "exp": np.exp,
            "log": np.log, "tanh": np.tanh, "sqrt": np.sqrt, "rsqrt": lambda a: 1 / np.sqrt(a),
            "square": np.square, "abs": np.abs, "sign": np.sign, "eq": np.equal,
            "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
            "ge": np.greater_equal, "and": lambda a, b: a & b, "or": lambda a, b: a | b,
            "not": lambda a: ~a, "is_finite": np.isfinite, "copy": lambda a: a,
            "stop_gradient": lambda a: a, "logistic": lambda a: 1 / (1 + np.exp(-a)),
        }.items()
    },
    **{
        f"reduce_{name}": _reduced(function)
        for name, function in {
            "sum": np.sum, "max": np.max, "min": np.min, "and": np.all, "or": np.any,
        }.items()
    },
    "integer_pow": _power,
    "dot_general": _dot,
    "broadcast_in_dim": _broadcast,
    "reshape": lambda a, *_, new_sizes, **params: a.reshape(new_sizes),
    "squeeze": lambda a, dimensions: a.squeeze(tuple(dimensions)),
    "transpose": lambda a, permutation: a.transpose(permutation),
    "convert_element_type": lambda a, new_dtype, **params: a.astype(new_dtype),
    "concatenate": lambda *parts, dimension: np.concatenate(parts, dimension),
    "rev": lambda a, dimensions: np.flip(a, dimensions),
    "pad": _pad,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "select_n": _select,
    "split": _split,
    "iota": _iota,
}  # fmt: skip
