"""A page of probes and the ledger.

data       everything that a report shows, as plain data: the ledger and a probe a section
index      the page that lists the reports of a demonstration; needs no JAX
page       the page itself, its numbers as JSON, its figures as files
tables     what the command prints
commands   compare and demo, which fit and judge
claims     the ledger of a family alone, and what it holds of each paper
"""
