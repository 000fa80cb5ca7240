"""One edge patched exactly: a reader is given a writer's write of another run, and nothing else is.

Rule this module guards: everything that the reader does not do itself stays as it was in the run. The stream is moved
where the reader takes it and moved back behind it, and what other readers made of the moved stream is put back, so
that all that follows sees what this one reader made of it.

>>> str(moved("text.3.resid_mid", torch.ones(2, 64), [3, 4]))
'move 2 positions at text.3.resid_mid (prompt only)'
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechvlm.edits import Edit, patch
from mechvlm.experiments.patches import heads_patch
from mechvlm.nodes import Node
from mechvlm.shapes import Shape
from mechvlm.sites import Site, as_site


def edge_edits(
    shape: Shape,
    reader: str,
    difference: Float[Tensor, "some d_model"],
    positions: Sequence[int],
    run: Mapping[Site, Tensor],
) -> list[Edit]:
    """The edits that let one reader alone read another write.

    Args:
        reader: a name of `mechvlm.nodes`.
        difference: what is added to the reader's input at each of the positions.
        run: what the prompt's own run showed at `restored_sites`.

    Example:
        >>> [str(edit.site) for edit in edge_edits(vlm.shape, "m3", torch.zeros(1, 64), [0], {})]
        ['text.3.resid_mid', 'text.3.resid_post']
    """
    node = Node.parse(reader)
    if node.layer is None:
        return [moved(Site("resid_post", shape.layers["text"] - 1), difference, positions)]
    middle = "resid_mid" in shape.kinds["text"][node.layer]
    if node.kind == "mlp":
        first = Site("resid_mid" if middle else "resid_pre", node.layer)
        last = Site("resid_post", node.layer)
    else:
        first, last = Site("resid_pre", node.layer), Site("resid_mid" if middle else "resid_post", node.layer)
    there, back = moved(first, difference, positions), moved(last, difference, positions, -1.0)
    return [there, *restored(shape, node, positions, run), back]


def restored_sites(shape: Shape, reader: str) -> list[Site]:
    """What `edge_edits` needs of the prompt's own run.

    Example:
        >>> restored_sites(vlm.shape, "a3.kv1<v>")[0]
        Site(kind='q', layer=3, tower='text')
    """
    node = Node.parse(reader)
    if node.layer is None:
        return []
    kinds = shape.kinds["text"][node.layer]
    middle, own = "resid_mid" in kinds, node.kind == "mlp"
    heads = "q" in kinds and not (own and middle)
    found = [Site(kind, node.layer) for kind in ("q", "k", "v") if heads]
    return [*found, *([] if own or middle else [Site("mlp_out", node.layer)])]


def restored(shape: Shape, node: Node, positions: Sequence[int], run: Mapping[Site, Tensor]) -> list[Edit]:
    """The edits that give every other reader of the moved stream what it had."""
    found = []
    for site in restored_sites(shape, node.name):
        own = site.kind == node.reads
        if not own:
            found.append(patch(site, run[site], positions))
            continue
        count = (shape.heads if site.kind == "q" else shape.kv_heads)["text"]
        others = [head for head in range(count) if head != node.head]
        found += [heads_patch(site, run[site], others, positions)] if others else []
    return found


def moved(
    site: Site | str, difference: Float[Tensor, "some d_model"], positions: Sequence[int], times: float = 1.0
) -> Edit:
    """Add another vector at each of some positions.

    Args:
        times: what the vectors are multiplied by.

    Example:
        >>> moved("text.3.resid_mid", torch.ones(2, 64), [3, 4]).positions
        (3, 4)
    """
    where = tuple(positions)
    function: Any = partial(added, difference, where, times)
    return Edit(as_site(site), function, "prompt", label=f"move {len(where)} positions", positions=where)


def added(
    difference: Float[Tensor, "some d_model"],
    positions: Sequence[int],
    times: float,
    x: Float[Tensor, "batch pos d_model"],
) -> Float[Tensor, "batch pos d_model"]:
    """A tensor with vectors added at some positions.

    Example:
        >>> added(torch.ones(1, 2), [1], 2.0, torch.zeros(1, 2, 2)).tolist()
        [[[0.0, 0.0], [2.0, 2.0]]]
    """
    index = torch.tensor(list(positions), device=x.device)
    return x.index_add(1, index, (times * difference.to(x))[None].expand(len(x), -1, -1))
