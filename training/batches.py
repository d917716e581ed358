"""Which rows a rank takes in which step, made one step ahead."""

import queue
import threading
from collections.abc import Callable, Iterator


SECONDS_TO_END = 5.0  # of a batch that nobody waits for any more


class StepBatches:
    """This rank's micro-batches of every step; which rows they hold depends on nothing but the step.

    Step s takes rows [s * G, (s + 1) * G) of the stream, G = rows x accumulation x processes; any split of G into these
    three therefore sees the same rows in a step. A rank makes its own rows and no others. `collate(rows, row_numbers=...)`
    is given their numbers in the stream, so what it draws for a row (the noise of diffusion) is the same after a resume
    too.
    """

    def __init__(self, stream, collate: Callable, rows: int, accumulation: int, rank: int = 0, processes: int = 1):
        self.stream, self.collate = stream, collate
        self.rows, self.accumulation, self.rank, self.processes = rows, accumulation, rank, processes

    @property
    def rows_in_a_step(self) -> int:
        return self.rows * self.accumulation * self.processes

    def micro_batches(self, step: int) -> list[dict]:
        """The `accumulation` batches of one step."""
        batches = []
        for micro_batch in range(self.accumulation):
            first = step * self.rows_in_a_step + (micro_batch * self.processes + self.rank) * self.rows
            numbers = range(first, first + self.rows)
            batches.append(self.collate([self.stream.row(number) for number in numbers], row_numbers=numbers))
        return batches

    def from_step(
        self, step: int, steps: int, stopped: Callable[[], bool] = lambda: False
    ) -> Iterator[list[dict] | None]:
        """The batches of steps `step`, ..., `steps - 1`; the next step's are made while this one computes.

        Ends with None when `stopped` becomes true while the data are waited for: a source that has stalled must not
        keep a run from saving. An error in the data is raised here.
        """
        made: queue.Queue = queue.Queue(maxsize=1)
        abandoned = threading.Event()

        def hand_over(item) -> None:
            while not abandoned.is_set():
                try:
                    made.put(item, timeout=0.1)
                    return
                except queue.Full:
                    continue

        def work() -> None:
            for index in range(step, steps):
                if abandoned.is_set():
                    return
                try:
                    hand_over((self.micro_batches(index), None))
                except Exception as error:
                    hand_over((None, error))
                    return

        # A daemon: a process that ends does not wait for data that may never come.
        worker = threading.Thread(target=work, name="batches", daemon=True)
        worker.start()
        try:
            for _ in range(step, steps):
                while True:
                    try:
                        batches, error = made.get(timeout=0.1)
                        break
                    except queue.Empty:
                        if stopped():
                            yield None
                            return
                if error is not None:
                    raise error
                yield batches
        finally:
            abandoned.set()
            # An interpreter that ends while a thread is inside of torch aborts.
            worker.join(timeout=SECONDS_TO_END)
