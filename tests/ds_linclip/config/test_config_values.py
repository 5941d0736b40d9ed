"""What the texts of files and command lines mean: the field decides, nothing is guessed."""

import math
import os
from dataclasses import fields
from typing import get_type_hints

import pytest
import yaml
from hypothesis import assume, example, given
from hypothesis import strategies as st

from ds_linclip.config import Config, Source, load_config, save_config
from ds_linclip.config.interpolation import as_plain_text, resolve
from ds_linclip.config.schema import sections

MINIMAL = """
data: {train: /0.tar}
train: {steps: 1, global_batch_size: 1}
optim: {warmup_steps: 0}
"""
#: Texts that YAML 1.1 takes for numbers, bools, dates, nothing, or for its own marks.
LOOKALIKES = [
    *("007", "2024_11_29", "1.10", "1e5", "0x10", "0b1", "0o7", "1_0", "+1", ".5", "1.", "-0"),
    *("yes", "no", "on", "off", "true", "True", "y", "null", "Null", "~", "nan", ".inf", "NaN"),
    *("12:30:00", "1:30", "2024-11-29", "2024-11-29 12:30:00", "<<", "=", "...", "---", "???"),
]
#: Texts that YAML reads as something else than one plain scalar.
MARKS = [
    *("[x]", "{x}", "{x: y}", "[", "}", "#x", "x #y", "a: b", "a:", "- x", "-", "? x", "*x", "&x"),
    *("!x", "!!int 1", "%x", "@x", "`x", "|", ">", "it's", "'x", '"', "'x' y", '"x" "y"', "a\\b"),
    *(" x", "x ", "a=b", "=x", "a,b", "$", "$x", "$$", "\\$x", "a  b", "é", "\u3042"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder whose own name looks like variables."""
    folder = tmp_path_factory.mktemp("config") / "$HOME ${x} \\${y}"
    folder.mkdir()
    (folder / "base.yaml").write_text(MINIMAL)
    return folder


def load(folder, *overrides):
    """Load the minimal config, after a round trip through a file."""
    config = load_config(folder / "base.yaml", overrides)
    save_config(config, folder / "saved.yaml")
    assert load_config(folder / "saved.yaml") == config
    return config


def load_file(folder, text):
    (folder / "run.yaml").write_bytes(f"base: base.yaml\n{text}\n".encode())
    return load_config(folder / "run.yaml")


@pytest.mark.parametrize("text", [*LOOKALIKES, *MARKS])
def test_a_name_on_the_command_line_keeps_its_text(folder, text):
    assert load(folder, f"name={text}").name == text


@pytest.mark.parametrize("text", LOOKALIKES)
def test_a_text_in_a_file_keeps_its_text(folder, text):
    config = load_file(folder, f"name: {text}\nlog:\n  wandb: '{text}'")
    assert (config.name, config.log.wandb) == (text, text)
    if text not in ("null", "Null", "~"):
        assert load_file(folder, f"eval:\n  data: {text}").eval.data == f"{folder}/{text}"


LETTERS = st.text(
    st.one_of(st.characters(codec="utf-8"), st.sampled_from("'\"\\$${}[]#:,~ \n-.0123456789exnul"))
)


@given(LETTERS)
@example("${x}")
@example("\\${x")
@example("'x")
@example("\\$x/${")
@example("\\\\${x}")
@example("???")
@example("\x85 \x1c \ufeff \x00")
def test_any_text_survives_command_line_and_file(folder, text):
    assume(text.strip("~") and text.lower() != "null")
    assume(not (len(text) > 1 and text[0] == text[-1] and text[0] in "'\""))
    config = load_config(folder / "base.yaml", [f"log.wandb={as_plain_text(text)}"])
    assert config.log.wandb == text
    config.output_dir = config.eval.data = config.data.train[0].shards = f"/{text}"
    save_config(config, folder / "saved.yaml")
    assert load_config(folder / "saved.yaml") == config


@given(LETTERS)
def test_text_is_escaped_from_interpolation(text):
    assert resolve({"x": as_plain_text(text)}) == {"x": text}


@pytest.mark.parametrize("quoted", ["'x'", '"x"', "'it''s'", '"\\u0041"', "'#x'"])
def test_quotes_around_the_whole_text_are_those_of_yaml(folder, quoted):
    config = load_config(folder / "base.yaml", [f"log.trackio={quoted}"])
    assert config.log.trackio == yaml.safe_load(quoted)


@pytest.mark.parametrize("text", ["", "~", "null", "Null", "NULL"])
def test_null_is_null_where_a_field_may_be_null_unless_in_quotes(folder, text):
    overrides = [f"{key}={text}" for key in ("log.wandb", "eval.data", "train.micro_batch_size")]
    for config in (
        load_config(folder / "base.yaml", overrides),
        load_file(folder, f"log: {{wandb: {text}}}\neval:\n  data: {text}"),
    ):
        assert config.log.wandb is config.eval.data is config.train.micro_batch_size is None
    if text:
        assert load(folder, f"log.wandb='{text}'").log.wandb == text


NUMBERS = st.one_of(
    st.integers().map(str),
    st.floats().map(str),
    st.text("0123456789_+-.eExob: \u0663", max_size=8),
    st.sampled_from(["nan", "inf", "-Infinity", "0100", "1_000", "\uff11\uff10", "1__0", "0x1p3"]),
)


@given(NUMBERS)
def test_numbers_are_those_of_python_or_refused(folder, text):
    for key, kind, limit in (("train.seed", int, 2**63), ("optim.weight_decay", float, math.inf)):
        try:
            number = kind(text)
        except ValueError:
            number = math.nan
        section, field = key.split(".")
        for load_it in (
            lambda key=key: load_config(folder / "base.yaml", [f"{key}={text}"]),
            lambda s=section, f=field: load_file(folder, yaml.safe_dump({s: {f: text}})),
        ):
            if 0 <= number < limit:
                assert getattr(getattr(load_it(), section), field) == number
            else:
                with pytest.raises(ValueError, match=rf"{section}\.{field} \(.*\) must "):
                    load_it()


@pytest.mark.parametrize("text", ["true", "True", "yes", "on", "ON", "1", "'true'", " true"])
def test_bools_have_four_spellings(folder, text):
    opposite = {"t": "false", "y": "no", "o": "OFF", "1": "0"}[text.strip("' ").lower()[0]]
    for load_it in (
        lambda value: load(folder, f"checkpoint.asynchronous={value}").checkpoint,
        lambda value: load_file(folder, f"checkpoint: {{asynchronous: {value}}}").checkpoint,
    ):
        assert load_it(text).asynchronous is True
        assert load_it(opposite).asynchronous is False


@pytest.mark.parametrize(
    ("text", "meaning"),
    [("true", "towers"), ("On", "towers"), ("1", "towers"), ("false", "none"), ("no", "none")],
)
def test_compile_may_be_the_bool_it_once_was(folder, text, meaning):
    assert load(folder, f"train.compile={text}").train.compile == meaning
    assert load_file(folder, f"train: {{compile: {text}}}").train.compile == meaning
    assert load_file(folder, f"train: {{compile: {meaning}}}").train.compile == meaning


@given(st.text().filter(lambda key: not set(key) & set("[=")))
def test_an_unknown_key_is_named(folder, key):
    assume(key not in get_type_hints(Config))
    for prefix in ("", "train."):
        assume(key.split(".")[0] not in {field.name for _, n in sections() for field in fields(n)})
        with pytest.raises(ValueError, match="unknown key") as caught:
            load_config(folder / "base.yaml", [f"{prefix}{key}=1"])
        assert f"({prefix}{key.split('.')[0]}" in str(caught.value)


def test_lists_in_yaml_s_form_hold_any_text(folder):
    parts = ["a,b/{0..1}.tar", "it's", 'a "b"', "[x]", "007", "a: b", "#x"]
    written = ", ".join("'" + part.replace("'", "''") + "'" for part in parts)
    expected = [Source(shards=f"{os.getcwd()}/{part}") for part in parts]
    assert load(folder, f"data.train=[{written}]").data.train == expected
    for part in parts[:-4]:
        assert load(folder, f"data.train={part}").data.train[0].shards == f"{os.getcwd()}/{part}"


PATH_KEYS = [
    *("output_dir", "init.pretrained", "init.pretrained_image", "init.pretrained_text"),
    *("data.train", "data.cache.dir", "zero.nvme_path", "zero.deepspeed_config"),
    *("eval.data", "eval.classes", "eval.templates", "eval.validation.shards"),
    *("log.sync_to", "checkpoint.branch_from"),
]
TEXT_KEYS = {
    *(
        "name",
        "teacher.model",
        "log.wandb",
        "log.trackio",
        "eval.sets[*].name",
        "checkpoint.keep_best",
    ),
    *(f"model.{tower}.attention_by_layer[*].layers" for tower in ("vision", "text")),
    *(f"data.captions[*].{name}" for name in ("member", "field", "template")),
    *("model.text.hf_tokenizer_name", "model.text.hf_tokenizer_clean"),
}


def test_every_text_field_is_a_path_or_known_to_be_none():
    """A new text field must say which it is: mark it in the schema, or add it to TEXT_KEYS."""
    found = {
        f"{path}.{field.name}".lstrip("."): "path" in field.metadata
        for path, node in sections()
        for field in fields(node)
        if get_type_hints(node)[field.name] in (str, str | None)
    }
    paths = {key.removesuffix("[*].shards") for key, is_path in found.items() if is_path}
    # A set of eval.sets has the paths of eval.
    assert {key.replace("eval.sets[*]", "eval") for key in paths} == set(PATH_KEYS)
    assert found.keys() - {key for key, is_path in found.items() if is_path} == TEXT_KEYS


def _at(config, key):
    for name in key.split("."):
        config = getattr(config, name)
    return config[0].shards if key == "data.train" else config


@pytest.mark.parametrize("key", PATH_KEYS)
def test_every_path_follows_one_rule(folder, monkeypatch, key):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch")
    monkeypatch.setenv("BUCKET", "s3://bucket")
    section, _, field = key.rpartition(".")
    for text, in_file, on_command_line in (
        ("~", "/home/me", None),
        ("~/x", "/home/me/x", None),
        ("$SCRATCH/me", "/scratch/me", None),
        ("/a/$SCRATCH", "/a//scratch", None),
        ("${oc.env:SCRATCH}/x", "/scratch/x", None),
        ("$BUCKET/x", "s3://bucket/x", None),
        ("s3://$BUCKET/~", "s3://$BUCKET/~", None),
        ("../x", f"{folder.parent}/x", f"{os.path.dirname(os.getcwd())}/x"),
        ("x/${train.steps}", f"{folder}/x/1", f"{os.getcwd()}/x/1"),
        ("a~b/$", f"{folder}/a~b/$", f"{os.getcwd()}/a~b/$"),
        (r"\$SCRATCH", f"{folder}/$SCRATCH", f"{os.getcwd()}/$SCRATCH"),
        (r"\${x}", f"{folder}/${{x}}", f"{os.getcwd()}/${{x}}"),
        ("./~", f"{folder}/~", f"{os.getcwd()}/~"),
    ):
        content = {field: text}
        for name in reversed(section.split(".") if section else []):
            content = {name: content}
        is_null = text == "~" and key not in ("output_dir", "eval.templates")
        if not is_null:
            assert _at(load(folder, f"{key}={text}"), key) == (on_command_line or in_file), text
        assert _at(load_file(folder, yaml.safe_dump(content)), key) == in_file, text


def test_base_follows_the_rule_of_paths(folder, monkeypatch):
    monkeypatch.setenv("CONFIGS", str(folder))
    for base in ("$CONFIGS/base.yaml", "${oc.env:CONFIGS}/base.yaml", "base.yaml"):
        (folder / "more.yaml").write_text(f"base: {base}\nname: '007'\n")
        assert load_config(folder / "more.yaml").train.steps == 1
