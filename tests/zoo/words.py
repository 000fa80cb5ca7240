"""A word-level tokenizer made offline, which every builder shares: the same words, and the special tokens of a family.

The ids are stable: padding, start, end and unknown are 0 to 3, the special tokens follow in the order given, then the
words. A model's configuration can therefore name its ids before a tokenizer exists; see `ids`.
"""

from collections.abc import Mapping, Sequence

from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS, UNK = range(4)
FIRST = 4
"""The id of the first special token of a family."""

VOCABULARY = 144
"""How many words a tiny model knows: more than any tokenizer here needs."""

_WORDS = (
    "user assistant human gpt system : . , ? ! yes no is there a an the in of on image picture red green blue yellow "
    "cat dog circle square left right top bottom what which who where colour how many and or it this that answer "
    "question describe short 0 1 2 3 4 5 6 7 8 9 { }"
)
WORDS = tuple(_WORDS.split())

CHAT = (
    "{% for message in messages %}HUMAN : "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}IMAGE_MARK{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %} {{ part['text'] }} {% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}GPT :{% endif %}"
)


def chat(mark: str = "<image>") -> str:
    """A chat template that writes each image as `mark`, all images first, then the words."""
    return CHAT.replace("IMAGE_MARK", mark)


def ids(special: Sequence[str] = (), named: Mapping[str, str] | None = None) -> dict[str, int]:
    """The id of each special token, as `tokenizer` with the same arguments gives it."""
    tokens = dict.fromkeys((*special, *(named or {}).values()))
    return {token: FIRST + number for number, token in enumerate(tokens)}


def tokenizer(
    special: Sequence[str] = (),
    named: Mapping[str, str] | None = None,
    *,
    bos: str | None = "<s>",
    eos: str = "</s>",
    pad: str = "<pad>",
    unk: str = "<unk>",
    start: bool = True,
    chat_template: str | None = None,
    side: str = "left",
) -> PreTrainedTokenizerFast:
    """A real fast tokenizer.

    Args:
        special: the family's special tokens, such as "<image>".
        named: special tokens that the family's processor reads as attributes, such as {"image_token": "<image>"}.
        bos: the start token, or None for a family without one (its id then stands for a word nobody writes).
        start: put the start token before every text.
        chat_template: the tokenizer's, for processors that ask it.
        side: where padding goes.
    """
    return PreTrainedTokenizerFast(
        tokenizer_object=_made(ids(special, named), bos, eos, pad, unk, start),
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        unk_token=unk,
        extra_special_tokens=dict(named) if named else list(special),
        padding_side=side,
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )


def _made(marks: Mapping[str, int], bos: str | None, eos: str, pad: str, unk: str, start: bool) -> Tokenizer:
    table = {word: number for number, word in enumerate((pad, bos or "<s>", eos, unk))} | dict(marks)
    for word in WORDS:
        table.setdefault(word, len(table))
    if len(table) > VOCABULARY:
        raise ValueError(f"the tokenizer has {len(table)} words; the tiny models know {VOCABULARY}.")
    made = Tokenizer(WordLevel(table, unk_token=unk))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if bos and start:
        made.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B:1", special_tokens=[(bos, BOS)]
        )
    made.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in marks])
    return made
