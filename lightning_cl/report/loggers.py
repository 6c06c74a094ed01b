# SPDX-License-Identifier: Apache-2.0
"""Figures of a run to whichever Lightning loggers are there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl


def log_scalars(trainer: pl.Trainer, scalars: Mapping[str, float]) -> None:
    """Send scalars to every logger, at the logger step at which Lightning stands."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(scalars), step=logger_step(trainer))
        logger.save()


def log_figures(trainer: pl.Trainer, figures: Mapping[str, Any]) -> list[str]:
    """Send matplotlib figures to every logger that takes images.

    These are TensorBoard (``experiment.add_figure``) and every logger with Lightning's ``log_image`` (Weights & Biases
    among them).

    Returns:
        The class names of the loggers that took them.
    """
    takers = []
    for each in trainer.loggers:
        logger: Any = each
        if hasattr(logger.experiment, "add_figure"):
            for name, figure in figures.items():
                logger.experiment.add_figure(name, figure, global_step=logger_step(trainer), close=False)
        elif callable(getattr(logger, "log_image", None)):
            for name, figure in figures.items():
                logger.log_image(key=name, images=[pixels(figure)], step=logger_step(trainer))
        else:
            continue
        takers.append(type(logger).__name__)
    return takers


def logger_step(trainer: pl.Trainer) -> int:
    """The step at which Lightning logs: unlike ``trainer.global_step`` it goes on over the tasks of one Trainer."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def pixels(figure: Any) -> Any:
    """The figure as an array ``[height, width, 3]`` of uint8."""
    import numpy as np

    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()
