# SPDX-License-Identifier: Apache-2.0
"""The store: what goes in comes out, in memory and from a file, and nothing damaged or foreign is served."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_cl.functional.fingerprint import tensor_fingerprint
from lightning_cl.replay.state_store import LayerShape, LayerStates, StateStore, StoreError

MANIFEST = {"weights": "abc", "layers": ["norm"], "num_std": 1.0, "shape": [1, 2]}


def make(seed: int = 0, lengths: tuple[int, ...] = (3, 1, 5), dims: tuple[int, ...] = (6, 7), values: bool = False):
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    layers = {}
    for i, dim in enumerate(dims):
        if values:
            rows = torch.randn(total, dim, generator=generator).bfloat16()
        else:
            rows = torch.randint(0, 256, (total, -(-dim // 4)), generator=generator).to(torch.uint8)
        layers[f"layer.{i}"] = LayerStates(rows, torch.randn(2, dim, generator=generator))
    return StateStore.build(MANIFEST, {f"G:{i}": n for i, n in enumerate(lengths)}, layers), layers


def same(a: StateStore, b: StateStore) -> bool:
    return (
        a.digest == b.digest
        and a.manifest == b.manifest
        and a.rows == b.rows
        and all(
            torch.equal(a.layers[k].rows, b.layers[k].rows)
            and torch.equal(a.layers[k].thresholds, b.layers[k].thresholds)
            for k in a.layers
        )
    )


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    dims=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    values=st.booleans(),
)
def test_rows_come_out_as_they_went_in(tmp_path_factory, seed, lengths, dims, values) -> None:
    store, layers = make(seed, tuple(lengths), tuple(dims), values)
    path = tmp_path_factory.mktemp("store") / "states.clstates"
    store.write(path)
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    for found in (store, StateStore.open(path), StateStore.from_state_dict(store.state_dict())):
        assert same(found, store)
        order = list(reversed(range(len(lengths))))
        for name, states in layers.items():
            width = max(lengths) + 2
            batch = found.batch(name, [f"G:{i}" for i in order], width)
            assert batch.shape[:2] == (len(order), width)
            for row, i in zip(batch, order, strict=True):
                assert torch.equal(row[: lengths[i]], states.rows[starts[i] : starts[i] + lengths[i]])
                assert not row[lengths[i] :].any()
            assert torch.equal(found.layers[name].thresholds, states.thresholds)
        assert [found.tokens(row) for row in found.rows] == lengths
    assert "G:0" in store
    assert "G:99" not in store


def test_a_store_filled_row_by_row_is_the_store_of_the_whole() -> None:
    store, layers = make(values=True)
    tokens = {row: store.tokens(row) for row in store.rows}
    shapes = {n: LayerShape(s.rows.dtype, s.rows.shape[1], s.thresholds.shape[1]) for n, s in layers.items()}
    filled = StateStore.empty(MANIFEST, tokens, shapes)
    for name, states in layers.items():
        filled.layers[name].thresholds.copy_(states.thresholds)
        for row, piece in reversed(list(zip(tokens, states.rows.split(list(tokens.values())), strict=True))):
            filled.put(name, row, piece)
    assert same(filled.seal(), store)
    with pytest.raises(
        ValueError, match=r"Layer 'l' has states float32, and a store holds one of \['uint8', 'bfloat16'\]"
    ):
        StateStore.empty({}, {"a": 1}, {"l": LayerShape(torch.float32, 4, 4)})


def test_two_bits_an_entry() -> None:
    store, _ = make(lengths=(100,), dims=(64,))
    assert store.nbytes() == 100 * 64 // 4 + 2 * 64 * 4
    assert 100 * 64 * 4 == 16 * 100 * 64 // 4


def test_every_altered_byte_is_found(tmp_path: Path) -> None:
    path = tmp_path / "s"
    store, _ = make()
    store.write(path)
    good = path.read_bytes()
    pad = len(good) - store.nbytes()
    header_end = good.index(b"}", good.index(b'"sha256"')) + 1
    for place in [*range(0, header_end, 7), *range(pad, len(good), 13), len(good) - 1]:
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with pytest.raises(StoreError, match=r"is no intact store of activation states: .*Delete it"):
            StateStore.open(path)


@pytest.mark.parametrize("keep", [0, 5, 40, 200, -1])
def test_a_truncated_file_is_found(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "s"
    make()[0].write(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(StoreError, match="is no intact store"):
        StateStore.open(path)


def test_a_longer_file_and_no_file(tmp_path: Path) -> None:
    path = tmp_path / "s"
    make()[0].write(path)
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(StoreError, match=r"it has \d+ bytes instead of"):
        StateStore.open(path)
    with pytest.raises(FileNotFoundError):
        StateStore.open(tmp_path / "none")


def test_a_foreign_manifest_is_refused_with_every_difference() -> None:
    store, _ = make()
    store.require({"weights": "abc", "shape": (1, 2)}, "")
    with pytest.raises(
        StoreError, match=r"weights: stored 'abc', this run 'xyz'; num_std: stored 1.0, this run 2.0.*Do X"
    ):
        store.require({"weights": "xyz", "num_std": 2.0, "layers": ["norm"]}, "Do X.")


def test_an_open_store_outlives_its_replacement(tmp_path: Path) -> None:
    path = tmp_path / "s"
    first, second = make(0)[0], make(1)[0]
    first.write(path)
    opened = StateStore.open(path)
    second.write(path)
    assert same(opened, first)
    assert same(StateStore.open(path), second)
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


KILLED = """
import os, sys, torch
from lightning_cl.replay.state_store import LayerStates, StateStore
rows = torch.full((1 << 22, 1), int(sys.argv[2]), dtype=torch.uint8)
store = StateStore.build({"n": sys.argv[2]}, {"r": len(rows)}, {"l": LayerStates(rows, torch.zeros(2, 4))})
print("ready", flush=True)
while True:
    store.write(sys.argv[1])
"""


def test_a_kill_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    path = tmp_path / "s"
    rows = torch.zeros(8, 1, dtype=torch.uint8)
    StateStore.build({"n": "0"}, {"r": 8}, {"l": LayerStates(rows, torch.zeros(2, 4))}).write(path)
    seen = set()
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path), "7"], stdout=subprocess.PIPE, env=env, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        for _ in range(20):  # while it is being rewritten all the time, the file is always whole
            seen.add(StateStore.open(path).manifest["n"])
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    store = StateStore.open(path)
    seen.add(store.manifest["n"])
    assert seen <= {"0", "7"}
    assert (store.layers["l"].rows == int(store.manifest["n"])).all()


def test_a_disk_that_cannot_be_written_keeps_the_old(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "s"
    first, second = make(0)[0], make(1)[0]
    first.write(path)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        second.write(path)
    monkeypatch.undo()
    assert same(StateStore.open(path), first)
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_a_layer_that_does_not_fit_its_rows() -> None:
    states = LayerStates(torch.zeros(3, 2, dtype=torch.uint8), torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"Layer 'l' has states of 3 tokens, the rows have 4"):
        StateStore.build({}, {"a": 4}, {"l": states})


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000), n=st.integers(1, 40), dtype=st.sampled_from(["float32", "bfloat16", "uint8", "int64"])
)
def test_fingerprint_sees_every_bit_and_place(seed, n, dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randint(0, 100, (n,), generator=generator).to(getattr(torch, dtype))
    whole = int(tensor_fingerprint(tensor))
    assert whole == int(tensor_fingerprint(tensor.clone()))
    octets = tensor.clone().view(torch.uint8)
    place = int(torch.randint(0, len(octets), (1,), generator=generator))
    octets[place] ^= 1 << int(torch.randint(0, 8, (1,), generator=generator))
    assert int(tensor_fingerprint(octets)) != whole
    assert int(tensor_fingerprint(torch.cat([tensor, torch.zeros(1, dtype=tensor.dtype)]))) != whole
    if len(set(tensor.tolist())) > 1 and not torch.equal(tensor.flip(0), tensor):
        assert int(tensor_fingerprint(tensor.flip(0))) != whole


def test_fingerprint_against_python_integers() -> None:
    tensor = torch.arange(3, dtype=torch.int64) * 1234567891011

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
        return x ^ (x >> 31)

    words = tensor.tolist()
    want = 24 + sum(mix(((i + 1) * 0x9E3779B97F4A7C15 + w) % 2**64) for i, w in enumerate(words))
    assert int(tensor_fingerprint(tensor)) % 2**64 == want % 2**64


def test_fingerprint_of_a_view_and_across_blocks(monkeypatch) -> None:
    tensor = torch.randn(64, dtype=torch.bfloat16)
    assert int(tensor_fingerprint(tensor[1:9])) == int(tensor_fingerprint(tensor[1:9].clone()))
    assert int(tensor_fingerprint(tensor.view(8, 8).T)) == int(tensor_fingerprint(tensor.view(8, 8).T.contiguous()))
    before = int(tensor_fingerprint(tensor))
    monkeypatch.setattr("lightning_cl.functional.fingerprint._WORDS_AT_ONCE", 3)
    assert int(tensor_fingerprint(tensor)) == before
