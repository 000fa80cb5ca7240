"""Types of models that mechvlm does not read: each is refused by its name, with the reason, before weights are read."""

from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    Blip2Config,
    Blip2QFormerConfig,
    ChameleonConfig,
    FuyuConfig,
    InstructBlipConfig,
    Kosmos2Config,
    LlamaConfig,
    LlavaNextVideoConfig,
    PreTrainedConfig,
    Qwen2AudioConfig,
    T5Config,
    WhisperConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as THEIRS

import mechvlm as mv
from mechvlm import refusals, shapes
from mechvlm.archs import ARCHS
from mechvlm.refusals import REFUSED

KNOWN = ", ".join(sorted(ARCHS))


class Some(PreTrainedConfig):
    """A configuration of any type; `seeing` gives it a vision tower's."""

    def __init__(self, kind: str = "some", seeing: bool = True, **more: Any) -> None:
        super().__init__(**more)
        self.model_type = kind
        if seeing:
            self.vision_config: dict[str, Any] = {}


def refused(kind: str, reason: str) -> str:
    return f"mechvlm does not read {kind!r} models: {reason}; it knows {KNOWN}."


def said(call: Callable[[], object]) -> str:
    with pytest.raises(ValueError, match="^mechvlm does not ") as told:
        call()
    assert "\n" not in str(told.value)
    return str(told.value)


def test_every_type_that_transformers_calls_image_text_to_text_is_known_or_refused_with_a_reason() -> None:
    new = sorted(set(THEIRS) - set(ARCHS) - set(REFUSED))
    assert not new, (
        f"transformers {transformers.__version__} has new types of vision-language models: {', '.join(new)}; write a "
        "row of ARCHS in mechvlm/archs.py for each, with a builder in tests/zoo, or a reason in mechvlm/refusals.py."
    )


def test_no_type_is_both_known_and_refused() -> None:
    both = sorted(set(ARCHS) & set(REFUSED))
    assert not both, f"{', '.join(both)} now have a row in mechvlm/archs.py; take them out of mechvlm/refusals.py."


def test_every_row_and_every_reason_is_of_a_type_that_transformers_has() -> None:
    if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23):
        pytest.skip("an older transformers has fewer types")
    assert sorted((set(ARCHS) | set(REFUSED)) - set(THEIRS)) == []


@pytest.mark.parametrize("kind", REFUSED)
def test_a_type_with_a_reason_is_refused_with_it(kind: str) -> None:
    assert said(lambda: shapes.check_known(Some(kind))) == refused(kind, REFUSED[kind])


@pytest.mark.parametrize("reason", sorted({*REFUSED.values(), refusals.WORDS_ONLY}))
def test_a_reason_is_a_clause(reason: str) -> None:
    assert reason[0].islower() and not reason.endswith((".", ";", ",")) and ". " not in reason and ";" not in reason


def test_an_unknown_type_with_a_vision_tower_is_told_how_one_is_added() -> None:
    assert said(lambda: shapes.check_known(Some("brand_new"))) == (
        f"mechvlm does not know 'brand_new' models yet; it knows {KNOWN}. Adding one is a row in mechvlm/archs.py."
    )


T5 = T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=32)
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
EYE = {**SMALL, "image_size": 16, "patch_size": 8}
WHISPER = {
    "d_model": 24,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "vocab_size": 64,
    "num_mel_bins": 8,
    "pad_token_id": 0,
}


def chameleon() -> Any:
    codes = {"base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1, "attn_resolutions": []}
    return ChameleonConfig(**SMALL, vocab_size=64, vq_config=codes, vocabulary_map={"<image>": 4})


def llava_video() -> Any:
    return LlavaNextVideoConfig(
        vision_config={**EYE, "model_type": "clip_vision_model"}, text_config=LlamaConfig(**SMALL)
    )


MODELS: dict[str, tuple[Callable[[], Any], str, str, str]] = {
    "the picture as words": (chameleon, "ChameleonForConditionalGeneration", "chameleon", REFUSED["chameleon"]),
    "no image token": (
        lambda: Kosmos2Config(
            text_config={"embed_dim": 16, "layers": 1, "ffn_dim": 16, "attention_heads": 2, "vocab_size": 64},
            vision_config=EYE,
            latent_query_num=2,
        ),
        "Kosmos2ForConditionalGeneration",
        "kosmos-2",
        REFUSED["kosmos-2"],
    ),
    "no vision tower": (
        lambda: FuyuConfig(**SMALL, vocab_size=64, image_size=16, patch_size=8),
        "FuyuForCausalLM",
        "fuyu",
        REFUSED["fuyu"],
    ),
    "video": (llava_video, "LlavaNextVideoForConditionalGeneration", "llava_next_video", refusals.VIDEO_OR_SOUND),
    "an encoder-decoder of sound": (
        lambda: WhisperConfig(**WHISPER),
        "WhisperForConditionalGeneration",
        "whisper",
        refusals.ENCODER_DECODER,
    ),
    "sound": (
        lambda: Qwen2AudioConfig(text_config={**SMALL, "model_type": "qwen2", "vocab_size": 64}),
        "Qwen2AudioForConditionalGeneration",
        "qwen2_audio",
        refusals.WORDS_ONLY,
    ),
    "words alone": (lambda: LlamaConfig(**SMALL, vocab_size=64), "LlamaForCausalLM", "llama", refusals.WORDS_ONLY),
}
each_model = pytest.mark.parametrize("what", MODELS)


@each_model
def test_a_model_in_memory_is_refused_by_its_type_and_with_the_reason(what: str) -> None:
    make, name, kind, reason = MODELS[what]
    with torch.device("meta"):
        model = of(name)(make())
    assert said(lambda: mv.VLM(model.eval())) == refused(kind, reason)


def of(name: str) -> Any:
    """A class of transformers, which gives most of them out only when asked for them."""
    return attrgetter(name)(transformers)


@each_model
def test_a_folder_is_refused_by_its_type_and_with_the_reason(what: str, tmp_path: Path) -> None:
    make, _, kind, reason = MODELS[what]
    make().save_pretrained(tmp_path)
    assert said(lambda: mv.load(tmp_path)) == refused(kind, reason)


def linear(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "qwen3_5"}')


def florence(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "florence2"}')


@pytest.mark.parametrize(("kind", "write"), [("qwen3_5", linear), ("florence2", florence)])
def test_a_folder_of_which_only_the_type_is_known_is_refused_with_the_reason(
    kind: str, write: Callable[[Path], None], tmp_path: Path
) -> None:
    if kind not in THEIRS:
        pytest.skip(f"this transformers has no {kind}")
    write(tmp_path)
    assert said(lambda: mv.load(tmp_path)) == refused(kind, REFUSED[kind])


def with_t5(kind: str) -> Any:
    made = {"blip-2": Blip2Config, "instructblip": InstructBlipConfig}[kind]
    qformer = {**SMALL, "vocab_size": 32, "encoder_hidden_size": 16}
    if kind == "blip-2":
        qformer = Blip2QFormerConfig(**qformer)
    return made(vision_config=EYE, qformer_config=qformer, text_config=T5, num_query_tokens=2, image_token_index=3)


@pytest.mark.parametrize("kind", ["blip-2", "instructblip"])
def test_a_known_type_with_an_encoder_decoder_as_its_language_model_is_refused(kind: str, tmp_path: Path) -> None:
    sentence = (
        f"mechvlm does not read {kind!r} models whose language model is a 't5': {refusals.ENCODER_DECODER}; take one "
        "with a decoder."
    )
    config = with_t5(kind)
    names = {"blip-2": "Blip2ForConditionalGeneration", "instructblip": "InstructBlipForConditionalGeneration"}
    with torch.device("meta"):
        model = of(names[kind])(config)
    assert said(lambda: mv.VLM(model.eval())) == sentence
    config.save_pretrained(tmp_path)
    assert said(lambda: mv.load(tmp_path)) == sentence
