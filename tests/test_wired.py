"""A model run as a circuit: each reader is given the sum of what its edges carry, and nothing else."""

from typing import Any

import numpy as np
import pytest
import tiny
import torch
import zoo
from torch import Tensor

import mechvlm as mv
from mechvlm.experiments.circuit_runs import circuit_metrics
from mechvlm.experiments.edge_checks import patched_exactly
from mechvlm.experiments.edge_scores import graph_of
from mechvlm.nodes import feeds, readers, writers

Edge = tuple[str, str, str | None]
pytestmark = zoo.second_environment


def metric(logits: Tensor) -> Tensor:
    return logits[:, 30] - logits[:, 31]


def every_edge(vlm: mv.VLM) -> list[Edge]:
    return [(w, r, None) for r in readers(vlm.shape) for w in writers(vlm.shape) if feeds(vlm.shape, w, r)]


def pair(name: str) -> tuple[mv.VLM, mv.Prompt, mv.Prompt]:
    vlm = zoo.build(name, "eager" if name in zoo.EAGER_ONLY else "sdpa", torch.float64)
    first, second = (zoo.ask(vlm, tiny.picture(seed, 48, 48)) for seed in (1, 2))
    return vlm, first, second


class ByHand:
    """A Llama-like language model run reader by reader in plain torch, over what two runs wrote."""

    def __init__(self, vlm: mv.VLM, target: mv.Prompt) -> None:
        self.vlm, self.text = vlm, vlm.hf.model.language_model
        self.spans = target.spans
        first = vlm.run(target, read=["text.0.resid_pre"])["text.0.resid_pre"][0]
        image = torch.zeros_like(first)
        image[target.image] = first[target.image]
        self.entering = {"embed": first - image, "image": image}

    def run(self, edges: list[Edge] | None, other: dict[str, Tensor] | None) -> dict[str, Tensor]:
        """What each part writes, and "logits"; where `edges` is None, along every edge goes this run's own."""
        here = dict(self.entering)
        shape, text = self.vlm.shape, self.text

        def stream(reader: str) -> Tensor:
            total = torch.zeros_like(self.entering["embed"])
            for writer in (w for w in writers(shape) if feeds(shape, w, reader)):
                if edges is None or other is None:
                    total = total + here[writer]
                    continue
                part = other[writer].clone()
                for _, _, span in (e for e in edges if e[:2] == (writer, reader)):
                    at = slice(None) if span is None else self.spans[span]
                    part[at] = here[writer][at]
                total = total + part
            return total

        length = len(self.entering["embed"])
        at = torch.arange(length)[None]
        cos, sin = text.rotary_emb(self.entering["embed"][None], at)
        unseen = torch.full((length, length), -torch.inf, dtype=torch.float64).triu(1)
        for index, layer in enumerate(text.layers):
            own = layer.self_attn
            size, group = own.head_dim, own.num_key_value_groups
            keys, values = [], []
            for head in range(shape.kv_heads["text"]):
                rows = slice(head * size, (head + 1) * size)
                normed = [layer.input_layernorm(stream(f"a{index}.kv{head}<{of}>")) for of in "kv"]
                keys.append(turned(normed[0] @ own.k_proj.weight[rows].T, cos, sin))
                values.append(normed[1] @ own.v_proj.weight[rows].T)
            for head in range(shape.heads["text"]):
                rows = slice(head * size, (head + 1) * size)
                normed_q = layer.input_layernorm(stream(f"a{index}.h{head}<q>"))
                query = turned(normed_q @ own.q_proj.weight[rows].T, cos, sin)
                scores = query @ keys[head // group].T * size**-0.5 + unseen
                z = scores.softmax(-1) @ values[head // group]
                here[f"a{index}.h{head}"] = z @ own.o_proj.weight[:, rows].T
            here[f"m{index}"] = layer.mlp(layer.post_attention_layernorm(stream(f"m{index}")))
        here["logits"] = self.vlm.hf.lm_head(text.norm(stream("logits")))[-1:]
        return here


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, written out."""
    half = x.shape[-1] // 2
    return x * cos[0] + torch.cat([-x[:, half:], x[:, :half]], -1) * sin[0]


@zoo.second_environment
def test_what_many_parts_wrote_is_summed_in_single_precision_at_least() -> None:
    def difference(logits: Tensor) -> Tensor:
        return logits[:, 30].float() - logits[:, 31].float()

    gaps = []
    for seed in range(3):
        model: Any = tiny.model(2, "sdpa", torch.bfloat16, layers=6, heads=32, width=64, seed=seed)
        vlm = mv.VLM(model, tiny.processor())
        target, source = (vlm.prompt(tiny.picture(number), "is there a red cat ?") for number in (1, 2))
        found = circuit_metrics(vlm, target, source, [[]], difference)
        gaps.append(abs(float(found[0]) - float(difference(vlm.run(source).logits)[0])))
    assert np.mean(gaps) < 0.035  # where sums are in half precision 0.06


@pytest.mark.parametrize("name", ["llava", "llava_next-mistral"])
def test_some_edges_give_what_a_forward_pass_reader_by_reader_gives(name: str) -> None:
    vlm, target, source = pair(name)
    draw = np.random.default_rng(0)
    spans = [None, "image", "question", "last"]
    edges = [(w, r, spans[draw.integers(4)]) for w, r, _ in every_edge(vlm) if draw.random() < 0.6]
    with torch.no_grad():
        other = ByHand(vlm, source).run(None, None)
        expected = float(metric(ByHand(vlm, target).run(edges, other)["logits"]))
        plain = float(metric(vlm.run(target).logits))
    found = circuit_metrics(vlm, target, source, [edges], metric)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)  # logits are read in single precision
    assert abs(expected - plain) > 1e-3


@pytest.mark.parametrize("name", sorted(set(zoo.VARIANTS) - {"mllama"}))
def test_all_edges_are_the_prompts_own_run_and_none_the_others(name: str) -> None:
    if zoo.there(name):
        pytest.skip(zoo.there(name))
    vlm, target, source = pair(name)
    found = circuit_metrics(vlm, target, source, [every_edge(vlm), []], metric)
    expected = [float(metric(vlm.run(prompt).logits)) for prompt in (target, source)]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)
    assert abs(expected[0] - expected[1]) > 1e-3


@pytest.mark.parametrize("name", sorted(set(zoo.VARIANTS) - {"mllama"}))
def test_what_a_circuit_loses_with_one_edge_is_that_edges_patch(name: str) -> None:
    if zoo.there(name):
        pytest.skip(zoo.there(name))
    vlm, target, source = pair(name)
    spans, every, draw = list(target.spans), every_edge(vlm), np.random.default_rng(0)
    some = [every[at][:2] for at in draw.choice(len(every), 20, replace=False)]
    places = draw.integers(len(spans), size=len(some)).tolist()
    graph = graph_of(vlm, target, list(target.spans.values()))
    patches = [(*ends, at) for ends, at in zip(some, places, strict=True)]
    changes, own, _ = patched_exactly(vlm, source, target, metric, graph, patches)
    circuits: list[list[Edge]] = [
        [edge for edge in every if edge[:2] != ends] + [(*ends, span) for span in spans if span != spans[at]]
        for ends, at in zip(some, places, strict=True)
    ]
    found = circuit_metrics(vlm, target, source, circuits, metric)
    np.testing.assert_allclose(found - own["target"], changes, rtol=0, atol=1e-9)
    assert np.abs(changes).max() > 1e-4


def test_circuits_side_by_side_give_what_each_gives_alone() -> None:
    vlm, target, source = pair("llava_next-mistral")
    every, draw = every_edge(vlm), np.random.default_rng(1)
    circuits: Any = [[edge for edge in every if draw.random() < share] for share in (0.2, 0.5, 0.9)]
    together = circuit_metrics(vlm, target, source, circuits, metric)
    alone = [circuit_metrics(vlm, target, source, [one], metric, batch_size=1)[0] for one in circuits]
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-9)


def test_an_edge_matters_only_where_a_kept_path_leads_to_it() -> None:
    vlm, target, source = pair("llava")
    isolated = [("a0.h1", "m1", None)]
    found = circuit_metrics(vlm, target, source, [isolated, []], metric)
    assert found[0] == found[1]


def test_the_mean_of_several_prompts_stands_for_what_is_left_out() -> None:
    vlm, target, source = pair("llava")
    third = zoo.ask(vlm, tiny.picture(3, 48, 48))
    last = f"text.{vlm.shape.layers['text'] - 1}.resid_post"
    streams = [vlm.run(prompt, read=[last])[last][0, -1] for prompt in (source, third)]
    expected = float(metric(vlm.unembed(sum(streams)[None] / 2)))
    found = circuit_metrics(vlm, target, [source, third], [[]], metric)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
