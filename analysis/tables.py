"""Numbers and intervals as short text."""

import math


def number(value, digits: int = 3) -> str:
    """Three significant digits: 0.514, 2.07, 482, 7.32e+10; '-' for a missing number."""
    if value is None or not math.isfinite(value):
        return "-"
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    if exponent < -3 or exponent > 4:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{max(digits - 1 - exponent, 0)}f}"


def with_interval(entry: dict, digits: int = 3) -> str:
    """'0.514 [0.482, 0.558]' from `{"value", "lo", "hi"}`."""
    text = number(entry["value"], digits)
    if entry.get("lo") is None or not math.isfinite(entry["lo"]):
        return text
    return f"{text} [{number(entry['lo'], digits)}, {number(entry['hi'], digits)}]"
