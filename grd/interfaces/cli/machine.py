"""``grd gpus``, ``grd benchmark``, ``grd hardware``: what this machine is and does."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from grd.hardware import leases
from grd.hardware.comparison import NOTHING, RESULTS, Difference, compare_profiles
from grd.hardware.monitor import GPUMonitor, GPUStats
from grd.interfaces.cli.answer import Answer, AnsweringCommand
from grd.interfaces.cli.rendering import say
from grd.settings import find_project_root
from grd.steps import run as runs

_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


LONGEST_INTERVAL = 86400.0


class _Interval(click.FloatRange):
    """Seconds; "nan", which is neither below nor above anything, is no number of them."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        seconds = super().convert(value, param, ctx)
        if math.isnan(seconds):
            self.fail(f"{value!r} is no number of seconds", param, ctx)
        return seconds


@click.command(cls=AnsweringCommand)
@click.option("--watch", is_flag=True, help="Again and again, until Ctrl-C; with --json a line a sample.")
@click.option(
    "--interval",
    type=_Interval(0.01, LONGEST_INTERVAL),
    default=2.0,
    show_default=True,
    help="Seconds between two samples.",
)
@click.option("--samples", type=click.IntRange(1), metavar="N", help="Stop after N samples; needs --watch.")
@click.option("--mock", is_flag=True, help="Invent three GPUs to try things out; also GRD_GPU_MOCK=1.")
@click.option("--seed", type=int, help="Makes what --mock invents repeatable.")
@_json
def gpus(
    watch: bool, interval: float, samples: int | None, mock: bool, seed: int | None, as_json: bool
) -> Answer:
    """What each GPU of this machine is doing now. What the driver does not tell is shown as "-"."""
    if samples is not None and not watch:
        raise click.UsageError("--samples needs --watch: without it one sample is shown")
    with GPUMonitor(True if mock else None, seed=seed) as monitor:
        if monitor.mock_mode:
            say("these GPUs are invented: nothing was measured")
        if not watch:
            stats = monitor.get_gpu_stats()
            return Answer(
                document=_gpus_document(monitor, stats), lines=_gpu_lines(monitor, stats), as_json=as_json
            )
        taken = 0
        while samples is None or taken < samples:
            if taken:
                time.sleep(interval)
            stats = monitor.get_gpu_stats()
            if as_json:
                click.echo(json.dumps(_gpus_document(monitor, stats), allow_nan=False))
            else:
                click.clear()
                click.echo("\n".join(_gpu_lines(monitor, stats)))
            taken += 1
    return Answer()


_LEASE = ("gpu", "uuid", "slot", "run_id", "attempt", "folder", "pid", "since")


def _gpus_document(monitor: GPUMonitor, stats: Sequence[GPUStats]) -> dict[str, Any]:
    return {
        "schema": "grd.gpus/1",
        "t": round(time.time(), 3),
        "mock": monitor.mock_mode,
        "driver": monitor.driver,
        "reason": monitor.reason,
        "gpus": [row.to_dict() for row in stats],
        "leases": [{name: holder.get(name) for name in _LEASE} for holder in leases.holders()],
    }


def _gpu_lines(monitor: GPUMonitor, stats: Sequence[GPUStats]) -> list[str]:
    if not stats:
        return [f"no GPU: {monitor.reason}"]
    head = ("GPU", "NAME", "UTIL", "MEMORY", "TEMP", "FAN", "POWER", "PROCESSES", "LEASED BY")
    held = leases.holders()
    rows = [head, *((*_gpu_row(row), _holders_of(row, held)) for row in stats)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return [*lines, "UTIL is the share of time in which any kernel ran, not how much of the GPU it used."]


def _holders_of(row: GPUStats, held: Sequence[dict[str, Any]]) -> str:
    own = [holder for holder in held if row.uuid is not None and holder["uuid"] == row.uuid]
    return ", ".join(holder.get("run_id") or f"process {holder.get('pid')}" for holder in own) or "-"


def _gpu_row(row: GPUStats) -> tuple[str, ...]:
    part = f" MIG {row.mig_profile}" if row.mig_profile and row.mig_profile not in (row.name or "") else ""
    hidden = "" if row.visible else " (hidden)"
    used, total = _cell(row.memory_used_mb), _cell(row.memory_total_mb)
    return (
        str(row.gpu_id),
        f"{row.name or 'unknown'}{part}{hidden}",
        _cell(row.utilization_percent, "%"),
        f"{used}/{total} MiB",
        _cell(row.temperature_c, " C"),
        _cell(row.fan_speed_percent, "%"),
        _cell(row.power_usage_w, " W"),
        "-" if row.processes is None else str(len(row.processes)),
    )


def _cell(value: float | None, unit: str = "") -> str:
    return "-" if value is None else f"{value:g}{unit}"


@click.command(cls=AnsweringCommand)
@click.option("--again", is_flag=True, help="Measure, also where this machine was measured before.")
@_json
def benchmark(again: bool, as_json: bool) -> Answer:
    """Measure this machine for five seconds: matrix products, memory, and writing to the project's disk.

    The figures are kept for this machine, and stand in its profile ("measured") from then on; not those of
    a machine that others keep busy, which is measured anew the next time. Not counted are loading the
    profile and torch, and starting CUDA, which take some seconds more.
    """
    from grd.hardware import benchmark as measuring

    say("measuring, unless this machine was measured before")
    found = measuring.benchmark(find_project_root(Path.cwd()), again=again)
    if found["warning"]:
        say(f"warning: {found['warning']}")
    return Answer(document=found, lines=_benchmark_lines(found), as_json=as_json)


def _benchmark_lines(found: dict[str, Any]) -> list[str]:
    compute, disk = found["compute"], found["disk"]
    lines = [f"Measured  {found['measured_at']}{' (before)' if found['cached'] else ''}"]
    if "reason" in compute:
        lines.append(f"Products  not measured: {compute['reason']}")
    else:
        what = compute["device"] or f"CPU, {compute['threads'] or 'unknown'} threads"
        lines.append(f"On        {what}, with {compute['library']}")
    for row in compute["matmul"]:
        if row["tflops"] is None:
            lines.append(f"{row['dtype']:<9} not measured: {row.get('reason')}")
            continue
        share = f", {row['share_of_peak']:.0%} of {row['peak_tflops']:g}" if row["share_of_peak"] else ""
        lines.append(f"{row['dtype']:<9} {row['tflops']:.3g} TFLOP/s{share} (size {row.get('size')})")
    if compute["memory_bandwidth_gbs"]:
        lines.append(f"Memory    {compute['memory_bandwidth_gbs']:.1f} GB/s copied")
    if disk["write_mbs"] is None:
        lines.append(f"Disk      not measured: {disk.get('reason')}")
    else:
        lines.append(
            f"Disk      {disk['write_mbs']:.0f} MB/s written with fsync, "
            f"{disk['fsync_ms']:.2f} ms a small fsync, at {disk['path']}"
        )
    return lines


@click.group()
def hardware() -> None:
    """Profiles of machines: show this one's, compare two. `grd explore` writes one into the report."""


@hardware.command(cls=AnsweringCommand)
@_json
def show(as_json: bool) -> Answer:
    """Show this machine's profile without writing anything; JSON has every field and the reasons."""
    from grd.hardware import capture_hardware_profile
    from grd.reports.hardware_section import render_hardware_section

    profile = capture_hardware_profile(find_project_root(Path.cwd()))
    return Answer(document=profile, lines=render_hardware_section(profile).splitlines(), as_json=as_json)


@hardware.command(cls=AnsweringCommand)
@click.argument("a", metavar="A")
@click.argument("b", metavar="B", default="now")
@click.option("--all", "everything", is_flag=True, help="Also what changes nothing but names.")
@click.option("--runs-dir", metavar="DIR", help="Where the runs lie. Default: experiments/.")
@_json
def diff(a: str, b: str, everything: bool, runs_dir: str | None, as_json: bool) -> Answer:
    """What differs between the machines A and B, and whether it can change results.

    A and B are runs (an id, a part of one, last; last@1 is its first attempt), files with a profile, or
    "now", which is this machine and the default of B.
    """
    from grd.steps.profiles import profile_named

    folder = runs.runs_folder(runs_dir)
    found = compare_profiles(profile_named(a, folder), profile_named(b, folder))
    shown = [each for each in found if everything or each.can_change != NOTHING]
    document = {
        "schema": "grd.hardware-diff/1",
        "a": a,
        "b": b,
        "can_change_results": any(each.can_change == RESULTS for each in found),
        "differences": [each.to_dict() for each in shown],
    }
    return Answer(document=document, lines=_difference_lines(shown), as_json=as_json)


def _difference_lines(found: Sequence[Difference]) -> list[str]:
    if not found:
        return ["no difference"]
    lines = []
    for each in found:
        effect = {RESULTS: "can change results", NOTHING: "changes nothing"}.get(
            each.can_change, "speed or room"
        )
        lines.append(f"{each}  ({effect}: {each.why})")
    return lines
