"""Attention cut between spans: what the first token loses, and what is written."""

from collections.abc import Sequence
from functools import cache
from html import unescape
from typing import Any

import jaxtyping
import numpy as np
import plain
import planted
import pytest
import tiny
import torch
import xarray as xr
import zoo
from torch import Tensor

import mechvlm as mv
from mechvlm.experiments.edges import random_keys, reach

METRIC = mv.logit_difference(planted.YES, planted.NO)


@cache
def pair() -> tuple[mv.VLM, Any, mv.Prompt]:
    """A random model, the same weights for hooks of plain torch, and a prompt with a picture."""
    vlm = tiny.vlm(dtype=torch.float64)
    return vlm, tiny.model(attention="eager", dtype=torch.float64), vlm.prompt(tiny.picture(), "is there a dog ?")


def by_hand(
    model: Any, encoding: dict[str, Tensor], queries: Sequence[int], keys: Sequence[int], layers: Sequence[int]
) -> Tensor:
    """The logits of all positions with scores set to minus infinity by hand."""

    def cut(scores: Tensor) -> Tensor:
        for query in queries:
            scores[..., query, list(keys)] = -torch.inf
        return scores

    return plain.Plain(model, [(("scores", layer, "text"), cut, "value") for layer in layers])(encoding)[0]


@pytest.mark.parametrize("layer, window", [(2, 1), (0, 3)])
def test_the_answer_is_lost_in_windows_that_hold_the_planted_layer_and_along_the_planted_edge(
    layer: int, window: int
) -> None:
    vlm, real, *_ = planted.planted(layer)
    found = mv.information_flow(vlm, real, METRIC, window=window, controls=0).change[0]
    lost = [centre for centre in range(3) if reach(centre, window, 3)[0] <= layer <= reach(centre, window, 3)[1]]
    clean = vlm.metric(METRIC)(vlm.run(real).logits).item()
    expected = xr.zeros_like(found)
    expected.loc[{"edge": "image->last", "layer": lost}] = -clean
    xr.testing.assert_allclose(found, expected, atol=float(4 * np.spacing(np.float32(clean))))


def test_every_edge_and_window_is_what_hooks_by_hand_give() -> None:
    vlm, model, real = pair()
    parts = [real.image[:5], real.image[5:]]
    edges = ["image->question", "rest->last", "last->last"]
    found = mv.information_flow(vlm, real, edges=edges, objects=[parts[0]], window=2, seed=4)
    top, draw = int(vlm.run(real).logits.argmax()), np.random.default_rng(4)
    named = {**real.spans, "object": parts[0], "rest": parts[1]}
    for edge in found.edge.values:
        source, target = edge.split("->")
        each = [(found.metric[0], named[source]), (None, random_keys(real, (named[target], named[source]), draw))]
        for measured, keys in each:
            for layer in range(3):
                logits = by_hand(model, real.encoding, named[target], keys, range(max(0, layer - 1), layer + 1))
                chance = logits[-1].softmax(-1)[top].item()
                if measured is not None:
                    assert measured.sel(edge=edge, layer=layer) == pytest.approx(chance, abs=1e-9)
                change = (found.change if measured is not None else found.control.isel(sample=0))[0]
                there = 100 * (chance / found.base[0].item() - 1)
                assert change.sel(edge=edge, layer=layer) == pytest.approx(there, abs=1e-6)


def test_a_window_of_an_even_number_has_that_many_layers_and_groups_are_taken_as_they_are() -> None:
    assert [reach(10, size, 32) for size in (1, 9, 10)] == [(10, 10), (6, 14), (5, 14)]
    vlm, model, real = pair()
    found = mv.information_flow(vlm, real, mv.log_probability(7), edges=["image->last"], layers=[(0, 1), (1, 2)])
    assert found.layer.values.tolist() == ["0-1", "1-2"]
    for first, last in ((0, 1), (1, 2)):
        logits = by_hand(model, real.encoding, real.last, real.image, [first, last])[-1]
        measured = found.metric[0].sel(edge="image->last", layer=f"{first}-{last}")
        assert measured == pytest.approx(logits.log_softmax(-1)[7].item(), abs=1e-9)


def test_random_keys_are_earlier_and_neither_queries_nor_bos() -> None:
    _, _, real = pair()
    edge = (real.question, real.image)
    drawn = random_keys(real, edge, np.random.default_rng(0))
    assert len(drawn) == len(set(drawn)) == len(real.image)
    assert not set(drawn) & {*real.question, *real.bos} and max(drawn) < max(real.question)
    assert drawn != random_keys(real, edge, np.random.default_rng(1))
    assert random_keys(real, ([0], [0]), np.random.default_rng(0)) == []


def test_a_prompt_that_is_answered_wrong_does_not_count() -> None:
    vlm, bright, dark, *_ = planted.planted()
    given: dict[str, Any] = {"edges": ["image->last"], "window": 1, "controls": 0}
    found = mv.information_flow(vlm, [bright, dark], answers=[planted.YES, planted.YES], **given)
    assert found.answered_right.values.tolist() == [True, False]
    assert found.change[1].isnull().all() and found.base[1] < 0.5
    alone = mv.information_flow(vlm, bright, **given)
    np.testing.assert_array_equal(found["mean"], alone.change[0])


def test_prompts_about_one_picture_are_one_cluster() -> None:
    vlm, bright, dark, *_ = planted.planted()
    given: dict[str, Any] = {"edges": ["image->last"], "window": 1, "controls": 0, "metric": METRIC}
    same = mv.information_flow(vlm, [bright, bright], **given)
    assert same.low.isnull().all() and same.high.isnull().all() and same["mean"].notnull().all()
    two = mv.information_flow(vlm, [bright, dark], **given)
    assert (two.low <= two["mean"]).all() and (two["mean"] <= two.high).all() and two.low.notnull().all()
    assert mv.information_flow(vlm, [bright, bright], clusters=["a", "b"], **given).low.notnull().all()


def test_prompts_without_pictures_stand_alone_and_clusters_are_counted() -> None:
    vlm = planted.planted()[0]
    words = [vlm.prompt(encoding={"input_ids": torch.tensor([[1, 2, last, planted.LAST]])}) for last in (3, 4)]
    given: dict[str, Any] = {"edges": ["question->last"], "window": 1, "controls": 0, "metric": METRIC}
    assert mv.information_flow(vlm, words, **given).low.notnull().all()
    with pytest.raises(ValueError, match=r"clusters=\['a'\] must name one cluster for each of the 2 prompts\."):
        mv.information_flow(vlm, words, clusters=["a"], **given)


def test_an_edge_from_a_picture_behind_cross_attention_is_refused() -> None:
    vlm = zoo.build("mllama")
    with pytest.raises(ValueError, match="sees the picture by cross-attention, in layer"):
        mv.information_flow(vlm, zoo.ask(vlm, tiny.picture()), mv.log_probability(7))


def answered_by_hand(when: str, span: str, layers: Sequence[int], steps: int) -> tuple[list[int], float]:
    """A greedy answer, each step over the whole text anew, and the log-probability of the uncut one."""
    vlm, model, real = pair()
    clean = vlm.generate(real, max_new_tokens=steps, do_sample=False).tokens
    start, ids, said = real.encoding["input_ids"], real.encoding["input_ids"], []

    def logits(ids: Tensor) -> Tensor:
        behind = range(len(real), ids.shape[1])
        rows = [*(real.last if when != "decode" else []), *(behind if when != "prompt" else [])]
        given = {**real.encoding, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return by_hand(model, given, rows, real.spans[span], layers)

    for _ in range(steps):
        said.append(int(logits(ids)[-1].argmax()))
        ids = torch.cat([ids, torch.tensor([said[-1:]])], 1)
    whole = logits(torch.cat([start, clean[:, :-1]], 1))[len(real) - 1 :].log_softmax(-1)
    return said, float(whole.gather(-1, clean[0, :, None]).sum())


@pytest.mark.parametrize("when", ["always", "decode", "prompt"])
def test_answers_under_a_cut_are_what_the_whole_text_run_again_gives(when: str) -> None:
    vlm, _, real = pair()
    found = mv.knockout_answers(vlm, real, ["image->last"], layers=[(0, 2)], when=when, max_new_tokens=4)
    said, likely = answered_by_hand(when, "image", range(3), 4)
    clean = vlm.generate(real, max_new_tokens=4, do_sample=False).tokens[0].tolist()
    differs = [step for step in range(4) if said[step] != clean[step]]
    assert found.text.item() == vlm.processor.decode(said, skip_special_tokens=True).strip()
    assert found.first_difference.item() == (differs[0] if differs else -1) and bool(found.same) == (not differs)
    assert found.log_probability.item() == pytest.approx(likely, abs=1e-8)
    assert (when == "decode") == (found.token_log_probability[0, 0, 0] == found.clean[0])


def test_a_cut_that_matters_to_nothing_changes_no_answer() -> None:
    vlm, real, *_ = planted.planted(layer=1)
    found = mv.knockout_answers(vlm, real, ["question->last", "image->last"], window=1, max_new_tokens=2)
    assert found.same.sel(edge="question->last").all() and found.same.sel(edge="image->last").values.tolist()[::2] == [
        True,
        True,
    ]
    assert not found.same.sel(edge="image->last", layer=1)
    np.testing.assert_allclose(found.log_probability.sel(edge="question->last"), float(found.clean.sum()), atol=1e-6)


WRONG: list[tuple[str, dict[str, Any]]] = [
    ("window=0 cuts no layer; give 1 or more.", {"window": 0}),
    (
        "layers holds 3, and the layers of this model are 0 to 2; give centres, or pairs of a first and a last layer.",
        {"layers": [0, 3]},
    ),
    (
        "layers holds (2, 1), and the layers of this model are 0 to 2; give centres, or pairs of a first and a last "
        "layer.",
        {"layers": [(2, 1)]},
    ),
    (
        "'sky->last' is no edge of this prompt; write source->target, each one of prefix, image, question, last.",
        {"edges": ["sky->last"]},
    ),
    ("the edge 'mine' is 3; give its queries and its keys, two lists of positions.", {"edges": {"mine": 3}}),
    ("edges=[] holds no edge; give names such as ['image->last'], or {name: (queries, keys)}.", {"edges": []}),
    ("controls=-1 is no number of random cuts; give 0 or more.", {"controls": -1}),
    ("there are 2 answers and 1 prompts; give one for each.", {"answers": [5, 6]}),
    (
        "objects=[[2], [3]] is not one object for each of 1 prompts; give a list of them, or a function from a prompt "
        "to its image tokens.",
        {"objects": [[2], [3]]},
    ),
    (
        "the object holds position 1, which is no image token of this prompt; give some of prompt.image.",
        {"objects": [[1]]},
    ),
    ("the object holds no image token; give some of prompt.image.", {"objects": [[]]}),
]


@pytest.mark.parametrize("message, wrong", WRONG, ids=[message[:30] for message, _ in WRONG])
def test_what_is_refused(message: str, wrong: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    vlm, real, *_ = planted.planted()
    with pytest.raises((ValueError, TypeError)) as caught:
        mv.information_flow(vlm, real, **wrong)
    assert str(caught.value) == message


def test_prompts_with_other_edges_are_refused() -> None:
    vlm, _, real = pair()
    with pytest.raises(ValueError) as caught:
        mv.information_flow(vlm, [real, vlm.prompt(None, "is there")])
    assert str(caught.value) == (
        "the edges of prompt 0 are image->question, image->last, question->last, last->last, bos->last, and those of "
        "prompt 1 question->last, last->last, bos->last; name with edges= what all of them have."
    )


@pytest.mark.parametrize(
    "message, wrong",
    [
        ("when='later' is not known; choose from 'always', 'prompt', 'decode'.", {"when": "later"}),
        (
            "when='decode' cuts generated tokens alone, and 'image->question' does not end at the last position, whose "
            "place they take; leave it out, or say when='always'.",
            {"when": "decode", "edges": ["image->question"]},
        ),
        (
            "the uncut answer is one token, so no generated token looks back at anything; say when='always', or allow "
            "more with max_new_tokens.",
            {"when": "decode", "max_new_tokens": 1},
        ),
    ],
)
def test_answers_that_are_refused(message: str, wrong: dict[str, Any]) -> None:
    vlm, _, real = pair()
    with pytest.raises(ValueError) as caught:
        mv.knockout_answers(vlm, real, **wrong)
    assert str(caught.value) == message


def test_the_figure_has_a_line_and_a_band_for_each_edge_and_dashes_for_random_keys() -> None:
    vlm, bright, dark, *_ = planted.planted()
    found = mv.information_flow(vlm, [bright, dark], METRIC, edges=["image->last", "question->last"], window=1)
    figure = mv.plot.flow(found)
    drawn = [trace for trace in figure.data if trace.showlegend is not False]
    assert [(unescape(trace.name), trace.line.dash) for trace in drawn] == [
        ("image->last, the edge", "solid"),
        ("image->last, random keys", "dash"),
        ("question->last, the edge", "solid"),
        ("question->last, random keys", "dash"),
    ]
    np.testing.assert_array_equal(drawn[0].y, found["mean"].sel(edge="image->last"))
    np.testing.assert_array_equal(figure.data[1].y, found.high.sel(edge="image->last"))
    assert figure.layout.annotations[-1].text.replace("<br>", " ") == (
        "Mean over 2 prompts; the band is its 95 % interval, clustered. Dashed: as many random keys cut from the same "
        "queries."
    )


def test_nothing_but_an_information_flow_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(TypeError) as caught:
        mv.plot.flow([1])  # type: ignore[arg-type]
    assert str(caught.value) == (
        "flow draws what information_flow returns, and was given a list; make it with mv.information_flow(vlm, "
        "prompts)."
    )
