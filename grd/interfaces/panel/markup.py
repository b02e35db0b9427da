"""A scene as HTML, for the panel and for what stays of it, and as text, where no panel can be shown."""

from __future__ import annotations

import html

from grd.interfaces.panel.scene import ASKS, BAD, GOING, GOOD, INTERRUPTED, Scene

_COLOURS = {
    ASKS: "var(--jp-warn-color0, #b85c00)",
    GOING: "var(--jp-brand-color1, #1565c0)",
    GOOD: "var(--jp-success-color0, #1b6e20)",
    BAD: "var(--jp-error-color0, #b71c1c)",
    INTERRUPTED: "var(--jp-warn-color0, #b85c00)",
}
_SOFT = "color: var(--jp-ui-font-color2, #616161)"
_CELL = "text-align: left; vertical-align: top; padding: 1px 12px 1px 0; overflow-wrap: anywhere"


_FRAME = "border: 1px solid var(--jp-border-color2, #bdbdbd); padding: 6px 10px; max-width: 60em; "


def html_of(scene: Scene, *, framed: bool = False) -> str:
    """The scene without its buttons; what a user named is escaped."""
    as_of = f' <span style="{_SOFT}">as of {html.escape(scene.as_of)}</span>' if scene.as_of else ""
    rows = "".join(
        f'<tr style="background: none"><th scope="row" style="{_CELL}; {_SOFT}; font-weight: normal; '
        f'white-space: nowrap">{html.escape(name)}</th><td style="{_CELL}">{html.escape(text)}</td></tr>'
        for name, text in scene.rows
    )
    return (
        f'<div style="{_FRAME if framed else ""}line-height: 1.45; font-size: 13px">'
        f"<div><b>{html.escape(scene.title)}</b></div>"
        f'<div><span role="status" style="color: {_COLOURS[scene.mood]}; font-weight: 600">'
        f"{html.escape(scene.state)}</span>{as_of}</div>"
        f'<table style="border: none; margin: 4px 0 0 0">{rows}</table></div>'
    )


def text_of(scene: Scene) -> str:
    """The scene in lines, with what to type in place of the buttons."""
    lines = [f"{scene.title}: {scene.state}"]
    lines += [f"  {name:<12}{text}" for name, text in scene.rows]
    if scene.commands:
        lines += ["where no buttons are shown, type:"] if scene.buttons else []
        lines += [f"  {name:<12}{text}" for name, text in scene.commands]
    return "\n".join(lines)
