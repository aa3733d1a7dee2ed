# SPDX-License-Identifier: Apache-2.0
"""Passes every optional argument of `forward` and `generate` to an unpatched, a patched and a masked model.

`forward_outcomes` and `generate_outcomes` yield an outcome per argument and situation (text prompt, picture, decoding
step): whether the patched model's result equals that of the unpatched model (text) or of the masked, unpatched model
(picture), or why the call is refused or fails. Arguments that the unpatched model rejects are skipped. For all
architectures:

    python -m tests.arguments [architecture ...]
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.utils import TransformersKwargs

import vtprune

Batch = dict[str, Any]
TOKEN = 70  # input of a decoding step; text ids of the architectures start at 64


@dataclass
class Subject:
    """A model and the inputs to call it with.

    Attributes:
        model: Unpatched.
        picture, text: Make a prompt of one row with a picture, and one without.
        placeholder: Token id of visual tokens in a prompt.
        masked: Takes `patch.last` and returns a context in which the unpatched model masks the dropped tokens.
        decodes: Whether `masked` also works while decoding. False where layers mix tokens without a mask: there the
            reference runs the shortened prompt in one pass.
        method: Pruning method.
    """

    model: nn.Module
    picture: Callable[[], Batch]
    text: Callable[[], Batch]
    placeholder: int
    masked: Callable[[Any], AbstractContextManager]
    decodes: bool = True
    method: Any = "uniform"

    def patched(self) -> vtprune.Patch:
        return vtprune.patch(self.model, ratio=0.3, method=self.method)


def parameters(model: nn.Module) -> list[inspect.Parameter]:
    """Named arguments of a model and its parts, and those of transformers that reach the decoder as keywords."""
    found: dict[str, inspect.Parameter] = {}
    parts = vtprune.inspect(model)
    for module in (model, parts.composite, parts.decoder):
        for parameter in inspect.signature(module.forward).parameters.values():
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                found.setdefault(parameter.name, parameter)
    extra = [*TransformersKwargs.__annotations__, "return_dict", "output_hidden_states", "use_cache", "shift_labels"]
    for name in extra:
        found.setdefault(name, inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None))
    found.pop("input_ids", None)
    return list(found.values())


def values(parameter: inspect.Parameter, batch: Batch, subject: Subject) -> list[Any]:
    """Values of an argument of `forward` for a prompt."""
    ids = batch["input_ids"]
    length, name = ids.shape[1], parameter.name
    labels = ids.masked_fill(ids == subject.placeholder, -100)
    known: dict[str, list[Any]] = {
        "attention_mask": [None, torch.ones_like(ids)],
        "position_ids": [None, torch.arange(length)[None]],
        "cache_position": [torch.arange(length)],
        "cache": [DynamicCache()],
        "past_key_values": [None, DynamicCache()],
        "labels": [labels],
        "shift_labels": [nn.functional.pad(labels[:, 1:], (0, 1), value=-100)],
        "logits_to_keep": [0, 1, 2, torch.tensor([length - 1])],
        "num_items_in_batch": [torch.tensor(3), 3],
        "mm_token_type_ids": [(ids == subject.placeholder).long()],
        "token_type_ids": [(ids == subject.placeholder).long()],
        "output_hidden_states": [True, False, [0]],
        "cu_seq_lens_q": [torch.tensor([0, length], dtype=torch.int32)],
        "cu_seq_lens_k": [torch.tensor([0, length], dtype=torch.int32)],
        "max_length_q": [length],
        "max_length_k": [length],
        "seq_idx": [torch.zeros_like(ids, dtype=torch.int32)],
        "is_causal": [True],  # the reference supports causal masks only
        "vision_feature_layer": [None, -1],
        "vision_feature_select_strategy": [None, "default"],
    }
    if name in known:
        return known[name]
    flag = "bool" in str(parameter.annotation) or name.startswith(("output_", "use_", "return_", "is_"))
    default = None if parameter.default is parameter.empty else parameter.default
    return [True, False] if flag or isinstance(default, bool) else [default]


def logits_of(output: Any) -> Tensor:
    """Logits of a forward's output."""
    found = getattr(output, "logits", None)
    return found if found is not None else next(x for x in output if isinstance(x, Tensor) and x.dim() == 3)


def close(got: Tensor, want: Tensor) -> None:
    got, want = (torch.where(x.abs() < 1e30, x, 0).float() for x in (got, want))
    torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-4 * max(1.0, float(want.abs().max())))


def shown(name: str, value: Any) -> str:
    text = type(value).__name__ if callable(getattr(value, "to", None)) or callable(value) else repr(value)
    return f"{name}={text[:40]}"


def compared(
    subject: Subject,
    picture: bool,
    call: Callable[[], Any],
    same: Callable[[Any, Any], None],
    hidden: Callable[[], Any] | None = None,
    steps: bool = True,
) -> str | None:
    """Outcome of a call, or None where the unpatched model rejects it.

    Args:
        subject, picture, call: The model, whether the prompt has a picture, and the call.
        same: Raises unless two results are the same.
        hidden: Call of the masked model where it differs from `call`.
        steps: Whether the call decodes.
    """
    try:
        plain = call()
    except Exception:
        return None
    try:
        with subject.patched() as patch:
            got = call()
        last = patch.last
        if not picture:
            same(got, plain)
            return "equal"
        assert last is not None and len(last.kept[0]) < len(last.visual[0]), "nothing was pruned"
        if steps and not subject.decodes:
            return "pruned"
        with subject.masked(last):
            same(got, (hidden or call)())
        return "equal"
    except vtprune.VTPruneError as error:
        return f"{'refused' if picture else 'FAULT'}: {error}"
    except Exception as error:
        return f"FAULT: {type(error).__name__}: {error}"[:300]


def forward_outcomes(subject: Subject) -> Iterator[tuple[str, str]]:
    """Outcomes of every optional argument of `forward`, for a text prompt, a picture and a decoding step."""
    model = subject.model

    def same(got: Any, want: Any) -> None:
        close(logits_of(got)[:, -1], logits_of(want)[:, -1])

    for parameter in parameters(model):
        for number, value in enumerate(values(parameter, subject.picture(), subject)):
            for picture in (False, True):
                if picture and value is None and parameter.name in subject.picture():
                    continue

                def call(picture: bool = picture, number: int = number, name: str = parameter.name) -> Any:
                    batch = subject.picture() if picture else subject.text()
                    return model(**{**batch, name: values(parameter, batch, subject)[number]})  # noqa: B023

                def shorter(call: Callable = call, name: str = parameter.name) -> Any:
                    # In a shortened prompt these arguments name other columns; they do not change the last logits.
                    of_columns = ("labels", "shift_labels", "logits_to_keep", "output_router_logits")
                    return call() if subject.decodes or name not in of_columns else model(**subject.picture())

                where = "picture" if picture else "text"
                if (outcome := compared(subject, picture, call, same, shorter, steps=False)) is not None:
                    yield f"{shown(parameter.name, value)} with {where}", outcome

            def step(number: int = number, name: str = parameter.name) -> Any:
                batch = {k: v for k, v in subject.picture().items() if k != "attention_mask"}
                cache = model(**batch, use_cache=True).past_key_values
                word = {"input_ids": torch.tensor([[TOKEN]])}
                if name == "attention_mask":
                    return model(input_ids=word["input_ids"], past_key_values=cache)
                given = values(parameter, word, subject)[number]  # noqa: B023
                if name in ("position_ids", "cache_position") and given is not None:
                    given = given + batch["input_ids"].shape[1]
                return model(**word, **{"past_key_values": cache, name: given})

            outcome = None if parameter.name in ("cache", "past_key_values") else compared(subject, True, step, same)
            if outcome is not None:
                yield f"{shown(parameter.name, value)} while decoding", outcome


class Silent:
    """A streamer that writes nothing."""

    def put(self, value: Tensor) -> None:
        pass

    def end(self) -> None:
        pass


def own_loop(model: Any, input_ids: Tensor, **kwargs: Any) -> Any:
    """A `custom_generate` function."""
    names = ("logits_processor", "stopping_criteria", "generation_config")
    return model._sample(input_ids, **{n: kwargs.pop(n) for n in names}, **kwargs)


def settings(assistant: nn.Module | None) -> dict[str, list[Any]]:
    """Values of every setting of `generate`; a dict where a setting requires others."""
    prompts = torch.tensor([[65, 66, 67]])
    found: dict[str, list[Any]] = {
        "max_length": [200],
        "max_new_tokens": [1, 4],
        "min_length": [3],
        "min_new_tokens": [2],
        "early_stopping": [{"early_stopping": value, "num_beams": 2} for value in (True, "never")],
        "max_time": [60.0],
        "do_sample": [True],
        "num_beams": [2, {"num_beams": 2, "do_sample": True}],
        "use_cache": [True, False],
        "cache_implementation": ["dynamic", "static", "offloaded", "quantized"],
        "cache_config": [{"cache_implementation": "quantized", "cache_config": {"backend": "quanto"}}],
        "max_cache_len": [{"cache_implementation": "static", "max_cache_len": 300}],
        "num_return_sequences": [{"num_beams": 2, "num_return_sequences": 2}],
        "temperature": [{"do_sample": True, "temperature": 0.7}],
        "top_k": [{"do_sample": True, "top_k": 3}],
        "top_p": [{"do_sample": True, "top_p": 0.5}],
        "min_p": [{"do_sample": True, "min_p": 0.1}],
        "top_h": [{"do_sample": True, "top_h": 0.5}],
        "typical_p": [{"do_sample": True, "typical_p": 0.5}],
        "epsilon_cutoff": [{"do_sample": True, "epsilon_cutoff": 0.01}],
        "eta_cutoff": [{"do_sample": True, "eta_cutoff": 0.01}],
        "repetition_penalty": [1.3],
        "encoder_repetition_penalty": [1.3],
        "length_penalty": [{"num_beams": 2, "length_penalty": 2.0}],
        "no_repeat_ngram_size": [1],
        "encoder_no_repeat_ngram_size": [2],
        "bad_words_ids": [[[70], [71, 72]]],
        "renormalize_logits": [True],
        "forced_bos_token_id": [70],
        "forced_eos_token_id": [71],
        "remove_invalid_values": [True],
        "exponential_decay_length_penalty": [{"exponential_decay_length_penalty": (1, 1.5), "eos_token_id": 2}],
        "suppress_tokens": [[70, 71]],
        "begin_suppress_tokens": [[70]],
        "sequence_bias": [[[[70], 2.0]]],
        "guidance_scale": [1.5],
        "output_attentions": [True, {"output_attentions": True, "return_dict_in_generate": True}],
        "output_hidden_states": [True, {"output_hidden_states": True, "return_dict_in_generate": True}],
        "output_scores": [{"output_scores": True, "return_dict_in_generate": True}],
        "output_logits": [{"output_logits": True, "return_dict_in_generate": True}],
        "return_dict_in_generate": [True],
        "pad_token_id": [0],
        "bos_token_id": [1],
        "eos_token_id": [2, [2, 71]],
        "is_assistant": [True],
        "prompt_lookup_num_tokens": [2],
        "max_matching_ngram_size": [{"prompt_lookup_num_tokens": 2, "max_matching_ngram_size": 3}],
        "disable_compile": [True],
        "prefill_chunk_size": [8],
        "generation_config": [GenerationConfig(max_new_tokens=2, do_sample=False, pad_token_id=0)],
        "logits_processor": [LogitsProcessorList()],
        "stopping_criteria": [StoppingCriteriaList()],
        "prefix_allowed_tokens_fn": [lambda row, ids: list(range(64, 90))],
        "synced_gpus": [False],
        "streamer": [Silent()],
        "negative_prompt_ids": [{"guidance_scale": 1.5, "negative_prompt_ids": prompts}],
        "negative_prompt_attention_mask": [
            {
                "guidance_scale": 1.5,
                "negative_prompt_ids": prompts,
                "negative_prompt_attention_mask": torch.ones_like(prompts),
            }
        ],
        "custom_generate": [own_loop],
        "watermarking_config": [{"watermarking_config": {"greenlist_ratio": 0.5, "bias": 1.0}}],
    }
    if assistant is not None:
        found |= {
            "assistant_model": [assistant],
            "num_assistant_tokens": [{"assistant_model": assistant, "num_assistant_tokens": 3}],
            "num_assistant_tokens_schedule": [
                {"assistant_model": assistant, "num_assistant_tokens_schedule": kind}
                for kind in ("constant", "heuristic")
            ],
            "assistant_confidence_threshold": [{"assistant_model": assistant, "assistant_confidence_threshold": 0.1}],
            "assistant_early_exit": [1],
        }
    return found


# Settings of `generate` that are not tested, with the reason.
LEFT_OUT = {
    "stop_strings": "needs a tokenizer",
    "token_healing": "needs a tokenizer",
    "assistant_lookbehind": "needs another tokenizer",
    "target_lookbehind": "needs another tokenizer",
    "assistant_ensemble_weight": "needs another tokenizer",
    "decoder_start_token_id": "of encoder-decoder models",
    "use_mtp": "of models with heads for several tokens",
    "speculation_type": "of models with heads for several tokens",
    "compile_config": "compilation is tested by itself",
    "continuous_batching_config": "of `generate_batch`",
    **dict.fromkeys(
        ("low_memory", "penalty_alpha", "dola_layers", "diversity_penalty", "num_beam_groups"), "runs code from a hub"
    ),
    **dict.fromkeys(("constraints", "force_words_ids"), "runs code from a hub"),
    **dict.fromkeys(("inputs", "self", "kwargs", "transformers_version", "_from_model_config"), "no setting"),
}


CACHES = ("cache_implementation", "cache_config", "max_cache_len")


def generate_outcomes(subject: Subject, assistant: nn.Module | None = None) -> Iterator[tuple[str, str]]:
    """Outcomes of every setting of `generate`, with a text prompt and with a picture."""

    def same(got: Any, want: Any) -> None:
        got, want = (getattr(x, "sequences", x) for x in (got, want))
        assert torch.equal(got, want), f"{got[:, -4:].tolist()} instead of {want[:, -4:].tolist()}"

    for name, choices in settings(assistant).items():
        for value in choices:
            given = value if isinstance(value, dict) and name in value else {name: value}
            usual = {} if "generation_config" in given or "max_length" in given else {"max_new_tokens": 3}
            for picture in (False, True):

                def call(picture: bool = picture, given: dict = given, usual: dict = usual) -> Any:
                    batch = subject.picture() if picture else subject.text()
                    torch.manual_seed(0)
                    return subject.model.generate(**batch, **{**usual, "do_sample": False, **given})

                def hidden(call: Callable = call, given: dict = given) -> Any:  # the reference has no static caches
                    return call(given={k: v for k, v in given.items() if k not in CACHES})

                if (outcome := compared(subject, picture, call, same, hidden)) is not None:
                    yield f"generate({shown(name, value)}) with {'picture' if picture else 'text'}", outcome


def of_architecture(architecture: str, class_name: str) -> Iterator[tuple[str, str]]:
    """Outcomes of a registered architecture.

    Raises:
        NotRun: The model cannot be built, has no test inputs, or is refused.
    """
    from tests.architectures import checks, run

    built, prompts = run.prepare(architecture, class_name)
    subject = checks.Subject(built.model, prompts)
    built.model.generation_config.suppress_tokens = list(range(64))
    one, text = ([[3, "image", 5]], [[9]])
    mine = Subject(
        built.model,
        lambda: checks.fresh(prompts.batch(one)),
        lambda: checks.fresh(prompts.batch(text)),
        prompts.placeholder,
        subject.reference,
        decodes=not subject.hybrid,
    )
    yield from forward_outcomes(mine)
    yield from generate_outcomes(mine)


def main(names: list[str]) -> None:
    """Prints the number of arguments per outcome, and every outcome other than an equal result."""
    from tests.architectures import run

    for architecture, class_name in run.registered().items():
        if names and architecture not in names:
            continue
        counts: dict[str, int] = {}
        try:
            with torch.no_grad():
                for what, outcome in of_architecture(architecture, class_name):
                    kind = outcome.split(":")[0]
                    counts[kind] = counts.get(kind, 0) + 1
                    if kind not in ("equal", "pruned"):
                        print(f"{architecture:24}{what}: {run.short(Exception(outcome), 200)}", flush=True)
        except run.NotRun as reason:
            print(f"{architecture:24}{reason.args[0]['status']}: {reason.args[0]['reason'][:100]}", flush=True)
            continue
        print(f"{architecture:24}{counts}", flush=True)


if __name__ == "__main__":
    import sys
    import warnings

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    main(sys.argv[1:])
