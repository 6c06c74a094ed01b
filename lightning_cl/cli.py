# SPDX-License-Identifier: Apache-2.0
"""The command line: LightningCLI that runs streams of tasks, and the package's own commands."""

import importlib
import sys
from collections import Counter
from pathlib import Path
from typing import Any, Optional

import yaml
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

import lightning_cl  # noqa: F401 - registers the strategies
from lightning_cl.stream import TaskStream, fit_stream
from lightning_cl.stream.files import find_last_in

#: The package's own commands: LightningCLI's subcommands must be Trainer methods, so these are dispatched before it.
COMMANDS = {
    "callbacks": "list, show or copy the callbacks of the catalogue",
    "report": "plots and the HTML report of a run",
    "generate-replay": "write self-generated replay rows to a file",
    "route": "say which task's adapter a prompt is routed to",
    "connectivity": "scores along the path between two checkpoints",
    "export": "write a run's adapters or weights for use elsewhere",
}


class NumberedSaveConfig(SaveConfigCallback):
    """Saves the configuration beside the run's files, and lets a resume into the same folder pass.

    A configuration that is there already is left alone; a different one is saved beside it as ``config_1.yaml``,
    ``config_2.yaml`` and so on, where LightningCLI would refuse to run.
    """

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save on rank zero, under the first name that is free."""
        if self.already_saved:
            return
        log_dir = trainer.log_dir  # this broadcasts, so all ranks call it
        assert log_dir is not None
        if trainer.is_global_zero:
            fs = get_filesystem(log_dir)
            now = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
            stem, suffix = Path(self.config_filename).stem, Path(self.config_filename).suffix
            number, path = 0, str(Path(log_dir, self.config_filename))
            while fs.isfile(path):
                with fs.open(path, "r") as file:
                    if yaml.safe_load(file) == now:
                        break
                number += 1
                path = str(Path(log_dir, f"{stem}_{number}{suffix}"))
            else:
                fs.makedirs(log_dir, exist_ok=True)
                self.parser.save(self.config, path, skip_none=False, overwrite=False, multifile=self.multifile)
            self.save_config(trainer, pl_module, stage)
        self.already_saved = True


class ContinualCLI(LightningCLI):
    """LightningCLI whose ``fit`` trains a whole stream when the data is a :class:`~lightning_cl.TaskStream`.

    With any other data it is LightningCLI. ``fit`` has these arguments more:

    - ``--continue-from RUN_DIR``: go on from the furthest whole checkpoint of an earlier run, in a new process with new
      tasks at the end of the stream.
    - ``--optimizer_reset`` and ``--task_end_weights``: see :func:`~lightning_cl.fit_stream`.

    The catalogue's fragments append their callback (``callbacks+:``) and are given after the base configuration. A
    fragment before a base that sets ``callbacks:``, which would silently drop it, and a callback given twice are refused.

    Example::

        lightning-cl fit --config examples/quickstart.yaml --config callbacks/replay_mixer.yaml
    """

    def __init__(
        self,
        model_class: Any | None = None,
        datamodule_class: Any | None = None,
        save_config_callback: type[SaveConfigCallback] | None = NumberedSaveConfig,
        **kwargs: Any,
    ) -> None:
        #: The task matrix of a stream's fit.
        self.matrix: Any = None
        super().__init__(model_class, datamodule_class, save_config_callback, **kwargs)

    @override
    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """LightningCLI's parser, whose help names the package's own commands too."""
        own = "; ".join(f"`{name}`: {what}" for name, what in COMMANDS.items())
        kwargs.setdefault("epilog", f"Further commands, each with its own --help: {own}.")
        return super().init_parser(**kwargs)

    @override
    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "fit":
            parser.add_argument(
                "--continue_from",
                "--continue-from",
                type=Optional[str],  # noqa: UP045
                default=None,
                help="Folder of an earlier run of this stream; goes on from its furthest whole checkpoint.",
            )
            parser.add_argument(
                "--optimizer_reset",
                type=bool,
                default=True,
                help="Whether each task of a stream begins with a new optimizer and schedule.",
            )
            parser.add_argument(
                "--task_end_weights",
                type=str,
                default="last",
                help="`last`, or `best` to end each task of a stream with ModelCheckpoint's best weights.",
            )
        return parser

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Check the order of the configurations, parse, and check that no callback comes twice."""
        given = sys.argv[1:] if args is None else args
        if isinstance(given, list):
            problem = fragment_problem(given)
            if problem is not None:
                parser.error(problem)
        super().parse_arguments(parser, args)
        problem = double_callback(self.config)
        if problem is not None:
            parser.error(problem)

    def fit(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | Path | None = None,
        **kwargs: Any,
    ) -> None:
        """Run the stream, or ``trainer.fit`` where the data is none."""
        continue_from = self._get(self.config_init, "continue_from")
        if not isinstance(datamodule, TaskStream):
            if continue_from is not None:
                raise MisconfigurationException(
                    f"`--continue-from {continue_from}` goes on with a stream of tasks, but the data is"
                    f" `{type(datamodule).__name__}`. Use `data: lightning_cl.TaskStream`, or `--ckpt_path` for a plain fit."
                )
            self.trainer.fit(model, datamodule=datamodule, ckpt_path=ckpt_path, **kwargs)
            return
        if continue_from is not None:
            ckpt_path = _checkpoint_of(Path(continue_from), type(datamodule).__qualname__, ckpt_path)
        self.matrix = fit_stream(
            self.trainer,
            model,
            datamodule,
            ckpt_path=ckpt_path,
            optimizer_reset=self._get(self.config_init, "optimizer_reset", True),
            task_end_weights=self._get(self.config_init, "task_end_weights", "last"),
        )


def fragment_problem(args: list[str]) -> str | None:
    """What is wrong with the order of ``--config`` files and ``--trainer.callbacks`` options, or None.

    Example:
        >>> fragment_problem(["fit", "--trainer.max_epochs=1"]) is None
        True
    """
    appended_by: str | None = None
    seen: dict[Path, str] = {}
    for option, value in _options(args):
        sets = appends = False
        if option in ("--config", "-c"):
            path = Path(value)
            if path.is_file():
                if path.resolve() in seen:
                    return f"the configuration {value} is given twice, so its callbacks would run twice. Give it once."
                seen[path.resolve()] = value
            content = _content(path)
            for part in (content, *(content.get(name) for name in ("fit", "validate", "test", "predict"))):
                trainer = part.get("trainer") if isinstance(part, dict) else None
                sets |= isinstance(trainer, dict) and "callbacks" in trainer
                appends |= isinstance(trainer, dict) and "callbacks+" in trainer
            name = value
        else:
            name = option
            appends = option == "--trainer.callbacks+"
            sets = option == "--trainer.callbacks"
        if sets and appended_by is not None:
            return (
                f"{name} sets `trainer.callbacks` after {appended_by} has appended to them (`callbacks+`), which would"
                f" silently drop what was appended. Give {name} before {appended_by}."
            )
        if appends:
            appended_by = name
    return None


def double_callback(config: Any) -> str | None:
    """The first of this package's callbacks that a parsed configuration holds twice, in words, or None.

    Two of one class with different arguments (two ReplayMixers with sources of their own) are two callbacks.
    """
    subcommand = config.get("subcommand")
    callbacks = (config.get(subcommand, config) if subcommand else config).get("trainer.callbacks") or []
    given: Counter[tuple[str, str]] = Counter()
    for entry in callbacks if isinstance(callbacks, list) else [callbacks]:
        path = entry.get("class_path", "") if hasattr(entry, "get") else ""
        if path.startswith("lightning_cl."):
            given[path, repr(entry.get("init_args"))] += 1
    for (path, _), count in given.items():
        if count > 1:
            return (
                f"the callback `{path.rsplit('.', 1)[1]}` is given {count} times with the same arguments, by configurations"
                " that each append it, and would act that often in each step. Give it once."
            )
    return None


def _options(args: list[str]) -> list[tuple[str, str]]:
    found = []
    for i, arg in enumerate(args):
        if arg.startswith("-"):
            option, equals, value = arg.partition("=")
            found.append((option, value if equals else (args[i + 1] if i + 1 < len(args) else "")))
    return found


def _content(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return {}  # the parser says what is wrong with the file
    return content if isinstance(content, dict) else {}


def _checkpoint_of(folder: Path, key: str, ckpt_path: str | Path | None) -> Path:
    if ckpt_path is not None:
        raise MisconfigurationException(
            f"`--continue-from {folder}` and `--ckpt_path {ckpt_path}` both say where to begin. Give one of them."
        )
    if not folder.is_dir():
        raise MisconfigurationException(
            f"`--continue-from {folder}`: there is no such folder. Give the folder of a run, which holds `task_0_...`."
        )
    path = find_last_in(folder, key)
    if path is None:
        raise MisconfigurationException(
            f"`--continue-from {folder}`: the folder holds no whole checkpoint of a stream of tasks. Give the folder of a"
            " run, which holds `task_0_...`, or leave the option out to start anew."
        )
    return path


def main(argv: list[str] | None = None) -> int:
    """The console script ``lightning-cl``.

    Args:
        argv: arguments; those of the process by default.

    Returns:
        The exit status.
    """
    args = sys.argv[1:] if argv is None else argv
    if args and args[0] in COMMANDS:
        module = importlib.import_module(f"lightning_cl.commands.{args[0].replace('-', '_')}")
        return int(module.main(args[1:]) or 0)
    ContinualCLI(args=None if argv is None else args)
    return 0
