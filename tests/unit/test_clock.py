"""What there was time for is what there is time for when a killed run goes on."""

import json
import time

from avss.composer.clock import Clock


def test_without_a_time_there_is_always_more(tmp_path):
    clock = Clock(0.0, counts=False, notes=tmp_path / "notes.json")
    assert clock.until(0.5)()
    clock.write_down()
    assert not (tmp_path / "notes.json").exists()


def test_shares_of_the_time_end(tmp_path):
    clock = Clock(0.0, counts=True, notes=tmp_path / "notes.json")
    assert not clock.until(0.5)()
    assert clock.left <= 0
    assert Clock(1000.0, counts=True, notes=tmp_path / "notes.json").until(0.5)()
    assert not clock.in_time(0.5)()
    assert Clock(0.0, counts=False, notes=tmp_path / "notes.json").in_time(0.5)()


def test_a_run_that_goes_on_decides_as_it_did(tmp_path, monkeypatch):
    notes = tmp_path / "state" / "notes.json"
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    first = Clock(100.0, counts=True, notes=notes)
    finalists, rounds = first.until(0.35), first.until(0.5)
    assert first.in_time(0.1)()  # not noted
    now[0] = 30.0
    asked = [finalists()]
    now[0] = 40.0
    asked += [finalists(), rounds()]
    now[0] = 60.0
    asked += [rounds()]
    assert asked == [True, False, True, False]
    first.write_down()
    second = Clock(100.0, counts=True, notes=notes)  # began anew, and what took long before takes no time
    finalists, rounds = second.until(0.35), second.until(0.5)
    assert [finalists(), finalists(), rounds(), rounds()] == asked
    assert second.until(0.5)()  # what was never asked is decided by the time
    second.write_down()
    assert json.loads(notes.read_text()) == [*asked, True]
    second.forget()
    assert not notes.exists()


def test_damaged_notes_are_none(tmp_path):
    notes = tmp_path / "notes.json"
    for text in ("", "{", "[1, 2]", '{"a": true}'):
        notes.write_text(text)
        assert Clock(1000.0, counts=True, notes=notes).until(0.5)()
