"""Prints the table of docs/reliability.md: runs all tests, the sweep included, and adds up what they count with `tried`.

python tests/reliability.py [options of pytest]
"""

from __future__ import annotations

import sys
from collections import Counter

import pytest


class Tally:
    """A pytest plugin that adds up the counts of all tests that passed.

    Attributes:
        counts: by kind.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Takes the counts of one test, also from another process of pytest-xdist."""
        if report.when == "teardown" and report.passed:
            for name, value in report.user_properties:
                if name == "tried":
                    kind, number = value
                    self.counts[kind] += number


if __name__ == "__main__":
    tally = Tally()
    status = pytest.main(["-q", "-m", "sweep or not sweep", *sys.argv[1:]], plugins=[tally])
    print("\n| tried | times |\n| --- | ---: |")
    for kind, number in sorted(tally.counts.items(), key=lambda item: -item[1]):
        print(f"| {kind} | {number:,} |")
    sys.exit(status)
