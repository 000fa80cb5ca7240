"""Units of work in a folder: each is done once, whoever does it, and all of them find what one process finds."""

import errno
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import xarray as xr
import zoo

import mechvlm as mv
from mechvlm import evaluate, units
from mechvlm.fingerprints import weights_print
from mechvlm.finished import Folder
from mechvlm.places import There
from mechvlm.placing import place_of
from mechvlm.processes import Process, alone, here, launched, seated

YES = mv.logit_difference("yes", "no")
ASKED = ("is there a red cat ?", "is there a dog in the image ?", "is there a red dog ?")


@cache
def vlm() -> mv.VLM:
    return tiny.vlm()


@cache
def prompts() -> list[mv.Prompt]:
    """Five prompts of two lengths."""
    return [vlm().prompt(tiny.picture(at), ASKED[at % 2]) for at in range(5)]


def same(found: Any, other: Any) -> None:
    """Assert that two results hold the same numbers, to the last bit."""
    if isinstance(found, dict):
        found, other = list(found.values()), list(other.values())
    if isinstance(found, list):
        for one, two in zip(found, other, strict=True):
            np.testing.assert_array_equal(one, two, strict=True)
        return
    xr.testing.assert_equal(found, other)


def drawn(prompt: mv.Prompt) -> dict[str, list[int]]:
    return {"few": prompt.image[:2], "more": prompt.image[3:6]}


def pairs() -> list[mv.MinimalPair]:
    return [mv.MinimalPair(tiny.picture(at), tiny.picture(at + 5), ASKED[0], "yes", "no") for at in range(2)]


EXPERIMENTS: dict[str, Callable[[Any], Any]] = {
    "attention_profile": lambda out: mv.attention_profile(vlm(), prompts(), "text", out=out),
    "generated": lambda out: mv.attention_profile(vlm(), prompts()[:2], "generated", max_new_tokens=3, out=out),
    "layer_profile": lambda out: mv.layer_profile(vlm(), prompts(), out=out),
    "mean_activations": lambda out: mv.mean_activations(vlm(), prompts(), out=out),
    "mean_features": lambda out: mv.mean_features(vlm(), prompts(), out=out),
    "collapse": lambda out: mv.language_prior_collapse(vlm(), prompts()[:3], ["black", "no_image"], out=out),
    "gradient_by_layer": lambda out: mv.gradient_by_layer(vlm(), prompts()[:3], YES, between=(0, 1), out=out),
    "ablate_each": lambda out: mv.ablate_each(vlm(), prompts()[:2], YES, "mlp", out=out),
    "ablate_image_tokens": lambda out: mv.ablate_image_tokens(vlm(), prompts()[:2], YES, drawn, controls=1, out=out),
    "find_heads": lambda out: mv.find_heads(
        vlm(), prompts()[:2], YES, 1, [(0, 0), (1, 1)], held_out=prompts()[2:4], out=out
    ),
    "information_flow": lambda out: mv.information_flow(
        vlm(), prompts()[:2], edges=["image->last"], window=1, controls=0, out=out
    ),
    "patch_pairs": lambda out: mv.patch_pairs(
        vlm(), pairs(), "positions", only_right=False, controls=0, positions=[5, 20], layers=[1], out=out
    ),
}
"""Experiments on several prompts, with a folder or without."""
QUICK = ("attention_profile", "mean_features", "ablate_each")
HOLDING = """
import sys, time, filelock
lock = filelock.FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of few prompts, so that a handful makes several units."""
    monkeypatch.setattr("mechvlm.experiments.means.SUMMED", 2)
    monkeypatch.setattr("mechvlm.experiments.layer_profile.AT_ONCE", 50)
    monkeypatch.setattr("mechvlm.experiments.looks.rows_for", lambda _: 2)


class Stopped(Exception):
    """What stops a process in these tests."""


def stopped_at(unit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop where a unit is put in place, counted from 0 over all that is made."""
    keep, made = Folder.keep, list[int]()

    def stopping(self: Folder, number: int, found: xr.Dataset) -> None:
        if self.units == "part":
            made.append(number)
            if len(made) > unit:
                raise Stopped
        keep(self, number, found)

    monkeypatch.setattr(Folder, "keep", stopping)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else zoo.second_environment) for name in EXPERIMENTS]
)
def test_what_one_process_began_and_another_ended_is_what_one_finds_alone(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = EXPERIMENTS[name](None)
    with monkeypatch.context() as patched, seated(Process(1, 2)), pytest.raises(Stopped):
        stopped_at(1, patched)
        EXPERIMENTS[name](tmp_path)
    with seated(Process(0, 2)):
        same(EXPERIMENTS[name](tmp_path), whole)
    same(EXPERIMENTS[name](tmp_path), whole)
    assert not list(tmp_path.rglob("*.taken"))


def test_a_unit_that_another_has_taken_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, theirs = Folder(tmp_path, "same", "part"), Folder(tmp_path, "same", "part")
    order, waited = list[int](), list[float]()

    def left() -> list[int]:
        return [at for at in range(4) if not list(tmp_path.glob(f"part-{at:06d}-*.nc"))]

    held = theirs.claim("1")
    assert held.__enter__()

    def pause(seconds: float) -> None:
        waited.append(seconds)
        theirs.keep(1, xr.Dataset())
        held.__exit__(None, None, None)

    monkeypatch.setattr(units.time, "sleep", pause)
    with seated(Process(1, 2)):
        for number in units.taken(mine, 4, left):
            order.append(number)
            mine.keep(number, xr.Dataset())
    assert (order, len(waited)) == ([2, 3, 0], 1)  # each process begins at its own place


def test_a_claim_ends_with_the_process_that_holds_it(tmp_path: Path) -> None:
    folder = Folder(tmp_path, "same", "part")
    words = [sys.executable, "-c", HOLDING, str(tmp_path / "part-0.taken")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with folder.claim("0") as mine:
            assert not mine
        other.kill()
    with folder.claim("0") as mine:
        assert mine
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["ENOSYS", "ENOLCK", "EOPNOTSUPP"])
def test_where_there_are_no_locks_units_are_done_all_the_same(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lockless(*_: object) -> None:
        raise OSError(vars(errno)[kind], "no locks")

    monkeypatch.setattr("fcntl.flock", lockless)
    folder = Folder(tmp_path, "same", "part")
    folder.folder.joinpath("part-1.taken").write_text("12345\nelsewhere\n")  # of one that died on another machine
    for name in ("0", "1"):
        with folder.claim(name) as mine:
            assert mine


def test_another_work_with_more_units_that_begins_meanwhile_is_refused(tmp_path: Path) -> None:
    def work(_: Any) -> Any:
        yield from ()
        Folder(tmp_path, "another", "part").keep(7, xr.Dataset())
        return xr.Dataset()

    assert "holds another experiment" in refused(
        lambda: list(units.worked(vlm(), prompts()[:2], [[0], [1]], work, tmp_path))
    )


def test_a_unit_that_fails_is_free_again(tmp_path: Path) -> None:
    folder = Folder(tmp_path, "same", "part")
    with pytest.raises(Stopped):
        for _ in units.taken(folder, 2, lambda: [0, 1]):
            raise Stopped
    with folder.claim("0") as mine:
        assert mine


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Process()),
        ({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, Process(1, 4, 1, True)),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Process(5, 8, 1, True)),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}, Process(0, 2)),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, Process(1, 2, 1, True)),
        ({"WORLD_SIZE": "2"}, Process()),
    ],
)
def test_a_launcher_says_which_process_this_is(environment: dict[str, str], expected: Process) -> None:
    assert launched(environment) == expected


def test_a_process_is_alone_within_a_unit_and_one_of_several_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with alone():
        assert here().count == 1
    assert here() == Process(1, 2, 1, quiet=True)


def test_each_process_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with seated(Process(3, 4, local=3)):
        assert [str(place_of(one)) for one in (None, "cpu", "cuda:0")] == ["cuda:1", "cpu", "cuda:0"]
        assert str(place_of("cuda")) == "cuda:1"
    assert str(place_of(None)) == "cuda"


def test_a_sweep_is_divided_among_processes_and_is_whole_in_each(tmp_path: Path) -> None:
    def swept(out: Path | None) -> xr.DataArray:
        point = lambda head, layer: [mv.ablate_heads(layer, [head])]  # noqa: E731
        return mv.sweep(vlm(), prompts()[0], point, YES, out=out, layer=range(3), head=range(4))

    with seated(Process(0, 2)):
        found = swept(tmp_path)
    assert len(list(tmp_path.glob("points-*.nc"))) >= units.STRETCHES * 2
    np.testing.assert_allclose(found, swept(None), atol=1e-6)
    xr.testing.assert_equal(found, swept(tmp_path))


def test_a_sweep_elsewhere_is_one_job_however_many_processes_there_are(tmp_path: Path) -> None:
    model = mv.VLM(vlm().hf, vlm().processor, remote="local")
    with seated(Process(0, 2)):
        mv.sweep(model, prompts()[0], lambda head: [mv.ablate_heads(0, [head])], YES, out=tmp_path, head=range(4))
    assert len(mv.remote.traffic(model)) == 2  # and what tells the weights


def test_what_is_finished_elsewhere_is_kept_though_what_comes_behind_it_fails(tmp_path: Path) -> None:
    def work(group: Any) -> Any:
        yield from ()  # as generations do, each of which is a job of its own
        if group == [1]:
            raise Stopped
        return xr.Dataset()

    model = mv.VLM(vlm().hf, vlm().processor, remote="local")
    with pytest.raises(Stopped):
        list(units.worked(model, prompts()[:2], [[0], [1]], work, tmp_path))
    assert len(list(tmp_path.glob("part-000000-*.nc"))) == 1


def test_a_server_is_asked_once_which_weights_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[object]()

    def ask(*what: object) -> list[str]:
        asked.append(what)
        return ["lm_head.weight (2, 2)"]

    monkeypatch.setattr(There, "ask", ask)
    place, nowhere = There(lambda *_: None, "there"), torch.empty(1, device="meta")
    model = SimpleNamespace(place=place, model=None, embedding=nowhere)
    assert weights_print(model) == weights_print(model) == ["lm_head.weight (2, 2)"]
    assert len(asked) == 1


def test_weights_that_cannot_be_seen_where_code_runs_are_known_by_the_models_name(monkeypatch: Any) -> None:
    monkeypatch.setattr(There, "ask", lambda _, model, function: function(model))
    place, apart = There(lambda *_: None, "there"), SimpleNamespace(_module=torch.nn.Linear(2, 2, device="meta"))
    model = SimpleNamespace(place=place, model=apart, embedding=apart._module.weight)
    assert weights_print(model) == ["known by the model's name and revision alone"]


def test_an_evaluation_is_the_same_whoever_answered(tmp_path: Path) -> None:
    rows = [{"question_id": at, "image": str(at // 3), "text": ASKED[at % 3], "label": "yes"} for at in range(9)]
    pictures = {str(number): tiny.picture(number) for number in range(3)}

    def answered(out: Path | None) -> xr.Dataset:
        return evaluate.pope(vlm(), rows, pictures, batch_size=2, out=out)

    whole = answered(None)
    with seated(Process(1, 2)):
        found = answered(tmp_path)
    for path in sorted(tmp_path.glob("*.nc"))[::2]:  # as if it had stopped there
        path.unlink()
    again = answered(tmp_path)
    for one in (found, again):
        xr.testing.assert_equal(one, whole)
        assert one.attrs["engine"] == whole.attrs["engine"]
    assert (again.attrs["answers_computed"], again.attrs["answers_kept"]) == (6, 3)


# -- what is refused -------------------------------------------------------------------------------------------------


def refused(wrong: Callable[[], object]) -> str:
    """The sentence of what is refused."""
    with pytest.raises(ValueError) as caught:
        wrong()
    return str(caught.value)


@pytest.mark.parametrize("name", ["attention_profile", "mean_features", "ablate_each", "patch_pairs"])
def test_several_processes_need_a_folder(name: str) -> None:
    with seated(Process(1, 2)):
        assert refused(lambda: EXPERIMENTS[name](None)) == (
            "this is process 1 of 2, and each of them would do all of this work; give out=, a folder that all of them "
            "see, so that they share it."
        )


def test_one_unit_needs_no_folder() -> None:
    with seated(Process(1, 2)):
        same(mv.attention_profile(vlm(), prompts()[0]), mv.attention_profile(vlm(), prompts()[0]))


def test_another_work_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    EXPERIMENTS["layer_profile"](tmp_path)
    others: list[Callable[[], object]] = [
        lambda: EXPERIMENTS["mean_features"](tmp_path),
        lambda: mv.layer_profile(vlm(), prompts()[:4], out=tmp_path),
        lambda: mv.layer_profile(vlm(), prompts(), convention="viar-2026", out=tmp_path),
        lambda: mv.layer_profile(vlm().with_edits([mv.ablate_heads(0, [0])]), prompts(), out=tmp_path),
        lambda: mv.layer_profile(tiny.vlm(seed=1), prompts(), out=tmp_path),
    ]
    for other in others:
        assert refused(other) == (
            f"out='{tmp_path}' holds another experiment: the model, the prompts or another argument is not the same; "
            "give another folder, or empty this one."
        )


def test_an_answer_by_other_settings_is_another_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    EXPERIMENTS["generated"](tmp_path)
    monkeypatch.setattr(vlm().hf.generation_config, "repetition_penalty", 50.0)
    assert "holds another experiment" in refused(lambda: EXPERIMENTS["generated"](tmp_path))


def test_a_file_that_is_no_part_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "part-000000-x.nc"
    path.write_bytes(b"xx")
    assert refused(lambda: EXPERIMENTS["layer_profile"](tmp_path)) == (
        f"'{path}' is no finished part of an experiment; take it out of the folder, and it is made again."
    )
