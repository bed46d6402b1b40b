r"""Another batch size for Adam, the same path of training.

The square-root rule (Malladi et al. 2022, arXiv 2205.10287): with kappa times as many examples in
a batch,

    learning rate * sqrt(kappa),    1 - b_i times kappa,    eps / sqrt(kappa),    steps / kappa,

because a gradient that is mostly noise has a size of its own that falls as 1 / sqrt(kappa), and
Adam divides by that size. (Of gradient descent the linear rule is right.) Decoupled weight decay
takes sqrt(kappa) too, so that rate * decay * steps, by which it shrinks the weights, stays. It
misleads where the gradient is not mostly noise: there Adam's step does not depend on the batch.
"""

from __future__ import annotations

import math
from dataclasses import replace

from synthetic.recipe import Recipe


def square_root_scaled(recipe: Recipe, kappa: float | int) -> Recipe:
    """The recipe with kappa times its batch, by the square-root rule.

    What is counted in steps (steps, warm-up, chunks, the memory of `ema`) is counted in examples
    from then on: there are kappa times fewer. Rounded, to at least 1 where it was.

    Args:
        recipe: of "adam" or "adamw".
        kappa: above 0; such that the batch is a whole number.

    Raises:
        ValueError: another optimiser, a kappa that is not allowed, or one so large that
            kappa (1 - b) >= 1 for one of b1, b2 and `ema`.
    """
    if recipe.optimizer not in ("adam", "adamw"):
        raise ValueError(f"optimizer is {recipe.optimizer!r}, must be 'adam' or 'adamw'")
    if not (math.isfinite(kappa) and kappa > 0):
        raise ValueError(f"kappa is {kappa}, must be finite and above 0")
    batch = round(kappa * recipe.batch)
    if batch < 1 or not math.isclose(batch, kappa * recipe.batch, rel_tol=1e-9):
        many = kappa * recipe.batch
        raise ValueError(f"kappa is {kappa}: {many:g} examples in a batch, must be a whole number")

    def memory(name: str, decay: float) -> float:
        after = kappa * (1 - decay)
        if after > 1 - 1e-9:  # 10 (1 - 0.9) is 1
            raise ValueError(
                f"kappa is {kappa}, must be below {1 / (1 - decay):.4g} with {name}={decay}"
            )
        return 1 - after

    def counted(steps: int) -> int:
        return max(round(steps / kappa), min(steps, 1))

    return replace(
        recipe,
        batch=batch,
        learning_rate=recipe.learning_rate * math.sqrt(kappa),
        b1=memory("b1", recipe.b1),
        b2=memory("b2", recipe.b2),
        eps=recipe.eps / math.sqrt(kappa),
        weight_decay=recipe.weight_decay * math.sqrt(kappa),
        steps=counted(recipe.steps),
        warmup=counted(recipe.warmup),
        chunk=counted(recipe.chunk),
        checkpoint_every=counted(recipe.checkpoint_every),
        ema=None if recipe.ema is None else memory("ema", recipe.ema),
    )
