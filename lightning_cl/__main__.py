# SPDX-License-Identifier: Apache-2.0
"""``python -m lightning_cl``: the same as the console script ``lightning-cl``."""

import sys

from lightning_cl.cli import main

if __name__ == "__main__":
    sys.exit(main())
