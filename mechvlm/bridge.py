"""TransformerLens as a second engine: the same sites, read and edited by a program that shares no code with this one.

Rule this module guards: what it returns is what TransformerLens computed. A site that no hook of TransformerLens tells
truly is refused, and `Bridge.untold` says why. Two things are put right on the way, and only these: masked scores are
minus infinity, as here, and an edit of `resid_mid` also reaches the residual stream behind the MLP, which an edit by
TransformerLens's own `hook_resid_mid` does not.

>>> lens = mechvlm.bridge.bridged(vlm)  # doctest: +SKIP
>>> lens.run(real, read=["text.3.pattern"])["text.3.pattern"]  # doctest: +SKIP
"""

import contextlib
import copy
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import torch
from jaxtyping import Float
from torch import Tensor

from mechvlm.devices import hooks_of, places_of
from mechvlm.edits import Edit
from mechvlm.lens_names import MISSING, names_of, recorded
from mechvlm.prompt import Prompt
from mechvlm.sites import Site, as_site

Hook = Callable[[Tensor, Any], Tensor | None]


def installed() -> bool:
    """Whether TransformerLens can be imported; `pip install "mechvlm[transformer-lens]"` brings it."""
    return find_spec("transformer_lens") is not None


def supported() -> tuple[str, ...]:
    """The names of the model classes that TransformerLens knows."""
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES

    return tuple(sorted(SUPPORTED_ARCHITECTURES))


@dataclass(frozen=True, repr=False)
class BridgeRun:
    """What one forward pass of TransformerLens showed: `run[site]`, `run.logits`.

    Attributes:
        logits: of the last position, after all edits, `batch vocab`.
        values: the readings, by site.
    """

    logits: Float[Tensor, "batch vocab"]
    values: Mapping[Site, Tensor]

    def __getitem__(self, site: Site | str) -> Tensor:
        where = as_site(site)
        if where not in self.values:
            raise ValueError(f"{where} was not read in this run; pass read=[..., {str(where)!r}].")
        return self.values[where]


@dataclass(frozen=True, repr=False)
class Bridge:
    """A copy of a model inside TransformerLens.

    Attributes:
        model: the `TransformerBridge`, for everything that has no name here.
        names: for each site that TransformerLens tells truly, the name of its hook.
        untold: for each other site of the text and the vision tower, why not.
        lost: sites that can be read, and whose edits TransformerLens drops: where image features are taken from a layer
            of the vision tower, transformers records its output before TransformerLens's hook sees it.
        dtype: the type of the weights.
    """

    model: Any
    names: Mapping[Site, str]
    untold: Mapping[Site, str]
    lost: frozenset[Site]
    dtype: torch.dtype

    def run(self, prompt: Prompt, read: Iterable[Site | str] = (), edits: Sequence[Edit] = ()) -> BridgeRun:
        """One forward pass through TransformerLens: the counterpart of `VLM.run`.

        Args:
            prompt: one prompt, of the model this bridge was made of.
            read: sites. `image_features` come as TransformerLens has them, each tile by itself.
            edits: what to change, as in `VLM.run`; edits of values only.

        Raises:
            ValueError: for a site that TransformerLens does not tell truly, or a hook that did not fire.
        """
        wanted = [as_site(site) for site in read]
        acts: dict[Site, list[Edit]] = {}
        for edit in edits:
            acts.setdefault(edit.site, []).append(self._taken(edit))
        for site in (*wanted, *acts):
            if site not in self.names:
                raise ValueError(f"{site} cannot be had from TransformerLens: {self.untold.get(site, MISSING)}.")
        kept: dict[Site, Tensor] = {}
        hooks = {self.names[site]: hook_of(site, acts.get(site, []), kept) for site in (*wanted, *acts)}
        for site in (site for site in acts if site.kind == "resid_mid"):
            add_behind(hooks, self.names[site], self.names[Site("resid_post", site.layer, site.tower)])
        logits = forward(self.model, prompt, hooks, self.dtype)
        for site in (*wanted, *acts):
            if site not in kept:
                raise ValueError(f"{site} was lost: TransformerLens's hook {self.names[site]} never fired.")
        return BridgeRun(logits[:, -1], {site: kept[site] for site in wanted})

    def raw(
        self, prompt: Prompt, edits: Mapping[str, Callable[[Tensor], Tensor]], read: Iterable[str] = ()
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The last position's logits and some hooks' values, by TransformerLens's names and with nothing put right."""
        kept: dict[str, Tensor] = {}

        def touch(x: Tensor, name: str) -> Tensor | None:
            kept[name] = x.detach().clone()
            return edits[name](x.clone()) if name in edits else None

        hooks: dict[str, Hook] = {name: named(touch, name) for name in {*read, *edits}}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="(?s).*edit is discarded.*")
            logits = forward(self.model, prompt, hooks, self.dtype)
        return logits[:, -1], kept

    def _taken(self, edit: Edit) -> Edit:
        if edit.on != "value":
            raise ValueError(f"{edit} edits a gradient; TransformerLens is asked for values only.")
        if edit.site in self.lost:
            raise ValueError(
                f"{edit} would be dropped by TransformerLens, since image features are taken before its hook."
            )
        return edit

    def __repr__(self) -> str:
        return f"Bridge({self.model.cfg.architecture}; {len(self.names)} sites, {len(self.untold)} untold)"


def named(touch: Callable[[Tensor, str], Tensor | None], name: str) -> Hook:
    """A hook that calls a function with the hook's name."""

    def hooked(x: Tensor, hook: Any) -> Tensor | None:
        del hook
        return touch(x, name)

    return hooked


def forward(model: Any, prompt: Prompt, hooks: Mapping[str, Hook], dtype: torch.dtype) -> Tensor:
    """All positions' logits, with hooks by TransformerLens's names."""
    device = next(model.original_model.parameters()).device
    given = {name: x.to(device, dtype if x.is_floating_point() else x.dtype) for name, x in prompt.encoding.items()}
    ids = given.pop("input_ids")
    with torch.no_grad():
        return model.run_with_hooks(ids, fwd_hooks=list(hooks.items()), return_type="logits", **given)


def hook_of(site: Site, edits: Sequence[Edit], kept: dict[Site, Tensor]) -> Hook:
    """A hook that edits a site's tensor and keeps what the model goes on with."""

    def touch(x: Tensor, hook: Any) -> Tensor | None:
        del hook
        flat = x.ndim < len(site.axes)  # Qwen's towers have one sequence for all images, and no batch axis
        y = x[None] if flat else x
        if site.kind == "scores":
            y = y.masked_fill(y <= torch.finfo(y.dtype).min / 2, float("-inf"))
        for edit in edits:
            y = edit.fn(y.clone())
        kept[site] = y.detach().clone()
        if not edits:
            return None
        y = y.clamp_min(torch.finfo(y.dtype).min) if site.kind == "scores" else y
        return y[0] if flat else y

    return touch


def add_behind(hooks: dict[str, Hook], mid: str, post: str) -> None:
    """Let what the edit of one hook changes be added at another, before that is edited or read."""
    at_mid, at_post = hooks[mid], hooks.get(post)
    change: list[Tensor] = []

    def remember(x: Tensor, hook: Any) -> Tensor | None:
        new = at_mid(x, hook)
        change.append(torch.zeros_like(x) if new is None else new - x)
        return new

    def add(x: Tensor, hook: Any) -> Tensor:
        new = x + change[0]
        after = None if at_post is None else at_post(new, hook)
        return new if after is None else after

    hooks[mid], hooks[post] = remember, add


def bridged(vlm: Any) -> Bridge:
    """A copy of a VLM's model inside TransformerLens. The VLM itself is left as it is.

    Raises:
        ValueError: for a class of models, or a vision tower, that TransformerLens does not know, or layers on several
            devices.
        ModuleNotFoundError: where TransformerLens is not installed.
    """
    if any(hooks_of(vlm.hf)):
        raise ValueError(
            f"TransformerLens takes a model on one device, and this one's layers are on {places_of(vlm.hf)}; load it "
            "without device_map."
        )
    if not installed():
        raise ModuleNotFoundError(
            'TransformerLens is not installed; pip install "mechvlm[transformer-lens]" brings it.'
        )
    kind = type(vlm.hf).__name__
    if kind not in supported():
        raise ValueError(f"TransformerLens does not know {kind}; mechvlm.bridge.supported() lists what it knows.")
    tower = vlm.hf.config.vision_config.model_type
    if kind == "LlavaForConditionalGeneration" and tower not in ("clip_vision_model", "siglip_vision_model"):
        raise ValueError(f"TransformerLens knows LLaVA with CLIP or SigLIP, and this one's vision tower is {tower!r}.")
    model = copy.deepcopy(vlm.hf)
    model.set_attn_implementation("eager")  # under another, hooks of attention left to transformers never fire
    model.config.architectures = [kind]  # a model that was built, not loaded, does not say its class
    with tempfile.TemporaryDirectory() as place, offline(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations of transformers, met by TransformerLens
        (stand_in() if vlm.processor is None else vlm.processor).save_pretrained(place)
        made = boot(model, place, vlm)
    names, untold = names_of(made, vlm)
    return Bridge(made, names, untold, recorded(vlm), vlm.dtype)


def boot(model: torch.nn.Module, place: str, vlm: Any) -> Any:
    """The `TransformerBridge` around a model, with the processor that a folder holds."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(place)  # TransformerLens asks where it is from, and loads it again
    return TransformerBridge.boot_transformers(
        place, hf_model=model, tokenizer=tokenizer, dtype=vlm.dtype, device=vlm.device
    )


def stand_in() -> Any:
    """A tokenizer of three words, for a VLM that has none: TransformerLens does not start without one."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Keep TransformerLens from installing packages, and from asking for those that only processors need.

    Where it cannot build a processor it runs pip for torchvision. The bridge here is given ready encodings, so it needs
    none.
    """
    from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
    from transformer_lens.model_bridge.sources.transformers import helpers

    with (
        patch.object(helpers, "_ensure_torchvision", lambda: False),
        patch.object(ArchitectureAdapter, "_check_required_libraries", lambda _: None),
        patch.dict(os.environ, {"PIP_NO_INDEX": "1"}),
    ):
        yield
