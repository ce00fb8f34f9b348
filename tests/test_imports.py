"""Imports go down the floors, names stay public and apart, settings are light, and no unsafe loader is called."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ["crosscoders", "sae_lora", "diffing", "benchmarks"]
FLOORS = [
    ["crosscoders.common", "crosscoders.kernels"],
    ["crosscoders.text", "crosscoders.dictionary"],
    ["crosscoders.models", "crosscoders.formats"],
    ["crosscoders.activations"],
    ["crosscoders.training"],
    ["crosscoders"],
    ["sae_lora.dictionaries"],
    ["sae_lora.lora", "sae_lora.splicing"],
    ["sae_lora.fitting"],
    ["sae_lora.evaluation", "sae_lora.finetuning"],
    ["sae_lora"],
    ["diffing.latents", "diffing.finetuning"],
    ["diffing.topk_lora"],
    [
        "diffing.causal",
        "diffing.decomposition",
        "diffing.interpretation",
        "diffing.null",
        "diffing.report",
        "diffing.sae_gap",
        "diffing.samples",
    ],
    ["diffing.demo", "diffing.doctor", "diffing.sae"],
    ["diffing.explorer"],
    ["diffing.sharing"],
    ["diffing.baselines"],
    ["diffing.comparison"],
    ["diffing"],
    ["benchmarks"],
]
"""Rooms from the ground up; one of a floor imports those below it and none beside it. The name of a package alone is
its top: `__init__`, `cli`, `__main__`. Benchmarks are one room."""
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
HEAVY = "torch numpy pandas scipy transformers transformer_lens sae_lens peft datasets plotly".split()
PUBLIC = {
    "crosscoders": (
        "ActivationCache CacheConfig CorruptData Crosscoder CrosscoderConfig DataConfig DataSource EnvironmentFault "
        "InputError ModelPair TrainConfig cache_activations cached_stream evaluate live_stream load_crosscoder "
        "load_pair open_source run_cache tensor_stream train"
    ),
    "sae_lora": (
        "FitConfig FrozenDictionary fit inspect_dictionary load_adapter load_corrector load_dictionary measure "
        "special_ids splice with_control"
    ),
    "diffing": (
        "LatentScales Session Thresholds choose_sets latent_table logit_lens measure push_to_hub read_chats "
        "scale_latents scale_run steered steering_vector twin_pairs with_partners write_report"
    ),
}
UNSAFE = [
    (re.compile(r"weights_only\s*=\s*False"), "torch.load without weights_only"),
    (re.compile(r"torch\.load\((?!.*weights_only=True)"), "torch.load without weights_only"),
    (re.compile(r"\bpickle\.loads?\("), "pickle"),
    (re.compile(r"\byaml\.(load|unsafe_load|full_load)\("), "yaml without safe_load"),
    (re.compile(r"trust_remote_code\s*=\s*True"), "remote code"),
    (re.compile(r"(?<![\w.])(eval|exec)\("), "eval or exec"),
]


def modules(package: str) -> dict[str, Path]:
    """Dotted name -> file of every module; a package's own is its name."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        found[".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")] = path
    return found


def room_of(name: str) -> str:
    """The room of a dotted name, of a module or of what stands in one."""
    room = ".".join(name.split(".")[:2])
    return room if room in FLOOR_OF else name.split(".")[0]


def wrong_imports(source: str, module: str) -> list[str]:
    """Names that a module imports from rooms above or beside its own, inside functions too."""
    own = room_of(module)
    wrong = []
    for node in ast.walk(ast.parse(source)):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} has a relative import"
            names = [f"{node.module}.{a.name}" for a in node.names]
        ours = [name for name in names if name.split(".")[0] in PACKAGES]
        wrong += [name for name in ours if room_of(name) != own and FLOOR_OF[room_of(name)] >= FLOOR_OF[own]]
    return wrong


def unsafe_calls(source: str) -> list[str]:
    return [what for pattern, what in UNSAFE if pattern.search(source)]


def shadowing(names: set[str], public: list[str]) -> set[str]:
    """Names of modules and folders that are names of public functions too."""
    return {name.split(".")[-1] for name in names} & set(public)


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_imports_from_a_room_above_or_beside_its_own(package: str) -> None:
    wrong = {name: wrong_imports(path.read_text(), name) for name, path in modules(package).items()}
    assert not {name: imports for name, imports in wrong.items() if imports}


def test_every_folder_has_a_floor() -> None:
    folders = {f"{package}.{path.parent.name}" for package in PACKAGES[:3]
               for path in (ROOT / package).glob("*/__init__.py")}  # fmt: skip
    assert folders - FLOOR_OF.keys() == set()
    assert {room for room in FLOOR_OF if room not in folders | set(PACKAGES)} == {
        "sae_lora.splicing", "diffing.finetuning"
    }  # fmt: skip


def test_no_module_unpickles_evaluates_or_trusts_remote_code() -> None:
    for package in PACKAGES:
        for path in modules(package).values():
            assert not unsafe_calls(path.read_text()), path


@pytest.mark.parametrize("package", PUBLIC)
def test_the_public_names_are_these(package: str) -> None:
    assert importlib.import_module(package).__all__ == PUBLIC[package].split()


@pytest.mark.parametrize("package", PUBLIC)
def test_no_module_or_folder_has_the_name_of_a_public_function(package: str) -> None:
    """Importing it would put a module in the function's place."""
    assert not shadowing(set(modules(package)), PUBLIC[package].split())


def test_settings_and_command_lists_import_nothing_heavy() -> None:
    light = [name for package in PACKAGES[:3] for name in modules(package) if name.endswith((".settings", ".cli"))]
    assert len(light) > 10
    script = f"import importlib, sys\nfor name in {light}: importlib.import_module(name)\n" \
        f"print([name for name in {HEAVY} if name in sys.modules])"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_every_check_can_fail() -> None:
    lazy = "def f():\n    from diffing.latents.table import x\n"
    assert wrong_imports(lazy, "crosscoders.common.files") == ["diffing.latents.table.x"]
    assert wrong_imports("import benchmarks.x", "diffing.cli") == ["benchmarks.x"]
    assert wrong_imports("from crosscoders import activations", "crosscoders.text.tokens") == [
        "crosscoders.activations"
    ]
    assert wrong_imports("import crosscoders.dictionary.norms", "crosscoders.text.tokens")  # beside it
    assert wrong_imports("from crosscoders import train", "crosscoders.training.feed") == ["crosscoders.train"]
    assert not wrong_imports("from crosscoders.text import tokens\nimport torch", "crosscoders.models.pair")
    assert not wrong_imports("from crosscoders import train", "diffing.latents.table")
    assert shadowing({"diffing.measure", "diffing.null"}, ["measure"]) == {"measure"}
    assert unsafe_calls("torch.load(path)") and unsafe_calls("x = eval(text)") and unsafe_calls("yaml.load(f)")
    assert not unsafe_calls("torch.load(path, weights_only=True)") and not unsafe_calls("model.eval()")
