"""Names as a hostile client may send them."""

from __future__ import annotations

LIMIT = 50
DIFFERENT = 10_000

_SHAPES = (
    "plain-{}",
    "new\nline\r{}",
    'quo"te\\{}\\',
    '{}"}} 1\nsavings_tokens_saved_total{{model="forged"}} 9e9\n#',
    "\u202egnp.{}",
    "\ud800{}\udfff",
    "\x00\x1b[31m{}\x7f",
    "%25252525{}%250a%2522",
    "{}" + "é" * 10_000,
    "{{}}'{}\u2028\u0085\ufeff",
)
NAMES = ["", "other", "unknown", " ", "\x00", *(_SHAPES[n % len(_SHAPES)].format(n) for n in range(DIFFERENT - 5))]
