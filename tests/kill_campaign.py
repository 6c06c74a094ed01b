# SPDX-License-Identifier: Apache-2.0
"""Kill a run with SIGKILL at random moments, resume it each time, and compare its end with the unbroken run's.

    python tests/kill_campaign.py                 # 20 kills of a 4-task stream with every callback
    python tests/kill_campaign.py --kills 3 --setup plain
    python tests/kill_campaign.py --points 40 7 131   # after how many hooks of each process to kill it

Prints the moment of each kill, where the run stood, and what differs in the end: nothing, bit for bit, or the campaign
fails with exit status 1.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
SETUPS = ("plain", "schedule", "workers", "stream", "callbacks")


def worker(folder: Path, setup: str, ckpt_path: str | None) -> None:
    """One process of the run: builds everything anew, resumes, and writes its end when it gets there."""
    import lightning.pytorch as pl
    import numpy as np
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.loggers import CSVLogger

    from lightning_cl import fit_stream

    torch.set_num_threads(1)
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    model, stream, callbacks = _callbacks_setup() if setup == "callbacks" else _plain_setup(setup)
    checkpoints = [
        ModelCheckpoint(save_top_k=2, monitor="step", mode="max", every_n_train_steps=1, filename="s{step}"),
        ModelCheckpoint(save_top_k=-1, every_n_epochs=1, filename="e{epoch}"),
    ]
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=2,
        logger=CSVLogger(folder, name="", version=""),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[_Position(folder), *callbacks, *checkpoints],
    )
    matrix = fit_stream(trainer, model, stream, ckpt_path=ckpt_path)
    end = {
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "optimizer": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "callbacks": {c.state_key: c.state_dict() for c in trainer.callbacks if _is_ours(c)},
        "matrix": {f"{stage} {task}": score.value for (stage, task), score in matrix.scores().items()},
        "random": torch.get_rng_state(),
    }
    torch.save(end, folder / "end.part")
    os.replace(folder / "end.part", folder / "end.pt")


def _plain_setup(setup: str) -> tuple[Any, Any, list[Any]]:
    from tests.stream_tools import Scored, stream

    options: dict[str, Any] = {"count": 4, "rows": 10}
    if setup == "workers":
        options["num_workers"] = 2
    if setup == "stream":
        options["streams"] = True
    return Scored(scheduled=setup != "plain"), stream(**options), []


def _callbacks_setup() -> tuple[Any, Any, list[Any]]:
    from lightning_cl import CausalLMModule, Task, TaskStream
    from lightning_cl import callbacks as cl
    from lightning_cl.replay import EpisodicMemory, GeneralSamples
    from tests.helpers.models import tiny_llama, tiny_tokenizer

    def rows(task: int, count: int) -> list[dict[str, Any]]:
        words = ("yes", "no") if task % 2 else ("up", "down")
        return [
            {"prompt": f"task {task}, row {i}?", "answer": words[i % 2], "options": list(words)} for i in range(count)
        ]

    tasks = [Task(f"t{i}", train=rows(i, 10), val=rows(i, 4), test=rows(i, 4), metric="accuracy") for i in range(4)]
    model = CausalLMModule(
        tiny_llama(), lora={"r": 4, "target_modules": ["q_proj", "v_proj"]}, tokenizer=tiny_tokenizer(), lr=1e-2
    )
    texts = [{"text": f"a general text, number {i}, of some words"} for i in range(12)]
    active = [
        cl.ReplayMixer([GeneralSamples(texts, num_samples=8, max_tokens=32), EpisodicMemory(16)], rows_per_batch=2),
        cl.ReplayDistillation(),
        cl.ActivationMarginRegularizer(),
        cl.LoRAInterpolator(),
        cl.ForgettingMonitor("val_accuracy"),
    ]
    return model, TaskStream(tasks, batch_size=4, max_length=64), active


def _is_ours(callback: Any) -> bool:
    from lightning_cl.callbacks import ContinualCallback

    return isinstance(callback, ContinualCallback)


class _Position:
    """Writes down the last hook that ran, for the campaign's report."""

    def __new__(cls, folder: Path) -> Any:
        import lightning.pytorch as pl

        count = 0

        class Position(pl.Callback):
            def __getattribute__(self, name: str) -> Any:
                if name.startswith("on_") or name in ("setup", "teardown"):

                    def note(trainer: Any, *args: Any, **kwargs: Any) -> None:
                        nonlocal count
                        count += 1
                        task, step = trainer.datamodule.current_index, trainer.global_step
                        where = f"task {task}, step {step}, {trainer.state.fn.value}: {name}"
                        (folder / "position.txt").write_text(f"{count} {where}")

                    return note
                return super().__getattribute__(name)

        return Position()


def _finish(process: subprocess.Popen[bytes], folder: Path) -> None:
    if process.wait() != 0:
        raise SystemExit(f"the run failed:\n{(folder / 'log.txt').read_text()[-3000:]}")


def compare(path: str, ours: Any, theirs: Any) -> list[str]:
    """The places at which two nested values differ."""
    if isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor):
        return [] if ours.dtype == theirs.dtype and torch.equal(ours, theirs) else [path]
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        if ours.keys() != theirs.keys():
            return [f"{path} (keys {sorted(map(str, ours.keys() ^ theirs.keys()))})"]
        # How long something took is the clock's, not the run's.
        keys = [key for key in ours if not str(key).endswith("_seconds")]
        return [found for key in keys for found in compare(f"{path}.{key}", ours[key], theirs[key])]
    if isinstance(ours, (list, tuple)) and isinstance(theirs, (list, tuple)):
        if len(ours) != len(theirs):
            return [f"{path} (length {len(ours)} and {len(theirs)})"]
        pairs = enumerate(zip(ours, theirs, strict=True))
        return [found for i, (a, b) in pairs for found in compare(f"{path}[{i}]", a, b)]
    same = ours == theirs or (ours != ours and theirs != theirs)
    return [] if same else [f"{path} ({ours!r} and {theirs!r})"]


def start(folder: Path, setup: str, ckpt_path: str | None) -> subprocess.Popen[bytes]:
    """Start a worker process."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, "--worker", str(folder), "--setup", setup]
    if ckpt_path is not None:
        command += ["--ckpt", ckpt_path]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with open(folder / "log.txt", "ab") as log:
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT)


def hooks_run(folder: Path) -> tuple[int, str]:
    """How many hooks the worker has run, and where it stands."""
    try:
        count, where = (folder / "position.txt").read_text().split(" ", 1)
        return int(count), where
    except (OSError, ValueError):  # not there yet, or just being written
        return 0, "the start"


def campaign(setup: str, kills: int, points: list[int], seed: int, folder: Path) -> int:
    """Run it; returns how many things differ."""
    whole, killed = folder / "whole", folder / "killed"
    _finish(start(whole, setup, None), whole)
    # So that the kills spread over the run: each process gets a few of as many parts as there are kills.
    reach = 2 * hooks_run(whole)[0] // max(2, len(points) or kills)
    chance = random.Random(seed)
    done = 0
    while not (killed / "end.pt").is_file():
        (killed / "position.txt").unlink(missing_ok=True)
        process = start(killed, setup, "last" if done else None)
        if done >= (len(points) or kills):
            _finish(process, killed)
            break
        point = points[done] if points else chance.randint(1, max(1, reach))
        where = "the start"
        while process.poll() is None:
            count, now = hooks_run(killed)
            where = now if count else where
            if count >= point:
                break
            time.sleep(0.001)
        # Not only where a hook begins: in steps, while files are written, and between.
        time.sleep(chance.uniform(0.0, 0.02))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
            done += 1
            print(f"kill {done:2d}, after {point} hooks, at {where}", flush=True)
        else:
            _finish(process, killed)
    ends = [torch.load(folder / name / "end.pt", weights_only=False) for name in ("whole", "killed")]
    different = compare("end", ends[0], ends[1])
    for place in different[:20]:
        print(f"differs: {place}")
    verdict = "equal to the unbroken run's, bit for bit" if not different else f"different in {len(different)} places"
    print(f"{setup}: {done} kills, seed {seed}; weights, optimizer, callbacks and matrix are {verdict}.")
    return len(different)


def main() -> int:
    """Run the campaign, or one worker of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setup", choices=SETUPS, default="callbacks")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument(
        "--points", type=int, nargs="*", default=[], help="after how many hooks of each process to kill it"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keep the runs' files here")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--ckpt", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        worker(args.worker, args.setup, args.ckpt)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        print(json.dumps({"setup": args.setup, "kills": len(args.points) or args.kills, "seed": args.seed}))
        return int(campaign(args.setup, args.kills, args.points, args.seed, folder) > 0)


if __name__ == "__main__":
    sys.exit(main())
