"""What is said of jobs that were refused, failed or did not finish: one sentence each, and what to do.

Rule this module guards: an error inside a job names the user's own line, and not one of ours.
"""

import linecache
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import nnsight

from mechvlm import ledger
from mechvlm.ledger import Job
from mechvlm.origins import installed

OURS = tuple(f"{Path(str(file)).parent}{os.sep}" for file in (__file__, nnsight.__file__))
FRAME = re.compile(r'^ *File "(?P<file>.+?)", line (?P<line>\d+), in (?P<name>.+)$', re.MULTILINE)
SHIPPED = re.compile(r"^\[[^\]]*:\d+\] ")
"""How nnsight begins the file name of a function that came by its source."""


class JobError(RuntimeError):
    """A job was refused, failed, or is not finished.

    Attributes:
        job: its id; empty where none was sent.
        traceback: what the server told of an error inside the job; empty for other errors.
    """

    def __init__(self, sentence: str, job: str = "", traceback: str = "") -> None:
        super().__init__(sentence)
        self.job, self.traceback = job, traceback


@dataclass(frozen=True)
class Line:
    """A line of a program."""

    file: str
    number: int
    function: str

    @property
    def code(self) -> str:
        """Its text, where this machine has it."""
        return linecache.getline(self.file, self.number).strip()

    def __str__(self) -> str:
        text = f", `{self.code}`," if self.code else ""
        return f"{self.file}:{self.number} in {self.function}{text or ','}"


def no_key(host: str) -> JobError:
    """The server takes no job without a key, and there is none."""
    return JobError(
        f"{host} takes jobs with an API key, and none is set; get one from https://login.ndif.us or who runs that "
        "server, and set the environment variable NDIF_API_KEY or call nnsight.login()."
    )


def refused(host: str, status: int, detail: str, with_key: bool) -> JobError:
    """The server refused a request."""
    if status in {401, 403} or (status == 400 and "api key" in detail.lower()):
        if not with_key:
            return no_key(host)
        return JobError(
            f"{host} refused the API key ({detail}); get a new one from https://login.ndif.us or who runs that server, "
            "and set the environment variable NDIF_API_KEY or call nnsight.login()."
        )
    return JobError(
        f"{host} refused the request ({detail}, HTTP {status}); mv.remote.status() says which models it runs, and "
        "mv.remote.compare() on which versions."
    )


def not_deployed(host: str, model: str, hosted: Iterable[str]) -> JobError:
    """The server does not run the model."""
    names = ", ".join(sorted(set(hosted))) or "no model now"
    return JobError(
        f"{model} is not deployed on {host}, which runs {names}; choose from mv.remote.status(), or have it "
        "loaded there with remote=mv.remote.Server(deploy=True), which can take long."
    )


def versions_differ(host: str, differing: Mapping[str, tuple[str, str]]) -> JobError:
    """Client and server are not of the same versions."""
    there = " and ".join(f"{name} {pair[1]}" for name, pair in differing.items())
    here = " and ".join(pair[0] for pair in differing.values())
    return JobError(
        f"{host} runs {there} where this machine has {here}; install what it runs, or send the job all the same with "
        "remote=mv.remote.Server(check=False)."
    )


def silent(host: str, why: str) -> JobError:
    """The server did not answer before anything was sent."""
    return JobError(f"{host} does not answer ({why}), and no job was sent; look at the address and the network.")


def not_sent(job: Job, why: str, asked: bool) -> JobError:
    """The connection was lost as the job was sent."""
    if asked:
        return JobError(
            f"the connection to {job.host} was lost each time job {job.id} was sent ({why}), and it does not have the "
            "job; run again when the network is better.",
            job.id,
        )
    return JobError(
        f"the connection to {job.host} was lost as job {job.id} was sent ({why}), and it has not answered since "
        "whether it has the job; run the same script again, which asks first, or collect it with "
        f"mv.remote.resume({job.id!r}).",
        job.id,
    )


def lost(job: Job, seconds: float, why: str) -> JobError:
    """The connection was lost while the job was waited for."""
    return JobError(
        f"{job.host} has not answered for {seconds:g} s ({why}) since job {job.id} was {job.state}; the job may go on "
        f"there, so run the same script again, or collect it with mv.remote.resume({job.id!r}).",
        job.id,
    )


def unknown(job: Job) -> JobError:
    """The server has forgotten the job."""
    return JobError(f"{job.host} does not know job {job.id}; run the script again, which sends it anew.", job.id)


def unfinished(job: Job, seconds: float) -> JobError:
    """The job took longer than the user wants to wait."""
    told = f"{job.state} ({job.description.rstrip('.')})" if job.description else job.state
    return JobError(
        f"job {job.id} on {job.host} is {told} after {seconds:g} s, the longest it was to be waited for; it goes on "
        f"there, so run the same script again, or collect it with mv.remote.resume({job.id!r}).",
        job.id,
    )


def gone(job: Job, detail: str) -> JobError:
    """The server no longer has the result."""
    return JobError(
        f"the result of job {job.id} is no longer on {job.host} ({detail}); run the script again, which sends it anew.",
        job.id,
    )


def not_plain(job: Job, why: str) -> JobError:
    """The result holds what is not loaded from a server."""
    return JobError(
        f"the result of job {job.id} is not plain data ({why.splitlines()[0][:160].rstrip('. ')}); return tensors, "
        "numbers, words, lists, tuples and dicts from what runs there.",
        job.id,
    )


def broken(job: Job, why: str) -> JobError:
    """The result is not what a server packs."""
    return JobError(
        f"the result of job {job.id} came broken from {job.host} ({why.splitlines()[0][:160].rstrip('. ')}); run the "
        f"script again, which fetches it anew, or after mv.remote.forget({job.id!r}) sends the job anew.",
        job.id,
    )


def failed(job: Job) -> JobError:
    """An error inside the job, or the server's own."""
    text = job.description
    if "Traceback (most recent call last)" not in text:
        return JobError(
            f"job {job.id} failed on {job.host} ({text.strip().rstrip('.')}); mv.remote.status() says what it runs, "
            "and running the script again sends the job anew.",
            job.id,
        )
    told = f"raised {raised(text)} on {job.host}"
    where = f"the server's traceback is this error's .traceback and in {ledger.folder() / job.id}.json"
    line = culprit(text)
    if line is None:
        asked = calling()
        return JobError(f"what {asked} asked for {told}; correct it and run again ({where}).", job.id, text)
    return JobError(f"{line} {told}; correct that line and run again ({where}).", job.id, text)


def raised(text: str) -> str:
    """The error at the end of a traceback, its name and its first line."""
    last = list(FRAME.finditer(text))[-1:]
    rest = text[last[0].end() :] if last else text
    lines = [line for line in rest.splitlines() if line and not line.startswith(" ")]
    return lines[0].rstrip(".") if lines else "an error"


def culprit(text: str) -> Line | None:
    """The innermost line of a server's traceback that the user wrote; None where there is none."""
    found = None
    for match in FRAME.finditer(text):
        shipped = SHIPPED.match(match["file"])
        file = SHIPPED.sub("", match["file"])
        if not is_ours(file) and (shipped or is_here(file)):
            found = Line(file, int(match["line"]), match["name"])
    return found


def calling() -> Line | str:
    """The user's line that called mechvlm, as the program stands now."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if not is_ours(file) and is_here(file):
            return Line(file, frame.f_lineno, frame.f_code.co_name)
        frame = frame.f_back  # type: ignore[assignment]
    return "the program"


def is_ours(file: str) -> bool:
    """Whether a file is mechvlm's or nnsight's."""
    return file.startswith(OURS)


def is_here(file: str) -> bool:
    """Whether a file is one of the user's own on this machine, or a cell of a notebook."""
    return not installed(file) and (Path(file).is_file() or file in linecache.cache)
