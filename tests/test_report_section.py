"""The section grd owns in a report: it is replaced, never doubled, and every other byte stays."""

from __future__ import annotations

import codecs
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grd.errors import ReportError
from grd.marked_section import check_section, replace_section, section_markers, write_section
from grd.reports.hardware_section import render_hardware_section, save_hardware_profile_to_report

START, END = (marker.encode() for marker in section_markers("hardware"))

PROFILE: dict[str, Any] = {
    "timestamp": "2026-11-23T19:14:05+00:00",
    "cpu": {
        "brand": "AMD EPYC 7763",
        "architecture": "X86_64",
        "cores_physical": 64,
        "cores_logical": 128,
        "frequency_mhz": 2445.4,
    },
    "memory": {"total_gb": 503.26, "available_gb": 480.04},
    "disk": {"total_gb": 1787.95, "free_gb": 901.24},
    "gpu": {
        "name": "NVIDIA A100-SXM4-80GB",
        "total_memory_gb": 79.15,
        "cuda_version": "12.4",
        "compute_capability": "8.0",
        "device_count": 1,
    },
}

EXACT = """\
## Hardware Profile

**Captured:** 2026-11-23T19:14:05+00:00

### CPU
- **Model:** AMD EPYC 7763
- **Architecture:** X86_64
- **Cores:** 64 physical, 128 logical
- **Frequency:** 2445 MHz
|
### Memory
- **Total:** 503.3 GB
- **Available:** 480.0 GB
|
### Disk
- **Total:** 1788.0 GB
- **Free:** 901.2 GB
|
### GPU
- **Model:** NVIDIA A100-SXM4-80GB
- **Memory:** 79.2 GB
- **CUDA Version:** 12.4
- **Compute Capability:** 8.0
- **Device Count:** 1
"""

WIDE = (b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")  # UTF-16 and UTF-32 are refused, see below
any_text = st.binary(max_size=200).filter(
    lambda data: START not in data and END not in data and not data.startswith(WIDE) and b"\0" not in data
)


def test_headings_and_lines_are_exactly_those_of_the_source_plan() -> None:
    section = render_hardware_section(PROFILE)
    position = 0
    for block in EXACT.split("|\n"):
        assert block in section
        assert section.index(block) >= position
        position = section.index(block)


def test_unknown_values_read_unknown_or_not_applicable_and_never_none_or_zero() -> None:
    profile = {
        "cpu": dict.fromkeys(PROFILE["cpu"]),
        "memory": {"total_gb": None, "available_gb": float("nan")},
        "disk": None,
        "gpu": dict.fromkeys(PROFILE["gpu"]),
    }
    section = render_hardware_section(profile | {"gpu": profile["gpu"] | {"device_count": 1}})
    assert "None" not in section and "nan" not in section
    for line in (
        "**Captured:** unknown",
        "- **Model:** unknown",
        "- **Cores:** unknown physical, unknown logical",
        "- **Frequency:** unknown",
        "- **Total:** unknown",
        "- **Memory:** unknown",
        "- **CUDA Version:** N/A",
        "- **Compute Capability:** N/A",
    ):
        assert f"\n{line}\n" in section


@pytest.mark.parametrize(
    "measured",
    [
        {"compute": {}},
        {"disks": {}},
        {"compute": None, "disks": None},
        {"compute": {"matmul": None}, "disks": {"/": {}}},
        {"compute": {"matmul": [{}]}, "disks": {"/": {"write_mbs": None}}},
    ],
)
def test_a_measurement_that_lacks_a_part_is_rendered_without_it(measured: dict[str, Any]) -> None:
    section = render_hardware_section({"measured": measured})
    assert "### Measured" in section and "None" not in section


def test_no_gpu_is_said_in_the_exact_words_with_the_reason_on_the_next_line() -> None:
    section = render_hardware_section(PROFILE | {"gpu": None, "reasons": {"gpu": "nvml: no driver"}})
    assert "### GPU\n- **Status:** No GPU detected\n- **Reason:** nvml: no driver" in section


def test_several_gpus_have_one_line_each() -> None:
    devices = [PROFILE["gpu"] | {"uuid": f"GPU-{i}"} for i in range(3)]
    section = render_hardware_section(PROFILE | {"gpus": devices})
    assert section.count("- **Device ") == 4  # the count, and three devices
    assert "- **Device 2:** NVIDIA A100-SXM4-80GB, 79.2 GB, GPU-2" in section


@pytest.mark.parametrize(
    "name",
    [
        "--> <!-- grd:hardware:end --> # owned",
        "<script>alert(1)</script>",
        "two\nlines\r\n## Heading",
        "[click](http://x) `code` *bold* | cell",
        "bidi \u202e and zero \u200b width",
    ],
)
def test_a_devices_name_cannot_break_out_of_the_section(tmp_path: Path, name: str) -> None:
    report = tmp_path / "REPORT.md"
    report.write_bytes(b"above\n")
    profile = PROFILE | {"gpu": PROFILE["gpu"] | {"name": name}, "cpu": {"brand": name}}
    for _ in range(2):
        save_hardware_profile_to_report(profile, report)
    content = report.read_bytes()
    assert (content.count(START), content.count(END)) == (1, 1)
    assert content.rstrip().endswith(END)
    body = content.split(START)[1].split(END)[0].decode()
    assert "<" not in body and "\n## Heading" not in body and "\u202e" not in body
    assert body.count("\n## ") == 1


@given(before=any_text, after=any_text, old=any_text)
def test_any_bytes_around_the_section_survive_its_replacement(
    before: bytes, after: bytes, old: bytes
) -> None:
    content = before + START + old + END + after
    changed = replace_section(content, "hardware", "new")
    assert changed.startswith(before + START) and changed.endswith(END + after)
    assert changed.count(START) == changed.count(END) == 1


@given(content=any_text)
def test_appending_keeps_every_byte_and_ten_runs_leave_one_section(content: bytes) -> None:
    changed = replace_section(content, "hardware", "line one\nline two")
    assert changed.startswith(content)
    again = changed
    for _ in range(9):
        again = replace_section(again, "hardware", "line one\nline two")
    assert again == changed
    assert changed.count(START) == 1


def test_a_file_with_crlf_line_ends_gets_a_section_with_crlf_line_ends() -> None:
    changed = replace_section(b"one\r\ntwo\r\n", "hardware", "a\nb")
    assert changed == b"one\r\ntwo\r\n\r\n" + START + b"\r\na\r\nb\r\n" + END + b"\r\n"


def test_a_file_without_final_newline_keeps_its_last_line_apart_from_the_section() -> None:
    assert replace_section(b"last line", "hardware", "a").startswith(b"last line\n\n" + START)


def test_a_byte_order_mark_stays_first() -> None:
    content = codecs.BOM_UTF8 + b"text\n"
    assert replace_section(content, "hardware", "a").startswith(content)
    assert replace_section(codecs.BOM_UTF8, "hardware", "a").startswith(codecs.BOM_UTF8 + START)


def test_two_sections_of_different_names_live_in_one_file() -> None:
    content = replace_section(replace_section(b"", "hardware", "a"), "runs", "b")
    content = replace_section(content, "hardware", "c")
    assert content.index(b"\nc\n") < content.index(b"\nb\n")


def test_a_body_that_holds_a_marker_is_refused() -> None:
    with pytest.raises(ValueError, match="marker"):
        replace_section(b"", "hardware", f"x {END.decode()}")


@pytest.mark.parametrize(
    "content",
    [
        START + b"\nno end",
        b"no start\n" + END,
        END + b"\n" + START,
        START + END + START + END,
        START + START + END,
        START + END + END,
        codecs.BOM_UTF16_LE + "text".encode("utf-16-le"),
        "text\n".encode("utf-16-le"),
        "text\n".encode("utf-16-be"),
        "text\n".encode("utf-32-le"),
    ],
    ids=[
        "no end",
        "no start",
        "order",
        "two sections",
        "two starts",
        "two ends",
        "utf-16",
        "16 le",
        "16 be",
        "32",
    ],
)
def test_damaged_markers_are_an_error_and_the_file_stays_untouched(tmp_path: Path, content: bytes) -> None:
    report = tmp_path / "REPORT.md"
    report.write_bytes(content)
    for attempt in (
        lambda: check_section(report, "hardware"),
        lambda: save_hardware_profile_to_report(PROFILE, report),
    ):
        with pytest.raises(ReportError, match=r"REPORT\.md") as caught:
            attempt()
        assert "\n" not in str(caught.value)
    assert report.read_bytes() == content
    assert list(tmp_path.iterdir()) == [report]


def test_a_missing_report_is_made_with_its_folders(tmp_path: Path) -> None:
    report = tmp_path / "a/b/REPORT.md"
    write_section(report, "hardware", "text")
    assert report.read_bytes() == START + b"\ntext\n" + END + b"\n"


def test_a_linked_report_stays_a_link_and_its_target_is_edited(tmp_path: Path) -> None:
    target, link = tmp_path / "real/REPORT.md", tmp_path / "REPORT.md"
    target.parent.mkdir()
    target.write_text("mine\n")
    link.symlink_to("real/REPORT.md")
    write_section(link, "hardware", "text")
    assert link.is_symlink()
    assert target.read_text().startswith("mine\n")
    assert "text" in target.read_text()


def test_a_hard_linked_report_leaves_the_other_name_its_content(tmp_path: Path) -> None:
    report, other = tmp_path / "REPORT.md", tmp_path / "other.md"
    report.write_text("mine\n")
    other.hardlink_to(report)
    write_section(report, "hardware", "text")
    assert other.read_text() == "mine\n" and report.read_text().startswith("mine\n\n<!--")


def test_a_link_to_nothing_makes_what_it_points_to(tmp_path: Path) -> None:
    link = tmp_path / "REPORT.md"
    link.symlink_to("later/REPORT.md")
    write_section(link, "hardware", "text")
    assert link.is_symlink() and (tmp_path / "later/REPORT.md").is_file()


def test_a_report_that_would_not_change_is_not_written(tmp_path: Path) -> None:
    report = tmp_path / "REPORT.md"
    write_section(report, "hardware", "text")
    inode = report.stat().st_ino
    write_section(report, "hardware", "text")
    assert report.stat().st_ino == inode


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def _under_a_file(path: Path) -> Path:
    path.write_text("a file")
    return path / "REPORT.md"


def _fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


def _link_loop(path: Path) -> Path:
    path.symlink_to(path.name)
    return path


@pytest.mark.parametrize("obstacle", [_folder, _under_a_file, _fifo, _link_loop])
def test_a_report_that_cannot_be_written_is_named_in_the_error(tmp_path: Path, obstacle: Any) -> None:
    report = obstacle(tmp_path / "place")
    before = sorted(tmp_path.rglob("*"))
    for attempt in (check_section, lambda path, name: write_section(path, name, "text")):
        with pytest.raises(ReportError, match="place") as caught:
            attempt(report, "hardware")
        assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_report_in_a_folder_without_permission_is_refused(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    with pytest.raises(ReportError, match="no permission"):
        check_section(folder / "REPORT.md", "hardware")


def test_a_write_protected_report_is_refused(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    report = tmp_path / "REPORT.md"
    report.write_text("mine")
    report.chmod(0o444)
    with pytest.raises(ReportError, match="write-protected"):
        write_section(report, "hardware", "text")
    assert report.read_text() == "mine"
