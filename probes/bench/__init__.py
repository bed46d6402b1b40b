"""How well do methods find mechanisms that are known? `orrery bench` draws the card.

families   cheap settings and inputs of every family
disguises  what makes a mechanism harder to find
truth      what a program uses: slots, heads and edges
subjects   constructions in disguises, with the truth about every head, every value and every edge
patches    compiled runs with one part replaced
evidence   what a method sees of a subject, and what it says
methods    what is put to the test, each a few lines
edges      those methods that ask for edges
scores     an answer against the truth
findings   findings of others, with their numbers
card       methods by disguises: printed, as JSON and as a page
guide      the tables of README and documentation
exchange   subjects for methods of others, and their answers
command    the subcommand
"""
