"""The transformer and the programs once more, as loops over batch, tokens and heads in float64.

`transformer` follows the equations of `constructions.core.transformer` from a config and its
arrays. `interpret` runs a `Program` on slots that are separate variables: it knows nothing of
columns, so that it shows what a program means, whatever the layout of the stream.
"""

import itertools
import math

import numpy as np

from constructions.core.program import HeadFamily

ACTIVATIONS = {
    "identity": lambda u: u,
    "relu": lambda u: np.maximum(u, 0.0),
    "gelu": lambda u: 0.5 * u * (1 + np.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3))),
    "tanh": np.tanh,
    "square": lambda u: u * u,
    "relu_derivative": lambda u: np.where(u > 0, 1.0, 0.0),
    "gelu_derivative": lambda u: np.imag(ACTIVATIONS["gelu"](u + 1e-30j)) / 1e-30,
}


def mix(mixer, scores):
    """Attention weights from the scores of the keys that one query sees."""
    scores = np.asarray(scores, float)
    if len(scores) == 0:
        return scores
    if mixer in ("linear", "mesa"):
        return scores
    if mixer == "centred":
        return scores - sum(scores) / len(scores)
    assert mixer == "softmax"
    weights = [math.exp(s - max(scores)) for s in scores]
    return np.array(weights) / math.fsum(weights)


def attend(mixer, query, key, value, scale, sees, ridge, gates=None, factor=None):
    """sum_j a_ij value_j for rows `[token, rows]` of one example, and the weights `[i, j]`.

    `gates` of a mesa head are what enters of each token, and what is kept when it comes; `factor`
    is the rows at the query and at the key whose products the weights are multiplied by.
    """
    tokens = len(query)
    out, weights = np.zeros(value.shape), np.zeros((tokens, tokens))
    for i in range(tokens):
        keys = [j for j in range(tokens) if sees(i, j)]
        q, left = query[i], np.ones(tokens)
        if gates is not None:
            enters, kept = gates
            for j in keys:
                left[j] = enters[j] * math.prod(kept[n] for n in keys if n > j)
        if mixer == "mesa":
            gram = sum((left[j] * np.outer(key[j], key[j]) for j in keys), ridge * np.eye(len(q)))
            q = np.linalg.inv(gram) @ q
        if mixer == "transposed_softmax":
            for j in keys:
                others = [n for n in range(tokens) if sees(n, j)]
                shares = mix("softmax", [scale * sum(query[n] * key[j]) for n in others])
                weights[i, j] = shares[others.index(i)]
        else:
            weights[i, keys] = mix(mixer, [scale * left[j] * sum(q * key[j]) for j in keys])
        for j in keys:
            if factor is not None:
                weights[i, j] *= sum(factor[0][i] * factor[1][j])
            out[i] += weights[i, j] * value[j]
    return out, weights


def normalise(kind, eps, v, gain=1.0, offset=0.0):
    if kind == "layer":
        v = v - np.mean(v)
    return v / math.sqrt(np.mean(v**2) + eps) * gain + offset


def transformer(config, arrays, stream, groups):
    """Output of the model, and the sites of every layer as a list of dictionaries."""
    stream = np.array(stream, float)
    groups = np.broadcast_to(groups, stream.shape[:2])
    sites = []
    for s, segment in enumerate(config.segments):
        for repeat in range(segment.repeats):
            for p, layer in enumerate(segment.pattern):
                stored = arrays["segments"][s]["layers"][p]
                weights = _pick(stored, 0 if segment.tied else repeat)
                stream, found = _layer(layer, weights, stream, groups, config.token_groups)
                if config.clip is not None:
                    stream = np.clip(stream, -config.clip, config.clip)
                sites.append(found)
    before = stream
    if config.final_norm is not None:
        gains = arrays["final_norm"]
        stream = np.stack([[_norm(config.final_norm, gains, v) for v in h] for h in stream])
    return stream, sites, before


def _pick(tree, repeat):
    if isinstance(tree, dict):
        return {name: _pick(value, repeat) for name, value in tree.items()}
    return np.asarray(tree)[repeat].astype(float)


def _norm(config, weights, v):
    return normalise(config.kind, config.eps, v, weights.get("gain", 1), weights.get("offset", 0))


def _acts(tokens, names, kind):
    return tokens is None or names[kind] in tokens


def _normed(config, weights, h, names, kinds):
    """(stream, what is read) of one example after an optional norm."""
    if config is None:
        return h, h
    if config.read is None:
        return h, np.stack([_norm(config, weights, v) for v in h])
    h = h.copy()
    for v, kind in zip(h, kinds, strict=True):
        if _acts(config.tokens, names, kind):
            v[slice(*config.write)] += _norm(config, weights, v[slice(*config.read)])
    return h, h


def _layer(layer, weights, stream, groups, token_groups):
    found = {"residual": stream, "attention": [], "head_output": [], "middle": [], "hidden": []}
    result = []
    for h, kinds in zip(stream, groups, strict=True):
        h, x = _normed(layer.norm, weights.get("norm", {}), h, token_groups, kinds)
        attention, outputs = [], []
        update = np.zeros_like(h)
        for number, group in enumerate(layer.heads):
            w = weights["heads"][number]
            for n in range(group.heads):

                def rows(name, x=x, w=w, n=n):
                    bias = w[name + "_bias"][n] if name + "_bias" in w else 0.0
                    return np.stack([w[name][n] @ v + bias for v in x])

                def sees(i, j, w=w, n=n, kinds=kinds):
                    near = w["window"][n][0] <= j - i <= w["window"][n][1]
                    seen = near and w["key_groups"][n][kinds[j]]
                    return w["query_groups"][n][kinds[i]] and (
                        seen or w["sink_groups"][n][kinds[j]]
                    )

                ridge = np.exp(w["log_regularization"][n]) if group.mixer == "mesa" else None
                gates = None
                if group.gates:
                    logits = (rows(name) for name in ("input_gate", "forget_gate"))
                    gates = [1 / (1 + np.exp(-logit)) for logit in logits]
                factor = None
                if group.factor_dim:
                    factor = [rows(name) for name in ("factor_query", "factor_key")]
                q, k, v = (rows(name) for name in ("query", "key", "value"))
                scale = w["scale"][n]
                mixed, a = attend(group.mixer, q, k, v, scale, sees, ridge, gates, factor)
                attention.append(a)
                outputs.append(np.stack([w["output"][n] @ m for m in mixed]))
                update += outputs[-1]
            update += w.get("output_bias", 0.0)
        h = h + update
        found["attention"].append(attention)
        found["head_output"].append(outputs)
        found["middle"].append(h)
        if layer.mlp is not None:
            h, x = _normed(layer.mlp_norm, weights.get("mlp_norm", {}), h, token_groups, kinds)
            w = weights["mlp"]
            hidden = []
            for v in x:
                u = ACTIVATIONS[layer.mlp.activation](w["hidden"] @ v + w.get("hidden_bias", 0.0))
                if layer.mlp.gated:
                    u = u * (w["gate"] @ v + w.get("gate_bias", 0.0))
                hidden.append(u)
            found["hidden"].append(hidden)
            acts = [_acts(layer.mlp.tokens, token_groups, kind) for kind in kinds]
            update = np.stack([w["output"] @ u + w.get("output_bias", 0.0) for u in hidden])
            h = h + np.where(np.array(acts)[:, None], update, 0)
        result.append(h)
    return np.stack(result), found


def interpret(program, values, groups, sizes=None):
    """Values of all slots, {name: [batch, token, size]}, after the last layer.

    `values` holds the slots of the embedding; other slots start at zero. `groups` is
    `[batch, token]`. The largest number before and after every layer is added to the list `sizes`.
    """
    names = np.asarray(program.token_groups)[groups]
    batch, tokens = names.shape
    state = {slot: np.zeros((batch, tokens, slot.size)) for slot in program.slots}
    for slot in program.slots:
        if slot.name in values:
            state[slot] = np.array(values[slot.name], float)

    def evaluate(expr, state, b, i):
        out = expr.constant.astype(float)
        for slot, m in expr.terms.items():
            out = out + np.asarray(m) @ state[slot][b, i]
        return out

    def record():
        if sizes is not None:
            sizes.append(max(np.abs(v).max(initial=0) for v in state.values()))

    for _, layer in program.unrolled():
        record()
        if layer.norm is not None:
            norm = layer.norm
            new = np.array(
                [
                    [
                        normalise(norm.kind, norm.eps, v)
                        * (norm.token_groups is None or k in norm.token_groups)
                        for v, k in zip(h, kinds, strict=True)
                    ]
                    for h, kinds in zip(state[norm.read], names, strict=True)
                ]
            )
            state[norm.write] = state[norm.write] + new
        after = {slot: value.copy() for slot, value in state.items()}
        for head in layer.heads:
            for b in range(batch):

                def sees(i, j, head=head, kinds=names[b]):
                    low, high = head.window
                    near = (low is None or low <= j - i) and (high is None or j - i <= high)
                    seen = head.keys is None or kinds[j] in head.keys
                    acts = head.queries is None or kinds[i] in head.queries
                    return acts and (near and seen or kinds[j] in head.sinks)

                if isinstance(head, HeadFamily):
                    for i, j in itertools.product(range(tokens), repeat=2):
                        for left, right, tensor in head.terms if sees(i, j) else ():
                            pair = np.outer(state[left][b, i], state[right][b, j])
                            after[head.write][b, i] += (tensor * pair).sum((1, 2))
                    continue
                q, k, v, *factor = (
                    np.stack([evaluate(expr, state, b, i) for i in range(tokens)])
                    for expr in (head.query, head.key, head.value, *(head.factor or ()))
                )
                ridge = head.regularization
                mixed, _ = attend(
                    head.mixer, q, k, v, head.scale, sees, ridge, factor=factor or None
                )
                for slot, m in head.write.items():
                    after[slot][b] += mixed @ np.asarray(m).T
        state = after
        if layer.mlp is not None:
            after = {slot: value.copy() for slot, value in state.items()}
            for b in range(batch):
                for i in range(tokens):
                    if (
                        layer.mlp.token_groups is not None
                        and names[b][i] not in layer.mlp.token_groups
                    ):
                        continue
                    u = evaluate(layer.mlp.hidden, state, b, i)
                    u = ACTIVATIONS[layer.mlp.activation](u)
                    if layer.mlp.gate is not None:
                        u = u * evaluate(layer.mlp.gate, state, b, i)
                    for slot, m in layer.mlp.write.items():
                        after[slot][b, i] += np.asarray(m) @ u
            state = after
    record()
    return {slot.name: value for slot, value in state.items()}
