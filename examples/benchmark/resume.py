# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint costs a run, and how long a killed run takes to train again.

    python examples/benchmark/resume.py --out resume.json          # one GPU: Llama-3-8B's shape, random weights, bf16
    python examples/benchmark/resume.py --tiny --out tiny.json     # a small model, on a CPU too

A stream with LoRA r16 on all linear layers and ReplayMixer (general samples and an episodic memory), ReplayDistillation,
ActivationMarginRegularizer, LoRAInterpolator and ForgettingMonitor trains twice: with checkpoints written while the step
waits, and with BackgroundCheckpointIO. The stall of a checkpoint is the time of the steps from one checkpoint to the next
beyond as many of those that no checkpoint is near. The second run is then killed by SIGKILL, and a new process resumes it:
from its start until its first optimizer step, in parts.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from training import DEVICE, make_base, make_rows, quiet, sync

from lightning_cl import CausalLMModule, Task, TaskStream, fit_stream
from lightning_cl import callbacks as cl
from lightning_cl.replay import EpisodicMemory, GeneralSamples
from lightning_cl.report.provenance import provenance
from lightning_cl.strategies import BackgroundCheckpointIO, CLSingleDeviceStrategy
from lightning_cl.stream import files

CUDA = DEVICE == "cuda"
SHAPE = {True: "tiny", False: "llama-8b"}


def make_module(tiny: bool) -> CausalLMModule:
    """Random weights made where they stay, with LoRA on all linear layers."""
    base = make_base(SHAPE[tiny], rope_theta=500000.0)
    return CausalLMModule(base, lora={"r": 16, "lora_alpha": 32}, lr=1e-4)


def stack(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Rows of one length as a batch."""
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


class Steps(pl.Callback):
    """Seconds of each step, and of each save as the step sees it; ends the last run as the kernel would."""

    def __init__(self, kill_at: int | None = None) -> None:
        self.seconds: list[float] = []
        self.saves: list[float] = []
        self.first_step_at: float | None = None
        self.passed: dict[str, float] = {}
        self._kill_at = kill_at
        self._last: float | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._pass("setup")
        save = trainer.save_checkpoint
        if getattr(save, "timed", False):
            return

        def timed(*args: Any, **kwargs: Any) -> None:
            sync()
            start = time.perf_counter()
            save(*args, **kwargs)
            self.saves.append(time.perf_counter() - start)

        timed.timed = True  # type: ignore[attr-defined]
        trainer.save_checkpoint = timed  # type: ignore[method-assign]

    def on_fit_start(self, *args: Any) -> None:
        self._pass("sharding_and_checkpoint")

    def on_train_start(self, *args: Any) -> None:
        self._pass("task_start")

    def on_train_batch_start(self, *args: Any) -> None:
        self._pass("first_batch")

    def _pass(self, name: str) -> None:
        if name not in self.passed:
            sync()
            self.passed[name] = time.time()

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self._pass("first_step")
        sync()
        now = time.perf_counter()
        if self.first_step_at is None:
            self.first_step_at = time.time()
        if self._last is not None:
            self.seconds.append(now - self._last)
        self._last = now
        if self._kill_at is not None and trainer.global_step == self._kill_at:
            raise Done


class Done(BaseException):
    """Enough was measured: the run ends here, as if killed."""


def run(
    module: CausalLMModule,
    folder: Path,
    args: argparse.Namespace,
    mode: str,
    steps: Steps,
    ckpt_path: str | None = None,
) -> None:
    """A stream of one task until ``steps`` ends it."""
    tokens, shape = args.tokens, SHAPE[args.tiny]
    general = GeneralSamples(make_rows(shape, args.samples, tokens // 2, 1), args.samples, max_tokens=tokens // 2)
    active: list[Any] = [
        cl.ReplayMixer([general, EpisodicMemory(500)], rows_per_batch=2),
        cl.ReplayDistillation(),
        cl.ActivationMarginRegularizer(store=str(folder / "states.bin")),
        cl.LoRAInterpolator(),
        cl.ForgettingMonitor("val_loss", mode="min", print_table=False, plots=False),
    ]
    active.append(ModelCheckpoint(save_top_k=1, monitor="step", mode="max", every_n_train_steps=args.every))
    trainer = pl.Trainer(
        accelerator="gpu" if CUDA else "cpu",
        devices=1,
        strategy=CLSingleDeviceStrategy(checkpoint_io=BackgroundCheckpointIO() if mode == "background" else None),
        precision="bf16-true" if CUDA else "32-true",
        max_steps=1000,
        max_epochs=-1,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[*active, steps],
    )
    task = Task(
        "a", train=make_rows(shape, 4096 // tokens * 64, tokens, 2), val=make_rows(shape, 4, tokens, 3), metric="loss"
    )
    fit_stream(
        trainer, module, TaskStream([task], batch_size=args.batch, collate_fn=stack, seed=0), ckpt_path=ckpt_path
    )


@contextlib.contextmanager
def timed_load(seconds: dict[str, float]) -> Iterator[None]:
    """Adds up what finding and reading checkpoints takes."""
    find = files.find_last

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        found = find(*args, **kwargs)
        seconds["find_and_verify"] = time.perf_counter() - start
        return found

    files.find_last = timed  # type: ignore[assignment]
    try:
        yield
    finally:
        files.find_last = find  # type: ignore[assignment]


def train(args: argparse.Namespace) -> None:
    """The two runs; the second ends by SIGKILL."""
    start = time.perf_counter()
    module = make_module(args.tiny)
    sync()
    figures: dict[str, Any] = {"model_seconds": time.perf_counter() - start}
    last = args.warmup + args.every * args.cycles
    for mode in ("blocking", "background"):
        folder = args.folder / mode
        folder.mkdir(parents=True, exist_ok=True)
        steps = Steps(kill_at=last if mode == "blocking" else last + 1)
        with contextlib.suppress(Done):
            run(module, folder, args, mode, steps)
        # A checkpoint's cost falls into the steps that follow it; the last two before the next one are free of it.
        measured = steps.seconds[args.warmup - 1 :]
        cycles = [measured[i : i + args.every] for i in range(0, len(measured) - args.every + 1, args.every)]
        plain = statistics.median(second for cycle in cycles for second in cycle[-2:])
        figures[mode] = {
            "step_seconds": plain,
            "save_call_seconds": statistics.median(steps.saves[1:] or steps.saves),
            "stall_seconds": statistics.median(sum(cycle) - args.every * plain for cycle in cycles),
        }
        if mode == "blocking":
            newest = sorted(folder.glob("task_*/*.ckpt"))[-1]
            figures["megabytes"] = newest.stat().st_size / 1e6
            figures["parts_megabytes"] = parts(newest)
        write(figures, args)
        gc.collect()
    os.kill(os.getpid(), signal.SIGKILL)


def write(figures: dict[str, Any], args: argparse.Namespace) -> None:
    """Keep what is known so far, for the next part and for the reader."""
    (args.folder / "figures.json").write_text(json.dumps(figures))
    if args.out is not None:
        settings = {key: getattr(args, key) for key in ("tiny", "batch", "tokens", "samples", "every", "cycles")}
        args.out.write_text(json.dumps({**figures, "settings": settings, **provenance()}, indent=1))


def parts(path: Path) -> dict[str, float]:
    """Megabytes of each part of a checkpoint."""
    checkpoint = files.peek(path)
    found = {key: size_of(value) / 1e6 for key, value in checkpoint.items() if key != "callbacks"}
    found.update({name.split("{")[0]: size_of(value) / 1e6 for name, value in checkpoint["callbacks"].items()})
    return {name: size for name, size in found.items() if size >= 0.001}


def size_of(value: Any) -> int:
    """Bytes of the tensors in a nested value."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(size_of(entry) for entry in value.values())
    return sum(size_of(entry) for entry in value) if isinstance(value, (list, tuple)) else 0


def resume(args: argparse.Namespace) -> None:
    """Go on where the killed run stood, until the first step has ended."""
    seconds = {"process_and_imports": time.time() - args.resume}
    start = time.perf_counter()
    module = make_module(args.tiny)
    sync()
    seconds["model"] = time.perf_counter() - start
    folder = args.folder / "background"
    steps = Steps(kill_at=args.warmup + args.every * args.cycles + 2)
    with timed_load(seconds):
        begun = time.time()
        with contextlib.suppress(Done):
            run(module, folder, args, "background", steps, ckpt_path="last")
    assert steps.first_step_at is not None
    for name, end in steps.passed.items():
        seconds[f"fit_{name}"] = end - begun
        begun = end
    seconds["total"] = steps.first_step_at - args.resume
    figures = json.loads((args.folder / "figures.json").read_text())
    figures["resume_seconds"] = seconds
    write(figures, args)
    show(figures)


def main(argv: list[str] | None = None) -> int:
    """Train, kill, resume; print and write the figures."""
    args = parse(argv)
    quiet()
    if args.part is not None:
        (train if args.part == "train" else resume)(args)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        command = [sys.executable, __file__, *(argv if argv is not None else sys.argv[1:]), "--folder", str(folder)]
        code = subprocess.run([*command, "--part", "train"], check=False).returncode
        if code != -signal.SIGKILL:
            raise SystemExit(f"the run ended with {code} before it was killed")
        subprocess.run([*command, "--part", "resume", "--resume", repr(time.time())], check=True)
    return 0


def show(figures: dict[str, Any]) -> None:
    """Print the figures."""
    print(f"step {figures['blocking']['step_seconds']:.3f} s; checkpoint {figures['megabytes']:.1f} MB")
    print("  " + ", ".join(f"{name} {size:.1f}" for name, size in figures["parts_megabytes"].items()))
    for mode in ("blocking", "background"):
        entry = figures[mode]
        verdict = "met" if entry["stall_seconds"] <= 1.0 else "MISSED"
        print(
            f"{mode:10s} call {entry['save_call_seconds']:.3f} s, stall {entry['stall_seconds']:.3f} s"
            f"  target 1.000  {verdict}"
        )
    print("resume: " + ", ".join(f"{name} {value:.1f} s" for name, value in figures["resume_seconds"].items()))


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small model, in seconds")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--folder", type=Path, help="where checkpoints go: the disk that is measured")
    parser.add_argument("--every", type=int, default=6, help="steps from one checkpoint to the next")
    parser.add_argument("--cycles", type=int, default=3, help="measured checkpoints of each run")
    parser.add_argument("--warmup", type=int, default=6, help="steps before them, a multiple of --every")
    parser.add_argument("--batch", type=int, default=2, help="rows of a step, beside two replayed ones half as long")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of a row")
    parser.add_argument("--samples", type=int, default=64, help="general samples, half as long")
    parser.add_argument("--part", choices=["train", "resume"], help="one of the two processes, with --folder")
    parser.add_argument(
        "--resume", type=float, help="when the process that resumes was started, in seconds (date +%%s.%%N)"
    )
    args = parser.parse_args(argv)
    if args.tiny:
        args.tokens, args.samples = min(args.tokens, 32), min(args.samples, 16)
    return args


if __name__ == "__main__":
    raise SystemExit(main())
