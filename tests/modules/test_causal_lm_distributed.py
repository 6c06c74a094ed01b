# SPDX-License-Identifier: Apache-2.0
"""Evaluation and training of CausalLMModule in two processes, replicated and sharded, against one process."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_cl.data import Collator, EncodedDataset, Encoder, EvalSampler
from lightning_cl.modules import CausalLMModule
from tests.helpers import spawn
from tests.helpers.models import tiny_llama, tiny_tokenizer
from tests.helpers.models import trainer as make_trainer

WORDS = ["red", "blue", "green"]
ROWS = [
    {"prompt": f"{w} {'x' * i}?", "answer": w, "options": WORDS if i % 2 else [*WORDS, "another one"]}
    for i in range(4)
    for w in WORDS
][:11]
TEXTS = [{"text": "some words to read " + "again " * i} for i in range(5)]
METRICS = {"accuracy": ROWS, "exact_match": ROWS, "rouge_l": ROWS[:3], "loss": TEXTS}


class Sharded(CausalLMModule):
    """FSDP2 as a user writes it for `ModelParallelStrategy`."""

    def configure_model(self):
        from torch.distributed.fsdp import fully_shard

        if hasattr(self.model, "unshard"):
            return
        mesh = self.device_mesh["data_parallel"]
        for block in self.model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)


def loaders(pl_module, rank, world_size):
    encoder = Encoder.for_module(pl_module, template="none")
    made = []
    for metric, rows in METRICS.items():
        dataset = EncodedDataset(rows, encoder, "eval", metric)
        sampler = EvalSampler(dataset.lengths(), rank, world_size)
        made.append(DataLoader(dataset, batch_size=2, sampler=sampler, collate_fn=Collator(encoder.pad_token_id)))
    return made


def evaluate(rank, folder, strategy, world_size):
    cls, options = CausalLMModule, {"strategy": "ddp"} if strategy == "ddp" else {}
    if strategy == "fsdp2":
        from lightning.pytorch.strategies import ModelParallelStrategy

        cls = Sharded
        options["strategy"] = ModelParallelStrategy(data_parallel_size=world_size, tensor_parallel_size=1)
    pl_module = cls(tiny_llama(), tokenizer=tiny_tokenizer(), max_new_tokens=5)
    # Ranks whose answers end at different lengths: the first token of many rows is the end.
    with torch.no_grad():
        pl_module.model.lm_head.weight[2] += pl_module.model.lm_head.weight[60] * 1.5
    trainer = make_trainer(folder, devices=world_size, **options)
    results = trainer.validate(pl_module, loaders(pl_module, rank, world_size), verbose=False)
    trained = train(rank, folder, world_size) if strategy == "ddp" else []
    spawn.save(folder, rank, ([dict(result) for result in results], pl_module.row_scores, trained))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_score_as_one(tmp_path, strategy):
    (tmp_path / "one").mkdir()
    evaluate(0, tmp_path / "one", "auto", 1)
    ((expected, expected_rows, _),) = spawn.load(tmp_path / "one", 1)
    spawn.run(evaluate, 2, tmp_path, strategy, 2)
    ranks = spawn.load(tmp_path)
    for a, b in zip(ranks[0][2], ranks[1][2], strict=True):
        torch.testing.assert_close(a, b)
        assert a.isfinite().all()
    for results, rows, _ in ranks:
        for index, (metric, source) in enumerate(METRICS.items()):
            name = f"val_{metric}/dataloader_idx_{index}"
            assert results[index][name] == pytest.approx(expected[index][name], abs=1e-5)
            assert len(rows[index]) == len(source)
            assert sorted(rows[index]) == pytest.approx(sorted(expected_rows[index]), abs=1e-5)
            if metric != "loss":  # batches by loss are any module's, so they carry no row numbers
                assert rows[index] == pytest.approx(expected_rows[index], abs=1e-5)


def train(rank, folder, world_size):
    """The parameters after two steps, where one rank has nothing to learn in the first: it must not hang the other."""
    pl_module = CausalLMModule(
        tiny_llama(), tokenizer=tiny_tokenizer(), optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1)
    )
    encoder = Encoder.for_module(pl_module, template="none")
    rows = [{"prompt": f"{w}?", "answer": w * 2} for w in ("ab", "cd", "ef", "gh")]
    rows = rows[rank::world_size]
    if rank == 0:
        rows[0] = {"text": "a"}
    data = DataLoader(EncodedDataset(rows, encoder), batch_size=1, collate_fn=Collator(encoder.pad_token_id))
    trainer = make_trainer(folder, devices=world_size, strategy="ddp", max_steps=2, use_distributed_sampler=False)
    trainer.fit(pl_module, data)
    return [parameter.detach().clone() for parameter in pl_module.parameters()]
