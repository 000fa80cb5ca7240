"""How much bias? An evaluation at each of several amounts, each beside the threshold that says yes as often.

Rule this module guards: an amount is never compared with the unedited model alone. What a moved threshold does too is
no effect of looking.

>>> some = mv.evaluate.read_pope("demo", "adversarial")[:12]
>>> found = bias_doses(vlm, some, [0.0, 2.0], layers=[2, 3], masses=1, resamples=50)
>>> found.accuracy.values.tolist()
[1.0, 1.0]
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from torch import Tensor

from mechvlm.edits import Edit
from mechvlm.evaluate import pope, stats
from mechvlm.experiments.sight import own_layers
from mechvlm.experiments.sweep import numbers, runs_of
from mechvlm.experiments.uncertainty import mean_interval
from mechvlm.methods.asked import prompts_of
from mechvlm.methods.bias import Heads, viar_bias
from mechvlm.prompt import Prompt
from mechvlm.readings import mass
from mechvlm.sites import Site, listed, number, told, whole
from mechvlm.vlm import VLM

AMOUNTS = (0.0, 0.5, 1.0, 2.0, 3.0, 5.0)
ASKED = ("images", "split", "template")
EACH = ("correct", "p_yes", "margin")
ENDS = {"": "mean", "_low": "low", "_high": "high"}
OWN_ENDS = ("value", "low", "high")
SCORED = ("accuracy", "f1", "yes_ratio", "brier")
MEANING = {
    "accuracy": "accuracy",
    "f1": "F1 of yes",
    "yes_ratio": "share of answers that are yes",
    "brier": "Brier score",
    "gain": "accuracy above the unedited model",
    "matched": "accuracy of the moved threshold",
    "beyond": "accuracy above the moved threshold",
}


def bias_doses(
    vlm: VLM,
    questions: Any,
    amounts: Sequence[float] = AMOUNTS,
    layers: Sequence[int] | None = None,
    heads: Heads = None,
    when: str = "always",
    adaptive: str | None = None,
    profile: Any = None,
    convention: str | None = None,
    masses: int = 8,
    resamples: int = 2000,
    **asked: Any,
) -> xr.Dataset:
    """An evaluation at each of several amounts of VIAR's bias, with the attention that was really moved.

    Args:
        questions: as in `mv.evaluate.pope`. What is asked twice counts once.
        amounts: added to the scores of image tokens; 0 is the unedited model.
        layers, heads, when, adaptive, profile, convention: as in `viar_edits`.
            A head's amount is the amount times its factor, where `heads` has factors.
        masses: on how many pictures attention is measured, at the first question about each, in the pass over the
            prompt, which when="decode" leaves alone; 0: none.
        resamples: draws of pictures for the intervals.
        asked: `images`, `split`, `template`, `joined`, `tokens`, `parser`, `batch_size` and `out` of
            `mv.evaluate.pope`; `out` gets a folder for each amount.

    Returns:
        Over amount, each with `_low` and `_high`: `accuracy`, `f1`, `yes_ratio`, `brier`; `gain`, the accuracy above
        the unedited model's, by pairs; `matched`, the accuracy of the unedited model with its threshold moved to the
        same yes-ratio; `beyond`, the accuracy above `matched`: at 0 the bias does what another threshold does; neither
        is a number where a parser's answers are not the first token's. `mass`, what the rows behind the picture pay to
        the image tokens, as a mean over the biased layers and all heads, and `mass_by_layer`. Over amount and item:
        `correct`, `p_yes`, `margin`. `seconds`, how long each amount took.

    Raises:
        ValueError: without amounts, for one given twice, without layers or for one that is not there, or for a number
            of masses that cannot be measured, all before anything runs.
        TypeError: for amounts that are no numbers.

    Example:
        >>> some = mv.evaluate.read_pope("demo", "adversarial")[:12]
        >>> found = mv.methods.viar.bias_doses(vlm, some, [0, 2], layers=[2, 3], masses=1, resamples=50)
        >>> found.mass.values.round(1).tolist()
        [0.7, 0.9]

    Source:
        VIAR's sweep over 200 questions of POPE (`bias_sweep_pope.json`), which had no moved threshold beside it.
    """
    doses = _amounts(amounts)
    _check_masses(masses, when)
    bias = {"layers": layers, "heads": heads, "when": when, "adaptive": adaptive, "profile": profile}
    makers = [viar_bias(vlm, amount, **bias, convention=convention) for amount in doses]
    prompts = prompts_of(vlm, questions, max(masses, 1), **{name: asked[name] for name in ASKED if name in asked})
    biased = sorted({edit.site.layer for edits in makers for edit in edits(prompts[0])})
    moved = _masses(vlm, prompts, makers, biased) if masses else {}
    start = time.perf_counter()
    base, rows = pope(vlm, questions, **in_folder(asked, "unedited")), []
    seconds = [time.perf_counter() - start] * len(doses)
    for place, edits in enumerate(makers):
        start = time.perf_counter()
        own = in_folder(asked, f"amount {doses[place]:g}")
        rows.append(pope(vlm, questions, edits=edits, **own) if doses[place] else base)
        if doses[place]:
            seconds[place] = time.perf_counter() - start
    columns = [against(base, row, resamples) for row in rows]
    result = table_of(columns, "amount") | moved
    result |= {name: (["amount", "item"], np.stack([row[name].values for row in rows])) for name in EACH}
    along = {"amount": ("amount", doses, {"long_name": "bias on the image tokens’ scores"})}
    own = {"layer": own_layers(vlm)} if masses else {}
    attrs = {**base.attrs, **told_of(resamples, convention), "when": when}
    attrs["edits"] = "; ".join(edits.__name__ for edits in makers)
    result["seconds"] = ("amount", seconds, {"long_name": "time", "units": "s"})
    return xr.Dataset(result, {**along, **own, **{name: base[name] for name in base.coords}}, attrs)


def _amounts(amounts: Any) -> list[float]:
    given = listed(amounts)
    if given is None:
        raise TypeError(f"amounts={told(amounts)} is not a list of amounts; write for instance [0, 1, 2].")
    if not given:
        raise ValueError("amounts is empty; give at least one, for instance [0, 1, 2].")
    found = [number("amount", amount) for amount in given]
    twice = [amount for at, amount in enumerate(found) if amount in found[:at]]
    if twice:
        raise ValueError(f"amounts holds {twice[0]:g} more than once; give each once.")
    return found


def _check_masses(masses: Any, when: str) -> None:
    if whole("masses", masses) < 0:
        raise ValueError(f"masses={masses} is no number of pictures; give 0 or more.")
    if masses and when == "decode":
        raise ValueError(
            f"masses={masses} measures the pass over the prompt, which when='decode' leaves alone; give masses=0."
        )


def in_folder(asked: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What is asked of `pope`, its answers kept in a folder of their own, where they are kept.

    Example:
        >>> in_folder({"out": "kept"}, "amount 2")["out"].as_posix()
        'kept/amount 2'
    """
    return {**asked, "out": Path(asked["out"]) / name} if asked.get("out") is not None else dict(asked)


def against(base: xr.Dataset, found: xr.Dataset, resamples: int) -> dict[str, tuple[float, float, float]]:
    """What a bias does, each with its interval: by itself, above the unedited model, and above a moved threshold."""
    both = stats.compare(base, found, resamples=resamples)
    edited = both.sel(model="edited")
    accuracy = both.sel(metric="accuracy")
    cells = {name: [edited[end].sel(metric=name) for end in OWN_ENDS] for name in SCORED}
    cells["gain"] = [accuracy[f"difference{end}"] for end in ENDS]
    cells["matched"] = [accuracy[end].sel(model="threshold") for end in OWN_ENDS]
    cells["beyond"] = [accuracy[f"advantage{end}"] for end in ENDS]
    return {name: (float(value), float(low), float(high)) for name, (value, low, high) in cells.items()}


def table_of(columns: Sequence[Mapping[str, tuple[float, float, float]]], dim: str) -> dict[str, Any]:
    """Columns side by side, each measure with its ends."""
    found: dict[str, Any] = {}
    for name, meaning in MEANING.items():
        for place, end in enumerate(("", "_low", "_high")):
            values = [column[name][place] for column in columns]
            found[f"{name}{end}"] = (dim, values, {"long_name": meaning})
    return found


def _masses(
    vlm: VLM, prompts: Sequence[Prompt], makers: Sequence[Callable[[Prompt], list[Edit]]], biased: Sequence[int]
) -> dict[str, Any]:
    """What the rows behind the picture pay to it at each amount, by layer and over the biased ones."""
    own, each = own_layers(vlm), []
    for prompt in prompts:
        reading = mass({"image": prompt.image}, queries=prompt.question + prompt.last)
        read = {Site("pattern", layer): reading for layer in own}
        runs = runs_of(vlm, prompt, [edits(prompt) for edits in makers], read)
        each.append(np.concatenate([np.stack([_mean(run[site]) for site in read], -1) for run in runs]))
    about = {"long_name": "attention mass", "units": "fraction"}
    paid = xr.DataArray(np.stack(each), dims=["prompt", "amount", "layer"], coords={"layer": own})
    over = mean_interval(paid.sel(layer=list(biased)).mean("layer"), "prompt")
    found: dict[str, Any] = {f"mass{end}": ("amount", over[name].values, about) for end, name in ENDS.items()}
    return {**found, "mass_by_layer": (["amount", "layer"], paid.mean("prompt").values, about)}


def _mean(paid: Tensor) -> np.ndarray:
    """A reading of mass averaged over heads and queries."""
    return numbers(paid.float().mean((1, 2, 3)))


def told_of(resamples: int, convention: str | None) -> dict[str, Any]:
    """What a result says about how it was made."""
    return {
        "interval": "percentile bootstrap over images",
        "resamples": resamples,
        "convention": convention or "corrected",
        "beyond": "accuracy above that of the unedited model with its threshold moved to the same yes-ratio",
        "p": "(1 + k) / (1 + n), of n distinct control sets, k of which do as well",
        "mass": "rows behind the picture, averaged over heads, biased layers and pictures",
    }
