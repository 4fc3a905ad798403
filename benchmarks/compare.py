"""One table from the results of a run: every backend and layout against torch's better layout.

`pytest benchmarks/` prints it at the end. For results that were kept:

    pytest benchmarks/ --benchmark-json results.json
    python -m benchmarks.compare results.json
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

HEADER = ("problem", "pass", "backend", "layout", "ms", "GF/s", "of peak", "of roofline", "x torch")


def table(results: Iterable[Mapping[str, Any]]) -> str:
    """Rows of text, fastest first within a problem and pass.

    Args:
        results: the `extra_info` of each timed result, as conftest.py fills it.

    Returns:
        "x torch" is how many times faster than torch in the better of its two layouts, which is 1.00 there.

    Example:
        >>> row = dict(name="a", pass_="forward", layout="ncdhw", gflops=10, share_of_peak=0.1, share_of_roofline=0.2)
        >>> torch_row = row | dict(backend="aten", milliseconds=4.0, ours=False)
        >>> print(table([torch_row, row | dict(backend="cpp.direct", milliseconds=2.0, ours=True)]))
        problem  pass     backend     layout    ms  GF/s  of peak  of roofline  x torch
        a        forward  cpp.direct  ncdhw   2.00  10.0      10%          20%     2.00
        a        forward  aten        ncdhw   4.00  10.0      10%          20%     1.00
    """
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for result in results:
        groups[result["name"], result["pass_"]].append(result)
    rows = [HEADER]
    for (name, pass_), group in groups.items():
        torch_best = min((result["milliseconds"] for result in group if not result["ours"]), default=None)
        for result in sorted(group, key=lambda result: result["milliseconds"]):
            ratio = "-" if torch_best is None else f"{torch_best / result['milliseconds']:.2f}"
            rows.append(
                (
                    name,
                    pass_,
                    result["backend"],
                    result["layout"],
                    f"{result['milliseconds']:.2f}",
                    f"{result['gflops']:.1f}",
                    f"{result['share_of_peak']:.0%}",
                    f"{result['share_of_roofline']:.0%}",
                    ratio,
                )
            )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if position < 4 else cell.rjust(width)
            for position, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def main(paths: list[str]) -> int:
    """Print the table of one or several files that `--benchmark-json` wrote."""
    if not paths:
        print("usage: python -m benchmarks.compare RESULTS.json [...]", file=sys.stderr)
        return 2
    results = []
    for path in paths:
        results += [entry["extra_info"] for entry in json.loads(Path(path).read_text())["benchmarks"]]
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
