"""Models whose layers are on several devices, whose weights are on disk between calls, or packed into fewer bits.

What a CPU alone can show is here: layers whose weights are on disk, and hold no numbers outside of their calls, give
what weights in memory give, bit for bit. A second device is simulated in a process of its own (`two_devices.py`); real
ones have tests that wait for a GPU.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import tiny
import torch
import zoo
from torch import Tensor

import mechvlm as mv
from mechvlm.devices import ASKED_WHERE, held, matrix_of, runs_on
from mechvlm.fingerprints import weights_print
from mechvlm.placing import check_map, check_placing, computes_on, place_of
from mechvlm.shared import shared_logits

YES = mv.logit_difference("yes", "no")
QUESTION = "is there a red dog in the image ?"
Case = tuple[str, Callable[[], object]]

with_accelerate = zoo.second_environment
with_bitsandbytes = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed; runs in the second environment of .ci/run"
)
with_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; runs on a machine that has one")


def parts_of(hf: Any, layers: str) -> dict[str, str]:
    """A device_map of the CPU: the layers of a stack one by one, all else as large as it can be."""
    found = {}

    def go(path: str) -> None:
        for name, _ in hf.get_submodule(path).named_children():
            below = f"{path}.{name}".strip(".")
            if layers == path or not f"{layers}.".startswith(f"{below}."):
                found[below] = "cpu"
            else:
                go(below)

    go("")
    return found


def dispatched(hf: Any, plan: dict[str, Any], folder: Path, **more: Any) -> Any:
    """A model placed by accelerate, as transformers' `from_pretrained` does it."""
    from accelerate import dispatch_model

    keys = hf._skip_keys_device_placement
    return dispatch_model(hf, plan, offload_dir=folder, skip_keys=keys, **more).eval().requires_grad_(False)


def on_disk(name: str, folder: Path, seed: int = 0, only: tuple[str, ...] = ("",)) -> mv.VLM:
    """A tiny model with weights on disk between calls.

    Args:
        only: what the names of the parts end in that are; by default all are.
    """
    variant = zoo.VARIANTS[name]
    hf = variant.model("sdpa", torch.float32, seed)
    stack = mv.VLM(variant.model("sdpa", torch.float32, seed), None).arch.stacks["text"].layers[0][0]
    stay = ASKED_WHERE.get(hf.config.model_type, "none")
    parts = parts_of(hf, stack)
    plan = {part: "disk" if part.endswith(only) and not stay.startswith(part) else "cpu" for part in parts}
    tensors = (*hf.named_parameters(), *hf.named_buffers())
    plan |= {name: "cpu" for name, _ in tensors if not any(name.startswith(f"{part}.") for part in parts)}
    return mv.VLM(dispatched(hf, plan, folder), zoo.build(name).processor, name=name)


@cache
def in_memory() -> tuple[mv.VLM, mv.Prompt]:
    vlm = zoo.build("llava")
    return vlm, zoo.ask(vlm, tiny.picture())


SOME = ("layers.1", "lm_head", "vision_tower")


@pytest.fixture(scope="module", params=[("",), pytest.param(SOME, marks=zoo.second_environment)], ids=["all", "some"])
def pair(request: Any, tmp_path_factory: Any) -> tuple[mv.VLM, mv.VLM, mv.Prompt]:
    """A model with weights on disk, the same in memory, and a question."""
    if find_spec("accelerate") is None:
        pytest.skip("accelerate is not installed; runs where the test extra is")
    plain, real = in_memory()
    return on_disk("llava", tmp_path_factory.mktemp("weights"), only=request.param), plain, real


def every_site(vlm: mv.VLM) -> list[mv.Site]:
    towers = vlm.shape.kinds.items()
    return [mv.Site(kind, n, tower) for tower, layers in towers for n, kinds in enumerate(layers) for kind in kinds]


def same(one: Any, other: Any) -> bool:
    return bool(torch.equal(torch.as_tensor(one).cpu(), torch.as_tensor(other).cpu()))


# -- weights that are elsewhere between calls --------------------------------------------------------------------------


def test_layers_hold_no_numbers_between_calls(pair: tuple[mv.VLM, mv.VLM, mv.Prompt]) -> None:
    """The plant: without it, the tests below would show nothing."""
    vlm, plain, _ = pair
    assert vlm.hf.lm_head.weight.is_meta and vlm.hf.model.language_model.layers[1].self_attn.q_proj.weight.is_meta
    assert vlm.device == plain.device and vlm.dtype == plain.dtype


def test_every_site_and_its_gradient_are_read_as_in_memory(pair: tuple[mv.VLM, mv.VLM, mv.Prompt]) -> None:
    vlm, plain, real = pair
    sites = every_site(vlm)
    one, other = (model.run(real, read=sites, grad_of=YES) for model in (vlm, plain))
    assert same(one.logits, other.logits)
    assert all(same(one[site], other[site]) and same(one.grad[site], other.grad[site]) for site in sites)


EDITS: dict[str, Callable[[mv.Prompt], list[mv.Edit]]] = {
    "bias": lambda real: [mv.bias_attention(1, real.image, 2.0)],
    "cut": lambda real: [mv.cut_attention(1, real.image[:3], queries=real.last)],
    "factor": lambda real: [mv.scale_attention(1, real.image, 0.5)],
    "recomputed": lambda real: [mv.bias_attention(1, real.image, 2.0, way="recompute")],
    "heads": lambda _: [mv.ablate_heads(1, [0]), mv.scale_heads(2, [1], 2.0)],
    "patch": lambda real: [mv.patch("text.1.resid_post", torch.ones(1, len(real), 32), [3, 20])],
    "steer": lambda real: [mv.steer("text.1.resid_mid", torch.ones(32), 0.5, real.image)],
    "pattern": lambda _: [mv.Edit("text.1.pattern", lambda pattern: pattern * 0.5)],
    "features": lambda _: [mv.Edit("image_features", lambda x: x * 2)],
    "pixels": lambda _: [mv.Edit("vision.pixels", lambda x: x * 0.5)],
}


@pytest.mark.parametrize("name", EDITS)
def test_every_kind_of_edit_acts_as_in_memory(pair: tuple[mv.VLM, mv.VLM, mv.Prompt], name: str) -> None:
    vlm, plain, real = pair
    edits = EDITS[name](real)
    changed = plain.run(real, edits=edits).logits
    assert same(vlm.run(real, edits=edits).logits, changed) and not same(changed, plain.run(real).logits)


def test_answers_and_sweeps_and_shared_questions_are_those_in_memory(pair: tuple[mv.VLM, mv.VLM, mv.Prompt]) -> None:
    vlm, plain, real = pair
    edits = [mv.bias_attention(1, real.image, 2.0)]
    asked = [real, real.with_text("is there a blue cat in the image ?")]
    said = [model.generate(real, edits, max_new_tokens=4, read_each_step=["text.1.z"]) for model in (vlm, plain)]
    assert same(said[0].tokens, said[1].tokens) and same(said[0]["text.1.z"][2], said[1]["text.1.z"][2])
    swept = [mv.ablate_each_head(model, real, YES) for model in (vlm, plain)]
    assert same(swept[0].values, swept[1].values)
    assert swept[0].attrs["engine"] == swept[1].attrs["engine"] and "rerun" in swept[0].attrs["engine"]
    shared = [shared_logits(model, asked) for model in (vlm, plain)]
    assert same(shared[0].logits, shared[1].logits) and "on the keys and values of" in shared[0].engine


def test_the_lens_is_that_in_memory(pair: tuple[mv.VLM, mv.VLM, mv.Prompt]) -> None:
    vlm, plain, real = pair
    one, other = (mv.logit_lens(model, real, words=["yes"]) for model in (vlm, plain))
    assert all(same(one[name].values, other[name].values) for name in ("probability", "word_rank"))
    h = plain.run(real, read=["text.1.resid_post"])["text.1.resid_post"]
    assert same(vlm.unembed(h), plain.unembed(h))


def test_weights_are_read_from_where_they_are_kept(pair: tuple[mv.VLM, mv.VLM, mv.Prompt]) -> None:
    vlm, plain, _ = pair
    for layer in range(3):
        for name in ("W_Q", "W_K", "W_V", "W_O"):
            one, other = (getattr(model.weights, name)(layer, 1) for model in (vlm, plain))
            assert same(one, other) and not one.is_meta
    assert all(same(getattr(vlm.weights, name), getattr(plain.weights, name)) for name in ("W_E", "W_U", "b_U"))
    assert weights_print(vlm) == weights_print(plain)


def test_a_plain_trace_runs_where_its_first_weights_hold_no_numbers(pair: tuple[mv.VLM, mv.VLM, mv.Prompt]) -> None:
    vlm, plain, real = pair
    with vlm.trace(real):
        found = vlm.model.lm_head.output.save()
    with plain.trace(real):
        own = plain.model.lm_head.output.save()
    assert same(found, own)


def test_transformer_lens_is_not_given_layers_on_several_devices(pair: tuple[mv.VLM, mv.VLM, mv.Prompt]) -> None:
    with pytest.raises(ValueError, match="takes a model on one device, and this one's layers are on disk"):
        mv.bridged(pair[0])


def test_records_say_where_layers_were(pair: tuple[mv.VLM, mv.VLM, mv.Prompt]) -> None:
    vlm, _, real = pair
    assert "disk" in vlm.provenance(real)["device"] and "disk" in repr(vlm)


@with_accelerate
@zoo.second_environment
@pytest.mark.filterwarnings("ignore:The following device_map keys")  # weights that are no module's
@pytest.mark.parametrize("name", ["mllama", "qwen3_vl", "internvl", "gemma3", "instructblip", "idefics3"])
def test_models_of_each_kind_are_read_and_swept_as_in_memory(name: str, tmp_path: Path) -> None:
    """Gates and factors that are weights of layers (Mllama, InternVL), packed towers, DeepStack, Q-Formers, tiles."""
    plain, vlm = zoo.build(name), on_disk(name, tmp_path)
    real = zoo.ask(plain, tiny.picture())
    sites = [site for site in every_site(plain) if site.kind != "deepstack"]
    one, other = (model.run(real, read=sites, grad_of=lambda logits: logits[:, 3]) for model in (vlm, plain))
    assert all(same(one[site], other[site]) and same(one.grad[site], other.grad[site]) for site in sites)
    edits = [mv.Edit(mv.Site(kind, 0), lambda x: x * 2) for kind in ("attn_out", "mlp_out")]
    assert same(vlm.run(real, edits=edits).logits, plain.run(real, edits=edits).logits)
    assert same(vlm.generate(real, max_new_tokens=3).tokens, plain.generate(real, max_new_tokens=3).tokens)
    points = [[mv.ablate_heads(plain.shape.layers["text"] - 1, [head])] for head in range(4)]
    both = [
        mv.sweep(model, real, lambda head: points[head], lambda x: x[:, 3], head=range(4)) for model in (vlm, plain)
    ]
    assert same(both[0].values, both[1].values) and both[0].attrs["engine"] == both[1].attrs["engine"]


@with_accelerate
def test_a_checkpoint_is_loaded_as_its_device_map_says(tmp_path: Path) -> None:
    plain = mv.load("demo")
    plan = {part: "cpu" for part in parts_of(plain.hf, "model.language_model.layers")}
    plan |= {"model.language_model.layers.3": "disk", "lm_head": "disk"}
    vlm = mv.load("demo", device_map=plan, offload_folder=tmp_path)
    real = plain.prompt(mv.demo.scenes()[0].image, "Is there a 7 in the image?")
    assert sum(weight.is_meta for weight in vlm.hf.parameters()) == 10
    assert vlm.provenance(real)["device"] == "cpu, disk"
    assert same(vlm.run(real).logits, plain.run(real).logits)


# -- a second device ---------------------------------------------------------------------------------------------------


@with_accelerate
@zoo.second_environment
def test_layers_on_two_devices_meet_on_one() -> None:
    """In a process of its own, since torch takes a device that is registered for the machine's accelerator."""
    folder = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])}
    done = subprocess.run(
        [sys.executable, str(folder / "two_devices.py")], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@with_cuda
@with_accelerate
@pytest.mark.cuda
@pytest.mark.parametrize("main", [None, "cpu"], ids=["kept in memory", "computed on the CPU"])
def test_layers_on_the_cpu_and_on_a_gpu_are_one_model(main: str | None, tmp_path: Path) -> None:
    """Where the GPU is the main device, accelerate keeps the others' weights in memory; else those layers run there."""
    plain, real = in_memory()
    hf = zoo.VARIANTS["llava"].model("sdpa", torch.float32, 0)
    plan: dict[str, Any] = dict(parts_of(hf, "model.language_model.layers"))
    plan |= {"model.language_model.layers.1": "cuda:0", "lm_head": "cuda:0", "model.multi_modal_projector": "cuda:0"}
    vlm = mv.VLM(dispatched(hf, plan, tmp_path, main_device=main), plain.processor, name="llava")
    sites = every_site(vlm)
    one, other = (model.run(real, read=sites, grad_of=YES) for model in (vlm, plain))
    assert one["text.1.z"].is_cuda  # results stay where they were made
    for site in sites:
        for a, b in ((one[site], other[site]), (one.grad[site], other.grad[site])):
            torch.testing.assert_close(a.cpu(), b, rtol=1e-3, atol=1e-4)
    source = plain.run(real, read=["text.1.resid_post"])["text.1.resid_post"] * 2
    for edits in (*(make(real) for make in EDITS.values()), [mv.patch("text.1.resid_post", source)]):
        found = vlm.run(real, edits=edits).logits
        torch.testing.assert_close(found.cpu(), plain.run(real, edits=edits).logits, rtol=1e-3, atol=1e-4)
    swept, own = (mv.ablate_each_head(model, real, YES) for model in (vlm, plain))
    assert abs(swept - own).max() < 1e-3 and "rerun" in swept.attrs["engine"]
    assert same(vlm.generate(real, max_new_tokens=4).tokens, plain.generate(real, max_new_tokens=4).tokens)
    assert weights_print(vlm)[0].split()[0] == weights_print(plain)[0].split()[0]


@with_cuda
@with_accelerate
@pytest.mark.cuda
def test_a_gpu_that_is_too_small_takes_what_it_can(tmp_path: Path) -> None:
    vlm = mv.load(
        "demo", device_map="auto", max_memory={0: "2MB", "cpu": "2MB"}, offload_folder=tmp_path, dtype="float32"
    )
    plain = mv.load("demo", device="cpu")
    real = plain.prompt(mv.demo.scenes()[0].image, "Is there a 7 in the image?")
    assert len(set(vlm.hf.hf_device_map.values())) > 1
    torch.testing.assert_close(vlm.run(real).logits.cpu(), plain.run(real).logits, rtol=1e-3, atol=1e-3)


# -- weights packed into fewer bits ------------------------------------------------------------------------------------


def packed(**how: Any) -> mv.VLM:
    from transformers import BitsAndBytesConfig

    return mv.load("demo", device="cpu", quantization_config=BitsAndBytesConfig(**how))


@with_bitsandbytes
@with_accelerate
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.parametrize(
    "how", [{"load_in_4bit": True}, {"load_in_8bit": True, "llm_int8_threshold": 0.0}], ids=["4 bits", "8 bits"]
)
def test_packed_weights_are_read_unpacked_and_swept_exactly(how: dict[str, Any]) -> None:
    vlm = packed(**how)
    real = vlm.prompt(mv.demo.scenes()[0].image, "Is there a 7 in the image?")
    module = vlm.hf.model.language_model.layers[2].self_attn.o_proj
    with torch.no_grad():
        own = vlm.hf(**vlm.batch([real], vlm.plan([real]))).logits[:, -1]
        x = torch.randn(5, module.in_features)
        torch.testing.assert_close(x @ vlm.weights.heads_out(2).flatten(0, 1), module(x), rtol=2e-2, atol=3e-2)
    assert float((vlm.run(real).logits - own).abs().max()) < 1e-4
    if "load_in_8bit" in how:
        assert bool(vlm.run(real, read=["text.2.z"], grad_of=YES).grad["text.2.z"].abs().max() > 0)
    points = [[mv.ablate_heads(layer, [0])] for layer in range(8)]
    swept, whole = (mv.sweep(vlm, real, lambda n: points[n], YES, n=range(8), fast=fast) for fast in (True, False))
    assert abs(swept - whole).max() < 1e-3 and "rerun" in swept.attrs["engine"]
    assert vlm.provenance(real)["dtype"].startswith("float32, weights packed by bitsandbytes in")
    assert len(weights_print(vlm)) == len(list(vlm.hf.parameters()))


# -- sentences ---------------------------------------------------------------------------------------------------------


def without(package: str, call: Callable[[], object]) -> Callable[[], object]:
    """A call on a machine where a package is not installed."""

    def calling() -> object:
        with patch("mechvlm.placing.find_spec", lambda name: None if name == package else object()):
            return call()

    return calling


def with_gpus(count: int, call: Callable[[], object]) -> Callable[[], object]:
    """A call on a machine that says it has so many GPUs."""

    def calling() -> object:
        there, counted = (patch.object(torch.cuda, name) for name in ("is_available", "device_count"))
        with there as found, counted as number:
            found.return_value, number.return_value = count > 0, count
            return call()

    return calling


class Packed(torch.nn.Linear):
    """A layer that does not multiply by its weight as it is."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def holding(layer: Any) -> Any:
    return torch.nn.ModuleDict({"head": layer})


def unmade() -> Any:
    return holding(torch.nn.Linear(2, 2, device="meta"))


def coded() -> Any:
    made = holding(torch.nn.Linear(2, 2))
    made["head"].weight = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    return made


class Hook:
    """As accelerate's, of a module whose weights are elsewhere between calls."""


def elsewhere(hf: Any) -> Any:
    part = hf.model.vision_model.patch_embedding.to("meta")
    vars(part)["_hf_hook"] = Hook()
    return hf


def of_four_bits() -> mv.VLM:
    made = tiny.vlm()
    made.hf.config.quantization_config = BITS
    return made


BITS = {"quant_method": "bitsandbytes", "load_in_4bit": True}
CASES: list[Case] = [
    (
        "device='cpu' and device_map='auto' both say where the model goes; give one of them.",
        lambda: mv.load("demo", device="cpu", device_map="auto"),
    ),
    (
        "max_memory says how a device_map is made; give device_map='auto' with it.",
        lambda: mv.load("demo", max_memory={"cpu": "1GB"}),
    ),
    ("there is no device 'everywhere'; give 'cpu', 'cuda' or 'cuda:0'.", lambda: place_of("everywhere")),
    (
        "device 'cuda:0' was asked for, and this machine has no CUDA; use device='cpu'.",
        with_gpus(0, lambda: check_placing(None, {"device_map": {"": 0}})),
    ),
    (
        "device 'cuda:2' was asked for, and this machine has 2, counted from 0; use 'cuda:0'.",
        with_gpus(2, lambda: check_placing(None, {"device_map": {"": "cuda:0", "lm_head": "cuda:2"}})),
    ),
    (
        "device_map places 'lm_tail', and this model has no such part; its parts are named by model.named_modules().",
        lambda: check_map(torch.nn.Linear(1, 1), {"": "cpu", "lm_tail": "cpu"}),
    ),
    (
        'accelerate is not installed, which device_map needs; pip install "mechvlm[accelerate]" brings it.',
        without("accelerate", lambda: mv.load("demo", device_map="auto")),
    ),
    (
        'accelerate is not installed, which quantization_config needs; pip install "mechvlm[accelerate]" brings it.',
        without("accelerate", lambda: mv.load("demo", quantization_config=BITS)),
    ),
    (
        'bitsandbytes is not installed, which weights of 4 or 8 bits need; pip install "mechvlm[bitsandbytes]" brings '
        "it.",
        without("bitsandbytes", lambda: mv.load("demo", quantization_config=BITS)),
    ),
    (
        "bitsandbytes computes no gradients of weights of 4 bits on a CPU; load them in 8 bits, or onto a GPU.",
        lambda: of_four_bits().run(of_four_bits().prompt(tiny.picture(), QUESTION), grad_of=YES),
    ),
    ("ReLU has no weights, so it is on no device; ask a module that has some.", lambda: runs_on(torch.nn.ReLU())),
    (
        "the weight head.weight holds no numbers (it is on the meta device); load the model with its weights.",
        lambda: held(unmade(), "head.weight"),
    ),
    (
        "the weights of head are those of a Packed, which mechvlm does not take apart; load the model without "
        "quantisation or adapters to look at its matrices.",
        lambda: matrix_of(holding(Packed(2, 2)), "head"),
    ),
    (
        "the weights of head are packed (Parameter of int8); load the model without quantisation to look at its "
        "matrices.",
        lambda: matrix_of(coded(), "head"),
    ),
    (
        "transformers reads the weights of model.vision_model.patch_embedding outside of its call in a mllama model, "
        "so they cannot be kept in memory or on disk; give that part a device of its own in device_map.",
        lambda: mv.VLM(elsewhere(zoo.VARIANTS["mllama"].model("sdpa", torch.float32, 0))),
    ),
]
"""Sentences, and what they are said of; tests/test_errors.py knows by them that every raise is reached."""


def test_what_computes_is_what_the_map_names_first() -> None:
    on_three = with_gpus(3, lambda: computes_on(None, {"": "cpu", "a": "disk", "b": 2, "c": "cuda:1"}))
    assert on_three() == torch.device("cuda:2")
    assert computes_on(None, {"": "cpu", "a": "disk"}) == computes_on("cpu", None) == torch.device("cpu")
