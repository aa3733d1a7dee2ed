# SPDX-License-Identifier: Apache-2.0
"""The model that lmms-eval runs under the name `vtprune`: any vision-language model of transformers, pruned."""

from __future__ import annotations

import contextlib
import inspect
import time
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.api.task import ConfigurableMessagesTask
from lmms_eval.models.chat.huggingface import Huggingface
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm

from ...core import default_method
from ...core.log import warn_once
from ...engine.patching import Patch, patch
from ...refvlm import loading
from ...report.pruning import Pruning
from . import options
from .pictures import square
from .requests import PrunedTokenCounts, answers, batches, until

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
        pretrained: A name on the hub, a local folder, or `embedded` or `embedded-qwen2_5_vl` for a small model inside
            vtprune.
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
        ArgumentError: An argument that neither the plug-in nor the method takes, an argument of another type, or
            `device_map` in several processes.
        VTPruneError: The model, the method or the budget cannot be used; see `vtprune.patch`.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = loading.EMBEDDED,
        method: str = default_method.NAME,
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
        options.check(locals(), options.ARGUMENTS)
        lmms.__init__(self)  # not the parent's: see above
        chosen = options.method(method, options_of_method, ARGUMENTS)
        budget = options.budget(method, ratio=ratio, keep=keep, mean_ratio=mean_ratio)
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise options.ArgumentError(f"batch_size is {batch_size!r}; expected a positive number")
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self._device = self._place(device, device_map)
        self.device_map = device_map or None
        given = {"device_map": self.device_map, "attn_implementation": attn_implementation}
        self._model, self.processor = loading.model_and_processor(
            pretrained, str(self._device), dtype, **{name: value for name, value in given.items() if value}
        )
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
        return loading.device_of(device) if device and not several else self.accelerator.device

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answers requests, with or without pictures, in their order."""
        results: list[GenerationResult] = []
        seconds = 0.0
        progress = tqdm(total=len(requests), disable=self.rank != 0, desc="Model Responding")
        for batch in batches(requests, self.batch_size, self._asked):
            answered, spent = self._answer(batch)
            seconds += spent
            for request, answer in zip(batch, answered, strict=True):
                self.cache_hook.add_partial("generate_until", (request.args[0], self._asked(request)), answer.text)
            results += answered
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
        inputs = self._inputs([self._messages(request) for request in batch])[0]
        before = self.patch.last if self.patch else None
        start = time.perf_counter()
        output = self._model.generate(**inputs, **self._generation(dict(self._asked(batch[0]))))
        seconds = time.perf_counter() - start
        width = inputs["input_ids"].shape[1]
        texts = self.processor.batch_decode(
            output[:, width:], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        texts = [until(text, self._asked(batch[0]).get("until")) for text in texts]
        read = inputs["attention_mask"].sum(-1).tolist()
        counts = [TokenCounts(length, self._written(row)) for length, row in zip(read, output[:, width:], strict=True)]
        counts = self._pruned(counts, before)
        return [GenerationResult(*answer) for answer in zip(texts, counts, strict=True)], seconds

    def _pruned(self, counts: list[TokenCounts], before: Pruning | None) -> list[TokenCounts]:
        """Counts of a batch, with what pruning did to each sample; `before` is the record of the call before it."""
        if self.patch is None:
            return counts
        last = self.patch.last
        pruning = None if last is before else last  # text-only prompts leave the account of an earlier one
        rows = 1 if pruning is None else len(pruning.visual) // len(counts)  # beams of a sample are neighbors
        return [PrunedTokenCounts.of(pruning, i * rows, count) for i, count in enumerate(counts)]

    def _means(self, counts: Sequence[TokenCounts]) -> dict[str, float]:
        """Means over requests for lmms-eval's summary of this process."""
        if self.patch is None or not counts:
            return {}
        names = ("visual_tokens", "kept_visual_tokens")
        return {name: sum(getattr(count, name) for count in counts) / len(counts) for name in names}

    def _messages(self, request: Instance) -> list[dict[str, Any]]:
        """The messages of a request that wants an answer."""
        _, to_messages, _, doc_id, task, split = request.args
        return to_messages(self.task_dict[task][split][doc_id])

    def _asked(self, request: Instance) -> dict[str, Any]:
        """The generation options of a request."""
        return request.args[2]

    def _inputs(self, conversations: Sequence[list[dict[str, Any]]]) -> tuple[Any, list[str]]:
        """What the processor makes of the messages of a batch, on the model's device, and the texts of the prompts."""
        chats, texts = [], []
        for messages in conversations:
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
        for name, part in (("videos", "video_processor"), ("audio", "feature_extractor")):
            if name in given and getattr(self.processor, part, None) is None:
                raise options.ArgumentError(
                    f"the task shows {name}, and {type(self.processor).__name__} has no {part}; expected a model that "
                    f"takes {name}, or a task without"
                )
        inputs = self.processor(text=texts, padding=True, return_tensors="pt", **given)
        return inputs.to(self._device, self._model.dtype), texts

    def _squares(self, images: list[Any]) -> list[Any]:
        """Squares of the pictures; a method that tells padding from picture is told the sizes that it cannot see."""
        from transformers.image_utils import load_image

        images = [load_image(image) for image in images]
        if self.patch is not None and hasattr(self.patch.method, "sizes"):
            self.patch.method.sizes = [(image.height, image.width) for image in images]
        return [square(image, self.processor.image_processor.image_mean) for image in images]

    def _generation(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Options of `generate`, with the defaults of lmms-eval's Hugging Face models.

        Raises:
            ArgumentError: An option has another type.
        """
        options.check(asked, options.GENERATION)
        sampling = (asked.get("temperature") or 0) > 0
        unused = sorted(set(asked) - set(options.GENERATION))
        if asked.get("do_sample") and not sampling:
            unused.append("do_sample")
        if unused:
            warn_once(f"generation options that are not followed: {', '.join(unused)}; sampling needs a temperature")
        known = {
            "max_new_tokens": asked.get("max_new_tokens", asked.get("max_gen_toks", 4096)),
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

    @torch.no_grad()
    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """Scores given answers. All answers to a question see the same visual tokens: answers do not choose them.

        Returns:
            list: Of each request, as `text`, the mean negative log-likelihood of the answer's tokens (lmms-eval takes
            the answer with the smallest, as its own models return losses), and whether greedy decoding would write
            this answer. Bare pairs, which lmms-eval asks for, it turns into strings (0.7.3).

        Raises:
            ArgumentError: An answer is empty.
        """
        results: list[GenerationResult] = []
        for batch in batches(requests, self.batch_size, lambda request: None):
            inputs, texts = self._inputs([self._question(request) for request in batch])
            width = inputs["input_ids"].shape[1]
            ids = answers(self._tokenizer, texts, [self._continuation(request) for request in batch])
            longest = max(map(len, ids))
            tokens = torch.tensor([row + [0] * (longest - len(row)) for row in ids], device=self._device)
            real = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids], device=self._device)
            for name in [n for n, v in inputs.items() if n == "input_ids" or v.shape == inputs["input_ids"].shape]:
                behind = {"input_ids": tokens, "attention_mask": real}.get(name, torch.zeros_like(tokens))
                inputs[name] = torch.cat([inputs[name], behind.to(inputs[name].dtype)], 1)
            if "logits_to_keep" in inspect.signature(self._model.forward).parameters:
                inputs["logits_to_keep"] = longest + 1
            before = self.patch.last if self.patch else None
            read = inputs["attention_mask"].sum(1).tolist()
            with self.patch.question(end=width) if self.patch else contextlib.nullcontext():
                logits = self._model(**inputs, use_cache=False).logits[:, -longest - 1 : -1].float()
            losses = -logits.log_softmax(-1).gather(2, tokens[..., None])[..., 0] * real
            greedy = ((logits.argmax(-1) == tokens) | (real == 0)).all(1)
            scored = zip((losses.sum(1) / real.sum(1)).tolist(), greedy.tolist(), strict=True)
            counts = self._pruned([TokenCounts(length, 0) for length in read], before)
            results += [GenerationResult(*found) for found in zip(scored, counts, strict=True)]
        return results

    def _question(self, request: Instance) -> list[dict[str, Any]]:
        """The messages of a request that brings its answer; one of two arguments asks for the answer by itself."""
        context, _, *rest = request.args
        pictures: list[Any] = []
        if rest:
            to_pictures, doc_id, task, split = rest
            pictures = to_pictures(self.task_dict[task][split][doc_id]) if to_pictures else []
        return ConfigurableMessagesTask._build_user_turn(pictures, context)

    def _continuation(self, request: Instance) -> str:
        """The answer that a request brings."""
        answer = request.args[1]
        if not callable(answer):
            return answer
        _, doc_id, task, split = request.args[2:]
        return str(answer(self.task_dict[task][split][doc_id]))

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("vtprune answers one message a request; this task wants several rounds; leave it out")

    def clean(self) -> None:
        """Takes the patch off and lets the model go, so that a judge finds room."""
        if self.patch is not None:
            self.patch.remove()
            self.patch = None
        super().clean()


class VTPruneSimple(VTPrune):
    """The same model for `--force_simple`: lmms-eval asks log-likelihoods only of models that take its older requests,
    with a text and pictures in place of messages."""

    is_simple = True

    def _messages(self, request: Instance) -> list[dict[str, Any]]:
        context, _, to_pictures, doc_id, task, split = request.args
        return ConfigurableMessagesTask._build_user_turn(to_pictures(self.task_dict[task][split][doc_id]), context)

    def _asked(self, request: Instance) -> dict[str, Any]:
        return request.args[1]
