"""What masked language models know of spans and tags: probes for what the exact chart says.

Linear and two-layer probes at every layer of several models, beside the controls of `probes.rows`.
`probes.trees` uses the same machinery for whole trees.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jax import Array

from constructions.core.transformer import Transformer
from constructions.family import Construction
from probes.rows import LayerScores, Rows, arrays, batch_and_time, checked_lengths, fit
from probes.sites import Inputs, Subject, activations


def word_stream(construction: Construction, model: Subject, inputs: Inputs) -> np.ndarray:
    """The residual stream at the words, `[layer, batch, time, feature]`; layer 0 is the embedding.

    Without the tokens that the construction adds (BOS, EOS). For constructions whose tokens that
    are read out are the words, such as "inside-outside".
    """
    found = activations(construction, model, ("residual",))(*inputs)["residual"]
    holder = model if isinstance(model, Transformer) else construction.reference
    read = construction.stream(holder, *inputs).read
    return np.asarray(found[:, :, read])


def span_probe(
    models: Mapping[str, Any],
    marginals: Any,
    lengths: Any,
    key: Array,
    *,
    labels: bool = False,
    probe: str = "linear",
) -> LayerScores:
    """Can the probability that words i..j are a constituent be read off words i and j?

    The features are `[h_i, h_j]`, the target is max_A mu(A, i, j), for all i < j but the whole
    sentence. R^2 is of a target that is nearly 0 or 1 for most spans: it says more of which spans
    are constituents than of the uncertainty about it.

    Args:
        models: column -> `[layer, batch, time, feature]`, as `word_stream` has it.
        marginals: `[batch, time, time, nonterminal]`, mu, exact: of `synthetic.grammar.chart`.
        lengths: `[batch]`.
        key: of the split and the control task.
        labels: the targets are all of mu(., i, j), not the largest one.
        probe: "linear", or "two-layer".

    Raises:
        ValueError: a shape that does not fit, a column that is named like a control, no model,
            another probe.
    """
    marginals, lengths = np.asarray(marginals), np.asarray(lengths)
    batch, time = batch_and_time(models)
    if marginals.ndim != 4 or marginals.shape[:3] != (batch, time, time):
        raise ValueError(
            f"marginals has shape {marginals.shape}, must be {(batch, time, time, 'nonterminal')}"
        )
    n = checked_lengths(lengths, batch, time)[:, None, None]
    first, last = np.arange(time)[:, None], np.arange(time)
    b, i, j = np.nonzero((first < last) & (last < n) & (last - first < n - 1))
    found = marginals[b, i, j]
    rows = Rows(b, np.stack([i, j, j - i, lengths[b]], 1), batch)
    return fit(
        {name: np.concatenate([h[:, b, i], h[:, b, j]], -1) for name, h in arrays(models)},
        found if labels else found.max(-1, keepdims=True),
        rows,
        key,
        probe=probe,
    )


def tag_probe(
    models: Mapping[str, Any],
    tags: Any,
    mask: Any,
    lengths: Any,
    key: Array,
    *,
    probe: str = "linear",
) -> LayerScores:
    """Can the probabilities of a hidden word's tag be read off the model at that word?

    The model has not seen the word, so all that is there has come from other words.

    Args:
        models: column -> `[layer, batch, time, feature]`, as `word_stream` has it.
        tags: `[batch, time, preterminal]`, P(tag | visible words), exact: of
        `synthetic.grammar.chart`. mask: `[batch, time]` bool, True where a word is hidden. lengths:
        `[batch]`. key: of the split and the control task. probe: "linear", or "two-layer".

    Raises:
        ValueError: as `span_probe`.
    """
    tags, mask, lengths = np.asarray(tags), np.asarray(mask), np.asarray(lengths)
    batch, time = batch_and_time(models)
    for name, shape in (("tags", tags.shape[:2]), ("mask", mask.shape)):
        if shape != (batch, time):
            raise ValueError(f"{name} has shape {shape}, must begin with {(batch, time)}")
    lengths = checked_lengths(lengths, batch, time)
    b, t = np.nonzero(mask & (np.arange(time) < lengths[:, None]))
    rows = Rows(b, np.stack([t, lengths[b]], 1), batch)
    features = {name: h[:, b, t] for name, h in arrays(models)}
    return fit(features, tags[b, t], rows, key, probe=probe, whole=False)
