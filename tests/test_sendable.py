"""What users' functions may name and hold where they run elsewhere; the rest is refused in words, before it is sent."""

import functools
import io
import weakref
from collections.abc import Callable
from dataclasses import InitVar, dataclass, field, replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import loopback
import numpy as np
import pytest
import tiny
import torch
import xarray as xr
import zoo
from torch import Tensor

import mechvlm as mv
from mechvlm import passes
from mechvlm.fingerprints import fingerprint
from mechvlm.passes import pass_of
from mechvlm.places import packed
from mechvlm.shipping import Courier

STREAM = mv.Site("resid_post", 1)
PATTERN = mv.Site("pattern", 1)


@cache
def local() -> mv.VLM:
    return mv.VLM(tiny.model(), tiny.processor(), "tiny", remote="local")


def question() -> mv.Prompt:
    return local().prompt(tiny.picture(), "is there")


def read(function: Callable[[Tensor], Any]) -> Any:
    return local().run(question(), read={STREAM: function})[STREAM]


def imports(x: Tensor) -> Tensor:
    import scipy.stats

    return x * scipy.stats.norm.cdf(0)


def opens(x: Tensor) -> Tensor:
    open("kept")  # noqa: PTH123, SIM115
    return x


def holding(thing: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: x if thing is None else x + 0


def doubled(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    @functools.wraps(function)
    def twice(x: Tensor) -> Tensor:
        return 2 * function(x)

    return twice


@doubled
def decorated(x: Tensor) -> Tensor:
    return x


def of_file(later: str | None) -> Callable[[Tensor], Tensor]:
    """A function of a file that has been changed since it was read, or is gone."""
    held: dict[str, Any] = {"__name__": "changing"}
    file = Path(mkdtemp()) / "changing.py"
    file.write_text("def mean(x):\n    return x.mean()\n")
    exec(compile(file.read_text(), str(file), "exec"), held)
    assert read(held["mean"]).ndim == 0
    file.write_text(later or "")
    if later is None:
        file.unlink()
        file.parent.rmdir()
    found: Callable[[Tensor], Tensor] = held["mean"]
    return found


def whole_package(x: Tensor) -> Tensor:
    return x if mv else x


def flush_left() -> Callable[[Tensor], Tensor]:
    def inner(x: Tensor) -> Tensor:
        return x * len("""
to the margin
""")

    return inner


def named_module(x: Tensor) -> Tensor:
    return x if functools is None else x + 0


halved = mv.Edit(PATTERN, lambda rows: rows * 0.5, rows="each")
CASES = [
    (
        "the module mechvlm is not sent as a whole to where the model runs; write `from mechvlm import ...`, and "
        "functions and classes that are named go along.",
        lambda: read(whole_package),
    ),
    (
        "the function mean does something else here than its lines say in the file, which are what is sent; import "
        "that file anew.",
        lambda: read(of_file("def mean(x):\n    return 1000 * x.mean()\n")),
    ),
    (
        "the function mean is known by its compiled code alone, which another Python may not run; write it into a file "
        "or into a cell of a notebook.",
        lambda: read(of_file(None)),
    ),
    (
        "the lines of the function flush_left.<locals>.inner cannot be sent by themselves (unexpected indent); write "
        "it at the left margin of a file, without nonlocal, and let its arguments hold what it needs.",
        lambda: read(flush_left()),
    ),
    (
        "the function decorated is wrapped by a decorator, which is lost on the way to where the model runs, so that "
        "another function would run there; write what it does into the function.",
        lambda: read(decorated),
    ),
    (
        "the module functools cannot be used where the model runs, since servers have torch, math, numpy, einops, "
        "collections and little else; use torch, or work out before the run what the function needs, and let it hold "
        "the result.",
        lambda: read(named_module),
    ),
    (
        "attention that an edit changes cannot be sent from where the model runs without being made; read rows(), "
        "mass() or the like instead of lazy().",
        lambda: local().run(question(), read={PATTERN: mv.lazy()}, edits=[halved]),
    ),
    (
        "attention that an edit changes cannot be sent from where the model runs without being made; read rows(), "
        "mass() or the like instead of lazy().",
        lambda: packed(replace(local().run(question(), read={PATTERN: mv.lazy()})[PATTERN], change=lambda *_: _[1])),
    ),
    (
        "what was read is builtins.object, which cannot be sent from where the model runs; return tensors, numbers, "
        "texts, or lists, tuples and mappings of them.",
        lambda: packed(object()),
    ),
    (
        "remote=3 says no place; give True for NDIF, 'local', or a server's address.",
        lambda: mv.load("demo", remote=3),  # type: ignore[arg-type]
    ),
    (
        "remote='ndif' is no place; give True for NDIF, 'http://...' for a server of your own, or 'local' to try here "
        "what would be sent.",
        lambda: mv.load("demo", remote="ndif"),
    ),
    (
        "a model in memory runs where it is; for one that runs elsewhere write mv.load(name, remote=True).",
        lambda: mv.VLM(tiny.model(), remote=True),
    ),
    (
        "dtype='bfloat16' is for the server to decide, which holds the weights; leave it out.",
        lambda: mv.load("demo", dtype="bfloat16", remote="http://127.0.0.1:9"),
    ),
    (
        "lazy(3) holds no function; write mv.lazy(), or a function of the attention.",
        lambda: mv.lazy(3),  # type: ignore[arg-type]
    ),
    (
        "the module scipy.stats cannot be used where the model runs, since servers have torch, math, numpy, einops, "
        "collections and little else; use torch, or work out before the run what the function needs, and let it hold "
        "the result.",
        lambda: read(imports),
    ),
    (
        "the function opens calls open(), which servers do not let it; do that here, with what the function returns.",
        lambda: read(opens),
    ),
    (
        "DataArray is not sent to where the model runs, and a function that is to run there holds one; let it hold "
        "its numbers, torch.as_tensor(x.values).",
        lambda: read(holding(xr.DataArray([1.0]))),
    ),
    (
        "ImageMap is not sent to where the model runs, and a function that is to run there holds one; let it hold "
        "the positions that are wanted.",
        lambda: read(holding(question().images[0])),
    ),
]
"""Tried by test_errors.py."""


def test_a_prompt_goes_along_as_its_words_and_positions() -> None:
    """And not as its picture: the payload does not grow by what the picture takes."""
    real = question()
    here = mv.VLM(local().hf, local().processor, "tiny")

    def blind(pattern: Tensor) -> Tensor:
        pattern[..., real.image] = 0
        return pattern * len(real) / len(real.tokens) + 0 * len(real.spans["image"])

    edits = [mv.Edit(PATTERN, blind)]
    assert local().run(real, edits=edits).logits.equal(here.run(real, edits=edits).logits)
    assert not here.run(real, edits=edits).logits.equal(here.run(real).logits)


def test_a_cached_function_is_sent_without_its_cache() -> None:
    @functools.lru_cache
    def half(number: int) -> float:
        return number / 2

    assert read(lambda x: x[0, 0, 0] * 0 + half(3)) == 1.5


def test_a_probe_goes_along_with_its_weights() -> None:
    probe = torch.nn.Linear(local().shape.d_model["text"], 2)
    here = mv.VLM(local().hf, local().processor, "tiny").run(question(), read=[STREAM])[STREAM]
    with torch.no_grad():
        assert read(probe).equal(probe(here))


def test_a_row_of_an_activation_comes_back_without_the_rest_of_it() -> None:
    """And what is sent and brought back is counted, a row a job."""
    vlm = mv.VLM(local().hf, local().processor, "tiny", remote="local")
    for function in (lambda x: x, lambda x: x[:, -1]):
        vlm.run(question(), read={STREAM: function})
    whole, row = mv.remote.traffic(vlm).back
    assert whole - row > 2 * (len(question()) - 1) * vlm.shape.d_model["text"]  # random floats are not made smaller
    assert mv.remote.traffic(mv.VLM(local().hf)).empty


@zoo.second_environment
@pytest.mark.filterwarnings("ignore")
def test_what_functions_name_goes_along_to_a_server_and_a_plain_trace_is_a_job(server: loopback.Server) -> None:
    here = mv.VLM(local().hf, local().processor, "tiny")
    there = mv.load(server.deploy(here.hf, here.processor), remote=server.url)
    real, probe = question(), torch.nn.Linear(here.shape.d_model["text"], 2)
    seen, held = here.run(real, read=[STREAM]), functools.lru_cache(lambda number: number / 2)

    def mixed(x: Tensor) -> Tensor:
        x[:, real.image] += held(3) * seen[STREAM][:, real.image] + probe(x).sum()
        return x

    edits = [mv.Edit(STREAM, mixed)]
    assert there.run(real, edits=edits).logits.equal(here.run(real, edits=edits).logits)
    ((sent, back),) = mv.remote.traffic(there).values
    assert 0 < back < sent < 100_000
    with there.trace(real):
        stream = there.model.model.language_model.layers[1].output.save()
    assert stream.equal(seen[STREAM])
    with pytest.raises(ValueError, match="its weights are elsewhere; check it where they are"):
        there.check(real)


def test_prompts_are_held_as_long_as_their_batches_are_known_by_their_place_in_memory() -> None:
    prompt, held = question(), dict[tuple, Any]()
    seen = weakref.ref(prompt)
    pass_of(local(), held, prompt)
    del prompt
    assert seen() is not None


def test_many_pictures_are_sent_in_several_jobs_and_many_runs_of_one_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm, here = (mv.VLM(local().hf, local().processor, "tiny", remote=how) for how in ("local", False))
    asked = [{"prompt": vlm.prompt(tiny.picture(number), "is there")} for number in (0, 1, 2)]
    monkeypatch.setattr(passes, "LARGEST", 2 * sum(x.nbytes for x in question().encoding.values()))
    wanted = [run.logits for run in here.runs(asked)]
    assert all(one.logits.equal(other) for one, other in zip(vlm.runs(asked), wanted, strict=True))
    assert len(mv.remote.traffic(vlm)) == 2
    assert len([*vlm.runs(asked[:1] * 5)]) == 5 and len(mv.remote.traffic(vlm)) == 3


def test_the_hub_s_token_is_not_sent() -> None:
    vlm = mv.load("demo", remote="http://127.0.0.1:9", token="hf_secret", cache_dir="a_folder")
    held = io.BytesIO()
    Courier(held).dump(vlm.model)
    assert b"language_model" in held.getvalue()
    assert not any(word in held.getvalue() for word in (b"hf_secret", b"a_folder"))


def test_what_a_class_of_the_user_s_does_is_part_of_what_its_values_are() -> None:
    class Base:
        def factor(self) -> float:
            return 2.0

    def scaled(factor: float, base: type = Base) -> Any:
        class Scaled(base):
            def __call__(self, x: Tensor) -> Tensor:
                return x * factor

            half = property(lambda _: factor / 2)

        return Scaled()

    class Other(Base):
        def factor(self) -> float:
            return 3.0

    Other.__qualname__ = Base.__qualname__
    prints = {fingerprint(scaled(*given)) for given in ((2.0,), (2.0,), (3.0,), (2.0, Other))}
    assert len(prints) == 3


@dataclass(order=True)
class Weighted:
    """A field that is not compared, one that is made, and one that is only handed over."""

    weight: float
    note: str = field(default="", compare=False)
    seen: list = field(init=False, default_factory=list)
    times: InitVar[float] = 1.0

    def __post_init__(self, times: float) -> None:
        self.weight *= times


def by_weight(x: Tensor) -> float:
    heaviest = max(Weighted(1.0, times=3.0), Weighted(2.0))
    return float(x) + heaviest.weight + 10 * len(heaviest.seen) + 100 * (Weighted(1.0, "a") == Weighted(1.0, "b"))


@dataclass(frozen=True, slots=True)
class Fixed:
    factor: float


@dataclass(slots=True)
class Loose:
    factor: float


def test_values_with_slots_go_along() -> None:
    fixed, loose = Fixed(2.0), Loose(3.0)
    assert read(lambda x: len(x) * fixed.factor + Fixed(4.0).factor + 10 * loose.factor + Loose(5.0).factor) == 41.0


def test_dataclasses_are_compared_and_made_as_they_are_here() -> None:
    assert read(lambda x: by_weight(0 * x[0, 0, 0])) == by_weight(torch.zeros(1)) == 103.0


def test_a_function_under_no_grad_passes_no_gradient_elsewhere_either() -> None:
    @torch.no_grad()
    def steady(x: Tensor) -> Tensor:
        return torch.relu(x)

    found = [
        vlm.run(
            question(),
            read=["text.0.resid_post"],
            edits=[mv.Edit(STREAM, lambda x: x + steady(x))],
            grad_of=mv.logit_difference("yes", "no"),
        ).grad["text.0.resid_post"]
        for vlm in (local(), mv.VLM(local().hf, local().processor, "tiny"))
    ]
    assert found[0].equal(found[1])


def test_slices_and_numpy_s_numbers_come_back() -> None:
    assert read(lambda x: [slice(0, len(x)), np.float64(0.5)]) == [slice(0, 1), 0.5]
