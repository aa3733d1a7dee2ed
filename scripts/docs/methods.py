# SPDX-License-Identifier: Apache-2.0
"""A page for every registered method: docstring, options, paper and measurements."""

from __future__ import annotations

import re

from scripts.docs import tables

# Groups of methods in page order, and when to use each.
ABOUT = {
    "Question-free": (
        "They keep what is salient or diverse in the picture, so that what is kept serves any question. Nearly all cut "
        "before the decoder: the dropped tokens cost the language model nothing. Begin here for the shortest time to "
        "the first token, for several questions about one picture, and in vLLM."
    ),
    "Question-aware": (
        "They keep what the prompt asks for. Most cut inside the decoder, where the question and the picture have met: "
        "at one ratio their answers are often better, and the layers before the cut still run on all tokens."
    ),
    "For video clips": "They compare frames. Pass one as `video_method=`, beside a method for pictures.",
    "Wrappers": "They correct the scores of another method, their host.",
    "Baselines": "A method that does not beat these is not worth its time.",
}
# What a method's `group` means to a reader.
BUDGETS = {
    "sample": "The pictures of a prompt share one budget",
    "image": "Each picture and each clip has its own budget",
}


def names() -> list[str]:
    """Methods registered by the library itself, without those of other packages or of the session."""
    from vtprune import methods

    return [name for name in methods.names() if methods.get(name).__module__.startswith("vtprune.")]


def summary(name: str) -> str:
    """The first sentence of the docstring."""
    return _words(name).split(". ")[0].rstrip(".")


def paper(name: str) -> str | None:
    """The arXiv id of the paper."""
    found = re.search(r"(?:arXiv[:\s]*|arxiv\.org/abs/)(\d{4}\.\d{4,5})", _words(name), re.I)
    return found[1] if found else None


def cuts(name: str) -> str:
    """The layers before which the method cuts a decoder of 32 layers."""
    from vtprune import methods

    return ", ".join(str(stage.layer) if stage.layer else "input" for stage in methods.get(name)().schedule(32))


def groups() -> dict[str, list[str]]:
    """Methods by group of `ABOUT`; every method is in one group."""
    from vtprune import methods
    from vtprune.core.clips import ClipMethod
    from vtprune.core.wrapper import Wrapper

    found: dict[str, list[str]] = {title: [] for title in ABOUT}
    for name in names():
        method = methods.get(name)()
        if isinstance(method, Wrapper):
            title = "Wrappers"
        elif isinstance(method, ClipMethod):
            title = "For video clips"
        elif paper(name) is None:
            title = "Baselines"
        elif method.question_aware:
            title = "Question-aware"
        else:
            title = "Question-free"
        found[title].append(name)
    return found


def page(name: str) -> str:
    """The page of one method; its docstring is rendered at `:::`."""
    from vtprune import methods

    cls = methods.get(name)
    number = paper(name)
    facts = f"* Cuts before layer (of 32): {cuts(name)}\n* {BUDGETS[cls().group]}\n"
    facts += f"* Paper: [arXiv {number}](https://arxiv.org/abs/{number})" if number else "* A control, without a paper"
    return f"""# `{name}`

{summary(name)}.

{facts}

{_for_clips(name) if cls.needs_frames else _for_pictures(name)}

## What it does

::: {cls.__module__}.{cls.__qualname__}
    options:
      heading_level: 3
      members: false
      show_root_full_path: false

## Measured

Simple scenes and a small model: a difference here is a hint, no promise for a large model.

{tables.of_method(name)}
"""


def _for_pictures(name: str) -> str:
    """Example code of a method for pictures."""
    return f"""```python
import vtprune

with vtprune.patch(model, ratio=0.1, method="{name}") as patch:
    model.generate(**inputs)
print(patch.last.report())
```"""


def _for_clips(name: str) -> str:
    """Example code of a method for clips, together with one for pictures."""
    return f"""```python
import vtprune

qwen, _ = vtprune.refvlm.load(name="qwen2_5_vl")
with vtprune.patch(qwen, ratio=0.5, method="iwp", video_method="{name}") as patch:
    print(patch)  # pictures by "iwp", clips by "{name}"
```"""


def _words(name: str) -> str:
    from vtprune import methods

    return " ".join((methods.get(name).__doc__ or "").split())
