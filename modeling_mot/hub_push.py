"""Loading, saving and pushing models and processors: whole checkpoints, no foreign code, a card on the Hub."""

import importlib
from pathlib import Path

from huggingface_hub import HfApi, ModelCard

from .hub_trust import check_index, forget_code, reading_weights


CARD = "README.md"
# transformers puts a card of blanks with this sentence into a repository that has none.
_OF_BLANKS = "This model card has been automatically generated."


class PushWithCard:
    """`push_to_hub` that gives a repository without a card that of this model.

    It stands before `PushToHubMixin` in the bases of a class.
    """

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
            return  # code from the Hub comes without the template of cards
        card = cards.model_card(path.parent, repo=repo_id)
        if added := [tag for tag in tags or [] if tag not in card.data.tags]:
            card = cards.model_card(path.parent, repo=repo_id, tags=[*card.data.tags, *added])
        card.save(path)


class PushWithoutCard(PushWithCard):
    """`push_to_hub` of a part of a model's repository, which leaves the card to the model."""

    def _write_card(self, path: Path, repo_id: str, tags: list[str] | None) -> None:
        path.unlink(missing_ok=True)


class CheckpointMixin(PushWithCard):
    """`from_pretrained`, `save_pretrained` and `push_to_hub` of a model, before `PreTrainedModel` in its bases."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """Load a model as transformers does, but refuse a checkpoint that lacks tensors or reaches outside its folder.

        Transformers fills missing tensors with random numbers and warns. With `output_loading_info` the list of missing
        tensors is returned instead of the error. A checkpoint of the bare transformer may lack the head.

        Raises:
            ValueError: tensors are missing, an index names files outside of its folder, or a file of weights is damaged
                or holds pickled objects.
        """
        check_index(pretrained_model_name_or_path, kwargs.get("subfolder"))
        with reading_weights(pretrained_model_name_or_path):
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        if output_loading_info:
            return model, info
        missing = info["missing_keys"]
        if "MoTModel" in (model.config.architectures or []):
            missing = [name for name in missing if not name.startswith("lm_head.")]
        if missing:
            raise ValueError(
                f"the checkpoint lacks {len(missing)} tensors of {cls.__name__}, {min(missing)!r} among them: is it "
                f"complete, and was it saved with these towers={model.config.towers}?"
            )
        return model

    def save_pretrained(self, *args, **kwargs):
        """Save as transformers does, naming no code that a loaded file named."""
        self.config.forget_loaded_code()
        if self.can_generate():
            forget_code(self.generation_config)
            # A generation configuration that is marked as derived loses `image_grid` and the like when it is read.
            self.generation_config._from_model_config = None
        return super().save_pretrained(*args, **kwargs)
