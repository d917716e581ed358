"""Draw the losses of a run over its steps, and a sheet of its samples as a PNG and as one HTML file.

The report of finished runs (`training.report`) draws its loss curves with the functions of this module.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from training.optimization import DIFFUSION
from training.run_files.metrics import read_metrics, series, smooth


# The colours of the training loss, and of the held-out loss where a figure shows one run.
TRAINING_COLOUR, HELD_OUT_COLOUR = "#0072B2", "#D55E00"


def plot_losses(metrics: Path, output: Path, objectives: Sequence[str], title: str = "") -> None:
    """Draw a panel for each objective: the training loss, its running mean, the held-out loss.  JSONL -> PNG"""
    training, evaluation = read_metrics(metrics)
    figure = Figure(figsize=(4.2 * len(objectives), 3.4), layout="constrained")
    for axes, objective in zip(figure.subplots(1, len(objectives), squeeze=False)[0], objectives, strict=True):
        curve, held_out = series(training, f"loss_{objective}"), series(evaluation, f"eval/loss_{objective}")
        window = max(1, len(curve[0]) // 40)
        draw_loss(
            axes, curve, window, TRAINING_COLOUR, f"training (mean of {window} steps)" if window > 1 else "training"
        )
        draw_held_out(axes, held_out, HELD_OUT_COLOUR, "held out")
        frame_losses(axes, [curve[1]], [held_out[1]])
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
        axes.set(title=objective, xlabel="step", ylabel=loss_unit(objective))
        axes.grid(alpha=0.3)
    if title:
        figure.suptitle(title, fontsize=10)
    figure.savefig(output, dpi=120)


def draw_loss(axes: Axes, curve: tuple[np.ndarray, np.ndarray], window: int, colour: str, label: str = "") -> None:
    """Draw a training curve, (places, losses), faintly, and its running mean over it."""
    places, values = curve
    if len(places):
        axes.plot(*thinned(places, values), color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(*thinned(places, smooth(values, window)), color=colour, linewidth=1.5, label=label)


def draw_held_out(axes: Axes, curve: tuple[np.ndarray, np.ndarray], colour: str, label: str = "") -> None:
    """Draw a held-out curve, (places, losses), with a point for each evaluation while there is room for points."""
    if len(curve[0]):
        dots = {"marker": "o", "markersize": 4.5, "markeredgecolor": "white", "markeredgewidth": 0.7}
        style = dots if len(curve[0]) <= 40 else {}
        axes.plot(*curve, color=colour, linewidth=1, linestyle="--", label=label, **style)


def frame_losses(axes: Axes, training: Sequence[np.ndarray], held_out: Sequence[np.ndarray]) -> None:
    """Set limits that leave out the first fall of training, from log(vocabulary): the rest then fills the panel."""
    lows = [values.min() for values in (*training, *held_out) if len(values)]
    highs = [np.quantile(values, 0.98) for values in training if len(values)]
    highs += [values.max() for values in held_out if len(values)]
    if lows:
        low, high = min(lows), max(highs)
        margin = 0.05 * (high - low) or 0.05 * abs(low) or 0.05
        axes.set_ylim(low - margin, high + margin)


def thinned(places: np.ndarray, values: np.ndarray, count: int = 2000) -> tuple[np.ndarray, np.ndarray]:
    """Return at most 2 x `count` points that draw the same line: the least and greatest value of each stretch."""
    if len(places) <= 2 * count:
        return places, values
    begins = np.linspace(0, len(places), count, endpoint=False).astype(np.int64)
    ends = np.stack([np.minimum.reduceat(values, begins), np.maximum.reduceat(values, begins)], axis=1)
    return np.repeat(places[begins], 2), ends.ravel()


def loss_unit(objective: str) -> str:
    return "mean squared error" if objective == DIFFUSION else "nats per target"


@dataclass
class SampleSheet:
    """The samples that a run made at its end, for a person to look at.

    Attributes:
        title: the first line.
        figures: (what, value) shown above the samples.
        pictures: (name, original, its reconstruction by the tokenizer, drawn picture, name read off the original).
        held_out: the same for concepts that the run has not seen.
        spoken: (name, path of a WAV file).
        texts: (prompt, continuation).
        edits, held_out_edits: (instruction, source, target, drawn picture).
        held_out_label: what is said of the held-out names.
    """

    title: str
    figures: list[tuple[str, str]] = field(default_factory=list)
    pictures: list[tuple[str, Image.Image, Image.Image, Image.Image, str]] = field(default_factory=list)
    held_out: list[tuple[str, Image.Image, Image.Image, Image.Image, str]] = field(default_factory=list)
    spoken: list[tuple[str, Path]] = field(default_factory=list)
    texts: list[tuple[str, str]] = field(default_factory=list)
    edits: list[tuple[str, Image.Image, Image.Image, Image.Image]] = field(default_factory=list)
    held_out_edits: list[tuple[str, Image.Image, Image.Image, Image.Image]] = field(default_factory=list)
    held_out_label: str = "held out"

    def write_html(self, output: Path) -> None:
        """Write one file with pictures and sound inside; it needs no network and no other file."""
        template = page_template(Path(__file__).with_name("sheet.html.jinja"))
        output.write_text(template.render(sheet=self), encoding="utf-8")

    def write_png(self, output: Path, columns: int = 6) -> None:
        """Write a PNG of the pictures alone: three to a name, with the name below them."""
        # Lengths in pixels: a card is three pictures with gaps, over two lines of text.
        font = ImageFont.load_default(12)
        side, gap, line = 72, 4, 16
        width, height = 3 * side + 4 * gap, side + 2 * line + 3 * gap

        # Groups without pictures are left out; the others decide how high the sheet is.
        named = "original | reconstruction | drawn from the name; name, then what is read off"
        edited = "source | target | drawn"
        groups = [
            (f"Names seen in training: {named}", self.pictures),
            (f"Names {self.held_out_label}: {named}", self.held_out),
            (f"Edits of pictures seen: {edited}", self.edits),
            (f"Edits of others: {edited}", self.held_out_edits),
        ]
        groups = [(heading, pictures) for heading, pictures in groups if pictures]
        count = sum(2 * line + -(-len(pictures) // columns) * height for _, pictures in groups)
        sheet = Image.new("RGB", (columns * width + gap, max(count, line) + gap), "white")
        draw, top = ImageDraw.Draw(sheet), gap

        # Each group is a heading and rows of cards; `top` moves down the sheet.
        for heading, pictures in groups:
            draw.text((gap, top), heading, "black", font=font)
            top += 2 * line
            for index, (name, *rest) in enumerate(pictures):
                shown, read = rest[:3], "".join(rest[3:])
                left, upper = gap + index % columns * width, top + index // columns * height
                for place, picture in enumerate(shown):
                    sheet.paste(picture.convert("RGB").resize((side, side)), (left + place * (side + gap), upper))
                lines = ((name, "black"), (read, "green" if read == name else "firebrick"))
                for row, (text, colour) in enumerate(lines):
                    text = _fit(text, width - 2 * gap, font)
                    draw.text((left, upper + side + 2 + row * line), text, colour, font=font)
            top += -(-len(pictures) // columns) * height
        sheet.save(output)


def page_template(path: Path) -> jinja2.Template:
    """Load the Jinja template of an HTML page: it escapes every text, and knows the filters `base64` and `png`."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(path.parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"base64": _base64, "png": _png}
    return environment.get_template(path.name)


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def _fit(text: str, width: int, font: ImageFont.ImageFont) -> str:
    """Cut a text that is wider than `width` pixels, with three dots at its end."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
