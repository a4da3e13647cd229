"""A small server that misbehaves on request, for faults that the real one cannot be made to show.

    python scripted_server.py BEHAVIOUR PORT

healthy: answers /health. silent: never answers. dies: exits with code 3 while booting. floods: prints 50 MB, then is
healthy. stubborn: healthy, ignores SIGTERM, and so does its child. orphans: healthy, and leaves a child of a child
in a session of its own. late: healthy after two seconds. errors: healthy, answers /generate with 500. speculates:
healthy, answers /generate as DFLASH does. mute: healthy, answers /generate as SGLang does and writes nothing.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

SLEEP = "import time; time.sleep(600)"
STUBBORN_SLEEP = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEP}"
ORPHAN = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {SLEEP!r}], start_new_session=True)"


class Handler(BaseHTTPRequestHandler):
    behaviour = "healthy"

    def do_GET(self) -> None:
        self.answer(200, {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.behaviour == "errors":
            self.answer(500, {"error": "the kernel is not implemented"})
            return
        if self.behaviour == "speculates":
            self.answer(400, {"error": "DFLASH speculative decoding does not support return_logprob yet."})
            return
        logprobs = [[None, body["input_ids"][0]], *([-1.0, token] for token in body["input_ids"][1:])]
        meta = {"id": body["rid"], "prompt_tokens": len(body["input_ids"]), "input_token_logprobs": logprobs}
        self.answer(200, {"text": "", "meta_info": meta})

    def answer(self, status: int, value: object) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


def main() -> None:
    behaviour, port = sys.argv[1], int(sys.argv[2])
    pids = Path(os.environ["PIDS"]) if "PIDS" in os.environ else None
    children = []
    print(f"booting, {behaviour}", flush=True)
    if behaviour == "dies":
        print("CUDA out of memory", flush=True)
        sys.exit(3)
    if behaviour == "floods":
        for _ in range(50):
            print("x" * 1_000_000, flush=True)
    if behaviour == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        children.append(subprocess.Popen([sys.executable, "-c", STUBBORN_SLEEP]).pid)
    if behaviour == "orphans":
        subprocess.run([sys.executable, "-c", ORPHAN], check=True)
    if behaviour == "late":
        time.sleep(2)
    if pids is not None:
        pids.write_text(" ".join(map(str, [os.getpid(), *children])))
    if behaviour == "silent":
        time.sleep(600)
    Handler.behaviour = behaviour
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    main()
