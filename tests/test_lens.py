"""The logit lens: by pieces, on translated streams, over the picture; against transformers, numpy and planted truth."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import planted
import pytest
import sklearn.metrics
import tiny
import torch
import xarray as xr
import zoo
from torch import Tensor

import mechvlm as mv
from mechvlm.experiments.lens import logit_lens
from mechvlm.experiments.translators import Translator
from mechvlm.references import own_logits
from mechvlm.unembedding import decoded

BRIGHT_WORD = 7


@functools.cache
def asked() -> tuple[mv.VLM, mv.Prompt]:
    vlm = tiny.vlm(dtype=torch.float64)
    return vlm, vlm.prompt(tiny.picture(1), "is there a red cat in the image ?")


@functools.cache
def words_lens() -> xr.Dataset:
    vlm, real = asked()
    return logit_lens(vlm, real, positions=real.image, words=["cat", 5])


@functools.cache
def plain_logits() -> tuple[Tensor, ...]:
    """What enters each layer, and what leaves the last one before its norm, through transformers' norm and lm_head."""
    vlm, real = asked()
    kept: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _m, _g, out: kept.append(out[0] if isinstance(out, tuple) else out))
        for layer in vlm.hf.model.language_model.layers
    ]
    with torch.no_grad():
        first = vlm.hf(**real.encoding, output_hidden_states=True).hidden_states[0]
        for hook in hooks:
            hook.remove()
        return tuple(vlm.hf.lm_head(vlm.hf.model.language_model.norm(h))[0] for h in (first, *kept))


def near(found: Any, expected: Any, within: float = 1e-12) -> None:
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=0, atol=within)


def half_bright(word: int = BRIGHT_WORD) -> tuple[mv.VLM, mv.Prompt, np.ndarray]:
    """The planted model about a picture whose top left is bright, with a word that reads brightness; and the mask."""
    model = planted.build(1, 2)
    with torch.no_grad():
        model.lm_head.weight[word, planted.BRIGHT] = 5.0
    vlm = mv.VLM(model)
    mask = np.zeros((8, 8), bool)
    mask[:4, :6] = True
    pixels = torch.from_numpy(np.where(mask, 1.0, -1.0)).float().expand(1, 3, 8, 8)
    ids = torch.tensor([[1, 2, *[planted.IMAGE] * 16, 3, 4, 7, planted.LAST]])
    return vlm, vlm.prompt(encoding={"input_ids": ids, "pixel_values": pixels}), mask


# -- pieces ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("piece", [7, 63])
def test_any_piece_of_the_vocabulary_gives_what_all_of_it_gives(piece: int) -> None:
    vlm, real = asked()
    whole, parts = (logit_lens(vlm, real, words=["yes", 5], piece=size) for size in (64, piece))
    assert (whole.token == parts.token).all() and (whole.word_rank == parts.word_rank).all()
    near(parts.probability, whole.probability)
    near(parts.word_probability, whole.word_probability)


def test_ranks_and_probabilities_are_those_of_a_sorted_softmax() -> None:
    vlm, real = asked()
    found, ids = logit_lens(vlm, real, words=["yes"]), vlm.token_ids("yes")
    for layer, logits in enumerate(plain_logits()[1:]):
        shares = logits.softmax(-1).numpy()
        near(found.word_probability.sel(layer=layer, word="yes"), shares[:, ids].sum(-1))
        order = np.argsort(-shares, axis=-1)
        ranks = [min(row.tolist().index(number) for number in ids) + 1 for row in order]
        assert found.word_rank.sel(layer=layer, word="yes").values.tolist() == ranks


def test_a_small_budget_decodes_a_large_vocabulary_in_pieces_and_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm, h = tiny.vlm(vocabulary=5000), torch.randn(30, 32)
    asked_for: list[tuple[int, int]] = []
    linear = torch.nn.functional.linear

    def noted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        asked_for.append((x.shape[0], weight.shape[0]))
        return linear(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", noted)
    vlm.attention_budget = 16 * 1024 * 4
    found = decoded(vlm, h, 3, [[4000, 2]])
    assert set(asked_for) == {(4, 1024), (4, 904), (2, 1024), (2, 904)}
    logits = vlm.unembed(h).log_softmax(-1)
    best = logits.topk(3)
    assert torch.equal(found[0], best.indices)
    near(found[1], best.values, 1e-5)
    near(found[2][:, 0], logits[:, [4000, 2]].logsumexp(-1), 1e-5)
    assert torch.equal(found[3][:, 0], 1 + (logits > logits[:, [4000, 2]].amax(-1, keepdim=True)).sum(-1))


def test_the_last_layer_is_the_prediction_also_where_logits_are_capped_and_in_pieces() -> None:
    vlm = zoo.build("paligemma2", attention="eager", dtype=torch.float64)
    real = zoo.ask(vlm, tiny.picture(0, 48, 40))
    logits = own_logits(vlm, real)[0]
    last = logit_lens(vlm, real, positions=[-1], words=[5], piece=9).isel(layer=-1, position=0)
    near(last.probability, logits.softmax(-1).topk(5).values)
    assert int(last.word_rank[0]) == 1 + int((logits > logits[5]).sum())


@pytest.mark.parametrize("kind", ["resid_pre", "resid_mid", "attn_out", "mlp_out"])
def test_other_kinds_are_what_is_read_at_their_sites(kind: str) -> None:
    vlm, real = asked()
    read = vlm.run(real, read=[f"text.1.{kind}"])[f"text.1.{kind}"][0]
    with torch.no_grad():
        shares = vlm.hf.lm_head(vlm.hf.model.language_model.norm(read)).softmax(-1).topk(5).values
    near(logit_lens(vlm, real, layers=[1], kind=kind).probability[0], shares)


def test_a_planted_answer_is_added_in_its_layer_only_and_held_from_there_on() -> None:
    vlm, real, _, layer, _ = planted.planted()
    added, held = (
        logit_lens(vlm, real, positions=[-1], words=[planted.YES], kind=kind).word_probability[:, 0, 0]
        for kind in ("attn_out", "resid_post")
    )
    assert [value > 0.9 for value in added.values] == [at == layer for at in range(3)]
    near(added.values[[0, 2]], [1 / 12] * 2, 1e-6)
    near(held.values[0], 1 / 12, 1e-6)
    assert (held.values[1:] > 0.9).all()


# -- translators -------------------------------------------------------------------------------------------------------


def test_a_translator_that_undoes_a_rotation_reads_what_was_hidden() -> None:
    """Law 15: in a stream that a planted rotation has turned, only the rotation back finds the answer."""
    vlm, real, *_ = planted.planted()
    turn = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0))).Q
    turned = vlm.with_edits([mv.Edit(mv.Site("resid_post", 2), lambda h: h @ turn)])
    last: dict[str, Any] = {"positions": [-1], "layers": [2], "words": [planted.YES]}
    back = Translator(turn - torch.eye(32))
    found = [
        float(logit_lens(turned, real, **last, translators=one).word_probability.squeeze()) for one in (back, None)
    ]
    near(found[0], logit_lens(vlm, real, **last).word_probability.squeeze(), 1e-5)
    assert found[0] > 0.9 > 0.5 > found[1]


def test_translators_by_layer_are_those_of_their_layers() -> None:
    vlm, real = asked()
    shifts = [torch.randn(32, dtype=torch.float64) for _ in range(3)]
    functions = [lambda h, by=by: h + by for by in shifts]
    listed = logit_lens(vlm, real, translators=functions)
    mapped = logit_lens(vlm, real, layers=[2], translators={2: functions[2]})
    stream = vlm.run(real, read=["text.2.resid_post"])["text.2.resid_post"][0] + shifts[2]
    expected = vlm.unembed(stream).softmax(-1).topk(5).values
    near(listed.probability.sel(layer=2), expected)
    near(mapped.probability.sel(layer=2), expected)
    assert listed.attrs["translators"] == "<lambda>"


def saved(folder: Path, count: int = 3, safe: bool = False) -> list[torch.nn.Linear]:
    """A tuned lens as the tuned-lens package saves it: the state of a list of linear layers, and its settings."""
    layers = torch.nn.ModuleList([torch.nn.Linear(32, 32) for _ in range(count)])
    folder.mkdir(exist_ok=True)
    settings = {"base_model_name_or_path": "tiny", "d_model": 32, "num_hidden_layers": count, "bias": True}
    (folder / "config.json").write_text(json.dumps(settings))
    if safe:
        from safetensors.torch import save_file

        save_file(layers.state_dict(), folder / "params.safetensors")
    else:
        torch.save(layers.state_dict(), folder / "params.pt")
    return list(layers)  # type: ignore[arg-type]


@pytest.mark.parametrize("safe", [False, True], ids=["pt", "safetensors"])
def test_a_tuned_lens_reads_what_enters_each_layer(tmp_path: Path, safe: bool) -> None:
    vlm, real = tiny.vlm(), asked()[1]
    layers = saved(tmp_path, safe=safe)
    lens = logit_lens(vlm, real, kind="resid_pre", translators=mv.tuned_lens(tmp_path))
    with torch.no_grad():
        hidden = vlm.hf(**real.encoding, output_hidden_states=True).hidden_states
        for at, layer in enumerate(layers):
            h = hidden[at][0]
            shares = vlm.hf.lm_head(vlm.hf.model.language_model.norm(h + layer(h))).softmax(-1).topk(5).values
            near(lens.probability.sel(layer=at), shares, 1e-6)
    assert lens.attrs["translators"] == "tuned lens of tiny"


# -- over the picture --------------------------------------------------------------------------------------------------


def test_a_word_planted_in_bright_squares_is_mapped_where_they_are() -> None:
    vlm, prompt, mask = half_bright()
    held = mv.object_map(vlm, prompt, BRIGHT_WORD)
    assert np.array_equal(prompt.images[0].heat(held.values) > 0.9, mask)
    scores = mv.segmentation_scores(held, prompt, mask)
    assert all(float(scores[name]) == 1 for name in ("iou", "mean_iou", "accuracy", "best_iou", "pointing"))
    assert float(scores.average_precision) == float(scores.auroc) == 1
    assert (float(scores.object_share), float(scores.object_seen)) == (24 / 64, 1)
    turned = mv.segmentation_scores(1 - held, prompt, mask)
    assert (float(turned.iou), float(turned.auroc), float(turned.pointing)) == (0, 0, 0)


def test_a_word_that_is_nowhere_scores_as_chance_does() -> None:
    vlm, prompt, mask = half_bright()
    scores = mv.segmentation_scores(mv.object_map(vlm, prompt, 3) * 0, prompt, mask)
    chance = mask.mean()
    assert (float(scores.auroc), float(scores.average_precision), float(scores.pointing)) == (0.5, chance, chance)
    assert (float(scores.iou), float(scores.best_iou)) == (0, chance)


def test_the_map_is_the_highest_over_layers_of_the_words_probability() -> None:
    vlm, real = asked()
    ids = vlm.token_ids("cat")
    shares = torch.stack([logits[real.image].softmax(-1)[:, ids].sum(-1) for logits in plain_logits()[1:]]).numpy()
    found, single = mv.object_map(vlm, real, "cat"), mv.object_map(words_lens(), real, "cat", layer=1)
    near(found, shares.max(0))
    near(single, shares[1])
    assert found.peak_layer.values.tolist() == shares.argmax(0).tolist()
    near(found.attrs["internal_confidence"], shares.max())
    places = [(0, 0, int(row), int(column)) for row in range(4) for column in range(4)]
    assert list(zip(*(found[name].values for name in ("image", "tile", "row", "column")), strict=True)) == places
    assert mv.object_map(words_lens(), real, "cat", layer=[2, 0]).layer.values.tolist() == [2, 0]


@pytest.mark.parametrize("name", ["llava_next-vicuna", "idefics3", "mllama"])
def test_scores_are_scikit_learns_on_the_painted_picture(name: str) -> None:
    """With several tiles, padding, cropping, and where keys stand for the squares."""
    real = zoo.ask(zoo.build(name), tiny.picture(0, 50, 30))
    image, dim = real.images[0], "key" if name == "mllama" else "position"
    shades = np.random.default_rng(0).random((2, len(image.positions))).round(1)
    values = xr.DataArray(shades, dims=["layer", dim], coords={dim: list(image.positions)})
    mask = np.zeros(image.size[::-1], bool)
    mask[4:17, 9:33] = True
    scores = mv.segmentation_scores(values, real, mask, threshold=0.2)
    for at in range(2):
        heat = image.heat(shades[at])
        seen = ~np.isnan(heat)
        thing, value, one = mask[seen], heat[seen], scores.isel(layer=at)
        near(one.average_precision, sklearn.metrics.average_precision_score(thing, value))
        near(one.auroc, sklearn.metrics.roc_auc_score(thing, value))
        near(one.iou, sklearn.metrics.jaccard_score(thing, value > 0.2))
        near(one.accuracy, (thing == (value > 0.2)).mean())
        near(one.object_seen, thing.sum() / mask.sum())
        levels = [*np.unique(value), -np.inf]
        ious = [(thing & (value > level)).sum() / (thing | (value > level)).sum() for level in levels]
        near(one.best_iou, max(ious))
        assert float(one.best_threshold) == levels[int(np.argmax(ious))]


def test_the_share_of_a_things_tokens_that_read_as_a_word_peaks_where_it_was_planted() -> None:
    model, free = planted.build(1, 2), 9
    with torch.no_grad():
        model.lm_head.weight[BRIGHT_WORD, free], model.lm_head.weight[8, planted.MARK] = 5.0, 1.0
    vlm, prompt = mv.VLM(model), half_bright()[1]
    thing, word = prompt.image[2:7], torch.nn.functional.one_hot(torch.tensor(free), 32).float()
    on_and_off = [mv.steer(mv.Site("resid_post", layer), word, by, thing) for layer, by in ((1, 20.0), (2, -20.0))]
    lens = logit_lens(vlm.with_edits(on_and_off), prompt, positions=prompt.image, words=[BRIGHT_WORD])
    found = mv.word_share(lens, thing, BRIGHT_WORD, top=1)
    assert (found.share.values.tolist(), found.elsewhere.values.tolist()) == ([0, 1, 0], [0, 0, 0])
    assert int(found.peak_layer) == 1
    assert mv.word_share(lens, prompt.image, BRIGHT_WORD).elsewhere.isnull().all()


# -- sentences ---------------------------------------------------------------------------------------------------------

NO_LENS = "the lens does not hold 'dog', but 'cat', '5'; make it with logit_lens(..., words=['dog'])."
QUERIES = (
    "this picture is seen through a Q-Former, whose queries stand for no place in it; mv.queries_to_patches says where "
    "they look, and mv.compose_queries carries values on them over to the patches."
)
KEYS = (
    "this picture is seen by cross-attention, whose keys are its squares, and no position of the text stands for one; "
    "give values by key, such as mv.attention_map in a layer of cross-attention returns."
)
MASK = np.eye(24, dtype=bool)
ONE = "it must return finite numbers of that shape."


def narrow(h: Tensor) -> Tensor:
    """A translator of another model's width."""
    raise RuntimeError(f"{h.shape[1]} is not 3")


def lens(**more: Any) -> xr.Dataset:
    return logit_lens(*asked(), **more)


def scores(values: Any = None, mask: Any = MASK, **more: Any) -> xr.Dataset:
    values = words_lens().word_probability.sel(word="cat") if values is None else values
    return mv.segmentation_scores(values, asked()[1], mask, **more)


def share(**more: Any) -> xr.Dataset:
    real = asked()[1]
    return mv.word_share(**{"lens": words_lens(), "positions": real.image[:2], "word": "cat", **more})


@functools.cache
def by_position(name: str) -> tuple[mv.Prompt, xr.DataArray]:
    real = zoo.ask(zoo.build(name), tiny.picture(0, 48, 40))
    return real, xr.DataArray(np.zeros(len(real)), dims=["position"], coords={"position": range(len(real))})


def blind_map(name: str) -> xr.Dataset:
    real, values = by_position(name)
    return mv.segmentation_scores(values, real, np.eye(*real.images[0].size[::-1], dtype=bool))


WRONG: list[tuple[str, Callable[[], object]]] = [
    (
        "kind='pattern' is nothing that can be decoded; choose from resid_pre, resid_mid, resid_post, attn_out, "
        "mlp_out.",
        lambda: lens(kind="pattern"),
    ),
    (
        "there is no translator for layer 1; give one for each layer that is asked, or a function for all.",
        lambda: lens(translators=[torch.clone]),
    ),
    (
        "the translator of layer 0 is 3, and it must be a function from `pos d_model` to `pos d_model`.",
        lambda: lens(translators=3),
    ),
    (
        "a translator trained at text.1.resid_pre was given for text.0.resid_post; read where it was trained, for "
        "instance kind='resid_pre' for a tuned lens.",
        lambda: lens(translators=Translator(torch.eye(32), site=mv.Site("resid_pre", 1))),
    ),
    (
        "the translator of text.0.resid_post failed on float64[30, 32]: 32 is not 3; it must take and return `pos "
        "d_model`.",
        lambda: lens(translators=narrow),
    ),
    (
        f"the translator of text.0.resid_post returned float64[30, 3] for float64[30, 32]; {ONE}",
        lambda: lens(translators=lambda h: h[:, :3]),
    ),
    (
        f"the translator of text.0.resid_post returned values that are not finite for float64[30, 32]; {ONE}",
        lambda: lens(translators=lambda h: h / 0),
    ),
    (
        f"the translator of text.0.resid_post returned int64[30, 32] for float64[30, 32]; {ONE}",
        lambda: lens(translators=lambda h: h.long()),
    ),
    (
        f"the translator of text.0.resid_post returned None for float64[30, 32]; {ONE}",
        lambda: lens(translators=lambda _: None),
    ),
    (
        "the prompt holds no image to look at; make it with vlm.prompt(image, text).",
        lambda: mv.object_map(asked()[0], asked()[0].prompt(None, "is there a cat ?"), "cat"),
    ),
    (
        f"a word read at positions has no place in the picture: {KEYS}",
        lambda: mv.object_map(words_lens(), by_position("mllama")[0], 5),
    ),
    (
        f"a word read at positions has no place in the picture: {QUERIES}",
        lambda: mv.object_map(words_lens(), by_position("blip2-opt")[0], 5),
    ),
    (f"values by position have no place in the picture: {QUERIES}", lambda: blind_map("blip2-opt")),
    (NO_LENS, lambda: mv.object_map(words_lens(), asked()[1], "dog")),
    ("7 is no lens; give what logit_lens returned.", lambda: mv.object_map(7, asked()[1], "dog")),  # type: ignore[arg-type]
    (
        "layer 3 is not in the lens; its layers are 0, 1, 2.",
        lambda: mv.object_map(words_lens(), asked()[1], "cat", layer=3),
    ),
    (
        "the lens has not all image tokens; make it with logit_lens(..., positions=prompt.image).",
        lambda: mv.object_map(words_lens().isel(position=[0, 1]), asked()[1], "cat"),
    ),
    ("there is no image 1; the prompt has 1, counted from 0.", lambda: scores(image=1)),
    ("the mask holds int64, and it must hold booleans, such as labels == 3.", lambda: scores(mask=MASK.astype(int))),
    (
        "the mask has the shape (24, 23), and the picture is 24 high and 24 wide; give the mask of the original "
        "picture.",
        lambda: scores(mask=MASK[:, :23]),
    ),
    (
        "of the 576 pixels that image tokens look at 0 are in the mask; give one with some of them in it and some "
        "outside.",
        lambda: scores(mask=~MASK & MASK),
    ),
    ("3 is no DataArray; give what object_map or attention_map returns.", lambda: scores(3)),
    ("the map has no axis position, but head.", lambda: scores(xr.DataArray([1.0], dims=["head"]))),
    (
        "the map has no value for 14 of the image's 16 tokens, nor for position 5; give one for each, with coordinate "
        "position.",
        lambda: scores(words_lens().word_probability.sel(word="cat").isel(position=[0, 1])),
    ),
    ("positions holds position 0; give some of the lens's, which are 16.", lambda: share(positions=[0])),
    ("positions holds an empty list; give some of the lens's, which are 16.", lambda: share(positions=[])),
    ("top=0 is no rank; give 1 or more, where 1 is the likeliest token.", lambda: share(top=0)),
    (
        "words_by_layer draws what logit_lens returns, and was given a int.",
        lambda: mv.plot.words_by_layer(7),  # type: ignore[arg-type]
    ),
    (
        "value='share' is not known; choose 'probability' or 'rank'.",
        lambda: mv.plot.words_by_layer(words_lens(), "share"),
    ),
    (
        "the lens holds no words; make it with logit_lens(..., words=['yes']).",
        lambda: mv.plot.words_by_layer(words_lens()[["token"]]),
    ),
    (
        "positions holds position 1, and the lens has 3, 4, 5, 6, 7, 8, 9, 10 and so on.",
        lambda: mv.plot.words_by_layer(words_lens(), positions=[1]),
    ),
]


@pytest.mark.parametrize(("sentence", "wrong"), WRONG, ids=[sentence[:50] for sentence, _ in WRONG])
def test_sentences(sentence: str, wrong: Callable[[], object]) -> None:
    """Without the test run's type checks, as users meet them."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with pytest.raises((ValueError, TypeError)) as refused:
            wrong()
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
    assert str(refused.value) == sentence


def test_a_folder_that_is_no_tuned_lens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as refused:
        mv.tuned_lens(tmp_path)
    assert str(refused.value) == f"{tmp_path} holds no config.json; give the folder that a tuned lens was saved in."
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError) as refused:
        mv.tuned_lens(tmp_path)
    assert str(refused.value) == (
        f"{tmp_path} holds neither params.pt nor params.safetensors; give the folder of a tuned lens."
    )


@pytest.mark.parametrize(("key", "value"), [("num_hidden_layers", 4), ("d_model", 16)])
def test_parameters_that_do_not_fit_their_settings_are_refused(tmp_path: Path, key: str, value: int) -> None:
    saved(tmp_path / "lens", 3)
    settings = json.loads((tmp_path / "lens/config.json").read_text())
    (tmp_path / "lens/config.json").write_text(json.dumps({**settings, key: value}))
    with pytest.raises(ValueError) as refused:
        mv.tuned_lens(tmp_path / "lens")
    settings[key] = value
    assert str(refused.value) == (
        f"lens holds parameters of other names or shapes than a tuned lens of {settings['num_hidden_layers']} layers, "
        f"{settings['d_model']} wide; they are 0.weight, 0.bias and so on, one of each for every layer."
    )


def test_a_tuned_lens_runs_no_code_from_its_file(tmp_path: Path) -> None:
    """What pickle would run, torch refuses to read."""
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 1, "d_model": 2}')
    torch.save({"0.weight": Path("somewhere")}, tmp_path / "params.pt")
    with pytest.raises(ValueError) as refused:
        mv.tuned_lens(tmp_path)
    assert str(refused.value) == (
        f"{tmp_path / 'params.pt'} holds more than tensors, which are all that is read from it; save the lens's "
        "state_dict."
    )


# -- figures -----------------------------------------------------------------------------------------------------------


def test_words_by_layer_draws_medians_and_quartiles_and_ranks_downwards() -> None:
    found = words_lens()
    figure = mv.plot.words_by_layer(found, "rank")
    median = found.word_rank.median("position")
    drawn = {trace.name: trace.y for trace in figure.data if trace.showlegend is not False}
    assert list(drawn) == ["cat", "5"]
    np.testing.assert_array_equal(drawn["cat"], median.sel(word="cat"))
    np.testing.assert_array_equal(figure.data[0].y, found.word_rank.sel(word="cat").quantile(0.25, "position"))
    assert (figure.layout.yaxis.type, figure.layout.yaxis.autorange) == ("log", "reversed")
    single = mv.plot.words_by_layer(found, positions=[7])
    assert [trace.name for trace in single.data] == ["cat", "5"]


def test_maps_scores_and_shares_survive_netcdf(tmp_path: Path) -> None:
    real = asked()[1]
    held = mv.object_map(words_lens(), real, "cat")
    for name, found in {"map": held, "scores": scores(held), "share": share()}.items():
        found.to_netcdf(tmp_path / f"{name}.nc", engine="h5netcdf")
        opened = xr.load_dataset(tmp_path / f"{name}.nc", engine="h5netcdf")
        same = opened if isinstance(found, xr.Dataset) else opened[str(found.name)]
        xr.testing.assert_equal(same, found)
        assert (same.attrs["model"], same.attrs["word"]) == ("tiny", "cat")
