# SPDX-License-Identifier: Apache-2.0
"""Time per part of a served request, measured inside the engine in a separate process, for `benchmarks.serving`.

vLLM times the preparation and encoding of images (`enable_mm_processor_stats`); a `Clock` that vLLM adds to its worker
(`worker_extension_cls`) times the model's parts, for which the model runs eagerly.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any


class Clock:
    """Worker methods that time the model, called by `collective_rpc`."""

    def clock_start(self: Any) -> None:
        """Starts the measurement."""
        model = self.get_model()
        self.clock_sums = {"encoder": 0.0, "embed": 0.0, "decoder": 0.0}
        if getattr(self, "clock_ticks", False):
            return
        self.clock_ticks = True
        pruner = getattr(model, "vtprune", None)
        if pruner is not None:
            pruner.embed = self._clock(pruner.embed, "encoder")
        object.__setattr__(model, "embed_multimodal", self._clock(model.embed_multimodal, "embed"))
        object.__setattr__(model, "forward", self._clock(model.forward, "decoder"))

    def clock_read(self: Any) -> dict[str, float]:
        """Seconds so far: vision tower and projector, selection, decoder."""
        sums = self.clock_sums
        encoder = sums["encoder"] or sums["embed"]  # an unpruned model has no pruner
        return {"encoder": encoder, "selection": sums["embed"] - encoder, "decoder": sums["decoder"]}

    def _clock(self: Any, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        import torch

        wait = torch.accelerator.synchronize if torch.accelerator.is_available() else lambda: None

        def timed(*args: Any, **kwargs: Any) -> Any:
            wait()
            start = time.perf_counter()
            result = function(*args, **kwargs)
            wait()
            self.clock_sums[name] += time.perf_counter() - start
            return result

        return timed


def measure(model: str, config: Any, urls: list[str], options: dict[str, Any]) -> dict[str, Any]:
    """Answers every picture with one token, one by one and then concurrently; returns seconds per part and request.

    Args:
        model: A folder, or a name on the hub.
        config: The `"vtprune"` settings, or None.
        urls: Pictures; the second half is requested concurrently.
        options: Further arguments of `LLM`.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # keeps the progress bar readable
    from vllm import LLM, SamplingParams
    from vllm.benchmarks.mm_processor import collect_mm_processor_stats

    if config is not None:
        options = {**options, "additional_config": {"vtprune": config}}
    llm = LLM(
        model,
        enforce_eager=True,
        enable_mm_processor_stats=True,
        worker_extension_cls="benchmarks.serving_parts.Clock",
        limit_mm_per_prompt={"image": 1},
        **options,
    )
    sampling = SamplingParams(temperature=0, max_tokens=1)

    def ask(lot: list[str]) -> None:
        chats = [[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": u}}]}] for u in lot]
        llm.chat(chats, sampling, use_tqdm=False)  # type: ignore[arg-type]

    def timed(lots: list[list[str]]) -> dict[str, float]:
        collect_mm_processor_stats(llm.llm_engine)
        llm.collective_rpc("clock_start")
        start = time.perf_counter()
        for lot in lots:
            ask(lot)
        wall, number = time.perf_counter() - start, sum(map(len, lots))
        inside = llm.collective_rpc("clock_read")[0]
        own = collect_mm_processor_stats(llm.llm_engine)
        parts = {"all": wall, "preparing": sum(own["preprocessor_total_secs"]), **inside}
        return {name: seconds / number for name, seconds in parts.items()}

    half = (len(urls) + 1) // 2
    try:
        ask(urls[:1])  # warms up
        return {"alone": timed([[url] for url in urls[1:half]]), "together": timed([urls[half:]])}
    finally:
        llm.llm_engine.engine_core.shutdown()  # otherwise its process keeps this one alive
