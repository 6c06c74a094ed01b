# SPDX-License-Identifier: Apache-2.0
"""Sample many rows from a causal language model at once: static cache, CUDA graphs, one random stream a row."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_cl.anatomy import find_head, pretrained_model

Mode = Literal["auto", "graph", "compile", "eager"]

# Positions that one CUDA graph's attention can see: a graph for each stretch of 128 reads on average little more of the
# cache than is filled, and a row of 256 tokens needs two.
_STRETCH = 128
_SHORTEST_RECORDED = 8
_CPU_BATCH = 64
_LARGEST_BATCH = 1024
# How often the flags on the device are looked at: each look is a synchronisation.
_LOOK_EVERY = 32
_ATTENTION = "lightning_cl_decode"


@dataclass
class Generation:
    """What :meth:`DecodeEngine.generate` made.

    Attributes:
        rows: token ids of each row, prompt included, 1-D int64 on the CPU; shorter than ``length`` only if ended.
        ended: whether the row ended by itself (``on_eos="stop"``).
        seconds: wall time of the whole call.
        batch_size: rows that were decoded together.
        mode: how: ``"graph"``, ``"compile"`` or ``"eager"``.
    """

    rows: list[Tensor]
    ended: list[bool]
    seconds: float
    batch_size: int
    mode: str

    @property
    def tokens(self) -> int:
        """All tokens of all rows."""
        return sum(len(row) for row in self.rows)


class DecodeEngine:
    """Sample rows from the Hugging Face causal LM inside a module, many at a time.

    A decode step of a small model is thousands of tiny kernels, and a plain loop waits for Python to launch each. Here
    a whole step (network, head, draw, bookkeeping) is recorded once as a CUDA graph over a static key-value cache and
    replayed for every position, so that the host does nothing between tokens. Prompts of unequal length need no
    padding: all rows start at position 0, the part all prompts share in length is one parallel pass, and until a row's
    own prompt is over its next token is the prompt's instead of the drawn one.

    Every row has its own random numbers (Philox, keyed by the seed and the row's number), one for each position, and
    a token is the inverse of the cumulative distribution at that number. So what a row becomes does not depend on the
    batch that it is in nor on the rank that makes it, up to the rounding of the logits.

    The model runs in evaluation mode without gradients and is left as it was found. Under FSDP2 the weights of all
    groups are gathered once for the whole call: each device must hold the model once in its compute dtype.

    Args:
        module: A module that holds a Hugging Face causal language model.
        length: Tokens of a row, prompt included.
        temperature: Logits are divided by it; > 0. No top-k, no top-p: replay needs the model's own distribution.
        on_eos: ``"continue"`` treats the end token as any other (the paper), ``"stop"`` ends the row after it.
        eos_token_ids: The end tokens; needed for ``"stop"``.
        batch_size: Rows decoded together; by default as many as free memory allows (64 on a CPU).
        mode: ``"graph"`` records eager kernels (CUDA), ``"compile"`` compiles the step first, which takes a minute and
            pays for tens of thousands of rows, ``"eager"`` does neither. ``"auto"``: ``"graph"``. Without a GPU, for models
            that cannot have a static cache and for rows longer than a sliding window, all are ``"eager"``.
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
        self._length = length
        self._temperature = temperature
        self._stop = on_eos == "stop"
        self._eos = list(eos_token_ids)
        self._batch_size = batch_size
        self._mode: Mode = mode
        self._seed = seed

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
        for i, prompt in enumerate(prompts):
            if not 0 < len(prompt) < self._length:
                raise ValueError(
                    f"Prompt {i} has {len(prompt)} tokens and `length={self._length}`: a row needs at least one token of"
                    " prompt and one to sample. Shorten the prompt or raise `length`."
                )
        started = time.perf_counter()
        rows: list[Tensor] = []
        ended: list[bool] = []
        with torch.no_grad(), evaluating(self._modules), gathered(self._modules):
            device = next(self._model.parameters()).device
            size = min(len(prompts), self._batch_size or self._fitting_batch(device)) or 1
            mode = self._resolved_mode(device)
            while len(rows) < len(prompts):
                # Batches of equal size, so that one recording serves all of them.
                size = -(-(len(prompts) - len(rows)) // -(-(len(prompts) - len(rows)) // size))
                decoder = None
                try:
                    decoder = _Decoder(self, device, size, mode)
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
                except _RecordingFailed as failed:
                    rank_zero_warn(
                        f"Recording a CUDA graph of `{type(self._model).__name__}` failed ({failed});"
                        " generating without, which is slower."
                    )
                    mode = "eager"
        return Generation(rows, ended, time.perf_counter() - started, size, mode)

    def _resolved_mode(self, device: torch.device) -> Mode:
        # Only a static cache on a GPU can be recorded, and for a few positions there is nothing to win.
        if device.type != "cuda" or not self._static() or self._slides() or self._length < _SHORTEST_RECORDED:
            return "eager"
        return "graph" if self._mode == "auto" else self._mode

    def _static(self) -> bool:
        # Models that branch on data (most mixtures of experts) or keep another state than keys and values.
        return bool(getattr(self._model, "_can_compile_fullgraph", False))

    def _slides(self) -> bool:
        # A sliding window's cache counts its positions in Python, which a recording would freeze.
        window = getattr(self._model.config.get_text_config(), "sliding_window", None)
        return window is not None and window < self._length

    def _fitting_batch(self, device: torch.device) -> int:
        if device.type != "cuda":
            return _CPU_BATCH
        config = self._model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        item = torch.finfo(self._model.dtype).bits // 8
        cache = 2 * config.num_hidden_layers * heads * width * item * self._length
        logits = config.vocab_size * 16
        free = torch.cuda.mem_get_info(device)[0]
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return max(1, min(_LARGEST_BATCH, int(0.6 * free) // (cache + logits)))


class _RecordingFailed(Exception):
    """A CUDA graph could not be recorded; the reason is the message."""


class _Decoder:
    """The static tensors of one batch size, and the recorded steps over them."""

    def __init__(self, engine: DecodeEngine, device: torch.device, size: int, mode: Mode) -> None:
        self.engine, self.device, self.size, self.mode = engine, device, size, mode
        self.model: Any = engine._model
        length = engine._length
        # The memory-efficient attention kernel wants a mask whose last dimension is a multiple of 8.
        self.room = -(-length // 8) * 8
        parameters = inspect.signature(self.model.forward).parameters
        self.wants_position = "cache_position" in parameters
        self.extra = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        vocabulary = self.model.config.get_text_config().vocab_size
        self.draw = InverseSampler(vocabulary, device, engine._temperature)
        new: dict[str, Any] = {"device": device, "dtype": torch.long}
        self.token = torch.zeros(size, 1, **new)
        self.prompts = torch.zeros(size, length, **new)
        self.prompt_lengths = torch.zeros(size, **new)
        self.out = torch.zeros(size, length, **new)
        self.position = torch.zeros(1, **new)
        self.bad = torch.zeros(1, **new)
        self.done = torch.zeros(size, device=device, dtype=torch.bool)
        self.eos = torch.tensor(engine._eos, **new)
        self.uniforms = torch.zeros(length, size, device=device, dtype=self.draw.work)
        self.cache: Any = None
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def run(self, prompts: Sequence[Sequence[int]], first_row: int, progress: bool) -> tuple[list[Tensor], list[bool]]:
        length, count = self.engine._length, len(prompts)
        with _decode_attention(self.model) as attention:
            if self.mode in ("graph", "compile") and not self.graphs:
                self._record(attention)
            self._load(prompts, first_row)
            shared = min(len(p) for p in prompts)
            bar = _bar(progress, length - shared, count)
            if shared > 1:
                attention.visible = None
                self._advance(self._forward(self.prompts[:, :shared]), shared - 1)
            for position in range(shared if shared > 1 else 0, length - 1):
                if self.graphs:
                    self.graphs[self._stretch(position)].replay()
                else:
                    attention.visible = min(self.room, position + 1)
                    self._step()
                bar.update(1)
                if (position + 1) % _LOOK_EVERY == 0:
                    self._check()
                    if self.engine._stop and bool(self.done[:count].all()):
                        break
            self._check()
            bar.close()
        out, done = self.out[:count].cpu(), self.done[:count].tolist()
        return [self._trim(out[i], len(prompts[i])) for i in range(count)], done

    def _trim(self, row: Tensor, prompt: int) -> Tensor:
        if self.engine._stop:
            ends = torch.isin(row[prompt:], self.eos.cpu()).nonzero()
            if len(ends):
                return row[: prompt + int(ends[0]) + 1].clone()
        return row.clone()

    def _load(self, prompts: Sequence[Sequence[int]], first_row: int) -> None:
        """Put a batch into the static tensors; rows beyond it repeat the first prompt and are thrown away."""
        length = self.engine._length
        tokens = torch.zeros(self.size, length, dtype=torch.long)
        sizes = torch.zeros(self.size, dtype=torch.long)
        for i in range(self.size):
            prompt = prompts[i] if i < len(prompts) else prompts[0]
            tokens[i, : len(prompt)] = torch.as_tensor(prompt, dtype=torch.long)
            sizes[i] = len(prompt)
        streams = np.stack([row_uniforms(self.engine._seed, first_row + i, length) for i in range(self.size)], axis=1)
        self.prompts.copy_(tokens)
        self.prompt_lengths.copy_(sizes)
        self.uniforms.copy_(torch.from_numpy(streams))
        self.out.copy_(tokens)
        self.token.copy_(tokens[:, :1])
        self.position.zero_()
        self.bad.zero_()
        self.done.zero_()
        self._reset_cache()

    def _reset_cache(self) -> None:
        if self.cache is not None and self.engine._static():
            self.cache.reset()
            return
        from transformers import DynamicCache, StaticCache

        config = self.model.config
        static = self.engine._static()
        self.cache = StaticCache(config=config, max_cache_len=self.room) if static else DynamicCache(config=config)

    def _forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=self.device) + self.position
        extra = {**self.extra, "cache_position": positions} if self.wants_position else self.extra
        output = self.model(input_ids=tokens, past_key_values=self.cache, use_cache=True, **extra)
        return output.logits[:, -1]

    def _advance(self, logits: Tensor, moved: int = 0) -> None:
        """Choose the next token of each row and write it down; everything stays on the device."""
        self.position += moved + 1
        drawn, finite = self.draw(logits, self.uniforms.index_select(0, self.position)[0])
        in_prompt = self.position < self.prompt_lengths
        token = torch.where(in_prompt, self.prompts.index_select(1, self.position)[:, 0], drawn)
        if self.engine._stop:
            token = torch.where(self.done, self.eos[0], token)
            self.done |= (token[:, None] == self.eos).any(-1) & ~in_prompt
        self.bad.copy_(torch.where((self.bad == 0) & ~finite.all(), self.position, self.bad))
        self.out.index_copy_(1, self.position, token[:, None])
        self.token.copy_(token[:, None])

    def _step(self) -> None:
        self._advance(self._forward(self.token))

    def _check(self) -> None:
        bad = int(self.bad)
        if bad:
            raise RuntimeError(
                f"Generation stopped at position {bad} of {self.engine._length}: the logits are not finite, so the model"
                " has no distribution to sample from. Check the weights (a diverged task, a float16 overflow), or use"
                " bfloat16 or another `anchor`."
            )

    def _stretch(self, position: int) -> int:
        """The end of the recorded stretch whose attention sees ``position``."""
        if self.mode == "compile":
            return self.room
        return min(self.room, -(-(position + 1) // _STRETCH) * _STRETCH)

    def _record(self, attention: _Attention) -> None:
        step = self._step
        if self.mode == "compile":
            step = torch.compile(self._step, dynamic=False)
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        self._load([[0]], 0)
        try:
            with torch.cuda.stream(stream):
                # Outside the recording: lazy allocations of the cache, library handles, compilation.
                attention.visible = self._stretch(0)
                for _ in range(2):
                    step()
            torch.cuda.current_stream(self.device).wait_stream(stream)
            # One pool: what a step computes on the way is gone when the next one, of whatever stretch, runs. Other
            # threads (a loader that pins memory) may go on using the device meanwhile.
            pool = torch.cuda.graph_pool_handle()
            for end in sorted({self._stretch(p) for p in range(self.engine._length)}):
                attention.visible = end
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    step()
                self.graphs[end] = graph
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.graphs.clear()
            raise _RecordingFailed(str(error).split("\n")[0]) from error


class InverseSampler:
    """Draw one token a row: the inverse of the cumulative distribution at a given uniform number.

    In two levels, so that no sum runs over the whole vocabulary: the block of 256 tokens by its mass, then the token
    inside it. Sums are products with a triangle of ones in float64: exact to 1e-15, and reproducible on a GPU, where a
    cumulative sum is not.

    Args:
        vocabulary: Number of tokens.
        device: Where the logits are.
        temperature: Logits are divided by it.

    Example:
        >>> draw = InverseSampler(3, torch.device("cpu"))
        >>> tokens, finite = draw(torch.tensor([[0.0, 0.0, 0.0]]).log_softmax(-1), torch.tensor([0.5]))
        >>> tokens.tolist(), finite.tolist()
        ([1], [True])
    """

    _block = 256

    def __init__(self, vocabulary: int, device: torch.device, temperature: float = 1.0) -> None:
        self.work = torch.float32 if device.type == "mps" else torch.float64
        self._temperature = temperature
        self._triangles = [
            torch.ones(n, n, device=device, dtype=self.work).triu()
            for n in (-(-vocabulary // self._block), self._block)
        ]

    def __call__(self, logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens for ``logits [B, V]`` at ``uniforms [B]`` in [0, 1), and whether each row's logits were usable."""
        rows, vocabulary = logits.shape
        outer, inner = self._triangles
        if self._temperature != 1.0:
            logits = logits.float() / self._temperature
        p = torch.softmax(logits, dim=-1, dtype=torch.float32)
        p = torch.nn.functional.pad(p, (0, len(outer) * self._block - vocabulary)).view(rows, len(outer), self._block)
        mass = p.sum(-1, dtype=self.work)
        cumulative = mass @ outer
        wanted = uniforms.to(self.work)[:, None] * cumulative[:, -1:]
        block = (cumulative <= wanted).sum(-1, keepdim=True).clamp_max(len(outer) - 1)
        rest = wanted - (cumulative - mass).gather(1, block)
        inside = p.gather(1, block[:, :, None].expand(-1, 1, self._block))[:, 0]
        offset = (inside.to(self.work) @ inner <= rest).sum(-1)
        # Rounding can leave a remainder after the block's last token; its likeliest token is a token that it has.
        offset = torch.where(offset < self._block, offset, inside.argmax(-1))
        token = (block[:, 0] * self._block + offset).clamp_max(vocabulary - 1)
        return token, torch.isfinite(cumulative[:, -1])


def row_uniforms(seed: int, row: int, length: int) -> Any:
    """The uniform numbers of one row, one a position: a float64 numpy array ``[length]``, the same on every machine.

    Example:
        >>> bool((row_uniforms(0, 3, 4) == row_uniforms(0, 3, 8)[:4]).all())
        True
    """
    mask = (1 << 64) - 1
    return np.random.Generator(np.random.Philox(key=[seed & mask, row & mask])).random(length)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode while the context lasts; then every submodule's own mode again."""
    before = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in before:
            part.training = training


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Under FSDP2: every group's weights whole and its hooks at rest while the context lasts; otherwise nothing.

    Without it each forward pass gathers each block, which for a decode step is all cost and no work, and no pass could
    be recorded: a collective in a recording would have to be in every rank's.
    """
    from torch.distributed.fsdp import FSDPModule

    groups = [part for part in module.modules() if isinstance(part, FSDPModule)]
    if not groups:
        yield
        return
    # Which group is the root is settled by the first forward pass; one through an inner module would settle it wrongly.
    groups[0]._get_fsdp_state()._lazy_init()
    resting: list[tuple[dict[int, Any], int, Any]] = []
    for group in groups:
        group.unshard()
        state = group._get_fsdp_state()
        for hooks in (group._forward_pre_hooks, group._forward_hooks):
            for key, hook in list(hooks.items()):
                if getattr(hook, "__self__", None) is state:
                    resting.append((hooks, key, hook))
    saved = [(hooks, list(hooks.items())) for hooks in {id(h): h for h, _, _ in resting}.values()]
    for hooks, key, _ in resting:
        del hooks[key]
    try:
        yield
    finally:
        for hooks, items in saved:
            # In the old order: FSDP's hook must stay the first of the pre-hooks.
            hooks.clear()
            hooks.update(items)
        for group in groups:
            group.reshard()


@dataclass
class _Attention:
    """How much of the static cache attention looks at; None for all of it."""

    visible: int | None = None


@contextmanager
def _decode_attention(model: Any) -> Iterator[_Attention]:
    """Attention for one new token a row over a static cache, where the model uses PyTorch's own.

    The library's form repeats keys and values for each query head and reads the cache to its end. Here the query heads
    that share a key head become the kernel's queries, so that keys are read once, and only their filled part.
    """
    attention = _Attention()
    config = model.config
    if getattr(config, "_attn_implementation", None) != "sdpa" or not getattr(
        model, "_supports_attention_backend", False
    ):
        yield attention
        return
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        plain = not any(v is not None for k, v in kwargs.items() if k in ("softcap", "position_bias", "s_aux"))
        if query.shape[2] != 1 or attention_mask is None or not plain or kwargs.get("cache") is not None:
            return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        seen = attention.visible
        if (
            seen is not None
            and key.shape[2] > seen
            and attention_mask.shape[-1] == key.shape[2]
            and not _slides(module)
        ):
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

    AttentionInterface.register(_ATTENTION, attend)
    AttentionMaskInterface.register(_ATTENTION, sdpa_mask)
    config._attn_implementation = _ATTENTION
    try:
        yield attention
    finally:
        config._attn_implementation = "sdpa"


def _slides(module: nn.Module) -> bool:
    # A sliding window's cache is a ring: its filled part is not its beginning.
    return getattr(module, "sliding_window", None) is not None


def _bar(shown: bool, steps: int, rows: int) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=steps, desc=f"Generating {rows} rows", unit="token", leave=False, disable=not shown)
