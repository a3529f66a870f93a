"""One self-contained HTML page of what was looked into, to be sent around: no other file, no address."""

from __future__ import annotations

import base64
import html
import io
import json
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from lavi.errors import UserError, reason
from lavi.inspection.answer import Inspection, View

SIDE = 280
"""Pixels of a view on the page."""

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em; color: #222; }
h1 { font-size: 1.3em; } h2 { font-size: 1.05em; margin-top: 2em; }
.words span { display: inline-block; padding: 2px 5px; margin: 2px 1px; border-radius: 3px; white-space: pre; }
.words span { cursor: pointer; }
.words span.chosen { outline: 2px solid #06c; } .words span.answer { font-weight: bold; }
.views { display: flex; flex-wrap: wrap; gap: 10px; } .view { position: relative; }
.view img { width: SIDEpx; height: SIDEpx; display: block; image-rendering: auto; }
.view canvas { position: absolute; inset: 0; width: SIDEpx; height: SIDEpx; }
table { border-collapse: collapse; font-size: 12px; } td, th { padding: 2px 6px; text-align: right; }
th { font-weight: normal; color: #666; white-space: pre; } .note { color: #666; max-width: 50em; }
.scroll { overflow-x: auto; }
""".replace("SIDE", str(SIDE))

SCRIPT = """
const data = JSON.parse(document.getElementById("data").textContent);
const spans = [...document.querySelectorAll(".words span")];
function paint(maps) {
  const top = Math.max(1e-9, ...maps.flat(2));
  document.querySelectorAll(".view canvas").forEach((canvas, number) => {
    const cells = maps[number], context = canvas.getContext("2d");
    canvas.width = cells[0].length; canvas.height = cells.length;
    cells.forEach((row, y) => row.forEach((value, x) => {
      context.fillStyle = `rgba(255, 60, 0, ${0.75 * value / top})`; context.fillRect(x, y, 1, 1); }));
  });
}
function choose(index) {
  spans.forEach((span, number) => span.classList.toggle("chosen", number === index));
  const what = document.getElementById("what");
  if (!what) return;  // nothing is drawn of visual tokens that lie on no grid
  if (index === null || !data.words) { paint(data.answer); what.textContent = data.about_answer; return; }
  paint(data.words[index]); what.textContent = "What the word reads: " + spans[index].textContent.trim();
}
spans.forEach((span, number) => span.addEventListener("click", () =>
  choose(span.classList.contains("chosen") ? null : number)));
choose(null);
"""

ABOUT_ANSWER = (
    "What the answer depends on (gradient times feature). Click a word to see what it reads; again to come back."
)
ABOUT_ANSWER_ALONE = "What the answer depends on (gradient times feature)."


def write_page(inspected: Inspection, file: Path, *, run: str) -> None:
    """Write the page.

    Raises:
        UserError: it cannot be written.
    """
    try:
        file.write_text(page(inspected, run=run), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file} cannot be written ({reason(error)}).") from None


def page(inspected: Inspection, *, run: str) -> str:
    """The page as HTML."""
    title = html.escape(f"{inspected.question} - {inspected.answer}")
    parts = [
        f"<h1>{title}</h1><p class=note>{html.escape(run)}</p>",
        _words(inspected),
        _views(inspected),
        _strength(inspected),
        _cka(inspected),
        _routes(inspected),
        f'<script type="application/json" id="data">{_data(inspected)}</script><script>{SCRIPT}</script>',
    ]
    head = f"<meta charset=utf-8><title>{title}</title><style>{STYLE}</style>"
    return f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def _words(inspected: Inspection) -> str:
    """The tokens, the more strongly modulated the darker."""
    strength = inspected.mean_strength or [0.0] * len(inspected.words)
    top = max([*strength, 1e-9])
    spans = [
        f'<span class="{"answer" if index in inspected.answer_tokens else ""}" title="{value:.3f}" '
        f'style="background:rgba(0,110,200,{0.55 * value / top:.3f})">{html.escape(word)}</span>'
        for index, (word, value) in enumerate(zip(inspected.words, strength, strict=True))
    ]
    note = (
        "Blue: how strongly a token's norms are modulated, the mean over norms. Bold: the answer."
        if inspected.strength
        else "Bold: the answer. No norm is modulated in this model."
    )
    return f"<h2>Words</h2><p class=words>{''.join(spans)}</p><p class=note>{note}</p>"


def _views(inspected: Inspection) -> str:
    if not inspected.views:
        note = "The visual tokens lie on no grid: where they look cannot be drawn." if len(inspected.relevance) else ""
        return f"<p class=note>{note}</p>"
    shown = "".join(
        f'<div class=view><img alt="" src="{_png(view.pixels)}"><canvas></canvas></div>' for view in inspected.views
    )
    return f"<h2>Where it looks</h2><p id=what class=note></p><div class=views>{shown}</div>"


def _strength(inspected: Inspection) -> str:
    if not inspected.strength:
        return ""
    top = max(value for values in inspected.strength.values() for value in values) or 1.0
    rows = [
        f"<tr><th>{target}</th>{''.join(_cell(value, value / top, '0,110,200') for value in values)}</tr>"
        for target, values in inspected.strength.items()
    ]
    words = "".join(f"<th>{html.escape(word.strip() or '·')}</th>" for word in inspected.words)
    note = "The length of what the image adds to a norm's output, over the length of the output without it."
    table = f"<div class=scroll><table><tr><th></th>{words}</tr>{''.join(rows)}</table></div>"
    return f"<h2>Strength of the modulation</h2><p class=note>{note}</p>{table}"


def _cka(inspected: Inspection) -> str:
    if inspected.cka is None or len(inspected.words) < 3:
        return ""
    names = ["embeddings", *(f"layer {number}" for number in range(len(inspected.cka) - 1))]
    rows = [
        f"<tr><th>{name}</th>{''.join(_cell(value, value**4, '200,80,0') for value in values)}</tr>"
        for name, values in zip(names, inspected.cka.tolist(), strict=True)
    ]
    note = "Linear CKA of the text's states, between layers: 1 where one is a rotation of the other."
    head = "".join(f"<th>{name}</th>" for name in names)
    table = f"<div class=scroll><table><tr><th></th>{head}</tr>{''.join(rows)}</table></div>"
    return f"<h2>How alike layers are</h2><p class=note>{note}</p>{table}"


def _routes(inspected: Inspection) -> str:
    if not inspected.routes:
        return ""
    return f"<h2>Way through the decoder</h2><p>Layers that refine: {html.escape(str(inspected.routes[0]))}</p>"


def _cell(value: float, weight: float, colour: str) -> str:
    return f'<td style="background:rgba({colour},{0.7 * max(0.0, min(1.0, weight)):.3f})">{value:.2f}</td>'


def _data(inspected: Inspection) -> str:
    shares = inspected.mean_shares
    data = {
        "answer": _maps(inspected.views, inspected.relevance),
        "words": None if shares is None else [_maps(inspected.views, weights) for weights in shares],
        "about_answer": ABOUT_ANSWER if shares is not None else ABOUT_ANSWER_ALONE,
    }
    return json.dumps(data).replace("</", "<\\/")


def _maps(views: list[View], weights: Tensor) -> list[list[list[float]]]:
    return [[[round(value, 5) for value in row] for row in view.cells(weights).tolist()] for view in views]


def _png(pixels: Tensor | None) -> str:
    if pixels is None:
        pixels = torch.full((8, 8, 3), 0.9)
    stream = io.BytesIO()
    Image.fromarray((255 * pixels).round().to(torch.uint8).numpy()).save(stream, "PNG")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
