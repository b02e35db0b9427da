"""The installed kernelspec `grd-python3`: our provisioner for tools that cannot name an engine.

A kernelspec is ours if it names our provisioner. Jupyter shows it only to tools whose environment has grd:
the provisioner runs in the tool.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import shlex
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grd.errors import NotFoundError, UsageError
from grd.execution.provisioner import NAME as PROVISIONER
from grd.files import atomic_write, read_json

NAME = "grd-python3"
DISPLAY_NAME = "Python 3 (grd)"
KERNEL_JSON = "kernel.json"
LOGOS = ("logo-32x32.png", "logo-64x64.png", "logo-svg.svg")
_VALID_NAME = re.compile(r"[A-Za-z0-9._-]+")


@dataclass(frozen=True)
class Kernelspec:
    """One of our kernelspecs on disk."""

    name: str
    folder: Path
    document: Mapping[str, Any]
    """kernel.json"""

    @property
    def display_name(self) -> str:
        """What front ends show."""
        return str(self.document.get("display_name", self.name))

    @property
    def python(self) -> str | None:
        """The interpreter that its kernels run on; None if kernel.json names none."""
        argv = self.document.get("argv")
        return str(argv[0]) if isinstance(argv, list) and argv else None

    @property
    def problem(self) -> str | None:
        """Why no kernel can be started from it, or None."""
        if self.python is None:
            return "its kernel.json names no interpreter"
        if Path(self.python).is_absolute() and not Path(self.python).exists():
            return f"its interpreter {self.python} is gone"
        return None


@dataclass(frozen=True)
class Installed:
    """What an installation did."""

    spec: Kernelspec
    changed: bool
    """Whether anything had to be written."""
    replaced: bool
    """Whether a kernelspec of somebody else had to go."""


def kernels_folder(*, user: bool = False, prefix: str | None = None) -> Path:
    """Where kernelspecs lie: of this environment by default, of the user, or below a prefix."""
    if user:
        from jupyter_client.kernelspec import KernelSpecManager

        return Path(KernelSpecManager().user_kernel_dir)
    return Path(prefix or sys.prefix).expanduser().absolute() / "share" / "jupyter" / "kernels"


def install(
    kernels: Path,
    *,
    name: str = NAME,
    display_name: str | None = None,
    environment: Mapping[str, str] | None = None,
    replace: bool = False,
) -> Installed:
    """Write the kernelspec of this interpreter into ``kernels``, or bring ours there up to date.

    What somebody has added to ours stays. Raises UsageError if one of somebody else has the name and is not
    to be replaced, or if the folder cannot be written.
    """
    _check_name(name)
    folder = kernels / name
    taken = _exists(folder) and not _is_half_installed(folder)  # before it is read: another install may end
    before = _read(folder)
    foreign = taken and not _is_ours(before)
    if foreign and not replace:
        raise UsageError(
            f"{folder} is a kernelspec that grd did not install; "
            "--replace replaces it, --name installs under another name"
        )
    document = _document(before if not foreign else {}, display_name, environment or {})
    spec = Kernelspec(name, folder, document)
    if document == before:
        return Installed(spec, changed=False, replaced=False)
    try:
        if foreign:
            _remove_all(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for logo in _logos():
            shutil.copyfile(logo, folder / logo.name)
        # The last one: a folder without it is no kernelspec yet.
        atomic_write(folder / KERNEL_JSON, json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise _cannot_write(folder, error) from None
    return Installed(spec, changed=True, replaced=foreign)


def remove(kernels: Path, *, name: str = NAME) -> Path:
    """Remove ours from ``kernels``; returns its folder, which stays if it holds files that are not ours.

    Raises NotFoundError, UsageError if the kernelspec is not ours.
    """
    _check_name(name)
    folder = kernels / name
    if not _exists(folder):
        raise NotFoundError(f"no kernelspec {name} in {kernels}; {_where_else(name)}")
    if not _is_ours(_read(folder)):
        raise UsageError(
            f"{folder} is a kernelspec that grd did not install; to remove it all the same: "
            f"jupyter kernelspec remove {name}"
        )
    try:
        (folder / KERNEL_JSON).unlink()
        for logo in LOGOS:
            (folder / logo).unlink(missing_ok=True)
    except OSError as error:
        raise _cannot_write(folder, error) from None
    with contextlib.suppress(OSError):
        folder.rmdir()
    return folder


def find() -> list[Kernelspec]:
    """Ours among the kernelspecs that Jupyter finds here, by name."""
    from jupyter_client.kernelspec import KernelSpecManager

    found = []
    for name, folder in sorted(KernelSpecManager().find_kernel_specs().items()):
        document = _read(Path(folder))
        if _is_ours(document):
            found.append(Kernelspec(name, Path(folder), document))
    return found


def hidden_by(spec: Kernelspec) -> str | None:
    """Why tools of this environment do not get ``spec`` by its name, or None if they do."""
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    try:
        found = Path(KernelSpecManager().get_kernel_spec(spec.name).resource_dir)
    except NoSuchKernel:
        if spec.name in KernelSpecManager().find_kernel_specs():
            return f"Jupyter does not see the provisioner {PROVISIONER}: reinstall grd-notebooks"
        return f"Jupyter does not look there: export JUPYTER_PATH={spec.folder.parent.parent}"
    if found.resolve() != spec.folder.resolve():
        return f"{found} has the same name and is found first"
    return None


def _where_else(name: str) -> str:
    """What to type instead of a removal that found nothing."""
    for spec in find():
        if spec.name == name:
            prefix = spec.folder.parents[3] if len(spec.folder.parents) > 3 else spec.folder
            option = (
                f"--prefix {shlex.quote(str(prefix))}"
                if spec.folder.parent == kernels_folder(prefix=str(prefix))
                else "--user"
            )
            option += f" --name {shlex.quote(name)}" if name != NAME else ""
            return f"there is one in {spec.folder.parent}: grd kernelspec remove {option}"
    return "see: grd kernelspec list"


def _check_name(name: str) -> None:
    if not _VALID_NAME.fullmatch(name) or name in (".", ".."):
        raise UsageError(f"{name!r} is no name for a kernelspec: letters, digits and . _ - only")


def _document(before: Mapping[str, Any], display_name: str | None, environment: Mapping[str, str]) -> Any:
    from ipykernel.kernelspec import get_kernel_dict

    document = {**before, **get_kernel_dict()}
    document["display_name"] = display_name or before.get("display_name") or DISPLAY_NAME
    metadata = {**before.get("metadata", {}), **document["metadata"]}
    document["metadata"] = {**metadata, "kernel_provisioner": {"provisioner_name": PROVISIONER, "config": {}}}
    if environment or "env" in before:
        document["env"] = {**before.get("env", {}), **environment}
    return document


def _logos() -> list[Path]:
    """ipykernel's, where it has any: without a logo front ends show a letter."""
    spec = importlib.util.find_spec("ipykernel")
    if spec is None or spec.origin is None:
        return []
    resources = Path(spec.origin).parent / "resources"
    return [resources / logo for logo in LOGOS if (resources / logo).is_file()]


def _exists(folder: Path) -> bool:
    """Whether there is anything; an empty folder is none, a dangling link or a file is."""
    return folder.is_symlink() or (folder.exists() and not (folder.is_dir() and not any(folder.iterdir())))


def _is_half_installed(folder: Path) -> bool:
    """Whether there are only logos and temporary files: an installation is under way, or was killed."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir()}
    return all(name in LOGOS or (name[:1] == "." and name.endswith(".tmp")) for name in names)


def _read(folder: Path) -> dict[str, Any]:
    try:
        document = read_json(folder / KERNEL_JSON)
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def _is_ours(document: Mapping[str, Any]) -> bool:
    metadata = document.get("metadata")
    provisioner = metadata.get("kernel_provisioner") if isinstance(metadata, dict) else None
    return isinstance(provisioner, dict) and provisioner.get("provisioner_name") == PROVISIONER


def _remove_all(folder: Path) -> None:
    if folder.is_symlink() or not folder.is_dir():
        folder.unlink()
    else:
        shutil.rmtree(folder)


def _cannot_write(folder: Path, error: OSError) -> UsageError:
    return UsageError(
        f"{folder} cannot be written ({error.strerror}); --user or --prefix DIR choose another place"
    )
