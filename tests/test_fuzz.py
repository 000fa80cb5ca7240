"""Random prompts, reads and edits: the result is that of plain torch, or one sentence says why there is none.

More examples than the test run has time for: MECHVLM_FUZZ=2000 pytest tests/test_fuzz.py
"""

# ruff: noqa: ARG005

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jaxtyping
import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plain import Place, Plain
from torch import Tensor

import mechvlm as mv
from mechvlm.towers import Block

# The test run's type checks look at a random item of each list, which is no choice of hypothesis's.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module")
EXAMPLES = int(os.environ.get("MECHVLM_FUZZ", "60"))
LAYERS = 2
HEADS = {"text": 4, "vision": 4}
WIDTH, D_HEAD = 32, 8
ATTENTION = ("scores", "pattern")
LENGTH = {"vision": tiny.TOKENS + 1, "image_features": tiny.TOKENS}
fuzz = settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck), report_multiple_bugs=False)
MADE: dict[Any, Any] = {}

KINDS = Block().kinds
"""What every layer of a LLaVA has."""


def model(kv_heads: int, attention: str) -> Any:
    """One of a few models in float64, where an error of 1e-5 is not rounding."""
    key = (kv_heads, attention)
    if key not in MADE:
        kernel = "eager" if attention == "plain" else attention
        MADE[key] = tiny.model(kv_heads, kernel, torch.float64, layers=LAYERS, vision_layers=LAYERS)
    return MADE[key]


def vlm_of(kv_heads: int, attention: str) -> mv.VLM:
    return MADE.setdefault(("vlm", kv_heads, attention), mv.VLM(model(kv_heads, attention)))


# What is drawn


@dataclass(frozen=True)
class Change:
    """An edit as mechvlm is given it, and as plain torch does it."""

    edit: mv.Edit
    plain: Callable[[Tensor], Tensor]

    @property
    def place(self) -> Place:
        return self.edit.site.kind, self.edit.site.layer, self.edit.site.tower


def encodings(images: int | None = None) -> st.SearchStrategy[dict[str, Tensor]]:
    count = st.integers(0, 2) if images is None else st.just(images)
    return st.builds(
        tiny.encoding,
        question=st.integers(1, 5),
        prefix=st.integers(0, 3),
        images=count,
        seed=st.integers(0, 99),
        gap=st.integers(0, 1),
    )


def length_at(site: mv.Site, positions: int) -> int:
    return LENGTH.get(site.tower, LENGTH.get(site.kind, positions))


@st.composite
def sites(draw: Callable, pictures: bool, live: bool, kinds: tuple[str, ...] = KINDS) -> mv.Site:
    """A site of the model; with `live` one whose edit reaches the answer."""
    tower = draw(st.sampled_from(["text", "text", "vision"])) if pictures else "text"
    if kinds is KINDS and draw(st.integers(0, 6)) == 6:
        whole = [mv.Site("embed"), mv.Site("logits")]
        whole += [mv.Site("image_features"), mv.Site("embed", tower="vision")] if pictures else []
        return draw(st.sampled_from(whole))
    top = LAYERS - 2 if live and tower == "vision" else LAYERS - 1
    return mv.Site(draw(st.sampled_from(kinds)), draw(st.integers(0, top)), tower)


def some(draw: Callable, length: int) -> list[int]:
    return draw(st.lists(st.integers(0, length - 1), min_size=1, max_size=4, unique=True))


@st.composite
def functions(draw: Callable, pictures: bool, length: int) -> Change:
    """Any function at any site: whole tensors, or some positions of them."""
    site = draw(sites(pictures, live=True))
    choices: list[Callable[[Tensor], Tensor]] = [lambda x: x * 0.7, lambda x: x.mul_(1.3), lambda x: x, torch.clone]
    if site.kind == "pattern":
        keys = some(draw, length_at(site, length))

        def blind(x: Tensor) -> Tensor:
            x[..., keys] = 0
            return x / (x.sum(-1, keepdim=True) + 0.01)

        choices.append(blind)
    elif site.kind != "scores":
        where = some(draw, length_at(site, length))

        def shift(x: Tensor) -> Tensor:
            x[:, where] += 0.5
            return x

        choices += [shift, lambda x: x + 0.2, lambda x: x.flip(1)]
    function = draw(st.sampled_from(choices))
    return Change(mv.Edit(site, function), function)


@st.composite
def builders(draw: Callable, pictures: bool, length: int) -> Change:  # noqa: PLR0915
    """One of the package's builders, and what it promises, written out again."""
    kind = draw(st.sampled_from(["scale", "ablate", "mean", "bias", "cut", "steer", "replace", "patch"]))
    if kind in ("scale", "ablate", "mean"):
        site = draw(sites(pictures, True, ("z",)))
        layer, tower = site.layer, site.tower
        heads = some(draw, HEADS[tower])
        factor = draw(st.floats(-2, 2)) if kind == "scale" else 0.0
        mean = torch.linspace(-1, 1, HEADS[tower] * D_HEAD).view(HEADS[tower], D_HEAD) if kind == "mean" else None

        def on_heads(z: Tensor) -> Tensor:
            keep = torch.ones(z.shape[2], 1, dtype=z.dtype)
            keep[heads] = factor
            return z * keep + (0 if mean is None else (1 - keep) * mean)

        if kind == "scale":
            return Change(mv.scale_heads(layer, heads, factor, tower), on_heads)
        return Change(mv.ablate_heads(layer, heads, mean, tower), on_heads)
    if kind in ("bias", "cut"):
        site = draw(sites(pictures, True, ("scores",)))
        layer, tower, places = site.layer, site.tower, length_at(site, length)
        keys = some(draw, places)
        queries = some(draw, places) if draw(st.booleans()) else None
        if tower == "text" and queries is not None and min(keys) > max(queries):
            queries = [*queries, max(keys)]  # no position looks ahead, and a bias that could do nothing is refused
        chosen = some(draw, HEADS[tower]) if draw(st.booleans()) else None
        amount = draw(st.floats(-3, 3)) if kind == "bias" else -torch.inf

        def biased(scores: Tensor) -> Tensor:
            for head in range(scores.shape[1]) if chosen is None else chosen:
                for query in range(scores.shape[2]) if queries is None else queries:
                    scores[:, head, query, keys] += amount
            return scores

        if kind == "cut":
            return Change(mv.cut_attention(layer, keys, queries, chosen, tower), biased)
        way = draw(st.sampled_from(["mask", "feature", "recompute"]))
        return Change(mv.bias_attention(layer, keys, amount, queries, chosen, tower, way), biased)
    site = draw(sites(pictures, True, ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")))
    where = some(draw, length_at(site, length))
    vector = torch.linspace(-1, 1, WIDTH)
    if kind == "steer":
        amount, everywhere = draw(st.floats(-2, 2)), draw(st.booleans())

        def steered(x: Tensor) -> Tensor:
            x[:, slice(None) if everywhere else where] += amount * vector
            return x

        return Change(mv.steer(site, vector, amount, None if everywhere else where), steered)

    def replaced(x: Tensor) -> Tensor:
        x[:, where] = vector.to(x)
        return x

    return Change(mv.replace_span(site, where, vector), replaced)


def changes(pictures: bool, length: int) -> st.SearchStrategy[list[Change]]:
    return st.lists(builders(pictures, length) | functions(pictures, length), max_size=4)


@st.composite
def readings(draw: Callable, pictures: bool, length: int) -> dict[mv.Site, Callable | None]:
    """Sites with functions of what is read there."""
    found: dict[mv.Site, Callable | None] = {}
    for _ in range(draw(st.integers(0, 4))):
        site = draw(sites(pictures, live=False))
        places = length_at(site, length)
        choices: list[Callable | None] = [None, lambda x: x[:, -1], lambda x: x.double().mean((1, 2))]
        if site.kind in ATTENTION:
            choices = [None, mv.rows(draw(st.lists(st.integers(-places, places - 1), min_size=1, max_size=3)))]
        if site.kind == "pattern":
            queries = some(draw, places) if draw(st.booleans()) else None
            choices.append(mv.mass({"a": some(draw, places), "b": [-1, 0], "none": []}, queries))
        found[site] = draw(st.sampled_from(choices))
    return found


# What must come out


def placed(encoding: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.double() if x.is_floating_point() else x for name, x in encoding.items()}


def same(a: Tensor, b: Tensor) -> None:
    """Equal up to float32, in which a LLaMA's norms compute whatever the type."""
    assert a.shape == b.shape
    assert not a.isnan().any()
    assert torch.equal(a.isfinite(), b.isfinite())
    finite = b.isfinite()
    largest = max(1.0, b[finite].abs().max().item()) if finite.any() else 1.0
    torch.testing.assert_close(a[finite], b[finite].to(a), rtol=0, atol=2e-5 * largest)


def plain_run(
    kv_heads: int,
    encoding: dict[str, Tensor],
    edits: list[Change],
    grads: Sequence[Change] = (),
    gradients: bool = False,
) -> tuple[Plain, Tensor]:
    acts = [(one.place, one.plain, "value") for one in edits] + [(one.place, one.plain, "grad") for one in grads]
    # Not the model that a VLM holds: nnsight rewrites the attention it watches.
    watch = Plain(model(kv_heads, "plain"), acts, gradients)
    return watch, watch(placed(encoding))


def compare(run: mv.Run, watch: Plain, logits: Tensor, read: dict, position: int) -> None:
    """One row of a run with a plain forward pass."""
    same(run.logits, logits[:, position].detach())
    for site, reading in read.items():
        x = watch.seen[(site.kind, site.layer, site.tower)].detach()
        same(run[site], x if reading is None else reading(x.clone()))


@fuzz
@given(data=st.data())
def test_runs_are_plain_torch(data: st.DataObject) -> None:
    """One prompt: any reads, any edits, any position, and gradients."""
    kv_heads, attention = data.draw(st.sampled_from([2, 4])), data.draw(st.sampled_from(["sdpa", "eager"]))
    vlm, encoding = vlm_of(kv_heads, attention), data.draw(encodings())
    prompt = vlm.prompt(encoding=encoding)
    pictures, length = bool(prompt.images), len(prompt)
    edits, read = data.draw(changes(pictures, length)), data.draw(readings(pictures, length))
    position = data.draw(st.integers(-length, length - 1))
    wanted = [one.edit for one in edits]
    if data.draw(st.booleans()):
        watch, logits = plain_run(kv_heads, encoding, edits)
        compare(vlm.run(prompt, read, wanted, position=position), watch, logits, read, position)
        return
    watch, logits = plain_run(kv_heads, encoding, edits, gradients=True)
    value = logits[0, position, 7] - logits[0, position, 9]
    run = vlm.run(prompt, read, wanted, grad_of=mv.logit_difference(7, 9), position=position)
    compare(run, watch, logits, read, position)
    for site, reading in read.items():
        gradient = watch.gradient(value, (site.kind, site.layer, site.tower))
        same(run.grad[site], gradient if reading is None else reading(gradient))


@fuzz
@given(data=st.data())
def test_batches_are_their_rows_alone(data: st.DataObject) -> None:
    """Several prompts of different lengths, with edits that fit all of them; each row is a plain run of its own."""
    kv_heads = data.draw(st.sampled_from([2, 4]))
    given_images = data.draw(st.sampled_from([None, 1, 2]))
    several = data.draw(st.lists(encodings(given_images), min_size=2, max_size=3))
    vlm = vlm_of(kv_heads, "sdpa")
    prompts = [vlm.prompt(encoding=encoding) for encoding in several]
    pictures, shortest = all(prompt.images for prompt in prompts), min(map(len, prompts))
    edits, read = data.draw(changes(pictures, shortest)), data.draw(readings(pictures, shortest))
    position = data.draw(st.integers(-shortest, shortest - 1))
    run = vlm.run(prompts, read, [one.edit for one in edits], position=position)
    for row, encoding in zip(run.rows, several, strict=True):
        compare(row, *plain_run(kv_heads, encoding, edits), read, position)


@fuzz
@given(data=st.data())
def test_variants_are_runs_alone(data: st.DataObject) -> None:
    """One prompt with a list of edits for each row, and some for all rows."""
    kv_heads, attention = data.draw(st.sampled_from([2, 4])), data.draw(st.sampled_from(["sdpa", "eager"]))
    vlm, encoding = vlm_of(kv_heads, attention), data.draw(encodings())
    prompt = vlm.prompt(encoding=encoding)
    pictures, length = bool(prompt.images), len(prompt)
    shared, read = data.draw(changes(pictures, length)), data.draw(readings(pictures, length))
    rows = data.draw(st.lists(changes(pictures, length), min_size=1, max_size=3))
    run = vlm.run(prompt, read, [one.edit for one in shared], [[one.edit for one in row] for row in rows])
    assert len(run.rows) == len(rows)
    for row, own in zip(run.rows, rows, strict=True):
        compare(row, *plain_run(kv_heads, encoding, shared + own), read, -1)


@fuzz
@given(data=st.data())
def test_gradient_edits_are_plain_hooks(data: st.DataObject) -> None:
    kv_heads = data.draw(st.sampled_from([2, 4]))
    vlm, encoding = vlm_of(kv_heads, "sdpa"), data.draw(encodings())
    prompt = vlm.prompt(encoding=encoding)
    pictures, length = bool(prompt.images), len(prompt)
    kinds = ("resid_pre", "q", "z", "attn_out", "pattern", "resid_post")
    site = data.draw(sites(pictures, True, kinds))
    read = data.draw(readings(pictures, length))
    value_edits = data.draw(changes(pictures, length))
    half = Change(mv.Edit(site, lambda x: x * 0.5, on="grad"), lambda x: x * 0.5)
    watch, logits = plain_run(kv_heads, encoding, value_edits, [half], gradients=True)
    value = logits[0, -1, 7] - logits[0, -1, 9]
    edits = [one.edit for one in value_edits] + [half.edit]
    try:
        run = vlm.run(prompt, read, edits, grad_of=mv.logit_difference(7, 9))
    except ValueError as error:  # right where the metric does not depend on the site
        assert "never acted in this run" in str(error)
        assert not watch.gradient(value, half.place).any()
        return
    compare(run, watch, logits, read, -1)
    for site, reading in read.items():
        gradient = watch.gradient(value, (site.kind, site.layer, site.tower))
        same(run.grad[site], gradient if reading is None else reading(gradient))


@st.composite
def stepwise(draw: Callable, length: int) -> Change:
    """An edit for a generation: a function of each position by itself, in the prompt's pass, in later steps or both."""
    kind = draw(
        st.sampled_from(["resid_pre", "z", "attn_out", "mlp_out", "resid_post", "q", "k", "v", "pattern", "bias"])
    )
    layer = draw(st.integers(0, LAYERS - 1))
    if kind == "bias":
        keys, amount = some(draw, length), draw(st.floats(-2, 2))

        def biased(scores: Tensor) -> Tensor:
            scores[..., keys] += amount
            return scores

        way = draw(st.sampled_from(["mask", "feature", "recompute"]))
        return Change(mv.bias_attention(layer, keys, amount, way=way), biased)
    when = "always" if kind in ("k", "v") else draw(st.sampled_from(["always", "prompt", "decode"]))
    axis = 2 if kind == "pattern" else 1

    def partly(x: Tensor) -> Tensor:
        prompt, later = x.narrow(axis, 0, length), x.narrow(axis, length, x.shape[axis] - length)
        return torch.cat([prompt * (1 if when == "decode" else 0.6), later * (1 if when == "prompt" else 0.6)], axis)

    return Change(mv.Edit(mv.Site(kind, layer), lambda x: x * 0.6, when), partly)


@settings(fuzz, max_examples=max(EXAMPLES // 3, 5))
@given(data=st.data())
def test_generation_is_plain_runs_of_the_growing_text(data: st.DataObject) -> None:
    kv_heads, attention = data.draw(st.sampled_from([2, 4])), data.draw(st.sampled_from(["sdpa", "eager"]))
    vlm = vlm_of(kv_heads, attention)
    several = data.draw(st.lists(encodings(1), min_size=1, max_size=2 if attention == "sdpa" else 1))
    prompts = [vlm.prompt(encoding=encoding) for encoding in several]
    length, steps = min(map(len, prompts)), data.draw(st.integers(2, 3))
    edits = data.draw(st.lists(stepwise(length), max_size=3)) if len({len(prompt) for prompt in prompts}) == 1 else []
    read = {mv.Site("logits"): lambda x: x[:, -1]}
    made = vlm.generate(
        prompts, [one.edit for one in edits], steps, read, do_sample=False, suppress_tokens=[tiny.EOS, tiny.IMAGE]
    )
    assert made.tokens.shape == (len(prompts), steps)
    for row, encoding in enumerate(several):
        ids = encoding["input_ids"]
        for step in range(steps):
            longer = {**encoding, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
            _, logits = plain_run(kv_heads, longer, edits)
            same(made.steps[step].row(row)["logits"], logits[:, -1])
            logits[..., [tiny.EOS, tiny.IMAGE]] = -torch.inf
            assert made.tokens[row, step] == logits[0, -1].argmax()
            ids = torch.cat([ids, made.tokens[row : row + 1, step : step + 1]], 1)


# What must be refused


SENTENCE = re.compile(r"[^\n]+\.")


def _edit(site: mv.Site | str, function: Callable = torch.clone, **more: Any) -> list[mv.Edit]:
    return [mv.Edit(site, function, **more)]


WRONG: dict[str, Callable[[int, int], tuple[Callable[[mv.VLM, mv.Prompt], object], str]]] = {
    "a layer to read": lambda n, _: (lambda v, p: v.run(p, [mv.Site("z", LAYERS + n)]), f"text.{LAYERS + n}.z"),
    "a layer to edit": lambda n, _: (
        lambda v, p: v.run(p, edits=_edit(f"text.{LAYERS + n}.q")),
        f"text.{LAYERS + n}.q",
    ),
    "a negative layer": lambda n, _: (lambda v, p: mv.Site("z", -1 - n), str(-1 - n)),
    "a dead layer": lambda n, _: (lambda v, p: v.run(p, edits=_edit("vision.1.z")), "vision.1.z"),
    "a head": lambda n, _: (lambda v, p: v.run(p, edits=[mv.scale_heads(0, [4 + n], 2.0)]), str(4 + n)),
    "a negative head": lambda n, _: (lambda v, p: mv.ablate_heads(0, [-1 - n]), str(-1 - n)),
    "a fraction of a head": lambda n, _: (lambda v, p: mv.ablate_heads(0, [n + 0.5]), str(n + 0.5)),  # type: ignore[list-item]
    "a key": lambda n, s: (lambda v, p: v.run(p, edits=[mv.bias_attention(0, [s + n], 1.0)]), f"{s + n}"),
    "a query": lambda n, s: (lambda v, p: v.run(p, edits=[mv.cut_attention(0, [0], [s + n])]), f"{s + n}"),
    "a position": lambda n, s: (
        lambda v, p: v.run(p, edits=[mv.steer("text.0.resid_pre", torch.ones(32), 1.0, [s + n])]),
        f"{s + n}",
    ),
    "a replaced position": lambda n, s: (
        lambda v, p: v.run(p, edits=[mv.replace_span("text.0.resid_pre", [s + n], torch.ones(32))]),
        f"{s + n}",
    ),
    "a long direction": lambda n, _: (
        lambda v, p: v.run(p, edits=[mv.steer("text.0.resid_pre", torch.ones(33 + n))]),
        str(33 + n),
    ),
    "a long value": lambda n, _: (
        lambda v, p: v.run(p, edits=[mv.replace_span("text.0.z", [0], torch.ones(5 + n, D_HEAD))]),
        str(5 + n),
    ),
    "too many values": lambda n, _: (
        lambda v, p: v.run(p, edits=[mv.replace_span("text.0.z", [0], torch.ones(2 + n, 4, D_HEAD))]),
        str(2 + n),
    ),
    "a patch of another length": lambda n, s: (
        lambda v, p: v.run(p, edits=[mv.patch("text.0.z", torch.ones(1, s + 1 + n, 4, D_HEAD))]),
        f"{s + 1 + n}",
    ),
    "a mean of another model": lambda n, _: (
        lambda v, p: v.run(p, edits=[mv.ablate_heads(0, [0], torch.ones(4, D_HEAD + 1 + n))]),
        str(D_HEAD + 1 + n),
    ),
    "a resampling of another length": lambda n, s: (
        lambda v, p: v.run(p, edits=[mv.ablate_heads(0, [0], torch.ones(1, s + 1 + n, 4, D_HEAD))]),
        f"{s + 1 + n}",
    ),
    "a row to read": lambda n, s: (lambda v, p: v.run(p, {"text.0.pattern": mv.rows([s + n])}), f"{s + n}"),
    "a mass to read": lambda n, s: (lambda v, p: v.run(p, {"text.0.pattern": mv.mass({"a": [s + n]})}), f"{s + n}"),
    "an index in a reading": lambda n, s: (lambda v, p: v.run(p, {"text.0.z": lambda z: z[:, s + n]}), f"{s + n}"),
    "rows of z": lambda n, _: (lambda v, p: v.run(p, {"text.0.z": mv.rows([0])}), "text.0.z"),
    "a position of the logits": lambda n, s: (lambda v, p: v.run(p, position=s + n), f"{s + n}"),
    "an edit of another shape": lambda n, _: (
        lambda v, p: v.run(p, edits=_edit("text.0.z", lambda z: z[..., :-1])),
        "text.0.z",
    ),
    "an edit of another type": lambda n, _: (lambda v, p: v.run(p, edits=_edit("text.0.z", Tensor.half)), "float16"),
    "an edit into nothing": lambda n, _: (lambda v, p: v.run(p, edits=_edit("text.0.z", lambda z: None)), "NoneType"),
    "an edit into NaN": lambda n, _: (lambda v, p: v.run(p, edits=_edit("text.0.z", lambda z: z / 0 * 0)), "NaN"),
    "a token": lambda n, _: (lambda v, p: v.run(p, grad_of=mv.logit_difference(0, 64 + n)), str(64 + n)),
    "a decode step in a run": lambda n, _: (lambda v, p: v.run(p, edits=_edit("text.0.z", when="decode")), "decode"),
    "a gradient in a run": lambda n, _: (lambda v, p: v.run(p, edits=_edit("text.0.z", on="grad")), "gradient"),
    "a patch of the cache": lambda n, _: (
        lambda v, p: v.generate(p, _edit("text.0.k", when="prompt"), 2),
        "text.0.k",
    ),
    "a patch of what is never seen again": lambda n, _: (
        lambda v, p: v.generate(p, _edit("vision.0.z", when="decode"), 2),
        "vision.0.z",
    ),
    "no tokens": lambda n, _: (lambda v, p: v.generate(p, max_new_tokens=-n), str(-n)),
    "a word of an unknown site": lambda n, _: (lambda v, p: v.run(p, ["text.0.zed"]), "text.0.zed"),
}


@pytest.mark.parametrize("what", WRONG)
@settings(max_examples=max(EXAMPLES // 20, 2), suppress_health_check=list(HealthCheck))
@given(number=st.integers(0, 300), encoding=encodings(1), attention=st.sampled_from(["sdpa", "eager"]))
def test_what_cannot_be_is_refused_in_a_sentence(what: str, number: int, encoding: dict, attention: str) -> None:
    vlm = vlm_of(2, attention)
    prompt = vlm.prompt(encoding=encoding)
    ask, names = WRONG[what](number, len(prompt))
    jaxtyping.config.update("jaxtyping_disable", True)  # a wrong type meets our own sentence, as it does for users
    try:
        with pytest.raises((ValueError, TypeError)) as caught:
            ask(vlm, prompt)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
    assert SENTENCE.fullmatch(str(caught.value)), str(caught.value)
    assert names in str(caught.value)
    assert vlm.run(prompt).logits.isfinite().all()  # and the model is as it was


@fuzz
@given(data=st.data())
def test_images_that_are_not_there(data: st.DataObject) -> None:
    vlm = vlm_of(2, "sdpa")
    prompt = vlm.prompt(encoding=data.draw(encodings(0)))
    site = data.draw(
        sites(True, live=True).filter(lambda site: site.tower == "vision" or site.kind == "image_features")
    )
    for ask in (lambda: vlm.run(prompt, [site]), lambda: vlm.run(prompt, edits=[mv.Edit(site, torch.clone)])):
        with pytest.raises(ValueError, match=f"the prompt holds no image, so there is no {site} to (read|edit)"):
            ask()
