"""The command line before any model is loaded: help, parsing, completion, the border where errors become exit codes."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from adapter_hub.cli import app
from adapter_hub.cli.arguments import label_names, shown_url
from adapter_hub.cli.console import events, plain, rows, shown
from adapter_hub.cli.verbs import _train_config
from adapter_hub.errors import InvalidInput
from adapter_hub.training.config import TrainConfig

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
GROUP = typer.main.get_command(app)
VERBS = sorted(GROUP.commands)    # type: ignore[attr-defined]
HEAVY = ("torch", "transformers", "sentence_transformers", "faiss", "sqlalchemy", "pyarrow", "numpy", "adapter_hub.hub")


def invoke(*args: str, **options: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(args), prog_name="adapter-hub", **options)    # type: ignore[arg-type]
    return result.exit_code, result.stdout, result.stderr


def as_process(*args: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "adapter_hub.cli", *args]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, **options)    # type: ignore[call-overload, no-any-return]


def examples(text: str) -> list[list[str]]:
    return [shlex.split(line)[1:] for line in re.findall(r"(?:^ +|`)(adapter-hub [^`\n]+)", text, re.MULTILINE)]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_is_in_the_readme_and_its_help_has_an_example_that_parses(verb: str) -> None:
    row = re.search(rf"^\| `{verb}` \| `adapter-hub {verb}\b.*` \|$", README, re.MULTILINE)
    assert row, f"README has no row for {verb}"
    code, out, _ = invoke(verb, "--help")
    assert code == 0
    (example,) = [words for words in examples(out.split("Example:")[1]) if words[0] == verb]
    for words in (example, *examples(row[0])):
        GROUP.commands[words[0]].make_context(words[0], words[1:])    # type: ignore[attr-defined]


def test_the_readme_names_no_verb_that_does_not_exist() -> None:
    assert {name for name in re.findall(r"`adapter-hub ([a-z]+)", README)} == set(VERBS)


@pytest.mark.parametrize("verb", [verb for verb in VERBS])
def test_every_verb_takes_a_registry_and_prints_json(verb: str) -> None:
    options = {option for parameter in GROUP.commands[verb].params for option in parameter.opts}    # type: ignore[attr-defined]
    assert {"--registry", "--json"} <= options


@pytest.mark.parametrize("verb", ["route", "predict", "run"])
def test_the_verbs_that_route_take_a_rate(verb: str) -> None:
    code, _, err = invoke(verb, "a", "b", "--max-false-reject", "5")
    assert code == 2 and "Invalid value for '--max-false-reject': 5 is not a share from 0 to 1: 5 % is 0.05." in err


@pytest.mark.parametrize("args", [["--help"], ["predict", "--help"], ["--version"], []])
def test_help_imports_no_heavy_library(args: list[str]) -> None:
    code = f"""
import sys
from adapter_hub.cli import app
try:
    app({args!r}, prog_name="adapter-hub")
except SystemExit:
    pass
print([name for name in {HEAVY} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


# ---- the border -----------------------------------------------------------------------------------------------------


def test_a_registry_that_is_not_there_is_one_line_on_stderr_and_exit_code_2(tmp_path: Path) -> None:
    done = as_process("list", "--registry", str(tmp_path / "nowhere"), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and "nowhere" in line


def test_the_registry_is_taken_from_after_the_verb_then_before_it_then_the_environment(tmp_path: Path) -> None:
    environment = {"ADAPTER_HUB_REGISTRY": str(tmp_path / "from-env")}
    for args, named in [
        (["--registry", str(tmp_path / "before"), "list", "--registry", str(tmp_path / "after")], "after"),
        (["--registry", str(tmp_path / "before"), "list"], "before"),
        (["list"], "from-env"),
    ]:
        result = CliRunner(env=environment).invoke(app, args)
        assert result.exit_code == 2 and str(tmp_path / named) in result.stderr


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["predict", "hello", "--generation", "{oops"], "--generation is not JSON"),
        (["predict", "hello", "--generation", "[1]"], "--generation is not a JSON object"),
        (["route", "hello", "--file", "inputs.txt"], "both TEXT and --file"),
        (["route", "--file", "absent.txt"], "absent.txt"),
        (["evaluate", "--data", "absent.jsonl", "--registry", "absent"], "absent"),
        (["purge", "banking@1"], "Pass --yes"),
        (["learn", "travel", "rows.jsonl", "--config", "{"], "--config is not JSON"),
        (["learn", "travel", "rows.jsonl", "--config", "nosuch.json"], "there is no file 'nosuch.json'"),
        (["maintain", "--config", "nosuch.toml"], "there is no file 'nosuch.toml'"),
    ],
)
def test_bad_use_is_one_line_that_names_it(args: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = invoke(*args)
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("error: ") and said in line


def test_an_unknown_verb_and_a_missing_argument_are_exit_code_2() -> None:
    assert invoke("lsit")[0] == 2
    code, _, err = invoke("show")
    assert code == 2 and "REF" in err


def test_bytes_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    code, _, err = invoke("route", "--file", str(tmp_path / "latin.txt"))
    assert code == 2 and "latin.txt is not UTF-8" in err
    done = subprocess.run(
        [sys.executable, "-m", "adapter_hub.cli", "route", b"caf\xe9"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and "is not UTF-8" in done.stderr


def test_label_names_of_any_length_are_names_and_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    """Previously a long list was taken for the name of a file, which no system holds."""
    names = [f"some_intent_name_{i:02d}" for i in range(200)]
    assert label_names(",".join(names)) == names
    (tmp_path / "labels.txt").write_bytes("café\n".encode("latin-1"))
    with pytest.raises(InvalidInput, match=r"labels\.txt is not UTF-8"):
        label_names(str(tmp_path / "labels.txt"))
    (tmp_path / "labels.json").write_text('["a", "b"]')
    assert label_names(str(tmp_path / "labels.json")) == ["a", "b"]


def test_a_password_is_not_shown() -> None:
    assert shown_url("postgresql+psycopg://me:s3cr@t@host/db") == "postgresql+psycopg://me:***@host/db"
    assert shown_url("postgresql://me@host/db?x=1") == "postgresql://me@host/db?x=1"
    assert shown_url("/a/folder:with@signs") == "/a/folder:with@signs"


# ---- completion -----------------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    for version in ("banking/1", "banking/2", "banking/10", "travel/1"):
        (tmp_path / "adapters" / version).mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("show ba", ["banking"]),
        ("history ", ["banking", "travel"]),
        ("show banking@", ["banking@production", "banking@10", "banking@2", "banking@1"]),
        ("predict hello --adapter tr", ["travel"]),
        ("promote nobody@", []),
        ("ro", ["rollback", "route"]),
    ],
)
def test_completion_offers_verbs_names_and_versions_without_opening_anything(words: str, offered: list[str], folders: Path) -> None:
    for line, env in ((words, {"ADAPTER_HUB_REGISTRY": str(folders)}), (f"--registry {folders} {words}", {})):
        count = len(shlex.split(line)) + (0 if line.endswith(" ") else -1) + 1
        request = {"_ADAPTER_HUB_COMPLETE": "complete_bash", "COMP_WORDS": f"adapter-hub {line}", "COMP_CWORD": str(count)}
        environment = {key: value for key, value in os.environ.items() if key != "ADAPTER_HUB_REGISTRY"} | env | request
        done = subprocess.run([sys.executable, "-m", "adapter_hub.cli"], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.stdout.split() == offered


def test_the_completion_script_can_be_shown() -> None:
    # The shell is found by looking at the parent process; `; true` keeps bash from replacing itself.
    command = f"{shlex.quote(sys.executable)} -m adapter_hub.cli --show-completion; true"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "_ADAPTER_HUB_COMPLETE=complete_bash" in done.stdout and done.stdout.rstrip().endswith("adapter-hub")


# ---- a registry from end to end -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small base, an adapter for it, and a registry made by the command line."""
    from adapter_hub.base_model import FrozenBase
    from adapter_hub.testing import make_adapter, tiny_model

    root = tmp_path_factory.mktemp("cli")
    base = FrozenBase.load(tiny_model(root / "bert"))
    make_adapter(base, root / "colours", seed=1)
    code, out, err = invoke("init", str(root / "registry"), "--base-model", str(root / "bert"), "--encoder", "hash", "--json")
    assert code == 0, err
    assert json.loads(out)["base_fingerprint"] == base.fingerprint
    return root


def lines(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_registry_is_filled_used_checked_and_shared_by_verbs_alone(made: Path, tmp_path: Path) -> None:
    registry = ["--registry", str(made / "registry")]
    shades = [{"text": f"paint the {thing} {shade}", "label": shade} for thing in ("wall", "door", "car") for shade in ("red", "blue")]
    words = [{"text": f"{word} number {i}", "label": word} for word in ("apple", "zebra") for i in range(12)]

    register = ["register", "colours", str(made / "colours"), "--examples", lines(tmp_path / "shades.jsonl", shades), "--labels", "red,blue"]
    code, out, err = invoke(*register, *registry, "--json")
    assert (code, json.loads(out)) == (0, {"ref": "colours@1", "production": True, "examples": 6, "evaluation": 0}), err
    code, out, err = invoke(*register, *registry, "--labels", "red")
    assert code == 2 and "1 labels were given for a head of 2 outputs" in err

    settings = '{"epochs": 8, "steps_min": 0, "learning_rate": 0.005}'
    code, out, err = invoke("learn", "words", lines(tmp_path / "words.jsonl", words), "--config", settings, *registry, "--json")
    report = json.loads(out)
    assert report["ref"] == "words@1" and code == (0 if report["promoted"] else 1), err
    assert {"accuracy", "choice_accuracy", "epoch"} <= report["metrics"].keys()
    assert report["verdict"] == report["gate"]["verdict"] and report["gate"]["findings"][0]["check"] == "validation"
    anew = ["learn", "words", str(tmp_path / "words.jsonl"), "--config", settings, "--start", "cold", *registry]
    code, out, err = invoke(*anew, "--promote", "never")    # as it was asked: no failure
    assert code == 0 and "words@2" in out and "reason: never; the gate: " in out, err
    more = lines(tmp_path / "more.jsonl", [{"text": f"{word} at {i}", "label": word} for word in ("apple", "zebra") for i in range(5)])
    code, out, err = invoke(*anew, "--promote", "always", "--evaluation", more)
    assert code == 0 and "reason: always; the gate: " in out and "  promote: integrity" not in out, err
    assert json.loads(invoke("show", "words", *registry, "--json")[1])["evaluation_digest"], "what is kept to measure is known by its digest"
    assert invoke("learn", "words", str(tmp_path / "words.jsonl"), "--start", "hot", *registry)[0] == 2
    sizes = [{"text": f"{word} number {i}", "label": str(size)} for word, size in (("ant", -1.0), ("whale", 2.0)) for i in range(12)]
    learn = ["learn", "sizes", lines(tmp_path / "sizes.jsonl", sizes), "--config", settings, *registry, "--promote", "always"]
    code, out, err = invoke(*learn, "--problem-type", "regression", "--prompt-template", "size of {text}", "--json")
    assert code == 0 and "mae" in json.loads(out)["metrics"], err
    assert invoke(*learn, "--task-type", "TOKEN_CLS")[0] == 2
    code, out, err = invoke("show", "sizes", *registry, "--json")
    assert (json.loads(out)["problem_type"], json.loads(out)["prompt_template"]) == ("regression", "size of {text}"), err
    assert invoke("purge", "sizes@1", "--yes", *registry)[0] == 0
    assert invoke("promote", "words@1", *registry)[:2] == (0, "production is now words@1\n")

    asked = [{"text": "paint the gate red", "id": 1}, {"text": ""}, {"text": "zebra number 40", "label": "zebra"}]
    run = ["run", lines(tmp_path / "in.jsonl", asked), str(tmp_path / "out.jsonl"), "--max-false-reject", "0", *registry, "--json"]
    code, out, err = invoke(*run)
    summary = json.loads(out)
    assert (code, summary["rows"], summary["answered"], summary["failed"]) == (1, 3, 2, 1), err    # 1: a row failed
    first, second = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert (first["adapter"], first["id"], second["adapter"], second["target"]) == ("colours@1", 1, "words@1", "zebra")
    assert invoke(*run)[0] == 2
    code, out, _ = invoke(*run, "--resume")
    assert code == 1 and json.loads(out)["adapters"] == summary["adapters"]

    code, out, err = invoke("predict", "paint the gate red", "--max-false-reject", "0", *registry, "--json")
    [prediction] = json.loads(out)
    assert code == 0 and prediction["adapter"] == "colours@1" and prediction["scores"].keys() == {"red", "blue"}, err
    assert {"threshold", "calibration", "candidates", "margin", "reason"} <= prediction.keys()
    assert invoke("predict", "x", "--adapter", "nobody", *registry)[0] == 2

    code, out, err = invoke("verify", *registry, "--json")
    assert code == 0 and json.loads(out)["problems"] == [], err
    weights = made / "registry" / "adapters" / "colours" / "1" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    code, out, _ = invoke("verify", *registry, "--json")
    assert code == 1 and "colours" in str(json.loads(out)["problems"])
    code, out, _ = invoke("verify", *registry)
    assert code == 1 and out.startswith("DAMAGED") and f"colours@1: {weights} " in out    # uncut, whatever its length
    weights.write_bytes(whole)

    other = tmp_path / "other"
    assert invoke("init", str(other), "--base-model", str(made / "bert"), "--encoder", "hash")[0] == 0
    shutil.copytree(made / "registry" / "adapters" / "colours", other / "adapters" / "colours")
    (other / "adapters" / "colours" / "history.jsonl").unlink()
    code, out, _ = invoke("verify", "--registry", str(other))
    assert code == 0 and out.startswith("no damage was found\nunregistered folders: 1; no reader sees them") and "\n  colours@1\n" in out
    code, out, err = invoke("adopt", "--registry", str(other), "--json")
    assert code == 0 and json.loads(out)["adopted"] == ["colours@1"], err
    code, out, err = invoke("predict", "x", "--adapter", "colours@1", "--registry", str(other), "--json")
    assert code == 0 and json.loads(out)[0]["adapter"] == "colours@1", err


def test_learn_prints_json_alone_beside_a_bar_and_each_reason_once(made: Path, tmp_path: Path) -> None:
    """Previously the trainer's losses stood on stdout among the JSON, and the gate's reason was printed twice."""
    registry = ["--registry", str(tmp_path / "registry")]
    code, out, err = invoke("init", *registry, "--base-model", str(made / "bert"), "--encoder", "hash", "--keep", "text")
    assert code == 0 and re.search(r"^keep +text$", out, re.MULTILINE) and 'keep = "text"' in (tmp_path / "registry" / "hub.toml").read_text(), err
    words = lines(tmp_path / "words.jsonl", [{"text": f"{word} number {i}", "label": word} for word in ("apple", "zebra") for i in range(12)])
    learn = ["learn", "words", words, "--config", '{"epochs": 2, "steps_min": 0, "progress": true}', "--promote", "always", *registry]
    done = as_process(*learn, "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["ref"] == "words@1", done.stderr
    assert "100%" in done.stderr and done.stderr.count("eval_accuracy") == 2
    code, out, err = invoke(*learn)
    gate = json.loads((tmp_path / "registry/adapters/words/2/gate.json").read_text())
    [validation] = [found["reason"] for found in gate["findings"] if found["check"] == "validation"]
    assert code == 0 and out.count(validation) == 1, out


def test_what_is_asked_wrongly_or_without_result_is_said(made: Path, tmp_path: Path) -> None:
    registry = ["--registry", str(made / "registry")]
    adapter = ["register", "shades", str(made / "colours"), *registry]
    code, out, _ = invoke(*adapter, "--labels", "warm,cold")
    assert code == 0 and out.startswith("registered shades@1; only its name reaches it")
    code, _, err = invoke(*adapter, "--labels", "labels.json")
    assert code == 2 and "there is no file 'labels.json'" in err
    code, _, err = invoke("show", "shads", *registry)
    assert code == 2 and "adapter 'shads' is not registered. Closest: 'shades'." in err
    code, _, err = invoke("predict", "x", "--adapter", "shades", "--max-false-reject", "0.1", *registry)
    assert code == 2 and "exclude each other" in err
    code, _, err = invoke("--device", "tpu9", "predict", "x", "--adapter", "shades", *registry)
    assert code == 2 and err.startswith("error: models cannot run on device 'tpu9'") and len(err.splitlines()) == 1
    code, _, err = invoke("--precision", "fp8", "predict", "x", "--adapter", "shades", *registry)
    assert code == 2 and err.startswith("error: 'fp8' is not a precision. Known are float32, bfloat16") and len(err.splitlines()) == 1
    assert invoke("--precision", "int8", "predict", "x", "--adapter", "shades", *registry)[0] == 0
    assert "no version matches" in invoke("list", "--base", "some/other", *registry)[1]
    assert "shades@1" in invoke("list", "--task-type", "seq_cls", *registry)[1]
    code, out, _ = invoke("export", "shades", str(tmp_path / "plain"), *registry)
    assert (code, out) == (0, f"exported shades@1 to {tmp_path / 'plain'}\n")
    code, out, _ = invoke("export", "shades", str(tmp_path / "again"), *registry, "--json")
    assert json.loads(out) == {"ref": "shades@1", "folder": str(tmp_path / "again")}

    other = tmp_path / "other"
    assert invoke("init", str(other), "--base-model", str(made / "bert"), "--encoder", "hash")[0] == 0
    shutil.copytree(made / "registry" / "adapters" / "shades", other / "adapters" / "shades")
    (other / "adapters" / "shades" / "1" / "adapter_model.safetensors").write_bytes(b"other bytes")
    code, out, _ = invoke("adopt", "--registry", str(other))
    assert code == 1 and "refused: " in out and str(other / "adapters" / "shades" / "1" / "adapter_model.safetensors") in out


def test_explanations_say_which_score_is_which_and_show_as_many_candidates_as_asked(made: Path, tmp_path: Path) -> None:
    root = tmp_path / "registry"
    registry = ["--registry", str(root)]
    assert invoke("init", str(root), "--base-model", str(made / "bert"), "--encoder", "hash")[0] == 0
    rows = [{"text": f"paint the {thing} {shade}", "label": shade} for thing in ("wall", "door") for shade in ("red", "blue")]
    held_out = [rows[0], {"text": "paint the roof red"}, {"text": "paint the gate blue"}]
    adapter = [str(made / "colours"), "--labels", "red,blue", *registry]
    given = ["--examples", lines(tmp_path / "rows.jsonl", rows), "--evaluation", lines(tmp_path / "held_out.jsonl", held_out)]
    code, out, err = invoke("register", "colours", *adapter, *given)
    assert code == 0 and out == "registered colours@1; 2 of 3 evaluation inputs are kept\n", err
    assert json.loads(invoke("register", "colours", *adapter, *given, "--json")[1])["evaluation"] == 2
    assert invoke("register", "invoices", *adapter, "--description", "what accountants write")[0] == 0
    assert invoke("register", "letters", *adapter, "--examples", lines(tmp_path / "bare.jsonl", [{"text": "dear madam"}]))[0] == 0

    code, out, err = invoke("route", "--explain", "paint the shed red", *registry)
    assert code == 0 and len(re.findall(r"^  \d\. ", out, re.MULTILINE)) == 3, err
    shown = [line for line in out.splitlines() if " score" in line]
    assert re.match(r"  \w+@\d fits best: it scores \d", shown[0])
    assert re.match(r"  acceptance score \S+, threshold \S+: how far the best candidate's score lies above what inputs of its adapter", shown[1])
    assert re.match(r"  candidate scores, around 1 for inputs like the exemplars; margin \S+ between the first two:$", shown[2])
    assert re.search(r"like \S+: its description stands for it · what accountants write$", out, re.MULTILINE)
    assert re.search(r"like \S+: the name of its label stands for it · red$", out, re.MULTILINE)
    assert re.search(r"like \S+: an exemplar without a label, whose text is not kept$", out, re.MULTILINE)
    for k in (1, 2):
        out = invoke("route", "--explain", "--k", str(k), "paint the shed red", *registry)[1]
        assert len(re.findall(r"^  \d\. ", out, re.MULTILINE)) == k
    assert len(json.loads(invoke("route", "x", *registry, "--json")[1])[0]["candidates"]) == 1
    code, _, err = invoke("route", "a b", "\x07\x1b", *registry)
    assert code == 2 and err == "error: text 2 of 2 has nothing but control characters. Remove it or write its text.\n"
    code, out, err = invoke("calibrate", *registry)
    assert code == 0 and re.search(r"^rate +threshold +before +expect", out, re.MULTILINE), err
    code, out, err = invoke("effect", "colours@1", *registry)
    said = "colours@1 in place of colours@2 takes at most 0.0 % of another adapter's inputs, beyond what colours@2 took."
    assert code == 0 and out.startswith(said), err


def test_verbose_says_what_this_package_does_and_not_what_its_libraries_do(made: Path) -> None:
    done = as_process("-v", "route", "x", "--registry", str(made / "registry"))
    assert done.returncode == 0 and "faiss" not in done.stderr.lower(), done.stderr


def test_ctrl_c_says_the_command_that_goes_on_with_every_option(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from adapter_hub.batch import job

    class Stopped(job.Progress):
        def __init__(self, *_: object) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr(job, "Progress", Stopped)
    source, output = lines(tmp_path / "in.jsonl", [{"text": f"row {i}"} for i in range(300)]), str(tmp_path / "out.jsonl")
    options = ["--max-false-reject", "0.0", "--generation", '{"max_new_tokens": 5}', "--slots-max", "3", "--no-truncate"]
    code, _, err = invoke("--registry", str(made / "registry"), "--device", "cpu", "run", source, output, *options)
    assert code == 130
    [words] = examples(err.replace("Go on with: ", "\n  "))
    assert words == ["--registry", str(made / "registry"), "--device", "cpu", "--precision", "float32", "run", source, output, "--resume", *options]
    monkeypatch.undo()
    code, out, err = invoke(*words)
    assert code == 0 and "300" in out, err


# ---- what is shown --------------------------------------------------------------------------------------------------


def test_plain_turns_facts_into_json_values_and_numbers_that_json_lacks_into_null() -> None:
    class Fact:
        def to_json(self) -> dict[str, object]:
            return {"score": float("-inf"), "path": Path("a"), "refs": ("x", 1)}

    assert plain([Fact(), float("nan"), True]) == [{"score": None, "path": "a", "refs": ["x", 1]}, None, True]
    json.dumps(plain(Fact()), allow_nan=False)


def test_columns_stand_in_the_order_of_the_fields_whichever_row_fills_them(capsys: pytest.CaptureFixture[str]) -> None:
    rows([{"ref": "a@1", "aliases": [], "state": "live"}, {"ref": "a@2", "aliases": ["production"], "state": "live"}])
    assert capsys.readouterr().out.split("\n")[0].split() == ["ref", "aliases", "state"]


def test_a_cell_is_one_short_line_that_a_terminal_does_not_obey() -> None:
    assert shown("a\x1b[31m\nb\tc") == "a [31m b c"
    assert shown("x" * 500) == "x" * 59 + "…"
    assert shown(list("abcdefgh")) == "a, b, c, d, e, f, … (8)"
    assert [shown(value) for value in (None, True, 0.123456, 12345.6, {"a": 1})] == ["-", "yes", "0.1235", "12,346", "a=1"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_reasons_of_a_history_are_whole_on_a_terminal_and_in_a_pipe(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Previously they were cut at 60 characters."""
    words = [f"word{i}" for i in range(400)]
    moved = {"at": "2026-03-01T12:00:00.000+00:00", "kind": "moved", "version": 2, "alias": "production", "previous": 1, "reason": "short"}
    events([moved, moved | {"reason": " ".join(words)}])
    head, short, long = capsys.readouterr().out.splitlines()
    assert long.endswith(" ".join(words)) and short.endswith("short") and head.endswith("reason")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "stdout", screen := Terminal())
    events([moved, moved | {"reason": " ".join(words)}])
    drawn = re.sub(r"\x1b\[[0-9;]*m", "", screen.getvalue())
    assert re.findall(r"word\d+", drawn) == words and max(map(len, drawn.splitlines())) <= 100


def test_a_training_config_is_a_presets_name_json_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text('preset = "fast"\nr = 16\n')
    assert _train_config("fast") == TrainConfig.preset("fast")
    assert _train_config('{"preset": "fast", "r": 16}') == _train_config(str(tmp_path / "c.toml")) == TrainConfig.preset("fast", r=16)
    assert _train_config("") is None
    with pytest.raises(InvalidInput, match=r"--config 'fastest' is no preset, no JSON, and no \.json or \.toml file\. .* fast, balanced, thorough"):
        _train_config("fastest")
    with pytest.raises(InvalidInput, match=r"there is no file 'nosuch\.json'\. There are the presets fast, balanced, thorough\."):
        _train_config("nosuch.json")
