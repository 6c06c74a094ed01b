# SPDX-License-Identifier: Apache-2.0
"""Decode models built like Llama with a third of the kernels: joined weights, adapters merged into them, one cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn import functional as F

# Families whose block is exactly what `_Block` holds. Others decode with their own forward.
_FAMILIES = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"}
# Rotations that do not change with the number of tokens seen so far.
_ROTATIONS = ("default", "linear", "llama3", "yarn")
# Of the free memory, for the copies of the weights.
_SHARE = 0.3
# Root mean square of the logits' difference from the model's own, of their spread: bfloat16 leaves 0.02 in 30 layers.
_TOLERANCE, _TOLERANCE_16 = 0.02, 0.1


class _Block(NamedTuple):
    """One layer's weights in the compute dtype; matrices are ``[out, in]``."""

    norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    out: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor


class FusedNetwork:
    """The forward pass of a Llama, Mistral or Qwen2 for decoding alone.

    A decode step of a small model is bound by its number of kernels, not by what they compute: the library's own pass
    launches some 45 a layer, this one 15. Query, key and value are one product, and so are gate and up; adapters are
    merged into copies of the weights; the rotation is applied to all heads at once (to values as the identity); keys and
    values are written to one cache by one copy, and the query heads that share a key head are the attention kernel's
    queries, so that a key is read once. Rounding differs from the model's own pass; :meth:`agrees` bounds by how much.

    It holds a copy of the layers' weights, at most 30 % of the free memory of a GPU, until it is dropped.

    Args:
        model: A model of which :meth:`supports` is true, with plain (gathered) weights.
    """

    def __init__(self, model: Any) -> None:
        config = model.config
        self._model = model
        self._eps = float(config.rms_norm_eps)
        self._heads = config.num_attention_heads
        self._key_heads = config.num_key_value_heads
        self._scale = float(model.model.layers[0].self_attn.scaling)
        device = next(model.parameters()).device
        self._device = device
        weight = model.model.layers[0].input_layernorm.weight
        self.dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else weight.dtype
        self._embedding = self._weight(model.get_input_embeddings())
        self._head = self._weight(model.get_output_embeddings())
        self._norm = self._weight(model.model.norm)
        self._blocks = [self._block(layer) for layer in model.model.layers]
        self._width = self._blocks[0].qkv.shape[0] // (self._heads + 2 * self._key_heads)
        # Values are the heads that are not rotated.
        last = torch.arange(self._heads + 2 * self._key_heads, device=device) >= self._heads + self._key_heads
        self._is_value = last[:, None]

    @staticmethod
    def supports(model: Any, length: int) -> bool:
        """Whether rows of ``length`` tokens can be made of the model in this way.

        That takes its family, plain or LoRA layers, no sliding window in reach, and room for the copies.
        """
        # By name, because sharding puts a class of its own in front.
        if not _FAMILIES & {cls.__name__ for cls in type(model).__mro__}:
            return False
        config, window = model.config, getattr(model.config, "sliding_window", None)
        if config.hidden_act not in ("silu", "swish") or (window is not None and window < length):
            return False
        if model.model.rotary_emb.rope_type not in _ROTATIONS or type(model.get_input_embeddings()) is not nn.Embedding:
            return False
        layers = model.model.layers
        inputs = [getattr(one.self_attn, name) for one in layers for name in ("q_proj", "k_proj", "v_proj")]
        others = [getattr(one.mlp, name) for one in layers for name in ("gate_proj", "up_proj", "down_proj")]
        others += [one.self_attn.o_proj for one in layers]
        head = model.get_output_embeddings()
        devices = {p.device for p in model.parameters()}
        if len(devices) != 1 or not all(_copyable(part) for part in [*inputs, *others, head]):
            return False
        if any(_base(part).bias is not None for part in [*others, head]):
            return False
        device = devices.pop()
        if device.type != "cuda":
            return True
        size = sum(_base(part).weight.nbytes for part in inputs + others)
        free = torch.cuda.mem_get_info(device)[0]
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return size <= _SHARE * free

    def agrees(self) -> bool:
        """Whether this pass gives the model's own logits up to rounding; warns if not.

        Something may act on the model that its family does not have: a hook, another kind of adapter, a changed forward.
        """
        vocabulary = len(self._head)
        tokens = torch.randint(vocabulary, (2, 6), generator=torch.Generator().manual_seed(0)).to(self._device)
        expected = self._model(input_ids=tokens, use_cache=False).logits[:, 4:].float()
        self.allocate(2, 8)
        with self.running():
            found = [self.forward(tokens[:, :5], torch.zeros(1, dtype=torch.long, device=self._device), None)]
            found += [self.forward(tokens[:, 5:], torch.full_like(tokens[0, :1], 5), 8)]
        spread = (expected - expected.mean(-1, keepdim=True)).norm().clamp_min(1e-6)
        error = float((torch.stack(found, 1).float() - expected).norm() / spread)
        self.allocate(0, 0)
        # A model without usable logits stops the generation itself, with the position.
        allowed = _TOLERANCE_16 if self.dtype.itemsize == 2 else _TOLERANCE
        if error <= allowed or not bool(expected.isfinite().all()):
            return True
        rank_zero_warn(
            f"`{type(self._model).__name__}` does not compute what its family does (logits differ by {error:.2g} of"
            " their spread: a hook, an unusual adapter, a changed forward?), so rows are generated with its own forward"
            " pass, which is slower."
        )
        return False

    @property
    def recordable(self) -> bool:
        """Whether a step can be recorded: always."""
        return True

    @contextmanager
    def running(self) -> Iterator[None]:
        """No cuDNN attention, which plans anew for each length of the cache, and no casts: all is in one dtype."""
        from torch.nn.attention import SDPBackend, sdpa_kernel

        kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        with sdpa_kernel(kernels), torch.autocast(self._device.type, enabled=False):
            yield

    def allocate(self, rows: int, room: int) -> None:
        """Make the cache of each layer: keys' and values' heads together, ``[rows, heads, room, width]``."""
        shape = (rows, 2 * self._key_heads, room, self._width)
        self._caches = [torch.zeros(shape, device=self._device, dtype=self.dtype) for _ in self._blocks]
        self._places = torch.arange(room, device=self._device)
        if room:
            like = torch.zeros(1, device=self._device, dtype=self.dtype)
            cos, sin = (part[0] for part in self._model.model.rotary_emb(like, self._places[None]))
            # rotate_half(x) is x rolled by half its width with the first half negated; the sign goes into the sine.
            sign = torch.where(torch.arange(self._width, device=self._device) < self._width // 2, -1.0, 1.0)
            self._cos, self._sin = cos, sin * sign.to(sin.dtype)

    def reset(self) -> None:
        """Forget all positions: what the mask hides needs no clearing."""

    def forward(self, tokens: Tensor, position: Tensor, visible: int | None) -> Tensor:
        """Logits ``[B, V]`` after ``tokens [B, T]``, the first of which stands at ``position [1]``.

        With ``T > 1`` the tokens must be the first of their rows; with ``T = 1`` attention sees the first ``visible``
        places of the cache, up to ``position``.
        """
        rows, count = tokens.shape
        places = position + torch.arange(count, device=self._device) if count > 1 else position
        wide = (count, len(self._is_value), self._width)
        cos = self._cos.index_select(0, places)[:, None].expand(wide).masked_fill(self._is_value, 1.0)
        sin = self._sin.index_select(0, places)[:, None].expand(wide).masked_fill(self._is_value, 0.0)
        seen = len(self._places) if visible is None else visible
        hidden = self._places[:seen] > position
        mask = torch.zeros(1, 1, 1, seen, device=self._device, dtype=self.dtype).masked_fill_(hidden, -float("inf"))
        mask = mask.expand(rows, self._key_heads, self._heads // self._key_heads, seen)
        x = F.embedding(tokens.reshape(-1), self._embedding)
        for block, cache in zip(self._blocks, self._caches, strict=True):
            qkv = F.linear(self._normed(x, block.norm), block.qkv, block.qkv_bias)
            qkv = qkv.view(rows, count, -1, self._width)
            qkv = torch.addcmul(qkv * cos, qkv.roll(self._width // 2, -1), sin)
            query, new = qkv[:, :, : self._heads], qkv[:, :, self._heads :].transpose(1, 2)
            cache.index_copy_(2, places, new)
            if count == 1:
                key, value = cache[:, : self._key_heads, :seen], cache[:, self._key_heads :, :seen]
                query = query.reshape(rows, self._key_heads, -1, self._width)
                found = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=self._scale)
                # The kernel leaves its queries before its heads: a view, where heads before queries would be a copy.
                found = found.transpose(1, 2)
            else:
                key, value = new.chunk(2, 1)
                groups = self._heads // self._key_heads
                key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
                query = query.transpose(1, 2)
                found = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=self._scale)
                found = found.transpose(1, 2).unflatten(2, (self._key_heads, groups)).transpose(2, 3)
            # In place: the sum with the residual stream happens inside the product.
            x.addmm_(found.reshape(rows * count, -1), block.out.T)
            gate, up = F.linear(self._normed(x, block.mlp_norm), block.gate_up).chunk(2, -1)
            x.addmm_(F.silu(gate).mul_(up), block.down.T)
        return F.linear(self._normed(x.view(rows, count, -1)[:, -1], self._norm), self._head)

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self._eps)

    def _block(self, layer: Any) -> _Block:
        attention, mlp = layer.self_attn, layer.mlp
        inputs = [attention.q_proj, attention.k_proj, attention.v_proj]
        biases = [_base(part).bias for part in inputs]
        return _Block(
            norm=self._weight(layer.input_layernorm),
            qkv=torch.cat([self._weight(part) for part in inputs]),
            qkv_bias=None if biases[0] is None else torch.cat(biases).detach().to(self.dtype),
            out=self._regrouped(self._weight(attention.o_proj)),
            mlp_norm=self._weight(layer.post_attention_layernorm),
            gate_up=torch.cat([self._weight(mlp.gate_proj), self._weight(mlp.up_proj)]),
            down=self._weight(mlp.down_proj),
        )

    def _regrouped(self, weight: Tensor) -> Tensor:
        """The output projection's columns in the order of `forward`: key heads within each place of their groups."""
        groups = self._heads // self._key_heads
        return weight.unflatten(1, (self._key_heads, groups, -1)).transpose(1, 2).flatten(1)

    def _weight(self, part: Any) -> Tensor:
        """A layer's weight in the compute dtype with its active adapters in it; no copy where nothing changes."""
        base = _base(part)
        weight = base.weight.detach()
        if base is not part and not part.disable_adapters and not part.merged:
            for adapter in part.active_adapters:
                if adapter in part.lora_A:
                    work = torch.promote_types(weight.dtype, torch.float32)
                    weight = weight.to(work) + part.get_delta_weight(adapter).detach().to(work)
        return weight.to(self.dtype)


def _base(part: Any) -> Any:
    return part.get_base_layer() if hasattr(part, "get_base_layer") else part


def _copyable(part: Any) -> bool:
    """Whether a layer is a plain linear one, or that with ordinary LoRA: not quantized, no other kind of adapter."""
    if type(_base(part)) is not nn.Linear or not _base(part).weight.is_floating_point():
        return False
    if _base(part) is part:
        return True
    return hasattr(part, "lora_A") and not part.lora_variant and not any(part.lora_bias.values())
