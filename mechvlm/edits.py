"""Edits: a site, and a function from the tensor that lives there to the tensor that should.

Composition is a list: edits of one site act in the order of the list, and sites may be listed in any order. An edit's
function sees the prompt's own positions, whatever else is in the batch: no padding, and not the rows of other prompts.

>>> vlm.run(real, edits=[Edit(Site("pattern", 3), lambda pattern: pattern * 0.5)])  # batch head query key
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechvlm.attention import Bias
from mechvlm.sites import Site, as_site, number, places, told, whole_numbers

WHENS = ("always", "prompt", "decode")
WAYS = ("mask", "feature", "recompute")


@dataclass(frozen=True)
class Edit:
    """What to do to an activation.

    Args:
        site: where, a `Site` or its name.
        fn: from tensor to tensor of the same shape and dtype; axes as in `Site.axes`. It may work in place.
        when: "prompt" acts in the pass over the prompt, "decode" in each step of `generate` after it, "always" in both.
            During a decode step there is one query, the newest position, while keys are all positions so far.
        on: "value" edits the activation; "grad" edits the gradient that flows back through it (`run(..., grad_of=)`).
        label: how records name this edit; by default the function's name.
        positions, heads: what the function indexes, so that a run can refuse what is out of range.
        length: how many positions the function was made for, so that a run can refuse a prompt with others.
        bias: set by `bias_attention` and `cut_attention`, whose edits need not recompute the pattern.
        way: for those, how: an additive "mask" handed to the kernel, one more "feature" on queries and keys whose
            product is the bias, or "recompute" the layer's attention. All agree.

    Raises:
        ValueError, TypeError: for a word, site or function that cannot be.

    Example:
        >>> Edit(Site("mlp_out", 3), lambda x: 0 * x, label="no mlp").label
        'no mlp'
    """

    site: Any  # a Site once made; names are taken too, which no annotation of a converted field can say
    fn: Any
    when: str = "always"
    on: str = "value"
    label: str = ""
    positions: tuple[int, ...] = ()
    heads: tuple[int, ...] = ()
    length: int | None = None
    bias: Bias | None = None
    way: str = "mask"

    def __post_init__(self) -> None:
        object.__setattr__(self, "site", as_site(self.site))
        if not callable(self.fn):
            raise TypeError(
                f"the edit of {self.site} holds {told(self.fn)}, which is not a function from tensor to tensor."
            )
        _one_of("when", self.when, WHENS)
        _one_of("on", self.on, ("value", "grad"))
        _one_of("way", self.way, WAYS)
        for what, values in (("positions", self.positions), ("heads", self.heads)):
            object.__setattr__(self, what, whole_numbers(what, values))
        if self.on == "grad" and self.when == "decode":
            raise ValueError("gradients exist in the pass over the prompt only; leave when='decode' out.")

    def __str__(self) -> str:
        name = self.label or name_of(self.fn)
        return f"{name} at {self.site}" + ("" if self.when == "always" else f" ({self.when} only)")


def name_of(fn: Callable) -> str:
    """A function's name, or that of its type for a callable object."""
    return fn.__name__ if isinstance(fn, type(name_of)) else type(fn).__name__


def _one_of(what: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{what}={value!r} is not known; choose from {', '.join(map(repr, choices))}.")


def _tensor(what: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{what} is {told(value)}, and it must be a tensor; torch.as_tensor makes one.")
    return value


def scale_heads(layer: int, heads: Sequence[int], factor: float, tower: str = "text", cross: bool = False) -> Edit:
    """Multiply what some heads of a layer add to the residual stream (their `z`) by a factor.

    Example:
        >>> vlm.run(real, edits=[mv.scale_heads(3, [0, 5], 2.0)])
    """
    chosen, factor = places("heads", heads), number("factor", factor)

    def scale(z: Tensor) -> Tensor:  # batch pos head d_head
        z[:, :, list(chosen)] *= factor
        return z

    return Edit(
        Site("cross_z" if cross else "z", layer, tower),
        scale,
        label=f"scale heads {list(chosen)} by {factor:g}",
        heads=chosen,
    )


def ablate_heads(
    layer: int, heads: Sequence[int], to: Float[Tensor, "..."] | None = None, tower: str = "text", cross: bool = False
) -> Edit:
    """Take some heads of a layer out of the run: their `z` becomes zero, or what `to` says.

    Args:
        to: None for zero-ablation; a mean over a dataset, `head d_head` or `pos head d_head`, for mean-ablation;
            another run's `run[Site("z", layer)]`, `batch pos head d_head`, for resample-ablation (positions must
            match, so it acts in the pass over the prompt only).

    Example:
        >>> vlm.run(real, edits=[mv.ablate_heads(3, [5], to=vlm.run(other, read=["text.3.z"])["text.3.z"])])
    """
    chosen = places("heads", heads)
    if to is not None and _tensor("to", to).ndim not in (2, 3, 4):
        raise ValueError(
            f"to has {to.ndim} axes; it must be 'head d_head' (a mean), 'pos head d_head' or 'batch pos head d_head'."
        )

    def ablate(z: Tensor) -> Tensor:  # batch pos head d_head
        if to is None:
            z[:, :, list(chosen)] = 0
            return z
        if to.shape[-2:] != z.shape[-2:] or (to.ndim == 4 and to.shape[0] not in (1, z.shape[0])):
            raise ValueError(f"to holds {tuple(to.shape)} for {tuple(z.shape)}; they must be alike.")
        z[:, :, list(chosen)] = to.to(z).expand(z.shape)[:, :, list(chosen)]
        return z

    length = to.shape[-3] if to is not None and to.ndim > 2 else None
    when = "always" if length is None else "prompt"
    label = f"ablate heads {list(chosen)}{'' if to is None else ' to given values'}"
    site = Site("cross_z" if cross else "z", layer, tower)
    return Edit(site, ablate, when, label=label, heads=chosen, length=length)


def bias_attention(
    layer: int,
    keys: Sequence[int],
    amount: float,
    queries: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    tower: str = "text",
    way: str = "mask",
    cross: bool = False,
) -> Edit:
    """Add a number to the attention scores of some keys: their odds are multiplied by e to that number.

    Args:
        keys: the positions looked at, for instance `prompt.image`.
        amount: added before the softmax, in every pass; minus infinity cuts.
        queries: the positions that look; None means all, generated ones included.
        heads: None means all.
        way: see `Edit`.
        cross: bias attention to the image's features (Mllama, Q-Formers). Keys are then the `positions` of a map in
            `prompt.images`, and its `separators`, since class tokens have seen the picture as well.

    Example:
        >>> vlm.generate(real, edits=[mv.bias_attention(layer, real.image, 2.0) for layer in range(2, 6)])

    Source:
        The intervention of VIAR adds a constant to the scores of image keys in a band of layers.
    """
    amount = number("amount", amount)
    if amount != amount or amount == float("inf"):
        raise ValueError(f"amount={amount} cannot be added to a score; give a number, or -inf to cut.")
    bias = Bias(
        places("keys", keys),
        amount,
        None if queries is None else places("queries", queries, all_by_none=True),
        None if heads is None else places("heads", heads, all_by_none=True),
        cross,
    )
    if way == "feature" and amount == float("-inf"):
        raise ValueError("way='feature' multiplies numbers, and minus infinity times zero is none; use way='mask'.")
    name = f"{'cut' if amount == float('-inf') else f'bias {amount:+g}'} attention to {len(bias.keys)} keys"
    if queries is not None:
        name += f" from {len(bias.queries or ())} queries"
    if heads is not None:
        name += f" in heads {list(bias.heads or ())}"
    site = Site("cross_scores" if cross else "scores", layer, tower)
    when = "prompt" if cross and bias.queries else "always"  # there a step's query has no position among the keys
    return Edit(site, bias, when, "value", name, bias.queries or (), bias.heads or (), bias=bias, way=way)


def cut_attention(
    layer: int,
    keys: Sequence[int],
    queries: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    tower: str = "text",
    cross: bool = False,
) -> Edit:
    """Knock out attention from some queries to some keys: exactly zero, the rest renormalised by the softmax.

    A query that is cut from every key it sees receives nothing (`z` is zero there).

    Example:
        >>> vlm.run(real, edits=[mv.cut_attention(layer, real.image, queries=real.last) for layer in range(4, 8)])

    Source:
        Geva et al. (2023), "Dissecting Recall of Factual Associations", section 5.
    """
    return bias_attention(layer, keys, float("-inf"), queries, heads, tower, cross=cross)


def patch(site: Site | str, source: Float[Tensor, "..."], positions: Sequence[int] | None = None) -> Edit:
    """Overwrite an activation, or some positions of it, with another run's.

    Args:
        source: the whole tensor another run had at this site, `other_run[site]`; batch of 1 serves every row.
        positions: which positions to take; None means all. For `scores` and `pattern` they are queries.

    Positions must mean the same in both runs (`prompt.with_image` and `prompt.with_text` keep them where they can), so
    the patch acts in the pass over the prompt.

    Example:
        >>> site = mv.Site("resid_post", 3)
        >>> vlm.run(null, edits=[mv.patch(site, vlm.run(real, read=[site])[site], positions=null.image)])
    """
    where = as_site(site)
    chosen = None if positions is None else places("positions", positions, all_by_none=True)
    axis = 2 if where.kind in ("scores", "pattern") else 1
    if _tensor("source", source).ndim != len(where.axes):
        raise ValueError(f"the patch of {where} has {source.ndim} axes; it must have {' '.join(where.axes)}.")
    length = source.shape[axis]

    def overwrite(x: Tensor) -> Tensor:  # axes as in Site.axes
        given = source.to(x)
        now = x.narrow(axis, 0, length)
        if given.shape[1:] != now.shape[1:] or given.shape[0] not in (1, x.shape[0]):
            raise ValueError(
                f"the patch of {where} holds {tuple(given.shape)} for {tuple(x.shape)}; they must be alike."
            )
        index = torch.arange(length) if chosen is None else torch.tensor(chosen)
        index = index.to(x.device)
        return x.index_copy(axis, index, given.expand(now.shape).index_select(axis, index))

    name = "patch" if chosen is None else f"patch {len(chosen)} positions"
    # Keys and values are read from the cache in every later step, so their patch has to be repeated there.
    when = "always" if where.kind in ("k", "v") else "prompt"
    return Edit(where, overwrite, when, label=name, positions=chosen or (), length=length)


def steer(
    site: Site | str,
    direction: Float[Tensor, " d_model"],
    amount: float = 1.0,
    positions: Sequence[int] | None = None,
) -> Edit:
    """Add a direction to an activation, at some positions or at all of them.

    Args:
        direction: one vector, as long as the site's last axis.
        positions: None means all, generated ones included; given positions are the prompt's.

    Example:
        >>> vlm.generate(real, edits=[mv.steer("text.4.resid_post", direction, amount=3.0)])
    """
    where = as_site(site)
    chosen = None if positions is None else places("positions", positions, all_by_none=True)
    if where.kind in ("scores", "pattern", "logits", "q", "k", "v", "z"):
        raise ValueError(f"a direction is added to the residual stream or to what is added to it, not to {where}.")
    if _tensor("direction", direction).ndim != 1:
        raise ValueError(f"a direction is one vector, d_model, and this one's shape is {tuple(direction.shape)}.")
    amount = number("amount", amount)

    def add(x: Tensor) -> Tensor:  # batch pos d_model
        if direction.shape[-1] != x.shape[-1]:
            raise ValueError(f"the direction has {direction.shape[-1]} numbers and {where} has {x.shape[-1]}.")
        step = amount * direction.to(x)
        if chosen is None:
            return x + step
        x[:, list(chosen)] += step
        return x

    when = "always" if chosen is None else "prompt"
    return Edit(where, add, when, label=f"steer by {amount:g}", positions=chosen or ())


def replace_span(site: Site | str, positions: Sequence[int], value: Float[Tensor, "..."]) -> Edit:
    """Put one vector, or one per position, in the place of a span: zeros, a dataset's mean, another prompt's.

    Args:
        value: `d_model`, the same at every position, or `pos d_model`, one for each of `positions`.

    Example:
        >>> site = mv.Site("resid_pre", 0)
        >>> vlm.run(real, edits=[mv.replace_span(site, real.image, image_mean)])
    """
    where, chosen = as_site(site), places("positions", positions)
    if where.kind in ("scores", "pattern"):
        raise ValueError(f"{where} has no vector at a position; use mv.patch, mv.cut_attention or mv.Edit there.")
    _tensor("value", value)

    def put(x: Tensor) -> Tensor:  # batch pos ...
        if value.shape not in (x.shape[2:], (len(chosen), *x.shape[2:])):
            raise ValueError(
                f"the value for {len(chosen)} positions of {where} is {tuple(value.shape)}; it must be "
                f"{tuple(x.shape[2:])}, or that once for each position."
            )
        x[:, list(chosen)] = value.to(x)
        return x

    # As in `patch`: keys and values are read from the cache in every later step.
    when = "always" if where.kind in ("k", "v") else "prompt"
    return Edit(where, put, when, label=f"replace {len(chosen)} positions", positions=chosen)
