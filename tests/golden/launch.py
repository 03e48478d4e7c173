"""Command lines, each in a process of its own that is forked once the slow imports are done.

`python -P launch.py` reads one command a line as JSON, {"words", "folder", "log", "seconds"}: the words after
`python -m`, where it runs, where its output goes, how long it may take. It answers each with a line: the exit code (-1:
out of time) and the processor.
"""

from __future__ import annotations

import gc
import json
import os
import pathlib
import platform
import re
import runpy
import signal
import sys
import time
import traceback
from typing import Any

IMPORTS = (
    "diffusers",
    "peft",
    "scipy.stats",
    "torch._dynamo",
    "transformers",
    "diffusers.pipelines.flux.pipeline_flux",
    "matplotlib.figure",
    "openai",
    "sklearn.metrics",
    "tyro",
)


def processor() -> str:
    """What the last bits of a training depend on: where it is the same, weights are too."""
    import torch

    info = pathlib.Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    names = ("model name", "cpu family", "model")
    model = [m[1].strip() for name in names if (m := re.search(rf"^{name}\s*:(.*)$", text, re.M))]
    kind = [platform.system(), platform.machine(), " ".join(platform.libc_ver()), *(model or [platform.processor()])]
    return ", ".join([*kind, torch.backends.cpu.get_cpu_capability(), f"torch {torch.__version__}"])


def child(command: dict[str, Any]) -> int:
    """Be that command; its exit code."""
    log = os.open(command["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # commands come that way
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(command["folder"])
    sys.argv = list(command["words"])
    try:
        runpy.run_module(command["words"][0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def run(command: dict[str, Any]) -> int:
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            code = child(command)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)
    end = time.monotonic() + command["seconds"]
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return -1


if __name__ == "__main__":
    gc.disable()  # nothing of what is imported is garbage, then or in what is forked
    for name in IMPORTS:
        __import__(name)
    gc.freeze()
    gc.enable()
    for line in sys.stdin:
        print(json.dumps({"code": run(json.loads(line)), "processor": processor()}), flush=True)
