"""What the data cards of sources declare is found, and nothing is made up."""

from training.data.config import DataConfig, SourceConfig, TemplateConfig
from training.data.reading.sources import data_cards


def config_of(*paths):
    templates = [TemplateConfig(segments=["text:name"])]
    return DataConfig(
        sources=[SourceConfig(name=f"s{i}", path=str(p), templates=templates) for i, p in enumerate(paths)]
    )


def test_the_carried_data_declare_their_licences_and_whom_to_name():
    card = data_cards(config_of("carried", "carried"))["carried"]
    assert (card["license"], card["license_name"], card["language"]) == ("other", "by-part", "en")
    assert card["attribution"].startswith("- Pictures: Noto Emoji, Copyright Google Inc., Apache-2.0")
    assert "Princeton University" in card["attribution"] and "## Rebuilding" not in card["attribution"]


def test_folders_without_a_card_and_names_on_the_hub_declare_nothing(tmp_path):
    assert data_cards(config_of(tmp_path, "someone/pets")) == {}


def test_a_card_says_no_more_than_its_head(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n\n# Pets\n")
    assert data_cards(config_of(tmp_path)) == {str(tmp_path): {"license": "mit"}}


def test_a_card_that_cannot_be_read_is_said_and_passed_over(tmp_path, caplog):
    (tmp_path / "README.md").write_text("---\nlicense: [mit\n---\n")
    assert data_cards(config_of(tmp_path)) == {}
    assert "README.md is not read, its licence is not in the manifest" in caplog.text
