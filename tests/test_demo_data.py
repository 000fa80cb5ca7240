"""The demo's data is what its card says: handwriting kept apart, right labels, POPE's format, reproducible files."""

import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from mechvlm import demo, images
from mechvlm.demo import benchmark, build, card, handwriting, packing, train
from mechvlm.demo.questions import ASKERS, is_there

POPE = demo.HERE / "pope"


def test_handwriting_of_the_splits_is_disjoint_and_complete() -> None:
    splits = [{glyph for digit in handwriting.pool(split) for glyph in digit} for split in handwriting.SPLITS]
    assert all(not one & other for one, other in itertools.combinations(splits, 2))
    assert len(set.union(*splits)) == len(handwriting.glyphs()) == 1797


def test_benchmark_uses_benchmark_handwriting_only() -> None:
    pool = handwriting.pool("benchmark")
    items = [item for picture in demo.scenes() for item in picture.scene.items]
    assert all(item.glyph in pool[item.digit] for item in items)


@pytest.mark.parametrize("split", demo.SPLITS)
def test_labels_agree_with_what_is_in_the_scenes(split: str) -> None:
    present = {picture.file.name: benchmark.present(picture.scene) for picture in demo.scenes()}
    held = {name: {is_there(*thing) for thing in things} for name, things in present.items()}
    for question in demo.pope(split):
        assert question.label == ("yes" if question.text in held[question.image] else "no")


@pytest.mark.parametrize("split", demo.SPLITS)
def test_files_are_balanced_and_in_the_format_of_pope(split: str) -> None:
    records = [json.loads(line) for line in (POPE / f"digits_pope_{split}.json").read_text().splitlines()]
    assert all(list(record) == ["question_id", "image", "text", "label"] for record in records)
    assert [record["question_id"] for record in records] == list(range(1, len(records) + 1))
    assert set(Counter((record["image"], record["label"]) for record in records).values()) == {3}
    assert len({record["image"] for record in records}) >= 100
    assert len({(record["image"], record["text"]) for record in records}) == len(records)
    assert all((POPE / "images" / record["image"]).exists() for record in records)


def test_splits_differ_only_in_what_is_asked_for_in_vain() -> None:
    asked = [demo.pope(split) for split in demo.SPLITS]
    assert all(len(set(row)) == 1 for row in zip(*asked, strict=True) if row[0].label == "yes")
    assert len(set(map(tuple, asked))) == len(demo.SPLITS)


def test_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="no split 'easy'; it has random, popular, adversarial"):
        demo.pope("easy")


def test_the_command_reproduces_the_files(tmp_path: Path) -> None:
    benchmark.main(tmp_path)
    files = sorted(path.relative_to(POPE) for path in POPE.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    for file in files:
        if file.suffix == ".png":  # compared as pixels, since another zlib may pack them otherwise
            assert np.array_equal(np.asarray(Image.open(POPE / file)), np.asarray(Image.open(tmp_path / file))), file
        else:
            assert (POPE / file).read_bytes() == (tmp_path / file).read_bytes(), file


def test_batches_follow_from_the_seed() -> None:
    one, other = (packing.draw(5, 3, train.EVAL) for _ in range(2))
    assert torch.equal(one.pixels, other.pixels)
    assert one.turns == other.turns


def test_training_sees_the_pixels_that_the_processor_makes() -> None:
    pictures = demo.scenes()[:4]
    made = build.processor().image_processor([picture.image for picture in pictures], return_tensors="pt").pixel_values
    assert torch.equal(made, packing.pixel_values(np.stack([np.asarray(picture.image) for picture in pictures])))


def test_every_word_of_every_question_is_known() -> None:
    batch = packing.draw(1, 60, train.EVAL)
    assert {turn.kind for turns in batch.turns for turn in turns} == set(ASKERS)
    assert not (batch.tokens == packing.vocabulary()["<unk>"]).any()


def test_a_packed_turn_is_computed_as_if_asked_alone() -> None:
    torch.manual_seed(0)
    model, processor = build.model().eval(), build.processor()
    batch = packing.draw(3, 2, train.EVAL)
    with torch.no_grad():
        logits = iter(train.answers(model, batch, train.features(model, batch)))
        for pixels, turns in zip(batch.pixels, batch.turns, strict=True):
            for turn in turns:
                text = f"USER: <image>\n{turn.question} ASSISTANT: {turn.answer}"
                text = text.replace("<image>", "<image>" * packing.GRID**2)
                tokens = processor.tokenizer(text, return_tensors="pt").input_ids
                alone = model(input_ids=tokens, pixel_values=pixels[None]).logits[0]
                for row in alone[-len(turn.answer.split()) - 1 :]:
                    torch.testing.assert_close(row, next(logits), atol=1e-5, rtol=0)
    assert next(logits, None) is None


def test_interrupted_training_goes_on_as_if_nothing_had_been(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "accuracy", lambda _: {})  # takes seconds, and trains nothing
    threads = torch.get_num_threads()
    train.main(tmp_path / "whole", steps=2, threads=threads, workers=0)
    train.main(tmp_path / "parts", steps=1, threads=threads, workers=0)
    train.main(tmp_path / "parts", steps=2, threads=threads, workers=0)
    whole, parts = (torch.load(tmp_path / run / "state.pt", weights_only=True) for run in ("whole", "parts"))
    assert whole["step"] == parts["step"] == 2
    assert all(torch.equal(weight, parts["model"][name]) for name, weight in whole["model"].items())


def test_the_schedule_is_continuous() -> None:
    ends = [sum(phase.steps for phase in train.SCHEDULE[: i + 1]) for i in range(len(train.SCHEDULE))]
    assert [train.phase_at(end - 1)[0] for end in ends] == list(train.SCHEDULE)
    assert train.rate_at(0) < train.SCHEDULE[0].rate[0] / 100
    assert train.rate_at(ends[-1] - 1) < 1e-6
    with pytest.raises(ValueError, match="the schedule ends 1 steps earlier"):
        train.phase_at(ends[-1])


def test_shipped_model_is_small_and_safe() -> None:
    files = [path for path in demo.path().iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12 * 2**20
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jinja"}


def test_shipped_model_looks_at_the_image() -> None:
    model = LlavaForConditionalGeneration.from_pretrained(demo.path(), dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(demo.path())
    pictures = {picture.file.name: picture.image for picture in demo.scenes()}
    asked = demo.pope("adversarial")[:120]
    said = card.answer(model, processor, [(pictures[question.image], question.text) for question in asked])
    assert np.mean([word == question.label for (word, _), question in zip(said, asked, strict=True)]) >= 0.93
    black = card.answer(
        model, processor, [(images.black(pictures[question.image]), question.text) for question in asked]
    )
    assert {word for word, _ in black} == {"no"}
