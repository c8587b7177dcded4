"""A device for machines that have none: 'pretend' refuses what a GPU would refuse.

    with pretend.device():
        x = torch.zeros(3, device='pretend')

A tensor there is a wrapper: it says that it lies on pretend:0, and computes with the CPU tensor
inside. It cannot meet a tensor of the CPU, so that code which forgets a `.to(device)` fails here
as it would on a GPU; numbers come out as on a CPU. What it does not show of CUDA:

- speed, memory, kernels and their rounding are those of the CPU, and nothing is asynchronous;
- a generator of the device draws the same numbers as one of the CPU;
- autocast knows only the operations LOW and FULL below;
- Module.to() makes new parameters, where CUDA changes the old ones in place.
"""
import contextlib
from unittest import mock

import torch
from torch.library import Library, fallthrough_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

aten = torch.ops.aten
COPIES = (aten._to_copy.default, aten.copy_.default)
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)
# Under autocast, CUDA computes LOW in bfloat16 and FULL in float32, whatever comes in.
LOW = (
    aten.linear.default,
    aten.matmul.default,
    aten.conv2d.default,
    aten.scaled_dot_product_attention.default,
)
FULL = (
    aten.layer_norm.default,
    aten.group_norm.default,
    aten.softmax.int,
    aten.log_softmax.int,
    aten.cross_entropy_loss.default,
    aten.mse_loss.default,
    aten.sum.default,
    aten.sum.dim_IntList,
)


class PretendTensor(torch.Tensor):
    """Says that it lies on pretend:0; `inside` is a tensor of the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inside):
        layout = inside.size(), inside.stride(), inside.storage_offset()
        how = {'dtype': inside.dtype, 'device': 'pretend:0'}
        made = torch.Tensor._make_wrapper_subclass(cls, *layout, **how)
        made.inside = inside
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})

    def __repr__(self):
        return f'pretend({self.inside})'

    def tolist(self):
        return self.inside.tolist()

    def numpy(self):
        raise TypeError("can't convert a tensor of pretend:0 to numpy: use .cpu() first")

    def untyped_storage(self):
        """safetensors looks whether two tensors share memory."""
        return self.inside.untyped_storage()


# ---- what is computed, and what is refused ----
def compute(func, args, kwargs):
    """Do on the CPU what was asked, if a GPU would do it; results lie where they would there."""
    tensors = []
    inner_args = unwrap(args, tensors)
    inner_kwargs = unwrap(kwargs, tensors)
    wrappers = {id(t.inside): t for t in tensors if isinstance(t, PretendTensor)}
    there = len(wrappers) > 0
    if there:
        refuse_mixing(func, args, tensors)
    if func is aten._fused_adamw_.default:
        refuse_layouts(*args[:4])
    device = kwargs.get('device')
    if device is not None:  # something new, or a copy to another device
        there = device.type == 'pretend'
        inner_kwargs['device'] = torch.device('cpu') if there else device
    out = func(*inner_args, **inner_kwargs)
    return wrap(out, wrappers) if there else out


def unwrap(x, tensors):
    """The tensors inside, of lists and dictionaries too; adds to `tensors` all that it meets."""
    if isinstance(x, torch.Tensor):
        tensors.append(x)
        return x.inside if isinstance(x, PretendTensor) else x
    if isinstance(x, (list, tuple)):
        return [unwrap(part, tensors) for part in x]
    if isinstance(x, dict):
        return {name: unwrap(part, tensors) for name, part in x.items()}
    return x


def wrap(x, wrappers):
    """Wrappers around the tensors of a result; what was changed in place keeps the one it has."""
    if isinstance(x, torch.Tensor):
        if id(x) in wrappers:
            return wrappers[id(x)]
        return PretendTensor(x.resolve_conj())  # no wrapper tells that what is inside is conjugated
    if isinstance(x, (list, tuple)):
        return type(x)(wrap(part, wrappers) for part in x)
    return x


def refuse_mixing(func, args, tensors):
    """RuntimeError where CUDA raises one. It allows copies, indices that lie on the CPU, and, in
    operations that go element by element, numbers of the CPU: tensors without axes."""
    if func in INDEXING:
        tensors = [args[0], *args[2:3]]  # all but the indices
    on_cpu = [t for t in tensors if not isinstance(t, PretendTensor)]
    if len(on_cpu) == 0 or func in COPIES:
        return
    numbers_may = torch.Tag.pointwise in func.tags or func in INDEXING
    changed = func._schema.is_mutable and any(t is args[0] for t in on_cpu)
    if changed or any(t.ndim > 0 or not numbers_may for t in on_cpu):
        raise RuntimeError(f'Expected all tensors on the same device, {func} got pretend:0 and cpu')


def refuse_layouts(*lists):
    """CUDA's fused AdamW wants a parameter, its gradient and averages in one order in memory; the
    CPU's pairs the wrong numbers without a word."""
    for tensors in zip(*lists):
        orders = {tuple(s for s, n in zip(t.stride(), t.shape) if n > 1) for t in tensors}
        if len(orders) > 1:
            raise RuntimeError(f'fused AdamW got tensors of different strides: {orders}')


# ---- the device is there within `with pretend.device():` ----
class Operations(TorchDispatchMode):
    """Sees what has no tensor there yet: torch.zeros(3, device='pretend'), x.to('pretend')."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if len(types) == 0 and 'device' not in kwargs:  # all on the CPU
            return func(*args, **kwargs)
        return compute(func, args, kwargs)


class Functions(TorchFunctionMode):
    """Sees what is lost in C++: the device of a generator and that of torch.tensor."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.unravel_index:  # calls torch.tensor itself, where nobody sees it any more
            places = func(args[0].cpu(), **kwargs)
            return tuple(place.to(args[0].device) for place in places)
        if 'device' not in kwargs and 'generator' not in kwargs:
            return func(*args, **kwargs)
        device = torch.device(kwargs.get('device') or 'cpu')
        if func in (torch.tensor, torch.as_tensor) and device.type == 'pretend':
            del kwargs['device']
            return func(*args, **kwargs).to(device)
        if args and isinstance(args[0], torch.Tensor):
            device = args[0].device
        generator = kwargs.get('generator')
        if generator is not None and generator.device.type != device.type:
            raise RuntimeError(f'Expected a generator of {device}, found {generator.device}')
        return func(*args, **kwargs)


class Generator(torch.Generator):
    """A generator of the CPU, of which only the name of the device may be another."""

    device = None

    def __new__(cls, device='cpu'):
        made = super().__new__(cls)
        made.device = torch.device(device)
        return made


def enter(self):
    """In place of inference mode, in which no wrapper can be made."""
    self.instead = torch.no_grad()
    self.instead.__enter__()


def leave(self, *error):
    self.instead.__exit__(*error)


@contextlib.contextmanager
def device():
    without_gradients = mock.patch.multiple(torch.inference_mode, __enter__=enter, __exit__=leave)
    future = torch.__future__
    before = future.get_overwrite_module_params_on_conversion()
    future.set_overwrite_module_params_on_conversion(True)  # p.data = x would leave p.inside alone
    try:
        generators = mock.patch.object(torch, 'Generator', Generator)
        with generators, without_gradients, Functions(), Operations():
            yield
    finally:
        future.set_overwrite_module_params_on_conversion(before)


# ---- torch hears of it at import: the first backward pass starts a thread for each device ----
class Backend:
    """The module torch.pretend: what torch.autocast, torch.manual_seed and fork_rng ask of a
    device. Its random numbers come from the CPU's generator: it has no state of its own."""

    is_available = staticmethod(lambda: True)
    is_initialized = staticmethod(lambda: True)
    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 1)
    manual_seed_all = staticmethod(lambda seed: None)
    get_rng_state = staticmethod(lambda device: torch.get_rng_state())
    set_rng_state = staticmethod(lambda state, device: None)
    _is_in_bad_fork = staticmethod(lambda: False)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16])


def autocast(library, func, dtype):
    """Under torch.autocast('pretend'), func computes in dtype; float64 stays, as on CUDA."""

    def cast(x):
        if isinstance(x, PretendTensor) and x.dtype in (torch.float32, torch.bfloat16):
            return x.to(dtype)
        return x

    def kernel(*args, **kwargs):
        with torch._C._ExcludeDispatchKeyGuard(key):
            return func(*map(cast, args), **{name: cast(x) for name, x in kwargs.items()})

    key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
    library.impl(func, kernel, 'AutocastPrivateUse1')


_setup_privateuseone_for_python_backend('pretend', Backend())
others, listed = Library('_', 'IMPL'), Library('aten', 'IMPL')  # they last as long as these names
others.fallback(fallthrough_kernel, 'AutocastPrivateUse1')
for func in LOW:
    autocast(listed, func, torch.bfloat16)
for func in FULL:
    autocast(listed, func, torch.float32)
