"""`python -m training.benchmark {train,sample,distributed}`: a MoT's training step beside transformers' Llama of equal
active size, drawing by diffusion beside loops that compute whole rows anew, and sharded processes beside one."""

import argparse
import json
import platform
import statistics
import time

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_mot import MoTConfig, MoTForCausalLM
from training.benchmark.distributed import time_distributed
from training.benchmark.sample import time_sample
from training.devices import keep_freed_memory


SIZES = {
    "small": dict(hidden_size=256, num_hidden_layers=4, num_attention_heads=8, intermediate_size=768),
    "mid": dict(hidden_size=512, num_hidden_layers=8, num_attention_heads=8, intermediate_size=1536),
}
VOCAB_SIZE, ROWS, ROW_LENGTH = 8192, 4, 512


def contestants(size: str, towers: int, dtype: torch.dtype) -> dict[str, torch.nn.Module]:
    """Llama, a MoT of so many towers and one of one tower, all with the Llama's weights."""
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB_SIZE, rms_norm_eps=1e-5, **SIZES[size]))
    modalities = ["text", *(f"modality_{index}" for index in range(1, towers))]
    models = {"llama": llama}
    for name, variant in (("mot", "mot"), ("dense", "dense")):
        config = MoTConfig.from_variant(variant, modalities=modalities, vocab_size=VOCAB_SIZE, **SIZES[size])
        model = MoTForCausalLM(config)
        source = llama.state_dict()
        model.load_state_dict({key: source[_llama_key(key, config.part_names("norm"))] for key in model.state_dict()})
        models[name] = model
    return {name: model.to(dtype).train() for name, model in models.items()}


def _llama_key(key: str, towers: list[str]) -> str:
    return ".".join(part for part in key.split(".") if part not in towers)


def check_equal(models, batch):
    """The same logits from all, in float32 to 1e-4; in bfloat16 to what its rounding leaves."""
    with torch.no_grad():
        logits = {name: run(model, name, batch).logits.float() for name, model in models.items()}
    tolerance = 1e-4 if next(models["llama"].parameters()).dtype == torch.float32 else 5e-2
    for name in models:
        difference = (logits[name] - logits["llama"]).abs().max().item()
        if difference > tolerance:
            raise SystemExit(f"{name} differs from llama by {difference:.2e}: nothing was timed")


def run(model, name, batch):
    extra = {} if name == "llama" else {"modality_ids": batch["modality_ids"]}
    return model(input_ids=batch["input_ids"], labels=batch["input_ids"], use_cache=False, **extra)


def time_train(size: str, dtype: torch.dtype, towers: int, rounds: int) -> dict:
    """Seconds of each contestant's forward and backward, and their ratios.

    Returns:
        dict: `seconds` (median by contestant), `tokens_per_second`, and `ratios`: "a/b" -> [lower quartile, median,
        upper quartile] of the round-by-round ratio; `ratio_of_medians`.
    """
    models = contestants(size, towers, dtype)
    generator = torch.Generator().manual_seed(1)
    batch = {
        "input_ids": torch.randint(0, VOCAB_SIZE, (ROWS, ROW_LENGTH), generator=generator),
        "modality_ids": torch.randint(0, towers, (ROWS, ROW_LENGTH), generator=generator),
    }
    check_equal(models, batch)
    seconds = {name: [] for name in models}
    for turn in range(rounds + 2):
        for name, model in models.items():
            model.zero_grad(set_to_none=False)
            begin = time.perf_counter()
            run(model, name, batch).loss.backward()
            if turn >= 2:  # the first two rounds warm up
                seconds[name].append(time.perf_counter() - begin)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    pairs = (("mot", "llama"), ("dense", "llama"), ("mot", "dense"))
    return {
        "seconds": medians,
        "tokens_per_second": {name: ROWS * ROW_LENGTH / value for name, value in medians.items()},
        "ratio_of_medians": {f"{a}/{b}": medians[a] / medians[b] for a, b in pairs},
        "ratio_quartiles": {
            f"{a}/{b}": statistics.quantiles([x / y for x, y in zip(seconds[a], seconds[b], strict=True)], n=4)
            for a, b in pairs
        },
    }


def _print_train(figures: dict) -> None:
    for name, value in figures["tokens_per_second"].items():
        print(f"{name:6} {value:10,.0f} tokens/s")
    _print_ratios(figures)


def _print_sample(figures: dict) -> None:
    for steps, of_steps in figures["steps"].items():
        print(f"{steps} steps:", ", ".join(f"{name} {value:.2f} s" for name, value in of_steps["seconds"].items()))
        _print_ratios(of_steps)
    print("memory:", ", ".join(f"{name} {value / 2**20:.0f} MiB" for name, value in figures["peak_bytes"].items()))


def _print_distributed(figures: dict) -> None:
    for name, value in figures["seconds"].items():
        print(f"{name:22} {value:.3f} s a step, {figures['data_share'][name]:.2%} of it waiting for rows")
    for name, value in figures["save_seconds"].items():
        share = value / (figures["save_every"] * figures["seconds"][name])
        print(f"{name:22} {value:.3f} s a save, {share:.1%} of the time at one in {figures['save_every']} steps")
    _print_ratios(figures)


def _print_ratios(figures: dict) -> None:
    for pair, value in figures["ratio_of_medians"].items():
        low, _, high = figures["ratio_quartiles"][pair]
        print(f"{pair:36} {value:.3f} of the time (quartiles {low:.3f} to {high:.3f})")


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m training.benchmark", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="forward and backward of one batch, against transformers' Llama")
    train.add_argument("--towers", type=int, default=2, help="towers of the MoT (default: 2)")
    sample = commands.add_parser("sample", help="a picture with guidance, against full recomputation")
    sample.add_argument("--steps", type=int, nargs="+", default=[25], help="denoising steps (default: 25)")
    distributed = commands.add_parser("distributed", help="sharded processes against one, and the cost of saving")
    distributed.add_argument("--ranks", type=int, default=2, help="processes (default: 2)")
    distributed.add_argument("--steps", type=int, default=20, help="of each run (default: 20)")
    distributed.add_argument("--save-every", type=int, default=4, help="steps between saves (default: 4)")
    for command, rounds in ((train, 20), (sample, 5), (distributed, 3)):
        if command is not distributed:
            command.add_argument("--size", choices=SIZES, default="small", help="of the models (default: small)")
            command.add_argument(
                "--dtype", choices=("float32", "bfloat16"), default="float32", help="(default: float32)"
            )
        command.add_argument("--rounds", type=int, default=rounds, help=f"timed rounds (default: {rounds})")
        command.add_argument("--json", help="file to write the figures to")
    options = parser.parse_args(arguments)
    if options.rounds < 2 or (options.command == "train" and options.towers < 1):
        parser.error("--towers must be at least 1 and --rounds at least 2")

    keep_freed_memory()  # as the trainer does, for all contestants alike
    if options.command == "distributed":
        if options.ranks < 2 or 20 % options.ranks or options.steps < 8:
            parser.error("--ranks must be at least 2 and divide the recipe's 20 rows, --steps be at least 8")
        figures = time_distributed(options.ranks, options.rounds, options.steps, options.save_every)
        _print_distributed(figures)
    elif options.command == "train":
        figures = time_train(options.size, getattr(torch, options.dtype), options.towers, options.rounds)
        _print_train(figures)
    else:
        figures = time_sample(SIZES[options.size], getattr(torch, options.dtype), options.steps, options.rounds)
        _print_sample(figures)
    figures |= {
        "command": vars(options),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    print(figures["machine"], *figures["versions"].items())
    if options.json:
        with open(options.json, "x", encoding="utf-8") as file:
            json.dump(figures, file, indent=2)


if __name__ == "__main__":
    main()
