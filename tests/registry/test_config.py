"""hub.toml: what is written is read back; what is wrong is named with its key, its value and what is allowed."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapter_hub.errors import InvalidConfig, RegistryNotFound
from adapter_hub.registry.config import RegistryConfig, read_config, render_config, write_config

printable = st.text(st.characters(codec="utf-8"), min_size=1, max_size=30).filter(str.isprintable)


@given(base=printable, encoder=printable, tokens=st.integers(1, 10**6), rate=st.floats(0, 1), keep=st.sampled_from(["vectors", "text"]))
def test_any_configuration_is_read_back_as_it_was_written(tmp_path_factory, base, encoder, tokens, rate, keep):
    path = tmp_path_factory.mktemp("config") / "hub.toml"
    config = RegistryConfig(base, encoder, tokens, "sha256:1", "sha256:2", max_false_reject=rate, keep=keep, gate_margin=rate, gate_level=0.01)
    write_config(path, config)
    assert read_config(path) == config


def test_the_defaults_are_filled_in(tmp_path):
    path = tmp_path / "hub.toml"
    path.write_text('base_model = "b"\nencoder = "hash"\nmax_tokens = 128\n')
    assert read_config(path) == RegistryConfig("b", "hash", 128, "", "", max_false_reject=0.05, max_taken=1.0, keep="vectors")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("max_tokens = 0", "max_tokens = 0 is not a whole number from 1 to 1000000"),
        ("max_tokens = true", "max_tokens = True is not a whole number"),
        ('max_tokens = "8"', "max_tokens = '8' is not a whole number"),
        ('base_model = ""', "base_model = '' is not the id or folder of a model"),
        ("encoder = 3", "encoder = 3 is not the id or folder"),
        ("policy = 3", "policy = 3 is not a table"),
        ("[policy]\nmax_false_reject = 1.5", "policy.max_false_reject = 1.5 is not a number from 0 to 1"),
        ("[policy]\nmax_false_reject = nan", "policy.max_false_reject = nan is not a number from 0 to 1"),
        ("[policy]\ngate_level = 0.0", "policy.gate_level = 0.0 is not a number above 0, at most 0.5"),
        ("[policy]\ngate_margin = -1", "policy.gate_margin = -1 is not a number from 0 to 1"),
        ('[policy]\nkeep = "all"', "policy.keep = 'all' is not \"vectors\" or \"text\""),
        ('[policy]\nkepe = "text"', "policy.kepe is not a key. Did you mean policy.keep?"),
        ("maxtokens = 8", "maxtokens is not a key. Did you mean max_tokens?"),
        ("zzz = 8", "zzz is not a key. Known keys: base_fingerprint"),
        ("= 8", "hub.toml is not TOML"),
    ],
)
def test_a_wrong_setting_is_named_with_what_is_allowed(tmp_path, line, message):
    key = line.split(" =")[0]
    kept = [text for text in ('base_model = "b"', 'encoder = "hash"', "max_tokens = 8") if not text.startswith(f"{key} ")]
    (tmp_path / "hub.toml").write_text("\n".join([*kept, line]))
    with pytest.raises(InvalidConfig) as caught:
        read_config(tmp_path / "hub.toml")
    assert message in str(caught.value)


def test_a_missing_key_is_named(tmp_path):
    (tmp_path / "hub.toml").write_text('base_model = "b"\nmax_tokens = 8\n')
    with pytest.raises(InvalidConfig, match="encoder is missing"):
        read_config(tmp_path / "hub.toml")


def test_bytes_that_are_not_text_and_a_missing_file(tmp_path):
    with pytest.raises(RegistryNotFound, match=r"hub\.toml is missing"):
        read_config(tmp_path / "hub.toml")
    (tmp_path / "hub.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidConfig, match="is not TOML"):
        read_config(tmp_path / "hub.toml")


def test_people_find_an_explanation_above_each_setting():
    lines = render_config(RegistryConfig("b", "hash", 8)).splitlines()
    bare = [line for before, line in itertools.pairwise(lines) if " = " in line and not (before.startswith("#") or " = " in before)]
    assert bare == [] and sum(" = " in line for line in lines) == 19
