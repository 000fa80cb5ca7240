"""Sweeps: every point has the answer of its own full pass, however little is run, and nothing finished is lost."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
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
from mechvlm.experiments.shards import fingerprint
from mechvlm.points import answers, way_of
from mechvlm.reach import Reach, reach_of, tried
from mechvlm.schedule import Cost, batches
from mechvlm.start import start_of

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
import sys, time
import tiny, torch
import numpy as np
import mechvlm as mv
from mechvlm import points as engine
torch.set_num_threads(1)
vlm = tiny.vlm()
real = vlm.prompt(tiny.picture(), "is there a cat ?")
honest = engine.rerun
def slow(start, rows, *more):
    with open(sys.argv[2], "a") as ran:
        ran.write("".join(f"{len(rows)} "))
    time.sleep(float(sys.argv[4]))
    return honest(start, rows, *more)
engine.rerun = slow
found = mv.sweep(vlm, real, lambda layer, head: [mv.ablate_heads(layer, [head])], mv.logit_difference(30, 31),
                 2, sys.argv[1], layer=range(3), head=range(4))
np.save(sys.argv[3], found.values)
"""


def test_a_sweep_that_is_killed_goes_on_and_repeats_at_most_one_batch(tmp_path: Path) -> None:
    script, ran = tmp_path / "script.py", tmp_path / "ran"
    script.write_text(textwrap.dedent(SWEEP))
    path = os.pathsep.join([str(Path(mv.__file__).parents[1]), str(Path(__file__).parent)])
    environment = {**os.environ, "PYTHONPATH": path}

    def started(folder: str, pause: float) -> subprocess.Popen:
        given = [str(tmp_path / folder), str(ran), str(tmp_path / f"{folder}.npy"), str(pause)]
        return subprocess.Popen([sys.executable, str(script), *given], env=environment)

    assert started("whole", 0.0).wait(120) == 0
    killed = started("cut", 0.4)
    deadline = time.monotonic() + 120
    moment = 1 + int(np.random.default_rng().integers(3))
    while len(list((tmp_path / "cut").glob("*.nc"))) < moment and time.monotonic() < deadline:
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait(60)
    kept = sum(xr.open_dataset(shard).sizes["point"] for shard in (tmp_path / "cut").glob("*.nc"))
    assert 0 < kept < 12
    ran.write_text("")
    assert started("cut", 0.0).wait(120) == 0
    np.testing.assert_allclose(np.load(tmp_path / "cut.npy"), np.load(tmp_path / "whole.npy"), atol=1e-6)
    rerun = [int(rows) for rows in ran.read_text().split()]
    assert sum(rerun) - 1 == 12 - kept  # the trial of the start aside, only what had not been finished
