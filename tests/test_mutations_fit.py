"""``make mutants`` takes minutes. That each mutation still finds its line, and its test, is seen at once."""

import pytest

from tests.mutations import MUTATIONS, ROOT, Mutation, broken


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_fits(mutation: Mutation) -> None:
    source = (ROOT / "cktat_loss" / f"{mutation.module}.py").read_text()
    changed = broken(source, mutation)
    assert changed != source
    compile(changed, mutation.module, "exec")
    file, _, test = mutation.test.partition("::")
    assert not test or f"def {test.partition('[')[0]}(" in (ROOT / "tests" / file).read_text()
