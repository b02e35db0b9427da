"""Where this system runs: in a container, a virtual machine, a scheduler's job, a hosted notebook."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from grd.hardware.facts import Facts

_NOT_TOLD = "the platform does not tell"


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace").strip()
    except OSError:
        return ""


def container(root: Path, environment: Mapping[str, str]) -> str | None:
    """kubernetes, podman, docker, apptainer, lxc, or None where there is no sign of a container."""
    if environment.get("KUBERNETES_SERVICE_HOST"):
        return "kubernetes"
    if (root / "run/.containerenv").exists():
        return "podman"
    if (root / ".dockerenv").exists():
        return "docker"
    if environment.get("APPTAINER_CONTAINER") or environment.get("SINGULARITY_CONTAINER"):
        return "apptainer"
    groups = _text(root / "proc/self/cgroup")
    for word, name in (
        ("kubepods", "kubernetes"),
        ("libpod", "podman"),
        ("docker", "docker"),
        ("lxc", "lxc"),
    ):
        if re.search(rf"[/:.-]{word}", groups):
            return name
    return None


def virtual_machine(root: Path) -> str | None:
    """What kind of virtual machine this is (wsl, or the maker that the firmware names), or None."""
    if "microsoft" in _text(root / "proc/sys/kernel/osrelease").lower():
        return "wsl"
    if not re.search(r"^flags\s*:.*\bhypervisor\b", _text(root / "proc/cpuinfo"), re.MULTILINE):
        return None
    made_by = " ".join(_text(root / "sys/class/dmi/id" / name) for name in ("sys_vendor", "product_name"))
    return made_by.strip() or "unnamed"


def scheduler_job(environment: Mapping[str, str]) -> str | None:
    """The scheduler's job this process belongs to, such as "slurm 4711" or "slurm 4711_3", or None."""
    array = environment.get("SLURM_ARRAY_JOB_ID")
    if array:
        return f"slurm {array}_{environment.get('SLURM_ARRAY_TASK_ID', '?')}"
    for variable, name in (("SLURM_JOB_ID", "slurm"), ("PBS_JOBID", "pbs"), ("LSB_JOBID", "lsf")):
        if environment.get(variable):
            return f"{name} {environment[variable]}"
    return None


def hosted_by(environment: Mapping[str, str]) -> str | None:
    """colab, kaggle or sagemaker where a hosted notebook service runs this, or None."""
    for variable, name in (
        ("COLAB_RELEASE_TAG", "colab"),
        ("KAGGLE_KERNEL_RUN_TYPE", "kaggle"),
        ("SM_CURRENT_HOST", "sagemaker"),
    ):
        if environment.get(variable):
            return name
    return None


def surroundings(root: Path = Path("/"), environment: Mapping[str, str] = os.environ) -> Facts:
    """kernel, libc, python_build, python_prefix, container, virtual_machine, scheduler_job, hosted_by.

    The last four are None where no sign of one was found. Never raises.
    """
    facts = Facts()
    facts.ask("kernel", platform.release, _NOT_TOLD)
    facts.ask("libc", lambda: " ".join(part for part in platform.libc_ver() if part), _NOT_TOLD)
    facts.ask(
        "python_build", lambda: f"{platform.python_implementation()} {platform.python_compiler()}", _NOT_TOLD
    )
    facts.put("python_prefix", sys.prefix, _NOT_TOLD)
    facts.ask("container", lambda: container(root, environment), "no sign of a container was found")
    facts.ask("virtual_machine", lambda: virtual_machine(root), "no sign of a virtual machine was found")
    facts.ask("scheduler_job", lambda: scheduler_job(environment), "no scheduler's variables are set")
    facts.ask("hosted_by", lambda: hosted_by(environment), "no hosted notebook service's variables are set")
    return facts
