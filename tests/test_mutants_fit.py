"""Every mutation of ``make mutants`` still finds its place in the library, and its test."""

import ast

import pytest

from tools.mutants import MUTATIONS, ROOT, Mutation, mutated, source_of


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_fits(mutation: Mutation) -> None:
    changed = mutated(mutation)
    assert changed != ast.unparse(ast.parse(source_of(mutation).read_text()))
    compile(changed, source_of(mutation).name, "exec")
    file, _, test = mutation.test.partition("::")
    assert f"def {test}(" in (ROOT / "tests" / file).read_text()
