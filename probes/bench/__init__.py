"""How well do methods find mechanisms that are known? `orrery bench` draws the card.

subjects   constructions in disguises, with the truth about every head and every value
disguises  what hides a mechanism: distractors, shared jobs, backups, bases, noise
patches    compiled runs with one part replaced
methods    what is put to the test, each a few lines
exchange   subjects as folders for methods of others, and their answers scored
scores     an answer against the truth
card       methods by disguises: printed, as JSON and as a page
command    the subcommand
"""
