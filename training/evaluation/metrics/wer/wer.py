"""Word error rate of transcripts, as a module of `evaluate`: `evaluate.load("training/evaluation/metrics/wer")`.

`jiwer` computes it. This file imports public packages only, so that it can be pushed to the Hub as it is.
"""

import datasets
import evaluate
import jiwer


_DESCRIPTION = """
The word error rate is the number of substituted, deleted and inserted words over the number of words of the references,
summed over all texts. It can be more than 1. The character error rate is the same of characters.
"""
_KWARGS_DESCRIPTION = """
Args:
    predictions: a transcript for each sound.
    references: the spoken text of each sound.
    normalise: True (default): letters in lower case and no punctuation, on both sides; False: the texts as they are.

Returns:
    wer, cer: word and character error rate.
    substitutions, deletions, insertions, words: numbers of words; `words` is that of the references.
    normalised: `normalise`.

Examples:
    >>> wer = evaluate.load("training/evaluation/metrics/wer")
    >>> wer.compute(predictions=["hello word"], references=["Hello, world!"])["wer"]
    0.5
"""
_CITATION = """
@inproceedings{morris2004wer,
    title = {From WER and RIL to MER and WIL: improved evaluation measures for connected speech recognition},
    author = {Andrew Cameron Morris and Viktoria Maier and Phil Green},
    booktitle = {Interspeech},
    year = {2004}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class WordErrorRate(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(predictions=text, references=text),
            codebase_urls=["https://github.com/jitsi/jiwer"],
            reference_urls=["https://en.wikipedia.org/wiki/Word_error_rate"],
        )

    def _compute(self, predictions: list[str], references: list[str], normalise: bool = True) -> dict:
        if not predictions:
            raise ValueError("there are no texts, so there is no word error rate")
        plain = [jiwer.ToLowerCase(), jiwer.RemovePunctuation()] if normalise else []
        tidy = [*plain, jiwer.RemoveMultipleSpaces(), jiwer.Strip()]
        words = jiwer.Compose([*tidy, jiwer.ReduceToListOfListOfWords()])
        letters = jiwer.Compose([*tidy, jiwer.ReduceToListOfListOfChars()])
        found = jiwer.process_words(list(references), list(predictions), words, words)
        if not found.hits + found.substitutions + found.deletions:
            raise ValueError("the references hold no words, so there is no rate; `normalise` leaves punctuation out")
        spelled = jiwer.process_characters(list(references), list(predictions), letters, letters)
        return {
            "wer": float(found.wer),
            "cer": float(spelled.cer),
            "substitutions": found.substitutions,
            "deletions": found.deletions,
            "insertions": found.insertions,
            "words": found.hits + found.substitutions + found.deletions,
            "normalised": normalise,
        }
