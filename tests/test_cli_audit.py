"""`mechvlm audit`: what it writes, that a record suffices to run it again, and one sentence for whatever is wrong."""

import json
import shlex
from dataclasses import dataclass, field
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
from mechvlm.commands.audit_command import layers_of, spread
from mechvlm.evaluate import Item
from mechvlm.methods import audit as audits
from mechvlm.methods.audit import audit
from mechvlm.report import audit as written
from mechvlm.report.audit import counted, gradients

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


@dataclass
class Seen:
    """One run: its folder, and what the audit was given and returned."""

    folder: Path
    prompts: list[mv.Prompt] = field(default_factory=list)
    clusters: list[str] = field(default_factory=list)
    how: dict[str, Any] = field(default_factory=dict)
    found: dict[str, xr.Dataset] = field(default_factory=dict)

    def audit(self, vlm: mv.VLM, prompts: list[mv.Prompt], clusters: list[str], **how: Any) -> dict[str, xr.Dataset]:
        self.prompts, self.clusters, self.how = prompts, clusters, how
        self.found = audit(vlm, prompts, clusters, **how)
        return self.found


@pytest.fixture(scope="module")
def made(place: Path) -> Seen:
    """One run of the command."""
    seen = Seen(place / "out")
    given = ["--file", place / "coco_pope_random.json", "--images", place, "--items", 6, "--resamples", 40]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(audits, "audit", seen.audit)
        result = run(place / "model", *given, "--zone", "2-3", "--mistral", "--out", seen.folder)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{seen.folder / 'audit.html'}\n"
    return seen


def test_the_audit_is_asked_for_what_the_words_say(made: Seen) -> None:
    assert made.how == {"zone": [2, 3], "mistral": True, "resamples": 40, "seed": 0}
    assert made.clusters == [f"{number}.png" for number in (0, 1, 2, 3, 4, 0)]
    words = ["is there a cat ?", "is there a red dog ?"]
    assert [prompt.words for prompt in made.prompts] == [words[at] for at in (0, 1, 0, 1, 0, 1)]


def test_it_writes_the_numbers_that_the_audit_returns(made: Seen) -> None:
    for name, one in made.found.items():
        with xr.open_dataset(made.folder / f"{name}.nc", engine="h5netcdf") as read:
            assert set(read.data_vars) == set(one.data_vars)
            first = next(iter(one.data_vars))
            np.testing.assert_array_equal(read[first], one[first])
    table = pd.read_csv(made.folder / "findings_table.csv")
    findings = made.found["findings"]
    assert table.verdict.tolist() == findings.verdict.values.tolist()
    np.testing.assert_allclose(table.corrected_low, findings.corrected.sel(end="low"))
    page = (made.folder / "audit.html").read_text(encoding="utf-8")
    assert page.count("<section") == SECTIONS
    for sentence in findings.sentence.values:
        assert sentence.replace("'", "&#39;") in page
    assert len(list((made.folder / "figures").glob("*.json"))) == 12


def test_a_record_suffices_to_make_the_same_numbers_again(
    made: Seen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, pages = json.loads((made.folder / "record.json").read_text()), []

    def page(found: dict[str, xr.Dataset], folder: Path, about: dict[str, str]) -> Path:  # noqa: ARG001
        pages.append(found)
        return folder

    monkeypatch.setattr(written, "audit_page", page)
    again = run("--rerun", made.folder / "record.json", "--out", tmp_path)
    assert again.exit_code == 0, again.stderr
    xr.testing.assert_identical(pages[0]["findings"], made.found["findings"])
    second = json.loads((tmp_path / "record.json").read_text())
    assert (second["rerun_of"], second["differs_from_it"]) == (record["made"], {})
    assert second["verdicts"] == record["verdicts"]
    assert shlex.split(record["command"])[:2] == ["mechvlm", "audit"]
    assert "--zone 2-3" in record["command"]


def test_another_model_than_the_records_is_refused(made: Seen, tmp_path: Path) -> None:
    record = json.loads((made.folder / "record.json").read_text())
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


def test_a_page_without_published_gradients_has_the_corrected_ones(made: Seen) -> None:
    found = {name: one for name, one in made.found.items() if name != "published_gradients"}
    assert list(gradients(found).numbers) == ["gradients"]
    assert (len(gradients(found).drawings), len(gradients(made.found).drawings)) == (1, 2)
