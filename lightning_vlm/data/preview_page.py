"""Previews as text for a terminal and as HTML for a browser or a notebook.

Text from data is shown, never obeyed: HTML is escaped, and characters that do not show or that steer a terminal are
written out (an escape as ``\\x1b``). The page needs no script, no network and no style of its surroundings, and follows
light and dark mode; trained text is told from other text without colours too.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Sequence

from PIL import Image

from lightning_vlm.data.preview_image import TILE_LINE, TOKEN_LINE, PreviewImage
from lightning_vlm.data.preview_sample import Preview
from lightning_vlm.data.preview_sound import PreviewSound
from lightning_vlm.data.preview_video import PreviewVideo

_Medium = PreviewImage | PreviewVideo | PreviewSound

# Controls but for tab and newline, what turns the direction of writing, and what has no width. The joiner of emoji
# (U+200D) is not among them.
_HIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff]")
_TRAINED, _OTHER, _MARKER, _BAD, _HEADING = "1;32", "2", "36", "31", "1"


def visible(text: str) -> str:
    r"""Text with its hidden characters written out, e.g. ``\x1b`` or ``\u200b``.

    Args:
        text: Text from data.
    """
    return _HIDDEN.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def counts_of(preview: Preview) -> str:
    """The token counts of a sample in one line."""
    media: dict[str, Sequence[_Medium]] = {"image": preview.images, "video": preview.videos, "sound": preview.sounds}
    kinds = [_said(kind, [medium.num_tokens for medium in found]) for kind, found in media.items() if found]
    kinds = kinds or ["0 image"]
    return f"{preview.num_tokens:,} tokens: {', '.join(kinds)}, {preview.num_label_tokens:,} trained"


def render_text(previews: Sequence[Preview], title: str, notes: Sequence[str], color: bool) -> str:
    """Previews for a terminal.

    Args:
        previews: The samples.
        title: Stands on top.
        notes: Stand below the title.
        color: Write ANSI colours; without, trained text stands in double brackets.
    """
    ends = "" if color else " and stands in [[ ]]"
    lines = [_paint(title, _HEADING, color), *(f"note: {visible(note)}" for note in notes)]
    lines.append(f"Trained text is {_paint('on lines marked +', _TRAINED, color)}{ends}.")
    for number, preview in enumerate(previews, start=1):
        heading = f"sample {number} of {len(previews)} (index {preview.index})  {visible(preview.source)}"
        lines += ["", _paint(heading, _HEADING, color)]
        if preview.error is not None:
            lines.append("  ! " + _paint(visible(str(preview.error)), _BAD, color))
            continue
        lines.append(f"  {counts_of(preview)}")
        lines += [f"  {caption}" for _, caption in _captioned(preview)]
        lines += [f"  note: {note}" for note in preview.notes]
        lines += _text_lines(preview, color)
    return "\n".join(lines)


def render_fragment(previews: Sequence[Preview], title: str, notes: Sequence[str]) -> str:
    """Previews as HTML to be put into a page, with a style that touches nothing else there.

    Args:
        previews: The samples.
        title: Stands on top.
        notes: Stand below the title.
    """
    body = "\n".join(_card(number, preview) for number, preview in enumerate(previews, start=1))
    told = "".join(f"<p class=note>{_escape(note)}</p>" for note in notes)
    head = f"<h2>{_escape(title)}</h2>{told}\n{_LEGEND}"
    return f"<style>{_STYLE}</style>\n<div class=vlm-preview>\n{head}\n{body}\n</div>\n"


def render_page(previews: Sequence[Preview], title: str, notes: Sequence[str]) -> str:
    """Previews as one self-contained HTML page.

    Args:
        previews: The samples.
        title: Stands on top.
        notes: Stand below the title.
    """
    return _PAGE.format(title=_escape(title), body=render_fragment(previews, title, notes))


def data_uri(image: Image.Image, lossless: bool = True) -> str:
    """A picture as an address that holds it.

    Args:
        image: The picture.
        lossless: As PNG; otherwise as JPEG where that is smaller.
    """
    encoded = {}
    for name in ("png",) if lossless else ("png", "jpeg"):
        buffer = io.BytesIO()
        image.save(buffer, format=name, quality=90)
        encoded[name] = buffer.getvalue()
    name = min(encoded, key=lambda name: len(encoded[name]))
    return f"data:image/{name};base64,{base64.b64encode(encoded[name]).decode()}"


def _said(kind: str, tokens: Sequence[int]) -> str:
    each = f" ({' + '.join(f'{number:,}' for number in tokens)})" if len(tokens) > 1 else ""
    return f"{sum(tokens):,} {kind}{each}"


def _paint(text: str, code: str, color: bool) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if color and text else text


def _text_lines(preview: Preview, color: bool) -> list[str]:
    """The text, each line marked by whether any of it is trained."""
    lines, marks = [""], [False]
    for piece in preview.pieces:
        shown = visible(piece.shown)
        if piece.trained and not color:
            shown = f"[[{shown}]]"
        code = _TRAINED if piece.trained else _MARKER if piece.marker else _OTHER
        for number, part in enumerate(shown.split("\n")):
            if number:
                lines.append("")
                marks.append(False)
            lines[-1] += _paint(part, code, color)  # line by line: pagers forget colours at a line's end
            marks[-1] |= piece.trained and bool(part)
    if not lines[-1]:  # after the text's last newline
        lines.pop()
    return [f"  {'+' if trained else '|'} {line}" for line, trained in zip(lines, marks)]


def _escape(text: str) -> str:
    return html.escape(visible(text))


def _card(number: int, preview: Preview) -> str:
    place = f"<b>{number}</b> <code>{_escape(preview.source)}</code> <small>index {preview.index}</small>"
    if preview.error is not None:
        return f"<section class=bad><header>{place}</header><p>{_escape(str(preview.error))}</p></section>"
    notes = "".join(f"<p class=note>{_escape(note)}</p>" for note in preview.notes)
    figures = "".join(_figure(medium, caption) for medium, caption in _captioned(preview))
    figures = f"<div class=media>{figures}</div>" if figures else ""
    text = "".join(_piece(piece.shown, piece.trained, bool(piece.marker)) for piece in preview.pieces)
    return (
        f"<section><header>{place}<span class=counts>{counts_of(preview)}</span></header>{_bar(preview)}"
        f"{notes}<div class=sample>{figures}<pre>{text}</pre></div></section>"
    )


def _bar(preview: Preview) -> str:
    """The shares of media's, trained and other tokens, drawn."""
    media = preview.num_image_tokens + preview.num_video_tokens + preview.num_sound_tokens
    shares = {"media": media, "trained": preview.num_label_tokens}
    total = max(preview.num_tokens, 1)
    parts = "".join(f'<i class={name} style="width:{100 * share / total:.2f}%"></i>' for name, share in shares.items())
    return f"<div class=bar>{parts}</div>"


def _captioned(preview: Preview) -> list[tuple[_Medium, str]]:
    kinds: dict[str, Sequence[_Medium]] = {"image": preview.images, "video": preview.videos, "sound": preview.sounds}
    return [
        (medium, f"{kind} {number}: {medium.caption}")
        for kind, media in kinds.items()
        for number, medium in enumerate(media, start=1)
    ]


def _figure(medium: _Medium, caption: str) -> str:
    parts = ""
    for name, pictures in medium.parts():
        shown = "".join(
            f'<img tabindex=0 src="{data_uri(picture, medium.lossless)}" width={picture.width} height={picture.height} '
            f'alt="{name or caption}">'
            for picture in pictures
        )
        parts += f"<span class=part>{shown}<small>{name}</small></span>" if name else shown
    return f"<figure>{parts}<figcaption>{caption}</figcaption></figure>"


def _piece(shown: str, trained: bool, is_medium: bool) -> str:
    # <b> and not a class alone: sites that show notebooks take styles out.
    name, kind = ("b", "trained") if trained else ("span", "media" if is_medium else "other")
    return f"<{name} class={kind}>{_escape(shown)}</{name}>"


def _css(colour: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


_LEGEND = """<p class=legend><b class=trained>trained</b> <span class=other>not trained</span>
<span class=media>&lt;image, video or sound: its tokens&gt;</span>
<span class=token-line></span> border of a token's patches <span class=tile-line></span> border of a tile<br>
<small>Images are what the model gets, pixel for pixel; click one for its full size. Large frames of videos are
reduced.</small></p>"""

# Colours are see-through or the surroundings' own, so that they fit light and dark pages alike.
_STYLE = """
.vlm-preview { font: 15px/1.45 system-ui, sans-serif; max-width: 1200px; }
.vlm-preview h2 { font-size: 1.3em; margin: 0 0 .4em; }
.vlm-preview small, .vlm-preview .note, .vlm-preview .counts, .vlm-preview figcaption { opacity: .75; }
.vlm-preview section { border: 1px solid rgba(128,128,128,.35); border-radius: 8px; margin: 1em 0; overflow: hidden; }
.vlm-preview header { display: flex; flex-wrap: wrap; gap: .3em .8em; padding: .5em .9em; align-items: baseline;
  background: rgba(128,128,128,.1); }
.vlm-preview header code { overflow-wrap: anywhere; background: none; color: inherit; }
.vlm-preview .counts { margin-left: auto; font-variant-numeric: tabular-nums; }
.vlm-preview .bar { height: 4px; display: flex; background: rgba(128,128,128,.25); }
.vlm-preview i.media { background: TOKEN_LINE; }
.vlm-preview i.trained { background: #2da44e; }
.vlm-preview .note, .vlm-preview .bad p { margin: .6em .9em; }
.vlm-preview .bad { border-color: #d1242f; }
.vlm-preview .bad header { background: rgba(209,36,47,.15); }
.vlm-preview .sample, .vlm-preview .media { display: flex; flex-wrap: wrap; gap: .9em; align-items: flex-start; }
.vlm-preview .sample { padding: .9em; }
.vlm-preview .media, .vlm-preview figure { max-width: 100%; }
.vlm-preview figure { margin: 0; display: flex; flex-wrap: wrap; gap: .5em; align-items: flex-start; }
.vlm-preview figcaption { width: 100%; font-size: .85em; }
.vlm-preview img { max-width: 100%; max-height: 26em; width: auto; height: auto; margin: 0; cursor: zoom-in; }
.vlm-preview img:focus { max-width: none; max-height: none; cursor: auto; outline: none; }
.vlm-preview .part { display: inline-block; max-width: 100%; }
.vlm-preview .part img { margin-right: 2px; vertical-align: top; }
.vlm-preview .part small { display: block; font-size: .75em; }
.vlm-preview figure:focus-within { overflow: auto; }
.vlm-preview pre { flex: 1 1 28em; min-width: 0; margin: 0; padding: 0; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 13px/1.65 ui-monospace, monospace; background: none; color: inherit; }
.vlm-preview .other { opacity: .65; }
.vlm-preview span.media { background: rgba(0,168,204,.2); border-radius: 3px; padding: 1px 2px; }
.vlm-preview b.trained { background: rgba(45,164,78,.25); border-bottom: 2px solid #2da44e; font-weight: 600;
  box-decoration-break: clone; -webkit-box-decoration-break: clone; }
.vlm-preview .legend > * { margin-right: .5em; }
.vlm-preview .token-line, .vlm-preview .tile-line { display: inline-block; width: 1.4em; margin-left: .8em;
  vertical-align: middle; border-top: 2px solid TOKEN_LINE; }
.vlm-preview .tile-line { border-top: 5px solid TILE_LINE; }
""".replace("TOKEN_LINE", _css(TOKEN_LINE)).replace("TILE_LINE", _css(TILE_LINE))

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>:root {{ color-scheme: light dark; }} body {{ margin: 2em auto; padding: 0 1em; max-width: 1200px; }}</style>
{body}</html>
"""
