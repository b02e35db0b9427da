"""How wrong estimates are: the seed's formula, earlier runs, the first steps, and the live time left.

    python -m benchmarks estimation              # 4 trainings x 3 of about 40 s: a quarter of an hour
    python -m benchmarks.estimation SECONDS REPS

Real runs of notebooks: an MLP, a CNN, a small transformer, and one that waits for its data; one thread (or
the GPU), validation and a checkpoint in every epoch. A short run of each comes first: it tells how many
epochs take SECONDS, and is the history of the next. For a quiet machine: on a busy one the figures are
those of its neighbours.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat

import grd
from grd.estimation.interval import PRIOR_PROBE, factor_of
from grd.estimation.live import SHORTEST_REST_SECONDS, probe_of
from grd.files import read_json_lines
from grd.runs.events import LiveView

SECONDS, REPS = 40.0, 3
SEED_TFLOPS, SEED_EFFICIENCY = 0.1, 0.5
"""What the seed takes for a processor: its table of GPUs has none, and its default is fifty times as much."""

SHARES = (0.1, 0.25, 0.5)
OVER = (0.5, 0.7, 0.9)
"""Thresholds, as shares of how long the run really was: each of them is one that it is longer than."""

PARAMETERS = """
epochs = 2
timeout = None
checkpoint_dir = ""
resume = False
"""

BEGIN = """
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
torch.set_num_threads(1)
torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
"""

WORKLOADS = {
    "mlp": """
data = TensorDataset(torch.randn(6_000, 256), torch.randint(10, (6_000,)))
model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
batch = 64
""",
    "cnn": """
data = TensorDataset(torch.randn(512, 3, 32, 32), torch.randint(10, (512,)))
model = nn.Sequential(
    nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
    nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
batch = 32
""",
    "transformer": """
class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(1000, 128)
        layer = nn.TransformerEncoderLayer(128, 4, 512, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 4)
        self.head = nn.Linear(128, 10)

    def forward(self, tokens):
        return self.head(self.layers(self.embedding(tokens)).mean(1))

data = TensorDataset(torch.randint(1000, (256, 64)), torch.randint(10, (256,)))
model, batch = Classifier(), 16
""",
    "dataloader": """
import numpy as np
class Slow(Dataset):
    def __len__(self):
        return 1_000

    def __getitem__(self, index):
        noise = np.random.default_rng(index).standard_normal(40_000)
        return torch.from_numpy(np.sort(noise)[:64].astype("float32")), index % 10

data, batch = Slow(), 32
model = nn.Linear(64, 10)
""",
}

TRAIN = """
from grd.experiment import log_metrics, training
held_out = len(data) // 10
kept, validation = torch.utils.data.random_split(data, [len(data) - held_out, held_out])
loader, check = DataLoader(kept, batch, shuffle=True), DataLoader(validation, batch)
model = model.to(device)
optimizer = torch.optim.AdamW(model.parameters())
log_metrics(parameters=sum(p.numel() for p in model.parameters()), samples=len(kept))
for epoch in training.epochs(epochs, model=model, optimizer=optimizer, every=1,
                             checkpoint_dir=checkpoint_dir, resume=resume):
    for x, y in epoch.steps(loader):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x.to(device)), y.to(device))
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        right = sum((model(x.to(device)).argmax(1).cpu() == y).sum().item() for x, y in check)
    epoch.log(loss=loss.item(), accuracy=right / held_out)
"""


@dataclass
class Ran:
    """One run, and what would have been said of it when. All in seconds of its training loop but two."""

    workload: str
    whole: float
    """The whole run, from its runner's start."""
    before: dict[str, Any]
    """The estimate before its start: of the whole run."""
    real: float
    seed: float
    probe: float | None
    """Total, as the probe predicted it."""
    probe_at: float
    rest: tuple[float, float] | None
    """What was left after the probe: predicted and real."""
    live: dict[float, float]
    """Total as predicted at a share of the way."""


def write_notebooks(folder: Path) -> None:
    """The four trainings."""
    for name, source in WORKLOADS.items():
        notebook = nbformat.v4.new_notebook()
        notebook.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "python3"}
        cells = [nbformat.v4.new_code_cell(text.strip()) for text in (PARAMETERS, BEGIN + source, TRAIN)]
        cells[0].metadata["tags"] = ["parameters"]
        notebook.cells = cells
        nbformat.write(notebook, folder / f"{name}.ipynb")


def run(folder: Path, workload: str, epochs: int) -> Ran:
    """One run of ``workload``, looked at afterwards as somebody would have who watched it."""
    command = [sys.executable, "-m", "grd", "research", f"{workload}.ipynb", "-p", "epochs", str(epochs)]
    source = str(Path(grd.__file__).resolve().parents[1])
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GRD_")} | {
        "GRD_STATE_DIR": str(folder / "state"),
        "PYTHONPATH": os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")])),
    }
    done = subprocess.run(
        [*command, "--timeout", "9m", "--quiet", "--json"],
        cwd=folder, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    record = json.loads(done.stdout)
    view, live, probe, at = LiveView(), {}, None, 0.0
    for _, event in read_json_lines(Path(record["folder"]) / "events.jsonl"):
        view.take(event)
        pace = view.paces.get("epochs")
        if event["kind"] != "progress" or pace is None:
            continue
        elapsed, left = pace.now.t - pace.first.t, pace.remaining(epochs)
        if left is None:
            continue
        for share in SHARES:
            if pace.now.n >= share * epochs:
                live.setdefault(share, elapsed + left)
        if probe is None and left >= SHORTEST_REST_SECONDS and probe_of(pace, epochs) is not None:
            probe, at = elapsed + left, elapsed
    pace, metrics = view.paces["epochs"], view.metrics
    real = pace.now.t - pace.first.t
    operations = 6 * metrics["parameters"] * metrics["samples"] * epochs
    return Ran(
        workload=workload,
        whole=sum(attempt["seconds"] for attempt in record["attempts"]),
        before=record["estimate"],
        real=real,
        seed=operations / (SEED_TFLOPS * 1e12) / SEED_EFFICIENCY,
        probe=probe,
        probe_at=at,
        rest=None if probe is None else (probe - at, real - at),
        live=live,
    )


def wilson(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927): of ``hits`` in ``n``."""
    if n == 0:
        return 0.0, 1.0
    share = hits / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def _quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)]


def show_errors(name: str, pairs: Sequence[tuple[float, float]]) -> None:
    """A line for one method: median and 90th percentile of the relative error, the worst, median factor."""
    if not pairs:
        print(f"{name:<34} no run was long enough")
        return
    errors = [abs(predicted - real) / real for predicted, real in pairs]
    factor = math.exp(statistics.median(abs(math.log(max(p, 1e-9) / real)) for p, real in pairs))
    print(
        f"{name:<34} median {statistics.median(errors):7.1%}  p90 {_quantile(errors, 0.9):7.1%}  "
        f"worst {max(errors):7.1%}  factor {factor:.3g}  n={len(pairs)}",
        flush=True,
    )


def show_share(name: str, hits: Sequence[bool]) -> None:
    """A line with a share and its own uncertainty."""
    if not hits:
        print(f"{name:<52} no run was long enough")
        return
    low, high = wilson(sum(hits), len(hits))
    print(f"{name:<52} {sum(hits)}/{len(hits)} = {sum(hits) / len(hits):.0%} (95 %: {low:.0%} to {high:.0%})")


def show(runs: Sequence[Ran]) -> None:
    """The tables of these runs."""
    print(f"{'workload':<12} {'loop s':>7} {'seed':>9} {'probe':>7} {'at s':>6}  before")
    for ran in runs:
        seed, probe = (f"{p / ran.real - 1:+.0%}" if p else "-" for p in (ran.seed, ran.probe))
        guess = ran.before["seconds"]
        told = "unknown" if guess is None else f"{guess / ran.whole - 1:+.0%} ({ran.before['method']})"
        print(f"{ran.workload:<12} {ran.real:7.1f} {seed:>9} {probe:>7} {ran.probe_at:6.1f}  {told}")
    probed = [ran for ran in runs if ran.probe is not None and ran.rest is not None]
    guessed = [ran for ran in runs if ran.before["seconds"] is not None]
    show_errors("seed: 6 x parameters x samples", [(ran.seed, ran.real) for ran in runs])
    show_errors("before: earlier runs", [(ran.before["seconds"], ran.whole) for ran in guessed])
    show_errors("probe, of the whole", [(ran.probe or 0.0, ran.real) for ran in probed])
    show_errors("probe, of what was left", [ran.rest for ran in probed if ran.rest is not None])
    for share in SHARES:
        pairs = [(ran.live[share], ran.real) for ran in runs if share in ran.live]
        show_errors(f"live at {share:.0%}", pairs)
    show_share(
        "before: the interval held the run",
        [ran.before["low_seconds"] <= ran.whole <= ran.before["high_seconds"] for ran in guessed],
    )
    rests = [ran.rest for ran in probed if ran.rest is not None]
    show_share(
        f"probe: x/÷ {PRIOR_PROBE:g} held what was left", [_holds(PRIOR_PROBE, *rest) for rest in rests]
    )
    learned = [
        (factor_of(rests[:i] + rests[i + 1 :], PRIOR_PROBE), rest) for i, rest in enumerate(rests)
    ]  # each by all others
    learned = [(factor, rest) for factor, rest in learned if factor.n]
    show_share(
        "probe: the factor of the other runs held it",
        [_holds(factor.value, *rest) for factor, rest in learned],
    )
    if learned:
        print(f"  that factor: median {statistics.median(factor.value for factor, _ in learned):.2f}")
    long_called_long = [
        ran.probe_at + PRIOR_PROBE * ran.rest[0] > share * ran.real
        for ran in probed
        for share in OVER
        if ran.rest is not None and ran.probe_at < share * ran.real
    ]
    show_share("longer than a threshold, and called so by the probe", long_called_long)


def _holds(factor: float, predicted: float, real: float) -> bool:
    return predicted / factor <= real <= predicted * factor


def main(seconds: float = SECONDS, reps: int = REPS) -> None:
    """Run everything and print the tables."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / ".planning").mkdir()
        write_notebooks(folder)
        epochs = {}
        for workload in WORKLOADS:
            short = run(folder, workload, 2)
            epochs[workload] = max(2, round(seconds / (short.real / 2)))
        runs = []
        for _ in range(reps):
            for workload in WORKLOADS:  # in turns, so that a busy quarter of an hour is not one workload's
                runs.append(run(folder, workload, epochs[workload]))
                print(f"{workload}: {epochs[workload]} epochs, {runs[-1].real:.1f} s", flush=True)
        show(runs)


if __name__ == "__main__":
    kinds: tuple[Callable[[str], Any], ...] = (float, int)
    main(*(kind(text) for kind, text in zip(kinds, sys.argv[1:], strict=False)))
