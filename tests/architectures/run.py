# SPDX-License-Identifier: Apache-2.0
"""Builds and checks one architecture and returns its entry of the table."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import sys
import time
from typing import Any

import torch

import vtprune
from tests.architectures import build, checks, prompts, towers
from vtprune import methods
from vtprune.core import default_method

MEMORY = 16 << 30


def registered() -> dict[str, str]:
    """Model type to class name of every image-text-to-text architecture of the installed transformers."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as names

    return {kind: name if isinstance(name, str) else name[0] for kind, name in names.items()}


def short(error: BaseException, limit: int = 240) -> str:
    """An error in one line."""
    text = re.sub(r"\s+", " ", str(error)).strip() or type(error).__name__
    text = re.sub(r"/\S*/(site-packages|tests|vtprune)/", "", text)
    return text if len(text) <= limit else text[: limit - 3] + "..."


class NotRun(Exception):
    """An architecture that cannot be checked; the argument is its entry."""


def prepare(architecture: str, class_name: str) -> tuple[build.Built, prompts.Prompts]:
    """A small model of an architecture, and prompts for it.

    Raises:
        NotRun: With `status` "refused" and the library's message, or "not built" or "not fed" and the model's error.
    """
    failure = ("not built", "")
    stock_tower = False
    for attempt in (0, *range(build.ATTEMPTS)):
        try:
            built = build.build(architecture, class_name, attempt, stock_tower)
        except ImportError as error:
            # The next attempt replaces the tower that needs another package.
            failure = failure if failure[1] else ("not built", short(error))
            stock_tower = True
            continue
        except Exception as error:  # whatever a constructor may raise
            failure = failure if failure[1] else ("not built", short(error))
            continue
        try:
            parts = vtprune.inspect(built.model)
        except vtprune.VTPruneError as error:
            raise NotRun({"status": "refused", "reason": short(error, 400), "notes": built.notes}) from error
        try:
            return built, prompts.prompts_for(built.model, parts.placeholders)
        except RuntimeError as error:
            failure = failure if failure[0] == "not fed" else ("not fed", short(error))
    raise NotRun({"status": failure[0], "reason": failure[1]})


def examine(architecture: str, class_name: str, only_tower: bool = False) -> dict[str, Any]:
    """Builds, feeds and checks an architecture.

    Args:
        architecture, class_name: As transformers registers them.
        only_tower: Check only cuts inside the vision tower.

    Returns:
        dict: `status` is "passes", "refused" (with the library's message), "not built" or "not fed" (with the model's
        error) or "fails" (with the failed check). "default method" is the outcome of a plain call with it.
    """
    entry: dict[str, Any] = {"architecture": architecture, "class": class_name}
    try:
        built, fed = prepare(architecture, class_name)
    except NotRun as reason:
        return entry | reason.args[0]
    entry["notes"] = built.notes
    entry["input"] = fed.feed.name
    entry["tower"] = _tower(built.model, fed)
    if only_tower:
        return entry
    subject = checks.Subject(built.model, fed)
    parts = subject.parts
    entry["decoder"] = "hybrid" if subject.hybrid else "attention"
    entry["checks"] = {}
    for method in (methods.resolve("random"), _inside(subject)):
        if method is None:
            entry["notes"] = [*entry["notes"], "no layer before which a method inside the decoder could cut"]
            continue
        layer = method.schedule(parts.num_layers)[0].layer
        entry["checks"][f"{method.name} before layer {layer}"] = _all(subject, method)
    if fed.feed.kind == "image" and "video" in parts.placeholders:
        entry |= _clips(subject, method or methods.resolve("random"), entry["checks"])
    entry["default method"] = _all(subject, methods.resolve(default_method.NAME), {"budget": checks.budget})["budget"]
    first = next(iter(entry["checks"].values()))
    outcomes = [text for row in entry["checks"].values() for text in row.values()] + [entry["default method"]]
    for status, texts in (("fails", outcomes), ("refused", first.values())):
        found = next((text for text in texts if text.startswith(status)), None)
        if found is not None:
            return entry | {"status": status, "reason": found.removeprefix("refused: ").removeprefix("fails: ")}
    return entry | {"status": "passes", "reason": ""}


def _tower(model: torch.nn.Module, fed: prompts.Prompts) -> str:
    """Result of the checks of cuts inside the vision tower."""
    try:
        return towers.examine(model, fed)
    except towers.Failed as error:
        return f"fails: {short(error)}"
    except Exception as error:  # a crash of the model or of the engine
        return f"fails: {type(error).__name__}: {short(error)}"
    finally:
        vtprune.unpatch(model)


def _inside(subject: checks.Subject) -> Any:
    """FastV before the first layer (from the third on) that follows an attention layer; None if there is none."""
    count = subject.parts.num_layers
    for layer in (2, 1, *range(3, count)):
        method = methods.FastV(layer=layer)
        try:
            with vtprune.patch(subject.model, ratio=checks.RATIO, method=method):
                pruned = subject.logits(subject.one)[0, -1]
            if not torch.equal(pruned, subject.plain[0, -1]):  # some layer after the cut attends to other columns
                return method
        except vtprune.MethodError:
            continue
        except Exception:  # the checks report the error
            return method
    return None


def _clips(subject: checks.Subject, method: Any, rows: dict[str, dict[str, str]]) -> dict[str, Any]:
    """Checks of clips, added to `rows`.

    Returns:
        dict: "video": input format of the clips, or the reason why they were not fed.
    """
    try:
        fed = prompts.prompts_for(subject.model, subject.parts.placeholders, "video")
    except RuntimeError as error:
        return {"video": f"not fed: {short(error, 120)}"}
    layer = method.schedule(subject.parts.num_layers)[0].layer
    clips = checks.Subject(subject.model, fed)
    rows[f"{method.name} before layer {layer}, video"] = _all(clips, method, checks.CLIP_CHECKS)
    return {"video": fed.feed.name}


def _all(subject: checks.Subject, method: Any, chosen: dict[str, Any] = checks.CHECKS) -> dict[str, str]:
    row = {}
    for name, check in chosen.items():
        try:
            check(subject, method)
            row[name] = "ok"
        except checks.OwnLimit as limit:
            row[name] = f"not applicable: {limit}"
        except checks.Failed as error:
            row[name] = f"fails: {error}"
        except vtprune.VTPruneError as error:
            row[name] = f"refused: {short(error)}"
        except Exception as error:  # a crash of the model or of the engine
            row[name] = f"fails: {name}: {type(error).__name__}: {short(error)}"
        finally:
            vtprune.unpatch(subject.model)
    return row


def isolated(architecture: str, limit: int, only_tower: bool = False) -> dict[str, Any]:
    """Runs `examine` in a forked process, which an interrupt ends."""
    class_name = registered()[architecture]
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # a progress bar may have replaced them
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(limit)
        try:
            entry = examine(architecture, class_name, only_tower)
        except BaseException as error:
            entry = {"architecture": architecture, "class": class_name, "status": "fails", "reason": short(error)}
        entry["seconds"] = round(time.process_time(), 1)
        with os.fdopen(write, "w") as out:
            json.dump(entry, out)
        os._exit(0)
    os.close(write)
    try:
        with os.fdopen(read) as source:
            text = source.read()
    except KeyboardInterrupt:
        os.kill(child, signal.SIGKILL)
        raise
    finally:
        status = os.waitpid(child, 0)[1]
    if text:
        return json.loads(text)
    what = (
        f"took more than {limit} s"
        if os.WTERMSIG(status) == signal.SIGALRM
        else f"ended with signal {os.WTERMSIG(status)}"
    )
    return {"architecture": architecture, "class": class_name, "status": "fails", "reason": what}
