"""Time the project beside the models and the code that it replaces.

    python -m training.benchmark {train,loss,attention,scaling,decode,sample,serve,distributed,worlds}

Every figure is a ratio of medians that were taken side by side in one run. README.md in this folder explains how.
"""

import argparse
import json
import math
import platform
from collections.abc import Callable

import torch
import transformers

from modeling_mot.tower_routing import TOWER_PRODUCTS
from training.benchmark.attention import time_attention
from training.benchmark.decode import time_decode
from training.benchmark.distributed import time_distributed, time_worlds
from training.benchmark.loss import memory_of_loss, time_loss
from training.benchmark.peers import SIZES
from training.benchmark.rounds import print_ratios
from training.benchmark.sample import time_sample
from training.benchmark.scaling import time_scaling
from training.benchmark.serve import time_serve
from training.benchmark.soak import soak
from training.benchmark.train import memory_of_a_step, profile_steps, time_train
from training.world import keep_freed_memory


def _train(options) -> dict:
    size, dtype, towers = options.size, getattr(torch, options.dtype), options.towers
    batch = (options.rows, options.length, options.vocab)
    ways = (options.optimizer, options.compile, tuple(options.products))

    # The times, as tokens per second and as ratios.
    figures = time_train(size, dtype, towers, options.rounds, *batch, *ways)
    for name, value in figures["tokens_per_second"].items():
        print(f"{name:15} {value:10,.0f} tokens/s")
    print_ratios(figures)

    # On request, where the time goes, and the memory.
    if options.profile:
        figures["operators"] = profile_steps(size, dtype, towers, *batch)
        for name, milliseconds in figures["operators"].items():
            print(f"{name}: {sum(milliseconds.values()):.0f} ms, of these")
            for operator, value in list(milliseconds.items())[:12]:
                print(f"  {value:7.1f}  {operator}")
    if options.memory:
        figures["peak_bytes"] = memory_of_a_step(size, dtype, towers, *batch)
        mot, llama = figures["peak_bytes"]["mot"], figures["peak_bytes"]["llama"]
        print(f"memory of a step: mot {mot / 2**20:.0f} MiB, llama {llama / 2**20:.0f} MiB, {mot / llama:.3f}")
    return figures


def _groups(figures: dict) -> dict:
    """Print the figures of `compare` for several settings."""
    for setting, compared in figures.items():
        print(f"{setting}:", ", ".join(f"{name} {value:.4f} s" for name, value in compared["seconds"].items()))
        if "flops" in compared:
            print(f"  {compared['flops'] / 1e9:.1f} GFLOP, {compared['flops_per_second'] / 1e9:.0f} GFLOP/s")
        print_ratios(compared)
    return figures


def _loss(options) -> dict:
    hidden_size, dtype = SIZES[options.size]["hidden_size"], getattr(torch, options.dtype)
    figures = time_loss(hidden_size, dtype, options.tokens, options.vocabs, options.rounds)
    _groups(figures)
    for vocab_size in options.vocabs:
        peak = memory_of_loss(hidden_size, dtype, options.tokens, vocab_size)
        figures[f"vocabulary {vocab_size}"]["peak_bytes"] = peak
        print(f"vocabulary {vocab_size}:", ", ".join(f"{name} {value / 2**20:.0f} MiB" for name, value in peak.items()))
    return figures


def _attention(options) -> dict:
    dtype = getattr(torch, options.dtype)
    return _groups(time_attention(SIZES[options.size], dtype, options.lengths, options.rounds))


def _scaling(options) -> dict:
    return _groups(time_scaling(options.size, getattr(torch, options.dtype), options.towers, options.rounds))


def _sample(options) -> dict:
    figures = time_sample(SIZES[options.size], getattr(torch, options.dtype), options.steps, options.rounds)
    _groups({f"{steps} steps": of_steps for steps, of_steps in figures["steps"].items()})
    print("memory:", ", ".join(f"{name} {value / 2**20:.0f} MiB" for name, value in figures["peak_bytes"].items()))
    return figures


def _serve(options) -> dict:
    if options.soak is None:
        return _groups(time_serve(SIZES[options.size], getattr(torch, options.dtype), options.rounds))
    figures = soak(SIZES[options.size], 60 * options.soak)
    for kind, of_kind in figures.items():
        sent = ", ".join(f"{count} {fate}" for fate, count in sorted(of_kind["requests"].items()))
        memory = " then ".join(f"{value / 2**20:.0f}" for value in of_kind["rss_bytes"])
        print(f"{kind}: {sent} requests, all as they should be; memory {memory} MiB")
    return figures


def _decode(options) -> dict:
    figures = time_decode(SIZES[options.size], getattr(torch, options.dtype), options.towers, options.rounds)
    _groups({f"{batch} sequences": of_batch for batch, of_batch in figures["batches"].items()})
    return figures


def _distributed(options) -> dict:
    figures = time_distributed(options.ranks, options.rounds, options.steps, options.save_every)
    for name, value in figures["seconds"].items():
        print(f"{name:22} {value:.3f} s a step, {figures['data_share'][name]:.2%} of it waiting for rows")
    for name, value in figures["save_seconds"].items():
        share = value / (figures["save_every"] * figures["seconds"][name])
        print(f"{name:22} {value:.3f} s a save, {share:.1%} of the time at one in {figures['save_every']} steps")
    print_ratios(figures)
    return figures


def _worlds(options) -> dict:
    figures = time_worlds(options.worlds, options.variants, options.rounds, options.steps, options.rows)
    for step in figures["steps"]:
        print(
            f"{step['world']} processes, {step['variant']:8} {step['measured_seconds']:.3f} s a step measured, "
            f"{step['planned_seconds']:.3f} s planned, {step['received_bytes'] / 2**20:,.0f} MiB of messages"
        )
    for world, compared in figures["worlds"].items():
        print(f"{world} processes:")
        print_ratios(compared)
    return figures


def parser() -> argparse.ArgumentParser:
    """Build the command line: a sub-command for each benchmark, with the options that all share."""
    main_parser = argparse.ArgumentParser(
        prog="python -m training.benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = main_parser.add_subparsers(dest="command", required=True)
    _add_training(commands)
    _add_generation(commands)
    return main_parser


def _add(
    commands: argparse._SubParsersAction, name: str, run: Callable, rounds: int, text: str, sized: bool = True
) -> argparse.ArgumentParser:
    """Add a sub-command with the options that all share; `run` makes and prints its figures."""
    command = commands.add_parser(name, help=text)
    command.set_defaults(run=run)
    command.add_argument("--rounds", type=int, default=rounds, help=f"timed rounds (default: {rounds})")
    command.add_argument("--json", help="new file to write the figures to")
    command.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="(default: float32)")
    # The training command's own options, for all contestants alike.
    command.add_argument(
        "--keep-freed-memory",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="as train.keep_freed_memory (default: yes)",
    )
    command.add_argument(
        "--float32-matmul-precision",
        choices=("highest", "high", "medium"),
        default="highest",
        help="as train.float32_matmul_precision (default: highest)",
    )
    if sized:
        command.add_argument("--size", choices=SIZES, default="small", help="of the models (default: small)")
    return command


def _add_towers(command: argparse.ArgumentParser) -> None:
    command.add_argument("--towers", type=int, default=2, help="towers of the MoT (default: 2)")


def _add_training(commands: argparse._SubParsersAction) -> None:
    """Add the benchmarks of a training step, of its parts, and of several processes."""
    about = "forward and backward of one batch, against transformers' Llama and the paper's Algorithm 1"
    train = _add(commands, "train", _train, 20, about)
    _add_towers(train)
    train.add_argument("--rows", type=int, default=4, help="rows of the batch (default: 4)")
    train.add_argument("--length", type=int, default=512, help="tokens of a row (default: 512)")
    train.add_argument("--vocab", type=int, default=8192, help="entries of the vocabulary (default: 8192)")
    train.add_argument("--optimizer", action="store_true", help="time AdamW's update too")
    train.add_argument(
        "--compile", action="store_true", help="compile the layers of all contestants except the boolean masks"
    )
    train.add_argument(
        "--products",
        nargs="+",
        default=[],
        choices=TOWER_PRODUCTS[1:],
        help="also time MoTs with these products of towers",
    )
    train.add_argument("--profile", action="store_true", help="also show where the time of a step goes, by operator")
    train.add_argument("--memory", action="store_true", help="also measure the peak memory of a step")

    # Parts of a step, and how a step grows.
    loss = _add(commands, "loss", _loss, 10, "the last projection and the cross-entropy, against those with all logits")
    loss.add_argument("--tokens", type=int, default=2048, help="(default: 2048)")
    loss.add_argument("--vocabs", type=int, nargs="+", default=[8192, 32768, 65536], help="entries of the vocabulary")
    about = "attention alone over causal, packed and image rows, against torch's with a mask"
    attention = _add(commands, "attention", _attention, 10, about)
    attention.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048], help="tokens of a row")
    about = "a step as towers, row length, rows and imbalance grow, with its FLOPs"
    _add_towers(_add(commands, "scaling", _scaling, 8, about))

    # Several processes.
    about = "sharded processes against one, and the cost of saving"
    distributed = _add(commands, "distributed", _distributed, 3, about, sized=False)
    distributed.add_argument("--ranks", type=int, default=2, help="processes (default: 2)")
    distributed.add_argument("--steps", type=int, default=20, help="of each run (default: 20)")
    distributed.add_argument("--save-every", type=int, default=4, help="steps between saves (default: 4)")
    about = "dense and MoT in worlds of several sizes, against the planner's arithmetic"
    worlds = _add(commands, "worlds", _worlds, 2, about, sized=False)
    worlds.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4], help="processes (default: 1 2 4)")
    worlds.add_argument("--variants", nargs="+", default=["dense", "mot"], help="(default: dense mot)")
    worlds.add_argument("--steps", type=int, default=16, help="of each run (default: 16)")
    worlds.add_argument("--rows", type=int, default=10, help="of each process (default: 10)")


def _add_generation(commands: argparse._SubParsersAction) -> None:
    """Add the benchmarks of decoding, drawing and serving."""
    decode = _add(commands, "decode", _decode, 5, "greedy decoding, against transformers' Llama")
    _add_towers(decode)
    sample = _add(commands, "sample", _sample, 5, "a picture with guidance, against full recomputation")
    sample.add_argument("--steps", type=int, nargs="+", default=[25], help="denoising steps (default: 25)")
    serve = _add(
        commands, "serve", _serve, 3, "eight requests of text and pictures together, against one after another"
    )
    serve.add_argument(
        "--soak", type=float, metavar="MINUTES", help="instead: good, bad and cancelled requests from several threads"
    )


def main(arguments=None) -> None:
    # Options that argparse cannot check.
    options = parser().parse_args(arguments)
    if options.rounds < 2:
        parser().error("--rounds must be at least 2")
    for name in ("towers", "rows", "length", "tokens"):
        if getattr(options, name, 1) < 1:
            parser().error(f"--{name} must be at least 1")
    if getattr(options, "soak", None) is not None and not (0 < options.soak < math.inf):
        parser().error("--soak must be a number of minutes above 0")
    if options.command == "distributed" and (options.ranks < 2 or 20 % options.ranks or options.steps < 8):
        parser().error("--ranks must be at least 2 and divide the recipe's 20 rows, --steps be at least 8")
    if options.command == "worlds" and (len(options.worlds) < 2 or min(options.worlds) < 1 or options.steps < 8):
        parser().error("--worlds must be two at least, each of 1 process at least, --steps at least 8")

    # The machine is set up as the training command sets it up.
    if options.keep_freed_memory:
        keep_freed_memory()
    torch.set_float32_matmul_precision(options.float32_matmul_precision)

    # Figures mean little without the machine and the versions.
    figures = options.run(options)
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(machine, *versions.items())
    if options.json:
        asked = {name: value for name, value in vars(options).items() if name != "run"}
        with open(options.json, "x", encoding="utf-8") as file:
            json.dump({"figures": figures, "command": asked, "machine": machine, "versions": versions}, file, indent=2)


if __name__ == "__main__":
    main()
