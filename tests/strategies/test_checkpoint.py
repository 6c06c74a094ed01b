# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: exact resumes, any number of processes, other bases and damaged files refused, nothing executed."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import OrderedDict
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import lightning_cl
from lightning_cl.strategies import CLSingleDeviceStrategy, files
from lightning_cl.strategies.checkpoint import (
    METADATA,
    AtomicCheckpointIO,
    DamagedCheckpointError,
    load_checkpoint,
    verify_checkpoint,
)
from tests.helpers import models, spawn
from tests.strategies import checkpoint_scenarios, workers


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("checkpoints")
    for strategy in ("cl_single_device", "cl_single_device_4bit"):
        trainer = workers.trainer(folder, devices=1, strategy=strategy)
        trainer.fit(workers.plain(), workers.rows_of_ranks(16, 4, 2))
        trainer.save_checkpoint(folder / f"{strategy}.ckpt")
    spawn.run(workers.run_scenarios, 2, folder, checkpoint_scenarios.ALL)
    return folder, spawn.load(folder)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    trainer = workers.trainer(tmp_path, devices=1)
    trainer.fit(workers.plain(), models.loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    return tmp_path / "a.ckpt"


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_two_ranks_resume_bit_for_bit(shared: Any, kind: str) -> None:
    for found in workers.result(shared[1], "resume"):
        workers.close(found[kind], found["unbroken"], atol=0)
        assert all(torch.equal(found[kind][n], v) for n, v in found["unbroken"].items())


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_one_process_goes_on_from_two(shared: Any, tmp_path: Path, kind: str) -> None:
    folder, results = shared
    module = workers.plain()
    trainer = workers.trainer(tmp_path, devices=1, max_epochs=3)
    trainer.validate(module, models.loader(), ckpt_path=folder / "resume" / f"{kind}.ckpt", verbose=False)
    workers.close(workers.whole(module), workers.result(results, "resume")[0][kind], atol=0)
    trainer.fit(module, models.loader(), ckpt_path=folder / "resume" / f"{kind}.ckpt")
    state = next(iter(trainer.optimizers[0].state.values()))
    # Two epochs of 2 steps on two ranks, and one of 4 steps on one.
    assert int(state["step"]) == 8


@pytest.mark.parametrize("strategy", ["cl_fsdp", "cl_fsdp_4bit"])
def test_two_processes_go_on_from_one(shared: Any, tmp_path: Path, strategy: str) -> None:
    folder, results = shared
    trained, steps = workers.result(results, "read_one")[0][strategy]
    single = strategy.replace("fsdp", "single_device")
    module = workers.plain()
    trainer = workers.trainer(tmp_path, devices=1, strategy=single, max_epochs=2)
    data = models.TokenRows(16)
    parts = [torch.utils.data.DistributedSampler(data, 2, r, shuffle=True, seed=0) for r in range(2)]
    for part in parts:
        part.set_epoch(1)
    first, second = (list(part) for part in parts)
    order = [i for start in (0, 4) for part in (first, second) for i in part[start : start + 4]]
    loader = torch.utils.data.DataLoader(data, 8, sampler=order, collate_fn=models.collate)
    trainer.fit(module, loader, ckpt_path=folder / f"{single}.ckpt")
    assert trainer.global_step == steps == 4
    workers.close(trained, workers.whole(module), atol=1e-4)


@pytest.mark.slow
def test_four_processes_read_what_two_wrote_and_the_reverse(shared: Any, tmp_path: Path) -> None:
    folder, results = shared
    for kind in ("file", "folder"):
        source = folder / "resume" / f"{kind}.ckpt"
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / f"{kind}.ckpt")
    spawn.run(checkpoint_scenarios.read_by_four, 4, tmp_path)
    expected = workers.result(results, "resume")[0]
    for found in spawn.load(tmp_path, 4):
        for kind in ("file", "folder"):
            workers.close(found[kind], expected[kind], atol=0)
    for kind in ("file", "folder"):
        module = workers.plain()
        trainer = workers.trainer(tmp_path, devices=1)
        trainer.validate(module, models.loader(), ckpt_path=tmp_path / f"{kind}_of_four.ckpt", verbose=False)
        workers.close(workers.whole(module), expected[kind], atol=0)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_save_base_keeps_everything(shared: Any, kind: str) -> None:
    for found in workers.result(shared[1], "with_base"):
        equal, count = found[kind]
        assert equal
        assert count == 29
        assert found[f"{kind}_logits"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_every_rank_hears_of_a_failure(shared: Any, kind: str) -> None:
    for found in workers.result(shared[1], "failures"):
        assert "No space left on device" in found[f"{kind}_full"]
        assert "untouched" in found[f"{kind}_full"]
        assert "trained on another base" in found[f"{kind}_base"]
        assert "is damaged" in found[f"{kind}_damaged"]
        assert found[f"{kind}_leftovers"] == []


def test_another_base_is_refused_with_both_fingerprints(saved: Path, tmp_path: Path) -> None:
    trainer = workers.trainer(tmp_path, devices=1)
    with pytest.raises(MisconfigurationException, match=r"fingerprint is [0-9a-f]{12}, this model's is [0-9a-f]{12}"):
        trainer.fit(workers.plain(seed=4), models.loader(), ckpt_path=saved)
    workers.trainer(tmp_path, devices=1, strategy=CLSingleDeviceStrategy(check_base=False), max_epochs=2).fit(
        workers.plain(seed=4), models.loader(), ckpt_path=saved
    )


def test_the_same_base_in_bfloat16_is_the_same_base(saved: Path, tmp_path: Path) -> None:
    module = workers.plain()
    module.model.to(torch.bfloat16)
    workers.trainer(tmp_path, devices=1, precision="bf16-true").validate(
        module, models.loader(), ckpt_path=saved, verbose=False
    )


def test_a_model_without_the_adapters_is_refused(saved: Path, tmp_path: Path) -> None:
    trainer = workers.trainer(tmp_path, devices=1, strategy=CLSingleDeviceStrategy(check_base=False))
    with pytest.raises(
        MisconfigurationException, match=r"does not fit this model: .* not in the model \(first: .*lora_A"
    ):
        trainer.fit(workers.plain(lora=False), models.loader(), ckpt_path=saved)


def test_another_format_is_refused_with_the_versions(saved: Path) -> None:
    checkpoint = load_checkpoint(saved)
    checkpoint[METADATA]["format"] = 99
    checkpoint[METADATA]["versions"]["lightning_cl"] = "7.0"
    files.save_file(checkpoint, saved)
    with pytest.raises(
        MisconfigurationException,
        match=rf"format 99, written by lightning-cl 7.0; this is .*{lightning_cl.__version__}",
    ):
        load_checkpoint(saved)


def test_another_version_of_the_same_format_warns(saved: Path) -> None:
    checkpoint = load_checkpoint(saved)
    checkpoint[METADATA]["versions"]["lightning_cl"] = "0.0.1"
    files.save_file(checkpoint, saved)
    with pytest.warns(UserWarning, match=r"was written by lightning-cl 0.0.1"):
        load_checkpoint(saved)


def test_200_flipped_bytes_and_cuts_are_all_refused(saved: Path, tmp_path: Path) -> None:
    raw, rng = saved.read_bytes(), random.Random(0)
    target = tmp_path / "damaged.ckpt"
    for _ in range(100):
        data = bytearray(raw)
        data[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        for damaged in (bytes(data), raw[: rng.randrange(len(raw))]):
            target.write_bytes(damaged)
            with pytest.raises(DamagedCheckpointError, match=r"damaged\.ckpt is damaged"):
                verify_checkpoint(target)


def test_code_in_a_file_is_never_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"state_dict": {}, "callbacks": {"x": Bomb()}}, tmp_path / "bomb.ckpt")
    with pytest.raises(TypeError, match=r"can only be rebuilt by running code from the file"):
        load_checkpoint(tmp_path / "bomb.ckpt")
    assert not (tmp_path / "ran").exists()


def test_what_could_not_be_read_back_is_refused_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"`checkpoint.callbacks.mine\[1\].x` is a `Thing`"):
        files.save_file({"callbacks": {"mine": [1, {"x": Thing()}]}}, tmp_path / "a.ckpt")
    assert list(tmp_path.iterdir()) == []


class Thing:
    """Something that only code could rebuild."""


def test_unsafe_hyperparameters_are_left_out_with_a_warning(tmp_path: Path) -> None:
    module = workers.plain()
    module.save_hyperparameters({"rank": 4, "thing": Thing(), "folder": Path("a")})
    trainer = workers.trainer(tmp_path, devices=1)
    trainer.fit(module, models.loader())
    with pytest.warns(UserWarning, match=r"leaves out the hyperparameters `thing`"):
        trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert load_checkpoint(tmp_path / "a.ckpt")["hyper_parameters"] == {"rank": 4, "folder": "a"}


def test_a_full_disk_leaves_the_last_good_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match=r"Could not write .*No space left .* is untouched.*Free space"):
        AtomicCheckpointIO().save_checkpoint({"x": torch.ones(3)}, saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.glob(".*")) == []


def test_a_file_takes_the_place_of_a_folder_only_when_it_is_written(tmp_path: Path) -> None:
    old = tmp_path / "a.ckpt"
    old.mkdir()
    (old / "meta.pt").touch()
    with pytest.raises(TypeError, match=r"`checkpoint.x` is a `Thing`"):
        AtomicCheckpointIO().save_checkpoint({"x": Thing()}, old)
    assert (old / "meta.pt").exists()
    AtomicCheckpointIO().save_checkpoint({"x": 1}, old)
    assert files.load_file(old) == {"x": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]


@pytest.mark.parametrize("ahead", [1, 1000, 1 << 25])
def test_the_sum_taken_while_writing_is_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: int) -> None:
    monkeypatch.setattr(files, "_AHEAD", ahead)
    value = {f"p{i}": torch.full((5000,), float(i)) for i in range(20)}
    files.save_file(value, tmp_path / "a.ckpt")
    content = (tmp_path / "a.ckpt").read_bytes()
    body, _, written = content.rpartition(b"lightning-cl sha256:")
    assert hashlib.sha256(body).hexdigest().encode() == written
    found = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert all(torch.equal(found[name], value[name]) for name in value)


def test_a_device_that_is_really_full(tmp_path: Path) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    with pytest.raises(OSError, match=r"Could not write"):
        files.write_atomically(tmp_path / "a.ckpt", lambda file: _fill(file))
    assert list(tmp_path.iterdir()) == []


def _fill(file: Any) -> None:
    with open("/dev/full", "wb", buffering=0) as full:
        full.write(b"x")


def test_a_kill_in_the_middle_of_a_save_leaves_the_last_good_file(tmp_path: Path) -> None:
    code = (
        "import sys, torch\n"
        "from lightning_cl.strategies.files import save_file\n"
        f"path = {str(tmp_path / 'a.ckpt')!r}\n"
        "i = 0\n"
        "while True:\n"
        "    i += 1\n"
        "    save_file({'i': i, 'x': torch.full((200_000,), float(i))}, path)\n"
        "    print(i, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    last = 0
    for _ in range(20):
        last = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    loaded = files.load_file(tmp_path / "a.ckpt")
    assert loaded["i"] >= last
    assert (loaded["x"] == loaded["i"]).all()


def test_writing_in_the_background(tmp_path: Path) -> None:
    trainer = workers.trainer(tmp_path, devices=1, plugins=[AsyncCheckpointIO()])
    module = workers.plain()
    trainer.fit(module, models.loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    trainer.strategy.teardown()
    assert files.verify_file(tmp_path / "a.ckpt")


def test_stock_checkpoint_of_plain_tensors_is_read(tmp_path: Path) -> None:
    module = workers.plain()
    trainer = workers.trainer(tmp_path, devices=1, strategy="auto")
    trainer.fit(module, models.loader())
    trainer.save_checkpoint(tmp_path / "stock.ckpt")
    other = workers.plain(seed=8)
    workers.trainer(tmp_path, devices=1).validate(
        other, models.loader(), ckpt_path=tmp_path / "stock.ckpt", verbose=False
    )
    workers.close(workers.whole(module, trainable=False), workers.whole(other, trainable=False), atol=0)


def test_a_file_that_is_not_there_and_options_that_nobody_reads(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"Checkpoint file not found: .*none\.ckpt"):
        load_checkpoint(tmp_path / "none.ckpt")
    with pytest.raises(FileNotFoundError, match=r"Checkpoint not found: .*none"):
        verify_checkpoint(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"is no sharded checkpoint: it has no meta\.pt"):
        load_checkpoint(tmp_path)
    with pytest.raises(TypeError, match=r"`storage_options=\{\}` was given"):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "a.ckpt", storage_options={})
    with pytest.raises(MisconfigurationException, match=r"s3://bucket/a.ckpt is remote"):
        AtomicCheckpointIO().save_checkpoint({}, "s3://bucket/a.ckpt")


def test_a_folder_of_stock_lightning_is_refused(tmp_path: Path) -> None:
    torch.save({"epoch": 1}, tmp_path / "meta.pt")
    with pytest.raises(TypeError, match=r"was not written by `cl_fsdp`: its meta\.pt has no index"):
        load_checkpoint(tmp_path)


class Colour(Enum):
    """An enumeration."""

    RED = "red"


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.binary(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3) | st.tuples(inner)
    ),
    max_leaves=8,
)


@given(value=VALUES)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_plain_values_come_back_as_they_were(tmp_path: Path, value: Any) -> None:
    files.save_file(files.to_safe({"value": value}), tmp_path / "v.ckpt")
    assert files.load_file(tmp_path / "v.ckpt") == {"value": value}


def test_arrays_numbers_and_enumerations_come_back_as_plain_values(tmp_path: Path) -> None:
    value = {
        "a": np.arange(6, dtype=np.uint32).reshape(2, 3),
        "b": np.float32(2),
        "c": Colour.RED,
        "d": OrderedDict(x=1),
    }
    files.save_file(files.to_safe(value), tmp_path / "v.ckpt")
    found = files.load_file(tmp_path / "v.ckpt")
    assert found["a"].dtype == np.uint32
    assert found["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert (found["b"], found["c"], dict(found["d"])) == (2.0, "red", {"x": 1})
