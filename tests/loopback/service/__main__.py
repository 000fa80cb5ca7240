"""The command line: `python -I -S -c ... --results=FOLDER --settled=FILE [--port=N]`."""

import argparse
import os
import threading
import time
from pathlib import Path

import torch

try:
    import torchvision  # noqa: F401
except ImportError:
    pass
except RuntimeError:
    SHIM = torch.library.Library("torchvision", "DEF")  # as in tests/conftest.py, and for the same reason
    for operator in ("nms", "qnms"):
        SHIM.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from .faults import Faults
from .runner import stand_apart
from .runs import Runs
from .wire import Wire

parser = argparse.ArgumentParser()
parser.add_argument("--results", type=Path, required=True)
parser.add_argument("--settled", type=Path, required=True)
parser.add_argument("--port", type=int, default=0)
parser.add_argument("--default-dtype", default="float32")
parser.add_argument("--weightless", action="store_true")
given = parser.parse_args()


def end_with(parent: int) -> None:
    """End when the process that started this one has ended, however it did."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(0)


torch.set_num_threads(1)
threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
if given.weightless:
    stand_apart()
wire = Wire(given.port, Runs(given.results, Faults(), vars(torch)[given.default_dtype]))
half = given.settled.with_suffix(".half")
half.write_text(str(wire.server_address[1]))
half.rename(given.settled)
wire.serve_forever()
