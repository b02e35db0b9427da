"""Settings and where they come from: flag > GRD_* > project file > user file > default.

Project files are ``grd.toml`` or ``[tool.grd]`` of ``pyproject.toml`` in the project root; the user's is
``config.toml`` in platformdirs' config folder of ``grd``.
"""

from __future__ import annotations

import math
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from grd import contract
from grd.errors import ConfigurationError

_DURATION_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)([smhd])")
LONGEST_DURATION_SECONDS = 10 * 365.25 * 86400.0
"""Longer than any run, and short enough for every clock and date it is added to."""

_SIZE_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_duration(text: str | float) -> float:
    """Seconds in ``text``: a number (seconds) or parts such as ``90s``, ``30m``, ``4h``, ``1d``, ``1h30m``.

    Raises ValueError unless the result is above zero and at most ten years.
    """
    if isinstance(text, bool) or not isinstance(text, (int, float, str)):
        raise ValueError(f"{text!r} is no duration")
    if isinstance(text, (int, float)):
        seconds = float(text)
    else:
        cleaned = text.strip().lower().replace(" ", "")
        try:
            seconds = float(cleaned)
        except ValueError:
            if not cleaned or _DURATION.sub("", cleaned):
                raise ValueError(f"{text!r} is no duration; write 90s, 30m, 4h, 1h30m or seconds") from None
            seconds = sum(float(n) * _DURATION_UNITS[unit] for n, unit in _DURATION.findall(cleaned))
    if math.isnan(seconds) or seconds <= 0:
        raise ValueError(f"{text!r} is no duration above zero")
    if seconds > LONGEST_DURATION_SECONDS:
        raise ValueError(f"{text!r} is longer than ten years")
    return seconds


def format_duration(seconds: float) -> str:
    """``seconds`` as people write it: ``45s``, ``2m 5s``, ``3h 20m``."""
    if seconds < 10 and seconds != int(seconds):
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60}s" if whole % 60 else f"{whole // 60}m"
    minutes = round(whole / 60)
    return f"{minutes // 60}h {minutes % 60}m" if minutes % 60 else f"{minutes // 60}h"


def parse_size(text: str | int) -> int:
    """Bytes in ``text``: a number or ``500K``, ``100MB``, ``20G`` (powers of ten). Raises ValueError."""
    if isinstance(text, bool) or not isinstance(text, (int, str)):
        raise ValueError(f"{text!r} is no size; write 500K, 100MB, 20G or bytes")
    if isinstance(text, int):
        size = text
    else:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip().upper())
        if match is None:
            raise ValueError(f"{text!r} is no size; write 500K, 100MB, 20G or bytes")
        size = int(float(match[1]) * _SIZE_UNITS[match[2]])
    if size <= 0:
        raise ValueError(f"{text!r} is no size above zero")
    return size


_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:.+")
_URI_WITH_PASSWORD = re.compile(r"[^:]+://[^/@]*:[^/@]*@")
_SWITCHES = {"on": "on", "true": "on", "1": "on", "yes": "on"} | {
    "off": "off", "false": "off", "0": "off", "no": "off"
}  # fmt: skip


def parse_mlflow(value: str | bool) -> str:
    """``on`` (the store is the one MLflow's own environment names), ``off``, or the URI of a store.

    Raises ValueError for what is none, and for a URI with a password: it would be written into the record.
    """
    if isinstance(value, bool):
        return "on" if value else "off"
    text = value.strip()
    if text.lower() in _SWITCHES:
        return _SWITCHES[text.lower()]
    if text.startswith("databricks"):
        return text
    if not _URI.fullmatch(text):
        raise ValueError(
            f"{value!r} is no URI; write on, off, http://HOST:PORT or sqlite:////FOLDER/mlflow.db"
        )
    if _URI_WITH_PASSWORD.match(text):
        raise ValueError(
            "a URI with a password would be stored with the run; put it into MLFLOW_TRACKING_URI (or name "
            "and password into MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD), and write: on"
        )
    return text


def parse_gpus(value: str | int | list[str | int]) -> tuple[str, ...]:
    """GPUs as a list, or text with commas: the driver's numbers, or UUIDs. Raises ValueError."""
    parts = value if isinstance(value, list) else [part for part in str(value).split(",") if part.strip()]
    names = tuple(str(entry).strip() for entry in parts)
    for name in names:
        if not re.fullmatch(r"\d+|(GPU|MIG)-[0-9A-Za-z/-]+", name):
            raise ValueError(f"{name!r} is no GPU; write numbers or UUIDs, such as 0,1 (see: grd gpus)")
    if len(set(names)) != len(names):
        raise ValueError("a GPU is named twice")
    return names


def parse_slots(value: str | int) -> int:
    """How many runs share a GPU: 1 to 64. Raises ValueError."""
    number = int(value)
    if isinstance(value, bool) or not 1 <= number <= 64:
        raise ValueError(f"{value!r} is not between 1 and 64")
    return number


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings, in seconds and bytes."""

    runs_dir: str = "experiments"
    """Folder of the runs, relative to the project root."""
    report: str = ".planning/DATA_REPORT.md"
    """Report the Explorer writes its section into, relative to the project root."""
    default_timeout: float = contract.DEFAULT_TIMEOUT_SECONDS
    """Cap on all attempts of a run together while nobody has agreed to more."""
    long_running_threshold: float = contract.LONG_RUNNING_SECONDS
    """A run that may take longer, by the upper end of its estimate, needs somebody's agreement."""
    grace: float = contract.DEFAULT_GRACE_SECONDS
    """Time from a stop request to SIGKILL."""
    start_timeout: float = contract.DEFAULT_START_TIMEOUT_SECONDS
    """Time a kernel has to answer after its start."""
    checkpoint_budget: int = 20 * 10**9
    """Checkpoint versions of a run are kept while they fit into this; never fewer than two good ones."""
    max_output: int = contract.DEFAULT_MAX_OUTPUT_BYTES
    """Output that a run's notebook keeps: the first half of it and the last, and a note between them."""
    max_lost_work: float = 300.0
    """Training time at risk between two checkpoints, where steps are visible."""
    mlflow: str = "off"
    """Send runs to MLflow: on (where its environment says), off, or the URI of a store."""
    mlflow_experiment: str = ""
    """MLflow's experiment; by default the notebook's name."""
    mlflow_interval: float = 10.0
    """Time between two samples in MLflow of what a run uses."""
    training_gpus: tuple[str, ...] = ()
    """GPUs that trainings are given, by the driver's number or UUID; none named: all there are."""
    inference_gpus: tuple[str, ...] = ()
    """The same for inference."""
    gpu_slots: int = 1
    """Runs that share a GPU."""
    max_attempts: int = 1
    """Attempts of a run, the first included: after an interruption it is resumed by itself."""
    retry_delay: float = 5.0
    """Ceiling of the pause before the first retry; it doubles, and the pause is drawn from zero to it."""
    retry_max_delay: float = 300.0
    """The ceiling doubles up to this."""
    explore_timeout: float = 600.0
    """Cap on one attempt of a notebook whose role is explore."""
    train_timeout: float = 3600.0
    """The same for train."""
    evaluate_timeout: float = 600.0
    """The same for evaluate."""
    aggregate_timeout: float = 600.0
    """The same for aggregate: making one result of many."""
    cycle_timeout: float = 3600.0
    """Cap on one try of a loop's cycle."""
    min_epochs: int = 3
    """Fewest epochs that a plan of trainings may ask for."""
    default_epochs: int = 5
    """Epochs where nobody says how many."""
    base_batch_size: int = 16
    """Batch size on one device, and the default of the one below."""
    batch_size_per_gpu: int = 16
    """Batch size on each of several devices; the global one is this times their number."""

    def timeout_for(self, role: str) -> float:
        """Cap in seconds on one attempt of a notebook with ``role``; the default cap for any other word."""
        seconds: float = getattr(self, f"{role}_timeout") if role in ROLES else self.default_timeout
        return seconds


MOST_ATTEMPTS = 100

ROLES = ("explore", "train", "evaluate", "aggregate")
"""What a notebook of a plan is for; each has a timeout of its own."""


def _between(parse: Callable[[Any], Any], low: float, high: float, unit: str = "") -> Callable[[Any], Any]:
    """``parse``, and a ValueError for what is not in the range, both ends included."""

    def parsed(value: Any) -> Any:
        number = parse(value)
        if not low <= number <= high:
            raise ValueError(f"{value!r} is not between {low:g}{unit} and {high:g}{unit}")
        return number

    return parsed


def parse_count(value: str | int) -> int:
    """A whole number, from text too. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError(f"{value!r} is no whole number")
    try:
        return int(value)
    except ValueError:
        raise ValueError(f"{value!r} is no whole number") from None


_PARSERS: dict[str, Any] = {
    "default_timeout": parse_duration,
    "long_running_threshold": parse_duration,
    "grace": parse_duration,
    "start_timeout": parse_duration,
    "checkpoint_budget": parse_size,
    "max_output": parse_size,
    "max_lost_work": parse_duration,
    "mlflow": parse_mlflow,
    "mlflow_interval": parse_duration,
    "training_gpus": parse_gpus,
    "inference_gpus": parse_gpus,
    "gpu_slots": parse_slots,
    "max_attempts": _between(parse_count, 1, MOST_ATTEMPTS),
    "retry_delay": _between(parse_duration, 0.01, 3600, " s"),
    "retry_max_delay": _between(parse_duration, 0.01, 86400, " s"),
    "explore_timeout": _between(parse_duration, 60, 1800, " s"),
    "train_timeout": _between(parse_duration, 60, 7 * 86400, " s"),
    "evaluate_timeout": _between(parse_duration, 60, 86400, " s"),
    "aggregate_timeout": _between(parse_duration, 60, 1800, " s"),
    "cycle_timeout": _between(parse_duration, 1, 7 * 86400, " s"),
    "min_epochs": _between(parse_count, 1, 100),
    "default_epochs": _between(parse_count, 1, 100),
    "base_batch_size": _between(parse_count, 1, 256),
    "batch_size_per_gpu": _between(parse_count, 1, 128),
}


def _parse(name: str, value: Any, origin: str) -> Any:
    parser = _PARSERS.get(name)
    if parser is None:
        if not isinstance(value, str) or not value:
            raise ConfigurationError(f"{origin}: {name} must be a non-empty string, not {value!r}")
        return value
    try:
        return parser(value)
    except (ValueError, TypeError) as error:
        raise ConfigurationError(f"{origin}: {name}: {error}") from None


def _read_toml(path: Path, *tables: str) -> dict[str, Any]:
    try:
        value: Any = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}") from None
    for table in tables:
        value = value.get(table, {})
        if not isinstance(value, dict):
            raise ConfigurationError(f"{path}: [{'.'.join(tables)}] must be a table")
    result: dict[str, Any] = value
    return result


def user_config_file() -> Path:
    """The user's own settings file."""
    import platformdirs

    return Path(platformdirs.user_config_dir("grd")) / "config.toml"


def state_dir(environment: Mapping[str, str] = os.environ) -> Path:
    """Folder of caches, index and grants of this user; GRD_STATE_DIR moves it. Not created here."""
    moved = environment.get("GRD_STATE_DIR")
    if moved:
        return Path(moved).expanduser()
    import platformdirs

    return Path(platformdirs.user_state_dir("grd"))


def find_project_root(start: Path) -> Path:
    """The nearest folder from ``start`` upwards with grd.toml, [tool.grd] or .planning/, else ``start``."""
    start = Path(start).resolve()
    for folder in (start, *start.parents):
        if (folder / "grd.toml").is_file() or (folder / ".planning").is_dir():
            return folder
        pyproject = folder / "pyproject.toml"
        if pyproject.is_file():
            try:
                if "grd" in tomllib.loads(pyproject.read_text(encoding="utf-8")).get("tool", {}):
                    return folder
            except (OSError, ValueError):
                continue  # somebody else's broken file is none of our business here
    return start


def load_settings(
    project_root: Path,
    flags: Mapping[str, Any] | None = None,
    *,
    environment: Mapping[str, str] = os.environ,
    user_file: Path | None = None,
) -> tuple[Settings, dict[str, str]]:
    """The settings in force and, by name, where each came from.

    ``flags`` with the value None count as not given. Raises ConfigurationError for values that cannot be
    used, with the place they stand in; unknown names in files are errors, unknown GRD_* variables are not
    (they may be another version's).
    """
    known = {field.name for field in fields(Settings)}
    values: dict[str, Any] = {}
    origins = dict.fromkeys(known, "default")

    def take(source: Mapping[str, Any], origin: str) -> None:
        for name, value in source.items():
            if isinstance(value, dict) or value is None:
                continue  # a table belongs to another part of grd
            if name not in known:
                raise ConfigurationError(
                    f"{origin}: unknown setting {name!r}; known: {', '.join(sorted(known))}"
                )
            values[name] = _parse(name, value, origin)
            origins[name] = origin

    user = user_file or user_config_file()
    take(_read_toml(user), str(user))
    take(_read_toml(project_root / "pyproject.toml", "tool", "grd"), str(project_root / "pyproject.toml"))
    take(_read_toml(project_root / "grd.toml"), str(project_root / "grd.toml"))
    for name in sorted(known):
        variable = f"GRD_{name.upper()}"
        if environment.get(variable):
            take({name: environment[variable]}, variable)
    take(dict(flags or {}), "command line")
    if origins["batch_size_per_gpu"] == "default" and origins["base_batch_size"] != "default":
        size = min(values["base_batch_size"], 128)
        values["batch_size_per_gpu"], origins["batch_size_per_gpu"] = size, "base_batch_size"
    settings = Settings(**values)
    if settings.min_epochs > settings.default_epochs:
        name = "min_epochs" if origins["min_epochs"] != "default" else "default_epochs"
        raise ConfigurationError(
            f"{origins[name]}: {name}: min_epochs ({settings.min_epochs}) must not be above default_epochs "
            f"({settings.default_epochs})"
        )
    return settings, origins


def get_settings() -> Settings:
    """The settings in force in the current folder's project. Raises ConfigurationError."""
    return load_settings(find_project_root(Path.cwd()))[0]
