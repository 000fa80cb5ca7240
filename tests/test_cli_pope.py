"""`mechvlm pope`: what it writes, that a record suffices to run it again, and one sentence for whatever is wrong."""

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
import xarray as xr
from typer.testing import CliRunner, Result

import mechvlm as mv
from mechvlm.cli import app
from mechvlm.commands import pope_command
from mechvlm.evaluate.task import Task
from mechvlm.report import benchmark

SPLITS = {"random": ("cat", "dog", "red cat", "blue dog"), "popular": ("cat", "dog", "red cat", "7")}


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(app, ["pope", *map(str, words)])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, pictures, and two files of questions."""
    folder = tmp_path_factory.mktemp("pope")
    tiny.model().save_pretrained(folder / "model")
    tiny.processor().save_pretrained(folder / "model")
    (folder / "images").mkdir()
    (folder / "questions").mkdir()
    for number in range(3):
        tiny.picture(number).save(folder / "images" / f"{number}.png")
    for split, words in SPLITS.items():
        lines = [
            {"question_id": 4 * number + at, "image": f"{number}.png", "text": f"is there a {word} in the image ?"}
            | {"label": ("yes", "no")[at % 2]}
            for number in range(3)
            for at, word in enumerate(words)
        ]
        (folder / "questions" / f"coco_pope_{split}.json").write_text("\n".join(map(json.dumps, lines)))
    return folder


def given(place: Path) -> list[str | Path]:
    return [place / "model", "--questions", place / "questions", "--images", place / "images"]


@pytest.fixture(scope="module")
def made(place: Path) -> Path:
    """The folder of one run."""
    more = ["--edit", "bias:2.0@0-1", "--edit", "ablate@2.1", "--template", "{question} yes or no ?", "--joined", "max"]
    result = run(*given(place), *more, "--out", place / "out")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{place / 'out' / 'pope.html'}\n"
    return place / "out"


def test_it_writes_the_numbers_that_pope_returns(place: Path, made: Path) -> None:
    vlm = mv.load(place / "model")
    how: dict[str, Any] = {"images": place / "images", "template": "{question} yes or no ?", "joined": "max"}
    edits = mv.evaluate.edits_from("bias:2.0@0-1", "ablate@2.1")
    items = pd.read_csv(made / "items.csv")
    for name, these in (("base", ()), ("edited", edits)):
        expected = mv.evaluate.pope(vlm, place / "questions", edits=these, **how)
        found = xr.open_dataset(made / f"{name}.nc", engine="h5netcdf")
        xr.testing.assert_allclose(found, expected, atol=1e-5)
        np.testing.assert_allclose(items[f"{name}_p_yes"], expected.p_yes, atol=1e-6)
        assert items[f"{name}_predicted"].tolist() == expected.predicted.values.tolist()
    base, edited = (xr.open_dataset(made / f"{name}.nc", engine="h5netcdf") for name in ("base", "edited"))
    compared = mv.evaluate.stats.compare(base, edited)
    written = xr.open_dataset(made / "comparison.nc", engine="h5netcdf")
    np.testing.assert_allclose(written.advantage, compared.advantage)
    page = (made / "pope.html").read_text(encoding="utf-8")
    assert page.count("<section") == 7
    assert compared.attrs["verdict"][1:] in page
    assert '<p class="trouble">' in page
    assert page.count('<p class="trouble">') == 1  # the one for browsers without scripts


def test_a_record_suffices_to_make_the_same_numbers_again(made: Path, tmp_path: Path) -> None:
    record = json.loads((made / "record.json").read_text())
    again = run("--rerun", made / "record.json", "--out", tmp_path)
    assert again.exit_code == 0, again.stderr
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "items.csv"), pd.read_csv(made / "items.csv"))
    second = json.loads((tmp_path / "record.json").read_text())
    assert (second["rerun_of"], second["differs_from_it"]) == (record["made"], {})
    assert all(second[name] == record[name] for name in ("command", "asked", "weights", "accuracy", "yes_ratio"))
    assert record["evaluations"]["edited"]["edits_given"] == "bias:2.0@0-1; ablate@2.1"
    assert second["answers_computed"] == record["answers_computed"] == {"base": 15, "edited": 15}
    assert second["answers_kept"] == {"base": 0, "edited": 0}
    over = run("--rerun", made / "record.json", "--out", tmp_path)
    assert over.stderr == (
        f"mechvlm: the folder '{tmp_path}' holds a record already; choose another with --out for the rerun.\n"
    )


def test_the_command_line_in_a_record_asks_for_the_same(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, asked = json.loads((made / "record.json").read_text()), list[Any]()

    def noted(one: pope_command.Asked, *_: Any) -> Path:
        asked.append(one)
        return tmp_path

    monkeypatch.setattr(pope_command, "written", noted)
    assert run(*shlex.split(record["command"])[2:], "--out", tmp_path).exit_code == 0
    assert run("--rerun", made / "record.json", "--out", tmp_path).exit_code == 0
    assert asked[0] == asked[1] == pope_command.Asked(**record["asked"])
    assert run("--rerun", made / "record.json", "--device", "cpu", "--out", tmp_path).exit_code == 0
    assert asked[2] == replace(asked[1], device="cpu")


def test_a_rerun_is_written_beside_the_record_and_never_over_it(
    made: Path, monkeypatch: pytest.MonkeyPatch, place: Path
) -> None:
    folders = list[Path]()
    monkeypatch.setattr(pope_command, "written", lambda _, folder, __: folders.append(folder))
    assert run("--rerun", made / "record.json").exit_code == 0
    assert folders == [place / "out-rerun"]
    over = run("--rerun", made / "record.json", "--out", made)
    assert (over.exit_code, folders[1:]) == (2, [])
    assert over.stderr == (
        f"mechvlm: the folder '{made}' holds a record already; choose another with --out for the rerun.\n"
    )


IGNORED = {"--split random": "--split", "--edit cut@1": "--edit", "--max-new-tokens 17": "--max-new-tokens"}
IGNORED |= {"demo": "a model", "--dtype float32": "--dtype"}


@pytest.mark.parametrize("words", IGNORED)
def test_options_that_a_rerun_would_ignore_are_refused(words: str, made: Path, tmp_path: Path) -> None:
    result = run("--rerun", made / "record.json", *words.split(), "--out", tmp_path)
    assert result.stderr == (
        f"mechvlm: {IGNORED[words]} was given with --rerun, whose record says all of it; leave one of them out.\n"
    )


def test_a_broken_record_is_refused_in_a_sentence(made: Path, tmp_path: Path) -> None:
    record, broken = json.loads((made / "record.json").read_text()), tmp_path / "record.json"
    asked, base = record["asked"], record["evaluations"]["base"]
    changed: dict[str, Any] = {
        "it has no 'asked'": [record],
        "its 'joined' is not a text": {**record, "asked": {key: asked[key] for key in asked if key != "joined"}},
        "its 'split' is not a list of texts": {**record, "asked": {**asked, "split": 3}},
        "its 'max_new_tokens' is not a number": {**record, "asked": {**asked, "max_new_tokens": True}},
        "its 'more' is unknown": {**record, "asked": {**asked, "more": 3}},
        "its 'weights' is not a text": {**record, "weights": None},
        "it does not say its versions": {**record, "evaluations": []},
        "it does not say its device": {
            **record,
            "evaluations": {"base": {key: base[key] for key in base if key != "device"}},
        },
    }
    for said, one in changed.items():
        broken.write_text(json.dumps(one))
        result = run("--rerun", broken, "--out", tmp_path / "out")
        assert result.stderr == (
            f"mechvlm: '{broken}' is no record of mechvlm pope ({said}); give the record.json that it wrote.\n"
        )


def test_an_edit_that_cannot_be_is_refused_before_the_model_is_asked(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Task, "answers", lambda *_: pytest.fail("a question was asked"))
    result = run(*given(place), "--edit", "bias:2.0@2-99", "--out", tmp_path)
    assert result.stderr == (
        "mechvlm: the text tower has 3 layers, counted from 0, so there is no text.3.scores to edit.\n"
    )


def test_what_is_not_as_the_record_found_it_is_refused(made: Path, tmp_path: Path) -> None:
    record = json.loads((made / "record.json").read_text())
    for name, what in (
        ("questions_sha256", "questions"),
        ("pictures_sha256", "pictures"),
        ("weights", "model's weights"),
    ):
        changed = tmp_path / "record.json"
        changed.write_text(json.dumps({**record, name: "0" * 64}))
        result = run("--rerun", changed, "--out", tmp_path / "out")
        assert result.exit_code == 2
        assert result.stderr == (
            f"mechvlm: the {what} are not those of the record (sha256 000000000000... there, {record[name][:12]}... "
            "here), so its numbers cannot come out again; give the same, or run without --rerun.\n"
        )


def test_a_second_run_into_the_same_folder_asks_nothing_again(
    made: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Task, "answers", lambda *_: pytest.fail("a question was asked again"))
    monkeypatch.setattr(benchmark, "benchmark_page", lambda _, folder, __: folder)  # the first run's stays
    first = json.loads((made / "record.json").read_text())
    assert run(*shlex.split(first["command"])[2:], "--out", made).exit_code == 0
    second = json.loads((made / "record.json").read_text())
    assert (second["answers_kept"], second["answers_computed"]) == (first["answers_computed"], first["answers_kept"])
    assert second["accuracy"] == first["accuracy"]
    (made / "record.json").write_text(json.dumps(first))
    other = run(*given(place), "--out", made)
    assert other.exit_code == 2
    assert f"out='{made / 'finished' / 'base'}' holds another evaluation" in other.stderr


def test_without_edits_there_is_the_model_alone(place: Path, tmp_path: Path) -> None:
    result = run(
        *given(place), "--split", "random", "--parser", "first-word", "--max-new-tokens", "2", "--out", tmp_path
    )
    assert result.exit_code == 0, result.stderr
    items = pd.read_csv(tmp_path / "items.csv")
    assert len(items) == 12
    assert "base_answer" in items
    assert "edited_correct" not in items
    assert (tmp_path / "pope.html").read_text(encoding="utf-8").count("<section") == 4


WRONG = {  # words of the command line, and the sentence
    "": "there is no model to ask; name one, such as demo, or give --rerun a record.json.",
    "nothing": "there are no questions; give --questions a POPE file, a folder of them, or demo.",
    "demo --edit bias@3": (
        "no edit is written 'bias@3'; write bias:AMOUNT@LAYERS, cut@LAYERS, ablate@LAYER.HEAD,... or "
        "scale:FACTOR@LAYER.HEAD,..., for instance bias:2.0@8-16 or ablate@3.5,4.1."
    ),
    "demo --questions {place}/none.json": (
        "there is no file '{place}/none.json' of questions; give a POPE file, a folder of them, or 'demo'."
    ),
    "demo --split hard": "these questions have no split 'hard'; they have random, popular, adversarial.",
    "demo --parser gpt": (
        "no parser is called 'gpt'; choose from official, opera, vcd, lmms-eval, viar, first-word, or None for logits."
    ),
    "--rerun {place}/images/0.png": (
        "'{place}/images/0.png' is no record of mechvlm pope (UnicodeDecodeError); give the record.json that it wrote."
    ),
    "{place}/model --questions {place}/questions --images {place}/questions": (
        "coco_pope_random.json, line 1: there is no file '{place}/questions/0.png'; give the path of one picture "
        "(wrong as well: coco_pope_random.json, line 5; coco_pope_random.json, line 9)."
    ),
}


@pytest.mark.parametrize("words", WRONG)
def test_one_sentence_and_exit_code_2(words: str, place: Path, tmp_path: Path) -> None:
    result = run(*[word.format(place=place) for word in words.split()], "--out", tmp_path)
    assert result.stderr == f"mechvlm: {WRONG[words].replace('{place}', str(place))}\n"
    assert (result.exit_code, result.stdout) == (2, "")


def test_its_help() -> None:
    assert "--edit" in run("--help").stdout


def test_the_first_questions_alone(place: Path, made: Path, tmp_path: Path) -> None:
    result = run(
        *given(place), "--template", "{question} yes or no ?", "--joined", "max", "--items", "2", "--out", tmp_path
    )
    assert result.exit_code == 0, result.stderr
    some, whole = (xr.load_dataset(folder / "base.nc", engine="h5netcdf") for folder in (tmp_path, made))
    assert np.allclose(some.margin, whole.margin[:2], atol=1e-5)
    assert json.loads((tmp_path / "record.json").read_text())["asked"]["items"] == 2
