"""What a run will need, from its configuration alone: parameters, memory, messages, time. See `training.plan`."""
