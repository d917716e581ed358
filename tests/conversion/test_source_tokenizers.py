"""The processor of a converted model against the tokenizer and the chat template of its source."""

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

from conversion.export_dense import export_dense
from conversion.towers import Wishes
from conversion.upcycle import upcycle
from conversion.vocabulary import Media
from modeling_mot import MoTForCausalLM, MoTProcessor
from modeling_mot.processing_prompts import CHAT_TEMPLATE
from modeling_mot.processing_vocabulary import extend_tokenizer
from tests.conversion.sources import save_source
from tests.conversion.tokenizer_sources import FAMILIES
from tests.modeling_mot.test_speech_tokenizer import tokenizer_with_random_units
from training.tokenizers.processor import continuous_processor


TEXTS = [
    "the cat", " the cat", "  two  spaces ", "a\n\nb\n", "", " ", "\n", "ünï 漢字 🍎", "x<|im_start|>y<|im_end|> z",
    "hello</s>",
]  # fmt: skip
CHATS = {
    "question": [{"role": "user", "content": "what is this?"}],
    "turns": [
        {"role": "user", "content": " the cat "},
        {"role": "assistant", "content": "sat"},
        {"role": "user", "content": "on <|im_end|> the mat"},
    ],
    "system": [{"role": "system", "content": "a system"}, {"role": "user", "content": "hello"}],
}


class Converted:
    """A source and what became of it, both loaded from their folders."""

    def __init__(self, folder, family):
        self.family, self.folder = family, folder
        tokenizer = family.build()
        tokenizer.chat_template = family.template
        ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
        torch.manual_seed(0)
        self.dense = save_source(folder / "source", family.model, vocab_size=len(tokenizer), **ids)
        tokenizer.save_pretrained(folder / "source")
        media = Media(image_codes=6, speech_units=5, image_grid=[2, 3])
        upcycle(str(folder / "source"), folder / "out", Wishes(media))
        self.source = AutoTokenizer.from_pretrained(folder / "source")
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "out")
        self.processor = MoTProcessor.from_pretrained(folder / "out")


@pytest.fixture(scope="module", params=FAMILIES)
def converted(request, tmp_path_factory):
    return Converted(tmp_path_factory.mktemp(request.param), FAMILIES[request.param])


@pytest.fixture(scope="module")
def chatting(converted):
    if converted.family.template is None:
        pytest.skip("the source has no chat template")
    return converted


def chat_ids(processor, chat, **options):
    return processor.apply_chat_template(chat, tokenize=True, **options)


def test_the_families_are_what_they_are_meant_to_be(converted):
    begins = converted.source("the cat")["input_ids"][0] == converted.source.bos_token_id
    assert begins == converted.family.begins


@pytest.mark.parametrize("text", TEXTS)
def test_plain_text_has_the_sources_ids(converted, text):
    expected = converted.source(text)["input_ids"]
    assert converted.processor(text=text)["input_ids"] == expected
    assert converted.tokenizer(text)["input_ids"] == expected


def test_batches_have_the_sources_ids(converted):
    expected = converted.source(TEXTS)["input_ids"]
    batch = converted.processor(text=TEXTS, padding=True, padding_side="left", return_tensors="pt")
    assert [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"])] == expected


@pytest.mark.parametrize("text", TEXTS[:4] + TEXTS[7:8])
def test_a_document_begins_as_a_text_does(converted, text):
    expected = converted.source(text)["input_ids"]
    if converted.source("")["input_ids"][-1:] == [converted.source.eos_token_id] and len(expected) > 1:
        expected = expected[:-1]  # documents end as they are asked to
    document, processor = [{"type": "text", "text": text}], converted.processor
    assert processor(document, add_eos=False)["input_ids"] == expected
    assert processor(document)["input_ids"] == [*expected, processor.tokenizer.eos_token_id]
    assert processor(document, continue_with="image")["input_ids"] == [*expected, processor.tokenizer.boi_token_id]
    first = expected[:1] if converted.family.begins else []
    assert processor([[]], continue_with="text")["input_ids"] == [first]


def test_the_model_knows_what_documents_begin_with(converted):
    config = MoTForCausalLM.from_pretrained(converted.folder / "out").config
    assert config.bos_token_id == (converted.source.bos_token_id if converted.family.begins else None)


def test_text_decodes_as_by_the_source(converted):
    for text in ("the cat", "ünï 漢字 🍎"):
        ids = converted.source(text, add_special_tokens=False)["input_ids"]
        assert converted.processor.decode_document(ids) == [{"type": "text", "text": converted.source.decode(ids)}]


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("prompted", [False, True])
def test_a_chat_of_text_has_the_sources_ids(chatting, chat, prompted):
    options = {"tokenize": True, "add_generation_prompt": prompted}
    expected = chatting.source.apply_chat_template(CHATS[chat], return_dict=False, **options)
    assert chat_ids(chatting.processor, CHATS[chat], add_generation_prompt=prompted) == expected
    assert chatting.tokenizer.apply_chat_template(CHATS[chat], return_dict=False, **options) == expected


def test_chats_in_a_batch_have_the_sources_ids(chatting):
    chats, options = list(CHATS.values()), {"tokenize": True, "return_dict": True}
    expected = chatting.source.apply_chat_template(chats, **options)["input_ids"]
    assert chatting.processor.apply_chat_template(chats, **options)["input_ids"] == expected


@pytest.mark.parametrize("chat", CHATS)
def test_a_rendered_chat_gets_no_second_begin_token(chatting, chat):
    rendered = chatting.processor.apply_chat_template(CHATS[chat], tokenize=False)
    assert rendered == chatting.source.apply_chat_template(CHATS[chat], tokenize=False)
    expected = chatting.source(rendered, add_special_tokens=not rendered.startswith(chatting.source.bos_token or "\0"))
    assert chatting.processor(text=rendered)["input_ids"] == expected["input_ids"]


def test_templates_go_by_name(tmp_path):
    made = Converted(tmp_path, FAMILIES["templates"])
    chat = CHATS["turns"]
    expected = made.source.apply_chat_template(chat, chat_template="short", tokenize=True, return_dict=False)
    assert chat_ids(made.processor, chat, chat_template="short") == expected


def test_messages_of_text_parts_are_their_text(chatting):
    parts = [{"type": "text", "text": "what is "}, {"type": "text", "text": "this?"}]
    chat, joined = ([{"role": "user", "content": content}] for content in (parts, "what is this?"))
    rendered = chatting.processor.apply_chat_template(chat, tokenize=False)
    if chatting.family.template == FAMILIES["gemma"].template:
        assert rendered == chatting.source.apply_chat_template(chat, tokenize=False)
    else:
        assert rendered == chatting.source.apply_chat_template(joined, tokenize=False)


def test_pictures_and_sounds_stand_where_they_are_in_the_message(chatting):
    parts = [{"type": "image"}, {"type": "text", "text": "what is"}, {"type": "audio"}, {"type": "text", "text": "?"}]
    chat = [*CHATS["turns"], {"role": "user", "content": parts}]
    spelled = [*CHATS["turns"], {"role": "user", "content": "<|image|>what is<|audio|>?"}]
    rendered = chatting.processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered == chatting.source.apply_chat_template(spelled, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("written", ["<|image|>", "<|boi|>", "a <|image_3|> b", "<|turn|>"])
def test_what_the_source_reads_as_text_is_text_in_a_chat(chatting, written):
    ids = chat_ids(chatting.processor, [{"role": "user", "content": written}])
    assert max(ids) < len(chatting.source)
    rendered = chatting.source.apply_chat_template([{"role": "user", "content": written}], tokenize=False)
    assert chatting.source.decode(ids).split() == chatting.source.decode(
        chatting.source(rendered, add_special_tokens=False)["input_ids"]
    ).split()  # fmt: skip


def test_a_source_without_a_template_gets_ours(tmp_path):
    assert Converted(tmp_path, FAMILIES["no-template"]).processor.chat_template == CHAT_TEMPLATE


@torch.no_grad()
def test_greedy_answers_are_the_sources(chatting):
    model = MoTForCausalLM.from_pretrained(chatting.folder / "out").eval()
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    settings = GenerationConfig(max_new_tokens=12, do_sample=False)
    for chat in CHATS.values():
        expected = chatting.source.apply_chat_template(chat, **options)["input_ids"]
        inputs = chatting.processor.apply_chat_template(chat, **options)
        answer = model.generate(**inputs, generation_config=settings)
        assert answer.tolist() == chatting.dense.generate(expected, generation_config=settings).tolist()


def test_with_pixels_for_pictures_text_keeps_its_ids(converted):
    made = continuous_processor(converted.processor, 16, 8)
    document = [{"type": "text", "text": "the cat"}]
    assert made(text=TEXTS)["input_ids"] == converted.source(TEXTS)["input_ids"]
    assert made(document)["input_ids"] == converted.processor(document)["input_ids"]


@pytest.mark.parametrize("begins", [False, True])
def test_with_pixels_and_speech_text_keeps_its_ids(begins):
    speech, source = tokenizer_with_random_units(), FAMILIES["llama3" if begins else "smollm3"].build()
    tokenizer = extend_tokenizer(FAMILIES["llama3" if begins else "smollm3"].build(), 0, 16, begins_texts=False)
    made = continuous_processor(MoTProcessor(tokenizer, None, speech), 16, 8, keep_speech=True)
    assert made(text=TEXTS)["input_ids"] == source(TEXTS)["input_ids"]


def test_exported_text_has_the_sources_tokenizer_again(converted):
    out = converted.folder / "dense"
    export_dense(str(converted.folder / "out"), out, vocab_size=len(converted.source))
    made = AutoTokenizer.from_pretrained(out)
    assert made.get_vocab() == converted.source.get_vocab() and made.chat_template == converted.source.chat_template
    assert made(TEXTS)["input_ids"] == converted.source(TEXTS)["input_ids"]
    names = ("bos_token", "eos_token", "pad_token")
    assert [getattr(made, name) for name in names] == [getattr(converted.source, name) for name in names]
