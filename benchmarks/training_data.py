"""What do models learn from pruned text, and from corrupted spans, beside exact optima?

The rows of `constructions.inside_outside.training_data`: grammars and masked language models of
text whose documents were kept by their perplexity, and masked language models of spans and of
single hidden words after equally many steps, five seeds each.
"""

import time

from common import report

from constructions.inside_outside.training_data import rows


def main() -> None:
    began, found = time.perf_counter(), {}
    for row in rows(quick=False, seed=0):
        found[row.name] = {"verdict": row.verdict} | row.to_json()
        print(row.name, row.measured, row.verdict, row.note, flush=True)
    report("training_data", {"rows": found, "seconds": round(time.perf_counter() - began)})


if __name__ == "__main__":
    main()
