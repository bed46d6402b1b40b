"""Words and positions: looked up, scored and, where they are trained, changed.

With p_t(v) the probability of word v behind position t, m_t the mask and h_t the last hidden state,

    d h_t  =  m_t (sum_v p_t(v) E_v - E_x(t+1)),
    d E_v  =  sum_t m_t (p_t(v) - [v follows t]) h_t  +  sum_(t with word v) d (E_v + P_t).
"""

from __future__ import annotations

from dataclasses import dataclass

from constructions.program import SELF, Head
from constructions.slots import Affine, Slot
from constructions.tint.layout import TEXT, WORDS, Layout, Tape
from constructions.tint.parts import ONE, itself

NEXT = (1, 1)


@dataclass(frozen=True)
class Words:
    """The heads between tokens of words and the text.

    Attributes:
        layout: slots of embeddings and positions.
        rate: eta, of their descent.
        trained: whether they are.
    """

    layout: Layout
    rate: float
    trained: bool

    @property
    def now(self) -> Affine:
        """Embeddings at the tokens of words, with what was changed."""
        if not self.trained:
            return self.layout.embedding
        return self.layout.embedding + self.layout.trainable["embedding change"]

    def enter(self, tape: Tape, stream: Slot) -> list[Head]:
        """stream = embedding + position; those of now are looked up where they are trained."""
        embedding, position = self.layout.embedding, self.layout.position
        if not self.trained:
            return [itself(embedding + position, stream, "enter")]
        own = self.layout.trainable
        seen, word = tape("embedding", embedding.size), own["word"]
        following = tape("next word", word.size)
        return [
            itself(position + own["position change"], stream, "position"),
            Head(
                word, word, self.now, {stream: 1.0, seen: 1.0}, queries=TEXT, keys=WORDS,
                name="look up",
            ),
            Head(
                ONE, ONE, word, {following: 1.0}, queries=TEXT, keys=TEXT, window=NEXT,
                name="next word",
            ),
        ]  # fmt: skip

    def readout_back(self, tape: Tape, final: Slot, guess: Slot) -> list[Head]:
        """guess_t += sum_v p_t(v) E_v - E_x(t+1), and the descent of the readout."""
        layout = self.layout
        seen = tape("embedding", layout.embedding.size) if self.trained else layout.embedding
        heads = [
            Head(
                final, self.now, self.now, {guess: 1.0}, "softmax", TEXT, WORDS,
                name="expected embedding",
            ),
            Head(
                ONE, ONE, seen, {guess: -1.0}, queries=TEXT, keys=TEXT, window=NEXT,
                name="next embedding",
            ),
        ]  # fmt: skip
        if not self.trained:
            return heads
        change, word = layout.trainable["embedding change"], layout.trainable["word"]
        wiring = {"queries": WORDS, "keys": TEXT, "factor": (ONE, layout.train)}
        heads += [
            Head(
                self.now, final, final, {change: -self.rate}, "transposed_softmax",
                name="readout descends", **wiring,
            ),
            Head(
                word, tape("next word", word.size), final, {change: self.rate},
                name="readout ascends", **wiring,
            ),
        ]  # fmt: skip
        return heads

    def enter_back(self, down: Slot) -> list[Head]:
        """Embeddings and positions descend as inputs, whose gradient is `down`."""
        own = self.layout.trainable
        return [
            Head(
                own["word"], own["word"], down, {own["embedding change"]: -self.rate},
                queries=WORDS, keys=TEXT, name="embedding descends",
            ),
            Head(
                ONE, ONE, down, {own["position change"]: -self.rate}, queries=TEXT, keys=TEXT,
                window=SELF, name="position descends",
            ),
        ]  # fmt: skip
