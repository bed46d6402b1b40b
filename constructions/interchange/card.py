"""The model card of an export: what is known of the model, as text in Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from constructions.certificate import Certificate
from constructions.core.compile import placed_heads
from constructions.core.config import Config
from constructions.core.program import Head, HeadFamily, Program
from constructions.family import Construction

#: Our sites, and the modules of an exported model that have the same values.
MODULES = {
    "residual": "hook_resid_pre",
    "attention": "attn.hook_pattern",
    "head_output": "attn.hook_result",
    "middle": "hook_resid_mid",
    "mlp_hidden": "mlp.hook_post",
}
_VALUES = {
    "hook_resid_pre": "the stream in front of the block, `[batch, token, width]`",
    "attn.hook_q": "queries, `[batch, token, head, rows]`; `hook_k` and `hook_v` likewise",
    "attn.hook_scores": "scale x query . key, before mask and mixer; of a mesa head its weights",
    "attn.hook_pattern": "the weights of the sum over keys, `[batch, head, query, key]`",
    "attn.hook_z": "that sum of values, `[batch, token, head, rows]`",
    "attn.hook_result": "what every head writes, `[batch, token, head, width]`",
    "hook_attn_out": "what all heads write",
    "hook_resid_mid": "the stream between heads and MLP",
    "mlp.hook_pre": "hidden units in front of the activation",
    "mlp.hook_post": "hidden units behind it, and behind the gate",
    "hook_mlp_out": "what the MLP writes",
    "hook_resid_post": "the stream behind the block",
}


def card(
    config: Mapping[str, Any],
    shape: Config,
    construction: Construction | None,
    example: Mapping[str, Sequence[int]],
    facts: Mapping[str, str],
    certificate: Certificate | None,
    own: bool,
) -> str:
    """The card.

    Args:
        config: of the export.
        shape: of the model.
        construction: whose task it solves, if any.
        example: shapes of what `example.safetensors` holds.
        facts: {title: text}.
        certificate: of the construction, where the weights are its own.
        own: whether they are.
    """
    name = type(construction).__name__ if construction else "Transformer"
    if construction is None:
        kind = "A transformer of the class that orrery's constructions and trained models share."
    elif own:
        kind = f"The hand-built transformer of the construction `{name}`: every weight is written."
    else:
        kind = f"A trained transformer, on the task of the construction `{name}`."
    ours = {module: site for site, module in MODULES.items()}
    sites = [(f"`{name}`", value, ours.get(name, "")) for name, value in _VALUES.items()]
    parts = [
        f"---\nlibrary_name: transformers\ntags:\n{_list(['orrery', 'interpretability'])}\n---",
        f"# {facts.get('name', name)}",
        f"{kind} {len(config['order'])} layers, at most {config['num_attention_heads']} heads in "
        f"one, {config['hidden_size']} columns, {config['dtype']}.",
        _list(f"**{title}**: {text}" for title, text in facts.items() if title != "name"),
        "## Use\n\n" + _use(config, example),
        "## Kinds of tokens\n\n" + _table(["number", "kind"], enumerate(config["token_groups"])),
    ]
    if construction is not None:
        parts += list(_known(config, shape, construction, certificate, own))
    parts += [
        "## Values inside, by name\n\nOf every block, such as `blocks.0.hook_resid_pre`. The names "
        "are those of TransformerLens where they mean the same; a value is read or replaced by a "
        "forward hook on the module of that name.\n\n"
        + _table(["module", "value", "site in orrery"], sites),
        "## Weights\n\nBy name in `model.safetensors`: `layers.L.heads.N.query`, `key` and `value` "
        "are `[rows, width]`, `output` is `[width, rows]`; `scale` multiplies the scores, there is "
        "no other factor. Blocks apply these layers, in order: "
        f"{', '.join(map(str, config['order']))}.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _use(config: Mapping[str, Any], example: Mapping[str, Sequence[int]]) -> str:
    shapes = _table(["array", "shape"], [(f"`{n}`", list(s)) for n, s in example.items()])
    value = next((n for n in ("prediction", *config["places"]) if n in config["places"]), None)
    read = f'model.read(out.hidden_states, "{value}")  # a named value' if value else ""
    tables = "model.probabilities(out.logits)  # of words" if config["tables"] else ""
    lines = [
        "```python",
        "from safetensors.torch import load_file",
        "from transformers import AutoModel",
        "",
        "model = AutoModel.from_pretrained(FOLDER, trust_remote_code=True)",
        'example = load_file(f"{FOLDER}/example.safetensors")',
        'kinds = example["token_type_ids"]',
        'out = model(inputs_embeds=example["inputs_embeds"], token_type_ids=kinds,',
        "            output_hidden_states=True)",
        'out.last_hidden_state - example["last_hidden_state"]  # rounding errors',
        *(line for line in (read, tables) if line),
        "```",
    ]
    return "\n".join(lines) + "\n\n`example.safetensors` holds\n\n" + shapes


def _known(
    config: Mapping[str, Any],
    shape: Config,
    construction: Construction,
    certificate: Certificate | None,
    own: bool,
) -> Iterator[str]:
    about = textwrap.shorten(repr(construction), 300)
    yield f"## The construction\n\n`{about}`\n\nIts task: `{construction.task!r}`."
    if certificate is not None:
        yield f"## The certificate\n\nThe weights against the algorithm.\n\n```\n{certificate}\n```"
    if not own:
        known = (
            "The slots of the embedding (layer 0) and the place of the prediction hold for every "
            "model of the task; the rest of these tables is the construction's."
            if config["slots"]
            else "Its columns are not those of the construction."
        )
        yield (
            "## What is not known\n\nThe weights were trained, or changed: what heads do, and what "
            f"columns hold between the first layer and the last, is not known. {known}"
        )
    if not config["slots"]:
        return
    rows = [
        (
            name,
            _columns(*slot["columns"]),
            ", ".join(slot["token_groups"] or ["all"]),
            f"{slot['born']} to {'the end' if slot['dies'] is None else slot['dies']}",
            slot["meaning"],
        )
        for name, slot in config["slots"].items()
    ]
    yield (
        "## Columns of the stream\n\nLayer 0 is the embedding, layer n what block n - 1 leaves. "
        "Slots of different tokens, or layers, may share columns.\n\n"
        + _table(["slot", "columns", "tokens", "layers", "holds"], rows)
    )
    if config["places"]:
        rows = [(name, *_place(place)) for name, place in config["places"].items()]
        yield (
            "## Where named values are\n\nOf inputs as large as the example's; the value is the "
            "factor times what stands there.\n\n"
            + _table(["value", "slot", "after layer", "tokens", "factor"], rows)
        )
    if own:
        yield from _heads(construction.program, shape)
        yield f"## The tableau\n\n```\n{construction.program}\n```"


def _place(place: Mapping[str, Any]) -> tuple[str, str, str, str]:
    slots = place["slots"]
    shown = slots[0] if len(slots) == 1 else f"{slots[0]} to {slots[-1]} ({len(slots)} slots)"
    return shown, _range(place["layers"]), _range(place["tokens"]), f"{place['scale']:g}"


def _range(numbers: Any) -> str:
    """Numbers as 3, or 0-5, or as a list."""
    found = np.unique(np.asarray(numbers, int))
    if len(found) > 1 and (np.diff(found) == 1).all():
        return f"{found[0]}-{found[-1]}"
    return textwrap.shorten(", ".join(map(str, found)), 60)


def _heads(program: Program, shape: Config) -> Iterator[str]:
    """Tables of the heads, and of what else layers have."""
    depth = program.depth
    heads, others = [], []
    for number, layer in enumerate(program.layers):
        blocks = _range(range(number, depth, len(program.layers)))
        layer_shape = next(s for n, s in enumerate(shape.layers()) if n == number)
        first = np.cumsum([0, *(row.heads for row in layer_shape.heads)])
        found = placed_heads(layer, layer_shape, f"layer {number + 1}")
        rows = {int(first[row]) + n: head for head, row, n in found}
        heads += [(blocks, n, *_head(rows[n])) for n in sorted(rows)]
        if layer.norm is not None:
            norm = layer.norm
            others.append((blocks, f"{norm.kind} norm", norm.read.name, norm.write.name))
        if layer.mlp is not None:
            mlp = layer.mlp
            read = dict.fromkeys(s.name for e in (mlp.hidden, mlp.gate) if e for s in e.terms)
            kind = f"{mlp.activation} MLP '{mlp.name}'{', gated' if mlp.gate else ''}"
            others.append((blocks, kind, ", ".join(read), ", ".join(s.name for s in mlp.write)))
    if heads:
        titles = ["block", "head", "name", "mixer", "reads", "writes", "at", "sees", "offsets"]
        yield "## What heads do\n\n" + _table(titles, heads)
    if others:
        titles = ["block", "part", "reads", "writes"]
        yield "## Norms and MLPs\n\n" + _table(titles, others)


def _head(head: Head) -> tuple[str, ...]:
    read = {part: [slot.name for _, slot, _ in found] for part, found in _by_part(head).items()}
    shown = "; ".join(f"{part}: {', '.join(dict.fromkeys(names))}" for part, names in read.items())
    low, high = ("any" if bound is None else str(bound) for bound in head.window)
    return (
        head.name,
        head.mixer,
        shown or "constants",
        ", ".join(slot.name for slot in head.writes()),
        ", ".join(head.queries or ["all"]),
        ", ".join([*(head.keys or ["all"]), *head.sinks]),
        low if low == high else f"{low} to {high}",
    )


def _by_part(head: Head | HeadFamily) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for read in head.reads():
        found.setdefault(read[0], []).append(read)
    return found


def _columns(start: int, stop: int) -> str:
    return f"{start}" if stop == start + 1 else f"{start}-{stop - 1}"


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    shown = (" | ".join(str(cell).replace("|", "\\|") for cell in line) for line in lines)
    return "\n".join(f"| {line} |" for line in shown)
