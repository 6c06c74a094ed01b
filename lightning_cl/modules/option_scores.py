# SPDX-License-Identifier: Apache-2.0
"""How likely each option is as the answer, with the prompt read once for all of them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_cl.anatomy import accepts, cache_name
from lightning_cl.distributed import gather_objects
from lightning_cl.modules.token_losses import Positions, output_at

_CPU_CACHE_BYTES = 1 << 30


@torch.no_grad()
def option_scores(
    model: nn.Module, batch: Mapping[str, Any], length_rule: Literal["sum", "mean"] = "sum", share_prompt: bool = True
) -> Tensor:
    """The log-likelihood of each option after its prompt, float32 ``[B, O]``; -inf where a row has fewer options.

    The prompt is run once. Its key-value cache then serves all options in one further pass, side by side under a mask
    that hides them from each other; or, where attention takes no such mask (sliding windows, flash attention), in copies
    of the cache. Models without such a cache (state-space and other recurrent ones) read the prompt once for each option.
    The result is the same.

    Args:
        model: a Hugging Face causal LM.
        batch: ``input_ids`` and ``attention_mask`` ``[B, P]``, padded on the left; ``option_ids`` and ``option_mask``
            ``[B, O, L]``, padded on the right.
        length_rule: ``"sum"``: the log-probability of the whole option, its end token included, which is what training
            on answers maximises; an option that begins another is told from it by its end. ``"mean"``: divided by the
            option's number of tokens, which favours long options less than ``"sum"`` does short ones in a model that
            was not trained on the answers.
        share_prompt: False reads the prompt once for each option.
    """
    mask = batch["option_mask"]
    logprobs = _shared(model, batch) if share_prompt else None
    if logprobs is None:
        logprobs = _each(model, batch)
    scores = (logprobs * mask).sum(-1)
    if length_rule == "mean":
        scores = scores / mask.sum(-1).clamp_min(1)
    return scores.masked_fill(~mask.any(-1), -torch.inf)


def positions(attention_mask: Tensor) -> Tensor:
    """Position ids that count real tokens alone, ``[B, T]``."""
    return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)


def is_sharded(model: nn.Module) -> bool:
    """Whether ranks must run the model equally often, since each holds a part of the weights."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def _shared(model: nn.Module, batch: Mapping[str, Any]) -> Tensor | None:
    ids, mask = batch["option_ids"], batch["option_mask"]
    prompt_mask = batch["attention_mask"]
    rows, options, length = ids.shape
    last = torch.zeros_like(prompt_mask, dtype=torch.bool)
    last[:, -1] = True
    inputs = {"input_ids": batch["input_ids"], "attention_mask": prompt_mask}
    if accepts(model, "position_ids"):
        inputs["position_ids"] = positions(prompt_mask)
    logits, output = output_at(model, inputs, Positions.of(last), use_cache=True)
    cache = getattr(output, cache_name(model), None)
    if not _can_branch(cache):
        return None
    first = logits.float().log_softmax(-1)
    logprobs = torch.zeros(ids.shape, dtype=torch.float32, device=ids.device)
    logprobs[:, :, 0] = first.gather(1, ids[:, :, 0])
    sharded = is_sharded(model)
    if length == 1 and not sharded:
        return logprobs
    if _reads_masks(model, cache):
        logprobs[:, :, 1:] = _side_by_side(model, cache, batch)
        return logprobs * mask
    at_once = _rows_at_once(cache, rows, options, ids.device)
    passes = -(-rows // at_once)
    for number in range(max(gather_objects(passes)) if sharded else passes):
        # Ranks with fewer rows repeat their last pass: a sharded model must be called equally often everywhere.
        start = min(number, passes - 1) * at_once
        part = slice(start, min(start + at_once, rows))
        if length > 1:
            logprobs[part, :, 1:] = _continue(model, cache, batch, part)
    return logprobs * mask


def _side_by_side(model: Any, cache: Any, batch: Mapping[str, Any]) -> Tensor:
    """All options of a row in one sequence after its prompt, each blind to the others: no copy of the cache."""
    ids, mask, prompt_mask = batch["option_ids"], batch["option_mask"], batch["attention_mask"].bool()
    rows, options, length = ids.shape
    steps = max(length - 1, 1)  # sharded ranks make this pass even where options have one token
    known = mask[:, :, :steps].reshape(rows, options * steps)
    place = torch.arange(options * steps, device=ids.device)
    same = (place[:, None] // steps == place[None] // steps) & (place[:, None] >= place[None])
    visible = torch.cat([prompt_mask[:, None].expand(-1, options * steps, -1), same[None] & known[:, None]], dim=2)
    # A place that sees nothing at all would be NaN; it is never scored.
    visible[:, place, prompt_mask.shape[1] + place] = True
    attention_mask = visible[:, None]
    if model.config._attn_implementation == "eager":
        dtype = model.get_input_embeddings().weight.dtype
        attention_mask = torch.zeros(attention_mask.shape, dtype=dtype, device=ids.device).masked_fill(
            ~attention_mask, torch.finfo(dtype).min
        )
    scored = torch.zeros((rows, options, steps), dtype=torch.bool, device=ids.device)
    scored[:, :, : length - 1] = mask[:, :, 1:]
    inputs = {
        "input_ids": ids[:, :, :steps].reshape(rows, options * steps),
        "attention_mask": attention_mask,
        "position_ids": prompt_mask.long().sum(-1)[:, None] + (place % steps)[None],
        cache_name(model): cache,
    }
    if length == 1:
        scored[0, 0, 0] = True
    logits, _ = output_at(model, inputs, Positions.of(scored.reshape(rows, options * steps)), use_cache=True)
    if length == 1:
        return logits.new_zeros((rows, options, 0), dtype=torch.float32)
    return _gathered(logits, ids[:, :, 1:], mask[:, :, 1:])


def _continue(model: nn.Module, cache: Any, batch: Mapping[str, Any], part: slice) -> Tensor:
    ids, mask, prompt_mask = batch["option_ids"][part], batch["option_mask"][part], batch["attention_mask"][part]
    rows, options, length = ids.shape
    index = torch.arange(part.start, part.start + rows, device=ids.device).repeat_interleave(options)
    branch = copy.copy(cache)
    branch.layers = [copy.copy(layer) for layer in cache.layers]
    branch.batch_select_indices(index)
    known = mask[:, :, :-1].reshape(rows * options, length - 1).to(prompt_mask.dtype)
    inputs = {
        "input_ids": ids[:, :, :-1].reshape(rows * options, length - 1),
        "attention_mask": torch.cat([prompt_mask.repeat_interleave(options, 0), known], dim=1),
        cache_name(model): branch,
    }
    if accepts(model, "position_ids"):
        start = prompt_mask.long().sum(-1).repeat_interleave(options)[:, None]
        inputs["position_ids"] = start + torch.arange(length - 1, device=ids.device)
    scored = mask[:, :, 1:].reshape(rows * options, length - 1)
    logits, _ = output_at(model, inputs, Positions.of(scored), use_cache=True)
    return _gathered(logits, ids[:, :, 1:], mask[:, :, 1:])


def _each(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    ids, mask, prompt_mask = batch["option_ids"], batch["option_mask"], batch["attention_mask"]
    options, width = ids.shape[1], prompt_mask.shape[1]
    logprobs = torch.zeros(ids.shape, dtype=torch.float32, device=ids.device)
    passes = max(gather_objects(options)) if is_sharded(model) else options
    for number in range(passes):
        option = min(number, options - 1)
        whole = torch.cat([prompt_mask, mask[:, option].to(prompt_mask.dtype)], dim=1)
        inputs = {"input_ids": torch.cat([batch["input_ids"], ids[:, option]], dim=1), "attention_mask": whole}
        if accepts(model, "position_ids"):
            inputs["position_ids"] = positions(whole)
        scored = torch.zeros_like(whole, dtype=torch.bool)
        scored[:, width - 1 : -1] = mask[:, option]
        logits, _ = output_at(model, inputs, Positions.of(scored), use_cache=False)
        logprobs[:, option] = _gathered(logits, ids[:, option], mask[:, option])
    return logprobs


def _gathered(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Log-probabilities of ``ids`` where ``mask``, 0 elsewhere; ``logits`` are those of the masked places, in order."""
    values = logits.float().log_softmax(-1).gather(1, ids[mask][:, None])[:, 0]
    return torch.zeros(ids.shape, dtype=torch.float32, device=ids.device).masked_scatter(mask, values)


def _reads_masks(model: Any, cache: Any) -> bool:
    """Whether the model takes a mask of what each token sees, and tells places by position ids alone."""
    config = model.config
    return (
        getattr(config, "_attn_implementation", None) in ("sdpa", "eager")
        and {type(layer).__name__ for layer in cache.layers} == {"DynamicLayer"}  # a window would count all options
        and accepts(model, "position_ids")
        and not getattr(config, "alibi", False)
    )


def _can_branch(cache: Any) -> bool:
    # Known kinds alone: a recurrent state in the cache could not be continued from several times by copying keys.
    kinds = {type(layer).__name__ for layer in getattr(cache, "layers", ())}
    return bool(kinds) and kinds <= {"DynamicLayer", "DynamicSlidingWindowLayer"}


def _rows_at_once(cache: Any, rows: int, options: int, device: torch.device) -> int:
    """How many rows' caches may be copied once for each option at the same time."""
    size = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    room = torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" else _CPU_CACHE_BYTES
    return max(1, min(rows, int(room // max(1, size // rows * options))))
