"""Changes one thing at a time in Prometheus's rules: a scenario of tests/rules/ must notice it.

``make mutants`` (or ``python -m tests.rule_mutants [NAME ...]``) derives the mutants from the shipped rules, so a new
rule has its mutants without an entry here. It exits with 1 when a mutant survives, when an entry of ``EQUIVALENT``
describes no mutant any more, or when a scenario fails without any change. A change that no scenario notices is either
not tested, or the rule has a needless part.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.rules import RECORDING, RULES, SCENARIOS, groups_of, only, promtool, promtool_files, promtool_tests

EQUIVALENT = (
    (
        r"Savings(Commits|Saves|RuleEvaluation|Notifications)Failing|SavingsRequestsRefused|SavingsStoppedArriving",
        r"increase => rate, .*",
        "the rate is the increase divided by the window, so both are above 0 at the same times",
    ),
    (
        r"SavingsRequestsRefused|SavingsStoppedArriving",
        r"sum => max, .*",
        "no increase is negative, so their sum is above 0 when the largest is; only the number in the text differs",
    ),
    (
        r"Savings(Directory|File|Journal)FsyncFailing",
        r"max => (sum|min), .*",
        "each group has one series: the aggregation only takes its label target away",
    ),
    (
        r"Savings(Directory|File|Journal)FsyncFailing|SavingsRecovered",
        r"> => >=, .*:increase.*",
        "a recorded number of failures or repairs is never 0",
    ),
    (
        r"instance_(target|kind):.*",
        r"> => >=, .* offset .*",
        "the alerts take a recorded 0 for no failure",
    ),
    (
        r"SavingsStoreGone",
        r"(last_over_time => (max|min)|count_over_time => sum)_over_time, .*",
        "the value of savings_store_info is always 1",
    ),
    (
        r"SavingsStoreGone",
        r"1d => 172800s, after \) \( last_over_time.*",
        "a store that was last shown more than a day ago is not in the first operand",
    ),
    (
        r"SavingsDiskFilling",
        r"0 => 2, .*|< => <=, .*",
        "the trend is not known to a byte or an inode",
    ),
    (
        r"SavingsWatchedFileStale",
        r"0 => 2, .*",
        "no record is from the first two seconds of 1970",
    ),
    (
        r"instance:savings_(save|commit)_slow:.*",
        r"sum => max, .*",
        "there is one bucket with this bound: the sum only takes its label le away",
    ),
    (
        r"instance:savings_(save|commit)_slow:.*",
        r"> => >=, .*",
        "without commits or saves the share is not a number, which is above no limit",
    ),
    (
        r"Watchdog",
        r"1 => .*",
        "an alert fires with any value",
    ),
    (
        r"Savings(Save|Commit)Latency.*",
        r"> => >=, .*|>= => >, .*",
        "an extrapolated count, a share or a quantile equals a limit only by the way in which it is rounded",
    ),
)
"""Mutants that fire when the rule does: what matches the rule's name, what matches the change, and the reason."""

# Each function or operator, and those that it is easily confused with.
_CONFUSED = {
    "max_over_time": ("min_over_time",),
    "min_over_time": ("max_over_time",),
    "avg_over_time": ("max_over_time", "min_over_time"),
    "last_over_time": ("max_over_time", "min_over_time"),
    "count_over_time": ("sum_over_time",),
    "increase": ("rate",),
    "changes": ("resets",),
    "resets": ("changes",),
    "sum": ("max",),
    "max": ("sum", "min"),
    "unless": ("and",),
}
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class Mutant(NamedTuple):
    """A change of one rule."""

    name: str
    """The alert and its window, or the recorded series."""
    change: str
    rule: dict[str, Any]
    changed: dict[str, Any]

    @property
    def is_equivalent(self) -> bool:
        return any(self.matches(entry) for entry in EQUIVALENT)

    def matches(self, entry: tuple[str, str, str]) -> bool:
        return bool(re.fullmatch(entry[0], self.name) and re.fullmatch(entry[1], self.change))


def mutants_of(rule: dict[str, Any]) -> Iterator[Mutant]:
    name = rule["record"] if "record" in rule else rule["alert"] + rule["labels"].get("window", "")
    seen = {rule["expr"]}
    for change, expression in _expressions(rule["expr"]):
        if expression not in seen:
            seen.add(expression)
            yield Mutant(name, change, rule, {**rule, "expr": expression})
    if "for" in rule:
        for factor in (0, 0.5, 2):
            yield Mutant(name, f"for x {factor}", rule, {**rule, "for": _scaled(rule["for"], factor)})


def _expressions(expression: str) -> Iterator[tuple[str, str]]:
    """Each change of an expression, and the changed expression."""
    for place in re.finditer(r"(?<=\[|:)\d+[smhd]|(?<=offset )\d+[smhd]", expression):
        for factor in (0.5, 2):
            yield _replaced(expression, place, _scaled(place[0], factor))
    code = _without_strings(expression)
    # A product of numbers is one number.
    for place in re.finditer(r"(?<![\w.\[:])(\d+(?:\.\d+)?)(?: \* [\d.]+)?(?![\w.\]:])", code):
        number = float(place[1])
        for scaled in (0.8 * number, 1.25 * number) if number else (2,):
            yield _replaced(expression, place, f"{scaled:.10g}" + place[0][len(place[1]) :])
    for place in re.finditer(r"(?<= )[<>](?= )", code):
        yield _replaced(expression, place, f"{place[0]}=")
    for place in re.finditer(r">=", code):
        yield _replaced(expression, place, ">")
    for place in re.finditer(r"\b[a-z_]+\b(?=\s*\(| by | without | on )", code):
        for other in _CONFUSED.get(place[0], ()):
            yield _replaced(expression, place, other)
    for place in re.finditer(r"\b(on|ignoring|without|by) \(([^)]+)\)", code):
        yield _replaced(expression, place, f"{place[1]} ()")
    for place in re.finditer(r'\w+(?:=~|!=|=)"(?:[^"\\]|\\.)*",?', expression):
        yield _replaced(expression, place, "")
    yield from _without_operands(expression, code)


def _without_operands(expression: str, code: str) -> Iterator[tuple[str, str]]:
    """An expression without one operand of ``and``, ``or`` or ``unless``, on every level of parentheses."""
    open_at, regions = [0], []
    for place in re.finditer(r"[()]|$", code):
        if place[0] == "(":
            open_at.append(place.end())
        else:
            regions.append((open_at.pop(), place.start()))
    for start, end in regions:
        flat = code[start:end]
        while flat != (flat := re.sub(r"\([^()]*\)", lambda inner: "_" * len(inner[0]), flat)):
            pass
        operators = list(re.finditer(r"\b(?:and|or|unless)\b(?: (?:on|ignoring) _+)?", flat))
        for number, operator in enumerate(operators):
            stop = operators[number + 1].start() if number + 1 < len(operators) else len(flat)
            yield _replaced(expression, slice(start + operator.start(), start + stop), "")
        if operators and not operators[0][0].startswith("unless"):
            yield _replaced(expression, slice(start, start + operators[0].end()), "")


def _replaced(expression: str, place: re.Match[str] | slice, new: str) -> tuple[str, str]:
    start, stop = (place.start, place.stop) if isinstance(place, slice) else place.span()
    old, before = (" ".join(text.split()) for text in (expression[start:stop], expression[max(start - 40, 0) : start]))
    # What stands before it tells it from the same text at another place.
    return f"{old} => {new or 'nothing'}, after {before or 'nothing'}", expression[:start] + new + expression[stop:]


def _without_strings(expression: str) -> str:
    """An expression whose strings are blank, at the same length."""
    return re.sub(r'"(?:[^"\\]|\\.)*"', lambda string: '"' + " " * (len(string[0]) - 2) + '"', expression)


def _scaled(duration: str, factor: float) -> str:
    return f"{int(int(duration[:-1]) * _SECONDS[duration[-1]] * factor)}s"


def tests_of(
    mutant: Mutant, groups: list[dict[str, Any]]
) -> Iterator[tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
    """Pairs of the groups of rules, with the mutant in its place, and the tests that these must pass."""
    changed = [
        {**group, "rules": [mutant.changed if rule == mutant.rule else rule for rule in group["rules"]]}
        for group in groups
    ]
    if "record" in mutant.rule:
        yield changed, RECORDING
    for alert, scenarios in SCENARIOS.items():
        read = only(alert, changed)
        if any(mutant.changed in group["rules"] for group in read):
            yield read, promtool_tests(alert, [one for one in scenarios if _may_see(one, mutant.rule)])


def _may_see(scenario: dict[str, Any], rule: dict[str, Any]) -> bool:
    """Whether a scenario is not about an alert of the same name with another window."""
    asked, window = scenario.get("labels", ""), rule.get("labels", {}).get("window", "")
    return not window or f'window="{window}"' in asked or "window=" not in asked


def result_of(mutant: Mutant, groups: list[dict[str, Any]]) -> str:
    """``killed`` by a test, ``survived``, or ``invalid``, if Prometheus does not load it: it could never run."""
    tried = list(tests_of(mutant, groups))
    with tempfile.TemporaryDirectory() as name:
        # The groups in order and in reverse, as in the tests. The first failure is enough.
        for order in (1, -1):
            for changed, tests in tried:
                files = promtool_files(Path(name), tests, changed, order)
                if order == 1 and promtool("check", "rules", Path(name, "rules.yml")).returncode:
                    return "invalid"
                if any(promtool("test", "rules", file).returncode for file in files):
                    return "killed"
    return "survived"


def failing_alert(mutants: list[Mutant], groups: list[dict[str, Any]]) -> str:
    """The first alert that depends on the mutants' rules and whose scenarios fail without any change; empty if none."""
    changing = [mutant.rule for mutant in mutants]
    for alert, scenarios in SCENARIOS.items():
        read = only(alert, groups)
        if any(rule in changing for group in read for rule in group["rules"]):
            with tempfile.TemporaryDirectory() as name:
                files = promtool_files(Path(name), promtool_tests(alert, scenarios), read)
                if any(promtool("test", "rules", file).returncode for file in files):
                    return alert
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description="Change each rule of Prometheus: a scenario must notice it.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="only rules whose names contain this text")
    names = [name.lower() for name in parser.parse_args().names]
    groups = groups_of(RULES)
    mutants = [mutant for group in groups for rule in group["rules"] for mutant in mutants_of(rule)]
    unused = [entry for entry in EQUIVALENT if not any(mutant.matches(entry) for mutant in mutants)]
    for entry in unused:
        print(f"no mutant is any more what the table of equivalent ones says: {entry[0]}, {entry[1]}")
    chosen = [mutant for mutant in mutants if not names or any(name in mutant.name.lower() for name in names)]
    if failing := failing_alert(chosen, groups):
        print(f"the scenarios of {failing} fail without any change")
        return 1
    results: Counter[str] = Counter()
    for mutant in chosen:
        result = "equivalent" if mutant.is_equivalent else result_of(mutant, groups)
        results[result] += 1
        if result == "survived":
            print(f"survived  {mutant.name}: {mutant.change}", flush=True)
    print(f"{len(chosen)} mutants of Prometheus's rules:", dict(results))
    return 1 if results["survived"] or unused else 0


if __name__ == "__main__":
    sys.exit(main())
