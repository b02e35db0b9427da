"""What a loop does in each cycle: a plan as somebody wrote it, read and checked before anything starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grd.batch import documents
from grd.errors import NotFoundError, UsageError
from grd.settings import MOST_ATTEMPTS, ROLES, Settings, parse_duration

CYCLE = "cycle"
"""``{cycle}`` in a parameter that is text stands for the cycle's number; alone it is the number itself."""

_PLAN_WORDS = (
    "notebooks",
    "prepare",
    "pause",
    "cycle_timeout",
    "max_failures",
    "retry_delay",
    "max_attempts",
)
_STEP_WORDS = ("notebook", "name", "role", "parameters", "timeout", "budget", "max_attempts", "kernel")


@dataclass(frozen=True, kw_only=True)
class Step:
    """One notebook of a cycle. Times are seconds."""

    name: str
    notebook: str
    parameters: dict[str, Any] = field(default_factory=dict)
    timeout: float | None = None
    """Cap on one attempt; None: the default cap of a run that nobody agreed to more for."""
    budget: float | None = None
    max_attempts: int | None = None
    kernel: str | None = None

    def parameters_of(self, cycle: int) -> dict[str, Any]:
        """The parameters in this cycle."""
        return {name: _filled_in(value, cycle) for name, value in self.parameters.items()}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The steps of a cycle and how cycles follow each other. Times are seconds."""

    steps: tuple[Step, ...]
    prepare: tuple[Step, ...] = ()
    """Done before the steps; those of the next cycle already while this one's steps are under way."""
    pause: float = 0.0
    cycle_timeout: float
    max_failures: int = 3
    """Failed tries of cycles in a row after which the loop gives up."""
    retry_delay: float = 10.0
    """Ceiling of the pause after a failed try; it doubles with each further one."""
    origin: str = "plan"


def read_plan(plan: str | Path | Mapping[str, Any], settings: Settings) -> Plan:
    """The plan in a YAML or JSON file, or a mapping. Raises NotFoundError, or UsageError with the place."""
    if isinstance(plan, Mapping):
        return _plan_of(plan, "plan", Path.cwd(), settings)
    path = Path(plan).expanduser()
    try:
        text = documents.read_text(path, f"plan {path}")
    except NotFoundError:
        raise NotFoundError(f"no plan {path}; grd loop --help shows one") from None
    value = documents.parse(text, ".json" if path.suffix == ".json" else ".yaml", str(path))
    return _plan_of(value, str(path), path.resolve().parent, settings)


def _plan_of(value: Any, origin: str, base: Path, settings: Settings) -> Plan:
    documents.check_storable(value, origin)
    if isinstance(value, list):
        value = {"notebooks": value}
    if not isinstance(value, Mapping):
        raise UsageError(f"{origin}: a plan is a list of notebooks, or a mapping with `notebooks`")
    _check_words(value, _PLAN_WORDS, origin)
    attempts = _count(value, "max_attempts", origin)
    names: set[str] = set()

    def steps(word: str) -> tuple[Step, ...]:
        listed = value.get(word) or []
        if not isinstance(listed, list):
            raise UsageError(f"{origin}: {word} must be a list")
        return tuple(
            _step_of(each, f"{origin}: {word}[{index}]", base, settings, attempts, names)
            for index, each in enumerate(listed)
        )

    prepare, found = steps("prepare"), steps("notebooks")
    if not found:
        raise UsageError(f"{origin}: no notebooks to run")
    failures = _count(value, "max_failures", origin)
    return Plan(
        steps=found,
        prepare=prepare,
        pause=_seconds(value, "pause", origin, zero=True) or 0.0,
        cycle_timeout=_seconds(value, "cycle_timeout", origin) or settings.cycle_timeout,
        max_failures=Plan.max_failures if failures is None else failures,
        retry_delay=_seconds(value, "retry_delay", origin) or Plan.retry_delay,
        origin=origin,
    )


def _step_of(
    value: Any, where: str, base: Path, settings: Settings, attempts: int | None, names: set[str]
) -> Step:
    if isinstance(value, str):
        value = {"notebook": value}
    if not isinstance(value, Mapping) or not isinstance(value.get("notebook"), str):
        raise UsageError(f"{where}: a step is a notebook's path, or a mapping with `notebook`")
    _check_words(value, _STEP_WORDS, where)
    notebook = str(value["notebook"])
    parameters = value.get("parameters") or {}
    if not isinstance(parameters, Mapping) or not all(isinstance(name, str) for name in parameters):
        raise UsageError(f"{where}: parameters must be a mapping of names to values")
    role = value.get("role")
    if role is not None and role not in ROLES:
        raise UsageError(f"{where}: role {role!r} is none of {', '.join(ROLES)}")
    for word in ("name", "kernel"):
        if value.get(word) is not None and (not isinstance(value[word], str) or not value[word]):
            raise UsageError(f"{where}: {word} is text, not {value[word]!r}")
    timeout = _seconds(value, "timeout", where)
    name = _unused(str(value.get("name") or Path(notebook.split("?")[0]).stem), names)
    return Step(
        name=name,
        notebook=notebook if "://" in notebook else str(base / Path(notebook).expanduser()),
        parameters=dict(parameters),
        timeout=settings.timeout_for(role) if timeout is None and role is not None else timeout,
        budget=_seconds(value, "budget", where),
        max_attempts=_count(value, "max_attempts", where) or attempts,
        kernel=value.get("kernel"),
    )


def _unused(name: str, names: set[str]) -> str:
    """``name``, or with a number behind it where another step has it."""
    chosen, number = name, 1
    while chosen in names:
        number += 1
        chosen = f"{name}-{number}"
    names.add(chosen)
    return chosen


def _check_words(value: Mapping[Any, Any], known: tuple[str, ...], where: str) -> None:
    for word in value:
        if word not in known:
            raise UsageError(f"{where}: unknown word {word!r}; known: {', '.join(known)}")


def _seconds(value: Mapping[str, Any], word: str, where: str, *, zero: bool = False) -> float | None:
    given = value.get(word)
    if given is None or (zero and given == 0):
        return None
    try:
        return parse_duration(given)
    except (ValueError, TypeError, AttributeError) as error:
        raise UsageError(f"{where}: {word}: {error}") from None


def _count(value: Mapping[str, Any], word: str, where: str) -> int | None:
    given = value.get(word)
    if given is None:
        return None
    if isinstance(given, bool) or not isinstance(given, int) or given < 1:
        raise UsageError(f"{where}: {word} is a number from 1 on, not {given!r}")
    if word == "max_attempts" and given > MOST_ATTEMPTS:
        raise UsageError(f"{where}: {word} is at most {MOST_ATTEMPTS}, not {given!r}")
    return given


def _filled_in(value: Any, cycle: int) -> Any:
    if value == f"{{{CYCLE}}}":
        return cycle
    if isinstance(value, str):
        return value.replace(f"{{{CYCLE}}}", str(cycle))
    if isinstance(value, list):
        return [_filled_in(each, cycle) for each in value]
    if isinstance(value, dict):
        return {name: _filled_in(each, cycle) for name, each in value.items()}
    return value
