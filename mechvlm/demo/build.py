"""The untrained demo model and its processor: LLaVA-1.5's parts and conventions at a size that trains on a CPU.

A CLIP tower looks at 72 x 72 pixels in patches of 12, so that a cell of a scene is 2 x 2 image tokens; the features
before its last layer, without CLS, pass a two-layer projector into a Llama decoder of 8 layers with 8 heads. As in
LLaVA-1.5 the tower's last layer is therefore never used. The tokenizer knows whole words only and no capitals.
"""

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from mechvlm.demo.handwriting import SIDE
from mechvlm.demo.world import COLOURS, DIGITS

PATCH = 12
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
WORDS = (
    *("user", "assistant", ":", ".", ",", "?", "yes", "no", "none", *DIGITS, *COLOURS),
    *("is", "there", "a", "anything", "in", "the", "image", "how", "many", "s", "are", "digits", "digit", "which"),
    *("colour", "top", "bottom", "left", "right", "center", "describe", "of", "and"),
)
TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}: "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }} {% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def processor() -> LlavaProcessor:
    """The processor, with a word-level tokenizer and a chat template in the manner of LLaVA-1.5."""
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    words.normalizer = normalizers.Lowercase()
    split_numbers = pre_tokenizers.Split(Regex(r"\d"), "isolated")  # so that "3s" is "3" and "s"
    words.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.BertPreTokenizer(), split_numbers])
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )
    size = {"height": SIDE, "width": SIDE}
    half = [0.5, 0.5, 0.5]
    images = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=size, image_mean=half, image_std=half)
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def model() -> LlavaForConditionalGeneration:
    """The model with random weights, about 2.7 million of them."""
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=8,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=128,
    )
    text = LlamaConfig(
        vocab_size=len(SPECIAL + WORDS),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=24,
        initializer_range=0.05,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=SPECIAL.index("<image>"),
            image_seq_length=(SIDE // PATCH) ** 2,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
            tie_word_embeddings=False,
        )
    )
