# SPDX-License-Identifier: Apache-2.0
"""What LoRAInterpolator costs a training step.

python examples/benchmark/interpolator.py --out interpolator.json      # one GPU with 80 GB, two minutes
torchrun --nproc-per-node 2 examples/benchmark/interpolator.py --only fsdp --out fsdp.json
python examples/benchmark/interpolator.py --tiny --out t.json          # two CPU cores: runs all but fsdp, means nothing

consistency  the slow forward on 8 memory rows to 32, LoRA rank 16 in the shape of Llama-3-8B (random weights): its time
             against the forward arithmetic that it must do. With --compile-blocks all of it runs in compiled blocks, as
             under `CLSingleDeviceStrategy(compile_blocks=True)`.
average      the average alone: step time and memory against the same run without it, and Lightning's EMAWeightAveraging
             against its own neighbours. Both cost the same in each optimizer step whatever its batch, so a small batch,
             beside which a second model fits, shows their cost enlarged.
fsdp         the same under FSDP2, where the blocks are gathered once more.

Times are medians over alternating short runs inside Lightning's Trainer; a ratio is the median of the rounds' ratios.
Which parts of the method help is measured by interpolator_ablation.py.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from training import (
    DEVICE,
    DTYPE,
    Plain,
    Stopwatch,
    gib,
    make_model,
    make_rows,
    milliseconds,
    quiet,
    ratio,
    rounds,
    run,
    sync,
    table,
    write,
)

from lightning_cl import weights
from lightning_cl.callbacks import LoRAInterpolator, ReplayMixer
from lightning_cl.replay import GeneralSamples
from lightning_cl.strategies import CLSingleDeviceStrategy

LORA = {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}


def check_average() -> None:
    """One update is the formula."""
    model = Plain(make_model("tiny", LORA))
    callback = LoRAInterpolator(decay=0.25, warmup=False, consistency_weight=0, evaluate_with="fast")
    start = {n: p.detach().float().clone() for n, p in weights.trainable(model).items()}
    run(model, make_rows("tiny", 4, 8, 0), 4, 1, 0, [callback])
    slow = callback.slow_weights()
    for name, parameter in weights.trainable(model).items():
        expected = 0.25 * start[name] + 0.75 * parameter.detach().float()
        torch.testing.assert_close(slow[name], expected.cpu(), rtol=0, atol=1e-6)


def measure_average(args: argparse.Namespace, module: Plain) -> dict[str, Any]:
    """The average alone, and Lightning's own, in the same rounds."""
    from lightning.pytorch.callbacks import EMAWeightAveraging

    check_average()
    rows = make_rows(args.shape, args.rows * 4, args.tokens, 1)
    trainable = sum(p.numel() for p in weights.trainable(module).values())
    held: list[int] = []

    def with_callbacks(*callbacks: Any) -> Stopwatch:
        return run(module, rows, args.rows, 2 * args.steps, args.warmup, list(callbacks))

    def ours() -> Stopwatch:
        callback = LoRAInterpolator(decay=0.999, consistency_weight=0, evaluate_with="fast")
        watch = with_callbacks(callback)
        held.append(sum(shard.numel() * shard.element_size() for shard in callback._average.shards.values()))
        return watch

    found = rounds({"plain": with_callbacks, "ours": ours}, args.rounds + 1)
    theirs = {"plain": with_callbacks, "lightning": lambda: with_callbacks(EMAWeightAveraging(decay=0.999))}
    # Apart, since it copies the whole model in and out of each fit; its cost needs no care to be seen.
    found_theirs = rounds(theirs, 1, warm_up=False)
    return {
        "shape": args.shape,
        "rows": args.rows,
        "tokens": args.tokens,
        "trainable": trainable,
        "bytes_a_parameter": held[-1] / trainable,
        "plain_ms": milliseconds(found["plain"]),
        "ours_ms": milliseconds(found["ours"]),
        "lightning_ms": milliseconds(found_theirs["lightning"]),
        "ours_ratio": ratio(found["ours"], found["plain"]),
        "lightning_ratio": ratio(found_theirs["lightning"], found_theirs["plain"]),
        "plain_peak_gib": gib(found["plain"]),
        "ours_peak_gib": gib(found["ours"]),
        "lightning_peak_gib": gib(found_theirs["lightning"]),
    }


def time_forward(module: Plain, rows: list[dict[str, Tensor]], repeats: int = 5) -> float:
    """Milliseconds of a forward of the backbone on these rows, without gradient."""
    batch = {k: torch.stack([row[k] for row in rows]).to(DEVICE) for k in ("input_ids", "attention_mask")}
    backbone = module.model.to(DEVICE).get_base_model().model.eval()
    times = []
    with torch.no_grad():
        for _ in range(repeats + 2):
            sync()
            start = time.perf_counter()
            backbone(**batch, use_cache=False)
            sync()
            times.append(time.perf_counter() - start)
    module.model.train()
    return 1e3 * statistics.median(times[2:])


def measure_consistency(args: argparse.Namespace, module: Plain, **kwargs: Any) -> dict[str, Any]:
    """The slow forward and the term on top of the same replay."""
    if args.compile_blocks:
        kwargs["make_strategy"] = lambda: CLSingleDeviceStrategy(compile_blocks=True)
    tokens, rows, replayed = args.replay_tokens, 32 if not args.tiny else 8, 8 if not args.tiny else 2
    task = make_rows(args.shape, rows * 4, tokens, 1)
    memory = make_rows(args.shape, 64, tokens, 2)

    def with_callbacks(*callbacks: Any) -> Stopwatch:
        source = GeneralSamples(memory, num_samples=len(memory), max_tokens=tokens)
        mixer = ReplayMixer(source, rows_per_batch=replayed)
        return run(module, task, rows, args.steps, args.warmup, [mixer, *callbacks], **kwargs)

    def with_layers(layers: Any) -> Stopwatch:
        return with_callbacks(LoRAInterpolator(decay=0.999, layers=layers, evaluate_with="fast"))

    found = rounds(
        {"replay": with_callbacks, "last": lambda: with_layers("last"), "all": lambda: with_layers("all")}, args.rounds
    )
    figures: dict[str, Any] = {
        "shape": args.shape,
        "rows": rows,
        "memory_rows": replayed,
        "tokens": tokens,
        "compiled": args.compile_blocks,
        **{f"{name}_ms": milliseconds(watches) for name, watches in found.items()},
        **{f"{name}_peak_gib": gib(watches) for name, watches in found.items()},
    }
    if args.only != "fsdp":
        whole = time_forward(module, make_rows(args.shape, rows, tokens, 3))
        part = time_forward(module, make_rows(args.shape, replayed, tokens, 3))
        must = whole * replayed / rows
        figures |= {"forward_of_all_rows_ms": whole, "forward_of_memory_rows_ms": part, "must_ms": must}
    for name in ("last", "all"):
        figures[f"{name}_extra_ms"] = figures[f"{name}_ms"] - figures["replay_ms"]
        if args.only != "fsdp":
            figures[f"{name}_extra_over_must"] = figures[f"{name}_extra_ms"] / must
    return figures


class Sharded(Plain):
    """Blocks and then the network are FSDP2 groups."""

    def configure_model(self) -> None:
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

        if isinstance(self.model, FSDPModule):
            return
        mesh = self.device_mesh["data_parallel"]
        policy = MixedPrecisionPolicy(param_dtype=DTYPE)
        for block in self.model.get_base_model().model.layers:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(self.model, mesh=mesh, mp_policy=policy)


def measure_fsdp(args: argparse.Namespace) -> dict[str, Any]:
    """The consistency under FSDP2; every process gathers the blocks once more in each step."""
    from lightning.pytorch.strategies import ModelParallelStrategy

    class Strategy(ModelParallelStrategy):
        def __init__(self) -> None:
            super().__init__(data_parallel_size=devices, tensor_parallel_size=1)

    devices = int(os.environ.get("WORLD_SIZE", "1"))
    if DEVICE == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    model = make_model(args.shape, LORA)
    # FSDP2 groups hold one dtype; PEFT makes the adapters float32.
    model.to(DTYPE)
    blocks = model.get_base_model().model.layers
    gathered = sum(p.numel() * p.element_size() for p in blocks.parameters())
    figures = measure_consistency(args, Sharded(model), devices=devices, make_strategy=Strategy)
    return {**figures, "devices": devices, "gathered_again_gib": gathered / 2**30}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--tiny", action="store_true", help="run everything in seconds, without meaning")
    parser.add_argument("--only", choices=["average", "consistency", "fsdp"], help="one part")
    parser.add_argument("--compile-blocks", action="store_true", help="compiled blocks in the part consistency")
    parser.add_argument("--rows", type=int, default=2, help="rows of a batch of the part average")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of its rows")
    parser.add_argument("--replay-tokens", type=int, default=128, help="tokens a row of the part consistency")
    parser.add_argument("--steps", type=int, default=9, help="steps of each run, the first three to warm up")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of runs")
    args = parser.parse_args(argv)
    if args.compile_blocks and args.only == "fsdp":
        parser.error("--compile-blocks is of the part consistency on one device; leave it out, or --only fsdp")
    args.warmup, args.shape = 3, "llama-8b"
    if args.tiny:
        tiny = {"warmup": 1, "shape": "tiny", "rows": 4, "tokens": 16, "replay_tokens": 16, "steps": 3, "rounds": 1}
        vars(args).update(tiny)
    return args


def main(argv: list[str] | None = None) -> int:
    """Check, time, print, write."""
    args = parse(argv)
    quiet()
    if args.only == "fsdp":
        found = measure_fsdp(args)
        if os.environ.get("RANK", "0") == "0":
            write(args.out, {"fsdp": found})
            table("The consistency under FSDP2", [found])
        return 0
    module = Plain(make_model(args.shape, LORA))
    for part, measure, title in (
        ("consistency", measure_consistency, "The consistency on memory rows"),
        ("average", measure_average, "The average alone"),
    ):
        if args.only in (None, part):
            found = measure(args, module)
            write(args.out, {part: found})
            table(title, [found])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
