# SPDX-License-Identifier: Apache-2.0
"""Token losses against the full logits of the model."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lightning_cl.modules.token_losses import (
    Positions,
    model_inputs,
    output_at,
    row_weights,
    token_losses,
    token_targets,
)
from tests.helpers.models import lora, tiny_llama


def batch_of(rows=3, length=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 128, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def by_full_logits(model, batch):
    """Per-row sums and counts from all logits, token by token."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
    sums, counts = [], []
    for i in range(len(logits)):
        total, count = torch.zeros(()), 0.0
        for t in range(logits.shape[1] - 1):
            target = batch["labels"][i, t + 1]
            if target != -100:
                weight = float(batch["loss_weight"][i, t + 1]) if "loss_weight" in batch else 1.0
                total = total - weight * F.log_softmax(logits[i, t], dim=-1)[target]
                count += weight
        sums.append(total)
        counts.append(count)
    return torch.stack(sums), torch.tensor(counts)


@pytest.mark.parametrize("make", [tiny_llama, lambda: tiny_llama(tie_word_embeddings=True), lambda: lora(tiny_llama())])
@pytest.mark.parametrize("weighted", [False, True])
def test_losses_and_gradients_equal_those_of_full_logits(make, weighted):
    model, batch = make(), batch_of()
    if weighted:
        batch["loss_weight"] = torch.rand(batch["labels"].shape, generator=torch.Generator().manual_seed(1))
    targets = token_targets(batch)
    losses = token_losses(model, batch, targets)
    sums, counts = by_full_logits(model, batch)
    ours = targets.sum_by_row(losses * targets.weights)
    torch.testing.assert_close(ours, sums)
    torch.testing.assert_close(targets.sum_by_row(targets.weights), counts)
    torch.testing.assert_close(row_weights(batch), counts)
    parameters = [p for p in model.parameters() if p.requires_grad]
    ours_grad = torch.autograd.grad(ours.sum(), parameters, allow_unused=True)
    theirs = torch.autograd.grad(sums.sum(), parameters, allow_unused=True)
    for a, b in zip(ours_grad, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_the_head_sees_labelled_positions_alone_and_the_hook_goes():
    model, batch = tiny_llama(), batch_of()
    seen = []
    handle = model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    token_losses(model, batch, token_targets(batch))
    handle.remove()
    assert seen == [(1, 6 + 3 + 6, 128)]
    assert not model.lm_head._forward_pre_hooks
    assert model(input_ids=batch["input_ids"]).logits.shape == (3, 9, 128)


def test_hook_goes_after_an_exception():
    model = tiny_llama()
    with pytest.raises(ValueError, match="input_ids"):
        output_at(model, {"input_ids": None}, Positions.of(torch.ones(1, 1, dtype=torch.bool)))
    assert not model.lm_head._forward_pre_hooks


def test_soft_caps_of_the_family_stay():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, final_logit_softcapping=0.5, attn_logit_softcapping=5.0, sliding_window=4,
    )  # fmt: skip
    model, batch = Gemma2ForCausalLM(config).eval(), batch_of()
    targets = token_targets(batch)
    sums, _ = by_full_logits(model, batch)
    torch.testing.assert_close(targets.sum_by_row(token_losses(model, batch, targets)), sums)


def test_compiled_model_gives_the_same():
    model, batch = tiny_llama(), batch_of()
    targets = token_targets(batch)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(token_losses(compiled, batch, targets), token_losses(model, batch, targets))


def test_packed_batch_equals_the_padded_one():
    model = tiny_llama()
    batch = batch_of()
    lengths = batch["attention_mask"].sum(1).tolist()
    packed = {
        key: torch.cat([batch[key][i, :n] for i, n in enumerate(lengths)])[None] for key in ("input_ids", "labels")
    }
    packed["labels"][0, [0, 9, 15]] = 7  # a first token with a label: nothing predicts it
    packed["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None]
    targets, padded = token_targets(packed), token_targets(batch)
    assert targets.num_rows == 3
    assert targets.rows.tolist() == padded.rows.tolist()
    assert row_weights(packed).tolist() == row_weights(batch).tolist() == [6, 3, 6]
    ours = targets.sum_by_row(token_losses(model, packed, targets))
    torch.testing.assert_close(ours, padded.sum_by_row(token_losses(model, batch, padded)))


def test_what_belongs_to_the_model():
    batch = {**batch_of(), "metric": "loss", "row": torch.zeros(3), "position_ids": torch.zeros(3, 9)}
    assert set(model_inputs(batch)) == {"input_ids", "attention_mask", "position_ids"}
