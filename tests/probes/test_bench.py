"""The benchmark of methods: its truth against an independent interpreter, its scores, its files."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import plain_numpy
import pytest
from scipy.linalg import orthogonal_procrustes

from constructions.core.compile import compile_program
from constructions.core.program import Head, Layer, Program
from constructions.core.slots import Slots
from constructions.core.transformer import Edit
from probes.bench import card, exchange, guide
from probes.bench.disguises import (
    DISGUISES,
    backed,
    unrolled,
    with_distractors,
    with_shared_heads,
    with_sharp_heads,
)
from probes.bench.evidence import Evidence
from probes.bench.families import FAMILIES, base_of, supports
from probes.bench.methods import METHODS, _alike
from probes.bench.patches import gradients, patch_sites, run_sites
from probes.bench.scores import average_precision, overlap, score, truth_of
from probes.bench.subjects import Subject, make_subject
from probes.bench.truth import liveness
from probes.cli import main

pytestmark = pytest.mark.usefixtures("x64")

FAMILY = "gradient-descent"
BATCH = 24


@pytest.fixture(scope="module")
def subjects() -> dict[str, Subject]:
    with jax.enable_x64(True):
        names = [name for name in DISGUISES if name != "trained" and not supports(FAMILY, name)]
        return {name: make_subject(FAMILY, name, 3, BATCH) for name in names}


def program_of(subject: Subject):
    base = base_of(subject.family)
    if subject.disguise in ("distractors", "all"):
        return with_distractors(base.program, base.main)
    if subject.disguise == "shared":
        return with_shared_heads(base.program)
    if subject.disguise == "sharp":
        return with_sharp_heads(base.program)
    return backed(base.program)[0] if subject.disguise == "backup" else base.program


def interpreted(program, state, groups):
    """The slots after a program, by loops over tokens and heads; a program of no layers too."""
    if not program.layers:
        return state
    return plain_numpy.interpret(program, state, groups)


def layers_of(program, layers):
    found = object.__new__(type(program))
    found.__dict__.update(program.__dict__ | {"layers": tuple(layers), "loops": 1})
    return found


def check_counterfactuals(subject: Subject, few: int = 4) -> int:
    """Every used value, set to another input's, moves the model as the algorithm says."""
    program = program_of(subject)
    groups = np.broadcast_to(np.asarray(subject.groups), (few, len(subject.groups)))
    kinds = np.asarray(program.token_groups)[groups[0]]
    start = {
        slot.name: np.where(
            np.isin(kinds, slot.token_groups or program.token_groups)[:, None],
            subject.values[0][: few + 1, :, slot.columns],
            0,
        )
        for slot in program.slots
        if slot.born == 0
    }
    read = np.asarray(subject.clean_read)
    arguments = (
        subject.model, subject.stream[:few], subject.groups, jnp.asarray(subject.read_tokens),
        subject.read_matrix,
    )  # fmt: skip
    residual = np.asarray(run_sites(subject.model, subject.stream, subject.groups)[1]["residual"])
    used = [site for site in subject.sites if site.used]
    base = base_of(subject.family)
    name = str(base.place(*base.inputs(jax.random.key(0), 2)).slot)
    found = patch_sites(
        arguments,
        (residual[:, :few], residual[:, 1 : few + 1]),
        [(site.layer, site.tokens) for site in used],
        [site.basis for site in used],
    )
    for site, ours in zip(used, found, strict=True):
        before, behind = program.layers[: site.layer], program.layers[site.layer :]
        here, there = (
            interpreted(layers_of(program, before), {n: v[cut] for n, v in start.items()}, groups)
            for cut in (slice(0, few), slice(1, few + 1))
        )
        here, there = ({n: np.array(v) for n, v in state.items()} for state in (here, there))
        own = here[site.slot]
        assert np.abs(own[:, site.tokens] - subject.value(site)[:few]).max() < 1e-10
        own[:, site.tokens] = there[site.slot][:, site.tokens]
        after = interpreted(layers_of(program, behind), here, groups)
        width = np.zeros((few, len(kinds), read.shape[0]))
        slot = next(s for s in program.slots if s.name == name)
        width[..., slot.columns] = after[slot.name]
        theirs = width[:, subject.read_tokens] @ read
        scale = max(1.0, float(np.abs(theirs).max()))
        assert np.abs(ours - theirs).max() < 1e-10 * scale, site.name
    return len(used)


@pytest.mark.parametrize("disguise", ["bare", "basis", "distractors", "shared", "backup"])
def test_a_used_value_moves_the_prediction_as_the_algorithm_says(subjects, disguise: str) -> None:
    assert check_counterfactuals(subjects[disguise]) >= 8


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_counterfactuals_of_every_family(family: str) -> None:
    for disguise in ("basis", "distractors", "backup", "sharp"):
        if not supports(family, disguise):
            assert check_counterfactuals(make_subject(family, disguise, 1, BATCH), 2) > 0


def without(subject: Subject, roles: tuple[str, ...]) -> np.ndarray:
    """The prediction with the outputs of all heads of these roles removed at once."""
    _, sites = run_sites(subject.model, subject.stream, subject.groups)
    where = np.isin(subject.roles, roles)[:, None, None, :, None]
    edit = Edit(jnp.asarray(where), jnp.zeros_like(sites["head_output"]))
    output, _ = subject.model.run(subject.stream, subject.groups, edits={"head_output": edit})
    return np.asarray(output[:, subject.read_tokens] @ subject.read_matrix)


@pytest.mark.parametrize("disguise", ["bare", "distractors", "shared", "backup", "basis"])
def test_removing_all_that_is_unused_changes_nothing(subjects, disguise: str) -> None:
    subject = subjects[disguise]
    before = without(subject, ())
    apart = np.abs(without(subject, ("unused",)) - before).max()
    # in another basis the columns of the read-out are sums over all columns of the stream
    assert apart == 0 if disguise != "basis" else apart < 1e-13
    assert np.abs(without(subject, ("used", "backup")) - before).max() > 0.01


def test_a_backup_steps_in(subjects) -> None:
    subject = subjects["backup"]
    e = Evidence(subject)
    alone = METHODS["zero ablation"](subject, "heads", e).scores
    exchanged = METHODS["resample ablation"](subject, "heads", e).scores
    backup = subject.roles == "backup"
    first = (subject.roles == "used") & (alone < 1e-12)
    assert backup.sum() == first.sum() == 1
    assert alone[backup].max() < 1e-12 and exchanged[backup].max() < 1e-12
    assert exchanged[first].min() > 0.1
    both = replace(subject, roles=np.where(backup | first, "both", "rest"))
    assert np.abs(without(both, ("both",)) - without(both, ())).max() > 0.01


def test_causal_methods_are_perfect_on_bare_constructions(subjects) -> None:
    e = Evidence(subjects["bare"])
    for name, method in METHODS.items():
        if method.causal and method.heads is not None:
            found = method(e.subject, "heads", e)
            assert score(e.subject, "heads", found)["precision"] == 1, name
    found = METHODS["true subspace"](e.subject, "sites", e)
    assert score(e.subject, "sites", found)["precision"] == 1


def test_the_gradient_is_exact_where_the_prediction_is_linear(subjects) -> None:
    e = Evidence(subjects["bare"])
    exact, first, line = (
        METHODS[name](e.subject, "heads", e).scores
        for name in ("activation patching", "attribution patching", "integrated gradients")
    )
    # heads write into y, in which every layer behind them is linear
    np.testing.assert_allclose(first, exact, atol=1e-12)
    np.testing.assert_allclose(line, exact, atol=1e-12)


def test_answers_that_do_not_depend_on_the_basis(subjects) -> None:
    bare, basis = (Evidence(subjects[name]) for name in ("bare", "basis"))

    def apart(name: str, task: str) -> float:
        one, two = (METHODS[name](e.subject, task, e).scores for e in (bare, basis))
        return float(np.abs(one - two).max() / np.abs(one).max())

    for name in ("zero ablation", "activation patching", "attribution patching", "attention"):
        assert apart(name, "heads") < 1e-9, name
    for name in ("linear probe", "true subspace"):
        assert apart(name, "sites") < 1e-6, name
    assert apart("weights", "heads") > 0.01
    assert apart("single columns", "sites") > 0.01


def brute_force(scores, positive) -> float:
    """The mean over all orders of equal scores of the precision at each positive."""
    total, count = 0.0, 0
    for order in itertools.permutations(range(len(scores))):
        if any(scores[a] < scores[b] for a, b in itertools.pairwise(order)):
            continue
        hits = [bool(positive[n]) for n in order]
        total += np.mean([sum(hits[: n + 1]) / (n + 1) for n, hit in enumerate(hits) if hit])
        count += 1
    return total / count


@pytest.mark.parametrize(
    ("scores", "positive"),
    [
        ([3, 2, 1, 0], [1, 0, 1, 0]),
        ([0, 0, 0, 0, 0], [1, 0, 1, 0, 0]),
        ([2, 2, 1, 1, 1, 0], [0, 1, 1, 0, 1, 1]),
        ([1, 1, 1, 5], [1, 1, 0, 0]),
    ],
)
def test_average_precision_is_the_mean_over_ties(scores, positive) -> None:
    assert average_precision(scores, positive) == pytest.approx(brute_force(scores, positive))


def test_chance_scores_chance(subjects) -> None:
    subject = subjects["distractors"]
    positive, _ = truth_of(subject, "sites")
    random = np.random.default_rng(0)
    found = [average_precision(random.random(len(positive)), positive) for _ in range(2000)]
    expected = average_precision(np.zeros(len(positive)), positive)
    assert abs(np.mean(found) - expected) < 4 * np.std(found) / 2000**0.5
    assert expected < 0.5


def test_overlap_is_the_share_of_the_true_subspace() -> None:
    unit = np.eye(5)
    assert overlap(3 * unit[:, :2], unit[:, :1]) == pytest.approx(1)
    assert overlap(unit[:, :1], unit[:, :2]) == pytest.approx(0.5)
    assert overlap(unit[:, :1] + unit[:, 1:2], unit[:, :1]) == pytest.approx(0.5)
    assert overlap(np.zeros((5, 0)), unit) == 0


def test_what_is_overwritten_or_read_by_nobody_is_not_used() -> None:
    program = unrolled(base_of("skill-composition").construction.program)
    kinds = ["argument", "skill", "skill"]
    kinds = [k if k in program.token_groups else program.token_groups[-1] for k in kinds]
    slot = next(s for s in program.slots if s.name == "value")
    states, heads, _ = liveness(program, kinds, {(slot, 2)})
    assert states[-1] == {(slot, 2)}
    assert (slot, 1) in states[1] and (slot, 0) not in states[1]
    assert len(heads) == program.depth == 2


def test_a_card_goes_on_where_it_was_ended(tmp_path: Path, monkeypatch) -> None:
    methods = ["zero ablation", "attention", "chance"]
    asked = ([FAMILY], ["bare", "basis", "distractors", "backup"], methods, [0, 1], BATCH, tmp_path)
    first = card.run(*asked)
    monkeypatch.setattr(card, "record_of", lambda *_: pytest.fail("made again"))
    again = card.run(*asked)
    assert again == json.loads(json.dumps(first))
    table = card.card_of(again)["tables"]["heads"]
    assert table["zero ablation"]["bare"].mean == 1 > table["attention"]["distractors"].mean
    assert table["zero ablation"]["other basis"] < 1e-9
    assert table["zero ablation"]["backup"].mean < 1
    html = card.page(card.card_of(again), again)
    assert html.count("<figure>") == 2 and "zero ablation" in html
    assert html.count('class="poor"') >= 1 and "prefers-color-scheme: dark" in html
    said: list[str] = []
    monkeypatch.setattr(card, "record_of", lambda *_: first[0])
    monkeypatch.setattr(card, "sources", lambda: "another version")
    card.run(*asked, said.append)
    assert len(said) == len(first)  # what other sources made is made anew
    (tmp_path / "subjects" / f"{FAMILY}.bare.0.json").write_text("{")
    with pytest.raises(ValueError, match="no record of a subject"):
        card.run(*asked)


def test_answers_of_others_are_scored(tmp_path: Path, capsys) -> None:
    out = tmp_path / "export"
    names = exchange.write([FAMILY], ["bare", "distractors"], [5, 6], BATCH, out)
    assert sum(name.startswith("held-back") for name in names) == 2
    assert {p.parent.parent.name for p in out.rglob("truth.json")} == {"public"}
    answers = {}
    for name in names:
        heads, sites, edges = json.loads((out / name / "questions.json").read_text()).values()
        zeros = {"sites": [0.0] * len(sites), "edges": [0.0] * len(edges)}
        answers[name] = {"heads": np.zeros(heads).tolist()} | zeros
    name = next(n for n in names if n.startswith("public"))
    truth = json.loads((out / name / "truth.json").read_text())
    answers[name] = {
        "heads": (np.array(truth["heads"]) == "used").astype(int).tolist(),
        "edges": [float(used) for used in truth["edges"]],
    }
    path = out / "answers.json"
    path.write_text(json.dumps(answers))
    records = exchange.score_answers(path)
    for task in ("heads", "edges"):
        found = {r["methods"]["answers"][task]["scores"]["precision"] for r in records}
        assert max(found) == 1 and min(found) < 0.5
    assert main(["bench", "--score", str(path)]) == 0
    assert "answers" in capsys.readouterr().out
    answers[name] = {"sites": [1.0]}
    path.write_text(json.dumps(answers))
    with pytest.raises(ValueError, match="must be"):
        exchange.score_answers(path)
    with pytest.raises(ValueError, match="not empty"):
        exchange.write([FAMILY], ["bare"], [5], BATCH, out)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--methods", "guessing"], "--methods guessing: must be some of zero ablation"),
        (["--families", "tint"], "--families tint: must be some of"),
        (["--disguises", ","], "--disguises ,: must be some of bare"),
        (["--seeds", "0"], "--seeds 0: must be at least 1"),
        (["--score", "missing.json"], "missing.json: missing"),
    ],
)
def test_bad_options_are_one_line(options, said, capsys) -> None:
    assert main(["bench", *options]) == 2
    assert said in capsys.readouterr().err


def test_a_family_that_cannot_have_a_backup_is_refused() -> None:
    with pytest.raises(ValueError, match="has an MLP already"):
        make_subject("skill-composition", "backup", 0)
    with pytest.raises(ValueError, match="disguise is 'wig'"):
        make_subject(FAMILY, "wig", 0)


def test_paths_are_those_of_the_program_and_their_effects_are_those_of_the_parts(subjects) -> None:
    e = Evidence(subjects["bare"])
    found = METHODS["path patching"](e.subject, "edges", e).scores
    estimate = METHODS["edge attribution"](e.subject, "edges", e).scores
    names = [edge.name for edge in e.subject.edges]
    used = {"head 1.0 to head 2.0", "head 1.0 to read-out", "head 2.0 to read-out"}
    assert {edge.name for edge in e.subject.edges if edge.used} == used
    assert set(np.array(names)[found > 1e-12]) == used
    # by hand: the second layer alone, on a stream that has the first head's output of another input
    s, (here, there) = e.subject, e.site("head_output")
    program = base_of(FAMILY).program
    second = compile_program(
        layers_of(program, program.layers[1:]), config=one_layer(s.clean.config)
    )
    stream = e.site("residual")[0][1]
    changed = stream + there[0, :, :, 0] - here[0, :, :, 0]
    apart = [np.asarray(second(jnp.asarray(h), s.groups)) - h for h in (changed, stream)]
    moved = (apart[0] - apart[1])[:, s.read_tokens] @ np.asarray(s.read_matrix)
    direct = (there[1, :, :, 0] - here[1, :, :, 0])[:, s.read_tokens] @ np.asarray(s.read_matrix)
    size = np.sum(e.way**2)
    for name, movement in (("head 1.0 to head 2.0", moved), ("head 2.0 to read-out", direct)):
        assert found[names.index(name)] == pytest.approx(abs(np.sum(movement * e.way)) / size)
    np.testing.assert_allclose(estimate, found, atol=1e-12)  # the prediction is linear in y


def one_layer(config):
    """A shape of as many heads as the second layer's."""
    shape = list(config.layers())[1]
    return replace(config, segments=(replace(config.segments[-1], pattern=(shape,), repeats=1),))


def test_a_pressed_stream_loses_what_is_stated(subjects) -> None:
    s = subjects["superposed"]
    expected = s.values[-1][:, s.read_tokens] @ np.asarray(s.clean_read)
    output = np.asarray(s.model(s.stream, s.groups))[:, s.read_tokens] @ np.asarray(s.read_matrix)
    apart = np.linalg.norm(np.roll(expected, -1, 0) - expected)
    loss = np.linalg.norm(output - expected) / apart
    assert loss == pytest.approx(s.stated["loss"]) and 1e-6 < loss <= 0.05
    stream = np.asarray(run_sites(s.model, s.stream, s.groups)[1]["residual"])
    singular = np.linalg.svd(stream.reshape(-1, stream.shape[-1]), compute_uv=False)
    assert (singular > 1e-9 * singular[0]).sum() == s.stated["dimensions"] < s.stated["of"]
    exchanged = METHODS["true subspace"](s, "sites").scores
    assert exchanged[[not site.used for site in s.sites]].max() > 0.01  # values overlap


def test_similarities_are_those_of_other_formulas() -> None:
    random = np.random.default_rng(0)
    x, y = random.normal(size=(40, 5)), random.normal(size=(40, 3))
    x, y = x - x.mean(0), y - y.mean(0)
    centre = np.eye(40) - 1 / 40
    k, m = x @ x.T, y @ y.T
    hsic = [np.trace(a @ centre @ b @ centre) for a, b in ((k, m), (k, k), (m, m))]
    one, two = x / np.linalg.norm(x), y / np.linalg.norm(y)
    rotation, _ = orthogonal_procrustes(one, np.pad(two, ((0, 0), (0, 2))))
    distance = np.sum((one @ rotation - np.pad(two, ((0, 0), (0, 2)))) ** 2)
    cka, near = _alike(x + 3, y - 1)
    assert cka == pytest.approx(hsic[0] / np.sqrt(hsic[1] * hsic[2]))
    assert near == pytest.approx(1 - distance / 2)
    assert _alike(x, x @ np.linalg.qr(random.normal(size=(5, 5)))[0]) == pytest.approx((1, 1))


def test_softmax_saturates_and_linear_heads_cannot() -> None:
    assert supports(FAMILY, "sharp") == "no head has a softmax"
    program = base_of("hedge").program
    for before, after in zip(program.layers, with_sharp_heads(program).layers, strict=True):
        for old, new in zip(before.single_heads, after.single_heads, strict=True):
            assert new.scale == old.scale * (8 if old.mixer == "softmax" else 1)


def test_attribution_fails_where_a_softmax_saturates_as_the_closed_form_says() -> None:
    # two keys +1 and -1, their values the same: p = tanh(s x), the source has -x; to first order
    # the movement is -2 x s / cosh(s x)^2 of -2 tanh(s x), a share of 2 s x / sinh(2 s x)
    slots = Slots()
    x, k, out = slots.add("x", 1), slots.add("k", 1), slots.add("y", 1, accumulates=True)
    for scale in (0.1, 1.0, 8.0):
        head = Head(x, k, k, {out: 1.0}, "softmax", "query", "key", scale=scale)
        program = Program(slots, [Layer([head])], token_groups=("key", "query"))
        model = compile_program(program)
        stream = np.zeros((2, 3, slots.width))
        stream[:, :2, k.start], stream[:, 2, x.start] = (1, -1), (1, -1)
        read = np.eye(slots.width)[:, out.columns]
        given = model, *map(jnp.asarray, (stream, [0, 0, 1], [2], read))
        output, sites = run_sites(*given[:3])
        prediction = np.asarray(output)[:, [2]] @ read
        np.testing.assert_allclose(prediction.ravel(), np.tanh(scale * np.array([1, -1])))
        here = np.asarray(sites["residual"])
        there, way = np.roll(here, -1, 1), np.roll(prediction, -1, 0) - prediction
        found = gradients(*given, *map(jnp.asarray, (here, there, way)), site="residual")
        estimate = float(np.sum(np.asarray(found)[0, 0] * (there - here)[0]))
        assert estimate == pytest.approx(2 * scale / np.sinh(2 * scale), rel=1e-6)


@pytest.mark.slow
def test_trained_heads_match_up_to_symmetries() -> None:
    subject = make_subject(FAMILY, "trained", 0, BATCH)
    (head,) = np.flatnonzero(subject.roles[0] == "used")
    assert 1e-6 < subject.stated["distance"] < 0.05
    for n, own in enumerate(subject.model.layer(1).heads):
        assert n == head or not np.asarray(own.output).any()  # spare heads stay zero
    both = (m(subject.stream, subject.groups) for m in (subject.model, subject.clean))
    one, two = (np.asarray(found)[:, -1, -1] for found in both)
    assert 1e-6 < np.abs(one - two).max() < 0.05 * np.abs(two).max()


def test_tables_follow_from_the_kept_card() -> None:
    root = Path(__file__).parents[2]
    kept = json.loads((root / "benchmarks/results/bench_cpu.json").read_text())
    for file, text in guide.tables(kept).items():
        assert guide.between((root / file).read_text())[1] == text, f"{file}: write it anew"
    row = kept["tables"]["heads"]["zero ablation"]
    assert guide.worst(kept, "zero ablation", "heads")[0] == "backup"
    assert row["bare"]["mean"] == 1 and "| zero ablation | heads | 1.00 |" in guide.short(kept)
    row["basis"]["mean"] = 0.0
    assert guide.tables(kept)["README.md"] != guide.between((root / "README.md").read_text())[1]
