"""The file of finished runs: rows of an older form are made again."""

import pyarrow.parquet as pq


def row(key, **marks):
    from neurondrift.interventions.runs import RunLog

    return dict.fromkeys(name for name, _ in RunLog.COLUMNS) | {"key": key, "kind": "harmful", "id": "a"} | marks


def test_runs_without_the_marks_of_coherent_answers_are_made_again(tmp_path, caplog):
    from neurondrift.interventions.runs import RunLog

    path = tmp_path / "runs.parquet"
    log = RunLog(path)
    log.add("k", [row("k", refused=True, coherent=True, undecided=False)])
    assert RunLog(path).runs == log.runs
    table = pq.read_table(path)
    pq.write_table(table.drop_columns(["coherent", "undecided"]), path)
    assert RunLog(path).runs == {}
    assert "made again" in caplog.text


def test_a_run_of_an_older_format_has_another_key(monkeypatch):
    from neurondrift.interventions import trials

    trial = trials.Trial("before", "", 1.0, None, None, True)
    now = trials.key_of(trial, "inputs", "zero")
    assert trials.FORMAT >= 2
    monkeypatch.setattr(trials, "FORMAT", 1)
    assert trials.key_of(trial, "inputs", "zero") != now
