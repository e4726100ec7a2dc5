"""The stylesheets of answers, on the page and in what is saved from it, and of the page around them."""

from __future__ import annotations

from ..pages.style import BASE_COLOUR, DARK, INK, LIGHT, PILOT_COLOURS, variables

_SHADES = "\n".join(
    f".gradio-container .pilot-{shade} {{ background: {colour}; color: {INK}; }}" for shade, colour in enumerate(PILOT_COLOURS)
)

ANSWERS = f"""
.both-0 {{ background: var(--surface); color: var(--text); }}
.turn {{ margin: 0 0 1.25rem; scroll-margin: 1rem 0 6rem; }}
.question {{ width: fit-content; max-width: 85%; margin: 0 0 .75rem auto; padding: .5rem .85rem; white-space: pre-wrap;
  overflow-wrap: anywhere; border-radius: 1rem 1rem .25rem 1rem; color: var(--text); background: var(--surface); }}
.answers {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 13rem), 1fr)); align-items: start;
  gap: .75rem; }}
.answers > .answer {{ position: relative; min-width: 0; margin: 0; padding: .75rem 1rem; border: 1px solid var(--line);
  border-radius: .6rem; background: var(--page); }}
.answer h3 {{ margin: 0 0 .4rem; font-size: .8rem; font-weight: 600; color: var(--muted); }}
.text {{ margin: 0; line-height: 1.75; white-space: pre-wrap; overflow-wrap: anywhere; color: var(--text); }}
.note {{ margin: .6rem 0 0; font-size: .85rem; line-height: 1.5; color: var(--muted); }}
.fault {{ margin: .4rem 0 0; padding: .5rem .75rem; border-left: 3px solid var(--pilot); color: var(--text);
  background: var(--surface); }}
.token {{ position: relative; padding: .14em 0; }}
.token:hover {{ z-index: 3; border-radius: 2px; outline: 2px solid var(--accent); }}
.token:hover::after {{ content: attr(data-trace); position: absolute; left: 0; top: calc(100% + 6px); z-index: 4;
  width: max-content; max-width: 12rem; padding: .35rem .6rem; border-radius: 4px; font-size: .8rem; line-height: 1.4;
  white-space: pre; color: var(--page); background: var(--text); pointer-events: none; }}
.caret {{ display: inline-block; width: .5em; height: 1.1em; margin-left: 1px; vertical-align: text-bottom;
  background: var(--muted); animation: blink 1s steps(2) infinite; }}
@keyframes blink {{ 50% {{ opacity: 0; }} }}
@media (prefers-reduced-motion: reduce) {{ .caret {{ animation: none; }} }}
details {{ margin-top: .4rem; font-size: .85rem; }}
summary {{ width: fit-content; cursor: pointer; color: var(--accent); }}
details table {{ display: block; max-height: 16rem; margin: .4rem 0 0; overflow: auto; border-collapse: collapse;
  border: 0 !important; color: var(--text); }}
details tr {{ border: 0 !important; }}
details th, details td {{ padding: .15rem .75rem .15rem 0 !important; border: 0 !important; text-align: left;
  font-variant-numeric: tabular-nums; background: none; }}
details th {{ font-weight: 600; color: var(--muted); }}

.curve {{ display: block; width: 100%; height: auto; }}
.curve text {{ font: 11px system-ui, sans-serif; fill: var(--muted); }}
.curve .grid {{ stroke: var(--line); stroke-width: .75; }}
.curve rect {{ fill: {PILOT_COLOURS[0]}; opacity: .5; }}
.curve .marked {{ opacity: 1; }}
.curve .faded {{ opacity: .2; }}
.curve .confidence {{ fill: none; stroke: var(--text); stroke-width: 2; stroke-linejoin: round; }}
.curve line.threshold {{ stroke: var(--accent); stroke-width: 1.5; stroke-dasharray: 6 4; }}
.curve text.threshold {{ font-weight: 650; fill: var(--accent); paint-order: stroke; stroke: var(--page); stroke-width: 4px;
  stroke-linejoin: round; }}
.curve line.switch {{ stroke: var(--base); stroke-width: 1.5; }}
.curve circle.switch {{ fill: var(--base); stroke: var(--page); stroke-width: 2; }}
.verdict {{ margin: .5rem 0 0; line-height: 1.5; color: var(--text); }}
.draft {{ min-height: 3.5em; margin-top: .5rem; font-size: .9rem; }}
.draft .bar {{ display: inline-block; width: 3px; height: 1.3em; margin: 0 1px; border-radius: 2px;
  vertical-align: text-bottom; background: var(--base); }}
.rest {{ color: var(--muted); }}
.legend {{ display: flex; flex-wrap: wrap; gap: .1rem 1rem; margin: 0; padding: 0; list-style: none; font-size: .8rem;
  color: var(--muted); }}
.legend i {{ display: inline-block; width: 1.1em; margin-right: .4em; vertical-align: middle; }}
.legend .l-bar {{ height: .8em; background: {PILOT_COLOURS[0]}; }}
.legend .l-line {{ border-top: 2px solid var(--text); }}
.legend .l-dash {{ border-top: 2px dashed var(--accent); }}
"""
"""Questions, answers, and the curve of a draft, in the colours of `pages`."""

PAGE = f"""
:root {{ {variables(LIGHT)} }}
.dark {{ {variables(DARK)} }}
{_SHADES}
.gradio-container .base-0 {{ background: {BASE_COLOUR}; color: {INK}; }}
{ANSWERS}
body {{ background: var(--page) !important; }}
.gradio-container {{ max-width: 84rem !important; margin: 0 auto !important; overflow: clip !important; }}
.gradio-container :focus-visible {{ outline: 3px solid var(--accent) !important; outline-offset: 2px; }}
.gradio-container .form {{ gap: 1rem; overflow: visible; background: none; border: 0; }}
.dark input[type=range] {{ --neutral-200: var(--line); }}
#head h1 {{ margin: 0; font-size: 1.4rem; font-weight: 650; color: var(--text); }}
#head p {{ margin: .2rem 0 0; font-size: .9rem; line-height: 1.5; color: var(--muted); }}
.key {{ padding: 0 .35em; border-radius: 3px; }}
#beside label {{ padding: .3rem .6rem; font-size: .85rem; }}
#composer {{ position: sticky; bottom: 0; z-index: 5; flex-wrap: nowrap; align-items: flex-end; gap: .5rem;
  padding: .5rem 0; background: var(--page); }}
#composer .block, .form .block {{ overflow: visible !important; }}
#composer textarea, #composer button {{ min-height: 2.8rem; border-radius: .5rem; }}
#composer textarea {{ padding: .6rem .8rem; font-size: 1rem; line-height: 1.5; }}
.quiet {{ gap: .4rem !important; }}
.quiet button {{ flex: 0 1 auto; min-width: 0 !important; padding: .3rem .75rem; border: 1px solid var(--line);
  border-radius: 1rem; font-size: .85rem; font-weight: 500; color: var(--text); background: var(--page); }}
.quiet button:hover {{ background: var(--surface); }}

#turns:not(:has(.turn)) {{ display: none; }}
#panel {{ gap: .75rem; padding: 1rem 1.25rem 1.25rem; border: 1px solid var(--line); border-radius: .6rem; }}
#panel h2 {{ margin: 0; font-size: 1.05rem; font-weight: 650; color: var(--text); }}
#status {{ position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }}
@media (min-width: 900px) {{ #panel {{ position: sticky; top: 1rem; align-self: flex-start; }} }}
@media (min-width: 601px) {{ #panel .token:hover::after {{ left: auto; right: 0; }} }}
@media (max-width: 600px) {{
  #panel {{ position: relative; }}
  .token {{ position: static; }}
  .token:hover::after {{ left: auto; right: 0; top: auto; bottom: calc(100% + 4px); max-width: none; white-space: normal; }}
}}
"""
"""The whole page, whose frame is gradio's: dark in a dark system."""
