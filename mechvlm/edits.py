"""Edits: a site, and a function from the tensor that lives there to the tensor that should.

Composition is a list: edits of one site act in the order of the list, and sites may be listed in any order. An edit's
function sees the prompt's own positions, whatever else is in the batch: no padding, and not the rows of other prompts.

>>> vlm.run(real, edits=[Edit(Site("pattern", 3), lambda pattern: pattern * 0.5)])  # batch head query key
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechvlm.biases import Change, last_of
from mechvlm.sites import CROSS_KINDS, PATTERN_KINDS, Site, as_site, number, places, told, whole_numbers

WHENS = ("always", "prompt", "decode")
WAYS = ("auto", "mask", "feature", "recompute")


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
        rows: for edits of scores and pattern, which queries' rows the function is given. None: all of them, which makes
            the layer's whole map. "each": it treats every query by itself, and may be given some rows at a time, more
            than once, so that memory stays within the budget; it cannot tell which, and must give the same for the
            same. Positions: those rows alone, each
            once and in the order of the text, `batch head rows key`.
        bias: set by `bias_attention`, `cut_attention`, `scale_attention`, whose edits need not recompute the pattern.
        way: for those, how: an additive "mask" handed to the kernel, more "feature"s on queries and keys whose
            products are the change, or "recompute" the layer's attention. All agree; "auto" takes the cheapest.

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
    positions: Sequence[int] = ()
    heads: Sequence[int] = ()
    length: int | None = None
    bias: Change | None = None
    way: str = "auto"
    rows: Any = None

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
        self._check_rows()
        if self.on == "grad" and self.when == "decode":
            raise ValueError("gradients exist in the pass over the prompt only; leave when='decode' out.")

    def _check_rows(self) -> None:
        if self.rows is None:
            return
        if self.site.kind not in PATTERN_KINDS:
            raise ValueError(f"rows={told(self.rows)} are queries' rows of scores or pattern; {self.site} has none.")
        if self.rows != "each":
            object.__setattr__(self, "rows", whole_numbers("rows", self.rows))
            object.__setattr__(self, "positions", self.rows)
        if not self.rows:
            raise ValueError("rows is empty, so nothing would be edited; give at least one, 'each', or None for all.")

    def on_some(
        self, x: Float[Tensor, "..."], positions: Int[Tensor, " query"] | None = None, count: int = 0
    ) -> Float[Tensor, "..."]:
        """The function's result; where it is for some queries' rows, on those that are there.

        Args:
            positions, count: of the queries that are there, of so many in all; by default the last ones of the keys.
        """
        if not isinstance(self.rows, tuple):
            return self.fn(x)
        if positions is None:
            positions, count = last_of(x, self.site.kind in CROSS_KINDS)
        wanted = {row % count for row in self.rows}
        here = [at for at, position in enumerate(positions.tolist()) if position in wanted]
        if not here:
            return x
        index = torch.tensor(here, device=x.device)
        given = x.index_select(2, index)
        new = self.fn(given.clone())
        if not isinstance(new, Tensor) or new.shape != given.shape:
            return new  # which is refused by its shape
        return x.index_copy(2, index, new)

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
    if _tensor("source", source).ndim != len(where.axes) and "..." not in where.axes:
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
    if where.kind in ("scores", "pattern", "logits", "q", "k", "v", "z", "pixels"):
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
