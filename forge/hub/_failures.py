"""Kinds of failure that are told apart within this package. Its callers see a DownloadError."""

from forge.errors import DownloadError


class Unreachable(DownloadError):
    """The Hub, or the network, does not work at the moment. Cached files are used instead."""


class Refused(DownloadError):
    """The Hub has no such repository, or does not show it. Cached files are used instead."""


class Absent(DownloadError):
    """The repository has no such revision or file."""


class NoRevision(Absent):
    """The repository has no such revision."""
