"""How the report writes numbers: three significant digits and a unit, the same in HTML, terminal and plots."""

from __future__ import annotations

import math

NOT_MEASURED = "–"
MINUS = "\N{MINUS SIGN}"


def significant(value: float | None, digits: int = 3) -> str:
    """A number with that many significant digits, thousands separated.

    Example:
        >>> significant(1234.5), significant(0.01234), significant(None)
        ('1,230', '0.0123', '–')
    """
    if value is None or not math.isfinite(value):
        return NOT_MEASURED
    if value == 0:
        return "0"
    if abs(value) < 0.001:
        return "< 0.001"
    magnitude = math.floor(math.log10(abs(value)))
    rounded = round(value, digits - 1 - magnitude)
    magnitude = math.floor(math.log10(abs(rounded)))
    return f"{rounded:,.{max(0, digits - 1 - magnitude)}f}".replace("-", MINUS)


def milliseconds(value: float | None) -> str:
    """Milliseconds, in seconds from ten seconds on.

    Example:
        >>> milliseconds(4.321), milliseconds(12345.0)
        ('4.32 ms', '12.3 s')
    """
    if value is None:
        return NOT_MEASURED
    return f"{significant(value)} ms" if abs(value) < 10_000 else f"{significant(value / 1000)} s"


def seconds(value: float | None) -> str:
    """Seconds, in minutes from two minutes on.

    Example:
        >>> seconds(12.34), seconds(200.0)
        ('12.3 s', '3 min 20 s')
    """
    if value is None:
        return NOT_MEASURED
    if value < 120:
        return f"{significant(value)} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s"


def ratio(value: float | None) -> str:
    """A factor.

    Example:
        >>> ratio(2.468), ratio(None)
        ('2.47×', '–')
    """
    return NOT_MEASURED if value is None else f"{significant(value)}×"


def percent(value: float | None, digits: int = 0) -> str:
    """A share from 0 to 1 as a percentage.

    Example:
        >>> percent(0.987, 1)
        '98.7%'
    """
    return NOT_MEASURED if value is None else f"{100 * value:.{digits}f}%"


def scaled(value: float | None, unit: str) -> str:
    """A large quantity with a decimal prefix.

    Example:
        >>> scaled(2.5e9, "FLOP"), scaled(12_300.0, "B")
        ('2.50 GFLOP', '12.3 kB')
    """
    if value is None:
        return NOT_MEASURED
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{significant(value / factor)} {prefix}{unit}"
    return f"{significant(value)} {unit}"


def binary(size: int | None) -> str:
    """A size of memory in binary units.

    Example:
        >>> binary(32768), binary(32 * 2**20)
        ('32 KiB', '32 MiB')
    """
    if size is None:
        return NOT_MEASURED
    for factor, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= factor:
            return f"{significant(size / factor)} {unit}".replace(".0 ", " ")
    return f"{size} B"


def count(value: float | None) -> str:
    """A whole number, thousands separated.

    Example:
        >>> count(97194)
        '97,194'
    """
    return NOT_MEASURED if value is None else f"{round(value):,}"


def divide(numerator: float | None, denominator: float | None) -> float | None:
    """The quotient, or None where a side is missing or the denominator is zero."""
    if numerator is None or not denominator:
        return None
    return numerator / denominator
