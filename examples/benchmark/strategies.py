# SPDX-License-Identifier: Apache-2.0
"""Tokens a second and memory of the strategies, beside what users would pick instead.

python examples/benchmark/strategies.py --out one.json                                   # one GPU
torchrun --nproc-per-node 2 examples/benchmark/strategies.py --out two.json              # two GPUs
python examples/benchmark/strategies.py --tiny --out tiny.json                           # CPU: runs all of it

A Llama with random weights (the shape of Llama-3-8B), LoRA r16 on q, k, v, o, rows of 1,024 tokens that all carry labels,
AdamW. Each case checks first that its loss is that of the plain model on the same rows, then times steps inside Lightning's
Trainer. Model FLOP utilisation counts 4 FLOPs a parameter of the frozen matrix products and token (forward, and the
gradient of the activations), 6 a trainable one, and attention; it is a fraction of the matrix-product rate measured here.

Switched off one at a time, to see what each brings: compiled blocks, the loss at labelled tokens in chunks, prefetching.
``rival`` is the Hugging Face Trainer with PEFT and bitsandbytes (with accelerate's FSDP2 under torchrun) on the same model.
``callbacks`` has ReplayMixer, ReplayDistillation, ActivationMarginRegularizer, LoRAInterpolator and ForgettingMonitor on,
with a fifth of the rows replayed; its ratio is to the arithmetic that they must do. ``load`` maps a checkpoint of that shape
from disk and reports the host memory of the node. ``checkpoint`` saves and resumes.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import logging
import os
import platform
import subprocess
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import lightning_cl
from lightning_cl.strategies import CLFSDPStrategy, CLSingleDeviceStrategy

SHAPES: dict[str, dict[str, Any]] = {
    "llama-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rope_theta": 500000.0,
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
CUDA = torch.cuda.is_available()
WORLD = int(os.environ.get("WORLD_SIZE", 1))
RANK = int(os.environ.get("RANK", 0))
DTYPE = torch.bfloat16 if CUDA else torch.float32

# name -> (strategy's arguments, rows, chunked loss). The first of a group is the one to reach the target.
ONE: dict[str, tuple[dict[str, Any], int, bool]] = {
    "bf16": ({"compile_blocks": True}, 4, True),
    "bf16, no compile": ({}, 4, True),
    "bf16, plain loss": ({"compile_blocks": True}, 4, False),
    "nf4": ({"quantization": "nf4", "compile_blocks": True}, 4, True),
    "nf4, no compile": ({"quantization": "nf4"}, 4, True),
    "nf4, recompute": ({"quantization": "nf4", "compile_blocks": True, "activation_checkpointing": True}, 4, True),
}
MANY: dict[str, tuple[dict[str, Any], int, bool]] = {
    "fsdp bf16": ({"compile_blocks": True, "prefetch": 1}, 4, True),
    "fsdp bf16, no compile": ({"prefetch": 1}, 4, True),
    "fsdp bf16, no prefetch": ({"compile_blocks": True}, 4, True),
    "fsdp bf16, plain loss": ({"compile_blocks": True, "prefetch": 1}, 4, False),
    "fsdp nf4": ({"quantization": "nf4", "compile_blocks": True, "prefetch": 1}, 4, True),
    "fsdp nf4, recompute": (
        {"quantization": "nf4", "compile_blocks": True, "prefetch": 1, "activation_checkpointing": True},
        8,
        True,
    ),
    "replicas nf4": ({"quantization": "nf4", "compile_blocks": True, "replicate": WORLD, "shard": 1}, 4, True),
}


def device() -> torch.device:
    """This process's device."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if CUDA else torch.device("cpu")


def make_base(shape: str) -> Any:
    """Random weights, made on the device and kept there (one GPU) or in host memory (several)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    try:
        with torch.device(device()):
            model = LlamaForCausalLM(LlamaConfig(**SHAPES[shape], tie_word_embeddings=False))
    finally:
        torch.set_default_dtype(default)
    return model if WORLD == 1 else model.to("cpu")


def add_lora(model: Any) -> Any:
    """LoRA r16 on the attention's projections."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    config = LoraConfig(r=16, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM")
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def make_rows(shape: str, count: int, tokens: int, seed: int = 0) -> list[dict[str, Tensor]]:
    """Rows of random tokens, all labelled."""
    ids = torch.randint(0, SHAPES[shape]["vocab_size"], (count, tokens), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row.clone()} for row in ids]


class Plain(pl.LightningModule):
    """An ordinary LightningModule: the model's own loss, over all logits at once."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(**batch, use_cache=False).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-4, fused=CUDA)


class Stopwatch(pl.Callback):
    """Seconds a step after the first few, the first loss, and the peak of the memory."""

    def __init__(self, warmup: int) -> None:
        self.warmup, self.seconds, self.peak, self.loss = warmup, 0.0, 0.0, 0.0
        self._done, self._start = 0, 0.0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._done == 0:
            self.loss = float(outputs["loss"])
        self._done += 1
        if self._done == self.warmup:
            sync()
            if CUDA:
                torch.cuda.reset_peak_memory_stats()
            self._start = time.perf_counter()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        sync()
        self.seconds = (time.perf_counter() - self._start) / max(1, self._done - self.warmup)
        self.peak = torch.cuda.max_memory_allocated() / 2**30 if CUDA else 0.0


def sync() -> None:
    """Wait for the device."""
    if CUDA:
        torch.cuda.synchronize()


def free() -> None:
    """Give the last case's memory back."""
    torch.compiler.reset()
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def make_trainer(strategy: Any, args: argparse.Namespace, callbacks: list[Any], **kwargs: Any) -> pl.Trainer:
    """A quiet Trainer on all devices of this run."""
    return pl.Trainer(
        accelerator="gpu" if CUDA else "cpu",
        devices=WORLD,
        strategy=strategy,
        precision="bf16-true" if CUDA else "32-true",
        max_steps=args.warmup + args.steps,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        **kwargs,
    )


def make_module(model: Any, chunked: bool) -> pl.LightningModule:
    """The module of a case."""
    if not chunked:
        return Plain(model)
    module = lightning_cl.CausalLMModule(model, lr=1e-4)
    module.configure_optimizers = Plain.configure_optimizers.__get__(module)  # type: ignore[method-assign]
    return module


def ours(case: tuple[dict[str, Any], int, bool], args: argparse.Namespace, callbacks: list[Any] | None = None) -> Any:
    """One case of ours: its Stopwatch and its Trainer."""
    options, rows, chunked = case
    module = make_module(add_lora(make_base(args.shape)), chunked)
    strategy = CLFSDPStrategy(**options) if WORLD > 1 else CLSingleDeviceStrategy(**options)
    loader = DataLoader(make_rows(args.shape, rows * WORLD * 4, args.tokens), batch_size=rows)
    watch = Stopwatch(args.warmup)
    trainer = make_trainer(strategy, args, [*(callbacks or []), watch])
    trainer.fit(module, loader)
    return watch, trainer, module


def rival(quantized: bool, rows: int, args: argparse.Namespace) -> tuple[float, float]:
    """Seconds a step and peak memory of the Hugging Face Trainer with PEFT (and bitsandbytes, and accelerate's FSDP2)."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    base = make_base(args.shape)
    if quantized:
        import bitsandbytes as bnb

        for name, layer in list(base.named_modules()):
            if type(layer) is torch.nn.Linear and "lm_head" not in name:
                new = bnb.nn.Linear4bit(
                    layer.in_features, layer.out_features, False, DTYPE, quant_type="nf4", quant_storage=DTYPE
                )
                new.weight = bnb.nn.Params4bit(layer.weight.data, quant_type="nf4", quant_storage=DTYPE, module=new)
                parent, _, child = name.rpartition(".")
                setattr(base.get_submodule(parent), child, new.to(device()))
    model = add_lora(base)
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            sync()
            times.append(time.perf_counter())
            if len(times) == args.warmup and CUDA:
                torch.cuda.reset_peak_memory_stats()

    with tempfile.TemporaryDirectory() as folder:
        sharded: dict[str, Any] = {}
        if WORLD > 1:
            sharded = {"fsdp": "full_shard auto_wrap", "fsdp_config": {"version": 2, "reshard_after_forward": True}}
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=rows,
            max_steps=args.warmup + args.steps,
            learning_rate=1e-4,
            bf16=CUDA,
            use_cpu=not CUDA,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            optim="adamw_torch_fused" if CUDA else "adamw_torch",
            **sharded,
        )
        data: Any = make_rows(args.shape, rows * WORLD * 8, args.tokens)
        Trainer(model=model, args=arguments, train_dataset=data, callbacks=[Clock()]).train()
    seconds = (times[-1] - times[args.warmup - 1]) / max(1, len(times) - args.warmup)
    return seconds, torch.cuda.max_memory_allocated() / 2**30 if CUDA else 0.0


def matrix_rate() -> float:
    """FLOP/s of a large matrix product in the run's dtype."""
    size = 8192 if CUDA else 256
    a = torch.randn(size, size, device=device(), dtype=DTYPE)
    b = torch.randn(size, size, device=device(), dtype=DTYPE)
    for _ in range(3):
        a @ b
    sync()
    start = time.perf_counter()
    for _ in range(20):
        a @ b
    sync()
    return 20 * 2 * size**3 / (time.perf_counter() - start)


def flops_per_token(shape: str, tokens: int) -> float:
    """What the model must compute for one token of a training step."""
    c = SHAPES[shape]
    hidden, layers = c["hidden_size"], c["num_hidden_layers"]
    kv = hidden * c["num_key_value_heads"] // c["num_attention_heads"]
    frozen = layers * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * c["intermediate_size"])
    head = hidden * c["vocab_size"]
    lora = layers * 16 * (2 * hidden + 2 * (hidden + kv) + 2 * hidden)
    # Scores and mixing: 2 products of half a square (causal), forward once and backward twice.
    attention = layers * 2 * 2 * hidden * tokens / 2 * 3
    return 4 * (frozen + head) + 6 * lora + attention


def reference_loss(args: argparse.Namespace, rows: int) -> float:
    """The plain model's loss on what the first step of this rank sees."""
    model = add_lora(make_base(args.shape)).to(device())
    loader = make_rows(args.shape, rows * WORLD * 4, args.tokens)
    order: Any = range(len(loader))
    if WORLD > 1:
        order = list(torch.utils.data.DistributedSampler(loader, WORLD, RANK, shuffle=True, seed=0))
    batch = {key: torch.stack([loader[i][key] for i in list(order)[:rows]]).to(device()) for key in loader[0]}
    with torch.no_grad():
        return float(model(**batch, use_cache=False).loss)


def record(name: str, seconds: float, peak: float, rows: int, rate: float, args: argparse.Namespace) -> dict[str, Any]:
    """A line of the table."""
    speed = rows * args.tokens / seconds
    return {
        "case": name,
        "tokens_per_second_per_device": speed,
        "peak_gib": peak,
        "utilisation": speed * flops_per_token(args.shape, args.tokens) / rate,
        "rows": rows,
        "step_ms": 1e3 * seconds,
    }


def all_callbacks(args: argparse.Namespace, rows: int) -> list[Any]:
    """Five callbacks with their defaults, a fifth of the rows replayed."""
    from lightning_cl import callbacks, replay

    source = replay.GeneralSamples(make_rows(args.shape, 16, args.tokens, 7), num_samples=16, max_tokens=args.tokens)
    return [
        callbacks.ReplayMixer(source, rows_per_batch=max(1, rows // 4)),
        callbacks.ReplayDistillation(),
        callbacks.ActivationMarginRegularizer(),
        callbacks.LoRAInterpolator(),
        callbacks.ForgettingMonitor("val_loss", mode="min"),
    ]


def with_callbacks(base: float, rows: int, args: argparse.Namespace) -> dict[str, Any]:
    """All five callbacks together, against the arithmetic that they must do.

    With R replayed rows beside B of the task: forward and backward of B + R rows, one forward of R rows for the shared
    reference of distillation and margin (the adapters off), and one for the slow weights. A forward pass is a half of a
    step with a frozen base.
    """
    options, _, chunked = MANY["fsdp bf16"] if WORLD > 1 else ONE["bf16"]
    watch, _, _ = ours((options, rows, chunked), args, all_callbacks(args, rows))
    replayed = max(1, rows // 4)
    must = base * ((rows + replayed) / rows + 2 * 0.5 * replayed / rows)
    return {
        "case": "five callbacks",
        "step_ms": 1e3 * watch.seconds,
        "must_ms": 1e3 * must,
        "ratio": watch.seconds / must,
        "peak_gib": watch.peak,
    }


def save_and_resume(trainer: pl.Trainer) -> dict[str, Any]:
    """Size and time of an adapter-only checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(trainer.strategy.broadcast(folder)) / "a.ckpt"
        sync()
        start = time.perf_counter()
        trainer.save_checkpoint(path)
        saved = time.perf_counter() - start
        start = time.perf_counter()
        trainer.strategy.load_checkpoint(path)
        loaded = time.perf_counter() - start
        size = path.stat().st_size if path.is_file() else 0
        trainer.strategy.barrier()
    return {"case": "checkpoint", "megabytes": size / 1e6, "save_seconds": saved, "load_seconds": loaded}


def load_in_4bit(args: argparse.Namespace) -> dict[str, Any]:
    """Host memory of a node that loads a checkpoint of this shape from disk under the 4-bit strategy."""
    import threading

    from lightning_cl.distributed import gather_objects
    from lightning_cl.strategies.loading import load_mapped

    def anonymous() -> int:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))

    shared = Path(tempfile.gettempdir()) / f"lightning-cl-benchmark-{args.shape}"
    if RANK == 0 and not (shared / "config.json").exists():
        make_base(args.shape).save_pretrained(shared)
    strategy = CLFSDPStrategy(quantization="nf4") if WORLD > 1 else CLSingleDeviceStrategy(quantization="nf4")
    trainer = make_trainer(strategy, args, [], limit_val_batches=1)
    if WORLD > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if CUDA else "gloo")
    gather_objects(None)
    free()
    before, peak, done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            peak[0] = max(peak[0], anonymous() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    start = time.perf_counter()
    module = make_module(add_lora(load_mapped(shared)), chunked=True)
    rows = make_rows(args.shape, 2 * WORLD, 16)
    trainer.validate(module, DataLoader(rows, batch_size=2), verbose=False)
    seconds = time.perf_counter() - start
    done.set()
    thread.join()
    size = sum(file.stat().st_size for file in shared.glob("*.safetensors"))
    node = sum(gather_objects(peak[0])) + size
    return {
        "case": "load in 4 bits",
        "seconds": seconds,
        "checkpoint_gib": size / 2**30,
        "node_over_checkpoint": node / size,
    }


def main(argv: list[str] | None = None) -> int:
    """Run the cases, print the table, write the figures."""
    args = parse(argv)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    if CUDA:
        torch.cuda.set_device(device())
    else:
        # Tracing without code generation, which takes longer on a CPU than all else here.
        torch.compile = functools.partial(torch.compile, backend="aot_eager")  # type: ignore[assignment]
    cases = MANY if WORLD > 1 else ONE
    chosen = [name for name in cases if not args.only or any(o in name for o in args.only)]
    rate = matrix_rate()
    lines: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    bits = "fsdp " if WORLD > 1 else ""
    references: dict[int, float] = {}
    for name in chosen:
        rows = cases[name][1]
        if rows not in references:
            references[rows] = reference_loss(args, rows)
            free()
        watch, trainer, module = ours(cases[name], args)
        # 4-bit rounding moves the loss of random weights by little; a wrong layer moves it by much.
        tolerance = 0.1 if "nf4" in name else 0.02
        assert abs(watch.loss - references[rows]) < tolerance, f"{name}: loss {watch.loss}, plain {references[rows]}"
        lines.append(record(name, watch.seconds, watch.peak, rows, rate, args))
        if name == f"{bits}bf16" and not args.only:
            others.append(save_and_resume(trainer))
        del watch, trainer, module
        free()
        show(lines[-1:])
    if not args.only or "rival" in args.only:
        for quantized in (False, True):
            name = f"rival {'nf4' if quantized else 'bf16'}"
            try:
                seconds, peak = rival(quantized, 4, args)
                lines.append(record(name, seconds, peak, 4, rate, args))
                show(lines[-1:])
            except Exception as error:
                # What a user of it meets on this machine is a result too.
                others.append(
                    {
                        "case": name,
                        "error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
                    }
                )
                if args.verbose:
                    traceback.print_exc()
            free()
    if not args.only or "callbacks" in args.only:
        base = next((line["step_ms"] / 1e3 for line in lines if line["case"] == f"{bits}bf16"), None)
        if base is None:
            watch, _, _ = ours(cases[f"{bits}bf16"], args)
            base = watch.seconds
            free()
        others.append(with_callbacks(base, 4, args))
        free()
    if not args.only or "load" in args.only:
        others.append(load_in_4bit(args))
    if RANK == 0:
        report(lines, others, rate, args)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0


def show(lines: list[dict[str, Any]]) -> None:
    """Print lines as they come."""
    if RANK == 0:
        for line in lines:
            print(
                f"{line['case']:28s} {line['tokens_per_second_per_device']:10.0f} tokens/s/device"
                f" {line['peak_gib']:7.2f} GiB  {line['utilisation']:6.1%}",
                flush=True,
            )


def report(lines: list[dict[str, Any]], others: list[dict[str, Any]], rate: float, args: argparse.Namespace) -> None:
    """Print everything and write it as JSON."""
    where = torch.cuda.get_device_name() if CUDA else f"CPU {platform.machine()}"
    print(f"\n{WORLD} x {where}; matrix product {rate / 1e12:.1f} TFLOP/s; commit {commit()}")
    show(lines)
    for other in others:
        print("  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in other.items()))
    if args.out:
        args.out.write_text(
            json.dumps(
                {
                    "command": "examples/benchmark/strategies.py",
                    "hardware": f"{WORLD} x {where}",
                    "commit": commit(),
                    "torch": torch.__version__,
                    "shape": args.shape,
                    "tokens": args.tokens,
                    "matrix_flops": rate,
                    "cases": lines,
                    "others": others,
                },
                indent=2,
            )
        )


def commit() -> str:
    """The commit of the code, where git knows it."""
    with contextlib.suppress(OSError):
        found = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent,
            check=False,
        )
        return found.stdout.strip() or "unknown"
    return "unknown"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--tiny", action="store_true", help="run everything in seconds, without meaning")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of each case")
    parser.add_argument("--warmup", type=int, default=4, help="steps before the timed ones (compilation)")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens a row")
    parser.add_argument("--verbose", action="store_true", help="print the traceback of a rival that fails")
    parser.add_argument(
        "--only", nargs="*", default=[], help="parts of case names, and `rival`, `callbacks`, `load`; default: all"
    )
    args = parser.parse_args(argv)
    args.shape = "tiny" if args.tiny else "llama-8b"
    if args.tiny:
        args.tokens, args.steps, args.warmup = 16, 2, 1
    return args


if __name__ == "__main__":
    raise SystemExit(main())
