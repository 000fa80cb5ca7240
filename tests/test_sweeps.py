"""Sweeps: every point has the answer of its own full pass, however little is run, and nothing finished is lost."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
import zoo
from torch import Tensor
from zoo.boxes import noise

import mechvlm as mv
from mechvlm import points as engine
from mechvlm.fingerprints import fingerprint
from mechvlm.points import answers, way_of
from mechvlm.reach import Reach, reach_of
from mechvlm.schedule import Cost, batches
from mechvlm.start import start_of, tried

METRIC = mv.logit_difference(30, 31)


def model(name: str = "llava", **settings: Any) -> tuple[mv.VLM, mv.Prompt, mv.Prompt]:
    """A tiny model of the zoo, and the same question about two pictures."""
    vlm = zoo.build(name, **settings)
    return vlm, zoo.ask(vlm, noise(0)), zoo.ask(vlm, noise(1))


def reach(vlm: mv.VLM, prompt: mv.Prompt, *edits: mv.Edit) -> Reach | None:
    """Where edits are taken to begin."""
    return reach_of(start_of(vlm, prompt, tried(edits)), edits)


def by_hooks(vlm: mv.VLM, prompt: mv.Prompt, layer: int, change: Any, part: str = "") -> Tensor:
    """The last logits while a hook of torch changes what enters a layer, or a part of it; no mechvlm in it."""
    path, number = vlm.arch.text.layers[layer]
    module = vlm.hf.get_submodule(f"{path}.{number}{part}")
    hook = module.register_forward_pre_hook(lambda _, args: (change(args[0].clone()), *args[1:]))
    with torch.no_grad():
        logits = vlm.hf(**prompt.encoding).logits[:, -1]
    hook.remove()
    return logits


def test_a_sweep_of_the_residual_stream_is_the_loop_over_hooks() -> None:
    vlm, real, null = model(dtype=torch.float64)
    sites = [mv.Site("resid_pre", layer) for layer in range(3)]
    source = vlm.run(null, read=sites)
    found = mv.sweep(
        vlm,
        real,
        lambda layer, position: [mv.patch(sites[layer], source[sites[layer]], [position])],
        METRIC,
        batch_size=4,
        layer=range(3),
        position=range(len(real)),
    )
    metric = vlm.metric(METRIC)
    for layer in range(3):
        for position in range(0, len(real), 3):

            def put(h: Tensor, layer: int = layer, position: int = position) -> Tensor:
                h[:, position] = source[sites[layer]][:, position]
                return h

            want = float(metric(by_hooks(vlm, real, layer, put))[0])
            assert abs(float(found[layer, position]) - want) < 1e-6, (layer, position)
    assert found.attrs["engine"].startswith("rerun from the edited layer; earlier positions reused; last layer")


def test_a_sweep_of_heads_at_the_last_position_is_the_loop_over_hooks() -> None:
    vlm, real, _ = model(dtype=torch.float64)
    width = vlm.shape.d_head["text"]

    def silence(layer: int, head: int) -> list[mv.Edit]:
        def nothing(z: Tensor) -> Tensor:
            z[:, -1, head] = 0
            return z

        return [mv.Edit(mv.Site("z", layer), nothing, positions=real.last)]

    found = mv.sweep(vlm, real, silence, METRIC, layer=range(3), head=range(4))
    for layer in range(3):
        for head in range(4):

            def cut(z: Tensor, head: int = head) -> Tensor:
                z[:, -1, head * width : (head + 1) * width] = 0
                return z

            want = float(vlm.metric(METRIC)(by_hooks(vlm, real, layer, cut, ".self_attn.o_proj"))[0])
            assert abs(float(found[layer, head]) - want) < 1e-6, (layer, head)


@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen3_vl", "mllama"])
@pytest.mark.parametrize("rows", [1, 5])
def test_whatever_is_changed_where_the_answer_is_that_of_a_full_pass(name: str, rows: int) -> None:
    """Functions that say nothing of their positions are found out by trying them."""
    vlm, real, _ = model(name)
    length = len(real)
    edits = [
        [mv.Edit(mv.Site("resid_pre", 1), lambda x: torch.cat([x[:, :-3], x[:, -3:] * 1.5], 1))],
        [mv.Edit(mv.Site("mlp_out", 0), lambda x: x * (torch.arange(x.shape[1])[None, :, None] > length // 2))],
        [mv.Edit(mv.Site("pattern", 0), lambda a: a.roll(1, 1))],
        [mv.steer("text.0.resid_post", torch.ones(vlm.shape.d_model["text"]), 0.5, [length - 2])],
        [mv.Edit(mv.Site("v", 0), lambda v: v.flip(2)), mv.scale_heads(1, [0], 0.5, cross=name == "mllama")],
        [mv.bias_attention(0, real.image, 1.0), mv.cut_attention(2, [length // 2], queries=real.last)],
    ]
    found = torch.empty(len(edits), vlm.shape.vocabulary)
    for which, logits in answers(way_of(vlm, real, edits, rows)):
        found[list(which)] = logits
    want = torch.cat([vlm.run(real, edits=one).logits for one in edits])
    torch.testing.assert_close(found, want, atol=1e-5, rtol=0)


def test_an_edit_begins_where_it_says_or_is_found_to() -> None:
    vlm, real, null = model()
    length = len(real)
    source = vlm.run(null, read=["text.1.resid_pre"])["text.1.resid_pre"]
    assert reach(vlm, real, mv.patch("text.1.resid_pre", source, [20, 25])) == Reach(1, 20)
    assert reach(vlm, real, mv.Edit("text.1.z", lambda z: torch.cat([z[:, :9], 0 * z[:, 9:]], 1))) == Reach(1, 9)
    assert reach(vlm, real, mv.cut_attention(0, [12, 15])) == Reach(0, 12)
    assert reach(vlm, real, mv.cut_attention(0, [12], queries=[4, 27])) == Reach(0, 27)
    assert reach(vlm, real, mv.ablate_heads(1, [0])) == Reach(1, 0)
    assert reach(vlm, real, mv.ablate_heads(2, [0])) == Reach(2, length - 1, last=True)
    assert reach(vlm, real, mv.Edit("text.2.pattern", lambda a: a.roll(1, 1))) == Reach(2, 0)
    assert reach(vlm, real, mv.patch("text.1.resid_post", source, [20])) == Reach(2, 20)
    assert reach(vlm, real, mv.patch("text.2.resid_post", source, [20])) == Reach(3, length - 1, last=True)
    assert reach(vlm, real, mv.Edit("image_features", lambda x: x * torch.arange(16)[:, None].ge(4))) == Reach(
        0, real.image[0]
    )
    assert reach(vlm, real, mv.scale_heads(0, [0], 0.0, tower="vision")) is None
    assert reach(vlm.with_edits([mv.Edit("logits", lambda x: 2 * x)]), real, mv.ablate_heads(1, [0])) is None


def test_a_run_of_the_rest_begins_before_all_tokens_that_see_each_other() -> None:
    for name in ("gemma3", "paligemma", "molmo2", "llava"):
        if zoo.there(name):
            continue
        vlm, real, _ = model(name)
        cuts = set(start_of(vlm, real, ()).cuts)
        free = set(range(len(real)))
        # The pattern of a full pass says who sees whom.
        seen = vlm.run(real, read=["text.0.pattern"])["text.0.pattern"][0].amax(0) > 0
        want = {cut for cut in free if not bool(seen[:cut, cut:].any())}
        assert cuts == want, name


def test_an_edit_that_reaches_back_further_than_it_says_is_found_out() -> None:
    """It is harmless on the run before, and is not once an earlier edit has changed what it is given."""
    vlm, real, _ = model()
    own = vlm.run(real, read=["text.1.z"])["text.1.z"]

    def treacherous(z: Tensor) -> Tensor:
        if not torch.allclose(z, own):
            z[:, 3] *= -9.0
        return z

    steer = [mv.steer("text.0.resid_post", torch.ones(32), factor, real.last) for factor in (0.0, 1.0, 2.0, 3.0)]
    edits = [[one, mv.Edit("text.1.z", treacherous)] for one in steer]
    assert reach(vlm, real, *edits[1]) == Reach(1, real.last[0])
    found = torch.empty(4, vlm.shape.vocabulary)
    for which, logits in answers(way_of(vlm, real, edits, 1)):
        found[list(which)] = logits
    want = torch.cat([vlm.run(real, edits=one).logits for one in edits])
    assert not torch.allclose(want[1], vlm.run(real, edits=steer[1:2]).logits[0], atol=1e-3)
    torch.testing.assert_close(found, want, atol=1e-5, rtol=0)


def compared(vlm: mv.VLM, prompt: mv.Prompt, points: Sequence[Sequence[mv.Edit]], rows: int | None = None) -> float:
    """How far the fast way of some points is from a full pass for each, and whether they differ at all."""
    found = torch.empty(len(points), vlm.shape.vocabulary, dtype=vlm.dtype)
    for which, logits in answers(way_of(vlm, prompt, points, rows)):
        found[list(which)] = logits
    want = torch.cat([vlm.run(prompt, edits=one).logits for one in points])
    assert float((want[0] - want[1]).abs().max()) > 1e-3
    return float((found - want).abs().max())


def own_edits() -> dict[str, list[mv.Edit]]:
    """Edits of the model's own, at sites that no point edits."""

    def rows_by_number(pattern: Tensor) -> Tensor:
        pattern[:, :, 5:12] = 0
        return pattern

    def two_rows(rows: Tensor) -> Tensor:
        return torch.cat([rows[:, :, :1] * 0.1, rows[:, :, 1:]], 2)

    return {
        "heads": [mv.ablate_heads(1, [0])],
        "values centred over positions": [mv.Edit("text.0.v", lambda v: v - v.mean(1, keepdim=True))],
        "keys of one position": [mv.Edit("text.1.k", lambda k: k.index_fill(1, torch.tensor([4]), 0.5))],
        "a whole map": [mv.Edit("text.1.pattern", rows_by_number)],
        "two rows": [mv.Edit("text.1.pattern", two_rows, rows=[20, 29])],
        "a factor": [mv.scale_attention(1, [5, 6], 2.0)],
        "features": [mv.Edit("image_features", lambda x: x * 1.5)],
        "a part and a bias": [mv.steer("text.1.mlp_out", torch.ones(32), 0.2), mv.bias_attention(2, [4], 1.0)],
    }


@pytest.mark.parametrize("name", own_edits())
def test_a_model_with_edits_of_its_own_is_swept_as_it_is(name: str) -> None:
    vlm, real, _ = model()
    points = [[mv.steer("text.0.resid_post", torch.ones(32), factor, [20])] for factor in (1.0, 2.0, 3.0, 4.0)]
    assert compared(vlm.with_edits(own_edits()[name]), real, points, 2) < 1e-5


def test_edits_of_the_models_own_that_draw_new_numbers_are_full_passes() -> None:
    vlm, real, _ = model()
    noisy = vlm.with_edits([mv.Edit("text.0.resid_post", lambda x: x + 0.1 * torch.randn(x.shape))])
    way = way_of(noisy, real, [[mv.ablate_heads(1, [head])] for head in range(4)])
    assert way.how == (
        "a full pass for each point, since edits of the model's own do not do the same each time, or not to each part"
    )


def test_points_that_say_less_than_they_do_are_found_out() -> None:
    vlm, real, _ = model()

    def more(v: Tensor, site: int = 0) -> Tensor:
        v[:, [7, 20]] *= 1.0 + site
        return v

    def first_of_two(rows: Tensor) -> Tensor:
        return torch.cat([rows[:, :, :1] * 0.1, rows[:, :, 1:]], 2)

    values = [[mv.Edit("text.0.v", lambda v, by=by: more(v, by), positions=[20])] for by in (1, 2, 3, 4)]
    assert compared(vlm, real, values, 1) < 1e-5
    rows = [[mv.Edit("text.2.pattern", first_of_two, rows=[row, 29])] for row in (18, 20, 22, 24)]
    rows[0] = [mv.ablate_heads(2, [0])]
    assert compared(vlm, real, rows) < 1e-5
    twice = [
        [mv.Edit("text.1.resid_pre", torch.abs), mv.Edit("text.1.resid_pre", lambda x, by=by: x.sqrt() * by)]
        for by in (1.0, 2.0, 3.0, 4.0)
    ]
    assert compared(vlm, real, twice) < 1e-5


def test_cuts_of_cross_attention_are_where_they_say() -> None:
    vlm, real, _ = model("mllama")
    keys = list(range(8))
    cuts = [[mv.cut_attention(1, keys, queries=[query], cross=True)] for query in (3, 5, 7, len(real) - 1)]
    assert compared(vlm, real, cuts, 2) < 1e-5
    rows = [[mv.Edit("text.1.cross_pattern", lambda a: a * 0.5, rows=[query])] for query in (3, 5, 7, 9)]
    assert compared(vlm, real, rows, 1) < 1e-5


def test_a_prompt_without_an_image_is_swept_by_layers_that_run() -> None:
    for name in ("llava", "mllama"):
        vlm = zoo.build(name)
        words = vlm.prompt(text="is there a dog ?")
        points = [[mv.ablate_heads(0, [head])] for head in range(4)]
        assert compared(vlm, words, points) < 1e-5


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("paligemma", "earlier positions not reused, since all words see each other"),
        ("gemma3", "image tokens that see each other rerun together"),
        ("qwen3_vl", "rerun from the edited layer; earlier positions reused; last layer for the last position"),
    ],
)
def test_a_sweep_says_how_it_was_run(name: str, words: str) -> None:
    vlm, real, _ = model(name)
    steer = torch.ones(vlm.shape.d_model["text"])
    point = lambda position: [mv.steer("text.1.resid_pre", steer, 1.0, [position])]  # noqa: E731
    found = mv.sweep(vlm, real, point, METRIC, batch_size=2, position=range(len(real) - 4, len(real)))
    assert words in found.attrs["engine"]
    plain = mv.sweep(vlm, real, point, METRIC, fast=False, position=range(len(real) - 4, len(real)))
    assert plain.attrs["engine"] == "a full pass for each point, since it was asked for"
    np.testing.assert_allclose(found, plain, atol=1e-5)


def test_layers_that_answer_otherwise_by_themselves_are_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm, real, _ = model()
    honest = engine.rerun
    monkeypatch.setattr(engine, "rerun", lambda *given: honest(*given) + 0.1)
    way = way_of(vlm, real, [[mv.ablate_heads(0, [head])] for head in range(4)])
    assert way.how == (
        "a full pass for each point, since layers called by themselves answer otherwise than the model, by 0.1"
    )
    assert way.full == [0, 1, 2, 3]


def test_batches_are_halved_when_memory_does_not_suffice(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm, real, _ = model()
    honest, sizes = engine.rerun, list[int]()

    def short(start: Any, rows: Sequence, *more: Any) -> Tensor:
        sizes.append(len(rows))
        if len(rows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return honest(start, rows, *more)

    point = lambda layer, head: [mv.ablate_heads(layer, [head])]  # noqa: E731
    want = mv.sweep(vlm, real, point, METRIC, layer=range(3), head=range(4))
    monkeypatch.setattr(engine, "rerun", short)
    found = mv.sweep(vlm, real, point, METRIC, layer=range(3), head=range(4))
    np.testing.assert_allclose(found, want, atol=1e-5)
    assert max(sizes) > 2


def test_one_row_without_memory_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm, real, _ = model()

    def never(*_: Any, **__: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(mv.VLM, "run", never)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        mv.sweep(vlm, real, lambda head: [mv.ablate_heads(0, [head])], METRIC, fast=False, head=range(4))


def test_points_that_begin_near_each_other_run_together() -> None:
    cost = Cost(batch=10, most=10**6)
    points = [Reach(0, 90), Reach(3, 91), Reach(0, 10), Reach(3, 99, last=True), Reach(2, 99)]
    found = batches(points, length=100, layers=4, cost=cost)
    assert sorted(sorted(one.points) for one in found) == [[0, 1], [2], [3, 4]]
    assert all(one.reaches == tuple(points[point] for point in one.points) for one in found)
    assert max(len(one.points) for one in batches([Reach(0, 5)] * 7, 10, 4, Cost(10**9, 10**9, rows=3))) == 3
    assert max(len(one.points) for one in batches([Reach(0, 5)] * 7, 10, 4, Cost(10**9, 10))) == 2


def test_a_sweep_goes_on_from_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm, real, _ = model()
    honest, ran = engine.rerun, list[int]()

    def counted(start: Any, rows: Sequence, *more: Any) -> Tensor:
        ran.append(len(rows))
        return honest(start, rows, *more)

    def point(layer: int, head: int) -> list[mv.Edit]:
        return [mv.ablate_heads(layer, [head])]

    monkeypatch.setattr(engine, "rerun", counted)
    grid: dict[str, Any] = {"layer": range(3), "head": range(4)}
    whole = mv.sweep(vlm, real, point, METRIC, 3, tmp_path, **grid)
    files = sorted(tmp_path.iterdir())
    files[1].unlink()
    ran.clear()
    again = mv.sweep(vlm, real, point, METRIC, 3, tmp_path, **grid)
    assert sum(ran) <= 3 + 1  # one batch, and the trial of the start
    xr.testing.assert_allclose(again, whole, atol=1e-6)
    ran.clear()
    read = mv.sweep(vlm, real, point, METRIC, 3, tmp_path, **grid)
    assert not ran and read.attrs["engine"] == f"read from {tmp_path.name}"
    xr.testing.assert_equal(read, again)


def test_a_folder_of_another_sweep_is_refused(tmp_path: Path) -> None:
    vlm, real, null = model()
    factor = 0.5

    def point(head: int) -> list[mv.Edit]:
        return [mv.scale_heads(0, [head], factor)]

    mv.sweep(vlm, real, point, METRIC, out=tmp_path, head=range(4))
    others: list[Any] = [
        lambda: mv.sweep(vlm, null, point, METRIC, out=tmp_path, head=range(4)),
        lambda: mv.sweep(vlm, real, point, mv.logit_difference(30, 32), out=tmp_path, head=range(4)),
        lambda: mv.sweep(vlm, real, point, METRIC, out=tmp_path, head=range(3)),
        lambda: mv.sweep(vlm.with_edits([mv.ablate_heads(1, [0])]), real, point, METRIC, out=tmp_path, head=range(4)),
        lambda: mv.sweep(zoo.build("llava", seed=1), real, point, METRIC, out=tmp_path, head=range(4)),
    ]
    for other in others:
        with pytest.raises(ValueError, match="holds another sweep"):
            other()
    factor = 0.25
    with pytest.raises(ValueError, match="holds another sweep"):
        mv.sweep(vlm, real, point, METRIC, out=tmp_path, head=range(4))


class Factor:
    """A callable object that holds a number."""

    def __init__(self, by: float) -> None:
        self.by = by

    def __call__(self, x: Tensor) -> Tensor:
        """The product."""
        return x * self.by

    def times(self, x: Tensor) -> Tensor:
        """The same, bound."""
        return x * self.by


HELD = [1.0]


def test_a_fingerprint_knows_objects_parts_and_names() -> None:
    assert fingerprint(Factor(2.0)) == fingerprint(Factor(2.0)) != fingerprint(Factor(3.0))
    assert fingerprint(Factor(2.0).times) == fingerprint(Factor(2.0).times) != fingerprint(Factor(3.0).times)
    assert fingerprint(partial(torch.mul, other=2)) != fingerprint(partial(torch.mul, other=3))
    assert fingerprint({"b", "a"}) == fingerprint({"a", "b"}) != fingerprint({"a"})
    by_name = lambda x: [x * one for one in HELD]  # noqa: E731
    before = fingerprint(by_name)
    HELD[0] = 2.0
    assert fingerprint(by_name) != before
    dictionary = torch.nn.Linear(4, 4)
    use = lambda x: dictionary(x) + 1  # noqa: E731
    before = fingerprint(use)
    with torch.no_grad():
        dictionary.weight[0, 0] += 1
    assert fingerprint(use) != before
    one, other = torch.zeros(1, 64), torch.zeros(1, 64)
    other[0, 32] = 1.0
    assert fingerprint(mv.kl_divergence(one)) != fingerprint(mv.kl_divergence(other))


class Settings:
    """A class that holds a number."""

    token = 11


def test_a_fingerprint_knows_what_a_class_holds() -> None:
    of_class = lambda logits: logits[:, Settings.token]  # noqa: E731
    before = fingerprint(of_class)
    Settings.token = 12
    assert fingerprint(of_class) != before


def test_a_metric_may_say_whether() -> None:
    vlm, real, null = model()
    likely = lambda logits: logits.argmax(-1) == int(vlm.run(real).logits.argmax())  # noqa: E731
    found = mv.patch_spans(vlm, real, null, likely, spans={"all": range(len(real))}, layers=[0])
    assert float(found.metric[0, 0]) == 1.0


def test_a_fingerprint_is_the_same_in_every_process() -> None:
    said = "from mechvlm.fingerprints import fingerprint; print(fingerprint(lambda x: x in {'a', 'b', 'c'}))"
    prints = set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        prints.add(subprocess.check_output([sys.executable, "-c", said], env=environment))
    assert len(prints) == 1


def test_weights_that_changed_are_another_sweep(tmp_path: Path) -> None:
    vlm, real, _ = model()
    point = lambda head: [mv.ablate_heads(0, [head])]  # noqa: E731
    mv.sweep(vlm, real, point, METRIC, out=tmp_path, head=range(4))
    with torch.no_grad():
        next(reversed(list(vlm.hf.parameters())))[-1] *= 1.5
    with pytest.raises(ValueError, match="holds another sweep"):
        mv.sweep(vlm, real, point, METRIC, out=tmp_path, head=range(4))


def test_a_file_that_is_no_batch_is_refused(tmp_path: Path) -> None:
    vlm, real, _ = model()
    (tmp_path / "points-x.nc").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"points-x.nc' is no finished part of a sweep; take it out of the folder, and"
    ):
        mv.sweep(vlm, real, lambda head: [mv.ablate_heads(0, [head])], METRIC, out=tmp_path, head=range(4))


def test_a_fingerprint_knows_what_a_function_holds_and_does() -> None:
    one, other = torch.zeros(3), torch.ones(3)
    made = [lambda x, held=held: x + held for held in (one, one.clone(), other)]
    assert fingerprint(made[0]) == fingerprint(made[1]) != fingerprint(made[2])
    assert fingerprint(lambda x: x * 2) != fingerprint(lambda x: x * 3)
    assert fingerprint(lambda x: x.abs()) != fingerprint(lambda x: x.exp())
    assert fingerprint(mv.patch("text.0.z", torch.zeros(1, 2, 3, 4))) != fingerprint(
        mv.patch("text.0.z", torch.ones(1, 2, 3, 4))
    )


SWEEP = """
import tiny, torch
import mechvlm as mv

def found(folder):
    vlm = tiny.vlm()
    real, metric = vlm.prompt(tiny.picture(), "is there a cat ?"), mv.logit_difference(30, 31)
    return mv.sweep(vlm, real, lambda layer, head: [mv.ablate_heads(layer, [head])], metric, 2, folder,
                    layer=range(3), head=range(4))
"""
COUNTED = """
import sys, time
import numpy as np
from mechvlm import points as engine

torch.set_num_threads(1)
honest, ran = engine.rerun, []

def slow(start, rows, *more):
    ran.append(len(rows))
    time.sleep(float(sys.argv[2]))
    return honest(start, rows, *more)

engine.rerun = slow
np.savez(sys.argv[1] + ".npz", found=found(sys.argv[1]).values, ran=ran)
"""


def test_a_sweep_that_is_killed_goes_on_and_repeats_at_most_one_batch(tmp_path: Path) -> None:
    """It goes on in a process of its own, as the one that was killed was."""
    script, cut = tmp_path / "script.py", tmp_path / "cut"
    script.write_text(SWEEP + COUNTED)
    path = os.pathsep.join([str(Path(mv.__file__).parents[1]), str(Path(__file__).parent)])

    def started(pause: float) -> subprocess.Popen:
        words = [sys.executable, str(script), str(cut), str(pause)]
        return subprocess.Popen(words, env={**os.environ, "PYTHONPATH": path})

    killed = started(0.4)
    deadline = time.monotonic() + 120
    moment = 1 + int(np.random.default_rng().integers(3))
    while len(list(cut.glob("*.nc"))) < moment and time.monotonic() < deadline:
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait(60)
    kept = sum(xr.open_dataset(shard).sizes["point"] for shard in cut.glob("*.nc"))
    assert 0 < kept < 12
    assert started(0.0).wait(120) == 0
    again, whole = np.load(tmp_path / "cut.npz"), dict[str, Any]()
    exec(compile(SWEEP, str(script), "exec"), whole)
    np.testing.assert_allclose(again["found"], whole["found"](None), atol=1e-6)
    assert again["ran"].sum() - 1 == 12 - kept  # the trial of the start aside, only what had not been finished
