# SPDX-License-Identifier: Apache-2.0
"""Routing inside one forward pass, and in `generate`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_cl.modules.option_scores import option_scores
from lightning_cl.routing.features import prompt_mask
from lightning_cl.routing.router import BASE
from lightning_cl.strategies.blocks import find_shard_blocks, prepare_blocks
from tests.helpers import models
from tests.routing.tools import PROMPTS, TASKS, Setup, prompts


def reference(ready: Setup, batch: dict[str, Tensor]) -> tuple[list[str], Tensor]:
    """One by one: features, route, and a run with that adapter active, without any of our hooks."""
    ready.routed.detach()
    names, outputs = [], []
    for row in range(len(batch["input_ids"])):
        keep = batch["attention_mask"][row].bool()
        ids = batch["input_ids"][row][keep][None]
        hidden: list[Tensor] = []
        blocks = ready.model.base_model.model.model.layers
        handle = blocks[0].register_forward_hook(
            lambda m, a, o, h=hidden: h.append(o[0] if isinstance(o, tuple) else o)
        )
        ready.model(input_ids=ids)
        handle.remove()
        router = ready.routed.router
        features = torch.relu(hidden[0][0].mean(0) @ router.expansion.matrix())
        names.append(f"task_{int((features.double() @ router.weight).argmax())}")
        ready.model.set_adapter(names[-1])
        outputs.append(ready.model(input_ids=ids).logits[0])
    ready.routed.attach()
    return names, torch.nn.utils.rnn.pad_sequence(outputs, batch_first=True)


def test_mixed_batch_equals_one_by_one(ready):
    batch = prompts()
    with torch.no_grad():
        names, expected = reference(ready, batch)
        found = ready.model(**batch).logits
    assert names == [f"task_{row % TASKS}" for row in range(8)]
    assert ready.routed.last.adapters == names
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=1e-4)


def test_routed_equals_the_routes_given_from_the_start_and_pefts_own(ready):
    batch = prompts()
    with torch.no_grad():
        found = ready.model(**batch).logits
        names = ready.routed.last.adapters
        with ready.routed.given(names):
            assert torch.equal(ready.model(**batch).logits, found)
        ready.routed.detach()
        pefts_own = ready.model(**batch, adapter_names=names).logits
    torch.testing.assert_close(found, pefts_own, atol=1e-5, rtol=1e-4)


def test_answers_are_not_seen_by_the_router(ready):
    batch = prompts()
    answer = PROMPTS[2][:3].repeat(8, 1)  # tokens of another task
    rows = [torch.cat([batch["input_ids"][i][batch["attention_mask"][i].bool()], answer[i]]) for i in range(8)]
    labels = [torch.cat([torch.full((len(row) - 3,), -100), row[-3:]]) for row in rows]
    whole = models.collate(
        [{"input_ids": r, "attention_mask": torch.ones_like(r), "labels": y} for r, y in zip(rows, labels, strict=True)]
    )
    with torch.no_grad():
        ready.model(**batch)
        scores = ready.routed.last.scores
        ready.model(**whole)  # the network sees the labels
        torch.testing.assert_close(ready.routed.last.scores, scores, atol=1e-5, rtol=1e-4)
        labels = whole.pop("labels")
        ready.routed.prompt = prompt_mask(whole["attention_mask"], labels)  # the module computes its loss itself
        ready.model(**whole)
        torch.testing.assert_close(ready.routed.last.scores, scores, atol=1e-5, rtol=1e-4)
        ready.routed.prompt = None
        ready.model(**whole)
        assert not torch.allclose(ready.routed.last.scores, scores, atol=1e-3)


@pytest.mark.parametrize(
    "options", [{}, {"use_cache": False}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}]
)
def test_generate_keeps_the_routes_of_the_prompt(ready, options):
    batch = prompts(left=True)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **options}
    copies = settings.get("num_return_sequences", 1)
    calls: list[list[str]] = []
    ready.routed.on_routes = lambda routes: calls.append(routes.adapters)
    torch.manual_seed(3)
    found = ready.model.generate(**batch, **settings)
    assert len(calls) == 1  # the prompt, and no decode step
    ready.routed.detach()
    expected = [f"task_{row % TASKS}" for row in range(8)]
    torch.manual_seed(3)
    given = ready.model.generate(**batch, adapter_names=[n for n in expected for _ in range(copies)], **settings)
    assert torch.equal(found, given)
    assert "generate" not in vars(ready.model)


def test_a_call_with_adapters_named_by_the_user_wins(ready):
    batch = prompts()
    with torch.no_grad():
        found = ready.model(**batch, adapter_names=["task_2"] * 8).logits
        with ready.routed.given("task_2"):
            assert torch.equal(ready.model(**batch).logits, found)
        with (
            pytest.raises(ValueError, match="3 adapters were given for a batch of 8 samples"),
            ready.routed.given(["a"] * 3),
        ):
            ready.model(**batch)


@pytest.mark.parametrize("way", ["side_by_side", "branches", "each"])
def test_options_scored_on_a_cached_prompt_take_the_prompts_routes(ready, way, monkeypatch):
    if way == "branches":  # chunks of rows that go on from a copy of the cache, in another number than the prompts were
        monkeypatch.setattr("lightning_cl.modules.option_scores._reads_masks", lambda *args: False)
        monkeypatch.setattr("lightning_cl.modules.option_scores._rows_at_once", lambda *args: 4)
    batch = prompts(left=True)
    options = torch.randint(4, 128, (8, 2, 3))
    batch |= {"option_ids": options, "option_mask": torch.ones_like(options, dtype=torch.bool)}
    with torch.no_grad():
        ready.routed.prompt = prompt_mask(batch["attention_mask"], None)
        found = option_scores(ready.model, batch, share_prompt=way != "each")
        expected = []
        for row in range(8):  # the routes given by hand, one row at a time
            with ready.routed.given(f"task_{row % TASKS}"):
                one = {k: v[row : row + 1] for k, v in batch.items()}
                expected.append(option_scores(ready.model, one, share_prompt=False))
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-4, rtol=1e-4)


def test_rows_that_continue_from_an_unknown_cache_are_refused(ready):
    batch = prompts()
    with torch.no_grad():
        first = ready.model(**batch, use_cache=True).past_key_values
        ready.model(**prompts(rows=6, seed=5))
        with pytest.raises(ValueError, match="8 rows continue from a cache, but the 6 prompts that were routed last"):
            ready.model(input_ids=batch["input_ids"][:, :1], past_key_values=first)


def test_base_answers_below_the_margin_and_for_the_general_class():
    batch = prompts()
    sure, general = Setup(min_margin=10.0), Setup(general=True)
    with torch.no_grad():
        found = sure.model(**batch).logits
        assert sure.routed.last.adapters == [BASE] * 8
        assert sure.routed.last.names == [f"t{row % TASKS}" for row in range(8)]
        with sure.model.disable_adapter():
            assert torch.equal(sure.model(**batch).logits, found)
        general.model(**batch)
    assert general.routed.last.adapters[:3] == ["task_0", BASE, "task_2"]
    assert general.routed.last.names[1] == "general"
    assert bool((general.routed.last.margin > 0).all())


def test_training_paused_and_detached_leave_the_active_adapter(ready):
    batch = prompts()
    ready.bank.activate("task_1")
    with torch.no_grad(), ready.routed.given("task_1"):
        expected = ready.model(**batch).logits
    ready.routed.last = None
    with torch.no_grad():
        with ready.routed.paused():
            assert torch.equal(ready.model(**batch).logits, expected)
        ready.module.train()
        assert torch.equal(ready.model(**batch).logits, expected)
        ready.module.eval()
        ready.routed.detach()
        assert torch.equal(ready.model(**batch).logits, expected)
    assert ready.routed.last is None
    assert not ready.routed.attached
    assert all(not part._forward_hooks and not part._forward_pre_hooks for part in ready.module.modules())


def test_an_exception_in_a_call_does_not_spoil_the_next_one(ready):
    batch = prompts()
    with pytest.raises(Exception, match=r"[Ss]hape|size|dimension|target"):
        ready.model(**batch, labels=torch.zeros(3, 3, dtype=torch.long))
    with torch.no_grad():
        ready.model(**batch)
    assert ready.routed.last.adapters == [f"task_{row % TASKS}" for row in range(8)]


def test_packed_batch_is_refused(ready):
    ids = torch.randint(4, 30, (1, 10))
    positions = torch.cat([torch.arange(6), torch.arange(4)])[None]
    with pytest.raises(ValueError, match="packs several samples into one row"):
        ready.model(input_ids=ids, position_ids=positions)


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_blocks_are_routed_and_train_without_the_hooks(traces, attached, recompute):
    """Blocks share their compiled code: it must not be that of blocks without a router's hooks, nor of blocks below."""
    plain, compiled = Setup(), Setup()
    batch = prompts()
    if not attached:
        compiled.routed.detach()
    prepare_blocks(compiled.model, find_shard_blocks(compiled.model), recompute=recompute, compile=True)
    with torch.no_grad():
        compiled.model(**batch, use_cache=False)
        compiled.routed.attach()
        for _ in range(2):
            expected = plain.model(**batch, use_cache=False).logits
            assert torch.equal(compiled.model(**batch, use_cache=False).logits, expected)
            assert compiled.routed.last.adapters == plain.routed.last.adapters
    before = traces.frame_count
    gradients = []
    for ready in (plain, compiled):
        ready.model.train()
        ready.model.set_adapter("task_1")
        ready.model(**batch, labels=batch["input_ids"]).loss.backward()
        gradients.append({name: p.grad for name, p in ready.model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*gradients)
    assert gradients[0]
    # Blocks below the feature layer have fewer adapters; hooks make no difference.
    assert traces.frame_count == before + 2


@pytest.mark.parametrize("how", ["block", "forward"])
def test_compiled_networks_are_routed_too(how):
    plain, compiled = Setup(), Setup()
    batch = prompts()
    with torch.no_grad():
        expected = plain.model(**batch).logits
        compiled.routed.detach()
        for block in compiled.model.base_model.model.model.layers:
            if how == "block":
                block.compile(backend="eager")
            else:
                block.forward = torch.compile(block.forward, backend="eager")
        compiled.model(**batch)  # compiled without hooks
        compiled.routed.attach()
        torch.testing.assert_close(compiled.model(**batch).logits, expected)
    assert compiled.routed.last.adapters == plain.routed.last.adapters
