"""A training killed after any step and resumed inside that epoch ends where an uninterrupted one does."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from grd.errors import UsageError
from grd.experiment import CheckpointHandler, training
from grd.experiment.resumable_loader import ResumableLoader

pytestmark = pytest.mark.usefixtures("by_hand")

ROOT = Path(__file__).resolve().parents[1]
ALWAYS = "0.0000001s"
X = torch.linspace(-1, 1, 256).reshape(64, 4)
Y = X.sum(1, keepdim=True)


@pytest.fixture(autouse=True)
def no_power_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of saves need not reach the disk itself."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


class Killed(BaseException):
    """What stands for kill -9 inside one process."""


class Killer:
    """Called after every step; the call number ``at`` is the last."""

    def __init__(self, at: int | None) -> None:
        self.at = at
        self.calls = 0

    def __call__(self) -> None:
        self.calls += 1
        if self.calls == self.at:
            raise Killed


Once = Callable[[Path, bool, Killer], Any]


def check_all_kills(once: Once, folder: Path, *, warns: str | None = None, each: int = 1) -> None:
    """``once(folder, resume, after_step)`` comes to the same, whichever step (or each so many) was cut."""

    def seeded(where: Path, resume: bool, killer: Killer) -> Any:
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        return once(where, resume, killer)

    killer = Killer(None)
    whole = seeded(folder / "whole", False, killer)
    assert killer.calls > 4
    told = set()
    for at in range(1, killer.calls + 1, each):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", RuntimeWarning)
            with pytest.raises(Killed):
                seeded(folder / str(at), False, Killer(at))
            assert seeded(folder / str(at), True, Killer(None)) == whole, f"killed in step {at}"
        told |= {str(warning.message) for warning in caught if str(warning.message).startswith("grd: ")}
    if warns is None:
        assert not told
    else:
        assert len(told) == 1 and warns in told.pop()


def weights(model: nn.Module) -> list[Any]:
    return [value.tolist() for value in model.state_dict().values()]


# --- iterables that draw random numbers ------------------------------------------------------------------


def drawing(kind: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches at random places, as many language models are trained; the first draw is an order."""
    if kind == "shuffled":
        order = list(range(64))
        random.shuffle(order)
    for number in range(4):
        if kind == "python":
            places = [random.randrange(64) for _ in range(8)]
        elif kind == "numpy":
            places = np.random.randint(0, 64, 8).tolist()
        elif kind == "torch":
            places = torch.randint(64, (8,)).tolist()
        else:
            places = order[number * 8 : number * 8 + 8]
        yield X[places], Y[places]


@pytest.mark.parametrize("body", ["plain", "dropout", "python", "numpy"])
@pytest.mark.parametrize("kind", ["python", "numpy", "torch", "shuffled"])
def test_batches_drawn_at_random_are_neither_repeated_nor_left_out(
    tmp_path: Path, kind: str, body: str
) -> None:
    def once(folder: Path, resume: bool, after_step: Killer) -> Any:
        model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5 if body == "dropout" else 0.0), nn.Linear(4, 1))
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        state: dict[str, Any] = {"seen": []}
        for epoch in training.epochs(
            2, model=model, optimizer=optimizer, state=state, checkpoint_dir=folder, resume=resume,
            every=ALWAYS,
        ):  # fmt: skip
            for x, y in epoch.steps(drawing(kind)):
                noise = random.random() if body == "python" else np.random.rand() if body == "numpy" else 0.0
                optimizer.zero_grad()
                ((model(x) - y + noise) ** 2).mean().backward()
                optimizer.step()
                state["seen"].append(x.sum().item())
                after_step()
        return weights(model), state["seen"], random.random(), np.random.rand(), torch.rand(1).item()

    both_draw = (kind, body) in {("python", "python"), ("numpy", "numpy"), ("torch", "dropout")}
    check_all_kills(once, tmp_path, warns="depends on the batches before" if both_draw else None)


def test_an_order_that_each_batch_goes_on_with_is_drawn_again(tmp_path: Path) -> None:
    def walk() -> Iterator[float]:
        place = 0.0
        for _ in range(6):
            place += random.random()
            yield place

    def once(folder: Path, resume: bool, after_step: Killer) -> Any:
        state: dict[str, Any] = {"seen": []}
        for epoch in training.epochs(2, state=state, checkpoint_dir=folder, resume=resume, every=ALWAYS):
            for place in epoch.steps(walk()):
                state["seen"].append((place, torch.rand(1).item()))
                after_step()
        return state["seen"]

    check_all_kills(once, tmp_path)


# --- code outside of the steps ---------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Detected call of")
@pytest.mark.parametrize("where", ["top", "between", "everywhere"])
def test_what_stands_outside_of_the_steps_counts_once(tmp_path: Path, where: str) -> None:
    def once(folder: Path, resume: bool, after_step: Killer) -> Any:
        model = nn.Linear(4, 1)
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        state: dict[str, Any] = {"n": 0, "log": [], "large": [0] * 9000, "left": {}}
        train = DataLoader(TensorDataset(X, Y), 24, shuffle=True)
        valid = DataLoader(TensorDataset(X, Y), 32)

        def outside(place: str) -> None:
            if where not in (place, "everywhere"):
                return
            scheduler.step()
            state["n"] += 1
            state["large"].append(state["n"])
            if state["n"] % 2:
                state["left"].pop("a", None)
            else:
                state["left"]["a"] = state["left"].get("a", 0) + state["n"]
            drawn = random.random() + np.random.rand() + torch.rand(1).item()
            state["log"].append((place, state["n"], drawn, scheduler.last_epoch))
            with torch.no_grad():
                model.weight.mul_(1 + 0.1 * torch.rand(1))

        for epoch in training.epochs(
            2, model=model, optimizer=optimizer, scheduler=scheduler, state=state, checkpoint_dir=folder,
            resume=resume, every=ALWAYS,
        ):  # fmt: skip
            outside("top")
            log = state["log"]
            epoch.state["sum"] = 0.0
            for x, y in epoch.steps(train):
                optimizer.zero_grad()
                ((model(x) - y) ** 2).mean().backward()
                optimizer.step()
                log.append(torch.rand(1).item())
                epoch.state["sum"] += 1.0
                after_step()
            epoch.log(trained=epoch.state["sum"])
            outside("between")
            for x, y in epoch.steps(valid):
                with torch.no_grad():
                    epoch.mean("loss", ((model(x) - y) ** 2).mean().item())
                log.append(torch.rand(1).item())
                after_step()
            outside("end")
            epoch.log(loss=epoch.mean("loss"), sum=epoch.state["sum"])
        return (
            weights(model),
            scheduler.state_dict(),
            optimizer.param_groups[0]["lr"],
            state,
            training.history,
        )

    check_all_kills(once, tmp_path, each=3)


def reading_weights_at_the_top(passes: int = 1, looks: list[float] | None = None) -> Once:
    """Each epoch begins with a copy of the weights, which its steps use; ``looks`` gets their sum."""

    def once(folder: Path, resume: bool, after_step: Killer) -> Any:
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        state: dict[str, Any] = {"seen": [], "moments": 0}
        for epoch in training.epochs(
            3, model=model, optimizer=optimizer, state=state, checkpoint_dir=folder, resume=resume,
            every=ALWAYS,
        ):  # fmt: skip
            anchor = [parameter.detach().clone() for parameter in model.parameters()]
            total = sum(float(item.sum()) for item in anchor)
            state["seen"].append((total, len(optimizer.state)))
            if looks is not None:
                looks.append(total)
            for number in range(passes):
                for x, y in epoch.steps(DataLoader(TensorDataset(X, Y), 24, shuffle=True)):
                    optimizer.zero_grad()
                    loss = ((model(x) - y) ** 2).mean()
                    for parameter, before in zip(model.parameters(), anchor, strict=True):
                        loss = loss + (1 + number) * (parameter - before).square().sum()
                    loss.backward()
                    optimizer.step()
                    after_step()
                state["moments"] += len(optimizer.state)
            epoch.log(loss=float("nan"))
        return weights(model), state, repr(training.history)

    return once


@pytest.mark.parametrize("passes", [1, 2])
def test_weights_that_are_read_at_the_top_of_an_epoch_are_those_of_its_beginning(
    tmp_path: Path, passes: int
) -> None:
    check_all_kills(reading_weights_at_the_top(passes), tmp_path, each=passes)


@pytest.mark.parametrize("start", ["there", "gone", "of another training"])
def test_only_a_checkpoint_of_this_very_training_tells_how_an_epoch_began(tmp_path: Path, start: str) -> None:
    looks: list[float] = []
    once = reading_weights_at_the_top(looks=looks)
    torch.manual_seed(1)
    with pytest.raises(Killed):
        once(tmp_path, False, Killer(5))
    if start == "gone":
        (tmp_path / "checkpoint_epoch_0.pt").unlink()
    elif start == "of another training":
        handler = CheckpointHandler(tmp_path, install_signal_handlers=False)
        content = handler.load_checkpoint(epoch=0)
        assert content is not None
        content["history"][0]["loss"] = 1.0  # that epoch was trained another time, otherwise
        handler.save_checkpoint(**content)
    once(tmp_path, True, Killer(None))
    assert len(looks) == 4, "at 0 and 1, and after the resume at 1 and 2"
    assert (looks[2] == looks[1]) is (start == "there"), "else it is that of the interruption"


def test_a_decision_by_the_users_state_is_taken_again_as_it_was_at_first(tmp_path: Path) -> None:
    def once(folder: Path, resume: bool, after_step: Killer) -> Any:
        first, second = nn.Linear(4, 4), nn.Linear(4, 1)
        first.requires_grad_(False)
        model = nn.Sequential(first, second)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        state = {"epochs": 0}
        for epoch in training.epochs(
            3, model=model, optimizer=optimizer, state=state, checkpoint_dir=folder, resume=resume,
            every=ALWAYS,
        ):  # fmt: skip
            state["epochs"] += 1
            first.requires_grad_(state["epochs"] == 2)
            for x, y in epoch.steps(list(zip(X.split(16), Y.split(16), strict=True))):
                optimizer.zero_grad()
                ((model(x) - y) ** 2).mean().backward()
                optimizer.step()
                after_step()
        return weights(model)

    check_all_kills(once, tmp_path)


def test_a_pass_left_by_a_break_is_done_and_the_code_after_it_runs_as_it_did(tmp_path: Path) -> None:
    def once(folder: Path, resume: bool, after_step: Killer) -> Any:
        state: dict[str, Any] = {"seen": []}
        loader = DataLoader(TensorDataset(X), 8, shuffle=True)
        for epoch in training.epochs(2, state=state, checkpoint_dir=folder, resume=resume, every=ALWAYS):
            for number in range(3):
                state["seen"].append((number, random.random()))
                for (x,) in epoch.steps(loader):
                    state["seen"].append((x[0, 0].item(), random.random()))
                    after_step()
                    if random.random() < 0.3:
                        break
        return state["seen"]

    check_all_kills(once, tmp_path)


def test_a_pass_that_does_not_come_again_is_told_and_what_was_saved_is_kept(tmp_path: Path) -> None:
    def once(folder: Path, resume: bool, passes: int, killer: Killer) -> Any:
        state = {"n": 0}
        for epoch in training.epochs(1, state=state, checkpoint_dir=folder, resume=resume, every=ALWAYS):
            for _ in range(passes):
                for _ in epoch.steps(range(3)):
                    state["n"] += 1
                    killer()
        return state["n"]

    with pytest.raises(Killed):
        once(tmp_path, False, 2, Killer(6))
    with pytest.warns(RuntimeWarning, match="pass 2 over batches, which did not come again"):
        assert once(tmp_path, True, 1, Killer(None)) == 5


def test_keys_that_an_edited_notebook_adds_to_its_state_stay(tmp_path: Path) -> None:
    def once(resume: bool, state: dict[str, Any], killer: Killer) -> Any:
        for epoch in training.epochs(1, state=state, checkpoint_dir=tmp_path, resume=resume, every=ALWAYS):
            for _ in epoch.steps(range(3)):
                state["n"] += state.get("new", 0)
                killer()
        return state

    with pytest.raises(Killed):
        once(False, {"n": 0}, Killer(2))
    assert once(True, {"n": 0, "new": 5}, Killer(None)) == {"n": 10, "new": 5}


# --- two passes at once ----------------------------------------------------------------------------------


def test_two_passes_side_by_side_are_refused_with_the_way_to_do_it() -> None:
    for epoch in training.epochs(1):
        with pytest.raises(UsageError, match=r"epoch\.steps\(zip\(a, b\)\)"):
            list(zip(epoch.steps([1, 2]), epoch.steps([3, 4]), strict=True))


def test_loaders_zipped_into_one_pass_go_on_in_its_middle(tmp_path: Path) -> None:
    def once(folder: Path, resume: bool, after_step: Killer) -> Any:
        state: dict[str, Any] = {"seen": []}
        a, b = (DataLoader(TensorDataset(X), 16, shuffle=True) for _ in range(2))
        for epoch in training.epochs(2, state=state, checkpoint_dir=folder, resume=resume, every=ALWAYS):
            for (x,), (y,) in epoch.steps(zip(a, b, strict=True)):
                state["seen"].append((x[0, 0].item(), y[0, 0].item(), torch.rand(1).item()))
                after_step()
        return state["seen"]

    check_all_kills(once, tmp_path)


def test_a_validation_within_the_loop_over_batches_is_part_of_its_step(tmp_path: Path) -> None:
    def once(folder: Path, resume: bool, after_step: Killer) -> Any:
        state: dict[str, Any] = {"seen": []}
        for epoch in training.epochs(2, state=state, checkpoint_dir=folder, resume=resume, every=ALWAYS):
            for number in epoch.steps(range(4)):
                if number % 2:
                    state["seen"] += [random.random() for _ in epoch.steps(range(2))]
                after_step()
        return state["seen"]

    check_all_kills(once, tmp_path)


# --- loaders and cells -----------------------------------------------------------------------------------


def test_a_loader_changed_between_two_epochs_is_taken_as_it_is_now() -> None:
    loader = DataLoader(TensorDataset(X), 32, collate_fn=lambda samples: ("one", len(samples)))
    seen = []
    for epoch in training.epochs(2):
        if epoch == 1:
            loader.collate_fn = lambda samples: ("two", len(samples))
        seen += list(epoch.steps(loader))
    assert seen == [("one", 32)] * 2 + [("two", 32)] * 2


CELLS = """
import sys
from IPython.core.interactiveshell import InteractiveShell

shell = InteractiveShell.instance()
shell.run_cell('''
import os, signal
from grd.experiment import CheckpointHandler, training
from grd.experiment.resumable_loader import ResumableLoader
epochs = training.epochs(5, state={}, checkpoint_dir=os.environ["FOLDER"], every=100)
steps = next(epochs).steps(range(9))
next(steps)
''')
ended = shell.run_cell('''
next(steps)
os.kill(os.getpid(), signal.SIGTERM)
next(steps)
''')
print(type(ended.error_in_exec).__name__, file=sys.stderr)
"""


def test_a_training_begun_in_one_cell_still_saves_on_sigterm_in_the_next(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CELLS],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "FOLDER": str(tmp_path / "c"),
            "IPYTHONDIR": str(tmp_path / "ipython"),
        },
        capture_output=True,
        text=True,
    )
    assert done.stderr.strip().endswith("ExperimentInterrupted"), done
    assert (tmp_path / "c" / "checkpoint_epoch_0_step_2.pt").exists()


# --- loaders that keep a state from pass to pass ----------------------------------------------------------


class Counting:
    """What a sampler, a batch sampler and a dataset have in common here: each pass is another order."""

    def __init__(self, batches: bool = False) -> None:
        self.passes, self.batches = 0, batches

    def __len__(self) -> int:
        return 3 if self.batches else 6

    def __iter__(self) -> Iterator[Any]:
        order = list(range(6))
        random.Random(self.passes).shuffle(order)
        self.passes += 1
        return iter([order[:2], order[2:4], order[4:]] if self.batches else order)

    def state_dict(self) -> dict[str, Any]:
        return {"passes": self.passes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.passes = state["passes"]


class CountingStream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    def __init__(self) -> None:
        self.passes, self.at = 0, 0

    def __iter__(self) -> Iterator[int]:
        order = list(range(6))
        random.Random(self.passes).shuffle(order)
        while self.at < 6:
            self.at += 1
            yield order[self.at - 1]
        self.passes, self.at = self.passes + 1, 0

    def state_dict(self) -> dict[str, Any]:
        return {"passes": self.passes, "at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.passes, self.at = state["passes"], state["at"]


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("kind", ["sampler", "batch sampler", "stream"])
def test_what_a_loader_keeps_from_pass_to_pass_comes_back_at_an_epochs_end_too(
    tmp_path: Path, kind: str, passes: int
) -> None:
    def once(folder: Path, resume: bool, after_step: Killer) -> Any:
        data = torch.arange(6)
        loader: Any
        if kind == "sampler":
            loader = DataLoader(data, 2, sampler=Counting())  # type: ignore[arg-type]
        elif kind == "batch sampler":
            loader = DataLoader(data, batch_sampler=Counting(batches=True))  # type: ignore[arg-type]
        else:
            loader = DataLoader(CountingStream(), 2)
        state: dict[str, Any] = {"seen": []}
        for epoch in training.epochs(3, state=state, checkpoint_dir=folder, resume=resume, every=ALWAYS):
            for _ in range(passes):
                for batch in epoch.steps(loader):
                    state["seen"].append(batch.tolist())
                    after_step()
        return state["seen"]

    check_all_kills(once, tmp_path)


@pytest.mark.parametrize("taken", range(1, 10))
def test_a_frameworks_loader_goes_on_with_what_its_sampler_has_kept(taken: int) -> None:
    def passes(loader: ResumableLoader) -> Iterator[list[int]]:
        while True:
            for batch in loader:
                yield batch.tolist()

    def made() -> ResumableLoader:
        return ResumableLoader(DataLoader(torch.arange(6), 2, sampler=Counting()), 5)  # type: ignore[arg-type]

    whole = list(itertools.islice(passes(made()), 12))
    first, second = made(), made()
    batches = passes(first)
    for _ in range(taken):
        next(batches)
    second.load_state_dict(first.state_dict())
    assert list(itertools.islice(passes(second), 12 - taken)) == whole[taken:]


# --- gradients -------------------------------------------------------------------------------------------


def gathering(batches: int) -> Once:
    """A training that takes a step every ``batches`` batches, also across the end of an epoch."""

    def once(folder: Path, resume: bool, after_step: Killer) -> Any:
        model = nn.Linear(4, 1)
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        state = {"n": 0}
        loader = DataLoader(TensorDataset(X, Y), 16, shuffle=True)
        for epoch in training.epochs(
            2, model=model, optimizer=optimizer, state=state, checkpoint_dir=folder, resume=resume,
            every=ALWAYS,
        ):  # fmt: skip
            for x, y in epoch.steps(loader):
                ((model(x) - y) ** 2).mean().backward()
                state["n"] += 1
                if state["n"] % batches == 0:
                    optimizer.step()
                    optimizer.zero_grad()
                after_step()
            for (x,) in epoch.steps([(X,)] * 2):
                model(x)
                after_step()
        return weights(model)

    return once


def one_model(optimizer_of: Callable[..., Any], batch: Callable[[int, Any, Any], None]) -> Any:
    """Two epochs of one linear model: ``batch(step, optimizer, backward)`` is what becomes of each batch."""

    def once(folder: Path, resume: bool, after_step: Killer) -> Any:
        model = nn.Linear(4, 1)
        optimizer = optimizer_of(model.parameters(), 0.001)
        for epoch in training.epochs(
            2, model=model, optimizer=optimizer, checkpoint_dir=folder, resume=resume, every=ALWAYS
        ):
            for x, y in epoch.steps(DataLoader(TensorDataset(X, Y), 16, shuffle=True)):
                batch(epoch.step, optimizer, ((model(x) - y) ** 2).mean().backward)
                after_step()
        return weights(model)

    return once


def test_gradients_gathered_over_several_batches_are_not_lost(tmp_path: Path) -> None:
    check_all_kills(gathering(3), tmp_path)


def test_gradients_that_come_in_after_the_step_of_the_same_batch_are_not_lost(tmp_path: Path) -> None:
    def step_at_top(step: int, optimizer: Any, backward: Any) -> None:
        if step % 2 == 0:
            optimizer.step()
            optimizer.zero_grad()
        backward()

    def adversarial(folder: Path, resume: bool, after_step: Killer) -> Any:
        """The generator's loss leaves gradients in the critic, which its next step uses."""
        models = {"generator": nn.Linear(2, 4), "critic": nn.Linear(4, 1)}
        optimizers = {name: torch.optim.SGD(model.parameters(), 0.1) for name, model in models.items()}
        for epoch in training.epochs(
            2, model=models, optimizer=optimizers, checkpoint_dir=folder, resume=resume, every=ALWAYS
        ):
            for (x,) in epoch.steps(DataLoader(TensorDataset(X), 16, shuffle=True)):
                made = models["generator"](x[:, :2])
                loss = (models["critic"](made.detach()) ** 2 + (models["critic"](x) - 1) ** 2).mean()
                loss.backward()
                optimizers["critic"].step()
                optimizers["critic"].zero_grad()
                (models["critic"](made) - 1).square().mean().backward()
                optimizers["generator"].step()
                optimizers["generator"].zero_grad()
                after_step()
        return [weights(model) for model in models.values()]

    check_all_kills(one_model(torch.optim.Adam, step_at_top), tmp_path / "top")
    check_all_kills(adversarial, tmp_path / "adversarial")


@pytest.mark.parametrize("zeroed_every", [0, 2])
def test_gradients_that_nobody_resets_after_a_step_are_not_lost(tmp_path: Path, zeroed_every: int) -> None:
    def seldom_zeroed(step: int, optimizer: Any, backward: Any) -> None:
        if zeroed_every and step % zeroed_every == 0:
            optimizer.zero_grad()
        backward()
        optimizer.step()

    check_all_kills(one_model(torch.optim.SGD, seldom_zeroed), tmp_path)


def test_gradients_that_are_used_are_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[bool] = []
    save = CheckpointHandler.save_checkpoint

    def seen(*arguments: Any, **options: Any) -> Path:
        saved.append("gradients" in options)
        return save(*arguments, **options)

    monkeypatch.setattr(CheckpointHandler, "save_checkpoint", seen)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for epoch in training.epochs(2, model=model, optimizer=optimizer, checkpoint_dir=tmp_path, every=ALWAYS):
        for x, y in epoch.steps([(X, Y)] * 3):
            optimizer.zero_grad()
            ((model(x) - y) ** 2).mean().backward()
            optimizer.step()
        for x, _ in epoch.steps([(X, Y)] * 3):
            model(x)
    assert len(saved) > 8 and sum(saved) <= 1, "after the first step nobody knows yet"
    assert not optimizer._optimizer_step_post_hooks


# --- what modules hold beside their state ------------------------------------------------------------------


def test_train_mode_and_frozen_layers_come_back_as_the_training_has_left_them(tmp_path: Path) -> None:
    def once(folder: Path, resume: bool, after_step: Killer) -> Any:
        layers = nn.ModuleList([nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 1)])
        model = nn.Sequential(*layers)
        layers[0].requires_grad_(False)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for epoch in training.epochs(
            3, model=model, optimizer=optimizer, checkpoint_dir=folder, resume=resume, every=ALWAYS
        ):
            if epoch == 1:
                layers[0].requires_grad_(True)
            for x, y in epoch.steps([(X, Y)] * 2):
                optimizer.zero_grad()
                ((model(x) - y) ** 2).mean().backward()
                optimizer.step()
                after_step()
            model.eval()  # and never back: the next epochs train so
            for _ in epoch.steps([X]):
                after_step()
        return weights(model), model.training, layers[0].weight.requires_grad

    check_all_kills(once, tmp_path)


def test_a_changed_notebook_may_freeze_what_the_training_never_touched(tmp_path: Path) -> None:
    for frozen in (False, True):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
        model[0].requires_grad_(not frozen)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in training.epochs(
            1 + frozen, model=model, optimizer=optimizer, checkpoint_dir=tmp_path, resume=frozen, every=1
        ):
            model[1].requires_grad_(False)
        assert [layer.weight.requires_grad for layer in model] == [not frozen, False]


# --- two trainings ---------------------------------------------------------------------------------------


def test_two_trainings_by_hand_in_one_folder_are_told_at_the_start_and_at_the_resume(tmp_path: Path) -> None:
    code = (
        "import os\nfrom grd.experiment import training\n"
        "for number in (1, 2):\n"
        "    for epoch in training.epochs(2, checkpoint_dir=os.environ['FOLDER'], resume=RESUME): pass\n"
    )
    told = []
    for resume in ("False", "True"):
        done = subprocess.run(
            [sys.executable, "-c", code.replace("RESUME", resume)],
            env={**os.environ, "PYTHONPATH": str(ROOT), "FOLDER": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        )
        told.append(done.stderr)
    assert told[0].count("give each a checkpoint_dir of its own") == 1
    assert told[1].count("is of the second training") == 1


def test_a_training_resumed_by_hand_in_the_same_process_is_the_same_one(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for epochs in (1, 2, 3):
            list(training.epochs(epochs, checkpoint_dir=tmp_path, resume=True))
    assert list(training.epochs(3, checkpoint_dir=tmp_path, resume=True)) == []
