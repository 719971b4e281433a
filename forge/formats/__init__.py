"""Model files: bytes to memory-mapped, validated views."""
