# SPDX-License-Identifier: Apache-2.0
"""Law 1: with all tokens kept, logits and generations are bit-identical to the unpatched model's."""

import torch
from families import FAMILIES
from support import MIXED, model_of, pruned


def test_identity(family: str, method: str) -> None:
    model = model_of(family)
    batch = FAMILIES[family].batch(MIXED)
    logits = model(**batch).logits
    tokens = model.generate(**batch, max_new_tokens=4, do_sample=False)
    with pruned(model, method, ratio=1.0) as (patch, _):
        assert torch.equal(model(**batch).logits, logits)
        assert torch.equal(model.generate(**batch, max_new_tokens=4, do_sample=False), tokens)
        assert patch.last is not None and all(
            torch.equal(v, k) for v, k in zip(patch.last.visual, patch.last.kept, strict=True)
        )


def test_identity_when_keep_exceeds_what_is_there(family: str) -> None:
    model = model_of(family)
    batch = FAMILIES[family].batch(MIXED)
    logits = model(**batch).logits
    with pruned(model, "random", keep=10_000):
        assert torch.equal(model(**batch).logits, logits)
