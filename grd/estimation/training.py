"""How long a training takes by arithmetic alone: operations, divided by what the device does a second.

It is the weakest of the estimates. Arithmetic knows nothing of data loading, validation or checkpoints, so
what it gives is a lower end, and an interval that is as wide as such formulas were seen to be wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from grd.contract import LONG_RUNNING_SECONDS
from grd.estimation.checked import LARGEST, count, measured, positive, product, rows, table
from grd.estimation.estimate import LOW, UNKNOWN, in_units
from grd.hardware.peaks import DTYPES, number_type, peak_tflops

FLOPS_PER_PARAMETER = 6
"""Forward 2, backward 4, for each parameter and token (Kaplan et al. 2020, arXiv:2001.08361, section 2.1)."""

EFFICIENCY = 0.5
"""Share of a peak rate that the middle of the estimate assumes, as the source plan does."""

WORST_OF_COUNTED = 30.0
"""Measured trainings took up to so many times as long as their counted operations at the measured rate."""

WORST_OF_PARAMETERS = 300.0
"""The same where 6 x parameters stands for the count: a small convolution had 260 times as many."""

STEP_SECONDS, LONGEST_STEP_SECONDS = 0.001, 0.01
"""What a step costs besides its arithmetic, in the middle and at the upper end: what batch_size changes."""


def estimate_training_duration(
    num_samples: int,
    num_epochs: int,
    model_params: int,
    hardware_profile: Mapping[str, Any],
    batch_size: int = 32,
    *,
    flops_per_sample: float | None = None,
    tokens_per_sample: int | None = None,
    dtype: str = "fp32",
    device_count: int | None = None,
    threshold_seconds: float = LONG_RUNNING_SECONDS,
) -> dict[str, Any]:
    """How long a training takes, by its operations and the rate of the device in ``hardware_profile``.

    The profile is `grd.hardware.capture_hardware_profile`'s. Operations are ``flops_per_sample``, or 6 x
    ``model_params`` (x ``tokens_per_sample`` for a model of sequences), x samples x epochs. The rate is what
    `grd benchmark` measured on the device, else the datasheet's for ``dtype`` (fp32, tf32, bf16, fp16), else
    unknown: a CPU that was not measured has none. ``device_count`` defaults to the profile's; the upper end
    assumes that one device does all the work. ``batch_size`` counts by the number of steps alone: 1 ms each
    beside the arithmetic, 10 ms at the upper end.

    Keys: estimated_seconds, estimated_minutes, estimated_hours, high_seconds, gpu_tflops (one device's) are
    None where they are not known, with why in reasons; total_tflops (10^12 operations in all); low_seconds;
    is_long_running (high_seconds is above ``threshold_seconds``, or not known) and
    requires_user_confirmation (the same); confidence (LOW, or UNKNOWN); basis (a sentence).
    Raises ValueError for numbers that are no counts, for an unknown ``dtype``, and for a profile of another
    form.
    """
    samples = count("num_samples", num_samples)
    epochs = count("num_epochs", num_epochs)
    parameters = count("model_params", model_params)
    batch = count("batch_size", batch_size, least=1)
    threshold = positive("threshold_seconds", threshold_seconds)
    if not isinstance(hardware_profile, Mapping):
        raise ValueError("hardware_profile must be a mapping, as capture_hardware_profile() gives it")
    kind = number_type(dtype)
    if kind is None:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    each, counted_by = _flops_of_sample(parameters, flops_per_sample, tokens_per_sample)
    total = product(each, samples, epochs)
    steps = product(-(-samples // batch), epochs)
    reasons: dict[str, str] = {}
    devices = _devices(hardware_profile, device_count)
    rate, rate_is = _rate(hardware_profile, kind, reasons)
    seconds = high = None
    low = 0.0
    if total == 0 or rate is not None:
        arithmetic = 0.0 if total == 0 else total / (float(rate or 1.0) * 1e12)
        low = arithmetic / devices
        seconds = low / EFFICIENCY + steps * STEP_SECONDS
        worst = WORST_OF_COUNTED if flops_per_sample is not None else WORST_OF_PARAMETERS
        high = arithmetic * worst + steps * LONGEST_STEP_SECONDS
    else:
        for name in ("estimated_seconds", "estimated_minutes", "estimated_hours", "high_seconds"):
            reasons[name] = reasons["rate"]
    reasons.pop("rate", None)
    told = f"{counted_by}, {total:.3g} operations in {steps:.0f} steps; {rate_is}"
    return {
        **in_units(seconds, high, threshold),
        "gpu_tflops": rate if _gpu(hardware_profile) else None,
        "total_tflops": total / 1e12,
        "low_seconds": low,
        "high_seconds": high,
        "confidence": UNKNOWN if seconds is None else LOW,
        "basis": told if devices == 1 else f"{told}, {devices} devices",
        "reasons": reasons,
    }


def _flops_of_sample(
    parameters: int, flops_per_sample: float | None, tokens_per_sample: int | None
) -> tuple[float, str]:
    if flops_per_sample is not None:
        if tokens_per_sample is not None:
            raise ValueError(
                "give flops_per_sample or tokens_per_sample: the first counts all tokens already"
            )
        return positive("flops_per_sample", flops_per_sample, zero=True), "operations as given"
    if tokens_per_sample is None:
        return product(FLOPS_PER_PARAMETER, parameters), "6 x parameters (no shared weights, no tokens)"
    tokens = count("tokens_per_sample", tokens_per_sample, least=1)
    return product(FLOPS_PER_PARAMETER, parameters, tokens), f"6 x parameters x {tokens} tokens"


def _gpu(profile: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The first GPU of the profile."""
    listed = rows("the profile's gpus", profile.get("gpus"))
    gpu = table("the profile's gpu", profile.get("gpu"))
    return gpu or (listed[0] if listed else None)


def _devices(profile: Mapping[str, Any], given: int | None) -> int:
    if given is not None:
        return count("device_count", given, least=1)
    gpu = _gpu(profile)
    if gpu is None:
        return 1
    listed = gpu.get("device_count") or len(rows("the profile's gpus", profile.get("gpus"))) or 1
    return count("the profile's device_count", listed, least=1)


def _rate(profile: Mapping[str, Any], dtype: str, reasons: dict[str, str]) -> tuple[float | None, str]:
    """TFLOP/s of one device, and where the number is from; why it is None stands in ``reasons``."""
    gpu = _gpu(profile)
    name = str(gpu.get("name")) if gpu else None
    found = _measured(profile, dtype, name)
    if name is None:
        reasons["gpu_tflops"] = "there is no GPU"
    if found is not None:
        return found, f"{found:.3g} TFLOP/s of {dtype} as `grd benchmark` measured"
    if name is None:
        reasons["rate"] = f"how fast this processor is in {dtype} was not measured; see: grd benchmark"
        return None, "the processor's rate is not known"
    memory = gpu.get("total_memory_gb") if gpu else None
    peak = peak_tflops(name, dtype, memory if isinstance(memory, int | float) else None)
    if peak is None:
        reasons["gpu_tflops"] = f"no datasheet rate of {name} in {dtype} is known; see: grd benchmark"
        reasons["rate"] = reasons["gpu_tflops"]
        return None, f"the rate of {name} is not known"
    return peak, f"{peak:g} TFLOP/s of {dtype} by the datasheet of {name}, half of it reached"


def _measured(profile: Mapping[str, Any], dtype: str, gpu: str | None) -> float | None:
    """What `grd benchmark` measured on this very device."""
    compute = measured(profile)
    if compute.get("device") != gpu or compute.get("kind") != ("cpu" if gpu is None else "gpu"):
        return None
    for row in rows("the profile's matmul", compute.get("matmul")):
        tflops = row.get("tflops")
        if row.get("dtype") == dtype and isinstance(tflops, int | float) and 0 < tflops <= LARGEST:
            return float(tflops)
    return None
