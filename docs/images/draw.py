"""Draw the diagrams of README and docs as SVG: `python docs/images/draw.py` writes them beside this file."""

import itertools
from dataclasses import dataclass
from html import escape
from pathlib import Path

INK, PAPER, EDGE, MUTED = "#1f2937", "#ffffff", "#64748b", "#475569"
DATA, COMPUTE, STORE, VISUAL, AUDIO, JOINT = "#e0f2fe", "#ede9fe", "#fef3c7", "#dcfce7", "#ffe4e6", "#ede9fe"
FONT = "font-family='Helvetica, Arial, sans-serif'"


@dataclass(frozen=True, kw_only=True)
class Box:
    """A labeled rectangle; `title` in bold, `lines` below it. Units are pixels."""

    x: float
    y: float
    width: float
    height: float
    title: str
    lines: tuple[str, ...] = ()
    fill: str = PAPER

    def svg(self) -> str:
        """The rectangle and its text, centered."""
        top = self.y + self.height / 2 - 8 * len(self.lines) + 5
        texts = [f"<text x='{self.x + self.width / 2}' y='{top}' font-weight='bold'>{escape(self.title)}</text>"]
        for number, line in enumerate(self.lines, 1):
            texts.append(
                f"<text x='{self.x + self.width / 2}' y='{top + 16 * number}' font-size='12' fill='{MUTED}'>"
                f"{escape(line)}</text>"
            )
        rectangle = (
            f"<rect x='{self.x}' y='{self.y}' width='{self.width}' height='{self.height}' rx='8' fill='{self.fill}' "
            f"stroke='{EDGE}'/>"
        )
        return rectangle + "".join(texts)

    def side(self, name: str) -> tuple[float, float]:
        """The middle of a side: left, right, top or bottom."""
        x, y = self.x + self.width / 2, self.y + self.height / 2
        return {
            "left": (self.x, y),
            "right": (self.x + self.width, y),
            "top": (x, self.y),
            "bottom": (x, self.y + self.height),
        }[name]


def arrow(start: tuple[float, float], end: tuple[float, float], label: str = "") -> str:
    """An arrow; along a bend where the two points share neither row nor column. `label` stands at its middle."""
    (x1, y1), (x2, y2) = start, end
    middle = (x1 + x2) / 2
    path = f"M{x1} {y1} L{x2} {y2}" if y1 == y2 or x1 == x2 else f"M{x1} {y1} H{middle} V{y2} H{x2}"
    text = ""
    if label:
        text = f"<text x='{middle}' y='{(y1 + y2) / 2 - 7}' font-size='12' fill='{MUTED}'>{escape(label)}</text>"
    return _line(path) + text


def _line(path: str) -> str:
    return f"<path d='{path}' fill='none' stroke='{EDGE}' stroke-width='1.6' marker-end='url(#arrow)'/>"


def picture(width: int, height: int, title: str, parts: list[str]) -> str:
    """The whole SVG document, on a white ground so that it is readable in dark mode."""
    head = (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' width='{width}' height='{height}' "
        f"role='img' aria-label='{escape(title)}' {FONT} font-size='14' fill='{INK}' text-anchor='middle'>"
        f"<title>{escape(title)}</title>"
        "<defs><marker id='arrow' viewBox='0 0 10 10' refX='9' refY='5' markerWidth='7' markerHeight='7' orient='auto'>"
        f"<path d='M0 0 L10 5 L0 10 z' fill='{EDGE}'/></marker></defs>"
        f"<rect width='{width}' height='{height}' rx='12' fill='{PAPER}'/>"
    )
    return head + "\n".join(parts) + "</svg>\n"


def pipeline() -> str:
    """From feature files to predicted events, with the tool behind each step."""
    width, height, gap = 138, 78, 26
    steps = (
        ("Feature files", ("10 HDF5 files", "AVE format"), DATA),
        ("Validate", ("every fault, with", "file, key and row"), COMPUTE),
        ("Search", ("Optuna", "median pruning"), COMPUTE),
        ("Train", ("full or weak mode", "tracked in MLflow"), COMPUTE),
        ("Release", ("ONNX + parity check", "int8, float16"), COMPUTE),
        ("Predict", ("ONNX Runtime", "resumable batch job"), COMPUTE),
        ("Events", ("segments.parquet", "events.parquet"), DATA),
    )
    boxes = [
        Box(x=20 + number * (width + gap), y=92, width=width, height=height, title=title, lines=lines, fill=fill)
        for number, (title, lines, fill) in enumerate(steps)
    ]
    total = int(boxes[-1].x + width + 20)
    parts = [
        f"<rect x='{boxes[1].x - 12}' y='52' width='{boxes[5].x + width - boxes[1].x + 24}' height='136' rx='10' "
        f"fill='none' stroke='{EDGE}' stroke-dasharray='5 4'/>",
        f"<text x='{(boxes[1].x + boxes[5].x + width) / 2}' y='40' fill='{MUTED}'>"
        "one Prefect flow, one `cmran pipeline` command, one `mlflow run` entry point</text>",
        *(box.svg() for box in boxes),
        *(arrow(a.side("right"), b.side("left")) for a, b in itertools.pairwise(boxes)),
    ]
    stores = (
        (2, "Studies", ("SQLite, PostgreSQL",)),
        (3, "Runs and artifacts", ("MLflow tracking",)),
        (4, "Model registry", ("champion, challenger",)),
    )
    for number, title, lines in stores:
        store = Box(x=boxes[number].x, y=222, width=width, height=56, title=title, lines=lines, fill=STORE)
        parts += [store.svg(), arrow(boxes[number].side("bottom"), store.side("top"))]
    # The batch job fetches its model from the registry.
    registry, predict = (boxes[4].x + width, 250.0), boxes[5].side("bottom")
    parts.append(_line(f"M{registry[0]} {registry[1]} H{predict[0]} V{predict[1]}"))
    return picture(total, 298, "From feature files to events: validate, search, train, release, predict", parts)


def architecture() -> str:
    """The network with the shape of each tensor, at the published sizes."""
    visual = Box(
        x=20,
        y=40,
        width=150,
        height=64,
        title="Visual maps",
        lines=("B x 10 x 7 x 7 x 512", "VGG-19 pool5"),
        fill=VISUAL,
    )
    audio = Box(
        x=20, y=236, width=150, height=64, title="Audio embeddings", lines=("B x 10 x 128", "VGGish"), fill=AUDIO
    )
    attention = Box(
        x=214,
        y=40,
        width=176,
        height=64,
        title="Spatial-channel",
        lines=("attention, guided by audio", "B x 10 x 512"),
        fill=VISUAL,
    )
    visual_temporal = Box(
        x=434,
        y=40,
        width=164,
        height=64,
        title="Temporal relation",
        lines=("2 encoder layers", "B x 10 x 256"),
        fill=VISUAL,
    )
    audio_temporal = Box(
        x=434,
        y=236,
        width=164,
        height=64,
        title="Temporal relation",
        lines=("2 encoder layers", "B x 10 x 256"),
        fill=AUDIO,
    )
    visual_cross = Box(
        x=654,
        y=40,
        width=176,
        height=64,
        title="Cross-modal relation",
        lines=("visual attends to audio", "B x 10 x 256"),
        fill=VISUAL,
    )
    audio_cross = Box(
        x=654,
        y=236,
        width=176,
        height=64,
        title="Cross-modal relation",
        lines=("audio attends to visual", "B x 10 x 256"),
        fill=AUDIO,
    )
    interaction = Box(
        x=874,
        y=138,
        width=150,
        height=64,
        title="Interaction",
        lines=("product attends to both", "B x 10 x 256"),
        fill=JOINT,
    )
    event = Box(
        x=1068, y=84, width=160, height=60, title="Event head", lines=("event or background", "B x 10"), fill=DATA
    )
    category = Box(
        x=1068,
        y=196,
        width=160,
        height=60,
        title="Category head",
        lines=("maximum over time", "B x 28 (weak: 29)"),
        fill=DATA,
    )
    boxes = [
        visual, audio, attention, visual_temporal, audio_temporal, visual_cross, audio_cross, interaction,
        event, category,
    ]  # fmt: skip
    pairs = (
        (visual, attention), (attention, visual_temporal), (audio, audio_temporal), (visual_cross, interaction),
        (audio_cross, interaction), (interaction, event), (interaction, category),
    )  # fmt: skip
    parts = [box.svg() for box in boxes]
    parts += [arrow(a.side("right"), b.side("left")) for a, b in pairs]
    # The audio guides the attention.
    guided = attention.side("bottom")
    parts.append(arrow((guided[0], audio.side("right")[1]), guided))
    # The query of a cross-modal relation is what enters the temporal relation, the memory is what leaves the other one.
    for source, cross, side, y in ((attention, visual_cross, "top", 20), (audio, audio_cross, "bottom", 320)):
        (x1, y1), (x2, y2) = source.side(side), cross.side(side)
        parts.append(_line(f"M{x1} {y1} V{y} H{x2} V{y2}"))
        parts.append(f"<text x='{(x1 + x2) / 2}' y='{y - 5}' font-size='12' fill='{MUTED}'>query</text>")
    for temporal, cross, bend in ((visual_temporal, audio_cross, 618), (audio_temporal, visual_cross, 634)):
        (x1, y1), (x2, y2) = temporal.side("right"), cross.side("left")
        # Apart from each other where they cross.
        offset = 10 if temporal is audio_temporal else -10
        parts.append(_line(f"M{x1} {y1 + offset} H{bend} V{y2 + offset} H{x2}"))
    parts.append(f"<text x='520' y='176' font-size='12' fill='{MUTED}'>memory for the other modality</text>")
    return picture(1248, 336, "The CMRAN network: 9.5 million parameters in fully supervised mode", parts)


if __name__ == "__main__":
    for name, text in (("pipeline", pipeline()), ("architecture", architecture())):
        (Path(__file__).parent / f"{name}.svg").write_text(text, encoding="utf-8")
