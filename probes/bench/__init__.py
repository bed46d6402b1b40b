"""How well do methods find mechanisms that are known? `orrery bench` draws the card.

subjects   constructions in disguises, with the truth about every head and every value
patches    compiled runs with one part replaced
methods    what is put to the test, each a few lines
scores     an answer against the truth
card       methods by disguises: printed, as JSON and as a page
command    the subcommand
"""
