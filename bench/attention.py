"""What reading and changing attention costs at any length, against the raw forward pass and eager `output_attentions`.

A random LLaVA, 512 wide, of about 60 million parameters with 12 layers, under SDPA in float32, with 1, 4 and 16 images:
600, 2,400 and 9,600 positions. Calls are run in pairs with the raw forward pass, in turn; a ratio is the median of the
pairs. Peak memory is how far a call raises the process's resident memory above what the raw forward does. Equality with
eager attention is asserted, absolutely, to 1e-6 (entropies to 1e-5 nats, gradients to 1e-5 of the largest); queries and
keys are scaled so that scores have a spread of about one.

    python bench/attention.py [--lengths 600 2400 9600] [--layers 12] [--pairs 7] [--threads 2] [--device cuda]
        [--parts readings gradients edits]
"""

import argparse
import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from overhead import HEADS, IMAGE, model, peak, timed

import mechvlm as mv

TOLERANCE = 1e-6


def sharp_model(device: str, layers: int) -> Any:
    """The model of bench/overhead.py with wider scores, and room for more positions."""
    hf = model(2**15, layers)
    for layer in hf.model.language_model.layers:
        layer.self_attn.q_proj.weight.data *= 2
        layer.self_attn.k_proj.weight.data *= 2
    return hf.to(device)


def encoding(length: int, device: str) -> dict[str, torch.Tensor]:
    """A prompt of so many positions: 576 of each image, the rest words before, between and behind."""
    images = max(1, length // 600)
    draw = torch.Generator().manual_seed(length)
    words = torch.randint(40, 8000, (1, length - 576 * images), generator=draw)
    gap = words.shape[1] // (images + 1)
    parts = []
    for image in range(images):
        parts += [words[:, image * gap : (image + 1) * gap], torch.full((1, 576), IMAGE)]
    ids = torch.cat([*parts, words[:, images * gap :]], 1)
    pixels = torch.randn(images, 3, 336, 336, generator=draw)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    return {name: x.to(device) for name, x in given.items()}


def patterns(at: "Setting", reading: Any) -> dict[mv.Site, Any]:
    """One reading of every layer's pattern."""
    return {mv.Site("pattern", layer): reading for layer in range(at.layers)}


def readings(prompt: mv.Prompt) -> dict[str, Any]:
    """What is read of all layers and heads."""
    image = prompt.image
    return {
        "last row": mv.rows([-1]),
        "map over the image, last row": mv.rows([-1], keys=image),
        "mass by span, all queries": mv.mass(prompt.spans),
        "mass by span, last row": mv.mass(prompt.spans, [-1]),
        "entropy, all queries": mv.entropy(),
        "10 largest weights, last row": mv.top_keys(10, [-1]),
        "10 largest weights, all queries": mv.top_keys(10),
    }


def paired(raw: Callable, call: Callable, pairs: int, cuda: bool, warm: bool = True) -> float:
    """The median ratio of a call's time to the raw forward's; the first pair warms up, and does not count."""
    found = []
    for pair in range(pairs + warm):
        first, second = (raw, call) if pair % 2 else (call, raw)
        times = {first: timed(first, cuda), second: timed(second, cuda)}
        found.append(times[call] / times[raw])
    kept = sorted(found[1:] if warm else found)
    return kept[len(kept) // 2]


def most(call: Callable, cuda: bool) -> float:
    """MiB by which a call raises the memory in use at most."""
    if not cuda:
        return peak(call)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = call()
    risen = (torch.cuda.max_memory_allocated() - before) / 2**20
    del kept
    return risen


class Setting:
    """A model, a prompt of one length, and its raw and eager forward passes."""

    def __init__(self, hf: Any, length: int, device: str) -> None:
        self.vlm, self.length, self.cuda = mv.VLM(hf), length, device == "cuda"
        self.layers = self.vlm.shape.layers["text"]
        self.given = encoding(length, device)
        self.prompt = self.vlm.prompt(encoding=self.given)

    def raw(self) -> torch.Tensor:
        """The model's own forward pass."""
        with torch.no_grad():
            return self.vlm.hf(**self.given, use_cache=False, logits_to_keep=1).logits[:, -1]

    def eager(self) -> Any:
        """The same with eager attention, all patterns kept."""
        self.vlm.attention = "eager"
        try:
            with torch.no_grad():
                return self.vlm.hf(**self.given, use_cache=False, logits_to_keep=1, output_attentions=True).attentions
        finally:
            self.vlm.attention = "sdpa"

    @property
    def fits(self) -> bool:
        """Whether eager patterns of all layers fit a small machine."""
        return self.layers * HEADS * self.length**2 * 4 < 6 * 2**30


def first(value: Any) -> torch.Tensor:
    """The tensor of a reading, or the first of two."""
    return value[0] if isinstance(value, tuple) else value


def part_readings(at: Setting, pairs: int) -> None:
    """Time, memory and exactness of every reading. Where a pass takes minutes there are two pairs, or one."""
    plain, long = most(at.raw, at.cuda), at.length > 5000 and not at.cuda
    size, own = at.layers * HEADS * at.length**2 * 4 / 2**20, None
    if at.fits:
        risen, ratio = most(at.eager, at.cuda) - plain, paired(at.raw, at.eager, 2, at.cuda)
        print(f"| {at.length} | eager output_attentions | {ratio:.2f} | {risen:+.0f} | |", flush=True)
        own, logits = at.eager(), at.raw()
    else:
        print(f"| {at.length} | eager output_attentions | | does not fit: {size:.0f} MiB of maps | |", flush=True)
    for name, reading in readings(at.prompt).items():
        gap = "" if own is None else f"{reading_gap(at, name, reading, own, logits):.1e}"
        call = partial(at.vlm.run, at.prompt, read=patterns(at, reading))
        often = 2 if name in ("last row", "mass by span, all queries") else 1
        ratio = paired(at.raw, call, often, at.cuda, False) if long else paired(at.raw, call, pairs, at.cuda)
        risen = most(call, at.cuda) - plain
        print(f"| {at.length} | {name} | {ratio:.2f} | {risen:+.0f} | {gap} |", flush=True)


def reading_gap(at: Setting, name: str, reading: Any, own: Any, logits: torch.Tensor) -> float:
    """How far a reading is from that of the eager maps, summed exactly; refused above the tolerance."""
    run = at.vlm.run(at.prompt, read=patterns(at, reading))
    assert torch.equal(run.logits, logits), "reading changed the logits"
    worst = 0.0
    for layer in range(at.layers):
        want = torch.cat([first(reading(head.double())) for head in own[layer].split(1, 1)], 1)
        worst = max(worst, float((first(run[mv.Site("pattern", layer)]) - want).abs().max()))
    scale = 10.0 if "entropy" in name else 1.0  # nats, up to about eight
    assert worst <= TOLERANCE * scale, f"{name} differs from eager attention by {worst:.1e}"
    return worst


def part_gradients(at: Setting, pairs: int) -> None:
    """The gradient of the last row of all patterns, against a plain forward and backward pass of the model."""
    metric = mv.logit_difference(7, 9)
    read = patterns(at, mv.rows([-1]))

    def raw() -> torch.Tensor:
        words = at.vlm.hf.get_input_embeddings()(at.given["input_ids"]).requires_grad_(True)
        inputs = {**at.given, "inputs_embeds": words}
        del inputs["input_ids"], inputs["pixel_values"]
        with torch.enable_grad():
            logits = at.vlm.hf(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1]
            return torch.autograd.grad(logits[0, 7] - logits[0, 9], words)[0]

    def ours() -> mv.Run:
        return at.vlm.run(at.prompt, read=read, grad_of=metric)

    def relevance() -> Any:
        return mv.relevancy(at.vlm, at.prompt, metric)

    plain, gap = most(raw, at.cuda), ""
    if at.length <= 600:
        gap = f"{gradient_gap(at, metric):.1e}"
    for name, call in (("gradient of the last row", ours), ("relevancy of the last position", relevance)):
        ratio = paired(raw, call, max(2, pairs // 2), at.cuda)
        print(f"| {at.length} | {name} | {ratio:.2f} | {most(call, at.cuda) - plain:+.0f} | {gap} |", flush=True)
        gap = ""


def gradient_gap(at: Setting, metric: mv.metrics.WordMetric) -> float:
    """How far gradients of rows are from autograd's on the eager model, relative to the largest."""
    run = at.vlm.run(at.prompt, read=patterns(at, mv.rows([-1])), grad_of=metric)
    at.vlm.attention = "eager"
    at.vlm.hf.requires_grad_(True)
    shown = at.vlm.hf(**at.given, use_cache=False, output_attentions=True)
    own = torch.autograd.grad(shown.logits[0, -1, 7] - shown.logits[0, -1, 9], shown.attentions)
    at.vlm.hf.requires_grad_(False)
    at.vlm.attention = "sdpa"
    worst = 0.0
    for layer in range(at.layers):
        mine, theirs = run.grad[mv.Site("pattern", layer)][:, :, 0], own[layer][:, :, -1]
        worst = max(worst, float((mine - theirs).abs().max() / theirs.abs().max().clamp(min=1e-3)))
    assert worst <= 1e-5, f"gradients differ from eager autograd by {worst:.1e}"
    return worst


def part_edits(at: Setting, pairs: int) -> None:
    """A bias, a cut and a factor on image keys in all layers, in every way."""
    image, plain = at.prompt.image, most(at.raw, at.cuda)

    def edits(make: Callable, way: str) -> list[mv.Edit]:
        return [make(layer, image, way) for layer in range(at.layers)]

    def bias(layer: int, keys: list[int], way: str) -> mv.Edit:
        return mv.bias_attention(layer, keys, 1.5, way=way)

    def by_head(layer: int, keys: list[int], way: str) -> mv.Edit:
        return mv.bias_attention(layer, keys, 1.5, heads=[0, 3], way=way)

    def factor(layer: int, keys: list[int], way: str) -> mv.Edit:
        return mv.scale_attention(layer, keys, 1.15, way=way)

    kinds: list[tuple[str, Callable, tuple[str, ...]]] = [
        ("bias", bias, ("auto", "mask", "feature", "recompute")),
        ("bias of two heads", by_head, ("mask", "feature")),
        ("factor", factor, ("feature", "recompute")),
    ]
    for what, make, ways in kinds:
        reference = None
        for way in ways:
            asked = edits(make, way)
            logits = at.vlm.run(at.prompt, edits=asked).logits
            reference = logits if reference is None else reference
            gap = float((logits - reference).abs().max() / reference.abs().max())
            assert gap <= 1e-5, f"{what} by {way} differs by {gap:.1e}"
            call = partial(at.vlm.run, at.prompt, edits=asked)
            ratio = paired(at.raw, call, 2 if way == "recompute" else pairs, at.cuda)
            risen = most(call, at.cuda) - plain
            print(f"| {at.length} | {what}, {way} | {ratio:.2f} | {risen:+.0f} | {gap:.1e} |", flush=True)


PARTS = {"readings": part_readings, "gradients": part_gradients, "edits": part_edits}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[600, 2400, 9600])
    parser.add_argument("--parts", nargs="+", choices=sorted(PARTS), default=list(PARTS))
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    hf = sharp_model(options.device, options.layers)
    millions = sum(weight.numel() for weight in hf.parameters()) / 1e6
    print(
        f"{millions:.1f} M parameters, {options.layers} layers x {HEADS} heads, {options.threads} threads, {hf.device}"
    )
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {options.pairs} pairs")
    for name in options.parts:
        print(f"\n{name}\n\n| positions | what | time / raw | MiB above raw | largest difference |")
        print("|--:|---|--:|--:|--:|")
        for length in options.lengths:
            PARTS[name](Setting(hf, length, options.device), options.pairs)


if __name__ == "__main__":
    main()
