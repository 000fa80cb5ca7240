"""What all commands have in common: one sentence for what is wrong, the model, and the folder to write into.

Rule this module guards: what the package refuses is one sentence on standard error and exit code 2, no traceback.
The sentences are the package's own; nothing else is caught.

>>> check_device("cpu", 0)
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

DTYPES = ("auto", "float32", "bfloat16", "float16")
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1. [default: cuda where there is one]")]
Dtype = Annotated[str | None, typer.Option(help=f"One of {', '.join(DTYPES)}.")]


@contextmanager
def one_sentence() -> Iterator[None]:
    """Turn the errors that a user's words can cause into their sentence, and exit code 2."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        refuse(" ".join(str(error).split()))


def refuse(sentence: str) -> NoReturn:
    """Say what is wrong on standard error, and leave."""
    typer.echo(f"mechvlm: {sentence}", err=True)
    raise typer.Exit(2)


def loaded(model: str, device: str | None, dtype: str | None) -> Any:
    """The model, loaded without transformers' own remarks.

    Raises:
        ValueError: for a model, device or type that is not there.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"no dtype is called {dtype!r}; choose from {', '.join(DTYPES)}.")
    import torch  # seconds to import, as the rest

    check_device(device, torch.cuda.device_count(), torch.backends.mps.is_available())
    from huggingface_hub import logging as hub_logging
    from transformers import logging

    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    if model == "demo" or Path(model).is_dir():
        logging.disable_progress_bar()
    from mechvlm.load import load

    return load(model, device=device, dtype=dtype)


def check_device(device: str | None, count: int, mps: bool = False) -> None:
    """Refuse a device that is not there.

    Args:
        count: how many CUDA devices there are.
        mps: whether there is Apple's.
    """
    if device == "mps" and not mps:
        raise ValueError("device 'mps' was asked for, and this machine has no MPS; write --device cpu.")
    if device is None or device in ("cpu", "mps"):
        return
    named = re.fullmatch(r"cuda(?::(\d+))?", device)
    if not named:
        raise ValueError(f"no device is called {device!r}; write cpu, cuda or cuda:1.")
    if not count:
        raise ValueError(f"device {device!r} was asked for, and this machine has no CUDA; write --device cpu.")
    if int(named[1] or 0) >= count:
        raise ValueError(f"device {device!r} was asked for, and this machine has {count} CUDA devices, counted from 0.")


def writable(out: Path) -> Path:
    """The folder to write into, made where there is none.

    Raises:
        ValueError: where it cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        trial = out / ".mechvlm"
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise ValueError(
            f"the folder '{out}' cannot be written ({error.strerror}); choose another with --out."
        ) from None
    return out
