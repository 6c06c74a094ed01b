# SPDX-License-Identifier: Apache-2.0
"""``lightning-cl generate-replay``: a model's own samples as a file that ``GeneralSamples`` reads."""

from __future__ import annotations

import argparse
import gzip
import json
import os
import sys
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments; None takes the command line's.

    Returns:
        0, or 1 after printing what is wrong.
    """
    arguments = _parser().parse_args(argv)
    try:
        report = generate(arguments)
    except (MisconfigurationException, OSError, RuntimeError, ValueError) as error:
        print(f"lightning-cl generate-replay: {error}", file=sys.stderr)
        return 1
    print(report)
    return 0


def generate(arguments: argparse.Namespace) -> str:
    """Make the samples, write them, and say how fast that was.

    Raises:
        ValueError: for a number out of range, or an output file that exists already.
        MisconfigurationException: for a model without a language-model head, a tokenizer without a BOS token, or a
            length beyond the context.
        RuntimeError: for logits that are not finite.
    """
    out: Path = arguments.out
    if arguments.num_samples < 1:
        raise ValueError(f"`--num-samples {arguments.num_samples}`: must be at least 1.")
    if not out.name.endswith((".jsonl", ".jsonl.gz")):
        raise ValueError(f"`--out {out}`: the file is JSON lines, so its name ends in .jsonl or .jsonl.gz.")
    if out.exists() and not arguments.force:
        raise ValueError(f"`--out {out}` exists already. Name another file, or pass `--force` to replace it.")

    from lightning_cl.replay.generation import DecodeEngine
    from lightning_cl.replay.prompting import encode_prompt, find_bos, find_eos

    model, tokenizer = _load(arguments)
    if arguments.prompt:
        prompts = [encode_prompt(prompt, tokenizer) for prompt in arguments.prompt]
    else:
        bos = find_bos(model, tokenizer, required=True)
        assert bos is not None
        prompts = [[bos]]
    engine = DecodeEngine(
        model,
        length=arguments.length,
        temperature=arguments.temperature,
        on_eos=arguments.on_eos,
        eos_token_ids=find_eos(model, tokenizer) if arguments.on_eos == "stop" else (),
        batch_size=arguments.batch_size,
        mode=arguments.mode,
        seed=arguments.seed,
    )
    numbers = range(arguments.first_row, arguments.first_row + arguments.num_samples)
    made = engine.generate([prompts[n % len(prompts)] for n in numbers], numbers.start, progress=sys.stderr.isatty())
    _write(out, [_line(row.tolist(), tokenizer) for row in made.rows])
    return (
        f"Wrote {len(made.rows)} samples ({made.tokens} tokens) to {out} in {made.seconds:.1f} s:"
        f" {made.tokens / made.seconds:,.0f} tokens/s, {made.batch_size} rows at a time, {made.mode} decoding.\n"
        f'Replay them with GeneralSamples("{out}", num_samples={len(made.rows)}, max_tokens={arguments.length}).'
    )


def _load(arguments: argparse.Namespace) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer or arguments.model)
    model: Any = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=arguments.dtype)
    if arguments.adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, arguments.adapter)
    return model.to(device), tokenizer


def _line(tokens: list[int], tokenizer: Any) -> str:
    # With special tokens in the text, encoding it gives the sampled row back, its BOS included.
    text = tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return json.dumps({"text": text, "input_ids": tokens}, ensure_ascii=False)


def _write(path: Path, lines: list[str]) -> None:
    """All lines or none: a file that was cut short would look like a smaller set."""
    data = "".join(line + "\n" for line in lines).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-cl generate-replay",
        description="Sample texts from a model and write them as JSON lines ({'text', 'input_ids'}), replay data for"
        " GeneralSamples. Row i depends on --seed and its number alone, not on batch size or device count.",
    )
    parser.add_argument("--model", required=True, help="folder or name of a Hugging Face causal language model")
    parser.add_argument("--num-samples", type=int, required=True, help="rows to make")
    parser.add_argument("--out", type=Path, required=True, help="the file to write, .jsonl or .jsonl.gz")
    parser.add_argument("--adapter", default=None, help="PEFT adapter folder to put on the model")
    parser.add_argument("--tokenizer", default=None, help="folder or name of the tokenizer (default: the model's)")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row, prompt included (default: 256)")
    parser.add_argument(
        "--prompt", action="append", default=None, help="text that rows begin with, in turn if repeated (default: BOS)"
    )
    parser.add_argument(
        "--on-eos", choices=("continue", "stop"), default="continue", help="at the end token (default: %(default)s)"
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="of the sampling (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all rows (default: %(default)s)")
    parser.add_argument(
        "--first-row", type=int, default=0, help="number of the first row: several processes can make parts of one set"
    )
    parser.add_argument(
        "--batch-size", type=int, default=None, help="rows decoded together (default: what memory allows)"
    )
    parser.add_argument("--device", default="auto", help="cuda, cuda:1, cpu, ... (default: a GPU if there is one)")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, ... (default: the file's)")
    parser.add_argument(
        "--mode",
        choices=("auto", "graph", "compile", "eager"),
        default="auto",
        help="how to decode; compile takes a minute to start: for very many rows (default: %(default)s)",
    )
    parser.add_argument("--force", action="store_true", help="replace the output file")
    return parser
