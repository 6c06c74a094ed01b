# SPDX-License-Identifier: Apache-2.0
"""Measures RLSRouterFitter: its mathematics, its cost inside a pass, many tasks, and routing on real tasks.

    python examples/benchmark/router.py --out router.json                      # one GPU, without a real model
    python examples/benchmark/router.py --parts routing --model FOLDER --data FOLDER --out routing.json
    python examples/benchmark/router.py --streams runs/compare                 # what compare.py's streams scored
    python examples/benchmark/router.py --tiny --out tiny.json                 # end to end on a CPU, in seconds

``--data`` is a folder of ``NAME.train.jsonl.gz`` and ``NAME.test.jsonl.gz`` (rows of prompt, answer and options). Real tasks
are the matter of ``router_tasks.py``.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_cl.functional import RecursiveLeastSquares
from lightning_cl.routing import AdapterBank, AnalyticRouter, Expansion, RoutedForward
from lightning_cl.routing.features import find_feature_layer
from lightning_cl.routing.router import RouteClass

sys.path.insert(0, str(Path(__file__).parent))
import router_tasks

SYNTHETIC = ["overhead", "many_tasks", "fit", "numerics", "recursion"]
REAL = ["routing"]
#: Layers, hidden size, vocabulary: an 8B shape, and one whose passes a GPU runs faster than Python can launch them.
SHAPES = {"8b": (32, 4096, 32_000), "small": (30, 576, 49_152), "tiny": (3, 64, 128)}
Result = dict[str, Any]


def clock(device: str, run: Callable[[], Any], repeats: int = 1) -> float:
    """Median seconds of one run."""
    times = []
    for _ in range(repeats):
        if device != "cpu":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def released_update(inverse: Tensor, weight: Tensor, row: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The released recursion, one sample at a time, with its order of multiplication: E^3 a sample."""
    gain = 1.0 / (1.0 + row @ inverse @ row.T)
    inverse = inverse - gain * (inverse @ (row.T @ row) @ inverse)
    return inverse, weight + inverse @ row.T @ (target - row @ weight)


def rows_for(rows: int, width: int, device: str, dim: int = 64, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Features like the router's (ReLU of a random expansion), and labels of eight tasks."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(rows) % 8
    hidden = torch.randn(rows, dim, generator=generator) + 2 * torch.randn(8, dim, generator=generator)[labels]
    features = Expansion(dim, width)(hidden)
    return (scale * features).to(device), labels.to(device)


def recursion(device: str, tiny: bool) -> Result:
    """Our update against the released one: same features, float32, one thread."""
    width, samples = (200, 64) if tiny else (3000, 512)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    features, labels = rows_for(samples, width, "cpu")
    targets = torch.nn.functional.one_hot(labels).float()
    state = torch.eye(width) / 100.0, torch.zeros(width, 8)
    few = 4 if tiny else 2

    def theirs() -> None:
        inverse, weight = state
        for i in range(few):
            inverse, weight = released_update(inverse, weight, features[i : i + 1], targets[i : i + 1])

    per_sample = clock("cpu", theirs) / few
    found: Result = {"width": width, "released_s_per_sample": per_sample}
    for method in ("cholesky", "woodbury"):
        learner = RecursiveLeastSquares(width, ridge=100.0, method=method, dtype=torch.float32)

        def ours(learner: RecursiveLeastSquares = learner) -> Tensor:
            learner.update(features, labels)
            return learner.weight

        seconds = clock("cpu", ours) / samples
        found[method] = {"s_per_sample": seconds, "times_faster": per_sample / seconds}
    torch.set_num_threads(threads)
    found["ok"] = tiny or min(found[m]["times_faster"] for m in ("cholesky", "woodbury")) >= 100
    return found


def fit(device: str, tiny: bool) -> Result:
    """The whole fit of eight tasks against the time of its matrix products alone."""
    width, per_task, block = (256, 200, 100) if tiny else (10_000, 5_000, 1_000)
    blocks = [rows_for(block, width, device)[0] for _ in range(2)]
    counts = [min(block, per_task - start) for start in range(0, per_task, block)]

    def whole() -> RecursiveLeastSquares:
        learner = RecursiveLeastSquares(width, ridge=1.0)
        for task in range(8):
            for number, rows in enumerate(counts):
                learner.update(blocks[number % 2][:rows], torch.full((rows,), task, device=device))
        assert learner.weight.shape == (width, 8)
        return learner

    kind = torch.float64
    gram = torch.zeros(width, width, dtype=kind, device=device)

    def products() -> None:
        for _ in range(8):
            for number, rows in enumerate(counts):
                part = blocks[number % 2][:rows].to(kind)
                gram.addmm_(part.T, part)

    for run in (whole, products):
        run()  # libraries initialise
    seconds, alone = clock(device, whole), clock(device, products)
    chosen = clock(device, whole().choose_ridge)
    result = {"width": width, "rows": 8 * per_task, "fit_s": seconds, "products_s": alone, "choose_ridge_s": chosen}
    return {**result, "ratio": seconds / alone, "ok": tiny or seconds / alone <= 1.5}


def numerics(device: str, tiny: bool) -> Result:
    """Relative error of W against the float64 joint solve, easy and hard; the released recursion beside it."""
    width, samples = (128, 200) if tiny else (1000, 2000)
    found: Result = {"width": width, "rows": samples, "ok": True}
    for ridge, scale, limit in ((0.1, 1.0, 1e-9), (1e-3, 30.0, 1e-3)):
        features, labels = rows_for(samples, width, "cpu", scale=scale)
        x, y = features.double(), torch.nn.functional.one_hot(labels).double()
        joint = torch.linalg.solve(x.T @ x + ridge * torch.eye(width, dtype=torch.float64), x.T @ y)
        entry: Result = {}
        for method in ("cholesky", "woodbury"):
            learner = RecursiveLeastSquares(width, ridge=ridge, method=method)
            for rows, wanted in zip(features.split(100), labels.split(100), strict=True):
                learner.update(rows.to(device), wanted.to(device))
            entry[method] = float((learner.weight.cpu() - joint).norm() / joint.norm())
        inverse, weight = torch.eye(width) / ridge, torch.zeros(width, 8)
        targets = y.float()
        for i in range(samples):  # the released update, in the cheap order
            row = features[i : i + 1]
            gain = inverse @ row.T
            inverse = inverse - gain @ gain.T / (1 + row @ gain)
            weight = weight + inverse @ row.T @ (targets[i : i + 1] - row @ weight)
        entry["released_float32"] = float((weight.double() - joint).norm() / joint.norm())
        found[f"ridge={ridge:g} scale={scale:g}"] = entry
        found["ok"] &= max(entry["cholesky"], entry["woodbury"]) <= limit
    return found


def routed_model(device: str, shape: str, adapters: int) -> tuple[Any, AdapterBank]:
    """A random Llama (bf16 on a GPU) with a bank of adapters, rank 8 on the query and value projections."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    layers, hidden, vocab = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=int(hidden * 3.5),
        num_hidden_layers=layers,
        num_attention_heads=max(2, hidden // 128),
        num_key_value_heads=max(2, hidden // 512),
    )
    torch.set_default_dtype(torch.float32 if device == "cpu" else torch.bfloat16)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    lora = LoraConfig(r=8, lora_alpha=32, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    peft = get_peft_model(model, lora, autocast_adapter_dtype=False)
    bank = AdapterBank(peft, find_feature_layer(peft))
    for k in range(adapters):
        bank.add(f"task_{k}")
    return peft, bank


def overhead(device: str, shapes: Sequence[str], repeats: int) -> Result:
    """What routing adds to a forward pass of 32 samples.

    ``routed`` against ``one_adapter``: the same pass with one active adapter and no routing. Beside it the pass with the
    routes given from the start (what features and decision cost), and with PEFT's own ``adapter_names``.
    """
    return {shape: passes(device, shape, repeats) for shape in shapes}


def passes(device: str, shape: str, repeats: int) -> Result:
    length, width, tasks = (16, 64, 4) if shape == "tiny" else (256, 4096, 4)
    model, bank = routed_model(device, shape, tasks)
    bank.activate("task_0")
    model.eval()
    routed = RoutedForward(model, bank.feature_layer, bank).attach()
    hidden, vocab = SHAPES[shape][1:]
    batch = torch.randint(0, vocab, (32, length), device=device)
    mask = torch.ones_like(batch)
    learner, expansion = RecursiveLeastSquares(width), Expansion(hidden, width)
    learner.update(expansion(routed.features(mask.bool(), input_ids=batch)), torch.arange(32, device=device) % tasks)
    classes = [RouteClass(f"t{k}", f"task_{k}") for k in range(tasks)]
    routed.router = AnalyticRouter(bank.feature_layer, expansion, classes, learner.weight)
    blocks = model.base_model.model.model.layers
    calls = dict.fromkeys(("first", "last"), 0)
    handles = [
        block.register_forward_hook(lambda *_, where=where: calls.__setitem__(where, calls[where] + 1))
        for where, block in (("first", blocks[0]), ("last", blocks[-1]))
    ]

    @torch.no_grad()
    def forward(**kwargs: Any) -> None:
        model(input_ids=batch, attention_mask=mask, logits_to_keep=1, **kwargs)

    forward()
    for handle in handles:
        handle.remove()
    assert routed.last is not None
    names = routed.last.adapters

    def given() -> None:
        with routed.given(names):
            forward()

    def one_adapter() -> None:
        with routed.paused():
            forward()

    def pefts_own() -> None:
        with routed.paused():
            forward(adapter_names=names)

    runs = {"routed": forward, "given": given, "one_adapter": one_adapter, "pefts_own": pefts_own}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):  # in turn, so that clocks and caches favour none
        for name, run in runs.items():
            times[name].append(clock(device, run))
    found = {f"{name}_ms": 1e3 * statistics.median(values[1:]) for name, values in times.items()}
    plain = found["one_adapter_ms"]
    added = {f"{name}_added": found[f"{name}_ms"] / plain - 1 for name in ("routed", "given", "pefts_own")}
    decision = found["routed_ms"] / found["given_ms"] - 1
    once = set(calls.values()) == {1}
    ok = shape == "tiny" or (once and (added["routed_added"] <= 0.02 or shape != "8b"))
    return {**found, **added, "decision_added": decision, "adapters_used": len(set(names)), "passes": calls, "ok": ok}


def many_tasks(device: str, shape: str, steps: int) -> Result:
    """Step time and GPU memory of training task 20 against training task 1; then batches of each task in turn."""
    length, tasks = (16, 20) if shape == "tiny" else (512, 20)
    model, bank = routed_model(device, shape, 1)
    batch = torch.randint(0, SHAPES[shape][2], (2, length), device=device)
    cuda = device != "cpu"

    def measure(task: str) -> tuple[list[float], int]:
        bank.activate(task)
        bank.offload(keep=[task])
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        model.train()

        def step() -> None:
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        for _ in range(3):
            step()
        seconds = [clock(device, step) for _ in range(steps)]
        return seconds, torch.cuda.memory_allocated() if cuda else 0

    first_s, first = measure("task_0")
    adapter = sum(p.numel() * p.element_size() for p in bank.parameters("task_0").values())
    for k in range(1, tasks):
        bank.add(f"task_{k}")
    last_s, last = measure(f"task_{tasks - 1}")
    again_s, _ = measure("task_0")  # all adapters are there now: the same task, before and after
    slower = statistics.median(last_s) / statistics.median(first_s) - 1
    # Serving: one adapter in use at a time, each task in turn.
    bank.active = None
    model.eval()
    routed = RoutedForward(model, bank.feature_layer, bank).attach()
    held = []
    with torch.no_grad():
        for k in [*range(tasks), *range(tasks)]:
            with routed.given(f"task_{k}"):
                model(input_ids=batch, logits_to_keep=1)
            held.append(torch.cuda.memory_allocated() if cuda else 0)
    extra, serving = (last - first) / adapter, (max(held) - min(held[0], first)) / adapter
    ok = shape == "tiny" or (extra <= 2 and slower <= 0.03)
    return {
        "adapter_mb": adapter / 1e6,
        "first_step_s": statistics.median(first_s),
        "twentieth_step_s": statistics.median(last_s),
        "first_again_step_s": statistics.median(again_s),
        "slower": slower,
        "extra_adapters_on_device": extra,
        "extra_adapters_in_serving": serving,
        "ok": ok,
    }


def show(name: str, value: Any, depth: int = 0) -> None:
    """Print one part as an indented list."""
    if isinstance(value, dict):
        print(f"{'  ' * depth}{name}")
        for key, inner in value.items():
            show(key, inner, depth + 1)
    elif isinstance(value, str) and "\n" in value:
        print(f"{'  ' * depth}{name}\n{value}")
    else:
        print(f"{'  ' * depth}{name}: {f'{value:.5g}' if isinstance(value, float) else value}")


def provenance() -> Result:
    """Where the numbers come from."""
    try:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    except OSError:
        commit = ""
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"command": sys.argv, "hardware": hardware, "torch": torch.__version__, "commit": commit or None}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    parser.add_argument("--tiny", action="store_true", help="small sizes and a random model, on any machine")
    parser.add_argument("--parts", nargs="+", choices=[*SYNTHETIC, *REAL], help="default: all that need no files")
    parser.add_argument("--streams", type=Path, help="print the table of these results of compare.py, and no more")
    parser.add_argument("--shapes", nargs="+", default=["8b", "small"], choices=SHAPES, help="of the part overhead")
    parser.add_argument("--repeats", type=int, default=12, help="timed passes and steps")
    parser.add_argument("--model", default=None, help="folder of a causal LM (parts on real tasks)")
    parser.add_argument("--data", type=Path, default=None, help="folder of the tasks (parts on real tasks)")
    parser.add_argument("--rows", type=int, default=640, help="train rows a task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--width", type=int, default=4096, help="expansion_dim of the parts on real tasks")
    parser.add_argument("--only", nargs="+", default=None, help="names of the tasks to take (default: all)")
    arguments = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if arguments.streams:
        print(router_tasks.stream_table(arguments.streams))
        return 0
    if arguments.out is None:
        parser.error("name the file for the figures with --out")
    device = "cuda" if torch.cuda.is_available() and not arguments.tiny else "cpu"
    results = provenance()
    torch.manual_seed(0)
    if arguments.tiny:
        folder = router_tasks.tiny_assets(Path(tempfile.mkdtemp()))
        arguments.model, arguments.data, arguments.shapes = str(folder), folder, ["tiny"]
        arguments.rows, arguments.width, arguments.repeats = 12, 64, 3
    chosen = arguments.parts or [*SYNTHETIC, *(REAL if arguments.data else [])]
    if set(REAL) & set(chosen) and not (arguments.model and arguments.data):
        parser.error("the parts on real tasks need --model and --data")
    for name in chosen:
        start = time.perf_counter()
        if name in REAL:
            results[name] = router_tasks.routing(device, arguments)
        elif name == "overhead":
            results[name] = overhead(device, arguments.shapes, arguments.repeats)
        elif name == "many_tasks":
            results[name] = many_tasks(device, arguments.shapes[0], arguments.repeats)
        else:
            results[name] = globals()[name](device, arguments.tiny)
        results[name]["seconds"] = time.perf_counter() - start
        show(name, results[name])
        if name in REAL:
            print(router_tasks.stage_table(results[name]))
        if device == "cuda":
            torch.cuda.empty_cache()
        arguments.out.write_text(json.dumps(results, indent=1))
    missed = [name for name in chosen if not met(results[name])]
    print("targets missed: " + ", ".join(missed) if missed else "all targets met")
    return 1 if missed else 0


def met(result: Result) -> bool:
    """Whether a part, and every part of it, has met its target (those without one have)."""
    return result.get("ok", True) and all(met(part) for part in result.values() if isinstance(part, dict))


if __name__ == "__main__":
    raise SystemExit(main())
