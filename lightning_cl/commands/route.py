# SPDX-License-Identifier: Apache-2.0
"""``lightning-cl route``: which task's adapter each prompt goes to, how clearly, and what it answers."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException

_KEY = "RLSRouterFitter"


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments; None takes the command line's.

    Returns:
        0, or 1 after printing what is wrong.
    """
    arguments = _parser().parse_args(argv)
    try:
        for line in _route(arguments):
            print(json.dumps(line, ensure_ascii=False), flush=True)
    except (MisconfigurationException, OSError, RuntimeError, TypeError, ValueError) as error:
        print(f"lightning-cl route: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-cl route",
        description="Print, for each prompt, the task it is routed to, the adapter, the margin and the answer, as one line"
        " of JSON.",
    )
    parser.add_argument(
        "--ckpt", type=Path, required=True, help="a checkpoint of a run with RLSRouterFitter, or a folder it exported"
    )
    parser.add_argument(
        "--input", required=True, help='a .jsonl file of {"prompt"} or {"messages"} rows; "-" reads the standard input'
    )
    parser.add_argument("--model", default=None, help="folder or name of the base model (default: the run's)")
    parser.add_argument("--tokenizer", default=None, help="folder or name of the tokenizer (default: the model's)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="0: no answers (default: %(default)s)")
    parser.add_argument(
        "--max-length", type=int, default=None, help="longest prompt in tokens (default: the tokenizer's)"
    )
    parser.add_argument("--min-margin", type=float, default=None, help="below it the base model answers")
    parser.add_argument("--batch-size", type=int, default=8, help="prompts at once (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="such as cpu or cuda:0 (default: a GPU if there is one)")
    return parser


def _route(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    if arguments.batch_size < 1:
        raise MisconfigurationException(f"`--batch-size {arguments.batch_size}` gives no batch. Use at least 1.")
    rows = _rows(arguments.input)
    with tempfile.TemporaryDirectory() as scratch:
        folder, name = _served_folder(arguments.ckpt, Path(scratch))
        name = arguments.model or name
        if name is None:
            raise MisconfigurationException(
                f"{str(arguments.ckpt)!r} does not say which base model it belongs to. Pass `--model FOLDER`."
            )
        yield from _answers(arguments, rows, folder, name)


def _answers(arguments: argparse.Namespace, rows: list[Any], folder: Path, name: str) -> Iterator[dict[str, Any]]:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    from lightning_cl.data import Collator, Encoder, load_tokenizer
    from lightning_cl.routing import load_routed

    tokenizer = load_tokenizer(arguments.tokenizer or name)
    encoder = Encoder(tokenizer, max_length=arguments.max_length)
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_routed(AutoModelForCausalLM.from_pretrained(name, dtype="auto").to(device), folder)
    if arguments.min_margin is not None:
        model.routed.router.min_margin = arguments.min_margin
    collate = Collator(encoder.pad_token_id)
    for start in range(0, len(rows), arguments.batch_size):
        part = rows[start : start + arguments.batch_size]
        batch = collate([encoder.encode_eval(_with_answer(row), "exact_match") for row in part])
        inputs = {k: batch[k].to(device) for k in ("input_ids", "attention_mask")}
        texts: list[str | None] = [None] * len(part)
        if arguments.max_new_tokens > 0:
            config = GenerationConfig(
                max_new_tokens=arguments.max_new_tokens,
                do_sample=False,
                pad_token_id=encoder.pad_token_id,
                eos_token_id=encoder.stop_token_ids or None,
            )
            output = model.generate(**inputs, generation_config=config)[:, inputs["input_ids"].shape[1] :]
            texts = [text.strip() for text in tokenizer.batch_decode(output, skip_special_tokens=True)]
            routes = model.routed.last
        else:
            pooled = model.routed.features(inputs["attention_mask"].bool(), **inputs)
            routes = model.routed.router.route(pooled)
        for row, text, route, adapter, margin in zip(
            part, texts, routes.names, routes.adapters, routes.margin.tolist(), strict=True
        ):
            line = {"prompt": row.get("prompt", row.get("messages")), "route": route, "adapter": adapter}
            line["margin"] = round(margin, 4)
            yield line if text is None else {**line, "answer": text}


def _with_answer(row: dict[str, Any]) -> dict[str, Any]:
    """The row with an answer in the place where one is expected, of which only the prompt is used."""
    if "messages" in row:
        messages = list(row["messages"])
        if messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": "."})
        return {"messages": messages}
    return {"prompt": row["prompt"], "answer": row.get("answer") or "."}


def _rows(source: str) -> list[dict[str, Any]]:
    lines = sys.stdin.read().splitlines() if source == "-" else Path(source).read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not (isinstance(row.get("prompt"), str) or row.get("messages")):
            raise MisconfigurationException(
                f"Line {number} of {source!r} is {line[:60]!r}, and not a row with a prompt. Give one JSON object a line,"
                ' with "prompt" (a string) or "messages".'
            )
        rows.append(row)
    if not rows:
        raise MisconfigurationException(f"{source!r} holds no rows. Give one JSON object with a prompt a line.")
    return rows


def _served_folder(path: Path, scratch: Path) -> tuple[Path, str | None]:
    """The folder to serve from, and the base model that the run names."""
    if (path / "router.safetensors").is_file():
        configs = sorted(path.glob("*/adapter_config.json"))
        base = json.loads(configs[0].read_text()).get("base_model_name_or_path") if configs else None
        return path, base
    if not path.exists():
        raise FileNotFoundError(
            f"There is no checkpoint at {str(path)!r}. Pass a checkpoint, or a folder exported by it."
        )
    from lightning_cl.routing import save_routed_state

    checkpoint = _load(path)
    state = checkpoint.get("callbacks", {}).get(_KEY)
    if state is None:
        raise MisconfigurationException(
            f"The checkpoint {str(path)!r} holds no state of `RLSRouterFitter` (callbacks:"
            f" {', '.join(checkpoint.get('callbacks', {})) or 'none'}), so it has no router. Pass a checkpoint of a run with"
            " that callback."
        )
    save_routed_state(scratch, state["router"])
    base = checkpoint.get("hyper_parameters", {}).get("model")
    return scratch, base if isinstance(base, str) else None


def _load(path: Path) -> dict[str, Any]:
    import torch

    from lightning_cl.strategies.checkpoint import load_checkpoint

    if path.is_dir() and (path / "meta.pt").is_file():  # stock Lightning's sharded form
        return torch.load(path / "meta.pt", map_location="cpu", weights_only=True)
    return load_checkpoint(path)


if __name__ == "__main__":
    raise SystemExit(main())
