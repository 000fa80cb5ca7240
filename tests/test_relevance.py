"""Gradient times attention and attention through all layers, against whole maps, autograd and what was planted."""

# ruff: noqa: ARG005

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import jaxtyping
import numpy as np
import planted
import pytest
import tiny
import torch
import xarray as xr
import zoo
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from zoo.boxes import noise

import mechvlm as mv
from mechvlm.experiments.relevance import gradient_attention, relevancy, span_flow
from mechvlm.experiments.rollout import attention_flow, attention_rollout, carried, unit
from mechvlm.experiments.sight import own_layers
from mechvlm.lazy_attention import Attention
from mechvlm.references import apart, attention_at, eager_rounding, eagerly, own_gradients, own_patterns, placed

TOKEN = 30
CROSS = ("mllama",)
AMONG = [name for name in zoo.VARIANTS if not name.startswith(CROSS) and not zoo.there(name)]
among = pytest.mark.parametrize("name", zoo.each_kind(AMONG))
Maps = dict[int, Tensor]
"""By layer, `head query key`."""


def answer(logits: Tensor) -> Tensor:
    return logits[:, TOKEN]


@functools.cache
def made(name: str) -> tuple[mv.VLM, mv.Prompt]:
    vlm = zoo.build(name, "eager" if name in zoo.EAGER_ONLY else "sdpa", torch.float64)
    return vlm, zoo.ask(vlm, noise(0))


@functools.cache
def own(name: str) -> tuple[Maps, Maps]:
    """The model's own eager attention weights and their gradients by plain autograd, whole."""
    vlm, real = made(name)
    patterns, gradients = own_patterns(vlm, real), own_gradients(vlm, real, TOKEN)
    layers = own_layers(vlm)
    return tuple(
        {at: of[mv.Site("pattern", at)][0].double() for at in layers if at is not None} for of in (patterns, gradients)
    )  # type: ignore[return-value]


def near(name: str, found: Any, expected: Tensor) -> None:
    """The same, to within the rounding of transformers' softmax, which is float32, as in law 10."""
    assert apart(torch.as_tensor(np.asarray(found)), expected) < eager_rounding(made(name)[0], 256)


@contextmanager
def budget(vlm: mv.VLM, size: str | int) -> Iterator[None]:
    used, vlm.attention_budget = vlm.attention_budget, size
    try:
        yield
    finally:
        vlm.attention_budget = used


def by_span(row: Tensor, real: mv.Prompt) -> Tensor:
    return torch.stack([row[held].sum() for held in real.spans.values()])


# -- against whole maps ------------------------------------------------------------------------------------------------


@among
def test_relevancy_is_a_row_of_the_papers_matrix(name: str) -> None:
    vlm, real = made(name)
    patterns, gradients = own(name)
    r = torch.eye(len(real), dtype=torch.float64)
    for layer in sorted(patterns):
        r = r + (patterns[layer] * gradients[layer]).clamp(min=0).mean(0) @ r
    with budget(vlm, "64KiB"):
        found = relevancy(vlm, real, answer)
    near(name, found.relevancy, r[-1, real.image])
    near(name, found.by_span, by_span(r[-1], real))
    assert found.position.values.tolist() == real.image and found.span.values.tolist() == list(real.spans)


@pytest.mark.parametrize(("name", "drop"), [("llava", False), *zoo.each_kind(AMONG, True)])
def test_rollout_is_a_row_of_the_papers_matrix(name: str, drop: bool) -> None:
    vlm, real = made(name)
    dropped = [0, real.image[1]] if drop else []
    r, one = (torch.eye(len(real), dtype=torch.float64) for _ in range(2))
    for pattern in own(name)[0].values():
        mean = pattern.mean(0).index_fill(1, torch.tensor(dropped, dtype=torch.long), 0.0)
        mean = mean / mean.sum(-1, keepdim=True)
        mean = torch.where(mean.isnan().any(-1, keepdim=True), one, mean)
        r = 0.5 * (mean + one) @ r
    with budget(vlm, "64KiB"):
        found = attention_rollout(vlm, real, discard=dropped)
    near(name, found.rollout, r[-1, real.image])
    near(name, found.by_span, by_span(r[-1], real))


@pytest.mark.parametrize(("name", "weighted"), [("llava", False), *zoo.each_kind(AMONG, True)])
def test_flow_is_a_row_of_the_papers_matrix(name: str, weighted: bool) -> None:
    vlm, real = made(name)
    one = torch.eye(len(real), dtype=torch.float64)
    f, weights = torch.zeros_like(one), []
    for pattern in own(name)[0].values():
        weights.append(pattern.amax(-1).mean(-1) if weighted else torch.ones(len(pattern), dtype=torch.float64))
        f = (one + (pattern * weights[-1][:, None, None]).mean(0)) @ (one + f)
    with budget(vlm, "64KiB"):
        found = attention_flow(vlm, real, head_weights=weighted)
    near(name, found.flow, f[-1, real.image])
    near(name, found.by_span, by_span(f[-1], real))
    near(name, found.head_weight, torch.stack(weights))


@pytest.mark.parametrize("name", zoo.each_kind(name for name in zoo.VARIANTS if not zoo.there(name)))
def test_flow_between_spans_is_the_mean_over_the_pairs_that_see_each_other(name: str) -> None:
    vlm, real = made(name)
    patterns, gradients = own(name)
    spans = {**real.spans, "overlapping": sorted({0, *real.image[:2], len(real) - 1})}
    member = torch.zeros(len(spans), len(real), dtype=torch.float64)
    for number, held in enumerate(spans.values()):
        member[number, held] = 1
    with budget(vlm, "64KiB"):
        found = span_flow(vlm, real, answer, spans)
    assert found.layer.values.tolist() == sorted(patterns)
    for layer, pattern in patterns.items():
        here, sizes = found.sel(layer=layer), (pattern * gradients[layer]).abs()
        pairs = member @ (pattern[0] > 0).double().T @ member.T
        assert np.array_equal(here.pairs, pairs)
        meet = pairs > 0
        near(name, here.flow.values[:, meet], (member @ sizes.transpose(-1, -2) @ member.T / pairs)[:, meet])
        assert np.isnan(here.flow.values[:, ~meet]).all()


@among
def test_gradient_times_attention_of_rows_is_that_of_autograd(name: str) -> None:
    vlm, real = made(name)
    patterns, gradients = own(name)
    asked = [-1, real.image[-1]]
    with budget(vlm, "64KiB"):
        found = gradient_attention(vlm, real, answer, queries=asked)
    for layer, pattern in patterns.items():
        here = found.sel(layer=layer)
        rows, of_rows = (of[:, asked][:, :, real.image] for of in (pattern, gradients[layer]))
        near(name, here.attention, rows)
        near(name, here.attribution, rows * of_rows)


def test_gradient_times_attention_of_the_pictures_keys_is_that_of_autograd() -> None:
    vlm, real = made("mllama")
    found = gradient_attention(vlm, real, answer)
    embed = attrgetter(str(vlm.arch.text.embed))(vlm.hf)
    hook = embed.register_forward_hook(lambda _m, _i, out: out.detach().requires_grad_(True))
    with eagerly(vlm) as caught, torch.enable_grad():
        logits = vlm.hf(**placed(vlm, real), use_cache=False).logits
    hook.remove()
    assert found.attribution.dims == ("layer", "head", "key") and found.layer.values.tolist() == [1, 3]
    for layer in (1, 3):
        (weights,) = [one for owner, one in caught if owner is attention_at(vlm, "text", layer, cross=True)]
        (gradient,) = torch.autograd.grad(logits[0, -1, TOKEN], [weights], retain_graph=True)
        near("mllama", found.attribution.sel(layer=layer), (weights * gradient)[0, :, -1].detach())


# -- rows, layers and memory -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vlm() -> mv.VLM:
    return tiny.vlm(dtype=torch.float64)


@pytest.fixture(scope="module")
def real(vlm: mv.VLM) -> mv.Prompt:
    return vlm.prompt(tiny.picture(), "is there a red dog in the image ?")


def test_the_row_that_mattered_is_the_one_that_predicts_and_not_the_next(vlm: mv.VLM, real: mv.Prompt) -> None:
    """The published mistake: the gradient of a token's prediction, read at the token's own row, is zero."""
    said, predicts = len(real) - 1, len(real) - 2
    rows = gradient_attention(vlm, real, answer, queries=[predicts, said], position=predicts).attribution
    assert float(np.abs(rows.sel(query=predicts)).max()) > 1e-5
    assert np.count_nonzero(rows.sel(query=said)) == 0
    found = relevancy(vlm, real, answer, position=predicts)
    assert float(found.relevancy.min()) >= 0 and float(found.relevancy.max()) > 1e-5
    shorter = {name: x[:, :said] if name != "pixel_values" else x for name, x in real.encoding.items()}
    alone = relevancy(vlm, vlm.prompt(encoding=shorter), answer)
    np.testing.assert_allclose(found.relevancy.values, alone.relevancy.values, atol=1e-12)


def test_some_layers_are_multiplied_in_the_models_order(vlm: mv.VLM, real: mv.Prompt) -> None:
    maps = [vlm.run(real, read=[f"text.{layer}.pattern"])[f"text.{layer}.pattern"][0].mean(0) for layer in (0, 2)]
    one = torch.eye(len(real), dtype=torch.float64)
    expected = (0.25 * one + 0.75 * maps[1]) @ (0.25 * one + 0.75 * maps[0])
    found = attention_rollout(vlm, real, residual=0.25, layers=[2, 0], position=-3)
    np.testing.assert_allclose(found.rollout.values, expected[-3, real.image].numpy(), atol=1e-12)
    assert found.attrs["multiplied"] == "0, 2" and found.attrs["query"] == len(real) - 3


def test_without_bos_is_without_its_column(vlm: mv.VLM, real: mv.Prompt) -> None:
    found = attention_rollout(vlm, real, without_bos=True)
    assert float(found.by_span.sel(span="bos")) == 0
    assert float(found.by_span.sum()) == pytest.approx(1)
    np.testing.assert_array_equal(found.rollout.values, attention_rollout(vlm, real, discard=[0]).rollout.values)


def test_what_is_discarded_can_be_said_as_for_a_profile(vlm: mv.VLM, real: mv.Prompt) -> None:
    found = mv.sinks(vlm, real, threshold=1.0)
    held = mv.sink_positions(found)
    assert held
    said: list[tuple[Any, list[int]]] = [("bos", [0]), (lambda prompt: prompt.image[:2], real.image[:2]), (found, held)]
    for discard, positions in said:
        rollout = attention_rollout(vlm, real, discard=discard)
        xr.testing.assert_identical(rollout, attention_rollout(vlm, real, discard=positions))
        assert rollout.attrs["discarded"] == ", ".join(map(str, positions))


def test_the_position_that_looks_is_counted_from_the_first(vlm: mv.VLM, real: mv.Prompt) -> None:
    assert gradient_attention(vlm, real, answer)["query"] == len(real) - 1
    assert gradient_attention(vlm, real, answer, queries=[-2, 3])["query"].values.tolist() == [len(real) - 2, 3]


def test_a_row_that_has_nothing_but_bos_keeps_to_itself(vlm: mv.VLM, real: mv.Prompt) -> None:
    found = attention_rollout(vlm, real, position=0, without_bos=True)
    assert float(found.by_span.sel(span="bos")) == 1 and np.count_nonzero(found.rollout) == 0


def test_a_product_of_many_layers_overflows_no_type(real: mv.Prompt) -> None:
    attention = tiny.vlm().run(real, read={"text.0.pattern": mv.lazy()})["text.0.pattern"]
    assert attention.q.dtype == torch.float32
    large = carried(unit(5, len(real)) * 1e60, attention)
    np.testing.assert_allclose(large / 1e60, carried(unit(5, len(real)), attention), rtol=1e-6)


def test_nothing_mattered_to_a_metric_that_is_constant(vlm: mv.VLM, real: mv.Prompt) -> None:
    found = relevancy(vlm, real, lambda logits: 0 * logits[:, 0])
    assert np.count_nonzero(found.relevancy) == 0 and float(found.by_span.sum()) == 1


EVERY: dict[str, Callable[[mv.VLM, mv.Prompt], Any]] = {
    "gradient_attention": lambda vlm, real: gradient_attention(vlm, real, answer),
    "relevancy": lambda vlm, real: relevancy(vlm, real, answer),
    "span_flow": lambda vlm, real: span_flow(vlm, real, answer),
    "attention_rollout": lambda vlm, real: attention_rollout(vlm, real, without_bos=True),
    "attention_flow": attention_flow,
}


@pytest.mark.parametrize("what", EVERY)
def test_a_small_budget_gives_the_same(vlm: mv.VLM, real: mv.Prompt, what: str) -> None:
    with budget(vlm, "4KiB"):
        small = EVERY[what](vlm, real)
    xr.testing.assert_allclose(small, EVERY[what](vlm, real), rtol=1e-9, atol=1e-12)


def test_one_query_of_one_layer_is_a_part_of_all(vlm: mv.VLM, real: mv.Prompt) -> None:
    several = gradient_attention(vlm, real, answer, queries=[3, -1])
    alone = gradient_attention(vlm, real, answer, layers=[1]).attribution
    assert alone.dims == ("layer", "head", "position")
    np.testing.assert_allclose(alone.values, several.attribution.sel(layer=[1], query=len(real) - 1).values, atol=1e-12)


class Largest(TorchDispatchMode):
    """Watches what torch makes, and remembers the most numbers that one tensor held."""

    most = 0

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), named: Any = None) -> Any:
        made = call(*args, **(named or {}))
        for one in made if isinstance(made, tuple | list) else [made]:
            if isinstance(one, Tensor):
                self.most = max(self.most, one.untyped_storage().nbytes() // one.element_size())
        return made


@pytest.mark.here
@pytest.mark.parametrize("what", EVERY)
def test_no_map_of_the_heads_is_ever_made_and_no_piece_is_larger_than_the_budget(
    vlm: mv.VLM, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = vlm.prompt(tiny.picture(), " ".join(["is there a red dog in the image ?"] * 10))
    heads, pieces, own_piece = vlm.shape.heads["text"], [], Attention.piece

    def noted(attention: Attention, *where: Any) -> Any:
        piece = own_piece(attention, *where)
        pieces.append(piece.scores.numel() * 8 * 4)
        return piece

    monkeypatch.setattr(Attention, "piece", noted)
    with budget(vlm, 65_536), Largest() as watched:
        EVERY[what](vlm, long)
    assert len(long) > 100 and max(pieces) <= 65_536
    assert 0 < watched.most < heads * len(long) ** 2


@pytest.mark.parametrize("what", EVERY)
def test_a_result_can_be_written_to_a_file_and_says_what_it_is(
    vlm: mv.VLM, real: mv.Prompt, what: str, tmp_path: Any
) -> None:
    found = EVERY[what](vlm, real)
    found.to_netcdf(tmp_path / "found.nc", engine="h5netcdf")
    xr.testing.assert_identical(xr.load_dataset(tmp_path / "found.nc", engine="h5netcdf"), found)
    assert found.attrs["prompt"] == real.text


def test_a_map_is_drawn_where_its_tokens_look(vlm: mv.VLM, real: mv.Prompt) -> None:
    found = relevancy(vlm, real, answer).relevancy
    figure = mv.plot.over_image(found, real.images[0], real.pictures[0])
    drawn = np.array(figure.data[0].z, dtype=float)
    assert drawn.shape == (tiny.GRID, tiny.GRID)
    np.testing.assert_allclose(drawn.flatten(), found.values)


# -- planted truth -----------------------------------------------------------------------------------------------------

YES = mv.logit_difference(planted.YES, planted.NO)
PLANTS = [(0, 3, 4), (1, 2, 2), (2, 1, 4)]


@pytest.mark.parametrize(("layer", "head", "kv_heads"), PLANTS)
def test_gradient_times_attention_finds_the_planted_head_alone(layer: int, head: int, kv_heads: int) -> None:
    vlm, bright, dark, *_ = planted.planted(layer, head, kv_heads)
    for prompt, sign in ((bright, 1), (dark, -1)):
        found = gradient_attention(vlm, prompt, YES).attribution.values
        assert (sign * found[layer, head] > 0).all()
        found[layer, head] = 0
        assert np.count_nonzero(found) == 0


@pytest.mark.parametrize(("layer", "head", "kv_heads"), PLANTS)
def test_relevancy_is_on_the_picture_that_carries_the_answer_and_on_nothing_else(
    layer: int, head: int, kv_heads: int
) -> None:
    vlm, bright, dark, *_ = planted.planted(layer, head, kv_heads)
    found = relevancy(vlm, bright, YES)
    values = found.relevancy.values
    assert values.min() > 0 and np.ptp(values) < 1e-6 * values.max()
    spans = found.by_span.to_series().to_dict()
    assert spans.pop("last") == 1 and spans.pop("image") == pytest.approx(values.sum())
    assert set(spans.values()) == {0.0}
    # A dark picture speaks against yes, and for no.
    assert np.count_nonzero(relevancy(vlm, dark, YES).relevancy) == 0
    assert relevancy(vlm, dark, mv.logit_difference(planted.NO, planted.YES)).relevancy.min() > 0
    others = [at for at in range(3) if at != layer]
    assert np.count_nonzero(relevancy(vlm, bright, YES, layers=others).relevancy) == 0


def test_flow_between_spans_is_from_the_picture_to_the_last_position_in_the_planted_head() -> None:
    vlm, bright, _, layer, head = planted.planted()
    found = span_flow(vlm, bright, YES).flow
    way = {"layer": layer, "head": head, "source": "image", "target": "last"}
    assert float(found.sel(way)) > 0
    found.loc[way] = 0
    assert np.nansum(np.abs(found)) == 0


# -- refusals ----------------------------------------------------------------------------------------------------------

ACROSS = (
    "this model sees its picture by cross-attention, in layers 1, 3, and its words' attention to each other never "
    "reaches it; mv.attention_map and mv.gradient_attention show each of these layers by itself."
)
NO_IMAGE = "the prompt holds no image to look at; make it with vlm.prompt(image, text)."
REFUSED: list[tuple[Callable[[mv.VLM, mv.Prompt], object], str]] = [
    (lambda vlm, real: relevancy(*made("mllama"), answer), ACROSS),
    (lambda vlm, real: attention_rollout(*made("mllama")), ACROSS),
    (lambda vlm, real: attention_flow(*made("mllama")), ACROSS),
    (
        lambda vlm, real: span_flow(*made("mllama"), answer, layers=[0, 1]),
        "in layer 1 words attend to the picture alone, so nothing flows between spans; choose from layers 0, 2, 4.",
    ),
    (lambda vlm, real: attention_rollout(vlm, vlm.prompt(None, "is it ?")), NO_IMAGE),
    (lambda vlm, real: gradient_attention(vlm, vlm.prompt(None, "is it ?"), answer), NO_IMAGE),
    (
        lambda vlm, real: attention_rollout(vlm, real, residual=1.5),
        "residual=1.5 is no share; give 0 to 1, and 0.5 for the paper's.",
    ),
    (
        lambda vlm, real: attention_rollout(vlm, real, position=len(real)),
        "position 30 is not in the prompt, which has 30 positions.",
    ),
    (
        lambda vlm, real: attention_rollout(vlm, real, discard=[2, 99]),
        "discard holds position 99; give positions of the prompt, which has 30.",
    ),
    (
        lambda vlm, real: attention_rollout(vlm, real, discard="image"),
        "discard='image' is not known; write 'bos', or give positions or a function of a prompt.",
    ),
    (
        lambda vlm, real: attention_rollout(vlm, real, discard=range(30)),
        "discard takes out all positions of the prompt; leave at least one.",
    ),
    (
        lambda vlm, real: relevancy(vlm, real, answer, layers=[0, 1, 1]),
        "layers holds 1 more than once; give each layer once.",
    ),
    (
        lambda vlm, real: attention_rollout(*made("paligemma"), without_bos=True),
        "without_bos=True, and this prompt begins with no such token; leave it out, or use discard=.",
    ),
    (
        lambda vlm, real: span_flow(vlm, real, answer, {"far": [0, 99]}),
        "the span 'far' holds position 99; give positions of the prompt, which has 30.",
    ),
    (
        lambda vlm, real: span_flow(vlm, real, answer, {}),
        "spans={} names no positions; give for instance prompt.spans or {'image': prompt.image}.",
    ),
    (
        lambda vlm, real: span_flow(vlm, real, answer, {"none": []}),
        "the span 'none' holds nothing; give positions of the prompt, which has 30.",
    ),
]


@pytest.mark.parametrize(("wrong", "sentence"), REFUSED, ids=[sentence[:40] for _, sentence in REFUSED])
def test_what_cannot_be_is_refused(
    vlm: mv.VLM, real: mv.Prompt, wrong: Callable[[mv.VLM, mv.Prompt], object], sentence: str
) -> None:
    with pytest.raises(ValueError) as error:
        wrong(vlm, real)
    assert str(error.value) == sentence


def test_several_prompts_are_refused(vlm: mv.VLM, real: mv.Prompt, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the test run's type checks, as users meet them."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    for what in EVERY.values():
        with pytest.raises(TypeError) as error:
            what(vlm, [real])  # type: ignore[arg-type]
        assert str(error.value) == (
            "a list is not one prompt; make it with vlm.prompt(image, text), and ask about several one by one."
        )
