"""One panel: a question and what became of it, or a run from the moment it was shown to its end."""

from __future__ import annotations

import contextlib
import json
import logging
import secrets
import threading
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grd import contract
from grd.agreement.book import Book
from grd.agreement.person import JUPYTER, identity
from grd.agreement.use import Revocation
from grd.errors import ApprovalRequired, GrdError, RunNotFound
from grd.interfaces.panel import scene as scenes
from grd.interfaces.panel.markup import html_of, text_of
from grd.interfaces.panel.scene import Scene
from grd.runs.events import LiveView, view_of
from grd.runs.folder import RunFolder
from grd.runs.stop_request import ask_to_stop
from grd.settings import format_duration
from grd.steps.agreeing import Answered, Question, decline
from grd.steps.following import is_under_way
from grd.steps.run import Run, status_of

if TYPE_CHECKING:
    from grd.interfaces.panel.card import Card

Start = Callable[[Answered, Callable[[str], None]], Run]
"""Starts what was asked about, now that it is answered; tells notes."""

ANSWER_SECONDS = 3600.0
"""A question that nobody has answered by then starts nothing any more: a click would be a mistake."""

GIVE_UP_SECONDS = 60.0
"""A run that cannot be looked at for so long is no longer watched."""


class Panel:
    """Its methods may be called from any thread: a click comes in one that the kernel's version decides."""

    def __init__(self, line: str) -> None:
        self._line = line
        self._lock = threading.RLock()
        self._notes: list[str] = []
        self._displays: list[str] = []
        self._card = _card(self._click)
        self._scene: Scene | None = None
        self._question: Question | None = None
        self._start: Start | None = None
        self._where = Path.cwd()
        self._expires = time.monotonic() + ANSWER_SECONDS
        self._clicked: set[str] = set()
        self._run: Run | None = None
        self._view: LiveView | None = None
        self._revocation: Revocation | None = None
        self._seen = time.monotonic()

    @classmethod
    def asking(cls, question: Question, start: Start, line: str, notes: list[str]) -> Panel:
        """A panel that asks before it calls ``start``."""
        panel = cls(line)
        panel._question, panel._start, panel._notes = question, start, notes
        panel._show(scenes.of_question(question, line, notes))
        return panel

    @classmethod
    def following(cls, run: Run, notes: list[str]) -> Panel:
        """A panel of a run that was started."""
        panel = cls(f"%grd status {run.id}")
        panel._notes = notes
        panel._follow(run)
        return panel

    @property
    def run(self) -> Run:
        """The run. Raises ApprovalRequired while there is none."""
        if self._run is None:
            scene = self._asked() if self._scene is None else self._scene
            then = "answer in its panel, or type" if scene.can_change else "type"
            raise ApprovalRequired(f"no run yet of {scene.title}: {scene.state}; {then}: {self._line}")
        return self._run

    @property
    def folder(self) -> Path | None:
        """The run's folder, once there is a run."""
        return None if self._run is None else self._run.folder

    def __repr__(self) -> str:
        if self._run is not None:
            return repr(self._run)
        return f"<Run that is not started: {self._scene.title} {self._scene.state}>" if self._scene else ""

    def display(self) -> None:
        """Show it below the cell that is executing; further views show the same, and so do their buttons."""
        from IPython.display import display

        name = secrets.token_hex(8)
        with self._lock:
            display(self._bundle(), raw=True, display_id=name)
            self._displays.append(name)

    def look(self) -> bool:
        """Show what is true now; True once nothing more will come. Never raises."""
        try:
            with self._lock:
                scene = self._look()
                self._seen = time.monotonic()
                if scene is not None:
                    self._show(scene)
                return self._is_over()
        except Exception as error:  # a kernel that is going down, or a disk that does not answer now
            logging.getLogger(__name__).debug("the panel could not be brought up to date", exc_info=True)
            if time.monotonic() - self._seen < GIVE_UP_SECONDS:
                return False
            with contextlib.suppress(Exception):
                self._show(scenes.of_no_run(self._scene, _one_line(error)))
                self._is_over()
            return True

    def _is_over(self) -> bool:
        over = self._scene is None or not self._scene.can_change
        if over:
            self._leave()
        return over

    def _look(self) -> Scene | None:
        if self._run is not None:
            return self._scene_of_run(self._run)
        if not self._clicked and time.monotonic() >= self._expires:
            self._clicked.update(scenes.ANSWERS)
            hours = format_duration(ANSWER_SECONDS)
            return scenes.of_nothing(self._asked(), f"nobody has answered within {hours}", self._line)
        return None

    def _scene_of_run(self, run: Run) -> Scene:
        folder = run.run_folder
        try:
            under_way = is_under_way(folder, run.process)
            if self._view is None:
                self._view = view_of(folder)
            for _ in self._view.read(folder.events):
                pass
            shown = status_of(folder, view=self._view)
        except RunNotFound as error:
            return scenes.of_no_run(self._scene, str(error))
        grant = (shown.get("budget") or {}).get("grant")
        return scenes.of_run(
            shown,
            under_way=under_way,
            now=datetime.now().strftime("%H:%M:%S"),
            notes=[note for note in self._notes if note not in (shown.get("warnings") or [])],
            stopping=_asked_to_stop(folder),
            revocable=grant is not None and self._can_revoke(str(grant)),
        )

    def _can_revoke(self, grant: str) -> bool:
        if self._revocation is None:
            self._revocation = Revocation(grant)
        return scenes.REVOKE not in self._clicked and not self._revocation.has_come()

    def _click(self, word: str) -> None:
        """Do what a button says, once: a double click, or a click in another view, comes after the first."""
        with self._lock:
            # All answers are one: whoever has approved cannot decline any more.
            same = scenes.ANSWERS if word in scenes.ANSWERS else (word,)
            if self._clicked.intersection(same):
                return
            self._clicked.add(word)
            if word in scenes.ANSWERS:
                self._show(scenes.of_answer(self._asked(), word))
        try:
            if word in scenes.ANSWERS:
                self._answer(word)
            elif word == scenes.STOP:
                instead = ask_to_stop(self.run.run_folder, contract.STOPPED)
                self._notes += [] if instead is None else [instead]
            else:
                Book().revoke(str(self.run.record.budget["grant"]), identity(JUPYTER))
        except Exception as error:
            if word in scenes.ANSWERS:
                self._show(scenes.of_nothing(self._asked(), "not started", self._line, _one_line(error)))
            else:
                self._clicked.discard(word)
                self._notes.append(f"{word}: {_one_line(error)}")
            if not isinstance(error, GrdError):
                raise  # a defect: the front end's log gets its traceback
        finally:
            self.look()

    def _answer(self, word: str) -> None:
        assert self._question is not None
        assert self._start is not None
        if word == scenes.DECLINE:
            decline(self._question, JUPYTER)
            self._show(scenes.of_nothing(self._asked(), "declined", self._line))
            return
        if Path.cwd() != self._where:
            raise GrdError(
                f"this kernel's working folder was {self._where} when it was asked, and is another now"
            )
        answered = Answered(question=self._question, answer=word, who=JUPYTER)
        self._follow(self._start(answered, self._notes.append))

    def _asked(self) -> Scene:
        assert self._question is not None
        return scenes.of_question(self._question, self._line, self._notes)

    def _follow(self, run: Run) -> None:
        with self._lock:
            self._run = run
            self._show(self._scene_of_run(run))

    def _show(self, scene: Scene) -> None:
        with self._lock:
            self._scene = scene
            if self._card is not None:
                self._card.show(scene)

    def _leave(self) -> None:
        """What stays in the notebook needs no kernel: the end of the run as text."""
        from IPython.display import update_display

        assert self._scene is not None
        bundle = {"text/html": html_of(self._scene, framed=True), "text/plain": text_of(self._scene)}
        while self._displays:
            update_display(bundle, raw=True, display_id=self._displays.pop())

    def _bundle(self) -> dict[str, Any]:
        assert self._scene is not None
        text = {"text/plain": text_of(self._scene)}
        if self._card is None or not self._scene.can_change:
            return (
                {"text/html": html_of(self._scene, framed=True), **text} if self._card is not None else text
            )
        return {**self._card.mimebundle(), **text}


def _card(on_click: Callable[[str], None]) -> Card | None:
    """The widgets, or None where ipywidgets cannot be loaded: then the text says what to type."""
    try:
        from grd.interfaces.panel.card import Card
    except ImportError:
        return None
    return Card(on_click)


def _asked_to_stop(folder: RunFolder) -> str | None:
    """The reason of a stop that was asked for, by whomever."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return str(json.loads(folder.stop_file.read_text(encoding="utf-8")).get("reason"))
    return None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
