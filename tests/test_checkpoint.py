"""Checkpoints: whole or absent, verified before they are trusted, and owned by one attempt."""

from __future__ import annotations

import collections
import datetime
import enum
import io
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from conftest import cannot_be_had

from grd.errors import (
    CheckpointCorrupt,
    CheckpointError,
    CheckpointFenced,
    CheckpointRefused,
    UsageError,
)
from grd.experiment import CheckpointHandler, set_aside
from grd.experiment.manifest import read_manifest

ROOT = Path(__file__).resolve().parents[1]


pytestmark = pytest.mark.usefixtures("by_hand")


def handler(folder: Path, **options: Any) -> CheckpointHandler:
    return CheckpointHandler(folder, install_signal_handlers=False, **options)


def as_another_process(folder: Path) -> None:
    """Make what is in the folder look like the work of an earlier process."""
    path = folder / "manifest.jsonl"
    lines = [{**json.loads(line), "process": "1-gone"} for line in path.read_text().splitlines()]
    for line in lines:
        line.pop("line_xxh3_64")
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)


# --- what is saved comes back ------------------------------------------------------------------------


def test_model_and_optimizer_objects_come_back_equal(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    path = handler(tmp_path).save_checkpoint(7, model, optimizer, torch.tensor(0.25), {"note": "x"})
    assert path == tmp_path / "checkpoint_epoch_7.pt"

    other = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    other_optimizer = torch.optim.AdamW(other.parameters(), lr=0.5)
    loaded = handler(tmp_path).load_checkpoint(other, other_optimizer)
    assert loaded is not None
    assert (loaded["epoch"], loaded["loss"], loaded["metadata"]) == (7, 0.25, {"note": "x"})
    back = other.state_dict()
    assert all(torch.equal(tensor, back[name]) for name, tensor in model.state_dict().items())
    assert str(optimizer.state_dict()) == str(other_optimizer.state_dict())


def test_the_files_are_plain_torch_files_and_latest_is_no_second_copy(tmp_path: Path) -> None:
    path = handler(tmp_path).save_checkpoint(3, {"w": torch.arange(4)}, {"lr": 0.1}, 0.5)
    plain = torch.load(path, weights_only=True)
    assert set(plain) >= {"epoch", "model_state", "optimizer_state", "loss", "metadata"}
    assert (tmp_path / "checkpoint_latest.pt").samefile(path)


def test_both_spellings_of_the_states_are_read(tmp_path: Path) -> None:
    content = {"epoch": 4, "model_state_dict": {"w": torch.ones(2)}, "optimizer_state_dict": {"lr": 1}}
    torch.save(content, tmp_path / "checkpoint_epoch_4.pt")
    loaded = handler(tmp_path).load_checkpoint()
    assert loaded is not None and loaded["epoch"] == 4
    assert torch.equal(loaded["model_state"]["w"], torch.ones(2)) and loaded["optimizer_state"] == {"lr": 1}
    assert loaded["loss"] is None and loaded["metadata"] == {}


def test_a_lone_latest_file_from_elsewhere_is_used(tmp_path: Path) -> None:
    torch.save({"epoch": 9, "model_state": {}}, tmp_path / "checkpoint_latest.pt")
    loaded = handler(tmp_path).load_checkpoint()
    assert loaded is not None and loaded["epoch"] == 9
    assert handler(tmp_path).get_resumability_hints()["next_epoch"] == 10


def test_arrays_sets_and_odd_keys_come_back_as_they_were(tmp_path: Path) -> None:
    state = {
        "array": np.arange(6, dtype=np.float32).reshape(2, 3),
        "empty": np.zeros((0, 2)),
        "scalar": np.float64(1.5),
        "set": {1, 2},
        1: "one",
        "big": 2**100,
        "__grd__": "a key like ours",
        "python": random.getstate(),
    }
    handler(tmp_path).save_checkpoint(0, {}, {}, 0.0, state=state)
    loaded = handler(tmp_path).load_checkpoint()
    assert loaded is not None
    back = loaded["state"]
    assert back["array"].dtype == np.float32 and (back["array"] == state["array"]).all()
    assert back["empty"].shape == (0, 2)
    assert {k: back[k] for k in ("scalar", "set", 1, "big", "__grd__", "python")} == {
        k: state[k] for k in ("scalar", "set", 1, "big", "__grd__", "python")
    }


class Colour(enum.IntEnum):
    RED = 1


class Named(enum.StrEnum):
    A = "a"


def counted() -> collections.OrderedDict[str, Any]:
    value = collections.OrderedDict(w=1)
    value.note = object()  # type: ignore[attr-defined]
    return value


def noted(tensor: torch.Tensor) -> torch.Tensor:
    tensor.note = object()  # type: ignore[attr-defined]
    return tensor


KEPT = [
    np.float32(0.1), np.float16(0.1), np.int64(3), np.bool_(True), np.str_("x"), np.datetime64("2026-01-02"),
    bytearray(b"ab"), collections.defaultdict(int, a=1), collections.defaultdict(list, a=[np.float32(1)]),
    collections.Counter(a=np.int64(2)), collections.OrderedDict([(np.int64(2), 1), ("b", {1})]),
    10**700, 10**5000, -(2**2041), {10**700: 1},
]  # fmt: skip
REFUSED = [
    Colour.RED, Named.A, counted(), collections.defaultdict(lambda: 1), collections.deque([1]),
    collections.namedtuple("Point", "x")(1),
]  # fmt: skip


@pytest.mark.parametrize("async_save", [False, True])
@pytest.mark.parametrize("value", KEPT, ids=lambda value: type(value).__name__)
def test_values_come_back_with_their_types(tmp_path: Path, value: Any, async_save: bool) -> None:
    keeper = handler(tmp_path, async_save=async_save)
    keeper.save_checkpoint(0, state={"k": value})
    loaded = keeper.load_checkpoint()
    assert loaded is not None
    back = loaded["state"]["k"]
    assert type(back) is type(value) and bool(back == value)
    if isinstance(value, collections.defaultdict):
        assert back.default_factory is value.default_factory
    if isinstance(value, dict):
        assert [type(part) for pair in back.items() for part in pair] == [
            type(part) for pair in value.items() for part in pair
        ]


@pytest.mark.parametrize("async_save", [False, True])
@pytest.mark.parametrize("value", REFUSED, ids=lambda value: type(value).__name__)
def test_values_that_would_come_back_changed_are_refused_at_save_with_their_key(
    tmp_path: Path, value: Any, async_save: bool
) -> None:
    keeper = handler(tmp_path, async_save=async_save)
    with pytest.raises(CheckpointRefused, match=r"cannot store state\.k\b"):
        keeper.save_checkpoint(0, state={"k": value})
    assert not list(tmp_path.glob("*.pt"))


@pytest.mark.parametrize("async_save", [False, True])
@pytest.mark.parametrize("kind", [torch.Tensor, torch.nn.Parameter])
def test_attributes_of_tensors_are_left_behind(tmp_path: Path, kind: Any, async_save: bool) -> None:
    keeper = handler(tmp_path, async_save=async_save)
    tensor = noted(torch.nn.Parameter(torch.ones(2)) if kind is torch.nn.Parameter else torch.ones(2))
    keeper.save_checkpoint(0, state={"k": tensor})
    loaded = keeper.load_checkpoint()
    assert loaded is not None and type(loaded["state"]["k"]) is kind and not vars(loaded["state"]["k"])
    assert loaded["state"]["k"].requires_grad == tensor.requires_grad and hasattr(tensor, "note")


def test_too_deep_and_endless_containers_are_refused_with_their_key(tmp_path: Path) -> None:
    deep: dict[str, Any] = {}
    inner = deep
    for _ in range(900):
        inner["a"] = inner = {}
    endless: dict[str, Any] = {}
    endless["m"] = endless
    keeper = handler(tmp_path)
    for value in (deep, endless):
        with pytest.raises(CheckpointRefused, match=r"cannot store state\.[am]\..*200 containers"):
            keeper.save_checkpoint(0, state=value)
        with pytest.raises(CheckpointRefused, match=r"cannot store metadata\.[am]\..*200 containers"):
            keeper.save_checkpoint(0, {}, {}, 0.0, value)


def test_a_file_of_the_version_before_comes_back_as_it_did(tmp_path: Path) -> None:
    """It wrote arrays, sets and odd keys so, and had plain values for the rest."""
    stream = io.BytesIO()
    np.save(stream, np.arange(3))
    marked = {
        "array": {
            "__grd__": "npy",
            "data": torch.frombuffer(bytearray(stream.getvalue()), dtype=torch.uint8),
        },
        "set": {"__grd__": "set", "items": [1, 2]},
        "odd": {"__grd__": "dict", "items": [["__grd__", 1], [{"__grd__": "frozenset", "items": [1]}, 2]]},
        "scalar": 0.5,
    }
    torch.save({"epoch": 0, "state": marked}, tmp_path / "checkpoint_epoch_0.pt")
    loaded = handler(tmp_path).load_checkpoint()
    assert loaded is not None
    back = loaded["state"]
    assert back["array"].tolist() == [0, 1, 2] and back["set"] == {1, 2} and back["scalar"] == 0.5
    assert back["odd"] == {"__grd__": 1, frozenset({1}): 2}


def test_metadata_becomes_json_when_it_is_saved(tmp_path: Path) -> None:
    metadata = {
        "path": Path("/data"),
        "day": datetime.date(2026, 1, 2),
        "number": np.float64(0.5),
        "array": np.array([1, 2]),
        "tensor": torch.tensor([1.0]),
        "nan": float("nan"),
        "tuple": (1, 2),
    }
    handler(tmp_path).save_checkpoint(0, {}, {}, 0.0, metadata)
    loaded = handler(tmp_path).load_checkpoint()
    assert loaded is not None
    assert loaded["metadata"] == {
        "path": "/data", "day": "2026-01-02", "number": 0.5, "array": [1, 2], "tensor": [1.0], "nan": None,
        "tuple": [1, 2],
    }  # fmt: skip
    json.dumps(loaded["metadata"])


def test_what_could_not_be_loaded_is_refused_at_save_with_its_key(tmp_path: Path) -> None:
    keeper = handler(tmp_path)
    with pytest.raises(CheckpointRefused, match=r"model_state\.layers\[1\]\.act"):
        keeper.save_checkpoint(0, {"layers": [1, {"act": print}]}, {}, 0.0)
    with pytest.raises(CheckpointRefused, match=r"metadata\.thing"):
        keeper.save_checkpoint(0, {}, {}, 0.0, {"thing": object()})
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(CheckpointRefused):
        keeper.save_checkpoint(0, {"loop": loop}, {}, 0.0)
    assert not list(tmp_path.glob("*.pt")) and not list(tmp_path.glob(".*"))


def test_a_foreign_file_that_wants_code_is_refused(tmp_path: Path) -> None:
    torch.save({"epoch": 1, "model_state": Path("/x")}, tmp_path / "checkpoint_epoch_1.pt")
    with pytest.raises(CheckpointRefused, match="code"):
        handler(tmp_path).load_checkpoint()
    with pytest.raises(CheckpointRefused):
        handler(tmp_path).load_checkpoint(allow_pickle=True)


def test_objects_need_allow_pickle_on_both_sides_and_our_own_manifest(tmp_path: Path) -> None:
    keeper = handler(tmp_path)
    keeper.save_checkpoint(0, {}, {}, 0.0, state={"zone": datetime.timedelta(days=2)}, allow_pickle=True)
    with pytest.raises(CheckpointRefused, match=r"state\.zone"):
        keeper.load_checkpoint()
    loaded = keeper.load_checkpoint(allow_pickle=True)
    assert loaded is not None and loaded["state"]["zone"] == datetime.timedelta(days=2)
    (tmp_path / "manifest.jsonl").unlink()
    with pytest.raises(CheckpointRefused):
        keeper.load_checkpoint(allow_pickle=True)


def test_a_chosen_epoch_can_be_loaded(tmp_path: Path) -> None:
    keeper = handler(tmp_path)
    for epoch in range(4):
        keeper.save_checkpoint(epoch, {"n": epoch}, {}, 0.0)
    loaded = keeper.load_checkpoint(epoch=2)
    assert loaded is not None and loaded["model_state"] == {"n": 2}
    assert keeper.load_checkpoint(epoch=17) is None


# --- hints and names ------------------------------------------------------------------------------------


def test_hints_load_and_find_agree(tmp_path: Path) -> None:
    keeper = handler(tmp_path, total_epochs=10)
    empty = keeper.get_resumability_hints()
    assert (empty["has_checkpoint"], empty["latest_epoch"], empty["next_epoch"]) == (False, None, 0)
    assert keeper.load_checkpoint() is None and keeper.find_latest_checkpoint() is None
    keeper.save_checkpoint(2, {}, {}, 0.1)
    keeper.save_checkpoint(3, {}, {}, 0.1, step=4)
    hints = keeper.get_resumability_hints()
    assert hints["checkpoint_path"] == tmp_path / "checkpoint_epoch_3_step_4.pt"
    assert hints["checkpoint_path"] == keeper.find_latest_checkpoint()
    assert (hints["latest_epoch"], hints["step"], hints["next_epoch"]) == (2, 4, 3)
    assert hints["estimated_remaining_epochs"] == 7 and hints["valid"]
    loaded = keeper.load_checkpoint()
    assert loaded is not None and (loaded["epoch"], loaded["step"]) == (2, 4)


def test_epochs_are_ordered_by_number_and_a_complete_one_follows_its_steps(tmp_path: Path) -> None:
    keeper = handler(tmp_path)
    for epoch, step in ((9, None), (10, 3), (10, None), (2, None)):
        keeper.save_checkpoint(epoch, {}, {}, 0.0, step=step)
    assert keeper.find_latest_checkpoint() == tmp_path / "checkpoint_epoch_10.pt"


def test_the_total_is_taken_from_the_metadata(tmp_path: Path) -> None:
    handler(tmp_path).save_checkpoint(2, {}, {}, 0.1, {"total_epochs": 5})
    assert handler(tmp_path).get_resumability_hints()["estimated_remaining_epochs"] == 2


def test_stray_names_are_ignored(tmp_path: Path) -> None:
    handler(tmp_path).save_checkpoint(1, {}, {}, 0.0)
    for name in (
        "checkpoint_epoch_best.pt",
        "checkpoint_epoch_99.pt.bak",
        "notes.txt",
        "checkpoint_epoch_.pt",
    ):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "checkpoint_epoch_50.pt").mkdir()
    assert handler(tmp_path).find_latest_checkpoint() == tmp_path / "checkpoint_epoch_1.pt"


def test_an_emergency_checkpoint_before_the_first_epoch_can_be_resumed(tmp_path: Path) -> None:
    handler(tmp_path).save_checkpoint(-1, {"w": 1}, {}, None, {"interrupted": True})
    assert handler(tmp_path).get_resumability_hints()["next_epoch"] == 0


def test_a_read_only_folder_can_be_read(tmp_path: Path) -> None:
    handler(tmp_path).save_checkpoint(1, {}, {}, 0.0)
    tmp_path.chmod(0o555)
    try:
        loaded = handler(tmp_path).load_checkpoint()
    finally:
        tmp_path.chmod(0o755)
    assert loaded is not None and loaded["epoch"] == 1


# --- damage -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_versions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    keeper = handler(folder)
    for epoch in (0, 1):
        keeper.save_checkpoint(epoch, {"w": torch.full((50, 50), float(epoch))}, {"lr": 0.1}, 0.5)
    return folder


def load_after_damage(folder: Path, damaged: bytes) -> tuple[dict[str, Any] | None, list[str]]:
    newest = folder / "checkpoint_epoch_1.pt"
    good = newest.read_bytes()
    newest.write_bytes(damaged)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            reader = handler(folder)
            loaded = reader.load_checkpoint()
            hints, found = reader.get_resumability_hints(), reader.find_latest_checkpoint()
        assert found == folder / "checkpoint_epoch_0.pt" and hints["latest_epoch"] == 0
        return loaded, [str(item.message) for item in caught]
    finally:
        newest.write_bytes(good)


def test_any_of_200_flipped_bits_is_detected_and_the_older_version_is_used(two_versions: Path) -> None:
    dice = random.Random(1)
    good = (two_versions / "checkpoint_epoch_1.pt").read_bytes()
    for _ in range(200):
        bad = bytearray(good)
        bad[dice.randrange(len(bad))] ^= 1 << dice.randrange(8)
        loaded, messages = load_after_damage(two_versions, bytes(bad))
        assert loaded is not None and loaded["epoch"] == 0
        assert "checkpoint_epoch_1.pt is damaged" in messages[0]
        assert "checkpoint_epoch_0.pt" in messages[0]


def test_every_truncation_and_a_zeroed_page_is_detected(two_versions: Path) -> None:
    good = (two_versions / "checkpoint_epoch_1.pt").read_bytes()
    cuts = [good[:size] for size in range(0, len(good), max(1, len(good) // 60))]
    for bad in [*cuts, good[:4096] + bytes(4096) + good[8192:], good + b"\0"]:
        loaded, _ = load_after_damage(two_versions, bad)
        assert loaded is not None and loaded["epoch"] == 0


def everything_said(folder: Path) -> tuple[tuple[Any, Any, Any], list[str]]:
    """Epochs according to load, hints and find (by the file's name), and what was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = handler(folder).load_checkpoint()
        hints, path = handler(folder).get_resumability_hints(), handler(folder).find_latest_checkpoint()
    assert hints["checkpoint_path"] == path and hints["valid"] == hints["has_checkpoint"] == (
        path is not None
    )
    said = (None if loaded is None else loaded["epoch"], hints["latest_epoch"], path and path.name)
    return said, [str(item.message) for item in caught]


@pytest.mark.parametrize("lineage", [1, 2])
def test_a_flipped_bit_in_the_manifest_never_makes_an_older_epoch_win(tmp_path: Path, lineage: int) -> None:
    keeper = handler(tmp_path)
    if lineage == 2:
        keeper.save_checkpoint(7, {"w": torch.ones(3)}, {}, 0.5)
        keeper.begin_lineage()
    for epoch in range(3):
        keeper.save_checkpoint(epoch, {"w": torch.full((3,), float(epoch))}, {}, 0.5)
    manifest = tmp_path / "manifest.jsonl"
    good = manifest.read_bytes()
    newest = good.index(b'{"name":"checkpoint_epoch_2.pt"')
    dice = random.Random(4)
    for position in [dice.randrange(len(good)) for _ in range(40)] + [newest, newest - 1, len(good) - 1]:
        bad = bytearray(good)
        bad[position] ^= 1 << dice.randrange(8)
        manifest.write_bytes(bad)
        said, messages = everything_said(tmp_path)
        assert said == (2, 2, "checkpoint_epoch_2.pt"), bytes(bad[position - 20 : position + 5])
        assert any("manifest.jsonl is damaged" in message for message in messages)


def test_after_damage_to_the_manifest_a_new_lineage_still_wins(tmp_path: Path) -> None:
    keeper = handler(tmp_path)
    keeper.save_checkpoint(0, {}, {}, 0.0)
    keeper.begin_lineage()
    keeper.save_checkpoint(5, {}, {}, 0.0)
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_bytes(manifest.read_bytes().replace(b'"epoch":5', b'"epoch":4'))
    keeper.begin_lineage()
    keeper.save_checkpoint(1, {}, {}, 0.0)
    assert everything_said(tmp_path)[0] == (1, 1, "checkpoint_epoch_1.pt")


def test_a_damaged_line_does_not_make_a_damaged_file_good(tmp_path: Path) -> None:
    for epoch in range(2):
        handler(tmp_path).save_checkpoint(epoch, {"w": torch.ones(500)}, {}, 0.0)
    manifest, newest = tmp_path / "manifest.jsonl", tmp_path / "checkpoint_epoch_1.pt"
    manifest.write_bytes(manifest.read_bytes().replace(b'"epoch":1', b'"epoch":3'))
    bad = bytearray(newest.read_bytes())
    bad[len(bad) // 2] ^= 1
    (tmp_path / "checkpoint_latest.pt").unlink()
    newest.write_bytes(bad)
    assert everything_said(tmp_path)[0] == (0, 0, "checkpoint_epoch_0.pt")


def test_a_manifest_of_the_version_before_has_no_checksums_and_is_good(tmp_path: Path) -> None:
    handler(tmp_path).save_checkpoint(3, {}, {}, 0.0)
    manifest = tmp_path / "manifest.jsonl"
    record = json.loads(manifest.read_text())
    record.pop("line_xxh3_64")
    manifest.write_text(json.dumps(record) + "\n")
    assert everything_said(tmp_path) == ((3, 3, "checkpoint_epoch_3.pt"), [])
    manifest.write_text(
        manifest.read_text() + '{"name":"checkpoint_epoch_3.pt","size":1e999}\n' + "[" * 10_000
    )
    said, messages = everything_said(tmp_path)
    assert said == (3, 3, "checkpoint_epoch_3.pt")
    assert sum("manifest.jsonl is damaged" in message for message in messages) == 2 * 3


def test_a_later_epoch_from_elsewhere_is_passed_over_with_a_warning(tmp_path: Path) -> None:
    handler(tmp_path).save_checkpoint(3, {}, {}, 0.0)
    torch.save({"epoch": 9}, tmp_path / "checkpoint_epoch_9.pt")
    said, messages = everything_said(tmp_path)
    assert said == (3, 3, "checkpoint_epoch_3.pt")
    assert all("checkpoint_epoch_9.pt looks newer" in message for message in messages) and len(messages) == 3


def unopenable(path: Path) -> None:
    """A zip whose checksums hold, in which torch finds nothing."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "x")


NO_CHECKPOINTS = {
    "a zip of text": unopenable,
    "a list": lambda path: torch.save([1], path),
    "no JSON": lambda path: zipfile.ZipFile(path, "w").writestr("grd-state.json", "{"),
}


@pytest.mark.parametrize("name", ["checkpoint_epoch_3.pt", "checkpoint_latest.pt"])
@pytest.mark.parametrize("kind", NO_CHECKPOINTS)
def test_load_hints_and_find_pass_over_what_is_no_checkpoint(tmp_path: Path, kind: str, name: str) -> None:
    NO_CHECKPOINTS[kind](tmp_path / name)
    said, messages = everything_said(tmp_path)
    assert said == (None, None, None) and len(messages) == 3 and all("passed over" in m for m in messages)
    torch.save({"epoch": 1}, tmp_path / "checkpoint_epoch_1.pt")
    assert everything_said(tmp_path)[0] == (1, 1, "checkpoint_epoch_1.pt")


def test_load_hints_and_find_agree_on_an_epoch_that_is_no_number(tmp_path: Path) -> None:
    torch.save({"epoch": "best"}, tmp_path / "checkpoint_latest.pt")
    assert everything_said(tmp_path)[0] == (None, None, None)
    torch.save({"epoch": "best"}, tmp_path / "checkpoint_epoch_4.pt")
    assert everything_said(tmp_path)[0] == (4, 4, "checkpoint_epoch_4.pt")


@pytest.mark.parametrize("name", ["checkpoint_epoch_1.pt", "checkpoint_latest.pt"])
def test_load_hints_and_find_all_refuse_a_file_that_wants_code(tmp_path: Path, name: str) -> None:
    torch.save({"epoch": 1, "model_state": Path("/x")}, tmp_path / name)
    keeper = handler(tmp_path)
    for look in (keeper.load_checkpoint, keeper.get_resumability_hints, keeper.find_latest_checkpoint):
        with pytest.raises(CheckpointRefused, match="code"):
            look()


MISTAKES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a broken epoch": ({"epoch": 3.7}, UsageError, "epoch must be a whole number, not 3.7"),
    "no epoch": ({"epoch": None}, UsageError, "epoch must be a whole number"),
    "a text": ({"epoch": "3"}, UsageError, "epoch must be a whole number"),
    "a step below zero": ({"epoch": 3, "step": -1}, UsageError, "step must be 0 or more"),
    "no dictionary": ({"epoch": 3, "metadata": [1]}, CheckpointRefused, "metadata must be a dictionary"),
    "keys that clash": (
        {"epoch": 3, "metadata": {1: 0, "1": 0}},
        CheckpointRefused,
        "metadata: two of its keys",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told_in_words_when_saving(tmp_path: Path, mistake: str) -> None:
    arguments, kind, words = MISTAKES[mistake]
    with pytest.raises(kind, match=words):
        handler(tmp_path).save_checkpoint(**arguments)


def test_mistakes_are_told_in_words_when_a_handler_is_made(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for folder, options, words in [
        (file, {}, "is a file"),
        (file / "below", {}, "is a file"),
        (tmp_path, {"keep_bytes": "lots"}, "keep_bytes: 'lots' is no size"),
        (tmp_path, {"resume": "False"}, "resume must be"),
    ]:
        with pytest.raises(UsageError, match=words):
            handler(folder, **options)


def test_damage_in_a_foreign_file_is_found_by_its_own_checksums(tmp_path: Path) -> None:
    torch.save({"epoch": 0, "model_state": {"w": torch.ones(2000)}}, tmp_path / "checkpoint_epoch_0.pt")
    path = tmp_path / "checkpoint_epoch_1.pt"
    torch.save({"epoch": 1, "model_state": {"w": torch.ones(2000)}}, path)
    bad = bytearray(path.read_bytes())
    bad[len(bad) // 2] ^= 4
    path.write_bytes(bad)
    torch.load(path, weights_only=True)  # which notices nothing
    with pytest.warns(RuntimeWarning, match="damaged"):
        loaded = handler(tmp_path).load_checkpoint()
    assert loaded is not None and loaded["epoch"] == 0


def test_a_damaged_epoch_asked_for_by_number_is_an_error_and_not_another_one(tmp_path: Path) -> None:
    keeper = handler(tmp_path)
    keeper.save_checkpoint(0, {}, {}, 0.0)
    keeper.save_checkpoint(1, {}, {}, 0.0)
    (tmp_path / "checkpoint_epoch_1.pt").write_bytes(b"")
    with pytest.warns(RuntimeWarning), pytest.raises(CheckpointCorrupt):
        keeper.load_checkpoint(epoch=1)


def test_a_removed_latest_file_changes_nothing(tmp_path: Path) -> None:
    handler(tmp_path).save_checkpoint(5, {}, {}, 0.0)
    (tmp_path / "checkpoint_latest.pt").unlink()
    loaded = handler(tmp_path).load_checkpoint()
    assert loaded is not None and loaded["epoch"] == 5


def test_a_crash_between_manifest_and_rename_keeps_the_old_file_good(tmp_path: Path) -> None:
    keeper = handler(tmp_path)
    keeper.save_checkpoint(5, {"w": 1}, {}, 0.0)
    entry = json.loads((tmp_path / "manifest.jsonl").read_text())
    entry.pop("line_xxh3_64")
    with open(tmp_path / "manifest.jsonl", "a") as stream:
        stream.write(json.dumps({**entry, "xxh3_128": "0" * 32, "lineage": 2}) + "\n")
    loaded = handler(tmp_path).load_checkpoint()
    assert loaded is not None and loaded["model_state"] == {"w": 1}


KILLED = """
import os, random, sys, time, torch
from pathlib import Path
from grd.experiment import CheckpointHandler
folder = Path(sys.argv[1])
dice = random.Random(3)
good = 0
for trial in range(30):
    inside, outside = os.pipe()
    pid = os.fork()
    if pid == 0:
        keeper = CheckpointHandler(folder, keep_bytes=40_000_000)
        first = keeper.get_resumability_hints()["next_epoch"]
        os.write(outside, b"x")
        for epoch in range(first, first + 10_000):
            keeper.save_checkpoint(epoch, {"w": torch.full((500_000,), float(epoch))}, {"lr": 0.1}, 0.5)
        os._exit(0)
    os.read(inside, 1)
    os.close(inside), os.close(outside)
    time.sleep(dice.uniform(0.0, 0.06) + (0.3 if trial == 0 else 0))
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    keeper = CheckpointHandler(folder, install_signal_handlers=False)
    loaded = keeper.load_checkpoint()
    good += loaded is not None and bool((loaded["model_state"]["w"] == loaded["epoch"]).all())
    assert not list(folder.glob(".*.tmp")), "swept"
print(good, keeper.get_resumability_hints()["next_epoch"])
"""


@pytest.mark.faults
def test_thirty_of_thirty_kills_in_back_to_back_saves_leave_a_good_checkpoint(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", KILLED, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    good, epochs = map(int, done.stdout.split())
    assert good == 30
    assert epochs > 0


FULL = """
import resource, sys, torch
from grd.experiment import CheckpointHandler
from grd.errors import CheckpointError
keeper = CheckpointHandler(sys.argv[1])
keeper.save_checkpoint(0, {"w": torch.ones(1000)}, {}, 0.0)
if sys.argv[2] == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
try:
    keeper.save_checkpoint(1, {"w": torch.ones(3_000_000)}, {}, 0.0)
except CheckpointError as error:
    print(error)
assert keeper.load_checkpoint()["epoch"] == 0
"""


FULL_IN_A_LINE = """
import resource, sys, warnings
sys.modules["torch"] = None  # the plain format does as well, and sooner
from grd.experiment import CheckpointHandler
from grd.errors import CheckpointError
warnings.simplefilter("error")
keeper = CheckpointHandler(sys.argv[1], install_signal_handlers=False)
for epoch in range(30):
    saved = keeper.save_checkpoint(epoch, {"w": epoch})
manifest = saved.parent / "manifest.jsonl"
assert manifest.stat().st_size > 2 * saved.stat().st_size
before = manifest.read_bytes()
resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, resource.RLIM_INFINITY))
try:
    keeper.save_checkpoint(30, {"w": 30})
except CheckpointError as error:
    print(error)
assert manifest.read_bytes() == before
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
keeper.save_checkpoint(31, {"w": 31})
assert keeper.load_checkpoint()["epoch"] == 31
"""


def test_half_a_line_of_the_manifest_is_taken_back(tmp_path: Path) -> None:
    done = run(FULL_IN_A_LINE.replace("sys.argv[1]", repr(str(tmp_path))))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1 and "could not be saved" in done.stdout


AT_EXIT = """
import atexit, sys
sys.modules["torch"] = None  # the plain format does as well, and sooner
import numpy
from grd.experiment import CheckpointHandler
handler = CheckpointHandler(sys.argv[1], install_signal_handlers=False)
state = numpy.arange(1_000_000, dtype="float64")  # larger than a piece, and than what is hashed beside
handler.save_checkpoint(0, {"w": state})
atexit.register(lambda: handler.save_checkpoint(1, {"w": state + 1}))
"""


def test_a_save_while_the_interpreter_ends_is_as_good_as_any(tmp_path: Path) -> None:
    """No thread can be started any more: what is hashed in one otherwise, is hashed all the same."""
    done = run(AT_EXIT.replace("sys.argv[1]", repr(str(tmp_path))))
    assert done.returncode == 0, done.stderr
    entries = read_manifest(tmp_path)
    for epoch in (0, 1):
        path = tmp_path / f"checkpoint_epoch_{epoch}.pt"
        content = path.read_bytes()
        (entry,) = entries[path.name]
        assert (
            entry.xxh3_128 == xxhash.xxh3_128(content).hexdigest() and entry.size == len(content) > 8_000_000
        )


def test_a_file_size_limit_leaves_the_version_before_and_one_clear_error(tmp_path: Path) -> None:
    done = run(f"import sys; sys.argv = ['', {str(tmp_path)!r}, 'limit']\n" + FULL)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1 and "could not be saved" in done.stdout
    assert not list(tmp_path.glob(".*"))


def test_a_full_disk_leaves_the_version_before_and_one_clear_error(tmp_path: Path) -> None:
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(tmp_path)], capture_output=True, check=False
    )
    if mount.returncode != 0:
        cannot_be_had("a small file system needs the right to mount one")
    try:
        done = run(f"import sys; sys.argv = ['', {str(tmp_path)!r}, 'disk']\n" + FULL)
        assert done.returncode == 0, done.stderr
        assert "No space left" in done.stdout
        assert not list(tmp_path.glob(".*"))
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_handlers_and_threads_that_save_into_one_folder_do_not_harm_each_other(tmp_path: Path) -> None:
    keepers = [handler(tmp_path), handler(tmp_path, async_save=True)]

    def save(number: int) -> None:
        for epoch in range(number, 40, 4):
            keepers[number % 2].save_checkpoint(epoch, {"w": torch.full((20_000,), float(epoch))}, loss=1.0)

    threads = [threading.Thread(target=save, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    keepers[1].flush()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for epoch in range(40):
            loaded = keepers[0].load_checkpoint(epoch=epoch)
            assert loaded is not None and bool((loaded["model_state"]["w"] == epoch).all())
        assert keepers[0].get_resumability_hints()["latest_epoch"] == 39
    assert not list(tmp_path.glob(".*"))


MANY = """
import sys, torch
from grd.experiment import CheckpointHandler
keeper = CheckpointHandler(sys.argv[1], keep_bytes="1GB")
for epoch in range(int(sys.argv[2]), 30, 3):
    keeper.save_checkpoint(epoch, {"w": torch.full((50_000,), float(epoch))})
"""


@pytest.mark.faults
def test_processes_that_save_into_one_folder_at_once_do_not_harm_each_other(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", MANY, str(tmp_path)]
    savers = [subprocess.Popen([*command, str(first)], env=env, stderr=subprocess.PIPE) for first in range(3)]
    for saver in savers:
        assert saver.wait(120) == 0, saver.communicate()[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for epoch in range(30):
            loaded = handler(tmp_path).load_checkpoint(epoch=epoch)
            assert loaded is not None and bool((loaded["model_state"]["w"] == epoch).all())
        assert handler(tmp_path).load_checkpoint() is not None


# --- lineage, fence, keeping house -----------------------------------------------------------------------


def test_a_fresh_start_moves_an_earlier_runs_files_aside(tmp_path: Path) -> None:
    handler(tmp_path).save_checkpoint(20, {"run": "old"}, {}, 0.0)
    as_another_process(tmp_path)
    fresh = handler(tmp_path, resume=False)
    assert fresh.load_checkpoint() is None
    fresh.save_checkpoint(3, {"run": "new"}, {}, 0.0)
    loaded = handler(tmp_path, resume=True).load_checkpoint()
    assert loaded is not None and loaded["model_state"] == {"run": "new"}
    old = handler(tmp_path / "superseded-1").load_checkpoint()
    assert old is not None and old["epoch"] == 20


def test_an_attempt_never_moves_aside_what_it_wrote_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler(tmp_path, resume=False).save_checkpoint(0, {}, {}, 0.0)
    second = handler(tmp_path, resume=False)
    assert second.find_latest_checkpoint() == tmp_path / "checkpoint_epoch_0.pt"

    monkeypatch.setenv("GRD_RUN_ID", "run-1")
    monkeypatch.setenv("GRD_ATTEMPT", "2")
    third = handler(tmp_path / "under", resume=False)
    third.save_checkpoint(0, {}, {}, 0.0)
    as_another_process(tmp_path / "under")
    assert handler(tmp_path / "under", resume=False).find_latest_checkpoint() is not None
    monkeypatch.setenv("GRD_ATTEMPT", "3")
    assert handler(tmp_path / "under", resume=False).find_latest_checkpoint() is None


def test_saving_lower_epochs_than_a_stranger_left_still_wins(tmp_path: Path) -> None:
    handler(tmp_path).save_checkpoint(20, {"run": "old"}, {}, 0.0)
    as_another_process(tmp_path)
    code = (
        "from grd.experiment import CheckpointHandler\n"
        f"CheckpointHandler({str(tmp_path)!r}).save_checkpoint(3, {{'run': 'new'}}, {{}}, 0.0)"
    )
    assert run(code).returncode == 0
    loaded = handler(tmp_path).load_checkpoint()
    assert loaded is not None and loaded["model_state"] == {"run": "new"}


@pytest.mark.faults
def test_a_continued_folder_keeps_its_lineage(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom grd.experiment import CheckpointHandler\n"
        f"ch = CheckpointHandler({str(tmp_path)!r}, resume=True)\n"
        "ch.save_checkpoint(ch.get_resumability_hints()['next_epoch'], {}, {}, 0.0)"
    )
    for _ in range(3):
        assert run(code).returncode == 0
    lineages = [entry.lineage for entries in read_manifest(tmp_path).values() for entry in entries]
    assert lineages == [1, 1, 1]


def test_setting_aside_later_epochs_makes_the_earlier_one_the_latest(tmp_path: Path) -> None:
    keeper = handler(tmp_path)
    for epoch, step in ((3, None), (4, 7), (4, None), (5, 2)):
        keeper.save_checkpoint(epoch, {"at": [epoch, step]}, {}, 0.0, step=step)
    moved = set_aside(tmp_path, after_epoch=3, reason="resume --from 3")
    names = {path.name for path in moved}
    assert names == {"checkpoint_epoch_4.pt", "checkpoint_epoch_5_step_2.pt"}
    assert all(path.parent.name == "superseded-1" and path.exists() for path in moved)
    assert keeper.find_latest_checkpoint() == tmp_path / "checkpoint_epoch_3.pt"
    assert (tmp_path / "checkpoint_latest.pt").samefile(tmp_path / "checkpoint_epoch_3.pt")
    assert set_aside(tmp_path, after_epoch=3) == []


def test_an_older_attempt_can_no_longer_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fence = tmp_path / "fence"
    monkeypatch.setenv("GRD_FENCE", str(fence))
    monkeypatch.setenv("GRD_ATTEMPT", "1")
    keeper = handler(tmp_path / "c")
    fence.write_text("1\n")
    keeper.save_checkpoint(0, {}, {}, 0.0)
    fence.write_text("2\n")
    with pytest.raises(CheckpointFenced, match="attempt 2"):
        keeper.save_checkpoint(1, {}, {}, 0.0)
    assert keeper.find_latest_checkpoint() == tmp_path / "c" / "checkpoint_epoch_0.pt"
    monkeypatch.setenv("GRD_ATTEMPT", "2")
    keeper.save_checkpoint(1, {}, {}, 0.0)
    assert keeper.find_latest_checkpoint() == tmp_path / "c" / "checkpoint_epoch_1.pt"


def test_versions_beyond_the_budget_go_but_never_the_last_two_good_ones(tmp_path: Path) -> None:
    keeper = handler(tmp_path, keep_bytes=1)
    for epoch in range(4):
        keeper.save_checkpoint(epoch, {"w": torch.ones(100)}, {}, 0.0)
    assert sorted(p.name for p in tmp_path.glob("checkpoint_epoch_*")) == [
        "checkpoint_epoch_2.pt",
        "checkpoint_epoch_3.pt",
    ]
    as_another_process(tmp_path)
    (tmp_path / "checkpoint_epoch_3.pt").write_bytes(b"bad")
    done = run(
        "from grd.experiment import CheckpointHandler\n"
        f"CheckpointHandler({str(tmp_path)!r}, keep_bytes=1).save_checkpoint(4, {{}}, {{}}, 0.0)"
    )
    assert done.returncode == 0, done.stderr
    left = {p.name for p in tmp_path.glob("checkpoint_epoch_*")}
    assert {"checkpoint_epoch_2.pt", "checkpoint_epoch_4.pt"} <= left


def test_all_versions_stay_while_they_fit(tmp_path: Path) -> None:
    keeper = handler(tmp_path)
    for epoch in range(6):
        keeper.save_checkpoint(epoch, {}, {}, 0.0)
    assert len(list(tmp_path.glob("checkpoint_epoch_*"))) == 6


def test_only_dead_writers_temporary_files_are_swept(tmp_path: Path) -> None:
    code = (
        "import os\nfrom grd.experiment.checkpoint_folder import temporary_name\nfrom pathlib import Path\n"
        f"with temporary_name(Path({str(tmp_path)!r}), 'checkpoint_epoch_1.pt') as path:\n"
        "    path.write_text('half'); print(path.name, flush=True); os.kill(os.getpid(), 9)"
    )
    done = run(code)
    assert done.returncode == -signal.SIGKILL
    name = done.stdout.strip()
    assert (tmp_path / name).exists()
    foreign = tmp_path / ".checkpoint_epoch_1.pt.00000000.1.0.tmp"
    alive = tmp_path / name.replace(f".{name.split('.')[-3]}.", f".{os.getppid()}.")
    for path in (foreign, alive):
        path.write_text("somebody else's")
    handler(tmp_path)
    assert not (tmp_path / name).exists() and foreign.exists() and alive.exists()


def test_without_hard_links_latest_is_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object, **__: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    keeper = handler(tmp_path)
    keeper.save_checkpoint(0, {"w": 0}, {}, 0.0)
    keeper.save_checkpoint(1, {"w": 1}, {}, 0.0)
    latest, newest = tmp_path / "checkpoint_latest.pt", tmp_path / "checkpoint_epoch_1.pt"
    assert not latest.samefile(newest) and latest.read_bytes() == newest.read_bytes()
    newest.write_bytes(b"damaged")
    with pytest.warns(RuntimeWarning, match="checkpoint_latest"):
        loaded = keeper.load_checkpoint()
    assert loaded is not None and loaded["model_state"] == {"w": 1}


def test_a_save_is_reported_as_an_event(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRD_EVENTS", str(tmp_path / "events.jsonl"))
    path = handler(tmp_path / "c").save_checkpoint(2, {}, {}, 0.0)
    event = json.loads((tmp_path / "events.jsonl").read_text())
    assert (event["kind"], event["epoch"], event["step"]) == ("checkpoint", 2, None)
    assert event["path"] == str(path) and event["bytes"] == path.stat().st_size and event["seconds"] >= 0


def test_a_file_that_is_no_checkpoint_is_not_opened_by_pickle(tmp_path: Path) -> None:
    (tmp_path / "checkpoint_epoch_0.pt").write_bytes(pickle.dumps({"epoch": 0}))
    with pytest.warns(RuntimeWarning, match="damaged"):
        assert handler(tmp_path).load_checkpoint() is None


def test_a_model_of_another_shape_is_an_error(tmp_path: Path) -> None:
    handler(tmp_path).save_checkpoint(0, torch.nn.Linear(2, 2), None, 0.0)
    with pytest.raises(RuntimeError, match="size mismatch"):
        handler(tmp_path).load_checkpoint(torch.nn.Linear(3, 2))
    with pytest.raises(CheckpointError, match="optimizer_state"):
        handler(tmp_path).load_checkpoint(None, torch.optim.SGD([torch.zeros(1)], lr=1))
