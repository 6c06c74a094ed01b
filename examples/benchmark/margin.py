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
import shutil
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from training import (
    DEVICE,
    Plain,
    Stopwatch,
    gib,
    make_model,
    make_rows,
    milliseconds,
    quiet,
    ratio,
    rounds,
    sync,
    table,
    write,
)
from training import run as run_on

from lightning_cl.callbacks import ActivationMarginRegularizer, ReplayMixer
from lightning_cl.functional import activation_margin_loss, activation_thresholds, encode_activation_states
from lightning_cl.replay import GeneralSamples
from lightning_cl.replay.reference_states import ReferenceStates
from lightning_cl.weights import adapters_disabled

TITLES = {
    "overhead": "On top of replay alone",
    "released": "Against the released form (speed_up: its step time over ours)",
    "collect": "Taking the reference, against the bare forward passes",
}
LORA = {"r": 8, "lora_alpha": 32, "target_modules": ["q_proj", "k_proj"], "task_type": "CAUSAL_LM"}


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


def network(shape: str, args: argparse.Namespace) -> Any:
    """The model that is trained, all of it in one precision."""
    model = make_model(shape, None if args.full else LORA)
    return model.to(next(model.parameters()).dtype)


def compare_released(shape: str, args: argparse.Namespace) -> dict[str, Any]:
    """Steps a second of ours and of the released form, and both stores."""
    folder = Path(tempfile.mkdtemp())
    try:
        rows = make_rows(shape, args.rows * 4, args.tokens, 1)
        replay = make_rows(shape, args.samples_released, args.tokens, 2)
        theirs = Released(network(shape, args), replay, folder, args.replay_rows)
        ours = Plain(network(shape, args))
        mixer = ReplayMixer(GeneralSamples(replay, num_samples=len(replay)), rows_per_batch=args.replay_rows)
        margin = ActivationMarginRegularizer()
        check_equal(theirs, args)

        def run(module: Plain, callbacks: list[Any]) -> Stopwatch:
            return run_on(module, rows, args.rows, args.steps, args.warmup, callbacks)

        found = rounds({"released": lambda: run(theirs, []), "ours": lambda: run(ours, [mixer, margin])}, args.rounds)
        files = sum(path.stat().st_size for path in folder.glob("*.pt"))
        store = margin._reference.states
        assert store is not None
        return {
            "shape": shape,
            "task_rows": args.rows,
            "replay_rows": args.replay_rows,
            "tokens": args.tokens,
            "released_ms": milliseconds(found["released"]),
            "ours_ms": milliseconds(found["ours"]),
            "speed_up": ratio(found["released"], found["ours"]),
            "released_peak_gib": gib(found["released"]),
            "ours_peak_gib": gib(found["ours"]),
            "released_store_mib": files / 2**20,
            "ours_store_mib": store.nbytes() / 2**20,
            "store_ratio": files / store.nbytes(),
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
    rows = make_rows(shape, args.overhead_rows * 4, args.overhead_tokens, 1)
    replay = make_rows(shape, 4 * args.overhead_replay_rows, args.overhead_tokens, 2)
    margin = ActivationMarginRegularizer()
    module = Plain(network(shape, args))

    def run(*more: Any) -> Stopwatch:
        mixer = ReplayMixer(GeneralSamples(replay, num_samples=len(replay)), rows_per_batch=args.overhead_replay_rows)
        return run_on(module, rows, args.overhead_rows, args.steps, args.warmup, [mixer, *more])

    found = rounds({"replay": run, "margin": lambda: run(margin)}, args.rounds)
    return {
        "shape": shape,
        "task_rows": args.overhead_rows,
        "replay_rows": args.overhead_replay_rows,
        "tokens": args.overhead_tokens,
        "replay_ms": milliseconds(found["replay"]),
        "with_margin_ms": milliseconds(found["margin"]),
        "time_ratio": ratio(found["margin"], found["replay"]),
        "memory_ratio": gib(found["margin"]) / gib(found["replay"]) if DEVICE == "cuda" else None,
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
    callback = ActivationMarginRegularizer()
    timed = callback._reference = TimedReference(callback._reference.options)
    mixer = ReplayMixer(
        GeneralSamples(replay, num_samples=len(replay), max_tokens=args.sample_tokens), rows_per_batch=1
    )
    run_on(Plain(network(shape, args)), make_rows(shape, 4, 16, 1), 2, 2, 1, [mixer, callback])
    # the first time allocates
    bare, ours = zip(*timed.times[1:], strict=True)
    return {
        "shape": shape,
        "samples": args.samples,
        "tokens": args.sample_tokens,
        "forward_seconds": statistics.median(bare),
        "collect_seconds": statistics.median(ours),
        "time_ratio": statistics.median(o / b for b, o in timed.times[1:]),
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--tiny", action="store_true", help="run everything in seconds, without meaning")
    parser.add_argument("--full", action="store_true", help="train all weights instead of LoRA")
    parser.add_argument("--only", choices=["released", "overhead", "collect"], help="one of the three comparisons")
    parser.add_argument("--tokens", type=int, default=128, help="tokens a row against the released form")
    parser.add_argument("--steps", type=int, default=15, help="steps of each run, the first five to warm up")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of runs")
    parser.add_argument("--shapes", nargs="+", default=["smollm2-135m", "llama-1b"], help="against the released form")
    args = parser.parse_args(argv)
    sizes: dict[str, Any] = {
        "warmup": 5,
        "rows": 32,
        "replay_rows": 8,
        "samples_released": 32,
        "overhead_rows": 16,
        "overhead_replay_rows": 4,
        "overhead_tokens": 512,
        "samples": 1000,
        "sample_tokens": 563,
        "big_shape": "llama-1b",
    }
    if args.tiny:
        sizes |= {"warmup": 1, "rows": 4, "replay_rows": 2, "samples_released": 6, "overhead_rows": 4}
        sizes |= {"overhead_replay_rows": 2, "overhead_tokens": 16, "samples": 20, "sample_tokens": 16}
        sizes |= {"big_shape": "tiny"}
        args.shapes, args.tokens, args.steps, args.rounds = ["tiny"], 12, 3, 1
    for name, value in sizes.items():
        setattr(args, name, value)
    return args


def main(argv: list[str] | None = None) -> int:
    """Check, time, print, write."""
    args = parse(argv)
    quiet()
    released = [("released", partial(compare_released, shape, args)) for shape in args.shapes]
    jobs = [("overhead", partial(compare_overhead, args.big_shape, args)), *released]
    jobs.insert(2, ("collect", partial(compare_collecting, args.big_shape, args)))
    found: dict[str, list[dict[str, Any]]] = {}
    for part, measure in jobs:
        if args.only in (None, part):
            found.setdefault(part, []).append(measure())
            # At once: a run that is cut short leaves what it has.
            write(args.out, found)
            table(TITLES[part], found[part])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
