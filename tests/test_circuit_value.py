"""Circuits as values: names of edges that lie on paths, sets of them, and text that they come back from unchanged."""

import json
import math
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

import mechvlm as mv
from mechvlm.edge_paths import Heads, on_paths
from mechvlm.nodes import Node

Ends = tuple[str, str, str | None]
WRITERS = ("embed", "image", *(f"a{layer}.h{head}" for layer in (0, 1) for head in (0, 1)), "m0", "m1")
READERS = (
    *(f"a{layer}.h{head}<q>" for layer in (0, 1) for head in (0, 1)),
    *(f"a{layer}.kv0<{of}>" for layer in (0, 1) for of in "kv"),
    *("m0", "m1", "logits"),
)
"""Of two layers with two heads that share their keys and values."""
ORDER = {"a0": 0, "m0": 1, "a1": 2, "m1": 3, "lo": 4}
EDGES = [(w, r) for w in WRITERS for r in READERS if ORDER.get(w[:2], -1) < ORDER[r[:2]]]


def edge(writer: str, reader: str, span: str | None = None, score: float = math.nan) -> mv.Edge:
    return mv.Edge(writer, reader, span, score)


def drawn(seed: int, count: int = 14) -> list[Ends]:
    """Random edges, some at spans."""
    draw = np.random.default_rng(seed)
    chosen = {(*EDGES[draw.integers(len(EDGES))], (None, "image", "last")[draw.integers(3)]) for _ in range(count)}
    return sorted(chosen, key=str)


def leads(first: Ends, then: Ends) -> bool:
    """Whether what the first edge brings may go out along the other, written out reader by reader."""
    reader, writer = first[1], then[0]
    node, layer = reader.partition("<")[0], reader[1]
    if "kv" in reader:
        return writer.startswith(f"a{layer}.h")
    return node == writer and (first[2] == then[2] or None in (first[2], then[2]))


def on_some_path(edges: list[Ends]) -> set[Ends]:
    """The edges of all paths from what enters to the logits, each path walked."""
    found: set[Ends] = set()

    def walk(path: list[Ends]) -> None:
        if path[-1][1] == "logits":
            found.update(path)
        for then in edges:
            if leads(path[-1], then):
                walk([*path, then])

    for first in edges:
        if first[0] in ("embed", "image"):
            walk([first])
    return found


@pytest.mark.parametrize("seed", range(30))
def test_pruning_keeps_the_edges_of_all_paths_and_no_others(seed: int) -> None:
    edges = drawn(seed)
    kept = mv.Circuit([edge(*one) for one in edges], heads=2, kv_heads=1).pruned()
    assert {(one.writer, one.reader, one.span) for one in kept.edges} == on_some_path(edges)


def test_some_of_the_drawn_circuits_have_paths_and_edges_off_them() -> None:
    shares = [len(on_some_path(drawn(seed))) / len(drawn(seed)) for seed in range(30)]
    assert 0 < np.mean(shares) < 1 and sum(share > 0 for share in shares) > 10


def test_heads_that_look_at_the_picture_by_themselves_need_no_edge_that_brings_it() -> None:
    ends = [("a0.h1", "logits", None)]
    assert on_paths(ends, Heads(2, 1)) == [False]
    assert on_paths(ends, Heads(2, 1, (0,))) == [True]


def test_a_circuit_comes_back_from_its_file_as_it_was(tmp_path: Path) -> None:
    edges = [edge("image", "a1.kv0<v>", 'the "é"\n', -0.25), edge("a1.h1", "logits")]
    known: dict[str, Any] = {"heads": 2, "kv_heads": 1, "layers": 2, "crossing": [0], "candidates": [90, 6, 4]}
    held = mv.Circuit(edges, **known, metric="yes", model="m", note="by hand")
    held.save(tmp_path / "circuit.json")
    back = mv.Circuit.load(tmp_path / "circuit.json")
    assert back == held and back.edges[0].score == -0.25 and math.isnan(back.edges[1].score)
    assert json.loads((tmp_path / "circuit.json").read_text())["edges"][1] == ["a1.h1", "logits", None, None]
    for other in (~held, mv.Circuit(chosen=["a0.h1", "m1"])):
        other.save(tmp_path / "other.json")
        assert mv.Circuit.load(tmp_path / "other.json") == other


def test_circuits_are_put_together_as_sets_of_edges_whatever_their_scores() -> None:
    a = mv.Circuit([edge("image", "m0", score=1.0), edge("image", "m1")])
    b = mv.Circuit([edge("image", "m0", score=2.0), edge("embed", "m1")])
    assert (a & b).edges == (edge("image", "m0"),) and (a & b).edges[0].score == 1.0
    assert {str(one) for one in (a | b).edges} == {"image -> m0", "image -> m1", "embed -> m1"}
    assert (a - b).edges == (edge("image", "m1"),)
    nodes = mv.Circuit(chosen=["m0", "a0.h1"]), mv.Circuit(chosen=["m0", "m1"])
    assert (nodes[0] | nodes[1]).nodes == ("a0.h1", "m0", "m1") and (nodes[0] - nodes[1]).chosen == ("a0.h1",)


def test_what_two_circuits_know_of_their_model_is_known_of_both_together() -> None:
    found = mv.Circuit([edge("image", "m0")], heads=2, kv_heads=1, layers=2, candidates=(90, 6, 4), model="m")
    assert mv.Circuit() | found == found == found - mv.Circuit()
    assert (found | mv.Circuit([edge("image", "m1")], candidates=(80, 6, 0))).candidates == (0, 6, 4)
    assert (found & mv.Circuit([edge("image", "m0")], metric="yes", model="n")).model == ""


@pytest.mark.parametrize("name", ["m00", "a1.h01", "a01.kv0<v>", "d-1", "a\u0663.h1"])
def test_a_node_has_one_name(name: str) -> None:
    with pytest.raises(ValueError, match="names no node"):
        Node.parse(name)


def test_the_complement_has_every_edge_but_the_circuits_at_each_span() -> None:
    found = mv.Circuit([edge("image", "m0", "image"), edge("a0.h1", "m0")], heads=2, kv_heads=1)
    for span in ("image", "last", None):
        assert ((~found).kept(WRITERS, READERS, span) == ~found.kept(WRITERS, READERS, span)).all()
    assert [found.kept(WRITERS, READERS, span).sum() for span in ("image", "last", None)] == [2, 1, 1]


def test_chosen_nodes_have_all_edges_between_them_from_what_enters_and_to_the_logits() -> None:
    found = mv.Circuit(chosen=["a0.h1", "m1"])
    kept = {
        (w, r)
        for (w, row) in zip(WRITERS, found.kept(WRITERS, READERS), strict=True)
        for r, k in zip(READERS, row, strict=True)
        if k
    }
    # Keys and values of layer 0 serve the head that was chosen and one that was not.
    reads = {"a0.h1<q>", "a0.kv0<k>", "a0.kv0<v>", "m1", "logits"}
    assert kept == set(product(("embed", "image", "a0.h1", "m1"), reads))


def test_a_key_value_head_is_counted_with_the_heads_that_write() -> None:
    found = mv.Circuit([edge("image", "a1.kv0<v>"), edge("a1.h0", "logits"), edge("embed", "a1.h1<q>")])
    assert found.nodes == ("embed", "image", "a1.h0", "a1.h1", "logits") and found.n_nodes == 5


def test_a_notebook_shows_the_largest_scores_first_and_how_many_more_there_are() -> None:
    shown = mv.Circuit([edge("image", f"m{at}", score=(-1) ** at * at) for at in range(20)])._repr_html_()
    assert shown.index("image -&gt; m19") < shown.index("image -&gt; m18") < shown.index("and 8 more")
    assert "image -&gt; m7<" not in shown


# --- choosing


def scored(seed: int = 0, spans: tuple[str, ...] = (), **attrs: Any) -> xr.Dataset:
    """Random scores of all edges, as edge attribution returns them."""
    draw = np.random.default_rng(seed)
    table = np.full((len(WRITERS), len(READERS), max(1, len(spans))), np.nan)
    for writer, reader in EDGES:
        table[WRITERS.index(writer), READERS.index(reader)] = draw.standard_normal(max(1, len(spans)))
    dims = ["writer", "reader", "span"][: 2 + bool(spans)]
    along = {"writer": list(WRITERS), "reader": list(READERS)} | ({"span": list(spans)} if spans else {})
    values = table if spans else table[..., 0]
    ends = {"source_metric": -1.0, "target_metric": 2.0}
    return xr.Dataset({"score": (dims, values)}, coords=along, attrs={**ends, **attrs})


def ends_of(found: mv.Circuit) -> list[Ends]:
    return [(one.writer, one.reader, one.span) for one in found.edges]


def grown(scores: xr.Dataset, count: int) -> list[Ends]:
    """The greedy circuit, each step a look at all edges."""
    spans: list[str | None] = list(scores.score.span.values) if "span" in scores.score.dims else [None]
    size = {
        (w, r, s): abs(float(scores.score.sel(writer=w, reader=r, **({"span": s} if s else {}))))
        for w, r in EDGES
        for s in spans
    }
    found: list[Ends] = []
    for _ in range(count):
        open_ = [one for one in size if one not in found and (one[1] == "logits" or any(leads(one, e) for e in found))]
        found.append(max(open_, key=lambda one: size[one]))
    return found


@pytest.mark.parametrize("spans", [(), ("image", "last")])
def test_a_greedy_circuit_grows_from_the_logits_by_the_highest_edge_that_leads_into_it(spans: tuple[str, ...]) -> None:
    scores = scored(3, spans)
    found = mv.choose_circuit(scores, 15, how="greedy", prune=False)
    assert ends_of(found) == grown(scores, 15)
    assert set(ends_of(mv.choose_circuit(scores, 15, how="greedy"))) == on_some_path(grown(scores, 15))


def test_the_top_edges_are_those_of_largest_size_wherever_they_are() -> None:
    scores = scored(1)
    found = mv.choose_circuit(scores, 12, prune=False)
    sizes = np.sort(np.abs(scores.score.values[np.isfinite(scores.score.values)]))[::-1]
    assert [abs(one.score) for one in found.edges] == sizes[:12].tolist()
    assert (found.heads, found.kv_heads, found.layers, found.candidates) == (2, 1, 2, (len(EDGES), 6, 4))
    assert ends_of(mv.choose_circuit(scores, threshold=float(sizes[11]), prune=False)) == ends_of(found)


def test_by_value_an_edge_counts_that_goes_from_the_targets_answer_towards_the_sources() -> None:
    scores = scored(2)
    assert max(one.score for one in mv.choose_circuit(scores, 10, by="value", prune=False).edges) < 0
    other = scores.assign_attrs(source_metric=5.0)
    assert min(one.score for one in mv.choose_circuit(other, 10, by="value", prune=False).edges) > 0
    for without_sign in ({"method": "information-flow-routes"}, {"signed": 0}):
        shares = scores.assign_attrs(without_sign)
        assert min(one.score for one in mv.choose_circuit(shares, 10, by="value", prune=False).edges) > 0


def test_scores_of_several_pairs_are_averaged_before_edges_are_chosen() -> None:
    both = [scored(4), scored(5)]
    mean = both[0].assign(score=(both[0].score + both[1].score) / 2)
    assert ends_of(mv.choose_circuit(both, 10)) == ends_of(mv.choose_circuit(mean, 10))


def test_a_circuits_note_says_how_it_was_chosen_what_was_left_out_and_which_pairs_go_the_other_way() -> None:
    scores, other = scored(1), scored(2, source_metric=5.0)
    whole, kept = mv.choose_circuit(scores, 12, prune=False), mv.choose_circuit(scores, 12)
    assert whole.note == "top 12 by abs" and 0 < kept.n_edges < 12
    assert kept.note == f"top 12 by abs, less {12 - kept.n_edges} on no path"
    large = mv.choose_circuit(scores, threshold=1.25, prune=False)
    assert large.note == f"top {large.n_edges} by abs of at least 1.25"
    assert mv.choose_circuit([scores, scores], 3, prune=False).note == "top 3 by abs, mean of 2 pairs"
    mixed = mv.choose_circuit([scores, other, scores], 3, prune=False)
    assert mixed.note == "top 3 by abs, mean of 3 pairs, the metric of 1 going the other way"


def test_scores_of_heads_and_mlps_at_positions_make_a_circuit_of_nodes() -> None:
    z = xr.DataArray(
        np.array([[[1.0, 0.5], [-1.0, 0.5]]]), dims=["layer", "position", "head"], coords={"layer": [3], "head": [0, 1]}
    )
    mlp = xr.DataArray(np.array([[0.4, 0.4]]), dims=["layer", "position"], coords={"layer": [3]})
    found = mv.choose_circuit(xr.Dataset({"z": z, "mlp_out": mlp}), 2)
    assert found.chosen == ("a3.h1", "m3") and found.candidates == (0, 3, 2)  # of head 0 the positions cancel


# --- comparing


def test_what_random_circuits_share_is_what_counting_all_of_them_gives() -> None:
    names = [f"a0.h{head}" for head in range(7)]
    one, other = (mv.Circuit(chosen=names[part], candidates=(0, 7, 7)) for part in (slice(0, 4), slice(1, 4)))
    found = mv.circuit_overlap(one, other).sel(of="heads")
    sets = [[at for at in range(7) if number >> at & 1] for number in range(128)]
    counts = [len({0, 1, 2, 3} & set(those)) for those in sets if len(those) == 3]
    assert float(found.shared) == 3 and float(found.overlap) == 3 / 4
    assert found.share.values.tolist() == [3 / 4, 1.0]
    assert float(found.expected) == pytest.approx(np.mean(counts))
    assert float(found.p_value) == pytest.approx(np.mean(np.array(counts) >= 3))


def test_overlap_says_nothing_of_edges_or_of_chance_where_it_is_not_known() -> None:
    found = mv.circuit_overlap(mv.Circuit(chosen=["m0"]), mv.Circuit(chosen=["m0", "m1"]))
    assert np.isnan(found.sel(of="edges").overlap) and np.isnan(found.expected).all()
    assert float(found.overlap.sel(of="nodes")) == 0.5


def test_edges_at_other_spans_are_other_edges() -> None:
    one, other = (mv.Circuit([edge("image", "m0", span)], heads=2, kv_heads=1) for span in ("image", None))
    assert mv.circuit_overlap(one, other).shared.values.tolist() == [1, 0, 0]


def test_halves_of_the_examples_are_divided_by_whole_clusters_and_compared() -> None:
    seen: list[set[int]] = []

    def make(some: list[int]) -> mv.Circuit:
        seen.append({number // 2 for number in some})
        return mv.Circuit(chosen=["m0", *(f"a0.h{number // 2}" for number in sorted(some)[::2])])

    found = mv.circuit_stability(make, list(range(8)), splits=5, clusters=[number // 2 for number in range(8)])
    assert found.sizes["split"] == 5
    assert all(a | b == {0, 1, 2, 3} and not a & b for a, b in zip(seen[::2], seen[1::2], strict=True))
    assert found["mean"].sel(of="nodes") == pytest.approx(1 / 5) and found["mean"].sel(of="heads") == 0


def test_with_seeds_every_two_circuits_are_compared() -> None:
    found = mv.circuit_stability(lambda seed: mv.Circuit(chosen=["m0", f"m{1 + seed % 2}"]), seeds=[0, 1, 2])
    assert found.overlap.sel(of="nodes").values.tolist() == pytest.approx([1 / 3, 1.0, 1 / 3])
    assert float(found["mean"].sel(of="nodes")) == pytest.approx(5 / 9)


# --- drawing


def test_a_figure_has_every_node_and_a_line_for_each_edge_to_each_head_that_shares_it() -> None:
    edges = [
        edge("image", "a1.kv0<v>", "image", -2.0),
        edge("a1.h0", "logits", "last", -1.0),
        edge("a1.h1", "logits", "last", 0.5),
    ]
    figure: Any = mv.plot.circuit(mv.Circuit(edges, heads=2, kv_heads=1, layers=3))
    nodes = next(trace for trace in figure.data if trace.mode == "markers+text")
    assert nodes.text == ("image", "a1.h0", "a1.h1", "logits")
    lines = [trace for trace in figure.data if trace.hovertext is not None and trace.mode == "lines"]
    assert sum(sum(x is None for x in trace.x) for trace in lines) == 4
    assert [trace.name for trace in figure.data if trace.showlegend is not False] == ["image", "last"]
    assert {(trace.name, trace.line.dash) for trace in lines} == {
        ("image", "solid"),
        ("last", "solid"),
        ("last", "dot"),
    }
    assert max(lines, key=lambda trace: trace.line.width).name == "image"
