# SPDX-License-Identifier: Apache-2.0
"""What the margin regularizer costs: against the released form of GeRe, on top of plain replay, and to collect.

python examples/benchmark/margin.py --out margin.json      # one GPU, under two minutes
python examples/benchmark/margin.py --tiny --out t.json    # two CPU cores: runs all of it, its times mean nothing

Three comparisons, all with random weights in the shape of a real model, LoRA (rank 8 on q and k, as in the paper) or
``--full``, all inside Lightning's Trainer, in short alternating runs; a ratio is the median of the pairs' ratios.

released   one step with 32 task rows and 8 replay rows. The other side is the released form, written anew from its
           description: two forward passes, all hidden states kept, float32 references read from a file a sample.
overhead   the regularizer on top of the same replay without it: step time and peak memory.
collect    taking the reference on 1,000 texts, against the bare forward passes of the same batches.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_cl.callbacks import ActivationMarginRegularizer, ReplayMixer
from lightning_cl.functional import activation_margin_loss, activation_thresholds, encode_activation_states
from lightning_cl.replay import GeneralSamples
from lightning_cl.replay.reference_states import ReferenceStates
from lightning_cl.weights import adapters_disabled

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "llama-1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "tiny": {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


def sync() -> None:
    """Wait for the device."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def make_model(shape: str, full: bool) -> Any:
    """A causal LM with random weights, on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = LlamaForCausalLM(LlamaConfig(**SHAPES[shape], tie_word_embeddings=True)).to(DTYPE)
    if full:
        return model
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=8, lora_alpha=32, target_modules=["q_proj", "k_proj"], task_type="CAUSAL_LM")
    return get_peft_model(model, config).to(DTYPE)


def make_rows(shape: str, count: int, tokens: int, seed: int) -> list[dict[str, Tensor]]:
    """Rows of random tokens, all of one length."""
    ids = torch.randint(0, SHAPES[shape]["vocab_size"], (count, tokens), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row.clone()} for row in ids]


class Plain(pl.LightningModule):
    """An ordinary LightningModule."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(**batch, use_cache=False).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-5, fused=DEVICE == "cuda")


class Released(Plain):
    """GeRe's training step as its authors released it, by description: a file of float32 references a sample."""

    def __init__(self, model: Any, replay: list[dict[str, Tensor]], folder: Path, rows: int) -> None:
        super().__init__(model)
        self.replay, self.folder, self.rows, self.drawn = replay, folder, rows, 0
        backbone = model.get_base_model() if hasattr(model, "get_base_model") else model
        total = square = torch.zeros(())
        with torch.no_grad():
            for i, row in enumerate(replay):
                ids = row["input_ids"][None].to(DEVICE)
                hidden = backbone(ids, output_hidden_states=True, logits_to_keep=1).hidden_states[-1][0].float().cpu()
                torch.save(hidden, folder / f"{i}.pt")
                total, square = total + hidden.sum(0), square + hidden.square().sum(0)
        count = sum(len(row["input_ids"]) for row in replay)
        mean = total / count
        spread = (square / count - mean.square()).clamp_min(0).sqrt()
        self.register_buffer("lower", (mean - spread).to(DEVICE), persistent=False)
        self.register_buffer("upper", (mean + spread).to(DEVICE), persistent=False)

    def draw(self) -> tuple[dict[str, Tensor], Tensor]:
        """The next replay rows, with their references from their files."""
        chosen = [(self.drawn + i) % len(self.replay) for i in range(self.rows)]
        self.drawn += self.rows
        batch = {key: torch.stack([self.replay[i][key] for i in chosen]).to(DEVICE) for key in self.replay[0]}
        return batch, torch.stack([torch.load(self.folder / f"{i}.pt") for i in chosen]).to(DEVICE)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        replay, reference = self.draw()
        task_loss = self.model(**batch, use_cache=False).loss
        output = self.model(**replay, use_cache=False, output_hidden_states=True)
        margin = released_margin(output.hidden_states[-1], reference, self.lower, self.upper, replay["attention_mask"])
        return (task_loss + output.loss) / 2 + margin


def released_margin(hidden: Tensor, reference: Tensor, lower: Tensor, upper: Tensor, mask: Tensor) -> Tensor:
    """The margin from float32 references, one mask a state."""
    hidden = hidden.float()
    negative, positive = reference <= lower, reference >= upper
    neutral = ~(negative | positive)
    margins = negative * torch.relu(hidden - lower) + positive * torch.relu(upper - hidden)
    margins = margins + neutral * (torch.relu(hidden - upper) + torch.relu(lower - hidden))
    margins = margins * mask.unsqueeze(-1)
    return margins.sum() / ((margins != 0).sum() + 1e-8)


class Stopwatch(pl.Callback):
    """Seconds a step after the first few, and the peak of the memory."""

    def __init__(self, warmup: int) -> None:
        self.warmup, self.seconds, self.peak, self._start, self._done = warmup, 0.0, 0, 0.0, 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._done += 1
        if self._done == self.warmup:
            sync()
            if DEVICE == "cuda":
                torch.cuda.reset_peak_memory_stats()
            self._start = time.perf_counter()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        sync()
        self.seconds = (time.perf_counter() - self._start) / (self._done - self.warmup)
        self.peak = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 0


def run(module: pl.LightningModule, loader: DataLoader, steps: int, warmup: int, callbacks: list[Any]) -> Stopwatch:
    """One short training run."""
    watch = Stopwatch(warmup)
    trainer = pl.Trainer(
        accelerator="gpu" if DEVICE == "cuda" else "cpu",
        devices=1,
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks, watch],
    )
    trainer.fit(module, loader)
    return watch


def pairs(first: Any, second: Any, rounds: int) -> tuple[list[Stopwatch], list[Stopwatch]]:
    """Alternate the two; the first round of each only warms up (compiles, allocates, collects)."""
    one, two = [], []
    for round_ in range(rounds + 1):
        a, b = (first(), second()) if round_ % 2 == 0 else tuple(reversed((second(), first())))
        if round_:
            one.append(a)
            two.append(b)
    return one, two


def median_ratio(numerator: list[Stopwatch], denominator: list[Stopwatch]) -> float:
    """Median of the pairs' time ratios."""
    return statistics.median(a.seconds / b.seconds for a, b in zip(numerator, denominator, strict=True))


def seconds(watches: list[Stopwatch]) -> float:
    """Median seconds a step."""
    return statistics.median(w.seconds for w in watches)


def compare_released(shape: str, args: argparse.Namespace) -> dict[str, Any]:
    """Steps a second of ours and of the released form, and both stores."""
    folder = Path(tempfile.mkdtemp())
    try:
        loader = DataLoader(make_rows(shape, args.rows * 4, args.tokens, 1), batch_size=args.rows)
        replay = make_rows(shape, args.samples_released, args.tokens, 2)
        theirs = Released(make_model(shape, args.full), replay, folder, args.replay_rows)
        ours = Plain(make_model(shape, args.full))
        mixer = ReplayMixer(GeneralSamples(replay, num_samples=len(replay)), rows_per_batch=args.replay_rows)
        margin = ActivationMarginRegularizer()
        check_equal(theirs, args)
        slow, fast = pairs(
            lambda: run(theirs, loader, args.steps, args.warmup, []),
            lambda: run(ours, loader, args.steps, args.warmup, [mixer, margin]),
            args.rounds,
        )
        files = sum(path.stat().st_size for path in folder.glob("*.pt"))
        assert margin._reference.states is not None
        return {
            "shape": shape,
            "task_rows": args.rows,
            "replay_rows": args.replay_rows,
            "tokens": args.tokens,
            "released_steps_per_second": 1 / seconds(slow),
            "ours_steps_per_second": 1 / seconds(fast),
            "speed_up": median_ratio(slow, fast),
            "released_peak_gib": max(w.peak for w in slow) / 2**30,
            "ours_peak_gib": max(w.peak for w in fast) / 2**30,
            "released_store_mib": files / 2**20,
            "ours_store_mib": margin._reference.states.nbytes() / 2**20,
            "store_ratio": files / margin._reference.states.nbytes(),
        }
    finally:
        shutil.rmtree(folder)


def check_equal(released: Released, args: argparse.Namespace) -> None:
    """Ours (compiled on a GPU) and the released margin are the same number and gradient."""
    reference = torch.stack([torch.load(released.folder / f"{i}.pt") for i in range(args.replay_rows)]).to(DEVICE)
    lower, upper = activation_thresholds(reference)
    hidden = reference + 0.3 * torch.randn_like(reference)
    mask = torch.rand(hidden.shape[:2], device=DEVICE) < 0.9
    states = encode_activation_states(reference, lower, upper)
    a, b = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    loss = torch.compile(activation_margin_loss, dynamic=True) if DEVICE == "cuda" else activation_margin_loss
    ours, theirs = loss(a, states, lower, upper, mask), released_margin(b, reference, lower, upper, mask)
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-9)


def compare_overhead(shape: str, args: argparse.Namespace) -> dict[str, Any]:
    """The regularizer on top of replay alone."""
    loader = DataLoader(
        make_rows(shape, args.overhead_rows * 4, args.overhead_tokens, 1), batch_size=args.overhead_rows
    )
    replay = make_rows(shape, 4 * args.overhead_replay_rows, args.overhead_tokens, 2)
    margin = ActivationMarginRegularizer()
    module = Plain(make_model(shape, args.full))

    def mixer() -> ReplayMixer:
        return ReplayMixer(GeneralSamples(replay, num_samples=len(replay)), rows_per_batch=args.overhead_replay_rows)

    alone, both = pairs(
        lambda: run(module, loader, args.steps, args.warmup, [mixer()]),
        lambda: run(module, loader, args.steps, args.warmup, [mixer(), margin]),
        args.rounds,
    )
    memory = statistics.median(b.peak / max(a.peak, 1) for a, b in zip(alone, both, strict=True))
    return {
        "shape": shape,
        "task_rows": args.overhead_rows,
        "replay_rows": args.overhead_replay_rows,
        "tokens": args.overhead_tokens,
        "replay_ms": 1e3 * seconds(alone),
        "with_margin_ms": 1e3 * seconds(both),
        "time_ratio": median_ratio(both, alone),
        "memory_ratio": memory if DEVICE == "cuda" else None,
    }


class TimedReference(ReferenceStates):
    """Times taking the reference against the bare forward passes of the same batches."""

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self.times: list[tuple[float, float]] = []

    def take(self, trainer: Any, layers: Any, rows: Any, pad_values: Any, task_index: int) -> None:
        assert self._module is not None
        for _ in range(3):
            self._taken = self.states = None
            sync()
            start = time.perf_counter()
            with torch.no_grad(), adapters_disabled(self._module):
                for at in range(0, len(rows), self.options.batch_size):
                    batch = [row.content["input_ids"] for row in rows[at : at + self.options.batch_size]]
                    ids = torch.stack(batch).to(DEVICE)
                    self._module.model(
                        input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, logits_to_keep=1
                    )
            sync()
            middle = time.perf_counter()
            super().take(trainer, layers, rows, pad_values, task_index)
            sync()
            self.times.append((middle - start, time.perf_counter() - middle))


def compare_collecting(shape: str, args: argparse.Namespace) -> dict[str, Any]:
    """Taking the reference on many texts."""
    replay = make_rows(shape, args.samples, args.sample_tokens, 2)
    loader = DataLoader(make_rows(shape, 4, 16, 1), batch_size=2)
    callback = ActivationMarginRegularizer()
    timed = callback._reference = TimedReference(callback._reference.options)
    module = Plain(make_model(shape, args.full))
    mixer = ReplayMixer(
        GeneralSamples(replay, num_samples=len(replay), max_tokens=args.sample_tokens), rows_per_batch=1
    )
    run(module, loader, 2, 1, [mixer, callback])
    bare, ours = zip(*timed.times[1:], strict=True)
    return {
        "shape": shape,
        "samples": args.samples,
        "tokens": args.sample_tokens,
        "forward_seconds": statistics.median(bare),
        "collect_seconds": statistics.median(ours),
        "time_ratio": statistics.median(o / b for b, o in timed.times[1:]),
    }


def table(title: str, rows: list[dict[str, Any]]) -> None:
    """Print rows of figures."""
    print(f"\n{title}")
    keys = list(rows[0])
    cells = [keys, *[[f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]]
    widths = [max(len(line[i]) for line in cells) for i in range(len(keys))]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def hardware() -> str:
    """What the figures were measured on."""
    return torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU {platform.machine()}"


def commit() -> str:
    """The commit of the code, where git knows it."""
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    return found.stdout.strip() or "unknown"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--tiny", action="store_true", help="run everything in seconds, without meaning")
    parser.add_argument("--full", action="store_true", help="train all weights instead of LoRA")
    parser.add_argument("--only", choices=["released", "overhead", "collect"], help="one of the three comparisons")
    parser.add_argument("--tokens", type=int, default=128, help="tokens a row against the released form")
    parser.add_argument("--steps", type=int, default=20, help="steps of each run")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of runs")
    args = parser.parse_args(argv)
    sizes: dict[str, Any] = {
        "warmup": 5,
        "rows": 32,
        "replay_rows": 8,
        "samples_released": 64,
        "overhead_rows": 16,
        "overhead_replay_rows": 4,
        "overhead_tokens": 512,
        "samples": 1000,
        "sample_tokens": 563,
        "released_shapes": ["smollm2-135m", "llama-1b"],
        "big_shape": "llama-1b",
    }
    if args.tiny:
        sizes |= {"warmup": 1, "rows": 4, "replay_rows": 2, "samples_released": 6, "overhead_rows": 4}
        sizes |= {"overhead_replay_rows": 2, "overhead_tokens": 16, "samples": 20, "sample_tokens": 16}
        sizes |= {"released_shapes": ["tiny"], "big_shape": "tiny"}
        args.tokens, args.steps, args.rounds = 12, 3, 1
    for name, value in sizes.items():
        setattr(args, name, value)
    return args


def main(argv: list[str] | None = None) -> int:
    """Check, time, print, write."""
    args = parse(argv)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    figures: dict[str, Any] = {
        "command": " ".join(["python", "examples/benchmark/margin.py", *(sys.argv[1:] if argv is None else argv)]),
        "hardware": hardware(),
        "torch": torch.__version__,
        "commit": commit(),
    }
    if args.only in (None, "released"):
        figures["released"] = [compare_released(shape, args) for shape in args.released_shapes]
        table("Ours against the released form (speed_up: its step time over ours)", figures["released"])
    if args.only in (None, "overhead"):
        figures["overhead"] = [compare_overhead(args.big_shape, args)]
        table("On top of replay alone", figures["overhead"])
    if args.only in (None, "collect"):
        figures["collect"] = [compare_collecting(args.big_shape, args)]
        table("Taking the reference, against the bare forward passes", figures["collect"])
    if args.out:
        args.out.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
