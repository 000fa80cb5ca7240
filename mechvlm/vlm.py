"""A vision-language model that can be read and edited at named sites.

It holds the model and its processor, turns questions into prompts, prompts into one padded batch, and a walk of the
traced model into a `Run`.

>>> vlm = mv.load("demo")
>>> real = vlm.prompt(image, "Is there a 7 in the image?")
>>> vlm.run(real, read=["text.3.resid_post"], edits=[mv.ablate_heads(2, [0])])
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from typing import Any

import nnsight
import torch
from jaxtyping import Float
from torch import Tensor

from mechvlm import batch as batches
from mechvlm.attention import bytes_of
from mechvlm.devices import packing_of, places_of, runs_on
from mechvlm.edits import Edit
from mechvlm.hosts import Server
from mechvlm.metrics import Metric, WordMetric, ids_of, text_of
from mechvlm.passes import forwards, pass_of, placed, said_by
from mechvlm.places import There, place_of
from mechvlm.plan import Plan, check_edit, check_site, listed_edits, make_plan
from mechvlm.prompt import Prompt
from mechvlm.run import Generation, Run
from mechvlm.sent import sent_prompt
from mechvlm.shapes import kernels_of, parts_of, shape_of
from mechvlm.shipping import SENT
from mechvlm.sites import Site
from mechvlm.unembedding import Readout, unembedded
from mechvlm.walk import at
from mechvlm.weights import Weights
from mechvlm.wrapped import in_nnsight

Read = Iterable[Site | str] | Mapping[Site | str, Callable[[Tensor], Any] | None]


class VLM:
    """A model that can be read and edited at named sites.

    Args:
        hf_model: a Hugging Face model of a type in `ARCHS`, in evaluation mode; by itself, or inside nnsight.
        processor: its processor; None where prompts come as ready encodings.
        name: how records name it; by default what it was loaded from.
        attention_budget: memory for pieces of attention (`mechvlm.lazy_attention`); an attribute to assign to as well.
        remote: "local" sends everything that is asked of the model as it would be sent to NDIF, and runs it here.

    Attributes:
        model: the nnsight model, for everything that has no name here.
        arch, shape: where its parts are, and its sizes.
        edits: those of every run and generation; see `with_edits`.

    Raises:
        ValueError: for a model type, attention implementation or mode that mechvlm does not read right.
    """

    def __init__(
        self,
        hf_model: Any,
        processor: Any = None,
        name: str | None = None,
        attention_budget: int | str = "256MiB",
        remote: bool | str | Server = False,
    ) -> None:
        self.place = place_of(remote)
        wrapped = isinstance(hf_model, nnsight.Envoy)
        if remote not in (False, "local") and not wrapped:
            raise ValueError(
                "a model in memory runs where it is; for one that runs elsewhere write mv.load(name, remote=True)."
            )
        self.hf: Any = hf_model._module if wrapped else hf_model
        batches.check_model(self.hf)
        config: Any = self.hf.config
        self.arch = parts_of(config)
        self.shape = shape_of(config)
        batches.check_state(self.hf)
        self.model: Any = hf_model if wrapped else in_nnsight(self.hf)
        self.processor = batches.check_processor(processor)
        self.attention_budget = bytes_of(attention_budget)
        self.edits: tuple[Edit, ...] = ()
        self.name = name or config.name_or_path or config.model_type
        # A call within a forward pass is known to nnsight only if it was named before that pass began.
        at(self.model, self.arch.row.image_features)

    @property
    def device(self) -> torch.device:
        """Where words are embedded, and so where encodings have to be; of a model elsewhere, where its results are."""
        return torch.device("cpu") if self.place.remote else runs_on(at(self.hf, str(self.arch.text.embed)))

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return self.embedding.dtype

    @property
    def embedding(self) -> Tensor:
        """The matrix that words are embedded by."""
        found: Tensor = at(self.hf, str(self.arch.text.embed)).weight
        return found

    @property
    def attention(self) -> str:
        """The attention implementation, such as 'sdpa'. Assign to it to switch all towers without loading again."""
        return kernels_of(self.hf.config)["text"]

    @attention.setter
    def attention(self, kernel: str) -> None:
        self.hf.set_attn_implementation(batches.check_kernel(kernel, self.shape.ahead, self.shape.score_cap))

    @property
    def attention_budget(self) -> int:
        """How many bytes the pieces of attention that readings and edits make may take at once."""
        return self._budget

    @attention_budget.setter
    def attention_budget(self, budget: int | str) -> None:
        self._budget = bytes_of(budget)

    @property
    def weights(self) -> Weights:
        """The matrices of each head: `vlm.weights.OV(layer, head)`, `QK`, `W_Q`, `W_K`, `W_V`, `W_O`; `W_E`, `W_U`."""
        return Weights(self)

    def __repr__(self) -> str:
        towers = (f"{t} {n} layers x {self.shape.heads[t]} heads" for t, n in self.shape.layers.items())
        dtype = str(self.dtype).removeprefix("torch.") + packing_of(self.hf.config)
        edited = f", {len(self.edits)} edits" if self.edits else ""
        kind = (
            f"{self.hf.config.model_type}, {dtype} on {self.place.name or places_of(self.hf)}, {self.attention}{edited}"
        )
        return f"VLM({self.name}: {kind}; {'; '.join(towers)})"

    def with_edits(self, edits: Sequence[Edit]) -> "VLM":
        """The same model with edits in every run and generation, before those of the run: for any experiment.

        Own edits of patterns want rows="each" where attention is not made.

        Example:
            >>> mv.attention_profile(vlm.with_edits([mv.bias_attention(3, real.image, 2.0)]), real)
        """
        for edit in map(check_edit, listed_edits("edits", edits)):
            check_site(edit.site, (), self.shape, "edit")
        (other := copy(self)).edits = (*self.edits, *edits)
        return other

    def without_edits(self) -> "VLM":
        """The same model with no edits of its own."""
        (other := copy(self)).edits = ()
        return other

    # -- questions in ------------------------------------------------------------------------------------------------

    def prompt(
        self, image: Any = None, text: str | None = None, raw: bool = False, encoding: Mapping | None = None
    ) -> Prompt:
        """A question about an image, or about several, encoded for this model.

        Args:
            image: a picture, a list of them, or None for a text without one. A picture is a file's path, its bytes, a
                PIL image or a numpy array.
            text: the question. It is put into the model's chat template, or into the prompt its authors document.
            raw: take the text verbatim, as the whole prompt, with `<image>` where each image is to stand.
            encoding: instead of all that, what a processor made of one prompt. Boxes are then in the pixels it saw.

        Raises:
            ValueError, TypeError: for a text without room for its images, a picture that cannot be read, and the like.

        Example:
            >>> vlm.prompt("cat.png", "What is this?").spans
        """
        about = (self.processor, self.arch, self.shape, self.hf.config)
        return batches.ready_or_asked(about, image, text, raw, encoding)

    def token_ids(self, word: str) -> list[int]:
        """The ids of a word's single-token spellings: as given and capitalised or not, with and without a space before.

        Raises:
            ValueError: where no spelling is one token.
        """
        return ids_of(self.processor, word)

    def word(self, token: int) -> str:
        """A token's text; its number where the tokenizer has none, as for the ids that pad a vocabulary."""
        return text_of(self.processor, token, self.shape.vocabulary)

    def metric(self, metric: Metric) -> Metric:
        """A metric as a function of logits: words become this model's token ids."""
        if isinstance(metric, WordMetric):
            return metric.resolve(self.token_ids) if metric.ids is None else metric
        if not callable(metric):
            raise TypeError(
                f"{metric!r} is no metric; give a function of logits (batch vocab) or mv.logit_difference(...)."
            )
        return metric

    # -- runs out ----------------------------------------------------------------------------------------------------

    def run(
        self,
        prompt: Prompt | Sequence[Prompt],
        read: Read = (),
        edits: Sequence[Edit] = (),
        variants: Sequence[Sequence[Edit]] | None = None,
        grad_of: Metric | None = None,
        position: int = -1,
    ) -> Run:
        """One forward pass: read sites, edit sites, take gradients.

        Args:
            prompt: one, or a list that runs as one left-padded batch. Edits and readings see each prompt's own
                positions.
            read: sites, or sites with functions that are evaluated where the model runs, so that only what they return
                is kept: `{site: mv.rows([-1])}`.
            edits: what to change, in any order; edits of one site act in the order of the list.
            variants: lists of edits, one for each row: many experiments on one prompt as one batch.
            grad_of: a metric; `run.grad[site]` is then its gradient at each site read.
            position: whose logits `run.logits` and the metric are of; by default the last position's.

        Raises:
            ValueError, TypeError: for reads and edits that cannot be, or that did not act.

        Example:
            >>> run = vlm.run(real, read=["text.3.resid_post"], grad_of=mv.logit_difference("yes", "no"))
            >>> run["text.3.resid_post"].shape == run.grad["text.3.resid_post"].shape
            True
        """
        asked = {"read": read, "edits": edits, "variants": variants, "grad_of": grad_of, "position": position}
        return next(self.runs([{"prompt": prompt, **asked}]))

    def runs(self, asked: Iterable[Mapping[str, Any]]) -> Iterator[Run]:
        """Several runs, one after the other; of a model that runs elsewhere, as one job.

        Args:
            asked: for each run what `run` takes, by name. `value`, a function of the logits `batch vocab`, is evaluated
                where the model runs; `run.metric` is then what it returns, and `run.logits` are left there. `reduce`, a
                function of two mappings, from sites as tuples (kind, layer, tower) to what was read and to its
                gradients (a list where rows have images of their own), is evaluated there too; `run.reduced` is what it
                returns, and the readings are left.

        Raises:
            ValueError, TypeError: as `run` does, of each when its turn comes, or of all before the job is sent.

        Example:
            >>> [run.logits.shape for run in vlm.runs([{"prompt": real}, {"prompt": null}])]
            [torch.Size([1, 53]), torch.Size([1, 53])]
        """
        held: dict[tuple, Any] = {}
        return forwards(self, (pass_of(self, held, **one) for one in asked))

    def plan(self, prompts: Sequence[Prompt], read: Read = (), edits: Sequence[Edit] = (), **more: Any) -> Plan:
        """Reads and edits of a run, the model's own edits first, sorted by site; see `mechvlm.plan`."""
        more = {"edits": [*self.edits, *listed_edits("edits", edits)], **more}
        return make_plan(prompts, self.shape, read, budget=self._budget, **more)

    def batch(self, prompts: Sequence[Prompt], plan: Plan) -> dict[str, Tensor]:
        """Prompts as one batch, where the model is."""
        batches.check_padding(plan.layout, self.attention, self.dtype, self.shape.crosses)
        batch = batches.collate(prompts, plan.layout, 1 if self.shape.image_token == 0 else 0, self.arch.row.positions)
        # What runs elsewhere is put there where it runs.
        return batch if self.place.remote else placed(batch, at(self.hf, str(self.arch.text.embed)))

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        edits: Sequence[Edit] = (),
        max_new_tokens: int = 20,
        read_each_step: Read = (),
        **sampling: Any,
    ) -> Generation:
        """Let the model answer, with edits in the pass over the prompt and in every step after it.

        Args:
            edits: each acts by its `when`: "prompt", "decode" or "always".
            max_new_tokens: at most so many.
            read_each_step: as `read` of `run`; step 0 is the pass over the prompt, later steps have one query.
            sampling: as in transformers: do_sample, temperature, top_p, num_beams, ...

        Example:
            >>> vlm.generate(real, edits=[mv.bias_attention(3, real.image, 2.0)]).text
        """
        return said_by(self, prompt, edits, max_new_tokens, read_each_step, sampling)[0]

    def trace(self, prompt: Prompt, **settings: Any) -> Any:
        """A plain nnsight trace of a prompt: `with vlm.trace(real): ...` on the modules of `vlm.model`."""
        prompts = batches.check_prompts(prompt, self.shape)
        if isinstance(self.place, There) and self.embedding.is_meta:
            settings = {"backend": self.place.backend(self.model, ()), **settings}
        return self.model.trace(**self.batch(prompts, make_plan(prompts, self.shape)), **settings)

    def unembed(self, h: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch vocab"]:
        """Residual streams as logits, through the model's final norm and unembedding: the logit lens."""
        batches.check_width(h, self.shape.d_model["text"])
        found: Tensor = self.place.ask(self.model, unembedded, self.arch, self.shape.logit_cap, h)
        return found

    def provenance(self, prompt: Prompt, edits: Sequence[Edit] = ()) -> dict[str, str]:
        """What a record of an experiment has to say, as plain text: for the `attrs` of a result."""
        return batches.provenance(self, prompt, [*self.edits, *edits])

    def check(self, prompt: Prompt | None = None) -> Any:
        """Run the laws that all else rests on, print a table of their errors, and return it as a pandas DataFrame."""
        from mechvlm.laws import check  # laws stand above the engine: they use what every user can

        return check(self, prompt)


SENT[VLM] = lambda vlm: (Readout, (vlm.model, vlm.arch, vlm.shape, vlm.attention_budget))
SENT[Prompt] = sent_prompt
