"""Files of weights, and the layouts in which other projects keep attention.

`read_arrays` reads safetensors, npz, and, where torch is there, its files by `weights_only`:
nothing is unpickled and no code of a file runs. `to_named` puts the arrays under the documented
names of `constructions.interchange.named_weights`. The layouts:

    names    the documented names themselves; of a model folder that orrery wrote, which holds what
             heads see as well, matrices are [rows, width]
    stacked  W_Q, W_K, W_V [(layer,) head, width, rows] and W_O [(layer,) head, rows, width], or
             matrices [width, head * rows] of heads side by side; q_proj.weight and so on likewise
    fused    queries, keys and values as one matrix [width, 3 * head * rows] (qkv, c_attn,
             in_proj_weight), and one matrix back
    haiku    MODULE/query, key, value (/w) [width, head * rows] and MODULE/linear [head * rows,
             width], MODULE being multi_head_attention, or layer_0, layer_1, ...: the public code
             of von Oswald et al. 2022, arXiv 2212.07677

What a torch `Linear` keeps, [out, in], is known by its name (`.weight`, `in_proj_weight`) or by its
shape. Each layout holds attention alone; norms and MLPs have documented names only.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from synthetic.files import RunError
from synthetic.fitting.weights_file import read_safetensors

LAYOUTS = ("names", "stacked", "fused", "haiku")
SCORES = ("plain", "scaled")
TORCH = (".pt", ".pth", ".bin")

_HAIKU = re.compile(
    r"(?P<module>.*?(?:multi_head_attention(?:_\d+)?|layer_(?P<layer>\d+)))/"
    r"(?P<part>query|key|value|linear)(?:/(?P<kind>w|b))?"
)
_STACKED = re.compile(
    r"(?:(?P<module>.*?)[./])?(?:(?P<kind>[Wb])_?(?P<part>[QKVO])|(?P<name>[qkvo]|out)_proj)"
    r"(?:[./](?P<array>weight|bias))?"
)
_FUSED = re.compile(
    r"(?:(?P<module>.*?)[./])?(?:(?P<qkv>qkv(?:_proj)?|Wqkv|to_qkv|c_attn|in_proj)|"
    r"(?:out_proj|o_proj|c_proj|to_out|proj|out))(?:[._/](?P<array>weight|bias|w|b|kernel))?"
)
#: Masks that modules keep beside their weights.
_BUFFERS = re.compile(r"(?:.*[./])?(?:mask|IGNORE|(?:masked_)?bias_mask)")
_PARTS = {"Q": "query", "K": "key", "V": "value", "O": "output", "out": "output"}


def read_arrays(path: str | PathLike[str]) -> dict[str, np.ndarray]:
    """The arrays of a file by their names; never unpickles.

    Raises:
        ValueError: it cannot be read, is of another kind, or holds something else than arrays.
    """
    path = Path(path)
    readers = {".safetensors": lambda path: read_safetensors(path)[0], ".npz": _read_npz}
    readers |= dict.fromkeys(TORCH, _read_torch)
    if path.suffix not in readers:
        kinds = ", ".join(readers)
        raise RunError(f"{path}: must end in {kinds}; other formats, such as pickles, are not read")
    arrays = readers[path.suffix](path)
    for name in arrays:
        if not name.isprintable():  # it would break the line of every message about it
            raise RunError(f"{path}: an array is called {name!r}, must be printable characters")
    return arrays


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    import zipfile

    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, zipfile.BadZipFile, EOFError, AttributeError) as error:
        said = "holds objects, which only unpickling reads" if "pickle" in str(error) else error
        raise RunError(f"{path}: no npz file of arrays: {said}") from error


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    import pickle

    if not path.is_file():
        raise RunError(f"{path}: cannot be read: no such file")
    try:
        torch: Any = importlib.import_module("torch")
    except ImportError:
        raise RunError(
            f"{path}: torch reads it, and is not installed; save the weights as safetensors or npz"
        ) from None
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        said = str(error).strip().partition("\n")[0]
        raise RunError(
            f"{path}: holds more than tensors, or is no file of torch's ({said}); save "
            "module.state_dict()"
        ) from error
    arrays: dict[str, np.ndarray] = {}

    def flatten(name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                flatten(f"{name}.{key}" if name else str(key), inner)
        elif isinstance(value, torch.Tensor):
            value = value.detach()
            half = value.dtype in (torch.bfloat16, torch.float16)
            arrays[name] = (value.float() if half else value).numpy()
        else:
            kind = type(value).__name__
            raise RunError(
                f"{path}: {name or 'the file'} is a {kind}, must be tensors by name: save "
                "module.state_dict()"
            )

    flatten("", found)
    return arrays


def flat(arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Arrays nested in dictionaries, as haiku keeps them, under names joined by "/"."""
    found: dict[str, np.ndarray] = {}
    for name, value in arrays.items():
        if isinstance(value, Mapping):
            found |= {f"{name}/{key}": array for key, array in flat(value).items()}
        else:
            found[str(name)] = np.asarray(value)
    return found


def layout_of(arrays: Mapping[str, Any], where: str) -> str:
    """The layout that the names of arrays are of.

    Raises:
        ValueError: none, in one line with some of the names.
    """
    marks: dict[str, Callable[[str], Any]] = {
        "names": re.compile(r"layers\.\d+\.(heads\.\d+|mlp|norm|mlp_norm)\.\w+").fullmatch,
        "haiku": _HAIKU.fullmatch,
        "fused": lambda name: (m := _FUSED.fullmatch(name)) and m["qkv"],
        "stacked": _STACKED.fullmatch,
    }
    for layout, mark in marks.items():
        if any(mark(name) for name in arrays):
            return layout
    some = ", ".join(list(arrays)[:3]) or "nothing"
    raise ValueError(
        f"{where}: holds {some}, which are names of no known layout ({', '.join(LAYOUTS)}); the "
        "documented ones are layers.0.heads.0.query and so on"
    )


def to_named(
    arrays: Mapping[str, np.ndarray],
    width: int,
    *,
    layout: str | None = None,
    heads: int | None = None,
    scores: str | None = None,
    transposed: bool = False,
    where: str = "weights",
) -> dict[str, np.ndarray]:
    """Arrays of a layout under documented names.

    Args:
        arrays: by the names of the layout.
        width: of the stream.
        layout: one of `LAYOUTS`; None: as the names have it.
        heads: how many there are side by side, where shapes do not say.
        scores: "plain" or "scaled" by 1 / sqrt(rows), where the names do not say.
        transposed: matrices are kept as [out, in] although their names do not say so.
        where: what an error message begins with.

    Raises:
        ValueError: names or shapes that do not fit, or an option that is missing, in one line.
    """
    if scores not in (None, *SCORES):
        raise ValueError(f"scores is {scores!r}, must be one of {', '.join(SCORES)}")
    if layout not in (None, *LAYOUTS):
        raise ValueError(f"layout is {layout!r}, must be one of {', '.join(LAYOUTS)}")
    if heads is not None and heads < 1:
        raise ValueError(f"heads is {heads}, must be at least 1")
    layout = layout or layout_of(arrays, where)
    reader = _Reader(width, heads, transposed, where)
    if layout == "names":
        # a model folder of ours says what heads see, and keeps matrices as the model does
        turned = transposed != any(name.endswith(".window") for name in arrays)
        found = {
            name: np.swapaxes(a, -1, -2) if turned and _is_matrix(name, a) else a
            for name, a in arrays.items()
        }
    else:
        kept = {name: a for name, a in arrays.items() if not _BUFFERS.fullmatch(name)}
        found = {"stacked": reader.stacked, "fused": reader.fused, "haiku": reader.haiku}[layout](
            kept
        )
        if scores is None and layout != "haiku":
            raise ValueError(
                f"{where}: layout {layout}: --scores must say whether query . key is taken as it is"
                " (plain) or over the root of the rows of a head (scaled)"
            )
    if scores is not None:
        for name in [n for n in found if re.fullmatch(r"layers\.\d+\.heads\.\d+\.query", n)]:
            rows = np.shape(found[name])[-1]
            scale = np.asarray(1.0 if scores == "plain" else rows**-0.5, found[name].dtype)
            found[name.removesuffix("query") + "scale"] = scale
    return found


def _is_matrix(name: str, array: np.ndarray) -> bool:
    return array.ndim == 2 and not name.startswith("tokens.")


class _Reader:
    """Splits the matrices of a layout into heads."""

    def __init__(self, width: int, heads: int | None, transposed: bool, where: str) -> None:
        self.width, self.heads, self.transposed, self.where = width, heads, transposed, where
        self.found: dict[str, np.ndarray] = {}

    def fail(self, name: str, said: str) -> ValueError:
        return ValueError(f"{self.where}: {name}: {said}")

    def unknown(self, name: str, layout: str) -> ValueError:
        return self.fail(
            name,
            f"no part of attention in layout {layout}; norms, MLPs and embeddings are imported by "
            "documented names only",
        )

    def side_by_side(self, name: str) -> int:
        if self.heads is None:
            raise self.fail(name, "--heads must say how many heads stand side by side in it")
        return self.heads

    def put(self, layer: int, part: str, name: str, matrix: np.ndarray) -> None:
        """A matrix [width, head * rows], or [head * rows, width] of the output, head by head."""
        out = part == "output"
        if matrix.ndim != 2 or matrix.shape[out] != self.width:
            must = f"[head * rows, {self.width}]" if out else f"[{self.width}, head * rows]"
            said = f"shape {list(matrix.shape)}, must be {must}, y = x @ matrix"
            if matrix.ndim == 2 and matrix.shape[not out] == self.width:
                turn = "leave out" if self.transposed else "give"
                said += f"; it looks transposed: {turn} --transposed"
            raise self.fail(name, said)
        count = self.side_by_side(name)
        if matrix.shape[not out] % count:
            columns = matrix.shape[not out]
            raise self.fail(name, f"{columns} columns cannot be shared out over {count} heads")
        for n, own in enumerate(np.split(matrix, count, axis=not out)):
            self.found[f"layers.{layer}.heads.{n}.{part}"] = own

    def put_bias(self, layer: int, part: str, name: str, bias: np.ndarray) -> None:
        """A bias [head * rows], or [head, rows]; of the output [width]."""
        if part == "output":
            self.found[f"layers.{layer}.output_bias"] = bias
            return
        count = len(bias) if bias.ndim == 2 else self.side_by_side(name)
        if bias.size % count:
            raise self.fail(name, f"shape {list(bias.shape)} cannot be shared over {count} heads")
        for n, own in enumerate(bias.reshape(count, -1)):
            self.found[f"layers.{layer}.heads.{n}.{part}_bias"] = own

    def layer(self, name: str, module: str | None) -> int | None:
        """The number in the name of a module, None where it has none."""
        numbers = re.findall(r"(?:^|[./_])(\d+)(?=$|[./_])", module or "")
        if len(numbers) > 1:
            raise self.fail(name, "has several numbers, must have one, that of the layer")
        return int(numbers[0]) if numbers else None

    def haiku(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """`MODULE/layer_0/query/w`, [width, head * rows]."""
        roots = set()
        for name, array in arrays.items():
            match = _HAIKU.fullmatch(name)
            if match is None:
                raise self.unknown(name, "haiku")
            module = match["module"]
            roots.add(module.rpartition("/")[0])
            layer, part = int(match["layer"] or 0), match["part"].replace("linear", "output")
            if match["kind"] == "b":
                self.put_bias(layer, part, name, array)
            else:
                self.put(layer, part, name, array.T if self.transposed else array)
        if len(roots) > 1:
            raise ValueError(f"{self.where}: holds {len(roots)} models: {', '.join(sorted(roots))}")
        return self.found

    def stacked(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """`W_Q` and so on, with axes of layers and heads where they have them."""
        for name, array in arrays.items():
            match = _STACKED.fullmatch(name)
            if match is None:
                raise self.unknown(name, "stacked")
            letter = (match["part"] or match["name"]).replace("out", "O").upper()
            part, number = _PARTS[letter], self.layer(name, match["module"])
            linear = match["array"] is not None  # torch's, [out, in]
            bias = match["kind"] == "b" or match["array"] == "bias"
            own = 2 if bias else 3  # axes of the heads of one layer
            if bias and part == "output":
                own = 1
            many = array.ndim > own and number is None
            for n, one in enumerate(array if many else [array]):
                layer = n if many else number or 0
                if bias:
                    self.put_bias(layer, part, name, one)
                elif one.ndim == 3:
                    self._put_heads(layer, part, name, one)
                else:
                    self.put(layer, part, name, one.T if linear != self.transposed else one)
        return self.found

    def _put_heads(self, layer: int, part: str, name: str, matrices: np.ndarray) -> None:
        """`[head, width, rows]`, or `[head, rows, width]` of the output."""
        if self.transposed:
            matrices = np.swapaxes(matrices, 1, 2)
        axis = 2 if part == "output" else 1
        if matrices.shape[axis] != self.width:
            must = "rows, width" if axis == 2 else "width, rows"
            said = f"shape {list(matrices.shape)}, must be [head, {must}] with width {self.width}"
            if matrices.shape[3 - axis] == self.width:
                turn = "leave out" if self.transposed else "give"
                said += f"; it looks transposed: {turn} --transposed"
            raise self.fail(name, said)
        if self.heads not in (None, len(matrices)):
            raise self.fail(name, f"has {len(matrices)} heads, --heads says {self.heads}")
        for n, own in enumerate(matrices):
            self.found[f"layers.{layer}.heads.{n}.{part}"] = own

    def fused(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One matrix of queries, keys and values; which way round it is, its shape says."""
        turned: dict[int, bool] = {}
        matched = []
        for name, array in arrays.items():
            match = _FUSED.fullmatch(name)
            if match is None:
                raise self.unknown(name, "fused")
            layer = self.layer(name, match["module"]) or 0
            matched.append((name, array, layer, match))
            if match["qkv"] and array.ndim == 2:
                turned[layer] = self._turned(name, array)
        for name, array, layer, match in matched:
            if match["array"] in ("bias", "b"):
                parts = np.split(array, 3) if match["qkv"] and len(array) % 3 == 0 else [array]
                names = ("query", "key", "value") if match["qkv"] else ("output",)
                for part, own in zip(names, parts, strict=True):
                    self.put_bias(layer, part, name, own)
                continue
            matrix = array.T if turned.get(layer, self.transposed) else array
            if not match["qkv"]:
                self.put(layer, "output", name, matrix)
                continue
            if matrix.ndim != 2 or matrix.shape[1] % 3:
                shape = list(array.shape)
                raise self.fail(name, f"shape {shape}, must be [width, 3 * head * rows]")
            for part, own in zip(("query", "key", "value"), np.split(matrix, 3, 1), strict=True):
                self.put(layer, part, name, own)
        return self.found

    def _turned(self, name: str, array: np.ndarray) -> bool:
        """Whether a fused matrix is [3 * head * rows, width]."""
        fits = [array.shape[0] == self.width, array.shape[1] == self.width]
        if all(fits) or self.transposed:
            return self.transposed
        if not any(fits):
            raise self.fail(
                name,
                f"shape {list(array.shape)}, must be [{self.width}, 3 * head * rows] or its "
                f"transpose: the stream has {self.width} columns",
            )
        return fits[1]
