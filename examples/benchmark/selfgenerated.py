# SPDX-License-Identifier: Apache-2.0
"""What self-generated replay costs: decoding, the whole method with its generation, and the distillation loss.

python examples/benchmark/selfgenerated.py --out selfgenerated.json                  # one GPU, about two minutes
python examples/benchmark/selfgenerated.py --part decode --shape llama-1b --out d.json
python examples/benchmark/selfgenerated.py --part decode --compile --out d.json      # with both compiled forms, minutes
python examples/benchmark/selfgenerated.py --tiny --out t.json                       # two CPU cores: its times mean nothing

Random weights in the shape of a real model.

decode        rows of 256 tokens, 256 at a time, from the plain model and from one with LoRA (r16, all linear layers): the
              engine, the library's plain batched ``generate``, and with ``--compile`` the library's fastest form (static
              cache, compiled) and the engine's compiled one. The limits are the time to read the weights and the filled
              cache once a step, at the bandwidth that a large copy reaches here, and that of the matrix products, at
              the rate of a large one.
cost          a whole fit (LoRA as above) with a pool made at its start, generation included, against the same fit
              without replay, at 32 + 8 and 32 + 4 rows of equal length. With ``--compile-blocks`` both run in compiled
              blocks, as under ``CLSingleDeviceStrategy(compile_blocks=True)``; with ``--precompute`` the reference of the
              pool is taken once (``ReplayDistillation(precompute=True)``).
past          rows of past tasks made from their instructions alone, by SmolLM2-135M-Instruct after it learnt two tasks of
              the demo (``python examples/assets.py`` first): how many have their task's form, over
              ``prompt_loss_weight``. Only if asked for.
distillation  8 rows x 512 tokens x 128k vocabulary, forward and backward: the chunked loss against all logits at once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader
from training import DEVICE, DTYPE, SHAPES, Plain, make_base, make_rows, quiet, sync

from lightning_cl.callbacks import ReplayDistillation, ReplayMixer
from lightning_cl.functional import distillation_loss
from lightning_cl.replay import SelfGenerated
from lightning_cl.replay.generation import DecodeEngine
from lightning_cl.report.provenance import provenance
from lightning_cl.strategies import CLSingleDeviceStrategy

PARTS = ("decode", "cost", "distillation", "past")


def seconds_of(work: Callable[[], Any]) -> float:
    """Wall time of one call."""
    sync()
    began = time.perf_counter()
    work()
    sync()
    return time.perf_counter() - began


def make_model(shape: str, lora: bool) -> Any:
    """A causal LM with random weights that never ends a row, on the device."""
    model = make_base(shape, tie_word_embeddings=True, max_position_embeddings=2048, bos_token_id=1)
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


def product_rate() -> float:
    """Floating-point operations a second of a large matrix product in the compute dtype."""
    size = 8192 if DEVICE == "cuda" else 512
    a, b = (torch.randn(size, size, device=DEVICE, dtype=DTYPE) for _ in range(2))
    a @ b
    return 2 * size**3 / statistics.median(seconds_of(lambda: a @ b) for _ in range(5))


def decode(shape: str, rows: int, length: int, with_compile: bool, lora: bool) -> dict[str, Any]:
    """Milliseconds a decode step of each form, and the limit."""
    model = make_model(shape, lora).eval()
    prompts = [[1]] * rows
    forms: dict[str, float] = {}
    made: dict[str, Any] = {}

    config = model.config.get_text_config()
    width = 2 * config.num_hidden_layers * config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    size = torch.finfo(DTYPE).bits // 8
    parameters = sum(p.numel() for n, p in model.named_parameters() if "lora_" not in n)
    limit = 1e3 * size * (parameters + rows * width * length / 2) / bandwidth()
    # At hundreds of rows a step the products no longer wait for memory alone.
    products = 1e3 * 2 * rows * parameters / product_rate()
    label = f"{shape}{' + LoRA' if lora else ''}"
    print(f"{label:>20} limits: {limit:.3f} ms a step to read weights and cache, {products:.3f} ms for the products")

    def note(name: str, step: float) -> None:
        forms[name] = step
        print(
            f"{label:>20} {name:>32}: {step:8.2f} ms a step, {1e3 * rows / step:10,.0f} tokens/s,"
            f" {forms['library, eager'] / step:6.1f}x the library's eager form, {step / limit:6.1f}x the limit",
            flush=True,
        )

    def engine(name: str, mode: Any, tokens: int) -> None:
        def run() -> None:
            made[name] = DecodeEngine(model, length=tokens, batch_size=rows, mode=mode).generate(prompts)

        run()
        # The whole call counts, copying the weights and recording included: that is what a run pays for each pool.
        note(name, 1e3 * min(seconds_of(run) for _ in range(2)) / (tokens - 1))

    def library(name: str, tokens: int, warm: int, **how: Any) -> None:
        ids = torch.ones(rows, 1, dtype=torch.long, device=DEVICE)

        def run(count: int = tokens) -> None:
            new = {"max_new_tokens": count - 1, "min_new_tokens": count - 1, "pad_token_id": 0}
            mask = torch.ones_like(ids)
            made[name] = model.generate(
                input_ids=ids, attention_mask=mask, do_sample=True, top_k=0, top_p=1.0, **new, **how
            )

        run(warm)
        note(name, 1e3 * min(seconds_of(run) for _ in range(2)) / (tokens - 1))

    # The step time of the library's eager loop hardly depends on the position: a short run measures it.
    library("library, eager", min(length, 32), warm=8)
    engine("engine", "auto", length)
    generation = made["engine"]
    note("engine, a step alone", 1e3 * (generation.seconds - generation.preparation_seconds) / (length - 1))
    engine("engine, eager", "eager", min(length, 24))
    recorded, plain = made["engine"].rows, made["engine, eager"].rows
    # Rounding may tip a draw, and a tipped row goes its own way: the first tokens must nearly all agree.
    agree = sum(torch.equal(a[:8], b[:8]) for a, b in zip(recorded, plain, strict=True)) / rows
    assert agree > 0.8, f"recorded and eager rows agree in {agree:.0%} only"
    if with_compile:
        library("library, static cache, compiled", length, warm=length, cache_implementation="static")
        engine("engine, compiled", "compile", length)
    return {
        "ms_a_step": forms,
        "preparation_seconds": generation.preparation_seconds,
        "bandwidth_limit_ms": limit,
        "products_limit_ms": products,
        "speedup": forms["library, eager"] / forms["engine"],
        "first_tokens_agree": agree,
        "rows": rows,
        "length": length,
    }


def one_fit(module: Plain, data: DataLoader, steps: int, callbacks: list[Any], compiled: bool) -> float:
    """Wall time of a fit."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_steps=steps,
            max_epochs=-1,
            accelerator=DEVICE,
            devices=1,
            strategy=CLSingleDeviceStrategy(compile_blocks=True) if compiled else "auto",
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        return seconds_of(lambda: trainer.fit(module, data))


def cost(
    shape: str,
    steps: int,
    length: int,
    pool: int,
    repeats: int,
    replayed: list[int],
    compiled: bool,
    precompute: bool,
) -> dict[str, Any]:
    """The method's whole wall time over plain fine-tuning's."""
    data = DataLoader(make_rows(shape, 64, length, 0), batch_size=32)  # type: ignore[arg-type]
    module = Plain(make_model(shape, lora=True))

    def method(replay: int, count: int, seed: int) -> tuple[float, float]:
        source = SelfGenerated(pool, length=length, seed=seed)
        term = ReplayDistillation(weight=1.0, precompute=precompute)
        seconds = one_fit(module, data, count, [ReplayMixer(source, rows_per_batch=replay), term], compiled)
        return seconds, source.seconds

    one_fit(module, data, 3, [], compiled)
    for count in replayed if compiled else replayed[:1]:  # each number of rows is compiled by itself
        method(count, 3, 0)
    names = {f"32+{count}": count for count in replayed}
    runs: dict[str, list[Any]] = {name: [] for name in ("plain", *names)}
    for repeat in range(repeats):  # interleaved, so that a clock that drifts touches all alike
        runs["plain"].append(one_fit(module, data, steps, [], compiled))
        for name, count in names.items():
            runs[name].append(method(count, steps, repeat + 1))
    plain = statistics.median(runs["plain"])
    result: dict[str, Any] = {
        "steps": steps,
        "length": length,
        "pool_size": pool,
        "compiled_blocks": compiled,
        "precompute": precompute,
        "runs": runs,
    }
    for name in names:
        whole = statistics.median(seconds for seconds, _ in runs[name])
        made = statistics.median(seconds for _, seconds in runs[name])
        result[name] = {"ratio": whole / plain, "without_generation": (whole - made) / plain}
        print(
            f"{shape:>20} {name}: {whole / plain:.3f}x plain fine-tuning's wall time, {(whole - made) / plain:.3f}x"
            f" without generation ({plain:.2f} s, {whole:.2f} s, {made:.2f} s generation; {steps} steps, pool {pool})",
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


def distillation(rows: int, tokens: int, vocabulary: int, width: int) -> Any:
    """Peak memory above the inputs and time, forward and backward, of both forms."""
    torch.manual_seed(0)
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
        print(
            f"{head:>14}: peak {ours['peak_bytes'] / 2**30:.2f} GiB against {naive['peak_bytes'] / 2**30:.2f}"
            f" (1/{memory:.1f}), {ours['ms']:.1f} ms against {naive['ms']:.1f} ({ours['ms'] / naive['ms']:.2f}x)",
            flush=True,
        )
        yield head, {**found, "memory_ratio": memory, "time_ratio": ours["ms"] / naive["ms"], "gradient_gap": gap}


def past(weights: tuple[float, ...], rows: int, pool: int) -> Any:
    """The yield of rows of past tasks, by the weight of the prompt's tokens in the loss."""
    from lightning_cl import CausalLMModule, Task, TaskStream, fit_stream
    from lightning_cl.data import read_rows

    assets = Path(__file__).parents[1] / "assets"
    for weight in weights:
        pl.seed_everything(0, verbose=False)
        data = {name: list(read_rows(str(assets / f"{name}.train.jsonl")))[:rows] for name in ("reviews", "sarcasm")}
        tasks = [Task(name, train=found) for name, found in data.items()]
        # Of the third task only the beginning matters: there the rows of the two before it are made.
        tasks.append(Task("topics", train=list(read_rows(str(assets / "topics.train.jsonl")))[:16]))
        lora = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
        how: dict[str, Any] = {"schedule": "linear", "warmup": 0.1, "dtype": "bfloat16", "prompt_loss_weight": weight}
        module = CausalLMModule(str(assets / "smollm2-135m-instruct"), lora=lora, lr=1e-3, **how)
        source = SelfGenerated(pool, length=96, prompts="past_tasks")
        trainer = pl.Trainer(
            max_epochs=2,
            accelerator=DEVICE,
            devices=1,
            precision="bf16-true",
            callbacks=[ReplayMixer(source, rows_per_batch=4), ReplayDistillation(weight=3.0), Yields(source)],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        try:
            fit_stream(trainer, module, TaskStream(tasks, batch_size=16, max_length=160, template="none"))
        except MisconfigurationException as error:  # not one row
            print(f"prompt_loss_weight {weight}: {str(error).split(',')[0]}", flush=True)
        found = next(c for c in trainer.callbacks if isinstance(c, Yields)).found  # type: ignore[attr-defined]
        for task, (kept, made, examples) in found.items():
            print(
                f"prompt_loss_weight {weight}, at the start of {task}: {kept} of {made} rows, e.g. {examples}",
                flush=True,
            )
        yield str(weight), {"rows": rows, "pool_size": pool, "kept, made, examples": found}


class Yields(pl.Callback):
    """Notes for each task how many rows were made and kept."""

    def __init__(self, source: SelfGenerated) -> None:
        self.source, self.found, self._made = source, {}, 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0 and trainer.current_epoch == 0 and self.source.available():
            made, self._made = self.source._made - self._made, self.source._made
            rows = self.source.draw(2, 0, 1)
            texts = [pl_module.tokenizer.decode(row.content["input_ids"].tolist()) for row in rows]
            self.found[trainer.datamodule.current_task.name] = (self.source.available(), made, texts)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the chosen parts and write their figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=PARTS, help="only this part; may be given again, in order")
    parser.add_argument("--compile", action="store_true", help="measure the compiled forms of decoding too")
    parser.add_argument("--compile-blocks", action="store_true", help="compiled blocks in the part cost")
    parser.add_argument("--precompute", action="store_true", help="the reference taken once in the part cost")
    parser.add_argument("--shape", choices=sorted(SHAPES), default=None, help="only this model (default: two)")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of a fit (default: %(default)s)")
    parser.add_argument("--length", type=int, default=256, help="tokens a row (default: %(default)s)")
    parser.add_argument("--pool", type=int, default=256, help="rows of the pool (default: %(default)s)")
    parser.add_argument("--replay-rows", type=int, nargs="+", default=[8, 4], help="beside 32 (default: 8 4)")
    parser.add_argument("--repeats", type=int, default=2, help="pairs of fits (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="seconds on a CPU, to check the script")
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write")
    options = parser.parse_args(arguments)
    quiet()
    shapes = ["tiny"] if options.tiny else [options.shape] if options.shape else ["smollm2-135m", "llama-1b"]
    result: dict[str, Any] = provenance()

    def decodings() -> Any:
        size = (8, 24) if options.tiny else (256, options.length)
        for shape in shapes:
            for lora in (False, True):
                yield f"{shape}{' + LoRA' if lora else ''}", decode(shape, *size, options.compile, lora)

    def costs() -> Any:
        size = (3, 24, 16, 1) if options.tiny else (options.steps, options.length, options.pool, options.repeats)
        for shape in shapes:
            yield shape, cost(shape, *size, options.replay_rows, options.compile_blocks, options.precompute)

    def losses() -> Any:
        yield from distillation(*((2, 16, 128, 16) if options.tiny else (8, 512, 128256, 2048)))

    def yields() -> Any:
        yield from past(*(((0.5,), 32, 8) if options.tiny else ((0.0, 0.1, 0.5), 320, 256)))

    parts = dict(zip(PARTS, (decodings, costs, losses, yields), strict=True))
    for part in options.part or PARTS[:3]:
        for name, figures in parts[part]():
            result.setdefault(part, {})[name] = figures
            if options.out is not None:  # as they come: a run that is cut short leaves what it has
                options.out.write_text(json.dumps(result, indent=1))
    return result


if __name__ == "__main__":
    main()
