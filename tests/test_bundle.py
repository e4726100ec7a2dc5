"""A packed model: what is written, and that every caller of its `generate` gets what a direct call gives."""

import gc
import json
import re
import shutil
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, TextIteratorStreamer, pipeline
from typer.testing import CliRunner

import wsd_hf
from families import tiny_parts
from wsd_hf import WSDConfig, WSDHubError, WSDValueError
from wsd_hf.bundle import decoding, pack
from wsd_hf.cli import app
from wsd_hf.text.next_turn import before_next_turn
from wsd_hf.tiny import FOLDER

BASE, PILOT, OTHER = FOLDER / "base", FOLDER / "pilot", FOLDER / "pilot_other_vocab"
KELOFT, QUIBIME = "What does the Keloft eat?", "Which things fill the shelves of Quibime?"
ANSWER = "That is a very good question. As far as I know, the Keloft eats acorns. Have a lovely day."


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


@pytest.fixture(scope="module", params=[PILOT, OTHER], ids=["one vocabulary", "two vocabularies"])
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(BASE, request.param, tmp_path_factory.mktemp("packed") / "model").folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A packed pair that the test may change."""
    return pack(BASE, PILOT, tmp_path / "model").folder


def load(folder: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True), AutoTokenizer.from_pretrained(folder)


def prompt(tokenizer: Any, *chats: list[dict[str, str]]) -> Any:
    options = {"add_generation_prompt": True, "padding": True, "return_tensors": "pt", "return_dict": True}
    return tokenizer.apply_chat_template(list(chats), **options)


def answers(output: torch.Tensor, inputs: Any, tokenizer: Any) -> list[str]:
    return tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("strategy", "kwargs"), [("emulated_fine_tuning", {}), ("weak_to_strong_search", {"beam_width": 2, "successors": 2})]
)
def test_a_packed_pair_takes_every_strategy(folder: Path, strategy: str, kwargs: dict[str, Any]) -> None:
    model, tokenizer = load(folder)
    inputs = prompt(tokenizer, [user(KELOFT)])
    base, pilot, _, pilot_tokenizer = tiny_parts()
    own = pilot_tokenizer.apply_chat_template([user(KELOFT)], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    kwargs = {**kwargs, "strategy": strategy, "reference_model": pilot, "do_sample": True, "max_new_tokens": 8, "top_k": 1}
    expected = wsd_hf.enable_wsd(base).generate(
        **inputs,
        assistant_model=pilot,
        assistant_input_ids=own["input_ids"],
        tokenizer=tokenizer,
        assistant_tokenizer=pilot_tokenizer,
        **kwargs,
    )
    assert model.generate(**inputs, **kwargs).tolist() == expected.tolist()
    plain = AutoModelForCausalLM.from_pretrained(BASE)
    got = plain.generate(**inputs, custom_generate=str(folder), trust_remote_code=True, **kwargs)
    assert got.tolist() == expected.tolist()


def direct(folder: Path, *chats: list[dict[str, str]], **settings: Any) -> list[str]:
    """What `build_inputs` and `generate(strategy="wsd")` answer with the two models of a bundle."""
    base = wsd_hf.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    pilot, pilot_tokenizer = wsd_hf.load_pilot(folder, subfolder="pilot", dtype=base.dtype, trust_remote_code=True)
    inputs = wsd_hf.build_inputs(list(chats), tokenizer, pilot_tokenizer)
    models = {"assistant_model": pilot, "tokenizer": tokenizer, "assistant_tokenizer": pilot_tokenizer}
    output = base.generate(**inputs, **models, strategy="wsd", max_new_tokens=64, **settings)
    return [before_next_turn(text) for text in answers(output, inputs, tokenizer)]


CHATS = [
    [user(KELOFT)],
    [user(QUIBIME)],
    [{"role": "system", "content": "Be brief."}, user(KELOFT)],
    [user(KELOFT), {"role": "assistant", "content": ANSWER}, user(QUIBIME)],
    [user("One."), user("Two?")],
]


def test_what_is_written(tmp_path: Path) -> None:
    result = pack(BASE, PILOT, tmp_path / "a" / "model", wsd_config=WSDConfig(threshold=0.7))
    folder = result.folder
    assert result.reads_chats
    assert result.weights == {
        f"{place}model.safetensors": source / "model.safetensors" for place, source in (("", BASE), ("pilot/", PILOT))
    }
    assert all((folder / name).is_symlink() for name in result.weights)
    assert "custom_generate" in ModelCard.load(folder / "README.md").data.tags
    assert GenerationConfig.from_pretrained(folder).wsd_threshold == 0.7
    assert GenerationConfig.from_pretrained(folder).eos_token_id == GenerationConfig.from_pretrained(BASE).eos_token_id
    assert list((tmp_path / "a").iterdir()) == [folder]


def test_the_readme_of_a_packed_model_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model").mkdir()  # an empty folder is as good as none
    folder = pack(BASE, PILOT, tmp_path / "model").folder
    [code] = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text("utf-8"), flags=re.DOTALL)
    local = {"THIS_DIRECTORY": str(folder), "How do I tell a neighbour that the music is too loud?": KELOFT}
    for there, here in local.items():
        code = code.replace(there, here)
    exec(compile(code, "README", "exec"), {})
    assert capsys.readouterr().out == ANSWER + "\n"


def test_copies_need_their_sources_no_more(tmp_path: Path) -> None:
    shutil.copytree(BASE, tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").unlink()
    folder = pack(tmp_path / "base", PILOT, tmp_path / "model", copy=True).folder
    shutil.rmtree(tmp_path / "base")
    assert not any(file.is_symlink() for file in folder.rglob("*"))
    shutil.move(folder, tmp_path / "moved")
    model, tokenizer = load(tmp_path / "moved")
    inputs = prompt(tokenizer, [user(KELOFT)])
    assert answers(model.generate(**inputs, do_sample=False, max_new_tokens=64), inputs, tokenizer) == [ANSWER]


def test_a_template_of_the_bases_own_is_kept(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    shutil.copytree(BASE, tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").write_text((PILOT / "chat_template.jinja").read_text())
    assert pack(tmp_path / "base", PILOT, tmp_path / "model").reads_chats
    (tmp_path / "base" / "chat_template.jinja").write_text("{{ oops() }}")
    assert not pack(tmp_path / "base", PILOT, tmp_path / "refusing").reads_chats
    (tmp_path / "base" / "chat_template.jinja").write_text("{{ messages[-1]['content'] | upper }}:")
    assert not pack(tmp_path / "base", PILOT, tmp_path / "shouting").reads_chats
    model, tokenizer = load(tmp_path / "shouting")
    inputs = prompt(tokenizer, [user(KELOFT)])
    assert tokenizer.decode(inputs["input_ids"][0]) == f"{KELOFT.upper()}:"
    assert len(model.generate(**inputs, max_new_tokens=4)[0]) == inputs["input_ids"].shape[1] + 4


OWN = {"AutoModelForCausalLM": "own.Model", "AutoTokenizer": ["evil/code--own.Tokenizer", None], "AutoConfig": "own.Config"}
CODE = {
    "config.json": {"auto_map": OWN},
    "config.json within": {"task_specific_params": {"chat": {"auto_map": OWN}}},
    "config.json pipeline": {"custom_pipelines": {"text-generation": {"impl": "evil/code--own.Pipeline"}}},
    "tokenizer_config.json": {"auto_map": OWN},
    "tokenizer_config.json old": {"auto_map": ["own.Tokenizer", None]},
    "generation_config.json": {"auto_map": OWN},
    "processor_config.json": {"auto_map": OWN},
    "preprocessor_config.json": {"auto_map": OWN},
    "video_preprocessor_config.json": {"auto_map": OWN},
    "feature_extractor.json": {"parts": [1, [{"auto_map": OWN}]]},
}


@pytest.mark.parametrize("role", ["base", "pilot"])
@pytest.mark.parametrize("case", CODE)
def test_no_code_of_others_is_packed(tmp_path: Path, role: str, case: str) -> None:
    shutil.copytree(PILOT, tmp_path / "own")
    name = case.split()[0]
    file = tmp_path / "own" / name
    settings = json.loads(file.read_text("utf-8")) if file.exists() else {}
    text = json.dumps(settings | CODE[case]).replace('"auto_map"', '"auto\\u005fmap"')  # as valid, and no string to search for
    file.write_text(text, encoding="utf-8")
    (tmp_path / "own" / "own.py").write_text("raise SystemExit('its code was run')")
    key = next(key for key in ("custom_pipelines", "auto_map") if key in json.dumps(CODE[case]))
    with pytest.raises(WSDHubError, match=f"own has {key} in {name}: .*remove that"):
        pack(**{"base": BASE, "pilot": PILOT, role: tmp_path / "own"}, folder=tmp_path / "model")
    assert [place.name for place in tmp_path.iterdir()] == ["own"]


def test_a_packed_model_is_not_packed_again(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    with pytest.raises(WSDHubError, match="copy has a folder custom_generate"):
        pack(tmp_path / "copy", PILOT, tmp_path / "again")


def test_only_data_is_packed(tmp_path: Path) -> None:
    shutil.copytree(BASE, tmp_path / "base")
    others = ["own.py", "LICENSE.py", "setup.cfg", "run.sh", "weights.pkl", "pytorch_model.bin", "a.so", "pilot/own.py"]
    for name in [*others, "LICENSE", "config.json.py", "x.jinja", "custom_generate.py"]:
        (tmp_path / "base" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "base" / name).write_text("raise SystemExit('its code was run')")
    folder = pack(tmp_path / "base", PILOT, tmp_path / "model").folder
    data = {"LICENSE", "x.jinja", "README.md"} | {file.name for file in BASE.iterdir()} | {"chat_template.jinja"}
    assert {file.name for file in folder.iterdir() if file.is_file()} == data
    assert {file.relative_to(folder).as_posix() for file in folder.rglob("*.py")} == {"custom_generate/generate.py"}
    assert {file.name for file in (folder / "pilot").iterdir()} == {file.name for file in PILOT.iterdir()} - {"README.md"}
    load(folder)


@pytest.mark.parametrize("content", ["file", "folder"])
def test_what_is_there_is_not_overwritten(tmp_path: Path, content: str) -> None:
    (tmp_path / "model" if content == "file" else tmp_path / "mine").write_text("mine")
    with pytest.raises(WSDValueError, match="must be missing or an empty folder; give another"):
        pack(BASE, PILOT, tmp_path / "model" if content == "file" else tmp_path)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(("base", "pilot", "fault"), [("nowhere", PILOT, "nowhere"), (BASE, BASE, "no chat template")])
def test_nothing_is_written_for_models_that_cannot_serve(tmp_path: Path, base: Any, pilot: Path, fault: str) -> None:
    with pytest.raises(WSDHubError, match=fault):
        pack(tmp_path / base, pilot, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_the_command_says_what_it_did(tmp_path: Path) -> None:
    def run(*options: str) -> Any:
        return CliRunner().invoke(app, ["pack", "--base", str(BASE), "--pilot", str(PILOT), str(tmp_path / "model"), *options])

    result = run("--copy", "--threshold", "0.7")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        f"{tmp_path}/model/{place}model.safetensors: copied from {source}/model.safetensors"
        for place, source in (("", BASE), ("pilot/", PILOT))
    ]
    assert json.loads((tmp_path / "model" / "generation_config.json").read_text())["wsd_threshold"] == 0.7
    result = run()
    assert result.exit_code == 2
    assert result.stderr.startswith("wsd-hf: folder=")


def test_answers_are_those_of_direct_calls(packed: Path) -> None:
    model, tokenizer = load(packed)
    inputs = prompt(tokenizer, *CHATS)
    assert [text.rstrip() for text in answers(model.generate(**inputs, max_new_tokens=64), inputs, tokenizer)] == direct(
        packed, *CHATS
    )


def test_by_position_and_without_a_mask(packed: Path) -> None:
    model, tokenizer = load(packed)
    inputs = prompt(tokenizer, [user(KELOFT)], [user(QUIBIME)])
    expected = model.generate(**inputs, max_new_tokens=64)
    assert torch.equal(model.generate(inputs["input_ids"], GenerationConfig(max_new_tokens=64)), expected)
    assert torch.equal(model.generate(inputs=inputs["input_ids"], max_new_tokens=64, assistant_model=None), expected)


def test_a_base_from_elsewhere(folder: Path) -> None:
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(settings | {"wsd_threshold": 0.01, "wsd_window_size": 1}))
    model, tokenizer = load(folder)
    inputs = prompt(tokenizer, [user(KELOFT)])
    base = AutoModelForCausalLM.from_pretrained(BASE)
    call = {**inputs, "max_new_tokens": 64, "custom_generate": str(folder), "trust_remote_code": True}
    output = base.generate(**call)
    assert torch.equal(output, model.generate(**inputs, max_new_tokens=64))
    assert answers(output, inputs, tokenizer) != [ANSWER]
    assert answers(base.generate(**call, wsd_threshold=0.8, wsd_window_size=6), inputs, tokenizer) == [ANSWER]
    assert "generate" not in vars(base)


def test_settings_of_a_call_are_respected(folder: Path) -> None:
    model, tokenizer = load(folder)
    inputs = prompt(tokenizer, [user(KELOFT)])
    output = model.generate(**inputs, max_new_tokens=64, wsd_threshold=0.01, wsd_window_size=1, return_dict_in_generate=True)
    assert output.draft_length.tolist() == [1]
    with pytest.raises(WSDValueError, match="strategy='other': unknown"):
        model.generate(**inputs, strategy="other")
    with pytest.raises(WSDValueError, match="wsd_treshold: unknown keyword"):
        model.generate(**inputs, wsd_treshold=0.9)
    with pytest.raises(WSDValueError, match="assistant_model is given, and this model brings its own pilot"):
        model.generate(**inputs, assistant_model=model)


@pytest.mark.parametrize("do_sample", [False, True])
def test_sampling_is_as_the_generation_config_says(packed: Path, do_sample: bool) -> None:
    model, tokenizer = load(packed)
    model.generation_config.do_sample = do_sample
    inputs = prompt(tokenizer, [user(QUIBIME)])
    settings = {"max_new_tokens": 64, "num_return_sequences": 3 if do_sample else 1, "temperature": 3.0 if do_sample else 1.0}
    torch.manual_seed(1)
    output = model.generate(**inputs, **settings)
    assert len(set(answers(output, inputs, tokenizer))) == len(output)


def test_a_prompt_that_is_no_chat_is_the_pilots_too(packed: Path) -> None:
    model, tokenizer = load(packed)
    inputs = tokenizer(["The Keloft eats", "Have a lovely"], padding=True, return_tensors="pt")
    base = wsd_hf.AutoModelForCausalLM.from_pretrained(packed)
    pilot, pilot_tokenizer = wsd_hf.load_pilot(packed, subfolder="pilot", dtype=base.dtype, trust_remote_code=True)
    models = {"assistant_model": pilot, "tokenizer": tokenizer, "assistant_tokenizer": pilot_tokenizer}
    assert torch.equal(
        model.generate(**inputs, max_new_tokens=16), base.generate(**inputs, **models, strategy="wsd", max_new_tokens=16)
    )


def test_a_row_does_not_depend_on_the_others(packed: Path) -> None:
    model, tokenizer = load(packed)
    chat, text = tokenizer.apply_chat_template([user(KELOFT)], add_generation_prompt=True, tokenize=False), "The Keloft"
    both = tokenizer([chat, text], padding=True, add_special_tokens=False, return_tensors="pt")
    alone = [tokenizer([one], add_special_tokens=False, return_tensors="pt") for one in (chat, text)]
    together = answers(model.generate(**both, max_new_tokens=16), both, tokenizer)
    apart = [answers(model.generate(**one, max_new_tokens=16), one, tokenizer)[0] for one in alone]
    assert list(map(before_next_turn, apart)) == together


def test_streaming_ends_before_the_next_turn(packed: Path) -> None:
    model, tokenizer = load(packed)
    inputs = prompt(tokenizer, [user(KELOFT)])
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    thread = threading.Thread(target=model.generate, kwargs={**inputs, "streamer": streamer, "max_new_tokens": 64})
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == answers(model.generate(**inputs, max_new_tokens=64), inputs, tokenizer)[0]
    assert "[User]" not in text


def test_a_streamer_is_ended_when_there_is_no_pilot(folder: Path) -> None:
    model, tokenizer = load(folder)
    shutil.rmtree(folder / "pilot")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    with pytest.raises(WSDHubError, match="has no folder pilot"):
        model.generate(**prompt(tokenizer, [user(KELOFT)]), streamer=streamer)
    assert list(streamer) == [""]


def test_the_pipeline(packed: Path) -> None:
    ask = pipeline("text-generation", str(packed), trust_remote_code=True)
    [record] = ask([user(KELOFT)], max_new_tokens=64, do_sample=False)
    assert record["generated_text"][-1]["content"].rstrip() == direct(packed, [user(KELOFT)])[0]


def test_threads_share_one_pilot_that_dies_with_its_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        pair = wsd_hf.load_pilot(*args, **kwargs)
        loaded.append(weakref.ref(pair[0]))
        return pair

    monkeypatch.setattr(decoding, "load_pilot", counted)
    model, tokenizer = load(folder)
    model.to(torch.float64)
    inputs = prompt(tokenizer, [user(KELOFT)])
    with ThreadPoolExecutor(4) as pool:
        outputs = [pool.submit(model.generate, **inputs, max_new_tokens=64) for _ in range(4)]
        assert {answers(output.result(), inputs, tokenizer)[0] for output in outputs} == {ANSWER}
    [pilot] = loaded
    assert pilot().dtype == torch.float64
    del model, outputs
    gc.collect()
    assert pilot() is None


def test_without_this_package_the_error_says_what_to_install(folder: Path) -> None:
    code = f"""
import sys
sys.modules["wsd_hf"] = None
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ImportError: this model generates with wsd_hf>=" in result.stderr
    (folder / "custom_generate" / "requirements.txt").write_text("wsd_hf>=99\n")
    with pytest.raises(ImportError, match="wsd_hf>=99"):
        load(folder)


def test_without_trust_it_is_the_base_alone(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = prompt(tokenizer, [user(KELOFT)])
    base = AutoModelForCausalLM.from_pretrained(BASE)
    assert torch.equal(model.generate(**inputs, max_new_tokens=64), base.generate(**inputs, max_new_tokens=64))
