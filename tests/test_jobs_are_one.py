"""An experiment on a model elsewhere is one job, or as many as one answer has to be known before the next is asked.

What comes back is about as large as the result: no queries, keys and values, and no logits of a whole vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import tiny
import torch
import xarray as xr
import zoo

import mechvlm as mv
from mechvlm.places import answered

pytestmark = zoo.second_environment
YES = mv.logit_difference("yes", "no")


@dataclass
class Counting:
    """A place that runs jobs in this process, and counts them and the numbers that come back."""

    remote = True
    name = "counted"
    jobs: list[int] = field(default_factory=list)
    shapes: set[tuple[int, ...]] = field(default_factory=set)

    def ask(self, model: Any, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a function makes of the model, once it has been packed to be sent."""
        found = answered(function, model, arguments)
        self.jobs.append(sum(x.untyped_storage().nbytes() for x in tensors(found)))
        self.shapes |= {tuple(x.shape) for x in tensors(found)}
        return found["answer"]


def tensors(value: Any) -> list[torch.Tensor]:
    """All tensors of a packed value."""
    if isinstance(value, torch.Tensor):
        return [value]
    held = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [x for one in held for x in tensors(one)]


@cache
def vlm() -> mv.VLM:
    return tiny.vlm()


@cache
def elsewhere() -> mv.VLM:
    """The same model, whose place counts."""
    other = vlm().with_edits([])
    other.place = Counting()  # type: ignore[assignment]
    return other


@cache
def prompts() -> list[mv.Prompt]:
    """Three prompts of two lengths."""
    return [vlm().prompt(tiny.picture(at), ("is there a dog ?", "is there a red cat ?")[at % 2]) for at in range(3)]


def real() -> mv.Prompt:
    return prompts()[0]


def null() -> mv.Prompt:
    return real().with_image(mv.images.black)


def cut(layer: int) -> list[mv.Edit]:
    return [mv.cut_attention(layer, real().image, queries=real().last)]


def few(prompt: mv.Prompt) -> dict[str, list[int]]:
    return {"few": prompt.image[:2]}


EXPERIMENTS: dict[str, tuple[int, Callable[[mv.VLM], Any]]] = {
    "attention_profile": (1, lambda vlm: mv.attention_profile(vlm, prompts(), "text")),
    "layer_profile": (1, lambda vlm: mv.layer_profile(vlm, prompts())),
    "sinks": (1, lambda vlm: mv.sinks(vlm, real(), threshold=2.0)),
    "attention_rollout": (1, lambda vlm: mv.attention_rollout(vlm, real())),
    "attention_flow": (1, lambda vlm: mv.attention_flow(vlm, real())),
    "relevancy": (1, lambda vlm: mv.relevancy(vlm, real(), YES)),
    "span_flow": (1, lambda vlm: mv.span_flow(vlm, real(), YES)),
    "sweep": (1, lambda vlm: mv.sweep(vlm, real(), cut, YES, layer=range(3), batch_size=1)),
    "ablate_each_head": (1, lambda vlm: mv.ablate_each_head(vlm, real(), YES)),
    "ablate_each": (1, lambda vlm: mv.ablate_each(vlm, prompts(), YES, "mlp")),
    "ablate_in_order": (1, lambda vlm: mv.ablate_in_order(vlm, prompts(), YES, [(0, 1)], controls=2)),
    "answer_probabilities": (1, lambda vlm: mv.answer_probabilities(vlm, {"real": real(), "null": null()}, ["yes"])),
    "answer_accuracy": (1, lambda vlm: mv.answer_accuracy(vlm, [(prompt, "yes") for prompt in prompts()])),
    "language_prior_collapse": (
        1,
        lambda vlm: mv.language_prior_collapse(vlm, prompts()[:2], ["black", "no_image"]),
    ),
    "mean_activations": (1, lambda vlm: mv.mean_activations(vlm, prompts())),
    "grey_divergence": (1, lambda vlm: mv.methods.viar.grey_divergence(vlm, real())),
    # The second job is asked once the first is answered: of the real pictures, and then of the null ones; which prompts
    # are answered right; what the edits put back; between which ends the line is.
    "gradient_by_layer": (2, lambda vlm: mv.gradient_by_layer(vlm, prompts(), YES)),
    "information_flow": (2, lambda vlm: mv.information_flow(vlm, prompts(), edges=["image->last"], window=1)),
    "causal_trace": (2, lambda vlm: mv.causal_trace(vlm, real(), samples=3, layers=[1], positions=real().last)),
    "patch_spans": (2, lambda vlm: mv.patch_spans(vlm, real(), null(), YES, layers=[0, 1], direction="both")),
    "integrated_gradients": (2, lambda vlm: mv.integrated_gradients(vlm, real(), YES, steps=8, tolerance=9.0)),
    "smooth_grad": (2, lambda vlm: mv.smooth_grad(vlm, real(), YES, samples=4, batch_size=2)),
}

RESIDUAL = ("causal_trace", "patch_spans", "integrated_gradients", "smooth_grad")
"""Of these, what a run held is put into the next, or multiplied by what is found, and so it comes back as well."""


@cache
def found(name: str) -> tuple[Any, list[int], set[tuple[int, ...]]]:
    """What an experiment found elsewhere, the bytes of each of its jobs, and the shapes of what came back."""
    place: Any = elsewhere().place
    place.jobs, place.shapes = [], set()
    return EXPERIMENTS[name][1](elsewhere()), place.jobs, place.shapes


def numbers_of(result: Any) -> int:
    """How many numbers a result has."""
    if isinstance(result, xr.Dataset):
        return sum(int(one.size) for one in result.data_vars.values())
    return int(sum(x.size if isinstance(x, xr.DataArray) else x.numel() for x in _parts(result)))


def _parts(result: Any) -> list[Any]:
    if isinstance(result, list | dict):
        return [x for one in (result.values() if isinstance(result, dict) else result) for x in _parts(one)]
    return [result]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_is_one_job_or_two(name: str) -> None:
    assert len(found(name)[1]) == EXPERIMENTS[name][0]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_no_logits_of_a_whole_vocabulary_come_back(name: str) -> None:
    assert not [shape for shape in found(name)[2] if shape[-1:] == (tiny.VOCABULARY,)]


@pytest.mark.parametrize("name", sorted(EXPERIMENTS.keys() - set(RESIDUAL)))
def test_what_comes_back_is_no_larger_than_what_is_returned(name: str) -> None:
    result, jobs, _ = found(name)
    # Half as many numbers again, of eight bytes, for what is averaged here; and a metric of each run.
    assert sum(jobs) <= 12 * numbers_of(result) + 512
