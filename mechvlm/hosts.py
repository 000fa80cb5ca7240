"""A server that runs jobs, as it is spoken to: nnsight's paths over HTTP, with the user's key.

Rule this module guards: the key is put into a request as it leaves, and is in no other value, text or error.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from json import JSONDecodeError
from typing import Any

import nnsight
from nnsight.ndif import CRITICAL_PACKAGES, EnvComparison
from nnsight.schema.config import CONFIG
from nnsight.schema.request import RequestModel
from nnsight.schema.response import ResponseModel
from packaging.version import InvalidVersion, Version

from mechvlm.sites import told

CONNECT, ANSWER, READ = 10.0, 60.0, 600.0
"""Seconds until a connection is given up, an answer to a question, and one to a job or the next part of a result."""

STRANGE = "an answer that is not of nnsight's protocol"


class Unreachable(Exception):
    """A server does not answer, or says that it cannot now; asking again may help."""


class Refused(Exception):
    """A server answers that it will not.

    Attributes:
        status: HTTP's number.
        detail: the server's own words.
    """

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status, self.detail = status, detail


def api_key() -> str:
    """The user's key, from the environment or nnsight's configuration; empty where none is set."""
    return os.environ.get("NDIF_API_KEY") or CONFIG.API.APIKEY or ""


def without_key(text: str) -> str:
    """A text in which the key does not stand, should a server have repeated it."""
    key = api_key()
    return text.replace(key, "[key]") if key else text


class Host:
    """A server.

    Args:
        url: its address; None for the one that nnsight is configured for, which is NDIF's unless changed.

    Raises:
        ValueError: for what is no address.
    """

    def __init__(self, url: str | None = None) -> None:
        given = CONFIG.API.HOST if url is None else url
        if not given.startswith(("http://", "https://")):
            raise ValueError(
                f"{given!r} is no address of a server; give one such as 'http://127.0.0.1:5001', or True for NDIF's."
            )
        self.url = given.rstrip("/")

    @cached_property
    def client(self) -> Any:
        """What sends requests, with the key in each; no connection outlives its answer."""
        import httpx  # only what goes to a server needs it

        patience = httpx.Timeout(CONNECT, read=READ, write=READ)
        return httpx.Client(auth=with_key, timeout=patience, limits=httpx.Limits(max_keepalive_connections=0))

    def __repr__(self) -> str:
        return f"Host({self.url!r})"

    @property
    def is_ndif(self) -> bool:
        """Whether it is NDIF's own, which takes no job without a key."""
        return self.url.partition("://")[2].partition("/")[0].endswith("ndif.us")

    def get(self, path: str, **more: Any) -> Any:
        """The JSON at a path."""
        return self.json(lambda client: client.get(self.url + path, **{"timeout": ANSWER, **more}))

    def submit(self, request: RequestModel, blob: bytes, name: str) -> ResponseModel:
        """Send a job, and ask for it to be called `name`, which servers may ignore."""
        headers = {
            "ndif-timestamp": repr(time.time()),
            "nnsight-version": nnsight.__version__,
            "python-version": sys.version,
            "ndif-request_id": name,
        }
        parts = {"blob": ("request", blob, "application/octet-stream")}
        form = {"data": request.metadata()}
        found = self.json(
            lambda client: client.post(f"{self.url}/request", data=form, files=parts, headers=headers), loads=False
        )
        try:
            return ResponseModel.model_validate_json(found)
        except ValueError:
            raise Refused(200, STRANGE) from None

    def said(self, name: str) -> ResponseModel | None:
        """What the server last said of a job; None where it knows none of this name."""
        try:
            text = self.json(lambda client: client.get(f"{self.url}/response/{name}", timeout=ANSWER), loads=False)
            return ResponseModel.model_validate_json(text)
        except Refused as refused:
            if refused.status == 404:
                return None
            raise
        except ValueError:
            raise Unreachable(STRANGE) from None  # a job is not given up for what stands between it and us

    def json(self, ask: Callable[[Any], Any], loads: bool = True) -> Any:
        """What a question with the key is answered with; its text where it is not to be read."""
        with answered():
            answer = checked(ask(self.client))
            return answer.json() if loads else without_key(answer.text)

    def download(self, url: str, seen: Callable[[str], object]) -> bytes:
        """The bytes at an address that the server named, which may be another machine's and gets no key.

        Args:
            seen: told how much there is so far, in words.
        """
        content = bytearray()
        with answered(), self.client.stream("GET", url, auth=None) as answer:
            if answer.status_code >= 300:
                answer.read()
            checked(answer)
            total = int(answer.headers.get("Content-Length", 0))
            for chunk in answer.iter_bytes(1 << 17):
                content += chunk
                seen(f"{len(content) / 1e6:.1f} of {total / 1e6:.1f} MB")
        return bytes(content)

    def deployments(self) -> list[dict[str, Any]]:
        """What the server says of the models it has, those that are only on its disk left out."""
        found = self.get("/status").get("deployments", {})
        entries = [{"repo_id": name, **entry} for name, entry in found.items()]
        return [entry for entry in entries if entry.get("deployment_level") in {"HOT", "WARM"}]

    def differing(self) -> dict[str, tuple[str, str]]:
        """The packages that nnsight calls critical whose versions differ: the version here, and that there.

        What follows the second number is left out: patches, and the build that torch's `+cpu` and `+cu128` tell.
        """
        there = self.get("/env")
        packages = {name: each for name, each in there.get("packages", {}).items() if name in CRITICAL_PACKAGES}
        here = {"python_version": sys.version, "packages": {name: version(name) for name in CRITICAL_PACKAGES}}
        compared = EnvComparison(here, {**there, "packages": packages}).critical_mismatches
        apart = {name: (str(each["local"]), str(each["remote"])) for name, each in sorted(compared.items())}
        return {name: pair for name, pair in apart.items() if minor(pair[0]) != minor(pair[1])}


def minor(text: str) -> tuple[int, ...] | str:
    """The first two numbers of a version."""
    try:
        return Version(text).release[:2]
    except InvalidVersion:
        return text


def with_key(request: Any) -> Any:
    """Put the key into a request, as it leaves."""
    key = api_key()
    if key:
        request.headers["ndif-api-key"] = key
    return request


@contextmanager
def answered() -> Iterator[None]:
    """Turns the troubles of a connection into ours, which hold no request and so no key."""
    import httpx

    try:
        yield
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise Unreachable(without_key(str(error) or type(error).__name__)) from None
    except JSONDecodeError:
        raise Refused(200, STRANGE) from None


def checked(answer: Any) -> Any:
    """An answer that is one; a server's trouble of its own may pass, its refusal will not."""
    if answer.status_code < 300:
        return answer
    try:
        body = answer.json()
        detail = str(body["detail"] if isinstance(body, dict) and "detail" in body else body)
    except (JSONDecodeError, UnicodeDecodeError):
        detail = answer.text[:200]
    detail = without_key(detail).strip().rstrip(".")
    if answer.status_code >= 500:
        raise Unreachable(f"HTTP {answer.status_code}: {detail}")
    raise Refused(answer.status_code, detail)


@dataclass(frozen=True)
class Server:
    """Where jobs are sent, and how they are waited for: `mv.load(name, remote=mv.remote.Server(timeout=3600))`.

    Attributes:
        host: its address; None for the one that nnsight is configured for, which is NDIF's unless changed.
        timeout: seconds that a job is waited for; None as long as it takes. What is not waited for goes on there.
        lost: seconds that a server is asked again which does not answer.
        pause, longest: seconds between two questions, at first and at most; each time half as long again.
        check: compare versions before the first job is sent.
        deploy: whether a model that is not there may be loaded there, which can take long; else it is refused here.

    Raises:
        ValueError: for what is no address, and for times that are not above 0.

    Example:
        >>> mv.remote.Server("http://127.0.0.1:5001", timeout=3600).lost
        120.0
    """

    host: str | None = None
    timeout: float | None = None
    lost: float = 120.0
    pause: float = 0.2
    longest: float = 10.0
    check: bool = True
    deploy: bool = False

    def __post_init__(self) -> None:
        Host(self.host)
        for name in ("timeout", "lost", "pause", "longest"):
            given = vars(self)[name]
            if given is None and name == "timeout":
                continue
            if not isinstance(given, int | float) or not given > 0:
                raise ValueError(f"{name}={told(given)} is no time to wait; give seconds, more than 0.")
