"""The hardware section of DATA_REPORT.md."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grd.files import shipped_file
from grd.hardware.facts import one_line
from grd.marked_section import write_section

SECTION = "hardware"
"""Name of the section; its markers are ``<!-- grd:hardware:start -->`` and ``<!-- grd:hardware:end -->``."""

LONGEST_TEXT = 300

_MARKDOWN = re.compile(r"([\\`*\[\]|])")
_ENTITY = re.compile(r"&(?=#?\w+;)")


def markdown_text(value: object, unknown: str = "unknown") -> str:
    """``value`` on one line, such that Markdown and HTML show it and do nothing else; None is ``unknown``.

    A device's name is input from outside: one that closes an HTML comment must not end the section.
    """
    if value is None or not one_line(value):
        return unknown
    text = _ENTITY.sub("&amp;", one_line(value, LONGEST_TEXT)).replace("<", "&lt;").replace(">", "&gt;")
    return _MARKDOWN.sub(r"\\\1", text)


def quantity(value: object, unit: str, digits: int = 1) -> str:
    """A number with its unit, or "unknown" for what is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return "unknown"
    return f"{value:.{digits}f} {unit}"


def render_hardware_section(profile: Mapping[str, Any]) -> str:
    """The section as Markdown, without its markers.

    Takes any profile that has some of the keys of `grd.hardware.capture_hardware_profile`; what is missing
    reads "unknown".
    """
    import jinja2

    environment = jinja2.Environment(
        undefined=jinja2.ChainableUndefined, autoescape=False, keep_trailing_newline=False
    )
    environment.filters["text"] = markdown_text
    environment.filters["quantity"] = quantity
    source = shipped_file("templates/hardware_section.md.j2").read_text(encoding="utf-8")
    return environment.from_string(source).render(profile=profile)


def save_hardware_profile_to_report(profile: dict[str, Any], report_path: Path) -> None:
    """Write the profile's section into the report, in place of the one that is there.

    The report is made if missing; every byte outside the section stays. Raises ReportError with the report
    untouched.
    """
    write_section(Path(report_path), SECTION, render_hardware_section(profile))
