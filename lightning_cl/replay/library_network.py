# SPDX-License-Identifier: Apache-2.0
"""Decode with a Hugging Face causal LM's own forward over the library's cache: right for every family."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cl import anatomy

_ATTENTION = "lightning_cl_decode"


class LibraryNetwork:
    """A model's own forward pass as a decoding network.

    Args:
        model: The Hugging Face model.
        length: Positions that a row has; decides what the cache can be.
    """

    def __init__(self, model: Any, length: int) -> None:
        self._model = model
        self._length = length
        self._cache_argument = anatomy.cache_name(model)
        self._wants_position = anatomy.accepts(model, "cache_position")
        self._extra = {"logits_to_keep": 1} if anatomy.accepts(model, "logits_to_keep") else {}
        self._cache: Any = None
        self._room = 0
        self._visible: int | None = None

    @property
    def recordable(self) -> bool:
        """Whether a step can be recorded: with a static cache that does not count its positions in Python."""
        window = getattr(self._model.config.get_text_config(), "sliding_window", None)
        return self._static and (window is None or window >= self._length)

    @property
    def _static(self) -> bool:
        # Not: models that branch on data (most mixtures of experts) or keep another state than keys and values.
        return bool(getattr(self._model, "_can_compile_fullgraph", False))

    @property
    def dtype(self) -> torch.dtype:
        """What the cache holds."""
        return self._model.dtype

    def allocate(self, rows: int, room: int) -> None:
        """Make ready for ``rows`` rows of at most ``room`` positions."""
        self._cache, self._room = None, room

    def reset(self) -> None:
        """Forget all positions; a static cache keeps its addresses."""
        if self._cache is not None and self._static:
            self._cache.reset()
            return
        from transformers import DynamicCache, StaticCache

        config = self._model.config
        self._cache = (
            StaticCache(config=config, max_cache_len=self._room) if self._static else DynamicCache(config=config)
        )

    def forward(self, tokens: Tensor, position: Tensor, visible: int | None) -> Tensor:
        """Logits ``[B, V]`` after ``tokens [B, T]``, the first of which stands at ``position [1]``."""
        self._visible = visible
        extra: dict[str, Any] = dict(self._extra)
        if self._wants_position:
            extra["cache_position"] = torch.arange(tokens.shape[1], device=tokens.device) + position
        extra[self._cache_argument] = self._cache
        return self._model(input_ids=tokens, use_cache=True, **extra).logits[:, -1]

    @contextmanager
    def running(self) -> Iterator[None]:
        """Attention for one new token a row over a static cache, where the model uses PyTorch's own.

        The library's form repeats keys and values for each query head and reads the cache to its end. Here the query
        heads that share a key head become the kernel's queries, so that keys are read once, and only their filled part.
        """
        config = self._model.config
        if getattr(config, "_attn_implementation", None) != "sdpa" or not getattr(
            self._model, "_supports_attention_backend", False
        ):
            yield
            return
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask

        AttentionInterface.register(_ATTENTION, self._attend)
        AttentionMaskInterface.register(_ATTENTION, sdpa_mask)
        config._attn_implementation = _ATTENTION
        try:
            yield
        finally:
            config._attn_implementation = "sdpa"

    def _attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        plain = not any(v is not None for k, v in kwargs.items() if k in ("softcap", "position_bias", "s_aux"))
        if query.shape[2] != 1 or attention_mask is None or not plain or kwargs.get("cache") is not None:
            return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        seen = self._visible
        # A sliding window's cache is a ring: its filled part is not its beginning.
        slides = getattr(module, "sliding_window", None) is not None
        if seen is not None and key.shape[2] > seen and attention_mask.shape[-1] == key.shape[2] and not slides:
            key, value, attention_mask = key[:, :, :seen], value[:, :, :seen], attention_mask[..., :seen]
        rows, heads, _, width = query.shape
        shared = key.shape[1]
        out = torch.nn.functional.scaled_dot_product_attention(
            query.reshape(rows, shared, heads // shared, width),
            key,
            value,
            attn_mask=attention_mask.expand(-1, -1, heads // shared, -1),
            scale=kwargs.get("scaling"),
        )
        return out.reshape(rows, 1, heads, value.shape[-1]), None
