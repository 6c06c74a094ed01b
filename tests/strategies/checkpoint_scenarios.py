# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that several processes write and read."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import torch

from lightning_cl.strategies import files
from tests.helpers import models
from tests.strategies import workers


def _strategy(kind: str, **kwargs: Any) -> Any:
    return workers.strategy(sharded_checkpoint=kind == "folder", **kwargs)


def resume(rank: int, folder: Path) -> Any:
    """Two epochs at once, and one epoch, a checkpoint, a new module and the other epoch."""
    found: dict[str, Any] = {}
    unbroken = workers.plain()
    workers.trainer(folder, max_epochs=2).fit(unbroken, models.loader(16, 4))
    found["unbroken"] = workers.whole(unbroken)
    for kind in ("file", "folder"):
        path = folder / f"{kind}.ckpt"
        first = workers.plain()
        trainer = workers.trainer(folder, strategy=_strategy(kind))
        trainer.fit(first, models.loader(16, 4))
        trainer.save_checkpoint(path)
        resumed = workers.plain()
        trainer = workers.trainer(folder, strategy=_strategy(kind), max_epochs=2)
        trainer.fit(resumed, models.loader(16, 4), ckpt_path=path)
        found[kind] = workers.whole(resumed)
        # Over a checkpoint that is there already, and from a new place.
        trainer.save_checkpoint(path)
    return found


def read_one(rank: int, folder: Path) -> Any:
    """Go on from a checkpoint of one process (written by the test before)."""
    found = {}
    for strategy in ("cl_fsdp", "cl_fsdp_4bit"):
        path = folder.parent / f"{strategy.replace('fsdp', 'single_device')}.ckpt"
        module = workers.plain()
        trainer = workers.trainer(folder, strategy=strategy, max_epochs=2)
        trainer.fit(module, models.loader(16, 4), ckpt_path=path)
        found[strategy] = workers.whole(module), trainer.global_step
    return found


def with_base(rank: int, folder: Path) -> Any:
    """``save_base=True``, in full precision and in 4 bits."""
    sizes = {}
    for kind in ("file", "folder"):
        module = workers.plain()
        strategy = _strategy(kind, save_base=True, quantization="nf4")
        trainer = workers.trainer(folder, strategy=strategy)
        trainer.fit(module, models.loader(16, 4))
        trainer.save_checkpoint(folder / kind)
        again = workers.plain(seed=5)
        strategy = _strategy(kind, quantization="nf4", check_base=False)
        workers.trainer(folder, strategy=strategy).validate(
            again, models.loader(16, 4), ckpt_path=folder / kind, verbose=False
        )
        first, second = workers.whole(module, trainable=False), workers.whole(again, trainable=False)
        sizes[kind] = all(torch.equal(first[n], second[n]) for n in first), len(first)
        module.zero_grad()
        outputs = [
            trainer.strategy._in_root(lambda m=m: m.model(**next(iter(models.loader(4, 4)))).logits)
            if m is module
            else strategy._in_root(lambda m=m: m.model(**next(iter(models.loader(4, 4)))).logits)
            for m in (module.eval(), again.eval())
        ]
        sizes[f"{kind}_logits"] = torch.equal(*outputs)
    return sizes


def failures(rank: int, folder: Path) -> Any:
    """A full disk on one rank, a damaged file, another base: every rank hears of it, and none hangs."""
    messages = {}
    module = workers.plain()
    for kind in ("file", "folder"):
        path = folder / kind
        trainer = workers.trainer(folder, strategy=_strategy(kind))
        trainer.fit(module, models.loader(8, 4))
        trainer.save_checkpoint(path)
        sync = files.os.fsync

        def full(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        if rank == 0:
            files.os.fsync = full
        try:
            trainer.save_checkpoint(path)
        except Exception as error:
            messages[f"{kind}_full"] = f"{type(error).__name__}: {error}"
        finally:
            files.os.fsync = sync
        trainer.strategy.barrier()
        other = workers.plain(seed=9)
        try:
            workers.trainer(folder, strategy=_strategy(kind)).fit(other, models.loader(8, 4), ckpt_path=path)
        except Exception as error:
            messages[f"{kind}_base"] = f"{type(error).__name__}: {error}"
        trainer.strategy.barrier()
        if rank == 0:
            target = path if path.is_file() else next(path.glob("*00001.safetensors"))
            data = bytearray(target.read_bytes())
            data[len(data) // 2] ^= 4
            target.write_bytes(bytes(data))
        trainer.strategy.barrier()
        try:
            workers.trainer(folder, strategy=_strategy(kind)).fit(workers.plain(), models.loader(8, 4), ckpt_path=path)
        except Exception as error:
            messages[f"{kind}_damaged"] = f"{type(error).__name__}: {error}"
        messages[f"{kind}_leftovers"] = [p.name for p in folder.rglob("*.tmp")]
    return messages


ALL = [resume, read_one, with_base, failures]


def read_by_four(rank: int, folder: Path) -> None:
    """Go on with four processes from what two wrote, and write for two."""
    found = {}
    for kind in ("file", "folder"):
        module = workers.plain()
        strategy = workers.strategy(sharded_checkpoint=kind == "folder", replicate=2)
        trainer = workers.trainer(folder, devices=4, strategy=strategy, max_epochs=1)
        trainer.validate(module, models.loader(16, 4), ckpt_path=folder / f"{kind}.ckpt", verbose=False)
        trainer.save_checkpoint(folder / f"{kind}_of_four.ckpt")
        found[kind] = workers.whole(module)
    from tests.helpers import spawn

    spawn.save(folder, rank, found)
