"""Questions about one picture on shared keys and values: each must get the logits of a run of its own."""

import sys
from types import FunctionType, ModuleType

import numpy as np
import pytest
import torch
import zoo
from torch import Tensor
from zoo.boxes import noise

import mechvlm as mv
from mechvlm import shared
from mechvlm.fingerprints import fingerprint
from mechvlm.shared import EditsOf, shared_logits

WORDS = ("is there a red dog in the image ?", "is there a blue cat ?", "is there a dog in the image ?")
APART = {
    "instructblip": "full passes, since the pictures differ, or how they are read differs with the question",
    "blip2-opt": "full passes, since words enter the first layer of this model with something added",
    "paligemma": "full passes, since what stands before the questions sees them, or an edit needs to see both",
    "paligemma2": "full passes, since what stands before the questions sees them, or an edit needs to see both",
}


def asked(vlm: mv.VLM, name: str, words: tuple[str, ...] = WORDS, seed: int = 0) -> list[mv.Prompt]:
    """Questions about one picture; ready encodings where the processor cannot be built here."""
    encoding = zoo.VARIANTS[name].encoding
    if vlm.processor is None and encoding is not None:
        return [vlm.prompt(encoding=encoding([noise(seed)], one)) for one in words]
    return [vlm.prompt(noise(seed), one) for one in words]


def alone(vlm: mv.VLM, prompts: list[mv.Prompt], edits: EditsOf = ()) -> Tensor:
    """What a run of each prompt by itself says."""
    own = [edits(prompt) if callable(edits) else edits for prompt in prompts]
    return torch.cat([vlm.run(prompt, edits=its).logits for prompt, its in zip(prompts, own, strict=True)])


def gap(found: Tensor, right: Tensor) -> float:
    return float((found - right).abs().max() / right.abs().max())


def everywhere(vlm: mv.VLM) -> EditsOf:
    """Edits of every kind of site, at all positions, and at each prompt's last."""
    crosses = any("cross_z" in kinds for kinds in vlm.shape.kinds["text"])

    def edits(prompt: mv.Prompt) -> list[mv.Edit]:
        found = [mv.Edit("image_features", lambda x: x * 1.2)]
        for layer, kinds in enumerate(vlm.shape.kinds["text"]):
            found += [mv.Edit(mv.Site("resid_pre", layer), lambda x: x * 1.1)]
            found += [mv.steer(mv.Site("resid_post", layer), torch.ones(vlm.shape.d_model["text"]), 0.1, prompt.last)]
            if "z" in kinds:
                found += [] if crosses else [mv.bias_attention(layer, prompt.image, 1.5)]
                found += [mv.ablate_heads(layer, [0]), mv.cut_attention(layer, [0], queries=prompt.last)]
                found += [mv.Edit(mv.Site("pattern", layer), lambda a: a * 0.5, rows="each")]
                found += [mv.Edit(mv.Site("k", layer), lambda x: x * 0.9)]
        return found

    return edits


@pytest.mark.parametrize("name", zoo.each_kind(zoo.VARIANTS))
def test_questions_get_the_logits_of_runs_of_their_own(name: str) -> None:
    vlm = zoo.build(name, "eager" if name == "paligemma2" else "sdpa")
    prompts = asked(vlm, name, WORDS[:2])
    found = shared_logits(vlm, prompts, everywhere(vlm))
    assert gap(found.logits, alone(vlm, prompts, everywhere(vlm))) < 5e-6
    assert found.engine == APART.get(name, found.engine)
    assert ("keys and values" in found.engine) == (name not in APART)


@zoo.second_environment
@pytest.mark.parametrize("name", zoo.VARIANTS)
def test_the_same_in_float64_under_eager_attention(name: str) -> None:
    vlm = zoo.build(name, "eager", torch.float64)
    prompts = asked(vlm, name)
    for edits in ((), everywhere(vlm)):
        found = shared_logits(vlm, prompts, edits)
        assert gap(found.logits, alone(vlm, prompts, edits)) < 5e-7  # transformers' own float32 softmax and norms


@pytest.fixture(scope="module")
def llava() -> tuple[mv.VLM, list[mv.Prompt]]:
    vlm = zoo.build("llava")
    return vlm, asked(vlm, "llava")


def counted(vlm: mv.VLM, path: str) -> list[int]:
    """How many rows each call of a module of the model gets, as it runs."""
    rows: list[int] = []
    vlm.hf.get_submodule(path).register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[0]))
    return rows


def test_the_picture_is_seen_once_and_earlier_positions_run_once() -> None:
    vlm = zoo.build("llava")
    prompts = asked(vlm, "llava")
    seen = counted(vlm, "model.vision_tower")
    shared_logits(vlm, prompts)
    assert seen == [1]


def test_questions_of_several_lengths_are_one_batch(llava: tuple[mv.VLM, list[mv.Prompt]]) -> None:
    vlm, prompts = llava
    for edits in ((), lambda prompt: [mv.bias_attention(1, prompt.image, 2.0), mv.bias_attention(2, [0], -1.0)]):
        found = shared_logits(vlm, prompts, edits)
        assert gap(found.logits, alone(vlm, prompts, edits)) < 5e-6
    assert len({len(prompt) for prompt in prompts}) > 1


def test_edits_of_the_models_own_act(llava: tuple[mv.VLM, list[mv.Prompt]]) -> None:
    vlm, prompts = llava
    own = vlm.with_edits([mv.bias_attention(1, prompts[0].image, 2.0), mv.ablate_heads(0, [1])])
    found = shared_logits(own, prompts, [mv.ablate_heads(2, [0])])
    assert "keys and values" in found.engine
    assert gap(found.logits, alone(own, prompts, [mv.ablate_heads(2, [0])])) < 5e-6
    assert gap(found.logits, alone(vlm, prompts)) > 1e-3


def by_words(prompt: mv.Prompt) -> list[mv.Edit]:
    """An edit at the picture that differs with the question."""
    return [mv.bias_attention(1, prompt.image[: len(prompt) % 5 + 1], 2.0)]


def from_behind(_: mv.Prompt) -> list[mv.Edit]:
    """An edit in which earlier positions are given what stands behind them."""
    return [mv.Edit(mv.Site("resid_pre", 1), lambda x: x + x.mean(1, keepdim=True))]


def from_the_end(_: mv.Prompt) -> list[mv.Edit]:
    """An edit of so many last positions, which in shorter questions begin among those that all share."""
    return [mv.Edit(mv.Site("z", 1), lambda x: torch.cat([x[:, :-9], 3 * x[:, -9:]], 1))]


def row_from_the_end(_: mv.Prompt) -> list[mv.Edit]:
    """An edit of a query counted from the end."""
    return [mv.Edit(mv.Site("pattern", 1), lambda a: a * 3, rows=(-8,))]


def of_a_square(prompt: mv.Prompt) -> list[mv.Edit]:
    """An edit of the vision tower that differs with the question, at a position with a high number."""
    return [mv.Edit(mv.Site("resid_post", 0, "vision"), lambda x: x * len(prompt), positions=[16])]


def of_words(_: mv.Prompt) -> list[mv.Edit]:
    return [mv.Edit("embed", lambda x: x * 1.5)]


def of_the_map(_: mv.Prompt) -> list[mv.Edit]:
    """An edit that is given a layer's whole map."""
    return [mv.Edit(mv.Site("pattern", 1), lambda a: a / a.amax())]


@pytest.mark.parametrize(
    "edits, why",
    [
        (by_words, "what is edited before the questions differ is not the same in all"),
        (from_behind, "what an edit does to earlier positions depends on what stands behind them"),
        (from_the_end, "what an edit does to earlier positions depends on what stands behind them"),
        (row_from_the_end, "what is edited before the questions differ is not the same in all"),
        (of_a_square, "what is edited before the questions differ is not the same in all"),
        (of_words, "words or logits themselves are edited"),
        (of_the_map, "what stands before the questions sees them, or an edit needs to see both"),
    ],
)
def test_what_cannot_be_shared_is_run_whole_and_says_why(
    llava: tuple[mv.VLM, list[mv.Prompt]], edits: EditsOf, why: str
) -> None:
    vlm, prompts = llava
    found = shared_logits(vlm, prompts, edits)
    assert found.engine == f"full passes, since {why}"
    assert gap(found.logits, alone(vlm, prompts, edits)) < 5e-6


def test_an_edit_behind_the_words_they_share_may_differ(llava: tuple[mv.VLM, list[mv.Prompt]]) -> None:
    vlm, prompts = llava

    def edits(prompt: mv.Prompt) -> list[mv.Edit]:
        return [mv.cut_attention(1, prompt.image, queries=prompt.last), mv.ablate_heads(2, [len(prompt) % 2])][:1]

    found = shared_logits(vlm, prompts, edits)
    assert "keys and values" in found.engine
    assert gap(found.logits, alone(vlm, prompts, edits)) < 5e-6


def test_other_pictures_and_one_question_alone_are_run_whole(llava: tuple[mv.VLM, list[mv.Prompt]]) -> None:
    vlm, prompts = llava
    other = [prompts[0], *asked(vlm, "llava", WORDS[:1], seed=1)]
    for some, why in ((other, "the pictures differ"), (prompts[:1], "there is one question")):
        found = shared_logits(vlm, some)
        assert why in found.engine
        assert gap(found.logits, alone(vlm, some)) < 5e-6
    words = [vlm.prompt(None, word) for word in WORDS]
    assert "there is no picture" in shared_logits(vlm, words).engine
    assert shared_logits(vlm, prompts, share=False).engine == "full passes, since it was asked for"


def test_a_prompt_given_twice_gets_the_same_twice(llava: tuple[mv.VLM, list[mv.Prompt]]) -> None:
    vlm, prompts = llava
    found = shared_logits(vlm, [prompts[0], prompts[1], prompts[0]])
    assert gap(found.logits[0], found.logits[2]) < 5e-6


def test_what_are_no_edits_is_refused_in_a_sentence(llava: tuple[mv.VLM, list[mv.Prompt]]) -> None:
    vlm, prompts = llava
    for wrong in (mv.ablate_heads(0, [0]), None, lambda _: None):
        with pytest.raises(TypeError, match="it must be a list of edits"):
            shared_logits(vlm, prompts, wrong)
    made = (edit for edit in [mv.ablate_heads(0, [0])])
    assert gap(shared_logits(vlm, prompts, made).logits, alone(vlm, prompts, [mv.ablate_heads(0, [0])])) < 5e-6


def test_many_questions_run_in_pieces(llava: tuple[mv.VLM, list[mv.Prompt]], monkeypatch: pytest.MonkeyPatch) -> None:
    vlm, prompts = llava
    sizes: list[int] = []
    plain = shared.rerun

    def counting(start: object, variants: list, *more: object, **named: object) -> Tensor:
        sizes.append(len(variants))
        return plain(start, variants, *more, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(shared, "rerun", counting)
    found = shared_logits(vlm, prompts * 5)
    assert max(sizes) <= 4 and sum(sizes) == 15
    assert gap(found.logits, alone(vlm, prompts).repeat(5, 1)) < 5e-6


class Scaled:
    """A function with slots and no dictionary."""

    __slots__ = ("by",)

    def __init__(self, by: float) -> None:
        self.by = by

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.by


def test_what_functions_hold_tells_them_apart() -> None:
    drawn = [np.random.default_rng(seed) for seed in (1, 1, 2)]
    seeded = [torch.Generator().manual_seed(seed) for seed in (1, 1, 2)]
    for one, same, other in (map(Scaled, (1.0, 1.0, 2.0)), drawn, seeded):
        assert fingerprint(one) == fingerprint(same) != fingerprint(other)
    own = ModuleType("own")
    own.__dict__["AMOUNT"] = 1.0
    before = fingerprint(own)
    own.__dict__["AMOUNT"] = 2.0
    assert fingerprint(own) != before


@pytest.mark.parametrize("folder", ["/usr/local/lib/python3.12/dist-packages", "/opt/env/lib/python3.12/site-packages"])
def test_an_installed_package_is_known_by_its_name(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian's Python, and Colab's, keeps packages in dist-packages: what happens within them is no user's change."""
    package = ModuleType("torchish")
    package.__file__ = f"{folder}/torchish/__init__.py"
    scale = FunctionType((lambda x: x * AMOUNT).__code__, package.__dict__, "scale")  # type: ignore[name-defined]  # noqa: F821
    package.__dict__.update(AMOUNT=1.0, scale=scale)
    monkeypatch.setitem(sys.modules, "torchish", package)
    before = fingerprint(package, scale)
    package.__dict__["AMOUNT"] = 2.0
    assert fingerprint(package, scale) == before
    package.__file__ = "/home/ann/torchish/__init__.py"
    assert fingerprint(package) != fingerprint(scale) != before
    before = fingerprint(package, scale)
    package.__dict__["AMOUNT"] = 3.0
    assert fingerprint(package, scale) != before


def test_edits_that_cannot_be_are_refused_before_anything_runs(llava: tuple[mv.VLM, list[mv.Prompt]]) -> None:
    vlm, prompts = llava
    with pytest.raises(ValueError, match="there is no head 99"):
        shared_logits(vlm, prompts, [mv.ablate_heads(0, [99])])
