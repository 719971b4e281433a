"""Imported by every Python that finds this directory on its path: puts the virtual GPU into the machine."""

import virtual_rocm.attach  # noqa: F401
