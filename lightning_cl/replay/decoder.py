# SPDX-License-Identifier: Apache-2.0
"""One batch of rows, token after token, with nothing left for the host to do between tokens: recorded CUDA graphs."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from lightning_cl.replay.sampling import InverseSampler, row_uniforms

Mode = Literal["auto", "graph", "compile", "eager"]

# Positions that one CUDA graph's attention can see: with a graph for each stretch of 64 a row of 256 tokens reads on
# average a quarter more of the cache than is filled, and needs four recordings.
_STRETCH = 64
# How often the flags on the device are looked at: each look is a synchronisation.
_LOOK_EVERY = 32


class RecordingFailed(Exception):
    """A CUDA graph could not be recorded; the reason is the message."""


class DecodingNetwork(Protocol):
    """What a decoder needs of a model: logits of the next token, over a cache of its own."""

    @property
    def recordable(self) -> bool:
        """Whether a step can be recorded as a CUDA graph."""

    def allocate(self, rows: int, room: int) -> None:
        """Make ready for ``rows`` rows of at most ``room`` positions."""

    def reset(self) -> None:
        """Forget all positions."""

    def forward(self, tokens: Tensor, position: Tensor, visible: int | None) -> Tensor:
        """Logits ``[B, V]`` after ``tokens [B, T]`` at ``position [1]``; attention may stop at place ``visible``."""

    def running(self) -> Any:
        """Context of all forward passes."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: rows of ``length`` at ``temperature``, ended by ``eos`` if there are any, from ``seed``."""

    length: int
    temperature: float
    eos: tuple[int, ...]
    seed: int


class Decoder:
    """The static tensors of one batch size, and the recorded steps over them.

    Args:
        network: What makes the logits.
        sampling: How tokens are drawn.
        vocabulary: Number of tokens.
        device: Where the network is.
        size: Rows decoded together.
        mode: ``"graph"``, ``"compile"`` or ``"eager"``.
    """

    def __init__(
        self,
        network: DecodingNetwork,
        sampling: Sampling,
        vocabulary: int,
        device: torch.device,
        size: int,
        mode: Mode,
    ) -> None:
        self._network, self._sampling, self._device, self._size, self._mode = network, sampling, device, size, mode
        length = sampling.length
        # The memory-efficient attention kernel wants a mask whose last dimension is a multiple of 8.
        self._room = -(-length // 8) * 8
        network.allocate(size, self._room)
        self._draw = InverseSampler(vocabulary, device, sampling.temperature)
        new: dict[str, Any] = {"device": device, "dtype": torch.long}
        self._token = torch.zeros(size, 1, **new)
        self._prompts = torch.zeros(size, length, **new)
        self._prompt_lengths = torch.zeros(size, **new)
        self._out = torch.zeros(size, length, **new)
        self._position = torch.zeros(1, **new)
        self._bad = torch.zeros(1, **new)
        self._done = torch.zeros(size, device=device, dtype=torch.bool)
        self._eos = torch.tensor(sampling.eos, **new)
        self._uniforms = torch.zeros(length, size, device=device, dtype=self._draw.work)
        self._visible: int | None = None
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        if mode in ("graph", "compile"):
            with network.running():
                self._record()

    def run(self, prompts: Sequence[Sequence[int]], first_row: int, progress: bool) -> tuple[list[Tensor], list[bool]]:
        """Whole rows for at most ``size`` prompts, and whether each has ended.

        Raises:
            RuntimeError: If logits are not finite, with the position.
        """
        length, count = self._sampling.length, len(prompts)
        self._load(prompts, first_row)
        shared = min(len(p) for p in prompts)
        bar = _bar(progress, length - shared, count)
        with self._network.running():
            if shared > 1:
                self._visible = None
                self._advance(self._network.forward(self._prompts[:, :shared], self._position, None), shared - 1)
            for position in range(shared if shared > 1 else 0, length - 1):
                if self._graphs:
                    self._graphs[self._stretch(position)].replay()
                else:
                    self._visible = min(self._room, position + 1)
                    self._step()
                bar.update(1)
                if (position + 1) % _LOOK_EVERY == 0:
                    self._check()
                    if self._sampling.eos and bool(self._done[:count].all()):
                        break
        self._check()
        bar.close()
        out, done = self._out[:count].cpu(), self._done[:count].tolist()
        return [self._trim(out[i], len(prompts[i])) for i in range(count)], done

    def _trim(self, row: Tensor, prompt: int) -> Tensor:
        if self._sampling.eos:
            ends = torch.isin(row[prompt:], self._eos.cpu()).nonzero()
            if len(ends):
                return row[: prompt + int(ends[0]) + 1].clone()
        return row.clone()

    def _load(self, prompts: Sequence[Sequence[int]], first_row: int) -> None:
        """Put a batch into the static tensors; rows beyond it repeat the first prompt and are thrown away."""
        length, seed = self._sampling.length, self._sampling.seed
        tokens = torch.zeros(self._size, length, dtype=torch.long)
        sizes = torch.zeros(self._size, dtype=torch.long)
        for i in range(self._size):
            prompt = prompts[i] if i < len(prompts) else prompts[0]
            tokens[i, : len(prompt)] = torch.as_tensor(prompt, dtype=torch.long)
            sizes[i] = len(prompt)
        streams = np.stack([row_uniforms(seed, first_row + i, length) for i in range(self._size)], axis=1)
        self._prompts.copy_(tokens)
        self._prompt_lengths.copy_(sizes)
        self._uniforms.copy_(torch.from_numpy(streams))
        self._out.copy_(tokens)
        self._token.copy_(tokens[:, :1])
        self._position.zero_()
        self._bad.zero_()
        self._done.zero_()
        self._network.reset()

    def _advance(self, logits: Tensor, moved: int = 0) -> None:
        """Choose the next token of each row and write it down; everything stays on the device."""
        self._position += moved + 1
        drawn, finite = self._draw(logits, self._uniforms.index_select(0, self._position)[0])
        in_prompt = self._position < self._prompt_lengths
        token = torch.where(in_prompt, self._prompts.index_select(1, self._position)[:, 0], drawn)
        if self._sampling.eos:
            token = torch.where(self._done, self._eos[0], token)
            self._done |= (token[:, None] == self._eos).any(-1) & ~in_prompt
        self._bad.copy_(torch.where((self._bad == 0) & ~finite.all(), self._position, self._bad))
        self._out.index_copy_(1, self._position, token[:, None])
        self._token.copy_(token[:, None])

    def _step(self) -> None:
        self._advance(self._network.forward(self._token, self._position, self._visible))

    def _check(self) -> None:
        bad = int(self._bad)
        if bad:
            raise RuntimeError(
                f"Generation stopped at position {bad} of {self._sampling.length}: the logits are not finite, so the"
                " model has no distribution to sample from. Check the weights (a diverged task, a float16 overflow), or"
                " use bfloat16 or another `anchor`."
            )

    def _stretch(self, position: int) -> int:
        """The end of the recorded stretch whose attention sees ``position``."""
        if self._mode == "compile":
            return self._room
        return min(self._room, -(-(position + 1) // _STRETCH) * _STRETCH)

    def _record(self) -> None:
        step = torch.compile(self._step, dynamic=False) if self._mode == "compile" else self._step
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        self._load([[0]], 0)
        try:
            with torch.cuda.stream(stream), _no_collection():
                # Outside the recording: lazy allocations of the cache, library handles, compilation.
                self._visible = self._stretch(0)
                for _ in range(2 if self._mode == "compile" else 1):
                    step()
                torch.cuda.synchronize(self._device)
                # One pool: what a step computes on the way is gone when the next one, of whatever stretch, runs.
                pool = torch.cuda.graph_pool_handle()
                for end in sorted({self._stretch(p) for p in range(self._sampling.length)}):
                    self._visible = end
                    graph = torch.cuda.CUDAGraph()
                    # Not `torch.cuda.graph`, which empties the allocator's cache each time: training wants it back.
                    # Other threads (a loader that pins memory) may go on using the device meanwhile.
                    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                    try:
                        step()
                    except RuntimeError:
                        with suppress(RuntimeError):  # the recording is invalid too; the first error is the reason
                            graph.capture_end()
                        raise
                    graph.capture_end()
                    self._graphs[end] = graph
            torch.cuda.current_stream(self._device).wait_stream(stream)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._graphs.clear()
            raise RecordingFailed(str(error).split("\n")[0]) from error


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection: an old CUDA object that dies during a recording would break it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _bar(shown: bool, steps: int, rows: int) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=steps, desc=f"Generating {rows} rows", unit="token", leave=False, disable=not shown)
