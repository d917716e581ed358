"""Processes that are killed, told to end, stopped, or left behind."""

import random
import subprocess
import sys
import time

import psutil

from tests.faults.bench import CONFIG, TRAIN, Bench, Outcome, launcher_file, rows_by_step
from tests.faults.stages import SAVE_STAGES


def kills(bench: Bench) -> Outcome:
    """kill -9 of one worker and of the whole tree in turn, at every stage of a save and then at random moments."""
    chance, outcome, run = random.Random(0), Outcome(), bench.new("killed")
    newest, slowest = 0, 0.0
    for number in range(bench.times):
        # Every third run saves asynchronously; kills of one worker and of the tree take turns.
        words = [f"train.save_asynchronously={'true' if number % 3 == 1 else 'false'}"]
        do = ("kill", "kill tree")[number % 2]

        # First each stage of a save, then random moments.
        if number < len(SAVE_STAGES):
            stage = list(SAVE_STAGES)[number]
            rank = 0 if SAVE_STAGES[stage].main_only else chance.randrange(bench.ranks)
            ended = bench.launch(run, *words, faults=[{"do": do, "at": stage, "nth": 2, "rank": rank}])
            outcome.injected(ended)
            slowest = max(slowest, ended.seconds_after)
        else:
            _kill_at_random(bench, run, words, do, chance, outcome)
        newest = bench.check_checkpoints(run, outcome, newest)

    # The run that was killed so often must end like the one that never was.
    bench.finish(run, outcome)
    stages = min(bench.times, len(SAVE_STAGES))
    outcome.remarks = [
        f"{stages} at the stages of a save, {bench.times - stages} at random, a third saved asynchronously; the others "
        f"ended within {slowest:.0f} s"
    ]
    return outcome


def _kill_at_random(bench: Bench, run, words, do: str, chance: random.Random, outcome: Outcome) -> None:
    # Wait for the first new step, and up to a second longer.
    before = len(rows_by_step(run))
    process = bench.start(run, *words)
    while process.poll() is None and len(rows_by_step(run)) <= before:
        time.sleep(0.05)
    time.sleep(chance.uniform(0, 1.0))

    # Kill one worker, or the launcher and all workers.
    launcher = psutil.Process(process.pid)
    workers = [child for child in launcher.children(recursive=True) if "train.py" in " ".join(child.cmdline())]
    if len(workers) < bench.ranks:
        outcome.wrong.append("it had ended before it was killed")
    for victim in [launcher, *workers] if do == "kill tree" else [chance.choice(workers)]:
        victim.kill()
    bench.end(process)
    outcome.times += 1


def orphans(bench: Bench) -> Outcome:
    """kill -9 of the launcher alone: its workers go on, and nobody else may write to their folder."""
    # The workers must outlive their launcher.
    outcome, run = Outcome(), bench.new("orphaned")
    process = bench.start(run, faults=[{"do": "kill launcher", "at": "step", "nth": 3, "rank": 0}])
    workers = []
    while process.poll() is None:
        workers = psutil.Process(process.pid).children(recursive=True) or workers
        time.sleep(0.05)
    workers = [worker for worker in workers if worker.is_running()]
    outcome.expect(len(workers) >= bench.ranks, "the workers did not outlive their launcher")
    outcome.times = 1

    # A second trainer of the same folder is refused by name while they live, whichever way it is started.
    launch = ["-m", "accelerate.commands.launch", "--config_file", launcher_file(bench.ranks)]
    for options, name in (([], "one process"), (launch, "launched")):
        begin, first = time.perf_counter(), None
        second = subprocess.Popen(
            [sys.executable, *options, str(TRAIN), str(CONFIG), f"train.output_dir={run}", "train.resume=auto"],
            stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True,
        )  # fmt: skip
        for line in second.stderr:
            if "is being written by process" in line and first is None:
                first = time.perf_counter() - begin
                named = any(f"process {worker.pid} " in line for worker in workers)
                outcome.expect(named, f"the holder is not named: {line}")
        code = second.wait()
        outcome.expect(first is not None and code != 0, f"a second trainer ({name}) was let in: {code}")
        outcome.expect(first is None or first < 5, f"refused ({name}) after {first} s")
        outcome.remarks.append(
            f"{name}: refused after {first or 0:.1f} s, code {code} after {time.perf_counter() - begin:.1f} s"
        )
    outcome.expect(all(worker.is_running() for worker in workers), "the workers were disturbed")

    # Told to end, they save and leave; the folder can then be resumed.
    (process.notes / "go").touch()
    for worker in workers:
        worker.terminate()
    _, alive = psutil.wait_procs(workers, timeout=25)
    outcome.expect(not alive, "orphans did not end within 25 s of SIGTERM")
    bench.check_checkpoints(run, outcome, 3)
    bench.finish(run, outcome)
    return outcome


def signals(bench: Bench) -> Outcome:
    """SIGTERM and SIGINT, to the launcher and to all, in a step, an evaluation, a save and a wait for data."""
    outcome, run = Outcome(), bench.new("signalled")
    newest, slowest, codes = 0, 0.0, set()
    for number, (moment, name, who) in enumerate(
        (moment, name, who)
        for who in ("launcher", "all")
        for moment in ("step", "evaluation", "after the shards", "data")
        for name in ("SIGTERM", "SIGINT")
    ):
        nth = {"step": 3, "data": 4}.get(moment, 1)
        asynchronous = "true" if number % 4 > 1 else "false"
        words = ["evaluation.every=2", "train.save_every=3", f"train.save_asynchronously={asynchronous}"]
        ended = bench.launch(run, *words, faults=[{"do": f"{name} {who}", "at": moment, "nth": nth, "rank": 0}])
        what = f"{name} to {who} ({moment})"
        outcome.injected(ended)
        if ended.note is None:
            continue

        # The run has to save the step it was in, soon, and end with the signal's code on every rank.
        newest = bench.check_checkpoints(run, outcome, newest)
        step = ended.note["step"]
        outcome.expect(step <= newest <= step + 1, f"{what} after step {step}, checkpoint of step {newest}")
        outcome.expect(ended.seconds_after < 25, f"{what} took {ended.seconds_after:.0f} s")
        expected = {143} if name == "SIGTERM" else {130}
        outcome.expect(
            set(ended.codes.values()) == expected and len(ended.codes) == bench.ranks,
            f"{what}: ranks ended with {ended.codes}: {ended.printed[-800:]}",
        )
        slowest = max(slowest, ended.seconds_after)
        codes.add(f"{name} {sorted(set(ended.codes.values()))} (launcher {ended.code})")
    bench.finish(run, outcome)
    outcome.remarks = [f"ended, with a checkpoint, within {slowest:.1f} s; exit codes: {', '.join(sorted(codes))}"]
    return outcome


def stopped_rank(bench: Bench) -> Outcome:
    """SIGSTOP of a worker: the others notice within train.timeout_seconds, and --max_restarts goes on."""
    outcome, run = Outcome(), bench.new("stopped")
    fault = {"do": "stop", "at": "step", "nth": 4, "rank": bench.ranks - 1}
    options = ("--max_restarts", "1")
    ended = bench.launch(run, "train.timeout_seconds=10", faults=[fault], options=options)
    outcome.injected(ended)
    outcome.expect(ended.code == 0, f"the restarted run ended with {ended.code}: {ended.printed[-1500:]}")
    bench.compare(run, outcome)
    bench.check_checkpoints(run, outcome, bench.steps)
    outcome.remarks = [
        f"timeout of 10 s; {ended.seconds_after:.0f} s from the stop to the end of the run, 30 of which the launcher "
        "gives a stopped process to end"
    ]
    return outcome
