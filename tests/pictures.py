"""A picture of a page, for the docs: the page in a headless browser, in 256 colours so that the file is small.

python tests/pictures.py out/diagnosis.html docs/images/diagnosis.png --width 1000 --height 1400
wsd-hf ui & python tests/pictures.py "http://127.0.0.1:7860/?slow=false&methods=base,pilot&question=What does the Keloft eat?" \
    docs/images/ui.png --height 760
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image

from browser import WIDE, chromium, opened


def main(
    page: Annotated[str, typer.Argument(help="HTML file, or address of a page of `wsd-hf ui`, where the question is asked.")],
    picture: Annotated[Path, typer.Argument(help="PNG file to write.")],
    width: Annotated[int, typer.Option(help="Of the window, in pixels.")] = WIDE,
    height: Annotated[int, typer.Option(help="Pixels from the top; 0 is the whole page.")] = 0,
    dark: Annotated[bool, typer.Option("--dark", help="As a dark system shows it.")] = False,
) -> None:
    place = page if page.startswith("http") else Path(page).resolve()
    with chromium() as browser, opened(browser, place, width, "dark" if dark else "light") as shown:
        if isinstance(place, str):
            shown.page.locator("#status", has_text="Ready.").wait_for()
            shown.page.get_by_role("button", name="Ask").click()
            shown.page.mouse.move(0, 0)
            shown.page.get_by_role("button", name="Retry").wait_for()
        part = {"clip": {"x": 0, "y": 0, "width": width, "height": height}} if height else {}
        taken = shown.page.screenshot(full_page=True, **part)
    Image.open(io.BytesIO(taken)).convert("RGB").quantize().save(picture, optimize=True)
    print(f"{picture}: {picture.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    typer.run(main)
