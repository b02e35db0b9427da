"""The Explorer: profile the hardware in a kernel and write it into the report."""

from __future__ import annotations

import html
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grd import settings
from grd.errors import KernelUnavailable, ReportError, ResourceUnavailable
from grd.execution.slow_imports import import_jsonschema
from grd.files import read_json, shipped_file, write_json
from grd.hardware.facts import one_line
from grd.marked_section import check_section, check_target
from grd.reports.hardware_section import (
    SECTION,
    quantity,
    save_hardware_profile_to_report,
)

SCHEMA = "grd.explore/1"
NOTEBOOK = "notebooks/hardware_profile.ipynb"
PROFILE_NAME = "hardware_profile.json"


@dataclass(frozen=True, kw_only=True)
class Exploration:
    """What the Explorer found and where it wrote it; ``seconds`` is how long it took in all."""

    profile: dict[str, Any]
    report_path: Path
    profile_path: Path
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON values, with a ``schema``."""
        return {
            "schema": SCHEMA,
            "report": str(self.report_path),
            "profile_path": str(self.profile_path),
            "seconds": round(self.seconds, 3),
            "profile": self.profile,
        }

    def summary(self) -> list[str]:
        """Five short lines for people: CPU, memory, disk, GPU, and what is unknown."""
        cpu, memory, disk = (self.profile.get(name) or {} for name in ("cpu", "memory", "disk"))
        gpu = self.profile.get("gpu")
        unknown = [name for name in self.profile.get("reasons", {}) if name.split(".")[0] in _TOLD_ABOUT]
        limit = f", limit {quantity(memory['limit_gb'], 'GB')}" if memory.get("limit_gb") else ""
        device = "none detected"
        if gpu:
            size = quantity(gpu.get("total_memory_gb"), "GB")
            device = f"{gpu.get('device_count')} x {gpu.get('name') or 'unknown'}, {size}"
        cores = cpu.get("cores_usable") or "unknown"
        return [
            f"CPU     {cpu.get('brand') or 'unknown'}, {cores} usable cores",
            f"Memory  {quantity(memory.get('available_gb'), 'GB')} available of "
            f"{quantity(memory.get('total_gb'), 'GB')}{limit}",
            f"Disk    {quantity(disk.get('free_gb'), 'GB')} free of {quantity(disk.get('total_gb'), 'GB')} "
            f"at {disk.get('path') or 'unknown'}",
            f"GPU     {device}",
            f"Unknown {_listed(unknown)}",
        ]

    def _repr_html_(self) -> str:
        rows = "".join(f"<li>{html.escape(line)}</li>" for line in self.summary())
        return f"<p>Hardware profile in <code>{html.escape(str(self.report_path))}</code></p><ul>{rows}</ul>"


_TOLD_ABOUT = ("cpu", "memory", "disk", "gpu")
"""Parts of the profile whose unknown values are worth a word on the screen; the JSON has all."""
MOST_NAMED = 8


def _listed(names: list[str]) -> str:
    more = (
        f" and {len(names) - MOST_NAMED} more, with reasons in the profile" if len(names) > MOST_NAMED else ""
    )
    return f"{', '.join(sorted(names)[:MOST_NAMED])}{more}" if names else "nothing"


def _literal(path: Path) -> str:
    # papermill takes paths for format strings.
    return str(path).replace("{", "{{").replace("}", "}}")


def _profile_in_kernel(project_root: Path) -> dict[str, Any]:
    """The profile as the notebook captures it. Raises KernelUnavailable or ResourceUnavailable."""
    import_jsonschema()
    import papermill
    from jupyter_client.kernelspec import NoSuchKernel
    from nbclient.exceptions import DeadKernelError

    from grd.execution.attempt import NotebookInterrupted

    with tempfile.TemporaryDirectory(prefix="grd-explore-") as name:
        folder = Path(name)
        profile_path = folder / PROFILE_NAME
        try:
            papermill.execute_notebook(
                _literal(shipped_file(NOTEBOOK)),
                _literal(folder / "output.ipynb"),
                parameters={"profile_path": str(profile_path), "project_dir": str(project_root)},
                engine_name="grd",
                progress_bar=False,
                extra_arguments=["--log-level=ERROR"],  # the kernel shares the caller's stderr
                # Not the project: a random.py that lies there would be imported by the kernel.
                cwd=str(folder),
            )
            profile: dict[str, Any] = read_json(profile_path)
        except NotebookInterrupted:
            raise KeyboardInterrupt from None
        except NoSuchKernel as error:
            raise KernelUnavailable(
                f"there is no Jupyter kernel named {error.name}: python -m ipykernel install --user"
            ) from None
        except papermill.PapermillExecutionError as error:
            raise ResourceUnavailable(
                f"the hardware notebook failed in its kernel: {one_line(f'{error.ename}: {error.evalue}')}; "
                "install grd where kernel python3 runs: jupyter kernelspec list"
            ) from error
        except (DeadKernelError, RuntimeError, FileNotFoundError, PermissionError) as error:
            raise KernelUnavailable(
                f"the kernel that profiles the hardware died or never started: {one_line(error, 700)}; "
                "try: python -m ipykernel --version"
            ) from error
    return profile


def explore(
    report: Path | str | None = None,
    *,
    project_dir: Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> Exploration:
    """Profile this machine and write the profile into the report, and as JSON beside it.

    ``report`` defaults to the project's own (setting ``report``), in the project around ``project_dir`` or
    the current folder; a section that is there is replaced. ``progress`` gets a short line for each step.
    Raises ReportError, with the report untouched, before anything is run if it could not be written;
    KernelUnavailable or ResourceUnavailable if no kernel could tell the profile.
    """
    started = time.monotonic()
    say = progress or (lambda line: None)
    root = settings.find_project_root(project_dir or Path.cwd())
    in_force, _ = settings.load_settings(root)
    report_path = Path(report).expanduser().absolute() if report else root / in_force.report
    profile_path = report_path.parent / PROFILE_NAME
    check_section(report_path, SECTION)
    check_target(profile_path)
    say("profiling the hardware in a kernel")
    profile = _profile_in_kernel(root)
    say(f"writing {report_path}")
    try:
        profile_path.parent.mkdir(parents=True, exist_ok=True)
        write_json(profile_path, profile)
    except OSError as error:
        raise ReportError(
            f"{profile_path} cannot be written: {error.strerror or error}; use --report FILE"
        ) from None
    save_hardware_profile_to_report(profile, report_path)
    return Exploration(
        profile=profile,
        report_path=report_path,
        profile_path=profile_path,
        seconds=time.monotonic() - started,
    )
