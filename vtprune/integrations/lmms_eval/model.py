# SPDX-License-Identifier: Apache-2.0
"""The model that lmms-eval runs under the name `vtprune`: any vision-language model of transformers, pruned."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.chat.huggingface import Huggingface
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm

from ... import refvlm
from ...engine.patching import Patch, patch
from ...refvlm import loading
from . import options
from .pictures import square
from .requests import PrunedTokenCounts, batches

ARGUMENTS = (
    "pretrained", "method", "ratio", "keep", "mean_ratio", "square", "batch_size", "device", "device_map", "dtype",
    "attn_implementation", "use_cache", "system_prompt", "reasoning_prompt",
)  # fmt: skip
_SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


class VTPrune(Huggingface):
    """lmms-eval's Hugging Face chat model, with a patch.

    Prompts, system prompts, generation options and their defaults are those of lmms-eval's `huggingface` model, so
    that `method=none` is the unpruned baseline. Loading and generation are done here, because that model takes only
    CUDA devices when it runs in several processes, makes all messages of a batch with its first request's function, and
    hands processors empty lists and an argument (`audios`) that transformers 5 refuses.

    Args:
        pretrained: A name on the hub, a local folder, or `embedded` for the small model inside vtprune.
        method: Name of the method, or `none`; arguments not listed here are its options.
        ratio, keep, mean_ratio: The budget, one of them (see `vtprune.patch`).
        square: Pad pictures to squares with the processor's mean color before it sees them, as LLaVA 1.5 expects.
        batch_size: Requests in one call of `generate`, padded on the left.
        device: Where the model goes; by default where accelerate puts this process.
        device_map: For spreading one copy of the model over devices, `auto` for example. Not with several processes:
            there, each has a copy of its own.
        dtype: Of the weights: `auto` as stored, or a torch dtype by name.
        attn_implementation, use_cache: As in transformers.
        system_prompt, reasoning_prompt: A text, or a file that holds one; the second wins.
        options: Options of the method.

    Raises:
        ArgumentError: An argument that neither the plug-in nor the method takes, or `device_map` in several processes.
        VTPruneError: The model, the method or the budget cannot be used; see `vtprune.patch`.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = loading.EMBEDDED,
        method: str = "iwp",
        ratio: float | None = None,
        keep: int | None = None,
        mean_ratio: float | None = None,
        square: bool = False,
        batch_size: int | str = 1,
        device: str | None = None,
        device_map: Any = None,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        use_cache: bool = True,
        system_prompt: str | None = None,
        reasoning_prompt: str | None = None,
        **options_of_method: Any,
    ) -> None:
        lmms.__init__(self)  # not the parent's: see above
        chosen = options.method(method, options_of_method, ARGUMENTS)
        budget = options.budget(method, ratio=ratio, keep=keep, mean_ratio=mean_ratio)
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise options.ArgumentError(f"batch_size is {batch_size!r}; expected a positive number")
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self._device = self._place(device, device_map)
        self.device_map = device_map or None
        model, self.processor = _load(pretrained, dtype, self.device_map, attn_implementation)
        self._model = model.eval() if self.device_map else model.eval().to(self._device)
        if self.device_map and self._model.device.type != "meta":
            self._device = self._model.device
        self._tokenizer = self.processor.tokenizer
        self._tokenizer.padding_side = "left"
        self._config = self._model.config
        self.batch_size_per_gpu = int(batch_size)
        self.use_cache = use_cache
        self.square = square
        raw = reasoning_prompt or system_prompt
        self.system_prompt = self._resolve_system_prompt(raw.replace("\\n", "\n")) if raw else None
        self.patch: Patch | None = patch(self._model, method=chosen, **budget) if chosen else None

    def _place(self, device: str | None, device_map: Any) -> torch.device:
        """Where this process has its model; refuses what would put a part of it elsewhere."""
        several = self._world_size > 1
        if self.accelerator.distributed_type in _SHARDED:
            kind = self.accelerator.distributed_type.value
            raise options.ArgumentError(f"accelerate shards the model ({kind}); expected data-parallel processes")
        if several and device_map:
            raise options.ArgumentError(
                f"device_map={device_map} with {self._world_size} processes: each has a copy of the model on a device "
                "of its own; leave device_map out, or start one process"
            )
        return torch.device(device) if device and not several else self.accelerator.device

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answers requests, with or without pictures, in their order."""
        results: list[GenerationResult] = []
        seconds = 0.0
        progress = tqdm(total=len(requests), disable=self.rank != 0, desc="Model Responding")
        for batch in batches(requests, self.batch_size):
            answers, spent = self._answer(batch)
            seconds += spent
            for request, answer in zip(batch, answers, strict=True):
                self.cache_hook.add_partial("generate_until", (request.args[0], request.args[2]), answer.text)
            results += answers
            progress.update(len(batch))
        progress.close()
        tokens = sum(result.token_counts.output_tokens for result in results)
        log_metrics(
            total_elapsed_time=seconds,
            total_gen_tokens=tokens,
            avg_speed=tokens / seconds if seconds else 0.0,
            additional_metrics=self._means([result.token_counts for result in results]),
        )
        return results

    def _answer(self, batch: Sequence[Instance]) -> tuple[list[GenerationResult], float]:
        """The answers of one call of `generate`, and how long it took."""
        inputs = self._inputs(batch)
        before = self.patch.last if self.patch else None
        start = time.perf_counter()
        output = self._model.generate(**inputs, **self._generation(dict(batch[0].args[2])))
        seconds = time.perf_counter() - start
        width = inputs["input_ids"].shape[1]
        texts = self.processor.batch_decode(
            output[:, width:], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        read = inputs["attention_mask"].sum(-1).tolist()
        counts = [TokenCounts(length, self._written(row)) for length, row in zip(read, output[:, width:], strict=True)]
        if self.patch is not None:
            last = self.patch.last
            pruning = None if last is before else last  # text-only prompts leave the account of an earlier one
            rows = 1 if pruning is None else len(pruning.visual) // len(batch)  # beams of a sample are neighbors
            counts = [PrunedTokenCounts.of(pruning, i * rows, count) for i, count in enumerate(counts)]
        return [GenerationResult(*answer) for answer in zip(texts, counts, strict=True)], seconds

    def _means(self, counts: Sequence[TokenCounts]) -> dict[str, float]:
        """Means over requests for lmms-eval's summary of this process."""
        if self.patch is None or not counts:
            return {}
        names = ("visual_tokens", "kept_visual_tokens")
        return {name: sum(getattr(count, name) for count in counts) / len(counts) for name in names}

    def _inputs(self, batch: Sequence[Instance]) -> Any:
        """What the processor makes of the messages of a batch, on the model's device."""
        chats, texts = [], []
        for request in batch:
            _, to_messages, _, doc_id, task, split = request.args
            messages = to_messages(self.task_dict[task][split][doc_id])
            if self.system_prompt:
                messages = self._apply_system_prompt(messages, self.system_prompt)
            chat = ChatMessages(messages=messages)
            chats.append(chat.extract_media())
            text = self.processor.apply_chat_template(chat.to_hf_messages(), tokenize=False, add_generation_prompt=True)
            texts.append(text)
        images, videos, audios = ([item for chat in chats for item in chat[kind]] for kind in range(3))
        if self.square:
            images = self._squares(images)
        media = {"images": images, "videos": videos, "audio": audios}
        given = {name: items for name, items in media.items() if items}  # processors refuse empty lists
        inputs = self.processor(text=texts, padding=True, return_tensors="pt", **given)
        return inputs.to(self._device, self._model.dtype)

    def _squares(self, images: list[Any]) -> list[Any]:
        """Squares of the pictures; a method that tells padding from picture is told the sizes that it cannot see."""
        from transformers.image_utils import load_image

        images = [load_image(image) for image in images]
        if self.patch is not None and hasattr(self.patch.method, "sizes"):
            self.patch.method.sizes = [(image.height, image.width) for image in images]
        return [square(image, self.processor.image_processor.image_mean) for image in images]

    def _generation(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Options of `generate`, with the defaults of lmms-eval's Hugging Face models."""
        sampling = (asked.get("temperature") or 0) > 0
        known = {
            "max_new_tokens": asked.get("max_new_tokens", 4096),
            "num_beams": asked.get("num_beams", 1),
            "do_sample": sampling,
            "temperature": asked["temperature"] if sampling else None,
            "top_p": asked.get("top_p") if sampling else None,
            "use_cache": self.use_cache,
            "pad_token_id": self._tokenizer.pad_token_id,
        }
        if self._model.generation_config.eos_token_id is None:
            known["eos_token_id"] = self._tokenizer.eos_token_id
        return known

    def _written(self, ids: torch.Tensor) -> int:
        """Tokens generated for one sample, without what fills the row up to the longest of its batch."""
        ends = self._model.generation_config.eos_token_id
        ends = [ends] if isinstance(ends, int) else ends or [self._tokenizer.eos_token_id]
        found = torch.isin(ids, torch.tensor(ends, device=ids.device)).nonzero()
        return int(found[0]) + 1 if len(found) else len(ids)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("vtprune generates; this task wants log-likelihoods: choose its generating variant")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("vtprune answers one message a request; this task wants several rounds")

    def clean(self) -> None:
        """Takes the patch off and lets the model go, so that a judge finds room."""
        if self.patch is not None:
            self.patch.remove()
            self.patch = None
        super().clean()


def _load(name: str, dtype: str, device_map: Any, attn_implementation: str | None) -> tuple[Any, Any]:
    """A model and its processor; code that comes with a model is never run."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    _, local = loading.config(name)
    if local and name != loading.EMBEDDED:
        loading.refuse_pickles(name)
    place: Any = refvlm.WEIGHTS if name == loading.EMBEDDED else name
    kind: Any = dtype
    if dtype == "auto" and name == loading.EMBEDDED:
        kind = torch.float32  # the file holds float16 for its size
    elif dtype != "auto":
        kind = getattr(torch, dtype, None)
        if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
            raise options.ArgumentError(f"unknown dtype {dtype!r}; expected auto, float32, bfloat16 or float16")
    extra = {"attn_implementation": attn_implementation} if attn_implementation else {}
    model = AutoModelForImageTextToText.from_pretrained(
        place,
        dtype=kind,
        device_map=device_map,
        local_files_only=local,
        trust_remote_code=False,
        use_safetensors=True,
        **extra,
    )
    return model, AutoProcessor.from_pretrained(place, local_files_only=local, trust_remote_code=False)
