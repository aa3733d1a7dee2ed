# SPDX-License-Identifier: Apache-2.0
"""`patch`, `unpatch` and `Patch`: attaching a method to a model, and taking it off again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from .. import methods as registered_methods  # noqa: F401  # whoever can patch has the methods registered
from .. import towers
from ..core.budget import Budget, check_window, solve_mean
from ..core.certificate import Certificate
from ..core.energy import Auto
from ..core.method import Method, Stage
from ..core.registry import resolve
from ..errors import CertificateError, MethodError, UnsupportedModelError, VTPruneError
from ..methods import names as _names  # noqa: F401  registers the methods that come with the package
from ..models import anatomy as _anatomy
from ..models import attention_probe
from ..models.anatomy import Anatomy
from ..report.pruning import Pruning
from ..towers import TowerMethod
from . import requests
from .hooks import owner_of
from .session import Session
from .spec import PruneSpec

MethodLike = str | Method | type[Method]


class Patch:
    """A method at work on a model. Made by `patch`; comes off with `remove` or at the end of a `with` block.

    Attributes:
        model: As it was passed in.
        spec: What was asked for, and of which model.
    """

    def __init__(self, model: nn.Module, spec: PruneSpec, instead_of: Patch | None = None) -> None:
        self.model = model
        self.spec = spec
        self._session = Session(model, spec)
        # Only now, when nothing can be refused any more; and before anything is attached: what both replace on a module
        # could not come off in the wrong order.
        if instead_of is not None:
            instead_of.remove()
        self._certificates: list[Certificate] = []  # that are for this model and method
        self._depth = 0  # of nested `with` blocks
        self._attach()

    def _attach(self) -> None:
        attention_probe.install()
        self._handles = self._session.attach(self)

    @property
    def anatomy(self) -> Anatomy:
        """The parts of the model that were found."""
        return self.spec.anatomy

    @property
    def method(self) -> Method:
        """The method's instance; the one for pictures where there are two."""
        return self.spec.method

    @property
    def video_method(self) -> Method | None:
        """The method for clips, where another one prunes pictures."""
        return self.spec.uses[1].method if len(self.spec.uses) > 1 else None

    @property
    def tower(self) -> TowerMethod | None:
        """What cuts the vision tower, or None."""
        return self.spec.tower

    @property
    def budget(self) -> Budget:
        """What was asked for."""
        return self.spec.budget

    @property
    def schedule(self) -> tuple[Stage, ...]:
        """Where the method cuts this decoder."""
        return self.spec.schedule

    @property
    def mean_ratio(self) -> float:
        """Expected mean share over layer inputs for `ratio` and `mean_ratio` budgets."""
        return self.spec.mean_ratio

    @property
    def last(self) -> Pruning | None:
        """The most recent prefill: of the calling thread if it ran one, else of any. None before the first."""
        return self._session.last

    @contextmanager
    def paused(self) -> Iterator[Patch]:
        """Prefills of this request are not pruned inside; caches that were pruned before go on working.

        This and the blocks below hold for the calling thread or asyncio task, and for tasks and threads started inside.
        Worker threads of a pool are not among them: submit `contextvars.copy_context().run` to it.
        """
        with requests.asking(self._session, paused=True):
            yield self

    @contextmanager
    def using(
        self,
        ratio: float | Auto | Certificate | Literal["auto"] | None = None,
        *,
        keep: int | None = None,
        mean_ratio: float | None = None,
    ) -> Iterator[Patch]:
        """Gives prefills of this request a budget of their own inside, in place of the patch's.

        Args:
            ratio, keep, mean_ratio: As for `vtprune.patch`; exactly one. A certificate has to be for the patch's
                method.

        Raises:
            BudgetError: Not exactly one budget, or one that is out of range or cannot be met.
            CertificateError: The certificate is for another model or method.
        """
        if isinstance(ratio, Certificate):
            self._check(ratio)
            ratio = ratio.budget
        budget = Budget(ratio, keep, mean_ratio)
        if budget.mean_ratio is not None:
            for use in self.spec.uses:
                solve_mean(use.schedule, budget.mean_ratio, self.anatomy.num_layers)  # raises where it cannot be met
        with requests.asking(self._session, budget=budget):
            yield self

    def _check(self, certificate: Certificate) -> None:
        """Refuses a certificate of another model or method; one that has passed is not looked at again."""
        if certificate in self._certificates:
            return
        if len(self.spec.uses) > 1:
            raise CertificateError("the certificate is for one method; this patch has another one for clips beside it")
        certificate.check_method(self.method)
        certificate.check_model(self.model)
        self._certificates.append(certificate)

    @contextmanager
    def visual(self, columns: torch.Tensor) -> Iterator[Patch]:
        """Says which columns of a prompt are visual, where features came to the model by the caller's own hands.

        Args:
            columns: `[B, T]` for the call inside: a bool mask, or the prompt's token ids with placeholders.
        """
        with requests.asking(self._session, visual=columns):
            yield self

    @contextmanager
    def question(self, end: int | Sequence[int] | torch.Tensor) -> Iterator[Patch]:
        """Says where the prompt ends and an answer begins: what is kept does not depend on the answer.

        Where a call brings `labels`, the first labeled token after the last visual one begins the answer by itself.

        Args:
            end: Column of the call's `input_ids` at which the answer begins, one for all rows or one for each; negative
                numbers count from the end.
        """
        with requests.asking(self._session, question_end=end):
            yield self

    def remove(self) -> None:
        """Takes everything off the model. Calling it again does nothing."""
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        attention_probe.uninstall()

    @property
    def removed(self) -> bool:
        """Whether the patch is off the model."""
        return not self._handles

    def __enter__(self) -> Patch:
        if self.removed:
            other = find_patch(self.model)
            if other is not None:
                other.remove()
            self._attach()
        self._depth += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth <= 0:
            self.remove()

    def __repr__(self) -> str:
        cuts = ", ".join(map(str, sorted({stage.layer for use in self.spec.uses for stage in use.schedule})))
        state = "removed" if self.removed else f"cuts before layer {cuts} of {self.anatomy.num_layers}"
        tower = "" if self.tower is None else f", tower={self.tower}"
        return f"Patch({', '.join(str(use.method) for use in self.spec.uses)}, {self.budget}{tower}, {state})"

    def __deepcopy__(self, memo: dict) -> Any:
        raise VTPruneError("a patch cannot be copied; patch the other model instead")


def patch(
    model: nn.Module,
    ratio: float | Auto | Certificate | Literal["auto"] | None = None,
    *,
    keep: int | None = None,
    mean_ratio: float | None = None,
    method: MethodLike | Mapping[str, MethodLike] | None = None,
    video_method: MethodLike | None = None,
    window: int | None = None,
    tower: float | TowerMethod | type[TowerMethod] | None = None,
) -> Patch:
    """Prunes the visual tokens of every prompt that `model` sees from now on.

    Args:
        model: Any transformers vision-language model whose visual tokens are columns of the decoder's prompt.
        ratio: Share of the visual tokens to KEEP, in (0, 1]; `0.1` keeps a tenth, `1.0` all. `"auto"` or a
            `vtprune.Auto` chooses one for each picture, from how much of its tokens' energy few of them explain. A
            `vtprune.Certificate` brings the ratio that was certified for this model and its method.
        keep: A number of visual tokens per sample instead.
        mean_ratio: Mean share over the inputs of the decoder layers instead, so that methods that cut at different
            depths cost the same.
        method: Name, class or instance of the method; or one for each of "image" and "video". By default the
            certificate's, or `iwp`, or, on decoders whose layers it cannot read, `divprune`, which is logged once.
        video_method: Another method for clips, of models that take them as such; `method` prunes the pictures then.
        window: Visual tokens of a sample that a KV cache may hold between calls, for frames that are appended for as
            long as one likes: after each prefill the oldest frames leave the cache until it holds no more. Without a
            budget nothing else is pruned.
        tower: Cuts inside the vision tower as well: the share of the patches that go through its later blocks, or a
            method of `vtprune.towers`. Allowed alone: then no visual token is pruned.

    Returns:
        Patch: Also a context manager; it replaces an earlier patch of the same model.

    Raises:
        BudgetError: Not exactly one budget, or one that is out of range or cannot be met.
        CertificateError: The certificate is for another model or method.
        MethodError: No such method, or a need of it that the model cannot meet.
        UnsupportedModelError: A part of the model was not found.
    """
    certificate, ratio = (ratio, ratio.budget) if isinstance(ratio, Certificate) else (None, ratio)
    by_default = method is None and certificate is None
    if method is None:
        method = "iwp" if certificate is None else certificate.make_method()
    chosen, for_clips = _methods(method, video_method)
    if window is not None:
        check_window(window)
        ratio = 1.0 if (ratio, keep, mean_ratio) == (None, None, None) else ratio
    cut = None if tower is None else towers.resolve(tower)
    if cut is not None and (ratio, keep, mean_ratio) == (None, None, None):
        ratio = 1.0
    budget = Budget(ratio, keep, mean_ratio)
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"model is a {type(model).__name__}; expected a torch.nn.Module from transformers")
    if certificate is not None:
        if for_clips is not None:
            raise CertificateError("the certificate is for one method; found another one for clips beside it")
        certificate.check_method(chosen)
        certificate.check_model(model)
    spec = replace(PruneSpec.of(model, chosen, budget, for_clips, window, cut), by_default=by_default)
    return Patch(model, spec, instead_of=find_patch(model))


def _methods(
    method: MethodLike | Mapping[str, MethodLike], video_method: MethodLike | None
) -> tuple[Method, Method | None]:
    """The method, or the one for pictures, and the one for clips if that is another."""
    if not isinstance(method, Mapping):
        return resolve(method), None if video_method is None else resolve(video_method)
    if video_method is not None or set(method) != {"image", "video"}:
        raise MethodError(
            f"method is a mapping of {sorted(map(str, method))}{' beside video_method' if video_method else ''}; "
            "expected one method for 'image' and one for 'video', and no video_method"
        )
    return resolve(method["image"]), resolve(method["video"])


def find_patch(model: nn.Module) -> Patch | None:
    """The patch that a model carries, or None."""
    return owner_of(_anatomy.unwrap(model))


def unpatch(model: nn.Module) -> None:
    """Removes the patch of a model, if it has one."""
    found = find_patch(model)
    if found is not None:
        found.remove()


def inspect(model: nn.Module) -> Anatomy:
    """The parts of a model that pruning would use; printable."""
    return _anatomy.find(model)
