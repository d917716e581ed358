"""Estimate the parameters, memory, messages and time of a run from its configuration: `python -m training.plan`."""
