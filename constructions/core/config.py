"""The shape of a transformer, as frozen data: everything but the weights.

A `Config` fixes which arrays a `Transformer` has and their shapes (`Config.shapes`), so that
parameters can be counted, saved and loaded without building anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

Shapes = dict[str, Any]

#: Arrays that hold the wiring of a head; part of the model, but no training touches them.
WIRING = ("scale", "window", "query_groups", "key_groups", "sink_groups")


@dataclass(frozen=True)
class HeadsConfig:
    """A row of equal heads: `heads` of them, with `key_dim` and `value_dim` rows each.

    Mesa heads have an array more, the logarithm of each one's regularisation. With `gates` they
    weigh what enters and forget what they have, token by token,

        beta_t = sigmoid(input_gate . x_t + input_gate_bias),
        gamma_t = sigmoid(forget_gate . x_t + forget_gate_bias),
        H_t = gamma_t H_(t-1) + beta_t k_t k_t^T,    G_t = gamma_t G_(t-1) + beta_t v_t k_t^T

    (von Oswald et al. 2025, arXiv 2506.05233, eq. 5-10), with x what keys are made of. A token that
    a head does not attend to neither enters nor makes it forget.

    With `factor_dim` the weights a_ij that the mixer gives are multiplied by a second product,
    (factor_query x_i) . (factor_key x_j), of that many rows; neither scaled nor normalised.

    Raises:
        ValueError: `gates` of heads with another mixer than "mesa", or a factor of mesa heads.
    """

    mixer: str
    heads: int
    key_dim: int
    value_dim: int
    bias: bool = False
    gates: bool = False
    factor_dim: int = 0

    def __post_init__(self) -> None:
        if self.gates and self.mixer != "mesa":
            raise ValueError(f"gates is True and mixer {self.mixer!r}, must be 'mesa' with gates")
        if self.factor_dim and self.mixer == "mesa":
            raise ValueError(f"factor_dim is {self.factor_dim}, must be 0 for mesa heads")

    def shapes(self, width: int, token_groups: int) -> Shapes:
        """Shapes of one layer's arrays."""
        h, k, v = self.heads, self.key_dim, self.value_dim
        shapes: Shapes = {
            "query": (h, k, width),
            "key": (h, k, width),
            "value": (h, v, width),
            "output": (h, width, v),
            "scale": (h,),
            "window": (h, 2),
            "query_groups": (h, token_groups),
            "key_groups": (h, token_groups),
            "sink_groups": (h, token_groups),
        }
        if self.mixer == "mesa":
            shapes["log_regularization"] = (h,)
        if self.gates:
            shapes |= {"input_gate": (h, width), "input_gate_bias": (h,)}
            shapes |= {"forget_gate": (h, width), "forget_gate_bias": (h,)}
        if self.factor_dim:
            f = self.factor_dim
            shapes |= {"factor_query": (h, f, width), "factor_key": (h, f, width)}
            if self.bias:
                shapes |= {"factor_query_bias": (h, f), "factor_key_bias": (h, f)}
        if self.bias:
            shapes |= {"query_bias": (h, k), "key_bias": (h, k), "value_bias": (h, v)}
            shapes |= {"output_bias": (width,)}
        return shapes


@dataclass(frozen=True)
class MlpConfig:
    """A two-layer network at every token, or at tokens of some kinds only."""

    hidden: int
    activation: str = "relu"
    gated: bool = False
    bias: bool = False
    tokens: tuple[str, ...] | None = None

    def shapes(self, width: int) -> Shapes:
        """Shapes of one layer's arrays."""
        shapes: Shapes = {"hidden": (self.hidden, width), "output": (width, self.hidden)}
        if self.bias:
            shapes |= {"hidden_bias": (self.hidden,), "output_bias": (width,)}
        if self.gated:
            shapes |= {"gate": (self.hidden, width)}
            if self.bias:
                shapes |= {"gate_bias": (self.hidden,)}
        return shapes


@dataclass(frozen=True)
class NormConfig:
    """A normalisation, "layer" or "rms", of the whole stream or of some of its columns.

    Without `read` and `write` it normalises the whole stream for the heads (or the MLP) behind it
    and leaves the stream itself alone (pre-norm). With them it adds the normalised columns `read`
    to the columns `write`, each (start, stop), at tokens of the kinds `tokens`.
    """

    kind: str = "layer"
    eps: float = 1e-5
    affine: bool = False
    read: tuple[int, int] | None = None
    write: tuple[int, int] | None = None
    tokens: tuple[str, ...] | None = None

    def shapes(self, width: int) -> Shapes:
        """Shapes of one layer's arrays."""
        size = width if self.read is None else self.read[1] - self.read[0]
        if not self.affine:
            return {}
        return {"gain": (size,)} | ({"offset": (size,)} if self.kind == "layer" else {})


@dataclass(frozen=True)
class LayerConfig:
    """Norm, heads, norm, MLP; each of them may be absent."""

    heads: tuple[HeadsConfig, ...] = ()
    mlp: MlpConfig | None = None
    norm: NormConfig | None = None
    mlp_norm: NormConfig | None = None

    def shapes(self, width: int, token_groups: int) -> Shapes:
        """Shapes of one layer's arrays, nested like the parameter tree."""
        shapes: Shapes = {"heads": [h.shapes(width, token_groups) for h in self.heads]}
        for name in ("norm", "mlp_norm", "mlp"):
            part: MlpConfig | NormConfig | None = getattr(self, name)
            if part is not None:
                shapes[name] = part.shapes(width)
        return shapes


@dataclass(frozen=True)
class SegmentConfig:
    """A pattern of layers that is repeated, with weights of its own each time or `tied` ones."""

    pattern: tuple[LayerConfig, ...]
    repeats: int = 1
    tied: bool = False

    @property
    def stacked(self) -> int:
        """How many copies of the pattern's weights are stored."""
        return 1 if self.tied else self.repeats


@dataclass(frozen=True)
class TokensConfig:
    """Tables around the blocks of a language model; without them a model maps streams to streams.

    Attributes:
        embedding: rows of the table that turns token numbers into streams.
        positions: rows of the table that is added by position, 0 for none.
        readout: rows of the table whose products with the final stream are the scores of words.
        probabilities: how scores become those: their "softmax", or "shares" of their sum.
        tied: the embedding is the readout too, which is then no array of the model.

    Raises:
        ValueError: tied tables have other numbers of rows.
    """

    embedding: int
    readout: int
    positions: int = 0
    probabilities: str = "softmax"
    tied: bool = False

    def __post_init__(self) -> None:
        if self.tied and self.readout != self.embedding:
            raise ValueError(
                f"readout is {self.readout}, must be embedding={self.embedding} of tied tables"
            )

    def shapes(self, width: int) -> Shapes:
        """Shapes of the tables."""
        tables = {"embedding": self.embedding, "position": self.positions}
        if not self.tied:
            tables["readout"] = self.readout
        return {name: (rows, width) for name, rows in tables.items() if rows}


@dataclass(frozen=True)
class Config:
    """The shape of a `Transformer`.

    Attributes:
        width: columns of the residual stream.
        segments: run in order.
        token_groups: names of the kinds of tokens that heads can tell apart.
        final_norm: a norm of the output.
        tokens: the tables of a language model.
        precision: of every matrix product, "highest" or "default" (TF32 on recent GPUs).
        clip: bound on every entry of the stream, enforced after each layer; None for none. Deep
            linear attention is trained with one, as its updates are cubic and rare inputs explode.
    """

    width: int
    segments: tuple[SegmentConfig, ...]
    token_groups: tuple[str, ...] = ("token",)
    final_norm: NormConfig | None = None
    precision: str = "highest"
    tokens: TokensConfig | None = None
    clip: float | None = None

    def _repr_html_(self) -> str:
        from synthetic.display import settings_table

        return settings_table(self)

    @property
    def depth(self) -> int:
        """Number of layers applied."""
        return sum(s.repeats * len(s.pattern) for s in self.segments)

    def layers(self) -> Iterator[LayerConfig]:
        """The shape of every layer applied."""
        for segment in self.segments:
            for _ in range(segment.repeats):
                yield from segment.pattern

    def stored(self, number: int) -> tuple[int, int, int]:
        """(segment, position in its pattern, repeat) at which an applied layer, from 1, is stored.

        ValueError for a number that is not in 1..depth.
        """
        if not 1 <= number <= self.depth:
            raise ValueError(f"layer is {number}, must be in 1..{self.depth}")
        left = number - 1
        for s, segment in enumerate(self.segments):
            size = len(segment.pattern)
            if left < segment.repeats * size:
                return s, left % size, 0 if segment.tied else left // size
            left -= segment.repeats * size
        raise AssertionError("unreachable: every layer is in a segment")

    @property
    def max_heads(self) -> int:
        """The most heads that a layer has."""
        return max((sum(h.heads for h in layer.heads) for layer in self.layers()), default=0)

    @property
    def max_hidden(self) -> int:
        """The most hidden units that an MLP has."""
        return max((layer.mlp.hidden for layer in self.layers() if layer.mlp), default=0)

    def with_heads(self, key_dim: int, value_dim: int) -> Config:
        """The same shape with all heads of these sizes, as papers train them."""

        def widen(layer: LayerConfig) -> LayerConfig:
            heads = (replace(h, key_dim=key_dim, value_dim=value_dim) for h in layer.heads)
            return replace(layer, heads=tuple(heads))

        segments = (replace(s, pattern=tuple(map(widen, s.pattern))) for s in self.segments)
        return replace(self, segments=tuple(segments))

    @property
    def wide(self) -> Config:
        """The same shape with heads as wide as the stream."""
        return self.with_heads(self.width, self.width)

    def shapes(self) -> Shapes:
        """Shape of every array of the model, nested like its parameter tree.

        Arrays of a segment are stacked over its repeats, `[repeats, ...]` (1 if tied).
        """

        def stack(tree: Any, repeats: int) -> Any:
            if isinstance(tree, tuple):
                return (repeats, *tree)
            items = tree.items() if isinstance(tree, dict) else enumerate(tree)
            return {name: stack(value, repeats) for name, value in items}

        segments = {
            s: {
                "layers": {
                    p: stack(layer.shapes(self.width, len(self.token_groups)), segment.stacked)
                    for p, layer in enumerate(segment.pattern)
                }
            }
            for s, segment in enumerate(self.segments)
        }
        final = {"final_norm": self.final_norm.shapes(self.width)} if self.final_norm else {}
        tables = {"tokens": self.tokens.shapes(self.width)} if self.tokens else {}
        return {"segments": segments} | final | tables

    def to_json(self) -> dict[str, Any]:
        """A dictionary of numbers, strings and lists; `from_json` is its inverse."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Config:
        """Rebuild a config; raises TypeError or KeyError where `data` is not one."""

        def tuples(d: dict[str, Any], *names: str) -> dict[str, Any]:
            return d | {name: d[name] and tuple(d[name]) for name in names}

        def norm(d: dict[str, Any] | None) -> NormConfig | None:
            return None if d is None else NormConfig(**tuples(d, "read", "write", "tokens"))

        def mlp(d: dict[str, Any] | None) -> MlpConfig | None:
            return None if d is None else MlpConfig(**tuples(d, "tokens"))

        def layer(d: dict[str, Any]) -> LayerConfig:
            return LayerConfig(
                heads=tuple(HeadsConfig(**h) for h in d["heads"]),
                mlp=mlp(d["mlp"]),
                norm=norm(d["norm"]),
                mlp_norm=norm(d["mlp_norm"]),
            )

        segments = tuple(
            SegmentConfig(tuple(map(layer, s["pattern"])), s["repeats"], s["tied"])
            for s in data["segments"]
        )
        return cls(
            data["width"],
            segments,
            tuple(data["token_groups"]),
            norm(data["final_norm"]),
            data["precision"],
            TokensConfig(**data["tokens"]) if data.get("tokens") else None,
            data.get("clip"),
        )
