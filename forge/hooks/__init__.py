"""What `LLM.capture`, `patch` and `steer` do: hooks of sequences, what they keep, and for which calls they stand."""
