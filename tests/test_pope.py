"""POPE: its files as they are published, what can be wrong with them, and answers that are each item's own pass."""

import gzip
import json
from collections import Counter
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pandas as pd
import pytest
import tiny
import torch
import xarray as xr
import zoo
from PIL import Image

import mechvlm as mv
from mechvlm import evaluate
from mechvlm.evaluate.parsers import PARSERS, scoring_of
from mechvlm.evaluate.pictures import looked_at
from mechvlm.evaluate.task import Task

DATA = Path(__file__).parent / "data" / "pope"
SPLITS = ("random", "popular", "adversarial")
ROWS = [
    {"question_id": 1, "image": "a.png", "text": "is there a cat in the image ?", "label": "yes"},
    {"question_id": 2, "image": "a.png", "text": "is there a dog in the image ?", "label": "no"},
    {"question_id": 3, "image": "b.png", "text": "is there a red dog in the image ?", "label": "no"},
]
PICTURES = {"a.png": tiny.picture(1), "b.png": tiny.picture(2)}


def written(folder: Path, *lines: Any, name: str = "coco_pope_random.json") -> Path:
    """A file of JSON lines, or of lines as they are given."""
    path = folder / name
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


@pytest.fixture
def untyped() -> Iterator[None]:
    """Without the test run's type checks, so that a wrong type meets our own sentence, as it does for users."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> list[evaluate.Item]:
    """What is read from POPE's three files."""
    folder = tmp_path_factory.mktemp("pope")
    for split in SPLITS:
        name = f"coco_pope_{split}.json"
        (folder / name).write_bytes(gzip.decompress((DATA / f"{name}.gz").read_bytes()))
    return evaluate.read_pope(folder)


# -- the published files ---------------------------------------------------------------------------------------------


def test_the_published_files_have_three_splits_of_500_pictures_with_six_questions(published: list) -> None:
    assert Counter(item.split for item in published) == dict.fromkeys(SPLITS, 3000)
    assert [item.split for item in published[::3000]] == list(SPLITS)
    for start in (0, 3000, 6000):
        part = published[start : start + 3000]
        images = Counter(item.image for item in part)
        assert (len(images), set(images.values())) == (500, {6})
        assert [item.label for item in part] == ["yes", "no"] * 1500
        assert [item.question_id for item in part] == list(range(1, 3001))


def test_5127_of_the_9000_lines_are_questions_of_their_own(published: list) -> None:
    assert sum(item.duplicate_of == item.number for item in published) == 5127
    for item in published:
        first = published[item.duplicate_of]
        assert (first.image, first.question, first.label) == (item.image, item.question, item.label)
    pairs = {
        (split, label): {(i.image, i.question) for i in published if (i.split, i.label) == (split, label)}
        for split in SPLITS
        for label in ("yes", "no")
    }
    random, popular, adversarial = (pairs[split, "no"] for split in SPLITS)
    overlaps = popular & adversarial, random & popular, random & adversarial, random & popular & adversarial
    assert [len(overlap) for overlap in overlaps] == [788, 63, 57, 35]
    assert pairs["random", "yes"] == pairs["popular", "yes"] == pairs["adversarial", "yes"]


def test_popular_asks_in_vain_for_ten_words_only(published: list) -> None:
    asked = Counter(
        item.question.removeprefix("Is there a ").removeprefix("Is there an ").removesuffix(" in the image?")
        for item in published
        if (item.split, item.label) == ("popular", "no")
    )
    assert len(asked) == 10
    assert [asked[word] for word in ("car", "dining table", "chair", "person", "cup")] == [410, 370, 363, 152, 147]


# -- layouts ---------------------------------------------------------------------------------------------------------


class Rows:
    """What a data set of the datasets package is to its reader: a length, rows by number, and nothing else."""

    def __init__(self, rows: list[dict]) -> None:
        self.rows, self.asked = rows, list[int]()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict:
        self.asked.append(number)
        return self.rows[number]

    def __iter__(self) -> Any:
        return iter(self.rows)


def png(picture: Image.Image) -> bytes:
    data = BytesIO()
    picture.save(data, "PNG")
    return data.getvalue()


def mirrored() -> list[dict]:
    """The same rows as lmms-lab/POPE has them."""
    return [
        {
            "id": str(number),
            "question_id": str(row["question_id"]),
            "question": row["text"],
            "answer": str(row["label"]).capitalize(),
            "image_source": str(row["image"]).removesuffix(".png"),
            "image": PICTURES[str(row["image"])],
            "category": "random",
        }
        for number, row in enumerate(ROWS)
    ]


def test_every_layout_says_the_same(tmp_path: Path) -> None:
    lines = evaluate.read_pope(written(tmp_path, *ROWS))
    path = tmp_path / "list_random.json"
    path.write_text(json.dumps(ROWS, indent=1))
    assert evaluate.read_pope(path) == lines
    assert evaluate.read_pope([str(path)]) == lines
    told = [(item.question, item.label, item.split) for item in lines]
    frame = pd.DataFrame([{**row, "image": {"bytes": png(row["image"]), "path": None}} for row in mirrored()])
    for rows in (mirrored(), Rows(mirrored()), iter(mirrored()), frame, {"test": mirrored()}):
        items = evaluate.read_pope(rows)
        assert [(item.question, item.label, item.split) for item in items] == told
        assert [item.image for item in items] == ["a", "a", "b"]
        assert looked_at(items) == {name: looked_at(lines, PICTURES)[f"{name}.png"] for name in "ab"}
    pope2 = [  # whose image_id numbers the pictures
        {"image_id": "ab".index(str(row["image"])[0]), "image_name": row["image"], "query": row["text"]}
        | {"label": row["label"]}
        for row in ROWS
    ]
    assert evaluate.read_pope({"random": pope2}) == lines


def test_pictures_of_rows_are_taken_when_they_are_asked_for() -> None:
    rows = Rows(mirrored())
    items = evaluate.read_pope(rows)
    assert rows.asked == []
    looked_at(items[1:])
    assert rows.asked == [1, 2]


def test_pictures_without_a_name_are_known_by_what_they_show(monkeypatch: pytest.MonkeyPatch) -> None:
    bare = [{key: value for key, value in row.items() if key != "image_source"} for row in mirrored()]
    again = [{**row, "image": row["image"].copy(), "question_id": f"{number} again"} for number, row in enumerate(bare)]
    again[0]["image_source"] = float("nan")  # as a data frame says nothing
    items = evaluate.read_pope([*bare, *again])
    assert [item.duplicate_of for item in items] == [0, 1, 2, 0, 1, 2]
    assert len({item.image for item in items}) == 2
    assert items[0].image.startswith("picture ")
    groups, own = list[int](), Task.answers

    def counting(self: Task, some: Any) -> Any:
        groups.append(len(some))
        return own(self, some)

    monkeypatch.setattr(Task, "answers", counting)
    found = evaluate.pope(tiny.vlm(), items)
    assert groups == [2, 1]
    np.testing.assert_array_equal(found.margin[:3], evaluate.pope(tiny.vlm(), ROWS, PICTURES).margin)


def test_pictures_may_be_called_by_whole_numbers() -> None:
    numbers = [{**row, "image": np.int64("ab".index(str(row["image"])[0]))} for row in ROWS]
    pictures, names = {0: PICTURES["a.png"], 1: PICTURES["b.png"]}, list[str]()
    items = evaluate.read_pope(pd.DataFrame(numbers))
    assert [item.image for item in items] == ["0", "0", "1"]

    def named(name: str) -> Image.Image:
        names.append(name)
        return pictures[int(name)]

    assert looked_at(items, named) == looked_at(items, pictures)
    assert names == ["0", "1"]


def test_two_pictures_of_one_name_are_refused_with_the_line() -> None:
    rows = [*mirrored(), {**mirrored()[0], "question_id": "4", "image": tiny.picture(5), "question": "is it a cat ?"}]
    with pytest.raises(ValueError) as refused:
        looked_at(evaluate.read_pope(rows))
    assert str(refused.value) == (
        "row 4 of the list: another picture is called 'a' (row 1 of the list); give each its own name."
    )


def test_ids_are_whole_numbers_of_64_bits_or_texts() -> None:
    frame = pd.DataFrame([{**row, "category": np.nan} for row in ROWS])
    frame["question_id"] = frame["question_id"].astype(float)
    items = evaluate.read_pope({"own": frame})
    assert [(item.question_id, item.split) for item in items] == [(1, "own"), (2, "own"), (3, "own")]
    for given, expected in ((np.int64(7), 7), (2**63 - 1, 2**63 - 1), (10**30, str(10**30)), ("7", "7")):
        read = evaluate.read_pope([{**ROWS[0], "question_id": given}])[0].question_id
        assert (read, type(read)) == (expected, type(expected))


def test_windows_lines_a_byte_order_mark_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "coco_pope_random.json"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([json.dumps(ROWS[0]), "", json.dumps(ROWS[1]), ""]).encode())
    assert evaluate.read_pope(path) == evaluate.read_pope({"random": ROWS[:2]})
    assert [item.where for item in evaluate.read_pope(path)] == [f"{path.name}, line {line}" for line in (1, 3)]


def test_a_folder_is_read_in_the_order_of_the_splits_and_one_split_alone(tmp_path: Path) -> None:
    for split in SPLITS:
        written(tmp_path, *ROWS, name=f"coco_pope_{split}.json")
    items = evaluate.read_pope(tmp_path)
    assert [item.split for item in items] == ["random"] * 3 + ["popular"] * 3 + ["adversarial"] * 3
    assert [item.duplicate_of for item in items] == [0, 1, 2] * 3
    written(tmp_path, "broken", name="coco_pope_popular.json")
    assert {item.split for item in evaluate.read_pope(tmp_path, ["random", "adversarial"])} == {"random", "adversarial"}


# -- what can be wrong -----------------------------------------------------------------------------------------------

NAME = "coco_pope_random.json"
KEYS = "a question has question_id, image, text and label"
WRONG = [
    (
        ['{"question_id": 1,', *ROWS[1:]],
        "line 1: it is no JSON (Expecting property name enclosed in double quotes, column 19); correct it, or take it "
        "out.",
    ),
    ([*ROWS, "7"], "line 4: it is 7, and a question is an object with question_id, image, text and label."),
    ([ROWS[0], {**ROWS[1], "label": "maybe"}], "line 2: the label is 'maybe', and it must be yes or no."),
    ([{"question_id": 1, "image": "a.png", "text": "?"}], f"line 1: it has no 'label' or 'answer'; {KEYS}."),
    ([{**ROWS[0], "text": None}], f"line 1: it has no 'text' or 'question' or 'query'; {KEYS}."),
    ([{**ROWS[0], "text": " "}], "line 1: the question is ' ', and it must be a text."),
    (
        [ROWS[0], {**ROWS[1], "question_id": True}],
        "line 2: the question_id is True, and it must be a text or a whole number.",
    ),
    ([ROWS[0], {**ROWS[1], "question_id": float("nan")}], f"line 2: it has no 'question_id' or 'id'; {KEYS}."),
    ([{**ROWS[0], "image": ["a.png"]}], "line 1: the image is ['a.png'], and it must be a text or a whole number."),
    (
        [ROWS[0], "[" * 100_000 + "]" * 100_000],
        "line 2: it is nested more deeply than Python reads JSON; correct it, or take it out.",
    ),
    (
        [ROWS[0], '{"question_id": ' + "1" * 5000 + "}"],
        "line 2: it holds a number of 5000 digits; correct it, or take it out.",
    ),
    (
        [*ROWS, {**ROWS[2], "text": "is there a cat ?"}],
        "line 4: question_id 3 is that of another question (coco_pope_random.json, line 3); give each question of a "
        "split an id of its own.",
    ),
    (
        [*ROWS, {**ROWS[0], "question_id": 4, "label": "no"}],
        "line 4: the label of 'is there a cat in the image ?' is 'no' here and 'yes' before (coco_pope_random.json, "
        "line 1); one of them is wrong.",
    ),
    (
        ["{", ROWS[0], {**ROWS[1], "label": 3}, "{", "{", "{", "{", "{"],
        "line 1: it is no JSON (Expecting property name enclosed in double quotes, column 2); correct it, or take it "
        "out (wrong as well: coco_pope_random.json, line 3; coco_pope_random.json, line 4; coco_pope_random.json, line "
        "5; coco_pope_random.json, line 6; coco_pope_random.json, line 7 and 1 more).",
    ),
]


@pytest.mark.parametrize("lines, sentence", WRONG, ids=[sentence[:50] for _, sentence in WRONG])
def test_what_is_wrong_with_a_line_is_said_with_its_number(tmp_path: Path, lines: list, sentence: str) -> None:
    with pytest.raises(ValueError) as refused:
        evaluate.read_pope(written(tmp_path, *lines))
    assert str(refused.value) == f"{NAME}, {sentence}"


def test_a_list_that_breaks_off_and_rows_without_a_label(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text("[\n" + json.dumps(ROWS[0]) + ",\n")
    with pytest.raises(ValueError, match=r"^own.json, line 3: it is no JSON \(Expecting value, column 1\); correct"):
        evaluate.read_pope(path)
    for inside, said in (
        ("[" * 100_000, "it is nested more deeply than Python reads JSON"),
        ("1" * 5000, "it holds a number of 5000 digits"),
    ):
        path.write_text("[\n" + inside)
        with pytest.raises(ValueError, match=f"^own.json, line 2: {said}; correct it, or take it out.$"):
            evaluate.read_pope(path)
    with pytest.raises(ValueError) as refused:
        evaluate.read_pope([{**mirrored()[0], "answer": "yep"}])
    assert str(refused.value) == "row 1 of the list: the label is 'yep', and it must be yes or no."
    wrong = [*mirrored()[:2], {**mirrored()[2], "answer": "yep"}]
    for rows, where in (
        ({"random": wrong}, "row 3 of the split 'random'"),
        (pd.DataFrame(wrong), "row 3 of the data frame"),
        (iter(wrong), "row 3"),
    ):
        with pytest.raises(ValueError, match=f"^{where}: the label is 'yep'"):
            evaluate.read_pope(rows)


def no_questions(tmp_path: Path) -> list[tuple[str, Any, Any]]:
    empty, nothing = tmp_path / "empty", tmp_path / "nothing.json"
    empty.mkdir()
    nothing.touch()
    picture = tmp_path / "picture.json"
    picture.write_bytes(b"\xff\xd8\xff")
    return [
        (
            f"there is no file '{tmp_path / 'x.json'}' of questions; give a POPE file, a folder of them, or 'demo'.",
            tmp_path / "x.json",
            None,
        ),
        (f"the folder '{empty}' holds no questions; they are in files that end in .json or .jsonl.", empty, None),
        ("these questions are empty; give a file with a question in each line.", nothing, None),
        (
            f"'{picture}' is no text; give questions as JSON, or as rows, such as a pandas data frame.",
            picture,
            None,
        ),
        (
            "7 holds no questions; give a POPE file, a folder of them, rows as in lmms-lab/POPE, or 'demo'.",
            7,
            None,
        ),
        ("these questions have no split 'hard'; they have random, popular, adversarial.", "demo", "hard"),
        ("split=[] names no split; give a name, a list of names, or None for all.", "demo", []),
        ("split=3 names no split; give a name, a list of names, or None for all.", "demo", 3),
        (f"the file '{picture}' of questions was given twice; give each file once.", [picture, str(picture)], None),
    ]


@pytest.mark.usefixtures("untyped")
def test_what_holds_no_questions_is_refused(tmp_path: Path) -> None:
    for sentence, questions, split in no_questions(tmp_path):
        with pytest.raises((ValueError, TypeError)) as refused:
            evaluate.read_pope(questions, split)
        assert str(refused.value) == sentence


@pytest.mark.usefixtures("untyped")
def test_missing_and_damaged_pictures_are_found_before_the_model_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, folder = written(tmp_path, *ROWS), tmp_path / "val2014"
    folder.mkdir()
    monkeypatch.setattr(mv.VLM, "run", lambda *_, **__: pytest.fail("the model ran"))

    def said(images: Any) -> str:
        with pytest.raises((ValueError, TypeError)) as refused:
            evaluate.pope(tiny.vlm(), path, images)
        return str(refused.value).replace(str(tmp_path), "")

    assert said(folder) == (
        "coco_pope_random.json, line 1: there is no file '/val2014/a.png'; give the path of one picture (wrong as "
        "well: coco_pope_random.json, line 3)."
    )
    PICTURES["a.png"].save(folder / "a.png")
    (folder / "b.png").write_text("no picture")
    assert said(folder) == (
        "coco_pope_random.json, line 3: '/val2014/b.png' is not a picture that Pillow can read; save it as PNG or JPEG."
    )
    assert said({"a.png": PICTURES["a.png"]}) == (
        "coco_pope_random.json, line 3: images holds no 'b.png'; give every picture by its name."
    )
    assert said({**PICTURES, "a.png": 3}) == (
        "coco_pope_random.json, line 1: int is not a picture; give a path, bytes, a PIL image or a numpy array."
    )
    assert said(None) == (
        "coco_pope_random.json, line 1: the picture 'a.png' did not come with its question; give images=, a folder, a "
        "mapping from names to pictures, or a function (wrong as well: coco_pope_random.json, line 3)."
    )
    assert said(path) == "images='/coco_pope_random.json' is no folder; give the one that holds the pictures."
    assert said(3) == "images=3 gives no pictures; give a folder, a mapping or a function of a name."


def test_pictures_from_a_folder_a_mapping_and_a_function_are_the_same(tmp_path: Path) -> None:
    for name, picture in PICTURES.items():
        picture.save(tmp_path / name)
    bare = [{**row, "image": str(row["image"]).removesuffix(".png")} for row in ROWS]
    found = [
        evaluate.pope(tiny.vlm(), ROWS, tmp_path),
        evaluate.pope(tiny.vlm(), ROWS, PICTURES),
        evaluate.pope(tiny.vlm(), ROWS, lambda name: PICTURES[name]),
        evaluate.pope(tiny.vlm(), bare, str(tmp_path)),
        evaluate.pope(tiny.vlm(), mirrored()),
    ]
    for one in found[1:]:
        np.testing.assert_array_equal(one.margin, found[0].margin)


# -- parsers and scoring ---------------------------------------------------------------------------------------------

ANSWERS = {  # what each rule makes of an answer: official, opera, vcd (of a yes, of a no), lmms-eval, viar, first-word
    "Yes": ("yes", "yes", "yes", "yes", "yes", "yes", "yes"),
    "no": ("no", "no", "no", "no", "no", "no", "no"),
    "": ("yes", "yes", "no", "yes", "other", "no", "other"),
    "NO": ("yes", "no", "no", "no", "no", "no", "no"),
    "No.": ("no", "no", "no", "no", "other", "no", "no"),
    "Nope": ("yes", "yes", "no", "no", "other", "no", "other"),
    "Yes, no doubt": ("no", "no", "yes", "no", "other", "yes", "yes"),
    "Yes. It is not red.": ("yes", "no", "yes", "no", "other", "yes", "yes"),
    "There is not a dog in the image.": ("no", "no", "no", "no", "other", "no", "other"),
    "There isn't a dog.": ("yes", "no", "no", "yes", "other", "no", "other"),
    "I cannot tell": ("yes", "yes", "no", "no", "other", "no", "other"),
    "In the image, yes": ("yes", "yes", "yes", "yes", "other", "no", "other"),
    "**Yes**": ("yes", "yes", "yes", "yes", "other", "yes", "yes"),
    "yesterday": ("yes", "yes", "yes", "yes", "other", "yes", "other"),
    "A dog.No cat": ("yes", "yes", "no", "no", "other", "no", "other"),
}


def test_the_parsers_disagree_as_their_sources_do() -> None:
    for answer, expected in ANSWERS.items():
        made = [
            *(PARSERS[name](answer, "yes") for name in ("official", "opera")),
            *(PARSERS["vcd"](answer, label) for label in ("yes", "no")),
            *(PARSERS[name](answer, "no") for name in ("lmms-eval", "viar", "first-word")),
        ]
        assert dict(zip(range(7), made, strict=True)) == dict(zip(range(7), expected, strict=True)), answer
    assert list(PARSERS) == ["official", "opera", "vcd", "lmms-eval", "viar", "first-word"]


def test_margins_are_log_odds_of_the_joined_spellings(generator: torch.Generator) -> None:
    logits = torch.randn(5, tiny.VOCABULARY, generator=generator)
    p = np.exp(logits.double().numpy())
    p /= p.sum(1, keepdims=True)
    vlm, tokens = tiny.vlm(), {"yes": [3, 7], "no": [4]}
    for joined, over in (("logsumexp", np.sum), ("max", np.max)):
        margins, either = scoring_of(vlm, joined, tokens)(logits)
        yes, no = over(p[:, [3, 7]], axis=1), p[:, 4]
        np.testing.assert_allclose(margins, np.log(yes / no), atol=1e-6)
        np.testing.assert_allclose(either, yes + no, atol=1e-6)
    assert scoring_of(vlm).yes == tuple(vlm.token_ids("yes"))
    lower = scoring_of(vlm, tokens="lower-case")
    assert (vlm.word(lower.yes[0]), vlm.word(lower.no[0])) == ("yes", "no")


# -- answers ---------------------------------------------------------------------------------------------------------

PLAIN = ("llava", "llava_next-mistral", "instructblip", "gemma3", "idefics3", "mllama")


def biased(prompt: mv.Prompt) -> list[mv.Edit]:
    """Attention to words that stand at other positions in each question."""
    return [mv.bias_attention(0, prompt.find("image")[-1:], 3.0), mv.ablate_heads(0, [1])]


@pytest.mark.parametrize("name", PLAIN)
def test_every_answer_is_that_of_its_own_pass(name: str) -> None:
    """Without edits that of transformers' own model; with edits, a function of the prompt, that of `vlm.run`."""
    vlm = zoo.build(name)
    items = evaluate.read_pope(
        {"random": ROWS, "popular": [{**ROWS[2], "question_id": 1}, ROWS[0] | {"question_id": 2}]}
    )
    base = evaluate.pope(vlm, items, PICTURES)
    edited = evaluate.pope(vlm, items, PICTURES, biased, batch_size=1)
    ids = [vlm.token_ids(word) for word in ("yes", "no")]
    for number, item in enumerate(items):
        prompt = vlm.prompt(PICTURES[item.image], item.question)
        with torch.no_grad():
            own = vlm.hf(**prompt.encoding, use_cache=False).logits[0, -1].double().softmax(-1)
        p = [float(own[one].sum()) for one in ids]
        assert float(base.p_yes[number]) == pytest.approx(p[0] / sum(p), abs=1e-5)
        assert float(base.margin[number]) == pytest.approx(np.log(p[0] / p[1]), abs=1e-4)
        assert float(base.p_either[number]) == pytest.approx(sum(p), abs=1e-5)
        alone = vlm.metric(mv.logit_difference("yes", "no"))(vlm.run(prompt, edits=biased(prompt)).logits)
        assert float(edited.margin[number]) == pytest.approx(float(alone[0]), abs=1e-5)
    assert base.predicted.values.tolist() == ["yes" if margin > 0 else "no" for margin in base.margin]
    assert (base.correct == (base.predicted == base.label)).all()
    assert float(abs(edited.margin - base.margin).min()) > 1e-4


def test_what_is_asked_twice_runs_once_and_pictures_run_together(monkeypatch: pytest.MonkeyPatch) -> None:
    own, asked = Task.answers, list[list[int]]()

    def counting(self: Task, items: Any) -> Any:
        asked.append([item.number for item in items])
        return own(self, items)

    monkeypatch.setattr(Task, "answers", counting)
    turned = [ROWS[2], *ROWS[:2], {**ROWS[2], "text": "is there a cat ?", "question_id": 4}]
    found = evaluate.pope(tiny.vlm(), {"random": turned, "popular": ROWS}, PICTURES)
    assert asked == [[0, 3], [1, 2]]
    assert found.duplicate_of.values.tolist() == [0, 1, 2, 3, 1, 2, 0]
    np.testing.assert_array_equal(found.margin, found.margin.values[found.duplicate_of])
    asked.clear()
    again = evaluate.pope(tiny.vlm(), {"random": turned, "popular": ROWS}, PICTURES, batch_size=1)
    assert asked == [[0], [3], [1], [2]]
    np.testing.assert_allclose(again.margin, found.margin, atol=1e-5)


def test_generated_answers_are_those_of_each_prompt_alone() -> None:
    vlm = zoo.build("llava")
    rule: Callable[[str, str], str] = lambda answer, label: "yes" if len(answer) % 2 else "other"  # noqa: ARG005, E731
    for edits in ([mv.ablate_heads(0, [1])], biased):
        found = evaluate.pope(vlm, ROWS, PICTURES, edits, parser=rule, max_new_tokens=4)
        for number, row in enumerate(ROWS):
            prompt = vlm.prompt(PICTURES[str(row["image"])], str(row["text"]))
            its = edits(prompt) if callable(edits) else edits
            alone = vlm.generate(prompt, its, max_new_tokens=4, do_sample=False).text
            assert str(found.answer.values[number]) == alone
            assert str(found.predicted.values[number]) == rule(str(alone), "")
    assert found.attrs["decoding"] == "greedy, at most 4 new tokens; the checkpoint's own settings: eos_token_id 2"
    late = [mv.Edit("text.1.resid_post", lambda x: x + 5, when="decode")]
    after = evaluate.pope(vlm, ROWS, PICTURES, late, parser="first-word", max_new_tokens=4)
    np.testing.assert_array_equal(after.margin, evaluate.pope(vlm, ROWS, PICTURES).margin)


def test_settings_of_generation_that_act_are_recorded_and_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm = tiny.vlm()
    given: dict[str, Any] = {"images": PICTURES, "parser": "first-word", "max_new_tokens": 2, "out": tmp_path}
    evaluate.pope(vlm, ROWS, **given)
    monkeypatch.setattr(vlm.hf.generation_config, "repetition_penalty", 50.0)
    monkeypatch.setattr(vlm.hf.generation_config, "bad_words_ids", [[7]])
    with pytest.raises(ValueError, match="holds another evaluation"):
        evaluate.pope(vlm, ROWS, **given)
    assert evaluate.pope(vlm, ROWS, **given | {"out": None}).attrs["decoding"] == (
        "greedy, at most 2 new tokens; the checkpoint's own settings: bad_words_ids [[7]]; eos_token_id 2; "
        "repetition_penalty 50.0"
    )


def test_a_template_stands_around_each_question_or_is_the_whole_prompt() -> None:
    vlm = tiny.vlm()
    template = "the image : {question} yes , no ?"
    found = evaluate.pope(vlm, ROWS, PICTURES, template=template)
    question = str(ROWS[0]["text"])
    prompt = vlm.prompt(PICTURES["a.png"], template.replace("{question}", question))
    margin = vlm.metric(mv.logit_difference("yes", "no"))(vlm.run(prompt).logits)
    assert float(found.margin[0]) == pytest.approx(float(margin[0]), abs=1e-6)
    assert found.attrs["template"] == template
    assert found.attrs["prompt"] == prompt.text
    whole = evaluate.pope(vlm, ROWS, PICTURES, template="viar-2026")
    assert whole.attrs["prompt"] == f"USER: <image>\n{question}\nAnswer with yes or no.\nASSISTANT:"
    named = evaluate.pope(vlm, ROWS, PICTURES, template="vcd")
    assert named.attrs["prompt"].count(f"{question} Please answer this question with one word.") == 1


def test_the_record_names_all_that_the_numbers_rest_on(tmp_path: Path) -> None:
    vlm, path = tiny.vlm(), written(tmp_path, *ROWS)
    found = evaluate.pope(vlm, path, PICTURES, evaluate.edits_from("bias:2.0@1-2"), joined="max")
    about = found.attrs
    assert about["edits"] == "; ".join(f"bias +2 attention to 16 keys at text.{layer}.scores" for layer in (1, 2))
    assert about["edits_given"] == "bias:2.0@1-2"
    assert about["questions"].startswith("coco_pope_random.json sha256 ")
    assert about["scoring"].startswith("first token's logits, max over the ids of yes")
    assert (about["model"], about["dtype"], about["attention"]) == ("tiny", "float32", "sdpa")
    assert (about["split"], about["parser"], about["decoding"]) == ("random", "none", "none: the first token's logits")
    assert json.loads(about["preprocessing"])["image_mean"] == [0.5, 0.5, 0.5]
    found.to_netcdf(tmp_path / "found.nc", engine="h5netcdf")
    xr.testing.assert_equal(found, xr.open_dataset(tmp_path / "found.nc", engine="h5netcdf"))
    one = {**ROWS[0], "label": "no"}
    other = evaluate.pope(vlm, [one, *ROWS[1:]], {**PICTURES, "b.png": tiny.picture(3)})
    assert all(about[name] != other.attrs[name] for name in ("questions_sha256", "pictures_sha256", "edits", "scoring"))


def test_the_demo_is_asked_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its questions and pictures; the answers are right ones, since asking for 900 of them takes seconds."""

    def right(_: Task, items: Any) -> Any:
        return [(1.0 if item.label == "yes" else -1.0, 1.0, "") for item in items], "right answers"

    monkeypatch.setattr(Task, "answers", right)
    found = evaluate.pope(mv.load("demo"), "demo", split="adversarial")
    assert found.sizes["item"] == 900
    assert bool(found.correct.all())
    assert found.attrs["engine"] == "150 x right answers"
    assert found.question.values[1] == mv.demo.pope("adversarial")[1].text


# -- stopped and started again ---------------------------------------------------------------------------------------


def test_a_stopped_evaluation_goes_on_with_the_pictures_that_were_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped while the third picture's answers are put in place, as a kill may; `test_sweeps` kills a process."""
    rows = [{**ROWS[0], "question_id": at, "image": str(at // 2), "text": f"is there a {at} ?"} for at in range(10)]
    pictures = {str(number): tiny.picture(number) for number in range(5)}
    own, put, ran, finished = Task.answers, Path.replace, list[int](), list[Path]()

    def counting(self: Task, items: Any) -> Any:
        ran.extend(item.number for item in items)
        return own(self, items)

    def stopping(self: Path, target: Path) -> Path:
        if len(finished) == 2:
            raise KeyboardInterrupt
        finished.append(put(self, target))
        return finished[-1]

    def asked_now(out: Path | None) -> xr.Dataset:
        ran.clear()
        return evaluate.pope(tiny.vlm(), rows, pictures, evaluate.edits_from("bias:1.0@1"), out=out)

    monkeypatch.setattr(Task, "answers", counting)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "replace", stopping)
        asked_now(tmp_path)
    assert ran == [0, 1, 2, 3, 4, 5]
    found = asked_now(tmp_path)
    assert ran == [4, 5, 6, 7, 8, 9]
    assert (found.attrs["answers_kept"], found.attrs["answers_computed"]) == (4, 6)
    whole = asked_now(None)
    assert (whole.attrs["answers_kept"], whole.attrs["answers_computed"]) == (0, 10)
    np.testing.assert_allclose(found.margin, whole.margin, atol=1e-6)


def test_a_broken_file_of_answers_is_named_as_an_evaluations(tmp_path: Path) -> None:
    (tmp_path / "answers-000000-x.nc").write_bytes(b"xx")
    with pytest.raises(ValueError) as refused:
        asked(out=tmp_path)
    assert str(refused.value) == (
        f"'{tmp_path / 'answers-000000-x.nc'}' is no finished part of an evaluation; take it out of the folder, and "
        "it is made again."
    )


def test_another_evaluation_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    vlm = tiny.vlm()
    given: dict[str, Any] = {"questions": ROWS, "images": PICTURES, "edits": (), "out": tmp_path / "out"}
    first = evaluate.pope(vlm, **given)
    xr.testing.assert_equal(evaluate.pope(vlm, **given), first)
    others: list[dict[str, Any]] = [
        {"edits": evaluate.edits_from("cut@1")},
        {"edits": lambda prompt: [mv.bias_attention(1, prompt.image, 2.0)]},
        {"template": "{question} yes or no ?"},
        {"joined": "max", "tokens": {"yes": [13, 14], "no": [15]}},
        {"parser": "official"},
        {"questions": ROWS[:2]},
        {"images": {**PICTURES, "b.png": tiny.picture(9)}},
    ]
    for changed in others:
        with pytest.raises(ValueError) as refused:
            evaluate.pope(vlm, **(given | changed))
        assert str(refused.value) == (
            f"out='{tmp_path / 'out'}' holds another evaluation: the model, the questions, the pictures, the edits, "
            "the template or the scoring is not the same; give another folder, or empty this one."
        )
    with pytest.raises(ValueError, match="holds another evaluation"):
        evaluate.pope(tiny.vlm(seed=1), **given)


# -- arguments -------------------------------------------------------------------------------------------------------


def asked(**given: Any) -> Any:
    return evaluate.pope(tiny.vlm(), **({"questions": ROWS, "images": PICTURES} | given))


REFUSED: list[tuple[str, dict[str, Any]]] = [
    (
        "the template 'yes or no?' has no {question}; write it where the question is to stand, or choose from plain, "
        "viar, vcd, lmms-eval, viar-2026.",
        {"template": "yes or no?"},
    ),
    ("batch_size=0 makes nothing; give 1 or more.", {"batch_size": 0}),
    ("batch_size=True is not a number; give 1 or more.", {"batch_size": True}),
    (
        "tokens={'yes': [True], 'no': [2]} are no token ids; give at least one whole number each, below 64.",
        {"tokens": {"yes": [True], "no": [2]}},
    ),
    ("edits is None; it must be a list of edits.", {"edits": None}),
    ("edits is None; it must be a list of edits.", {"edits": lambda prompt: None}),  # noqa: ARG005
    (
        "edits='bias:2@2' is text; give edits=mv.evaluate.edits_from('bias:2@2'), which makes edits of it.",
        {"edits": "bias:2@2"},
    ),
    (
        "edits=['bias:2@2', 'cut@1'] is text; give edits=mv.evaluate.edits_from('bias:2@2', 'cut@1'), which makes "
        "edits of it.",
        {"edits": ["bias:2@2", "cut@1"]},
    ),
    ("edits is ablate heads [1] at text.0.z; it must be a list of edits.", {"edits": mv.ablate_heads(0, [1])}),
    ("joined='mean' is not known; choose from 'logsumexp', 'max'.", {"joined": "mean"}),
    (
        "no parser is called 'gpt'; choose from official, opera, vcd, lmms-eval, viar, first-word, or None for logits.",
        {"parser": "gpt"},
    ),
    (
        "the parser returned 'maybe' for '{ {'; it must return 'yes', 'no' or 'other'.",
        {"parser": lambda answer, label: "maybe", "max_new_tokens": 3},  # noqa: ARG005
    ),
    (
        "tokens={'yes': [1]} does not say which tokens are yes and no; give {'yes': [ids], 'no': [ids]}, 'lower-case', "
        "or None for all spellings.",
        {"tokens": {"yes": [1]}},
    ),
    (
        "tokens={'yes': [1], 'no': [64]} are no token ids; give at least one whole number each, below 64.",
        {"tokens": {"yes": [1], "no": [64]}},
    ),
    (
        "token id 1 stands for yes and for no; give each token to one of them.",
        {"tokens": {"yes": [1], "no": [1, 2]}},
    ),
    (
        "the text tower has 3 layers, counted from 0, so there is no text.3.scores to edit.",
        {"edits": evaluate.edits_from("cut@3")},
    ),
]


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("sentence, given", REFUSED, ids=[sentence[:40] for sentence, _ in REFUSED])
def test_arguments_that_cannot_be_are_refused(
    sentence: str, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "parser" not in given:
        monkeypatch.setattr(Task, "answers", lambda *_: pytest.fail("the model was asked"))
    with pytest.raises((ValueError, TypeError)) as refused:
        asked(**given)
    assert sentence in str(refused.value)
    assert str(refused.value).endswith(".")


def test_an_edit_that_never_acts_is_refused() -> None:
    never = [mv.Edit("text.0.resid_post", lambda x: x, when="decode")]
    with pytest.raises(ValueError, match="acts in decode steps, and this run has none"):
        asked(edits=never)


def test_a_model_without_a_processor_and_a_folder_that_is_a_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as refused:
        evaluate.pope(tiny.vlm(with_processor=False), ROWS, PICTURES)
    assert str(refused.value) == (
        "this model was given no processor, so no question can be put to it; give mv.VLM one."
    )
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file; give a folder, in which what is finished is kept.$"):
        asked(out=tmp_path / "file")


# -- edits as text ---------------------------------------------------------------------------------------------------


def test_texts_are_the_edits_that_they_name() -> None:
    vlm = tiny.vlm()
    prompt = vlm.prompt(PICTURES["a.png"], str(ROWS[0]["text"]))
    named = {
        "bias:2.0@0-1": [mv.bias_attention(layer, prompt.image, 2.0) for layer in (0, 1)],
        "bias:-1.5@0,2": [mv.bias_attention(layer, prompt.image, -1.5) for layer in (0, 2)],
        "cut@2": [mv.cut_attention(2, prompt.image)],
        "ablate@1.0,1.3,2.1": [mv.ablate_heads(1, [0, 3]), mv.ablate_heads(2, [1])],
        "scale:.5@0.2": [mv.scale_heads(0, [2], 0.5)],
    }
    plain = vlm.run(prompt).logits
    for text, edits in named.items():
        made = evaluate.edits_from(text)(prompt)
        assert list(map(str, made)) == list(map(str, edits))
        torch.testing.assert_close(vlm.run(prompt, edits=made).logits, vlm.run(prompt, edits=edits).logits)
        assert not torch.allclose(vlm.run(prompt, edits=made).logits, plain)
    both = evaluate.edits_from("cut@2", "ablate@1.0")
    assert (str(both), len(both(prompt))) == ("cut@2; ablate@1.0", 2)


def test_a_bias_of_a_picture_seen_by_cross_attention_is_of_that() -> None:
    vlm = zoo.build("mllama")
    prompt = zoo.ask(vlm, tiny.picture(1))
    layer = next(number for number, kinds in enumerate(vlm.shape.kinds["text"]) if "cross_scores" in kinds)
    edits = evaluate.edits_from(f"bias:2.0@{layer}")(prompt)
    assert [str(edit.site) for edit in edits] == [f"text.{layer}.cross_scores"]
    assert not torch.allclose(vlm.run(prompt, edits=edits).logits, vlm.run(prompt).logits)


@pytest.mark.parametrize(
    "text", ["bias@3", "bias:x@3", "bias:2@", "bias:2@5-3", "cut:2@3", "ablate@3", "scale:2@3", ""]
)
def test_a_text_that_is_no_edit_is_refused(text: str) -> None:
    with pytest.raises(ValueError) as refused:
        evaluate.edits_from(text)
    assert str(refused.value) == (
        f"no edit is written {text!r}; write bias:AMOUNT@LAYERS, cut@LAYERS, ablate@LAYER.HEAD,... or "
        "scale:FACTOR@LAYER.HEAD,..., for instance bias:2.0@8-16 or ablate@3.5,4.1."
    )


def test_a_prompt_without_a_picture_has_no_attention_to_one() -> None:
    with pytest.raises(ValueError) as refused:
        evaluate.edits_from("cut@1")(tiny.vlm().prompt(None, "is there a dog ?"))
    assert str(refused.value) == (
        "attention to the picture cannot be edited in a prompt without one; give the prompt a picture."
    )
