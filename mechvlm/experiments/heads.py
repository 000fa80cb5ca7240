"""Which few heads do it together? A greedy search: round by round the head that moves a metric the most.

>>> found = find_heads(vlm, real, yes, count=2, candidates=[(0, 7), (1, 3), (3, 7)])
>>> heads_found(found)
[(0, 7), (3, 7)]
"""

from collections.abc import Callable, Sequence
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from mechvlm.batch import check_prompts
from mechvlm.edits import Edit, ablate_heads
from mechvlm.experiments.ablations import Part, all_parts, parts_of
from mechvlm.experiments.examples import (
    Points,
    about,
    checked_objective,
    clean_values,
    labelled,
    metric_of_each,
    swept,
    unit_of,
)
from mechvlm.experiments.order import name, said
from mechvlm.experiments.sight import cross_layers
from mechvlm.metrics import Metric
from mechvlm.prompt import Prompt
from mechvlm.sites import Site, number, places, whole
from mechvlm.vlm import VLM

Perturb = Callable[..., Edit]
"""From a layer and heads of it, and `prompt=` where it takes one, to the edit that perturbs them."""


def soft_identity(
    layer: int, heads: Sequence[int], amount: float = 1.0, queries: Sequence[int] | None = None, tower: str = "text"
) -> Edit:
    """Move some heads' attention towards each position looking at itself alone: A becomes (1 - u) A + u I.

    Rows sum to one as before. With `queries` their rows alone are made; without, the layer's whole map is.

    Args:
        amount: u, from 0 (nothing) to 1 (every query sees itself alone).
        queries: the positions that look; None means all, generated ones included.

    Raises:
        ValueError: for an amount outside 0 to 1.

    Example:
        >>> softer = lambda layer, heads, prompt: mv.soft_identity(layer, heads, 0.5, queries=prompt.last)
        >>> found = mv.find_heads(vlm, real, yes, count=1, candidates=[(0, 7), (1, 3)], perturb=softer)

    Source:
        Ahn et al. (2024), "Self-Rectifying Diffusion Sampling with Perturbed-Attention Guidance" (u = 1, in a diffusion
        model's image tokens); "Fine-Grained Perturbation Guidance via Attention Head Selection" (2025), SoftPAG.
    """
    chosen, share = list(places("heads", heads)), number("amount", amount)
    if not 0 <= share <= 1:
        raise ValueError(f"amount={share:g} is no share of attention; give a number from 0 to 1.")
    own = None if queries is None else sorted(set(places("queries", queries, all_by_none=True)))

    def towards_itself(pattern: Tensor) -> Tensor:  # batch head query key
        count, keys = pattern.shape[-2:]
        here = torch.tensor(own if own is not None else range(keys - count, keys), device=pattern.device)
        itself = torch.nn.functional.one_hot(here, keys).to(pattern)
        pattern[:, chosen] = (1 - share) * pattern[:, chosen] + share * itself
        return pattern

    when, rows = ("always", None) if own is None else ("prompt", tuple(own))
    label = f"heads {chosen} look at themselves by {share:g}"
    return Edit(Site("pattern", layer, tower), towards_itself, when, label=label, heads=tuple(chosen), rows=rows)


def find_heads(
    vlm: VLM,
    prompts: Prompt | Sequence[Prompt],
    metric: Metric | Sequence[Metric],
    count: int,
    candidates: Sequence[Any] | None = None,
    perturb: Perturb | None = None,
    objective: str = "lower",
    held_out: Sequence[Prompt] = (),
    held_out_metric: Metric | Sequence[Metric] | None = None,
    batch_size: int | None = None,
    out: str | Path | None = None,
) -> xr.Dataset:
    """Heads that together move a metric the most, found one by one, each given those before it.

    In every round all candidates are tried, together with the heads already taken, and the one is taken whose mean of
    the metric over prompts is lowest (or highest); of equal ones the first in the model.

    Args:
        metric: one for all prompts, or a list with one for each.
        count: how many heads are taken.
        candidates: pairs of layer and head; by default every head of the language model.
        perturb: what is done to heads of one layer, `(layer, heads) -> Edit`, or `(layer, heads, prompt) -> Edit` for
            what depends on each prompt's positions; by default `ablate_heads`, to zero.
            `soft_identity` turns their attention towards themselves.
        objective: whether the metric is to become "lower" or "higher".
        held_out: prompts that take no part in the search, on which what was found is measured. A search finds the best
            by chance as well, and only these tell.
        held_out_metric: theirs; by default `metric`, which is then one for all.
        batch_size, out: see `sweep`; of each round and prompt.

    Returns:
        Over axis round, where round 0 is the model as it is: `layer` and `head`, the head taken in each (-1 in round
        0); `metric`, over prompt and round, with all heads taken so far perturbed; `score`, over round and candidate,
        the mean over prompts with the candidate perturbed too, not a number in round 0 and once it is taken.
        `held_out`, over held_out_prompt and round, where such prompts are given. In the metric's unit.

    Raises:
        ValueError, TypeError: for a count, candidates or an objective that cannot be.

    Example:
        >>> mv.plot.head_search(mv.find_heads(vlm, real, yes, count=2, candidates=[(0, 7), (1, 3), (3, 7)]))

    Source:
        "Fine-Grained Perturbation Guidance via Attention Head Selection" (2025), HeadHunter: the greedy rounds; there a
        generator's heads against a score of its pictures, here a language model's against any metric.
    """
    asked = check_prompts(prompts, vlm.shape)
    metrics = metric_of_each(metric, asked)
    pool = all_parts(vlm, "head") if candidates is None else parts_of("head", candidates)
    if not 1 <= whole("count", count) <= len(pool):
        raise ValueError(f"count={count} heads cannot be found among {len(pool)}; give a number from 1 to that.")
    lowest = checked_objective(objective) == "lower"
    done = _default(vlm) if perturb is None else perturb
    clean = clean_values(vlm, asked, metrics)
    taken: list[Part] = []
    reached, scores = [clean.values], [np.full(len(pool), np.nan)]
    for round_ in range(1, count + 1):
        left = [part for part in pool if part not in taken]
        kept = None if out is None else Path(out) / f"round-{round_}"
        tried = swept(vlm, asked, _together(done, taken, left), metrics, batch_size, kept, candidate=range(len(left)))
        means = tried.mean("prompt").values
        best = int(means.argmin() if lowest else means.argmax())
        scores.append(np.array([means[left.index(part)] if part in left else np.nan for part in pool]))
        reached.append(tried.values[:, best])
        taken.append(left[best])
    rounds = np.arange(count + 1)
    by_prompt = clean.expand_dims(round=rounds).transpose("prompt", "round").copy(data=np.stack(reached, -1))
    score = xr.DataArray(np.stack(scores), dims=["round", "candidate"], coords={"round": rounds, **_names(pool)})
    values = {"metric": by_prompt, "score": score}
    if len(held_out):
        kept = None if out is None else Path(out) / "held-out"
        values["held_out"] = _held_out(vlm, held_out, held_out_metric or metric, done, taken, batch_size, kept)
    how = {"perturbed": _told(perturb), "heads": said(taken), "engine": tried.attrs["engine"]}
    attrs = about(vlm, asked, metrics, None, objective=objective, **how)
    return xr.Dataset({**labelled(values, attrs["metric"], unit_of(metrics)), **_taken(taken)}, attrs=attrs)


def heads_found(found: xr.Dataset) -> list[Part]:
    """The heads that `find_heads` took, the first first.

    Example:
        >>> heads_found(find_heads(vlm, real, yes, count=1, candidates=[(0, 7), (1, 3)]))
        [(0, 7)]
    """
    taken = found.isel(round=slice(1, None))
    return [(int(layer), int(head)) for layer, head in zip(taken["layer"].values, taken["head"].values, strict=True)]


def perturbed(perturb: Perturb, heads: Sequence[Part]) -> list[Edit]:
    """The edits that perturb heads of several layers, one for each layer.

    Example:
        >>> [edit.label for edit in perturbed(mv.ablate_heads, [(3, 1), (2, 0), (3, 4)])]
        ['ablate heads [1, 4]', 'ablate heads [0]']
    """
    by_layer: dict[int, list[int]] = {}
    for layer, head in heads:
        by_layer.setdefault(layer, []).append(head)
    return [perturb(layer, own) for layer, own in by_layer.items()]


def _of(perturb: Perturb, prompt: Prompt) -> Perturb:
    """A perturbation that knows the prompt, where it asks for it."""
    return partial(perturb, prompt=prompt) if "prompt" in signature(perturb).parameters else perturb


def _together(perturb: Perturb, taken: Sequence[Part], left: Sequence[Part]) -> Callable[[Prompt], Points]:
    before = list(taken)

    def with_prompt(prompt: Prompt) -> Points:
        return lambda candidate: perturbed(_of(perturb, prompt), [*before, left[candidate]])

    return with_prompt


def _held_out(
    vlm: VLM,
    prompts: Sequence[Prompt],
    metric: Metric | Sequence[Metric],
    perturb: Perturb,
    taken: Sequence[Part],
    batch_size: int | None,
    out: Path | None,
) -> xr.DataArray:
    """The metric of other prompts after each round."""
    asked = check_prompts(prompts, vlm.shape)

    def first(prompt: Prompt) -> Points:
        return lambda round: perturbed(_of(perturb, prompt), taken[:round])  # the axis is named so

    metrics = metric_of_each(metric, asked)
    found = swept(vlm, asked, first, metrics, batch_size, out, round=range(len(taken) + 1))
    return found.drop_vars("question").rename(prompt="held_out_prompt")


def _taken(heads: Sequence[Part]) -> dict[str, Any]:
    """Layer and head taken in each round; -1 in round 0."""
    rounds = [(-1, -1), *heads]
    return {key: ("round", np.array([part[at] for part in rounds])) for at, key in enumerate(("layer", "head"))}


def _default(vlm: VLM) -> Perturb:
    across = cross_layers(vlm)
    return lambda layer, heads: ablate_heads(layer, heads, cross=layer in across)


def _told(perturb: Perturb | None) -> str:
    return "ablated to zero" if perturb is None else "by a function given"


def _names(pool: Sequence[Part]) -> dict[str, Any]:
    layers, heads = (np.array(column) for column in zip(*pool, strict=True))
    named = np.array([name(part) for part in pool])
    return {"candidate": named, "candidate_layer": ("candidate", layers), "candidate_head": ("candidate", heads)}
