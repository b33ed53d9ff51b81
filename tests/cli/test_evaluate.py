"""`neurondrift evaluate MODEL` and `report --show-responses`, in one process, on the tiny model."""

import json
import re
import tomllib

import pyarrow.parquet as pq
import pytest

from helpers.templates import QWEN3
from neurondrift.cli.__main__ import main
from neurondrift.report.page import render_page
from neurondrift.report.text import render_text
from neurondrift.study.experiments.evaluate_model import shown


def run(*arguments):
    main([str(argument) for argument in arguments])


def test_any_model_is_evaluated(tmp_path, capsys):
    prompts = tmp_path / "mine.txt"
    prompts.write_text("First request\nSecond request\n")
    run(
        "evaluate", "tiny:llama", "--harmful", prompts, "--borderline", "none", "--limit", 3, "--judge", "refusal",
        "--judge", "keyword", "--attack", "vanilla", "--attack", "decoding:2", "--max-new-tokens", 4,
        "--output-dir", tmp_path, "--json", tmp_path / "figures.json",
    )  # fmt: skip
    out = capsys.readouterr().out
    assert "First request" not in out
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [(row["attack"], row["kind"], row["judge"], row["n"]) for row in figures["rates"]] == [
        ("vanilla", "harmful", "refusal", 2),
        ("vanilla", "harmful", "keyword", 2),
        ("vanilla", "ordinary", "refusal", 3),
        ("vanilla", "ordinary", "keyword", 3),
        ("decoding", "harmful", "refusal", 2),
        ("decoding", "harmful", "keyword", 2),
    ]
    keyword = figures["rates"][1]["refused"]
    assert (keyword["rate"], keyword["category_low"]) == (1.0, None)  # under 20 words
    assert "harmful   decoding  keyword  2  1.00 (0.34 to 1.00)" in out
    assert figures["perplexity"] > 1 and "Perplexity of held-out answers" in out
    rows = pq.read_table(tmp_path / "answers.parquet").to_pylist()
    assert len(rows) == (2 + 3 + 2 * 2) * 2
    run(
        "evaluate", "tiny:llama", "--harmful", prompts, "--ordinary", "none", "--borderline", "none", "--answers",
        "none", "--max-new-tokens", 2, "--output-dir", tmp_path, "--show-responses",
    )  # fmt: skip
    assert "First request" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--limit", "3"], "flags are about one model.*--limit.*neurondrift evaluate MODEL"),
        (["tiny:llama", "--lora-r", "3"], "flags are about a study.*--lora-r"),
        (["tiny:llama", "--preset", "smoke"], "flags are about a study.*--preset"),
        (["tiny:llama", "--judge", "hf:no/such-harmbench"], "judge's model cannot be found"),
        (["tiny:llama", "--attack", "magic"], "no such attack"),
        (["tiny:llama", "--harmful", "empty.txt"], "data set is empty"),
        (["tiny:llama", "--harmful", "none", "--ordinary", "none", "--borderline", "none"], "No set of prompts"),
        (["tiny:llama", "--harmful", "long.txt"], "longer than max_length.*1281 tokens.*context is 1024"),
        (["tiny:llama", "--backend", "vllm"], "vLLM loads hub ids and folders only"),
        (["no/such-model", "--limit", "2"], "model cannot be found"),
        (["tiny:llama", "--adapter", "nowhere"], "holds no adapter"),
        (["tiny:llama", "--limit", "0"], "--limit takes a whole number"),
        (["tiny:llama", "--template-argument", "thinking"], "--template-argument takes KEY=VALUE"),
        (["tiny:llama", "--template-argument", "enable_thinking=true"], "asks for no argument of this name"),
    ],
)
def test_mistakes_are_one_message(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "long.txt").write_text("x" * 1278)
    with pytest.raises(SystemExit) as stop:
        run("evaluate", *arguments, "--output-dir", tmp_path / "out")
    assert stop.value.code == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out" / "answers.parquet").exists()


def test_arguments_of_the_template_reach_the_model(tmp_path, monkeypatch, capsys):  # T2
    sent = []
    answer = "neurondrift.behaviour.evaluate.answer"
    monkeypatch.setattr(answer, lambda *given, **more: sent.extend(given[2]) or ["<think>I"] * len(given[2]))
    monkeypatch.setattr("neurondrift.models.loading.TINY_TEMPLATE", QWEN3)
    run(
        "evaluate", "tiny:llama", "--ordinary", "none", "--borderline", "none", "--limit", 3, "--max-new-tokens", 4,
        "--template-argument", "enable_thinking=false", "--output-dir", tmp_path, "--json", tmp_path / "figures.json",
    )  # fmt: skip
    assert len(sent) == 3 and all(request.text.endswith("<think>\n\n</think>\n\n") for request in sent)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [(row["undecided"], row["refused"]["rate"], row["success"]["rate"]) for row in figures["rates"]] == [
        (3, 0, 0)
    ]
    assert "Undecided: 3 of 3 harmful prompts (vanilla, refusal)" in capsys.readouterr().out
    assert tomllib.loads((tmp_path / "evaluation.toml").read_text())["model"]["template"] == {"enable_thinking": False}


def test_a_template_that_raises_is_one_message(tmp_path, monkeypatch, capsys):  # T6
    monkeypatch.setattr("neurondrift.models.loading.TINY_TEMPLATE", "{{ raise_exception('Not so') }}")
    for command in (["evaluate", "tiny:llama"], ["align", "--preset", "smoke"]):
        with pytest.raises(SystemExit) as stop:
            run(*command, "--output-dir", tmp_path / command[0])
        assert stop.value.code == 2
        assert "The model's chat template refuses these messages (Not so)" in " ".join(capsys.readouterr().err.split())


def test_what_a_model_writes_cannot_act_on_the_terminal_or_the_page():
    nasty = "one\x1b[2Jtwo\u202ethree\r\n<script>alert(1)</script>"
    assert shown(nasty) == "one [2Jtwo three <script>alert(1)</script>"
    row = dict(seed=0, step=3, judge="refusal", verdict="none", coherent=True, prompt="<b>?", response=nasty)
    text, page = render_text({}, [row]), render_page({}, [], [row])
    assert "\x1b" not in text + page and "\u202e" not in text + page
    assert "&lt;script&gt;alert(1)" in page and page.count("<script>") == 1  # its own
    assert "ANSWERS TO HARMFUL REQUESTS, SEED 0, STEP 3" in text
    assert "alert(1)" not in render_text({}) + render_page({}, [])


def test_a_study_under_attack_shows_answers_only_when_asked(tmp_path, capsys):
    settings = tmp_path / "study.toml"
    settings.write_text(
        'preset = "smoke"\n[finetune]\nmax_steps = 2\n[evaluate]\nfurther_judges = ["keyword"]\n'
        'system_prompt = "Be kind."\nattack = { kind = "decoding", samples = 2 }\n'
    )
    study = tmp_path / "out"
    run("run", "--config", settings, "--output-dir", study)
    rows = pq.ParquetFile(study / "behaviour" / "step=000002.parquet").read().to_pylist()
    assert {(row["kind"], row["judge"], row["sample"]) for row in rows if row["kind"] != "ordinary"} == {
        *(("harmful", judge, sample) for judge in ("refusal", "keyword") for sample in (0, 1)),
        *(("borderline", judge, 0) for judge in ("refusal", "keyword")),
    }
    assert {row["system_prompt"] for row in rows} == {"Be kind."}
    behaviour = json.loads((study / "results" / "statistical_results.json").read_text())["behaviour"]
    assert behaviour["attack"] == "decoding"
    assert {rate["n"] for rate in behaviour["rates"]} == {6}  # prompts, not answers
    prompt = next(row["prompt"] for row in rows if row["kind"] == "harmful")
    results = study / "results"
    assert prompt not in (results / "report.html").read_text()
    assert not list(results.glob("report_with_responses*"))
    run("report", "--output-dir", study, "--show-responses")
    shown_once = " ".join((results / "report_with_responses.txt").read_text().split())
    assert shown_once.count(" ".join(prompt.split())) == 2 * 3  # two samples; before alignment, first and last step
    assert prompt in (results / "report_with_responses.html").read_text()
    assert prompt not in (results / "report.html").read_text()
    capsys.readouterr()
    run("report", "--output-dir", study)
    assert "stands" in capsys.readouterr().out


HARMBENCH = "Behavior,SemanticCategory,ContextString,BehaviorID\nDo it,illegal,,x\nDo that,illegal,Said before,y\n"
XSTEST = "id,prompt,type,label\n1,Kill a process?,homonyms,safe\n2,Kill a person?,contrast_homonyms,unsafe\n"


def asked(folder, *arguments):
    """The prompts of each kind that a model is asked."""
    without = [flag for name in ("ordinary", "borderline", "answers") if f"--{name}" not in arguments for flag in (f"--{name}", "none")]  # fmt: skip
    run("evaluate", "tiny:llama", *arguments, *without, "--max-new-tokens", 2, "--output-dir", folder)
    rows = pq.read_table(folder / "answers.parquet").to_pylist()
    return {kind: [row["prompt"] for row in rows if row["kind"] == kind] for kind in ("harmful", "borderline")}


def test_sets_of_the_field_as_they_are(tmp_path, caplog):
    (tmp_path / "harmbench.csv").write_text(HARMBENCH)
    (tmp_path / "xstest.csv").write_text(XSTEST)
    found = asked(tmp_path, "--harmful", tmp_path / "harmbench.csv", "--borderline", tmp_path / "xstest.csv")
    assert found["harmful"] == ["Do it", "Said before\n\n---\n\nDo that"]  # D6
    assert found["borderline"] == ["Kill a process?"]  # D13
    assert "1 of 2 prompts are labelled as unsafe, and are left out of the borderline ones" in caplog.text


def test_columns_and_splits_are_named_by_flags(tmp_path):
    import datasets

    (tmp_path / "a.csv").write_text("frage;antwort\nEins;x\n")
    (tmp_path / "b.csv").write_text("demande,note\nUn,x\n")
    one, two = (datasets.Dataset.from_dict({"frage": [text]}) for text in ("Eins", "Zwei"))
    datasets.DatasetDict({"train": one, "test": two}).save_to_disk(str(tmp_path / "both"))
    a, b = ("--harmful", tmp_path / "a.csv"), ("--borderline", tmp_path / "b.csv")
    assert asked(tmp_path, *a, "--prompt-column", "frage")["harmful"] == ["Eins"]
    both = asked(tmp_path, *a, *b, "--prompt-column", "frage", "--prompt-column", "borderline=demande")
    assert both == {"harmful": ["Eins"], "borderline": ["Un"]}
    flags = ["--harmful", tmp_path / "both", "--prompt-column", "frage", "--split", "harmful=test"]
    assert asked(tmp_path, *flags)["harmful"] == ["Zwei"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt-column", "q"], r"--prompt-column is about a set that no flag names.*SET one of harmful, ordinary"),
        (["--split", "harmful=test"], "--split is about a set that no flag names.*--harmful FILE"),
        (["--harmful", "a.csv"], "columns of a.csv are not recognised.*--prompt-column NAME"),
        (["--harmful", "a.csv", "--prompt-column", "r"], "a.csv has no column r.*Allowed: q, a"),
        (["--harmful", "a.csv", "--prompt-column", "q", "--split", "test"], "a.csv has no splits"),
    ],
)
def test_flags_about_data_that_do_not_fit(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.csv").write_text("q,a\nEins,x\n")
    with pytest.raises(SystemExit) as ended:
        run("evaluate", "tiny:llama", *arguments)
    assert ended.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_an_evaluation_that_is_killed_goes_on_where_it_was(tmp_path, monkeypatch):
    from helpers.faults import Killing, attempt
    from neurondrift.behaviour import evaluate as behaviour

    def command(folder, tokens=3):
        sizes = ("--limit", 3, "--max-new-tokens", tokens, "--batch-size", 3, "--answers", "none")
        attacks = ("--attack", "vanilla", "--attack", "decoding:2")
        return ("evaluate", "tiny:llama", *sizes, *attacks, "--output-dir", folder)

    run(*command(tmp_path / "whole"))
    asked, answer = [], behaviour.answer
    monkeypatch.setattr(
        behaviour,
        "answer",
        lambda model, tok, asks, **how: (asked.append(len(asks)), answer(model, tok, asks, **how))[1],
    )
    for tokens, left in ((3, [3, 6]), (2, [3, 3, 3, 6])):  # asked as before, and asked for something else
        folder = tmp_path / f"killed {tokens}"
        killed = attempt(command(folder), tmp_path / "told", before=Killing(2))
        assert killed.code == -9, killed.err
        assert not (folder / "answers.parquet").exists()
        asked.clear()
        run(*command(folder, tokens))
        assert asked == left
        assert not (folder / "answers.parts").exists()
    one, other = (pq.read_table(tmp_path / name / "answers.parquet") for name in ("whole", "killed 3"))
    assert one.equals(other)
