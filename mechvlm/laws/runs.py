"""Laws 7 to 10 and 13: the lens, batches, generation, gradients and positions."""

from collections.abc import Iterator
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from mechvlm.attention_edits import bias_attention, cut_attention
from mechvlm.batch import TEXT_LIKE
from mechvlm.devices import held
from mechvlm.edits import Edit, ablate_heads, patch, scale_heads, steer
from mechvlm.generating import has_static_cache
from mechvlm.laws.finding import Finding, layers_with
from mechvlm.prompt import Prompt, locate
from mechvlm.readings import rows
from mechvlm.references import (
    apart,
    eager_rounding,
    negative_of,
    own_gradients,
    own_logits,
    placed,
    rounding,
)
from mechvlm.sites import Site


def law_7_lens(vlm: Any, prompt: Prompt) -> Iterator[Finding]:
    """The lens of the last layer is the prediction; what embeddings, attention and MLPs add sums to the logits."""
    layers = range(vlm.shape.layers["text"])
    added = [Site(kind, layer) for layer in layers for kind in ("attn_out", "mlp_out")]
    last, logits = Site("resid_post", layers[-1]), Site("logits")
    run = vlm.run(prompt, read={site: lambda x: x[:, -1] for site in (Site("resid_pre", 0), *added, last, logits)})
    yield Finding(7, "the last layer's lens", apart(vlm.unembed(run[last]), run.logits), rounding(vlm))
    with torch.no_grad():
        norm, head = (attrgetter(path)(vlm.hf) for path in (vlm.arch.norm, vlm.arch.unembed))
        final = run[last]
        parts = torch.stack([run[site].to(final.device) for site in (Site("resid_pre", 0), *added)])
        bias = torch.zeros_like(final)
        if isinstance(norm, torch.nn.LayerNorm):
            # Its mean is taken away from each part alike, and what it adds is no part's.
            parts, final = parts - parts.mean(-1, keepdim=True), final - final.mean(-1, keepdim=True)
            bias = bias + held(vlm.hf, f"{vlm.arch.norm}.bias").to(bias.device)
        scale = (norm(run[last]).to(final.device) - bias) / final
        summed = torch.cat([head(part * scale) for part in parts]).sum(0) + head(bias)
    yield Finding(7, "direct logit attributions sum", apart(summed, run[logits]), rounding(vlm, 256))


def law_8_batches(vlm: Any, prompt: Prompt) -> Iterator[Finding]:
    """Rows with their own edits are single runs; a left-padded batch is its rows alone."""
    same = (eager_rounding if vlm.attention == "eager" else rounding)(vlm)
    null = negative_of(prompt)
    first, second = layers_with(vlm, "z")[:2]
    middle = Site("resid_post", vlm.shape.layers["text"] // 2)
    variants = [
        [ablate_heads(first, [0])],
        [bias_attention(first, prompt.image, 2.0, heads=[1]), cut_attention(second, prompt.image)],
        [patch(middle, vlm.run(null, read=[middle])[middle], positions=prompt.image)],
        [scale_heads(second, [0], 2.0), Edit(Site("pattern", first), lambda pattern: pattern * 0.5)],
        [],
    ]
    single = torch.cat([vlm.run(prompt, edits=edits).logits for edits in variants])
    together = vlm.run(prompt, variants=variants).logits
    yield Finding(8, "variants", apart(together, single), same)
    for tower in [tower for tower in vlm.shape.layers if tower != "text"]:
        variants[0] = [scale_heads(0, [0], 2.0, tower=tower)]
        single[0] = vlm.run(prompt, edits=variants[0]).logits[0]
        yield Finding(8, f"variants of {tower}", apart(vlm.run(prompt, variants=variants).logits, single), same)
    if vlm.attention == "eager" and vlm.dtype == torch.float64:
        return  # transformers answers NaN for padding there, and vlm.run refuses it
    # The last word but one is left out, and what stands before it has to be padded.
    cropped = {
        name: torch.cat([x[:, :-2], x[:, -1:]], 1) if name in TEXT_LIKE else x for name, x in prompt.encoding.items()
    }
    short = locate(cropped, vlm.shape, prompt.grids)
    steps = torch.ones(vlm.shape.d_model["text"])
    edits = [bias_attention(first, [2, 3], 1.0), steer(Site("resid_pre", second), steps, 1.0, [4])]
    sites = [Site("pattern", second), Site("resid_post", second), Site("z", 0, "vision"), Site("v", first)]
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
    first, second = layers_with(vlm, "z")[:2]
    edits = [
        bias_attention(first, prompt.image, 1.0),
        ablate_heads(second, [0]),
        bias_attention(second, prompt.image, 0.5, heads=[1], way="recompute"),
        Edit(Site("v", first), lambda v: v * 1.1),
        steer(Site("resid_pre", second), torch.ones(vlm.shape.d_model["text"]), 1.0, positions=prompt.image),
    ]
    last = {Site("logits"): lambda x: x[:, -1]}
    made = vlm.generate(prompt, edits, read_each_step=last, **settings)
    ids, worst = given["input_ids"], 0.0
    for step, logits in enumerate(made[Site("logits")]):
        whole = longer(vlm, prompt, ids.cpu())
        worst = max(
            worst, apart(logits, vlm.run(locate(whole, vlm.shape, prompt.grids), last, edits).values[Site("logits")])
        )
        ids = torch.cat([ids, made.tokens[:, step : step + 1]], 1)
    if vlm.attention in ("sdpa", "eager") and has_static_cache(vlm.shape):
        static = vlm.generate(prompt, edits, read_each_step=last, cache_implementation="static", **settings)
        both = zip(static[Site("logits")], made[Site("logits")], strict=True)
        # Eager attention's float32 softmax sums over the room for later keys as well.
        allowed = (eager_rounding if vlm.attention == "eager" else rounding)(vlm)
        yield Finding(9, "steps with a static cache", max(apart(one, other) for one, other in both), allowed)
    if vlm.shape.layers.get("vision"):
        yield picture_in_generation(vlm, prompt, settings)
    # A window's cache holds fewer keys than the whole text, and eager attention's float32 softmax sums them otherwise.
    same = (eager_rounding if vlm.attention == "eager" else rounding)(vlm)
    yield Finding(9, "steps with a cache, with edits", worst, same)


def picture_in_generation(vlm: Any, prompt: Prompt, settings: dict[str, Any]) -> Finding:
    """That the first step of a generation looks at the picture as a run does, and can be read and edited there."""
    features, last = Site("image_features"), Site("logits")
    tower = Site("resid_post", 0, "vision")
    edits = [Edit(features, lambda x: x * 1.5, "prompt"), Edit(tower, lambda x: x * 0.5, "prompt")]
    read = {features: None, tower: None, last: lambda x: x[:, -1]}
    run = vlm.run(prompt, read, edits)
    made = vlm.generate(prompt, edits, read_each_step=read, **{**settings, "max_new_tokens": 1})
    same = (eager_rounding if vlm.attention == "eager" else rounding)(vlm)
    worst = max(apart(made[site][0], run[site]) for site in read)
    return Finding(9, "the picture in the first step", worst, same)


def longer(vlm: Any, prompt: Prompt, ids: Tensor) -> dict[str, Tensor]:
    """A prompt's encoding with the words that were generated behind it."""
    more = ids.shape[1] - len(prompt)
    encoding = dict(prompt.encoding)
    for name in [name for name in encoding if name in TEXT_LIKE]:
        encoding[name] = torch.cat([encoding[name], *[encoding[name][:, -1:]] * more], 1)
    if vlm.shape.ahead == "prompt" and more:
        encoding["token_type_ids"][:, -more:] = 1  # what is generated sees only what stands before it
    return {**encoding, "input_ids": ids}


def law_10_gradients(vlm: Any, prompt: Prompt) -> Iterator[Finding]:
    """Gradients are autograd's on the eager model; a position's logit does not depend on later positions."""
    token = int(own_logits(vlm, prompt).argmax())
    layers = range(vlm.shape.layers["text"])
    sites = [
        Site(kind, layer)
        for layer in layers
        for kind in ("pattern", "resid_post")
        if kind in vlm.shape.kinds["text"][layer]
    ]
    run = vlm.run(prompt, read=sites, grad_of=lambda logits: logits[:, token])
    own = own_gradients(vlm, prompt, token)
    for kind in ("pattern", "resid_post"):
        worst = max(apart(run.grad[site], own[site]) for site in sites if site.kind == kind)
        yield Finding(10, f"gradient of {kind}", worst, eager_rounding(vlm, 256))
    patterns, some = [site for site in sites if site.kind == "pattern"], rows([-1, 3])
    short = vlm.run(prompt, read=dict.fromkeys(patterns, some), grad_of=lambda logits: logits[:, token])
    worst = max(apart(short.grad[site], some(own[site])) for site in patterns)
    yield Finding(10, "gradient of rows without the map", worst, eager_rounding(vlm, 256))
    yield ahead(vlm, prompt, [Site("resid_post", layer) for layer in layers], token)
    yield from gradients_of_variants(vlm, prompt, lambda logits: logits[:, token])


def ahead(vlm: Any, prompt: Prompt, sites: list[Site], token: int) -> Finding:
    """That a position depends on later ones just where its architecture's row says so."""
    early = len(prompt) // 2 if not vlm.shape.ahead else len(prompt) - 4  # behind all of the image
    run = vlm.run(prompt, read=sites, grad_of=lambda logits: logits[:, token], position=early)
    later = max(run.grad[site][:, early + 1 :].abs().max().item() for site in sites)
    if vlm.shape.ahead == "prompt":
        return Finding(10, "a word sees the whole prompt, as its row says", float(later == 0), 0.0)
    return Finding(10, "gradient after the position", later, 0.0)


def gradients_of_variants(vlm: Any, prompt: Prompt, metric: Any) -> Iterator[Finding]:
    """Gradients of rows that are edited differently are those of single runs."""
    same = (eager_rounding if vlm.attention == "eager" else rounding)(vlm, 256)
    first, second = layers_with(vlm, "z")[:2]
    variants: list[list[Edit]] = [
        [Edit(Site("pattern", second), lambda pattern: pattern * 0.5)],
        [bias_attention(first, prompt.image, 1.0, way="recompute")],
        [cut_attention(second, prompt.image, queries=prompt.last), ablate_heads(first, [1])],
        [],
    ]
    sites = [Site(kind, layer) for layer in (first, second) for kind in ("pattern", "scores", "z", "resid_pre")]
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
    if not vlm.shape.crosses:
        yield Finding(13, "image features stand at their tokens", features_at_tokens(vlm, prompt), 0.0)
    worst = 0.0
    for image in prompt.images:
        cells = sorted(image.places)
        worst = max(worst, float(len(cells) != len(set(cells))))
        for number, tile in enumerate(image.tiles):
            grid = torch.tensor([[tile.box(r, c) for c in range(tile.columns)] for r in range(tile.rows)])
            gaps = [grid[:, 1:, 0] - grid[:, :-1, 2], grid[1:, :, 1] - grid[:-1, :, 3]]
            held = [(row, column) for of, row, column in cells if of == number]
            beyond = [one for one in held if not (one[0] < tile.rows and one[1] < tile.columns)]
            worst = max([worst, float(len(beyond)), *(gap.abs().max().item() for gap in gaps if gap.numel())])
    yield Finding(13, "boxes tile", worst, 1e-4)


def features_at_tokens(vlm: Any, prompt: Prompt) -> float:
    """How many of the first and the last image features enter the language model elsewhere than at their token."""
    features, first = Site("image_features"), Site("resid_pre", 0)
    before, wrong = vlm.run(prompt, read=[first])[first], 0
    for number in (0, 1, len(prompt.image) - 1):

        def move(x: Tensor, number: int = number) -> Tensor:
            x.view(-1, x.shape[-1])[number] += 1.0
            return x

        after = vlm.run(prompt, read=[first], edits=[Edit(features, move)])[first]
        moved = (after != before).any(-1)[0].nonzero()[:, 0].tolist()
        wrong += moved != [prompt.image[number]]
    return float(wrong)
