"""What two profiles differ in, and whether a difference can change results or only how long they take."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from grd.hardware.facts import one_line

RESULTS, COST, NOTHING = "results", "cost", "nothing"

EFFECTS: tuple[tuple[str, str, str], ...] = (
    # pattern of the field, what a difference in it can change, why
    (r"cpu\.(brand|architecture|flags)", RESULTS, "other instructions round and sum in another order"),
    (r"cpu\.cores_usable", RESULTS, "other numbers of threads sum in another order"),
    (r"cpu\.(cores_\w+|frequency_max_mhz|sockets|threads_per_core|numa_nodes|l3_cache_bytes)", COST, "speed"),
    (r"cpu\.governor", COST, "how soon the processor is at its full speed"),
    (r"memory\.(total_gb|limit_gb|shm_gb|swap_total_gb)", COST, "what fits into memory"),
    (r"disk(\.root|\.checkpoints)?\.(fs_type|network|total_gb)", COST, "speed of saving and loading"),
    (r"gpus\.count", RESULTS, "work is split among another number of devices"),
    (r"gpus\.\d+\.(name|compute_capability|mig_profile|architecture)", RESULTS, "other kernels are chosen"),
    (r"gpus\.\d+\.(driver_version|cuda_version)", RESULTS, "other kernels may be chosen"),
    (r"gpus\.\d+\.mig_enabled", RESULTS, "a part of a card has fewer processors than the card"),
    (r"gpus\.\d+\.ecc_enabled", RESULTS, "without it a bit that flips changes a number unseen"),
    (r"gpus\.\d+\.compute_mode", COST, "how many processes may use the device"),
    (
        r"gpus\.\d+\.(total_memory_gb|power_limit_w|clock_\w+|pcie_\w+_max|nvlinks_active)",
        COST,
        "speed, or room",
    ),
    (r"gpus\.\d+\.uuid", NOTHING, "another device of the same kind"),
    (r"gpu_software\.(torch_cuda|torch_hip|cudnn|nccl)", RESULTS, "other libraries compute"),
    (r"frameworks\.(torch|tensorflow|jax|numpy)", RESULTS, "another version may compute otherwise"),
    (r"frameworks\.\w+", NOTHING, "it computes nothing"),
    (r"numerics\.\w+(\.\w+)?", RESULTS, "it is a switch of the numeric libraries"),
    (r"code\.(commit|changes_sha256)", RESULTS, "it is other code"),
    (r"system\.libc", RESULTS, "its mathematical functions may round otherwise"),
    (r"python", RESULTS, "another interpreter may order or round otherwise"),
    (r"system\.(kernel|container|virtual_machine|hosted_by)", COST, "speed"),
    (r"hostname", NOTHING, "only the name"),
)
"""The first pattern that fits all of a field's name holds; a field without one is not compared."""

_FITTING = tuple((re.compile(pattern), effect, why) for pattern, effect, why in EFFECTS)
_ASKED_WHERE_IMPORTED = re.compile(r"numerics\.torch_\w+")
_HINDERS = re.compile(r"memory\.limit_gb|gpus\.\d+\.compute_mode")
"""What changes no result, but may keep a run from going on."""
_ORDER = (RESULTS, COST, NOTHING)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One field with its values in both profiles, and what it ``can_change``: results, cost or nothing."""

    field: str
    a: Any
    b: Any
    can_change: str
    why: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.field} {_shown(self.a, self.b)} -> {_shown(self.b, self.a)}"


def _shown(value: Any, other: Any) -> str:
    if isinstance(value, list) and isinstance(other, list):
        return one_line("+".join(str(item) for item in value if item not in other)) or "(less)"
    if isinstance(value, float):
        return f"{value:.1f}"
    return "unknown" if value is None else one_line(value)


_DEEPEST = 4
"""Names in the longest name of a field that is compared; what lies deeper is one value."""


def _fields(value: Any, path: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and depth < _DEEPEST:
        for name, item in value.items():
            yield from _fields(item, f"{path}.{name}" if path else str(name), depth + 1)
    else:
        yield path, value


def comparable_fields(profile: Mapping[str, Any]) -> dict[str, Any]:
    """The profile's fields by name ("cpu.brand", "gpus.0.name"), with gpus.count.

    What is no list of devices counts as none: a profile may come from anybody's file.
    """
    listed = profile.get("gpus")
    gpus = listed if isinstance(listed, list) else []
    named = {**profile, "gpus": {str(index): gpu for index, gpu in enumerate(gpus)}}
    return {"gpus.count": len(gpus), **dict(_fields({**named, "reasons": None, "gpu": None}))}


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return round(a, 1) == round(b, 1)  # kernels of one machine differ by some megabytes
    return bool(a == b)


def compare_profiles(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Difference]:
    """What differs between two profiles of `capture_hardware_profile`; what can change results comes first.

    Compared is what stays the same on a machine: not free memory, temperatures or clocks of the moment. A
    value that is known in one profile alone counts as different, except switches of torch, which only a
    process that has imported it can tell.
    """
    left, right = comparable_fields(a), comparable_fields(b)
    found = []
    for field in {**left, **right}:
        one, other = left.get(field), right.get(field)
        if _same(one, other):
            continue
        if _ASKED_WHERE_IMPORTED.fullmatch(field) and (one is None or other is None):
            continue
        fitting = next((entry for entry in _FITTING if entry[0].fullmatch(field)), None)
        if fitting is not None:
            _, effect, why = fitting
            found.append(Difference(field=field, a=one, b=other, can_change=effect, why=why))
    return sorted(found, key=lambda difference: _ORDER.index(difference.can_change))


def machine_change(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """One line on how the machine and its software differ where that matters to a resumed run, or None.

    Other code is no other machine: the record of a run tells of that.
    """
    told = [
        str(difference)
        for difference in compare_profiles(before, now)
        if (difference.can_change == RESULTS and not difference.field.startswith("code."))
        or _HINDERS.fullmatch(difference.field)
    ]
    if not told:
        return None
    more = f" and {len(told) - 3} more" if len(told) > 3 else ""
    return f"{', '.join(told[:3])}{more}"
