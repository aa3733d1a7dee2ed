# SPDX-License-Identifier: Apache-2.0
"""Exceptions that vtprune raises on purpose."""


class VTPruneError(Exception):
    """Base of every error that vtprune raises on purpose."""


class UnsupportedModelError(VTPruneError, ValueError):
    """The model lacks a part that pruning needs, or has a structure that pruning cannot handle."""


class BudgetError(VTPruneError, ValueError):
    """`ratio`, `keep` or `mean_ratio` is out of range, or cannot be met at the layers where the method cuts."""


class MethodError(VTPruneError, ValueError):
    """The method is unknown, an option of it is invalid, or the model does not meet its requirements."""


class NothingPrunedError(VTPruneError, RuntimeError):
    """Visual tokens of a call cannot be found or cut, so that none would be dropped although fewer were asked for."""


class InputError(VTPruneError, ValueError):
    """A file, folder, model or prompt given by the user cannot be used."""


def one_line(error: BaseException, limit: int = 300) -> str:
    """Message of an exception on one line of at most `limit` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


class CertificateError(VTPruneError):
    """A certificate cannot be made, read, or used with this model or method."""
