"""The HTTP server. It has two processes.

The process of `forge serve` speaks HTTP: it checks requests, turns text into ids, and writes answers. Its child loads
the model and runs the engine (`engine_process.py`). They exchange pickled messages over a socket pair, one for all that
a step brings. So neither a slow client nor Python's interpreter lock slows the engine down.
"""
