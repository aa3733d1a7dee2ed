# SPDX-License-Identifier: Apache-2.0
"""Time and memory of one `generate` call, by part: vision tower, prefill, each further token, cache.

Timestamps are taken before and after the image encoder and the model's forward calls. On a CUDA device a timestamp is
an event in the current stream, which does not synchronize; elsewhere it is read from the clock after synchronizing.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..models import attention_probe
from ..models.anatomy import Anatomy
from ..models.transformers_names import cache_of, encoder_method


@dataclass
class Run:
    """Time and memory of one generation.

    Attributes:
        vision: Seconds in the image encoder and projector; 0 if they did not run.
        prefill: Seconds of the first forward call, without vision but with selection.
        decision: Selection time in seconds: reading the method's inputs, selecting tokens, gathering them.
        token: Seconds of a further forward call (median); None if there was none.
        total: Seconds of the whole call of `generate`.
        kv_bytes: Keys and values of all layers after the prefill.
        peak_bytes: Peak memory: allocated on an accelerator, else resident in the process, weights included; None
            where the system does not report it.
        cpu: The same times in CPU seconds of all threads of the process, which other programs do not affect; None on
            accelerators.
    """

    vision: float
    prefill: float
    decision: float
    token: float | None
    total: float
    kv_bytes: int
    peak_bytes: int | None
    cpu: dict[str, float | None] | None = None


class Stopwatch:
    """Takes timestamps on a device.

    Args:
        device: Device of the measured work.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> Any:
        """Returns a timestamp for `seconds`."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            return event
        synchronize(self.device)
        return time.perf_counter(), time.process_time()

    def seconds(self, start: Any, end: Any, cpu: bool = False) -> float:
        """Seconds between two timestamps, after waiting for the device; with `cpu`, CPU seconds (not on CUDA)."""
        if self.device.type == "cuda":
            end.synchronize()
            return start.elapsed_time(end) / 1000
        return end[cpu] - start[cpu]


@dataclass
class _Marks:
    vision: list[tuple[Any, Any]] = field(default_factory=list)
    forward: list[tuple[Any, Any]] = field(default_factory=list)
    decision: list[tuple[Any, Any]] = field(default_factory=list)
    whole: tuple[Any, Any] = (None, None)
    vision_of_prefill: int = 0  # encodings that ran inside the first forward call
    kv_bytes: int = 0


@contextmanager
def _watched(parts: Anatomy, watch: Stopwatch, cuts: Sequence[int]) -> Iterator[_Marks]:
    """Takes timestamps around the encoders, the forward calls and the cuts of a model."""
    marks = _Marks()
    running: list[Any] = []
    undo: list[Callable[[], None]] = []

    def around(encode: Callable) -> Callable:
        @functools.wraps(encode)  # `generate` reads its signature
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = watch.mark()
            output = encode(*args, **kwargs)
            marks.vision.append((start, watch.mark()))
            marks.vision_of_prefill += bool(running) and not marks.forward
            return output

        return timed

    for kind in parts.placeholders:
        name = encoder_method(kind)
        if hasattr(parts.composite, name):
            undo.append(_replace(parts.composite, name, around(getattr(parts.composite, name))))

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        running.append(watch.mark())

    def after(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        marks.forward.append((running.pop(), watch.mark()))
        if len(marks.forward) == 1 and cache_of(output) is not None:
            marks.kv_bytes = cache_bytes(cache_of(output))

    # The patch cuts in a pre-hook of a layer; these two hooks run before and after it. While a method reads queries and
    # keys, the layer is called a second time, which is not counted.
    cutting: list[Any] = []

    def cut_begins(module: nn.Module, args: tuple, kwargs: dict) -> None:
        if not marks.forward and not attention_probe.is_probing():
            cutting.append(watch.mark())

    def cut_ends(module: nn.Module, args: tuple, kwargs: dict) -> None:
        if not marks.forward and not attention_probe.is_probing():
            marks.decision.append((cutting.pop(), watch.mark()))

    for number in cuts:
        layer = parts.layers[number]
        undo.append(layer.register_forward_pre_hook(cut_begins, with_kwargs=True, prepend=True).remove)
        undo.append(layer.register_forward_pre_hook(cut_ends, with_kwargs=True).remove)
    undo.append(parts.model.register_forward_pre_hook(before, with_kwargs=True).remove)
    undo.append(parts.model.register_forward_hook(after, with_kwargs=True).remove)
    try:
        yield marks
    finally:
        for step in reversed(undo):
            step()


def _replace(module: nn.Module, name: str, function: Callable) -> Callable[[], None]:
    """Replaces a method of an instance; the function returned restores it."""
    before = vars(module).get(name)
    setattr(module, name, function)

    def undo() -> None:
        delattr(module, name)
        if before is not None:
            setattr(module, name, before)

    return undo


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values of all layers of a transformers cache; layers without any count as 0."""
    cache = getattr(cache, "self_attention_cache", cache)
    parts = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    return sum(part.nbytes for part in parts if part is not None)


def synchronize(device: torch.device) -> None:
    """Waits until an accelerator has finished its queued work; does nothing on the CPU."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@torch.no_grad()
def generate(parts: Anatomy, inputs: Mapping[str, Any], new_tokens: int, cuts: Sequence[int] = ()) -> Run:
    """Generates exactly `new_tokens` tokens greedily and measures it.

    Args:
        parts: Anatomy of the model.
        inputs: Arguments of `generate`.
        new_tokens: Number of tokens, 1 or more.
        cuts: Decoder layers before which the model's patch cuts.
    """
    device = next(parts.decoder.parameters()).device
    watch = Stopwatch(device)
    model: Any = parts.model
    gc.collect()
    synchronize(device)
    _reset_peak(device)
    with _watched(parts, watch, cuts) as marks:
        start = watch.mark()
        model.generate(**inputs, min_new_tokens=new_tokens, max_new_tokens=new_tokens, do_sample=False)
        end = watch.mark()
        synchronize(device)
    marks.whole = (start, end)
    times: dict[str, Any] = _times(marks, watch)
    cpu = _times(marks, watch, cpu=True) if device.type == "cpu" else None
    return Run(**times, kv_bytes=marks.kv_bytes, peak_bytes=_peak(device), cpu=cpu)


def _times(marks: _Marks, watch: Stopwatch, cpu: bool = False) -> dict[str, float | None]:
    vision = [watch.seconds(*pair, cpu) for pair in marks.vision]
    first, *rest = marks.forward
    return {
        "vision": sum(vision),
        "prefill": watch.seconds(*first, cpu) - sum(vision[: marks.vision_of_prefill]),
        "decision": sum(watch.seconds(*pair, cpu) for pair in marks.decision),
        "token": statistics.median(watch.seconds(*pair, cpu) for pair in rest) if rest else None,
        "total": watch.seconds(*marks.whole, cpu),
    }


_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    if device.type != "cpu":
        return
    with contextlib.suppress(OSError):
        _CLEAR.write_text("5")  # Linux: resets the high-water mark of resident memory


def _peak(device: torch.device) -> int | None:
    if device.type != "cpu":
        return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)
