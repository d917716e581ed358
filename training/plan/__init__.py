"""What a run will need, from its configuration alone: parameters, memory, messages, time. `python -m training.plan`."""
