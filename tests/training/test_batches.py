"""Batches that are made one step ahead."""

import threading
import time

from training.data.stream import StepBatches


class Numbers:
    def row(self, number):
        return number


def test_who_stops_early_leaves_no_thread_inside_a_batch():
    """A thread that is inside of torch while the interpreter ends aborts the process."""
    begun = []

    def collate(rows, row_numbers):
        begun.append(list(row_numbers))
        time.sleep(0.3)
        return rows

    steps = StepBatches(Numbers(), collate, rows=2, accumulation=1).from_step(0, 100)
    assert next(steps) == [[0, 1]]
    while len(begun) < 2:
        time.sleep(0.01)
    steps.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "batches"]
    assert len(begun) < 5
