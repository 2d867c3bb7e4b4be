"""A server with SandboxFusion's call, for tests: it says what it got, as slowly as asked, and writes down who was in it when.

`python tests/toy_fusion.py LOG NAME` prints its address. Programs: "print(6*7)", "wait SECONDS" and "hang".
"""
from __future__ import annotations

import json
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        what, _, about = asked["code"].partition(" ")
        self.note("begin", asked["code"])
        time.sleep(1000 if what == "hang" else float(about) if what == "wait" else 0)
        self.note("end", asked["code"])
        stdout = "42\n" if what == "print(6*7)" else f"{asked['stdin']}\n"
        data = json.dumps({"status": "Success", "message": "", "compile_result": None, "run_result": {
            "status": "Finished", "return_code": 0, "stdout": stdout, "stderr": ""}}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def note(self, what, code):
        with open(sys.argv[1], "a") as log:
            log.write(f"{what} {sys.argv[2]} {code}\n")

    def log_message(self, *_):
        pass


if __name__ == "__main__":
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.request_queue_size = 100
        print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
        server.serve_forever()
