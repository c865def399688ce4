"""Makes the diagrams of docs/how-it-works.md, docs/pictures/road.svg and factors.svg, for light and dark pages."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "pictures"
STYLE = """<style>
text { font: 14px system-ui, sans-serif; fill: #111827; } .small { font-size: 12px; fill: #4b5563; }
rect.box { fill: #f9fafb; stroke: #9ca3af; rx: 8px; } path { stroke: #4b5563; fill: none; stroke-width: 1.5; }
.w { fill: #9ca3af; } .a { fill: #0072b2; } .b { fill: #e69f00; } .c { fill: #009e73; }
@media (prefers-color-scheme: dark) {
  text { fill: #e5e7eb; } .small { fill: #9ca3af; } rect.box { fill: #1f2937; stroke: #6b7280; }
  path { stroke: #9ca3af; } .w { fill: #6b7280; } .a { fill: #56b4e9; }
}
</style>"""
MARKER = '<marker id="to" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
MARKER = f'<defs>{MARKER}<path d="M0 0L8 4L0 8"/></marker></defs>'


def svg(name: str, width: int, height: int, title: str, parts: list[str]) -> None:
    """Write one picture, as wide as its place allows."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{title}">'
    text = "\n".join([head, f"<title>{title}</title>", STYLE, MARKER, *parts, "</svg>", ""])
    (FOLDER / name).write_text(text, encoding="utf-8")


def text(x: float, y: float, words: str, small: bool = False) -> str:
    kind = ' class="small"' if small else ""
    return f'<text x="{x}" y="{y}" text-anchor="middle"{kind}>{words}</text>'


def box(x: float, y: float, width: float, first: str, second: str) -> list[str]:
    middle = x + width / 2
    return [
        f'<rect class="box" x="{x}" y="{y}" width="{width}" height="58"/>',
        text(middle, y + 25, first),
        text(middle, y + 44, second, small=True),
    ]


def block(x: float, y: float, width: float, height: float, kind: str, opacity: float = 1) -> str:
    return f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}" opacity="{opacity:.2f}"/>'


def road() -> None:
    steps = [
        ("checkpoint", "dense, from the hub or yours"),
        ("plan", "method and shape per matrix"),
        ("student", "factors in their place"),
    ]
    later = [
        ("stage 1", "general text, hidden states"),
        ("stage 2", "task, vectors or labels"),
        ("folder, export", "from_pretrained, ONNX"),
    ]
    parts = []
    for line, row in enumerate((steps, later)):
        y = 20 + 120 * line
        for place, (first, second) in enumerate(row):
            x = 20 + 260 * place
            parts += box(x, y, 210, first, second)
            if place:
                parts.append(f'<path marker-end="url(#to)" d="M{x - 48} {y + 29}H{x - 4}"/>')
    parts.append('<path marker-end="url(#to)" d="M645 80V110H125V136"/>')
    parts += [text(385, 104, "taught by the dense model", small=True)]
    svg("road.svg", 770, 220, "The road from a checkpoint to a device", parts)


def factors() -> None:
    parts = [text(90, 24, "a matrix"), block(40, 40, 100, 100, "w"), text(90, 162, "m n parameters", small=True)]
    parts += [text(255, 24, "low rank"), block(205, 40, 16, 100, "a"), block(229, 40, 100, 16, "b")]
    parts += [text(262, 162, "U V: r (m + n)", small=True)]
    parts.append(text(520, 24, "Kronecker product"))
    weights = [[0.95, 0.35, 0.7], [0.25, 0.8, 0.5], [0.6, 0.45, 0.9]]
    for i, row in enumerate(weights):
        for j, weight in enumerate(row):
            parts.append(block(400 + 14 * j, 70 + 14 * i, 12, 12, "a", weight))
            parts.append(block(540 + 34 * j, 40 + 34 * i, 30, 30, "b", weight))
    parts += [block(466, 75, 30, 30, "b"), text(421, 62, "A", small=True), text(481, 62, "B", small=True)]
    parts += [text(454, 95, "\u2297"), text(518, 95, "=")]
    parts.append(text(520, 162, "every block is a number of A times B", small=True))
    parts.append(text(790, 24, "tensor train"))
    for place, (x, width, height, kind) in enumerate(
        ((700, 14, 44, "a"), (728, 44, 44, "b"), (786, 44, 44, "c"), (844, 44, 14, "a"))
    ):
        parts.append(block(x, 90 - height / 2, width, height, kind))
        if place:
            parts.append(f'<path d="M{x - 14} 90H{x}"/>')
    parts.append(text(790, 162, "a chain of small cores", small=True))
    svg("factors.svg", 920, 180, "A matrix as products of small ones", parts)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    road()
    factors()
