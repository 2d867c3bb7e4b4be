"""NeMo-Gym's workplace as its wheel has it, untouched, and an HTTP server of this machine with its three calls."""
from __future__ import annotations

import functools
import importlib
import json
import threading
from http.cookies import SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path

from m2rl_core.domains import Row, workbench_wheel
from m2rl_core.real import rl_rows

LABEL = "nano_v3_sft_profiled_workbench"
RESPONSE = {"id", "object", "created_at", "model", "output", "parallel_tool_calls", "tool_choice", "tools"}  # OpenAI's form


def folder() -> Path:
    return Path(metadata.distribution(workbench_wheel.PACKAGE).locate_file(workbench_wheel.FOLDER))


@functools.cache
def plain():
    """The wheel's module as it is published: it reads its tables anew each time, and keeps nothing."""
    with workbench_wheel._bare(str(folder())):
        return importlib.import_module(f"{workbench_wheel.FOLDER}.workplace_assistant.utils")


def lines(name: str) -> list[dict]:
    """The wheel's own example rows."""
    text = (folder() / "workplace_assistant" / "data" / name).read_text()
    return [json.loads(line) for line in text.splitlines()]


def rows() -> list[Row]:
    """The five example rows, as the loader of the blend makes them."""
    return [rl_rows.to_row(row | {"dataset": LABEL}, "example.jsonl", i, {}) for i, row in enumerate(lines("example.jsonl"))]


class Server(ThreadingHTTPServer):
    """POST /seed_session, /{tool} and /verify; `faults` maps a path to what goes wrong there: a status, or a reply."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.sessions, self.asked, self.faults = {}, [], {}

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = self.path[1:]
        self.server.asked.append((name, body))
        cookie = SimpleCookie(self.headers.get("Cookie", "")).get("workplace")
        session = cookie.value if cookie else str(len(self.server.asked))
        fault = self.server.faults.get(name)
        if isinstance(fault, int):
            return self.answer(fault, {"detail": "broken"}, session)
        if fault is not None:
            return self.answer(200, fault, session)
        return self.answer(*self.reply(name, body, session), session)

    def reply(self, name, body, session):
        if name == "seed_session":
            self.server.sessions[session] = plain().get_tools(workbench_wheel.TOOLKITS)["functions"]
            return 200, {}
        if name == "verify":
            if not body["response"].keys() >= RESPONSE or not isinstance(body["id"], int):
                return 422, {"detail": "a field is missing"}
            calls = [item for item in body["response"]["output"] if item["type"] == "function_call" and item["call_id"]]
            return 200, {**body, "reward": float(plain().is_correct(calls, body["ground_truth"], None))}
        if session not in self.server.sessions:
            return 400, {"detail": "Session not initialized. Please call seed_session first."}
        try:
            output = self.server.sessions[session][name](**{k: v for k, v in body.items() if v is not None})
        except Exception as error:
            output = f"Error executing tool '{name}': {error}"
        return 200, {"output": output}

    def answer(self, status, reply, session):
        data = json.dumps(reply).replace("NaN", "null").encode()
        self.send_response(status)
        self.send_header("Set-Cookie", f"workplace={session}; path=/; httponly")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass
