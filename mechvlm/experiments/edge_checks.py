"""How far estimates of edges can be trusted: some of them patched exactly, those estimated highest and random ones.

Rule this module guards: an edge is drawn among all that there are, those estimated to be nothing included.

>>> found = mv.edge_attribution(vlm, real, null, yes, method="eap", verify=3)
>>> found.drawn.values[0].tolist()
['top', 'top', 'top', 'random', 'random', 'random']
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import xarray as xr

from mechvlm.batch import metric_values
from mechvlm.experiments.attributed_checks import checked, chosen_nodes, unpatched
from mechvlm.experiments.edge_patches import edge_edits, restored_sites
from mechvlm.experiments.edge_products import Graph, Turn, edges_shown
from mechvlm.experiments.sweep import measuring
from mechvlm.metrics import Metric
from mechvlm.passes import pass_of
from mechvlm.prompt import Prompt
from mechvlm.rounds import done
from mechvlm.sites import Site
from mechvlm.vlm import VLM
from mechvlm.writes import write_sites

Edge = tuple[str, str, int]
"""Writer, reader and the number of a span."""


def patched_exactly(
    vlm: VLM,
    source: Prompt,
    target: Prompt,
    metric: Metric,
    graph: Graph,
    edges: Sequence[Edge],
    batch_size: int | None = None,
) -> tuple[np.ndarray, dict[str, float], str]:
    """How much each edge's patch changes the metric, the metric of both prompts, and how the patches were run."""
    read = list(dict.fromkeys(site for _, reader, _ in edges for site in restored_sites(vlm.shape, reader)))
    held, value = dict[tuple, Any](), partial(metric_values, vlm.metric(metric))
    turns = []
    for keeps, prompt, more in (("source", source, []), ("target", target, read)):
        sites = list(dict.fromkeys([*write_sites(vlm, bool(prompt.images)), *more]))
        turns.append(Turn(pass_of(vlm, held, prompt, sites, value=value), keeps))
    names = list(dict.fromkeys(writer for writer, _, _ in edges))
    shown = vlm.place.ask(vlm.model, edges_shown, vlm.arch, vlm.shape.logit_cap, graph, turns, names)
    own = {Site(*key): x for key, x in shown["own"].items()}
    moves = {
        (writer, span): shown["difference"][writer][list(graph.spans[span])]
        for writer, span in dict.fromkeys((writer, span) for writer, _, span in edges)
    }
    variants = [
        edge_edits(vlm.shape, reader, moves[writer, span], graph.spans[span], own) for writer, reader, span in edges
    ]
    values, how = done(vlm, measuring(vlm, target, variants, metric, batch_size))
    ends = {name: float(end) for name, end in shown["ends"].items()}
    return values - ends["target"], ends, how


def edges_patched(
    vlm: VLM,
    prompts: tuple[Prompt, Prompt],
    metric: Metric,
    graph: Graph,
    score: xr.DataArray,
    verify: int,
    seed: int,
    sizes: bool,
    batch_size: int | None,
) -> tuple[xr.Dataset, str]:
    """Estimates beside patches, for the edges that were drawn, and how the patches were run.

    Args:
        score: over writer, reader and maybe span; what is not a number is no edge.
        sizes: whether the scores are sizes without a sign, in another unit than the metric's.
    """
    flat = xr.DataArray(score.values.reshape(1, -1), dims=["layer", "position"], coords={"layer": [0]})
    table = {"edge": flat.assign_coords(position=np.arange(flat.size))}
    nodes = chosen_nodes(table, verify, seed)
    places = [np.unravel_index(node.place, score.shape) for node in nodes["edge"]]
    edges = [
        (str(score.writer.values[at[0]]), str(score.reader.values[at[1]]), int(at[2]) if at[2:] else 0) for at in places
    ]
    changes, _, how = patched_exactly(vlm, *prompts, metric, graph, edges, batch_size)
    made = {"edge": np.abs(changes) if sizes else changes}
    found = checked(nodes, made, unpatched(table, nodes), "position")
    found = found.drop_vars(["node_layer", "node_position", "node_head"])
    if sizes:
        found = found.drop_vars(["missed", "missed_share"])
    named = {"writer": [edge[0] for edge in edges], "reader": [edge[1] for edge in edges]}
    if "span" in score.dims:
        named["span"] = [str(score.span.values[edge[2]]) for edge in edges]
    return found.assign_coords({f"node_{name}": (["kind", "node"], [some]) for name, some in named.items()}), how
