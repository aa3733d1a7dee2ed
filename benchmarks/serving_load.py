# SPDX-License-Identifier: Apache-2.0
"""Requests for `benchmarks.serving`: uncached pictures, concurrent clients, and their measurements."""

from __future__ import annotations

import asyncio
import base64
import io
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.vllm_server import Server

QUESTION = " ".join(f"word{number}" for number in range(32))


@dataclass(frozen=True)
class Seen:
    """Times of one answer at the client, in seconds since its request."""

    first: float
    last: float
    tokens: int
    prompt_tokens: int


def picture(seed: int, size: tuple[int, int]) -> str:
    """A photograph-like picture of `size` (width, height) as the `data:` URL of a JPEG."""
    rough = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(rough).resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def run(server: Server, urls: Sequence[str], concurrency: int, tokens: int) -> dict[str, Any]:
    """Sends a request for every picture, `concurrency` at a time.

    Args:
        server: A running server.
        urls: One picture per request.
        concurrency: Number of clients; each sends its next request after the answer.
        tokens: Length of the answers.

    Returns:
        dict: `requests`, total `seconds`, `requests_per_second`, `first` and `token` (median and 95th percentile of the
        seconds to the first token and per further token), mean `prompt_tokens`, `peak_kv_tokens`.
    """
    seen, peak, wall = asyncio.run(_run(server, urls, concurrency, tokens))
    return {
        "requests": len(seen),
        "seconds": wall,
        "requests_per_second": len(seen) / wall,
        "first": _spread([one.first for one in seen]),
        "token": _spread([(one.last - one.first) / max(one.tokens - 1, 1) for one in seen]),
        "prompt_tokens": statistics.mean(one.prompt_tokens for one in seen),
        "peak_kv_tokens": peak,
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "p95": float(np.percentile(values, 95))}


async def _run(server: Server, urls: Sequence[str], concurrency: int, tokens: int) -> tuple[list[Seen], float, float]:
    from openai import AsyncOpenAI, DefaultAsyncHttpxClient

    left, seen, peaks = list(urls), [], [0.0]
    done = asyncio.Event()

    async def client(asking: AsyncOpenAI) -> None:
        while left:
            seen.append(await _ask(asking, server.model, left.pop(), tokens))

    async def watch() -> None:
        while not done.is_set():
            peaks.append(await asyncio.to_thread(_kv_tokens, server))
            await asyncio.sleep(0.25)

    http = DefaultAsyncHttpxClient(trust_env=False)
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, http_client=http) as asking:
        watching = asyncio.ensure_future(watch())
        start = time.perf_counter()
        await asyncio.gather(*(client(asking) for _ in range(concurrency)))
        wall = time.perf_counter() - start
        done.set()
        await watching
    return seen, max(peaks), wall


def _kv_tokens(server: Server) -> float:
    """Capacity of the KV blocks in use, in tokens."""
    found = server.metrics()
    return round(found["vllm:kv_cache_usage_perc"] * found["num_gpu_blocks"]) * found["block_size"]


async def _ask(asking: Any, model: str, url: str, tokens: int) -> Seen:
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    start = time.perf_counter()
    stream = await asking.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": parts}],
        max_tokens=tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    times: list[float] = []
    async for part in stream:
        if part.choices and part.choices[0].delta.content:
            times.append(time.perf_counter() - start)
        if part.usage:
            usage = part.usage
    return Seen(times[0], times[-1], usage.completion_tokens, usage.prompt_tokens)
