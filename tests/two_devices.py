"""A machine with a second device, simulated on the CPU, and a model whose layers are on both; run as a script.

Tensors of the device "second" hold their numbers in memory, and refuse to meet those of the CPU as a GPU's do: only
numbers without axes mix, and indices on the CPU may index what is on the device. So it is found out where tensors of
two layers meet without being brought together. What it does not show: that kernels of real devices agree, that copies
which do not wait are waited for, and how much memory is taken.

It runs in a process of its own, since torch takes a registered device for the machine's accelerator.
"""

import conftest  # noqa: F401 - beartype before nnsight, and what transformers needs where torchvision is

# isort: split
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import tiny
import torch
import zoo
from accelerate import dispatch_model
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import mechvlm as mv
from mechvlm import devices, unembedding
from mechvlm.shared import shared_logits

_setup_privateuseone_for_python_backend("second")
aten = torch.ops.aten
SECOND = torch.device("second", 0)
ACROSS = (aten.copy_.default, aten._to_copy.default)
BY_INDEX = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default)


class There(Tensor):
    """A tensor that says it is on the second device."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: Tensor) -> "There":
        about: dict[str, Any] = {
            "strides": inner.stride(),
            "storage_offset": inner.storage_offset(),
            "dtype": inner.dtype,
        }
        return torch.Tensor._make_wrapper_subclass(cls, inner.size(), device=SECOND, **about)

    def __init__(self, inner: Tensor) -> None:
        self.held: Tensor = inner

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self) -> Any:
        return self.held.untyped_storage()

    def tolist(self) -> Any:
        return self.held.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert second device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        del types
        return computed(func, args, kwargs or {})


def inner_of(x: Any) -> Any:
    return x.held if isinstance(x, There) else x


def computed(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What an operation makes of tensors, on the device that they are on."""
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    there, asked = any(isinstance(x, There) for x in tensors), kwargs.get("device")
    check_together(func, args, tensors if there else [])
    if func is aten._fused_sdp_choice.default and there:
        return 0  # attention in plain operations; the CPU's own kernel is the CPU's
    goes = there if asked is None else torch.device(asked).type == "second"
    if func in BY_INDEX or func is aten.copy_.default or (func is aten._to_copy.default and asked is None):
        goes = isinstance(args[0], There)
    given = {**kwargs, "device": torch.device("cpu")} if asked is not None and goes else kwargs
    out = func(*pytree.tree_map(inner_of, args), **pytree.tree_map(inner_of, given))
    if func is aten.copy_.default:
        return args[0]
    if not goes or not any(isinstance(x, Tensor) for x in pytree.tree_leaves(out)):
        return out
    out = pytree.tree_map(lambda x: There(x) if isinstance(x, Tensor) else x, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if there else out


def check_together(func: Any, args: tuple, tensors: list[Tensor]) -> None:
    """Refuse tensors on two devices, as torch does."""
    if func in ACROSS:
        return
    met = {x.device for x in tensors if x.ndim}
    if func in BY_INDEX and tensors:
        met = {x.device for x in (args[0], *args[2:3]) if x.ndim}
        indices = {x.device for x in args[1] if x is not None}
        met |= indices - {torch.device("cpu")} if isinstance(args[0], There) else indices
    if len(met) > 1:
        raise RuntimeError(f"Expected all tensors to be on the same device, but {func} was given {len(met)}.")


class Machine(TorchDispatchMode):
    """A machine that has the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        del types
        return computed(func, args, kwargs or {})


KERNELS: dict[str, Callable] = {
    "empty_strided": lambda size, stride, dtype=None, **_: There(torch.empty_strided(size, stride, dtype=dtype)),
    "empty.memory_format": lambda size, dtype=None, **_: There(torch.empty(size, dtype=dtype)),
    "_copy_from": lambda x, to, *_: (inner_of(to).copy_(inner_of(x)), to)[1],
    "_local_scalar_dense": lambda x: x.held.item(),
}


@contextmanager
def second_device() -> Iterator[None]:
    """The device, as long as it is needed; what C++ asks of it by itself is a handful of operations."""
    library = torch.library.Library("aten", "IMPL")
    for name, kernel in KERNELS.items():
        library.impl(name, kernel, "PrivateUse1")
    plain = devices.plain
    devices.plain = unembedding.plain = lambda weight: plain(weight) or weight.dtype in devices.PLAIN
    with Machine():
        yield


def split(name: str, late: bool) -> mv.VLM:
    """A tiny model with its layers on both devices.

    Args:
        late: whether the second half of the text's layers, the final norm and the unembedding are on the second device;
            else it has the vision tower, what stands beside the language model, and every other layer of the text.
    """
    hf, arch = zoo.VARIANTS[name].model("sdpa", torch.float32, 0), zoo.build(name).arch
    layers = {f"{path}.{number}": at for at, (path, number) in enumerate(arch.text.layers)}
    ends = (arch.norm, arch.unembed)
    above = {path.rpartition(".")[0] for path in (*layers, *ends)} | {"", *(one.split(".")[0] for one in layers)}
    plan: dict[str, str] = {}
    for path, module in hf.named_modules():
        if path in above or any(path.startswith(f"{one}.") for one in plan) or not list(module.state_dict()):
            continue
        if path in layers:
            there = layers[path] >= len(layers) // 2 if late else layers[path] % 2 == 1
        else:
            there = path in ends if late else path not in ends and "embed_tokens" not in path
        plan[path] = "second:0" if there else "cpu"
    plan |= {path: "cpu" for path, part in hf.named_modules() if path.endswith("rotary_emb") and path not in plan}
    dispatch_model(hf, plan, main_device="cpu", skip_keys=hf._skip_keys_device_placement)
    return mv.VLM(hf, zoo.build(name).processor, name=name)


def near(one: Any, other: Any) -> None:
    """The same to rounding: the second device's attention is in plain operations."""
    a, b = (torch.as_tensor(x).detach().cpu().double() for x in (one, other))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def third(logits: Tensor) -> Tensor:
    """A metric that needs no words."""
    return logits[:, 3]


def compared(name: str, half: bool) -> None:
    """A model on two devices is the model on one."""
    vlm, whole = split(name, half), zoo.build(name)
    real = zoo.ask(whole, tiny.picture())
    towers = whole.shape.kinds.items()
    every = [mv.Site(kind, n, tower) for tower, layers in towers for n, kinds in enumerate(layers) for kind in kinds]
    one, other = (model.run(real, read=every, grad_of=third) for model in (vlm, whole))
    assert {one[site].device.type for site in every} == {"cpu", "second"}, "results stay where they were made"
    for site in every:
        near(one[site], other[site])
        near(one.grad[site], other.grad[site])
    for edits in edits_of(whole, real, other):
        near(vlm.run(real, edits=edits).logits, whole.run(real, edits=edits).logits)
    said = [model.generate(real, [mv.bias_attention(0, real.image, 1.0)], max_new_tokens=3) for model in (vlm, whole)]
    assert torch.equal(said[0].tokens.cpu(), said[1].tokens)
    points = edits_of(whole, real, other)
    swept = [mv.sweep(model, real, lambda n: points[n], third, n=range(len(points))) for model in (vlm, whole)]
    near(swept[0].values, swept[1].values)
    assert swept[0].attrs["engine"] == swept[1].attrs["engine"] and "rerun" in swept[0].attrs["engine"]
    # Points that all begin in the last layer, where no row comes from the layer before.
    late = [[mv.ablate_heads(vlm.shape.layers["text"] - 1, [head])] for head in range(4)]
    swept = [mv.sweep(model, real, lambda n: late[n], third, n=range(4)) for model in (vlm, whole)]
    near(swept[0].values, swept[1].values)
    near(mv.logit_lens(vlm, real)["probability"].values, mv.logit_lens(whole, real)["probability"].values)


def edits_of(vlm: mv.VLM, real: mv.Prompt, run: mv.Run) -> list[list[mv.Edit]]:
    """Edits of every kind, with sources on the CPU."""
    last = vlm.shape.layers["text"] - 1
    source = run[mv.Site("resid_post", last)] * 2
    return [
        [mv.bias_attention(layer, [0, 1], 2.0) for layer in (0, last)],
        [mv.bias_attention(last, [0, 1], 2.0, way="recompute")],
        [mv.cut_attention(last, [1], queries=real.last)],
        [mv.ablate_heads(0, [0]), mv.scale_heads(last, [1], 2.0)],
        [mv.patch(mv.Site("resid_post", last), source, [2, 3])],
        [mv.patch(mv.Site("resid_post", 0), source)],
        [mv.steer(mv.Site("mlp_out", last), source[0, 0], 0.5, real.last)],
        *([mv.Edit(mv.Site("attn_out", layer), lambda x: x * 2)] for layer in range(last + 1)),
        [mv.Edit("image_features", lambda x: x * 2)],
    ]


def main() -> None:
    """Every model, split in both ways; and the plant, two tensors that must not meet."""
    with second_device():
        met = ""
        try:
            torch.zeros(2, device=SECOND) + torch.zeros(2)
        except RuntimeError as error:
            met = str(error)
        assert "same device" in met, "the second device refuses nothing"
        for name in ("llava", "qwen3_vl", "mllama"):
            compared(name, half=False)
            compared(name, half=True)
        vlm, whole = split("llava", True), zoo.build("llava")
        real = zoo.ask(whole, tiny.picture())
        asked = [real, real.with_text("is there a blue cat in the image ?")]
        one, other = (shared_logits(model, asked) for model in (vlm, whole))
        assert one.engine == other.engine
        near(one.logits, other.logits)


if __name__ == "__main__":
    main()
