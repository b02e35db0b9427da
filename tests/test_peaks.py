"""Peak rates by device name: right, or none."""

from __future__ import annotations

import re

import pytest

from grd.hardware.peaks import DTYPES, peak_table, peak_tflops, peaks_of

BF16 = {
    "NVIDIA A2": 18.0,
    "NVIDIA A10": 125.0,
    "NVIDIA A10G": 70.0,
    "NVIDIA A30": 165.0,
    "NVIDIA A40": 149.7,
    "A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100-PCIE-40GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
    "NVIDIA GeForce RTX 3070": 40.6,
    "NVIDIA GeForce RTX 3090": 71.0,
    "GeForce RTX 3090": 71.0,
    "NVIDIA RTX A6000": 154.8,
    "RTX A6000": 154.8,
    "NVIDIA L4": 121.0,
    "NVIDIA L40": 181.0,
    "NVIDIA L40S": 362.0,
    "NVIDIA RTX 6000 Ada Generation": 364.2,
    "NVIDIA GeForce RTX 4080": 97.5,
    "NVIDIA GeForce RTX 4090": 165.2,
    "NVIDIA GeForce RTX 5080": 112.6,
    "NVIDIA GeForce RTX 5090": 209.5,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H100 80GB HBM3": 989.5,
    "NVIDIA H100 NVL": 835.5,
    "NVIDIA GH200 480GB": 989.5,
    "NVIDIA H200": 989.5,
    "NVIDIA H200 NVL": 835.5,
    "NVIDIA B200": 2250.0,
    "AMD Instinct MI210": 181.0,
    "AMD Instinct MI250X": 191.5,
    "AMD Instinct MI300X": 1307.4,
    "AMD Instinct MI325X": 1307.4,
}
FP16_WITHOUT_BF16 = {
    "Tesla P100-PCIE-16GB": 18.7,
    "Tesla P100-SXM2-16GB": 21.2,
    "Tesla V100-PCIE-32GB": 112.0,
    "Tesla V100-SXM2-16GB": 125.0,
    "Tesla V100-SXM2-32GB": 125.0,
    "Tesla V100S-PCIE-32GB": 130.0,
    "Tesla T4": 65.0,
    "NVIDIA TITAN RTX": 130.5,
    "NVIDIA GeForce RTX 2080 Ti": 53.8,
}
UNKNOWN = [
    "NVIDIA T400",
    "NVIDIA T400 4GB",
    "NVIDIA T4G",
    "NVIDIA T1000",
    "NVIDIA RTX A1000",
    "NVIDIA RTX A1000 Laptop GPU",
    "NVIDIA RTX A2000 12GB",
    "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
    "NVIDIA A100X",
    "NVIDIA A100-SXM-64GB",
    "GRID A100-7C",
    "NVIDIA A40-48Q",
    "NVIDIA GeForce RTX 4090 Laptop GPU",
    "NVIDIA GeForce RTX 4090 D",
    "NVIDIA GeForce RTX 4080 SUPER",
    "NVIDIA GeForce RTX 3070 Ti",
    "NVIDIA GeForce RTX 3090 Ti",
    "NVIDIA GeForce RTX 2080 Ti with Max-Q",
    "NVIDIA RTX 4000 Ada Generation",
    "NVIDIA RTX 6000",
    "Quadro RTX 6000",
    "NVIDIA H100",
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
    "NVIDIA H800",
    "NVIDIA H20",
    "NVIDIA GB200",
    "NVIDIA B300 SXM6 AC",
    "NVIDIA L20",
    "NVIDIA L40G",
    "AMD Instinct MI300A",
    "AMD Instinct MI300X VF",
    "AMD Radeon RX 7900 XTX",
    "Apple M2",
    "NVIDIA",
    "Tesla",
    "",
    "NVIDIA A40 (Mock)",
    "AMD A10",
    "AMD T4",
    "AMD Tesla T4",
    "AMD H200",
    "AMD GeForce RTX 4090",
    "NVIDIA Instinct MI300X",
    "Tesla GeForce RTX 4090",
]


def test_there_are_many_rows_each_with_its_datasheet() -> None:
    rows = [row for _, row in peak_table()]
    assert len(rows) >= 30
    assert all(re.search(r"datasheet|data sheet|whitepaper|product page", row.source) for row in rows)
    assert len(BF16 | FP16_WITHOUT_BF16) + len(UNKNOWN) >= 50


@pytest.mark.parametrize(("name", "rate"), BF16.items())
def test_a_known_device_has_its_own_dense_rate(name: str, rate: float) -> None:
    assert peak_tflops(name, "bf16") == rate


@pytest.mark.parametrize(("name", "rate"), FP16_WITHOUT_BF16.items())
def test_a_device_without_bf16_units_has_no_bf16_peak(name: str, rate: float) -> None:
    assert peak_tflops(name, "fp16") == rate
    assert peak_tflops(name, "bf16") is None


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_name_that_only_resembles_a_known_one_has_no_peak(name: str) -> None:
    assert [peak_tflops(name, dtype) for dtype in DTYPES] == [None] * 4


@pytest.mark.parametrize("name", [None, 3, b"Tesla T4"])
def test_what_is_no_name_has_no_peak(name: object) -> None:
    assert peak_tflops(name, "fp16") is None


def test_a_partition_under_the_whole_cards_name_has_no_peak() -> None:
    assert peak_tflops("NVIDIA H200", "bf16", 140.0) == 989.5
    assert peak_tflops("NVIDIA H200", "bf16", 35.0) is None


@pytest.mark.parametrize("dtype", ["torch.bfloat16", "bfloat16", "BF16", " bf16 "])
def test_torchs_spelling_of_a_type_is_understood(dtype: str) -> None:
    assert peak_tflops("NVIDIA H200", dtype) == 989.5


@pytest.mark.parametrize("dtype", ["fp64", "int8", "fp8", "", "bf", "float33"])
def test_a_type_that_is_not_listed_has_no_peak(dtype: str) -> None:
    assert peak_tflops("NVIDIA H200", dtype) is None


def test_no_name_fits_two_rows() -> None:
    for name in [*BF16, *FP16_WITHOUT_BF16]:
        short = re.sub(r"^(NVIDIA |AMD )?(Tesla )?", "", name)
        assert len([1 for pattern, _ in peak_table() if pattern.fullmatch(short)]) == 1, name


def test_rates_are_plausible_in_their_row() -> None:
    """Half of a type's rate, or twice it, would break these; a number of another column would too."""
    for _, row in peak_table():
        rates = row.tflops
        if rates["bf16"] and "MI100" not in row.source:  # the one card whose bf16 is half of its fp16
            assert rates["bf16"] == rates["fp16"], row.source
        if rates["tf32"] and rates["bf16"]:
            assert rates["bf16"] / rates["tf32"] == pytest.approx(2, rel=0.03), row.source
        if rates["fp32"] and rates["tf32"]:
            assert rates["tf32"] >= rates["fp32"], row.source
        assert all(rate is None or 1 < rate < 3000 for rate in rates.values())


def test_sizes_and_bandwidths_stand_beside_the_rates() -> None:
    row = peaks_of("NVIDIA H200")
    assert row is not None
    assert (row.memory_gb, row.bandwidth_gbs) == (141, 4800)
