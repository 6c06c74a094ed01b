# SPDX-License-Identifier: Apache-2.0
"""Self-generated samples: the model's own text as replay rows, made in large batches before they are needed."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_cl.checkpoints import pending_checkpoint
from lightning_cl.distributed import gather_objects, raise_together, rank, world_size
from lightning_cl.replay.anchor import WeightAnchor
from lightning_cl.replay.generation import DecodeEngine
from lightning_cl.replay.grammar import RowGrammar
from lightning_cl.replay.prompting import encode_prompt, find_bos, find_eos, find_tokenizer
from lightning_cl.replay.rows import Row, content_id
from lightning_cl.replay.self_generated_checks import check_arguments, refuse_strategy
from lightning_cl.replay.shuffle import ShuffledWalk
from lightning_cl.replay.source import ReplaySource

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lightning_cl.attachment import Attachment

# Read by LightningCLI, so they must exist at run time.
Prompts = Literal["bos", "past_tasks"] | list[str | list[int]]
Parser = Callable[[Row, "str | None"], bool]

# Rounds of generation for one pool whose rows a parser may drop.
_ROUNDS = 4
_LOW_YIELD = 0.1
PAST_TASKS = "SelfGenerated.past_tasks"


@dataclass
class _Use:
    """How many rows of the pool this rank has used, and the most in one batch."""

    used: int = 0
    largest: int = 0
    in_batch: int = 0

    def count(self, rows: int) -> None:
        self.used += rows
        self.in_batch += rows
        self.largest = max(self.largest, self.in_batch)

    def next_batch(self) -> None:
        self.in_batch = 0

    def exceeds(self, limit: int) -> bool:
        """Whether another batch like the largest would use more than ``limit`` rows on all ranks. Collective."""
        most, largest = (max(values) for values in zip(*gather_objects((self.used, self.largest)), strict=True))
        return (most + largest) * world_size() > limit

    def state_dict(self) -> dict[str, int]:
        """The largest of all ranks. Collective."""
        used, largest = (max(values) for values in zip(*gather_objects((self.used, self.largest)), strict=True))
        return {"used": used, "largest": largest}


class SelfGenerated(ReplaySource):
    """Replays what the model itself samples: no stored data of any kind.

    Self-generated replay (Marek et al., arXiv 2605.26097, "Forgetting in Language Models: Capacity, Optimization, and
    Self-Generated Replay", section 3): rows are sampled at temperature 1, without top-k or top-p, from the beginning-
    of-text token alone. Use it with :class:`~lightning_cl.callbacks.ReplayDistillation`, which keeps the model's
    predictions on them where they were.

    The paper samples fresh rows in every step, from a model that does not change during the task; so rows made ahead,
    in batches that fill the device, are the same rows (``refresh="per_step"``). A pool that is used again and again
    during a task (the default) costs a fraction of that. The pool is kept on the CPU: 8 bytes a token. Rows come from a
    seed and their number alone, whatever the number of ranks; the ranks make disjoint parts and share them. The
    seconds that generation takes are logged as ``cl/generation_seconds``.

    Past tasks can be replayed without a stored row (``prompts="past_tasks"``): each one's rows begin with the beginning
    that all its training rows shared (its instruction), and the model of before this task goes on from there. For that
    the model must have learnt the inputs too: train with ``CausalLMModule(prompt_loss_weight=...)`` above 0. Rows that
    do not have the form of the task's own are dropped (:class:`~lightning_cl.replay.grammar.RowGrammar`: they must end,
    with the prompts' common ending before the answer, and one of the answers where these were few), or those that
    ``parser`` does not accept; the yield is logged as ``cl/generation_yield``.

    Note:
        Single device, DDP and FSDP2, where the weights are gathered once for a generation. In full fine-tuning, a
        state of the weights that must be generated from later is kept on the CPU (a copy of the trained parameters).

    Args:
        pool_size: rows made at once.
        length: tokens of a row, prompt included (256 and 512 in the paper).
        refresh: when a new pool is made: ``"per_task"``, ``"once"`` (at the first task), ``"per_step"`` (each row is
            used once, the paper), or ``"every_n_steps"``.
        prompts: ``"bos"``, ``"past_tasks"``, or a list of texts or of lists of token ids, used in turn.
        anchor: the model that rows are made from: ``"initial"`` (before the first task; with LoRA the adapters off),
            ``"previous_task"`` (as it was when this task began), or ``"auto"``: initial, but for past tasks'
            rows, which the initial model never learnt, previous_task.
        on_eos: ``"continue"`` treats the end token as any other, ``"stop"`` ends the row with it. By default past
            tasks' rows stop and others continue (the paper).
        temperature: of the sampling.
        reuse: how often each row may be used before a new pool is made; by default as often as ``refresh`` allows.
        every_n_steps: optimizer steps between two pools, for ``refresh="every_n_steps"``.
        parser: function of ``(row, text)`` that says whether a row is grammatical; ``text`` is None without a tokenizer.
            By default all rows are, and of past tasks those that have the form of the task's rows.
        batch_size: rows decoded together; by default as many as free memory allows.
        tokenizer: path or name of a tokenizer (or the object), where neither module nor data module has one.
        seed: seed of the rows and of the order in which they are replayed.

    Raises:
        ValueError: for a number out of range, or options that contradict each other.
        MisconfigurationException: before training, for a model without a language-model head, a tokenizer without a
            BOS token, a length beyond the context, or a strategy whose weights cannot be gathered; in the first step,
            for a pool smaller than a batch needs; and if no row of a past task is grammatical.
        RuntimeError: if generation meets logits that are not finite.

    Example:
        >>> source = SelfGenerated(pool_size=512, length=128, refresh="per_task")
        >>> source.available()
        0

    In YAML::

        callbacks+:
          - class_path: lightning_cl.callbacks.ReplayMixer
            init_args:
              sources:
                class_path: lightning_cl.replay.SelfGenerated
                init_args: {pool_size: 512, length: 256}
    """

    def __init__(
        self,
        pool_size: int = 1000,
        length: int = 256,
        refresh: Literal["per_task", "once", "per_step", "every_n_steps"] = "per_task",
        prompts: Prompts = "bos",
        anchor: Literal["auto", "initial", "previous_task"] = "auto",
        on_eos: Literal["continue", "stop"] | None = None,
        temperature: float = 1.0,
        reuse: int | None = None,
        every_n_steps: int | None = None,
        parser: Parser | None = None,
        batch_size: int | None = None,
        tokenizer: Any = None,
        seed: int = 0,
    ) -> None:
        check_arguments(pool_size, length, refresh, prompts, anchor, on_eos, temperature, reuse, every_n_steps)
        self.pool_size = pool_size
        self.length = length
        self.refresh = refresh
        self.prompts = prompts
        self.anchor = anchor
        self.on_eos = on_eos or ("stop" if prompts == "past_tasks" else "continue")
        self.temperature = temperature
        self.reuse = 1 if refresh == "per_step" else reuse
        self.every_n_steps = every_n_steps
        self.parser = parser
        self.batch_size = batch_size
        self.tokenizer = tokenizer
        self.seed = seed
        self.seconds = 0.0
        kind = anchor if anchor != "auto" else "previous_task" if prompts == "past_tasks" else "initial"
        self._anchor = WeightAnchor(kind, offload=True)
        self._pool: list[Row] = []
        self._walk = ShuffledWalk(seed)
        self._use = _Use()
        self._looked_at = -1
        self._made = 0
        self._pools = 0
        self._task = -1
        self._made_at = 0
        self._task_name: str | None = None
        self._learning = RowGrammar()
        self._grammars: dict[str, RowGrammar] = {}
        self._anchor_task = -1
        self._trainer: pl.Trainer | None = None
        self._module: pl.LightningModule | None = None
        self._last_module: weakref.ref[pl.LightningModule] | None = None
        self._task_index = 0
        self._bos: int | None = None
        self._tokenizer: Any = None

    @property
    def name(self) -> str:
        """``SelfGenerated``, or ``SelfGenerated.past_tasks`` for rows of past tasks."""
        return PAST_TASKS if self.prompts == "past_tasks" else type(self).__name__

    @property
    def holds_past_tasks(self) -> bool:
        """Whether the rows are of past tasks, which the initial model never learnt."""
        return self.prompts == "past_tasks"

    # ------------------------------------------------------------------ the life of a task

    def prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task_index: int) -> None:
        """Refuse what cannot work, before anything is sharded or trained."""
        refuse_strategy(trainer)
        task = getattr(getattr(trainer, "datamodule", None), "current_task", None)
        self._task_index, self._task_name = task_index, getattr(task, "name", None) or str(task_index)
        self._tokenizer = find_tokenizer(self.tokenizer, trainer, pl_module)
        DecodeEngine(pl_module, length=self.length)
        self._bos = find_bos(pl_module, self._tokenizer, required=self.prompts == "bos")
        for task_name, tokens in self._prompt_tokens():
            if len(tokens) >= self.length:
                what = "A prompt" if task_name is None else f"The beginning that all rows of task {task_name!r} share"
                raise MisconfigurationException(
                    f"{what} has {len(tokens)} tokens, and `SelfGenerated(length={self.length})` counts them in, so nothing"
                    f" is left to sample. Raise `length` above {len(tokens)}, or shorten the prompt."
                )
        if self.on_eos == "stop":
            find_eos(pl_module, self._tokenizer)
        if self.prompts == "past_tasks" and getattr(pl_module, "prompt_loss_weight", None) == 0:
            rank_zero_warn(
                '`SelfGenerated(prompts="past_tasks")` with `prompt_loss_weight=0`: a model trained on answers alone'
                " cannot write the inputs of a task, so hardly a row will be usable. Set `prompt_loss_weight` of"
                " `CausalLMModule` above 0 (0.1 is a start)."
            )

    def start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, attachment: Attachment) -> None:
        """Make this task's pool, if it is due."""
        self._trainer, self._module, self._looked_at = trainer, pl_module, -1
        self._last_module = weakref.ref(pl_module)
        self._anchor.rebind()
        if pending_checkpoint(trainer) is None:
            self._refill_if_due()
        # A restored run may have its weights and its pool only later: the first step looks whether a pool is due.

    @property
    def observes(self) -> bool:
        """Whether the form of the task's rows is still being learnt."""
        return self.prompts == "past_tasks" and not self._learning.complete

    def observe(self, rows: list[Row]) -> None:
        """Learn from these rows what the task's rows share."""
        for row in rows:
            self._learning.learn(row.content)

    def available(self) -> int:
        """Rows of the pool; makes it, if it is due. Collective, in the first call of each batch."""
        if self._trainer is not None:
            # A rank may ask again within a batch, alone: only what all ranks do may be collective.
            batch = self._trainer.fit_loop.epoch_loop.batch_progress.total.ready
            if batch != self._looked_at:
                self._looked_at = batch
                self._refill_if_due()
                self._use.next_batch()
        return len(self._pool)

    def draw(self, count: int, rank: int, world_size: int) -> list[Row]:
        """The next rows of the shuffled walk over the pool."""
        wanted = count * world_size
        if wanted > len(self._pool):
            raise MisconfigurationException(
                f"`SelfGenerated(pool_size={self.pool_size})` holds {len(self._pool)} rows, and one batch needs {wanted}"
                f" ({count} on each of {world_size} ranks): every batch would repeat the same rows. Raise `pool_size` to"
                f" {wanted} or more (hundreds are sensible), or lower `rows_per_batch` or `ratio` of `ReplayMixer`."
            )
        self._use.count(count)
        return [self._pool[i] for i in self._walk.take(count, len(self._pool), rank, world_size)]

    def known_rows(self) -> list[Row]:
        """The rows of the pool."""
        return list(self._pool)

    @property
    def version(self) -> int:
        """How many pools were made."""
        return self._pools

    def end_task(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task_index: int) -> None:
        """Keep the form of the task's rows, agreed over the ranks."""
        if self.prompts == "past_tasks":
            grammar = RowGrammar()
            for found in gather_objects(self._learning):
                grammar.merge(found)
            if not grammar.beginning and self._bos is not None:
                grammar.begin_with(self._bos)
            if grammar.beginning:
                self._grammars[self._task_name or str(task_index)] = grammar
            else:
                rank_zero_warn(
                    f"The rows of task {self._task_name!r} share no first token and the tokenizer has no BOS, so"
                    " `SelfGenerated` cannot replay it. Begin its rows with an instruction or a task token."
                )
        self._learning = RowGrammar()
        self._trainer = self._module = None

    # ------------------------------------------------------------------ making rows

    def _refill_if_due(self) -> None:
        assert self._trainer is not None
        assert self._module is not None
        if self._needs_anchor and self._anchor_task != self._task_index:
            if self._anchor.kind == "previous_task" or not self._anchor.taken:
                self._anchor.take(self._module)
            self._anchor_task = self._task_index
        if self.prompts == "past_tasks" and not self._grammars:
            return
        new_task = self._task != self._task_index
        stale = self.every_n_steps is not None and self._trainer.global_step - self._made_at >= self.every_n_steps
        used_up = self.reuse is not None and self._use.exceeds(len(self._pool) * self.reuse)
        if not self._pool or (new_task and self.refresh != "once") or stale or used_up:
            self._refill()

    @property
    def _needs_anchor(self) -> bool:
        """Whether rows may be made when the model is no longer the anchor."""
        if self.refresh in ("per_step", "every_n_steps") or self.reuse is not None:
            return True
        return self._anchor.kind == "initial" and self.refresh == "per_task"

    def _refill(self) -> None:
        """Make a new pool: each rank its part, all of them shared."""
        assert self._trainer is not None
        assert self._module is not None
        began = time.perf_counter()
        pool: list[Row] = []
        made = tokens = 0
        for _ in range(_ROUNDS):
            count = self.pool_size - len(pool)
            if pool:
                # What was dropped so far tells how many rows it takes; half as many again, since it is an estimate.
                count = min(2 * self.pool_size, -(-3 * count * made // (2 * len(pool))))
            rows = self._make(count)
            made += len(rows)
            tokens += sum(row.length for row, _ in rows)
            pool += [row for row, ended in rows if self._accepts(row, ended)]
            if len(pool) >= self.pool_size or not pool:
                break
        self._pool = pool[: self.pool_size]
        self._pools += 1
        self._walk, self._use = ShuffledWalk(self.seed + self._pools), _Use(largest=self._use.largest)
        self._task, self._made_at = self._task_index, self._trainer.global_step
        seconds = time.perf_counter() - began
        self.seconds += seconds
        self._report(seconds, tokens, made, len(pool))

    def _make(self, count: int) -> list[tuple[Row, bool]]:
        """The next ``count`` rows by number, and whether each has ended; the ranks share the work. Collective."""
        module, trainer = self._module, self._trainer
        assert module is not None
        assert trainer is not None
        choices = self._prompt_tokens()
        numbers = range(self._made, self._made + count)
        # Consecutive parts: all ranks' rows in order of rank are the rows in order of their number.
        share = -(-count // world_size())
        mine = numbers[rank() * share : (rank() + 1) * share]
        error: Exception | None = None
        made: list[tuple[list[int], bool]] = []
        try:
            engine = DecodeEngine(
                module,
                length=self.length,
                temperature=self.temperature,
                on_eos=self.on_eos,
                eos_token_ids=find_eos(module, self._tokenizer) if self.on_eos == "stop" else (),
                batch_size=self.batch_size,
                seed=self.seed,
            )
            bar = trainer.progress_bar_callback
            shown = trainer.is_global_zero and bar is not None and getattr(bar, "is_enabled", False)
            # At a task's start the model itself is what it was at the task's start.
            swap = self._anchor.kind == "initial" or self._anchor.taken
            # Entered by every rank, also one without a row of its own: gathering weights is collective.
            with trainer.precision_plugin.forward_context(), self._anchor.inside(module) if swap else nullcontext():
                result = engine.generate([choices[n % len(choices)][1] for n in mine], mine.start, shown)
            made = [(row.tolist(), ended) for row, ended in zip(result.rows, result.ended, strict=True)]
        except Exception as found:
            error = found
        raise_together(error)
        self._made += count
        everyone = [one for part in gather_objects(made) for one in part]
        return [
            (self._row(tokens, choices[number % len(choices)][0]), ended)
            for number, (tokens, ended) in zip(numbers, everyone, strict=True)
        ]

    def _row(self, tokens: Sequence[int], task: str | None) -> Row:
        content = {"input_ids": torch.tensor(tokens, dtype=torch.long)}
        return Row(content, content_id(content), max(1, len(tokens) - 1), task, self.name)

    def _accepts(self, row: Row, ended: bool) -> bool:
        if self.parser is None:
            if row.task is None:
                return True
            return ended and self._grammars[row.task].accepts(row.content["input_ids"].tolist())
        text = self._tokenizer.decode(row.content["input_ids"].tolist()) if self._tokenizer is not None else None
        return bool(self.parser(row, text))

    def _report(self, seconds: float, tokens: int, made: int, kept: int) -> None:
        assert self._trainer is not None
        if kept == 0:
            raise MisconfigurationException(
                f"None of {made} self-generated rows was grammatical, so there is nothing to replay. For past tasks the"
                " model must have learnt the inputs too: set `prompt_loss_weight` of `CausalLMModule` above 0, or begin"
                " the rows with a task token; or loosen `parser`; or raise `length`, if rows do not end in time."
            )
        if kept < _LOW_YIELD * made:
            rank_zero_warn(
                f"Only {kept} of {made} self-generated rows were grammatical, and {min(kept, self.pool_size)} of the"
                f" {self.pool_size} wanted are replayed. A higher `prompt_loss_weight` or a longer `length` helps."
            )
        missing = [task for task in self._grammars if task not in {row.task for row in self._pool}]
        if missing:
            rank_zero_warn(
                f"Past task {missing[0]!r} ({len(missing)} of {len(self._grammars)}) has no row among the {len(self._pool)}"
                " replayed ones: none that was generated for it was grammatical, so it is not protected. A higher"
                " `prompt_loss_weight`, a longer `length` or a larger `pool_size` helps."
            )
        metrics = {
            "cl/generation_seconds": seconds,
            "cl/generation_seconds_total": self.seconds,
            "cl/generation_tokens_per_second": tokens / max(seconds, 1e-9),
            "cl/generation_yield": kept / made,
        }
        step = self._trainer.fit_loop.epoch_loop._batches_that_stepped
        for logger in self._trainer.loggers:
            logger.log_metrics(metrics, step=step)

    def _prompt_tokens(self) -> list[tuple[str | None, list[int]]]:
        """The prompts and the task that each is of."""
        if self.prompts == "past_tasks":
            return [(task, grammar.beginning) for task, grammar in self._grammars.items()]
        if self.prompts == "bos":
            assert self._bos is not None
            return [(None, [self._bos])]
        return [(None, encode_prompt(prompt, self._tokenizer)) for prompt in self.prompts]

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """The pool and the place in it, what is known of past tasks, and the anchor's weights. Collective."""
        tokens = [row.content["input_ids"] for row in self._pool]
        return {
            "tokens": torch.cat(tokens).to(torch.int32) if tokens else torch.zeros(0, dtype=torch.int32),
            "lengths": [len(t) for t in tokens],
            "tasks": [row.task for row in self._pool],
            "walk": self._walk.state_dict(),
            "use": self._use.state_dict(),
            "made": self._made,
            "pools": self._pools,
            "task": self._task,
            "made_at": self._made_at,
            "seconds": self.seconds,
            "learning": self._learning.state_dict(),
            "grammars": {task: grammar.state_dict() for task, grammar in self._grammars.items()},
            "anchor_task": self._anchor_task,
            # Also between two fits: the shards' layout is that of the module they came from.
            "anchor": self._anchor.state_dict(self._last_module() if self._last_module is not None else None),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take all of it back."""
        rows = torch.split(state["tokens"].long(), state["lengths"]) if state["lengths"] else []
        self._pool = [self._row(t.tolist(), task) for t, task in zip(rows, state["tasks"], strict=True)]
        self._made, self._pools = state["made"], state["pools"]
        self._walk = ShuffledWalk(self.seed + self._pools)
        self._walk.load_state_dict(state["walk"])
        self._use = _Use(**state["use"])
        self._task, self._made_at, self.seconds = state["task"], state["made_at"], state["seconds"]
        self._learning = RowGrammar.from_state(state["learning"])
        self._grammars = {task: RowGrammar.from_state(saved) for task, saved in state["grammars"].items()}
        self._anchor_task = state["anchor_task"]
        self._anchor.load_state_dict(state["anchor"])
