"""Inject the faults of long runs on purpose, and count what is lost: `python -m tests.faults`.

The trainer imports nothing from here; the faults are patched into it from outside.
"""
