# SPDX-License-Identifier: Apache-2.0
"""CausalLMModule in a stock LightningCLI."""

from __future__ import annotations

import contextlib
import copy
import io

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningCLI

from tests.helpers.models import loader, tiny_llama, tiny_tokenizer

CONFIG = {
    "model": {
        "class_path": "lightning_cl.CausalLMModule",
        "init_args": {
            "lora": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]},
            "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
            "lr_scheduler": {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 1}},
        },
    },
    "data": {"class_path": f"{__name__}.Rows"},
    "trainer": {
        "max_steps": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    },
}


class Rows(LightningDataModule):
    def train_dataloader(self):
        return loader(8, 4)


@pytest.fixture
def config(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    config = copy.deepcopy(CONFIG)
    config["model"]["init_args"]["model"] = str(tmp_path / "m")
    return config


def write(folder, config, name="config.yaml"):
    path = folder / name
    path.write_text(yaml.safe_dump(config))
    return str(path)


def run(*arguments):
    return LightningCLI(save_config_callback=None, args=list(arguments), seed_everything_default=0)


def test_fit(tmp_path, config):
    cli = run("fit", "--config", write(tmp_path, config))
    assert isinstance(cli.trainer.optimizers[0], torch.optim.SGD)
    assert cli.trainer.global_step == 2
    assert all("lora_" in name for name, parameter in cli.model.named_parameters() if parameter.requires_grad)
    assert cli.model.model.peft_config["default"].r == 2


def test_lora_by_class_path_and_from_the_command_line(tmp_path, config):
    config["model"]["init_args"]["lora"] = {"class_path": "peft.LoraConfig", "init_args": {"r": 3}}
    cli = run("fit", "--config", write(tmp_path, config))
    assert cli.model.model.peft_config["default"].r == 3
    config["model"]["init_args"]["lora"] = {"r": 3}
    cli = run("fit", "--config", write(tmp_path, config), "--model.init_args.lora.r=5")
    assert cli.model.model.peft_config["default"].r == 5


def printed(*arguments):
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit):
        run("fit", *arguments, "--print_config")
    return yaml.safe_load(out.getvalue())


def test_print_config_round_trips(tmp_path, config):
    first = printed("--config", write(tmp_path, config))
    assert first["model"]["init_args"]["lora"] == config["model"]["init_args"]["lora"]
    assert printed("--config", write(tmp_path, first, "again.yaml")) == first
