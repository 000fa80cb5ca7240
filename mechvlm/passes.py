"""One forward pass of a model, or all of a generation's, walked in an nnsight trace.

Rule this module guards: with `mechvlm.rerun` it is the only one that opens traces. What opens them are plain functions
of the nnsight model and of plain values, so that a place can run them elsewhere (`mechvlm.places`).

>>> plan = vlm.plan([real])
>>> forward(vlm, Visit(plan), vlm.batch([real], plan))
Run(1 rows; nothing read)
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mechvlm import batch as batches
from mechvlm.batch import check_finite, check_fired, scored
from mechvlm.devices import check_differentiable, runs_on
from mechvlm.generating import answered, check_copies, check_sampling, check_static_cache, generation_of
from mechvlm.metrics import Metric
from mechvlm.plan import Plan
from mechvlm.prompt import Prompt
from mechvlm.run import NO_GRADIENT, Generation, Readings, Run
from mechvlm.seam import attending
from mechvlm.shapes import Parts
from mechvlm.visit import Visit
from mechvlm.walk import at, walk

LARGEST = 256 << 20
"""Bytes of encodings, mostly of pictures, above which what is asked for at once is sent as more than one job."""


@dataclass(frozen=True)
class Pass:
    """What one forward pass is to do.

    Attributes:
        plan: reads and edits.
        batch: what the model is called with.
        metric: what gradients are taken of, if any.
        ends: the position of each row whose logits are wanted, counted from the end.
        value: what is wanted of these logits instead of themselves, evaluated where the model runs; `run.metric`.
        reduce: what is wanted of the readings, and of their gradients, instead of themselves, evaluated there as well;
            `run.reduced`.
    """

    plan: Plan
    batch: Mapping[str, Tensor]
    metric: Metric | None = None
    ends: Sequence[int] = (-1,)
    value: Metric | None = None
    reduce: Callable[[dict, dict], Any] | None = None


def pass_of(
    vlm: Any,
    held: dict[tuple, tuple[Sequence[Prompt], dict[str, Tensor]]],
    prompt: Any,
    read: Any = (),
    edits: Any = (),
    variants: Any = None,
    grad_of: Metric | None = None,
    position: int = -1,
    value: Metric | None = None,
    reduce: Callable[[dict, dict], Any] | None = None,
) -> Pass:
    """What one forward pass is to do, from what `vlm.run` takes; what cannot be is refused.

    Args:
        held: batches that were made already, with their prompts: what is sent elsewhere is sent once for all passes.
    """
    prompts = batches.check_prompts(prompt, vlm.shape)
    ends = batches.check_ends(prompts, position) * batches.check_variants(prompts, variants)
    plan = vlm.plan(prompts, read, edits, variants=variants, gradient=grad_of is not None)
    metric = None if grad_of is None else vlm.metric(grad_of)
    if metric is not None:
        batches.check_gradients(vlm.attention, vlm.device)
        check_differentiable(vlm.hf)
    if not vlm.place.remote:
        return Pass(plan, vlm.batch(prompts, plan), metric, ends, value, reduce)
    key = (*map(id, prompts), plan.layout)
    # The prompts are held too, so that no other can take the place in memory of one that is let go meanwhile.
    held[key] = held[key] if key in held else (prompts, vlm.batch(prompts, plan))
    return Pass(plan, held[key][1], metric, ends, value, reduce)


def forward(
    vlm: Any,
    visit: Visit,
    batch: Mapping[str, Tensor],
    metric: Metric | None = None,
    ends: Sequence[int] = (-1,),
    more: Iterable[tuple] = (),
) -> Run:
    """One forward pass, in this process.

    Args:
        visit: what is done at each site.
        metric: what gradients are taken of, if any.
        ends: the position of each row whose logits are wanted, counted from the end.
        more: sites to visit beside those of the visit's plan.
    """
    found = passed(vlm.model, vlm.arch, vlm.shape.logit_cap, visit, Pass(visit.plan, batch, metric, ends), more)
    return shown(vlm, visit.plan, found)


def forwards(vlm: Any, passes: Iterable[Pass]) -> Iterator[Run]:
    """Several forward passes: one after the other in this process; elsewhere one job, or several for many pictures."""
    if not vlm.place.remote:
        for one in passes:
            yield shown(vlm, one.plan, passed(vlm.model, vlm.arch, vlm.shape.logit_cap, Visit(one.plan), one))
        return
    for some in by_size(passes):
        found = vlm.place.ask(vlm.model, all_passed, vlm.arch, vlm.shape.logit_cap, some)
        for one, shows in zip(some, found, strict=True):
            yield shown(vlm, one.plan, shows)


def by_size(passes: Iterable[Pass]) -> Iterator[list[Pass]]:
    """Passes in as few lists as there are jobs to send, each with no more than `LARGEST` of encodings where it can."""
    some: list[Pass] = []
    sizes: dict[int, int] = {}
    for one in passes:
        size = sum(x.nbytes for x in one.batch.values())
        if some and id(one.batch) not in sizes and sum(sizes.values()) + size > LARGEST:
            yield some
            some, sizes = [], {}
        some.append(one)
        sizes[id(one.batch)] = size
    if some:
        yield some


def all_passed(model: Any, arch: Parts, cap: float | None, passes: Sequence[Pass]) -> list[dict[str, Any]]:
    """What several forward passes showed."""
    return [passed(model, arch, cap, Visit(one.plan), one) for one in passes]


def passed(
    model: Any, arch: Parts, cap: float | None, visit: Visit, what: Pass, more: Iterable[tuple] = ()
) -> dict[str, Any]:
    """What one forward pass showed: plain values, under names.

    Args:
        model: the nnsight model.
        cap: of the model's logits.
        more: sites to visit beside those of the visit's plan.
    """
    plan, ends = visit.plan, what.ends
    at(model, arch.row.image_features)  # nnsight knows a call within a pass only if it was named before the pass
    wanted, pictures = plan.wanted(), "pixel_values" in what.batch
    for kind, layer, tower in more:
        wanted.setdefault((tower, layer), set()).add(kind)
    whole = ("logits", None, "text") in {*plan.reads, *plan.edits, *plan.grads}
    keep = {"logits_to_keep": 0 if whole else -min(ends)} if arch.row.keeps else {}
    given = placed(what.batch, at(model, str(arch.text.embed))._module)
    shows: dict[str, Any] = {}
    with torch.set_grad_enabled(what.metric is not None):
        with model.trace(**given, use_cache=False, **keep):
            walk(model, arch, wanted, visit.touch, attending(visit), pictures)
            shows["logits"] = visit.logits(at(model, arch.unembed), ends, cap)
        if what.metric is not None:
            values = scored(what.metric, shows["logits"])
            visit.gradients(values)
            shows["metric"] = values.detach()
    logits = shows["logits"] = shows["logits"].detach()
    check_finite(logits)
    if what.value is not None:
        shows |= {"logits": logits[:, :0], "metric": what.value(logits)}
    fired, saved, grads = sorted(visit.fired), visit.saved, visit.grads
    if what.reduce is not None:
        read = {site: of_groups(steps[0]) for site, steps in saved.items()}
        shows["reduced"] = what.reduce(read, {site: of_groups(kept) for site, kept in grads.items()})
        saved, grads = {}, {}
    return {**shows, "saved": saved, "grads": grads, "fired": fired}


def of_groups(kept: Sequence[tuple]) -> Any:
    """What was read of a site; of several groups of rows a list, one for each group."""
    return kept[0][1] if len(kept) == 1 else [value for _, value in kept]


def placed(batch: Mapping[str, Tensor], embed: torch.nn.Module) -> dict[str, Tensor]:
    """A batch where words are embedded, and pictures in the type of their embeddings."""
    device, dtype = runs_on(embed), embed.get_parameter("weight").dtype
    if device.type == "meta":  # sent code may have no weights beside it; the server puts inputs where they are
        return {name: x.to(dtype) if x.is_floating_point() else x for name, x in batch.items()}
    return {name: x.to(device, dtype if x.is_floating_point() else x.dtype) for name, x in batch.items()}


def shown(vlm: Any, plan: Plan, shows: Mapping[str, Any]) -> Run:
    """What a forward pass showed, as a `Run`."""
    check_fired(plan, shows["fired"])
    return Run(
        shows["logits"],
        Readings({site: steps[0] for site, steps in shows["saved"].items()}, plan.layout),
        Readings(shows["grads"], plan.layout, NO_GRADIENT),
        shows.get("metric"),
        vlm,
        shows.get("reduced"),
    )


def said_by(
    vlm: Any,
    prompt: Any,
    edits: Any,
    max_new_tokens: int,
    read_each_step: Any,
    sampling: Mapping[str, Any],
    mixer: Callable[[], Any] | None = None,
) -> tuple[Generation, dict[str, Any]]:
    """What a model generates, and all that the generation showed.

    Args:
        mixer: as in `steps`; the others as `vlm.generate` takes them.
    """
    own = vlm.hf.generation_config
    check_sampling(max_new_tokens, sampling, own)
    check_static_cache(sampling, own, vlm.shape, vlm.attention)
    prompts = batches.check_prompts(prompt, vlm.shape)
    plan = vlm.plan(prompts, read_each_step, edits, steps=max_new_tokens)
    check_copies(plan.pictured(), sampling, own)
    batch = vlm.batch(prompts, plan)
    batch.pop("position_ids", None)
    shows = steps(vlm, plan, batch, {"max_new_tokens": max_new_tokens, **sampling}, mixer)
    start, alone = batch["input_ids"].shape[1], isinstance(prompt, Prompt)
    return generation_of(vlm.processor, shows, start, alone, plan.layout), shows


def steps(
    vlm: Any,
    plan: Plan,
    batch: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    mixer: Callable[[], Any] | None = None,
) -> dict[str, Any]:
    """The passes of a generation, the one over the prompt first: what was said and what was read of each step.

    Args:
        settings: of transformers' `generate`.
        mixer: makes, where the model runs, what mixes the rows' scores: `mixed(model, given, output)` is a hook on the
            model, calling it a processor of scores, and `kept()` what is wanted of it, under "mixed".
    """
    with warnings.catch_warnings():
        # The loop has no end of its own: it is cut where generation stops, and nnsight says so.
        warnings.filterwarnings("ignore", message="(?s).*was never reached")
        # Before 5.23 transformers takes the place of the first weights, which may be kept elsewhere, for the model's.
        warnings.filterwarnings("ignore", message="You are calling .generate.. with the `input_ids` being on a device")
        shows = vlm.place.ask(vlm.model, generated, vlm.arch, plan, dict(batch), dict(settings), mixer)
    check_fired(plan, shows["fired"])
    found: dict[str, Any] = shows
    return found


def generated(
    model: Any,
    arch: Parts,
    plan: Plan,
    batch: dict[str, Tensor],
    settings: dict[str, Any],
    mixer: Callable[[], Any] | None = None,
) -> dict[str, Any]:
    """What a generation showed: plain values, under names."""
    if mixer is not None:
        mixing = mixer()
        # A processor of scores comes behind those of the model's configuration, so the rows are mixed before.
        hook = model._module.register_forward_hook(mixing.mixed)
        try:
            shows = generated(model, arch, plan, batch, {**settings, "logits_processor": [mixing]})
        finally:
            hook.remove()
        return {**shows, "mixed": mixing.kept()}
    visit, wanted, said = Visit(plan), plan.wanted(), []
    pictures, callback = "pixel_values" in batch, attending(visit)
    given = placed(batch, at(model, str(arch.text.embed))._module)
    at(model, arch.row.image_features)

    def answer(**named: Any) -> Any:
        said.append(answered(model._module, named, plan.pictured()))
        return said[-1]

    with torch.no_grad(), model.trace(**given, **settings, fn=answer) as tracer:
        for step in tracer.iter[:]:
            visit.step = step
            walk(model, arch, wanted, visit.touch, callback, pictures and step == 0)
            # Something has to be read in every step, or the loop would not end.
            visit.logits(at(model, arch.unembed), [-1])
    ids = said[0] if isinstance(said[0], Tensor) else said[0].sequences
    return {"tokens": ids, "saved": visit.saved, "fired": sorted(visit.fired)}
