"""The later parts of a report: what the answer depends on, found by changing something and running again.

Rule this module guards: as in `views`; and every effect is an edited run compared with the same run unedited.

>>> patching(study).finding
'The picture moves the metric from -2.72 to +4.34. Most of that enters layer 0 at “image”, layers 1 to 7 at “question”.'
"""

import pandas as pd

from mechvlm import plot
from mechvlm.edits import bias_attention
from mechvlm.experiments.attribution import gradient_attribution
from mechvlm.experiments.dose import dose_response
from mechvlm.experiments.patching import patch_spans
from mechvlm.report.page import COUNTED, Drawing, Section, Table, listed
from mechvlm.report.study import Study

AMOUNTS = (-8.0, -6.0, -4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0)
NEW_TOKENS = 24


def heads(study: Study) -> Section:
    """Every head, ablated."""
    effect = study.effect
    strongest = effect.isel(abs(effect).argmax(...))
    return Section(
        name="heads",
        title="Which heads the answer needs",
        finding=f"Layer {int(strongest.layer)}, head {int(strongest['head'])} matters most: without it the metric "
        f"changes by {float(strongest):+.2f}, from {effect.attrs['clean']:+.2f}.",
        sentence=f"How much {study.measured} changes when one head’s output is set to zero at every position, one head "
        "at a time, with the picture.",
        conventions=f"Metric with the head ablated minus metric without, in {study.unit}. Negative: the head speaks "
        f"for "
        f"“{study.answers[0]}”; positive: against it. {COUNTED}",
        drawings=[
            Drawing(
                f"Map of the effect of ablating each head, by layer and head, from {float(effect.min()):+.2f} to "
                f"{float(effect.max()):+.2f}.",
                plot.heatmap(effect),
            )
        ],
        numbers={"heads": effect},
    )


def patching(study: Study) -> Section:
    """The real run patched into the null run."""
    found = patch_spans(study.vlm, source=study.real, target=study.null, metric=study.metric)
    ends = [found.attrs["target_metric"], found.attrs["source_metric"]]
    if ends[0] == ends[1]:
        raise ValueError(
            f"picture and null image give the same answer ({ends[0]:.3f}), so there is nothing to carry over."
        )
    share = found.normalised
    carriers = [str(share.span.values[row.argmax()]) for row in share.values]
    return Section(
        name="patching",
        title="Where what was seen passes",
        finding=f"The picture moves the metric from {ends[0]:+.2f} to {ends[1]:+.2f}. Most of that enters "
        f"{_stretches(carriers)}.",
        sentence="What enters one layer (resid_pre) at the positions of one span is taken from the run with the "
        "picture and put into the run with the null image; the map shows how far that carries the answer over.",
        conventions=f"0: the null image’s own metric ({ends[0]:+.2f}); 1: the picture’s ({ends[1]:+.2f}), of "
        f"{study.measured}. Below 0 and above 1 are possible. Layer 0 patches the embeddings, so there the image must "
        f"give 1. {COUNTED}",
        drawings=[
            Drawing(
                f"Map of the patches’ effect by layer and span. Image span: {listed(share.sel(span='image'))}.",
                plot.heatmap(share),
            )
        ],
        numbers={"patching": found},
    )


def attribution(study: Study) -> Section:
    """Gradient times input over the picture."""
    found = gradient_attribution(study.vlm, study.real, study.metric)
    most = found.attribution.isel(position=int(abs(found.attribution.values).argmax()))
    image, drawn = study.real.images[0], study.real.pictures[0]
    return Section(
        name="attribution",
        title="Which image tokens the answer depends on",
        finding=f"The token at row {int(most.row)}, column {int(most.column)} speaks most "
        f"{'for' if most > 0 else 'against'} “{study.answers[0]}” ({float(most):+.3f}).",
        sentence=f"The gradient of {study.measured} at each image token’s feature, times the feature, summed over its "
        f"dimensions: how much the token speaks for the answer, to first order.",
        conventions=f"In {study.unit}. Positive: scaling the token up raises the metric. The sum over tokens is not "
        f"the "
        "metric, since the model is not linear.",
        drawings=[
            Drawing(
                f"The picture coloured by attribution, strongest at row {int(most.row)}, column {int(most.column)}.",
                plot.over_image(found.attribution, image, drawn),
            )
        ],
        numbers={"attribution": found},
    )


def dose(study: Study) -> Section:
    """The metric against a bias on attention to image tokens."""
    found = dose_response(study.vlm, study.real, study.metric, AMOUNTS)
    low, high = float(found.metric.min()), float(found.metric.max())
    return Section(
        name="dose",
        title="What if it looked more, or less?",
        finding=f"Between biases of {AMOUNTS[0]:+g} and {AMOUNTS[-1]:+g} the metric runs from {low:+.2f} to "
        f"{high:+.2f}; without a bias it is {float(found.metric.sel(amount=0.0)):+.2f}.",
        sentence="A number is added to the attention scores of all image tokens, in every layer, head and query; the "
        f"lines show {study.measured}, and the attention that the last position then really pays to the image.",
        conventions="A bias of b multiplies the odds of looking at the image by e to the b; 0 is the unedited model. "
        "Attention is averaged over all layers and heads, a fraction from 0 to 1.",
        drawings=[
            Drawing(
                f"Line of the metric against the bias, from {low:+.2f} to {high:+.2f}.",
                plot.lines(found.metric, x="amount"),
            ),
            Drawing(
                f"Line of attention to the image against the bias, from {float(found.mass.min()):.2f} to "
                f"{float(found.mass.max()):.2f}.",
                plot.lines(found.mass, x="amount"),
            ),
        ],
        numbers={"dose": found},
    )


def generation(study: Study) -> Section:
    """What the model says, with and without a bias."""
    everywhere = range(study.vlm.shape.layers["text"])
    rows = []
    for prompt, name in ((study.real, "picture"), (study.null, "null image")):
        for amount in (0.0, study.bias, -study.bias):
            edits = [bias_attention(layer, prompt.image, amount) for layer in everywhere] if amount else []
            said = study.vlm.generate(prompt, edits, max_new_tokens=NEW_TOKENS, do_sample=False)
            text = said.text if said.text is not None else " ".join(map(str, said.tokens[0].tolist()))
            rows.append((name, f"{amount:+g}" if amount else "none", text or "(nothing: it ended at once)"))
    changed = sum(row[2] != rows[0][2] for row in rows[1:3])
    return Section(
        name="generation",
        title="What it says, with and without the bias",
        finding=f"With the picture {('neither', 'one', 'both')[changed]} of the two biases changed what it says.",
        sentence=f"The text generated after the prompt, token by token and always the likeliest, at most {NEW_TOKENS} "
        "tokens; the bias acts in the pass over the prompt and in every step after it.",
        conventions="The bias is added to the attention scores of all image tokens, in every layer and head: positive "
        "makes the model look at the image more, negative less.",
        tables=[Table("Generated text", ("image", "bias on image tokens", "text"), rows)],
        numbers={"generation": pd.DataFrame(rows, columns=["image", "bias", "text"])},
    )


def _stretches(carriers: list[str]) -> str:
    """Which span carries most at which layers: 'layer 0 at image, layers 1 to 7 at question'."""
    found, start = [], 0
    for at in range(1, len(carriers) + 1):
        if at == len(carriers) or carriers[at] != carriers[start]:
            layers = f"layer {start}" if at - 1 == start else f"layers {start} to {at - 1}"
            found.append(f"{layers} at “{carriers[start]}”")
            start = at
    return ", ".join(found)
