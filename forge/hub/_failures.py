"""Kinds of failure that this package tells apart: what leaves it is a DownloadError."""

from forge.errors import DownloadError


class Unreachable(DownloadError):
    """The Hub, or the way to it, does not work at the moment: what lies in the cache serves."""


class Refused(DownloadError):
    """The Hub knows no such repository, or does not show it: what lies in the cache serves."""


class Absent(DownloadError):
    """The repository has no such revision or file."""


class NoRevision(Absent):
    """The repository has no such revision."""
