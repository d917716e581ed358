"""What goes wrong in a long run, done on purpose: `python -m tests.faults` injects each fault and counts what is lost.

Nothing here is imported by the trainer; faults are patched into it from outside.
"""
