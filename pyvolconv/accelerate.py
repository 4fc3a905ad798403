"""`accelerate(model)`: give every 3-D convolution of a model this package's arithmetic, in place.

So do InstanceNorm3d and, in training, BatchNorm3d: the largest cost beside the convolutions of the networks that have
them.

A module keeps its identity, parameters, buffers and hooks; only its class changes, to one derived from both
the original class and this package's, in that order:

    class Conv3d(TheirConv3d, pyvolconv.Conv3d)        MRO: TheirConv3d, pyvolconv.Conv3d, nn.Conv3d

So what a user's subclass overrides stays in force, and what it leaves to `nn.Conv3d` (also by
`super().forward`) lands here. The derived class carries the original's name and module, so repr, FX's
choice of leaf modules and counting by class name see no difference, and it pickles as the original class.

Modules that call a convolution and what follows it (`fusion` says which) get a derived class in the same way, one whose
`forward` runs the chain as one pass. Their children stay in place: parameters, state_dict keys, indexing and length are
those of before, and a child that is called by someone else does what it always did.
"""

from __future__ import annotations

import copy
import copyreg
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._pytree import tree_leaves

from .autotune import tune as time_passes
from .example_run import forward, forward_and_backward
from .fusion import find
from .nn import BatchNorm3d, Conv3d, ConvTranspose3d, InstanceNorm3d
from .wrappers import wrappers

Model = TypeVar("Model", bound=nn.Module)
_REPLACEMENTS: tuple[tuple[type[nn.Module], type[nn.Module]], ...] = (
    (nn.Conv3d, Conv3d),
    (nn.ConvTranspose3d, ConvTranspose3d),
    (nn.InstanceNorm3d, InstanceNorm3d),
    (nn.BatchNorm3d, BatchNorm3d),
)
_REPLACED = tuple(torch_class for torch_class, _ in _REPLACEMENTS)


def accelerate(
    model: Model,
    example_input: Any = None,
    *,
    fuse: bool = True,
    tune: bool = True,
    keep_channels_last: bool = False,
) -> Model:
    """Swap every `nn.Conv3d`, `nn.ConvTranspose3d`, `nn.InstanceNorm3d` and `nn.BatchNorm3d`, user subclasses included.

    With `fuse`, chains of Conv3d, BatchNorm3d (while in eval mode), ReLU, LeakyReLU, SiLU or GELU, and MaxPool3d run as
    one pass, and so do InstanceNorm3d, or BatchNorm3d in training mode, and a ReLU, LeakyReLU or PReLU behind it, where
    it can be proven that nobody sees what is in between: in `nn.Sequential` of any nesting, and in forward code that
    torch.fx can follow.
    `fusion_report(model)` says what became of each convolution and norm, and why no more.

    With an example the model is checked, and tuned to this machine: it runs forward before and after the swap, then
    backward (where gradients are enabled), and every pass of every convolution that this asks for is timed in all
    backends, torch's own among them. The fastest is used from then on, by every call with the same sizes, and kept for
    later processes (`pyvolconv info` says where); while other processes keep cores busy, times are used but not
    kept, and a warning says so. Tuning takes a minute at the most. Parameters, their gradients, buffers and random
    generators are as before afterwards.

    Args:
        model: any module; parameters, state_dict keys, hooks and isinstance relations stay as they are.
        example_input: a tensor or tuple of arguments for `model`, of the sizes that it will be used with. The model
            runs on it in its current mode, and the swap is undone if the shapes or dtypes of the results differ, a
            convolution cannot be run, or anything else raises an exception, tuning included.
        fuse: whether chains run as one pass; without it modules are only replaced one by one.
        tune: whether the convolutions of the example are timed; without it the cost model decides.
        keep_channels_last: whether InstanceNorm3d returns channels_last_3d for a tensor in that format. Torch's returns
            a contiguous one, which every convolution of a channels_last_3d model has to bring back; where code between
            modules calls `view` on the result it must then call `reshape`.

    Returns:
        The same `model`.

    Raises:
        TypeError: `model` is no module, or `example_input` a shape.
        RuntimeError: results on `example_input` changed in shape or dtype.
        UnsupportedProblemError: a forced backend cannot run a convolution of the example.
        BackendError: a backend failed while it ran one, or was timed.
        After these and all others the model is as it was. What the model raises on the example has a note that says so
        (Python 3.11 and newer).

    Example:
        >>> import torch, pyvolconv
        >>> model = torch.nn.Sequential(torch.nn.Conv3d(1, 4, 3), torch.nn.ReLU())
        >>> type(pyvolconv.accelerate(model)[0]).__mro__[1].__module__
        'pyvolconv.nn'
        >>> type(pyvolconv.revert(model)[0]) is torch.nn.Conv3d
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate() takes a torch.nn.Module, got {type(model).__name__}")
    if example_input is None:
        with _all_or_nothing(model):
            _swap(model, fuse, keep_channels_last)
        return model
    arguments = example_input if isinstance(example_input, tuple) else (example_input,)
    leaves = tree_leaves(arguments)
    if leaves and all(isinstance(leaf, int) for leaf in leaves):
        raise TypeError(
            "accelerate() runs the model on example_input, a tensor or a tuple of the model's arguments, but got the "
            f"numbers {example_input}; give torch.randn of them if they are a shape"
        )
    with _noted(arguments):
        before = forward(model, arguments)
    with _all_or_nothing(model):
        _swap(model, fuse, keep_channels_last)
        after, asked = forward_and_backward(model, arguments)
        if after != before:
            raise RuntimeError(f"accelerate() changed the result on example_input from {before} to {after}; undone")
        if tune:
            time_passes(asked)
    return model


def revert(model: Model) -> Model:
    """Undo `accelerate`: every swapped module gets its original class back, in place.

    Tools that look modules up by their exact type, as eager-mode quantization does, need it, on the model or a copy.

    Returns:
        The same `model`.
    """
    for module in model.modules():
        _revert(module)
    return model


@contextmanager
def _noted(arguments: tuple[Any, ...]) -> Iterator[None]:
    """Say of an error that it comes from running the example, and what the example was."""
    try:
        yield
    except Exception as error:
        if hasattr(error, "add_note"):
            given = ", ".join(
                f"a tensor of {tuple(one.shape)} in {one.dtype}" if isinstance(one, Tensor) else repr(type(one))
                for one in arguments
            )
            error.add_note(
                f"The model does not run on the example given to accelerate(): {given}. Give a tensor, or a tuple of "
                "the arguments of its forward; the model is as it was."
            )
        raise


@contextmanager
def _all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Give modules back the classes that they had before the block if it raises."""
    classes = [(module, type(module), type(module).__bases__) for module in model.modules()]
    try:
        yield
    except BaseException:
        for module, kind, bases in classes:
            module.__class__ = kind
            if kind.__bases__ != bases:
                kind.__bases__ = bases
        raise


def _swap(model: nn.Module, fuse: bool, keep_channels_last: bool) -> None:
    """Swaps what is not ours yet; chains are looked for anew."""
    for module in model.modules():
        if not isinstance(module, _REPLACED) or isinstance(module, nn.InstanceNorm3d):
            _revert(module)
        for torch_class, our_class in _REPLACEMENTS:
            if isinstance(module, torch_class) and not isinstance(module, our_class):
                # A parametrized module has a class of its own, made at run time, which its removal expects to find.
                original = type(module).__bases__[0] if is_parametrized(module) else type(module)
                keeps = keep_channels_last and torch_class is nn.InstanceNorm3d
                _replace_class(module, original, _derived(original, our_class, keeps))  # type: ignore[arg-type]
    if not fuse:
        return
    for module, own in list(wrappers(model)):
        module.__class__ = _derive(type(module), None, own)
    for path, (base, members) in find(model).classes.items():
        module = model.get_submodule(path)
        if base is None:
            module.__class__ = _derive(type(module), base, members)
        else:
            module.__class__ = _derived_sequential(type(module), base, members["left_alone"])  # type: ignore[arg-type]


def _revert(module: nn.Module) -> None:
    derived = _derived_class_of(module)
    if derived is not None:
        _replace_class(module, derived, derived._pyvolconv_original)


def _derived_class_of(module: nn.Module) -> Any:
    """The class that `_derived` made for this module, also under one made later on top of it, or None."""
    return next((kind for kind in type(module).__mro__ if "_pyvolconv_original" in vars(kind)), None)


def _replace_class(module: nn.Module, old: type[nn.Module], new: type[nn.Module]) -> None:
    kind = type(module)
    bases = tuple(new if base is old else base for base in kind.__bases__)
    if kind is old:
        module.__class__ = new
    elif is_parametrized(module):
        kind.__bases__ = bases
    else:
        # A class on top of it that other modules may have too: fully_shard makes one for all of a class.
        module.__class__ = type(kind.__name__, bases, {**vars(kind), "__qualname__": kind.__qualname__})


@cache
def _derived(original: type[nn.Module], ours: type[nn.Module], keeps_channels_last: bool = False) -> type[nn.Module]:
    return _derive(original, ours, {"keeps_channels_last": True} if keeps_channels_last else {})


@cache
def _derived_sequential(
    original: type[nn.Module], base: type[nn.Module], left_alone: frozenset[str]
) -> type[nn.Module]:
    """One class for Sequentials that are alike: `torch.func.stack_module_state` wants models of the same class."""
    return _derive(original, base, {"left_alone": left_alone})


def _derive(original: type[nn.Module], ours: type[nn.Module] | None, own: dict[str, Any]) -> type[nn.Module]:
    if ours is None:
        bases: tuple[type[nn.Module], ...] = (original,)
    else:
        bases = (ours,) if original in ours.__bases__ else (original, ours)
    members: dict[str, Any] = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__reduce_ex__": _reduce_as_original,
        "_pyvolconv_original": original,
        **own,
    }
    lazy = getattr(original, "cls_to_become", None)
    if lazy is not None:
        members["cls_to_become"] = _derived(lazy, ours)  # type: ignore[arg-type]
    # The defaults go through __reduce_ex__ and would return the original class.
    if not hasattr(original, "__copy__"):
        members["__copy__"] = _copy
    if not hasattr(original, "__deepcopy__"):
        members["__deepcopy__"] = _deepcopy
    return type(original.__name__, bases, members)


def _reduce_as_original(self: Any, protocol: Any) -> Any:
    derived = _derived_class_of(self)
    constructor, arguments, *state = super(derived, self).__reduce_ex__(protocol)
    if type(self) is not derived:
        return (constructor, arguments, *state)
    original = derived._pyvolconv_original
    if constructor is copyreg.__newobj__:  # type: ignore[attr-defined]
        # pickle insists that this constructor's class is the object's own, so name it another way.
        constructor, arguments = original.__new__, (original, *arguments[1:])
    return (constructor, tuple(original if part is derived else part for part in arguments), *state)


def _copy(self: Any) -> Any:
    result = type(self).__new__(type(self))  # type: ignore[call-overload]
    result.__setstate__(_state(self, self))
    return result


def _deepcopy(self: Any, memo: dict[int, Any]) -> Any:
    memo[id(self)] = result = type(self).__new__(type(self))  # type: ignore[call-overload]
    # A parametrized module can be copied, although the class that was made for it refuses to give its state.
    result.__setstate__(copy.deepcopy(_state(self, super(_derived_class_of(self), self)), memo))
    return result


def _state(module: nn.Module, view: Any) -> Any:
    """What `view`, the module or a `super` of it, gives to be copied: the user's class may have a say in it."""
    # Python 3.10 has no object.__getstate__.
    getstate = getattr(view, "__getstate__", None)
    return module.__dict__ if getstate is None else getstate()
