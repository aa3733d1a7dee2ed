# SPDX-License-Identifier: Apache-2.0
"""The benchmark: all variants answer a prompt in rounds, and every round is saved."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.budget import Budget
from ..engine.patching import inspect, patch
from ..errors import BudgetError, MethodError, NothingPrunedError, UnsupportedModelError, VTPruneError, one_line
from ..models.anatomy import Anatomy
from ..report.cost import DecoderShape, kv_bytes
from ..study import progress, stopwatch
from . import limit
from .variants import Variant

WARM = 576  # most visual tokens of a warm-up on a CPU
SHRINKING = (1.0, 0.97, 0.94, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)  # of the tokens asked of a layout that may round up
# Schema of a run in a result file.
_SECONDS = {"type": "number", "minimum": 0, "maximum": 1e9}
_SOME_TIME = {**_SECONDS, "exclusiveMinimum": 0}
_AMOUNT = {"type": "integer", "minimum": 0, "maximum": 10**18}
_TIMES = {"vision": _SECONDS, "decision": _SECONDS, "prefill": _SOME_TIME, "total": _SOME_TIME}
_TIMES["token"] = {**_SECONDS, "type": ["number", "null"]}
_RUN = {
    **_TIMES,
    **dict.fromkeys(("visual", "text", "kept", "kv_bytes", "kv_bytes_formula"), _AMOUNT),
    "peak_bytes": {**_AMOUNT, "type": ["integer", "null"]},
    **dict.fromkeys(("mean_ratio", "flops_share"), {"type": "number", "minimum": 0, "maximum": 2}),
    "cpu": {"type": ["object", "null"], "properties": _TIMES},
}
REFUSALS = (BudgetError, MethodError, NothingPrunedError, UnsupportedModelError)


@dataclass(frozen=True)
class Setting:
    """Sizes of one prompt.

    Attributes:
        batch: Number of samples, all of the same length.
        tokens: Requested visual tokens of each; None for the user's own picture.
    """

    batch: int
    tokens: int | None

    @property
    def key(self) -> str:
        return f"batch {self.batch}, {'own picture' if self.tokens is None else f'{self.tokens} visual tokens'}"


@dataclass
class Bench:
    """A model and the variants to time on it.

    Attributes:
        model: An unpatched model.
        prompt: Function that returns the arguments of `generate` for a setting.
        variants: Variants to time, in order.
        new_tokens: Tokens generated in every run.
    """

    model: Any
    prompt: Callable[[Setting], Mapping[str, Any]]
    variants: Sequence[Variant]
    new_tokens: int = 8

    def __post_init__(self) -> None:
        self.parts: Anatomy = inspect(self.model)
        weight = self.parts.embeddings.weight
        assert isinstance(weight, Tensor)
        self.shape = DecoderShape.of(self.parts.decoder.config, self.parts.num_layers, weight.element_size())
        self.device = weight.device  # of the prompts, too

    def about(self) -> dict[str, Any]:
        """Sizes of the model, for the result file."""
        counted = {"parameters": self.parts.model, "decoder_parameters": self.parts.decoder}
        size = {name: sum(p.numel() for p in part.parameters()) for name, part in counted.items()}
        return {**size, "layers": self.parts.num_layers}

    def prepare(self, setting: Setting) -> Prompt:
        """Creates the prompt of a setting, with the embeddings that its limits need.

        Raises:
            VTPruneError: The prompt has no visual tokens, or samples with different numbers of them.
        """
        inputs = self.prompt(setting)
        visual = self.parts.is_placeholder(inputs["input_ids"])
        counts = visual.sum(1).tolist()
        if not counts[0] or len(set(counts)) > 1:
            raise VTPruneError(
                f"the samples have {counts} visual tokens; expected the same number, at least 1, in each"
            )
        prompt = Prompt(inputs, visual, limit.embedded_prompt(self.parts, inputs))
        for variant in self.variants:
            if variant.kind == "resize":
                assert variant.budget is not None
                most = limit.tokens_left(variant.budget, prompt.tokens)
                small = prompt.smaller[variant.key] = self._smaller(setting.batch, most)
                if small is not None:
                    count = int(self.parts.is_placeholder(small["input_ids"][0]).sum())
                    prompt.budgets[str(variant.budget)] = Budget(keep=count)
        return prompt

    def _smaller(self, batch: int, most: int) -> Mapping[str, Any] | None:
        """The prompt of a setting with the most visual tokens that are not above `most`; None if none has so few."""
        for share in SHRINKING:
            try:
                inputs = self.prompt(Setting(batch, max(1, int(share * most))))
            except MethodError:  # the user's own picture on a fixed grid
                return None
            if int(self.parts.is_placeholder(inputs["input_ids"][0]).sum()) <= most:
                return inputs
        return None

    def warming(self, setting: Setting, prompt: Prompt) -> Prompt:
        """Prompt for the warm-up: the prompt itself, but a short one on a CPU, for which that is enough."""
        if self.device.type != "cpu" or setting.tokens is None or setting.tokens <= WARM:
            return prompt
        return self.prepare(Setting(setting.batch, WARM))

    def round(self, prompt: Prompt) -> dict[str, dict[str, Any]]:
        """Runs every variant once, in order; returns the measurements by key."""
        return {variant.key: self._answer(variant, prompt) for variant in self.variants}

    def _answer(self, variant: Variant, prompt: Prompt) -> dict[str, Any]:
        try:
            return self._run(variant, prompt)
        except REFUSALS as error:
            return {"refused": one_line(error)}
        except torch.OutOfMemoryError:
            if prompt.visual.is_cuda:
                torch.cuda.empty_cache()
            return {"refused": "out of memory"}

    def _run(self, variant: Variant, prompt: Prompt) -> dict[str, Any]:
        batch, length = prompt.visual.shape
        budget = prompt.budgets.get(str(variant.budget), variant.budget)
        layers = self.parts.num_layers
        if variant.kind == "method":
            assert budget is not None and variant.method is not None
            with patch(self.model, method=variant.method, **vars(budget)) as running:
                run = stopwatch.generate(
                    self.parts, prompt.inputs, self.new_tokens, [stage.layer for stage in running.schedule]
                )
                last = running.last
            assert last is not None
            slots, kept, mean = last.slots, len(last.kept[0]), last.mean_ratio
        elif variant.kind == "limit":
            assert budget is not None
            short = limit.short_prompt(prompt.embeds, prompt.visual, budget)
            run = stopwatch.generate(self.parts, short, self.new_tokens)
            kept = short["attention_mask"].shape[1] - length + prompt.tokens
            slots, mean = [short["attention_mask"].shape[1]] * layers, kept / prompt.tokens
        elif variant.kind == "resize":
            small = prompt.smaller[variant.key]
            if small is None:
                raise MethodError("no smaller picture has so few visual tokens: the grid, or one tile of it, is fixed")
            run = stopwatch.generate(self.parts, small, self.new_tokens)
            slots = [small["input_ids"].shape[1]] * layers
            kept = slots[0] - length + prompt.tokens
            mean = kept / prompt.tokens
        else:
            run = stopwatch.generate(self.parts, prompt.inputs, self.new_tokens)
            slots, kept, mean = [length] * layers, prompt.tokens, 1.0
        return {
            **dataclasses.asdict(run),
            "visual": prompt.tokens,
            "text": length - prompt.tokens,
            "kept": kept,
            "mean_ratio": mean,
            "kv_bytes_formula": kv_bytes(slots, batch, self.shape),
            "flops_share": limit.flops_share(slots, length, self.shape),
        }


@dataclass
class Prompt:
    """A prompt of equally long samples.

    Attributes:
        inputs: Arguments of `generate`.
        visual: `[B, T]` bool, True at visual tokens.
        embeds: `[B, T, D]` inputs of the decoder.
        smaller: For each variant that resizes, by its key, arguments of `generate` with smaller pictures; None if none
            has so few tokens.
        budgets: By the text of the budget that was asked for, that of the smaller picture: methods and limit keep as
            many tokens as the processor's rounding left it.
    """

    inputs: Mapping[str, Any]
    visual: Tensor
    embeds: Tensor
    smaller: dict[str, Mapping[str, Any] | None] = field(default_factory=dict)
    budgets: dict[str, Budget] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Visual tokens of one sample."""
        return int(self.visual[0].sum())


def run(
    bench: Bench,
    settings: Sequence[Setting],
    rounds: int,
    header: Mapping[str, Any],
    out: Path | None = None,
    force: bool = False,
    warm_up: int = 1,
) -> dict[str, Any]:
    """Runs a benchmark, or resumes one.

    Args:
        bench: The model and the variants.
        settings: Prompts, one after the other.
        rounds: Runs of each variant on each prompt.
        header: Conditions of the results; see `header`.
        out: The result file, written after every round.
        force: Overwrite the result file.
        warm_up: Rounds before the timed ones.

    Returns:
        dict: The header, `about` the model, and `settings`: for each setting its `batch`, `tokens` and `rounds`, each
        with the load average at its start (`load`) and its `runs`.

    Raises:
        StaleResultError: `out` is a result with another header, or damaged.
    """
    data = {**header, "about": bench.about(), "settings": {}}
    data["settings"] = progress.load(out, header, force, _schema(bench.variants)).get("settings", {})
    for setting in settings:
        data["settings"].setdefault(setting.key, {**dataclasses.asdict(setting), "rounds": []})
    todo = [(setting, rounds - len(data["settings"][setting.key]["rounds"])) for setting in settings]
    left = sum(max(0, count) for _, count in todo)
    with progress.bar("rounds", rounds * len(settings), rounds * len(settings) - left) as step:
        for setting, count in todo:
            if count <= 0:
                continue
            try:
                prompt = bench.prepare(setting)
            except torch.OutOfMemoryError:
                data["settings"][setting.key]["refused"] = "out of memory before the first run"
                progress.save(out, data)
                continue
            for _ in range(warm_up):
                bench.round(bench.warming(setting, prompt))
            for _ in range(count):
                load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
                data["settings"][setting.key]["rounds"].append({"load": load, "runs": bench.round(prompt)})
                progress.save(out, data)
                step(setting.key)
    return data


def _schema(variants: Sequence[Variant]) -> dict[str, Any]:
    """JSON Schema of a result file, beside its header."""
    refused = {"type": "object", "required": ["refused"], "properties": {"refused": {"type": "string"}}}
    measured = {"type": "object", "required": [*_RUN], "properties": _RUN}
    run = {"if": {"required": ["refused"]}, "then": refused, "else": measured}
    runs = {"type": "object", "required": [variant.key for variant in variants], "additionalProperties": run}
    part = {"type": "object", "required": ["load", "runs"], "properties": {"runs": runs}}
    sizes = {"batch": _AMOUNT, "tokens": {**_AMOUNT, "type": ["integer", "null"]}}
    rounds = {"type": "array", "items": part}
    setting = {"type": "object", "required": ["batch", "tokens", "rounds"], "properties": {**sizes, "rounds": rounds}}
    return {"properties": {"settings": {"type": "object", "additionalProperties": setting}}}


def header(bench: Bench, name: str, text: int | None, seed: int = 0) -> dict[str, Any]:
    """Conditions under which times are comparable.

    Args:
        bench: The model and the variants.
        name: Name of the model.
        text: Text tokens of the prompts, None for the user's own prompts.
        seed: Seed of weights and prompts.
    """
    device = bench.device
    return {
        "model": name,
        "variants": [variant.key for variant in bench.variants],
        "new_tokens": bench.new_tokens,
        "text_tokens": text,
        "seed": seed,
        "dtype": str(bench.parts.embeddings.weight.dtype).removeprefix("torch."),
        "attention": str(getattr(bench.parts.decoder.config, "_attn_implementation", None)),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "machine": f"{os.cpu_count()} {platform.machine()} cores",
        "threads": torch.get_num_threads(),
        "versions": progress.versions(),
    }
