"""Circuits that were planted do all that the model does; without one of their edges they do nothing."""

from typing import Any

import numpy as np
import planted
import planted_paths
import pytest
import tiny
import torch
import xarray as xr
import zoo
from planted_paths import Path

import mechvlm as mv
from mechvlm.experiments import circuit_runs
from mechvlm.experiments.circuit_edits import edge_table, kept_in
from mechvlm.experiments.circuit_measures import areas, mean_areas, with_means
from mechvlm.experiments.circuit_runs import circuit_metrics
from mechvlm.experiments.random_circuits import random_circuit
from mechvlm.nodes import readers, writers
from mechvlm.wired import Wires, wires_of
from mechvlm.writes import writing

PLANTED = mv.logit_difference(planted.YES, planted.NO)
YES = mv.logit_difference("yes", "no")


@pytest.fixture(scope="module")
def hops() -> Path:
    return planted_paths.two_hops()


def circuit_of(path: Path) -> mv.Circuit:
    heads: dict[str, Any] = {"heads": planted_paths.HEADS, "kv_heads": planted_paths.KV_HEADS}
    return mv.Circuit([mv.Edge(*ends) for ends in path.edges], **heads)


def measured(path: Path, circuits: Any, **settings: Any) -> xr.Dataset:
    given = {"controls": 0, **settings}
    return mv.circuit_faithfulness(path.vlm, circuits, path.source, path.target, PLANTED, **given)


def test_the_planted_circuit_is_all_of_the_behaviour_and_nothing_is_left_without_it(hops: Path) -> None:
    circuit = circuit_of(hops)
    assert circuit.pruned() == circuit
    left_out = [circuit - mv.Circuit([one]) for one in circuit.edges]
    stray = circuit | mv.Circuit([mv.Edge("a0.h0", "m1"), mv.Edge("a2.h0", "logits")])
    found = measured(hops, [circuit, *left_out, stray])
    np.testing.assert_allclose(found.faithfulness.values, [[1, 0, 0, 0, 1]], atol=1e-6)
    np.testing.assert_allclose(found.completeness.values[0, 0], 0, atol=1e-6)
    assert stray.pruned().edges == circuit.edges
    assert abs(found["all"].item() - found["none"].item()) > 1


def test_all_edges_and_none_are_the_models_own_answers(hops: Path) -> None:
    found = measured(hops, [mv.Circuit(), ~mv.Circuit()])
    own = [float(hops.vlm.metric(PLANTED)(hops.vlm.run(prompt).logits)[0]) for prompt in (hops.target, hops.source)]
    np.testing.assert_allclose([found["all"].item(), found["none"].item()], own, atol=1e-6)
    np.testing.assert_allclose(found.metric.values[0], own[::-1], atol=1e-6)
    np.testing.assert_allclose(found.complement.values[0], own, atol=1e-6)


@zoo.second_environment
def test_heads_that_share_keys_and_values_have_their_own_shares_of_the_answer() -> None:
    path = planted_paths.twins()
    circuit = circuit_of(path)
    parts = [circuit - mv.Circuit([one]) for one in circuit.edges]
    expected = [1 - share for share in path.edges.values()]
    found = measured(path, [circuit, *parts])
    np.testing.assert_allclose(found.faithfulness.values[0], [1.0, *expected], atol=1e-6)


@zoo.second_environment
def test_chosen_nodes_do_as_a_circuit_what_their_edits_do_to_the_model() -> None:
    vlm = tiny.vlm(2, "sdpa", torch.float64)
    target, source = (vlm.prompt(tiny.picture(number), "is there a red cat ?") for number in (1, 2))
    some = mv.Circuit(chosen=["a0.h1", "a1.h2", "a1.h3", "m0", "m2"])
    for circuit in (some, ~some):
        found = mv.circuit_faithfulness(vlm, circuit, source, target, YES, controls=0)
        edited = vlm.run(target, edits=circuit.edits(vlm, source, target)).logits
        by_hand = float(vlm.metric(YES)(edited)[0])
        np.testing.assert_allclose(found.metric.item(), by_hand, atol=1e-6)
        assert abs(by_hand - found["all"].item()) > 1e-3


@zoo.second_environment
@pytest.mark.parametrize("name", sorted(set(zoo.VARIANTS) - {"mllama"}))
def test_chosen_nodes_are_a_circuit_and_edits_alike_on_every_architecture(name: str) -> None:
    if zoo.there(name):
        pytest.skip(zoo.there(name))
    vlm = zoo.build(name, "eager" if name in zoo.EAGER_ONLY else "sdpa", torch.float64)
    target, source = (zoo.ask(vlm, tiny.picture(seed, 48, 48)) for seed in (1, 2))
    metric = mv.logit_difference(30, 31)
    scores = mv.attribution_patching(vlm, source, target, metric, kinds=["z", "mlp_out"], positions="span")
    circuit = mv.choose_circuit(scores, 4)
    if any(writing(vlm).behind):  # a norm behind all heads, whose scale a patch of some of them moves
        circuit = mv.Circuit(chosen=[f"a0.h{head}" for head in range(vlm.shape.heads["text"])] + ["m1"])
    found = mv.circuit_faithfulness(vlm, circuit, source, target, metric, controls=0)
    edited = vlm.run(target, edits=circuit.edits(vlm, source, target)).logits
    np.testing.assert_allclose(found.metric.item(), float(vlm.metric(metric)(edited)[0]), rtol=0, atol=1e-6)
    ends = [found["all"].item() - found.target_metric.item(), found["none"].item() - found.source_metric.item()]
    np.testing.assert_allclose(ends, [0.0, 0.0], atol=1e-6)
    assert abs(found["all"].item() - found["none"].item()) > 1e-3


@zoo.second_environment
@pytest.mark.parametrize("name", sorted(zoo.VARIANTS))
def test_edits_of_no_edges_give_the_sources_answer_and_of_all_edges_there_are_none(name: str) -> None:
    if zoo.there(name):
        pytest.skip(zoo.there(name))
    vlm = zoo.build(name, "eager" if name in zoo.EAGER_ONLY else "sdpa", torch.float64)
    target, source = (zoo.ask(vlm, tiny.picture(seed, 48, 48)) for seed in (1, 2))
    edits = mv.Circuit().edits(vlm, source, target)
    torch.testing.assert_close(vlm.run(target, edits=edits).logits, vlm.run(source).logits, rtol=0, atol=1e-9)
    assert (~mv.Circuit()).edits(vlm, source, target) == []


@zoo.second_environment
def test_edits_of_edges_patch_a_node_where_none_of_its_edges_is(hops: Path) -> None:
    vlm, circuit = hops.vlm, circuit_of(hops)
    edits = circuit.edits(vlm, hops.source, hops.target)
    assert float(vlm.metric(PLANTED)(vlm.run(hops.target, edits=edits).logits)[0]) == pytest.approx(
        float(vlm.metric(PLANTED)(vlm.run(hops.target).logits)[0]), abs=1e-6
    )
    kept = {edit.positions for edit in edits if str(edit.site) == "text.0.z" and 1 in edit.heads}
    question = set(hops.target.spans["question"])
    assert kept and all(not question & set(positions) for positions in kept)


def test_the_edges_of_a_circuit_and_of_its_complement_are_those_of_the_model(hops: Path) -> None:
    vlm, prompt, circuit = hops.vlm, hops.target, circuit_of(hops)
    mine, theirs = (kept_in(vlm, one, prompt) for one in (circuit, ~circuit))
    names = list(prompt.spans), writers(vlm.shape), readers(vlm.shape)
    named = [tuple(some[at] for some, at in zip(names, place, strict=True)) for place in np.argwhere(mine)]
    assert sorted(named) == sorted((span, writer, reader) for writer, reader, span in hops.edges)
    assert not (mine & theirs).any() and ((mine | theirs) == edge_table(vlm)).all()


@zoo.second_environment
def test_the_mean_of_several_sources_stands_for_what_is_left_out() -> None:
    vlm = tiny.vlm(2, "sdpa", torch.float64)
    prompts = [vlm.prompt(tiny.picture(number), "is there a red cat ?") for number in range(3)]
    circuit = mv.Circuit([mv.Edge("image", "a1.h0<q>"), mv.Edge("a1.h0", "logits")], heads=4, kv_heads=2)
    found = mv.circuit_faithfulness(vlm, circuit, prompts[1:], [prompts[0]] * 2, YES, ablate="mean", controls=0)
    by_hand = circuit_metrics(
        vlm, prompts[0], prompts[1:], [[(one.writer, one.reader, None) for one in circuit.edges]], YES
    )
    np.testing.assert_allclose(found.metric.values, [by_hand, by_hand], atol=1e-9)
    np.testing.assert_allclose(found["none"].values[0], found["none"].values[1], atol=1e-9)


def test_a_pass_has_as_many_circuits_as_rows_and_memory_allow(hops: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm, prompt = hops.vlm, hops.target
    two = [("embed", "a1.kv0<k>", None), ("embed", "a0.kv0<v>", None)]
    four = [*hops.edges, ("embed", "a2.h0<q>", "last"), ("image", "a2.h1<q>", "image")]
    circuits: Any = [list(hops.edges), [], [], two, four, []]
    passes: list[tuple[int, int]] = []
    one = len(writers(vlm.shape)) * len(prompt) * vlm.shape.d_model["text"] * vlm.dtype.itemsize

    def seen(*given: Any) -> Wires:
        wires = wires_of(*given)
        passes.append((wires.circuits, wires.rows))
        return wires

    def metrics(rows: int, size: int) -> tuple[Any, list[tuple[int, int]]]:
        passes.clear()
        monkeypatch.setattr(circuit_runs, "BYTES", size * one)
        found = circuit_metrics(vlm, prompt, hops.source, circuits, PLANTED, batch_size=rows)
        return found, list(passes)

    monkeypatch.setattr(circuit_runs, "wires_of", seen)
    together, ran = metrics(64, 64)
    alone = [(1, 2), (1, 1), (1, 1), (1, 2), (1, 4), (1, 1)]
    assert ran == [(6, 4)]
    for given, expected in {
        (6, 64): [(3, 2), *alone[3:]],
        (1, 64): alone,
        (64, 4): [(4, 2), (2, 4)],
        (64, 0): alone,
    }.items():
        found, ran = metrics(*given)
        assert ran == expected
        np.testing.assert_allclose(found, together, rtol=0, atol=1e-12)
    assert together[0] != together[1] == together[5]


@zoo.second_environment
def test_random_circuits_have_as_many_edges_and_lie_on_paths(hops: Path) -> None:
    vlm, draw = hops.vlm, np.random.default_rng(0)
    for spans in (None, "image"):
        asked = [mv.Edge("image", f"m{at}", spans) for at in range(4)]
        like = mv.Circuit([*asked, *(mv.Edge(f"a{at}.h1", "logits", spans and "last") for at in range(4))])
        on_paths = 0
        for _ in range(10):
            found = random_circuit(vlm, like, hops.target, draw)
            known = mv.Circuit(found.edges, heads=planted_paths.HEADS, kv_heads=planted_paths.KV_HEADS)
            table = known.kept(writers(vlm.shape), readers(vlm.shape), spans)
            assert found.n_edges == 8 and not (table & ~edge_table(vlm)).any()
            assert bool(found.spans) == (spans is not None)
            on_paths += known.pruned().n_edges
        assert on_paths > 0.9 * 80
    nodes = random_circuit(vlm, mv.Circuit(chosen=["a0.h1", "a2.h2", "m3"]), hops.target, draw)
    assert (len(nodes.of_kind("attention")), len(nodes.of_kind("mlp"))) == (2, 1)


def test_circuits_are_counted_at_each_span_at_which_an_edge_carries_something(hops: Path) -> None:
    vlm, prompt = hops.vlm, hops.target
    spans, every = len(prompt.spans), int(edge_table(vlm).sum())
    both = mv.Circuit([mv.Edge("a0.h0", "m1"), mv.Edge("embed", "m0"), mv.Edge("a0.h0", "m2", "image")])
    dead = mv.Circuit([mv.Edge("embed", "m0", "image"), mv.Edge("image", "m0", "image")])
    found = measured(hops, [both, ~both, dead, ~mv.Circuit(), ~mv.Circuit([mv.Edge("a0.h0", "m1")])])
    count = spans + (spans - 1) + 1  # there are no embeddings at image tokens
    total = int(found.n_edges[:2].sum())
    assert found.n_edges.values.tolist() == [count, total - count, 1, every, every - 1]
    np.testing.assert_allclose(found.share, [count / total, 1 - count / total, 1 / total, 1, (every - 1) / every])
    whole = 3 + len(writers(vlm.shape)) - 2  # what enters, heads and MLPs, and the logits
    assert found.n_nodes.values.tolist() == [5, whole, 3, whole, whole]
    draw = np.random.default_rng(0)
    assert random_circuit(vlm, both, prompt, draw).n_edges == count
    assert len(random_circuit(vlm, ~both, prompt, draw).edges) == count


def test_random_circuits_are_at_spans_that_all_targets_have() -> None:
    vlm = tiny.vlm(2, "sdpa")
    asked = [vlm.prompt(tiny.picture(at), "is there a red cat ?") for at in (1, 2)]
    bare = [vlm.prompt(tiny.picture(at), "<image> is there a cat", raw=True) for at in (1, 2)]
    assert set(asked[0].spans) - set(bare[0].spans) == {"prefix"}
    circuit = mv.Circuit([mv.Edge("image", reader, "image") for reader in readers(vlm.shape)[:-1]])
    found = mv.circuit_faithfulness(vlm, circuit, [asked[1], bare[1]], [asked[0], bare[0]], YES, controls=3)
    assert np.isfinite(found.random).all()


@zoo.second_environment
def test_the_planted_circuit_is_better_than_every_random_one(hops: Path) -> None:
    found = measured(hops, circuit_of(hops), controls=9)
    assert found.p_value.item() == 1 / 10 and float(np.abs(found.random).max()) < 1e-6
    assert found.n_edges.item() == 3 and found.n_nodes.item() == 4


def test_areas_are_those_of_trapezoids_from_no_edge_to_all() -> None:
    share, curve = np.array([0.0, 0.25, 0.5]), np.array([[0.0, 0.5, 1.5], [0.0, 0.0, 1.0]])
    cpr, cmd = areas(share, curve)
    assert cpr.tolist() == [0.25 * (0.25 + 1.0) + 0.5 * 1.25, 0.25 * 0.5 + 0.5]
    assert cmd.tolist() == [0.25 * (0.75 + 0.5) + 0.5 * 0.25, 0.25 * (1.0 + 0.5)]
    assert np.isnan(areas(np.array([0.5, 0.5]), curve[:, 1:])).all() and np.isnan(areas(share[::-1], curve)).all()
    # What is pruned may leave the same circuit of several sizes, or none at all.
    same = areas(np.array([0.0, 0.0, 0.25, 0.25, 0.5, 1.0]), curve[:, [0, 0, 1, 1, 2, 2]])
    assert same.tolist() == [cpr.tolist(), cmd.tolist()]


def test_the_mean_curves_areas_and_their_intervals_are_those_of_drawing_clusters_by_hand() -> None:
    draw = np.random.default_rng(1)
    share, curves, weights = np.array([0.2, 0.6]), draw.normal(0.7, 0.5, (9, 2)), draw.random(9) + 0.1
    clusters = [0, 0, 1, 2, 2, 3, 4, 5, 5]
    found = mean_areas(share, curves, weights, clusters)
    drawn = []
    for times in [range(6), *draw.integers(0, 6, (4000, 6))]:
        rows = [row for cluster in times for row in range(9) if clusters[row] == cluster]
        mean = np.average(curves[rows], axis=0, weights=weights[rows])
        drawn.append([np.trapezoid(y, [0, 0.2, 0.6, 1]) for y in ([0, *mean, 1], np.abs(1 - np.array([0, *mean, 1])))])
    np.testing.assert_allclose(found[:, 0], drawn[0], atol=1e-12)
    np.testing.assert_allclose(found[:, 1:], np.quantile(drawn[1:], [0.025, 0.975], axis=0).T, atol=0.02)
    each = np.average(areas(share, curves), axis=1, weights=weights)
    assert found[0, 0] == pytest.approx(each[0]) and found[1, 0] < each[1] - 0.01
    assert np.isnan(mean_areas(share, curves, weights, [0] * 9)[:, 1:]).all()


def test_examples_are_weighed_by_what_the_model_has_to_lose() -> None:
    held = {name: (["prompt", "circuit"], [[1.0] * 2, [0.0] * 2]) for name in ("faithfulness", "completeness")}
    ends = {"all": ("prompt", [4.0, 0.5]), "none": ("prompt", [1.0, 1.5])}
    own = dict(zip(("cpr", "cmd"), areas(np.array([0.2, 0.5]), np.array([[1.0] * 2, [0.0] * 2])), strict=True))
    own = {name: ("prompt", values) for name, values in own.items()}
    given = xr.Dataset({**held, **ends, **own}, {"share": ("circuit", [0.2, 0.5])})
    found = with_means(given, np.ones((2, 1, 2)), None)
    assert (found.faithfulness_mean == 0.75).all() and (found.random == 1.0).all()
    assert found.cpr_mean.item() == pytest.approx(0.7375) and found.cmd_mean.item() == pytest.approx(0.2625)


def test_one_circuit_has_no_area() -> None:
    assert np.isnan(areas(np.array([0.5]), np.array([[1.0]]))).all()
    assert np.isnan(areas(np.array([0.0, 0.5, 1.0]), np.array([[0.0, 1.0, 1.0]]))).all()


@zoo.second_environment
def test_examples_without_anything_to_lose_have_no_faithfulness(hops: Path) -> None:
    found = mv.circuit_faithfulness(hops.vlm, circuit_of(hops), hops.target, hops.target, PLANTED, controls=2)
    assert (
        np.isnan(found.faithfulness).all() and np.isnan(found.faithfulness_mean).all() and np.isnan(found.p_value).all()
    )


@zoo.second_environment
def test_a_folder_of_a_circuits_runs_is_none_of_all_edges_but_its(hops: Path, tmp_path: Any) -> None:
    measured(hops, circuit_of(hops), out=tmp_path)
    with pytest.raises(ValueError, match="holds another experiment"):
        measured(hops, ~circuit_of(hops), out=tmp_path)


@zoo.second_environment
def test_questions_about_one_picture_are_one_cluster(hops: Path) -> None:
    targets, sources = [hops.target, hops.target, hops.source], [hops.source, hops.source, hops.target]
    found = mv.circuit_faithfulness(hops.vlm, circuit_of(hops), sources, targets, PLANTED, controls=0)
    assert "over 2 clusters" in found.attrs["interval"]


def test_where_shares_are_logarithms_no_edges_have_no_place(hops: Path) -> None:
    whole = measured(hops, [mv.Circuit(), circuit_of(hops)])
    few: Any = mv.plot.faithfulness(whole.assign_coords(share=("circuit", [0.0, 0.01])))
    many: Any = mv.plot.faithfulness(whole.assign_coords(share=("circuit", [0.0, 0.5])))
    assert [trace.x.tolist() for trace in few.data if trace.name == "without it"] == [[0.01]]
    assert [trace.x.tolist() for trace in many.data if trace.name == "without it"] == [[0.0, 0.5]]


def test_a_single_circuit_is_drawn_with_its_interval_and_the_caption_says_of_what_it_is_a_share(hops: Path) -> None:
    found = measured(hops, [circuit_of(hops)]).assign_attrs(interval="95% interval")
    found["faithfulness_low"], found["faithfulness_high"] = (
        found.faithfulness_mean - 0.25,
        found.faithfulness_mean + 0.5,
    )
    figure: Any = mv.plot.faithfulness(found)
    (bar,) = [trace.error_y for trace in figure.data if trace.name == "circuit"]
    assert (bar.array[0], bar.arrayminus[0]) == (pytest.approx(0.5), pytest.approx(0.25))
    ends = f"1: {found.attrs['metric']} with all of them, on average {float(found['all'].mean()):.3g}; 0: with none"
    assert ends in " ".join(figure.layout.annotations[-1].text.split("<br>"))


@zoo.second_environment
def test_the_curve_has_the_circuits_in_the_order_of_their_size(hops: Path) -> None:
    found = measured(hops, [~mv.Circuit(), circuit_of(hops)], controls=2)
    figure: Any = mv.plot.faithfulness(found)
    shown = {trace.name: trace for trace in figure.data if trace.mode == "lines+markers"}
    assert list(shown) == ["circuit", "without it", "random"]
    assert list(shown["circuit"].x) == sorted(found.share.values) and shown["circuit"].y[0] == pytest.approx(
        1, abs=1e-6
    )
