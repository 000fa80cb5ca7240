"""Every sentence that mechvlm refuses with, word for word; a `raise` that no test reaches fails the last test."""

# ruff: noqa: ARG005

import ast
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jaxtyping
import numpy as np
import pytest
import tiny
import torch
import transformers
import xarray as xr
import zoo
from circuit_cases import CASES as CIRCUIT_CASES
from circuit_cases import MODULES as CIRCUIT_MODULES
from test_devices import CASES as DEVICE_CASES
from test_load import CASES as LOAD_CASES
from test_sendable import CASES as SENT_CASES
from test_stats_errors import CASES as STATS_CASES
from test_stats_errors import MODULES as STATS_MODULES
from torch import Tensor, ones, zeros
from transformers import (
    Blip2Config,
    CLIPConfig,
    CLIPVisionConfig,
    Dinov2Config,
    GenerationConfig,
    GPT2Config,
    LlavaConfig,
    LlavaProcessor,
    T5Config,
)
from zoo import aya, gemma, idefics, llava, mistral, mllama, molmo, painting, queries, qwen

import mechvlm as mv
from mechvlm import plan, shapes
from mechvlm.archs import ARCHS
from mechvlm.batch import check_gradients, check_kernel, check_padding
from mechvlm.experiments.circuit_runs import circuit_metrics
from mechvlm.experiments.inputs import squares_of
from mechvlm.experiments.saliency import completeness
from mechvlm.generating import check_copies, check_static_cache
from mechvlm.grids import check_pictures, grids_of
from mechvlm.imagemap import Grid
from mechvlm.layout import Layout
from mechvlm.load import type_of
from mechvlm.matching import check_matched
from mechvlm.nodes import Node
from mechvlm.refusals import ENCODER_DECODER
from mechvlm.run import of_row
from mechvlm.visit import Visit, check_result

PACKAGE = Path(mv.__file__).parent
INF = float("inf")
FAMILIES = (aya, gemma, idefics, llava, mistral, mllama, molmo, queries, qwen)
ZOO = {name: variant for family in FAMILIES for name, variant in family.VARIANTS.items()}
KNOWN = ", ".join(sorted(ARCHS))
PICTURE = tiny.picture()
Case = tuple[str, Callable[[], object]]


@pytest.fixture(autouse=True)
def untyped() -> Iterator[None]:
    """Without the test run's type checks, so that a wrong type meets our own sentence, as it does for users."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@cache
def vlm() -> mv.VLM:
    return tiny.vlm()


@cache
def bare() -> mv.VLM:
    return tiny.vlm(with_processor=False)


@cache
def real() -> mv.Prompt:
    return vlm().prompt(tiny.picture(), "is there a dog ?")


@cache
def blind() -> mv.Prompt:
    return vlm().prompt(None, "is there a dog ?")


def ask(**given: Any) -> mv.Run:
    return vlm().run(real(), **given)


def said(**given: Any) -> mv.Generation:
    return vlm().generate(real(), do_sample=False, **given)


def laid(
    name: str,
    encoding: Mapping[str, Tensor | None] = MappingProxyType({}),
    settings: Any = None,
    sizes: Any = None,
    config: Any = None,
) -> list[Grid]:
    """How another architecture's tiny model takes one picture, with something in its encoding changed or taken away."""
    variant = ZOO[name]
    given = config or with_settings(name)
    processor = None if variant.needs_torchvision else variant.processor()
    held = {**painting.encoded(variant, processor, [tiny.picture(0, 60, 40)]), **encoding}
    changed = {key: x for key, x in held.items() if x is not None}
    return grids_of(shapes.parts_of(given).grid, given, changed, settings, sizes)


def with_settings(name: str, **changed: Any) -> Any:
    """Another architecture's configuration with something changed."""
    given = ZOO[name].model().config
    for key, value in changed.items():
        setattr(given.text_config if key in given.text_config.to_dict() else given, key, value)
    return given


def image_token(name: str) -> int:
    return ZOO[name].model().config.image_token_id


def several() -> dict[str, Tensor]:
    """Two images of one prompt of LLaVA-OneVision, each padded to a square."""
    return llava.encoding_llava_onevision([tiny.picture(0, 60, 40)] * 2, "is", nested=True)


def asked_of(name: str) -> mv.Prompt:
    """A question about a picture, of another architecture's tiny model."""
    return zoo.ask(zoo.build(name), tiny.picture(0, 60, 40))


def without_small_letters() -> tuple[mv.VLM, mv.Prompt]:
    """A model whose tokenizer writes a word in small letters as two tokens, one of which is the word."""
    other = tiny.vlm()
    prompt = other.prompt(PICTURE, "is there a dog ?")
    ids = {"yes": [8, 9], "Yes": [7], " yes": [9], " Yes": [8]}
    other.processor.tokenizer.encode = lambda word, **_: ids[word]
    return other, prompt


def change(function: Callable = torch.clone, site: str = "text.0.z", **more: Any) -> list[mv.Edit]:
    return [mv.Edit(site, function, **more)]


def bare_run(**given: Any) -> mv.Run:
    return bare().run(bare().prompt(encoding=tiny.encoding()), **given)


def second_pass() -> None:
    visit = Visit(plan.make_plan([real()], vlm().shape))
    visit.step = 1
    visit.touch(("resid_pre", 0, "text"), zeros(1, 5, 32))


def ready(**changed: Any) -> mv.Prompt:
    """A ready encoding with something changed; None takes it away."""
    given = {**tiny.encoding(), **changed}
    return bare().prompt(encoding={name: x for name, x in given.items() if x is not None})


def coarser(model: mv.VLM) -> object:
    """The squares of a picture whose tokens are said to be put together."""
    prompt = zoo.ask(model, tiny.picture(0, 48, 40))
    image = replace(prompt.images[0], tiles=prompt.images[0].tiles[:2])
    return squares_of(model, replace(prompt, images=[image]), prompt.encoding["pixel_values"])


def behind(**settings: Any) -> mv.Prompt:
    """A prompt made by another image processor."""
    return tiny.vlm(with_processor=tiny.processor(**settings)).prompt(tiny.picture(0, 40, 30), "is")


def config(**changed: Any) -> LlavaConfig:
    made = tiny.model().config
    for name, value in changed.items():
        setattr(made, name, value)
    return made


SITES: list[Case] = [
    ("no tower is called 'audio'; there are text, vision, qformer.", lambda: mv.Site("z", 0, "audio")),
    (
        "no activation is called 'patern'. In forward order they are: resid_pre, q, k, v, scores, pattern, z, "
        "cross_scores, cross_pattern, cross_z, attn_out, resid_mid, mlp_out, resid_post, deepstack; and, without a "
        "layer, pixels, embed, image_features, logits.",
        lambda: mv.Site("patern", 0),
    ),
    (
        "deepstack is added to the text tower; leave tower='vision' out.",
        lambda: mv.Site("deepstack", 0, "vision"),
    ),
    ("embed belongs to the whole model; leave tower='qformer' out.", lambda: mv.Site("embed", tower="qformer")),
    ("logits has no layer, and layer=3 was given; leave it out.", lambda: mv.Site("logits", 3)),
    ("logits belongs to the whole model; leave tower='vision' out.", lambda: mv.Site("logits", tower="vision")),
    ("pixels are what the vision tower sees; write Site('pixels', tower='vision').", lambda: mv.Site("pixels")),
    (
        "half at vision.pixels names positions, and vision.pixels has none; edit all of it, by mv.Edit.",
        lambda: vlm().run(real(), edits=[mv.Edit("vision.pixels", lambda x: x / 2, label="half", positions=(3,))]),
    ),
    ("pattern needs a layer, for instance Site('pattern', 0).", lambda: mv.Site("pattern")),
    ("layer -1 is not a layer; layers count from 0.", lambda: mv.Site("pattern", -1)),
    ("layer True is not a layer; layers count from 0.", lambda: mv.Site("pattern", True)),
    ("layer '3' is not a whole number.", lambda: mv.Site("pattern", "3")),  # type: ignore[arg-type]
    ("layer 1.5 is not a whole number.", lambda: mv.Site("pattern", 1.5)),  # type: ignore[arg-type]
    (
        "'text.zed' names no site; write 'text.12.pattern', 'image_features' or, as in TransformerLens, "
        "'blocks.12.attn.hook_pattern'.",
        lambda: mv.Site.parse("text.zed"),
    ),
    ("3 is not a site; write Site('pattern', 12) or 'text.12.pattern'.", lambda: ask(read=[3])),
    ("heads=3 is not a list of heads; write for instance [0].", lambda: mv.ablate_heads(0, 3)),  # type: ignore[arg-type]
    ("heads='34' is not a list of heads; write for instance [0].", lambda: mv.ablate_heads(0, "34")),  # type: ignore[arg-type]
    ("heads=None is not a list of heads; write for instance [0].", lambda: mv.scale_heads(0, None, 2.0)),  # type: ignore[arg-type]
    ("verify True is not a whole number.", lambda: attributed(verify=True)),
    ("heads: 1.5 is not a whole number.", lambda: mv.ablate_heads(0, [1.5])),  # type: ignore[list-item]
    ("queries: 'last' is not a whole number.", lambda: mv.rows(["last"])),  # type: ignore[list-item]
    ("keys is empty, so nothing would be edited; give at least one.", lambda: mv.cut_attention(0, [])),
    (
        "queries is empty, so nothing would be edited; give at least one, or None for all.",
        lambda: mv.cut_attention(0, [1], queries=[]),
    ),
    ("keys holds -1; keys count from 0, and prompt.last is the last position.", lambda: mv.cut_attention(0, [-1])),
    ("factor='2' is not a number.", lambda: mv.scale_heads(0, [0], "2")),  # type: ignore[arg-type]
    ("amount=a Tensor is not a number.", lambda: mv.bias_attention(0, [0], zeros(99))),  # type: ignore[arg-type]
]

MODELS: list[Case] = [
    (
        f"mechvlm does not know 'clip' models yet; it knows {KNOWN}. Adding one is a row in mechvlm/archs.py.",
        lambda: shapes.parts_of(CLIPConfig()),
    ),
    (
        "mechvlm does not read 'gpt2' models: their configuration has no vision_config, so there is no vision tower to "
        f"read beside the words; it knows {KNOWN}.",
        lambda: shapes.parts_of(GPT2Config()),
    ),
    (
        "mechvlm does not read 'blip-2' models whose language model is a 't5': "
        f"{ENCODER_DECODER}; take one with a decoder.",
        lambda: shapes.parts_of(Blip2Config(text_config=T5Config())),
    ),
    (
        "vision_feature_select_strategy is 'odd'; it must be 'default' (without the class token) or 'full'.",
        lambda: shapes.check_settings(_Odd(tiny.model().config)),
    ),
    (
        "vision_feature_layer is [-2, -9], and the vision tower has 3 layers; the configuration does not fit.",
        lambda: shapes.shape_of(config(vision_feature_layer=[-2, -9])),
    ),
    (
        "this llava model has a 'dinov2' as its vision tower, which mechvlm does not know yet; adding one is a row of "
        "TOWER_TYPES in mechvlm/towers.py.",
        lambda: shapes.shape_of(LlavaConfig(vision_config=Dinov2Config())),
    ),
    (
        "this llava model has a 'gpt2' as its text tower, which mechvlm does not know yet; adding one is a row of "
        "TOWER_TYPES in mechvlm/towers.py.",
        lambda: shapes.shape_of(LlavaConfig(vision_config=CLIPVisionConfig(), text_config=GPT2Config())),
    ),
    (
        "the model is in training mode, where dropout makes runs differ; call model.eval() first.",
        lambda: mv.VLM(tiny.model().train()),
    ),
    (
        "the attention implementation is 'flash'; mechvlm reads sdpa, eager, flex_attention and flash_attention_2 "
        "exactly. Set vlm.attention, or load with attn_implementation='sdpa'.",
        lambda: setattr(bare(), "attention", "flash"),
    ),
    (
        "flash_attention_2 takes no mask, and in this architecture image tokens see those behind them, which it would "
        "hide from them; use 'sdpa'.",
        lambda: check_kernel("flash_attention_2", "image"),
    ),
    (
        "PyTorch computes no gradients of flex_attention on a CPU; set vlm.attention = 'sdpa' for this run.",
        lambda: check_gradients("flex_attention", torch.device("cpu")),
    ),
    ("None is no name of a model; give one on the hub, a checkpoint directory or 'demo'.", lambda: mv.load(None)),  # type: ignore[arg-type]
    ("'' is no name of a model; give one on the hub, a checkpoint directory or 'demo'.", lambda: mv.load("")),
    ("there is no device 'gpu'; give 'cpu', 'cuda' or 'cuda:0'.", lambda: mv.load("demo", device="gpu")),
    (
        "there is no directory '/no/such/model'; give a checkpoint directory, or a name on the hub.",
        lambda: mv.load("/no/such/model"),
    ),
    (
        "there is no model 'no/such model': it is no checkpoint directory, and the hub did not give it (Repo id must "
        "use alphanumeric chars, '-', '_' or '.'. The name cannot start or end with '-' or '.' and the maximum length "
        "is 96: 'no/such model').",
        lambda: mv.load("no/such model"),
    ),
    (
        "there is no type 'float33' of weights; give one of 'float32', 'float16', 'bfloat16', 'float64', 'auto'.",
        lambda: type_of("float33"),
    ),
]


class _Odd:
    """A configuration as only an older transformers would let it be made."""

    def __init__(self, config: Any) -> None:
        self.model_type, self.vision_config = config.model_type, config.vision_config

    def to_dict(self) -> dict[str, Any]:
        return {"vision_feature_select_strategy": "odd"}


class _Choosy(LlavaProcessor):
    """A processor that cannot take a picture."""

    @classmethod
    def of(cls, processor: LlavaProcessor) -> LlavaProcessor:
        processor.__class__ = cls
        return processor

    def __call__(self, **_: Any) -> Any:
        raise ValueError("it is too small.\nSee the manual.")


PROMPTS: list[Case] = [
    (
        "this prompt was made from a ready encoding or without an image, so there is no picture to exchange; make it "
        "with vlm.prompt(image, text).",
        lambda: blind().with_image(mv.images.black),
    ),
    ("the prompt holds 1 images and 2 were given.", lambda: real().with_image([tiny.picture()] * 2)),
    (
        "with this picture the prompt has 10 positions and before 26, so positions cannot be matched; give a picture "
        "of 24 x 24 pixels.",
        lambda: replace(real(), again=lambda pictures, words: blind()).with_image(mv.images.black),
    ),
    (
        "this prompt was made from a ready encoding; make it with vlm.prompt(image, text).",
        lambda: ready().with_text("is"),
    ),
    ("'cat' are no words of the question 'is there a dog ?'.", lambda: real().find("cat")),
    (
        "the text has 1 <image> and 2 images were given; with raw=True each image needs one <image> in the text, "
        "where it is to stand.",
        lambda: vlm().prompt([tiny.picture()] * 2, "<image> is", raw=True),
    ),
    ("the question is empty; write one, or pass raw=True with the whole prompt.", lambda: vlm().prompt(None, " ")),
    (
        "the question holds <image> itself, whose place the template decides; pass raw=True to give the whole prompt "
        "verbatim.",
        lambda: vlm().prompt(tiny.picture(), "<image> is"),
    ),
    (
        "an encoding needs input_ids of shape (1, positions), and this one's are (2, 3).",
        lambda: ready(input_ids=zeros(2, 3, dtype=torch.long)),
    ),
    (
        "an encoding needs input_ids of shape (1, positions), and this one's are None.",
        lambda: ready(input_ids=None),
    ),
    ("input_ids must be token ids, whole numbers from 0.", lambda: ready(input_ids=-ones(1, 3, dtype=torch.long))),
    (
        "token id 64 is not in the model's vocabulary of 64.",
        lambda: ready(input_ids=torch.full((1, 3), 64), attention_mask=None),
    ),
    (
        "the encoding of one prompt must not be padded: attention_mask must be all ones, in the shape of input_ids. "
        "Give vlm.run a list of prompts to run them as one batch.",
        lambda: ready(attention_mask=zeros(1, 26)),
    ),
    (
        "the prompt has 300 positions and the model was built for 256.",
        lambda: ready(input_ids=ones(1, 300, dtype=torch.long), attention_mask=None, pixel_values=None),
    ),
    (
        "pixel_values are (1, 3, 12, 12); this model sees (images, 3, 24, 24).",
        lambda: ready(pixel_values=zeros(1, 3, 12, 12)),
    ),
    (
        "pixel_values must be finite floats, as the image processor makes them from a picture.",
        lambda: ready(pixel_values=zeros(1, 3, 24, 24) / 0),
    ),
    ("pixel_values hold no image; leave them out of the encoding.", lambda: ready(pixel_values=zeros(0, 3, 24, 24))),
    (
        "the prompt holds 16 image tokens and 2 images, which take 16 each; every image needs its tokens and every "
        "image token its image.",
        lambda: ready(pixel_values=zeros(2, 3, 24, 24)),
    ),
    ("encoding= is a whole prompt; leave image and text out.", lambda: vlm().prompt("a.png", encoding={})),
    (
        "a prompt needs its text; write vlm.prompt(image, 'What is this?'), not text=None.",
        lambda: vlm().prompt(tiny.picture()),
    ),
    (
        "this model was given no processor, so it takes ready encodings: vlm.prompt(encoding=...).",
        lambda: bare().prompt(tiny.picture(), "is"),
    ),
    (
        "position 0 is not a token of this image, whose tokens are 3 to 18.",
        lambda: real().images[0].box(0),
    ),
    ("(24, 0) is outside the picture, which is 24 x 24 pixels.", lambda: real().images[0].at(24, 0)),
    (
        "heat() takes 16 values, one per image token, and got an array of shape (3,).",
        lambda: real().images[0].heat([1, 2, 3]),
    ),
    (
        "CLIPImageProcessor has do_pad=True, and mechvlm undoes the padding of LlavaImageProcessor only; set "
        "image_processor.do_pad = False.",
        lambda: behind(do_pad=True),
    ),
    (
        "the processor resizes pictures to {'longest_edge': 40, 'shortest_edge': 24}, and mechvlm undoes only a "
        "'shortest_edge', or 'height' and 'width'; set image_processor.size to one of these.",
        lambda: behind(size={"shortest_edge": 24, "longest_edge": 40}),
    ),
    (
        "the processor makes pictures of 32 x 24 pixels from one of 40 x 30, and this model sees 24 x 24; the "
        "processor belongs to another model.",
        lambda: behind(crop=False),
    ),
    ("a Tensor is not a prompt; make one with vlm.prompt(image, text).", lambda: vlm().run(zeros(99))),  # type: ignore[arg-type]
    ("the list of prompts is empty.", lambda: vlm().run([])),
    (
        "the model's processor cannot take this prompt (pictures: 24 x 24): it is too small.",
        lambda: tiny.vlm(with_processor=_Choosy.of(tiny.processor())).prompt(tiny.picture(), "is"),
    ),
    (
        "this image is seen as 2 tiles, each with a grid of its own; use .tiles.",
        lambda: replace(real().images[0], tiles=real().images[0].tiles * 2).rows,
    ),
]

READINGS: list[Case] = [
    ("rows() was given no query; give at least one position, for instance rows([-1]).", lambda: mv.rows([])),
    (
        "entropy() was given no key; give at least one position, for instance entropy([-1]).",
        lambda: mv.entropy([0], keys=[]),
    ),
    ("top_keys(0) reads nothing; give 1 or more.", lambda: mv.top_keys(0)),
    (
        "entropy() reads a pattern and no gradient; read it in a run without grad_of=.",
        lambda: ask(read={"text.0.pattern": mv.entropy()}, grad_of=mv.logit_difference(7, 9)),
    ),
    (
        "position 99 is out of range at text.0.pattern, where this prompt has 26 positions, counted from 0 (a key "
        "to read).",
        lambda: ask(read={"text.0.pattern": mv.rows([-1], keys=[99])}),
    ),
    (
        "attention is to be kept unmade at text.0.pattern (by lazy(), or an experiment that follows it), and an edit "
        "there has to have the whole map; give the edit rows='each' if it treats every query by itself, or read "
        "rows(), mass() or the like.",
        lambda: ask(read={"text.0.pattern": mv.lazy()}, edits=change(lambda x: x * 0.5, "text.0.pattern")),
    ),
    (
        "edited attention cannot be split into the rows of its batch; read rows(), mass() or the like instead of "
        "lazy(), or run the rows one by one.",
        lambda: (
            vlm()
            .run(
                [real(), real()],
                {"text.0.pattern": mv.lazy()},
                [mv.Edit("text.0.pattern", lambda x: x * 0.5, rows="each")],
            )
            .rows
        ),
    ),
    (
        "the values are [3, 2]; they must be columns of one number for each of 26 keys.",
        lambda: ask(read={"text.0.pattern": mv.lazy()})["text.0.pattern"].mixed(zeros(3, 2)),
    ),
    (
        "the largest 0 weights are none; give 1 or more.",
        lambda: ask(read={"text.0.pattern": mv.lazy()})["text.0.pattern"].top(0),
    ),
    (
        "the queries hold 99; this attention has 26, counted from 0 (None means all).",
        lambda: ask(read={"text.0.pattern": mv.lazy()})["text.0.pattern"].rows([99]),
    ),
    (
        "the weights are [1, 4, 3] for 2 queries and 4 heads; give one for each of them, with one head for all or "
        "each.",
        lambda: ask(read={"text.0.pattern": mv.lazy()})["text.0.pattern"].drawn(zeros(1, 4, 3), [0, 1]),
    ),
    (
        "tolerance=nan is no fraction of a difference; give a number from 0, such as 0.05.",
        lambda: mv.integrated_gradients(vlm(), real(), mv.logit_difference(7, 9), tolerance=float("nan")),
    ),
    (
        "this attention knows no gradient; take it from run.grad of a run with grad_of= a metric, not from the run.",
        lambda: ask(read={"text.0.pattern": mv.lazy()})["text.0.pattern"].gradient_rows([-1]),
    ),
    (
        "attention_budget='much' is no size of memory; give bytes, or a text such as '256MiB'.",
        lambda: mv.load("demo", attention_budget="much"),
    ),
    (
        "mass() was given no span; give for instance prompt.spans or {'image': prompt.image}.",
        lambda: mv.mass({}),
    ),
    (
        "spans=[1, 2] are not named; give for instance prompt.spans or {'image': prompt.image}.",
        lambda: mv.mass([1, 2]),  # type: ignore[arg-type]
    ),
    (
        "read='text.0.z' is not a list; write read=[site, ...] or read={site: function}.",
        lambda: ask(read="text.0.z"),
    ),
    (
        "the reading of text.0.z is 3; give a function of its tensor, or list the site alone.",
        lambda: ask(read={"text.0.z": 3}),
    ),
    ("rows() reads scores or pattern, not text.0.z.", lambda: ask(read={"text.0.z": mv.rows([0])})),
    ("mass() reads pattern, not text.0.scores.", lambda: ask(read={"text.0.scores": mv.mass({"a": [0]})})),
    (
        "a step of a generation has one query, the newest position; read rows([-1]) there.",
        lambda: said(read_each_step={"text.0.pattern": mv.rows([0])}),
    ),
    (
        "position 26 is out of range at text.0.pattern, where this prompt has 26 positions, counted from 0 (a query "
        "to read).",
        lambda: ask(read={"text.0.pattern": mv.rows([26])}),
    ),
    (
        "position 99 is out of range at text.0.pattern, where this prompt has 26 positions, counted from 0 (a key of "
        "span 'a').",
        lambda: ask(read={"text.0.pattern": mv.mass({"a": [99]})}),
    ),
    (
        "the text tower has 3 layers, counted from 0, so there is no text.9.z to read.",
        lambda: ask(read=["text.9.z"]),
    ),
    ("this model has no qformer tower, so there is no qformer.0.z to read.", lambda: ask(read=["qformer.0.z"])),
    (
        "there is no text.0.cross_pattern: layer 0 of this model's text tower has resid_pre, q, k, v, scores, pattern, "
        "z, attn_out, resid_mid, mlp_out, resid_post.",
        lambda: ask(read=["text.0.cross_pattern"]),
    ),
    (
        "no module of this model makes one vector a square, so there is no vision.embed to read.",
        lambda: plan.check_site(
            mv.Site("embed", tower="vision"), [real()], replace(vlm().shape, embeds_vision=False), "read"
        ),
    ),
    (
        "the prompt holds no image, so there is no vision.0.z to read; make it with vlm.prompt(image, text).",
        lambda: vlm().run(blind(), read=["vision.0.z"]),
    ),
    (
        "the reading of text.0.z failed on float32[1, 26, 4, 8]: index 99 is out of bounds for dimension 1 with size "
        "26.",
        lambda: ask(read={"text.0.z": lambda z: z[:, 99]}),
    ),
    ("text.0.z was not read in this run; pass read=[..., 'text.0.z'].", lambda: ask()["text.0.z"]),
    (
        "text.0.z has no gradient in this run; pass read=[..., 'text.0.z'] and grad_of= a metric.",
        lambda: ask(read=["text.0.z"]).grad["text.0.z"],
    ),
    (
        "text.0.z was not read in this generation; pass read_each_step=[..., 'text.0.z'].",
        lambda: said(max_new_tokens=1)["text.0.z"],
    ),
    (
        "the prompts differ in length, so text.0.z is not one tensor; take each row alone, run.rows[0][site], or read "
        "it with a function whose result has one shape.",
        lambda: vlm().run([real(), blind()], read=["text.0.z"])["text.0.z"],
    ),
    (
        "the reading of text.0.z is no tensor, so it cannot be split into rows.",
        lambda: vlm().run([real(), real()], read={"text.0.z": lambda z: z.shape}).rows,
    ),
    (
        "the reading of text.0.z is () for 2 rows, so it cannot be split; keep the batch axis first.",
        lambda: vlm().run([real(), real()], read={"text.0.z": torch.mean}).rows,
    ),
    (
        "there is no row 5; the batch has 1.",
        lambda: of_row(("z", 0, "text"), [((None, 0, None), zeros(1))], 5, Layout((0,), ((16,),), (1,))),
    ),
    (
        "position 26 is not in the prompt, which has 26 positions.",
        lambda: ask(position=26),
    ),
]

EDITS: list[Case] = [
    (
        "the edit of text.0.z holds 3, which is not a function from tensor to tensor.",
        lambda: mv.Edit("text.0.z", 3),
    ),
    ("when='now' is not known; choose from 'always', 'prompt', 'decode'.", lambda: change(when="now")),
    ("on='both' is not known; choose from 'value', 'grad'.", lambda: change(on="both")),
    (
        "way='fast' is not known; choose from 'auto', 'mask', 'feature', 'recompute'.",
        lambda: mv.bias_attention(0, [0], 1.0, way="fast"),
    ),
    (
        "gradients exist in the pass over the prompt only; leave when='decode' out.",
        lambda: change(on="grad", when="decode"),
    ),
    (
        "to has 1 axes; it must be 'head d_head' (a mean), 'pos head d_head' or 'batch pos head d_head'.",
        lambda: mv.ablate_heads(0, [0], zeros(8)),
    ),
    (
        "to is 'mean', and it must be a tensor; torch.as_tensor makes one.",
        lambda: mv.ablate_heads(0, [0], "mean"),  # type: ignore[arg-type]
    ),
    (
        "to holds (4, 9) for (1, 26, 4, 8); they must be alike.",
        lambda: ask(edits=[mv.ablate_heads(0, [0], zeros(4, 9))]),
    ),
    (
        "amount=nan cannot be added to a score; give a number, or -inf to cut.",
        lambda: mv.bias_attention(0, [0], -INF + INF),
    ),
    (
        "factor=inf cannot multiply a score; give a finite number.",
        lambda: mv.scale_attention(0, [0], INF),
    ),
    (
        "a mask is added and multiplies nothing; use way='feature', 'recompute' or 'auto'.",
        lambda: mv.scale_attention(0, [0], 2.0, way="mask"),
    ),
    (
        "rows='each' are queries' rows of scores or pattern; text.0.z has none.",
        lambda: mv.Edit("text.0.z", torch.clone, rows="each"),
    ),
    (
        "rows is empty, so nothing would be edited; give at least one, 'each', or None for all.",
        lambda: mv.Edit("text.0.pattern", torch.clone, rows=[]),
    ),
    ("the patch of text.0.z has 1 axes; it must have batch pos head d_head.", lambda: mv.patch("text.0.z", zeros(8))),
    (
        "the patch of text.0.z holds (1, 26, 4, 9) for (1, 26, 4, 8); they must be alike.",
        lambda: ask(edits=[mv.patch("text.0.z", zeros(1, 26, 4, 9))]),
    ),
    (
        "a direction is added to the residual stream or to what is added to it, not to text.0.z.",
        lambda: mv.steer("text.0.z", zeros(8)),
    ),
    (
        "a direction is one vector, d_model, and this one's shape is (1, 32).",
        lambda: mv.steer("text.0.resid_pre", zeros(1, 32)),
    ),
    (
        "the direction has 8 numbers and text.0.resid_pre has 32.",
        lambda: ask(edits=[mv.steer("text.0.resid_pre", zeros(8))]),
    ),
    (
        "text.0.pattern has no vector at a position; use mv.patch, mv.cut_attention or mv.Edit there.",
        lambda: mv.replace_span("text.0.pattern", [0], zeros(26)),
    ),
    (
        "the value for 2 positions of text.0.z is (3, 4, 8); it must be (4, 8), or that once for each position.",
        lambda: ask(edits=[mv.replace_span("text.0.z", [0, 1], zeros(3, 4, 8))]),
    ),
    ("edits is no mod at text.0.z; it must be a list of edits.", lambda: ask(edits=change(label="no mod")[0])),
    ("a variant is None; it must be a list of edits.", lambda: ask(variants=[None])),
    (
        "3 is not an edit; write mv.Edit(site, function), or use a builder such as mv.ablate_heads. edits is a list "
        "of them, and variants a list of such lists, one for each row.",
        lambda: ask(edits=[3]),
    ),
    (
        "the text tower has 4 heads a layer, so there is no head 9 (scale heads [9] by 2 at text.0.z).",
        lambda: ask(edits=[mv.scale_heads(0, [9], 2.0)]),
    ),
    (
        "an edit of vision.2.z cannot reach the answer: this model takes its image features before layer 2 of the "
        "vision tower.",
        lambda: ask(edits=change(site="vision.2.z")),
    ),
    (
        "patch at text.0.z (prompt only) holds 9 positions and this run has 26 there, so positions cannot be matched; "
        "make the second prompt with prompt.with_image, which keeps them.",
        lambda: ask(edits=[mv.patch("text.0.z", zeros(1, 9, 4, 8))]),
    ),
    (
        "clone at text.0.z edits a gradient, and this run computes none; pass grad_of= a metric.",
        lambda: ask(edits=change(on="grad", label="clone")),
    ),
    (
        "clone at text.0.z (decode only) acts in decode steps, and this run has none; use vlm.generate with 2 tokens "
        "or more.",
        lambda: ask(edits=change(when="decode", label="clone")),
    ),
    (
        "clone at text.0.k (prompt only) would be lost after the first step, since later steps read keys and values "
        "from the cache; use when='always', which edits what every step reads.",
        lambda: said(edits=change(site="text.0.k", when="prompt", label="clone")),
    ),
    (
        "clone at vision.0.z (decode only) never acted in this run, so nothing it was to change was changed. A decode "
        "step's edit needs a second token, and a gradient's edit a site that the metric depends on.",
        lambda: said(edits=change(site="vision.0.z", when="decode", label="clone"), max_new_tokens=2),
    ),
    (
        "the edit of text.0.z returned int; an edit must return the tensor that goes on.",
        lambda: ask(edits=change(lambda z: 3)),
    ),
    (
        "the edit of text.0.z returned float32[26, 4, 8] for float32[1, 26, 4, 8]; an edit must keep the shape and "
        "type of what it is given.",
        lambda: ask(edits=change(lambda z: z[0])),
    ),
    (
        "the edit of the gradient at text.0.z returned float16[1, 26, 4, 8] for float32[1, 26, 4, 8]; an edit must "
        "keep the shape and type of what it is given.",
        lambda: ask(edits=change(Tensor.half, on="grad"), grad_of=mv.probability(3)),
    ),
    (
        "the edit of text.0.z returned a tensor on meta for one on cpu; an edit must stay there.",
        lambda: check_result(zeros(1, device="meta"), zeros(1), ("z", 0, "text"), "value"),
    ),
    (
        "the edit of text.0.z returned 832 values that are not a number (NaN).",
        lambda: ask(edits=change(lambda z: z * (INF - INF))),
    ),
    (
        "the logits of row 0 are not a number (NaN), so nothing can be said of this run; look for an edit that made "
        "values too large for float32.",
        lambda: ask(edits=change(lambda x: x * INF, "text.1.resid_post")),
    ),
    (
        "variants are rows of one prompt: give one prompt and at least one list of edits.",
        lambda: ask(variants=[]),
    ),
]

METRICS: list[Case] = [
    ("None is not a word; logit_difference takes words and token ids.", lambda: mv.logit_difference("yes", None)),  # type: ignore[arg-type]
    (
        "logit_difference('yes', 'Yes') compares a word with itself; give two different words.",
        lambda: vlm().metric(mv.logit_difference("yes", "Yes")),
    ),
    (
        "probability('yes') takes logits, batch by vocab, for instance run.logits, and got (64,).",
        lambda: mv.probability("yes")(zeros(64)),
    ),
    (
        "probability('yes') is written in words, and only a model knows their tokens; use "
        "vlm.metric(probability('yes')).",
        lambda: mv.probability("yes")(zeros(1, 64)),
    ),
    (
        "kl_divergence compares with a run or with logits, batch by vocab, and got 'yes'.",
        lambda: mv.kl_divergence("yes"),
    ),
    (
        "the reference's logits hold values that are not a number (NaN); compare with another run.",
        lambda: mv.kl_divergence(zeros(1, 3) * float("nan")),
    ),
    (
        "kl_divergence takes logits, batch by vocab, for instance run.logits, and got (64,).",
        lambda: mv.kl_divergence(zeros(1, 64))(zeros(64)),
    ),
    (
        "the reference's logits are 3 by 64, and the run's 1 by 64; give one row, or one for each of the run's, of the "
        "same model.",
        lambda: ask(grad_of=mv.kl_divergence(zeros(3, 64))),
    ),
    (
        "the metric does not depend on the logits it was given, so it has no gradient.",
        lambda: ask(grad_of=mv.rank("yes")),
    ),
    (
        "piece=0 holds no token; give how many of the vocabulary to decode at once.",
        lambda: mv.logit_lens(vlm(), real(), piece=0),
    ),
    (
        "token id 64 is not in the vocabulary of 64.",
        lambda: vlm().metric(mv.log_probability(64))(zeros(1, 64)),
    ),
    (
        "no spelling of 'zebra' is a single token of this model; give a token id.",
        lambda: vlm().token_ids("zebra"),
    ),
    ("without a processor 'yes' has no token; give token ids instead of words.", lambda: bare().token_ids("yes")),
    (
        "'yes' is no metric; give a function of logits (batch vocab) or mv.logit_difference(...).",
        lambda: ask(grad_of="yes"),
    ),
    ("the metric returned (1, 64) for 1 rows; it must return one number a row.", lambda: ask(grad_of=torch.clone)),
    (
        "the metric returned float for 1 rows; it must return one number a row.",
        lambda: ask(grad_of=lambda logits: 1.0),
    ),
    (
        "the metric does not depend on the logits it was given, so it has no gradient.",
        lambda: ask(grad_of=lambda logits: logits[:, 0].detach()),
    ),
]

GENERATION: list[Case] = [
    ("max_new_tokens=0 generates nothing; give 1 or more.", lambda: said(max_new_tokens=0)),
    (
        "attention_mask comes from the prompt; change the prompt instead of passing it to generate.",
        lambda: said(attention_mask=zeros(1, 26)),
    ),
    (
        "generate does not take use_cache=False: edits and readings rest on steps of one new position, each one pass, "
        "with a cache that grows by it.",
        lambda: said(use_cache=False),
    ),
]

YES = mv.logit_difference("yes", "no")
LATER: list[Case] = [
    (
        "there is no edge m2 -> a1.h0<q> in this model; see mechvlm.nodes for what writes, what reads, and what stands "
        "before what.",
        lambda: circuit_metrics(vlm(), real(), real(), [[("m2", "a1.h0<q>", None)]], YES),
    ),
    (
        "the edge m0 -> logits is at 'sky'; choose from bos, prefix, image, question, last.",
        lambda: circuit_metrics(vlm(), real(), real(), [[("m0", "logits", "sky")]], YES),
    ),
    (
        "batch_size=0 runs nothing; give 1 or more.",
        lambda: circuit_metrics(vlm(), real(), real(), [], YES, batch_size=0),
    ),
    (
        "layers of mllama attend to the picture's features beside the residual stream, so a circuit of its parts "
        "cannot be run; patch their heads with mv.patch_heads(..., kind='cross_z').",
        lambda: circuit_metrics(zoo.build("mllama"), asked_of("mllama"), asked_of("mllama"), [], YES),
    ),
    (
        "steer by 1 at text.1.resid_post is an edit of a sum of what parts write, and a circuit is run part by part; "
        "run circuits of vlm.without_edits(), or edit z or mlp_out.",
        lambda: circuit_metrics(
            vlm().with_edits([mv.steer("text.1.resid_post", torch.ones(1), 1.0)]), real(), real(), [], YES
        ),
    ),
    (
        "'a3.x5' names no node; write for instance 'image', 'a3.h5' or 'm3' for what writes, and 'a3.h5<q>', "
        "'a3.kv1<v>', 'm3' or 'logits' for what reads.",
        lambda: Node.parse("a3.x5"),
    ),
    (
        "the prompts are about 1 pictures, and zones are tested on halves of them; give prompts about at least 4.",
        lambda: mv.methods.viar.audit(vlm(), [real(), real()]),
    ),
    (
        "level=1 and resamples=10 give no interval; give for instance 0.95 and 1000.",
        lambda: mv.methods.viar.audit(vlm(), [real()] * 4, range(4), level=1, resamples=10),
    ),
    (
        "zone=[1, 2] must be layers between the first and the last of 3, one after the other, which have neighbours on "
        "both sides.",
        lambda: mv.methods.viar.audit(vlm(), [real()] * 4, range(4), zone=[1, 2]),
    ),
    (
        "batch_size=0 runs nothing; give 1 or more.",
        lambda: mv.sweep(vlm(), real(), lambda layer: [mv.ablate_heads(layer, [0])], YES, 0, layer=range(2)),
    ),
    (
        "the axis 'layer' holds 1 more than once; give each value once.",
        lambda: mv.sweep(vlm(), real(), lambda layer: [mv.ablate_heads(layer, [0])], YES, layer=[1, 1]),
    ),
    (
        "the edge 'a' has no keys, so nothing would be cut; give at least one.",
        lambda: mv.information_flow(vlm(), real(), YES, edges={"a": (real().last, [])}),
    ),
    (
        "on='embeds' is not where a picture enters; choose from 'image_features', 'pixels'.",
        lambda: mv.causal_trace(vlm(), real(), YES, on="embeds"),
    ),
    (
        "the axis 'position' holds 3 more than once; give each value once.",
        lambda: mv.causal_trace(vlm(), real(), YES, positions=[3, 3]),
    ),
    (
        "out=5 is not a folder; give its path, or None to keep nothing on disk.",
        lambda: mv.sweep(
            vlm(),
            real(),
            lambda layer: [mv.ablate_heads(layer, [0])],
            YES,
            out=5,  # type: ignore[arg-type]
            layer=range(2),
        ),
    ),
    (
        f"out={__file__!r} is a file; give a folder, in which what is finished is kept.",
        lambda: mv.sweep(vlm(), real(), lambda layer: [mv.ablate_heads(layer, [0])], YES, out=__file__, layer=range(2)),
    ),
    (
        "convention='viar' is not known; choose None for correct positions, or 'viar-2026' for what was published.",
        lambda: mv.language_prior_collapse(vlm(), real(), convention="viar"),
    ),
    (
        "spans=['words'] must name spans of a prompt; choose from 'bos', 'prefix', 'image', 'separators', 'question', "
        "'last', 'text'.",
        lambda: mv.language_prior_collapse(vlm(), real(), spans=["words"]),
    ),
    (
        "the prompt holds no image to look at; make it with vlm.prompt(image, text).",
        lambda: mv.language_prior_collapse(vlm(), blind()),
    ),
    (
        "nulls='dark' is no null image; choose from 'black', 'grey', 'white', 'mean', 'noise', 'diffusion', 'blur', "
        "'shuffle', 'swap', 'no_image', or give a function of mv.images.",
        lambda: mv.language_prior_collapse(vlm(), real(), ["black", "dark"]),
    ),
    (
        "nulls holds 'black' more than once; give each once.",
        lambda: mv.language_prior_collapse(vlm(), real(), ["black", mv.images.black]),
    ),
    (
        "the null 'dark' has 2 prompts for 1; give one for each.",
        lambda: mv.language_prior_collapse(vlm(), real(), {"dark": [real(), real()]}),
    ),
    (
        "'swap' takes the picture of another prompt, and all of these are about the same; give prompts about several "
        "pictures, or mv.images.swap(picture).",
        lambda: mv.language_prior_collapse(vlm(), [real(), real()], "swap"),
    ),
    (
        "'no_image' takes the picture out of a question, and this prompt was made from a ready encoding; make it with "
        "vlm.prompt(image, text).",
        lambda: mv.language_prior_collapse(vlm(), vlm().prompt(encoding=tiny.encoding()), "no_image"),
    ),
    (
        "convention='viar-2026' compares with black pictures, in the spans 'image' and 'text', and was asked for white "
        "in text; leave the convention out for others.",
        lambda: mv.language_prior_collapse(vlm(), real(), "white", spans="text", convention="viar-2026"),
    ),
    (
        "this model sees pictures by cross-attention, so no position of its residual stream holds a picture; "
        "mv.gradient_attribution gives gradients by key.",
        lambda: mv.gradient_by_layer(zoo.build("mllama"), asked_of("mllama"), YES),
    ),
    (
        "'no_image' leaves no image tokens to take a gradient at; choose another null.",
        lambda: mv.gradient_by_layer(vlm(), real(), YES, nulls="no_image"),
    ),
    (
        "a gradient is of a metric, and none was given; give mv.logit_difference('yes', 'no').",
        lambda: mv.gradient_by_layer(vlm(), real()),
    ),
    (
        "convention='viar-2026' has a metric of its own, the logit of 'yes'; leave metric out.",
        lambda: mv.gradient_by_layer(vlm(), real(), YES, convention="viar-2026"),
    ),
    (
        "between=[2, 1] must be two layers, the lower first, below the last of 3, whose gradient is zero; give for "
        "instance between=(0, 1).",
        lambda: mv.gradient_by_layer(vlm(), real(), YES, between=[2, 1]),
    ),
    (
        "'yes' is not one token of this model, which 'viar-2026' needs; give a metric, and no convention.",
        lambda: mv.gradient_by_layer(*without_small_letters(), convention="viar-2026"),
    ),
    (
        "at='embed' is not where a picture enters; choose from 'image_features', 'pixels'.",
        lambda: mv.input_times_gradient(vlm(), real(), YES, "embed"),
    ),
    (
        "qwen2_vl models are called with patches, and not with pictures.",
        lambda: squares_of(zoo.build("qwen2_vl"), real(), zeros(1)),
    ),
    (
        "image 0 is seen as 5 squares, whose tokens are put together to 2 grids, so its pixels are no single token's; "
        "take at='image_features'.",
        lambda: coarser(zoo.build("llava_onevision")),
    ),
    (
        "samples=0 and noise=0.15 average nothing; give 1 sample or more, and noise from 0.",
        lambda: mv.smooth_grad(vlm(), real(), YES, samples=0),
    ),
    ("steps=0 takes no gradient; give 1 or more.", lambda: mv.integrated_gradients(vlm(), real(), YES, steps=0)),
    (
        "method='simpson' is not known; choose from 'gauss-legendre', 'midpoint'.",
        lambda: mv.integrated_gradients(vlm(), real(), YES, method="simpson"),
    ),
    (
        "baseline='zeros' is of image features; at pixels give a picture, such as mv.images.grey.",
        lambda: mv.integrated_gradients(vlm(), real(), YES, "pixels", "zeros"),
    ),
    (
        "the baseline's input_ids are not the prompt's, and only the pixels may differ; make it with "
        "prompt.with_image.",
        lambda: mv.integrated_gradients(vlm(), real(), YES, baseline=real().with_text("is there a cat ?")),
    ),
    (
        "the attributions sum to 1, and from the baseline to the prompt the metric changes by 2, which is 50.0% away, "
        "where tolerance=0.05; take more than steps=3, or allow more.",
        lambda: completeness(1.0, 2.0, 0.05, 3),
    ),
    (
        "'blocks.0.attn.hook_result' is a hook of TransformerLens that no site stands for; a layer's are resid_pre, "
        "resid_mid, resid_post, attn_out, mlp_out, q, k, v, z, scores, pattern.",
        lambda: mv.Site.parse("blocks.0.attn.hook_result"),
    ),
    (
        "with this picture the prompt has as many positions as before, but other squares of the picture at them, so "
        "positions cannot be matched; give a picture of 80 x 40 pixels.",
        lambda: zoo.ask(zoo.build("ovis2"), tiny.picture(0, 80, 40)).with_image(tiny.picture(0, 40, 80)),
    ),
    (
        "the prompts hold 1 and 2 images, and this model pads the fewer with empty ones that its words then look at; "
        "run such prompts apart.",
        lambda: check_padding(Layout((0, 0), ((3,), (3, 3)), (1, 2)), "sdpa", torch.float32, True),
    ),
    (
        "generate does not take num_beams=2 together with readings or edits of image features or of what makes them: "
        "transformers copies those for each text it follows; leave it at 1.",
        lambda: check_copies(True, {"num_beams": 2}, GenerationConfig()),
    ),
    (
        "flash_attention_2 takes no mask, and in this architecture image tokens see those behind them, which it would "
        "hide from them; use 'sdpa'.",
        lambda: check_kernel("flash_attention_2", "image"),
    ),
    (
        "there is no tile 9; this image has 1, counted from 0.",
        lambda: real().images[0].at(3, 3, tile=9),
    ),
    (
        "this model's OPT has norms behind the sums (do_layer_norm_before=False) or embeddings of another width "
        "(word_embed_proj_dim), as OPT-350m has; mechvlm reads the others, OPT-2.7b and OPT-6.7b among them.",
        lambda: shapes.check_settings(with_settings("blip2-opt", do_layer_norm_before=False)),
    ),
    (
        "sdpa does not cap attention scores, which this model does at 5; load with attn_implementation='eager'.",
        lambda: check_kernel("sdpa", cap=5.0),
    ),
    ("3 is not a word; token ids need no spelling.", lambda: vlm().token_ids(3)),  # type: ignore[arg-type]
    ("the token 'dog' is not a whole number.", lambda: vlm().word("dog")),  # type: ignore[arg-type]
    ("token id 64 is not in the model's vocabulary of 64.", lambda: vlm().word(64)),
    ("token id -1 is not in the model's vocabulary of 64.", lambda: vlm().word(-1)),
    (
        "unembed takes residual streams, tensors whose last axis is 32 long, and got (2, 31).",
        lambda: vlm().unembed(zeros(2, 31)),
    ),
    ("unembed takes residual streams, tensors whose last axis is 32 long, and got 3.", lambda: vlm().unembed(3)),  # type: ignore[arg-type]
    ("'llava' is not a transformers model; mv.load takes a name, mv.VLM a model in memory.", lambda: mv.VLM("llava")),
    (
        "'tokens' is not a processor of images and text; AutoProcessor loads the model's own.",
        lambda: mv.VLM(tiny.model(), "tokens"),
    ),
    (
        "encoding=5 is not what a processor returns: a mapping from names to tensors.",
        lambda: vlm().prompt(encoding=5),  # type: ignore[arg-type]
    ),
    (
        "the encoding holds 'labels'; a prompt of this model consists of input_ids, attention_mask, pixel_values, "
        "image_sizes, so leave it out.",
        lambda: ready(labels=zeros(1)),
    ),
    ("the encoding is not made of numbers: new(): invalid data type 'str'.", lambda: ready(input_ids="dog")),
    ("variants=3 is not a list of lists of edits, one for each row.", lambda: ask(variants=3)),
    ("position 'last' is not a whole number.", lambda: ask(position="last")),
    ("position 1.0 is not a whole number.", lambda: ask(position=1.0)),
    ("max_new_tokens '2' is not a whole number.", lambda: said(max_new_tokens="2")),
    ("3 is not a prompt; make one with vlm.prompt(image, text).", lambda: vlm().trace(3)),  # type: ignore[arg-type]
    (
        "the metric is nan in one row; it must be a finite number.",
        lambda: ask(grad_of=lambda logits: logits[:, 0] * float("nan")),
    ),
    ("find looks for words, and 7 is none; write it in quotes.", lambda: real().find(7)),  # type: ignore[arg-type]
    (
        "'blocks.3.attn.hook_q' is before rotary embedding in TransformerLens, and mechvlm's q and k are after it; "
        "write 'blocks.3.attn.hook_rot_q' or 'text.3.q'.",
        lambda: mv.Site.parse("blocks.3.attn.hook_q"),
    ),
    (
        "vision_feature_layer is -9, and the vision tower has 3 layers; the configuration does not fit.",
        lambda: shapes.shape_of(config(vision_feature_layer=-9)),
    ),
    (
        "named at text.1.resid_post names positions of the prompt, and a decode step has only the newest one; say "
        "when='prompt'.",
        lambda: said(edits=change(site="text.1.resid_post", positions=(2,), label="named")),
    ),
    (
        "cut attention to 1 keys from 16 queries at text.1.scores would change nothing: its first key, 25, stands "
        "after its last query, 18, and no position looks ahead.",
        lambda: bare_run(edits=[mv.cut_attention(1, [25], queries=list(range(3, 19)))]),
    ),
    (
        "the edit of text.1.resid_post failed on float32[1, 1, 32]: index 3 is out of bounds for dimension 1 with "
        "size 1. A decode step has one query; when='prompt' leaves it alone.",
        lambda: said(
            edits=change(lambda x: x.index_fill(1, torch.tensor([3]), 0)[:, [3]] * 0 + x, "text.1.resid_post")
        ),
    ),
    (
        "generate does not take cache_implementation='offloaded': edits and readings rest on steps of one new "
        "position, each one pass, with a cache that grows by it.",
        lambda: said(generation_config=GenerationConfig(cache_implementation="offloaded")),
    ),
    (
        "a generation reads at every step; write read_each_step= for read=.",
        lambda: said(read=["text.0.z"]),
    ),
    (
        "a static cache has room for keys to come, which flex_attention is not told to leave out; set vlm.attention = "
        "'sdpa', or leave cache_implementation='static' out.",
        lambda: check_static_cache(
            {"cache_implementation": "static"}, GenerationConfig(), vlm().shape, "flex_attention"
        ),
    ),
    (
        f"transformers {transformers.__version__} cannot generate from this model with a static cache; leave "
        "cache_implementation='static' out.",
        lambda: zoo.build("paligemma2", "eager").generate(
            zoo.ask(zoo.build("paligemma2", "eager"), PICTURE), do_sample=False, cache_implementation="static"
        ),
    ),
    (
        "generate does not take guidance_scale=2.0: edits and readings rest on steps of one new position, each one "
        "pass, with a cache that grows by it.",
        lambda: said(guidance_scale=2.0),
    ),
    (
        "step 1 of this generation has 5 positions at text.0.resid_pre, where one new position is due; generate with "
        "a cache that grows by one, and one pass a step.",
        second_pass,
    ),
    (
        "patch at logits (prompt only) holds 26 positions and this run has 1 there, so positions cannot be matched; "
        "make the second prompt with prompt.with_image, which keeps them.",
        lambda: said(edits=[mv.patch("logits", zeros(1, 26, 64))]),
    ),
    (
        "the prompt 'is there a dog ?' was encoded for another model, whose words and image tokens are others; make "
        "it with this model's vlm.prompt.",
        lambda: tiny.vlm(layers=2).run(real()),
    ),
    (
        "Linear(in_features=2, out_features=2, bias=True) is not a transformers model; mv.load takes a name, mv.VLM a "
        "model in memory.",
        lambda: mv.VLM(torch.nn.Linear(2, 2)),
    ),
    (
        "patch_size is 0 and image_size 24; the configuration does not fit.",
        lambda: shapes.shape_of(config(vision_config=CLIPVisionConfig(image_size=24, patch_size=0))),
    ),
    (
        "the model's chat template cannot be used (unexpected '}'); pass raw=True with the whole prompt, or set "
        "processor.chat_template.",
        lambda: tiny.vlm(with_processor=tiny.processor("{{ }")).prompt(tiny.picture(), "is"),
    ),
    (
        "mv.images.blur makes a null image from its settings; call it, for instance mv.images.noise(0) or "
        "mv.images.blur(8).",
        lambda: real().with_image(mv.images.blur),
    ),
]

GRIDS: list[Case] = [
    (
        "vision_aspect_ratio is 'anyres'; it must be 'anyres_max_' and a number.",
        lambda: laid("llava_onevision", config=with_settings("llava_onevision", vision_aspect_ratio="anyres")),
    ),
    (
        "the image processor has do_resize=False; several images of one prompt need do_resize=True.",
        lambda: laid(
            "llava_onevision",
            several(),
            {**llava.pictures_llava_onevision().to_dict(), "do_resize": False},
            [(60, 40)] * 2,
        ),
    ),
    (
        "pixel_values have the shape (1, 1, 3, 24, 20); the last two must make a square.",
        lambda: laid("idefics3", {"pixel_values": ones(1, 1, 3, 24, 20)}),
    ),
    (
        "pixel_attention_mask has the shape (1, 7, 20, 20) and pixel_values (1, 7, 3, 24, 24); they must be of the "
        "same squares.",
        lambda: laid("idefics3", {"pixel_attention_mask": ones(1, 7, 20, 20)}),
    ),
    (
        "a part of the picture is 0 everywhere in pixel_values, which idefics3 models take for padding and leave "
        "out; change one of its pixels a little.",
        lambda: laid("idefics3", {"pixel_values": zeros(1, 7, 3, 24, 24)}),
    ),
    (
        "a picture of 4000 x 50 pixels becomes one of 72 x 1 before it is cut, too few for 3 tokens to see different "
        "ones; cut it into parts, or pad it.",
        lambda: laid("idefics3", settings=idefics.processor_idefics3().image_processor.to_dict(), sizes=[(4000, 50)]),
    ),
    (
        "the text holds no image token, and the encoding has pixel_values; it needs both or neither.",
        lambda: laid("idefics3", {"input_ids": torch.full((1, 5), 30)}),
    ),
    (
        "pixel_values are squares of 28 pixels, 7 patches to a side; it must be whole tokens of 2 patches.",
        lambda: laid("aya_vision", {"pixel_values": ones(1, 3, 28, 28)}),
    ),
    (
        "a picture of 8 x 8 pixels becomes a single image token, with which a mistral3 model cannot run; give one of "
        "more than 8 pixels one way.",
        lambda: laid("mistral3", {"pixel_values": ones(1, 3, 8, 8), "image_sizes": torch.tensor([[8, 8]])}),
    ),
    (
        "a picture of 4000 x 10 pixels would be less than one pixel high when the processor has resized it to "
        "{'longest_edge': 40}; cut it into parts, or pad it.",
        lambda: check_pictures(
            "pixtral", with_settings("mistral3"), {"do_resize": True, "size": {"longest_edge": 40}}, [(4000, 10)]
        ),
    ),
    (
        "a picture of 4000 x 10 pixels is 400 times as wide as high, and this model's processor takes at most 200 "
        "times; cut it into parts, or pad it.",
        lambda: check_pictures("patches", with_settings("qwen2_vl"), {"do_resize": True}, [(4000, 10)]),
    ),
    (
        "pixel_values have the shape (112, 90), and this model sees (patches, 96); the processor belongs to another "
        "model.",
        lambda: laid("qwen2_vl", {"pixel_values": ones(112, 90)}),
    ),
    (
        "the encoding has pixel_values and no image_grid_thw; this model needs both.",
        lambda: laid("qwen2_vl", {"image_grid_thw": None}),
    ),
    (
        "mm_token_type_ids has the shape (1, 3) and input_ids (1, 5); they must be of the same positions.",
        lambda: laid("qwen2_vl", {"mm_token_type_ids": zeros(1, 3), "input_ids": torch.full((1, 5), 30)}),
    ),
    (
        "token_type_ids must be 1 at the image tokens and nowhere else; encode words and pictures together.",
        lambda: laid("gemma3", {"token_type_ids": zeros(1, 5), "input_ids": torch.full((1, 5), image_token("gemma3"))}),
    ),
    (
        "paligemma models read no text without an image; give one.",
        lambda: laid("paligemma", {"pixel_values": None}),
    ),
    (
        "aspect_ratio_ids has the shape (1, 2) and pixel_values (1, 1, 4, 3, 16, 16); they must be of the same images.",
        lambda: laid("mllama", {"aspect_ratio_ids": ones(1, 2)}),
    ),
    (
        "qformer_input_ids has the shape (2, 3), and the question is one text of 3 positions; encode words and picture "
        "together.",
        lambda: laid("instructblip", {"qformer_input_ids": ones(2, 3)}),
    ),
]
"""Of what the tests of `mechvlm.grids` have no test that says in its name that something is refused."""

WITHOUT_MOLMO = zoo.there("molmo2")
MOLMO: list[Case] = [
    (
        "this model's norms stand behind attention and MLP (norm_after=True); mechvlm reads those before them, as in "
        "Molmo2-4B and Molmo2-8B.",
        lambda: shapes.check_settings(with_settings("molmo2", norm_after=True)),
    ),
    (
        "image_grids is [[3, 3, 4, 6]] and image_num_crops [9], and there are 7 crops in pixel_values and 33 tokens in "
        "image_token_pooling; they must be of the same images.",
        lambda: laid("molmo2", {"image_num_crops": torch.tensor([9])}),
    ),
    (
        "the encoding's patches hold 40 numbers, and this model's 48; the processor belongs to another model.",
        lambda: laid("molmo2", {"pixel_values": ones(7, 25, 40)}),
    ),
]
"""Of Molmo 2, which the oldest transformers that mechvlm runs with does not have."""
complete = pytest.mark.skipif(bool(WITHOUT_MOLMO), reason=WITHOUT_MOLMO)


def paired(**changed: Any) -> mv.MinimalPair:
    given = {"image_a": tiny.picture(), "image_b": tiny.picture(1), "text": "is there a dog ?", **changed}
    return mv.MinimalPair(**{"answer_a": "yes", "answer_b": "no", **given})


def several_pairs(**settings: Any) -> object:
    values = xr.DataArray(np.zeros((3, 2)), dims=["pair", "layer"])
    return mv.mean_interval(values, **{"dim": "pair", **settings})


KEEPS = "make one from the other with prompt.with_image, which keeps them."
REGIONS: list[Case] = [
    (
        "of='pixels' is not known; choose from 'tokens', 'keys', 'patches'.",
        lambda: mv.tile_regions(real(), of="pixels"),
    ),
    (
        "3 is not one prompt; make it with vlm.prompt(image, text).",
        lambda: mv.image_regions(3),  # type: ignore[arg-type]
    ),
    ("there is no image 1; the prompt holds 1, counted from 0.", lambda: mv.image_regions(real(), image=1)),
    ("there is no image 0; the prompt holds 0, counted from 0.", lambda: mv.tokens_in(blind(), (0, 0, 1, 1))),
    (
        "regions of this prompt are not of keys: the picture's squares are image tokens; leave of= out.",
        lambda: mv.image_regions(real(), of="keys"),
    ),
    (
        "regions of this prompt are not of tokens: the picture is seen by cross-attention, whose keys are its squares, "
        "and no position of the text stands for one; say of='keys' for those, which edits with cross=True take.",
        lambda: mv.image_regions(asked_of("mllama")),
    ),
    (
        "regions of this prompt are not of tokens: the picture is seen through a Q-Former, whose queries stand for no "
        "place in it; say of='patches' for positions of the vision tower.",
        lambda: mv.image_regions(asked_of("blip2-opt")),
    ),
    ("0 x 3 parts are none; give 1 row and 1 column or more.", lambda: mv.image_regions(real(), rows=0)),
    (
        "share=0 is no part of a square; give a number above 0 and up to 1.",
        lambda: mv.tokens_in(real(), (0, 0, 9, 9), share=0),
    ),
    (
        "border=-1 takes nothing in; give 0 or more rows and columns.",
        lambda: mv.tokens_in(real(), (0, 0, 9, 9), border=-1),
    ),
    (
        "an object is given by box or by mask, and by one of them; give box=(left, top, right, bottom).",
        lambda: mv.tokens_in(real()),
    ),
    (
        "box=(0, 0, 0, 9) is no box; give (left, top, right, bottom) in pixels, left before right and top before "
        "bottom.",
        lambda: mv.tokens_in(real(), (0, 0, 0, 9)),
    ),
    (
        "box=(0, 0, 1000, 1000) reaches out of the picture, which is 24 pixels wide and 24 high; give pixels of the "
        "original picture.",
        lambda: mv.tokens_in(real(), (0, 0, 1000, 1000)),
    ),
    (
        "the mask is float64 of 24 x 24; it must be bool of the picture's height by width, 24 x 24.",
        lambda: mv.tokens_in(real(), mask=np.zeros((24, 24))),
    ),
    (
        "no image token has 50% of its square in there; the most is 11%, at position 3, so take a smaller share or a "
        "larger region.",
        lambda: mv.tokens_in(real(), (1, 1, 3, 3)),
    ),
    (
        f"the source's image tokens do not stand where the target's do, so positions cannot be matched; {KEEPS}",
        lambda: check_matched(real(), replace(real(), image=real().image[1:])),
    ),
    (
        "the source's image tokens stand for other squares of its picture than the target's, so positions cannot be "
        f"matched; {KEEPS}",
        lambda: check_matched(real(), replace(real(), images=[replace(real().images[0], tiles=())])),
    ),
    (
        "the span 'question' does not stand at the same positions in the source and in the target, so positions "
        f"cannot be matched; {KEEPS}",
        lambda: check_matched(real(), replace(real(), question=real().question[1:])),
    ),
    ("both answers are 'yes'; a minimal pair has two different ones.", lambda: paired(answer_b="yes")),
    (
        "the pair has one picture and one text, so nothing differs; give image_b or text_b.",
        lambda: mv.MinimalPair(PICTURE, PICTURE, "is there a dog ?", "yes", "no"),
    ),
    (
        f"the source has 26 positions and the target 24, so positions cannot be matched; {KEEPS}",
        lambda: paired(text_b="is there ?").prompts(vlm()),
    ),
    ("level=1.5 is no share; give for instance 0.95.", lambda: several_pairs(level=1.5)),
    ("resamples=0 draws nothing; give for instance 2000.", lambda: several_pairs(resamples=0)),
    ("there is no dim 'head' to average over; the values have pair, layer.", lambda: several_pairs(dim="head")),
    (
        "3 is no DataArray; give values with a dim to average over.",
        lambda: mv.mean_interval(3, "pair"),  # type: ignore[arg-type]
    ),
    (
        "the values have sizes {'pair': 0}, so there is nothing to average.",
        lambda: mv.mean_interval(xr.DataArray(np.zeros(0), dims="pair"), "pair"),
    ),
    (
        "clusters=[1, 2] must name one cluster for each of the 3 values along 'pair'.",
        lambda: several_pairs(clusters=[1, 2]),
    ),
    (
        "weights=[1.0, -1.0, 2.0] must say for each of the 3 values how much it counts, from 0.",
        lambda: several_pairs(weights=[1.0, -1.0, 2.0]),
    ),
]


def patched(**settings: Any) -> object:
    return mv.patch_spans(vlm(), real(), real(), YES, **settings)


def attributed(**settings: Any) -> object:
    return mv.attribution_patching(vlm(), real(), real(), YES, **settings)


def by_queries(*asked: Any, **settings: Any) -> object:
    prompt = asked_of("instructblip")
    how = {"tower": "qformer", **settings}
    return mv.attribution_patching(zoo.build("instructblip"), prompt, prompt, YES, *asked, **how)


def one_layer() -> tuple[mv.VLM, mv.Prompt, mv.Prompt]:
    small = tiny.vlm(layers=1)
    prompt = small.prompt(tiny.picture(0), "is there a red cat ?")
    return small, prompt, prompt


def other_words() -> mv.Prompt:
    return vlm().prompt(tiny.picture(0), real().words.replace("dog", "cat"))


def halved() -> mv.Edit:
    return mv.Edit("text.1.pattern", lambda x: x / 2, label="halved", rows="each")


def edges_scored(*args: Any, **settings: Any) -> object:
    return mv.edge_attribution(vlm(), real(), real(), YES, *args, **settings)


def scores_of_edges(value: float) -> xr.Dataset:
    coords = {"writer": ["image"], "reader": ["logits"]}
    return xr.Dataset({"score": xr.DataArray([[value]], dims=["writer", "reader"], coords=coords)})


def pairs_patched(*pairs: Any, **settings: Any) -> object:
    return mv.patch_pairs(vlm(), pairs or [paired()], **{"only_right": False, "controls": 0, "layers": [0], **settings})


def direct(metric: Any = YES, given: Any = None, **settings: Any) -> object:
    return mv.direct_logit_attribution(vlm(), given or real(), metric, **settings)


def edited_directly(edit: mv.Edit, by: str) -> object:
    return mv.direct_logit_attribution(vlm().with_edits([edit]), real(), YES, by=by)


WEIGHTS_AND_HEADS: list[Case] = [
    (
        "log_probability('yes') is no sum of what parts add to logits; give mv.logit_difference(answer, other), or one "
        "word for its logit.",
        lambda: direct(mv.log_probability("yes")),
    ),
    (
        "3.5 is no word whose logit can be taken apart; give mv.logit_difference(answer, other), a word or a token id.",
        lambda: direct(3.5),
    ),
    ("token id 64 is not in the model's vocabulary of 64.", lambda: direct(64)),
    (
        "2 words or differences were given for 1 prompts; give one for each, or one for all.",
        lambda: direct([YES, YES]),
    ),
    ("by='head' is not known; choose from 'component', 'span', 'token'.", lambda: direct(by="head")),
    (
        "spans say how heads are split, and by='component' splits none; write by='span' with them.",
        lambda: direct(spans={"some": [1]}),
    ),
    (
        "spans hold position 3 more than once; give spans of positions of the prompt that share none.",
        lambda: direct(spans={"one": [3], "other": [3, 4]}, by="span"),
    ),
    (
        "spans hold 'elsewhere', which stands for what no span holds; give that span another name.",
        lambda: direct(spans={"elsewhere": [3]}, by="span"),
    ),
    (
        "spans hold position 99 of 26; give spans of positions of the prompt that share none.",
        lambda: direct(spans={"one": [99]}, by="span"),
    ),
    (
        "the model's edits change the logits themselves, which no part adds up to; leave those out.",
        lambda: edited_directly(mv.Edit("logits", lambda x: x * 2), "component"),
    ),
    (
        "the model's edits change text.1.z, so that what its heads take from positions does not sum to them; write "
        "by='component', or edit the pattern.",
        lambda: edited_directly(mv.ablate_heads(1, [0]), "span"),
    ),
    (
        "a prompt holds no image, so nothing passes through one; make it with vlm.prompt(image, text).",
        lambda: direct(given=[real(), blind()], by="token"),
    ),
    (
        "the prompts' image tokens do not lie alike, so that no position means the same in all; ask about them one by "
        "one, or write by='span'.",
        lambda: direct(given=[real(), bare().prompt(encoding=tiny.encoding(prefix=4))], by="token"),
    ),
    (
        "direct_logits draws what direct_logit_attribution returns, and was given a Dataset; make it with "
        "mv.direct_logit_attribution(vlm, prompt, metric).",
        lambda: mv.plot.direct_logits(xr.Dataset()),
    ),
    (
        "the text tower has 3 layers, counted from 0, so there is no layer 3.",
        lambda: mv.composition_scores(vlm(), layers=[0, 3]),
    ),
    (
        "layer 1 alone has no later layer to compose with; give two layers or more.",
        lambda: mv.composition_scores(vlm(), layers=[1]),
    ),
    (
        "in layer 1 of this model keys and values are those of the picture, and not of the residual stream; choose "
        "from layers 0, 2, 4.",
        lambda: mv.composition_scores(zoo.build("mllama"), layers=[0, 1]),
    ),
    (
        "the text tower has 3 layers, counted from 0, so there is no layer 3.",
        lambda: mv.ov_writes(vlm(), 3, 1, real()),
    ),
    (
        "the text tower has 4 heads a layer, counted from 0, so there is no head 4.",
        lambda: mv.ov_writes(vlm(), 0, [1, 4], real()),
    ),
    (
        "'red' is no prompt and no direction; give a prompt, or numbers, direction by d_model.",
        lambda: mv.ov_writes(vlm(), 0, 1, "red"),  # type: ignore[arg-type]
    ),
    (
        "the directions hold values that are no finite numbers, so no word follows; give finite ones.",
        lambda: mv.ov_writes(vlm(), 0, 1, ones(32) / 0),
    ),
    (
        "the text tower has 3 layers, counted from 0, so there is no layer 9.",
        lambda: mv.ov_writes(vlm(), 9, 1, real()),
    ),
    (
        "positions are of a prompt, and directions were given; leave them out, or give a prompt.",
        lambda: mv.ov_writes(vlm(), 0, 1, ones(32), [3]),
    ),
    (
        "a prompt holds no image to look at; make it with vlm.prompt(image, text).",
        lambda: mv.label_heads(vlm(), [real(), blind()]),
    ),
    (
        "least=0 is no share of attention; give one above 0, at most 1.",
        lambda: mv.label_heads(vlm(), real(), least=0),
    ),
    (
        "repeat=2 words make no repetition to follow; give 3 or more.",
        lambda: mv.label_heads(vlm(), real(), repeat=2),
    ),
    (
        "repeat=60 different words are wanted, and the model has 43 that are no special tokens; give fewer.",
        lambda: mv.label_heads(vlm(), real(), repeat=60),
    ),
]


def by_position(**renamed: str) -> xr.DataArray:
    table = xr.DataArray(np.ones((1, 2)), dims=["layer", "position"], coords={"layer": [0], "position": [0, 1]})
    return table.rename(renamed)


PATCHING: list[Case] = [
    (
        "direction='up' is not known; choose from 'denoise', 'noise', 'both'.",
        lambda: patched(direction="up"),
    ),
    ("this model has no tower 'qformer'; it has text, vision.", lambda: patched(tower="qformer")),
    (
        "layers=[0, 0] cannot be patched; give each layer once, from 0 to 2, or None for all.",
        lambda: patched(layers=[0, 0]),
    ),
    (
        "layers=[2] cannot be patched; give each layer once, from 0 to 1, or None for all.",
        lambda: patched(layers=[2], tower="vision"),
    ),
    ("window=0 holds no layer; give 1 or more.", lambda: patched(window=0)),
    (
        "heads have no 'resid_pre' to patch; choose from q, k, v, scores, pattern, z, cross_scores, cross_pattern, "
        "cross_z.",
        lambda: mv.patch_heads(vlm(), real(), real(), YES, kind="resid_pre"),
    ),
    (
        "this model has no cross_z in layers 0, 1, 2; choose from q, k, v, scores, pattern, z.",
        lambda: mv.patch_heads(vlm(), real(), real(), YES, kind="cross_z"),
    ),
    (
        "kinds='z' is no list of kinds; write for instance ['resid_pre', 'z'].",
        lambda: attributed(kinds="z"),
    ),
    (
        "'pattern' cannot be estimated by position; choose from resid_pre, q, k, v, z, cross_z, attn_out, resid_mid, "
        "mlp_out, resid_post, embed, image_features.",
        lambda: attributed(kinds=["z", "pattern"]),
    ),
    (
        "this model has no z in layer 1, so no patch of it can be estimated; choose from resid_pre, cross_z, attn_out, "
        "resid_mid, mlp_out, resid_post.",
        lambda: mv.attribution_patching(
            zoo.build("mllama"), asked_of("mllama"), asked_of("mllama"), YES, ["z"], layers=[0, 1]
        ),
    ),
    (
        "positions='all' is not known; choose from 'each', 'span', or name positions, such as {'image': prompt.image} "
        "or mv.image_regions(prompt).",
        lambda: attributed(positions="all"),
    ),
    (
        "span 'nothing' holds no position, so nothing is patched there; leave it out.",
        lambda: attributed(positions={"nothing": []}),
    ),
    (
        "image_features of this model are keys of cross-attention and stand at no position, so they cannot be summed "
        "by positions; write positions='each', or leave them out.",
        lambda: mv.attribution_patching(
            zoo.build("mllama"), asked_of("mllama"), asked_of("mllama"), YES, ["image_features"], "span"
        ),
    ),
    (
        "cross_z of a Q-Former is of its 8 queries alone, and span 'all' holds position 17; name positions below 8, or "
        "write positions='each'.",
        lambda: by_queries(["cross_z"], "span", layers=[0]),
    ),
    (
        "method='atp+' is not known; choose from 'atp', 'qk', 'drop', 'atp*', 'ig'.",
        lambda: attributed(method="atp+"),
    ),
    ("steps=3 is of a path, and method='drop' has none; say method='ig'.", lambda: attributed(method="drop", steps=3)),
    (
        "method='drop' leaves out what a layer adds, and a Q-Former's norms stand behind its sums, so that no layer "
        "adds anything by itself; choose from 'atp', 'qk', 'ig'.",
        lambda: by_queries(["z"], method="drop"),
    ),
    (
        "method='drop' leaves out one layer of several, and this tower has 1; choose 'atp'.",
        lambda: mv.attribution_patching(*one_layer(), YES, ["z"], method="drop"),
    ),
    (
        "path='words' is not known; choose from 'embed', 'image_features', 'pixels'.",
        lambda: attributed(method="ig", path="words"),
    ),
    (
        "rule='simpson' is not known; choose from 'midpoint', 'left', 'right', 'gauss-legendre'.",
        lambda: attributed(method="ig", rule="simpson"),
    ),
    (
        "the path of 'embed' begins behind the vision tower, so no gradient reaches it; say path='pixels'.",
        lambda: attributed(method="ig", tower="vision"),
    ),
    (
        "the words of source and target differ, and a path of 'pixels' moves the picture alone; say path='embed', "
        "which moves both.",
        lambda: mv.attribution_patching(vlm(), real(), other_words(), YES, method="ig", path="pixels"),
    ),
    (
        "halved at text.1.pattern is an edit of the model's own, and how it changes with one key is not known; leave "
        "'k' or its layer out, or choose method='atp'.",
        lambda: mv.attribution_patching(vlm().with_edits([halved()]), real(), real(), YES, ["k"], method="qk"),
    ),
    ("verify=-1 patches nothing; give 0 or more nodes.", lambda: attributed(verify=-1)),
    (
        "104 estimates of text.0.z are nan; give a metric whose gradient is finite at these logits, or load the model "
        "in float32.",
        lambda: mv.attribution_patching(vlm(), real(), real(), lambda logits: (logits[:, 0] * 0).sqrt(), ["z"]),
    ),
    (
        "method='ig' is not known; choose from 'eap', 'eap-ig', 'clean-corrupted', 'ig-activations', "
        "'information-flow-routes', 'exact'.",
        lambda: edges_scored("ig"),
    ),
    (
        "rule='ends' is not known; choose from 'midpoint', 'left', 'right', 'gauss-legendre'.",
        lambda: edges_scored("eap-ig", rule="ends"),
    ),
    (
        "steps=3 is of a path, and method='eap' has none; choose from 'eap-ig', 'ig-activations'.",
        lambda: edges_scored("eap", steps=3),
    ),
    ("steps=0 takes no gradient; give 1 or more.", lambda: edges_scored(steps=0)),
    ("verify=-1 patches nothing; give 0 or more edges.", lambda: edges_scored(verify=-1)),
    ("batch_size=0 runs nothing; give 1 or more.", lambda: edges_scored("eap", batch_size=0)),
    ("seed=-1 is no seed of random draws; give 0 or more.", lambda: edges_scored("eap", seed=-1)),
    ("seed=-1 is no seed of random draws; give 0 or more.", lambda: attributed(seed=-1)),
    (
        "verify=2 patches edges that method='exact' patches anyway; leave it out.",
        lambda: edges_scored("exact", verify=2),
    ),
    (
        "spans='image' is not known; choose from None, 'each', or name positions, such as {'image': prompt.image}.",
        lambda: edges_scored(spans="image"),
    ),
    (
        "span 'here' is [26]; give it positions from 0 to 25, each once.",
        lambda: edges_scored(spans={"here": [26]}),
    ),
    (
        "steer by 1 at text.1.resid_post is an edit of sums of what parts write, and edges are of the parts; take the "
        "edges of vlm.without_edits(), or edit z or mlp_out.",
        lambda: mv.edge_attribution(
            vlm().with_edits([mv.steer("text.1.resid_post", torch.ones(32))]), real(), real(), YES
        ),
    ),
    (
        "edges draws what edge_attribution returns, and was given a DataArray; make it with "
        "mv.edge_attribution(vlm, source, target, metric).",
        lambda: mv.plot.edges(by_position()),  # type: ignore[arg-type]
    ),
    ("top=0 draws nothing; give 1 or more edges.", lambda: mv.plot.edges(scores_of_edges(1.0), top=0)),
    ("top 2.5 is not a whole number.", lambda: mv.plot.edges(scores_of_edges(1.0), top=2.5)),  # type: ignore[arg-type]
    (
        "attributed draws what edge_attribution returns where some edges are patched too, and was given a Dataset "
        "without them; make it with mv.edge_attribution(vlm, source, target, metric, verify=20).",
        lambda: mv.plot.attributed(scores_of_edges(1.0)),
    ),
    (
        "all scores are 0, so there is no edge to draw; give prompts that differ.",
        lambda: mv.plot.edges(scores_of_edges(0.0)),
    ),
    (
        "attributed draws what attribution_patching returns where some nodes are patched too, and was given a "
        "DataArray; make it with mv.attribution_patching(vlm, source, target, metric, verify=20).",
        lambda: mv.plot.attributed(by_position()),  # type: ignore[arg-type]
    ),
    (
        "the prompts hold no image, so there are no features; make them with vlm.prompt(image, text).",
        lambda: mv.patch_features(vlm(), blind(), blind(), YES),
    ),
    (
        "regions=[3] does not name them; write for instance mv.image_regions(prompt).",
        lambda: mv.patch_features(vlm(), real(), real(), YES, [3]),  # type: ignore[arg-type]
    ),
    (
        "position 0 is no image token of the target, whose positions are 3 to 18; give those.",
        lambda: mv.patch_features(vlm(), real(), real(), YES, {"bos": [0]}),
    ),
    ("pairs=3 is not a list of pairs; make each with mv.MinimalPair(...).", lambda: mv.patch_pairs(vlm(), 3)),  # type: ignore[arg-type]
    (
        "what='layers' is not known; choose from 'spans', 'positions', 'heads', 'features'.",
        lambda: pairs_patched(what="layers"),
    ),
    ("controls=-1 draws nothing; give 0 or more random nodes.", lambda: pairs_patched(controls=-1)),
    (
        "the model gives both right answers to none of 1 pairs; only_right=False patches them all.",
        lambda: pairs_patched(only_right=True),
    ),
    (
        "regions=None does not name sets of positions; give for instance mv.image_regions.",
        lambda: pairs_patched(what="features"),
    ),
    (
        "pair 1 has other spans, positions or regions than pair 0, so they cannot be averaged; give pairs of like "
        "prompts, or spans that all of them have.",
        lambda: pairs_patched(paired(), paired(text="is there ?"), what="positions"),
    ),
    (
        "patched_positions draws dims layer and position with a coordinate token, and the array has layer, head; "
        "choose first, like result.normalised.sel(direction='noise').",
        lambda: mv.plot.patched_positions(by_position(position="head")),
    ),
    (
        "collapse_curves draws what language_prior_collapse returns, and was given a DataArray; make it with "
        "mv.language_prior_collapse.",
        lambda: mv.plot.collapse_curves(by_position()),  # type: ignore[arg-type]
    ),
    (
        "value='norm' and span='last' cannot be drawn; choose 'update_cosine' or 'state_cosine', and a span of the "
        "result, which has last.",
        lambda: mv.plot.collapse_curves(mv.language_prior_collapse(vlm(), real(), spans="last"), "norm", "last"),
    ),
    (
        "value='rate' and spans=['image', 'bos'] cannot be drawn; choose 'gradient_norm' or 'relative', and spans of "
        "the result, which has last, image.",
        lambda: mv.plot.gradient_decay(
            mv.gradient_by_layer(vlm(), real(), YES, spans="last"), "rate", spans=["image", "bos"]
        ),
    ),
    (
        "layers_over_image draws dims layer and position, and the array has layer, head; choose first.",
        lambda: mv.plot.layers_over_image(by_position(position="head"), real()),
    ),
    (
        "there is no picture 1; the prompt holds 1, counted from 0.",
        lambda: mv.plot.layers_over_image(by_position(), real(), image=1),
    ),
    (
        "layers=[5] are not all in the array, whose layers are [0].",
        lambda: mv.plot.layers_over_image(by_position(), real(), layers=[5]),
    ),
    (
        "there is nothing to draw: no finite value belongs to an image token of this picture.",
        lambda: mv.plot.layers_over_image(by_position(), real()),
    ),
    (
        "values by position cannot be drawn: this picture is seen by cross-attention, whose keys are its squares, and "
        "no position of the text stands for one; mv.attention_map in a layer of cross-attention and "
        "mv.gradient_attribution give values by key.",
        lambda: mv.plot.layers_over_image(by_position(), asked_of("mllama")),
    ),
    (
        "patched_pairs draws what patch_pairs returns; give the dataset, not one of its variables.",
        lambda: mv.plot.patched_pairs(by_position()),  # type: ignore[arg-type]
    ),
    (
        "direction='up' is not in the result, which has denoise, noise.",
        lambda: mv.plot.patched_pairs(pairs_patched(), "up"),  # type: ignore[arg-type]
    ),
]


def path(senders: Any = None, receivers: Any = "logits", **settings: Any) -> object:
    return mv.path_patching(vlm(), real(), real(), YES, senders, receivers, **settings)


def patched_back(*prompts: mv.Prompt, **settings: Any) -> object:
    return mv.back_patching(vlm(), prompts or [real()], **{"metric": YES, **settings})


PATHS: list[Case] = [
    ("direction='both' is not known; choose from 'denoise', 'noise'.", lambda: path(direction="both")),
    ("freeze=('mlps',) is not known; choose from ('heads', 'mlps') and ('heads',).", lambda: path(freeze=("mlps",))),
    ("receivers names no sets; write for instance {'answer': 'logits'}.", lambda: path(receivers={})),
    (
        "'a1.kv2<v>' is no receiver of this model, which has 3 layers of 4 heads and 2 key-value heads; write "
        "'logits', or a list of names such as 'a1.h0<q>', 'a1.kv0<k>', 'a1.kv0<v>', 'a1.h0<z>' and 'm1'.",
        lambda: path(receivers=["a1.kv2<v>"]),
    ),
    (
        "receivers is empty, and so has no receiver of this model, which has 3 layers of 4 heads and 2 key-value "
        "heads; write 'logits', or a list of names such as 'a1.h0<q>', 'a1.kv0<k>', 'a1.kv0<v>', 'a1.h0<z>' and 'm1'.",
        lambda: path(receivers=[]),
    ),
    (
        "'logits' takes in the final stream, over which nothing of other receivers is seen; give it by itself, or as a "
        "set of its own.",
        lambda: path(receivers=["m1", "logits"]),
    ),
    (
        "no head and no MLP stands before a0.h1<q>; give senders=['embed', 'image'], or a later receiver.",
        lambda: path(receivers=["a0.h1<q>"]),
    ),
    (
        "'a1' is no sender of this model, which has 3 layers of 4 heads and 2 key-value heads; write for instance "
        "'a0.h1', 'm0', 'image' or 'embed', or None for every head and MLP before a receiver.",
        lambda: path(["a1"]),
    ),
    (
        "no path leads from m1 to a1.h0<q>, which it does not stand before; give senders that do, or later receivers.",
        lambda: path(["a0.h1", "m1"], ["a1.h0<z>"]),
    ),
    (
        "nothing of 'image' is at the positions that are patched, of which none is an image token; give others, or "
        "leave it out of the senders.",
        lambda: path(["image"], positions="last"),
    ),
    (
        "nothing of 'embed' is at the positions that are patched, which are all image tokens; give others, or leave it "
        "out of the senders.",
        lambda: path(["embed"], positions="image"),
    ),
    (
        "the prompt has no span 'picture'; choose from bos, prefix, image, question, last, or give a list.",
        lambda: path(positions="picture"),
    ),
    (
        "senders draws a variable of path_patching, and was given a DataArray without senders; write for instance "
        "mv.plot.senders(found.normalised).",
        lambda: mv.plot.senders(by_position()),
    ),
    (
        "prompt 0 is patched at one position, whose order cannot be random, so control='permuted' would be the patch "
        "itself; say control='other' or None.",
        lambda: patched_back(positions="last"),
    ),
    (
        "back_patching measures a metric, or whether answers are right; give one of metric= and answers=.",
        lambda: patched_back(metric=None),
    ),
    (
        "the answer 'cat' stands beside no other word of ('yes', 'no'); give it and others.",
        lambda: patched_back(metric=None, answers=["cat"]),
    ),
    (
        "none of the sources [0] is a later layer than one of the destinations [0, 1]; give later sources or earlier "
        "destinations.",
        lambda: patched_back(sources=[0]),
    ),
    ("sources=2 is not a list of sources; write for instance [0].", lambda: patched_back(sources=2)),
    (
        "destinations=[9] cannot be patched; give each layer once, from 0 to 2, or None for all.",
        lambda: patched_back(destinations=[9]),
    ),
    ("control='random' is not known; choose from 'permuted', 'other', None.", lambda: patched_back(control="random")),
    (
        "control='other' takes another picture's streams, and all prompts are about one; give more.",
        lambda: patched_back(control="other"),
    ),
    (
        "prompt 0 is patched at 16 positions and prompt 1, its control, at 15; give pictures with as many tokens, or "
        "control='permuted'.",
        lambda: patched_back(
            real(),
            vlm().prompt(tiny.picture(1), "is there a red dog ?"),
            control="other",
            positions=lambda prompt: prompt.image[len(prompt) - len(real()) :],
        ),
    ),
]

CASES = (
    PATHS
    + PATCHING
    + WEIGHTS_AND_HEADS
    + SITES
    + MODELS
    + PROMPTS
    + READINGS
    + EDITS
    + METRICS
    + GENERATION
    + LATER
    + GRIDS
    + REGIONS
    + DEVICE_CASES
    + LOAD_CASES
    + SENT_CASES
    + STATS_CASES
    + CIRCUIT_CASES
    + ([] if WITHOUT_MOLMO else MOLMO)
)


# Every process that runs tests has a folder of its own, and all have to know each test by one name.
@pytest.mark.parametrize("message, wrong", CASES, ids=[text[:60] for text, _ in CASES])
def test_message(message: str, wrong: Callable[[], object]) -> None:
    with pytest.raises((ValueError, TypeError, ModuleNotFoundError)) as caught:
        wrong()
    assert str(caught.value) == message
    assert message.endswith(".") and "\n" not in message


def test_there_is_no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError) as caught:
        mv.load("demo", device="cuda")
    assert str(caught.value) == "device 'cuda' was asked for, and this machine has no CUDA; use device='cpu'."
    REACHED.add(_where(caught.value))


def test_a_checkpoint_that_cannot_be_loaded(tmp_path: Path) -> None:
    tiny.model().config.save_pretrained(tmp_path)
    with pytest.raises(ValueError) as caught:
        mv.load(tmp_path)
    assert str(caught.value).startswith(
        f"the model '{tmp_path}' could not be loaded (Error no file named model.safetensors"
    )
    assert str(caught.value).endswith(").")
    REACHED.add(_where(caught.value))


def test_an_unknown_name() -> None:
    with pytest.raises(AttributeError) as caught:
        mv.zebra  # noqa: B018
    assert str(caught.value) == "module 'mechvlm' has no attribute 'zebra'"
    REACHED.add(_where(caught.value))


def test_eager_padding_in_float64() -> None:
    vlm = tiny.vlm(2, "eager", torch.float64)
    with pytest.raises(ValueError) as caught:
        vlm.run([vlm.prompt(None, "is"), vlm.prompt(None, "is there")])
    assert str(caught.value) == (
        "transformers' eager attention answers NaN for a padded batch in float64; set vlm.attention = 'sdpa', or run "
        "the prompts one by one."
    )
    REACHED.add(_where(caught.value))


REACHED: set[tuple[str, int]] = set()
"""File and line of the raises that the tests above reached."""


def _where(error: BaseException) -> tuple[str, int]:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return last.filename, last.lineno or 0


@cache
def reach_cases() -> None:
    """Run every case to see where it ends; pytest may run the tests of this file in several processes."""
    for _, wrong in CASES:
        try:
            wrong()
        except (ValueError, TypeError, ModuleNotFoundError) as error:
            REACHED.add(_where(error))


SIGNALS = {"Reaching", "Enough", "Apart"}
"""What is raised to be caught by mechvlm itself, which no user sees."""


def says_something(node: ast.Raise) -> bool:
    """Whether a raise has a sentence of its own: it does not hand on another's, and is no signal."""
    raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
    return raised is not None and not (isinstance(raised, ast.Name) and raised.id in SIGNALS)


def missed(paths: Iterable[Path]) -> list[str]:
    """The raises in some modules that no test above reached."""
    return [
        f"{path.name}:{node.lineno}"
        for path in sorted(paths)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Raise)
        and says_something(node)
        and not any(Path(name) == path and node.lineno <= line <= (node.end_lineno or 0) for name, line in REACHED)
    ]


ELSEWHERE = {
    "images.py": "test_images.py",
    "pixels.py": "test_images.py",
    "cli.py": "test_cli.py",
    "bridge.py": "test_bridge.py",
    "circuits.py": "test_circuits.py",
    "weights.py": "test_circuits.py",
    "finished.py": "test_units.py",
    "units.py": "test_units.py",
    "workers.py": "test_workers.py",
    "hosts.py": "test_jobs.py and test_jobs_served.py",
    "jobs.py": "test_jobs.py and test_jobs_served.py",
    "ledger.py": "test_jobs.py and test_jobs_served.py",
    "remote.py": "test_jobs.py and test_jobs_served.py",
}
"""Modules whose messages have tests of their own, where they are."""


@complete
def test_every_raise_is_reached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    test_there_is_no_cuda(monkeypatch)
    test_a_checkpoint_that_cannot_be_loaded(tmp_path)
    test_eager_padding_in_float64()
    test_an_unknown_name()
    reach_cases()
    left = missed(path for path in PACKAGE.glob("*.py") if path.name not in ELSEWHERE)
    assert not left, f"no test reaches the messages at {', '.join(left)}"


@complete
def test_every_raise_about_statistics_is_reached() -> None:
    reach_cases()
    left = missed(
        [*(PACKAGE / "evaluate" / f"{name}.py" for name in STATS_MODULES), PACKAGE / "plot" / "statistics.py"]
    )
    assert not left, f"no test reaches the messages at {', '.join(left)}"


@complete
def test_every_raise_about_circuits_is_reached() -> None:
    reach_cases()
    figures = [PACKAGE / "plot" / f"{name}.py" for name in ("wiring", "faithful")]
    left = missed([*(PACKAGE / "experiments" / f"{name}.py" for name in CIRCUIT_MODULES), *figures])
    assert not left, f"no test reaches the messages at {', '.join(left)}"


@complete
def test_every_raise_about_grids_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests of `mechvlm.grids` that something is refused in, run again to see where they end."""
    reach_cases()
    own = pytest.raises

    @contextmanager
    def noting(*expected: Any, **more: Any) -> Iterator[Any]:
        with own(*expected, **more) as caught:
            yield caught
        REACHED.add(_where(caught.value))

    monkeypatch.setattr(pytest, "raises", noting)
    files = sorted(map(str, Path(__file__).parent.glob("test_grids_*.py")))
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)  # what CI sets is of a plugin that this inner run leaves out
    plain = ["-q", "-o", "addopts=", "-p", "no:cacheprovider", "-p", "no:xdist"]
    assert pytest.main([*plain, "-k", "refused or does_not_say", *files]) == pytest.ExitCode.OK
    left = missed((PACKAGE / "grids").glob("*.py"))
    assert not left, f"no test reaches the messages at {', '.join(left)}"


def test_a_reading_of_the_first_step_only() -> None:
    """The vision tower runs with the prompt; later steps have nothing of it."""
    made = said(max_new_tokens=3, read_each_step=["vision.0.z", "text.0.z"])
    assert [len(made[site]) for site in ("vision.0.z", "text.0.z")] == [1, 3]
