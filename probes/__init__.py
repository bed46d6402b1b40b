"""How far a trained model is its construction: interventions, probes, claims and the report."""
