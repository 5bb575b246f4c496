"""Where the tests' models lie: in the CPU's memory, or on devices of another of ggml's backends.

`scripts/test --backend NAME` sets LAPROX_TEST_BACKEND; all layers are then on its devices, or LAPROX_TEST_GPU_LAYERS of them.
For `rpc` the devices are two servers on this machine, of each process its own, since a server serves one client at a time.
"""

from __future__ import annotations

import ctypes as c
import os
import socket
import subprocess
import sys
import threading
import time

if "LLAMA_CPP_LIB_PATH" not in os.environ:
    import laprox  # noqa: F401  points llama_cpp at our libraries

import llama_cpp.llama_cpp as L

BACKEND = os.environ.get("LAPROX_TEST_BACKEND", "cpu")
GPU_LAYERS = int(os.environ.get("LAPROX_TEST_GPU_LAYERS", 0 if BACKEND == "cpu" else 99))

# Matrix units of GPUs round what they multiply to 10 or 11 bits, and llama.cpp attends to F32 caches on devices in F16.
ROUNDS = BACKEND != "cpu"
TOLERANCE = 5e-2 if ROUNDS else 1e-3  # of logits
AGAIN = TOLERANCE if ROUNDS else 1e-4  # of the same tokens on the same entries, whose rows may lie in another order

_servers: list[Server] = []


def _function(name: str, restype, *argtypes):
    found = getattr(L._lib, name)
    found.restype, found.argtypes = restype, argtypes
    return found


def serve(endpoint: str) -> None:
    """Lend this process's CPU to whoever connects."""
    devices = (c.c_void_p * 1)(_function("ggml_backend_dev_by_name", c.c_void_p, c.c_char_p)(b"CPU"))
    L.llama_log_set(L.llama_log_callback(0), None)  # llama_cpp keeps errors to itself, and a server has nowhere else to say them
    start = _function("ggml_backend_rpc_start_server", None, c.c_char_p, c.c_char_p, c.c_size_t, c.c_size_t, c.c_void_p)
    start(endpoint.encode(), None, 1, 1, devices)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    """A process that serves this machine's CPU; stopped at the end of the program."""

    def __init__(self):
        port = _free_port()
        self.endpoint = f"127.0.0.1:{port}"
        # Its input is a pipe whose other end only we have: it ends with us, however we end.
        self.process = subprocess.Popen([sys.executable, __file__, self.endpoint], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        for _ in range(300):
            assert self.process.poll() is None, "the RPC server ended at once"
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", port)) == 0:
                    return
            time.sleep(0.1)
        raise TimeoutError("the RPC server answers no connection")


def connect(endpoint: str) -> None:
    """Make a server's devices known to llama.cpp, which puts layers on all devices that it knows."""
    registry = _function("ggml_backend_rpc_add_server", c.c_void_p, c.c_char_p)(endpoint.encode())
    _function("ggml_backend_register", None, c.c_void_p)(registry)


def prepare() -> None:
    """Before the first model is loaded."""
    if BACKEND == "rpc":
        _servers.extend([Server(), Server()])
        for server in _servers:
            connect(server.endpoint)


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    serve(sys.argv[1])
