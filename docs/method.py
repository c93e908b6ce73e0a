"""Draw docs/method.svg, the figure of the README: python docs/method.py

The mask is one that pretraining could draw. The card behind the drawing is opaque, so that it reads on light and dark
pages alike.
"""

from pathlib import Path

from fcmae.masking import num_visible, random_mask

GRID = 7
SIDE = 126  # of an image, in units of the drawing
PATCH = SIDE // GRID
TOP = 78  # of the upper row
INK, SOFT, LINE, HIDDEN, TOKEN, STAGE, DENSE = (
    "#1f2933",
    "#52606d",
    "#9aa5b1",
    "#d5dae1",
    "#f2b84b",
    "#3f7fbf",
    "#5a9a6e",
)

MASK = random_mask((GRID, GRID), num_visible(GRID * GRID, 0.6), [(0, 3)])[0]
SCENE = """<symbol id="scene" viewBox="0 0 126 126"><rect width="126" height="126" fill="#a9d3ee"/>
<circle cx="93" cy="30" r="15" fill="#f7d154"/><path d="M0 84L34 40 62 78 82 56 126 98V126H0Z" fill="#7b8794"/>
<path d="M34 40L24 53l8 5 6-4 7 2Z" fill="#f5f7fa"/><path d="M0 90Q40 74 76 92T126 92V126H0Z" fill="#5f9e57"/>
<path d="M0 108Q50 94 126 116V126H0Z" fill="#3f7d4a"/><rect x="74" y="82" width="22" height="17" fill="#c65d3b"/>
<path d="M70 83L85 70 100 83Z" fill="#7c3a2a"/><rect x="82" y="89" width="6" height="10" fill="#f5e6c8"/></symbol>"""


def main() -> None:
    parts = [pretraining(), tuning()]
    svg = f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1160 470" font-family="Helvetica, Arial, sans-serif">
<title>FCMAE encodes visible patches and reconstructs hidden ones; the encoder is then converted and fine-tuned</title>
<defs>{SCENE}<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">
<path d="M0 0L8 4 0 8Z" fill="{SOFT}"/></marker></defs>
<rect width="1160" height="470" rx="12" fill="#ffffff"/>
{"".join(parts)}</svg>
"""
    Path(__file__).with_name("method.svg").write_text(svg)


def pretraining() -> str:
    y = TOP
    out = [text(20, 34, "Pretraining, without labels", 18, INK, "start", bold=True)]
    out += [image(20, y), caption(83, y, "image", "7 x 7 patches")]
    out += [arrow(150, y + 63, 174), image(178, y, hide=True), caption(241, y, "60 % hidden", "19 patches left")]
    out += [arrow(308, y + 63, 332), packed(338, y + 4), caption(391, y, "packed rows", "(B, K, b, b, C)")]
    out += [
        arrow(450, y + 63, 474),
        stages(480, y),
        caption(594, y, "four stages", "sites a patch: b x b = 64, 16, 4, 1"),
    ]
    out += [arrow(712, y + 63, 740), text(726, y + 52, "proj", 12)]
    out += [tokens(746, y), caption(809, y, "mask token", "in hidden patches")]
    out += [arrow(876, y + 63, 900), box(904, y + 18, 84, 90, DENSE, "dense", "decoder")]
    out += [text(946, y + SIDE + 22, "one block", 14, INK, bold=True), text(946, y + SIDE + 41, "of width 512", 13)]
    out += [
        arrow(992, y + 63, 1010),
        image(1014, y, only_hidden=True),
        caption(1077, y, "reconstruct", "hidden patches only"),
    ]
    return "".join(out)


def tuning() -> str:
    y = 330
    out = [text(712, y - 6, "Fine-tuning, with labels", 18, INK, "start", bold=True)]
    # The encoder goes down from the stages; everything right of it has done its work.
    out += [f'<path d="M594 {TOP + SIDE + 54}V{y + 14}" {stroke()} marker-end="url(#tip)"/>']
    out += [box(530, y + 18, 128, 76, STAGE, "encoder", "same weights")]
    out += [arrow(662, y + 56, 706), box(710, y + 18, 150, 76, DENSE, "dense", "GRN kept")]
    out += [arrow(864, y + 56, 908), box(912, y + 18, 128, 76, "#8b6bb1", "fine-tune", "new classifier")]
    out += [arrow(1044, y + 56, 1076), text(1082, y + 61, "class", 16, INK, "start", bold=True)]
    notes = (
        "Only the 7 x 7 depthwise convolution looks",
        "across patch borders; all else is dense",
        "algebra on the visible rows, and hidden",
        "pixels enter no computation.",
    )
    out += [text(20, y + 34 + 20 * i, note, 14, SOFT, "start") for i, note in enumerate(notes)]
    return "".join(out)


def image(x: int, y: int, hide: bool = False, only_hidden: bool = False) -> str:
    """The scene with its grid; hidden patches grey, or visible ones left out and hidden ones as if predicted."""
    out = [f'<use href="#scene" x="{x}" y="{y}" width="{SIDE}" height="{SIDE}"/>']
    for row, column in cells():
        place = f'x="{x + column * PATCH}" y="{y + row * PATCH}" width="{PATCH}" height="{PATCH}"'
        if hide and MASK[row, column]:
            out.append(f'<rect {place} fill="{HIDDEN}"/>')
        if only_hidden:
            out.append(f'<rect {place} fill="#ffffff" fill-opacity="{0.3 if MASK[row, column] else 1}"/>')
        stroke_color = LINE if only_hidden and not MASK[row, column] else "#ffffff"
        out.append(f'<rect {place} fill="none" stroke="{stroke_color}" stroke-width=".6" stroke-opacity=".8"/>')
    out.append(f'<rect x="{x}" y="{y}" width="{SIDE}" height="{SIDE}" fill="none" stroke="{LINE}"/>')
    return "".join(out)


def packed(x: int, y: int) -> str:
    """The visible patches cut out and put in row-major order."""
    out = []
    for i, (row, column) in enumerate(c for c in cells() if not MASK[c]):
        px, py = x + i % 4 * 27, y + i // 4 * 24
        window = f"{column * PATCH} {row * PATCH} {PATCH} {PATCH}"
        out.append(
            f'<svg x="{px}" y="{py}" width="{PATCH}" height="{PATCH}" viewBox="{window}">'
            f'<use href="#scene" width="{SIDE}" height="{SIDE}"/></svg>'
            f'<rect x="{px}" y="{py}" width="{PATCH}" height="{PATCH}" fill="none" stroke="{LINE}"/>'
        )
    return "".join(out)


def stages(x: int, y: int) -> str:
    """Each stage as one patch of b x b sites, in a column that narrows with the resolution."""
    out = []
    for i, (b, height) in enumerate(((8, 126), (4, 106), (2, 86), (1, 66))):
        left, top, cell = x + i * 58, y + (SIDE - height) // 2, 36 / b
        out.append(f'<rect x="{left}" y="{top}" width="50" height="{height}" rx="6" fill="{STAGE}"/>')
        for j in range(b * b):
            place = f'x="{left + 7 + j % b * cell:g}" y="{y + 45 + j // b * cell:g}" width="{cell:g}" height="{cell:g}"'
            out.append(f'<rect {place} fill="#e3eef9" stroke="{STAGE}" stroke-width=".8"/>')
    return "".join(out)


def tokens(x: int, y: int) -> str:
    """The grid that the decoder sees: encoded patches and mask tokens."""
    out = []
    for row, column in cells():
        fill = TOKEN if MASK[row, column] else STAGE
        place = f'x="{x + column * PATCH}" y="{y + row * PATCH}" width="{PATCH}" height="{PATCH}"'
        out.append(f'<rect {place} fill="{fill}" stroke="#ffffff"/>')
    return "".join(out)


def cells() -> list[tuple[int, int]]:
    return [(row, column) for row in range(GRID) for column in range(GRID)]


def box(x: int, y: int, width: int, height: int, fill: str, first: str, second: str) -> str:
    middle, center = x + width // 2, y + height // 2
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" fill="{fill}"/>'
        + text(middle, center - 3, first, 15, "#ffffff", bold=True)
        + text(middle, center + 16, second, 13, "#ffffff")
    )


def caption(x: int, y: int, first: str, second: str) -> str:
    return text(x, y + SIDE + 22, first, 14, INK, bold=True) + text(x, y + SIDE + 41, second, 13)


def text(x: int, y: int, words: str, size: int, fill: str = SOFT, anchor: str = "middle", *, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    words = words.replace(" x ", " \u00d7 ")
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{fill}" text-anchor="{anchor}"{weight}>{words}</text>'


def arrow(x: int, y: int, end: int) -> str:
    return f'<path d="M{x} {y}H{end}" {stroke()} marker-end="url(#tip)"/>'


def stroke() -> str:
    return f'fill="none" stroke="{SOFT}" stroke-width="1.6"'


if __name__ == "__main__":
    main()
