r"""Few-shot classification: some examples of each class, perhaps some without labels, and queries.

    mu_c ~ N(0, spread^2 I),    e = mu_y + noise eps,    eps ~ N(0, I),

with new classes c = 1..C in every episode: `shots` labelled examples of each, `unlabelled` ones and
`queries` of classes drawn at random. What is known of class c after n_c labelled examples is a
Gaussian, so that the probability of the label of a query q has a closed form, with S_c their sum,

    m_c = spread^2 S_c / (n_c spread^2 + noise^2),
    v_c = noise^2 + spread^2 noise^2 / (n_c spread^2 + noise^2),
    log P(c | q)  =  -|q - m_c|^2 / 2 v_c - (dim / 2) log v_c + const,

and no classifier that sees labelled examples only has a lower cross-entropy (`posterior`). Where
all classes have n examples it is that of the shrunk prototypes kappa mean_c,

    (kappa mean_c . q - kappa^2 |mean_c|^2 / 2) / v,    kappa = n spread^2 / (n spread^2 + noise^2).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from synthetic.compilation import compile_once, many
from synthetic.guards import number
from synthetic.tasks.task import Batch, Outcome

Support = Float[Array, "batch support dim"]
Labels = Int[Array, "batch labelled"]
Queries = Float[Array, "batch query dim"]
Logits = Float[Array, "batch query class"]


@dataclass(frozen=True)
class GaussianClasses:
    """Episodes of few-shot classification, a `Task`. Hashable.

    Attributes:
        dim: of the features.
        classes: C, at least 2.
        shots: labelled examples of each class.
        queries: whose labels are asked for, in an episode.
        unlabelled: examples without a label, in an episode.
        spread: standard deviation of each coordinate of the classes' means.
        noise: that of the examples around them.

    Raises:
        ValueError: a number out of range.
    """

    dim: int = 8
    classes: int = 5
    shots: int = 2
    queries: int = 5
    unlabelled: int = 0
    spread: float | int = 1.0
    noise: float | int = 1.0

    outcome: ClassVar[Outcome] = "logits"

    def __post_init__(self) -> None:
        lowest = {"dim": 1, "classes": 2, "shots": 1, "queries": 1, "unlabelled": 0}
        for name, low in lowest.items():
            number(name, getattr(self, name), whole=True, least=low)
        for name in ("spread", "noise"):
            object.__setattr__(self, name, number(name, getattr(self, name), above=0))

    @property
    def labelled(self) -> int:
        """Examples with a label, in an episode."""
        return self.classes * self.shots

    @property
    def shrinkage(self) -> float:
        """kappa: the posterior mean of a class over the mean of its examples."""
        return self.shots * self.spread**2 / (self.shots * self.spread**2 + self.noise**2)

    @property
    def predictive_variance(self) -> float:
        """v: variance of each coordinate of a query, given its class's examples."""
        return self.noise**2 * (1 + self.shrinkage / self.shots)

    def scaled_inputs(self, factor: float | int) -> GaussianClasses:
        """The same with all features times a factor; ValueError unless that is above 0."""
        return replace(self, spread=self.spread * factor, noise=self.noise * factor)

    @compile_once(static_argnums=(0, 2), often=many)
    def sample(self, key: Array, batch: int) -> Batch:
        """Draw episodes.

        Returns:
            `inputs`: support `[batch, labelled + unlabelled, dim]`, labels `[batch, labelled]` of
            the first of them, int32 in 0..C-1 and in random order, queries `[batch, query, dim]`;
            `target`: the queries' labels, `[batch, query]`.
        """
        mean_key, order_key, other_key, noise_key = jax.random.split(key, 4)
        means = self.spread * jax.random.normal(mean_key, (batch, self.classes, self.dim))
        order = jnp.argsort(jax.random.uniform(order_key, (batch, self.labelled)))
        labels = (order % self.classes).astype(jnp.int32)
        rest = (batch, self.unlabelled + self.queries)
        others = jax.random.randint(other_key, rest, 0, self.classes, jnp.int32)
        kinds = jnp.concatenate([labels, others], 1)
        features = jnp.take_along_axis(means, kinds[..., None], 1)
        features += self.noise * jax.random.normal(noise_key, features.shape)
        support = self.labelled + self.unlabelled
        inputs = features[:, :support], labels, features[:, support:]
        return Batch(inputs, others[:, self.unlabelled :])

    def loss(self, prediction: Logits, batch: Batch) -> Float[Array, " batch"]:
        """Cross-entropy of logits in nats, mean over queries; ValueError for other shapes."""
        wanted = (*batch.target.shape, self.classes)
        if prediction.shape != wanted:
            raise ValueError(f"prediction has shape {prediction.shape}, must be {wanted}")
        scores = jax.nn.log_softmax(prediction)
        return -jnp.take_along_axis(scores, batch.target[..., None], -1)[..., 0].mean(-1)

    def accuracy(self, prediction: Logits, batch: Batch) -> Float[Array, " batch"]:
        """Share of queries whose label has the largest logit."""
        return (prediction.argmax(-1) == batch.target).mean(-1)

    def posterior(self, support: Support, labels: Labels, queries: Queries) -> Logits:
        """log P(label | query, labelled examples), up to a constant of each query: see the module.

        Classes may have any numbers of examples, none among them; what has no label is left out.
        """
        shown = jax.nn.one_hot(labels, self.classes, dtype=support.dtype)
        einsum = partial(jnp.einsum, precision="highest")
        total = einsum("bnc,bnd->bcd", shown, support[:, : labels.shape[1]])
        weight = shown.sum(1) * self.spread**2 + self.noise**2
        mean = self.spread**2 * total / weight[..., None]
        variance = self.noise**2 * (1 + self.spread**2 / weight)
        distance = ((queries[:, :, None] - mean[:, None]) ** 2).sum(-1)
        log_density = -distance / (2 * variance[:, None])
        return log_density - self.dim / 2 * jnp.log(variance)[:, None]

    def step_size(self) -> float:
        """The best eta of one gradient step on cross-entropy from zero, for its loss on queries.

        The step's logits are eta z_c, z_c = (1/n) sum_i (y_ic - 1/C) (e_i . q + 1). The loss is
        convex in eta; its minimum is found on 50,000 queries that are always the same.
        """
        return _step_size(replace(self, unlabelled=0, queries=10))


@lru_cache
def _step_size(task: GaussianClasses) -> float:
    rng, episodes = np.random.default_rng(0), 5000
    means = task.spread * rng.standard_normal((episodes, task.classes, task.dim))
    # the sum of n examples of a class, in one draw
    shift = task.noise * np.sqrt(task.shots) * rng.standard_normal(means.shape)
    total = task.shots * means + shift
    kinds = rng.integers(0, task.classes, (episodes, task.queries))
    queries = np.take_along_axis(means, kinds[..., None], 1)
    queries = queries + task.noise * rng.standard_normal(queries.shape)
    z = queries @ np.swapaxes(total - total.mean(1, keepdims=True), 1, 2) / task.labelled
    right = np.take_along_axis(z, kinds[..., None], -1)[..., 0]
    eta = 0.0
    for _ in range(50):  # Newton's method on a convex function
        p = np.exp(eta * z - (eta * z).max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        mean = (p * z).sum(-1)
        slope, curvature = (mean - right).mean(), ((p * z**2).sum(-1) - mean**2).mean()
        eta -= slope / curvature
        if abs(slope) < 1e-9 * curvature:
            break
    return float(eta)
