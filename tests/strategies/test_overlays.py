# SPDX-License-Identifier: Apache-2.0
"""Every overlay of `examples/strategies` and `examples/multinode` parses, builds its strategy, and names what exists."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.cli import LightningCLI

from lightning_cl.strategies import CLFSDPStrategy, CLSingleDeviceStrategy

EXAMPLES = Path(__file__).parents[2] / "examples"
OVERLAYS = sorted([*(EXAMPLES / "strategies").glob("*.yaml"), *(EXAMPLES / "multinode").glob("*.yaml")])


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.stem)
def test_overlay_builds_its_strategy(overlay: Path, tmp_path: Path) -> None:
    cli = LightningCLI(
        args=[
            "--model=lightning.pytorch.demos.boring_classes.BoringModel",
            f"--config={overlay}",
            "--trainer.accelerator=cpu",
            "--trainer.devices=1",
            "--trainer.num_nodes=1",
            "--trainer.logger=false",
            f"--trainer.default_root_dir={tmp_path}",
        ],
        run=False,
        subclass_mode_model=True,
        save_config_callback=None,
    )
    strategy = cli.trainer.strategy
    assert type(strategy) is (CLFSDPStrategy if "fsdp" in overlay.stem else CLSingleDeviceStrategy)
    assert (strategy.quantization is not None) == ("4bit" in overlay.stem or "hybrid" in overlay.stem)
    header = overlay.read_text()
    # A name such as `cl_fsdp` is known only to a program that has imported lightning_cl already.
    assert yaml.safe_load(header)["trainer"]["strategy"]["class_path"].startswith("lightning_cl.strategies.")
    assert header.startswith("# ")
    assert header.count("\n#") >= 3, "say what it needs, how to launch it and what it is not for"


def test_a_program_that_knows_nothing_of_us_can_use_one() -> None:
    code = (
        "import sys; from lightning.pytorch.cli import LightningCLI;"
        "from lightning.pytorch.demos.boring_classes import BoringModel;"
        "assert 'lightning_cl' not in sys.modules;"
        "cli = LightningCLI(BoringModel, run=False, save_config_callback=None, args=["
        f"'--config={EXAMPLES / 'strategies' / 'cl_single_device.yaml'}', '--trainer.accelerator=cpu']);"
        "print(type(cli.trainer.strategy).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split()[-1:] == ["CLSingleDeviceStrategy"], done.stderr


def test_there_is_an_overlay_for_each_name() -> None:
    names = {path.stem for path in OVERLAYS}
    assert {"cl_single_device", "cl_single_device_4bit", "cl_fsdp", "cl_fsdp_4bit"} <= names


@pytest.mark.parametrize("script", sorted((EXAMPLES / "multinode").glob("*.sh")), ids=lambda path: path.name)
def test_launch_scripts_are_valid_bash(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
