"""Soak a server: good, bad and cancelled requests from several threads; good ones must come out as they do alone."""

import random
import threading
import time
from collections import Counter

import psutil
import torch

from modeling_mot.serving_mot import CANCELLED, MoTServer
from training.benchmark.serve import BOI, BOS, VOCAB_SIZE, build


CLIENTS, AT_ONCE = 4, 4  # threads, and requests that each sends before it waits for them
SEEDS = 6  # different good requests of each kind
LIMITS = {"max_requests_per_batch": 6, "max_queue_size": 8, "max_batch_tokens": 1024}
LEAK = 32 * 2**20  # bytes by which memory may grow after the first half


class Streamer:
    """A streamer that fails after a few tokens."""

    def __init__(self, tokens: int):
        self.left = tokens

    def put(self, tokens: torch.Tensor) -> None:
        self.left -= 1
        if not self.left:
            raise ConnectionError("the reader is gone")

    def end(self) -> None:
        pass


def good(kind: str, seed: int) -> dict:
    """Make a good request. Each seed has a prompt of its own length, and every other seed draws a picture."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(6, VOCAB_SIZE // 2, (4 + 5 * seed,), generator=generator)
    ids[0], draws = BOS, seed % 2
    if draws:
        ids[-1] = BOI
    request = {"input_ids": ids, "do_sample": False, "pad_token_id": 0, "eos_token_id": []}
    request["max_new_tokens"] = 66 if draws else 9 + seed  # a picture takes 64 and EOI
    if kind == "diffusion":
        request |= {"generation_mode": "text", "generator": generator, "guidance_scale": 1.0 + draws}
        request["num_inference_steps"] = 3 + seed
    return request


def _fail(*args):
    raise KeyboardInterrupt("a callback")


# Changes that make a good request a bad one.
BAD = (
    lambda: {"input_ids": [VOCAB_SIZE]},
    lambda: {"input_ids": "text"},
    lambda: {"max_new_tokens": 10**12},
    lambda: {"negative_prompt_ids": [10**6], "guidance_scale": 2.0},
    lambda: {"image_grid": [float("nan"), 2]},
    lambda: {"colour": "red"},
    lambda: {"streamer": Streamer(3)},
    lambda: {"streamer": 5},
    lambda: {"logits_processor": [lambda ids, scores: scores * float("nan")], "generation_mode": "text"},
    lambda: {"stopping_criteria": [lambda ids, scores: _fail()]},
)
BAD_DRAWINGS = (
    *BAD,
    lambda: {"guidance_scale": float("nan")},
    lambda: {"callback_on_step_end": _fail},
    lambda: {"callback_on_step_end": lambda model, step, timestep, state: {"latents": state["latents"][:, :, 1:]}},
    lambda: {"callback_on_step_end": lambda *_: {"latents": torch.full((1, 4, 16, 16), float("nan"))}},
)


def is_same(kind: str, output, expected) -> bool:
    if kind == "codes":
        return torch.equal(output, expected)
    pairs = zip(output.latents[0], expected.latents[0], strict=True)
    near = all((latents - wanted).abs().max() < 1e-2 for latents, wanted in pairs)
    return near and torch.equal(output.sequences, expected.sequences)


class Client(threading.Thread):
    """A thread that sends requests of all sorts and checks the results."""

    def __init__(self, number: int, kind: str, server: MoTServer, expected: list, until: float):
        super().__init__(name=f"client {number}")
        self.random = random.Random(number)
        self.kind = kind
        self.server = server
        self.expected = expected
        self.until = until
        self.counts = Counter()
        self.wrong = []

    def run(self) -> None:
        try:
            while time.monotonic() < self.until:
                for name, fate, seed in [self.send() for _ in range(AT_ONCE)]:
                    if fate == "cancelled":
                        self.server.cancel_request(name)
                    self.look_at(fate, seed, self.server.get_result(name))
        except BaseException as error:
            self.wrong.append(f"the server raised {type(error).__name__}: {error}")

    def send(self) -> tuple[str, str, int]:
        """Send one request.  -> its name, how it should end, and its seed"""
        seed, fate = self.random.randrange(SEEDS), self.random.choice(["good", "good", "bad", "cancelled"])
        request = good(self.kind, seed)
        if fate == "bad":
            if self.kind == "diffusion":
                request["input_ids"][-1] = BOI
                request["max_new_tokens"] = 66
            request |= self.random.choice(BAD_DRAWINGS if self.kind == "diffusion" else BAD)()
        return self.server.add_request(request), fate, seed

    def look_at(self, fate: str, seed: int, result) -> None:
        self.counts[fate] += 1
        if fate == "bad":
            if result.error is None:
                self.wrong.append(f"a bad request was served: {result.generated_tokens}")
        elif result.error is None:
            if not is_same(self.kind, result.output, self.expected[seed]):
                self.wrong.append(f"request {seed} became something else than alone")
        elif fate == "good" or result.error != CANCELLED:
            self.wrong.append(f"request {seed}: {result.error}")


def soak(size: dict, seconds: float) -> dict:
    """Soak a server of image codes for half of the time, and a server of diffused images for the other half.

    Returns:
        dict: "codes" and "diffusion" -> how many requests of each sort were sent, and the memory of the process in
            bytes after the first half and at the end.

    Raises:
        SystemExit: a good request came out differently from alone, a bad request was served, or memory grew.
    """
    figures = {}
    for kind in ("codes", "diffusion"):
        # The right result of each good request is the one that it has alone.
        model = build(kind, size, torch.float32)
        requests = (good(kind, seed) for seed in range(SEEDS))
        expected = [model.generate(request.pop("input_ids")[None], **request) for request in requests]
        counts, start = Counter(), time.monotonic()
        wrong: list[str] = []
        memory: list[int] = []
        with MoTServer(model, **LIMITS) as server:
            # After each half all requests have ended, so that the two figures of memory can be compared.
            for half in (1, 2):
                until = start + seconds * half / 4
                clients = [Client(half * CLIENTS + n, kind, server, expected, until) for n in range(CLIENTS)]
                for client in clients:
                    client.start()
                for client in clients:
                    client.join()
                    counts += client.counts
                    wrong += client.wrong
                memory.append(psutil.Process().memory_info().rss)

        if wrong:
            raise SystemExit(f"of {sum(counts.values())} {kind} requests {len(wrong)} went wrong; first: {wrong[0]}")
        if memory[1] - memory[0] > LEAK:
            raise SystemExit(f"memory grew from {memory[0] >> 20} to {memory[1] >> 20} MiB in the second half")
        figures[kind] = {"requests": dict(counts), "rss_bytes": memory}
    return figures
