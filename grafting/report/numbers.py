"""Numbers and lists for people: significant digits, prefixes, percentages, durations, ratios, intervals."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence


def significant(value: float, digits: int = 3) -> str:
    """A number with `digits` significant digits: 10.7, 0.0781, 1230; very small ones as 1.23e-06."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "∞" if value > 0 else "−∞"
    rounded = float(f"{value:.{digits - 1}e}")
    if rounded == 0:
        return "0"
    exponent = math.floor(math.log10(abs(rounded)))
    text = f"{rounded:.{digits - 1}e}" if exponent < -4 else f"{rounded:.{max(0, digits - 1 - exponent)}f}"
    return text.replace("-", "−", 1) if value < 0 else text


def with_prefix(value: float, unit: str = "", base: int = 1000) -> str:
    """A count with K, M, G … (`base` 1000) or Ki, Mi, Gi … (`base` 1024): 2.51M, 38.4K, 1.21 GiB."""
    prefixes = ["", "K", "M", "G", "T", "P", "E"]
    power = 0
    while power + 1 < len(prefixes) and abs(float(f"{value:.2e}")) >= base and math.isfinite(value):
        value, power = value / base, power + 1
    number = f"{value:.0f}" if power == 0 and value == round(value, 0) else significant(value)
    prefix = prefixes[power] + ("i" if base == 1024 and power else "")
    return f"{number} {prefix}{unit}" if unit else f"{number}{prefix}"


def percent(share: float) -> str:
    """A share (0..1) in percent with one decimal, and more where it would read 0.0%: 93.4%, 0.012%."""
    value = 100 * share
    text = f"{value:.1f}" if abs(value) >= 1 or value == 0 else significant(value, 2)
    return f"{text}%".replace("-", "−")


def duration(seconds: float) -> str:
    """Seconds as a person says them: 12.3 s, 4 min 05 s, 2 h 10 min."""
    if seconds < 60:
        return f"{significant(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def milliseconds(value: float) -> str:
    return f"{significant(value)} ms" if value < 1000 else f"{significant(value / 1000)} s"


def as_ratio(value: float | None, host: float | None) -> str | None:
    return None if value is None or not host else f"{value / host:.2f}×"


def as_interval(bounds: tuple[float, float] | None, *, signed: bool = False) -> str | None:
    if bounds is None:
        return None
    low, high = (with_sign(bound) if signed else significant(bound) for bound in bounds)
    return f"{low} to {high}" if signed or bounds[0] < 0 else f"{low}–{high}"


def with_sign(value: float) -> str:
    return ("+" if value > 0 else "") + significant(value)


def gap_closed(value: float | None, host: float | None, fresh: float | None) -> float | None:
    """(fresh − value) / (fresh − host): the share of what the graft broke that training has repaired.

    None when one is missing or not finite, or when the fresh operators are no worse than the host.
    """
    if value is None or host is None or fresh is None:
        return None
    closed = (fresh - value) / (fresh - host) if fresh > host else math.nan
    return closed if math.isfinite(closed) else None


def listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def slot_order(slot: str) -> list[int | str]:
    # Digit runs alternate with text, so that like is compared with like: mixer.2 before mixer.10.
    return [int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", slot)]
