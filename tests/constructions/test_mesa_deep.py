"""What the ledger says of deep linear attention, before anything is trained."""

import jax

from constructions.mesa.polynomial import MesaPolynomial, best_coefficients
from probes.ledger import ledger
from synthetic.tasks.dynamics import LinearDynamics


def test_the_claim_on_deep_layers_can_fail():
    coefficients = best_coefficients(LinearDynamics(4, 16), 1, jax.random.key(0), 2**11)
    c = MesaPolynomial(4, 16, tokens="constructed", coefficients=coefficients)
    (row,) = ledger(c, batch=2**12)
    assert row.verdict == "holds", row  # the construction passes and every control is caught
    assert set(row.claim.catches) < set(row.values)
