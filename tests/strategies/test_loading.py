# SPDX-License-Identifier: Apache-2.0
"""Models that stay in their file: equal to `from_pretrained`, shared by the processes of a node."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_cl.strategies.loading import load_mapped
from tests.helpers import models, spawn
from tests.strategies import workers

IDS = torch.arange(4, 20)[None]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mapped_model_equals_the_loaded_one(tmp_path: Path, tied: bool, dtype: torch.dtype) -> None:
    from transformers import AutoModelForCausalLM

    models.tiny_llama(tie_word_embeddings=tied).to(dtype).save_pretrained(tmp_path, max_shard_size="20KB")
    mapped = load_mapped(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert mapped.dtype == loaded.dtype == dtype
    assert [n for n, _ in mapped.named_parameters()] == [n for n, _ in loaded.named_parameters()]
    assert (mapped.lm_head.weight is mapped.model.embed_tokens.weight) == tied
    with torch.no_grad():
        assert torch.equal(mapped.eval()(IDS).logits, loaded.eval()(IDS).logits)


def test_another_dtype_and_training_leave_the_file_alone(tmp_path: Path) -> None:
    models.tiny_llama().save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    assert load_mapped(tmp_path, dtype="bfloat16").dtype == torch.bfloat16
    module = models.PlainLM(load_mapped(tmp_path))
    workers.trainer(tmp_path, devices=1).fit(module, models.loader())
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds neither model.safetensors nor"):
        load_mapped(tmp_path)
    models.tiny_llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(ValueError, match=r"`dtype='three'` is no dtype of torch"):
        load_mapped(tmp_path, dtype="three")
    for change, message in (
        ({"quantization_config": {}}, r"is quantized already"),
        ({"num_hidden_layers": 3}, r"has no tensor 'model.layers.2"),
        ({"vocab_size": 100}, r"with shape \(128, 32\), where its config.json says \(100, 32\)"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(MisconfigurationException, match=message):
            load_mapped(tmp_path)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mapped files")
def test_the_module_maps_a_folder_and_keeps_its_generation_config(tmp_path: Path) -> None:
    from lightning_cl import CausalLMModule

    model = models.tiny_llama()
    model.generation_config.eos_token_id = [2, 5]
    model.save_pretrained(tmp_path)
    module = CausalLMModule(str(tmp_path), tokenizer=models.tiny_tokenizer())
    assert str(tmp_path / "model.safetensors") in Path("/proc/self/maps").read_text()
    assert module.model.generation_config.eos_token_id == [2, 5]
    other = CausalLMModule(str(tmp_path), tokenizer=models.tiny_tokenizer(), model_kwargs={"use_safetensors": True})
    with torch.no_grad():
        assert torch.equal(module.model.eval()(IDS).logits, other.model.eval()(IDS).logits)


def _own_memory(rank: int, folder: Path) -> None:
    from lightning_cl import CausalLMModule

    def anonymous() -> int:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous"))

    # What the libraries take the first time is not the model's.
    workers.trainer(folder, strategy="cl_fsdp_4bit", precision="bf16-true").fit(workers.plain(), models.loader(8, 4))
    ctypes.CDLL(None).malloc_trim(0)
    before = anonymous()
    lora = {"r": 4, "target_modules": ["q_proj"]}
    module = CausalLMModule(str(folder / "base"), lora=lora, tokenizer=models.tiny_tokenizer())
    after_loading = anonymous() - before
    trainer = workers.trainer(folder, strategy="cl_fsdp_4bit", precision="bf16-true")
    trainer.validate(module, models.loader(8, 4), verbose=False)
    # What the allocator keeps for later is nobody's.
    ctypes.CDLL(None).malloc_trim(0)
    spawn.save(folder, rank, (after_loading, anonymous() - before))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's account of anonymous memory")
def test_two_ranks_hold_one_copy_of_the_base(tmp_path: Path) -> None:
    model: Any = models.tiny_llama(hidden_size=512, intermediate_size=1536, num_hidden_layers=12)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "base")
    size = sum(f.stat().st_size for f in (tmp_path / "base").glob("*.safetensors"))
    assert size > 60e6
    spawn.run(_own_memory, 2, tmp_path)
    for after_loading, at_end in spawn.load(tmp_path):
        # Pages of their own: the rest is the file itself, which is in memory once.
        assert after_loading < 0.1 * size
        # Here the CPU is the device too, so the packed layers and what FSDP gathers are in it.
        assert at_end < 0.8 * size
