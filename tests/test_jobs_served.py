"""Jobs on a server of our own, where mechvlm is not installed: results, and each row of the failure table.

All of it runs in the second environment of `.ci/run`. What needs no server is in `test_jobs.py`.
"""

# ruff: noqa: ARG001, RET504 (a name bound in a traced block is not seen by a linter)

import json
import logging
import os
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import loopback
import numpy as np
import pytest
import tiny
import torch
import zoo
from nnsight import save
from nnsight.schema.config import CONFIG
from torch import Tensor

import mechvlm as mv
from mechvlm import jobs, ledger
from mechvlm.hosts import Server
from mechvlm.jobs import JobBackend

pytestmark = zoo.second_environment
HERE = Path(__file__)
KEY = "a-key-that-nobody-may-see"
LONGEST = 30.0


@dataclass
class Place:
    """A model on the server, the same without weights here, and one prompt."""

    server: loopback.Server
    model: Any
    inputs: dict[str, Tensor]
    logits: Tensor

    def backend(self, fingerprint: str = "", **waiting: Any) -> JobBackend:
        """What runs a block there, without a pause to speak of."""
        how = Server(self.server.url, **{"timeout": LONGEST, "lost": 0.3, "pause": 0.01, "longest": 0.05, **waiting})
        return JobBackend(self.model.to_model_key(), how, self.model._remoteable_get_env(), fingerprint)

    def run(self, function: Callable[..., Any], fingerprint: str = "", **waiting: Any) -> Any:
        """What a function returns there."""
        model, inputs = self.model, self.inputs
        with model.session(backend=self.backend(fingerprint, **waiting)):
            found = save(function(model, inputs))
        return found

    def jobs(self) -> int:
        """How many jobs the server has taken."""
        return self.server.ask("/counts")["jobs"]


@pytest.fixture(scope="module")
def deployed(running: loopback.Server) -> Iterator[Place]:
    hf, processor = tiny.model(), tiny.processor()
    inputs = dict(processor(images=tiny.picture(), text="<image> is there a dog ?", return_tensors="pt"))
    folder = running.deploy(hf, processor)
    with torch.no_grad():
        logits = hf(**inputs).logits[:, -1]
    yield Place(running, loopback.client(folder, processor), inputs, logits)


@pytest.fixture
def place(deployed: Place, server: loopback.Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """The place with nothing wrong, no job written down, and no key."""
    monkeypatch.setenv("MECHVLM_JOBS", str(tmp_path / "jobs"))
    monkeypatch.delenv("NDIF_API_KEY", raising=False)
    monkeypatch.setattr(CONFIG.API, "APIKEY", None)
    monkeypatch.setattr(CONFIG.APP, "REMOTE_LOGGING", False)
    jobs.CHECKED.clear()
    assert deployed.server is server
    return deployed


def answer(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The logits of the last position, from a trace of its own; a copy, since a view is sent with all that it views."""
    with model.trace(**inputs):
        logits = model.lm_head.output[:, -1].clone().save()
    return logits


def wrong(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """A function with a mistake in it."""
    with model.trace(**inputs):
        h = model.model.language_model.layers[1].output
        logits = h[:, 99].save()  # there is no position 99
    return logits


MISTAKE = next(n for n, line in enumerate(HERE.read_text().splitlines(), 1) if "h[:, 99]" in line)


def refusal(place: Place, function: Callable[..., Any] = answer, fingerprint: str = "", **waiting: Any) -> str:
    """The sentence that a job ends with."""
    with pytest.raises(mv.remote.JobError) as caught:
        place.run(function, fingerprint, **waiting)
    text = str(caught.value)
    assert text.endswith(".") and "\n" not in text
    return text


def only_job() -> ledger.Job:
    """The one job that is written down."""
    (job,) = ledger.listed()
    return job


def left_behind(place: Place, fingerprint: str = "") -> ledger.Job:
    """A job that was sent and not waited for; the server begins with it only afterwards."""
    place.server.fail(queue=2 * LONGEST)
    refusal(place, fingerprint=fingerprint, timeout=1e-9)
    place.server.fail()
    return only_job()


def finish(place: Place, job: ledger.Job) -> None:
    """Wait until the server is done with a job, without collecting it."""
    while '"COMPLETED"' not in json.dumps(place.server.ask(f"/response/{job.id}")):
        time.sleep(0.01)


# What the server is.


def test_mechvlm_cannot_be_imported_where_the_server_is(place: Place) -> None:
    said = place.server.ask("/absent/" + ",".join(loopback.environment.ABSENT))
    assert said["absent"] == dict.fromkeys(loopback.environment.ABSENT, True)
    assert not [one for one in said["path"] if "site-packages" in one and str(place.server.folder) not in one]


def imports(model: Any, inputs: dict[str, Tensor]) -> str:
    import os

    return os.getcwd()  # noqa: PTH109


def opens(model: Any, inputs: dict[str, Tensor]) -> str:
    with model.trace(**inputs):
        text = open("/etc/hostname").read().save()  # type: ignore[attr-defined]  # noqa: PTH123, SIM115
    return text


def reaches(model: Any, inputs: dict[str, Tensor]) -> str:
    import torch as also

    return also.os.getcwd()


def holds(model: Any, inputs: dict[str, Tensor]) -> str:
    return os.getcwd()  # noqa: PTH109


@pytest.mark.parametrize(
    "function, error",
    [
        (imports, "ImportError: Module os is not whitelisted"),
        (opens, "NameError: name 'open' is not defined"),
        (reaches, "AttributeError: Module attribute os is not whitelisted"),
        (holds, "ImportError: Module os is not whitelisted"),
    ],
)
def test_shipped_code_may_do_only_what_ndif_has_published(
    place: Place, function: Callable[..., Any], error: str
) -> None:
    assert error in refusal(place, function)


def looks(model: Any, inputs: dict[str, Tensor]) -> list:
    norm = model.model.language_model.norm
    with model.trace(**inputs):
        states = model.model.language_model.layers[-1].output
        asked = norm(states)[:, -1].clone().save()
        own = norm.output[:, -1].clone().save()
    return [asked, own, tuple(norm.weight.shape), str(norm.weight.device)]


def calls(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    return model.model.language_model.norm._module(inputs["pixel_values"])


def test_a_server_can_keep_weights_from_shipped_code(place: Place) -> None:
    """As NDIF does with keys that are not trusted: traces and calls inside them, shapes, and no numbers."""
    with loopback.serve(["--weightless"]) as apart:
        elsewhere = Place(
            apart, loopback.client(apart.deploy(tiny.model(), tiny.processor())), place.inputs, place.logits
        )
        asked, own, shape, device = elsewhere.run(looks)
        assert torch.equal(asked, own) and shape == (32,) and device == "meta"
        assert "the weights are not where this code runs" in refusal(elsewhere, calls)


def test_runs_need_no_weights_beside_their_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MECHVLM_JOBS", str(tmp_path))
    here = tiny.vlm()
    metric = mv.logit_difference(5, 7)
    with loopback.serve(["--weightless"]) as apart:
        folder = apart.deploy(here.hf, here.processor)
        there = mv.load(folder, remote=mv.remote.Server(apart.url, pause=0.01, longest=0.05))
        asked = [vlm.prompt(tiny.picture(), "is there") for vlm in (here, there)]
        read, edits = ["text.1.pattern", "vision.1.resid_post"], [mv.bias_attention(1, asked[0].image, 1.0)]
        one, other = (vlm.run(own, read, edits, grad_of=metric) for vlm, own in zip((here, there), asked, strict=True))
        assert torch.equal(one.logits, other.logits)
        for site in read:
            assert torch.equal(one[site], other[site]) and torch.equal(one.grad[site], other.grad[site])
        said = [vlm.generate(own, edits, 3).tokens for vlm, own in zip((here, there), asked, strict=True)]
        assert torch.equal(*said)
        lenses = [mv.logit_lens(vlm, own) for vlm, own in zip((here, there), asked, strict=True)]
        np.testing.assert_allclose(lenses[0].probability, lenses[1].probability, atol=1e-6)


@pytest.mark.parametrize("blocking", [True, False])
def test_nnsight_s_own_client_runs_on_the_server(place: Place, blocking: bool) -> None:
    model, inputs = place.model, place.inputs
    with model.session(remote=place.server.url, blocking=blocking) as session:
        logits = save(answer(model, inputs))
    if not blocking:
        found = None
        while found is None:
            found = session.backend()
        logits = found["logits"]
    assert torch.equal(logits, place.logits)


# What a job gives.


def test_a_job_gives_what_the_model_itself_says(place: Place) -> None:
    assert torch.equal(place.run(answer), place.logits)
    assert (only_job().state, only_job().model) == ("COLLECTED", place.model.repo_id)


def test_what_is_sent_is_small_and_what_comes_back_is_what_was_saved(place: Place) -> None:
    place.run(answer)
    counts = place.server.ask("/counts")["requests"][only_job().id]
    weights = sum(x.numel() for x in place.model._module.parameters()) * 4
    assert counts["blob"] < 12_000 < weights  # a tenth of this tiny model's weights
    assert counts["out"] < 4 * place.logits.numel() + 2_000


def test_a_job_of_the_same_fingerprint_is_sent_once(place: Place) -> None:
    place.server.fail(queue=2 * LONGEST)
    before = place.jobs()
    assert "is QUEUED" in refusal(place, fingerprint="f", timeout=0.2)
    place.server.fail()
    assert torch.equal(place.run(answer, "f"), place.logits)
    assert place.jobs() == before + 1
    place.run(answer, "f")
    assert place.jobs() == before + 2, "what was collected is asked for anew"


def test_a_job_whose_process_died_is_collected_by_the_next(place: Place) -> None:
    """All that is left of the first process is its folder: the second finds the job and the server."""
    job = left_behind(place, "f")
    assert torch.equal(mv.remote.resume(job.id)["found"], place.logits)
    place.server.stop()  # the result is here, and no server is needed
    assert torch.equal(mv.remote.resume(job.id)["found"], place.logits)
    assert torch.equal(place.run(answer, "f"), place.logits)
    assert (only_job().state, mv.remote.jobs().kept.tolist()) == ("COLLECTED", [0])
    assert "with model.session(" in mv.remote.jobs().asked[0]  # the line that asked


def test_a_server_that_dies_and_comes_back_still_has_the_result(place: Place) -> None:
    job = left_behind(place, "f")
    finish(place, job)
    place.server.stop()
    assert "has not answered for 0.3 s" in refusal(place, fingerprint="f")
    place.server.start()
    before = place.jobs()
    assert torch.equal(place.run(answer, "f"), place.logits)
    assert place.jobs() == before


def test_a_script_that_is_started_again_has_the_run_that_it_did_not_wait_for(place: Place) -> None:
    """With `mv.load`, as users do it: the second time nothing is sent, and `resume` gives the same numbers."""
    folder, before = place.model.repo_id, place.jobs()
    impatient = mv.remote.Server(place.server.url, timeout=1e-9, pause=0.01)
    place.server.fail(queue=2 * LONGEST)
    vlm = mv.load(folder, remote=impatient)
    prompt = vlm.prompt(tiny.picture(), "is there a dog ?")
    with pytest.raises(mv.remote.JobError, match="the longest it was to be waited for"):
        vlm.run(prompt, read=["text.1.z"])
    place.server.fail()
    resumed = mv.remote.resume(only_job().id, timeout=LONGEST)
    run = mv.load(folder, remote=mv.remote.Server(place.server.url, timeout=LONGEST)).run(prompt, read=["text.1.z"])
    assert place.jobs() == before + 1
    assert torch.equal(run["text.1.z"], tiny.vlm().run(prompt, read=["text.1.z"])["text.1.z"])
    assert any(torch.equal(x, run["text.1.z"]) for x in tensors(resumed))


def tensors(value: Any) -> list[Tensor]:
    """All tensors in lists, tuples and dicts."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [x for part in parts for x in tensors(part)]


# Each row of the failure table.


def test_a_server_that_wants_a_key_says_so_where_none_is_set(place: Place) -> None:
    place.server.fail(key=KEY)
    assert refusal(place) == (
        f"{place.server.url} takes jobs with an API key, and none is set; get one from https://login.ndif.us or who "
        "runs that server, and set the environment variable NDIF_API_KEY or call nnsight.login()."
    )
    assert not ledger.listed(), "nothing was sent"


@pytest.mark.parametrize(
    "status, detail, told",
    [
        (401, "Missing or invalid API key.", "Missing or invalid API key"),
        (403, "Invalid API key.", "Invalid API key"),
        (400, "Invalid API key format: '{key}'.", "Invalid API key format: '[key]'"),
    ],
)
def test_a_refused_key(place: Place, monkeypatch: pytest.MonkeyPatch, status: int, detail: str, told: str) -> None:
    monkeypatch.setenv("NDIF_API_KEY", "another")
    place.server.fail(key=KEY, refuses=status, detail=detail)
    assert refusal(place) == (
        f"{place.server.url} refused the API key ({told}); get a new one from "
        "https://login.ndif.us or who runs that server, and set the environment variable NDIF_API_KEY or call "
        "nnsight.login()."
    )


def test_the_key_is_nowhere_but_in_the_request(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NDIF_API_KEY", KEY)
    monkeypatch.setattr(CONFIG.APP, "REMOTE_LOGGING", True)
    caplog.set_level(logging.DEBUG)
    place.server.fail(key=KEY)
    place.run(answer)
    seen = [repr(vars(place.backend())), repr(place.backend().host), repr(vars(place.backend().host))]
    faults: tuple[dict[str, Any], ...] = (
        {"key": "other", "detail": "no account has {key}"},
        {"key": KEY, "description": f"the key {KEY} ran out"},
        {"key": KEY, "drop_polls": 10**6},
    )
    for fault in (*faults, {"key": KEY}):
        place.server.fail(**fault)
        try:
            place.run(answer if fault in faults else wrong)
        except mv.remote.JobError as error:
            frames = [repr(frame.f_locals) for frame, _ in traceback.walk_tb(error.__traceback__)]
            chain = [*traceback.format_exception(error), repr(error.__cause__), repr(error.__context__)]
            seen += [*chain, repr(vars(error)), *(text for text in frames if "monkeypatch" not in text)]
    seen += [file.read_text(errors="replace") for file in ledger.folder().iterdir()]
    seen += [mv.remote.jobs().to_string(), caplog.text, *capsys.readouterr()]
    assert len(seen) > 20 and "[key]" in "".join(seen)
    assert not [text for text in seen if KEY in text]


def test_a_model_that_is_not_deployed(place: Place) -> None:
    place.server.fail(deployed=False)
    name = place.model.repo_id
    assert refusal(place) == (
        f"{name} is not deployed on {place.server.url}, which runs no model now; choose from mv.remote.status(), or "
        "have it loaded there with remote=mv.remote.Server(deploy=True), which can take long."
    )
    assert refusal(place, deploy=True) == (
        f"{place.server.url} refused the request (Model is not deployed, HTTP 404); mv.remote.status() says which "
        "models it runs, and mv.remote.compare() on which versions."
    )
    assert not ledger.listed()


def test_versions_that_differ(place: Place) -> None:
    from nnsight import __version__ as nnsight
    from transformers import __version__ as transformers

    place.server.fail(packages={"transformers": "4.40.1", "nnsight": "0.5.0"})
    assert refusal(place) == (
        f"{place.server.url} runs nnsight 0.5.0 and transformers 4.40.1 where this machine has {nnsight} and "
        f"{transformers}; install what it runs, or send the job all the same with "
        "remote=mv.remote.Server(check=False)."
    )
    assert torch.equal(place.run(answer, check=False), place.logits)


def test_builds_and_patches_of_a_version_do_not_differ(place: Place) -> None:
    major, minor = torch.__version__.split(".")[:2]
    place.server.fail(packages={"torch": f"{major}.{minor}.99+cu128"})
    assert torch.equal(place.run(answer), place.logits)


def test_a_queue_is_shown(place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(CONFIG.APP, "REMOTE_LOGGING", True)
    place.server.fail(queue=1.3)
    place.run(answer)
    assert f"job {only_job().id} QUEUED Moved to position 1 in Queue." in capsys.readouterr().err


def test_a_job_that_takes_too_long(place: Place) -> None:
    place.server.fail(hang=True)
    text = refusal(place, timeout=0.2)
    assert text == (
        f"job {only_job().id} on {place.server.url} is RECEIVED (Your job has been received and is waiting to be "
        "queued) after 0.2 s, the longest it was to be waited for; it goes on there, so run the same script again, or "
        f"collect it with mv.remote.resume({only_job().id!r})."
    )


@pytest.mark.parametrize("named, sent", [(True, 1), (False, 2)])
def test_a_connection_lost_behind_the_request(place: Place, named: bool, sent: int) -> None:
    """It is sent once to a server that calls jobs as it is asked to; another cannot be asked for what is lost."""
    before = place.jobs()
    place.server.fail(drop=1, named=named)
    assert torch.equal(place.run(answer), place.logits)
    assert place.jobs() == before + sent
    assert len(ledger.listed()) == 1


@pytest.mark.parametrize("fault", ["lose", "unavailable"])
def test_a_connection_lost_before_the_request_sends_it_again(place: Place, fault: str) -> None:
    before = place.jobs()
    place.server.fail(**{fault: 2})
    assert torch.equal(place.run(answer), place.logits)
    assert place.jobs() == before + 1


def test_a_connection_that_is_lost_each_time(place: Place) -> None:
    place.server.fail(lose=10**6)
    text = refusal(place)
    assert text.startswith(f"the connection to {place.server.url} was lost each time job ")
    assert text.endswith(", and it does not have the job; run again when the network is better.")
    assert not ledger.listed()


def test_a_connection_that_is_lost_for_good_as_the_job_is_sent(place: Place) -> None:
    place.server.fail(drop=1, drop_polls=10**6)
    text, job = refusal(place, fingerprint="f"), only_job()
    assert text.startswith(f"the connection to {place.server.url} was lost as job {job.id} was sent (")
    assert text.endswith(
        "), and it has not answered since whether it has the job; run the same script again, which asks first, or "
        f"collect it with mv.remote.resume({job.id!r})."
    )
    place.server.fail()
    before = place.jobs()
    assert torch.equal(place.run(answer, "f"), place.logits)
    assert place.jobs() == before


def test_a_connection_lost_while_the_job_is_waited_for(place: Place) -> None:
    place.server.fail(drop_polls=3)
    assert torch.equal(place.run(answer), place.logits)
    place.server.fail(drop_polls=10**6)
    text, job = refusal(place), ledger.listed()[-1]
    assert text.startswith(f"{place.server.url} has not answered for 0.3 s (")
    assert text.endswith(
        f") since job {job.id} was RECEIVED; the job may go on there, so run the same script again, or collect it with "
        f"mv.remote.resume({job.id!r})."
    )


def test_a_server_that_is_not_there(place: Place) -> None:
    place.server.stop()
    assert refusal(place) == (
        f"{place.server.url} does not answer ([Errno 111] Connection refused), and no job was sent; look at the "
        "address and the network."
    )


def test_a_job_that_the_server_has_forgotten(place: Place) -> None:
    job = left_behind(place, "f")
    place.server.fail(forget=True)
    job.sent = "2026-01-01"  # long enough ago for the server to have written something down
    ledger.write(job)
    with pytest.raises(mv.remote.JobError) as caught:
        mv.remote.resume(job.id)
    assert str(caught.value) == (
        f"{place.server.url} does not know job {job.id}; run the script again, which sends it anew."
    )
    place.server.fail()
    finish(place, job)  # or it would be written down once more
    (place.server.folder / "results" / f"{job.id}.json").unlink()
    assert torch.equal(place.run(answer, "f"), place.logits)
    assert ledger.read(job.id) is None


def test_a_job_of_which_nothing_is_written_down_yet_is_asked_for_again(place: Place) -> None:
    before = place.jobs()
    place.server.fail(late=3)
    assert torch.equal(place.run(answer), place.logits)
    assert place.jobs() == before + 1


def test_a_result_that_the_server_has_thrown_away(place: Place) -> None:
    job = left_behind(place)
    kept = place.server.folder / "results" / f"{job.id}.result"
    finish(place, job)
    kept.unlink()
    with pytest.raises(mv.remote.JobError) as caught:
        mv.remote.resume(job.id)
    assert str(caught.value) == (
        f"the result of job {job.id} is no longer on {place.server.url} (Not Found); run the script again, which sends "
        "it anew."
    )


def test_an_error_inside_the_trace_names_the_user_s_line(place: Place) -> None:
    with pytest.raises(mv.remote.JobError) as caught:
        place.run(wrong)
    job = only_job()
    assert str(caught.value) == (
        f"{HERE}:{MISTAKE} in wrong, `logits = h[:, 99].save()  # there is no position 99`, raised IndexError: index "
        f"99 is out of bounds for dimension 1 with size 22 on {place.server.url}; correct that line and run again (the "
        f"server's traceback is this error's .traceback and in {ledger.folder() / job.id}.json)."
    )
    assert caught.value.job == job.id and "Traceback" in caught.value.traceback
    with pytest.raises(mv.remote.JobError) as again:
        mv.remote.resume(job.id)
    assert str(again.value) == str(caught.value)
    assert torch.equal(place.run(answer), place.logits), "the server goes on"


def test_an_error_of_the_server_s_own(place: Place) -> None:
    place.server.fail(description="Model deployment evicted. Please try again later.")
    assert refusal(place) == (
        f"job {only_job().id} failed on {place.server.url} (Model deployment evicted. Please try again later); "
        "mv.remote.status() says what it runs, and running the script again sends the job anew."
    )


def whole(model: Any, inputs: dict[str, Tensor]) -> Any:
    with model.trace(**inputs) as tracer:
        found = tracer.result.save()
    return found


def test_a_result_that_is_no_plain_data(place: Place) -> None:
    text = refusal(place, whole)
    assert text.startswith(f"the result of job {only_job().id} is not plain data (")
    assert text.endswith("); return tensors, numbers, words, lists, tuples and dicts from what runs there.")


# Tables.


def test_the_table_of_models_says_what_mechvlm_reads(place: Place) -> None:
    row = mv.remote.status(place.server.url).set_index("model").loc[place.model.repo_id]
    assert dict(row) == {
        "revision": "main",
        "task": "image-text-to-text",
        "level": "HOT",
        "state": "RUNNING",
        "type": "llava",
        "reads": "yes",
    }


def test_the_table_of_versions_is_nnsight_s(place: Place) -> None:
    place.server.fail(packages={"torch": "1.0"})
    table = mv.remote.compare(place.server.url).set_index("package")
    assert list(table.index[:3]) == ["nnsight", "torch", "transformers"]
    assert table.loc["torch", "there"] == "1.0" and not table.loc["torch", "same"]
    assert table.loc["nnsight", "same"] and "mechvlm" not in table.index
