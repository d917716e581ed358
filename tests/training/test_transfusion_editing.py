"""Fine-tuning on edits (paper, section 3.4.4): the model answers with the edited picture and not with its source."""

import numpy as np
import pytest
import torch

from modeling_mot import MoTTransfusionModel
from training.data.documents import build_row, compose
from training.optimization import OptimizerConfig, averaged

from .tiny import tiny_trainer
from .tiny_transfusion import BOS, VOCABULARY, PictureStream, picture_tokens, tiny_config


# Pictures of 3 channels and 8 x 8 latents, in blocks of random colours; an instruction is one token.
SIDE, MIRROR, INVERT = 8, 10, 11
EDITS = {MIRROR: lambda picture: picture[:, :, ::-1].copy(), INVERT: lambda picture: -picture}
_random = np.random.default_rng(0)
SOURCES = [_random.uniform(-1, 1, (3, 4, 4)).repeat(2, axis=1).repeat(2, axis=2).astype(np.float32) for _ in range(4)]


class EditStream(PictureStream):
    """Rows of one edit each: begin, source, instruction, target, end; the source clean, the target alone learnt."""

    def row(self, index: int) -> dict:
        random = np.random.default_rng(index)
        source, instruction = SOURCES[random.integers(len(SOURCES))], int(random.choice(list(EDITS)))
        spans = [picture_tokens(SIDE, SIDE), np.array([instruction]), picture_tokens(SIDE, SIDE)]
        document = compose(spans, [source, EDITS[instruction](source)], VOCABULARY, targets="last")
        return build_row([document], len(document), VOCABULARY)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> dict[int, np.ndarray]:
    """instruction -> what a trained model draws from each source, (sources, 3, 8, 8)"""
    fields = {"latent_channels": 3, "latent_size": [SIDE, SIDE], "unet_channels": [16, 32], "hidden_size": 48}
    torch.manual_seed(0)
    model = MoTTransfusionModel(tiny_config("mot", prediction_type="v_prediction", qk_norm="rms", **fields)).train()
    optimizer = OptimizerConfig(lr=4e-3, min_lr=2e-4, warmup_steps=20, weight_decay=0.0)
    options = {"steps": 270, "rows": 12, "ema_decay": 0.97, "optimizer": optimizer}
    trainer = tiny_trainer(tmp_path_factory.mktemp("edits"), model, EditStream(), **options)
    trainer.fit()
    latents, results = torch.from_numpy(np.stack(SOURCES)), {}
    with averaged(trainer.trained.values(), trainer.ema):
        for instruction in EDITS:
            prompt = torch.tensor([[BOS, *picture_tokens(SIDE, SIDE), instruction]] * len(SOURCES))
            output = model.eval().generate(
                input_ids=prompt,
                latents=latents,
                generation_mode="image",
                num_inference_steps=10,
                scheduler="ddim",
                generator=[torch.Generator().manual_seed(number) for number in range(len(SOURCES))],
            )
            results[instruction] = torch.stack([of_prompt[0] for of_prompt in output.latents]).numpy()
    return results


def error(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.square(one - other).mean())


def test_only_the_target_is_learnt_and_only_the_source_is_clean():
    row = EditStream().row(0)
    begin = 2 + 16 + 1 + 1  # bos, boi, patches, eoi, instruction: then the BOI of the target
    assert (row["labels"][:begin] == -100).all()
    assert [int(label) for label in row["labels"] if label != -100] == [VOCABULARY.boi, VOCABULARY.eos]
    assert [image["clean"] for image in row["images"]] == [True, False]


def test_what_is_drawn_is_the_target_and_not_the_source(drawn):
    for instruction, edit in EDITS.items():
        for picture, source in zip(drawn[instruction], SOURCES, strict=True):
            # Returning the source would make this ratio very large; half way between the two it is 1.
            assert error(picture, edit(source)) < 0.25 * error(picture, source)


def test_another_instruction_makes_another_picture_of_the_same_source(drawn):
    for instruction, other in ((MIRROR, INVERT), (INVERT, MIRROR)):
        for picture, source in zip(drawn[instruction], SOURCES, strict=True):
            assert error(picture, EDITS[instruction](source)) < 0.25 * error(picture, EDITS[other](source))


def test_another_source_makes_another_picture_by_the_same_instruction(drawn):
    for instruction, edit in EDITS.items():
        for place, picture in enumerate(drawn[instruction]):
            errors = [error(picture, edit(source)) for source in SOURCES]
            assert min(errors[:place] + errors[place + 1 :]) > 4 * errors[place]
