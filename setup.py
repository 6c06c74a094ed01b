# SPDX-License-Identifier: Apache-2.0
"""One build step: the callback catalogue of the repository travels in the wheel as ``lightning_cl/_catalogue``."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithCatalogue(build_py):
    """Copies ``callbacks/`` beside the package's modules."""

    def run(self) -> None:
        """Build the modules, then add the fragments and cards."""
        super().run()
        # An editable install runs from the clone, where the folder beside the package serves.
        if self.editable_mode:
            return
        target = Path(self.build_lib) / "lightning_cl" / "_catalogue"
        target.mkdir(parents=True, exist_ok=True)
        for source in sorted(Path("callbacks").iterdir()):
            if source.suffix in (".yaml", ".md"):
                self.copy_file(str(source), str(target / source.name))


setup(cmdclass={"build_py": BuildWithCatalogue})
