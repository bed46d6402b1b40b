"""What the ledger holds of each paper, item by item, and what it does not: `orrery claims --table`.

Claims are those of the catalogue at its example settings. Numbers that families measure are known
before anything is measured by their names and sources (`STATED`), and what is missing of a paper is
said in `ITEMS`; a test compares both with what is measured. Nothing is fitted or measured here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from constructions import CATALOGUE
from constructions.catalogue import resolve
from synthetic.files import json_object


class Stated(NamedTuple):
    """Numbers that a family measures, before they are.

    Attributes:
        names: of the rows, as a pattern in which * stands for anything.
        source: as the rows have it.
        decided: whether a number decides them; else they are remarks.
        size: the paper's, or what it is reduced to.
    """

    names: str
    source: str
    decided: bool = True
    size: str = "paper"


class Item(NamedTuple):
    """Something that a paper states.

    Attributes:
        item: as `orrery claims --item` takes it.
        missing: what of it no row of the ledger decides, and why.
        elsewhere: where else it is shown.
    """

    item: str
    missing: str = ""
    elsewhere: str = ""


_OSWALD = "von Oswald et al. 2022, arXiv 2212.07677"
_MESA = "von Oswald et al. 2023, arXiv 2309.05858"
_CODE = f"{_MESA}, fig. 2, results of the public code"
_PARSE = "Zhao et al. 2023, arXiv 2303.08117"
_TABLE = "Vladymyrov et al. 2024, arXiv 2402.14180, Table 1"
_NARANG = "Narang et al. 2021, arXiv 2102.11972 (most modifications change little)"
_TINT = "Panigrahi et al. 2023, arXiv 2307.01189"
_SPANS = "Raffel et al. 2019, arXiv 1910.10683"
_PRUNED = "Ankner et al. 2024, arXiv 2405.20541"

#: Sizes at which claims are decided, at the example settings; "own" where no paper gives any.
SIZES = {
    "gradient-descent": "paper",
    "gd-plus-plus": "paper",
    "separate-tokens": "d = 3, N = 6",
    "kernel-descent": "paper",
    "noisy-regression": "paper, 2 layers",
    "inside-outside": "a grammar of brackets, 8 words",
    "mesa-ridge": "d = 4, T = 16",
    "mesa-polynomial": "d = 8, T = 40",
    "tint": "width 4",
}

STATED: Mapping[str, Sequence[Stated]] = {
    "gradient-descent": (
        Stated("loss of zero weights", f"{_OSWALD}, fig. 3a"),
        Stated("loss of one step", f"{_OSWALD}, figs. 2 and 3a"),
        Stated(
            "loss of one step, public code",
            "self-organising-systems/transformers_learn_icl_by_gd, second notebook",
        ),
        Stated("curvature, N = *", f"{_OSWALD}, fig. 3 (values of gamma for N = 10, 25, 50, 100)"),
        Stated("loss of two steps of GD++, N = *", f"{_OSWALD}, fig. 3a"),
        Stated(
            "*eigenvalue, N = *",
            f"{_OSWALD}, appendix A.10 (eigenvalues of X X^T over 10^4 tasks)",
        ),
        Stated("softmax, * head*", f"{_OSWALD}, fig. 12 and appendix A.9"),
        Stated("LayerNorm", f"{_OSWALD}, fig. 14 and appendix A.9"),
        Stated("* training tasks*", f"{_OSWALD}, fig. 16"),
        Stated("modification: none", _NARANG, size="d = 3, N = 6"),
        Stated("modification: *", _NARANG, decided=False, size="d = 3, N = 6"),
        Stated("share of modifications that matter", _NARANG, size="d = 3, N = 6"),
        Stated("another seed is found to matter", "permutation test; 12 of 252 splits"),
        Stated("mirror flow, *", "Li et al. 2022, arXiv 2207.04036", size="own"),
        Stated("shared value scale, *", "Li et al. 2022, arXiv 2207.04036", size="own"),
        Stated("l1 norm over the least, *", "Li et al. 2022, arXiv 2207.04036", size="own"),
        Stated("drift ratio, H = *", "Gu et al. 2023, arXiv 2303.01215, slow SDE", size="own"),
        Stated("share at the optimum, *", "Matena and Raffel 2022, arXiv 2210.00176", False, "own"),
        Stated("gain of the search *", "Matena and Raffel 2022, arXiv 2210.00176", size="own"),
        Stated("loss of random cones *", "Matena and Raffel 2022, arXiv 2210.00176", size="own"),
        Stated("descent below *", "Matena and Raffel 2022, arXiv 2210.00176", size="own"),
        Stated("recall *", "Sun et al. 2024, arXiv 2410.21750", size="own"),
    ),
    "hedge": (
        Stated(
            "largest regret of Hedge",
            "Lu et al. 2022, arXiv 2203.01400; the bound is Freund and Schapire's",
            size="own",
        ),
        Stated("regret after a change, Hedge", "Lu et al. 2022, arXiv 2203.01400", False, "own"),
        Stated(
            "regret after a change, sleeping experts",
            "Lu et al. 2022, arXiv 2203.01400; the bound is that of synthetic.theory.experts",
            size="own",
        ),
    ),
    "separate-tokens": (
        Stated("loss over one step's, *", f"{_OSWALD}, fig. 5", size="d = 3, N = 6"),
    ),
    "kernel-descent": (
        Stated(
            "accuracy of optimal features, *",
            "Saunshi et al. 2022, arXiv 2202.14037 (the loss and the augmentations alone guarantee "
            "nothing)",
        ),
        Stated("accuracy of a trained encoder, *", "Saunshi et al. 2022, arXiv 2202.14037"),
    ),
    "noisy-regression": (
        Stated("closed form ConstRR *", "closed form: bias and variance of ridge regression"),
        Stated("closed form 1 *", "closed form: Ahn et al. 2023, Theorem 1, with noise"),
        Stated("*RR *", _TABLE),
        *(Stated(f"{model} ? *", _TABLE) for model in ("GD++", "DIAG", "FULL")),
    ),
    "inside-outside": (
        Stated("layers for *", f"{_PARSE}, introduction"),
        Stated("heads a layer, *", f"{_PARSE}, introduction"),
        Stated("numbers a word, *", f"{_PARSE}, introduction"),
        Stated("loss above the least", f"{_PARSE}, section 3", size="8 words"),
        *(
            Stated(f"{what} *", f"control of ours to {_PARSE}, section 3", size="8 words")
            for what in ("divergence of the best guess from", "accuracy given up by")
        ),
        Stated("divergence of what is kept, *", f"the identity is ours; setting of {_PRUNED}"),
        *(
            Stated(
                f"{kept} kept, {text}, *",
                f"{_PRUNED} (which perplexities to keep depends on the text)",
                decided,
                "all strings of 6 words",
            )
            for kept, text, decided in (
                ("random", "*", True),
                ("middle", "*", False),
                ("*", "clean", False),
                ("*", "*", True),
            )
        ),
        Stated(
            "posterior of the width*", f"{_SPANS}, section 3.3; the posterior is ours", size="own"
        ),
        Stated("cost of the wrong width", f"control of ours to {_SPANS}", size="own"),
        Stated("missing of what can be learnt, *", f"{_SPANS}, section 3.3.4", False, "8 words"),
        Stated(
            "missing with spans less *",
            f"{_SPANS}, section 3.3.4 (spans do slightly better than single words)",
            size="8 words",
        ),
    ),
    "mesa-ridge": (
        Stated("loss of the best polynomial, *", f"{_CODE}; Prop. 2"),
        Stated("loss of *", _CODE),
        Stated(
            "nonlinear systems: * on states",
            f"{_CODE}, nonlinear dynamics, results of the public code",
            False,
        ),
        Stated("nonlinear systems: *", f"{_CODE}, nonlinear dynamics, results of the public code"),
        Stated(
            "few-shot regression: *, the newest pair included",
            f"{_CODE}, few-shot regression, results of the public code",
            False,
        ),
        Stated(
            "few-shot regression: *", f"{_CODE}, few-shot regression, results of the public code"
        ),
    ),
    "mesa-polynomial": (
        Stated("distance from ridge regression *, layers: 1", f"{_MESA}, Prop. 2", False),
        Stated("distance from ridge regression *", f"{_MESA}, Prop. 2"),
        Stated(
            "loss of two trained layers*",
            f"{_MESA}, fig. 2 and 3, results and weights of the public code",
        ),
        Stated("loss of six layers of block scalars over *", f"{_MESA}, fig. 2: .2157 over .2108"),
        Stated(
            "loss of six layers of block scalars",
            f"{_MESA}, fig. 2, six layers with every weight free",
        ),
        Stated("probe for *, trained", f"{_MESA}, section 4, probing"),
        Stated("probe for *", f"{_MESA}, section 4, probing", False),
        Stated("the same, (H *", f"{_MESA}, section 4, probing"),
    ),
    "tint": (
        Stated("parameters by the formula, *", f"{_TINT}, parameter table"),
        Stated(
            "public code, *",
            f"public code of {_TINT}, commit 1722081, as it was run",
            size="width 48, random weights",
        ),
        Stated("numbers that our simulator *", f"{_TINT}, parameter table"),
    ),
    "hyper-semi-supervised": (
        Stated("accuracy *", "after Zhmoginov et al. 2022, arXiv 2201.04182", False, "own"),
        Stated("gain from *", "after Zhmoginov et al. 2022, arXiv 2201.04182", size="own"),
        Stated("the same without *", "after Zhmoginov et al. 2022, arXiv 2201.04182", size="own"),
    ),
    "skill-composition": (
        Stated(
            "accuracy of pairs by heart",
            "Yu et al. 2023, arXiv 2310.17567; the closed form is ours",
            size="own",
        ),
    ),
}

_TIME = "takes hours of training"
ITEMS: Mapping[str, Sequence[Item]] = {
    "2212.07677": (
        Item("Prop. 1", elsewhere="certificate and tests: K steps, exact"),
        Item("Prop. 2", elsewhere="certificate and tests of kernel-descent"),
        Item("Prop. 3", elsewhere="certificate and tests of separate-tokens"),
        Item("fig. 1", "damping .875"),
        Item("fig. 2", elsewhere="benchmarks/sweeps.py: the sweep over N = N_x, kept"),
        Item("fig. 3", "the gamma of each of five layers: claims there are on functions alone"),
        Item("fig. 4", "the meta-learned MLP beside it"),
        Item("fig. 5", "when in training the copy appears"),
        Item("fig. 6", "other laws of the inputs than another scale"),
        Item("fig. 7", f"ten recurrent layers: {_TIME}"),
        Item("fig. 8", f"twelve layers with MLPs: {_TIME}"),
        Item("fig. 9", elsewhere="notebook 01; the claim on equal weights"),
        Item("fig. 10", "damping .875"),
        Item("fig. 11", "how two heads cancel"),
        Item("fig. 12"),
        Item("fig. 14", "two layers with LayerNorm"),
        Item("fig. 15", "phases of training with two heads"),
        Item("fig. 16"),
        Item("section 3"),
        Item("appendix A.9"),
        Item("appendix A.10", "condition numbers of fig. 13"),
    ),
    "2402.14180": (
        Item("Theorem 4.1", elsewhere="tests of the recursion, FULL and DIAG"),
        Item("Lemma 4.4", elsewhere="tests: momentum"),
        Item("Theorem 5.1", "only a start of the search for GD++"),
        Item("Theorem 5.2", "its construction for two levels of noise"),
        Item(
            "Table 1",
            "5 to 7 layers: in no default run; trained FULL layers of other depths than 2",
        ),
        Item("spread over seeds", "the table has the best of them, as ours has"),
        Item("fig. 4", "weights of other depths than 2"),
        Item("section 6"),
    ),
    "2303.08117": (
        Item("introduction", "F1 on the treebank: a benchmark, with gold tags and a sample"),
        Item("hard attention", "that construction, with 4 N heads"),
        Item("section 3", "other grammars and longer sentences than the example's", "notebook 04"),
        Item(
            "approximations",
            "F1 against kept symbols, 15 heads by low rank, depth and heads: benchmarks, which "
            "decide nothing",
        ),
        Item("probes", "tree and marginal probes on the treebank", "notebook 04, on one seed"),
    ),
    "2309.05858": (
        Item("Prop. 1"),
        Item("Prop. 2", "trained deep layers beside it: the example has one layer"),
        Item(
            "fig. 2", f"4 and 6 layers of free weights, softmax and hybrids: benchmarks; 7: {_TIME}"
        ),
        Item("fig. 3", "interpolation of 6 layers: a benchmark"),
        Item("section 4", "token binding of trained layers; linearised softmax"),
        Item("section 5", "at the paper's sizes: the example is smaller, to be fast"),
        Item("partially observed", "a task without claims"),
        Item("contracting", "a task without claims"),
        Item("nonlinear dynamics", "trained models"),
        Item("few-shot regression", "tuned prompts: a benchmark"),
        Item("language modelling", "a benchmark on toy text"),
    ),
    "2307.01189": (
        Item("construction", "", "certificate and tests: every parameter against autograd"),
        Item("Theorem 2.5", elsewhere="tests and certificate of softened constructions"),
        Item("parameter table", "", "notebook 06"),
        Item("WikiText-103", "a benchmark on exchanged words"),
        Item("classification", "a benchmark on synthetic labels"),
        Item("public code", "fitted models; half precision"),
    ),
}

#: What `orrery claims NAME` costs, as `benchmarks/claims_costs.py` measured it.
COSTS = Path(__file__).with_name("costs.json")


def cites(source: str, words: str) -> bool:
    """Whether a source has these words: "fig2" is in "figs. 2 and 3" and not in "fig. 21"."""

    def plainly(text: str) -> str:
        text = re.sub(r"\bfigs\b", "fig", text.lower())
        while (again := re.sub(r"\b(fig|prop)([\w. ,]*?)(,| and) (\d)", r"\1\2; \1 \4", text)) != (
            text
        ):
            text = again
        return re.sub(r"[\s.]", "", text)

    return bool(re.search(re.escape(plainly(words)) + r"(?!\d)", plainly(source)))


@dataclass(frozen=True)
class Covered:
    """A row of the ledger, as it is known without measuring it.

    Attributes:
        family, name: whose row it is; of measurements the name is a pattern.
        kind: "claim", "measurement" or "remark".
        source: paper and item.
        size: "paper", "own", or what the paper's sizes are reduced to.
        fails: what it must reject, or by what it is decided; "" where nothing can fail.
    """

    family: str
    name: str
    kind: str
    source: str
    size: str
    fails: str

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return dict(vars(self))


@dataclass(frozen=True)
class Line:
    """An item of a paper, and the rows that are about it."""

    paper: str
    item: str
    rows: tuple[Covered, ...]
    missing: str = ""
    elsewhere: str = ""

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return vars(self) | {"rows": [row.to_json() for row in self.rows]}


def rows(names: Sequence[str]) -> Iterator[Covered]:
    """Claims at the example settings, then numbers, of these families."""
    from constructions.runs import construct

    for name in names:
        family = CATALOGUE.find(name)
        claims = resolve(family.claims) if family.claims else construct(name).claims
        size = SIZES.get(name, "own")
        for claim in claims:
            fails = ", ".join(("random init", *claim.catches))
            yield Covered(name, claim.name, "claim", claim.source, size, fails)
        for row in STATED.get(name, ()):
            kind, fails = ("measurement", "its number") if row.decided else ("remark", "")
            yield Covered(name, row.names, kind, row.source, row.size, fails)


def stated(family: str, name: str) -> Stated | None:
    """The first of `STATED` that has this name."""
    return next((s for s in STATED.get(family, ()) if fnmatchcase(name, s.names)), None)


def coverage(names: Sequence[str], paper: str = "", item: str = "") -> list[Line]:
    """Every paper, item by item, as the rows of these families are about it.

    A row is about an item as `cites` says of its source. Rows of a paper that are about none of its
    items come last, then papers without items, then what has no paper.
    """
    found = [*rows(names)]
    papers = {**dict.fromkeys(ITEMS)}
    for row in found:
        papers |= dict.fromkeys(re.findall(r"\b\d{4}\.\d{4,5}\b", row.source))
    lines, placed = [], set()
    for number in papers:
        own = [row for row in found if cites(row.source, number)]
        for one in ITEMS.get(number, ()):
            about = tuple(row for row in own if cites(row.source, one.item))
            placed |= {*about}
            lines.append(Line(number, one.item, about, one.missing, one.elsewhere))
        if rest := tuple(row for row in own if row not in placed):
            lines.append(Line(number, "other" if number in ITEMS else "", rest))
            placed |= {*rest}
    if rest := tuple(row for row in found if row not in placed):
        lines.append(Line("", "checks of our own", rest))
    return [
        line
        for line in lines
        if (not paper or line.paper == paper) and (not item or cites(line.item, item))
    ]


@cache
def costs() -> Mapping[str, Mapping[str, float]]:
    """Family -> CPU seconds of its parts, five seeds; see `benchmarks/claims_costs.py`."""
    return json_object(COSTS)["families"]


def minutes(name: str, quick: bool, claims: bool = True, seeds: int = 5) -> str:
    """How long the claims of a family take, and the numbers beside them, in words.

    Args:
        name: of the family.
        quick: at demonstration settings.
        claims: whether any of its claims is asked for: an item that has none needs no fit.
        seeds: of the fits. Their cost is that of five times as many fifths, compilation included.
    """
    found, numbered = costs().get(name), name in STATED
    if found is None:
        return "minutes not measured"
    fits = found["claims" if quick else "claims in full"] * seeds / 5 if claims else 0.0
    numbers = found["numbers"] if numbered and quick else 0.0
    said = f"about {_minutes(fits + numbers)} of one core"
    return said + (", and numbers not measured in full" if numbered and not quick else "")


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
