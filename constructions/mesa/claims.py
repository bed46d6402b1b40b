"""What von Oswald et al. 2023 say of models that predict the next state, as claims."""

from __future__ import annotations

from constructions.claims import Claim

_PAPER = "von Oswald et al. 2023, arXiv 2309.05858"

RIDGE_CLAIMS = (
    Claim(
        "loss of ridge regression",
        "One trained mesa layer has the loss of ridge regression on the sequence so far.",
        "excess_loss",
        0.03,
        "<=",
        f"{_PAPER}, section 5",
        catches=("regularization x 1000", "one gradient step", "pairs a state with itself"),
        published=0.0,
        note="Its regularisation is learned. The paper's own least-squares curve leaves the newest "
        "pair out; this one does not (see the published numbers).",
    ),
    Claim(
        "predictions of ridge regression",
        "Its predictions are those of ridge regression.",
        "prediction_distance",
        0.1,
        "<=",
        f"{_PAPER}, section 5",
        catches=("regularization x 1000", "one gradient step", "pairs a state with itself"),
    ),
)

ONE_STEP_CLAIMS = (
    Claim(
        "loss of one step",
        "One trained layer of linear attention has the loss of one step of gradient descent.",
        "excess_loss",
        0.02,
        "<=",
        f"{_PAPER}, section 4 and Prop. 1",
        catches=("step size + 20 %", "step size - 20 %", "pairs a state with itself"),
        published=0.0,
        note="From below: keys and values that mix s_t and s_{t-1} gain a little, the more the "
        "fewer dimensions there are (2.6 % at 4, 1.2 % at 8).",
    ),
    Claim(
        "predictions of one step",
        "Its predictions are those of the gradient step.",
        "prediction_distance",
        0.15,
        "<=",
        f"{_PAPER}, section 4 and Prop. 1",
        catches=("step size + 20 %", "step size - 20 %", "pairs a state with itself"),
    ),
)
