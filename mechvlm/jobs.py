"""A job from the client's side: written down, sent over HTTP, asked after, and its result collected.

Rule this module guards: whatever happens to the connection, to the server or to this process, what was sent is on disk
with its id, and is sent only once for one fingerprint.

>>> backend = JobBackend(model.to_model_key(), "http://127.0.0.1:5001")  # doctest: +SKIP
>>> with model.session(backend=backend):  # doctest: +SKIP
...     found = function(model, prompts).save()
"""

import io
import pickle
import time
import uuid
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import torch
from nnsight.ndif import pull_env
from nnsight.schema.config import CONFIG
from nnsight.schema.request import RequestModel
from nnsight.schema.response import ResponseModel
from nnsight.tracing.backend import Backend
from nnsight.tracing.tracer import mark
from nnsight.tracing.util import push
from tqdm import tqdm

from mechvlm import failures, ledger
from mechvlm.hosts import Host, Refused, Server, Unreachable, api_key, without_key
from mechvlm.ledger import Job, repository

CHECKED: set[tuple[str, str]] = set()
"""The servers, and the models on them, that have been looked at in this process."""


def plain_payload(tracer: Any) -> bytes:
    """A block as nnsight itself would send it."""
    pull_env()  # modules of the user's that are not installed travel by value
    return RequestModel.serialize(tracer, CONFIG.API.COMPRESS)


class JobBackend(Backend):
    """Runs an nnsight block as a job on a server, over requests and questions, so that a lost connection loses nothing.

    Args:
        model_key: nnsight's name of the model, `model.to_model_key()`.
        server: where it is sent, and how it is waited for; an address, or None for what nnsight is configured for.
        env: what the server sets before it runs, `model._remoteable_get_env()`.
        fingerprint: what the job asks for. A job of the same fingerprint, model and server that was sent before, by any
            process, and not collected, is waited for instead of sent again; "" always sends.
        payload: makes the bytes that are sent of a tracer.

    Attributes:
        job: what was sent or found, once the block has run.
        traffic: bytes sent, 0 for a job that was found, and bytes brought back.

    Raises:
        JobError: by the call, where the job is refused, fails or does not finish.
    """

    def __init__(
        self,
        model_key: str,
        server: Server | str | None = None,
        env: dict[str, Any] | None = None,
        fingerprint: str = "",
        payload: Callable[[Any], bytes] = plain_payload,
    ) -> None:
        self.model_key, self.env, self.fingerprint = model_key, env or {}, fingerprint
        self.server = server if isinstance(server, Server) else Server(server)
        self.host = Host(self.server.host)
        self.payload = payload
        self.job: Job | None = None
        self.traffic = (0, 0)

    def __call__(self, tracer: Any) -> dict[str, Any]:
        """Run a captured block there; what it saved is put where the block stands, and returned by name."""
        self.job = ledger.open_job(self.fingerprint, self.host.url, self.model_key)
        content = None if self.job is None else found_again(self.job, self.host, self.server)
        if content is None:
            check(self.host, self.model_key, self.server)
            blob = self.payload(tracer)
            self.job = send(self, blob)
            content = wait(self.job, self.host, self.server)
            self.traffic = (len(blob), 0)
        assert self.job is not None
        self.traffic = (self.traffic[0], len(content))
        saved = unpacked(self.job, content)
        for value in saved.values():
            mark(value)  # else a block around this one would let it go
        push(tracer.info.frame, saved)
        ledger.collected(self.job)
        return saved


def check(host: Host, model_key: str, server: Server) -> None:
    """Look at a server before the first job is sent to it.

    Raises:
        JobError: where it takes no job without a key and there is none, does not answer, runs other versions, or does
            not run the model.
    """
    if host.is_ndif and not api_key():
        raise failures.no_key(host.url)
    if (host.url, model_key) in CHECKED:
        return
    try:
        differing = host.differing() if server.check else {}
        hosted = None if server.deploy else host.deployments()
    except Unreachable as why:
        raise failures.silent(host.url, str(why)) from None
    except Refused as why:
        raise failures.refused(host.url, why.status, why.detail, bool(api_key())) from None
    if differing:
        raise failures.versions_differ(host.url, differing)
    if hosted is not None and same_branch(model_key) not in {same_branch(str(one.get("model_key"))) for one in hosted}:
        raise failures.not_deployed(host.url, repository(model_key), (str(one["repo_id"]) for one in hosted))
    CHECKED.add((host.url, model_key))


def same_branch(model_key: str) -> str:
    """A key in the one form that servers give it: the branch "main" is what no branch means."""
    return model_key.replace('"revision": "main"', '"revision": null')


def send(backend: JobBackend, blob: bytes) -> Job:
    """Send a job once: where the connection is lost, the server is asked whether it has it, before it is sent again.

    Raises:
        JobError: where the server refuses it, or does not answer.
    """
    host, server = backend.host, backend.server
    job = Job(str(uuid.uuid4()), host.url, backend.model_key, backend.fingerprint, compress=CONFIG.API.COMPRESS)
    job.asked = without_key(str(failures.calling()).rstrip(","))
    request = RequestModel(model_key=job.model_key, compress=job.compress, env=backend.env)
    ledger.write(job)
    end, pause = time.monotonic() + server.lost, server.pause
    while True:
        try:
            return noted(job, host.submit(request, blob, job.id))
        except Refused as why:
            ledger.strike(job.id)
            raise failures.refused(host.url, why.status, why.detail, bool(api_key())) from None
        except Unreachable as why:
            reason = str(why)
        answer = heard_of(job, host, end, server, reason)
        if answer is not None:
            return noted(job, answer)
        if time.monotonic() > end:
            ledger.strike(job.id)
            raise failures.not_sent(job, reason, asked=True)
        time.sleep(pause)
        pause = min(1.5 * pause, server.longest)


def heard_of(job: Job, host: Host, end: float, server: Server, reason: str) -> ResponseModel | None:
    """What a server says of a job that was lost on its way there; None where it does not have it.

    Raises:
        JobError: where it does not answer until the time `end`.
    """
    pause = server.pause
    while True:
        try:
            return host.said(job.id)
        except (Unreachable, Refused):
            if time.monotonic() > end:
                raise failures.not_sent(job, reason, asked=False) from None
        time.sleep(pause)
        pause = min(1.5 * pause, server.longest)


def noted(job: Job, answer: ResponseModel) -> Job:
    """A job with what the server says of it, written down under the name that the server gave it.

    Raises:
        JobError: where that is no name for a file.
    """
    before, description = job.id, answer.description
    if not ledger.NAME.fullmatch(answer.id):
        raise failures.refused(job.host, 200, f"it calls its job {answer.id!r}", True)
    if (answer.id, answer.status.value, description) != (before, job.state, job.description):
        job.id = answer.id
        ledger.write(job, answer.status.value, description)
    if answer.id != before:
        ledger.strike(before)
    return job


def found_again(job: Job, host: Host, server: Server) -> bytes | None:
    """The result of a job that was sent before; None where the server has lost it, so that it is to be sent anew."""
    try:
        return wait(job, host, server, forgotten=False)
    except LookupError:
        ledger.strike(job.id)
        return None


class Asking:
    """The questions about one job: how long it has been, and how long nobody has answered."""

    def __init__(self, job: Job, server: Server) -> None:
        self.job, self.server = job, server
        self.began = self.heard = time.monotonic()
        self.pause = server.pause

    def rest(self, why: str = "") -> None:
        """Wait a little, longer each time.

        Args:
            why: what was wrong with the last answer; empty where nothing was.

        Raises:
            JobError: where the job is not waited for any longer.
        """
        time_now, limit = time.monotonic(), self.server.timeout
        self.heard = self.heard if why else time_now
        if time_now - self.heard > self.server.lost:
            raise failures.lost(self.job, self.server.lost, why)
        left = self.pause if limit is None else min(self.pause, self.began + limit - time_now)
        if left <= 0:
            raise failures.unfinished(self.job, float(limit or 0))
        time.sleep(left)
        self.pause = min(1.5 * self.pause, self.server.longest)


def wait(job: Job, host: Host, server: Server, forgotten: bool = True) -> bytes:
    """The result of a job, as the server packed it, kept on disk before it is returned.

    Args:
        forgotten: a job that the server does not know is an error; else LookupError says so.

    Raises:
        JobError: where it failed, or is not waited for any longer.
    """
    kept = ledger.kept(job)
    if kept is not None:
        return kept
    asking = Asking(job, server)
    shown = {"bar_format": "{desc} [{elapsed}]", "leave": False, "delay": 1}
    shown |= {} if CONFIG.APP.REMOTE_LOGGING else {"disable": True}  # else as TQDM_DISABLE says
    with tqdm(desc=f"job {job.id} {job.state}", **shown) as bar:
        while True:
            why = ""
            try:
                content = asked_once(job, host, server, lambda part: tell(bar, f"job {job.id} {part}"))
            except Unreachable as trouble:
                content, why = None, str(trouble)
            except LookupError as trouble:
                if not forgotten:
                    raise
                finished = job.state == "COMPLETED"
                raise (failures.gone(job, str(trouble)) if finished else failures.unknown(job)) from None
            if content is not None:
                ledger.keep(job, content)
                return content
            line = f"job {job.id} {job.state} {job.description.strip()}"
            tell(bar, f"{line} ({why}; asking again)" if why else line)
            asking.rest(why)


def tell(bar: tqdm, line: str) -> None:
    """Show how a job goes, once it has taken longer than the bar's delay."""
    bar.set_description_str(line, refresh=False)
    bar.update(0)


def asked_once(job: Job, host: Host, server: Server, seen: Callable[[str], object]) -> bytes | None:
    """The result of a job if it is finished, and None if it is not yet.

    Args:
        seen: told how much of the result has arrived.

    Raises:
        Unreachable: where the server does not answer.
        LookupError: where it does not know the job, or no longer has its result.
        JobError: where the job failed.
    """
    try:
        answer = host.said(job.id)
        if answer is None:
            if job.age > server.lost:
                raise LookupError(job.id)
            return None  # of a job that has just been sent nothing may be written down there yet
        noted(job, answer)
        if job.state == "ERROR":
            raise failures.failed(job)
        if job.state != "COMPLETED":
            return None
        where = str(answer.data[0] if isinstance(answer.data, list) else answer.data)
        try:
            return host.download(where, seen)
        except Unreachable as why:
            raise Unreachable(f"its result at {urlsplit(where).netloc!r}: {why}") from None
    except Refused as why:
        if job.state == "COMPLETED":
            raise LookupError(why.detail) from None
        raise failures.refused(host.url, why.status, why.detail, bool(api_key())) from None


def unpacked(job: Job, content: bytes) -> dict[str, Any]:
    """What a job saved, by name, on the CPU.

    Raises:
        JobError: where it is broken, or more than plain data: what a server sends is never run as a program here.
    """
    import zstandard  # of nnsight's requirements

    try:
        if job.compress:
            content = zstandard.ZstdDecompressor().decompress(content)
        with torch.serialization.safe_globals([slice]):
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise failures.not_plain(job, str(error)) from None
    except (zstandard.ZstdError, EOFError, IndexError, KeyError, OSError, RuntimeError, ValueError) as error:
        ledger.lose(job)
        raise failures.broken(job, str(error) or type(error).__name__) from None
