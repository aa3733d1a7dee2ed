# SPDX-License-Identifier: Apache-2.0
"""Law 8: patched models, threads and interleaved generations do not affect each other; memory does not grow."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from families import FAMILIES, Image
from support import LAYOUTS, ONE, in_threads, model_of, pruned

import vtprune

PROMPTS = [[3, Image(0), 5], [6, Image(1), 4], [2, Image(0), 9], [5, Image(1), 2]]


def generate(model: torch.nn.Module, batch: dict, **kwargs: Any) -> list:
    return model.generate(**batch, max_new_tokens=4, do_sample=False, **kwargs).tolist()


def test_two_models_and_an_unpatched_one(family: str) -> None:
    make = FAMILIES[family]
    one, two, plain = make.build(seed=0), make.build(seed=1), make.build(seed=2)
    batch = make.batch(ONE)
    want_plain = plain(**batch).logits
    alone = []
    for model, method, ratio in ((one, "random", 0.5), (two, LAYOUTS["steps"], 0.2)):
        with vtprune.patch(model, ratio=ratio, method=method):
            alone.append(generate(model, batch))
    with vtprune.patch(one, ratio=0.5, method="random"), vtprune.patch(two, ratio=0.2, method=LAYOUTS["steps"]):
        assert torch.equal(plain(**batch).logits, want_plain)
        assert [generate(one, batch), generate(two, batch)] == alone
        assert torch.equal(plain(**batch).logits, want_plain)


def test_threads_on_one_model(family: str, layout: str) -> None:
    model, make = model_of(family), FAMILIES[family]
    batches = [make.batch([prompt]) for prompt in PROMPTS]
    if make.needs_types:
        # transformers keeps rope_deltas on the model: positions of two prompts can mix even unpatched, so use one
        # prompt.
        batches = [make.batch([PROMPTS[0]], seed=seed) for seed in range(4)]
    with pruned(model, LAYOUTS[layout], ratio=0.3) as (patch, spy):
        spy.close()  # the spy is not thread-safe
        want = [(generate(model, batch), [k.tolist() for k in patch.last.kept]) for batch in batches]
        got: list[Any] = [None] * len(batches)

        def work(i: int) -> None:
            with torch.no_grad():
                for _ in range(3):
                    got[i] = (generate(model, batches[i]), [k.tolist() for k in patch.last.kept])

        in_threads(work, len(batches))
    assert got == want


def test_interleaved_generations(family: str, layout: str) -> None:
    """Two conversations that alternate decoding steps on one model give the tokens of each alone."""
    model, make = model_of(family), FAMILIES[family]
    batches = [make.batch([[3, Image(0), 5]], seed=s) for s in (0, 1)]

    def start(batch: dict) -> Any:
        return model(**batch, use_cache=True)

    def advance(out: Any) -> Any:
        return model(input_ids=out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)

    with pruned(model, LAYOUTS[layout], ratio=0.3):
        serial = []
        for batch in batches:
            out = start(batch)
            for _ in range(4):
                out = advance(out)
            serial.append(out.logits)
        outs = [start(batch) for batch in batches]
        for _ in range(4):
            outs = [advance(out) for out in outs]
    for out, want in zip(outs, serial, strict=True):
        torch.testing.assert_close(out.logits, want)


class Interrupt(BaseException):
    """Like KeyboardInterrupt, an exception that `except Exception` does not catch."""


@pytest.mark.parametrize("error", [RuntimeError, Interrupt, KeyboardInterrupt])
def test_an_exception_inside_leaves_the_model_usable(family: str, layout: str, error: type[BaseException]) -> None:
    model, batch = model_of(family), FAMILIES[family].batch(ONE)
    plain = model(**batch).logits

    def fail(*_: Any) -> None:
        raise error("stop")

    with pruned(model, LAYOUTS[layout], ratio=0.3) as (patch, _):
        want = model(**batch).logits
        for module in (patch.anatomy.layers[3], patch.anatomy.vision_tower, patch.anatomy.layers[0]):
            handle = module.register_forward_pre_hook(fail)
            with pytest.raises(error):
                model(**batch)
            handle.remove()
            assert torch.equal(model(**batch).logits, want)
            # A text prompt after an interrupted prefill is not pruned.
            text = torch.tensor([[20, 21, 22]])
            with patch.paused():
                clean = model(input_ids=text).logits
            assert torch.equal(model(input_ids=text).logits, clean)
    assert torch.equal(model(**batch).logits, plain)


def test_nothing_grows(family: str, layout: str) -> None:
    model, batch = model_of(family), FAMILIES[family].batch(ONE)
    with pruned(model, LAYOUTS[layout], ratio=0.3) as (_, spy):
        spy.close()

        def tensors() -> int:
            gc.collect()
            return sum(isinstance(x, torch.Tensor) for x in gc.get_objects())

        for _ in range(3):
            generate(model, batch)
        before = tensors()
        for _ in range(8):
            generate(model, batch)
        assert tensors() <= before


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_requests_with_methods_of_their_own(name: str) -> None:
    """In `using(method=...)` each thread gets the result of a patch with that method, whatever other threads use."""
    model, batch = model_of(name), FAMILIES[name].batch([PROMPTS[0]])
    asked = [("iwp", {"ratio": 0.3}), ("pyramiddrop", {"keep": 4}), ("uniform", {"mean_ratio": 0.5}), ("resprune", {})]
    want = []
    for method, budget in asked:
        with torch.no_grad(), vtprune.patch(model, method=method, **(budget or {"ratio": 0.6})) as patch:
            want.append((generate(model, batch), patch.last.method, [k.tolist() for k in patch.last.kept]))
    assert len({str(kept) for _, _, kept in want}) == len(want)
    got: list[Any] = [None] * len(asked)

    def work(i: int) -> None:
        method, budget = asked[i]
        with torch.no_grad(), patch.using(**budget, method=method):
            for _ in range(3):
                got[i] = (generate(model, batch), patch.last.method, [k.tolist() for k in patch.last.kept])

    with vtprune.patch(model, ratio=0.6, method="divprune") as patch, torch.no_grad():
        in_threads(work, len(asked))
        assert got == want
        with patch.using(method="iwp"), patch.using(ratio=0.3):  # the inner block keeps the outer one's method
            assert (generate(model, batch), patch.last.method) == want[0][:2]
        model(**batch)
        assert patch.last.method == "divprune"
        for refused, match in (("dart", "only vtprune.patch"), ("dort", "unknown method")):
            with pytest.raises(vtprune.MethodError, match=match), patch.using(method=refused):
                pass
        with pytest.raises(vtprune.BudgetError, match="first cut"), patch.using(mean_ratio=0.01, method="iwp"):
            pass
