"""What a checkpoint costs beside the limits of disk and torch, and what one in the background saves.

    python -m benchmarks checkpoints
    GRD_BENCH_MEGABYTES=250,1000 GRD_BENCH_ROUNDS=9 python -m benchmarks checkpoints

Each round saves the same state once in every way, in an order drawn anew. All ways but ``torch.save`` alone
are durable: fsync of the file, rename, fsync of the folder. The files lie in GRD_BENCH_FOLDER, or in the
folder for temporary files.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from grd.experiment import CheckpointHandler, checkpoint_file, training

ROUNDS = int(os.environ.get("GRD_BENCH_ROUNDS", "7"))
MEGABYTES = [int(word) for word in os.environ.get("GRD_BENCH_MEGABYTES", "250,1000").split(",")]
LOOP_MEGABYTES = 250
AUTO_STEPS = int(os.environ.get("GRD_BENCH_AUTO_STEPS", "120"))


def main() -> None:
    """Print all tables; GRD_BENCH_PARTS=saving,checksum,loop,memory,auto chooses some."""
    parts = {
        "saving": all_sizes,
        "checksum": checksum,
        "loop": beside_a_loop,
        "memory": memory,
        "auto": automatic,
    }
    chosen = os.environ.get("GRD_BENCH_PARTS", "")
    for name, part in parts.items():
        if not chosen or name in chosen.split(","):
            part()
            print(f"  (load now {os.getloadavg()[0]:.1f})", flush=True)


def a_state(megabytes: int, device: str = "cpu") -> tuple[Any, Any]:
    """A model and its AdamW, together of about ``megabytes``: three float32 for each parameter."""
    import torch

    torch.manual_seed(0)
    width = 1024
    layers = max(1, round(megabytes * 1e6 / 12 / (width * width)))
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(layers))).to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.rand(2, width, device=device)).sum().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return model, optimizer


@contextlib.contextmanager
def a_folder() -> Iterator[Path]:
    """Where files are written; removed at the end."""
    with tempfile.TemporaryDirectory(prefix="grd-bench-", dir=os.environ.get("GRD_BENCH_FOLDER")) as place:
        yield Path(place)


def written_bytes() -> int:
    """What this process has passed to write()."""
    return int(Path("/proc/self/io").read_text().split("wchar:")[1].split()[0])


def durable(path: Path, write: Callable[[Any], object]) -> None:
    """A file that is whole or absent, also after a power cut."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as stream:
        write(stream)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


class _NoDigest:
    """A checksum that costs nothing and says nothing."""

    def update(self, data: Any) -> None:
        """Nothing."""

    def hexdigest(self) -> str:
        """Of the right form."""
        return "0" * 32


class Saving:
    """The ways to save one state."""

    def __init__(self, megabytes: int, folder: Path) -> None:
        import torch

        self.torch = torch
        self.folder = folder
        self.model, self.optimizer = a_state(megabytes)
        self.state = {"model_state": self.model.state_dict(), "optimizer_state": self.optimizer.state_dict()}
        self.epoch = 0
        durable(folder / "size.pt", lambda stream: torch.save(self.state, stream))
        self.size = (folder / "size.pt").stat().st_size
        self.raw = memoryview((folder / "size.pt").read_bytes())
        (folder / "size.pt").unlink()
        self.handler = CheckpointHandler(folder / "grd", keep_bytes=1, install_signal_handlers=False)
        self.beside = CheckpointHandler(
            folder / "beside", keep_bytes=1, install_signal_handlers=False, async_save=True
        )
        self.stalls: list[float] = []

    def write_raw(self) -> None:
        """The bytes alone: what the disk can do."""
        durable(self.folder / "raw.bin", lambda stream: stream.write(self.raw))

    def torch_save(self) -> None:
        """torch.save, not durable."""
        self.torch.save(self.state, self.folder / "plain.pt")

    def torch_durable(self) -> None:
        """torch.save once, durable, without a latest."""
        durable(self.folder / "once.pt", lambda stream: self.torch.save(self.state, stream))

    def twice(self) -> None:
        """The version and a latest, both written."""
        for name in ("version.pt", "latest.pt"):
            durable(self.folder / name, lambda stream: self.torch.save(self.state, stream))

    def grd(self) -> None:
        """grd: a version, its manifest entry, and latest."""
        self._save(self.handler)

    def grd_without_hash(self) -> None:
        """The same without the checksum."""
        digest, least = checkpoint_file.xxhash.xxh3_128, checkpoint_file._WORTH_A_THREAD
        checkpoint_file.xxhash.xxh3_128 = _NoDigest  # type: ignore[assignment,misc]
        checkpoint_file._WORTH_A_THREAD = sys.maxsize  # nor what handing over to a thread costs
        try:
            self._save(self.handler)
        finally:
            checkpoint_file.xxhash.xxh3_128 = digest  # type: ignore[misc]
            checkpoint_file._WORTH_A_THREAD = least

    def grd_beside(self) -> None:
        """In the background; ``stalls`` has what the caller waited."""
        began = time.perf_counter()
        self._save(self.beside)
        self.stalls.append(time.perf_counter() - began)
        self.beside.flush()

    def _save(self, handler: CheckpointHandler) -> None:
        self.epoch += 1
        handler.save_checkpoint(self.epoch, self.model, self.optimizer, 0.5)


def all_sizes() -> None:
    """Each way in turns, for each size."""
    for megabytes in MEGABYTES:
        with a_folder() as folder:
            one_size(megabytes, folder)


def one_size(megabytes: int, folder: Path) -> None:
    """Each way ``ROUNDS`` times, shuffled, after one round that does not count."""
    saving = Saving(megabytes, folder)
    ways = [
        saving.write_raw, saving.torch_save, saving.torch_durable, saving.twice, saving.grd,
        saving.grd_without_hash, saving.grd_beside,
    ]  # fmt: skip
    times: dict[str, list[float]] = {way.__name__: [] for way in ways}
    written: dict[str, int] = {}
    dice = random.Random(megabytes)
    for number in range(ROUNDS + 1):
        for way in dice.sample(ways, len(ways)):
            os.sync()
            before, began = written_bytes(), time.perf_counter()
            way()
            took = time.perf_counter() - began
            written[way.__name__] = written_bytes() - before
            if number:
                times[way.__name__].append(took)
            elif way == saving.grd_beside:
                saving.stalls.clear()
    middle = {name: statistics.median(values) for name, values in times.items()}
    print(f"a state of {saving.size / 1e6:.0f} MB, {ROUNDS} rounds: seconds, bytes in states", flush=True)
    for name, values in times.items():
        print(f"  {name:<18} {_spread(values)}   {written[name] / saving.size:.4f}", flush=True)
    print(f"  {'stall of the last':<18} {_spread(saving.stalls)}")
    on_disk = _on_disk(folder / "grd") / 2  # keep_bytes=1 keeps two versions
    stall = statistics.median(saving.stalls)
    _ratio("bytes written for a version and latest", written["grd"] / saving.size, "<= 1.01")
    _ratio("bytes on disk for a version and latest", on_disk / saving.size, "<= 1.01")
    _ratio("grd / two durable saves", middle["grd"] / middle["twice"], "<= 0.60")
    _ratio("raw write + fsync / grd", middle["write_raw"] / middle["grd"], ">= 0.45, stretch 0.80")
    _ratio("the same of the best of each", min(times["write_raw"]) / min(times["grd"]), "")
    _ratio("grd / grd without checksum", middle["grd"] / middle["grd_without_hash"], "<= 1.10")
    _ratio("stall in the background / grd", stall / middle["grd"], "<= 0.30")


def checksum() -> None:
    """What hashing adds, in more rounds: it is less than what two saves to a disk differ by anyhow."""
    for megabytes in MEGABYTES:
        with a_folder() as folder:
            saving = Saving(megabytes, folder)
            ways = [saving.grd, saving.grd_without_hash]
            times: dict[str, list[float]] = {way.__name__: [] for way in ways}
            dice = random.Random(megabytes)
            for number in range(3 * ROUNDS + 1):
                for way in dice.sample(ways, len(ways)):
                    os.sync()
                    began = time.perf_counter()
                    way()
                    if number:
                        times[way.__name__].append(time.perf_counter() - began)
            print(f"a state of {saving.size / 1e6:.0f} MB, {3 * ROUNDS} rounds", flush=True)
            for name, values in times.items():
                print(f"  {name:<18} {_spread(values)}", flush=True)
            hashed, bare = times.values()
            low, high = _resampled(hashed, bare, dice)
            _ratio(
                "grd / grd without checksum", statistics.median(hashed) / statistics.median(bare), "<= 1.10"
            )
            print(f"  {'90 % of such ratios, rounds drawn anew':<42} {low:.3f} to {high:.3f}", flush=True)


def _resampled(above: list[float], below: list[float], dice: random.Random) -> tuple[float, float]:
    """The percentile bootstrap's 90 % interval of the ratio of medians (Efron 1979), 2,000 samples."""

    def median_of(values: list[float]) -> float:
        return statistics.median(dice.choices(values, k=len(values)))

    ratios = sorted(median_of(above) / median_of(below) for _ in range(2000))
    return ratios[100], ratios[-101]


def _on_disk(folder: Path) -> int:
    files = {path.stat().st_ino: path.stat().st_size for path in folder.iterdir()}
    return sum(files.values())


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):8.3f} s ({min(values):.3f} to {max(values):.3f}, n={len(values)})"


def _ratio(name: str, value: float, target: str) -> None:
    print(f"  {name:<42} {value:.3f}" + (f"  (target {target})" if target else ""), flush=True)


def beside_a_loop() -> None:
    """What a save adds to the wall time of a loop that keeps the processors busy."""
    import torch

    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for device in devices:
        for threads in (torch.get_num_threads(), 1) if device == "cpu" else (torch.get_num_threads(),):
            _loop(device, threads)


def _loop(device: str, threads: int) -> None:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    model, optimizer = a_state(LOOP_MEGABYTES, device)
    work = torch.rand(1024, 1024, device=device)

    def steps() -> None:
        for _ in range(120):
            for _ in range(1 if device == "cpu" else 400):
                torch.mm(work, work)
            if device == "cuda":
                torch.cuda.synchronize()

    with a_folder() as folder:
        keepers = {
            "no save": None,
            "one save": CheckpointHandler(folder / "a", keep_bytes=1, install_signal_handlers=False),
            "one in the background": CheckpointHandler(
                folder / "b", keep_bytes=1, install_signal_handlers=False, async_save=True
            ),
        }
        times: dict[str, list[float]] = {name: [] for name in keepers}
        dice = random.Random(threads)
        for number in range(ROUNDS + 1):
            for name in dice.sample(list(keepers), len(keepers)):
                os.sync()
                keeper = keepers[name]
                began = time.perf_counter()
                if keeper is not None:
                    keeper.save_checkpoint(number, model, optimizer, 0.5)
                steps()
                if keeper is not None:
                    keeper.flush()
                if number:
                    times[name].append(time.perf_counter() - began)
    torch.set_num_threads(before)
    where = f"{threads} threads of torch" if device == "cpu" else torch.cuda.get_device_name(0)
    print(f"a loop with one save of {LOOP_MEGABYTES} MB, {where}, {ROUNDS} rounds", flush=True)
    for name, values in times.items():
        print(f"  {name:<22} {_spread(values)}")
    middle = {name: statistics.median(values) for name, values in times.items()}
    extra = {name: value - middle["no save"] for name, value in middle.items()}
    print("  extra: " + ", ".join(f"{name} {value:.3f} s" for name, value in extra.items() if value))
    ratio = extra["one in the background"] / extra["one save"]
    _ratio("extra wall time, background / waited for", ratio, "<= 1.15")


_PEAK = """
import sys
from pathlib import Path
from benchmarks.checkpoints import a_state
from grd.experiment import CheckpointHandler

def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

folder, megabytes, beside = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "True"
small = a_state(13)
keeper = CheckpointHandler(folder, keep_bytes=1, install_signal_handlers=False, async_save=beside)
for epoch in range(2):
    keeper.save_checkpoint(epoch, *small)
keeper.flush()
model, optimizer = a_state(megabytes)
size = 3 * sum(p.numel() for p in model.parameters()) * 4
Path("/proc/self/clear_refs").write_text("5")  # forget the peak of making it
before = peak()
for epoch in range(2, 6):
    keeper.save_checkpoint(epoch, model, optimizer)
keeper.flush()
print((peak() - before) / size)
"""


def memory() -> None:
    """Peak memory that four saves add to a process, in states."""
    for megabytes in MEGABYTES:
        for beside in (False, True):
            with a_folder() as folder:
                command = [sys.executable, "-c", _PEAK, str(folder), str(megabytes), str(beside)]
                said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            name = f"memory of saves {'in the background' if beside else 'waited for'}, {megabytes} MB"
            _ratio(name, float(said), "<= 1.05" if beside else "~ 0")


def automatic() -> None:
    """Steps of a second, a save of about a quarter of one, ``every="auto"``: the share of time it takes."""
    with a_folder() as folder:
        megabytes = _megabytes_for(0.25, folder)
        model, optimizer = a_state(megabytes)
        began = time.perf_counter()
        worked = 0.0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for epoch in training.epochs(
                1, model=model, optimizer=optimizer, checkpoint_dir=folder / "run", keep_bytes=1
            ):
                for _ in epoch.steps(range(AUTO_STEPS)):
                    step = time.perf_counter()
                    time.sleep(1.0)
                    worked += time.perf_counter() - step
        took = time.perf_counter() - began
        lines = (folder / "run" / "manifest.jsonl").read_text().splitlines()
    print(
        f'every="auto": {AUTO_STEPS} steps of 1 s, a state of {megabytes} MB, {len(lines)} saves', flush=True
    )
    _ratio("time outside the steps / in them", (took - worked) / worked, "<= 0.035")


def _megabytes_for(seconds: float, folder: Path) -> int:
    model, optimizer = a_state(100)
    keeper = CheckpointHandler(folder / "probe", keep_bytes=1, install_signal_handlers=False)
    times = []
    for epoch in range(6):
        began = time.perf_counter()
        keeper.save_checkpoint(epoch, model, optimizer)
        times.append(time.perf_counter() - began)
    shutil.rmtree(folder / "probe")
    return max(20, round(100 * seconds / statistics.median(times)))


if __name__ == "__main__":
    main()
