# SPDX-License-Identifier: Apache-2.0
"""Token losses of a large vocabulary, whose logits never exist as a whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_cl.modules import token_losses as module
from tests.helpers.models import lora, tiny_llama


def _batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(4, 128, (3, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :3] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _losses(model: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    batch = _batch()
    losses = module.token_losses(model, batch, module.token_targets(batch))
    parameters = [p for p in model.parameters() if p.requires_grad]
    return losses, list(torch.autograd.grad((losses * torch.arange(len(losses))).sum(), parameters, allow_unused=True))


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    import lightning_cl.functional.token_cross_entropy as functional

    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 5 * 128)
    monkeypatch.setattr(functional, "CHUNK_ELEMENTS", 5 * 128)


@pytest.mark.parametrize("make", [tiny_llama, lambda: tiny_llama(tie_word_embeddings=True), lambda: lora(tiny_llama())])
def test_chunks_change_neither_losses_nor_gradients(request: Any, make: Any) -> None:
    expected, expected_gradients = _losses(make())
    request.getfixturevalue("small_chunks")
    model = make()
    for _ in range(2):
        found, gradients = _losses(model)
        torch.testing.assert_close(found, expected)
        for a, b in zip(gradients, expected_gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_head_is_applied_to_one_position_alone(small_chunks: None) -> None:
    model = lora(tiny_llama())
    seen: list[torch.Size] = []
    model.get_output_embeddings().register_forward_hook(lambda m, args, out: seen.append(out.shape))
    _losses(model)
    assert seen == [torch.Size([1, 1, 128])]


def test_logits_that_are_changed_after_the_head_are_taken_from_the_model(small_chunks: None, request: Any) -> None:
    class Scaled(type(tiny_llama())):  # type: ignore[misc]  # a family that nobody here knows of
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 3
            return output

    model, plain = tiny_llama(), tiny_llama()
    model.__class__ = Scaled
    batch = _batch()
    logits = plain(**{k: v for k, v in batch.items() if k != "labels"}).logits * 3
    targets = module.token_targets(batch)
    expected = torch.nn.functional.cross_entropy(targets.positions.take(logits), targets.targets, reduction="none")
    for _ in range(2):
        torch.testing.assert_close(_losses(model)[0], expected)
