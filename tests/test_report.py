"""The report: everything the issue lists is on the page and in files, and what cannot be made says why."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import tiny
import xarray as xr
from plotly.offline import get_plotlyjs

import mechvlm as mv
from mechvlm.report import Case, Study, report
from mechvlm.report.causes import attribution, carried, dose, patching
from mechvlm.report.page import Drawing, Section, Table, page
from mechvlm.report.views import cases
from mechvlm.report.write import made

BROWSER = shutil.which("chromium")
SECTIONS = {  # what each section has to show: figures, tables, files
    "summary": (0, 0, set()),
    "picture": (1, 1, set()),
    "answers": (1, 1, {"answers.nc", "next_tokens.csv"}),
    "cases": (0, 1, {"cases.csv"}),
    "attention": (2, 0, {"attention.nc"}),
    "attention_map": (1, 0, {"attention_map.nc"}),
    "lens": (1, 0, {"lens.nc"}),
    "heads": (1, 0, {"heads.nc"}),
    "patching": (1, 0, {"patching.nc"}),
    "attribution": (1, 0, {"attribution.nc"}),
    "dose": (2, 0, {"dose.nc"}),
    "generation": (0, 1, {"generation.csv"}),
    "provenance": (0, 1, set()),
}


class Reader(HTMLParser):
    """What stands in a page: figures, tables and links of each section, and everything that a browser would load."""

    def __init__(self) -> None:
        super().__init__()
        self.sections: dict[str, dict[str, list[Any]]] = {}
        self.loaded: list[str] = []
        self.scripts: list[str] = []
        self.data: list[str] = []
        self._in = ""
        self._script: dict[str, str | None] | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.loaded += [str(named[name]) for name in ("src", "href") if name in named and tag != "a"]
        if tag == "section":
            self._in = str(named["id"])
            self.sections[self._in] = {"figures": [], "tables": [], "links": [], "texts": []}
        if self._in and named.get("class") == "plot":
            self.sections[self._in]["figures"].append(named)
        if self._in and tag == "table":
            self.sections[self._in]["tables"].append(named)
        if self._in and tag == "a":
            self.sections[self._in]["links"].append(named["href"])
        self._script = named if tag == "script" else None

    def handle_data(self, data: str) -> None:
        if self._script is not None:
            (self.data if self._script.get("type") == "application/json" else self.scripts).append(data)
        elif self._in and data.strip():
            self.sections[self._in]["texts"].append(data.strip())

    def handle_endtag(self, tag: str) -> None:
        if tag == "section":
            self._in = ""
        self._script = None


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    return reader


@pytest.fixture(scope="module")
def vlm() -> mv.VLM:
    return tiny.vlm()


@pytest.fixture(scope="module")
def real(vlm: mv.VLM) -> mv.Prompt:
    return vlm.prompt(tiny.picture(1, 30, 40), "is there a red cat in the image ?")


@pytest.fixture(scope="module")
def folder(vlm: mv.VLM, real: mv.Prompt, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "made" / "here"
    other = vlm.prompt(tiny.picture(2), "is there a dog ?")
    more = [Case(other, other.with_image(mv.images.black), "no")]
    path = report(vlm, real, real.with_image(mv.images.black), out, null_name="black", more=more)
    assert path == out / "report.html"
    return out


@pytest.fixture(scope="module")
def text(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def shown(text: str) -> Reader:
    return read(text)


def test_every_section_is_there_with_its_figures(shown: Reader, folder: Path) -> None:
    assert list(shown.sections) == list(SECTIONS)
    for name, (figures, tables, files) in SECTIONS.items():
        section = shown.sections[name]
        counted = len(section["figures"]), len(section["tables"]), {link for link in section["links"] if link[0] != "#"}
        assert counted == (figures, tables, files), name
    written = {path.name for path in folder.iterdir()}
    assert written == {"report.html", "figures"}.union(*(files for *_, files in SECTIONS.values()))
    drawn = [path.stem for path in (folder / "figures").glob("*.json")]
    assert sorted(drawn) == sorted(
        f"{name}-{number + 1}" for name, (figures, *_) in SECTIONS.items() for number in range(figures)
    )


def test_nothing_was_left_out(text: str) -> None:
    assert 'class="trouble">The figures are drawn by a script' in text
    assert text.count('<p class="trouble">') == 1
    assert "could not be made" not in text


def test_each_figure_is_data_that_plotly_takes(shown: Reader) -> None:
    figures = sum(figures for figures, *_ in SECTIONS.values())
    assert len(shown.data) == figures
    for text in shown.data:
        held = json.loads(text)
        for one in held["figures"]:
            go.Figure({"data": one["data"], "layout": {**one["layout"], "images": held["images"]}})


def test_sliders_choose_among_layers_and_positions(shown: Reader, text: str, real: mv.Prompt) -> None:
    choices = [
        json.loads(found.replace("&#34;", '"')) for found in re.findall(r"data-choices='?\"?(\[.*?\])['\"]?>", text)
    ]
    assert [len(one) for one in choices if one] == [len(real.question + real.last), 3]
    assert [len(json.loads(data)["figures"]) for data in shown.data].count(3) == 1
    assert choices[-1] == [] and ["0", "1", "2"] in choices


def test_every_figure_has_words_for_those_who_cannot_see_it(shown: Reader, text: str) -> None:
    for section in shown.sections.values():
        for figure in section["figures"]:
            assert figure["role"] == "img"
            assert len(figure["aria-label"]) > 30
            assert "nan" not in figure["aria-label"]
    assert len(re.findall(r"<img ", text)) == len(re.findall(r"<img [^>]*alt=\"[^\"]+\"", text))
    assert '<html lang="en">' in text


def test_every_section_says_what_it_shows_and_its_conventions(text: str) -> None:
    for name in SECTIONS.keys() - {"summary", "provenance"}:
        section = text.split(f'<section id="{name}"')[1].split("</section>", maxsplit=1)[0]
        assert section.count('class="finding"') == 1, name
        assert section.count('class="text"') == 1
        assert section.count('class="text conventions"') == 1
        assert f'<a href="#{name}">' in text


def test_the_page_stands_alone(shown: Reader, text: str) -> None:
    assert text.count(get_plotlyjs()) == 1
    assert len(shown.scripts) == 2
    assert all(source.startswith("data:") for source in shown.loaded)
    assert "@import" not in text.split("<script>", maxsplit=1)[0]
    assert "url(" not in text.split("<script>", maxsplit=1)[0]


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here; runs wherever `chromium` is on the path")
def test_a_browser_draws_every_figure_without_a_complaint(folder: Path, text: str, tmp_path: Path) -> None:
    """In headless Chromium, after both sliders were moved."""
    move = """<script>for (const one of document.querySelectorAll("input")) {
        one.value = 0; one.dispatchEvent(new Event("input")); }</script></body>"""
    (tmp_path / "moved.html").write_text(text.replace("</body>", move), encoding="utf-8")
    quiet = ["--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update"]
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-sync",
        *quiet,
        f"--user-data-dir={tmp_path}/home",
    ]
    shown = ["--enable-logging=stderr", "--v=0", "--virtual-time-budget=20000", "--dump-dom"]
    for shown_page in (folder / "report.html", tmp_path / "moved.html"):
        command = [str(BROWSER), *flags, *shown, shown_page.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
        assert "CONSOLE" not in done.stderr
        plots = done.stdout.split('role="img"')[1:]
        assert len(plots) == sum(figures for figures, *_ in SECTIONS.values())
        for plot in plots:
            assert 'class="main-svg"' in plot.split("</figure>")[0]


def test_the_numbers_are_those_of_the_experiments(folder: Path, vlm: mv.VLM, real: mv.Prompt) -> None:
    null = real.with_image(mv.images.black)
    opened = {path.stem: xr.load_dataset(path, engine="h5netcdf") for path in folder.glob("*.nc")}
    answers = mv.answer_probabilities(vlm, {"real": real, "null": null}, ["yes", "no"])
    assert np.abs(opened["answers"].probability - answers).max() < 1e-6
    heads = mv.ablate_each_head(vlm, real, mv.logit_difference("yes", "no"))
    assert np.abs(opened["heads"].effect - heads).max() < 1e-5
    for name, dataset in opened.items():
        held = dataset[str(next(iter(dataset.data_vars)))].attrs | dataset.attrs
        assert held["model"] == "tiny", name
        assert held["prompt"] == real.text
    said = pd.read_csv(folder / "generation.csv", dtype=str, keep_default_na=False)
    assert said.columns.tolist() == ["image", "bias", "text"]
    assert said.bias.tolist() == ["none", "+2", "-2"] * 2
    assert said.text[0] == vlm.generate(real, max_new_tokens=24, do_sample=False).text
    assert len(pd.read_csv(folder / "next_tokens.csv")) == 5
    assert pd.read_csv(folder / "cases.csv").question.tolist() == ["is there a dog ?"]


def test_provenance_and_summary(shown: Reader, real: mv.Prompt) -> None:
    words = shown.sections["provenance"]["texts"]
    for wanted in (
        "tiny",
        "float32",
        "black",
        "logit_difference('yes', 'no')",
        "3 layers of 4 heads",
        "30 × 40 pixels",
    ):
        assert wanted in words
    assert any("torch" in word for word in words)
    summary = " ".join(shown.sections["summary"]["texts"])
    assert f"The picture takes {len(real.image)} of the prompt’s {len(real)} positions." in summary


def test_a_top_token_that_is_no_answer_is_said(vlm: mv.VLM, real: mv.Prompt, tmp_path: Path) -> None:
    top = vlm.word(int(vlm.run(real).logits.argmax()))
    words = [word for word in ("yes", "no", "cat", "dog", "red") if word != top][:2]
    out = report(vlm, real, real.with_image(mv.images.white), tmp_path, answers=words, layer=1, head=3)
    text = out.read_text(encoding="utf-8")
    assert f"“{top}” is none of the answers asked for" in text.replace("&lt;", "<").replace("&gt;", ">")
    assert "In layer 1, head 3, the last position" in text
    assert f"the logit of “{words[0]}” minus the logit of “{words[1]}”" in text
    assert "null image" in text
    assert '<section id="cases"' not in text


def test_one_answer_is_followed_by_its_probability(vlm: mv.VLM, real: mv.Prompt) -> None:
    study = Study(vlm, real, real.with_image(mv.images.black), ["yes"])
    assert str(study.metric) == "log_probability('yes')"
    assert study.measured == "the log-probability of “yes”"


def test_a_null_image_that_changes_nothing(vlm: mv.VLM, real: mv.Prompt) -> None:
    same = made(patching, Study(vlm, real, real))
    assert same.finding == "This part could not be made."
    assert re.fullmatch(
        r"picture and null image give the same answer to within rounding \(-?\d+\.\d{3}\), so there is "
        r"nothing to carry over\.",
        same.trouble,
    )
    written = page([same], {"model": "tiny", "made": "now"}, "?")
    assert same.trouble in written
    assert "The real run patched into the null run" in written


def test_most_is_said_only_of_most() -> None:
    """Layer 0: most, unopposed. Layer 1: the largest share is small. Layer 2: large, but another works against it."""
    values = [[1.0, 0.0, 0.1], [0.4, 0.3, 0.1], [0.9, -0.8, 0.0]]
    share = xr.DataArray(
        values, dims=["layer", "span"], coords={"layer": [0, 1, 2], "span": ["image", "question", "last"]}
    )
    assert carried(share) == (
        "Most of that enters layer 0 at “image”. The largest share, but not most or not unopposed, enters layers 1 "
        "to 2 at “image”."
    )
    assert carried(share[:1]) == "Most of that enters layer 0 at “image”."
    assert carried(share[1:2]) == (
        "Into no layer does one span carry most of that. The largest share, but not most or not unopposed, enters "
        "layer 0 at “image”."
    )


def test_the_dose_says_its_ends_and_its_peaks(vlm: mv.VLM, real: mv.Prompt) -> None:
    section = dose(Study(vlm, real, real.with_image(mv.images.black)))
    curve = section.numbers["dose"].metric
    low, high = int(curve.values.argmin()), int(curve.values.argmax())
    assert section.finding == (
        f"With a bias of -8 the metric is {float(curve[0]):+.2f}, without one {float(curve.sel(amount=0)):+.2f}, and "
        f"with +8 it is {float(curve[-1]):+.2f}; of the biases tried it is lowest at {float(curve.amount[low]):+g} "
        f"({float(curve[low]):+.2f}) and highest at {float(curve.amount[high]):+g} ({float(curve[high]):+.2f})."
    )


def test_a_flat_metric_names_no_token(vlm: mv.VLM, real: mv.Prompt) -> None:
    study = Study(vlm, real, real.with_image(mv.images.black))
    object.__setattr__(study, "metric", lambda logits: 1e-9 * logits[:, 0])
    assert attribution(study).finding == (
        "No image token's attribution reaches 0.0005: around this answer the metric is flat, as where a probability is "
        "all but 0 or 1, and to first order no token can be told from another."
    )


def test_further_questions_are_judged_among_their_own_answers(vlm: mv.VLM, real: mv.Prompt) -> None:
    null = real.with_image(mv.images.black)
    more = [Case(real, null, "yes"), Case(null, real, "no")]
    section = cases(Study(vlm, real, null, ["cat", "dog"], cases=more))
    assert section.finding.endswith("with the null image, where the likeliest of “yes” and “no” counts as the answer.")
    one = made(cases, Study(vlm, real, null, ["cat", "dog"], cases=more[:1]))
    assert one.trouble == (
        "the right answers of the further questions are yes, and it takes two different answers to choose between."
    )


def test_a_prompt_that_ends_in_its_image(vlm: mv.VLM, tmp_path: Path) -> None:
    prompt = vlm.prompt(tiny.picture(1), "what is this <image>", raw=True)
    text = report(vlm, prompt, prompt.with_image(mv.images.black), tmp_path).read_text(encoding="utf-8")
    assert text.count('<p class="trouble">') == 1  # the one for browsers without scripts
    assert "the last position puts" in text


def test_words_never_become_markup() -> None:
    evil = "</script><script>alert(1)</script>"
    figure = go.Figure().add_scatter(x=[1], y=[2], name=evil).update_layout(title=evil)
    section = Section(
        "a", evil, evil, evil, evil, [Drawing(evil, {evil: figure}, evil)], [Table(evil, [evil], [(evil,)])]
    )
    text = page([section], {"model": evil, "made": evil}, evil)
    assert evil not in text
    reader = read(text)
    assert len(reader.scripts) == 2
    assert json.loads(reader.data[0])["figures"][0]["data"][0]["name"] == evil


def test_numbers_that_are_none() -> None:
    figure = mv.plot.heatmap(
        xr.DataArray(np.array([[np.nan, 1.0]]), dims=["layer", "head"], coords={"layer": [0], "head": [0, 1]})
    )
    assert "NaN" not in Drawing("A map.", figure).json


WRONG: dict[str, dict[str, Any]] = {
    "a report needs a picture; make the prompt with vlm.prompt(image, text).": {"real": "none"},
    "a report follows at least one answer; give words, such as yes and no.": {"answers": []},
    "no spelling of 'zebra' is a single token of this model; give a token id.": {"answers": ["yes", "no", "zebra"]},
    "logit_difference('yes', 'Yes') compares a word with itself; give two different words.": {
        "answers": ["yes", "Yes"]
    },
    "the language model has 3 layers, counted from 0, so there is no layer 3.": {"layer": 3},
    "the language model has 4 heads in each layer, counted from 0, so there is no head -1.": {"head": -1},
}


@pytest.mark.parametrize("sentence", WRONG)
def test_sentences(vlm: mv.VLM, real: mv.Prompt, tmp_path: Path, sentence: str) -> None:
    given = dict(WRONG[sentence])
    prompt = vlm.prompt(None, "is there a cat ?") if given.pop("real", None) else real
    with pytest.raises(ValueError) as refused:
        report(vlm, prompt, prompt, tmp_path / "none", **given)
    assert str(refused.value) == sentence
    assert not (tmp_path / "none").exists()
