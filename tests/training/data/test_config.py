"""What a data section refuses, and that the message names field, value and way out."""

import pytest

from training.data import AugmentationConfig, DataConfig, SourceConfig, TemplateConfig


TEMPLATE = [TemplateConfig(["text:name"])]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TemplateConfig([]), "segments is empty"),
        (lambda: TemplateConfig(["name"]), "segments has 'name'; write type:column"),
        (lambda: TemplateConfig(["picture:x"]), "segments has 'picture:x'"),
        (lambda: TemplateConfig(["image:{x}"]), "only a text can be a format"),
        (lambda: TemplateConfig(["text:a"], caption_first=80), "caption_first=80 is not a probability"),
        (lambda: TemplateConfig(["text:a"], caption_dropout=-0.1), "caption_dropout=-0.1 is not a probability"),
        (lambda: TemplateConfig(["text:a"], weight=0), "weight=0 .* must be positive"),
        (lambda: TemplateConfig(["document:a", "text:b"]), "give it alone"),
        (lambda: TemplateConfig(["text:a", "image:b", "text:c"]), "set caption_first: null"),
        (lambda: SourceConfig("x", "y", []), "source 'x' has no templates"),
        (lambda: SourceConfig("x", "y", TEMPLATE, limit=0), "limit=0 of source 'x'"),
        (lambda: SourceConfig("x", "y", TEMPLATE, weight=float("nan")), "weight=nan of source 'x'"),
        (lambda: SourceConfig("x", "y", TEMPLATE, on_error="ignore"), "on_error='ignore' of source 'x' must be one of"),
        (lambda: AugmentationConfig(variants=0), "variants=0 must be at least 1"),
        (lambda: AugmentationConfig(shift=1.5), "shift=1.5 must be"),
        (lambda: DataConfig().validate(), "sources is empty"),
        (lambda: DataConfig(sources=[SourceConfig("x", "y", TEMPLATE)] * 2).validate(), "two sources named 'x'"),
        (lambda: DataConfig(row_length=2, sources=[SourceConfig("x", "y", TEMPLATE)]).validate(), "row_length=2"),
        (lambda: DataConfig(weights_by="rows", sources=[SourceConfig("x", "y", TEMPLATE)]).validate(), "weights_by='r"),
    ],
)  # fmt: skip
def test_a_bad_value_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_interleaved_text_is_allowed_in_written_order():
    TemplateConfig(["text:a", "image:b", "text:c"], caption_first=None)
