"""Every public experiment and method elsewhere: as if it were sent, and through a server without mechvlm.

`CALLS` has one call for each. What it finds here, under `remote="local"` and on the loopback server has to be the same
to 1e-6 of an array's largest number. Elsewhere every point of a sweep is a row of a full pass, so it is here as well;
that a part of the model run again gives the same is law 8.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from operator import attrgetter
from typing import Any

import loopback
import numpy as np
import pytest
import tiny
import torch
import xarray as xr
import zoo

import mechvlm as mv
from mechvlm import points
from mechvlm.methods import viar

ALLOWED = 1e-6
METRIC = mv.logit_difference("yes", "no")
PICTURES = {f"{number}.png": tiny.picture(number) for number in range(4)}
ROWS = [
    {"question_id": 2 * number + at, "image": name, "text": f"is there a {word} in the image ?"}
    | {"label": ("yes", "no")[(number + at) % 2]}
    for number, name in enumerate(PICTURES)
    for at, word in enumerate(("cat", "red dog"))
]
ASKED: dict[str, Any] = {"images": PICTURES}
HEADS = [(0, 1), (1, 2), (3, 0)]
CIRCUIT = mv.Circuit([mv.Edge("image", "a1.kv0<v>"), mv.Edge("a1.h1", "logits", "last")], heads=4, kv_heads=2)


@dataclass(frozen=True)
class Case:
    """A model, and questions to it about two pictures and about a black one."""

    vlm: mv.VLM

    @property
    def real(self) -> mv.Prompt:
        return self.vlm.prompt(tiny.picture(0), "is there a red dog in the image ?")

    @property
    def other(self) -> mv.Prompt:
        return self.vlm.prompt(tiny.picture(1), "is there a red dog in the image ?")

    @property
    def null(self) -> mv.Prompt:
        return self.real.with_image(mv.images.black)

    @property
    def both(self) -> list[mv.Prompt]:
        return [self.real, self.other]

    @property
    def four(self) -> list[mv.Prompt]:
        return [self.vlm.prompt(tiny.picture(number), "is there a red dog in the image ?") for number in range(4)]

    @property
    def edits(self) -> list[mv.Edit]:
        return [mv.bias_attention(1, self.real.image, 1.0), mv.ablate_heads(2, [1])]

    def pairs(self) -> list[mv.MinimalPair]:
        asked = "is there a red dog in the image ?"
        return [
            mv.MinimalPair(tiny.picture(at), mv.images.black(tiny.picture(at)), asked, "yes", "no") for at in (0, 1)
        ]


def doubled(pattern: torch.Tensor) -> torch.Tensor:
    return pattern * 2


def a_run(case: Case) -> Any:
    sites = ["text.1.pattern", "text.2.resid_post", "vision.0.z"]
    run = case.vlm.run(case.both, sites, [*case.edits, mv.Edit("text.2.mlp_out", doubled)], grad_of=METRIC)
    return [run.logits, *(run[site] for site in sites), *(run.grad[site] for site in sites)]


def contrasted(case: Case) -> Any:
    found = viar.vcd_generate(case.vlm, case.real, mv.images.black, max_new_tokens=3)
    return [found.text, found.tokens, found.logits, found.real, found.null]


def studied(case: Case) -> Any:
    few: dict[str, Any] = {"amounts": [0.0, 2.0], "pictures": 4, "few": 4, "controls": 1, "resamples": 20}
    parts = ["profile", "zone", "base", "samples", "when"]  # what the others do has a call of its own here
    found = viar.study(case.vlm, ROWS, split=None, zone=[1, 2], parts=parts, **few, **ASKED)
    return dict(found.parts)


CALLS: dict[str, Callable[[Case], Any]] = {
    "VLM.run": a_run,
    "VLM.runs": lambda case: [run.logits for run in case.vlm.runs([{"prompt": case.real}, {"prompt": case.null}])],
    "VLM.generate": lambda case: case.vlm.generate(case.both, case.edits, 4, ["text.1.z"], do_sample=False),
    "VLM.unembed": lambda case: case.vlm.unembed(torch.linspace(-1, 1, 16)[None]),
    "VLM.weights": lambda case: [case.vlm.weights.W_Q(1, 2), case.vlm.weights.W_O(1, 2), case.vlm.weights.W_U],
    "ablate_all_but": lambda case: mv.ablate_all_but(case.vlm, case.real, METRIC, HEADS[:2], controls=2),
    "ablate_each": lambda case: mv.ablate_each(
        case.vlm, case.both, METRIC, "region", to=lambda prompt: prompt.with_image(mv.images.black), layers=[0, 3]
    ),
    "ablate_each_head": lambda case: mv.ablate_each_head(case.vlm, case.real, METRIC, to=case.null),
    "ablate_image_tokens": lambda case: mv.ablate_image_tokens(
        case.vlm, case.both, METRIC, {"some": case.real.image[:3]}, controls=2
    ),
    "ablate_in_order": lambda case: mv.ablate_in_order(case.vlm, case.both, METRIC, HEADS, controls=2),
    "accuracy": lambda case: mv.ablate_each_head(case.vlm, case.real, mv.accuracy(case.vlm, "yes")),
    "answer_accuracy": lambda case: mv.answer_accuracy(case.vlm, [(case.real, "yes"), (case.null, "no")]),
    "answer_probabilities": lambda case: mv.answer_probabilities(
        case.vlm, {"real": case.real, "null": case.null}, ["yes", "no"]
    ),
    "attention_flow": lambda case: mv.attention_flow(case.vlm, case.real),
    "attention_map": lambda case: mv.attention_map(case.vlm, case.real, 3),
    "attention_profile": lambda case: mv.attention_profile(case.vlm, case.both, queries="text", without="bos"),
    "attention_profile, of a generation": lambda case: mv.attention_profile(
        case.vlm, case.real, "generated", max_new_tokens=3
    ),
    "attribution_patching": lambda case: [
        mv.attribution_patching(case.vlm, case.real, case.null, METRIC, verify=2),
        mv.attribution_patching(case.vlm, case.real, case.null, METRIC, ["q", "k"], mv.image_regions, method="atp*"),
        mv.attribution_patching(case.vlm, case.real, case.null, METRIC, ["z"], method="ig", path="pixels"),
        mv.attribution_patching(case.vlm, case.real, case.null, METRIC, ["k"], method="qk", tower="vision"),
    ],
    "attention_rollout": lambda case: mv.attention_rollout(case.vlm, case.real, without_bos=True),
    "back_patching": lambda case: mv.back_patching(
        case.vlm, case.both, answers=["yes", "no"], sources=[2, 3], destinations=[0, 1], control="other"
    ),
    "causal_trace": lambda case: mv.causal_trace(case.vlm, case.real, METRIC, samples=2, layers=[0, 2]),
    "circuit_faithfulness": lambda case: mv.circuit_faithfulness(
        case.vlm, CIRCUIT, [case.null, case.other], case.both, METRIC, controls=1
    ),
    "compare_maps": lambda case: mv.compare_maps(
        case.vlm, case.both, [METRIC, mv.logit_difference("no", "yes")], ["attention", "occlusion", "random"], samples=1
    ),
    "deletion_curve": lambda case: mv.deletion_curve(
        case.vlm, case.real, mv.attention_map(case.vlm, case.real, 3), METRIC, counts=[0, 4, 16], samples=2
    ),
    "composition_scores": lambda case: mv.composition_scores(case.vlm, layers=[0, 2, 3]),
    "deletion_curve, at the pixels": lambda case: mv.deletion_curve(
        case.vlm, case.real, mv.attention_map(case.vlm, case.real, 3), METRIC, None, [0, 4], 1, mode="both", at="pixels"
    ),
    "direct_logit_attribution": lambda case: mv.direct_logit_attribution(case.vlm, case.both, METRIC, by="token"),
    "dose_response": lambda case: mv.dose_response(case.vlm, case.real, METRIC, [-2, 0, 2], [1, 2]),
    "edge_attribution": lambda case: [
        mv.edge_attribution(case.vlm, case.real, case.null, METRIC, "eap", spans="each", verify=2),
        mv.edge_attribution(case.vlm, case.real, case.other, METRIC, steps=2),
    ],
    "find_heads": lambda case: mv.find_heads(case.vlm, case.both, METRIC, count=2, candidates=HEADS),
    "gradient_attention": lambda case: mv.gradient_attention(case.vlm, case.real, METRIC),
    "gradient_attribution": lambda case: mv.gradient_attribution(case.vlm, case.real, METRIC),
    "gradient_by_layer": lambda case: mv.gradient_by_layer(case.vlm, case.both, METRIC, between=(1, 3)),
    "gradient_tokens": lambda case: mv.gradient_tokens(case.vlm, case.real, METRIC, 3, tolerance=0.9),
    "information_flow": lambda case: mv.information_flow(
        case.vlm, case.both, edges=["image->last", "last->last"], layers=[(0, 1), (2, 4)], controls=1
    ),
    "input_times_gradient": lambda case: mv.input_times_gradient(case.vlm, case.real, METRIC, at="pixels"),
    "integrated_gradients": lambda case: mv.integrated_gradients(
        case.vlm, case.real, METRIC, steps=4, tolerance=100.0, batch_size=2
    ),
    "knockout_answers": lambda case: mv.knockout_answers(
        case.vlm, case.real, ["image->last"], layers=[(0, 3)], when="decode", max_new_tokens=3
    ),
    "label_heads": lambda case: mv.label_heads(
        case.vlm, case.both, [case.real.image[:3]] * 2, sink_threshold=2.0, repeat=5
    ),
    "ov_writes": lambda case: [
        mv.ov_writes(case.vlm, 2, [1, 3], case.real, top=3, words=["red"]),
        mv.ov_writes(case.vlm, 2, None, torch.linspace(-1, 1, 16), top=3),
    ],
    "language_prior_collapse": lambda case: mv.language_prior_collapse(case.vlm, case.both, ["black", "noise"]),
    "layer_profile": lambda case: mv.layer_profile(case.vlm, case.both),
    "logit_lens": lambda case: mv.logit_lens(case.vlm, case.real, case.real.image, words=["red"], piece=20),
    "mean_activations": lambda case: mv.mean_activations(case.vlm, case.both, positions="each"),
    "mean_features": lambda case: mv.mean_features(case.vlm, case.both),
    "norm_outliers": lambda case: mv.norm_outliers(case.vlm, case.real, count=2),
    "object_map": lambda case: mv.object_map(case.vlm, case.real, "dog", layer=2),
    "occlusion": lambda case: mv.occlusion(case.vlm, case.real, METRIC, block=2),
    "patch_features": lambda case: mv.patch_features(case.vlm, case.real, case.null, METRIC, mv.image_regions),
    "patch_heads": lambda case: mv.patch_heads(case.vlm, case.real, case.null, METRIC, positions=case.real.last),
    "patch_pairs": lambda case: mv.patch_pairs(
        case.vlm, case.pairs(), controls=2, layers=[0, 2], direction="denoise", only_right=False
    ),
    "patch_positions": lambda case: mv.patch_positions(
        case.vlm, case.real, case.null, METRIC, positions=case.real.image[:4], layers=[1, 2]
    ),
    "patch_spans": lambda case: mv.patch_spans(case.vlm, case.real, case.null, METRIC),
    "path_patching": lambda case: mv.path_patching(
        case.vlm, case.real, case.other, METRIC, ["image", "a0.h1", "m1"], {"v": ["a2.kv0<v>", "m3"], "out": "logits"}
    ),
    "relevancy": lambda case: mv.relevancy(case.vlm, case.real, METRIC),
    "sinks": lambda case: mv.sinks(case.vlm, case.real, threshold=2.0, alpha=1.0, layers=[1, 2]),
    "smooth_grad": lambda case: mv.smooth_grad(case.vlm, case.real, METRIC, at="pixels", samples=3),
    "span_flow": lambda case: mv.span_flow(case.vlm, case.real, METRIC),
    "sweep": lambda case: mv.sweep(
        case.vlm,
        case.real,
        lambda layer, span: [mv.cut_attention(layer, case.real.spans[span], queries=case.real.last)],
        mv.probability("yes"),
        layer=range(3),
        span=["image", "question"],
    ),
    "queries_to_patches": lambda case: mv.queries_to_patches(case.vlm, case.real),
    "evaluate.pope": lambda case: mv.evaluate.pope(case.vlm, ROWS, edits=case.edits, **ASKED),
    "viar.audit": lambda case: viar.audit(case.vlm, case.four, list("abcd"), METRIC, zone=[1, 2], resamples=20),
    "viar.bias_doses": lambda case: viar.bias_doses(
        case.vlm, ROWS, [0, 2], layers=[1, 2], masses=1, resamples=20, **ASKED
    ),
    "viar.bias_layers": lambda case: viar.bias_layers(
        case.vlm, ROWS, {"middle": [1, 2]}, controls=1, resamples=20, **ASKED
    ),
    "viar.entropy_ratios": lambda case: viar.entropy_ratios(case.vlm, case.real),
    "viar.grey_divergence": lambda case: viar.grey_divergence(case.vlm, case.real),
    "viar.item_attention": lambda case: viar.item_attention(case.vlm, ROWS[:3], **ASKED),
    "viar.legacy_edits": lambda case: [
        case.vlm.run(case.real, edits=viar.legacy_edits(case.vlm, case.real, ratio=0.1, layers=[1, 2])).logits
    ],
    "viar.study": studied,
    "viar.vcd_generate": contrasted,
    "viar.vcd_pope": lambda case: viar.vcd_pope(case.vlm, ROWS[:4], mv.images.black, **ASKED),
    "viar.viar_edits": lambda case: (
        case.vlm.run(case.real, edits=viar.viar_edits(case.vlm, case.real, 2.0, [1])).logits
    ),
}
UNRUN = {
    "bridged": "copies the weights into TransformerLens, which runs here",
    "cache_sites": "names sites of a model's shape",
    "viar.layer_amounts": "numbers of a model's layers",
    "viar.layer_sets": "numbers of a model's layers",
    "viar.viar_bias": "a function that makes viar_edits",
}
"""What takes a model and asks nothing of it, or cannot be elsewhere; each with the reason."""
ALWAYS = ("VLM.run", "ablate_each_head", "integrated_gradients")
"""Calls that are compared in every environment; the others in the second one."""


def takes_a_model(function: Any) -> bool:
    """Whether a function's first argument is a model, or may be."""
    return inspect.isfunction(function) and next(iter(inspect.signature(function).parameters), "") in ("vlm", "source")


def test_no_public_experiment_is_left_out() -> None:
    named = {name: attrgetter(name)(mv) for name in dir(mv)}
    named |= {f"evaluate.{name}": one for name, one in vars(mv.evaluate).items()}
    own = {f"viar.{name}": vars(viar)[name] for name in viar.__all__}
    named |= {name: one for name, one in own.items() if one not in named.values()}
    public = {name for name, one in named.items() if takes_a_model(one)}
    assert {*CALLS, *UNRUN} - public == {name for name in CALLS if name.startswith("VLM.") or ", " in name}
    assert public <= {*CALLS, *UNRUN}


@cache
def here(which: str) -> mv.VLM:
    if which == "instructblip":
        return zoo.build("instructblip")
    return tiny.vlm(layers=5, width=16, vision_layers=2)


def model_of(call: str) -> str:
    """The model that a call is about: one with a Q-Former for its queries."""
    return "instructblip" if call == "queries_to_patches" else "llava"


@cache
def expected(call: str) -> Any:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(points, "FEW", 10**6)
        return CALLS[call](Case(here(model_of(call))))


@pytest.fixture(scope="module")
def served(running: loopback.Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], mv.VLM]]:
    """A model on the loopback server, by its name."""

    @cache
    def there(which: str) -> mv.VLM:
        folder = running.deploy(here(which).hf, here(which).processor, name=which)
        return mv.load(str(folder), remote=running.url)

    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MECHVLM_JOBS", str(tmp_path_factory.mktemp("jobs")))
        yield there


def numbers(value: Any, name: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """Everything numeric, and every text, in what a call returned, by where it stands."""
    if isinstance(value, xr.DataArray):
        yield name, value.values
        yield from ((f"{name}.{at}", one.values) for at, one in value.coords.items())
    elif isinstance(value, xr.Dataset):
        yield from ((f"{name}.{at}", one.values) for at, one in value.variables.items())
    elif isinstance(value, mv.Generation):
        yield from numbers([value.text, value.tokens, *[dict(step) for step in value.steps]], name)
    elif isinstance(value, torch.Tensor):
        yield name, value.detach().cpu().numpy()
    elif isinstance(value, Mapping):
        for at, one in value.items():
            yield from numbers(one, f"{name}.{at}")
    elif isinstance(value, list | tuple):
        for at, one in enumerate(value):
            yield from numbers(one, f"{name}.{at}")
    else:
        yield name, np.asarray(value)


def differences(found: Any, wanted: Any) -> dict[str, float]:
    """How far two results are from one another, array by array, relative to an array's largest number."""
    first, second = dict(numbers(found)), dict(numbers(wanted))
    assert first.keys() == second.keys() and first
    far = {}
    for name in [name for name in first if not name.endswith(".seconds")]:
        one, other = first[name], second[name]
        assert one.shape == other.shape, name
        if one.dtype.kind not in "fiub":
            assert (one == other).all(), name
            continue
        a, b = one.astype(float), other.astype(float)
        assert np.array_equal(np.isfinite(a), np.isfinite(b)), name
        kept = np.isfinite(b)
        far[name] = float(np.abs(a[kept] - b[kept]).max() / max(1.0, np.abs(b[kept]).max())) if kept.any() else 0.0
    return far


def apart(found: Any, wanted: Any) -> dict[str, float]:
    """The arrays that are further apart than is allowed."""
    return {name: far for name, far in differences(found, wanted).items() if not far <= ALLOWED}


@pytest.mark.parametrize(
    "call", [pytest.param(call, marks=() if call in ALWAYS else zoo.second_environment) for call in CALLS]
)
def test_what_is_found_as_if_elsewhere(call: str) -> None:
    vlm = here(model_of(call))
    assert apart(CALLS[call](Case(mv.VLM(vlm.hf, vlm.processor, vlm.name, remote="local"))), expected(call)) == {}


@zoo.second_environment
@pytest.mark.parametrize("call", CALLS)
def test_what_is_found_on_a_server_without_mechvlm(call: str, served: Callable[[str], mv.VLM]) -> None:
    assert apart(CALLS[call](Case(served(model_of(call)))), expected(call)) == {}
