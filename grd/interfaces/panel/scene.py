"""What the panel says and which buttons it has, for each situation: decided from facts alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grd import contract
from grd.agreement import decision
from grd.interfaces.cli.asking import basis_of, span_of
from grd.interfaces.cli.rendering import headline, local_time, rows_of
from grd.settings import format_duration
from grd.steps import agreeing
from grd.steps.agreeing import SESSION_SECONDS, Question

APPROVE, SESSION, CAPPED, DECLINE = agreeing.YES, agreeing.SESSION, agreeing.CAPPED, agreeing.NO
STOP, REVOKE = "stop", "revoke"
ANSWERS = (APPROVE, SESSION, CAPPED, DECLINE)

ASKS, GOING, GOOD, BAD, INTERRUPTED = "asks", "going", "good", "bad", "interrupted"

_MOODS = {contract.COMPLETED: GOOD, contract.FAILED: BAD, contract.INTERRUPTED: INTERRUPTED}
_LEFT_OUT = ("folder",)


@dataclass(frozen=True, kw_only=True)
class Button:
    """A button: what a click means, what stands on it, and what it does in a sentence."""

    word: str
    label: str
    hint: str
    style: str = ""
    """Of ipywidgets: primary, success, info, warning, danger or none."""
    disabled: bool = False


@dataclass(frozen=True, kw_only=True)
class Scene:
    """All that the panel shows at one moment."""

    title: str
    state: str
    mood: str
    rows: tuple[tuple[str, str], ...]
    buttons: tuple[Button, ...] = ()
    fraction: float | None = None
    """How much is done, 0 to 1; None where nobody knows."""
    as_of: str | None = None
    """When this was true, where it will change."""
    commands: tuple[tuple[str, str], ...] = ()
    """What to type where buttons cannot be shown."""

    @property
    def can_change(self) -> bool:
        """Whether it will be something else without anybody's doing."""
        return self.mood in (ASKS, GOING) or self.as_of is not None


def of_question(question: Question, line: str, warnings: Sequence[str] = ()) -> Scene:
    """Nothing was started yet: somebody must agree first. ``line`` is what was typed."""
    proposed, session = format_duration(question.proposed), format_duration(SESSION_SECONDS)
    capped = format_duration(question.otherwise)
    return Scene(
        title=_within(question.notebook, question.place.project),
        state=f"may take long: {span_of(question)}",
        mood=ASKS,
        rows=(
            ("estimate", basis_of(question)),
            ("approve", f"{proposed}, all attempts of this run together"),
            ("session", f"{session}, this and the next runs of this project together, within {session}"),
            ("capped", f"it saves and stops after {capped}, and can be resumed"),
            *(("warning", text) for text in warnings),
        ),
        buttons=(
            Button(
                word=APPROVE,
                label="Approve",
                hint=f"Start the run, with {proposed} for all its attempts together",
                style="success",
            ),
            Button(
                word=SESSION,
                label="Approve for the session",
                hint=f"Start the run; it and the next runs of this project get {session} together",
            ),
            Button(
                word=CAPPED,
                label=f"Run capped at {capped}",
                hint=f"Start the run; it saves and stops after {capped}",
            ),
            Button(word=DECLINE, label="Decline", hint="Start nothing", style="danger"),
        ),
        commands=(
            ("approve", f"{line} --budget {_typed(question.proposed)}"),
            ("session", f"%grd approve --total {_typed(SESSION_SECONDS)} --until {_typed(SESSION_SECONDS)}"),
            ("", f"and then again: {line}"),
            ("capped", f"{line} --budget {_typed(question.otherwise)}"),
        ),
    )


def of_answer(asked: Scene, answer: str) -> Scene:
    """The question was answered just now: no button can be clicked again."""
    state = "declined" if answer == DECLINE else "starting"
    return Scene(
        title=asked.title, state=state, mood=GOING, rows=asked.rows, buttons=_disabled(asked.buttons)
    )


def of_nothing(asked: Scene, state: str, line: str, why: str | None = None) -> Scene:
    """No run came of the question: declined, not answered, or an error."""
    rows = [("error", why)] if why else []
    return Scene(
        title=asked.title,
        state=f"{state}: nothing was started",
        mood=BAD if why else INTERRUPTED,
        rows=(*rows, ("next", line)),
    )


def of_run(
    shown: Mapping[str, Any],
    *,
    under_way: bool,
    now: str,
    notes: Sequence[str] = (),
    stopping: str | None = None,
    revocable: bool = False,
) -> Scene:
    """The run as ``grd status RUN --json`` shows it, in the words of ``grd status RUN``.

    ``under_way``: a runner, or a guardian after it, still works on it. ``stopping`` is the reason of a stop
    that was asked for, ``revocable`` whether the grant it uses can be taken back.
    """
    state = str(shown["state"])
    ended = state in contract.ENDED_STATES
    rows = [
        (name, _within(text, str(shown["folder"]), typed=name == "next"))
        for name, text in rows_of(dict(shown))
        if name not in _LEFT_OUT
    ]
    if not ended:
        rows.insert(0, ("agreed", _agreed(shown)))
    elif shown.get("detail"):
        rows.insert(0, ("", str(shown["detail"])))
    if not ended and stopping is not None:
        grace = format_duration(float(shown["grace"]))
        rows.insert(
            0, ("stopping", f"{stopping}: it has up to {grace} to save; to kill it: {_stop(shown)} --now")
        )
    progress = shown.get("progress") or {}
    return Scene(
        title=str(shown["run_id"]),
        state=headline(dict(shown)),
        mood=_MOODS.get(state, INTERRUPTED) if ended else GOING,
        rows=(*rows, *(("note", text) for text in notes)),
        buttons=() if ended else _buttons(shown, stopping, revocable),
        fraction=1.0 if state == contract.COMPLETED else _fraction(progress),
        as_of=now if under_way or not ended else None,
        commands=(("next", f"%grd status {shown['run_id']}"),) if not ended else (),
    )


def of_no_run(last: Scene | None, why: str) -> Scene:
    """The run cannot be looked at any more: its folder is gone, or cannot be read."""
    title = "the run" if last is None else last.title
    return Scene(title=title, state="not known any more", mood=BAD, rows=(("error", why),))


def _buttons(shown: Mapping[str, Any], stopping: str | None, revocable: bool) -> tuple[Button, ...]:
    stop = Button(
        word=STOP,
        label="Stop" if stopping is None else "Stopping",
        hint=f"Ask the run to save and stop; it can be resumed. In a terminal: {_stop(shown)}",
        style="warning",
        disabled=stopping is not None,
    )
    grant = (shown.get("budget") or {}).get("grant")
    if grant is None:
        return (stop,)
    revoke = Button(
        word=REVOKE,
        label="Revoke the approval",
        hint=f"Take grant {grant} back: this run saves and stops, and so does every other that uses it",
        style="danger",
        disabled=not revocable,
    )
    return (stop, revoke)


def _agreed(shown: Mapping[str, Any]) -> str:
    budget = shown.get("budget") or {}
    text = str(decision.described(str(budget.get("agreed")))["text"])
    if budget.get("grant"):
        text += f" ({budget['grant']})"
    caps = []
    if shown.get("timeout") is not None:
        caps.append(f"{format_duration(float(shown['timeout']))} for this attempt")
    if budget.get("seconds") is not None:
        caps.append(f"{format_duration(float(budget['seconds']))} for all attempts together")
    if shown.get("deadline"):
        caps.append(f"ends by {local_time(shown['deadline'])}")
    return ", ".join([text, *caps])


def _stop(shown: Mapping[str, Any]) -> str:
    return f"grd stop {shown['run_id']}"


def _fraction(progress: Mapping[str, Any]) -> float | None:
    n, total = progress.get("n"), progress.get("total")
    if isinstance(n, int | float) and isinstance(total, int | float) and total > 0:
        return min(1.0, max(0.0, n / total))
    return None


def _disabled(buttons: tuple[Button, ...]) -> tuple[Button, ...]:
    return tuple(Button(**{**vars(button), "disabled": True}) for button in buttons)


def _within(text: str, folder: str, *, typed: bool = False) -> str:
    """Paths as seen from ``folder``; a command as it is typed in a notebook."""
    return f"%{text}" if typed and text.startswith("grd ") else text.replace(f"{folder}/", "")


def _typed(seconds: float) -> str:
    return format_duration(seconds).replace(" ", "")
