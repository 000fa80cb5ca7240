"""The first parts of a report: what the model is shown, what it says, where it looks and what it holds.

Rule this module guards: a section's sentence says what is drawn and how it was computed, and its conventions give
units, where layers start, and what positive means.

>>> answers(study).finding
'The likeliest next token is “yes” (0.93), with the null image “no” (1.00).'
"""

import pandas as pd
import plotly.graph_objects as go
import xarray as xr
from PIL import Image

from mechvlm import plot
from mechvlm.experiments.answers import answer_probabilities
from mechvlm.experiments.lens import logit_lens
from mechvlm.experiments.profile import attention_map, attention_profile
from mechvlm.experiments.sight import cross_layers, image_dim, named
from mechvlm.imagemap import ImageMap
from mechvlm.prompt import Prompt
from mechvlm.report.drawn import (
    NO_PLACE,
    NOT_DRAWN,
    best_place,
    gaps,
    grids,
    joined,
    kind,
    names,
    over_pictures,
    seen,
    square,
    squares,
    stretches_of,
)
from mechvlm.report.page import COUNTED, Drawing, Section, Table, listed
from mechvlm.report.study import Study

MOST_QUERIES = 24
BLUER = "Bluer is more likely, by the probability of the likeliest token; hovering shows five."


def picture(study: Study) -> Section:
    """The picture and its image tokens."""
    real, null = study.real, study.null
    spans = [(name, len(where), stretches_of(where)) for name, where in real.spans.items()]
    overlapping = "Where squares overlap, the picture is drawn once for each layer of them."
    tiled = any(len(image.tiles) > 1 for image in real.images)
    shown = dict(zip(names(real, "picture"), real.pictures, strict=True))
    return Section(
        name="picture",
        title="The picture, as tokens",
        finding=seen(study),
        sentence=f"The picture with the {squares(study)}; the squares are computed by undoing what the processor did "
        "to the picture.",
        conventions=joined(
            [
                f"Rows and columns count from 0; a square is {square(real)} pixels of what the model sees.",
                overlapping if tiled else "",
                gaps(real),
                f"The null image is “{study.null_name}”. A span is a named list of positions; together they hold every "
                "position once.",
            ]
        ),
        drawings=[
            Drawing(f"{name} with a grid of {grids(image)}.", plot.token_grid(real, number))
            for number, (name, image) in enumerate(zip(names(real, "picture"), real.images, strict=True))
        ],
        tables=[Table("What the positions of the prompt are", ("span", "positions", "which"), spans)],
        pictures={**shown, **dict(zip(names(null, "null image"), null.pictures, strict=True))},
    )


def answers(study: Study) -> Section:
    """Answer probabilities, real against null."""
    shown = answer_probabilities(study.vlm, {"real": study.real, "null": study.null}, study.answers)
    tops = {name: _next_tokens(study, prompt) for name, prompt in (("real", study.real), ("null", study.null))}
    (real, sure), (null, unsure) = tops["real"][0], tops["null"][0]
    finding = f"The likeliest next token is “{real}” ({sure:.2f}), with the null image “{null}” ({unsure:.2f})."
    spellings = {study.vlm.word(number) for word in study.answers for number in _ids(study, word)}
    odd = [token for token in (real, null) if token not in spellings]
    if odd:
        finding += f" Note: “{odd[0]}” is none of the answers asked for, so read what follows with care."
    rows = [
        (rank, one, f"{share:.4f}", other, f"{least:.4f}")
        for rank, ((one, share), (other, least)) in enumerate(zip(tops["real"], tops["null"], strict=True), 1)
    ]
    columns = ("rank", "with the picture", "probability", "with the null image", "probability ")
    words = ", ".join(f"“{word}”" for word in study.answers)
    highest = "; ".join(
        f"{name}: " + ", ".join(f"{w} {p:.2f}" for w, p in _pairs(shown, name)) for name in ("real", "null")
    )
    return Section(
        name="answers",
        title="What it answers",
        finding=finding,
        sentence=f"How likely the next token after the prompt is each of {words}, with the picture (real) and with the "
        "null image (null): the softmax over the whole vocabulary at the last position.",
        conventions="Probabilities from 0 to 1. A word counts in all its single-token spellings; what is missing to 1 "
        "went to other tokens, of which the table shows the five likeliest.",
        drawings=[Drawing(f"Bars of answer probabilities. {highest}.", plot.bars(shown, x="word", colour="prompt"))],
        tables=[Table("The likeliest next tokens", columns, rows)],
        numbers={
            "answers": shown,
            "next_tokens": pd.DataFrame(
                rows, columns=["rank", "real_token", "real_probability", "null_token", "null_probability"]
            ),
        },
    )


def cases(study: Study) -> Section:
    """Some more questions, real against null."""
    prompts = {f"real {n}": case.real for n, case in enumerate(study.cases)}
    prompts |= {f"null {n}": case.null for n, case in enumerate(study.cases)}
    labels = dict.fromkeys(case.right for case in study.cases if case.right)
    # A right answer that is none of those followed can only be compared with others of its kind, such as yes and no.
    words = list(study.answers) if set(labels) <= set(study.answers) and len(study.answers) > 1 else list(labels)
    if len(words) < 2:
        raise ValueError(
            f"the right answers of the further questions are {', '.join(labels) or 'not given'}, and it takes two "
            "different answers to choose between."
        )
    shown = answer_probabilities(study.vlm, prompts, words)
    rows, held = [], {"real": 0, "null": 0}
    for number, case in enumerate(study.cases):
        cells: list[object] = [case.real.words, case.right]
        for name in ("real", "null"):
            one = shown.sel(prompt=f"{name} {number}")
            best = str(one.word.values[one.values.argmax()])
            held[name] += best == case.right
            cells.append(f"{best} ({float(one.max()):.2f})")
        rows.append(tuple(cells))
    among = " and ".join(f"“{word}”" for word in words)
    columns = ("question", "right answer", "with the picture", "with the null image")
    return Section(
        name="cases",
        title="Some more questions",
        finding=f"Of {len(rows)} further questions {held['real']} are answered right with the picture and "
        f"{held['null']} with the null image, where the likeliest of {among} counts as the answer.",
        sentence=f"Further questions about other scenes: the likeliest of {among} and its probability, with the "
        "picture and with the null image.",
        conventions="Probabilities of the next token from 0 to 1, not renormalised among the answers.",
        tables=[
            Table(
                "Answers with the picture and with the null image",
                columns,
                rows,
                [c.real.pictures[0] for c in study.cases],
            )
        ],
        numbers={"cases": pd.DataFrame(rows, columns=list(columns))},
    )


def profile(study: Study) -> Section:
    """Attention mass by span, layer and head."""
    found = attention_profile(study.vlm, [study.real, study.null])
    mass = found.mass.assign_coords(example=["real", "null"]).rename(example="prompt").drop_vars("question")
    image = mass.sel(span="image", drop=True)
    by_layer = image.mean("head").sel(prompt="real").dropna("layer")
    peak = by_layer[int(by_layer.values.argmax())]
    across = named(cross_layers(study.vlm))
    finding = (
        f"The last position pays {float(by_layer.mean()):.0%} of its attention to the image on average over "
        f"layers and heads, and {float(peak):.0%} in layer {int(peak.layer)}, the highest of the layers’ averages."
    )
    if kind(study.real) == "keys":
        finding = f"In {across} the last position looks at the picture alone; in the others it divides its attention "
        finding += f"over the words, of which the image’s one token gets {float(by_layer.mean()):.0%} on average."
    return Section(
        name="attention",
        title="Where the answer looks",
        finding=finding,
        sentence="How the last position, which answers, divides its attention over the spans of the prompt: the "
        "attention weights on a span’s keys summed, averaged over the heads of a layer (lines), and for the image in "
        "every head (maps).",
        conventions=joined(
            [
                f"Fractions from 0 to 1 that sum to 1 over the spans, not divided by their lengths. {COUNTED} "
                "Solid: with the picture. Dashed: with the null image.",
                f"Left out are {across}, which attend to the picture’s keys and not to the text." if across else "",
            ]
        ),
        drawings=[
            Drawing(
                f"Lines of attention by layer, one for each span. On the image, real: {listed(by_layer)}.",
                plot.lines(mass.mean("head", keep_attrs=True), x="layer", colour="span", dash="prompt"),
            ),
            Drawing(
                "Two maps, real and null, of attention to the image by layer and head, up to "
                f"{float(image.max()):.2f}.",
                plot.heatmap(image.transpose("prompt", "layer", "head"), facet="prompt", limits=(0.0, 1.0)),
            ),
        ],
        numbers={"attention": found},
    )


def attention(study: Study) -> Section:
    """Attention over the picture, in one head."""
    layer, head, why = study.chosen
    # A prompt that ends in its image has no text after it; it answers at its last position all the same.
    where = (study.real.question + study.real.last)[-MOST_QUERIES:] or [len(study.real) - 1]
    maps = attention_map(study.vlm, study.real, layer, head, where)
    top, masses = float(maps.max()) or 1.0, maps.sum(image_dim(study.real)).values
    best = int(masses.argmax())
    finding = f"In layer {layer}, head {head}, the last position puts {masses[-1]:.0%} of its attention on the image"
    if kind(study.real) == "keys":
        best, last = len(where) - 1, maps.isel(query=-1)
        finding = (
            f"In layer {layer}, head {head}, where all attention is to the picture, the last position’s goes most "
        )
        finding += f"to {best_place(last, study.real)}, with {float(last.max()):.0%}"
    elif len(where) > 1:
        finding += f"; of the last {len(where)} positions after the picture, “{study.real.tokens[where[best]]}” "
        finding += f"(position {where[best]}) looks there most, with {masses[best]:.0%}"

    def draw(image: ImageMap, drawn: Image.Image) -> dict[str, go.Figure]:
        rows = {f"{query}: {study.real.tokens[query]}": maps.isel(query=at) for at, query in enumerate(where)}
        return {said: plot.over_image(row, image, drawn, limits=(0.0, top)) for said, row in rows.items()}

    alt = f"The picture coloured by attention weights of the chosen position, up to {top:.2f}."
    drawings = over_pictures(study.real, alt, draw, chooser="position that looks", start=best)
    looked_at = "key of the picture" if kind(study.real) == "keys" else "image token"
    starts = "the last position" if kind(study.real) == "keys" else "the position that looks there most"
    return Section(
        name="attention_map",
        title="Attention over the picture",
        finding=f"{finding}.",
        sentence=f"The attention weights of one text position on every {looked_at}, in layer {layer}, head {head}, "
        f"{why}: the softmax row of that position as the model computed it. "
        + ("The slider chooses the position that looks." if drawings else NO_PLACE),
        conventions=f"Weights from 0 (clear) to {top:.2f} on one scale for all positions; over all keys of a row they "
        f"sum to 1. {COUNTED}" + (f" It starts with {starts}." if drawings else ""),
        drawings=drawings,
        numbers={"attention_map": maps},
    )


def lens(study: Study) -> Section:
    """The logit lens on image tokens."""
    found = logit_lens(study.vlm, study.real, positions=study.real.image, words=list(study.answers))
    layers = found.layer.values.tolist()
    start = len(layers) * 3 // 4
    one = found.isel(layer=start).sel(rank=1)
    read = pd.Series(one.token.values.tolist()).value_counts()
    most = ", ".join(f"“{word}” ({count})" for word, count in read.head(5).items())
    on_picture = kind(study.real) == "tokens"
    rows = list(zip(one.position.values.tolist(), one.token.values.tolist(), strict=True))
    table = Table(f"The word each image token reads as after layer {layers[start]}", ("position", "word"), rows)
    return Section(
        name="lens",
        title="What the image tokens hold: the logit lens",
        finding=f"After layer {layers[start]} the {len(study.real.image)} image tokens read most often {most}.",
        sentence="The word each image token stands for after the chosen layer: what the layer leaves there "
        "(resid_post), through the model’s own final norm and unembedding. "
        + ("The slider chooses the layer." if on_picture else NOT_DRAWN[kind(study.real)]),
        conventions=joined([BLUER if on_picture else "", COUNTED]),
        drawings=_lens_drawings(study, found, start) if on_picture else [],
        tables=[] if on_picture else [table],
        numbers={"lens": found},
    )


def _lens_drawings(study: Study, found: xr.Dataset, start: int) -> list[Drawing]:
    """The lens's words over each image, layer by layer."""
    drawings = []
    for number, name in enumerate(names(study.real, "picture")):
        figures = {
            str(layer): plot.tokens_over_image(found, study.real, layer=layer, image=number)
            for layer in found.layer.values.tolist()
        }
        for figure in figures.values():
            # One scale for all layers; the slider says which it is, so the title's room goes too.
            figure.update_layout(
                coloraxis={"cmin": 0, "cmax": 1}, title_text=None, margin_t=30, height=figure.layout.height - 36
            )
        alt = f"{name} with a word in each image token’s square, for the chosen layer."
        drawings.append(Drawing(alt, figures, chooser="after layer", start=start))
    return drawings


def _next_tokens(study: Study, prompt: Prompt) -> list[tuple[str, float]]:
    """The likeliest next tokens with their probabilities: the lens of the last layer at the last position."""
    last = logit_lens(study.vlm, prompt, positions=[-1], layers=[study.vlm.shape.layers["text"] - 1]).squeeze()
    return list(zip(last.token.values.tolist(), last.probability.values.tolist(), strict=True))


def _ids(study: Study, word: str | int) -> list[int]:
    return [word] if isinstance(word, int) else study.vlm.token_ids(word)


def _pairs(shown: xr.DataArray, name: str) -> list[tuple[str, float]]:
    one = shown.sel(prompt=name)
    return list(zip(one.word.values.tolist(), one.values.tolist(), strict=True))
