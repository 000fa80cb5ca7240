"""What is taken of one run and put into another: patches of positions, of heads, of rows of attention, of features.

Rule this module guards: a patch says which positions and heads it changes and changes no others, so that whatever an
engine may leave out of a run follows from what the patch says of itself.

>>> rows = vlm.run(real, read={"text.3.pattern": mv.rows(real.last)})["text.3.pattern"]
>>> vlm.run(null, edits=[rows_patch("text.3.pattern", rows, real.last, heads=[5])])
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechvlm.biases import last_of
from mechvlm.edits import Edit, patch
from mechvlm.readings import rows
from mechvlm.run import Run
from mechvlm.sites import CROSS_KINDS, PATTERN_KINDS, Site, as_site, places


@dataclass(frozen=True)
class RowsPatch(Edit):
    """A patch of some queries' rows of scores or pattern, which is told which of them it is given.

    Attributes:
        source: the rows that another run had, in the order of `rows`.
    """

    source: Any = None

    def on_some(
        self, x: Float[Tensor, "..."], positions: Int[Tensor, " query"] | None = None, count: int = 0
    ) -> Float[Tensor, "..."]:
        """The rows that are there, with those of the patch overwritten; see `Edit.on_some`."""
        if positions is None:
            positions, count = last_of(x, self.site.kind in CROSS_KINDS)
        place = {row % count: at for at, row in enumerate(self.rows)}
        pairs = [(at, place[position]) for at, position in enumerate(positions.tolist()) if position in place]
        if not pairs:
            return x
        here, there = (torch.tensor(index, device=x.device) for index in zip(*pairs, strict=True))
        heads = torch.tensor(self.heads or range(x.shape[1]), device=x.device)[:, None]
        new = x.clone()
        new[:, heads, here] = self.source.to(x)[:, heads, there]
        return new


def rows_patch(
    site: Site | str,
    source: Float[Tensor, "batch head rows key"],
    queries: Sequence[int],
    heads: Sequence[int] | None = None,
) -> Edit:
    """Overwrite some queries' rows of scores or pattern by another run's; the other rows are not made.

    Args:
        source: what the other run's `mv.rows(queries)` read.
        heads: None means all.

    Example:
        >>> read = {"text.3.pattern": mv.rows(real.last)}
        >>> vlm.run(null, edits=[rows_patch("text.3.pattern", vlm.run(real, read)["text.3.pattern"], real.last)])
    """
    chosen, some = places("queries", queries), () if heads is None else places("heads", heads)

    def all_rows(x: Tensor) -> Tensor:  # batch head rows key
        x[:, list(some or range(x.shape[1]))] = source.to(x)[:, list(some or range(x.shape[1]))]
        return x

    label = f"patch {len(chosen)} rows" + (f" of heads {list(some)}" if some else "")
    return RowsPatch(as_site(site), all_rows, "prompt", label=label, heads=some, rows=chosen, source=source)


def heads_patch(
    site: Site | str,
    source: Float[Tensor, "batch pos head d_head"],
    heads: Sequence[int],
    positions: Sequence[int] | None = None,
) -> Edit:
    """Overwrite some heads' part of q, k, v or z, at some positions or all, by another run's.

    Args:
        source: the whole tensor that another run had at this site.
        heads: of k and v, key-value heads.

    Example:
        >>> vlm.run(null, edits=[heads_patch("text.3.z", vlm.run(real, ["text.3.z"])["text.3.z"], [5], real.last)])
    """
    where, chosen = as_site(site), places("heads", heads)
    at = None if positions is None else places("positions", positions, all_by_none=True)

    def overwrite(x: Tensor) -> Tensor:  # batch pos head d_head
        index = torch.tensor(range(x.shape[1]) if at is None else at, device=x.device)[:, None]
        some = torch.tensor(chosen, device=x.device)
        x[:, index, some] = source.to(x)[:, index, some]
        return x

    # As in `patch`: keys and values are read from the cache in every later step.
    when = "always" if where.kind in ("k", "v") else "prompt"
    label = f"patch heads {list(chosen)}"
    return Edit(where, overwrite, when, label=label, positions=at or (), heads=chosen, length=source.shape[1])


def features_patch(site: Site | str, source: Float[Tensor, "image pos d_model"], tokens: Sequence[int]) -> Edit:
    """Overwrite some image tokens' features by another run's.

    Args:
        tokens: counted through all images of the prompt.

    Example:
        >>> source = vlm.run(real, read=["image_features"])["image_features"]
        >>> vlm.run(null, edits=[features_patch("image_features", source, [0, 1])])
    """
    given, index = source.flatten(0, 1), torch.tensor(places("tokens", tokens))

    def overwrite(x: Tensor) -> Tensor:  # image pos d_model
        flat, here = x.flatten(0, 1), index.to(x.device)
        return flat.index_copy(0, here, given.to(flat)[here]).reshape(x.shape)

    return Edit(as_site(site), overwrite, "prompt", label=f"patch {len(index)} tokens' features")


def reading_of(sites: Sequence[Site], queries: Sequence[int] | None = None) -> dict[Site, Any]:
    """What has to be read of a run to patch from it: whole activations, or some queries' rows of attention.

    Example:
        >>> reading_of([mv.Site("pattern", 3)], [-1])
        {Site(kind='pattern', layer=3, tower='text'): Rows(queries=(-1,), keys=None)}
    """
    return {site: rows(queries) if site.kind in PATTERN_KINDS else None for site in sites}


def from_run(
    run: Run, site: Site, positions: Sequence[int] | None, heads: Sequence[int] | None, held: Sequence[int]
) -> Edit:
    """The patch of one site from a run: of positions or all, of heads or all.

    Args:
        held: of which queries the run holds rows, in their order.
    """
    if site.kind not in PATTERN_KINDS:
        return patch(site, run[site], positions) if heads is None else heads_patch(site, run[site], heads, positions)
    asked = list(held) if positions is None else sorted(set(positions))
    place = {position: at for at, position in enumerate(held)}
    given = run[site] if asked == list(held) else run[site][:, :, [place[position] for position in asked]]
    return rows_patch(site, given, asked, heads)
