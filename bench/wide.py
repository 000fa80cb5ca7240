"""Random models that are wide enough to time, with ready encodings: LLaVA, and one model for each kind of obstacle.

Weights are drawn so that a sum over inputs has a spread of about one, whatever the width; scores of the language model
then have a spread of about two, and logits of about one. Nothing is downloaded. Every prompt is some words, image
tokens and some words; a second draw gives the prompt that is patched from, with other words and another picture.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig

IMAGE, MARKS, WORDS = 31, (32, 33), 40
"""The image token, those around an image where there are any, and the first id that is a word."""
KINDS_WIDTH, KINDS_LAYERS, VOCABULARY = 256, 8, 2000

Encoding = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Size:
    """A LLaVA's: text and vision tower, pixels along a side, words beside the image tokens."""

    width: int
    layers: int
    heads: int
    mlp: int
    vocabulary: int
    tower: tuple[int, int, int, int]  # width, layers, heads, MLP
    pixels: int
    words: int

    @property
    def image(self) -> int:
        """Image tokens, of squares of 14 pixels."""
        return (self.pixels // 14) ** 2


SIZES = {
    "tiny": Size(64, 3, 4, 172, 200, (32, 3, 2, 128), 42, 11),
    "small": Size(256, 8, 8, 688, 2000, (96, 4, 4, 384), 168, 24),
    "pope": Size(512, 12, 8, 1376, 2000, (256, 6, 4, 1024), 336, 30),
    "7b": Size(4096, 32, 32, 11008, 32064, (1024, 24, 16, 4096), 336, 40),
}


@dataclass(frozen=True)
class Wide:
    """A model, and from a seed to an encoding; `obstacle` says why it is here."""

    model: Any
    encoding: Callable[[int], Encoding]
    obstacle: str = ""


def drawn(kind: Any, config: Any, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """A model of a class with random weights, in evaluation mode."""
    with torch.device(device):
        model = kind._from_config(config, attn_implementation="sdpa", dtype=dtype)
    draw = torch.Generator(device).manual_seed(0)
    table = model.get_input_embeddings().weight
    tied = table is model.get_output_embeddings().weight
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight is table:
                weight.normal_(0, weight.shape[1] ** -0.5 if tied else 1.0, generator=draw)  # Gemma scales them up
            elif "embed" in name and "patch" not in name:
                weight.normal_(0, 1, generator=draw)
            elif weight.ndim > 1:
                sharp = 1.4 if "q_proj" in name or "k_proj" in name else 1.0
                weight.normal_(0, sharp / weight[0].numel() ** 0.5, generator=draw)
            elif weight.numel() == 1 and "gate" in name:
                weight.fill_(0.5)  # Mllama's, which transformers starts at zero, so that no picture is seen
    return model.eval().requires_grad_(False)


def asked(seed: int, before: int, image: int, words: int, marks: bool = False) -> Encoding:
    """Words, image tokens and words, with no picture yet."""
    ids = torch.randint(WORDS, 200, (1, words), generator=torch.Generator().manual_seed(seed))
    around = [torch.tensor([[mark]]) for mark in MARKS] if marks else [ids[:, :0], ids[:, :0]]
    parts = [ids[:, :before], around[0], torch.full((1, image), IMAGE), around[1], ids[:, before:]]
    found = torch.cat(parts, 1)
    return {"input_ids": found, "attention_mask": torch.ones_like(found)}


def pixels(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1000 + seed))


def text(kind: Any, **more: Any) -> Any:
    """The language model of every kind of obstacle."""
    given = {
        "hidden_size": KINDS_WIDTH,
        "intermediate_size": 688,
        "num_hidden_layers": KINDS_LAYERS,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 1024,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return kind(**given | more)


def tower(kind: Any, side: int, patch: int, **more: Any) -> Any:
    """A vision tower of four layers."""
    given = {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
    return kind(**given, image_size=side, patch_size=patch, **more)


def llava(name: str, device: str, dtype: torch.dtype) -> Wide:
    """LLaVA-1.5 in a size of `SIZES`."""
    size = SIZES[name]
    width, layers, heads, mlp = size.tower
    vision = hf.CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=size.pixels,
        patch_size=14,
    )
    language = hf.LlamaConfig(
        hidden_size=size.width,
        intermediate_size=size.mlp,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        vocab_size=size.vocabulary,
        max_position_embeddings=2048,
    )
    config = hf.LlavaConfig(
        vision_config=vision, text_config=language, image_token_index=IMAGE, image_seq_length=size.image
    )

    def encoding(seed: int) -> Encoding:
        return {**asked(seed, 5, size.image, size.words), "pixel_values": pixels(seed, 1, 3, size.pixels, size.pixels)}

    return Wide(drawn(hf.LlavaForConditionalGeneration, config, device, dtype), encoding)


def llava_next() -> Wide:
    """Two squares of 6 x 6 beside all of the picture in one, and a newline behind each of 6 rows."""
    config = hf.LlavaNextConfig(
        vision_config=tower(hf.CLIPVisionConfig, 84, 14),
        text_config=text(hf.LlamaConfig),
        image_token_index=IMAGE,
        image_seq_length=36,
        image_grid_pinpoints=[[84, 168], [168, 84], [168, 168]],
    )

    def encoding(seed: int) -> Encoding:
        sizes = torch.tensor([[84, 168]])
        return {**asked(seed, 5, 36 + 6 * 13, 40), "pixel_values": pixels(seed, 1, 3, 3, 84, 84), "image_sizes": sizes}

    return Wide(drawn(hf.LlavaNextForConditionalGeneration, config), encoding, "any-resolution tiles")


def qwen(kind: Any, config: Any, vision: Mapping[str, Any], rope: Mapping[str, Any], obstacle: str) -> Wide:
    """A Qwen: 24 x 24 patches, merged to 12 x 12 tokens, and positions in three directions."""
    shared = {"depth": 4, "hidden_size": 96, "intermediate_size": 384, "num_heads": 4, "out_hidden_size": KINDS_WIDTH}
    cut = {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
    language = text(
        dict,
        num_key_value_heads=4,
        head_dim=32,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, **rope},
    )
    made = config(
        text_config=language,
        vision_config=shared | cut | dict(vision),
        image_token_id=IMAGE,
        video_token_id=34,
        vision_start_token_id=MARKS[0],
        vision_end_token_id=MARKS[1],
        tie_word_embeddings=False,
    )

    def encoding(seed: int) -> Encoding:
        found = asked(seed, 5, 144, 22, marks=True)
        found["mm_token_type_ids"] = (found["input_ids"] == IMAGE).long()
        return {**found, "pixel_values": pixels(seed, 576, 96), "image_grid_thw": torch.tensor([[1, 24, 24]])}

    return Wide(drawn(kind, made), encoding, obstacle)


def qwen2_5_vl() -> Wide:
    vision = {"window_size": 32, "fullatt_block_indexes": [1, 3]}
    rope = {"mrope_section": [4, 6, 6]}
    return qwen(hf.Qwen2_5_VLForConditionalGeneration, hf.Qwen2_5_VLConfig, vision, rope, "m-rope")


def qwen3_vl() -> Wide:
    vision = {"num_position_embeddings": 576, "deepstack_visual_indexes": [0, 2]}
    rope = {"mrope_section": [8, 4, 4], "mrope_interleaved": True}
    return qwen(hf.Qwen3VLForConditionalGeneration, hf.Qwen3VLConfig, vision, rope, "deep-stack")


def siglip(side: int) -> Any:
    return tower(hf.SiglipVisionConfig, side, 7, vision_use_head=False)


def gemma3() -> Wide:
    """Images that see themselves, and a window of 64 in seven layers of eight."""
    windows = ["full_attention" if layer == 5 else "sliding_attention" for layer in range(KINDS_LAYERS)]
    language = text(hf.Gemma3TextConfig, head_dim=32, query_pre_attn_scalar=32, sliding_window=64, layer_types=windows)
    config = hf.Gemma3Config(
        vision_config=siglip(168),
        text_config=language,
        mm_tokens_per_image=144,
        boi_token_index=MARKS[0],
        eoi_token_index=MARKS[1],
        image_token_index=IMAGE,
    )

    def encoding(seed: int) -> Encoding:
        found = asked(seed, 5, 144, 22, marks=True)
        found["token_type_ids"] = (found["input_ids"] == IMAGE).long()
        return {**found, "pixel_values": pixels(seed, 1, 3, 168, 168)}

    return Wide(drawn(hf.Gemma3ForConditionalGeneration, config), encoding, "image tokens see each other")


def paligemma() -> Wide:
    config = hf.PaliGemmaConfig(
        vision_config=siglip(84),
        text_config=text(hf.GemmaConfig, num_key_value_heads=1, head_dim=32),
        image_token_index=IMAGE,
        projection_dim=KINDS_WIDTH,
        hidden_size=KINDS_WIDTH,
    )

    def encoding(seed: int) -> Encoding:
        found = asked(seed, 0, 144, 24)
        found["token_type_ids"] = torch.zeros_like(found["input_ids"])
        return {**found, "pixel_values": pixels(seed, 1, 3, 84, 84)}

    return Wide(drawn(hf.PaliGemmaForConditionalGeneration, config), encoding, "all of the prompt sees all of it")


def instructblip() -> Wide:
    """144 queries, which read the question and 13 x 13 patches in every other layer of a Q-Former."""
    queries = {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = hf.InstructBlipConfig(
        vision_config=tower(dict, 84, 7),
        qformer_config={**queries, "vocab_size": VOCABULARY, "cross_attention_frequency": 2},
        text_config=text(hf.LlamaConfig),
        num_query_tokens=144,
        image_token_index=IMAGE,
    )

    def encoding(seed: int) -> Encoding:
        words = asked(seed, 0, 0, 20)
        told = {"qformer_input_ids": words["input_ids"], "qformer_attention_mask": words["attention_mask"]}
        return {**asked(seed, 0, 144, 24), **told, "pixel_values": pixels(seed, 1, 3, 84, 84)}

    return Wide(drawn(hf.InstructBlipForConditionalGeneration, config), encoding, "Q-Former")


def mllama() -> Wide:
    """Two layers of eight look at four tiles of 37 tokens by cross-attention; the picture is one token of the text."""
    vision = MllamaVisionConfig(
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=3,
        num_global_layers=1,
        attention_heads=4,
        image_size=84,
        patch_size=14,
        max_num_tiles=4,
        intermediate_layers_indices=[0, 1],
        vision_output_dim=3 * 96,
    )
    language = text(MllamaTextConfig, num_key_value_heads=4, cross_attention_layers=[2, 5])
    config = hf.MllamaConfig(vision_config=vision, text_config=language, image_token_index=IMAGE)

    def encoding(seed: int) -> Encoding:
        found = asked(seed, 5, 1, 149)
        seen = (found["input_ids"] == IMAGE).cumsum(1)[..., None, None].expand(1, -1, 1, 4)
        tiles = {"aspect_ratio_ids": torch.tensor([[6]]), "aspect_ratio_mask": torch.ones(1, 1, 4).long()}  # 2 x 2
        return {**found, **tiles, "cross_attention_mask": seen, "pixel_values": pixels(seed, 1, 1, 4, 3, 84, 84)}

    return Wide(drawn(hf.MllamaForConditionalGeneration, config), encoding, "cross-attention")


KINDS: dict[str, Callable[[], Wide]] = {
    "llava_next": llava_next,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "gemma3": gemma3,
    "paligemma": paligemma,
    "instructblip": instructblip,
    "mllama": mllama,
}
