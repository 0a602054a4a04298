"""Fails where a test report shows that a test was skipped because the real data sets were not there.

Usage: ``python .ci/no_data_skips.py REPORT.xml`` with the JUnit report of a run that had ``GKD_DATA``.
"""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree


def main(path: str) -> int:
    """Exit status: 0 where tests ran and none was skipped for want of data."""
    cases = list(ElementTree.parse(path).iter("testcase"))
    skipped = {
        f"{case.get('classname')}::{case.get('name')}": skip.get("message", "") + (skip.text or "")
        for case in cases
        for skip in case.iter("skipped")
    }
    without_data = sorted(name for name, reason in skipped.items() if "GKD_DATA" in reason)
    print(f"{len(cases)} tests, {len(skipped)} skipped, {len(without_data)} of them for want of data")
    for name in without_data:
        print(f"  skipped although GKD_DATA is set: {name}", file=sys.stderr)
    return 1 if without_data or len(cases) == len(skipped) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
