# SPDX-License-Identifier: Apache-2.0
"""What self-generated replay costs: decoding, the whole method with its generation, and the distillation loss.

python examples/benchmark/selfgenerated.py --out selfgenerated.json                  # one GPU, about two minutes
python examples/benchmark/selfgenerated.py --part decode --compile --out d.json      # with both compiled forms, minutes
python examples/benchmark/selfgenerated.py --tiny --out t.json                       # two CPU cores: its times mean nothing

Random weights in the shape of a real model.

decode        rows of 256 tokens, 256 at a time: the engine, the library's plain batched ``generate``, and with ``--compile``
              the library's fastest form (static cache, compiled) and the engine's compiled one. The limit is the time
              to read the weights and the filled cache once a step, at the bandwidth that a large copy reaches here.
cost          a whole fit (LoRA r16 on all linear layers) with a pool made at its start, generation included, against the
              same fit without replay, at 32 + 8 and 32 + 4 rows of equal length.
distillation  8 rows x 512 tokens x 128k vocabulary, forward and backward: the chunked loss against all logits at once.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import statistics
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_cl.callbacks import ReplayDistillation, ReplayMixer
from lightning_cl.functional import distillation_loss
from lightning_cl.replay import SelfGenerated
from lightning_cl.replay.generation import DecodeEngine

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


def seconds_of(work: Callable[[], Any]) -> float:
    """Wall time of one call."""
    sync()
    began = time.perf_counter()
    work()
    sync()
    return time.perf_counter() - began


def make_model(shape: str, lora: bool) -> Any:
    """A causal LM with random weights, on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], tie_word_embeddings=True, max_position_embeddings=2048, bos_token_id=1)
    with torch.device(DEVICE):
        model = LlamaForCausalLM(config).to(DTYPE)
    model.generation_config.eos_token_id = None
    if not lora:
        return model
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config).to(DTYPE)


def bandwidth() -> float:
    """Bytes a second that a large copy on the device reads and writes."""
    source = torch.empty((2**30 if DEVICE == "cuda" else 2**24), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    target.copy_(source)
    times = [seconds_of(lambda: target.copy_(source)) for _ in range(5)]
    return 2 * source.numel() / statistics.median(times)


def decode(shape: str, rows: int, length: int, with_compile: bool, lora: bool) -> dict[str, Any]:
    """Milliseconds a decode step of each form, and the limit."""
    model = make_model(shape, lora).eval()
    prompts = [[1]] * rows
    forms: dict[str, float] = {}
    made: dict[str, Any] = {}
    setup: dict[str, float] = {}

    def engine(name: str, mode: Any, tokens: int) -> None:
        def run() -> None:
            made[name] = DecodeEngine(model, length=tokens, batch_size=rows, mode=mode).generate(prompts)

        first = seconds_of(run)
        whole = seconds_of(run)
        # The whole call counts, recording the graphs included: that is what a run pays for each pool.
        forms[name] = 1e3 * whole / (tokens - 1)
        setup[name] = first - whole

    def library(name: str, tokens: int, **how: Any) -> None:
        ids = torch.ones(rows, 1, dtype=torch.long, device=DEVICE)

        def run() -> None:
            # The step time of an eager loop does not depend on the position: a short run measures it.
            new = {"max_new_tokens": tokens - 1, "min_new_tokens": tokens - 1, "pad_token_id": 0}
            made[name] = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, top_p=1.0, **new, **how
            )

        first = seconds_of(run)
        whole = min(seconds_of(run) for _ in range(1 if name == "library, eager" else 2))
        forms[name] = 1e3 * whole / (tokens - 1)
        setup[name] = first - whole

    engine("engine", "auto", length)
    library("library, eager", min(length, 48))
    if with_compile:
        engine("engine, compiled", "compile", length)
        library("library, static cache, compiled", length, cache_implementation="static")
    engine("engine, eager", "eager", min(length, 24))
    recorded, plain = made["engine"].rows, made["engine, eager"].rows
    # Rounding may tip a draw, and a tipped row goes its own way: the first tokens must nearly all agree.
    agree = sum(torch.equal(a[:8], b[:8]) for a, b in zip(recorded, plain, strict=True)) / rows
    assert agree > 0.8, f"recorded and eager rows agree in {agree:.0%} only"
    config = model.config.get_text_config()
    width = 2 * config.num_hidden_layers * config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    size = torch.finfo(DTYPE).bits // 8
    read = size * (sum(p.numel() for p in model.parameters()) + rows * width * length / 2)
    limit = 1e3 * read / bandwidth()
    for name, step in forms.items():
        print(
            f"{shape:>14} {name:>32}: {step:8.2f} ms a step, {1e3 * rows / step:10,.0f} tokens/s,"
            f" {forms['library, eager'] / step:6.1f}x the library's eager form, {step / limit:6.1f}x the limit",
            flush=True,
        )
    print(f"{shape:>14} {'bandwidth limit':>32}: {limit:8.3f} ms a step")
    speedup = forms["library, eager"] / forms["engine"]
    return {
        "ms_a_step": forms,
        "first_call_extra_seconds": setup,
        "limit_ms": limit,
        "speedup": speedup,
        "first_tokens_agree": agree,
        "rows": rows,
        "length": length,
        "lora": lora,
    }


class Plain(pl.LightningModule):
    """An ordinary LightningModule."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(**batch, use_cache=False).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-4, fused=DEVICE == "cuda")


def one_fit(module: Plain, data: DataLoader, steps: int, callbacks: list[Any]) -> float:
    """Wall time of a fit."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_steps=steps,
            max_epochs=-1,
            accelerator=DEVICE,
            devices=1,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        return seconds_of(lambda: trainer.fit(module, data))


def cost(shape: str, steps: int, length: int, pool: int, repeats: int) -> dict[str, Any]:
    """The method's whole wall time over plain fine-tuning's."""
    vocabulary = SHAPES[shape]["vocab_size"]
    ids = torch.randint(0, vocabulary, (64, length), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row.clone()} for row in ids]
    data = DataLoader(rows, batch_size=32)  # type: ignore[arg-type]
    module = Plain(make_model(shape, lora=True))
    one_fit(module, data, min(steps, 5), [])
    result: dict[str, Any] = {"steps": steps, "length": length, "pool_size": pool}
    for replay in (8, 4):
        pairs = []
        for repeat in range(repeats + 1):
            plain = one_fit(module, data, steps, [])
            source = SelfGenerated(pool, length=length, seed=repeat)
            method = [ReplayMixer(source, rows_per_batch=replay), ReplayDistillation(weight=1.0)]
            whole = one_fit(module, data, steps, method)
            if repeat:  # the first pair warms up
                pairs.append((plain, whole, source.seconds))
        ratio = statistics.median(whole / plain for plain, whole, _ in pairs)
        without = statistics.median((whole - made) / plain for plain, whole, made in pairs)
        result[f"32+{replay}"] = {"ratio": ratio, "without_generation": without, "pairs": pairs}
        print(
            f"{shape:>14} 32 + {replay}: {ratio:.3f}x plain fine-tuning's wall time, {without:.3f}x without generation"
            f" ({pairs[-1][0]:.1f} s, {pairs[-1][1]:.1f} s, {pairs[-1][2]:.2f} s generation)",
            flush=True,
        )
    return result


def naive_loss(hidden: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    """All logits at once."""
    student = (hidden @ weight.T).float().log_softmax(-1)
    with torch.no_grad():
        source = (teacher @ weight.T).float().log_softmax(-1)
    kl = torch.nn.functional.kl_div(student, source, log_target=True, reduction="none")
    return kl.sum(-1).mean()


def measure_loss(loss: Any, hidden: Tensor, teacher: Tensor, weight: Tensor) -> dict[str, Any]:
    """Value, gradient, peak memory above the inputs, and time of one form, forward and backward."""

    def run() -> Tensor:
        hidden.grad = weight.grad = None
        value = loss(hidden, teacher, weight)
        value.backward()
        return value.detach()

    value = float(run())
    assert hidden.grad is not None
    grad = hidden.grad.float().clone()
    before = peak = 0
    if DEVICE == "cuda":
        hidden.grad = weight.grad = None
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        peak = torch.cuda.max_memory_allocated() - before
    times = [seconds_of(run) for _ in range(7)]
    hidden.grad = weight.grad = None
    return {"value": value, "grad": grad, "peak_bytes": peak, "ms": 1e3 * statistics.median(times)}


def distillation(rows: int, tokens: int, vocabulary: int, width: int) -> dict[str, Any]:
    """Peak memory above the inputs and time, forward and backward, of both forms."""
    torch.manual_seed(0)
    result: dict[str, Any] = {}
    for head in ("frozen head", "trained head"):
        hidden = torch.randn(rows, tokens, width, device=DEVICE, dtype=DTYPE).requires_grad_()
        teacher = (hidden + 0.1 * torch.randn_like(hidden)).detach()
        weight = (0.02 * torch.randn(vocabulary, width, device=DEVICE)).to(DTYPE)
        weight.requires_grad_(head == "trained head")
        found: dict[str, Any] = {}
        for name, loss in (("naive", naive_loss), ("chunked", distillation_loss)):
            found[name] = measure_loss(loss, hidden, teacher, weight)
        naive, ours = found["naive"], found["chunked"]
        assert abs(naive["value"] - ours["value"]) <= 1e-3 * abs(naive["value"]) + 1e-6
        grad = ours.pop("grad")
        gap = float((naive.pop("grad") - grad).norm() / grad.norm())
        assert gap < 0.02, f"gradients differ by {gap:.3g}"
        memory = naive["peak_bytes"] / max(1, ours["peak_bytes"])
        result[head] = {**found, "memory_ratio": memory, "time_ratio": ours["ms"] / naive["ms"], "gradient_gap": gap}
        print(
            f"{head:>14}: peak {ours['peak_bytes'] / 2**30:.2f} GiB against {naive['peak_bytes'] / 2**30:.2f}"
            f" (1/{memory:.1f}), {ours['ms']:.1f} ms against {naive['ms']:.1f} ({ours['ms'] / naive['ms']:.2f}x)",
            flush=True,
        )
    return result


def _commit() -> str:
    folder = Path(__file__).parent
    try:
        return subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=folder, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the chosen parts and write their figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("decode", "cost", "distillation"), default=None, help="only this part")
    parser.add_argument("--compile", action="store_true", help="measure the compiled forms of decoding too")
    parser.add_argument("--lora", action="store_true", help="decode with adapters on (default: as for initial samples)")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of a fit (default: %(default)s)")
    parser.add_argument("--length", type=int, default=256, help="tokens a row (default: %(default)s)")
    parser.add_argument("--pool", type=int, default=256, help="rows of the pool (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=2, help="pairs of fits (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="seconds on a CPU, to check the script")
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    shapes = ["tiny"] if options.tiny else ["smollm2-135m", "llama-1b"]
    result: dict[str, Any] = {
        "command": "python examples/benchmark/selfgenerated.py",
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else platform.processor() or "cpu",
        "torch": torch.__version__,
        "commit": _commit(),
    }
    if options.part in (None, "decode"):
        size = (8, 24) if options.tiny else (256, options.length)
        result["decode"] = {shape: decode(shape, *size, options.compile, options.lora) for shape in shapes}
    if options.part in (None, "cost"):
        size = (3, 24, 16, 1) if options.tiny else (options.steps, options.length, options.pool, options.repeats)
        result["cost"] = {shapes[0]: cost(shapes[0], *size)}
    if options.part in (None, "distillation"):
        size = (2, 16, 128, 16) if options.tiny else (8, 512, 128256, 2048)
        result["distillation"] = distillation(*size)
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1))
    return result


if __name__ == "__main__":
    main()
