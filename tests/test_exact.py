"""Readings against what the model computes by itself, to 1e-6 in float32, in both towers, under every kernel."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import tiny
import torch
import zoo

import mechvlm as mv
from mechvlm.references import own_gradients, own_patterns

MODELS = [(kv, attention) for kv in (2, 4) for attention in ("sdpa", "eager")]
SPREAD = 0.08
"""Weights that make scores of about one, so that 1e-6 is a relative error too; sharper ones are in the laws' tests."""
LAYERS: list[tuple[str, int | None]] = [*(("text", layer) for layer in range(3)), ("vision", 0), ("vision", 1)]


@contextmanager
def softmaxes() -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """What goes into and comes out of every softmax that a forward pass takes."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    real = torch.nn.functional.softmax

    def watched(x: torch.Tensor, *args: Any, **named: Any) -> torch.Tensor:
        seen.append((x, real(x, *args, **named)))
        return seen[-1][1]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.nn.functional, "softmax", watched)
        yield seen


def own(kv_heads: int) -> dict[str, dict[tuple[str, int | None], torch.Tensor]]:
    """Scores, patterns and gradients of the answer's logit, all of the eager model's own."""
    model = tiny.model(kv_heads, "eager", spread=SPREAD).requires_grad_(True)
    with softmaxes() as seen:
        logits = model(**tiny.encoding(), output_attentions=True).logits
    places: list[tuple[str, int | None]] = [(tower, layer) for tower in ("vision", "text") for layer in range(3)]
    kept = {place: pair for place, pair in zip(places, seen, strict=True) if place in LAYERS}
    scores, patterns = ({place: pair[which] for place, pair in kept.items()} for which in (0, 1))
    total = logits[0, -1, 7] - logits[0, -1, 9]
    found = torch.autograd.grad(total, [*scores.values(), *patterns.values()])
    return {
        "scores": scores,
        "pattern": patterns,
        "scores gradient": dict(zip(scores, found[: len(scores)], strict=True)),
        "pattern gradient": dict(zip(patterns, found[len(scores) :], strict=True)),
    }


@pytest.mark.parametrize(("kv_heads", "attention"), MODELS)
def test_attention_and_its_gradients(kv_heads: int, attention: str) -> None:
    vlm = tiny.vlm(kv_heads, attention, with_processor=False, spread=SPREAD)
    sites = [mv.Site(kind, layer, tower) for kind in ("scores", "pattern") for tower, layer in LAYERS]
    run = vlm.run(vlm.prompt(encoding=tiny.encoding()), read=sites, grad_of=mv.logit_difference(7, 9))
    reference = own(kv_heads)
    for site in sites:
        place = (site.tower, site.layer)
        mine, theirs = run[site], reference[site.kind][place]
        seen = torch.isfinite(mine)
        assert torch.equal(seen, theirs > torch.finfo(torch.float32).min / 2)
        assert (mine - theirs)[seen].abs().max() <= 1e-6
        assert (run.grad[site] - reference[f"{site.kind} gradient"][place]).abs().max() <= 1e-6


def test_output_attentions_are_those_softmaxes() -> None:
    """The reference above is the public one: eager `output_attentions`."""
    model = tiny.model(attention="eager", spread=SPREAD)
    shown = model(**tiny.encoding(), output_attentions=True).attentions
    for layer in range(3):
        assert torch.equal(shown[layer], own(2)["pattern"][("text", layer)])


@pytest.mark.parametrize("kind", ["q", "k", "v", "z", "attn_out", "resid_mid", "mlp_out", "resid_post"])
@pytest.mark.parametrize("tower", ["text", "vision"])
def test_gradients_are_those_of_a_small_step(kind: str, tower: str) -> None:
    """A gradient predicts what an edit does: checked by central differences, in float64."""
    vlm = tiny.vlm(dtype=torch.float64, with_processor=False)
    prompt, site, metric = vlm.prompt(encoding=tiny.encoding()), mv.Site(kind, 1, tower), mv.logit_difference(7, 9)
    run = vlm.run(prompt, read=[site], grad_of=metric)
    step = torch.randn(run[site].shape, dtype=torch.float64) * 1e-3
    ahead, behind = (
        vlm.metric(metric)(vlm.run(prompt, edits=[mv.Edit(site, lambda x, s=sign: x + s * step)]).logits)
        for sign in (1, -1)
    )
    predicted = (run.grad[site] * step).sum()
    # Llama's norms are taken in float32 whatever the type: a smaller step would measure their rounding.
    torch.testing.assert_close((ahead - behind).sum() / 2, predicted, rtol=1e-3, atol=1e-6)


def test_an_edit_of_a_gradient_is_a_stopped_gradient() -> None:
    """Zeroing the gradient at the MLP's output is what detaching it in the model does."""
    vlm = tiny.vlm(with_processor=False)
    prompt, first = vlm.prompt(encoding=tiny.encoding()), mv.Site("resid_pre", 0)
    stop = [mv.Edit(mv.Site("mlp_out", layer), torch.zeros_like, on="grad", label="stop") for layer in range(3)]
    run = vlm.run(prompt, read=[first], edits=stop, grad_of=mv.logit_difference(7, 9))

    model, held = tiny.model(attention="eager"), []
    for layer in model.model.language_model.layers:
        layer.mlp.register_forward_hook(lambda _m, _i, out: out.detach())

    def start(_m: Any, args: Any, named: Any) -> Any:
        held.append(named["inputs_embeds"].detach().requires_grad_(True))
        return args, {**named, "inputs_embeds": held[-1]}

    model.model.language_model.register_forward_pre_hook(start, with_kwargs=True)
    logits = model(**tiny.encoding()).logits[0, -1]
    (expected,) = torch.autograd.grad(logits[7] - logits[9], held)
    torch.testing.assert_close(run.grad[first], expected, rtol=0, atol=1e-6)
    assert torch.equal(run.logits, vlm.run(prompt).logits)


def test_gradients_of_a_batch_are_its_rows_own() -> None:
    vlm = tiny.vlm(with_processor=False, spread=SPREAD)
    prompts = [vlm.prompt(encoding=tiny.encoding(question=question, seed=question)) for question in (5, 8)]
    sites, metric = ["text.1.pattern", "text.1.resid_post", "image_features", "vision.1.z"], mv.log_probability(7)
    batch = vlm.run(prompts, read=sites, grad_of=metric)
    for row, prompt in enumerate(prompts):
        alone = vlm.run(prompt, read=sites, grad_of=metric)
        for site in sites:
            torch.testing.assert_close(batch.rows[row].grad[site], alone.grad[site], rtol=0, atol=1e-6)


def test_what_is_done_to_a_reading_changes_no_other() -> None:
    """What leaves one layer enters the next, one tensor in the model and two readings."""
    vlm = tiny.vlm(with_processor=False)
    prompt = vlm.prompt(encoding=tiny.encoding())
    sites = [mv.Site(kind, layer) for layer in range(3) for kind in ("resid_pre", "resid_mid", "resid_post", "k", "z")]
    run, again = vlm.run(prompt, read=sites), vlm.run(prompt, read=sites)
    for site in sites:
        run[site].zero_()
        for other in sites[sites.index(site) + 1 :]:
            assert torch.equal(run[other], again[other]), (site, other)
    assert torch.equal(vlm.run(prompt).logits, again.logits)


NAMES = sorted(zoo.VARIANTS)


@pytest.mark.parametrize("name", zoo.each_kind(NAMES))
def test_readings_in_pieces_on_every_architecture(name: str) -> None:
    """Rows, masses, entropies and gradients of rows, of all towers, to 1e-6 of the eager model's own in float32."""
    vlm = zoo.build(name, "eager" if name == "paligemma2" else "sdpa")  # sdpa does not cap scores
    with torch.no_grad():
        for weight in vlm.hf.parameters():
            weight.mul_(0.5 if weight.ndim > 1 else 1.0)  # scores of about one, as above
    prompt, queries = zoo.ask(vlm, tiny.picture(width=48, height=48)), [-1, 0, 2]
    own = own_patterns(vlm, prompt)
    readings: dict[str, Any] = {
        "rows": mv.rows(queries),
        "mass": mv.mass({"some": [1, 2, 3]}),
        "entropy": mv.entropy(),
    }
    for what, reading in readings.items():
        vlm.attention_budget = "16KiB" if what == "rows" else "256MiB"
        run = vlm.run(prompt, read=dict.fromkeys(own, reading))
        gaps = [(run[site] - reading(own[site].double())).abs().max().item() for site in own]
        most = 5.0 if what == "entropy" else 1.0  # nats, of some 150 keys
        assert max(gaps) <= 1e-6 * most, what
    vlm.attention = "eager"  # whose backward pass rounds as the reference's does; law 10 has what SDPA's is off
    token = int(run.logits.argmax())
    gradients = {site: one for site, one in own_gradients(vlm, prompt, token).items() if site.kind == "pattern"}
    run = vlm.run(prompt, read=dict.fromkeys(gradients, mv.rows(queries)), grad_of=lambda logits: logits[:, token])
    most = max(1.0, *(one.abs().max().item() for one in gradients.values()))
    assert max((run.grad[s] - gradients[s][:, :, queries]).abs().max().item() for s in gradients) <= 1e-6 * most
