"""`mechvlm audit`: what it writes, that a record suffices to run it again, and one sentence for whatever is wrong."""

import json
import shlex
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
import xarray as xr
from typer.testing import CliRunner, Result

import mechvlm as mv
from mechvlm.cli import app
from mechvlm.commands.audit_command import layers_of, spread
from mechvlm.evaluate import Item
from mechvlm.report.audit import audit_page, counted

SECTIONS = 9  # in short, seven parts, and where the numbers come from


def run(*words: object) -> Result:
    return CliRunner().invoke(app, ["audit", *map(str, words)])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, pictures, and a file of questions."""
    folder = tmp_path_factory.mktemp("audit")
    tiny.model(layers=5).save_pretrained(folder / "model")
    tiny.processor().save_pretrained(folder / "model")
    lines = []
    for number in range(5):
        tiny.picture(number).save(folder / f"{number}.png")
        for at, word in enumerate(("cat", "red dog")):
            said = {"image": f"{number}.png", "text": f"is there a {word} ?", "label": ("yes", "no")[at]}
            lines.append(json.dumps({"question_id": 2 * number + at, **said}))
    (folder / "coco_pope_random.json").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def made(place: Path) -> Path:
    """The folder of one run."""
    given = ["--file", place / "coco_pope_random.json", "--images", place, "--items", 6, "--resamples", 40]
    result = run(place / "model", *given, "--zone", "2-3", "--mistral", "--out", place / "out")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{place / 'out' / 'audit.html'}\n"
    return place / "out"


def test_it_writes_the_numbers_that_the_audit_returns(place: Path, made: Path) -> None:
    vlm = mv.load(place / "model")
    items = spread(mv.evaluate.read_pope(place / "coco_pope_random.json"), 6)
    prompts = [vlm.prompt(place / item.image, item.question) for item in items]
    groups = [item.image for item in items]
    found = mv.methods.viar.audit(vlm, prompts, groups, zone=[2, 3], mistral=True, resamples=40)
    for name, one in found.items():
        read = xr.load_dataset(made / f"{name}.nc", engine="h5netcdf")
        for variable in one.data_vars:
            if one[variable].dtype.kind == "f":
                np.testing.assert_allclose(read[variable], one[variable], atol=1e-5)
    table = pd.read_csv(made / "findings_table.csv")
    assert table.verdict.tolist() == found["findings"].verdict.values.tolist()
    page = (made / "audit.html").read_text(encoding="utf-8")
    assert page.count("<section") == SECTIONS
    for sentence in found["findings"].sentence.values:
        assert sentence.replace("'", "&#39;") in page
    assert len(list((made / "figures").glob("*.json"))) == 12


def test_a_record_suffices_to_make_the_same_numbers_again(made: Path, tmp_path: Path) -> None:
    record = json.loads((made / "record.json").read_text())
    again = run("--rerun", made / "record.json", "--out", tmp_path)
    assert again.exit_code == 0, again.stderr
    pd.testing.assert_frame_equal(
        pd.read_csv(tmp_path / "findings_table.csv"), pd.read_csv(made / "findings_table.csv")
    )
    second = json.loads((tmp_path / "record.json").read_text())
    assert (second["rerun_of"], second["differs_from_it"]) == (record["made"], {})
    assert second["verdicts"] == record["verdicts"]
    assert shlex.split(record["command"])[:2] == ["mechvlm", "audit"]
    assert "--zone 2-3" in record["command"]


def test_another_model_than_the_records_is_refused(made: Path, tmp_path: Path) -> None:
    record = json.loads((made / "record.json").read_text())
    tiny.model(layers=5, seed=1).save_pretrained(tmp_path / "model")
    tiny.processor().save_pretrained(tmp_path / "model")
    record["asked"]["model"] = str(tmp_path / "model")
    (tmp_path / "record.json").write_text(json.dumps(record))
    result = run("--rerun", tmp_path / "record.json", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert result.stderr.startswith("mechvlm: the model's weights are not those of the record")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("", "there is no model to ask; name one, such as demo, or give --rerun a record.json."),
        ("demo --zone middle", "--zone middle names no layers; write --zone 8-16."),
        ("demo --items 0", "--items 0 asks nothing; give for instance --items 60."),
        (
            "demo --items 3 --resamples 10",
            "the prompts are about 3 pictures, and zones are tested on halves of them; give prompts about at least 4.",
        ),
        (
            "--rerun nowhere.json",
            "'nowhere.json' is no record of mechvlm audit (FileNotFoundError); give the record.json that it wrote.",
        ),
    ],
)
def test_one_sentence_and_exit_code_2(
    words: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*words.split())
    assert (result.exit_code, result.stderr) == (2, f"mechvlm: {sentence}\n")


def test_questions_are_spread_over_pictures_and_asked_once() -> None:
    items = [
        Item(number, number, image, f"{image}{which}", "yes", "random", number if number != 5 else 4)
        for number, (image, which) in enumerate([("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 1), ("b", 1)])
    ]
    assert [item.question for item in spread(items, 10)] == ["a0", "b1", "a1", "b0", "a2"]
    assert [item.question for item in spread(items, 2)] == ["a0", "b1"]


def test_layers_by_their_text() -> None:
    assert (layers_of(None), layers_of("8-10"), layers_of("3")) == (None, [8, 9, 10], [3])


def test_verdicts_are_counted_in_words() -> None:
    assert counted(["not there", "survives", "only corrected"]) == (
        "1 survives, 1 is not shown either way, 1 is shown only when corrected"
    )


def test_a_page_without_published_gradients_says_so(made: Path, tmp_path: Path) -> None:
    found = {path.stem: xr.load_dataset(path, engine="h5netcdf") for path in made.glob("*.nc")}
    del found["published_gradients"]
    page = audit_page(found, tmp_path, {"made": "today"}).read_text(encoding="utf-8")
    assert page.count("<section") == SECTIONS
    assert not (tmp_path / "published_gradients.nc").exists()
