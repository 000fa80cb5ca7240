"""The laws of docs/architecture.md over tiny random models of every architecture, under SDPA and eager attention.

What is found here has to be what docs/architectures.md says, so that its matrix and the README's table are never stale.
"""

import json
from importlib.util import find_spec
from typing import Any

import pytest
import tiny
import torch
import zoo
from test_readme import script

import mechvlm as mv
from mechvlm import laws
from mechvlm.archs import ARCHS
from mechvlm.generating import has_static_cache
from mechvlm.laws.finding import all_sites, layers_with
from mechvlm.references import apart, rounding

architectures = script()
FOUND = json.loads(architectures.FILE.read_text())["models"]
EXACT = (laws.law_1_reading, laws.law_2_writing_back, laws.law_3_residuals, laws.law_5_patching)
"""The laws that hold bit for bit, and so in bfloat16 too."""

SENT = ("qwen3_vl", "mllama")
"""Models that law 12 is always tried on, beside those of tests/test_laws.py; on others in the second environment."""

NUMBERS = {law: int(law.__name__.split("_")[1]) for law in laws.LAWS}
NO_STATIC_CACHE = ("paligemma2",)
"""Models that no transformers generates with a static cache of; the oldest that mechvlm runs with has more of them."""
OF_EACH_KIND = (6, 8, 9, 10)
"""Laws that compare many runs, tried on a model of each kind always, and on every model in the second environment."""

every = pytest.mark.parametrize("name", zoo.VARIANTS)
each = pytest.mark.parametrize("name", zoo.each_kind(zoo.VARIANTS))


def model(name: str, attention: str, dtype: torch.dtype) -> Any:
    if zoo.there(name):
        pytest.skip(zoo.there(name))  # runs again on the transformers release that has it
    if attention != "eager" and name in zoo.EAGER_ONLY:
        pytest.skip(zoo.EAGER_ONLY[name])  # runs under eager attention, in the same tests
    return zoo.build(name, attention, dtype)


def put_off(name: str) -> set[int]:
    """The numbers of the laws that are tried on a model in the second environment alone."""
    if find_spec("torchvision") is not None:
        return set()
    return {*(() if name in SENT else (12,)), *(() if name in zoo.EACH_KIND else OF_EACH_KIND)}


@every
@pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=zoo.second_environment)])
def test_every_law_holds(name: str, attention: str) -> None:
    vlm = model(name, attention, torch.float32)
    prompt = zoo.ask(vlm, tiny.picture(width=48, height=48))
    left_out = put_off(name)
    found = [finding for law in laws.LAWS if NUMBERS[law] not in left_out for finding in law(vlm, prompt)]
    assert [finding for finding in found if not finding.holds] == []
    left_out |= set() if name in NO_STATIC_CACHE or has_static_cache(vlm.shape) else {9}  # it held, with one check less
    shown = [row for row in FOUND[name][attention]["float32"] if row[0] not in left_out]
    summary = [row for row in architectures.summary(found) if row[0] not in left_out]
    assert [[law, tower, count, verdict] for law, tower, count, _, verdict in summary] == [
        [law, tower, count, verdict] for law, tower, count, _, verdict in shown
    ], "docs/architectures.json is stale: python scripts/architectures.py"


@every
@zoo.second_environment
def test_what_is_left_is_rounding(name: str) -> None:
    """Where a difference is rounding, it shrinks with the type; a bug stays. tests/test_laws.py has LLaVA's always."""
    vlm = model(name, "eager" if name in zoo.EAGER_ONLY else "sdpa", torch.float64)
    prompt = zoo.ask(vlm, tiny.picture(width=48, height=48))
    assert [finding for law in laws.LAWS for finding in law(vlm, prompt) if not finding.holds] == []


@every
@zoo.second_environment
def test_exact_laws_hold_in_bfloat16(name: str) -> None:
    vlm = model(name, "eager" if name in zoo.EAGER_ONLY else "sdpa", torch.bfloat16)
    prompt = zoo.ask(vlm, tiny.picture(width=48, height=48))
    assert [finding for law in EXACT for finding in law(vlm, prompt) if not finding.holds] == []


def test_every_architecture_has_a_tiny_model() -> None:
    built = {zoo.VARIANTS[name].model().config.model_type for name in zoo.VARIANTS if not zoo.there(name)}
    missing = {"molmo2"} if zoo.there("molmo2") else set()
    assert built == set(ARCHS) - missing


@every
def test_the_image_matters(name: str) -> None:
    """Some architectures start with gates or queries of zero, and a test on them would be about nothing."""
    vlm = model(name, "eager" if name in zoo.EAGER_ONLY else "sdpa", torch.float32)
    first, second = (vlm.run(zoo.ask(vlm, tiny.picture(seed, 48, 48))).logits for seed in (0, 1))
    assert (first - second).abs().max() > 1e-3


@each
def test_several_pictures_in_one_prompt(name: str) -> None:
    vlm = model(name, "eager" if name in zoo.EAGER_ONLY else "sdpa", torch.float32)
    if vlm.arch.row.mark == "":
        pytest.skip("a Q-Former's processor takes one picture a prompt; tests/test_grids_queries.py has its sentence")
    pictures = [tiny.picture(0, 60, 40), tiny.picture(1, 32, 48)]
    prompt = zoo.ask(vlm, pictures)
    assert len(prompt.images) == 2
    assert [law for law in laws.law_13_positions(vlm, prompt) if not law.holds] == []
    for law in EXACT[:3]:
        assert [finding for finding in law(vlm, prompt) if not finding.holds] == []


@each
def test_a_padded_batch_of_pictures_of_different_sizes_is_its_rows_alone(name: str) -> None:
    """Their tiles, grids and lengths differ; so runs and generations with edits are what each prompt gives alone."""
    vlm = model(name, "eager" if name in zoo.EAGER_ONLY else "sdpa", torch.float32)
    prompts = [zoo.ask(vlm, tiny.picture(0, 60, 40)), zoo.ask(vlm, tiny.picture(1, 48, 48), "is there a dog ?")]
    first = layers_with(vlm, "z")[0]
    edits = [mv.bias_attention(first, [4, 5], 2.0), mv.ablate_heads(first, [1])]
    alone = [vlm.run(prompt, edits=edits).logits for prompt in prompts]
    assert apart(vlm.run(prompts, edits=edits).logits, torch.cat(alone)) <= rounding(vlm)
    settings: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    said = [vlm.generate(prompt, edits, **settings).tokens for prompt in prompts]
    assert torch.equal(vlm.generate(prompts, edits, **settings).tokens, torch.cat(said))


@each
def test_readings_of_a_batch_are_each_rows_own(name: str) -> None:
    vlm = model(name, "eager" if name in zoo.EAGER_ONLY else "sdpa", torch.float32)
    prompts = [zoo.ask(vlm, tiny.picture(0, 60, 40)), zoo.ask(vlm, tiny.picture(1, 48, 48), "is there a dog ?")]
    sites = [site for site in all_sites(vlm) if site.layer in (None, 0)]
    together, alone = vlm.run(prompts, read=sites), [vlm.run(prompt, read=sites) for prompt in prompts]
    for row, one in zip(together.rows, alone, strict=True):
        worst = {site: apart(row[site].flatten(0, -2), one[site].flatten(0, -2)) for site in sites}
        assert {site: error for site, error in worst.items() if not error <= rounding(vlm)} == {}


def first_of_each(x: torch.Tensor) -> torch.Tensor:
    """An edit that depends on where in its own images something stands."""
    x[0, :2] *= 1.7
    return x


@each
def test_edits_of_pictures_see_their_own_row_alone(name: str) -> None:
    vlm = model(name, "eager" if name in zoo.EAGER_ONLY else "sdpa", torch.float32)
    prompts = [zoo.ask(vlm, tiny.picture(0, 60, 40)), zoo.ask(vlm, tiny.picture(1, 48, 48), "is there a dog ?")]
    if vlm.arch.row.mark != "":
        prompts.append(zoo.ask(vlm, [tiny.picture(2, 48, 48), tiny.picture(3, 48, 48)]))
    if vlm.shape.crosses:
        prompts = prompts[:2]
    sites = [mv.Site("image_features"), mv.Site("resid_post", 0, "vision")]
    sites += [mv.Site("deepstack", 0)] if vlm.shape.deepstack else []
    for site in sites:
        edits = [mv.Edit(site, first_of_each)]
        alone = [vlm.run(prompt, edits=edits).logits for prompt in prompts]
        assert apart(vlm.run(prompts, edits=edits).logits, torch.cat(alone)) <= rounding(vlm), str(site)


@each
def test_gradients_of_pictures_are_each_variants_own(name: str) -> None:
    """Rows may share the picture's features, but not what flows back through them."""
    vlm = model(name, "eager" if name in zoo.EAGER_ONLY else "sdpa", torch.float32)
    prompt, last = zoo.ask(vlm, tiny.picture(0, 48, 48)), layers_with(vlm, "z")[-1]
    sites = [mv.Site("z", 0, "vision"), mv.Site("resid_pre", 1, "vision"), mv.Site("image_features")]
    sites += [mv.Site("z", 0, "qformer"), mv.Site("resid_pre", 0, "qformer")] if "qformer" in vlm.shape.layers else []
    variants: list[list[mv.Edit]] = [[mv.scale_heads(last, [0], 3.0)], []]
    together = vlm.run(prompt, sites, variants=variants, grad_of=lambda logits: logits[:, 30])
    for row, edits in zip(together.rows, variants, strict=True):
        alone = vlm.run(prompt, sites, edits, grad_of=lambda logits: logits[:, 30])
        assert max(apart(row.grad[site], alone.grad[site]) for site in sites) <= rounding(vlm, 256)
        assert min(float(row.grad[site].abs().max()) for site in sites[:3]) > 0


@each
def test_gradients_at_the_vision_tower_are_what_a_small_step_gives(name: str) -> None:
    """Central differences in float64, along a random direction at each site; several layers may reach the projector."""
    vlm = model(name, "eager" if name in zoo.EAGER_ONLY else "sdpa", torch.float64)
    prompt = zoo.ask(vlm, tiny.picture(0, 48, 48))
    kinds = ("resid_pre", "attn_out", "z", "resid_post")
    sites = [mv.Site(kind, layer, "vision") for kind in kinds for layer in range(vlm.shape.live["vision"])]
    run = vlm.run(prompt, sites, grad_of=lambda logits: logits[:, 30])
    for site in sites:
        direction = torch.randn_like(run[site])
        shown = float((run.grad[site] * direction).sum())
        # Norms round to float32 whatever the type, which a small step would measure where the slope is small. Where it
        # is steep it bends as well (at the empty tiles of Mllama).
        step = 3e-5 if abs(shown) > 1 else 1e-3

        def moved(by: float, site: mv.Site = site, direction: torch.Tensor = direction) -> torch.Tensor:
            return vlm.run(prompt, edits=[mv.Edit(site, lambda x: x + by * direction)]).logits[0, 30]

        slope = float((moved(step) - moved(-step)) / (2 * step))
        assert abs(slope - shown) <= 0.02 * max(abs(slope), 0.1), str(site)
        assert slope != 0


def test_what_mllama_would_pad_with_empty_pictures_is_refused() -> None:
    vlm = zoo.build("mllama")
    prompts = [zoo.ask(vlm, tiny.picture()), zoo.ask(vlm, [tiny.picture(), tiny.picture(1)])]
    with pytest.raises(
        ValueError, match="the prompts hold 1 and 2 images, and this model pads the fewer with empty ones"
    ):
        vlm.run(prompts)


def test_beams_do_not_go_with_edits_of_pictures() -> None:
    vlm = zoo.build("qwen2_vl")
    prompt = zoo.ask(vlm, tiny.picture(0, 48, 48))
    with pytest.raises(ValueError, match="generate does not take num_beams=2 together with readings or edits of image"):
        vlm.generate(prompt, [mv.Edit("image_features", first_of_each, "prompt")], num_beams=2)


def test_a_picture_that_is_laid_out_otherwise_is_refused() -> None:
    vlm = zoo.build("ovis2")
    prompt = zoo.ask(vlm, tiny.picture(0, 80, 40))
    with pytest.raises(ValueError, match="as many positions as before, but other squares of the picture at them"):
        prompt.with_image(tiny.picture(0, 40, 80))


@pytest.mark.parametrize("name", ["qwen2_vl", "mistral3", "llava_next-mistral", "internvl", "qwen3_vl"])
def test_prompts_with_several_pictures_can_be_patched(name: str) -> None:
    vlm = zoo.build(name)
    prompt = zoo.ask(vlm, [tiny.picture(0, 60, 40), tiny.picture(1, 32, 48)])
    for site in (mv.Site("resid_post", 0, "vision"), mv.Site("image_features")):
        held = vlm.run(prompt, read=[site])
        assert torch.equal(vlm.run(prompt, edits=[mv.patch(site, held[site])]).logits, held.logits)
