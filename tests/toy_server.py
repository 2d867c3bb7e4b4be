"""An HTTP server of this machine that gives the answers that a test wrote."""
from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer


def end(processes: list[subprocess.Popen]) -> None:
    """Kill servers that a test started, also those that it stopped."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait()


class Scripted:
    """A server that gives one (status, body) after the other, the last one for ever, and keeps what it was asked."""

    def __init__(self, *answers):
        self.answers, self.asked, self.headers = list(answers), [], []
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                owner.headers.append(self.headers)
                owner.asked.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
                status, body = owner.answers.pop(0) if len(owner.answers) > 1 else owner.answers[0]
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.http = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()
