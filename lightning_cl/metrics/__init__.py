# SPDX-License-Identifier: Apache-2.0
"""The task matrix, the figures read off it and the intervals of its scores."""

from lightning_cl.metrics.bootstrap import bootstrap_interval as bootstrap_interval
from lightning_cl.metrics.lookup import find_score as find_score
from lightning_cl.metrics.task_matrix import TaskMatrix as TaskMatrix

__all__ = ["TaskMatrix", "bootstrap_interval", "find_score"]
