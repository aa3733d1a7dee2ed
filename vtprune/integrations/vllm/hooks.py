# SPDX-License-Identifier: Apache-2.0
"""Where vLLM is entered: a few functions are wrapped, and pass straight through until `"vtprune"` is configured.

* `VllmConfig.__post_init__` reads the configuration, in the process that makes it, and leaves it with the model's
  config, which travels to all others.
* `MultiModalRegistry.create_processor` gives processors of such a model the short prompts.
* `_ModelRegistry.resolve_model_cls` sees every model class before it is made; an instance for such a model gets an
  `embed_multimodal` that prunes.
* `BaseModelLoader.load_model` returns the loaded model, which is refused if it should prune and does not.
* On CPUs `CPUModelRunner.load_model`, for models with M-RoPE.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

from ...errors import one_line
from . import prompts, support
from .serving import Pruner
from .settings import KEY, ServingError, Settings, parse, portable, refuse_elsewhere

_ATTRIBUTE = "_vtprune_config"  # of a ModelConfig: what stands under "vtprune"
_MARK = "_vtprune_wraps"  # of a wrapper: the function it stands for


def install() -> None:
    """Wraps the functions named in the module's docstring; a second call does nothing.

    If this vLLM lacks one of them, `"vtprune"` is refused, and models without it are served as usual.
    """
    import vllm
    from vllm.config import VllmConfig

    try:
        for place in _places():
            _wrap(*place)
    except (ImportError, AttributeError) as error:
        reason = f"vLLM {getattr(vllm, '__version__', '')} lacks a function that the plug-in wraps ({one_line(error)})"
        _wrap(VllmConfig, "__post_init__", functools.partial(_refuse_config, reason))
    else:
        _wrap(VllmConfig, "__post_init__", _after_config)


def _places() -> list[tuple[type, str, Callable[..., Any]]]:
    """Class, function and wrapper of everything that is wrapped besides the configuration.

    Raises:
        ImportError, AttributeError: This vLLM lacks one of them.
    """
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader
    from vllm.model_executor.models.registry import _ModelRegistry
    from vllm.multimodal.registry import MultiModalRegistry
    from vllm.platforms import current_platform

    places: list[tuple[type, str, Callable[..., Any]]] = [
        (MultiModalRegistry, "create_processor", _after_processor),
        (_ModelRegistry, "resolve_model_cls", _after_class),
        (BaseModelLoader, "load_model", _after_weights),
    ]
    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_model_runner import CPUModelRunner

        places.append((CPUModelRunner, "load_model", _after_load))
    return places


def _refuse_config(reason: str, result: Any, config: Any) -> Any:
    """Refuses `"vtprune"` in a vLLM that the plug-in cannot prune in."""
    extra = getattr(config, "additional_config", None)
    if isinstance(extra, dict) and KEY in extra:
        _end_in_one_line()
        raise ServingError(f"vtprune: {reason}; expected vLLM 0.32; install that, or leave 'vtprune' out")
    return result


def _wrap(cls: type, name: str, after: Callable[..., Any]) -> None:
    """Replaces a method by one that returns `after(result, *args, **kwargs)`; a wrapped one is left alone."""
    original = getattr(cls, name)
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return after(original(*args, **kwargs), *args, **kwargs)

    setattr(wrapper, _MARK, original)
    setattr(cls, name, wrapper)


def _end_in_one_line() -> None:
    """Makes an uncaught `ServingError` print its message only; other errors keep their tracebacks."""
    original = sys.excepthook
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def hook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if isinstance(error, ServingError):
            sys.stderr.write(f"{error}\n")
        else:
            original(kind, error, trace)

    setattr(hook, _MARK, original)
    sys.excepthook = hook


def settings_of(model_config: Any) -> Settings | None:
    """What a model's config says, parsed; None for models that are served unpruned."""
    config = getattr(model_config, _ATTRIBUTE, None)
    return None if config is None else parse(config)


def _after_config(result: Any, config: Any) -> Any:
    extra = config.additional_config
    model, drafts = config.model_config, config.speculative_config
    if drafts is not None and model is drafts.draft_model_config and model is not drafts.target_model_config:
        return result  # a draft model has a configuration of its own beside that of the model that is pruned
    if isinstance(extra, dict) and extra and model is not None:
        _end_in_one_line()
        if KEY not in extra:
            refuse_elsewhere(extra)
            return result
        support.check_config(config, parse(extra[KEY]))
        object.__setattr__(model, _ATTRIBUTE, portable(extra[KEY]))
    return result


def _after_processor(processor: Any, registry: Any, model_config: Any, **kwargs: Any) -> Any:
    settings = settings_of(model_config)
    if settings is not None:
        support.check_model(registry._get_model_cls(model_config), model_config, settings)
        prompts.prune_processor(processor, settings, model_config.uses_mrope)
    return processor


def _after_load(result: Any, runner: Any, *args: Any, **kwargs: Any) -> Any:
    """Turns on the interface for pruned media, which vLLM's runner for CPUs, unlike that for GPUs, never looks for."""
    if settings_of(runner.model_config) is not None and runner.uses_mrope:
        runner.is_multimodal_pruning_enabled = True
    return result


def _after_weights(model: Any, loader: Any, vllm_config: Any, model_config: Any, *args: Any, **kwargs: Any) -> Any:
    """Refuses a model whose prompts are short and whose features would not be chosen."""
    prunes = isinstance(model.__dict__.get("vtprune"), Pruner)
    if settings_of(model_config) is not None and getattr(model, "supports_multimodal", False) and not prunes:
        raise ServingError(
            f"vtprune: {type(model).__name__} was made in a way that the plug-in does not see, and its features would "
            "not be pruned; expected a class that vLLM's registry resolves; leave 'vtprune' out"
        )
    return model


def _after_class(found: Any, registry: Any, architectures: Any, model_config: Any) -> Any:
    if getattr(found[0], "supports_multimodal", False):  # vLLM remembers classes from before a config is complete
        _wrap_init(found[0])
    return found


def _wrap_init(cls: type) -> None:
    """Instances made for a pruned model prune; the class stays what it is for all others.

    vLLM makes pooling models of subclasses of the class that it resolves, so the first wrapped class of an instance
    gives it its pruner.
    """
    if hasattr(cls.__dict__.get("__init__"), _MARK):
        return
    original: Any = cls.__init__  # type: ignore[misc]  # may be that of a wrapped base, which leaves other classes alone

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        config = inspect.signature(original).bind(self, *args, **kwargs).arguments.get("vllm_config")
        settings = settings_of(getattr(config, "model_config", None))
        outermost = next(c for c in type(self).__mro__ if hasattr(c.__dict__.get("__init__"), _MARK))
        if settings is not None and outermost is cls and not isinstance(self.__dict__.get("vtprune"), Pruner):
            Pruner.attach(self, config, settings)

    setattr(init, _MARK, original)
    cls.__init__ = init  # type: ignore[misc]
