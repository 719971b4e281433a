"""Model files: bytes, read and validated."""
