"""The end of a run: what it draws, reads and speaks, how much of it is right, and the files that show it."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from modeling_mot import MoTPreTrainedModel, MoTProcessor
from training.evaluation.edits import Edit, edit_figures
from training.evaluation.fidelity import fitting_of, mean_psnr
from training.evaluation.retrieval import PictureGallery, retrieval_share
from training.evaluation.sampling import Sampler, write_wav
from training.evaluation.sheet import SampleSheet
from training.recipe import SamplesConfig


@dataclass
class NamedPicture:
    """A picture and the text that goes with it."""

    name: str
    image: Image.Image


@dataclass
class SampleSubjects:
    """What a run can be asked for.

    Attributes:
        held_in: named pictures that the run was trained on.
        held_out: named pictures that it was not.
        distractors: further pictures among which a drawn one must find its own.
        spoken: names for which the run has heard the sound.
        texts: beginnings of held-out running text.
        edits, held_out_edits: pictures to be changed, of concepts that the run was trained on and of others.
    """

    held_in: list[NamedPicture] = field(default_factory=list)
    held_out: list[NamedPicture] = field(default_factory=list)
    distractors: list[Image.Image] = field(default_factory=list)
    spoken: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    edits: list[Edit] = field(default_factory=list)
    held_out_edits: list[Edit] = field(default_factory=list)


def make_samples(
    model: MoTPreTrainedModel,
    processor: MoTProcessor,
    subjects: SampleSubjects,
    config: SamplesConfig,
    folder: Path,
    title: str,
    check_stop: Callable[[], None] = lambda: None,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    progress_bar: bool = False,
) -> tuple[SampleSheet, dict[str, float | int]]:
    """Write samples into `folder`; return the sheet and the measures. The last three arguments are `Sampler`'s.

    The measures are shares between 0 and 1: `drawn_right` (the nearest neighbour of the drawn picture, among
    `gallery_size` pictures, is the named one), `reconstructed_right` (the same for the original through the image
    tokenizer or the VAE and back, the ceiling of the former), `read_right` (the name read off is the name, letter by
    letter); and in dB `drawn_psnr` and `reconstructed_psnr`, means of the peak signal-to-noise ratio against the
    originals (a model that has several pictures for a name need not draw that one); each also as `held_out_...`. Those
    of edits are described at `edit_figures`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    was_training = model.training
    model.eval()
    sampler = Sampler(model, processor, config, check_stop, autocast, progress_bar)
    sheet, measures = SampleSheet(title), {}
    held_in = subjects.held_in[: config.measured]
    held_out = subjects.held_out[: config.held_out]
    if held_in and sampler.can_draw:
        pictures = [*subjects.held_in, *subjects.held_out]
        gallery = PictureGallery([p.image for p in pictures] + subjects.distractors)
        measures["gallery_size"] = len(gallery.descriptors)
        for prefix, group, first in (("", held_in, 0), ("held_out_", held_out, len(subjects.held_in))):
            if group:
                shown, figures = _pictures(sampler, gallery, group, range(first, first + len(group)), folder, prefix)
                measures.update({prefix + key: value for key, value in figures.items()})
                (sheet.held_out if prefix else sheet.pictures).extend(shown[: config.shown])
    if sampler.can_edit:
        for prefix, edits in (("", subjects.edits), ("held_out_", subjects.held_out_edits)):
            if edits:
                drawn = sampler.edit([(edit.source, edit.instruction) for edit in edits])
                measures.update({prefix + key: value for key, value in edit_figures(edits, drawn).items()})
                shown = [(e.instruction, e.source, e.target, picture) for e, picture in zip(edits, drawn, strict=True)]
                (sheet.held_out_edits if prefix else sheet.edits).extend(shown[: config.shown])
    if spoken := subjects.spoken[: config.spoken]:
        for place, (name, (audio, rate)) in enumerate(zip(spoken, sampler.speak(spoken), strict=True)):
            path = folder / f"spoken-{place:04d}-{_file_name(name)}.wav"
            write_wav(path, audio, rate)
            sheet.spoken.append((name, path))
    if texts := subjects.texts[: config.texts]:
        sheet.texts = list(zip(texts, sampler.continue_text(texts), strict=True))
        (folder / "texts.txt").write_text("".join(f"{a}|{b}\n" for a, b in sheet.texts), encoding="utf-8")
    sheet.figures = describe_measures(measures)
    model.train(was_training)
    return sheet, measures


def _pictures(
    sampler: Sampler,
    gallery: PictureGallery,
    group: list[NamedPicture],
    indices: Sequence[int],
    folder: Path,
    prefix: str,
) -> tuple[list, dict]:
    """Draw, reconstruct and read a group of named pictures; `indices` are their places in the gallery."""
    names, originals = [p.name for p in group], [p.image for p in group]
    drawn, rebuilt, read = sampler.draw(names), sampler.reconstruct(originals), sampler.read(originals)
    lines = []
    ranks = gallery.ranks(drawn, indices)
    for place, (name, image, text, rank) in enumerate(zip(names, drawn, read, ranks, strict=True)):
        image.save(folder / f"{prefix.replace('_', '-')}drawn-{place:04d}-{_file_name(name)}.png")
        lines.append(f"{name}\t{text}\t{rank}\n")
    header = "name\tread off the original\tgallery pictures nearer to the drawn one than the named\n"
    (folder / f"{prefix.replace('_', '-')}names.tsv").write_text(header + "".join(lines), encoding="utf-8")
    figures = {
        "drawn": len(drawn),
        "drawn_right": retrieval_share(ranks),
        "reconstructed_right": retrieval_share(gallery.ranks(rebuilt, indices)),
        "read_right": sum(text == name.strip() for text, name in zip(read, names, strict=True)) / len(names),
        "drawn_psnr": mean_psnr(drawn, originals, fitting_of(sampler.processor)),
        "reconstructed_psnr": mean_psnr(rebuilt, originals, fitting_of(sampler.processor)),
    }
    return list(zip(names, originals, rebuilt, drawn, read, strict=True)), figures


def describe_measures(measures: dict[str, float | int]) -> list[tuple[str, str]]:
    """The measures as lines for people."""
    lines = []
    for prefix, what in (("", "held-in"), ("held_out_", "held-out")):
        if prefix + "drawn" not in measures:
            continue
        count, size = measures[prefix + "drawn"], measures["gallery_size"]
        lines.append((
            f"pictures drawn from {count} {what} names whose nearest of {size} pictures is the named one",
            f"{measures[prefix + 'drawn_right']:.1%} (encoded and decoded originals, the ceiling: "
            f"{measures[prefix + 'reconstructed_right']:.1%})",
        ))  # fmt: skip
        lines.append(
            (f"names read off {count} {what} pictures, letter by letter", f"{measures[prefix + 'read_right']:.1%}")
        )
        lines.append((
            f"mean peak signal-to-noise ratio of {count} {what} drawn pictures against the originals",
            f"{measures[prefix + 'drawn_psnr']:.1f} dB (encoded and decoded originals: "
            f"{measures[prefix + 'reconstructed_psnr']:.1f} dB)",
        ))  # fmt: skip
    for prefix, what in (("", "held-in"), ("held_out_", "held-out")):
        if prefix + "edited" in measures:
            lines.append((
                f"edits of {measures[prefix + 'edited']} {what} pictures nearer to the target than to the source",
                f"{measures[prefix + 'nearer_to_target']:.1%} (median ratio of the two distances: "
                f"{measures[prefix + 'distance_ratio']:.2f})",
            ))  # fmt: skip
    return lines


def _file_name(name: str) -> str:
    """A name that is safe as part of a file name."""
    safe = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in name.strip().lower())
    return "-".join(part for part in safe.split("-") if part)[:60] or "unnamed"
