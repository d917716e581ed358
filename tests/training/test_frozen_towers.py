"""What is frozen is bit for bit what it was; everything else takes the steps that it would take beside it."""

import pytest
import torch
from safetensors.torch import load_file

from training.config import ConfigError
from training.consolidate import read_model
from training.optimization import HeldRows, OptimizerConfig, freeze_towers
from training.run_files.checkpoints import newest_intact

from .ranks import ROWS, assert_same_but_for_rounding, make, results, run_ranks
from .tiny import tiny_model, tiny_trainer


HELD = 33  # of the 40 tokens of text
DECAY = OptimizerConfig(lr=1e-2, min_lr=1e-3, warmup_steps=1, weight_decay=0.1, decay_embeddings=True)
VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


def trained(folder, model, **train):
    """(parameters before, after) of four steps, where everything decays that may."""
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    trainer = tiny_trainer(folder, model, optimizer=DECAY, **train)
    trainer.fit()
    return before, dict(trainer.raw_model.named_parameters()), trainer


@pytest.mark.parametrize("tied", [False, True])
def test_a_frozen_tower_and_held_rows_are_bit_equal_after_steps_and_all_else_moves(tmp_path, tied):
    model = tiny_model(tie_word_embeddings=tied)
    before, after, _ = trained(tmp_path, model, frozen_towers=["text"], frozen_vocabulary=HELD)
    for name, value in after.items():
        if name in VOCABULARY:
            assert torch.equal(value[:HELD], before[name][:HELD]), name
            moved = (value[HELD:] != before[name][HELD:]).any(dim=1)
            assert moved[40 - HELD :].any() and (tied or "embed" in name or moved.all()), name
        else:
            assert torch.equal(value, before[name]) == ("text" in name.split(".")), name


def test_text_that_follows_text_keeps_its_logits_bit_for_bit(tmp_path):
    model = tiny_model()
    ids = torch.randint(7, HELD, (2, 20))
    expected = model.eval()(ids).logits[..., :HELD].clone()
    trained(tmp_path, model.train(), frozen_towers=["text"], frozen_vocabulary=HELD)
    assert torch.equal(model.eval()(ids).logits[..., :HELD], expected)


def test_the_optimizer_does_not_hold_what_is_frozen(tmp_path):
    model = tiny_model()
    *_, trainer = trained(tmp_path, model, frozen_towers=["text"], frozen_vocabulary=HELD)
    held = {id(parameter) for group in trainer.raw_optimizer.param_groups for parameter in group["params"]}
    expected = {id(value) for name, value in model.named_parameters() if "text" not in name.split(".")}
    assert held == expected
    assert all(id(parameter) in expected for parameter in trainer.raw_optimizer.state)
    for name in VOCABULARY:
        moments = trainer.raw_optimizer.state[model.get_parameter(name)]
        assert not moments["exp_avg"][:HELD].any() and moments["exp_avg"][HELD:].any()


def test_the_first_step_of_the_rest_is_the_one_without_freezing(tmp_path):
    """Without clipping, AdamW updates each parameter by its own gradient alone, which the first step has unchanged."""
    optimizer = OptimizerConfig(lr=1e-2, min_lr=1e-3, warmup_steps=0, weight_decay=0.0, clip_norm=None)
    frozen, whole = tiny_model(), tiny_model()
    tiny_trainer(
        tmp_path / "a", frozen, optimizer=optimizer, steps=1, frozen_towers=["text"], frozen_vocabulary=HELD
    ).fit()
    tiny_trainer(tmp_path / "b", whole, optimizer=optimizer, steps=1).fit()
    for name, value in frozen.named_parameters():
        if name in VOCABULARY:
            assert torch.equal(value[HELD:], whole.get_parameter(name)[HELD:])
        elif "text" not in name.split("."):
            assert torch.equal(value, whole.get_parameter(name)), name


def test_a_shared_part_is_a_tower_of_its_own(tmp_path):
    model = tiny_model(untied=["feed_forward"])
    before, after, _ = trained(tmp_path, model, frozen_towers=["shared", "text"], frozen_vocabulary=HELD)
    for name, value in after.items():
        if name not in VOCABULARY:
            frozen = not {"shared", "text"}.isdisjoint(name.split("."))
            assert torch.equal(value, before[name]) == frozen, name


def test_a_resumed_run_and_its_average_go_on_as_one_that_was_not_stopped(tmp_path):
    options = {"frozen_towers": ["text"], "frozen_vocabulary": HELD, "ema_decay": 0.5, "save_every": 2}
    _, expected, straight = trained(tmp_path / "a", tiny_model(), **options)
    trainer = tiny_trainer(tmp_path / "b", tiny_model(), optimizer=DECAY, **options)
    for micro_batches in trainer.batches.from_step(0, 2, lambda: False):
        trainer.train_step(micro_batches)
    trainer.save(wait=True)
    again = tiny_trainer(tmp_path / "b", tiny_model(seed=1), optimizer=DECAY, resume=True, **options)
    again.resume(newest_intact(again.run)[0])
    again.fit()
    for name, value in again.raw_model.named_parameters():
        assert torch.equal(value, expected[name]), name
    for left, right in zip(again.ema.shadow_params, straight.ema.shadow_params, strict=True):
        assert torch.equal(left, right)
    averaged = read_model(again.run.checkpoint(4), average=True, frozen_towers=["text"])
    shadows = dict(zip(again.trained, again.ema.shadow_params, strict=True))
    for name, value in averaged.named_parameters():
        assert torch.equal(value, shadows.get(name, expected[name]))


@pytest.mark.parametrize("fsdp", [True, False])
def test_two_ranks_freeze_what_one_does(tmp_path, fsdp):
    run_ranks(2, tmp_path, ["frozen"], fsdp=fsdp)
    parameters = load_file(tmp_path / "frozen" / "result.safetensors")
    trainer = make("frozen", tmp_path / "alone", ROWS)
    before = dict(tiny_model().named_parameters())
    trainer.fit()
    results(trainer, tmp_path / "alone")
    assert_same_but_for_rounding(parameters, load_file(tmp_path / "alone" / "result.safetensors"))
    for name, value in before.items():
        if name in VOCABULARY:
            assert torch.equal(parameters[name][:HELD], value[:HELD]) and not torch.equal(parameters[name], value)
        else:
            assert torch.equal(parameters[name], value) == ("text" in name.split(".")), name


def test_what_cannot_be_frozen_is_refused():
    model = tiny_model()
    with pytest.raises(ConfigError, match="names 'txt'; the model has image, speech, text"):
        freeze_towers(model, ["txt"])
    with pytest.raises(ConfigError, match="are all towers of the model"):
        freeze_towers(model, ["text", "image", "speech"])
    with pytest.raises(ConfigError, match="the model has image, shared, speech, text"):
        freeze_towers(tiny_model(untied=["norm"]), ["other"])
    with pytest.raises(ConfigError, match="train.frozen_vocabulary=71 rows, but the model has vocab_size=70"):
        HeldRows(model, 71)
