from __future__ import annotations

import pytest

from fastgen.data.prompts import read_prompts
from fastgen.errors import UserError


def read(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_prompts(path)


@pytest.mark.parametrize(
    ("name", "content", "prompts"),
    [
        ("a.txt", "a red fox\n\n  two dogs \r\nü\x0cx", ["a red fox", "two dogs", "ü\x0cx"]),
        ("a.txt", b"\xef\xbb\xbffirst\nsecond", ["first", "second"]),
        ("a.tsv", 'Prompt\tNote\n"G I" in paint\tx\nthe word "PEACE"\t\n', ['"G I" in paint', 'the word "PEACE"']),
        ("A.TSV", "Note\tprompt\nx\ta fox\r\n", ["a fox"]),
        (
            "a.csv",
            'id,text\n1,"a fox, red"\n2,"say ""hi"""\n3,"two\nlines"\n',
            ["a fox, red", 'say "hi"', "two\nlines"],
        ),
        ("a.jsonl", '{"tag": "x", "prompt": "a bench"}\n\n{"text": "a \\u00fc"}\n', ["a bench", "a ü"]),
        ("a.jsonl", '{"prompt": "p", "text": "t"}', ["p"]),
    ],
)
def test_every_format_in_its_order(tmp_path, name, content, prompts):
    assert read(tmp_path, name, content) == prompts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "\n \n", "holds no prompt"),
        ("a.txt", b"ok\nna\xefve\n", "line 2: not UTF-8"),
        ("a.tsv", "Category\tNote\nx\ty\n", r"no column 'Prompt' or 'text' in its first line \(category, note\)"),
        ("a.tsv", "Prompt\tNote\na\tb\n\tb\n", "line 3: an empty prompt"),
        ("a.tsv", "Note\tPrompt\nonly a note\n", "line 2: an empty prompt"),
        ("a.tsv", "", "no column"),
        ("a.csv", 'prompt\n"never closed\n', r"a\.csv line \d: unexpected end of data"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": \n', "line 2: not JSON"),
        ("a.jsonl", '{"caption": "a"}\n', "line 1: no text under 'prompt' or 'text'"),
        ("a.jsonl", '["a"]\n', "line 1: no text"),
        ("a.jsonl", '{"prompt": " "}\n', "line 1: an empty prompt"),
        ("a.json", "[]", r"read from \.txt, \.tsv, \.csv, \.jsonl files, not from '\.json'"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message):
        read(tmp_path, name, content)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.txt: No such file"):
        read_prompts(tmp_path / "nothing.txt")
