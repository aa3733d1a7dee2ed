# SPDX-License-Identifier: Apache-2.0
"""Exceptions that vtprune raises on purpose."""


class VTPruneError(Exception):
    """Base of every error that vtprune raises on purpose."""


class UnsupportedModelError(VTPruneError, ValueError):
    """A part of the model that pruning needs is missing or cannot be used; the message names it."""


class BudgetError(VTPruneError, ValueError):
    """`ratio`, `keep` or `mean_ratio` is out of range, or cannot be met at the layers where the method cuts."""


class MethodError(VTPruneError, ValueError):
    """An unknown method, a bad option of a method, or a need of the method that the model cannot meet."""


class NothingPrunedError(VTPruneError, RuntimeError):
    """Visual tokens were present and fewer were asked for, but none was dropped."""


class InputError(VTPruneError, ValueError):
    """Something the user named cannot be used: a file, a folder, a model, a prompt."""


def one_line(error: BaseException, limit: int = 300) -> str:
    """What an exception says, on one line of at most `limit` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


class CertificateError(VTPruneError):
    """A certificate that cannot be made, read, or used with this model or method."""
