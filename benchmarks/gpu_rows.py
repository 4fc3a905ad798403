"""What `benchmarks.gpu_suite` found: one pass of one entry as a value, and all of them as text and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

import torch

from pyvolconv.autotune import geometric_mean
from pyvolconv.problem import LAYOUTS, PASSES, ConvProblem, Layout, Pass


@dataclass
class Time:
    """Seconds per call, of whom, and what is to be known about it (empty: a median of several samples)."""

    seconds: float
    backend: str
    note: str = ""


@dataclass
class Row:
    """One pass of one entry."""

    name: str
    pass_: Pass
    problem: str
    flops: int
    least_bytes: int
    matmul_rate: float
    ours: dict[Layout, Time] = field(default_factory=dict)
    torch: dict[Layout, Time] = field(default_factory=dict)
    chosen: dict[Layout, str] = field(default_factory=dict)
    """Who is taken where torch may be, too."""
    configurations: dict[Layout, dict[str, float]] = field(default_factory=dict)
    error: dict[Layout, float] = field(default_factory=dict)
    """As a multiple of the bound that the backend states."""
    difference: dict[Layout, float] = field(default_factory=dict)
    """From torch's result, in the norm."""
    reproducible: dict[Layout, bool] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    @property
    def wrong(self) -> bool:
        limit = 4 * torch.finfo(torch.float16 if "float32" in self.problem else _dtype(self.problem)).eps
        return any(error > 1 for error in self.error.values()) or any(d > limit for d in self.difference.values())

    @property
    def ratios(self) -> dict[str, float | None]:
        """Torch's time over ours: both in the better layout, both in ncdhw, and where torch may be taken."""
        if self.wrong or not self.ours or not self.torch:
            return {"ratio": None, "ncdhw": None, "+aten": None}
        peer = _least(self.torch)
        taken = [
            self.ours[layout].seconds if self.chosen.get(layout) != "aten" else self.torch[layout].seconds
            for layout in LAYOUTS
            if layout in (self.ours if self.chosen.get(layout) != "aten" else self.torch)
        ]
        ncdhw = self.torch["ncdhw"].seconds / self.ours["ncdhw"].seconds if self._both("ncdhw") else None
        return {"ratio": peer / _least(self.ours), "ncdhw": ncdhw, "+aten": peer / min(taken) if taken else None}

    def _both(self, layout: Layout) -> bool:
        return layout in self.ours and layout in self.torch

    def __str__(self) -> str:
        cells = [f"{self.name:15} {self.pass_:11}"]
        if self.ours:
            layout = min(self.ours, key=lambda layout: self.ours[layout].seconds)
            best = self.ours[layout]
            rate = self.flops / best.seconds
            cells.append(f"{1e6 * best.seconds:9.1f} us {rate / 1e12:6.1f} TF/s {rate / self.matmul_rate:4.0%}")
            cells.append(f"{layout} {best.backend:20}")
        cells.append("torch " + " ".join(_microseconds(self.torch.get(layout)) for layout in LAYOUTS))
        cells += [f"{name} {'-' if ratio is None else f'{ratio:.2f}'}" for name, ratio in self.ratios.items()]
        if self.error:
            cells.append(f"err {max(self.error.values()):.2g}")
        if self.wrong and self.difference:
            cells.append(f"from torch's {max(self.difference.values()):.2g}")
        cells += ["WRONG"] * self.wrong + ["not reproducible"] * (not all(self.reproducible.values()))
        return "  ".join(cells + [failure.splitlines()[0][:100] for failure in self.failures])


def _least(times: dict[Layout, Time]) -> float:
    return min(one.seconds for one in times.values())


def _microseconds(one: Time | None) -> str:
    return "        -" if one is None else f"{1e6 * one.seconds:9.1f}" + ("~" if one.note else " ")


def _dtype(text: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, ConvProblem.parse(text).dtype)
    return found


def summary(rows: list[Row]) -> str:
    """Geometric means, how many are ahead, and what is not as it should be."""
    lines = []
    for which in ("ratio", "ncdhw", "+aten"):
        known = [ratio for row in rows if (ratio := row.ratios[which]) is not None]
        ahead = sum(ratio >= 1 for ratio in known)
        mean = geometric_mean(known)
        lines.append(f"{which:6} {'-' if mean is None else f'{mean:.2f}'} in the mean, {ahead} of {len(known)} ahead")
    for pass_ in PASSES:
        mean = geometric_mean(row.ratios["ratio"] for row in rows if row.pass_ == pass_)
        lines.append(f"{pass_:11} {'-' if mean is None else f'{mean:.2f}'}")
    lines += [f"WRONG: {row.name} {row.pass_}" for row in rows if row.wrong]
    lines += [f"NOT REPRODUCIBLE: {row.name} {row.pass_}" for row in rows if not all(row.reproducible.values())]
    return "\n".join(lines)


def table(rows: list[Row]) -> str:
    """One line for each entry; of each pass "ratio", the share of the matrix product's rate, and our microseconds."""
    lines = [" " * 15 + "".join(f"  {pass_:>24}" for pass_ in PASSES)]
    for name in dict.fromkeys(row.name for row in rows):
        cells = {row.pass_: _cell(row) for row in rows if row.name == name}
        lines.append(f"{name:15}" + "".join(f"  {cells.get(pass_, ''):>24}" for pass_ in PASSES))
    return "\n".join(lines)


def _cell(row: Row) -> str:
    if row.wrong or not row.ours:
        return "WRONG" if row.wrong else "failed"
    best, ratio = _least(row.ours), row.ratios["ratio"]
    share = row.flops / best / row.matmul_rate
    return f"{'-' if ratio is None else f'{ratio:.2f}x'} {share:4.0%} {1e6 * best:9.1f} us"


def to_json(rows: list[Row], facts: dict[str, object]) -> str:
    entries = [asdict(row) | {"wrong": row.wrong, "ratios": row.ratios} for row in rows]
    return json.dumps(facts | {"rows": entries}, indent=1)
