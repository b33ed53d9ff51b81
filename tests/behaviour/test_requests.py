"""Attacks: what is sent, and how they are named."""

import pytest

from neurondrift.base.errors import ConfigError, DataError
from neurondrift.behaviour.requests import LLAMA2_SYSTEM_PROMPT, Attack, Decoding, system_prompt
from neurondrift.study.settings import AttackSection, resolve
from neurondrift.study.stages.evaluation import attack_from_words, attack_of


def test_what_each_attack_sends(tiny):
    _, tokenizer = tiny
    suffixes = Attack(kind="suffix", suffixes=("! !", "now"))
    assert [request.text for request in suffixes.requests("Do it", tokenizer)] == [
        "<|user|>Do it ! !<|end|><|assistant|>",
        "<|user|>Do it now<|end|><|assistant|>",
    ]
    assert {request.prompt for request in suffixes.requests("Do it", tokenizer)} == {"Do it"}
    plain = Attack(chat_template=False)
    (request,) = plain.requests(" Do it ", tokenizer)
    assert (request.text, request.plain, plain.name) == ("Do it\n", True, "vanilla, no template")
    decoding = Attack(kind="decoding", samples=3)
    assert [request.sample for request in decoding.requests("Do it", tokenizer)] == [0, 1, 2]
    assert decoding.decoding(7) == Decoding(max_new_tokens=7, temperature=1.0, top_p=1.0, seed=0)
    assert suffixes.decoding(7) == Decoding(max_new_tokens=7)
    (request,) = Attack().requests("Do it", tokenizer, system=system_prompt("llama2"))
    assert request.text.startswith(f"<|system|>{LLAMA2_SYSTEM_PROMPT}<|end|>")


def test_attacks_in_words_and_in_the_configuration(tmp_path):
    file = tmp_path / "suffixes.txt"
    file.write_text("a b \n\n  c\n", encoding="utf-8")
    assert attack_of(attack_from_words(f"suffix:{file}")).suffixes == ("a b ", "  c")
    assert attack_from_words("no-template+decoding:2") == AttackSection(kind="decoding", samples=2, chat_template=False)
    study = resolve(preset="smoke", flags={"evaluate.attack": "decoding"})
    assert study.evaluate.attack.samples == 5
    for words in ("decode", "decoding:0", "suffix", "vanilla:3"):
        with pytest.raises(ConfigError, match=r"no such attack.*no-template"):
            attack_from_words(words)
    with pytest.raises(ConfigError, match="needs a file of suffixes"):
        attack_of(AttackSection(kind="suffix"))
    with pytest.raises(DataError, match=r"cannot be read.*no-such-file"):
        attack_of(AttackSection(kind="suffix", suffixes="no-such-file"))
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(DataError, match="is empty"):
        attack_of(AttackSection(kind="suffix", suffixes=str(tmp_path / "empty.txt")))
    with pytest.raises(ConfigError, match=r"evaluate.judge.*no judge 'judgy'"):
        resolve(preset="smoke", flags={"evaluate.judge": "judgy"})
