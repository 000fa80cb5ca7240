"""Hand-built LLaVAs whose answer goes along known edges, and along no others.

All weights are zero but these, and no word's activation differs between the two prompts but where an edge carries it.

* `two_hops`: in layer 0 a head at the marked word of the question looks at the image tokens and copies their
  brightness; in layer 2 a head at the last position looks at that word and copies what stands there to the direction
  that the unembedding reads. So image -> question -> last.
* `twins`: in layer 1 two query heads of one key-value head look at the image from the last position; the second writes
  half of what the first does.

Where a head has nothing to do it looks at the first word alone, which holds nothing to copy. The target's picture is
grey, so its activations have no part in the directions that carry the answer, and norms hand no gradient on to them.
Without norms everything that carries the answer is linear, and first-order estimates are exact.
"""

from dataclasses import dataclass
from typing import Any

import planted
import torch
from planted import BRIGHT, CALL, CONSTANT, LAST, MARK, SAID

FIRST, ASK, SINK, HOP, HERE = 1, 8, 7, 8, 9
"""The first word and the one that asks; directions of the first word's mark, what the asking word has seen, and the
last word's mark."""
LAYERS, HEADS, KV_HEADS, WIDTH = 4, 4, 2, 8
SURE = 64.0


@dataclass(frozen=True)
class Path:
    """A model, two questions to it, and the edges that carry the answer, each of them all of what differs.

    Attributes:
        vlm: the model.
        source, target: the same words about a bright picture and a grey one.
        edges: writer, reader and span, with the share of the answer's difference that each carries.
    """

    vlm: Any
    source: Any
    target: Any
    edges: dict[tuple[str, str, str], float]


def two_hops(norms: bool = False, attention: str = "sdpa", dtype: torch.dtype = torch.float64) -> Path:
    """Image -> question -> last, by head 1 of layer 0 and head 2 of layer 2."""
    model = empty(norms, attention)
    with torch.no_grad():
        plant(model, 0, head=1, asks=CALL, finds=MARK, reads=BRIGHT, writes=HOP, amount=1.0)
        plant(model, 2, head=2, asks=HERE, finds=CALL, reads=HOP, writes=SAID, amount=2.0)
    edges = {
        ("image", "a0.kv0<v>", "image"): 1.0,
        ("a0.h1", "a2.kv1<v>", "question"): 1.0,
        ("a2.h2", "logits", "last"): 1.0,
    }
    return asked(model, edges, dtype)


def twins(norms: bool = False, attention: str = "sdpa", dtype: torch.dtype = torch.float64) -> Path:
    """Image -> last, by heads 2 and 3 of layer 1, which share key-value head 1."""
    model = empty(norms, attention)
    with torch.no_grad():
        plant(model, 1, head=2, asks=HERE, finds=MARK, reads=BRIGHT, writes=SAID, amount=2.0)
        plant(model, 1, head=3, asks=HERE, finds=MARK, reads=BRIGHT, writes=SAID, amount=1.0)
    edges = {
        ("image", "a1.kv1<v>", "image"): 1.0,
        ("a1.h2", "logits", "last"): 2 / 3,
        ("a1.h3", "logits", "last"): 1 / 3,
    }
    return asked(model, edges, dtype)


def empty(norms: bool, attention: str) -> Any:
    """A model that reads brightness and says nothing."""
    model = planted.empty(HEADS, KV_HEADS, LAYERS, HEADS * WIDTH, attention)
    with torch.no_grad():
        planted.seen_and_said(model)
        model.model.multi_modal_projector.linear_2.bias[CONSTANT] = 1.0
        words = model.model.language_model.embed_tokens.weight
        words[FIRST, SINK] = words[ASK, CALL] = words[LAST, HERE] = 1.0
    if not norms:
        language = model.model.language_model
        language.norm = torch.nn.Identity()
        for layer in language.layers:
            layer.input_layernorm = torch.nn.Identity()
            layer.post_attention_layernorm = torch.nn.Identity()
    return model


def plant(model: Any, layer: int, head: int, asks: int, finds: int, reads: int, writes: int, amount: float) -> None:
    """One head: where `asks` stands it looks at what is marked by `finds`, and copies `reads` to `writes`.

    Everywhere else it looks at the first word. Both scores are made of the slowest rotary pair, which does not turn
    within this text.
    """
    attention = model.model.language_model.layers[layer].self_attn
    query, key, slow = head * WIDTH, head // (HEADS // KV_HEADS) * WIDTH, (WIDTH - 1, WIDTH // 2 - 1)
    attention.q_proj.weight[query + slow[0], asks] = 4 * SURE
    attention.k_proj.weight[key + slow[0], finds] = SURE
    attention.q_proj.weight[query + slow[1], CONSTANT] = SURE
    attention.k_proj.weight[key + slow[1], SINK] = SURE
    attention.v_proj.weight[key, reads] = 1.0
    attention.o_proj.weight[writes, query] = amount


def asked(model: Any, edges: dict[tuple[str, str, str], float], dtype: torch.dtype) -> Path:
    """The model with its two questions."""
    import mechvlm as mv

    vlm = mv.VLM(model.requires_grad_(False).to(dtype))
    bright, grey = (planted.asked(vlm, value, [FIRST, 2, 3, ASK, 7, LAST]) for value in (1.0, 0.0))
    return Path(vlm, bright, grey, edges)
