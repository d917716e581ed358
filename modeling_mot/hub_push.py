"""`push_to_hub` of model and processor, with a card that says what they are."""

import importlib
from pathlib import Path

from huggingface_hub import HfApi, ModelCard


CARD = "README.md"
# transformers puts a card of blanks with this sentence into a repository that has none.
_OF_BLANKS = "This model card has been automatically generated."


class PushWithCard:
    """Before `PushToHubMixin` in the bases of a class: a repository without a card gets that of this model."""

    def _upload_modified_files(self, working_dir, repo_id, *args, token=None, **kwargs):
        path = Path(working_dir) / CARD
        is_blank = path.is_file() and _OF_BLANKS in path.read_text(encoding="utf-8")
        if (is_blank or not path.is_file()) and not HfApi().file_exists(repo_id, CARD, token=token):
            self._write_card(path, repo_id, ModelCard.load(path).data.tags if is_blank else [])
        return super()._upload_modified_files(working_dir, repo_id, *args, token=token, **kwargs)

    def _write_card(self, path: Path, repo_id: str, tags: list[str] | None) -> None:
        try:
            cards = importlib.import_module("model_cards.card")
        except ModuleNotFoundError:
            return  # code from the Hub, which comes without the template of cards
        card = cards.model_card(path.parent, repo=repo_id)
        if added := [tag for tag in tags or [] if tag not in card.data.tags]:
            card = cards.model_card(path.parent, repo=repo_id, tags=[*card.data.tags, *added])
        card.save(path)


class PushWithoutCard(PushWithCard):
    """For what is a part of a model's repository: the card is the model's affair."""

    def _write_card(self, path: Path, repo_id: str, tags: list[str] | None) -> None:
        path.unlink(missing_ok=True)
