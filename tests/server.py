"""laprox-server in a process of its own, and the requests that tests send it. Standard library only."""

from __future__ import annotations

import http.client
import json
import os
import random
import socket
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import laprox

PROGRAM = Path(laprox.__file__).parent / "bin" / ("llama-server.exe" if os.name == "nt" else "llama-server")


class Refused(Exception):
    """The server didn't start; the text is its log."""


class Reply:
    def __init__(self, status: int, body: str):
        self.status = status
        self.text = body
        try:
            self.json = json.loads(body)
        except ValueError:
            self.json = None

    def __getitem__(self, key):
        assert self.status == 200, self.text
        return self.json[key]

    @property
    def error(self) -> dict:
        """Of a reply in llama-server's error shape."""
        assert self.status != 200, self.text
        assert set(self.json["error"]) >= {"code", "message", "type"} and self.json["error"]["code"] == self.status
        return self.json["error"]


class Server:
    """with Server(model, "--kv-budget", "10%") as server: ... One thread, greedy sampling and one slot, unless asked otherwise."""

    def __init__(self, model, *options, env=None, log=None, program=PROGRAM):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.log_path = Path(log) if log else Path(tempfile.gettempdir(), f"laprox-server-{os.getpid()}-{self.port}.log")
        command = [program, "-m", model, "--port", self.port, "--temp", "0", "-t", "1", "--no-warmup", *options]
        if "-np" not in options:
            command += ["-np", "1"]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("LLAMA_ARG_")}
        self._log = open(self.log_path, "w")
        self.process = subprocess.Popen(
            [str(part) for part in command], stdout=self._log, stderr=subprocess.STDOUT, env={**environment, **(env or {})}
        )
        self._wait()

    def _wait(self):
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                log = self.log
                self.stop()
                raise Refused(log)
            try:
                if self.get("/health").status == 200:
                    return
            except OSError:
                pass
            time.sleep(0.02)
        self.stop()
        raise TimeoutError(self.log)

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def stop(self):
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(timeout=30)
        self._log.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()
        self.log_path.unlink(missing_ok=True)

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    # --- requests ---------------------------------------------------------------------------------------------------

    def connect(self, timeout=120):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def request(self, method, path, body=None, raw=None) -> Reply:
        connection = self.connect()
        data = raw if raw is not None else None if body is None else json.dumps(body)
        connection.request(method, path, data, {"Content-Type": "application/json"} if data is not None else {})
        response = connection.getresponse()
        reply = Reply(response.status, response.read().decode())
        connection.close()
        return reply

    def get(self, path) -> Reply:
        return self.request("GET", path)

    def post(self, path, **body) -> Reply:
        return self.request("POST", path, body)

    def complete(self, prompt, n=8, **more) -> Reply:
        return self.post("/completion", prompt=prompt, n_predict=n, **more)

    def events(self, path, **body) -> list[dict]:
        """The data of all server-sent events of a streaming request."""
        reply = self.request("POST", path, {**body, "stream": True})
        assert reply.status == 200, reply.text
        lines = [line[6:] for line in reply.text.splitlines() if line.startswith("data: ")]
        return [json.loads(line) for line in lines if line != "[DONE]"]

    def abandon(self, path, after=0.2, **body):
        """Send a request and hang up."""
        connection = self.connect()
        connection.request("POST", path, json.dumps({**body, "stream": True}), {"Content-Type": "application/json"})
        time.sleep(after)
        connection.sock.shutdown(socket.SHUT_RDWR)
        connection.close()

    def slot(self, i=0) -> dict:
        reply = self.get("/slots")
        assert reply.status == 200, reply.text
        return reply.json[i]

    def idle(self, timeout=30):
        """Wait until no slot works."""
        deadline = time.monotonic() + timeout
        while any(slot["is_processing"] for slot in self.get("/slots").json):
            assert time.monotonic() < deadline, "a slot is stuck"
            time.sleep(0.02)

    def metrics(self) -> dict[str, float]:
        lines = [line.rsplit(" ", 1) for line in self.get("/metrics").text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in lines}


# --- replies that don't depend on what else is in a batch -------------------------------------------------------------

WITH_RIVALS = {"logprobs": True, "top_logprobs": 2}  # for a request whose reply goes to sure() or chosen()


def chosen(reply) -> list[int]:
    """The tokens of a chat's reply."""
    return [place["id"] for place in reply["choices"][0]["logprobs"]["content"]]


def sure(reply, by=0.1) -> list[int]:
    """The tokens before the first place where the likeliest one leads by less than `by` nats.

    Such a place is decided by roundings, which depend on what else is evaluated in the same batch.
    """
    for i, place in enumerate(reply["choices"][0]["logprobs"]["content"]):
        first, second = (token["logprob"] for token in place["top_logprobs"])
        if first - second < by:
            return chosen(reply)[:i]
    return chosen(reply)


def tokens(n: int, seed: int = 0) -> list[int]:
    """A prompt of n tokens of the toy."""
    rng = random.Random(seed)
    return [1, *(rng.randrange(262, 512) for _ in range(n - 1))]


def together(*calls):
    """What calls return that are made at the same time."""
    results = [None] * len(calls)

    def work(i):
        results[i] = calls[i]()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    return results
