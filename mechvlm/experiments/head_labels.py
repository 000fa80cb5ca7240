"""What is each head for? Attention to the object, to sinks, to the question, to the word before, and induction.

Rule this module guards: a label is given by a rule that stands in the result, and no score stands without what even
attention (or, for an object, as many random image tokens) would have.

>>> found = label_heads(vlm, [real, null])
>>> found.score.dims, found.label.dims
(('prompt', 'kind', 'layer', 'head'), ('layer', 'head'))
"""

from collections.abc import Hashable, Sequence

import numpy as np
import xarray as xr

from mechvlm.batch import check_prompts
from mechvlm.experiments.curves import check_seed
from mechvlm.experiments.examples import averaged, prompt_coordinates
from mechvlm.experiments.head_scores import scored
from mechvlm.experiments.knockout import clusters_of
from mechvlm.experiments.objects import Objects, objects_of
from mechvlm.experiments.record import record
from mechvlm.experiments.sight import cross_layers, named, own_layers
from mechvlm.experiments.sinks import sink_positions, sinks
from mechvlm.prompt import Prompt
from mechvlm.rounds import together
from mechvlm.sites import number, whole
from mechvlm.vlm import VLM

RULE = (
    "of the kinds whose mean score is at least {least:g} and, by more than rounding, above its baseline (the lower end "
    "of the 95% interval of the difference too, where there are two pictures or more), the one furthest above it"
)
ROUNDING = 1e-5
"""A difference of shares of attention that is none."""


def label_heads(
    vlm: VLM,
    prompts: Prompt | Sequence[Prompt],
    objects: Objects = None,
    least: float = 0.3,
    repeat: int = 20,
    sink_threshold: float = 20.0,
    seed: int = 0,
    clusters: Sequence[Hashable] | None = None,
) -> xr.Dataset:
    """Scores of what each head looks at, each with its baseline, and a label for heads by a stated rule.

    Args:
        prompts: one, or several, each with a picture.
        objects: the image tokens that show what is asked about: a function of a prompt; or for each prompt a list of
            positions, a box (left, top, right, bottom) in pixels of the original, or a mask. None: no such scores.
        least: what share of its attention a head has to pay for a label.
        repeat: how many random words are written twice, for induction.
        sink_threshold: as `threshold` of `sinks`; sinks are those by either of its rules, without the first position.
        seed: of the random words, which are other ones for each prompt.
        clusters: what prompts belong together, for the intervals; by default their pictures.

    Returns:
        Over prompt, kind, layer and head `score` and `baseline`, shares of attention, and `excess`, the difference;
        `mean`, `low` and `high` of the excess over prompts, with the 95% interval over clusters; `holds`, whether the
        rule of `attrs["rule"]` is met, and `label`, over layer and head, the kind that it chooses, or "none". Kinds:
        "image->last", what the last position pays to the image, and likewise "object", "question", "sinks" and "bos"
        (the first position where there is no bos token), each also "->question", the mean over the question's
        positions; "previous", what all positions but image tokens pay to the one before; "induction", what random words
        that are written again behind the prompt pay to the word that followed them the first time, and "induction in
        text" the same without prompt and picture. The baseline is what even attention gives over the keys that the
        layer lets the same queries see; for objects, what as many random image tokens get on average, which is the
        image's mass times their share of it, exactly. A kind that no prompt has is left out; one that a prompt lacks is
        not a number there, as are layers that attend to the picture's keys (Mllama), and text alone for models with a
        Q-Former. A label says where a head looks, and not what it does with it.

    Raises:
        ValueError: for prompts without an image, objects that are no image tokens, or settings that label nothing.
        TypeError: for objects that are none.

    Example:
        >>> found = mv.label_heads(vlm, [real, null], objects=[(0, 24, 24, 48)] * 2)
        >>> mv.plot.heatmap(found["mean"].sel(kind="object->last"))
        >>> found.label.values[0, :2].tolist()
        ['question->last', 'none']

    Source:
        Olsson et al. (2022), "In-context Learning and Induction Heads": previous-token and induction heads, by their
        attention on random words written twice. Rule, baselines and image kinds are this package's.
    """
    asked = check_prompts(prompts, vlm.shape)
    shown = objects_of(asked, objects)
    groups = clusters_of(asked, clusters)
    _check(asked, least, repeat)
    spans = [_spans(vlm, prompt, own, sink_threshold) for prompt, own in zip(asked, shown, strict=True)]
    drawn = np.random.default_rng(check_seed(seed))
    words = [_words(vlm, prompt, repeat, drawn) for prompt in asked]
    layers = own_layers(vlm)
    works = [scored(vlm, prompt, one, layers, own) for prompt, one, own in zip(asked, spans, words, strict=True)]
    found = _scores(vlm, [*together(vlm, works)], layers, asked, shown)
    over = xr.Dataset(averaged(found.excess, groups))
    above = over["low"].where(np.isfinite(over["low"]), over["mean"]) > ROUNDING
    found = found.merge(over).assign(holds=above & (found.score.mean("prompt") >= least))
    found["holds"].attrs = {"long_name": "the rule is met"}
    best = found["mean"].where(found.holds, -np.inf)
    kinds = np.where(found.holds.any("kind"), found["kind"].values[best.argmax("kind").values], "none")
    found["label"] = (("layer", "head"), kinds)
    across = cross_layers(vlm)
    note = {"note": f"{named(across)}: attention to the picture's keys alone, so no score"} if across else {}
    settings = {"rule": RULE.format(least=least), "repeat": repeat, "seed": seed, "sink_threshold": sink_threshold}
    return found.assign_attrs({**record(vlm, asked), "clusters": len(set(groups)), **settings, **note})


def _spans(vlm: VLM, prompt: Prompt, shown: Sequence[int], threshold: float) -> list[tuple[str, list[int]]]:
    """What is looked at in one prompt: named positions, of which there is at least one each."""
    first = prompt.bos or [0]
    far = [at for at in sink_positions(sinks(vlm, prompt, threshold=threshold), "either") if at not in first]
    held = {"image": prompt.image, "object": shown, "question": prompt.question, "sinks": far, "bos": first}
    return [(name, list(at)) for name, at in held.items() if at]


def _words(vlm: VLM, prompt: Prompt, count: int, drawn: np.random.Generator) -> list[int]:
    """Different random words; no special tokens, and none that stand for a picture."""
    tokenizer = None if vlm.processor is None else vlm.processor.tokenizer
    known = vlm.shape.vocabulary if tokenizer is None else min(vlm.shape.vocabulary, len(tokenizer))
    special = set() if tokenizer is None else {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    special |= {vlm.shape.image_token, *prompt.encoding["input_ids"][0, prompt.bos].tolist()}
    ordinary = [token for token in range(known) if token not in special]
    if len(ordinary) < count:
        raise ValueError(
            f"repeat={count} different words are wanted, and the model has {len(ordinary)} that are no special tokens; "
            "give fewer."
        )
    return drawn.choice(ordinary, count, replace=False).tolist()


def _scores(
    vlm: VLM,
    tables: Sequence[dict[str, np.ndarray]],
    layers: Sequence[int],
    prompts: Sequence[Prompt],
    shown: Sequence[Sequence[int]],
) -> xr.Dataset:
    """Scores and baselines of all prompts; what a prompt has not is not a number."""
    kinds = list(dict.fromkeys(kind for one in tables for kind in one))
    sizes = (len(tables), len(kinds), vlm.shape.layers["text"], vlm.shape.heads["text"])
    score, baseline = np.full(sizes, np.nan), np.full(sizes, np.nan)
    for row, (one, prompt, own) in enumerate(zip(tables, prompts, shown, strict=True)):
        for kind, values in one.items():
            at = kinds.index(kind)
            score[row, at, layers], baseline[row, at, layers] = values[:, :-1], values[:, -1:]
            if kind.startswith("object"):
                image = one[kind.replace("object", "image")][:, :-1]
                baseline[row, at, layers] = image * len(own) / len(prompt.image)
    axes = ("prompt", "kind", "layer", "head")
    about = {"long_name": "share of attention", "units": "fraction"}
    found = xr.Dataset(
        {"score": (axes, score, about), "baseline": (axes, baseline, about)},
        coords={"kind": kinds, "layer": range(sizes[2]), "head": range(sizes[3]), **prompt_coordinates(prompts)},
    )
    found["excess"] = (found.score - found.baseline).assign_attrs(
        long_name="attention above the baseline", units="fraction"
    )
    return found


def _check(prompts: Sequence[Prompt], least: float, repeat: int) -> None:
    """Refuse what can be given no label."""
    if any(not prompt.image for prompt in prompts):
        raise ValueError("a prompt holds no image to look at; make it with vlm.prompt(image, text).")
    if not 0 < number("least", least) <= 1:
        raise ValueError(f"least={least} is no share of attention; give one above 0, at most 1.")
    if whole("repeat", repeat) < 3:
        raise ValueError(f"repeat={repeat} words make no repetition to follow; give 3 or more.")
