"""warm_start sees through wrappers, nested in any order, on either side, and takes no child for one."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from cktat_loss import WarmStartReport, warm_start
from cktat_loss._state_dicts import _unwrapped, pair

WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "parallel": DataParallel,
    "ddp": DistributedDataParallel,
    "compiled": lambda module: torch.compile(module, backend="eager"),
    "averaged": AveragedModel,
}
PAIRS = [(outer, inner) for outer in WRAPPERS for inner in WRAPPERS]
PAIRS.remove(("compiled", "compiled"))  # torch.compile makes a function, not a module, of a compiled module
NESTINGS: list[tuple[str, ...]] = [(), *((outer,) for outer in WRAPPERS), *PAIRS]
EACH_NESTING = pytest.mark.parametrize("nesting", NESTINGS, ids=lambda nesting: " of ".join(nesting) or "bare")


@pytest.fixture(autouse=True, scope="module")
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Net(nn.Module):
    """Weights and BatchNorm statistics that no other instance has."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, 2)
        self.features[1].running_mean.normal_()
        self.features[1].num_batches_tracked.fill_(int(torch.randint(1, 10**6, ())))


class Alone(nn.Module):
    """A model with a child that really is called `module`."""

    def __init__(self) -> None:
        super().__init__()
        self.module = Net()


class WithSister(Alone):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)


class Twins(nn.Linear):
    """Names of equal shape at every level: read wrongly, the copy would be silent and wrong."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.module = nn.Linear(2, 2)


class Odd(nn.Module):
    """Tensors called as a wrapper's would be."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Parameter(torch.randn(2))
        self.register_buffer("n_averaged", torch.randn(2))


ALL = WarmStartReport(copied=tuple(Net().state_dict()), missing=(), unexpected=(), mismatched=())


def wrap(module: nn.Module, nesting: tuple[str, ...]) -> tuple[nn.Module, nn.Module]:
    """The wrapped model, and the one within (AveragedModel makes its own)."""
    wrapped = module
    for name in reversed(nesting):
        wrapped = WRAPPERS[name](wrapped)
    within = wrapped
    for name in nesting:
        within = getattr(within, "_orig_mod" if name == "compiled" else "module")
    return wrapped, within


def assert_same(student: nn.Module, teacher: nn.Module) -> None:
    torch.testing.assert_close(student.state_dict(), teacher.state_dict(), rtol=0, atol=0)


@EACH_NESTING
def test_every_nesting_against_every_other(nesting: tuple[str, ...]) -> None:
    for around_teacher in NESTINGS:
        student, inner_student = wrap(Net(), nesting)
        teacher, inner_teacher = wrap(Net(), around_teacher)
        assert warm_start(student, teacher) == ALL, around_teacher
        assert_same(inner_student, inner_teacher)


@EACH_NESTING
@pytest.mark.parametrize("model", [Net, Alone, WithSister, Twins, Odd])
def test_every_nesting_of_models_with_names_like_a_wrappers(nesting: tuple[str, ...], model: type[nn.Module]) -> None:
    (student, inner_student), teacher = wrap(model(), nesting), model()
    assert warm_start(student, teacher).copied == tuple(teacher.state_dict())
    assert_same(inner_student, teacher)
    for read in (nn.Module.state_dict, lambda module: module):
        bare, (teacher, inner_teacher) = model(), wrap(model(), nesting)
        assert warm_start(bare, read(teacher)).copied == tuple(bare.state_dict())
        assert_same(bare, inner_teacher)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("place", ["features", "features.1", "head"])
def test_a_wrapper_in_the_middle(wrapper: str, place: str) -> None:
    parent, _, child = place.rpartition(".")
    wrapped, bare = Net(), Net()
    expected = copy.deepcopy(wrapped)
    wrapped.get_submodule(parent)._modules[child] = WRAPPERS[wrapper](wrapped.get_submodule(place))
    assert tuple(wrapped.state_dict()) != ALL.copied

    assert warm_start(bare, wrapped) == ALL
    assert_same(bare, expected)
    assert warm_start(Net(), wrapped.state_dict()) == ALL

    other = Net()
    assert warm_start(wrapped, other) == ALL
    assert warm_start(bare, wrapped) == ALL
    assert_same(bare, other)


@pytest.mark.parametrize("nesting", [(), ("parallel",)])
@pytest.mark.parametrize(("ours", "theirs"), [(WithSister, Alone), (Alone, WithSister)])
def test_part_of_a_model_with_a_child_called_module(
    nesting: tuple[str, ...], ours: type[Alone], theirs: type[Alone]
) -> None:
    (student, inner_student), teacher = wrap(ours(), nesting), theirs()
    report = warm_start(student, teacher.state_dict(), strict=False)
    assert (report.missing if ours is WithSister else report.unexpected) == ("head.weight", "head.bias")
    assert (report.unexpected if ours is WithSister else report.missing) == ()
    assert_same(inner_student.module, teacher.module)


def test_a_wrapper_of_the_users_own() -> None:
    student, teacher = Net(), Alone()
    assert warm_start(student, teacher) == ALL
    assert_same(student, teacher.module)


def test_n_averaged_is_not_written() -> None:
    student, teacher = AveragedModel(Net()), AveragedModel(Net())
    teacher.n_averaged.fill_(7)
    warm_start(student, teacher)
    assert int(student.n_averaged) == 0


def test_names_that_agree_as_they_are_win_a_tie() -> None:
    assert pair({"module.w"}, {"w": 1, "module.w": 2}) == ({"module.w": 2}, ("w",))


parts = st.sampled_from(["module", "_orig_mod", "n_averaged", "a", "z"])
name_sets = st.sets(st.lists(parts, min_size=1, max_size=5).map(".".join), max_size=12)


@given(name_sets, st.booleans())
def test_no_two_names_ever_become_one(names: set[str], by_name: bool) -> None:
    clean = _unwrapped({name: name for name in names}, by_name=by_name)
    left_out = names - set(clean.values())
    assert len(clean) + len(left_out) == len(names)
    assert all(by_name and "n_averaged" in name.split(".") for name in left_out)


def fully_sharded(module: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return nn.Sequential(fully_shard(module, mesh=init_device_mesh("cpu", (1,))))


def with_a_sharded_parameter(module: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    module.head.bias = nn.Parameter(distribute_tensor(module.head.bias.detach(), init_device_mesh("cpu", (1,))))
    return module


def wrapped_in_fsdp(module: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    class Unstarted(FullyShardedDataParallel):  # the real one wants an accelerator to start
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self._fsdp_wrapped_module = module

    return Unstarted()


@pytest.mark.parametrize("shard", [fully_sharded, with_a_sharded_parameter, wrapped_in_fsdp])
def test_sharded_models_are_refused(shard: Callable[[nn.Module], nn.Module]) -> None:
    sharded = shard(Net())
    pairs = [(sharded, Net()), (Net(), sharded)]
    if shard is not wrapped_in_fsdp:  # whose state_dict is whole by default
        pairs.append((Net(), sharded.state_dict()))
    for student, teacher in pairs:
        with pytest.raises(TypeError, match=r"(student|teacher).* must not be sharded: .* before wrapping"):
            warm_start(student, teacher)
