"""What forwards and generate take: in Llama's order, of the tokens' shapes, and nothing that nobody reads."""

import copy
import inspect
import math

import numpy as np
import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM, LlamaModel
from transformers.utils.generic import TransformersKwargs

from modeling_mot import MoTForCausalLM, MoTModel, MoTTransfusionModel

from .naive_transfusion import VAE
from .naive_transfusion import tiny_model as tiny_transfusion


IDS = torch.tensor([[1, 9, 12, 7, 20], [1, 8, 25, 11, 13]])
ZEROS, ONES = torch.zeros_like(IDS), torch.ones_like(IDS)
PREFIX = IDS[:, :3]


def cache_of(model, ids=IDS):
    with torch.no_grad():
        return model(ids, use_cache=True).past_key_values


@pytest.mark.parametrize(
    ("ours", "llamas"),
    [(MoTModel, LlamaModel), (MoTForCausalLM, LlamaForCausalLM), (MoTTransfusionModel, LlamaForCausalLM)],
)
def test_parameters_begin_as_llamas(ours, llamas):
    expected = list(inspect.signature(llamas.forward).parameters)[:-1]  # but for its kwargs
    expected = ["past_key_values" if name == "cache" else name for name in expected]  # renamed in transformers 5.24
    assert list(inspect.signature(ours.forward).parameters)[: len(expected)] == expected


@pytest.mark.parametrize("make", ["tiny_model", "transfusion"])
def test_mask_by_position_is_a_mask(tiny_model, make):
    model = tiny_model() if make == "tiny_model" else tiny_transfusion().eval()
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    by_position = model(IDS, mask, positions).logits
    torch.testing.assert_close(by_position, model(IDS, attention_mask=mask, position_ids=positions).logits)
    torch.testing.assert_close(by_position[:1, 2:], model(IDS[:1, 2:]).logits)


REFUSED = {
    "mask of more rows": ({"attention_mask": torch.ones(3, 5)}, "attention_mask has shape \\(3, 5\\)"),
    "mask of fewer columns": ({"attention_mask": torch.ones(2, 4)}, "attention_mask has shape \\(2, 4\\)"),
    "mask of one row": ({"attention_mask": torch.ones(5)}, "attention_mask has shape \\(5,\\)"),
    "mask of three dimensions": ({"attention_mask": torch.ones(2, 5, 5)}, "attention_mask has shape \\(2, 5, 5\\)"),
    "4-D mask of more rows": ({"attention_mask": torch.ones(3, 1, 5, 5)}, "attention_mask has shape \\(3, 1, 5, 5\\)"),
    "fewer modalities": ({"modality_ids": ZEROS[:, :3]}, "modality_ids has shape \\(2, 3\\)"),
    "modalities of one row": ({"modality_ids": ZEROS[:1]}, "modality_ids has shape \\(1, 5\\)"),
    "modalities as numbers": ({"modality_ids": ZEROS.float()}, "modality_ids is torch.float32"),
    "positions of more rows": ({"position_ids": torch.zeros(3, 5).long()}, "position_ids has shape \\(3, 5\\)"),
    "fewer positions": ({"position_ids": torch.zeros(1, 4).long()}, "position_ids has shape \\(1, 4\\)"),
    "fewer labels": ({"labels": IDS[:, :3]}, "labels has shape \\(2, 3\\)"),
    "labels as a list": ({"labels": IDS.tolist()}, "labels is list"),
    "fewer labels without logits": ({"labels": IDS[:, :3], "skip_logits": True}, "labels has shape \\(2, 3\\)"),
    "negative logits": ({"logits_to_keep": -1}, "logits_to_keep=-1"),
    "ids of one row": ({"input_ids": IDS[0]}, "input_ids has shape \\(5,\\)"),
    "no ids": ({"input_ids": IDS[:, :0]}, "input_ids has shape \\(2, 0\\)"),
    "ids as a list": ({"input_ids": IDS.tolist()}, "input_ids is list"),
    "ids as numbers": ({"input_ids": IDS.float()}, "input_ids is torch.float32"),
    "a cache as tuples": ({"past_key_values": ((1, 2),)}, "past_key_values is a tuple"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("make", ["tiny_model", "transfusion"])
def test_what_does_not_fit_the_tokens_is_refused_by_name(tiny_model, make, case):
    model = tiny_model() if make == "tiny_model" else tiny_transfusion().eval()
    kwargs, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        model(**({"input_ids": IDS} | kwargs))


def test_mask_beside_a_cache_covers_the_cached_tokens(tiny_model):
    model = tiny_model()
    with pytest.raises(ValueError, match="attention_mask has shape \\(2, 5\\) .* 8\\s+keys"):
        model(IDS, attention_mask=ONES, past_key_values=cache_of(model, PREFIX))
    with pytest.raises(ValueError, match="past_key_values holds 2 rows but there are 1"):
        model(IDS[:1], past_key_values=cache_of(model, PREFIX))
    mask = torch.ones(2, 8, dtype=torch.long)
    whole = model(torch.cat([PREFIX, IDS], dim=1)).logits[:, 3:]
    torch.testing.assert_close(model(IDS, mask, None, cache_of(model, PREFIX)).logits, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 5, 31), (5, 32), (2, 5)])
def test_embeddings_of_another_shape_are_refused(tiny_model, shape):
    with pytest.raises(ValueError, match="inputs_embeds has shape"):
        tiny_model()(inputs_embeds=torch.randn(shape), modality_ids=ZEROS)


@pytest.mark.parametrize(
    ("misspelt", "right"),
    [("attention_masks", "attention_mask"), ("modality_id", "modality_ids"), ("label", "labels")],
)
def test_unknown_argument_is_refused_with_the_nearest(tiny_model, misspelt, right):
    for model in (tiny_model(), tiny_model().model, tiny_transfusion()):
        if right in inspect.signature(type(model).forward).parameters:
            with pytest.raises(TypeError, match=f"'{misspelt}'; did you mean '{right}'"):
                model(IDS, **{misspelt: ONES})
    for model in (tiny_model(), tiny_transfusion().eval()):
        with pytest.raises(ValueError, match=f"'{misspelt}'; did you mean '{right}'"):
            model.generate(IDS, max_new_tokens=2, **{misspelt: ONES})


@pytest.mark.parametrize(
    "name", [*sorted(TransformersKwargs.__optional_keys__), "return_dict", "cache_position", "any"]
)
def test_keywords_that_any_model_is_given_pass(tiny_model, name):
    """Trainer, TRL, PEFT and generate pass these, most of them without a value."""
    model = tiny_model()
    torch.testing.assert_close(model(IDS, **{name: None}).logits, model(IDS).logits)


def test_keywords_of_a_registered_attention_pass(tiny_model):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from modeling_mot.attention_masks import range_attention_forward

    seen = []

    def attend(module, query, key, value, attention_mask, instances=None, **kwargs):
        seen.append(instances)
        return range_attention_forward(module, query, key, value, attention_mask, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register("of_an_engine", attend)
    model = tiny_model()
    model.config._attn_implementation = "of_an_engine"
    model(IDS, instances="its own", use_cache=False)
    assert seen == ["its own"] * 2
    with pytest.raises(TypeError, match="'instance'"):
        model(IDS, instance="its own")


PROMPTS = {
    "fewer modalities": ({"modality_ids": ZEROS[:, :3]}, "modality_ids has shape \\(2, 3\\)"),
    "more modalities": ({"modality_ids": torch.zeros(2, 7).long()}, "modality_ids has shape \\(2, 7\\)"),
    "modalities of one row": ({"modality_ids": ZEROS[:1]}, "modality_ids has shape \\(1, 5\\)"),
    "mask of more rows": ({"attention_mask": torch.ones(3, 5).long()}, "attention_mask has shape \\(3, 5\\)"),
    "mask of fewer columns": ({"attention_mask": ONES[:, :4]}, "attention_mask has shape \\(2, 4\\)"),
    "unknown setting": ({"max_new_token": 2}, "'max_new_token'; did you mean 'max_new_tokens'"),
}


@pytest.mark.parametrize("case", PROMPTS)
@pytest.mark.parametrize("make", ["tiny_model", "transfusion"])
def test_what_does_not_fit_the_prompts_is_refused_by_name(tiny_model, make, case):
    model = tiny_model() if make == "tiny_model" else tiny_transfusion().eval()
    kwargs, message = PROMPTS[case]
    with pytest.raises(ValueError, match=message):
        model.generate(IDS, **({"max_new_tokens": 2} | kwargs))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
        ({"inputs_embeds": torch.randn(2, 5, 32)}, "takes no inputs_embeds"),
        ({"timesteps": torch.zeros(1)}, "takes no timesteps"),
    ],
)
def test_transfusion_generate_refuses_what_it_does_not_read(kwargs, message):
    with pytest.raises(ValueError, match=message):
        tiny_transfusion().eval().generate(IDS, max_new_tokens=2, **kwargs)


# --------------------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize("label", [-1, -99, -101, 60, 2**40])
@pytest.mark.parametrize("name", ["labels", "shift_labels"])
@pytest.mark.parametrize("skip_logits", [False, True])
@pytest.mark.parametrize("make", ["tiny_model", "transfusion"])
def test_labels_that_are_no_tokens_are_refused(tiny_model, make, skip_logits, name, label):
    model = tiny_model() if make == "tiny_model" else tiny_transfusion()
    labels = IDS.clone()
    labels[1, 2] = label
    with pytest.raises(ValueError, match=f"labels hold {label}, .* vocab_size=6"):
        model(IDS, skip_logits=skip_logits, **{name: labels})


@pytest.mark.parametrize("skip_logits", [False, True])
def test_labels_that_are_ignored_count_for_nothing(tiny_model, skip_logits):
    model = tiny_model()
    labels = IDS.masked_fill(torch.tensor([[0, 0, 1, 1, 0]]).bool(), -100)
    out = model(IDS, labels=labels, skip_logits=skip_logits)
    expected = torch.nn.functional.cross_entropy(model(IDS).logits[:, [0, 3]].flatten(0, 1), IDS[:, [1, 4]].flatten())
    torch.testing.assert_close(out.loss, expected)


@pytest.mark.parametrize("skip_logits", [False, True])
def test_labels_are_checked_without_a_read_where_a_graph_is_traced(tiny_model, skip_logits):
    model = tiny_model("dense")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    loss = compiled(IDS, labels=IDS, skip_logits=skip_logits, use_cache=False).loss
    torch.testing.assert_close(loss, model(IDS, labels=IDS).loss)
    with pytest.raises(RuntimeError, match="labels must be -100, or in \\[0, vocab_size=60\\)"):
        compiled(IDS, labels=torch.full_like(IDS, -1), skip_logits=skip_logits, use_cache=False)


def test_shift_labels_of_a_transfusion_model_are_the_targets_as_they_stand():
    model = tiny_transfusion().eval()
    shifted = torch.nn.functional.pad(IDS[:, 1:], (0, 1), value=-100)
    whole, aligned = model(IDS, labels=IDS), model(IDS, shift_labels=shifted)
    torch.testing.assert_close(aligned.loss, whole.loss)
    assert int(aligned.loss_counts["text"]) == 8


def test_transfusion_takes_embeddings_beside_their_ids():
    model = tiny_transfusion().eval()
    embeddings = model.get_input_embeddings()(IDS)
    assert torch.equal(model(IDS, inputs_embeds=embeddings).logits, model(IDS).logits)
    assert not torch.equal(model(IDS, inputs_embeds=2 * embeddings).logits, model(IDS).logits)
    with pytest.raises(ValueError, match="input_ids is needed"):
        model(inputs_embeds=embeddings)


def test_a_cache_that_is_empty_fits_any_batch(tiny_model):
    model = tiny_model()
    out = model(IDS, past_key_values=DynamicCache(config=model.config), use_cache=True)
    assert out.past_key_values.get_seq_length() == 5


def embedded(model, ids):
    return {"inputs_embeds": model.get_input_embeddings()(ids), "modality_ids": torch.zeros_like(ids)}


@pytest.mark.parametrize("make", ["tiny_model", "transfusion"])
@pytest.mark.parametrize("part", ["whole", "model"])
def test_cache_is_another_name_of_past_key_values(tiny_model, make, part):
    model = tiny_model() if make == "tiny_model" else tiny_transfusion().eval()
    cache, other = cache_of(model, PREFIX), cache_of(model, PREFIX)
    called, rest = (model, {"input_ids": IDS[:, 3:]}) if part == "whole" else (model.model, embedded(model, IDS[:, 3:]))
    with torch.no_grad():
        expected = called(**rest, past_key_values=copy.deepcopy(cache))
        for names in ({"cache": cache}, {"cache": other, "past_key_values": other}):
            out = called(**rest, **names)
            assert torch.equal(out[0], expected[0])
            assert out.past_key_values is out["past_key_values"] is names["cache"]
        assert torch.equal(called(**rest, cache=None)[0], called(**rest)[0])
    with pytest.raises(ValueError, match="past_key_values and cache are two names of one argument"):
        called(**rest, past_key_values=cache, cache=other)


NO_TENSORS = ("text", 3, [[1, 2]], {}, b"x")
OF_IMAGES = ("latents", "pixel_values", "timesteps", "noise", "clean_images", "image_first", "image_sizes", "generator")


@pytest.mark.parametrize("value", NO_TENSORS, ids=repr)
@pytest.mark.parametrize(
    "name",
    ["input_ids", "attention_mask", "position_ids", "document_ids", "modality_ids", "inputs_embeds", "labels",
     "routing", "attention_plan", "past_key_values"],
)  # fmt: skip
@pytest.mark.parametrize("make", ["tiny_model", "transfusion"])
def test_what_is_no_tensor_is_refused_by_name(tiny_model, make, name, value):
    model = tiny_model() if make == "tiny_model" else tiny_transfusion()
    of_tokens = {} if name == "inputs_embeds" and make == "tiny_model" else {"input_ids": IDS}
    with pytest.raises(ValueError, match=name):
        model(**of_tokens | {name: value})


@pytest.mark.parametrize("value", ["text", 3, [[[]]], {}], ids=repr)
@pytest.mark.parametrize("name", OF_IMAGES)
def test_what_is_no_tensor_of_images_is_refused_by_name(name, value):
    row = torch.tensor([[1, 3, *[5] * 4, 4, 9]])
    vae = VAE if name == "pixel_values" else None
    given = {} if name == "pixel_values" else {"latents": torch.zeros(1, 2, 4, 4)}
    with pytest.raises(ValueError, match=name):
        tiny_transfusion(vae_config=vae)(row, **given | {name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("num_items_in_batch", value) for value in (0, -1, "3", math.nan, torch.tensor(0), True, [3])),
        *(
            ("logits_to_keep", value)
            for value in (-1, 2.5, math.nan, "3", [1], torch.tensor([0.5]), torch.tensor([99]))
        ),
    ],
    ids=repr,
)
def test_counts_that_are_none_are_refused_by_name(tiny_model, name, value):
    with pytest.raises(ValueError, match=name):
        tiny_model()(IDS, labels=None if name == "logits_to_keep" else IDS, **{name: value})


def test_logits_to_keep_are_taken_in_each_form(tiny_model):
    model, last = tiny_model(), torch.zeros_like(IDS, dtype=torch.bool)
    last[:, -2:] = True
    expected = model(IDS).logits[:, -2:]
    for form in (2, np.int64(2), torch.tensor([3, 4]), torch.tensor([[3, 4], [3, 4]]), last[0], last):
        kept = model(IDS, logits_to_keep=form).logits
        torch.testing.assert_close(kept.view_as(expected), expected)


@pytest.mark.parametrize("value", ["ids", 3, [[1]], torch.ones(4), torch.ones(0, 4, dtype=torch.long), {}], ids=repr)
@pytest.mark.parametrize("name", ["input_ids", "attention_mask", "modality_ids", "latents", "pixel_values"])
@pytest.mark.parametrize("make", ["tiny_model", "transfusion"])
def test_prompts_of_another_type_or_shape_are_refused_by_name(tiny_model, make, name, value):
    model = tiny_model() if make == "tiny_model" else tiny_transfusion()
    with pytest.raises(ValueError, match=name):
        model.generate(**{"input_ids": IDS} | {name: value}, max_new_tokens=2)
