"""normative.md and the tests name each other: every statement has its tests, every test's statement is in the table."""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROW = re.compile(r"\| (MQTT5?-[0-9.-]+) \| ([^|]+) \| ([^|]+) \|")
TEST = re.compile(r"`([a-z0-9_/]+\.py)::(test_[a-z0-9_]+)`")
NAMED = re.compile(r"\[(MQTT5?-[0-9.-]+)\]")
# How many statements of each version bind a client or can be observed by it.
STATEMENTS = {"MQTT": 83, "MQTT5": 161}
# Of those, what is about something that the client does not have: the table says why, under its edges.
NOT_APPLICABLE = ("MQTT5-6.0.0-1", "MQTT5-6.0.0-2", "MQTT5-6.0.0-3")
EDGE = re.compile(r"- (MQTT5?-[0-9.-]+): not applicable: .+")


def read_table(text):
    """{statement: [(file, test)]}; AssertionError for a row that cannot be read or that comes twice."""
    found = {}
    for line in text.splitlines():
        if not line.startswith("| MQTT"):
            continue
        row = ROW.fullmatch(line)
        assert row, "no row: " + line
        statement, _, tests = row.groups()
        assert statement not in found, statement + " comes twice"
        found[statement] = TEST.findall(tests)
        assert found[statement] and TEST.sub("", tests).replace("<br>", "") == "", "no tests: " + line
    return found


def read_tests():
    """{(file, test): statements named in its docstring}, and {file: statements named anywhere}."""
    named, anywhere = {}, {}
    for path in sorted([*TESTS.glob("*.py"), *TESTS.glob("cpython/*.py")]):
        file = path.relative_to(TESTS).as_posix()
        source = path.read_text()
        anywhere[file] = set(NAMED.findall(source))
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                named[file, node.name] = set(NAMED.findall(ast.get_docstring(node) or ""))
    return named, anywhere


def table():
    return read_table((TESTS / "normative.md").read_text())


def test_every_statement_is_in_the_table():
    found = [*table(), *NOT_APPLICABLE]
    assert len(set(found)) == len(found) == sum(STATEMENTS.values())
    for version, count in STATEMENTS.items():
        assert sum(statement.startswith(version + "-") for statement in found) == count


def test_what_is_not_applicable_has_its_reason_and_neither_row_nor_test():
    found = EDGE.findall((TESTS / "normative.md").read_text())
    assert tuple(found) == NOT_APPLICABLE
    named = set().union(*read_tests()[0].values())
    assert not named & set(NOT_APPLICABLE)


def test_every_test_of_the_table_exists_and_names_its_statement():
    named, _ = read_tests()
    for statement, tests in table().items():
        for test in tests:
            assert test in named, "%s: there is no %s::%s" % (statement, *test)
            assert statement in named[test], "%s::%s does not name %s" % (*test, statement)


def test_every_statement_that_a_test_names_is_in_the_table_with_that_test():
    found = table()
    named, anywhere = read_tests()
    for test, statements in named.items():
        for statement in statements:
            assert test in found.get(statement, ()), "%s of %s::%s" % (statement, *test)
    for file, statements in anywhere.items():
        assert statements <= set(found), "%s: %s" % (file, statements - set(found))
