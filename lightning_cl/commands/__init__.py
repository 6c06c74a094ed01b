# SPDX-License-Identifier: Apache-2.0
"""Console subcommands that are not Trainer methods, one module each."""
