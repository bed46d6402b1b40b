"""A transformer of orrery's, all of it, in one file that needs torch and transformers only.

    from transformers import AutoModel
    model = AutoModel.from_pretrained(FOLDER, trust_remote_code=True)
    out = model(inputs_embeds=stream, token_type_ids=kinds)    # or input_ids=words
    out.last_hidden_state                                      # the stream behind the last block

With h the residual stream, `[batch, token, width]`, a block computes

    x      =  norm(h)                                              (or h itself)
    a^n    =  mixer(scale_n (W_Q^n x)(W_K^n x)^T, mask_n)          for every head n
    h      <- h + sum_n W_O^n a^n W_V^n x
    h      <- h + W_out (act(W_hidden x') * W_gate x'),  x' = norm(h)

There is no hidden 1 / sqrt(d): `scale_n` is part of the model. Head n lets token i look at token j
if low_n <= j - i <= high_n and both are of kinds that it acts on.

Weights are in `layers`, by the names of `model.safetensors`: `layers.0.heads.1.query`, `[rows,
width]`. `blocks` are the layers as they are applied, in order; where a looped transformer applies a
layer several times, several blocks use its weights. Blocks hold no weights, but one module for each
value inside that can be read or replaced by a forward hook, under the names that TransformerLens
has for the same value: `blocks.0.hook_resid_pre`, `blocks.0.attn.hook_pattern`. Where heads have
different numbers of rows, those values are filled up with zeros. With TransformerLens installed the
model is a `HookedRootModule`: `model.run_with_cache(inputs_embeds=stream)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

try:
    from transformer_lens import HookedRootModule
    from transformer_lens.hook_points import HookPoint
except ImportError:

    class HookPoint(nn.Module):
        """Gives back what it is given; a forward hook may look at it, or give another value."""

        def forward(self, value: Tensor) -> Tensor:
            """The value itself."""
            return value

    class HookedRootModule(nn.Module):
        """Nothing: there is no TransformerLens."""

        def setup(self) -> None:
            """Nothing to set up."""


class OrreryConfig(PretrainedConfig):
    """The shape of the model, and what its columns mean; its attributes are those of `config.json`.

    Attributes:
        hidden_size: columns of the stream.
        token_groups: names of the kinds of tokens; `token_type_ids` are places in this list.
        layers: the stored layers: heads, MLP and norms of each.
        order: which of them is applied, block by block.
        final_norm: a norm of the output, or None.
        tables: embedding, positions and readout of a language model, or None.
        clip: bound on every entry of the stream, enforced behind each block, or None.
        slots: {name: columns of the stream, and which tokens hold the value when}.
        places: {name of a value: its slots, tokens, layers and scale}, for inputs of the sizes of
            those in `example.safetensors`.
    """

    model_type = "orrery"


@dataclass
class OrreryOutput(ModelOutput):
    """What a model gives.

    Attributes:
        last_hidden_state: the stream behind the last block and the final norm.
        logits: of a language model, `[batch, token, word]`; see `OrreryModel.probabilities`.
        hidden_states: the stream in front of every block, then the last hidden state.
        attentions: weights between tokens, `[batch, head, query, key]`, of blocks with heads.
    """

    last_hidden_state: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


# Mixers: from scores `[batch, head, query, key]` and a mask (True where a query may look) to the
# weights of a sum over keys.


def linear(scores: Tensor, mask: Tensor) -> Tensor:
    """a_ij = s_ij."""
    return torch.where(mask, scores, 0)


def centred(scores: Tensor, mask: Tensor) -> Tensor:
    """a_ij = s_ij - mean_j s_ij."""
    count = mask.sum(-1, keepdim=True).clamp(min=1)
    mean = torch.where(mask, scores, 0).sum(-1, keepdim=True) / count
    return torch.where(mask, scores - mean, 0)


def softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """a_ij = exp(s_ij) / sum_j exp(s_ij); 0 for a query without keys."""
    highest = scores.detach().masked_fill(~mask, -torch.inf).amax(-1, keepdim=True)
    shift = torch.where(highest.isfinite(), highest, 0)
    weights = torch.where(mask, torch.exp(torch.where(mask, scores - shift, 0)), 0)
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total > 0, total, 1)


def transposed_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """a_ij = exp(s_ij) / sum_i exp(s_ij): the weights of one key sum to one over queries."""
    return softmax(scores.mT, mask.mT).mT


#: The scores of mesa heads are their weights.
MIXERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": linear,
    "centred": centred,
    "softmax": softmax,
    "transposed_softmax": transposed_softmax,
    "mesa": linear,
}


def mesa(
    query: Tensor,
    key: Tensor,
    ridge: Tensor,
    enters: Tensor | None = None,
    keeps: Tensor | None = None,
    loses: Tensor | None = None,
) -> Tensor:
    """The weights of in-context ridge regression, `[batch, head, t, s]`, 0 for s > t.

        a_ts = w_ts k_s . (H_t + ridge)^-1 q_t,     H_t = sum_{s <= t} w_ts k_s k_s^T

    where w_ts is the input gate of s times the forget gates behind it, up to t. In float64, by
    orthogonal factors of the data, row by row: rows (sqrt(w) k_s | sqrt(w) e_s) and (sqrt(ridge) |
    0), with unit vectors e_s, are kept as Q^T of them, [R | Z], so that a_t = Z^T R^-T q_t. The
    ridge does not decay: what a forget gate takes from it is added again.

    Args:
        query, key: `[batch, time, head, dim]`.
        ridge: `[head]`, above 0.
        enters, keeps, loses: square roots of the input gate, of the forget gate and of one minus
            it, `[batch, time, head]`; None for a gate of one.
    """
    batch, time, heads, dim = query.shape
    q, k = query.double().transpose(1, 2), key.double().transpose(1, 2)
    units = torch.eye(time, dtype=k.dtype, device=k.device).expand(batch, heads, time, time)
    if enters is not None:
        gate = enters.double().transpose(1, 2)[..., None]
        k, units = gate * k, gate * units
    root = ridge.double().sqrt()[:, None, None] * torch.eye(dim, dtype=k.dtype, device=k.device)
    start = functional.pad(root, (0, time)).expand(batch, heads, dim, dim + time)
    rows, found = start, []
    for t in range(time):
        pair = torch.cat([k[:, :, t], units[:, :, t]], -1)[:, :, None]
        parts = [pair, rows]
        if keeps is not None and loses is not None:
            kept, lost = (g.double()[:, t, :, None, None] for g in (keeps, loses))
            parts = [pair, kept * rows, lost * start]
        stacked = torch.cat(parts, 2)
        orthogonal, upper = torch.linalg.qr(stacked[..., :dim])
        right = orthogonal.mT @ stacked[..., dim:]
        solved = torch.linalg.solve_triangular(upper.mT, q[:, :, t, :, None], upper=False)
        found.append((right.mT @ solved)[..., 0])
        rows = torch.cat([upper, right], -1)
    return torch.stack(found, 2).to(query.dtype)


def gelu_derivative(u: Tensor) -> Tensor:
    """d gelu(u) / du of u (1 + tanh w(u)) / 2 with w(u) = sqrt(2 / pi) (u + 0.044715 u^3)."""
    slope = math.sqrt(2 / math.pi)
    t = torch.tanh(slope * (u + 0.044715 * u**3))
    return (1 + t) / 2 + u * (1 - t**2) * slope * (1 + 3 * 0.044715 * u**2) / 2


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda u: u,
    "relu": torch.relu,
    "gelu": lambda u: functional.gelu(u, approximate="tanh"),
    "tanh": torch.tanh,
    "square": torch.square,
    "relu_derivative": lambda u: (u > 0).to(u.dtype),
    "gelu_derivative": gelu_derivative,
}


# Weights, as they are stored.


def parameter(*shape: int) -> nn.Parameter:
    """Weights to be loaded."""
    return nn.Parameter(torch.zeros(shape))


class Head(nn.Module):
    """The weights of one head: query, key, value `[rows, width]`, output `[width, rows]`.

    With biases, `query_bias` and so on, `[rows]`. The weights of attention of a head with a factor
    are multiplied by (factor_query x_i) . (factor_key x_j). A mesa head has the logarithm of its
    ridge, and perhaps gates, sigmoid(input_gate . x + input_gate_bias) and forget_gate likewise.
    Its wiring is no parameter: the scale of its scores, its window (low, high), and which kinds of
    tokens it acts at, attends to, and attends to at any distance.
    """

    def __init__(self, shape: Mapping[str, Any], width: int, kinds: int) -> None:
        super().__init__()
        rows = {"query": shape["key_dim"], "key": shape["key_dim"], "value": shape["value_dim"]}
        if shape["factor_dim"]:
            rows |= {"factor_query": shape["factor_dim"], "factor_key": shape["factor_dim"]}
        for name, size in rows.items():
            self.register_parameter(name, parameter(size, width))
            if shape["bias"]:
                self.register_parameter(f"{name}_bias", parameter(size))
        self.output = parameter(width, shape["value_dim"])
        if shape["mixer"] == "mesa":
            self.log_regularization = parameter()
        if shape["gates"]:
            for name in ("input_gate", "forget_gate"):
                self.register_parameter(name, parameter(width))
                self.register_parameter(f"{name}_bias", parameter())
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("window", torch.zeros(2, dtype=torch.int32))
        for name in ("query_groups", "key_groups", "sink_groups"):
            self.register_buffer(name, torch.zeros(kinds, dtype=torch.bool))


class MlpWeights(nn.Module):
    """hidden and gate `[units, width]`, output `[width, units]`, and their biases."""

    def __init__(self, shape: Mapping[str, Any], width: int) -> None:
        super().__init__()
        maps = {"hidden": (shape["hidden"], width), "output": (width, shape["hidden"])}
        if shape["gated"]:
            maps["gate"] = (shape["hidden"], width)
        for name, size in maps.items():
            self.register_parameter(name, parameter(*size))
            if shape["bias"]:
                self.register_parameter(f"{name}_bias", parameter(size[0]))


class NormWeights(nn.Module):
    """A gain, and for kind "layer" an offset, of the columns that are normalised; or nothing."""

    def __init__(self, shape: Mapping[str, Any], width: int) -> None:
        super().__init__()
        size = width if shape["read"] is None else shape["read"][1] - shape["read"][0]
        if shape["affine"]:
            self.gain = parameter(size)
            if shape["kind"] == "layer":
                self.offset = parameter(size)


class Layer(nn.Module):
    """The weights of one layer."""

    def __init__(self, shape: Mapping[str, Any], width: int, kinds: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(Head(head, width, kinds) for head in shape["heads"])
        if shape["output_bias"]:
            self.output_bias = parameter(width)
        for name in ("norm", "mlp_norm"):
            if shape[name] is not None:
                self.add_module(name, NormWeights(shape[name], width))
        if shape["mlp"] is not None:
            self.mlp = MlpWeights(shape["mlp"], width)


class Tables(nn.Module):
    """Of a language model: embedding and readout `[word, width]`, position `[place, width]`."""

    def __init__(self, shape: Mapping[str, Any], width: int) -> None:
        super().__init__()
        self.embedding = parameter(shape["embedding"], width)
        if shape["positions"]:
            self.position = parameter(shape["positions"], width)
        if not shape["tied"]:
            self.readout = parameter(shape["readout"], width)


def joined(heads: Sequence[Head], name: str, *shape: int) -> Tensor:
    """The weights `name` of all heads, `[head, *shape]`: zero where a head has less, or none."""
    found = []
    for head in heads:
        own = getattr(head, name, None)
        own = head.output.new_zeros(shape) if own is None else own
        gaps = [gap for n in reversed(range(own.ndim)) for gap in (0, shape[n] - own.shape[n])]
        found.append(functional.pad(own, gaps) if any(gaps) else own)
    return torch.stack(found)


# Blocks: what is computed, with a module for every value.


class Norm(nn.Module):
    """Mean 0 (kind "layer") and root mean square 1, times a gain, plus an offset."""

    def __init__(self, shape: Mapping[str, Any], token_groups: Sequence[str]) -> None:
        super().__init__()
        self.shape, self.kinds = shape, acting(shape["tokens"], token_groups)
        self.hook_scale, self.hook_normalized = HookPoint(), HookPoint()

    def forward(self, weights: NormWeights, v: Tensor) -> Tensor:
        """`v`, normalised along its last axis."""
        if self.shape["kind"] == "layer":
            v = v - v.mean(-1, keepdim=True)
        size = torch.sqrt(v.square().mean(-1, keepdim=True) + self.shape["eps"])
        v = v / self.hook_scale(size)
        v = v * weights.gain if hasattr(weights, "gain") else v
        v = v + weights.offset if hasattr(weights, "offset") else v
        return self.hook_normalized(v)

    def apply_to(
        self, weights: NormWeights, stream: Tensor, groups: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(the stream, what the next part of the block reads).

        A norm of some columns adds them, normalised, to other columns of the stream.
        """
        if self.shape["read"] is None or self.shape["write"] is None:
            return stream, self(weights, stream)
        (first, last), (start, end) = self.shape["read"], self.shape["write"]
        normed = only(self.kinds, groups, self(weights, stream[..., first:last]))
        stream = stream + functional.pad(normed, (start, stream.shape[-1] - end))
        return stream, stream


class Attention(nn.Module):
    """The heads of a block.

    Values by name, of all heads: `hook_q`, `hook_k`, `hook_v` `[batch, token, head, rows]`;
    `hook_scores`, before mask and mixer; `hook_pattern`, the weights of the sum over keys,
    `[batch, head, query, key]`; `hook_z`, that sum of values; `hook_result`, what each head writes,
    `[batch, token, head, width]`.
    """

    def __init__(self, shape: Mapping[str, Any]) -> None:
        super().__init__()
        shapes = shape["heads"]
        self.sizes = {
            part: max(head[f"{part}_dim"] for head in shapes) for part in ("key", "value", "factor")
        }
        self.by_mixer: dict[str, list[int]] = {}
        for number, head in enumerate(shapes):
            self.by_mixer.setdefault(head["mixer"], []).append(number)
        order = [number for numbers in self.by_mixer.values() for number in numbers]
        self.back = sorted(range(len(order)), key=order.__getitem__)
        self.factored = [bool(head["factor_dim"]) for head in shapes]
        self.gated = [bool(head["gates"]) for head in shapes]
        for name in ("q", "k", "v", "scores", "pattern", "z", "result"):
            self.add_module(f"hook_{name}", HookPoint())

    def forward(self, heads: Sequence[Head], x: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
        """(what all heads write `[batch, token, width]`, their weights between tokens)."""
        q = self.hook_q(self.rows(heads, "query", x, self.sizes["key"]))
        k = self.hook_k(self.rows(heads, "key", x, self.sizes["key"]))
        v = self.hook_v(self.rows(heads, "value", x, self.sizes["value"]))
        mask = visible(heads, groups)
        parts = []
        for mixer, own in self.by_mixer.items():
            if mixer == "mesa":
                parts.append(self.regress(heads, own, q, k, x, groups))
            else:
                parts.append(torch.einsum("bqnk,btnk->bnqt", q[:, :, own], k[:, :, own]))
        scores = torch.cat(parts, 1)[:, self.back]
        scores = self.hook_scores(scores * joined(heads, "scale")[:, None, None])
        parts = [MIXERS[m](scores[:, own], mask[:, own]) for m, own in self.by_mixer.items()]
        pattern = torch.cat(parts, 1)[:, self.back]
        if any(self.factored):
            left = self.rows(heads, "factor_query", x, self.sizes["factor"])
            right = self.rows(heads, "factor_key", x, self.sizes["factor"])
            factor = torch.einsum("bqnf,btnf->bnqt", left, right)
            factored = torch.tensor(self.factored, device=x.device)[:, None, None]
            pattern = pattern * torch.where(factored, factor, 1)
        pattern = self.hook_pattern(pattern)
        z = self.hook_z(torch.einsum("bnqt,btnv->bqnv", pattern, v))
        output = joined(heads, "output", x.shape[-1], self.sizes["value"])
        result = self.hook_result(torch.einsum("bqnv,nhv->bqnh", z, output))
        return result.sum(2), pattern

    def rows(self, heads: Sequence[Head], name: str, x: Tensor, size: int) -> Tensor:
        """W x + b of every head, `[batch, token, head, size]`."""
        weight = joined(heads, name, size, x.shape[-1])
        return torch.einsum("bth,nkh->btnk", x, weight) + joined(heads, f"{name}_bias", size)

    def regress(
        self, heads: Sequence[Head], own: list[int], q: Tensor, k: Tensor, x: Tensor, groups: Tensor
    ) -> Tensor:
        """The weights of mesa heads. A token that one does not attend to has key 0."""
        mine = [heads[n] for n in own]
        seen = kinds_of(mine, "key_groups", groups).transpose(1, 2)
        key = torch.where(seen[..., None], k[:, :, own], 0)
        ridge = joined(mine, "log_regularization").exp()
        if not any(self.gated[n] for n in own):
            return mesa(q[:, :, own], key, ridge)
        gated = torch.tensor([self.gated[n] for n in own], device=x.device)
        enters, keeps = (
            torch.einsum("bth,nh->btn", x, joined(mine, name, x.shape[-1]))
            + joined(mine, f"{name}_bias")
            for name in ("input_gate", "forget_gate")
        )
        # roots of sigmoids by their logarithms, which no gate rounds to infinity
        enters, loses, keeps = (
            torch.exp(functional.logsigmoid(u.double()) / 2) for u in (enters, -keeps, keeps)
        )
        enters = torch.where(gated, enters, 1)
        forgets = gated & seen
        keeps, loses = torch.where(forgets, keeps, 1), torch.where(forgets, loses, 0)
        return mesa(q[:, :, own], key, ridge, enters, keeps, loses)


class Mlp(nn.Module):
    """`hook_pre`, `hook_pre_linear` of a gate, and `hook_post`, the hidden units behind both."""

    def __init__(self, shape: Mapping[str, Any], token_groups: Sequence[str]) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[shape["activation"]]
        self.kinds = acting(shape["tokens"], token_groups)
        self.hook_pre, self.hook_post = HookPoint(), HookPoint()
        if shape["gated"]:
            self.hook_pre_linear = HookPoint()

    def forward(self, weights: MlpWeights, x: Tensor, groups: Tensor) -> Tensor:
        """What the MLP writes, `[batch, token, width]`; 0 at kinds of tokens where it is not."""

        def affine(name: str, x: Tensor) -> Tensor:
            return functional.linear(
                x, getattr(weights, name), getattr(weights, f"{name}_bias", None)
            )

        u = self.activation(self.hook_pre(affine("hidden", x)))
        if hasattr(weights, "gate"):
            u = u * self.hook_pre_linear(affine("gate", x))
        return only(self.kinds, groups, affine("output", self.hook_post(u)))


class Block(nn.Module):
    """A layer as it is applied."""

    def __init__(self, shape: Mapping[str, Any], token_groups: Sequence[str], clip: Any) -> None:
        super().__init__()
        self.clip = clip
        self.hook_resid_pre = HookPoint()
        if shape["norm"] is not None:
            self.ln1 = Norm(shape["norm"], token_groups)
        if shape["heads"]:
            self.attn, self.hook_attn_out = Attention(shape), HookPoint()
        self.hook_resid_mid = HookPoint()
        if shape["mlp"] is not None:
            if shape["mlp_norm"] is not None:
                self.ln2 = Norm(shape["mlp_norm"], token_groups)
            self.mlp, self.hook_mlp_out = Mlp(shape["mlp"], token_groups), HookPoint()
        self.hook_resid_post = HookPoint()

    def forward(
        self, layer: Layer, stream: Tensor, groups: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(the stream in front of the block, behind it, the weights between tokens)."""
        before, pattern = self.hook_resid_pre(stream), None
        stream = x = before
        if hasattr(self, "ln1"):
            stream, x = self.ln1.apply_to(layer.norm, stream, groups)
        if hasattr(self, "attn"):
            update, pattern = self.attn(list(layer.heads), x, groups)
            if hasattr(layer, "output_bias"):
                update = update + layer.output_bias
            stream = stream + self.hook_attn_out(update)
        stream = x = self.hook_resid_mid(stream)
        if hasattr(self, "mlp"):
            if hasattr(self, "ln2"):
                stream, x = self.ln2.apply_to(layer.mlp_norm, stream, groups)
            stream = stream + self.hook_mlp_out(self.mlp(layer.mlp, x, groups))
        if self.clip is not None:
            stream = stream.clamp(-self.clip, self.clip)
        return before, self.hook_resid_post(stream), pattern


def visible(heads: Sequence[Head], groups: Tensor) -> Tensor:
    """Which keys a query sees, `[batch, head, query, key]`; sinks are seen at any distance."""
    tokens = torch.arange(groups.shape[-1], device=groups.device)
    offset = tokens[None, :] - tokens[:, None]
    low, high = joined(heads, "window", 2)[:, :, None, None].unbind(1)
    near = (low <= offset) & (offset <= high)
    acts, seen, sinks = (
        kinds_of(heads, f"{name}_groups", groups) for name in ("query", "key", "sink")
    )
    return acts[..., :, None] & (near & seen[..., None, :] | sinks[..., None, :])


def kinds_of(heads: Sequence[Head], name: str, groups: Tensor) -> Tensor:
    """Whether each token is of the kinds that `name` lists, `[batch, head, token]`."""
    return torch.stack([getattr(head, name) for head in heads])[:, groups].transpose(0, 1)


def acting(tokens: Sequence[str] | None, token_groups: Sequence[str]) -> list[bool] | None:
    """Whether a part acts at each kind of token; None where it acts at all of them."""
    return None if tokens is None else [group in tokens for group in token_groups]


def only(kinds: list[bool] | None, groups: Tensor, update: Tensor) -> Tensor:
    """`update` at tokens of these kinds, 0 elsewhere."""
    if kinds is None:
        return update
    acts = torch.tensor(kinds, device=groups.device)[groups]
    return torch.where(acts[..., None], update, 0)


class OrreryModel(PreTrainedModel, HookedRootModule):
    """Maps a residual stream to itself; the module has the equations."""

    config_class = OrreryConfig
    main_input_name = "inputs_embeds"

    def __init__(self, config: OrreryConfig) -> None:
        super().__init__(config)
        self.is_caching, self.context_level = False, 0  # of a HookedRootModule
        width, kinds = config.hidden_size, config.token_groups
        if config.tables is not None:
            self.tokens = Tables(config.tables, width)
            self.hook_embed, self.hook_pos_embed = HookPoint(), HookPoint()
        self.layers = nn.ModuleList(Layer(shape, width, len(kinds)) for shape in config.layers)
        self.blocks = nn.ModuleList(
            Block(config.layers[number], kinds, config.clip) for number in config.order
        )
        if config.final_norm is not None:
            self.final_norm = NormWeights(config.final_norm, width)
            self.ln_final = Norm(config.final_norm, kinds)
        self.setup()
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Weights are loaded."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> OrreryOutput | tuple[Any, ...]:
        """Run the model.

        Args:
            input_ids: words of a language model, `[batch, token]`; or instead
            inputs_embeds: the stream in front of the first block, `[batch, token, width]`.
            token_type_ids: the kind of every token, `[token]` or `[batch, token]`; may be left out
                where there is one kind only.
            attention_mask: ones, if anything: what a head sees follows from the kinds of tokens.
            output_hidden_states, output_attentions: also give these; see `OrreryOutput`.
            return_dict: False gives a tuple.

        Raises:
            ValueError: there is not exactly one of the inputs, or a shape or a number does not fit.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, one of them")
        if attention_mask is not None and not bool((attention_mask == 1).all()):
            raise ValueError(
                "attention_mask holds other numbers than 1: what a head sees follows from "
                f"token_type_ids, one of {self.config.token_groups} a token"
            )
        stream = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        if stream.ndim != 3 or stream.shape[-1] != self.config.hidden_size:
            raise ValueError(
                f"inputs_embeds has shape {tuple(stream.shape)}, must be [batch, token, "
                f"{self.config.hidden_size}]"
            )
        groups = self._kinds(token_type_ids, stream)
        states, patterns = [], []
        for number, block in zip(self.config.order, self.blocks, strict=True):
            before, stream, pattern = block(self.layers[number], stream, groups)
            states.append(before)
            patterns += [] if pattern is None else [pattern]
        if self.config.final_norm is not None:
            stream = self.ln_final(self.final_norm, stream)
        states.append(stream)
        wanted = output_hidden_states or self.config.output_hidden_states
        out = OrreryOutput(
            last_hidden_state=stream,
            logits=None if self.config.tables is None else self.scores(stream),
            hidden_states=tuple(states) if wanted else None,
            attentions=tuple(patterns) if output_attentions else None,
        )
        return out.to_tuple() if return_dict is False else out

    def embed(self, input_ids: Tensor) -> Tensor:
        """The stream of words: a row of the embedding, and one for the place."""
        if self.config.tables is None:
            raise ValueError("input_ids: the model has no embedding, give inputs_embeds")
        words, places = (self.config.tables[name] for name in ("embedding", "positions"))
        if input_ids.ndim != 2 or bool(((input_ids < 0) | (input_ids >= words)).any()):
            raise ValueError(f"input_ids must be [batch, token] numbers from 0 to {words - 1}")
        stream = self.hook_embed(self.tokens.embedding[input_ids])
        if not places:
            return stream
        if input_ids.shape[1] > places:
            raise ValueError(
                f"input_ids has {input_ids.shape[1]} tokens, the model {places} positions"
            )
        return stream + self.hook_pos_embed(self.tokens.position[: input_ids.shape[1]])

    def scores(self, stream: Tensor) -> Tensor:
        """Products of the final stream with the rows of the readout (the embedding, if tied)."""
        tied = self.config.tables["tied"]
        return functional.linear(stream, self.tokens.embedding if tied else self.tokens.readout)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Of words: the softmax of their scores, or the shares of the positive ones."""
        if self.config.tables["probabilities"] == "softmax":
            return logits.softmax(-1)
        logits = logits.clamp(min=0)
        total = logits.sum(-1, keepdim=True)
        return logits / torch.where(total > 0, total, 1)

    def stream_of(self, **values: Tensor) -> Tensor:
        """The stream whose slots hold these values, `[batch, token, size]`, and 0 elsewhere.

        Slots of tokens of different kinds may share columns, and so values are added: each must be
        0 at tokens that do not own it. A name with spaces is given as `**{"a name": value}`.
        """
        parts = []
        for name, value in values.items():
            if name not in self.config.slots:
                raise ValueError(f"no slot {name!r}, must be one of {list(self.config.slots)}")
            start, stop = self.config.slots[name]["columns"]
            if value.shape[-1] != stop - start:
                raise ValueError(f"{name}: {value.shape[-1]} columns, must be {stop - start}")
            parts.append(functional.pad(value, (start, self.config.hidden_size - stop)))
        return sum(parts[1:], parts[0])

    def read(self, hidden_states: Sequence[Tensor], name: str) -> Tensor:
        """A value of the algorithm, `[batch, ...]`, from the streams of all layers.

        Entry [..., k] is scale * hidden_states[layer][:, token, column k of slot], for the layers,
        tokens and slots of `config.places[name]`. These are for inputs of the sizes of the example.
        """
        if name not in self.config.places:
            raise ValueError(f"no value {name!r}, must be one of {list(self.config.places)}")
        place, streams = self.config.places[name], torch.stack(list(hidden_states), 1)
        axes = (place[axis] for axis in ("layers", "tokens", "columns"))
        index = (torch.tensor(axis, device=streams.device) for axis in axes)
        layer, token, column = torch.broadcast_tensors(*index)
        return place["scale"] * streams[:, layer, token, column]

    def _kinds(self, token_type_ids: Tensor | None, stream: Tensor) -> Tensor:
        names, (batch, count, _) = self.config.token_groups, stream.shape
        if token_type_ids is None:
            if len(names) > 1:
                raise ValueError(f"token_type_ids must say which of {names} each token is")
            token_type_ids = torch.zeros(count, dtype=torch.long, device=stream.device)
        groups = token_type_ids if token_type_ids.ndim > 1 else token_type_ids[None]
        if tuple(groups.shape) not in ((1, count), (batch, count)):
            shape = tuple(token_type_ids.shape)
            raise ValueError(
                f"token_type_ids has shape {shape}, must be [{count}] or [{batch}, {count}]"
            )
        if bool(((groups < 0) | (groups >= len(names))).any()):
            raise ValueError(f"token_type_ids must be 0 to {len(names) - 1}, one of {names}")
        return groups.long()
