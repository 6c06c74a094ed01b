# SPDX-License-Identifier: Apache-2.0
"""Tables, plots, result files and the HTML report of a run."""

from lightning_cl.report.plots import curves as curves
from lightning_cl.report.plots import heat_map as heat_map
from lightning_cl.report.plots import side_by_side as side_by_side
from lightning_cl.report.tables import matrix_table as matrix_table
from lightning_cl.report.tables import run_tables as run_tables
from lightning_cl.report.tables import summary_table as summary_table

__all__ = ["curves", "heat_map", "matrix_table", "run_tables", "side_by_side", "summary_table"]
