import json
import signal

import pytest
import torch
from safetensors.torch import load_file
from tqdm import tqdm

from training.config import ConfigError
from training.consolidate import read_model
from training.data.stream import StepBatches
from training.model.building import load_model, set_up_layers
from training.optimization import NotFiniteError, OptimizerConfig, count_targets, learning_rate
from training.run_files.folder import RunFolder
from training.run_files.metrics import read_metrics
from training.trainer import BAR, _postfix
from training.world import Interrupted

from .ranks import go_on
from .tiny import MadeUpStream, tiny_config, tiny_model, tiny_trainer
from .tiny_transfusion import OPTIMIZER


def take_rows(rows, row_numbers):
    """A collation that leaves rows as they are, and whose numbers must be theirs in the stream."""
    assert [MadeUpStream().row(number)["input_ids"].tolist() for number in row_numbers] == [
        row["input_ids"].tolist() for row in rows
    ]
    return rows


def parameters_after(folder, **train) -> dict[str, torch.Tensor]:
    stream = train.pop("stream", None)
    trainer = tiny_trainer(folder, stream=stream, **train)
    trainer.fit()
    return {name: value.detach().clone() for name, value in trainer.raw_model.named_parameters()}


def assert_equal_parameters(left, right, **tolerance):
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")


def test_any_split_into_micro_batches_takes_the_same_trajectory(tmp_path):
    whole = parameters_after(tmp_path / "a", rows=4, accumulation=1, optimizer=OPTIMIZER)
    split = parameters_after(tmp_path / "b", rows=1, accumulation=4, optimizer=OPTIMIZER)
    assert_equal_parameters(whole, split, rtol=1e-5, atol=1e-7)


def test_a_step_is_adamw_on_the_mean_over_all_targets(tmp_path):
    trainer = tiny_trainer(tmp_path, rows=1, accumulation=3, steps=1, optimizer=OPTIMIZER)
    reference = tiny_model()
    stream = MadeUpStream()
    loss_sum, count = 0.0, 0
    for index in range(3):
        row = {name: torch.from_numpy(value)[None] for name, value in stream.row(index).items()}
        logits = reference(**{k: v for k, v in row.items() if k != "labels"}).logits
        targets = row["labels"][:, 1:]
        loss_sum = loss_sum + torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum"
        )
        count += int((targets != -100).sum())
    (loss_sum / count).backward()
    norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
    config = trainer.optimizer_config
    matrices = [p for p in reference.parameters() if p.ndim > 1 and p is not reference.get_input_embeddings().weight]
    others = [p for p in reference.parameters() if all(p is not matrix for matrix in matrices)]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    torch.optim.AdamW(groups, lr=learning_rate(config, 0, 1), betas=(0.9, 0.95), eps=1e-3, foreach=False).step()

    figures = trainer.train_step(next(trainer.batches.from_step(0, 1)))
    assert figures["loss"] == pytest.approx((loss_sum / count).item(), rel=1e-5)
    assert figures["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    trained = dict(trainer.raw_model.named_parameters())
    assert_equal_parameters(dict(reference.named_parameters()), trained, rtol=1e-4, atol=1e-6)


def test_a_modality_that_is_absent_gets_zero_gradients_and_decays(tmp_path):
    trainer = tiny_trainer(tmp_path, stream=MadeUpStream(modalities=("text",)))
    layer = trainer.raw_model.model.layers[0].mlp["image"].up_proj
    before = layer.weight.detach().clone()
    figures = trainer.train_step(next(trainer.batches.from_step(0, 1)))
    torch.testing.assert_close(layer.weight, before * (1 - figures["lr"] * 0.1))
    assert figures["means"]["image"] is None


def test_losses_in_bf16_are_float32_sums(tmp_path):
    trainer = tiny_trainer(tmp_path, precision="bf16")
    output = trainer.model(**next(trainer.batches.from_step(0, 1))[0])
    assert all(value.dtype == torch.float32 for value in output.loss_sums.values())


def test_loss_falls_in_bf16(tmp_path):
    trainer = tiny_trainer(tmp_path, precision="bf16", steps=20, rows=4)
    trainer.fit()
    rows, _ = read_metrics(trainer.run.metrics)
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]


def test_metrics_have_one_row_a_step_with_the_promised_keys(tmp_path):
    trainer = tiny_trainer(tmp_path)
    trainer.fit()
    rows = [json.loads(line) for line in trainer.run.metrics.read_text().splitlines()]
    names = ("text", "image", "speech")
    keys = {"step", "loss", "grad_norm", "lr", "tokens_per_second", "mfu", "step_seconds", "data_seconds"}
    keys |= {f"loss_{name}" for name in names} | {f"tokens_{name}" for name in names}
    keys |= {f"grad_norm_{name}" for name in (*names, "shared")}
    keys |= {"flops", "checkpoint_seconds", "memory_bytes", "skipped_steps", "event"}
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(set(row) == keys for row in rows)


def test_metrics_count_the_targets_of_the_step(tmp_path):
    trainer = tiny_trainer(tmp_path, accumulation=2)
    trainer.fit()
    first = read_metrics(trainer.run.metrics)[0][0]
    expected = sum(count_targets(batch, tiny_config()) for batch in next(trainer.batches.from_step(0, 1)))
    assert [first[f"tokens_{name}"] for name in ("text", "image", "speech")] == expected.tolist()


def test_losses_per_modality_add_up_to_the_loss(tmp_path):
    trainer = tiny_trainer(tmp_path)
    trainer.fit()
    for row in read_metrics(trainer.run.metrics)[0]:
        counts = {name: row[f"tokens_{name}"] for name in ("text", "image", "speech")}
        total = sum(row[f"loss_{name}"] * count for name, count in counts.items())
        assert row["loss"] == pytest.approx(total / sum(counts.values()), rel=1e-5)


def test_dropout_depends_on_the_step_alone(tmp_path):
    losses = []
    for name in ("a", "b"):
        trainer = tiny_trainer(tmp_path / name, model=tiny_model(hidden_dropout=0.2))
        torch.manual_seed(len(name) + len(losses))
        losses.append(trainer.train_step(next(trainer.batches.from_step(0, 1)))["loss"])
    assert losses[0] == losses[1]


def test_rows_of_a_step_do_not_depend_on_where_the_run_began():
    batches = StepBatches(MadeUpStream(), take_rows, rows=2, accumulation=3)
    straight = list(batches.from_step(0, 5))[3]
    assert [[r["input_ids"].tolist() for r in b] for b in straight] == [
        [r["input_ids"].tolist() for r in b] for b in next(batches.from_step(3, 5))
    ]


def test_ranks_and_accumulation_share_out_the_same_rows():
    def ids(batches):
        return sorted(row["input_ids"].tolist() for batch in next(batches.from_step(2, 3)) for row in batch)

    alone = ids(StepBatches(MadeUpStream(), take_rows, rows=2, accumulation=4))
    ranks = [StepBatches(MadeUpStream(), take_rows, rows=2, accumulation=2, rank=r, processes=2) for r in range(2)]
    assert alone == sorted(ids(ranks[0]) + ids(ranks[1]))


def test_an_interrupted_and_resumed_run_ends_bit_for_bit_where_an_undisturbed_one_does(tmp_path):
    undisturbed = parameters_after(tmp_path / "a", steps=6)
    trainer = tiny_trainer(tmp_path / "b", steps=6)
    step = trainer.train_step

    def step_and_signal(batches):
        figures = step(batches)
        if trainer.step == 3:
            trainer.stop_signal.number = signal.SIGINT
        return figures

    trainer.train_step = step_and_signal
    with pytest.raises(Interrupted) as interrupted:
        trainer.fit()
    assert interrupted.value.exit_code == 130

    resumed = tiny_trainer(tmp_path / "b", model=tiny_model(seed=1), steps=6, resume=True)
    go_on(resumed)
    assert resumed.step == 3
    resumed.fit()
    assert_equal_parameters(undisturbed, dict(resumed.raw_model.named_parameters()), rtol=0, atol=0)
    assert [row["step"] for row in read_metrics(resumed.run.metrics)[0]] == [1, 2, 3, 4, 5, 6]


def test_checkpoints_hold_no_pickle(tmp_path):
    trainer = tiny_trainer(tmp_path, save_every=2)
    trainer.fit()
    assert trainer.run.saved_steps() == [2, 4]
    files = [file for file in trainer.run.checkpoint(4).rglob("*") if file.is_file()]
    assert {file.suffix for file in files} == {".safetensors", ".json", ".py"}
    for file in files:
        if file.suffix == ".safetensors":
            load_file(file)
        elif file.suffix == ".json":
            json.loads(file.read_text())


def test_a_consolidated_checkpoint_loads_with_its_weights_bit_for_bit(tmp_path):
    trainer = tiny_trainer(tmp_path, model=tiny_model(tie_word_embeddings=True))
    trainer.fit()
    loaded = read_model(trainer.run.checkpoint(4))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert_equal_parameters(dict(trainer.raw_model.named_parameters()), dict(loaded.named_parameters()), rtol=0, atol=0)
    batch = {k: v for k, v in next(trainer.batches.from_step(0, 1))[0].items() if k != "labels"}
    with torch.no_grad():
        assert torch.equal(trainer.raw_model.eval()(**batch).logits, loaded(**batch).logits)


def test_a_checkpoint_is_written_beside_training_as_it_was_when_it_was_asked_for(tmp_path):
    trainer = tiny_trainer(tmp_path, save_every=1, save_asynchronously=True, keep_checkpoints=4)
    at_step, train_step = {}, trainer.train_step

    def remember(batches):
        figures = train_step(batches)
        at_step[trainer.step] = {n: v.detach().clone() for n, v in trainer.raw_model.named_parameters()}
        return figures

    trainer.train_step = remember
    trainer.fit()
    assert trainer.run.saved_steps() == [1, 2, 3, 4]
    for step, parameters in at_step.items():
        saved = dict(read_model(trainer.run.checkpoint(step)).named_parameters())
        assert_equal_parameters(parameters, saved, rtol=0, atol=0)


def test_a_failed_save_leaves_the_earlier_checkpoint_and_the_run_goes_on(tmp_path):
    trainer = tiny_trainer(tmp_path, save_every=1, keep_checkpoints=1)
    write = trainer.checkpointer.processor.save_pretrained

    def fail(folder):
        if trainer.step in (2, 3):
            raise OSError("no space left on device")
        assert trainer.run.saved_steps() == [1]
        write(folder)

    trainer.train_step(next(trainer.batches.from_step(0, 1)))
    trainer.save()
    trainer.checkpointer.processor.save_pretrained = fail
    trainer.fit()
    assert trainer.step == 4 and not trainer.save_failed
    assert sorted(entry.name for entry in trainer.run.checkpoints.iterdir()) == ["latest", "step-00000004"]


def test_a_run_knows_that_its_last_checkpoint_failed(tmp_path):
    trainer = tiny_trainer(tmp_path)

    def fail(folder):
        raise OSError("no space left on device")

    trainer.checkpointer.processor.save_pretrained = fail
    trainer.fit()
    assert trainer.save_failed and trainer.run.saved_steps() == []


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    trainer = tiny_trainer(tmp_path, save_every=1, keep_checkpoints=2)
    trainer.fit()
    assert trainer.run.saved_steps() == [3, 4]


def test_updates_that_are_not_finite_are_left_out_until_there_are_too_many(tmp_path):
    trainer = tiny_trainer(tmp_path, steps=8, not_finite_limit=2)
    parameter = trainer.raw_model.lm_head.weight
    parameter.register_hook(lambda gradient: gradient * (float("nan") if trainer.step >= 2 else 1))
    after = {}
    train_step = trainer.train_step

    def remember(batches):
        figures = train_step(batches)
        after[trainer.step] = {n: v.detach().clone() for n, v in trainer.raw_model.named_parameters()}
        return figures

    trainer.train_step = remember
    with pytest.raises(NotFiniteError, match="3 steps in a row, up to step 5"):
        trainer.fit()
    assert_equal_parameters(after[2], after[5], rtol=0, atol=0)
    rows = read_metrics(trainer.run.metrics)[0]
    assert [(row["event"], row["skipped_steps"]) for row in rows[1:]] == [
        (None, 0),
        ("not_finite", 1),
        ("not_finite", 2),
        ("not_finite", 3),
    ]
    assert trainer.run.saved_steps() == [5]


@pytest.mark.parametrize("kind", ["parameter", "moment", "average"])
def test_a_checkpoint_never_holds_what_is_not_finite(tmp_path, kind):
    trainer = tiny_trainer(tmp_path, steps=6, save_every=2, keep_checkpoints=9, ema_decay=0.5)
    name = "model.layers.1.mlp.speech.down_proj.weight"
    parameter, step = trainer.trained[name], trainer.optimizer.step
    averages = dict(zip(trainer.trained, trainer.ema.shadow_params, strict=True))

    def update():
        step()
        if trainer.step == 3:
            of_kind = {"parameter": parameter, "average": averages[name]}
            of_kind.get(kind, trainer.raw_optimizer.state[parameter]["exp_avg"]).data[0, 0] = float("inf")

    trainer.optimizer.step = update
    with pytest.raises(NotFiniteError, match=rf"{name}.* after step [45]\..*step 2 is the newest"):
        trainer.fit()
    assert trainer.run.saved_steps() == [2]


def test_an_update_that_ruins_the_parameters_ends_the_run_with_the_next_step(tmp_path):
    trainer = tiny_trainer(
        tmp_path, steps=50, optimizer=OptimizerConfig(lr=100, min_lr=100, warmup_steps=0, weight_decay=0)
    )
    step = trainer.optimizer.step

    def update():
        for group in trainer.optimizer.param_groups:
            group["lr"] *= 1e38
        step()

    trainer.optimizer.step = update
    with pytest.raises(NotFiniteError, match="hold values that are not finite .*there is no checkpoint"):
        trainer.fit()
    assert trainer.step == 2 and trainer.run.saved_steps() == []


def test_the_line_of_a_training_fits_80_columns_with_three_losses():
    objectives = ["text", "image", "speech"]
    row = {
        "loss_text": 3.1234,
        "loss_image": 10.5678,
        "loss_speech": 0.0421,
        "tokens_per_second": 12345.6,
        "mfu": 0.351,
    }
    postfix = _postfix(row, objectives)
    assert postfix == "text 3.12 image 10.6 speech 0.0421 12.3k tok/s 35% MFU"
    line = tqdm.format_meter(699, 4000, 5000, ncols=80, bar_format=BAR, postfix=postfix)
    assert postfix in line and len(line) <= 80


def test_evaluation_comes_at_intervals_and_at_the_end(tmp_path):
    trainer = tiny_trainer(tmp_path, steps=5)
    trainer.evaluate, trainer.evaluate_every = lambda model, stops: {"eval/loss_text": 1.0}, 2
    trainer.fit()
    assert [row["step"] for row in read_metrics(trainer.run.metrics)[1]] == [2, 4, 5]


def test_an_evaluation_that_a_signal_cut_short_is_made_up_for(tmp_path):
    def evaluate(model, stops):
        if trainer.step == 2 and not resumed:
            trainer.stop_signal.number = signal.SIGTERM
        return None if stops() else {"eval/loss_text": 1.0}

    for resumed in (False, True):
        trainer = tiny_trainer(tmp_path, steps=5, resume="auto" if resumed else False)
        trainer.evaluate, trainer.evaluate_every = evaluate, 2
        if resumed:
            go_on(trainer)
            trainer.fit()
        else:
            with pytest.raises(Interrupted):
                trainer.fit()
            assert trainer.run.saved_steps() == [2] and read_metrics(trainer.run.metrics)[1] == []
    assert [row["step"] for row in read_metrics(trainer.run.metrics)[1]] == [2, 4, 5]


@pytest.mark.parametrize("variant", ["dense", "moe-4x", "mot", "hybrid", "loo-image", "untied-feed-forward"])
def test_every_variant_trains(tmp_path, variant):
    trainer = tiny_trainer(tmp_path, model=tiny_model(variant), steps=20, rows=4)
    trainer.fit()
    rows, _ = read_metrics(trainer.run.metrics)
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_a_batch_that_is_the_data_of_the_model_is_learnt_by_heart(tmp_path):
    class OneRow(MadeUpStream):
        def row(self, index):
            return super().row(0)

    trainer = tiny_trainer(tmp_path, stream=OneRow(), steps=60, rows=1)
    trainer.fit()
    assert read_metrics(trainer.run.metrics)[0][-1]["loss"] < 0.1


def test_weights_of_modalities_move_the_loss(tmp_path):
    trainer = tiny_trainer(tmp_path, modality_weights={"image": 0.0, "speech": 0.0})
    figures = trainer.train_step(next(trainer.batches.from_step(0, 1)))
    assert figures["loss"] == pytest.approx(figures["means"]["text"], rel=1e-6)


def test_a_checkpoint_with_missing_tensors_is_refused_by_name(tmp_path):
    from safetensors.torch import load_file, save_file

    tiny_model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.image.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"model\.layers\.1\.mlp\.image\.up_proj\.weight"):
        load_model(str(tmp_path))


def test_a_config_of_another_model_type_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match="model_type='llama'"):
        load_model(str(tmp_path))


def test_a_folder_with_another_run_is_refused_until_told_otherwise(tmp_path):
    (tmp_path / "config.yaml").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    run = RunFolder(tmp_path)
    with pytest.raises(ConfigError, match="train.resume=auto.*train.overwrite=true"):
        run.claim(resume=False, overwrite=False)
    with pytest.raises(ConfigError, match="train.resume=true.*has no checkpoint"):
        run.claim(resume=True, overwrite=False)
    run.claim(resume="auto", overwrite=False)
    assert run.metrics.exists()
    run.claim(resume=False, overwrite=True)
    assert not list(tmp_path.iterdir())


def test_files_that_no_run_made_are_never_removed(tmp_path):
    (tmp_path / "config.yaml").write_text("{}")
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="thesis.tex"):
        RunFolder(tmp_path).claim(resume=False, overwrite=True)
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(ConfigError, match="holds no run"):
        RunFolder(tmp_path).claim(resume=False, overwrite=True)
    assert (tmp_path / "thesis.tex").exists()


def test_an_output_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        RunFolder(tmp_path / "file" / "run").claim(resume=False, overwrite=False)


def test_the_configuration_survives_a_checkpoint(tmp_path):
    trainer = tiny_trainer(tmp_path, model=tiny_model("hybrid"))
    trainer.save()
    config = read_model(trainer.run.checkpoint(0)).config
    assert config.moe_towers == tiny_config("hybrid").moe_towers


@pytest.mark.slow
def test_compiled_layers_take_the_trajectory_of_plain_ones(tmp_path):
    plain = parameters_after(tmp_path / "a", optimizer=OPTIMIZER)
    model = tiny_model()
    set_up_layers(model, checkpointing=False, compiled=True)
    torch._dynamo.utils.counters.clear()
    compiled = tiny_trainer(tmp_path / "b", model=model, optimizer=OPTIMIZER)
    compiled.fit()
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert_equal_parameters(plain, dict(compiled.raw_model.named_parameters()), rtol=1e-4, atol=1e-6)
