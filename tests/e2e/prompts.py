"""Twenty-four texts as different as the requests of a day: languages, code, digits, noise, and a long one."""

from __future__ import annotations

from typing import Final

from tests.server import ROOT

SHORT: Final = (
    "The three laws of thermodynamics are",
    "def fibonacci(n):\n    ",
    "Il était une fois, dans un petit village,",
    "1, 1, 2, 3, 5, 8, 13, 21,",
    "Die Hauptstadt von Österreich ist",
    "Q: What is the boiling point of water at sea level?\nA:",
    "SELECT name, COUNT(*) FROM orders WHERE date > '2024-01-01'",
    "日本の首都は",
    "Столица России — это",
    "عاصمة فرنسا هي",
    "La capital de España es",
    "3.14159265358979323846",
    '{"name": "Ada", "born": 1815, "fields": [',
    "<html>\n<head><title>Hello</title></head>\n<body>\n",
    "#include <vector>\n\nint sum(const std::vector<int>& values) {\n",
    "Once",
    "a a a a a a a a a a a a",
    "🙂🙃🙂🙃🙂",
    "To be, or not to be, that is the question:\n",
    "Dear Sir or Madam,\n\nI am writing to complain about",
    "| city | inhabitants |\n|---|---|\n| Paris |",
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n",
    "17 * 23 = 391\n12 * 12 = 144\n9 * 8 =",
)
LONG: Final = (ROOT / "LICENSE").read_text(encoding="utf-8") + "\nIn one sentence, this licence says that"
PROMPTS: Final = (*SHORT, LONG)
