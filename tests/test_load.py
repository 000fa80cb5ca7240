"""What a checkpoint can have wrong with it, each said in a sentence before anything is computed from it."""

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import mechvlm as mv
from mechvlm.cli import null_image

Case = tuple[str, Callable[[], object]]


def broken(config: Callable[[dict[str, Any]], object] | None = None, **files: str | bytes | None) -> Path:
    """A copy of the demo model's folder with its configuration changed, or files replaced or (None) taken away."""
    folder = Path(tempfile.mkdtemp()) / "model"
    shutil.copytree(mv.demo.path(), folder)
    if config is not None:
        held = json.loads((folder / "config.json").read_text())
        config(held)
        (folder / "config.json").write_text(json.dumps(held))
    for name, content in files.items():
        path = folder / {"weights": "model.safetensors", "template": "chat_template.jinja"}.get(name, "config.json")
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def text(**changes: object) -> Callable[[dict[str, Any]], object]:
    return lambda config: config["text_config"].update(changes)


def load(folder: Path) -> Callable[[], object]:
    """Loading it, with the folder's own name kept out of the sentence."""

    def loading() -> object:
        try:
            return mv.load(folder)
        except ValueError as error:
            error.args = (str(error).replace(str(folder), "FOLDER"),)
            raise

    return loading


def ask(template: str) -> Callable[[], object]:
    return lambda: mv.load(broken(template=template)).prompt(tiny.picture(), "is there a cat ?")


CASES: list[Case] = [
    (
        "the checkpoint 'FOLDER' does not hold the weights model.language_model.layers.8.input_layernorm.weight, one "
        "of 18 that its config.json asks for; mechvlm runs no made-up weights, so correct the configuration or "
        "complete the checkpoint.",
        load(broken(text(num_hidden_layers=10))),
    ),
    (
        "the weights model.language_model.layers.0.mlp.down_proj.weight of 'FOLDER' are 128 x 384 and its config.json "
        "asks for 128 x 100; the two must be of one model.",
        load(broken(text(intermediate_size=100))),
    ),
    (
        "the model 'FOLDER' could not be loaded (Error while deserializing header: header too large).",
        load(broken(weights=b"x" * 1000)),
    ),
    (
        "the config.json in 'FOLDER' could not be read (It looks like the config file at 'FOLDER/config.json' is not a "
        "valid JSON file).",
        load(broken(config_json="{broken")),
    ),
    (
        "the config.json in 'FOLDER' could not be read (Class validation error for validator 'validate_architecture': "
        "ValueError: The hidden size (128) is not a multiple of the number of attention heads (7)).",
        load(broken(text(num_attention_heads=7))),
    ),
    (
        "the directory 'FOLDER' holds no config.json, so it is no checkpoint; give the folder that save_pretrained "
        "wrote.",
        load(broken(config_json=None)),
    ),
    (  # the sentence of mechvlm.shapes, before any weights are read
        "this llava model has a 'gpt2' as its text tower, which mechvlm does not know yet; adding one is a row of "
        "TOWER_TYPES in mechvlm/towers.py.",
        load(broken(text(model_type="gpt2"), weights=None)),
    ),
    (
        "the attention implementation is 'flash_attention_3'; mechvlm reads sdpa, eager, flex_attention and "
        "flash_attention_2 exactly. Set vlm.attention, or load with attn_implementation='sdpa'.",
        lambda: mv.load("demo", attn_implementation="flash_attention_3"),
    ),
]
"""Sentences, and what they are said of; tests/test_errors.py knows by them that every raise is reached."""


@pytest.mark.parametrize("message, wrong", CASES, ids=[message[:60] for message, _ in CASES])
def test_message(message: str, wrong: Callable[[], object]) -> None:
    with pytest.raises(ValueError) as caught:
        wrong()
    assert str(caught.value) == message


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this machine has MPS; runs wherever there is none")
def test_there_is_no_mps() -> None:
    with pytest.raises(ValueError) as caught:
        mv.load("demo", device="mps")
    assert str(caught.value) == "device 'mps' was asked for, and this machine has no MPS; use device='cpu'."


def test_tied_weights_are_not_missing(tmp_path: Path) -> None:
    """What a checkpoint holds once, under the name of the embeddings, is all there."""
    model = tiny.model()
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
    model.lm_head.weight = model.model.language_model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    tiny.processor().save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    save_file({k: v for k, v in held.items() if "lm_head" not in k}, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = mv.load(tmp_path).hf
    assert torch.equal(loaded.lm_head.weight, model.model.language_model.embed_tokens.weight)


@pytest.mark.parametrize(
    "template, why",
    [
        ("{{ broken", "unexpected end of template, expected 'end of print statement'"),
        ("{{ raise_exception('no') }}", "no"),
        (
            "{% for one in messages %}{{ 'USER: ' + one['content'] }}{% endfor %}",
            'can only concatenate str (not "list") to str',
        ),
    ],
)
def test_a_template_that_does_not_fit(template: str, why: str) -> None:
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(ValueError) as caught:
            ask(template)()
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_picture_of_too_many_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.picture(0, 40, 30).save(tmp_path / "large.png")
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError) as caught:
        null_image(f"swap({tmp_path / 'large.png'})")
    assert str(caught.value) == (
        f"'{tmp_path / 'large.png'}' has more pixels than Pillow opens (Image size (1200 pixels) exceeds limit of 200 "
        "pixels, could be decompression bomb DOS attack); give a smaller copy."
    )
