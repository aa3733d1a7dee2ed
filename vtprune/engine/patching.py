# SPDX-License-Identifier: Apache-2.0
"""`patch`, `unpatch` and `Patch`: attaching a pruning method to a model, and removing it again."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from .. import towers
from ..core import default_method
from ..core.budget import Budget, check_window, solve_mean
from ..core.certificate import Certificate
from ..core.energy import Auto
from ..core.method import Method, Stage
from ..core.options import shorten
from ..core.registry import resolve
from ..errors import BudgetError, CertificateError, InputError, MethodError, VTPruneError
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
    """Handle of a patched model, returned by `patch`; `remove`, or the end of a `with` block, restores the model.

    The end of a block inside that of another patch of the same model restores that patch, whose block goes on.

    Attributes:
        model: The model that was passed in.
        spec: Methods, budget and parts of the model.
    """

    def __init__(self, model: nn.Module, spec: PruneSpec, replaces: Patch | None = None) -> None:
        self.model = model
        self.spec = spec
        self._session = Session(model, spec)
        self._handles: list[Any] = []
        self._certificates: list[Certificate] = []  # checked to be for this model
        # The patch of every open `with` block, the innermost last; patches that replace one another share the list.
        # Patches without a block are not in it: a program that patches in a loop would keep all of them.
        self._open: list[Patch] = []
        self._attach(replaces)

    def _attach(self, replaces: Patch | None = None) -> None:
        """Registers the hooks in place of those of another patch, which an error leaves in place.

        The other one's go first, because two patches that replace the same method must be removed in reverse order.
        """
        if replaces is not None:
            replaces._detach()
            self._open = replaces._open
        attention_probe.install()
        # Also where the model is dropped without `remove`.
        self._uninstall = weakref.finalize(self, attention_probe.uninstall)
        self._uninstall.atexit = False
        try:
            self._session.attach(self, self._handles)
        except BaseException:
            self._detach()
            if replaces is not None:
                replaces._attach()
            raise

    @property
    def anatomy(self) -> Anatomy:
        """The parts of the model."""
        return self.spec.anatomy

    @property
    def method(self) -> Method:
        """The method's instance; of two, the one for pictures."""
        return self.spec.method

    @property
    def video_method(self) -> Method | None:
        """The method for clips, or None if one method prunes both pictures and clips."""
        return self.spec.uses[1].method if len(self.spec.uses) > 1 else None

    @property
    def tower(self) -> TowerMethod | None:
        """The method that cuts the vision tower, or None."""
        return self.spec.tower

    @property
    def budget(self) -> Budget:
        """The budget."""
        return self.spec.budget

    @property
    def schedule(self) -> tuple[Stage, ...]:
        """Cuts of the method in this decoder."""
        return self.spec.schedule

    @property
    def mean_ratio(self) -> float:
        """Expected share of visual tokens, averaged over layer inputs, for `ratio` and `mean_ratio` budgets."""
        return self.spec.mean_ratio

    @property
    def last(self) -> Pruning | None:
        """Record of the most recent prefill: of this thread if it ran one, else of any. None before the first.

        Calls without visual tokens, and those inside `paused`, leave it as it was.
        """
        return self._session.state.last

    @contextmanager
    def paused(self) -> Iterator[Patch]:
        """Context in which prefills are not pruned; caches that were pruned before can still be used.

        Like `using`, `visual` and `question`, it applies to the calling thread or asyncio task, and to tasks and
        threads started inside, but not to worker threads of a pool: submit `contextvars.copy_context().run` to it.
        """
        with requests.override(self._session.state, paused=True):
            yield self

    @contextmanager
    def using(
        self,
        ratio: float | Auto | Certificate | Literal["auto"] | None = None,
        *,
        keep: int | None = None,
        mean_ratio: float | None = None,
        method: MethodLike | None = None,
        energy: float | None = None,
    ) -> Iterator[Patch]:
        """Context in which prefills have another budget or another method than those of the patch.

        Args:
            ratio, keep, mean_ratio: As for `vtprune.patch`; exactly one, or none where a method is given. A certificate
                has to be for the method that applies inside.
            method: Name, class or instance; one that records nothing while the model runs, or the patch's own.
            energy: As for `vtprune.patch`.

        Raises:
            BudgetError: There is not exactly one budget, or it is out of range or cannot be met.
            CertificateError: The certificate is for another model or method.
            MethodError: The method needs hooks that only `vtprune.patch` attaches, or the model cannot serve it.
        """
        ratio = _with_energy(ratio, energy)
        running = requests.current(self._session.state)
        spec = running.spec or self.spec
        chosen = spec.method if method is None else resolve(method)
        if isinstance(ratio, Certificate):
            self._check(ratio, chosen)
            ratio = ratio.budget
        changes: dict[str, Any] = {}
        if method is None or (ratio, keep, mean_ratio) != (None, None, None):
            changes["budget"] = Budget(ratio, keep, mean_ratio)
        budget = changes.get("budget", running.budget or self.budget)
        if method is not None:
            spec = changes["spec"] = self.spec.with_method(chosen, budget)
        if budget.mean_ratio is not None:
            for use in spec.uses:
                solve_mean(use.schedule, budget.mean_ratio, self.anatomy.num_layers)  # raises if it cannot be met
        with requests.override(self._session.state, **changes):
            yield self

    def _check(self, certificate: Certificate, method: Method) -> None:
        """Refuses a certificate of another model or method; the weights of one that has passed are not read again."""
        if len(self.spec.uses) > 1:
            raise CertificateError("the certificate is for one method, but this patch has another one for clips")
        _refuse_uncertified(self.spec.tower, self.spec.window)
        certificate.check_method(method)
        if certificate not in self._certificates:
            certificate.check_model(self.model)
            self._certificates.append(certificate)

    @contextmanager
    def visual(self, columns: torch.Tensor) -> Iterator[Patch]:
        """Context that tells which positions of `inputs_embeds` are visual, if the caller merged features into them.

        Args:
            columns: `[B, T]` for the call inside: a bool mask, or the prompt's token ids with placeholders. Calls with
                `input_ids` do not need it and ignore it.

        Raises:
            VTPruneError: By the call: its shape is another one, or `columns` are neither bools nor token ids.
        """
        with requests.override(self._session.state, visual=columns):
            yield self

    @contextmanager
    def question(self, end: int | Sequence[int] | torch.Tensor) -> Iterator[Patch]:
        """Context that tells where the prompt ends and an answer begins, so that the answer does not affect selection.

        Not needed for calls with `labels`: the answer begins at the first labeled token after the last visual one.

        Args:
            end: Position in the call's `input_ids` at which the answer begins, one for all rows or one for each;
                negative numbers count from the end.

        Raises:
            VTPruneError: By the call: the position is outside of it, or there is not one for each row.
        """
        with requests.override(self._session.state, question_end=end):
            yield self

    def remove(self) -> None:
        """Removes the patch from the model, after calls in progress in other threads. Calling it again does nothing.

        Raises:
            VTPruneError: It is called inside a call of the model.
        """
        self._detach()
        self._open[:] = [patch for patch in self._open if patch is not self]  # it is not restored any more

    def _detach(self) -> None:
        if self._handles:
            self._session.wait()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._session.detach()
        self._uninstall()

    @property
    def removed(self) -> bool:
        """Whether the patch was removed from the model."""
        return not self._handles

    def __enter__(self) -> Patch:
        if self.removed:
            self._attach(find_patch(self.model))
        self._open.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        if self not in self._open:  # removed inside the block
            return
        del self._open[-1 - self._open[::-1].index(self)]  # blocks may end in the order in which they began
        around = self._open[-1] if self._open else None
        if around is self:
            return
        self._detach()
        if around is not None and find_patch(self.model) is None:
            around._attach()

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
    energy: float | None = None,
) -> Patch:
    """Prunes the visual tokens of every prompt that `model` sees from now on.

    Args:
        model: Any transformers vision-language model whose visual tokens are part of the decoder's prompt. Pass
            the model with the head, not its `.model`. Of wrappers (PEFT, value heads) only what they pass on to the
            transformers model is seen, not a loss that they compute by themselves.
        ratio: Share of the visual tokens to keep, in (0, 1]; `0.1` keeps a tenth, `1.0` all. `"auto"` or a
            `vtprune.Auto` chooses one for each picture: as many tokens as explain the share `energy` of it. A
            `vtprune.Certificate` gives the ratio that was certified for this model and its method.
        keep: Number of visual tokens per sample to keep, instead of `ratio`.
        mean_ratio: Share of the visual tokens that is left, averaged over the inputs of the decoder layers, instead of
            `ratio`; methods that cut at different depths then cost the same.
        method: Name, class or instance of the method; or a mapping with one for each of "image" and "video". By default
            the certificate's, or `resprune`.
        video_method: Another method for clips, for models with video inputs; `method` then prunes pictures only.
        window: Largest number of visual tokens of a sample in a KV cache between calls, for streams of frames: after
            each prefill, the oldest frames beyond it are removed from the cache. Without a budget nothing else is
            pruned.
        tower: Also cuts inside the vision tower: the share of the patches that go through its later blocks, or a method
            of `vtprune.towers`. Without a budget no visual token is pruned.
        energy: With `ratio="auto"`, the share of a picture's energy that the kept tokens explain, as in `vtprune.Auto`.

    Returns:
        Patch: Also a context manager; it replaces an earlier patch of the same model, and the end of its block restores
            one whose block is still open.

    Raises:
        BudgetError: There is not exactly one budget, or it is out of range or cannot be met.
        CertificateError: The certificate is for another model or method.
        MethodError: The method is unknown, or the model does not meet a requirement of it.
        UnsupportedModelError: A part of the model was not found, or its structure is not supported.
    """
    ratio = _with_energy(ratio, energy)
    certificate, ratio = (ratio, ratio.budget) if isinstance(ratio, Certificate) else (None, ratio)
    if method is None:
        method = default_method.NAME if certificate is None else certificate.make_method()
    chosen, for_clips = _methods(method, video_method)
    if window is not None:
        check_window(window)
    cut = None if tower is None else towers.resolve(tower)
    if (window is not None or cut is not None) and (ratio, keep, mean_ratio) == (None, None, None):
        ratio = 1.0
    budget = Budget(ratio, keep, mean_ratio)
    replaces = find_patch(model)  # raises if this is no model
    if certificate is not None:
        if for_clips is not None:
            raise CertificateError("the certificate is for one method, but another one was given for clips")
        _refuse_uncertified(tower, window)
        certificate.check_method(chosen)
        certificate.check_model(model)
    spec = PruneSpec.of(model, chosen, budget, for_clips, window, cut)
    return Patch(model, spec, replaces)


def _with_energy(ratio: Any, energy: float | None) -> Any:
    """The automatic ratio with a share of energy to explain, or `ratio` as it is."""
    if energy is None:
        return ratio
    if not (isinstance(ratio, str) and ratio == "auto"):
        raise BudgetError(f"found energy={shorten(energy)} beside ratio={shorten(ratio)}; energy needs ratio='auto'")
    return Auto(energy)


def _refuse_uncertified(tower: object, window: object) -> None:
    """Refuses what a certificate was not measured with."""
    for name, value in (("tower", tower), ("window", window)):
        if value is not None:
            raise CertificateError(
                f"the certificate says nothing about {name}={shorten(value)}, which was not set while it was made; "
                f"leave {name} out, or give the ratio as a number"
            )


def _methods(
    method: MethodLike | Mapping[str, MethodLike], video_method: MethodLike | None
) -> tuple[Method, Method | None]:
    """The method, or the one for pictures; and the one for clips if it is another."""
    if not isinstance(method, Mapping):
        return resolve(method), None if video_method is None else resolve(video_method)
    if video_method is not None or set(method) != {"image", "video"}:
        raise MethodError(
            f"method is a mapping of {sorted(map(str, method))}{' beside video_method' if video_method else ''}; "
            "expected one method for 'image' and one for 'video', and no video_method"
        )
    return resolve(method["image"]), resolve(method["video"])


def find_patch(model: nn.Module) -> Patch | None:
    """The patch of a model, or None."""
    return owner_of(_anatomy.unwrap(model))


def refuse_patched(model: nn.Module, doing: str) -> None:
    """Raises `InputError` if a model is patched, which `doing` needs unpruned."""
    if find_patch(model) is not None:
        raise InputError(f"the model is patched; remove the patch before {doing}")


def unpatch(model: nn.Module) -> None:
    """Removes the patch of a model, if it has one.

    Raises:
        UnsupportedModelError: It is no model.
        VTPruneError: It is called inside a call of the model.
    """
    found = find_patch(model)
    if found is not None:
        found.remove()


def inspect(model: nn.Module) -> Anatomy:
    """Finds the parts of a model that pruning uses; print the result to see them.

    Args:
        model: As for `patch`; its weights may be on the meta device.

    Raises:
        UnsupportedModelError: A part is missing, or the structure is not supported; the message says what was expected.
    """
    return _anatomy.find(model)
