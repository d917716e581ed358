"""generate() against an uncached recompute of every step."""

import copy

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, MaxLengthCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from modeling_mot import MoTConfig, MoTForCausalLM

from . import naive_generation as naive


PROMPTS = {
    "text": [1, 9, 12, 7],
    "open-image": [1, 9, 3],
    "in-image": [1, 9, 3, 31, 40],
    "open-speech": [1, 8, 5],
    "after-image": [1, 3, 30, 31, 32, 33, 34, 35, 4],
}


def row(tokens):
    return torch.tensor([tokens])


def left_padded(prompts):
    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask


def unpadded(outputs, prompts):
    length = max(map(len, prompts))
    return [out.tolist()[length - len(p) :] for out, p in zip(outputs, prompts)]


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("variant", MoTConfig.variant_names())
def test_greedy_equals_recompute(tiny_model, variant, prompt):
    model = tiny_model(variant)
    out = model.generate(row(PROMPTS[prompt]), max_new_tokens=12, do_sample=False)
    assert out[0].tolist() == naive.greedy(model, PROMPTS[prompt], 12)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("variant", ["dense", "mot", "hybrid", "loo-text"])
def test_left_padded_batch_equals_recompute_of_each_row(tiny_model, variant, cache):
    model = tiny_model(variant)
    prompts = list(PROMPTS.values())
    ids, mask = left_padded(prompts)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=False, cache_implementation=cache)
    assert unpadded(out, prompts) == [naive.greedy(model, p, 10) for p in prompts]


@pytest.mark.parametrize("variant", ["mot", "hybrid"])
def test_without_cache_equals_recompute(tiny_model, variant):
    model = tiny_model(variant)
    out = model.generate(row(PROMPTS["open-image"]), max_new_tokens=9, do_sample=False, use_cache=False)
    assert out[0].tolist() == naive.greedy(model, PROMPTS["open-image"], 9)


@pytest.mark.parametrize("variant", ["dense", "mot", "hybrid"])
def test_seeded_sampling_equals_recompute(tiny_model, variant):
    model = tiny_model(variant)
    prompts = [PROMPTS["text"], PROMPTS["in-image"], PROMPTS["open-speech"]]
    ids, mask = left_padded(prompts)
    torch.manual_seed(7)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=True, temperature=2.0, top_k=0)
    torch.manual_seed(7)
    assert unpadded(out, prompts) == naive.sample(model, prompts, 12, temperature=2.0)


@pytest.mark.parametrize("prompt", ["text", "open-image", "open-speech"])
@pytest.mark.parametrize("variant", ["mot", "hybrid"])
def test_beams_equal_recompute(tiny_model, variant, prompt):
    model = tiny_model(variant)
    kwargs = {"max_new_tokens": 8, "do_sample": False, "num_beams": 3, "num_return_sequences": 3}
    out = model.generate(row(PROMPTS[prompt]), **kwargs)
    assert out.tolist() == naive.beam_search(model, PROMPTS[prompt], 8, num_beams=3)


def test_num_return_sequences_samples_each_as_its_own_row(tiny_model):
    model = tiny_model()
    torch.manual_seed(3)
    out = model.generate(
        row(PROMPTS["text"]), max_new_tokens=8, do_sample=True, temperature=3.0, top_k=0, num_return_sequences=4
    )
    torch.manual_seed(3)
    assert out.tolist() == naive.sample(model, [PROMPTS["text"]] * 4, 8, temperature=3.0)


@pytest.mark.parametrize("prompt", ["text", "open-image"])
def test_assisted_decoding_equals_recompute(tiny_model, prompt):
    model, assistant = tiny_model(), tiny_model(num_hidden_layers=1)
    out = model.generate(row(PROMPTS[prompt]), max_new_tokens=12, do_sample=False, assistant_model=assistant)
    assert out[0].tolist() == naive.greedy(model, PROMPTS[prompt], 12)


def test_prompt_lookup_decoding_equals_recompute(tiny_model):
    model = tiny_model()
    out = model.generate(row(PROMPTS["after-image"]), max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3)
    assert out[0].tolist() == naive.greedy(model, PROMPTS["after-image"], 12)


def test_early_exit_decoding_equals_recompute(tiny_model):
    model = tiny_model()
    out = model.generate(row(PROMPTS["open-image"]), max_new_tokens=9, do_sample=False, assistant_early_exit=1)
    assert out[0].tolist() == naive.greedy(model, PROMPTS["open-image"], 9)


def test_an_assistant_of_text_alone_equals_recompute(tiny_model):
    model = tiny_model()
    assistant = LlamaForCausalLM(
        LlamaConfig(vocab_size=60, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    ).eval()
    prompt = row(PROMPTS["after-image"])
    inputs = {"input_ids": prompt, "modality_ids": model.model.modality_ids_of(prompt)}
    out = model.generate(**inputs, max_new_tokens=9, do_sample=False, assistant_model=assistant)
    assert out[0].tolist() == naive.greedy(model, PROMPTS["after-image"], 9)


class Collect(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


def test_streamer_gets_the_recomputed_tokens_in_order(tiny_model):
    model, streamer = tiny_model(), Collect()
    model.generate(row(PROMPTS["open-image"]), max_new_tokens=9, do_sample=False, streamer=streamer)
    assert streamer.tokens == naive.greedy(model, PROMPTS["open-image"], 9) and streamer.ended


def test_stopping_criteria_hold(tiny_model):
    criteria = StoppingCriteriaList([MaxLengthCriteria(7)])
    out = tiny_model().generate(row(PROMPTS["text"]), max_new_tokens=20, do_sample=False, stopping_criteria=criteria)
    assert out.shape == (1, 7)


# ---------------------------------------------------------------------- spans


@pytest.mark.parametrize("grid", [(2, 3), (1, 1), (3, 4)])
def test_an_image_has_exactly_the_grids_codes_then_eoi(tiny_model, grid):
    out = tiny_model().generate(row([1, 9, 3]), max_new_tokens=20, do_sample=True, image_grid=grid)[0].tolist()
    codes = out[3 : 3 + grid[0] * grid[1]]
    assert all(30 <= code < 45 for code in codes) and out[3 + len(codes)] == 4


def test_image_grid_of_the_call_wins_over_the_configurations(tiny_model):
    model = tiny_model()
    out = model.generate(row([1, 9, 3]), max_new_tokens=9, do_sample=False, image_grid=(2, 2))
    assert out[0].tolist() == naive.greedy(model, [1, 9, 3], 9, grid=(2, 2))


def test_speech_holds_units_and_ends_in_time(tiny_model):
    out = tiny_model().generate(row([1, 9, 5]), max_new_tokens=12, do_sample=True, top_k=0)[0].tolist()
    end = out.index(6)
    assert 1 <= end - 3 <= 4 and all(45 <= unit < 60 for unit in out[3:end])


def test_text_holds_neither_codes_nor_closing_markers(tiny_model):
    out = tiny_model(boi_token_id=None, eoi_token_id=None, begin_of_speech_token_id=None, end_of_speech_token_id=None)
    tokens = out.generate(row([1, 9]), max_new_tokens=3, do_sample=True, top_k=0)
    assert tokens.shape == (1, 5)
    model = tiny_model()
    for _ in range(20):
        first = model.generate(row([1, 9]), max_new_tokens=1, do_sample=True, temperature=9.0, top_k=0)[0, -1]
        assert first < 30 and first not in (4, 6)


def test_text_may_hold_tokens_appended_to_the_vocabulary(tiny_model):
    model = tiny_model()
    model.resize_token_embeddings(62)
    with torch.no_grad():
        model.lm_head.weight[61] = 100 * model(row([1, 9]), output_hidden_states=True).hidden_states[-1][0, -1]
    assert model.generate(row([1, 9]), max_new_tokens=1, do_sample=False)[0, -1] == 61


# ---------------------------------------------------------------------- ids of no token


DENSE_TEXT = {"modality_token_ranges": None, "boi_token_id": None, "eoi_token_id": None}
DENSE_TEXT |= {"begin_of_speech_token_id": None, "end_of_speech_token_id": None, "image_grid": None}
WITH_AND_WITHOUT_RANGES = pytest.mark.parametrize(
    ("variant", "fields"), [("mot", {}), ("dense", DENSE_TEXT)], ids=["ranges", "no ranges"]
)


def larger(model, rows=20):
    """The model with rows behind its vocabulary that it prefers to all tokens."""
    config = copy.deepcopy(model.config)
    config.vocab_size += rows
    made = MoTForCausalLM(config).eval()
    weights = model.state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = torch.cat([weights[name], 30 * torch.randn(rows, config.hidden_size)])
    made.load_state_dict(weights)
    return made


@WITH_AND_WITHOUT_RANGES
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_greedy_equals_the_model_without_the_rows_of_no_token(tiny_model, variant, fields, cache):
    model = tiny_model(variant, tokenizer_vocab_size=60, **fields)
    grown, settings = larger(model), {"max_new_tokens": 10, "do_sample": False, "cache_implementation": cache}
    assert torch.equal(grown.generate(row([1, 9, 12]), **settings), model.generate(row([1, 9, 12]), **settings))
    # The field is what keeps these ids out.
    grown.config.tokenizer_vocab_size = None
    assert grown.generate(row([1, 9, 12]), **settings).max() >= 60


WAYS = {
    "sampling": {"do_sample": True, "temperature": 5.0, "top_k": 0},
    "top-k": {"do_sample": True, "top_k": 70},
    "several": {"do_sample": True, "num_return_sequences": 4, "top_k": 0},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 3},
    "sampled beams": {"do_sample": True, "num_beams": 3, "top_k": 0},
    "generator": {"do_sample": True, "top_k": 0, "generator": torch.Generator().manual_seed(0)},
    "prompt lookup": {"do_sample": False, "prompt_lookup_num_tokens": 3},
    "guidance": {"do_sample": False, "guidance_scale": 3.0, "negative_prompt_ids": row([1, 7])},
    "no constraints": {"do_sample": True, "top_k": 0, "constrain_spans": False},
    "no cache": {"do_sample": True, "top_k": 0, "use_cache": False},
}


@WITH_AND_WITHOUT_RANGES
@pytest.mark.parametrize("way", WAYS)
def test_ids_of_no_token_are_never_sampled(tiny_model, variant, fields, way):
    model = larger(tiny_model(variant, tokenizer_vocab_size=60, **fields))
    assert model.generate(row([1, 9, 12, 9]), max_new_tokens=12, **WAYS[way]).max() < 60
    model.config.tokenizer_vocab_size = None
    assert model.generate(row([1, 9, 12, 9]), max_new_tokens=12, **WAYS[way]).max() >= 60


@WITH_AND_WITHOUT_RANGES
@pytest.mark.parametrize("do_sample", [False, True])
def test_an_assistant_proposes_no_ids_of_no_token(tiny_model, variant, fields, do_sample):
    fields = fields | {"tokenizer_vocab_size": 60}
    model, assistant = larger(tiny_model(variant, **fields)), larger(tiny_model(variant, num_hidden_layers=1, **fields))
    out = model.generate(row([1, 9, 12]), max_new_tokens=12, do_sample=do_sample, assistant_model=assistant)
    assert out.max() < 60


@WITH_AND_WITHOUT_RANGES
def test_a_server_samples_no_ids_of_no_token(tiny_model, variant, fields):
    model = larger(tiny_model(variant, tokenizer_vocab_size=60, **fields))
    results = model.generate_batch([[1, 9, 12], [1, 9]], max_new_tokens=12, do_sample=True, top_k=0)
    assert all(max(result.generated_tokens) < 60 for result in results.values())


def test_logits_and_scores_tell_hidden_ids_apart(tiny_model):
    model = larger(tiny_model(tokenizer_vocab_size=60))
    settings = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}
    out = model.generate(row([1, 9]), max_new_tokens=2, do_sample=False, **settings)
    assert all(logits.isfinite().all() for logits in out.logits)
    assert all(scores[:, 60:].isneginf().all() and scores[:, :60].isfinite().any() for scores in out.scores)


@pytest.mark.parametrize(
    ("before", "call", "rows", "after"),
    [
        (None, {"new_num_tokens": 62}, 62, None),
        (60, {"new_num_tokens": 62}, 62, None),  # tokens were added, and rows of no token are cut off
        (60, {"new_num_tokens": 90}, 90, None),
        (60, {"new_num_tokens": 62, "pad_to_multiple_of": 64}, 64, 62),
        (None, {"new_num_tokens": 85, "pad_to_multiple_of": 64}, 128, 85),
        (60, {"pad_to_multiple_of": 64}, 128, 60),
        (None, {"pad_to_multiple_of": 64}, 128, 80),
        (60, {}, 80, 60),
        (None, {}, 80, None),
    ],
)
def test_a_resized_vocabulary_knows_its_tokens(tiny_model, tmp_path, before, call, rows, after):
    model = tiny_model(vocab_size=80, tokenizer_vocab_size=before)
    model.resize_token_embeddings(**call)
    assert (model.config.vocab_size, model.config.tokenizer_vocab_size) == (rows, after)
    # The last token is likely, and rows of no token are likelier.
    last = (after or rows) - 1
    with torch.no_grad():
        likely = 100 * model(row([1, 9]), output_hidden_states=True).hidden_states[-1][0, -1]
        model.lm_head.weight[last], model.lm_head.weight[last + 1 :] = likely, 2 * likely
    model.save_pretrained(tmp_path)
    for one in (model, MoTForCausalLM.from_pretrained(tmp_path)):
        assert one.generate(row([1, 9]), max_new_tokens=1, do_sample=False, constrain_spans=False)[0, -1] == last


def test_rows_may_be_in_different_spans(tiny_model):
    prompts = [[1, 9, 3], [1, 9, 5], [1, 9, 10]]
    out = tiny_model().generate(torch.tensor(prompts), max_new_tokens=1, do_sample=False)[:, -1]
    assert 30 <= out[0] < 45 and 45 <= out[1] < 60 and out[2] < 30


def test_constraints_can_be_switched_off(tiny_model):
    model = tiny_model()
    out = model.generate(row([1, 9, 12]), max_new_tokens=8, do_sample=False, constrain_spans=False)[0].tolist()
    tokens = [1, 9, 12]
    for _ in range(8):
        tokens.append(int(naive.next_logits(model, tokens).argmax()))
    assert out == tokens


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("remove_invalid_values", [False, True])
def test_a_forced_end_wins_over_an_open_image(tiny_model, do_sample, remove_invalid_values):
    kwargs = {"do_sample": do_sample, "remove_invalid_values": remove_invalid_values}
    out = tiny_model().generate(row(PROMPTS["in-image"]), max_new_tokens=2, forced_eos_token_id=2, **kwargs)[0]
    assert 30 <= out[-2] < 45 and out[-1] == 2


def test_the_end_of_an_image_may_stop_each_row(tiny_model):
    model, prompts = tiny_model(), [[1, 9, 3], [1, 3, 31]]
    out = model.generate(torch.tensor(prompts), max_new_tokens=12, do_sample=False, eos_token_id=4).tolist()
    first, second = (naive.greedy(model, prompt, 7) for prompt in prompts)
    assert out == [first, second[:9] + [0]]


# ---------------------------------------------------------------------- budgets


BOI, EOI, BEGIN_SPEECH, END_SPEECH = 3, 4, 5, 6


def new_tokens(model, prompt, **kwargs):
    return model.generate(row(prompt), **({"do_sample": False} | kwargs))[0].tolist()[len(prompt) :]


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("budget", [1, 7, 8, 9, 20])
def test_an_image_begins_only_where_it_fits(tiny_model, budget, batched):
    settings = {"max_new_tokens": budget, "sequence_bias": {(BOI,): 100.0, (BEGIN_SPEECH,): -100.0}}
    if batched:
        request = {"input_ids": [1, 9], "do_sample": False, **settings}
        new = tiny_model().generate_batch([request])["req_0"].generated_tokens
    else:
        new = new_tokens(tiny_model(), [1, 9], **settings)
    whole = budget // 8  # six codes and two markers each
    assert new.count(BOI) == new.count(EOI) == whole and len(new) == budget
    assert sum(30 <= token < 45 for token in new) == 6 * whole


@pytest.mark.parametrize("most", [4, None])
@pytest.mark.parametrize("budget", [1, 2, 3, 4, 9])
def test_speech_begins_only_where_it_fits_and_ends_in_time(tiny_model, budget, most):
    model = tiny_model(max_speech_tokens=most)
    bias = {(BEGIN_SPEECH,): 100.0, (END_SPEECH,): -100.0, (BOI,): -100.0}
    new = new_tokens(model, [1, 9], max_new_tokens=budget, sequence_bias=bias)
    assert new.count(BEGIN_SPEECH) == new.count(END_SPEECH) and (BEGIN_SPEECH in new) == (budget >= 3)
    assert len(new) == budget


@pytest.mark.parametrize("opening, inside", [(BOI, range(30, 45)), (BEGIN_SPEECH, range(45, 60))])
def test_what_a_prompt_opens_is_as_long_as_it_is_asked_to_be(tiny_model, opening, inside):
    model = tiny_model(max_speech_tokens=None)
    new = new_tokens(model, [1, 9, opening], max_new_tokens=3, sequence_bias={(END_SPEECH,): -100.0})
    assert len(new) == 3 and all(token in inside for token in new)


def test_without_a_budget_text_is_as_long_as_transformers_has_it(tiny_model):
    model = tiny_model(max_position_embeddings=128)
    bias = {(BOI,): -100.0, (BEGIN_SPEECH,): -100.0}
    expected = new_tokens(model, [1, 9, 12], max_new_tokens=20, sequence_bias=bias)
    assert new_tokens(model, [1, 9, 12], sequence_bias=bias) == expected
    assert new_tokens(model, [1, 9, 12], sequence_bias=bias, num_beams=2) == new_tokens(
        model, [1, 9, 12], max_new_tokens=20, sequence_bias=bias, num_beams=2
    )
    assert len(new_tokens(model, [1, 9, 12], sequence_bias=bias, max_length=9)) == 6


@pytest.mark.parametrize("batched", [False, True])
def test_without_a_budget_an_open_image_is_finished(tiny_model, batched):
    model = tiny_model(max_position_embeddings=128, image_grid=[5, 6])
    if batched:
        request = {"input_ids": [1, 9, BOI], "do_sample": False}
        new = model.generate_batch([request])["req_0"].generated_tokens
    else:
        new = new_tokens(model, [1, 9, BOI])
    assert all(30 <= code < 45 for code in new[:30]) and new[30:] == [EOI]


@pytest.mark.parametrize("place", [0, 10, 19])
def test_without_a_budget_an_image_that_begins_is_finished(tiny_model, place):
    model = tiny_model(max_position_embeddings=128, image_grid=[5, 6])

    def opens(_, ids):
        return [BOI] if len(ids) == 2 + place else [9] if BOI not in ids or EOI in ids else list(range(60))

    new = new_tokens(model, [1, 9], prefix_allowed_tokens_fn=opens)
    assert new[:place] == [9] * place and new[place] == BOI and new[place + 31 :] == [EOI]


def test_without_a_budget_each_row_ends_by_itself(tiny_model):
    model = tiny_model(max_position_embeddings=128, image_grid=[5, 6], eos_token_id=2)
    bias = {(BOI,): -100.0, (BEGIN_SPEECH,): -100.0, (2,): -100.0}
    out = model.generate(torch.tensor([[1, 9, BOI], [1, 9, 12]]), do_sample=False, sequence_bias=bias).tolist()
    alone = new_tokens(model, [1, 9, 12], max_new_tokens=20, sequence_bias=bias)
    assert out[0][-1] == EOI and out[1] == [1, 9, 12, *alone, *[0] * 11]


@pytest.mark.parametrize("most, length", [(40, 41), (None, 61)])
def test_without_a_budget_open_speech_goes_on(tiny_model, most, length):
    model = tiny_model(max_position_embeddings=64, max_speech_tokens=most)
    new = new_tokens(model, [1, 9, BEGIN_SPEECH], sequence_bias={(END_SPEECH,): -100.0})
    assert len(new) == length and all(45 <= unit < 60 for unit in new[:40])


@pytest.mark.parametrize(
    "kwargs", [{"image_grid": 6}, {"image_grid": (6,)}, {"image_grid": (0, 3)}, {"max_speech_tokens": 0}]
)
def test_impossible_spans_are_refused(tiny_model, kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        tiny_model().generate(row([1, 9]), max_new_tokens=1, **kwargs)


def test_settings_in_the_generation_config_survive_saving(tiny_model, tmp_path):
    model = tiny_model()
    model.generation_config.image_grid = [1, 2]
    model.generation_config.max_speech_tokens = 2
    for _ in range(2):
        model.save_pretrained(tmp_path)
        model = MoTForCausalLM.from_pretrained(tmp_path)
    assert model.generation_config.max_speech_tokens == 2
    expected = naive.greedy(model, [1, 9, 3], 5, grid=(1, 2))
    assert model.generate(row([1, 9, 3]), max_new_tokens=5, do_sample=False)[0].tolist() == expected
    own = GenerationConfig(max_new_tokens=5, do_sample=False)
    assert model.generate(row([1, 9, 3]), generation_config=own)[0].tolist() == expected


# ---------------------------------------------------------------------- guidance


@pytest.mark.parametrize("variant", ["dense", "mot", "hybrid"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_guidance_equals_two_forwards(tiny_model, variant, use_cache):
    model = tiny_model(variant)
    prompt, negative = [1, 9, 12, 3], [1, 7, 3]

    def guided(tokens):
        conditional = naive.next_logits(model, tokens).log_softmax(-1)
        without = naive.next_logits(model, negative + tokens[len(prompt) :]).log_softmax(-1)
        return without + 2.5 * (conditional - without)

    out = model.generate(
        row(prompt),
        max_new_tokens=8,
        do_sample=False,
        guidance_scale=2.5,
        negative_prompt_ids=row(negative),
        use_cache=use_cache,
    )
    assert out[0].tolist() == naive.greedy(model, prompt, 8, rule=guided)


# ---------------------------------------------------------------------- modality ids


def test_given_modality_ids_route_the_prompt(tiny_model):
    model, prompt = tiny_model(), row(PROMPTS["text"])
    given = torch.tensor([[0, 1, 1, 0]])
    with torch.no_grad():
        first = model(prompt, modality_ids=given).logits[0, -1]
        out = model.generate(prompt, modality_ids=given, max_new_tokens=2, do_sample=False)
        second = model(out[:, :5], modality_ids=torch.cat([given, torch.tensor([[0]])], 1)).logits[0, -1]
    expected = [int(naive.constrain(s, t, model.config).argmax()) for s, t in ((first, [1]), (second, [1]))]
    assert out[0, 4:].tolist() == expected


ROUTED = torch.tensor([[0, 1, 2, 0, 1]])  # unlike the vocabulary's


def routed_greedy(model, prompt, steps):
    """Greedy without a cache, the prompt routed as `ROUTED` and what follows as text."""
    tokens = list(prompt)
    for _ in range(steps):
        modality_ids = torch.cat([ROUTED, ROUTED.new_zeros(1, len(tokens) - 5)], dim=1)
        with torch.no_grad():
            scores = model(row(tokens), modality_ids=modality_ids, token_choice=True, use_cache=False).logits[0, -1]
        tokens.append(int(scores[:30].argmax()))
    return tokens


@pytest.mark.parametrize("variant", ["mot", "hybrid"])
@pytest.mark.parametrize(
    "way", ["ids", "ids in chunks", "ids and embeddings", "embeddings", "cached", "cached embeddings"]
)
def test_given_modality_ids_hold_however_the_prompt_comes(tiny_model, variant, way):
    # Without span markers and with codes and units suppressed, text alone follows.
    markers = ("boi_token_id", "eoi_token_id", "begin_of_speech_token_id", "end_of_speech_token_id")
    model, prompt = tiny_model(variant, **dict.fromkeys(markers)), [1, 9, 12, 7, 20]
    expected = routed_greedy(model, prompt, 9)
    ids, embeddings = row(prompt), model.get_input_embeddings()(row(prompt))
    kwargs = {"modality_ids": ROUTED, "max_new_tokens": 9, "do_sample": False}
    kwargs["suppress_tokens"] = list(range(30, 60))
    if "cached" in way:
        with torch.no_grad():
            first = model(ids[:, :3], modality_ids=ROUTED[:, :3], token_choice=True, use_cache=True)
        kwargs["past_key_values"] = first.past_key_values
    if way == "cached":
        # The rest of the prompt alone, as the next turn of a conversation passes it.
        kwargs |= {"modality_ids": ROUTED[:, 3:], "attention_mask": torch.ones_like(ids)}
        assert model.generate(ids[:, 3:], **kwargs)[0].tolist() == expected[3:]
    elif "ids" in way:
        kwargs |= {"ids in chunks": {"prefill_chunk_size": 2}, "ids and embeddings": {"inputs_embeds": embeddings}}.get(
            way, {}
        )
        assert model.generate(ids, **kwargs)[0].tolist() == expected
    else:
        assert model.generate(inputs_embeds=embeddings, **kwargs)[0].tolist() == expected[5:]


def test_embeddings_beside_their_ids_are_routed_as_these(tiny_model):
    model, prompt = tiny_model(), PROMPTS["in-image"]
    embeddings = model.get_input_embeddings()(row(prompt))
    out = model.generate(row(prompt), inputs_embeds=embeddings, max_new_tokens=9, do_sample=False)
    assert out[0].tolist() == naive.greedy(model, prompt, 9)


def test_prompt_of_embeddings_equals_prompt_of_text_tokens(tiny_model):
    model, prompt = tiny_model(), PROMPTS["text"]
    embeddings = model.get_input_embeddings()(row(prompt))
    text = torch.zeros(1, len(prompt), dtype=torch.long)
    out = model.generate(inputs_embeds=embeddings, modality_ids=text, max_new_tokens=6, do_sample=False)
    assert out[0].tolist() == naive.greedy(model, prompt, 6)[len(prompt) :]


def test_embeddings_whose_tower_is_unknown_are_refused(tiny_model):
    model = tiny_model()
    embeddings = model.get_input_embeddings()(row(PROMPTS["text"]))
    for call in (model, lambda **kwargs: model.generate(max_new_tokens=2, **kwargs)):
        with pytest.raises(ValueError, match="inputs_embeds .* pass modality_ids"):
            call(inputs_embeds=embeddings)


def test_a_subclass_prepares_the_inputs_of_every_step(tiny_config):
    class Counting(MoTForCausalLM):
        steps = 0

        def prepare_inputs_for_generation(self, *args, **kwargs):
            self.steps += 1
            return super().prepare_inputs_for_generation(*args, **kwargs)

    model, prompt = Counting(tiny_config(initializer_range=0.3)).eval(), PROMPTS["text"]
    out = model.generate(row(prompt), max_new_tokens=6, do_sample=False)
    assert model.steps == 6 and out[0].tolist() == naive.greedy(model, prompt, 6)
    with pytest.raises(ValueError, match="prepare_inputs_for_generation of this Counting"):
        model.generate_batch([prompt], max_new_tokens=2)


def test_generate_takes_the_cache_by_both_of_its_names(tiny_model):
    model, prompt = tiny_model(), PROMPTS["text"]
    with torch.no_grad():
        cache, other = (model(row(prompt[:3]), use_cache=True).past_key_values for _ in range(2))
    settings = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    for names in ({"cache": copy.deepcopy(cache)}, {"past_key_values": copy.deepcopy(cache)}, {"cache": None}):
        out = model.generate(row(prompt), **names, **settings)
        assert out.sequences[0].tolist() == naive.greedy(model, prompt, 6)
        assert out.past_key_values.get_seq_length() == len(prompt) + 5
    with pytest.raises(ValueError, match="past_key_values and cache are two names of one argument"):
        model.generate(row(prompt), cache=cache, past_key_values=other, **settings)


class OfOldName(MoTForCausalLM):
    """Written for a transformers that calls the cache `past_key_values`."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, **kwargs):
        self.seen = past_key_values
        return super().forward(input_ids, attention_mask, position_ids, past_key_values, **kwargs)

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, **kwargs):
        assert past_key_values is not None
        return super().prepare_inputs_for_generation(input_ids, past_key_values=past_key_values, **kwargs)


class OfNewName(MoTForCausalLM):
    """Written for a transformers that calls the cache `cache`."""

    def forward(self, input_ids=None, cache=None, **kwargs):
        self.seen = cache
        return super().forward(input_ids, cache=cache, **kwargs)

    def prepare_inputs_for_generation(self, input_ids, cache=None, **kwargs):
        assert cache is not None
        return super().prepare_inputs_for_generation(input_ids, cache=cache, **kwargs)


@pytest.mark.parametrize("derived", [OfOldName, OfNewName])
@pytest.mark.parametrize("beams", [1, 2])
def test_a_subclass_gets_the_cache_by_the_name_that_it_has(tiny_config, derived, beams):
    model, prompt = derived(tiny_config(initializer_range=0.3)).eval(), PROMPTS["text"]
    out = model.generate(row(prompt), max_new_tokens=6, do_sample=False, num_beams=beams)
    assert model.seen.get_seq_length() == len(prompt) + 5
    expected = naive.greedy(model, prompt, 6) if beams == 1 else naive.beam_search(model, prompt, 6, beams)[0]
    assert out[0].tolist() == expected


def test_packed_rows_are_refused(tiny_model):
    with pytest.raises(ValueError, match="document_ids"):
        tiny_model().generate(row([1, 9]), document_ids=row([0, 0]), max_new_tokens=1)


def test_without_ranges_generation_is_refused():
    config = MoTConfig(vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    with pytest.raises(ValueError, match="modality_token_ranges"):
        MoTForCausalLM(config).generate(row([1, 9]), max_new_tokens=1)
