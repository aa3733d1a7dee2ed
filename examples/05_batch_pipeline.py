# SPDX-License-Identifier: Apache-2.0
"""A batch server of a pruned model: the pipeline of transformers, a queue, and the standard library's HTTP server.

    python examples/05_batch_pipeline.py                      # starts, asks itself 12 questions at once, and stops
    python examples/05_batch_pipeline.py --port 8000 --serve  # serves until interrupted

    curl -s localhost:8000 -d '{"question": "what digit is on the sign?", "image": "'$(base64 -w0 photo.png)'"}'

Requests that arrive close together are answered by one call of the pipeline. Pruning takes one line.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import queue
import threading
import urllib.request
from concurrent.futures import Future, ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image
from transformers import pipeline

import vtprune
from vtprune import refvlm

LARGEST = 10_000_000  # bytes of a request


class Batcher:
    """Collects requests, and answers those that came together in one call; one thread runs the model."""

    def __init__(self, pipe, size: int = 8, wait: float = 0.02) -> None:
        self.pipe, self.size, self.wait = pipe, size, wait
        self.calls: list[int] = []  # requests of each call
        self.waiting: queue.Queue = queue.Queue()
        threading.Thread(target=self._work, daemon=True).start()

    def ask(self, image: Image.Image, question: str) -> str:
        """Returns the answer; blocks until it is available."""
        content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
        future: Future = Future()
        self.waiting.put(([{"role": "user", "content": content}], future))
        return future.result()

    def _work(self) -> None:
        while True:
            batch = [self.waiting.get()]
            try:
                while len(batch) < self.size:
                    batch.append(self.waiting.get(timeout=self.wait))
            except queue.Empty:
                pass
            chats, futures = zip(*batch, strict=True)
            try:
                answers = self.pipe(list(chats), batch_size=len(chats), return_full_text=False, max_new_tokens=8)
                for future, answer in zip(futures, answers, strict=True):
                    future.set_result(answer[0]["generated_text"].strip())
            except Exception as error:  # waiting clients get the error, and the server keeps running
                for future in futures:
                    if not future.done():
                        future.set_exception(error)
            self.calls.append(len(batch))


def serve(batcher: Batcher, port: int) -> ThreadingHTTPServer:
    """A server that takes `{"question": ..., "image": base64}` by POST and gives `{"answer": ...}`."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            try:
                length = int(self.headers["Content-Length"])
                if length > LARGEST:
                    raise ValueError(f"the request is too large; expected at most {LARGEST} bytes")
                request = json.loads(self.rfile.read(length))
                image = Image.open(io.BytesIO(base64.b64decode(request["image"]))).convert("RGB")
                code, reply = 200, {"answer": batcher.ask(image, request["question"])}
            except (ValueError, KeyError, TypeError, OSError, Image.DecompressionBombError) as error:
                code, reply = 400, {"error": f"{type(error).__name__}: {error}"}
            body = json.dumps(reply).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


def post(url: str, image: Image.Image, question: str) -> str:
    """Sends a request as a client."""
    picture = io.BytesIO()
    image.save(picture, "PNG")
    body = json.dumps({"question": question, "image": base64.b64encode(picture.getvalue()).decode()})
    with urllib.request.urlopen(urllib.request.Request(url, body.encode())) as reply:
        return json.load(reply)["answer"]


def main() -> None:
    parser = argparse.ArgumentParser(description="A batch server of a pruned model.")
    parser.add_argument("--port", type=int, default=0, help="0: a free one")
    parser.add_argument("--serve", action="store_true", help="serve until interrupted")
    args = parser.parse_args()

    model, processor = refvlm.load()
    patch = vtprune.patch(model, ratio=0.1)  # the one line
    batcher = Batcher(pipeline("image-text-to-text", model=model, processor=processor))
    server = serve(batcher, args.port)
    url = f"http://127.0.0.1:{server.server_port}"
    if args.serve:
        print(f"serving at {url}", flush=True)
        server.serve_forever()
    threading.Thread(target=server.serve_forever, daemon=True).start()

    scenes = [refvlm.scenes.scene(seed) for seed in range(12)]
    with ThreadPoolExecutor(len(scenes)) as clients:
        answers = list(clients.map(lambda scene: post(url, scene.image, scene.questions[0].text), scenes))
    right = sum(answer == scene.questions[0].answer for answer, scene in zip(answers, scenes, strict=True))
    server.shutdown()
    before, after = patch.last.tokens
    print(f"{len(answers)} requests in {len(batcher.calls)} calls of the pipeline, {right} answered right")
    print(f"visual tokens of the last call: {before} -> {after}")


if __name__ == "__main__":
    main()
