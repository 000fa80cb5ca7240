"""Every experiment on every architecture: right by a plain computation of its own, or refused in one sentence."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
import zoo
from torch import Tensor
from transformers import CONFIG_MAPPING
from zoo.boxes import noise
from zoo.variant import Variant

import mechvlm as mv
from mechvlm.archs import ARCHS
from mechvlm.references import attention_at, layer_at, own_logits, own_patterns
from mechvlm.report import report

WORDS = "is there a red dog in the image ?"
METRIC = mv.logit_difference(30, 31)
MODULES = [import_module(f"zoo.{module.name}") for module in iter_modules(zoo.__path__)]
VARIANTS: dict[str, Variant] = {}
for module in MODULES:
    VARIANTS |= vars(module).get("VARIANTS", {})
REAL = [pytest.mark.torchvision, pytest.mark.skipif(find_spec("torchvision") is None, reason="needs torchvision")]
CASES = [pytest.param(name, id=name) for name in VARIANTS]
CASES += [
    pytest.param(f"{name}, its processor", id=f"{name}, its processor", marks=REAL)
    for name, variant in VARIANTS.items()
    if variant.needs_torchvision
]
BY_WORDS = [name for name, variant in VARIANTS.items() if not variant.needs_torchvision]
CROSS, QUERIES, PARALLEL = ("mllama",), ("instructblip", "blip2-opt", "blip2-llama"), ("aya_vision",)
every = pytest.mark.parametrize("case", CASES)


@functools.cache
def made(case: str) -> tuple[mv.VLM, mv.Prompt, mv.Prompt]:
    """A model, a question about a picture and the same about another; a ready encoding where torchvision is needed."""
    name = case.split(", ", maxsplit=1)[0]
    variant = VARIANTS[name]
    ready = variant.needs_torchvision and name == case
    vlm = mv.VLM(variant.model(), None if ready else variant.processor(), name=name)
    if ready and variant.encoding is not None:
        real, null = (vlm.prompt(encoding=variant.encoding([noise(seed)], WORDS)) for seed in (0, 1))
    else:
        real, null = (vlm.prompt(noise(seed), WORDS) for seed in (0, 1))
    return vlm, real, null


def parts(case: str) -> tuple[mv.VLM, mv.Prompt, mv.Prompt]:
    """The same, where this version of mechvlm knows the architecture."""
    variant = VARIANTS[case.split(", ", maxsplit=1)[0]]
    if variant.model().config.model_type not in ARCHS:
        pytest.skip("this architecture has no row in mechvlm.archs")
    return made(case)


@functools.cache
def patterns(case: str) -> dict[mv.Site, Tensor]:
    vlm, real, _ = parts(case)
    return own_patterns(vlm, real)


def layers_of(vlm: mv.VLM) -> range:
    return range(vlm.shape.layers["text"])


def crossing(case: str) -> list[int]:
    return [1, 3] if case.startswith("mllama") else []


def own_metric(vlm: mv.VLM, prompt: mv.Prompt) -> float:
    logits = own_logits(vlm, prompt)[0]
    return float(logits[30] - logits[31])


def near(found: Any, expected: Any, most: float = 3e-5) -> None:
    """The same, to within the rounding of float32."""
    found, expected = np.asarray(found, dtype=float), np.asarray(expected, dtype=float)
    assert found.shape == expected.shape
    assert np.array_equal(np.isnan(found), np.isnan(expected))
    assert np.nanmax(np.abs(found - expected)) < most * max(1.0, float(np.nanmax(np.abs(expected))))


def tower_of(vlm: mv.VLM) -> Any:
    """The module that takes embedded words and squares, and makes of them what the final norm leaves."""
    return attrgetter(str(vlm.arch.text.embed).rpartition(".")[0])(vlm.hf)


@contextmanager
def before(module: Any, change: Callable[[tuple, dict], tuple[tuple, dict]]) -> Iterator[None]:
    """While a plain hook changes what a module is called with."""
    handle = module.register_forward_pre_hook(lambda _, given, named: change(given, named), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def test_every_architecture_is_here() -> None:
    known = set(ARCHS) & set(CONFIG_MAPPING.keys())  # older transformers have no Molmo2
    assert {variant.model().config.model_type for variant in VARIANTS.values()} >= known


# -- what it says and where it looks -----------------------------------------------------------------------------------


@every
def test_answers_are_the_softmax_of_the_models_own_logits(case: str) -> None:
    vlm, real, null = parts(case)
    found = mv.answer_probabilities(vlm, {"real": real, "null": null}, [30, 31])
    near(found, [own_logits(vlm, prompt)[0].softmax(-1)[[30, 31]] for prompt in (real, null)])


@every
@pytest.mark.parametrize("queries", ["last", "text"])
def test_profile_is_the_models_own_attention_summed(case: str, queries: str) -> None:
    vlm, real, null = parts(case)
    found = mv.attention_profile(vlm, [real, null], queries=queries).isel(example=0)
    rows = {"last": [len(real) - 1], "text": real.question + real.last}[queries]
    assert found.span.values.tolist() == list(real.spans)
    for layer in layers_of(vlm):
        here = found.sel(layer=layer)
        if layer in crossing(case):
            assert np.isnan(here.mass).all() and np.isnan(here.lift).all()
            continue
        own = patterns(case)[mv.Site("pattern", layer)][0][:, rows].numpy()
        masses = np.stack([own[..., keys].sum(-1).mean(-1) for keys in real.spans.values()], -1)
        near(here.mass, masses)
        near(here.mass.sum("span"), np.ones(len(own)))
        shares = (own[0] > 0) / (own[0] > 0).sum(-1, keepdims=True)
        even = np.array([shares[:, keys].sum(-1).mean() for keys in real.spans.values()])
        near(here.lift, masses / np.where(even > 0, even, np.nan))


@every
def test_attention_map_is_the_pictures_part_of_a_row(case: str) -> None:
    vlm, real, _ = parts(case)
    across = crossing(case)
    for layer in across or layers_of(vlm):
        found = mv.attention_map(vlm, real, layer, 2, query=[-1, -2])
        own = patterns(case)[mv.Site("cross_pattern" if across else "pattern", layer)][0, 2, [-1, -2]]
        near(found, own if across else own[:, real.image])
        assert found.dims == ("query", "key" if across else "position")
    (image,) = real.images
    for at in range(found.shape[1]):
        one = found.isel({found.dims[1]: at})
        position = int(one[found.dims[1]])
        cell = None if image.of == "patches" else image.cell(position)
        assert (int(one.tile), int(one.row), int(one.column)) == (cell or (-1, -1, -1))


def test_a_layer_that_looks_at_words_only_has_no_map() -> None:
    vlm, real, _ = parts("mllama")
    with pytest.raises(ValueError) as error:
        mv.attention_map(vlm, real, 2)
    assert str(error.value) == (
        "layer 2 of this model attends to words only; the picture is seen by cross-attention, in layers 1, 3."
    )


def test_a_profile_names_the_layers_it_leaves_out() -> None:
    vlm, real, _ = parts("mllama")
    note = mv.attention_profile(vlm, real).attrs["note"]
    assert note == "layers 1, 3: attention to the picture's keys alone, so no number by span"


# -- what it holds -----------------------------------------------------------------------------------------------------


@every
def test_lens_is_each_layers_output_through_norm_and_unembedding(case: str) -> None:
    vlm, real, _ = parts(case)
    held: dict[int, Tensor] = {}
    handles = []
    for layer in layers_of(vlm):

        def keep(_module: Any, _given: Any, out: Any, at: int = layer) -> None:
            held[at] = out[0] if isinstance(out, tuple) else out

        handles.append(layer_at(vlm, "text", layer).register_forward_hook(keep))
    last = own_logits(vlm, real)[0].softmax(-1)
    for handle in handles:
        handle.remove()
    found = mv.logit_lens(vlm, real, positions=[*real.image, -1], top=3)
    assert found.position.values.tolist() == [*real.image, len(real) - 1]
    near(found.probability.isel(layer=-1, position=-1), last.topk(3).values)
    norm, head = attrgetter(vlm.arch.norm)(vlm.hf), attrgetter(vlm.arch.unembed)(vlm.hf)
    for layer, stream in held.items():
        with torch.no_grad():
            logits = head(norm(stream[0, real.image]))
        cap = vlm.shape.logit_cap
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        near(found.probability.sel(layer=layer).isel(position=slice(0, -1)), logits.softmax(-1).topk(3).values)


# -- what it needs -----------------------------------------------------------------------------------------------------


@every
@zoo.second_environment
def test_ablation_is_a_hook_before_the_output_matrix(case: str) -> None:
    vlm, real, null = parts(case)
    found, clean, width = mv.ablate_each_head(vlm, real, METRIC), own_metric(vlm, real), vlm.shape.d_head["text"]
    expected = np.zeros(found.shape)
    for layer in layers_of(vlm):
        children = dict(attention_at(vlm, "text", layer, layer in crossing(case)).named_children())
        for head in range(vlm.shape.heads["text"]):

            def without(given: tuple, named: dict, head: int = head) -> tuple[tuple, dict]:
                z = given[0].clone()
                z[..., head * width : (head + 1) * width] = 0
                return (z, *given[1:]), named

            with before(children.get("o_proj", children.get("out_proj")), without):
                expected[layer, head] = own_metric(vlm, real) - clean
    near(found, expected)
    assert np.abs(found).max() > 1e-3
    near(mv.ablate_each_head(vlm, real, METRIC, to=real, positions=real.last), np.zeros(found.shape))
    assert np.abs(mv.ablate_each_head(vlm, real, METRIC, to=null)).max() > 1e-4


@every
def test_patched_embeddings_carry_all_at_the_image_and_nothing_elsewhere(case: str) -> None:
    vlm, real, null = parts(case)
    found = mv.patch_spans(vlm, real, null, METRIC)
    across = bool(crossing(case))
    near(found.normalised.sel(layer=0), [span == "image" and not across for span in real.spans], 1e-3)
    near(found.attrs["source_metric"], own_metric(vlm, real))
    near(found.attrs["target_metric"], own_metric(vlm, null))
    assert found.attrs.get("left_in_place") == ("the target's picture, which layers 1, 3 look at" if across else None)


def inputs_of(module: Any, run: Callable[[], Any]) -> tuple[Tensor, dict[str, Any]]:
    """What a module is called with in a plain run: the residual stream, and the rest."""
    seen: list[tuple[Tensor, dict[str, Any]]] = []

    def catch(given: tuple, named: dict) -> tuple[tuple, dict]:
        seen.append((given[0].clone() if given else torch.empty(0), named))
        return given, named

    with before(module, catch):
        run()
    return seen[0]


@every
def test_a_patch_is_a_hook_before_the_layer(case: str) -> None:
    """And of what is added behind later layers, at image tokens."""
    vlm, real, null = parts(case)
    found = mv.patch_spans(vlm, real, null, METRIC).metric.sel(layer=1)
    layer, tower = layer_at(vlm, "text", 1), tower_of(vlm)
    source, _ = inputs_of(layer, lambda: own_logits(vlm, real))
    _, arguments = inputs_of(tower, lambda: own_logits(vlm, real))
    added = arguments.get("deepstack_visual_embeds")
    for span, positions in real.spans.items():

        def patched(given: tuple, named: dict, positions: list[int] = positions) -> tuple[tuple, dict]:
            h = given[0].clone()
            h[:, positions] = source[:, positions]
            return (h, *given[1:]), named

        def with_features(given: tuple, named: dict, span: str = span) -> tuple[tuple, dict]:
            if added is None or span != "image":
                return given, named
            own = named["deepstack_visual_embeds"]
            return given, {**named, "deepstack_visual_embeds": [own[0], *added[1:]]}

        with before(layer, patched), before(tower, with_features):
            near(found.sel(span=span), own_metric(vlm, null))


def test_features_added_behind_later_layers_are_said_to_be_patched_with_the_image() -> None:
    vlm, real, null = parts("qwen3_vl")
    attrs = mv.patch_spans(vlm, real, null, METRIC).attrs
    assert attrs["patched_with_it"] == "at image tokens, the features added behind layers 0, 1 from there on"
    assert "patched_with_it" not in mv.patch_spans(vlm, real, null, METRIC, kind="mlp_out").attrs


@every
@pytest.mark.parametrize("kind", ["resid_mid", "z", "mlp_out"])
@zoo.second_environment
def test_other_activations_are_patched_or_refused_by_name(case: str, kind: str) -> None:
    vlm, real, null = parts(case)
    everywhere = {"positions": list(range(len(real)))}
    sentence = {
        (PARALLEL, "resid_mid"): "this model has no resid_mid in layers 0, 1, 2, 3; choose from resid_pre, q, k, v, "
        "scores, pattern, z, attn_out, mlp_out, resid_post, which every layer has.",
        (CROSS, "z"): "this model has no z in layers 1, 3; choose from resid_pre, attn_out, resid_mid, mlp_out, "
        "resid_post, which every layer has.",
    }
    for (names, without), said in sentence.items():
        if case in names and kind == without:
            with pytest.raises(ValueError) as error:
                mv.patch_spans(vlm, real, null, METRIC, everywhere, kind)
            assert str(error.value) == said
            return
    found = mv.patch_spans(vlm, real, real, METRIC, everywhere, kind)
    near(found.metric, np.full(found.metric.shape, own_metric(vlm, real)))
    other = mv.patch_spans(vlm, real, null, METRIC, everywhere, kind).normalised
    assert np.isfinite(other).all()
    if kind == "resid_mid" and not crossing(case):
        near(other, np.ones(other.shape), 1e-3)


def entering(vlm: mv.VLM, prompt: mv.Prompt) -> list[tuple[Tensor, Tensor]]:
    """What the picture hands to the language model, a row a token, with its gradient by plain autograd."""
    tower, leaves = tower_of(vlm), []

    def leaf(x: Tensor) -> Tensor:
        leaves.append(x.detach().requires_grad_(True))
        return leaves[-1]

    def start(given: tuple, named: dict) -> tuple[tuple, dict]:
        if named.get("cross_attention_states") is not None:
            return given, {**named, "cross_attention_states": leaf(named["cross_attention_states"])}
        new = {**named, "inputs_embeds": leaf(named["inputs_embeds"])}
        if named.get("deepstack_visual_embeds") is not None:
            new["deepstack_visual_embeds"] = [leaf(one) for one in named["deepstack_visual_embeds"]]
        return given, new

    with torch.enable_grad(), before(tower, start):
        logits = vlm.hf(**prompt.encoding, use_cache=False).logits[0, -1]
        gradients = torch.autograd.grad(logits[30] - logits[31], leaves)
    pairs = [(x.detach().flatten(0, -2), g.flatten(0, -2)) for x, g in zip(leaves, gradients, strict=True)]
    first, gradient = pairs[0]
    if not any(image.of == "keys" for image in prompt.images):
        if vlm.hf.config.model_type == "molmo2":  # which adds the features to the embedded image token
            first = first - attrgetter(str(vlm.arch.text.embed))(vlm.hf)(prompt.encoding["input_ids"])[0].detach()
        pairs[0] = (first[prompt.image], gradient[prompt.image])
    return pairs


@every
def test_attribution_is_plain_autograd_where_the_picture_enters(case: str) -> None:
    vlm, real, _ = parts(case)
    found = mv.gradient_attribution(vlm, real, METRIC)
    expected = sum((x * gradient).sum(-1) for x, gradient in entering(vlm, real))
    near(found.attribution, expected)
    assert np.abs(found.attribution).max() > 1e-4
    near(found.attrs["value"], own_metric(vlm, real))
    keys = sorted(real.images[0].positions + real.images[0].separators)
    dim, where = ("key", keys) if crossing(case) else ("position", real.image)
    assert found.attribution.dims == (dim,)
    assert found[dim].values.tolist() == where


@pytest.mark.parametrize("case", ["llava_next-vicuna", "idefics3", "mllama"])
def test_attribution_of_two_pictures_keeps_them_apart(case: str) -> None:
    vlm, *_ = parts(case)
    two = vlm.prompt([noise(0), noise(1, 30, 30)], WORDS)
    found = mv.gradient_attribution(vlm, two, METRIC)
    expected = sum((x * gradient).sum(-1) for x, gradient in entering(vlm, two))
    near(found.attribution, expected)
    for number, image in enumerate(two.images):
        held = found.where(found.image == number, drop=True)
        assert held[found.attribution.dims[0]].values.tolist() == sorted(image.positions + image.separators)
        figure = mv.plot.over_image(found.attribution, image, two.pictures[number])
        assert len(figure.data) == len(image.tiles)


# -- what if -----------------------------------------------------------------------------------------------------------


@every
def test_a_dose_multiplies_the_odds_of_the_image_or_says_why_it_cannot(case: str) -> None:
    vlm, real, _ = parts(case)
    if case in CROSS:
        with pytest.raises(ValueError) as error:
            mv.dose_response(vlm, real, METRIC, [0, 1])
        assert str(error.value) == (
            "this model sees the picture by cross-attention, in layers 1, 3, where all keys are the picture's, so a "
            "bias on them changes nothing; pass keys=, positions of the text, or use mv.ablate_each_head."
        )
    keys = real.question if case in CROSS else None
    found = mv.dose_response(vlm, real, METRIC, [0, 1.5, -np.inf], layers=[0], keys=keys)
    near(found.metric.sel(amount=0), own_metric(vlm, real))
    own = patterns(case)[mv.Site("pattern", 0)][0, :, -1, keys or real.image].sum(-1)
    odds = own * np.exp(1.5)
    near(found.mass_by_layer.sel(layer=0), [own.mean(), (odds / (odds + 1 - own)).mean(), 0])
    assert [layer for layer in layers_of(vlm) if np.isnan(found.mass_by_layer.sel(layer=layer)).all()] == crossing(case)
    near(found.mass, found.mass_by_layer.mean("layer"))


@every
def test_a_sweep_is_one_run_for_each_point(case: str) -> None:
    vlm, real, _ = parts(case)

    def edits(layer: int, factor: float) -> list[mv.Edit]:
        return [mv.Edit(mv.Site("mlp_out", layer), lambda x: x * factor)]

    found = mv.sweep(vlm, real, edits, METRIC, layer=[0, 1], factor=[0.5, 1.0])
    near(found.sel(factor=1.0), [own_metric(vlm, real)] * 2)
    for layer in (0, 1):
        logits = vlm.run(real, edits=edits(layer, 0.5)).logits[0]
        near(found.sel(layer=layer, factor=0.5), float(logits[30] - logits[31]))


@pytest.mark.parametrize("case", [case for case in BY_WORDS if case not in PARALLEL])
@zoo.second_environment
def test_a_ready_encoding_gives_what_the_words_gave(case: str) -> None:
    vlm, real, _ = parts(case)
    bare = mv.VLM(vlm.hf, None, name=case)
    ready = bare.prompt(encoding=real.encoding)
    layer = (crossing(case) or [0])[0]
    for experiment in (
        lambda vlm, prompt: mv.answer_probabilities(vlm, {"a": prompt}, [30, 31]),
        lambda vlm, prompt: mv.attention_map(vlm, prompt, layer),
        lambda vlm, prompt: mv.logit_lens(vlm, prompt).probability,
        lambda vlm, prompt: mv.ablate_each_head(vlm, prompt, METRIC),
        lambda vlm, prompt: mv.gradient_attribution(vlm, prompt, METRIC).attribution,
        lambda vlm, prompt: mv.patch_spans(vlm, prompt, prompt, METRIC, {"image": prompt.image}).metric,
        lambda vlm, prompt: mv.attention_profile(vlm, prompt).mass.sel(span="image"),
    ):
        near(experiment(bare, ready), experiment(vlm, real), 1e-6)


def test_a_ready_encoding_that_does_not_say_how_tiles_lie_is_refused() -> None:
    vlm, real, _ = parts("aya_vision")
    with pytest.raises(ValueError) as error:
        vlm.prompt(encoding=real.encoding)
    assert str(error.value) == (
        "pixel_values hold 7 squares, and a ready encoding does not say how they lie in a picture; make the prompt "
        "from the picture."
    )


# -- without a picture -------------------------------------------------------------------------------------------------

SKIPPED = (
    "the prompt holds no image, and layers 1, 3 of this model run only with one; make it with vlm.prompt(image, text)."
)


@pytest.mark.parametrize(
    "experiment",
    [
        mv.logit_lens,
        lambda vlm, prompt: mv.ablate_each_head(vlm, prompt, METRIC),
        lambda vlm, prompt: mv.patch_spans(vlm, prompt, prompt, METRIC),
    ],
    ids=["lens", "ablation", "patching"],
)
def test_layers_that_run_only_with_a_picture_are_refused_without_one(experiment: Callable) -> None:
    vlm, *_ = parts("mllama")
    with pytest.raises(ValueError) as error:
        experiment(vlm, vlm.prompt(None, WORDS))
    assert str(error.value) == SKIPPED


def test_what_does_not_need_those_layers_works_without_a_picture() -> None:
    vlm, *_ = parts("mllama")
    words = vlm.prompt(None, WORDS)
    near(mv.attention_profile(vlm, words).mass.sel(layer=[0, 2, 4]).sum("span"), np.ones((1, 3, 4)))
    assert mv.logit_lens(vlm, words, layers=[0, 4]).layer.values.tolist() == [0, 4]
    near(mv.answer_probabilities(vlm, {"a": words}, [30])[0], own_logits(vlm, words)[0].softmax(-1)[[30]])


# -- figures -----------------------------------------------------------------------------------------------------------

ELSEWHERE = {
    "keys": "this picture is seen by cross-attention, whose keys are its squares, and no position of the text stands "
    "for one; mv.attention_map in a layer of cross-attention and mv.gradient_attribution give values by key.",
    "patches": "this picture is seen through a Q-Former, whose queries stand for no place in it; mv.queries_to_patches "
    "says where they look, and mv.compose_queries carries values on them over to the patches.",
}


def drawn(case: str) -> tuple[mv.VLM, mv.Prompt, xr.DataArray]:
    vlm, real, _ = parts(case)
    return vlm, real, mv.gradient_attribution(vlm, real, METRIC).attribution


@pytest.mark.parametrize("case", [case for case in BY_WORDS if case not in QUERIES])
def test_every_square_is_drawn_once_with_its_own_value(case: str) -> None:
    _, real, values = drawn(case)
    (image,) = real.images
    figure = mv.plot.over_image(values, image, real.pictures[0])
    shown = np.concatenate([np.array(one.z, dtype=float).flatten() for one in figure.data])
    by_place = dict(zip(values[values.dims[0]].values.tolist(), values.values.tolist(), strict=True))
    expected = [by_place[position] for position in image.positions]
    near(np.sort(shown[np.isfinite(shown)]), np.sort(expected), 1e-9)
    assert len(mv.plot.token_grid(real).layout.images) == len({one.xaxis for one in figure.data})


@pytest.mark.parametrize("case", [*CROSS, *QUERIES])
def test_the_lens_of_tokens_without_a_place_is_not_drawn(case: str) -> None:
    vlm, real, _ = drawn(case)
    with pytest.raises(ValueError) as error:
        mv.plot.tokens_over_image(mv.logit_lens(vlm, real), real, layer=0)
    of = "keys" if case in CROSS else "patches"
    assert str(error.value) == f"what the lens reads at positions cannot be drawn: {ELSEWHERE[of]}"


@pytest.mark.parametrize("case", QUERIES)
def test_values_on_queries_are_not_drawn_on_patches(case: str) -> None:
    _, real, values = drawn(case)
    assert (values.row == -1).all()
    with pytest.raises(ValueError) as error:
        mv.plot.over_image(values, real.images[0], real.pictures[0])
    assert str(error.value) == f"values by position cannot be drawn: {ELSEWHERE['patches']}"
    with pytest.raises(ValueError) as error:
        mv.plot.over_image(values.values, real.images[0], real.pictures[0])
    assert str(error.value) == f"the image has 16 patches, and values of shape (8,) were given; {ELSEWHERE['patches']}"


def test_values_by_position_are_not_drawn_on_keys() -> None:
    _, real, _ = drawn("mllama")
    values = xr.DataArray([1.0], dims=["position"], coords={"position": real.image})
    with pytest.raises(ValueError) as error:
        mv.plot.over_image(values, real.images[0], real.pictures[0])
    assert str(error.value) == f"values by position cannot be drawn: {ELSEWHERE['keys']}"


def test_squares_that_are_keys_say_so() -> None:
    _, real, values = drawn("mllama")
    figure = mv.plot.over_image(values, real.images[0], real.pictures[0])
    assert figure.data[0].hovertext[0][0].startswith("key 1<br>tile 0, row 0, column 0<br>")


@pytest.mark.parametrize("case", [name for name, variant in VARIANTS.items() if variant.needs_torchvision])
def test_a_ready_encoding_has_no_picture_to_draw_on(case: str) -> None:
    _, real, _ = parts(case)
    with pytest.raises(ValueError) as error:
        mv.plot.token_grid(real)
    assert str(error.value) == (
        "the prompt has no picture; make it with vlm.prompt(image, text), not from a ready encoding."
    )


# -- the report --------------------------------------------------------------------------------------------------------

SAID = {
    "llava_next-vicuna": [
        "takes 70 of the prompt’s 84 positions, of which 6 stand for no place in it.",
        "squares of 5 tiles (5 of 4 × 4)",
        "16 of the grids’ 80 squares have no token.",
        ">3 to 72<",
    ],
    "idefics3": ["squares of 7 tiles (7 of 3 × 3)", "The picture with a grid of squares of 7 tiles", ">5 to 13, "],
    "aya_vision": ["squares of 7 tiles (7 of 3 × 3)"],
    "paligemma2": ["The picture with the 4 × 4 squares that the vision tower turns into one image token each"],
    "mllama": [
        "takes 1 of the prompt’s 15 positions, and 64 keys of the cross-attention in layers 1, 3.",
        "Left out are layers 1, 3, which attend to the picture’s keys and not to the text.",
        "The image’s one token stands for no place in the picture, so nothing is drawn there.",
        "Layers 1, 3 go on looking at the null image, whatever is patched.",
        "Left out is what it says with a bias on attention to the image: layers 1, 3 look at the picture alone",
    ],
    "instructblip": [
        "the queries of a Q-Former, which read its 16 patches.",
        "The image tokens are a Q-Former’s queries, which stand for no place, so nothing is drawn on the picture",
    ],
}


@pytest.mark.parametrize("case", SAID)
@zoo.second_environment
def test_a_report_says_what_it_leaves_out(case: str, tmp_path: Path) -> None:
    vlm, real, _ = parts(case)
    text = report(vlm, real, real.with_image(mv.images.black), tmp_path, answers=(30, 31)).read_text(encoding="utf-8")
    for sentence in SAID[case]:
        assert sentence in text
    left_out = text.count("This part could not be made.")
    assert left_out == (2 if case in CROSS else 0)  # once in short, once in its place: the bias
    assert "nan" not in " ".join(part.split('"')[0] for part in text.split('aria-label="')[1:])


def test_a_report_draws_every_picture(tmp_path: Path) -> None:
    vlm, *_ = parts("idefics3")
    two = vlm.prompt([noise(0), noise(1, 30, 30)], WORDS)
    text = report(vlm, two, two.with_image(mv.images.black), tmp_path, answers=(30, 31)).read_text(encoding="utf-8")
    assert "The 2 pictures take" in text
    for said in ("Picture 1 with a grid of", "Image 1: The picture coloured by attention", "Null image 1"):
        assert said in text
    assert "This part could not be made." not in text
