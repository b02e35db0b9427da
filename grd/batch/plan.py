"""The runs of a batch, each checked against its notebook before anything is started or written."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from grd.batch.inputs import sha256_of_input
from grd.batch.spec import Row, Spec
from grd.batch.values import value_text
from grd.errors import GrdError, UsageError
from grd.estimation.before import code_sha256
from grd.execution.notebooks import Source, read_notebook
from grd.steps.request import Request, open_request, read_seconds, read_size

KEY_PREFIX = "batch:"


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedRun:
    """One run of a batch. Times are seconds."""

    index: int
    """From 0, in the order of the spec."""
    key: str
    """Of what is run: code cells, kernel, parameters, declared inputs. Equal keys are the same run."""
    notebook: str
    """Absolute path, or a URL."""
    notebook_sha256: str
    """Of the text as submitted, which the batch keeps."""
    parameters: dict[str, Any]
    name: str | None = None
    kernel: str | None = None
    """Where another one than the notebook's was asked for."""
    timeout: float | None = None
    budget: float | None = None
    inputs: dict[str, str] = field(default_factory=dict)
    """sha256 of each declared input by its absolute path."""

    def to_dict(self) -> dict[str, Any]:
        """A line of runs.jsonl."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> PlannedRun:
        """What `to_dict` gave; what a newer grd has added is left out. Raises TypeError."""
        known = cls.__dataclass_fields__
        # A batch has thousands of them: what they have in common is kept once.
        return cls(**{name: _shared(item) for name, item in value.items() if name in known})


def _shared(value: Any) -> Any:
    if isinstance(value, str):
        return sys.intern(value)
    return {sys.intern(name): item for name, item in value.items()} if isinstance(value, dict) else value


@dataclass(frozen=True, kw_only=True)
class Options:
    """What holds for all runs of a batch. Times are seconds, sizes bytes; None: the project's settings."""

    jobs: int | None = None
    memory: int | None = None
    """What one run needs, where somebody said so."""
    grace: float | None = None
    start_timeout: float | None = None
    max_output: int | None = None
    timeout: float | None = None
    """Cap on one attempt of every run, in place of its own: given by who resumes the batch."""
    budget: float | None = None
    max_attempts: int | None = None
    """Attempts of each run in one start of the batch, the first included."""
    gpus: int | None = None
    """What each run leases; None: one, where the machine has any."""
    gpu_pool: str | None = None
    fail_fast: bool = False
    allow_unknown: bool = False
    force: bool = False

    @classmethod
    def of(cls, spec: Spec, *, force: bool = False) -> Options:
        """Read the spec's settings. Raises UsageError."""
        given = spec.settings
        try:
            return cls(
                jobs=given.get("jobs"),
                memory=None if given.get("memory") is None else read_size("memory", given["memory"]),
                grace=read_seconds("grace", given.get("grace")),
                start_timeout=read_seconds("start_timeout", given.get("start_timeout")),
                max_output=(
                    None if given.get("max_output") is None else read_size("max_output", given["max_output"])
                ),
                max_attempts=given.get("max_attempts"),
                gpus=given.get("gpus"),
                gpu_pool=given.get("gpu_pool"),
                fail_fast=bool(given.get("fail_fast", False)),
                allow_unknown=bool(given.get("allow_unknown", False)),
                force=force,
            )
        except UsageError as error:
            raise UsageError(f"{spec.origin}: {error}") from None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A batch that can be started."""

    spec: Spec
    options: Options
    runs: list[PlannedRun]
    requests: dict[tuple[str, str | None], Request]
    """By notebook and kernel: what was read of it, without parameters."""

    def request(self, run: PlannedRun) -> Request:
        """A run as the Researcher takes it."""
        opened = self.requests[(run.notebook, run.kernel)]
        return opened.given(run.parameters, allow_unknown=self.options.allow_unknown)

    @property
    def warnings(self) -> list[str]:
        """What is said of the notebooks, once each."""
        told = [
            f"{Path(location).name}: {text}"
            for (location, _), opened in self.requests.items()
            for text in opened.warnings
        ]
        return list(dict.fromkeys(told))


def make_plan(spec: Spec, *, force: bool = False) -> Plan:
    """Check every run of ``spec``. Nothing is started or written.

    Raises UsageError (ParameterError, NotebookError), NotFoundError or KernelUnavailable for the first run
    that cannot be, with its place in the spec, and says how many more there are.
    """
    options = Options.of(spec, force=force)
    checking = _Checking(spec, options)
    runs: list[PlannedRun] = []
    wrong: list[GrdError] = []
    for index, row in enumerate(spec.rows):
        try:
            runs.append(checking.check(index, row))
        except GrdError as error:
            wrong.append(type(error)(f"{row.place}{_label(row)}: {error}"))
    if wrong:
        more = f" (and {len(wrong) - 1} more of {len(spec.rows)} runs are wrong)" if len(wrong) > 1 else ""
        raise type(wrong[0])(f"{wrong[0]}{more}")
    _check_duplicates(spec, runs)
    return Plan(spec=spec, options=options, runs=runs, requests=checking.requests)


def parameters_text(parameters: Mapping[str, Any]) -> str:
    """``lr=0.1 seed=2``."""
    return " ".join(f"{name}={value_text(value)}" for name, value in parameters.items())


def _label(row: Row) -> str:
    text = parameters_text(row.parameters)
    return f" ({text})" if text else ""


class _Checking:
    """Reads each notebook and each input once."""

    def __init__(self, spec: Spec, options: Options) -> None:
        self._spec = spec
        self._options = options
        self._sources: dict[str, Source] = {}
        self._code: dict[str, str] = {}
        self._inputs: dict[str, str] = {}
        self.requests: dict[tuple[str, str | None], Request] = {}

    def check(self, index: int, row: Row) -> PlannedRun:
        """One run. Raises as `make_plan`."""
        given = {**self._spec.settings, **row.settings}
        opened = self._open(str(given["notebook"]), given.get("kernel"))
        request = opened.given(row.parameters, allow_unknown=self._options.allow_unknown)
        source = request.source
        inputs = {path: self._sha256(path) for path in map(_absolute, given.get("inputs") or ())}
        return PlannedRun(
            index=index,
            key=key_of(self._code[source.location], request, inputs),
            notebook=source.location,
            notebook_sha256=source.sha256,
            parameters=request.parameters,
            name=given.get("name"),
            kernel=given.get("kernel"),
            timeout=read_seconds("timeout", given.get("timeout")),
            budget=read_seconds("budget", given.get("budget")),
            inputs=inputs,
        )

    def _open(self, notebook: str, kernel: str | None) -> Request:
        if notebook not in self._sources:
            self._sources[notebook] = read_notebook(notebook)
        source = self._sources[notebook]
        opened = self.requests.get((source.location, kernel))
        if opened is None:
            opened = self.requests[(source.location, kernel)] = open_request(source, kernel)
            self._code.setdefault(source.location, code_sha256(source.notebook))
        return opened

    def _sha256(self, path: str) -> str:
        if path not in self._inputs:
            self._inputs[path] = sha256_of_input(Path(path))
        return self._inputs[path]


def key_of(code: str, request: Request, inputs: Mapping[str, str]) -> str:
    """The key of a run; a parameter that is given its own default changes nothing."""
    what = {
        "code": code,
        "kernel": request.kernel.name,
        "parameters": {**request.defaults, **request.parameters},
        "inputs": dict(inputs),
    }
    return KEY_PREFIX + hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _absolute(path: str | Path) -> str:
    return str(Path(path).expanduser().absolute())


def _check_duplicates(spec: Spec, runs: list[PlannedRun]) -> None:
    seen: dict[str, PlannedRun] = {}
    for run in runs:
        same = seen.setdefault(run.key, run)
        if same is not run:
            first, second = spec.rows[same.index].place, spec.rows[run.index].place
            places = first if first == second else f"{first} and {second.removeprefix(f'{spec.origin}: ')}"
            text = parameters_text(run.parameters)
            raise UsageError(
                f"{places}: runs {same.index + 1} and {run.index + 1} are the same"
                f"{f' ({text})' if text else ''}; to repeat a run, vary a parameter such as seed"
            )
