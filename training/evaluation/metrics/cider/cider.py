"""CIDEr of captions, as a module of `evaluate`: `evaluate.load("training/evaluation/metrics/cider")`.

`pycocoevalcap` computes it. This file imports public packages only, so that it can be pushed to the Hub as it is.
"""

import re
import shutil

import datasets
import evaluate
from pycocoevalcap.cider.cider import Cider as CocoCider
from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS, PTBTokenizer


_DESCRIPTION = """
CIDEr compares the n-grams of a caption (1 to 4 words, weighted by TF-IDF over all references) with those of its
references. The weights come from the references that are passed, so a figure belongs to one set: a published figure of
the Karpathy test split needs all of its pictures with all of their references. Published figures are often shown times
100. One picture alone has a CIDEr of 0, because each of its n-grams is in every document.
"""
_KWARGS_DESCRIPTION = """
Args:
    predictions: a caption for each picture.
    references: a list of captions for each picture.
    tokenizer: `ptb`, the tokenizer of published figures, which runs in Java; `simple`, words and signs by a regular
        expression; or `auto` (default): `ptb` if there is Java, else `simple`.

Returns:
    cider: the mean over all pictures; 1.0 is often written as 100.
    scores: the figure of each picture.
    tokenizer: `ptb` or `simple`; only `ptb` compares with published figures.

Examples:
    >>> cider = evaluate.load("training/evaluation/metrics/cider")
    >>> references = [["a red fox in snow", "a fox stands in the snow"], ["two boats on a lake"]]
    >>> results = cider.compute(predictions=["a red fox in snow", "a lake"], references=references, tokenizer="simple")
"""
_CITATION = """
@inproceedings{vedantam2015cider,
    title = {CIDEr: Consensus-based Image Description Evaluation},
    author = {Ramakrishna Vedantam and C. Lawrence Zitnick and Devi Parikh},
    booktitle = {CVPR},
    year = {2015}
}
"""
TOKENIZERS = ("auto", "ptb", "simple")


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class Cider(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(predictions=text, references=datasets.List(text)),
            codebase_urls=["https://github.com/salaniz/pycocoevalcap"],
            reference_urls=["https://arxiv.org/abs/1411.5726"],
        )

    def _compute(self, predictions: list[str], references: list[list[str]], tokenizer: str = "auto") -> dict:
        if tokenizer not in TOKENIZERS:
            raise ValueError(f"tokenizer={tokenizer!r}; it is one of {', '.join(TOKENIZERS)}")
        if tokenizer == "ptb" and shutil.which("java") is None:
            raise ValueError(
                "tokenizer='ptb' runs in Java, and there is no java on the PATH; install it, or use 'auto'"
            )
        if not predictions:
            raise ValueError("there are no captions, so there is no CIDEr")
        if without := [place for place, texts in enumerate(references) if not texts]:
            raise ValueError(f"pictures without a reference: {len(without)}, the first is number {without[0]}")
        if tokenizer == "auto":
            tokenizer = "ptb" if shutil.which("java") else "simple"

        # All texts are tokenised together; each picture then takes its own.
        counts = [len(texts) for texts in references]
        texts = [*predictions, *(text for of_picture in references for text in of_picture)]
        tokenised = iter(ptb(texts) if tokenizer == "ptb" else [simple(text) for text in texts])
        found = {place: [next(tokenised)] for place in range(len(predictions))}
        wanted = {place: [next(tokenised) for _ in range(count)] for place, count in enumerate(counts)}
        mean, scores = CocoCider().compute_score(wanted, found)
        return {"cider": float(mean), "scores": [float(score) for score in scores], "tokenizer": tokenizer}


def ptb(texts: list[str]) -> list[str]:
    """Tokenise by the Penn Treebank's rules, without punctuation; the words are joined by spaces."""
    # The tokenizer reads a line for each text, so a text must not hold another end of line, of any kind.
    lines = {place: line for place, text in enumerate(texts) if (line := " ".join(text.split()))}
    done = PTBTokenizer().tokenize({place: [{"caption": line}] for place, line in lines.items()}) if lines else {}
    if len(done) != len(lines):
        raise RuntimeError(f"the PTB tokenizer gave {len(done)} lines for {len(lines)}; is its Java program intact?")
    return [done[place][0] if place in lines else "" for place in range(len(texts))]


def simple(text: str) -> str:
    """Tokenise without Java: words and signs in lower case, without the punctuation that `ptb` leaves out."""
    words = re.findall(r"\w+|[^\w\s]", text.lower())
    return " ".join(word for word in words if word not in PUNCTUATIONS)
