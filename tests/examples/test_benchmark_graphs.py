# SPDX-License-Identifier: Apache-2.0
"""Training steps from CUDA graphs do what they do without."""

from __future__ import annotations

import importlib
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_cl.strategies.blocks import run_uncompiled
from tests.examples.test_benchmark_compare import compare, config  # noqa: F401
from tests.helpers.models import lora, tiny_llama

FOLDER = Path(__file__).parents[2] / "examples" / "benchmark"


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("compare_graphs")


@pytest.fixture
def replays(graphs: Any, monkeypatch: pytest.MonkeyPatch) -> Counter[Any]:
    """How often the first block ran from graphs, and how many sets of graphs were captured.

    Without a GPU, what would be captured is called: all but the capture itself runs there too.
    """
    found: Counter[Any] = Counter()
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda calls, samples, **kwargs: calls)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    run, make = graphs.Graphs.__call__, graphs.Graphs.__init__

    def counted(self: Any, index: int, hidden: Tensor) -> Tensor:
        found["passes"] += index == 0
        return run(self, index, hidden)

    def made(self: Any, *args: Any) -> None:
        found["captured"] += 1
        make(self, *args)

    monkeypatch.setattr(graphs.Graphs, "__call__", counted)
    monkeypatch.setattr(graphs.Graphs, "__init__", made)
    return found


@pytest.mark.parametrize("lengths", [None, [13, 5, 9], [13, 13, 13]])
@pytest.mark.parametrize("left", [False, True])
def test_tokens_do_not_see_what_they_are_padded_with(graphs: Any, lengths: list[int] | None, left: bool) -> None:
    model = lora(tiny_llama()).base_model.model.model
    tokens, generator = 13, torch.Generator().manual_seed(0)
    hidden = torch.randn(3, tokens, 32, generator=generator, requires_grad=True)
    positions = model.rotary_emb(hidden, torch.arange(tokens)[None])
    mask = None
    if lengths is not None:
        place = torch.arange(tokens)
        real = torch.stack([place >= tokens - n if left else place < n for n in lengths])
        # A row's padding sees itself, as transformers has it.
        seen = real[:, None] & torch.ones(tokens, tokens, dtype=torch.bool).tril() | torch.eye(tokens, dtype=torch.bool)
        mask = seen[:, None]
    block, weights = model.layers[0], [p for p in model.layers[0].parameters() if p.requires_grad]
    pull = torch.randn(3, tokens, 32, generator=generator)

    def found(out: Tensor) -> list[Tensor]:
        return [out.detach(), *torch.autograd.grad((out * pull).sum(), [hidden, *weights])]

    expected = found(block(hidden, attention_mask=mask, position_embeddings=positions))
    wide = graphs.pad(hidden, 64), *graphs.context(hidden, mask, positions, 64)
    assert [value.shape[-2] for value in wide] == [64] * 4
    call = graphs.Call(block, block.forward, None)
    for one, other in zip(found(call(*wide)[:, :tokens]), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["sequential", "memory", "self-kl", "margin", "i-lora", "routed"])
def test_a_run_from_graphs_comes_out_as_one_without(
    compare: Any,  # noqa: F811
    config: Path,  # noqa: F811
    replays: Counter[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
) -> None:
    if not torch.cuda.is_available():
        monkeypatch.setattr(sys.modules["compare_run"], "graphed", lambda recipe: recipe["graphs"])
    text = json.dumps(compare.read_config(compare.STANDARD)["methods"][method])
    for old, new in {
        '"examples/assets/general.jsonl", "num_samples": 1000': f'"{tmp_path}/news.jsonl", "num_samples": 3',
        '"expansion_dim": 4096': '"expansion_dim": 32',  # which takes a CPU a minute
        '"pool_size": 320, "length": 128': '"pool_size": 8, "length": 16',
    }.items():
        text = text.replace(old, new)
    content = compare.read_config(config)
    content["methods"][method] = json.loads(text)
    results = []
    for switch in (False, True):
        changed = {**content, "recipe": {**content["recipe"], "graphs": switch}}
        (tmp_path / "graphs.yaml").write_text(json.dumps(changed))
        out = tmp_path / str(switch)
        arguments = ["run", "--config", str(tmp_path / "graphs.yaml"), "--out", str(out), "--seeds", "0"]
        assert not replays
        assert compare.main([*arguments, "--methods", method]) == 0
        results.append(json.loads((out / "two" / method / "seed_0" / "task_matrix.json").read_text()))
    assert replays["passes"] > 4
    without, with_graphs = ([score["value"] for score in document["matrix"]["scores"]] for document in results)
    assert with_graphs == pytest.approx(without, abs=2e-3)


class Net(pl.LightningModule):
    """A small adapter on a small network; in each step as many passes as are asked for."""

    def __init__(self, passes: int = 1) -> None:
        super().__init__()
        self.model = lora(tiny_llama())
        self.passes = passes

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        each = [self.model(input_ids=part, labels=part, use_cache=False).loss for part in batch.chunk(self.passes)]
        return torch.stack(each).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1.0)


def fit(
    module: Net, *callbacks: pl.Callback, lengths: tuple[int, ...] = (20, 20, 31, 70), **settings: Any
) -> list[Tensor]:
    """The adapter's weights after a step for each length."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(4, 100, (4, length), generator=generator) for length in lengths]
    trainer = pl.Trainer(
        accelerator="auto",
        devices=1,
        max_epochs=1,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(module, DataLoader(batches, batch_size=None))
    return [p.detach().cpu() for p in module.parameters() if p.requires_grad]


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_each_padded_length_is_captured_once(graphs: Any, replays: Counter[Any]) -> None:
    expected = fit(Net())
    assert not replays
    module, callback = Net(), graphs.GraphedBlocks()
    close(fit(module, callback), expected)
    assert replays == {"passes": 4, "captured": 2}
    assert all("forward" not in part.__dict__ for part in module.modules())


def test_other_parameters_are_captured_anew(graphs: Any, replays: Counter[Any]) -> None:
    callback = graphs.GraphedBlocks()
    fit(Net(), callback, lengths=(20, 20))
    close(fit(Net(), callback, lengths=(20, 20)), fit(Net(), lengths=(20, 20)))
    assert replays == {"passes": 4, "captured": 2}


def test_a_second_pass_of_a_step_runs_without_graphs(graphs: Any, replays: Counter[Any]) -> None:
    expected = fit(Net(passes=2))
    close(fit(Net(passes=2), graphs.GraphedBlocks()), expected)
    assert replays == {"passes": 4, "captured": 2}


def test_hooks_inside_blocks_are_heard(graphs: Any, replays: Counter[Any]) -> None:
    module, heard = Net(), []
    layer = module.model.base_model.model.model.layers[1].mlp
    handle = layer.register_forward_hook(lambda *args: heard.append(args))
    fit(module, graphs.GraphedBlocks())
    assert len(heard) == 4
    assert not replays
    handle.remove()
    undo = run_uncompiled(module, [layer])  # as this package's own hooks tell of themselves
    fit(module, graphs.GraphedBlocks())
    assert not replays
    undo()
    fit(module, graphs.GraphedBlocks())
    assert replays["passes"] == 4


def test_gradients_are_not_accumulated_in_the_memory_of_graphs(graphs: Any) -> None:
    with pytest.raises(MisconfigurationException, match=r"`accumulate_grad_batches=2` would lose them. Use 1, or no"):
        fit(Net(), graphs.GraphedBlocks(), accumulate_grad_batches=2)
