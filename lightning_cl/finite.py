# SPDX-License-Identifier: Apache-2.0
"""Notice a loss term that is not finite without making the accelerator wait."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_cl.step import Step


class FiniteGuard:
    """Keeps the finiteness of each step's terms until it can be read for free.

    On a CPU the flag is read at once. On an accelerator it is copied without blocking and read at the next step, by
    when it has long arrived; :meth:`check` is also called before every checkpoint.
    """

    def __init__(self) -> None:
        self._flags: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None
        self._names: list[str] = []
        self._where = ""

    def watch(self, values: Mapping[str, Tensor], step: Step) -> None:
        """Take note of one step's terms."""
        if not values:
            return
        flags = torch.stack([torch.isfinite(v).all() for v in values.values()])
        self._names = list(values)
        shown = ", ".join(step.replay.ids[:8]) + (", ..." if step.replay.count > 8 else "")
        self._where = f"at batch {step.batch_idx}, replay samples [{shown}]"
        if flags.is_cuda:
            self._flags = torch.empty(flags.shape, dtype=torch.bool, pin_memory=True)
            self._flags.copy_(flags, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        else:
            self._flags = flags
            self.check()

    def check(self) -> None:
        """Raise if the last watched step had a term that is not finite.

        Raises:
            RuntimeError: naming the term, the step and the samples.
        """
        if self._flags is None:
            return
        if self._arrived is not None:
            self._arrived.synchronize()
        flags, self._flags, self._arrived = self._flags, None, None
        broken = [name for name, fine in zip(self._names, flags.tolist(), strict=True) if not fine]
        if broken:
            raise RuntimeError(
                f"The loss term {', '.join(f'cl/{name}' for name in broken)} is not finite {self._where}. Training"
                " stopped; the last checkpoint is from before this step. Lower the term's weight or the learning rate, or"
                " look at these samples."
            )
