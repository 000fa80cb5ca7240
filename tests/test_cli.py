"""The command line: the demo report, a model of one's own, and one sentence with exit code 2 for whatever is wrong."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from typer.testing import CliRunner, Result

import mechvlm as mv
from mechvlm.cli import NULLS, app, check_device, null_image

QUESTION = "is there a red cat in the image ?"


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint directory of a tiny model with its processor."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny.model().save_pretrained(folder)
    tiny.processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "cat.png"
    tiny.picture(1, 30, 40).save(path)
    return path


@pytest.mark.slow
def test_the_report_without_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("report")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "mechvlm-report/report.html\n"
    page = (tmp_path / result.stdout.strip()).read_text(encoding="utf-8")
    assert page.count('<p class="trouble">') == 1  # the one for browsers without scripts
    assert page.count("<section") == 13
    assert "Some more questions" in page
    assert "report: 100%" in result.stderr


def test_a_model_a_picture_and_a_question_of_ones_own(model: Path, image: Path, tmp_path: Path) -> None:
    own: list[str | Path] = [
        "--model",
        model,
        "--image",
        image,
        "--question",
        QUESTION,
        "--null",
        "noise(3)",
        "--answers",
        "cat, dog",
    ]
    result = run(
        "report", *own, "--layer", "1", "--head", "2", "--device", "cpu", "--dtype", "float32", "--out", tmp_path
    )
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{tmp_path / 'report.html'}\n"
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for wanted in (QUESTION, "noise(seed=3)", "In layer 1, head 2", "30 × 40 pixels", "logit_difference(&#39;cat&#39;"):
        assert wanted in page
    assert page.count('<p class="trouble">') == 1
    assert '<section id="cases"' not in page


def test_nothing_but_its_own_lines(model: Path, image: Path, tmp_path: Path) -> None:
    """As a user runs it: neither transformers nor torch has anything to say."""
    script = "import sys; from mechvlm.cli import main; main()"
    given = ["report", "--model", model, "--image", image, "--question", QUESTION, "--out", tmp_path]
    done = subprocess.run([sys.executable, "-c", script, *map(str, given)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'report.html'}\n"
    lines = [line.strip() for line in done.stderr.replace("\x1b[A", "\n").replace("\r", "\n").splitlines()]
    # Bars of slow parts, which show after a second, have no name and any unit; those of other packages have a name.
    assert not [line for line in lines if line and not line.startswith("report:") and not re.match(r"\d+%\|", line)]


def test_check_prints_the_laws(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run("check", model)
    assert result.exit_code == 0, result.stdout
    assert "verdict" in result.stdout
    assert "BROKEN" not in result.stdout
    monkeypatch.setattr(mv.VLM, "unembed", lambda self, h: torch.zeros(*h.shape[:-1], self.shape.vocabulary))
    broken = run("check", model)
    assert broken.exit_code == 1
    assert "BROKEN" in broken.stdout


def test_version_and_help() -> None:
    assert run("--version").stdout == f"{mv.__version__}\n"
    for words in ([], ["report", "--help"], ["check", "--help"]):
        result = run(*words)
        assert "Usage" in result.stdout + result.stderr
    assert "--null" in run("report", "--help").stdout


def test_a_folder_that_cannot_be_written(image: Path) -> None:
    result = run("report", "--out", image / "inside")
    sentence = (
        f"mechvlm: the folder '{image / 'inside'}' cannot be written (Not a directory); choose another with --out.\n"
    )
    assert (result.exit_code, result.stderr, result.stdout) == (2, sentence, "")


OWN = "--model {model} --image {image} --question"
WRONG = {  # words of the command line: the question, if it comes last, and the sentence
    "--model {model} --image {image}": (
        "",
        "--image was given without --question; say what to ask about the picture.",
    ),
    "--model {model} --image missing.png --question": (
        QUESTION,
        "there is no file 'missing.png'; give the path of one picture.",
    ),
    "--model {model} --image {folder}/broken.png --question": (
        QUESTION,
        "'{folder}/broken.png' is not a picture that Pillow can read; save it as PNG or JPEG.",
    ),
    f"--raw {OWN}": (
        "is there a cat ?",
        "the text has 0 <image> and 1 images were given; with raw=True each image needs one <image> in the text, where "
        "it is to stand.",
    ),
    OWN: (
        "<image> is there a cat ?",
        "the question holds <image> itself, whose place the template decides; pass raw=True to give the whole prompt "
        "verbatim.",
    ),
    f"--null black {OWN}": (" ", "the question is empty; write one, or pass raw=True with the whole prompt."),
    "--null blak": ("", f"no null image is called 'blak'; choose {NULLS}."),
    f"--answers zebra,no {OWN}": (
        QUESTION,
        "no spelling of 'zebra' is a single token of this model; give a token id.",
    ),
    f"--answers , {OWN}": (QUESTION, "a report follows at least one answer; give words, such as yes and no."),
    f"--layer 9 {OWN}": (QUESTION, "the language model has 3 layers, counted from 0, so there is no layer 9."),
    "--dtype int4": ("", "no dtype is called 'int4'; choose from auto, float32, bfloat16, float16."),
    "--device gpu": ("", "no device is called 'gpu'; write cpu, cuda or cuda:1."),
}


@pytest.mark.parametrize("words", WRONG)
def test_one_sentence_and_exit_code_2(words: str, model: Path, image: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_text("not a picture")
    question, sentence = WRONG[words]
    given = [word.format(model=model, image=image, folder=tmp_path) for word in words.split(" ")]
    result = run("report", "--out", tmp_path / "out", *given, *([question] if question else []))
    assert result.stderr == "mechvlm: " + sentence.replace("{folder}", str(tmp_path)) + "\n"
    assert result.exit_code == 2
    assert result.stdout == ""


@pytest.mark.parametrize("command", ["report", "check"])
def test_a_model_that_is_not_there(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = ["--model", "nobody/nothing"] if command == "report" else ["nobody/nothing"]
    result = run(command, *name)
    assert result.exit_code == 2
    assert result.stderr.startswith(
        "mechvlm: there is no model 'nobody/nothing': it is no checkpoint directory, and the hub"
    )
    assert len(result.stderr.splitlines()) == 1


def test_a_checkpoint_with_something_wrong(model: Path, image: Path, tmp_path: Path) -> None:
    own: list[str | Path] = ["--image", image, "--question", QUESTION, "--out", tmp_path / "out"]
    for name, content, sentence in (
        ("model.safetensors", "x" * 1000, "could not be loaded (Error while deserializing header: header too large)."),
        ("config.json", "{broken", "is not a valid JSON file)."),
        ("chat_template.jinja", "{{ broken", "pass raw=True with the whole prompt, or set processor.chat_template."),
    ):
        folder = shutil.copytree(model, tmp_path / name)
        (folder / name).write_text(content)
        result = run("report", "--model", folder, *own)
        assert result.exit_code == 2, result.output
        assert result.stderr.endswith(f"{sentence}\n")
        assert len(result.stderr.splitlines()) == 1


def test_devices() -> None:
    for device, count in ((None, 0), ("cpu", 0), ("cuda", 1), ("cuda:1", 2)):
        check_device(device, count)
    with pytest.raises(ValueError) as refused:
        check_device("cuda", 0)
    assert str(refused.value) == "device 'cuda' was asked for, and this machine has no CUDA; write --device cpu."
    with pytest.raises(ValueError) as refused:
        check_device("mps", 0, False)
    assert str(refused.value) == "device 'mps' was asked for, and this machine has no MPS; write --device cpu."
    check_device("mps", 0, True)
    with pytest.raises(ValueError) as refused:
        check_device("cuda:2", 2)
    assert str(refused.value) == "device 'cuda:2' was asked for, and this machine has 2 CUDA devices, counted from 0."


def test_null_images_by_name(image: Path) -> None:
    named = {
        "black": mv.images.black,
        " white ": mv.images.white,
        "noise(3)": mv.images.noise(3),
        "noise": mv.images.noise(0),
        "diffusion(200)": mv.images.diffusion(200),
        "blur(1.5)": mv.images.blur(1.5),
        "shuffle(2)": mv.images.shuffle(2),
    }
    picture = tiny.picture(3)
    for name, null in named.items():
        assert null_image(name)(picture).tobytes() == null(picture).tobytes(), name
    same = tiny.picture(1, 30, 40)
    assert null_image(f"swap({image})")(tiny.picture(5, 30, 40)).tobytes() == same.tobytes()
    for wrong in ("", "noise(x)", "noise(1.5)", "black(1)", "swap", "swap()", "os.system(1)", "blur(1)(2)"):
        with pytest.raises(ValueError) as refused:
            null_image(wrong)
        assert str(refused.value) == f"no null image is called {wrong!r}; choose {NULLS}."
