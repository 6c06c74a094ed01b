# SPDX-License-Identifier: Apache-2.0
"""A stream of tasks as a LightningDataModule."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import default_collate
from typing_extensions import override

from lightning_cl.distributed import raise_together, rank, world_size
from lightning_cl.stream import progress
from lightning_cl.stream.fingerprint import difference, fingerprint
from lightning_cl.stream.loader import Position, TaskLoader, is_iterable
from lightning_cl.stream.scores import matrix_of
from lightning_cl.stream.task import Task
from lightning_cl.stream.text import TextRows, holds_text, make_encoder, read_split

if TYPE_CHECKING:
    from lightning_cl.metrics import TaskMatrix

Split = Literal["train", "val", "test"]
_SPLITS: tuple[Split, ...] = ("train", "val", "test")


class TaskStream(pl.LightningDataModule):
    """Several tasks, one after the other; the train loader is the current task's.

    The validation and test loaders are one per task that has such rows, in the order of ``tasks``, so that Lightning
    itself tags each metric with the task (``dataloader_idx``). :meth:`loader_tasks` says which task a loader belongs to.

    Every row is used exactly once an epoch, for map and iterable sources, any number of workers and of processes;
    evaluation rows are counted once. (Iterable sources are read whole by each process and worker; a source that
    splits itself over processes must not be given here.) The state is in every checkpoint: the current task, the
    position in its rows, each process's random generators, and the scores of all finished stages. A checkpoint resumes
    in the middle of any task, also with another number of workers or processes.

    Text rows (see :func:`lightning_cl.data.read_rows`) are encoded with the tokenizer given here, or that of the module
    that is trained; rows of any other kind reach ``collate_fn`` as they are.

    Args:
        tasks: the tasks, in the order in which they are learnt; probes may stand anywhere.
        batch_size: rows of one process's training batch.
        eval_batch_size: rows of one process's evaluation batch; default: ``batch_size``.
        shuffle: whether the training rows of map sources are shuffled anew in each epoch.
        seed: of the shuffling; default: that of ``seed_everything``, else 0.
        num_workers: worker processes of each loader.
        collate_fn: list of rows -> batch; default: padding for token rows, else torch's ``default_collate``.
        tokenizer: a tokenizer, or the path or name of one, for text rows; default: the module's ``tokenizer``.
        max_length: longest text row in tokens; default: see :class:`lightning_cl.data.Encoder`.
        template: ``"auto"`` renders prompts with the tokenizer's chat template where there is one, ``"none"`` never.
        truncation_side: the side at which a prompt that is too long loses tokens.
        prompt_loss_weight: weight of the prompt's tokens in the loss; default: the module's, else 0.
        pin_memory: copy batches into pinned memory (for GPUs).
        persistent_workers: keep the training workers between epochs (map sources).

    Raises:
        MisconfigurationException: for no task, two tasks of one name, an empty task and a size that is not positive.

    Example:
        >>> stream = TaskStream([Task("a", train=[1, 2, 3]), Task("b", train=[4, 5])], batch_size=2, shuffle=False)
        >>> stream.setup("fit")
        >>> [batch.tolist() for batch in stream.train_dataloader()]
        [[1, 2], [3]]
        >>> stream.current_index = 1
        >>> stream.current_task.name, [batch.tolist() for batch in stream.train_dataloader()]
        ('b', [[4, 5]])
    """

    def __init__(
        self,
        tasks: list[Task],
        batch_size: int,
        eval_batch_size: int | None = None,
        shuffle: bool = True,
        seed: int | None = None,
        num_workers: int = 0,
        collate_fn: Callable | None = None,
        tokenizer: Any = None,
        max_length: int | None = None,
        template: Literal["auto", "none"] = "auto",
        truncation_side: Literal["left", "right"] = "left",
        prompt_loss_weight: float | None = None,
        pin_memory: bool = False,
        persistent_workers: bool = False,
    ) -> None:
        super().__init__()
        self.tasks = [task if isinstance(task, Task) else Task(**task) for task in tasks]
        _check_tasks(self.tasks)
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
            ("num_workers", num_workers, 0),
        ):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise MisconfigurationException(
                    f"`TaskStream({name}={value!r})`: it must be a whole number of at least {least}."
                )
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.shuffle = shuffle
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
        self.num_workers = num_workers
        self.collate_fn = collate_fn
        self.tokenizer = tokenizer
        self.encoder_options: dict[str, Any] = {
            "max_length": max_length,
            "template": template,
            "truncation_side": truncation_side,
        }
        if prompt_loss_weight is not None:
            self.encoder_options["prompt_loss_weight"] = prompt_loss_weight
        self.pin_memory = pin_memory
        self.persistent_workers = persistent_workers
        #: Index of the current task among :attr:`train_tasks`.
        self.current_index = 0
        #: Index of the last finished training task: -1 before the first. While a row is evaluated: the row's stage.
        self.stage = -1
        #: The scores known so far: (stage, task) -> {"value": float, "rows": int | None}.
        self.cells: dict[tuple[int, str], dict[str, Any]] = {}
        #: Why a score is missing: (stage, task) -> reason.
        self.missing: dict[tuple[int, str], str] = {}
        #: Why the stream ends early, if a callback asked for it by :meth:`stop`.
        self.stop_reason: str | None = None
        #: Tells this run's checkpoints from those of another run in the same folder.
        self.run_id: str = ""
        #: The checkpoint whose weights ended the current task (``task_end_weights="best"``).
        self.best_loaded: str = ""
        #: What a checkpoint being resumed still has to bring back.
        self.resume: progress.Resume | None = None
        #: Called whenever Lightning announces an epoch.
        self.epoch_hook: Callable[[], None] | None = None
        #: The tasks of each split's loaders while a row of the matrix is evaluated.
        self.row: dict[str, list[Task]] | None = None
        #: An error found before the processes could meet; :meth:`setup` raises it on all of them.
        self.early_error: Exception | None = None
        self._sources: dict[tuple[str, Split], Any] | None = None
        self._beginnings: dict[tuple[str, Split], Any] = {}
        self._encoder: Any = None
        self._texts: dict[tuple[str, Split], TextRows] = {}
        self._lengths_reported = False
        self._fingerprints: list[dict[str, Any]] | None = None
        #: The current train loader.
        self.train_loader: TaskLoader | None = None

    @property
    def train_tasks(self) -> list[Task]:
        """The tasks that are trained on, in order."""
        return [task for task in self.tasks if task.role == "train"]

    @property
    def current_task(self) -> Task:
        """The task whose rows the train loader gives."""
        return self.train_tasks[self.current_index]

    def task(self, name: str) -> Task:
        """The task of that name.

        Raises:
            MisconfigurationException: if there is none.
        """
        for task in self.tasks:
            if task.name == name:
                return task
        names = ", ".join(repr(task.name) for task in self.tasks)
        raise MisconfigurationException(f"No task is named {name!r}. The stream's tasks are {names}.")

    def loader_tasks(self, split: Literal["val", "test"]) -> list[Task]:
        """The task of each validation (or test) loader: entry ``i`` belongs to ``dataloader_idx`` i."""
        if self.row is not None and self._in_row:
            return self.row[split]
        return [task for task in self.tasks if getattr(task, split) is not None]

    def restart(self, run_id: str) -> None:
        """Stand before the first task, with no scores."""
        self.run_id, self.current_index, self.stage = run_id, 0, -1
        self.cells, self.missing = {}, {}
        self.stop_reason, self.best_loaded, self.resume = None, "", None

    def matrix(self) -> TaskMatrix:
        """The scores known so far, as a task matrix."""
        return matrix_of(self)

    def stop(self, reason: str) -> None:
        """End the stream after the current task, once its row is evaluated; for callbacks."""
        self.stop_reason = reason

    def num_rows(self, name: str, split: Split) -> int | None:
        """Rows of a task's split; None where there is no such split or its source has no length."""
        source = self.sources().get((name, split))
        return None if source is None else sized_len(source)

    def sources(self) -> dict[tuple[str, Split], Any]:
        """The rows of every split that is there, read and checked on the first call."""
        if self._sources is None:
            found: dict[tuple[str, Split], Any] = {}
            for task in self.tasks:
                for split in _SPLITS:
                    if getattr(task, split) is not None:
                        found[task.name, split] = read_split(task, split)
            self._sources = found
        return self._sources

    @override
    def setup(self, stage: str | None = None) -> None:
        """Read and check all sources; an error on any process is raised on every one."""
        error = self.early_error
        try:
            if error is None:
                self._check_rows(self.sources())
                self._report_lengths()
        except Exception as caught:
            error = caught
        raise_together(error)
        if self.trainer is not None and self.resume is None and stage == "fit" and self.trainer.ckpt_path:
            progress.adopt_before_plain_fit(self, self.trainer)

    @override
    def train_dataloader(self) -> TaskLoader:
        """The current task's training rows."""
        position = None if self.resume is None else self.resume.position
        overfits = self.trainer is not None and getattr(self.trainer, "overfit_batches", 0) > 0
        loader = self._loader(self.current_task, "train", self.batch_size, self.shuffle and not overfits, position)
        loader.on_epoch = self._on_epoch
        self.train_loader = loader
        return loader

    @override
    def val_dataloader(self) -> list[TaskLoader]:
        """One loader per task with validation rows."""
        return [self._eval_loader(task, "val") for task in self.loader_tasks("val")]

    @override
    def test_dataloader(self) -> list[TaskLoader]:
        """One loader per task with test rows."""
        return [self._eval_loader(task, "test") for task in self.loader_tasks("test")]

    @override
    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands; called on all processes."""
        return progress.save(self)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Stand where the checkpoint stood.

        Raises:
            MisconfigurationException: if a finished or the current task is another than in the checkpoint.
        """
        if self.trainer is None or self.trainer.state.fn == TrainerFn.FITTING:
            progress.restore(self, state_dict)

    def fingerprints(self) -> list[dict[str, Any]]:
        """What identifies each task, in order: name, role and its rows."""
        if self._fingerprints is None:
            prints: dict[str, dict[str, Any]] = {task.name: {} for task in self.tasks}
            for (name, split), source in self.sources().items():
                prints[name][split] = fingerprint(source)
            self._fingerprints = [
                {"name": task.name, "role": task.role, "splits": prints[task.name]} for task in self.tasks
            ]
        return self._fingerprints

    def check_same_tasks(self, saved: list[Mapping[str, Any]], current_index: int) -> None:
        """Refuse a checkpoint of another stream: its finished and its current tasks and its probes must be ours.

        Raises:
            MisconfigurationException: with the first difference.
        """
        ours = {entry["name"]: entry for entry in self.fingerprints()}
        trained = [entry for entry in saved if entry["role"] == "train"][: current_index + 1]
        names = [task.name for task in self.train_tasks]
        problem = None
        for index, entry in enumerate(trained):
            if index >= len(names) or names[index] != entry["name"]:
                now = repr(names[index]) if index < len(names) else "nothing"
                problem = f"task {index} is {entry['name']!r} in the checkpoint and {now} now"
                break
        probes = [entry for entry in saved if entry["role"] == "probe"]
        for entry in [*trained, *probes] if problem is None else []:
            now_entry = ours.get(entry["name"])
            if now_entry is None or now_entry["role"] != entry["role"]:
                problem = f"{entry['role']} task {entry['name']!r} of the checkpoint is not in the stream"
                break
            for split in _SPLITS:
                was, now_split = entry["splits"].get(split), now_entry["splits"].get(split)
                if (was is None) != (now_split is None):
                    problem = (
                        f"task {entry['name']!r} has `{split}` rows {'only in the checkpoint' if was else 'only now'}"
                    )
                elif was is not None and now_split is not None and (what := difference(was, now_split)):
                    problem = f"task {entry['name']!r}, `{split}`: {what}"
                if problem is not None:
                    break
            if problem is not None:
                break
        if problem is not None:
            raise MisconfigurationException(
                f"The checkpoint is of another stream: {problem}. Finished and current tasks must be the same to go on"
                " (tasks may be added after them). Give the tasks of the checkpoint, or start anew without `ckpt_path`."
            )

    @property
    def _in_row(self) -> bool:
        return self.row is not None and self.trainer is not None and self.trainer.state.fn != TrainerFn.FITTING

    def _check_rows(self, sources: Mapping[tuple[str, Split], Any]) -> None:
        for (name, split), source in sources.items():
            rows = sized_len(source)
            if rows == 0:
                raise MisconfigurationException(
                    f"Task {name!r} has no `{split}` rows: its source is empty. Check the source, or leave the split out."
                )
            if rows is not None and rows < world_size():
                raise MisconfigurationException(
                    f"Task {name!r} has {rows} `{split}` rows for {world_size()} processes, so some would have none and"
                    " wait for ever. Use fewer processes, or more rows."
                )

    def _report_lengths(self) -> None:
        """Once, and before training: which text rows are too long."""
        if self._lengths_reported or self.trainer is None:
            return
        self._lengths_reported = True
        for (name, split), source in self.sources().items():
            text = None if is_iterable(source) else self._text(self.task(name), split, source)
            if text is not None:
                text.report_lengths()

    def _loader(
        self, task: Task, split: Split, batch_size: int, shuffle: bool, position: Position | None = None
    ) -> TaskLoader:
        source = self.sources()[task.name, split]
        if is_iterable(source) and callable(getattr(source, "state_dict", None)):
            self._beginnings.setdefault((task.name, split), source.state_dict())
        text = self._text(task, split, source)
        return TaskLoader(
            source if text is None or text.dataset is None else text.dataset,
            batch_size,
            self.collate_fn or (default_collate if text is None else text.collate),
            shuffle=shuffle,
            seed=self.seed * 1_000_003 + self.current_index,
            rank=rank(),
            world_size=world_size(),
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            persistent_workers=self.persistent_workers and split == "train",
            position=position,
            order=None if text is None else text.order,
            encode=None if text is None else text.encode,
            beginning=self._beginnings.get((task.name, split)),
        )

    def _eval_loader(self, task: Task, split: Literal["val", "test"]) -> TaskLoader:
        # In a row of the matrix `trainer.validate` also scores test rows, for modules without a `test_step`.
        if self._in_row and task.test is not None:
            split = "test"
        return self._loader(task, split, self.eval_batch_size, shuffle=False)

    def _text(self, task: Task, split: Split, source: Any) -> TextRows | None:
        module = None if self.trainer is None else self.trainer.lightning_module
        has_tokenizer = self.tokenizer is not None or getattr(module, "tokenizer", None) is not None
        if not (has_tokenizer if is_iterable(source) else holds_text(source)):
            return None
        if not has_tokenizer and self.collate_fn is not None:
            return None  # the user's own function takes text as it is
        if self._encoder is None:
            self._encoder = make_encoder(module, self.tokenizer, self.encoder_options)
        if (task.name, split) not in self._texts:
            self._texts[task.name, split] = TextRows(task, split, source, self._encoder)
        return self._texts[task.name, split]

    def _on_epoch(self, epoch: int) -> None:
        if self.epoch_hook is not None:
            self.epoch_hook()
        if self.resume is not None:
            # The last moment before the first batch is read, and after every hook that may draw random numbers.
            self.resume.restore_random_state()


def _check_tasks(tasks: list[Task]) -> None:
    if not any(task.role == "train" for task in tasks):
        raise MisconfigurationException(
            f"`TaskStream` got {len(tasks)} tasks and none to train on. Give at least one `Task(name, train=...)`."
        )
    double = [name for name, count in Counter(task.name for task in tasks).items() if count > 1]
    if double:
        raise MisconfigurationException(
            f"`TaskStream` got two tasks named {double[0]!r}: their metrics and files would be mixed up. Give each task"
            " a name of its own."
        )
