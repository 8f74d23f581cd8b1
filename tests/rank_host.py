"""The process side of `tests/ranks.py`.

One host process imports torch and deepspeed once (seconds of work) and then forks ranks from
itself, so that a new pool, or one rebuilt after a failure, costs a fraction of a second. The host
stays single-threaded: that is what makes forking it safe.

Two kinds of sockets lead here, both made by the test process: one control socket to the host
(JSON requests, file descriptors beside them) and one data socket to every rank (pickle, between
processes that the test run itself started). Whoever loses the other end exits.
"""

import contextlib
import faulthandler
import gc
import importlib
import importlib.util
import json
import os
import pickle
import random
import select
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

MAX_MESSAGE = 64 * 1024  # a control request is a few hundred bytes
# Imported once for all ranks; the last by ZeRO when first used, two seconds a rank otherwise.
PRELOADED = ("numpy", "torch", "deepspeed", "torch._inductor.compile_fx")
ROOT = Path(__file__).resolve().parent.parent


def load_function(module_name: str, path: str, qualname: str) -> Callable[..., Any]:
    """The module-level function `qualname` of the test module or library module at `path`.

    Registered under the name it has in the test process, so that classes pickle both ways.
    """
    function: Any = _load_module(module_name, path)
    for part in qualname.split("."):
        function = getattr(function, part)
    return function


def _load_module(name: str, path: str) -> ModuleType:
    loaded = sys.modules.get(name)
    if loaded is not None and getattr(loaded, "__file__", None) == path:
        return loaded
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:  # a parent package that is only a folder of tests
        spec = None
    if spec is not None and spec.origin == path:
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"no Python module at {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _describe(error: BaseException) -> dict[str, Any]:
    """An exception as a message: its traceback as text, itself too where it pickles."""
    text = "".join(traceback.format_exception(error))
    try:
        pickled = pickle.dumps(error)
        pickle.loads(pickled)  # noqa: S301 - our own exception; some dump but do not load
    except Exception:
        pickled = None
    return {"kind": "error", "traceback": text, "error": pickled}


def _watch(fd: int, host: int) -> None:
    """End this rank when the test process or the host is gone, even inside a hung collective."""
    poll = select.poll()
    poll.register(fd, 0)  # a hang-up is always reported
    while True:
        if any(event & (select.POLLHUP | select.POLLERR) for _, event in poll.poll(5000)):
            os._exit(3)
        if os.getppid() != host:
            os._exit(3)


def _reset(environment: dict[str, str]) -> None:
    """The state every call starts from, whatever the call before it did."""
    import numpy as np
    import torch

    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    gc.collect()


def _serve(connection: Connection, environment: dict[str, str]) -> None:
    while True:
        try:
            request = pickle.loads(connection.recv_bytes())  # noqa: S301 - from the test process
        except EOFError:
            return
        os.ftruncate(1, 0)  # the log shown with a failure is this call's
        try:
            _reset(environment)
            function = load_function(request["module"], request["path"], request["qualname"])
            # Arguments may hold classes of that module, so they are unpickled after its import.
            args, kwargs = pickle.loads(request["arguments"])  # noqa: S301 - as above
            answer = {"kind": "result", "value": function(*args, **kwargs)}
            message = pickle.dumps(answer)
        except BaseException as error:  # reported to the test, which ends this process
            message = pickle.dumps(_describe(error))
        answer = args = kwargs = function = None
        connection.send_bytes(message)


def _become_rank(request: dict[str, Any], data_fd: int, log_fd: int, host: int) -> None:
    """Run in the forked child; never returns to the host's loop."""
    os.setsid()  # a group of its own: ended with its children, and no Ctrl-C from the terminal
    os.dup2(log_fd, 1)
    os.dup2(log_fd, 2)
    os.close(log_fd)
    for stream in (sys.stdout, sys.stderr):  # what a rank printed is in its log when it hangs
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ.update(request["environment"])
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)
    threading.Thread(target=_watch, args=(data_fd, host), daemon=True).start()
    connection = Connection(data_fd)
    try:
        import deepspeed

        deepspeed.init_distributed(
            dist_backend="gloo",
            auto_mpi_discovery=False,
            verbose=False,
            init_method=request["init_method"],
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
        )
    except BaseException as error:
        connection.send_bytes(pickle.dumps(_describe(error)))
        return
    connection.send_bytes(pickle.dumps({"kind": "ready"}))
    _serve(connection, dict(os.environ))


def _fork(control: socket.socket, request: dict[str, Any], fds: list[int]) -> int:
    host = os.getpid()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            control.close()
            _become_rank(request, fds[0], fds[1], host)
            code = 0
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    for fd in fds:
        os.close(fd)
    return pid


def _end(pids: list[int]) -> dict[int, int]:
    """Kill the ranks and their children; exit status by pid (negative: ended by that signal)."""
    for pid in pids:
        # Not yet waited for, so the number is still theirs. The group does not exist where the
        # kill comes before the child's setsid.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return {pid: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids}


def main(control_fd: int) -> None:
    control = socket.socket(fileno=control_fd)
    for name in PRELOADED:
        importlib.import_module(name)
    import deepspeed

    # Without this, init_distributed compiles a shared-memory operation: slow, in need of a
    # compiler, and it leaves files in /dev/shm.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # type: ignore[attr-defined]
    gc.freeze()  # what is loaded now stays shared between ranks
    if threading.active_count() != 1:
        raise RuntimeError("the host of the test ranks must be single-threaded to fork safely")
    print("threads of the host:", len(os.listdir("/proc/self/task")), flush=True)  # 1 is best
    control.send(json.dumps({"ready": True}).encode())
    alive: list[int] = []
    while True:
        message, fds, _, _ = socket.recv_fds(control, MAX_MESSAGE, 2)
        if not message:  # the test process is gone
            _end(alive)
            return
        request = json.loads(message)
        if request["op"] == "fork":
            alive.append(_fork(control, request, fds))
            reply: dict[str, Any] = {"pid": alive[-1]}
        elif request["op"] == "end":
            reply = {"status": _end(request["pids"])}
            alive = [pid for pid in alive if pid not in request["pids"]]
        else:
            raise ValueError(f"unknown request {request['op']!r}")
        control.send(json.dumps(reply).encode())


if __name__ == "__main__":
    main(int(sys.argv[1]))
