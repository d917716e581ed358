"""The report of one or several runs, made from their folders alone: `python -m training.report`."""
