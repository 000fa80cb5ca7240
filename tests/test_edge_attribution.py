"""Edge attribution: planted edges and no others, a hand-written forward pass with one input a reader, exact patches."""

import itertools
from functools import partial
from typing import Any

import numpy as np
import planted
import planted_paths
import pytest
import tiny
import torch
import xarray as xr
import zoo
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

import mechvlm as mv
from mechvlm.experiments.circuit_runs import circuit_metrics
from mechvlm.experiments.edge_turns import ALONG
from mechvlm.nodes import feeds, readers, writers

YES = mv.logit_difference("yes", "no")
PLANTED = mv.logit_difference(planted.YES, planted.NO)
HEADS, GROUP, WIDTH = 4, 2, 8


@pytest.fixture(scope="module")
def vlm() -> mv.VLM:
    model = tiny.model(2, "sdpa", torch.float64, layers=2)
    for parent in (model.model.language_model, *model.model.language_model.layers):
        for name, norm in list(parent.named_children()):
            if type(norm) is LlamaRMSNorm:  # which computes in single precision, whatever it is given
                exact = torch.nn.RMSNorm(len(norm.weight), norm.variance_epsilon, dtype=torch.float64)
                exact.load_state_dict(norm.state_dict())
                parent.register_module(name, exact.requires_grad_(False))
    return mv.VLM(model, tiny.processor())


@pytest.fixture(scope="module")
def found(vlm: mv.VLM, real: mv.Prompt, other: mv.Prompt) -> xr.Dataset:
    return mv.edge_attribution(vlm, real, other, YES, method="eap", spans="each", verify=4)


class ByHand:
    """A Llama whose readers each have an input of their own, in plain torch: the stream and a leaf beside it."""

    def __init__(self, vlm: mv.VLM, prompt: mv.Prompt) -> None:
        self.text, self.vlm = vlm.hf.model.language_model, vlm
        first = vlm.run(prompt, read=["text.0.resid_pre"])["text.0.resid_pre"][0]
        self.leaves = {name: torch.zeros_like(first, requires_grad=True) for name in readers(vlm.shape)}
        image = torch.zeros_like(first)
        image[prompt.image] = first[prompt.image]
        self.writes = {"embed": first - image, "image": image}
        self.value = self.run(first)

    def taken(self, stream: Tensor, layer: Any, name: str, matrix: Any, head: int) -> Tensor:
        rows = slice(head * WIDTH, (head + 1) * WIDTH)
        return layer.input_layernorm(stream + self.leaves[name]) @ matrix.weight[rows].T

    def run(self, stream: Tensor) -> Tensor:
        places = torch.arange(len(stream))[None]
        cos, sin = self.text.rotary_emb(stream[None], places)
        seen = torch.ones(len(stream), len(stream), dtype=torch.bool).tril()
        for number, layer in enumerate(self.text.layers):
            attention, taken = layer.self_attn, partial(self.taken, stream, layer)

            for head in range(HEADS):
                shared = head // GROUP
                q = taken(f"a{number}.h{head}<q>", attention.q_proj, head)
                k = taken(f"a{number}.kv{shared}<k>", attention.k_proj, shared)
                v = taken(f"a{number}.kv{shared}<v>", attention.v_proj, shared)
                q, k = (x[0, 0] for x in apply_rotary_pos_emb(q[None, None], k[None, None], cos, sin))
                pattern = (q @ k.T / WIDTH**0.5).masked_fill(~seen, -torch.inf).softmax(-1)
                out = attention.o_proj.weight[:, head * WIDTH : (head + 1) * WIDTH]
                self.writes[f"a{number}.h{head}"] = (pattern @ v) @ out.T
            stream = stream + sum(self.writes[f"a{number}.h{head}"] for head in range(HEADS))
            given = layer.post_attention_layernorm(stream + self.leaves[f"m{number}"])
            self.writes[f"m{number}"] = layer.mlp(given)
            stream = stream + self.writes[f"m{number}"]
        logits = self.vlm.hf.lm_head(self.text.norm(stream + self.leaves["logits"]))[-1]
        yes, no = (logits[self.vlm.token_ids(word)].logsumexp(0) for word in ("yes", "no"))
        return yes - no


def by_hand(vlm: mv.VLM, source: mv.Prompt, target: mv.Prompt) -> dict[tuple[str, str], Tensor]:
    """(source - target) of each write times the gradient at each leaf, at each position."""
    one, here = ByHand(vlm, source), ByHand(vlm, target)
    slopes = dict(zip(here.leaves, torch.autograd.grad(here.value, list(here.leaves.values())), strict=True))
    edges = itertools.product(writers(vlm.shape), readers(vlm.shape))
    return {
        (writer, reader): ((one.writes[writer] - here.writes[writer]) * slopes[reader]).sum(-1).detach()
        for writer, reader in edges
        if feeds(vlm.shape, writer, reader)
    }


def test_scores_are_those_of_a_pass_in_which_every_reader_has_an_input_of_its_own(
    vlm: mv.VLM, real: mv.Prompt, other: mv.Prompt, found: xr.Dataset
) -> None:
    expected = by_hand(vlm, real, other)
    assert int(found.score.isel(span=0).notnull().sum()) == len(expected)
    sizes = []
    for (writer, reader), products in expected.items():
        for span in found.span.values:
            score = float(found.score.sel(writer=writer, reader=reader, span=span))
            assert score == pytest.approx(float(products[other.spans[span]].sum()), abs=1e-10)
            sizes.append(abs(score))
    assert max(sizes) > 0.1 and np.mean(np.array(sizes) > 1e-5) > 0.2


def test_spans_add_up_to_all_positions(vlm: mv.VLM, real: mv.Prompt, other: mv.Prompt, found: xr.Dataset) -> None:
    own = {"all but one": range(1, len(other)), "one": [0]}
    for spans in (None, own):
        again = mv.edge_attribution(vlm, real, other, YES, method="eap", spans=spans).score
        assert again.dims == (("writer", "reader") if spans is None else ("writer", "reader", "span"))
        total = again if spans is None else again.sum("span", skipna=False)
        xr.testing.assert_allclose(total, found.score.sum("span", skipna=False), rtol=0, atol=1e-12)


def test_an_exact_edge_is_what_the_circuit_without_it_loses(
    vlm: mv.VLM, real: mv.Prompt, other: mv.Prompt, found: xr.Dataset
) -> None:
    of = found.isel(kind=0)
    nodes = range(of.sizes["node"])
    patched = [tuple(str(of[f"node_{name}"].values[at]) for name in ("writer", "reader", "span")) for at in nodes]
    pairs = itertools.product(writers(vlm.shape), readers(vlm.shape))
    every = [(w, r, span) for w, r in pairs if feeds(vlm.shape, w, r) for span in other.spans]
    circuits: list[Any] = [[edge for edge in every if edge != one] for one in patched]
    metrics = circuit_metrics(vlm, other, real, circuits, YES)
    assert of.exact.values == pytest.approx(metrics - found.attrs["target_metric"], abs=1e-10)
    assert of.drawn.values.tolist() == ["top"] * 4 + ["random"] * 4
    for at, (writer, reader, span) in enumerate(patched):
        assert float(of.estimate[at]) == float(found.score.sel(writer=writer, reader=reader, span=span))
    assert np.abs(found.score.values[found.score.notnull().values]).max() == np.abs(of.estimate.values).max()


@pytest.mark.parametrize(
    ("build", "method"),
    [
        (planted_paths.twins, "eap"),
        (planted_paths.two_hops, "eap-ig"),
        pytest.param(planted_paths.twins, "ig-activations", marks=zoo.second_environment),
        pytest.param(planted_paths.two_hops, "clean-corrupted", marks=zoo.second_environment),
    ],
)
def test_planted_edges_are_found_and_no_others(build: Any, method: str) -> None:
    made = build()
    asked: dict[str, Any] = {"steps": 1} if method in ALONG else {}
    found = mv.edge_attribution(made.vlm, made.source, made.target, PLANTED, method, spans="each", verify=2, **asked)
    gap = found.attrs["source_metric"] - found.attrs["target_metric"]
    score = found.score.copy()
    for (writer, reader, span), share in made.edges.items():
        place = {"writer": writer, "reader": reader, "span": span}
        assert float(score.sel(place)) == pytest.approx(share * gap, rel=1e-5)
        score.loc[place] = 0
    assert not np.nan_to_num(score.values).any()
    assert found.exact.values[0, :2] == pytest.approx(found.estimate.values[0, :2], rel=1e-5)
    assert not found.exact.values[0, 3:].any()


def test_a_prompt_patched_with_itself_changes_nothing(vlm: mv.VLM, real: mv.Prompt) -> None:
    found = mv.edge_attribution(vlm, real, real, YES, steps=1)
    assert not np.nan_to_num(found.score.values).any()
    assert found.attrs["note"] == "source and target are the same prompt, so no patch changes anything"


def test_spans_may_be_a_function_of_the_target(vlm: mv.VLM, real: mv.Prompt, other: mv.Prompt) -> None:
    method = "information-flow-routes"
    found, named = (
        mv.edge_attribution(vlm, real, other, YES, method, spans=spans)
        for spans in (mv.image_regions, mv.image_regions(other))
    )
    xr.testing.assert_identical(found.score, named.score)


@zoo.second_environment
def test_gradients_at_both_ends_are_averaged(vlm: mv.VLM, real: mv.Prompt, other: mv.Prompt, found: xr.Dataset) -> None:
    both = mv.edge_attribution(vlm, real, other, YES, "clean-corrupted").score
    there = mv.edge_attribution(vlm, other, real, YES, "eap").score
    here = found.score.sum("span", skipna=False)
    xr.testing.assert_allclose(both, (here - there) / 2, rtol=0, atol=1e-12)


@zoo.second_environment
def test_points_lie_where_they_are_said_to(vlm: mv.VLM, real: mv.Prompt, other: mv.Prompt, found: xr.Dataset) -> None:
    here = found.score.sum("span", skipna=False)
    at_target = mv.edge_attribution(vlm, real, other, YES, steps=1, rule="left").score
    xr.testing.assert_allclose(at_target, here, rtol=0, atol=1e-12)
    at_source = mv.edge_attribution(vlm, real, other, YES, steps=1, rule="right").score
    both = mv.edge_attribution(vlm, real, other, YES, steps=2, rule="left").score
    middle = mv.edge_attribution(vlm, real, other, YES, steps=1).score
    xr.testing.assert_allclose(both, (middle + here) / 2, rtol=0, atol=1e-12)
    assert float(np.abs(at_source - here).max()) > 1e-3


def test_shares_of_what_is_read_are_distances(vlm: mv.VLM, real: mv.Prompt, other: mv.Prompt) -> None:
    here, last = ByHand(vlm, other), other.last
    found = mv.edge_attribution(vlm, real, other, YES, "information-flow-routes", spans={"last": last}).score
    writes = torch.stack([here.writes[name][last[0]] for name in writers(vlm.shape)]).detach()
    stream = writes.sum(0)
    near = (stream.abs().sum() - (stream - writes).abs().sum(-1)).clamp(min=0)
    assert found.sel(reader="logits", span="last").values == pytest.approx((near / near.sum()).numpy(), abs=1e-12)
    assert float(found.sel(reader="m1").sum()) == pytest.approx(1)


@zoo.second_environment
def test_memory_for_positions_is_a_matter_of_pieces(
    vlm: mv.VLM, real: mv.Prompt, other: mv.Prompt, found: xr.Dataset
) -> None:
    small = mv.VLM(vlm.hf, vlm.processor, attention_budget=40_000)
    again = mv.edge_attribution(small, real, other, YES, "eap", spans="each").score
    xr.testing.assert_allclose(again, found.score, rtol=0, atol=1e-12)


@zoo.second_environment
def test_all_edges_patched_are_what_was_verified(
    vlm: mv.VLM, real: mv.Prompt, other: mv.Prompt, found: xr.Dataset
) -> None:
    exact = mv.edge_attribution(vlm, real, other, YES, "exact", spans={"last": other.last}).score
    assert (exact.isnull() == found.score.isel(span=0).isnull()).squeeze("span").all()
    of = found.isel(kind=0)
    last = [at for at in range(of.sizes["node"]) if of.node_span.values[at] == "last"]
    assert last
    for at in last:
        place = {"writer": str(of.node_writer[at].values), "reader": str(of.node_reader[at].values), "span": "last"}
        assert float(exact.sel(place)) == pytest.approx(float(of.exact[at]), abs=1e-10)


@zoo.second_environment
def test_a_layers_own_way_to_the_source_is_exact_where_it_writes_to_the_answer_alone(
    vlm: mv.VLM, real: mv.Prompt, other: mv.Prompt
) -> None:
    found = mv.edge_attribution(vlm, real, other, YES, "ig-activations", steps=12)
    pairs = itertools.product(writers(vlm.shape), readers(vlm.shape))
    circuit: list[Any] = [(w, r, None) for w, r in pairs if feeds(vlm.shape, w, r) and (w, r) != ("m1", "logits")]
    exact = circuit_metrics(vlm, other, real, [circuit], YES)[0] - found.attrs["target_metric"]
    assert float(found.score.sel(writer="m1", reader="logits")) == pytest.approx(exact, rel=1e-2)


def test_shared_keys_stand_before_the_middle_of_their_heads_under_their_own_name(found: xr.Dataset) -> None:
    spots, of_circuit = (
        dict(zip(figure.data[-1].text, zip(figure.data[-1].x, figure.data[-1].y, strict=True), strict=True))
        for figure in (mv.plot.edges(found, top=300), mv.plot.circuit(mv.choose_circuit(found, 20)))
    )
    assert spots["a1.h2"] == (1.0, 2.0)
    assert spots["a1.kv1"][0] < 1.0 and spots["a1.kv1"][1] == 2.5
    assert of_circuit.items() <= spots.items()


def test_the_figure_has_the_largest_edges_where_they_belong(found: xr.Dataset) -> None:
    figure: Any = mv.plot.edges(found, top=5)
    lines = [trace for trace in figure.data if trace.mode == "lines" and trace.hovertext is not None]
    scores = found.score.stack(edge=("writer", "reader", "span")).dropna("edge")
    largest = scores[np.argsort(-np.abs(scores.values))[:5]]
    for line, score in zip(reversed(lines), largest, strict=True):
        writer, reader, span = score.edge.item()
        names = f"{writer} -> {reader}".replace("<", "&lt;").replace(">", "&gt;").replace("-&gt;", "->")
        assert line.hovertext[0].startswith(f"{names}, {span}<br>score {float(score):+.4g}")
    assert lines[-1].hovertext[0].endswith(f"<b>exact {float(found.exact[0, 0]):+.4g}</b>")
    assert [line.line.width for line in lines] == sorted(line.line.width for line in lines)
    one: Any = mv.plot.edges(found, top=1)  # nodes stand where they do beside others
    assert one.data[0].x == lines[-1].x and one.layout.yaxis.range == figure.layout.yaxis.range
    assert [trace.name for trace in figure.data if trace.showlegend is None] == ["raises the metric", "lowers it"]
    caption = figure.layout.annotations[0].text.replace("<br>", " ")
    assert "at 95 % confidence" in caption and f"precision {float(found.precision[0]):.2f} of those patched" in caption
    few: Any = mv.plot.edges(found.assign(pearson=found.pearson * np.nan), top=5)  # as where two were patched
    assert "too few for r, or all alike, among the top" in few.layout.annotations[0].text.replace("<br>", " ")
    shares = found.drop_vars(["missed", "missed_share"])
    grey: Any = mv.plot.edges(shares.assign_attrs(method="information-flow-routes"), top=5)
    assert not grey.layout.showlegend and len({line.line.color for line in grey.data[:-1]}) == 1
    assert [trace.name for trace in mv.plot.attributed(shares).data] == ["edge, top", "edge, random"]
    drawn: Any = mv.plot.attributed(found)
    assert [trace.name for trace in drawn.data] == ["estimate = exact", "edge, top", "edge, random"]
