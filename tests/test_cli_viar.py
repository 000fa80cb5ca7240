"""`mechvlm viar`: one command for a result, a record that suffices to run it again, one sentence for what is wrong."""

import json
import shlex
from pathlib import Path

import pytest
import tiny
import xarray as xr
from typer.testing import CliRunner, Result

import mechvlm as mv
from mechvlm.cli import app
from mechvlm.commands.viar_command import PARTS, Asked, command_of, layers_of

FEW = ("--pictures", "4", "--few", "4", "--controls", "1", "--resamples", "40")


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(app, ["viar", *map(str, words)])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, pictures, and a file of questions."""
    folder = tmp_path_factory.mktemp("viar")
    tiny.model(layers=4, width=16, vision_layers=2).save_pretrained(folder / "model")
    tiny.processor().save_pretrained(folder / "model")
    (folder / "images").mkdir()
    for number in range(4):
        tiny.picture(number).save(folder / "images" / f"{number}.png")
    lines = [
        {"question_id": 2 * number + at, "image": f"{number}.png", "text": f"is there a {word} in the image ?"}
        | {"label": ("yes", "no")[at]}
        for number in range(4)
        for at, word in enumerate(("cat", "dog"))
    ]
    (folder / "coco_pope_adversarial.json").write_text("\n".join(map(json.dumps, lines)))
    return folder


def given(place: Path) -> list[str | Path]:
    return [place / "model", "--file", place / "coco_pope_adversarial.json", "--images", place / "images", *FEW]


@pytest.fixture(scope="module")
def made(place: Path) -> Path:
    """The folder of one run."""
    model, *options = given(place)
    result = run(model, "bias", *options, "--parts", "zone", "--layers", "1-2", "--amount", "3", "--out", place / "out")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{place / 'out' / 'viar.html'}\n"
    return place / "out"


def test_one_result_is_one_command(place: Path, made: Path) -> None:
    page, record = (made / "viar.html").read_text(), json.loads((made / "record.json").read_text())
    assert page.count("<section") == 4
    assert list(record["findings"]) == ["zone", "bias"]
    assert list(record["seconds"]) == ["profile", "zone", "base", "bias"]
    vlm = mv.load(place / "model")
    expected = mv.evaluate.pope(
        vlm,
        place / "coco_pope_adversarial.json",
        place / "images",
        edits=lambda prompt: [mv.bias_attention(layer, prompt.image, 3.0) for layer in (1, 2)],
    )
    found = xr.load_dataset(made / "parts" / "bias.nc", engine="h5netcdf")
    xr.testing.assert_allclose(found.margin, expected.margin, atol=1e-5)


def test_a_record_suffices_to_make_the_same_numbers_again(made: Path, tmp_path: Path) -> None:
    record = json.loads((made / "record.json").read_text())
    again = run("--rerun", made / "record.json", "--out", tmp_path / "again")
    assert again.exit_code == 0, again.stderr
    second = json.loads((tmp_path / "again" / "record.json").read_text())
    assert (second["rerun_of"], second["differs_from_it"]) == (record["made"], {})
    assert all(second[name] == record[name] for name in ("command", "asked", "weights", "findings"))
    for name in record["seconds"]:
        files = [folder / "parts" / f"{name}.nc" for folder in (made, tmp_path / "again")]
        one, two = (xr.load_dataset(file, engine="h5netcdf") for file in files)
        xr.testing.assert_equal(one, two)


def test_the_command_in_a_record_asks_for_the_same(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record, asked = json.loads((made / "record.json").read_text()), list[Asked]()

    def keep(one: Asked, *_: object) -> Path:
        asked.append(one)
        return made

    monkeypatch.setattr("mechvlm.commands.viar_command.written", keep)
    assert run(*shlex.split(record["command"])[2:], "--out", made).exit_code == 0
    assert asked == [Asked(**record["asked"])]
    assert command_of(asked[0]) == record["command"]


def test_what_is_not_as_the_record_found_it_is_refused(made: Path, tmp_path: Path) -> None:
    record = json.loads((made / "record.json").read_text()) | {"questions_sha256": "0" * 64}
    (tmp_path / "record.json").write_text(json.dumps(record))
    result = run("--rerun", tmp_path / "record.json", "--out", tmp_path / "again")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("mechvlm: the questions are not those of the record (sha256 0000")


def test_too_few_pictures_are_told_before_any_part_is_made(place: Path, tmp_path: Path) -> None:
    model, *options = given(place)
    result = run(model, *options, "--items", "3", "--out", tmp_path)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == (
        "mechvlm: the part 'zone' needs 4 pictures, and the 3 questions are about 2; ask more questions with items "
        "(--items), or all."
    )
    assert not list(tmp_path.rglob("*.nc"))


def test_another_study_is_said_to_be_in_the_folder_that_was_given(place: Path, made: Path) -> None:
    model, *options = given(place)
    result = run(model, "base", *options, "--amount", "4", "--layers", "1-2", "--out", made)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith(f"mechvlm: the folder '{made}' holds another study: the model,")


def test_the_parts_that_it_names_are_those_of_the_study() -> None:
    assert PARTS.split(", ") == list(mv.methods.viar.PARTS)


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["demo", "--layers", "8-4"], "--layers 8-4 are no layers; write 8 or 8-16, counted from 0."),
        ([], "there is no model to ask; name one, such as demo, or give --rerun a record.json."),
        (
            ["--rerun", "nothing.json"],
            "'nothing.json' is no record of mechvlm viar (FileNotFoundError); give the record.json that it wrote.",
        ),
    ],
)
def test_one_sentence_for_what_is_wrong(words: list[str], sentence: str, tmp_path: Path) -> None:
    result = run(*words, "--out", tmp_path)
    assert (result.exit_code, result.stderr) == (2, f"mechvlm: {sentence}\n")


def test_layers_as_text() -> None:
    assert (layers_of("8-10"), layers_of("3"), layers_of(None)) == ([8, 9, 10], [3], None)
