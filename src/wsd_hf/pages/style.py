"""The stylesheet of all pages: light or dark as the reader's system is, and readable from a width of 360 pixels."""

from __future__ import annotations

from collections.abc import Mapping

PILOT_COLOURS = ("#f4a582", "#f7b799", "#fac8af", "#fcd9c7", "#feeae0")
"""Background of a drafted token, from one that the base found unlikely to one that it would have written too."""

BASE_COLOUR = "#92c5de"
"""Background of a token that the base wrote."""

INK = "#101010"
"""Text on these backgrounds, on light pages and dark ones."""

LIGHT = {
    "page": "#ffffff",
    "surface": "#f3f3f3",
    "line": "#c8c8c8",
    "text": "#1a1a1a",
    "muted": "#595959",
    "accent": "#0b5cad",
    "pilot": "#ad4a12",
    "base": "#1f68a8",
}
"""Colours of a light page: `pilot` and `base` are those of lines and words, the others those of the frame."""

DARK = {
    "page": "#121212",
    "surface": "#1f1f1f",
    "line": "#484848",
    "text": "#e8e8e8",
    "muted": "#ababab",
    "accent": "#8cbcf0",
    "pilot": "#f4a582",
    "base": "#92c5de",
}
"""The same of a dark page."""


def variables(colours: Mapping[str, str]) -> str:
    """Colours as declarations of CSS variables."""
    return " ".join(f"--{name}:{colour};" for name, colour in colours.items())


_SHADES = "\n".join(f".pilot-{shade} {{ background: {colour}; color: {INK}; }}" for shade, colour in enumerate(PILOT_COLOURS))

STYLE = f"""
:root {{ color-scheme: light dark; {variables(LIGHT)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {variables(DARK)} }} }}
* {{ box-sizing: border-box; }}
[hidden] {{ display: none !important; }}
body {{ margin: 0; font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere;
  color: var(--text); background: var(--page); }}
main {{ max-width: 90rem; margin: 0 auto; padding: 1rem; }}
h1 {{ font-size: 1.5rem; line-height: 1.2; margin: .5rem 0 1rem; }}
h2 {{ font-size: 1.2rem; line-height: 1.3; margin: 2.5rem 0 .75rem; }}
h3, h4 {{ font-size: 1rem; margin: 0 0 .25rem; }}
p {{ margin: 0 0 .75rem; max-width: 70ch; }}
small, figcaption, .muted {{ font-size: .875rem; color: var(--muted); }}
a {{ color: var(--accent); }}
:focus-visible {{ outline: 3px solid var(--accent); outline-offset: 2px; }}

.box {{ overflow-x: auto; width: fit-content; max-width: 100%; margin-bottom: 1rem;
  border: 1px solid var(--line); border-radius: 4px; }}
table {{ border-collapse: collapse; font-size: .875rem; overflow-wrap: normal; }}
th, td {{ padding: .35rem .5rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }}
tbody tr:last-child > * {{ border-bottom: 0; }}
th {{ color: var(--text); background: var(--surface); font-weight: 600; }}
thead th {{ vertical-align: bottom; }}
tbody th {{ position: sticky; left: 0; min-width: min(10rem, 44vw); max-width: 12rem; overflow-wrap: anywhere; }}
.numbers td, .numbers thead th + th {{ text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }}
.numbers thead th + th {{ min-width: 4rem; white-space: normal; }}

table:has(td[class]) th {{ min-width: 0; font-size: .75rem; }}
.numbers td[class] {{ padding: .3rem .5rem; text-align: center; font-size: .75rem; }}
td b {{ font-size: 1rem; }}

.text {{ white-space: pre-wrap; }}
.base-0 {{ background: {BASE_COLOUR}; color: {INK}; }}
{_SHADES}
span[title] {{ color: {INK}; }}
.label {{ padding: 0 .5rem; border: 1px solid var(--muted); border-radius: 1rem; font-size: .8rem; font-weight: 400;
  color: var(--muted); background: var(--page); }}

.figures {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); gap: 1.5rem 2rem; }}
figure {{ margin: 0; min-width: 0; }}
figure svg {{ display: block; width: 100%; height: auto; max-width: 40rem; }}
svg text {{ font-family: system-ui, sans-serif !important; }}

.controls {{ display: flex; flex-wrap: wrap; gap: .5rem 1.5rem; align-items: center;
  padding: .5rem 0; margin-bottom: 1rem; color: var(--text); background: var(--page); border-bottom: 1px solid var(--line); }}
@media (min-width: 40rem) {{ .controls {{ position: sticky; top: 0; z-index: 2; }} }}
.controls fieldset {{ display: flex; flex-wrap: wrap; gap: .25rem 1rem; margin: 0; padding: 0; border: 0; min-width: 0; }}
.controls legend {{ float: left; padding: 0; margin-right: 1rem; }}
input {{ font: inherit; accent-color: var(--accent); }}
input[type=search] {{ width: min(20rem, 100%); padding: .3rem .5rem; border: 1px solid var(--muted); border-radius: 4px;
  color: var(--text); background: var(--page); }}
article {{ margin-bottom: 2rem; }}
.columns {{ display: grid; grid-auto-flow: column; grid-auto-columns: minmax(min(85%, 14rem), 1fr); overflow-x: auto;
  border: 1px solid var(--line); border-radius: 4px; font-size: .9rem; }}
.columns section {{ padding: .6rem .8rem; min-width: 0; border-right: 1px solid var(--line); }}
.columns section:last-child {{ border-right: 0; }}
.answer + .answer {{ margin-top: .75rem; padding-top: .75rem; border-top: 1px solid var(--line); }}
.answer p {{ margin-bottom: .25rem; }}
"""
