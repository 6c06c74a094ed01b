# SPDX-License-Identifier: Apache-2.0
"""The error that every unusable row, file or data source raises."""

from lightning.pytorch.utilities.exceptions import MisconfigurationException


class DataError(MisconfigurationException, ValueError):
    """Rows, a file or a data source that cannot be used as given.

    It is a ``MisconfigurationException``, since the data are part of a run's configuration, and a ``ValueError``, since
    the functions of this package also serve alone.

    Example:
        >>> issubclass(DataError, ValueError)
        True
    """
