"""With what a collator makes ahead, a forward of the Transfusion setting depends on no value of the data."""

from itertools import product

import pytest
import torch
from torch._subclasses import FakeTensorMode

from modeling_mot import ModalityRouting, MoTTransfusionModel

from .naive_transfusion import BOS, EOS, VAE, image, tiny_config


KINDS = ["latents", "pixels", "several sizes", "no image"]


def ahead_of(config, kind):
    """Ids, routing, documents, and images with their noise; sizes, where they differ, as Python numbers."""
    sizes = [(4, 2), (4, 4)] if kind == "several sizes" else [(4, 4), (4, 4)]
    if kind == "no image":
        row = [BOS, *range(10, 25), EOS]
    else:
        row = [BOS, 10, *image(*sizes[0]), 11, EOS, BOS, *image(*sizes[1]), EOS]
    ids = torch.tensor([row] * 2)
    modality_ids = (ids == config.image_token_id).long()
    starts = (ids == BOS).long().cumsum(dim=1)
    batch = {"input_ids": ids, "labels": ids, "modality_ids": modality_ids, "document_ids": starts}
    batch["routing"] = ModalityRouting.from_modality_ids(modality_ids, config)
    if kind == "no image":
        return batch
    batch |= {"timesteps": torch.tensor([3, 999, 0, 5]), "noise": torch.randn(4, 2, 4, 4)}
    batch["clean_images"] = torch.tensor([False, False, True, False])
    if kind == "pixels":
        return batch | {"pixel_values": torch.rand(4, 3, 8, 8) * 2 - 1}
    if kind == "several sizes":
        batch["image_sizes"] = sizes * 2
    return batch | {"latents": torch.randn(4, 2, 4, 4)}


def fields_of(kind):
    return {"vae_config": VAE} if kind == "pixels" else {}


@pytest.mark.parametrize(("variant", "kind"), [*product(["dense", "mot"], KINDS), ("hybrid", "latents")])
@pytest.mark.parametrize("is_bagel", [False, True])
def test_forward_runs_on_fake_tensors(variant, kind, is_bagel):
    fields = fields_of(kind) | {"patchifier": "linear" if is_bagel else "unet"}
    if is_bagel:
        fields |= {"image_positions": "shared", "markers_in_image_block": True, "noised_images_visible": False}
        fields |= {"latent_position_table": "sincos"}
    config = tiny_config(variant, **fields)
    batch = ahead_of(config, kind)
    # Diffusers casts a VAE when it is built, which parameters without data cannot bear.
    real = MoTTransfusionModel(config) if kind == "pixels" else None
    with FakeTensorMode(allow_non_fake_inputs=kind == "pixels") as mode:
        model = real or MoTTransfusionModel(config)
        fake = {name: mode.from_tensor(t) if torch.is_tensor(t) else t for name, t in batch.items()}
        routing = batch["routing"]
        if routing.order is not None:
            fake["routing"] = routing._replace(
                order=mode.from_tensor(routing.order), inverse=mode.from_tensor(routing.inverse)
            )
        output = model(**fake, use_cache=False)
        output.loss.backward()  # a value read back would raise DataDependentOutputException
    assert output.logits.shape == (*batch["input_ids"].shape, 60)
    assert all(p.grad is not None for name, p in model.named_parameters() if not name.startswith("vae."))


@pytest.mark.parametrize(
    ("variant", "kind", "patchifier"),
    [
        ("mot", "latents", "unet"),
        ("dense", "no image", "unet"),
        ("mot", "several sizes", "linear"),
        ("hybrid", "latents", "linear"),
    ],
)
def test_forward_compiles_without_a_graph_break(variant, kind, patchifier):
    torch._dynamo.reset()
    config = tiny_config(variant, patchifier=patchifier, num_hidden_layers=1, noised_images_visible=variant != "mot")
    model, batch = MoTTransfusionModel(config), ahead_of(config, kind)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    output, expected = compiled(**batch, use_cache=False), model(**batch, use_cache=False)
    for name in ("logits", "prediction", "loss"):
        torch.testing.assert_close(getattr(output, name), getattr(expected, name), rtol=1e-4, atol=1e-4)
    output.loss.backward()
    assert all(p.grad is not None for p in model.parameters())
