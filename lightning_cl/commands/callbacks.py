# SPDX-License-Identifier: Apache-2.0
"""``lightning-cl callbacks``: list, show or copy the callbacks of the catalogue."""

from __future__ import annotations

import argparse
import difflib
import re
import shutil
import sys
from pathlib import Path

import lightning_cl


def catalogue() -> Path:
    """The folder of the catalogue: inside an installed wheel, else beside the package (a clone, an editable install).

    Raises:
        FileNotFoundError: if it is in neither place.
    """
    package = Path(lightning_cl.__file__).parent
    for folder in (package / "_catalogue", package.parent / "callbacks"):
        if folder.is_dir() and any(folder.glob("*.yaml")):
            return folder
    raise FileNotFoundError(
        f"The catalogue is neither in {package / '_catalogue'} (an installed wheel) nor in {package.parent / 'callbacks'}"
        " (a clone). Install lightning-cl from its wheel, or run it in a clone."
    )


def entries() -> dict[str, Path]:
    """The fragment of each callback, by name."""
    return {path.stem: path for path in sorted(catalogue().glob("*.yaml"))}


def summary(fragment: Path) -> str:
    """What a callback does, in one sentence: the card's first line of prose, else the fragment's first comment."""
    card = fragment.with_suffix(".md")
    if card.is_file():
        for paragraph in re.split(r"\n\s*\n", card.read_text(encoding="utf-8")):
            text = " ".join(paragraph.split())
            if text and not text.startswith(("#", "|", "```", "<!--", "[", "**", "- ", "`", "Source", "Class")):
                return re.split(r"(?<=[.!?]) ", text, maxsplit=1)[0]
    for line in fragment.read_text(encoding="utf-8").splitlines():
        if line.startswith("#") and "SPDX" not in line:
            return line.lstrip("# ").strip()
    return ""


def find(name: str) -> Path:
    """The fragment of a callback, named as in the catalogue or by its class.

    Raises:
        KeyError: with the closest names, if there is none.
    """
    known = entries()
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
    classes = {key.replace("_", ""): key for key in known}
    for candidate in (name, snake, classes.get(name.replace("_", "").lower(), "")):
        if candidate in known:
            return known[candidate]
    close = difflib.get_close_matches(snake, known, n=3)
    hint = f"Did you mean {' or '.join(close)}? " if close else ""
    raise KeyError(f"no callback is named {name!r}. {hint}The catalogue has {', '.join(known)}.")


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: its arguments; those of the process by default.

    Returns:
        0, or 1 for a name that does not exist or a file that is in the way.
    """
    parser = argparse.ArgumentParser(prog="lightning-cl callbacks", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("list", help="all callbacks, one a line")
    show = actions.add_parser("show", help="a callback's card and its YAML")
    show.add_argument("name")
    copy = actions.add_parser("copy", help="copy a callback's YAML and card into a folder")
    copy.add_argument("name")
    copy.add_argument("folder", type=Path)
    args = parser.parse_args(argv)
    try:
        if args.action == "list":
            width = max(len(name) for name in entries())
            for name, fragment in entries().items():
                print(f"{name:<{width}}  {summary(fragment)}")
            return 0
        fragment = find(args.name)
        card = fragment.with_suffix(".md")
        if args.action == "show":
            if card.is_file():
                print(card.read_text(encoding="utf-8").rstrip(), end="\n\n")
            print(f"# {fragment.name}\n{fragment.read_text(encoding='utf-8').rstrip()}")
            return 0
        return _copy([path for path in (fragment, card) if path.is_file()], args.folder)
    except (KeyError, OSError) as error:
        print(f"lightning-cl callbacks: {error.args[0] if isinstance(error, KeyError) else error}", file=sys.stderr)
        return 1


def _copy(files: list[Path], folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    taken = [folder / path.name for path in files if (folder / path.name).exists()]
    if taken:
        raise FileExistsError(
            f"{taken[0]} exists already and may hold your changes. Remove it, or copy into another folder."
        )
    for path in files:
        shutil.copy(path, folder / path.name)
        print(folder / path.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
