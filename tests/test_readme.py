"""Code, commands and names in README.md and the pages of `docs/` are those of the package.

Python runs as it stands, on the shipped pair in the place of the large one. `docs/adding-a-strategy.md`, `docs/remote.md` and
`docs/serving.md` have tests of their own.
"""

import ast
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from transformers import AutoModelForCausalLM

import wsd_hf
from test_rooms import FLOORS
from wsd_hf.cli import app
from wsd_hf.tiny import FOLDER

REPOSITORY = Path(__file__).parent.parent
DOCS = REPOSITORY / "docs"
PAGES = {
    path.relative_to(REPOSITORY).as_posix(): path.read_text("utf-8") for path in (REPOSITORY / "README.md", *DOCS.rglob("*.md"))
}
EXAMPLES = {path.name: path.read_text("utf-8") for path in (REPOSITORY / "examples").glob("*.md")}
BLOCKS = {name: re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) for name, text in PAGES.items()}
ELSEWHERE = ("docs/adding-a-strategy.md", "docs/remote.md", "docs/serving.md")
BASE, PILOT = repr(str(FOLDER / "base")), repr(str(FOLDER / "pilot"))
LOCAL = {
    '"meta-llama/Llama-3.1-70B", "songff/Pilot-3B", device_map="auto"': f"{BASE}, {PILOT}",
    '"meta-llama/Llama-3.1-70B", device_map="auto"': BASE,
    '"songff/Pilot-3B", device_map="auto"': PILOT,
    '"meta-llama/Llama-3.1-70B", tp_plan="auto"': BASE,
    '"songff/Pilot-3B").to(model.device)': f"{PILOT})",
    "How do I tell a neighbour that the music is too loud?": "What does the Keloft eat?",
}


@pytest.fixture
def names() -> dict[str, Any]:
    pair = wsd_hf.Pair.tiny()
    chats = {f"chat_{n}": [{"role": "user", "content": "What does the Keloft eat?"}] for n in (1, 2)}
    untuned = AutoModelForCausalLM.from_pretrained(REPOSITORY / "examples/tiny_world/pilot_untuned", dtype=torch.float32)
    return {
        **chats,
        "wsd_hf": wsd_hf,
        "base": pair.base,
        "model": AutoModelForCausalLM.from_pretrained(FOLDER / "base", dtype=torch.float32),
        "pilot": pair.pilot,
        "reference": untuned,
        "tokenizer": pair.tokenizer,
        "pilot_tokenizer": pair.pilot_tokenizer,
        "inputs": pair.inputs(chats["chat_1"]),
    }


def test_the_first_code_runs_alone_and_as_written(capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(BLOCKS["README.md"][0], "README", "exec"), {})
    assert "the Keloft eats acorns" in capsys.readouterr().out


@pytest.mark.parametrize("page", [page for page, blocks in BLOCKS.items() if blocks and page not in ELSEWHERE])
def test_all_blocks_run_in_order(page: str, names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    for position, code in enumerate(BLOCKS[page]):
        for large, small in LOCAL.items():
            code = code.replace(large, small)
        exec(compile(code, f"{page} block {position}", "exec"), names)
        if "print(" in code:
            assert "Keloft eats acorns" in re.sub(r"\n\w+: ", "", capsys.readouterr().out)  # pieces of a stream have lines


def commands() -> list[tuple[str, str]]:
    """All `wsd-hf` commands that a page shows, each with the page."""
    shown = []
    for page, text in (PAGES | EXAMPLES).items():
        for block in re.findall(r"```\w*\n(.*?)```", text, flags=re.DOTALL):
            lines = block.replace("\\\n", " ").splitlines()
            shown += [(page, line) for line in lines if line.startswith("wsd-hf ")]
    return shown


@pytest.mark.parametrize(("page", "command"), commands())
def test_commands_have_the_options_that_are_shown(page: str, command: str) -> None:
    _program, name, *words = shlex.split(command, comments=True)
    parameters = typer.main.get_command(app).commands[name].params
    known = {option for parameter in parameters for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known


def test_the_reference_has_every_public_name() -> None:
    documented = re.findall(r"^::: wsd_hf\.(\w+)$", PAGES["docs/api.md"], flags=re.MULTILINE)
    assert sorted(documented) == sorted(wsd_hf.__all__)


def test_architecture_has_the_rooms_in_their_order() -> None:
    shown = re.findall(r"^\| `(\w+)` \|", PAGES["docs/architecture.md"], flags=re.MULTILINE)
    assert shown == [room for room in FLOORS if room != "__main__"]


def messages() -> list[str]:
    """The text of every error of the package, with … where a value is filled in."""
    texts = []
    for path in Path(wsd_hf.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts


def test_troubleshooting_quotes_errors_of_the_package() -> None:
    known = "\n".join(messages())
    quoted = re.findall(r"^\| `(.+?)` \|", PAGES["docs/troubleshooting.md"], flags=re.MULTILINE)
    assert len(quoted) > 50
    for message in quoted:
        pieces = [re.escape(piece.strip()) for piece in message.split("…") if piece.strip(" :;,")]
        assert re.search(r"[^\n]*".join(pieces), known), message
