"""What somebody asks the Researcher for, read and checked before anything is started or written."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from grd import contract
from grd.errors import ParameterError, ResourceUnavailable, UsageError
from grd.execution.device_parameters import NAMES as DEVICE_NAMES
from grd.execution.injected import EPOCHS
from grd.execution.notebooks import Kernel, Source, find_kernel, read_notebook
from grd.execution.parameters import ParametersCell, read_parameters_cell, resolve
from grd.hardware import leases
from grd.hardware.leases import Wanted
from grd.hardware.pools import TRAINING
from grd.runs.retry import Policy
from grd.settings import MOST_ATTEMPTS, Settings, parse_count, parse_duration, parse_mlflow, parse_size
from grd.tracking.mlflow import choice


@dataclass(frozen=True)
class Request:
    """A notebook that was read and checked, with what it will be given."""

    source: Source
    kernel: Kernel
    cell: ParametersCell
    parameters: dict[str, Any]
    warnings: list[str]

    @property
    def declared(self) -> list[str]:
        """Which of the injected names the notebook declares."""
        return injected_names(self.cell)

    @property
    def defaults(self) -> dict[str, Any]:
        """What the notebook's own parameters are where nobody gives them."""
        return defaults_of(self.cell)

    def given(self, parameters: Mapping[str, Any], *, allow_unknown: bool = False) -> Request:
        """The same notebook with ``parameters``, checked. Raises ParameterError."""
        resolved = resolve(parameters, self.cell, allow_unknown=allow_unknown)
        check_language(self.kernel, resolved, self.cell)
        return replace(self, parameters=resolved, warnings=list(self.warnings))


def check(
    notebook: str, parameters: Mapping[str, Any], *, kernel: str | None = None, allow_unknown: bool = False
) -> Request:
    """Read a notebook and check everything about running it. Raises as `research` does."""
    return open_request(read_notebook(notebook), kernel).given(parameters, allow_unknown=allow_unknown)


def open_request(source: Source, kernel: str | None = None) -> Request:
    """What a notebook that was read asks for, with no parameters yet. Raises as `research` does."""
    found = find_kernel(source.notebook, kernel)
    cell = read_parameters_cell(source.notebook, found.language or "python")
    return Request(source, found, cell, {}, adoption_warnings(cell))


def check_language(kernel: Kernel, parameters: Mapping[str, Any], cell: ParametersCell) -> None:
    """papermill must know how to write parameters in the kernel's language, if there are any."""
    injected = any(cell.declares(name) for name in contract.INJECTED_PARAMETERS)
    if kernel.language == "python" or not (parameters or injected):
        return
    from papermill.translators import papermill_translators

    try:
        papermill_translators.find_translator(kernel.name, kernel.language)
    except Exception:
        raise ParameterError(
            f"papermill writes no parameters for {kernel.language or kernel.name} notebooks; leave them out"
        ) from None


def injected_names(cell: ParametersCell) -> list[str]:
    """Which names the notebook declares that grd itself gives values to, or may."""
    return [name for name in (*contract.INJECTED_PARAMETERS, *DEVICE_NAMES, EPOCHS) if cell.declares(name)]


def defaults_of(cell: ParametersCell) -> dict[str, Any]:
    """The literal values in a parameters cell, as far as JSON has them; without the injected names."""
    found: dict[str, Any] = {}
    for name, declared in cell.declared.items():
        if name in contract.INJECTED_PARAMETERS or declared.default is ...:
            continue
        with contextlib.suppress(TypeError, ValueError):
            found[name] = json.loads(json.dumps(declared.default, allow_nan=False))
    return found


def adoption_warnings(cell: ParametersCell) -> list[str]:
    if not cell.present:
        return [
            "the notebook has no cell tagged 'parameters': timeout, checkpoint_dir and resume cannot be "
            "injected, so a resume starts from the top"
        ]
    missing = [name for name in ("checkpoint_dir", "resume") if not cell.declares(name)]
    if missing:
        names = " and ".join(missing)
        return [f"the notebook's parameters cell does not declare {names}: a resume starts from the top"]
    return []


@dataclass(frozen=True)
class Limits:
    """Caps as somebody typed them: on one attempt, and on all of them together; None if nobody did."""

    timeout: float | None
    budget: float | None

    @property
    def were_typed(self) -> bool:
        """Whether any was."""
        return self.timeout is not None or self.budget is not None


def read_limits(timeout: float | str | None, budget: float | str | None) -> Limits:
    """What was typed, in seconds. Raises UsageError."""
    return Limits(read_seconds("--timeout", timeout), read_seconds("--budget", budget))


def wanted_gpus(count: int | None, pool: str | None) -> dict[str, Any] | None:
    """What the record keeps of a wish for GPUs that was checked; None where nobody wished."""
    return None if count is None and pool is None else {"count": count, "pool": pool or TRAINING}


def read_gpus(
    count: int | str | None, pool: str | None, settings: Settings, *, before: dict[str, Any] | None = None
) -> dict[str, Any] | None:
    """What the record keeps of ``--gpus`` and ``--gpu-pool``; what is not typed is as ``before``.

    Raises UsageError, and ResourceUnavailable or ConfigurationError where it cannot be had (`leases.check`).
    """
    typed = Wanted.read(count, pool)
    kept = before or {}
    wanted = Wanted(
        kept.get("count") if typed.count is None else typed.count,
        str(kept.get("pool") or TRAINING) if pool is None else typed.pool,
    )
    leases.check(wanted, settings)
    if count is None and pool is None:
        return before
    return wanted_gpus(wanted.count, wanted.pool)


def read_retry(
    max_attempts: int | str | None, retry_errors: bool | None, settings: Settings, *, before: Any = None
) -> dict[str, Any] | None:
    """What the record keeps of ``--max-attempts``, counted from attempt 1; ``before`` is what it has kept.

    Raises UsageError.
    """
    kept = before or {}
    if max_attempts is None:
        attempts = int(kept.get("max_attempts") or settings.max_attempts)
    else:
        try:
            attempts = parse_count(max_attempts)
        except ValueError as error:
            raise UsageError(f"--max-attempts: {error}") from None
        if not 1 <= attempts <= MOST_ATTEMPTS:
            raise UsageError(f"--max-attempts: {attempts} is not between 1 and {MOST_ATTEMPTS}")
    errors = bool(kept.get("notebook_errors")) if retry_errors is None else retry_errors
    if attempts < 2:
        if retry_errors:
            raise UsageError("--retry-errors needs --max-attempts 2 or more")
        return None
    return Policy(
        max_attempts=attempts,
        from_attempt=1,
        delay=settings.retry_delay,
        longest=settings.retry_max_delay,
        notebook_errors=errors,
    ).to_dict()


def read_size(flag: str, value: int | str) -> int:
    try:
        return parse_size(value)
    except (ValueError, TypeError, AttributeError) as error:
        raise UsageError(f"{flag}: {error}") from None


def read_seconds(flag: str, value: float | str | None) -> float | None:
    if value is None:
        return None
    try:
        return parse_duration(value)
    except (ValueError, TypeError, AttributeError) as error:
        raise UsageError(f"{flag}: {error}") from None


def read_mlflow(value: str | bool, experiment: str | None, interval: float) -> dict[str, Any] | None:
    """What the record keeps of ``--mlflow``. Raises UsageError, and ResourceUnavailable without MLflow."""
    try:
        setting = parse_mlflow(value)
    except (ValueError, AttributeError) as error:
        raise UsageError(f"--mlflow: {error}") from None
    if setting != "off" and not choice.is_installed():
        raise ResourceUnavailable(f"--mlflow: MLflow is not installed; {choice.INSTALL}")
    return choice.chosen(setting, experiment, interval, Path.cwd())


def mlflow_of_settings(settings: Settings, warnings: list[str]) -> dict[str, Any] | None:
    """The same of the settings; where MLflow is not installed that is a warning."""
    if settings.mlflow == "off":
        return None
    if not choice.is_installed():
        warnings.append(f"mlflow is set, but MLflow is not installed: nothing is sent; {choice.INSTALL}")
        return None
    return choice.chosen(settings.mlflow, settings.mlflow_experiment, settings.mlflow_interval, Path.cwd())
