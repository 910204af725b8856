"""Small markup helpers: escaped tags, and numbers as people write them."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
NOTHING = "–"


def text(value: Any) -> str:
    """A value as escaped text, safe between tags and inside a quoted attribute."""
    return html.escape(str(value), quote=True)


def tag(name: str, inner: str = "", **attributes: str | float | None) -> str:
    """An element around markup. Attributes are escaped, None left out; `class_` is class, `aria_label` aria-label."""
    kept = {key.rstrip("_").replace("_", "-"): text(value) for key, value in attributes.items() if value is not None}
    given = "".join(f' {key}="{value}"' for key, value in kept.items())
    return f"<{name}{given}>{inner}</{name}>"


def section(title: str, inner: str, note: str = "") -> str:
    """A titled part of the page, or nothing where `inner` is empty. `note` is plain text, `inner` markup."""
    if not inner:
        return ""
    told = tag("p", text(note), class_="note") if note else ""
    return tag("section", tag("h2", text(title)) + told + inner)


def table(name: str, heads: str, rows: Iterable[tuple[str, str]]) -> str:
    """A table that scrolls by itself: under `heads` a row for each (title, cells). Heads and cells are markup."""
    lines = "".join(tag("tr", tag("th", text(title), scope="row") + cells) for title, cells in rows)
    whole = tag("table", tag("thead", tag("tr", tag("td") + heads)) + tag("tbody", lines), class_="scores")
    return tag("div", whole, class_="scroll", tabindex=0, role="region", aria_label=name)


def label(key: str) -> str:
    """`single_object` as `Single object`."""
    words = str(key).replace("_", " ").strip()
    return words[:1].upper() + words[1:]


def number(value: Any, digits: int = 3) -> str:
    """A number to `digits` significant digits (whole ones in full); a dash for what is no finite number."""
    if not is_number(value) or not math.isfinite(value):
        return NOTHING
    if value == int(value) and abs(value) < 1e7:
        return minus(f"{int(value):,}")
    power = math.floor(math.log10(abs(value)))
    if power < -3 or power > 6:
        return scientific(value, digits)
    return minus(f"{value:,.{max(digits - 1 - power, 0)}f}")


def is_number(value: Any) -> bool:
    """Whether a value is a real number of any kind (numpy's too), truth values apart."""
    return isinstance(value, Real) and not isinstance(value, bool)


def scientific(value: float, digits: int = 3) -> str:
    """`2.5×10⁻⁴` for 0.00025, `10⁻⁴` for 0.0001."""
    mantissa, power = f"{value:.{digits - 1}e}".split("e")
    factor = f"{float(mantissa):g}×"
    return minus(factor if factor != "1×" else "") + "10" + str(int(power)).translate(_SUPERSCRIPT)


def minus(written: str) -> str:
    """A written number with a true minus sign."""
    return written.replace("-", "−")


def duration(seconds: float) -> str:
    """Seconds as `12 s`, `4 min 5 s` or `8 h 12 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60:,} h {minutes % 60} min"


def setting(value: Any) -> str:
    """A recipe's value as plain text, in YAML's words: lists with commas, None and empty things by name."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(setting(item) for item in value) or "empty"
    if value in ("", {}):
        return "empty"
    return str(value)
