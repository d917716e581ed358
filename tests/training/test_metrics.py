"""The modules of `evaluate` give the figures of the packages that they wrap, offline."""

import shutil
from pathlib import Path

import evaluate
import jiwer
import numpy as np
import pytest
import torch
from PIL import Image
from pycocoevalcap.cider.cider import Cider
from scipy.linalg import sqrtm
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

import training.evaluation


METRICS = Path(training.evaluation.__file__).parent / "metrics"
NAMES = sorted(path.name for path in METRICS.iterdir() if path.is_dir() and not path.name.startswith("_"))
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZES = {"image_size": 32, "patch_size": 16}
FIT = {"size": {"height": 32, "width": 32}}


def load(name):
    return evaluate.load(str(METRICS / name), keep_in_memory=True)


@pytest.fixture(scope="module")
def pictures():
    """Two sets of 12 pictures, the second brighter."""
    random = np.random.default_rng(0)
    dark, bright = random.integers(0, 160, (12, 40, 40, 3)), random.integers(90, 256, (12, 40, 40, 3))
    return [[Image.fromarray(values.astype(np.uint8)) for values in some] for some in (dark, bright)]


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """The folder of a tiny vision model."""
    folder = str(tmp_path_factory.mktemp("networks") / "tiny-vit")
    torch.manual_seed(0)
    ViTModel(ViTConfig(**VISION, **SIZES, initializer_range=0.5)).save_pretrained(folder)
    ViTImageProcessorPil(**FIT).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return tiny_clip(str(tmp_path_factory.mktemp("networks") / "tiny-clip"))


def tiny_clip(folder):
    """Save a tiny CLIP model; return its folder."""
    words = {word: place for place, word in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", "a", "red", "fox", "boat"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    special = {f"{name}_token": f"<{name}>" for name in ("pad", "bos", "eos", "unk")}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    text = VISION | {"vocab_size": 8, "max_position_embeddings": 8, "eos_token_id": 2, "bos_token_id": 1}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config=VISION | SIZES, projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    fit = {"size": {"height": 32, "width": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPProcessor(CLIPImageProcessorPil(**fit), fast).save_pretrained(folder)
    return folder


def mean_colours(some):
    """A network without weights: the means and deviations of the colours.  -> (N, 6)"""
    values = torch.stack([torch.from_numpy(np.array(picture, dtype=np.float32)) for picture in some]).flatten(1, 2)
    return torch.cat([values.mean(1), values.std(1)], dim=1) / 64


# ---------------------------------------------------------------------------------------------------------------- all


@pytest.mark.parametrize("name", NAMES)
def test_a_module_says_what_it_is_and_stands_alone(name):
    module = load(name)
    assert module.description and module.citation and module.inputs_description and module.reference_urls
    source = (METRICS / name / f"{name}.py").read_text()
    assert "import modeling_mot" not in source and "from modeling_mot" not in source and "from training" not in source


def test_both_distances_read_their_network_with_the_same_lines():
    mark = "# ------------------------------------------------------- the network"
    of_fid, of_kid = ((METRICS / name / f"{name}.py").read_text().partition(mark)[2] for name in ("fid", "kid"))
    assert of_fid and of_fid == of_kid


# -------------------------------------------------------------------------------------------------------------- cider

CAPTIONS = ["A red fox sits in the snow.", "two boats", ""]
REFERENCES = [
    ["a red fox in snow", "A fox sits, in the snow!"],
    ["Two boats on a lake", "there's a boat"],
    ["an empty street", "nobody's here"],
]


def test_cider_without_java_is_that_of_pycocoevalcap():
    found = load("cider").compute(predictions=CAPTIONS, references=REFERENCES, tokenizer="simple")
    plain = {0: ["a red fox sits in the snow"], 1: ["two boats"], 2: [""]}
    wanted = {
        0: ["a red fox in snow", "a fox sits in the snow"],
        1: ["two boats on a lake", "there s a boat"],
        2: ["an empty street", "nobody s here"],
    }
    score, scores = Cider().compute_score(wanted, plain)
    assert found["cider"] == pytest.approx(score) and found["scores"] == pytest.approx(list(scores))
    assert found["tokenizer"] == "simple" and 0 < found["cider"] < 10


@pytest.mark.skipif(shutil.which("java") is None, reason="the PTB tokenizer runs in Java")
def test_cider_with_java_is_that_of_cocos_own_evaluation():
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    found = load("cider").compute(predictions=CAPTIONS, references=REFERENCES)
    sides = ([[text] for text in CAPTIONS], REFERENCES)
    made, given = ({i: [{"caption": t} for t in texts] for i, texts in enumerate(side)} for side in sides)
    score, _ = Cider().compute_score(PTBTokenizer().tokenize(given), PTBTokenizer().tokenize(made))
    assert found["cider"] == pytest.approx(score) and found["tokenizer"] == "ptb"


@pytest.mark.skipif(shutil.which("java") is None, reason="the PTB tokenizer runs in Java")
def test_ends_of_lines_inside_a_caption_move_no_other_caption():
    broken = ["A red fox\rsits\u2028in the\nsnow.", "two\u0085boats", " \n"]
    whole = [load("cider").compute(predictions=p, references=REFERENCES)["scores"] for p in (broken, CAPTIONS)]
    assert whole[0] == pytest.approx(whole[1])


def test_cider_without_java_names_its_tokenizer_and_refuses_ptb(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert load("cider").compute(predictions=CAPTIONS, references=REFERENCES)["tokenizer"] == "simple"
    with pytest.raises(ValueError, match="runs in Java"):
        load("cider").compute(predictions=CAPTIONS, references=REFERENCES, tokenizer="ptb")


def test_a_picture_without_references_is_refused():
    with pytest.raises(ValueError, match="pictures without a reference: 1, the first is number 1"):
        load("cider").compute(predictions=["a", "b"], references=[["a"], []], tokenizer="simple")


# ---------------------------------------------------------------------------------------------------------------- wer


def test_word_error_rate_is_that_of_jiwer():
    said, heard = ["the quick brown fox", "hello world"], ["the brown box", "hello wide world"]
    found = load("wer").compute(predictions=heard, references=said)
    assert found["wer"] == pytest.approx(jiwer.wer(said, heard)) and found["cer"] == pytest.approx(
        jiwer.cer(said, heard)
    )
    assert (found["substitutions"], found["deletions"], found["insertions"], found["words"]) == (1, 1, 1, 6)


def test_letters_and_punctuation_count_only_when_asked():
    texts = {"predictions": ["hello world"], "references": ["Hello, world!"]}
    assert load("wer").compute(**texts)["wer"] == 0 and load("wer").compute(**texts, normalise=False)["wer"] == 1


@pytest.mark.parametrize("name", ["wer", "cider", "clip_score"])
def test_a_figure_of_nothing_is_refused(name):
    with pytest.raises(ValueError, match="so there is no"):
        load(name).compute(predictions=[], references=[])


def test_references_without_words_have_no_rate_and_some_among_others_count_their_insertions():
    with pytest.raises(ValueError, match="the references hold no words"):
        load("wer").compute(predictions=["a"], references=["!"])
    assert load("wer").compute(predictions=["a", "b c"], references=["", "b d"])["wer"] == 2 / 2


def test_a_transcript_of_nothing_is_all_deletions():
    assert load("wer").compute(predictions=["", "a"], references=["a b", "a"])["deletions"] == 2


# --------------------------------------------------------------------------------------------------- pictures of a set


def test_frechet_distance_is_that_of_torchmetrics_and_of_the_formula(pictures):
    drawn, real = pictures
    found = load("fid").compute(predictions=drawn, references=real, feature_network=mean_colours, batch_size=5)
    metric = FrechetInceptionDistance(feature=_Module(mean_colours, 6))
    metric.update(stacked(drawn), real=False), metric.update(stacked(real), real=True)
    assert found["frechet_distance"] == pytest.approx(float(metric.compute()), rel=1e-3)

    # Heusel et al. (2017), equation 6.
    one, other = (mean_colours(some).double().numpy() for some in pictures)
    spread = [np.cov(values, rowvar=False) for values in (one, other)]
    means = ((one.mean(0) - other.mean(0)) ** 2).sum()
    formula = means + np.trace(spread[0] + spread[1] - 2 * sqrtm(spread[0] @ spread[1]).real)
    assert found["frechet_distance"] == pytest.approx(formula, rel=1e-6)
    assert found["feature_network"] == "function" and found["pictures"] == 12


def test_kernel_distance_is_that_of_torchmetrics(pictures):
    drawn, real = pictures
    settings = {"subsets": 5, "subset_size": 8}
    state = torch.get_rng_state()
    found = load("kid").compute(predictions=drawn, references=real, feature_network=mean_colours, seed=3, **settings)
    assert torch.equal(state, torch.get_rng_state())
    metric = KernelInceptionDistance(_Module(mean_colours, 6), **settings)
    metric.update(stacked(drawn), real=False), metric.update(stacked(real), real=True)
    torch.manual_seed(3)
    mean, deviation = metric.compute()
    assert found["kernel_distance"] == pytest.approx(float(mean), rel=1e-4)
    assert found["kernel_distance_std"] == pytest.approx(float(deviation), rel=1e-3)


class _Module(torch.nn.Module):
    def __init__(self, function, num_features):
        super().__init__()
        self.function = function
        self.num_features = num_features

    def forward(self, pixels):
        return self.function([Image.fromarray(values) for values in pixels.numpy()])


def stacked(some):
    """(N, H, W, 3) uint8"""
    return torch.stack([torch.from_numpy(np.array(picture)) for picture in some])


def test_vectors_are_the_pooled_output_of_a_vision_model(pictures, vit):
    model, processor = AutoModel.from_pretrained(vit), ViTImageProcessorPil.from_pretrained(vit)

    def pooled(some):
        with torch.no_grad():
            return model(**processor(some, return_tensors="pt")).pooler_output

    drawn, real = pictures
    for name, key in (("fid", "frechet_distance"), ("kid", "kernel_distance")):
        found = load(name).compute(predictions=drawn, references=real, feature_network=vit)
        same = load(name).compute(predictions=drawn, references=real, feature_network=pooled)
        assert found[key] == pytest.approx(same[key], rel=1e-4) and found[key] > 0
        assert found["feature_network"] == "tiny-vit"


def test_a_clip_model_can_be_the_network(pictures, clip):
    drawn, real = pictures
    found = load("fid").compute(predictions=drawn, references=real, feature_network=clip)
    assert found["frechet_distance"] > 0 and "fid" not in found


@pytest.mark.parametrize("name", ["fid", "kid"])
def test_inception_without_its_package_is_refused(name, pictures, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install torch-fidelity"):
        load(name).compute(predictions=pictures[0], references=pictures[1])


@pytest.mark.parametrize("name", ["fid", "kid", "clip_score"])
def test_a_batch_of_no_picture_is_refused(name, pictures):
    network = {"feature_network": mean_colours} if name != "clip_score" else {}
    references = pictures[1] if name != "clip_score" else ["a picture"] * len(pictures[0])
    with pytest.raises(ValueError, match="batch_size=0; at least one"):
        load(name).compute(predictions=pictures[0], references=references, batch_size=0, **network)


@pytest.mark.parametrize("name", ["fid", "kid"])
def test_one_picture_is_no_set(name, pictures):
    with pytest.raises(ValueError, match="there are 1"):
        load(name).compute(predictions=pictures[0][:1], references=pictures[1][:1], feature_network=mean_colours)


# --------------------------------------------------------------------------------------------------------- clip score


def test_clip_score_is_the_cosine_of_the_embeddings(pictures, clip):
    captions = ["a red fox", "a boat", "boat"]
    found = load("clip_score").compute(predictions=pictures[0][:3], references=captions, clip=clip, batch_size=2)
    model, processor = CLIPModel.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)
    with torch.no_grad():
        output = model(**processor(text=captions, images=pictures[0][:3], return_tensors="pt", padding=True))
    cosine = torch.nn.functional.cosine_similarity(output.image_embeds, output.text_embeds).mean()
    assert found["clip_score"] == pytest.approx(max(0.0, 100 * float(cosine)), rel=1e-3, abs=1e-4)
    assert found["clip"] == "tiny-clip" and found["pictures"] == 3
