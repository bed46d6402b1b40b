"""The benchmark for methods of others: subjects as Hugging Face folders, and answers scored.

    DIR/public/0000/      the model (config.json, model.safetensors, modeling_orrery.py), its inputs
                          and their named values (inputs.safetensors, questions.json), truth.json
    DIR/held-back/0000/   the same without truth.json
    DIR/key.json          which subject is which; whoever holds it can score, so it is not published
    DIR/README.md         what is asked, and the form of an answer

Subjects stand in random order under numbers, and values are called value 0, value 1, ..., so that
no name tells what was planted. An answer is {"public/0000": {"heads": [[...], ...], "sites":
[...], "edges": [...]}, ...}: a score for every head, `[layer][head]`, and one for every site and
edge of questions.json; each of the three may be left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from constructions.interchange.export import export
from probes.bench.evidence import Found
from probes.bench.families import supports
from probes.bench.scores import score, truth_of
from probes.bench.subjects import Subject, make_subject
from synthetic.files import parse_json

README = """# Which heads have a job, which values are used from where, and who reads whom?

Every folder is a transformer whose mechanism is known. `AutoModel.from_pretrained(FOLDER,
trust_remote_code=True)` opens it; it maps a residual stream to itself.

inputs.safetensors: `stream` [batch, token, width] and `groups` [token] are the model's inputs, the
prediction is `output[:, read_tokens] @ read_matrix`, and each site's `array` [batch, token, size]
is what its value is on these inputs.

questions.json: {"heads": [layers, heads], "sites": [{"layer", "tokens", "value", "array"}],
"edges": [[layer, head, layer of the receiver, its head]]}: is the value held at these tokens after
so many layers, and used from there on? Does the receiver read what the head writes? Layers and
heads of edges count from 0; a receiver that is no head is the layer's MLP (-1) or read-out (-2).

An answer is a JSON file {"public/0000": {"heads": [[score, ...], ...], "sites": [score, ...],
"edges": [score, ...]}}, with larger scores where a head has a job, a value is used, an edge is
read. `orrery bench --score answers.json` scores it with the key.json that lies beside it. public/
has its truth.json; held-back/ has none.
"""


def write(
    families: Sequence[str],
    disguises: Sequence[str],
    seeds: Sequence[int],
    batch: int,
    out: Path,
    progress: Callable[[str], None] = lambda line: None,
) -> list[str]:
    """Writes the subjects; the first half of the seeds is public. Returns their names.

    ValueError where the folder is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--export {out}: exists and is not empty")
    public = set(list(seeds)[: (len(seeds) + 1) // 2])
    wanted = [(f, d, s) for f in families for d in disguises for s in seeds if not supports(f, d)]
    order = np.random.default_rng([*seeds, len(wanted)]).permutation(len(wanted))
    counts, key = {"public": 0, "held-back": 0}, {}
    for n in order:
        family, disguise, seed = wanted[n]
        part = "public" if seed in public else "held-back"
        name = f"{part}/{counts[part]:04d}"
        counts[part] += 1
        progress(name)
        subject = make_subject(family, disguise, seed, batch)
        _write_subject(subject, out / name, truth=part == "public")
        key[name] = {"family": family, "disguise": disguise, "seed": seed}
    (out / "README.md").write_text(README)
    (out / "key.json").write_text(json.dumps({"batch": batch, "subjects": key}, indent=1))
    return sorted(key)


def _write_subject(subject: Subject, folder: Path, truth: bool) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    export(subject.model, None, folder)
    slots = list(dict.fromkeys(site.slot for site in subject.sites))
    numbers = np.random.default_rng(subject.seed).permutation(len(slots)).tolist()
    value_of = dict(zip(slots, numbers, strict=True))
    arrays = {
        "stream": np.asarray(subject.stream),
        "groups": np.asarray(subject.groups),
        "read_tokens": subject.read_tokens,
        "read_matrix": np.asarray(subject.read_matrix),
    }
    questions = []
    for n, site in enumerate(subject.sites):
        arrays[f"site {n}"] = subject.value(site)
        where = {"layer": site.layer, "tokens": site.tokens.tolist()}
        questions.append(where | {"value": value_of[site.slot], "array": f"site {n}"})
    save_file(
        {k: np.ascontiguousarray(a) for k, a in arrays.items()}, folder / "inputs.safetensors"
    )
    edges = [list(edge[:4]) for edge in subject.edges]
    asked = {"heads": list(subject.roles.shape), "sites": questions, "edges": edges}
    (folder / "questions.json").write_text(json.dumps(asked))
    if truth:
        known = {
            "heads": subject.roles.tolist(),
            "sites": [site.used for site in subject.sites],
            "bases": [site.basis.tolist() for site in subject.sites],
            "edges": [edge.used for edge in subject.edges],
        }
        (folder / "truth.json").write_text(json.dumps(known))


def score_answers(path: Path) -> list[dict[str, Any]]:
    """Records, as `probes.bench.card.run` gives them, of the answers in a file.

    ValueError where the file, its key or one of its answers is not of the form.
    """
    answers = _json(path)
    key = _json(path.parent / "key.json")
    if not isinstance(answers, dict) or not answers:
        raise ValueError(f"{path}: must be an object {{subject: answers}}")
    records = []
    for name, given in answers.items():
        if name not in key["subjects"]:
            raise ValueError(f"{path}: {name!r} is no subject of {path.parent / 'key.json'}")
        about = key["subjects"][name]
        subject = make_subject(**about, batch=key["batch"])
        entries: dict[str, Any] = {}
        for task in ("heads", "sites", "edges"):
            if not isinstance(given, dict) or task not in given:
                continue
            found = Found(_numbers(path, name, task, given[task], truth_of(subject, task)[0].shape))
            entries[task] = {"scores": score(subject, task, found), "answer": found.scores.ravel()}
        if not entries:
            raise ValueError(f"{path}: {name!r} answers neither heads nor sites nor edges")
        records.append(about | {"methods": {"answers": entries}})
    return records


def _json(path: Path) -> Any:
    try:
        return parse_json(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path}: missing") from None
    except ValueError as error:
        raise ValueError(f"{path}: no JSON ({error})") from None


def _numbers(path: Path, name: str, task: str, given: Any, shape: tuple[int, ...]) -> np.ndarray:
    try:
        found = np.asarray(given, float)
    except (TypeError, ValueError):
        found = np.zeros(0)
    if found.shape != shape or not np.isfinite(found).all():
        raise ValueError(
            f"{path}: {task} of {name!r} has shape {found.shape}, must be {shape}, finite numbers"
        )
    return found
