# SPDX-License-Identifier: Apache-2.0
"""Tasks, the stream they form, and training on them in turn."""

from lightning_cl.stream.fit_stream import fit_stream as fit_stream
from lightning_cl.stream.task import Task as Task
from lightning_cl.stream.task_stream import TaskStream as TaskStream

__all__ = ["Task", "TaskStream", "fit_stream"]
