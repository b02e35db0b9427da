"""The widgets of a panel. The only module that loads ipywidgets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ipywidgets

from grd.interfaces.panel.markup import html_of
from grd.interfaces.panel.scene import BAD, GOOD, INTERRUPTED, Button, Scene

_BAR_STYLES = {GOOD: "success", BAD: "danger", INTERRUPTED: "warning"}


class Card:
    """Shows one scene after the other; a click on a button is told by its word."""

    def __init__(self, on_click: Callable[[str], None]) -> None:
        self._on_click = on_click
        self._buttons: dict[str, Any] = {}
        self._text = ipywidgets.HTML()
        self._bar = ipywidgets.FloatProgress(
            min=0.0, max=1.0, layout=ipywidgets.Layout(width="100%", display="none")
        )
        self._row = ipywidgets.HBox(layout=ipywidgets.Layout(flex_flow="row wrap"))
        self._box = ipywidgets.VBox(
            [self._text, self._bar, self._row],
            layout=ipywidgets.Layout(
                border="1px solid var(--jp-border-color2, #bdbdbd)", padding="6px 10px", max_width="60em"
            ),
        )
        self._box.add_class("grd-panel")

    def show(self, scene: Scene) -> None:
        """Show ``scene``; only what differs is sent to the front ends."""
        buttons = [self._button(button) for button in scene.buttons]
        if list(self._row.children) != buttons:
            self._row.children = buttons
        self._text.value = html_of(scene)
        self._bar.layout.display = "none" if scene.fraction is None else ""
        self._bar.value = scene.fraction or 0.0
        self._bar.tooltip = f"{100 * (scene.fraction or 0.0):.0f} % done"
        self._bar.bar_style = _BAR_STYLES.get(scene.mood, "")

    def mimebundle(self) -> dict[str, Any]:
        """What stands for it in a display message."""
        bundle: dict[str, Any] = self._box._repr_mimebundle_()
        return bundle

    def _button(self, wanted: Button) -> Any:
        button = self._buttons.get(wanted.word)
        if button is None:
            button = ipywidgets.Button(layout=ipywidgets.Layout(width="auto"))
            button.on_click(lambda _: self._on_click(wanted.word))
            self._buttons[wanted.word] = button
        button.description, button.tooltip = wanted.label, wanted.hint
        button.button_style, button.disabled = wanted.style, wanted.disabled
        return button
