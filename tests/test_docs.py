"""The documents: every command, flag, function, link and example that they name exists, and every checker can fail."""

import importlib
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from documents import (
    DOCUMENTS,
    GUIDE,
    NOTEBOOKS,
    PACKAGES,
    ROOT,
    blocks,
    command_lines,
    faults,
    messages,
    named_commands,
    python_calls,
    read,
    spans,
    wrong_command,
    wrong_docstring,
    wrong_flag,
    wrong_index,
    wrong_length,
    wrong_link,
    wrong_log,
    wrong_make_target,
    wrong_message,
    wrong_name,
    wrong_path,
    wrong_presets,
    wrong_public_api,
    wrong_python,
    wrong_python_call,
    wrong_settings,
)

from crosscoders import ActivationCache, Crosscoder, CrosscoderConfig
from diffing.latents.table import scale_run
from diffing.latents.verdict import VERDICTS

# ----------------------------------------------------------------------------------------------------------- documents


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_and_flag_in_the_documents_exists(document: str) -> None:
    text = read(document)
    assert not faults(wrong_command, command_lines(text) + named_commands(text))
    assert not faults(wrong_flag, [span for span in spans(text) if re.match(r"--[a-z]", span)])
    assert not faults(wrong_python_call, python_calls(text))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_command_lines_in_the_documents_are_accepted_with_their_values(
    document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for block in blocks(read(document), "yaml"):  # the first line is a comment with the file's name
        Path(block.split("\n")[0].removeprefix("# ")).write_text(block)
    assert not faults(wrong_settings, command_lines(read(document)))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_module_function_and_file_in_the_documents_exists(document: str) -> None:
    names = [span for span in spans(read(document)) if re.fullmatch(rf"({'|'.join(PACKAGES)})(\.\w+)+", span)]
    assert not faults(wrong_name, names + re.findall(r"^::: (\S+)$", read(document), re.M))
    assert not faults(wrong_path, spans(read(document)))


@pytest.mark.parametrize("document", [*DOCUMENTS, "docs/log.md"])
def test_links_inside_the_repository_lead_somewhere(document: str) -> None:
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", read(document)) if "://" not in link]
    assert not faults(lambda link: wrong_link(document, link), links)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_make_targets_in_the_documents_exist(document: str) -> None:
    targets = [span.split()[1] for span in spans(read(document)) if re.fullmatch(r"make [\w-]+", span)]
    assert not faults(lambda target: wrong_make_target(target, read("Makefile")), targets)


def test_the_readme_is_short_and_leads_to_every_page_of_the_guide() -> None:
    assert wrong_length(read("README.md"), 150) is None
    assert "](docs/guide/README.md)" in read("README.md")
    assert not faults(lambda page: wrong_index(page, read("docs/guide/README.md")), GUIDE)


def test_the_messages_that_the_guide_explains_are_said_by_some_command() -> None:
    explained = messages(read("docs/guide/troubleshooting.md"))
    assert len(explained) >= 10
    assert not faults(wrong_message, explained)


def test_the_log_is_newest_first_and_says_a_verdict_in_every_entry() -> None:
    assert wrong_log(read("docs/log.md")) is None


def test_the_python_examples_compile_and_import_what_exists() -> None:
    examples = [block for document in DOCUMENTS for block in blocks(read(document), "python")]
    assert len(examples) >= 3
    assert not faults(wrong_python, examples)


@pytest.mark.parametrize(
    "document", [document for document in DOCUMENTS if document not in NOTEBOOKS and blocks(read(document), "python")]
)
def test_the_python_examples_run(
    document: str,
    cache_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs/gemma").mkdir(parents=True)
    Path("runs/gemma/cache").symlink_to(cache_folder)
    shape = CrosscoderConfig(dict_size=24, activation="relu", d_model=ActivationCache(cache_folder).d_model)
    crosscoder = Crosscoder(shape)
    crosscoder.init_weights_(norm=1.0, generator=torch.Generator().manual_seed(0))
    crosscoder.save("runs/gemma/run")
    scale_run(Path("runs/gemma/run"), ActivationCache(cache_folder))
    for block in blocks(read(document), "python"):
        exec(compile(block, document, "exec"), {})
    assert "relative_decoder_norm" in capsys.readouterr().out
    assert Path("runs/mine/model.safetensors").is_file() == ("runs/mine" in read(document))


def test_the_documents_name_every_verdict_and_every_field_of_a_cache_and_a_crosscoder(cache_folder: Path) -> None:
    assert set(VERDICTS) <= {part for span in spans(read("docs/math.md")) for part in span.split(", ")}
    cache = ActivationCache(cache_folder)
    named = set(spans(read("docs/formats.md")))
    keys = {*cache.manifest, *cache.manifest["statistics"], *cache.manifest["counts"], *cache.manifest["shards"][0]}
    tensors = {*cache.shard(0)._fields, *Crosscoder(CrosscoderConfig(2, k=1, d_model=2)).state_dict()}
    assert keys | tensors <= named, sorted((keys | tensors) - named)


def test_the_table_of_presets_has_the_values_of_the_code() -> None:
    text = read("docs/math.md")
    assert not wrong_presets(text)
    assert wrong_presets(text.replace("| 0.041 |", "| 0.036 |"))
    assert wrong_presets(re.sub(r"\| `l1_coefficient` .*\n", "", text))


# ---------------------------------------------------------------------------------------------------------------- code


@pytest.mark.parametrize("package", PACKAGES)
def test_the_public_api_is_one_list(package: str) -> None:
    module = importlib.import_module(package)
    source = read(f"{package}/__init__.py")
    assert wrong_public_api(source, module._HOMES, module.__all__) is None
    for name in module.__all__:
        assert getattr(module, name) is not None
        assert wrong_name(f"{module._HOMES[name]}.{name}") is None
    with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
        _ = module.no_such_name


@pytest.mark.parametrize("package", [*PACKAGES, "benchmarks"])
def test_public_docstrings_stand_alone(package: str) -> None:
    modules = (path.relative_to(ROOT).as_posix() for path in sorted((ROOT / package).rglob("*.py")))
    wrong = {module: fault for module in modules if (fault := wrong_docstring(read(module)))}
    assert not wrong


# ---------------------------------------------------------------------------------------------------------------- meta


@pytest.mark.parametrize(
    "check, planted",
    [
        (wrong_command, "crosscoders bake --base x"),
        (wrong_command, "crosscoders cache --bass x"),
        (wrong_command, "crosscoders train --crosscoder.dictsize 4"),
        (wrong_command, "diffing scale RUN --preset demo"),
        (wrong_settings, "crosscoders train --cache c --out o --crosscoder.k many"),
        (wrong_settings, "crosscoders cache --base x"),
        (wrong_flag, "--no-such-flag"),
        (wrong_name, "crosscoders.dictionary.metrics.explained"),
        (wrong_name, "crosscoders.no_such_module"),
        (wrong_name, "crosscoders.dictionary.crosscoder.Crosscoder.encoder"),
        (wrong_python, "def f(:"),
        (wrong_python, "from crosscoders import no_such_name"),
        (wrong_python_call, "benchmarks.no_such_module"),
        (wrong_python_call, "benchmarks run no-such-benchmark"),
        (wrong_python_call, "benchmarks run planted --peers"),
        (wrong_python_call, "benchmarks bake planted"),
        (wrong_message, "the tokenizers are all ..., which no code says"),
        (wrong_path, ".venv/bin/pytest tests/test_nothing.py"),
        (wrong_log, "## 2026-11-21 A\n\nVerdict: yes.\n\n## 2026-11-22 B\n\nVerdict: no.\n"),
        (wrong_log, "## 2026-11-21 A\n\nVerdict: yes.\n\n## 2026-11-20 B\n\nNothing said.\n"),
        (wrong_log, "## A\n\nVerdict: yes.\n"),
        (wrong_docstring, 'class A:\n    def f(self):\n        """Of all latents."""\n'),
        (wrong_docstring, '"""What of a cache is recorded."""\n'),
        (lambda text: wrong_length(text, 2), "1\n2\n3\n"),
        (lambda page: wrong_index(page, "[a](a.md)"), "docs/guide/b.md"),
        (lambda link: wrong_link("README.md", link), "docs/nothing.md"),
        (lambda link: wrong_link("README.md", link), "docs/math.md#no-such-heading"),
        (lambda target: wrong_make_target(target, "all:\n\ttrue\n"), "demo"),
        (lambda source: wrong_public_api(source, {"A": "diffing.a"}, ["A", "B"]), "from diffing.a import A"),
        (lambda source: wrong_public_api(source, {"A": "diffing.a"}, ["A"]), "from diffing.b import A"),
    ],
)
def test_each_checker_finds_a_planted_fault(check: Callable[[str], str | None], planted: str) -> None:
    assert check(planted)


def test_commands_are_found_in_blocks_and_in_text() -> None:
    shell = "```sh\n$ crosscoders cache \\\n  --bass x && diffing scale RUN\nls\npython -m benchmarks list\n```"
    text = f"`diffing bake RUN` and `diffing\nscale RUN`\n\n{shell}\n\n`diffing.latents.table`\n\n    python -m x\n"
    assert [line.split() for line in command_lines(text)] == [
        ["crosscoders", "cache", "--bass", "x"], ["diffing", "scale", "RUN"],
    ]  # fmt: skip
    assert named_commands(text) == ["diffing bake RUN", "diffing scale RUN"]
    assert python_calls(text) == ["benchmarks list", "x"]
    assert spans("a `b` c\n```text\n`d`\n```\n") == ["b"]
