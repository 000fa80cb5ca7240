"""Every sentence that mechvlm refuses with, word for word; a `raise` that no test reaches fails the last test."""

# ruff: noqa: ARG005

import ast
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import tiny
import torch
from test_load import CASES as LOAD_CASES
from torch import Tensor, ones, zeros
from transformers import CLIPVisionConfig, GenerationConfig, GPT2Config, LlavaConfig, MistralConfig, SiglipVisionConfig

import mechvlm as mv
from mechvlm import archs, plan, seam
from mechvlm.load import type_of
from mechvlm.run import of_row
from mechvlm.visit import Visit, check_result

PACKAGE = Path(mv.__file__).parent
INF = float("inf")
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


def behind(**settings: Any) -> mv.Prompt:
    """A prompt made by another image processor."""
    return tiny.vlm(with_processor=tiny.processor(**settings)).prompt(tiny.picture(0, 40, 30), "is")


def config(**changed: Any) -> LlavaConfig:
    made = tiny.model().config
    for name, value in changed.items():
        setattr(made, name, value)
    return made


SITES: list[Case] = [
    ("no tower is called 'audio'; there are text and vision.", lambda: mv.Site("z", 0, "audio")),
    (
        "no activation is called 'patern'. In forward order they are: resid_pre, q, k, v, scores, pattern, z, "
        "attn_out, resid_mid, mlp_out, resid_post; and, without a layer, embed, image_features, logits.",
        lambda: mv.Site("patern", 0),
    ),
    ("logits has no layer, and layer=3 was given; leave it out.", lambda: mv.Site("logits", 3)),
    ("logits belongs to the whole model; leave tower='vision' out.", lambda: mv.Site("logits", tower="vision")),
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
        "mechvlm does not know 'gpt2' models yet; it knows llava. Adding one is a row in mechvlm/archs.py.",
        lambda: archs.arch_of(GPT2Config()),
    ),
    (
        "vision_feature_select_strategy is 'odd'; it must be 'default' (without the class token) or 'full'.",
        lambda: archs.shape_of(_Odd(tiny.model().config)),
    ),
    (
        "vision_feature_layer is [-2, -1]; mechvlm reads models that take one layer's features.",
        lambda: archs.shape_of(config(vision_feature_layer=[-2, -1])),
    ),
    (
        "this llava model has a 'siglip_vision_model' vision tower; mechvlm knows llava with 'clip_vision_model'.",
        lambda: archs.shape_of(LlavaConfig(vision_config=SiglipVisionConfig())),
    ),
    (
        "this llava model decodes with 'mistral'; mechvlm knows llava with 'llama'.",
        lambda: archs.shape_of(LlavaConfig(vision_config=CLIPVisionConfig(), text_config=MistralConfig())),
    ),
    (
        "the model is in training mode, where dropout makes runs differ; call model.eval() first.",
        lambda: mv.VLM(tiny.model().train()),
    ),
    (
        "the attention implementation is 'flash'; mechvlm reads sdpa and eager exactly. Set vlm.attention, or load "
        "with attn_implementation='sdpa'.",
        lambda: setattr(bare(), "attention", "flash"),
    ),
    (
        "this model caps its attention scores, which mechvlm does not compute yet.",
        lambda: seam.Call(_Capped(), True),
    ),
    (
        "remote runs are not part of this version of mechvlm; leave remote=True out.",
        lambda: mv.load("demo", remote=True),
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

    vision_feature_select_strategy = "odd"

    def __init__(self, config: Any) -> None:
        self.get_text_config, self.vision_config = config.get_text_config, config.vision_config


class _Capped:
    """An attention call of a model that caps its scores."""

    inputs = ((None, zeros(1, 1, 1, 1), None, None, None), {"softcap": 30.0, "scaling": 1.0})


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
]

READINGS: list[Case] = [
    ("rows() was given no query; give at least one position, for instance rows([-1]).", lambda: mv.rows([])),
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
        lambda: of_row(("z", 0, "text"), [((None, 0), zeros(1))], 5, plan.Layout((0,), (1,))),
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
        "way='fast' is not known; choose from 'mask', 'feature', 'recompute'.",
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
        "way='feature' multiplies numbers, and minus infinity times zero is none; use way='mask'.",
        lambda: mv.bias_attention(0, [0], -INF, way="feature"),
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

LATER: list[Case] = [
    ("3 is not a word; token ids need no spelling.", lambda: vlm().token_ids(3)),  # type: ignore[arg-type]
    ("the token 'dog' is not a whole number.", lambda: vlm().word("dog")),  # type: ignore[arg-type]
    ("token id 64 is not in the model's vocabulary of 64.", lambda: vlm().word(64)),
    ("token id -1 is not in the model's vocabulary of 64.", lambda: vlm().word(-1)),
    (
        "unembed takes residual streams, tensors whose last axis is 32 long, and got (2, 31).",
        lambda: vlm().unembed(zeros(2, 31)),
    ),
    ("unembed takes residual streams, tensors whose last axis is 32 long, and got 3.", lambda: vlm().unembed(3)),  # type: ignore[arg-type]
    ("'llava' is not a transformers model; mv.load takes a name, mv.VLM a model in memory.", lambda: mv.VLM("llava")),  # type: ignore[arg-type]
    (
        "'tokens' is not a processor of images and text; AutoProcessor loads the model's own.",
        lambda: mv.VLM(tiny.model(), "tokens"),
    ),
    (
        "encoding=5 is not what a processor returns: a mapping from names to tensors.",
        lambda: vlm().prompt(encoding=5),  # type: ignore[arg-type]
    ),
    (
        "the encoding holds 'labels'; a prompt of this model consists of input_ids, attention_mask, pixel_values, so "
        "leave it out.",
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
        lambda: archs.shape_of(config(vision_feature_layer=-9)),
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
        "generate does not take cache_implementation='static': edits and readings rest on steps of one new position, "
        "each one pass, with a cache that grows by it.",
        lambda: said(generation_config=GenerationConfig(cache_implementation="static")),
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
        lambda: archs.shape_of(config(vision_config=CLIPVisionConfig(image_size=24, patch_size=0))),
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

CASES = SITES + MODELS + PROMPTS + READINGS + EDITS + METRICS + GENERATION + LATER + LOAD_CASES


@pytest.mark.parametrize("message, wrong", CASES, ids=[message[:60] for message, _ in CASES])
def test_message(message: str, wrong: Callable[[], object]) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
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
    return Path(last.filename).name, last.lineno or 0


ELSEWHERE = {"images.py", "cli.py"}
"""Modules whose messages have their own tests: test_images.py, and those of the command line."""


def test_every_raise_is_reached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    test_there_is_no_cuda(monkeypatch)
    test_a_checkpoint_that_cannot_be_loaded(tmp_path)
    test_eager_padding_in_float64()
    test_an_unknown_name()
    for _, wrong in CASES:
        try:
            wrong()
        except (ValueError, TypeError) as error:
            REACHED.add(_where(error))
    missed = []
    for path in sorted(PACKAGE.glob("*.py")):
        if path.name in ELSEWHERE:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and not any(
                name == path.name and node.lineno <= line <= (node.end_lineno or 0) for name, line in REACHED
            ):
                missed.append(f"{path.name}:{node.lineno}")
    assert not missed, f"no test reaches the messages at {', '.join(missed)}"


def test_a_reading_of_the_first_step_only() -> None:
    """The vision tower runs with the prompt; later steps have nothing of it."""
    made = said(max_new_tokens=3, read_each_step=["vision.0.z", "text.0.z"])
    assert [len(made[site]) for site in ("vision.0.z", "text.0.z")] == [1, 3]
