"""What is built on forge's own interfaces: functions for `SamplingParams`, and forge within other projects' tools.

Each of the latter needs the project that it is named after.
"""
