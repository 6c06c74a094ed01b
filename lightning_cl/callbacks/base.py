# SPDX-License-Identifier: Apache-2.0
"""The base of the callbacks: when tasks start and end, in whatever way the project runs them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_cl import rank_watch
from lightning_cl.attachment import Attachment
from lightning_cl.checkpoints import peek_callback_state, pending_checkpoint
from lightning_cl.replay.source import replay_mixers


@dataclass
class _Clock:
    """Where in the stream of tasks a callback stands."""

    completed: int = 0
    in_task: bool = False


class ContinualCallback(Callback):
    """A callback that knows tasks.

    Under :func:`lightning_cl.fit_stream` the stream says which task runs. In any other project each ``trainer.fit`` is
    one task: keep the callback object and give it to each new Trainer, and its memory goes on.

    Subclasses implement :meth:`prepare_task`, :meth:`on_task_start` and :meth:`on_task_end`, and ask
    :attr:`attachment` for what they need from the module. A subclass that overrides a Lightning hook of this class
    calls ``super()``.

    Attributes:
        task_index: index of the current task, or of the next one between two fits; 0 is the first.
        task_name: its name, where a :class:`~lightning_cl.TaskStream` gives one.

    Example:
        >>> class Printer(ContinualCallback):
        ...     def on_task_end(self, trainer, pl_module):
        ...         print("finished task", self.task_index)
    """

    #: Which ``manual_backward`` of a ``training_step`` takes the added loss terms, under manual optimization.
    loss_index: int = 0
    #: Whether the callback brings replay rows into the training batches.
    adds_replay_rows: bool = False

    def __init__(self) -> None:
        super().__init__()
        self._clock = _Clock()
        self._stream_index: int | None = None
        self.task_name: str | None = None
        self._attachment: Attachment | None = None

    @property
    def task_index(self) -> int:
        """Index of the current (or next) task."""
        return self._clock.completed if self._stream_index is None else self._stream_index

    @property
    def attachment(self) -> Attachment:
        """The module's attachment; there from :meth:`on_task_start` until the fit ends."""
        if self._attachment is None:
            raise RuntimeError(f"`{type(self).__name__}.attachment` exists only while a fit runs.")
        return self._attachment

    def prepare_task(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called in ``setup``, before sharding and before the optimizer exists: the place to change what trains."""

    def on_task_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called in ``on_fit_start``, after sharding: the place to ask :attr:`attachment` for hooks and terms."""

    def on_task_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when the task's training has ended (not when it was interrupted)."""

    def on_stream_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called by ``fit_stream`` when the last row of its task matrix is known."""

    def require_replay_rows(self, trainer: pl.Trainer) -> None:
        """Refuse a run without replay rows; for callbacks whose method works on them, in :meth:`prepare_task`.

        Raises:
            MisconfigurationException: naming the callback to add.
        """
        if not replay_mixers(trainer):
            raise MisconfigurationException(
                f"`{type(self).__name__}` works on replay rows, and no callback of this Trainer adds any. Add"
                " `ReplayMixer(GeneralSamples(...))` (or another source) to `callbacks`."
            )

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Assign the task's index, then prepare the task."""
        rank_watch.start(trainer)
        if stage != "fit":
            return
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            raise MisconfigurationException(
                f"`{type(self).__name__}` cannot work under DeepSpeed, whose engine takes parameters and backward pass out"
                ' of the module\'s hands. Use `strategy="cl_fsdp"`, which shards the same way.'
            )
        stream = trainer.datamodule if hasattr(trainer, "datamodule") else None
        self._stream_index = getattr(stream, "current_index", None)
        task = getattr(stream, "current_task", None)
        self.task_name = getattr(task, "name", None)
        if self._stream_index is None:
            _refuse_finished_trainer(trainer)
            state = peek_callback_state(trainer, self.state_key)
            if state is not None:
                ContinualCallback.load_state_dict(self, state)
        self.prepare_task(trainer, pl_module)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Attach to the module, then start the task."""
        self._attachment = Attachment.attach(trainer, pl_module, owner=self)
        self.on_task_start(trainer, pl_module)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The task has begun: from here on a checkpoint belongs to the middle of it."""
        self._clock.in_task = True
        self.attachment.install()

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The task has ended."""
        self.attachment.check_finite()
        self.on_task_end(trainer, pl_module)
        self._clock = _Clock(completed=self.task_index + 1)

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """No checkpoint may hold weights that a term which is not finite has touched."""
        if self._attachment is not None:
            self._attachment.check_finite()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the module as it was."""
        rank_watch.stop(trainer)
        self._detach()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the module as it was: Lightning calls no ``teardown`` after an exception."""
        rank_watch.failed(trainer, exception)
        self._detach()

    def _detach(self) -> None:
        if self._attachment is not None:
            self._attachment.release(self)
            self._attachment = None

    @override
    def state_dict(self) -> dict[str, Any]:
        """Where in the stream the callback stands."""
        return {"clock": asdict(self._clock)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Stand where the checkpoint stood; a checkpoint from before this callback existed changes nothing."""
        if "clock" in state_dict:
            self._clock = _Clock(**state_dict["clock"])


def _refuse_finished_trainer(trainer: pl.Trainer) -> None:
    loop = trainer.fit_loop
    epochs, steps = loop.epoch_progress.current.processed, trainer.global_step  # type: ignore[attr-defined]
    epochs_done = loop.max_epochs is not None and loop.max_epochs != -1 and 0 < loop.max_epochs <= epochs
    steps_done = 0 < (loop.max_steps or 0) <= steps
    if pending_checkpoint(trainer) is None and (epochs_done or steps_done):
        limit = f"`max_epochs={loop.max_epochs}`" if epochs_done else f"`max_steps={loop.max_steps}`"
        raise MisconfigurationException(
            f"This Trainer has reached its {limit}: a second `trainer.fit` would train 0 steps, and the next task would be"
            " counted without having been learnt. Use `lightning_cl.fit_stream(trainer, model, stream)`, which sets the"
            " limits back for each task, or a new `Trainer` for each task with the same callback objects."
        )
