"""A circuit as edits of a run: the source's writes in the place of all nodes outside it.

Rule this module guards: a node that is patched is patched by what the same node wrote, at the same positions, when the
model ran on the source.

>>> [str(edit.site) for edit in outside(vlm, Circuit(chosen=["a0.h7"]), null, real)[:3]]
['text.0.z', 'text.0.mlp_out', 'text.1.z']
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool

from mechvlm.circuit_value import Circuit
from mechvlm.edits import Edit, patch
from mechvlm.experiments.exchange import matched
from mechvlm.experiments.patches import features_patch, heads_patch
from mechvlm.experiments.sight import cross_layers, head_site
from mechvlm.nodes import Node, feeds, read_at, readers, writers, written_at
from mechvlm.prompt import Prompt
from mechvlm.sites import Site
from mechvlm.vlm import VLM


def outside(vlm: VLM, circuit: Circuit, source: Prompt, target: Prompt) -> list[Edit]:
    """Patches of all nodes outside a circuit into the target; see `Circuit.edits`.

    Args:
        vlm, circuit, source, target: as there.

    Raises:
        ValueError: where the prompts' positions do not mean the same, or the circuit is not of this model.
    """
    matched(vlm, source, target, [])
    places = _outside(vlm, circuit, target)
    skipped = [] if target.images else cross_layers(vlm)
    groups: dict[tuple[Site, tuple[int, ...]], list[int]] = {}
    for name, positions in places.items():
        node = Node.parse(name)
        if node.layer not in skipped:
            groups.setdefault((_site(vlm, node), positions), []).append(-1 if node.head is None else node.head)
    if not groups:
        return []
    run = vlm.run(source, read=list(dict.fromkeys(site for site, _ in groups)))
    tokens = {position: number for number, position in enumerate(target.image)}
    edits = []
    for (site, positions), heads in groups.items():
        if site.kind == "deepstack":
            edits.append(features_patch(site, run[site], [tokens[at] for at in positions]))
        elif heads[0] >= 0:
            edits.append(heads_patch(site, run[site], heads, positions))
        else:
            edits.append(patch(site, run[site], positions))
    return edits


def edge_table(vlm: VLM) -> Bool[np.ndarray, "writer reader"]:
    """Which edges a model has, between all that writes and all that reads.

    Example:
        >>> edge_table(vlm).shape, int(edge_table(vlm).sum())
        ((74, 137), 4694)
    """
    written = np.array([written_at(name) for name in writers(vlm.shape)])
    return written[:, None] < np.array([read_at(vlm.shape, name) for name in readers(vlm.shape)])


def kept_at(
    vlm: VLM, circuit: Circuit, spans: Sequence[str | None]
) -> dict[str | None, Bool[np.ndarray, "writer reader"]]:
    """Which of a model's edges a circuit keeps, at each of some spans.

    Raises:
        ValueError: for an edge, or a node, that the model has not, or a circuit of other numbers of heads.

    Example:
        >>> {span: int(kept.sum()) for span, kept in kept_at(vlm, Circuit([Edge("image", "m1")]), [None]).items()}
        {None: 1}
    """
    rows, columns, table = writers(vlm.shape), readers(vlm.shape), edge_table(vlm)
    own = vlm.shape.heads["text"], vlm.shape.kv_heads["text"]
    if circuit.heads and (circuit.heads, circuit.kv_heads) != own:
        raise ValueError(
            f"the circuit is of a model whose layers have {circuit.heads} heads and {circuit.kv_heads} key-value "
            f"heads, and this one's have {own[0]} and {own[1]}; make the circuit of its own scores."
        )
    kept = {span: circuit.kept(rows, columns, span) for span in spans}
    for edge in circuit.edges:  # the names of whose ends are there
        if not feeds(vlm.shape, edge.writer, edge.reader):
            raise ValueError(
                f"in this model {edge.reader} does not read what {edge.writer} writes; leave the edge {edge} out."
            )
    return {span: one & table for span, one in kept.items()}


def kept_in(vlm: VLM, circuit: Circuit, prompt: Prompt) -> Bool[np.ndarray, "span writer reader"]:
    """Which of a model's edges a circuit keeps at each span of a prompt; all spans are one where the circuit has none.

    Raises:
        ValueError: for spans that the prompt has not, or edges or nodes that the model has not.

    Example:
        >>> kept_in(vlm, ~Circuit(), real).shape, kept_in(vlm, Circuit([Edge("image", "m1", "last")]), real).shape
        ((1, 74, 137), (5, 74, 137))
    """
    check_spans(circuit, prompt)
    return np.stack(list(kept_at(vlm, circuit, list(prompt.spans) if circuit.spans else [None]).values()))


def check_spans(circuit: Circuit, prompt: Prompt) -> None:
    """Refuse a circuit at spans that a prompt has not.

    Raises:
        ValueError: for such a span.
    """
    unknown = [span for span in circuit.spans if span not in prompt.spans]
    if unknown:
        raise ValueError(
            f"the circuit has edges at the span {unknown[0]!r}, and the prompt's spans are {', '.join(prompt.spans)}; "
            "choose the circuit from scores of these."
        )


def positions_written(writer: str, positions: Sequence[int], target: Prompt) -> list[int]:
    """At which of some positions a node writes: embeddings at all but image tokens, the picture at these.

    Example:
        >>> positions_written("image", [0, 1, 12], real), positions_written("m3", [0, 1, 12], real)
        ([12], [0, 1, 12])
    """
    kind, image = Node.parse(writer).kind, set(target.image)
    if kind in ("image", "deepstack"):
        return [at for at in positions if at in image]
    return [at for at in positions if kind != "embed" or at not in image]


def _outside(vlm: VLM, circuit: Circuit, target: Prompt) -> Mapping[str, tuple[int, ...]]:
    """For each node outside the circuit, the positions at which it is."""
    check_spans(circuit, target)
    found: dict[str, list[int]] = {}
    for span, kept in kept_at(vlm, circuit, list(target.spans)).items():
        for name in (name for name, stays in zip(writers(vlm.shape), np.any(kept, axis=1), strict=True) if not stays):
            found.setdefault(name, []).extend(positions_written(name, target.spans[str(span)], target))
    return {name: tuple(sorted(positions)) for name, positions in found.items() if positions}


def _site(vlm: VLM, node: Node) -> Site:
    """Where a node's writes are patched."""
    if node.layer is None:
        return Site("resid_pre", 0)
    if node.kind == "attention":
        return head_site(vlm, node.layer)
    return Site("mlp_out" if node.kind == "mlp" else "deepstack", node.layer)
