"""The identities that every reading and edit rests on, as functions that measure how far a model is from them.

The tests run them over tiny random models; `vlm.check()` and `mechvlm check MODEL` run them on anyone's checkpoint. A
law compares with what does not pass through mechvlm where there is such a thing (`mechvlm.references`, `generate` of
transformers). The numbers are those of docs/architecture.md.

>>> vlm.check()
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from mechvlm.attention import mass, rows
from mechvlm.edits import Edit, ablate_heads, bias_attention, cut_attention, patch, scale_heads, steer
from mechvlm.prompt import Prompt
from mechvlm.references import (
    apart,
    differs,
    eager_rounding,
    null_of,
    own_gradients,
    own_logits,
    own_patterns,
    placed,
    rounding,
)
from mechvlm.sites import LAYER_KINDS, Site


@dataclass(frozen=True)
class Finding:
    """How far a model is from one law: the largest error, and what is allowed (zero: bit for bit)."""

    law: int
    what: str
    error: float
    allowed: float

    @property
    def holds(self) -> bool:
        """Whether the error is within what is allowed."""
        return self.error <= self.allowed


def check(vlm: Any, prompt: Prompt | None = None, show: bool = True) -> Any:
    """Measure every law on a model; a pandas DataFrame with a row a finding.

    Args:
        prompt: by default a question about a picture of coloured squares, where the model has a processor.
        show: also write the table to standard output.
    """
    import pandas  # half a second to import, and only needed here

    prompt = prompt or vlm.prompt(squares(), "Is there a dog in the image?")
    found = [finding for law in LAWS for finding in law(vlm, prompt)]
    table = pandas.DataFrame(
        [(one.law, one.what, one.error, one.allowed, "holds" if one.holds else "BROKEN") for one in found],
        columns=["law", "what", "error", "allowed", "verdict"],
    )
    if show:
        sys.stdout.write(f"{vlm!r}\n{table.to_string(index=False)}\n")
    return table


def squares() -> Any:
    """A picture of coloured squares, different at every place."""
    import numpy as np
    from PIL import Image

    colours = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(colours.repeat(48, 0).repeat(48, 1))


def all_sites(vlm: Any, live: bool = False) -> list[Site]:
    """Every site of a model; with `live`, those from which an edit can reach the answer."""
    layers = vlm.shape.live if live else vlm.shape.layers
    inner = [Site(kind, layer, tower) for tower in layers for layer in range(layers[tower]) for kind in LAYER_KINDS]
    return [Site("embed"), Site("embed", tower="vision"), Site("image_features"), *inner, Site("logits")]


def law_1_reading(vlm: Any, prompt: Prompt) -> Iterator[Finding]:
    """Reading changes nothing; an edit that adds or scales by nothing changes nothing."""
    # Making all positions' logits multiplies other matrices than making one's, so it is compared with the same.
    own, whole = own_logits(vlm, prompt), own_logits(vlm, prompt, keep=0)
    yield Finding(1, "reading every site", differs(vlm.run(prompt, read=all_sites(vlm)).logits, whole), 0.0)
    inner = [site for site in all_sites(vlm) if site.kind != "logits"]
    kept = {site: (rows([-1]) if site.kind in ("scores", "pattern") else None) for site in inner}
    yield Finding(1, "reading rows", differs(vlm.run(prompt, read=kept).logits, own), 0.0)
    nothing = torch.zeros(vlm.shape.d_model["text"])
    for way in ("mask", "feature", "recompute"):
        biases = [bias_attention(layer, prompt.image, 0.0, way=way) for layer in range(vlm.shape.layers["text"])]
        yield Finding(1, f"a bias of 0 by {way}", differs(vlm.run(prompt, edits=biases).logits, own), 0.0)
    null = [scale_heads(0, [0], 1.0), steer("text.0.resid_mid", nothing), scale_heads(0, [0], 1.0, tower="vision")]
    yield Finding(1, "scaling by 1, adding 0", differs(vlm.run(prompt, edits=null).logits, own), 0.0)


def law_2_writing_back(vlm: Any, prompt: Prompt) -> Iterator[Finding]:
    """Writing back what was read changes nothing."""
    edits = [Edit(site, torch.clone) for site in all_sites(vlm, live=True)]
    yield Finding(2, "every site", differs(vlm.run(prompt, edits=edits).logits, own_logits(vlm, prompt, keep=0)), 0.0)


def law_3_residuals(vlm: Any, prompt: Prompt) -> Iterator[Finding]:
    """What attention and MLP add is what the residual stream gains."""
    run = vlm.run(prompt, read=all_sites(vlm))
    for tower, layers in vlm.shape.layers.items():
        steps = [("resid_pre", "attn_out", "resid_mid"), ("resid_mid", "mlp_out", "resid_post")]
        worst = max(
            differs(run[Site(before, layer, tower)] + run[Site(added, layer, tower)], run[Site(after, layer, tower)])
            for layer in range(layers)
            for before, added, after in steps
        )
        yield Finding(3, f"residual sums, {tower}", worst, 0.0)


def law_4_patterns(vlm: Any, prompt: Prompt) -> Iterator[Finding]:
    """Patterns are the model's own eager ones, rows sum to one, masses are sums of weights."""
    for tower, layers in vlm.shape.layers.items():
        sites = [Site("pattern", layer, tower) for layer in range(layers)]
        run = vlm.run(prompt, read=sites)
        own = own_patterns(vlm, prompt, tower)
        worst = max(apart(run[site], weights) for site, weights in zip(sites, own, strict=True))
        yield Finding(4, f"eager attention, {tower}", worst, eager_rounding(vlm))
        one = max(apart(run[site].sum(-1), torch.ones_like(run[site][..., 0])) for site in sites)
        yield Finding(4, f"rows sum to one, {tower}", one, rounding(vlm))
        spans = prompt.spans if tower == "text" else {"some": [1, 2, 3], "all": list(range(run[sites[0]].shape[-1]))}
        for name, reading in (("mass", mass(spans)), ("mass of rows", mass(spans, [-1, 2])), ("rows", rows([-1, 2]))):
            short = vlm.run(prompt, read={site: reading for site in sites})
            worst = max(apart(short[site], reading(run[site])) for site in sites)
            yield Finding(4, f"{name} without the map, {tower}", worst, rounding(vlm))


def law_5_patching(vlm: Any, prompt: Prompt) -> Iterator[Finding]:
    """All of a residual stream from another run is that run; a run patched into itself is itself."""
    null = null_of(prompt, vlm)
    for tower, layers in vlm.shape.live.items():
        sites = [Site("resid_post", layer, tower) for layer in range(layers)]
        real, other = vlm.run(prompt, read=sites), vlm.run(null, read=sites)
        foreign = max(differs(vlm.run(prompt, edits=[patch(site, other[site])]).logits, other.logits) for site in sites)
        itself = max(differs(vlm.run(prompt, edits=[patch(site, real[site])]).logits, real.logits) for site in sites)
        yield Finding(5, f"another run's resid_post, {tower}", foreign, 0.0)
        yield Finding(5, f"its own resid_post, {tower}", itself, 0.0)


def law_6_biases(vlm: Any, prompt: Prompt, amount: float = 1.5) -> Iterator[Finding]:
    """A bias multiplies the odds of a span by e^b; minus infinity leaves exactly zero; all ways agree."""
    same = (eager_rounding if vlm.attention == "eager" else rounding)(vlm)
    for tower in vlm.shape.layers:
        keys = prompt.image if tower == "text" else [1, 2, 3]
        site = Site("pattern", 0, tower)
        before, rest = vlm.run(prompt, read=[site])[site].double(), None
        rest = [key for key in range(before.shape[-1]) if key not in set(keys)]
        sees = (before[..., keys].sum(-1) > 1e-4) & (before[..., rest].sum(-1) > 1e-4)
        odds = before[..., keys].sum(-1) / before[..., rest].sum(-1)
        runs = {
            way: vlm.run(prompt, read=[site], edits=[bias_attention(0, keys, amount, tower=tower, way=way)])
            for way in ("mask", "feature", "recompute")
        }
        for way, run in runs.items():
            after = run[site].double()
            now = after[..., keys].sum(-1) / after[..., rest].sum(-1)
            change = (now / odds)[sees] / torch.tensor(amount, dtype=torch.float64).exp()
            yield Finding(6, f"odds by {way}, {tower}", apart(change, torch.ones_like(change)), rounding(vlm, 256))
            yield Finding(6, f"{way} as recompute, {tower}", apart(run.logits, runs["recompute"].logits), same)
        cut = vlm.run(prompt, read=[site], edits=[cut_attention(0, keys, tower=tower)])
        yield Finding(6, f"a cut leaves zero, {tower}", cut[site][..., keys].abs().max().item(), 0.0)


def law_7_lens(vlm: Any, prompt: Prompt) -> Iterator[Finding]:
    """The lens of the last layer is the prediction; what embeddings, attention and MLPs add sums to the logits."""
    layers = range(vlm.shape.layers["text"])
    added = [Site(kind, layer) for layer in layers for kind in ("attn_out", "mlp_out")]
    last = Site("resid_post", layers[-1])
    run = vlm.run(prompt, read={site: lambda x: x[:, -1] for site in (Site("resid_pre", 0), *added, last)})
    yield Finding(7, "the last layer's lens", apart(vlm.unembed(run[last]), run.logits), rounding(vlm))
    with torch.no_grad():
        scale = attrgetter(vlm.arch.norm)(vlm.hf)(run[last]) / run[last]
        parts = torch.stack([unembed_alone(vlm, run[site] * scale) for site in (Site("resid_pre", 0), *added)]).sum(0)
    yield Finding(7, "direct logit attributions sum", apart(parts, run.logits), rounding(vlm, 256))


def unembed_alone(vlm: Any, normed: Tensor) -> Tensor:
    """The unembedding alone, without the final norm."""
    return attrgetter(vlm.arch.unembed)(vlm.hf)(normed)


def law_8_batches(vlm: Any, prompt: Prompt) -> Iterator[Finding]:
    """Rows with their own edits are single runs; a left-padded batch is its rows alone."""
    same = (eager_rounding if vlm.attention == "eager" else rounding)(vlm)
    null = null_of(prompt, vlm)
    middle = Site("resid_post", vlm.shape.layers["text"] // 2)
    variants = [
        [ablate_heads(0, [0])],
        [bias_attention(0, prompt.image, 2.0, heads=[1]), cut_attention(1, prompt.image)],
        [patch(middle, vlm.run(null, read=[middle])[middle], positions=prompt.image)],
        [scale_heads(1, [0], 2.0), Edit(Site("pattern", 0), lambda pattern: pattern * 0.5)],
        [],
    ]
    single = torch.cat([vlm.run(prompt, edits=edits).logits for edits in variants])
    together = vlm.run(prompt, variants=variants).logits
    yield Finding(8, "variants", apart(together, single), same)
    variants[0] = [scale_heads(0, [0], 2.0, tower="vision")]
    single[0] = vlm.run(prompt, edits=variants[0]).logits[0]
    yield Finding(8, "variants of vision", apart(vlm.run(prompt, variants=variants).logits, single), same)
    if vlm.attention == "eager" and vlm.dtype == torch.float64:
        return  # transformers answers NaN for padding there, and vlm.run refuses it
    cropped = {name: x[:, 1:] if name in ("input_ids", "attention_mask") else x for name, x in prompt.encoding.items()}
    short = vlm.prompt(encoding=cropped) if 0 not in prompt.image else null
    edits = [bias_attention(0, [2, 3], 1.0), steer("text.1.resid_pre", torch.ones(vlm.shape.d_model["text"]), 1.0, [4])]
    sites = [Site("pattern", 1), Site("resid_post", 1), Site("z", 0, "vision"), Site("v", 1)]
    batch = vlm.run([prompt, short], edits=edits, read=sites)
    alone = [vlm.run(one, edits=edits, read=sites) for one in (prompt, short)]
    logits = apart(batch.logits, torch.cat([run.logits for run in alone]))
    yield Finding(8, "a padded batch", logits, rounding(vlm))
    worst = max(apart(batch.rows[row][site], alone[row][site]) for row in range(2) for site in sites)
    yield Finding(8, "readings of a padded batch", worst, rounding(vlm))


def law_9_generation(vlm: Any, prompt: Prompt, steps: int = 4) -> Iterator[Finding]:
    """Without edits it is transformers' own; with edits it is the same as running the whole text anew at every step."""
    given = placed(vlm, prompt)
    settings = {"do_sample": False, "max_new_tokens": steps}
    with torch.no_grad():
        own = vlm.hf.generate(**given, **settings)[:, len(prompt) :]
    said = vlm.generate(prompt, **settings).tokens
    yield Finding(9, "generation without edits", float(not torch.equal(said, own)), 0.0)
    edits = [
        bias_attention(0, prompt.image, 1.0),
        ablate_heads(1, [0]),
        bias_attention(1, prompt.image, 0.5, heads=[1], way="recompute"),
        Edit(Site("v", 0), lambda v: v * 1.1),
        steer("text.1.resid_pre", torch.ones(vlm.shape.d_model["text"]), 1.0, positions=prompt.image),
    ]
    made = vlm.generate(prompt, edits, read_each_step={Site("logits"): lambda x: x[:, -1]}, **settings)
    ids, worst = given["input_ids"], 0.0
    for step, logits in enumerate(made[Site("logits")]):
        whole = {**prompt.encoding, "input_ids": ids.cpu(), "attention_mask": torch.ones_like(ids).cpu()}
        worst = max(worst, apart(logits, vlm.run(vlm.prompt(encoding=whole), edits=edits).logits))
        ids = torch.cat([ids, made.tokens[:, step : step + 1]], 1)
    yield Finding(9, "steps with a cache, with edits", worst, rounding(vlm))


def law_10_gradients(vlm: Any, prompt: Prompt) -> Iterator[Finding]:
    """Gradients are autograd's on the eager model; a position's logit does not depend on later positions."""
    token = int(own_logits(vlm, prompt).argmax())
    layers = range(vlm.shape.layers["text"])
    sites = [Site(kind, layer) for layer in layers for kind in ("pattern", "resid_post")]
    run = vlm.run(prompt, read=sites, grad_of=lambda logits: logits[:, token])
    own = own_gradients(vlm, prompt, token)
    for kind in ("pattern", "resid_post"):
        worst = max(apart(run.grad[Site(kind, layer)], own[(kind, layer)]) for layer in layers)
        yield Finding(10, f"gradient of {kind}", worst, eager_rounding(vlm, 256))
    early = len(prompt) // 2
    half = vlm.run(prompt, read=sites, grad_of=lambda logits: logits[:, token], position=early)
    later = max(half.grad[Site("resid_post", layer)][:, early + 1 :].abs().max().item() for layer in layers)
    yield Finding(10, "gradient after the position", later, 0.0)
    yield from gradients_of_variants(vlm, prompt, lambda logits: logits[:, token])


def gradients_of_variants(vlm: Any, prompt: Prompt, metric: Any) -> Iterator[Finding]:
    """Gradients of rows that are edited differently are those of single runs."""
    same = (eager_rounding if vlm.attention == "eager" else rounding)(vlm, 256)
    variants: list[list[Edit]] = [
        [Edit(Site("pattern", 1), lambda pattern: pattern * 0.5)],
        [bias_attention(0, prompt.image, 1.0, way="recompute")],
        [cut_attention(1, prompt.image, queries=prompt.last), ablate_heads(0, [1])],
        [],
    ]
    sites = [Site(kind, layer) for layer in (0, 1) for kind in ("pattern", "scores", "z", "resid_pre")]
    together = vlm.run(prompt, read=sites, variants=variants, grad_of=metric)
    worst = 0.0
    for row, edits in zip(together.rows, variants, strict=True):
        alone = vlm.run(prompt, read=sites, edits=edits, grad_of=metric)
        worst = max([worst, *(apart(row.grad[site], alone.grad[site]) for site in sites)])
    yield Finding(10, "gradients of variants", worst, same)


def law_13_positions(vlm: Any, prompt: Prompt) -> Iterator[Finding]:
    """Image positions are those of the image token; boxes tile what the model sees, without gap or overlap."""
    marked = (prompt.encoding["input_ids"][0] == vlm.shape.image_token).nonzero()[:, 0].tolist()
    yield Finding(13, "image positions", float(marked != prompt.image), 0.0)
    spans = sorted(position for positions in prompt.spans.values() for position in positions)
    yield Finding(13, "spans are all positions once", float(spans != list(range(len(prompt)))), 0.0)
    worst = 0.0
    for image in prompt.images:
        boxes = torch.tensor([image.box(position) for position in image.positions], dtype=torch.float64)
        grid = boxes.reshape(image.rows, image.columns, 4)
        gaps = [grid[:, 1:, 0] - grid[:, :-1, 2], grid[1:, :, 1] - grid[:-1, :, 3]]
        worst = max([worst, *(gap.abs().max().item() for gap in gaps if gap.numel())])
    yield Finding(13, "boxes tile", worst, 1e-9)


LAWS = (
    law_1_reading,
    law_2_writing_back,
    law_3_residuals,
    law_4_patterns,
    law_5_patching,
    law_6_biases,
    law_7_lens,
    law_8_batches,
    law_9_generation,
    law_10_gradients,
    law_13_positions,
)
