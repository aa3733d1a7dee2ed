# SPDX-License-Identifier: Apache-2.0
"""Law 4: a sample in a padded batch has the same kept set and logits as alone."""

import pytest
import torch
from families import FAMILIES, Image
from support import LAYOUTS, MIXED, model_of, pruned

from vtprune.methods import ResPrune


def check(family: str, method: object, padding: str) -> None:
    model, make = model_of(family), FAMILIES[family]
    batch = make.batch(MIXED, padding)
    with pruned(model, method, ratio=0.3) as (patch, _):
        together = model(**batch).logits
        last = patch.last
        for row, prompt in enumerate(MIXED):
            single = make.batch([prompt])
            real = batch["attention_mask"][row].bool()
            offset = int(real.nonzero()[0])
            alone = model(**single).logits[0]
            if any(isinstance(part, Image) for part in prompt):
                assert patch.last.kept[0].tolist() == (last.kept[row] - offset).tolist()
                assert patch.last.visual[0].tolist() == (last.visual[row] - offset).tolist()
            else:
                assert len(last.visual[row]) == 0
            scale = alone.abs().max()
            torch.testing.assert_close(together[row][real], alone, rtol=1e-4, atol=2e-5 * scale)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_methods(family: str, method: str, padding: str) -> None:
    check(family, method, padding)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_the_default_in_deep_decoders(name: str) -> None:
    check(name, ResPrune(layer=1), "left")


def test_layouts(family: str, layout: str) -> None:
    check(family, LAYOUTS[layout], "left")


def test_padding_is_not_carried_along(family: str) -> None:
    """A pruned batch has no more columns than its longest pruned row."""
    model = model_of(family)
    batch = FAMILIES[family].batch([[3, Image(0), 5], [9]])
    with pruned(model, "random", keep=2) as (patch, _):
        model(**batch)
        wrap = len(FAMILIES[family].image(0, torch.Generator()).wrap[0])
        assert patch.last.slots[-1] == max(1 + 3 + 2 * wrap + 2 + 5, 10)


EQUAL = [[3, Image(0), 4, Image(0), 5], [9], [2, Image(0), 7, Image(0), 3]]  # every picture shows the same


@pytest.mark.parametrize("keep", [5, 11])
def test_equal_pictures(family: str, method: str, keep: int) -> None:
    """Of two equal tokens the same one is kept in a batch and alone, although sums round differently."""
    model, make = model_of(family), FAMILIES[family]
    batch = make.batch(EQUAL, equal=True)
    with pruned(model, method, keep=keep) as (patch, _):
        model(**batch)
        last = patch.last
        for row in (0, 2):
            model(**make.batch([EQUAL[row]], equal=True))
            offset = int(batch["attention_mask"][row].nonzero()[0])
            assert patch.last.kept[0].tolist() == (last.kept[row] - offset).tolist()
