# SPDX-License-Identifier: Apache-2.0
"""Swaps of weights are exact and reversible, on one process and under FSDP1 and FSDP2 on two."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_cl import weights
from tests.helpers import models, spawn


def _shifted(module: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: p.detach() + 0.3 * torch.randn(p.shape, generator=generator)
        for name, p in weights.trainable(module).items()
    }


def _batch() -> Tensor:
    return torch.randint(4, 128, (3, 9), generator=torch.Generator().manual_seed(2))


def _model(case: str) -> nn.Module:
    """LoRA in the blocks, and head, final norm and embedding trainable as well."""
    model = models.lora(models.tiny_llama(tie_word_embeddings=case == "tied"), r=3)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("embed_tokens", "lm_head", "norm")):
            parameter.requires_grad_(True)
    return model


def _step(model: Any, ids: Tensor, shards: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """One training step whose loss pulls the hidden states to those that other weights give."""
    backbone = next(part for part in model.modules() if type(part).__name__.endswith("LlamaModel"))
    seen: dict[str, Tensor] = {}
    inside = []

    def reference(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if inside:
            return
        inside.append(True)
        with torch.no_grad(), weights.swapped(model, shards):
            seen["reference"] = backbone(*args, **kwargs).last_hidden_state.clone()
        inside.clear()

    def keep(_: nn.Module, args: Any, output: Any) -> None:
        seen["hidden"] = output.last_hidden_state

    handles = [
        backbone.register_forward_pre_hook(reference, with_kwargs=True, prepend=True),
        backbone.register_forward_hook(keep),
    ]
    loss = model(input_ids=ids, labels=ids).loss + (seen["hidden"] - seen["reference"]).pow(2).mean()
    for handle in handles:
        handle.remove()
    loss.backward()
    return loss.detach(), seen["reference"]


def _unsharded(case: str, steps: int = 2) -> tuple[list[Tensor], dict[str, Tensor], dict[str, Tensor], Tensor]:
    model = _model(case)
    slow = _shifted(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss, reference = _step(model, _batch(), slow)
        losses.append(loss)
        gradients = {n: p.grad.clone() for n, p in weights.trainable(model).items()}
        optimizer.step()
    return losses, gradients, {n: p.detach().clone() for n, p in weights.trainable(model).items()}, reference


def _fsdp2_worker(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo")
    spawn.save(folder, rank, {case: _fsdp2_case(rank, case) for case in ("tied", "untied")})


def _fsdp2_case(rank: int, case: str) -> tuple[Any, ...]:
    from torch.distributed.fsdp import fully_shard

    model = _model(case)
    slow = _shifted(model)
    for block in model.get_base_model().model.layers:
        fully_shard(block)
    fully_shard(model)
    parameters = weights.trainable(model)
    shards = weights.scatter(model, slow, parameters)
    optimizer = torch.optim.SGD(list(parameters.values()), lr=0.1)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss, reference = _step(model, _batch(), shards)
        losses.append(loss)
        gradients = {n: p.grad.full_tensor() for n, p in parameters.items()}
        optimizer.step()
    # An evaluation leaves the root group gathered, which a swap must not overlook.
    with torch.no_grad():
        model(input_ids=_batch())
        with weights.swapped(model, shards, parameters):
            swapped_logits = model(input_ids=_batch()).logits
        logits = model(input_ids=_batch()).logits
    weights.reshard(model)
    values = {n: p.detach().full_tensor() for n, p in parameters.items()}
    back = weights.gather(model, shards, parameters)
    assert list(back) == (list(slow) if rank == 0 else [])
    assert all(torch.equal(back[n], slow[n]) for n in back)
    assert any(p.shape[0] % 2 for p in parameters.values())  # shards of unequal size are among them
    return losses, gradients, values, reference, swapped_logits, logits


def _fsdp1_worker(rank: int, folder: Path, case: str) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    dist.init_process_group("gloo")
    model = _model(case)
    slow = _shifted(model)
    policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={LlamaDecoderLayer})
    wrapped = FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
    )
    parameters = weights.trainable(wrapped)
    assert list(parameters) == list(slow)
    shards = weights.scatter(wrapped, slow, parameters)
    assert all(shards[n].shape == weights.local(p).shape for n, p in parameters.items())
    backed = weights.gather(wrapped, shards, parameters, everywhere=True)
    assert all(torch.equal(backed[n], slow[n]) for n in slow)
    optimizer = torch.optim.SGD(list(parameters.values()), lr=0.1)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss, reference = _step(wrapped, _batch(), shards)
        losses.append(loss)
        optimizer.step()
    values = weights.gather(wrapped, {n: weights.local(p) for n, p in parameters.items()}, parameters, everywhere=True)
    spawn.save(folder, rank, (losses, values, reference))


def test_fsdp2_step_with_a_reference_pass_equals_the_unsharded_step(tmp_path: Path) -> None:
    spawn.run(_fsdp2_worker, 2, tmp_path)
    results = spawn.load(tmp_path)
    for case in ("tied", "untied"):
        losses, gradients, values, reference = _unsharded(case)
        model = _model(case)
        with torch.no_grad():
            for name, parameter in weights.trainable(model).items():
                parameter.copy_(values[name])
            logits = model(input_ids=_batch()).logits
            with weights.swapped(model, _shifted(_model(case))):
                slow_logits = model(input_ids=_batch()).logits
        for result in results:
            expected = (losses, gradients, values, reference, slow_logits, logits)
            for got, wanted in zip(result[case], expected, strict=True):
                torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_fsdp1_step_with_a_reference_pass_equals_the_unsharded_step(tmp_path: Path) -> None:
    losses, _, values, reference = _unsharded("untied")
    spawn.run(_fsdp1_worker, 2, tmp_path, "untied")
    for got_losses, got_values, got_reference in spawn.load(tmp_path):
        torch.testing.assert_close(got_losses, losses, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(got_reference, reference, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got_values, values, rtol=1e-5, atol=1e-6)


def test_swapped_restores_exactly_and_after_an_exception() -> None:
    model = models.lora(models.tiny_llama()).to(torch.bfloat16)
    values = {n: v.float() for n, v in _shifted(model).items()}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with weights.swapped(model, values):
        held = {n: p.detach().clone() for n, p in weights.trainable(model).items()}
    assert all(torch.equal(held[n], values[n].to(torch.bfloat16)) for n in values)
    with pytest.raises(RuntimeError, match="inside"), weights.swapped(model, values):
        raise RuntimeError("inside")
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_swapped_names_what_does_not_fit() -> None:
    net = nn.Linear(2, 3)
    with pytest.raises(ValueError, match=r"'nothing', which is no parameter of `Linear`"):
        weights.swapped(net, {"nothing": torch.zeros(1)}).__enter__()
    with pytest.raises(ValueError, match=r"shape \(2,\) for 'bias', whose local shard has shape \(3,\)"):
        weights.swapped(net, {"bias": torch.zeros(2)}).__enter__()


def test_scatter_refuses_a_tensor_of_another_model() -> None:
    net = nn.Linear(2, 3)
    with pytest.raises(ValueError, match=r"saved tensor of 'bias' has shape \(2,\), the parameter \(3,\)"):
        weights.scatter(net, {"bias": torch.zeros(2)}, dict(net.named_parameters()))


def test_a_tied_weight_is_listed_once_and_swapped_in_both_places() -> None:
    model = models.tiny_llama(tie_word_embeddings=True)
    assert "lm_head.weight" not in weights.trainable(model)
    with weights.swapped(model, {"model.embed_tokens.weight": torch.ones(128, 32)}):
        assert torch.equal(model.lm_head.weight, torch.ones(128, 32))


def test_adapters_disabled_gives_the_base_model_with_its_original_modules() -> None:
    base = models.tiny_llama()
    with torch.no_grad():
        expected = base(input_ids=_batch()).logits
    model = models.lora(base, modules_to_save=["lm_head"])
    with torch.no_grad():
        for _, parameter in weights.trainable(model).items():
            parameter.add_(0.1)
        changed = model(input_ids=_batch()).logits
        names = set(weights.trainable(model))
        with weights.adapters_disabled(model):
            assert torch.equal(model(input_ids=_batch()).logits, expected)
            assert set(weights.trainable(model)) == names  # the optimizer's view does not change
        assert torch.equal(model(input_ids=_batch()).logits, changed)
    assert not torch.equal(changed, expected)


def test_local_shares_memory_and_has_no_graph() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    weights.local(parameter).add_(1)
    assert parameter.tolist() == [1.0, 1.0, 1.0]
    assert not weights.local(parameter).requires_grad
    assert not weights.is_sharded(nn.Linear(1, 1))
