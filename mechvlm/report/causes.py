"""The later parts of a report: what the answer depends on, found by changing something and running again.

Rule this module guards: as in `views`; and every effect is an edited run compared with the same run unedited.

>>> patching(study).finding
'The picture moves the metric from -5.82 to +2.57. Most of that enters layer 0 at “image”, layers 1 to 7 at “question”.'
"""

from collections.abc import Sequence

import pandas as pd
import xarray as xr

from mechvlm import plot
from mechvlm.attention_edits import bias_attention
from mechvlm.experiments.attribution import gradient_attribution
from mechvlm.experiments.dose import dose_response
from mechvlm.experiments.patching import patch_spans
from mechvlm.experiments.sight import cross_layers, named, own_layers
from mechvlm.report.drawn import NO_PLACE, best_place, joined, kind, values_over
from mechvlm.report.page import COUNTED, Drawing, Section, Table, listed
from mechvlm.report.study import Study

AMOUNTS = (-8.0, -6.0, -4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0)
NEW_TOKENS = 24
LEAST = 0.0005  # an attribution below this is +0.000 as it is printed
NOTHING = 0.0005  # so is a share
MOST, OPPOSING = 0.5, -0.25  # shares: above the one is most; below the other something else works against it


def heads(study: Study) -> Section:
    """Every head, ablated."""
    effect = study.effect
    strongest = effect.isel(abs(effect).argmax(...))
    return Section(
        name="heads",
        title="Which heads the answer needs",
        finding=f"Taking out layer {int(strongest.layer)}, head {int(strongest['head'])} changes the metric most, "
        f"by {float(strongest):+.2f}, from {effect.attrs['clean']:+.2f}.",
        sentence=f"How much {study.measured} changes when one head’s output is set to zero at every position, one head "
        "at a time, with the picture.",
        conventions=f"Metric with the head ablated minus metric without, in {study.unit}. Negative: the head speaks "
        f"for “{study.answers[0]}”; positive: against it. {COUNTED}",
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
    if "note" in found.attrs:
        raise ValueError(
            f"picture and null image give the same answer to within rounding ({ends[0]:.3f}), so there is nothing to "
            "carry over."
        )
    share = found.normalised
    enters = "Layer 0 patches the embeddings, so there the image must give 1."
    if cross_layers(study.vlm):
        enters = f"{named(cross_layers(study.vlm)).capitalize()} go on looking at the null image, whatever is patched."
    return Section(
        name="patching",
        title="Where what was seen passes",
        finding=f"The picture moves the metric from {ends[0]:+.2f} to {ends[1]:+.2f}. {carried(share)}",
        sentence="What enters one layer (resid_pre) at the positions of one span is taken from the run with the "
        "picture and put into the run with the null image; the map shows how far that carries the answer over.",
        conventions=f"0: the null image’s own metric ({ends[0]:+.2f}); 1: the picture’s ({ends[1]:+.2f}), of "
        f"{study.measured}. Below 0 and above 1 are possible. {enters} {COUNTED}",
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
    most = found.attribution[int(abs(found.attribution.values).argmax())]
    where, token = best_place(found.attribution, study.real), "key" if kind(study.real) == "keys" else "token"
    if abs(float(most)) < LEAST:
        finding = f"No image {token}'s attribution reaches {LEAST}: around this answer the metric is flat, as where a "
        finding += f"probability is all but 0 or 1, and to first order no {token} can be told from another."
    else:
        side = "for" if most > 0 else "against"
        finding = f"The {token} at {where} speaks most {side} “{study.answers[0]}” ({float(most):+.3f})."
    drawings = values_over(found.attribution, study.real, f"The picture coloured by attribution, strongest at {where}.")
    sentence = f"The gradient of {study.measured} at each image {token}’s feature, times the feature, summed over its "
    sentence += "dimensions: how much the token speaks for the answer, to first order."
    return Section(
        name="attribution",
        title="Which image tokens the answer depends on",
        finding=finding,
        sentence=joined([sentence, "" if drawings else NO_PLACE]),
        conventions=f"In {study.unit}. Positive: scaling the token up raises the metric. The sum over tokens is not "
        "the metric, since the model is not linear.",
        drawings=drawings,
        numbers={"attribution": found},
    )


def dose(study: Study) -> Section:
    """The metric against a bias on attention to image tokens."""
    found = dose_response(study.vlm, study.real, study.metric, AMOUNTS)
    curve = found.metric
    low, high = curve.isel(amount=int(curve.values.argmin())), curve.isel(amount=int(curve.values.argmax()))
    ends = [float(curve.sel(amount=amount)) for amount in (AMOUNTS[0], 0.0, AMOUNTS[-1])]
    return Section(
        name="dose",
        title="What if it looked more, or less?",
        finding=f"With a bias of {AMOUNTS[0]:+g} the metric is {ends[0]:+.2f}, without one {ends[1]:+.2f}, and with "
        f"{AMOUNTS[-1]:+g} it is {ends[2]:+.2f}; of the biases tried it is lowest at {float(low.amount):+g} "
        f"({float(low):+.2f}) and highest at {float(high.amount):+g} ({float(high):+.2f}).",
        sentence="A number is added to the attention scores of all image tokens, in every layer, head and query; the "
        f"lines show {study.measured}, and the attention that the last position then really pays to the image.",
        conventions="A bias of b multiplies the odds of looking at the image by e to the b; 0 is the unedited model. "
        "Attention is averaged over all layers and heads, a fraction from 0 to 1.",
        drawings=[
            Drawing(
                f"Line of the metric against the bias, at least {float(low):+.2f} and at most {float(high):+.2f}.",
                plot.lines(curve, x="amount"),
            ),
            Drawing(
                f"Line of attention to the image against the bias, at least {float(found.mass.min()):.2f} and at most "
                f"{float(found.mass.max()):.2f}.",
                plot.lines(found.mass, x="amount"),
            ),
        ],
        numbers={"dose": found},
    )


def generation(study: Study) -> Section:
    """What the model says, with and without a bias."""
    own, across = own_layers(study.vlm), cross_layers(study.vlm)
    rows = []
    for prompt, name in ((study.real, "picture"), (study.null, "null image")):
        for amount in (0.0,) if across else (0.0, study.bias, -study.bias):
            edits = [bias_attention(layer, prompt.image, amount) for layer in own] if amount else []
            said = study.vlm.generate(prompt, edits, max_new_tokens=NEW_TOKENS, do_sample=False)
            text = said.text if said.text is not None else " ".join(map(str, said.tokens[0].tolist()))
            rows.append((name, f"{amount:+g}" if amount else "none", text or "(nothing: it ended at once)"))
    if across:
        return _said(rows, f"{named(across)} look at the picture alone, so no bias makes them look at it more.")
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


def _said(rows: Sequence[tuple], why: str) -> Section:
    """What the model says without a bias, where none can be."""
    same = rows[0][2] == rows[1][2]
    return Section(
        name="generation",
        title="What it says",
        finding=f"With the picture and with the null image it says {'the same' if same else 'something else'}.",
        sentence=f"The text generated after the prompt, token by token and always the likeliest, at most {NEW_TOKENS} "
        "tokens.",
        conventions=f"Left out is what it says with a bias on attention to the image: {why}",
        tables=[Table("Generated text", ("image", "bias on image tokens", "text"), rows)],
        numbers={"generation": pd.DataFrame(rows, columns=["image", "bias", "text"])},
    )


def carried(share: xr.DataArray) -> str:
    """Which span carries what was seen into which layers, with "most" only where that is so."""
    best = [
        (str(row.span.values[row.values.argmax()]), how_much(row.values.tolist()))
        for row in share.transpose("layer", "span")
    ]
    most, others, none = (stretches(best, wanted) for wanted in ("most", "some", "none"))
    said = f"Most of that enters {most}." if most else "Into no layer does one span carry most of that."
    said += f" The largest share, but not most or not unopposed, enters {others}." if others else ""
    return f"{said} Nothing of it enters {none}." if none else said


def how_much(shares: Sequence[float]) -> str:
    """Whether one span carries "most", "some" or "none" of what was seen."""
    if max(map(abs, shares)) < NOTHING:
        return "none"
    return "most" if max(shares) > MOST and min(shares) > OPPOSING else "some"


def stretches(best: list[tuple[str, str]], wanted: str) -> str:
    """The spans at the layers of one kind, neighbours joined: 'layer 0 at image, layers 1 to 7 at question'."""
    found, start = [], 0
    alike = [("", much) if much == "none" else (span, much) for span, much in best]
    for at in range(1, len(alike) + 1):
        if at == len(alike) or alike[at] != alike[start]:
            layers = f"layer {start}" if at - 1 == start else f"layers {start} to {at - 1}"
            span, much = alike[start]
            found += [f"{layers} at “{span}”" if span else layers] if much == wanted else []
            start = at
    return ", ".join(found)
