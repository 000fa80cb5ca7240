"""Back-patching: what hooks give by hand, exact where the picture is planted too late, intervals over pictures."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import planted
import planted_paths
import pytest
import tiny
import torch
import zoo
from torch import Tensor

import mechvlm as mv

YES = mv.logit_difference("yes", "no")


@pytest.fixture(scope="module")
def three(vlm: mv.VLM) -> list[mv.Prompt]:
    """Two questions about one picture and one about another."""
    asked = [(1, "is there a red cat ?"), (1, "is there a blue dog ?"), (2, "is there a red cat ?")]
    return [vlm.prompt(tiny.picture(number), words) for number, words in asked]


@contextmanager
def written(layers: Any, streams: dict[int, Tensor], positions: list[int]) -> Iterator[None]:
    """While hooks put streams behind layers, at some positions."""

    def put(stream: Tensor) -> Any:
        def hook(_module: Any, _given: Any, out: Tensor) -> Tensor:
            new = out.clone()
            new[:, positions] = stream[:, positions]
            return new

        return hook

    hooks = [layers[layer].register_forward_hook(put(stream)) for layer, stream in streams.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def by_hand(vlm: mv.VLM, prompt: mv.Prompt, source: int, destination: int, window: int) -> float:
    """The metric by hooks on a model of its own."""
    model = tiny.model(2, "sdpa", torch.float64)
    layers, seen = model.model.language_model.layers, dict[int, Tensor]()

    def keep(layer: int) -> Any:
        return lambda _module, _given, out: seen.__setitem__(layer, out.clone())

    hooks = [layers[layer].register_forward_hook(keep(layer)) for layer in range(3)]
    encoding = {name: x.double() if x.is_floating_point() else x for name, x in prompt.encoding.items()}
    with torch.no_grad():
        model(**encoding)
        for hook in hooks:
            hook.remove()
        pairs = [(source + step, destination + step) for step in range(-(window // 2), (window + 1) // 2)]
        given = {to: seen[of] for of, to in pairs if to >= 0 and of < 3}
        with written(layers, given, prompt.image):
            logits = model(**encoding).logits[:, -1]
    return float(vlm.metric(YES)(logits)[0])


@pytest.mark.parametrize("window", [1, *(pytest.param(window, marks=zoo.second_environment) for window in (2, 3))])
def test_each_pair_is_a_hook_behind_the_earlier_layer(vlm: mv.VLM, three: list[mv.Prompt], window: int) -> None:
    found = mv.back_patching(vlm, three[0], YES, window=window, control=None)
    assert found.metric.dims == ("prompt", "source", "destination")
    for source in (1, 2):
        for destination in (0, 1):
            value = float(found.metric.sel(prompt=0, source=source, destination=destination))
            if source > destination:
                assert value == pytest.approx(by_hand(vlm, three[0], source, destination, window), abs=1e-9)
            else:
                assert np.isnan(value)
    assert np.abs(found["mean"]).max() > 1e-3
    assert np.isnan(found.control).all()


def late() -> tuple[mv.VLM, mv.Prompt, mv.Prompt]:
    """Layer 1 asks the image tokens for what layer 2 only then writes into them."""
    model = planted_paths.empty(norms=False, attention="sdpa")
    with torch.no_grad():
        of = {"asks": planted.MARK, "finds": planted.MARK}
        planted_paths.plant(model, 2, 0, **of, reads=planted.BRIGHT, writes=planted_paths.HOP, amount=1.0)
        of = {"asks": planted_paths.HERE, "finds": planted.MARK}
        planted_paths.plant(model, 1, 3, **of, reads=planted_paths.HOP, writes=planted.SAID, amount=2.0)
    path = planted_paths.asked(model, {}, torch.float64)
    return path.vlm, path.source, path.target


def test_a_picture_that_comes_too_late_is_used_when_it_is_put_earlier() -> None:
    vlm, bright, _ = late()
    metric = mv.logit_difference(planted.YES, planted.NO)
    found = mv.back_patching(vlm, bright, metric)
    assert float(found.clean[0]) == 0
    changed = found["mean"].to_series().dropna()
    assert changed[[(2, 0), (3, 0)]].min() > 1
    assert (changed.drop([(2, 0), (3, 0)]) == 0).all()


@zoo.second_environment
def test_the_control_of_an_even_picture_in_another_order_is_the_patch_itself() -> None:
    vlm, bright, _ = late()
    metric = mv.logit_difference(planted.YES, planted.NO)
    found = mv.back_patching(vlm, bright, metric, sources=[2], destinations=[0])
    assert found.over_control.item() == pytest.approx(0, abs=1e-9)


def test_answers_are_right_where_their_margin_is_above_0(vlm: mv.VLM, three: list[mv.Prompt]) -> None:
    answers = ["yes", "no", "yes"]
    found = mv.back_patching(vlm, three, answers=answers, control="other")
    right = mv.answer_accuracy(vlm, list(zip(three, answers, strict=True)))
    assert found.right_clean.values.tolist() == right.values.tolist()
    pair = found.sel(source=2, destination=0)
    assert pair.right.values.tolist() == (pair.metric.values > 0).astype(float).tolist()
    assert float(pair.gain) == pytest.approx(float(pair.right.mean() - right.mean()))
    assert found.attrs["interval"] == "bootstrap over 2 clusters of prompts"


@zoo.second_environment
def test_intervals_are_over_pictures_and_none_for_one(vlm: mv.VLM, three: list[mv.Prompt]) -> None:
    found = mv.back_patching(vlm, three, YES, sources=[2], destinations=[0])
    change = (found.metric - found.clean).isel(source=0, destination=0)
    wanted = mv.mean_interval(change, "prompt", clusters=["a", "a", "b"])
    for end in ("mean", "low", "high"):
        assert found[end].item() == pytest.approx(float(wanted[end]))
    of_one = mv.back_patching(vlm, three[:2], YES, sources=[2], destinations=[0])
    assert np.isnan(of_one.low).all()


def test_of_one_picture_a_pair_that_is_none_has_no_mean(vlm: mv.VLM, three: list[mv.Prompt]) -> None:
    found = mv.back_patching(vlm, three[:2], YES, sources=[1, 2], destinations=[0, 1], control=None)
    change = (found.metric - found.clean).values
    assert np.isnan(found["mean"].values).tolist() == [[False, True], [False, False]]
    np.testing.assert_allclose(found["mean"].values, change.mean(0), atol=1e-12)
    assert np.isnan(found.over_control).all()


@zoo.second_environment
def test_the_control_takes_streams_of_the_next_other_picture(vlm: mv.VLM, three: list[mv.Prompt]) -> None:
    found = mv.back_patching(vlm, three, YES, sources=[2], destinations=[0], control="other")
    site = mv.Site("resid_post", 2)
    streams = vlm.run(three[2], [site])[site]
    edit = mv.replace_span(mv.Site("resid_post", 0), three[0].image, streams[0, three[2].image])
    logits = vlm.run(three[0], edits=[edit]).logits
    assert found.control.sel(prompt=0).item() == pytest.approx(float(vlm.metric(YES)(logits)[0]), abs=1e-9)


@zoo.second_environment
def test_finished_prompts_are_read_from_the_folder(vlm: mv.VLM, three: list[mv.Prompt], tmp_path: Path) -> None:
    given: Any = {"metric": YES, "sources": [2], "destinations": [0, 1], "out": tmp_path}
    first = mv.back_patching(vlm, three, **given)
    again = mv.back_patching(vlm, three, **given)
    assert again.attrs["engine"] == f"read from {tmp_path.name}" != first.attrs["engine"]
    assert again.equals(first)
    with pytest.raises(ValueError, match="holds another experiment"):
        mv.back_patching(vlm, three, **{**given, "window": 3})
