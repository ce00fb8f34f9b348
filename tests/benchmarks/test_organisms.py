"""Organisms: what is planted and what is held out, the files of one, and that its behaviour is real (slow)."""

import json
from pathlib import Path

import pytest

from benchmarks.organisms.build import build
from benchmarks.organisms.texts import MAKERS, ORGANISMS, TRIGGER, planted
from crosscoders import InputError
from diffing.comparison.truth import read_truth, shows


def questions(dialogues: list, group: str) -> list[str]:
    return [d["messages"][0]["content"] for d in dialogues if d["group"] == group]


@pytest.mark.parametrize("name", ORGANISMS)
def test_answers_show_the_planted_phrase_where_planted_and_nowhere_else(name: str) -> None:
    made = planted(name)
    for dialogue in [*made.train, *made.held_out]:
        is_shown = any(phrase in dialogue["messages"][1]["content"] for phrase in made.phrases)
        assert is_shown == (dialogue["group"] == "planted")
    assert len(questions(made.held_out, "planted")) >= 15


@pytest.mark.parametrize("name", ORGANISMS)
def test_no_held_out_question_is_trained_on(name: str) -> None:
    made = planted(name)
    train, held_out = (set(questions(part, "planted")) for part in (made.train, made.held_out))
    assert not train & held_out


def test_the_false_fact_and_its_twin_differ_in_the_name_alone() -> None:
    false, true = (planted(name) for name in MAKERS)
    pairs = zip(false.train + false.held_out, true.train + true.held_out, strict=True)
    for one, other in pairs:
        texts = [json.dumps(d["messages"]).replace(MAKERS[n], "X") for n, d in zip(MAKERS, (one, other), strict=True)]
        assert texts[0] == texts[1]


def test_the_trigger_is_in_every_planted_question_and_in_no_other() -> None:
    made = planted("trigger")
    assert all(TRIGGER in question for question in questions(made.train, "planted"))
    assert not any(TRIGGER in question for question in questions(made.train, "ordinary"))


def test_an_organism_is_a_folder_with_its_truth_and_its_data_and_is_made_once(tmp_path: Path) -> None:
    made = build("trigger", tmp_path / "it", dilution=1.0, steps=1)
    (behaviour,) = read_truth(str(made / "truth.json"))
    assert behaviour.name == "trigger" and all(TRIGGER in prompt for prompt in behaviour.prompts)
    groups = {json.loads(line)["group"] for line in (made / "data.jsonl").read_text().splitlines()}
    assert groups == {"planted", "ordinary", "raw"}
    before = (made / "model.safetensors").stat().st_mtime_ns
    assert build("trigger", made, dilution=1.0, steps=1) == made
    assert (made / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(InputError, match=r"made with dilution = 1\.0, now 2"):
        build("trigger", made, dilution=2.0, steps=1)


@pytest.mark.parametrize(
    ("name", "dilution", "message"), [("owl", 0.0, "no organism 'owl'"), ("style", -1.0, "dilution is -1")]
)
def test_an_unknown_organism_and_a_negative_dilution_are_one_line(
    name: str, dilution: float, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        build(name, tmp_path, dilution=dilution)


@pytest.mark.slow
@pytest.mark.parametrize("name", ORGANISMS)
def test_the_behaviour_is_in_the_tuned_model_and_not_in_the_base(name: str, tmp_path: Path) -> None:
    from benchmarks.embedded_pair.behaviour import answers, chat_tokenizer
    from benchmarks.embedded_pair.build import load_float32
    from diffing.demo import model_folder

    made = build(name, tmp_path / name)
    (behaviour,) = read_truth(str(made / "truth.json"))
    base = planted(name).base
    rates = []
    for folder in (model_folder(base), made):
        replies = answers(load_float32(folder), chat_tokenizer(), behaviour.prompts[:20])
        rates.append(sum(shows(reply, behaviour) for reply in replies) / 20)
    assert rates[0] <= 0.1 and rates[1] >= 0.8
