"""What a data section refuses, and that the message names field, value and way out."""

import pytest

from training.data import AugmentationConfig, DataConfig, SourceConfig, TemplateConfig
from training.data.reading.sources import open_source


TEMPLATE = [TemplateConfig(["text:name"])]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TemplateConfig([]), "segments is empty"),
        (lambda: TemplateConfig(["name"]), "segments has 'name'; write type:column"),
        (lambda: TemplateConfig(["picture:x"]), "segments has 'picture:x'"),
        (lambda: TemplateConfig(["image:{x}"]), "only a text can be a format"),
        (lambda: TemplateConfig(["text:a"], caption_first=80), "caption_first=80 must be at least 0 and at most 1"),
        (lambda: TemplateConfig(["text:a"], caption_dropout=-0.1), "caption_dropout=-0.1 must be at least 0 and at"),
        (lambda: TemplateConfig(["text:{a:>3000000000}"]), "a width has more than four digits"),
        (lambda: TemplateConfig(["text:{a:.{b}}"]), "no format over columns"),
        (lambda: TemplateConfig(["text:a"], weight=0), "weight=0 must be above 0"),
        (lambda: TemplateConfig(["document:a", "text:b"]), "give it alone"),
        (lambda: TemplateConfig(["text:a", "image:b", "text:c"]), "set caption_first: null"),
        (lambda: SourceConfig("x", "y", []), "source 'x' has no templates"),
        (lambda: SourceConfig("x", "y", TEMPLATE, limit=0), "source 'x': limit=0 must be at least 1"),
        (lambda: SourceConfig("x", "y", TEMPLATE, weight=float("nan")), "source 'x': weight=nan must be"),
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


NOT_FINITE = [float("nan"), float("inf"), float("-inf")]


@pytest.mark.parametrize("value", [*NOT_FINITE, 0, -1, 10**30])
@pytest.mark.parametrize(
    "name", ["max_pixels", "max_audio_seconds", "max_record_bytes", "max_group_bytes", "row_length", "block_documents"]
)
def test_a_limit_is_finite_and_positive(name, value):
    with pytest.raises(ValueError, match=f"{name}="):
        DataConfig(sources=[SourceConfig("x", "y", TEMPLATE)], **{name: value}).validate()


@pytest.mark.parametrize("value", [*NOT_FINITE, -1])
@pytest.mark.parametrize(
    ("section", "name"),
    [(SourceConfig, "weight"), (SourceConfig, "limit"), (TemplateConfig, "weight"), (TemplateConfig, "caption_first"),
     (TemplateConfig, "caption_dropout"), (DataConfig, "replaced_codes"), (DataConfig, "seed")]
    + [(AugmentationConfig, name) for name in (
        "variants", "seed", "shift", "brightness", "contrast", "saturation", "gain", "speed", "noise")],
)  # fmt: skip
def test_a_number_is_in_range(section, name, value):
    required = {SourceConfig: ("x", "y", TEMPLATE), TemplateConfig: (["text:name"],)}.get(section, ())
    with pytest.raises(ValueError, match=f"{name}="):
        made = section(*required, **{name: value})
        DataConfig(**vars(made) | {"sources": [SourceConfig("x", "y", TEMPLATE)]}).validate()


@pytest.mark.parametrize("field", ["name", "path", "config", "split", "revision"])
@pytest.mark.parametrize("value", ["a\0b", "a\ud800"])
def test_a_name_has_no_character_that_none_has(field, value):
    with pytest.raises(ValueError, match=f"{field}="):
        SourceConfig(**({"name": "x", "path": "y", "templates": TEMPLATE} | {field: value}))


def test_weights_that_add_up_to_more_than_a_number_holds_are_refused():
    with pytest.raises(ValueError, match="weights of the templates of source 'x' add up"):
        SourceConfig("x", "y", [TemplateConfig(["text:a"], weight=1e308), TemplateConfig(["text:b"], weight=1e308)])
    with pytest.raises(ValueError, match="weights of the sources add up"):
        DataConfig(sources=[SourceConfig(name, "y", TEMPLATE, weight=1e308) for name in "ab"]).validate()


def test_the_home_of_nobody_is_refused():
    written = "~nobody-of-this-name/data"
    for field, use in (
        ("cache_dir", lambda: DataConfig(cache_dir=written).cache_path),
        ("path of source 'x'", lambda: open_source(SourceConfig("x", written, TEMPLATE))),
    ):
        with pytest.raises(ValueError, match=f"{field}={written}.*write the path out"):
            use()


@pytest.mark.parametrize("path", ["/" + "a" * 300, "/a" * 3000])
def test_a_path_that_no_file_has_is_refused(path):
    with pytest.raises(ValueError, match="source 'x': path .*(cannot be read|does not exist)"):
        open_source(SourceConfig("x", path, TEMPLATE))


def test_speech_is_another_name_of_audio():
    template = TemplateConfig(["text:name", "speech:clip"])
    assert [str(segment) for segment in template.parsed] == ["text:name", "audio:clip"]
