"""Reading a notebook and finding its kernel, before anything is started."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grd.errors import KernelUnavailable, NotebookError, NotebookNotFound
from grd.execution.slow_imports import import_jsonschema


@dataclass(frozen=True)
class Source:
    """A notebook as submitted."""

    location: str
    """Absolute path, or the URL it was read from."""
    text: str
    notebook: Any
    """The parsed nbformat 4 NotebookNode."""

    @property
    def sha256(self) -> str:
        """Of the file's text."""
        return sha256_of(self.text)


@dataclass(frozen=True)
class Kernel:
    """The kernelspec a notebook will run on."""

    name: str
    language: str
    display_name: str
    argv: tuple[str, ...]


def sha256_of(text: str) -> str:
    """Hex digest of ``text`` in UTF-8."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def read_notebook(location: str) -> Source:
    """Read and check a notebook: a local path, or a URL that papermill can read.

    Raises NotebookNotFound or NotebookError.
    """
    if "://" in location:
        text = _read_url(location)
        return Source(location, text, parse_notebook(text, location))
    path = Path(location).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise NotebookNotFound(f"no notebook at {location}") from None
    except IsADirectoryError:
        raise NotebookNotFound(f"{location} is a folder, not a notebook") from None
    except UnicodeDecodeError:
        raise NotebookError(f"{location} is no notebook: it is not UTF-8 text") from None
    except OSError as error:
        raise NotebookNotFound(f"{location} cannot be read: {error.strerror}") from None
    except ValueError as error:  # a NUL in its name
        raise NotebookNotFound(f"{location!r} is no name of a file: {error}") from None
    return Source(str(path.resolve()), text, parse_notebook(text, location))


def parse_notebook(text: str, location: str) -> Any:
    """The nbformat 4 notebook in ``text``; older formats are upgraded. Raises NotebookError."""
    import_jsonschema()
    import nbformat

    try:
        raw = json.loads(text)
    except ValueError as error:
        raise NotebookError(f"{location} is no notebook: {error}") from None
    except RecursionError:
        raise NotebookError(f"{location} is no notebook: its JSON is nested too deeply") from None
    if not isinstance(raw, dict) or not ("cells" in raw or "worksheets" in raw) or "nbformat" not in raw:
        raise NotebookError(f"{location} is no notebook: it has no cells or no nbformat")
    try:
        # reader.reads: nbformat.reads checks too, and only logs what is wrong
        notebook = nbformat.convert(nbformat.reader.reads(text), 4)
        # from_dict: a converted older format is made of another class, which papermill does not know
        notebook = nbformat.from_dict(json.loads(json.dumps(nbformat.v4.upgrade(notebook))))
        nbformat.validate(notebook)
    except Exception as error:  # nbformat raises many kinds for files that are not what they claim
        first = str(error).strip().splitlines()
        reason = first[0] if first else type(error).__name__
        raise NotebookError(f"{location} is no valid notebook: {reason}") from None
    if not any(cell.cell_type == "code" and cell.source.strip() for cell in notebook.cells):
        raise NotebookError(f"{location} has no code to run")
    return notebook


def find_kernel(notebook: Any, override: str | None = None) -> Kernel:
    """The kernel that ``notebook`` names, or ``override``. Raises KernelUnavailable, naming what there is."""
    spec_metadata = notebook.metadata.get("kernelspec", {})
    language = spec_metadata.get("language") or notebook.metadata.get("language_info", {}).get("name")
    name = override or spec_metadata.get("name")
    if not name:
        if language not in (None, "python"):
            raise KernelUnavailable(
                f"the notebook names no kernel (its language is {language}); pass --kernel NAME"
            )
        name = "python3"
    installed = _read_spec(name)
    if installed is not None:
        return Kernel(
            name,
            str(installed.get("language") or language or ""),
            str(installed.get("display_name") or name),
            tuple(installed["argv"]),
        )
    from jupyter_client.kernelspec import NoSuchKernel

    manager = kernel_specs()
    try:
        spec = manager.get_kernel_spec(name)
    except NoSuchKernel:
        have = ", ".join(sorted(manager.find_kernel_specs())) or "none"
        raise KernelUnavailable(
            f"no kernel {name!r} is installed (there are: {have}); pass --kernel NAME"
        ) from None
    return Kernel(name, spec.language or language or "", spec.display_name or name, tuple(spec.argv))


def kernel_specs() -> Any:
    """jupyter_client's KernelSpecManager, which would import all of IPython to find one folder's name."""
    from jupyter_client.kernelspec import KernelSpecManager

    folders = _kernel_folders()
    return KernelSpecManager() if folders is None else KernelSpecManager(kernel_dirs=folders)


def _kernel_folders() -> list[str] | None:
    """Where kernelspecs lie; None if only IPython can tell its own folder."""
    from jupyter_core.paths import jupyter_path

    home = os.environ.get("IPYTHONDIR")
    config = Path(os.environ.get("XDG_CONFIG_HOME") or Path("~/.config").expanduser())
    if not home and (config / "ipython").exists():
        return None  # a folder of old versions, which may still be in use
    own = Path(home or "~/.ipython").expanduser() / "kernels"
    return [*jupyter_path("kernels"), os.path.normpath(own)]


def _read_spec(name: str) -> dict[str, Any] | None:
    """The installed kernelspec ``name`` where it is easily found: jupyter_client is 0.1 s of imports."""
    for folder in _kernel_folders() or []:
        with contextlib.suppress(OSError, ValueError):
            spec = json.loads((Path(folder) / name / "kernel.json").read_text(encoding="utf-8"))
            return spec if isinstance(spec, dict) and isinstance(spec.get("argv"), list) else None
    return None


def _read_url(location: str) -> str:
    from papermill.iorw import papermill_io

    try:
        text = papermill_io.read(location)
    except Exception as error:  # whatever the storage's library raises
        first = str(error).strip().splitlines()
        raise NotebookNotFound(
            f"{location} cannot be read: {first[0] if first else type(error).__name__}"
        ) from None
    return text if isinstance(text, str) else str(text)
