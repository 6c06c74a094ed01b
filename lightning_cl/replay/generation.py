# SPDX-License-Identifier: Apache-2.0
"""Sample many rows from a causal language model at once."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_cl.anatomy import find_head, pretrained_model
from lightning_cl.replay.decoder import Decoder, DecodingNetwork, Mode, RecordingFailed, Sampling
from lightning_cl.replay.fused_network import FusedNetwork
from lightning_cl.replay.library_network import LibraryNetwork
from lightning_cl.replay.stillness import evaluating, gathered

_SHORTEST_RECORDED = 8
_CPU_BATCH = 64
_LARGEST_BATCH = 1024


@dataclass
class Generation:
    """What :meth:`DecodeEngine.generate` made.

    Attributes:
        rows: token ids of each row, prompt included, 1-D int64 on the CPU; shorter than ``length`` only if ended.
        ended: whether the row ended by itself (``on_eos="stop"``).
        seconds: wall time of the whole call.
        preparation_seconds: the part of it before the first token: gathering, copying and recording.
        batch_size: rows that were decoded together.
        mode: how: ``"graph"``, ``"compile"`` or ``"eager"``.
    """

    rows: list[Tensor]
    ended: list[bool]
    seconds: float
    preparation_seconds: float
    batch_size: int
    mode: str

    @property
    def tokens(self) -> int:
        """All tokens of all rows."""
        return sum(len(row) for row in self.rows)


class DecodeEngine:
    """Sample rows from the Hugging Face causal LM inside a module, many at a time.

    A decode step of a small model is thousands of tiny kernels, and a plain loop waits for Python to launch each. Here
    a whole step (network, head, draw, bookkeeping) is recorded as a CUDA graph over a static key-value cache and
    replayed for every position, so that the host does nothing between tokens
    (:class:`~lightning_cl.replay.decoder.Decoder`); and models built like Llama run by a pass with a third of the
    kernels, their adapters merged into it (:class:`~lightning_cl.replay.fused_network.FusedNetwork`). Prompts of unequal
    length need no padding: all rows start at position 0, the part all prompts share in length is one parallel pass, and
    until a row's own prompt is over its next token is the prompt's instead of the drawn one.

    Every row has its own random numbers (Philox, keyed by the seed and the row's number), one for each position, and
    a token is the inverse of the cumulative distribution at that number. So what a row becomes does not depend on the
    batch that it is in nor on the rank that makes it, up to the rounding of the logits.

    The model runs in evaluation mode without gradients and is left as it was found. Under FSDP2 the weights of all
    groups are gathered once for the whole call: each device must hold the model once in its compute dtype. Where a GPU
    has room, the layers' weights are copied once more, for the time of the call.

    Args:
        module: A module that holds a Hugging Face causal language model.
        length: Tokens of a row, prompt included.
        temperature: Logits are divided by it; > 0. No top-k, no top-p: replay needs the model's own distribution.
        on_eos: ``"continue"`` treats the end token as any other (the paper), ``"stop"`` ends the row after it.
        eos_token_ids: The end tokens; needed for ``"stop"``.
        batch_size: Rows decoded together; by default as many as free memory allows (64 on a CPU).
        mode: ``"graph"`` records eager kernels (CUDA), ``"compile"`` compiles the step first, which takes a minute or
            so: for very many rows; ``"eager"`` does neither. ``"auto"``: ``"graph"``. Without a GPU, for models that cannot
            have a static cache and for rows longer than a sliding window, all are ``"eager"``.
        seed: Seed of all rows.

    Raises:
        MisconfigurationException: If the module has no language-model head, or ``length`` exceeds the context.
        ValueError: For numbers out of range.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> engine = DecodeEngine(LlamaForCausalLM(LlamaConfig(vocab_size=11, **sizes)), length=5)
        >>> [len(row) for row in engine.generate([[1], [1], [1]]).rows]
        [5, 5, 5]
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        length: int,
        temperature: float = 1.0,
        on_eos: Literal["continue", "stop"] = "continue",
        eos_token_ids: Sequence[int] = (),
        batch_size: int | None = None,
        mode: Mode = "auto",
        seed: int = 0,
    ) -> None:
        if not temperature > 0:
            raise ValueError(f"`temperature={temperature}`: logits are divided by it, so it must be > 0. Use 1.0.")
        if length < 2:
            raise ValueError(f"`length={length}`: a row is a prompt and at least one sampled token. Use 2 or more.")
        if batch_size is not None and batch_size < 1:
            raise ValueError(
                f"`batch_size={batch_size}`: at least one row is decoded at a time. Use None for automatic."
            )
        if on_eos == "stop" and not eos_token_ids:
            raise ValueError('`on_eos="stop"` without `eos_token_ids`: no row could end. Pass them or use "continue".')
        find_head(module)
        self._model = cast(Any, pretrained_model(module))
        self._modules = module
        context = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        if context is not None and length > context:
            raise MisconfigurationException(
                f"`length={length}` is beyond the context of `{type(self._model).__name__}`, {context} tokens: positions"
                f" after it were never trained. Use `length={context}` or less."
            )
        self._sampling = Sampling(length, temperature, tuple(eos_token_ids) if on_eos == "stop" else (), seed)
        self._batch_size = batch_size
        self._mode: Mode = mode

    def generate(self, prompts: Sequence[Sequence[int]], first_row: int = 0, progress: bool = False) -> Generation:
        """Continue each prompt to a whole row.

        Args:
            prompts: Token ids of each row's beginning, at least one each, fewer than ``length``.
            first_row: Number of the first row: row ``i`` draws from the random stream ``first_row + i`` of the seed.
            progress: Show a bar of the positions done.

        Raises:
            ValueError: If a prompt is empty or leaves no room.
            RuntimeError: If logits are not finite, with the position.
        """
        length = self._sampling.length
        for i, prompt in enumerate(prompts):
            if not 0 < len(prompt) < length:
                raise ValueError(
                    f"Prompt {i} has {len(prompt)} tokens and `length={length}`: a row needs at least one token of prompt"
                    " and one to sample. Shorten the prompt or raise `length`."
                )
        started = time.perf_counter()
        preparing = 0.0
        rows: list[Tensor] = []
        ended: list[bool] = []
        # A model that is compiled for training would compile anew for each shape of a decode step.
        eagerly = nullcontext() if self._mode == "compile" else torch.compiler.set_stance("force_eager")
        with torch.no_grad(), eagerly, evaluating(self._modules), gathered(self._modules):
            device = next(self._model.parameters()).device
            network = self._network()
            size = min(len(prompts), self._batch_size or self._fitting_batch(device)) or 1
            mode = self._resolved_mode(device, network)
            vocabulary = self._model.config.get_text_config().vocab_size
            preparing += time.perf_counter() - started
            while len(rows) < len(prompts):
                # Batches of equal size, so that one recording serves all of them.
                size = -(-(len(prompts) - len(rows)) // -(-(len(prompts) - len(rows)) // size))
                decoder = None
                began = time.perf_counter()
                try:
                    decoder = Decoder(network, self._sampling, vocabulary, device, size, mode)
                    preparing += time.perf_counter() - began
                    while len(rows) < len(prompts):
                        part = prompts[len(rows) : len(rows) + size]
                        new_rows, new_ended = decoder.run(part, first_row + len(rows), progress)
                        rows += new_rows
                        ended += new_ended
                except torch.cuda.OutOfMemoryError:
                    if size == 1:
                        raise
                    del decoder
                    torch.cuda.empty_cache()
                    size = -(-size // 2)
                except RecordingFailed as failed:
                    rank_zero_warn(
                        f"Recording a CUDA graph of `{type(self._model).__name__}` failed ({failed});"
                        " generating without, which is slower."
                    )
                    mode = "eager"
        return Generation(rows, ended, time.perf_counter() - started, preparing, size, mode)

    @torch.no_grad()
    def _network(self) -> DecodingNetwork:
        if FusedNetwork.supports(self._model, self._sampling.length):
            fused = FusedNetwork(self._model)
            if fused.agrees():
                return fused
        return LibraryNetwork(self._model, self._sampling.length)

    def _resolved_mode(self, device: torch.device, network: DecodingNetwork) -> Mode:
        # For a few positions there is nothing to win.
        if device.type != "cuda" or not network.recordable or self._sampling.length < _SHORTEST_RECORDED:
            return "eager"
        return "graph" if self._mode == "auto" else self._mode

    def _fitting_batch(self, device: torch.device) -> int:
        if device.type != "cuda":
            return _CPU_BATCH
        config = self._model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        item = torch.finfo(self._model.dtype).bits // 8
        cache = 2 * config.num_hidden_layers * heads * width * item * self._sampling.length
        logits = config.vocab_size * 16
        free = torch.cuda.mem_get_info(device)[0]
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return max(1, min(_LARGEST_BATCH, int(0.6 * free) // (cache + logits)))
