"""What is said of jobs and written down of them, where no server is needed; the rest is in `test_jobs_served.py`."""

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import jaxtyping
import nnsight
import pytest
import torch
from nnsight.schema.config import CONFIG

import mechvlm as mv
from mechvlm import failures, hosts, jobs, ledger
from mechvlm.archs import ARCHS
from mechvlm.ledger import Job
from mechvlm.refusals import REFUSED

KEY = 'nnsight.modeling.transformers.TransformersModel:{"repo_id": "a/model", "revision": null}'
HOST = "http://127.0.0.1:1"
HERE = Path(__file__)
INNER = str(Path(nnsight.__file__).parent / "tracing" / "tracer.py")
OURS = str(Path(mv.__file__).parent / "visit.py")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of jobs of the test's own, and no key."""
    monkeypatch.setenv("MECHVLM_JOBS", str(tmp_path / "jobs"))
    monkeypatch.delenv("NDIF_API_KEY", raising=False)
    monkeypatch.setattr(CONFIG.API, "APIKEY", None)
    return tmp_path / "jobs"


def job(
    name: str = "j-1", state: str = "QUEUED", fingerprint: str = "f", description: str = "", sent: str = "2026-01-02"
) -> Job:
    """A job that is written down."""
    made = Job(name, HOST, KEY, fingerprint, state, description, sent)
    ledger.write(made)
    return made


# Where an error is said to be.


def traceback(*frames: tuple[str, int, str], error: str = "ValueError: no such thing") -> str:
    """A server's traceback through these files, lines and functions."""
    lines = [f'  File "{file}", line {line}, in {name}\n    some code\n    ^^^^' for file, line, name in frames]
    return "\n".join(["Traceback (most recent call last):", *lines, error, "", error.partition(": ")[2]])


@pytest.mark.parametrize(
    "frames, found",
    [
        ([("/srv/service/runs.py", 9, "work"), (f"[edit:3] {HERE}", 4, "edit")], (4, "edit")),
        ([(f"[edit:3] {HERE}", 4, "edit"), (f"[offer:9] {OURS}", 12, "offer"), (INNER, 7, "__exit__")], (4, "edit")),
        ([(str(HERE), 8, "<module>"), ("/usr/lib/x/site-packages/torch/nn/module.py", 3, "forward")], (8, "<module>")),
        ([(str(HERE), 8, "outer"), ("[edit:3] /gone/notebook.py", 5, "edit")], (5, "edit")),
        ([("/srv/service/runs.py", 9, "work"), (f"[offer:9] {OURS}", 12, "offer"), (json.__file__, 3, "loads")], None),
    ],
    ids=["his function", "not ours behind it", "not a library's", "a file that is not here", "none of his"],
)
def test_the_innermost_line_that_the_user_wrote_is_found(
    frames: list[tuple[str, int, str]], found: tuple[int, str] | None
) -> None:
    line = failures.culprit(traceback(*frames))
    assert (line and (line.number, line.function)) == found


def test_a_line_is_shown_with_its_code() -> None:
    assert str(failures.Line(str(HERE), 1, "<module>")).startswith(f'{HERE}:1 in <module>, `"""What is said of jobs')
    assert str(failures.Line("/gone/notebook.py", 5, "edit")) == "/gone/notebook.py:5 in edit,"


def test_an_error_without_a_line_of_the_user_s_names_the_line_that_asked() -> None:
    text = traceback(("/srv/service/runs.py", 9, "work"), error="OutOfMemoryError: CUDA out of memory.")
    error = failures.failed(job(description=text, state="ERROR"))
    here = next(n for n, line in enumerate(HERE.read_text().splitlines(), 1) if "failures.failed(job(des" in line)
    assert str(error) == (
        f"what {HERE}:{here} in test_an_error_without_a_line_of_the_user_s_names_the_line_that_asked, `error = "
        'failures.failed(job(description=text, state="ERROR"))`, asked for raised OutOfMemoryError: CUDA out of memory '
        f"on {HOST}; correct it and run again (the server's traceback is this error's .traceback and in "
        f"{ledger.folder() / 'j-1.json'})."
    )
    assert error.traceback == text and error.job == "j-1"


# What is written down.


def test_what_is_written_down_is_read_again(folder: Path) -> None:
    one = job()
    assert ledger.read("j-1") == one and one.model == "a/model"
    assert one.age > 86_400 and Job("j-2", HOST, KEY).age < 60
    assert [path.name for path in folder.iterdir()] == ["j-1.json"]
    ledger.keep(one, b"as it came")
    assert (ledger.kept(one), ledger.size(one)) == (b"as it came", 10)
    ledger.collected(one)
    assert (ledger.kept(one), ledger.size(one)) == (None, 0)
    ledger.strike("j-1")
    assert not list(folder.iterdir())


def test_only_the_newest_open_job_of_a_fingerprint_is_found() -> None:
    for name, state, sent in [
        ("a", "QUEUED", "1"),
        ("b", "COMPLETED", "2"),
        ("c", "COLLECTED", "3"),
        ("d", "ERROR", "4"),
    ]:
        job(name, state, sent=sent)
    found = ledger.open_job("f", HOST, KEY)
    assert found is not None and found.id == "b"
    assert ledger.open_job("g", HOST, KEY) is None
    assert ledger.open_job("f", "http://elsewhere", KEY) is None
    job("e", fingerprint="")
    assert ledger.open_job("", HOST, KEY) is None, "what has no fingerprint is never found again"


def test_files_of_no_use_are_passed_over(folder: Path) -> None:
    job()
    (folder / "half.json").write_text('{"id": "half"')
    (folder / "old.json").write_text('{"id": "old"}')
    (folder.parent / "other.json").write_text((folder / "j-1.json").read_text())
    assert [one.id for one in ledger.listed()] == ["j-1"]
    assert ledger.read("../other") is None


def test_jobs_that_have_ended_are_read_once_and_go_after_a_month(monkeypatch: pytest.MonkeyPatch) -> None:
    job("old", "COLLECTED")
    job("new", "COLLECTED", sent=ledger.now())
    open_one = job("open", sent=ledger.now())
    assert ledger.open_job("f", HOST, KEY) == open_one
    assert {one.id for one in ledger.listed()} == {"new", "open"}
    read = list[str]()
    monkeypatch.setattr(ledger, "read", read.append)
    ledger.open_job("f", HOST, KEY)
    assert read == ["open"]


def test_a_server_that_takes_a_question_and_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "ANSWER", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        host = hosts.Host(f"http://127.0.0.1:{silent.getsockname()[1]}")
        for ask in (host.deployments, lambda: host.said("j-1")):
            with pytest.raises(hosts.Unreachable, match="timed out"):
                ask()


def test_the_folder_is_the_user_s_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MECHVLM_JOBS")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert ledger.folder() == tmp_path / "cache" / "mechvlm" / "jobs"
    assert ledger.folder().stat().st_mode & 0o077 == 0
    monkeypatch.setattr("sys.platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert ledger.caches() == tmp_path / "local"


def test_the_table_of_jobs() -> None:
    ledger.keep(job("b", "COMPLETED", sent="2"), b"1234")
    job("a", "ERROR", sent="1", description=traceback(error="ValueError: no"))
    table = mv.remote.jobs().set_index("job")
    assert list(table.index) == ["a", "b"] and list(table.kept) == [0, 4]
    assert dict(table.loc["a", ["model", "host", "state", "description"]]) == {
        "model": "a/model",
        "host": HOST,
        "state": "ERROR",
        "description": "no",
    }
    mv.remote.forget("a")
    assert list(mv.remote.jobs().job) == ["b"]


# Keys, versions, models.


def test_a_key_is_taken_from_the_environment_and_then_from_nnsight(monkeypatch: pytest.MonkeyPatch) -> None:
    assert hosts.api_key() == "" and hosts.without_key("a text") == "a text"
    monkeypatch.setattr(CONFIG.API, "APIKEY", "configured")
    assert hosts.api_key() == "configured"
    monkeypatch.setenv("NDIF_API_KEY", "environment")
    assert hosts.api_key() == "environment"
    assert hosts.without_key("an environment for configured") == "an [key] for configured"


@pytest.mark.parametrize(
    "one, other, same", [("2.13.0+cpu", "2.13.1+cu128", True), ("2.13.0", "2.14.0", False), ("?", "2.13.0", False)]
)
def test_versions_are_compared_by_two_numbers(one: str, other: str, same: bool) -> None:
    assert (hosts.minor(one) == hosts.minor(other)) == same


def test_what_is_read_of_hosted_models() -> None:
    read = mv.remote.__dict__["readable"]
    assert {read(kind, "image-text-to-text") for kind in ARCHS} == {"yes"}
    assert {read(kind, "") for kind in REFUSED} == {f"no, {reason}" for reason in REFUSED.values()}
    assert read("llava", "text-generation") == "no, it is deployed for text-generation, and not for image-text-to-text"
    assert read("gpt2", "") == "no, gpt2 is no model of pictures and words that it knows"
    assert read("", "image-text-to-text") == "not known"


def test_the_default_branch_has_one_name() -> None:
    assert jobs.same_branch(KEY.replace("null", '"main"')) == jobs.same_branch(KEY)
    assert jobs.same_branch(KEY.replace("null", '"other"')) != jobs.same_branch(KEY)


# Sentences.

GONE = "there is no job 'x' in '{folder}'; mv.remote.jobs() lists those that are known, and the environment variable "
CASES: dict[str, Callable[[], object]] = {
    "timeout=0 is no time to wait; give seconds, more than 0.": lambda: mv.remote.Server(timeout=0),
    "pause=None is no time to wait; give seconds, more than 0.": lambda: mv.remote.Server(pause=None),  # type: ignore[arg-type]
    "longest='1' is no time to wait; give seconds, more than 0.": lambda: mv.remote.Server(longest="1"),  # type: ignore[arg-type]
    "'127.0.0.1:5001' is no address of a server; give one such as 'http://127.0.0.1:5001', or True for NDIF's.": (
        lambda: mv.remote.Server("127.0.0.1:5001")
    ),
    GONE + "MECHVLM_JOBS names another folder.": lambda: mv.remote.resume("x"),
    "a script has collected job 'j-1' ({changed}); run that script again to have it anew.": (
        lambda: mv.remote.resume(job(state="COLLECTED").id)
    ),
}
FAILURES: dict[str, Callable[[], object]] = {
    "https://api.ndif.us takes jobs with an API key, and none is set; get one from https://login.ndif.us or who runs "
    "that server, and set the environment variable NDIF_API_KEY or call nnsight.login().": (
        lambda: jobs.check(hosts.Host("https://api.ndif.us"), KEY, hosts.Server())
    ),
    "http://127.0.0.1:1 does not answer ([Errno 111] Connection refused), and no job was sent; look at the address and "
    "the network.": lambda: mv.remote.status(HOST),
    "http://127.0.0.1:port does not answer (Invalid port: 'port'), and no job was sent; look at the address and the "
    "network.": lambda: mv.remote.status("http://127.0.0.1:port"),
    "http://127.0.0.1:1 refused the request (it calls its job '../x', HTTP 200); mv.remote.status() says which models "
    "it runs, and mv.remote.compare() on which versions.": (
        lambda: jobs.noted(job(), jobs.ResponseModel(id="../x", status="QUEUED"))
    ),
    "job j-1 failed on http://127.0.0.1:1 (evicted); mv.remote.status() says what it runs, and running the script "
    "again sends the job anew.": lambda: mv.remote.resume(job(state="ERROR", description="evicted.").id),
}


@pytest.fixture
def untyped() -> Iterator[None]:
    """Without the test run's type checks, so that a wrong type meets our own sentence, as it does for users."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("message", CASES, ids=[message[:50] for message in CASES])
def test_what_is_wrong_is_refused(message: str, folder: Path) -> None:
    with pytest.raises(ValueError) as caught:
        CASES[message]()
    written = ledger.read("j-1")
    assert str(caught.value) == message.replace("{folder}", str(folder)).replace(
        "{changed}", written.changed if written else ""
    )


@pytest.mark.parametrize("message", FAILURES, ids=[message[:50] for message in FAILURES])
def test_what_fails_says_what_to_do(message: str) -> None:
    with pytest.raises(mv.remote.JobError) as caught:
        FAILURES[message]()
    assert str(caught.value) == message


def test_what_a_server_sends_is_not_run_as_a_program() -> None:
    class Trap:
        def __reduce__(self) -> tuple:
            return (print, ("it ran",))

    one = job(state="COMPLETED")
    one.compress = False
    content = _saved({"found": Trap()})
    with pytest.raises(mv.remote.JobError, match="^the result of job j-1 is not plain data"):
        jobs.unpacked(one, content)


def test_a_result_that_came_broken_is_fetched_anew() -> None:
    one = job(state="COMPLETED")
    ledger.keep(one, b"half of it")
    with pytest.raises(mv.remote.JobError, match="^the result of job j-1 came broken from http://127.0.0.1:1 "):
        jobs.unpacked(one, b"half of it")
    assert ledger.kept(one) is None and ledger.open_job("f", HOST, KEY) is not None


def test_plain_data_comes_back_as_it_was() -> None:
    one = job(state="COMPLETED")
    one.compress = False
    given = {"a": [torch.ones(2), (1, 2.5, None)], "b": {"c": "d", 3: True}}
    found = jobs.unpacked(one, _saved(given))
    assert torch.equal(found["a"][0], torch.ones(2)) and found["a"][1] == (1, 2.5, None) and found["b"] == given["b"]


def _saved(values: dict) -> bytes:
    import io

    file = io.BytesIO()
    torch.save(values, file)
    return file.getvalue()
