# SPDX-License-Identifier: Apache-2.0
"""``lightning-cl export``: a checkpoint's adapter as a PEFT folder, or merged into its base."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lightning.pytorch.utilities.exceptions import MisconfigurationException


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments; None takes the command line's.

    Returns:
        0, or 1 after printing what is wrong.
    """
    arguments = _parser().parse_args(argv)
    from lightning_cl.strategies.export import export_checkpoint, merge

    try:
        if arguments.merge:
            folder = merge(
                arguments.source,
                arguments.base,
                arguments.out,
                adapter_name=arguments.adapter,
                weights=arguments.weights,
            )
        elif (arguments.source / "adapter_config.json").is_file():
            raise MisconfigurationException(
                f"{arguments.source} is a PEFT adapter folder already. Pass `--merge` to merge it, or a checkpoint to"
                " export."
            )
        else:
            folder = export_checkpoint(
                arguments.source, arguments.out, adapter_name=arguments.adapter, weights=arguments.weights
            )
    except (MisconfigurationException, OSError, RuntimeError, TypeError, ValueError) as error:
        print(f"lightning-cl export: {error}", file=sys.stderr)
        return 1
    print(f"Wrote {'the merged model' if arguments.merge else 'the adapter'} to {folder}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-cl export",
        description="Write a checkpoint's adapter as a PEFT folder, or (--merge) the whole model with the adapter merged"
        " into the full-precision base, read from disk file by file.",
    )
    parser.add_argument(
        "source", type=Path, help="a checkpoint (file or folder); with --merge also a PEFT adapter folder"
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--merge", action="store_true", help="merge into the base and write a whole model")
    parser.add_argument(
        "--base", type=Path, default=None, help="folder of the full-precision base (default: the run's)"
    )
    parser.add_argument("--adapter", default="default", help="which adapter of the checkpoint (default: %(default)s)")
    parser.add_argument(
        "--weights",
        choices=("evaluated", "trained", "slow"),
        default="evaluated",
        help="the set that the run evaluates, the trained weights, or LoRAInterpolator's slow ones (default: %(default)s)",
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
