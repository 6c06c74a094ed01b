# SPDX-License-Identifier: Apache-2.0
"""200 flipped bytes and cuts of every kind of file: each is refused by name or proven harmless, and none runs code."""

from __future__ import annotations

import os
import random
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_cl import CausalLMModule, Task, TaskStream, fit_stream
from lightning_cl import callbacks as cl
from lightning_cl.replay import EpisodicMemory, GeneralSamples
from lightning_cl.replay.state_store import StateStore
from lightning_cl.routing import load_routed
from lightning_cl.strategies.checkpoint import AtomicCheckpointIO, load_checkpoint
from lightning_cl.stream import files
from tests.helpers import models
from tests.kill_campaign import compare

_watched: list[str] | None = None


def _audit(event: str, arguments: Any) -> None:
    # What a pickle needs to run code, and what such code would do.
    if _watched is not None and event in ("pickle.find_class", "os.system", "subprocess.Popen", "os.exec"):
        _watched.append(event)


sys.addaudithook(_audit)


@contextmanager
def nothing_executed() -> Iterator[None]:
    """Fails if anything is unpickled by name or run."""
    global _watched
    _watched = []
    try:
        yield
        assert _watched == []
    finally:
        _watched = None


def fit(folder: Path, router: bool) -> pl.Trainer:
    """A stream of two tasks whose files hold memory, states and (with the router) adapters."""
    torch.manual_seed(0)
    module = CausalLMModule(
        models.tiny_llama(num_hidden_layers=3), lora={"r": 4, "target_modules": ["q_proj"]}, lr=1e-2
    )
    tasks = [Task(f"t{i}", train=models.TokenRows(8, seed=i)) for i in range(2)]
    general = GeneralSamples(models.TokenRows(6, seed=9), num_samples=6)
    callbacks: list[Any] = [cl.ReplayMixer([general] if router else [general, EpisodicMemory(8)], rows_per_batch=2)]
    if router:
        callbacks.append(cl.RLSRouterFitter(expansion_dim=64))
    else:
        callbacks.append(cl.ActivationMarginRegularizer(store=str(folder / "states.bin")))
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[*callbacks, ModelCheckpoint()],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit_stream(trainer, module, TaskStream(tasks, batch_size=4, collate_fn=models.collate))
    return trainer


@pytest.fixture(scope="module")
def memory_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory")
    fit(folder, router=False)
    return folder


@pytest.fixture(scope="module")
def routed_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("routed")
    trainer = fit(folder, router=True)
    next(c for c in trainer.callbacks if isinstance(c, cl.RLSRouterFitter)).export(folder / "export")
    return folder


def damages(path: Path, count: int, seed: int) -> Iterator[str]:
    """Damage a file ``count`` times, each time from whole, and put it back in the end."""
    whole, chance = path.read_bytes(), random.Random(seed)
    try:
        for _ in range(count):
            place = chance.randrange(len(whole))
            if chance.random() < 0.3:
                _put(path, whole[:place])
                yield f"cut to {place} of {len(whole)} bytes"
            else:
                value = whole[place] ^ (1 << chance.randrange(8))
                _put(path, whole[:place] + bytes([value]) + whole[place + 1 :])
                yield f"byte {place} of {len(whole)} flipped"
    finally:
        _put(path, whole)


def _put(path: Path, data: bytes) -> None:
    # Another file under the same name: tensors of the one before may still be mapped from it.
    new = path.with_name("new")
    new.write_bytes(data)
    os.replace(new, path)


def check(path: Path, count: int, load: Callable[[], Any], harmless: bool, seed: int = 0) -> None:
    """Each damage raises with the file's name; where ``harmless`` may be, or gives exactly what the whole file gives."""
    whole = load()
    refused = 0
    for what in damages(path, count, seed):
        error: Exception | None = None
        with nothing_executed():
            try:
                found = load()
            except Exception as caught:
                error = caught
        if error is not None:
            assert path.name in str(error), f"{what}: {error}"
            refused += 1
            continue
        assert harmless, f"{what}: loaded"
        assert compare("file", whole, found) == [], f"{what}: loaded with other contents"
    assert refused >= (0.8 if harmless else 1) * count


def test_checkpoints_that_lightning_writes(memory_run: Path) -> None:
    # They hold the memory's rows too. A zip archive has bytes between its parts that mean nothing.
    path = memory_run / "task_1_t1" / files.TASK_END

    def load() -> Any:
        problem = files.damage(path)
        if problem is not None:
            raise MisconfigurationException(f"The checkpoint {path} cannot be resumed: {problem}")
        return torch.load(path, weights_only=True)

    check(path, 50, load, harmless=True)


def test_checkpoints_of_ours(memory_run: Path, tmp_path: Path) -> None:
    path = tmp_path / "ours.ckpt"
    AtomicCheckpointIO().save_checkpoint(files.peek(memory_run / "task_1_t1" / files.TASK_END), path)
    check(path, 50, lambda: load_checkpoint(path), harmless=False)


def test_state_stores(memory_run: Path) -> None:
    path = memory_run / "states.bin"
    # Zeros between header and states, up to a multiple of 64, are covered by no sum.
    check(path, 50, lambda: StateStore.open(path).state_dict(), harmless=True)


def test_router_files(routed_run: Path) -> None:
    folder = routed_run / "export"
    found = sorted(path for path in folder.rglob("*") if path.suffix in (".safetensors", ".json"))
    assert len(found) == 5

    def load() -> dict[str, Any]:
        return dict(load_routed(models.tiny_llama(num_hidden_layers=3), folder).state_dict())

    for seed, path in enumerate(found):
        check(path, 10, load, harmless=False, seed=seed)


def test_a_damaged_checkpoint_is_refused_by_name_and_skipped_by_last(memory_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(memory_run, folder)
    end = folder / "task_1_t1" / files.TASK_END
    for _ in damages(end, 1, seed=3):
        with pytest.warns(UserWarning, match=r"task_end.ckpt is damaged and skipped: .* The next older one is taken"):
            found = files.find_last_in(folder, "TaskStream")
        assert found is not None
        assert found != end
        assert files.damage(found) is None


class _Malice:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.target}",)


def test_a_whole_checkpoint_that_would_run_code_is_refused(memory_run: Path, tmp_path: Path) -> None:
    path, target = tmp_path / "evil.ckpt", tmp_path / "executed"
    content = files.peek(memory_run / "task_1_t1" / files.TASK_END)
    torch.save({**content, "TaskStream": {**content["TaskStream"], "evil": _Malice(target)}}, path)
    tasks = [Task(f"t{i}", train=models.TokenRows(8, seed=i)) for i in range(2)]
    run = pl.Trainer(accelerator="cpu", max_epochs=1, logger=False, default_root_dir=tmp_path)
    module, data = models.PlainLM(models.tiny_llama()), TaskStream(tasks, batch_size=4)
    refused = pytest.raises(MisconfigurationException, match=r"evil.ckpt cannot be resumed: .* running code")
    with nothing_executed(), refused:
        fit_stream(run, module, data, ckpt_path=path)
    assert not target.exists()
