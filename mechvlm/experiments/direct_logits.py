"""What does each part of the model add to the answer's logit, directly? Heads moreover by the positions they look at.

Rule this module guards: the parts sum to the model's own number, and what they miss of it (rounding) is told beside
them. What a part does by way of later parts is theirs.

>>> found = direct_logit_attribution(vlm, real, yes)
>>> bool(abs(found.contribution.sum() - found.logit) < 1e-3), found.contribution.component.values[:2].tolist()
(True, ['embed', 'a0.h0'])
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any

import xarray as xr

from mechvlm.batch import check_prompts
from mechvlm.experiments.direct_tables import (
    ELSEWHERE,
    KEYS,
    Taken,
    by_span,
    by_token,
    joined,
    laid_out,
    taken_of,
)
from mechvlm.experiments.examples import checked_mapping, prompt_coordinates
from mechvlm.experiments.knockout import clusters_of
from mechvlm.experiments.logit_parts import Words, ends_in_image, parts_of, read_for, value_of
from mechvlm.experiments.record import record
from mechvlm.experiments.sight import cross_layers
from mechvlm.experiments.uncertainty import with_intervals
from mechvlm.metrics import WordMetric
from mechvlm.prompt import Prompt
from mechvlm.rounds import Work, together
from mechvlm.sites import listed, told
from mechvlm.vlm import VLM
from mechvlm.writes import writing

Asked = WordMetric | str | int
Spans = Mapping[str, Sequence[int]] | Callable[[Prompt], Mapping[str, Sequence[int]]] | None
BY = ("component", "span", "token")
LONG = {
    "contribution": "what is added to the logit directly",
    "heads": "what heads add to the logit directly",
    "mlps": "what MLPs add to the logit directly",
    "by_span": "what heads take from a span to the logit directly",
    "by_token": "logit through the image",
    "metric": "the model's own number",
    "logit": "the same before any cap",
    "remainder": "the logit less the sum",
}


def direct_logit_attribution(
    vlm: VLM,
    prompts: Prompt | Sequence[Prompt],
    metric: Asked | Sequence[Asked],
    spans: Spans = None,
    by: str = "component",
    clusters: Sequence[Hashable] | None = None,
) -> xr.Dataset:
    """What each head, each MLP, what entered and each bias adds to a logit, or to the difference of two, directly.

    The answer's logit is a linear function of the residual stream where the final norm's scale is held as it was in
    the run, and the stream is a sum of what the parts wrote; so the logit is a sum over them, exactly. What a part adds
    through later parts, which read what it wrote, counts as theirs: that is what patching and ablation measure.

    Args:
        prompts: one, or several.
        metric: `mv.logit_difference(answer, other)`, or a word or token id for its logit alone; one for all prompts, or
            a list with one for each. A word of several spellings is their log-sum-exp, as everywhere: each spelling
            then counts by its share among them, held as it was, and what is left, exactly the entropy of the shares, is
            the component "spellings" (the answer's less the other word's).
        spans: for by="span": named lists of positions that share none, or a function from a prompt to them; by default
            the prompt's spans. What lies in none is "elsewhere".
        by: how heads are split: "component", not at all; "span", by the spans that they look at; "token", moreover by
            image token.
        clusters: for each of several prompts what it shares with others, for instance its picture's name: what
            intervals are over.

    Returns:
        All in logits. `contribution` over component, whose sum is `logit`: "embed", what entered the first layer
        ("image" where the answering position is an image token, and "d0", what deep-stack added to it); "a3.h5", head 5
        of layer 3; "m3", its MLP; "bias", the biases of attention's outputs; "norm.bias" and "unembed.bias";
        "spellings" where a word has several; "edits" where the model has edits, for what they put into the stream.
        Coordinates `kind`, `of_layer` and `of_head`, -1 for what has none. `heads` over layer and head, and `mlps` over
        layer, are the same by layer. `metric` is the model's own number; `logit` the same before the cap of a model
        that caps its logits (Gemma 2), and what is taken apart; `remainder`, `logit` less the sum: rounding.
        With by="span" or "token", `by_span` over layer, head and span: what a head takes from the positions it looks
        at, which sums to the head. Layers that attend to the picture's keys instead take all of theirs from "image
        keys". With by="token", `by_token` over layer, head and position (image tokens), or key where the picture is
        keys of cross-attention: the logit through the image. Summed over layers and heads it is a map on the picture;
        tile, row and column are -1 for what stands for no place in it.
        A norm behind attention (Gemma, GLM) or a gate (Mllama) is held as it was too. Layers that do not run without a
        picture add 0.
        Of several prompts all have an axis prompt, and `contribution` and `by_span` also mean, low and high:
        `contribution_mean` and so on, 95% intervals over clusters.

    Raises:
        ValueError: for another metric or word for `by`; spans that share a position or are called "elsewhere"; edits of
            z where heads are split; prompts whose image tokens do not lie alike, for by="token".
        TypeError: for what is no metric.

    Example:
        >>> found = mv.direct_logit_attribution(vlm, real, yes, by="token")
        >>> mv.plot.direct_logits(found)
        >>> mv.plot.over_image(found.by_token.sum(["layer", "head"]), real.images[0], real.pictures[0])

    Source:
        Elhage et al. (2021), "A Mathematical Framework for Transformer Circuits", on direct paths; Wang et al. (2023),
        "Interpretability in the Wild", section 3.1, with the final norm's scale held; by source position as there in
        appendix A. Sums over spellings are this package's.
    """
    asked = check_prompts(prompts, vlm.shape)
    metrics = _metrics(metric, len(asked))
    words = [words_of(vlm, one) for one in metrics]
    groups = clusters_of(asked, clusters)
    _checked(vlm, asked, by, spans)
    named = [_spans(vlm, spans, prompt) if by != "component" else {} for prompt in asked]
    works = [_taken(vlm, prompt, one, by) for prompt, one in zip(asked, words, strict=True)]
    taken = [*together(vlm, works)]
    found = joined(taken)
    if by != "component":
        found["by_span"] = by_span(taken, named)
    if by == "token":
        through = by_token(taken, asked[0])
        # Where only some layers look at the picture they are an axis of their own: others take nothing from it.
        found = found.merge(through.to_dataset(name="by_token"), join="left")
    for name, long in LONG.items():
        if name in found:
            found[name].attrs = {"long_name": long, "units": "logits"}
    if isinstance(prompts, Prompt):
        return found.isel(prompt=0).assign_attrs(_about(vlm, asked, metrics, by))
    found = found.assign_coords(prompt_coordinates(asked))
    over = [name for name in ("contribution", "by_span") if name in found]
    with_means = with_intervals(found[over], groups)
    return found.merge(with_means).assign_attrs(_about(vlm, asked, metrics, by), interval=with_means.attrs["interval"])


def words_of(vlm: VLM, metric: Asked) -> Words:
    """What is asked about, as tokens.

    Raises:
        ValueError, TypeError: for a metric that is no sum of words' logits.

    Example:
        >>> words_of(vlm, mv.logit_difference("yes", "no")).signs, words_of(vlm, 7).ids
        ((1.0, -1.0), ((7,),))
    """
    if isinstance(metric, WordMetric) and metric.name != "logit_difference":
        raise ValueError(
            f"{metric} is no sum of what parts add to logits; give mv.logit_difference(answer, other), or one word for "
            "its logit."
        )
    if isinstance(metric, WordMetric):
        known: Any = vlm.metric(metric)
        ids = known.ids
    elif isinstance(metric, str):
        ids = (tuple(vlm.token_ids(metric)),)
    elif isinstance(metric, int) and not isinstance(metric, bool):
        ids = ((metric,),)
    else:
        raise TypeError(
            f"{told(metric)} is no word whose logit can be taken apart; give mv.logit_difference(answer, other), a "
            "word or a token id."
        )
    for token in (token for word in ids for token in word):
        vlm.word(token)  # which refuses one that is not in the vocabulary
    return Words(ids, (1.0, -1.0)[: len(ids)])


def _metrics(metric: Any, count: int) -> list[Any]:
    """One for each prompt."""
    held = listed(metric)
    if held is None:
        return [metric] * count
    if len(held) != count:
        raise ValueError(
            f"{len(held)} words or differences were given for {count} prompts; give one for each, or one for all."
        )
    return list(held)


def _checked(vlm: VLM, prompts: Sequence[Prompt], by: str, spans: Spans) -> None:
    """Refuse what cannot be taken apart as asked."""
    if by not in BY:
        raise ValueError(f"by={told(by)} is not known; choose from {', '.join(map(repr, BY))}.")
    if spans is not None and by == "component":
        raise ValueError("spans say how heads are split, and by='component' splits none; write by='span' with them.")
    own = [edit.site for edit in vlm.edits if edit.site.tower == "text"]
    if any(site.kind == "logits" for site in own):
        raise ValueError("the model's edits change the logits themselves, which no part adds up to; leave those out.")
    late = next((site for site in own if site.kind in ("z", "cross_z")), None)
    if late is not None and by != "component":
        raise ValueError(
            f"the model's edits change {late}, so that what its heads take from positions does not sum to them; write "
            "by='component', or edit the pattern."
        )
    if by != "token":
        return
    if not all(prompt.image for prompt in prompts):
        raise ValueError(
            "a prompt holds no image, so nothing passes through one; make it with vlm.prompt(image, text)."
        )
    if any(laid_out(prompt) != laid_out(prompts[0]) for prompt in prompts):
        raise ValueError(
            "the prompts' image tokens do not lie alike, so that no position means the same in all; ask about them one "
            "by one, or write by='span'."
        )


def _spans(vlm: VLM, given: Spans, prompt: Prompt) -> dict[str, list[int]]:
    """The spans of one prompt, which share no position and hold each once."""
    held = {name: at for name, at in prompt.spans.items() if at}
    if given is not None:
        held = checked_mapping("spans", given, prompt)
        taken = next((name for name in (ELSEWHERE, KEYS) if name in held), None)
        if taken is not None:
            raise ValueError(f"spans hold {taken!r}, which stands for what no span holds; give that span another name.")
    everywhere = [position for at in held.values() for position in at]
    beyond = [position for position in everywhere if position >= len(prompt)]
    twice = [position for at, position in enumerate(everywhere) if position in everywhere[:at]]
    if beyond or twice:
        what = f"position {beyond[0]} of {len(prompt)}" if beyond else f"position {twice[0]} more than once"
        raise ValueError(f"spans hold {what}; give spans of positions of the prompt that share none.")
    rest = sorted(set(range(len(prompt))) - set(everywhere))
    return {**held, **({ELSEWHERE: rest} if rest else {}), **({KEYS: []} if vlm.shape.crosses else {})}


def _taken(vlm: VLM, prompt: Prompt, words: Words, by: str) -> Work[Taken]:
    """One prompt's logit, taken apart where the model runs."""
    read, layers = read_for(vlm, prompt, words, by != "component")
    reduce = partial(parts_of, vlm, writing(vlm), words, layers)
    (run,) = yield [{"prompt": prompt, "read": read, "value": partial(value_of, words), "reduce": reduce}]
    across = cross_layers(vlm) if prompt.images else []
    own: Any = run.metric
    said = {"several": len(words.tokens) > len(words.ids), "edited": bool(vlm.edits), "image": ends_in_image(prompt)}
    return taken_of(run.reduced, float(own[0]), across=across, **said)


def _about(vlm: VLM, prompts: Sequence[Prompt], metrics: Sequence[Any], by: str) -> dict[str, Any]:
    """The `attrs` of a result."""
    said = {"metric": "; ".join(dict.fromkeys(map(str, metrics))), "by": by, "value": VALUE}
    cap = vlm.shape.logit_cap
    capped = {} if cap is None else {"cap": f"logits x are made {cap:g} tanh(x / {cap:g}); parts are of x"}
    return {**record(vlm, prompts), **said, **capped}


VALUE = "added to the logit through the final norm, whose scale is that of the run, and the unembedding"
