"""The console command names the command that was meant."""

import sys

import pytest

from omnimem.__main__ import COMMANDS, OTHERS, main


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        *(("finetun", "finetune"), ("Evaluate", "evaluate"), ("pretrain_tin", "pretrain-tiny")),
        *(("shwo-memory", "show-memory"), *OTHERS.items()),
    ],
)
def test_an_unknown_command_names_the_nearest(given, meant, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["omnimem", given])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"omnimem: no command {given!r}; did you mean {meant!r}? known: ")
    assert meant in COMMANDS


def test_a_word_like_none_of_them_lists_all(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["omnimem", "xyzzy"])
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().err.startswith(f"omnimem: no command 'xyzzy'; known: {', '.join(COMMANDS)}")
