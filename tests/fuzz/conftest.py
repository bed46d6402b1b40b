"""The counters of the properties at the end of the report, where one process has run them."""

import pytest
from fuzz import fuzzing


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Examples and seconds of every property."""
    lines = fuzzing.summary()
    if lines:
        terminalreporter.section("random inputs")
        for line in lines:
            terminalreporter.write_line(line)
