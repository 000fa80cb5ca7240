"""Attention that is not made, against the map of all queries by all keys made by hand; and edits of some rows of it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
import zoo
from torch import Tensor

import mechvlm as mv
from mechvlm import seam
from mechvlm.attention import bytes_of, saliency
from mechvlm.biases import Bias, Scale, bias_features
from mechvlm.lazy_attention import Attention
from mechvlm.masks import Sees
from mechvlm.seam import recompute

S = 23
BUDGETS = ("256MiB", "6KiB", 1)
STRETCH = torch.tensor([0] * 6 + [1] * 10 + [2] * 7)
PADDING = torch.ones(2, S, dtype=torch.bool).index_put(
    (torch.tensor([1, 1]), torch.tensor([0, 1])), torch.tensor(False)
)
ADDED = torch.zeros(2, 1, S, S).masked_fill(torch.ones(S, S).triu(3).bool(), torch.finfo(torch.float32).min)


def every(query: int = S) -> dict[str, tuple[Sees, Tensor]]:
    """Kinds of masks, each with whether a query may look at a key, written out by hand."""
    last, place = torch.arange(S - query, S)[:, None], torch.arange(S)[None]
    causal, all_of_them = place <= last, torch.ones(query, S, dtype=torch.bool)
    return {
        "all": (Sees(query, S), all_of_them),
        "causal": (Sees(query, S, causal=True), causal),
        "window": (Sees(query, S, causal=True, window=4), causal & (place > last - 4)),
        "padding": (Sees(query, S, causal=True, padding=PADDING), causal & PADDING[:, None, None]),
        "stretch": (Sees(query, S, stretch=STRETCH), STRETCH[last] == STRETCH[place]),
        "added": (Sees(query, S, handed=ADDED[..., -query:, :]), ADDED[..., -query:, :] == 0),
        "boolean": (
            Sees(query, S, handed=causal[None, None] & PADDING[:, None, None]),
            causal & PADDING[:, None, None],
        ),
        "rule": (Sees(query, S, rule=lambda q, k: ((q + k) % 3 > 0)[None, None]), (last - S + query + place) % 3 > 0),
        "missing": (Sees(query, S, causal=True, missing=2), causal & (place >= 2)),
        "missing, added": (
            Sees(query, S, handed=ADDED[..., -query:, 2:], missing=2),
            (ADDED[..., -query:, :] == 0) & (place >= 2),
        ),
    }


def made(kind: str, query: int = S, cap: float | None = None) -> tuple[Attention, Tensor, Tensor]:
    """Attention of two rows, four heads on two key-value heads; its scores and its pattern, by hand, in float64."""
    draw = torch.Generator().manual_seed(0)
    q, k, v, z = (
        torch.randn(*shape, generator=draw, dtype=torch.float64)
        for shape in ((2, 4, query, 8), (2, 2, S, 8), (2, 2, S, 8), (2, query, 4, 8))
    )
    sees, allowed = every(query)[kind]
    products = q @ k.repeat_interleave(2, 1).transpose(-1, -2) * 0.7
    products = products if cap is None else cap * torch.tanh(products / cap)
    scores = products.masked_fill(~allowed, -torch.inf)
    return Attention(q, k, v, sees, 0.7, cap, z_gradient=z), scores, scores.softmax(-1).nan_to_num(0.0)


kinds = pytest.mark.parametrize("kind", sorted(every()))
READINGS: dict[str, Any] = {
    "rows": mv.rows([-1, 3]),
    "rows of some keys": mv.rows(None, keys=[2, 5, -3]),
    "mass": mv.mass({"some": [1, 2, 9], "all": range(S), "overlapping": [2, 3]}),
    "mass of rows": mv.mass({"some": [1, 2, 9]}, [4, -2]),
    "more spans than a head is wide": mv.mass({str(key): [key] for key in range(S)}),
    "entropy": mv.entropy(),
    "entropy among keys": mv.entropy([-1, 5], keys=range(6)),
}


@kinds
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("what", READINGS)
def test_a_reading_is_that_of_the_map_whatever_the_budget(kind: str, what: str, cap: float | None) -> None:
    attention, _, pattern = made(kind, cap=cap)
    for budget in BUDGETS:
        found = READINGS[what].of(replace(attention, budget=bytes_of(budget)), "pattern")
        torch.testing.assert_close(found, READINGS[what](pattern), rtol=0, atol=1e-6, equal_nan=True)


@kinds
def test_the_largest_weights_and_their_keys(kind: str) -> None:
    attention, _, pattern = made(kind)
    weights, keys = replace(attention, budget=4000).top(3, [-1, 12], keys=[1, 7, 8, -2])
    torch.testing.assert_close(weights, mv.top_keys(3, [-1, 12], [1, 7, 8, -2])(pattern)[0])
    torch.testing.assert_close(weights, pattern[:, :, [-1, 12]].gather(-1, keys))


@kinds
@pytest.mark.parametrize("query", [1, 5, S])
def test_scores_z_and_products_of_patterns(kind: str, query: int) -> None:
    attention, scores, pattern = made(kind, query)
    values = attention.v.repeat_interleave(2, 1)
    weights = torch.rand(2, 4, query, dtype=torch.float64)
    for budget in (2**20, 3000):
        own = replace(attention, budget=budget)
        torch.testing.assert_close(own.rows(scores=True), scores)
        torch.testing.assert_close(own.rows(), pattern)
        torch.testing.assert_close(own.attended(), (pattern @ values).transpose(1, 2))
        torch.testing.assert_close(own.drawn(weights), torch.einsum("bhq,bhqk->bhk", weights, pattern))


@kinds
def test_gradients_are_those_of_autograd(kind: str) -> None:
    attention, scores, _ = made(kind)
    of_z = attention.z_gradient
    assert of_z is not None
    scores = scores.masked_fill((scores == -torch.inf).all(-1, keepdim=True), 0.0).requires_grad_(True)
    pattern = scores.softmax(-1)
    blind = attention.rows().sum(-1) == 0
    z = (pattern @ attention.v.repeat_interleave(2, 1)).transpose(1, 2)
    to_pattern, to_scores = torch.autograd.grad((z * of_z).sum(), [pattern, scores])
    for budget in (2**20, 3000):
        own = replace(attention, budget=budget)
        torch.testing.assert_close(own.gradient_rows([-1, 4], [3, 5]), to_pattern[:, :, [-1, 4]][..., [3, 5]])
        torch.testing.assert_close(own.gradient_rows(scores=True)[~blind], to_scores[~blind])
        span = torch.zeros(S, 1, dtype=torch.float64).index_fill(0, torch.tensor([2, 7]), 1.0)
        torch.testing.assert_close(own.gradient_mixed(span)[..., 0], to_pattern[..., [2, 7]].sum(-1))
        weighted = torch.where(blind[..., None], 0.0, pattern.detach()) * to_pattern
        torch.testing.assert_close(own.over_keys(saliency, None, None), weighted)


@kinds
def test_a_part_of_a_batch_sees_what_it_saw(kind: str) -> None:
    attention, _, pattern = made(kind)
    part = attention.of_rows(slice(1, 2))
    torch.testing.assert_close(part.rows([-1, 4]), pattern[1:, :, [-1, 4]])
    narrow = attention.sees.narrowed([1], slice(4, None), slice(4, None))
    inner = replace(
        attention,
        q=attention.q[1:, :, 4:],
        k=attention.k[1:, :, 4:],
        v=attention.v[1:, :, 4:],
        sees=narrow,
        z_gradient=None,
    )
    own = made(kind)[1][1:, :, 4:, 4:].softmax(-1).nan_to_num(0.0)
    torch.testing.assert_close(inner.rows(), own)


def test_no_piece_is_larger_than_the_budget() -> None:
    attention = replace(made("causal")[0], budget=40_000)
    sizes = [piece.scores.numel() * 8 * 4 for piece in attention.pieces()]
    assert len(sizes) > 3 and max(sizes) <= 40_000


# -- in a model --------------------------------------------------------------------------------------------------------

PATTERN, SCORES, Z = (mv.Site(kind, 1) for kind in ("pattern", "scores", "z"))


@pytest.fixture(scope="module")
def vlm() -> mv.VLM:
    return tiny.vlm()


@pytest.fixture
def real(vlm: mv.VLM) -> mv.Prompt:
    return vlm.prompt(tiny.picture(), "is there a red dog in the image ?")


def blind(real: mv.Prompt) -> Callable[[Tensor], Tensor]:
    """An edit of a pattern that treats every query by itself."""

    def without(pattern: Tensor) -> Tensor:
        pattern[..., real.image] = 0
        return pattern / pattern.sum(-1, keepdim=True)

    return without


@pytest.mark.parametrize("budget", ["256MiB", "4KiB"])
def test_an_edit_of_each_row_is_that_of_the_whole_map(vlm: mv.VLM, real: mv.Prompt, budget: str) -> None:
    short = vlm.prompt(tiny.picture(), "is it ?")
    read: dict[Any, Any] = {PATTERN: None, mv.Site("scores", 2): mv.rows([-1]), Z: None}
    whole = vlm.run([real, short], read, [mv.Edit(PATTERN, blind(real)), mv.Edit("text.2.scores", lambda s: s * 1.5)])
    vlm.attention_budget = budget
    edits = [mv.Edit(PATTERN, blind(real), rows="each"), mv.Edit("text.2.scores", lambda s: s * 1.5, rows="each")]
    pieces = vlm.run([real, short], read, edits)
    vlm.attention_budget = "256MiB"
    torch.testing.assert_close(pieces.logits, whole.logits)
    for mine, theirs in zip(pieces.rows, whole.rows, strict=True):
        for site in read:
            torch.testing.assert_close(mine[site], theirs[site])


def test_an_edit_of_some_rows_is_given_those_alone_and_leaves_the_others_bit_for_bit(
    vlm: mv.VLM, real: mv.Prompt
) -> None:
    shapes = []

    def watched(rows: Tensor) -> Tensor:
        shapes.append(rows.shape[2])
        return blind(real)(rows)

    plain = vlm.run(real, read=[Z])
    some = vlm.run(real, read={PATTERN: None, Z: None}, edits=[mv.Edit(PATTERN, watched, rows=real.last)])
    by_hand = mv.Edit(PATTERN, lambda p: torch.cat([p[:, :, :-1], blind(real)(p[:, :, -1:].clone())], 2))
    whole = vlm.run(real, read={PATTERN: None, Z: None}, edits=[by_hand])
    assert shapes == [1] * len(shapes)
    assert torch.equal(some[Z][:, :-1], plain[Z][:, :-1])
    torch.testing.assert_close(some[Z], whole[Z])
    torch.testing.assert_close(some[PATTERN], whole[PATTERN])
    torch.testing.assert_close(some.logits, whole.logits)


def test_variants_whose_edits_are_of_rows(vlm: mv.VLM, real: mv.Prompt) -> None:
    variants = [
        [mv.Edit(PATTERN, blind(real), rows="each")],
        [],
        [mv.bias_attention(1, real.image, 1.0, way="recompute"), mv.Edit(PATTERN, blind(real), rows=real.last)],
    ]
    together = vlm.run(real, read={PATTERN: mv.rows([-1])}, variants=variants)
    for row, edits in zip(together.rows, variants, strict=True):
        alone = vlm.run(real, read={PATTERN: mv.rows([-1])}, edits=edits)
        torch.testing.assert_close(row.logits, alone.logits)
        torch.testing.assert_close(row[PATTERN], alone[PATTERN])


def test_the_newest_row_is_edited_in_every_step(vlm: mv.VLM, real: mv.Prompt) -> None:
    def only_last(pattern: Tensor) -> Tensor:
        return torch.cat([pattern[:, :, :-1], blind(real)(pattern[:, :, -1:].clone())], 2)

    settings: dict[str, Any] = {
        "max_new_tokens": 4,
        "do_sample": False,
        "read_each_step": {"logits": lambda x: x[:, -1]},
    }
    some = vlm.generate(real, [mv.Edit(PATTERN, blind(real), rows=[-1])], **settings)
    whole = vlm.generate(real, [mv.Edit(PATTERN, only_last)], **settings)
    assert torch.equal(some.tokens, whole.tokens)
    for mine, theirs in zip(some["logits"], whole["logits"], strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_reading_of_two_tensors_and_attention_itself_come_row_by_row(vlm: mv.VLM, real: mv.Prompt) -> None:
    short = vlm.prompt(tiny.picture(), "is it ?")
    run = vlm.run([real, short], read={PATTERN: mv.top_keys(2, [-1]), "text.2.pattern": mv.lazy()})
    weights, keys = run[PATTERN]
    assert weights.shape == keys.shape == (2, 4, 1, 2)
    for row, prompt in enumerate((real, short)):
        alone = vlm.run(prompt, read=[PATTERN, "text.2.pattern"])
        best = alone[PATTERN][:, :, [-1]].topk(2)
        torch.testing.assert_close(run.rows[row][PATTERN][0], best.values)
        assert torch.equal(keys[row : row + 1], best.indices)
        torch.testing.assert_close(run.rows[row]["text.2.pattern"].rows(), alone["text.2.pattern"])


@pytest.mark.parametrize("name", ["bias by mask", "bias by feature", "factor by feature", "both"])
def test_layers_changed_alike_keep_the_kernel_and_give_what_a_plain_edit_gives(
    vlm: mv.VLM, real: mv.Prompt, name: str
) -> None:
    image, question = real.image, real.question

    def edits(layer: int) -> list[mv.Edit]:
        bias = mv.bias_attention(layer, image, 0.7, question, [1, 2], way="feature" if "feature" in name else "mask")
        factor = mv.scale_attention(layer, image, 1.4, question, [0, 2], way="feature")
        return {"factor by feature": [factor], "both": [factor, bias]}.get(name, [bias])

    def by_hand(edit: mv.Edit) -> mv.Edit:
        change = edit.bias
        assert change is not None

        def fn(scores: Tensor) -> Tensor:
            for head in change.heads or ():
                block = scores[:, head, question][..., image]
                block = block * change.factor if isinstance(change, Scale) else block + change.amount
                where = torch.zeros(scores.shape[2:], dtype=torch.bool)
                where[torch.tensor(question)[:, None], torch.tensor(image)] = True
                scores[:, head][:, where] = block.reshape(scores.shape[0], -1)
            return scores

        return mv.Edit(edit.site, fn)

    fast = [edit for layer in range(3) for edit in edits(layer)]
    run = vlm.run(real, read=[PATTERN, SCORES], edits=fast)
    slow = vlm.run(real, read=[PATTERN, SCORES], edits=[by_hand(edit) for edit in fast])
    for mine, theirs in ((run.logits, slow.logits), (run[PATTERN], slow[PATTERN]), (run[SCORES], slow[SCORES])):
        torch.testing.assert_close(mine, theirs)


def test_a_factor_behind_a_bias_is_computed_anew_since_order_counts(vlm: mv.VLM, real: mv.Prompt) -> None:
    bias, factor = mv.bias_attention(1, real.image, 2.0), mv.scale_attention(1, real.image, 1.5)
    run = vlm.run(real, edits=[bias, factor])
    slow = vlm.run(real, edits=[mv.Edit(SCORES, bias.fn), mv.Edit(SCORES, factor.fn)])
    torch.testing.assert_close(run.logits, slow.logits)


def test_factors_on_different_keys_keep_the_kernel(vlm: mv.VLM, real: mv.Prompt) -> None:
    factors = [mv.scale_attention(1, real.image, 1.15), mv.scale_attention(1, real.prefix, 0.95)]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(seam, "recompute", None)
        run = vlm.run(real, edits=factors)
    slow = [replace(edit, way="recompute") for edit in factors]
    torch.testing.assert_close(run.logits, vlm.run(real, edits=slow).logits)


def test_a_bias_of_decode_steps_alone(vlm: mv.VLM, real: mv.Prompt) -> None:
    read: dict[str, Any] = {"logits": lambda x: x[:, -1]}
    both, late, early = (
        vlm.generate(real, [mv.bias_attention(1, real.image, 3.0, when=when)], 3, read, do_sample=False)["logits"]
        for when in ("always", "decode", "prompt")
    )
    plain = vlm.generate(real, max_new_tokens=3, read_each_step=read, do_sample=False)["logits"]
    assert torch.equal(late[0], plain[0]) and not torch.equal(late[1], plain[1])
    assert torch.equal(early[0], both[0]) and not torch.equal(early[0], plain[0])


@pytest.mark.parametrize("way", ["mask", "feature", "recompute"])
def test_a_cut_is_exactly_zero_in_every_way(vlm: mv.VLM, real: mv.Prompt, way: str) -> None:
    edit = mv.bias_attention(1, real.image, float("-inf"), real.question, way=way)
    run = vlm.run(real, read=[PATTERN], edits=[edit])
    assert bool((run[PATTERN][:, :, real.question][..., real.image] == 0).all())
    torch.testing.assert_close(run.logits, vlm.run(real, edits=[replace(edit, way="recompute")]).logits)


@pytest.mark.parametrize("way", ["mask", "feature", "recompute"])
def test_a_query_cut_from_all_it_sees_receives_nothing(vlm: mv.VLM, real: mv.Prompt, way: str) -> None:
    run = vlm.run(real, read=[Z], edits=[mv.bias_attention(1, [0, 1], float("-inf"), [1], way=way)])
    assert bool((run[Z][:, 1] == 0).all()) and bool((run[Z][:, 2] != 0).any())


@pytest.mark.parametrize(
    ("keys", "queries", "kernel"), [([0, 1], [2, 5], True), ([0, 1], [1], False), ([0], None, False)]
)
def test_a_cut_keeps_the_kernel_where_every_query_still_sees_a_key(
    vlm: mv.VLM, real: mv.Prompt, keys: list[int], queries: list[int] | None, kernel: bool
) -> None:
    with pytest.MonkeyPatch.context() as patched:
        made: list[Any] = []

        def watched(*given: Any) -> Any:
            made.append(given)
            return recompute(*given)

        patched.setattr(seam, "recompute", watched)
        run = vlm.run(real, read=[PATTERN], edits=[mv.cut_attention(1, keys, queries, way="feature")])
    assert bool(made) != kernel
    plain = vlm.run(real, read=[PATTERN], edits=[mv.cut_attention(1, keys, queries, way="recompute")])
    torch.testing.assert_close(run[PATTERN], plain[PATTERN])
    torch.testing.assert_close(run.logits, plain.logits)


def test_half_precision_features_hold_more_figures_than_its_numbers() -> None:
    like = torch.zeros(1, dtype=torch.bfloat16)
    to_query, to_key = bias_features(Bias((1,), 2.3), 1, torch.arange(3), 3, 3, 64**-0.5, like)
    made_of = (to_query.double() * to_key[1].double().sum()) * 64**-0.5
    assert abs(made_of[0, 0].item() - 2.3) < 1e-4


def test_a_static_cache_holds_room_that_is_not_shown(vlm: mv.VLM, real: mv.Prompt) -> None:
    edits = [
        mv.bias_attention(0, real.image, 1.0),
        mv.bias_attention(1, real.image, 0.5, heads=[1], way="recompute"),
        mv.scale_attention(2, real.image, 1.5),
        mv.Edit("text.1.k", lambda k: k * 1.1),
    ]
    read: dict[Any, Any] = {"logits": lambda x: x[:, -1], PATTERN: mv.rows([-1]), "text.1.k": None}
    static, grown = (
        vlm.generate(real, edits, 4, read, do_sample=False, cache_implementation=kind) for kind in ("static", "dynamic")
    )
    assert torch.equal(static.tokens, grown.tokens)
    for site in read:
        for mine, theirs in zip(static[site], grown[site], strict=True):
            torch.testing.assert_close(mine, theirs)


def test_a_model_with_edits_is_that_model_in_every_run(vlm: mv.VLM, real: mv.Prompt) -> None:
    first, second = mv.bias_attention(1, real.image, 1.0), mv.Edit(Z, lambda z: z * 0.5)
    edited = vlm.with_edits([first])
    both = vlm.run(real, edits=[first, second])
    assert torch.equal(edited.run(real, edits=[second]).logits, both.logits)
    assert torch.equal(edited.with_edits([second]).run(real).logits, both.logits)
    assert torch.equal(
        edited.run(real, variants=[[], [second]]).logits[1:],
        vlm.run(real, variants=[[first], [first, second]]).logits[1:],
    )
    assert edited.generate(real, max_new_tokens=3).tokens.equal(vlm.generate(real, [first], 3).tokens)
    assert str(first) in edited.provenance(real)["edits"] and not vlm.edits


@pytest.mark.parametrize(
    "edits",
    [
        [mv.Edit(PATTERN, lambda p: p * 0.5, rows="each")],
        [mv.Edit(PATTERN, lambda p: p.flip(-1), rows=[-1])],
        [mv.bias_attention(1, [3, 4], 1.0), mv.scale_attention(1, [3, 4], 1.2), mv.scale_attention(1, [1], 0.9)],
        [mv.cut_attention(1, [0, 1], way="recompute")],
        [mv.bias_attention(1, [3, 4], 1.0, way="feature"), mv.scale_heads(1, [0], 0.5)],
    ],
    ids=["each row", "some rows", "factors behind a bias", "a cut", "features and z"],
)
def test_gradients_of_attention_that_is_edited_and_not_made(vlm: mv.VLM, real: mv.Prompt, edits: list[mv.Edit]) -> None:
    metric = mv.logit_difference(7, 9)
    made = vlm.run(real, read=[PATTERN], edits=edits, grad_of=metric)
    kept = vlm.run(real, read={PATTERN: mv.lazy()}, edits=edits, grad_of=metric)
    torch.testing.assert_close(kept[PATTERN].rows(), made[PATTERN])
    torch.testing.assert_close(kept.grad[PATTERN].gradient_rows(), made.grad[PATTERN])
    short = vlm.run(real, read={PATTERN: mv.rows([-1])}, edits=edits, grad_of=metric)
    torch.testing.assert_close(short.grad[PATTERN], made.grad[PATTERN][:, :, [-1]])


# -- several changes at once -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ways", [("auto", "auto"), ("mask", "feature"), ("feature", "mask"), ("feature", "recompute")])
def test_cuts_that_blind_a_query_only_together(vlm: mv.VLM, real: mv.Prompt, ways: tuple[str, str]) -> None:
    rest = [at for at in range(len(real)) if at not in real.image]
    cuts = [mv.cut_attention(1, keys, real.last, way=way) for keys, way in zip((real.image, rest), ways, strict=True)]
    run = vlm.run(real, read=[PATTERN, Z], edits=cuts)
    assert bool((run[PATTERN][:, :, -1] == 0).all()) and bool((run[Z][:, -1] == 0).all())
    half = [mv.cut_attention(1, real.image, heads=[0]), mv.cut_attention(1, rest, heads=[1])]
    seen = vlm.run(real, read=[PATTERN], edits=half)[PATTERN][:, :, -1]
    assert bool((seen[:, 0, real.image] == 0).all()) and bool((seen[:, 1, rest] == 0).all())
    torch.testing.assert_close(seen.sum(-1), torch.ones_like(seen[..., 0]))


@pytest.mark.parametrize("way", ["mask", "feature", "recompute"])
def test_scores_show_what_is_cut_in_every_way(vlm: mv.VLM, real: mv.Prompt, way: str) -> None:
    short = vlm.prompt(tiny.picture(), "is it ?")
    edits = [mv.cut_attention(1, real.image, real.last, heads=[0, 2], way=way)]
    run = vlm.run([real, short], read={SCORES: mv.rows([-1])}, variants=None, edits=edits[:0])
    plain = run.rows[0][SCORES][:, :, 0]
    cut = vlm.run(real, read={SCORES: mv.rows([-1])}, edits=edits)[SCORES][:, :, 0]
    expected = plain.clone()
    expected[:, [[0], [2]], real.image] = -torch.inf
    torch.testing.assert_close(cut, expected)


@pytest.mark.parametrize("way", ["mask", "feature", "recompute"])
@pytest.mark.parametrize("what", ["bias", "factor"])
def test_cross_attention_of_a_padded_batch_is_changed_at_its_own_keys(what: str, way: str) -> None:
    if what == "factor" and way == "mask":
        pytest.skip("a mask multiplies nothing")
    vlm = zoo.build("mllama", dtype=torch.float64)
    first, second = (zoo.ask(vlm, tiny.picture(width=48, height=48), words) for words in (zoo.QUESTION, "red dog ?"))
    make, amount = (mv.bias_attention, 2.0) if what == "bias" else (mv.scale_attention, 1.5)
    edits = [make(1, [0, 1, 2, 3], amount, queries=[2, 3], heads=[1], cross=True, way=way)]
    site = mv.Site("cross_pattern", 1)
    batch = vlm.run([first, second], read={site: mv.rows([2])}, edits=edits)
    for row, prompt in zip(batch.rows, (first, second), strict=True):
        alone = vlm.run(prompt, read={site: mv.rows([2])}, edits=[replace(edits[0], way="recompute")])
        torch.testing.assert_close(row[site], alone[site])
        torch.testing.assert_close(row.logits, alone.logits)


def test_cuts_of_a_padded_batch_are_looked_at_by_each_prompts_own_positions() -> None:
    vlm = zoo.build("gemma3", dtype=torch.float64)
    real = zoo.ask(vlm, tiny.picture(width=48, height=48))
    words = vlm.prompt(None, "red dog ?")
    at = min(len(words) - 1, real.image[0])
    cut = mv.cut_attention(0, range(at + 1), [at], way="feature")
    batch = vlm.run([real, words], read={"text.0.z": lambda z: z[:, at]}, edits=[cut])
    assert bool((batch.rows[1]["text.0.z"] == 0).all())
    alone = vlm.run(real, read={"text.0.z": lambda z: z[:, at]}, edits=[cut])
    torch.testing.assert_close(batch.rows[0]["text.0.z"], alone["text.0.z"])


def test_variants_that_scale_keep_the_kernel_and_share_columns(vlm: mv.VLM, real: mv.Prompt) -> None:
    variants = [[mv.scale_attention(1, real.image, factor)] for factor in (0.5, 1.5, 2.0)]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(seam, "recompute", None)
        together = vlm.run(real, variants=variants)
    for row, edits in enumerate(variants):
        alone = vlm.run(real, edits=[replace(edits[0], way="recompute")])
        torch.testing.assert_close(together.logits[row : row + 1], alone.logits)


@pytest.mark.parametrize("factor", [0.0, -1.0])
@pytest.mark.parametrize("way", ["feature", "recompute"])
def test_a_factor_of_zero_or_below_leaves_what_is_masked(vlm: mv.VLM, real: mv.Prompt, factor: float, way: str) -> None:
    every = list(range(len(real)))
    plain = vlm.run(real, read=[SCORES])[SCORES]
    scores = vlm.run(real, read=[SCORES], edits=[mv.scale_attention(1, every, factor, way=way)])[SCORES]
    torch.testing.assert_close(scores, torch.where(plain == -torch.inf, plain, plain * factor))


def test_an_edit_of_pieces_may_index_heads_whatever_the_budget(vlm: mv.VLM, real: mv.Prompt) -> None:
    def third(scores: Tensor) -> Tensor:
        scores[:, 3] += 1.0
        scores[:, 3, :, :5] -= 2.0
        return scores

    whole = vlm.run(real, edits=[mv.Edit(SCORES, third)])
    vlm.attention_budget = 500
    pieces = vlm.run(real, edits=[mv.Edit(SCORES, third, rows="each")])
    vlm.attention_budget = "256MiB"
    torch.testing.assert_close(pieces.logits, whole.logits)


def test_gradients_of_edited_pieces_make_no_map(vlm: mv.VLM, real: mv.Prompt) -> None:
    metric, edit = mv.logit_difference(7, 9), mv.Edit(PATTERN, blind(real), rows="each")
    read: dict[Any, Any] = {PATTERN: mv.rows([-1]), "text.0.resid_post": None}
    whole = vlm.run(real, read, [replace(edit, rows=None)], grad_of=metric)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Sees, "whole", None)
        vlm.attention_budget = "4KiB"
        pieces = vlm.run(real, read, [edit], grad_of=metric)
        vlm.attention_budget = "256MiB"
    for site in read:
        torch.testing.assert_close(pieces.grad[site], whole.grad[site])


def test_gradients_of_variants_edited_in_pieces(vlm: mv.VLM, real: mv.Prompt) -> None:
    metric = mv.logit_difference(7, 9)
    read: dict[Any, Any] = {PATTERN: mv.rows([-1]), "text.0.resid_post": None}
    variants = [[mv.Edit(PATTERN, blind(real), rows="each")], [], [mv.Edit(PATTERN, blind(real), rows=real.last)]]
    together = vlm.run(real, read, variants=variants, grad_of=metric)
    for row, edits in zip(together.rows, variants, strict=True):
        by_hand = [replace(edit, rows=None) if edit.rows == "each" else edit for edit in edits]
        alone = vlm.run(real, read, edits=by_hand, grad_of=metric)
        for site in read:
            torch.testing.assert_close(row.grad[site], alone.grad[site])


def test_attention_kept_from_a_step_is_not_written_over_by_later_ones() -> None:
    vlm = zoo.build("llava_next-sliding")
    prompt = zoo.ask(vlm, tiny.picture(width=48, height=48))
    read: dict[Any, Any] = {PATTERN: mv.lazy(), SCORES: mv.rows([-1])}
    steps = vlm.generate(prompt, (), 5, read, do_sample=False, cache_implementation="static")
    for kept, scores in zip(steps[PATTERN], steps[SCORES], strict=True):
        torch.testing.assert_close(kept.rows([-1], scores=True), scores)


def test_what_generated_tokens_look_at_is_what_is_edited(vlm: mv.VLM, real: mv.Prompt) -> None:
    even = vlm.with_edits([mv.Edit(PATTERN, lambda p: torch.full_like(p, 1 / p.shape[-1]), "decode")])
    found = mv.attention_profile(even, real, queries="generated", max_new_tokens=3)
    lengths = [len(real) + 1, len(real) + 2]
    expected = sum(len(real.image) / length for length in lengths) / 2
    assert abs(float(found.mass.sel(span="image")[0, 1, 0]) - expected) < 1e-6


def test_a_cut_of_one_head_leaves_what_the_others_are_compared_with(vlm: mv.VLM, real: mv.Prompt) -> None:
    plain = mv.attention_profile(vlm, real)
    for way in ("mask", "feature", "recompute"):
        cut = mv.attention_profile(vlm.with_edits([mv.cut_attention(1, [1, 2], heads=[0], way=way)]), real)
        for head in (1, 2, 3):
            gap = abs(cut.lift[0, 1, head] - plain.lift[0, 1, head])
            assert float(gap.max()) < 1e-5


def test_a_queries_tower_without_a_picture_behind_it_has_a_gradient_of_zero() -> None:
    vlm = zoo.build("blip2-opt")
    prompt = zoo.ask(vlm, tiny.picture(width=48, height=48))
    token = int(vlm.run(prompt).logits.argmax())
    run = vlm.run(prompt, read={"qformer.0.pattern": mv.rows([-1])}, grad_of=lambda logits: logits[:, token])
    assert bool((run.grad["qformer.0.pattern"] == 0).all())
