"""Nothing that waits for a server waits for ever, and nothing starts twice."""

import queue
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from modeling_mot.decoding_lean import LeanDecoder
from modeling_mot.serving_mot import MoTServer
from modeling_mot.serving_requests import RequestStatus

from .test_serving import Collect, alone
from .test_serving_attacks import Stream, assert_failed, assert_writes, failing


LONG = {"input_ids": [1, 9], "max_new_tokens": 100, "eos_token_id": []}


@pytest.fixture
def server(tiny_model):
    server = MoTServer(tiny_model(), max_requests_per_batch=1, max_queue_size=1, do_sample=False)
    yield server
    server.stop()


def within(seconds, function, *args):
    """What a function gives or raises; an error where it takes longer."""
    outcome = queue.Queue()

    def call():
        try:
            outcome.put((True, function(*args)))
        except Exception as error:
            outcome.put((False, error))

    threading.Thread(target=call, daemon=True).start()
    is_fine, value = outcome.get(timeout=seconds)
    if not is_fine:
        raise value
    return value


def slow_steps(monkeypatch, seconds=0.05):
    step = LeanDecoder.step
    monkeypatch.setattr(LeanDecoder, "step", lambda self, *args: time.sleep(seconds) or step(self, *args))


def test_a_full_queue_that_nobody_serves_is_no_reason_to_wait(server):
    server.add_request([1, 9], max_new_tokens=3)
    with pytest.raises(queue.Full, match="start\\(\\) it, or call step"):
        within(10, server.add_request, [1, 9])
    assert server.add_request([1, 99])  # a bad one needs no room


def test_results_that_nobody_makes_are_no_reason_to_wait(server):
    server.add_request([1, 9], "pending", max_new_tokens=3)
    for name in ("pending", None):
        with pytest.raises(RuntimeError, match="nobody runs the server"):
            within(10, server.get_result, name)
    assert server.get_result("pending", timeout=0.01) is None
    while server.step():
        pass
    assert server.get_result().request_id == "pending"


def test_unknown_names_and_results_that_were_taken_are_an_error(server):
    with server:
        server.add_request([1, 9], "once", max_new_tokens=3)
        assert within(20, server.get_result, "once").error is None
        for name in ("once", "never", ["a list"], 7):
            with pytest.raises((KeyError, TypeError)):
                within(10, server.get_result, name)


def test_of_two_who_wait_for_one_result_one_gets_it(server, monkeypatch):
    slow_steps(monkeypatch)
    with server:
        server.add_request([1, 9], "once", max_new_tokens=5)
        got = []

        def take():
            try:
                got.append(server.get_result("once").request_id)
            except KeyError:
                got.append(None)

        threads = [threading.Thread(target=take, daemon=True) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    assert sorted(got, key=str) == [None, "once"]


def test_a_server_that_was_stopped_lets_nothing_in_until_it_starts_again(server):
    with server:
        server.add_request([1, 9], "first", max_new_tokens=3)
    with pytest.raises(RuntimeError, match="was stopped"):
        within(10, server.add_request, [1, 9])
    with pytest.raises(RuntimeError, match="was stopped"):
        server.serve([[1, 9]])
    assert server.get_result("first").error is None and within(10, server.get_result) is None
    with server:
        name = server.add_request([1, 9], max_new_tokens=3)
        assert within(20, server.get_result, name).error is None


def test_whoever_waits_for_room_is_told_when_the_server_stops(server, monkeypatch):
    slow_steps(monkeypatch)
    server.start()
    server.add_request(LONG | {"max_new_tokens": 20}, "running")
    while server.desk.waiting:
        time.sleep(0.01)
    server.add_request([1, 9], "waiting", max_new_tokens=3)
    failed = []

    def add():
        try:
            server.add_request([1, 9], "outside")
        except RuntimeError as error:
            failed.append(str(error))

    thread = threading.Thread(target=add, daemon=True)
    thread.start()
    time.sleep(0.1)
    within(60, server.stop)
    thread.join(10)
    assert "was stopped" in failed[0]
    assert all(server.get_result(name).error is None for name in ("running", "waiting"))
    with pytest.raises(KeyError, match="outside"):
        server.get_result("outside")


def test_a_request_is_cancelled_while_it_waits_for_room(server, monkeypatch):
    slow_steps(monkeypatch)
    with server:
        server.add_request(LONG, "running")
        while server.desk.waiting:
            time.sleep(0.01)
        server.add_request(LONG, "waiting")
        thread = threading.Thread(target=server.add_request, args=(LONG, "outside"), daemon=True)
        thread.start()
        while "outside" not in server.desk.known:
            time.sleep(0.01)
        for name in ("outside", "waiting", "running"):
            server.cancel_request(name)
            result = within(20, server.get_result, name)
            assert result.error == "cancelled" and len(result.generated_tokens) < 100
        thread.join(10)
        assert not thread.is_alive() and not server.desk.cancelled


def test_an_error_beside_the_server_ends_what_runs(server, monkeypatch):
    slow_steps(monkeypatch)
    with pytest.raises(ZeroDivisionError), server:
        server.add_request(LONG, "running")
        raise ZeroDivisionError
    assert server.get_result("running").error == "cancelled"


def test_a_server_starts_once(server):
    with server:
        with pytest.raises(RuntimeError, match="runs already"):
            server.start()
        for run in (server.step, lambda: server.serve([[1, 9]])):
            with pytest.raises(RuntimeError, match="a thread runs the server"):
                run()
        assert sum(thread.name == "MoTServer" for thread in threading.enumerate()) == 1


def test_a_callback_that_calls_its_own_server_does_not_wait_for_itself(tiny_model):
    model, errors = tiny_model(), []
    server = MoTServer(model, max_requests_per_batch=1, max_queue_size=1, do_sample=False)
    is_full = threading.Event()

    def meddle():
        assert is_full.wait(30)
        for call in (
            lambda: server.get_result("waiting"),
            lambda: server.add_request([1, 9], "third"),
            server.step,
            server.start,
            lambda: server.serve([[1, 9]]),
        ):
            try:
                call()
            except Exception as error:
                errors.append(type(error))
        server.stop()

    with server:
        server.add_request([1, 9, 12], "meddler", max_new_tokens=9, streamer=Collect(then=meddle))
        server.add_request([1, 9, 12], "waiting", max_new_tokens=9)
        is_full.set()
        results = [within(30, server.get_result, name) for name in ("meddler", "waiting")]
    assert errors == [RuntimeError, queue.Full, RuntimeError, RuntimeError, RuntimeError]
    for result in results:
        assert_writes(result, alone(model, {"input_ids": [1, 9, 12], "max_new_tokens": 9}))


@pytest.mark.parametrize("timeout", [-1, float("nan"), float("inf"), "5", True])
def test_timeouts_are_numbers(server, timeout):
    for call in (lambda: server.add_request([1, 9], timeout=timeout), lambda: server.get_result(timeout=timeout)):
        with pytest.raises(ValueError, match="timeout"):
            call()


@pytest.mark.parametrize("name", [5, ["a"], b"a"])
def test_names_are_strings(server, name):
    with pytest.raises(ValueError, match="must be a string"):
        server.add_request([1, 9], name)


def test_serve_leaves_the_results_of_others_alone(tiny_model):
    server = MoTServer(tiny_model(), max_new_tokens=3, do_sample=False)
    server.add_request([1, 9], "mine")
    assert list(server.serve([[1, 9, 12]])) == ["req_0"]
    assert server.get_result("mine").status == RequestStatus.FINISHED


def test_nothing_is_let_in_between_a_failure_and_the_results_that_tell_of_it(tiny_model, monkeypatch):
    """A streamer that takes its time to end holds up the results of those behind it, and nobody else."""
    server, ending, go_on = MoTServer(tiny_model(), max_new_tokens=3), threading.Event(), threading.Event()
    server.add_request([1, 9], "slow", streamer=Stream(end=lambda: ending.set() or go_on.wait(30)))
    server.add_request([1, 9, 12], "behind")
    monkeypatch.setattr(server.rounds, "_share", failing(MemoryError("too much")))
    server.start()
    assert ending.wait(20)
    with pytest.raises(RuntimeError, match="too much"):
        within(10, server.add_request, [1, 9])
    assert server.get_result("behind", timeout=0.05) is None
    go_on.set()
    for name in ("slow", "behind"):
        assert_failed(within(10, server.get_result, name), "too much")


def test_after_a_failure_everything_says_so(tiny_model, monkeypatch):
    def fail(self, *args):
        raise MemoryError("too much")

    monkeypatch.setattr(LeanDecoder, "step", fail)
    server = MoTServer(tiny_model(), max_requests_per_batch=1, max_new_tokens=3)
    for number in range(3):
        server.add_request([1, 9], str(number))
    server.start()
    for number in range(3):
        assert_failed(within(20, server.get_result, str(number)), "too much")
    for call in (
        server.start,
        server.step,
        server.get_result,
        lambda: server.add_request([1]),
        lambda: server.serve([]),
    ):
        with pytest.raises(RuntimeError, match="too much"):
            within(10, call)
    within(10, server.stop)


SCRIPT = """
import atexit, threading, time
import torch
from modeling_mot import MoTConfig, MoTForCausalLM
from modeling_mot.serving_mot import MoTServer

torch.set_num_threads(1)
size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
config = MoTConfig.from_variant("dense", vocab_size=60, max_position_embeddings=10**6, **size)
server = MoTServer(MoTForCausalLM(config).eval(), eos_token_id=[], pad_token_id=0, max_new_tokens=900_000)
begun = threading.Event()
class Stream:
    put, end = staticmethod(lambda tokens: begun.set()), staticmethod(lambda: None)
atexit.register(time.sleep, 2)  # runs after the server's own end: whoever waits for a result wakes up meanwhile
server.start()
for _ in range(8):
    server.add_request([1, 9, 12], streamer=Stream())
threading.Thread(target=server.get_result, daemon=True).start()
assert begun.wait(60), server.desk.results
print(time.time(), flush=True)
"""


def test_an_interpreter_ends_cleanly_while_the_server_works():
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT], cwd=root, capture_output=True, text=True, timeout=300
    )
    took = time.time() - float(done.stdout or "nan")
    assert done.returncode == 0 and took < 15, done.stderr
    assert "Traceback" not in done.stderr and "terminate" not in done.stderr


def test_results_of_a_server_that_nobody_runs_are_not_waited_for(server):
    server.add_request([1, 9], max_new_tokens=2)
    with pytest.raises(RuntimeError, match="nobody runs the server"):
        within(20, next, iter(server))
    with server:
        assert len(within(20, list, server)) == 1
